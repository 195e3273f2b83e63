//! How dirty buffers reach the disk: copies, merged bios, and the thread that writes by age.
//!
//! A buffer is claimed (`Dirty` to `Writing`), prepared and copied under the lock of its content;
//! neighbours share one bio. Nothing is waited for between a claim and the submission of its bio:
//! before a lock or memory is waited for, what is claimed is sent. Memory for a write may be waited
//! for under the lock of a content, never the other way round: who has the content locked may need
//! that memory to come to an end.
//!
//! Who waits for a write of somebody else waits for the copy that has the content of then, by its
//! number, and is not done when that write failed: it writes the buffer itself, and so has an error
//! of its own, or none.

use std::sync::{Arc, Weak};
use std::time::Duration;

use blockstack::sync::prim::atomic::Ordering;
use blockstack::sync::{Condvar, Mutex, MutexGuard, Rank, assert_may_wait};
use blockstack::units::SECTOR_SHIFT;
use blockstack::{Bio, BioFlags, BlkError, BlkResult, Buf, Op, Plug, Sector, Wait, submit_bio};
use smallvec::SmallVec;

use crate::buffer::{Fate, Inner};
use crate::cache::Cache;
use crate::error::BufError;
use crate::span::Span;
use crate::state::Phase;
use crate::validator::Validator;

/// Buffers that one bio writes.
type Items = SmallVec<[Arc<Inner>; 8]>;

#[derive(Default)]
pub(crate) struct WritePad {
    items: Items,
    batch: Option<Arc<Batch>>,
}

/// For whom writes are done.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Origin {
    /// Somebody who waits and gets the error.
    Caller,
    /// The thread: errors are kept for the next `write_dirty`, busy buffers are left alone.
    Background,
}

/// The writes of one call.
struct Batch {
    origin: Origin,
    state: Mutex<BatchState>,
    done: Condvar,
}

#[derive(Default)]
struct BatchState {
    in_flight: usize,
    error: Option<BlkError>,
}

impl Batch {
    fn new(origin: Origin) -> Arc<Self> {
        Arc::new(Self {
            origin,
            state: Mutex::new(Rank::Pool, BatchState::default()),
            done: Condvar::new(),
        })
    }

    fn wait(&self) -> BlkResult {
        let mut state = self.state.lock_nested();
        while state.in_flight > 0 {
            self.done.wait(&mut state);
        }
        state.error.take().map_or(Ok(()), Err)
    }
}

/// A copy that a call waits for and somebody else makes.
struct Owed {
    inner: Arc<Inner>,
    copy: u64,
}

impl Owed {
    /// The write of somebody else that has, or has to be followed by one that has, the content of
    /// now; `None` where there is none on its way. With the lock of the shard held.
    fn by(inner: &Arc<Inner>) -> Option<Self> {
        inner.phase().is_writing().then(|| Self {
            inner: inner.clone(),
            copy: inner.next_copy(),
        })
    }
}

/// Whether a buffer found its place in a run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Placed {
    /// It is there, or need not be.
    Done,
    /// It is not: the run has no room, or ends elsewhere, or there is none.
    NoRoom,
}

/// A bio that is being filled.
struct Run {
    bio: Bio,
    buf: Buf,
    items: Items,
    /// Where it begins on the device, and its length so far, in bytes.
    start: u64,
    len: usize,
}

impl Run {
    /// Whether `len` bytes for `at` can follow.
    fn takes(&self, at: u64, len: usize) -> bool {
        self.items.is_empty()
            || (at == self.start + self.len as u64 && self.len + len <= self.buf.len())
    }

