//! Taking and freeing inodes.
//!
//! An inode freed in a transaction is not taken again before that transaction is committed: a
//! crash must not find the new file's inode under the old file's name, nor a revoked orphan.

use std::sync::atomic::Ordering;

use bufio::no_check;

use super::blocks::csum_of;
use super::group::{Group, bitmap_csum};
use super::view::{FreeMap, Span};
use super::{Alloc, InodeUse, bits};
use crate::error::{FsError, FsResult};
use crate::format::group::GroupFlags;
use crate::journal::{Class, Handle};

/// Credits for taking an inode: inode bitmap, block bitmap, descriptor, two blocks of the table.
pub const INODE_CREDITS: u32 = 5;
/// Flex groups looked at for a directory at most.
const MAX_SCAN: u32 = 256;

/// Sums over a flex group.
struct FlexStats {
    free_inodes: u64,
    free_blocks: u64,
    dirs: u64,
}

impl Alloc {
    /// Takes an inode near inode `parent`. What the inode's bytes on disk were is undefined: the
    /// caller writes all of them. Credits: [`INODE_CREDITS`].
    ///
    /// Files go into the directory's group. Directories of the root are spread over the flex
    /// groups, others stay near their parent while that is not crowded.
    ///
    /// # Errors
    /// [`FsError::NoSpace`] without a free inode; [`FsError::Corrupt`].
    pub fn alloc_inode(&self, h: &Handle, parent: u32, what: InodeUse) -> FsResult<u32> {
        let geo = &self.core.geo;
        let (home, _) = geo.group_of_ino(parent.clamp(1, geo.inodes_count));
        if self.free_inodes.load(Ordering::Relaxed) <= 0 {
            return Err(FsError::NoSpace);
        }
        let start = match what {
            InodeUse::Other => home,
            InodeUse::Directory { top } => self.directory_group(home, top)?,
        };
        let flex = self.flex_size();
        let first = start / flex * flex;
        let groups = geo.group_count;
        // The group itself, its flex group, groups ever farther away, all.
        let mates = (0..flex).map(|i| first + (start - first + i) % flex);
        let steps = (0..31).map(|i| (u64::from(start) + (1u64 << i)) % u64::from(groups));
        let steps = steps
            .take(32 - groups.leading_zeros() as usize)
            .map(|g| g as u32);
        let all =
            (0..groups).map(|i| ((u64::from(start) + u64::from(i)) % u64::from(groups)) as u32);
        for g in mates.chain(steps).chain(all).filter(|g| *g < groups) {
            if let Some(ino) = self.inode_in(h, g, what)? {
                return Ok(ino);
            }
        }
        Err(FsError::NoSpace)
    }

    fn inode_in(&self, h: &Handle, g: u32, what: InodeUse) -> FsResult<Option<u32>> {
        let group = self.group(g)?;
        if group.free_inodes.load(Ordering::Relaxed) == 0 {
            return Ok(None);
        }
        match self.load_inodes(g, group) {
            Err(FsError::Corrupt { .. }) => return Ok(None),
            other => other?,
        }
        let at = {
            let mut view = group.inodes.lock();
            let Some(map) = view.as_mut() else {
                return Ok(None);
            };
            let at = map
                .first(0)
                .filter(|at| map.take(Span { start: *at, len: 1 }));
            group.publish_inodes(map);
            at
        };
        let Some(at) = at else { return Ok(None) };
        if let Err(error) = self.mark_inode(h, g, group, at, what) {
            self.inode_back(g, at);
            return Err(error);
        }
        self.free_inodes.fetch_sub(1, Ordering::Relaxed);
        if matches!(what, InodeUse::Directory { .. }) {
            group.used_dirs.fetch_add(1, Ordering::Relaxed);
            self.dirs.fetch_add(1, Ordering::Relaxed);
        }
        Ok(Some(g * self.core.geo.inodes_per_group + at + 1))
    }

