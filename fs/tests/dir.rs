//! Directories and attributes on whole images: made by mke2fs and the kernel and read here, made
//! here and read by e2fsck, debugfs and the kernel. What needs the kernel needs root and a loop
//! device, and says so where it is skipped.

#![expect(clippy::unwrap_used, reason = "a test ends where something is wrong")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use blockstack::DynDevice;
use blockstack::backend::mem::{self, MemDisk};
use fs::alloc::InodeUse;
use fs::dir::{self, Emit, FileType};
use fs::inode::{Inode, ROOT_INO};
use fs::xattr::{self, XattrMode};
use fs::{Fs, FsError, InodeData, InodeFlags, MountOptions};
use tempfile::TempDir;

const FILE_MODE: u16 = 0o100_644;
const DIR_MODE: u16 = 0o040_755;

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    output
}

fn stdout(command: &mut Command) -> String {
    String::from_utf8_lossy(&run(command).stdout).into_owned()
}

/// An image file in a directory of its own.
struct Image {
    dir: TempDir,
}

/// A mounted copy of an image in memory.
struct Mounted {
    disk: Arc<MemDisk>,
    fs: Arc<Fs>,
}

impl Image {
    fn new(mib: u32, args: &[&str]) -> Self {
        let image = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        run(Command::new("mke2fs")
            .args(["-q", "-F", "-E", "nodiscard"])
            .args(args)
            .arg(image.path())
            .arg(format!("{mib}M")));
        image
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn debugfs(&self, request: &str) -> String {
        stdout(
            Command::new("debugfs")
                .args(["-w", "-R", request])
                .arg(self.path()),
        )
    }

    fn fsck(&self) {
        run(Command::new("e2fsck").args(["-fn"]).arg(self.path()));
        let image = mem::Image::open(self.path()).unwrap();
        let report = fs::check::check(&image, &mut fs::check::Scratch::default());
        assert!(report.is_clean(), "our check: {report}");
    }

    fn mount(&self) -> Mounted {
        let disk = MemDisk::from_bytes("image", std::fs::read(self.path()).unwrap());
        let dev: DynDevice = disk.clone();
        let fs = Fs::mount(dev, MountOptions::default()).unwrap();
        Mounted { disk, fs }
    }

    /// Takes over what `mounted` has written, and lets e2fsck judge it.
    fn take(&self, mounted: Mounted) {
        mounted.fs.journal.shutdown().unwrap();
        std::fs::write(self.path(), mounted.disk.snapshot()).unwrap();
        self.fsck();
    }

    /// Calls `f` with the image mounted by the kernel; false where that is not possible.
    fn with_kernel(&self, f: impl FnOnce(&Path)) -> bool {
        let at = self.dir.path().join("mnt");
        std::fs::create_dir_all(&at).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "ext4", "-o", "loop,acl,user_xattr"])
            .args([self.path(), at.clone()])
            .output()
            .unwrap();
        if !mounted.status.success() {
            eprintln!(
                "SKIPPED, the kernel cannot mount it (root and loop devices needed): {}",
                String::from_utf8_lossy(&mounted.stderr)
            );
            return false;
        }
        let unmount = Unmount(at.clone());
        f(&at);
        drop(unmount);
        true
    }
}

struct Unmount(PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        // A child that another test is just starting holds our files for a moment.
        let done = (0..100).any(|_| {
            let status = Command::new("umount").arg(&self.0).status().unwrap();
            status.success() || {
                std::thread::sleep(std::time::Duration::from_millis(50));
                false
            }
        });
        assert!(
            done || std::thread::panicking(),
            "still mounted: {:?}",
            self.0
        );
    }
}

impl Mounted {
    fn inode(&self, ino: u32) -> Arc<Inode> {
        Inode::new(self.fs.geo.csum_seed, ino, self.fs.read_inode(ino).unwrap())
    }

    fn lookup(&self, dir: u32, name: &str) -> Option<u32> {
        let dir = self.inode(dir);
        let data = dir.data.read();
        let entry = dir::lookup(&self.fs, &dir, &data, name.as_bytes()).unwrap();
        entry.map(|e| e.ino)
    }

