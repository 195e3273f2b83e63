//! The inode: bytes only, no I/O.
//!
//! Format: Linux `Documentation/filesystems/ext4/inodes.rst`.

use std::mem::{offset_of, size_of};

use smallvec::SmallVec;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::csum::crc32c;

/// Bytes of the inode that every ext2 has.
pub const GOOD_OLD_SIZE: usize = 128;
/// Bytes of the fixed extra fields that this program knows.
pub const EXTRA_SIZE: usize = size_of::<RawInodeExtra>();

bitflags::bitflags! {
    /// `i_flags`.
    #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
    pub struct InodeFlags: u32 {
        /// Secure deletion.
        const SECRM = 0x1;
        /// Undelete.
        const UNRM = 0x2;
        /// Compressed.
        const COMPR = 0x4;
        /// Writes are synchronous.
        const SYNC = 0x8;
        /// Cannot be changed.
        const IMMUTABLE = 0x10;
        /// Can only grow.
        const APPEND = 0x20;
        /// Not for `dump`.
        const NODUMP = 0x40;
        /// No access times.
        const NOATIME = 0x80;
        /// Encrypted.
        const ENCRYPT = 0x800;
        /// A hashed directory.
        const INDEX = 0x1000;
        /// AFS.
        const IMAGIC = 0x2000;
        /// Data goes through the journal.
        const JOURNAL_DATA = 0x4000;
        /// Tails are not merged.
        const NOTAIL = 0x8000;
        /// Changes of the directory are synchronous.
        const DIRSYNC = 0x10000;
        /// Top of a directory hierarchy.
        const TOPDIR = 0x20000;
        /// `i_blocks` counts file system blocks.
        const HUGE_FILE = 0x40000;
        /// Mapped by extents.
        const EXTENTS = 0x80000;
        /// Verified.
        const VERITY = 0x100000;
        /// Holds an attribute value.
        const EA_INODE = 0x200000;
        /// Blocks past the end of file (deprecated).
        const EOFBLOCKS = 0x400000;
        /// Direct access.
        const DAX = 0x2000000;
        /// Data in the inode.
        const INLINE_DATA = 0x10000000;
        /// Children inherit the project.
        const PROJINHERIT = 0x20000000;
        /// Case-insensitive directory.
        const CASEFOLD = 0x40000000;
    }
}

/// The first 128 bytes.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
#[expect(
    missing_docs,
    reason = "the field names are those of the format's documentation"
)]
pub struct RawInode {
    pub i_mode: U16,
    pub i_uid: U16,
    pub i_size_lo: U32,
    pub i_atime: U32,
    pub i_ctime: U32,
    pub i_mtime: U32,
    pub i_dtime: U32,
    pub i_gid: U16,
    pub i_links_count: U16,
    pub i_blocks_lo: U32,
    pub i_flags: U32,
    pub i_version: U32,
    pub i_block: [u8; 60],
    pub i_generation: U32,
    pub i_file_acl_lo: U32,
    pub i_size_high: U32,
    pub i_obso_faddr: U32,
    pub i_blocks_high: U16,
    pub i_file_acl_high: U16,
    pub i_uid_high: U16,
    pub i_gid_high: U16,
    pub i_checksum_lo: U16,
    pub i_reserved: U16,
}

/// The fields after the first 128 bytes, as far as `i_extra_isize` says.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
#[expect(
    missing_docs,
    reason = "the field names are those of the format's documentation"
)]
pub struct RawInodeExtra {
    pub i_extra_isize: U16,
    pub i_checksum_hi: U16,
    pub i_ctime_extra: U32,
    pub i_mtime_extra: U32,
    pub i_atime_extra: U32,
    pub i_crtime: U32,
    pub i_crtime_extra: U32,
    pub i_version_hi: U32,
    pub i_projid: U32,
}

const _: () = assert!(size_of::<RawInode>() == GOOD_OLD_SIZE);
const _: () = assert!(offset_of!(RawInode, i_block) == 0x28);
const _: () = assert!(offset_of!(RawInode, i_checksum_lo) == 0x7c);
const _: () = assert!(size_of::<RawInodeExtra>() == 32);

