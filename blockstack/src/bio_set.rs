//! Pools of bios.
//!
//! Each user of bios, and above all each stacking device, has a set of its own. A set holds at most
//! `limit` bios, all made at the start, so that an allocation that waits is certain to be served as
//! long as the bios handed out end: the reserve *is* the set. Bios are made with the set's front
//! pad and kept for ever.
//!
//! # The rescuer
//!
//! Inside a device's `submit`, bios that were submitted wait on lists of the thread until `submit`
//! returns ([`submit`](crate::submit)). A second allocation from the same set could so wait for a
//! bio that waits for the allocation:
//!
//! ```text
//! a set of 1; dm1 takes both pieces before it returns       set    lists: new | old
//! submit(A[0..16) on dm1)                                    1      -          | -
//!   dm1: A1 = split(8)                                       0      -          | -
//!   dm1: submit(A1 -> disk)                                  0      A1         | -
//!   dm1: A2 = split(4): none free, wait for A1               0      A1         | -
//! A1 is sent when dm1 returns; dm1 returns when it has A2; A2 is free when A1 has ended. Nothing
//! moves again. With a set of N, N threads that hold a piece each do it together.
//! ```
//!
//! The rule: an allocation inside a submission tries without waiting first. If that fails, the bios
//! *of this set* on *both* of the thread's lists go, in the order they would have been submitted
//! in, to the set's rescuer thread, which submits them; only then does the allocation wait.
//!
//! ```text
//!   dm1: A2 = split(4): none free                            0      A1         | -
//!        A1 to the rescuer, which submits it to the disk     0      -          | -
//!        wait; A1 ends                                       1      -          | -
//!   dm1: A2                                                  0      -          | -
//! ```
//!
//! *Of this set only*: a bio of a device higher up would, when submitted, allocate from this set,
//! and the rescuer would wait for itself. *Both lists*: what the running device has submitted stands
//! on the new one, what was there before on the old one. Where devices on two levels share a set,
//! the bios that the lower one waits for are on the old list:
//!
//! ```text
//! a set of 2, shared by dm1 and dm0                          set    lists: new | old
//!   dm1: submit(A1 -> dm0), submit(A2 -> disk)               0      A1 A2      | -
//!   dm0 gets A1, B1 = split(4): none free                    0      -          | A2
//!        A2 to the rescuer; wait; A2 ends                    1      -          | -
//! ```
//!
//! Progress is certain where each bio is submitted *itself* before the next is allocated, and needs,
//! on its way down, bios of sets further down only. A piece that is not submitted but kept in the
//! pad of a clone from another set is not: on the thread's list stands the clone. Who does that must
//! let the piece end before it takes another, by submitting the rest to its own device. Nor is a
//! bio on its way into a device that takes from the same set: with a shared set that certainty
//! needs as many bios as can be on their way there at a time, and one more.
//!
//! Held by `tests/rescuer.rs`: `the_case_of_the_text_stops_without_the_rescuer` (the stop is proven,
//! not timed) and `the_case_of_the_text_goes_on_with_the_rescuer`;
//! `what_was_there_before_is_handed_over_too`; `stacks_of_any_depth_get_by_with_few_bios_each` and
//! `devices_that_need_a_rescuer_stand_among_those_that_do_not`; for the other way,
//! `order_alone_is_enough_where_one_bio_is_taken_at_a_time`. By the unit test
//! `only_bios_of_the_scarce_set_are_punted_and_in_order`. By models in `tests/shuttle.rs`:
//! `a_rescuer_started_on_demand_moves_what_waits`, `rescuers_of_two_levels_do_not_wait_for_each_other`,
//! `what_was_there_before_is_handed_over_too`, `bios_of_the_level_above_are_left_alone`, and, where
//! the checker must find the deadlock,
//! `without_a_rescuer_nothing_moves` and `what_was_there_before_is_stuck_without_a_rescuer`.
//!
//! # At the end
//!
//! Bios keep the set they came from, so its memory goes after the last of them is back, which may be
//! on a thread that completes bios. Debug builds see then that none is missing; a device's
//! [`Stats`](crate::device::Stats) see at its end that each bio it accepted has ended or gone on.
//!
//! # Lanes
//!
//! A bio that comes back is kept in a slot of the lane of the thread that brought it, from where
//! that thread's next allocation takes it by one exchange: threads that allocate and free do not
//! meet. What is in the slots is not lost for others. Who finds the shared list empty says that it
//! waits, then empties all slots, and then waits; who puts a bio into a slot looks, after that,
//! whether somebody waits, and takes it out again for him. Both exchange the same word, so one of
//! the two sees the other:
//!
//! ```text
//! waiter: waiting += 1;  slot.take() -> none                ; sleeps
//! other:                                    slot.swap(bio)  ; waiting > 0: to the list, wakes
//! ```
//!
//! A set that is dropped is closed in the same way; bios that come back later are freed.
//!
//! # Locking
//!
//! One leaf lock a set, held for a push or a pop.

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::sync::Arc;

