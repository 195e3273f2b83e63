//! What is done with an image, whatever stands in it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use blockstack::DynDevice;
use blockstack::backend::mem::{Image, MemDisk};
use fs::dir::Emit;
use fs::inode::map::Seek;
use fs::ops::space::FallocMode;
use fs::ops::{Attr, NewNode, RenameFlags, SetAttr};
use fs::options::OnError;
use fs::xattr::XattrMode;
use fs::{Fs, FsError, FsResult, MountOptions};

use crate::storm::{DIR, DIRECT, FILE, ME, ROOT, Random, fsync, read, write};

/// What came of an image.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Why it could not be mounted.
    pub refused: Option<String>,
    /// Operations that went well.
    pub done: u64,
    /// Operations that were refused, by reason.
    pub errors: BTreeMap<String, u64>,
    /// What it was at the end, where it was unmounted.
    pub after: Option<Image>,
}

impl Outcome {
    /// Whether some operation found damage.
    pub fn has_damage(&self) -> bool {
        self.errors.keys().any(|error| error.starts_with("damaged"))
    }
}

/// Inodes looked at, names taken from one directory, and steps through one file: an image can
/// promise more than there is time for.
const MOST_INODES: usize = 300;
const MOST_NAMES: usize = 3000;
const MOST_STEPS: usize = 40;

struct Visit {
    fs: Arc<Fs>,
    outcome: Outcome,
    seen: BTreeSet<u32>,
    dirs: Vec<u32>,
    files: Vec<u32>,
    /// Parent and name of what was found.
    names: Vec<(u32, Vec<u8>)>,
}

/// Mounts an image, looks at all there is, changes some of it, and unmounts.
pub fn exercise(name: &str, image: Image, seed: u64) -> Outcome {
    let mut random = Random(seed);
    let options = MountOptions {
        cache_bytes: 1 << 20,
        // What the superblock asks for can be to end the process.
        errors: Some(if random.one_in(4) {
            OnError::RemountRo
        } else {
            OnError::Continue
        }),
        read_only: random.one_in(12),
        sync: random.one_in(12),
        discard: random.one_in(4),
        ..MountOptions::default()
    };
    let disk = MemDisk::from_image(name, image);
    let dev: DynDevice = disk.clone();
    let mut outcome = Outcome::default();
    let mut is_left = false;
    // What we made of it must not do worse than what was given.
    for _ in 0..=u32::from(random.one_in(3)) {
        match Fs::mount(dev.clone(), options.clone()) {
            Ok(fs) => (outcome, is_left) = use_and_leave(fs, outcome, &mut random),
            Err(error) => {
                outcome.refused = Some(error.to_string());
                break;
            }
        }
    }
    outcome.after = is_left.then(|| disk.image());
    outcome
}

/// Gives whether it was unmounted, too.
fn use_and_leave(fs: Arc<Fs>, outcome: Outcome, random: &mut Random) -> (Outcome, bool) {
    let mut visit = Visit::new(fs, outcome);
    visit.look();
    let mut other = Visit::new(visit.fs.clone(), Outcome::default());
    // Then a seed that fails may have to be run more than once.
    let by_two = random.one_in(4);
    std::thread::scope(|scope| {
        if by_two {
            scope.spawn(|| other.look());
        }
        visit.change(random);
    });
    drop(other);
    // Else as a crash leaves it.
    let mut is_left = false;
    if !random.one_in(6) {
        let unmounted = visit.fs.unmount();
        is_left = visit.note(unmounted).is_some();
    }
    (visit.outcome, is_left)
}

impl Visit {
    fn new(fs: Arc<Fs>, outcome: Outcome) -> Self {
        Self {
            fs,
            outcome,
            seen: BTreeSet::new(),
            dirs: Vec::new(),
            files: Vec::new(),
            names: Vec::new(),
        }
    }

    fn note<T>(&mut self, res: FsResult<T>) -> Option<T> {
        match res {
            Ok(value) => {
                self.outcome.done += 1;
                Some(value)
            }
            Err(error) => {
                let reason = match error {
                    FsError::Corrupt { what, .. } => format!("damaged: {what}"),
                    other => other.to_string(),
                };
                *self.outcome.errors.entry(reason).or_default() += 1;
                None
            }
        }
    }

    fn look(&mut self) {
        let mut todo = vec![ROOT];
        while let Some(ino) = todo.pop() {
            if self.seen.len() >= MOST_INODES || !self.seen.insert(ino) {
                continue;
            }
            let Some(attr) = self.note(self.fs.getattr(ino)) else {
                continue;
            };
            self.attributes(ino);
            match u32::from(attr.mode) & libc::S_IFMT {
                libc::S_IFDIR => self.directory(ino, &mut todo),
                libc::S_IFLNK => drop(self.note(self.fs.readlink(ino))),
                libc::S_IFREG => self.file(&attr),
                _ => {}
            }
        }
        self.outcome.done += u64::from(self.fs.statfs().blocks > 0);
    }

