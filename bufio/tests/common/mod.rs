//! A disk in memory that fails, holds bios back and watches for overlapping writes.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use blockstack::device::{Limits, Stats};
use blockstack::sync::{Rank, WaitHook, set_wait_hook};
use blockstack::{Bio, BlkError, BlkResult, BlockDevice, Op, SectorCount};
use bufio::{Client, ClientConfig, Invalid, Validator};
use parking_lot::{Condvar, Mutex};

#[derive(Default)]
pub struct State {
    pub bytes: Vec<u8>,
    /// Bios that wait for `release`.
    held: Vec<Bio>,
    pub hold_reads: bool,
    pub hold_writes: bool,
    /// Sectors whose reads or writes fail.
    pub bad_reads: HashSet<u64>,
    pub bad_writes: HashSet<u64>,
    /// What a bad write of a sector ends with, where it is not an I/O error.
    pub errors: HashMap<u64, BlkError>,
    /// Ranges of writes that were accepted and did not end.
    writing: BTreeMap<u64, u64>,
    /// First sector and length of each write that ended well, in order.
    pub writes: Vec<(u64, u64)>,
    pub reads: Vec<(u64, u64)>,
    pub overlaps: usize,
    pub flushes: usize,
    pub discards: Vec<(u64, u64)>,
}

pub struct TestDisk {
    capacity: SectorCount,
    limits: Limits,
    state: Mutex<State>,
    changed: Condvar,
    stats: Stats,
}

impl TestDisk {
    pub fn new(sectors: u64) -> Arc<Self> {
        Self::with_limits(sectors, Limits::UNLIMITED)
    }

    pub fn with_limits(sectors: u64, limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            capacity: SectorCount::new(sectors),
            state: Mutex::new(State {
                bytes: vec![0; sectors as usize * 512],
                ..State::default()
            }),
            changed: Condvar::new(),
            stats: Stats::default(),
        })
    }

    pub fn set<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        f(&mut self.state.lock())
    }

    pub fn held(&self) -> usize {
        self.state.lock().held.len()
    }

    /// Waits until `n` bios are held.
    pub fn wait_held(&self, n: usize) {
        let mut state = self.state.lock();
        while state.held.len() < n {
            self.changed.wait(&mut state);
        }
    }

    /// Ends the bios held so far.
    pub fn release(&self) {
        let held = std::mem::take(&mut self.state.lock().held);
        held.into_iter().for_each(|bio| self.finish(bio));
    }

    /// Ends one of the bios held, the one that `pick` names.
    pub fn release_some(&self, pick: impl FnOnce(usize) -> usize) {
        let mut state = self.state.lock();
        let held = state.held.len();
        if held > 0 {
            let bio = state.held.swap_remove(pick(held));
            drop(state);
            self.finish(bio);
        }
    }

    /// Holds nothing any more.
    pub fn open(&self) {
        self.set(|state| {
            state.hold_reads = false;
            state.hold_writes = false;
        });
        self.release();
    }

    /// Opens it when the value is dropped: a test that fails in between still comes to an end.
    pub fn opens(&self) -> Opens<'_> {
        Opens(self)
    }

    fn finish(&self, mut bio: Bio) {
        let mut state = self.state.lock();
        let res = run(&mut state, &mut bio);
        drop(state);
        bio.complete(res);
    }
}

pub struct Opens<'a>(&'a TestDisk);

impl Drop for Opens<'_> {
    fn drop(&mut self) {
        self.0.open();
    }
}

