//! The inodes, one by one: whether each is in use, what it may be, what it owns.

use zerocopy::FromBytes;

use super::extents::Walk;
use super::finding::{FlagFault, LinkFault};
use super::groups::Group;
use super::superblock::words;
use super::{Cx, Finding, State, block_map, dirs, extents, index, xattrs};
use crate::format::extent;
use crate::format::features::{Compat, Incompat, RoCompat};
use crate::format::inode::{
    GOOD_OLD_SIZE, InodeError, InodeFlags, RawInode, RawInodeExtra, inode_csum_seed, verify_inode,
};

const BAD_BLOCKS_INO: u32 = 1;
/// The root directory's inode.
pub(super) const ROOT_INO: u32 = 2;
const USER_QUOTA_INO: u32 = 3;
const GROUP_QUOTA_INO: u32 = 4;
const BOOT_LOADER_INO: u32 = 5;
/// Holds the blocks kept for more descriptors.
pub(super) const RESIZE_INO: u32 = 7;
const JOURNAL_INO: u32 = 8;
/// `s_creator_os` of the Hurd, which keeps other things in some fields.
const OS_HURD: u32 = 1;
/// Bytes of the inode table read at once.
const TABLE_CHUNK: usize = 64 << 10;
/// The target of a symbolic link that is shorter stands in the inode.
const FAST_LINK_LEN: u64 = 60;

/// What an inode is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    Directory,
    File,
    Link,
    Special,
    Unknown,
}

/// An inode in use, its fields joined.
pub(super) struct Inode<'a> {
    pub(super) ino: u32,
    pub(super) raw: &'a RawInode,
    pub(super) bytes: &'a [u8],
    pub(super) kind: Kind,
    pub(super) flags: InodeFlags,
    pub(super) size: u64,
    pub(super) file_acl: u64,
    /// Seed of the checksums of its blocks.
    pub(super) seed: u32,
    /// An orphan list or file names it.
    is_listed: bool,
}

impl<'a> Inode<'a> {
    fn new(cx: &Cx<'_>, state: &State, ino: u32, bytes: &'a [u8]) -> Option<Self> {
        let (raw, _) = RawInode::ref_from_prefix(bytes).ok()?;
        let mode = u32::from(raw.i_mode.get());
        let kind = match mode & libc::S_IFMT {
            libc::S_IFDIR => Kind::Directory,
            libc::S_IFREG => Kind::File,
            libc::S_IFLNK => Kind::Link,
            libc::S_IFCHR | libc::S_IFBLK | libc::S_IFIFO | libc::S_IFSOCK => Kind::Special,
            _ => Kind::Unknown,
        };
        let acl_high = if cx.geo.incompat.contains(Incompat::BIT64) {
            raw.i_file_acl_high.get()
        } else {
            0
        };
        Some(Self {
            ino,
            raw,
            bytes,
            kind,
            flags: InodeFlags::from_bits_retain(raw.i_flags.get()),
            size: u64::from(raw.i_size_lo.get()) | u64::from(raw.i_size_high.get()) << 32,
            file_acl: u64::from(raw.i_file_acl_lo.get()) | u64::from(acl_high) << 32,
            seed: inode_csum_seed(cx.geo.csum_seed, ino, raw.i_generation.get()),
            is_listed: state.inos.listed.has(ino.into()),
        })
    }

    fn is_fast_link(&self) -> bool {
        self.kind == Kind::Link && self.size > 0 && self.size < FAST_LINK_LEN
    }

    /// Whether `i_block` holds a map.
    fn has_map(&self) -> bool {
        let block1 = words(&self.raw.i_block).nth(1);
        match self.kind {
            Kind::Directory | Kind::File => !self.flags.contains(InodeFlags::INLINE_DATA),
            Kind::Link if self.file_acl == 0 => self.raw.i_blocks_lo.get() != 0,
            Kind::Link => self.size >= FAST_LINK_LEN || (self.size > 4 && block1 == Some(0)),
            Kind::Special | Kind::Unknown => false,
        }
    }

    fn has_extents(&self, cx: &Cx<'_>) -> bool {
        cx.geo.has_extents() && self.flags.contains(InodeFlags::EXTENTS)
    }
}

