//! Block devices and their limits.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crossbeam_utils::CachePadded;

use crate::bio::{Bio, Op};
use crate::error::BlkResult;
use crate::lane::{SLOTS, add, thread_slot};
use crate::units::SectorCount;

/// What a device can do; stacks from the bottom up.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Limits {
    /// Smallest unit of I/O in bytes; a power of two, 512 to 65536.
    pub logical_block_size: u32,
    /// Unit below which the device reads, modifies and writes, in bytes.
    pub physical_block_size: u32,
    /// Longest read or write in sectors.
    pub max_sectors: u32,
    /// Preferred size of I/O in bytes; zero where unknown.
    pub optimal_io_size: u32,
    /// Unit of discards in bytes; zero where discards are not supported.
    pub discard_granularity: u32,
    /// Longest discard in sectors; zero where not supported.
    pub max_discard_sectors: u64,
    /// Longest write-zeroes in sectors; zero where not supported.
    pub max_write_zeroes_sectors: u64,
    /// Whether the device has a volatile cache, so that flushes mean something.
    pub volatile_cache: bool,
    /// Whether FUA writes are cheaper than write and flush.
    pub fua: bool,
    /// Whether writes are refused.
    pub read_only: bool,
}

impl Limits {
    /// The limits of no device at all: what [`Self::stack`] starts from.
    pub const UNLIMITED: Self = Self {
        logical_block_size: 512,
        physical_block_size: 512,
        max_sectors: 2048,
        optimal_io_size: 0,
        discard_granularity: 512,
        max_discard_sectors: u64::MAX,
        max_write_zeroes_sectors: u64::MAX,
        volatile_cache: false,
        fua: true,
        read_only: false,
    };

    /// The limits of a device that stands on one with `self` and one with `other`.
    #[must_use]
    pub fn stack(self, other: Self) -> Self {
        let no_discard = self.max_discard_sectors == 0 || other.max_discard_sectors == 0;
        Self {
            logical_block_size: self.logical_block_size.max(other.logical_block_size),
            physical_block_size: self.physical_block_size.max(other.physical_block_size),
            max_sectors: self.max_sectors.min(other.max_sectors),
            optimal_io_size: self.optimal_io_size.max(other.optimal_io_size),
            discard_granularity: if no_discard {
                0
            } else {
                self.discard_granularity.max(other.discard_granularity)
            },
            max_discard_sectors: self.max_discard_sectors.min(other.max_discard_sectors),
            max_write_zeroes_sectors: self
                .max_write_zeroes_sectors
                .min(other.max_write_zeroes_sectors),
            volatile_cache: self.volatile_cache || other.volatile_cache,
            fua: self.fua && other.fua,
            read_only: self.read_only || other.read_only,
        }
    }
}

/// What every bio is held against on its way in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Bounds {
    /// Size in sectors.
    pub capacity: SectorCount,
    /// Smallest unit of I/O in bytes.
    pub logical_block_size: u32,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// Something bios can be sent to.
pub trait BlockDevice: Send + Sync {
    /// Its name, for messages and tables.
    fn name(&self) -> &str;
    /// Its size in sectors.
    fn capacity(&self) -> SectorCount;
    /// What it can do.
    fn limits(&self) -> Limits;
    /// Its counters.
    fn stats(&self) -> &Stats;
    /// Size and limits that every bio is held against; for devices that know them faster than by
    /// [`Self::limits`].
    fn bounds(&self) -> Bounds {
        let limits = self.limits();
        Bounds {
            capacity: self.capacity(),
            logical_block_size: limits.logical_block_size,
            read_only: limits.read_only,
        }
    }
    /// Takes a bio that [`submit_bio`](crate::submit_bio) has checked. Called by `submit_bio` only.
    /// Must not wait; sends the bio on, or completes it now or later.
    fn submit(&self, bio: Bio);
    /// As [`Self::submit`], for a device that nearly always sends one bio on: where it gives that
    /// back, it is submitted as if the device had done so last.
    #[inline]
    fn forward(&self, bio: Bio) -> Option<Bio> {
        self.submit(bio);
        None
    }
}

/// Buckets of the latency histogram.
pub const LATENCY_BUCKETS: usize = 20;
/// One bio in so many has its latency taken; reading the clock costs more than all else here.
const LATENCY_SAMPLE: u64 = 64;

/// Counters of one thread, or of those that have no slot.
#[derive(Debug, Default)]
struct Counts {
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    discards: AtomicU64,
    sectors_read: AtomicU64,
    sectors_written: AtomicU64,
    ended: AtomicU64,
    /// Bios that another device took over.
    passed_on: AtomicU64,
    failed: AtomicU64,
}

/// Counters of a device.
#[derive(Debug)]
pub struct Stats {
    /// By the thread's slot, and last those of threads that have none.
    counts: Box<[CachePadded<Counts>; SLOTS + 1]>,
    latency: [AtomicU64; LATENCY_BUCKETS],
}

