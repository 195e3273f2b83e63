//! How a flush of a mapped device reaches everything below.
//!
//! Each device gets one flush, and each row that wants it one through its `map`. All bios for that
//! are allocated, or none: without waiting; then, where that fails, waiting, under one mutex, so
//! that two threads never hold half of what they need each.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use blockstack::sync::{Mutex, Rank};
use blockstack::{
    Bio, BioFlags, BioSet, BlkError, BlkResult, DynDevice, Op, Sector, Wait, Workqueue, submit_bio,
};
use smallvec::SmallVec;

use crate::mapped::{LiveRef, again, finish, release};
use crate::table::TableRow;
use crate::target::FlushRoute;

/// Where flushes of one table go.
pub(crate) struct FlushPlan {
    devices: Vec<DynDevice>,
    /// Rows that map an empty flush.
    through: Vec<usize>,
    /// Whether a bio with data and a flush before it may carry the flush down itself.
    may_ride: bool,
    set: BioSet<FlushPad>,
    /// One thread at a time waits for a set of bios; its wait is for bios that end without it.
    many: Mutex<()>,
    /// Counters to be used again.
    spare: Mutex<Vec<Arc<Join>>>,
}

#[derive(Default)]
struct FlushPad(Option<Arc<Join>>);

/// Counts the flushes of one bio.
struct Join {
    left: AtomicUsize,
    state: Mutex<JoinState>,
}

#[derive(Default)]
struct JoinState {
    parent: Option<Bio>,
    live: Option<LiveRef>,
    error: Option<BlkError>,
}

impl FlushPlan {
    pub(crate) fn new(rows: &[TableRow]) -> Self {
        let mut devices: Vec<DynDevice> = Vec::new();
        let mut through = Vec::new();
        for (at, row) in rows.iter().enumerate() {
            for range in row.row.devices() {
                if !devices.iter().any(|dev| Arc::ptr_eq(dev, range.dev())) {
                    devices.push(range.dev().clone());
                }
            }
            if row.row.flush_route() == FlushRoute::ThroughMap {
                through.push(at);
            }
        }
        // Of a row through which flushes are mapped the devices are the target's business.
        let own = |dev: &DynDevice| {
            rows.iter().enumerate().any(|(at, row)| {
                let uses = |row: &TableRow| {
                    row.row
                        .devices()
                        .iter()
                        .any(|range| Arc::ptr_eq(range.dev(), dev))
                };
                !through.contains(&at) && uses(row)
            })
        };
        devices.retain(|dev| own(dev));
        let all_below = rows.iter().all(|row| !row.row.devices().is_empty());
        let may_ride =
            through.is_empty() && (devices.is_empty() || (devices.len() == 1 && all_below));
        let count = devices.len() + through.len();
        Self {
            may_ride,
            set: BioSet::new("dm-flush", (4 * count).clamp(8, 1024).max(count)),
            many: Mutex::new(Rank::TargetMetadata, ()),
            spare: Mutex::new(Rank::Pool, Vec::new()),
            devices,
            through,
        }
    }

    pub(crate) fn devices(&self) -> &[DynDevice] {
        &self.devices
    }

    pub(crate) fn may_ride(&self) -> bool {
        self.may_ride
    }

    /// As many bios as a flush needs, all or none without waiting.
    fn try_alloc(&self, wait: Wait) -> Option<SmallVec<[Bio; 4]>> {
        let count = self.devices.len() + self.through.len();
        (0..count)
            .map(|_| self.set.alloc(Op::Flush, wait))
            .collect()
    }

    fn alloc(&self) -> Option<SmallVec<[Bio; 4]>> {
        if let Some(bios) = self.try_alloc(Wait::No) {
            return Some(bios);
        }
        let _many = self.many.lock_nested();
        self.try_alloc(Wait::Yes)
    }

    fn join(&self, left: usize, parent: Bio, live: LiveRef) -> Arc<Join> {
        let spare = self.spare.lock_nested().pop();
        let join = spare.unwrap_or_else(|| {
            Arc::new(Join {
                left: AtomicUsize::new(0),
                state: Mutex::new(Rank::Pool, JoinState::default()),
            })
        });
        join.left.store(left, Ordering::Release);
        *join.state.lock_nested() = JoinState {
            parent: Some(parent),
            live: Some(live),
            error: None,
        };
        join
    }
}

/// Flushes everything below for `parent`, and then does its write where it has data.
pub(crate) fn fan_out(live: &LiveRef, parent: Bio) {
    let plan = &live.bound.flush;
    if live.bound.rows.is_empty() {
        parent.complete(Err(BlkError::NoDevice));
        return;
    }
    let Some(bios) = plan.alloc() else {
        parent.complete(Err(BlkError::NoMemory));
        return;
    };
    if bios.is_empty() {
        flushed(again(live), parent, Ok(()));
        return;
    }
    let own = parent.dev().cloned();
    let join = plan.join(bios.len(), parent, again(live));
    for (at, mut bio) in bios.into_iter().enumerate() {
        bio.set_end_io(flush_end);
        bio.pad_mut::<FlushPad>().0 = Some(join.clone());
        if let Some(dev) = plan.devices.get(at) {
            bio.set_dev(dev.clone(), Sector::ZERO);
            submit_bio(bio);
            continue;
        }
        let at = plan.through[at - plan.devices.len()];
        let row = &live.bound.rows[at];
        if let Some(own) = &own {
            bio.set_dev(own.clone(), row.start);
        }
        if let Some(mapped) = row.row.map(live, at, row.start, bio) {
            submit_bio(mapped.told(again(live), at));
        }
    }
}

fn flush_end(mut bio: Bio, res: BlkResult) {
    let join = bio.pad_mut::<FlushPad>().0.take();
    drop(bio);
    let Some(join) = join else { return };
    if let Err(error) = res {
        join.state.lock_nested().error.get_or_insert(error);
    }
    if join.left.fetch_sub(1, Ordering::AcqRel) > 1 {
        return;
    }
    let state = std::mem::take(&mut *join.state.lock_nested());
    if let (Some(parent), Some(live)) = (state.parent, state.live) {
        let res = state.error.map_or(Ok(()), Err);
        let mut spare = live.bound.flush.spare.lock_nested();
        spare.push(join);
        drop(spare);
        flushed(live, parent, res);
    }
}

/// The flush for `parent` is over.
fn flushed(live: LiveRef, mut parent: Bio, res: BlkResult) {
    if res.is_err() || parent.is_empty() {
        finish(live, parent, res);
        return;
    }
    // Its write is to come. To map it may mean to wait for a clone, which an `end_io` must not.
    parent.set_flags(parent.flags().difference(BioFlags::PREFLUSH));
    release(live);
    if blockstack::submit::in_submission() {
        submit_bio(parent);
        return;
    }
    match writes() {
        Some(queue) => queue.queue(parent),
        None => parent.complete(Err(BlkError::NoMemory)),
    }
}

/// Submits writes whose flush is over.
fn writes() -> Option<&'static Workqueue<Bio>> {
    static QUEUE: OnceLock<Option<Workqueue<Bio>>> = OnceLock::new();
    let made = QUEUE.get_or_init(|| match Workqueue::new("dm-after-flush", 4, submit_bio) {
        Ok(queue) => Some(queue),
        Err(error) => {
            log::error!("cannot start a thread for writes after a flush: {error}");
            None
        }
    });
    made.as_ref()
}