    /// Sets an inode's bit on disk, and begins the part of the table it lies in.
    pub(super) fn mark_inode(
        &self,
        h: &Handle,
        g: u32,
        group: &Group,
        at: u32,
        what: InodeUse,
    ) -> FsResult {
        let geo = &self.core.geo;
        let _disk = group.disk.lock();
        // A group with inodes in use must have both bitmaps, or e2fsck complains.
        self.init_block_bitmap(h, g, group)?;
        let desc = self.desc(g)?;
        let buffer = if self.uninit(&desc, GroupFlags::INODE_UNINIT) {
            let buffer = h.create(desc.inode_bitmap, no_check())?;
            let mut data = h.write_class(&buffer, Class::Bitmaps)?;
            bits::set(
                &mut data,
                geo.inodes_per_group,
                geo.block_size * 8 - geo.inodes_per_group,
            );
            drop(data);
            buffer
        } else {
            self.core.bufs.read(desc.inode_bitmap, no_check())?
        };
        // Inodes behind those begun were never written: what the disk has there may be old files.
        let begun = desc.inodes_begun(geo);
        if at >= begun {
            let per_block = geo.block_size / u32::from(geo.inode_size);
            for block in begun.div_ceil(per_block)..=at / per_block {
                h.create(desc.inode_table + u64::from(block), no_check())?;
            }
        }
        let csum = {
            let mut data = h.write_class(&buffer, Class::Bitmaps)?;
            if bits::all_clear(&data, at, 1) {
                bits::set(&mut data, at, 1);
                Some(bitmap_csum(geo, geo.inodes_per_group, &data))
            } else {
                None
            }
        };
        let Some(csum) = csum else {
            let what = "inode bitmap: a free inode is marked used";
            return Err(self.core.corrupt(what, desc.inode_bitmap, 0));
        };
        self.change_desc(h, g, |desc| {
            desc.free_inodes = desc.free_inodes.saturating_sub(1);
            desc.used_dirs += u32::from(matches!(what, InodeUse::Directory { .. }));
            desc.inode_csum = csum;
            desc.flags.remove(GroupFlags::INODE_UNINIT);
            if geo.group_desc_csum() {
                desc.itable_unused = geo.inodes_per_group - begun.max(at + 1);
            }
        })
    }

    /// Whether an inode is taken, as its bitmap says. For numbers that come from outside: none of
    /// them is a sign of damage.
    ///
    /// # Errors
    /// A descriptor or bitmap that cannot be read.
    pub fn is_inode_taken(&self, ino: u32) -> FsResult<bool> {
        let geo = &self.core.geo;
        if ino == 0 || ino > geo.inodes_count {
            return Ok(false);
        }
        let (g, at) = geo.group_of_ino(ino);
        let desc = self.desc(g)?;
        if at >= desc.inodes_begun(geo) {
            return Ok(false);
        }
        let buffer = self.core.bufs.read(desc.inode_bitmap, no_check())?;
        let data = buffer.data();
        Ok(!bits::all_clear(&data, at, 1))
    }

    /// Frees an inode; it is not taken again before the transaction is committed.
    ///
    /// # Errors
    /// [`FsError::Corrupt`] for a reserved inode, or one that is free.
    pub fn free_inode(&self, h: &Handle, ino: u32, what: InodeUse) -> FsResult {
        let geo = &self.core.geo;
        if ino < geo.first_ino || ino > geo.inodes_count {
            return Err(self
                .core
                .corrupt("freed inode: reserved or outside", 0, ino));
        }
        let (g, at) = geo.group_of_ino(ino);
        let group = self.group(g)?;
        self.load_inodes(g, group)?;
        if group.bad_inodes.load(Ordering::Relaxed) {
            return Err(self
                .core
                .corrupt("group: inode freed in a damaged one", 0, ino));
        }
        let dir = matches!(what, InodeUse::Directory { .. });
        {
            let _disk = group.disk.lock();
            let desc = self.desc(g)?;
            let buffer = self.core.bufs.read(desc.inode_bitmap, no_check())?;
            let csum = {
                let mut data = h.write_class(&buffer, Class::Bitmaps)?;
                if bits::all_set(&data, at, 1) {
                    bits::clear(&mut data, at, 1);
                    Some(bitmap_csum(geo, geo.inodes_per_group, &data))
                } else {
                    None
                }
            };
            let Some(csum) = csum else {
                return Err(self.core.corrupt("freed inode: free already", 0, ino));
            };
            self.change_desc(h, g, |desc| {
                desc.free_inodes += 1;
                desc.used_dirs = desc.used_dirs.saturating_sub(dir.into());
                desc.inode_csum = csum;
            })?;
        }
        self.free_inodes.fetch_add(1, Ordering::Relaxed);
        if dir {
            group.used_dirs.fetch_sub(1, Ordering::Relaxed);
            self.dirs.fetch_sub(1, Ordering::Relaxed);
        }
        self.freed_inodes.lock().push((h.tid(), ino));
        Ok(())
    }

    /// Called when transaction `tid` is committed.
    pub(super) fn inodes_committed(&self, tid: u32) {
        let mut done = Vec::new();
        self.freed_inodes.lock().retain(|&(freed, ino)| {
            let committed = (tid.wrapping_sub(freed) as i32) >= 0;
            if committed {
                done.push(ino);
            }
            !committed
        });
        for ino in done {
            let (g, at) = self.core.geo.group_of_ino(ino);
            self.inode_back(g, at);
        }
    }

    fn inode_back(&self, g: u32, at: u32) {
        let Ok(group) = self.group(g) else { return };
        let mut view = group.inodes.lock();
        let Some(map) = view.as_mut() else { return };
        if !map.give(Span { start: at, len: 1 }) {
            log::error!("group {g}: inode {at} given back was free");
        }
        group.publish_inodes(map);
    }

