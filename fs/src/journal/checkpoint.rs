//! Checkpoints: committed blocks go home, the tail of the log follows.
//!
//! # The order of steps, and what a crash between them leaves
//!
//! 1. The blocks of the oldest transactions are written home. A block that a running or committing
//!    transaction has joined is not: its transaction is awaited, after whose commit the younger
//!    copy counts. *Crash: all of them are replayed; what is home already is written again.*
//! 2. The device is flushed. *Crash: the same.*
//! 3. The superblock says where the log starts now, with FUA. *Crash: the old or the new tail;
//!    both are right.*
//! 4. Only then may the blocks between the old and the new tail be written again.

use std::sync::Arc;

use blockstack::flush_wait;
use blockstack::sync::MutexGuard;
use bufio::Buffer;

use super::transaction::{Head, Txn};
use super::{Jbd2, Mode, Shared, State, Stop};
use crate::error::{FsError, FsResult};
use crate::format::jbd2::{Tid, tid_geq, tid_gt};

/// Buffers written home at once.
const BATCH: usize = 1024;

/// How far a checkpoint goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Goal {
    /// Three quarters of the log are free.
    Room,
    All,
}

impl Shared {
    /// Log blocks the largest transaction can need.
    fn largest(&self, jbd2: &Jbd2) -> u32 {
        let blocks = jbd2.blocks_for(self.max_txn as usize, 0, self.block_size);
        // Some for handles that ask for too few credits, as far as the log has them.
        let spare = (jbd2.geometry.len() / 32).min(64);
        u32::try_from(blocks)
            .unwrap_or(u32::MAX)
            .saturating_add(spare)
    }

    /// Log blocks that are free when the committing transaction is in the log.
    fn free_after_commit(&self, jbd2: &Jbd2, state: &State) -> u32 {
        let free = jbd2.geometry.free(state.head, state.tail);
        let committing = state.committing.as_ref().map_or(0, |txn| {
            let blocks = txn.outstanding.load(std::sync::atomic::Ordering::Acquire);
            jbd2.blocks_for(blocks as usize, 0, self.block_size)
        });
        free.saturating_sub(u32::try_from(committing).unwrap_or(u32::MAX))
    }

    /// Whether the running transaction can become as large as any and still fit the log.
    pub(super) fn has_space(&self, state: &State) -> bool {
        match &self.mode {
            Mode::Bare(_) => true,
            Mode::Jbd2(jbd2) => self.free_after_commit(jbd2, state) >= self.largest(jbd2),
        }
    }

    /// Waits until a checkpoint or a commit may have made space.
    pub(super) fn wait_for_space(&self, state: &mut MutexGuard<'_, State>) {
        state.space_wanted = true;
        self.checkpoint_work.notify_all();
        self.space.wait(state);
    }

    /// Starts a checkpoint where the log is half full, so that handles seldom wait for one.
    pub(super) fn want_checkpoint(&self, state: &mut MutexGuard<'_, State>) {
        if let Mode::Jbd2(jbd2) = &self.mode {
            if jbd2.geometry.free(state.head, state.tail) < jbd2.geometry.len() / 2 {
                state.space_wanted = true;
            }
            if state.space_wanted {
                self.checkpoint_work.notify_all();
            }
        }
    }

    /// The checkpoint thread.
    pub(super) fn checkpoint_loop(self: &Arc<Self>) {
        let Mode::Jbd2(jbd2) = &self.mode else { return };
        let mut state = self.state.lock();
        loop {
            if state.stop != Stop::No {
                return;
            }
            if state.aborted || !state.space_wanted {
                self.checkpoint_work.wait(&mut state);
                continue;
            }
            state.space_wanted = false;
            drop(state);
            // Errors have aborted the journal.
            let _aborted = self.checkpoint(jbd2, Goal::Room).is_err();
            state = self.state.lock();
            self.space.notify_all();
        }
    }

    /// Steps 1 to 3, again and again until the goal is reached or nothing is left.
    fn checkpoint(&self, jbd2: &Jbd2, goal: Goal) -> FsResult {
        loop {
            let logged = self.oldest(jbd2, goal);
            let blocking = self.write_transactions_home(&logged)?;
            self.drop_finished();
            self.move_tail(jbd2)?;
            match blocking {
                Some(tid) => self.wait_for_commit(tid)?,
                None => return Ok(()),
            }
        }
    }

    /// The transactions to be written home for the goal, oldest first.
    fn oldest(&self, jbd2: &Jbd2, goal: Goal) -> Vec<Arc<Txn>> {
        let state = self.state.lock();
        let mut starts = state.checkpoint.iter().map(|logged| logged.start).skip(1);
        let enough = |start| jbd2.geometry.free(state.head, start) >= jbd2.geometry.len() / 4 * 3;
        let count = match goal {
            Goal::All => state.checkpoint.len(),
            Goal::Room if enough(state.tail) => 0,
            Goal::Room => starts
                .position(enough)
                .map_or(state.checkpoint.len(), |at| at + 1),
        };
        state
            .checkpoint
            .iter()
            .take(count)
            .map(|logged| logged.txn.clone())
            .collect()
    }

