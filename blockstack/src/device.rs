//! Block devices and their limits.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::bio::{Bio, Op};
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
    /// Takes a bio that [`submit_bio`](crate::submit_bio) has checked. Called by `submit_bio` only.
    /// Must not wait; sends the bio on, or completes it now or later.
    fn submit(&self, bio: Bio);
}

/// Counters of a device.
#[derive(Debug, Default)]
pub struct Stats {
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    discards: AtomicU64,
    sectors_read: AtomicU64,
    sectors_written: AtomicU64,
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
}

impl Stats {
    /// Counts a bio that the device is about to get.
    pub(crate) fn start(&self, bio: &mut Bio) {
        let (count, sectors) = match bio.op() {
            Op::Read => (&self.reads, Some(&self.sectors_read)),
            Op::Write | Op::WriteZeroes => (&self.writes, Some(&self.sectors_written)),
            Op::Flush => (&self.flushes, None),
            Op::Discard => (&self.discards, None),
        };
        count.fetch_add(1, Ordering::Relaxed);
        if let Some(sectors) = sectors {
            sectors.fetch_add(bio.len().raw(), Ordering::Relaxed);
        }
    }

    /// The counters now.
    #[must_use]
    pub fn snapshot(&self) -> StatsSnapshot {
        StatsSnapshot {
            reads: self.reads.load(Ordering::Relaxed),
            writes: self.writes.load(Ordering::Relaxed),
            flushes: self.flushes.load(Ordering::Relaxed),
            discards: self.discards.load(Ordering::Relaxed),
            sectors_read: self.sectors_read.load(Ordering::Relaxed),
            sectors_written: self.sectors_written.load(Ordering::Relaxed),
        }
    }
}

/// A shared device.
pub type DynDevice = Arc<dyn BlockDevice>;
