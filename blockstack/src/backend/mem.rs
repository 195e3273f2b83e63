//! A disk in memory.

use std::sync::Arc;

use crate::bio::{Bio, Op};
use crate::device::{BlockDevice, Limits, Stats};
use crate::error::BlkResult;
use crate::sync::{Rank, RwLock};
use crate::units::{SECTOR_SIZE, Sector, SectorCount};

/// A disk in memory; completes each bio before `submit` returns.
pub struct MemDisk {
    name: String,
    bytes: RwLock<Vec<u8>>,
    stats: Stats,
}

impl MemDisk {
    /// Makes a disk of zeros.
    #[must_use]
    pub fn new(name: &str, size: SectorCount) -> Arc<Self> {
        Self::from_bytes(name, vec![0; size.raw() as usize * SECTOR_SIZE])
    }

    /// Makes a disk with the given content, cut to whole sectors.
    #[must_use]
    pub fn from_bytes(name: &str, mut bytes: Vec<u8>) -> Arc<Self> {
        bytes.truncate(bytes.len() / SECTOR_SIZE * SECTOR_SIZE);
        Arc::new(Self {
            name: name.to_owned(),
            bytes: RwLock::new(Rank::Queue, bytes),
            stats: Stats::default(),
        })
    }

    /// A copy of the whole content.
    #[must_use]
    pub fn snapshot(&self) -> Vec<u8> {
        self.bytes.read().clone()
    }

    fn run(&self, bio: &mut Bio) -> BlkResult {
        let start = |sector: Sector| sector.raw() as usize * SECTOR_SIZE;
        let at = start(bio.sector());
        match bio.op() {
            Op::Read => {
                let bytes = self.bytes.read_nested();
                bio.fill_each(|offset, segment| {
                    let from = at + offset;
                    segment.copy_from_slice(&bytes[from..from + segment.len()]);
                });
            }
            Op::Write => {
                let mut bytes = self.bytes.write_nested();
                bio.for_each_bytes(|offset, segment| {
                    let to = at + offset;
                    bytes[to..to + segment.len()].copy_from_slice(segment);
                });
            }
            Op::Flush => {}
            Op::Discard | Op::WriteZeroes => {
                let len = bio.byte_len();
                self.bytes.write_nested()[at..at + len].fill(0);
            }
        }
        Ok(())
    }
}

impl BlockDevice for MemDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn capacity(&self) -> SectorCount {
        SectorCount::new((self.bytes.read_nested().len() / SECTOR_SIZE) as u64)
    }

    fn limits(&self) -> Limits {
        Limits::UNLIMITED
    }

    fn stats(&self) -> &Stats {
        &self.stats
    }

    fn submit(&self, mut bio: Bio) {
        let res = self.run(&mut bio);
        bio.complete(res);
    }
}
