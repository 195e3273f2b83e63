//! How dirty buffers reach the disk: copies, merged bios, and the thread that writes by age.
//!
//! A buffer is claimed (`Dirty` to `Writing`), prepared and copied under the lock of its content;
//! neighbours share one bio. Nothing is waited for between a claim and the submission of its bio:
//! before a lock or memory is waited for, what is claimed is sent.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use blockstack::sync::{Condvar, Mutex, Rank, assert_may_wait};
use blockstack::{Bio, BioFlags, BlkError, BlkResult, Buf, Op, Plug, Wait, submit_bio};
use parking_lot::RwLockWriteGuard;
use smallvec::SmallVec;

use crate::buffer::Inner;
use crate::cache::Cache;
use crate::error::BufError;
use crate::state::Phase;

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

/// A bio that is being filled.
struct Run {
    bio: Bio,
    buf: Buf,
    items: Items,
}

impl Run {
    fn room_for(&self, block: u64, size: usize) -> bool {
        match self.items.first() {
            None => true,
            Some(first) => {
                block == first.block + self.items.len() as u64
                    && (self.items.len() + 1) * size <= self.buf.len()
            }
        }
    }

    fn submit(self, cache: &Cache, batch: &Arc<Batch>) {
        let Self {
            mut bio,
            mut buf,
            items,
        } = self;
        let Some(first) = items.first() else {
            cache.write_reserve.give(buf);
            return;
        };
        let shrunk = buf.set_len(items.len() * cache.block_size());
        debug_assert!(shrunk.is_ok(), "a run never outgrows its memory");
        bio.set_dev(cache.dev.clone(), cache.sector(first.block));
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
    if let (Err(error), Origin::Background) = (res, batch.origin) {
        // Before the phases change: who waits for one of these buffers finds the error then.
        cache.async_error.lock_nested().get_or_insert(error);
    }
    for inner in items {
        let shard = cache.shards.of(inner.block);
        let mut sets = shard.sets.lock_nested();
        let to = match (inner.phase(), res) {
            (Phase::Doomed, _) => Phase::Gone,
            (Phase::Writing, Ok(())) => Phase::Clean,
            _ => Phase::Dirty,
        };
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
        while !list.is_empty() {
            let batch = Batch::new(origin);
            let mut busy = Vec::new();
            let sent = self.send(&list, &batch, &mut busy);
            first = first.and(batch.wait().map_err(BufError::from)).and(sent);
            if origin == Origin::Background || first.is_err() {
                break;
            }
            for inner in &busy {
                self.wait_while(inner, Phase::is_writing);
            }
            busy.retain(|inner| inner.phase() == Phase::Dirty);
            list = busy;
        }
        first
    }

    fn send(
        &self,
        list: &[Arc<Inner>],
        batch: &Arc<Batch>,
        busy: &mut Vec<Arc<Inner>>,
    ) -> Result<(), BufError> {
        let size = self.block_size();
        // The runs go to the system together; a wait in between sends those before.
        let _plug = Plug::new();
        let mut run: Option<Run> = None;
        for (at, inner) in list.iter().enumerate() {
            if inner.phase().is_writing() {
                busy.push(inner.clone());
                continue;
            }
            if inner.phase() != Phase::Dirty || inner.is_pinned() {
                continue;
            }
            if run
                .as_ref()
                .is_some_and(|run| !run.room_for(inner.block, size))
            {
                run.take()
                    .into_iter()
                    .for_each(|run| run.submit(self, batch));
            }
            let mut open = match run.take() {
                Some(open) => open,
                None => self.open_run(&list[at..])?,
            };
            let mut data = match inner.data.try_write() {
                Some(data) => data,
                None if batch.origin == Origin::Background => {
                    run = Some(open);
                    continue;
                }
                None => {
                    open.submit(self, batch);
                    open = self.open_run(&list[at..])?;
                    inner.lock_data()
                }
            };
            self.claim(inner, &mut data, &mut open, busy);
            drop(data);
            run = Some(open);
        }
        run.into_iter().for_each(|run| run.submit(self, batch));
        Ok(())
    }

    /// Memory and a bio for a run that begins with the first of `list`.
    fn open_run(&self, list: &[Arc<Inner>]) -> Result<Run, BufError> {
        let neighbours = list
            .windows(2)
            .take_while(|pair| pair[1].block == pair[0].block + 1)
            .count();
        let mut blocks = (neighbours + 1).min(self.max_blocks);
        let buf = loop {
            match self.pool.alloc(blocks * self.block_size()) {
                Ok(buf) => break buf,
                Err(_none) if blocks > 1 => blocks /= 2,
                Err(_none) => break self.write_reserve.take_wait(),
            }
        };
        let bio = self
            .write_bios
            .alloc(Op::Write, Wait::Yes)
            .ok_or(BlkError::NoMemory)?;
        Ok(Run {
            bio,
            buf,
            items: Items::new(),
        })
    }

    /// Makes `inner` `Writing` and its content part of `run`, if it still is to be written.
    fn claim(
        &self,
        inner: &Arc<Inner>,
        data: &mut RwLockWriteGuard<'_, Option<Buf>>,
        run: &mut Run,
        busy: &mut Vec<Arc<Inner>>,
    ) {
        let Some(content) = data.as_mut() else {
            return;
        };
        // Under the lock of the content: what is changed after a pin is not in the copy.
        if inner.is_pinned() {
            return;
        }
        let mut sets = self.shards.of(inner.block).sets.lock_nested();
        match inner.phase() {
            Phase::Dirty => sets.enter(inner, Phase::Writing),
            phase => {
                if phase.is_writing() {
                    busy.push(inner.clone());
                }
                return;
            }
        }
        drop(sets);
        inner.validator().prepare(inner.block, content);
        let at = run.items.len() * self.block_size();
        run.buf[at..at + self.block_size()].copy_from_slice(content);
        run.items.push(inner.clone());
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
    fn writable(&self) -> usize {
        let dirty = self.dirty.load(Ordering::Relaxed);
        dirty.saturating_sub(self.pinned.load(Ordering::Relaxed))
    }

    /// Above this many dirty buffers the thread starts, below [`Self::low_water`] it stops.
    fn high_water(&self) -> usize {
        (self.limit / 4).max(4)
    }

    fn low_water(&self) -> usize {
        self.limit / 8
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
        let failing = self.async_error.lock_nested().is_some();
        if failing || self.writable() <= self.high_water() {
            return self.collect(is_old, false);
        }
        let mut list = self.collect(|_| true, false);
        list.sort_by_cached_key(|inner| inner.dirtied_at.load(Ordering::Relaxed));
        let surplus = list.len().saturating_sub(self.low_water());
        let old = list.partition_point(|inner| is_old(inner));
        list.truncate(surplus.max(old));
        list.sort_unstable_by_key(|inner| inner.block);
        list
    }

    /// The thread's life.
    pub(crate) fn writeback_loop(this: &Weak<Self>) {
        loop {
            let Some(cache) = this.upgrade() else { return };
            let interval = (cache.config.writeback_age / 4)
                .clamp(Duration::from_millis(2), Duration::from_secs(5));
            let mut control = cache.control.lock_nested();
            if !control.stop && !control.pressed {
                cache.wake_thread.wait_for(&mut control, interval);
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
