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
//! When the mount ends, reading fails for the thread that reads; its end wakes all others.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use blockstack::sync::{Condvar, Mutex, Rank, WaitHook, set_wait_hook};

/// How long a reader looks for the next request, and how soon one must come to be looked for.
const LOOK: Duration = Duration::from_micros(50);
/// Requests that came soon, from which on the next is looked for.
const SOON: u32 = 3;
/// Most of them that count, so that a pause is noticed soon.
const SOON_MAX: u32 = 8;

struct State {
    /// Threads that read or work, neither waiting nor standing by.
    active: usize,
    standing_by: usize,
    closing: bool,
}

/// See the module's documentation.
pub(super) struct Gate {
    loops: usize,
    state: Mutex<State>,
    wake: Condvar,
    /// The connection, once it is there.
    connection: OnceLock<OwnedFd>,
}

impl Gate {
    pub(super) fn new(loops: usize) -> Arc<Self> {
        let state = State {
            active: 0,
            standing_by: 0,
            closing: false,
        };
        Arc::new(Self {
            loops: loops.max(1),
            state: Mutex::new(Rank::Pool, state),
            wake: Condvar::new(),
            connection: OnceLock::new(),
        })
    }

    /// Sets the connection, to look for requests on.
    pub(super) fn set_connection(&self, connection: OwnedFd) {
        // There is one connection a mount; a second would change nothing.
        self.connection.get_or_init(|| connection);
    }

    /// To be called at the start of each request.
    pub(super) fn enter(self: &Arc<Self>) {
        if let Some(left) = LEFT.take() {
            let count = SOON_COUNT.get();
            SOON_COUNT.set(if left.elapsed() < LOOK {
                (count + 1).min(SOON_MAX)
            } else {
                count.saturating_sub(1)
            });
        }
        READER.with_borrow_mut(|reader| {
            if reader.is_none() {
                self.state.lock_nested().active += 1;
                set_wait_hook(Some(Rc::new(Hook(self.clone()))));
                *reader = Some(Reader(self.clone()));
            }
        });
    }

    /// To be called at the end of each request: stands by while enough others read.
    pub(super) fn leave(&self) {
        self.stand_by();
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
        if state.active <= self.loops || state.closing {
            return;
        }
        state.active -= 1;
        state.standing_by += 1;
        while state.active >= self.loops && !state.closing {
            // Not through `sync::blocking`: the thread counts as standing by, not as waiting.
            self.wake.wait_quietly(&mut state);
        }
        state.standing_by -= 1;
        state.active += 1;
    }

    fn begin_wait(&self) {
        let mut state = self.state.lock_nested();
        state.active -= 1;
        let wake = state.active < self.loops && state.standing_by > 0;
        drop(state);
        if wake {
            self.wake.notify_one();
        }
    }

    fn end_wait(&self) {
        self.state.lock_nested().active += 1;
    }

    fn close(&self) {
        self.state.lock_nested().closing = true;
        self.wake.notify_all();
    }
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
    static READER: RefCell<Option<Reader>> = const { RefCell::new(None) };
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use blockstack::sync::blocking;

    use super::Gate;

    /// Threads take numbers from a counter as readers take requests; request 0 waits until the
    /// others are done, which only a thread that takes over can do.
    #[test]
    fn a_waiting_request_does_not_hold_up_others() {
        let gate = Gate::new(1);
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
                        gate.enter();
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
}
