//! Group descriptors, and what they say at the end: bitmaps and counts.

use zerocopy::FromBytes;

use super::bits::Bits;
use super::{Cx, Finding, State, superblock};
use crate::format::csum::crc32c;
use crate::format::features::Incompat;
use crate::format::group::{GroupFlags, RawGroupDesc, RawGroupDescHigh, group_checksum};
use crate::geometry::Geometry;

/// A descriptor, decoded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Group {
    pub(super) block_bitmap: u64,
    pub(super) inode_bitmap: u64,
    pub(super) inode_table: u64,
    free_blocks: u32,
    free_inodes: u32,
    used_dirs: u32,
    pub(super) unused: u32,
    pub(super) flags: GroupFlags,
    block_bitmap_csum: u32,
    inode_bitmap_csum: u32,
    csum: (u16, u16),
}

impl Group {
    fn decode(geo: &Geometry, group: u32, bytes: &[u8]) -> Option<Self> {
        let (low, rest) = RawGroupDesc::read_from_prefix(bytes).ok()?;
        let high = RawGroupDescHigh::read_from_prefix(rest).ok();
        let high = high.map(|(high, _)| high);
        let block =
            |low: u32, high: Option<u32>| u64::from(low) | u64::from(high.unwrap_or(0)) << 32;
        let count =
            |low: u16, high: Option<u16>| u32::from(low) | u32::from(high.unwrap_or(0)) << 16;
        Some(Self {
            block_bitmap: block(
                low.bg_block_bitmap_lo.get(),
                high.map(|high| high.bg_block_bitmap_hi.get()),
            ),
            inode_bitmap: block(
                low.bg_inode_bitmap_lo.get(),
                high.map(|high| high.bg_inode_bitmap_hi.get()),
            ),
            inode_table: block(
                low.bg_inode_table_lo.get(),
                high.map(|high| high.bg_inode_table_hi.get()),
            ),
            free_blocks: count(
                low.bg_free_blocks_count_lo.get(),
                high.map(|high| high.bg_free_blocks_count_hi.get()),
            ),
            free_inodes: count(
                low.bg_free_inodes_count_lo.get(),
                high.map(|high| high.bg_free_inodes_count_hi.get()),
            ),
            used_dirs: count(
                low.bg_used_dirs_count_lo.get(),
                high.map(|high| high.bg_used_dirs_count_hi.get()),
            ),
            unused: count(
                low.bg_itable_unused_lo.get(),
                high.map(|high| high.bg_itable_unused_hi.get()),
            ),
            flags: GroupFlags::from_bits_retain(low.bg_flags.get()),
            block_bitmap_csum: count(
                low.bg_block_bitmap_csum_lo.get(),
                high.map(|high| high.bg_block_bitmap_csum_hi.get()),
            ),
            inode_bitmap_csum: count(
                low.bg_inode_bitmap_csum_lo.get(),
                high.map(|high| high.bg_inode_bitmap_csum_hi.get()),
            ),
            csum: (
                low.bg_checksum.get(),
                group_checksum(geo.group_csum, group, bytes),
            ),
        })
    }

    /// Whether a flag says that something is not there yet.
    fn lacks(&self, geo: &Geometry, what: GroupFlags) -> bool {
        geo.group_desc_csum() && self.flags.contains(what)
    }

    /// Inodes that are looked at.
    pub(super) fn scanned(&self, geo: &Geometry) -> u32 {
        if self.lacks(geo, GroupFlags::INODE_UNINIT) {
            0
        } else if geo.group_desc_csum() {
            geo.inodes_per_group.saturating_sub(self.unused)
        } else {
            geo.inodes_per_group
        }
    }
}

