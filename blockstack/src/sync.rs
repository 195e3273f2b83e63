//! Locks with ranks, and the hook that hears of every wait.
//!
//! A lock may be taken only while all locks held by the thread have a lower rank; debug builds keep
//! a list per thread and panic on an inversion. Ranks that are not [`Rank::may_wait`] must not be
//! held while a bio is awaited; [`assert_may_wait`] checks that where waiting happens.
//!
//! A thread that serves requests installs a [`WaitHook`]. Every wait of this crate and of those
//! above goes through [`blocking`], which tells the hook, so that another thread can take over the
//! requests behind the one that waits. A lock that is free costs no call of the hook.

use std::cell::{Cell, RefCell};
use std::fmt;
#[cfg(debug_assertions)]
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;
use std::time::{Duration, Instant};

pub mod prim;

use self::prim::thread_local;

/// The order of locks, outer to inner (`DESIGN` section 8, `STYLE` 3.6).
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
#[repr(u8)]
pub enum Rank {
    /// Mount state: remount, shutdown.
    Mount,
    /// One cross-directory rename at a time.
    Rename,
    /// An inode; several at once: parent before child, else ascending number.
    Inode,
    /// The barrier of the running transaction.
    Transaction,
    /// An inode's mapping.
    ExtentTree,
    /// State of the journal, never held while I/O is awaited.
    JournalState,
    /// A block group's view in memory, ascending.
    BlockGroup,
    /// Counters of the superblock, tables of inodes and the like.
    Counters,
    /// The buffer client of a file system.
    FsBufio,
    /// A device-mapper table, held only to clone it.
    DmTable,
    /// Metadata of a device-mapper target.
    TargetMetadata,
    /// The buffer client of a device-mapper target.
    DmBufio,
    /// A bio prison cell.
    Cell,
    /// A device's queue.
    Queue,
    /// A memory pool: a leaf.
    Pool,
}

impl Rank {
    /// Whether a bio may be awaited while a lock of this rank is held.
    #[must_use]
    pub const fn may_wait(self) -> bool {
        matches!(
            self,
            Self::Mount
                | Self::Rename
                | Self::Inode
                | Self::Transaction
                | Self::ExtentTree
                | Self::TargetMetadata
        )
    }
}

