//! Direct writes by many threads, and what may run beside them: what files hold afterwards, what
//! e2fsck says, what a power cut leaves, how errors come back.
#![expect(clippy::unwrap_used, reason = "a test ends with a panic")]

#[path = "direct/model.rs"]
mod model;
mod storm;

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use blockstack::backend::mem::{Image, MemDisk};
use blockstack::testing::crash::{CrashDisk, Timing};
use blockstack::testing::faulty::{Faults, FaultyDisk, Kinds, Rule};
use blockstack::{BlkError, DynDevice};
use fs::data::Origin;
use fs::inode::map::{self, MapKind};
use fs::ops::space::FallocMode;
use fs::ops::{Caller, NewNode};
use fs::{Fs, FsError, FsResult, Inode, MountOptions};
use model::{History, POISON, UNIT, stamp, version};
use storm::image::{Scratch, has_torn_superblock};
use storm::{DIRECT, FILE, ME, ROOT, Random, read, write};

fn is_long() -> bool {
    std::env::var_os("FUSEFS_STACK_LONG").is_some_and(|value| value == "1")
}

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

/// A file system whose free blocks hold [`POISON`].
fn poisoned(scratch: &Scratch, args: &[&str], mib: usize) -> Image {
    let path = scratch.path("poisoned");
    std::fs::write(&path, vec![POISON; mib << 20]).unwrap();
    let out = Command::new("mke2fs")
        .args(["-q", "-F", "-E"])
        .arg("nodiscard,lazy_itable_init=0,lazy_journal_init=0")
        .args(args)
        .arg(&path)
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let image = Image::open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    image
}

fn create(fs: &Arc<Fs>, name: &str) -> Arc<Inode> {
    let ino = fs.create(ROOT, name.as_bytes(), FILE, 0, &ME).unwrap().ino;
    fs.iget(ino).unwrap()
}

fn read_whole(fs: &Arc<Fs>, ino: u32) -> FsResult<Vec<u8>> {
    let size = fs.getattr(ino)?.size;
    read(fs, ino, 0, size as u32)
}

/// Units of the longest file of a storm.
const UNITS: u64 = 256;
const FILES: usize = 5;

struct Files {
    fs: Arc<Fs>,
    inodes: Vec<Arc<Inode>>,
    histories: Vec<Arc<History>>,
}

impl Files {
    fn new(fs: &Arc<Fs>) -> Self {
        let inodes = (0..FILES).map(|file| create(fs, &format!("file-{file}")));
        Self {
            fs: fs.clone(),
            inodes: inodes.collect(),
            histories: (0..FILES as u64)
                .map(|file| Arc::new(History::new(file)))
                .collect(),
        }
    }

    /// Sends a write of a random range; `answered` hears of its end.
    fn send(&self, random: &mut Random, version: u64, answered: &Sender<FsResult>) {
        let file = random.below(FILES as u64) as usize;
        let (mut from, mut len) = (random.below(UNITS), 1 + random.below(24));
        if random.one_in(2) {
            (from, len) = (from / 4 * 4, len.div_ceil(4) * 4);
        }
        let to = (from + len).min(UNITS);
        let mut bytes = vec![0; (to - from) as usize * UNIT];
        for (unit, out) in (from..to).zip(bytes.chunks_exact_mut(UNIT)) {
            stamp(file as u64, unit, version, out);
        }
        let origin = match random.below(5) {
            0 => Origin::PageCache,
            _ => DIRECT,
        };
        let caller = Caller {
            keeps_times: random.one_in(2),
            ..ME
        };
        let history = self.histories[file].clone();
        let op = history.begin(from, to, version);
        let (want, answered) = (bytes.len(), answered.clone());
        let reply = move |res: FsResult<u32>| {
            let whole = res.and_then(|written| match written as usize == want {
                true => Ok(()),
                false => Err(FsError::NoSpace),
            });
            if whole.is_ok() {
                history.end(op);
            }
            // Nobody listens any more at the end of a storm.
            answered.send(whole).ok();
        };
        let offset = from * UNIT as u64;
        self.fs.write(
            &self.inodes[file],
            offset,
            &bytes,
            origin,
            &caller,
            Box::new(reply),
        );
    }

