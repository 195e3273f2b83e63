//! The superblock: bytes only, no I/O.
//!
//! Format: Linux `Documentation/filesystems/ext4/super.rst`.

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::csum::crc32c;
use super::features::{Compat, Incompat, RoCompat};

/// Where the superblock begins, in bytes from the start of the device.
pub const SUPERBLOCK_OFFSET: u64 = 1024;
/// Its length in bytes.
pub const SUPERBLOCK_SIZE: usize = 1024;
/// `s_magic`.
pub const MAGIC: u16 = 0xef53;
/// `s_state`: unmounted cleanly.
pub const STATE_VALID: u16 = 1;
/// In `s_default_mount_opts`: how data is journalled; [`DEFM_JMODE_DATA`], 0x40 for ordered, or all
/// of it for writeback.
pub const DEFM_JMODE: u32 = 0x60;
/// Data goes through the journal.
pub const DEFM_JMODE_DATA: u32 = 0x20;
/// `s_state`: errors were found.
pub const STATE_ERROR: u16 = 2;
/// `s_flags`: directory hashes of signed characters.
pub const FLAG_SIGNED_HASH: u32 = 1;
/// `s_flags`: directory hashes of unsigned characters.
pub const FLAG_UNSIGNED_HASH: u32 = 2;

/// The superblock as it stands on the disk.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
#[expect(
    missing_docs,
    reason = "the field names are those of the format's documentation"
)]
pub struct RawSuperblock {
    pub s_inodes_count: U32,
    pub s_blocks_count_lo: U32,
    pub s_r_blocks_count_lo: U32,
    pub s_free_blocks_count_lo: U32,
    pub s_free_inodes_count: U32,
    pub s_first_data_block: U32,
    pub s_log_block_size: U32,
    pub s_log_cluster_size: U32,
    pub s_blocks_per_group: U32,
    pub s_clusters_per_group: U32,
    pub s_inodes_per_group: U32,
    pub s_mtime: U32,
    pub s_wtime: U32,
    pub s_mnt_count: U16,
    pub s_max_mnt_count: U16,
    pub s_magic: U16,
    pub s_state: U16,
    pub s_errors: U16,
    pub s_minor_rev_level: U16,
    pub s_lastcheck: U32,
    pub s_checkinterval: U32,
    pub s_creator_os: U32,
    pub s_rev_level: U32,
    pub s_def_resuid: U16,
    pub s_def_resgid: U16,
    pub s_first_ino: U32,
    pub s_inode_size: U16,
    pub s_block_group_nr: U16,
    pub s_feature_compat: U32,
    pub s_feature_incompat: U32,
    pub s_feature_ro_compat: U32,
    pub s_uuid: [u8; 16],
    pub s_volume_name: [u8; 16],
    pub s_last_mounted: [u8; 64],
    pub s_algorithm_usage_bitmap: U32,
    pub s_prealloc_blocks: u8,
    pub s_prealloc_dir_blocks: u8,
    pub s_reserved_gdt_blocks: U16,
    pub s_journal_uuid: [u8; 16],
    pub s_journal_inum: U32,
    pub s_journal_dev: U32,
    pub s_last_orphan: U32,
    pub s_hash_seed: [U32; 4],
    pub s_def_hash_version: u8,
    pub s_jnl_backup_type: u8,
    pub s_desc_size: U16,
    pub s_default_mount_opts: U32,
    pub s_first_meta_bg: U32,
    pub s_mkfs_time: U32,
    pub s_jnl_blocks: [U32; 17],
    pub s_blocks_count_hi: U32,
    pub s_r_blocks_count_hi: U32,
    pub s_free_blocks_count_hi: U32,
    pub s_min_extra_isize: U16,
    pub s_want_extra_isize: U16,
    pub s_flags: U32,
    pub s_raid_stride: U16,
    pub s_mmp_interval: U16,
    pub s_mmp_block: U64,
    pub s_raid_stripe_width: U32,
    pub s_log_groups_per_flex: u8,
    pub s_checksum_type: u8,
    pub s_encryption_level: u8,
    pub s_reserved_pad: u8,
    pub s_kbytes_written: U64,
    pub s_snapshot: [U32; 5],
    pub s_error_count: U32,
    pub s_first_error_time: U32,
    pub s_first_error_ino: U32,
    pub s_first_error_block: U64,
    pub s_first_error_func: [u8; 32],
    pub s_first_error_line: U32,
    pub s_last_error_time: U32,
    pub s_last_error_ino: U32,
    pub s_last_error_line: U32,
    pub s_last_error_block: U64,
    pub s_last_error_func: [u8; 32],
    pub s_mount_opts: [u8; 64],
    pub s_usr_quota_inum: U32,
    pub s_grp_quota_inum: U32,
    pub s_overhead_clusters: U32,
    pub s_backup_bgs: [U32; 2],
    pub s_encrypt_algos: [u8; 4],
    pub s_encrypt_pw_salt: [u8; 16],
    pub s_lpf_ino: U32,
    pub s_prj_quota_inum: U32,
    pub s_checksum_seed: U32,
    pub s_wtime_hi: u8,
    pub s_mtime_hi: u8,
    pub s_mkfs_time_hi: u8,
    pub s_lastcheck_hi: u8,
    pub s_first_error_time_hi: u8,
    pub s_last_error_time_hi: u8,
    pub s_first_error_errcode: u8,
    pub s_last_error_errcode: u8,
    pub s_encoding: U16,
    pub s_encoding_flags: U16,
    pub s_orphan_file_inum: U32,
    pub s_reserved: [U32; 94],
    pub s_checksum: U32,
}

