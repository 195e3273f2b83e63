//! Each contract of the client, on its own.

#![allow(clippy::unwrap_used, reason = "a test ends where something is wrong")]

#[path = "../common/mod.rs"]
mod common;
mod errors;
mod memory;
mod moves;
mod ranges;

use std::sync::Arc;
use std::time::Duration;

use blockstack::device::Limits;
use blockstack::{BlkError, PagePool};
use bufio::{BufError, Client, ClientConfig, Validator, no_check};
use common::{Sum, TestDisk, config, eventually, rig, sum};

fn sums() -> Arc<dyn Validator> {
    Arc::new(Sum)
}

fn fill(client: &Client, block: u64, tag: u8) {
    let buffer = client.new_zeroed(block, no_check()).unwrap();
    buffer.data_mut().fill(tag);
    buffer.mark_dirty();
}

fn on_disk(disk: &TestDisk, block: u64) -> u8 {
    disk.set(|state| state.bytes[block as usize * 1024 + 1])
}

#[test]
fn a_second_read_is_a_hit() {
    let (disk, client) = rig(64);
    drop(client.read(3, no_check()).unwrap());
    drop(client.read(3, no_check()).unwrap());
    assert_eq!(disk.set(|state| state.reads.clone()), [(6, 2)]);
    let stats = client.stats();
    assert_eq!((stats.hits, stats.misses, stats.buffers), (1, 1, 1));
}

#[test]
fn readers_of_one_block_share_its_read() {
    let (disk, client) = rig(64);
    disk.set(|state| state.hold_reads = true);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| client.read(5, no_check()).map(|buffer| buffer.block())))
            .collect();
        eventually("all readers came", || client.stats().misses == 4);
        disk.wait_held(1);
        assert_eq!(disk.held(), 1);
        disk.release();
        for reader in readers {
            assert_eq!(reader.join().unwrap(), Ok(5));
        }
    });
    assert_eq!(disk.set(|state| state.reads.len()), 1);
}

#[test]
fn a_failed_read_is_shared_but_not_cached() {
    let (disk, client) = rig(64);
    disk.set(|state| {
        state.hold_reads = true;
        state.bad_reads.insert(10);
    });
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..3)
            .map(|_| scope.spawn(|| client.read(5, no_check()).map(|_| ())))
            .collect();
        eventually("all readers came", || client.stats().misses == 3);
        disk.wait_held(1);
        // A reader that came to the map too late reads for itself.
        disk.set(|state| state.hold_reads = false);
        disk.release();
        for reader in readers {
            assert_eq!(reader.join().unwrap(), Err(BufError::Blk(BlkError::Io)));
        }
    });
    assert_eq!(client.stats().buffers, 0);
    disk.set(|state| state.bad_reads.clear());
    assert!(client.read(5, no_check()).is_ok());
}

#[test]
fn an_invalid_block_is_not_cached() {
    let (disk, client) = rig(64);
    disk.set(|state| state.bytes[1024] = 1);
    let invalid = BufError::Invalid {
        block: 1,
        what: "test block: sum",
    };
    assert_eq!(client.read(1, &sums()).map(|_| ()), Err(invalid));
    assert!(client.get(1).is_none());
    disk.set(|state| state.bytes[1024] = 0);
    assert!(client.read(1, &sums()).is_ok());
}

#[test]
fn checksum_is_set_on_the_way_down() {
    let (disk, client) = rig(64);
    let buffer = client.read(2, &sums()).unwrap();
    buffer.data_mut()[7] = 9;
    buffer.mark_dirty();
    client.write_dirty().unwrap();
    disk.set(|state| assert_eq!(state.bytes[2048], sum(&state.bytes[2048..3072])));
    let mut copy = vec![0; 1024];
    buffer.copy_prepared(&mut copy);
    assert_eq!(copy[0], 9);
}

#[test]
fn neighbours_share_a_bio() {
    let (disk, client) = rig(4096);
    for block in [9, 7, 8, 20, 256, 255] {
        fill(&client, block, block as u8);
    }
    client.write_dirty().unwrap();
    assert_eq!(
        disk.set(|state| state.writes.clone()),
        [(14, 6), (40, 2), (510, 4)]
    );
    assert_eq!(on_disk(&disk, 8), 8);
}

