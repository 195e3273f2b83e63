//! Transactions: the jbd2 journal, and what stands for it on file systems without one.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`handle`](self) | handles: joining buffers, credits, revokes (`Handle`, `JournalWrite`) |
//! | `transaction` | a transaction, and what is known of each buffer (`Head`) |
//! | `commit` | commits, the commit thread, the log writer |
//! | `checkpoint` | writing committed blocks home, moving the log's tail |
//! | `bare` | commits in place, without a log |
//! | [`logfile`] | the journal's superblock, recovery |
//! | [`replay`] | scan, revoke, replay |
//! | [`io`] | where the journal is, bios in batches |
//!
//! # States of a transaction
//!
//! ```text
//! running    handles start and stop, buffers join; the youngest, at most one
//!    | commit= seconds old, fsync, full, or shutdown
//! locked     takes no new handle; waits until the open ones stop
//!    | the last handle stopped
//! committing its blocks are copied to the log (live, or frozen where the next transaction
//!    |       joined the block), then the commit record is written; at most one
//!    | the commit record is durable: waiters wake, freed blocks come back
//! committed  in the checkpoint list until its blocks are home; its log space is in use
//!    | written home (or logged again by a younger transaction), device flushed
//! gone       the tail of the log moves over it
//! ```
//!
//! Any error on the way aborts the journal: no change is taken any more, waiters get
//! [`FsError::Aborted`], the file system is read-only, `s_errno` is recorded. What had been
//! committed is replayed at the next mount; what had not was never written home.
//!
//! # What a buffer goes through
//!
//! A buffer is pinned in the cache from the moment it joins a transaction until that transaction
//! has committed; only then is it marked dirty, so that the cache may write it home.
//! A block that is freed is kept until the transaction that freed it has committed, because a
//! crash before that needs it.
//!
//! # Locking
//!
//! ```text
//! start, stop:       state
//! write, create:     head -> bufio (content)     head -> pool
//! commit:            log (over I/O) -> state; head -> content; state
//! checkpoint:        head; log (over I/O) -> state
//! ```
//! `state` has rank `JournalState`; heads and the lists of a transaction have rank `Counters`, so
//! that a handle can be used under the lock of a block group; `log`, the journal's superblock, is
//! held while I/O is awaited and has rank `Transaction`.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use blockstack::sync::{Condvar, Mutex, MutexGuard, Rank};
use blockstack::{BlkError, flush_wait};
use dashmap::DashMap;

use crate::core::Core;
use crate::error::{FsError, FsResult};
use crate::format::features::{Compat, Incompat, RoCompat};
use crate::format::jbd2::{Csum, LogGeometry, TagFormat, Tid, tid_geq};

mod bare;
mod checkpoint;
mod commit;
mod handle;
pub mod io;
pub mod logfile;
pub mod replay;
mod revoke;
mod transaction;

pub use handle::{Handle, JournalWrite};
pub use io::JournalExtent;
pub use logfile::{JournalError, Log};

use io::{Disk, JournalFile};
use transaction::{Head, Txn};

/// Blocks that a committed transaction freed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct FreedRange {
    /// First block.
    pub start: u64,
    /// Blocks.
    pub len: u32,
}

/// Who hears of commits. Called on the thread that commits, which may be one that waits for it and
/// holds what may be held over I/O; so none of it may start a handle or wait for a commit.
pub trait CommitHooks: Send + Sync {
    /// The transaction is durable; its freed blocks may be handed out again.
    fn committed(&self, tid: u32, freed: &[FreedRange]);
    /// The journal was aborted: nothing is committed any more. May be called on any thread.
    fn aborted(&self) {}
}

/// The order of writes at a commit without a journal, first to last.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
#[repr(u8)]
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

impl Class {
    const ALL: [Self; 4] = [Self::New, Self::Inodes, Self::Other, Self::Bitmaps];
}

/// Bytes of metadata a transaction may have in memory, whatever the journal's size.
const MAX_TXN_BYTES: usize = 64 << 20;

/// The journal. Dropping it without [`Journal::shutdown`] is what a crash looks like: nothing
/// more is written.
pub struct Journal {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// Whether the journal takes handles.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stop {
    No,
    /// No new handles; what runs is committed, then the threads end.
    Drain,
    /// The threads end.
    Now,
}

/// A committed transaction whose blocks may not be home.
struct Logged {
    txn: Arc<Txn>,
    /// Its first block in the log.
    start: u32,
}

