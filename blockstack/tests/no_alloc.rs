//! After warm-up no I/O path allocates from the heap, on any thread.
#![expect(clippy::unwrap_used, reason = "a test")]
#![expect(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use blockstack::backend::file::{Engine, FileDisk, OpenOptions};
use blockstack::backend::mem::MemDisk;
use blockstack::backend::null::NullDisk;
use blockstack::{
    BioFlags, BlkResult, Buf, Dio, DioConfig, DioDone, DirectIo, DynDevice, Extent, Mapping,
    PagePool, Plug, Sector, SectorCount, flush_wait, read_wait, write_wait,
};

struct Counting;

static COUNT: AtomicUsize = AtomicUsize::new(0);
static ON: AtomicBool = AtomicBool::new(false);
/// Allocations that were not freed yet.
static LIVE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: passes everything on to the system's allocator, unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if ON.load(Ordering::Relaxed) {
            COUNT.fetch_add(1, Ordering::Relaxed);
        }
        LIVE.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise about `layout` is the system's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        LIVE.fetch_sub(1, Ordering::Relaxed);
        // SAFETY: `ptr` came from `alloc` above, so from the system, with this layout.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

static ANSWERS: AtomicUsize = AtomicUsize::new(0);

/// An answer that needs no memory: the buffer goes back to its pool.
struct Answer;

impl DioDone for Answer {
    fn done(self, _: Buf, res: BlkResult<usize>) {
        res.unwrap();
        ANSWERS.fetch_add(1, Ordering::Relaxed);
    }
}

fn workload(dev: &DynDevice, dio: &Dio<Answer>) {
    let pool = PagePool::shared();
    let extent = |kind, sector, len| Extent {
        kind,
        sector: Sector::new(sector),
        len: SectorCount::new(len),
    };
    for round in 0..20u64 {
        let buf = pool.alloc(4096).unwrap();
        let buf = write_wait(dev, Sector::new(round * 8), buf, BioFlags::FUA).unwrap();
        drop(read_wait(dev, Sector::new(round * 8), buf).unwrap());
        flush_wait(dev).unwrap();
        let one = [extent(Mapping::Mapped, round * 8, 8)];
        let many = [
            extent(Mapping::Mapped, 0, 3),
            extent(Mapping::Mapped, 900, 30),
            extent(Mapping::New, 400, 2),
            extent(Mapping::Mapped, 500, 29),
        ];
        let plug = Plug::new();
        dio.read(&one, pool.alloc(4096).unwrap(), Answer);
        dio.read(&many, pool.alloc(32768).unwrap(), Answer);
        dio.write(&one, pool.alloc(4096).unwrap(), BioFlags::empty(), Answer);
        dio.write(&many, pool.alloc(32768).unwrap(), BioFlags::FUA, Answer);
        drop(plug);
        dio.wait_idle();
        let (buf, res) = dio.write_wait(&many, pool.alloc(32768).unwrap(), BioFlags::empty());
        assert_eq!((buf.map(|buf| buf.len()), res), (Some(32768), Ok(32768)));
    }
}

/// The devices that writes of data end up on.
fn devices(size: SectorCount) -> Vec<(String, DynDevice)> {
    let mut devices: Vec<(String, DynDevice)> = vec![
        ("memory".into(), MemDisk::new("mem", size)),
        ("null".into(), NullDisk::new("null", size)),
    ];
    for engine in [Engine::Uring, Engine::Threads] {
        for inline in [true, false] {
            let image = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            image.as_file().set_len(size.bytes().unwrap()).unwrap();
            let options = OpenOptions {
                engine,
                inline,
                ..OpenOptions::default()
            };
            let disk = FileDisk::open(image.path(), options).unwrap();
            devices.push((format!("{engine:?}, inline {inline}"), disk));
        }
    }
    devices
}

/// One thread for deferred ends: a second would be started when it is needed first.
fn engine(dev: &DynDevice) -> DirectIo<Answer> {
    let config = DioConfig {
        workers: 1,
        ..DioConfig::default()
    };
    DirectIo::new("test", dev.clone(), config)
}

/// Counts what `work` takes from the heap, on all threads.
fn allocations(work: impl FnOnce()) -> usize {
    COUNT.store(0, Ordering::Relaxed);
    ON.store(true, Ordering::Relaxed);
    work();
    ON.store(false, Ordering::Relaxed);
    COUNT.load(Ordering::Relaxed)
}

