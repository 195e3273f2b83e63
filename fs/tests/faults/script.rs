//! A workload that keeps book of what was promised to it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockstack::DynDevice;
use blockstack::backend::mem::{Image, MemDisk};
use fs::data::Origin;
use fs::dir::Emit;
use fs::ops::space::FallocMode;
use fs::ops::{NewNode, RenameFlags, SetAttr};
use fs::xattr::XattrMode;
use fs::{Fs, FsError, FsResult, MountOptions};

use super::PROGRESS;
use super::storm::history::read_all;
use super::storm::{DIR, DIRECT, FILE, ME, ROOT, fsync, write};

/// What a path must be once it was promised.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum State {
    File(Vec<u8>),
    Other,
    Absent,
}

/// Runs the workload and keeps book.
pub struct Script {
    pub fs: Arc<Fs>,
    pub promised: BTreeMap<String, State>,
    pub attribute: Option<Vec<u8>>,
    pub failures: Vec<(String, FsError)>,
}

fn pattern(stamp: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 64) as u8 ^ stamp).collect()
}

impl Script {
    pub fn new(fs: &Arc<Fs>) -> Self {
        Self {
            fs: fs.clone(),
            promised: BTreeMap::new(),
            attribute: None,
            failures: Vec::new(),
        }
    }

    /// What is to be checked, and what went wrong.
    pub fn close(self) -> (Book, Vec<(String, FsError)>) {
        let book = Book {
            promised: self.promised,
            attribute: self.attribute,
        };
        (book, self.failures)
    }

    fn note<T>(&mut self, what: &str, res: FsResult<T>) -> Option<T> {
        PROGRESS.fetch_add(1, Ordering::SeqCst);
        if std::env::var_os("FAULT_LOG").is_some() {
            eprintln!("{what}: {:?}", res.as_ref().err());
        }
        match res {
            Ok(value) => Some(value),
            Err(error) => {
                self.failures.push((what.to_owned(), error));
                None
            }
        }
    }

    fn create(&mut self, dir: u32, path: &str, node: NewNode<'_>) -> Option<u32> {
        let name = path.rsplit('/').next().unwrap();
        self.promised.remove(path);
        let made = self.fs.create(dir, name.as_bytes(), node, 0, &ME);
        self.note(path, made).map(|attr| attr.ino)
    }

    fn write(&mut self, ino: u32, at: u64, bytes: &[u8], origin: Origin) -> Option<()> {
        let res = write(&self.fs, ino, at, bytes, origin);
        // A caller that waits is told of what fits first, as by any file system.
        let res = res.and_then(|written| {
            let is_whole = written as usize == bytes.len();
            is_whole.then_some(()).ok_or(FsError::NoSpace)
        });
        self.note("write", res)
    }

    fn fsync(&mut self, ino: u32, path: &str, content: &[u8]) -> Option<()> {
        let res = fsync(&self.fs, ino, false);
        self.note("fsync", res)?;
        let state = State::File(content.to_vec());
        self.promised.insert(path.to_owned(), state);
        Some(())
    }

    fn file(&mut self, dir: u32, path: &str, stamp: u8, len: usize, origin: Origin) -> Option<u32> {
        let ino = self.create(dir, path, FILE)?;
        let bytes = pattern(stamp, len);
        self.write(ino, 0, &bytes, origin)?;
        self.fsync(ino, path, &bytes)?;
        Some(ino)
    }

    fn sync(&mut self, states: &[(&str, State)]) -> Option<()> {
        let res = self.fs.sync();
        self.note("sync", res)?;
        let states = states
            .iter()
            .map(|(path, state)| ((*path).to_owned(), state.clone()));
        self.promised.extend(states);
        Some(())
    }

    fn resize(&mut self, ino: u32, size: u64) -> Option<()> {
        let set = SetAttr {
            size: Some(size),
            ..SetAttr::default()
        };
        let res = self.fs.setattr(ino, &set, &ME);
        self.note("truncate", res).map(|_| ())
    }

