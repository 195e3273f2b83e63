//! One block group: its descriptor, and its state in memory.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use blockstack::sync::{Mutex, Rank};
use zerocopy::FromBytes;

use super::view::{FreeMap, Span};
use crate::format::csum::crc32c;
use crate::format::features::Incompat;
use crate::format::group::{GroupFlags, RawGroupDesc, RawGroupDescHigh, group_checksum};
use crate::geometry::Geometry;

/// A descriptor, decoded.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Desc {
    pub(super) block_bitmap: u64,
    pub(super) inode_bitmap: u64,
    pub(super) inode_table: u64,
    pub(super) free_blocks: u32,
    pub(super) free_inodes: u32,
    pub(super) used_dirs: u32,
    pub(super) itable_unused: u32,
    pub(super) flags: GroupFlags,
    pub(super) block_csum: u32,
    pub(super) inode_csum: u32,
}

const LOW: usize = size_of::<RawGroupDesc>();
const HIGH: usize = LOW + size_of::<RawGroupDescHigh>();
const _: () = assert!(LOW == 32 && HIGH == 64);

impl Desc {
    /// Decodes `s_desc_size` bytes; `None` if they are fewer.
    pub(super) fn decode(geo: &Geometry, bytes: &[u8]) -> Option<Self> {
        let low = RawGroupDesc::ref_from_bytes(bytes.get(..LOW)?).ok()?;
        let zero = [0u8; HIGH - LOW];
        let wide = geo.desc_size >= 64;
        let high = if wide {
            bytes.get(LOW..HIGH)?
        } else {
            &zero[..]
        };
        let high = RawGroupDescHigh::ref_from_bytes(high).ok()?;
        let flags = GroupFlags::from_bits_retain(low.bg_flags.get());
        let join32 = |lo: u32, hi: u32| u64::from(lo) | u64::from(hi) << 32;
        let join16 = |lo: u16, hi: u16| u32::from(lo) | u32::from(hi) << 16;
        Some(Self {
            block_bitmap: join32(low.bg_block_bitmap_lo.get(), high.bg_block_bitmap_hi.get()),
            inode_bitmap: join32(low.bg_inode_bitmap_lo.get(), high.bg_inode_bitmap_hi.get()),
            inode_table: join32(low.bg_inode_table_lo.get(), high.bg_inode_table_hi.get()),
            free_blocks: join16(
                low.bg_free_blocks_count_lo.get(),
                high.bg_free_blocks_count_hi.get(),
            ),
            free_inodes: join16(
                low.bg_free_inodes_count_lo.get(),
                high.bg_free_inodes_count_hi.get(),
            ),
            used_dirs: join16(
                low.bg_used_dirs_count_lo.get(),
                high.bg_used_dirs_count_hi.get(),
            ),
            itable_unused: join16(
                low.bg_itable_unused_lo.get(),
                high.bg_itable_unused_hi.get(),
            ),
            // Without checksums the flags mean nothing.
            flags: if geo.group_desc_csum() {
                flags
            } else {
                GroupFlags::empty()
            },
            block_csum: join16(
                low.bg_block_bitmap_csum_lo.get(),
                high.bg_block_bitmap_csum_hi.get(),
            ),
            inode_csum: join16(
                low.bg_inode_bitmap_csum_lo.get(),
                high.bg_inode_bitmap_csum_hi.get(),
            ),
        })
    }

