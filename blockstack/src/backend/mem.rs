//! A disk in memory.

use std::sync::Arc;

pub use super::image::{Backing, FileBacking, Image};
use crate::bio::{Bio, Op};
use crate::device::{BlockDevice, Limits, Stats};
use crate::error::BlkResult;
use crate::sync::{Rank, RwLock};
use crate::units::{SECTOR_SIZE, SectorCount};

/// A disk in memory; completes each bio before `submit` returns. What was never written costs no
/// memory.
pub struct MemDisk {
    name: String,
    size: SectorCount,
    bytes: RwLock<Image>,
    stats: Stats,
}

impl MemDisk {
    /// Makes a disk of zeros.
    #[must_use]
    pub fn new(name: &str, size: SectorCount) -> Arc<Self> {
        Self::from_image(name, Image::zeroed(size))
    }

    /// Makes a disk with the given content, cut to whole sectors.
    #[must_use]
    pub fn from_bytes(name: &str, bytes: Vec<u8>) -> Arc<Self> {
        Self::from_image(name, Image::from_bytes(&bytes))
    }

    /// Makes a disk with the given content.
    #[must_use]
    pub fn from_image(name: &str, image: Image) -> Arc<Self> {
        Arc::new(Self {
            name: name.to_owned(),
            size: image.size(),
            bytes: RwLock::new(Rank::Queue, image),
            stats: Stats::default(),
        })
    }

    /// A copy of the whole content, byte for byte.
    #[must_use]
    pub fn snapshot(&self) -> Vec<u8> {
        self.bytes.read_nested().to_vec()
    }

    /// A copy of the whole content that shares memory with the disk.
    #[must_use]
    pub fn image(&self) -> Image {
        self.bytes.read_nested().clone()
    }

    /// Puts other content, of the same size, in the place of all there is.
    ///
    /// # Panics
    /// Where the size is another.
    pub fn restore(&self, image: Image) {
        assert_eq!(image.size(), self.size, "an image of another size");
        *self.bytes.write_nested() = image;
    }

    fn run(&self, bio: &mut Bio) -> BlkResult {
        let at = bio.sector().raw() as usize * SECTOR_SIZE;
        match bio.op() {
            Op::Read => {
                let bytes = self.bytes.read_nested();
                bio.fill_each(|offset, segment| bytes.read_at(at + offset, segment));
            }
            Op::Write => {
                let mut bytes = self.bytes.write_nested();
                bio.for_each_bytes(|offset, segment| bytes.write_at(at + offset, segment));
            }
            Op::Flush => {}
            Op::Discard | Op::WriteZeroes => {
                self.bytes.write_nested().zero_at(at, bio.byte_len());
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
        self.size
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
