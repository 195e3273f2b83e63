//! A held buffer.

use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;

use blockstack::sync::blocking;
use blockstack::sync::prim::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use blockstack::sync::prim::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use blockstack::{BlkError, Buf};

use crate::cache::Cache;
use crate::error::BufError;
use crate::reserve::Ticket;
use crate::span::Span;
use crate::state::Phase;
use crate::validator::Validator;

/// In this order what a hit looks at lies together, beside the count of references.
#[repr(C)]
pub(crate) struct Inner {
    pub(crate) block: u64,
    /// Tells this buffer from an earlier or later one of the same block.
    pub(crate) id: u64,
    phase: AtomicU8,
    /// Used since the clock hand last came by.
    pub(crate) referenced: AtomicBool,
    pub(crate) pins: AtomicU32,
    /// `None` while the content is being read or after it was moved away.
    pub(crate) data: RwLock<Option<Buf>>,
    pub(crate) cache: Arc<Cache>,
    kind: Mutex<Kind>,
    /// Milliseconds of the cache's clock.
    pub(crate) dirtied_at: AtomicU64,
    /// Spans, by invariant 6 of `state`: what a write has to bring to the disk, and what the one on
    /// its way brings. These and the counts change under the lock of the shard.
    dirty: AtomicU64,
    sent: AtomicU64,
    /// Copies made so far for writes, and the number of the last that reached the disk.
    copies: AtomicU64,
    written: AtomicU64,
}

/// What became of a copy that somebody waits for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Fate {
    Written,
    /// It, and what was copied later, did not reach the disk.
    Failed,
    /// Still on its way, or not made yet.
    Open,
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
        // Content that was not read may differ from the disk's anywhere.
        let dirty = match data {
            Some(_) => cache.whole(),
            None => Span::EMPTY,
        };
        Arc::new(Self {
            block,
            id: cache.next_id.fetch_add(1, Ordering::Relaxed),
            phase: AtomicU8::new(phase as u8),
            referenced: AtomicBool::new(false),
            pins: AtomicU32::new(0),
            dirtied_at: AtomicU64::new(0),
            dirty: AtomicU64::new(dirty.pack()),
            sent: AtomicU64::new(Span::EMPTY.pack()),
            copies: AtomicU64::new(0),
            written: AtomicU64::new(0),
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

    /// Recursive, so that a writer in between cannot stop a second guard of the same thread.
    #[cfg(not(shuttle))]
    pub(crate) fn read_data(&self) -> RwLockReadGuard<'_, Option<Buf>> {
        match self.data.try_read_recursive() {
            Some(guard) => guard,
            None => blocking(|| self.data.read_recursive()),
        }
    }

    /// The model's lock does not know recursion.
    #[cfg(shuttle)]
    pub(crate) fn read_data(&self) -> RwLockReadGuard<'_, Option<Buf>> {
        self.data.read()
    }

    pub(crate) fn lock_data(&self) -> RwLockWriteGuard<'_, Option<Buf>> {
        match self.data.try_write() {
            Some(guard) => guard,
            None => blocking(|| self.data.write()),
        }
    }

    /// What a write has to bring to the disk.
    pub(crate) fn dirty(&self) -> Span {
        Span::unpack(self.dirty.load(Ordering::Acquire))
    }

    /// With the lock of the shard held.
    pub(crate) fn widen_dirty(&self, span: Span) {
        let wider = self.dirty().join(span);
        self.dirty.store(wider.pack(), Ordering::Release);
    }

    /// `span`, which covers what is dirty, is copied for a write. With the lock of the shard held.
    pub(crate) fn begin_write(&self, span: Span) {
        self.dirty.store(Span::EMPTY.pack(), Ordering::Release);
        self.sent.store(span.pack(), Ordering::Relaxed);
        self.copies.fetch_add(1, Ordering::Relaxed);
    }

    /// The write ended. With the lock of the shard held.
    pub(crate) fn end_write(&self, res: Result<(), BlkError>) {
        let sent = Span::unpack(self.sent.swap(Span::EMPTY.pack(), Ordering::Relaxed));
        match res {
            Ok(()) => {
                let copies = self.copies.load(Ordering::Relaxed);
                self.written.store(copies, Ordering::Release);
            }
            Err(_) => self.widen_dirty(sent),
        }
    }

    /// The number of the copy that has to reach the disk for the content of now to be there. With
    /// the lock of the shard held.
    pub(crate) fn next_copy(&self) -> u64 {
        self.copies.load(Ordering::Relaxed) + u64::from(self.phase().is_dirty())
    }

    /// What became of copy number `goal`.
    pub(crate) fn fate(&self, goal: u64) -> Fate {
        let _sets = self.cache.shards.of(self.block).sets.lock_nested();
        if self.written.load(Ordering::Acquire) >= goal {
            Fate::Written
        } else if self.phase().is_writing() || self.copies.load(Ordering::Relaxed) < goal {
            Fate::Open
        } else {
            Fate::Failed
        }
    }

    pub(crate) fn mark_dirty(self: &Arc<Self>, span: Span) {
        // In this order: a span seen after a phase that is over belongs to a later write.
        if self.phase().is_dirty() && self.dirty().covers(span) {
            return;
        }
        let mut sets = self.cache.shards.of(self.block).sets.lock_nested();
        match self.phase() {
            Phase::Clean => sets.enter(self, Phase::Dirty),
            Phase::Writing => sets.enter(self, Phase::Redirtied),
            Phase::Dirty | Phase::Redirtied => {}
            // Forgotten.
            _ => return,
        }
        self.widen_dirty(span);
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
    // Dropped before the ticket, which wakes those who wait for a buffer that nobody holds.
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
        ReadGuard(self.inner.read_data())
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
        self.inner.mark_dirty(self.inner.cache.whole());
    }

    /// As [`Self::mark_dirty`], where only the bytes of `range` were changed: a write brings these
    /// to the disk, those of other ranges marked since the last, what lies between them, and what
    /// the validator changes ([`Validator::prepared_range`]), all rounded outward to sectors of the
    /// device. Content of [`Client::new_zeroed`](crate::Client::new_zeroed) is written whole once.
    ///
    /// # Panics
    /// In debug builds, where `range` does not lie in the block.
    pub fn mark_dirty_range(&self, range: Range<usize>) {
        let cache = &self.inner.cache;
        cache.probe_rank();
        let len = cache.block_size();
        debug_assert!(
            range.start <= range.end && range.end <= len,
            "{range:?} of a block of {len} bytes"
        );
        let span = Span::new(range, len);
        if !span.is_empty() {
            self.inner.mark_dirty(span);
        }
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
