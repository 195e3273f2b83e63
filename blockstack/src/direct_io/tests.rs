use std::sync::mpsc::{Sender, channel};

use super::{Dio, DioConfig, DioDone, DirectIo, Extent, Mapping};
use crate::backend::mem::MemDisk;
use crate::testing::faulty::FaultyDisk;
use crate::{BioFlags, BlkError, BlkResult, Buf, PagePool, Sector, SectorCount};

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
    type Closure = Box<dyn FnOnce(Buf, BlkResult<usize>) + Send>;
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
    type Closure = Box<dyn FnOnce(Buf, BlkResult<usize>) + Send>;
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
    let frozen: crate::DynDevice = disk;
    let other: crate::DynDevice = MemDisk::new("mem", SectorCount::new(64));
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
