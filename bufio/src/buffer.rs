//! A held buffer.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use blockstack::Buf;
use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::validator::Validator;

pub(crate) struct Inner {
    pub(crate) block: u64,
    pub(crate) data: RwLock<Buf>,
    pub(crate) dirty: AtomicBool,
    pub(crate) pins: AtomicU32,
    pub(crate) validator: RwLock<Arc<dyn Validator>>,
}

/// A hold on a cached block; cloning takes another hold, dropping releases it.
#[derive(Clone)]
pub struct Buffer(pub(crate) Arc<Inner>);

/// The content, for reading.
pub struct ReadGuard<'a>(RwLockReadGuard<'a, Buf>);

/// The content, for changing; the caller marks the buffer dirty.
pub struct WriteGuard<'a>(RwLockWriteGuard<'a, Buf>);

impl Buffer {
    /// Its number, in blocks of the client.
    #[must_use]
    pub fn block(&self) -> u64 {
        self.0.block
    }

    /// The content, for reading.
    #[must_use]
    pub fn data(&self) -> ReadGuard<'_> {
        ReadGuard(self.0.data.read())
    }

    /// The content, for changing.
    #[must_use]
    pub fn data_mut(&self) -> WriteGuard<'_> {
        WriteGuard(self.0.data.write())
    }

    /// Says that the content is newer than the disk's.
    pub fn mark_dirty(&self) {
        self.0.dirty.store(true, Ordering::Release);
    }

    /// Whether the content is newer than the disk's.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.0.dirty.load(Ordering::Acquire)
    }

    /// Keeps the buffer from being written home until [`Self::unpin`]; pins count.
    pub fn pin(&self) {
        self.0.pins.fetch_add(1, Ordering::AcqRel);
    }

    /// Takes one pin back.
    pub fn unpin(&self) {
        self.0.pins.fetch_sub(1, Ordering::AcqRel);
    }

    /// Sets the kind of block it is now.
    pub fn set_validator(&self, validator: &Arc<dyn Validator>) {
        *self.0.validator.write() = validator.clone();
    }

    /// Sets the checksum in place and copies the content out; `dst` is one block long.
    pub fn copy_prepared(&self, dst: &mut [u8]) {
        let validator = self.0.validator.read().clone();
        let mut data = self.0.data.write();
        validator.prepare(self.0.block, &mut data);
        dst.copy_from_slice(&data);
    }
}

impl Deref for ReadGuard<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl Deref for WriteGuard<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for WriteGuard<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}
