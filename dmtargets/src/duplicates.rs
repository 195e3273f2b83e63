//! Several bios for one without data: a flush for each device below, a discard or write-zeroes for
//! each leg of a target ([`Target::duplicates`](crate::Target::duplicates)).
//!
//! All of them are allocated, or none: without waiting; then, where that fails, waiting, under one
//! mutex of the device, so that two threads never hold half of what they need each. The first error
//! is the one's; it ends once, after all. See [`mapped`](crate::mapped#forward-progress) for the
//! whole rule.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use blockstack::sync::{Mutex, Rank};
use blockstack::{Bio, BlkError, BlkResult, Wait};

use crate::mapped::{Live, LiveRef, again, finish};

/// As many bios, of those that one bio needs, as a set of duplicates has at most.
const AT_ONCE: usize = 8;

/// How many bios a set has of which one bio needs `needed`, on a device that was given `bios`.
pub(crate) fn set_size(needed: usize, bios: usize) -> usize {
    (AT_ONCE * needed).min(bios).max(needed)
}

/// What tests switch off, to see what it is good for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Cure {
    /// The rest of a bio is submitted, and so waits until its front is on its way.
    #[cfg_attr(not(test), expect(dead_code, reason = "tests switch it off"))]
    DepthFirst,
    /// One thread at a time waits for several bios.
    OneAtATime,
    /// Each device has a queue of its own for writes whose flush is over.
    #[cfg_attr(not(test), expect(dead_code, reason = "tests switch it off"))]
    OwnQueue,
}

/// What a device needs to make several bios of one.
pub(crate) struct Duplicates {
    /// Held while waiting for a set of bios; that wait is for bios that end without it.
    many: Mutex<()>,
    /// Counters to be used again.
    spare: Mutex<Vec<Arc<Join>>>,
    #[cfg(test)]
    pub(crate) off: std::sync::OnceLock<Cure>,
    /// Threads that wait for several bios.
    #[cfg(test)]
    pub(crate) waiting: AtomicUsize,
}

/// Counts the duplicates of one bio.
struct Join {
    left: AtomicUsize,
    state: Mutex<JoinState>,
}

#[derive(Default)]
struct JoinState {
    parent: Option<Bio>,
    live: Option<LiveRef>,
    over: Option<Over>,
    error: Option<BlkError>,
    requeue: bool,
    /// Room for the duplicates before they are sent.
    bios: Vec<Bio>,
}

/// What is done with the one when all its duplicates ended.
pub(crate) type Over = fn(LiveRef, Bio, BlkResult);

/// Where duplicates come from and go to.
pub(crate) trait Legs {
    fn count(&self) -> usize;
    /// Allocates the `at`th; `None` only where none is free and `wait` is [`Wait::No`].
    fn alloc(&self, live: &Live, parent: &Bio, at: usize, wait: Wait) -> Option<Bio>;
    /// Sends the `at`th; `leg` is to end with it.
    fn send(&self, live: &LiveRef, at: usize, bio: Bio, leg: Leg);
}

/// What a duplicate owes to the one it was made for. Where it is dropped the counter never reaches
/// zero, and goes with the last leg; the one, dropped with it, ends with an error.
pub(crate) struct Leg {
    join: Arc<Join>,
    /// Which of the duplicates of its target.
    pub(crate) nr: usize,
}

impl Leg {
    pub(crate) fn end(self, res: BlkResult) {
        if let Err(error) = res {
            self.join.state.lock_nested().error.get_or_insert(error);
        }
        self.join.put();
    }

    /// Has the one held until the next resume, and done anew then with all its duplicates.
    pub(crate) fn requeue(self) {
        self.join.state.lock_nested().requeue = true;
        self.join.put();
    }
}

