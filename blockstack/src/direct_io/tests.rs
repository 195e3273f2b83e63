use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use super::{Dio, DioConfig, DioDone, DirectIo, Extent, Mapping, OwnBios};
use crate::backend::mem::MemDisk;
use crate::device::Stats;
use crate::sync::{Condvar, Mutex, Rank};
use crate::testing::faulty::{FaultyDisk, Rule};
use crate::{
    Bio, BioFlags, BlkError, BlkResult, BlockDevice, Buf, DynDevice, Limits, PagePool, Sector,
    SectorCount, Workqueue, submit_bio,
};

fn extent(kind: Mapping, sector: u64, len: u64) -> Extent {
    Extent {
        kind,
        sector: Sector::new(sector),
        len: SectorCount::new(len),
    }
}

/// What happened to a request, in order.
#[derive(Debug, PartialEq)]
enum Heard {
    EndIo(BlkResult<usize>, usize),
    Done(BlkResult<usize>, usize),
}

struct Teller {
    dio: Dio<Teller>,
    to: Sender<(Heard, Option<Buf>, bool)>,
}

impl DioDone for Teller {
    fn end_io(&mut self, res: BlkResult<usize>) -> BlkResult<usize> {
        let deferred = std::thread::current().name() == Some("dio/test");
        let heard = Heard::EndIo(res, self.dio.in_flight());
        self.to.send((heard, None, deferred)).unwrap();
        res
    }
    fn done(self, buf: Buf, res: BlkResult<usize>) {
        let deferred = std::thread::current().name() == Some("dio/test");
        let heard = Heard::Done(res, self.dio.in_flight());
        self.to.send((heard, Some(buf), deferred)).unwrap();
    }
}

#[test]
fn extents_and_holes_make_one_answer() {
    let disk = MemDisk::from_bytes("mem", (0..64u8).flat_map(|i| [i; 512]).collect());
    let dio: Dio<Teller> = DirectIo::new("test", disk, DioConfig::default()).open();
    let mut buf = PagePool::shared().alloc(12 * 512).unwrap();
    buf.fill(0xff);
    let extents = [
        extent(Mapping::Hole, 0, 1),
        extent(Mapping::Mapped, 40, 3),
        extent(Mapping::Unwritten, 50, 2),
        extent(Mapping::Mapped, 7, 4),
        extent(Mapping::Hole, 0, 2),
    ];
    let (to, heard) = channel();
    dio.read(
        &extents,
        buf,
        Teller {
            dio: dio.clone(),
            to,
        },
    );
    let seen: Vec<_> = heard.iter().collect();
    let [(end, _, false), (done, Some(buf), false)] = &seen[..] else {
        panic!("{seen:?}");
    };
    assert_eq!(
        (end, done),
        (&Heard::EndIo(Ok(6144), 1), &Heard::Done(Ok(6144), 0))
    );
    let sectors: Vec<u8> = buf.chunks(512).map(|sector| sector[0]).collect();
    assert_eq!(sectors, [0, 40, 41, 42, 0, 0, 7, 8, 9, 10, 0, 0]);
}

#[test]
fn the_end_of_a_write_to_new_blocks_is_deferred() {
    let disk = MemDisk::new("mem", SectorCount::new(64));
    let engine = DirectIo::new("test", disk.clone(), DioConfig::default());
    let dio: Dio<Teller> = engine.open();
    for (kind, deferred) in [(Mapping::Mapped, false), (Mapping::New, true)] {
        let mut buf = PagePool::shared().alloc(1024).unwrap();
        buf.fill(3);
        let (to, heard) = channel();
        let extents = [extent(Mapping::Mapped, 9, 1), extent(kind, 20, 1)];
        let teller = Teller {
            dio: dio.clone(),
            to,
        };
        dio.write(&extents, buf, BioFlags::empty(), teller);
        dio.wait_idle();
        engine.drain();
        let seen: Vec<_> = heard.iter().map(|(heard, _, at)| (heard, at)).collect();
        assert_eq!(
            seen,
            [
                (Heard::EndIo(Ok(1024), 1), deferred),
                (Heard::Done(Ok(1024), 0), deferred)
            ]
        );
    }
    assert_eq!(disk.snapshot()[20 * 512], 3);
}