impl Default for Stats {
    fn default() -> Self {
        Self {
            counts: Box::new(std::array::from_fn(|_| CachePadded::default())),
            latency: Default::default(),
        }
    }
}

/// A thread's counters.
struct Mine<'a> {
    counts: &'a Counts,
    slot: usize,
}

impl Mine<'_> {
    /// Adds, and gives what was there before.
    #[inline]
    fn add(&self, counter: fn(&Counts) -> &AtomicU64, n: u64) -> u64 {
        add(counter(self.counts), self.slot, n)
    }
}

/// The counters at one moment.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct StatsSnapshot {
    /// Reads accepted.
    pub reads: u64,
    /// Writes accepted, write-zeroes among them.
    pub writes: u64,
    /// Flushes accepted.
    pub flushes: u64,
    /// Discards accepted.
    pub discards: u64,
    /// Sectors of the reads.
    pub sectors_read: u64,
    /// Sectors of the writes.
    pub sectors_written: u64,
    /// Bios accepted and not ended; those that were only sent on to another device do not count.
    pub in_flight: u64,
    /// Bios that ended with an error.
    pub failed: u64,
    /// Latencies of one bio in 64 of each thread: bucket `n` counts those of less than `2^n` microseconds and not
    /// less than half of that; the last takes what is longer.
    pub latency: [u64; LATENCY_BUCKETS],
}

impl Stats {
    #[inline]
    fn mine(&self) -> Mine<'_> {
        let slot = thread_slot();
        Mine {
            counts: &self.counts[slot.min(SLOTS)],
            slot,
        }
    }

    /// Counts a bio that the device is about to get.
    #[inline]
    pub(crate) fn start(&self, bio: &mut Bio) {
        if !bio.account() {
            // The rest of a bio that was split comes by again.
            return;
        }
        let mine = self.mine();
        let sectors = bio.len().raw();
        let before = match bio.op() {
            Op::Read => {
                mine.add(|counts| &counts.sectors_read, sectors);
                mine.add(|counts| &counts.reads, 1)
            }
            Op::Write | Op::WriteZeroes => {
                mine.add(|counts| &counts.sectors_written, sectors);
                mine.add(|counts| &counts.writes, 1)
            }
            Op::Flush => mine.add(|counts| &counts.flushes, 1),
            Op::Discard => mine.add(|counts| &counts.discards, 1),
        };
        if before % LATENCY_SAMPLE == 0 {
            bio.core_mut().started = Some(Instant::now());
        }
    }

    /// Counts the end of a bio.
    #[inline]
    pub(crate) fn end(&self, started: Option<Instant>, res: BlkResult) {
        let mine = self.mine();
        mine.add(|counts| &counts.ended, 1);
        if res.is_err() {
            mine.add(|counts| &counts.failed, 1);
        }
        if let Some(started) = started {
            let micros = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
            let bucket = (u64::BITS - micros.leading_zeros()) as usize;
            self.latency[bucket.min(LATENCY_BUCKETS - 1)].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts a bio that goes on to another device.
    pub(crate) fn pass_on(&self) {
        self.mine().add(|counts| &counts.passed_on, 1);
    }

    /// The counters now.
    #[must_use]
    pub fn snapshot(&self) -> StatsSnapshot {
        let sum = |counter: fn(&Counts) -> &AtomicU64| {
            let all = self.counts.iter().map(|counts| counter(counts));
            all.fold(0u64, |sum, one| {
                sum.wrapping_add(one.load(Ordering::Relaxed))
            })
        };
        // Ends first: what ends between the two looks in flight, never less than nothing.
        let over = sum(|counts| &counts.ended) + sum(|counts| &counts.passed_on);
        let reads = sum(|counts| &counts.reads);
        let writes = sum(|counts| &counts.writes);
        let flushes = sum(|counts| &counts.flushes);
        let discards = sum(|counts| &counts.discards);
        StatsSnapshot {
            reads,
            writes,
            flushes,
            discards,
            sectors_read: sum(|counts| &counts.sectors_read),
            sectors_written: sum(|counts| &counts.sectors_written),
            in_flight: (reads + writes + flushes + discards).saturating_sub(over),
            failed: sum(|counts| &counts.failed),
            latency: std::array::from_fn(|bucket| self.latency[bucket].load(Ordering::Relaxed)),
        }
    }
}

#[cfg(debug_assertions)]
impl Drop for Stats {
    // A bio names its device, and so keeps it, until it has ended or gone on: at the device's end
    // each has been counted once more.
    fn drop(&mut self) {
        let in_flight = self.snapshot().in_flight;
        assert!(
            in_flight == 0 || std::thread::panicking(),
            "a device was dropped with {in_flight} bios neither ended nor passed on"
        );
    }
}

/// A shared device.
pub type DynDevice = Arc<dyn BlockDevice>;

#[cfg(test)]
mod tests;
