//! System calls, with the loops and conversions that every caller would need.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, Mode, RenameFlags, SeekFrom, Timespec, Timestamps,
    XattrFlags,
};

use super::effect::{Falloc, NewNode};

/// The alignment that `O_DIRECT` is used with.
pub const DIRECT_ALIGN: u64 = 4096;

/// The smallest block of the file systems of interest.
const SMALLEST_BLOCK: u64 = 1024;

/// Memory that starts on a [`DIRECT_ALIGN`] boundary.
pub struct AlignedBuf {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    /// Makes a zeroed buffer of `len` bytes.
    pub fn new(len: usize) -> Self {
        let align = DIRECT_ALIGN as usize;
        let memory = vec![0; len + align];
        let start = memory.as_ptr().align_offset(align).min(align);
        Self { memory, start, len }
    }

    /// Returns the aligned bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

/// Reads until `buf` is full or the file ends; returns the number of bytes.
pub fn read_at(file: &File, buf: &mut [u8], off: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], off + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Renames with `renameat2`.
pub fn rename(from: &Path, to: &Path, flags: RenameFlags) -> io::Result<()> {
    if flags.is_empty() {
        return std::fs::rename(from, to);
    }
    Ok(rustix::fs::renameat_with(CWD, from, CWD, to, flags)?)
}

/// Makes a FIFO, socket or device.
pub fn mknod(path: &Path, node: &NewNode, mode: u32) -> io::Result<()> {
    let (kind, dev) = match node {
        NewNode::Fifo => (FileType::Fifo, 0),
        NewNode::Socket => (FileType::Socket, 0),
        NewNode::Char(major, minor) => (
            FileType::CharacterDevice,
            rustix::fs::makedev(*major, *minor),
        ),
        NewNode::File | NewNode::Dir | NewNode::Symlink(_) => (FileType::RegularFile, 0),
    };
    Ok(rustix::fs::mknodat(
        CWD,
        path,
        kind,
        Mode::from_raw_mode(mode),
        dev,
    )?)
}

/// Sets access and modification time, of a link itself too.
pub fn utimes(path: &Path, sec: i64, nsec: u32) -> io::Result<()> {
    let time = Timespec {
        tv_sec: sec,
        tv_nsec: nsec.into(),
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    Ok(rustix::fs::utimensat(
        CWD,
        path,
        &times,
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

/// Returns the modification time.
pub fn mtime(meta: &std::fs::Metadata) -> (i64, u32) {
    (
        meta.mtime(),
        u32::try_from(meta.mtime_nsec()).unwrap_or(u32::MAX),
    )
}

/// Calls `fallocate`.
pub fn fallocate(file: &File, mode: Falloc, off: u64, len: u64) -> io::Result<()> {
    let keep = FallocateFlags::KEEP_SIZE;
    let flags = match mode {
        Falloc::Alloc => FallocateFlags::empty(),
        Falloc::AllocKeep => keep,
        Falloc::Punch => FallocateFlags::PUNCH_HOLE | keep,
        Falloc::Zero => FallocateFlags::ZERO_RANGE,
        Falloc::ZeroKeep => FallocateFlags::ZERO_RANGE | keep,
        Falloc::Collapse => FallocateFlags::COLLAPSE_RANGE,
        Falloc::Insert => FallocateFlags::INSERT_RANGE,
    };
    Ok(rustix::fs::fallocate(file, flags, off, len)?)
}

/// Copies until `len` bytes are done or the source ends; returns the count and the first error.
pub fn copy_range(
    from: &File,
    from_off: u64,
    to: &File,
    to_off: u64,
    len: u64,
) -> (u64, io::Result<()>) {
    let mut done = 0;
    while done < len {
        let (mut src, mut dst) = (from_off + done, to_off + done);
        let left = (len - done) as usize;
        match rustix::fs::copy_file_range(from, Some(&mut src), to, Some(&mut dst), left) {
            Ok(0) => break,
            Ok(count) => done += count as u64,
            Err(error) => return (done, Err(error.into())),
        }
    }
    (done, Ok(()))
}

/// Returns the ranges that `SEEK_DATA` and `SEEK_HOLE` report as data; the whole file where they
/// are not supported.
pub fn data_ranges(file: &File, size: u64) -> io::Result<Vec<(u64, u64)>> {
    // Linux 6.18, ext4: an unwritten block in a page with other blocks can be data to SEEK_DATA and
    // a hole to SEEK_HOLE, or at the end of the file give the size as the start of data. It reads
    // as zeros, so any answer will do.
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) if start >= size => break,
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break,
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => {
                return Ok(vec![(0, size)]);
            }
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
        if start < at || end < start {
            let text = format!("SEEK_DATA from {at} gave {start}, SEEK_HOLE from there {end}");
            return Err(io::Error::other(text));
        }
        if end > start {
            ranges.push((start, end.min(size)));
            at = end;
        } else {
            at = (start / SMALLEST_BLOCK + 1) * SMALLEST_BLOCK;
        }
    }
    Ok(ranges)
}

/// Sets an attribute of an object that is not a link.
pub fn set_xattr(path: &Path, name: &str, value: &[u8]) -> io::Result<()> {
    Ok(rustix::fs::lsetxattr(
        path,
        name,
        value,
        XattrFlags::empty(),
    )?)
}

/// Removes an attribute.
pub fn remove_xattr(path: &Path, name: &str) -> io::Result<()> {
    Ok(rustix::fs::lremovexattr(path, name)?)
}

/// Reads all user attributes and ACLs of an object.
pub fn xattrs(path: &Path) -> io::Result<BTreeMap<String, Vec<u8>>> {
    let mut list = vec![0_u8; 65536];
    let len = match rustix::fs::llistxattr(path, list.as_mut_slice()) {
        Ok(len) => len,
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        Err(error) => return Err(error.into()),
    };
    let mut found = BTreeMap::new();
    for name in list[..len]
        .split(|&b| b == 0)
        .filter(|name| !name.is_empty())
    {
        let text = String::from_utf8_lossy(name).into_owned();
        if text.starts_with("user.") || text.starts_with("system.posix_acl") {
            let mut value = vec![0_u8; 65536];
            let len = rustix::fs::lgetxattr(path, name, value.as_mut_slice())?;
            value.truncate(len);
            found.insert(text, value);
        }
    }
    Ok(found)
}

/// Flushes the file system that holds `dir`.
pub fn sync_fs(dir: &Path) -> io::Result<()> {
    Ok(rustix::fs::syncfs(File::open(dir)?)?)
}
