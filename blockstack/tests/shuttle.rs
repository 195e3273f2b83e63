//! Models of what happens where threads meet in this crate, run by the checker `shuttle` over the
//! real types.
//!
//! `contrib/models` runs them:
//!
//! ```text
//! RUSTFLAGS="--cfg shuttle" cargo test --target-dir target/shuttle -p blockstack --test shuttle
//! ```
//!
//! Each model runs under many schedules: drawn at random, and by the PCT algorithm, which keeps to
//! priorities that it changes at few points. A failure prints its schedule, which `shuttle::replay`
//! takes in the place of [`check`], and `SHUTTLE_RANDOM_SEED` makes a run the same again.
//! `FUSEFS_STACK_LONG=1` runs ten times as many.
//!
//! What belongs to a model and not to what it is a model of is kept in the standard library's
//! atomics and locks, which are no points for the schedule to branch at.
#![cfg(shuttle)]
#![expect(clippy::unwrap_used, reason = "a test")]

mod splitter;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use blockstack::backend::null::NullDisk;
use blockstack::device::Stats;
use blockstack::sync::{Condvar, Mutex, Rank, mark_completion_thread};
use blockstack::{
    Bio, BioFlags, BioSet, BlkError, BlkResult, BlockDevice, Buf, Dio, DioConfig, DioDone,
    DirectIo, DynDevice, Extent, Limits, Mapping, OnceWorkqueue, Op, PagePool, Rescue, Sector,
    SectorCount, Wait, Workqueue, flush_wait, range_wait,
};
use shuttle::rand::RngCore;
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::thread::{JoinHandle, spawn};
use shuttle::{Config, Runner};

use crate::splitter::{Pools, Splitter, Style};

fn check(iterations: usize, model: fn()) {
    let iterations = if std::env::var_os("FUSEFS_STACK_LONG").is_some() {
        iterations * 10
    } else {
        iterations
    };
    let mut config = Config::new();
    // Debug builds use more than the checker gives by itself.
    config.stack_size = 256 << 10;
    config.silence_warnings = true;
    Runner::new(RandomScheduler::new(iterations), config.clone()).run(model);
    Runner::new(PctScheduler::new(3, iterations), config).run(model);
}

fn below(bound: usize) -> usize {
    shuttle::rand::thread_rng().next_u64() as usize % bound
}

/// Lets others run: what an item or an end does takes its time.
fn step() {
    shuttle::thread::sleep(Duration::ZERO);
}

/// The bottom of a stack: a thread of its own ends bios, in any order.
struct Late {
    state: Mutex<LateState>,
    work: Condvar,
    ended: AtomicUsize,
    stats: Stats,
}

#[derive(Default)]
struct LateState {
    bios: Vec<Bio>,
    stop: bool,
}

/// Ends the thread of a [`Late`].
struct LateThread(Arc<Late>, JoinHandle<()>);

impl Late {
    fn start() -> (Arc<Self>, LateThread) {
        let late = Arc::new(Self {
            state: Mutex::new(Rank::Queue, LateState::default()),
            work: Condvar::new(),
            ended: AtomicUsize::new(0),
            stats: Stats::default(),
        });
        let runs = late.clone();
        let thread = spawn(move || runs.run());
        (late.clone(), LateThread(late, thread))
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
            let index = below(state.bios.len());
            let bio = state.bios.swap_remove(index);
            drop(state);
            self.ended.fetch_add(1, Ordering::Relaxed);
            bio.complete(Ok(()));
        }
    }
}

impl LateThread {
    /// Ends what is left first.
    fn stop(self) {
        self.0.state.lock().stop = true;
        self.0.work.notify_one();
        self.1.join().unwrap();
    }
}

impl BlockDevice for Late {
    fn name(&self) -> &str {
        "late"
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
        self.state.lock().bios.push(bio);
        self.work.notify_one();
    }
}

fn join(threads: Vec<JoinHandle<()>>) {
    for thread in threads {
        thread.join().unwrap();
    }
}

