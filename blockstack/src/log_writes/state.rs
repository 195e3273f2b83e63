//! What a power cut can leave of a log of writes.
//!
//! A volatile cache: what a write or discard leaves is certain only once a flush, begun after the
//! write ended, has ended, or the write itself was FUA. Of all others a power cut keeps each, drops
//! it (the old bytes come back), or tears it between sectors. That a device may write what is in
//! its cache in any order adds nothing to that: to write an older one last is to lose the newer.

use std::ops::Range;

use super::format::LogFlags;
use super::log::{Data, Entry};
use crate::backend::mem::Image;
use crate::units::SECTOR_SIZE;

/// What became of a write that was not certain.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub enum Fate {
    /// It is on the disk.
    #[default]
    Kept,
    /// The old bytes are.
    Lost,
    /// Only these of its sectors are on the disk.
    Torn(Vec<Range<usize>>),
}

/// A write whose fate is open.
#[derive(Clone, Debug)]
pub(crate) struct Pending {
    pub(crate) id: u64,
    pub(crate) at: usize,
    pub(crate) data: Data,
    pub(crate) ended: bool,
}

impl Pending {
    pub(crate) fn apply(&self, image: &mut Image, from: usize, to: usize) {
        self.data.apply(image, self.at, from, to);
    }

    fn end(&self) -> usize {
        self.at + self.data.len()
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.at < other.end() && other.at < self.end()
    }

    /// What `newer` made durable can not be undone by this older write.
    fn yield_to(&mut self, newer: &Self) {
        let mut bytes = match &self.data {
            Data::Bytes(bytes) => bytes.to_vec(),
            other => vec![0; other.len()],
        };
        let start = self.at.max(newer.at);
        let end = self.end().min(newer.end());
        let target = &mut bytes[start - self.at..end - self.at];
        match &newer.data {
            Data::Bytes(from) => {
                target.copy_from_slice(&from[start - newer.at..end - newer.at]);
            }
            _ => target.fill(0),
        }
        self.data = Data::Bytes(bytes.into());
    }

    fn sectors(&self) -> usize {
        self.data.len() / SECTOR_SIZE
    }
}

/// A disk with a volatile cache at one moment: what is certain, and the writes whose fate is open.
/// A copy costs little.
#[derive(Clone, Debug)]
pub struct Cached {
    pub(crate) durable: Image,
    /// In the order they were submitted.
    pub(crate) pending: Vec<Pending>,
    next: u64,
}

impl Cached {
    /// A disk whose content is certain.
    #[must_use]
    pub fn new(durable: Image) -> Self {
        Self {
            durable,
            pending: Vec::new(),
            next: 0,
        }
    }

    /// The disk after one more entry of a log. What lies behind its end is left out.
    pub fn apply(&mut self, entry: &Entry) {
        if entry.flags.contains(LogFlags::FLUSH) {
            self.flush();
        }
        let len = self.durable.size().raw();
        let fits = entry.sector.checked_add(entry.sectors);
        if entry.flags.contains(LogFlags::MARK)
            || entry.sectors == 0
            || fits.is_none_or(|end| end > len)
        {
            return;
        }
        let data = if entry.flags.contains(LogFlags::DISCARD) {
            Data::Zeros(entry.sectors as usize * SECTOR_SIZE)
        } else {
            entry.data.clone()
        };
        let id = self.begin(entry.at(), data);
        if entry.flags.contains(LogFlags::FUA) {
            self.make_durable(&[id]);
        } else if let Some(write) = self.pending.last_mut() {
            write.ended = true;
        }
    }

    /// A write begins; gives its number.
    pub(crate) fn begin(&mut self, at: usize, data: Data) -> u64 {
        let id = self.next;
        self.next += 1;
        self.pending.push(Pending {
            id,
            at,
            data,
            ended: false,
        });
        id
    }

    /// All that is there becomes certain.
    pub fn flush(&mut self) {
        for write in std::mem::take(&mut self.pending) {
            write.apply(&mut self.durable, 0, write.data.len());
        }
    }

    pub(crate) fn make_durable(&mut self, ids: &[u64]) {
        for id in ids {
            let Some(index) = self.pending.iter().position(|write| write.id == *id) else {
                continue;
            };
            let write = self.pending.remove(index);
            write.apply(&mut self.durable, 0, write.data.len());
            for older in &mut self.pending[..index] {
                if older.overlaps(&write) {
                    older.yield_to(&write);
                }
            }
        }
    }

    /// Sectors of each write whose fate is open, oldest first.
    pub fn uncertain(&self) -> impl ExactSizeIterator<Item = usize> + '_ {
        self.pending.iter().map(Pending::sectors)
    }

    /// What is certain.
    #[must_use]
    pub fn durable(&self) -> &Image {
        &self.durable
    }

    /// The disk after a power cut, with the given fates of the oldest writes; all others are kept.
    #[must_use]
    pub fn outcome(&self, fates: &[Fate]) -> Image {
        let mut image = self.durable.clone();
        for (index, write) in self.pending.iter().enumerate() {
            match fates.get(index).unwrap_or(&Fate::Kept) {
                Fate::Kept => write.apply(&mut image, 0, write.data.len()),
                Fate::Lost => {}
                Fate::Torn(kept) => {
                    for range in kept {
                        let (from, to) = (range.start, range.end.min(write.sectors()));
                        if from < to {
                            write.apply(&mut image, from * SECTOR_SIZE, to * SECTOR_SIZE);
                        }
                    }
                }
            }
        }
        image
    }
}
