//! What the tests of this package share between threads without a lock.

use std::cell::UnsafeCell;

/// A word that any thread may change; who does so without an order races.
#[derive(Default)]
pub struct Word(UnsafeCell<u64>);

// SAFETY: none. The tests call for an order from outside, or want the race.
unsafe impl Sync for Word {}

impl Word {
    /// Adds one.
    #[inline(never)]
    pub fn add_one(&self) {
        // SAFETY: as above.
        unsafe { *self.0.get() += 1 };
    }
}
