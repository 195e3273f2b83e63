//! Directory blocks: shape, checksums, each entry, and what the entries say of other inodes.

use std::hash::{BuildHasher, RandomState};
use std::ops::Range;

use super::finding::EntryFault;
use super::inodes::{Inode, ROOT_INO};
use super::{Cx, Finding, State, groups, index};
use crate::format::csum::crc32c;
use crate::format::dirent::{
    DIR_TYPE, DirLayout, DirentError, HEADER_LEN, MIN_REC_LEN, TAIL_LEN, needed_len, tail,
};
use crate::format::group::GroupFlags;
use crate::format::htree::{self, DxKind};

/// A directory.
pub(super) struct Dir {
    pub(super) ino: u32,
    /// Seed of the checksums of its blocks.
    seed: u32,
    /// Its blocks among all of them.
    pub(super) blocks: Range<usize>,
    /// Where it ends, in blocks.
    pub(super) end: u64,
    pub(super) is_indexed: bool,
    /// Who has an entry for it; 0 for nobody.
    pub(super) parent: u32,
    /// What its ".." says.
    pub(super) dotdot: u32,
    /// From which directory the way up to the root came by here; 0 for none.
    pub(super) passed_by: u32,
}

impl Dir {
    pub(super) fn new(inode: &Inode<'_>) -> Self {
        Self {
            ino: inode.ino,
            seed: inode.seed,
            blocks: 0..0,
            end: 0,
            is_indexed: false,
            parent: if inode.ino == ROOT_INO { ROOT_INO } else { 0 },
            dotdot: 0,
            passed_by: 0,
        }
    }

    pub(super) fn set_blocks(&mut self, blocks: Range<usize>, end: u64) {
        self.blocks = blocks;
        self.end = end;
    }
}

/// A block of a directory.
#[derive(Clone, Copy)]
pub(super) struct DirBlock {
    pub(super) lblk: u32,
    pub(super) pblk: u64,
}

/// Where a name with this hash is.
#[derive(Clone, Copy)]
pub(super) struct NameAt {
    hash: u64,
    lblk: u32,
    offset: u32,
    ino: u32,
}

/// An entry, as far as its shape is sound.
pub(super) struct Entry<'a> {
    pub(super) offset: usize,
    rec_len: usize,
    ino: u32,
    file_type: u8,
    pub(super) name: &'a [u8],
    /// All bytes up to the next.
    whole: &'a [u8],
}

/// The shape of directory blocks.
pub(super) fn layout(cx: &Cx<'_>) -> DirLayout {
    DirLayout {
        block_size: cx.block_size(),
        filetype: cx.geo.has_filetype(),
        tail: cx.geo.metadata_csum(),
        max_ino: cx.geo.inodes_count,
    }
}

/// Looks at all directories.
pub(super) fn check(cx: &Cx<'_>, state: &mut State) {
    let hasher = RandomState::new();
    let mut bytes = vec![0; cx.block_size()];
    // An entry for a directory needs that directory's place in the list.
    for at in 0..state.dirs.len() {
        let (ino, seed) = (state.dirs[at].ino, state.dirs[at].seed);
        let (blocks, is_indexed) = (state.dirs[at].blocks.clone(), state.dirs[at].is_indexed);
        state.names.clear();
        index::begin(state, at);
        for block_at in blocks {
            let block = state.dir_blocks[block_at];
            if cx.read(state, block.pblk, &mut bytes) {
                Block {
                    cx,
                    at,
                    dir: ino,
                    seed,
                    lblk: block.lblk,
                    bytes: &bytes,
                    hasher: &hasher,
                }
                .check(state, is_indexed);
            }
        }
        find_twins(state, ino);
        index::end(cx, state, at);
    }
}

