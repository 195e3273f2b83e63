//! Who reads `/dev/fuse`.
//!
//! A wake-up of a thread on another processor costs more than most operations, so a request is
//! answered by the thread that read it, and as few threads as configured (the *loops*) read at a
//! time. The others stand by. When a reader has to wait for anything (a block not cached, a commit,
//! a lock), one that stands by takes its place, so that nothing waits behind it:
//!
//! ```text
//! A: read -> lookup -> answered -> read -> fsync -> waits for the commit
//! B: stands by ..............................-> read -> getattr -> answered -> read
//! A:                                             ... answered -> stands by
//! ```
//!
//! A thread stands by inside the handler of its last request, which is answered by then. Threads
//! that never had a request yet wait in the kernel; they come here with their first.
//!
//! A thread that sleeps in the kernel must be woken for the next request, which takes longer than
//! most requests. While they come quickly one after the other, the reader therefore looks for the
//! next one for some microseconds before it goes to sleep. While they do not, it does not.
//!
//! # The companion
//!
//! While a single client sends one request after the other, one special thread reads: see
//! [`super::follow`] for why. It waits in `poll`, for a few milliseconds at most, so that it does not
//! wait in the kernel's `read`. What it must not do is hold up requests where it gets no processor.
//! So the turn is given only where there are processors to spare, and goes back to an ordinary
//! reader when
//!
//! - the next request comes from somebody else, or does not come soon, or much data comes;
//! - the companion has to wait for anything;
//! - the thread that gave it the turn, and looks every [`WATCH`], sees that it did not get on since
//!   it looked last. Then no companion reads for a while, twice as long each time.
//!
//! ```text
//! A: getattr -> answered, gives the turn ---- watches ---- watches: no progress -> read -> ...
//! C: ........................-> read -> lookup -> (preempted by a compiler) ... answered -> stands by
//! ```
//!
//! What the companion holds then, an inode's lock or a handle of the journal, is late by [`WATCH`];
//! and where the system does not allow to raise it again (it does for root), by what the scheduler
//! takes to give it the rest of its request, some tenths of a second at worst.
//!
//! When the mount ends, reading fails for the thread that reads; its end wakes all others.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use blockstack::sched::{self, Lowered};
use blockstack::sync::{Condvar, Mutex, MutexGuard, Rank, WaitHook, set_wait_hook};

use super::follow::Follow;

/// How long a reader looks for the next request, and how soon one must come to be looked for.
const LOOK: Duration = Duration::from_micros(50);
/// Requests that came soon, from which on the next is looked for.
const SOON: u32 = 3;
/// Most of them that count, so that a pause is noticed soon.
const SOON_MAX: u32 = 8;

/// How often it is looked whether the companion gets on.
const WATCH: Duration = Duration::from_millis(4);
/// Requests in that time from which on it does: a tenth of what it does where nobody disturbs it.
const GETS_ON: u64 = 20;
/// How long no companion reads after one that did not get on: twice as long each time in a row.
const LEFT_ALONE: Duration = Duration::from_millis(32);
const LEFT_ALONE_MAX: Duration = Duration::from_secs(4);
/// A turn that lasted so long tells that it is fine again.
const LONG_TURN: Duration = Duration::from_millis(250);
/// How long the companion waits for the next request.
const COMPANION_WAIT: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 10_000_000,
};

struct State {
    /// Threads that read or work, neither waiting nor standing by. With the companion, while it has
    /// the turn.
    active: usize,
    standing_by: usize,
    /// Threads that had a request. The others may still be in the kernel's `read`.
    seen: usize,
    companion: Companion,
    companion_thread: Option<Lowered>,
    /// Until when no companion reads, and how long that was made.
    left_alone: Option<(Instant, Duration)>,
    /// When the companion was given the turn last, and what [`Gate::begun`] was then.
    turn_since: Instant,
    turn_begun: u64,
    closing: bool,
}

impl State {
    /// After a turn in which the companion did not get on.
    fn leave_alone(&mut self) {
        let before = self.left_alone.map_or(Duration::ZERO, |(_, long)| long);
        let long = (before * 2).clamp(LEFT_ALONE, LEFT_ALONE_MAX);
        self.left_alone = Some((Instant::now() + long, long));
    }
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Companion {
    /// There cannot be one: a single processor, several loops, or the system refused.
    Never,
    /// No thread became it yet.
    None,
    /// It is about to stand by, or still busy with its last request.
    Away,
    StandsBy,
    /// It reads.
    HasTurn,
}

/// See the module's documentation.
pub(super) struct Gate {
    loops: usize,
    threads: usize,
    state: Mutex<State>,
    wake: Condvar,
    wake_companion: Condvar,
    /// The connection, once it is there.
    connection: OnceLock<OwnedFd>,
    follow: Follow,
    /// Requests begun, and whether the companion waits for one: what the watching thread sees.
    begun: AtomicU64,
    polls: AtomicBool,
    /// [`has_spare`], but in tests.
    has_spare: fn() -> bool,
}

impl Gate {
    /// `loops` of `threads` read at a time.
    pub(super) fn new(loops: usize, threads: usize) -> Arc<Self> {
        Self::with_spare(loops, threads, has_spare)
    }

