//! What a direct write takes from the heap on its way through a file system: nothing, once the
//! transaction knows the inode's block. The reply is the caller's and is counted apart.
#![expect(clippy::unwrap_used, reason = "a test ends with a panic")]

mod storm;

use std::alloc::System;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use blockstack::DynDevice;
use blockstack::backend::mem::MemDisk;
use fs::ops::Caller;
use fs::ops::space::FallocMode;
use fs::{Fs, FsResult, Inode, MountOptions};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use storm::image::Scratch;
use storm::{DIRECT, FILE, ME, ROOT};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

static ANSWERS: AtomicUsize = AtomicUsize::new(0);

/// A reply that needs no memory.
fn answer(res: FsResult<u32>) {
    assert!(res.is_ok());
    ANSWERS.fetch_add(1, Ordering::SeqCst);
}

const BLOCK: u64 = 4096;

fn send(fs: &Arc<Fs>, inode: &Arc<Inode>, block: u64, bytes: &[u8], caller: &Caller) {
    let before = ANSWERS.load(Ordering::SeqCst);
    fs.write(
        inode,
        block * BLOCK,
        bytes,
        DIRECT,
        caller,
        Box::new(answer),
    );
    // One at a time: how many threads there are for deferred ends is not what is tried here.
    while ANSWERS.load(Ordering::SeqCst) == before {
        std::thread::yield_now();
    }
}

/// Allocations while `work` runs, on all threads.
fn allocations(work: impl FnOnce()) -> usize {
    let before = ALLOCATOR.stats().allocations;
    work();
    ALLOCATOR.stats().allocations - before
}

/// The fewest allocations of three runs, as threads allocate once in their life at any time.
fn fewest(mut work: impl FnMut(u64)) -> usize {
    (0..3).map(|run| allocations(|| work(run))).min().unwrap()
}

#[test]
fn a_direct_write_to_a_preallocated_file_allocates_nothing() {
    const WRITES: u64 = 2000;
    let scratch = Scratch::new();
    let args = ["-t", "ext4", "-b", "4096", "-J", "size=16"];
    let mut made = scratch.try_mkfs(&args, "128M").unwrap();
    // The disk takes memory for what is written first; here it has it.
    let mut block = [0; BLOCK as usize];
    for at in (0..128 << 20).step_by(block.len()) {
        made.read_at(at, &mut block);
        made.write_at(at, &block);
    }
    let disk = MemDisk::from_image("mem", made);
    let dev: DynDevice = disk.clone();
    let options = MountOptions {
        commit_secs: 3600,
        ..MountOptions::default()
    };
    let fs = Fs::mount(dev, options).unwrap();
    let ino = fs.create(ROOT, b"file", FILE, 0, &ME).unwrap().ino;
    let inode = fs.iget(ino).unwrap();
    let none = FallocMode::empty();
    fs.fallocate(&inode, none, 0, 4 * WRITES * BLOCK, &ME)
        .unwrap();
    let keeps = Caller {
        keeps_times: true,
        ..ME
    };
    let (small, large) = (vec![1; BLOCK as usize], vec![2; 32 * BLOCK as usize]);
    // The first writes touch memory that the disk and the pools never gave out.
    let unwritten = fewest(|run| {
        for block in run * WRITES..(run + 1) * WRITES {
            send(&fs, &inode, block, &small, &ME);
        }
    });
    let stamps = fewest(|_| {
        for block in 0..WRITES {
            send(&fs, &inode, block, &small, &ME);
        }
    });
    let in_place = fewest(|_| {
        for block in 0..WRITES {
            let bytes = if block % 8 == 0 { &large } else { &small };
            send(&fs, &inode, block, bytes, &keeps);
        }
    });
    println!(
        "allocations in {WRITES} writes: unwritten {unwritten}, mapped {stamps}, in place {in_place}"
    );
    assert_eq!((stamps, in_place), (0, 0));
    // The journal's knowledge of blocks that join the transaction, as the tree grows.
    assert!(unwritten < WRITES as usize / 10);
    drop(inode);
    fs.unmount().unwrap();
    drop(fs);
    scratch.check(&disk.image()).unwrap();
}
