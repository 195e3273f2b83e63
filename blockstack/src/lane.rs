//! What keeps processors out of each other's cache lines.
//!
//! A bio's way down a stack touches counters, pools and references of each device it passes. One
//! word that two processors change in turn costs more than all the rest of a layer. So what every
//! bio changes is there several times, and a thread keeps to its own:
//!
//! - [`thread_slot`]: a small number that one thread at a time has. Its counters are changed without
//!   an atomic read-modify-write, since nobody else changes them.
//! - [`Count`]: a counter that is so changed.
//! - [`Lanes`]: a device under several references, each with a count of its own.
//!
//! # Locking
//!
//! None.

use std::cell::Cell;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_utils::CachePadded;

use crate::device::{BlockDevice, DynDevice};

/// Threads that can have a slot at a time; what has none shares.
pub(crate) const SLOTS: usize = 64;
/// Places for what is shared without harm, only slower.
pub(crate) const LANES: usize = 16;

/// A bit for each slot that a thread has.
static TAKEN: AtomicU64 = AtomicU64::new(0);

const UNKNOWN: usize = usize::MAX;
const NONE: usize = SLOTS;

struct Release;

impl Drop for Release {
    fn drop(&mut self) {
        // What the thread still does in the destructors of its other values is shared.
        let slot = SLOT.replace(NONE);
        if slot < SLOTS {
            // The next thread that takes the bit sees what this one counted.
            TAKEN.fetch_and(!(1 << slot), Ordering::Release);
        }
    }
}

thread_local! {
    static SLOT: Cell<usize> = const { Cell::new(UNKNOWN) };
    static RELEASE: Cell<Option<Release>> = const { Cell::new(None) };
}

/// The calling thread's slot, below [`SLOTS`]; [`SLOTS`] where all are taken. No other thread has
/// it as long as this one lives.
#[inline]
pub(crate) fn thread_slot() -> usize {
    if cfg!(shuttle) {
        return NONE;
    }
    let slot = SLOT.get();
    if slot == UNKNOWN { take_slot() } else { slot }
}

/// The calling thread's lane, below [`LANES`]; others may have the same.
#[cfg(not(shuttle))]
#[inline]
pub(crate) fn thread_lane() -> usize {
    thread_slot() % LANES
}

/// In a model all threads are one to the system: two lanes for them, so that they meet and do not.
#[cfg(shuttle)]
pub(crate) fn thread_lane() -> usize {
    usize::from(shuttle::current::me()) % 2
}

#[cold]
fn take_slot() -> usize {
    // Before the slot: a thread that is at its end cannot give one back any more.
    if RELEASE.try_with(|held| held.set(Some(Release))).is_err() {
        return NONE;
    }
    let mut taken = TAKEN.load(Ordering::Relaxed);
    let slot = loop {
        let slot = taken.trailing_ones() as usize;
        if slot >= SLOTS {
            break NONE;
        }
        let with = taken | 1 << slot;
        match TAKEN.compare_exchange_weak(taken, with, Ordering::Acquire, Ordering::Relaxed) {
            Ok(_) => break slot,
            Err(now) => taken = now,
        }
    };
    SLOT.set(slot);
    slot
}

/// Adds to a counter of the thread that has `slot`, and gives what was there before.
#[inline]
pub(crate) fn add(counter: &AtomicU64, slot: usize, n: u64) -> u64 {
    if slot < SLOTS {
        // Nobody else writes it: no need to lock the line.
        let before = counter.load(Ordering::Relaxed);
        counter.store(before.wrapping_add(n), Ordering::Relaxed);
        before
    } else {
        counter.fetch_add(n, Ordering::Relaxed)
    }
}

/// A count on whose account no two threads meet.
#[derive(Debug)]
pub struct Count(Box<[CachePadded<AtomicU64>]>);

impl Count {
    /// Adds one.
    #[inline]
    pub fn add_one(&self) {
        let slot = thread_slot();
        add(&self.0[slot], slot, 1);
    }

    /// The count of all threads.
    #[must_use]
    pub fn sum(&self) -> u64 {
        self.0.iter().map(|one| one.load(Ordering::Relaxed)).sum()
    }
}