#[test]
fn the_first_error_wins_and_the_buffer_comes_back() {
    let disk = MemDisk::new("mem", SectorCount::new(64));
    let dio: Dio<Closure> = DirectIo::new("test", disk, DioConfig::default()).open();
    let cases = [
        (
            vec![extent(Mapping::Mapped, 63, 2)],
            Err(BlkError::OutOfRange),
        ),
        (
            vec![
                extent(Mapping::Mapped, 100, 1),
                extent(Mapping::Mapped, 0, 1),
            ],
            Err(BlkError::OutOfRange),
        ),
        (
            vec![extent(Mapping::Mapped, 0, 1)],
            Err(BlkError::Unaligned),
        ),
        (vec![extent(Mapping::Hole, 0, 2)], Err(BlkError::Unaligned)),
        (vec![], Err(BlkError::Unaligned)),
        (vec![extent(Mapping::Mapped, 3, 2)], Ok(1024)),
    ];
    for (extents, expected) in cases {
        let (to, heard) = channel();
        let buf = PagePool::shared().alloc(1024).unwrap();
        let tell = Box::new(move |buf: Buf, res| to.send((buf.len(), res)).unwrap());
        dio.write(&extents, buf, BioFlags::empty(), tell);
        assert_eq!(heard.recv(), Ok((1024, expected)));
        let buf = PagePool::shared().alloc(1024).unwrap();
        let (buf, res) = dio.write_wait(&extents, buf, BioFlags::FUA);
        assert_eq!((buf.unwrap().len(), res), (1024, expected));
        assert_eq!(dio.in_flight(), 0);
    }
}

#[test]
fn a_file_has_a_bio_also_where_others_hold_all_of_the_pool() {
    let (disk, faults) = FaultyDisk::new(MemDisk::new("mem", SectorCount::new(64)));
    let config = DioConfig {
        requests: 1,
        ..DioConfig::default()
    };
    let engine = DirectIo::<Closure>::new("test", disk, config);
    let (greedy, modest) = (engine.open(), engine.open());
    let (to, answers) = channel();
    let send = |dio: &Dio<Closure>| {
        let to = to.clone();
        let buf = PagePool::shared().alloc(512).unwrap();
        let done = Box::new(move |_: Buf, res| to.send(res).unwrap());
        dio.write(&[extent(Mapping::Mapped, 1, 1)], buf, BioFlags::FUA, done);
    };
    faults.hold();
    // Its own, and the only one of the pool.
    send(&greedy);
    send(&greedy);
    assert_eq!(engine.0.requests.in_use(), 1);
    send(&modest);
    assert_eq!((faults.held(), modest.in_flight()), (3, 1));
    faults.release();
    drop(to);
    assert_eq!(answers.iter().collect::<Vec<_>>(), [Ok(512); 3]);
    greedy.wait_idle();
    modest.wait_idle();
}

#[test]
fn a_frozen_device_does_not_keep_threads_from_another() {
    let (disk, faults) = FaultyDisk::new(MemDisk::new("frozen", SectorCount::new(64)));
    faults.hold();
    let frozen: DynDevice = disk;
    let other: DynDevice = MemDisk::new("mem", SectorCount::new(64));
    std::thread::scope(|scope| {
        for _ in 0..100 {
            scope.spawn(|| crate::flush_wait(&frozen).unwrap());
        }
        while faults.held() < 100 {
            std::thread::yield_now();
        }
        crate::flush_wait(&other).unwrap();
        faults.release();
    });
}

/// Two devices, one behind the other, without a bio of its own.
struct Rows {
    rows: [DynDevice; 2],
    border: u64,
    stats: Stats,
}

impl Rows {
    fn new(rows: [DynDevice; 2]) -> Arc<Self> {
        let border = rows[0].capacity().raw();
        Arc::new(Self {
            rows,
            border,
            stats: Stats::default(),
        })
    }
}

impl BlockDevice for Rows {
    fn name(&self) -> &'static str {
        "rows"
    }
    fn capacity(&self) -> SectorCount {
        SectorCount::new(2 * self.border)
    }
    fn limits(&self) -> Limits {
        Limits::UNLIMITED
    }
    fn stats(&self) -> &Stats {
        &self.stats
    }
    fn submit(&self, mut bio: Bio) {
        let sector = bio.sector().raw();
        let row = usize::from(sector >= self.border);
        let sector = sector - row as u64 * self.border;
        bio.set_dev(self.rows[row].clone(), Sector::new(sector));
        submit_bio(bio);
    }
}

type Closure = Box<dyn FnOnce(Buf, BlkResult<usize>) + Send>;