use crossbeam_utils::CachePadded;

use crate::bio::{Bio, Node, Op, Pad};
use crate::lane::{LANES, thread_lane};
use crate::submit::{in_submission, submit_bio, take_parked};
use crate::sync::prim::Exchange;
use crate::sync::prim::atomic::{AtomicUsize, Ordering};
use crate::sync::{Condvar, Mutex, MutexGuard, Rank, assert_may_wait, assert_not_completing};
use crate::workqueue::{OnceWorkqueue, Workqueue};

/// Whether an allocation may wait.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Wait {
    /// Sleep until a bio comes back.
    Yes,
    /// Answer at once.
    No,
}

/// Whether a set has a rescuer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Rescue {
    /// None: whoever allocates makes sure that order alone is enough.
    Never,
    /// Its thread is started when it is needed first.
    OnDemand,
    /// Its thread is there from the start.
    Ready,
}

/// Where a bio goes back to. One for each bio, since it is counted once more while that happens:
/// threads whose bios are of one set do not meet there.
pub(crate) struct Home(Arc<Inner>);

impl Home {
    #[inline]
    pub(crate) fn set(&self) -> &Inner {
        &self.0
    }
}

type Free = Vec<Box<Node>>;
type Slot = CachePadded<Exchange<Box<Node>>>;

/// In [`Inner::attention`]: the set is closed.
const CLOSED: usize = 1 << (usize::BITS - 1);

pub(crate) struct Inner {
    name: String,
    limit: usize,
    keeps_dev: bool,
    slots: Box<[Slot; LANES]>,
    free: Mutex<Free>,
    back: Condvar,
    /// Threads that wait for a bio, and [`CLOSED`]: what somebody who puts a bio must look at.
    attention: AtomicUsize,
    /// Bios freed since the set was closed.
    buried: AtomicUsize,
    rescue: Rescue,
    rescuer: OnceWorkqueue<Bio>,
}

#[cfg(debug_assertions)]
impl Drop for Inner {
    // Each bio keeps the set until it is freed.
    fn drop(&mut self) {
        let buried = self.buried.load(Ordering::Relaxed);
        assert!(
            buried == self.limit || std::thread::panicking(),
            "{}: dropped with {buried} of its {} bios",
            self.name,
            self.limit
        );
    }
}

impl Inner {
    #[inline]
    pub(crate) fn put(&self, node: Box<Node>) {
        let slot = &self.slots[thread_lane()];
        let before = slot.swap(Some(node));
        if before.is_some() || self.attention.load(Ordering::Relaxed) != 0 {
            self.put_shared(before, slot);
        }
    }

    /// A bio for the set.
    fn node<P: Pad + Default>(self: &Arc<Self>) -> Box<Node> {
        let home = Arc::new(Home(self.clone()));
        Node::new::<P>(Some(home), self.keeps_dev)
    }

