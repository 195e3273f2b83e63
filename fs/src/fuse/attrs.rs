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

pub(super) fn system_time(time: Timespec) -> SystemTime {
    let seconds = Duration::from_secs(time.sec.unsigned_abs());
    let whole = if time.sec >= 0 {
        UNIX_EPOCH.checked_add(seconds)
    } else {
        UNIX_EPOCH.checked_sub(seconds)
    };
    whole
        .and_then(|whole| whole.checked_add(Duration::from_nanos(time.nsec.into())))
        .unwrap_or(UNIX_EPOCH)
}

/// A time as `fuser` 0.18 gives it. It takes one before 1970 as whole seconds and nanoseconds both
/// counted backwards from 1970, while the kernel counts nanoseconds forwards from the second: the
/// kernel's -5 s + 3 ns arrives as 5 s and 3 ns before 1970. What it sends is right.
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
        // What stat(2) shows, as listings do. The kernel knows the root's node id by itself.
        ino: INodeNo(attr.ino.into()),
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
    use std::time::{Duration, UNIX_EPOCH};

    use super::{system_time, timespec};
    use crate::format::inode::Timespec;

    #[test]
    fn nanoseconds_before_1970_keep_their_direction() {
        let time = Timespec {
            sec: -5,
            nsec: 300_000_000,
        };
        let sent = UNIX_EPOCH - Duration::from_millis(4700);
        assert_eq!(system_time(time), sent);
        // As `fuser` decodes the kernel's -5 s, 300,000,000 ns.
        let received = UNIX_EPOCH - Duration::new(5, 300_000_000);
        assert_eq!(timespec(received), time);
    }
}
