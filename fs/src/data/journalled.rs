//! Files whose data goes through the journal: with `data=journal`, and those that are marked so.
//!
//! Their blocks are buffers of the cache and members of transactions, as blocks of metadata are. So
//! what a write changes is committed with the size, the times and the mapping that go with it, or
//! not at all, and a block that is freed is revoked. Nothing reads or writes such a block past the
//! cache, and whether a file is one of these does not change while it is mounted.
//!
//! # Locking
//!
//! write: inode (w) -> transaction -> extent tree -> group -> buffers
//! read: inode (r) -> buffers

use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockstack::direct_io::{Extent, Mapping as DioMapping};
use bufio::no_check;

use super::{Origin, WRITE_CREDITS};
use crate::alloc::{BlockUse, Run};
use crate::core::Fs;
use crate::error::{FsError, FsResult};
use crate::format::inode::{InodeData, InodeFlags};
use crate::inode::Inode;
use crate::inode::map::{self, MapKind, Mapping, Written};
use crate::journal::Handle;
use crate::ops::Caller;
use crate::options::DataMode;

/// Blocks that one handle changes at most.
const MOST_BLOCKS: u32 = 256;

/// A write of one run of blocks.
struct Part<'a> {
    run: Run,
    kind: MapKind,
    /// First block of the file.
    lblk: u32,
    offset: u64,
    bytes: &'a [u8],
}

impl Part<'_> {
    /// Byte behind the last.
    fn end(&self) -> u64 {
        self.offset + self.bytes.len() as u64
    }
}

impl Fs {
    /// Whether the data of this inode goes through the journal.
    pub(crate) fn journals_data(&self, data: &InodeData) -> bool {
        data.is_file()
            && self.journal.has_log()
            && (self.opts.data == Some(DataMode::Journal)
                || data.flags.contains(InodeFlags::JOURNAL_DATA))
    }

    /// Fills `out` with what `extents`, one after the other, hold.
    pub(super) fn read_journalled(&self, extents: &[Extent], out: &mut [u8]) -> FsResult {
        let block_size = self.geo.block_size as usize;
        let mut rest = out;
        for extent in extents {
            let bytes = (extent.len.raw() as usize) << blockstack::units::SECTOR_SHIFT;
            let (part, behind) = rest.split_at_mut(bytes);
            rest = behind;
            if extent.kind != DioMapping::Mapped {
                part.fill(0);
                continue;
            }
            let first = extent.sector.raw() / self.geo.block_sectors();
            let blocks = part.chunks_exact_mut(block_size);
            self.bufs.prefetch(first, blocks.len() as u64);
            for (pblk, block) in (first..).zip(blocks) {
                let buffer = self.bufs.read(pblk, no_check())?;
                block.copy_from_slice(&buffer.data());
            }
        }
        Ok(())
    }