    fn writes(&self, thread: u64, seed: u64, count: u64) {
        let mut random = Random(seed ^ thread.wrapping_mul(0x1234_5677));
        let (to, answers) = channel();
        let mut under_way = 0;
        for number in 1..=count {
            self.send(&mut random, thread << 32 | number, &to);
            under_way += 1;
            while under_way > 12 {
                answers.recv().unwrap().unwrap();
                under_way -= 1;
            }
        }
        (0..under_way).for_each(|_| answers.recv().unwrap().unwrap());
    }

    /// Truncates, punches, zeroes, preallocates, syncs.
    fn shape(&self, random: &mut Random) {
        let file = random.below(FILES as u64) as usize;
        let (fs, inode, history) = (&self.fs, &self.inodes[file], &self.histories[file]);
        let (from, len) = (random.below(UNITS), 1 + random.below(UNITS / 2));
        let (at, bytes) = (from * UNIT as u64, len * UNIT as u64);
        let keep = FallocMode::KEEP_SIZE;
        let extents = fs.geo.has_extents();
        match random.below(8) {
            0 => {
                let op = history.begin(from, u64::MAX, 0);
                fs.truncate(inode, at, &ME).unwrap();
                history.end(op);
            }
            1..4 => {
                let op = history.begin(from, from + len, 0);
                let mode = match random.below(3) {
                    0 if extents => FallocMode::ZERO_RANGE | keep,
                    _ => FallocMode::PUNCH_HOLE | keep,
                };
                fs.fallocate(inode, mode, at, bytes, &ME).unwrap();
                history.end(op);
            }
            4..7 if extents => {
                let mode = if random.one_in(2) {
                    keep
                } else {
                    FallocMode::empty()
                };
                fs.fallocate(inode, mode, at, bytes, &ME).unwrap();
            }
            _ => fs.fsync(inode, random.one_in(2)).unwrap(),
        }
    }

    fn reads(&self, random: &mut Random) {
        let file = random.below(FILES as u64);
        let (from, len) = (random.below(UNITS), 1 + random.below(64));
        let offset = from * UNIT as u64;
        let ino = self.inodes[file as usize].ino;
        let bytes = read(&self.fs, ino, offset, len as u32 * UNIT as u32).unwrap();
        for (unit, bytes) in (from..).zip(bytes.chunks_exact(UNIT)) {
            let version = version(file, unit, bytes).unwrap();
            let known = self.histories[file as usize].knows(unit, version);
            assert!(known, "file {file} unit {unit}: nobody wrote {version:#x}");
        }
    }
}

/// Writes of four threads while others read and change where the blocks are, then an unmount with
/// writes under way.
fn direct_storm(args: &[&str], seed: u64, count: u64) {
    storm::log_to_stderr();
    let scratch = Scratch::new();
    let made = poisoned(&scratch, args, 32);
    let name = format!("storm-{seed}");
    let disk = CrashDisk::from_image(&name, made, Timing::Shuffled { seed });
    let dev: DynDevice = disk.clone();
    let options = MountOptions {
        commit_secs: 1,
        ..MountOptions::default()
    };
    let fs = Fs::mount(dev, options).unwrap();
    let files = Files::new(&fs);
    let stop = AtomicBool::new(false);
    let until_stop = |work: &dyn Fn(&mut Random), seed| {
        let mut random = Random(seed);
        while !stop.load(Ordering::Acquire) {
            work(&mut random);
        }
    };
    std::thread::scope(|scope| {
        let files = &files;
        scope.spawn(|| until_stop(&|random| files.shape(random), seed ^ 0x51));
        scope.spawn(|| until_stop(&|random| files.reads(random), seed ^ 0x52));
        let writers: Vec<_> = (1..=4)
            .map(|thread| scope.spawn(move || files.writes(thread, seed, count)))
            .collect();
        let failed = writers
            .into_iter()
            .filter_map(|writer| writer.join().err())
            .count();
        stop.store(true, Ordering::Release);
        assert_eq!(failed, 0, "writers failed");
    });
    // Nobody waits for these but the unmount.
    let mut random = Random(seed ^ 0x53);
    let (to, _) = channel();
    for number in 1..=200 {
        files.send(&mut random, 9 << 32 | number, &to);
    }
    fs.unmount().unwrap();
    let about = format!("{args:?} seed {seed}");
    for history in &files.histories {
        assert!(history.is_over(), "{about}: unanswered after the unmount");
    }
    let ends = format!("dio/{name}");
    soon("no thread for ends is left", || threads_named(&ends) == 0);
    let Files {
        inodes, histories, ..
    } = files;
    let inos: Vec<_> = inodes.iter().map(|inode| inode.ino).collect();
    drop((inodes, fs));
    let image = disk.live();
    let fail = |error: String| -> ! {
        let kept = Scratch::keep(&image, &name);
        panic!("{about}: {error}\nimage: {}", kept.display())
    };
    if let Err(error) = scratch.check(&image) {
        fail(error);
    }
    let dev: DynDevice = MemDisk::from_image("after", image.clone());
    let fs = Fs::mount(dev, MountOptions::default()).unwrap();
    for (ino, history) in inos.into_iter().zip(&histories) {
        let found = read_whole(&fs, ino).unwrap();
        if let Err(error) = history.check(&found, UNITS) {
            fail(error);
        }
    }
    fs.unmount().unwrap();
    let ops: usize = histories.iter().map(|history| history.len()).sum();
    println!("{about}: {ops} operations");
}

