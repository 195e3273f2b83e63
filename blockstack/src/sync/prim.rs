//! What the locks of this crate are made of, chosen in one place.
//!
//! Builds with `--cfg shuttle` put the primitives of `shuttle` in the place of the system's, so that
//! a model checker decides which thread runs next; `tests/shuttle.rs` holds the models. All other
//! builds get the real ones by another name, at no cost. A file that takes part in a model imports
//! atomics, threads, and what is local to a thread from here, never from `std`.
//!
//! Outside the model stay, with the system's primitives: the backends that make system calls, which
//! a model must not use; [`sched`](crate::sched), but for the start of a thread; and the counters of
//! a device, which decide nothing, and each of which would be one more point to branch at.

#[cfg(shuttle)]
mod model;
#[cfg(not(shuttle))]
mod real;

#[cfg(shuttle)]
pub use model::{
    Condvar, Exchange, Global, LocalKey, Mutex, MutexGuard, OnceLock, RwLock, RwLockReadGuard,
    RwLockWriteGuard, atomic, survive, thread, thread_local,
};
#[cfg(not(shuttle))]
pub use real::{
    Condvar, Exchange, Global, Mutex, MutexGuard, OnceLock, RwLock, RwLockReadGuard,
    RwLockWriteGuard, atomic, survive, thread, thread_local,
};