    fn list(&self, dir: u32) -> BTreeMap<String, (u32, FileType)> {
        let dir = self.inode(dir);
        let data = dir.data.read();
        let mut all = BTreeMap::new();
        let mut cookie = 0;
        loop {
            let mut count = 0;
            dir::read(&self.fs, &dir, &data, cookie, &mut |e| {
                if count == 100 {
                    return Emit::Full;
                }
                count += 1;
                cookie = e.next_cookie;
                let name = String::from_utf8(e.name.to_vec()).unwrap();
                assert!(all.insert(name, (e.ino, e.ftype)).is_none(), "listed twice");
                Emit::More
            })
            .unwrap();
            if count == 0 {
                return all;
            }
        }
    }

    /// Makes an inode with `links` links and no name.
    fn make(&self, parent: u32, mode: u16, links: u16) -> Arc<Inode> {
        let fs = &self.fs;
        let handle = fs.journal.start(30).unwrap();
        let directory = mode & 0o170_000 == 0o040_000;
        let what = if directory {
            InodeUse::Directory { top: false }
        } else {
            InodeUse::Other
        };
        let ino = fs.alloc.alloc_inode(&handle, parent, what).unwrap();
        let mut data = InodeData {
            mode,
            links,
            extra_isize: fs.geo.want_extra_isize,
            ctime: fs.now(),
            ..InodeData::default()
        };
        let tail = usize::from(fs.geo.inode_size) - 128 - usize::from(data.extra_isize);
        data.ibody.resize(tail, 0);
        if fs.geo.has_extents() {
            data.flags |= InodeFlags::EXTENTS;
            data.block[..6].copy_from_slice(&[0x0a, 0xf3, 0, 0, 4, 0]);
        }
        let inode = Inode::new(fs.geo.csum_seed, ino, data);
        let mut data = inode.data.write();
        if directory {
            dir::init(fs, &handle, &inode, &mut data, parent).unwrap();
        }
        fs.write_inode(&handle, &inode, &data).unwrap();
        handle.stop().unwrap();
        drop(data);
        inode
    }

    fn add(&self, dir: &Inode, name: &str, ino: u32, ftype: FileType) -> Result<(), FsError> {
        let handle = self.fs.journal.start(dir::add_credits(&self.fs) + 1)?;
        let mut data = dir.data.write();
        let added = dir::add(
            &self.fs,
            &handle,
            dir,
            &mut data,
            name.as_bytes(),
            ino,
            ftype,
        );
        if ftype == FileType::Directory && added.is_ok() {
            data.links += 1;
        }
        self.fs.write_inode(&handle, dir, &data)?;
        handle.stop()?;
        added
    }

    fn remove(&self, dir: &Inode, name: &str) -> u32 {
        let handle = self
            .fs
            .journal
            .start(dir::add_credits(&self.fs) + 1)
            .unwrap();
        let mut data = dir.data.write();
        let ino = dir::remove(&self.fs, &handle, dir, &mut data, name.as_bytes()).unwrap();
        self.fs.write_inode(&handle, dir, &data).unwrap();
        handle.stop().unwrap();
        ino
    }

    /// Makes a directory in the root.
    fn mkdir(&self, name: &str) -> Arc<Inode> {
        let made = self.make(ROOT_INO, DIR_MODE, 2);
        let root = self.inode(ROOT_INO);
        self.add(&root, name, made.ino, FileType::Directory)
            .unwrap();
        made
    }

    fn set_links(&self, inode: &Inode, links: u16) {
        let handle = self.fs.journal.start(1).unwrap();
        let mut data = inode.data.write();
        data.links = links;
        self.fs.write_inode(&handle, inode, &data).unwrap();
        handle.stop().unwrap();
    }

    fn xattr(&self, ino: u32, name: &str) -> Result<Vec<u8>, FsError> {
        let inode = self.inode(ino);
        let data = inode.data.read();
        xattr::get(&self.fs, &inode, &data, name.as_bytes())
    }

    fn set_xattr(&self, ino: u32, name: &str, value: Option<&[u8]>) -> Result<(), FsError> {
        let handle = self.fs.journal.start(xattr::credits() + 1).unwrap();
        let inode = self.inode(ino);
        let mut data = inode.data.write();
        let mode = XattrMode::Any;
        let name = name.as_bytes();
        xattr::set(&self.fs, &handle, &inode, &mut data, name, value, mode)?;
        self.fs.write_inode(&handle, &inode, &data)?;
        handle.stop()
    }
}

