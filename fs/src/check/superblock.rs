//! The superblock against the device, the clock and itself; its copies; the resize inode.

use std::time::{SystemTime, UNIX_EPOCH};

use zerocopy::FromBytes;

use super::source::{Blocks, Overlay, Source};
use super::{Cx, Finding, State, groups};
use crate::format::features::{
    Compat, INCOMPAT_SUPPORTED, Incompat, RO_COMPAT_SUPPORTED, RoCompat,
};
use crate::format::inode::RawInode;
use crate::format::superblock::{
    MAGIC, RawSuperblock, STATE_ERROR, STATE_VALID, SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE,
};
use crate::geometry::Geometry;

/// The inode that holds the blocks kept for more descriptors.
const RESIZE_INO: u32 = 7;
/// Its one block of pointers to pointers.
const DIND_BLOCK: usize = 13;

/// The longest group descriptor.
const MAX_DESC_SIZE: u16 = 1024;
/// Reserved inodes that hold something else.
const NOT_FOR_QUOTA: [u32; 8] = [1, 2, 5, 6, 7, 8, 9, 10];

/// Reads the superblock, from what a replay would write or else from the source.
pub(super) fn read(
    source: &dyn Source,
    overlay: &Overlay,
    state: &mut State,
) -> Option<RawSuperblock> {
    let mut bytes = [0; SUPERBLOCK_SIZE];
    if let Err(error) = source.read_at(SUPERBLOCK_OFFSET, &mut bytes) {
        state.tell(Finding::Read { block: 0, error });
        return None;
    }
    let raw = RawSuperblock::read_from_bytes(&bytes).ok()?;
    let log_size = raw.s_log_block_size.get();
    if raw.s_magic.get() == MAGIC && log_size <= 2 {
        let block_size = 1024usize << log_size;
        let blocks = Blocks {
            source,
            overlay,
            block_size,
        };
        let mut block = vec![0; block_size];
        let (number, at) = if log_size == 0 { (1, 0) } else { (0, 1024) };
        if blocks.read(number, &mut block).is_ok() {
            return RawSuperblock::read_from_bytes(&block[at..at + SUPERBLOCK_SIZE]).ok();
        }
    }
    Some(raw)
}

/// What the superblock says, where that can be and is supported.
pub(super) fn geometry(
    source: &dyn Source,
    raw: &RawSuperblock,
    state: &mut State,
) -> Option<Geometry> {
    let geo = match Geometry::new(raw) {
        Ok(geo) => geo,
        Err(error) => {
            state.tell(Finding::Superblock(error));
            return None;
        }
    };
    let incompat = (geo.incompat - INCOMPAT_SUPPORTED).bits();
    let ro_compat = (geo.ro_compat - RO_COMPAT_SUPPORTED).bits();
    if incompat | ro_compat != 0 {
        state.tell(Finding::NotSupported {
            incompat,
            ro_compat,
        });
        return None;
    }
    let have = source.size() >> geo.block_bits;
    if geo.blocks_count > have {
        let blocks = geo.blocks_count;
        state.tell(Finding::DeviceTooSmall { blocks, have });
        return None;
    }
    Some(geo)
}