impl Default for Count {
    fn default() -> Self {
        Self((0..=SLOTS).map(|_| CachePadded::default()).collect())
    }
}

#[repr(align(128))]
pub(crate) struct Lane {
    dev: DynDevice,
    id: usize,
}

/// Where a device is, to know it again. To ask the reference itself means a look at its vtable.
fn id(dev: &DynDevice) -> usize {
    Arc::as_ptr(dev).addr()
}

struct Shared {
    id: usize,
    dev: DynDevice,
    lanes: [Arc<Lane>; LANES],
}

/// A device that bios of several threads are sent to all the time: as many references as there are
/// lanes, for [`Bio::set_lane`](crate::Bio::set_lane).
#[derive(Clone)]
pub struct Lanes(Arc<Shared>);

impl Lanes {
    /// Makes the references.
    #[must_use]
    pub fn new(dev: &DynDevice) -> Self {
        let id = id(dev);
        let lane = |_| {
            let dev = dev.clone();
            Arc::new(Lane { dev, id })
        };
        Self(Arc::new(Shared {
            id,
            dev: dev.clone(),
            lanes: std::array::from_fn(lane),
        }))
    }

    /// The device.
    #[must_use]
    #[inline]
    pub fn dev(&self) -> &DynDevice {
        &self.0.dev
    }

    #[inline]
    pub(crate) fn here(&self) -> DevRef {
        DevRef::Lane(self.0.lanes[thread_lane()].clone())
    }

    /// Whether it is the device that `other` names.
    #[inline]
    pub(crate) fn are_of(&self, other: &DevRef) -> bool {
        self.0.id == other.id()
    }
}

impl Deref for Lanes {
    type Target = DynDevice;
    #[inline]
    fn deref(&self) -> &DynDevice {
        self.dev()
    }
}

impl fmt::Debug for Lanes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Lanes").field(&self.dev().name()).finish()
    }
}

/// The device of a bio.
#[derive(Clone)]
pub(crate) enum DevRef {
    /// Counted where all its users count.
    Plain(DynDevice),
    /// Counted where the users of one lane do.
    Lane(Arc<Lane>),
}

impl DevRef {
    #[inline]
    pub(crate) fn dev(&self) -> &DynDevice {
        match self {
            Self::Plain(dev) => dev,
            Self::Lane(lane) => &lane.dev,
        }
    }

    #[inline]
    fn id(&self) -> usize {
        match self {
            Self::Plain(dev) => id(dev),
            Self::Lane(lane) => lane.id,
        }
    }

    #[inline]
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.id() == other.id()
    }

    #[inline]
    pub(crate) fn is_dev(&self, dev: &DynDevice) -> bool {
        self.id() == id(dev)
    }
}

impl Deref for DevRef {
    type Target = dyn BlockDevice;
    #[inline]
    fn deref(&self) -> &Self::Target {
        self.dev().as_ref()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::{Arc, Barrier};

    use super::{SLOTS, thread_slot};

    #[test]
    fn no_two_threads_have_one_slot_and_those_that_end_give_theirs_back() {
        // Other tests have slots at the same time, but not for long.
        let mut most_after_the_first = 0;
        for round in 0..200 {
            // More than there are slots.
            let barrier = Arc::new(Barrier::new(SLOTS + 8));
            let threads: Vec<_> = (0..SLOTS + 8)
                .map(|_| {
                    let barrier = barrier.clone();
                    std::thread::spawn(move || {
                        let slot = thread_slot();
                        barrier.wait();
                        assert_eq!(thread_slot(), slot);
                        slot
                    })
                })
                .collect();
            let slots: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
            let own: Vec<_> = slots.iter().filter(|slot| **slot < SLOTS).collect();
            assert_eq!(own.iter().collect::<HashSet<_>>().len(), own.len());
            if round > 0 {
                most_after_the_first = own.len().max(most_after_the_first);
            }
            if round > 3 && most_after_the_first > SLOTS / 2 {
                return;
            }
        }
        panic!("at most {most_after_the_first} slots came back");
    }
}
