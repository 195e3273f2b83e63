//! Progress with bounded memory: the cases of "Avoid deadlocks with bio allocation by stacking
//! drivers", with real threads. `shuttle.rs` holds the models of the same. `FUSEFS_STACK_LONG=1`
//! goes round more often.
#![expect(clippy::unwrap_used, reason = "a test")]

mod splitter;

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;
use std::time::Duration;

use blockstack::backend::mem::Image;
use blockstack::backend::null::NullDisk;
use blockstack::device::Stats;
use blockstack::sync::{Condvar, Mutex, Rank, mark_completion_thread};
use blockstack::testing::observer::{Event, Observer};
use blockstack::{
    Bio, BioFlags, BioSet, BlockDevice, DynDevice, Limits, Op, PagePool, Rescue, Sector,
    SectorCount, Wait, flush_wait, range_wait, read_wait, submit_bio, write_wait,
};

use crate::splitter::{Pools, Splitter, Style};

const SUBMITTERS: u64 = 64;
/// Sectors that belong to one submitting thread.
const REGION: u64 = 64;

/// Numbers from a seed (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

/// A disk in memory whose own threads end bios, in an order and after delays drawn from a seed.
struct Late {
    state: Mutex<LateState>,
    work: Condvar,
    size: SectorCount,
    ended: AtomicU64,
    stats: Stats,
}

struct LateState {
    bios: Vec<Bio>,
    image: Image,
    random: Random,
    stop: bool,
}

/// Ends the threads of a [`Late`].
struct LateThreads(Arc<Late>, Vec<JoinHandle<()>>);

impl Late {
    fn start(sectors: u64, seed: u64) -> LateThreads {
        let size = SectorCount::new(sectors);
        let state = LateState {
            bios: Vec::new(),
            image: Image::zeroed(size),
            random: Random(seed),
            stop: false,
        };
        let late = Arc::new(Self {
            state: Mutex::new(Rank::Queue, state),
            work: Condvar::new(),
            size,
            ended: AtomicU64::new(0),
            stats: Stats::default(),
        });
        let start = |_| {
            let late = late.clone();
            std::thread::spawn(move || late.run())
        };
        let threads = (0..2).map(start).collect();
        LateThreads(late, threads)
    }

    fn run(&self) {
        mark_completion_thread();
        loop {
            let mut state = self.state.lock();
            while state.bios.is_empty() {
                if state.stop {
                    return;
                }
                self.work.wait(&mut state);
            }
            // Now and then late, so that others come between. Not by giving up the processor, which
            // costs a time slice of whatever else runs.
            if state.random.below(4) == 0 {
                let turns = state.random.below(2000);
                drop(state);
                (0..turns).for_each(|_| std::hint::spin_loop());
                continue;
            }
            let count = state.bios.len() as u64;
            let index = usize::try_from(state.random.below(count)).unwrap();
            let mut bio = state.bios.swap_remove(index);
            let at = usize::try_from(bio.sector().raw()).unwrap() * 512;
            let image = &mut state.image;
            match bio.op() {
                Op::Read => bio.fill_each(|offset, part| image.read_at(at + offset, part)),
                Op::Write => bio.for_each_bytes(|offset, part| image.write_at(at + offset, part)),
                Op::Discard | Op::WriteZeroes => image.zero_at(at, bio.byte_len()),
                Op::Flush => {}
            }
            drop(state);
            self.ended.fetch_add(1, Ordering::Relaxed);
            bio.complete(Ok(()));
        }
    }
}

impl LateThreads {
    fn stop(self) -> Image {
        self.0.state.lock().stop = true;
        self.0.work.notify_all();
        self.1.into_iter().for_each(|thread| thread.join().unwrap());
        self.0.state.lock().image.clone()
    }
}