#[test]
fn a_bio_is_a_mebibyte_at_most() {
    let disk = TestDisk::new(8192);
    let client = Client::new(
        disk.clone(),
        ClientConfig {
            cache_bytes: 64 << 20,
            ..config()
        },
    )
    .unwrap();
    (0..1500).for_each(|block| fill(&client, block, 1));
    client.write_dirty().unwrap();
    assert_eq!(
        disk.set(|state| state.writes.clone()),
        [(0, 2048), (2048, 952)]
    );
}

#[test]
fn pinned_buffers_are_neither_written_nor_evicted() {
    let (disk, client) = rig(4096);
    let pinned = client.new_zeroed(1, no_check()).unwrap();
    pinned.pin();
    pinned.data_mut().fill(1);
    pinned.mark_dirty();
    let clean = client.read(2, no_check()).unwrap();
    clean.pin();
    client.write_dirty().unwrap();
    client.write_buffers(std::slice::from_ref(&pinned)).unwrap();
    client.write_dirty_async();
    drop((pinned, clean));
    client.drop_buffers();
    (100..400).for_each(|block| drop(client.read(block, no_check()).unwrap()));
    assert_eq!(disk.set(|state| state.writes.len()), 0);
    let pinned = client.get(1).unwrap();
    assert!(pinned.is_dirty() && client.get(2).is_some());
    assert_eq!(client.stats().pinned, 2);
    pinned.unpin();
    client.write_dirty().unwrap();
    assert_eq!(on_disk(&disk, 1), 1);
}

/// What was lost: a change of a transaction reached its home before the log.
#[test]
fn a_change_made_after_a_pin_is_not_in_a_copy_that_waits_for_the_content() {
    let (disk, client) = rig(64);
    fill(&client, 4, 1);
    let buffer = client.get(4).unwrap();
    std::thread::scope(|scope| {
        let mut data = buffer.data_mut();
        let writer = scope.spawn(|| client.write_dirty());
        std::thread::sleep(Duration::from_millis(20));
        buffer.pin();
        data.fill(2);
        drop(data);
        writer.join().unwrap().unwrap();
    });
    assert_eq!(on_disk(&disk, 4), 0);
    buffer.unpin();
    client.write_dirty().unwrap();
    assert_eq!(on_disk(&disk, 4), 2);
}

#[test]
fn held_buffers_are_not_evicted_and_the_cache_stays_small() {
    let (_disk, client) = rig(4096);
    let held = client.read(0, no_check()).unwrap();
    held.data_mut()[5] = 77;
    for block in 1..1000 {
        drop(client.read(block, no_check()).unwrap());
    }
    assert!(client.stats().buffers <= 66, "{:?}", client.stats());
    assert_eq!(client.get(0).unwrap().data()[5], 77);
    let many: Vec<_> = (1000..1200)
        .map(|block| client.read(block, no_check()).unwrap())
        .collect();
    assert!(client.stats().buffers >= 200, "grows while all is held");
    drop(many);
    client.shrink(10 * 1024);
    assert!(client.stats().buffers <= 10);
}

#[test]
fn buffers_in_use_survive_a_scan() {
    let (disk, client) = rig(65536);
    drop(client.read(0, no_check()).unwrap());
    for block in 1..2000 {
        drop(client.read(block, no_check()).unwrap());
        drop(client.read(0, no_check()).unwrap());
    }
    let reads = disk.set(|state| state.reads.iter().filter(|&&(at, _)| at == 0).count());
    assert!(reads <= 2, "block 0 was read {reads} times");
}

#[test]
fn a_buffer_dirtied_during_its_write_stays_dirty() {
    let (disk, client) = rig(64);
    fill(&client, 4, 1);
    disk.set(|state| state.hold_writes = true);
    client.write_dirty_async();
    disk.wait_held(1);
    let buffer = client.get(4).unwrap();
    assert!(!buffer.is_dirty());
    buffer.data_mut().fill(2);
    buffer.mark_dirty();
    disk.release();
    eventually("written", || on_disk(&disk, 4) == 1);
    assert!(buffer.is_dirty());
    disk.open();
    client.write_dirty().unwrap();
    assert_eq!(on_disk(&disk, 4), 2);
    assert_eq!(disk.set(|state| state.overlaps), 0);
}

