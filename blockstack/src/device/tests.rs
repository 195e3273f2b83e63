use std::sync::Arc;
use std::sync::mpsc::channel;

use super::{BlockDevice, DynDevice, Limits, Stats};
use crate::backend::null::NullDisk;
use crate::sync::{Mutex, Rank};
use crate::{Bio, BioSet, BlkResult, Op, Sector, SectorCount, Wait, submit_bio};

/// Keeps what it gets.
struct Keeper {
    kept: Mutex<Vec<Bio>>,
    stats: Stats,
}

impl Keeper {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            kept: Mutex::new(Rank::Queue, Vec::new()),
            stats: Stats::default(),
        })
    }
}

impl BlockDevice for Keeper {
    fn name(&self) -> &str {
        "keeper"
    }
    fn capacity(&self) -> SectorCount {
        SectorCount::new(8)
    }
    fn limits(&self) -> Limits {
        Limits::UNLIMITED
    }
    fn stats(&self) -> &Stats {
        &self.stats
    }
    fn submit(&self, bio: Bio) {
        self.kept.lock().push(bio);
    }
}

fn discard(set: &BioSet<()>, dev: DynDevice) -> Bio {
    let mut bio = set.alloc(Op::Discard, Wait::Yes).unwrap();
    bio.set_len(SectorCount::new(2));
    bio.set_dev(dev, Sector::ZERO);
    bio
}

#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "dropped with 1 bios neither ended nor passed on")]
fn a_bio_that_a_device_lost_is_missed() {
    let set = BioSet::new("test", 1);
    let stats = Stats::default();
    // Counted by one device and ended by another.
    let mut bio = discard(&set, NullDisk::new("null", SectorCount::new(8)));
    stats.start(&mut bio);
    bio.complete(Ok(()));
    drop(stats);
}

/// Device, set and bio go together, on the thread that ends the bio.
#[test]
fn the_last_bio_may_take_its_device_along() {
    let keeper = Keeper::new();
    let gone = Arc::downgrade(&keeper);
    {
        let set = BioSet::new("test", 1);
        submit_bio(discard(&set, keeper.clone()));
    }
    let bio = keeper.kept.lock().pop().unwrap();
    drop(keeper);
    assert!(gone.upgrade().is_some(), "a bio keeps its device");
    std::thread::spawn(move || bio.complete(Ok(())))
        .join()
        .unwrap();
    assert!(gone.upgrade().is_none());
}

/// What went on to another device, or is the rest of a bio that was split, is missed nowhere.
#[test]
fn bios_that_went_on_or_were_split_are_accounted_for() {
    #[derive(Default)]
    struct Tell(Option<std::sync::mpsc::Sender<BlkResult>>);
    fn end(mut bio: Bio, res: BlkResult) {
        let tell = bio.pad_mut::<Tell>().0.take().unwrap();
        // Its set and devices are gone before the test hears.
        drop(bio);
        tell.send(res).unwrap();
    }
    let (keeper, null) = (Keeper::new(), NullDisk::new("null", SectorCount::new(8)));
    let pieces = BioSet::<()>::new("pieces", 1);
    let set = BioSet::<Tell>::new("test", 1);
    let mut bio = set.alloc(Op::Discard, Wait::Yes).unwrap();
    bio.set_len(SectorCount::new(2));
    bio.set_dev(keeper.clone(), Sector::ZERO);
    bio.set_end_io(end);
    let (tell, told) = channel();
    bio.pad_mut::<Tell>().0 = Some(tell);
    submit_bio(bio);
    let mut bio = keeper.kept.lock().pop().unwrap();
    let mut piece = bio.split(SectorCount::new(1), &pieces, Wait::Yes).unwrap();
    piece.set_dev(null.clone(), Sector::ZERO);
    submit_bio(piece);
    bio.set_dev(null, Sector::new(1));
    submit_bio(bio);
    assert_eq!(told.recv(), Ok(Ok(())));
    assert_eq!(keeper.stats.snapshot().in_flight, 0);
}
