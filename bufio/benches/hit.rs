//! What a cached block costs.

#![allow(clippy::expect_used, reason = "a bench ends where something is wrong")]

use std::time::Duration;

use blockstack::SectorCount;
use blockstack::backend::mem::MemDisk;
use blockstack::sync::Rank;
use bufio::{Client, ClientConfig, no_check};
use divan::counter::ItemsCount;

fn main() {
    divan::main();
}

const BLOCKS: u64 = 4096;

fn client(cache_blocks: usize) -> std::sync::Arc<Client> {
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

#[divan::bench(threads = [1, 2])]
fn read_hit(bencher: divan::Bencher) {
    let client = client(2 * BLOCKS as usize);
    (0..BLOCKS).for_each(|block| drop(client.read(block, no_check())));
    bencher.counter(ItemsCount::new(BLOCKS)).bench(|| {
        for block in 0..BLOCKS {
            drop(divan::black_box(
                client.read(block.wrapping_mul(1029) % BLOCKS, no_check()),
            ));
        }
    });
}

#[divan::bench]
fn read_hit_and_look(bencher: divan::Bencher) {
    let client = client(2 * BLOCKS as usize);
    (0..BLOCKS).for_each(|block| drop(client.read(block, no_check())));
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
