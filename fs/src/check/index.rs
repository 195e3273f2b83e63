//! The index of a directory: its shape, and whether each name is where its hash says.

use super::finding::IndexFault;
use super::inodes::{Inode, Kind};
use super::superblock::words;
use super::{Cx, Finding, FlagFault, State, dirs};
use crate::format::features::{Compat, Incompat};
use crate::format::htree::{CharSign, DxError, DxKind, HashKind, Hasher};

/// Where the info of a root begins: behind "." and "..".
const INFO_AT: usize = 24;
const INFO_LEN: u8 = 8;
const ENTRY_LEN: usize = 8;
const BLOCK_MASK: u32 = 0x0fff_ffff;
/// Above the hashes of all names.
const HASH_END: u32 = 0xffff_fffe;
/// `unused_flags`: nobody may read it who does not know what it stands for.
const INCOMPAT_FLAG: u8 = 1;

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum Role {
    #[default]
    Leaf,
    Root,
    Node,
}

/// What is known of a block of an indexed directory.
#[derive(Clone, Copy, Debug)]
pub(super) struct IndexBlock {
    role: Role,
    parent: u32,
    /// The block of the entry before.
    previous: u32,
    /// The hashes found in it.
    min: u32,
    max: u32,
    /// The hashes that the entry for it allows.
    least: u32,
    most: u32,
    is_first: bool,
    is_last: bool,
    refs: u32,
    /// The hash function and the levels, of a root.
    root: Option<(HashKind, u8)>,
}

impl IndexBlock {
    const NEW: Self = Self {
        role: Role::Leaf,
        parent: 0,
        previous: 0,
        min: u32::MAX,
        max: 0,
        least: 0,
        most: 0,
        is_first: false,
        is_last: false,
        refs: 0,
        root: None,
    };
}

fn tell(state: &mut State, dir: u32, lblk: u32, fault: IndexFault) {
    state.tell(Finding::Index { dir, lblk, fault });
}

fn max_levels(cx: &Cx<'_>) -> u8 {
    if cx.geo.incompat.contains(Incompat::LARGEDIR) {
        2
    } else {
        1
    }
}

/// Checks the head of the index of an inode that says it has one; whether it can be walked.
pub(super) fn check_head(cx: &Cx<'_>, state: &mut State, inode: &Inode<'_>, blocks: usize) -> bool {
    let (dir, flags) = (inode.ino, inode.flags.bits());
    let mut flag = |fault| {
        state.tell(Finding::InodeFlags {
            ino: dir,
            flags,
            fault,
        });
    };
    if inode.kind != Kind::Directory {
        // A special file or a symbolic link was told of already.
        if inode.kind == Kind::File {
            flag(FlagFault::IndexNoDirectory);
        }
        return false;
    }
    if !cx.geo.compat.contains(Compat::DIR_INDEX) {
        flag(FlagFault::IndexFeature);
        return false;
    }
    let first = state.dir_blocks.get(blocks).copied();
    let Some(first) = first.filter(|block| block.lblk == 0) else {
        tell(state, dir, 0, IndexFault::NoRoot);
        return false;
    };
    let mut bytes = vec![0; cx.block_size()];
    if !cx.read(state, first.pblk, &mut bytes) {
        return false;
    }
    let info = &bytes[INFO_AT..INFO_AT + 8];
    let [version, info_length, levels, unused_flags] = [info[4], info[5], info[6], info[7]];
    let fault = if info[..4] != [0; 4] {
        IndexFault::Reserved
    } else if info_length != INFO_LEN || unused_flags & INCOMPAT_FLAG != 0 {
        IndexFault::Shape(DxError::Info {
            info_length,
            unused_flags,
        })
    } else if HashKind::from_raw(version).is_none() {
        IndexFault::Shape(DxError::HashVersion { version })
    } else if levels > max_levels(cx) {
        IndexFault::Shape(DxError::Levels { levels })
    } else {
        return true;
    };
    tell(state, dir, 0, fault);
    false
}

/// Makes room for what will be known of a directory's blocks.
pub(super) fn begin(state: &mut State, at: usize) {
    let dir = &state.dirs[at];
    state.index.clear();
    // No more than it has blocks, but for holes.
    let end = usize::try_from(dir.end).unwrap_or(0);
    if dir.is_indexed && end <= dir.blocks.len() * 2 + 16 {
        state.index.resize(end, IndexBlock::NEW);
    }
}

/// Says what a block is, before its entries are read.
pub(super) fn enter(
    cx: &Cx<'_>,
    state: &mut State,
    at: usize,
    lblk: u32,
    bytes: &[u8],
) -> Option<DxKind> {
    let dir = state.dirs[at].ino;
    let Some(block) = state.index.get_mut(lblk as usize) else {
        tell(state, dir, lblk, IndexFault::Unreferenced);
        return None;
    };
    if lblk == 0 {
        block.role = Role::Root;
        (block.is_first, block.is_last) = (true, true);
        let (version, levels) = (bytes[INFO_AT + 4], bytes[INFO_AT + 6]);
        block.root = HashKind::from_raw(version).map(|kind| (kind, levels));
        return Some(DxKind::Root);
    }
    let layout = dirs::layout(cx);
    let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let is_node = bytes[..4] == [0; 4]
        && layout.decode_rec_len(word(4)) == layout.block_size
        && bytes[6] == 0
        && word(HEADER) == DxKind::Node.limit(layout);
    if is_node {
        block.role = Role::Node;
        return Some(DxKind::Node);
    }
    None
}