    /// Writes what allocation changes (counters, flags, checksums) and seals the descriptor.
    pub(super) fn encode(&self, geo: &Geometry, group: u32, bytes: &mut [u8]) {
        let Some(Ok(low)) = bytes.get_mut(..LOW).map(RawGroupDesc::mut_from_bytes) else {
            return;
        };
        let [fb_lo, fb_hi] = halves(self.free_blocks);
        let [fi_lo, fi_hi] = halves(self.free_inodes);
        let [ud_lo, ud_hi] = halves(self.used_dirs);
        let [iu_lo, iu_hi] = halves(self.itable_unused);
        let [bc_lo, bc_hi] = halves(self.block_csum);
        let [ic_lo, ic_hi] = halves(self.inode_csum);
        low.bg_free_blocks_count_lo.set(fb_lo);
        low.bg_free_inodes_count_lo.set(fi_lo);
        low.bg_used_dirs_count_lo.set(ud_lo);
        if geo.group_desc_csum() {
            low.bg_flags.set(self.flags.bits());
            low.bg_itable_unused_lo.set(iu_lo);
        }
        if geo.metadata_csum() {
            low.bg_block_bitmap_csum_lo.set(bc_lo);
            low.bg_inode_bitmap_csum_lo.set(ic_lo);
        }
        if geo.desc_size >= 64
            && let Some(Ok(high)) = bytes
                .get_mut(LOW..HIGH)
                .map(RawGroupDescHigh::mut_from_bytes)
        {
            high.bg_free_blocks_count_hi.set(fb_hi);
            high.bg_free_inodes_count_hi.set(fi_hi);
            high.bg_used_dirs_count_hi.set(ud_hi);
            if geo.group_desc_csum() {
                high.bg_itable_unused_hi.set(iu_hi);
            }
            if geo.metadata_csum() {
                high.bg_block_bitmap_csum_hi.set(bc_hi);
                high.bg_inode_bitmap_csum_hi.set(ic_hi);
            }
        }
        if geo.group_desc_csum() {
            let sum = group_checksum(geo.group_csum, group, bytes);
            if let Some(Ok(low)) = bytes.get_mut(..LOW).map(RawGroupDesc::mut_from_bytes) {
                low.bg_checksum.set(sum);
            }
        }
    }

    /// Tells what is wrong with a descriptor, if anything.
    pub(super) fn check(
        &self,
        geo: &Geometry,
        group: u32,
        bytes: &[u8],
    ) -> Result<(), &'static str> {
        if geo.group_desc_csum() {
            let found = RawGroupDesc::ref_from_prefix(bytes).map(|(raw, _)| raw.bg_checksum.get());
            if found != Ok(group_checksum(geo.group_csum, group, bytes)) {
                return Err("group descriptor: checksum");
            }
        }
        // Block 0 and the superblock's are inside the file system, but nobody's bitmap.
        let first = u64::from(geo.first_data_block) + 1;
        if self.block_bitmap < first || !geo.blocks_in_fs(self.block_bitmap, 1) {
            return Err("group descriptor: bg_block_bitmap");
        }
        if self.inode_bitmap < first
            || self.inode_bitmap == self.block_bitmap
            || !geo.blocks_in_fs(self.inode_bitmap, 1)
        {
            return Err("group descriptor: bg_inode_bitmap");
        }
        let table = self.inode_table..self.inode_table.saturating_add(geo.itable_blocks.into());
        if table.start < first
            || !geo.blocks_in_fs(self.inode_table, geo.itable_blocks.into())
            || table.contains(&self.block_bitmap)
            || table.contains(&self.inode_bitmap)
        {
            return Err("group descriptor: bg_inode_table");
        }
        if self.free_blocks > geo.group_blocks(group) {
            return Err("group descriptor: bg_free_blocks_count");
        }
        if self.free_inodes > geo.inodes_per_group {
            return Err("group descriptor: bg_free_inodes_count");
        }
        if self.used_dirs > geo.inodes_per_group {
            return Err("group descriptor: bg_used_dirs_count");
        }
        if self.itable_unused > geo.inodes_per_group {
            return Err("group descriptor: bg_itable_unused");
        }
        Ok(())
    }

    /// Inodes of the table that may have been used: those behind were never written.
    pub(super) fn inodes_begun(&self, geo: &Geometry) -> u32 {
        if !geo.group_desc_csum() {
            geo.inodes_per_group
        } else if self.flags.contains(GroupFlags::INODE_UNINIT) {
            0
        } else {
            geo.inodes_per_group.saturating_sub(self.itable_unused)
        }
    }

    /// Sets the checksum of the block bitmap.
    pub(super) fn seal_blocks(&mut self, geo: &Geometry, bitmap: &[u8]) {
        self.block_csum = bitmap_csum(geo, geo.blocks_per_group, bitmap);
    }
}

/// Checksum of a bitmap, with as many bits as the descriptor has room for.
pub(super) fn bitmap_csum(geo: &Geometry, bits: u32, bitmap: &[u8]) -> u32 {
    if !geo.metadata_csum() {
        return 0;
    }
    let len = (bits / 8) as usize;
    let csum = crc32c(geo.csum_seed, bitmap.get(..len).unwrap_or(bitmap));
    if geo.desc_size >= 64 {
        csum
    } else {
        csum & 0xffff
    }
}

fn halves(v: u32) -> [u16; 2] {
    let [a, b, c, d] = v.to_le_bytes();
    [u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])]
}

