//! Errors of writes: who hears of them, and how often.

use blockstack::BlkError;
use bufio::{BufError, Buffer, Client, no_check};

use super::{fill, on_disk};
use crate::common::{TestDisk, Waits, eventually, rig};

const IO: Result<(), BufError> = Err(BufError::Blk(BlkError::Io));

/// Block 4, dirty and on its way down in the background, where it will fail.
fn failing(disk: &TestDisk, client: &Client) -> Buffer {
    fill(client, 4, 1);
    disk.set(|state| {
        state.hold_writes = true;
        state.bad_writes.insert(8);
    });
    client.write_dirty_async();
    disk.wait_held(1);
    client.get(4).unwrap()
}

#[test]
fn who_waits_for_a_background_write_that_fails_is_not_told_success() {
    let (disk, client) = rig(64);
    let buffer = failing(&disk, &client);
    let waits = Waits::default();
    std::thread::scope(|scope| {
        let _opens = disk.opens();
        let waiter = scope.spawn(|| {
            waits.count_mine();
            client.write_buffers(std::slice::from_ref(&buffer))
        });
        waits.until(1);
        disk.open();
        assert_eq!(waiter.join().unwrap(), IO);
    });
    assert!(buffer.is_dirty());
    assert_eq!(client.write_dirty(), IO);
}

/// What was lost: the error. Of two waiters the one that woke second found the buffer being written
/// again by the first, and went home.
#[test]
fn each_of_several_waiters_hears_of_the_error() {
    for _ in 0..50 {
        let (disk, client) = rig(64);
        let buffer = failing(&disk, &client);
        let waits = Waits::default();
        std::thread::scope(|scope| {
            let _opens = disk.opens();
            let waiters: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(|| {
                        waits.count_mine();
                        client.write_buffers(std::slice::from_ref(&buffer))
                    })
                })
                .collect();
            waits.until(3);
            eventually("all heard", || {
                disk.release();
                waiters.iter().all(|waiter| waiter.is_finished())
            });
            for waiter in waiters {
                assert_eq!(waiter.join().unwrap(), IO);
            }
        });
        disk.open();
    }
}

/// What was lost: the error of a buffer that was pinned when its waiter woke.
#[test]
fn a_waiter_hears_of_the_failed_write_of_a_buffer_that_is_pinned_by_now() {
    let (disk, client) = rig(64);
    let buffer = failing(&disk, &client);
    let waits = Waits::default();
    std::thread::scope(|scope| {
        let _opens = disk.opens();
        let waiter = scope.spawn(|| {
            waits.count_mine();
            client.write_buffers(std::slice::from_ref(&buffer))
        });
        waits.until(1);
        buffer.pin();
        disk.open();
        assert_eq!(waiter.join().unwrap(), IO);
    });
    buffer.unpin();
}

#[test]
fn a_waiter_whose_own_write_goes_well_need_not_hear_of_another_s_error() {
    let (disk, client) = rig(64);
    let buffer = failing(&disk, &client);
    let waits = Waits::default();
    std::thread::scope(|scope| {
        let _opens = disk.opens();
        let waiter = scope.spawn(|| {
            waits.count_mine();
            client.write_buffers(std::slice::from_ref(&buffer))
        });
        waits.until(1);
        disk.release();
        // The waiter writes it itself, now to a disk that is well.
        disk.wait_held(1);
        disk.set(|state| state.bad_writes.clear());
        disk.open();
        assert_eq!(waiter.join().unwrap(), Ok(()));
    });
    assert_eq!(on_disk(&disk, 4), 1);
    assert_eq!(client.write_dirty(), IO, "but that is reported once");
    assert_eq!(client.write_dirty(), Ok(()));
}

#[test]
fn a_waiter_does_not_wait_for_changes_made_after_it_came() {
    let (disk, client) = rig(64);
    fill(&client, 4, 1);
    disk.set(|state| state.hold_writes = true);
    client.write_dirty_async();
    disk.wait_held(1);
    let buffer = client.get(4).unwrap();
    let waits = Waits::default();
    std::thread::scope(|scope| {
        let _opens = disk.opens();
        let waiter = scope.spawn(|| {
            waits.count_mine();
            client.write_buffers(std::slice::from_ref(&buffer))
        });
        waits.until(1);
        buffer.data_mut().fill(2);
        buffer.mark_dirty();
        disk.release();
        assert_eq!(waiter.join().unwrap(), Ok(()));
    });
    assert!(buffer.is_dirty());
    disk.open();
}

#[test]
fn the_first_background_error_is_the_one_reported() {
    let (disk, client) = rig(64);
    for (block, error) in [(4, BlkError::NoSpace), (10, BlkError::TimedOut)] {
        disk.set(|state| {
            state.bad_writes.insert(block * 2);
            state.errors.insert(block * 2, error);
        });
        fill(&client, block, 1);
        let failed = client.stats().written + 1;
        client.write_dirty_async();
        eventually("the write failed", || {
            let stats = client.stats();
            stats.written >= failed && stats.dirty == (if block == 4 { 1 } else { 2 })
        });
    }
    disk.set(|state| state.bad_writes.clear());
    let first = Err(BufError::Blk(BlkError::NoSpace));
    assert_eq!(client.write_dirty(), first);
    assert_eq!(client.write_dirty(), Ok(()));
}

#[test]
fn drop_buffers_keeps_what_cannot_be_written_and_its_error() {
    let (disk, client) = rig(64);
    fill(&client, 4, 1);
    disk.set(|state| state.bad_writes.insert(8));
    client.drop_buffers();
    assert!(client.get(4).unwrap().is_dirty());
    disk.set(|state| state.bad_writes.clear());
    assert_eq!(client.write_dirty(), IO);
    assert_eq!(client.write_dirty(), Ok(()));
    assert_eq!(on_disk(&disk, 4), 1);
}

#[test]
fn a_forgotten_background_error_is_reported_all_the_same() {
    let (disk, client) = rig(64);
    drop(failing(&disk, &client));
    client.forget(4);
    let waits = Waits::default();
    std::thread::scope(|scope| {
        let _opens = disk.opens();
        let waiter = scope.spawn(|| {
            waits.count_mine();
            client.wait_writes(4, 1);
        });
        waits.until(1);
        disk.open();
        waiter.join().unwrap();
    });
    assert_eq!(client.write_dirty(), IO);
}

/// What was lost: the content of who held a block that was freed while it was being written, and
/// used anew.
#[test]
fn a_forgotten_buffer_does_not_come_back_under_its_holder() {
    let (disk, client) = rig(64);
    fill(&client, 4, 1);
    let holder = client.get(4).unwrap();
    disk.set(|state| state.hold_writes = true);
    client.write_dirty_async();
    disk.wait_held(1);
    client.forget(4);
    let waits = Waits::default();
    std::thread::scope(|scope| {
        let _opens = disk.opens();
        let maker = scope.spawn(|| {
            waits.count_mine();
            client.new_zeroed(4, no_check()).map(|held| held.data()[1])
        });
        waits.until(1);
        disk.open();
        assert_eq!(maker.join().unwrap(), Ok(0));
    });
    assert_eq!(holder.data()[1], 1);
    holder.data_mut().fill(3);
    holder.mark_dirty();
    client.write_dirty().unwrap();
    assert_eq!(on_disk(&disk, 4), 1);
}
