//! Space of a file: truncate, fallocate, and the deletion of what has no name any more.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Caller;
use super::attr::drop_privileges;
use crate::alloc::InodeUse;
use crate::core::Fs;
use crate::data::Quiet;
use crate::error::{FsError, FsResult};
use crate::format::inode::{InodeData, InodeFlags};
use crate::inode::Inode;
use crate::inode::map::{self, MapKind, Written};
use crate::orphan::ORPHAN_CREDITS;
use crate::xattr;

bitflags::bitflags! {
    /// `fallocate`'s modes.
    #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
    pub struct FallocMode: i32 {
        /// The size stays.
        const KEEP_SIZE = 0x1;
        /// Make a hole.
        const PUNCH_HOLE = 0x2;
        /// Cut the range out.
        const COLLAPSE_RANGE = 0x8;
        /// The range reads as zeros.
        const ZERO_RANGE = 0x10;
        /// Make room by moving what follows.
        const INSERT_RANGE = 0x20;
    }
}

/// Credits to begin the removal of blocks with; more are taken as needed.
const REMOVE_CREDITS: u32 = 48;
/// The longest run that one transaction preallocates, in blocks.
const PREALLOC_RUN: u32 = 32768;

impl Fs {
    fn block_after(&self, byte: u64) -> u32 {
        byte.div_ceil(u64::from(self.geo.block_size))
            .min(u64::from(u32::MAX)) as u32
    }

    /// Sets the size of a file.
    ///
    /// # Errors
    /// [`FsError::FileTooBig`], [`FsError::IsDirectory`], [`FsError::NotPermitted`].
    pub fn truncate(self: &Arc<Self>, inode: &Arc<Inode>, size: u64, caller: &Caller) -> FsResult {
        self.check_writable()?;
        if !inode.is_file() {
            return Err(if inode.is_dir() {
                FsError::IsDirectory
            } else {
                FsError::Invalid
            });
        }
        let mut data = self.quiesce(inode);
        if data
            .flags
            .intersects(InodeFlags::IMMUTABLE | InodeFlags::APPEND)
        {
            return Err(FsError::NotPermitted);
        }
        if size > map::max_file_size(&self.geo, data.has_extents()) {
            return Err(FsError::FileTooBig);
        }
        let shrinks = size < data.size;
        if shrinks {
            let block_end = u64::from(self.block_after(size)) << self.geo.block_bits;
            self.zero_partial(inode, &data, size, block_end)?;
        }
        let mut handle = self.journal.start(REMOVE_CREDITS + ORPHAN_CREDITS)?;
        let now = self.now();
        data.size = size;
        if !caller.keeps_times {
            data.mtime = now;
            data.ctime = now;
            data.count_change();
        }
        if caller.uid != 0 {
            drop_privileges(&mut data);
        }
        inode.datasync_tid.store(handle.tid(), Ordering::Release);
        let result = (|| {
            // Blocks beyond the end are preallocated ones; they go as well.
            let from = self.block_after(size);
            self.orphan_add(&handle, inode)?;
            self.write_inode(&handle, inode, &data)?;
            map::remove(self, &mut handle, inode, &mut data, from, u32::MAX)?;
            if data.links > 0 {
                self.orphan_remove(&handle, inode)?;
            }
            self.write_inode(&handle, inode, &data)
        })();
        let tid = handle.tid();
        inode.datasync_tid.store(tid, Ordering::Release);
        handle.finish(result)?;
        drop(data);
        self.sync_change(tid)
    }

    /// Frees what stands behind the end of a file whose truncation a crash cut short.
    pub(crate) fn finish_truncate(&self, inode: &Arc<Inode>) -> FsResult {
        let mut data = inode.data.write();
        let mut handle = self.journal.start(REMOVE_CREDITS + ORPHAN_CREDITS)?;
        let from = self.block_after(data.size);
        let result = (|| {
            if inode.is_file() {
                map::remove(self, &mut handle, inode, &mut data, from, u32::MAX)?;
            }
            self.orphan_remove(&handle, inode)?;
            data.dtime = 0;
            self.write_inode(&handle, inode, &data)
        })();
        handle.finish(result)
    }

