//! Reserving, committing and freeing blocks.

use std::sync::atomic::Ordering;

use bufio::no_check;

use super::group::{Group, base_metadata, bitmap_csum, part_in};
use super::view::{FreeMap, Span};
use super::{Alloc, BlockUse, Privilege, Run, bits};
use crate::error::{FsError, FsResult};
use crate::format::extent::Bounds;
use crate::format::group::GroupFlags;
use crate::format::inode::InodeData;
use crate::inode::extent_tree::{self, Nodes};
use crate::inode::map;
use crate::journal::{Class, Handle};

/// Groups whose bitmaps one search for a long run reads from disk at most.
const MAX_LOADS: u32 = 16;
/// Groups one search for a long run looks at at most.
const MAX_GROUPS: u32 = 2048;

impl Alloc {
    /// Takes `min..=want` blocks near `goal`, in memory only.
    ///
    /// The run begins at `goal` where a fair part of it is free there, so that a file that grows
    /// stays in one piece; else the first run of `want` blocks behind it in its group, in the
    /// groups after, and the longest run found where there is none.
    ///
    /// # Errors
    /// [`FsError::NoSpace`] if fewer than `min` blocks are free for this caller, or no run of
    /// `min`; an I/O error where bitmaps cannot be read.
    pub fn reserve(&self, goal: u64, want: u32, min: u32, who: Privilege) -> FsResult<Run> {
        let floor = match who {
            _ if self.is_open.load(Ordering::Relaxed) => 0,
            Privilege::User => self.reserved + self.spare,
            Privilege::Root => self.spare,
        };
        self.reserve_above(goal, want, min, floor)
    }

