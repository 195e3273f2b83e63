//! A count of hits on whose account no two threads meet.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

const STRIPES: usize = 64;

#[repr(align(128))]
#[derive(Default)]
struct Stripe(AtomicU64);

/// Each of the first threads of the process has a stripe of its own, all later ones share the last.
pub(crate) struct Hits(Box<[Stripe]>);

thread_local! {
    static STRIPE: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// Not part of a model: it decides nothing.
static NEXT: AtomicUsize = AtomicUsize::new(0);

fn stripe() -> usize {
    let known = STRIPE.get();
    if known != usize::MAX {
        return known;
    }
    let mine = NEXT.fetch_add(1, Ordering::Relaxed).min(STRIPES - 1);
    STRIPE.set(mine);
    mine
}

impl Hits {
    pub(crate) fn new() -> Self {
        Self((0..STRIPES).map(|_| Stripe::default()).collect())
    }

    #[inline]
    pub(crate) fn add(&self) {
        let at = stripe();
        let count = &self.0[at].0;
        if at < STRIPES - 1 {
            // The only one who writes it: no need to lock the line.
            count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        } else {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn sum(&self) -> u64 {
        let counts = self.0.iter().map(|stripe| stripe.0.load(Ordering::Relaxed));
        counts.sum()
    }
}