/// Looks at all inodes that the descriptors say are made.
pub(super) fn scan(cx: &Cx<'_>, state: &mut State) {
    let inode_size = usize::from(cx.geo.inode_size);
    let per_block = cx.block_size() / inode_size;
    let chunk = (TABLE_CHUNK / cx.block_size()).max(1);
    let mut table = vec![0; chunk * cx.block_size()];
    let scan = Scan {
        low_times: has_low_times(cx),
    };
    for group in 0..cx.geo.group_count {
        let desc: Group = state.groups[group as usize];
        let first = group * cx.geo.inodes_per_group + 1;
        let count = desc.scanned(cx.geo) as usize;
        state.links[group as usize].resize(count, (0, 0));
        let mut index = 0;
        while index < count {
            let blocks = (count - index).div_ceil(per_block).min(chunk);
            let bytes = &mut table[..blocks * cx.block_size()];
            let block = desc.inode_table + (index / per_block) as u64;
            if cx.read(state, block, bytes) {
                let inodes = bytes.chunks_exact(inode_size).take(count - index);
                for (at, bytes) in inodes.enumerate() {
                    scan.inode(cx, state, first + (index + at) as u32, bytes);
                }
            }
            index += blocks * per_block;
        }
    }
    if let Some((ino, size)) = state.large_files
        && !cx.geo.ro_compat.contains(RoCompat::LARGE_FILE)
    {
        state.tell(Finding::LargeFile { ino, size });
    }
    let mut refs: Vec<_> = state.xattr_blocks.iter().map(|(&k, &v)| (k, v)).collect();
    refs.retain(|&(_, left)| left != 0);
    refs.sort_unstable();
    for (block, left) in refs {
        xattrs::tell_refcount(cx, state, block, left);
    }
}

/// Times that are as small as inode numbers make it impossible to tell the two apart.
fn has_low_times(cx: &Cx<'_>) -> bool {
    let raw = cx.raw;
    let times = [
        (raw.s_wtime, raw.s_wtime_hi),
        (raw.s_mtime, raw.s_mtime_hi),
        (raw.s_mkfs_time, raw.s_mkfs_time_hi),
    ];
    times.into_iter().any(|(low, high)| {
        let time = u64::from(low.get()) | u64::from(high) << 32;
        time != 0 && time < u64::from(cx.geo.inodes_count)
    })
}

struct Scan {
    low_times: bool,
}

impl Scan {
    fn inode(&self, cx: &Cx<'_>, state: &mut State, ino: u32, bytes: &[u8]) {
        let is_zero = bytes[..GOOD_OLD_SIZE].iter().all(|&byte| byte == 0);
        let is_known = is_hidden(cx, ino) || ino == cx.geo.orphan_file_inum;
        if is_zero && ino >= cx.geo.first_ino && !is_known {
            return;
        }
        let seed = cx.geo.csum_seed;
        let Some(inode) = Inode::new(cx, state, ino, bytes) else {
            return;
        };
        let mut bad_csum = false;
        if cx.geo.metadata_csum()
            && !is_zero
            && let Err(InodeError::Checksum { found, want }) = verify_inode(
                inode_csum_seed(seed, ino, inode.raw.i_generation.get()),
                bytes,
            )
        {
            bad_csum = true;
            state.tell(Finding::InodeChecksum { ino, found, want });
        }
        let (dtime, links) = (inode.raw.i_dtime.get(), inode.raw.i_links_count.get());
        let is_low = dtime != 0 && dtime < cx.geo.inodes_count && !self.low_times;
        if is_low && !inode.is_listed {
            state.tell(Finding::LowDeletionTime { ino, dtime });
        }
        if let Some(counts) = state.links_of(cx.geo, ino) {
            counts.0 = links;
        }
        if links == 0 && ino >= cx.geo.first_ino && !is_hidden(cx, ino) {
            if inode.is_listed {
                orphan(cx, state, &inode);
            } else if dtime == 0 && inode.raw.i_mode.get() != 0 {
                state.tell(Finding::NoDeletionTime { ino });
            }
            return;
        }
        check_flags(cx, state, &inode);
        if !special(cx, state, &inode, bad_csum) && links != 0 {
            general(cx, state, &inode);
        }
    }
}