/// Threads of the process that have this name, as the kernel cuts it.
fn threads_named(name: &str) -> usize {
    let name = &name[..name.len().min(15)];
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let comms = tasks.filter_map(|task| std::fs::read(task.ok()?.path().join("comm")).ok());
    comms
        .filter(|comm| comm.trim_ascii_end() == name.as_bytes())
        .count()
}

fn storms(args: &[&str], seed: u64) {
    let (storms, count) = if is_long() { (10, 8000) } else { (1, 1500) };
    for number in 0..storms {
        direct_storm(args, seed + number, count);
    }
}

#[test]
fn a_storm_of_direct_writes() {
    storms(&["-t", "ext4", "-b", "4096", "-J", "size=4"], 100);
}

#[test]
fn a_storm_of_direct_writes_with_blocks_of_1k() {
    storms(&["-t", "ext4", "-b", "1024", "-J", "size=2"], 200);
}

#[test]
fn a_storm_of_direct_writes_with_block_maps() {
    storms(&["-t", "ext3", "-b", "1024", "-J", "size=2"], 300);
}

#[test]
fn a_storm_of_direct_writes_without_a_journal() {
    storms(&["-t", "ext2", "-b", "2048"], 400);
}

/// How a write is made durable.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Durable {
    /// The mount does it.
    Mount,
    /// The file's flag does it (`chattr +S`).
    Flag,
    /// The caller does it.
    Fdatasync,
}

