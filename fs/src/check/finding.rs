//! What a check can find, each with the structure, its number, the field and the value.

use blockstack::BlkError;

use crate::format::dirent::DirentError;
use crate::format::extent::NodeError;
use crate::format::features::{incompat_names, ro_compat_names};
use crate::format::htree::DxError;
use crate::format::jbd2::JournalSbError;
use crate::format::superblock::SuperblockError;
use crate::format::xattr::XattrError;
use crate::journal::replay::ReplayError;

/// How bad a finding is, measured by what e2fsck does about it.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Class {
    /// No fault: the next mount does it.
    Pending,
    /// Wrong, though `e2fsck -fn` does not look there or says nothing.
    Unseen,
    /// `e2fsck -fn` tells of it and still leaves with 0.
    Notice,
    /// `e2fsck -fn` leaves with 4; `e2fsck -p` repairs it without a question.
    Preen,
    /// `e2fsck -fn` leaves with 4 (or 8); `e2fsck -p` leaves it to a person.
    Fault,
}

impl Class {
    /// A word for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Unseen => "unseen",
            Self::Notice => "notice",
            Self::Preen => "preen",
            Self::Fault => "fault",
        }
    }
}

/// A flag of an inode that cannot be.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each says what it is")]
pub enum FlagFault {
    #[error("extents without the feature")]
    ExtentsFeature,
    #[error("no extents, but i_block holds an extent header")]
    ExtentsUnset,
    #[error("extents on a symbolic link within the inode")]
    ExtentsOnFastLink,
    #[error("index without the feature dir_index")]
    IndexFeature,
    #[error("index on what is no directory")]
    IndexNoDirectory,
    #[error("inline data without the feature")]
    InlineFeature,
    #[error("imagic without the feature")]
    Imagic,
    #[error("casefold where it cannot be")]
    Casefold,
    #[error("ea_inode on what is no regular file")]
    EaInode,
    #[error("encrypted without the feature")]
    Encrypted,
    #[error("immutable or append on a special file")]
    Immutable,
}

/// What can be wrong with an extent.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each says what it is")]
pub enum ExtentFault {
    #[error("starts outside the file system")]
    Outside,
    #[error("ends outside the file system")]
    EndsOutside,
    #[error("out of order")]
    Order,
    #[error("longer than the index says")]
    PastIndex,
    #[error("of no length")]
    Empty,
    #[error("maps what another has mapped")]
    Collision,
    #[error("unwritten in a directory")]
    Unwritten,
    #[error("of a directory that is too large")]
    DirectoryTooLarge,
    #[error("does not start where its child does")]
    IndexStart,
    #[error("leads to a node above it")]
    Cycle,
}

/// What can be wrong with a symbolic link.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each says what it is")]
pub enum LinkFault {
    #[error("i_size does not fit")]
    Size,
    #[error("the target is not as long as i_size says")]
    Length,
    #[error("not one block")]
    Blocks,
    #[error("a flag that no symbolic link has")]
    Flags,
}

/// What can be wrong with an attribute.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each says what it is")]
pub enum XattrFault {
    #[error("the entry overlaps another or the end")]
    Entry,
    #[error("the value overlaps another or the end")]
    Value,
    #[error("e_value_size past the end")]
    ValueSize,
    #[error("e_name_len past the end")]
    NameLen,
    #[error("e_name_index is 0")]
    NameIndex,
    #[error("e_hash is wrong")]
    Hash,
    #[error("e_value_inum without the feature ea_inode")]
    ValueInode,
    #[error("entries are not sorted")]
    Order,
    #[error("the name is there twice")]
    Twice,
    #[error("a zero byte in the name")]
    Name,
}