    fn with_spare(loops: usize, threads: usize, has_spare: fn() -> bool) -> Arc<Self> {
        let companion = if loops == 1 && sched::processors() > 1 {
            Companion::None
        } else {
            Companion::Never
        };
        let state = State {
            active: 0,
            standing_by: 0,
            seen: 0,
            companion,
            companion_thread: None,
            left_alone: None,
            turn_since: Instant::now(),
            turn_begun: 0,
            closing: false,
        };
        Arc::new(Self {
            loops: loops.max(1),
            threads,
            state: Mutex::new(Rank::Pool, state),
            wake: Condvar::new(),
            wake_companion: Condvar::new(),
            connection: OnceLock::new(),
            follow: Follow::default(),
            begun: AtomicU64::new(0),
            polls: AtomicBool::new(false),
            has_spare,
        })
    }

    /// Sets the connection, to look for requests on.
    pub(super) fn set_connection(&self, connection: OwnedFd) {
        // There is one connection a mount; a second would change nothing.
        self.connection.get_or_init(|| connection);
    }

    /// To be called at the start of each request, with the thread that sent it, or 0, and the bytes
    /// of data it carries.
    pub(super) fn enter(self: &Arc<Self>, pid: u32, len: usize) {
        let gap = LEFT.take().map(|left| left.elapsed());
        self.begun.fetch_add(1, Ordering::Relaxed);
        let mut suits = self.follow.note(pid, len, gap);
        if suits && COMPANION.get() {
            suits = self.follow.go(gap);
        }
        SUITS.set(suits);
        if let Some(gap) = gap {
            let count = SOON_COUNT.get();
            SOON_COUNT.set(if gap < LOOK {
                (count + 1).min(SOON_MAX)
            } else {
                count.saturating_sub(1)
            });
        }
        READER.with_borrow_mut(|reader| {
            if reader.is_none() {
                let mut state = self.state.lock_nested();
                state.active += 1;
                state.seen += 1;
                set_wait_hook(Some(Rc::new(Hook(self.clone()))));
                *reader = Some(Reader(self.clone()));
            }
        });
    }

    /// To be called at the end of each request: stands by while enough others read.
    pub(super) fn leave(&self) {
        if COMPANION.get() {
            self.run_companion(SUITS.get());
            return;
        }
        self.stand_by();
        if COMPANION.get() {
            return;
        }
        let Some(connection) = self.connection.get() else {
            return;
        };
        let left = Instant::now();
        if SOON_COUNT.get() >= SOON {
            let mut fds = [PollFd::new(connection, PollFlags::IN)];
            // An error is seen by the read that follows.
            while matches!(poll(&mut fds, Some(&NOW)), Ok(0)) && left.elapsed() < LOOK {
                std::hint::spin_loop();
            }
        }
        LEFT.set(Some(left));
    }

    fn stand_by(&self) {
        let mut state = self.state.lock_nested();
        if state.closing {
            return;
        }
        let gives_turn = SUITS.get() && self.may_give_turn(&mut state);
        if gives_turn {
            // The companion counts as active in the place of this thread.
            state.companion = Companion::HasTurn;
            state.turn_since = Instant::now();
            state.turn_begun = self.begun.load(Ordering::Relaxed);
            self.wake_companion.notify_one();
        } else if state.active <= self.loops {
            return;
        } else {
            state.active -= 1;
            if state.companion == Companion::None && state.seen == self.threads {
                state.companion = Companion::Away;
                self.become_companion(state);
                return;
            }
        }
        state.standing_by += 1;
        let mut begun = self.begun.load(Ordering::Relaxed);
        let mut watches = gives_turn;
        while state.active >= self.loops && !state.closing {
            // Not through `sync::blocking`: the thread counts as standing by, not as waiting.
            if !watches {
                self.wake.wait_quietly(&mut state);
                continue;
            }
            let woken = self.wake.wait_quietly_for(&mut state, WATCH);
            watches = state.companion == Companion::HasTurn;
            if woken || !watches {
                continue;
            }
            let before = begun;
            begun = self.begun.load(Ordering::Relaxed);
            let idle = self.polls.load(Ordering::Relaxed) && !self.has_request();
            if begun - before < GETS_ON && !idle {
                state.companion = Companion::Away;
                // To end what it began.
                state.companion_thread.iter().for_each(Lowered::raise);
                state.active -= 1;
                state.leave_alone();
            }
        }
        state.standing_by -= 1;
        state.active += 1;
    }