#[test]
fn write_waits_for_the_write_in_flight_and_writes_again() {
    let (disk, client) = rig(64);
    fill(&client, 4, 1);
    disk.set(|state| state.hold_writes = true);
    client.write_dirty_async();
    disk.wait_held(1);
    let buffer = client.get(4).unwrap();
    buffer.data_mut().fill(2);
    buffer.mark_dirty();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| client.write_buffers(std::slice::from_ref(&buffer)));
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(
            disk.held(),
            1,
            "no second write of the block beside the first"
        );
        disk.open();
        assert_eq!(writer.join().unwrap(), Ok(()));
    });
    assert_eq!(on_disk(&disk, 4), 2);
    assert_eq!(disk.set(|state| state.overlaps), 0);
}

/// What was lost: a block freed and used again while its old content was being written got the old
/// content back when that write came last.
#[test]
fn a_forgotten_write_cannot_overtake_the_new_content() {
    let (disk, client) = rig(64);
    fill(&client, 4, 1);
    disk.set(|state| state.hold_writes = true);
    client.write_dirty_async();
    disk.wait_held(1);
    client.forget(4);
    assert!(client.get(4).is_none());
    fill(&client, 4, 2);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| client.write_dirty());
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(disk.held(), 1);
        disk.open();
        assert_eq!(writer.join().unwrap(), Ok(()));
    });
    assert_eq!(on_disk(&disk, 4), 2);
    assert_eq!(disk.set(|state| state.overlaps), 0);
}

#[test]
fn wait_writes_sees_a_forgotten_write_to_its_end() {
    let (disk, client) = rig(64);
    fill(&client, 4, 1);
    disk.set(|state| state.hold_writes = true);
    client.write_dirty_async();
    disk.wait_held(1);
    client.forget(4);
    client.wait_writes(0, 4);
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            client.wait_writes(4, 1);
            on_disk(&disk, 4)
        });
        disk.open();
        assert_eq!(waiter.join().unwrap(), 1);
    });
}

#[test]
fn read_after_forget_waits_for_the_write() {
    let (disk, client) = rig(64);
    fill(&client, 4, 1);
    disk.set(|state| state.hold_writes = true);
    client.write_dirty_async();
    disk.wait_held(1);
    client.forget(4);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| client.read(4, no_check()).map(|buffer| buffer.data()[1]));
        eventually("the reader came", || client.stats().misses == 1);
        assert_eq!(disk.set(|state| state.reads.len()), 0);
        disk.open();
        assert_eq!(reader.join().unwrap(), Ok(1));
    });
}

#[test]
fn forget_drops_a_dirty_buffer_and_detaches_holders() {
    let (disk, client) = rig(64);
    let held = client.read(4, no_check()).unwrap();
    held.data_mut().fill(3);
    held.mark_dirty();
    client.forget(4);
    assert_eq!(held.data()[1], 3);
    held.mark_dirty();
    client.write_buffers(std::slice::from_ref(&held)).unwrap();
    client.write_dirty().unwrap();
    assert_eq!(disk.set(|state| state.writes.len()), 0);
    assert_eq!(client.read(4, no_check()).unwrap().data()[1], 0);
    assert_eq!(client.stats().dirty, 0);
}

#[test]
fn forget_during_a_read_makes_readers_read_again() {
    let (disk, client) = rig(64);
    disk.set(|state| state.hold_reads = true);
    client.prefetch(4, 1);
    disk.wait_held(1);
    client.forget(4);
    fill(&client, 4, 6);
    disk.open();
    assert_eq!(client.read(4, no_check()).unwrap().data()[1], 6);
}

#[test]
fn new_zeroed_resets_content_and_validator() {
    let (disk, client) = rig(64);
    let old = client.read(4, no_check()).unwrap();
    old.data_mut().fill(3);
    old.mark_dirty();
    let new = client.new_zeroed(4, &sums()).unwrap();
    assert!(new.data().iter().all(|&byte| byte == 0));
    new.data_mut()[5] = 8;
    new.mark_dirty();
    client.write_dirty().unwrap();
    disk.set(|state| assert_eq!(state.bytes[4096], 8));
}

#[test]
fn a_failed_write_stays_dirty_and_is_reported_by_its_caller() {
    let (disk, client) = rig(64);
    fill(&client, 4, 1);
    disk.set(|state| state.bad_writes.insert(8));
    let io = Err(BufError::Blk(BlkError::Io));
    let buffer = client.get(4).unwrap();
    assert_eq!(client.write_buffers(std::slice::from_ref(&buffer)), io);
    assert!(buffer.is_dirty());
    assert_eq!(client.write_dirty(), io);
    disk.set(|state| state.bad_writes.clear());
    assert_eq!(client.write_dirty(), Ok(()));
    assert_eq!(on_disk(&disk, 4), 1);
}