/// Fields that the geometry does not need.
pub(super) fn check(cx: &Cx<'_>, state: &mut State) {
    let (raw, geo) = (cx.raw, cx.geo);
    let mut field = |field, value, want| {
        state.tell(Finding::SuperField { field, value, want });
    };
    if raw.reserved_blocks() > geo.blocks_count / 2 {
        let want = "at most half of s_blocks_count";
        field("s_r_blocks_count", raw.reserved_blocks(), want);
    }
    let desc_size = raw.s_desc_size.get();
    if desc_size > MAX_DESC_SIZE || (desc_size != 0 && !desc_size.is_power_of_two()) {
        field("s_desc_size", desc_size.into(), "a power of two up to 1024");
    }
    let unknown = geo.compat - Compat::all();
    if !unknown.is_empty() {
        let value = geo.compat.bits().into();
        field("s_feature_compat", value, "no unknown feature");
    }
    let ipg_max =
        (geo.blocks_per_group - 4).saturating_mul(geo.block_size / u32::from(geo.inode_size));
    if geo.inodes_per_group > ipg_max {
        let want = "no more than a group has room for";
        field("s_inodes_per_group", geo.inodes_per_group.into(), want);
    }
    if raw.s_rev_level.get() > 0 && geo.first_ino > geo.inodes_count {
        field("s_first_ino", geo.first_ino.into(), "an inode number");
    }
    if geo.inode_size > 128 {
        let room = geo.inode_size - 128;
        for (name, value) in [
            ("s_min_extra_isize", raw.s_min_extra_isize.get()),
            ("s_want_extra_isize", raw.s_want_extra_isize.get()),
        ] {
            if value != 0 && (value < 4 || value > room || value % 4 != 0) {
                field(name, value.into(), "a multiple of 4 that fits the inode");
            }
        }
    }
    let resize = geo.compat.contains(Compat::RESIZE_INODE);
    if !resize && geo.reserved_gdt_blocks != 0 {
        let value = geo.reserved_gdt_blocks.into();
        field("s_reserved_gdt_blocks", value, "0 without resize_inode");
    }
    for (name, inum) in [
        ("s_usr_quota_inum", raw.s_usr_quota_inum),
        ("s_grp_quota_inum", raw.s_grp_quota_inum),
        ("s_prj_quota_inum", raw.s_prj_quota_inum),
    ] {
        let ino = inum.get();
        if NOT_FOR_QUOTA.contains(&ino) || ino > geo.inodes_count {
            field(name, ino.into(), "an inode that may hold a quota");
        }
    }
    check_features(cx, state);
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |now| now.as_secs()) as u32;
    for (field, value) in [("s_mtime", raw.s_mtime), ("s_wtime", raw.s_wtime)] {
        if value.get() > now {
            let value = value.get();
            state.tell(Finding::FutureTime { field, value });
        }
    }
    if raw.s_state.get() & STATE_ERROR != 0 {
        let state_field = raw.s_state.get();
        state.tell(Finding::ErrorState { state: state_field });
    }
}

fn check_features(cx: &Cx<'_>, state: &mut State) {
    let geo = cx.geo;
    let mut tell = |what| state.tell(Finding::Features { what });
    if geo.metadata_csum() && geo.ro_compat.contains(RoCompat::GDT_CSUM) {
        tell("metadata_csum and uninit_bg at once");
    }
    if !geo.metadata_csum() && geo.incompat.contains(Incompat::CSUM_SEED) {
        tell("metadata_csum_seed without metadata_csum");
    }
    if geo.incompat.contains(Incompat::BIT64) && !geo.has_extents() {
        tell("64bit without extents");
    }
    let has_resize = geo.compat.contains(Compat::RESIZE_INODE);
    if has_resize && geo.incompat.contains(Incompat::META_BG) {
        state.tell(Finding::ResizeInode {
            what: "the features resize_inode and meta_bg at once",
        });
    }
}

/// The copies of the superblock; what the kernel sets in the first one only is left out, as in
/// e2fsck, which writes them anew without a word.
pub(super) fn check_copies(cx: &Cx<'_>, state: &mut State) {
    let geo = cx.geo;
    let mut block = vec![0; cx.block_size()];
    for group in (1..geo.group_count).filter(|&group| geo.group_has_super(group)) {
        if !cx.read(state, geo.group_first_block(group), &mut block) {
            continue;
        }
        let Ok((copy, _)) = RawSuperblock::read_from_prefix(&block) else {
            continue;
        };
        if let Some(field) = differs(cx.raw, &copy) {
            state.tell(Finding::BackupSuper { group, field });
        }
    }
}

fn differs(raw: &RawSuperblock, copy: &RawSuperblock) -> Option<&'static str> {
    let ro_compat = RoCompat::LARGE_FILE | RoCompat::DIR_NLINK | RoCompat::ORPHAN_PRESENT;
    let incompat = Incompat::EXTENTS | Incompat::RECOVER;
    let compat = Compat::EXT_ATTR;
    let pairs = [
        ("s_magic", raw.s_magic == copy.s_magic),
        (
            "s_feature_compat",
            raw.compat() - compat == copy.compat() - compat,
        ),
        (
            "s_feature_incompat",
            raw.incompat() - incompat == copy.incompat() - incompat,
        ),
        (
            "s_feature_ro_compat",
            raw.ro_compat() - ro_compat == copy.ro_compat() - ro_compat,
        ),
        ("s_blocks_count", raw.blocks_count() == copy.blocks_count()),
        ("s_inodes_count", raw.s_inodes_count == copy.s_inodes_count),
        ("s_uuid", raw.s_uuid == copy.s_uuid),
    ];
    let differs = pairs.into_iter().find(|(_, is_same)| !is_same);
    differs.map(|(field, _)| field)
}