    fn may_give_turn(&self, state: &mut State) -> bool {
        if state.companion != Companion::StandsBy || state.active != self.loops {
            return false;
        }
        let now = Instant::now();
        if state.left_alone.is_some_and(|(until, _)| now < until) {
            return false;
        }
        let spare = (self.has_spare)();
        if !spare {
            // To look costs as much as a request.
            let long = state.left_alone.map_or(Duration::ZERO, |(_, long)| long);
            state.left_alone = Some((now + WATCH, long));
        }
        spare
    }

    fn has_request(&self) -> bool {
        let Some(connection) = self.connection.get() else {
            return true;
        };
        let mut fds = [PollFd::new(connection, PollFlags::IN)];
        !matches!(poll(&mut fds, Some(&NOW)), Ok(0))
    }

    /// Stands by as the companion until it has the turn.
    fn become_companion(&self, state: MutexGuard<'_, State>) {
        drop(state);
        match sched::lower() {
            Ok(lowered) => {
                COMPANION.set(true);
                self.state.lock_nested().companion_thread = Some(lowered);
                self.run_companion(false);
            }
            Err(error) => {
                log::debug!("no thread of low urgency: {error}");
                let mut state = self.state.lock_nested();
                state.companion = Companion::Never;
                state.active += 1;
                drop(state);
                self.stand_by();
            }
        }
    }

    /// Returns when there is a request to read and the companion has the turn; `keeps_turn` says
    /// whether it should keep the one it may have.
    fn run_companion(&self, mut keeps_turn: bool) {
        loop {
            LEFT.set(Some(Instant::now()));
            if keeps_turn && self.has_turn() && self.request_comes() && self.has_turn() {
                return;
            }
            let mut state = self.state.lock_nested();
            if state.closing {
                return;
            }
            if state.companion == Companion::HasTurn {
                self.take_turn_back(&mut state);
            }
            drop(state);
            sched::free();
            // Where it was raised meanwhile.
            if let Err(error) = sched::lower() {
                log::debug!("a thread stays as urgent as it is: {error}");
            }
            let mut state = self.state.lock_nested();
            state.companion = Companion::StandsBy;
            while state.companion != Companion::HasTurn && !state.closing {
                self.wake_companion.wait_quietly(&mut state);
            }
            self.follow.begin();
            keeps_turn = true;
        }
    }

    /// Whether the companion has the turn, or all is over.
    fn has_turn(&self) -> bool {
        let state = self.state.lock_nested();
        state.companion == Companion::HasTurn || state.closing
    }

    /// Waits for the next request, but not for long.
    fn request_comes(&self) -> bool {
        let Some(connection) = self.connection.get() else {
            return false;
        };
        let mut fds = [PollFd::new(connection, PollFlags::IN)];
        self.polls.store(true, Ordering::Relaxed);
        // An error is seen by the read that follows.
        let comes = !matches!(poll(&mut fds, Some(&COMPANION_WAIT)), Ok(0));
        self.polls.store(false, Ordering::Relaxed);
        comes
    }

    /// To be called after a request that needs no answer, and so neither [`Self::enter`] nor
    /// [`Self::leave`]: the companion must not wait in the kernel's `read` for the next.
    pub(super) fn after_forget(&self) {
        if !COMPANION.get() || self.has_request() {
            return;
        }
        let mut state = self.state.lock_nested();
        if state.companion == Companion::HasTurn {
            self.take_turn_back(&mut state);
            drop(state);
            sched::free();
        }
    }

    /// For the companion, which has the turn.
    fn take_turn_back(&self, state: &mut State) {
        state.companion = Companion::Away;
        // Without the time in which nothing came.
        let end = LEFT.get().unwrap_or_else(Instant::now);
        let lasted = end.saturating_duration_since(state.turn_since);
        let served = self.begun.load(Ordering::Relaxed) - state.turn_begun;
        let expected = GETS_ON as f64 * lasted.as_secs_f64() / WATCH.as_secs_f64();
        if lasted > WATCH / 2 && (served as f64) < expected {
            state.leave_alone();
        } else if lasted >= LONG_TURN {
            state.left_alone = None;
        }
        state.active -= 1;
        if state.active < self.loops && state.standing_by > 0 {
            self.wake.notify_one();
        }
    }

    fn begin_wait(&self) {
        let mut state = self.state.lock_nested();
        if COMPANION.get() {
            // What is left of its request is not counted.
            if state.companion == Companion::HasTurn {
                self.take_turn_back(&mut state);
            }
            return;
        }
        state.active -= 1;
        let wake = state.active < self.loops && state.standing_by > 0;
        drop(state);
        if wake {
            self.wake.notify_one();
        }
    }

