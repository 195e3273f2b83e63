//! How a buffer comes to be: hit, read, prefetch, new; and how it is forgotten.

use std::sync::Arc;

use blockstack::sync::assert_may_wait;
use blockstack::sync::prim::atomic::{self, Ordering};
use blockstack::{Bio, BioFlags, BlkError, BlkResult, Buf, Plug, Wait, submit_bio};
use smallvec::SmallVec;

use crate::buffer::{Buffer, Inner};
use crate::cache::Cache;
use crate::error::BufError;
use crate::state::Phase;
use crate::validator::{Validator, no_check};

/// The buffers a read fills, in the order of the bio's memory.
#[derive(Default)]
pub(crate) struct ReadPad(SmallVec<[Arc<Inner>; 2]>);

/// Errors of reads of others after which a read gives up without one of its own.
const SHARED_ERRORS: u32 = 4;

impl Cache {
    pub(crate) fn get(self: &Arc<Self>, block: u64) -> Option<Buffer> {
        self.probe_rank();
        let inner = self.map.get(block)?;
        if !inner.phase().is_ready() {
            return None;
        }
        self.hits.add_one();
        Some(self.hold(inner))
    }

    pub(crate) fn read(
        self: &Arc<Self>,
        block: u64,
        validator: &Arc<dyn Validator>,
    ) -> Result<Buffer, BufError> {
        self.probe_rank();
        if let Some(inner) = self.map.get(block) {
            if inner.phase().is_ready() {
                self.hits.add_one();
                return Ok(self.hold(inner));
            }
        }
        self.read_slow(block, validator)
    }

    fn read_slow(
        self: &Arc<Self>,
        block: u64,
        validator: &Arc<dyn Validator>,
    ) -> Result<Buffer, BufError> {
        self.check_range(block)?;
        self.shards.of(block).misses.fetch_add(1, Ordering::Relaxed);
        let mut shared_errors = 0;
        loop {
            let (inner, own) = match self.map.get(block) {
                // Failed before we came: its error is for those who waited for it.
                Some(inner) if inner.phase() == Phase::Failed => {
                    self.remove(&inner);
                    continue;
                }
                Some(inner) => (inner, false),
                None => match self.start_read(block, validator)? {
                    Some(inner) => (inner, true),
                    None => continue,
                },
            };
            match self.settle(&inner, validator) {
                // A prefetch reads many blocks at once; the error may be another block's.
                Some(Err(BufError::Blk(_))) if !own && shared_errors < SHARED_ERRORS => {
                    shared_errors += 1;
                    self.remove(&inner);
                }
                Some(outcome) => return outcome.map(|()| self.hold(inner)),
                None => {}
            }
        }
    }

    /// Waits until `inner` can be used, checking it if nobody did; `None` where it went away.
    fn settle(
        &self,
        inner: &Arc<Inner>,
        validator: &Arc<dyn Validator>,
    ) -> Option<Result<(), BufError>> {
        loop {
            match self.wait_while(inner, Phase::is_pending) {
                phase if phase.is_ready() => return Some(Ok(())),
                Phase::Fetched => {
                    if self.change(inner, Phase::Fetched, Phase::Checking) {
                        inner.set_validator(validator);
                        let found = self.check(inner, validator);
                        if let Err(error) = found {
                            inner.set_error(error);
                            self.change(inner, Phase::Checking, Phase::Failed);
                            self.remove(inner);
                            return Some(Err(error));
                        }
                        if self.change(inner, Phase::Checking, Phase::Clean) {
                            return Some(Ok(()));
                        }
                    }
                }
                Phase::Failed => return Some(Err(inner.error().unwrap_or(BlkError::Io.into()))),
                Phase::Doomed => {
                    self.wait_while(inner, |phase| phase == Phase::Doomed);
                    return None;
                }
                _ => {
                    self.remove(inner);
                    return None;
                }
            }
        }
    }

    fn check(&self, inner: &Inner, validator: &Arc<dyn Validator>) -> Result<(), BufError> {
        let data = inner.data.read();
        let Some(data) = data.as_ref() else {
            return Err(BlkError::Io.into());
        };
        validator.check(inner.block, data).map_err(|invalid| {
            log::error!(
                "{}: block {}: {}",
                self.dev.name(),
                inner.block,
                invalid.what
            );
            BufError::Invalid {
                block: inner.block,
                what: invalid.what,
            }
        })
    }

    /// Submits a read of `block`; `None` where another thread entered the block first.
    fn start_read(
        self: &Arc<Self>,
        block: u64,
        validator: &Arc<dyn Validator>,
    ) -> Result<Option<Arc<Inner>>, BufError> {
        assert_may_wait();
        let buf = self.alloc()?;
        let Some(bio) = self.read_bio(Wait::Yes) else {
            return Err(BlkError::NoMemory.into());
        };
        let inner = self.unread(block, validator);
        if self.insert(&inner).is_err() {
            self.reserve.give(buf);
            return Ok(None);
        }
        let mut reading = Reading {
            bio,
            items: SmallVec::new(),
        };
        reading.add(inner.clone(), buf);
        reading.submit(self, BioFlags::META | BioFlags::SYNC);
        Ok(Some(inner))
    }