/// Names of many lengths, some beyond ASCII.
fn name(n: u32) -> String {
    let word = ["x", "\u{e9}", "long-name-", "\u{4e16}\u{754c}"][n as usize % 4];
    format!("{n}{}", word.repeat((n as usize * 7) % 20))
}

/// The kinds of file system: arguments of mke2fs, and super block values set afterwards.
const KINDS: &[(&str, &[&str], &[&str])] = &[
    ("ext2 1k", &["-t", "ext2", "-b", "1024"], &[]),
    (
        "ext2 4k no filetype",
        &["-t", "ext2", "-b", "4096", "-O", "^filetype"],
        &[],
    ),
    (
        "ext2 no dir_index",
        &["-t", "ext2", "-b", "1024", "-O", "^dir_index"],
        &[],
    ),
    ("ext3 2k", &["-t", "ext3", "-b", "2048"], &[]),
    ("ext4 1k", &["-t", "ext4", "-b", "1024"], &[]),
    ("ext4 4k", &["-t", "ext4", "-b", "4096"], &[]),
    (
        "ext4 no csum",
        &["-t", "ext4", "-b", "1024", "-O", "^metadata_csum"],
        &[],
    ),
    (
        "ext4 no dir_index",
        &["-t", "ext4", "-b", "1024", "-O", "^dir_index"],
        &[],
    ),
    (
        "ext4 tea",
        &["-t", "ext4", "-b", "1024"],
        &["def_hash_version 2"],
    ),
    (
        "ext4 legacy",
        &["-t", "ext4", "-b", "1024"],
        &["def_hash_version 0"],
    ),
    ("ext4 unsigned", &["-t", "ext4", "-b", "1024"], &["flags 2"]),
    (
        "ext4 tea unsigned",
        &["-t", "ext4", "-b", "2048"],
        &["flags 2", "def_hash_version 2"],
    ),
    (
        "ext4 legacy unsigned",
        &["-t", "ext4", "-b", "1024"],
        &["flags 2", "def_hash_version 0"],
    ),
    (
        "ext4 seed",
        &["-t", "ext4", "-b", "1024", "-O", "metadata_csum_seed"],
        &[],
    ),
    (
        "ext4 large_dir",
        &["-t", "ext4", "-b", "1024", "-O", "large_dir"],
        &[],
    ),
];

fn images() -> impl Iterator<Item = (&'static str, Image)> {
    KINDS.iter().map(|(kind, args, values)| {
        eprintln!("{kind}");
        let mut all = vec!["-N", "4000"];
        all.extend_from_slice(args);
        let image = Image::new(40, &all);
        for value in *values {
            image.debugfs(&format!("set_super_value {value}"));
        }
        (*kind, image)
    })
}

#[test]
fn what_the_kernel_made_is_read() {
    const COUNT: u32 = 3000;
    for (kind, image) in images() {
        let made = image.with_kernel(|at| {
            std::fs::create_dir(at.join("d")).unwrap();
            for n in 0..COUNT {
                let path = at.join("d").join(name(n));
                match n % 50 {
                    0 => std::fs::create_dir(&path).unwrap(),
                    1 => std::os::unix::fs::symlink("target", &path).unwrap(),
                    _ => drop(std::fs::File::create(&path).unwrap()),
                }
            }
            for n in (0..COUNT).filter(|n| n % 7 == 3 && n % 50 > 1) {
                std::fs::remove_file(at.join("d").join(name(n))).unwrap();
            }
        });
        if !made {
            return;
        }
        image.fsck();
        let mounted = image.mount();
        let dir = mounted.lookup(ROOT_INO, "d").unwrap();
        let listed = mounted.list(dir);
        let mut want = BTreeSet::from([".".to_owned(), "..".to_owned()]);
        for n in 0..COUNT {
            let there = n % 7 != 3 || n % 50 < 2;
            assert_eq!(
                mounted.lookup(dir, &name(n)).is_some(),
                there,
                "{kind}: {}",
                name(n)
            );
            if there {
                want.insert(name(n));
                let ftype = match n % 50 {
                    _ if kind.contains("no filetype") => FileType::Unknown,
                    0 => FileType::Directory,
                    1 => FileType::Symlink,
                    _ => FileType::Regular,
                };
                assert_eq!(listed[&name(n)].1, ftype);
                assert_eq!(mounted.lookup(dir, &name(n)), Some(listed[&name(n)].0));
            }
        }
        assert!(listed.keys().eq(want.iter()), "{kind}");
        assert_eq!(listed[".."].0, ROOT_INO);
    }
}