    fn end_wait(&self) {
        if !COMPANION.get() {
            self.state.lock_nested().active += 1;
        }
    }

    fn close(&self) {
        self.state.lock_nested().closing = true;
        self.wake.notify_all();
        self.wake_companion.notify_all();
    }
}

/// Whether no more threads want to run than there are processors.
fn has_spare() -> bool {
    sched::runnable().is_some_and(|running| running <= sched::processors())
}

struct Hook(Arc<Gate>);

impl WaitHook for Hook {
    fn begin(&self) {
        self.0.begin_wait();
    }

    fn end(&self) {
        self.0.end_wait();
    }
}

/// Lives as long as a thread that reads requests.
struct Reader(Arc<Gate>);

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.close();
    }
}

const NOW: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 0,
};

thread_local! {
    /// When the thread's last request was over.
    static LEFT: Cell<Option<Instant>> = const { Cell::new(None) };
    /// How many of its last requests came soon after the one before.
    static SOON_COUNT: Cell<u32> = const { Cell::new(0) };
    /// Whether its last request was of a kind that a companion should read.
    static SUITS: Cell<bool> = const { Cell::new(false) };
    /// Whether it is the companion.
    static COMPANION: Cell<bool> = const { Cell::new(false) };
    static READER: RefCell<Option<Reader>> = const { RefCell::new(None) };
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::channel;
    use std::time::{Duration, Instant};

    use blockstack::sched;
    use blockstack::sync::blocking;

    use super::{COMPANION, Gate};

    /// Threads take numbers from a counter as readers take requests; request 0 waits until the
    /// others are done, which only a thread that takes over can do.
    #[test]
    fn a_waiting_request_does_not_hold_up_others() {
        let gate = Gate::new(1, 3);
        let (next, done) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let (gate, next, done) = (gate.clone(), next.clone(), done.clone());
                std::thread::spawn(move || {
                    loop {
                        let request = next.fetch_add(1, Ordering::SeqCst);
                        if request >= 100 {
                            return;
                        }
                        gate.enter(0, 0);
                        if request == 0 {
                            blocking(|| {
                                while done.load(Ordering::SeqCst) < 99 {
                                    std::thread::sleep(Duration::from_millis(1));
                                }
                            });
                        } else {
                            done.fetch_add(1, Ordering::SeqCst);
                        }
                        gate.leave();
                    }
                })
            })
            .collect();
        threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
        assert_eq!(done.load(Ordering::SeqCst), 99);
    }

    /// Reads requests of one byte each, as many threads do from `/dev/fuse`.
    fn serve(gate: Arc<Gate>, mut pipe: File, handle: impl Fn(u8)) {
        let mut byte = [0];
        while pipe.read(&mut byte).is_ok_and(|read| read == 1) {
            gate.enter(std::process::id(), 0);
            handle(byte[0]);
            gate.leave();
        }
    }

    /// The request behind one that the companion does not get on with is answered by another
    /// thread, without a word from the companion.
    #[test]
    fn requests_do_not_wait_for_a_companion_without_a_processor() {
        if sched::processors() < 2 {
            println!("SKIPPED: one processor only");
            return;
        }
        let (pipe, requests) = rustix::pipe::pipe().unwrap();
        let (pipe, mut requests) = (File::from(pipe), File::from(requests));
        let gate = Gate::with_spare(1, 3, || true);
        gate.set_connection(pipe.try_clone().unwrap().into());
        let (answer, answers) = channel();
        let done = Arc::new(AtomicUsize::new(0));
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let (gate, pipe) = (gate.clone(), pipe.try_clone().unwrap());
                let (answer, done) = (answer.clone(), done.clone());
                std::thread::spawn(move || {
                    serve(gate, pipe, |request| {
                        let stuck = request == 1 && COMPANION.get();
                        answer.send((request, stuck)).unwrap();
                        // As if somebody else had the processor: nobody is told of this wait.
                        while stuck && done.load(Ordering::SeqCst) == 0 {
                            std::thread::sleep(Duration::from_millis(1));
                        }
                    });
                })
            })
            .collect();
        drop(pipe);
        let begin = Instant::now();
        let mut tried = false;
        while !tried && begin.elapsed() < Duration::from_secs(60) {
            for _ in 0..200 {
                requests.write_all(&[0]).unwrap();
                answers.recv().unwrap();
            }
            requests.write_all(&[1]).unwrap();
            tried = answers.recv().unwrap().1;
        }
        assert!(tried, "no companion was given the turn");
        requests.write_all(&[2]).unwrap();
        let next = answers.recv_timeout(Duration::from_secs(60));
        done.store(1, Ordering::SeqCst);
        assert_eq!(next, Ok((2, false)));
        drop(requests);
        for thread in threads {
            thread.join().unwrap();
        }
    }
}
