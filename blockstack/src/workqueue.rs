//! Work that must not be done where it comes up, done by threads of a named queue.
//!
//! A queue has one thread from the start, so that work on the I/O path goes on where the system
//! gives no more; others are added, up to a bound, while items wait and nobody is idle. Items are
//! begun in the order they came. They are values of one type, handled by one function, so that
//! queueing allocates nothing after warm-up; `Box<dyn FnOnce() + Send>` will do where that does not
//! matter.
//!
//! To wake a thread for each of many small items costs more than the items. A queue that
//! [lingers](Workqueue::lingering) looks once more after a while before its threads sleep until they
//! are woken, and does what came meanwhile together.
//!
//! # Locking
//!
//! One leaf lock a queue; items run without it, in a context that may wait for anything.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::sync::prim::thread::{self, JoinHandle};
use crate::sync::prim::{OnceLock, survive};
use crate::sync::{Condvar, Mutex, Rank, assert_may_wait};

struct State<T> {
    items: VecDeque<T>,
    /// Threads that wait for items.
    idle: usize,
    /// Threads that will look for items by themselves.
    lingering: usize,
    /// Items being handled.
    running: usize,
    /// Items ended so far, and threads that wait for some number of them.
    ended: u64,
    flushing: usize,
    threads: Vec<JoinHandle<()>>,
    stop: bool,
}

struct Inner<T> {
    name: String,
    max_active: usize,
    linger: Option<Duration>,
    handle: Box<dyn Fn(T) + Send + Sync>,
    state: Mutex<State<T>>,
    work: Condvar,
    quiet: Condvar,
}

/// See the module's documentation.
pub struct Workqueue<T: Send + 'static> {
    inner: Arc<Inner<T>>,
}

impl<T: Send + 'static> Workqueue<T> {
    /// Makes a queue whose items `handle` takes, at most `max_active` at a time.
    ///
    /// # Errors
    /// Where the system gives not even one thread.
    pub fn new(
        name: &str,
        max_active: usize,
        handle: impl Fn(T) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        Self::make(name, max_active, None, handle)
    }

    /// As [`Self::new`], for many small items nobody waits for: they may wait for up to `linger`.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn lingering(
        name: &str,
        max_active: usize,
        linger: Duration,
        handle: impl Fn(T) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        Self::make(name, max_active, Some(linger), handle)
    }

    fn make(
        name: &str,
        max_active: usize,
        linger: Option<Duration>,
        handle: impl Fn(T) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let inner = Arc::new(Inner {
            name: name.to_owned(),
            max_active: max_active.max(1),
            linger,
            handle: Box::new(handle),
            state: Mutex::new(
                Rank::Pool,
                State {
                    items: VecDeque::with_capacity(64),
                    idle: 0,
                    lingering: 0,
                    running: 0,
                    ended: 0,
                    flushing: 0,
                    threads: Vec::new(),
                    stop: false,
                },
            ),
            work: Condvar::new(),
            quiet: Condvar::new(),
        });
        let first = spawn(&inner)?;
        inner.state.lock_nested().threads.push(first);
        Ok(Self { inner })
    }

    /// Appends an item. Never waits.
    pub fn queue(&self, item: T) {
        let mut state = self.inner.state.lock_nested();
        state.items.push_back(item);
        if state.lingering > 0 {
            return;
        }
        if state.idle >= state.items.len() {
            drop(state);
            self.inner.work.notify_one();
            return;
        }
        if state.threads.len() < self.inner.max_active {
            match spawn(&self.inner) {
                Ok(thread) => state.threads.push(thread),
                Err(error) => log::debug!("{}: no further thread: {error}", self.inner.name),
            }
        }
        drop(state);
        self.inner.work.notify_one();
    }

    /// Waits until no item waits or runs; those that items queue meanwhile are waited for too.
    pub fn drain(&self) {
        assert_may_wait();
        let mut state = self.inner.state.lock_nested();
        while !state.items.is_empty() || state.running > 0 {
            self.inner.quiet.wait(&mut state);
        }
    }

    /// Waits until as many items ended as wait or run now, which with one thread are just those.
    /// What is queued meanwhile is not waited for.
    pub fn flush(&self) {
        assert_may_wait();
        let mut state = self.inner.state.lock_nested();
        let until = state.ended + (state.items.len() + state.running) as u64;
        state.flushing += 1;
        while state.ended < until {
            self.inner.quiet.wait(&mut state);
        }
        state.flushing -= 1;
    }

    /// Waits until all is done and ends the threads; what a drop does.
    pub fn destroy(self) {
        drop(self);
    }

    /// Items that wait or run.
    #[must_use]
    pub fn pending(&self) -> usize {
        let state = self.inner.state.lock_nested();
        state.items.len() + state.running
    }
}

fn spawn<T: Send + 'static>(inner: &Arc<Inner<T>>) -> io::Result<JoinHandle<()>> {
    let inner = inner.clone();
    crate::sched::spawn(inner.name.clone(), move || work(&inner))
}

