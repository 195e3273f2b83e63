//! Revoked blocks: metadata blocks that were freed, so that older copies of them in the log must
//! not be replayed over what stands there now.
//!
//! A revoke of transaction T covers copies of T and older. A block that is metadata again in T
//! after it was revoked in T takes the revoke back ([`RevokeTable::cancel`]), or its new copy would
//! not be replayed either; one that becomes metadata again in a later transaction needs nothing.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};

use blockstack::sync::{Mutex, Rank};

use crate::format::jbd2::{Tid, tid_gt};

/// The blocks one transaction revokes.
#[derive(Debug)]
pub(super) struct RevokeTable {
    /// Lets the common case, no revokes at all, do without the lock.
    count: AtomicUsize,
    blocks: Mutex<HashSet<u64>>,
}

impl RevokeTable {
    pub(super) fn new() -> Self {
        Self {
            count: AtomicUsize::new(0),
            blocks: Mutex::new(Rank::Counters, HashSet::new()),
        }
    }

    /// Revokes `block`; gives the number of blocks revoked, or `None` where it was already.
    pub(super) fn insert(&self, block: u64) -> Option<usize> {
        let mut blocks = self.blocks.lock_nested();
        if !blocks.insert(block) {
            return None;
        }
        self.count.store(blocks.len(), Ordering::Release);
        Some(blocks.len())
    }

    /// Takes the revoke of `block` back; `false` where there was none.
    pub(super) fn cancel(&self, block: u64) -> bool {
        if self.count.load(Ordering::Acquire) == 0 {
            return false;
        }
        let mut blocks = self.blocks.lock_nested();
        let found = blocks.remove(&block);
        self.count.store(blocks.len(), Ordering::Release);
        found
    }

    /// Empties the table, in ascending order.
    pub(super) fn take_sorted(&self) -> Vec<u64> {
        let mut blocks: Vec<u64> = std::mem::take(&mut *self.blocks.lock_nested())
            .into_iter()
            .collect();
        self.count.store(0, Ordering::Release);
        blocks.sort_unstable();
        blocks
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }
}

/// The revokes found in a log.
#[derive(Debug, Default)]
pub(super) struct FoundRevokes(HashMap<u64, Tid>);

impl FoundRevokes {
    /// Notes that transaction `tid` revokes `block`; the youngest counts.
    pub(super) fn insert(&mut self, block: u64, tid: Tid) {
        let youngest = self.0.entry(block).or_insert(tid);
        if tid_gt(tid, *youngest) {
            *youngest = tid;
        }
    }

    /// Whether the copy of `block` in transaction `tid` must not be replayed.
    pub(super) fn covers(&self, block: u64, tid: Tid) -> bool {
        self.0
            .get(&block)
            .is_some_and(|&revoked| !tid_gt(tid, revoked))
    }
}

#[cfg(test)]
mod tests {
    use super::{FoundRevokes, RevokeTable};

    #[test]
    fn a_revoke_covers_its_own_transaction_and_older_ones() {
        let mut found = FoundRevokes::default();
        found.insert(10, 5);
        found.insert(10, 7);
        found.insert(10, 6);
        assert!(found.covers(10, 7) && found.covers(10, 3));
        assert!(!found.covers(10, 8) && !found.covers(11, 1));
    }

    #[test]
    fn a_cancelled_revoke_is_gone() {
        let table = RevokeTable::new();
        assert!(!table.cancel(1));
        assert_eq!(table.insert(3), Some(1));
        assert_eq!(table.insert(2), Some(2));
        assert_eq!(table.insert(2), None);
        assert!(table.cancel(3));
        assert_eq!(table.len(), 1);
        assert_eq!(table.take_sorted(), [2]);
        assert_eq!(table.len(), 0);
    }
}