    /// Reads what was there before.
    fn read_tree(&mut self, dir: u32, depth: u32) -> Option<()> {
        let mut found = Vec::new();
        let res = self.fs.readdir(dir, 0, &mut |entry| {
            if !entry.name.starts_with(b".") && entry.name != b"lost+found" {
                found.push(entry.name.to_vec());
            }
            Emit::More
        });
        self.note("readdir", res)?;
        for name in found.into_iter().take(6) {
            let res = self.fs.lookup(dir, &name);
            let Some(attr) = self.note("lookup", res).flatten() else {
                continue;
            };
            if u32::from(attr.mode) & libc::S_IFMT != libc::S_IFDIR {
                let res = read_all(&self.fs, attr.ino, attr.size);
                self.note("read", res);
                // Changes of inodes and directories that are not in memory.
                let res = self
                    .fs
                    .setxattr(attr.ino, b"user.x", Some(b"y"), XattrMode::Any);
                self.note("setxattr", res);
                if attr.size % 2 == 0 {
                    let res = self.fs.unlink(dir, &name, &ME);
                    self.note("unlink", res);
                } else {
                    self.resize(attr.ino, attr.size / 2);
                }
            } else if depth < 2 {
                self.create(attr.ino, "/new", FILE);
                self.read_tree(attr.ino, depth + 1);
            }
            self.fs.forget(attr.ino, 1);
        }
        Some(())
    }

    pub fn run(&mut self) {
        self.read_tree(ROOT, 0);
        self.files();
        self.names();
        self.space();
        self.attributes();
        self.big_directory();
        // Deletion at the last close, and reading what is not in memory.
        if let Some(ino) = self.create(ROOT, "/gone", FILE) {
            self.write(ino, 0, &pattern(9, 30_000), DIRECT);
            let res = self.fs.unlink(ROOT, b"gone", &ME);
            if self.note("unlink", res).is_some() {
                self.fs.forget(ino, 1);
                self.sync(&[("/gone", State::Absent)]);
            }
        }
    }

    fn files(&mut self) -> Option<()> {
        self.file(ROOT, "/subect", 1, 20_000, DIRECT);
        let ino = self.file(ROOT, "/cached", 2, 30_000, Origin::PageCache)?;
        // In place, without metadata: an error must come up in fsync.
        self.promised.remove("/cached");
        let bytes = pattern(3, 30_000);
        self.write(ino, 0, &bytes, Origin::PageCache)?;
        self.fsync(ino, "/cached", &bytes)
    }

    fn names(&mut self) -> Option<()> {
        let dir = self.create(ROOT, "/sub", DIR)?;
        self.file(dir, "/sub/inner", 4, 7000, DIRECT);
        let ino = self.create(ROOT, "/before", FILE)?;
        let bytes = pattern(5, 9000);
        self.write(ino, 0, &bytes, DIRECT)?;
        let none = RenameFlags::empty();
        let res = self.fs.rename(ROOT, b"before", dir, b"after", none, &ME);
        self.note("rename", res)?;
        if self.fsync(ino, "/sub/after", &bytes).is_some() {
            self.promised.insert("/before".to_owned(), State::Absent);
        }
        let over = self.file(ROOT, "/over", 6, 3000, DIRECT)?;
        self.promised.remove("/over");
        self.promised.remove("/sub/after");
        let res = self.fs.rename(dir, b"after", ROOT, b"over", none, &ME);
        self.note("rename over", res)?;
        self.fs.forget(over, 1);
        self.fsync(ino, "/over", &bytes);
        self.promised.remove("/over");
        let res = self.fs.link(ino, dir, b"link");
        self.note("link", res)?;
        let res = self.fs.unlink(ROOT, b"over", &ME);
        self.note("unlink", res)?;
        let target = vec![b't'; 200];
        self.create(dir, "/sub/symlink", NewNode::Symlink { target: &target })?;
        self.create(ROOT, "/empty", DIR)?;
        let res = self.fs.rmdir(ROOT, b"empty", &ME);
        self.note("rmdir", res)?;
        self.sync(&[
            ("/sub/link", State::File(bytes)),
            ("/over", State::Absent),
            ("/empty", State::Absent),
            ("/sub/symlink", State::Other),
        ])
    }

