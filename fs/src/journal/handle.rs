//! Handles: how an operation changes metadata.

use std::cell::Cell;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockstack::PagePool;
use bufio::{BufError, Buffer, Validator, WriteGuard};

use super::transaction::{Head, OlderCopy, Txn};
use super::{Class, FreedRange, Shared, Stop};
use crate::error::{FsError, FsResult};

/// Revokes that cost one credit: a lower bound of what fits a revoke block.
const REVOKES_PER_CREDIT: usize = 120;

/// A part of a transaction: changes that are committed together or not at all.
///
/// Dropping it ends it as [`Handle::stop`] does, without telling of errors.
pub struct Handle {
    /// `None` after a restart that failed.
    txn: Option<Arc<Txn>>,
    /// Blocks it may still join.
    credits: Cell<u32>,
    /// Something was changed through it.
    changed: Cell<bool>,
}

/// A buffer being changed; dirty metadata of the handle's transaction.
pub struct JournalWrite<'a> {
    guard: WriteGuard<'a>,
}

impl Shared {
    /// Joins a new handle to the running transaction, waiting until there is one with room.
    pub(super) fn start(self: &Arc<Self>, credits: u32) -> FsResult<Handle> {
        let credits = credits.max(1);
        if credits > self.max_txn {
            log::error!(
                "journal: {credits} credits asked for, at most {} exist",
                self.max_txn
            );
            return Err(FsError::NoSpace);
        }
        let mut state = self.state.lock();
        loop {
            if state.aborted || state.stop != Stop::No {
                return Err(self.core.refusal());
            }
            self.core.check_writable()?;
            if let Some(running) = state.running.clone() {
                if running.locked.load(Ordering::Acquire) {
                    self.unlocked.wait(&mut state);
                    continue;
                }
                if !self.has_space(&state) {
                    self.wait_for_space(&mut state);
                    continue;
                }
                if !running.reserve(credits, self.max_txn) {
                    self.request(&mut state, running.tid);
                    self.unlocked.wait(&mut state);
                    continue;
                }
                running.updates.fetch_add(1, Ordering::SeqCst);
                return Ok(Handle {
                    txn: Some(running),
                    credits: Cell::new(credits),
                    changed: Cell::new(false),
                });
            }
            if !self.has_space(&state) {
                self.wait_for_space(&mut state);
                continue;
            }
            let tid = state.next_tid;
            state.next_tid = tid.wrapping_add(1);
            state.running = Some(Txn::new(tid, self.clone()));
            // The commit thread learns when it has to commit it.
            self.commit_work.notify_one();
        }
    }

    /// Finds the head of a block, or makes it.
    fn head(&self, block: u64) -> Arc<Head> {
        if let Some(head) = self.heads.get(&block) {
            return head.clone();
        }
        self.heads
            .entry(block)
            .or_insert_with(|| Head::new(block))
            .clone()
    }

    /// Joins `buf` to `txn`, which has an open handle; `true` where it was not joined before.
    fn join(&self, txn: &Txn, buf: &Buffer, class: Class) -> FsResult<bool> {
        loop {
            let head = self.head(buf.block());
            let mut state = head.state.lock_nested();
            if state.dead {
                continue;
            }
            head.set_class(class);
            let joined_before = state.joined;
            if joined_before == Some(txn.tid) {
                state.freed = false;
                head.publish(&state);
                drop(state);
                self.unrevoke(txn, buf.block());
                return Ok(false);
            }
            if let Some(older) = joined_before {
                // The committing transaction has the block. Its content must reach the log as
                // it is now, before this handle changes it.
                let copy = if state.freed {
                    OlderCopy::Freed
                } else if state.copied {
                    OlderCopy::Done
                } else {
                    let mut frozen = PagePool::shared()
                        .alloc(self.block_size)
                        .map_err(BufError::from)?;
                    buf.copy_prepared(&mut frozen);
                    OlderCopy::Frozen(frozen)
                };
                state.older = Some((older, copy));
            }
            // The pin comes before any change: a writeback that looks at the pins with the
            // content locked writes either the old content or nothing.
            buf.pin();
            state.buf = Some(buf.clone());
            state.joined = Some(txn.tid);
            state.copied = false;
            state.freed = false;
            head.publish(&state);
            drop(state);
            txn.heads.lock_nested().push(head);
            self.unrevoke(txn, buf.block());
            return Ok(true);
        }
    }

