//! What a cached block costs, first beside a well-known cache of the same keys in the same run.
//!
//! `BUFIO_HIT=get:100000` (or `read`, `peer`) does that many hits on one thread and nothing else:
//! two runs under callgrind differ by the instructions of the hits.

#![allow(clippy::expect_used, reason = "a bench ends where something is wrong")]

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blockstack::SectorCount;
use blockstack::backend::mem::MemDisk;
use blockstack::sync::Rank;
use bufio::{Client, ClientConfig, no_check};
use divan::counter::ItemsCount;

fn main() {
    if let Ok(what) = std::env::var("BUFIO_HIT") {
        return count(&what);
    }
    compare();
    divan::main();
}

const BLOCKS: u64 = 4096;
const ROUNDS: u32 = 300;
const PASSES: u32 = 4;

/// What answers for a block of the cache.
trait Hits: Sync {
    fn name(&self) -> &'static str;
    fn hit(&self, block: u64);
}

struct Get(Arc<Client>);
struct Read(Arc<Client>);
/// What the machine gives: as many atomic steps as a hit has at least, on a line of the block's own.
struct Ideal(Vec<Line>);

#[derive(Default)]
#[repr(align(64))]
struct Line(AtomicU64);

struct Peer(quick_cache::sync::Cache<u64, Arc<[u8]>>);

impl Hits for Get {
    fn name(&self) -> &'static str {
        "bufio get"
    }
    fn hit(&self, block: u64) {
        drop(black_box(self.0.get(block)));
    }
}

impl Hits for Read {
    fn name(&self) -> &'static str {
        "bufio read"
    }
    fn hit(&self, block: u64) {
        drop(black_box(self.0.read(block, no_check())));
    }
}

impl Hits for Ideal {
    fn name(&self) -> &'static str {
        "four atomic steps"
    }
    fn hit(&self, block: u64) {
        let line = &self.0[block as usize].0;
        for _ in 0..4 {
            line.fetch_add(1, Ordering::AcqRel);
        }
    }
}

impl Hits for Peer {
    fn name(&self) -> &'static str {
        "quick_cache get"
    }
    fn hit(&self, block: u64) {
        drop(black_box(self.0.get(&block)));
    }
}

fn cached() -> Arc<Client> {
    let client = client(2 * BLOCKS as usize);
    (0..BLOCKS).for_each(|block| drop(client.read(block, no_check())));
    client
}

fn peer() -> Peer {
    let cache = quick_cache::sync::Cache::new(2 * BLOCKS as usize);
    (0..BLOCKS).for_each(|block| cache.insert(block, vec![0u8; 4096].into()));
    Peer(cache)
}

/// Which blocks the threads hit.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Keys {
    /// Each thread its own, scattered among the others'.
    Own,
    /// All threads all of them, in another order.
    Same,
}

/// Nanoseconds of one hit on each of `threads`, from a short time: from the start of all to the
/// end of the last, so that threads that had to take turns do not look fast.
fn round(hits: &dyn Hits, threads: u64, keys: Keys) -> f64 {
    // Not asleep: a thread that is woken has its processor late.
    let ready = AtomicU64::new(0);
    let one = |thread: u64| {
        // A power of two of blocks, taken in an order without a pattern.
        let (count, step, first) = match keys {
            Keys::Own => (BLOCKS / threads, threads, thread),
            Keys::Same => (BLOCKS, 1, 0),
        };
        let stride = 1029 + 28 * thread;
        ready.fetch_add(1, Ordering::AcqRel);
        while ready.load(Ordering::Acquire) < threads {
            std::hint::spin_loop();
        }
        let start = Instant::now();
        for _ in 0..PASSES * threads as u32 {
            for at in 0..count {
                hits.hit(at.wrapping_mul(stride) % count * step + first);
            }
        }
        (start, Instant::now())
    };
    let (mut start, mut end) = (None, None);
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads)
            .map(|thread| {
                let one = &one;
                scope.spawn(move || one(thread))
            })
            .collect();
        let mine = std::iter::once(one(0));
        let joined = others
            .into_iter()
            .map(|other| other.join().expect("thread"));
        for (from, to) in mine.chain(joined) {
            start = start.min(Some(from)).or(Some(from));
            end = end.max(Some(to));
        }
    });
    let hits = match keys {
        Keys::Own => u64::from(PASSES) * BLOCKS,
        Keys::Same => u64::from(PASSES) * BLOCKS * threads,
    };
    let wall = end
        .zip(start)
        .map_or(Duration::ZERO, |(end, start)| end - start);
    wall.as_nanos() as f64 / hits as f64
}