fn run(state: &mut State, bio: &mut Bio) -> BlkResult {
    let (sector, len) = (bio.sector().raw(), bio.len().raw());
    let at = sector as usize * 512;
    let is_bad = |bad: &HashSet<u64>| (sector..sector + len).any(|sector| bad.contains(&sector));
    match bio.op() {
        Op::Read => {
            if is_bad(&state.bad_reads) {
                return Err(BlkError::Io);
            }
            state.reads.push((sector, len));
            let bytes = &state.bytes;
            bio.fill_each(|offset, to| {
                to.copy_from_slice(&bytes[at + offset..at + offset + to.len()]);
            });
        }
        Op::Write => {
            state.writing.remove(&sector);
            if is_bad(&state.bad_writes) {
                return Err(state.errors.get(&sector).copied().unwrap_or(BlkError::Io));
            }
            state.writes.push((sector, len));
            let bytes = &mut state.bytes;
            bio.for_each_bytes(|offset, from| {
                bytes[at + offset..at + offset + from.len()].copy_from_slice(from);
            });
        }
        Op::Flush => state.flushes += 1,
        Op::Discard => state.discards.push((sector, len)),
        Op::WriteZeroes => return Err(BlkError::NotSupported),
    }
    Ok(())
}

impl BlockDevice for TestDisk {
    fn name(&self) -> &str {
        "test0"
    }
    fn capacity(&self) -> SectorCount {
        self.capacity
    }
    fn limits(&self) -> Limits {
        self.limits
    }
    fn stats(&self) -> &Stats {
        &self.stats
    }
    fn submit(&self, bio: Bio) {
        let mut state = self.state.lock();
        let hold = match bio.op() {
            Op::Read => state.hold_reads,
            Op::Write => {
                let (start, end) = (bio.sector().raw(), bio.sector().raw() + bio.len().raw());
                let before = state.writing.range(..end).next_back();
                if before.is_some_and(|(_, &other_end)| other_end > start) {
                    state.overlaps += 1;
                }
                state.writing.insert(start, end);
                state.hold_writes
            }
            _ => false,
        };
        if hold {
            state.held.push(bio);
            self.changed.notify_all();
        } else {
            drop(state);
            self.finish(bio);
        }
    }
}

/// Little caches of 1 KiB blocks; no writeback by age during a test.
pub fn config() -> ClientConfig {
    ClientConfig {
        block_size: 1024,
        cache_bytes: 64 << 10,
        rank: Rank::FsBufio,
        writeback_age: Duration::from_secs(3600),
        strict_holds: false,
    }
}

pub fn rig(sectors: u64) -> (Arc<TestDisk>, Arc<Client>) {
    let disk = TestDisk::new(sectors);
    let client = Client::new(disk.clone(), config()).unwrap();
    (disk, client)
}

/// Byte 0 is the sum of the others.
pub struct Sum;

impl Validator for Sum {
    fn check(&self, _: u64, data: &[u8]) -> Result<(), Invalid> {
        if data[0] == sum(data) {
            Ok(())
        } else {
            Err(Invalid {
                what: "test block: sum",
            })
        }
    }
    fn prepare(&self, _: u64, data: &mut [u8]) {
        data[0] = sum(data);
    }
}

pub fn sum(data: &[u8]) -> u8 {
    data[1..]
        .iter()
        .fold(0, |sum, &byte| sum.wrapping_add(byte))
}

/// Counts the waits of the threads that ask for it: a thread that was seen to wait sleeps, or is
/// about to with the lock held under which it would be woken.
#[derive(Clone, Default)]
pub struct Waits(Arc<AtomicUsize>);

struct CountWaits(Waits);

impl WaitHook for CountWaits {
    fn begin(&self) {
        self.0.0.fetch_add(1, Ordering::SeqCst);
    }
    fn end(&self) {}
}

impl Waits {
    /// From now on the waits of the calling thread count.
    pub fn count_mine(&self) {
        set_wait_hook(Some(Rc::new(CountWaits(self.clone()))));
    }

    /// Until so many waits began.
    pub fn until(&self, n: usize) {
        eventually("a thread waits", || self.0.load(Ordering::SeqCst) >= n);
    }
}

/// Runs `f` on a thread of its own and fails the test where it does not come to an end.
pub fn within_reason<R: Send + 'static>(what: &str, f: impl FnOnce() -> R + Send + 'static) -> R {
    let thread = std::thread::spawn(f);
    eventually(what, || thread.is_finished());
    thread.join().unwrap()
}

/// Polls; for what another thread does in its own time.
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20), "never: {what}");
        std::thread::yield_now();
    }
}
