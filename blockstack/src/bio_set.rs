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
//! bio that waits for the allocation. Therefore an allocation there tries without waiting first;
//! if that fails, the bios *of this set* on *both* of the thread's lists are handed, in order, to
//! the set's rescuer thread, which submits them; only then does it wait. Bios of other sets stay:
//! one of a device higher up would, when submitted, allocate from this set, and the rescuer would
//! wait for itself.
//!
//! Progress is certain where each bio is submitted *itself* before the next is allocated, and needs,
//! on its way down, bios of sets further down only. A piece that is not submitted but kept in the
//! pad of a clone from another set is not: on the thread's list stands the clone. Who does that must
//! let the piece end before it takes another, by submitting the rest to its own device.
//!
//! # Locking
//!
//! One leaf lock a set, held for a push or a pop.

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::sync::Arc;

use crate::bio::{Bio, Node, Op, Pad};
use crate::submit::{in_submission, submit_bio, take_parked};
use crate::sync::prim::atomic::{AtomicUsize, Ordering};
use crate::sync::{Condvar, Mutex, Rank, assert_may_wait, assert_not_completing};
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

/// Where a bio goes back to.
pub(crate) trait Home: Send + Sync {
    fn put(&self, node: Box<Node<dyn Pad>>);
}

struct Inner {
    name: String,
    limit: usize,
    free: Mutex<Vec<Box<Node<dyn Pad>>>>,
    back: Condvar,
    waiting: AtomicUsize,
    rescue: Rescue,
    rescuer: OnceWorkqueue<Bio>,
}

impl Home for Inner {
    fn put(&self, node: Box<Node<dyn Pad>>) {
        // Counted under the lock, so a waiter cannot be missed.
        let wake = {
            let mut free = self.free.lock_nested();
            free.push(node);
            self.waiting.load(Ordering::Relaxed) > 0
        };
        if wake {
            self.back.notify_one();
        }
    }
}

impl Inner {
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
        // The address of the set, as its bios know it.
        let me: *const Self = self;
        let mine = |bio: &Bio| bio.home().is_some_and(|home| std::ptr::addr_eq(home, me));
        take_parked(mine, |bio| match self.rescuer() {
            Ok(rescuer) => rescuer.queue(bio),
            Err(error) => {
                log::error!("{}: cannot start the rescuer: {error}", self.name);
                bio.complete(Err(crate::BlkError::NoMemory));
            }
        });
    }
}

/// A bounded pool of bios with `P` as front pad; clones share it.
pub struct BioSet<P> {
    inner: Arc<Inner>,
    pad: PhantomData<fn() -> P>,
}

impl<P> Clone for BioSet<P> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            pad: PhantomData,
        }
    }
}

impl<P: Pad + Default> BioSet<P> {
    /// Makes a set of `limit` bios, at least one, with a rescuer on demand.
    #[must_use]
    pub fn new(name: &str, limit: usize) -> Self {
        Self::make(name, limit, Rescue::OnDemand)
    }

    /// Makes a set of `limit` bios, at least one.
    ///
    /// # Errors
    /// Where the rescuer's thread must be ready and the system gives none.
    pub fn with_rescue(name: &str, limit: usize, rescue: Rescue) -> io::Result<Self> {
        let set = Self::make(name, limit, rescue);
        if rescue == Rescue::Ready {
            set.inner.rescuer()?;
        }
        Ok(set)
    }

    fn make(name: &str, limit: usize, rescue: Rescue) -> Self {
        let limit = limit.max(1);
        let free = (0..limit).map(|_| Node::<P>::new()).collect();
        let inner = Inner {
            name: name.to_owned(),
            limit,
            free: Mutex::new(Rank::Pool, free),
            back: Condvar::new(),
            waiting: AtomicUsize::new(0),
            rescue,
            rescuer: OnceWorkqueue::new(),
        };
        Self {
            inner: Arc::new(inner),
            pad: PhantomData,
        }
    }

    /// Takes a bio; `None` only where none is free and `wait` is [`Wait::No`].
    ///
    /// # Panics
    /// In debug builds, where it would have to wait in a context that must not (`DESIGN` 8).
    #[must_use]
    pub fn alloc(&self, op: Op, wait: Wait) -> Option<Bio> {
        let node = match self.pop() {
            Some(node) => node,
            None if wait == Wait::No => return None,
            None => self.pop_waiting(),
        };
        Some(Bio::from_node(node, op, self.inner.clone()))
    }

    fn pop(&self) -> Option<Box<Node<dyn Pad>>> {
        self.inner.free.lock_nested().pop()
    }

    #[cold]
    fn pop_waiting(&self) -> Box<Node<dyn Pad>> {
        if in_submission() {
            assert_not_completing();
            self.inner.punt();
        } else {
            assert_may_wait();
        }
        let mut free = self.inner.free.lock_nested();
        self.inner.waiting.fetch_add(1, Ordering::Relaxed);
        let node = loop {
            match free.pop() {
                Some(node) => break node,
                None => self.inner.back.wait(&mut free),
            }
        };
        self.inner.waiting.fetch_sub(1, Ordering::Relaxed);
        node
    }

    /// Makes a bio like those of the set that does not belong to it: its owner keeps it, resets it
    /// before each use, and frees it by a drop.
    #[must_use]
    pub fn alloc_own(&self) -> Bio {
        Bio::without_home(Node::<P>::new())
    }

    /// Bios handed out and not yet back.
    #[must_use]
    pub fn in_use(&self) -> usize {
        self.inner.limit - self.inner.free.lock_nested().len()
    }
}

impl<P> fmt::Debug for BioSet<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BioSet")
            .field("name", &self.inner.name)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