/// Reads all descriptors.
pub(super) fn load(cx: &Cx<'_>, groups: &mut Vec<Group>) -> Result<(), Finding> {
    let geo = cx.geo;
    groups.clear();
    let mut bytes = vec![0; cx.block_size()];
    let mut loaded = None;
    let desc_size = usize::from(geo.desc_size);
    for group in 0..geo.group_count {
        let (block, at) = geo.group_desc_at(group);
        if loaded != Some(block) {
            let res = cx.blocks.read(block, &mut bytes);
            res.map_err(|error| Finding::Read { block, error })?;
            loaded = Some(block);
        }
        let desc = bytes.get(at..at + desc_size);
        groups.extend(desc.and_then(|desc| Group::decode(geo, group, desc)));
    }
    Ok(())
}

/// Where the bytes of an inode are: the block and the offset in it.
pub(super) fn inode_at(geo: &Geometry, groups: &[Group], ino: u32) -> Option<(u64, usize)> {
    if ino == 0 || ino > geo.inodes_count {
        return None;
    }
    let (group, index) = geo.group_of_ino(ino);
    let table = groups.get(group as usize)?.inode_table;
    if !geo.blocks_in_fs(table, geo.itable_blocks.into()) {
        return None;
    }
    let at = u64::from(index) * u64::from(geo.inode_size);
    let size = u64::from(geo.block_size);
    Some((table + at / size, (at % size) as usize))
}

/// Reads one inode.
pub(super) fn read_inode(cx: &Cx<'_>, state: &mut State, ino: u32, out: &mut [u8]) -> bool {
    let Some((block, at)) = inode_at(cx.geo, &state.groups, ino) else {
        return false;
    };
    let mut bytes = vec![0; cx.block_size()];
    if !cx.read(state, block, &mut bytes) {
        return false;
    }
    out.copy_from_slice(&bytes[at..at + out.len()]);
    true
}

/// Whether a group's inodes can be read.
pub(super) fn has_table(geo: &Geometry, desc: &Group) -> bool {
    geo.blocks_in_fs(desc.inode_table, geo.itable_blocks.into())
}

/// Whether a group has its places where those can be; told where not.
pub(super) fn check_places(geo: &Geometry, group: u32, desc: &Group, state: &mut State) -> bool {
    let mut all_there = true;
    for (field, block, len) in places(geo, desc) {
        if !is_inside(geo, group, block, len) {
            state.tell(Finding::GroupLocation {
                group,
                field,
                block,
            });
            all_there = false;
        }
    }
    all_there
}

/// Checks the descriptors and gives the metadata blocks to their groups; `None` where the
/// inodes cannot be found.
pub(super) fn check_descriptors(cx: &Cx<'_>, state: &mut State) -> Option<()> {
    let geo = cx.geo;
    if state.groups.len() != geo.group_count as usize {
        return None;
    }
    let mut all_there = true;
    for group in 0..geo.group_count {
        let desc = state.groups[group as usize];
        check_descriptor(geo, state, group, &desc);
        all_there &= check_places(geo, group, &desc, state);
    }
    if !all_there {
        return None;
    }
    for group in 0..geo.group_count {
        for_super_blocks(geo, group, |block, len| {
            state.used.add_range(block, len);
            state.metadata.add_range(block, len);
        });
    }
    for group in 0..geo.group_count {
        let desc = state.groups[group as usize];
        for (field, block, len) in places(geo, &desc) {
            state.metadata.add_range(block, len);
            let (old, first) = state.used.add_range(block, len);
            if old > 0 {
                let block = first;
                state.tell(Finding::GroupOverlap {
                    group,
                    field,
                    block,
                });
            }
        }
    }
    Some(())
}

