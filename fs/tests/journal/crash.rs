//! Power cuts: what replay gives must be a state that existed, and no older than what was promised.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use blockstack::backend::mem::{Image, MemDisk};
use blockstack::testing::crash::{CrashDisk, CrashPoint, Timing};
use blockstack::{BioFlags, DynDevice, PagePool, Sector, write_wait};
use bufio::Validator;
use fs::MountOptions;
use fs::journal::{CommitHooks, FreedRange, JournalExtent, Log};

use crate::support::{
    Random, Rig, Scratch, TailSum, block_size, fill, fs_blocks, is_filled, journal_extents,
    set_needs_recovery,
};

/// Blocks at the end of the image, free as far as the file system knows.
const SCRATCH: u64 = 160;

#[derive(Clone, Copy, Debug)]
enum Event {
    /// Metadata with this stamp, from operation `op` on.
    Meta {
        op: u64,
        stamp: u64,
    },
    Freed {
        op: u64,
    },
    /// Written as data, not through the journal.
    Data {
        stamp: u64,
        begun: u64,
        ended: u64,
    },
}

/// What happened to each scratch block, oldest first.
struct History {
    first: u64,
    blocks: Vec<Vec<Event>>,
    /// Operation `.0` was durable when `.1` operations of the disk had begun.
    promises: Vec<(u64, u64)>,
}

#[derive(Default)]
struct Freed(Mutex<Vec<u64>>);

impl CommitHooks for Freed {
    fn committed(&self, _: u32, freed: &[FreedRange]) {
        self.0
            .lock()
            .unwrap()
            .extend(freed.iter().map(|range| range.start));
    }
}

struct Made {
    scratch: Scratch,
    image: Vec<u8>,
    extents: Vec<JournalExtent>,
}

fn make(args: &[&str]) -> Made {
    let scratch = Scratch::new();
    let path: PathBuf = scratch.mkfs("image", 16, args);
    let mut image = std::fs::read(&path).unwrap();
    let extents = journal_extents(&path);
    set_needs_recovery(&mut image);
    Made {
        scratch,
        image,
        extents,
    }
}

fn write_data(disk: &Arc<CrashDisk>, size: usize, block: u64, stamp: u64) -> (u64, u64) {
    let begun = disk.ops();
    let mut buf = PagePool::shared().alloc(size).unwrap();
    fill(&mut buf, stamp, block);
    TailSum.prepare(block, &mut buf);
    let sector = Sector::new(block * size as u64 / 512);
    let dev: DynDevice = disk.clone();
    drop(write_wait(&dev, sector, buf, BioFlags::FUA).unwrap());
    (begun, disk.ops())
}

