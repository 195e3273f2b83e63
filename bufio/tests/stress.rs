//! Many threads, a tiny cache, a disk that ends bios late and out of order.

#![allow(clippy::unwrap_used, reason = "a test ends where something is wrong")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blockstack::DynDevice;
use blockstack::backend::file::{Engine, FileDisk, OpenOptions};
use bufio::{Client, ClientConfig, Invalid, Validator};
use common::{TestDisk, config, eventually, sum};

const THREADS: u64 = 4;
const BLOCKS: u64 = 160;
const ROUNDS: u64 = 4000;

/// Sum in byte 0, block number in byte 1 unless the block is all zeros: a misplaced or torn block
/// is seen at once.
struct Tagged;

impl Validator for Tagged {
    fn check(&self, block: u64, data: &[u8]) -> Result<(), Invalid> {
        let zeros = data.iter().all(|&byte| byte == 0);
        if zeros || (data[0] == sum(data) && data[1] == block as u8 && is_uniform(data)) {
            Ok(())
        } else {
            Err(Invalid {
                what: "torn or misplaced",
            })
        }
    }
    fn prepare(&self, _: u64, data: &mut [u8]) {
        data[0] = sum(data);
    }
}

fn is_uniform(data: &[u8]) -> bool {
    data[2..].windows(2).all(|pair| pair[0] == pair[1])
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// The only one who changes the blocks `b` with `b % THREADS == thread`; reads the others'.
fn worker(client: &Client, thread: u64, known: &mut [Option<u8>]) {
    let tagged: Arc<dyn Validator> = Arc::new(Tagged);
    let mut random = Random(0x1234_5678 + thread);
    for round in 0..ROUNDS {
        let mine = random.below(BLOCKS / THREADS) * THREADS + thread;
        let tag = round as u8;
        match random.below(12) {
            0..=4 => {
                let held = client.read(mine, &tagged).unwrap();
                if let Some(known) = known[mine as usize] {
                    assert_eq!(held.data()[2], known, "block {mine} went back in time");
                }
                let mut data = held.data_mut();
                data[1] = mine as u8;
                data[2..].fill(tag);
                drop(data);
                held.mark_dirty();
                known[mine as usize] = Some(tag);
            }
            5 => {
                client.forget(mine);
                let held = client.new_zeroed(mine, &tagged).unwrap();
                let mut data = held.data_mut();
                data[1] = mine as u8;
                data[2..].fill(tag);
                held.mark_dirty();
                known[mine as usize] = Some(tag);
            }
            6 => {
                client.forget(mine);
                known[mine as usize] = None;
            }
            7 => {
                let held = client.read(mine, &tagged).unwrap();
                client.write_buffers(&[held]).unwrap();
            }
            8 => {
                let held = client.read(mine, &tagged).unwrap();
                held.pin();
                client.write_dirty_async();
                held.unpin();
            }
            9 => client.prefetch(random.below(BLOCKS), 8),
            10 if round % 16 == 0 => client.write_dirty().unwrap(),
            _ => {
                let other = random.below(BLOCKS);
                let held = client.read(other, &tagged).unwrap();
                assert!(is_uniform(&held.data()));
            }
        }
    }
}

#[test]
fn nothing_is_lost_torn_or_overtaken() {
    let disk = TestDisk::new(BLOCKS * 2);
    let client = Client::new(
        disk.clone(),
        ClientConfig {
            cache_bytes: 24 << 10,
            writeback_age: Duration::from_millis(8),
            ..config()
        },
    )
    .unwrap();
    disk.set(|state| {
        state.hold_reads = true;
        state.hold_writes = true;
    });
    let stop = AtomicBool::new(false);
    let mut known: Vec<_> = (0..THREADS).map(|_| vec![None; BLOCKS as usize]).collect();
    std::thread::scope(|scope| {
        let ender = scope.spawn(|| {
            let mut random = Random(99);
            while !stop.load(Ordering::Relaxed) {
                disk.release_some(|n| random.below(n as u64) as usize);
                std::thread::yield_now();
            }
        });
        let workers: Vec<_> = known
            .iter_mut()
            .enumerate()
            .map(|(thread, known)| {
                let client = &client;
                scope.spawn(move || worker(client, thread as u64, known))
            })
            .collect();
        let ended: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        stop.store(true, Ordering::Relaxed);
        ender.join().unwrap();
        disk.open();
        assert!(ended.iter().all(Result::is_ok));
    });
    client.write_dirty().unwrap();
    for (thread, known) in known.iter().enumerate() {
        for block in (thread..BLOCKS as usize).step_by(THREADS as usize) {
            if let Some(tag) = known[block] {
                let byte = disk.set(|state| state.bytes[block * 1024 + 2]);
                assert_eq!(byte, tag, "block {block}");
            }
        }
    }
    assert_eq!(
        disk.set(|state| state.overlaps),
        0,
        "two writes of a block in flight"
    );
    let stats = client.stats();
    assert_eq!((stats.dirty, stats.pinned), (0, 0));
    // The thread may still be letting go of what it wrote.
    eventually("all can be evicted", || {
        client.shrink(0);
        client.stats().buffers == 0
    });
}

/// The same over image files, whose bios end on other threads and go down in batches.
#[test]
fn nothing_is_lost_on_the_way_to_a_file() {
    for engine in [Engine::Uring, Engine::Threads] {
        let image = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        image.as_file().set_len(BLOCKS * 4096).unwrap();
        let options = OpenOptions {
            engine,
            ..OpenOptions::default()
        };
        let disk: DynDevice = FileDisk::open(image.path(), options).unwrap();
        let config = ClientConfig {
            block_size: 4096,
            cache_bytes: 24 * 4096,
            writeback_age: Duration::from_millis(8),
            ..config()
        };
        let client = Client::new(disk.clone(), config).unwrap();
        let mut known: Vec<_> = (0..THREADS).map(|_| vec![None; BLOCKS as usize]).collect();
        std::thread::scope(|scope| {
            for (thread, known) in known.iter_mut().enumerate() {
                let client = &client;
                scope.spawn(move || worker(client, thread as u64, known));
            }
        });
        client.write_dirty().unwrap();
        client.flush().unwrap();
        drop(client);
        let client = Client::new(disk, config).unwrap();
        let tagged: Arc<dyn Validator> = Arc::new(Tagged);
        client.prefetch(0, BLOCKS);
        for (thread, known) in known.iter().enumerate() {
            for block in (thread..BLOCKS as usize).step_by(THREADS as usize) {
                if let Some(tag) = known[block] {
                    let held = client.read(block as u64, &tagged).unwrap();
                    assert_eq!(held.data()[2], tag, "block {block}");
                }
            }
        }
    }
}