fn places(geo: &Geometry, desc: &Group) -> [(&'static str, u64, u64); 3] {
    [
        ("bg_block_bitmap", desc.block_bitmap, 1),
        ("bg_inode_bitmap", desc.inode_bitmap, 1),
        ("bg_inode_table", desc.inode_table, geo.itable_blocks.into()),
    ]
}

fn is_inside(geo: &Geometry, group: u32, block: u64, len: u64) -> bool {
    if geo.incompat.contains(Incompat::FLEX_BG) {
        return geo.blocks_in_fs(block, len);
    }
    let first = geo.group_first_block(group);
    let end = first + u64::from(geo.group_blocks(group));
    block >= first && block.checked_add(len).is_some_and(|last| last <= end)
}

fn check_descriptor(geo: &Geometry, state: &mut State, group: u32, desc: &Group) {
    let (flags, unused) = (desc.flags.bits(), desc.unused);
    let has_csum = geo.group_desc_csum();
    if has_csum && desc.csum.0 != desc.csum.1 {
        let (found, want) = desc.csum;
        state.tell(Finding::GroupChecksum { group, found, want });
    }
    let uninit = GroupFlags::BLOCK_UNINIT | GroupFlags::INODE_UNINIT;
    if !has_csum && (desc.flags.intersects(uninit) || unused != 0) {
        state.tell(Finding::GroupUninit {
            group,
            flags,
            unused,
        });
    }
    if group == geo.group_count - 1 && desc.flags.contains(GroupFlags::BLOCK_UNINIT) {
        state.tell(Finding::GroupUninitLast { group, flags });
    }
    if has_csum && (unused > desc.free_inodes || unused > geo.inodes_per_group) {
        let free = desc.free_inodes;
        state.tell(Finding::GroupUnused {
            group,
            unused,
            free,
        });
    }
}

/// Calls `visit` with the blocks of superblock and descriptors that a group holds.
fn for_super_blocks(geo: &Geometry, group: u32, mut visit: impl FnMut(u64, u64)) {
    let first = geo.group_first_block(group);
    let has_super = geo.group_has_super(group);
    let meta_bg = geo.incompat.contains(Incompat::META_BG);
    if has_super {
        let old = if meta_bg {
            geo.first_meta_bg
        } else {
            geo.gdt_blocks() + u32::from(geo.reserved_gdt_blocks)
        };
        let is_old = !meta_bg || group / geo.desc_per_block < geo.first_meta_bg;
        visit(first, if is_old { 1 + u64::from(old) } else { 1 });
    }
    if meta_bg && group / geo.desc_per_block >= geo.first_meta_bg {
        // The first, second and last group of each block of descriptors hold a copy.
        let place = group % geo.desc_per_block;
        if place == 0 || place == 1 || place == geo.desc_per_block - 1 {
            visit(first + u64::from(has_super), 1);
        }
    }
}

/// Compares the bitmaps on the disk with what was found, and the counts with the bitmaps.
pub(super) fn check_bitmaps(cx: &Cx<'_>, state: &mut State) {
    let geo = cx.geo;
    let mut uninit = Bits::default();
    if geo.group_desc_csum() {
        uninit = metadata_of_uninit(geo, &state.groups);
    }
    let mut bytes = vec![0; cx.block_size()];
    let (mut free_blocks, mut free_inodes) = (0, 0);
    let (mut blocks, mut inodes) = (Runs::default(), Runs::default());
    for group in 0..geo.group_count {
        let desc = state.groups[group as usize];
        if load_block_bitmap(cx, state, group, &desc, &uninit, &mut bytes) {
            check_block_bitmap_block(cx, state, group, &desc, &bytes);
            let free = compare_blocks(geo, state, group, &bytes, &mut blocks);
            free_blocks += u64::from(free);
            if free != desc.free_blocks {
                let (found, want) = (desc.free_blocks, free);
                state.tell(Finding::GroupFreeBlocks { group, found, want });
            }
        }
        if load_inode_bitmap(cx, state, &desc, &mut bytes) {
            check_inode_bitmap_block(cx, state, group, &desc, &bytes);
            let (free, dirs) = compare_inodes(geo, state, group, &bytes, &mut inodes);
            free_inodes += free;
            if free != desc.free_inodes {
                let (found, want) = (desc.free_inodes, free);
                state.tell(Finding::GroupFreeInodes { group, found, want });
            }
            if dirs != desc.used_dirs {
                let (found, want) = (desc.used_dirs, dirs);
                state.tell(Finding::GroupUsedDirs { group, found, want });
            }
        }
    }
    blocks.end(&mut |run| state.tell(run.blocks()));
    inodes.end(&mut |run| state.tell(run.inodes()));
    superblock::check_counters(cx, state, free_blocks, free_inodes);
}

/// What the bitmap of a group without one says: the group's own metadata is in use.
fn metadata_of_uninit(geo: &Geometry, groups: &[Group]) -> Bits {
    let mut bits = Bits::default();
    let is_uninit = |desc: &Group| desc.flags.contains(GroupFlags::BLOCK_UNINIT);
    if !groups.iter().any(is_uninit) {
        return bits;
    }
    bits.reset(geo.blocks_count);
    for (group, desc) in (0..).zip(groups).filter(|(_, desc)| is_uninit(desc)) {
        for_super_blocks(geo, group, |block, len| {
            bits.add_range(block, len);
        });
        for (_, block, len) in places(geo, desc) {
            bits.add_range(block, len);
        }
    }
    bits
}

fn load_block_bitmap(
    cx: &Cx<'_>,
    state: &mut State,
    group: u32,
    desc: &Group,
    uninit: &Bits,
    bytes: &mut [u8],
) -> bool {
    let is_sound = desc.csum.0 == desc.csum.1;
    if !desc.lacks(cx.geo, GroupFlags::BLOCK_UNINIT) || !is_sound {
        return cx.read(state, desc.block_bitmap, bytes);
    }
    let first = cx.geo.group_first_block(group);
    for (index, out) in bytes.chunks_exact_mut(8).enumerate() {
        let word = uninit.word(first + index as u64 * 64);
        out.copy_from_slice(&word.to_le_bytes());
    }
    let count = cx.geo.group_blocks(group) as usize;
    bytes[count / 8..].fill(0);
    true
}

fn load_inode_bitmap(cx: &Cx<'_>, state: &mut State, desc: &Group, bytes: &mut [u8]) -> bool {
    let is_sound = desc.csum.0 == desc.csum.1;
    if !desc.lacks(cx.geo, GroupFlags::INODE_UNINIT) || !is_sound {
        return cx.read(state, desc.inode_bitmap, bytes);
    }
    bytes.fill(0);
    true
}

/// Checksum, and the bits past the end, which are all set.
fn check_block_bitmap_block(
    cx: &Cx<'_>,
    state: &mut State,
    group: u32,
    desc: &Group,
    bytes: &[u8],
) {
    let geo = cx.geo;
    if desc.lacks(geo, GroupFlags::BLOCK_UNINIT) {
        return;
    }
    let len = geo.blocks_per_group as usize / 8;
    if let Some((found, want)) = bad_sum(geo, desc.block_bitmap_csum, &bytes[..len]) {
        state.tell(Finding::BlockBitmapChecksum { group, found, want });
    }
    let end = geo.group_blocks(group) as usize;
    if !all_set(bytes, end) {
        state.tell(Finding::BlockBitmapEnd { group });
    }
}

fn check_inode_bitmap_block(
    cx: &Cx<'_>,
    state: &mut State,
    group: u32,
    desc: &Group,
    bytes: &[u8],
) {
    let geo = cx.geo;
    if desc.lacks(geo, GroupFlags::INODE_UNINIT) {
        return;
    }
    let len = geo.inodes_per_group as usize / 8;
    if let Some((found, want)) = bad_sum(geo, desc.inode_bitmap_csum, &bytes[..len]) {
        state.tell(Finding::InodeBitmapChecksum { group, found, want });
    }
    if !all_set(bytes, geo.inodes_per_group as usize) {
        state.tell(Finding::InodeBitmapEnd { group });
    }
}

fn bad_sum(geo: &Geometry, found: u32, bytes: &[u8]) -> Option<(u32, u32)> {
    if !geo.metadata_csum() {
        return None;
    }
    let mask = if geo.desc_size >= 64 { !0 } else { 0xffff };
    let want = crc32c(geo.csum_seed, bytes) & mask;
    (found != want).then_some((found, want))
}

fn all_set(bytes: &[u8], from: usize) -> bool {
    let Some((&first, rest)) = bytes[(from / 8).min(bytes.len())..].split_first() else {
        return true;
    };
    let low = (1u16 << (from % 8)) - 1;
    u16::from(first) | low == 0xff && rest.iter().all(|&byte| byte == 0xff)
}

/// A run of bits that say the same wrong thing.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Run {
    first: u64,
    last: u64,
    is_marked: bool,
}

