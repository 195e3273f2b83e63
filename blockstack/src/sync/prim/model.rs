//! The primitives of the model checker, in the shape of the real ones.
//!
//! Orderings of atomics are all taken as sequentially consistent: the model finds wrong orders of
//! steps, not missing barriers.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use shuttle::sync::TryLockError;

pub use crate::__model_thread_local as thread_local;
pub use shuttle::sync::atomic;
pub use shuttle::thread;

/// A static value made on first use, anew in each run of a model.
#[derive(Debug)]
pub struct Global<T: Sync + 'static>(shuttle::lazy_static::Lazy<T>);

impl<T: Sync> Global<T> {
    /// A value that `make` makes.
    pub const fn new(make: fn() -> T) -> Self {
        Self(shuttle::lazy_static::Lazy::new(make))
    }

    /// The value.
    pub fn get(&'static self) -> &'static T {
        self.0.get()
    }
}

/// Runs `what`; a panic is what a model looks for, and goes on.
pub fn survive(what: impl FnOnce()) -> bool {
    what();
    true
}

/// A value for each thread.
#[derive(Debug)]
pub struct LocalKey<T: 'static>(shuttle::thread::LocalKey<T>);

impl<T> LocalKey<T> {
    #[doc(hidden)]
    pub const fn new(init: fn() -> T) -> Self {
        Self(shuttle::thread::LocalKey {
            init,
            _p: std::marker::PhantomData,
        })
    }

    /// As of the real one.
    pub fn with<R>(&'static self, f: impl FnOnce(&T) -> R) -> R {
        self.0.with(f)
    }

    /// As of the real one.
    ///
    /// # Errors
    /// Where the thread's value is gone.
    pub fn try_with<R>(
        &'static self,
        f: impl FnOnce(&T) -> R,
    ) -> Result<R, shuttle::thread::AccessError> {
        self.0.try_with(f)
    }
}

impl<T> LocalKey<RefCell<T>> {
    /// As of the real one.
    pub fn with_borrow<R>(&'static self, f: impl FnOnce(&T) -> R) -> R {
        self.with(|cell| f(&cell.borrow()))
    }