/// The inodes that a superblock field takes away from the tree.
fn is_hidden(cx: &Cx<'_>, ino: u32) -> bool {
    ino == cx.raw.s_prj_quota_inum.get()
}

/// A deleted inode whose blocks are still its own.
fn orphan(cx: &Cx<'_>, state: &mut State, inode: &Inode<'_>) {
    let ino = inode.ino;
    state.tell(Finding::OrphanToDelete { ino });
    if inode.kind == Kind::Directory {
        // Its group counts it until it is freed.
        state.inos.dirs.add(ino.into());
    }
    check_flags(cx, state, inode);
    check_blocks(cx, state, inode, None);
}

fn check_flags(cx: &Cx<'_>, state: &mut State, inode: &Inode<'_>) {
    let (ino, flags) = (inode.ino, inode.flags);
    let mut tell = |fault| {
        let flags = flags.bits();
        state.tell(Finding::InodeFlags { ino, flags, fault });
    };
    if flags.contains(InodeFlags::CASEFOLD) {
        tell(FlagFault::Casefold);
    }
    if flags.contains(InodeFlags::EA_INODE) && inode.kind != Kind::File {
        tell(FlagFault::EaInode);
    }
    if flags.contains(InodeFlags::INLINE_DATA) {
        tell(FlagFault::InlineFeature);
    }
    let matters = inode.raw.i_links_count.get() != 0
        || matches!(ino, BAD_BLOCKS_INO | ROOT_INO | JOURNAL_INO);
    if !matters {
        return;
    }
    if flags.contains(InodeFlags::EXTENTS) {
        if !cx.geo.has_extents() {
            tell(FlagFault::ExtentsFeature);
        }
    } else if cx.geo.has_extents()
        && matches!(inode.kind, Kind::File | Kind::Directory)
        && extents::is_header(&inode.raw.i_block)
    {
        tell(FlagFault::ExtentsUnset);
    }
}

/// Inodes that are known by their number; whether that was all to do.
fn special(cx: &Cx<'_>, state: &mut State, inode: &Inode<'_>, bad_csum: bool) -> bool {
    let (ino, mode) = (inode.ino, inode.raw.i_mode.get());
    let bad_mode = |state: &mut State| state.tell(Finding::InodeMode { ino, mode });
    match ino {
        BAD_BLOCKS_INO => {
            let raw = inode.raw;
            let words = u32::from(mode | raw.i_uid.get() | raw.i_gid.get())
                | u32::from(raw.i_links_count.get());
            let is_used = bad_csum || words != 0 || inode.file_acl != 0;
            if is_used {
                state.tell(Finding::InodeReserved { ino });
            }
            state.inos.used.add(ino.into());
            let mut walk = Walk::new(cx, inode);
            block_map::walk(cx, state, inode, &mut walk);
            true
        }
        ROOT_INO => {
            if inode.kind != Kind::Directory {
                bad_mode(state);
            }
            false
        }
        JOURNAL_INO => {
            state.inos.used.add(ino.into());
            if cx.geo.journal_inum != JOURNAL_INO {
                check_clear(state, inode);
                return false;
            }
            if inode.kind != Kind::File {
                bad_mode(state);
            }
            xattrs::check_extra(state, inode, true);
            check_blocks(cx, state, inode, None);
            true
        }
        USER_QUOTA_INO | GROUP_QUOTA_INO => {
            state.inos.used.add(ino.into());
            check_clear(state, inode);
            false
        }
        _ if is_hidden(cx, ino) => {
            state.inos.used.add(ino.into());
            check_clear(state, inode);
            false
        }
        _ if ino == cx.geo.orphan_file_inum => {
            state.inos.used.add(ino.into());
            if !cx.geo.compat.contains(Compat::ORPHAN_FILE) {
                check_clear(state, inode);
                return false;
            }
            if inode.kind != Kind::File {
                bad_mode(state);
            }
            xattrs::check_extra(state, inode, true);
            check_blocks(cx, state, inode, None);
            true
        }
        _ if ino < cx.geo.first_ino => {
            state.inos.used.add(ino.into());
            let is_bad = match ino {
                BOOT_LOADER_INO => inode.kind == Kind::Directory,
                RESIZE_INO => mode != 0 && inode.kind != Kind::File,
                _ => mode != 0,
            };
            if is_bad {
                bad_mode(state);
            }
            check_blocks(cx, state, inode, None);
            true
        }
        _ => false,
    }
}

