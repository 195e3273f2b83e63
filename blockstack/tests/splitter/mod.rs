//! A stacking device that splits bios, for several tests.

use std::sync::Arc;

use blockstack::device::Stats;
use blockstack::{
    Bio, BioSet, BlkResult, BlockDevice, DynDevice, Limits, Rescue, SectorCount, Wait, submit_bio,
};

/// How a [`Splitter`] goes about it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Style {
    /// One piece and its clone, and the rest submitted to itself: order alone is enough.
    OneAtATime,
    /// All pieces in one go, without clones: nothing moves without a rescuer.
    Greedy,
}

/// The bio that the clone stands for.
#[derive(Default)]
pub struct ClonePad(Option<Bio>);

/// The pools of a [`Splitter`]; several may share them.
#[derive(Clone)]
pub struct Pools {
    pub splits: BioSet<()>,
    pub clones: BioSet<ClonePad>,
}

impl Pools {
    pub fn new(reserve: usize, rescue: Rescue) -> Self {
        Self {
            splits: BioSet::with_rescue("splits", reserve, rescue).unwrap(),
            clones: BioSet::with_rescue("clones", reserve, rescue).unwrap(),
        }
    }

    pub fn in_use(&self) -> usize {
        self.splits.in_use() + self.clones.in_use()
    }
}

/// Splits at every `chunk` sectors and sends the pieces down, to each lower device in turn.
pub struct Splitter {
    name: String,
    lowers: Vec<DynDevice>,
    chunk: u64,
    style: Style,
    pools: Pools,
    stats: Stats,
}

impl Splitter {
    pub fn new(lowers: Vec<DynDevice>, chunk: u64, style: Style, pools: Pools) -> Arc<Self> {
        Arc::new(Self {
            name: format!("split{chunk} {}", lowers[0].name()),
            lowers,
            chunk,
            style,
            pools,
            stats: Stats::default(),
        })
    }

    fn lower(&self, bio: &Bio) -> DynDevice {
        let index = bio.sector().raw() / self.chunk % self.lowers.len() as u64;
        self.lowers[usize::try_from(index).unwrap()].clone()
    }

    fn clone_down(&self, bio: Bio) {
        fn end(mut clone: Bio, res: BlkResult) {
            let parent = clone.pad_mut::<ClonePad>().0.take();
            // The clone goes back to its set before its parent's owner can want another.
            drop(clone);
            parent.unwrap().complete(res);
        }
        let mut clone = self.pools.clones.alloc(bio.op(), Wait::Yes).unwrap();
        clone.clone_from_parent(&bio, bio.sector());
        clone.set_dev(self.lower(&bio), bio.sector());
        clone.set_end_io(end);
        clone.pad_mut::<ClonePad>().0 = Some(bio);
        submit_bio(clone);
    }

    /// Sends the bio itself: what holds a place in the set must be what waits on the list, or the
    /// rescuer would not know it.
    fn remap_down(&self, mut bio: Bio) {
        bio.set_dev(self.lower(&bio), bio.sector());
        submit_bio(bio);
    }

    fn front(&self, bio: &mut Bio) -> Option<Bio> {
        let to_boundary = self.chunk - bio.sector().raw() % self.chunk;
        if bio.len().raw() <= to_boundary {
            return None;
        }
        bio.split(SectorCount::new(to_boundary), &self.pools.splits, Wait::Yes)
    }
}

impl BlockDevice for Splitter {
    fn name(&self) -> &str {
        &self.name
    }
    fn capacity(&self) -> SectorCount {
        self.lowers[0].capacity()
    }
    fn limits(&self) -> Limits {
        self.lowers[0].limits()
    }
    fn stats(&self) -> &Stats {
        &self.stats
    }
    fn submit(&self, mut bio: Bio) {
        match self.style {
            Style::OneAtATime => match self.front(&mut bio) {
                Some(front) => {
                    self.clone_down(front);
                    submit_bio(bio);
                }
                None => self.clone_down(bio),
            },
            Style::Greedy => {
                while let Some(front) = self.front(&mut bio) {
                    self.remap_down(front);
                }
                self.remap_down(bio);
            }
        }
    }
}
