use std::sync::Arc;

use super::{CrashDisk, Timing};
use crate::backend::mem::{Image, MemDisk};
use crate::testing::faulty::{FaultyDisk, Kinds, Rule};
use crate::testing::observer::{Event, Observer};
use crate::{
    BioFlags, BlkError, BlockDevice, DynDevice, Op, PagePool, Sector, SectorCount, flush_wait,
    range_wait, read_wait, write_wait,
};

fn put(dev: &DynDevice, sector: u64, sectors: usize, tag: u8, flags: BioFlags) {
    let mut buf = PagePool::shared().alloc(sectors * 512).unwrap();
    buf.fill(tag);
    write_wait(dev, Sector::new(sector), buf, flags).unwrap();
}

fn tag(image: &Image, sector: u64) -> u8 {
    let mut bytes = [0; 512];
    image.read_at(sector as usize * 512, &mut bytes);
    assert!(
        bytes.iter().all(|&byte| byte == bytes[0]),
        "torn within a sector"
    );
    bytes[0]
}

#[test]
fn flushed_and_fua_writes_stay_and_others_may_go() {
    for timing in [Timing::AtOnce, Timing::Shuffled { seed: 7 }] {
        let image = Image::zeroed(SectorCount::new(1024));
        let crash = CrashDisk::from_image("crash", image, timing);
        let dev: DynDevice = crash.clone();
        put(&dev, 0, 8, 1, BioFlags::empty());
        flush_wait(&dev).unwrap();
        put(&dev, 8, 8, 2, BioFlags::FUA);
        put(&dev, 16, 8, 3, BioFlags::empty());
        put(&dev, 0, 1, 4, BioFlags::empty());
        assert_eq!(tag(&crash.live(), 0), 4);
        let mut seen = [[0u32; 5]; 32];
        for seed in 0..500 {
            let image = crash.point().image(seed);
            assert_eq!(image, crash.point().image(seed));
            for (sector, seen) in seen.iter_mut().enumerate() {
                seen[usize::from(tag(&image, sector as u64))] += 1;
            }
        }
        assert!(seen[0][1] > 100 && seen[0][4] > 100 && seen[0][0] == 0);
        assert!(seen[1..8].iter().all(|seen| seen[1] == 500));
        assert!(seen[8..16].iter().all(|seen| seen[2] == 500));
        assert!(seen[16..24].iter().all(|seen| seen[0] > 50 && seen[3] > 50));
    }
}

#[test]
fn an_older_write_does_not_undo_a_durable_one() {
    let crash = CrashDisk::new("crash", SectorCount::new(64));
    let dev: DynDevice = crash.clone();
    put(&dev, 0, 8, 1, BioFlags::empty());
    put(&dev, 2, 2, 2, BioFlags::FUA);
    for seed in 0..200 {
        let image = crash.point().image(seed);
        assert_eq!((tag(&image, 2), tag(&image, 3)), (2, 2));
    }
}

#[test]
fn points_are_taken_while_the_disk_works() {
    let crash = CrashDisk::new("crash", SectorCount::new(256 << 11));
    let dev: DynDevice = crash.clone();
    crash.arm_every(1);
    for i in 0..200u64 {
        put(&dev, i * 2000, 8, i as u8, BioFlags::empty());
        if i % 10 == 9 {
            flush_wait(&dev).unwrap();
        }
    }
    range_wait(&dev, Op::Discard, Sector::ZERO, SectorCount::new(256 << 11)).unwrap();
    let points = crash.take_points();
    assert_eq!(points.len(), 221);
    let started = std::time::Instant::now();
    for (n, point) in points.iter().enumerate() {
        assert_eq!(point.ops, n as u64 + 1);
        for seed in 0..5 {
            let disk = MemDisk::from_image("after", point.image(seed));
            assert_eq!(disk.capacity(), crash.capacity());
        }
    }
    let spent = started.elapsed();
    assert!(spent.as_secs() < 10, "1105 cuts of 256 MiB took {spent:?}");
    assert_eq!(crash.crash_image(1).len(), 256 << 20);
}

#[test]
fn the_flush_before_a_write_comes_first_also_when_shuffled() {
    let mut torn = 0;
    for seed in 0..300 {
        let image = Image::zeroed(SectorCount::new(64));
        let crash = CrashDisk::from_image("crash", image, Timing::Shuffled { seed });
        let dev: DynDevice = crash.clone();
        crash.arm_every(1);
        put(&dev, 0, 8, 1, BioFlags::empty());
        put(&dev, 8, 1, 2, BioFlags::PREFLUSH | BioFlags::FUA);
        for point in crash.take_points() {
            let image = point.image(seed);
            if tag(&image, 8) == 2 {
                assert!((0..8).all(|sector| tag(&image, sector) == 1), "seed {seed}");
            } else {
                torn += 1;
            }
        }
    }
    assert!(torn > 0);
}

#[test]
fn a_fault_at_every_position_is_reported_once() {
    let workload = |dev: &DynDevice| -> Result<(), BlkError> {
        for i in 0..5u64 {
            let buf = PagePool::shared().alloc_zeroed(1024)?;
            let buf = write_wait(dev, Sector::new(i * 2), buf, BioFlags::empty())?;
            flush_wait(dev)?;
            read_wait(dev, Sector::new(i * 2), buf)?;
        }
        Ok(())
    };
    let (disk, faults) = FaultyDisk::new(MemDisk::new("mem", SectorCount::new(64)));
    let dev: DynDevice = disk;
    workload(&dev).unwrap();
    assert_eq!(faults.seen(), 15);
    for n in 0..15 {
        faults.clear();
        faults.add(Rule::nth(n).with(BlkError::TimedOut));
        assert_eq!(workload(&dev), Err(BlkError::TimedOut));
        assert_eq!((faults.seen(), faults.failed()), (n + 1, 1));
        workload(&dev).unwrap();
    }
    for (rule, expected) in [
        (Rule::all().of(Kinds::DISCARD), Ok(())),
        (Rule::all().of(Kinds::BARRIER), Ok(())),
        (Rule::all().of(Kinds::READ).at(9..10), Err(BlkError::Io)),
        (Rule::all().of(Kinds::WRITE).at(10..99), Ok(())),
        (Rule::nth(4).of(Kinds::FLUSH).for_ever(), Err(BlkError::Io)),
    ] {
        faults.clear();
        faults.add(rule);
        assert_eq!(workload(&dev), expected);
    }
}

#[test]
fn every_start_has_one_end() {
    let log = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let to = log.clone();
    let (disk, faults) = FaultyDisk::new(MemDisk::new("mem", SectorCount::new(64)));
    let dev: DynDevice = Observer::new(disk, Arc::new(move |event| to.lock().push(event)));
    faults.add(Rule::nth(1));
    put(&dev, 0, 1, 1, BioFlags::FUA);
    assert_eq!(flush_wait(&dev), Err(BlkError::Io));
    let log = log.lock();
    let seen: Vec<_> = log
        .iter()
        .map(|event| match event {
            Event::Start { id, asked } => (*id, asked.op, asked.flags, None),
            Event::End { id, asked, res } => (*id, asked.op, asked.flags, Some(*res)),
        })
        .collect();
    let (fua, sync) = (BioFlags::FUA | BioFlags::SYNC, BioFlags::empty());
    assert_eq!(
        seen,
        [
            (0, Op::Write, fua, None),
            (0, Op::Write, fua, Some(Ok(()))),
            (1, Op::Flush, sync, None),
            (1, Op::Flush, sync, Some(Err(BlkError::Io))),
        ]
    );
}