/// Prints the table. All take turns in short rounds, so that what else the machine does meets all;
/// of the rounds the best counts.
fn compare() {
    let (get, read, peer) = (Get(cached()), Read(cached()), peer());
    let ideal = Ideal((0..BLOCKS).map(|_| Line::default()).collect());
    let all: [&dyn Hits; 4] = [&get, &read, &peer, &ideal];
    let cases = [(1, Keys::Own), (2, Keys::Own), (2, Keys::Same)];
    let mut best = [[f64::INFINITY; 3]; 4];
    for _ in 0..ROUNDS {
        for (row, hits) in all.iter().enumerate() {
            for (column, &(threads, keys)) in cases.iter().enumerate() {
                best[row][column] = best[row][column].min(round(*hits, threads, keys));
            }
        }
    }
    println!(
        "hits of {BLOCKS} blocks     1 thread   2, own blocks   2, same blocks   rate of 2 / 1"
    );
    for (hits, ns) in all.iter().zip(&best) {
        println!(
            "{:<20} {:>9.1} ns {:>12.1} ns {:>13.1} ns {:>15.2}",
            hits.name(),
            ns[0],
            ns[1],
            ns[2],
            2.0 * ns[0] / ns[1],
        );
    }
    let ratio = |row: usize, column: usize| best[row][column] / best[2][column];
    for (row, hits) in all.iter().enumerate().take(2) {
        println!(
            "{:<20} {:>9.2}    {:>12.2}    {:>13.2}     of {}'s time",
            hits.name(),
            ratio(row, 0),
            ratio(row, 1),
            ratio(row, 2),
            peer.name(),
        );
    }
}

fn count(what: &str) {
    let (name, hits) = what.split_once(':').expect("name:hits");
    let hits: u64 = hits.parse().expect("a number of hits");
    let all: [(&str, &dyn Hits); 3] = [
        ("get", &Get(cached())),
        ("read", &Read(cached())),
        ("peer", &peer()),
    ];
    let (_, chosen) = all.iter().find(|(at, _)| *at == name).expect("a name");
    for at in 0..hits {
        chosen.hit(at.wrapping_mul(1029) % BLOCKS);
    }
}

fn client(cache_blocks: usize) -> Arc<Client> {
    let config = ClientConfig {
        block_size: 4096,
        cache_bytes: cache_blocks * 4096,
        rank: Rank::FsBufio,
        writeback_age: Duration::from_secs(3600),
        strict_holds: false,
    };
    let disk = MemDisk::new("mem0", SectorCount::new(BLOCKS * 8));
    Client::new(disk, config).expect("client")
}

#[divan::bench]
fn read_hit_and_look(bencher: divan::Bencher) {
    let client = cached();
    bencher.counter(ItemsCount::new(BLOCKS)).bench(|| {
        let mut sum = 0u64;
        for block in 0..BLOCKS {
            if let Ok(held) = client.read(block, no_check()) {
                sum += u64::from(held.data()[0]);
            }
        }
        sum
    });
}

#[divan::bench]
fn read_miss_with_eviction(bencher: divan::Bencher) {
    let client = client(64);
    bencher.counter(ItemsCount::new(BLOCKS)).bench(|| {
        for block in 0..BLOCKS {
            drop(divan::black_box(client.read(block, no_check())));
        }
    });
}

#[divan::bench]
fn dirty_and_write(bencher: divan::Bencher) {
    let client = client(8 * BLOCKS as usize);
    (0..BLOCKS).for_each(|block| drop(client.read(block, no_check())));
    bencher.counter(ItemsCount::new(BLOCKS)).bench(|| {
        for block in 0..BLOCKS {
            if let Ok(held) = client.read(block, no_check()) {
                held.mark_dirty();
            }
        }
        client.write_dirty()
    });
}
