//! After warm-up no bio through a mapped device allocates from the heap, on any thread.
#![expect(clippy::unwrap_used, reason = "a test")]
#![expect(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use blockstack::backend::null::NullDisk;
use blockstack::{
    BioFlags, BlkError, DynDevice, Op, PagePool, Sector, SectorCount, flush_wait, range_wait,
    read_wait, write_wait,
};
use dmtargets::target::MapResult;
use dmtargets::{
    Args, CtrError, DevRange, DmBio, FlushRoute, MappedDevice, Registry, Table, TableCx, Target,
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

/// Discards and flushes go to each of six ranges of a device, and data to the first.
struct Six(Vec<DevRange>);

impl Target for Six {
    const NAME: &'static str = "six";
    type PerBio = ();

    fn new(args: &mut Args<'_>, cx: &TableCx<'_>) -> Result<Self, CtrError> {
        let dev = cx.open(args.word("device")?)?;
        let range = |at: u64| DevRange::new(dev.clone(), Sector::new(at * 10), cx.len());
        Ok(Self((0..6).map(range).collect::<Result<_, _>>()?))
    }
    fn devices(&self) -> &[DevRange] {
        &self.0
    }
    fn duplicates(&self, _: Op) -> usize {
        self.0.len()
    }
    fn flush_route(&self) -> FlushRoute {
        FlushRoute::ThroughMap
    }
    fn map(&self, mut bio: DmBio) -> MapResult {
        bio.remap(&self.0[bio.nr()]);
        MapResult::Remapped(bio)
    }
    fn table_args(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        write!(out, "{}", self.0[0].dev().name())
    }
}

/// Reads and writes inside a row and across rows, flushes alone and before a write, discards.
fn workload(dev: &DynDevice) {
    let pool = PagePool::shared();
    for round in 0..20u64 {
        let sector = Sector::new(round * 13);
        let buf = pool.alloc(65536).unwrap();
        let buf = write_wait(dev, sector, buf, BioFlags::empty()).unwrap();
        let buf = write_wait(dev, sector, buf, BioFlags::PREFLUSH | BioFlags::FUA).unwrap();
        drop(read_wait(dev, sector, buf).unwrap());
        flush_wait(dev).unwrap();
        range_wait(dev, Op::Discard, sector, SectorCount::new(100)).unwrap();
        range_wait(dev, Op::WriteZeroes, sector, SectorCount::new(90)).unwrap();
    }
}

#[test]
fn a_mapped_device_allocates_nothing_after_warm_up() {
    let disks: Vec<DynDevice> = (0..2)
        .map(|at| NullDisk::new(&format!("mem{at}"), SectorCount::new(4096)) as DynDevice)
        .collect();
    let open = |name: &str| {
        let disk = disks.iter().find(|disk| disk.name() == name);
        disk.cloned().ok_or(BlkError::NoDevice)
    };
    let rows = "0 100 linear mem0 8\n100 60 linear mem1 0\n160 400 linear mem0 1000\n";
    let table = Table::parse(rows, &Registry::standard(), &open).unwrap();
    let lower: DynDevice = MappedDevice::create("lower", table).unwrap();
    let open = |_: &str| Ok(lower.clone());
    let rows = "0 200 linear lower 0\n200 300 six lower\n";
    let mut registry = Registry::standard();
    registry.register::<Six>();
    let table = Table::parse(rows, &registry, &open).unwrap();
    let top: DynDevice = MappedDevice::create("top", table).unwrap();
    // Each of the pooled bios grows its lists on its first use.
    for _ in 0..30 {
        workload(&top);
    }
    ON.store(true, Ordering::SeqCst);
    workload(&top);
    ON.store(false, Ordering::SeqCst);
    assert_eq!(COUNT.load(Ordering::SeqCst), 0);
}
