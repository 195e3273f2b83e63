//! A client: the cache of one device.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use blockstack::sync::prim::atomic::Ordering;
use blockstack::sync::prim::thread::{self, JoinHandle};
use blockstack::sync::{Mutex, Rank, blocking};
use blockstack::{BlkError, DynDevice, Op, PagePool, SectorCount, flush_wait, range_wait};

use crate::buffer::{Buffer, Inner};
use crate::cache::Cache;
use crate::error::BufError;
use crate::validator::Validator;
use crate::writeback::{Origin, Request};

/// How a client is made.
#[derive(Clone, Copy, Debug)]
pub struct ClientConfig {
    /// Bytes in a block: a power of two, 512 to 65536.
    pub block_size: u32,
    /// Bytes of content the cache aims to stay under. It grows past them while all is held, pinned
    /// or dirty.
    pub cache_bytes: usize,
    /// Where the client stands in the order of locks: its calls may be made under locks of lower
    /// ranks only.
    pub rank: Rank,
    /// Age at which a dirty buffer is written in the background.
    pub writeback_age: Duration,
    /// Whether the hold contract of dm-bufio is kept: one buffer a thread, and one thread with as
    /// many as are reserved. Debug builds panic on a breach; in return a read waits for memory
    /// rather than fail.
    pub strict_holds: bool,
}

/// Counters of a client.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ClientStats {
    /// Reads and gets served from the cache.
    pub hits: u64,
    /// Reads that were not.
    pub misses: u64,
    /// Buffers in the cache.
    pub buffers: usize,
    /// Buffers newer than the disk.
    pub dirty: usize,
    /// Buffers with a pin.
    pub pinned: usize,
    /// Blocks sent to the disk so far.
    pub written: u64,
}

/// See the crate's documentation.
pub struct Client {
    cache: Arc<Cache>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Client {
    /// Makes a client of `dev` with memory of the shared pool and one buffer in reserve.
    ///
    /// # Errors
    /// [`BlkError::Unaligned`] for a block size that is none, or below the device's;
    /// [`BlkError::NoMemory`].
    pub fn new(dev: DynDevice, config: ClientConfig) -> Result<Arc<Self>, BufError> {
        Self::with_reserve(dev, config, PagePool::shared().clone(), 1)
    }

    /// As [`Self::new`], with memory of `pool`, where `reserved` buffers are kept back.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_reserve(
        dev: DynDevice,
        config: ClientConfig,
        pool: PagePool,
        reserved: usize,
    ) -> Result<Arc<Self>, BufError> {
        let cache = Cache::new(dev, config, pool, reserved)?;
        let weak = Arc::downgrade(&cache);
        let thread = thread::Builder::new()
            .name("bufio-writeback".into())
            .spawn(move || Cache::writeback_loop(&weak))
            .map_err(|error| {
                log::error!("cannot start the writeback thread: {error}");
                BlkError::NoMemory
            })?;
        Ok(Arc::new(Self {
            cache,
            thread: Mutex::new(Rank::Pool, Some(thread)),
        }))
    }