/// A point in time with nanoseconds, seconds since 1970.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub struct Timespec {
    /// Seconds; on disk -2^31 to 2^34 - 2^31 where the inode has extra fields, 32 bits else.
    pub sec: i64,
    /// Nanoseconds, 0 to 999,999,999.
    pub nsec: u32,
}

impl Timespec {
    /// Joins the 32 bits of the first 128 bytes with the extra field: two epoch bits, nanoseconds.
    fn decode(low: u32, extra: Option<u32>) -> Self {
        let extra = extra.unwrap_or(0);
        let sec = i64::from(low as i32) + (i64::from(extra & 3) << 32);
        Self {
            sec,
            nsec: (extra >> 2).min(999_999_999),
        }
    }

    fn encode(self, has_extra: bool) -> (u32, u32) {
        const MAX: i64 = (3 << 32) + i32::MAX as i64;
        if !has_extra {
            let sec = self.sec.clamp(i64::from(i32::MIN), i64::from(i32::MAX));
            return (sec as u32, 0);
        }
        let sec = self.sec.clamp(i64::from(i32::MIN), MAX);
        let epoch = ((sec - i64::from(sec as i32)) >> 32) as u32 & 3;
        (sec as u32, epoch | self.nsec << 2)
    }
}

/// An inode in memory; guarded by the inode's lock.
#[derive(Clone, Debug)]
pub struct InodeData {
    /// Type and permissions.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size in bytes.
    pub size: u64,
    /// Last access.
    pub atime: Timespec,
    /// Last change of the inode.
    pub ctime: Timespec,
    /// Last change of the content.
    pub mtime: Timespec,
    /// Birth; zero where the inode has no room for it.
    pub crtime: Timespec,
    /// Time of deletion, or the next orphan.
    pub dtime: u32,
    /// Hard links; 1 for a directory with 65,000 or more where `dir_nlink` is on.
    pub links: u16,
    /// Space used, in sectors of 512 bytes.
    pub sectors: u64,
    /// Flags.
    pub flags: InodeFlags,
    /// Generation, for NFS and for checksums.
    pub generation: u32,
    /// The block of extended attributes, or 0.
    pub file_acl: u64,
    /// `i_block`: extents, block pointers, or the target of a short symbolic link.
    pub block: [u8; 60],
    /// Version counter.
    pub version: u64,
    /// Project.
    pub projid: u32,
    /// Bytes of extra fields; 0 for 128-byte inodes.
    pub extra_isize: u16,
    /// What follows the extra fields: attributes in the inode.
    pub ibody: SmallVec<[u8; 128]>,
}

impl Default for InodeData {
    fn default() -> Self {
        Self {
            mode: 0,
            uid: 0,
            gid: 0,
            size: 0,
            atime: Timespec::default(),
            ctime: Timespec::default(),
            mtime: Timespec::default(),
            crtime: Timespec::default(),
            dtime: 0,
            links: 0,
            sectors: 0,
            flags: InodeFlags::empty(),
            generation: 0,
            file_acl: 0,
            block: [0; 60],
            version: 0,
            projid: 0,
            extra_isize: 0,
            ibody: SmallVec::new(),
        }
    }
}

impl InodeData {
    /// Counts a change of the inode or its content, as the kernel's `inode_inc_iversion`.
    pub fn count_change(&mut self) {
        self.version = self.version.wrapping_add(1);
    }
}

/// What can be wrong with an inode.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum InodeError {
    /// The bytes are not as long as an inode.
    #[error("inode: {len} bytes")]
    Length {
        /// How long they are.
        len: usize,
    },
    /// The checksum does not match.
    #[error("inode: i_checksum is {found:#010x}, expected {want:#010x}")]
    Checksum {
        /// What stands there.
        found: u32,
        /// What was computed.
        want: u32,
    },
    /// The extra fields do not fit.
    #[error("inode: i_extra_isize is {value}")]
    ExtraSize {
        /// What stands there.
        value: u16,
    },
}

