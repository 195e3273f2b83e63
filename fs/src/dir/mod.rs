//! Directories: names to inodes, in linear and in indexed directories.
//!
//! | module  | what it does                                                |
//! | ------- | ----------------------------------------------------------- |
//! | `names` | find, add, remove, with or without an index                 |
//! | `tree`  | the index: walking it and growing it                        |
//! | `list`  | listing from a cookie on                                    |
//! | `store` | what these need from below                                  |
//! | `disk`  | that, from buffers, mapping, journal and allocator          |
//!
//! A directory gets an index when it outgrows its first block, if the file system has the
//! feature `dir_index`. It never shrinks. Times, link counts and the write of the inode itself
//! are the caller's: after [`add`], [`init`] and [`set_entry`] the fields in `data` may have
//! changed (size, mapping, flags, sectors).
//!
//! # Locking
//!
//! The caller holds the directory's inode lock: for reading in [`lookup`], [`read`] and
//! [`is_empty`], else for writing. Below it come the allocator's locks, and the content of one
//! buffer at a time; receivers of a listing are called with no content locked.

mod disk;
mod list;
mod names;
mod store;
mod tree;

#[cfg(test)]
mod tests;

use crate::core::Fs;
use crate::dir::disk::Disk;
use crate::error::{FsError, FsResult};
use crate::format::dirent::MAX_NAME_LEN;
use crate::format::features::Compat;
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

impl FileType {
    /// Decodes the byte of an entry; what the format does not know is [`FileType::Unknown`].
    #[must_use]
    pub fn from_raw(raw: u8) -> Self {
        match raw {
            1 => Self::Regular,
            2 => Self::Directory,
            3 => Self::CharDevice,
            4 => Self::BlockDevice,
            5 => Self::Fifo,
            6 => Self::Socket,
            7 => Self::Symlink,
            _ => Self::Unknown,
        }
    }
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
    /// The entry was not taken, or no further one is wanted.
    Full,
}

/// Finds a name. The caller holds the directory's lock for reading.
///
/// # Errors
/// [`FsError::NameTooLong`]; damage and I/O errors on the way to the name.
pub fn lookup(fs: &Fs, dir: &Inode, data: &InodeData, name: &[u8]) -> FsResult<Option<DirEntry>> {
    check_len(name)?;
    let place = names::find(&Disk::reader(fs, dir, data), name)?;
    Ok(place.map(|place| DirEntry {
        ino: place.found.ino,
        ftype: FileType::from_raw(place.found.ftype),
    }))
}

/// Adds a name, which must not be there yet.
///
/// # Errors
/// [`FsError::NameTooLong`], [`FsError::NoSpace`]; damage and I/O errors on the way.
pub fn add(
    fs: &Fs,
    handle: &Handle,
    dir: &Inode,
    data: &mut InodeData,
    name: &[u8],
    ino: u32,
    ftype: FileType,
) -> FsResult {
    check_len(name)?;
    names::add(
        &mut Disk::writer(fs, handle, dir, data),
        (name, ino, ftype as u8),
    )
}

/// Removes a name; gives the inode it stood for.
///
/// # Errors
/// [`FsError::NotFound`]; damage and I/O errors on the way.
pub fn remove(
    fs: &Fs,
    handle: &Handle,
    dir: &Inode,
    data: &mut InodeData,
    name: &[u8],
) -> FsResult<u32> {
    check_len(name)?;
    let removed = names::remove(&mut Disk::writer(fs, handle, dir, data), name)?;
    removed.ok_or(FsError::NotFound)
}

/// Lets a name that is there stand for another inode.
///
/// # Errors
/// [`FsError::NotFound`]; damage and I/O errors on the way.
pub fn set_entry(
    fs: &Fs,
    handle: &Handle,
    dir: &Inode,
    data: &mut InodeData,
    name: &[u8],
    ino: u32,
    ftype: FileType,
) -> FsResult {
    check_len(name)?;
    let mut store = Disk::writer(fs, handle, dir, data);
    if names::set(&mut store, (name, ino, ftype as u8))? {
        Ok(())
    } else {
        Err(FsError::NotFound)
    }
}

/// Makes the first block of a new directory.
///
/// # Errors
/// [`FsError::NoSpace`]; I/O errors on the way.
pub fn init(fs: &Fs, handle: &Handle, dir: &Inode, data: &mut InodeData, parent: u32) -> FsResult {
    names::init(&mut Disk::writer(fs, handle, dir, data), dir.ino, parent)
}

/// Whether only "." and ".." are there.
///
/// # Errors
/// Damage and I/O errors.
pub fn is_empty(fs: &Fs, dir: &Inode, data: &InodeData) -> FsResult<bool> {
    names::is_empty(&Disk::reader(fs, dir, data))
}

/// Lists entries from `cookie` (0: the start) on, "." and ".." among them.
///
/// A cookie keeps its meaning while names come and go: a listing in pieces shows each name that
/// was there all the time exactly once.
///
/// # Errors
/// Damage and I/O errors; the entries before were emitted.
pub fn read(
    fs: &Fs,
    dir: &Inode,
    data: &InodeData,
    cookie: u64,
    emit: &mut dyn FnMut(&Entry<'_>) -> Emit,
) -> FsResult {
    list::list(&Disk::reader(fs, dir, data), cookie, emit)
}

/// Blocks that growing an index by one leaf changes at most: leaf, root, two levels of nodes, and
/// as many new ones.
const TREE_BLOCKS: u32 = 8;
/// New blocks among them.
const NEW_BLOCKS: u32 = 4;
/// Bitmap and group descriptor of a new block.
const BLOCKS_PER_NEW: u32 = 2;
/// What a few new blocks behind each other change in the directory's mapping: the way to them,
/// and new blocks of the mapping with bitmap and group descriptor.
const MAPPING_BLOCKS: u32 = 16;

/// Credits for adding a name, without the write of the directory's inode.
#[must_use]
pub fn add_credits(fs: &Fs) -> u32 {
    if fs.geo.compat.contains(Compat::DIR_INDEX) {
        TREE_BLOCKS + NEW_BLOCKS * BLOCKS_PER_NEW + MAPPING_BLOCKS
    } else {
        1 + BLOCKS_PER_NEW + MAPPING_BLOCKS
    }
}

fn check_len(name: &[u8]) -> FsResult {
    if name.len() > MAX_NAME_LEN {
        return Err(FsError::NameTooLong);
    }
    if name.is_empty() {
        return Err(FsError::Invalid);
    }
    Ok(())
}