/// Runs `ops` operations, each one handle, and leaves without a shutdown.
fn work(made: &Made, disk: &Arc<CrashDisk>, seed: u64, ops: Range<u64>) -> History {
    let dev: DynDevice = disk.clone();
    let rig = Rig::open(
        &dev,
        &made.image[1024..2048],
        &made.extents,
        MountOptions::default(),
    )
    .unwrap();
    let freed = Arc::new(Freed::default());
    rig.journal.set_commit_hooks(freed.clone());
    let size = block_size(&made.image) as usize;
    let first = fs_blocks(&made.image) - SCRATCH;
    let sum: Arc<dyn Validator> = Arc::new(TailSum);
    let mut history = History {
        first,
        blocks: vec![Vec::new(); SCRATCH as usize],
        promises: Vec::new(),
    };
    // Block in use by metadata, by data, free, or waiting for its free to commit.
    let mut meta: Vec<u64> = Vec::new();
    let mut data: Vec<u64> = Vec::new();
    let mut free: Vec<u64> = (first + 1..first + SCRATCH).collect();
    let mut random = Random(seed);
    let events = |history: &mut History, block: u64, event| {
        history.blocks[(block - first) as usize].push(event);
    };
    let start = ops.start;
    for op in ops {
        free.append(&mut freed.0.lock().unwrap());
        let handle = rig.journal.start(24).unwrap();
        let tid = handle.tid();
        // The clock: each operation leaves a trace, in a block that is in every transaction.
        let clock = if op == start {
            handle.create(first, &sum).unwrap()
        } else {
            rig.core.bufs.read(first, &sum).unwrap()
        };
        fill(&mut handle.write(&clock).unwrap(), op, first);
        events(&mut history, first, Event::Meta { op, stamp: op });
        for _ in 0..random.below(12) {
            match random.below(10) {
                0..5 if !meta.is_empty() => {
                    let block = meta[random.below(meta.len() as u64) as usize];
                    let buffer = rig.core.bufs.read(block, &sum).unwrap();
                    fill(&mut handle.write(&buffer).unwrap(), op, block);
                    events(&mut history, block, Event::Meta { op, stamp: op });
                }
                5..7 if !free.is_empty() => {
                    let block = free.swap_remove(random.below(free.len() as u64) as usize);
                    let buffer = handle.create(block, &sum).unwrap();
                    fill(&mut handle.write(&buffer).unwrap(), op, block);
                    meta.push(block);
                    events(&mut history, block, Event::Meta { op, stamp: op });
                }
                7 if !meta.is_empty() => {
                    let block = meta.swap_remove(random.below(meta.len() as u64) as usize);
                    handle.forget(block).unwrap();
                    handle.free_after_commit(block, 1);
                    events(&mut history, block, Event::Freed { op });
                }
                8 if !free.is_empty() => {
                    let block = free.swap_remove(random.below(free.len() as u64) as usize);
                    let stamp = op + (1 << 40);
                    let (begun, ended) = write_data(disk, size, block, stamp);
                    data.push(block);
                    events(
                        &mut history,
                        block,
                        Event::Data {
                            stamp,
                            begun,
                            ended,
                        },
                    );
                }
                9 if !data.is_empty() => {
                    free.push(data.swap_remove(random.below(data.len() as u64) as usize));
                }
                _ => {}
            }
        }
        handle.stop().unwrap();
        match random.below(40) {
            0 => {
                rig.journal.commit_wait(tid).unwrap();
                history.promises.push((op, disk.ops()));
            }
            1..4 => rig.journal.start_commit(tid),
            _ => {}
        }
    }
    history
}

/// Checks a recovered image; gives the last operation it has.
fn check(history: &History, image: &[u8], size: usize, at: u64) -> u64 {
    let content = |index: usize| {
        let from = (history.first as usize + index) * size;
        &image[from..from + size]
    };
    let clock = u64::from_le_bytes(content(0)[8..16].try_into().unwrap());
    let reached = if is_filled(content(0), clock, history.first) {
        clock
    } else {
        0
    };
    let promised = history
        .promises
        .iter()
        .filter(|promise| promise.1 < at)
        .map(|promise| promise.0);
    let promised = promised.max().unwrap_or(0);
    assert!(
        reached >= promised,
        "state after {reached}, but {promised} was promised"
    );
    for (index, events) in history.blocks.iter().enumerate() {
        let block = history.first + index as u64;
        let mut expect: Option<u64> = None;
        for event in events {
            match *event {
                Event::Meta { op, stamp } if op <= reached => expect = Some(stamp),
                Event::Freed { op } if op <= reached => expect = None,
                Event::Meta { .. } => break,
                // The free may or may not have committed.
                Event::Freed { .. } => {}
                Event::Data {
                    stamp,
                    begun,
                    ended,
                } => {
                    if ended < at {
                        expect = Some(stamp);
                    } else if begun <= at {
                        expect = None;
                    }
                }
            }
        }
        if let Some(stamp) = expect {
            assert!(
                is_filled(content(index), stamp, block),
                "block {block}: expected {stamp:#x} in the state after {reached}, found {:02x?}; {events:x?}",
                &content(index)[..24],
            );
        }
    }
    reached
}

