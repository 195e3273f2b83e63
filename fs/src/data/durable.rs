//! What makes data durable.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockstack::flush_wait;

use crate::core::Fs;
use crate::error::{FsError, FsResult};
use crate::inode::Inode;

impl Fs {
    /// Makes a file durable; `datasync` without what reading it back does not need.
    ///
    /// # Errors
    /// Also of writes that were answered before they ended.
    pub fn fsync(self: &Arc<Self>, inode: &Inode, datasync: bool) -> FsResult {
        self.wait_begun(inode);
        if !datasync {
            self.write_times(inode)?;
        }
        let lost = inode.io.take_error();
        let tid = if datasync {
            &inode.datasync_tid
        } else {
            &inode.tid
        };
        let durable = self.persist(inode, tid.load(Ordering::Acquire));
        lost.map_or(Ok(()), Err).and(durable)
    }

    /// Makes transaction `tid` durable, and the data of the inode that was written so far.
    pub(super) fn persist(&self, inode: &Inode, tid: u32) -> FsResult {
        let unflushed = inode.unflushed.needed();
        match (tid, unflushed) {
            (0, None) => Ok(()),
            (0, Some(_)) if self.opts.barrier => flush_wait(&self.dev).map_err(FsError::from),
            (0, Some(_)) => Ok(()),
            (tid, Some(_)) => self.journal.commit_or_flush(tid),
            (tid, None) => self.journal.commit_wait(tid),
        }?;
        if let Some(written) = unflushed {
            inode.unflushed.flushed(written);
        }
        Ok(())
    }

    /// Waits for all data under way and makes everything durable.
    ///
    /// # Errors
    /// The first one met.
    pub fn sync(self: &Arc<Self>) -> FsResult {
        if self.is_shut_down() {
            return Err(FsError::ShutDown);
        }
        let mut first = Ok(());
        for inode in self.inodes.all() {
            self.wait_begun(&inode);
            if let Some(error) = inode.io.take_error() {
                first = first.and(Err(error));
            }
            first = first.and(self.write_times(&inode));
        }
        first.and(self.journal.commit_all())
    }
}