#[test]
fn what_is_made_here_is_read_by_all() {
    const COUNT: u32 = 2500;
    for (kind, image) in images() {
        let mounted = image.mount();
        let dir = mounted.mkdir("d");
        let indexed = !kind.contains("no dir_index");
        let mut files = BTreeMap::new();
        for n in 0..COUNT {
            let file = mounted.make(dir.ino, FILE_MODE, 1);
            mounted
                .add(&dir, &name(n), file.ino, FileType::Regular)
                .unwrap();
            files.insert(name(n), file);
        }
        let hard = files[&name(0)].clone();
        // Removed ones become names of one file, added again they use the space left.
        let mut links = 1;
        for n in (1..COUNT).filter(|n| n % 3 == 0) {
            let removed = mounted.remove(&dir, &name(n));
            assert_eq!(removed, files[&name(n)].ino, "{kind}");
            let (inode, handle) = (&files[&name(n)], mounted.fs.journal.start(10).unwrap());
            let mut data = inode.data.write();
            (data.links, data.dtime) = (0, 1_700_000_000);
            mounted.fs.write_inode(&handle, inode, &data).unwrap();
            mounted
                .fs
                .alloc
                .free_inode(&handle, inode.ino, InodeUse::Other)
                .unwrap();
            handle.stop().unwrap();
            drop(data);
            if n % 2 == 0 {
                let again = format!("again-{n}");
                mounted
                    .add(&dir, &again, hard.ino, FileType::Regular)
                    .unwrap();
                links += 1;
                files.insert(again, hard.clone());
            }
            files.remove(&name(n));
        }
        mounted.set_links(&hard, links);
        assert_eq!(
            dir.data.read().flags.contains(InodeFlags::INDEX),
            indexed,
            "{kind}"
        );
        image.take(mounted);

        let debugfs = image.debugfs("ls -p /d");
        let inos: BTreeMap<_, _> = debugfs
            .lines()
            .filter_map(|line| {
                let mut fields = line.split('/').skip(1);
                let ino = fields.next()?.parse::<u32>().ok()?;
                Some((fields.nth(3)?.to_owned(), ino))
            })
            .filter(|(name, ino)| name != "." && name != ".." && *ino != 0)
            .collect();
        let want: BTreeMap<_, _> = files.iter().map(|(n, f)| (n.clone(), f.ino)).collect();
        assert!(inos == want, "{kind}: debugfs lists other names");

        let again = image.mount();
        let listed = again.list(dir.ino);
        assert_eq!(listed.len(), files.len() + 2);
        drop(again);
        image.with_kernel(|at| {
            use std::os::unix::fs::MetadataExt;
            let listed = std::fs::read_dir(at.join("d")).unwrap();
            assert_eq!(listed.count(), files.len(), "{kind}");
            for (name, ino) in &want {
                let meta = std::fs::symlink_metadata(at.join("d").join(name)).unwrap();
                assert_eq!(meta.ino(), u64::from(*ino), "{kind}: {name}");
            }
            assert!(!at.join("d").join(name(3)).exists());
            // The kernel goes on in our directory, then empties it.
            for n in 0..500 {
                std::fs::File::create(at.join("d").join(format!("kernel-{n}"))).unwrap();
            }
            std::fs::remove_dir_all(at.join("d")).unwrap();
        });
        image.fsck();
    }
}

