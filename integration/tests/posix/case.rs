//! A case, the thread it runs in, and what it notes.

use std::fmt::{Debug, Display};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sched::{CloneFlags, unshare};
use rustix::fs::Mode;
use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

/// What a system call answers.
pub type Res<T = ()> = rustix::io::Result<T>;

/// What a case cannot do without.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Needs {
    /// Any user, any file system to compare with.
    Nothing,
    /// Acting as several users.
    Root,
    /// Something other file systems do otherwise.
    Ext4,
}

/// The steps in which the format keeps times.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Grain {
    /// Inodes with room for more than the old fields.
    Nanosecond,
    /// Inodes of 128 bytes.
    Second,
}

/// Something to do in a directory.
pub struct Case {
    /// Unique; the directory is called so.
    pub name: &'static str,
    /// Who can run it.
    pub needs: Needs,
    /// Does it, in the current directory, which is empty, with a umask of 0.
    pub run: fn(&mut Out),
}

/// Someone who acts.
#[derive(Clone, Copy, Debug)]
pub struct User {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Another group, 0 for none.
    pub also: u32,
}

/// The owner of most things.
pub const OWNER: User = User::new(2001, 3001, 0);
/// One whose group is the owner's.
pub const FELLOW: User = User::new(2002, 3001, 0);
/// One who has the owner's group as another one.
pub const MEMBER: User = User::new(2003, 3003, 3001);
/// Somebody else.
pub const OTHER: User = User::new(2004, 3004, 0);
/// Everybody but root, with what to call them.
pub const USERS: [(&str, User); 4] = [
    ("owner", OWNER),
    ("fellow", FELLOW),
    ("member", MEMBER),
    ("other", OTHER),
];

impl User {
    const fn new(uid: u32, gid: u32, also: u32) -> Self {
        Self { uid, gid, also }
    }

    /// Does something as this user, in the same current directory.
    pub fn does<T: Send>(self, action: impl FnOnce() -> T + Send) -> T {
        let act = || {
            let gid = Gid::from_raw(self.gid);
            let uid = Uid::from_raw(self.uid);
            let also = [Gid::from_raw(self.also)];
            set_thread_groups(if self.also == 0 { &[] } else { &also }).unwrap();
            set_thread_res_gid(gid, gid, gid).unwrap();
            set_thread_res_uid(uid, uid, uid).unwrap();
            action()
        };
        std::thread::scope(|scope| scope.spawn(act).join().unwrap())
    }
}

/// What came out so far.
pub struct Out {
    notes: Vec<(String, String)>,
    grain: Grain,
}

impl Out {
    /// Notes a value.
    pub fn note(&mut self, label: impl Display, value: impl Debug) {
        self.notes.push((label.to_string(), format!("{value:?}")));
    }

    /// Notes a text.
    pub fn text(&mut self, label: impl Display, value: impl Display) {
        self.notes.push((label.to_string(), value.to_string()));
    }

    /// Notes whether a call did it, or why not.
    pub fn call<T>(&mut self, label: impl Display, result: Res<T>) -> Option<T> {
        self.text(label, word(&result));
        result.ok()
    }

    /// Notes what a call answered, or why not.
    pub fn value<T: Debug>(&mut self, label: impl Display, result: Res<T>) {
        match result {
            Ok(value) => self.note(label, value),
            Err(_) => self.text(label, word(&result)),
        }
    }

    /// The steps of time.
    pub fn grain(&self) -> Grain {
        self.grain
    }
}

/// `ok`, or the error's name.
pub fn word<T>(result: &Res<T>) -> String {
    match result {
        Ok(_) => "ok".into(),
        Err(errno) => format!("{:?}", nix::errno::Errno::from_raw(errno.raw_os_error())),
    }
}