    /// Puts on the list what was in the slot and, where somebody waits or nobody will come any
    /// more, what is there now.
    #[cold]
    fn put_shared(&self, before: Option<Box<Node>>, slot: &Slot) {
        let mut free = self.free.lock_nested();
        free.extend(before);
        let attention = self.attention.load(Ordering::Relaxed);
        if attention != 0 {
            free.extend(slot.take());
        }
        if attention & CLOSED != 0 {
            self.bury(free);
        } else if attention != 0 {
            drop(free);
            self.back.notify_one();
        }
    }

    /// Takes what is in the slots onto the list.
    fn collect(&self, free: &mut MutexGuard<'_, Free>) {
        for slot in &*self.slots {
            free.extend(slot.take());
        }
    }

    #[inline]
    fn pop(&self) -> Option<Box<Node>> {
        let own = self.slots[thread_lane()].take();
        own.or_else(|| self.pop_shared())
    }

    #[cold]
    fn pop_shared(&self) -> Option<Box<Node>> {
        let mut free = self.free.lock_nested();
        if free.is_empty() {
            self.collect(&mut free);
        }
        free.pop()
    }

    #[cold]
    fn pop_waiting(&self) -> Box<Node> {
        if in_submission() {
            assert_not_completing();
            self.punt();
        } else {
            assert_may_wait();
        }
        let mut free = self.free.lock_nested();
        // Before the slots are looked at: see the module's documentation.
        self.attention.fetch_add(1, Ordering::Relaxed);
        let node = loop {
            self.collect(&mut free);
            match free.pop() {
                Some(node) => break node,
                None => self.back.wait(&mut free),
            }
        };
        self.attention.fetch_sub(1, Ordering::Relaxed);
        if !free.is_empty() {
            // More came out of the slots than this thread wants.
            self.back.notify_one();
        }
        node
    }

    fn close(&self) {
        self.attention.fetch_or(CLOSED, Ordering::Relaxed);
        let mut free = self.free.lock_nested();
        self.collect(&mut free);
        self.bury(free);
    }

    /// Frees bios of a closed set.
    fn bury(&self, mut free: MutexGuard<'_, Free>) {
        let dead = std::mem::take(&mut *free);
        drop(free);
        self.buried.fetch_add(dead.len(), Ordering::Relaxed);
        drop(dead);
    }

    fn rescuer(&self) -> io::Result<&Workqueue<Bio>> {
        let name = format!("rescue {}", self.name);
        self.rescuer
            .get_or_make(|| Workqueue::new(&name, 1, submit_bio))
    }

    /// Hands the set's bios that the calling thread holds back to the rescuer.
    fn punt(&self) {
        if self.rescue == Rescue::Never {
            return;
        }
        take_parked(
            |bio| bio.is_of(self),
            |bio| match self.rescuer() {
                Ok(rescuer) => rescuer.queue(bio),
                Err(error) => {
                    log::error!("{}: cannot start the rescuer: {error}", self.name);
                    bio.complete(Err(crate::BlkError::NoMemory));
                }
            },
        );
    }
}

