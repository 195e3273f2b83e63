//! Which clean buffer goes when the cache is full: second chance.
//!
//! A hit only sets a flag in its buffer. The rings name buffers by block and id and hold nothing
//! alive; an entry whose buffer is gone is dropped when the hand comes by.

use std::collections::VecDeque;
use std::sync::Arc;

use blockstack::sync::prim::atomic::{AtomicUsize, Ordering};
use blockstack::sync::{Mutex, Rank};

use crate::buffer::Inner;
use crate::cache::Cache;
use crate::state::Phase;

const RINGS: usize = if cfg!(shuttle) { 2 } else { 16 };
/// Entries the hand passes for one insertion, at most.
const STEPS: usize = 16;

pub(crate) struct Rings {
    rings: [Mutex<VecDeque<(u64, u64)>>; RINGS],
    hand: AtomicUsize,
}

impl Rings {
    pub(crate) fn new() -> Self {
        Self {
            rings: std::array::from_fn(|_| Mutex::new(Rank::Pool, VecDeque::new())),
            hand: AtomicUsize::new(0),
        }
    }
}

enum Verdict {
    Evicted,
    /// Another round.
    Keep,
    /// The entry names no buffer any more.
    Stale,
}

impl Cache {
    /// Enters a new buffer and, over the limit, evicts a little.
    pub(crate) fn enlist(&self, inner: &Inner) {
        let mut ring = self.rings.rings[inner.block as usize % RINGS].lock_nested();
        ring.push_back((inner.block, inner.id));
        // Forgotten buffers leave entries behind; a ring is swept when most may be such.
        let stale = (ring.len() > 64 && ring.len() * RINGS > 4 * self.count() + 64 * RINGS)
            .then(|| std::mem::take(&mut *ring));
        drop(ring);
        if let Some(entries) = stale {
            let live: Vec<_> = entries
                .into_iter()
                .filter(|&(block, id)| self.map.get(block).is_some_and(|inner| inner.id == id))
                .collect();
            let mut ring = self.rings.rings[inner.block as usize % RINGS].lock_nested();
            live.into_iter()
                .rev()
                .for_each(|entry| ring.push_front(entry));
        }
        let over = self.count().saturating_sub(self.limit());
        if over > 0 {
            self.evict(over.min(2), STEPS);
        }
    }

    /// Evicts up to `wanted` buffers, looking at `steps`; gives back how many.
    pub(crate) fn evict(&self, wanted: usize, steps: usize) -> usize {
        let mut evicted = 0;
        let mut empty = 0;
        let mut looked = 0;
        while looked < steps && evicted < wanted && empty < RINGS {
            let at = self.rings.hand.fetch_add(1, Ordering::Relaxed) % RINGS;
            let Some((block, id)) = self.rings.rings[at].lock_nested().pop_front() else {
                empty += 1;
                continue;
            };
            empty = 0;
            looked += 1;
            evicted += usize::from(self.pass(at, block, id));
        }
        evicted
    }

    /// Evicts what the entry names, or puts it back for another round.
    fn pass(&self, at: usize, block: u64, id: u64) -> bool {
        let verdict = self.judge(block, id);
        if let Verdict::Keep = verdict {
            self.rings.rings[at].lock_nested().push_back((block, id));
        }
        matches!(verdict, Verdict::Evicted)
    }

    fn judge(&self, block: u64, id: u64) -> Verdict {
        let mut verdict = Verdict::Stale;
        let evicted = self.map.remove_if(block, |inner| {
            if inner.id != id {
                return false;
            }
            verdict = Verdict::Keep;
            if inner.referenced.swap(false, Ordering::Relaxed) || inner.is_pinned() {
                return false;
            }
            // The map's lock is held and no other reference exists: nobody holds the buffer, and
            // nobody can come to hold it. `Dirty` and `Writing` are referenced by their sets.
            Arc::get_mut(inner)
                .is_some_and(|inner| matches!(inner.phase(), Phase::Clean | Phase::Fetched))
        });
        if let Some(inner) = evicted {
            self.buffers.fetch_sub(1, Ordering::Relaxed);
            drop(inner);
            return Verdict::Evicted;
        }
        verdict
    }

    /// Evicts what can be until at most `target` buffers are left.
    pub(crate) fn evict_to(&self, target: usize) {
        // Twice: the first round takes the second chances away.
        for at in (0..RINGS).chain(0..RINGS) {
            let entries = self.rings.rings[at].lock_nested().len();
            for _ in 0..entries {
                if self.count() <= target {
                    return;
                }
                let Some((block, id)) = self.rings.rings[at].lock_nested().pop_front() else {
                    break;
                };
                self.pass(at, block, id);
            }
        }
    }
}