impl InodeData {
    /// Whether `i_blocks` is counted in file system blocks instead of sectors.
    fn huge(flags: InodeFlags) -> bool {
        flags.contains(InodeFlags::HUGE_FILE)
    }

    /// Decodes an inode of `bytes.len()` bytes.
    ///
    /// # Errors
    /// What is wrong with it; the checksum is not looked at here.
    pub fn decode(bytes: &[u8], block_bits: u32) -> Result<Self, InodeError> {
        let len = bytes.len();
        let Ok((raw, rest)) = RawInode::ref_from_prefix(bytes) else {
            return Err(InodeError::Length { len });
        };
        let mut extra_isize = 0;
        let mut extra_bytes = [0u8; EXTRA_SIZE];
        if rest.len() >= 4 {
            extra_isize = u16::from_le_bytes([rest[0], rest[1]]);
            let bad = extra_isize % 4 != 0 || usize::from(extra_isize) > rest.len();
            // Zero happens in inodes made before the larger size was in use.
            if bad || (1..4).contains(&extra_isize) {
                return Err(InodeError::ExtraSize { value: extra_isize });
            }
            let known = usize::from(extra_isize).min(EXTRA_SIZE);
            extra_bytes[..known].copy_from_slice(&rest[..known]);
        }
        let Ok(extra) = RawInodeExtra::read_from_bytes(&extra_bytes) else {
            return Err(InodeError::Length { len });
        };
        let has = |end: usize| usize::from(extra_isize) >= end;
        let flags = InodeFlags::from_bits_retain(raw.i_flags.get());
        let count = u64::from(raw.i_blocks_lo.get()) | u64::from(raw.i_blocks_high.get()) << 32;
        let sectors = if Self::huge(flags) {
            count << (block_bits - 9)
        } else {
            count
        };
        Ok(Self {
            mode: raw.i_mode.get(),
            uid: u32::from(raw.i_uid.get()) | u32::from(raw.i_uid_high.get()) << 16,
            gid: u32::from(raw.i_gid.get()) | u32::from(raw.i_gid_high.get()) << 16,
            size: u64::from(raw.i_size_lo.get()) | u64::from(raw.i_size_high.get()) << 32,
            ctime: Timespec::decode(raw.i_ctime.get(), has(8).then(|| extra.i_ctime_extra.get())),
            mtime: Timespec::decode(
                raw.i_mtime.get(),
                has(12).then(|| extra.i_mtime_extra.get()),
            ),
            atime: Timespec::decode(
                raw.i_atime.get(),
                has(16).then(|| extra.i_atime_extra.get()),
            ),
            crtime: if has(20) {
                let extra_bits = has(24).then(|| extra.i_crtime_extra.get());
                Timespec::decode(extra.i_crtime.get(), extra_bits)
            } else {
                Timespec::default()
            },
            dtime: raw.i_dtime.get(),
            links: raw.i_links_count.get(),
            sectors,
            flags,
            generation: raw.i_generation.get(),
            file_acl: u64::from(raw.i_file_acl_lo.get())
                | u64::from(raw.i_file_acl_high.get()) << 32,
            block: raw.i_block,
            version: u64::from(raw.i_version.get())
                | if has(28) {
                    u64::from(extra.i_version_hi.get()) << 32
                } else {
                    0
                },
            projid: if has(32) { extra.i_projid.get() } else { 0 },
            extra_isize,
            ibody: SmallVec::from_slice(rest.get(usize::from(extra_isize)..).unwrap_or(&[])),
        })
    }

