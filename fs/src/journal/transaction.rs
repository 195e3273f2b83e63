//! A transaction, and what the journal knows of a buffer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

use blockstack::Buf;
use blockstack::sync::{Mutex, Rank};
use bufio::Buffer;

use super::revoke::RevokeTable;
use super::{Class, FreedRange, Shared};
use crate::format::jbd2::Tid;

/// One transaction, from its first handle until its blocks are home.
pub(super) struct Txn {
    pub(super) tid: Tid,
    pub(super) shared: Arc<Shared>,
    pub(super) started: Instant,
    /// Open handles. Grows only under the state lock, and not once `locked`.
    pub(super) updates: AtomicU32,
    /// Blocks joined, and blocks open handles may still join.
    pub(super) outstanding: AtomicU32,
    /// Takes no more handles.
    pub(super) locked: AtomicBool,
    /// While running: what was joined. After the commit: what may not be home yet.
    pub(super) heads: Mutex<Vec<Arc<Head>>>,
    pub(super) revokes: RevokeTable,
    /// Blocks freed that older transactions still need; forgotten at the end of the commit.
    pub(super) dropped: Mutex<Vec<u64>>,
    pub(super) freed: Mutex<Vec<FreedRange>>,
}

impl Txn {
    pub(super) fn new(tid: Tid, shared: Arc<Shared>) -> Arc<Self> {
        Arc::new(Self {
            tid,
            shared,
            started: Instant::now(),
            updates: AtomicU32::new(0),
            outstanding: AtomicU32::new(0),
            locked: AtomicBool::new(false),
            heads: Mutex::new(Rank::Counters, Vec::new()),
            revokes: RevokeTable::new(),
            dropped: Mutex::new(Rank::Counters, Vec::new()),
            freed: Mutex::new(Rank::Counters, Vec::new()),
        })
    }

    /// Adds credits unless that would make the transaction larger than `max`.
    pub(super) fn reserve(&self, credits: u32, max: u32) -> bool {
        self.outstanding
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| {
                now.checked_add(credits).filter(|&sum| sum <= max)
            })
            .is_ok()
    }
}

/// What is left to do for the committing transaction about a block that the running one joined.
pub(super) enum OlderCopy {
    /// The content as it was; not yet in the log.
    Frozen(Buf),
    /// It is in the log.
    Done,
    /// The committing transaction freed the block: nothing to log.
    Freed,
}

pub(super) struct HeadState {
    /// Held, and pinned once for each transaction that has it, while joined.
    pub(super) buf: Option<Buffer>,
    /// The youngest transaction that has the block, running or committing.
    pub(super) joined: Option<Tid>,
    /// `joined` is committing and has put the content into the log.
    pub(super) copied: bool,
    /// `joined` freed the block.
    pub(super) freed: bool,
    /// The committing transaction, where `joined` is the running one.
    pub(super) older: Option<(Tid, OlderCopy)>,
    /// The youngest committed transaction whose copy of the block may not be home.
    pub(super) checkpoint: Option<Tid>,
    /// No longer in the table; whoever still has it looks again.
    pub(super) dead: bool,
}

/// What the journal knows of a block. In the table as long as it is joined or to be checkpointed.
pub(super) struct Head {
    pub(super) block: u64,
    /// `joined` for [`Self::is_joined`]; [`NOT_JOINED`] also where it was freed.
    tid: AtomicU64,
    class: AtomicU8,
    pub(super) state: Mutex<HeadState>,
}

const NOT_JOINED: u64 = u64::MAX;

impl Head {
    pub(super) fn new(block: u64) -> Arc<Self> {
        Arc::new(Self {
            block,
            tid: AtomicU64::new(NOT_JOINED),
            class: AtomicU8::new(Class::New as u8),
            state: Mutex::new(
                Rank::Counters,
                HeadState {
                    buf: None,
                    joined: None,
                    copied: false,
                    freed: false,
                    older: None,
                    checkpoint: None,
                    dead: false,
                },
            ),
        })
    }

    /// Whether `tid`, which is running, has the block: nothing to do before a change.
    pub(super) fn is_joined(&self, tid: Tid) -> bool {
        self.tid.load(Ordering::Acquire) == u64::from(tid)
    }

    /// To be called with the state locked.
    pub(super) fn publish(&self, state: &HeadState) {
        let tid = state
            .joined
            .filter(|_| !state.freed)
            .map_or(NOT_JOINED, u64::from);
        self.tid.store(tid, Ordering::Release);
    }

    pub(super) fn class(&self) -> u8 {
        self.class.load(Ordering::Relaxed)
    }

    /// The last word on the class wins, but a block that is new stays so within a transaction.
    pub(super) fn set_class(&self, class: Class) {
        self.class.store(class as u8, Ordering::Relaxed);
    }

    /// Copies what `tid`, which is committing, has to write; `false` where there is nothing.
    pub(super) fn copy_for(&self, tid: Tid, out: &mut [u8]) -> bool {
        let mut state = self.state.lock_nested();
        if state.joined == Some(tid) {
            if state.freed {
                return false;
            }
            let Some(buf) = &state.buf else { return false };
            buf.copy_prepared(out);
            state.copied = true;
            return true;
        }
        match &mut state.older {
            Some((older, copy)) if *older == tid => {
                match std::mem::replace(copy, OlderCopy::Done) {
                    OlderCopy::Frozen(frozen) => {
                        out.copy_from_slice(&frozen);
                        true
                    }
                    OlderCopy::Done => false,
                    OlderCopy::Freed => {
                        *copy = OlderCopy::Freed;
                        false
                    }
                }
            }
            _ => false,
        }
    }

    /// Whether `tid`, which is committing, has something to write that it has not copied yet.
    pub(super) fn has_copy_for(&self, tid: Tid) -> bool {
        let state = self.state.lock_nested();
        if state.joined == Some(tid) {
            return !state.freed && !state.copied;
        }
        matches!(&state.older, Some((older, OlderCopy::Frozen(_))) if *older == tid)
    }
}
