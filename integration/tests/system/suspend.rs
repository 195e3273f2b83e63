//! A device below that stops for a while: nobody loses anything, nobody gets an error, and what
//! needs no I/O is answered meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use blockstack::backend::mem::MemDisk;
use blockstack::{DynDevice, Sector};
use dmtargets::linear_over;
use dmtargets::target::Suspend;
use fs::data::Origin;
use fs::ops::{Caller, NewNode};
use fs::{Fs, MountOptions};

use crate::common::{Image, count};

const ROOT: u32 = 2;
const ME: Caller = Caller {
    uid: 0,
    gid: 0,
    thread: 0,
    keeps_times: false,
};
const FILE: NewNode<'static> = NewNode::Node {
    mode: 0o100_644,
    rdev: 0,
};
const LEN: usize = 5000;

fn write(fs: &Arc<Fs>, ino: u32, byte: u8) {
    let inode = fs.iget(ino).unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    let origin = Origin::Direct { kill_priv: false };
    let reply = Box::new(move |res| tell.send(res).unwrap());
    fs.write(&inode, 0, &[byte; LEN], origin, &ME, reply);
    assert_eq!(told.recv().unwrap(), Ok(LEN as u32));
}

fn read(fs: &Arc<Fs>, ino: u32) -> Vec<u8> {
    let inode = fs.iget(ino).unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    let reply = Box::new(move |res: fs::FsResult<&[u8]>| {
        tell.send(res.map(<[u8]>::to_vec)).unwrap();
    });
    fs.read(&inode, 0, LEN as u32, reply);
    told.recv().unwrap().unwrap()
}

/// Makes files, each durable before the next, until it is told to stop; gives how many.
fn work(fs: &Arc<Fs>, thread: usize, made: &AtomicU64, stop: &AtomicBool) -> u64 {
    let mut count = 0;
    while !stop.load(Ordering::Acquire) {
        let name = format!("{thread}-{count}");
        let ino = fs.create(ROOT, name.as_bytes(), FILE, 0, &ME).unwrap().ino;
        write(fs, ino, count as u8);
        fs.fsync(&fs.iget(ino).unwrap(), false).unwrap();
        assert_eq!(read(fs, ino), [count as u8; LEN]);
        fs.forget(ino, 1);
        count += 1;
        made.fetch_add(1, Ordering::AcqRel);
    }
    count
}

fn wait_for_more(made: &AtomicU64) {
    let before = made.load(Ordering::Acquire);
    while made.load(Ordering::Acquire) < before + 3 {
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_device_that_is_suspended_for_a_while_costs_only_time() {
    let image = Image::new("-t ext4 -b 4096", "64M");
    let disk = MemDisk::from_bytes("mem0", std::fs::read(&image.path).unwrap());
    let below: DynDevice = disk.clone();
    let len = below.capacity();
    let top = linear_over(below, Sector::ZERO, len).unwrap();
    let fs = Fs::mount(top.clone(), MountOptions::default()).unwrap();
    let (made, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let counts: Vec<u64> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|thread| {
                let (fs, made, stop) = (&fs, &made, &stop);
                scope.spawn(move || work(fs, thread, made, stop))
            })
            .collect();
        for round in 0..3 {
            wait_for_more(&made);
            let known = fs.create(ROOT, format!("known{round}").as_bytes(), FILE, 0, &ME);
            let known = known.unwrap().ino;
            let mode = if round % 2 == 0 {
                Suspend::Flush
            } else {
                Suspend::NoFlush
            };
            top.suspend(mode).unwrap();
            for _ in 0..count(5, 600) {
                std::thread::sleep(Duration::from_millis(100));
                // Would not come back if it waited for the device.
                assert_eq!(fs.getattr(known).unwrap().ino, known);
            }
            top.resume().unwrap();
        }
        wait_for_more(&made);
        stop.store(true, Ordering::Release);
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    fs.unmount().unwrap();
    drop(fs);
    std::fs::write(&image.path, disk.snapshot()).unwrap();
    image.assert_clean();
    let fs = Fs::mount(disk, MountOptions::default()).unwrap();
    for (thread, count) in counts.into_iter().enumerate() {
        for at in 0..count {
            let name = format!("{thread}-{at}");
            let ino = fs.lookup(ROOT, name.as_bytes()).unwrap().unwrap().ino;
            assert_eq!(read(&fs, ino), [at as u8; LEN], "{name}");
        }
    }
    fs.unmount().unwrap();
}
