//! What ioctls ask for: flags, version, project.

use std::sync::Arc;

use crate::core::Fs;
use crate::error::{FsError, FsResult};
use crate::format::features::RoCompat;
use crate::format::inode::{InodeData, InodeFlags};

/// Flags that `lsattr` shows.
const VISIBLE: InodeFlags = InodeFlags::from_bits_retain(0x705b_dfff);
/// Flags that `chattr` may change.
const CHANGEABLE: InodeFlags = InodeFlags::SECRM
    .union(InodeFlags::UNRM)
    .union(InodeFlags::COMPR)
    .union(InodeFlags::SYNC)
    .union(InodeFlags::IMMUTABLE)
    .union(InodeFlags::APPEND)
    .union(InodeFlags::NODUMP)
    .union(InodeFlags::NOATIME)
    .union(InodeFlags::NOTAIL)
    .union(InodeFlags::DIRSYNC)
    .union(InodeFlags::TOPDIR)
    .union(InodeFlags::PROJINHERIT);

/// Pairs of `FS_XFLAG_*` and inode flags.
const XFLAGS: [(u32, InodeFlags); 7] = [
    (0x8, InodeFlags::IMMUTABLE),
    (0x10, InodeFlags::APPEND),
    (0x20, InodeFlags::SYNC),
    (0x40, InodeFlags::NOATIME),
    (0x80, InodeFlags::NODUMP),
    (0x200, InodeFlags::PROJINHERIT),
    (0x8000, InodeFlags::DAX),
];

/// `struct fsxattr`, as far as ext4 uses it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct FsXattr {
    /// `FS_XFLAG_*`.
    pub xflags: u32,
    /// Project.
    pub projid: u32,
}

impl Fs {
    /// `FS_IOC_GETFLAGS`.
    ///
    /// # Errors
    /// As [`Fs::iget`].
    pub fn flags(&self, ino: u32) -> FsResult<u32> {
        let inode = self.iget(ino)?;
        let flags = inode.data.read().flags & VISIBLE;
        Ok(flags.bits())
    }

    /// `FS_IOC_SETFLAGS`.
    ///
    /// # Errors
    /// [`FsError::NotSupported`] for flags that cannot be changed.
    pub fn set_flags(self: &Arc<Self>, ino: u32, flags: u32) -> FsResult {
        let wanted = InodeFlags::from_bits_retain(flags);
        self.change(ino, |data, is_dir, is_file| {
            let mut changeable = CHANGEABLE;
            if !is_dir {
                changeable
                    .remove(InodeFlags::DIRSYNC | InodeFlags::TOPDIR | InodeFlags::PROJINHERIT);
            }
            if !is_dir && !is_file {
                changeable = InodeFlags::NODUMP | InodeFlags::NOATIME;
            }
            let changed = (data.flags & VISIBLE) ^ wanted;
            if !changeable.contains(changed) {
                return Err(FsError::NotSupported);
            }
            data.flags = (data.flags - changeable) | (wanted & changeable);
            Ok(())
        })
    }

    /// `FS_IOC_GETVERSION`.
    ///
    /// # Errors
    /// As [`Fs::iget`].
    pub fn generation(&self, ino: u32) -> FsResult<u32> {
        let inode = self.iget(ino)?;
        let generation = inode.data.read().generation;
        Ok(generation)
    }

    /// `FS_IOC_SETVERSION`.
    ///
    /// # Errors
    /// [`FsError::NotTty`] where checksums depend on it.
    pub fn set_generation(self: &Arc<Self>, ino: u32, generation: u32) -> FsResult {
        if self.geo.metadata_csum() {
            return Err(FsError::NotTty);
        }
        self.change(ino, |data, _, _| {
            data.generation = generation;
            Ok(())
        })
    }

    /// `FS_IOC_FSGETXATTR`.
    ///
    /// # Errors
    /// As [`Fs::iget`].
    pub fn fsxattr(&self, ino: u32) -> FsResult<FsXattr> {
        let inode = self.iget(ino)?;
        let data = inode.data.read();
        let set = XFLAGS.iter().filter(|(_, flag)| data.flags.contains(*flag));
        Ok(FsXattr {
            xflags: set.map(|(bit, _)| bit).sum(),
            projid: data.projid,
        })
    }

    /// `FS_IOC_FSSETXATTR`.
    ///
    /// # Errors
    /// [`FsError::NotSupported`] for flags or a project that cannot be set.
    pub fn set_fsxattr(self: &Arc<Self>, ino: u32, set: FsXattr) -> FsResult {
        let known: u32 = XFLAGS.iter().map(|(bit, _)| bit).sum();
        // FS_XFLAG_HASATTR is told, never set.
        if set.xflags & !(known | 0x8000_0000) != 0 {
            return Err(FsError::NotSupported);
        }
        let has_project = self.geo.ro_compat.contains(RoCompat::PROJECT);
        if set.projid != 0 && !has_project {
            return Err(FsError::NotSupported);
        }
        let mask: InodeFlags = XFLAGS.iter().map(|(_, flag)| *flag).collect();
        let chosen = XFLAGS.iter().filter(|(bit, _)| set.xflags & bit != 0);
        let wanted: InodeFlags = chosen.map(|(_, flag)| *flag).collect();
        self.change(ino, |data, is_dir, _| {
            if !CHANGEABLE.contains((data.flags & mask) ^ wanted) {
                return Err(FsError::NotSupported);
            }
            if wanted.contains(InodeFlags::PROJINHERIT) && !is_dir {
                return Err(FsError::Invalid);
            }
            data.flags = (data.flags - mask) | wanted;
            if has_project && data.extra_isize >= 32 {
                data.projid = set.projid;
            }
            Ok(())
        })
    }

    /// `FITRIM`, in bytes: discards what is free within `start..start + len`, in runs of `min_len`
    /// and more. Returns how many bytes that were.
    ///
    /// # Errors
    /// [`FsError::NotSupported`] where the device cannot discard, [`FsError::Invalid`] for a range
    /// outside of the file system or under a block, or runs longer than there can be.
    pub fn trim(&self, start: u64, len: u64, min_len: u64) -> FsResult<u64> {
        self.check_writable()?;
        let limits = self.dev.limits();
        if limits.max_discard_sectors == 0 {
            return Err(FsError::NotSupported);
        }
        let bits = self.geo.block_bits;
        let longest = u64::from(self.geo.blocks_per_group);
        let (first, blocks) = (start >> bits, len >> bits);
        if min_len >> bits > longest || first >= self.geo.blocks_count || blocks == 0 {
            return Err(FsError::Invalid);
        }
        let min_len = min_len.max(limits.discard_granularity.into()) >> bits;
        if min_len > longest {
            return Ok(0);
        }
        Ok(self.alloc.trim(first, blocks, min_len)? << bits)
    }

    fn change(
        self: &Arc<Self>,
        ino: u32,
        apply: impl FnOnce(&mut InodeData, bool, bool) -> FsResult,
    ) -> FsResult {
        self.check_writable()?;
        let inode = self.iget(ino)?;
        let mut data = inode.data.write();
        let before = data.clone();
        apply(&mut data, inode.is_dir(), inode.is_file())?;
        data.ctime = self.now();
        data.count_change();
        let handle = self.journal.start(4)?;
        let written = self.write_inode(&handle, &inode, &data);
        if written.is_err() {
            *data = before;
        }
        let tid = handle.tid();
        handle.finish(written)?;
        drop(data);
        self.sync_change(tid)
    }
}