    fn attributes(&mut self, ino: u32) {
        let Some(names) = self.note(self.fs.listxattr(ino)) else {
            return;
        };
        for name in names.split(|&byte| byte == 0).take(50) {
            self.note(self.fs.getxattr(ino, name));
        }
        for acl in ["access", "default"] {
            let name = format!("system.posix_acl_{acl}");
            self.note(self.fs.getxattr(ino, name.as_bytes()));
        }
        self.note(self.fs.fsxattr(ino));
    }

    fn directory(&mut self, ino: u32, todo: &mut Vec<u32>) {
        self.dirs.push(ino);
        let (mut cookie, mut names) = (0, Vec::new());
        // In parts, as the kernel asks for it.
        while names.len() < MOST_NAMES {
            let (before, mut room) = (names.len(), 100);
            let res = self.fs.readdir(ino, cookie, &mut |entry| {
                if room == 0 {
                    return Emit::Full;
                }
                room -= 1;
                cookie = entry.next_cookie;
                names.push(entry.name.to_vec());
                Emit::More
            });
            if self.note(res).is_none() || names.len() == before {
                break;
            }
        }
        let (mut cookie, mut taken) = (0, 0);
        while taken < MOST_NAMES {
            let (before, mut room) = (taken, 30);
            let mut inos = Vec::new();
            let res = self.fs.readdirplus(ino, cookie, &mut |entry, attr| {
                if room == 0 {
                    return Emit::Full;
                }
                room -= 1;
                cookie = entry.next_cookie;
                taken += 1;
                inos.extend(attr.map(|attr| attr.ino));
                Emit::More
            });
            for ino in inos {
                self.fs.forget(ino, 1);
            }
            if self.note(res).is_none() || taken == before {
                break;
            }
        }
        for name in names.iter().take(MOST_INODES) {
            if let Some(Some(attr)) = self.note(self.fs.lookup(ino, name)) {
                todo.push(attr.ino);
            }
            self.names.push((ino, name.clone()));
        }
        self.note(self.fs.lookup(ino, b"not-there"));
        // Places that no listing gave.
        for cookie in [1, cookie.wrapping_add(1), cookie ^ (1 << 40), u64::MAX] {
            self.note(self.fs.readdir(ino, cookie, &mut |_| Emit::Full));
        }
    }

    fn file(&mut self, attr: &Attr) {
        let ino = attr.ino;
        self.files.push(ino);
        let Some(inode) = self.note(self.fs.iget(ino)) else {
            return;
        };
        let mut at = 0;
        for step in 0..MOST_STEPS {
            let what = if step % 2 == 0 {
                Seek::Data
            } else {
                Seek::Hole
            };
            match self.note(self.fs.seek(&inode, at, what)) {
                Some(next) => at = next,
                None => break,
            }
        }
        drop(inode);
        let len = 1 << 17;
        let last = attr.size.saturating_sub(10_000);
        let mut offsets: Vec<u64> = (0..6).map(|step| step * u64::from(len)).collect();
        offsets.extend([at, last, attr.size / 2, u64::MAX - 5000]);
        for offset in offsets {
            if offset < attr.size.saturating_add(1) {
                self.note(read(&self.fs, ino, offset, len));
            }
        }
    }

    fn change(&mut self, random: &mut Random) {
        self.make(random);
        let dirs = self.dirs.clone();
        for _ in 0..30 {
            let file = random.pick(&self.files).unwrap_or(ROOT);
            self.change_file(file, random);
            let dir = random.pick(&dirs).unwrap_or(ROOT);
            self.change_names(dir, random);
        }
        // The root and the files it begins with in any case, in order.
        let names: Vec<_> = self.names.iter().take(40).cloned().collect();
        for (dir, name) in names {
            if !random.one_in(2) || matches!(name.as_slice(), b"." | b"..") {
                continue;
            }
            self.note(self.fs.unlink(dir, &name, &ME));
            self.note(self.fs.rmdir(dir, &name, &ME));
        }
        self.note(self.fs.sync());
        for &ino in &self.seen {
            self.fs.forget(ino, u64::MAX);
        }
        self.make(random);
    }

    /// Something new in the root: the allocators at work.
    fn make(&mut self, random: &mut Random) {
        let number = random.next();
        for (kind, node) in [("d", DIR), ("f", FILE)] {
            let name = format!("new-{kind}-{number}");
            let made = self.fs.create(ROOT, name.as_bytes(), node, 0, &ME);
            let Some(made) = self.note(made) else {
                continue;
            };
            if kind == "d" {
                self.dirs.push(made.ino);
                let inner = self.fs.create(made.ino, b"inner", FILE, 0, &ME);
                self.note(inner);
            } else {
                self.files.push(made.ino);
                self.note(write(&self.fs, made.ino, 0, &[3; 60_000], DIRECT));
                self.note(fsync(&self.fs, made.ino, false));
            }
        }
    }