/// Calls `f` with the blocks of a group that hold copies of superblock and descriptors.
pub(super) fn base_metadata(geo: &Geometry, group: u32, mut f: impl FnMut(Span)) {
    let has_super = geo.group_has_super(group);
    let meta_group = group / geo.desc_per_block;
    let spread = geo.incompat.contains(Incompat::META_BG) && meta_group >= geo.first_meta_bg;
    let len = if spread {
        // The descriptors of a meta group stand in its first, second and last group.
        let at = group % geo.desc_per_block;
        let copy = at == 0 || at == 1 || at == geo.desc_per_block - 1;
        u32::from(has_super) + u32::from(copy)
    } else if has_super {
        let gdt = if geo.incompat.contains(Incompat::META_BG) {
            geo.first_meta_bg
        } else {
            geo.gdt_blocks()
        };
        1 + gdt + u32::from(geo.reserved_gdt_blocks)
    } else {
        0
    };
    if len > 0 {
        f(Span {
            start: 0,
            len: len.min(geo.group_blocks(group)),
        });
    }
}

/// Calls `f` with the part of `start..start + len` that lies in `group`.
pub(super) fn part_in(geo: &Geometry, group: u32, start: u64, len: u32, f: &mut impl FnMut(Span)) {
    let first = geo.group_first_block(group);
    let end = first + u64::from(geo.group_blocks(group));
    let from = start.max(first);
    let to = start.saturating_add(u64::from(len)).min(end);
    if from < to {
        f(Span {
            start: (from - first) as u32,
            len: (to - from) as u32,
        });
    }
}

/// The state of one group in memory.
///
/// The atomics are copies for choosing a group without a lock; the views are the truth.
pub(super) struct Group {
    /// Held over a change of bitmap and descriptor on disk, so that the checksum of the one in the
    /// other is never of an older content. I/O may be awaited under it.
    pub(super) disk: Mutex<()>,
    pub(super) block_bitmap: u64,
    /// The bitmap on disk is not initialized yet; changed under `disk`.
    pub(super) block_uninit: AtomicBool,
    /// The file system's own blocks in this group; set when the view of blocks is made.
    pub(super) own: OnceLock<Box<[Span]>>,
    pub(super) blocks: Mutex<Option<FreeMap>>,
    pub(super) inodes: Mutex<Option<FreeMap>>,
    pub(super) free_blocks: AtomicU32,
    pub(super) largest: AtomicU32,
    pub(super) free_inodes: AtomicU32,
    pub(super) used_dirs: AtomicU32,
    /// Nothing is allocated here: bitmap or descriptor are damaged.
    pub(super) bad_blocks: AtomicBool,
    pub(super) bad_inodes: AtomicBool,
}

impl Group {
    pub(super) fn new(desc: &Desc) -> Self {
        Self {
            disk: Mutex::new(Rank::ExtentTree, ()),
            block_bitmap: desc.block_bitmap,
            // Empty without descriptor checksums.
            block_uninit: AtomicBool::new(desc.flags.contains(GroupFlags::BLOCK_UNINIT)),
            own: OnceLock::new(),
            blocks: Mutex::new(Rank::BlockGroup, None),
            inodes: Mutex::new(Rank::BlockGroup, None),
            free_blocks: AtomicU32::new(desc.free_blocks),
            largest: AtomicU32::new(desc.free_blocks),
            free_inodes: AtomicU32::new(desc.free_inodes),
            used_dirs: AtomicU32::new(desc.used_dirs),
            bad_blocks: AtomicBool::new(false),
            bad_inodes: AtomicBool::new(false),
        }
    }

    /// A group whose descriptor cannot be used.
    pub(super) fn bad() -> Self {
        let none = Desc {
            block_bitmap: 0,
            inode_bitmap: 0,
            inode_table: 0,
            free_blocks: 0,
            free_inodes: 0,
            used_dirs: 0,
            itable_unused: 0,
            flags: GroupFlags::empty(),
            block_csum: 0,
            inode_csum: 0,
        };
        let group = Self::new(&none);
        group.bad_blocks.store(true, Ordering::Relaxed);
        group.bad_inodes.store(true, Ordering::Relaxed);
        group
    }

    /// Copies what the view of blocks says into the atomics.
    pub(super) fn publish_blocks(&self, map: &FreeMap) {
        self.free_blocks.store(map.free(), Ordering::Relaxed);
        self.largest.store(map.largest(), Ordering::Relaxed);
    }

    /// Copies what the view of inodes says into the atomics.
    pub(super) fn publish_inodes(&self, map: &FreeMap) {
        self.free_inodes.store(map.free(), Ordering::Relaxed);
    }
}