/// Power is cut right after the answer to each write in turn.
fn sync_writes(how: Durable, args: &[&str], seed: u64, writes: usize) {
    const SIZE: u64 = 200_000;
    let scratch = Scratch::new();
    let made = poisoned(&scratch, args, 16);
    let mut random = Random(seed);
    let timing = if random.one_in(2) {
        Timing::Shuffled { seed }
    } else {
        Timing::AtOnce
    };
    let disk = CrashDisk::from_image("sync", made, timing);
    let dev: DynDevice = disk.clone();
    let options = MountOptions {
        commit_secs: 60,
        sync: how == Durable::Mount,
        ..MountOptions::default()
    };
    let fs = Fs::mount(dev, options).unwrap();
    let inode = create(&fs, "file");
    if how == Durable::Flag {
        inode.data.write().flags.insert(fs::InodeFlags::SYNC);
    }
    fs.fsync(&inode, false).unwrap();
    let mut model = Vec::new();
    for number in 0..writes {
        let (at, len) = (random.below(SIZE), 1 + random.below(30_000));
        if fs.geo.has_extents() && random.one_in(4) {
            let (from, bytes) = (random.below(SIZE), 1 + random.below(50_000));
            let keep = FallocMode::KEEP_SIZE;
            fs.fallocate(&inode, keep, from, bytes, &ME).unwrap();
        }
        let bytes: Vec<_> = (0..len).map(|at| (at / 7) as u8 ^ number as u8).collect();
        let caller = Caller {
            keeps_times: random.one_in(2),
            ..ME
        };
        let origin = if random.one_in(3) {
            Origin::PageCache
        } else {
            DIRECT
        };
        let (to, answer) = channel();
        let reply = Box::new(move |res| to.send(res).unwrap());
        fs.write(&inode, at, &bytes, origin, &caller, reply);
        assert_eq!(answer.recv().unwrap(), Ok(len as u32));
        if how == Durable::Fdatasync {
            fs.fsync(&inode, true).unwrap();
        }
        let point = disk.point();
        let end = (at + len) as usize;
        if model.len() < end {
            model.resize(end, 0);
        }
        model[at as usize..end].copy_from_slice(&bytes);
        let about = format!("{how:?} {args:?} {timing:?} seed {seed} write {number} at {at}");
        for which in 0..2 {
            let mut image = if which == 0 {
                point.durable()
            } else {
                point.image(random.next())
            };
            while has_torn_superblock(&image) {
                image = point.image(random.next());
            }
            if number % 8 == 7 {
                match scratch.replay(&image) {
                    Ok(Some(after)) => image = after,
                    Ok(None) => {}
                    Err(error) => panic!("{about}: {error}"),
                }
            }
            let dev: DynDevice = MemDisk::from_image("after", image);
            let after = Fs::mount(dev, MountOptions::default()).unwrap();
            let found = read_whole(&after, inode.ino).unwrap();
            assert!(found.len() >= model.len(), "{about}: size {}", found.len());
            let differs = (0..model.len()).find(|&at| found[at] != model[at]);
            assert_eq!(differs, None, "{about}: differs");
            after.unmount().unwrap();
        }
    }
    fs.unmount().unwrap();
    drop(inode);
    drop(fs);
    scratch.check(&disk.live()).unwrap();
}

#[test]
fn a_synchronous_write_is_on_disk_when_it_is_answered() {
    storm::log_to_stderr();
    let kinds: [&[&str]; 3] = [
        &["-t", "ext4", "-b", "4096", "-J", "size=4"],
        &["-t", "ext4", "-b", "1024", "-J", "size=1"],
        &["-t", "ext3", "-b", "1024", "-J", "size=1"],
    ];
    let seeds = if is_long() { 40 } else { 2 };
    for seed in 0..seeds {
        for (kind, args) in (0..).zip(kinds) {
            for how in [Durable::Mount, Durable::Flag, Durable::Fdatasync] {
                sync_writes(how, args, 10 * seed + kind, 16);
            }
        }
    }
}

/// While it lives, the device swallows operations; also a test that fails lets go of its threads.
struct Frozen<'a>(&'a Faults);

impl<'a> Frozen<'a> {
    fn new(faults: &'a Faults) -> Self {
        faults.hold();
        Self(faults)
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        self.0.release();
    }
}

/// A mount over a device that fails and holds as it is told.
struct Rig {
    scratch: Scratch,
    disk: Arc<MemDisk>,
    faults: Faults,
    fs: Arc<Fs>,
}

impl Rig {
    fn new(name: &str) -> Self {
        let scratch = Scratch::new();
        let args = ["-t", "ext4", "-b", "4096", "-J", "size=4"];
        let disk = MemDisk::from_image(name, poisoned(&scratch, &args, 16));
        let (faulty, faults) = FaultyDisk::new(disk.clone());
        let dev: DynDevice = faulty;
        let options = MountOptions {
            commit_secs: 60,
            ..MountOptions::default()
        };
        let fs = Fs::mount(dev, options).unwrap();
        Self {
            scratch,
            disk,
            faults,
            fs,
        }
    }

    /// Sends a write in place that changes no metadata.
    fn send(&self, inode: &Arc<Inode>, at: u64, bytes: &[u8]) -> Receiver<FsResult<u32>> {
        let caller = Caller {
            keeps_times: true,
            ..ME
        };
        let (to, answer) = channel();
        let reply = Box::new(move |res| to.send(res).unwrap());
        self.fs.write(inode, at, bytes, DIRECT, &caller, reply);
        answer
    }

