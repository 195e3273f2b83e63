use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::backend::mem::MemDisk;
use crate::testing::faulty::{FaultyDisk, Kinds, Rule};
use crate::{
    Bio, BioFlags, BioSet, BlkError, BlkResult, DynDevice, Op, PagePool, Sector, SectorCount, Wait,
    submit_bio,
};

type Log = Arc<Mutex<Vec<(BlkResult, usize)>>>;

#[derive(Default)]
struct LogPad(Option<Log>);

fn note(mut bio: Bio, res: BlkResult) {
    let log = bio.pad_mut::<LogPad>().0.take().unwrap();
    let bufs = bio.take_bufs().count();
    log.lock().push((res, bufs));
}

fn bio(set: &BioSet<LogPad>, op: Op, bytes: usize, dev: Option<&DynDevice>) -> (Bio, Log) {
    let mut bio = set.alloc(op, Wait::Yes).unwrap();
    let log = Log::default();
    bio.pad_mut::<LogPad>().0 = Some(log.clone());
    bio.set_end_io(note);
    bio.push(PagePool::shared().alloc_zeroed(bytes).unwrap())
        .unwrap();
    if let Some(dev) = dev {
        bio.set_dev(dev.clone(), Sector::new(8));
    }
    (bio, log)
}

fn disk() -> DynDevice {
    MemDisk::new("mem", SectorCount::new(64))
}

#[test]
fn a_dropped_bio_ends_once_with_an_error() {
    let set = BioSet::new("test", 2);
    let (bio, log) = bio(&set, Op::Write, 4096, Some(&disk()));
    drop(bio);
    assert_eq!(*log.lock(), [(Err(BlkError::Io), 1)]);
    assert_eq!(set.in_use(), 0);
}

#[test]
fn a_bio_that_was_never_submitted_just_goes_back() {
    let set = BioSet::new("test", 2);
    let (bio, log) = bio(&set, Op::Write, 4096, None);
    drop(bio);
    assert!(log.lock().is_empty());
    assert_eq!(set.in_use(), 0);
}

#[test]
fn the_owner_hears_after_the_last_piece_and_of_the_first_error() {
    let (set, pieces) = (BioSet::new("test", 1), BioSet::new("pieces", 8));
    let (mut rest, log) = bio(&set, Op::Read, 4096, Some(&disk()));
    let front = SectorCount::new(1);
    let first = rest.split(front, &pieces, Wait::Yes).unwrap();
    let mut second = rest.split(SectorCount::new(4), &pieces, Wait::Yes).unwrap();
    assert_eq!(
        (second.sector(), second.len()),
        (Sector::new(9), SectorCount::new(4))
    );
    assert_eq!(
        (rest.sector(), rest.len()),
        (Sector::new(13), SectorCount::new(3))
    );
    // A piece can be split again further down.
    let inner = second
        .split(SectorCount::new(2), &pieces, Wait::Yes)
        .unwrap();
    rest.complete(Ok(()));
    second.complete(Ok(()));
    inner.complete(Err(BlkError::TimedOut));
    assert!(log.lock().is_empty());
    first.complete(Err(BlkError::NoSpace));
    assert_eq!(*log.lock(), [(Err(BlkError::TimedOut), 1)]);
    assert_eq!((set.in_use(), pieces.in_use()), (0, 0));
    // The same bio, split anew, has forgotten all that.
    let (mut rest, log) = bio(&set, Op::Read, 4096, Some(&disk()));
    let mut piece = rest.split(front, &pieces, Wait::Yes).unwrap();
    let inner = piece.split(front, &pieces, Wait::Yes);
    assert!(inner.is_none(), "a split at the end of a bio");
    piece.complete(Ok(()));
    rest.complete(Ok(()));
    assert_eq!(*log.lock(), [(Ok(()), 1)]);
}

