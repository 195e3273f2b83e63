//! The block group descriptor: bytes only, no I/O.
//!
//! Format: Linux `Documentation/filesystems/ext4/group_descr.rst`.

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::csum::{crc16, crc32c};

bitflags::bitflags! {
    /// `bg_flags`.
    #[derive(Clone, Copy, Debug, Eq, PartialEq)]
    pub struct GroupFlags: u16 {
        /// Inode table and bitmap are not initialized.
        const INODE_UNINIT = 1;
        /// The block bitmap is not initialized.
        const BLOCK_UNINIT = 2;
        /// The inode table is zeroed.
        const INODE_ZEROED = 4;
    }
}

/// The first 32 bytes; [`RawGroupDescHigh`] follows where `s_desc_size` is 64 or more.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
#[expect(
    missing_docs,
    reason = "the field names are those of the format's documentation"
)]
pub struct RawGroupDesc {
    pub bg_block_bitmap_lo: U32,
    pub bg_inode_bitmap_lo: U32,
    pub bg_inode_table_lo: U32,
    pub bg_free_blocks_count_lo: U16,
    pub bg_free_inodes_count_lo: U16,
    pub bg_used_dirs_count_lo: U16,
    pub bg_flags: U16,
    pub bg_exclude_bitmap_lo: U32,
    pub bg_block_bitmap_csum_lo: U16,
    pub bg_inode_bitmap_csum_lo: U16,
    pub bg_itable_unused_lo: U16,
    pub bg_checksum: U16,
}

/// Bytes 32 to 63.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
#[expect(
    missing_docs,
    reason = "the field names are those of the format's documentation"
)]
pub struct RawGroupDescHigh {
    pub bg_block_bitmap_hi: U32,
    pub bg_inode_bitmap_hi: U32,
    pub bg_inode_table_hi: U32,
    pub bg_free_blocks_count_hi: U16,
    pub bg_free_inodes_count_hi: U16,
    pub bg_used_dirs_count_hi: U16,
    pub bg_itable_unused_hi: U16,
    pub bg_exclude_bitmap_hi: U32,
    pub bg_block_bitmap_csum_hi: U16,
    pub bg_inode_bitmap_csum_hi: U16,
    pub bg_reserved: U32,
}

const _: () = assert!(size_of::<RawGroupDesc>() == 32);
const _: () = assert!(offset_of!(RawGroupDesc, bg_checksum) == 0x1e);
const _: () = assert!(size_of::<RawGroupDescHigh>() == 32);

/// How a descriptor's checksum is computed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum GroupCsum {
    /// Not at all.
    None,
    /// `uninit_bg`: CRC-16 that begins with the UUID's.
    Crc16 {
        /// CRC-16 of the UUID.
        uuid: u16,
    },
    /// `metadata_csum`: the low half of a CRC-32C.
    Crc32c {
        /// Seed of the file system.
        seed: u32,
    },
}

/// Checksum of the descriptor of `group`, whose bytes (`s_desc_size` of them) are `desc`.
#[must_use]
pub fn group_checksum(kind: GroupCsum, group: u32, desc: &[u8]) -> u16 {
    const AT: usize = offset_of!(RawGroupDesc, bg_checksum);
    let number = group.to_le_bytes();
    match kind {
        GroupCsum::None => 0,
        GroupCsum::Crc16 { uuid } => {
            let crc = crc16(crc16(uuid, &number), &desc[..AT]);
            crc16(crc, &desc[AT + 2..])
        }
        GroupCsum::Crc32c { seed } => {
            let crc = crc32c(crc32c(seed, &number), &desc[..AT]);
            crc32c(crc32c(crc, &[0, 0]), &desc[AT + 2..]) as u16
        }
    }
}