/// Looks again and again, for at most a minute.
fn soon(what: &str, is_so: impl Fn() -> bool) {
    let since = Instant::now();
    while !is_so() {
        assert!(
            since.elapsed() < Duration::from_secs(60),
            "not soon: {what}"
        );
        std::thread::yield_now();
    }
}

/// A row that is suspended swallows both pools; then one thread writes to the other row. Gives
/// whether that stalled: nothing moves while all that the pools have lies in the suspended row.
fn swallowed_row(own: OwnBios, pieces: usize, writes: usize) -> bool {
    const POOL: usize = 8;
    let (frozen, faults) = FaultyDisk::new(MemDisk::new("frozen", SectorCount::new(64)));
    let rows = Rows::new([frozen, MemDisk::new("other", SectorCount::new(64))]);
    let config = DioConfig {
        requests: POOL,
        pieces: POOL,
        own,
        ..DioConfig::default()
    };
    let engine = DirectIo::<Closure>::new("rows", rows, config);
    let (greedy, modest) = (engine.open(), engine.open());
    faults.hold();
    let answered = Arc::new(AtomicUsize::new(0));
    let own_too = POOL + usize::from(own != OwnBios::Off);
    // A file's own piece is one more than there are pieces in the pool.
    let of_one = usize::from(own == OwnBios::NoPieces);
    for number in 0..own_too {
        let answered = answered.clone();
        let mut extents = vec![extent(Mapping::Mapped, 0, 1), extent(Mapping::Mapped, 9, 1)];
        extents.truncate(if number < of_one { 1 } else { 2 });
        let buf = PagePool::shared().alloc(512 * extents.len()).unwrap();
        let done = move |_: Buf, res: BlkResult<usize>| {
            assert!(res.is_ok());
            answered.fetch_add(1, Ordering::SeqCst);
        };
        greedy.write(&extents, buf, BioFlags::empty(), Box::new(done));
    }
    let exhausted = || {
        let pools = (engine.0.requests.in_use(), engine.0.pieces.in_use());
        pools == (POOL, POOL) && faults.held() == 2 * own_too - of_one
    };
    assert!(exhausted());
    // Without its own bio the writer is seen to wait; a thread that only has no turn is no stall.
    let waits = || own != OwnBios::Off || engine.0.back.waiting() == 1;
    let patience = match (own, pieces) {
        (OwnBios::Off, _) | (OwnBios::NoPieces, 2..) => Duration::from_millis(500),
        _ => Duration::from_secs(60),
    };
    let progress = AtomicUsize::new(0);
    let stalled = std::thread::scope(|scope| {
        scope.spawn(|| {
            let extents: Vec<_> = (0..pieces as u64)
                .map(|at| extent(Mapping::Mapped, 127 - 2 * at, 1))
                .collect();
            for _ in 0..writes {
                let buf = PagePool::shared().alloc(512 * pieces).unwrap();
                let (_buf, res) = modest.write_wait(&extents, buf, BioFlags::empty());
                assert_eq!(res, Ok(512 * pieces));
                progress.fetch_add(1, Ordering::SeqCst);
            }
        });
        let (mut seen, mut since) = (0, Instant::now());
        let stalled = loop {
            let now = progress.load(Ordering::SeqCst);
            if now == writes {
                break false;
            }
            if now != seen {
                (seen, since) = (now, Instant::now());
            } else if since.elapsed() > patience && exhausted() && waits() {
                break true;
            }
            std::thread::yield_now();
        };
        assert_eq!(answered.load(Ordering::SeqCst), 0);
        faults.release();
        stalled
    });
    assert_eq!(progress.load(Ordering::SeqCst), writes);
    greedy.wait_idle();
    assert_eq!(answered.load(Ordering::SeqCst), own_too);
    stalled
}

#[test]
fn one_swallowed_row_does_not_stop_writes_to_another() {
    for pieces in [1, 2, 20] {
        assert!(!swallowed_row(OwnBios::Kept, pieces, 5000));
    }
    // What the bios of its own are for.
    assert!(swallowed_row(OwnBios::Off, 1, 1));
    assert!(!swallowed_row(OwnBios::NoPieces, 1, 1000));
    assert!(swallowed_row(OwnBios::NoPieces, 2, 1));
}

