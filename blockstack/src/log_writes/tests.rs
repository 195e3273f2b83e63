use std::io::Cursor;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use super::{
    Begun, Cached, Data, Entry, Fate, LogError, LogFlags, LogReader, LogWriter, Order, RecordDisk,
    Recorder, save,
};
use crate::backend::mem::{Image, MemDisk};
use crate::testing::crash::{CrashDisk, Timing};
use crate::testing::faulty::{FaultyDisk, Kinds, Rule};
use crate::{
    BioFlags, BioSet, BlkError, DynDevice, Op, PagePool, Sector, SectorCount, Wait, flush_wait,
    range_wait, write_wait,
};

type Log = Recorder<Vec<Entry>>;

fn begin(log: &Log, op: Op, sector: u64, flags: BioFlags) -> Begun {
    let set = BioSet::<()>::new("test", 1);
    let mut bio = set.alloc(op, Wait::Yes).unwrap();
    bio.set_dev(
        MemDisk::new("mem", SectorCount::new(1024)),
        Sector::new(sector),
    );
    if op == Op::Write {
        let mut buf = PagePool::shared().alloc(512).unwrap();
        buf.fill(sector as u8);
        bio.push(buf).unwrap();
    }
    bio.set_flags(flags);
    log.begin(&bio)
}

/// Letters of the writes' sectors, `FLUSH` and marks.
fn words(entries: &[Entry]) -> String {
    let word = |entry: &Entry| match entry.text() {
        Some(text) => text.into_owned(),
        None if entry.flags == LogFlags::FLUSH => "FLUSH".to_owned(),
        None => char::from(b'a' + entry.sector as u8).to_string(),
    };
    entries.iter().map(word).collect::<Vec<_>>().join(" ")
}

#[test]
fn plain_writes_wait_for_the_flush_that_makes_them_durable() {
    for (order, want) in [
        (Order::Kernel, "c a FLUSH d first b FLUSH e"),
        (Order::Completion, "c a FLUSH b d first FLUSH e"),
    ] {
        let log = Log::new(order, Vec::new());
        let none = BioFlags::empty();
        let [a, b, c] = [0, 1, 2].map(|sector| begin(&log, Op::Write, sector, none));
        log.end(c, Ok(()));
        log.end(a, Ok(()));
        let flush = begin(&log, Op::Flush, 0, none);
        let d = begin(&log, Op::Write, 3, BioFlags::FUA);
        log.end(b, Ok(()));
        log.end(flush, Ok(()));
        log.end(d, Ok(()));
        log.mark("first");
        let lost = begin(&log, Op::Write, 9, none);
        log.end(lost, Err(BlkError::Io));
        let flush = begin(&log, Op::Flush, 0, none);
        log.end(flush, Ok(()));
        let e = begin(&log, Op::Write, 4, none);
        log.end(e, Ok(()));
        assert_eq!(words(&log.finish()), want, "{order:?}");
    }
}

#[test]
fn a_flush_that_overtakes_another_made_durable_what_both_cover() {
    let log = Log::new(Order::Kernel, Vec::new());
    let none = BioFlags::empty();
    let a = begin(&log, Op::Write, 0, none);
    log.end(a, Ok(()));
    let older = begin(&log, Op::Flush, 0, none);
    let b = begin(&log, Op::Write, 1, none);
    log.end(b, Ok(()));
    let newer = begin(&log, Op::Flush, 0, none);
    log.end(newer, Ok(()));
    log.end(older, Ok(()));
    assert_eq!(words(&log.finish()), "a b FLUSH FLUSH");
}

#[test]
fn a_flush_that_failed_makes_nothing_durable() {
    let log = Log::new(Order::Kernel, Vec::new());
    let none = BioFlags::empty();
    let a = begin(&log, Op::Write, 0, none);
    log.end(a, Ok(()));
    let failed = begin(&log, Op::Flush, 0, none);
    let b = begin(&log, Op::Write, 1, none);
    log.end(b, Ok(()));
    log.end(failed, Err(BlkError::Io));
    let flush = begin(&log, Op::Flush, 0, none);
    log.end(flush, Ok(()));
    assert_eq!(words(&log.finish()), "a b FLUSH");
}