    fn space(&mut self) -> Option<()> {
        let ino = self.file(ROOT, "/short", 7, 60_000, DIRECT)?;
        self.promised.remove("/short");
        self.resize(ino, 5000)?;
        self.resize(ino, 8000)?;
        let mut bytes = pattern(7, 5000);
        bytes.resize(8000, 0);
        self.fsync(ino, "/short", &bytes);
        let ino = self.file(ROOT, "/holes", 8, 50_000, DIRECT)?;
        self.promised.remove("/holes");
        let inode = self.note("iget", self.fs.clone().iget(ino))?;
        let punch = FallocMode::PUNCH_HOLE | FallocMode::KEEP_SIZE;
        let res = self.fs.fallocate(&inode, punch, 3000, 20_000, &ME);
        self.note("punch", res)?;
        let mut bytes = pattern(8, 50_000);
        bytes[3000..23_000].fill(0);
        if self.fs.geo.has_extents() {
            let none = FallocMode::empty();
            let res = self.fs.fallocate(&inode, none, 50_000, 30_000, &ME);
            self.note("fallocate", res)?;
            bytes.resize(80_000, 0);
            self.write(ino, 60_000, &[1; 3000], DIRECT)?;
            bytes[60_000..63_000].fill(1);
        }
        self.fsync(ino, "/holes", &bytes)
    }

    fn attributes(&mut self) -> Option<()> {
        let ino = self.file(ROOT, "/attributes", 9, 100, DIRECT)?;
        for len in [20, 600] {
            let value = pattern(10, len);
            self.attribute = None;
            let res = self
                .fs
                .setxattr(ino, b"user.name", Some(&value), XattrMode::Any);
            self.note("setxattr", res)?;
            let res = fsync(&self.fs, ino, false);
            self.note("fsync", res)?;
            self.attribute = Some(value);
        }
        Some(())
    }

    fn big_directory(&mut self) -> Option<()> {
        let dir = self.create(ROOT, "/big", DIR)?;
        let long = "n".repeat(60);
        let mut made = Vec::new();
        for index in 0..70 {
            let path = format!("/big/{index}-{long}");
            if self.create(dir, &path, FILE).is_some() {
                made.push(path);
            }
        }
        let states: Vec<_> = made
            .iter()
            .map(|path| (path.as_str(), State::File(Vec::new())))
            .collect();
        self.sync(&states)
    }
}

fn look_up(fs: &Arc<Fs>, path: &str) -> FsResult<Option<u32>> {
    let mut ino = ROOT;
    for name in path.split('/').skip(1) {
        match fs.lookup(ino, name.as_bytes())? {
            Some(attr) => ino = attr.ino,
            None => return Ok(None),
        }
    }
    Ok(Some(ino))
}

/// Whether a healed device has what was promised.
pub fn check_promises(image: Image, script: &Book) -> Result<Image, String> {
    let disk = MemDisk::from_image("healed", image);
    let dev: DynDevice = disk.clone();
    let fs = Fs::mount(dev, MountOptions::default()).map_err(|error| format!("mount: {error}"))?;
    for (path, state) in &script.promised {
        PROGRESS.fetch_add(1, Ordering::SeqCst);
        let ino = look_up(&fs, path).map_err(|error| format!("{path}: {error}"))?;
        let found = match ino {
            None => State::Absent,
            Some(_) if *state == State::Other => State::Other,
            Some(ino) => {
                let size = fs
                    .getattr(ino)
                    .map_err(|error| format!("{path}: {error}"))?
                    .size;
                State::File(read_all(&fs, ino, size).map_err(|error| format!("{path}: {error}"))?)
            }
        };
        if found != *state {
            let what = |state: &State| match state {
                State::File(bytes) => format!("{} bytes {:02x?}", bytes.len(), bytes.get(..8)),
                other => format!("{other:?}"),
            };
            return Err(format!(
                "{path}: promised {}, found {}",
                what(state),
                what(&found)
            ));
        }
    }
    if let Some(value) = &script.attribute {
        let ino = look_up(&fs, "/attributes")
            .unwrap()
            .ok_or("/attributes is gone")?;
        let found = fs
            .getxattr(ino, b"user.name")
            .map_err(|error| format!("xattr: {error}"))?;
        if found != *value {
            return Err(format!(
                "attribute of {} bytes, promised {}",
                found.len(),
                value.len()
            ));
        }
    }
    fs.unmount().map_err(|error| format!("unmount: {error}"))?;
    drop(fs);
    Ok(disk.image())
}

#[derive(Default)]
pub struct Book {
    pub promised: BTreeMap<String, State>,
    pub attribute: Option<Vec<u8>>,
}
