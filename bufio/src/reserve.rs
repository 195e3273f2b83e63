//! Memory kept back, and the hold contract that makes it enough.
//!
//! dm-bufio's rule: at most one thread holds up to `reserved` buffers, all others at most one each.
//! Then a thread that finds no memory always gets some in the end: from what others release, or
//! from the reserve. A client with `strict_holds` counts holds and, in debug builds, panics on a
//! thread that breaks the rule.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use blockstack::sync::prim::atomic::{self, AtomicUsize, Ordering};
use blockstack::sync::prim::thread::{self, ThreadId};
use blockstack::sync::{Condvar, Mutex, Rank};
use blockstack::{BlkError, Buf, PagePool};

use crate::cache::Cache;

/// Buffers of one block, filled again by those that are freed.
pub(crate) struct Reserve {
    wanted: usize,
    missing: AtomicUsize,
    kept: Mutex<Kept>,
    back: Condvar,
    waiting: AtomicUsize,
}

struct Kept {
    bufs: Vec<Buf>,
    /// Counts what came free while somebody watched.
    freed: u64,
}

/// Sees what comes free from its making on.
pub(crate) struct Watch<'a> {
    reserve: &'a Reserve,
    seen: u64,
}

impl Reserve {
    pub(crate) fn new(pool: &PagePool, wanted: usize, len: usize) -> Result<Self, BlkError> {
        let bufs = (0..wanted)
            .map(|_| pool.alloc(len))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            wanted,
            missing: AtomicUsize::new(0),
            kept: Mutex::new(Rank::Pool, Kept { bufs, freed: 0 }),
            back: Condvar::new(),
            waiting: AtomicUsize::new(0),
        })
    }

    pub(crate) fn take(&self) -> Option<Buf> {
        let buf = self.kept.lock_nested().bufs.pop()?;
        self.missing.fetch_add(1, Ordering::Release);
        Some(buf)
    }

    /// Takes one, waiting for it.
    pub(crate) fn take_wait(&self) -> Buf {
        loop {
            if let Some(buf) = self.take() {
                return buf;
            }
            let watch = self.watch();
            if let Some(buf) = self.take() {
                return buf;
            }
            watch.wait_free();
        }
    }

    /// Keeps `buf` where one is missing, else lets it go back to its pool. Wakes who waits for
    /// either.
    pub(crate) fn give(&self, buf: Buf) {
        if self.missing.load(Ordering::Acquire) > 0 {
            let mut kept = self.kept.lock_nested();
            if kept.bufs.len() < self.wanted {
                kept.bufs.push(buf);
                self.missing.fetch_sub(1, Ordering::Release);
            }
        } else {
            drop(buf);
        }
        self.wake();
    }

    /// Memory, or a buffer that could be evicted, came free.
    pub(crate) fn wake(&self) {
        // Pairs with the fence of `watch`: either the watcher is seen here, or what came free is
        // seen by the look that the watcher takes next.
        atomic::fence(Ordering::SeqCst);
        if self.waiting.load(Ordering::Relaxed) > 0 {
            self.kept.lock_nested().freed += 1;
            self.back.notify_all();
        }
    }

    /// Begins to watch; the caller then looks once more before it waits.
    pub(crate) fn watch(&self) -> Watch<'_> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        atomic::fence(Ordering::SeqCst);
        let seen = self.kept.lock_nested().freed;
        Watch {
            reserve: self,
            seen,
        }
    }
}

impl Watch<'_> {
    /// Sleeps until something came free.
    pub(crate) fn wait_free(self) {
        let mut kept = self.reserve.kept.lock_nested();
        while kept.freed == self.seen {
            self.reserve.back.wait(&mut kept);
        }
    }

    /// As [`Self::wait_free`], at most for `timeout`.
    pub(crate) fn wait(self, timeout: Duration) {
        let mut kept = self.reserve.kept.lock_nested();
        if kept.freed == self.seen {
            self.reserve.back.wait_for(&mut kept, timeout);
        }
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.reserve.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Who holds what, of a strict client.
pub(crate) struct Holds {
    by_thread: Mutex<HashMap<ThreadId, Vec<u64>>>,
    reserved: usize,
}

impl Holds {
    pub(crate) fn new(reserved: usize) -> Self {
        Self {
            by_thread: Mutex::new(Rank::Pool, HashMap::new()),
            reserved: reserved.max(1),
        }
    }

    fn enter(&self, block: u64) {
        let thread = thread::current().id();
        let mut by_thread = self.by_thread.lock_nested();
        let distinct = |blocks: &[u64]| {
            let mut blocks = blocks.to_vec();
            blocks.sort_unstable();
            blocks.dedup();
            blocks.len()
        };
        let mine = by_thread.entry(thread).or_default();
        mine.push(block);
        let count = distinct(mine);
        let others = by_thread
            .iter()
            .filter(|(other, _)| **other != thread)
            .any(|(_, blocks)| distinct(blocks) > 1);
        // Not the lock's: the panic must leave it usable for the drops that follow.
        let broken = count > self.reserved || (count > 1 && others);
        drop(by_thread);
        debug_assert!(
            !broken,
            "thread holds {count} buffers, {} reserved, another holds several: {others}",
            self.reserved
        );
    }

    fn leave(&self, thread: ThreadId, block: u64) {
        let mut by_thread = self.by_thread.lock_nested();
        if let Some(blocks) = by_thread.get_mut(&thread) {
            if let Some(at) = blocks.iter().position(|&other| other == block) {
                blocks.swap_remove(at);
            }
            if blocks.is_empty() {
                by_thread.remove(&thread);
            }
        }
    }
}

/// One hold of a strict client; clones of a buffer share it.
pub(crate) struct Ticket {
    cache: Arc<Cache>,
    thread: ThreadId,
    block: u64,
}

impl Ticket {
    pub(crate) fn new(cache: &Arc<Cache>, block: u64) -> Arc<Self> {
        let ticket = Arc::new(Self {
            cache: cache.clone(),
            thread: thread::current().id(),
            block,
        });
        if cfg!(debug_assertions) {
            cache.holds.enter(block);
        }
        ticket
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if cfg!(debug_assertions) {
            self.cache.holds.leave(self.thread, self.block);
        }
        self.cache.reserve.wake();
    }
}
