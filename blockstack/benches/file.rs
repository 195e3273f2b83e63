//! What a bio costs over the bare system call, on one file in one run: ratios, not times.
//!
//! `cargo bench -p blockstack --bench file`; `BLOCKSTACK_BENCH_DIR` says where the image goes.
#![expect(
    clippy::unwrap_used,
    reason = "a benchmark that cannot run may as well stop"
)]

use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blockstack::backend::file::{Engine, FileDisk, OpenOptions};
use blockstack::{
    Bio, BioFlags, BioSet, BlkResult, DynDevice, Op, PagePool, Plug, Sector, Wait, read_wait,
    submit_bio, write_wait,
};

const SIZE: u64 = 256 << 20;
const SPAN: Duration = Duration::from_millis(700);

struct Places(u64);

impl Places {
    fn next(&mut self, len: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 20) % (SIZE / len) * len
    }
}

/// Operations a second.
fn rate(mut one: impl FnMut() -> u64) -> f64 {
    let start = Instant::now();
    let mut done = 0;
    while start.elapsed() < SPAN {
        done += one();
    }
    done as f64 / start.elapsed().as_secs_f64()
}

fn report(what: &str, rate: f64, base: f64) {
    let micros = 1e6 / rate;
    println!(
        "{what:<44} {rate:>10.0}/s {micros:>8.2} us  x{:.2}",
        rate / base
    );
}

/// One place in the window of requests in flight.
#[derive(Default)]
struct Place(Option<Arc<AtomicU64>>);

fn ended(mut bio: Bio, res: BlkResult) {
    res.unwrap();
    let done = bio.pad_mut::<Place>().0.take();
    drop(bio);
    done.unwrap().fetch_add(1, Ordering::Relaxed);
}

/// `depth` reads in flight, `batch` submitted under each plug.
fn deep(dev: &DynDevice, len: u64, depth: usize, batch: u64) -> f64 {
    let set = BioSet::<Place>::new("bench", depth);
    let done = Arc::new(AtomicU64::new(0));
    let mut places = Places(1);
    let rate = rate(|| {
        let _plug = Plug::new();
        for _ in 0..batch {
            let mut bio = set.alloc(Op::Read, Wait::Yes).unwrap();
            bio.push(PagePool::shared().alloc(len as usize).unwrap())
                .unwrap();
            bio.set_dev(dev.clone(), Sector::from_bytes(places.next(len)).unwrap());
            bio.set_end_io(ended);
            bio.pad_mut::<Place>().0 = Some(done.clone());
            submit_bio(bio);
        }
        batch
    });
    while set.in_use() > 0 {
        std::thread::yield_now();
    }
    rate
}

/// The same with a bare ring, reaped by the thread that submits.
fn deep_bare(fd: i32, len: u64, depth: u64) -> f64 {
    use io_uring::{IoUring, opcode, types};
    let mut ring = IoUring::new(depth as u32).unwrap();
    let mut bufs: Vec<_> = (0..depth)
        .map(|_| PagePool::shared().alloc(len as usize).unwrap())
        .collect();
    let mut free: Vec<u64> = (0..depth).collect();
    let mut places = Places(1);
    rate(|| {
        while let Some(slot) = free.pop() {
            let addr = bufs[slot as usize].as_mut_ptr();
            let entry = opcode::Read::new(types::Fd(fd), addr, len as u32)
                .offset(places.next(len))
                .build()
                .user_data(slot);
            // SAFETY: the buffer stays in `bufs` and nobody else uses it while its slot is taken;
            // the ring is dropped before `bufs`, after its last reads were reaped or not looked at.
            unsafe { ring.submission().push(&entry).unwrap() };
        }
        ring.submit_and_wait(1).unwrap();
        let before = free.len();
        free.extend(ring.completion().map(|completion| completion.user_data()));
        (free.len() - before) as u64
    })
}

fn main() {
    let dir = std::env::var("BLOCKSTACK_BENCH_DIR").unwrap_or_else(|_| ".".into());
    let file = tempfile::NamedTempFile::new_in(dir).unwrap();
    let chunk = vec![0x5au8; 1 << 20];
    for at in (0..SIZE).step_by(1 << 20) {
        file.as_file().write_all_at(&chunk, at).unwrap();
    }
    file.as_file().sync_all().unwrap();
    let bare = std::fs::File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(file.path())
        .unwrap();
    let pool = PagePool::shared();
    for (op, len) in [("read", 4096u64), ("write", 4096), ("read", 1 << 20)] {
        let mut buf = pool.alloc(len as usize).unwrap();
        let mut places = Places(1);
        let base = rate(|| {
            let at = places.next(len);
            if op == "read" {
                bare.read_exact_at(&mut buf, at).unwrap();
            } else {
                bare.write_all_at(&buf, at).unwrap();
            }
            1
        });
        report(&format!("direct {op} {len}, bare call"), base, base);
        for (engine, inline) in [
            (Engine::Uring, true),
            (Engine::Uring, false),
            (Engine::Threads, false),
        ] {
            let options = OpenOptions {
                engine,
                inline,
                ..OpenOptions::default()
            };
            let dev: DynDevice = FileDisk::open(file.path(), options).unwrap();
            let mut held = Some(pool.alloc(len as usize).unwrap());
            let mut places = Places(1);
            let got = rate(|| {
                let sector = Sector::from_bytes(places.next(len)).unwrap();
                let buf = held.take().unwrap();
                let back = if op == "read" {
                    read_wait(&dev, sector, buf)
                } else {
                    write_wait(&dev, sector, buf, BioFlags::empty())
                };
                held = Some(back.unwrap());
                1
            });
            report(&format!("  bio, {engine:?}, inline {inline}"), got, base);
        }
    }
    let base = deep_bare(bare.as_raw_fd(), 4096, 32);
    report("direct read 4096, depth 32, bare ring", base, base);
    for engine in [Engine::Uring, Engine::Threads] {
        let options = OpenOptions {
            engine,
            ..OpenOptions::default()
        };
        let dev: DynDevice = FileDisk::open(file.path(), options).unwrap();
        for batch in [1, 16] {
            let got = deep(&dev, 4096, 32, batch);
            report(
                &format!("  bios, {engine:?}, plugged by {batch}"),
                got,
                base,
            );
        }
    }
    let cached = std::fs::File::open(file.path()).unwrap();
    let mut buf = pool.alloc(4096).unwrap();
    let mut places = Places(1);
    let mut cached_read = || {
        cached.read_exact_at(&mut buf, places.next(4096)).unwrap();
        1
    };
    std::fs::read(file.path()).unwrap();
    let base = rate(&mut cached_read);
    report("cached read 4096, bare call", base, base);
    let mem: DynDevice =
        blockstack::backend::mem::MemDisk::new("mem", blockstack::SectorCount::new(SIZE / 512));
    let options = OpenOptions {
        direct: false,
        ..OpenOptions::default()
    };
    let dev: DynDevice = FileDisk::open(file.path(), options).unwrap();
    for (what, dev) in [("file", dev), ("memory, zeros", mem)] {
        let mut held = Some(pool.alloc(4096).unwrap());
        let mut places = Places(1);
        let got = rate(|| {
            let sector = Sector::from_bytes(places.next(4096)).unwrap();
            held = Some(read_wait(&dev, sector, held.take().unwrap()).unwrap());
            1
        });
        report(&format!("  bio, {what}"), got, base);
    }
}