// The pool.

fn everyone_is_served(bios: usize, threads: usize) {
    let set = BioSet::<()>::new("set", bios);
    let threads = (0..threads)
        .map(|_| {
            let set = set.clone();
            spawn(move || {
                for _ in 0..2 {
                    let bio = set.alloc(Op::Read, Wait::Yes).unwrap();
                    assert!(set.in_use() >= 1);
                    drop(bio);
                }
            })
        })
        .collect();
    join(threads);
    assert_eq!(set.in_use(), 0);
    let all: Vec<_> = (0..bios).map(|_| set.alloc(Op::Read, Wait::No)).collect();
    assert!(all.iter().all(Option::is_some), "a bio was lost");
    assert!(set.alloc(Op::Read, Wait::No).is_none());
}

#[test]
fn a_set_of_one_bio_serves_all_who_wait() {
    check(20_000, || everyone_is_served(1, 3));
}

#[test]
fn a_set_of_two_bios_serves_all_who_wait() {
    check(20_000, || everyone_is_served(2, 4));
}

#[test]
fn who_does_not_wait_takes_no_wake_up_from_who_does() {
    check(20_000, || {
        let set = BioSet::<()>::new("set", 1);
        let threads = (0..4)
            .map(|index| {
                let set = set.clone();
                let wait = [Wait::Yes, Wait::No][index % 2];
                spawn(move || {
                    let got = set.alloc(Op::Read, wait);
                    assert!(got.is_some() || wait == Wait::No);
                })
            })
            .collect();
        join(threads);
        assert_eq!(set.in_use(), 0);
    });
}

// The rescuer.

/// Threads submit bios of three pieces to a device that takes its pieces from a set of one.
fn hand_over(style: Style, rescue: Rescue, threads: u64, levels: usize) {
    let (late, bottom) = Late::start();
    let mut top: DynDevice = late.clone();
    let mut pools = Vec::new();
    for _ in 0..levels {
        let pool = Pools::new(1, rescue);
        top = Splitter::new(vec![top], 1, style, pool.clone());
        pools.push(pool);
    }
    let threads = (0..threads)
        .map(|thread| {
            let top = top.clone();
            let sector = Sector::new(10 * thread);
            spawn(move || range_wait(&top, Op::Discard, sector, SectorCount::new(3)).unwrap())
        })
        .collect::<Vec<_>>();
    let bios = threads.len();
    join(threads);
    bottom.stop();
    assert_eq!(late.ended.load(Ordering::Relaxed), 3 * bios);
    for pool in &pools {
        assert_eq!(pool.in_use(), 0);
    }
    // The rescuers end here, or after the last bio that holds their set.
    drop((top, pools));
}

#[test]
fn a_rescuer_started_on_demand_moves_what_waits() {
    check(8_000, || hand_over(Style::Greedy, Rescue::OnDemand, 3, 1));
}

#[test]
fn a_rescuer_that_is_ready_moves_what_waits() {
    check(8_000, || hand_over(Style::Greedy, Rescue::Ready, 2, 1));
}

#[test]
fn rescuers_of_two_levels_do_not_wait_for_each_other() {
    check(5_000, || hand_over(Style::Greedy, Rescue::OnDemand, 2, 2));
}

