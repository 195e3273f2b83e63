//! A disk in memory that knows what a power cut could leave behind.
//!
//! It has a volatile cache, as [`Cached`] tells; writes still in flight are no exception. A
//! [`CrashPoint`] is the disk at one moment with all that is uncertain; it
//! costs little, and [`CrashPoint::image`] draws as many outcomes from it as one likes:
//!
//! ```
//! use blockstack::testing::crash::CrashDisk;
//! use blockstack::{BioFlags, DynDevice, PagePool, Sector, SectorCount, flush_wait, write_wait};
//!
//! # fn main() -> Result<(), blockstack::BlkError> {
//! let crash = CrashDisk::new("crash", SectorCount::new(64));
//! let disk: DynDevice = crash.clone();
//! crash.arm_every(1);
//! let mut buf = PagePool::shared().alloc_zeroed(4096)?;
//! buf.fill(1);
//! let buf = write_wait(&disk, Sector::new(8), buf, BioFlags::empty())?;
//! flush_wait(&disk)?;
//! for point in crash.take_points() {
//!     let after_power_cut = point.image(42); // a `MemDisk` can be made of it
//!     assert_eq!(after_power_cut.size(), SectorCount::new(64));
//! }
//! # drop(buf);
//! # Ok(())
//! # }
//! ```
//!
//! [`Timing::Shuffled`] ends bios late and in any order, from a thread of the disk, as hardware may;
//! who relies on an order without waiting for it is found out.

use std::sync::{Arc, Weak};

use crate::backend::mem::Image;
use crate::bio::{Bio, BioFlags, Op};
use crate::device::{BlockDevice, Limits, Stats};
use crate::log_writes::{Cached, Data, Fate};
use crate::sync::prim::thread;
use crate::sync::{Condvar, Mutex, Rank};
use crate::units::{SECTOR_SIZE, SectorCount};

/// When bios end.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Timing {
    /// Before `submit` returns.
    AtOnce,
    /// Later, in an order drawn from the seed.
    Shuffled {
        /// For the order.
        seed: u64,
    },
}

/// The disk at one moment: what is certain, and the writes whose fate is open.
#[derive(Clone)]
pub struct CrashPoint {
    /// Writes, discards and flushes that had begun.
    pub ops: u64,
    cached: Cached,
}

impl CrashPoint {
    /// An outcome of a power cut at this moment; the same seed gives the same.
    #[must_use]
    pub fn image(&self, seed: u64) -> Image {
        let mut random = Random(seed);
        let draw = |sectors: usize| match random.below(4) {
            0 => Fate::Lost,
            1 => Fate::Kept,
            2 => {
                let kept = 0..random.below(sectors as u64 + 1) as usize;
                Fate::Torn(std::iter::once(kept).collect())
            }
            _ => {
                let kept = (0..sectors).filter(|_| random.below(2) == 0);
                Fate::Torn(kept.map(|sector| sector..sector + 1).collect())
            }
        };
        let fates: Vec<_> = self.cached.uncertain().map(draw).collect();
        self.cached.outcome(&fates)
    }

    /// The outcome in which all is lost that was not certain.
    #[must_use]
    pub fn durable(&self) -> Image {
        self.cached.durable().clone()
    }

    /// Writes whose fate is open.
    #[must_use]
    pub fn uncertain(&self) -> usize {
        self.cached.uncertain().len()
    }
}

struct State {
    live: Image,
    cached: Cached,
    ops: u64,
    /// Numbers of operations at which to remember a point.
    armed: Vec<u64>,
    every: Option<u64>,
    points: Vec<CrashPoint>,
    /// Not yet done, of a shuffled disk.
    in_flight: Vec<Job>,
    random: Random,
    at_once: bool,
    stop: bool,
}

struct Job {
    bio: Bio,
    /// Of a write: its place in `pending`.
    id: Option<u64>,
    /// Of a flush: what had ended before it began.
    covers: Vec<u64>,
    /// Of a write with a flush before it: what is written when that is over.
    behind_flush: Option<(usize, Data)>,
}

struct Inner {
    state: Mutex<State>,
    work: Condvar,
}

/// See the module's documentation.
pub struct CrashDisk {
    name: String,
    size: SectorCount,
    timing: Timing,
    inner: Arc<Inner>,
    stats: Stats,
}

impl CrashDisk {
    /// Makes a disk of zeros that ends bios at once.
    #[must_use]
    pub fn new(name: &str, size: SectorCount) -> Arc<Self> {
        Self::from_image(name, Image::zeroed(size), Timing::AtOnce)
    }

    /// Makes a disk with the given content, all of it certain.
    #[must_use]
    pub fn from_image(name: &str, image: Image, timing: Timing) -> Arc<Self> {
        let seed = match timing {
            Timing::AtOnce => 0,
            Timing::Shuffled { seed } => seed,
        };
        let size = image.size();
        let inner = Arc::new(Inner {
            state: Mutex::new(
                Rank::Queue,
                State {
                    live: image.clone(),
                    cached: Cached::new(image),
                    ops: 0,
                    armed: Vec::new(),
                    every: None,
                    points: Vec::new(),
                    in_flight: Vec::new(),
                    random: Random(seed),
                    at_once: timing == Timing::AtOnce,
                    stop: false,
                },
            ),
            work: Condvar::new(),
        });
        let disk = Arc::new(Self {
            name: name.to_owned(),
            size,
            timing,
            inner,
            stats: Stats::default(),
        });
        if timing != Timing::AtOnce {
            let weak = Arc::downgrade(&disk.inner);
            thread::spawn(move || shuffle(&weak));
        }
        disk
    }

    /// The disk now.
    #[must_use]
    pub fn point(&self) -> CrashPoint {
        self.inner.state.lock_nested().point()
    }