/// What can be wrong with a directory entry.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each says what it is")]
pub enum EntryFault {
    #[error("{0}")]
    Shape(DirentError),
    #[error("not \".\"")]
    NotDot,
    #[error("not \"..\"")]
    NotDotDot,
    #[error("\".\" is another inode")]
    DotInode,
    #[error("\".\" reaches over the next entry")]
    DotLength,
    #[error("a byte behind \".\" or \"..\" is not zero")]
    DotNull,
    #[error("the directory itself")]
    Itself,
    #[error("no inode that may have a name")]
    BadInode,
    #[error("a second \".\" or \"..\"")]
    SecondDot,
    #[error("the root directory")]
    Root,
    #[error("an empty name")]
    EmptyName,
    #[error("'/' or a zero byte in the name")]
    Name,
    #[error("an inode of a group that has none")]
    UninitGroup,
    #[error("an inode past bg_itable_unused")]
    UnusedPart,
    #[error("a free inode")]
    FreeInode,
    #[error("file_type is {found}, the inode's is {want}")]
    FileType { found: u8, want: u8 },
    #[error("no file_type, the inode's is {want}")]
    NoFileType { want: u8 },
    #[error("file_type is {found} without the feature filetype")]
    FileTypeFeature { found: u8 },
    #[error("a directory that has a name in inode {other}")]
    SecondParent { other: u32 },
    #[error("a name that is there twice in this block")]
    Twice,
    #[error("a name that another block has, too")]
    TwiceApart,
}

/// What can be wrong with the index of a directory.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each says what it is")]
pub enum IndexFault {
    #[error("{0}")]
    Shape(DxError),
    #[error("reserved_zero is not 0")]
    Reserved,
    #[error("its block is not there")]
    NoRoot,
    #[error("entry {index} leads to block {lblk}, past the end")]
    Past { index: u32, lblk: u32 },
    #[error("the hash of entry {index} is out of order")]
    Order { index: u32 },
    #[error("names below the least hash")]
    Below,
    #[error("names above the greatest hash")]
    Above,
    #[error("a leaf in the wrong depth")]
    Depth,
    #[error("no entry leads there")]
    Unreferenced,
    #[error("two entries lead there")]
    Twice,
}

