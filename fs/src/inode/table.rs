//! The table of inodes in memory, and how they leave it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use dashmap::DashMap;

use super::Inode;
use crate::core::Fs;
use crate::error::{FsError, FsResult};

/// Inodes in memory by number. There is one [`Inode`] for a number at a time, so that its lock
/// means something: an entry is taken out only while nobody but the table has it.
#[derive(Default)]
pub struct InodeTable {
    map: DashMap<u32, Arc<Inode>>,
}

impl InodeTable {
    /// The inode, where it is in memory.
    #[must_use]
    pub fn get(&self, ino: u32) -> Option<Arc<Inode>> {
        self.map.get(&ino).map(|inode| inode.clone())
    }

    /// Puts a newly made inode in, in place of a deleted one of the same number.
    pub fn insert(&self, inode: &Arc<Inode>) {
        self.map.insert(inode.ino, inode.clone());
    }

    /// Takes an inode out that nobody uses and the kernel does not know.
    pub fn drop_unused(&self, ino: u32) {
        self.map.remove_if(&ino, |_, inode| {
            Arc::strong_count(inode) == 1 && inode.lookups.load(Ordering::Acquire) == 0
        });
    }

    /// All inodes in memory now.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Inode>> {
        self.map.iter().map(|inode| inode.value().clone()).collect()
    }
}

impl Fs {
    /// Gives an inode, read where it is not in memory.
    ///
    /// # Errors
    /// [`FsError::Stale`] for a number outside; what reading finds wrong.
    pub fn iget(&self, ino: u32) -> FsResult<Arc<Inode>> {
        if let Some(inode) = self.inodes.get(ino) {
            return Ok(inode);
        }
        let inode = Inode::new(&self.geo, ino, self.read_inode(ino)?);
        // It may have been in memory before, and changed: `fsync` must wait for that, too.
        let tid = self.journal.youngest();
        inode.tid.store(tid, Ordering::Release);
        inode.datasync_tid.store(tid, Ordering::Release);
        inode.unflushed.store(true, Ordering::Release);
        Ok(self.inodes.map.entry(ino).or_insert(inode).clone())
    }

    /// As [`Self::iget`], for a number that a directory names: an inode that is not in use is
    /// damage.
    ///
    /// # Errors
    /// As [`Self::iget`].
    pub fn iget_named(&self, ino: u32) -> FsResult<Arc<Inode>> {
        if ino == 0 || ino > self.geo.inodes_count {
            return Err(self.corrupt("directory entry: inode", 0, ino));
        }
        if ino < self.geo.first_ino && ino != super::ROOT_INO {
            return Err(self.corrupt("directory entry: reserved inode", 0, ino));
        }
        let inode = self.iget(ino)?;
        let in_use = {
            let data = inode.data.read_nested();
            data.links > 0 || inode.lookups.load(Ordering::Acquire) > 0
        };
        if in_use {
            Ok(inode)
        } else {
            Err(self.corrupt("directory entry: deleted inode", 0, ino))
        }
    }

    /// The kernel gives up `n` references.
    pub fn forget(self: &Arc<Self>, ino: u32, n: u64) {
        let Some(inode) = self.inodes.get(ino) else {
            return;
        };
        let before = inode
            .lookups
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |held| {
                Some(held.saturating_sub(n))
            });
        if before.is_ok_and(|held| held > n) {
            return;
        }
        self.put(inode);
    }

    /// Ends a use of an inode: deletes it where it has no name and no user, and lets it leave the
    /// memory.
    pub fn put(self: &Arc<Self>, inode: Arc<Inode>) {
        let ino = inode.ino;
        if inode.lookups.load(Ordering::Acquire) == 0 && inode.orphan.is_listed() {
            if let Some(evictions) = &self.evictions {
                evictions.queue(inode);
                return;
            }
            self.report_eviction(ino, FsError::NoMemory);
            return;
        }
        drop(inode);
        self.inodes.drop_unused(ino);
    }

    /// [`FsError::NotDirectory`] for anything but a directory.
    pub(crate) fn directory(&self, ino: u32) -> FsResult<Arc<Inode>> {
        let inode = self.iget(ino)?;
        if inode.is_dir() {
            Ok(inode)
        } else {
            Err(FsError::NotDirectory)
        }
    }
}
