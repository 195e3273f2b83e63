//! `release_move`, alone and not.

use std::sync::Arc;

use blockstack::{BlkError, PagePool};
use bufio::{BufError, no_check};

use super::{fill, on_disk};
use crate::common::{Waits, rig, within_reason};
use crate::memory::{exhaust, strict};

#[test]
fn release_move_of_a_sole_hold_moves_the_memory() {
    let (disk, client) = rig(64);
    fill(&client, 4, 1);
    let buffer = client.get(4).unwrap();
    client.release_move(buffer, 9).unwrap();
    assert_eq!(on_disk(&disk, 4), 1, "written to the old place first");
    assert!(client.get(4).is_none());
    let moved = client.get(9).unwrap();
    assert!(moved.is_dirty());
    assert_eq!(moved.data()[1], 1);
    client.write_dirty().unwrap();
    assert_eq!(on_disk(&disk, 9), 1);
}

#[test]
fn release_move_of_a_shared_hold_copies() {
    let (disk, client) = rig(64);
    fill(&client, 4, 1);
    let other = client.get(4).unwrap();
    client.release_move(client.get(4).unwrap(), 9).unwrap();
    assert_eq!((on_disk(&disk, 4), on_disk(&disk, 9)), (1, 1));
    assert_eq!(other.data()[1], 1);
    assert_eq!(client.get(4).unwrap().data()[1], 1);
    assert!(client.get(9).is_none(), "no second buffer is needed");
    assert_eq!(client.read(9, no_check()).unwrap().data()[1], 1);
}

#[test]
fn release_move_sets_the_checksum_of_the_new_place() {
    struct Numbered;
    impl bufio::Validator for Numbered {
        fn check(&self, _: u64, _: &[u8]) -> Result<(), bufio::Invalid> {
            Ok(())
        }
        fn prepare(&self, block: u64, data: &mut [u8]) {
            data[1] = block as u8;
        }
    }
    let numbered: Arc<dyn bufio::Validator> = Arc::new(Numbered);
    let (disk, client) = rig(64);
    let held = client.new_zeroed(4, &numbered).unwrap();
    client.release_move(held.clone(), 9).unwrap();
    assert_eq!(on_disk(&disk, 9), 9);
    assert_eq!(held.data()[1], 0, "the buffer is not touched");
    client.release_move(held, 10).unwrap();
    client.write_dirty().unwrap();
    assert_eq!(on_disk(&disk, 10), 10);
}

#[test]
fn release_move_of_what_cannot_be_written_home_moves_nothing() {
    let (disk, client) = rig(64);
    fill(&client, 4, 1);
    fill(&client, 9, 2);
    disk.set(|state| state.bad_writes.insert(8));
    let io = Err(BufError::Blk(BlkError::Io));
    assert_eq!(client.release_move(client.get(4).unwrap(), 9), io);
    assert!(client.get(4).unwrap().is_dirty());
    assert_eq!(client.get(9).unwrap().data()[1], 2);
}

#[test]
fn release_move_of_a_shared_hold_reports_the_error_of_the_new_place() {
    let (disk, client) = rig(64);
    fill(&client, 4, 1);
    fill(&client, 9, 2);
    disk.set(|state| state.bad_writes.insert(18));
    let other = client.get(4).unwrap();
    let io = Err(BufError::Blk(BlkError::Io));
    assert_eq!(client.release_move(client.get(4).unwrap(), 9), io);
    assert_eq!((on_disk(&disk, 4), other.data()[1]), (1, 1));
    assert_eq!(client.read(9, no_check()).unwrap().data()[1], 0);
    assert_eq!(client.write_dirty(), Ok(()), "it had its error");
}

#[test]
fn release_move_waits_for_a_write_of_the_source() {
    let (disk, client) = rig(64);
    fill(&client, 4, 1);
    disk.set(|state| state.hold_writes = true);
    client.write_dirty_async();
    disk.wait_held(1);
    let waits = Waits::default();
    std::thread::scope(|scope| {
        let _opens = disk.opens();
        let mover = scope.spawn(|| {
            waits.count_mine();
            client.release_move(client.get(4).unwrap(), 9)
        });
        waits.until(1);
        assert!(client.get(9).is_none());
        disk.open();
        assert_eq!(mover.join().unwrap(), Ok(()));
    });
    client.write_dirty().unwrap();
    assert_eq!((on_disk(&disk, 4), on_disk(&disk, 9)), (1, 1));
}