    /// A block is metadata of `txn` (again): its new content must be replayed.
    fn unrevoke(&self, txn: &Txn, block: u64) {
        if txn.revokes.cancel(block) {
            txn.dropped
                .lock_nested()
                .retain(|&dropped| dropped != block);
        }
    }
}

impl Handle {
    fn txn(&self) -> FsResult<&Arc<Txn>> {
        let txn = self.txn.as_ref().ok_or(FsError::Aborted)?;
        if txn.shared.aborted.load(Ordering::Relaxed) {
            return Err(txn.shared.core.refusal());
        }
        Ok(txn)
    }

    /// Its transaction.
    #[must_use]
    pub fn tid(&self) -> u32 {
        self.txn.as_ref().map_or(0, |txn| txn.tid)
    }

    fn join(&self, buffer: &Buffer, class: Class) -> FsResult {
        let txn = self.txn()?;
        if txn.shared.join(txn, buffer, class)? {
            match self.credits.get().checked_sub(1) {
                Some(left) => self.credits.set(left),
                None => {
                    // The log keeps a reserve, so this is no damage, but the caller asked for
                    // too little.
                    log::debug!("journal: a handle has used up its credits");
                    txn.outstanding.fetch_add(1, Ordering::AcqRel);
                }
            }
        }
        Ok(())
    }

