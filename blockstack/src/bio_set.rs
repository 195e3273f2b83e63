//! Pools of bios.
//!
//! Each user of bios, and above all each stacking device, has a set of its own. A set holds at most
//! `limit` bios, all made at the start, so that an allocation that waits is certain to be served as
//! long as the bios handed out end: the reserve *is* the set. Bios are made with the set's front
//! pad and kept for ever.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::bio::{Bio, Node, Op, Pad};
use crate::sync::{Condvar, Mutex, Rank, assert_may_wait};

/// Whether an allocation may wait.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Wait {
    /// Sleep until a bio comes back.
    Yes,
    /// Answer at once.
    No,
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
}

impl Home for Inner {
    fn put(&self, node: Box<Node<dyn Pad>>) {
        self.free.lock_nested().push(node);
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.back.notify_one();
        }
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
    /// Makes a set of `limit` bios, at least one.
    #[must_use]
    pub fn new(name: &str, limit: usize) -> Self {
        let limit = limit.max(1);
        let free = (0..limit).map(|_| Node::<P>::new()).collect();
        let inner = Inner {
            name: name.to_owned(),
            limit,
            free: Mutex::new(Rank::Pool, free),
            back: Condvar::new(),
            waiting: AtomicUsize::new(0),
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
        let mut free = self.inner.free.lock_nested();
        loop {
            if let Some(node) = free.pop() {
                drop(free);
                return Some(Bio::from_node(node, op, self.inner.clone()));
            }
            if wait == Wait::No {
                return None;
            }
            if crate::submit::in_submission() {
                drop(free);
                crate::submit::make_room(&self.inner.name);
                free = self.inner.free.lock_nested();
                if !free.is_empty() {
                    continue;
                }
            } else {
                drop(free);
                assert_may_wait();
                free = self.inner.free.lock_nested();
                if !free.is_empty() {
                    continue;
                }
            }
            self.inner.waiting.fetch_add(1, Ordering::SeqCst);
            self.inner.back.wait(&mut free);
            self.inner.waiting.fetch_sub(1, Ordering::SeqCst);
        }
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