impl Run {
    fn blocks(self) -> Finding {
        let (first, last) = (self.first, self.last);
        if self.is_marked {
            Finding::BlocksLeaked { first, last }
        } else {
            Finding::BlocksNotMarked { first, last }
        }
    }

    fn inodes(self) -> Finding {
        let (first, last) = (self.first as u32, self.last as u32);
        if self.is_marked {
            Finding::InodesLeaked { first, last }
        } else {
            Finding::InodesNotMarked { first, last }
        }
    }
}

/// Joins neighbours to runs.
#[derive(Default)]
struct Runs(Option<Run>);

impl Runs {
    fn add(&mut self, at: u64, is_marked: bool, tell: &mut dyn FnMut(Run)) {
        if let Some(run) = &mut self.0
            && run.last + 1 == at
            && run.is_marked == is_marked
        {
            run.last = at;
            return;
        }
        self.end(tell);
        self.0 = Some(Run {
            first: at,
            last: at,
            is_marked,
        });
    }

    fn end(&mut self, tell: &mut dyn FnMut(Run)) {
        if let Some(run) = self.0.take() {
            tell(run);
        }
    }
}

/// Walks the first `count` bits of a bitmap beside what was found; gives how many are free.
fn compare(
    bytes: &[u8],
    count: u32,
    actual: impl Fn(u64) -> u64,
    mut differ: impl FnMut(u64, bool),
) -> u32 {
    let mut free = 0;
    let count = u64::from(count);
    for (index, quad) in bytes.chunks(8).enumerate() {
        let at = index as u64 * 64;
        if at >= count {
            break;
        }
        let mut padded = [0; 8];
        padded[..quad.len()].copy_from_slice(quad);
        let mask = if count - at >= 64 {
            !0
        } else {
            (1 << (count - at)) - 1
        };
        let word = u64::from_le_bytes(padded) & mask;
        let mut wrong = word ^ (actual(at) & mask);
        free += (!word & mask).count_ones();
        while wrong != 0 {
            let bit = u64::from(wrong.trailing_zeros());
            differ(at + bit, word >> bit & 1 == 1);
            wrong &= wrong - 1;
        }
    }
    free
}

