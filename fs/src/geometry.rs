//! The shape of a file system: what the superblock says, checked once.

use crate::format::csum::{crc16, crc32c};
use crate::format::features::{Compat, Incompat, RoCompat};
use crate::format::group::GroupCsum;
use crate::format::superblock::{
    FLAG_UNSIGNED_HASH, MAGIC, RawSuperblock, SUPERBLOCK_OFFSET, SuperblockError,
};

/// Plain data, valid once made.
#[derive(Clone, Debug)]
pub struct Geometry {
    /// Bytes in a block.
    pub block_size: u32,
    /// log2 of it.
    pub block_bits: u32,
    /// Bytes in an inode: 128, 256, ...
    pub inode_size: u16,
    /// Bytes of extra fields a new inode gets; 0 for 128-byte inodes.
    pub want_extra_isize: u16,
    /// Inodes in a group.
    pub inodes_per_group: u32,
    /// Blocks in a group but the last.
    pub blocks_per_group: u32,
    /// 1 with blocks of 1 KiB, else 0.
    pub first_data_block: u32,
    /// Blocks of the file system.
    pub blocks_count: u64,
    /// Inodes of the file system.
    pub inodes_count: u32,
    /// Groups.
    pub group_count: u32,
    /// Bytes in a group descriptor: 32 or 64 and more.
    pub desc_size: u16,
    /// Group descriptors in a block.
    pub desc_per_block: u32,
    /// Blocks of a group's inode table.
    pub itable_blocks: u32,
    /// First inode that is not reserved.
    pub first_ino: u32,
    /// log2 of the groups in a flex group.
    pub log_groups_per_flex: u8,
    /// Blocks kept for more group descriptors, in each group with a superblock.
    pub reserved_gdt_blocks: u16,
    /// First meta group with spread descriptors.
    pub first_meta_bg: u32,
    /// Groups with backups where `sparse_super2` is on.
    pub backup_bgs: [u32; 2],
    /// Compatible features.
    pub compat: Compat,
    /// Incompatible features.
    pub incompat: Incompat,
    /// Read-only compatible features.
    pub ro_compat: RoCompat,
    /// Seed of all checksums.
    pub csum_seed: u32,
    /// How group descriptors are checked.
    pub group_csum: GroupCsum,
    /// Seed of directory hashes.
    pub hash_seed: [u32; 4],
    /// Whether directory hashes take characters as unsigned.
    pub hash_unsigned: bool,
    /// Hash of new directories: 0 legacy, 1 half_md4, 2 tea.
    pub def_hash_version: u8,
    /// UUID.
    pub uuid: [u8; 16],
    /// The journal's inode, or 0.
    pub journal_inum: u32,
    /// The orphan file's inode, or 0.
    pub orphan_file_inum: u32,
    /// Who may use reserved blocks beside root.
    pub resuid: u16,
    /// Which group may use reserved blocks.
    pub resgid: u16,
}

fn field<T>(field: &'static str, value: u64, want: &'static str) -> Result<T, SuperblockError> {
    Err(SuperblockError::Field { field, value, want })
}