    pub(crate) fn prefetch(self: &Arc<Self>, block: u64, n: u64) {
        let end = block.saturating_add(n).min(self.blocks);
        let _plug = Plug::new();
        let mut at = block;
        while at < end {
            if self.map.get(at).is_some() {
                at += 1;
                continue;
            }
            let Some(bio) = self.read_bio(Wait::No) else {
                return;
            };
            let mut reading = Reading {
                bio,
                items: SmallVec::new(),
            };
            while at < end && reading.items.len() < self.max_blocks {
                // A prefetch must not push out what was read for a reason.
                if self.count() >= self.limit() && self.evict(1, 8) == 0 {
                    at = end;
                    break;
                }
                let Ok(buf) = self.pool.alloc(self.block_size()) else {
                    at = end;
                    break;
                };
                let inner = self.unread(at, no_check());
                at += 1;
                if self.insert(&inner).is_err() {
                    break;
                }
                reading.add(inner, buf);
            }
            reading.submit(self, BioFlags::META);
        }
    }

    pub(crate) fn new_zeroed(
        self: &Arc<Self>,
        block: u64,
        validator: &Arc<dyn Validator>,
    ) -> Result<Buffer, BufError> {
        self.probe_rank();
        self.check_range(block)?;
        assert_may_wait();
        loop {
            let Some(inner) = self.map.get(block) else {
                let mut buf = self.alloc()?;
                buf.fill(0);
                let inner = Inner::new(self, block, Phase::Clean, Some(buf), validator);
                if self.insert(&inner).is_ok() {
                    return Ok(self.hold(inner));
                }
                continue;
            };
            let mut data = inner.lock_data();
            let mut sets = self.shards.of(block).sets.lock_nested();
            match inner.phase() {
                // A write of the old content may go on: it has its own copy, and the next write
                // waits for its end.
                Phase::Doomed if data.is_some() && is_abandoned(&inner) => {
                    sets.enter(&inner, Phase::Writing);
                }
                Phase::Doomed => {
                    drop(sets);
                    drop(data);
                    self.wait_while(&inner, |phase| phase == Phase::Doomed);
                    continue;
                }
                phase if phase.is_ready() => {}
                _ => {
                    // A read of the old content goes on alone.
                    drop(data);
                    sets.enter(&inner, Phase::Gone);
                    drop(sets);
                    self.shards.of(block).changed.notify_all();
                    self.remove(&inner);
                    continue;
                }
            }
            inner.widen_dirty(self.whole());
            drop(sets);
            if let Some(data) = data.as_mut() {
                data.fill(0);
            }
            inner.set_validator(validator);
            drop(data);
            self.shards.of(block).changed.notify_all();
            return Ok(self.hold(inner));
        }
    }

    pub(crate) fn forget(&self, block: u64) {
        let Some(inner) = self.map.get(block) else {
            return;
        };
        let shard = self.shards.of(block);
        let mut sets = shard.sets.lock_nested();
        match inner.phase() {
            Phase::Writing | Phase::Redirtied => sets.enter(&inner, Phase::Doomed),
            Phase::Doomed => {}
            _ => sets.enter(&inner, Phase::Gone),
        }
        let gone = inner.phase() == Phase::Gone;
        drop(sets);
        shard.changed.notify_all();
        if gone {
            self.remove(&inner);
        }
    }

    /// Forgets `n` blocks from `block` on.
    pub(crate) fn forget_range(&self, block: u64, n: u64) {
        let range = block..block.saturating_add(n);
        if n > self.count() as u64 {
            let cached = self.map.blocks().into_iter();
            cached
                .filter(|at| range.contains(at))
                .for_each(|at| self.forget(at));
        } else {
            range.for_each(|at| self.forget(at));
        }
    }
}

/// Whether nobody holds `inner`, which is being written and forgotten, so that nobody can come to
/// hold it: the map refers to it, the set of its shard, its bio and the caller.
fn is_abandoned(inner: &Arc<Inner>) -> bool {
    let alone = Arc::strong_count(inner) == 4;
    atomic::fence(Ordering::Acquire);
    alone
}

/// A read that is being put together.
struct Reading {
    bio: Bio,
    items: SmallVec<[Arc<Inner>; 2]>,
}

impl Reading {
    fn add(&mut self, inner: Arc<Inner>, buf: Buf) {
        match self.bio.push(buf) {
            Ok(()) => self.items.push(inner),
            Err(_unaligned) => fail_read(&inner, BlkError::Unaligned),
        }
    }

    fn submit(self, cache: &Cache, flags: BioFlags) {
        let Self { mut bio, items } = self;
        let Some(first) = items.first() else {
            return;
        };
        bio.set_lane(&cache.dev, cache.sector(first.block));
        bio.set_flags(flags);
        bio.set_end_io(read_end);
        bio.pad_mut::<ReadPad>().0 = items;
        submit_bio(bio);
    }
}

fn read_end(mut bio: Bio, res: BlkResult) {
    let items = std::mem::take(&mut bio.pad_mut::<ReadPad>().0);
    let bufs = bio.take_bufs();
    drop(bio);
    for (inner, buf) in items.into_iter().zip(bufs) {
        let cache = inner.cache.clone();
        match res {
            Ok(()) => {
                *inner.data.write() = Some(buf);
                cache.change(&inner, Phase::Reading, Phase::Fetched);
            }
            Err(error) => {
                cache.reserve.give(buf);
                fail_read(&inner, error);
            }
        }
    }
}

fn fail_read(inner: &Arc<Inner>, error: BlkError) {
    inner.set_error(error.into());
    inner.cache.change(inner, Phase::Reading, Phase::Failed);
    inner.cache.remove(inner);
}
