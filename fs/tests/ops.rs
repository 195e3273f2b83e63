//! Operations on whole images in memory, judged by e2fsck.
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
use fs::ops::space::FallocMode;
use fs::ops::{Caller, NewNode, RenameFlags, SetAttr};
use fs::{Fs, FsError, MountOptions};

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
const DIR: NewNode<'static> = NewNode::Directory { mode: 0o755 };

struct Image {
    dir: tempfile::TempDir,
}

impl Image {
    fn new(args: &[&str], size: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let out = Command::new("mke2fs")
            .args(["-q", "-F"])
            .args(args)
            .arg(dir.path().join("img"))
            .arg(size)
            .output()
            .expect("mke2fs (package e2fsprogs)");
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        Self { dir }
    }

    fn disk(&self) -> Arc<MemDisk> {
        MemDisk::from_bytes("mem0", std::fs::read(self.dir.path().join("img")).unwrap())
    }

    fn fsck(&self, disk: &MemDisk) {
        let report = fs::check::check(&disk.image(), &mut fs::check::Scratch::default());
        assert!(report.is_clean(), "our check: {report}");
        let path = self.dir.path().join("after");
        std::fs::write(&path, disk.snapshot()).unwrap();
        let out = Command::new("e2fsck")
            .args(["-fn"])
            .arg(&path)
            .output()
            .unwrap();
        assert!(
            out.status.success(),
            "{}{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        );
    }
}

fn write(
    fs: &Arc<Fs>,
    ino: u32,
    offset: u64,
    bytes: &[u8],
    origin: Origin,
) -> Result<u32, FsError> {
    let (sender, receiver) = channel();
    let inode = fs.iget(ino).unwrap();
    let reply = Box::new(move |res| sender.send(res).unwrap());
    fs.write(&inode, offset, bytes, origin, &ME, reply);
    receiver.recv().unwrap()
}

fn read(fs: &Arc<Fs>, ino: u32, offset: u64, len: u32) -> Vec<u8> {
    let (sender, receiver) = channel();
    let inode = fs.iget(ino).unwrap();
    let reply = Box::new(move |res: Result<&[u8], FsError>| {
        sender.send(res.map(<[u8]>::to_vec)).unwrap();
    });
    fs.read(&inode, offset, len, reply);
    receiver.recv().unwrap().unwrap()
}

fn on_all(test: impl Fn(&Arc<Fs>)) {
    for kind in ["ext2", "ext3", "ext4"] {
        for block in ["1024", "2048", "4096"] {
            let image = Image::new(&["-t", kind, "-b", block], "32M");
            let disk = image.disk();
            let dev: DynDevice = disk.clone();
            let fs = Fs::mount(dev, MountOptions::default()).unwrap();
            test(&fs);
            fs.unmount().unwrap();
            drop(fs);
            image.fsck(&disk);
        }
    }
}

#[test]
fn an_empty_mount_changes_nothing_that_matters() {
    on_all(|_| ());
}

#[test]
fn files_come_back() {
    on_all(|fs| {
        let file = fs.create(ROOT, b"file", FILE, 0, &ME).unwrap();
        let direct = Origin::Direct { kill_priv: false };
        for (offset, origin) in [(0, Origin::PageCache), (5000, direct), (300_000, direct)] {
            let bytes: Vec<u8> = (0..10_000u32).map(|i| (i + offset as u32) as u8).collect();
            assert_eq!(write(fs, file.ino, offset, &bytes, origin).unwrap(), 10_000);
            assert_eq!(read(fs, file.ino, offset, 10_000), bytes);
        }
        let inode = fs.iget(file.ino).unwrap();
        fs.fsync(&inode, false).unwrap();
        assert_eq!(fs.getattr(file.ino).unwrap().size, 310_000);
        assert!(
            read(fs, file.ino, 20_000, 1000)
                .iter()
                .all(|&byte| byte == 0)
        );
        let shorter = SetAttr {
            size: Some(777),
            ..SetAttr::default()
        };
        assert_eq!(fs.setattr(file.ino, &shorter, &ME).unwrap().size, 777);
        let longer = SetAttr {
            size: Some(6000),
            ..SetAttr::default()
        };
        fs.setattr(file.ino, &longer, &ME).unwrap();
        assert!(read(fs, file.ino, 777, 6000).iter().all(|&byte| byte == 0));
    });
}

#[test]
fn names_come_and_go() {
    on_all(|fs| {
        let dir = fs.create(ROOT, b"dir", DIR, 0, &ME).unwrap();
        for i in 0..500 {
            let name = format!("a-rather-long-name-{i}");
            let made = fs.create(dir.ino, name.as_bytes(), FILE, 0, &ME).unwrap();
            fs.link(made.ino, ROOT, format!("link-{i}").as_bytes())
                .unwrap();
        }
        let long = vec![b'x'; 200];
        let target = NewNode::Symlink { target: &long };
        let link = fs.create(dir.ino, b"long", target, 0, &ME).unwrap();
        assert_eq!(fs.readlink(link.ino).unwrap(), long);
        let sub = fs.create(ROOT, b"sub", DIR, 0, &ME).unwrap();
        let none = RenameFlags::empty();
        fs.rename(ROOT, b"sub", dir.ino, b"moved", none, &ME)
            .unwrap();
        assert_eq!(
            fs.rename(dir.ino, b"moved", sub.ino, b"into-itself", none, &ME),
            Err(FsError::Invalid)
        );
        fs.rename(
            dir.ino,
            b"moved",
            ROOT,
            b"link-3",
            RenameFlags::EXCHANGE,
            &ME,
        )
        .unwrap();
        fs.rename(ROOT, b"link-4", ROOT, b"link-5", none, &ME)
            .unwrap();
        for i in 0..400 {
            let name = format!("a-rather-long-name-{i}");
            fs.unlink(dir.ino, name.as_bytes(), &ME).unwrap();
        }
        assert_eq!(fs.rmdir(ROOT, b"dir", &ME), Err(FsError::NotEmpty));
        assert!(fs.lookup(ROOT, b"link-4").unwrap().is_none());
        assert!(fs.lookup(ROOT, b"link-5").unwrap().is_some());
    });
}

#[test]
fn an_unlinked_file_lives_until_it_is_forgotten() {
    on_all(|fs| {
        let file = fs.create(ROOT, b"file", FILE, 0, &ME).unwrap();
        write(fs, file.ino, 0, &[7; 100_000], Origin::PageCache).unwrap();
        fs.unlink(ROOT, b"file", &ME).unwrap();
        assert_eq!(read(fs, file.ino, 0, 10), [7; 10]);
        fs.forget(file.ino, 1);
    });
}

#[test]
fn an_unlinked_file_that_was_truncated_is_still_deleted() {
    on_all(|fs| {
        let file = fs.create(ROOT, b"file", FILE, 0, &ME).unwrap();
        write(fs, file.ino, 0, &[7; 100_000], Origin::PageCache).unwrap();
        fs.unlink(ROOT, b"file", &ME).unwrap();
        let shorter = SetAttr {
            size: Some(5000),
            ..SetAttr::default()
        };
        fs.setattr(file.ino, &shorter, &ME).unwrap();
        fs.forget(file.ino, 1);
    });
}

#[test]
fn holes_are_made_and_filled() {
    on_all(|fs| {
        let file = fs.create(ROOT, b"file", FILE, 0, &ME).unwrap();
        let inode = fs.iget(file.ino).unwrap();
        write(fs, file.ino, 0, &[9; 64 << 10], Origin::PageCache).unwrap();
        let punch = FallocMode::PUNCH_HOLE | FallocMode::KEEP_SIZE;
        fs.fallocate(&inode, punch, 5000, 20_000, &ME).unwrap();
        let bytes = read(fs, file.ino, 0, 64 << 10);
        for (at, &byte) in bytes.iter().enumerate() {
            assert_eq!(
                byte,
                if (5000..25_000).contains(&at) { 0 } else { 9 },
                "byte {at}"
            );
        }
        let grown = fs.fallocate(&inode, FallocMode::empty(), 64 << 10, 100_000, &ME);
        if fs.geo.has_extents() {
            grown.unwrap();
            write(fs, file.ino, 70_000, &[3; 5000], Origin::PageCache).unwrap();
            fs.fallocate(&inode, FallocMode::COLLAPSE_RANGE, 0, 8192, &ME)
                .unwrap();
            assert_eq!(read(fs, file.ino, 70_000 - 8192, 5000), [3; 5000]);
        } else {
            assert_eq!(grown, Err(FsError::NotSupported));
        }
    });
}

/// Lost: the data, though the call said that a file with a block map cannot do that.
#[test]
fn what_cannot_be_zeroed_keeps_its_data() {
    on_all(|fs| {
        let file = fs.create(ROOT, b"file", FILE, 0, &ME).unwrap();
        let inode = fs.iget(file.ino).unwrap();
        write(fs, file.ino, 0, &[9; 64 << 10], Origin::PageCache).unwrap();
        let zeroed = fs.fallocate(&inode, FallocMode::ZERO_RANGE, 0, 32 << 10, &ME);
        let expected = if fs.geo.has_extents() {
            zeroed.unwrap();
            0
        } else {
            assert_eq!(zeroed, Err(FsError::NotSupported));
            9
        };
        assert_eq!(read(fs, file.ino, 0, 32 << 10), [expected; 32 << 10]);
    });
}

/// What was lost: handles of files (`name_to_handle_at`, NFS) once the kernel had forgotten the file.
#[test]
fn a_file_is_found_by_its_number_as_long_as_it_is_one() {
    let image = Image::new(&["-t", "ext4"], "32M");
    let disk = image.disk();
    let dev: DynDevice = disk.clone();
    let fs = Fs::mount(dev, MountOptions::default()).unwrap();
    let ino = fs.create(ROOT, b"file", FILE, 0, &ME).unwrap().ino;
    fs.forget(ino, 1);
    assert!(fs.inodes.get(ino).is_none());
    let found = fs.lookup_number(ino).unwrap().unwrap();
    assert_eq!((found.ino, found.nlink), (ino, 1));
    fs.unlink(ROOT, b"file", &ME).unwrap();
    assert_eq!(fs.lookup_number(ino), Ok(None), "removed, and still open");
    fs.forget(ino, 1);
    fs.evict_all();
    assert_eq!(fs.lookup_number(ino), Ok(None), "deleted");
    assert!(fs.lookup_number(ROOT).unwrap().is_some());
    let inodes = fs.geo.inodes_count;
    // No inode, the journal, one never used, one in a table that was never written, none.
    for number in [0, 8, ino + 1, inodes, inodes + 1, u32::MAX] {
        assert_eq!(fs.lookup_number(number), Ok(None), "{number}");
    }
    assert_eq!(fs.errors.lock().count, 0, "no damage");
    fs.unmount().unwrap();
    drop(fs);
    image.fsck(&disk);
}

/// What was lost: the space of a file removed just before. The kernel says that nobody has it open
/// only after the removal was answered, and whoever wrote in between was told that the disk is full.
#[test]
fn space_of_a_file_that_was_just_removed_is_waited_for() {
    let image = Image::new(&["-t", "ext4"], "16M");
    let disk = image.disk();
    let dev: DynDevice = disk.clone();
    let fs = Fs::mount(dev, MountOptions::default()).unwrap();
    fs.orphans.expect_farewells();
    let fill = |name: &[u8], len: u64| {
        let ino = fs.create(ROOT, name, FILE, 0, &ME).unwrap().ino;
        let inode = fs.iget(ino).unwrap();
        let result = fs.fallocate(&inode, FallocMode::empty(), 0, len, &ME);
        (ino, result)
    };
    let free = fs.statfs().bfree * u64::from(fs.geo.block_size);
    let (big, filled) = fill(b"big", free / 10 * 9);
    filled.unwrap();
    let (_, refused) = fill(b"refused", free / 2);
    assert_eq!(refused, Err(FsError::NoSpace), "while the first is there");
    fs.unlink(ROOT, b"big", &ME).unwrap();
    std::thread::scope(|scope| {
        let fs = &fs;
        scope.spawn(move || {
            // Late, as the kernel is.
            std::thread::sleep(std::time::Duration::from_millis(30));
            fs.forget(big, 1);
        });
        let (_, result) = fill(b"next", free / 10 * 8);
        assert_eq!(result, Ok(()));
    });
    fs.unmount().unwrap();
    drop(fs);
    image.fsck(&disk);
}

/// Lost: for some seconds, the inodes of empty files that were removed.
#[test]
fn inodes_of_empty_files_that_were_removed_are_there_again_at_once() {
    let image = Image::new(&["-t", "ext4", "-N", "64"], "8M");
    let disk = image.disk();
    let dev: DynDevice = disk.clone();
    let options = MountOptions {
        commit_secs: 3600,
        ..MountOptions::default()
    };
    let fs = Fs::mount(dev, options).unwrap();
    let create = |number: u32| fs.create(ROOT, format!("{number}").as_bytes(), FILE, 0, &ME);
    let made: Vec<u32> = (0..)
        .map_while(|number| Some(create(number).ok()?.ino))
        .collect();
    assert!(made.len() > 10);
    for (number, ino) in made.iter().enumerate() {
        fs.unlink(ROOT, format!("{number}").as_bytes(), &ME)
            .unwrap();
        fs.forget(*ino, 1);
    }
    for number in 0..made.len() {
        create(number as u32).unwrap();
    }
    fs.unmount().unwrap();
    drop(fs);
    image.fsck(&disk);
}