#[test]
fn what_mke2fs_copies_is_read() {
    let source = tempfile::tempdir().unwrap();
    for n in 0..700 {
        std::fs::write(source.path().join(name(n)), b"").unwrap();
    }
    let from = source.path().to_str().unwrap();
    for kind in ["ext2", "ext3", "ext4"] {
        let image = Image::new(20, &["-t", kind, "-b", "1024", "-d", from]);
        // mke2fs leaves the directory linear, e2fsck makes an index.
        for optimize in [false, true] {
            if optimize {
                let mut fsck = Command::new("e2fsck");
                let status = fsck
                    .args(["-fyD"])
                    .arg(image.path())
                    .output()
                    .unwrap()
                    .status;
                assert!(status.code().is_some_and(|code| code < 4));
            }
            let mounted = image.mount();
            let root = mounted.inode(ROOT_INO);
            assert_eq!(root.data.read().flags.contains(InodeFlags::INDEX), optimize);
            assert_eq!(mounted.list(ROOT_INO).len(), 703);
            for n in 0..700 {
                assert!(mounted.lookup(ROOT_INO, &name(n)).is_some());
            }
            let file = mounted.lookup(ROOT_INO, &name(5)).unwrap();
            for n in 0..300 {
                mounted
                    .add(&root, &format!("new{n}"), file, FileType::Regular)
                    .unwrap();
            }
            mounted.set_links(&mounted.inode(file), 301);
            for n in 0..300 {
                assert_eq!(mounted.remove(&root, &format!("new{n}")), file);
            }
            mounted.set_links(&mounted.inode(file), 1);
            image.take(mounted);
        }
    }
}

/// Names of one file, so long that few fit a block.
fn fill(mounted: &Mounted, dir: &Inode, file: &Inode, range: std::ops::Range<u32>) -> u32 {
    for n in range.clone() {
        let long = format!("{n:0>240}");
        match mounted.add(dir, &long, file.ino, FileType::Regular) {
            Ok(()) => {}
            Err(FsError::NoSpace) => return n,
            Err(e) => panic!("{e}"),
        }
    }
    range.end
}

#[test]
fn an_index_of_all_its_levels_pleases_e2fsck() {
    for (features, levels) in [("^large_dir", 1), ("large_dir", 2)] {
        let image = Image::new(80, &["-t", "ext4", "-b", "1024", "-O", features]);
        let mounted = image.mount();
        let dir = mounted.mkdir("d");
        let file = mounted.make(ROOT_INO, FILE_MODE, 1);
        let count = fill(&mounted, &dir, &file, 0..50_000);
        assert_eq!(count == 50_000, levels == 2, "{count}");
        mounted.set_links(&file, u16::try_from(count).unwrap());
        assert_eq!(mounted.list(dir.ino).len(), count as usize + 2);
        image.take(mounted);
        let dump = image.debugfs("htree_dump /d");
        assert!(dump.contains(&format!("Indirect levels: {levels}")));
        image.with_kernel(|at| {
            for n in (0..count).step_by(501) {
                assert!(at.join("d").join(format!("{n:0>240}")).exists());
            }
            assert_eq!(
                std::fs::read_dir(at.join("d")).unwrap().count(),
                count as usize
            );
        });
    }
}

#[test]
fn damage_is_named() {
    let image = Image::new(20, &["-t", "ext4", "-b", "1024"]);
    let mounted = image.mount();
    let dir = mounted.mkdir("d");
    let file = mounted.make(ROOT_INO, FILE_MODE, 300);
    for n in 0..300 {
        mounted
            .add(&dir, &name(n), file.ino, FileType::Regular)
            .unwrap();
    }
    let ino = dir.ino;
    image.take(mounted);
    let block: u64 = image.debugfs("bmap /d 1").trim().parse().unwrap();
    let mut bytes = std::fs::read(image.path()).unwrap();
    bytes[block as usize * 1024 + 100] ^= 1;
    std::fs::write(image.path(), bytes).unwrap();
    let mounted = image.mount();
    let dir = mounted.inode(ino);
    let data = dir.data.read();
    let all = |_: &dir::Entry<'_>| Emit::More;
    let error = dir::read(&mounted.fs, &dir, &data, 0, &mut all.clone()).unwrap_err();
    let what = "directory block: checksum";
    assert_eq!(error, FsError::Corrupt { what, block, ino });
    let failed = (0..300)
        .filter(|&n| dir::lookup(&mounted.fs, &dir, &data, name(n).as_bytes()) == Err(error));
    assert!(failed.count() > 0);
}

fn value(n: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + n) as u8).collect()
}

