use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use super::{Engine, FileDisk, OpenErrorKind, OpenOptions};
use crate::sync::{Condvar, Mutex, Rank};
use crate::{
    Bio, BioFlags, BioSet, BlkError, BlkResult, BlockDevice, DynDevice, Op, PagePool, Plug, Sector,
    SectorCount, Wait, flush_wait, range_wait, read_wait, submit_bio, write_wait,
};

fn image(bytes: u64) -> tempfile::NamedTempFile {
    // Beside the test program: `/tmp` may be in memory, and the source tree is not ours to litter.
    let program = std::env::current_exe().unwrap();
    let file = tempfile::NamedTempFile::new_in(program.parent().unwrap()).unwrap();
    file.as_file().set_len(bytes).unwrap();
    file
}

fn every_way() -> Vec<OpenOptions> {
    let mut all = Vec::new();
    for engine in [Engine::Uring, Engine::Threads] {
        for (direct, inline) in [(true, false), (false, false), (true, true), (false, true)] {
            all.push(OpenOptions {
                engine,
                direct,
                inline,
                ..OpenOptions::default()
            });
        }
    }
    all
}

#[test]
fn what_is_written_is_read_and_is_in_the_file() {
    for options in every_way() {
        let file = image(1 << 20);
        let disk = FileDisk::open(file.path(), options).unwrap();
        assert_eq!(disk.capacity(), SectorCount::new(2048));
        let dev: DynDevice = disk;
        for (sector, len) in [
            (0, 512),
            (3, 1024),
            (8, 65536),
            (2047, 512),
            (1024, 524_288),
        ] {
            let mut buf = PagePool::shared().alloc(len).unwrap();
            buf.fill(sector as u8 ^ 0x5a);
            let flags = BioFlags::FUA | BioFlags::PREFLUSH;
            let mut buf = write_wait(&dev, Sector::new(sector), buf, flags).unwrap();
            buf.fill(0);
            let buf = read_wait(&dev, Sector::new(sector), buf).unwrap();
            assert!(buf.iter().all(|&byte| byte == sector as u8 ^ 0x5a));
            let mut bytes = vec![0; len];
            file.as_file()
                .read_exact_at(&mut bytes, sector * 512)
                .unwrap();
            assert_eq!(bytes, *buf);
        }
        flush_wait(&dev).unwrap();
    }
}

#[test]
fn holes_are_punched_and_zeros_are_zeros() {
    for options in every_way() {
        let mut file = image(0);
        file.write_all(&vec![7; 1 << 20]).unwrap();
        let dev: DynDevice = FileDisk::open(file.path(), options).unwrap();
        range_wait(&dev, Op::Discard, Sector::new(0), SectorCount::new(1024)).unwrap();
        range_wait(
            &dev,
            Op::WriteZeroes,
            Sector::new(1025),
            SectorCount::new(9),
        )
        .unwrap();
        let buf = PagePool::shared().alloc(1 << 20).unwrap();
        let buf = read_wait(&dev, Sector::ZERO, buf).unwrap();
        assert!(buf[..1024 * 512].iter().all(|&byte| byte == 0));
        assert!(buf[1024 * 512..1025 * 512].iter().all(|&byte| byte == 7));
        assert!(buf[1025 * 512..1034 * 512].iter().all(|&byte| byte == 0));
        assert!(buf[1034 * 512..].iter().all(|&byte| byte == 7));
        let blocks = std::os::unix::fs::MetadataExt::blocks(&file.as_file().metadata().unwrap());
        assert!(blocks <= 1100, "{blocks} sectors still allocated");
    }
}

struct Tally {
    left: Mutex<usize>,
    zero: Condvar,
    errors: AtomicUsize,
}

impl Tally {
    fn new(count: usize) -> Arc<Self> {
        Arc::new(Self {
            left: Mutex::new(Rank::Pool, count),
            zero: Condvar::new(),
            errors: AtomicUsize::new(0),
        })
    }
    fn wait(&self) -> usize {
        let mut left = self.left.lock();
        while *left > 0 {
            let moves = self.zero.wait_for(&mut left, Duration::from_secs(60));
            assert!(moves, "{} bios do not end", *left);
        }
        self.errors.load(Ordering::SeqCst)
    }
}

#[derive(Default)]
struct TallyPad(Option<Arc<Tally>>);