/// Nothing but the count of pieces orders what one thread read into its piece before what another
/// does as the owner: the flag only tells who is last. ThreadSanitizer reports a count that does not.
#[test]
fn the_owner_sees_what_each_piece_read() {
    fn look(mut bio: Bio, res: BlkResult) {
        let log = bio.pad_mut::<LogPad>().0.take().unwrap();
        let buf = bio.take_buf().unwrap();
        let read = buf.iter().filter(|&&byte| byte == 7).count();
        log.lock().push((res, read));
    }
    let (set, pieces) = (BioSet::new("test", 1), BioSet::new("pieces", 1));
    let (mut rest, log) = bio(&set, Op::Read, 4096, Some(&disk()));
    rest.set_end_io(look);
    let mut front = rest.split(SectorCount::new(3), &pieces, Wait::Yes).unwrap();
    let (front_ended, over) = (AtomicBool::new(false), AtomicBool::new(false));
    let wait_for = |flag: &AtomicBool| {
        let begun = Instant::now();
        while !flag.load(Ordering::Relaxed) {
            assert!(begun.elapsed() < Duration::from_secs(60), "stuck");
            std::thread::yield_now();
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            front.fill_each(|_, bytes| bytes.fill(7));
            front.complete(Ok(()));
            front_ended.store(true, Ordering::Relaxed);
            // The end of a thread is an order too.
            wait_for(&over);
        });
        scope.spawn(|| {
            rest.fill_each(|_, bytes| bytes.fill(7));
            wait_for(&front_ended);
            rest.complete(Ok(()));
            over.store(true, Ordering::Relaxed);
        });
    });
    assert_eq!(*log.lock(), [(Ok(()), 4096)]);
}

#[test]
fn a_dropped_piece_is_an_error_of_the_whole() {
    for drop_rest in [false, true] {
        let (set, pieces) = (BioSet::new("test", 1), BioSet::new("pieces", 1));
        let (mut rest, log) = bio(&set, Op::Read, 4096, Some(&disk()));
        let piece = rest.split(SectorCount::new(3), &pieces, Wait::Yes).unwrap();
        if drop_rest {
            piece.complete(Ok(()));
            drop(rest);
        } else {
            drop(piece);
            rest.complete(Ok(()));
        }
        assert_eq!(*log.lock(), [(Err(BlkError::Io), 1)]);
        assert_eq!((set.in_use(), pieces.in_use()), (0, 0));
    }
}

#[test]
fn flags_of_pieces_keep_their_meaning() {
    let (set, pieces) = (BioSet::new("test", 1), BioSet::new("pieces", 1));
    let (mut rest, _) = bio(&set, Op::Write, 4096, Some(&disk()));
    rest.set_flags(BioFlags::PREFLUSH | BioFlags::FUA | BioFlags::META);
    let piece = rest.split(SectorCount::new(3), &pieces, Wait::Yes).unwrap();
    assert_eq!(
        piece.flags(),
        BioFlags::PREFLUSH | BioFlags::FUA | BioFlags::META
    );
    assert_eq!(rest.flags(), BioFlags::FUA | BioFlags::META);
}

#[test]
fn what_submission_refuses_ends_with_the_reason() {
    let (faulty, faults) = FaultyDisk::new(disk());
    faults.add(Rule::all().of(Kinds::READ).with(BlkError::Protection));
    let faulty: DynDevice = faulty;
    let cases: [(Op, u64, Option<&DynDevice>, BlkError); 4] = [
        (Op::Read, 8, Some(&faulty), BlkError::Protection),
        (Op::Write, 57, Some(&faulty), BlkError::OutOfRange),
        (Op::Write, u64::MAX, Some(&faulty), BlkError::OutOfRange),
        (Op::Write, 0, None, BlkError::NoDevice),
    ];
    let set = BioSet::new("test", 1);
    for (op, sector, dev, expected) in cases {
        let (mut bio, log) = bio(&set, op, 4096, dev);
        if let Some(dev) = dev {
            bio.set_dev(dev.clone(), Sector::new(sector));
        }
        submit_bio(bio);
        assert_eq!(*log.lock(), [(Err(expected), 1)]);
    }
}

