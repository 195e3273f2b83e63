//! A held buffer.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

use blockstack::Buf;
use blockstack::sync::blocking;
use parking_lot::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::cache::Cache;
use crate::error::BufError;
use crate::reserve::Ticket;
use crate::state::Phase;
use crate::validator::Validator;

pub(crate) struct Inner {
    pub(crate) block: u64,
    /// Tells this buffer from an earlier or later one of the same block.
    pub(crate) id: u64,
    phase: AtomicU8,
    /// Used since the clock hand last came by.
    pub(crate) referenced: AtomicBool,
    pub(crate) pins: AtomicU32,
    /// Milliseconds of the cache's clock.
    pub(crate) dirtied_at: AtomicU64,
    /// `None` while the content is being read or after it was moved away.
    pub(crate) data: RwLock<Option<Buf>>,
    kind: Mutex<Kind>,
    pub(crate) cache: Arc<Cache>,
}

struct Kind {
    validator: Arc<dyn Validator>,
    error: Option<BufError>,
}

impl Inner {
    pub(crate) fn new(
        cache: &Arc<Cache>,
        block: u64,
        phase: Phase,
        data: Option<Buf>,
        validator: &Arc<dyn Validator>,
    ) -> Arc<Self> {
        Arc::new(Self {
            block,
            id: cache.next_id.fetch_add(1, Ordering::Relaxed),
            phase: AtomicU8::new(phase as u8),
            referenced: AtomicBool::new(false),
            pins: AtomicU32::new(0),
            dirtied_at: AtomicU64::new(0),
            data: RwLock::new(data),
            kind: Mutex::new(Kind {
                validator: validator.clone(),
                error: None,
            }),
            cache: cache.clone(),
        })
    }

    pub(crate) fn phase(&self) -> Phase {
        Phase::from_u8(self.phase.load(Ordering::Acquire))
    }

    /// For `Sets::enter`.
    pub(crate) fn set_phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Release);
    }

    pub(crate) fn is_pinned(&self) -> bool {
        self.pins.load(Ordering::Acquire) > 0
    }

    pub(crate) fn touch(&self) {
        if !self.referenced.load(Ordering::Relaxed) {
            self.referenced.store(true, Ordering::Relaxed);
        }
    }

    pub(crate) fn validator(&self) -> Arc<dyn Validator> {
        self.kind.lock().validator.clone()
    }

    pub(crate) fn set_validator(&self, validator: &Arc<dyn Validator>) {
        let old = std::mem::replace(&mut self.kind.lock().validator, validator.clone());
        drop(old);
    }

    pub(crate) fn error(&self) -> Option<BufError> {
        self.kind.lock().error
    }

    pub(crate) fn set_error(&self, error: BufError) {
        self.kind.lock().error = Some(error);
    }

    pub(crate) fn lock_data(&self) -> RwLockWriteGuard<'_, Option<Buf>> {
        match self.data.try_write() {
            Some(guard) => guard,
            None => blocking(|| self.data.write()),
        }
    }

    pub(crate) fn mark_dirty(self: &Arc<Self>) {
        if self.phase().is_dirty() {
            return;
        }
        let mut sets = self.cache.shards.of(self.block).sets.lock_nested();
        match self.phase() {
            Phase::Clean => sets.enter(self, Phase::Dirty),
            Phase::Writing => sets.enter(self, Phase::Redirtied),
            // Forgotten, or dirty by now.
            _ => return,
        }
        drop(sets);
        self.cache.dirty_pressure();
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(buf) = self.data.get_mut().take() {
            self.cache.reserve.give(buf);
        }
        if *self.pins.get_mut() > 0 {
            self.cache.pinned.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// A hold on a cached block; cloning takes another hold, dropping releases it.
///
/// A block that is held is not evicted. [`Client::forget`](crate::Client::forget) detaches a held
/// buffer: the content stays usable, but is never written, and the next read of the block gives
/// another buffer.
#[derive(Clone)]
pub struct Buffer {
    pub(crate) inner: Arc<Inner>,
    /// Counts the hold where the client is strict about holds.
    pub(crate) ticket: Option<Arc<Ticket>>,
}

/// The content, for reading.
pub struct ReadGuard<'a>(RwLockReadGuard<'a, Option<Buf>>);

/// The content, for changing; the caller marks the buffer dirty.
pub struct WriteGuard<'a>(RwLockWriteGuard<'a, Option<Buf>>);

impl Buffer {
    /// Its number, in blocks of the client.
    #[must_use]
    pub fn block(&self) -> u64 {
        self.inner.block
    }

    /// The content, for reading. A thread may hold several of these on one buffer.
    #[must_use]
    pub fn data(&self) -> ReadGuard<'_> {
        // Recursive, so that a writer in between cannot stop a second guard of the same thread.
        ReadGuard(match self.inner.data.try_read_recursive() {
            Some(guard) => guard,
            None => blocking(|| self.inner.data.read_recursive()),
        })
    }

    /// The content, for changing.
    #[must_use]
    pub fn data_mut(&self) -> WriteGuard<'_> {
        WriteGuard(self.inner.lock_data())
    }

    /// Says that the content is newer than the disk's. Called after the change, or with the
    /// [`WriteGuard`] still held. Does nothing to a forgotten buffer.
    pub fn mark_dirty(&self) {
        self.inner.cache.probe_rank();
        self.inner.mark_dirty();
    }

    /// Whether the content is newer than the disk's and than a copy on its way there.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.inner.phase().is_dirty()
    }

    /// Keeps the buffer from being written home and from being evicted until [`Self::unpin`]; pins
    /// count. What is changed after this call is not written; a copy made before may still be on
    /// its way.
    pub fn pin(&self) {
        if self.inner.pins.fetch_add(1, Ordering::AcqRel) == 0 {
            self.inner.cache.pinned.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Takes one pin back.
    pub fn unpin(&self) {
        let pins = self
            .inner
            .pins
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |pins| {
                pins.checked_sub(1)
            });
        debug_assert!(pins.is_ok(), "block {} is not pinned", self.block());
        if pins == Ok(1) {
            self.inner.cache.pinned.fetch_sub(1, Ordering::Relaxed);
            self.inner.cache.dirty_pressure();
        }
    }

    /// Whether it is pinned.
    #[must_use]
    pub fn is_pinned(&self) -> bool {
        self.inner.is_pinned()
    }

    /// Sets the kind of block it is now.
    pub fn set_validator(&self, validator: &Arc<dyn Validator>) {
        self.inner.set_validator(validator);
    }

    /// Sets the checksum in place and copies the content out; `dst` is one block long.
    pub fn copy_prepared(&self, dst: &mut [u8]) {
        let validator = self.inner.validator();
        let mut data = self.inner.lock_data();
        if let Some(data) = data.as_mut() {
            validator.prepare(self.inner.block, data);
            dst.copy_from_slice(data);
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer")
            .field("block", &self.inner.block)
            .field("phase", &self.inner.phase())
            .field("pins", &self.inner.pins.load(Ordering::Relaxed))
            .finish_non_exhaustive()
    }
}

impl Deref for ReadGuard<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}

impl Deref for WriteGuard<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}

impl DerefMut for WriteGuard<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.0.as_deref_mut().unwrap_or_default()
    }
}
