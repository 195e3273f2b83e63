//! The state of a buffer, and the sets of dirty and written buffers that mirror it.
//!
//! ```text
//!            bio ends           a reader checks
//!  Reading ------------> Fetched ------------> Checking --> Clean
//!     |                                            |         ^ |
//!     +----> Failed <------------------------------+         | | mark_dirty
//!                                                            | v
//!            +---------------- Writing <-- claimed, copied -- Dirty
//!            | written           | mark_dirty                  ^
//!            v                   v                             |
//!          Clean             Redirtied ---- written or failed -+   (a failed Writing too)
//!
//!  forget: Writing, Redirtied --> Doomed --> Gone;  any other phase --> Gone
//!  new_zeroed: Doomed --> Writing (the old content is still on its way down), if nobody holds it
//!  release_move of a shared buffer: Reading --> Doomed, without content, while its copy is written
//! ```
//!
//! # Invariants
//!
//! 1. A phase changes only in [`Sets::enter`], that is under the lock of the buffer's shard; it is
//!    read anywhere.
//! 2. `Sets::dirty` holds the buffers in phase `Dirty`, `Sets::writing` those a bio writes.
//! 3. `Dirty` becomes `Writing` only under the lock of the content, which is copied before that is
//!    released: whoever changes content and then marks it is either in the copy or marks it again.
//! 4. A buffer whose content was never had (`Reading` to `Checking`, `Failed`) is not handed out.
//! 5. A buffer that is being written is in the map: a thread that finds no buffer of a block there
//!    knows that no write of the block is on its way.
//! 6. The bytes in which the content differs from the disk's lie in `Inner::dirty`, or in
//!    `Inner::sent` while they are on their way.

use std::collections::BTreeMap;
use std::sync::Arc;

use blockstack::sync::prim::atomic::{AtomicU64, Ordering};
use blockstack::sync::{Condvar, Mutex, Rank};

use crate::buffer::Inner;

/// See the module's documentation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub(crate) enum Phase {
    Reading,
    /// Read, not yet checked: by a prefetch, or just now.
    Fetched,
    Checking,
    Clean,
    Dirty,
    /// A copy is on its way to the disk.
    Writing,
    /// As `Writing`, and changed since the copy was made.
    Redirtied,
    /// As `Writing`, and forgotten: kept so that no later write of the block can be overtaken.
    Doomed,
    Failed,
    /// Not in the cache any more.
    Gone,
}

impl Phase {
    pub(crate) fn from_u8(value: u8) -> Self {
        match value {
            0 => Self::Reading,
            1 => Self::Fetched,
            2 => Self::Checking,
            3 => Self::Clean,
            4 => Self::Dirty,
            5 => Self::Writing,
            6 => Self::Redirtied,
            7 => Self::Doomed,
            8 => Self::Failed,
            _ => Self::Gone,
        }
    }

    /// Whether the content may be used.
    pub(crate) fn is_ready(self) -> bool {
        matches!(
            self,
            Self::Clean | Self::Dirty | Self::Writing | Self::Redirtied
        )
    }

    /// Whether a bio writes a copy.
    pub(crate) fn is_writing(self) -> bool {
        matches!(self, Self::Writing | Self::Redirtied | Self::Doomed)
    }

    /// Whether the content is newer than the disk's and than any copy on its way there.
    pub(crate) fn is_dirty(self) -> bool {
        matches!(self, Self::Dirty | Self::Redirtied)
    }

    /// Whether a reader has to wait for somebody else.
    pub(crate) fn is_pending(self) -> bool {
        matches!(self, Self::Reading | Self::Checking)
    }
}

/// What is dirty or being written among the blocks of one shard.
#[derive(Default)]
pub(crate) struct Sets {
    pub(crate) dirty: BTreeMap<u64, Arc<Inner>>,
    pub(crate) writing: BTreeMap<u64, Arc<Inner>>,
    /// The client is gone; what becomes dirty now will never be written.
    pub(crate) closed: bool,
}

impl Sets {
    /// Moves `inner`, a buffer of this shard, to another phase. The caller wakes those who wait.
    pub(crate) fn enter(&mut self, inner: &Arc<Inner>, to: Phase) {
        let from = inner.phase();
        let to = if self.closed && to == Phase::Dirty {
            Phase::Gone
        } else {
            to
        };
        if from == Phase::Dirty && to != Phase::Dirty {
            self.dirty.remove(&inner.block);
        }
        if from.is_writing() && !to.is_writing() {
            self.writing.remove(&inner.block);
            inner.cache.writing.fetch_sub(1, Ordering::Release);
        }
        if to == Phase::Dirty && from != Phase::Dirty {
            self.dirty.insert(inner.block, inner.clone());
        }
        if to.is_writing() && !from.is_writing() {
            self.writing.insert(inner.block, inner.clone());
            inner.cache.writing.fetch_add(1, Ordering::Release);
        }
        let dirty = &inner.cache.dirty;
        match (from.is_dirty(), to.is_dirty()) {
            (false, true) => {
                inner
                    .dirtied_at
                    .store(inner.cache.now_ms(), Ordering::Relaxed);
                dirty.fetch_add(1, Ordering::Relaxed);
            }
            (true, false) => {
                dirty.fetch_sub(1, Ordering::Relaxed);
            }
            _ => {}
        }
        inner.set_phase(to);
    }
}

/// Blocks share a shard in groups, so that neighbours are found together.
const GROUP_SHIFT: u32 = 8;
/// Few in a model, where each lock is a point to branch at.
const SHARDS: usize = if cfg!(shuttle) { 2 } else { 64 };

#[repr(align(128))]
pub(crate) struct Shard {
    /// Rank: a leaf. Only memory pools are locked under it, and an `end_io` may take it.
    pub(crate) sets: Mutex<Sets>,
    /// A buffer of this shard left a phase that somebody may wait for.
    pub(crate) changed: Condvar,
    pub(crate) misses: AtomicU64,
}

pub(crate) struct Shards(Box<[Shard]>);

impl Shards {
    pub(crate) fn new() -> Self {
        Self(
            (0..SHARDS)
                .map(|_| Shard {
                    sets: Mutex::new(Rank::Pool, Sets::default()),
                    changed: Condvar::new(),
                    misses: AtomicU64::new(0),
                })
                .collect(),
        )
    }

    pub(crate) fn of(&self, block: u64) -> &Shard {
        &self.0[(block >> GROUP_SHIFT) as usize % SHARDS]
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Shard> {
        self.0.iter()
    }
}