    /// Adds `bytes` of `inner`, for `at`, where [`Self::takes`] said so.
    fn add(&mut self, inner: Arc<Inner>, at: u64, bytes: &[u8]) {
        if self.items.is_empty() {
            self.start = at;
        }
        self.buf[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
        self.items.push(inner);
    }

    fn submit(self, cache: &Cache, batch: &Arc<Batch>) {
        let Self {
            mut bio,
            mut buf,
            items,
            start,
            len,
        } = self;
        if items.is_empty() {
            cache.write_reserve.give(buf);
            return;
        }
        let shrunk = buf.set_len(len);
        debug_assert!(shrunk.is_ok(), "a run never outgrows its memory");
        bio.set_lane(&cache.dev, Sector::new(start >> SECTOR_SHIFT));
        bio.set_flags(match batch.origin {
            Origin::Caller => BioFlags::META | BioFlags::SYNC,
            Origin::Background => BioFlags::META,
        });
        bio.set_end_io(write_end);
        batch.state.lock_nested().in_flight += 1;
        cache
            .blocks_written
            .fetch_add(items.len() as u64, Ordering::Relaxed);
        *bio.pad_mut::<WritePad>() = WritePad {
            items,
            batch: Some(batch.clone()),
        };
        match bio.push(buf) {
            Ok(()) => submit_bio(bio),
            Err(_unaligned) => bio.complete(Err(BlkError::Unaligned)),
        }
    }
}

fn write_end(mut bio: Bio, res: BlkResult) {
    let WritePad { items, batch } = std::mem::take(bio.pad_mut::<WritePad>());
    let buf = bio.take_buf();
    drop(bio);
    let Some(batch) = batch else { return };
    let Some(cache) = items.first().map(|inner| inner.cache.clone()) else {
        return;
    };
    if let Some(buf) = buf {
        cache.write_reserve.give(buf);
    }
    // Errors before the phases change: who waits for one of these buffers finds them then.
    if let (Err(error), Origin::Background) = (res, batch.origin) {
        cache.async_error.lock_nested().get_or_insert(error);
    }
    for inner in items {
        if let Err(error) = res {
            inner.set_error(error.into());
        }
        let shard = cache.shards.of(inner.block);
        let mut sets = shard.sets.lock_nested();
        let to = match (inner.phase(), res) {
            (Phase::Doomed, _) => Phase::Gone,
            (Phase::Writing, Ok(())) => Phase::Clean,
            _ => Phase::Dirty,
        };
        inner.end_write(res);
        sets.enter(&inner, to);
        drop(sets);
        shard.changed.notify_all();
        if to == Phase::Gone {
            cache.remove(&inner);
        } else if res.is_err() {
            // Its turn comes again, by age.
            inner.dirtied_at.store(cache.now_ms(), Ordering::Relaxed);
        }
        if cache.config.strict_holds {
            cache.reserve.wake();
        }
    }
    let mut state = batch.state.lock_nested();
    state.in_flight -= 1;
    if let Err(error) = res {
        state.error.get_or_insert(error);
    }
    drop(state);
    batch.done.notify_all();
}

impl Cache {
    /// Writes those of `list`, sorted by block, that are dirty and not pinned, and waits. A buffer
    /// that is being written already is waited for, and written again if that left it dirty.
    pub(crate) fn write_out(
        &self,
        mut list: Vec<Arc<Inner>>,
        origin: Origin,
    ) -> Result<(), BufError> {
        assert_may_wait();
        let mut first = Ok(());
        let mut owed: Option<Vec<Owed>> = None;
        while !list.is_empty() {
            let batch = Batch::new(origin);
            let mut busy = Vec::new();
            let sent = self.send(std::mem::take(&mut list), &batch, &mut busy);
            first = first.and(batch.wait().map_err(BufError::from)).and(sent);
            if origin == Origin::Background {
                break;
            }
            // Later rounds are only for what is owed: whose copies are waited for is settled by the
            // first, or a buffer that others keep changing and writing would hold us for ever.
            let owed = owed.get_or_insert(busy);
            owed.retain(|owed| match self.settle_write(owed) {
                Ok(true) => false,
                Ok(false) => {
                    list.push(owed.inner.clone());
                    true
                }
                Err(error) => {
                    first = first.and(Err(error));
                    false
                }
            });
            if first.is_err() {
                break;
            }
        }
        first
    }

