//! Operations, as POSIX and the kernel's VFS mean them. They know no FUSE type.
//!
//! Permission bits are the caller's business (the kernel checks them, as the mount asks it to).
//!
//! # Locking
//!
//! create, link, unlink: parent (w) -> child (w) -> transaction
//! rename: rename -> parents, ancestor first, else ascending -> children, ascending -> transaction

pub mod attr;
pub mod ioctl;
pub mod namei;
pub mod rename;
pub mod shutdown;
pub mod space;

use std::sync::atomic::Ordering;

use crate::core::Fs;
use crate::error::{FsError, FsResult};
use crate::format::inode::{InodeData, InodeFlags, Timespec};
use crate::inode::Inode;

pub use attr::{SetAttr, SetTime};
pub use namei::NewNode;
pub use rename::RenameFlags;
pub use shutdown::Shutdown;

/// The longest name, in bytes.
pub const NAME_MAX: usize = 255;
/// Hard links an inode can have; directories may have more with `dir_nlink`.
pub const LINK_MAX: u16 = 65000;

/// How often an operation looks for space that comes back: others may take it meanwhile.
pub(crate) const RECLAIMS: u32 = 3;

/// Who asks.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Caller {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// The thread, 0 where that is not known.
    pub thread: u32,
    /// Times of a file's changes are kept by whoever sends the requests (the kernel, whose page
    /// cache knows of writes first) and come by `setattr`.
    pub keeps_times: bool,
}

/// What `stat` tells.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(missing_docs, reason = "the fields of struct stat")]
pub struct Attr {
    pub ino: u32,
    pub generation: u32,
    pub mode: u16,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    /// As the kernel encodes it in 32 bits.
    pub rdev: u32,
    pub size: u64,
    /// Sectors of 512 bytes.
    pub blocks: u64,
    pub atime: Timespec,
    pub mtime: Timespec,
    pub ctime: Timespec,
    pub crtime: Timespec,
    /// What [`Inode::unlinker`] says: not 0 where the kernel may still change its own count of links.
    pub unlinker: u32,
}

/// Space, as `statfs` tells it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct StatFs {
    /// Blocks of the file system without its own metadata.
    pub blocks: u64,
    /// Free blocks.
    pub bfree: u64,
    /// Free blocks for those who are not root.
    pub bavail: u64,
    /// Inodes.
    pub files: u64,
    /// Free inodes.
    pub ffree: u64,
    /// Bytes in a block.
    pub bsize: u32,
}

/// The device number of a special file, in the kernel's 32-bit encoding.
fn rdev(data: &InodeData) -> u32 {
    let word = |at: usize| {
        u32::from_le_bytes([
            data.block[at],
            data.block[at + 1],
            data.block[at + 2],
            data.block[at + 3],
        ])
    };
    // The old encoding is the new one for numbers up to 255.
    if word(0) != 0 {
        word(0) & 0xffff
    } else {
        word(4)
    }
}

fn set_rdev(data: &mut InodeData, rdev: u32) {
    let fits_old = rdev <= 0xffff;
    data.block = [0; 60];
    let at = if fits_old { 0 } else { 4 };
    data.block[at..at + 4].copy_from_slice(&rdev.to_le_bytes());
}

impl Fs {
    /// Does an operation once more where it found no space but some comes back.
    pub(crate) fn with_space<T>(&self, mut operation: impl FnMut() -> FsResult<T>) -> FsResult<T> {
        for _ in 0..RECLAIMS {
            match operation() {
                Err(FsError::NoSpace) if self.reclaim()? => {}
                result => return result,
            }
        }
        operation()
    }

    /// Brings back the space of what was removed: inodes that are still to be deleted, and what
    /// comes back with the next commit. `false` where there are none. Waits for commits; the
    /// caller must hold no lock.
    pub(crate) fn reclaim(&self) -> FsResult<bool> {
        if self.reclaim_given_up()? {
            return Ok(true);
        }
        if self.orphans.wait_for_farewell() {
            self.reclaim_given_up()?;
            return Ok(true);
        }
        Ok(false)
    }

    fn reclaim_given_up(&self) -> FsResult<bool> {
        let doomed = self.evictions.as_ref().filter(|queue| queue.pending() > 0);
        if let Some(evictions) = doomed {
            evictions.flush();
        }
        if self.alloc.has_pending() {
            self.journal.commit_all()?;
            return Ok(true);
        }
        Ok(doomed.is_some())
    }

    /// What `stat` tells of an inode whose lock is held.
    #[must_use]
    pub fn attr_of(&self, inode: &Inode, data: &InodeData) -> Attr {
        let special = matches!(data.file_type(), libc::S_IFCHR | libc::S_IFBLK);
        Attr {
            ino: inode.ino,
            generation: data.generation,
            mode: data.mode,
            nlink: data.links.into(),
            uid: data.uid,
            gid: data.gid,
            rdev: if special { rdev(data) } else { 0 },
            size: self.visible_size(inode, data),
            blocks: data.sectors,
            atime: data.atime,
            mtime: data.mtime,
            ctime: data.ctime,
            crtime: data.crtime,
            unlinker: inode.unlinker.load(Ordering::Acquire),
        }
    }

    /// The thread that removed a name of `ino` goes on, so the kernel has counted that name less.
    pub fn settle(&self, ino: u32, thread: u32) {
        if let Some(inode) = self.inodes.get(ino) {
            // Where another has removed a name since, it is still that one's.
            inode
                .unlinker
                .compare_exchange(thread, 0, Ordering::AcqRel, Ordering::Acquire)
                .ok();
        }
    }

    /// Free and used space.
    #[must_use]
    pub fn statfs(&self) -> StatFs {
        let counts = self.alloc.counts();
        StatFs {
            blocks: self.geo.blocks_count.saturating_sub(self.overhead),
            bfree: counts.free_blocks,
            bavail: counts.free_blocks.saturating_sub(counts.reserved_blocks),
            files: self.geo.inodes_count.into(),
            ffree: counts.free_inodes.into(),
            bsize: self.geo.block_size,
        }
    }
}

/// Flags a new inode takes over from its directory.
fn inherited_flags(parent: InodeFlags, is_dir: bool, is_file: bool) -> InodeFlags {
    let mut flags = InodeFlags::SECRM
        | InodeFlags::UNRM
        | InodeFlags::COMPR
        | InodeFlags::SYNC
        | InodeFlags::NODUMP
        | InodeFlags::NOATIME
        | InodeFlags::JOURNAL_DATA
        | InodeFlags::NOTAIL
        | InodeFlags::DIRSYNC
        | InodeFlags::PROJINHERIT
        | InodeFlags::DAX;
    if !is_dir {
        flags.remove(InodeFlags::DIRSYNC | InodeFlags::PROJINHERIT);
    }
    if !is_dir && !is_file {
        flags = InodeFlags::NODUMP | InodeFlags::NOATIME;
    }
    parent & flags
}