    /// Deletes an orphan for good: its blocks, its attributes, the inode.
    pub(crate) fn delete(self: &Arc<Self>, inode: &Arc<Inode>) -> FsResult {
        let mut data = self.quiesce(inode);
        if data.links > 0 || !inode.orphan.is_listed() {
            return Ok(());
        }
        let mut handle = self
            .journal
            .start(REMOVE_CREDITS + ORPHAN_CREDITS + xattr::credits())?;
        let has_blocks = match data.file_type() {
            libc::S_IFREG | libc::S_IFDIR => true,
            libc::S_IFLNK => !self.is_fast_symlink(&data),
            _ => false,
        };
        let result = (|| {
            data.size = 0;
            if has_blocks {
                self.write_inode(&handle, inode, &data)?;
                map::remove(self, &mut handle, inode, &mut data, 0, u32::MAX)?;
            }
            let needed = ORPHAN_CREDITS + xattr::credits() + 4;
            if !handle.has_credits(needed) && !handle.extend(needed)? {
                self.write_inode(&handle, inode, &data)?;
                handle.restart(needed)?;
            }
            xattr::delete_all(self, &handle, inode, &mut data)?;
            self.orphan_remove(&handle, inode)?;
            data.dtime = self.now().sec as u32;
            self.write_inode(&handle, inode, &data)?;
            let kind = if inode.is_dir() {
                InodeUse::Directory { top: false }
            } else {
                InodeUse::Other
            };
            self.alloc.free_inode(&handle, inode.ino, kind)
        })();
        handle.finish(result)
    }

    /// Preallocates, punches, zeros, collapses or inserts.
    ///
    /// # Errors
    /// [`FsError::NotSupported`] for modes or kinds of files that cannot, [`FsError::Invalid`],
    /// [`FsError::NoSpace`], [`FsError::FileTooBig`].
    pub fn fallocate(
        self: &Arc<Self>,
        inode: &Arc<Inode>,
        mode: FallocMode,
        offset: u64,
        len: u64,
        caller: &Caller,
    ) -> FsResult {
        self.with_space(|| self.try_fallocate(inode, mode, offset, len, caller))
    }

    fn try_fallocate(
        self: &Arc<Self>,
        inode: &Arc<Inode>,
        mode: FallocMode,
        offset: u64,
        len: u64,
        caller: &Caller,
    ) -> FsResult {
        self.check_writable()?;
        if !inode.is_file() {
            return Err(if inode.is_dir() {
                FsError::IsDirectory
            } else {
                FsError::NotSupported
            });
        }
        if len == 0 {
            return Err(FsError::Invalid);
        }
        let end = offset.checked_add(len).ok_or(FsError::FileTooBig)?;
        let mut data = self.quiesce(inode);
        let limit = map::max_file_size(&self.geo, data.has_extents());
        if end > limit {
            return Err(FsError::FileTooBig);
        }
        if data.flags.contains(InodeFlags::IMMUTABLE)
            || (data.flags.contains(InodeFlags::APPEND)
                && !(mode - FallocMode::KEEP_SIZE).is_empty())
        {
            return Err(FsError::NotPermitted);
        }
        let range = (offset, end);
        let keep_size = mode.contains(FallocMode::KEEP_SIZE);
        match mode - FallocMode::KEEP_SIZE {
            FallocMode::PUNCH_HOLE if keep_size => self.punch(inode, &mut data, range)?,
            // As the kernel's: what cannot be preallocated again is not zeroed either.
            FallocMode::ZERO_RANGE if data.has_extents() => {
                self.punch(inode, &mut data, range)?;
                self.preallocate(inode, &mut data, range, caller)?;
            }
            FallocMode::COLLAPSE_RANGE if !keep_size => {
                return self.shift(inode, data, range, FallocMode::COLLAPSE_RANGE);
            }
            FallocMode::INSERT_RANGE if !keep_size => {
                return self.shift(inode, data, range, FallocMode::INSERT_RANGE);
            }
            other if other.is_empty() => self.preallocate(inode, &mut data, range, caller)?,
            _ => return Err(FsError::NotSupported),
        }
        let new_size = if keep_size {
            data.size
        } else {
            data.size.max(end)
        };
        let handle = self.journal.start(4)?;
        let now = self.now();
        data.size = new_size;
        if !caller.keeps_times {
            data.mtime = now;
            data.ctime = now;
            data.count_change();
        }
        if caller.uid != 0 {
            drop_privileges(&mut data);
        }
        let written = self.write_inode(&handle, inode, &data);
        let tid = handle.tid();
        inode.datasync_tid.store(tid, Ordering::Release);
        handle.finish(written)?;
        drop(data);
        self.sync_change(tid)
    }