    /// As of the real one.
    pub fn with_borrow_mut<R>(&'static self, f: impl FnOnce(&mut T) -> R) -> R {
        self.with(|cell| f(&mut cell.borrow_mut()))
    }
}

impl<T> LocalKey<Cell<T>> {
    /// As of the real one.
    pub fn get(&'static self) -> T
    where
        T: Copy,
    {
        self.with(Cell::get)
    }

    /// As of the real one.
    pub fn set(&'static self, value: T) {
        self.with(|cell| cell.set(value));
    }

    /// As of the real one.
    pub fn take(&'static self) -> T
    where
        T: Default,
    {
        self.with(Cell::take)
    }
}

#[doc(hidden)]
#[macro_export]
macro_rules! __model_thread_local {
    () => {};
    ($(#[$attr:meta])* $vis:vis static $name:ident: $t:ty = const $init:block; $($rest:tt)*) => {
        $(#[$attr])* $vis static $name: $crate::sync::prim::LocalKey<$t> =
            $crate::sync::prim::LocalKey::new(|| $init);
        $crate::__model_thread_local!($($rest)*);
    };
    ($(#[$attr:meta])* $vis:vis static $name:ident: $t:ty = $init:expr; $($rest:tt)*) => {
        $(#[$attr])* $vis static $name: $crate::sync::prim::LocalKey<$t> =
            $crate::sync::prim::LocalKey::new(|| $init);
        $crate::__model_thread_local!($($rest)*);
    };
}

/// As of `parking_lot`.
pub struct Mutex<T: ?Sized>(shuttle::sync::Mutex<T>);

/// Holds a [`Mutex`].
pub struct MutexGuard<'a, T: ?Sized> {
    lock: &'a shuttle::sync::Mutex<T>,
    /// `None` only inside a wait.
    held: Option<shuttle::sync::MutexGuard<'a, T>>,
}

impl<'a, T: ?Sized> MutexGuard<'a, T> {
    fn new(lock: &'a shuttle::sync::Mutex<T>, held: shuttle::sync::MutexGuard<'a, T>) -> Self {
        let held = Some(held);
        Self { lock, held }
    }
}

impl<T> Mutex<T> {
    /// Makes a lock.
    pub const fn new(value: T) -> Self {
        Self(shuttle::sync::Mutex::new(value))
    }

    /// The value.
    pub fn into_inner(self) -> T {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: ?Sized> Mutex<T> {
    /// Takes the lock, waiting for it.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        MutexGuard::new(&self.0, held)
    }

    /// Takes the lock if it is free.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        try_taken(self.0.try_lock()).map(|held| MutexGuard::new(&self.0, held))
    }

    /// The value, through a unique reference.
    pub fn get_mut(&mut self) -> &mut T {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner)
    }
}

fn try_taken<G>(taken: Result<G, TryLockError<G>>) -> Option<G> {
    match taken {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

impl<T: ?Sized> Deref for MutexGuard<'_, T> {
    type Target = T;
    #[expect(clippy::expect_used, reason = "empty only inside a wait")]
    fn deref(&self) -> &T {
        self.held.as_ref().expect("a guard holds its lock")
    }
}

impl<T: ?Sized> DerefMut for MutexGuard<'_, T> {
    #[expect(clippy::expect_used, reason = "empty only inside a wait")]
    fn deref_mut(&mut self) -> &mut T {
        self.held.as_mut().expect("a guard holds its lock")
    }
}

/// As of `parking_lot`.
pub struct RwLock<T: ?Sized>(shuttle::sync::RwLock<T>);

/// Holds an [`RwLock`] for reading.
pub type RwLockReadGuard<'a, T> = shuttle::sync::RwLockReadGuard<'a, T>;

/// Holds an [`RwLock`] for writing.
pub type RwLockWriteGuard<'a, T> = shuttle::sync::RwLockWriteGuard<'a, T>;

impl<T> RwLock<T> {
    /// Makes a lock.
    pub const fn new(value: T) -> Self {
        Self(shuttle::sync::RwLock::new(value))
    }

    /// The value.
    pub fn into_inner(self) -> T {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: ?Sized> RwLock<T> {
    /// Takes the lock for reading.
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the lock for writing.
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the lock for reading if no writer has it.
    pub fn try_read(&self) -> Option<RwLockReadGuard<'_, T>> {
        try_taken(self.0.try_read())
    }

    /// Takes the lock for writing if it is free.
    pub fn try_write(&self) -> Option<RwLockWriteGuard<'_, T>> {
        try_taken(self.0.try_write())
    }

    /// The value, through a unique reference.
    pub fn get_mut(&mut self) -> &mut T {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner)
    }
}

/// As of `parking_lot`.
#[derive(Debug)]
pub struct Condvar(shuttle::sync::Condvar);

/// Whether a wait ended because its time was over.
#[derive(Clone, Copy, Debug)]
pub struct WaitTimeoutResult(());

impl WaitTimeoutResult {
    /// Always: see [`Condvar::wait_for`].
    #[must_use]
    pub fn timed_out(&self) -> bool {
        true
    }
}

impl Condvar {
    /// Makes a condition variable.
    #[must_use]
    pub const fn new() -> Self {
        Self(shuttle::sync::Condvar::new())
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
        if let Some(held) = guard.held.take() {
            let held = self.0.wait(held).unwrap_or_else(PoisonError::into_inner);
            guard.held = Some(held);
        }
    }

    /// Gives the lock up, lets others run, and takes it again: the time is always over first. So no
    /// model can rest on a wake-up that comes in time, nor is a time-out that would have come taken
    /// for a deadlock. The caller must look at its condition again, as after any wait, and a loop
    /// that only the clock ends is none for a model.
    pub fn wait_for<T>(&self, guard: &mut MutexGuard<'_, T>, _: Duration) -> WaitTimeoutResult {
        guard.held = None;
        thread::yield_now();
        guard.held = Some(guard.lock.lock().unwrap_or_else(PoisonError::into_inner));
        WaitTimeoutResult(())
    }

    /// As [`Self::wait_for`].
    pub fn wait_until<T>(&self, guard: &mut MutexGuard<'_, T>, _: Instant) -> WaitTimeoutResult {
        self.wait_for(guard, Duration::ZERO)
    }
}

impl Default for Condvar {
    fn default() -> Self {
        Self::new()
    }
}

/// As of the standard library.
pub struct OnceLock<T> {
    value: std::sync::OnceLock<T>,
    ready: atomic::AtomicBool,
    making: shuttle::sync::Mutex<()>,
}

impl<T> OnceLock<T> {
    /// No value yet.
    pub const fn new() -> Self {
        Self {
            value: std::sync::OnceLock::new(),
            ready: atomic::AtomicBool::new(false),
            making: shuttle::sync::Mutex::new(()),
        }
    }

    /// The value, if there is one.
    pub fn get(&self) -> Option<&T> {
        if self.ready.load(atomic::Ordering::Acquire) {
            self.value.get()
        } else {
            None
        }
    }

    /// The value, made by `make` where there was none; others wait meanwhile.
    pub fn get_or_init(&self, make: impl FnOnce() -> T) -> &T {
        let _making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        let value = match self.value.get() {
            Some(value) => value,
            None => {
                let made = make();
                self.value.get_or_init(|| made)
            }
        };
        self.ready.store(true, atomic::Ordering::Release);
        value
    }
}

impl<T> Default for OnceLock<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> fmt::Debug for OnceLock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnceLock").finish_non_exhaustive()
    }
}

/// A place for a value that is exchanged; in the model, under a lock.
pub struct Exchange<T>(Mutex<Option<T>>);

impl<T> Exchange<T> {
    /// Puts `value` there, and gives what was there.
    pub fn swap(&self, value: Option<T>) -> Option<T> {
        std::mem::replace(&mut *self.0.lock(), value)
    }

    /// Takes what is there.
    pub fn take(&self) -> Option<T> {
        self.swap(None)
    }
}

impl<T> Default for Exchange<T> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<T> std::fmt::Debug for Exchange<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Exchange").finish_non_exhaustive()
    }
}
