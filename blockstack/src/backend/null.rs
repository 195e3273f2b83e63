//! A disk that keeps nothing: reads give zeros, writes are forgotten.

use std::sync::Arc;

use crate::bio::{Bio, Op};
use crate::device::{BlockDevice, Limits, Stats};
use crate::units::SectorCount;

/// See the module's documentation.
pub struct NullDisk {
    name: String,
    size: SectorCount,
    stats: Stats,
}

impl NullDisk {
    /// Makes a disk.
    #[must_use]
    pub fn new(name: &str, size: SectorCount) -> Arc<Self> {
        Arc::new(Self {
            name: name.to_owned(),
            size,
            stats: Stats::default(),
        })
    }
}

impl BlockDevice for NullDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn capacity(&self) -> SectorCount {
        self.size
    }

    fn limits(&self) -> Limits {
        Limits::UNLIMITED
    }

    fn stats(&self) -> &Stats {
        &self.stats
    }

    fn submit(&self, mut bio: Bio) {
        if bio.op() == Op::Read {
            bio.fill_each(|_, segment| segment.fill(0));
        }
        bio.complete(Ok(()));
    }
}