#[test]
fn attributes_pass_between_the_kernel_and_us() {
    for (kind, image) in images().filter(|(kind, _)| kind.starts_with("ext") && kind.len() < 9) {
        let sizes = [0, 1, 40, 200, 500, 300];
        let made = image.with_kernel(|at| {
            for file in ["a", "b", "c"] {
                std::fs::write(at.join(file), b"").unwrap();
            }
            // Equal blocks: the kernel shares them.
            for file in ["a", "b"] {
                setfattr(&at.join(file), "user.big", &value(1, 600));
                setfattr(&at.join(file), "trusted.t", b"x");
            }
        });
        if !made {
            return;
        }
        let mounted = image.mount();
        let ino = |file| mounted.lookup(ROOT_INO, file).unwrap();
        let (a, b, c) = (ino("a"), ino("b"), ino("c"));
        let acl = |ino| mounted.inode(ino).data.read().file_acl;
        assert_eq!(acl(a), acl(b), "{kind}: shared by the kernel");
        assert_eq!(mounted.xattr(a, "user.big"), Ok(value(1, 600)));
        mounted
            .set_xattr(a, "user.big", Some(&value(2, 610)))
            .unwrap();
        assert_ne!(acl(a), acl(b));
        assert_eq!(mounted.xattr(a, "user.big"), Ok(value(2, 610)));
        assert_eq!(mounted.xattr(b, "user.big"), Ok(value(1, 600)));
        assert_eq!(mounted.xattr(b, "trusted.t"), Ok(b"x".to_vec()));
        let mut kept = Vec::new();
        for (i, len) in sizes.into_iter().enumerate() {
            let name = format!("user.n{}", "x".repeat(i * 3));
            match mounted.set_xattr(c, &name, Some(&value(i, len))) {
                Ok(()) => kept.push((name, value(i, len))),
                Err(e) => assert_eq!(e, FsError::NoSpace),
            }
        }
        let large = vec![0; 5000];
        assert_eq!(
            mounted.set_xattr(c, "user.large", Some(&large)),
            Err(FsError::NoSpace)
        );
        assert_eq!(
            mounted.set_xattr(c, "user.none", None),
            Err(FsError::NoData)
        );
        mounted.set_xattr(b, "user.big", None).unwrap();
        image.take(mounted);
        image.with_kernel(|at| {
            assert_eq!(getfattr(&at.join("a"), "user.big"), value(2, 610));
            assert_eq!(getfattr(&at.join("b"), "trusted.t"), b"x");
            for (name, value) in &kept {
                assert_eq!(&getfattr(&at.join("c"), name), value, "{kind}");
            }
            for (name, _) in &kept {
                run(Command::new("setfattr")
                    .args(["-x", name])
                    .arg(at.join("c")));
            }
        });
        image.fsck();
        let mounted = image.mount();
        for ino in [a, b, c] {
            let inode = mounted.inode(ino);
            let handle = mounted.fs.journal.start(20).unwrap();
            let mut data = inode.data.write();
            xattr::delete_all(&mounted.fs, &handle, &inode, &mut data).unwrap();
            mounted.fs.write_inode(&handle, &inode, &data).unwrap();
            handle.stop().unwrap();
        }
        assert_eq!(mounted.xattr(c, "user.n"), Err(FsError::NoData));
        image.take(mounted);
    }
}

fn setfattr(path: &Path, name: &str, value: &[u8]) {
    let hex: String = value.iter().map(|b| format!("{b:02x}")).collect();
    run(Command::new("setfattr")
        .args(["-n", name, "-v", &format!("0x{hex}")])
        .arg(path));
}

fn getfattr(path: &Path, name: &str) -> Vec<u8> {
    run(Command::new("getfattr")
        .args(["--only-values", "--absolute-names", "-n", name])
        .arg(path))
    .stdout
}