    /// Encodes into the inode's bytes; fields this program does not know stay as they are.
    ///
    /// # Errors
    /// [`InodeError`] where the bytes cannot hold the inode.
    pub fn encode(&self, bytes: &mut [u8], block_bits: u32) -> Result<(), InodeError> {
        let len = bytes.len();
        let extra_isize = usize::from(self.extra_isize);
        let Ok((raw, rest)) = RawInode::mut_from_prefix(bytes) else {
            return Err(InodeError::Length { len });
        };
        let has = |end: usize| extra_isize >= end;
        let count = if Self::huge(self.flags) {
            self.sectors >> (block_bits - 9)
        } else {
            self.sectors
        };
        raw.i_mode.set(self.mode);
        raw.i_uid.set(self.uid as u16);
        raw.i_uid_high.set((self.uid >> 16) as u16);
        raw.i_gid.set(self.gid as u16);
        raw.i_gid_high.set((self.gid >> 16) as u16);
        raw.i_size_lo.set(self.size as u32);
        raw.i_size_high.set((self.size >> 32) as u32);
        let (ctime, ctime_extra) = self.ctime.encode(has(8));
        let (mtime, mtime_extra) = self.mtime.encode(has(12));
        let (atime, atime_extra) = self.atime.encode(has(16));
        raw.i_ctime.set(ctime);
        raw.i_mtime.set(mtime);
        raw.i_atime.set(atime);
        raw.i_dtime.set(self.dtime);
        raw.i_links_count.set(self.links);
        raw.i_blocks_lo.set(count as u32);
        raw.i_blocks_high.set((count >> 32) as u16);
        raw.i_flags.set(self.flags.bits());
        raw.i_version.set(self.version as u32);
        raw.i_block = self.block;
        raw.i_generation.set(self.generation);
        raw.i_file_acl_lo.set(self.file_acl as u32);
        raw.i_file_acl_high.set((self.file_acl >> 32) as u16);
        if rest.is_empty() {
            return Ok(());
        }
        if extra_isize > rest.len() || (extra_isize == 0 && rest.len() < 4) {
            return Err(InodeError::ExtraSize {
                value: self.extra_isize,
            });
        }
        let mut image = [0u8; EXTRA_SIZE];
        let known = extra_isize.min(EXTRA_SIZE);
        image[..known].copy_from_slice(&rest[..known]);
        let Ok(extra) = RawInodeExtra::mut_from_bytes(&mut image) else {
            return Err(InodeError::Length { len });
        };
        let (crtime, crtime_extra) = self.crtime.encode(has(24));
        extra.i_extra_isize.set(self.extra_isize);
        extra.i_ctime_extra.set(ctime_extra);
        extra.i_mtime_extra.set(mtime_extra);
        extra.i_atime_extra.set(atime_extra);
        extra.i_crtime.set(crtime);
        extra.i_crtime_extra.set(crtime_extra);
        extra.i_version_hi.set((self.version >> 32) as u32);
        extra.i_projid.set(self.projid);
        rest[..known].copy_from_slice(&image[..known]);
        if extra_isize == 0 {
            rest[..2].fill(0);
        }
        let body = &mut rest[extra_isize..];
        let filled = self.ibody.len().min(body.len());
        body[..filled].copy_from_slice(&self.ibody[..filled]);
        Ok(())
    }

    /// The file type bits of the mode.
    #[must_use]
    pub fn file_type(&self) -> u32 {
        u32::from(self.mode) & libc::S_IFMT
    }

    /// Whether it is a directory.
    #[must_use]
    pub fn is_dir(&self) -> bool {
        self.file_type() == libc::S_IFDIR
    }

    /// Whether it is a regular file.
    #[must_use]
    pub fn is_file(&self) -> bool {
        self.file_type() == libc::S_IFREG
    }

    /// Whether it is a symbolic link.
    #[must_use]
    pub fn is_symlink(&self) -> bool {
        self.file_type() == libc::S_IFLNK
    }

    /// Whether it is mapped by extents.
    #[must_use]
    pub fn has_extents(&self) -> bool {
        self.flags.contains(InodeFlags::EXTENTS)
    }
}

/// The seed of an inode's checksums: its own, and those of its directory and extent blocks.
#[must_use]
pub fn inode_csum_seed(fs_seed: u32, ino: u32, generation: u32) -> u32 {
    crc32c(
        crc32c(fs_seed, &ino.to_le_bytes()),
        &generation.to_le_bytes(),
    )
}

