//! Shutting a file system down: what each way makes durable, what is answered afterwards.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends where something is wrong"
)]

use std::process::Command;
use std::sync::Arc;

use blockstack::DynDevice;
use blockstack::backend::mem::MemDisk;
use fs::ops::space::FallocMode;
use fs::ops::{Caller, NewNode, SetAttr, Shutdown};
use fs::{Fs, FsError, MountOptions};

const ROOT: u32 = 2;
const ME: Caller = Caller {
    uid: 0,
    gid: 0,
    thread: 0,
    keeps_times: false,
};

struct Rig {
    dir: tempfile::TempDir,
    disk: Arc<MemDisk>,
}

impl Rig {
    fn new(kind: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("img");
        let made = Command::new("mke2fs")
            .args(["-q", "-F", "-t", kind])
            .arg(&path)
            .arg("32M")
            .status()
            .expect("mke2fs (package e2fsprogs)");
        assert!(made.success());
        let disk = MemDisk::from_bytes("mem0", std::fs::read(&path).unwrap());
        Self { dir, disk }
    }

    fn mount(&self) -> Arc<Fs> {
        let dev: DynDevice = self.disk.clone();
        // Nothing is committed by its age.
        let options = MountOptions {
            commit_secs: 10_000,
            ..MountOptions::default()
        };
        Fs::mount(dev, options).unwrap()
    }

    fn fsck(&self) {
        let path = self.dir.path().join("after");
        std::fs::write(&path, self.disk.snapshot()).unwrap();
        let said = Command::new("e2fsck")
            .arg("-fn")
            .arg(&path)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&said.stdout);
        assert!(said.status.success(), "{text}");
    }
}

fn make(fs: &Arc<Fs>, name: &[u8]) -> u32 {
    let node = NewNode::Node {
        mode: 0o100_644,
        rdev: 0,
    };
    fs.create(ROOT, name, node, 0, &ME).unwrap().ino
}

/// Which of two files is there after a shutdown and the next mount: one committed before, one not.
fn left_after(kind: &str, how: Shutdown) -> (bool, bool) {
    let rig = Rig::new(kind);
    let fs = rig.mount();
    make(&fs, b"old");
    fs.sync().unwrap();
    make(&fs, b"new");
    fs.shut_down(how).unwrap();
    assert!(fs.is_shut_down());
    fs.unmount().unwrap();
    drop(fs);
    let fs = rig.mount();
    let has = |name: &[u8]| fs.lookup(ROOT, name).unwrap().is_some();
    let left = (has(b"old"), has(b"new"));
    fs.unmount().unwrap();
    drop(fs);
    rig.fsck();
    left
}

#[test]
fn the_log_is_flushed_where_that_was_asked_for() {
    for kind in ["ext3", "ext4"] {
        assert_eq!(left_after(kind, Shutdown::Nothing), (true, false), "{kind}");
        assert_eq!(left_after(kind, Shutdown::Log), (true, true), "{kind}");
        let all = left_after(kind, Shutdown::Everything);
        assert_eq!(all, (true, true), "{kind}");
    }
}

#[test]
fn everything_is_refused_afterwards_and_no_error_is_recorded() {
    let rig = Rig::new("ext4");
    let fs = rig.mount();
    let ino = make(&fs, b"file");
    fs.shut_down(Shutdown::Log).unwrap();
    // A second time changes nothing.
    fs.shut_down(Shutdown::Everything).unwrap();
    let node = NewNode::Directory { mode: 0o755 };
    let refused = Some(FsError::ShutDown);
    assert_eq!(fs.create(ROOT, b"d", node, 0, &ME).err(), refused);
    assert_eq!(fs.lookup(ROOT, b"file").err(), refused);
    assert_eq!(fs.getattr(ino).err(), refused);
    assert_eq!(fs.unlink(ROOT, b"file", &ME).err(), refused);
    assert_eq!(fs.getxattr(ino, b"user.a").err(), refused);
    let set = SetAttr {
        mode: Some(0o600),
        ..SetAttr::default()
    };
    assert_eq!(fs.setattr(ino, &set, &ME).err(), refused);
    assert_eq!(fs.trim(0, u64::MAX, 0).err(), refused);
    assert_eq!(fs.sync().err(), refused);
    fs.unmount().unwrap();
    drop(fs);
    let fs = rig.mount();
    assert!(fs.lookup(ROOT, b"file").unwrap().is_some());
    fs.unmount().unwrap();
    drop(fs);
    rig.fsck();
    let superblock = &rig.disk.snapshot()[1024..2048];
    assert_eq!(superblock[0x3a], 1, "s_state says that it is clean");
}

/// What was lost: blocks of files that were being deleted. The operation was stopped halfway, and a
/// commit that was on its way took what it had done so far.
#[test]
fn no_operation_is_committed_halfway() {
    let rig = Rig::new("ext4");
    let long = std::env::var_os("FUSEFS_STACK_LONG").is_some_and(|word| word == "1");
    for round in 0..if long { 400 } else { 8 } {
        let fs = rig.mount();
        std::thread::scope(|scope| {
            for thread in 0..2 {
                let fs = &fs;
                scope.spawn(move || while make_and_remove(fs, thread).is_ok() {});
            }
            let fs = &fs;
            scope.spawn(move || {
                while !fs.is_shut_down() {
                    fs.journal.start_commit(fs.journal.youngest());
                    std::thread::yield_now();
                }
            });
            std::thread::sleep(std::time::Duration::from_millis(10 + round % 7));
            fs.shut_down(Shutdown::Nothing).unwrap();
        });
        fs.unmount().unwrap();
        drop(fs);
        // Replays, and deletes what was left without a name.
        let fs = rig.mount();
        for thread in 0..2 {
            fs.unlink(ROOT, &[b'0' + thread], &ME).ok();
        }
        fs.unmount().unwrap();
        drop(fs);
        rig.fsck();
    }
}

/// Makes a file of many extents, and removes it again.
fn make_and_remove(fs: &Arc<Fs>, thread: u8) -> Result<(), FsError> {
    let name = [b'0' + thread];
    let node = NewNode::Node {
        mode: 0o100_644,
        rdev: 0,
    };
    let ino = fs.create(ROOT, &name, node, 0, &ME)?.ino;
    let inode = fs.iget(ino)?;
    for at in 0..40 {
        fs.fallocate(&inode, FallocMode::empty(), at * 16384, 4096, &ME)?;
    }
    drop(inode);
    fs.unlink(ROOT, &name, &ME)?;
    fs.forget(ino, u64::MAX);
    Ok(())
}
