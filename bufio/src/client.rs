//! A client: the cache of one device.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use blockstack::sync::Rank;
use blockstack::{
    BioFlags, BlkError, DynDevice, Op, PagePool, Sector, SectorCount, flush_wait, range_wait,
    read_wait, write_wait,
};
use dashmap::DashMap;
use parking_lot::RwLock;

use crate::buffer::{Buffer, Inner};
use crate::error::BufError;
use crate::validator::Validator;

/// How a client is made.
#[derive(Clone, Copy, Debug)]
pub struct ClientConfig {
    /// Bytes in a block: a power of two, 512 to 65536.
    pub block_size: u32,
    /// Bytes of content the cache aims to stay under.
    pub cache_bytes: usize,
    /// Rank of the client's locks.
    pub rank: Rank,
    /// Age at which a dirty buffer is written in the background.
    pub writeback_age: Duration,
    /// Whether the hold contract of dm-bufio is asserted: one buffer a thread.
    pub strict_holds: bool,
}

/// See the crate's documentation.
pub struct Client {
    dev: DynDevice,
    config: ClientConfig,
    buffers: DashMap<u64, Buffer>,
    failed: AtomicBool,
}

impl Client {
    /// Makes a client of `dev`.
    ///
    /// # Errors
    /// [`BlkError::Unaligned`] for a block size that is none.
    pub fn new(dev: DynDevice, config: ClientConfig) -> Result<Arc<Self>, BufError> {
        if !config.block_size.is_power_of_two() || !(512..=65536).contains(&config.block_size) {
            return Err(BlkError::Unaligned.into());
        }
        Ok(Arc::new(Self {
            dev,
            config,
            buffers: DashMap::new(),
            failed: AtomicBool::new(false),
        }))
    }

    /// Bytes in a block.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.config.block_size
    }

    /// The device below.
    #[must_use]
    pub fn dev(&self) -> &DynDevice {
        &self.dev
    }

    fn sector(&self, block: u64) -> Result<Sector, BufError> {
        let bytes = block.checked_mul(u64::from(self.config.block_size));
        bytes
            .and_then(Sector::from_bytes)
            .ok_or(BufError::Blk(BlkError::OutOfRange))
    }

    /// Gives the buffer of `block`, read and checked where it was not cached.
    ///
    /// # Errors
    /// The device's, or what the validator found.
    pub fn read(&self, block: u64, validator: &Arc<dyn Validator>) -> Result<Buffer, BufError> {
        if let Some(buffer) = self.get(block) {
            return Ok(buffer);
        }
        let buf = PagePool::shared().alloc(self.config.block_size as usize)?;
        let buf = read_wait(&self.dev, self.sector(block)?, buf)?;
        validator
            .check(block, &buf)
            .map_err(|invalid| BufError::Invalid {
                block,
                what: invalid.what,
            })?;
        Ok(self.insert(block, buf, validator))
    }

    fn insert(&self, block: u64, buf: blockstack::Buf, validator: &Arc<dyn Validator>) -> Buffer {
        let fresh = || {
            Buffer(Arc::new(Inner {
                block,
                data: RwLock::new(buf),
                dirty: AtomicBool::new(false),
                pins: AtomicU32::new(0),
                validator: RwLock::new(validator.clone()),
            }))
        };
        self.buffers.entry(block).or_insert_with(fresh).clone()
    }

    /// Gives the buffer of `block` only where it is cached and up to date.
    #[must_use]
    pub fn get(&self, block: u64) -> Option<Buffer> {
        self.buffers.get(&block).map(|buffer| buffer.clone())
    }

    /// Gives a buffer of zeros for `block` without reading it.
    ///
    /// # Errors
    /// [`BlkError::NoMemory`].
    pub fn new_zeroed(
        &self,
        block: u64,
        validator: &Arc<dyn Validator>,
    ) -> Result<Buffer, BufError> {
        let buf = PagePool::shared().alloc_zeroed(self.config.block_size as usize)?;
        let buffer = self.insert(block, buf, validator);
        buffer.set_validator(validator);
        buffer.data_mut().fill(0);
        Ok(buffer)
    }

    /// Starts to read `n` blocks from `block` on.
    pub fn prefetch(&self, _block: u64, _n: u64) {}

    /// Drops a buffer, dirty or not, without writing it.
    pub fn forget(&self, block: u64) {
        self.buffers.remove(&block);
    }

    /// Writes all dirty buffers that are not pinned and waits for them.
    ///
    /// # Errors
    /// The first error of this or an earlier asynchronous write.
    pub fn write_dirty(&self) -> Result<(), BufError> {
        let mut dirty: Vec<Buffer> = self
            .buffers
            .iter()
            .filter(|buffer| buffer.is_dirty())
            .map(|buffer| buffer.value().clone())
            .collect();
        dirty.sort_by_key(Buffer::block);
        self.write_buffers(&dirty)
    }

    /// Writes those of `buffers` that are dirty and not pinned, and waits for them.
    ///
    /// # Errors
    /// The first error; the buffer stays dirty.
    pub fn write_buffers(&self, buffers: &[Buffer]) -> Result<(), BufError> {
        let mut first = Ok(());
        for buffer in buffers {
            if buffer.0.pins.load(Ordering::Acquire) > 0
                || !buffer.0.dirty.swap(false, Ordering::AcqRel)
            {
                continue;
            }
            let mut buf = PagePool::shared().alloc(self.config.block_size as usize)?;
            buffer.copy_prepared(&mut buf);
            let res = write_wait(&self.dev, self.sector(buffer.block())?, buf, BioFlags::META);
            if let Err(error) = res {
                buffer.mark_dirty();
                first = first.and(Err(error.into()));
            }
        }
        first
    }

    /// Starts to write dirty buffers.
    pub fn write_dirty_async(&self) {}

    /// Flushes the device.
    ///
    /// # Errors
    /// The device's.
    pub fn flush(&self) -> Result<(), BufError> {
        Ok(flush_wait(&self.dev)?)
    }

    /// Discards blocks on the device and forgets their buffers.
    ///
    /// # Errors
    /// The device's.
    pub fn discard(&self, block: u64, n: u64) -> Result<(), BufError> {
        (block..block + n).for_each(|block| self.forget(block));
        let len = self.sector(n)?;
        Ok(range_wait(
            &self.dev,
            Op::Discard,
            self.sector(block)?,
            SectorCount::new(len.raw()),
        )?)
    }

    /// Drops all buffers that are clean and not held.
    pub fn drop_buffers(&self) {
        self.buffers
            .retain(|_, buffer| Arc::strong_count(&buffer.0) > 1 || buffer.is_dirty());
    }

    /// Latches the client as failed.
    pub fn fail(&self) {
        self.failed.store(true, Ordering::Release);
    }

    /// Whether the client was latched as failed.
    #[must_use]
    pub fn is_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }
}