/// Programs are run and written, which must not meet a fork of somebody else.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Case {
    /// Runs it in a new directory under `parent`.
    pub fn run_in(&self, parent: &Path, grain: Grain) -> Vec<(String, String)> {
        let dir = parent.join(self.name);
        std::fs::create_dir(&dir).unwrap();
        let act = || {
            unshare(CloneFlags::CLONE_FS).unwrap();
            rustix::process::chdir(&dir).unwrap();
            rustix::process::umask(Mode::empty());
            rustix::fs::chmod(".", Mode::from_raw_mode(0o777)).unwrap();
            let notes = Vec::new();
            let mut out = Out { notes, grain };
            let run = AssertUnwindSafe(|| (self.run)(&mut out));
            // What it saw before is what tells why.
            if catch_unwind(run).is_err() {
                out.text("the case", format!("ended early in {parent:?}"));
            }
            out.notes
        };
        std::thread::scope(|scope| scope.spawn(act).join().unwrap())
    }
}

/// A note that is not the same.
pub struct Difference {
    /// Where it was noted.
    pub case: String,
    /// What was noted.
    pub label: String,
    /// Both values.
    pub text: String,
}

/// One for each note that is not the same.
pub fn differences(
    case: &str,
    ours: &[(String, String)],
    kernels: &[(String, String)],
) -> Vec<Difference> {
    let difference = |label: String, text| Difference {
        case: case.to_owned(),
        label,
        text,
    };
    let mut lines: Vec<_> = ours
        .iter()
        .zip(kernels)
        .filter(|(one, other)| one != other)
        .map(|((label, one), (other_label, other))| {
            let label = if label == other_label {
                label.clone()
            } else {
                format!("{label} (the kernel's: {other_label})")
            };
            difference(label, format!("ours {one}, the kernel's {other}"))
        })
        .collect();
    if ours.len() != kernels.len() {
        let (one, other) = (ours.len(), kernels.len());
        let text = format!("ours {one}, the kernel's {other}");
        lines.push(difference("number of notes".into(), text));
    }
    lines
}

/// Everything `lstat` tells of everything under `dir`, but numbers of inodes and what listing
/// itself changes.
pub fn listing(dir: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(at) = todo.pop() {
        for entry in std::fs::read_dir(&at).unwrap() {
            let path = match entry {
                Ok(entry) => entry.path(),
                Err(error) => {
                    found.push((at.display().to_string(), error.to_string()));
                    break;
                }
            };
            let meta = path.symlink_metadata().unwrap();
            let kind = meta.file_type();
            let mut text = format!(
                "{:o} {}:{} links {} size {} mtime {}.{:09} ctime {}.{:09}",
                meta.mode(),
                meta.uid(),
                meta.gid(),
                meta.nlink(),
                meta.size(),
                meta.mtime(),
                meta.mtime_nsec(),
                meta.ctime(),
                meta.ctime_nsec()
            );
            if kind.is_char_device() || kind.is_block_device() {
                text += &format!(" rdev {:x}", meta.rdev());
            }
            if kind.is_file() {
                text += &format!(" atime {}.{:09}", meta.atime(), meta.atime_nsec());
                text += &format!(" blocks {}", meta.blocks());
            }
            if kind.is_symlink() {
                text += &format!(" to {:?}", std::fs::read_link(&path).unwrap());
            }
            let name = path.strip_prefix(dir).unwrap();
            found.push((name.to_string_lossy().into_owned(), text));
            if kind.is_dir() {
                todo.push(path);
            }
        }
    }
    found.sort();
    found
}

/// The times that can be set of each file in `dir`.
pub fn set_times(dir: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let meta = entry.metadata().unwrap();
        let name = entry.file_name().to_string_lossy().into_owned();
        let text = format!(
            "atime {}.{:09} mtime {}.{:09}",
            meta.atime(),
            meta.atime_nsec(),
            meta.mtime(),
            meta.mtime_nsec()
        );
        found.push((name, text));
    }
    found.sort();
    found
}