/// The bios of a set know it and it knows them; the last handle ends that.
struct Handle(Arc<Inner>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// A bounded pool of bios with `P` as front pad; clones share it.
pub struct BioSet<P> {
    handle: Arc<Handle>,
    pad: PhantomData<fn() -> P>,
}

impl<P> Clone for BioSet<P> {
    fn clone(&self) -> Self {
        Self {
            handle: self.handle.clone(),
            pad: PhantomData,
        }
    }
}

impl<P> BioSet<P> {
    #[inline]
    fn inner(&self) -> &Inner {
        &self.handle.0
    }
}

impl<P: Pad + Default> BioSet<P> {
    /// Makes a set of `limit` bios, at least one, with a rescuer on demand.
    #[must_use]
    pub fn new(name: &str, limit: usize) -> Self {
        Self::make(name, limit, Rescue::OnDemand, false)
    }

    /// As [`Self::without_rescuer`], for the clones of a stacking device, which nearly always go to
    /// the same devices: what is free keeps a reference to the device it was sent to last, until
    /// [`Self::forget_devices`].
    #[must_use]
    pub fn for_clones(name: &str, limit: usize) -> Self {
        Self::make(name, limit, Rescue::Never, true)
    }

    /// Lets go of the devices that free bios were sent to last.
    pub fn forget_devices(&self) {
        let inner = self.inner();
        let mut free = inner.free.lock_nested();
        inner.collect(&mut free);
        free.iter_mut().for_each(|node| node.forget_dev());
    }

    /// As [`Self::new`], without a rescuer: [`Rescue::Never`].
    #[must_use]
    pub fn without_rescuer(name: &str, limit: usize) -> Self {
        Self::make(name, limit, Rescue::Never, false)
    }

    /// Makes a set of `limit` bios, at least one.
    ///
    /// # Errors
    /// Where the rescuer's thread must be ready and the system gives none.
    pub fn with_rescue(name: &str, limit: usize, rescue: Rescue) -> io::Result<Self> {
        let set = Self::make(name, limit, rescue, false);
        if rescue == Rescue::Ready {
            set.inner().rescuer()?;
        }
        Ok(set)
    }

    fn make(name: &str, limit: usize, rescue: Rescue, keeps_dev: bool) -> Self {
        let limit = limit.max(1);
        let inner = Arc::new(Inner {
            name: name.to_owned(),
            limit,
            keeps_dev,
            slots: Box::new(std::array::from_fn(|_| Slot::default())),
            free: Mutex::new(Rank::Pool, Vec::with_capacity(limit)),
            back: Condvar::new(),
            attention: AtomicUsize::new(0),
            buried: AtomicUsize::new(0),
            rescue,
            rescuer: OnceWorkqueue::new(),
        });
        let nodes = std::iter::repeat_with(|| inner.node::<P>()).take(limit);
        inner.free.lock_nested().extend(nodes);
        Self {
            handle: Arc::new(Handle(inner)),
            pad: PhantomData,
        }
    }

    /// Takes a bio; `None` only where none is free and `wait` is [`Wait::No`].
    ///
    /// # Panics
    /// In debug builds, where it would have to wait in a context that must not (`DESIGN` 8).
    #[must_use]
    #[inline]
    pub fn alloc(&self, op: Op, wait: Wait) -> Option<Bio> {
        let inner = self.inner();
        let node = match inner.pop() {
            Some(node) => node,
            None if wait == Wait::No => return None,
            None => inner.pop_waiting(),
        };
        Some(Bio::from_node(node, op))
    }

    /// Takes back a bio of this set that is over; what a drop does, for less where the set is at
    /// hand. The pad stays as it is: its owner has put it back to its default state.
    #[inline]
    pub fn give_back(&self, bio: Bio) {
        let inner = self.inner();
        if !bio.is_of(inner) {
            return;
        }
        if let Some(node) = bio.into_node() {
            inner.put(node);
        }
    }

    /// Makes a bio like those of the set that does not belong to it: its owner keeps it, resets it
    /// before each use, and frees it by a drop.
    #[must_use]
    pub fn alloc_own(&self) -> Bio {
        Bio::without_home(Node::new::<P>(None, false))
    }

    /// Lets go of `bio`, where it is one of the set's: it is freed at its end, and a new one takes
    /// its place. For a bio that is put aside for nobody knows how long, during which others would
    /// wait for it.
    pub fn disown(&self, bio: &mut Bio) {
        let inner = &self.handle.0;
        if bio.is_of(inner) {
            bio.core_mut().home = None;
            inner.put(inner.node::<P>());
        }
    }

    /// Threads that wait for a bio now.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.inner().attention.load(Ordering::Relaxed) & !CLOSED
    }

    /// Bios handed out and not yet back.
    #[must_use]
    pub fn in_use(&self) -> usize {
        let inner = self.inner();
        let mut free = inner.free.lock_nested();
        inner.collect(&mut free);
        inner.limit - free.len()
    }
}

impl<P> fmt::Debug for BioSet<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BioSet")
            .field("name", &self.inner().name)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