impl Join {
    /// A duplicate ended; the last one gives the one back.
    fn put(self: Arc<Self>) {
        if self.left.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        let mut state = self.state.lock_nested();
        let (parent, live, over) = (state.parent.take(), state.live.take(), state.over.take());
        let (error, requeue) = (state.error.take(), std::mem::take(&mut state.requeue));
        drop(state);
        let (Some(parent), Some(live), Some(over)) = (parent, live, over) else {
            return;
        };
        live.duplicates().spare.lock_nested().push(self);
        if requeue {
            crate::mapped::requeue(live, parent);
        } else {
            over(live, parent, error.map_or(Ok(()), Err));
        }
    }
}

impl Duplicates {
    pub(crate) fn new() -> Self {
        Self {
            many: Mutex::new(Rank::TargetMetadata, ()),
            spare: Mutex::new(Rank::Pool, Vec::new()),
            #[cfg(test)]
            off: std::sync::OnceLock::new(),
            #[cfg(test)]
            waiting: AtomicUsize::new(0),
        }
    }

    #[cfg(test)]
    pub(crate) fn has(&self, cure: Cure) -> bool {
        self.off.get() != Some(&cure)
    }

    #[cfg(not(test))]
    #[expect(clippy::unused_self, reason = "tests look")]
    fn has(&self, _: Cure) -> bool {
        true
    }

    fn join(&self) -> Arc<Join> {
        let spare = self.spare.lock_nested().pop();
        spare.unwrap_or_else(|| {
            Arc::new(Join {
                left: AtomicUsize::new(0),
                state: Mutex::new(Rank::Pool, JoinState::default()),
            })
        })
    }

    /// All that `parent` needs, or none.
    fn alloc(&self, bios: &mut Vec<Bio>, legs: &impl Legs, live: &Live, parent: &Bio) -> bool {
        let mut all = |wait| {
            let ours = (0..legs.count()).map_while(|at| legs.alloc(live, parent, at, wait));
            bios.extend(ours);
            let got_all = bios.len() == legs.count();
            if !got_all {
                bios.clear();
            }
            got_all
        };
        if all(Wait::No) {
            return true;
        }
        #[cfg(test)]
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let many = self.has(Cure::OneAtATime).then(|| self.many.lock_nested());
        let got_all = all(Wait::Yes);
        drop(many);
        #[cfg(test)]
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        got_all
    }
}

/// Sends all `legs` for `parent`; `over` gets it back when they ended.
pub(crate) fn fan_out(live: &LiveRef, parent: Bio, legs: &impl Legs, over: Over) {
    let duplicates = live.duplicates();
    let join = duplicates.join();
    let mut bios = std::mem::take(&mut join.state.lock_nested().bios);
    if !duplicates.alloc(&mut bios, legs, live, &parent) {
        parent.complete(Err(BlkError::NoMemory));
        return;
    }
    // One more than there are duplicates: the list is put back before the counter is used again.
    join.left.store(bios.len() + 1, Ordering::Release);
    let mut state = join.state.lock_nested();
    state.parent = Some(parent);
    state.live = Some(again(live));
    state.over = Some(over);
    drop(state);
    for (nr, bio) in bios.drain(..).enumerate() {
        let join = join.clone();
        legs.send(live, nr, bio, Leg { join, nr });
    }
    join.state.lock_nested().bios = bios;
    join.put();
}

/// The legs of one row.
struct RowLegs {
    row: usize,
    count: usize,
}

impl Legs for RowLegs {
    fn count(&self) -> usize {
        self.count
    }

    fn alloc(&self, live: &Live, parent: &Bio, _: usize, wait: Wait) -> Option<Bio> {
        let row = live.bound.rows.get(self.row)?;
        let mut bio = row.row.leg(parent.op(), wait)?;
        bio.clone_from_parent(parent, row.inside(parent.sector()));
        Some(bio)
    }

    fn send(&self, live: &LiveRef, _: usize, bio: Bio, leg: Leg) {
        let row = live.bound.rows[self.row].row.as_ref();
        row.map_leg(live, self.row, bio, leg);
    }
}

/// Sends `parent`, a discard or write-zeroes in the `row`th row of `live`, as `count` duplicates.
pub(crate) fn map(live: &LiveRef, row: usize, count: usize, parent: Bio) {
    fan_out(live, parent, &RowLegs { row, count }, finish);
}