    fn reserve_above(&self, goal: u64, want: u32, min: u32, floor: i64) -> FsResult<Run> {
        let min = min.max(1);
        let most = i64::from(want.max(min));
        let claim = |free: i64| Some((free - floor).min(most)).filter(|n| *n >= i64::from(min));
        let taken = self
            .free
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |free| {
                claim(free).map(|n| free - n)
            });
        let claimed = match taken {
            Ok(before) => claim(before).unwrap_or(0),
            Err(_too_few) => return Err(FsError::NoSpace),
        };
        // What was claimed is somewhere, but another thread may take from a group just passed by
        // and give back to another: look again.
        let mut found = Ok(None);
        for _ in 0..3 {
            found = self.pick(goal, u32::try_from(claimed).unwrap_or(min), min);
            if !matches!(found, Ok(None)) {
                break;
            }
        }
        let used = match found {
            Ok(Some(run)) => i64::from(run.len),
            _ => 0,
        };
        if used < claimed {
            self.free.fetch_add(claimed - used, Ordering::AcqRel);
        }
        found?.ok_or(FsError::NoSpace)
    }

    fn pick(&self, goal: u64, want: u32, min: u32) -> FsResult<Option<Run>> {
        let geo = &self.core.geo;
        let (first, near) = if geo.blocks_in_fs(goal, 1) {
            geo.group_of_block(goal)
        } else {
            (0, 0)
        };
        // A quarter of what is wanted, right behind the last block, is better than all of it
        // elsewhere: the file goes on there in one extent.
        let here = |map: &mut FreeMap| {
            let len = map.run_at(near, want);
            if len >= min && len >= want / 4 {
                return Some(Span { start: near, len });
            }
            map.find(near, want).filter(|s| s.len >= want)
        };
        let mut loads = 0;
        if let Some(run) = self.try_group(first, &mut loads, here)? {
            return Ok(Some(run));
        }
        let mut best: Option<(u32, u32)> = None;
        let groups = geo.group_count;
        for i in 0..groups.min(MAX_GROUPS) {
            let g = (first + i) % groups;
            let group = self.group(g)?;
            let largest = group.largest.load(Ordering::Relaxed);
            if largest > best.map_or(0, |b| b.1) {
                best = Some((g, largest));
            }
            if i == 0 || largest < want || loads >= MAX_LOADS {
                continue;
            }
            let exact = |map: &mut FreeMap| map.find(0, want).filter(|s| s.len >= want);
            if let Some(run) = self.try_group(g, &mut loads, exact)? {
                return Ok(Some(run));
            }
        }
        let any = |near| move |map: &mut FreeMap| map.find(near, want).filter(|s| s.len >= min);
        if let Some((g, _)) = best {
            let near = if g == first { near } else { 0 };
            if let Some(run) = self.try_group(g, &mut loads, any(near))? {
                return Ok(Some(run));
            }
        }
        for i in 0..groups {
            let g = (first + i) % groups;
            if self.group(g)?.largest.load(Ordering::Relaxed) < min {
                continue;
            }
            let near = if g == first { near } else { 0 };
            if let Some(run) = self.try_group(g, &mut loads, any(near))? {
                return Ok(Some(run));
            }
        }
        Ok(None)
    }

    /// Takes what `choose` finds in a group.
    fn try_group(
        &self,
        g: u32,
        loads: &mut u32,
        choose: impl FnOnce(&mut FreeMap) -> Option<Span>,
    ) -> FsResult<Option<Run>> {
        let group = self.group(g)?;
        if group.free_blocks.load(Ordering::Relaxed) == 0 {
            return Ok(None);
        }
        let mut view = group.blocks.lock();
        if view.is_none() {
            drop(view);
            *loads += 1;
            match self.load_blocks(g) {
                // Noted; the group is out of use, others may do.
                Err(FsError::Corrupt { .. }) => return Ok(None),
                other => other?,
            }
            view = group.blocks.lock();
        }
        let Some(map) = view.as_mut() else {
            return Ok(None);
        };
        let span = choose(map).filter(|s| map.take(*s));
        group.publish_blocks(map);
        let first = self.core.geo.group_first_block(g);
        Ok(span.map(|s| Run {
            start: first + u64::from(s.start),
            len: s.len,
        }))
    }

    /// Gives back a reservation (or a part of one) that never reached the disk.
    pub fn unreserve(&self, run: Run) {
        let given = self.give_back(run.start, run.len);
        self.free.fetch_add(given, Ordering::AcqRel);
    }

    /// Called when the transaction that freed the blocks is committed.
    pub(super) fn blocks_committed(&self, start: u64, len: u32) {
        let given = self.give_back(start, len);
        self.free.fetch_add(given, Ordering::AcqRel);
        self.pending.fetch_sub(i64::from(len), Ordering::AcqRel);
    }

    /// Puts blocks back into the views; never waits.
    fn give_back(&self, start: u64, len: u32) -> i64 {
        let mut given = 0;
        for (g, span) in self.pieces(start, len) {
            let Ok(group) = self.group(g) else { continue };
            let mut view = group.blocks.lock();
            // A group out of use has no view and gets none.
            let Some(map) = view.as_mut() else { continue };
            if map.give(span) {
                given += i64::from(span.len);
            } else {
                log::error!("group {g}: blocks {span:?} given back were free");
            }
            group.publish_blocks(map);
        }
        given
    }

    /// Marks reserved blocks as used on disk. Credits: [`Self::run_credits`].
    ///
    /// # Errors
    /// [`FsError::Corrupt`] where the bitmap on disk has one as used.
    pub fn commit_run(&self, h: &Handle, run: Run) -> FsResult {
        for (g, span) in self.pieces(run.start, run.len) {
            let group = self.group(g)?;
            let _disk = group.disk.lock();
            self.init_block_bitmap(h, g, group)?;
            let buffer = self.core.bufs.read(group.block_bitmap, no_check())?;
            let csum = {
                let mut data = h.write_class(&buffer, Class::Bitmaps)?;
                if bits::all_clear(&data, span.start, span.len) {
                    bits::set(&mut data, span.start, span.len);
                    Some(bitmap_csum(
                        &self.core.geo,
                        self.core.geo.blocks_per_group,
                        &data,
                    ))
                } else {
                    None
                }
            };
            let Some(csum) = csum else {
                let what = "block bitmap: a free block is marked used";
                return Err(self.core.corrupt(what, group.block_bitmap, 0));
            };
            self.change_desc(h, g, |desc| {
                desc.free_blocks = desc.free_blocks.saturating_sub(span.len);
                desc.block_csum = csum;
            })?;
        }
        Ok(())
    }

    /// Takes one block for metadata, in memory and on disk; reserved blocks serve too.
    ///
    /// # Errors
    /// [`FsError::NoSpace`]; those of [`Self::commit_run`].
    pub fn alloc_meta(&self, h: &Handle, goal: u64) -> FsResult<u64> {
        let run = self.reserve_above(goal, 1, 1, 0)?;
        match self.commit_run(h, run) {
            Ok(()) => Ok(run.start),
            Err(error) => {
                self.unreserve(run);
                Err(error)
            }
        }
    }

    /// Frees blocks on disk; they are not handed out before the transaction is committed.
    /// Metadata is revoked and its buffers dropped. Credits: [`Self::run_credits`].
    ///
    /// # Errors
    /// [`FsError::Corrupt`] for blocks outside, free already, or the file system's own.
    pub fn free(&self, h: &Handle, pblk: u64, len: u32, what: BlockUse) -> FsResult {
        let geo = &self.core.geo;
        if len == 0 {
            return Ok(());
        }
        if !geo.blocks_in_fs(pblk, len.into()) {
            return Err(self
                .core
                .corrupt("freed block: outside the filesystem", pblk, 0));
        }
        for (g, span) in self.pieces(pblk, len) {
            let group = self.group(g)?;
            let _disk = group.disk.lock();
            // The view must not take these blocks for free when it is made later on.
            self.load_blocks_locked(g, group)?;
            if group.bad_blocks.load(Ordering::Relaxed) {
                return Err(self
                    .core
                    .corrupt("group: blocks freed in a damaged one", pblk, 0));
            }
            let uninit = group.block_uninit.load(Ordering::Relaxed);
            if uninit || overlaps(group.own.get().map(|own| &**own), span) {
                return Err(self
                    .core
                    .corrupt("freed block: the filesystem's own", pblk, 0));
            }
            let buffer = self.core.bufs.read(group.block_bitmap, no_check())?;
            let csum = {
                let mut data = h.write_class(&buffer, Class::Bitmaps)?;
                if bits::all_set(&data, span.start, span.len) {
                    bits::clear(&mut data, span.start, span.len);
                    Some(bitmap_csum(geo, geo.blocks_per_group, &data))
                } else {
                    None
                }
            };
            let Some(csum) = csum else {
                return Err(self.core.corrupt("freed block: free already", pblk, 0));
            };
            self.change_desc(h, g, |desc| {
                desc.free_blocks += span.len;
                desc.block_csum = csum;
            })?;
            let start = geo.group_first_block(g) + u64::from(span.start);
            self.pending
                .fetch_add(i64::from(span.len), Ordering::AcqRel);
            if what == BlockUse::Metadata {
                for block in start..start + u64::from(span.len) {
                    h.forget(block)?;
                }
            }
            h.free_after_commit(start, span.len);
        }
        Ok(())
    }

    /// Credits for committing or freeing a run of `len` blocks: bitmap and descriptor of each
    /// group it touches.
    #[must_use]
    pub fn run_credits(&self, len: u32) -> u32 {
        2 * (len / self.core.geo.blocks_per_group + 2)
    }

    /// Where a block of a file had best be: behind the block before it, else near the inode.
    #[must_use]
    pub fn goal_for(&self, ino: u32, data: &InodeData, lblk: u32) -> u64 {
        let geo = &self.core.geo;
        let near = if data.has_extents() {
            extent_tree::before(&Cached(self), &data.block, lblk)
                .ok()
                .flatten()
                .and_then(|e| {
                    // Leaves room for the blocks between, if that stays in the group.
                    let goal = e.pblk + u64::from(lblk.saturating_sub(e.lblk));
                    let same = geo.blocks_in_fs(goal, 1)
                        && geo.blocks_in_fs(e.pblk, 1)
                        && geo.group_of_block(goal).0 == geo.group_of_block(e.pblk).0;
                    let behind = e.pblk + u64::from(e.len);
                    Some(if same { goal } else { behind }).filter(|g| geo.blocks_in_fs(*g, 1))
                })
        } else {
            crate::inode::block_map::before(&Cached(self), &data.block, lblk, geo.block_size / 4)
                .ok()
                .flatten()
                .filter(|g| geo.blocks_in_fs(*g, 1))
        };
        near.unwrap_or_else(|| self.inode_goal(ino, data))
    }

    /// First block of the group that a file's first block should be in.
    fn inode_goal(&self, ino: u32, data: &InodeData) -> u64 {
        let geo = &self.core.geo;
        let (mut g, _) = geo.group_of_ino(ino.clamp(1, geo.inodes_count));
        let flex = self.flex_size();
        if flex >= 4 {
            // The first group of a flex group is for directories and its metadata.
            g = g / flex * flex;
            if data.is_file() && g + 1 < geo.group_count {
                g += 1;
            }
        }
        geo.group_first_block(g)
    }

    /// Splits a run at the borders of groups; nothing for blocks outside the file system.
    pub(super) fn pieces(&self, start: u64, len: u32) -> impl Iterator<Item = (u32, Span)> + '_ {
        let geo = &self.core.geo;
        let end = start + u64::from(len);
        let mut pos = start;
        std::iter::from_fn(move || {
            if pos >= end || !geo.blocks_in_fs(pos, 1) {
                return None;
            }
            let (g, at) = geo.group_of_block(pos);
            let room = geo.group_blocks(g).saturating_sub(at);
            let n = u64::from(room).min(end - pos) as u32;
            pos += u64::from(n.max(1));
            Some((g, Span { start: at, len: n })).filter(|_| n > 0)
        })
    }

    /// Calls `f` with the blocks of group `g` that are the file system's own.
    ///
    /// Looks at the groups of its flex group, whose bitmaps and tables may stand here.
    fn own_blocks(&self, g: u32, mut f: impl FnMut(Span)) -> FsResult {
        let geo = &self.core.geo;
        base_metadata(geo, g, &mut f);
        let flex = self.flex_size();
        let first = g / flex * flex;
        for mate in first..(first + flex).min(geo.group_count) {
            let desc = self.desc(mate)?;
            part_in(geo, g, desc.block_bitmap, 1, &mut f);
            part_in(geo, g, desc.inode_bitmap, 1, &mut f);
            part_in(geo, g, desc.inode_table, geo.itable_blocks, &mut f);
        }
        Ok(())
    }

    /// Makes sure that a group has its view of blocks.
    pub(super) fn load_blocks(&self, g: u32) -> FsResult {
        let group = self.group(g)?;
        let _disk = group.disk.lock();
        self.load_blocks_locked(g, group)
    }

    /// As [`Self::load_blocks`]; the caller holds the group's disk lock.
    fn load_blocks_locked(&self, g: u32, group: &Group) -> FsResult {
        if group.blocks.lock().is_some() || group.bad_blocks.load(Ordering::Relaxed) {
            return Ok(());
        }
        match self.read_view(g, group) {
            Ok(map) => {
                let mut view = group.blocks.lock();
                group.publish_blocks(&map);
                *view = Some(map);
                Ok(())
            }
            Err(error) => {
                if matches!(error, FsError::Corrupt { .. }) {
                    group.bad_blocks.store(true, Ordering::Relaxed);
                    let lost = group.free_blocks.swap(0, Ordering::Relaxed);
                    group.largest.store(0, Ordering::Relaxed);
                    self.free.fetch_sub(lost.into(), Ordering::AcqRel);
                }
                Err(error)
            }
        }
    }

    /// Derives the view from what the disk (or the running transaction) has.
    fn read_view(&self, g: u32, group: &Group) -> FsResult<FreeMap> {
        let geo = &self.core.geo;
        let desc = self.desc(g)?;
        let mut map = if self.uninit(&desc, GroupFlags::BLOCK_UNINIT) {
            FreeMap::from_used(&self.fresh_bitmap(g)?, geo.group_blocks(g))
        } else {
            let buffer = self.core.bufs.read(desc.block_bitmap, no_check())?;
            let data = buffer.data();
            if geo.metadata_csum()
                && bitmap_csum(geo, geo.blocks_per_group, &data)
                    != csum_of(geo.desc_size, desc.block_csum)
            {
                return Err(self
                    .core
                    .corrupt("block bitmap: checksum", desc.block_bitmap, 0));
            }
            FreeMap::from_used(&data, geo.group_blocks(g))
        };
        let mut own = Vec::new();
        self.own_blocks(g, |span| own.push(span))?;
        let lied: u32 = own.iter().map(|span| map.exclude(*span)).sum();
        group.own.get_or_init(|| own.into());
        if lied > 0 {
            let what = "block bitmap: metadata marked free";
            return Err(self.core.corrupt(what, desc.block_bitmap, 0));
        }
        if map.free() != desc.free_blocks {
            log::error!(
                "group {g}: {} free blocks, {} in the bitmap",
                desc.free_blocks,
                map.free()
            );
            let what = "group descriptor: bg_free_blocks_count";
            return Err(self.core.corrupt(what, geo.group_desc_at(g).0, 0));
        }
        Ok(map)
    }

    /// The bitmap of a group in which nothing but metadata is used.
    fn fresh_bitmap(&self, g: u32) -> FsResult<Vec<u8>> {
        let geo = &self.core.geo;
        let mut bitmap = vec![0u8; geo.block_size as usize];
        self.own_blocks(g, |span| bits::set(&mut bitmap, span.start, span.len))?;
        let blocks = geo.group_blocks(g);
        bits::set(&mut bitmap, blocks, geo.block_size * 8 - blocks);
        Ok(bitmap)
    }

    /// Writes the bitmap of a group that has none yet; the caller holds the group's disk lock.
    pub(super) fn init_block_bitmap(&self, h: &Handle, g: u32, group: &Group) -> FsResult {
        if !group.block_uninit.load(Ordering::Relaxed) {
            return Ok(());
        }
        let bitmap = self.fresh_bitmap(g)?;
        let buffer = h.create(group.block_bitmap, no_check())?;
        {
            let mut data = h.write_class(&buffer, Class::Bitmaps)?;
            data.copy_from_slice(&bitmap);
        }
        self.change_desc(h, g, |desc| {
            desc.flags.remove(GroupFlags::BLOCK_UNINIT);
            desc.seal_blocks(&self.core.geo, &bitmap);
        })?;
        group.block_uninit.store(false, Ordering::Relaxed);
        Ok(())
    }
}

pub(super) fn overlaps(own: Option<&[Span]>, span: Span) -> bool {
    let hits = |own: &Span| own.start < span.start + span.len && span.start < own.start + own.len;
    own.is_none_or(|all| all.iter().any(hits))
}

/// A checksum as far as a descriptor of this size holds it.
pub(super) fn csum_of(desc_size: u16, csum: u32) -> u32 {
    if desc_size >= 64 { csum } else { csum & 0xffff }
}

/// Nodes of any file, as far as they are cached: enough for a hint.
struct Cached<'a>(&'a Alloc);

impl Nodes for Cached<'_> {
    type Error = ();
    fn bounds(&self) -> Bounds {
        map::bounds(&self.0.core.geo)
    }
    fn corrupt(&self, _: &'static str, _: u64) {}
    fn read<R>(&self, block: u64, look: impl FnOnce(&[u8]) -> R) -> Result<R, ()> {
        let buffer = self.0.core.bufs.get(block).ok_or(())?;
        let data = buffer.data();
        Ok(look(&data))
    }
}