fn find_twins(state: &mut State, dir: u32) {
    let mut names = std::mem::take(&mut state.names);
    names.sort_unstable_by_key(|it| (it.hash, it.lblk, it.offset));
    for pair in names.windows(2).filter(|pair| pair[0].hash == pair[1].hash) {
        let (one, two) = (pair[0], pair[1]);
        let fault = if one.lblk == two.lblk {
            EntryFault::Twice
        } else {
            EntryFault::TwiceApart
        };
        state.tell(Finding::Entry {
            dir,
            lblk: two.lblk,
            offset: two.offset,
            ino: two.ino,
            fault,
        });
    }
    state.names = names;
}

struct Block<'a> {
    cx: &'a Cx<'a>,
    /// Its directory's place in the list.
    at: usize,
    dir: u32,
    seed: u32,
    lblk: u32,
    bytes: &'a [u8],
    hasher: &'a RandomState,
}

impl Block<'_> {
    fn check(&self, state: &mut State, is_indexed: bool) {
        let layout = layout(self.cx);
        let mut is_leaf = true;
        if is_indexed {
            let kind = index::enter(self.cx, state, self.at, self.lblk, self.bytes);
            is_leaf = kind.is_none();
        }
        let has_sum = self.check_sum(state, is_leaf);
        let end = if layout.tail && is_leaf && has_sum {
            self.bytes.len() - TAIL_LEN
        } else {
            self.bytes.len()
        };
        let mut offset = 0;
        let mut number = if self.lblk == 0 { 0 } else { 2 };
        while offset < end {
            let entry = match self.entry(offset, end) {
                Ok(entry) => entry,
                Err(error) => {
                    self.tell(state, offset, 0, EntryFault::Shape(error));
                    return;
                }
            };
            self.check_entry(state, &entry, number, is_indexed);
            offset += entry.rec_len;
            number += 1;
        }
        if is_indexed {
            index::read_node(self.cx, state, self.at, self.lblk, self.bytes);
        }
    }

    fn tell(&self, state: &mut State, offset: usize, ino: u32, fault: EntryFault) {
        state.tell(Finding::Entry {
            dir: self.dir,
            lblk: self.lblk,
            offset: offset as u32,
            ino,
            fault,
        });
    }

    /// Whether the block has its checksum where it belongs.
    fn check_sum(&self, state: &mut State, is_leaf: bool) -> bool {
        let layout = layout(self.cx);
        if !layout.tail {
            return true;
        }
        let (dir, lblk) = (self.dir, self.lblk);
        let has_tail = self.reaches_tail() && tail(self.bytes).is_some();
        let is_right = if has_tail {
            let covered = &self.bytes[..self.bytes.len() - TAIL_LEN];
            let want = crc32c(self.seed, covered);
            tail(self.bytes).is_some_and(|tail| tail.det_checksum.get() == want)
        } else {
            index_sum_is_right(self.bytes, layout, self.seed)
        };
        if is_right {
            return true;
        }
        if is_leaf && !has_tail {
            state.tell(Finding::DirectoryTail { dir, lblk });
            return false;
        }
        state.tell(Finding::DirectoryChecksum { dir, lblk });
        true
    }

    /// Whether the entries end where the tail begins.
    fn reaches_tail(&self) -> bool {
        let top = self.bytes.len() - TAIL_LEN;
        let mut at = 0;
        while at < top {
            let rec_len = usize::from(u16::from_le_bytes([self.bytes[at + 4], self.bytes[at + 5]]));
            if rec_len < HEADER_LEN || rec_len % 4 != 0 {
                return false;
            }
            at += rec_len;
        }
        at == top
    }

    fn entry(&self, offset: usize, end: usize) -> Result<Entry<'_>, DirentError> {
        let bytes = self.bytes;
        if end - offset < HEADER_LEN {
            return Err(DirentError::Overrun { offset, rec_len: 0 });
        }
        let word = |at: usize| u16::from_le_bytes([bytes[offset + at], bytes[offset + at + 1]]);
        let rec_len = layout(self.cx).decode_rec_len(word(4));
        let name_len = usize::from(bytes[offset + 6]);
        if offset + rec_len > end {
            return Err(DirentError::Overrun { offset, rec_len });
        }
        if rec_len < MIN_REC_LEN || rec_len % 4 != 0 {
            return Err(DirentError::RecLen { offset, rec_len });
        }
        if needed_len(name_len) > rec_len {
            return Err(DirentError::NameLen {
                offset,
                rec_len,
                name_len,
            });
        }
        Ok(Entry {
            offset,
            rec_len,
            ino: u32::from(word(0)) | u32::from(word(2)) << 16,
            file_type: bytes[offset + 7],
            name: &bytes[offset + HEADER_LEN..][..name_len],
            whole: &bytes[offset..offset + rec_len],
        })
    }

    /// Looks at an entry; `number` is 0 for what must be ".", 1 for "..", more for all others.
    fn check_entry(&self, state: &mut State, entry: &Entry<'_>, number: u32, is_indexed: bool) {
        match number {
            0 => self.check_dot(state, entry),
            1 => self.check_dotdot(state, entry),
            _ if entry.ino == self.dir => {
                self.tell(state, entry.offset, entry.ino, EntryFault::Itself);
            }
            _ => {}
        }
        if entry.ino == 0 {
            return;
        }
        let fault = self.target_fault(entry, number);
        if let Some(fault) = fault {
            self.tell(state, entry.offset, entry.ino, fault);
            if fault == EntryFault::BadInode {
                return;
            }
        }
        self.check_group(state, entry);
        let is_used = state.inos.used.has(entry.ino.into());
        if !is_used {
            self.tell(state, entry.offset, entry.ino, EntryFault::FreeInode);
        }
        self.check_type(state, entry);
        if entry.name.iter().any(|&byte| byte == b'/' || byte == 0) {
            self.tell(state, entry.offset, entry.ino, EntryFault::Name);
        }
        if is_indexed {
            index::add_name(self.cx, state, self.at, self.lblk, entry.name);
        }
        if number > 1 {
            self.set_parent(state, entry);
            state.names.push(NameAt {
                hash: self.hasher.hash_one(entry.name),
                lblk: self.lblk,
                offset: entry.offset as u32,
                ino: entry.ino,
            });
        }
        if let Some(counts) = state.links_of(self.cx.geo, entry.ino) {
            counts.1 += 1;
        }
    }

    fn check_dot(&self, state: &mut State, entry: &Entry<'_>) {
        let fault = if entry.ino == 0 || entry.name != b"." {
            Some(EntryFault::NotDot)
        } else if entry.whole[HEADER_LEN + 1] != 0 {
            Some(EntryFault::DotNull)
        } else {
            None
        };
        if let Some(fault) = fault {
            self.tell(state, entry.offset, entry.ino, fault);
        }
        if entry.ino != self.dir {
            self.tell(state, entry.offset, entry.ino, EntryFault::DotInode);
        }
        if entry.rec_len > 2 * MIN_REC_LEN {
            self.tell(state, entry.offset, entry.ino, EntryFault::DotLength);
        }
    }

    fn check_dotdot(&self, state: &mut State, entry: &Entry<'_>) {
        if entry.ino == 0 || entry.name != b".." {
            self.tell(state, entry.offset, entry.ino, EntryFault::NotDotDot);
        } else if entry.whole[HEADER_LEN + 2] != 0 {
            self.tell(state, entry.offset, entry.ino, EntryFault::DotNull);
        } else {
            state.dirs[self.at].dotdot = entry.ino;
        }
    }

    fn target_fault(&self, entry: &Entry<'_>, number: u32) -> Option<EntryFault> {
        let (raw, geo, ino) = (self.cx.raw, self.cx.geo, entry.ino);
        let hidden = [
            raw.s_usr_quota_inum.get(),
            raw.s_grp_quota_inum.get(),
            raw.s_prj_quota_inum.get(),
            geo.orphan_file_inum,
        ];
        let is_reserved = ino != ROOT_INO && ino < geo.first_ino;
        if is_reserved || ino > geo.inodes_count || hidden.contains(&ino) {
            return Some(EntryFault::BadInode);
        }
        if number < 2 {
            return None;
        }
        match entry.name {
            b"." | b".." => Some(EntryFault::SecondDot),
            _ if ino == ROOT_INO => Some(EntryFault::Root),
            b"" => Some(EntryFault::EmptyName),
            _ => None,
        }
    }

    /// Whether the descriptor of the inode's group says that the inode was made.
    fn check_group(&self, state: &mut State, entry: &Entry<'_>) {
        let geo = self.cx.geo;
        let (group, index) = geo.group_of_ino(entry.ino);
        let Some(&groups::Group { flags, unused, .. }) = state.groups.get(group as usize) else {
            return;
        };
        let fault = if flags.contains(GroupFlags::INODE_UNINIT) {
            EntryFault::UninitGroup
        } else if index >= geo.inodes_per_group.saturating_sub(unused) {
            EntryFault::UnusedPart
        } else {
            return;
        };
        self.tell(state, entry.offset, entry.ino, fault);
    }

    fn check_type(&self, state: &mut State, entry: &Entry<'_>) {
        let (ino, found) = (u64::from(entry.ino), entry.file_type);
        if !self.cx.geo.has_filetype() {
            if found != 0 {
                let fault = EntryFault::FileTypeFeature { found };
                self.tell(state, entry.offset, entry.ino, fault);
            }
            return;
        }
        let want = if state.inos.dirs.has(ino) {
            DIR_TYPE
        } else if state.inos.files.has(ino) {
            1
        } else if state.inos.bad.has(ino) {
            0
        } else {
            self.type_of(state, entry.ino)
        };
        if found == want {
            return;
        }
        let fault = if found == 0 {
            EntryFault::NoFileType { want }
        } else {
            EntryFault::FileType { found, want }
        };
        self.tell(state, entry.offset, entry.ino, fault);
    }

    /// The type of an inode that is neither directory nor file.
    fn type_of(&self, state: &mut State, ino: u32) -> u8 {
        let mut bytes = [0; 2];
        if !groups::read_inode(self.cx, state, ino, &mut bytes) {
            return 0;
        }
        match u32::from(u16::from_le_bytes(bytes)) & libc::S_IFMT {
            libc::S_IFREG => 1,
            libc::S_IFDIR => 2,
            libc::S_IFCHR => 3,
            libc::S_IFBLK => 4,
            libc::S_IFIFO => 5,
            libc::S_IFSOCK => 6,
            libc::S_IFLNK => 7,
            _ => 0,
        }
    }

    fn set_parent(&self, state: &mut State, entry: &Entry<'_>) {
        if !state.inos.dirs.has(entry.ino.into()) {
            return;
        }
        // The list is sorted, as the inodes were looked at in order.
        let found = state.dirs.binary_search_by_key(&entry.ino, |dir| dir.ino);
        let Ok(at) = found else {
            return;
        };
        let other = state.dirs[at].parent;
        if other == 0 {
            state.dirs[at].parent = self.dir;
        } else {
            let fault = EntryFault::SecondParent { other };
            self.tell(state, entry.offset, entry.ino, fault);
        }
    }
}

/// The checksum of a block that is part of an index by its content.
fn index_sum_is_right(bytes: &[u8], layout: DirLayout, seed: u32) -> bool {
    let Some(kind) = htree::kind_by_content(bytes, layout) else {
        return false;
    };
    if kind == DxKind::Node && bytes[6..8] != [0; 2] {
        return false;
    }
    let at = kind.entries_at();
    let word = |at: usize| usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    let (limit, count) = (word(at), word(at + 2));
    let tail_at = at + limit * 8;
    if tail_at + 8 > bytes.len() || at + count * 8 > bytes.len() {
        return false;
    }
    let tail = &bytes[tail_at..tail_at + 8];
    let sum = crc32c(seed, &bytes[..at + count * 8]);
    let want = crc32c(crc32c(sum, &tail[..4]), &[0; 4]);
    tail[4..] == want.to_le_bytes()
}