#[test]
fn a_flush_before_a_write_covers_what_ended_before_it() {
    let log = Log::new(Order::Kernel, Vec::new());
    let a = begin(&log, Op::Write, 0, BioFlags::empty());
    log.end(a, Ok(()));
    let commit = begin(&log, Op::Write, 1, BioFlags::PREFLUSH | BioFlags::FUA);
    let c = begin(&log, Op::Write, 2, BioFlags::empty());
    log.end(c, Ok(()));
    log.end(commit, Ok(()));
    let entries = log.finish();
    assert_eq!(words(&entries), "a FLUSH b c");
    assert_eq!(entries[2].flags, LogFlags::FUA);
}

fn some_log() -> (Image, Vec<Entry>, Image) {
    let size = SectorCount::new(512);
    let mem = MemDisk::new("mem", size);
    let log = Arc::new(Log::new(Order::Kernel, Vec::new()));
    let dev: DynDevice = RecordDisk::new(mem.clone(), log.clone());
    let put = |sector: u64, sectors: usize, tag: u8, flags| {
        let mut buf = PagePool::shared().alloc(sectors * 512).unwrap();
        buf.fill(tag);
        drop(write_wait(&dev, Sector::new(sector), buf, flags).unwrap());
    };
    put(0, 8, 1, BioFlags::empty());
    put(4, 2, 2, BioFlags::META);
    log.mark("a mark");
    flush_wait(&dev).unwrap();
    put(8, 16, 3, BioFlags::PREFLUSH | BioFlags::FUA);
    range_wait(&dev, Op::WriteZeroes, Sector::new(10), SectorCount::new(3)).unwrap();
    range_wait(&dev, Op::Discard, Sector::new(20), SectorCount::new(2)).unwrap();
    put(500, 12, 4, BioFlags::empty());
    (Image::zeroed(size), log.finish(), mem.image())
}

#[test]
fn a_log_applied_gives_what_the_device_below_has() {
    let (start, entries, end) = some_log();
    let mut cached = Cached::new(start);
    entries.iter().for_each(|entry| cached.apply(entry));
    assert_eq!(cached.outcome(&[]), end);
    let lost = vec![Fate::Lost; cached.uncertain().len()];
    assert_eq!(cached.outcome(&lost), *cached.durable());
    assert_eq!(cached.uncertain().collect::<Vec<_>>(), [3, 2, 12]);
    let torn = [Fate::Kept, Fate::Kept, Fate::Torn(vec![1..2, 9..99])];
    let image = cached.outcome(&torn);
    let tags: Vec<u8> = (500..512)
        .map(|sector| {
            let mut bytes = [0; 512];
            image.read_at(sector * 512, &mut bytes);
            bytes[0]
        })
        .collect();
    assert_eq!(tags, [0, 4, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4]);
}

/// As a disk with a cache of its own tells it, for any order of completion.
#[test]
fn the_log_of_a_disk_that_shuffles_leaves_what_the_disk_does() {
    for seed in 0..20 {
        let timing = Timing::Shuffled { seed };
        let crash = CrashDisk::from_image("crash", Image::zeroed(SectorCount::new(64)), timing);
        for order in [Order::Kernel, Order::Completion] {
            let log = Arc::new(Log::new(order, Vec::new()));
            let dev: DynDevice = RecordDisk::new(crash.clone(), log.clone());
            let mut cached = Cached::new(crash.live());
            std::thread::scope(|scope| {
                for thread in 0..4u8 {
                    let dev = &dev;
                    scope.spawn(move || {
                        for step in 0..20u8 {
                            let mut buf = PagePool::shared().alloc(512).unwrap();
                            buf.fill(thread * 32 + step);
                            let at = Sector::new(u64::from(thread * 8 + step % 8));
                            let flags = match step % 5 {
                                0 => BioFlags::FUA,
                                1 => BioFlags::PREFLUSH,
                                _ => BioFlags::empty(),
                            };
                            drop(write_wait(dev, at, buf, flags).unwrap());
                        }
                    });
                }
            });
            flush_wait(&dev).unwrap();
            log.finish().iter().for_each(|entry| cached.apply(entry));
            assert_eq!(cached.uncertain().len(), 0);
            assert_eq!(*cached.durable(), crash.live(), "seed {seed}");
        }
    }
}