    /// Waits for a copy that somebody else makes; `false` where it has to be made again.
    fn settle_write(&self, owed: &Owed) -> Result<bool, BufError> {
        let Owed { inner, copy } = owed;
        if inner.fate(*copy) == Fate::Written {
            return Ok(true);
        }
        self.wait_while(inner, Phase::is_writing);
        match inner.fate(*copy) {
            Fate::Written => Ok(true),
            // Forgotten.
            _ if inner.phase() == Phase::Gone => Ok(true),
            // It cannot be written again before the pin is taken back.
            Fate::Failed if inner.is_pinned() => Err(inner.error().unwrap_or(BlkError::Io.into())),
            Fate::Open if inner.is_pinned() => Ok(true),
            Fate::Failed | Fate::Open => Ok(false),
        }
    }

    /// Of what is sent only the bios have references then, so that a buffer that is forgotten and
    /// used anew need not wait for this thread.
    fn send(
        &self,
        list: Vec<Arc<Inner>>,
        batch: &Arc<Batch>,
        owed: &mut Vec<Owed>,
    ) -> Result<(), BufError> {
        // The runs go to the system together; a wait in between sends those before.
        let _plug = Plug::new();
        let mut run: Option<Run> = None;
        let mut list = list.into_iter();
        while let Some(inner) = list.next() {
            match inner.phase() {
                Phase::Dirty if !inner.is_pinned() => {}
                // Where that ended just now it may have failed: the claim decides.
                phase if phase.is_writing() => {
                    let others = {
                        let _sets = self.shards.of(inner.block).sets.lock_nested();
                        Owed::by(&inner)
                    };
                    if let Some(others) = others {
                        owed.push(others);
                        continue;
                    }
                }
                _ => continue,
            }
            let mut data = match inner.data.try_write() {
                Some(data) => data,
                None if batch.origin == Origin::Background => continue,
                None => {
                    run.take()
                        .into_iter()
                        .for_each(|run| run.submit(self, batch));
                    inner.lock_data()
                }
            };
            let Some(content) = data.as_mut() else {
                continue;
            };
            while self.claim(&inner, content, &mut run, owed) == Placed::NoRoom {
                run.take()
                    .into_iter()
                    .for_each(|run| run.submit(self, batch));
                let follow = list.as_slice().iter().zip(1..);
                let neighbours = follow.take_while(|&(next, by)| next.block == inner.block + by);
                run = Some(self.open_run(1 + neighbours.count())?);
            }
        }
        run.into_iter().for_each(|run| run.submit(self, batch));
        Ok(())
    }

    /// Memory and a bio for a run of so many blocks, or fewer.
    fn open_run(&self, blocks: usize) -> Result<Run, BufError> {
        let mut blocks = blocks.min(self.max_blocks);
        let mut buf = loop {
            match self.pool.alloc(blocks * self.block_size()) {
                Ok(buf) => break buf,
                Err(_none) if blocks > 1 => blocks /= 2,
                Err(_none) => break self.write_reserve.take_wait(),
            }
        };
        // What was kept back may have been the memory of a part of a block.
        let len = buf.len().max(self.block_size());
        buf.set_len(len)?;
        let bio = self
            .write_bios
            .alloc(Op::Write, Wait::Yes)
            .ok_or(BlkError::NoMemory)?;
        Ok(Run {
            bio,
            buf,
            items: Items::new(),
            start: 0,
            len: 0,
        })
    }

