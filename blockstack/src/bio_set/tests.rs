use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::ThreadId;
use std::time::Duration;

use super::{BioSet, Rescue, Wait};
use crate::backend::mem::Image;
use crate::device::Stats;
use crate::sync::{Mutex, Rank};
use crate::testing::crash::{CrashDisk, Timing};
use crate::{
    Bio, BioFlags, BlkResult, BlockDevice, DynDevice, Limits, Op, PagePool, Sector, SectorCount,
    flush_wait, read_wait, submit_bio, write_wait,
};

/// How a [`Splitter`] goes about it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Style {
    /// One piece and its clone, and the rest submitted to itself: order alone is enough.
    OneAtATime,
    /// All pieces in one go, without clones: nothing moves without a rescuer.
    Greedy,
}

#[derive(Default)]
struct ClonePad(Option<Bio>);

/// Splits at every `chunk` sectors, clones each piece, and sends it down.
struct Splitter {
    name: String,
    lower: DynDevice,
    chunk: u64,
    style: Style,
    splits: BioSet<()>,
    clones: BioSet<ClonePad>,
    stats: Stats,
}

impl Splitter {
    fn new(lower: DynDevice, chunk: u64, style: Style, rescue: Rescue) -> Arc<Self> {
        Arc::new(Self {
            name: format!("split{chunk} {}", lower.name()),
            lower,
            chunk,
            style,
            splits: BioSet::with_rescue("splits", 1, rescue).unwrap(),
            clones: BioSet::with_rescue("clones", 1, rescue).unwrap(),
            stats: Stats::default(),
        })
    }

    fn clone_down(&self, bio: Bio) {
        fn end(mut clone: Bio, res: BlkResult) {
            let parent = clone.pad_mut::<ClonePad>().0.take();
            // The clone goes back to its set before its parent's owner can want another.
            drop(clone);
            parent.unwrap().complete(res);
        }
        let mut clone = self.clones.alloc(bio.op(), Wait::Yes).unwrap();
        clone.clone_from_parent(&bio);
        clone.set_dev(self.lower.clone(), bio.sector());
        clone.set_end_io(end);
        clone.pad_mut::<ClonePad>().0 = Some(bio);
        submit_bio(clone);
    }

    /// Sends the bio itself: what holds a place in the set must be what waits on the list, or the
    /// rescuer would not know it.
    fn remap_down(&self, mut bio: Bio) {
        bio.set_dev(self.lower.clone(), bio.sector());
        submit_bio(bio);
    }

    fn front(&self, bio: &mut Bio) -> Option<Bio> {
        let to_boundary = self.chunk - bio.sector().raw() % self.chunk;
        if bio.len().raw() <= to_boundary {
            return None;
        }
        bio.split(SectorCount::new(to_boundary), &self.splits, Wait::Yes)
    }
}

impl BlockDevice for Splitter {
    fn name(&self) -> &str {
        &self.name
    }
    fn capacity(&self) -> SectorCount {
        self.lower.capacity()
    }
    fn limits(&self) -> Limits {
        self.lower.limits()
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

/// A disk that ends bios on another thread.
fn slow_disk(sectors: u64, seed: u64) -> (Arc<CrashDisk>, DynDevice) {
    let image = Image::zeroed(SectorCount::new(sectors));
    let disk = CrashDisk::from_image("slow", image, Timing::Shuffled { seed });
    (disk.clone(), disk)
}

/// Fails loudly where a deadlock would hang the whole run.
fn within(limit: Duration, what: impl FnOnce() + Send + 'static) {
    let (done, over) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        what();
        done.send(()).ok();
    });
    match over.recv_timeout(limit) {
        Ok(()) | Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => thread.join().unwrap(),
        Err(std::sync::mpsc::RecvTimeoutError::Timeout) => panic!("deadlock"),
    }
}

fn hammer(top: &DynDevice, threads: u64) {
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                let pool = PagePool::shared();
                for round in 0..6u64 {
                    let sector = thread * 300 + round;
                    let mut buf = pool.alloc(97 * 512).unwrap();
                    for (index, chunk) in buf.chunks_mut(512).enumerate() {
                        chunk.fill((thread * 31 + round * 7 + index as u64) as u8);
                    }
                    let sent = buf.to_vec();
                    let mut buf =
                        write_wait(top, Sector::new(sector), buf, BioFlags::empty()).unwrap();
                    buf.fill(0);
                    let buf = read_wait(top, Sector::new(sector), buf).unwrap();
                    assert!(*buf == *sent, "thread {thread} round {round}");
                }
                flush_wait(top).unwrap();
            });
        }
    });
}

#[test]
fn stacks_of_any_depth_get_by_with_one_bio_each() {
    for depth in 1..=8u32 {
        for style in [Style::OneAtATime, Style::Greedy] {
            within(Duration::from_secs(60), move || {
                let (_, mut top) = slow_disk(2000, u64::from(depth));
                for level in 0..depth {
                    let chunk = [16, 5, 24, 7][level as usize % 4];
                    top = Splitter::new(top, chunk, style, Rescue::OnDemand);
                }
                hammer(&top, 3);
            });
        }
    }
}

#[test]
fn order_alone_is_enough_where_one_bio_is_taken_at_a_time() {
    within(Duration::from_secs(60), || {
        let (_, mut top) = slow_disk(2000, 5);
        for chunk in [8, 3, 64] {
            top = Splitter::new(top, chunk, Style::OneAtATime, Rescue::Never);
        }
        hammer(&top, 4);
    });
}

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

#[test]
fn a_bio_that_was_let_go_leaves_its_place_and_still_ends_once() {
    fn end(mut bio: Bio, res: BlkResult) {
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

#[test]
fn bios_of_one_thread_to_one_device_keep_their_order() {
    let lower = Arc::new(Recorder {
        seen: Mutex::new(Rank::Pool, Vec::new()),
        stats: Stats::default(),
    });
    let top = Splitter::new(lower.clone(), 4, Style::OneAtATime, Rescue::Never);
    let top: DynDevice = Splitter::new(top, 6, Style::OneAtATime, Rescue::Never);
    let set = BioSet::<()>::new("test", 1);
    let mut bio = set.alloc(Op::Discard, Wait::Yes).unwrap();
    bio.set_len(SectorCount::new(24));
    bio.set_dev(top, Sector::ZERO);
    submit_bio(bio);
    let seen = lower.seen.lock();
    let sectors: Vec<_> = seen.iter().map(|(_, sector)| *sector).collect();
    assert_eq!(sectors, [0, 4, 6, 8, 12, 16, 18, 20]);
}