impl Geometry {
    /// Checks a superblock.
    ///
    /// # Errors
    /// The first field that cannot be.
    pub fn new(raw: &RawSuperblock) -> Result<Self, SuperblockError> {
        if raw.s_magic.get() != MAGIC {
            return Err(SuperblockError::Magic {
                found: raw.s_magic.get(),
            });
        }
        let ro_compat = raw.ro_compat();
        let incompat = raw.incompat();
        let metadata_csum = ro_compat.contains(RoCompat::METADATA_CSUM);
        if metadata_csum {
            if raw.s_checksum_type != 1 {
                return field("s_checksum_type", raw.s_checksum_type.into(), "1 (crc32c)");
            }
            let (found, want) = (raw.s_checksum.get(), raw.checksum());
            if found != want {
                return Err(SuperblockError::Checksum { found, want });
            }
        }
        let log_block_size = raw.s_log_block_size.get();
        if log_block_size > 6 {
            return field("s_log_block_size", log_block_size.into(), "0 to 6");
        }
        let block_bits = 10 + log_block_size;
        let block_size = 1u32 << block_bits;
        if block_size > 4096 {
            return field(
                "s_log_block_size",
                log_block_size.into(),
                "0 to 2 (blocks up to 4096)",
            );
        }
        let rev = raw.s_rev_level.get();
        if rev > 1 {
            return field("s_rev_level", rev.into(), "0 or 1");
        }
        let (inode_size, first_ino) = if rev == 0 {
            (128, 11)
        } else {
            (raw.s_inode_size.get(), raw.s_first_ino.get())
        };
        if !inode_size.is_power_of_two() || inode_size < 128 || u32::from(inode_size) > block_size {
            return field(
                "s_inode_size",
                inode_size.into(),
                "a power of two, 128 to a block",
            );
        }
        if first_ino < 11 {
            return field("s_first_ino", first_ino.into(), "11 or more");
        }
        let first_data_block = raw.s_first_data_block.get();
        if first_data_block != u32::from(block_size == 1024) {
            return field(
                "s_first_data_block",
                first_data_block.into(),
                "1 with 1 KiB blocks, else 0",
            );
        }
        let blocks_per_group = raw.s_blocks_per_group.get();
        if blocks_per_group < 8 || blocks_per_group > block_size * 8 || blocks_per_group % 8 != 0 {
            return field(
                "s_blocks_per_group",
                blocks_per_group.into(),
                "a multiple of 8, at most 8 times the block size",
            );
        }
        if !incompat.is_empty() || rev > 0 {
            let clusters = raw.s_clusters_per_group.get();
            let log_cluster = raw.s_log_cluster_size.get();
            if !ro_compat.contains(RoCompat::BIGALLOC)
                && (clusters != blocks_per_group || log_cluster != log_block_size)
            {
                return field(
                    "s_clusters_per_group",
                    clusters.into(),
                    "s_blocks_per_group, and s_log_cluster_size s_log_block_size, without bigalloc",
                );
            }
        }
        let inodes_per_block = block_size / u32::from(inode_size);
        let inodes_per_group = raw.s_inodes_per_group.get();
        if inodes_per_group < inodes_per_block
            || inodes_per_group > block_size * 8
            || inodes_per_group % 8 != 0
        {
            return field(
                "s_inodes_per_group",
                inodes_per_group.into(),
                "a multiple of 8, from a block of inodes to 8 times the block size",
            );
        }
        let itable_blocks = inodes_per_group.div_ceil(inodes_per_block);
        let blocks_count = raw.blocks_count();
        let data_blocks = match blocks_count.checked_sub(u64::from(first_data_block)) {
            Some(blocks) if blocks > u64::from(itable_blocks) && blocks_count < 1 << 48 => blocks,
            _ => {
                return field(
                    "s_blocks_count",
                    blocks_count,
                    "more than one inode table, under 2^48",
                );
            }
        };
        let groups = data_blocks.div_ceil(u64::from(blocks_per_group));
        let inodes = groups.checked_mul(u64::from(inodes_per_group));
        let inodes_count = raw.s_inodes_count.get();
        let (Ok(group_count), Some(inodes)) = (u32::try_from(groups), inodes) else {
            return field("s_blocks_count", blocks_count, "fewer than 2^32 groups");
        };
        if u64::from(inodes_count) != inodes {
            return field(
                "s_inodes_count",
                inodes_count.into(),
                "s_inodes_per_group times the number of groups",
            );
        }
        let desc_size = if incompat.contains(Incompat::BIT64) {
            let size = raw.s_desc_size.get();
            if !size.is_power_of_two() || size < 64 || u32::from(size) > block_size {
                return field("s_desc_size", size.into(), "a power of two, 64 to a block");
            }
            size
        } else {
            32
        };
        let desc_per_block = block_size / u32::from(desc_size);
        let gdt_blocks = group_count.div_ceil(desc_per_block);
        let reserved_gdt_blocks = raw.s_reserved_gdt_blocks.get();
        if u32::from(reserved_gdt_blocks) > block_size / 4 {
            return field(
                "s_reserved_gdt_blocks",
                reserved_gdt_blocks.into(),
                "at most a quarter of the block size",
            );
        }
        let first_meta_bg = raw.s_first_meta_bg.get();
        let meta_bg = incompat.contains(Incompat::META_BG);
        if meta_bg && first_meta_bg > gdt_blocks {
            return field(
                "s_first_meta_bg",
                first_meta_bg.into(),
                "within the descriptor blocks",
            );
        }
        if !meta_bg && u64::from(gdt_blocks) + u64::from(itable_blocks) + 3 > data_blocks {
            return field(
                "s_blocks_count",
                blocks_count,
                "room for the group descriptors",
            );
        }
        if raw.reserved_blocks() > blocks_count {
            return field(
                "s_r_blocks_count",
                raw.reserved_blocks(),
                "at most s_blocks_count",
            );
        }
        if raw.free_blocks() > blocks_count {
            return field(
                "s_free_blocks_count",
                raw.free_blocks(),
                "at most s_blocks_count",
            );
        }
        if raw.s_free_inodes_count.get() > inodes_count {
            let value = raw.s_free_inodes_count.get().into();
            return field("s_free_inodes_count", value, "at most s_inodes_count");
        }
        if raw.s_log_groups_per_flex > 31 {
            return field(
                "s_log_groups_per_flex",
                raw.s_log_groups_per_flex.into(),
                "at most 31",
            );
        }
        if raw.s_def_hash_version > 5 {
            return field(
                "s_def_hash_version",
                raw.s_def_hash_version.into(),
                "0 to 5",
            );
        }
        let want_extra_isize = if inode_size > 128 {
            let room = inode_size - 128;
            let want = raw
                .s_want_extra_isize
                .get()
                .max(raw.s_min_extra_isize.get());
            if want > room || want % 4 != 0 {
                return field(
                    "s_want_extra_isize",
                    want.into(),
                    "a multiple of 4 that fits the inode",
                );
            }
            if want == 0 { 32.min(room) } else { want }
        } else {
            0
        };
        let csum_seed = if incompat.contains(Incompat::CSUM_SEED) {
            raw.s_checksum_seed.get()
        } else {
            crc32c(!0, &raw.s_uuid)
        };
        let group_csum = if metadata_csum {
            GroupCsum::Crc32c { seed: csum_seed }
        } else if ro_compat.contains(RoCompat::GDT_CSUM) {
            GroupCsum::Crc16 {
                uuid: crc16(!0, &raw.s_uuid),
            }
        } else {
            GroupCsum::None
        };
        Ok(Self {
            block_size,
            block_bits,
            inode_size,
            want_extra_isize,
            inodes_per_group,
            blocks_per_group,
            first_data_block,
            blocks_count,
            inodes_count,
            group_count,
            desc_size,
            desc_per_block,
            itable_blocks,
            first_ino,
            log_groups_per_flex: if incompat.contains(Incompat::FLEX_BG) {
                raw.s_log_groups_per_flex
            } else {
                0
            },
            reserved_gdt_blocks,
            first_meta_bg,
            backup_bgs: raw.s_backup_bgs.map(|group| group.get()),
            compat: raw.compat(),
            incompat,
            ro_compat,
            csum_seed,
            group_csum,
            hash_seed: raw.s_hash_seed.map(|word| word.get()),
            hash_unsigned: raw.s_flags.get() & FLAG_UNSIGNED_HASH != 0,
            def_hash_version: raw.s_def_hash_version,
            uuid: raw.s_uuid,
            journal_inum: raw.s_journal_inum.get(),
            orphan_file_inum: raw.s_orphan_file_inum.get(),
            resuid: raw.s_def_resuid.get(),
            resgid: raw.s_def_resgid.get(),
        })
    }