fn tally(mut bio: Bio, res: BlkResult) {
    let tally = bio.pad_mut::<TallyPad>().0.take().unwrap();
    if res.is_err() {
        tally.errors.fetch_add(1, Ordering::SeqCst);
    }
    drop(bio);
    *tally.left.lock_nested() -= 1;
    tally.zero.notify_all();
}

#[test]
fn more_bios_than_slots_all_end() {
    for mut options in every_way() {
        options.queue_depth = 2;
        let file = image(4 << 20);
        let dev: DynDevice = FileDisk::open(file.path(), options).unwrap();
        let set = BioSet::<TallyPad>::new("test", 64);
        let count = 2000;
        let done = Tally::new(count);
        let mut plug = Some(Plug::new());
        for i in 0..count {
            if i == 40 {
                plug = None;
            }
            let op = if i % 2 == 0 { Op::Write } else { Op::Read };
            let mut bio = set.alloc(op, Wait::Yes).unwrap();
            bio.pad_mut::<TallyPad>().0 = Some(done.clone());
            bio.set_end_io(tally);
            bio.set_dev(dev.clone(), Sector::new(i as u64 * 4));
            bio.push(PagePool::shared().alloc(512).unwrap()).unwrap();
            bio.push(PagePool::shared().alloc(1024).unwrap()).unwrap();
            bio.push(PagePool::shared().alloc(512).unwrap()).unwrap();
            if i % 100 == 0 {
                bio.set_flags(BioFlags::FUA | BioFlags::PREFLUSH);
            }
            submit_bio(bio);
        }
        drop(plug);
        assert_eq!(done.wait(), 0);
    }
}

#[test]
fn bios_of_a_lowered_thread_are_sent_by_another() {
    let file = image(1 << 20);
    let options = OpenOptions {
        engine: Engine::Uring,
        inline: false,
        ..OpenOptions::default()
    };
    let dev: DynDevice = FileDisk::open(file.path(), options).unwrap();
    let lowered = std::thread::spawn(move || {
        crate::sched::lower().unwrap();
        for sector in 0..200 {
            let mut buf = PagePool::shared().alloc(512).unwrap();
            buf.fill(sector as u8);
            let buf = write_wait(&dev, Sector::new(sector), buf, BioFlags::empty()).unwrap();
            let buf = read_wait(&dev, Sector::new(sector), buf).unwrap();
            assert!(buf.iter().all(|&byte| byte == sector as u8));
        }
    });
    lowered.join().unwrap();
}

#[test]
fn bios_of_a_thread_that_ends_are_done() {
    let file = image(1 << 20);
    let dev: DynDevice = FileDisk::open(file.path(), OpenOptions::default()).unwrap();
    let set = BioSet::<TallyPad>::new("test", 64);
    let done = Tally::new(200);
    for i in 0..200u64 {
        let (dev, set, done) = (dev.clone(), set.clone(), done.clone());
        std::thread::spawn(move || {
            let op = if i % 3 == 0 { Op::Flush } else { Op::Write };
            let mut bio = set.alloc(op, Wait::Yes).unwrap();
            bio.pad_mut::<TallyPad>().0 = Some(done);
            bio.set_end_io(tally);
            bio.set_dev(dev, Sector::new(i * 8));
            if op == Op::Write {
                bio.push(PagePool::shared().alloc(4096).unwrap()).unwrap();
            }
            submit_bio(bio);
        })
        .join()
        .unwrap();
    }
    assert_eq!(done.wait(), 0);
}

#[test]
fn an_image_cut_short_gives_an_error() {
    for options in every_way() {
        let file = image(1 << 20);
        let dev: DynDevice = FileDisk::open(file.path(), options).unwrap();
        file.as_file().set_len(4096).unwrap();
        let buf = PagePool::shared().alloc(8192).unwrap();
        assert_eq!(read_wait(&dev, Sector::ZERO, buf).err(), Some(BlkError::Io));
    }
}