/// A reserved inode that nothing uses.
fn check_clear(state: &mut State, inode: &Inode<'_>) {
    let raw = inode.raw;
    let block0 = words(&raw.i_block).next();
    if raw.i_links_count.get() != 0 || raw.i_blocks_lo.get() != 0 || block0 != Some(0) {
        let ino = inode.ino;
        state.tell(Finding::InodeReserved { ino });
    }
}

/// Anything with a name.
fn general(cx: &Cx<'_>, state: &mut State, inode: &Inode<'_>) {
    let (ino, raw) = (inode.ino, inode.raw);
    let dtime = raw.i_dtime.get();
    if dtime != 0 && !inode.is_listed {
        state.tell(Finding::DeletionTime { ino, dtime });
    }
    state.inos.used.add(ino.into());
    check_fields(cx, state, inode);
    xattrs::check_inode(state, inode);
    if cx.geo.inode_size as usize > GOOD_OLD_SIZE {
        check_times(state, inode);
    }
    let has_feature = cx.geo.has_extents() && inode.flags.contains(InodeFlags::EXTENTS);
    if has_feature && inode.kind == Kind::Link && !inode.has_map() {
        let (flags, fault) = (inode.flags.bits(), FlagFault::ExtentsOnFastLink);
        state.tell(Finding::InodeFlags { ino, flags, fault });
    }
    if inode.flags.contains(InodeFlags::ENCRYPT) {
        let (flags, fault) = (inode.flags.bits(), FlagFault::Encrypted);
        state.tell(Finding::InodeFlags { ino, flags, fault });
    }
    let mut dir = None;
    match inode.kind {
        Kind::Directory => {
            state.inos.dirs.add(ino.into());
            dir = Some(state.dirs.len());
            state.dirs.push(dirs::Dir::new(inode));
        }
        Kind::File => {
            state.inos.files.add(ino.into());
        }
        Kind::Link => check_link(cx, state, inode),
        Kind::Special => check_device(state, inode),
        Kind::Unknown => bad(state, inode),
    }
    check_blocks(cx, state, inode, dir);
}

fn bad(state: &mut State, inode: &Inode<'_>) {
    let (ino, mode) = (inode.ino, inode.raw.i_mode.get());
    state.inos.bad.add(ino.into());
    state.tell(Finding::InodeMode { ino, mode });
}

fn check_fields(cx: &Cx<'_>, state: &mut State, inode: &Inode<'_>) {
    let (ino, raw, geo) = (inode.ino, inode.raw, cx.geo);
    let is_dir = inode.kind == Kind::Directory;
    let large_dir = geo.incompat.contains(Incompat::LARGEDIR);
    let fields = [
        ("i_obso_faddr", raw.i_obso_faddr.get(), true),
        ("i_size_high", raw.i_size_high.get(), is_dir && !large_dir),
        (
            "i_file_acl_high",
            raw.i_file_acl_high.get().into(),
            !geo.incompat.contains(Incompat::BIT64) && !is_hurd(cx),
        ),
        (
            "i_blocks_high",
            raw.i_blocks_high.get().into(),
            !geo.ro_compat.contains(RoCompat::HUGE_FILE) && !is_hurd(cx),
        ),
    ];
    for (field, value, must_be_zero) in fields {
        if value != 0 && must_be_zero {
            state.tell(Finding::InodeField {
                ino,
                field,
                value: value.into(),
                want: 0,
            });
        }
    }
    if inode.flags.contains(InodeFlags::IMAGIC) && !geo.compat.contains(Compat::IMAGIC_INODES) {
        let (flags, fault) = (inode.flags.bits(), FlagFault::Imagic);
        state.tell(Finding::InodeFlags { ino, flags, fault });
    }
}

fn is_hurd(cx: &Cx<'_>) -> bool {
    cx.raw.s_creator_os.get() == OS_HURD
}

