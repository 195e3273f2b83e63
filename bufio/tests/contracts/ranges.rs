//! Parts of a block.

use std::ops::Range;
use std::sync::Arc;

use blockstack::PagePool;
use blockstack::device::Limits;
use bufio::{Buffer, Client, ClientConfig, Invalid, Validator, no_check};

use super::sums;
use crate::common::{TestDisk, config, sum};
use crate::memory::exhaust;

/// Blocks of 4096 bytes, eight sectors each, on a disk of 100 of them.
fn rig(logical_block_size: u32) -> (Arc<TestDisk>, Arc<Client>) {
    let limits = Limits {
        logical_block_size,
        ..Limits::UNLIMITED
    };
    let disk = TestDisk::with_limits(800, limits);
    let config = ClientConfig {
        block_size: 4096,
        cache_bytes: 64 * 4096,
        ..config()
    };
    (disk.clone(), Client::new(disk, config).unwrap())
}

fn change(buffer: &Buffer, range: Range<usize>, tag: u8) {
    buffer.data_mut()[range.clone()].fill(tag);
    buffer.mark_dirty_range(range);
}

fn writes(disk: &TestDisk) -> Vec<(u64, u64)> {
    disk.set(|state| std::mem::take(&mut state.writes))
}

fn byte(disk: &TestDisk, block: usize, at: usize) -> u8 {
    disk.set(|state| state.bytes[block * 4096 + at])
}

#[test]
fn only_the_range_is_written_in_whole_sectors() {
    let (disk, client) = rig(512);
    let buffer = client.read(2, no_check()).unwrap();
    buffer.data_mut()[4000] = 9;
    change(&buffer, 600..610, 7);
    client.write_dirty().unwrap();
    assert_eq!(writes(&disk), [(17, 1)]);
    assert_eq!((byte(&disk, 2, 605), byte(&disk, 2, 4000)), (7, 0));
    assert!(!buffer.is_dirty());
    change(&buffer, 511..513, 8);
    client.write_dirty().unwrap();
    assert_eq!(writes(&disk), [(16, 2)]);
    buffer.mark_dirty();
    client.write_dirty().unwrap();
    assert_eq!(writes(&disk), [(16, 8)]);
    buffer.mark_dirty_range(100..100);
    assert!(!buffer.is_dirty());
}

#[test]
fn ranges_are_joined_over_the_gap() {
    let (disk, client) = rig(512);
    let buffer = client.read(0, no_check()).unwrap();
    change(&buffer, 600..610, 1);
    change(&buffer, 3100..3200, 2);
    client.write_dirty().unwrap();
    assert_eq!(writes(&disk), [(1, 6)]);
    assert_eq!((byte(&disk, 0, 600), byte(&disk, 0, 3199)), (1, 2));
}

#[test]
fn a_range_grows_to_the_sectors_of_the_device() {
    let (disk, client) = rig(2048);
    let buffer = client.read(1, no_check()).unwrap();
    change(&buffer, 2100..2101, 1);
    client.write_dirty().unwrap();
    assert_eq!(writes(&disk), [(12, 4)]);
}

#[test]
fn a_kind_of_block_that_does_not_say_is_written_whole() {
    let (disk, client) = rig(512);
    let buffer = client.read(1, &sums()).unwrap();
    change(&buffer, 3000..3001, 5);
    client.write_dirty().unwrap();
    assert_eq!(writes(&disk), [(8, 8)]);
    disk.set(|state| assert_eq!(state.bytes[4096], sum(&state.bytes[4096..8192])));
}

/// A sum of all bytes in the last one.
struct Tail(Range<usize>);

impl Validator for Tail {
    fn check(&self, _: u64, data: &[u8]) -> Result<(), Invalid> {
        let what = "tail: sum";
        let sum = data[..4095].iter().fold(0u8, |sum, &b| sum.wrapping_add(b));
        (data[4095] == sum).then_some(()).ok_or(Invalid { what })
    }
    fn prepare(&self, _: u64, data: &mut [u8]) {
        data[4095] = data[..4095].iter().fold(0, |sum, &b| sum.wrapping_add(b));
    }
    fn prepared_range(&self, _: usize) -> Range<usize> {
        self.0.clone()
    }
}

