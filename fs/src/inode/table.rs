//! The table of inodes in memory, and how they leave it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dashmap::{DashMap, Entry};

use super::Inode;
use crate::core::Fs;
use crate::error::{FsError, FsResult};

/// Inodes in memory by number. There is one [`Inode`] for a number at a time, so that its lock
/// means something: an entry is taken out only while nobody but the table has it.
pub struct InodeTable {
    map: DashMap<u32, Arc<Inode>>,
    /// Entries taken out so far, by number modulo [`COUNTERS`]: whoever read an inode from the disk
    /// sees whether it may have been in memory, and changed, and left it meanwhile.
    removals: [AtomicU64; COUNTERS],
}

const COUNTERS: usize = 64;

impl Default for InodeTable {
    fn default() -> Self {
        Self {
            map: DashMap::new(),
            removals: [const { AtomicU64::new(0) }; COUNTERS],
        }
    }
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
            let unused =
                Arc::strong_count(inode) == 1 && inode.lookups.load(Ordering::Acquire) == 0;
            if unused {
                self.counter(ino).fetch_add(1, Ordering::AcqRel);
            }
            unused
        });
    }

    fn counter(&self, ino: u32) -> &AtomicU64 {
        &self.removals[ino as usize % COUNTERS]
    }

    /// Puts in what `read` gives, unless the inode is in memory. What was read while an inode left
    /// the memory may be older than what that inode wrote, and is read again.
    fn get_or_read(
        &self,
        ino: u32,
        mut read: impl FnMut() -> FsResult<Arc<Inode>>,
    ) -> FsResult<Arc<Inode>> {
        loop {
            let before = self.counter(ino).load(Ordering::Acquire);
            let inode = read()?;
            match self.map.entry(ino) {
                Entry::Occupied(entry) => return Ok(entry.get().clone()),
                Entry::Vacant(entry) => {
                    if self.counter(ino).load(Ordering::Acquire) == before {
                        return Ok(entry.insert(inode).clone());
                    }
                }
            }
        }
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
    /// [`FsError::Stale`] for a number outside; what reading finds wrong; [`FsError::ShutDown`].
    pub fn iget(&self, ino: u32) -> FsResult<Arc<Inode>> {
        if self.is_shut_down() {
            return Err(FsError::ShutDown);
        }
        if let Some(inode) = self.inodes.get(ino) {
            return Ok(inode);
        }
        self.inodes.get_or_read(ino, || {
            let inode = Inode::new(self.geo.csum_seed, ino, self.read_inode(ino)?);
            // It may have been in memory before, and changed: `fsync` must wait for that, too.
            let tid = self.journal.youngest();
            inode.tid.store(tid, Ordering::Release);
            inode.datasync_tid.store(tid, Ordering::Release);
            inode.unflushed.mark();
            Ok(inode)
        })
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
        // A directory may be above, in a damaged file system, and is not waited for: somebody who
        // changes it knows that it is in use.
        let named = if inode.is_dir() {
            let data = inode.data.try_read();
            data.is_none_or(|data| data.links > 0)
        } else {
            inode.data.read_nested().links > 0
        };
        if named || inode.lookups.load(Ordering::Acquire) > 0 {
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
                self.orphans.note_given_up();
                return;
            }
            self.report_eviction(ino, FsError::NoMemory);
            return;
        }
        let lazy = inode.lazy_since.load(Ordering::Acquire) != 0;
        if let (true, Some(evictions)) = (lazy, &self.evictions) {
            // Whoever is here must not wait for the journal.
            evictions.queue(inode);
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::InodeTable;
    use crate::format::inode::InodeData;
    use crate::inode::Inode;

    fn inode(links: u16) -> Arc<Inode> {
        let data = InodeData {
            links,
            ..InodeData::default()
        };
        Inode::new(0, 12, data)
    }

    /// What was lost: a link made while somebody else was about to put in an inode that he had read
    /// before it. The next removal of a name then deleted a file that still had one.
    #[test]
    fn an_inode_read_before_it_was_changed_and_left_is_read_again() {
        let table = InodeTable::default();
        let mut reads = 0;
        let read = || {
            reads += 1;
            if reads == 1 {
                table.insert(&inode(2));
                table.drop_unused(12);
            }
            Ok(inode(reads))
        };
        let got = table.get_or_read(12, read).unwrap();
        assert_eq!(got.data.read().links, 2);
    }
}
