//! Blocks and inodes that somebody else has chosen: the kernel, whose fast commits are replayed.
//!
//! All of it may be done again, and changes only what is not so yet. What is released is not handed
//! out again: the replay has a file system of its own, which ends with it.

use std::sync::atomic::Ordering;

use bufio::no_check;

use super::blocks::overlaps;
use super::group::bitmap_csum;
use super::view::Span;
use super::{Alloc, InodeUse, Run, bits};
use crate::error::FsResult;
use crate::format::group::GroupFlags;
use crate::journal::{Class, Handle};

impl Alloc {
    /// Gives out reserved blocks to everybody from now on: who made what is replayed had its own.
    pub(crate) fn open_reserve(&self) {
        self.is_open.store(true, Ordering::Relaxed);
    }

    /// Keeps the blocks of a run from being handed out; false where one is outside the file system
    /// or its own.
    ///
    /// # Errors
    /// A bitmap that cannot be read.
    pub(crate) fn keep(&self, run: Run) -> FsResult<bool> {
        if !self.core.geo.blocks_in_fs(run.start, run.len.into()) {
            return Ok(false);
        }
        for (g, span) in self.pieces(run.start, run.len) {
            self.load_blocks(g)?;
            let group = self.group(g)?;
            if overlaps(group.own.get().map(|own| &**own), span) {
                return Ok(false);
            }
            let mut view = group.blocks.lock();
            let Some(map) = view.as_mut() else {
                return Ok(false);
            };
            let kept = map.exclude(span);
            group.publish_blocks(map);
            self.free.fetch_sub(kept.into(), Ordering::AcqRel);
        }
        Ok(true)
    }

    /// Marks all blocks of a run as used on disk. They are kept ([`Self::keep`]), or were used.
    ///
    /// # Errors
    /// A bitmap that cannot be read; an aborted journal.
    pub(crate) fn claim_run(&self, h: &Handle, run: Run) -> FsResult {
        self.change_bits(h, run, true)
    }

    /// Marks all blocks of a run as free on disk.
    ///
    /// # Errors
    /// As [`Self::claim_run`].
    pub(crate) fn release_run(&self, h: &Handle, run: Run) -> FsResult {
        self.change_bits(h, run, false)
    }

    fn change_bits(&self, h: &Handle, run: Run, used: bool) -> FsResult {
        let geo = &self.core.geo;
        for (g, span) in self.pieces(run.start, run.len) {
            let group = self.group(g)?;
            let _disk = group.disk.lock();
            if used {
                self.init_block_bitmap(h, g, group)?;
            } else if group.block_uninit.load(Ordering::Relaxed) {
                continue;
            }
            let buffer = self.core.bufs.read(group.block_bitmap, no_check())?;
            let is_so = if used { bits::all_set } else { bits::all_clear };
            if is_so(&buffer.data(), span.start, span.len) {
                continue;
            }
            let (changed, csum) = {
                let mut data = h.write_class(&buffer, Class::Bitmaps)?;
                let ones = bits::count(&data, span.start, span.len);
                let changed = if used {
                    bits::set(&mut data, span.start, span.len);
                    span.len - ones
                } else {
                    bits::clear(&mut data, span.start, span.len);
                    ones
                };
                (changed, bitmap_csum(geo, geo.blocks_per_group, &data))
            };
            self.change_desc(h, g, |desc| {
                desc.free_blocks = if used {
                    desc.free_blocks.saturating_sub(changed)
                } else {
                    desc.free_blocks.saturating_add(changed)
                };
                desc.block_csum = csum;
            })?;
        }
        Ok(())
    }

    /// Whether the bitmap has an inode as used.
    ///
    /// # Errors
    /// A bitmap that cannot be read, or is damaged.
    pub(crate) fn is_inode_used(&self, ino: u32) -> FsResult<bool> {
        let (g, at) = self.core.geo.group_of_ino(ino);
        let group = self.group(g)?;
        self.load_inodes(g, group)?;
        let _disk = group.disk.lock();
        let desc = self.desc(g)?;
        if self.uninit(&desc, GroupFlags::INODE_UNINIT) {
            return Ok(false);
        }
        let buffer = self.core.bufs.read(desc.inode_bitmap, no_check())?;
        let used = bits::all_set(&buffer.data(), at, 1);
        Ok(used)
    }

    /// Marks an inode as used on disk, which it is not yet.
    ///
    /// # Errors
    /// A bitmap that cannot be read, or is damaged; an aborted journal.
    pub(crate) fn claim_inode(&self, h: &Handle, ino: u32, what: InodeUse) -> FsResult {
        let (g, at) = self.core.geo.group_of_ino(ino);
        let group = self.group(g)?;
        self.load_inodes(g, group)?;
        if group.bad_inodes.load(Ordering::Relaxed) {
            return Err(self
                .core
                .corrupt("group: inode used in a damaged one", 0, ino));
        }
        if let Some(map) = group.inodes.lock().as_mut() {
            map.exclude(Span { start: at, len: 1 });
            group.publish_inodes(map);
        }
        self.mark_inode(h, g, group, at, what)
    }
}
