//! Directories.

use crate::core::Fs;
use crate::error::{FsError, FsResult};
use crate::format::inode::InodeData;
use crate::inode::Inode;
use crate::journal::Handle;

/// `d_type` of a directory entry on disk.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum FileType {
    /// Not known (no `filetype` feature).
    Unknown = 0,
    /// Regular file.
    Regular = 1,
    /// Directory.
    Directory = 2,
    /// Character device.
    CharDevice = 3,
    /// Block device.
    BlockDevice = 4,
    /// Named pipe.
    Fifo = 5,
    /// Socket.
    Socket = 6,
    /// Symbolic link.
    Symlink = 7,
}

/// What a name stands for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DirEntry {
    /// Inode.
    pub ino: u32,
    /// Its type, as the entry says.
    pub ftype: FileType,
}

/// An entry of a listing.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// Inode.
    pub ino: u32,
    /// Its type, as the entry says.
    pub ftype: FileType,
    /// Name, 1 to 255 bytes.
    pub name: &'a [u8],
    /// Where a listing goes on after this entry.
    pub next_cookie: u64,
}

/// Whether a listing goes on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Emit {
    /// The entry was taken; go on.
    More,
    /// The entry was not taken; stop.
    Full,
}

/// Finds a name. The caller holds the directory's lock for reading.
pub fn lookup(_: &Fs, _: &Inode, _: &InodeData, _name: &[u8]) -> FsResult<Option<DirEntry>> {
    Err(FsError::NotSupported)
}

/// Adds a name, which must not be there yet.
pub fn add(
    _: &Fs,
    _: &Handle,
    _: &Inode,
    _: &mut InodeData,
    _name: &[u8],
    _ino: u32,
    _: FileType,
) -> FsResult {
    Err(FsError::NotSupported)
}

/// Removes a name; gives the inode it stood for.
pub fn remove(_: &Fs, _: &Handle, _: &Inode, _: &mut InodeData, _name: &[u8]) -> FsResult<u32> {
    Err(FsError::NotSupported)
}

/// Lets a name that is there stand for another inode.
pub fn set_entry(
    _: &Fs,
    _: &Handle,
    _: &Inode,
    _: &mut InodeData,
    _name: &[u8],
    _ino: u32,
    _: FileType,
) -> FsResult {
    Err(FsError::NotSupported)
}

/// Makes the first block of a new directory.
pub fn init(_: &Fs, _: &Handle, _: &Inode, _: &mut InodeData, _parent: u32) -> FsResult {
    Err(FsError::NotSupported)
}

/// Whether only "." and ".." are there.
pub fn is_empty(_: &Fs, _: &Inode, _: &InodeData) -> FsResult<bool> {
    Err(FsError::NotSupported)
}

/// Lists entries from `cookie` (0: the start) on, "." and ".." among them.
pub fn read(
    _: &Fs,
    _: &Inode,
    _: &InodeData,
    _cookie: u64,
    _emit: &mut dyn FnMut(&Entry<'_>) -> Emit,
) -> FsResult {
    Err(FsError::NotSupported)
}

/// Credits for adding a name.
#[must_use]
pub fn add_credits(_: &Fs) -> u32 {
    24
}
