//! What the disk has of times and versions, as debugfs shows it.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends where something is wrong"
)]

use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::channel;

use blockstack::DynDevice;
use blockstack::backend::mem::MemDisk;
use fs::data::Origin;
use fs::ops::{Caller, NewNode, RenameFlags, SetAttr, SetTime};
use fs::options::Atime;
use fs::xattr::XattrMode;
use fs::{Fs, MountOptions, Timespec};

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
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("img");
        let made = Command::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4"])
            .arg(&path)
            .arg("16M")
            .status()
            .expect("mke2fs (package e2fsprogs)");
        assert!(made.success());
        let disk = MemDisk::from_bytes("mem0", std::fs::read(&path).unwrap());
        Self { dir, disk }
    }

    fn mount(&self, lazytime: bool) -> Arc<Fs> {
        let dev: DynDevice = self.disk.clone();
        let options = MountOptions {
            lazytime,
            atime: Atime::Strict,
            commit_secs: 10_000,
            ..MountOptions::default()
        };
        Fs::mount(dev, options).unwrap()
    }

    /// What follows `field` in debugfs' words on a file.
    fn says(&self, file: &str, field: &str) -> String {
        let path = self.dir.path().join("look");
        std::fs::write(&path, self.disk.snapshot()).unwrap();
        let said = Command::new("debugfs")
            .args(["-R", &format!("stat {file}")])
            .arg(&path)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        let after = text.split(field).nth(1).unwrap_or_else(|| panic!("{text}"));
        after.split_whitespace().next().unwrap().to_owned()
    }

    fn version(&self) -> u64 {
        let word = self.says("/file", "Version: 0x");
        u64::from_str_radix(&word.replace(':', ""), 16).unwrap()
    }
}

fn make(fs: &Arc<Fs>) -> u32 {
    let node = NewNode::Node {
        mode: 0o100_644,
        rdev: 0,
    };
    fs.create(ROOT, b"file", node, 0, &ME).unwrap().ino
}

fn write(fs: &Arc<Fs>, ino: u32, bytes: &[u8]) {
    let (sender, receiver) = channel();
    let inode = fs.iget(ino).unwrap();
    let reply = Box::new(move |res| sender.send(res).unwrap());
    let origin = Origin::Direct { kill_priv: false };
    fs.write(&inode, 0, bytes, origin, &ME, reply);
    receiver.recv().unwrap().unwrap();
}

fn read(fs: &Arc<Fs>, ino: u32) {
    let (sender, receiver) = channel();
    let inode = fs.iget(ino).unwrap();
    let reply = Box::new(move |res: Result<&[u8], fs::FsError>| {
        sender.send(res.map(<[u8]>::len)).unwrap();
    });
    fs.read(&inode, 0, 4096, reply);
    receiver.recv().unwrap().unwrap();
}

/// A file with an old time of access, all of it durable.
fn old_file(fs: &Arc<Fs>) -> u32 {
    let ino = make(fs);
    write(fs, ino, b"content");
    let old = Timespec { sec: 1000, nsec: 0 };
    let set = SetAttr {
        atime: Some(SetTime::At(old)),
        ..SetAttr::default()
    };
    fs.setattr(ino, &set, &ME).unwrap();
    fs.sync().unwrap();
    ino
}

/// Whether the disk has the time of access of [`old_file`].
fn is_old(rig: &Rig) -> bool {
    // 1000, in hexadecimal.
    rig.says("/file", " atime: 0x").starts_with("000003e8:")
}