/// One thing that is wrong, or pending.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each says what it is")]
pub enum Finding {
    // The device and the superblock.
    #[error("block {block}: cannot be read: {error}")]
    Read { block: u64, error: BlkError },
    #[error("{0}")]
    Superblock(SuperblockError),
    #[error("superblock: features that are not supported:{}{}",
        incompat_names(*incompat), ro_compat_names(*ro_compat))]
    NotSupported { incompat: u32, ro_compat: u32 },
    #[error("superblock: s_blocks_count is {blocks}, the device has {have}")]
    DeviceTooSmall { blocks: u64, have: u64 },
    #[error("superblock: {field} is {value}, expected {want}")]
    SuperField {
        field: &'static str,
        value: u64,
        want: &'static str,
    },
    #[error("superblock: {what}")]
    Features { what: &'static str },
    #[error("superblock: {field} is {value}, in the future")]
    FutureTime { field: &'static str, value: u32 },
    #[error("superblock: s_state is {state}: errors were seen")]
    ErrorState { state: u16 },
    #[error("superblock: s_free_blocks_count is {found}, expected {want}")]
    FreeBlocks {
        found: u64,
        want: u64,
        /// It was not unmounted: the count is made anew at the next mount.
        is_mounted: bool,
    },
    #[error("superblock: s_free_inodes_count is {found}, expected {want}")]
    FreeInodes {
        found: u32,
        want: u32,
        /// As above.
        is_mounted: bool,
    },
    #[error("superblock copy in group {group}: {field} differs")]
    BackupSuper { group: u32, field: &'static str },
    #[error("resize inode: {what}")]
    ResizeInode { what: &'static str },

    // Groups.
    #[error("group {group}: bg_checksum is {found:#06x}, expected {want:#06x}")]
    GroupChecksum { group: u32, found: u16, want: u16 },
    #[error("group {group}: {field} is {block}, outside its place")]
    GroupLocation {
        group: u32,
        field: &'static str,
        block: u64,
    },
    #[error("group {group}: {field} at block {block} overlaps other metadata")]
    GroupOverlap {
        group: u32,
        field: &'static str,
        block: u64,
    },
    #[error("group {group}: bg_flags {flags:#x}, bg_itable_unused {unused} without checksums")]
    GroupUninit { group: u32, flags: u16, unused: u32 },
    #[error("group {group}: the last group has no block bitmap (bg_flags {flags:#x})")]
    GroupUninitLast { group: u32, flags: u16 },
    #[error("group {group}: bg_itable_unused is {unused}, more than its {free} free inodes")]
    GroupUnused { group: u32, unused: u32, free: u32 },
    #[error("group {group}: bg_free_blocks_count is {found}, expected {want}")]
    GroupFreeBlocks { group: u32, found: u32, want: u32 },
    #[error("group {group}: bg_free_inodes_count is {found}, expected {want}")]
    GroupFreeInodes { group: u32, found: u32, want: u32 },
    #[error("group {group}: bg_used_dirs_count is {found}, expected {want}")]
    GroupUsedDirs { group: u32, found: u32, want: u32 },
    #[error("group {group}: block bitmap: checksum is {found:#x}, expected {want:#x}")]
    BlockBitmapChecksum { group: u32, found: u32, want: u32 },
    #[error("group {group}: inode bitmap: checksum is {found:#x}, expected {want:#x}")]
    InodeBitmapChecksum { group: u32, found: u32, want: u32 },
    #[error("group {group}: block bitmap: bits past the end are not set")]
    BlockBitmapEnd { group: u32 },
    #[error("group {group}: inode bitmap: bits past the end are not set")]
    InodeBitmapEnd { group: u32 },
    #[error("block bitmap: blocks {first} to {last} are marked, but nobody's")]
    BlocksLeaked { first: u64, last: u64 },
    #[error("block bitmap: blocks {first} to {last} are in use, but marked free")]
    BlocksNotMarked { first: u64, last: u64 },
    #[error("inode bitmap: inodes {first} to {last} are marked, but free")]
    InodesLeaked { first: u32, last: u32 },
    #[error("inode bitmap: inodes {first} to {last} are in use, but marked free")]
    InodesNotMarked { first: u32, last: u32 },

    // Inodes.
    #[error("inode {ino}: i_checksum is {found:#010x}, expected {want:#010x}")]
    InodeChecksum { ino: u32, found: u32, want: u32 },
    #[error("inode {ino}: i_mode is {mode:#o}")]
    InodeMode { ino: u32, mode: u16 },
    #[error("inode {ino}: {field} is {value}, expected {want}")]
    InodeField {
        ino: u32,
        field: &'static str,
        value: u64,
        want: u64,
    },
    #[error("inode {ino}: i_extra_isize is {value}")]
    ExtraSize {
        ino: u32,
        value: u16,
        /// One of the inodes without a name, where e2fsck does not look at it.
        is_hidden: bool,
    },
    #[error("inode {ino}: reserved, but in use")]
    InodeReserved { ino: u32 },
    #[error("inode {ino}: i_flags {flags:#x}: {fault}")]
    InodeFlags {
        ino: u32,
        flags: u32,
        fault: FlagFault,
    },
    #[error("inode {ino}: deleted, but i_dtime is 0")]
    NoDeletionTime { ino: u32 },
    #[error("inode {ino}: i_dtime is {dtime}, an inode number")]
    LowDeletionTime { ino: u32, dtime: u32 },
    #[error("inode {ino}: i_dtime is {dtime} in an inode in use")]
    DeletionTime { ino: u32, dtime: u32 },
    #[error("inode {ino}: {field}: a time before 1970 in the old form")]
    OldTime { ino: u32, field: &'static str },
    #[error("inode {ino}: i_size is {size}, but its map ends at block {end}")]
    Size { ino: u32, size: u64, end: u64 },
    #[error("inode {ino}: i_size is {size}, without the feature large_file")]
    LargeFile { ino: u32, size: u64 },
    #[error("inode {ino}: i_blocks is {found}, expected {want}")]
    Sectors { ino: u32, found: u64, want: u64 },
    #[error("inode {ino}: symbolic link: {fault}, i_size {size}")]
    Symlink {
        ino: u32,
        size: u64,
        fault: LinkFault,
    },
    #[error("inode {ino}: {error} (block {block})")]
    ExtentNode {
        ino: u32,
        block: u64,
        error: NodeError,
    },
    #[error(
        "inode {ino}: et_checksum of extent block {block} is {found:#010x}, expected {want:#010x}"
    )]
    ExtentChecksum {
        ino: u32,
        block: u64,
        found: u32,
        want: u32,
    },
    #[error("inode {ino}: extent {lblk}+{len} at block {pblk}: {fault}")]
    Extent {
        ino: u32,
        lblk: u32,
        len: u32,
        pblk: u64,
        fault: ExtentFault,
    },
    #[error("inode {ino}: block {lblk} of the file is {pblk}, outside the file system")]
    BlockOutside { ino: u32, lblk: u64, pblk: u64 },
    #[error("inode {ino}: block {lblk} of the file is more than it may have")]
    TooManyBlocks { ino: u32, lblk: u64 },
    #[error("inode {ino}: {count} blocks from {pblk} on are claimed twice")]
    BlocksTwice { ino: u32, pblk: u64, count: u64 },
    #[error("inode {ino}: the attributes in the inode at {offset}: {fault}")]
    InodeXattr {
        ino: u32,
        offset: u32,
        fault: XattrFault,
    },
    #[error("inode {ino}: attribute block {block} at {offset}: {fault}")]
    BlockXattr {
        ino: u32,
        block: u64,
        offset: u32,
        fault: XattrFault,
    },
    #[error("inode {ino}: i_file_acl is {block}")]
    XattrBlock { ino: u32, block: u64 },
    #[error("inode {ino}: attribute block {block}: {error}")]
    XattrHeader {
        ino: u32,
        block: u64,
        error: XattrError,
    },
    #[error(
        "inode {ino}: attribute block {block}: h_checksum is {found:#010x}, expected {want:#010x}"
    )]
    XattrChecksum {
        ino: u32,
        block: u64,
        found: u32,
        want: u32,
    },
    #[error("attribute block {block}: h_refcount is {found}, expected {want}")]
    XattrRefcount { block: u64, found: u32, want: u64 },

    // Directories.
    #[error("directory {dir}: it has no block")]
    DirectoryEmpty { dir: u32 },
    #[error("directory {dir}: block {lblk} is a hole")]
    DirectoryHole { dir: u32, lblk: u64 },
    #[error("directory {dir}: block {lblk} has no checksum tail")]
    DirectoryTail { dir: u32, lblk: u32 },
    #[error("directory {dir}: block {lblk}: wrong checksum")]
    DirectoryChecksum { dir: u32, lblk: u32 },
    #[error("directory {dir}: block {lblk}, entry at {offset}, inode {ino}: {fault}")]
    Entry {
        dir: u32,
        lblk: u32,
        offset: u32,
        ino: u32,
        fault: EntryFault,
    },
    #[error("directory {dir}: index, block {lblk}: {fault}")]
    Index {
        dir: u32,
        lblk: u32,
        fault: IndexFault,
    },

    // The tree.
    #[error("inode 2: no root directory")]
    NoRoot,
    #[error("directory {dir}: \"..\" is {found}, expected {want}")]
    DotDot { dir: u32, found: u32, want: u32 },
    #[error("directory {dir}: not connected to the root")]
    Unconnected { dir: u32 },
    #[error("directory {dir}: among its own parents")]
    Circle { dir: u32 },
    #[error("inode {ino}: in use without a name")]
    Unattached { ino: u32 },
    #[error("inode {ino}: i_links_count is {found}, expected {want}")]
    Links { ino: u32, found: u32, want: u32 },

    // The journal and the orphans.
    #[error("journal: {field} is {value}")]
    JournalField { field: &'static str, value: u64 },
    #[error("journal, inode {ino}: {what}")]
    JournalInode {
        ino: u32,
        what: &'static str,
        /// The superblock holds a copy of its map.
        has_backup: bool,
    },
    #[error("{error}")]
    JournalSuper {
        error: JournalSbError,
        /// The log cannot be replayed, though it should.
        needs_recovery: bool,
    },
    #[error("{0}")]
    JournalReplay(ReplayError),
    #[error("journal: not empty, but the superblock does not say needs_recovery")]
    JournalNotEmpty,
    #[error("journal: s_errno is {errno}")]
    JournalErrno { errno: i32 },
    #[error("journal: {transactions} transactions, {blocks} blocks to replay")]
    ReplayPending { transactions: u32, blocks: u64 },
    #[error("orphan list: inode {ino}: {what}")]
    OrphanList { ino: u32, what: &'static str },
    #[error("orphan file, block {lblk}: {what}")]
    OrphanFile { lblk: u64, what: &'static str },
    #[error("superblock: orphan_present without an orphan file")]
    OrphanPresent,
    #[error("superblock: orphan_present, but the orphan file is empty")]
    OrphanFileClean,
    #[error("inode {ino}: without a name, to be deleted")]
    OrphanToDelete { ino: u32 },
    #[error("inode {ino}: to be truncated to {size} bytes")]
    OrphanToTruncate {
        ino: u32,
        size: u64,
        /// e2fsck sees blocks past the end, or the next of the list in `i_dtime`.
        is_told: bool,
    },
}

impl Finding {
    /// How bad it is.
    #[must_use]
    pub fn class(&self) -> Class {
        match self {
            Self::ReplayPending { .. }
            | Self::FreeBlocks {
                is_mounted: true, ..
            }
            | Self::FreeInodes {
                is_mounted: true, ..
            }
            | Self::OrphanFileClean
            | Self::OrphanToDelete { .. }
            | Self::OrphanToTruncate { .. } => Class::Pending,

            Self::ErrorState { .. }
            | Self::BackupSuper { .. }
            | Self::JournalErrno { .. }
            | Self::OrphanList { .. }
            | Self::ExtraSize {
                is_hidden: true, ..
            }
            | Self::XattrBlock { ino: 3..=10, .. }
            | Self::Superblock(SuperblockError::Field {
                field: "s_def_hash_version",
                ..
            })
            | Self::JournalSuper {
                error: JournalSbError::First { .. } | JournalSbError::TooShort { .. },
                needs_recovery: false,
            } => Class::Unseen,
            Self::JournalInode {
                has_backup: true, ..
            }
            | Self::ExtentNode {
                error: NodeError::Depth { .. },
                ..
            } => Class::Unseen,
            Self::BlockXattr { fault, .. } | Self::InodeXattr { fault, .. } => fault.class(),
            Self::Entry { fault, .. } => fault.class(),
            Self::InodeFlags { fault, .. } => fault.class(),

            Self::Features { .. }
            | Self::FutureTime { .. }
            | Self::FreeBlocks { .. }
            | Self::FreeInodes { .. }
            | Self::OldTime { .. }
            | Self::ExtentNode {
                error: NodeError::TooDeep { .. },
                ..
            } => Class::Notice,

            Self::GroupChecksum { .. }
            | Self::GroupUninit { .. }
            | Self::GroupUninitLast { .. }
            | Self::GroupUnused { .. }
            | Self::GroupFreeBlocks { .. }
            | Self::GroupFreeInodes { .. }
            | Self::GroupUsedDirs { .. }
            | Self::BlockBitmapChecksum { .. }
            | Self::InodeBitmapChecksum { .. }
            | Self::BlockBitmapEnd { .. }
            | Self::InodeBitmapEnd { .. }
            | Self::BlocksLeaked { .. }
            | Self::BlocksNotMarked { .. }
            | Self::InodesLeaked { .. }
            | Self::InodesNotMarked { .. }
            | Self::InodeChecksum { .. }
            | Self::ExtraSize { .. }
            | Self::NoDeletionTime { .. }
            | Self::DeletionTime { .. }
            | Self::Size { .. }
            | Self::LargeFile { .. }
            | Self::Sectors { .. }
            | Self::DirectoryEmpty { .. }
            | Self::DirectoryTail { .. }
            | Self::DirectoryChecksum { .. }
            | Self::Links { .. }
            | Self::JournalField { .. }
            | Self::JournalInode { .. }
            | Self::JournalSuper { .. }
            | Self::OrphanFile { .. }
            | Self::OrphanPresent => Class::Preen,

            Self::Read { .. }
            | Self::Superblock(_)
            | Self::NotSupported { .. }
            | Self::DeviceTooSmall { .. }
            | Self::SuperField { .. }
            | Self::ResizeInode { .. }
            | Self::GroupLocation { .. }
            | Self::GroupOverlap { .. }
            | Self::InodeMode { .. }
            | Self::InodeField { .. }
            | Self::InodeReserved { .. }
            | Self::LowDeletionTime { .. }
            | Self::Symlink { .. }
            | Self::ExtentNode { .. }
            | Self::ExtentChecksum { .. }
            | Self::Extent { .. }
            | Self::BlockOutside { .. }
            | Self::TooManyBlocks { .. }
            | Self::BlocksTwice { .. }
            | Self::XattrBlock { .. }
            | Self::XattrHeader { .. }
            | Self::XattrChecksum { .. }
            | Self::XattrRefcount { .. }
            | Self::DirectoryHole { .. }
            | Self::Index { .. }
            | Self::NoRoot
            | Self::DotDot { .. }
            | Self::Unconnected { .. }
            | Self::Circle { .. }
            | Self::Unattached { .. }
            | Self::JournalReplay(_)
            | Self::JournalNotEmpty => Class::Fault,
        }
    }

    /// Whether `e2fsck -fn` says anything about it: it does not replay, and takes orphans for
    /// inodes that were deleted by halves.
    #[must_use]
    pub fn is_told_by_e2fsck(&self) -> bool {
        match (self, self.class()) {
            (Self::OrphanToTruncate { is_told, .. }, _) => *is_told,
            (
                Self::ReplayPending { .. }
                | Self::FreeBlocks {
                    is_mounted: true, ..
                }
                | Self::FreeInodes {
                    is_mounted: true, ..
                },
                _,
            )
            | (_, Class::Unseen) => false,
            (_, Class::Pending | Class::Notice | Class::Preen | Class::Fault) => true,
        }
    }
}

impl XattrFault {
    const fn class(self) -> Class {
        match self {
            Self::Order | Self::Twice | Self::Name => Class::Unseen,
            Self::NameLen | Self::ValueSize | Self::Hash => Class::Preen,
            Self::Entry | Self::Value | Self::NameIndex | Self::ValueInode => Class::Fault,
        }
    }
}

impl FlagFault {
    const fn class(self) -> Class {
        match self {
            Self::Immutable => Class::Notice,
            Self::ExtentsUnset | Self::IndexFeature | Self::IndexNoDirectory => Class::Preen,
            Self::ExtentsFeature
            | Self::ExtentsOnFastLink
            | Self::InlineFeature
            | Self::Imagic
            | Self::Casefold
            | Self::Encrypted
            | Self::EaInode => Class::Fault,
        }
    }
}

impl EntryFault {
    const fn class(self) -> Class {
        match self {
            Self::NoFileType { .. } | Self::TwiceApart => Class::Unseen,
            Self::DotLength | Self::Twice => Class::Notice,
            Self::UninitGroup
            | Self::UnusedPart
            | Self::FreeInode
            | Self::FileTypeFeature { .. } => Class::Preen,
            Self::Shape(_)
            | Self::NotDot
            | Self::NotDotDot
            | Self::DotInode
            | Self::DotNull
            | Self::Itself
            | Self::BadInode
            | Self::SecondDot
            | Self::Root
            | Self::EmptyName
            | Self::Name
            | Self::FileType { .. }
            | Self::SecondParent { .. } => Class::Fault,
        }
    }
}