    fn end(self) {
        self.fs.unmount().unwrap();
        drop(self.fs);
        self.scratch.check(&self.disk.image()).unwrap();
    }
}

/// Lost: data that `fdatasync` had promised, where another's flush was still on its way.
#[test]
fn fdatasync_waits_for_the_flush_of_another() {
    let rig = Rig::new("flush");
    let inode = create(&rig.fs, "file");
    write(&rig.fs, inode.ino, 0, &[1; 4096], DIRECT).unwrap();
    rig.fs.fsync(&inode, false).unwrap();
    let answer = rig.send(&inode, 0, &[2; 4096]);
    assert_eq!(answer.recv().unwrap(), Ok(4096));
    std::thread::scope(|scope| {
        let frozen = Frozen::new(&rig.faults);
        let first = scope.spawn(|| rig.fs.fsync(&inode, true));
        soon("the first flushes", || rig.faults.held() == 1);
        let second = scope.spawn(|| rig.fs.fsync(&inode, true));
        let since = Instant::now();
        while since.elapsed() < Duration::from_millis(300) && !second.is_finished() {
            std::thread::yield_now();
        }
        let early = second.is_finished();
        drop(frozen);
        first.join().unwrap().unwrap();
        second.join().unwrap().unwrap();
        assert!(!early, "answered before the flush was over");
    });
    drop(inode);
    rig.end();
}

/// Lost: the turn of a truncation of a file that others go on to write.
#[test]
fn a_punch_waits_for_what_is_under_way_and_not_for_what_comes_later() {
    let rig = Rig::new("punch");
    let inode = create(&rig.fs, "file");
    write(&rig.fs, inode.ino, 0, &[1; 5 * 4096], DIRECT).unwrap();
    rig.fs.fsync(&inode, false).unwrap();
    let mode = FallocMode::PUNCH_HOLE | FallocMode::KEEP_SIZE;
    std::thread::scope(|scope| {
        let frozen = Frozen::new(&rig.faults);
        let first = rig.send(&inode, 0, &[2; 4096]);
        assert_eq!(rig.faults.held(), 1);
        let punch = scope.spawn(|| rig.fs.fallocate(&inode, mode, 0, 3 * 4096, &ME));
        soon("the punch waits", || {
            inode.io.is_busy(100, 101) || rig.faults.held() > 1
        });
        let second = scope.spawn(|| rig.send(&inode, 2 * 4096, &[3; 4096]));
        let reader = scope.spawn(|| read(&rig.fs, inode.ino, 3 * 4096, 4096));
        let since = Instant::now();
        while since.elapsed() < Duration::from_millis(300) && rig.faults.held() == 1 {
            std::thread::yield_now();
        }
        let (held, early) = (rig.faults.held(), punch.is_finished());
        drop(frozen);
        punch.join().unwrap().unwrap();
        assert_eq!(first.recv().unwrap(), Ok(4096));
        assert_eq!(second.join().unwrap().recv().unwrap(), Ok(4096));
        assert!(
            reader
                .join()
                .unwrap()
                .unwrap()
                .iter()
                .all(|&byte| byte == 1)
        );
        assert!(!early, "punched under a write");
        assert_eq!(held, 1, "sent past who waits");
    });
    let found = read_whole(&rig.fs, inode.ino).unwrap();
    let firsts: Vec<_> = found.chunks(4096).map(|block| block[0]).collect();
    assert_eq!(firsts, [0, 0, 3, 1, 1]);
    drop(inode);
    rig.end();
}

#[test]
fn the_queue_of_ends_is_made_on_need_and_gone_after_the_unmount() {
    let rig = Rig::new("wq");
    // The name is that of the device below the mount: "faulty wq".
    let name = "dio/faulty wq";
    let inodes: Vec<_> = (0..8)
        .map(|file| create(&rig.fs, &format!("file-{file}")))
        .collect();
    rig.fs.sync().unwrap();
    assert_eq!(threads_named(name), 0);
    let start = Barrier::new(inodes.len());
    std::thread::scope(|scope| {
        for inode in &inodes {
            scope.spawn(|| {
                start.wait();
                write(&rig.fs, inode.ino, 0, &[7; 10_000], DIRECT).unwrap();
            });
        }
    });
    let threads = threads_named(name);
    assert!((1..=4).contains(&threads), "{threads} threads");
    drop(inodes);
    rig.fs.unmount().unwrap();
    // The file system itself is still there.
    soon("gone", || threads_named(name) == 0);
    let Rig {
        scratch, disk, fs, ..
    } = rig;
    drop(fs);
    scratch.check(&disk.image()).unwrap();
}