    /// Whether all metadata is checksummed.
    #[must_use]
    pub fn metadata_csum(&self) -> bool {
        self.ro_compat.contains(RoCompat::METADATA_CSUM)
    }

    /// Whether group descriptors have checksums and uninitialized groups happen.
    #[must_use]
    pub fn group_desc_csum(&self) -> bool {
        self.group_csum != GroupCsum::None
    }

    /// Whether new files are mapped by extents.
    #[must_use]
    pub fn has_extents(&self) -> bool {
        self.incompat.contains(Incompat::EXTENTS)
    }

    /// Whether directory entries carry a file type.
    #[must_use]
    pub fn has_filetype(&self) -> bool {
        self.incompat.contains(Incompat::FILETYPE)
    }

    /// First block of a group.
    #[must_use]
    pub fn group_first_block(&self, group: u32) -> u64 {
        u64::from(self.first_data_block) + u64::from(group) * u64::from(self.blocks_per_group)
    }

    /// Blocks of a group; fewer in the last.
    #[must_use]
    pub fn group_blocks(&self, group: u32) -> u32 {
        let left = self
            .blocks_count
            .saturating_sub(self.group_first_block(group));
        left.min(u64::from(self.blocks_per_group)) as u32
    }

    /// Group of a block, and the block's number in it; the block must be in the file system.
    #[must_use]
    pub fn group_of_block(&self, pblk: u64) -> (u32, u32) {
        let relative = pblk - u64::from(self.first_data_block);
        let per_group = u64::from(self.blocks_per_group);
        ((relative / per_group) as u32, (relative % per_group) as u32)
    }