#[cfg(debug_assertions)]
thread_local! {
    // Never dropped: a thread still locks while it ends, in the destructors of its other values.
    static HELD: RefCell<ManuallyDrop<Vec<Rank>>> =
        const { RefCell::new(ManuallyDrop::new(Vec::new())) };
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Nesting {
    Strict,
    SameRank,
}

#[cfg(debug_assertions)]
fn push_rank(rank: Rank, nesting: Nesting) {
    with_held(|held| {
        if let Some(&highest) = held.iter().max() {
            let fits = match nesting {
                Nesting::Strict => rank > highest,
                Nesting::SameRank => rank >= highest,
            };
            assert!(
                fits || prim::thread::panicking(),
                "lock of rank {rank:?} taken under {held:?}"
            );
        }
        held.push(rank);
    });
}

#[cfg(debug_assertions)]
fn pop_rank(rank: Rank) {
    with_held(|held| {
        if let Some(index) = held.iter().rposition(|&other| other == rank) {
            held.remove(index);
        }
    });
}

/// Runs `f` with the ranks that the thread holds; not in a model, while one of its threads ends.
#[cfg(debug_assertions)]
#[track_caller]
fn with_held(f: impl FnOnce(&mut Vec<Rank>)) {
    let gone = HELD.try_with(|held| f(&mut held.borrow_mut()));
    debug_assert!(gone.is_ok() || cfg!(shuttle));
}

#[cfg(not(debug_assertions))]
#[inline]
fn push_rank(_: Rank, _: Nesting) {}

#[cfg(not(debug_assertions))]
#[inline]
fn pop_rank(_: Rank) {}

/// Panics in debug builds where the thread holds a lock under which no bio may be awaited, or is
/// inside a submission.
#[inline]
#[track_caller]
pub fn assert_may_wait() {
    #[cfg(debug_assertions)]
    {
        with_held(|held| {
            let bad = held.iter().find(|rank| !rank.may_wait());
            assert!(
                bad.is_none() || prim::thread::panicking(),
                "waits under {held:?}"
            );
        });
        assert!(!crate::submit::in_submission(), "waits inside a submission");
        assert_not_completing();
    }
}

/// Panics in debug builds where the thread completes bios, so that waiting for one could wait for
/// itself.
#[inline]
#[track_caller]
pub fn assert_not_completing() {
    debug_assert!(
        !in_completion_thread() || prim::thread::panicking(),
        "waits in a thread that completes bios"
    );
}

thread_local! {
    static COMPLETES: Cell<bool> = const { Cell::new(false) };
}

/// Marks the calling thread as one that completes bios: nothing may be awaited there.
pub fn mark_completion_thread() {
    COMPLETES.with(|mark| mark.set(true));
}

/// Whether the calling thread completes bios (`DESIGN` 8, `end_io`).
#[must_use]
pub fn in_completion_thread() -> bool {
    COMPLETES.try_with(Cell::get).unwrap_or(false)
}

/// Hears of the waits of one thread.
pub trait WaitHook {
    /// The thread is about to wait.
    fn begin(&self);
    /// The thread goes on.
    fn end(&self);
}

thread_local! {
    static HOOK: RefCell<Option<Rc<dyn WaitHook>>> = const { RefCell::new(None) };
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// Installs (or removes) the hook of the calling thread.
pub fn set_wait_hook(hook: Option<Rc<dyn WaitHook>>) {
    HOOK.with_borrow_mut(|slot| *slot = hook);
}

struct HookEnd(Option<Rc<dyn WaitHook>>);

impl Drop for HookEnd {
    fn drop(&mut self) {
        DEPTH.with(|depth| depth.set(depth.get() - 1));
        if let Some(hook) = self.0.take() {
            hook.end();
        }
    }
}

/// Runs `wait`, which may sleep, and tells the thread's hook before and after. What the thread
/// holds back in a [`Plug`](crate::Plug) is sent first.
pub fn blocking<R>(wait: impl FnOnce() -> R) -> R {
    crate::plug::kick();
    let outermost = DEPTH.with(|depth| {
        depth.set(depth.get() + 1);
        depth.get() == 1
    });
    let hook = if outermost {
        HOOK.try_with(|hook| hook.borrow().clone()).unwrap_or(None)
    } else {
        None
    };
    if let Some(hook) = &hook {
        hook.begin();
    }
    let _end = HookEnd(hook);
    wait()
}

/// A mutual exclusion lock with a rank.
pub struct Mutex<T: ?Sized> {
    rank: Rank,
    inner: prim::Mutex<T>,
}

/// Holds a [`Mutex`].
pub struct MutexGuard<'a, T: ?Sized> {
    rank: Rank,
    inner: prim::MutexGuard<'a, T>,
}

impl<T> Mutex<T> {
    /// Makes a lock of `rank`.
    pub const fn new(rank: Rank, value: T) -> Self {
        Self {
            rank,
            inner: prim::Mutex::new(value),
        }
    }

    /// The value, of a lock nobody shares any more.
    pub fn into_inner(self) -> T {
        self.inner.into_inner()
    }
}

impl<T: ?Sized> Mutex<T> {
    /// Takes the lock, waiting for it.
    ///
    /// # Panics
    /// In debug builds, where the thread holds a lock of the same or a higher rank.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.lock_as(Nesting::Strict)
    }

    /// Takes the lock while another of the same rank may be held; the caller keeps an order.
    ///
    /// # Panics
    /// In debug builds, where the thread holds a lock of a higher rank.
    pub fn lock_nested(&self) -> MutexGuard<'_, T> {
        self.lock_as(Nesting::SameRank)
    }

    fn lock_as(&self, nesting: Nesting) -> MutexGuard<'_, T> {
        push_rank(self.rank, nesting);
        let inner = match self.inner.try_lock() {
            Some(guard) => guard,
            None if self.rank.may_wait() => blocking(|| self.inner.lock()),
            None => self.inner.lock(),
        };
        MutexGuard {
            rank: self.rank,
            inner,
        }
    }

    /// Takes the lock if it is free.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        let inner = self.inner.try_lock()?;
        push_rank(self.rank, Nesting::SameRank);
        Some(MutexGuard {
            rank: self.rank,
            inner,
        })
    }

    /// The value, through a unique reference.
    pub fn get_mut(&mut self) -> &mut T {
        self.inner.get_mut()
    }
}