/// Times before 1970 once had their epoch bits wrong.
fn check_times(state: &mut State, inode: &Inode<'_>) {
    let Ok((extra, _)) = RawInodeExtra::read_from_prefix(&inode.bytes[GOOD_OLD_SIZE..]) else {
        return;
    };
    // As e2fsck: the fields are read whether i_extra_isize covers them or not, unless it leaves no
    // room behind it.
    let max = inode.bytes.len() - GOOD_OLD_SIZE;
    if usize::from(extra.i_extra_isize.get()) + 4 >= max {
        return;
    }
    let raw = inode.raw;
    let times = [
        ("i_atime", raw.i_atime, extra.i_atime_extra),
        ("i_ctime", raw.i_ctime, extra.i_ctime_extra),
        ("i_crtime", extra.i_crtime, extra.i_crtime_extra),
        ("i_mtime", raw.i_mtime, extra.i_mtime_extra),
    ];
    let is_old = |low: u32, extra: u32| low >> 31 == 1 && extra & 3 == 3;
    if let Some((field, ..)) = times
        .into_iter()
        .find(|(_, low, extra)| is_old(low.get(), extra.get()))
    {
        let ino = inode.ino;
        state.tell(Finding::OldTime { ino, field });
    }
}

fn check_device(state: &mut State, inode: &Inode<'_>) {
    let (ino, flags) = (inode.ino, inode.flags);
    let frozen = flags.intersects(InodeFlags::IMMUTABLE | InodeFlags::APPEND);
    let has_blocks = words(&inode.raw.i_block).skip(4).any(|word| word != 0);
    let mapped = InodeFlags::INDEX | InodeFlags::EXTENTS;
    if flags.intersects(mapped) || (frozen && has_blocks) {
        bad(state, inode);
        return;
    }
    if frozen {
        let (flags, fault) = (flags.bits(), FlagFault::Immutable);
        state.tell(Finding::InodeFlags { ino, flags, fault });
    }
    if inode.size != 0 {
        state.tell(Finding::InodeField {
            ino,
            field: "i_size",
            value: inode.size,
            want: 0,
        });
    }
}

fn check_link(cx: &Cx<'_>, state: &mut State, inode: &Inode<'_>) {
    let (ino, size) = (inode.ino, inode.size);
    if let Some(fault) = link_fault(cx, state, inode) {
        state.inos.bad.add(ino.into());
        state.tell(Finding::Symlink { ino, size, fault });
        return;
    }
    let frozen = InodeFlags::IMMUTABLE | InodeFlags::APPEND;
    if inode.flags.intersects(frozen) {
        let (flags, fault) = (inode.flags.bits(), FlagFault::Immutable);
        state.tell(Finding::InodeFlags { ino, flags, fault });
    }
}

fn link_fault(cx: &Cx<'_>, state: &mut State, inode: &Inode<'_>) -> Option<LinkFault> {
    let flags = inode.flags;
    if inode.size == 0 || inode.size > u64::from(u32::MAX) {
        return Some(LinkFault::Size);
    }
    if flags.contains(InodeFlags::INDEX) {
        return Some(LinkFault::Flags);
    }
    let has_length = |bytes: &[u8]| {
        let len = bytes.iter().position(|&byte| byte == 0);
        len.is_some_and(|len| len as u64 == inode.size)
    };
    if inode.is_fast_link() {
        if flags.contains(InodeFlags::EXTENTS) {
            return Some(LinkFault::Flags);
        }
        return (!has_length(&inode.raw.i_block)).then_some(LinkFault::Length);
    }
    let pblk = if flags.contains(InodeFlags::EXTENTS) {
        only_extent(&inode.raw.i_block)
    } else {
        let mut words = words(&inode.raw.i_block);
        let first = words.next();
        first.filter(|_| words.all(|word| word == 0)).map(u64::from)
    };
    let Some(pblk) = pblk.filter(|&pblk| cx.holds(pblk, 1)) else {
        return Some(LinkFault::Blocks);
    };
    let mut block = vec![0; cx.block_size()];
    if !cx.read(state, pblk, &mut block) {
        return None;
    }
    (!has_length(&block)).then_some(LinkFault::Length)
}