#[test]
fn a_bio_is_used_again_by_its_owner() {
    let set = BioSet::<LogPad>::new("test", 1);
    let mut own = set.alloc_own();
    let held = Arc::new(Mutex::new(None));
    #[derive(Default)]
    struct Keep(Option<Arc<Mutex<Option<Bio>>>>);
    drop(own);
    own = BioSet::<Keep>::new("keep", 1).alloc_own();
    fn keep(mut bio: Bio, res: BlkResult) {
        res.unwrap();
        let place = bio.pad_mut::<Keep>().0.take().unwrap();
        *place.lock() = Some(bio);
    }
    let dev = disk();
    for round in 0..3u8 {
        own.reset(if round == 0 { Op::Write } else { Op::Read });
        let mut buf = PagePool::shared().alloc(512).unwrap();
        buf.fill(if round == 0 { 7 } else { 0 });
        own.push(buf).unwrap();
        own.set_end_io(keep);
        own.set_dev(dev.clone(), Sector::new(3));
        own.pad_mut::<Keep>().0 = Some(held.clone());
        submit_bio(own);
        own = held.lock().take().unwrap();
        assert_eq!(own.take_buf().unwrap()[0], 7);
    }
    assert_eq!(set.in_use(), 0);
}

#[test]
fn devices_count_what_they_have_in_flight() {
    let lower = disk();
    let (faulty, faults) = FaultyDisk::new(lower.clone());
    let top: DynDevice = faulty;
    let set = BioSet::new("test", 3);
    faults.hold();
    let logs: Vec<_> = (0..3)
        .map(|_| {
            let (bio, log) = bio(&set, Op::Read, 4096, Some(&top));
            submit_bio(bio);
            log
        })
        .collect();
    assert_eq!(top.stats().snapshot().in_flight, 3);
    faults.add(Rule::nth(1));
    faults.release();
    let results: Vec<_> = logs.iter().map(|log| log.lock()[0].0).collect();
    assert_eq!(results, [Ok(()), Err(BlkError::Io), Ok(())]);
    let (top, lower) = (top.stats().snapshot(), lower.stats().snapshot());
    assert_eq!(
        (top.reads, top.sectors_read, top.in_flight, top.failed),
        (3, 24, 0, 1)
    );
    assert_eq!((lower.reads, lower.in_flight, lower.failed), (2, 0, 0));
    assert_eq!(top.latency.iter().sum::<u64>(), 1);
}

#[test]
fn a_bio_sent_on_is_no_longer_in_flight_above() {
    let (first, second) = (disk(), disk());
    let set = BioSet::new("test", 1);
    let (mut bio, log) = bio(&set, Op::Write, 512, Some(&first));
    first.stats().start(&mut bio);
    bio.set_dev(second.clone(), Sector::ZERO);
    submit_bio(bio);
    assert_eq!(log.lock().len(), 1);
    assert_eq!(
        (
            first.stats().snapshot().in_flight,
            first.stats().snapshot().writes
        ),
        (0, 1)
    );
    assert_eq!(
        (
            second.stats().snapshot().in_flight,
            second.stats().snapshot().writes
        ),
        (0, 1)
    );
}

#[test]
fn a_piece_that_was_never_submitted_is_back_before_its_owner_hears() {
    #[derive(Default)]
    struct Pieces {
        set: Option<BioSet<()>>,
        seen: Arc<Mutex<Option<usize>>>,
    }
    fn end(mut bio: Bio, _: BlkResult) {
        let pad = bio.pad_mut::<Pieces>();
        let in_use = pad.set.as_ref().map(BioSet::in_use);
        *pad.seen.lock() = in_use;
    }
    let pieces = BioSet::<()>::new("pieces", 1);
    let seen = Arc::default();
    let set = BioSet::<Pieces>::new("test", 1);
    let mut bio = set.alloc(Op::Discard, Wait::Yes).unwrap();
    bio.set_len(SectorCount::new(2));
    bio.set_end_io(end);
    *bio.pad_mut() = Pieces {
        set: Some(pieces.clone()),
        seen: Arc::clone(&seen),
    };
    let piece = bio.split(SectorCount::new(1), &pieces, Wait::Yes).unwrap();
    bio.complete(Ok(()));
    drop(piece);
    // An owner that takes another piece here would wait for the one that just ended.
    assert_eq!(*seen.lock(), Some(0));
}
