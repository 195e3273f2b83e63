use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::ThreadId;

use super::{BioSet, Rescue, Wait};
use crate::device::Stats;
use crate::sync::{Mutex, Rank};
use crate::{Bio, BlockDevice, DynDevice, Limits, Op, Sector, SectorCount, submit_bio};

/// Notes which thread submitted what, and ends it later, all at once.
struct Recorder {
    seen: Mutex<Vec<(ThreadId, u64)>>,
    stats: Stats,
}

impl BlockDevice for Recorder {
    fn name(&self) -> &str {
        "recorder"
    }
    fn capacity(&self) -> SectorCount {
        SectorCount::new(1000)
    }
    fn limits(&self) -> Limits {
        Limits::UNLIMITED
    }
    fn stats(&self) -> &Stats {
        &self.stats
    }
    fn submit(&self, bio: Bio) {
        let one = (std::thread::current().id(), bio.sector().raw());
        self.seen.lock().push(one);
        bio.complete(Ok(()));
    }
}

/// Submits bios of two sets alternately, and needs one more of the first than there are.
struct Mixed {
    lower: Arc<Recorder>,
    scarce: BioSet<()>,
    other: BioSet<()>,
    stats: Stats,
}

impl BlockDevice for Mixed {
    fn name(&self) -> &str {
        "mixed"
    }
    fn capacity(&self) -> SectorCount {
        SectorCount::new(1000)
    }
    fn limits(&self) -> Limits {
        Limits::UNLIMITED
    }
    fn stats(&self) -> &Stats {
        &self.stats
    }
    fn submit(&self, bio: Bio) {
        if bio.sector().raw() == 100 {
            // Inside the submission of another bio of this device: what it left is on the old list.
            for sector in 10..14 {
                self.send(&self.scarce, sector);
                self.send(&self.other, sector + 10);
            }
            bio.complete(Ok(()));
            return;
        }
        let mut inner = self.other.alloc(Op::Discard, Wait::Yes).unwrap();
        inner.set_len(SectorCount::new(1));
        inner.set_dev(bio.dev().unwrap().clone(), Sector::new(100));
        self.send(&self.scarce, 1);
        self.send(&self.other, 2);
        submit_bio(inner);
        // Sorted behind `inner` only if it goes to a device that is not below: itself is not.
        bio.complete(Ok(()));
    }
}

impl Mixed {
    fn send(&self, set: &BioSet<()>, sector: u64) {
        let mut bio = set.alloc(Op::Discard, Wait::Yes).unwrap();
        bio.set_len(SectorCount::new(1));
        bio.set_dev(self.lower.clone(), Sector::new(sector));
        submit_bio(bio);
    }
}

#[test]
fn only_bios_of_the_scarce_set_are_punted_and_in_order() {
    let lower = Arc::new(Recorder {
        seen: Mutex::new(Rank::Pool, Vec::new()),
        stats: Stats::default(),
    });
    let top: DynDevice = Arc::new(Mixed {
        lower: lower.clone(),
        scarce: BioSet::with_rescue("scarce", 2, Rescue::Ready).unwrap(),
        other: BioSet::new("other", 50),
        stats: Stats::default(),
    });
    crate::range_wait(&top, Op::Discard, Sector::ZERO, SectorCount::new(1)).unwrap();
    // The bio above does not wait for those below, of which the rescuer may have some left.
    while lower.seen.lock().len() < 10 {
        std::thread::yield_now();
    }
    let me = std::thread::current().id();
    let seen = lower.seen.lock();
    let of = |mine: bool| -> Vec<u64> {
        let fits = seen.iter().filter(|(thread, _)| (*thread == me) == mine);
        fits.map(|(_, sector)| *sector).collect()
    };
    let (mine, rescued) = (of(true), of(false));
    assert!(
        rescued.starts_with(&[10, 11]) && rescued.is_sorted(),
        "{rescued:?}"
    );
    assert!(rescued.iter().all(|sector| (10..14).contains(sector)));
    let others: Vec<_> = mine.iter().filter(|&&sector| sector >= 20).collect();
    assert_eq!(others, [&20, &21, &22, &23]);
}

#[test]
fn a_waiter_gets_the_bio_that_comes_back() {
    let set = BioSet::<()>::new("one", 1);
    let got = Arc::new(AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..500 {
                    drop(set.alloc(Op::Read, Wait::Yes).unwrap());
                    got.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!((got.load(Ordering::Relaxed), set.in_use()), (2000, 0));
    let held = set.alloc(Op::Read, Wait::No).unwrap();
    assert!(set.alloc(Op::Read, Wait::No).is_none());
    drop(held);
}

/// A bio that lost its home is missed at the end of its set.
#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "lossy: dropped with 1 of its 2 bios")]
fn a_bio_that_never_came_back_is_missed() {
    let set = BioSet::<()>::new("lossy", 2);
    let mut bio = set.alloc(Op::Read, Wait::No).unwrap();
    bio.core_mut().home = None;
    drop(bio);
    drop(set);
}

#[test]
fn a_set_may_end_before_its_bios_do() {
    let set = BioSet::<()>::new("short", 2);
    let bios = [(); 2].map(|()| set.alloc(Op::Read, Wait::No).unwrap());
    drop(set);
    let [first, second] = bios;
    drop(first);
    std::thread::spawn(move || drop(second)).join().unwrap();
}

#[test]
fn a_bio_that_was_let_go_leaves_its_place_and_still_ends_once() {
    fn end(mut bio: Bio, res: crate::BlkResult) {
        assert_eq!(res, Ok(()));
        bio.pad_mut::<CountPad>().0.fetch_add(1, Ordering::Relaxed);
    }
    #[derive(Default)]
    struct CountPad(Arc<AtomicUsize>);
    let (set, other) = (
        BioSet::<CountPad>::new("one", 1),
        BioSet::<()>::new("other", 1),
    );
    let mut bio = set.alloc(Op::Discard, Wait::Yes).unwrap();
    let ends = bio.pad_mut::<CountPad>().0.clone();
    bio.set_end_io(end);
    other.disown(&mut bio);
    assert_eq!((set.in_use(), other.in_use()), (1, 0));
    set.disown(&mut bio);
    assert_eq!(set.in_use(), 0);
    let second = set.alloc(Op::Read, Wait::No).unwrap();
    bio.complete(Ok(()));
    assert_eq!((ends.load(Ordering::Relaxed), set.in_use()), (1, 1));
    drop(second);
    assert_eq!(set.in_use(), 0);
}
