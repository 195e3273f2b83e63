//! Operations, drawn from a seed, that the kernel makes fast commits of.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, FileType, Mode, fallocate, fsync, makedev, mknodat};

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

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

pub struct Work<'a> {
    root: &'a Path,
    random: Random,
    dirs: Vec<PathBuf>,
    files: Vec<PathBuf>,
    /// Names of what is neither.
    others: Vec<PathBuf>,
    next: u32,
    /// Open files without a name.
    open: Vec<File>,
}

impl<'a> Work<'a> {
    pub fn new(root: &'a Path, seed: u64) -> Self {
        Self {
            root,
            random: Random(seed),
            dirs: vec![root.to_owned()],
            files: Vec::new(),
            others: Vec::new(),
            next: 0,
            open: Vec::new(),
        }
    }

    fn name(&mut self) -> PathBuf {
        let dir = self.random.below(self.dirs.len() as u64) as usize;
        self.next += 1;
        let long = "n".repeat(self.random.below(40) as usize);
        self.dirs[dir].join(format!("{}{long}", self.next))
    }

    fn file(&mut self) -> Option<PathBuf> {
        let at = self.random.below(self.files.len() as u64) as usize;
        self.files.get(at).cloned()
    }

    fn bytes(&mut self, most: u64) -> Vec<u8> {
        let (len, tag) = (self.random.below(most) + 1, self.random.next() as u8);
        (0..len).map(|at| (at / 7) as u8 ^ tag).collect()
    }

    /// What a full commit has, before the fast ones: files of all kinds, one in many pieces, a
    /// directory with an index, attributes.
    pub fn prepare(&mut self) {
        for name in ["a", "b", "b/c", "many"] {
            let dir = self.root.join(name);
            std::fs::create_dir(&dir).unwrap();
            self.dirs.push(dir);
        }
        for _ in 0..25 {
            let (name, bytes) = (self.name(), self.bytes(60_000));
            std::fs::write(&name, bytes).unwrap();
            self.files.push(name);
        }
        for number in 0..300 {
            let name = self
                .root
                .join(format!("many/a-name-of-some-length-{number}"));
            File::create(&name).unwrap();
            if number % 10 == 0 {
                self.files.push(name);
            }
        }
        let pieces = self.root.join("pieces");
        let file = File::create(&pieces).unwrap();
        for at in 0..60 {
            file.write_all_at(&[at as u8; 1000], at * 20_000).unwrap();
        }
        self.files.push(pieces);
        let linked = self.name();
        std::fs::hard_link(&self.files[0], &linked).unwrap();
        self.files.push(linked);
        for name in self.files.iter().take(5).chain(&self.dirs[1..3]) {
            let value = "v".repeat(self.random.below(300) as usize);
            let (name, value) = (name.as_path(), value.as_bytes());
            let flags = rustix::fs::XattrFlags::empty();
            rustix::fs::setxattr(name, "user.tag", value, flags).unwrap();
        }
        std::fs::File::open(self.root).unwrap();
    }

    /// Works, with an fsync now and then, and one of each file at the end: the tree is then what
    /// was promised. (An fsync of a directory would be a full commit.)
    pub fn run(&mut self, steps: u32) {
        for _ in 0..steps {
            self.step();
            if self.random.one_in(3)
                && let Some(name) = self.file()
            {
                fsync(File::open(name).unwrap()).unwrap();
            }
        }
        self.sync_all();
    }

    pub fn sync_all(&mut self) {
        for name in &self.files {
            fsync(File::open(name).unwrap()).unwrap();
        }
        // What was changed beside files is committed with the next one that was.
        let (name, bytes) = (self.name(), self.bytes(5000));
        std::fs::write(&name, bytes).unwrap();
        fsync(File::open(name).unwrap()).unwrap();
    }

    fn step(&mut self) {
        match self.random.below(20) {
            0..3 => {
                let (name, bytes) = (self.name(), self.bytes(30_000));
                std::fs::write(&name, bytes).unwrap();
                self.files.push(name);
            }
            3..9 => self.change_file(),
            9 => self.rename(),
            10 => {
                let name = self.name();
                if let Some(file) = self.file() {
                    std::fs::hard_link(file, &name).unwrap();
                    self.files.push(name);
                }
            }
            11..13 => self.unlink(),
            13..15 => {
                let name = self.name();
                std::fs::create_dir(&name).unwrap();
                self.dirs.push(name);
            }
            15 => self.rmdir(),
            16 => self.attributes(),
            17 => self.special(),
            18 => {
                for _ in 0..self.random.below(40) {
                    let name = self.name();
                    File::create(&name).unwrap();
                    self.files.push(name);
                }
            }
            _ => self.in_index(),
        }
    }