    /// Makes `inner` `Writing` and what of its content is dirty part of `run`, if it still is to be
    /// written.
    fn claim(
        &self,
        inner: &Arc<Inner>,
        content: &mut [u8],
        run: &mut Option<Run>,
        owed: &mut Vec<Owed>,
    ) -> Placed {
        // Under the lock of the content: what is changed after a pin is not in the copy.
        if inner.is_pinned() {
            return Placed::Done;
        }
        let validator = inner.validator();
        let prepared = Span::new(validator.prepared_range(content.len()), content.len());
        let mut sets = self.shards.of(inner.block).sets.lock_nested();
        if inner.phase() != Phase::Dirty {
            owed.extend(Owed::by(inner));
            return Placed::Done;
        }
        let span = inner.dirty().join(prepared).round_out(self.write_align);
        let at = self.byte(inner.block) + span.start() as u64;
        let Some(run) = run.as_mut().filter(|run| run.takes(at, span.len())) else {
            return Placed::NoRoom;
        };
        sets.enter(inner, Phase::Writing);
        inner.begin_write(span);
        drop(sets);
        prepare(&*validator, inner.block, content, prepared);
        run.add(inner.clone(), at, &content[span.range()]);
        Placed::Done
    }

    /// Writes the content of `from` to the block of the buffer that `enter` gives, one without
    /// content that is `Doomed` and so keeps others from the block meanwhile; waits.
    pub(crate) fn write_copy(
        &self,
        from: &Inner,
        enter: impl FnOnce() -> Arc<Inner>,
    ) -> Result<(), BufError> {
        let size = self.block_size();
        let data = from.read_data();
        let content = data.as_deref().ok_or(BlkError::Io)?;
        let mut run = self.open_run(1)?;
        run.buf[..size].copy_from_slice(content);
        drop(data);
        let to = enter();
        from.validator().prepare(to.block, &mut run.buf[..size]);
        run.start = self.byte(to.block);
        run.len = size;
        run.items.push(to);
        let batch = Batch::new(Origin::Caller);
        run.submit(self, &batch);
        Ok(batch.wait()?)
    }

    /// All dirty buffers that are not pinned and, with `writing`, those on their way.
    pub(crate) fn collect(&self, fits: impl Fn(&Inner) -> bool, writing: bool) -> Vec<Arc<Inner>> {
        let mut list = Vec::with_capacity(self.dirty.load(Ordering::Relaxed));
        for shard in self.shards.iter() {
            let sets = shard.sets.lock_nested();
            let fitting = |inner: &&Arc<Inner>| !inner.is_pinned() && fits(inner);
            list.extend(sets.dirty.values().filter(fitting).cloned());
            if writing {
                list.extend(sets.writing.values().cloned());
            }
        }
        list.sort_unstable_by_key(|inner| inner.block);
        list
    }

    pub(crate) fn write_all(&self) -> Result<(), BufError> {
        self.check_failed()?;
        self.write_out(self.collect(|_| true, true), Origin::Caller)
    }

    /// Takes the error that writes of the thread left.
    pub(crate) fn take_async_error(&self) -> Result<(), BufError> {
        let error = self.async_error.lock_nested().take();
        error.map_or(Ok(()), |error| Err(error.into()))
    }

    /// Waits until no bio writes one of `n` blocks from `block` on.
    pub(crate) fn wait_writes(&self, block: u64, n: u64) {
        if self.writing.load(Ordering::Acquire) == 0 {
            return;
        }
        let range = block..block.saturating_add(n);
        for shard in self.shards.iter() {
            let writing: Vec<_> = {
                let sets = shard.sets.lock_nested();
                if sets.writing.is_empty() {
                    continue;
                }
                sets.writing
                    .range(range.clone())
                    .map(|(_, inner)| inner.clone())
                    .collect()
            };
            for inner in writing {
                self.wait_while(&inner, Phase::is_writing);
            }
        }
    }

    /// Dirty buffers that could be written now, about.
    pub(crate) fn writable(&self) -> usize {
        let dirty = self.dirty.load(Ordering::Relaxed);
        dirty.saturating_sub(self.pinned.load(Ordering::Relaxed))
    }

    /// Above this many dirty buffers the thread starts, below [`Self::low_water`] it stops.
    pub(crate) fn high_water(&self) -> usize {
        (self.limit() / 4).max(4)
    }

    fn low_water(&self) -> usize {
        self.limit() / 8
    }

    /// Whether a write in the background failed and nobody heard of it yet.
    pub(crate) fn is_failing(&self) -> bool {
        self.async_error.lock_nested().is_some()
    }