#[test]
fn odd_sizes_and_coarse_hosts_go_through_the_page_cache() {
    for options in every_way() {
        let file = image((1 << 20) + 700);
        let dev: DynDevice = FileDisk::open(file.path(), options).unwrap();
        assert_eq!(dev.capacity(), SectorCount::new(2049));
        let mut buf = PagePool::shared().alloc(512).unwrap();
        buf.fill(9);
        let mut buf = write_wait(&dev, Sector::new(2048), buf, BioFlags::FUA).unwrap();
        buf.fill(0);
        let buf = read_wait(&dev, Sector::new(2048), buf).unwrap();
        assert!(buf.iter().all(|&byte| byte == 9));
    }
}

#[test]
fn an_image_is_mounted_once() {
    let file = image(1 << 20);
    let options = OpenOptions::default();
    let read_only = OpenOptions {
        read_only: true,
        ..options
    };
    for _ in 0..20 {
        let first = FileDisk::open(file.path(), options).unwrap();
        for other in [options, read_only] {
            let error = FileDisk::open(file.path(), other).err().unwrap();
            assert_eq!(error.kind, OpenErrorKind::InUse);
            assert!(
                error
                    .to_string()
                    .ends_with("already in use by another mount or program")
            );
        }
        drop(first);
        let reader = FileDisk::open(file.path(), read_only).unwrap();
        let second = FileDisk::open(file.path(), read_only).unwrap();
        let error = FileDisk::open(file.path(), options).err().unwrap();
        assert_eq!(error.kind, OpenErrorKind::InUse);
        let dev: DynDevice = reader;
        let buf = PagePool::shared().alloc(512).unwrap();
        let res = write_wait(&dev, Sector::ZERO, buf, BioFlags::empty());
        assert_eq!(res.err(), Some(BlkError::ReadOnly));
        flush_wait(&dev).unwrap();
        drop((dev, second));
    }
}

#[test]
fn wrong_paths_are_named() {
    let open = |path: &str| FileDisk::open(path, OpenOptions::default()).err().unwrap();
    assert_eq!(open("/nowhere/image").kind, OpenErrorKind::NotFound);
    assert_eq!(open("/").kind, OpenErrorKind::IsDirectory);
    assert_eq!(open("/dev/null").kind, OpenErrorKind::NotFileOrDevice);
    let small = image(100);
    let error = open(small.path().to_str().unwrap());
    assert_eq!(error.kind, OpenErrorKind::Empty);
    assert!(error.to_string().contains(small.path().to_str().unwrap()));
}

#[test]
fn the_last_bio_may_drop_the_device_on_its_reaper() {
    for options in every_way() {
        let file = image(1 << 20);
        for _ in 0..50 {
            let dev: DynDevice = FileDisk::open(file.path(), options).unwrap();
            let set = BioSet::<TallyPad>::new("test", 4);
            let done = Tally::new(1);
            let mut bio = set.alloc(Op::Flush, Wait::Yes).unwrap();
            bio.pad_mut::<TallyPad>().0 = Some(done.clone());
            bio.set_end_io(tally);
            bio.set_dev(dev, Sector::ZERO);
            submit_bio(bio);
            assert_eq!(done.wait(), 0);
        }
    }
}

#[test]
#[cfg(debug_assertions)]
fn the_end_of_a_bio_must_not_wait() {
    type Sender = std::sync::mpsc::Sender<bool>;
    #[derive(Default)]
    struct Pad(Option<Sender>);
    fn end(mut bio: Bio, _: BlkResult) {
        let sender = bio.pad_mut::<Pad>().0.take().unwrap();
        let may = std::panic::catch_unwind(crate::sync::assert_may_wait).is_ok();
        sender.send(may).unwrap();
    }
    for options in every_way() {
        let file = image(1 << 20);
        let dev: DynDevice = FileDisk::open(file.path(), options).unwrap();
        let (sender, receiver) = channel();
        let mut bio = BioSet::<Pad>::new("test", 1)
            .alloc(Op::Flush, Wait::Yes)
            .unwrap();
        bio.pad_mut::<Pad>().0 = Some(sender);
        bio.set_end_io(end);
        bio.set_dev(dev, Sector::ZERO);
        submit_bio(bio);
        assert_eq!(receiver.recv(), Ok(false));
    }
}