#[test]
fn what_failed_below_is_not_in_the_log() {
    let (disk, faults) = FaultyDisk::new(MemDisk::new("mem", SectorCount::new(64)));
    let log = Arc::new(Log::new(Order::Kernel, Vec::new()));
    let dev: DynDevice = RecordDisk::new(disk, log.clone());
    faults.add(Rule::nth(0).of(Kinds::WRITE));
    let buf = PagePool::shared().alloc_zeroed(512).unwrap();
    assert!(write_wait(&dev, Sector::ZERO, buf, BioFlags::FUA).is_err());
    assert!(log.finish().is_empty());
}

fn bytes_of(entries: &[Entry], sector_size: u32) -> Vec<u8> {
    let mut writer = LogWriter::new(Cursor::new(Vec::new()), sector_size).unwrap();
    for entry in entries {
        writer.append(entry).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

fn parse(bytes: &[u8]) -> Result<Vec<Entry>, LogError> {
    LogReader::new(bytes)?.collect()
}

#[test]
fn a_log_is_read_as_it_was_written() {
    let (_, mut entries, _) = some_log();
    assert_eq!(parse(&bytes_of(&entries, 512)).unwrap(), entries);
    entries.retain(|entry| entry.sector % 8 == 0 && entry.sectors % 8 == 0);
    let bytes = bytes_of(&entries, 4096);
    assert_eq!(parse(&bytes).unwrap(), entries);
    assert_eq!(bytes.len() % 4096, 0);
}

#[test]
fn what_is_wrong_with_a_log_is_named() {
    let (_, entries, _) = some_log();
    let good = bytes_of(&entries, 512);
    let damaged = |at: usize, value: u64| {
        let mut bytes = good.clone();
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        parse(&bytes).unwrap_err()
    };
    assert!(matches!(damaged(0, 7), LogError::Magic { found: 7 }));
    assert!(matches!(damaged(8, 2), LogError::Version { found: 2 }));
    assert!(matches!(
        damaged(24, 513),
        LogError::SectorSize { found: 513 }
    ));
    assert!(matches!(damaged(16, 1 << 60), LogError::Truncated { .. }));
    let mark = 512;
    assert!(matches!(
        damaged(mark + 24, 481),
        LogError::Mark {
            entry: 0,
            len: 481,
            most: 480
        }
    ));
    assert!(matches!(
        damaged(mark + 16, 0),
        LogError::Empty { entry: 0 }
    ));
    assert!(matches!(
        damaged(mark + 16, 64),
        LogError::Flags {
            entry: 0,
            flags: 64
        }
    ));
    let write = 1024;
    assert!(matches!(
        damaged(write, u64::MAX),
        LogError::Range { entry: 1, .. }
    ));
    // As much as there can be, and no memory taken for it.
    assert!(matches!(
        damaged(write + 8, 1 << 50),
        LogError::Truncated { entry: 1 }
    ));
    for len in 0..good.len() {
        assert!(parse(&good[..len]).is_err(), "{len} bytes of it were taken");
    }
}

#[test]
fn no_bytes_make_the_reader_panic() {
    let (_, entries, _) = some_log();
    let good = bytes_of(&entries, 512);
    let mut state = 1u64;
    for _ in 0..3000 {
        let mut bytes = good.clone();
        for _ in 0..4 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let entry = (state >> 40) as usize % (good.len() / 512);
            bytes[entry * 512 + (state >> 33) as usize % 32] = (state >> 56) as u8;
        }
        if let Ok(entries) = parse(&bytes) {
            let mut cached = Cached::new(Image::zeroed(SectorCount::new(512)));
            entries.iter().for_each(|entry| cached.apply(entry));
            drop(cached.outcome(&[Fate::Torn(std::iter::once(0..1).collect())]));
        }
    }
}

#[test]
fn a_mark_is_cut_to_what_fits_a_sector() {
    let long = "m".repeat(1000);
    let read = parse(&bytes_of(&[Entry::mark(&long)], 512)).unwrap();
    assert_eq!(read[0].data.len(), 479);
    assert_eq!(
        parse(&bytes_of(&[Entry::mark("")], 512)).unwrap()[0].text(),
        Some("".into())
    );
    let odd = Entry {
        sector: 1,
        sectors: 8,
        flags: LogFlags::empty(),
        data: Data::Zeros(4096),
    };
    let mut writer = LogWriter::new(Cursor::new(Vec::new()), 4096).unwrap();
    assert!(matches!(writer.append(&odd), Err(LogError::Range { .. })));
}

/// The judge is xfstests' `src/log-writes/replay-log`, where `REPLAY_LOG` names it.
#[test]
#[cfg_attr(miri, ignore = "runs a program")]
fn xfstests_replays_our_log() {
    let Some(program) = std::env::var_os("REPLAY_LOG") else {
        println!("SKIPPED: REPLAY_LOG names no replay-log of xfstests");
        return;
    };
    let (start, entries, end) = some_log();
    let dir = tempfile::tempdir().unwrap();
    let (log, disk) = (dir.path().join("log"), dir.path().join("disk"));
    save(&entries, &log).unwrap();
    let run = |args: &[&str]| {
        let mut command = Command::new(&program);
        command.arg("--log").arg(&log).args(args);
        let out = command.output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.success(), "{args:?}: {text}");
        text
    };
    let replayed = |args: &[&str]| {
        start.save(Path::new(&disk)).unwrap();
        run(&[&["--replay", disk.to_str().unwrap()], args].concat());
        Image::open(&disk).unwrap()
    };
    assert_eq!(run(&["--num-entries"]).trim(), entries.len().to_string());
    let found = run(&["--find", "--end-mark", "a mark"]);
    assert!(found.trim().starts_with('0'), "{found}");
    assert_eq!(replayed(&[]), end);
    for limit in 1..=entries.len() {
        let mut cached = Cached::new(start.clone());
        entries[..limit]
            .iter()
            .for_each(|entry| cached.apply(entry));
        let image = replayed(&["--limit", &limit.to_string()]);
        assert_eq!(image, cached.outcome(&[]), "{limit} entries");
    }
}