/// The blocks kept for more descriptors hang on inode 7: each in the first group, and in it the
/// numbers of its copies.
pub(super) fn check_resize_inode(cx: &Cx<'_>, state: &mut State) {
    let mut bytes = vec![0; usize::from(cx.geo.inode_size)];
    if !groups::read_inode(cx, state, RESIZE_INO, &mut bytes) {
        return;
    }
    let Ok((raw, _)) = RawInode::read_from_prefix(&bytes) else {
        return;
    };
    let pointers: Vec<u32> = words(&raw.i_block).collect();
    let mut tell = |what| state.tell(Finding::ResizeInode { what });
    if !cx.geo.compat.contains(Compat::RESIZE_INODE) {
        if pointers.iter().any(|&pblk| pblk != 0) {
            tell("it has blocks without the feature resize_inode");
        }
        return;
    }
    let others = pointers.iter().enumerate();
    let has_others = others.filter(|it| it.0 != DIND_BLOCK).any(|it| *it.1 != 0);
    let dind = u64::from(pointers[DIND_BLOCK]);
    if has_others || raw.i_links_count.get() == 0 || raw.i_mode.get() & 0x8000 == 0 {
        tell("not a file of one block of pointers to pointers");
        return;
    }
    if dind == 0 || !cx.holds(dind, 1) {
        tell("i_block[13] lies outside the file system");
        return;
    }
    check_resize_blocks(cx, state, dind);
}

fn check_resize_blocks(cx: &Cx<'_>, state: &mut State, dind: u64) {
    let geo = cx.geo;
    let (mut dind_block, mut block) = (vec![0; cx.block_size()], vec![0; cx.block_size()]);
    if !cx.read(state, dind, &mut dind_block) {
        return;
    }
    let dind: Vec<u32> = words(&dind_block).collect();
    let first = geo.superblock_at().0 + 1 + u64::from(geo.gdt_blocks());
    let per_block = geo.block_size / 4;
    // As e2fsck, a quarter of them.
    for index in 0..u32::from(geo.reserved_gdt_blocks) / 4 {
        let at = (geo.gdt_blocks() + index) % per_block;
        let pblk = first + u64::from(index);
        let found = dind.get(at as usize).copied().unwrap_or(0);
        if u64::from(found) != pblk || !cx.holds(pblk, 1) {
            let what = "a pointer does not lead to its block of descriptors";
            state.tell(Finding::ResizeInode { what });
            return;
        }
        if !cx.read(state, pblk, &mut block) {
            return;
        }
        let mut found = words(&block);
        for group in (1..geo.group_count).filter(|&group| geo.group_has_super(group)) {
            let want = pblk + u64::from(group) * u64::from(geo.blocks_per_group);
            if found.next().map(u64::from) != Some(want) {
                let what = "a pointer does not lead to a copy of its block";
                state.tell(Finding::ResizeInode { what });
                return;
            }
        }
    }
}

/// The words of a block of pointers.
pub(super) fn words(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    let quads = bytes.chunks_exact(4);
    quads.map(|quad| u32::from_le_bytes([quad[0], quad[1], quad[2], quad[3]]))
}

/// Counters that e2fsck tells of, but does not take for a fault.
pub(super) fn check_counters(cx: &Cx<'_>, state: &mut State, blocks: u64, inodes: u32) {
    let is_left = cx.raw.s_state.get() & STATE_VALID != 0;
    let is_mounted = !is_left || cx.geo.incompat.contains(Incompat::RECOVER);
    let found = cx.raw.free_blocks();
    if found != blocks {
        state.tell(Finding::FreeBlocks {
            found,
            want: blocks,
            is_mounted,
        });
    }
    let found = cx.raw.s_free_inodes_count.get();
    if found != inodes {
        state.tell(Finding::FreeInodes {
            found,
            want: inodes,
            is_mounted,
        });
    }
}
