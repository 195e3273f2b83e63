//! Whole stacks under power cuts and faults: images, a model that knows what was promised, and a
//! seeded storm of operations on both.
#![allow(dead_code, reason = "each test uses a part")]

pub mod history;
pub mod image;
pub mod model;
pub mod run;

use std::sync::Arc;
use std::sync::mpsc::channel;

use fs::data::Origin;
use fs::ops::{Caller, NewNode};
use fs::{Fs, FsError, FsResult};

pub const ROOT: u32 = 2;
pub const ME: Caller = Caller {
    uid: 0,
    gid: 0,
    thread: 0,
    keeps_times: false,
};
pub const FILE: NewNode<'static> = NewNode::Node {
    mode: 0o100_644,
    rdev: 0,
};
pub const DIR: NewNode<'static> = NewNode::Directory { mode: 0o755 };
pub const DIRECT: Origin = Origin::Direct { kill_priv: false };

/// A small generator of random numbers.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> Option<T> {
        of.get(self.below(of.len() as u64) as usize).copied()
    }
}

/// Writes and waits for the answer.
pub fn write(fs: &Arc<Fs>, ino: u32, offset: u64, bytes: &[u8], origin: Origin) -> FsResult<u32> {
    let (sender, receiver) = channel();
    let inode = fs.iget(ino)?;
    let reply = Box::new(move |res| sender.send(res).unwrap());
    fs.write(&inode, offset, bytes, origin, &ME, reply);
    drop(inode);
    receiver
        .recv()
        .unwrap_or_else(|_gone| panic!("a write that was never answered"))
}

/// Reads and waits for the answer.
pub fn read(fs: &Arc<Fs>, ino: u32, offset: u64, len: u32) -> FsResult<Vec<u8>> {
    let (sender, receiver) = channel();
    let inode = fs.iget(ino)?;
    let reply = Box::new(move |res: Result<&[u8], FsError>| {
        sender.send(res.map(<[u8]>::to_vec)).unwrap();
    });
    fs.read(&inode, offset, len, reply);
    drop(inode);
    receiver
        .recv()
        .unwrap_or_else(|_gone| panic!("a read that was never answered"))
}

pub fn fsync(fs: &Arc<Fs>, ino: u32, datasync: bool) -> FsResult {
    let inode = fs.iget(ino)?;
    fs.fsync(&inode, datasync)
}

/// Prints what the libraries log, where `STORM_LOG` is set.
pub fn log_to_stderr() {
    struct Print;
    impl log::Log for Print {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &log::Record<'_>) {
            eprintln!("{}: {}", record.level(), record.args());
        }
        fn flush(&self) {}
    }
    if std::env::var_os("STORM_LOG").is_some() && log::set_logger(&Print).is_ok() {
        log::set_max_level(log::LevelFilter::Info);
    }
}