/// A log that the kernel wrote, and the disk it left, where `KERNEL_LOG` and `KERNEL_DISK` name
/// them; the log has the mark `end` among others.
#[test]
#[cfg_attr(miri, ignore = "reads files")]
fn a_log_of_the_kernel_leaves_the_disk_that_the_kernel_left() {
    let names = ["KERNEL_LOG", "KERNEL_DISK"].map(std::env::var_os);
    let [Some(log), Some(disk)] = names else {
        println!("SKIPPED: KERNEL_LOG and KERNEL_DISK name nothing");
        return;
    };
    let entries = super::load(Path::new(&log)).unwrap();
    let disk = Image::open(disk).unwrap();
    let mut cached = Cached::new(Image::zeroed(disk.size()));
    entries.iter().for_each(|entry| cached.apply(entry));
    assert_eq!(cached.outcome(&[]), disk);
    assert!(
        entries
            .iter()
            .any(|entry| entry.text().as_deref() == Some("end"))
    );
    // And we write it as the kernel did.
    let dir = tempfile::tempdir().unwrap();
    let ours = dir.path().join("log");
    save(&entries, &ours).unwrap();
    let (ours, kernels) = (std::fs::read(ours).unwrap(), std::fs::read(&log).unwrap());
    assert!(
        kernels.starts_with(&ours),
        "our log of the same has other bytes"
    );
}
