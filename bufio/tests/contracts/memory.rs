//! Too little memory: the reserve, the contract of holds, limits and minimum.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use blockstack::{BlkError, Buf, PagePool};
use bufio::{BufError, Client, ClientConfig, no_check};

use super::{fill, on_disk};
use crate::common::{TestDisk, Waits, config, rig, within_reason};

pub fn exhaust(pool: &PagePool) -> Vec<Buf> {
    std::iter::from_fn(|| pool.alloc(4096).ok()).collect()
}

pub fn strict(pool: &PagePool, reserved: usize) -> Arc<Client> {
    let config = ClientConfig {
        strict_holds: true,
        rank: blockstack::sync::Rank::DmBufio,
        ..config()
    };
    Client::with_reserve(TestDisk::new(65536), config, pool.clone(), reserved).unwrap()
}

#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "thread holds 2 buffers")]
fn a_second_hold_of_a_strict_client_panics() {
    let client = strict(&PagePool::new(2 << 20), 1);
    let _one = client.read(1, no_check()).unwrap();
    let _same = client.read(1, no_check()).unwrap();
    let _two = client.read(2, no_check());
}

#[test]
#[cfg(debug_assertions)]
fn one_thread_may_hold_as_many_as_are_reserved() {
    let client = strict(&PagePool::new(2 << 20), 3);
    let _held: Vec<_> = (0..3)
        .map(|block| client.read(block, no_check()).unwrap())
        .collect();
    let other = std::thread::scope(|scope| {
        let client = &client;
        scope
            .spawn(move || {
                let _one = client.read(7, no_check()).unwrap();
                let _two = client.read(8, no_check()).unwrap();
            })
            .join()
    });
    assert!(other.is_err());
}

/// Three threads, one page beside the reserves: all get through, since each holds one buffer only.
#[test]
fn a_strict_client_makes_progress_without_memory() {
    let pool = PagePool::new(2 << 20);
    let client = strict(&pool, 1);
    let mut hog: Vec<_> = std::iter::from_fn(|| pool.alloc(4096).ok()).collect();
    hog.truncate(hog.len() - 1);
    std::thread::scope(|scope| {
        for thread in 0..3u64 {
            let client = &client;
            scope.spawn(move || {
                for round in 0..200 {
                    let block = thread * 1000 + round;
                    let buffer = client.new_zeroed(block, no_check()).unwrap();
                    buffer.data_mut().fill(thread as u8 + 1);
                    buffer.mark_dirty();
                }
            });
        }
    });
    client.write_dirty().unwrap();
    for thread in 0..3u64 {
        let block = thread * 1000 + 199;
        assert_eq!(
            client.read(block, no_check()).unwrap().data()[9],
            thread as u8 + 1
        );
    }
}

/// The text's rule: the reserve lets one through, and what is released the next.
#[test]
fn the_reserve_lets_one_reader_through_and_the_others_follow() {
    let pool = PagePool::new(2 << 20);
    let client = strict(&pool, 1);
    let _hog = exhaust(&pool);
    let reader = client.clone();
    let first = within_reason("a read from the reserve", move || {
        reader.read(1, no_check())
    })
    .unwrap();
    let waits = Waits::default();
    std::thread::scope(|scope| {
        let second = scope.spawn(|| {
            waits.count_mine();
            client.read(2, no_check()).map(|held| held.block())
        });
        waits.until(1);
        assert!(client.get(2).is_none() && !second.is_finished());
        drop(first);
        assert_eq!(second.join().unwrap(), Ok(2));
    });
    assert!(client.get(1).is_none(), "its memory went to the second");
}

#[test]
fn a_client_that_is_not_strict_is_told_when_there_is_no_memory() {
    let pool = PagePool::new(2 << 20);
    let client = Client::with_reserve(TestDisk::new(64), config(), pool.clone(), 1).unwrap();
    let _hog = exhaust(&pool);
    let first = client.read(1, no_check()).unwrap();
    let none = Err(BufError::Blk(BlkError::NoMemory));
    assert_eq!(client.read(2, no_check()).map(|_| ()), none);
    drop(first);
    assert!(client.read(2, no_check()).is_ok());
}

#[test]
fn a_reader_without_memory_writes_what_is_dirty() {
    let pool = PagePool::new(2 << 20);
    let disk = TestDisk::new(64);
    let client = Client::with_reserve(disk.clone(), config(), pool.clone(), 1).unwrap();
    let _hog = exhaust(&pool);
    fill(&client, 4, 1);
    assert!(client.read(5, no_check()).is_ok());
    assert_eq!(on_disk(&disk, 4), 1);
}

/// What was lost: progress. A writer took the last memory for writes and then waited for a content,
/// whose holder needed that memory.
#[test]
fn a_writer_that_waits_for_a_content_holds_no_memory_for_writes() {
    let pool = PagePool::new(2 << 20);
    let client = Client::with_reserve(TestDisk::new(64), config(), pool.clone(), 1).unwrap();
    fill(&client, 4, 1);
    fill(&client, 5, 1);
    let _hog = exhaust(&pool);
    let writer = {
        let client = client.clone();
        let (waits, locked) = (Waits::default(), client.get(4).unwrap());
        within_reason("both writers end", move || {
            let content = locked.data_mut();
            let other = {
                let (client, waits) = (client.clone(), waits.clone());
                std::thread::spawn(move || {
                    waits.count_mine();
                    client.write_buffers(&[client.get(4).unwrap()])
                })
            };
            waits.until(1);
            client.write_buffers(&[client.get(5).unwrap()]).unwrap();
            drop(content);
            other
        })
    };
    assert_eq!(writer.join().unwrap(), Ok(()));
}

#[test]
fn the_limit_holds_back_who_makes_dirty_faster_than_the_disk_writes() {
    let (disk, client) = rig(4096);
    disk.set(|state| state.hold_writes = true);
    let (waits, most) = (Waits::default(), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let _opens = disk.opens();
        let maker = scope.spawn(|| {
            waits.count_mine();
            for block in 0..400 {
                fill(&client, block, 1);
                most.fetch_max(client.stats().dirty, Ordering::Relaxed);
            }
        });
        waits.until(1);
        assert!(!maker.is_finished());
        disk.open();
        maker.join().unwrap();
    });
    let most = most.load(Ordering::Relaxed);
    assert!((60..=65).contains(&most), "{most} were dirty");
}

#[test]
fn the_cache_does_not_become_smaller_than_its_minimum() {
    let (_disk, client) = rig(4096);
    client.set_minimum_buffers(100);
    (0..300).for_each(|block| drop(client.read(block, no_check()).unwrap()));
    let buffers = client.stats().buffers;
    assert!((98..=102).contains(&buffers), "{buffers}, limit 64");
    client.shrink(0);
    assert_eq!(client.stats().buffers, 100);
    client.drop_buffers();
    assert_eq!(client.stats().buffers, 0);
    client.set_minimum_buffers(0);
    (0..300).for_each(|block| drop(client.read(block, no_check()).unwrap()));
    assert!(client.stats().buffers <= 66);
}

#[test]
fn who_finds_no_memory_takes_it_from_the_minimum() {
    let pool = PagePool::new(2 << 20);
    let client = Client::with_reserve(TestDisk::new(4096), config(), pool.clone(), 1).unwrap();
    client.set_minimum_buffers(100);
    (0..50).for_each(|block| drop(client.read(block, no_check()).unwrap()));
    let _hog = exhaust(&pool);
    for block in 100..200 {
        assert!(client.read(block, no_check()).is_ok());
    }
}