    /// Writes through the journal; gives the bytes written, which are fewer only where a caller
    /// that waits can be told so.
    pub(super) fn write_journalled(
        self: &Arc<Self>,
        inode: &Arc<Inode>,
        offset: u64,
        bytes: &[u8],
        origin: Origin,
        caller: &Caller,
    ) -> FsResult<u32> {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let part =
                self.with_space(|| self.write_part(inode, at, &bytes[done..], origin, caller));
            match part {
                Ok(count) => done += count,
                Err(_) if done > 0 && origin != Origin::PageCache => break,
                Err(error) => return Err(error),
            }
        }
        if inode.data.read().flags.contains(InodeFlags::SYNC) {
            self.persist(inode, inode.datasync_tid.load(Ordering::Acquire))?;
        }
        Ok(done as u32)
    }

    /// Writes as much as one run of blocks and one handle take.
    fn write_part(
        &self,
        inode: &Arc<Inode>,
        offset: u64,
        bytes: &[u8],
        origin: Origin,
        caller: &Caller,
    ) -> FsResult<usize> {
        let mut data = inode.data.write();
        let end = offset + bytes.len() as u64;
        Self::check_place(&self.geo, &data, end)?;
        let most = (self.journal.max_credits() / 2).clamp(1, MOST_BLOCKS);
        let lblk = (offset >> self.geo.block_bits) as u32;
        let to = end.div_ceil(u64::from(self.geo.block_size)) as u32;
        let Mapping {
            kind, pblk, len, ..
        } = map::lookup(self, inode, &data, lblk, (to - lblk).min(most))?;
        let run = match kind {
            MapKind::Hole => {
                let goal = inode
                    .io
                    .goal(lblk)
                    .unwrap_or_else(|| self.alloc.goal_for(inode.ino, &data, lblk));
                let run = self.alloc.reserve(goal, len, 1, self.privilege(caller))?;
                inode
                    .io
                    .set_goal(lblk + run.len, run.start + u64::from(run.len));
                run
            }
            MapKind::Mapped | MapKind::Unwritten => Run { start: pblk, len },
        };
        let behind = u64::from(lblk + run.len) << self.geo.block_bits;
        let part = Part {
            run,
            kind,
            lblk,
            offset,
            bytes: &bytes[..(behind.min(end) - offset) as usize],
        };
        let credits =
            WRITE_CREDITS + run.len + map::meta_credits(&data, 1) + self.alloc.run_credits(run.len);
        let handle = match self.journal.start(credits) {
            Ok(handle) => handle,
            Err(error) => {
                if kind == MapKind::Hole {
                    self.alloc.unreserve(run);
                }
                return Err(error);
            }
        };
        let result = self
            .put_part(&handle, inode, &mut data, &part)
            .and_then(|()| {
                data.size = data.size.max(part.end());
                self.stamp_write(&mut data, origin, !caller.keeps_times);
                self.write_inode(&handle, inode, &data)
            });
        inode.datasync_tid.store(handle.tid(), Ordering::Release);
        handle.finish(result.map(|()| part.bytes.len()))
    }

    /// Content first: where that fails, no mapping names blocks with anything else in them.
    fn put_part(
        &self,
        handle: &Handle,
        inode: &Inode,
        data: &mut InodeData,
        part: &Part<'_>,
    ) -> FsResult {
        let run = part.run;
        let filled = self.fill_part(handle, data, part);
        let named = match part.kind {
            MapKind::Mapped => return filled,
            MapKind::Unwritten => {
                return filled
                    .and_then(|()| map::convert(self, handle, inode, data, part.lblk, run.len));
            }
            MapKind::Hole => filled.and_then(|()| self.alloc.commit_run(handle, run)),
        };
        if named.is_err() {
            self.alloc.unreserve(run);
            for block in run.start..run.start + u64::from(run.len) {
                handle.forget(block)?;
            }
            return named;
        }
        let inserted = map::insert(self, handle, inode, data, part.lblk, run, Written::Yes);
        if inserted.is_err() {
            // The bits are set on disk: the blocks go back with the transaction.
            let back = self
                .alloc
                .free(handle, run.start, run.len, BlockUse::Metadata);
            return inserted.and(back);
        }
        Ok(())
    }

    /// Changes the buffers of a part.
    fn fill_part(&self, handle: &Handle, data: &InodeData, part: &Part<'_>) -> FsResult {
        let block_size = u64::from(self.geo.block_size);
        let mut rest = part.bytes;
        let mut at = part.offset;
        for pblk in part.run.start..part.run.start + u64::from(part.run.len) {
            let start = at - at % block_size;
            let skip = (at - start) as usize;
            let (bytes, behind) =
                rest.split_at(rest.len().min((block_size as usize).saturating_sub(skip)));
            let is_whole = bytes.len() as u64 == block_size;
            if part.kind == MapKind::Mapped && !is_whole {
                let buffer = self.bufs.read(pblk, no_check())?;
                let mut block = handle.write(&buffer)?;
                // What stands behind the end of the file in its last block is no data.
                let valid = data.size.saturating_sub(start).min(block_size) as usize;
                block[valid..].fill(0);
                block[skip..skip + bytes.len()].copy_from_slice(bytes);
            } else {
                let buffer = handle.create(pblk, no_check())?;
                handle.write(&buffer)?[skip..skip + bytes.len()].copy_from_slice(bytes);
            }
            rest = behind;
            at = start + block_size;
        }
        Ok(())
    }

    /// Zeros a part of a block. The inode is locked.
    pub(super) fn zero_journalled(&self, pblk: u64, from: usize, to: usize) -> FsResult {
        let handle = self.journal.start(2)?;
        let zeroed = (|| {
            let buffer = self.bufs.read(pblk, no_check())?;
            handle.write(&buffer)?[from..to].fill(0);
            Ok(())
        })();
        handle.finish(zeroed)
    }

    /// Sets what a write changes in the inode besides the size; the times where `stamps` says so.
    pub(super) fn stamp_write(&self, data: &mut InodeData, origin: Origin, stamps: bool) {
        if let Origin::Direct { kill_priv } = origin {
            if stamps {
                let now = self.now();
                data.mtime = now;
                data.ctime = now;
            }
            if kill_priv {
                crate::ops::attr::drop_privileges(data);
            }
        }
        data.count_change();
    }

    /// Whether a file may be written up to byte `end`.
    pub(super) fn check_place(
        geo: &crate::geometry::Geometry,
        data: &InodeData,
        end: u64,
    ) -> FsResult {
        if data.flags.contains(InodeFlags::IMMUTABLE) {
            return Err(FsError::NotPermitted);
        }
        if end > map::max_file_size(geo, data.has_extents()) {
            return Err(FsError::FileTooBig);
        }
        Ok(())
    }
}