struct State {
    running: Option<Arc<Txn>>,
    committing: Option<Arc<Txn>>,
    next_tid: Tid,
    /// Somebody is locking or committing a transaction.
    has_committer: bool,
    /// The youngest transaction that is durable.
    committed: Tid,
    /// The youngest transaction somebody wants durable.
    requested: Tid,
    /// Committed transactions, oldest first.
    checkpoint: VecDeque<Logged>,
    /// Where the next commit goes; moves when it is durable.
    head: u32,
    /// Where the log starts, as the superblock on disk says or said when it was not empty.
    tail: u32,
    /// The superblock on disk says where the log starts.
    tail_on_disk: bool,
    /// A handle waits for space, or the log is half full.
    space_wanted: bool,
    aborted: bool,
    /// `s_errno` is to be written.
    record_errno: bool,
    stop: Stop,
    hooks: Option<Arc<dyn CommitHooks>>,
}

/// What does not change while a log is in use.
struct Jbd2 {
    disk: Arc<Disk>,
    file: Arc<JournalFile>,
    geometry: LogGeometry,
    csum: Csum,
    format: TagFormat,
    uuid: [u8; 16],
    log: Mutex<Log>,
}

enum Mode {
    Jbd2(Box<Jbd2>),
    Bare(Arc<Disk>),
}

/// What handles and the threads share.
struct Shared {
    core: Arc<Core>,
    mode: Mode,
    block_size: usize,
    /// Blocks a transaction may have.
    max_txn: u32,
    interval: Duration,
    state: Mutex<State>,
    heads: DashMap<u64, Arc<Head>>,
    /// The state's `aborted`, for those without its lock.
    aborted: AtomicBool,
    /// For the commit thread: a request, a new transaction, a stop.
    commit_work: Condvar,
    /// For the commit thread: the last handle of a locked transaction stopped.
    drained: Condvar,
    /// For handles: the locked transaction is no longer the running one.
    unlocked: Condvar,
    /// For handles: the log may have space.
    space: Condvar,
    /// For waiters: a transaction is durable.
    done: Condvar,
    /// For the checkpoint thread.
    checkpoint_work: Condvar,
}

impl Journal {
    /// Stands for a journal where there is none: transactions end in writes in place, in an order
    /// that e2fsck can repair without questions.
    #[must_use]
    pub fn bare(core: Arc<Core>) -> Arc<Self> {
        let disk = Disk::new(core.dev.clone(), core.geo.block_size as usize);
        let max = MAX_TXN_BYTES / core.geo.block_size as usize;
        let mode = Mode::Bare(Arc::new(disk));
        Self::run(core, mode, u32::try_from(max).unwrap_or(u32::MAX), 1, None)
    }

    /// Takes a recovered log into use, with the features the file system asks for.
    ///
    /// Where fast commits wait ([`Log::recover`]), its first transaction is the one they belong to.
    ///
    /// The caller sets `needs_recovery` in the superblock of the file system, durably, before the
    /// first handle, and clears it after [`Journal::shutdown`].
    ///
    /// # Errors
    /// [`JournalError::NeedsRecovery`] where the log is not empty; a thread could not be started.
    pub fn open(core: Arc<Core>, mut log: Log) -> Result<Arc<Self>, JournalError> {
        if log.needs_recovery() && !log.has_fast_commits {
            return Err(JournalError::NeedsRecovery);
        }
        log.adopt_features(
            core.geo.ro_compat.contains(RoCompat::METADATA_CSUM),
            core.geo.incompat.contains(Incompat::BIT64),
            core.geo.compat.contains(Compat::FAST_COMMIT) || log.has_fast_commits,
        );
        let start = log.sb.start();
        if start.is_some() {
            log.write_superblock()?;
        }
        let geometry = log.sb.geometry();
        let bytes = MAX_TXN_BYTES / core.geo.block_size as usize;
        let max = (geometry.len() / 4).min(u32::try_from(bytes).unwrap_or(u32::MAX));
        let next = log.sb.sequence().wrapping_add(u32::from(start.is_none()));
        let mode = Mode::Jbd2(Box::new(Jbd2 {
            disk: log.disk.clone(),
            file: log.file.clone(),
            geometry,
            csum: log.sb.csum(),
            format: log.sb.tag_format(),
            uuid: log.sb.uuid(),
            log: Mutex::new(Rank::Transaction, log),
        }));
        let journal = Self::run(core, mode, max, next, start);
        if journal.is_aborted() {
            Err(JournalError::Thread)
        } else {
            Ok(journal)
        }
    }