    fn punch(
        &self,
        inode: &Arc<Inode>,
        data: &mut InodeData,
        (start, end): (u64, u64),
    ) -> FsResult {
        let bits = self.geo.block_bits;
        let first = self.block_after(start);
        let last = (end >> bits).min(u64::from(u32::MAX)) as u32;
        if first > last {
            return self.zero_partial(inode, data, start, end);
        }
        self.zero_partial(inode, data, start, u64::from(first) << bits)?;
        self.zero_partial(inode, data, u64::from(last) << bits, end)?;
        if first == last {
            return Ok(());
        }
        let mut handle = self.journal.start(REMOVE_CREDITS)?;
        let result = map::remove(self, &mut handle, inode, data, first, last)
            .and_then(|()| self.write_inode(&handle, inode, data));
        inode.datasync_tid.store(handle.tid(), Ordering::Release);
        handle.finish(result)
    }

    fn preallocate(
        &self,
        inode: &Arc<Inode>,
        data: &mut InodeData,
        (start, end): (u64, u64),
        caller: &Caller,
    ) -> FsResult {
        if !data.has_extents() {
            return Err(FsError::NotSupported);
        }
        let mut lblk = (start >> self.geo.block_bits) as u32;
        let to = self.block_after(end);
        while lblk < to {
            let mapping = map::lookup(self, inode, data, lblk, to - lblk)?;
            if mapping.kind != MapKind::Hole {
                lblk += mapping.len;
                continue;
            }
            let goal = inode
                .io
                .goal(lblk)
                .unwrap_or_else(|| self.alloc.goal_for(inode.ino, data, lblk));
            let want = mapping.len.min(PREALLOC_RUN);
            let run = self.alloc.reserve(goal, want, 1, self.privilege(caller))?;
            let handle = match self.journal.start(16 + map::meta_credits(data, 1)) {
                Ok(handle) => handle,
                Err(error) => {
                    self.alloc.unreserve(run);
                    return Err(error);
                }
            };
            let result = self
                .alloc
                .commit_run(&handle, run)
                .and_then(|()| map::insert(self, &handle, inode, data, lblk, run, Written::No))
                .and_then(|()| self.write_inode(&handle, inode, data));
            inode.datasync_tid.store(handle.tid(), Ordering::Release);
            handle.finish(result)?;
            lblk += run.len;
            inode.io.set_goal(lblk, run.start + u64::from(run.len));
        }
        Ok(())
    }

    fn shift(
        &self,
        inode: &Arc<Inode>,
        mut data: Quiet<'_>,
        (start, end): (u64, u64),
        mode: FallocMode,
    ) -> FsResult {
        let bits = self.geo.block_bits;
        let mask = u64::from(self.geo.block_size) - 1;
        if !data.has_extents() {
            return Err(FsError::NotSupported);
        }
        if (start | end) & mask != 0 {
            return Err(FsError::Invalid);
        }
        let collapse = mode == FallocMode::COLLAPSE_RANGE;
        let reaches = if collapse { end } else { start };
        if reaches >= data.size {
            return Err(FsError::Invalid);
        }
        let len = end - start;
        let new_size = if collapse {
            data.size - len
        } else {
            data.size + len
        };
        if new_size > map::max_file_size(&self.geo, true) {
            return Err(FsError::FileTooBig);
        }
        let (at, blocks) = ((start >> bits) as u32, (len >> bits) as u32);
        let mut handle = self.journal.start(REMOVE_CREDITS)?;
        let result = (|| {
            if collapse {
                map::collapse(self, &mut handle, inode, &mut data, at, blocks)?;
            } else {
                map::insert_range(self, &mut handle, inode, &mut data, at, blocks)?;
            }
            let now = self.now();
            data.size = new_size;
            data.mtime = now;
            data.ctime = now;
            data.count_change();
            self.write_inode(&handle, inode, &data)
        })();
        let tid = handle.tid();
        inode.datasync_tid.store(tid, Ordering::Release);
        handle.finish(result)?;
        drop(data);
        self.sync_change(tid)
    }
}
