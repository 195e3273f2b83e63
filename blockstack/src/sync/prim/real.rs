//! The system's primitives.

use std::sync::LazyLock;

pub use parking_lot::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
pub use std::sync::{OnceLock, atomic};
pub use std::{thread, thread_local};

/// A static value made on first use.
#[derive(Debug)]
pub struct Global<T: 'static>(LazyLock<T>);

impl<T> Global<T> {
    /// A value that `make` makes.
    pub const fn new(make: fn() -> T) -> Self {
        Self(LazyLock::new(make))
    }

    /// The value.
    pub fn get(&'static self) -> &'static T {
        &self.0
    }
}

/// A place for a value that is exchanged by one atomic operation, where it is a word; exchanges of
/// one place synchronise with each other.
pub struct Exchange<T>(crossbeam_utils::atomic::AtomicCell<Option<T>>);

impl<T> Exchange<T> {
    /// Puts `value` there, and gives what was there.
    #[inline]
    pub fn swap(&self, value: Option<T>) -> Option<T> {
        self.0.swap(value)
    }

    /// Takes what is there.
    #[inline]
    pub fn take(&self) -> Option<T> {
        self.swap(None)
    }
}

impl<T> Default for Exchange<T> {
    fn default() -> Self {
        Self(crossbeam_utils::atomic::AtomicCell::new(None))
    }
}

/// Runs `what` and says whether it came to its end: a panic costs only what panicked.
pub fn survive(what: impl FnOnce()) -> bool {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(what)).is_ok()
}

impl<T> std::fmt::Debug for Exchange<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Exchange").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use crossbeam_utils::atomic::AtomicCell;

    /// Else an exchange would take a lock that all cells of the process share.
    #[test]
    fn a_box_is_exchanged_without_a_lock() {
        assert!(AtomicCell::<Option<Box<u64>>>::is_lock_free());
    }
}