#[test]
fn order_alone_is_enough_where_one_bio_is_taken_at_a_time() {
    check(8_000, || hand_over(Style::OneAtATime, Rescue::Never, 2, 2));
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_a_rescuer_nothing_moves() {
    check(10, || hand_over(Style::Greedy, Rescue::Never, 2, 1));
}

/// The upper level has sent two bios; the lower one, at work on the first, hands over its own. Were
/// the second handed over too, the rescuer of the lower set would wait for that set.
#[test]
fn bios_of_the_level_above_are_left_alone() {
    check(4_000, || {
        let (late, bottom) = Late::start();
        let (upper, lower) = (
            Pools::new(2, Rescue::OnDemand),
            Pools::new(1, Rescue::OnDemand),
        );
        let low = Splitter::new(vec![late.clone()], 1, Style::Greedy, lower.clone());
        let top: DynDevice = Splitter::new(vec![low], 3, Style::Greedy, upper.clone());
        range_wait(&top, Op::Discard, Sector::ZERO, SectorCount::new(9)).unwrap();
        bottom.stop();
        assert_eq!(late.ended.load(Ordering::Relaxed), 9);
        assert_eq!((upper.in_use(), lower.in_use()), (0, 0));
    });
}

/// Two levels share a set of two. The upper one has sent both, one to either lower device, and the
/// first of these needs a third; the other stands on the list of what was there before.
fn old_list(rescue: Rescue) {
    let (late, bottom) = Late::start();
    let pools = Pools::new(2, rescue);
    let near = Splitter::new(vec![late.clone()], 1, Style::Greedy, pools.clone());
    let top: DynDevice = Splitter::new(vec![near, late.clone()], 2, Style::Greedy, pools.clone());
    range_wait(&top, Op::Discard, Sector::ZERO, SectorCount::new(6)).unwrap();
    bottom.stop();
    assert_eq!(pools.in_use(), 0);
}

#[test]
fn what_was_there_before_is_handed_over_too() {
    check(10_000, || old_list(Rescue::OnDemand));
}

#[test]
#[should_panic(expected = "deadlock")]
fn what_was_there_before_is_stuck_without_a_rescuer() {
    check(10, || old_list(Rescue::Never));
}

// The last reference to a split bio.

/// What the owner of a split bio saw.
#[derive(Default)]
struct Owner {
    ends: AtomicUsize,
    res: std::sync::Mutex<Option<BlkResult>>,
}

#[derive(Default)]
struct OwnerPad {
    owner: Option<Arc<Owner>>,
    pieces: Option<BioSet<()>>,
}

fn owner_end(mut bio: Bio, res: BlkResult) {
    let pad = std::mem::take(bio.pad_mut::<OwnerPad>());
    let (owner, pieces) = (pad.owner.unwrap(), pad.pieces.unwrap());
    assert_eq!(pieces.in_use(), 0, "a piece still names the owner's memory");
    let mut buf = bio.take_buf().unwrap();
    assert_eq!(buf.len(), 4 * 512);
    buf[0] = 1;
    *owner.res.lock().unwrap() = Some(res);
    owner.ends.fetch_add(1, Ordering::Relaxed);
}

/// A write of four sectors and the set that its pieces come from.
fn write_of_four(dev: Option<DynDevice>) -> (Bio, BioSet<()>, Arc<Owner>) {
    let pieces = BioSet::new("pieces", 8);
    let owner = Arc::new(Owner::default());
    let mut bio = BioSet::<OwnerPad>::new("owner", 1)
        .alloc(Op::Write, Wait::Yes)
        .unwrap();
    *bio.pad_mut::<OwnerPad>() = OwnerPad {
        owner: Some(owner.clone()),
        pieces: Some(pieces.clone()),
    };
    bio.set_end_io(owner_end);
    bio.push(PagePool::new(2 << 20).alloc(4 * 512).unwrap())
        .unwrap();
    if let Some(dev) = dev {
        bio.set_dev(dev, Sector::ZERO);
    }
    (bio, pieces, owner)
}

fn cut(bio: &mut Bio, pieces: &BioSet<()>, sectors: u64) -> Bio {
    let sectors = SectorCount::new(sectors);
    bio.split(sectors, pieces, Wait::Yes).unwrap()
}

fn some_result() -> BlkResult {
    [Ok(()), Err(BlkError::NoMemory), Err(BlkError::OutOfRange)][below(3)]
}

/// When the end of a piece began and was over, and its result.
type Span = (usize, usize, BlkResult);

#[test]
fn a_split_bio_ends_once_with_the_error_that_came_first() {
    check(6_000, || {
        let (mut bio, pieces, owner) = write_of_four(None);
        let mut parts: Vec<_> = (0..3).map(|_| cut(&mut bio, &pieces, 1)).collect();
        parts.push(bio);
        let clock = Arc::new(AtomicUsize::new(0));
        let spans = Arc::new(std::sync::Mutex::new(Vec::<Span>::new()));
        let threads = parts
            .into_iter()
            .map(|part| {
                let (clock, spans) = (clock.clone(), spans.clone());
                let res = some_result();
                spawn(move || {
                    let start = clock.fetch_add(1, Ordering::Relaxed);
                    part.complete(res);
                    let end = clock.fetch_add(1, Ordering::Relaxed);
                    spans.lock().unwrap().push((start, end, res));
                })
            })
            .collect();
        join(threads);
        assert_eq!(owner.ends.load(Ordering::Relaxed), 1);
        let res = owner.res.lock().unwrap().unwrap();
        let spans = spans.lock().unwrap();
        let failed: Vec<_> = spans.iter().filter(|span| span.2.is_err()).collect();
        if failed.is_empty() {
            assert_eq!(res, Ok(()));
            return;
        }
        // Those that nobody's end was before may have been first.
        let first_end = failed.iter().map(|span| span.1).min().unwrap();
        let firsts = failed.iter().filter(|span| span.0 < first_end);
        let firsts: Vec<_> = firsts.map(|span| span.2).collect();
        assert!(firsts.contains(&res), "{res:?} of {failed:?}");
    });
}

/// Pieces of pieces end, or are dropped, on a thread each.
fn split_again(dev: Option<DynDevice>) {
    let (mut bio, pieces, owner) = write_of_four(dev);
    let mut front = cut(&mut bio, &pieces, 2);
    let mut parts = vec![cut(&mut front, &pieces, 1), cut(&mut bio, &pieces, 1)];
    parts.extend([front, bio]);
    let mut all = Vec::new();
    let threads = parts.into_iter().map(|part| {
        let res = (below(4) > 0).then(some_result);
        all.push(res.unwrap_or(Err(BlkError::Io)));
        spawn(move || match res {
            Some(res) => part.complete(res),
            None => drop(part),
        })
    });
    join(threads.collect());
    assert_eq!(owner.ends.load(Ordering::Relaxed), 1);
    let res = owner.res.lock().unwrap().unwrap();
    assert!(all.contains(&res), "{res:?} of {all:?}");
    assert_eq!(res.is_ok(), all.iter().all(Result::is_ok));
    assert_eq!(pieces.in_use(), 0);
}

#[test]
fn pieces_of_pieces_end_their_owner_once() {
    check(4_000, || {
        split_again(Some(NullDisk::new("null", SectorCount::new(8))));
    });
}

#[test]
fn pieces_that_were_never_submitted_end_their_owner_once() {
    check(4_000, || split_again(None));
}

// Workqueues.

#[test]
fn drain_waits_for_what_was_queued_and_for_what_that_queues() {
    check(15_000, || {
        let done = Arc::new(AtomicUsize::new(0));
        let queue = Arc::new(OnceWorkqueue::<usize>::new());
        let (inner, count) = (Arc::downgrade(&queue), done.clone());
        let make = move || {
            Workqueue::new("queue", 2, move |left: usize| {
                step();
                if left > 0 {
                    inner.upgrade().unwrap().get().unwrap().queue(left - 1);
                }
                count.fetch_add(1, Ordering::Relaxed);
            })
        };
        queue.get_or_make(make).unwrap();
        let threads = (0..2)
            .map(|_| {
                let (queue, done) = (queue.clone(), done.clone());
                spawn(move || {
                    let queue = queue.get().unwrap();
                    queue.queue(1);
                    queue.drain();
                    assert!(done.load(Ordering::Relaxed) >= 2);
                })
            })
            .collect();
        join(threads);
        let queue = Arc::into_inner(queue).unwrap();
        assert_eq!(queue.get().unwrap().pending(), 0);
        assert_eq!(done.load(Ordering::Relaxed), 4);
    });
}

#[test]
fn flush_waits_for_what_was_queued_before_and_no_longer() {
    check(15_000, || {
        let done = Arc::new(std::sync::Mutex::new(Vec::new()));
        let handled = done.clone();
        let queue = Arc::new(
            Workqueue::new("queue", 1, move |item: usize| {
                step();
                handled.lock().unwrap().push(item);
            })
            .unwrap(),
        );
        let threads = (0..2)
            .map(|thread| {
                let (queue, done) = (queue.clone(), done.clone());
                spawn(move || {
                    queue.queue(10 * thread);
                    queue.queue(10 * thread + 1);
                    queue.flush();
                    let done = done.lock().unwrap();
                    let mine: Vec<_> = done.iter().filter(|item| **item / 10 == thread).collect();
                    assert_eq!(mine, [&(10 * thread), &(10 * thread + 1)]);
                })
            })
            .collect();
        join(threads);
        Arc::into_inner(queue).unwrap().destroy();
        assert_eq!(done.lock().unwrap().len(), 4);
    });
}

#[test]
fn a_queue_that_ends_does_what_was_queued() {
    check(20_000, || {
        let done = Arc::new(AtomicUsize::new(0));
        let count = done.clone();
        let queue = Arc::new(
            Workqueue::new("queue", 2, move |()| {
                step();
                count.fetch_add(1, Ordering::Relaxed);
            })
            .unwrap(),
        );
        let threads = (0..3)
            .map(|_| {
                let queue = queue.clone();
                // The last of them ends the queue.
                spawn(move || {
                    queue.queue(());
                    drop(queue);
                })
            })
            .collect();
        drop(queue);
        join(threads);
        assert_eq!(done.load(Ordering::Relaxed), 3);
    });
}

/// An item that may hold the last handle of the queue it runs on.
struct Last(Arc<OnceWorkqueue<Last>>);

/// Counts items, and sees at its end, which is that of the queue's last thread, that all were done.
struct Counted(AtomicUsize);

impl Drop for Counted {
    fn drop(&mut self) {
        assert_eq!(*self.0.get_mut(), 2);
    }
}

#[test]
fn an_item_may_be_the_last_owner_of_its_queue() {
    check(20_000, || {
        let done = Counted(AtomicUsize::new(0));
        let queue = Arc::new(OnceWorkqueue::<Last>::new());
        let make = move || {
            Workqueue::new("queue", 2, move |item: Last| {
                step();
                done.0.fetch_add(1, Ordering::Relaxed);
                drop(item.0);
            })
        };
        let made = queue.get_or_make(make).unwrap();
        made.queue(Last(queue.clone()));
        made.queue(Last(queue.clone()));
        drop(queue);
    });
}

#[test]
fn threads_that_race_for_a_queue_share_one() {
    check(15_000, || {
        let once = Arc::new(OnceWorkqueue::<()>::new());
        let done = Arc::new([const { AtomicUsize::new(0) }; 3]);
        let threads = (0..3)
            .map(|thread| {
                let (once, done) = (once.clone(), done.clone());
                spawn(move || {
                    let handle = move |()| {
                        step();
                        done[thread].fetch_add(1, Ordering::Relaxed);
                    };
                    let make = || Workqueue::new("queue", 1, handle);
                    once.get_or_make(make).unwrap().queue(());
                })
            })
            .collect();
        join(threads);
        once.get().unwrap().drain();
        let mut done: Vec<_> = done.iter().map(|one| one.load(Ordering::Relaxed)).collect();
        done.sort_unstable();
        assert_eq!(done, [0, 0, 3]);
    });
}

// Direct I/O.

/// How far a request came.
#[derive(Default)]
struct Steps {
    ended: AtomicUsize,
    answered: AtomicUsize,
}

struct Ask {
    steps: Arc<Steps>,
    dio: Dio<Ask>,
    /// What a deferred end flushes, as a journal would.
    flushes: Option<DynDevice>,
    /// Whether nobody else uses the handle.
    alone: bool,
}

impl DioDone for Ask {
    fn end_io(&mut self, res: BlkResult<usize>) -> BlkResult<usize> {
        step();
        assert!(self.dio.in_flight() > 0, "over before its end");
        if let Some(dev) = &self.flushes {
            flush_wait(dev).unwrap();
        }
        self.steps.ended.fetch_add(1, Ordering::Relaxed);
        res
    }

    fn done(self, buf: Buf, res: BlkResult<usize>) {
        step();
        assert_eq!(res, Ok(buf.len()));
        assert!(
            !self.alone || self.dio.in_flight() == 0,
            "not over before its answer"
        );
        self.steps.answered.fetch_add(1, Ordering::Relaxed);
    }
}

/// Small pools: two requests on one handle have one bio of the mount between them.
fn engine(dev: DynDevice) -> DirectIo<Ask> {
    let config = DioConfig {
        requests: 1,
        pieces: 1,
        workers: 1,
        ..DioConfig::default()
    };
    DirectIo::new("mount", dev, config)
}

fn extents(kind: Mapping, count: u64) -> Vec<Extent> {
    let extent = |index| Extent {
        kind,
        sector: Sector::new(10 * index),
        len: SectorCount::new(1),
    };
    (0..count).map(extent).collect()
}

fn who_waits_for_idle_finds_the_end_done(kind: Mapping) {
    let (late, bottom) = Late::start();
    let mount = engine(late.clone());
    let dio = mount.open();
    let steps = Arc::new(Steps::default());
    let ask = Ask {
        steps: steps.clone(),
        dio: dio.clone(),
        flushes: (kind == Mapping::New).then(|| late.clone() as DynDevice),
        alone: true,
    };
    let buf = PagePool::new(2 << 20).alloc(2 * 512).unwrap();
    dio.write(&extents(kind, 2), buf, BioFlags::empty(), ask);
    let waiters = (0..2)
        .map(|_| {
            let (dio, steps) = (dio.clone(), steps.clone());
            spawn(move || {
                dio.wait_idle();
                assert_eq!(steps.ended.load(Ordering::Relaxed), 1);
            })
        })
        .collect();
    join(waiters);
    mount.drain();
    bottom.stop();
    assert_eq!(steps.answered.load(Ordering::Relaxed), 1);
}

#[test]
fn who_waits_for_idle_finds_the_deferred_end_done() {
    check(6_000, || {
        who_waits_for_idle_finds_the_end_done(Mapping::New)
    });
}

#[test]
fn who_waits_for_idle_finds_the_end_on_the_reaper_done() {
    check(10_000, || {
        who_waits_for_idle_finds_the_end_done(Mapping::Mapped)
    });
}

#[test]
fn requests_on_one_handle_share_what_bios_there_are() {
    check(6_000, || {
        let (late, bottom) = Late::start();
        let mount = engine(late);
        let dio = mount.open();
        let steps = Arc::new(Steps::default());
        let pool = PagePool::new(2 << 20);
        let threads = (0..3)
            .map(|thread| {
                let (dio, steps, pool) = (dio.clone(), steps.clone(), pool.clone());
                let kind = [Mapping::Mapped, Mapping::New, Mapping::Mapped][thread];
                spawn(move || {
                    let buf = pool.alloc(2 * 512).unwrap();
                    if thread == 2 {
                        let (buf, res) = dio.read_wait(&extents(kind, 2), buf);
                        assert_eq!(res, Ok(buf.unwrap().len()));
                        return;
                    }
                    let ask = Ask {
                        steps,
                        dio: dio.clone(),
                        flushes: None,
                        alone: false,
                    };
                    dio.write(&extents(kind, 2), buf, BioFlags::empty(), ask);
                })
            })
            .collect();
        join(threads);
        dio.wait_idle();
        assert_eq!(steps.ended.load(Ordering::Relaxed), 2);
        assert_eq!(dio.in_flight(), 0);
        // The handles may be gone before the queue has given its answer.
        drop((dio, mount));
        bottom.stop();
    });
}