#[test]
fn qemu_and_we_exclude_each_other() {
    use std::process::{Command, Stdio};
    let file = image(1 << 20);
    let qemu = |flags: &[&str], input: &str| {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw"]).args(flags).arg(file.path());
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().ok()?;
        child
            .stdin
            .as_mut()
            .unwrap()
            .write_all(input.as_bytes())
            .unwrap();
        Some(child)
    };
    let read_only = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    let kind = |options| {
        FileDisk::open(file.path(), options)
            .err()
            .map(|error| error.kind)
    };
    for (flags, our_reader) in [(&[][..], Some(OpenErrorKind::InUse)), (&["-r"][..], None)] {
        let Some(mut child) = qemu(flags, "read 0 512\n") else {
            eprintln!("SKIPPED: no qemu-io");
            return;
        };
        // Its first answer tells that it has opened, and so locked, the image.
        let mut first = [0; 1];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut first).unwrap();
        assert_eq!(
            kind(OpenOptions::default()),
            Some(OpenErrorKind::InUse),
            "{flags:?}"
        );
        assert_eq!(kind(read_only), our_reader, "{flags:?}");
        drop(child.stdin.take());
        child.wait().unwrap();
    }
    for (ours, theirs, works) in [
        (OpenOptions::default(), &[][..], false),
        (OpenOptions::default(), &["-r"][..], false),
        (read_only, &[][..], false),
        (read_only, &["-r"][..], true),
    ] {
        let held = FileDisk::open(file.path(), ours).unwrap();
        let out = qemu(theirs, "read 0 512\n")
            .unwrap()
            .wait_with_output()
            .unwrap();
        let text = String::from_utf8_lossy(&out.stderr);
        let refused = text.contains("lock");
        assert_eq!(refused, !works, "we {ours:?}, qemu {theirs:?}: {text}");
        drop(held);
    }
}

/// Writes and reads through a ring, of which the file has the last word.
fn round_trip(dev: &DynDevice, file: &tempfile::NamedTempFile, pool: &PagePool, byte: u8) {
    let mut buf = pool.alloc(4096).unwrap();
    buf.fill(byte);
    let mut buf = write_wait(dev, Sector::new(8), buf, BioFlags::empty()).unwrap();
    let mut bytes = [0; 4096];
    file.as_file().read_exact_at(&mut bytes, 4096).unwrap();
    assert!(bytes.iter().all(|&is| is == byte), "not what was written");
    buf.fill(0);
    let buf = read_wait(dev, Sector::new(8), buf).unwrap();
    assert!(buf.iter().all(|&is| is == byte), "not what is there");
}

#[test]
fn a_ring_knows_the_memory_of_the_shared_pool_and_of_no_other() {
    let file = image(1 << 20);
    let options = OpenOptions {
        engine: Engine::Uring,
        inline: false,
        ..OpenOptions::default()
    };
    let disk = FileDisk::open(file.path(), options).unwrap();
    let super::Running::Uring(engine) = &disk.engine else {
        panic!("no ring");
    };
    let dev: DynDevice = disk.clone();
    round_trip(&dev, &file, PagePool::shared(), 99);
    // A user who may lock little memory gets by without.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    let root = rustix::process::geteuid().is_root();
    let known = usize::from(root || limit.is_none_or(|limit| limit >= 32 << 20));
    assert_eq!(engine.arenas_known(), known);
    // Each pool's memory goes with it, and its address comes back with the next one's: had the ring
    // kept the pages of the first, it would move those.
    for byte in 1..50 {
        let pool = PagePool::new(1);
        round_trip(&dev, &file, &pool, byte);
    }
    assert_eq!(engine.arenas_known(), known);
}