/// Where the entries of a node begin.
const HEADER: usize = 8;

/// Notes the hash of a name.
pub(super) fn add_name(cx: &Cx<'_>, state: &mut State, _at: usize, lblk: u32, name: &[u8]) {
    let Some((kind, _)) = state.index.first().and_then(|root| root.root) else {
        return;
    };
    let sign = if cx.geo.hash_unsigned {
        CharSign::Unsigned
    } else {
        CharSign::Signed
    };
    let hasher = Hasher {
        kind,
        sign,
        seed: cx.geo.hash_seed,
    };
    let hash = hasher.hash(name).major;
    if let Some(block) = state.index.get_mut(lblk as usize) {
        block.min = block.min.min(hash);
        block.max = block.max.max(hash);
    }
}

/// Reads the entries of a root or node.
pub(super) fn read_node(cx: &Cx<'_>, state: &mut State, at: usize, lblk: u32, bytes: &[u8]) {
    let dir = state.dirs[at].ino;
    let kind = match state.index.get(lblk as usize).map(|block| block.role) {
        Some(Role::Root) => DxKind::Root,
        Some(Role::Node) => DxKind::Node,
        Some(Role::Leaf) | None => return,
    };
    let layout = dirs::layout(cx);
    let start = kind.entries_at();
    let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let (limit, count, want) = (word(start), word(start + 2), kind.limit(layout));
    if limit != want {
        let fault = IndexFault::Shape(DxError::Limit { limit, want });
        tell(state, dir, lblk, fault);
    }
    if count > want || count == 0 {
        let fault = IndexFault::Shape(DxError::Count { count, limit: want });
        tell(state, dir, lblk, fault);
    }
    let count = count.min(want);
    let entries: Vec<(u32, u32)> = bytes[start..]
        .chunks_exact(ENTRY_LEN)
        .take(count.into())
        .map(|entry| {
            let mut words = words(entry);
            let hash = words.next().unwrap_or(0) & !1;
            (hash, words.next().unwrap_or(0) & BLOCK_MASK)
        })
        .collect();
    let (mut min, mut max, mut before) = (u32::MAX, 0, 0);
    for (index, &(hash, block)) in entries.iter().enumerate() {
        let hash = if index == 0 { 0 } else { hash };
        let place = index as u32;
        if block as usize >= state.index.len() {
            let fault = IndexFault::Past {
                index: place,
                lblk: block,
            };
            tell(state, dir, lblk, fault);
            before = hash;
            continue;
        }
        if hash < before {
            tell(state, dir, lblk, IndexFault::Order { index: place });
        }
        before = hash;
        (min, max) = (min.min(hash), max.max(hash));
        let next = entries.get(index + 1);
        let previous = index.checked_sub(1).map_or(0, |index| entries[index].1);
        let child = &mut state.index[block as usize];
        child.refs += 1;
        if child.refs == 1 {
            child.parent = lblk;
        }
        child.previous = previous;
        child.least = hash;
        child.most = next.map_or(HASH_END, |next| next.0);
        child.is_last |= next.is_none();
        child.is_first |= index == 0;
    }
    if let Some(block) = state.index.get_mut(lblk as usize) {
        (block.min, block.max) = (min, max);
    }
}

/// Compares what the entries say with what the blocks hold.
pub(super) fn end(_cx: &Cx<'_>, state: &mut State, at: usize) {
    if state.index.is_empty() || state.dirs[at].blocks.is_empty() {
        return;
    }
    let dir = state.dirs[at].ino;
    let mut index = std::mem::take(&mut state.index);
    index[0].refs += 1;
    let levels = index[0].root.map_or(0, |(_, levels)| levels);
    raise(&mut index, Role::Leaf);
    raise(&mut index, Role::Node);
    for (lblk, block) in (0..).zip(&index) {
        if !block.is_first && block.min < block.least {
            tell(state, dir, lblk, IndexFault::Below);
        }
        if block.role == Role::Leaf && depth(&index, block) != u32::from(levels) + 1 {
            tell(state, dir, lblk, IndexFault::Depth);
        }
        if lblk != 0 && block.max > block.most {
            tell(state, dir, lblk, IndexFault::Above);
        }
        match block.refs {
            0 => tell(state, dir, lblk, IndexFault::Unreferenced),
            1 => {}
            _ => tell(state, dir, lblk, IndexFault::Twice),
        }
    }
    index.clear();
    state.index = index;
}

/// Gives the hashes of the first and last block below a node to the node.
fn raise(index: &mut [IndexBlock], role: Role) {
    for at in 0..index.len() {
        let block = index[at];
        if block.role != role {
            continue;
        }
        let parent = block.parent as usize;
        if block.is_first {
            index[parent].min = block.min;
            let previous = index[parent].previous as usize;
            if previous != 0 && previous < index.len() {
                index[previous].most = block.min;
            }
        }
        if block.is_last {
            index[parent].max = block.max;
        }
    }
}

fn depth(index: &[IndexBlock], block: &IndexBlock) -> u32 {
    const MOST: u32 = 4;
    let (mut at, mut depth) = (block, 0);
    while at.role != Role::Root && depth < MOST {
        at = &index[at.parent as usize];
        depth += 1;
    }
    depth
}