    fn change_file(&mut self, ino: u32, random: &mut Random) {
        let Some(inode) = self.note(self.fs.iget(ino)) else {
            return;
        };
        let size = inode.data.read().size;
        let near = [0, 5000, size / 2, size.saturating_sub(3000), size, 1 << 20];
        let at = random.pick(&near).unwrap_or(0);
        let block = u64::from(self.fs.geo.block_size);
        let (start, len) = (at / block * block, block * (1 + random.below(40)));
        let mut fallocate = |mode, start, len| {
            let res = self.fs.fallocate(&inode, mode, start, len, &ME);
            self.note(res);
        };
        let keep = FallocMode::KEEP_SIZE;
        match random.below(13) {
            10 => {
                let to = random
                    .pick(&self.files)
                    .and_then(|to| self.fs.iget(to).ok());
                if let Some(to) = to {
                    let copied = self.fs.copy_range(&inode, at, &to, start, len, &ME);
                    self.note(copied);
                }
            }
            11 => {
                self.note(self.fs.alloc.trim(random.below(9000), 5000, 4));
                let made = self.fs.tmpfile(ROOT, 0o100_600, 0, &ME);
                if let Some(made) = self.note(made) {
                    self.fs.forget(made.ino, 1);
                }
            }
            12 => {
                let flags = self.fs.flags(ino);
                if let Some(flags) = self.note(flags) {
                    let flag = 1 << random.below(32);
                    self.note(self.fs.set_flags(ino, flags ^ flag));
                }
            }
            0 => fallocate(FallocMode::PUNCH_HOLE | keep, at, len),
            1 => fallocate(FallocMode::empty(), at, len),
            2 => fallocate(FallocMode::ZERO_RANGE, at, len),
            3 => fallocate(FallocMode::COLLAPSE_RANGE, start, len),
            4 => fallocate(FallocMode::INSERT_RANGE, start, len),
            5 => {
                let set = SetAttr {
                    size: Some(at),
                    ..SetAttr::default()
                };
                self.note(self.fs.setattr(ino, &set, &ME));
            }
            6 => {
                let set = SetAttr {
                    mode: Some(0o640),
                    uid: Some(70_000),
                    ..SetAttr::default()
                };
                self.note(self.fs.setattr(ino, &set, &ME));
            }
            7 => {
                let value = vec![1; random.below(900) as usize];
                let value = (!random.one_in(4)).then_some(value);
                let mode = XattrMode::Any;
                for name in ["user.small", "user.large", "user.new"] {
                    let res = self
                        .fs
                        .setxattr(ino, name.as_bytes(), value.as_deref(), mode);
                    self.note(res);
                }
            }
            _ => {
                self.note(write(&self.fs, ino, at, &[8; 20_000], DIRECT));
                self.note(self.fs.fsync(&inode, random.one_in(2)));
            }
        }
    }

    /// A name that was found, but none that no caller gives.
    fn any_name(&self, random: &mut Random) -> (u32, Vec<u8>) {
        let index = random.below(self.names.len() as u64) as usize;
        match self.names.get(index) {
            Some((parent, name)) if !matches!(name.as_slice(), b"." | b"..") => {
                (*parent, name.clone())
            }
            _ => (ROOT, b"none".to_vec()),
        }
    }

    fn change_names(&mut self, dir: u32, random: &mut Random) {
        let number = random.below(1000);
        let name = format!("{}{number}", "made".repeat(number as usize % 40)).into_bytes();
        let (parent, old) = self.any_name(random);
        let fs = self.fs.clone();
        match random.below(8) {
            0 => {
                let made = fs.create(dir, &name, DIR, 0, &ME);
                self.note(made);
            }
            1 => {
                self.note(fs.unlink(parent, &old, &ME));
            }
            2 => {
                self.note(fs.rmdir(parent, &old, &ME));
            }
            3 | 4 => {
                let flags = random.pick(&[RenameFlags::empty(), RenameFlags::NOREPLACE]);
                let flags = flags.unwrap_or(RenameFlags::empty());
                self.note(fs.rename(parent, &old, dir, &name, flags, &ME));
            }
            5 => {
                let (other, new) = self.any_name(random);
                let flags = RenameFlags::EXCHANGE;
                self.note(fs.rename(parent, &old, other, &new, flags, &ME));
            }
            6 => {
                let target = [b'z'; 200];
                let link = NewNode::Symlink { target: &target };
                self.note(fs.create(dir, &name, link, 0, &ME));
            }
            _ => {
                if let Some(ino) = random.pick(&self.files) {
                    self.note(fs.link(ino, dir, &name));
                }
                let made = fs.create(dir, &name, FILE, 0, &ME);
                self.note(made);
            }
        }
    }
}