/// Computes the checksum of an inode's bytes; the upper half is meaningful only where
/// `i_extra_isize` covers `i_checksum_hi`.
#[must_use]
pub fn inode_checksum(seed: u32, bytes: &[u8]) -> u32 {
    const LOW: usize = offset_of!(RawInode, i_checksum_lo);
    const HIGH: usize = GOOD_OLD_SIZE + offset_of!(RawInodeExtra, i_checksum_hi);
    let crc = crc32c(crc32c(seed, &bytes[..LOW]), &[0, 0]);
    if bytes.len() <= GOOD_OLD_SIZE {
        return crc32c(crc, &bytes[LOW + 2..]);
    }
    let crc = crc32c(crc, &bytes[LOW + 2..HIGH]);
    if has_checksum_hi(bytes) {
        crc32c(crc32c(crc, &[0, 0]), &bytes[HIGH + 2..])
    } else {
        crc32c(crc, &bytes[HIGH..])
    }
}

fn has_checksum_hi(bytes: &[u8]) -> bool {
    bytes.len() > GOOD_OLD_SIZE + 4
        && u16::from_le_bytes([bytes[GOOD_OLD_SIZE], bytes[GOOD_OLD_SIZE + 1]]) >= 4
}

/// Sets the checksum in an inode's bytes.
pub fn seal_inode(seed: u32, bytes: &mut [u8]) {
    const LOW: usize = offset_of!(RawInode, i_checksum_lo);
    const HIGH: usize = GOOD_OLD_SIZE + offset_of!(RawInodeExtra, i_checksum_hi);
    let csum = inode_checksum(seed, bytes).to_le_bytes();
    bytes[LOW..LOW + 2].copy_from_slice(&csum[..2]);
    if has_checksum_hi(bytes) {
        bytes[HIGH..HIGH + 2].copy_from_slice(&csum[2..]);
    }
}

/// Checks the checksum of an inode's bytes.
///
/// # Errors
/// [`InodeError::Checksum`].
pub fn verify_inode(seed: u32, bytes: &[u8]) -> Result<(), InodeError> {
    const LOW: usize = offset_of!(RawInode, i_checksum_lo);
    const HIGH: usize = GOOD_OLD_SIZE + offset_of!(RawInodeExtra, i_checksum_hi);
    let computed = inode_checksum(seed, bytes);
    let low = u32::from(u16::from_le_bytes([bytes[LOW], bytes[LOW + 1]]));
    let (found, want) = if has_checksum_hi(bytes) {
        let high = u32::from(u16::from_le_bytes([bytes[HIGH], bytes[HIGH + 1]]));
        (low | high << 16, computed)
    } else {
        (low, computed & 0xffff)
    };
    if found == want {
        Ok(())
    } else {
        Err(InodeError::Checksum { found, want })
    }
}

#[cfg(test)]
mod tests {
    use super::{InodeData, Timespec, inode_csum_seed, seal_inode, verify_inode};

    #[test]
    fn times_come_back_over_the_whole_range() {
        for sec in [
            i64::from(i32::MIN),
            -1,
            0,
            1,
            1 << 31,
            1 << 32,
            (3 << 32) + 5,
        ] {
            let time = Timespec {
                sec,
                nsec: 999_999_999,
            };
            let (low, extra) = time.encode(true);
            assert_eq!(Timespec::decode(low, Some(extra)), time);
        }
    }

    #[test]
    fn inode_comes_back() {
        let mut bytes = vec![0u8; 256];
        bytes[128..130].copy_from_slice(&32u16.to_le_bytes());
        let mut data = InodeData::decode(&bytes, 12).unwrap();
        data.mode = 0o100_644;
        data.size = 1 << 40;
        data.sectors = 1 << 33;
        data.uid = 0x1234_5678;
        data.crtime = Timespec {
            sec: 1 << 33,
            nsec: 3,
        };
        data.ibody[0] = 9;
        data.encode(&mut bytes, 12).unwrap();
        let seed = inode_csum_seed(1, 12, 3);
        seal_inode(seed, &mut bytes);
        verify_inode(seed, &bytes).unwrap();
        let again = InodeData::decode(&bytes, 12).unwrap();
        assert_eq!(format!("{again:?}"), format!("{data:?}"));
        bytes[3] ^= 1;
        assert!(verify_inode(seed, &bytes).is_err());
    }
}