impl<T: ?Sized> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T: ?Sized> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

impl<T: ?Sized> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        pop_rank(self.rank);
    }
}

impl<T: ?Sized> fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mutex")
            .field("rank", &self.rank)
            .finish_non_exhaustive()
    }
}

/// A readers-writer lock with a rank.
pub struct RwLock<T: ?Sized> {
    rank: Rank,
    inner: prim::RwLock<T>,
}

/// Holds an [`RwLock`] for reading.
pub struct RwLockReadGuard<'a, T: ?Sized> {
    rank: Rank,
    inner: prim::RwLockReadGuard<'a, T>,
}

/// Holds an [`RwLock`] for writing.
pub struct RwLockWriteGuard<'a, T: ?Sized> {
    rank: Rank,
    inner: prim::RwLockWriteGuard<'a, T>,
}

impl<T> RwLock<T> {
    /// Makes a lock of `rank`.
    pub const fn new(rank: Rank, value: T) -> Self {
        Self {
            rank,
            inner: prim::RwLock::new(value),
        }
    }

    /// The value, of a lock nobody shares any more.
    pub fn into_inner(self) -> T {
        self.inner.into_inner()
    }
}

impl<T: ?Sized> RwLock<T> {
    /// Takes the lock for reading.
    ///
    /// # Panics
    /// In debug builds, where the thread holds a lock of the same or a higher rank.
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        self.read_as(Nesting::Strict)
    }

    /// Takes the lock for reading while another of the same rank may be held.
    ///
    /// # Panics
    /// In debug builds, where the thread holds a lock of a higher rank.
    pub fn read_nested(&self) -> RwLockReadGuard<'_, T> {
        self.read_as(Nesting::SameRank)
    }

    fn read_as(&self, nesting: Nesting) -> RwLockReadGuard<'_, T> {
        push_rank(self.rank, nesting);
        let inner = match self.inner.try_read() {
            Some(guard) => guard,
            None if self.rank.may_wait() => blocking(|| self.inner.read()),
            None => self.inner.read(),
        };
        RwLockReadGuard {
            rank: self.rank,
            inner,
        }
    }

    /// Takes the lock for writing.
    ///
    /// # Panics
    /// In debug builds, where the thread holds a lock of the same or a higher rank.
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        self.write_as(Nesting::Strict)
    }

    /// Takes the lock for writing while another of the same rank may be held; the caller keeps an
    /// order among them.
    ///
    /// # Panics
    /// In debug builds, where the thread holds a lock of a higher rank.
    pub fn write_nested(&self) -> RwLockWriteGuard<'_, T> {
        self.write_as(Nesting::SameRank)
    }

    fn write_as(&self, nesting: Nesting) -> RwLockWriteGuard<'_, T> {
        push_rank(self.rank, nesting);
        let inner = match self.inner.try_write() {
            Some(guard) => guard,
            None if self.rank.may_wait() => blocking(|| self.inner.write()),
            None => self.inner.write(),
        };
        RwLockWriteGuard {
            rank: self.rank,
            inner,
        }
    }

    /// Takes the lock for reading if no writer has it.
    pub fn try_read(&self) -> Option<RwLockReadGuard<'_, T>> {
        let inner = self.inner.try_read()?;
        push_rank(self.rank, Nesting::SameRank);
        Some(RwLockReadGuard {
            rank: self.rank,
            inner,
        })
    }

    /// Takes the lock for writing if it is free.
    pub fn try_write(&self) -> Option<RwLockWriteGuard<'_, T>> {
        let inner = self.inner.try_write()?;
        push_rank(self.rank, Nesting::SameRank);
        Some(RwLockWriteGuard {
            rank: self.rank,
            inner,
        })
    }

    /// The value, through a unique reference.
    pub fn get_mut(&mut self) -> &mut T {
        self.inner.get_mut()
    }
}

impl<T: ?Sized> Deref for RwLockReadGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T: ?Sized> Drop for RwLockReadGuard<'_, T> {
    fn drop(&mut self) {
        pop_rank(self.rank);
    }
}