#[test]
fn what_a_validator_changes_is_written_along() {
    let (disk, client) = rig(512);
    let tail: Arc<dyn Validator> = Arc::new(Tail(4095..4096));
    let buffer = client.read(1, &tail).unwrap();
    change(&buffer, 3000..3001, 5);
    client.write_dirty().unwrap();
    assert_eq!(writes(&disk), [(13, 3)]);
    drop(buffer);
    client.drop_buffers();
    assert!(client.read(1, &tail).is_ok());
}

#[test]
#[cfg(debug_assertions)]
fn a_validator_that_changes_more_than_it_says_is_found_out() {
    let (_disk, client) = rig(512);
    let liar: Arc<dyn Validator> = Arc::new(Tail(0..1));
    let buffer = client.read(1, &liar).unwrap();
    change(&buffer, 3000..3001, 5);
    let written = std::thread::scope(|scope| scope.spawn(|| client.write_dirty()).join());
    assert!(written.is_err());
}

#[test]
fn content_that_was_not_read_is_written_whole_once() {
    let (disk, client) = rig(512);
    disk.set(|state| state.bytes[4096..8192].fill(0xee));
    let buffer = client.new_zeroed(1, no_check()).unwrap();
    change(&buffer, 0..1, 5);
    client.write_dirty().unwrap();
    assert_eq!(writes(&disk), [(8, 8)]);
    change(&buffer, 0..1, 6);
    client.write_dirty().unwrap();
    assert_eq!(writes(&disk), [(8, 1)]);
    // The same for zeros over what was read.
    let buffer = client.new_zeroed(1, no_check()).unwrap();
    change(&buffer, 0..1, 7);
    client.write_dirty().unwrap();
    assert_eq!(writes(&disk), [(8, 8)]);
}

#[test]
fn a_range_that_failed_is_written_with_the_next() {
    let (disk, client) = rig(512);
    let buffer = client.read(1, no_check()).unwrap();
    change(&buffer, 600..601, 5);
    disk.set(|state| state.bad_writes.insert(9));
    assert!(client.write_dirty().is_err());
    disk.set(|state| state.bad_writes.clear());
    change(&buffer, 1600..1601, 6);
    client.write_dirty().unwrap();
    assert_eq!(writes(&disk), [(9, 3)]);
    assert_eq!((byte(&disk, 1, 600), byte(&disk, 1, 1600)), (5, 6));
}

#[test]
fn a_range_changed_during_a_write_is_written_next() {
    let (disk, client) = rig(512);
    let buffer = client.read(1, no_check()).unwrap();
    change(&buffer, 600..601, 5);
    disk.set(|state| state.hold_writes = true);
    client.write_dirty_async();
    disk.wait_held(1);
    change(&buffer, 1600..1601, 6);
    disk.open();
    client.write_dirty().unwrap();
    assert_eq!(writes(&disk), [(9, 1), (11, 1)]);
}

#[test]
fn ranges_that_touch_share_a_bio_and_others_do_not() {
    let (disk, client) = rig(512);
    let held: Vec<_> = (4..8)
        .map(|at| client.read(at, no_check()).unwrap())
        .collect();
    change(&held[0], 4000..4096, 1);
    change(&held[1], 0..4096, 2);
    change(&held[2], 0..700, 3);
    change(&held[3], 0..100, 4);
    client.write_dirty().unwrap();
    assert_eq!(writes(&disk), [(39, 11), (56, 1)]);
    assert_eq!((byte(&disk, 4, 4095), byte(&disk, 5, 0)), (1, 2));
    assert_eq!((byte(&disk, 6, 699), byte(&disk, 7, 99)), (3, 4));
    let mut copy = vec![0; 4096];
    held[0].copy_prepared(&mut copy);
    assert_eq!(copy[4000], 1);
}

/// The memory kept back for writes is as long as a block again after a part of one.
#[test]
fn a_whole_block_is_written_after_a_part_without_memory() {
    let pool = PagePool::new(2 << 20);
    let disk = TestDisk::new(800);
    let config = ClientConfig {
        block_size: 4096,
        ..config()
    };
    let client = Client::with_reserve(disk.clone(), config, pool.clone(), 1).unwrap();
    let buffer = client.read(1, no_check()).unwrap();
    let _hog = exhaust(&pool);
    change(&buffer, 600..601, 5);
    client.write_dirty().unwrap();
    buffer.data_mut().fill(6);
    buffer.mark_dirty();
    client.write_dirty().unwrap();
    assert_eq!(writes(&disk), [(9, 1), (8, 8)]);
    assert_eq!(byte(&disk, 1, 4095), 6);
}