    pub(super) fn load_inodes(&self, g: u32, group: &Group) -> FsResult {
        if group.inodes.lock().is_some() {
            return Ok(());
        }
        let _disk = group.disk.lock();
        if group.inodes.lock().is_some() || group.bad_inodes.load(Ordering::Relaxed) {
            return Ok(());
        }
        match self.read_inode_view(g) {
            Ok(map) => {
                let mut view = group.inodes.lock();
                group.publish_inodes(&map);
                *view = Some(map);
                Ok(())
            }
            Err(error) => {
                if matches!(error, FsError::Corrupt { .. }) {
                    group.bad_inodes.store(true, Ordering::Relaxed);
                    let lost = group.free_inodes.swap(0, Ordering::Relaxed);
                    self.free_inodes.fetch_sub(lost.into(), Ordering::Relaxed);
                }
                Err(error)
            }
        }
    }

    fn read_inode_view(&self, g: u32) -> FsResult<FreeMap> {
        let geo = &self.core.geo;
        let desc = self.desc(g)?;
        let mut map = if self.uninit(&desc, GroupFlags::INODE_UNINIT) {
            FreeMap::from_used(&vec![0; geo.block_size as usize], geo.inodes_per_group)
        } else {
            let buffer = self.core.bufs.read(desc.inode_bitmap, no_check())?;
            let data = buffer.data();
            if geo.metadata_csum()
                && bitmap_csum(geo, geo.inodes_per_group, &data)
                    != csum_of(geo.desc_size, desc.inode_csum)
            {
                return Err(self
                    .core
                    .corrupt("inode bitmap: checksum", desc.inode_bitmap, 0));
            }
            FreeMap::from_used(&data, geo.inodes_per_group)
        };
        // Reserved inodes may span groups where those are tiny.
        let reserved = (geo.first_ino - 1).saturating_sub(g.saturating_mul(geo.inodes_per_group));
        let own = map.exclude(Span {
            start: 0,
            len: reserved.min(geo.inodes_per_group),
        });
        if own > 0 {
            let what = "inode bitmap: reserved inodes marked free";
            return Err(self.core.corrupt(what, desc.inode_bitmap, 0));
        }
        if map.free() != desc.free_inodes {
            log::error!(
                "group {g}: {} free inodes, {} in the bitmap",
                desc.free_inodes,
                map.free()
            );
            let what = "group descriptor: bg_free_inodes_count";
            return Err(self.core.corrupt(what, geo.group_desc_at(g).0, 0));
        }
        Ok(map)
    }

    fn flex_stats(&self, flex_group: u32) -> FsResult<FlexStats> {
        let size = self.flex_size();
        let first = flex_group * size;
        let mut stats = FlexStats {
            free_inodes: 0,
            free_blocks: 0,
            dirs: 0,
        };
        for g in first..(first + size).min(self.core.geo.group_count) {
            let group = self.group(g)?;
            stats.free_inodes += u64::from(group.free_inodes.load(Ordering::Relaxed));
            stats.free_blocks += u64::from(group.free_blocks.load(Ordering::Relaxed));
            stats.dirs += u64::from(group.used_dirs.load(Ordering::Relaxed));
        }
        Ok(stats)
    }

    /// Chooses the group of a new directory, after Orlov.
    fn directory_group(&self, home: u32, top: bool) -> FsResult<u32> {
        let geo = &self.core.geo;
        let size = self.flex_size();
        let count = geo.group_count.div_ceil(size);
        if count == 1 && size == 1 {
            return Ok(home);
        }
        let average = |total: i64| u64::try_from(total).unwrap_or(0) / u64::from(count);
        let inodes = average(self.free_inodes.load(Ordering::Relaxed));
        let blocks = average(self.free.load(Ordering::Relaxed));
        let dirs = average(self.dirs.load(Ordering::Relaxed));
        let scan = count.min(MAX_SCAN);
        if top {
            let turn = self.spread.fetch_add(1, Ordering::Relaxed);
            let start = turn.wrapping_mul(0x9e37_79b1) % count;
            let mut best: Option<(u64, u32)> = None;
            for i in 0..scan {
                let f = (start + i) % count;
                let stats = self.flex_stats(f)?;
                if stats.free_inodes > 0
                    && stats.free_inodes >= inodes
                    && stats.free_blocks >= blocks
                    && best.is_none_or(|(dirs, _)| stats.dirs < dirs)
                {
                    best = Some((stats.dirs, f));
                }
            }
            return Ok(best.map_or(home, |(_, f)| f * size));
        }
        // Near the parent, unless that is much fuller than the average.
        let group_inodes = u64::from(geo.inodes_per_group) * u64::from(size);
        let group_blocks = u64::from(geo.blocks_per_group) * u64::from(size);
        let max_dirs = dirs + group_inodes / 16;
        let min_inodes = inodes.saturating_sub(group_inodes / 4).max(1);
        let min_blocks = blocks.saturating_sub(group_blocks / 4);
        for i in 0..scan {
            let f = (home / size + i) % count;
            let stats = self.flex_stats(f)?;
            if stats.dirs < max_dirs
                && stats.free_inodes >= min_inodes
                && stats.free_blocks >= min_blocks
            {
                return Ok(if i == 0 { home } else { f * size });
            }
        }
        Ok(home)
    }
}
