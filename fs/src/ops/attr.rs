//! Attributes: stat, chmod, chown, utimens, truncate, extended attributes.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Attr, Caller};
use crate::core::Fs;
use crate::error::{FsError, FsResult};
use crate::format::inode::{InodeData, InodeFlags, Timespec};
use crate::inode::Inode;
use crate::journal::Handle;
use crate::options::Atime;
use crate::xattr::{self, XattrMode, acl};

/// A time to set.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SetTime {
    /// The time now.
    Now,
    /// This one.
    At(Timespec),
}

/// What `setattr` changes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct SetAttr {
    /// Permission bits; type bits are not looked at.
    pub mode: Option<u16>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size in bytes.
    pub size: Option<u64>,
    /// Last access.
    pub atime: Option<SetTime>,
    /// Last change of the content.
    pub mtime: Option<SetTime>,
    /// Last change of the inode, where the kernel keeps it.
    pub ctime: Option<Timespec>,
}

impl SetAttr {
    /// Whether it is the kernel that brings times home which it has kept.
    fn brings_only_times(&self) -> bool {
        let times = Self {
            atime: self.atime,
            mtime: self.mtime,
            ctime: self.ctime,
            ..Self::default()
        };
        self.ctime.is_some() && *self == times
    }

    /// Whether there is more than what an append brings: the kernel tells the times of one so.
    fn changes_more_than_content(&self) -> bool {
        let sets_atime = matches!(self.atime, Some(SetTime::At(_)));
        self.mode.is_some() || self.uid.is_some() || self.gid.is_some() || sets_atime
    }
}

/// What a write or a change of owner does to the set-user-id and set-group-id bits.
pub(crate) fn drop_privileges(data: &mut InodeData) {
    if data.is_dir() {
        return;
    }
    let setuid = libc::S_ISUID as u16;
    let setgid = libc::S_ISGID as u16;
    data.mode &= !setuid;
    if data.mode & libc::S_IXGRP as u16 != 0 {
        data.mode &= !setgid;
    }
}

/// Credits for writing an inode and what an attribute may need.
const ATTR_CREDITS: u32 = 4;

impl Fs {
    /// What `stat` tells.
    ///
    /// # Errors
    /// As [`Fs::iget`].
    pub fn getattr(&self, ino: u32) -> FsResult<Attr> {
        let inode = self.iget(ino)?;
        let data = inode.data.read();
        Ok(self.attr_of(&inode, &data))
    }

    /// Changes attributes.
    ///
    /// # Errors
    /// [`FsError::NotPermitted`] for immutable inodes, [`FsError::FileTooBig`], [`FsError::NoSpace`],
    /// those of the buffers and the journal.
    pub fn setattr(self: &Arc<Self>, ino: u32, set: &SetAttr, caller: &Caller) -> FsResult<Attr> {
        self.check_writable()?;
        let inode = self.iget(ino)?;
        if let Some(size) = set.size {
            self.truncate(&inode, size, caller)?;
        }
        let mut data = inode.data.write();
        if data.flags.contains(InodeFlags::IMMUTABLE) {
            return Err(FsError::NotPermitted);
        }
        if data.flags.contains(InodeFlags::APPEND) && set.changes_more_than_content() {
            return Err(FsError::NotPermitted);
        }
        let only_size = SetAttr {
            size: set.size,
            ..SetAttr::default()
        };
        if *set == only_size {
            return Ok(self.attr_of(&inode, &data));
        }
        if set.brings_only_times() && self.may_wait(&inode) {
            self.apply_times(&mut data, set);
            return Ok(self.attr_of(&inode, &data));
        }
        let handle = self.journal.start(ATTR_CREDITS + xattr::credits())?;
        let before = data.clone();
        let result = self
            .apply(&handle, &inode, &mut data, set)
            .and_then(|()| self.write_inode(&handle, &inode, &data));
        if let Err(error) = result {
            *data = before;
            return handle.finish(Err(error));
        }
        let tid = handle.tid();
        handle.stop()?;
        let attr = self.attr_of(&inode, &data);
        drop(data);
        self.sync_change(tid)?;
        Ok(attr)
    }