    /// Step 1; gives the youngest transaction that has to commit before all are home.
    fn write_transactions_home(&self, logged: &[Arc<Txn>]) -> FsResult<Option<Tid>> {
        let mut due: Vec<(Arc<Head>, Tid)> = Vec::new();
        let mut blocking: Option<Tid> = None;
        for txn in logged {
            for head in txn.heads.lock_nested().iter() {
                let state = head.state.lock_nested();
                if state.checkpoint != Some(txn.tid) {
                    continue;
                }
                match state.joined {
                    None => due.push((head.clone(), txn.tid)),
                    Some(tid) => {
                        blocking =
                            Some(blocking.map_or(tid, |b| if tid_gt(tid, b) { tid } else { b }));
                    }
                }
            }
        }
        due.sort_unstable_by_key(|(head, _)| head.block);
        for batch in due.chunks(BATCH) {
            self.write_home(batch)?;
        }
        // Whatever was joined meanwhile was skipped.
        for (head, tid) in &due {
            let mut state = head.state.lock_nested();
            if state.checkpoint != Some(*tid) {
                continue;
            }
            match state.joined {
                None => {
                    state.checkpoint = None;
                    state.dead = true;
                    self.heads.remove(&head.block);
                }
                Some(tid) => {
                    blocking = Some(blocking.map_or(tid, |b| if tid_gt(tid, b) { tid } else { b }));
                }
            }
        }
        Ok(blocking)
    }

    fn write_home(&self, batch: &[(Arc<Head>, Tid)]) -> FsResult {
        let bufs = &self.core.bufs;
        // What is no longer cached was written home and evicted, or it was freed.
        let cached = |(head, _): &(Arc<Head>, Tid)| bufs.get(head.block);
        let buffers: Vec<Buffer> = batch.iter().filter_map(cached).collect();
        let res = bufs.write_buffers(&buffers);
        if res.is_err() || bufs.is_failed() {
            self.abort("a committed block cannot be written home");
            return Err(FsError::Aborted);
        }
        Ok(())
    }

    /// Takes transactions that are home off the front of the list.
    fn drop_finished(&self) {
        loop {
            let Some(txn) = self
                .state
                .lock()
                .checkpoint
                .front()
                .map(|logged| logged.txn.clone())
            else {
                return;
            };
            // A block of it that is not home has its number; no block can get it any more.
            let mut heads = txn.heads.lock_nested();
            heads.retain(|head| head.state.lock_nested().checkpoint == Some(txn.tid));
            if !heads.is_empty() {
                return;
            }
            drop(heads);
            self.state.lock().checkpoint.pop_front();
        }
    }

    /// Steps 2 and 3.
    fn move_tail(&self, jbd2: &Jbd2) -> FsResult {
        let mut log = jbd2.log.lock();
        let (tid, start) = {
            let state = self.state.lock();
            let oldest = state
                .checkpoint
                .front()
                .map(|logged| (logged.txn.tid, logged.start));
            let next = state.committing.as_ref().or(state.running.as_ref());
            let (tid, start) =
                oldest.unwrap_or_else(|| (next.map_or(state.next_tid, |txn| txn.tid), state.head));
            if start == state.tail || !state.tail_on_disk {
                return Ok(());
            }
            (tid, start)
        };
        flush_wait(&jbd2.disk.dev)
            .map_err(|error| self.abort_on("flush for a checkpoint", error))?;
        log.write_tail(tid, Some(start))
            .map_err(|error| self.abort_on("journal superblock", error))?;
        drop(log);
        self.state.lock().tail = start;
        self.space.notify_all();
        Ok(())
    }

    fn wait_for_commit(&self, tid: Tid) -> FsResult {
        let mut state = self.state.lock();
        while !tid_geq(state.committed, tid) {
            if state.aborted || state.stop != Stop::No {
                return Err(FsError::Aborted);
            }
            self.request(&mut state, tid);
            self.done.wait(&mut state);
        }
        Ok(())
    }

    /// The end, when the threads are gone: everything goes home, the log is marked empty.
    pub(super) fn finish_log(&self) -> FsResult {
        if self.state.lock().aborted {
            return Err(self.core.refusal());
        }
        let Mode::Jbd2(jbd2) = &self.mode else {
            return Ok(flush_wait(&self.core.dev)?);
        };
        self.checkpoint(jbd2, Goal::All)?;
        flush_wait(&jbd2.disk.dev).map_err(|error| self.abort_on("last flush", error))?;
        let (next, head) = {
            let state = self.state.lock();
            (state.next_tid, state.head)
        };
        let mut log = jbd2.log.lock();
        log.write_end(next, head)
            .map_err(|error| self.abort_on("journal superblock", error))?;
        drop(log);
        self.state.lock().tail_on_disk = false;
        Ok(())
    }
}
