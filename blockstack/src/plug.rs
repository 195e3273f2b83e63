//! Bios that go to the system together.
//!
//! While a thread holds a [`Plug`], backends that batch only queue what the thread submits; when
//! the outermost plug is dropped, or the thread is about to wait, everything queued is sent with
//! one system call for each device.

use std::cell::{Cell, RefCell};
use std::marker::PhantomData;
use std::sync::Arc;

use crate::sync::prim::thread_local;

/// A backend that can hold back what was queued.
pub(crate) trait Kick: Send + Sync {
    /// Sends what is queued.
    fn kick(&self);
}

thread_local! {
    static DEPTH: Cell<u32> = const { Cell::new(0) };
    static HELD: RefCell<Vec<Arc<dyn Kick>>> = const { RefCell::new(Vec::new()) };
}

/// Holds the thread's bios back; see the module's documentation.
#[derive(Debug)]
#[must_use = "a plug works until it is dropped"]
pub struct Plug {
    /// A plug belongs to its thread.
    not_send: PhantomData<*const ()>,
}

impl Plug {
    /// Begins to hold back.
    pub fn new() -> Self {
        DEPTH.with(|depth| depth.set(depth.get() + 1));
        Self {
            not_send: PhantomData,
        }
    }
}

impl Default for Plug {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Plug {
    fn drop(&mut self) {
        let depth = DEPTH.with(|depth| {
            depth.set(depth.get() - 1);
            depth.get()
        });
        if depth == 0 {
            kick();
        }
    }
}

/// Whether the thread holds back; if so, `engine` is kicked later.
pub(crate) fn hold<K: Kick + 'static>(engine: &Arc<K>) -> bool {
    if DEPTH.with(Cell::get) == 0 {
        return false;
    }
    HELD.with_borrow_mut(|held| {
        let known = held
            .iter()
            .any(|other| std::ptr::addr_eq(Arc::as_ptr(other), Arc::as_ptr(engine)));
        if !known {
            held.push(engine.clone());
        }
    });
    true
}

/// Sends what the thread held back.
pub(crate) fn kick() {
    // One at a time, and without the borrow: a kick may complete bios, whose owners submit more.
    while let Ok(Some(engine)) = HELD.try_with(|held| held.borrow_mut().pop()) {
        engine.kick();
    }
}
