//! Feature bits of the superblock.
//!
//! Format: Linux `Documentation/filesystems/ext4/super.rst`.

use bitflags::bitflags;

bitflags! {
    /// Features that a driver may ignore.
    #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
    pub struct Compat: u32 {
        /// Directory preallocation.
        const DIR_PREALLOC = 0x1;
        /// AFS server inodes.
        const IMAGIC_INODES = 0x2;
        /// A journal.
        const HAS_JOURNAL = 0x4;
        /// Extended attributes.
        const EXT_ATTR = 0x8;
        /// Room for the group descriptors to grow.
        const RESIZE_INODE = 0x10;
        /// Hashed directories.
        const DIR_INDEX = 0x20;
        /// Two backup superblocks only.
        const SPARSE_SUPER2 = 0x200;
        /// The kernel makes fast commits.
        const FAST_COMMIT = 0x400;
        /// Inode numbers and UUID stay.
        const STABLE_INODES = 0x800;
        /// The orphan list is a file.
        const ORPHAN_FILE = 0x1000;
    }

    /// Features without which the file system cannot be read.
    #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
    pub struct Incompat: u32 {
        /// Compressed files.
        const COMPRESSION = 0x1;
        /// File types in directory entries.
        const FILETYPE = 0x2;
        /// The journal must be replayed.
        const RECOVER = 0x4;
        /// This device is a journal.
        const JOURNAL_DEV = 0x8;
        /// Group descriptors are spread.
        const META_BG = 0x10;
        /// Extents.
        const EXTENTS = 0x40;
        /// Block numbers above 32 bits.
        const BIT64 = 0x80;
        /// Multiple mount protection.
        const MMP = 0x100;
        /// Groups share the places of their metadata.
        const FLEX_BG = 0x200;
        /// Attribute values in inodes.
        const EA_INODE = 0x400;
        /// Data in directory entries.
        const DIRDATA = 0x1000;
        /// The checksum seed is in the superblock.
        const CSUM_SEED = 0x2000;
        /// Hashed directories of three levels.
        const LARGEDIR = 0x4000;
        /// File data in inodes.
        const INLINE_DATA = 0x8000;
        /// Encrypted files.
        const ENCRYPT = 0x10000;
        /// Case-insensitive directories.
        const CASEFOLD = 0x20000;
    }

    /// Features without which the file system can be read but not written.
    #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
    pub struct RoCompat: u32 {
        /// Fewer backup superblocks.
        const SPARSE_SUPER = 0x1;
        /// Files over 2 GiB.
        const LARGE_FILE = 0x2;
        /// Never used.
        const BTREE_DIR = 0x4;
        /// File lengths in file system blocks.
        const HUGE_FILE = 0x8;
        /// CRC-16 in group descriptors.
        const GDT_CSUM = 0x10;
        /// More than 65,000 subdirectories.
        const DIR_NLINK = 0x20;
        /// Larger inodes.
        const EXTRA_ISIZE = 0x40;
        /// Never merged.
        const HAS_SNAPSHOT = 0x80;
        /// Quota files in hidden inodes.
        const QUOTA = 0x100;
        /// Allocation in clusters.
        const BIGALLOC = 0x200;
        /// Checksums of all metadata.
        const METADATA_CSUM = 0x400;
        /// Never used.
        const REPLICA = 0x800;
        /// Not to be written.
        const READONLY = 0x1000;
        /// Project ids.
        const PROJECT = 0x2000;
        /// Blocks shared between files.
        const SHARED_BLOCKS = 0x4000;
        /// Verified files.
        const VERITY = 0x8000;
        /// The orphan file may hold orphans.
        const ORPHAN_PRESENT = 0x10000;
    }
}

/// What this program reads and writes.
pub const INCOMPAT_SUPPORTED: Incompat = Incompat::FILETYPE
    .union(Incompat::RECOVER)
    .union(Incompat::META_BG)
    .union(Incompat::EXTENTS)
    .union(Incompat::BIT64)
    .union(Incompat::FLEX_BG)
    .union(Incompat::CSUM_SEED)
    .union(Incompat::LARGEDIR);

/// What this program writes.
pub const RO_COMPAT_SUPPORTED: RoCompat = RoCompat::SPARSE_SUPER
    .union(RoCompat::LARGE_FILE)
    .union(RoCompat::HUGE_FILE)
    .union(RoCompat::GDT_CSUM)
    .union(RoCompat::DIR_NLINK)
    .union(RoCompat::EXTRA_ISIZE)
    .union(RoCompat::METADATA_CSUM)
    .union(RoCompat::PROJECT)
    .union(RoCompat::ORPHAN_PRESENT);

/// Names of the bits of an incompat set, as `dumpe2fs` prints them; unknown bits in hexadecimal.
#[must_use]
pub fn incompat_names(bits: u32) -> String {
    const NAMES: [(Incompat, &str); 17] = [
        (Incompat::COMPRESSION, "compression"),
        (Incompat::FILETYPE, "filetype"),
        (Incompat::RECOVER, "needs_recovery"),
        (Incompat::JOURNAL_DEV, "journal_dev"),
        (Incompat::META_BG, "meta_bg"),
        (Incompat::EXTENTS, "extent"),
        (Incompat::BIT64, "64bit"),
        (Incompat::MMP, "mmp"),
        (Incompat::FLEX_BG, "flex_bg"),
        (Incompat::EA_INODE, "ea_inode"),
        (Incompat::DIRDATA, "dirdata"),
        (Incompat::CSUM_SEED, "metadata_csum_seed"),
        (Incompat::LARGEDIR, "large_dir"),
        (Incompat::INLINE_DATA, "inline_data"),
        (Incompat::ENCRYPT, "encrypt"),
        (Incompat::CASEFOLD, "casefold"),
        (Incompat::empty(), ""),
    ];
    names(bits, &NAMES.map(|(bit, name)| (bit.bits(), name)))
}

/// Names of the bits of a read-only compatible set, as `dumpe2fs` prints them.
#[must_use]
pub fn ro_compat_names(bits: u32) -> String {
    const NAMES: [(RoCompat, &str); 16] = [
        (RoCompat::SPARSE_SUPER, "sparse_super"),
        (RoCompat::LARGE_FILE, "large_file"),
        (RoCompat::BTREE_DIR, "btree_dir"),
        (RoCompat::HUGE_FILE, "huge_file"),
        (RoCompat::GDT_CSUM, "uninit_bg"),
        (RoCompat::DIR_NLINK, "dir_nlink"),
        (RoCompat::EXTRA_ISIZE, "extra_isize"),
        (RoCompat::HAS_SNAPSHOT, "has_snapshot"),
        (RoCompat::QUOTA, "quota"),
        (RoCompat::BIGALLOC, "bigalloc"),
        (RoCompat::METADATA_CSUM, "metadata_csum"),
        (RoCompat::REPLICA, "replica"),
        (RoCompat::READONLY, "read-only"),
        (RoCompat::PROJECT, "project"),
        (RoCompat::SHARED_BLOCKS, "shared_blocks"),
        (RoCompat::VERITY, "verity"),
    ];
    names(bits, &NAMES.map(|(bit, name)| (bit.bits(), name)))
}

fn names(mut bits: u32, table: &[(u32, &str)]) -> String {
    let mut words = Vec::new();
    for &(bit, name) in table {
        if bit != 0 && bits & bit != 0 {
            words.push(name.to_owned());
            bits &= !bit;
        }
    }
    for index in (0..32).filter(|index| bits & (1 << index) != 0) {
        words.push(format!("{:#x}", 1u32 << index));
    }
    words.join(" ")
}
