//! What the client, its buffers, its bios and its thread share.

use std::sync::Arc;
use std::time::{Duration, Instant};

use blockstack::lane::Count;
use blockstack::sync::prim::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use blockstack::sync::{Condvar, Mutex, Rank, assert_may_wait};
use blockstack::{BioSet, BlkError, Buf, DynDevice, Lanes, Op, PagePool, Sector};

use crate::buffer::{Buffer, Inner};
use crate::client::ClientConfig;
use crate::error::BufError;
use crate::lru::Rings;
use crate::map::Map;
use crate::read::ReadPad;
use crate::reserve::{Holds, Reserve, Ticket};
use crate::span::Span;
use crate::state::{Phase, Shards};
use crate::validator::Validator;
use crate::writeback::{Control, Origin, WritePad};

/// Bios for reads, and as many for writes.
const BIOS: usize = 32;
/// Longest bio in bytes.
const MAX_IO: usize = 1 << 20;
/// Entries of the rings that a search for memory passes, at least.
const SEARCH: usize = 256;
/// How long a search for memory that nobody announces sleeps at a time.
const NAP: Duration = Duration::from_millis(10);

pub(crate) struct Cache {
    pub(crate) dev: Lanes,
    pub(crate) config: ClientConfig,
    pub(crate) pool: PagePool,
    /// Blocks on the device.
    pub(crate) blocks: u64,
    /// Buffers the cache aims to stay under, by its configuration.
    limit: usize,
    /// Buffers that it keeps in any case.
    pub(crate) minimum: AtomicUsize,
    /// What a write of a part of a block is rounded to.
    pub(crate) write_align: u32,
    /// Blocks in the longest bio.
    pub(crate) max_blocks: usize,
    sector_shift: u32,
    pub(crate) map: Map,
    pub(crate) hits: Count,
    pub(crate) shards: Shards,
    pub(crate) rings: Rings,
    pub(crate) reserve: Reserve,
    pub(crate) write_reserve: Reserve,
    pub(crate) holds: Holds,
    pub(crate) read_bios: BioSet<ReadPad>,
    pub(crate) write_bios: BioSet<WritePad>,
    pub(crate) control: Mutex<Control>,
    pub(crate) wake_thread: Condvar,
    pub(crate) kicked: AtomicBool,
    pub(crate) async_error: Mutex<Option<BlkError>>,
    pub(crate) failed: AtomicBool,
    pub(crate) next_id: AtomicU64,
    pub(crate) buffers: AtomicUsize,
    pub(crate) dirty: AtomicUsize,
    pub(crate) pinned: AtomicUsize,
    /// Buffers in the shards' `writing` sets.
    pub(crate) writing: AtomicUsize,
    pub(crate) blocks_written: AtomicU64,
    epoch: Instant,
    #[cfg(debug_assertions)]
    rank_probe: blockstack::sync::RwLock<()>,
}

impl Cache {
    pub(crate) fn new(
        dev: DynDevice,
        config: ClientConfig,
        pool: PagePool,
        reserved: usize,
    ) -> Result<Arc<Self>, BufError> {
        let size = config.block_size as usize;
        if !size.is_power_of_two()
            || !(512..=65536).contains(&size)
            || config.block_size < dev.limits().logical_block_size
        {
            return Err(BlkError::Unaligned.into());
        }
        let sector_shift = config.block_size.trailing_zeros() - blockstack::units::SECTOR_SHIFT;
        let limit = (config.cache_bytes / size).max(8);
        let max_io = MAX_IO.min(dev.limits().max_sectors as usize * 512);
        Ok(Arc::new(Self {
            blocks: dev.capacity().raw() >> sector_shift,
            limit,
            minimum: AtomicUsize::new(0),
            write_align: dev.limits().logical_block_size.max(512),
            max_blocks: (max_io / size).max(1),
            sector_shift,
            map: Map::new(limit),
            hits: Count::default(),
            shards: Shards::new(),
            rings: Rings::new(),
            reserve: Reserve::new(&pool, reserved.max(1), size)?,
            write_reserve: Reserve::new(&pool, 1, size)?,
            holds: Holds::new(reserved),
            read_bios: BioSet::new("bufio-read", BIOS),
            write_bios: BioSet::new("bufio-write", BIOS),
            control: Mutex::new(Rank::Pool, Control::default()),
            wake_thread: Condvar::new(),
            kicked: AtomicBool::new(false),
            async_error: Mutex::new(Rank::Pool, None),
            failed: AtomicBool::new(false),
            next_id: AtomicU64::new(0),
            buffers: AtomicUsize::new(0),
            dirty: AtomicUsize::new(0),
            pinned: AtomicUsize::new(0),
            writing: AtomicUsize::new(0),
            blocks_written: AtomicU64::new(0),
            epoch: Instant::now(),
            #[cfg(debug_assertions)]
            rank_probe: blockstack::sync::RwLock::new(config.rank, ()),
            dev: Lanes::new(&dev),
            config,
            pool,
        }))
    }