#[test]
fn a_background_error_is_reported_once() {
    let (disk, client) = rig(64);
    fill(&client, 4, 1);
    disk.set(|state| {
        state.hold_writes = true;
        state.bad_writes.insert(8);
    });
    client.write_dirty_async();
    disk.wait_held(1);
    disk.open();
    eventually("the write failed", || client.stats().dirty == 1);
    disk.set(|state| state.bad_writes.clear());
    assert_eq!(client.write_dirty(), Err(BufError::Blk(BlkError::Io)));
    assert_eq!(client.write_dirty(), Ok(()));
    assert_eq!(on_disk(&disk, 4), 1, "the failing call wrote what it could");
}

#[test]
fn the_latch_stops_writes_and_flushes() {
    let (disk, client) = rig(64);
    fill(&client, 4, 1);
    client.fail();
    assert!(client.is_failed());
    let io = Err(BufError::Blk(BlkError::Io));
    assert_eq!(client.write_dirty(), io);
    assert_eq!(client.write_buffers(&[client.get(4).unwrap()]), io);
    assert_eq!(client.flush(), io);
    assert_eq!(client.discard(0, 1), io);
    client.write_dirty_async();
    assert!(client.read(5, no_check()).is_ok());
    drop(client);
    disk.set(|state| assert_eq!((state.writes.len(), state.flushes), (0, 0)));
}

#[test]
fn old_dirty_buffers_are_written_by_themselves() {
    let disk = TestDisk::new(64);
    let client = Client::new(
        disk.clone(),
        ClientConfig {
            writeback_age: Duration::from_millis(10),
            ..config()
        },
    )
    .unwrap();
    fill(&client, 4, 1);
    eventually("written by age", || on_disk(&disk, 4) == 1);
}

#[test]
fn pressure_starts_the_writeback() {
    let (disk, client) = rig(4096);
    (0..30).for_each(|block| fill(&client, block * 2, 1));
    eventually("written by pressure", || {
        disk.set(|state| !state.writes.is_empty())
    });
    eventually("down to the low mark", || client.stats().dirty <= 16);
}

#[test]
fn prefetch_is_one_bio_and_checked_by_the_reader() {
    let (disk, client) = rig(64);
    disk.set(|state| {
        state.hold_reads = true;
        state.bytes[6 * 1024] = 1;
    });
    drop(client.new_zeroed(7, no_check()).unwrap());
    client.prefetch(4, 100);
    assert_eq!(disk.held(), 2);
    disk.open();
    assert_eq!(disk.set(|state| state.reads.clone()), [(8, 6), (16, 48)]);
    assert!(client.get(5).is_none(), "nobody checked it yet");
    assert!(client.read(5, &sums()).is_ok());
    assert!(client.read(6, &sums()).is_err());
    assert_eq!(disk.set(|state| state.reads.len()), 2);
}

#[test]
fn prefetch_drops_what_it_cannot_have() {
    let pool = PagePool::new(2 << 20);
    let disk = TestDisk::new(4096);
    let client = Client::with_reserve(disk.clone(), config(), pool.clone(), 1).unwrap();
    let hog: Vec<_> = std::iter::from_fn(|| pool.alloc(4096).ok()).collect();
    client.prefetch(0, 10);
    assert_eq!(client.stats().buffers, 0);
    drop(hog);
    client.prefetch(0, 1000);
    assert!(client.stats().buffers <= 65, "stays under the limit");
}

/// What was lost: the 31 good blocks of an inode table around a bad sector, whose reader had waited
/// for the read ahead of all of them.
#[test]
fn a_bad_sector_spoils_no_block_that_was_read_with_it() {
    let (disk, client) = rig(64);
    disk.set(|state| {
        state.hold_reads = true;
        state.bytes[4 * 1024] = 7;
        state.bad_reads.insert(12);
    });
    client.prefetch(4, 3);
    disk.wait_held(1);
    let misses = client.stats().misses;
    std::thread::scope(|scope| {
        let reads = scope.spawn(|| client.read(4, no_check()).map(|block| block.data()[0]));
        while client.stats().misses == misses {
            std::thread::yield_now();
        }
        disk.open();
        assert_eq!(reads.join().unwrap(), Ok(7));
    });
    assert!(client.read(6, no_check()).is_err());
}