    fn change_file(&mut self) {
        let Some(name) = self.file() else { return };
        let mut file = File::options().read(true).write(true).open(&name).unwrap();
        let size = file.metadata().unwrap().len();
        let at = self.random.below(size + 20_000);
        let len = self.random.below(50_000) + 1;
        match self.random.below(9) {
            0..3 => {
                let bytes = self.bytes(20_000);
                file.write_all_at(&bytes, at).unwrap();
            }
            3 => {
                let bytes = self.bytes(20_000);
                file.seek(SeekFrom::End(0)).unwrap();
                file.write_all(&bytes).unwrap();
            }
            4 => file.set_len(at).unwrap(),
            5 => file.set_len(self.random.below(size + 1)).unwrap(),
            6 => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(file.as_fd(), flags, at, len).unwrap();
            }
            7 => {
                let keep = self.random.one_in(2);
                let flags = if keep {
                    FallocateFlags::KEEP_SIZE
                } else {
                    FallocateFlags::empty()
                };
                fallocate(file.as_fd(), flags, at, len).unwrap();
            }
            _ => {
                let mut bytes = Vec::new();
                file.read_to_end(&mut bytes).unwrap();
                bytes.reverse();
                file.write_all_at(&bytes, 0).unwrap();
            }
        }
        if self.random.one_in(3) {
            fsync(file).unwrap();
        }
    }

    fn rename(&mut self) {
        let (Some(from), over) = (self.file(), self.random.one_in(2)) else {
            return;
        };
        let to = match self.file().filter(|_| over) {
            Some(to) => to,
            None => self.name(),
        };
        if same_file(&from, &to) {
            return;
        }
        std::fs::rename(&from, &to).unwrap();
        self.files.retain(|name| *name != from && *name != to);
        self.files.push(to);
    }

    fn unlink(&mut self) {
        let Some(name) = self.file() else { return };
        if self.random.one_in(4) {
            self.open.push(File::open(&name).unwrap());
        }
        std::fs::remove_file(&name).unwrap();
        self.files.retain(|other| *other != name);
    }

    fn rmdir(&mut self) {
        let at = self.random.below(self.dirs.len() as u64) as usize;
        // "many" and what has entries stay.
        if at > 0 && std::fs::remove_dir(&self.dirs[at]).is_ok() {
            self.dirs.remove(at);
        }
    }

    fn attributes(&mut self) {
        let Some(name) = self.file() else { return };
        let mode = 0o400 | self.random.below(0o1000) as u32;
        std::fs::set_permissions(&name, std::fs::Permissions::from_mode(mode)).unwrap();
        chown(&name, Some(self.random.below(70_000) as u32), Some(5)).unwrap();
    }

    fn special(&mut self) {
        let name = self.name();
        match self.random.below(10) {
            // For this the kernel makes a full commit.
            0 => symlink("a-short-target", &name).unwrap(),
            1..5 => {
                let mode = Mode::from_raw_mode(0o640);
                let (kind, device) = (FileType::CharacterDevice, makedev(3, 77_777));
                mknodat(rustix::fs::CWD, &name, kind, mode, device).unwrap();
            }
            5..8 => mknodat(rustix::fs::CWD, &name, FileType::Fifo, Mode::RUSR, 0).unwrap(),
            _ => {
                let Some(name) = self.others.pop() else {
                    return;
                };
                std::fs::remove_file(name).unwrap();
                return;
            }
        }
        self.others.push(name);
    }

    /// In the directory with an index.
    fn in_index(&mut self) {
        for _ in 0..self.random.below(20) {
            let number = self.random.below(300);
            let name = self
                .root
                .join(format!("many/a-name-of-some-length-{number}"));
            if std::fs::remove_file(&name).is_ok() {
                self.files.retain(|other| *other != name);
            } else {
                std::fs::write(&name, "back").unwrap();
                self.files.push(name);
            }
        }
    }
}

fn same_file(a: &Path, b: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let number = |path: &Path| std::fs::metadata(path).ok().map(|meta| meta.ino());
    number(a) == number(b)
}