    pub(crate) fn now_ms(&self) -> u64 {
        self.epoch.elapsed().as_millis() as u64
    }

    pub(crate) fn block_size(&self) -> usize {
        self.config.block_size as usize
    }

    /// All bytes of a block.
    pub(crate) fn whole(&self) -> Span {
        Span::whole(self.block_size())
    }

    /// Buffers the cache aims to stay under.
    pub(crate) fn limit(&self) -> usize {
        self.limit.max(self.minimum.load(Ordering::Relaxed))
    }

    /// Where `block`, which lies on the device, begins.
    pub(crate) fn sector(&self, block: u64) -> Sector {
        Sector::new(block << self.sector_shift)
    }

    /// As [`Self::sector`], in bytes.
    pub(crate) fn byte(&self, block: u64) -> u64 {
        block * u64::from(self.config.block_size)
    }

    pub(crate) fn sectors_per_block(&self) -> u64 {
        1 << self.sector_shift
    }

    pub(crate) fn check_range(&self, block: u64) -> Result<(), BufError> {
        if block >= self.blocks {
            log::error!(
                "{}: block {block} is beyond the end at {}",
                self.dev.name(),
                self.blocks
            );
            return Err(BlkError::OutOfRange.into());
        }
        Ok(())
    }

    pub(crate) fn check_failed(&self) -> Result<(), BufError> {
        if self.failed.load(Ordering::Acquire) {
            return Err(BlkError::Io.into());
        }
        Ok(())
    }

    /// Panics in debug builds where the caller holds locks that the client's must not come after.
    #[inline]
    pub(crate) fn probe_rank(&self) {
        #[cfg(debug_assertions)]
        drop(self.rank_probe.read_nested());
    }

    pub(crate) fn count(&self) -> usize {
        self.buffers.load(Ordering::Relaxed)
    }

    /// Enters `inner`; gives the one that is there already back as the error.
    pub(crate) fn insert(&self, inner: &Arc<Inner>) -> Result<(), Arc<Inner>> {
        self.map.insert(inner)?;
        self.buffers.fetch_add(1, Ordering::Relaxed);
        self.enlist(inner);
        Ok(())
    }