fn compare_blocks(
    geo: &Geometry,
    state: &mut State,
    group: u32,
    bytes: &[u8],
    runs: &mut Runs,
) -> u32 {
    let first = geo.group_first_block(group);
    let State { used, report, .. } = state;
    compare(
        bytes,
        geo.group_blocks(group),
        |at| used.word(first + at),
        |at, is_marked| runs.add(first + at, is_marked, &mut |run| report.push(run.blocks())),
    )
}

fn compare_inodes(
    geo: &Geometry,
    state: &mut State,
    group: u32,
    bytes: &[u8],
    runs: &mut Runs,
) -> (u32, u32) {
    let first = u64::from(group) * u64::from(geo.inodes_per_group) + 1;
    let State { inos, report, .. } = state;
    let in_use = |at| inos.used.word(first + at) | inos.orphans.word(first + at);
    let free = compare(bytes, geo.inodes_per_group, in_use, |at, is_marked| {
        runs.add(first + at, is_marked, &mut |run| report.push(run.inodes()))
    });
    // As e2fsck, only directories whose bit is set.
    let mut dirs = 0;
    compare(
        bytes,
        geo.inodes_per_group,
        |_| 0,
        |at, _| dirs += u32::from(inos.dirs.has(first + at)),
    );
    (free, dirs)
}