    /// Whether `len` blocks from `pblk` on lie in the file system.
    #[must_use]
    pub fn blocks_in_fs(&self, pblk: u64, len: u64) -> bool {
        pblk >= u64::from(self.first_data_block)
            && pblk
                .checked_add(len)
                .is_some_and(|end| end <= self.blocks_count)
    }

    /// Group of an inode, and its index there; `ino` must be 1 or more.
    #[must_use]
    pub fn group_of_ino(&self, ino: u32) -> (u32, u32) {
        let index = ino - 1;
        (index / self.inodes_per_group, index % self.inodes_per_group)
    }

    /// Whether a group has a copy of the superblock.
    #[must_use]
    pub fn group_has_super(&self, group: u32) -> bool {
        if group == 0 {
            return true;
        }
        if self.compat.contains(Compat::SPARSE_SUPER2) {
            return self.backup_bgs.contains(&group);
        }
        if group == 1 || !self.ro_compat.contains(RoCompat::SPARSE_SUPER) {
            return true;
        }
        group % 2 == 1 && [3, 5, 7].iter().any(|&base| is_power(group, base))
    }

    /// Blocks of group descriptors.
    #[must_use]
    pub fn gdt_blocks(&self) -> u32 {
        self.group_count.div_ceil(self.desc_per_block)
    }

    /// Block that holds a group's descriptor, and the byte offset in it.
    #[must_use]
    pub fn group_desc_at(&self, group: u32) -> (u64, usize) {
        let index = group / self.desc_per_block;
        let offset = (group % self.desc_per_block) as usize * usize::from(self.desc_size);
        let block = if self.incompat.contains(Incompat::META_BG) && index >= self.first_meta_bg {
            let first = index * self.desc_per_block;
            self.group_first_block(first) + u64::from(self.group_has_super(first))
        } else {
            self.superblock_at().0 + 1 + u64::from(index)
        };
        (block, offset)
    }

    /// Block that holds the superblock, and the byte offset in it.
    #[must_use]
    pub fn superblock_at(&self) -> (u64, usize) {
        let size = u64::from(self.block_size);
        (
            SUPERBLOCK_OFFSET / size,
            (SUPERBLOCK_OFFSET % size) as usize,
        )
    }

    /// Sectors of 512 bytes in a block.
    #[must_use]
    pub fn block_sectors(&self) -> u64 {
        u64::from(self.block_size >> 9)
    }
}

fn is_power(mut number: u32, base: u32) -> bool {
    while number % base == 0 {
        number /= base;
    }
    number == 1
}