    /// Takes `inner` itself, and no other buffer of its block, out of the map.
    pub(crate) fn remove(&self, inner: &Arc<Inner>) {
        let removed = self
            .map
            .remove_if(inner.block, |there| Arc::ptr_eq(there, inner));
        if removed.is_some() {
            self.buffers.fetch_sub(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn hold(self: &Arc<Self>, inner: Arc<Inner>) -> Buffer {
        inner.touch();
        let ticket = self
            .config
            .strict_holds
            .then(|| Ticket::new(self, inner.block));
        Buffer { inner, ticket }
    }

    /// Waits while `inner` is in a phase that `pending` names.
    pub(crate) fn wait_while(&self, inner: &Inner, pending: fn(Phase) -> bool) -> Phase {
        let phase = inner.phase();
        if !pending(phase) {
            return phase;
        }
        assert_may_wait();
        let shard = self.shards.of(inner.block);
        let mut sets = shard.sets.lock_nested();
        loop {
            let phase = inner.phase();
            if !pending(phase) {
                return phase;
            }
            shard.changed.wait(&mut sets);
        }
    }

    /// Moves `inner` to `to` where its phase is `from`, and wakes who waits.
    pub(crate) fn change(&self, inner: &Arc<Inner>, from: Phase, to: Phase) -> bool {
        let shard = self.shards.of(inner.block);
        let mut sets = shard.sets.lock_nested();
        let fits = inner.phase() == from;
        if fits {
            sets.enter(inner, to);
        }
        drop(sets);
        shard.changed.notify_all();
        fits
    }

    /// Memory for one block; evicts, writes and waits for it where there is none.
    pub(crate) fn alloc(self: &Arc<Self>) -> Result<Buf, BufError> {
        self.check_limit();
        let mut rounds = 0;
        loop {
            let error = match self.try_alloc() {
                Ok(buf) => return Ok(buf),
                Err(error) => error,
            };
            // All memory is dirty, held or pinned. A strict client's holders release what they
            // hold; others may not.
            rounds += 1;
            if rounds > 2 && !self.config.strict_holds {
                log::error!("{}: no memory for a metadata buffer", self.dev.name());
                return Err(error.into());
            }
            assert_may_wait();
            // What comes free from here on is not missed.
            let watch = self.reserve.watch();
            let written = self.write_some(self.collect(|_| true, false));
            match self.try_alloc() {
                Ok(buf) => return Ok(buf),
                Err(error) if written.is_err() => return Err(error.into()),
                // A model has no clock and nobody else in the pool: there a wake-up that is missed
                // is a deadlock.
                Err(_none) if cfg!(shuttle) && self.config.strict_holds => watch.wait_free(),
                // Others who share the pool do not tell us when they give something back.
                Err(_none) => watch.wait(NAP),
            }
        }
    }

    /// Memory that is free, of a buffer that nobody needs, or of the reserve.
    fn try_alloc(&self) -> Result<Buf, BlkError> {
        loop {
            let error = match self.pool.alloc(self.block_size()) {
                Ok(buf) => return Ok(buf),
                Err(error) => error,
            };
            // What is evicted may fill the reserve up instead.
            if self.evict(1, SEARCH.max(4 * self.limit())) == 0 {
                return self.reserve.take().ok_or(error);
            }
        }
    }

    /// Dirty buffers are fewer than the cache may hold: who comes for another one while they are
    /// not writes first, whatever the thread does.
    fn check_limit(&self) {
        if self.writable() > self.limit() && !self.is_failing() {
            let written = self.write_some(self.oldest(self.high_water()));
            // For the next `write_dirty`, which has it.
            if let Err(error) = written {
                log::warn!("{}: writeback: {error}", self.dev.name());
            }
        }
    }

    /// Writes as the thread does it: the caller may hold the content of one of them.
    fn write_some(&self, list: Vec<Arc<Inner>>) -> Result<(), BufError> {
        self.check_failed()?;
        self.write_out(list, Origin::Background)
    }

    /// Makes a buffer without content, to be read.
    pub(crate) fn unread(
        self: &Arc<Self>,
        block: u64,
        validator: &Arc<dyn Validator>,
    ) -> Arc<Inner> {
        Inner::new(self, block, Phase::Reading, None, validator)
    }

    /// Ends what refers to the cache from inside it: buffers left are gone.
    pub(crate) fn close(&self) {
        let mut lost = 0;
        for shard in self.shards.iter() {
            let mut sets = shard.sets.lock_nested();
            sets.closed = true;
            let dirty = std::mem::take(&mut sets.dirty);
            for inner in dirty.values() {
                inner.set_phase(Phase::Gone);
                lost += 1;
            }
            drop(sets);
            drop(dirty);
            shard.changed.notify_all();
        }
        self.map.clear();
        self.buffers.store(0, Ordering::Relaxed);
        self.dirty.fetch_sub(lost, Ordering::Relaxed);
        if lost > 0 {
            log::warn!(
                "{}: closed with {lost} dirty buffers that were never written",
                self.dev.name()
            );
        }
    }

    /// A bio for a read of blocks, of whom `wait` says whether it may be waited for.
    pub(crate) fn read_bio(&self, wait: blockstack::Wait) -> Option<blockstack::Bio> {
        self.read_bios.alloc(Op::Read, wait)
    }
}