impl<T: ?Sized> Deref for RwLockWriteGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T: ?Sized> DerefMut for RwLockWriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

impl<T: ?Sized> Drop for RwLockWriteGuard<'_, T> {
    fn drop(&mut self) {
        pop_rank(self.rank);
    }
}

impl<T: ?Sized> fmt::Debug for RwLock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RwLock")
            .field("rank", &self.rank)
            .finish_non_exhaustive()
    }
}

/// A condition variable for [`Mutex`]; every wait goes through [`blocking`].
#[derive(Debug, Default)]
pub struct Condvar(prim::Condvar);

impl Condvar {
    /// Makes a condition variable.
    #[must_use]
    pub const fn new() -> Self {
        Self(prim::Condvar::new())
    }

    /// Wakes one waiter.
    pub fn notify_one(&self) {
        self.0.notify_one();
    }

    /// Wakes all waiters.
    pub fn notify_all(&self) {
        self.0.notify_all();
    }

    /// Gives the lock up, sleeps until woken, and takes it again.
    pub fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        blocking(|| self.0.wait(&mut guard.inner));
    }

    /// As [`Self::wait`], but without telling the thread's hook: for the hook's own use.
    pub fn wait_quietly<T>(&self, guard: &mut MutexGuard<'_, T>) {
        self.0.wait(&mut guard.inner);
    }

    /// As [`Self::wait_quietly`], at most for `timeout`; `false` where the time ran out.
    pub fn wait_quietly_for<T>(&self, guard: &mut MutexGuard<'_, T>, timeout: Duration) -> bool {
        !self.0.wait_for(&mut guard.inner, timeout).timed_out()
    }

    /// As [`Self::wait`], at most for `timeout`; `false` where the time ran out.
    pub fn wait_for<T>(&self, guard: &mut MutexGuard<'_, T>, timeout: Duration) -> bool {
        blocking(|| !self.0.wait_for(&mut guard.inner, timeout).timed_out())
    }

    /// As [`Self::wait`], at most until `deadline`; `false` where the time ran out.
    pub fn wait_until<T>(&self, guard: &mut MutexGuard<'_, T>, deadline: Instant) -> bool {
        blocking(|| !self.0.wait_until(&mut guard.inner, deadline).timed_out())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;
    use std::sync::Arc;

    use super::{Condvar, Mutex, Rank, RwLock, WaitHook, blocking, set_wait_hook};

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "lock of rank Inode taken under")]
    fn inversion_panics() {
        let outer = Mutex::new(Rank::Inode, ());
        let inner = Mutex::new(Rank::Pool, ());
        let _inner = inner.lock();
        let _outer = outer.lock();
    }

    #[test]
    fn order_is_accepted_and_forgotten_on_release() {
        let outer = RwLock::new(Rank::Inode, 1);
        let inner = Mutex::new(Rank::Pool, 2);
        {
            let a = outer.read();
            let b = inner.lock();
            assert_eq!(*a + *b, 3);
        }
        drop(inner.lock());
        assert_eq!(*outer.write(), 1);
    }

    struct Count(Rc<Cell<(u32, u32)>>);

    impl WaitHook for Count {
        fn begin(&self) {
            let (begun, ended) = self.0.get();
            self.0.set((begun + 1, ended));
        }
        fn end(&self) {
            let (begun, ended) = self.0.get();
            self.0.set((begun, ended + 1));
        }
    }

    #[test]
    fn hook_hears_outermost_waits_only() {
        let count = Rc::new(Cell::new((0, 0)));
        set_wait_hook(Some(Rc::new(Count(count.clone()))));
        drop(Mutex::new(Rank::Pool, ()).lock());
        assert_eq!(count.get(), (0, 0));
        blocking(|| blocking(|| ()));
        assert_eq!(count.get(), (1, 1));
        set_wait_hook(None);
    }

    #[test]
    fn condvar_wakes() {
        let pair = Arc::new((Mutex::new(Rank::Queue, false), Condvar::new()));
        let other = pair.clone();
        let thread = std::thread::spawn(move || {
            *other.0.lock() = true;
            other.1.notify_all();
        });
        let mut done = pair.0.lock();
        while !*done {
            pair.1.wait(&mut done);
        }
        drop(done);
        thread.join().unwrap();
    }
}