/// The block of a file that is one extent of one block.
fn only_extent(root: &[u8]) -> Option<u64> {
    let Ok(extent::Node::Leaf(leaf)) = extent::view(root, Some(0)) else {
        return None;
    };
    let it = leaf.at(0).filter(|_| leaf.len() == 1)?;
    (it.lblk == 0 && it.len == 1).then_some(it.pblk)
}

/// What an inode owns, and whether its size and count of blocks say so.
fn check_blocks(cx: &Cx<'_>, state: &mut State, inode: &Inode<'_>, dir: Option<usize>) {
    let mut walk = Walk::new(cx, inode);
    let first_dir_block = state.dir_blocks.len();
    if xattrs::check_block(cx, state, inode) {
        walk.blocks += 1;
    }
    if inode.has_map() {
        if inode.has_extents(cx) {
            extents::walk(cx, state, inode, &mut walk);
        } else {
            block_map::walk(cx, state, inode, &mut walk);
        }
    }
    if let Some(dir) = dir {
        state.dirs[dir].set_blocks(first_dir_block..state.dir_blocks.len(), walk.end());
    }
    if inode.flags.contains(InodeFlags::INDEX) {
        let is_indexed = index::check_head(cx, state, inode, first_dir_block);
        if let Some(dir) = dir {
            state.dirs[dir].is_indexed = is_indexed;
        }
    }
    let ino = inode.ino;
    let is_deleted = inode.raw.i_links_count.get() == 0;
    if walk.blocks == 0 && inode.kind == Kind::Directory && !is_deleted {
        state.tell(Finding::DirectoryEmpty { dir: ino });
        return;
    }
    if walk.is_damaged() {
        return;
    }
    let to_truncate = inode.is_listed && inode.raw.i_links_count.get() != 0;
    check_size(cx, state, inode, &walk, to_truncate);
    check_count(cx, state, inode, walk.blocks);
}

fn check_size(cx: &Cx<'_>, state: &mut State, inode: &Inode<'_>, walk: &Walk, to_truncate: bool) {
    let (ino, size, geo) = (inode.ino, inode.size, cx.geo);
    let end = walk.end();
    let block_size = u64::from(geo.block_size);
    let is_wrong = if inode.kind == Kind::Directory {
        let blocks = size >> geo.block_bits;
        let spare = u64::from(cx.raw.s_prealloc_dir_blocks);
        size % block_size != 0 || blocks > end || end - blocks > spare
    } else if walk
        .last_written
        .is_some_and(|last| size < last * block_size)
    {
        !to_truncate
    } else if inode.has_extents(cx) {
        size > (1 << (32 + geo.block_bits)) - 1
    } else {
        size > block_map::max_size(geo.block_bits)
    };
    let is_deleted = inode.is_listed && inode.raw.i_links_count.get() == 0;
    if is_wrong && inode.kind != Kind::Link && !is_deleted {
        state.tell(Finding::Size { ino, size, end });
    }
    if to_truncate {
        let past = walk
            .last_written
            .is_some_and(|last| size < last * block_size);
        let is_told = past || inode.raw.i_dtime.get() != 0;
        state.tell(Finding::OrphanToTruncate { ino, size, is_told });
    }
    if inode.kind == Kind::File && size >= 1 << 31 {
        state.large_files.get_or_insert((ino, size));
    }
}

fn check_count(cx: &Cx<'_>, state: &mut State, inode: &Inode<'_>, blocks: u64) {
    if is_hurd(cx) {
        return;
    }
    let high = u64::from(inode.raw.i_blocks_high.get());
    let has_huge = cx.geo.ro_compat.contains(RoCompat::HUGE_FILE);
    let is_huge = has_huge && inode.flags.contains(InodeFlags::HUGE_FILE);
    let want = if is_huge {
        blocks
    } else {
        blocks * cx.geo.block_sectors()
    };
    let mut found = u64::from(inode.raw.i_blocks_lo.get());
    if has_huge {
        found |= high << 32;
    }
    if found != want {
        let ino = inode.ino;
        state.tell(Finding::Sectors { ino, found, want });
    }
}
