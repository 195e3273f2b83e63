//! After warm-up no I/O path allocates from the heap, on any thread.
#![expect(clippy::unwrap_used, reason = "a test")]
#![expect(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

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

// SAFETY: passes everything on to the system's allocator, unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if ON.load(Ordering::Relaxed) {
            COUNT.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller's promise about `layout` is the system's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
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

#[test]
fn nothing_is_allocated_after_warm_up() {
    let size = SectorCount::new(2048);
    let mut devices: Vec<(String, DynDevice)> = vec![
        ("memory".into(), MemDisk::new("mem", size)),
        ("null".into(), NullDisk::new("null", size)),
    ];
    for engine in [Engine::Uring, Engine::Threads] {
        for inline in [true, false] {
            let image = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            image.as_file().set_len(1 << 20).unwrap();
            let options = OpenOptions {
                engine,
                inline,
                ..OpenOptions::default()
            };
            let disk = FileDisk::open(image.path(), options).unwrap();
            devices.push((format!("{engine:?}, inline {inline}"), disk));
        }
    }
    for (name, dev) in &devices {
        let dio = DirectIo::new("test", dev.clone(), DioConfig::default()).open();
        for _ in 0..5 {
            workload(dev, &dio);
        }
        COUNT.store(0, Ordering::Relaxed);
        ON.store(true, Ordering::Relaxed);
        workload(dev, &dio);
        ON.store(false, Ordering::Relaxed);
        assert_eq!(COUNT.load(Ordering::Relaxed), 0, "allocations over {name}");
    }
    assert_eq!(ANSWERS.load(Ordering::Relaxed), devices.len() * 6 * 20 * 4);
}