impl BlockDevice for Late {
    fn name(&self) -> &str {
        "late"
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
    fn submit(&self, bio: Bio) {
        self.state.lock().bios.push(bio);
        self.work.notify_one();
    }
}

fn is_long() -> bool {
    std::env::var_os("FUSEFS_STACK_LONG").is_some()
}

/// Fails loudly where a deadlock would hang the whole run.
fn within(limit: Duration, what: impl FnOnce() + Send + 'static) {
    let limit = if is_long() { limit * 30 } else { limit };
    let (done, over) = channel();
    let thread = std::thread::spawn(move || {
        what();
        done.send(()).ok();
    });
    match over.recv_timeout(limit) {
        Ok(()) | Err(RecvTimeoutError::Disconnected) => thread.join().unwrap(),
        Err(RecvTimeoutError::Timeout) => panic!("deadlock"),
    }
}

/// Every thread writes its region, reads it back, and compares.
fn hammer(top: &DynDevice, seed: u64) -> Vec<u8> {
    let rounds = if is_long() { 50 } else { 2 };
    let submit = |thread: u64| {
        let mut random = Random(seed << 8 | thread);
        let mut model = vec![0; usize::try_from(REGION).unwrap() * 512];
        for _ in 0..rounds {
            let len = 17 + random.below(17);
            let skip = random.below(REGION - len + 1);
            let at = usize::try_from(skip).unwrap() * 512;
            let bytes = usize::try_from(len).unwrap() * 512;
            let sector = Sector::new(thread * REGION + skip);
            let mut buf = PagePool::shared().alloc(bytes).unwrap();
            for part in buf.chunks_mut(512) {
                part.fill(u8::try_from(random.below(256)).unwrap());
            }
            model[at..at + bytes].copy_from_slice(&buf);
            let mut buf = write_wait(top, sector, buf, BioFlags::empty()).unwrap();
            buf.fill(0);
            let buf = read_wait(top, sector, buf).unwrap();
            assert!(*buf == model[at..at + bytes], "thread {thread}");
        }
        flush_wait(top).unwrap();
        model
    };
    std::thread::scope(|scope| {
        let start = |thread| scope.spawn(move || submit(thread));
        let threads: Vec<_> = (0..SUBMITTERS).map(start).collect();
        let models = threads.into_iter().map(|thread| thread.join().unwrap());
        models.collect::<Vec<_>>().concat()
    })
}

/// Sees that each bio that begins ends once.
fn watched(lower: DynDevice) -> (DynDevice, Arc<Mutex<HashSet<u64>>>) {
    let open = Arc::new(Mutex::new(Rank::Pool, HashSet::new()));
    let seen = open.clone();
    let callback = move |event| match event {
        Event::Start { id, .. } => assert!(seen.lock_nested().insert(id)),
        Event::End { id, res, .. } => {
            assert!(seen.lock_nested().remove(&id), "bio {id} ended again");
            assert_eq!(res, Ok(()));
        }
    };
    (Observer::new(lower, Arc::new(callback)), open)
}

/// A stack of splitting devices above a late disk, hammered.
fn run_stack(depth: u32, style: Style, reserve: usize, rescue: Rescue) {
    let seed = u64::from(depth) << 8 | reserve as u64;
    let late = Late::start(SUBMITTERS * REGION, seed);
    let mut devices: Vec<DynDevice> = vec![late.0.clone()];
    let mut pools = Vec::new();
    for level in 0..depth {
        let chunk = [8, 3, 16, 5][level as usize % 4];
        let pool = Pools::new(reserve, rescue);
        let lower = devices[level as usize].clone();
        devices.push(Splitter::new(vec![lower], chunk, style, pool.clone()));
        pools.push(pool);
    }
    let (top, open) = watched(devices[depth as usize].clone());
    let model = hammer(&top, seed);
    assert!(open.lock().is_empty(), "bios that never ended");
    let image = late.stop();
    assert!(image.to_vec() == model, "depth {depth} reserve {reserve}");
    for device in &devices {
        let stats = device.stats().snapshot();
        assert_eq!((stats.in_flight, stats.failed), (0, 0), "{}", device.name());
    }
    for pool in &pools {
        assert_eq!(pool.in_use(), 0);
    }
}

#[test]
fn stacks_of_any_depth_get_by_with_few_bios_each() {
    for depth in 1..=8 {
        for reserve in [1, 2, 4] {
            within(Duration::from_secs(120), move || {
                run_stack(depth, Style::Greedy, reserve, Rescue::OnDemand);
            });
        }
    }
}

#[test]
fn order_alone_is_enough_where_one_bio_is_taken_at_a_time() {
    for depth in 1..=8 {
        within(Duration::from_secs(120), move || {
            run_stack(depth, Style::OneAtATime, 1, Rescue::Never);
        });
    }
}

/// Sets with and without a rescuer in one stack, devices that need it and such that do not.
#[test]
fn devices_that_need_a_rescuer_stand_among_those_that_do_not() {
    within(Duration::from_secs(120), || {
        let late = Late::start(SUBMITTERS * REGION, 77);
        let mut top: DynDevice = late.0.clone();
        for (chunk, style, rescue) in [
            (2, Style::Greedy, Rescue::OnDemand),
            (8, Style::OneAtATime, Rescue::Never),
            (5, Style::Greedy, Rescue::Ready),
            (20, Style::OneAtATime, Rescue::OnDemand),
        ] {
            top = Splitter::new(vec![top], chunk, style, Pools::new(1, rescue));
        }
        let (top, open) = watched(top);
        let model = hammer(&top, 77);
        assert!(open.lock().is_empty());
        assert!(late.stop().to_vec() == model);
    });
}

/// Two levels share a set of two. The upper one has sent both, one to either lower device, and the
/// first of these needs a third; the other stands on the list of what was there before.
#[test]
fn what_was_there_before_is_handed_over_too() {
    within(Duration::from_secs(60), || {
        let late = Late::start(100, 9);
        let pools = Pools::new(2, Rescue::OnDemand);
        let (greedy, low) = (Style::Greedy, late.0.clone());
        let near = Splitter::new(vec![low.clone()], 1, greedy, pools.clone());
        let top: DynDevice = Splitter::new(vec![near, low], 2, greedy, pools.clone());
        range_wait(&top, Op::Discard, Sector::ZERO, SectorCount::new(6)).unwrap();
        assert_eq!(late.0.ended.load(Ordering::Relaxed), 5);
        late.stop();
    });
}

#[test]
fn bios_of_one_thread_to_one_device_keep_their_order() {
    let seen = Arc::new(Mutex::new(Rank::Pool, Vec::new()));
    let heard = seen.clone();
    let callback = move |event| {
        if let Event::Start { asked, .. } = event {
            heard.lock_nested().push(asked.sector.raw());
        }
    };
    let null = NullDisk::new("null", SectorCount::new(1000));
    let mut top: DynDevice = Observer::new(null, Arc::new(callback));
    for chunk in [4, 6] {
        let pools = Pools::new(1, Rescue::Never);
        top = Splitter::new(vec![top], chunk, Style::OneAtATime, pools);
    }
    range_wait(&top, Op::Discard, Sector::ZERO, SectorCount::new(24)).unwrap();
    assert_eq!(*seen.lock(), [0, 4, 6, 8, 12, 16, 18, 20]);
}

const STUCK: usize = 8;
/// Pieces of each bio that come from the set; the rest of the bio is one more.
const FRONTS: usize = 3;

/// The device of the text: takes all pieces of a bio before it returns, so that none of them has
/// been sent when it wants the next.
struct Eager {
    lower: DynDevice,
    set: BioSet<()>,
    /// All threads have their first piece before one takes its second.
    first: Barrier,
    /// Threads inside an allocation, and allocations that were served.
    wanting: AtomicUsize,
    served: AtomicU64,
    stats: Stats,
}

impl BlockDevice for Eager {
    fn name(&self) -> &str {
        "eager"
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
        for index in 0..FRONTS {
            self.wanting.fetch_add(1, Ordering::SeqCst);
            let piece = bio.split(SectorCount::new(1), &self.set, Wait::Yes);
            self.served.fetch_add(1, Ordering::SeqCst);
            self.wanting.fetch_sub(1, Ordering::SeqCst);
            let mut piece = piece.unwrap();
            piece.set_dev(self.lower.clone(), piece.sector());
            submit_bio(piece);
            if index == 0 {
                self.first.wait();
            }
        }
        bio.set_dev(self.lower.clone(), bio.sector());
        submit_bio(bio);
    }
}

#[derive(Debug, PartialEq)]
enum Outcome {
    Finished,
    Stopped,
}

/// Waits until all threads are done, or until nothing can move any more: each waits in an
/// allocation, no bio is below, the set is empty, and no counter moves while that is looked at again
/// and again.
fn watch(device: &Eager, late: &Late, limit: usize, threads: &[JoinHandle<()>]) -> Outcome {
    const LOOKS: u32 = 300;
    let mut before = None;
    let mut same = 0;
    while !threads.iter().all(JoinHandle::is_finished) {
        let served = device.served.load(Ordering::SeqCst);
        let counters = (served, late.ended.load(Ordering::SeqCst));
        let stuck = device.wanting.load(Ordering::SeqCst) == threads.len()
            && device.set.in_use() == limit
            && late.stats.snapshot().in_flight == 0;
        same = if before == Some(counters) && stuck {
            same + 1
        } else {
            0
        };
        if same == LOOKS {
            return Outcome::Stopped;
        }
        before = Some(counters);
        std::thread::park_timeout(Duration::from_millis(1));
    }
    Outcome::Finished
}

/// As many threads as the set has bios submit bios of several pieces. What a stop needs to get over
/// it is kept back, and given when the outcome is known.
fn the_case_of_the_text(rescue: Rescue) -> Outcome {
    let late = Late::start(SUBMITTERS * REGION, 3);
    let limit = STUCK * FRONTS;
    let device = Arc::new(Eager {
        lower: late.0.clone(),
        set: BioSet::with_rescue("eager", limit, rescue).unwrap(),
        first: Barrier::new(STUCK),
        wanting: AtomicUsize::new(0),
        served: AtomicU64::new(0),
        stats: Stats::default(),
    });
    let take = |_| device.set.alloc(Op::Read, Wait::No).unwrap();
    let kept_back: Vec<_> = (STUCK..limit).map(take).collect();
    let top: DynDevice = device.clone();
    let submit = |thread| {
        let top = top.clone();
        std::thread::spawn(move || {
            let mut buf = PagePool::shared().alloc((FRONTS + 1) * 512).unwrap();
            buf.fill(u8::try_from(thread).unwrap() + 1);
            let sector = Sector::new(thread as u64 * (FRONTS as u64 + 1));
            write_wait(&top, sector, buf, BioFlags::empty()).unwrap();
        })
    };
    let threads: Vec<_> = (0..STUCK).map(submit).collect();
    let outcome = watch(&device, &late.0, limit, &threads);
    if outcome == Outcome::Stopped {
        assert_eq!(device.served.load(Ordering::SeqCst), STUCK as u64);
        assert_eq!(late.0.ended.load(Ordering::SeqCst), 0);
    }
    drop(kept_back);
    threads
        .into_iter()
        .for_each(|thread| thread.join().unwrap());
    let bytes = late.stop().to_vec();
    let written = bytes.chunks((FRONTS + 1) * 512).take(STUCK);
    for (thread, bytes) in written.enumerate() {
        assert!(bytes.iter().all(|&byte| usize::from(byte) == thread + 1));
    }
    assert_eq!(device.set.in_use(), 0);
    outcome
}

#[test]
fn the_case_of_the_text_stops_without_the_rescuer() {
    within(Duration::from_secs(60), || {
        assert_eq!(the_case_of_the_text(Rescue::Never), Outcome::Stopped);
    });
}

#[test]
fn the_case_of_the_text_goes_on_with_the_rescuer() {
    for rescue in [Rescue::OnDemand, Rescue::Ready] {
        within(Duration::from_secs(60), move || {
            assert_eq!(the_case_of_the_text(rescue), Outcome::Finished);
        });
    }
}