/// Lost: a second request of a file, which waited for the pool alone.
#[test]
fn who_waits_takes_the_own_bio_when_it_comes_back() {
    let (frozen, frozen_faults) = FaultyDisk::new(MemDisk::new("frozen", SectorCount::new(64)));
    let (other, faults) = FaultyDisk::new(MemDisk::new("other", SectorCount::new(64)));
    let config = DioConfig {
        requests: 1,
        ..DioConfig::default()
    };
    let engine = DirectIo::<Closure>::new("rows", Rows::new([frozen, other]), config);
    let (greedy, modest) = (engine.open(), engine.open());
    let write = |dio: &Dio<Closure>, sector: u64| {
        let buf = PagePool::shared().alloc(512).unwrap();
        let extents = [extent(Mapping::Mapped, sector, 1)];
        dio.write(&extents, buf, BioFlags::empty(), Box::new(|_, _| ()));
    };
    frozen_faults.hold();
    faults.hold();
    write(&greedy, 0);
    write(&greedy, 0);
    write(&modest, 64);
    std::thread::scope(|scope| {
        let second = scope.spawn(|| write(&modest, 65));
        soon("the second waits", || engine.0.back.waiting() == 1);
        faults.release();
        let since = Instant::now();
        while modest.in_flight() > 0 && since.elapsed() < Duration::from_secs(20) {
            std::thread::yield_now();
        }
        let left = (modest.in_flight(), greedy.in_flight());
        frozen_faults.release();
        second.join().unwrap();
        assert_eq!(left, (0, 2));
    });
    greedy.wait_idle();
}

#[test]
fn the_own_bio_goes_with_the_last_reference() {
    let (disk, faults) = FaultyDisk::new(MemDisk::new("mem", SectorCount::new(64)));
    let engine = DirectIo::<Closure>::new("test", disk, DioConfig::default());
    let dio = engine.open();
    let file = Arc::downgrade(&dio.0);
    faults.hold();
    let buf = PagePool::shared().alloc(512).unwrap();
    let extents = [extent(Mapping::Mapped, 1, 1)];
    dio.write(&extents, buf, BioFlags::empty(), Box::new(|_, _| ()));
    drop(dio);
    // The bio is on its way.
    assert!(file.upgrade().is_some());
    faults.release();
    assert!(file.upgrade().is_none());
    assert_eq!(Arc::strong_count(&engine.0), 1);
}

/// Lost: the answer, and whoever waited until the file is idle.
#[test]
fn a_length_of_no_sectors_is_answered() {
    let disk = MemDisk::new("mem", SectorCount::new(64));
    let dio: Dio<Closure> = DirectIo::new("test", disk, DioConfig::default()).open();
    for kind in [Mapping::Mapped, Mapping::New] {
        let (to, heard) = channel();
        let buf = PagePool::shared().alloc(1000).unwrap();
        let done = Box::new(move |buf: Buf, res| to.send((buf.len(), res)).unwrap());
        let extents = [extent(kind, 0, 2)];
        dio.write(&extents, buf, BioFlags::empty(), done);
        assert_eq!(heard.recv(), Ok((1000, Err(BlkError::Unaligned))));
        dio.wait_idle();
    }
}

#[test]
fn one_piece_that_fails_fails_the_request() {
    let (disk, faults) = FaultyDisk::new(MemDisk::new("mem", SectorCount::new(64)));
    let engine = DirectIo::new("test", disk, DioConfig::default());
    let dio: Dio<Teller> = engine.open();
    let rule = |sector, error| Rule::all().at(sector..sector + 1).with(error);
    for (second, last) in [
        (BlkError::NoSpace, BlkError::TimedOut),
        (BlkError::TimedOut, BlkError::NoSpace),
    ] {
        for kind in [Mapping::Mapped, Mapping::New] {
            faults.clear();
            faults.add(rule(20, second));
            faults.add(rule(40, last));
            let extents = [
                extent(Mapping::Mapped, 10, 1),
                extent(kind, 20, 1),
                extent(Mapping::Mapped, 30, 1),
                extent(Mapping::Mapped, 40, 1),
            ];
            let (to, heard) = channel();
            let teller = Teller {
                dio: dio.clone(),
                to,
            };
            let buf = PagePool::shared().alloc(2048).unwrap();
            dio.write(&extents, buf, BioFlags::empty(), teller);
            let seen: Vec<_> = heard.iter().map(|(heard, ..)| heard).collect();
            // In time the second piece is the first that fails.
            assert_eq!(
                seen,
                [Heard::EndIo(Err(second), 1), Heard::Done(Err(second), 0)]
            );
            let buf = PagePool::shared().alloc(2048).unwrap();
            let (_buf, res) = dio.write_wait(&extents, buf, BioFlags::empty());
            assert_eq!(res, Err(second));
            let reads = [extents[0], extents[2], extents[3], extents[2]];
            let buf = PagePool::shared().alloc(2048).unwrap();
            assert_eq!(dio.read_wait(&reads, buf).1, Err(last));
            assert_eq!(faults.failed(), 5);
        }
    }
}