    /// Called after buffers became dirty or unpinned.
    pub(crate) fn dirty_pressure(&self) {
        if self.writable() > self.high_water() && !self.kicked.load(Ordering::Relaxed) {
            self.kick(Request::Pressure);
        }
    }

    /// Asks the thread to write.
    pub(crate) fn kick(&self, request: Request) {
        if self.kicked.swap(true, Ordering::AcqRel) && request == Request::Pressure {
            return;
        }
        let mut control = self.control.lock_nested();
        control.write_all |= request == Request::All;
        control.pressed = true;
        drop(control);
        self.wake_thread.notify_one();
    }

    /// What the thread has to write now.
    fn due(&self, all: bool) -> Vec<Arc<Inner>> {
        if all {
            return self.collect(|_| true, false);
        }
        let now = self.now_ms();
        let age = self.config.writeback_age.as_millis() as u64;
        let is_old =
            |inner: &Inner| now.saturating_sub(inner.dirtied_at.load(Ordering::Relaxed)) >= age;
        // After an error pressure has to wait for the age, or the thread would spin.
        let mut list = self.collect(is_old, false);
        if !self.is_failing() && self.writable() > self.high_water() {
            let oldest = self.oldest(self.low_water());
            if oldest.len() > list.len() {
                list = oldest;
            }
        }
        list
    }

    /// The dirty buffers that are not pinned but for the `youngest`, by block.
    pub(crate) fn oldest(&self, youngest: usize) -> Vec<Arc<Inner>> {
        let mut list = self.collect(|_| true, false);
        list.sort_by_cached_key(|inner| inner.dirtied_at.load(Ordering::Relaxed));
        list.truncate(list.len().saturating_sub(youngest));
        list.sort_unstable_by_key(|inner| inner.block);
        list
    }

    #[cfg(not(shuttle))]
    fn nap(&self, control: &mut MutexGuard<'_, Control>, interval: Duration) {
        self.wake_thread.wait_for(control, interval);
    }

    /// A model has no clock: a time-out would come at once, and for ever.
    #[cfg(shuttle)]
    fn nap(&self, control: &mut MutexGuard<'_, Control>, _: Duration) {
        self.wake_thread.wait(control);
    }

    /// The thread's life.
    pub(crate) fn writeback_loop(this: &Weak<Self>) {
        loop {
            let Some(cache) = this.upgrade() else { return };
            let interval = (cache.config.writeback_age / 4)
                .clamp(Duration::from_millis(2), Duration::from_secs(5));
            let mut control = cache.control.lock_nested();
            if !control.stop && !control.pressed {
                cache.nap(&mut control, interval);
            }
            if control.stop {
                return;
            }
            control.pressed = false;
            let all = std::mem::take(&mut control.write_all);
            drop(control);
            cache.kicked.store(false, Ordering::Release);
            if cache.dirty.load(Ordering::Relaxed) == 0 || cache.check_failed().is_err() {
                continue;
            }
            let due = cache.due(all);
            if let Err(error) = cache.write_out(due, Origin::Background) {
                log::warn!("{}: writeback: {error}", cache.dev.name());
            }
        }
    }
}

/// Sets the checksum, in debug builds with a look at what it says to change.
fn prepare(validator: &dyn Validator, block: u64, content: &mut [u8], range: Span) {
    let is_partial = range.len() < content.len();
    let before = (cfg!(debug_assertions) && is_partial).then(|| content.to_vec());
    validator.prepare(block, content);
    if let Some(before) = before {
        let (start, end) = (range.range().start, range.range().end);
        debug_assert!(
            before[..start] == content[..start] && before[end..] == content[end..],
            "block {block}: prepare changes bytes outside {range:?}"
        );
    }
}

/// Why the thread is woken.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Request {
    /// Too much is dirty.
    Pressure,
    /// All that is dirty shall be written.
    All,
}

/// What the thread is told.
#[derive(Default)]
pub(crate) struct Control {
    pub(crate) stop: bool,
    pressed: bool,
    write_all: bool,
}