fn recover(made: &Made, image: Image) -> Vec<u8> {
    let size = block_size(&made.image);
    let disk = MemDisk::from_image("recovered", image);
    let dev: DynDevice = disk.clone();
    let mut log = Log::open(dev, size, fs_blocks(&made.image), &made.extents).unwrap();
    log.recover().unwrap();
    assert!(!log.needs_recovery());
    disk.snapshot()
}

fn recover_with_e2fsck(path: &Path, image: &Image) -> Vec<u8> {
    std::fs::write(path, image.to_vec()).unwrap();
    let out = Command::new("e2fsck")
        .args(["-fy"])
        .arg(path)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.code().unwrap() <= 1, "{text}");
    assert!(!text.contains("Clear<y>"), "{text}");
    std::fs::read(path).unwrap()
}

/// How many seeds each test tries; more with `JOURNAL_SEEDS`.
fn seeds(first: u64) -> impl Iterator<Item = u64> {
    let count = std::env::var("JOURNAL_SEEDS")
        .ok()
        .and_then(|text| text.parse().ok());
    (0..count.unwrap_or(2)).map(move |n| first + n)
}

/// Two lives: the second begins with what a power cut in the first left.
fn power_cuts(args: &[&str], seed: u64, shuffled: bool) {
    println!("{args:?}: seed {seed}");
    let made = make(args);
    let image = Image::from_bytes(&made.image);
    let points = one_life(&made, image, seed, 1..1501, shuffled);
    let image = points[points.len() / 2].image(seed);
    one_life(&made, image, seed + 1, 100_000..101_000, shuffled);
}

fn one_life(
    made: &Made,
    image: Image,
    seed: u64,
    ops: Range<u64>,
    shuffled: bool,
) -> Vec<CrashPoint> {
    let timing = if shuffled {
        Timing::Shuffled { seed }
    } else {
        Timing::AtOnce
    };
    let disk = CrashDisk::from_image("crash", image, timing);
    disk.arm_every(7);
    let history = work(made, &disk, seed, ops.clone());
    let points: Vec<CrashPoint> = disk.take_points();
    let size = block_size(&made.image) as usize;
    let mut random = Random(seed);
    let path = made.scratch.path("crashed");
    let (mut last, mut checked, mut same, mut compared) = (0, 0, 0, 0);
    for (nr, point) in points.iter().enumerate() {
        let image = point.image(random.next());
        let ours = recover(made, image.clone());
        last = check(&history, &ours, size, point.ops);
        checked += 1;
        if nr % 20 == 0 {
            let theirs = recover_with_e2fsck(&path, &image);
            let theirs = check(&history, &theirs, size, point.ops);
            // A commit block of which only the record's own sector got to the disk counts for us
            // and for newer kernels, not for e2fsck.
            assert!(theirs <= last, "e2fsck finds {theirs}, we find {last}");
            same += u64::from(theirs == last);
            compared += 1;
        }
    }
    println!(
        "{checked} power cuts of {} operations, the last had {last}",
        disk.ops()
    );
    assert!(
        same * 2 > compared,
        "e2fsck agrees in {same} of {compared} cases only"
    );
    assert!(last + 500 > ops.end, "too little was committed");
    points
}

#[test]
fn power_cuts_with_csum_v3_and_64bit() {
    let args = [
        "-t",
        "ext4",
        "-b",
        "4096",
        "-J",
        "size=4",
        "-O",
        "64bit,metadata_csum",
    ];
    seeds(100).for_each(|seed| power_cuts(&args, seed, seed % 2 == 0));
}

#[test]
fn power_cuts_without_checksums() {
    let args = [
        "-t",
        "ext4",
        "-b",
        "4096",
        "-J",
        "size=4",
        "-O",
        "^64bit,^metadata_csum",
    ];
    seeds(200).for_each(|seed| power_cuts(&args, seed, seed % 2 == 0));
}

#[test]
fn power_cuts_on_ext3_with_blocks_of_1k() {
    let args = ["-t", "ext3", "-b", "1024", "-J", "size=1"];
    seeds(300).for_each(|seed| power_cuts(&args, seed, seed % 2 == 0));
}