/// An end that waits until it may go on, and counts.
struct Gated {
    gate: Arc<(Mutex<bool>, Condvar)>,
    answers: Arc<AtomicUsize>,
}

impl DioDone for Gated {
    fn end_io(&mut self, res: BlkResult<usize>) -> BlkResult<usize> {
        let mut open = self.gate.0.lock_nested();
        while !*open {
            self.gate.1.wait(&mut open);
        }
        res
    }
    fn done(self, _: Buf, res: BlkResult<usize>) {
        assert!(res.is_ok());
        self.answers.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn ends_that_wait_are_bounded() {
    let config = DioConfig {
        workers: 2,
        ends: 4,
        ..DioConfig::default()
    };
    let disk = MemDisk::new("mem", SectorCount::new(64));
    let engine = DirectIo::<Gated>::new("bounded", disk, config);
    let gate = Arc::new((Mutex::new(Rank::Queue, false), Condvar::new()));
    let (sent, answers) = (AtomicUsize::new(0), Arc::new(AtomicUsize::new(0)));
    let waiting = || engine.0.done_queue.get().map_or(0, Workqueue::pending);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let dio = engine.open();
            for _ in 0..100 {
                let gated = Gated {
                    gate: gate.clone(),
                    answers: answers.clone(),
                };
                let buf = PagePool::shared().alloc(512).unwrap();
                let extents = [extent(Mapping::New, 1, 1)];
                dio.write(&extents, buf, BioFlags::empty(), gated);
                sent.fetch_add(1, Ordering::SeqCst);
            }
        });
        soon("some are sent", || sent.load(Ordering::SeqCst) >= 4);
        // It would go on now, if it could.
        let since = Instant::now();
        while since.elapsed() < Duration::from_millis(200) && waiting() <= 4 {
            std::thread::yield_now();
        }
        let most = waiting();
        *gate.0.lock_nested() = true;
        gate.1.notify_all();
        assert_eq!(most, 4);
    });
    engine.drain();
    assert_eq!(answers.load(Ordering::SeqCst), 100);
}

/// Threads of the process whose name begins so.
fn threads_named(name: &str) -> usize {
    let name = &name[..name.len().min(15)];
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let comms = tasks.filter_map(|task| std::fs::read(task.ok()?.path().join("comm")).ok());
    comms
        .filter(|comm| comm.trim_ascii_end() == name.as_bytes())
        .count()
}

#[test]
#[cfg(not(miri))]
fn first_writers_share_one_queue_that_goes_at_the_end() {
    let config = DioConfig {
        workers: 1,
        ..DioConfig::default()
    };
    for round in 0..20 {
        let disk = MemDisk::new("mem", SectorCount::new(64));
        let name = format!("once-{round}");
        let engine = DirectIo::<Closure>::new(&name, disk.clone(), config);
        let start = Barrier::new(4);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (engine, start) = (&engine, &start);
                scope.spawn(move || {
                    let dio = engine.open();
                    let mut buf = PagePool::shared().alloc(512).unwrap();
                    buf.fill(thread + 1);
                    let extents = [extent(Mapping::New, thread.into(), 1)];
                    start.wait();
                    dio.write(&extents, buf, BioFlags::empty(), Box::new(|_, _| ()));
                    dio.wait_idle();
                });
            }
        });
        let name = format!("dio/{name}");
        soon("one queue", || threads_named(&name) == 1);
        engine.shut_down();
        soon("none", || threads_named(&name) == 0);
        let content = disk.snapshot();
        assert_eq!([0, 512, 1024, 1536].map(|at| content[at]), [1, 2, 3, 4]);
        // Who comes too late is answered all the same.
        let (to, heard) = channel();
        let done = Box::new(move |_: Buf, res| to.send(res).unwrap());
        let buf = PagePool::shared().alloc(512).unwrap();
        let extents = [extent(Mapping::New, 9, 1)];
        engine.open().write(&extents, buf, BioFlags::empty(), done);
        assert_eq!(heard.recv(), Ok(Ok(512)));
    }
}