#[test]
fn a_failing_prefetch_leaves_nothing() {
    let (disk, client) = rig(64);
    disk.set(|state| state.bad_reads.insert(9));
    client.prefetch(4, 3);
    assert_eq!(client.stats().buffers, 0);
}

#[test]
fn discard_forgets_and_waits_for_writes() {
    let (disk, client) = rig(4096);
    fill(&client, 4, 1);
    fill(&client, 1000, 1);
    client.discard(0, 100).unwrap();
    assert!(client.get(4).is_none() && client.get(1000).is_some());
    assert_eq!(disk.set(|state| state.discards.clone()), [(0, 200)]);
    assert_eq!(
        client.discard(u64::MAX, 2),
        Err(BufError::Blk(BlkError::OutOfRange))
    );
}

/// What was lost: the content of blocks that the device would not discard.
#[test]
fn a_discard_that_is_refused_forgets_nothing() {
    let limits = Limits {
        max_discard_sectors: 0,
        ..Limits::UNLIMITED
    };
    let disk = TestDisk::with_limits(64, limits);
    let client = Client::new(disk.clone(), config()).unwrap();
    fill(&client, 4, 1);
    assert_eq!(
        client.discard(4, 1),
        Err(BufError::Blk(BlkError::NotSupported))
    );
    client.write_dirty().unwrap();
    assert_eq!(on_disk(&disk, 4), 1);
}

#[test]
fn forget_range_drops_what_lies_in_it() {
    let (disk, client) = rig(1024);
    [3, 4, 9, 10].iter().for_each(|&at| fill(&client, at, 1));
    client.forget_range(4, 6);
    client.forget_range(100, u64::MAX);
    client.write_dirty().unwrap();
    let written = disk.set(|state| state.writes.clone());
    assert_eq!(written, [(6, 2), (20, 2)]);
}

#[test]
fn blocks_beyond_the_end_are_refused() {
    let (_disk, client) = rig(9);
    let beyond = Err(BufError::Blk(BlkError::OutOfRange));
    assert_eq!(client.blocks(), 4);
    assert_eq!(client.read(4, no_check()).map(|_| ()), beyond);
    assert_eq!(client.read(u64::MAX, no_check()).map(|_| ()), beyond);
    assert_eq!(client.new_zeroed(4, no_check()).map(|_| ()), beyond);
    client.prefetch(u64::MAX - 1, 100);
    client.forget(u64::MAX);
}

#[test]
fn drop_buffers_writes_what_is_dirty() {
    let (disk, client) = rig(64);
    fill(&client, 4, 1);
    let held = client.read(5, no_check()).unwrap();
    client.drop_buffers();
    assert_eq!(on_disk(&disk, 4), 1);
    assert_eq!(client.stats().buffers, 1);
    drop(held);
}

#[test]
fn a_buffer_outlives_its_client() {
    let (disk, client) = rig(64);
    let buffer = client.read(4, no_check()).unwrap();
    buffer.mark_dirty();
    drop(client);
    buffer.data_mut().fill(1);
    buffer.mark_dirty();
    drop(buffer);
    assert_eq!(disk.set(|state| state.writes.len()), 0);
    assert_eq!(Arc::strong_count(&disk), 1, "nothing refers to itself");
}

#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "waits inside a submission")]
fn a_read_inside_a_submission_panics() {
    use blockstack::device::Stats;
    use blockstack::{Bio, BlockDevice, SectorCount, flush_wait};
    struct Reads(Arc<Client>, Stats);
    impl BlockDevice for Reads {
        fn name(&self) -> &str {
            "reads"
        }
        fn capacity(&self) -> SectorCount {
            SectorCount::new(8)
        }
        fn limits(&self) -> Limits {
            Limits::UNLIMITED
        }
        fn stats(&self) -> &Stats {
            &self.1
        }
        fn submit(&self, bio: Bio) {
            let read = self.0.read(1, no_check());
            bio.complete(read.map(|_| ()).map_err(|_read| BlkError::Io));
        }
    }
    let (_disk, client) = rig(64);
    let dev: blockstack::DynDevice = Arc::new(Reads(client, Stats::default()));
    flush_wait(&dev).unwrap();
}