/// Runs `work` up to three times, until one run allocates nothing: what a thread allocates once in
/// its life, when it first waits for a lock, can come late.
fn soon_allocates_nothing(name: &str, mut work: impl FnMut()) {
    let mut counts = Vec::new();
    for _ in 0..3 {
        counts.push(allocations(&mut work));
        if counts.ends_with(&[0]) {
            return;
        }
    }
    panic!("allocations over {name}: {counts:?}");
}

fn nothing_is_allocated_after_warm_up() {
    let devices = devices(SectorCount::new(2048));
    for (name, dev) in &devices {
        let dio = engine(dev).open();
        for _ in 0..5 {
            workload(dev, &dio);
        }
        soon_allocates_nothing(name, || workload(dev, &dio));
    }
    assert!(ANSWERS.load(Ordering::Relaxed) >= devices.len() * 6 * 20 * 4);
}

/// The longest extents, and what a write of many has.
const EXTENTS: u64 = 8;

/// One write in so many is as long as can be.
const LARGE: u64 = 1024;
/// Requests in flight at most.
const DEEP: u64 = 8;

/// Writes of changing sizes, up to what a buffer can hold; one in sixteen has many extents, one in
/// eight has new ones, and a few are in flight at a time.
fn direct_writes(dio: &Dio<Answer>, count: u64, longest: u64) {
    let pool = PagePool::shared();
    for number in 0..count {
        let sectors = match number % LARGE {
            0 => longest,
            1 => longest / 2 + 1,
            2 => 512,
            other => 1 + other % 16,
        };
        let pieces = if number % 16 == 0 {
            EXTENTS.min(sectors)
        } else {
            1
        };
        let kind = if number % 8 == 1 {
            Mapping::New
        } else {
            Mapping::Mapped
        };
        let mut extents = [Extent {
            kind,
            sector: Sector::ZERO,
            len: SectorCount::ZERO,
        }; EXTENTS as usize];
        // One behind the other with gaps between, so that none can be joined.
        let (each, mut at) = (sectors / pieces, number % 64);
        let extents = &mut extents[..pieces as usize];
        for (index, extent) in extents.iter_mut().enumerate() {
            let rest = if index == 0 { sectors % pieces } else { 0 };
            extent.sector = Sector::new(at);
            extent.len = SectorCount::new(each + rest);
            at += each + rest + 3;
        }
        let buf = pool.alloc(sectors as usize * 512).unwrap();
        if number % 4 == 3 {
            let (buf, res) = dio.write_wait(extents, buf, BioFlags::empty());
            assert_eq!(res, Ok(buf.unwrap().len()));
        } else {
            dio.write(extents, buf, BioFlags::empty(), Answer);
        }
        if number % DEEP == DEEP - 1 {
            dio.wait_idle();
        }
    }
    dio.wait_idle();
}

/// As many buffers of each length as can be in use at a time.
fn warm_pool() {
    for shift in 12..=21 {
        let bufs: Vec<_> = (0..=DEEP)
            .map(|_| PagePool::shared().alloc(1 << shift))
            .collect();
        assert!(bufs.iter().all(Result::is_ok));
    }
}

fn nothing_is_allocated_in_100_000_direct_writes() {
    let devices = devices(SectorCount::new(8192));
    for (name, dev) in &devices {
        let memory = matches!(name.as_str(), "memory" | "null");
        // The engine most in use is tried as long as memory, the others in short.
        let (count, longest) = match (memory, name.as_str()) {
            (true, _) => (100_000, 4096),
            (_, "Uring, inline true") => (100_000, 2048),
            _ => (4000, 2048),
        };
        let dio = engine(dev).open();
        direct_writes(&dio, 2 * LARGE, longest);
        let start = Instant::now();
        soon_allocates_nothing(name, || direct_writes(&dio, count, longest));
        println!("{name}: {count} writes in {:?}", start.elapsed());
    }
}

/// What a file keeps is gone with it.
fn a_closed_file_leaves_nothing() {
    let dev: DynDevice = MemDisk::new("mem", SectorCount::new(8192));
    let engine = engine(&dev);
    let round = || direct_writes(&engine.open(), 64, 64);
    round();
    let before = LIVE.load(Ordering::Relaxed);
    let count = allocations(|| (0..1000).for_each(|_| round()));
    let left = LIVE.load(Ordering::Relaxed).saturating_sub(before);
    assert!(
        count >= 1000 && left < 100,
        "{left} of {count} allocations are still there"
    );
}

/// One test, since the allocator counts what any thread does.
#[test]
fn no_allocation() {
    warm_pool();
    nothing_is_allocated_after_warm_up();
    nothing_is_allocated_in_100_000_direct_writes();
    a_closed_file_leaves_nothing();
}
