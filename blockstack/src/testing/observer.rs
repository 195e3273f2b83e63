//! A device that tells of the start and the end of each bio and passes it on.

use std::sync::Arc;

use crate::bio::{Bio, BioFlags, Op};
use crate::device::{BlockDevice, DynDevice, Limits, Stats};
use crate::error::BlkResult;
use crate::forward::{Ended, Forward};
use crate::sync::prim::atomic::{AtomicU64, Ordering};
use crate::units::{Sector, SectorCount};

/// What a bio asked for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Asked {
    /// The operation.
    pub op: Op,
    /// How it is to be done.
    pub flags: BioFlags,
    /// Where.
    pub sector: Sector,
    /// How much.
    pub len: SectorCount,
}

impl Asked {
    pub(super) fn of(bio: &Bio) -> Self {
        Self {
            op: bio.op(),
            flags: bio.flags(),
            sector: bio.sector(),
            len: bio.len(),
        }
    }
}

/// What an observer tells.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Event {
    /// A bio came in, the `id`th of the device.
    Start {
        /// Which one; ascending.
        id: u64,
        /// What it asks for.
        asked: Asked,
    },
    /// It ended.
    End {
        /// Which one.
        id: u64,
        /// What it asked for.
        asked: Asked,
        /// How it ended.
        res: BlkResult,
    },
}

/// Hears of events; called on whatever thread submits or completes, so it must not wait.
pub type Callback = Arc<dyn Fn(Event) + Send + Sync>;

/// See the module's documentation.
pub struct Observer {
    name: String,
    forward: Forward,
    callback: Callback,
    next: AtomicU64,
    stats: Stats,
}

struct One {
    id: u64,
    callback: Callback,
}

impl Ended for One {
    fn ended(&self, bio: &Bio, res: BlkResult) -> BlkResult {
        let (id, asked) = (self.id, Asked::of(bio));
        (self.callback)(Event::End { id, asked, res });
        res
    }
}

impl Observer {
    /// Makes a device above `lower` that tells `callback`.
    #[must_use]
    pub fn new(lower: DynDevice, callback: Callback) -> Arc<Self> {
        Arc::new(Self {
            name: format!("observed {}", lower.name()),
            forward: Forward::new(lower),
            callback,
            next: AtomicU64::new(0),
            stats: Stats::default(),
        })
    }
}

impl BlockDevice for Observer {
    fn name(&self) -> &str {
        &self.name
    }

    fn capacity(&self) -> SectorCount {
        self.forward.lower.capacity()
    }

    fn limits(&self) -> Limits {
        self.forward.lower.limits()
    }

    fn stats(&self) -> &Stats {
        &self.stats
    }

    fn submit(&self, bio: Bio) {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let asked = Asked::of(&bio);
        (self.callback)(Event::Start { id, asked });
        let callback = self.callback.clone();
        self.forward.send(bio, Arc::new(One { id, callback }));
    }
}
