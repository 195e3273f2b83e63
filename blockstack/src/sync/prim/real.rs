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