#[test]
fn with_lazytime_a_read_starts_no_transaction_and_fsync_writes_its_time() {
    for lazytime in [false, true] {
        let rig = Rig::new();
        let fs = rig.mount(lazytime);
        let ino = old_file(&fs);
        let before = fs.journal.youngest();
        read(&fs, ino);
        let started = fs.journal.youngest() != before;
        assert_eq!(started, !lazytime);
        assert!(fs.getattr(ino).unwrap().atime.sec > 1000);
        let inode = fs.iget(ino).unwrap();
        // Data alone is no reason.
        fs.fsync(&inode, true).unwrap();
        assert_eq!(
            inode.lazy_since.load(std::sync::atomic::Ordering::Relaxed) != 0,
            lazytime
        );
        fs.fsync(&inode, false).unwrap();
        assert_eq!(
            inode.lazy_since.load(std::sync::atomic::Ordering::Relaxed),
            0
        );
        drop(inode);
        fs.unmount().unwrap();
        assert!(!is_old(&rig));
    }
}

/// Times the kernel has kept come as a change of times only.
fn kept_by_the_kernel(sec: i64) -> SetAttr {
    let time = Timespec { sec, nsec: 0 };
    SetAttr {
        mtime: Some(SetTime::At(time)),
        ctime: Some(time),
        ..SetAttr::default()
    }
}

#[test]
fn with_lazytime_times_are_written_when_the_inode_leaves_and_with_other_changes() {
    let rig = Rig::new();
    let fs = rig.mount(true);
    let ino = old_file(&fs);
    let before = fs.journal.youngest();
    fs.setattr(ino, &kept_by_the_kernel(2000), &ME).unwrap();
    assert_eq!(fs.journal.youngest(), before);
    // As the kernel's forget: the inode leaves the memory.
    fs.forget(ino, u64::MAX);
    fs.evict_all();
    assert!(fs.inodes.get(ino).is_none());
    assert_eq!(fs.getattr(ino).unwrap().mtime.sec, 2000);
    fs.setattr(ino, &kept_by_the_kernel(3000), &ME).unwrap();
    let set = SetAttr {
        mode: Some(0o600),
        ..SetAttr::default()
    };
    fs.setattr(ino, &set, &ME).unwrap();
    let lazy = &fs.iget(ino).unwrap().lazy_since;
    assert_eq!(lazy.load(std::sync::atomic::Ordering::Relaxed), 0);
    fs.setattr(ino, &kept_by_the_kernel(4000), &ME).unwrap();
    fs.unmount().unwrap();
    let mtime = rig.says("/file", " mtime: 0x");
    assert!(mtime.starts_with("00000fa0:"), "{mtime}");
}

#[test]
fn each_change_of_a_file_counts_in_i_version() {
    let rig = Rig::new();
    let fs = rig.mount(false);
    let ino = make(&fs);
    fs.sync().unwrap();
    let mut last = 0;
    let mut counted = |what: &str| {
        fs.sync().unwrap();
        fs.bufs.write_dirty().unwrap();
        let now = fs.iget(ino).unwrap().data.read().version;
        assert!(now > last, "{what}: {last}, then {now}");
        last = now;
    };
    write(&fs, ino, b"content");
    counted("write");
    let set = SetAttr {
        size: Some(3),
        ..SetAttr::default()
    };
    fs.setattr(ino, &set, &ME).unwrap();
    counted("truncate");
    let set = SetAttr {
        mode: Some(0o600),
        ..SetAttr::default()
    };
    fs.setattr(ino, &set, &ME).unwrap();
    counted("chmod");
    fs.setxattr(ino, b"user.a", Some(b"b"), XattrMode::Any)
        .unwrap();
    counted("setxattr");
    fs.set_flags(ino, 0x80 | fs.flags(ino).unwrap()).unwrap();
    counted("chattr");
    fs.link(ino, ROOT, b"other").unwrap();
    counted("link");
    fs.unlink(ROOT, b"other", &ME).unwrap();
    counted("unlink");
    fs.rename(ROOT, b"file", ROOT, b"new", RenameFlags::empty(), &ME)
        .unwrap();
    counted("rename");
    fs.rename(ROOT, b"new", ROOT, b"file", RenameFlags::empty(), &ME)
        .unwrap();
    counted("rename back");
    fs.unmount().unwrap();
    assert_eq!(rig.version(), last);
}