#[test]
fn a_thread_that_waits_beside_its_own_bios_does_the_call_itself() {
    type Ended = std::sync::mpsc::Sender<(std::thread::ThreadId, Bio, BlkResult)>;
    #[derive(Default)]
    struct Pad(Option<Ended>);
    fn end(mut bio: Bio, res: BlkResult) {
        let ended = bio.pad_mut::<Pad>().0.take().unwrap();
        ended.send((std::thread::current().id(), bio, res)).unwrap();
    }
    let file = image(1 << 20);
    let options = OpenOptions {
        engine: Engine::Uring,
        ..OpenOptions::default()
    };
    let dev: DynDevice = FileDisk::open(file.path(), options).unwrap();
    let others = BioSet::<TallyPad>::new("others", 8);
    let set = BioSet::<Pad>::new("test", 1);
    let me = std::thread::current().id();
    let cases = [
        (Op::Write, BioFlags::empty(), true),
        (Op::Read, BioFlags::empty(), true),
        // A sync would not be done by the thread in a ring either.
        (Op::Write, BioFlags::FUA, false),
    ];
    for round in 0..100u8 {
        for (op, flags, here) in cases {
            let done = Tally::new(8);
            let plug = Plug::new();
            for place in 8..16 {
                let mut bio = others.alloc(Op::Write, Wait::Yes).unwrap();
                bio.pad_mut::<TallyPad>().0 = Some(done.clone());
                bio.set_end_io(tally);
                bio.set_dev(dev.clone(), Sector::new(place * 8));
                bio.push(PagePool::shared().alloc(4096).unwrap()).unwrap();
                submit_bio(bio);
            }
            // Those are held back, and so in flight for certain when this one comes.
            let (ended, told) = channel();
            let mut bio = set.alloc(op, Wait::Yes).unwrap();
            bio.pad_mut::<Pad>().0 = Some(ended);
            bio.set_end_io(end);
            bio.set_dev(dev.clone(), Sector::new(u64::from(round) % 8));
            bio.set_flags(flags);
            let mut buf = PagePool::shared().alloc(512).unwrap();
            buf.fill(if op == Op::Write { round } else { !round });
            bio.push(buf).unwrap();
            crate::submit::submit_and_stay(bio);
            drop(plug);
            let (thread, mut bio, res) = told.recv().unwrap();
            res.unwrap();
            assert_eq!(thread == me, here, "{op:?} {flags:?}");
            assert!(bio.take_buf().unwrap().iter().all(|&byte| byte == round));
            drop(bio);
            assert_eq!(done.wait(), 0);
        }
    }
}

#[test]
fn what_the_end_of_a_bio_submits_is_sent() {
    #[derive(Default)]
    struct Pad(u32, Option<DynDevice>, Option<Arc<Tally>>);
    fn end(mut bio: Bio, res: BlkResult) {
        res.unwrap();
        let Pad(left, dev, done) = std::mem::take(bio.pad_mut::<Pad>());
        if left > 0 {
            bio.reset(Op::Flush);
            *bio.pad_mut::<Pad>() = Pad(left - 1, dev.clone(), done);
            bio.set_end_io(end);
            bio.set_dev(dev.unwrap(), Sector::ZERO);
            submit_bio(bio);
            return;
        }
        drop((bio, dev));
        let done = done.unwrap();
        *done.left.lock_nested() -= 1;
        done.zero.notify_all();
    }
    for mut options in every_way() {
        let file = image(1 << 20);
        // Fewer places than bios, and as many.
        for depth in [2, 8] {
            options.queue_depth = depth;
            let dev: DynDevice = FileDisk::open(file.path(), options).unwrap();
            let set = BioSet::<Pad>::new("test", 8);
            let done = Tally::new(8);
            for _ in 0..8 {
                let mut bio = set.alloc(Op::Flush, Wait::Yes).unwrap();
                *bio.pad_mut::<Pad>() = Pad(20, Some(dev.clone()), Some(done.clone()));
                bio.set_end_io(end);
                bio.set_dev(dev.clone(), Sector::ZERO);
                submit_bio(bio);
            }
            assert_eq!(done.wait(), 0);
        }
    }
}

#[test]
fn what_is_queued_behind_a_call_that_is_not_taken_is_sent() {
    let file = image(1 << 20);
    let options = OpenOptions {
        engine: Engine::Uring,
        ..OpenOptions::default()
    };
    let disk = FileDisk::open(file.path(), options).unwrap();
    let super::Running::Uring(engine) = &disk.engine else {
        panic!("no ring");
    };
    let dev: DynDevice = disk.clone();
    let set = BioSet::<TallyPad>::new("test", 3);
    for _ in 0..100 {
        let done = Tally::new(3);
        engine.queue_bad();
        let plug = Plug::new();
        for _ in 0..3 {
            let mut bio = set.alloc(Op::Flush, Wait::Yes).unwrap();
            bio.pad_mut::<TallyPad>().0 = Some(done.clone());
            bio.set_end_io(tally);
            bio.set_dev(dev.clone(), Sector::ZERO);
            submit_bio(bio);
        }
        drop(plug);
        assert_eq!(done.wait(), 0);
    }
}