    /// `start` is where the superblock on disk says that the log starts.
    fn run(
        core: Arc<Core>,
        mode: Mode,
        max_txn: u32,
        next_tid: Tid,
        start: Option<u32>,
    ) -> Arc<Self> {
        let first = match &mode {
            Mode::Jbd2(jbd2) => start.unwrap_or(jbd2.geometry.first),
            Mode::Bare(_) => 0,
        };
        let has_log = matches!(mode, Mode::Jbd2(_));
        let state = State {
            running: None,
            committing: None,
            has_committer: false,
            next_tid,
            committed: next_tid.wrapping_sub(1),
            requested: next_tid.wrapping_sub(1),
            checkpoint: VecDeque::new(),
            head: first,
            tail: first,
            tail_on_disk: start.is_some(),
            space_wanted: false,
            aborted: false,
            record_errno: false,
            stop: Stop::No,
            hooks: None,
        };
        let shared = Arc::new(Shared {
            block_size: core.geo.block_size as usize,
            interval: Duration::from_secs(u64::from(core.opts.commit_secs.max(1))),
            core,
            mode,
            max_txn,
            state: Mutex::new(Rank::JournalState, state),
            heads: DashMap::new(),
            aborted: AtomicBool::new(false),
            commit_work: Condvar::new(),
            drained: Condvar::new(),
            unlocked: Condvar::new(),
            space: Condvar::new(),
            done: Condvar::new(),
            checkpoint_work: Condvar::new(),
        });
        let mut threads = Vec::new();
        let mut spawn = |name: &str, body: fn(&Arc<Shared>)| {
            let thread_shared = shared.clone();
            let thread = std::thread::Builder::new().name(name.to_owned());
            match thread.spawn(move || body(&thread_shared)) {
                Ok(thread) => threads.push(thread),
                Err(error) => shared.abort(&format!("cannot start thread {name}: {error}")),
            }
        };
        spawn("journal", Shared::commit_loop);
        if has_log {
            spawn("checkpoint", Shared::checkpoint_loop);
        }
        Arc::new(Self {
            shared,
            threads: Mutex::new(Rank::Mount, threads),
        })
    }

    /// Sets who hears of commits.
    pub fn set_commit_hooks(&self, hooks: Arc<dyn CommitHooks>) {
        self.shared.state.lock().hooks = Some(hooks);
    }

    /// Begins a handle that may join `credits` blocks. May wait for a commit or for log space, so
    /// nothing that another handle's holder could need may be held. A thread has one at a time.
    ///
    /// # Errors
    /// [`FsError::Aborted`], [`FsError::ReadOnly`], or [`FsError::NoSpace`] for more credits than
    /// a transaction can have.
    pub fn start(self: &Arc<Self>, credits: u32) -> FsResult<Handle> {
        self.shared.start(credits)
    }

    /// Most credits a handle can have.
    #[must_use]
    pub fn max_credits(&self) -> u32 {
        self.shared.max_txn
    }

    /// Waits until transaction `tid` is durable; returns at once where it is. Data written to the
    /// device before the call is durable, too, only if there was something to commit: see
    /// [`Self::commit_or_flush`]. Not with an open handle.
    ///
    /// # Errors
    /// [`FsError::Aborted`].
    pub fn commit_wait(&self, tid: u32) -> FsResult {
        self.shared.commit_wait(tid)
    }

    /// As [`Self::commit_wait`], and data written to the device before the call is durable as well
    /// when it returns: by the commit's own flush where there is one to come, else by one more.
    ///
    /// # Errors
    /// [`FsError::Aborted`], or the flush's.
    pub fn commit_or_flush(&self, tid: u32) -> FsResult {
        // A commit that has begun may have flushed already.
        let will_flush = {
            let state = self.shared.state.lock();
            state.running.as_ref().is_some_and(|txn| txn.tid == tid)
        };
        self.shared.commit_wait(tid)?;
        if !will_flush && self.shared.core.opts.barrier {
            flush_wait(&self.shared.core.dev)?;
        }
        Ok(())
    }

    /// The youngest transaction that may have changed anything so far.
    #[must_use]
    pub fn youngest(&self) -> u32 {
        let state = self.shared.state.lock();
        let youngest = state.running.as_ref().or(state.committing.as_ref());
        youngest.map_or(state.committed, |txn| txn.tid)
    }

    /// Starts to commit `tid`.
    pub fn start_commit(&self, tid: u32) {
        let mut state = self.shared.state.lock();
        self.shared.request(&mut state, tid);
    }

    /// Waits until all is durable, data written to the device before included.
    ///
    /// # Errors
    /// [`FsError::Aborted`], or the flush's.
    pub fn commit_all(&self) -> FsResult {
        self.commit_or_flush(self.youngest())
    }