fn work<T>(inner: &Inner<T>) {
    let mut state = inner.state.lock_nested();
    let mut worked = false;
    loop {
        if let Some(item) = state.items.pop_front() {
            worked = true;
            state.running += 1;
            drop(state);
            if !survive(|| (inner.handle)(item)) {
                log::error!("{}: an item panicked", inner.name);
            }
            state = inner.state.lock_nested();
            state.running -= 1;
            state.ended += 1;
            if state.flushing > 0 || (state.items.is_empty() && state.running == 0) {
                inner.quiet.notify_all();
            }
        } else if state.stop {
            return;
        } else if let Some(linger) = inner.linger.filter(|_| worked) {
            worked = false;
            state.lingering += 1;
            inner.work.wait_for(&mut state, linger);
            state.lingering -= 1;
        } else {
            state.idle += 1;
            inner.work.wait(&mut state);
            state.idle -= 1;
        }
    }
}

impl<T: Send + 'static> Drop for Workqueue<T> {
    fn drop(&mut self) {
        let threads = {
            let mut state = self.inner.state.lock_nested();
            state.stop = true;
            std::mem::take(&mut state.threads)
        };
        self.inner.work.notify_all();
        // The last owner may be an item of the queue itself; its thread ends after it.
        let me = thread::current().id();
        for thread in threads {
            if thread.thread().id() != me && thread.join().is_err() {
                log::error!("{}: a thread panicked", self.inner.name);
            }
        }
    }
}

impl<T: Send + 'static> fmt::Debug for Workqueue<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workqueue")
            .field("name", &self.inner.name)
            .finish_non_exhaustive()
    }
}

/// A queue that is made when it is needed first. Several threads may race to make it: one wins, and
/// the queues of the others are destroyed, never used.
#[derive(Debug)]
pub struct OnceWorkqueue<T: Send + 'static>(OnceLock<Workqueue<T>>);

impl<T: Send + 'static> OnceWorkqueue<T> {
    /// No queue yet.
    #[must_use]
    pub const fn new() -> Self {
        Self(OnceLock::new())
    }

    /// The queue, if one was needed so far.
    #[must_use]
    pub fn get(&self) -> Option<&Workqueue<T>> {
        self.0.get()
    }

    /// The queue, made by `make` where there was none.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn get_or_make(
        &self,
        make: impl FnOnce() -> io::Result<Workqueue<T>>,
    ) -> io::Result<&Workqueue<T>> {
        if let Some(queue) = self.0.get() {
            return Ok(queue);
        }
        let made = make()?;
        Ok(self.0.get_or_init(|| made))
    }
}

impl<T: Send + 'static> Default for OnceWorkqueue<T> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Barrier};

    use super::{OnceWorkqueue, Workqueue};

    type Job = Box<dyn FnOnce() + Send>;

    #[test]
    fn items_run_side_by_side_up_to_the_bound() {
        let queue = Workqueue::<Job>::new("test", 3, |job| job()).unwrap();
        let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let barrier = Arc::new(Barrier::new(3));
        for i in 0..60 {
            let (now, most, barrier) = (now.clone(), most.clone(), barrier.clone());
            queue.queue(Box::new(move || {
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                if i < 3 {
                    barrier.wait();
                }
                now.fetch_sub(1, Ordering::SeqCst);
            }));
        }
        queue.drain();
        assert_eq!((most.load(Ordering::SeqCst), queue.pending()), (3, 0));
    }

    #[test]
    fn drain_waits_for_what_items_queue() {
        let done = Arc::new(AtomicUsize::new(0));
        let queue = Arc::new(OnceWorkqueue::<usize>::new());
        let (inner, count) = (Arc::downgrade(&queue), done.clone());
        let make = || {
            Workqueue::new("test", 2, move |left: usize| {
                count.fetch_add(1, Ordering::SeqCst);
                if left > 0
                    && let Some(queue) = inner.upgrade()
                    && let Some(queue) = queue.get()
                {
                    queue.queue(left - 1);
                }
            })
        };
        queue.get_or_make(make).unwrap().queue(9);
        queue.get().unwrap().drain();
        assert_eq!(done.load(Ordering::SeqCst), 10);
    }

    #[test]
    fn a_queue_that_is_dropped_finishes_first() {
        let done = Arc::new(AtomicUsize::new(0));
        let count = done.clone();
        let queue = Workqueue::new("test", 1, move |()| {
            count.fetch_add(1, Ordering::SeqCst);
        })
        .unwrap();
        (0..100).for_each(|_| queue.queue(()));
        queue.destroy();
        assert_eq!(done.load(Ordering::SeqCst), 100);
    }

    #[test]
    fn racing_threads_share_one_queue() {
        for _ in 0..50 {
            let once = Arc::new(OnceWorkqueue::<()>::new());
            let barrier = Arc::new(Barrier::new(4));
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    let (once, barrier) = (once.clone(), barrier.clone());
                    std::thread::spawn(move || {
                        barrier.wait();
                        let queue = once.get_or_make(|| Workqueue::new("test", 1, |()| ()));
                        std::ptr::from_ref(queue.unwrap()) as usize
                    })
                })
                .collect();
            let mut seen: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
            seen.dedup();
            assert_eq!(seen.len(), 1);
        }
    }

    #[test]
    fn a_panic_of_an_item_costs_only_the_item() {
        let queue = Workqueue::<Job>::new("test", 1, |job| job()).unwrap();
        let done = Arc::new(AtomicUsize::new(0));
        let count = done.clone();
        queue.queue(Box::new(|| panic!("on purpose")));
        queue.queue(Box::new(move || {
            count.fetch_add(1, Ordering::SeqCst);
        }));
        queue.drain();
        assert_eq!(done.load(Ordering::SeqCst), 1);
    }
}