    /// Bytes in a block.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.cache.config.block_size
    }

    /// Whole blocks on the device.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.cache.blocks
    }

    /// The device below.
    #[must_use]
    pub fn dev(&self) -> &DynDevice {
        &self.cache.dev
    }

    /// Gives the buffer of `block`, read and checked where it was not cached. Threads that miss the
    /// same block share one read. What failed is not cached, and who shared it reads once more for
    /// itself: the fault may have been that of a block read along.
    ///
    /// # Errors
    /// The device's, or what the validator found.
    ///
    /// # Panics
    /// In debug builds, where it would have to wait in a context that must not.
    pub fn read(&self, block: u64, validator: &Arc<dyn Validator>) -> Result<Buffer, BufError> {
        self.cache.read(block, validator)
    }

    /// Gives the buffer of `block` only where it is cached and up to date; never waits.
    #[must_use]
    pub fn get(&self, block: u64) -> Option<Buffer> {
        self.cache.get(block)
    }

    /// Gives a buffer of zeros for `block` without reading it. One that is cached is zeroed and
    /// gets the validator, and stays as clean or dirty as it was.
    ///
    /// # Errors
    /// [`BlkError::NoMemory`], [`BlkError::OutOfRange`].
    ///
    /// # Panics
    /// In debug builds, in a context that must not wait: it may have to wait for memory.
    pub fn new_zeroed(
        &self,
        block: u64,
        validator: &Arc<dyn Validator>,
    ) -> Result<Buffer, BufError> {
        self.cache.new_zeroed(block, validator)
    }

    /// Starts to read those of `n` blocks from `block` on that are not cached. Waits for nothing;
    /// what cannot be had at once is left out. The content is checked by the read that comes for
    /// it.
    pub fn prefetch(&self, block: u64, n: u64) {
        self.cache.prefetch(block, n);
    }

    /// Drops a buffer, dirty or pinned or not, without writing it. Whoever holds it keeps the
    /// content, detached: it is never written. A write that is on its way goes on;
    /// [`Self::wait_writes`] waits for it, and no later write of the block by this client can be
    /// overtaken by it.
    pub fn forget(&self, block: u64) {
        self.cache.forget(block);
    }

    /// As [`Self::forget`], for `n` blocks from `block` on.
    pub fn forget_range(&self, block: u64, n: u64) {
        self.cache.forget_range(block, n);
    }

    /// Waits until no write of these blocks is on its way. Called before somebody else, a data
    /// write say, uses blocks that were metadata.
    pub fn wait_writes(&self, block: u64, n: u64) {
        self.cache.wait_writes(block, n);
    }

    /// Writes all dirty buffers that are not pinned and waits for them, those already on their way
    /// among them. The device is not flushed.
    ///
    /// # Errors
    /// The first error of an earlier write in the background, once; else the first of this call.
    /// What failed stays dirty.
    pub fn write_dirty(&self) -> Result<(), BufError> {
        let written = self.cache.write_all();
        self.cache.take_async_error().and(written)
    }

    /// Writes those of `buffers` that are dirty and not pinned, and waits for them and for those
    /// that are being written. Neighbours share a bio.
    ///
    /// # Errors
    /// The first error; the buffer stays dirty.
    pub fn write_buffers(&self, buffers: &[Buffer]) -> Result<(), BufError> {
        self.cache.check_failed()?;
        let mut list: Vec<Arc<Inner>> = buffers.iter().map(|held| held.inner.clone()).collect();
        list.sort_unstable_by_key(|inner| inner.block);
        list.dedup_by_key(|inner| inner.id);
        self.cache.write_out(list, Origin::Caller)
    }

    /// Starts to write dirty buffers; their errors are for the next [`Self::write_dirty`].
    pub fn write_dirty_async(&self) {
        self.cache.kick(Request::All);
    }

    /// Flushes the device.
    ///
    /// # Errors
    /// The device's.
    pub fn flush(&self) -> Result<(), BufError> {
        self.cache.check_failed()?;
        Ok(flush_wait(&self.cache.dev)?)
    }

    /// Forgets the buffers of `n` blocks from `block` on, waits for writes on their way, and
    /// discards the blocks on the device.
    ///
    /// # Errors
    /// [`BlkError::NotSupported`], and [`BlkError::OutOfRange`], with nothing forgotten; the
    /// device's.
    pub fn discard(&self, block: u64, n: u64) -> Result<(), BufError> {
        if n == 0 {
            return Ok(());
        }
        let cache = &self.cache;
        cache.check_failed()?;
        let end = block.checked_add(n).ok_or(BlkError::OutOfRange)?;
        cache.check_range(end - 1)?;
        let limit = cache.dev.limits().max_discard_sectors / cache.sectors_per_block();
        if limit == 0 {
            return Err(BlkError::NotSupported.into());
        }
        cache.forget_range(block, n);
        cache.wait_writes(block, n);
        let mut at = block;
        while at < end {
            let blocks = limit.min(end - at);
            let sectors = SectorCount::new(blocks * cache.sectors_per_block());
            range_wait(&cache.dev, Op::Discard, cache.sector(at), sectors)?;
            at += blocks;
        }
        Ok(())
    }

    /// Releases `buffer` and gives its content to `to`; a buffer of `to` that is cached is
    /// forgotten. The old block is written first if it is dirty. Where nobody else holds the buffer
    /// its memory moves: `to` is dirty then, and the old block not cached any more. Where somebody
    /// does, or it is pinned, the buffer stays what it is, and `to` is written before this returns
    /// and is not cached. (A write that just ended may count as a holder for a moment.)
    ///
    /// # Errors
    /// What a write reports. The buffer is released in any case: where the old block could not be
    /// written it stays dirty and `to` what it was; where `to` could not, its content is undefined.
    pub fn release_move(&self, buffer: Buffer, to: u64) -> Result<(), BufError> {
        self.cache.release_move(buffer, to)
    }

    /// Writes what is dirty and drops all buffers that are neither held nor pinned. What cannot be
    /// written stays.
    pub fn drop_buffers(&self) {
        if let Err(error) = self.cache.write_all() {
            log::warn!("{}: buffers kept: {error}", self.cache.dev.name());
            self.cache
                .async_error
                .lock_nested()
                .get_or_insert(match error {
                    BufError::Blk(error) => error,
                    BufError::Invalid { .. } => BlkError::Io,
                });
        }
        self.cache.evict_to(0);
    }

    /// Evicts clean buffers that nobody holds until the content is at most `bytes` or that of the
    /// minimum, or none is left.
    pub fn shrink(&self, bytes: usize) {
        let minimum = self.cache.minimum.load(Ordering::Relaxed);
        let wanted = bytes / self.cache.block_size();
        self.cache.evict_to(wanted.max(minimum));
    }

    /// Keeps the cache from becoming smaller than `n` buffers: neither [`Self::shrink`] nor the
    /// limit of [`ClientConfig::cache_bytes`] evicts below that. [`Self::drop_buffers`] does, and
    /// so does whoever finds no memory.
    pub fn set_minimum_buffers(&self, n: usize) {
        self.cache.minimum.store(n, Ordering::Relaxed);
    }

    /// Counters now.
    #[must_use]
    pub fn stats(&self) -> ClientStats {
        let cache = &self.cache;
        let sum = |counter: fn(&crate::state::Shard) -> u64| cache.shards.iter().map(counter).sum();
        ClientStats {
            hits: cache.hits.sum(),
            misses: sum(|shard| shard.misses.load(Ordering::Relaxed)),
            buffers: cache.count(),
            dirty: cache.dirty.load(Ordering::Relaxed),
            pinned: cache.pinned.load(Ordering::Relaxed),
            written: cache.blocks_written.load(Ordering::Relaxed),
        }
    }

    /// Latches the client as failed: all later writes and flushes fail. Reads go on.
    pub fn fail(&self) {
        self.cache.failed.store(true, Ordering::Release);
    }

    /// Whether the client was latched as failed.
    #[must_use]
    pub fn is_failed(&self) -> bool {
        self.cache.failed.load(Ordering::Acquire)
    }

    /// Ends the writeback thread and waits for what it writes. Dirty buffers stay dirty; they can
    /// still be written by a call.
    pub fn shutdown(&self) {
        let thread = self.thread.lock_nested().take();
        let Some(thread) = thread else { return };
        self.cache.control.lock_nested().stop = true;
        self.cache.wake_thread.notify_all();
        if blocking(|| thread.join()).is_err() {
            log::error!("{}: the writeback thread panicked", self.cache.dev.name());
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.shutdown();
        self.cache.close();
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("dev", &self.cache.dev.name())
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}