    fn apply(
        &self,
        handle: &Handle,
        inode: &Inode,
        data: &mut InodeData,
        set: &SetAttr,
    ) -> FsResult {
        if set.uid.is_some() || set.gid.is_some() {
            data.uid = set.uid.unwrap_or(data.uid);
            data.gid = set.gid.unwrap_or(data.gid);
            if set.mode.is_none() {
                drop_privileges(data);
            }
            if inode.is_file() {
                let name = b"security.capability";
                match xattr::set(self, handle, inode, data, name, None, XattrMode::Any) {
                    Ok(()) | Err(FsError::NoData) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        if let Some(mode) = set.mode {
            data.mode = (data.mode & 0xf000) | (mode & 0o7777);
            acl::chmod(self, handle, inode, data)?;
        }
        self.apply_times(data, set);
        Ok(())
    }

    fn apply_times(&self, data: &mut InodeData, set: &SetAttr) {
        let now = self.now();
        let time = |set: Option<SetTime>, old: Timespec| match set {
            None => old,
            Some(SetTime::Now) => now,
            Some(SetTime::At(time)) => self.storable(time),
        };
        data.atime = time(set.atime, data.atime);
        data.mtime = time(set.mtime, data.mtime);
        data.ctime = set.ctime.map_or(now, |time| self.storable(time));
        data.count_change();
    }

    /// On a mount with `lazytime`, whether new times of an inode need not be written yet.
    fn may_wait(&self, inode: &Inode) -> bool {
        // As the kernel's `dirtytime_expire_seconds`.
        const LONGEST: i64 = 12 * 60 * 60;
        if !self.opts.lazytime {
            return false;
        }
        let now = self.now().sec;
        let since = inode
            .lazy_since
            .compare_exchange(0, now, Ordering::AcqRel, Ordering::Acquire);
        since.map_or_else(|since| now - since < LONGEST, |_new| true)
    }

    /// Writes times that [`Self::may_wait`] let wait. The caller holds no lock.
    pub(crate) fn write_times(&self, inode: &Inode) -> FsResult {
        if inode.lazy_since.load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        let data = inode.data.write();
        let handle = self.journal.start(2)?;
        let written = self.write_inode(&handle, inode, &data);
        handle.finish(written)
    }

    /// Clears the set-group-id bit where the caller is not `in_group`, as a new ACL does.
    ///
    /// # Errors
    /// As [`Self::setattr`].
    pub fn drop_foreign_setgid(
        &self,
        ino: u32,
        in_group: impl FnOnce(u32) -> bool,
    ) -> FsResult<bool> {
        let setgid = libc::S_ISGID as u16;
        self.drop_bits(ino, |data| match data.mode & setgid {
            0 => 0,
            _ if in_group(data.gid) => 0,
            bit => bit,
        })
    }

    /// Clears the bits that a change of a file's content by somebody without privileges clears, as
    /// the kernel's `file_remove_privs`. Returns whether there were any.
    ///
    /// # Errors
    /// As [`Self::setattr`].
    pub fn remove_privileges(
        &self,
        ino: u32,
        in_group: impl FnOnce(u32) -> bool,
    ) -> FsResult<bool> {
        let setgid = libc::S_ISGID as u16;
        self.drop_bits(ino, |data| {
            let mut after = data.clone();
            drop_privileges(&mut after);
            if after.mode & setgid != 0 && !in_group(data.gid) {
                after.mode &= !setgid;
            }
            data.mode & !after.mode
        })
    }

    fn drop_bits(&self, ino: u32, which: impl FnOnce(&InodeData) -> u16) -> FsResult<bool> {
        let special = (libc::S_ISUID | libc::S_ISGID) as u16;
        let inode = self.iget(ino)?;
        if inode.data.read().mode & special == 0 {
            return Ok(false);
        }
        let mut data = inode.data.write();
        let bits = which(&data);
        if bits == 0 {
            return Ok(false);
        }
        let handle = self.journal.start(2)?;
        data.mode &= !bits;
        let written = self.write_inode(&handle, &inode, &data);
        handle.finish(written).map(|()| true)
    }

    /// On a mount with `sync`, waits until `tid` is durable.
    pub(crate) fn sync_change(&self, tid: u32) -> FsResult {
        if self.opts.sync {
            self.journal.commit_wait(tid)
        } else {
            Ok(())
        }
    }

    /// Whether a read updates the time of access.
    pub(crate) fn wants_atime(&self, data: &InodeData) -> bool {
        const DAY: i64 = 24 * 60 * 60;
        if self.is_read_only() || data.flags.contains(InodeFlags::NOATIME) {
            return false;
        }
        let now = self.now();
        match self.opts.atime {
            Atime::Never => false,
            Atime::Strict => now.sec > data.atime.sec,
            Atime::Relative => {
                data.atime <= data.mtime
                    || data.atime <= data.ctime
                    || now.sec - data.atime.sec >= DAY
            }
        }
    }

    /// Sets the time of access. A failure harms nobody who reads; the journal has told of it.
    pub(crate) fn touch_atime(&self, inode: &Inode) {
        let mut data = inode.data.write();
        if self.may_wait(inode) {
            data.atime = self.now();
            return;
        }
        let touched = self.journal.start(2).and_then(|handle| {
            data.atime = self.now();
            let written = self.write_inode(&handle, inode, &data);
            handle.stop().and(written)
        });
        if let Err(error) = touched {
            log::debug!("inode {}: time of access: {error}", inode.ino);
        }
    }

    /// Gives the target of a symbolic link.
    ///
    /// # Errors
    /// [`FsError::Invalid`] for anything else; damage.
    pub fn readlink(&self, ino: u32) -> FsResult<Vec<u8>> {
        let inode = self.iget(ino)?;
        let data = inode.data.read();
        let target = self.target(&inode, &data)?;
        let touch = self.wants_atime(&data);
        drop(data);
        if touch {
            self.touch_atime(&inode);
        }
        Ok(target)
    }

    fn target(&self, inode: &Inode, data: &InodeData) -> FsResult<Vec<u8>> {
        if !data.is_symlink() {
            return Err(FsError::Invalid);
        }
        if data.size == 0 && data.links == 0 {
            // Deleted meanwhile: no damage.
            return Err(FsError::Stale);
        }
        let len = data.size as usize;
        if data.size == 0 || data.size > u64::from(self.geo.block_size) {
            return Err(self.corrupt("symbolic link: i_size", 0, inode.ino));
        }
        if self.is_fast_symlink(data) {
            let target = data.block.get(..len);
            return match target {
                Some(target) => Ok(target.to_vec()),
                None => Err(self.corrupt("symbolic link: i_size", 0, inode.ino)),
            };
        }
        let mapping = crate::inode::map::lookup(self, inode, data, 0, 1)?;
        if mapping.kind != crate::inode::map::MapKind::Mapped {
            return Err(self.corrupt("symbolic link: a hole", 0, inode.ino));
        }
        let buffer = self.bufs.read(mapping.pblk, bufio::no_check())?;
        let target = buffer.data()[..len].to_vec();
        Ok(target)
    }

    /// Whether a link's target stands in the inode: it has no blocks but that of its attributes.
    pub(crate) fn is_fast_symlink(&self, data: &InodeData) -> bool {
        let acl_sectors = if data.file_acl != 0 {
            self.geo.block_sectors()
        } else {
            0
        };
        data.is_symlink() && data.sectors <= acl_sectors
    }

    fn check_xattr_name(&self, name: &[u8]) -> FsResult {
        if name.starts_with(b"user.") && !self.opts.user_xattr {
            return Err(FsError::NotSupported);
        }
        if name.starts_with(b"system.posix_acl_") && !self.opts.acl {
            return Err(FsError::NotSupported);
        }
        Ok(())
    }

    /// Gives an extended attribute.
    ///
    /// # Errors
    /// [`FsError::NoData`], [`FsError::NotSupported`], damage.
    pub fn getxattr(&self, ino: u32, name: &[u8]) -> FsResult<Vec<u8>> {
        self.check_xattr_name(name)?;
        let inode = self.iget(ino)?;
        let data = inode.data.read();
        xattr::get(self, &inode, &data, name)
    }

    /// Gives the names of all extended attributes, each with a NUL after it.
    ///
    /// # Errors
    /// Damage.
    pub fn listxattr(&self, ino: u32) -> FsResult<Vec<u8>> {
        let inode = self.iget(ino)?;
        let data = inode.data.read();
        xattr::list(self, &inode, &data)
    }

    /// Sets or removes (`None`) an extended attribute.
    ///
    /// # Errors
    /// [`FsError::NoData`], [`FsError::Exists`], [`FsError::NoSpace`], and others.
    pub fn setxattr(
        &self,
        ino: u32,
        name: &[u8],
        value: Option<&[u8]>,
        mode: XattrMode,
    ) -> FsResult {
        self.with_space(|| self.try_setxattr(ino, name, value, mode))
    }

    fn try_setxattr(
        &self,
        ino: u32,
        name: &[u8],
        value: Option<&[u8]>,
        mode: XattrMode,
    ) -> FsResult {
        self.check_writable()?;
        self.check_xattr_name(name)?;
        let inode = self.iget(ino)?;
        let mut data = inode.data.write();
        if data
            .flags
            .intersects(InodeFlags::IMMUTABLE | InodeFlags::APPEND)
        {
            return Err(FsError::NotPermitted);
        }
        let handle = self.journal.start(ATTR_CREDITS + xattr::credits())?;
        let before = data.clone();
        let result = xattr::set(self, &handle, &inode, &mut data, name, value, mode);
        if let Err(error) = result {
            *data = before;
            return handle.finish(Err(error));
        }
        data.ctime = self.now();
        data.count_change();
        let written = self.write_inode(&handle, &inode, &data);
        let tid = handle.tid();
        inode.datasync_tid.store(tid, Ordering::Release);
        handle.finish(written)?;
        drop(data);
        self.sync_change(tid)
    }
}
