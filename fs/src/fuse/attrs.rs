//! Attributes and times, ours and `fuser`'s.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo, TimeOrNow};

use crate::dir;
use crate::format::inode::Timespec;
use crate::inode::ROOT_INO;
use crate::ops::{Attr, SetTime};

/// The inode a node id stands for: the protocol's root is 1, ours 2; no other file has either.
pub(super) fn ino(node: INodeNo) -> u32 {
    if node == INodeNo::ROOT {
        ROOT_INO
    } else {
        u32::try_from(node.0).unwrap_or(0)
    }
}

/// The node id of an inode.
pub(super) fn node(ino: u32) -> INodeNo {
    if ino == ROOT_INO {
        INodeNo::ROOT
    } else {
        INodeNo(ino.into())
    }
}

/// A time as `fuser` wants it. It sends one before 1970 as the whole seconds and the nanoseconds of
/// its distance from 1970, both counted backwards, while the protocol counts nanoseconds forwards
/// from the second: -5 s + 3 ns must be given as 5 s and 3 ns before 1970.
pub(super) fn system_time(time: Timespec) -> SystemTime {
    let distance = Duration::new(time.sec.unsigned_abs(), time.nsec);
    let moved = if time.sec >= 0 {
        UNIX_EPOCH.checked_add(distance)
    } else {
        UNIX_EPOCH.checked_sub(distance)
    };
    moved.unwrap_or(UNIX_EPOCH)
}

/// A time as `fuser` gives it: see [`system_time`].
pub(super) fn timespec(time: SystemTime) -> Timespec {
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => Timespec {
            sec: since.as_secs() as i64,
            nsec: since.subsec_nanos(),
        },
        Err(before) => Timespec {
            sec: -(before.duration().as_secs() as i64),
            nsec: before.duration().subsec_nanos(),
        },
    }
}

pub(super) fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(time) => SetTime::At(timespec(time)),
    }
}

pub(super) fn kind_of_mode(mode: u16) -> FileType {
    match u32::from(mode) & libc::S_IFMT {
        libc::S_IFDIR => FileType::Directory,
        libc::S_IFLNK => FileType::Symlink,
        libc::S_IFCHR => FileType::CharDevice,
        libc::S_IFBLK => FileType::BlockDevice,
        libc::S_IFIFO => FileType::NamedPipe,
        libc::S_IFSOCK => FileType::Socket,
        _ => FileType::RegularFile,
    }
}

/// `None` where the entry does not say.
pub(super) fn kind_of_entry(kind: dir::FileType) -> Option<FileType> {
    Some(match kind {
        dir::FileType::Unknown => return None,
        dir::FileType::Regular => FileType::RegularFile,
        dir::FileType::Directory => FileType::Directory,
        dir::FileType::CharDevice => FileType::CharDevice,
        dir::FileType::BlockDevice => FileType::BlockDevice,
        dir::FileType::Fifo => FileType::NamedPipe,
        dir::FileType::Socket => FileType::Socket,
        dir::FileType::Symlink => FileType::Symlink,
    })
}

pub(super) fn file_attr(attr: &Attr, block_size: u32) -> FileAttr {
    FileAttr {
        ino: node(attr.ino),
        size: attr.size,
        blocks: attr.blocks,
        atime: system_time(attr.atime),
        mtime: system_time(attr.mtime),
        ctime: system_time(attr.ctime),
        crtime: system_time(attr.crtime),
        kind: kind_of_mode(attr.mode),
        perm: attr.mode & 0o7777,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize: block_size,
        flags: 0,
    }
}

/// What the kernel takes as "there is no such name, and you may remember that".
pub(super) fn negative() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::{system_time, timespec};
    use crate::format::inode::Timespec;

    #[test]
    fn times_before_1970_come_back() {
        for time in [
            Timespec {
                sec: -1,
                nsec: 999_999_999,
            },
            Timespec { sec: -5, nsec: 0 },
            Timespec { sec: 7, nsec: 1 },
        ] {
            assert_eq!(timespec(system_time(time)), time);
        }
    }
}