    /// Commits, writes everything home and marks the log empty; takes no handle from then on.
    ///
    /// Crash windows: until the log is marked empty, all of it is replayed; afterwards all of it
    /// is home and flushed. `needs_recovery` is cleared only after this.
    ///
    /// # Errors
    /// [`FsError::Aborted`]; the log then keeps what it has.
    pub fn shutdown(&self) -> FsResult {
        self.stop(Stop::Drain);
        let res = self.shared.finish_log();
        self.shared.state.lock().hooks = None;
        res
    }

    /// Ends without committing anything more, as a crash would, and without a record of it.
    pub(crate) fn stop_now(&self) {
        self.stop(Stop::Now);
    }

    fn stop(&self, how: Stop) {
        {
            let mut state = self.shared.state.lock();
            if state.stop == Stop::No {
                state.stop = how;
            }
            self.shared.wake_all();
        }
        for thread in self.threads.lock().drain(..) {
            if thread.join().is_err() {
                log::error!("journal: a thread panicked");
                self.shared.abort("a thread panicked");
            }
        }
    }

    /// Takes no further change and commits nothing more; the file system is read-only then.
    pub fn abort(&self, why: &str) {
        self.shared.abort(why);
    }

    /// As [`Self::abort`], where nothing is wrong: no error is recorded. What was committed is
    /// replayed at the next mount.
    pub(crate) fn halt(&self) {
        self.shared.halt();
    }

    /// Whether there is a log: what is committed then stands there whole or not at all.
    #[must_use]
    pub fn has_log(&self) -> bool {
        matches!(self.shared.mode, Mode::Jbd2(_))
    }

    /// Whether the journal was aborted.
    #[must_use]
    pub fn is_aborted(&self) -> bool {
        self.shared.aborted.load(Ordering::Acquire)
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.stop(Stop::Now);
        // Breaks the circle of the journal and its transactions.
        let mut state = self.shared.state.lock();
        state.running = None;
        state.committing = None;
        state.checkpoint.clear();
        state.hooks = None;
    }
}

impl Shared {
    fn wake_all(&self) {
        self.commit_work.notify_all();
        self.drained.notify_all();
        self.unlocked.notify_all();
        self.space.notify_all();
        self.done.notify_all();
        self.checkpoint_work.notify_all();
    }

    /// Asks for the commit of `tid`.
    fn request(&self, state: &mut MutexGuard<'_, State>, tid: Tid) {
        let is_running = state.running.as_ref().is_some_and(|txn| txn.tid == tid);
        if is_running && !tid_geq(state.requested, tid) {
            state.requested = tid;
            self.commit_work.notify_one();
        }
    }

    fn commit_wait(&self, tid: Tid) -> FsResult {
        let mut state = self.state.lock();
        loop {
            let pending = |txn: &Option<Arc<Txn>>| txn.as_ref().is_some_and(|t| t.tid == tid);
            if !pending(&state.running) && !pending(&state.committing) {
                return if state.aborted && !tid_geq(state.committed, tid) {
                    Err(self.core.refusal())
                } else {
                    Ok(())
                };
            }
            if state.aborted || state.stop == Stop::Now {
                return Err(self.core.refusal());
            }
            if self.aborted.load(Ordering::Acquire) {
                // Whoever aborts is about to say so in the state.
                self.done.wait(&mut state);
                continue;
            }
            match state.running.clone() {
                Some(txn) if txn.tid == tid && !state.has_committer => {
                    state = self.commit_running(state, &txn);
                }
                _ => {
                    // Somebody has begun an older one, or this one; if its end brings nobody
                    // who waits, the commit thread must know.
                    self.request(&mut state, tid);
                    self.done.wait(&mut state);
                }
            }
        }
    }

    fn abort(&self, why: &str) {
        if self.aborted.swap(true, Ordering::AcqRel) {
            return;
        }
        log::error!("journal aborted: {why}");
        self.core.note_error("journal aborted", 0, 0);
        self.core.make_read_only("the journal was aborted");
        // Who waits finds a file system that is read-only already.
        self.take_nothing(true);
    }

    fn halt(&self) {
        if !self.aborted.swap(true, Ordering::AcqRel) {
            self.take_nothing(false);
        }
    }

    fn take_nothing(&self, record_errno: bool) {
        let hooks = self.state.lock().hooks.clone();
        if let Some(hooks) = hooks {
            hooks.aborted();
        }
        let mut state = self.state.lock();
        state.aborted = true;
        state.record_errno = record_errno;
        self.wake_all();
    }

    fn abort_on(&self, what: &str, error: BlkError) -> FsError {
        self.abort(&format!("{what}: {error}"));
        FsError::Aborted
    }
}