#[test]
fn acls_pass_between_the_kernel_and_us() {
    let image = Image::new(20, &["-t", "ext4"]);
    let made = image.with_kernel(|at| {
        std::fs::create_dir(at.join("d")).unwrap();
        std::fs::write(at.join("f"), b"").unwrap();
        let set = |args: &[&str], file: &str| {
            run(Command::new("setfacl").args(args).arg(at.join(file)));
        };
        set(&["-m", "u:1234:rw,g:55:r"], "f");
        set(&["-d", "-m", "u::rwx,u:77:rwx,g::rx,o::-"], "d");
    });
    if !made {
        return;
    }
    let mounted = image.mount();
    let d = mounted.lookup(ROOT_INO, "d").unwrap();
    let f = mounted.lookup(ROOT_INO, "f").unwrap();
    let access = mounted.xattr(f, "system.posix_acl_access").unwrap();
    assert_eq!(access.len(), 4 + 8 * 6);
    assert_eq!(
        mounted.xattr(f, "system.posix_acl_default"),
        Err(FsError::NoData)
    );
    let dir = mounted.inode(d);
    for (name, mode) in [("new", 0o100_666), ("sub", 0o040_777)] {
        let links = if name == "sub" { 2 } else { 1 };
        let inode = mounted.make(d, mode, links);
        let handle = mounted.fs.journal.start(20).unwrap();
        let parent = dir.data.read();
        let mut data = inode.data.write_nested();
        xattr::acl::inherit(
            &mounted.fs,
            &handle,
            &dir,
            &parent,
            &inode,
            &mut data,
            0o077,
        )
        .unwrap();
        mounted.fs.write_inode(&handle, &inode, &data).unwrap();
        handle.stop().unwrap();
        drop((data, parent));
        let ftype = if name == "sub" {
            FileType::Directory
        } else {
            FileType::Regular
        };
        mounted.add(&dir, name, inode.ino, ftype).unwrap();
    }
    {
        let inode = mounted.inode(f);
        let handle = mounted.fs.journal.start(20).unwrap();
        let mut data = inode.data.write();
        data.mode = 0o100_640;
        xattr::acl::chmod(&mounted.fs, &handle, &inode, &mut data).unwrap();
        mounted.fs.write_inode(&handle, &inode, &data).unwrap();
        handle.stop().unwrap();
    }
    image.take(mounted);
    image.with_kernel(|at| {
        let acl = |file: &str| {
            let mut getfacl = Command::new("getfacl");
            stdout(getfacl.args(["-n", "-c", "-p", "-E"]).arg(at.join(file)))
        };
        let new = "user::rw-\nuser:77:rwx\ngroup::r-x\nmask::rw-\nother::---\n\n";
        assert_eq!(acl("d/new"), new);
        let sub = "user::rwx\nuser:77:rwx\ngroup::r-x\nmask::rwx\nother::---\n";
        let default: String = sub.lines().map(|l| format!("default:{l}\n")).collect();
        assert_eq!(acl("d/sub"), format!("{sub}{default}\n"));
        let f = "user::rw-\nuser:1234:rw-\ngroup::r--\ngroup:55:r--\nmask::r--\nother::---\n\n";
        assert_eq!(acl("f"), f);
        // As the kernel does it in the same directory, under the same umask.
        run(Command::new("sh")
            .args(["-c", "umask 077; touch new2; mkdir sub2"])
            .current_dir(at.join("d")));
        assert_eq!(acl("d/new2"), new);
        assert_eq!(acl("d/sub2"), acl("d/sub"));
    });

    let mounted = image.mount();
    let minimal = [
        &2_u32.to_le_bytes()[..],
        &acl_entry(1, 6),
        &acl_entry(4, 4),
        &acl_entry(0x20, 0),
    ]
    .concat();
    let name = "system.posix_acl_access";
    mounted.set_xattr(f, name, Some(&minimal)).unwrap();
    assert_eq!(mounted.xattr(f, name), Err(FsError::NoData));
    assert_eq!(mounted.inode(f).data.read().mode, 0o100_640);
    assert_eq!(
        mounted.set_xattr(f, name, Some(&minimal[..20])),
        Err(FsError::Invalid)
    );
    let default = "system.posix_acl_default";
    assert_eq!(
        mounted.set_xattr(f, default, Some(&minimal)),
        Err(FsError::AccessDenied)
    );
    mounted.set_xattr(d, default, None).unwrap();
    image.take(mounted);
}

fn acl_entry(tag: u16, perm: u16) -> [u8; 8] {
    let mut entry = [0xff; 8];
    entry[..2].copy_from_slice(&tag.to_le_bytes());
    entry[2..4].copy_from_slice(&perm.to_le_bytes());
    entry
}