/// Where blocks of a file are, in sectors.
fn sector_of(fs: &Fs, inode: &Inode, lblk: u32) -> u64 {
    let data = inode.data.read();
    let mapping = map::lookup(fs, inode, &data, lblk, 1).unwrap();
    assert_ne!(mapping.kind, MapKind::Hole);
    mapping.pblk * fs.geo.block_sectors()
}

/// Two files whose blocks stand by turns, so that each has extents of one block.
fn interleaved(fs: &Arc<Fs>) -> [Arc<Inode>; 2] {
    let files = ["one", "two"].map(|name| create(fs, name));
    for block in 0..6 {
        for inode in &files {
            write(fs, inode.ino, block * 4096, &[1; 4096], DIRECT).unwrap();
        }
    }
    fs.sync().unwrap();
    files
}

#[test]
fn the_first_error_of_the_pieces_is_the_answer() {
    let rig = Rig::new("errors");
    let [inode, other] = interleaved(&rig.fs);
    let at = |lblk| {
        let sector = sector_of(&rig.fs, &inode, lblk);
        sector..sector + 8
    };
    assert_ne!(at(1).start, at(0).end, "one extent");
    let free = rig.fs.statfs().bfree;
    // One piece of five, another later, and another error.
    rig.faults.clear();
    rig.faults.add(
        Rule::all()
            .of(Kinds::WRITE)
            .at(at(2))
            .with(BlkError::TimedOut),
    );
    rig.faults
        .add(Rule::all().of(Kinds::WRITE).at(at(4)).with(BlkError::Io));
    let res = write(&rig.fs, inode.ino, 0, &[2; 6 * 4096], DIRECT);
    assert_eq!(res, Err(FsError::Data(BlkError::TimedOut)));
    assert_eq!(rig.faults.failed(), 2);
    let found = read_whole(&rig.fs, inode.ino).unwrap();
    let firsts: Vec<_> = found.chunks(4096).map(|block| block[0]).collect();
    assert_eq!(firsts, [2, 2, 1, 2, 1, 2]);
    // With blocks that are new behind it: none of them becomes the file's.
    let res = write(&rig.fs, inode.ino, 4 * 4096, &[3; 6 * 4096], DIRECT);
    assert_eq!(res, Err(FsError::Data(BlkError::Io)));
    assert_eq!(rig.fs.getattr(inode.ino).unwrap().size, 6 * 4096);
    assert_eq!(rig.fs.statfs().bfree, free);
    // A read of several pieces, one of which cannot be read.
    rig.faults.clear();
    rig.faults.add(
        Rule::all()
            .of(Kinds::READ)
            .at(at(3))
            .with(BlkError::TimedOut),
    );
    let res = read(&rig.fs, inode.ino, 100, 6 * 4096);
    assert_eq!(res, Err(FsError::Data(BlkError::TimedOut)));
    // One that ends before it can, also where it asks for more than there is.
    let found = read(&rig.fs, inode.ino, 4 * 4096 + 100, 100_000).unwrap();
    assert_eq!(found.len(), 2 * 4096 - 100);
    // Of the page cache, the next fsync has the error, and it alone.
    rig.faults.clear();
    rig.faults.add(
        Rule::all()
            .of(Kinds::WRITE)
            .at(at(2))
            .with(BlkError::TimedOut),
    );
    let res = write(&rig.fs, inode.ino, 0, &[4; 6 * 4096], Origin::PageCache);
    assert_eq!(res, Ok(6 * 4096));
    let lost = rig.fs.fsync(&inode, true);
    assert_eq!(lost, Err(FsError::Data(BlkError::TimedOut)));
    rig.faults.clear();
    rig.fs.fsync(&inode, true).unwrap();
    // What was answered with success is there.
    let found = read_whole(&rig.fs, other.ino).unwrap();
    assert!(found.len() == 6 * 4096 && found.iter().all(|&byte| byte == 1));
    drop((inode, other));
    rig.end();
}