const _: () = assert!(size_of::<RawSuperblock>() == SUPERBLOCK_SIZE);
const _: () = assert!(offset_of!(RawSuperblock, s_uuid) == 0x68);
const _: () = assert!(offset_of!(RawSuperblock, s_hash_seed) == 0xec);
const _: () = assert!(offset_of!(RawSuperblock, s_blocks_count_hi) == 0x150);
const _: () = assert!(offset_of!(RawSuperblock, s_error_count) == 0x194);
const _: () = assert!(offset_of!(RawSuperblock, s_checksum_seed) == 0x270);
const _: () = assert!(offset_of!(RawSuperblock, s_orphan_file_inum) == 0x280);
const _: () = assert!(offset_of!(RawSuperblock, s_checksum) == 0x3fc);

/// What can be wrong with a superblock.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SuperblockError {
    /// Not ext2, ext3 or ext4 at all.
    #[error("not an ext2, ext3 or ext4 file system: s_magic is {found:#06x}, expected 0xef53")]
    Magic {
        /// What stands there.
        found: u16,
    },
    /// The checksum does not match.
    #[error("superblock: s_checksum is {found:#010x}, expected {want:#010x}")]
    Checksum {
        /// What stands there.
        found: u32,
        /// What was computed.
        want: u32,
    },
    /// A field has a value that cannot be.
    #[error("superblock: {field} is {value}, expected {want}")]
    Field {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What would be right.
        want: &'static str,
    },
}

impl RawSuperblock {
    /// Blocks of the file system.
    #[must_use]
    pub fn blocks_count(&self) -> u64 {
        self.join(self.s_blocks_count_lo, self.s_blocks_count_hi)
    }

    /// Blocks for the super-user only.
    #[must_use]
    pub fn reserved_blocks(&self) -> u64 {
        self.join(self.s_r_blocks_count_lo, self.s_r_blocks_count_hi)
    }

    /// Free blocks when the counter was last written.
    #[must_use]
    pub fn free_blocks(&self) -> u64 {
        self.join(self.s_free_blocks_count_lo, self.s_free_blocks_count_hi)
    }

    fn join(&self, low: U32, high: U32) -> u64 {
        let high = if self.incompat().contains(Incompat::BIT64) {
            high.get()
        } else {
            0
        };
        u64::from(low.get()) | u64::from(high) << 32
    }

    /// Sets the counter of free blocks.
    pub fn set_free_blocks(&mut self, blocks: u64) {
        self.s_free_blocks_count_lo.set(blocks as u32);
        self.s_free_blocks_count_hi.set((blocks >> 32) as u32);
    }

    /// The compatible features.
    #[must_use]
    pub fn compat(&self) -> Compat {
        Compat::from_bits_retain(self.s_feature_compat.get())
    }

    /// The incompatible features.
    #[must_use]
    pub fn incompat(&self) -> Incompat {
        Incompat::from_bits_retain(self.s_feature_incompat.get())
    }

    /// The read-only compatible features.
    #[must_use]
    pub fn ro_compat(&self) -> RoCompat {
        RoCompat::from_bits_retain(self.s_feature_ro_compat.get())
    }

    /// The checksum its bytes should have.
    #[must_use]
    pub fn checksum(&self) -> u32 {
        crc32c(
            !0,
            &self.as_bytes()[..offset_of!(RawSuperblock, s_checksum)],
        )
    }

    /// Sets the checksum, where the file system has one.
    pub fn seal(&mut self) {
        if self.ro_compat().contains(RoCompat::METADATA_CSUM) {
            self.s_checksum.set(self.checksum());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{RawSuperblock, SUPERBLOCK_SIZE};
    use zerocopy::{FromBytes, IntoBytes};

    #[test]
    fn bytes_come_back() {
        let bytes: Vec<u8> = (0..SUPERBLOCK_SIZE).map(|i| (i * 7) as u8).collect();
        let raw = RawSuperblock::read_from_bytes(&bytes).unwrap();
        assert_eq!(raw.as_bytes(), bytes);
    }
}
