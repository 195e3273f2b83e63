//! System calls on paths of text, relative to the current directory.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, Timespec, Timestamps, UTIME_OMIT, XattrFlags,
};
use rustix::process::{Gid, Uid};

use crate::case::{Res, User, word};

fn bits(mode: u32) -> Mode {
    Mode::from_raw_mode(mode)
}

/// chmod(2).
pub fn chmod(path: &str, mode: u32) -> Res {
    rustix::fs::chmod(path, bits(mode))
}

/// chown(2), or lchown(2) with `NOFOLLOW`.
pub fn chown(path: &str, uid: Option<u32>, gid: Option<u32>, flags: AtFlags) -> Res {
    let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
    rustix::fs::chownat(CWD, path, uid, gid, flags)
}

/// lchown(2) as a user and group, which must work.
#[track_caller]
pub fn give(path: &str, to: User) {
    chown(path, Some(to.uid), Some(to.gid), NOFOLLOW).unwrap();
}

/// The link itself.
pub const NOFOLLOW: AtFlags = AtFlags::SYMLINK_NOFOLLOW;

/// mkdir(2).
pub fn mkdir(path: &str, mode: u32) -> Res {
    rustix::fs::mkdir(path, bits(mode))
}

/// mknod(2).
pub fn mknod(path: &str, kind: FileType, mode: u32, dev: u64) -> Res {
    rustix::fs::mknodat(CWD, path, kind, bits(mode), dev)
}

/// mkfifo(3).
pub fn mkfifo(path: &str, mode: u32) -> Res {
    mknod(path, FileType::Fifo, mode, 0)
}

/// open(2).
pub fn open(path: &str, flags: OFlags, mode: u32) -> Res<OwnedFd> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC | OFlags::NONBLOCK, bits(mode))
}

/// open(2) as [`File`].
pub fn file(path: &str, flags: OFlags) -> File {
    open(path, flags, 0o644).unwrap().into()
}

/// Reading and writing, made if it is not there.
pub const MAKE: OFlags = OFlags::RDWR.union(OFlags::CREATE);

/// Makes a file with this content and mode.
#[track_caller]
pub fn make(path: &str, content: &[u8], mode: u32) {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC;
    let mut file = File::from(open(path, flags, mode).unwrap());
    file.write_all(content).unwrap();
}

/// symlink(2).
pub fn symlink(target: &str, path: &str) -> Res {
    rustix::fs::symlink(target, path)
}

/// link(2).
pub fn link(from: &str, to: &str) -> Res {
    rustix::fs::link(from, to)
}

/// unlink(2).
pub fn unlink(path: &str) -> Res {
    rustix::fs::unlink(path)
}

/// rmdir(2).
pub fn rmdir(path: &str) -> Res {
    rustix::fs::rmdir(path)
}

/// rename(2).
pub fn rename(from: &str, to: &str) -> Res {
    rustix::fs::rename(from, to)
}

/// renameat2(2).
pub fn rename_with(from: &str, to: &str, flags: RenameFlags) -> Res {
    rustix::fs::renameat_with(CWD, from, CWD, to, flags)
}

/// truncate(2).
pub fn truncate(path: &str, size: u64) -> Res {
    let path = std::ffi::CString::new(path).unwrap();
    nix::unistd::truncate(path.as_c_str(), size as i64)
        .map_err(|errno| rustix::io::Errno::from_raw_os_error(errno as i32))
}

/// setxattr(2).
pub fn setxattr(path: &str, name: &str, value: &[u8]) -> Res {
    rustix::fs::setxattr(path, name, value, XattrFlags::empty())
}

/// getxattr(2).
pub fn getxattr(path: &str, name: &str) -> Res<Vec<u8>> {
    let mut value = vec![0; 4096];
    let len = rustix::fs::getxattr(path, name, value.as_mut_slice())?;
    value.truncate(len);
    Ok(value)
}

/// A time to set.
pub fn time(sec: i64, nsec: i64) -> Timespec {
    Timespec {
        tv_sec: sec,
        tv_nsec: nsec,
    }
}

/// Leaves a time as it is.
pub fn omit() -> Timespec {
    time(0, UTIME_OMIT)
}

/// utimensat(2).
pub fn utimens(path: &str, access: Timespec, modification: Timespec, flags: AtFlags) -> Res {
    let times = Timestamps {
        last_access: access,
        last_modification: modification,
    };
    rustix::fs::utimensat(CWD, path, &times, flags)
}

/// Type, mode, owner, links and size of what `path` itself is, or why not.
pub fn describe(path: &str) -> String {
    let stat = match rustix::fs::lstat(path) {
        Ok(stat) => stat,
        Err(errno) => return word::<()>(&Err(errno)),
    };
    let kind = FileType::from_raw_mode(stat.st_mode);
    let mut text = format!(
        "{kind:?} {:o} {}:{} links {}",
        stat.st_mode & 0o7777,
        stat.st_uid,
        stat.st_gid,
        stat.st_nlink
    );
    match kind {
        FileType::CharacterDevice | FileType::BlockDevice => {
            text += &format!(" rdev {:x}", stat.st_rdev);
        }
        FileType::Directory => {}
        _ => text += &format!(" size {}", stat.st_size),
    }
    text
}

/// The names in a directory, sorted, each with its description.
pub fn tree(path: &str) -> Vec<String> {
    let mut found = Vec::new();
    let Ok(entries) = std::fs::read_dir(path) else {
        return found;
    };
    for entry in entries {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => {
                found.push(format!("{path}: {error}"));
                break;
            }
        };
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = format!("{path}/{name}");
        found.push(format!("{name:.20} {}", describe(&path)));
        if entry.file_type().unwrap().is_dir() {
            found.extend(tree(&path));
        }
    }
    found.sort();
    found
}
