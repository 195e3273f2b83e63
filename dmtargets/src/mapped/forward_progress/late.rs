//! A disk that ends bios late and in any order, on a thread of its own or on that of whoever
//! submits the next.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use blockstack::device::Stats;
use blockstack::sync::{Condvar, Mutex, Rank, mark_completion_thread};
use blockstack::{Bio, BlockDevice, Limits, Op, SectorCount};

struct State {
    bytes: Vec<u8>,
    in_flight: Vec<Bio>,
    random: u64,
    stop: bool,
}

impl State {
    fn below(&mut self, bound: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random as usize % bound
    }

    /// Does any of the bios in flight.
    fn run_any(&mut self) -> Bio {
        let any = self.below(self.in_flight.len());
        let mut bio = self.in_flight.swap_remove(any);
        let at = bio.sector().raw() as usize * 512;
        match bio.op() {
            Op::Flush => {}
            Op::Read => bio.fill_each(|offset, to| {
                to.copy_from_slice(&self.bytes[at + offset..at + offset + to.len()]);
            }),
            Op::Write => bio.for_each_bytes(|offset, from| {
                self.bytes[at + offset..at + offset + from.len()].copy_from_slice(from);
            }),
            Op::Discard | Op::WriteZeroes => self.bytes[at..at + bio.byte_len()].fill(0),
        }
        bio
    }
}

struct Inner {
    state: Mutex<State>,
    work: Condvar,
    accepted: AtomicU64,
    ended: AtomicU64,
}

impl Inner {
    fn end(&self, bio: Bio) {
        bio.complete(Ok(()));
        self.ended.fetch_add(1, Ordering::SeqCst);
    }
}

/// See the module's documentation.
pub(super) struct Late {
    name: String,
    inner: Arc<Inner>,
    stats: Stats,
}

pub(super) const SECTORS: u64 = 4096;
/// How long a bio may wait for others to be shuffled with.
const COMPANY: Duration = Duration::from_micros(50);

impl Late {
    pub(super) fn new(name: &str, seed: u64) -> Arc<Self> {
        let state = State {
            bytes: vec![0; SECTORS as usize * 512],
            in_flight: Vec::new(),
            random: seed | 1,
            stop: false,
        };
        let inner = Arc::new(Inner {
            state: Mutex::new(Rank::Queue, state),
            work: Condvar::new(),
            accepted: AtomicU64::new(0),
            ended: AtomicU64::new(0),
        });
        let weak = Arc::downgrade(&inner);
        std::thread::spawn(move || reap(&weak));
        Arc::new(Self {
            name: name.to_owned(),
            inner,
            stats: Stats::default(),
        })
    }

    /// Bios that came, and of those the ones that ended.
    pub(super) fn counts(&self) -> (u64, u64) {
        let load = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
        (load(&self.inner.accepted), load(&self.inner.ended))
    }
}

fn reap(inner: &Weak<Inner>) {
    mark_completion_thread();
    while let Some(inner) = inner.upgrade() {
        let mut state = inner.state.lock();
        while state.in_flight.is_empty() {
            if state.stop {
                return;
            }
            inner.work.wait(&mut state);
        }
        // Now and then wait for company, so that there is something to shuffle. Not by yielding:
        // on a loaded machine that lasts.
        if state.in_flight.len() < 4 && state.below(16) == 0 {
            inner.work.wait_for(&mut state, COMPANY);
            continue;
        }
        let bio = state.run_any();
        drop(state);
        inner.end(bio);
    }
}

impl BlockDevice for Late {
    fn name(&self) -> &str {
        &self.name
    }
    fn capacity(&self) -> SectorCount {
        SectorCount::new(SECTORS)
    }
    fn limits(&self) -> Limits {
        Limits {
            volatile_cache: true,
            ..Limits::UNLIMITED
        }
    }
    fn stats(&self) -> &Stats {
        &self.stats
    }
    fn submit(&self, bio: Bio) {
        self.inner.accepted.fetch_add(1, Ordering::SeqCst);
        let mut state = self.inner.state.lock_nested();
        state.in_flight.push(bio);
        // As a ring that is full: somebody else's ends here.
        let other = (state.below(3) == 0).then(|| state.run_any());
        drop(state);
        match other {
            Some(other) => self.inner.end(other),
            None => self.inner.work.notify_one(),
        }
    }
}

impl Drop for Late {
    fn drop(&mut self) {
        self.inner.state.lock_nested().stop = true;
        self.inner.work.notify_all();
    }
}