    /// An outcome of a power cut now, byte for byte.
    #[must_use]
    pub fn crash_image(&self, seed: u64) -> Vec<u8> {
        self.point().image(seed).to_vec()
    }

    /// What readers see now.
    #[must_use]
    pub fn live(&self) -> Image {
        self.inner.state.lock_nested().live.clone()
    }

    /// Remembers the disk when `n` more writes, discards and flushes have begun; the last of them
    /// is then in flight.
    pub fn arm(&self, n: u64) {
        let mut state = self.inner.state.lock_nested();
        let at = state.ops + n;
        state.armed.push(at);
    }

    /// Remembers the disk at every `n`th write, discard or flush; zero stops that.
    pub fn arm_every(&self, n: u64) {
        self.inner.state.lock_nested().every = (n > 0).then_some(n);
    }

    /// What was remembered, oldest first.
    #[must_use]
    pub fn take_points(&self) -> Vec<CrashPoint> {
        std::mem::take(&mut self.inner.state.lock_nested().points)
    }

    /// Writes, discards and flushes that have begun.
    #[must_use]
    pub fn ops(&self) -> u64 {
        self.inner.state.lock_nested().ops
    }
}

impl State {
    fn point(&self) -> CrashPoint {
        CrashPoint {
            ops: self.ops,
            cached: self.cached.clone(),
        }
    }

    /// Takes note of a bio that begins.
    fn begin(&mut self, bio: Bio) -> Job {
        let op = bio.op();
        let flushes = op == Op::Flush || bio.flags().contains(BioFlags::PREFLUSH);
        let covers = if flushes {
            let ended = self.cached.pending.iter().filter(|write| write.ended);
            ended.map(|write| write.id).collect()
        } else {
            Vec::new()
        };
        let at = bio.sector().raw() as usize * SECTOR_SIZE;
        let data = match op {
            Op::Write => {
                let mut bytes = vec![0; bio.byte_len()];
                bio.for_each_bytes(|offset, part| {
                    bytes[offset..offset + part.len()].copy_from_slice(part);
                });
                Some(Data::Bytes(bytes.into()))
            }
            Op::Discard | Op::WriteZeroes => Some(Data::Zeros(bio.byte_len())),
            Op::Read | Op::Flush => None,
        };
        let mut job = Job {
            bio,
            id: None,
            covers,
            behind_flush: None,
        };
        // A write with a flush before it begins when the flush is over.
        match data {
            Some(data) if flushes && !self.at_once => job.behind_flush = Some((at, data)),
            Some(data) => {
                self.cached.make_durable(&job.covers);
                job.id = Some(self.begin_write(at, data));
            }
            None if op == Op::Flush => self.count(),
            None => {}
        }
        job
    }

    fn begin_write(&mut self, at: usize, data: Data) -> u64 {
        let id = self.cached.begin(at, data);
        self.count();
        id
    }

    /// An operation has begun.
    fn count(&mut self) {
        self.ops += 1;
        let ops = self.ops;
        let every = self.every.is_some_and(|every| ops % every == 0);
        if every || self.armed.contains(&ops) {
            self.armed.retain(|&at| at != ops);
            let point = self.point();
            self.points.push(point);
        }
    }

    /// Does what a bio asks for; `None` where that was only the flush before a write.
    fn run(&mut self, mut job: Job) -> Option<Bio> {
        self.cached.make_durable(&job.covers);
        if let Some((at, data)) = job.behind_flush.take() {
            job.covers.clear();
            job.id = Some(self.begin_write(at, data));
            self.in_flight.push(job);
            return None;
        }
        if let Some(id) = job.id
            && let Some(write) = self.cached.pending.iter_mut().find(|write| write.id == id)
        {
            write.ended = true;
            write.apply(&mut self.live, 0, write.data.len());
            if job.bio.flags().contains(BioFlags::FUA) {
                self.cached.make_durable(&[id]);
            }
        }
        if job.bio.op() == Op::Read {
            let at = job.bio.sector().raw() as usize * SECTOR_SIZE;
            let live = &self.live;
            job.bio
                .fill_each(|offset, part| live.read_at(at + offset, part));
        }
        Some(job.bio)
    }
}

/// The thread of a shuffled disk.
fn shuffle(inner: &Weak<Inner>) {
    crate::sync::mark_completion_thread();
    while let Some(inner) = inner.upgrade() {
        let mut state = inner.state.lock();
        while state.in_flight.is_empty() {
            if state.stop {
                return;
            }
            inner.work.wait(&mut state);
        }
        let count = state.in_flight.len() as u64;
        let chosen = state.random.below(count) as usize;
        // Now and then wait for company, so that there is something to shuffle.
        if count < 4 && state.random.below(4) != 0 {
            drop(state);
            thread::yield_now();
            state = inner.state.lock();
        }
        let job = state.in_flight.swap_remove(chosen);
        let bio = state.run(job);
        drop(state);
        if let Some(bio) = bio {
            bio.complete(Ok(()));
        }
    }
}

impl Drop for CrashDisk {
    fn drop(&mut self) {
        self.inner.state.lock_nested().stop = true;
        self.inner.work.notify_all();
    }
}

impl BlockDevice for CrashDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn capacity(&self) -> SectorCount {
        self.size
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
        let mut state = self.inner.state.lock_nested();
        let job = state.begin(bio);
        if self.timing == Timing::AtOnce {
            let bio = state.run(job);
            drop(state);
            if let Some(bio) = bio {
                bio.complete(Ok(()));
            }
        } else {
            state.in_flight.push(job);
            drop(state);
            self.inner.work.notify_one();
        }
    }
}

/// A small generator of numbers (splitmix64), so that a seed alone gives the outcome back.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }
}

#[cfg(test)]
mod tests;