#[test]
fn release_move_waits_for_a_write_of_the_target_and_detaches_its_holder() {
    let (disk, client) = rig(64);
    fill(&client, 9, 2);
    let holder = client.get(9).unwrap();
    disk.set(|state| state.hold_writes = true);
    client.write_dirty_async();
    disk.wait_held(1);
    let source = client.read(4, no_check()).unwrap();
    source.data_mut().fill(1);
    let waits = Waits::default();
    std::thread::scope(|scope| {
        let _opens = disk.opens();
        let mover = scope.spawn(|| {
            waits.count_mine();
            client.release_move(source, 9)
        });
        waits.until(1);
        disk.open();
        assert_eq!(mover.join().unwrap(), Ok(()));
    });
    holder.mark_dirty();
    client.write_dirty().unwrap();
    assert_eq!((on_disk(&disk, 9), holder.data()[1]), (1, 2));
    assert_eq!(disk.set(|state| state.overlaps), 0);
}

#[test]
fn release_move_onto_a_block_that_is_being_read_gives_its_readers_the_new_content() {
    let (disk, client) = rig(64);
    let source = client.new_zeroed(4, no_check()).unwrap();
    source.data_mut().fill(1);
    disk.set(|state| state.hold_reads = true);
    std::thread::scope(|scope| {
        let _opens = disk.opens();
        let reader = scope.spawn(|| client.read(9, no_check()).map(|held| held.data()[1]));
        disk.wait_held(1);
        client.release_move(source, 9).unwrap();
        disk.open();
        assert_eq!(reader.join().unwrap(), Ok(1));
    });
    client.write_dirty().unwrap();
    assert_eq!(on_disk(&disk, 9), 1);
}

#[test]
fn a_reader_of_the_new_place_waits_for_the_copy_of_a_shared_hold() {
    let (disk, client) = rig(64);
    fill(&client, 4, 1);
    client.write_dirty().unwrap();
    let other = client.get(4).unwrap();
    disk.set(|state| state.hold_writes = true);
    let waits = Waits::default();
    std::thread::scope(|scope| {
        let _opens = disk.opens();
        let mover = scope.spawn(|| client.release_move(client.get(4).unwrap(), 9));
        disk.wait_held(1);
        let reader = scope.spawn(|| {
            waits.count_mine();
            client.read(9, no_check()).map(|held| held.data()[1])
        });
        let maker = scope.spawn(|| {
            waits.count_mine();
            client.new_zeroed(9, no_check()).map(|held| held.data()[1])
        });
        waits.until(2);
        assert!(client.get(9).is_none());
        disk.open();
        assert_eq!(mover.join().unwrap(), Ok(()));
        // Whoever came last: zeros of the maker, or what was copied.
        assert!(matches!(reader.join().unwrap(), Ok(0 | 1)));
        assert_eq!(maker.join().unwrap(), Ok(0));
    });
    assert_eq!((on_disk(&disk, 9), other.data()[1]), (1, 1));
}

/// What was lost: nothing yet, but a thread that may hold one buffer only needed two.
#[test]
fn release_move_of_a_shared_hold_needs_no_second_buffer() {
    let pool = PagePool::new(2 << 20);
    let client = strict(&pool, 1);
    let mut hog = exhaust(&pool);
    hog.truncate(hog.len() - 1);
    let other = client.read(4, no_check()).unwrap();
    let mover = client.clone();
    let moved = within_reason("the move ends", move || {
        mover.release_move(mover.read(4, no_check()).unwrap(), 9)
    });
    assert_eq!(moved, Ok(()));
    drop(other);
}

#[test]
fn a_failed_client_moves_nothing() {
    let (disk, client) = rig(64);
    fill(&client, 4, 1);
    client.fail();
    let io = Err(BufError::Blk(BlkError::Io));
    assert_eq!(client.release_move(client.get(4).unwrap(), 9), io);
    assert!(client.get(4).unwrap().is_dirty() && client.get(9).is_none());
    assert_eq!(disk.set(|state| state.writes.len()), 0);
}
