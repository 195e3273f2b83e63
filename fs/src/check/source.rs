//! Where a check reads from: an image in memory or a device, and over it what a replay would write.

use std::cell::RefCell;
use std::collections::HashMap;

use blockstack::backend::mem::Image;
use blockstack::{BlkError, BlkResult, Buf, DynDevice, PagePool, Sector, read_wait};

/// What can be checked.
pub trait Source {
    /// Bytes there are.
    fn size(&self) -> u64;

    /// Reads bytes; the range lies below [`Source::size`].
    ///
    /// # Errors
    /// The device's.
    fn read_at(&self, at: u64, out: &mut [u8]) -> BlkResult;
}

impl Source for Image {
    fn size(&self) -> u64 {
        Image::size(self).raw() * 512
    }

    fn read_at(&self, at: u64, out: &mut [u8]) -> BlkResult {
        let end = at.checked_add(out.len() as u64);
        if end.is_none_or(|end| end > Source::size(self)) {
            return Err(BlkError::OutOfRange);
        }
        Image::read_at(self, at as usize, out);
        Ok(())
    }
}

/// Bytes read at once.
const WINDOW: u64 = 128 << 10;

/// A device; keeps the part of it that was read last.
pub struct DeviceSource {
    dev: DynDevice,
    size: u64,
    window: RefCell<(u64, Option<Buf>)>,
}

impl DeviceSource {
    /// Takes a device.
    #[must_use]
    pub fn new(dev: DynDevice) -> Self {
        Self {
            size: dev.capacity().raw() * 512,
            dev,
            window: RefCell::new((0, None)),
        }
    }

    fn load(&self, start: u64) -> BlkResult {
        let mut window = self.window.borrow_mut();
        if window.0 == start && window.1.is_some() {
            return Ok(());
        }
        let len = WINDOW.min(self.size - start) as usize;
        let buf = PagePool::shared().alloc(len)?;
        window.1 = None;
        let sector = Sector::from_bytes(start).ok_or(BlkError::OutOfRange)?;
        *window = (start, Some(read_wait(&self.dev, sector, buf)?));
        Ok(())
    }
}

impl Source for DeviceSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, at: u64, out: &mut [u8]) -> BlkResult {
        let end = at.checked_add(out.len() as u64);
        if end.is_none_or(|end| end > self.size) {
            return Err(BlkError::OutOfRange);
        }
        let mut done = 0;
        while done < out.len() {
            let from = at + done as u64;
            let start = from / WINDOW * WINDOW;
            self.load(start)?;
            let window = self.window.borrow();
            let Some(buf) = &window.1 else {
                return Err(BlkError::Io);
            };
            let skip = (from - start) as usize;
            let len = (buf.len() - skip).min(out.len() - done);
            out[done..done + len].copy_from_slice(&buf[skip..skip + len]);
            done += len;
        }
        Ok(())
    }
}

/// Blocks that a replay would write.
#[derive(Debug, Default)]
pub(super) struct Overlay {
    at: HashMap<u64, usize>,
    bytes: Vec<u8>,
}

impl Overlay {
    pub(super) fn clear(&mut self) {
        self.at.clear();
        self.bytes.clear();
    }

    pub(super) fn put(&mut self, block: u64, data: &[u8]) {
        match self.at.get(&block) {
            Some(&at) => self.bytes[at..at + data.len()].copy_from_slice(data),
            None => {
                self.at.insert(block, self.bytes.len());
                self.bytes.extend_from_slice(data);
            }
        }
    }

    fn block(&self, block: u64, block_size: usize) -> Option<&[u8]> {
        let at = *self.at.get(&block)?;
        self.bytes.get(at..at + block_size)
    }
}

/// The blocks of a file system, as they are after a replay.
#[derive(Clone, Copy)]
pub(super) struct Blocks<'a> {
    pub(super) source: &'a dyn Source,
    pub(super) overlay: &'a Overlay,
    pub(super) block_size: usize,
}

impl Blocks<'_> {
    /// Reads whole blocks from `block` on.
    pub(super) fn read(&self, block: u64, out: &mut [u8]) -> BlkResult {
        let at = block
            .checked_mul(self.block_size as u64)
            .ok_or(BlkError::OutOfRange)?;
        let is_one = out.len() == self.block_size;
        if is_one && let Some(data) = self.overlay.block(block, self.block_size) {
            out.copy_from_slice(data);
            return Ok(());
        }
        self.source.read_at(at, out)?;
        if !is_one && !self.overlay.at.is_empty() {
            for (index, out) in out.chunks_mut(self.block_size).enumerate() {
                if let Some(data) = self.overlay.block(block + index as u64, self.block_size) {
                    out.copy_from_slice(&data[..out.len()]);
                }
            }
        }
        Ok(())
    }
}