    /// Joins a buffer to the transaction and gives its content for changing. Never waits for I/O.
    ///
    /// # Errors
    /// [`FsError::Aborted`], or no memory for a frozen copy.
    pub fn write<'a>(&self, buffer: &'a Buffer) -> FsResult<JournalWrite<'a>> {
        self.write_class(buffer, Class::Other)
    }

    /// As [`Self::write`], with the place in the order of writes without a journal.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_class<'a>(&self, buffer: &'a Buffer, class: Class) -> FsResult<JournalWrite<'a>> {
        let txn = self.txn()?;
        self.changed.set(true);
        let joined = txn
            .shared
            .heads
            .get(&buffer.block())
            .is_some_and(|head| head.is_joined(txn.tid));
        if !joined {
            self.join(buffer, class)?;
        }
        Ok(JournalWrite {
            guard: buffer.data_mut(),
        })
    }

    /// A new metadata block of zeros, joined to the transaction.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn create(&self, block: u64, validator: &Arc<dyn Validator>) -> FsResult<Buffer> {
        let txn = self.txn()?;
        let bufs = &txn.shared.core.bufs;
        // Where an older transaction still needs the content, it is frozen before the zeros.
        let known = txn.shared.heads.get(&block).is_some();
        let old = if known { bufs.get(block) } else { None };
        if let Some(old) = old {
            self.join(&old, Class::New)?;
        }
        let buffer = bufs.new_zeroed(block, validator)?;
        self.join(&buffer, Class::New)?;
        Ok(buffer)
    }

    /// A metadata block was freed: copies of it in the log are revoked, its buffer is dropped
    /// (once no older transaction needs it).
    ///
    /// # Errors
    /// [`FsError::Aborted`].
    pub fn forget(&self, block: u64) -> FsResult {
        let txn = self.txn()?;
        let shared = &txn.shared;
        let mut drop_now = true;
        let head = shared.heads.get(&block).map(|head| head.clone());
        if let Some(head) = head {
            let mut state = head.state.lock_nested();
            if state.dead {
                // Its content is home.
            } else if state.joined == Some(txn.tid) {
                state.freed = true;
                head.publish(&state);
                drop_now = false;
            } else {
                // Committing, or committed and not yet home: until this transaction commits, a
                // crash brings the older content back, so it must get home or stay in the log.
                drop_now = false;
                drop(state);
                txn.dropped.lock_nested().push(block);
            }
        }
        if drop_now {
            shared.core.bufs.forget(block);
        }
        // Also for a block the journal does not know (any more): the log may have a copy.
        if txn
            .revokes
            .insert(block)
            .is_some_and(|count| count % REVOKES_PER_CREDIT == 1)
        {
            txn.outstanding.fetch_add(1, Ordering::AcqRel);
        }
        Ok(())
    }

    /// Blocks to be given to the hooks when the transaction is durable.
    pub fn free_after_commit(&self, start: u64, len: u32) {
        if let Some(txn) = &self.txn {
            txn.freed.lock_nested().push(FreedRange { start, len });
        }
    }

    /// More credits in place; `false` where the caller must restart.
    ///
    /// # Errors
    /// [`FsError::Aborted`].
    pub fn extend(&self, credits: u32) -> FsResult<bool> {
        let txn = self.txn()?;
        if txn.locked.load(Ordering::Acquire) || !txn.reserve(credits, txn.shared.max_txn) {
            return Ok(false);
        }
        self.credits.set(self.credits.get().saturating_add(credits));
        Ok(true)
    }

    /// Ends this transaction's part and begins another, with `credits`; what was changed so far
    /// may be committed without what comes. After an error the handle can only be dropped.
    ///
    /// # Errors
    /// As `Journal::start`.
    pub fn restart(&mut self, credits: u32) -> FsResult {
        let Some(txn) = self.txn.take() else {
            return Err(FsError::Aborted);
        };
        let shared = txn.shared.clone();
        end(&txn, self.credits.replace(0));
        drop(txn);
        // The new handle's parts move over; what stays behind is an ended handle.
        let mut fresh = shared.start(credits)?;
        self.credits.set(fresh.credits.replace(0));
        self.txn = fresh.txn.take();
        Ok(())
    }

    /// Whether `n` more blocks can be changed.
    #[must_use]
    pub fn has_credits(&self, n: u32) -> bool {
        self.credits.get() >= n
    }

    /// Ends the handle of an operation with the operation's result. Where the device stopped it
    /// halfway, what it had changed is committed all the same: the file system is then marked as
    /// one with errors, for e2fsck.
    ///
    /// # Errors
    /// The operation's; else as [`Self::stop`].
    pub fn finish<T>(self, result: FsResult<T>) -> FsResult<T> {
        if let Err(error) = &result {
            self.note_failure(error);
        }
        let stopped = self.stop();
        result.and_then(|value| stopped.map(|()| value))
    }

    /// See [`Self::finish`].
    pub(crate) fn note_failure(&self, error: &FsError) {
        let halfway = matches!(
            error,
            FsError::Buf(_) | FsError::Data(_) | FsError::NoMemory
        );
        if let (true, true, Some(txn)) = (halfway, self.changed.get(), &self.txn) {
            log::error!("an operation ended halfway: {error}");
            txn.shared.core.note_error("operation ended halfway", 0, 0);
        }
    }

    /// Ends the handle; on a `sync` mount, waits for the commit.
    ///
    /// # Errors
    /// [`FsError::Aborted`].
    pub fn stop(mut self) -> FsResult {
        let Some(txn) = self.txn.take() else {
            return Err(FsError::Aborted);
        };
        end(&txn, self.credits.get());
        if txn.shared.core.opts.sync {
            return txn.shared.commit_wait(txn.tid);
        }
        if txn.shared.aborted.load(Ordering::Relaxed) {
            Err(txn.shared.core.refusal())
        } else {
            Ok(())
        }
    }
}

/// One handle of `txn` is over.
fn end(txn: &Txn, unused: u32) {
    txn.outstanding.fetch_sub(unused, Ordering::AcqRel);
    // Sequentially consistent with the commit thread, which first says `locked` and then looks
    // at `updates`: one of the two sees the other.
    if txn.updates.fetch_sub(1, Ordering::SeqCst) == 1 && txn.locked.load(Ordering::SeqCst) {
        let _state = txn.shared.state.lock();
        txn.shared.drained.notify_all();
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if let Some(txn) = self.txn.take() {
            end(&txn, self.credits.get());
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
