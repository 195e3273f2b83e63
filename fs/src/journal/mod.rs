//! Transactions.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use blockstack::sync::{Mutex, Rank};
use bufio::{Buffer, Validator, WriteGuard};

use crate::core::Core;
use crate::error::FsResult;

/// Blocks that a committed transaction freed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct FreedRange {
    /// First block.
    pub start: u64,
    /// Blocks.
    pub len: u32,
}

/// Who hears of commits.
pub trait CommitHooks: Send + Sync {
    /// The transaction is durable; its freed blocks may be handed out again.
    fn committed(&self, tid: u32, freed: &[FreedRange]);
}

/// The order of writes at a commit without a journal, first to last.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Class {
    /// Blocks that nothing on disk names yet.
    New,
    /// Inode tables.
    Inodes,
    /// Directories and all else.
    Other,
    /// Bitmaps and group descriptors.
    Bitmaps,
}

/// The journal.
pub struct Journal {
    core: Arc<Core>,
    hooks: Mutex<Option<Arc<dyn CommitHooks>>>,
}

/// A part of a transaction: changes that are committed together or not at all.
pub struct Handle {
    journal: Arc<Journal>,
    freed: Mutex<Vec<FreedRange>>,
}

/// A buffer being changed; dirty metadata of the handle's transaction when dropped.
pub struct JournalWrite<'a> {
    buffer: &'a Buffer,
    guard: WriteGuard<'a>,
}

impl Journal {
    /// A journal that only writes back.
    #[must_use]
    pub fn bare(core: Arc<Core>) -> Arc<Self> {
        Arc::new(Self {
            core,
            hooks: Mutex::new(Rank::JournalState, None),
        })
    }

    /// Sets who hears of commits.
    pub fn set_commit_hooks(&self, hooks: Arc<dyn CommitHooks>) {
        *self.hooks.lock() = Some(hooks);
    }

    /// Begins a handle that may change `credits` blocks.
    pub fn start(self: &Arc<Self>, _credits: u32) -> FsResult<Handle> {
        Ok(Handle {
            journal: self.clone(),
            freed: Mutex::new(Rank::JournalState, Vec::new()),
        })
    }

    /// Waits until transaction `tid` is durable.
    pub fn commit_wait(&self, _tid: u32) -> FsResult {
        self.commit_all()
    }

    /// Starts to commit `tid`.
    pub fn start_commit(&self, _tid: u32) {}

    /// Waits until all is durable.
    pub fn commit_all(&self) -> FsResult {
        self.core.bufs.write_dirty()?;
        Ok(self.core.bufs.flush()?)
    }

    /// Commits, writes everything home and marks the log empty.
    pub fn shutdown(&self) -> FsResult {
        self.commit_all()
    }

    /// Whether the journal was aborted.
    #[must_use]
    pub fn is_aborted(&self) -> bool {
        false
    }
}

impl Handle {
    /// Its transaction.
    #[must_use]
    pub fn tid(&self) -> u32 {
        1
    }

    /// Joins a buffer to the transaction and gives its content for changing.
    pub fn write<'a>(&self, buffer: &'a Buffer) -> FsResult<JournalWrite<'a>> {
        self.write_class(buffer, Class::Other)
    }

    /// As [`Self::write`], with the place in the order of writes without a journal.
    pub fn write_class<'a>(&self, buffer: &'a Buffer, _: Class) -> FsResult<JournalWrite<'a>> {
        Ok(JournalWrite {
            buffer,
            guard: buffer.data_mut(),
        })
    }

    /// A new metadata block of zeros.
    pub fn create(&self, block: u64, validator: &Arc<dyn Validator>) -> FsResult<Buffer> {
        let buffer = self.journal.core.bufs.new_zeroed(block, validator)?;
        buffer.mark_dirty();
        Ok(buffer)
    }

    /// A metadata block was freed: revoked where it was logged, its buffer dropped.
    pub fn forget(&self, block: u64) -> FsResult {
        self.journal.core.bufs.forget(block);
        Ok(())
    }

    /// Blocks to be given to the hooks when the transaction is durable.
    pub fn free_after_commit(&self, start: u64, len: u32) {
        self.freed.lock().push(FreedRange { start, len });
    }

    /// More credits in place; `false` where the caller must restart.
    pub fn extend(&self, _credits: u32) -> FsResult<bool> {
        Ok(true)
    }

    /// Ends this transaction's part and begins another, with `credits`.
    pub fn restart(&mut self, _credits: u32) -> FsResult {
        Ok(())
    }

    /// Whether `n` more blocks can be changed.
    #[must_use]
    pub fn has_credits(&self, _n: u32) -> bool {
        true
    }

    /// Ends the handle.
    pub fn stop(self) -> FsResult {
        Ok(())
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let freed = std::mem::take(&mut *self.freed.lock());
        let hooks = self.journal.hooks.lock().clone();
        if let Some(hooks) = hooks {
            hooks.committed(self.tid(), &freed);
        }
    }
}

impl Deref for JournalWrite<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.guard
    }
}

impl DerefMut for JournalWrite<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.guard
    }
}

impl Drop for JournalWrite<'_> {
    fn drop(&mut self) {
        self.buffer.mark_dirty();
    }
}