/// A short write of a full disk, one piece of which fails: the error is the answer, not the bytes
/// that went.
#[test]
fn an_error_is_the_answer_of_a_short_write_too() {
    let rig = Rig::new("short");
    let [inode, other] = interleaved(&rig.fs);
    let filler = create(&rig.fs, "filler");
    let mut at = 0;
    while let Ok(written) = write(&rig.fs, filler.ino, at, &vec![5; 1 << 20], DIRECT) {
        at += u64::from(written);
    }
    rig.fs.truncate(&filler, at - 2 * 4096, &ME).unwrap();
    rig.fs.sync().unwrap();
    let short = |bytes: u8| {
        write(
            &rig.fs,
            inode.ino,
            4 * 4096,
            &vec![bytes; 40 * 4096],
            DIRECT,
        )
    };
    let sector = sector_of(&rig.fs, &inode, 5);
    rig.faults.clear();
    let rule = Rule::all().of(Kinds::WRITE).at(sector..sector + 8);
    rig.faults.add(rule.with(BlkError::TimedOut));
    assert_eq!(short(6), Err(FsError::Data(BlkError::TimedOut)));
    let size = rig.fs.getattr(inode.ino).unwrap().size;
    assert_eq!(size, 6 * 4096);
    rig.faults.clear();
    let written = short(7).unwrap();
    assert!((1..40 * 4096).contains(&written), "not short: {written}");
    let size = rig.fs.getattr(inode.ino).unwrap().size;
    assert_eq!(size, 4 * 4096 + u64::from(written));
    drop((inode, other, filler));
    rig.end();
}

/// Lost: the soundness of a file, where its map could name only a part of a write: blocks of data
/// stood behind its end.
#[test]
fn a_write_that_is_named_in_part_leaves_a_sound_file() {
    let rig = Rig::new("part");
    let fs = &rig.fs;
    let [inode, other, filler] = ["file", "other", "filler"].map(|name| create(fs, name));
    // Three of the four extents that an inode holds, with others' blocks between; the third behind
    // the end and preallocated.
    for block in [0, 2] {
        write(fs, inode.ino, block * 4096, &[1; 4096], DIRECT).unwrap();
        write(fs, other.ino, block * 4096, &[1; 4096], DIRECT).unwrap();
    }
    let keep = FallocMode::KEEP_SIZE;
    fs.fallocate(&inode, keep, 9 * 4096, 4096, &ME).unwrap();
    write(fs, other.ino, 4 * 4096, &[1; 4096], DIRECT).unwrap();
    let mut at = 0;
    while let Ok(written) = write(fs, filler.ino, at, &vec![5; 1 << 20], DIRECT) {
        at += u64::from(written);
    }
    let punch = FallocMode::PUNCH_HOLE | keep;
    for block in [1, 3, 5] {
        fs.fallocate(&filler, punch, block * 4096, 4096, &ME)
            .unwrap();
    }
    let target = [b't'; 200];
    let link = |name: &str| {
        let node = NewNode::Symlink { target: &target };
        fs.create(ROOT, name.as_bytes(), node, 0, &ME).map(|_| ())
    };
    link("first").unwrap();
    fs.sync().unwrap();
    let frozen = Frozen::new(&rig.faults);
    let answer = rig.send(&inode, 8 * 4096, &[2; 3 * 4096]);
    assert!(rig.faults.held() > 0);
    // Meanwhile others take all that is kept for metadata.
    let mut links = 0;
    while link(&format!("{links}")).is_ok() {
        links += 1;
    }
    assert_eq!(fs.statfs().bfree, 0);
    drop(frozen);
    assert_eq!(answer.recv().unwrap(), Err(FsError::NoSpace));
    let found = read_whole(fs, inode.ino).unwrap();
    let firsts: Vec<_> = found.chunks(4096).map(|block| block[0]).collect();
    assert_eq!(firsts, [1, 0, 1, 0, 0, 0, 0, 0, 2]);
    drop((inode, other, filler));
    rig.end();
}
