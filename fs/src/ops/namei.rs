//! Names: lookup, create, link, unlink, listing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use smallvec::SmallVec;

use super::{Attr, Caller, LINK_MAX, NAME_MAX, inherited_flags, set_rdev};
use crate::alloc::InodeUse;
use crate::core::Fs;
use crate::dir::{self, Emit, Entry, FileType};
use crate::error::{FsError, FsResult};
use crate::format::features::RoCompat;
use crate::format::inode::{InodeData, InodeFlags};
use crate::inode::map::{self, Written};
use crate::inode::{Inode, ROOT_INO, UNKNOWN_THREAD};
use crate::journal::Handle;
use crate::orphan::ORPHAN_CREDITS;
use crate::xattr::{self, acl};

/// What a new name is to stand for.
#[derive(Clone, Copy, Debug)]
pub enum NewNode<'a> {
    /// Anything but a directory or a symbolic link: mode with type bits, device number.
    Node {
        /// Type and permissions.
        mode: u16,
        /// Device number in the kernel's 32-bit encoding; 0 for all but devices.
        rdev: u32,
    },
    /// A directory.
    Directory {
        /// Permissions.
        mode: u16,
    },
    /// A symbolic link.
    Symlink {
        /// Where to.
        target: &'a [u8],
    },
}

/// The entry type for a mode's type bits.
#[must_use]
pub fn entry_type(mode: u16) -> FileType {
    match u32::from(mode) & libc::S_IFMT {
        libc::S_IFREG => FileType::Regular,
        libc::S_IFDIR => FileType::Directory,
        libc::S_IFCHR => FileType::CharDevice,
        libc::S_IFBLK => FileType::BlockDevice,
        libc::S_IFIFO => FileType::Fifo,
        libc::S_IFSOCK => FileType::Socket,
        libc::S_IFLNK => FileType::Symlink,
        _ => FileType::Unknown,
    }
}

pub(crate) fn check_name(name: &[u8]) -> FsResult {
    match name {
        [] | b"." | b".." => Err(FsError::Invalid),
        _ if name.len() > NAME_MAX => Err(FsError::NameTooLong),
        _ if name.contains(&b'/') || name.contains(&0) => Err(FsError::Invalid),
        _ => Ok(()),
    }
}

pub(crate) fn check_dir_change(data: &InodeData) -> FsResult {
    if data.links == 0 {
        return Err(FsError::NotFound);
    }
    if data.flags.contains(InodeFlags::IMMUTABLE) {
        return Err(FsError::NotPermitted);
    }
    Ok(())
}

/// A removal also needs a directory that may lose names, and an inode that may lose one.
pub(crate) fn check_removal(dir: &InodeData, child: &InodeData) -> FsResult {
    let kept = InodeFlags::IMMUTABLE | InodeFlags::APPEND;
    if dir.flags.contains(InodeFlags::APPEND) || child.flags.intersects(kept) {
        return Err(FsError::NotPermitted);
    }
    Ok(())
}

impl Fs {
    /// Finds a name and counts a reference of the kernel; `None` where it is not there.
    ///
    /// # Errors
    /// [`FsError::NotDirectory`], [`FsError::NameTooLong`], damage.
    pub fn lookup(&self, parent: u32, name: &[u8]) -> FsResult<Option<Attr>> {
        if name.len() > NAME_MAX {
            return Err(FsError::NameTooLong);
        }
        let dir = self.directory(parent)?;
        let data = dir.data.read();
        let Some(entry) = dir::lookup(self, &dir, &data, name)? else {
            return Ok(None);
        };
        if entry.ino == dir.ino {
            dir.lookups.fetch_add(1, Ordering::AcqRel);
            return Ok(Some(self.attr_of(&dir, &data)));
        }
        let inode = self.iget_named(entry.ino)?;
        inode.lookups.fetch_add(1, Ordering::AcqRel);
        // In a damaged file system the child may be above: no waiting for it under the lock.
        drop(data);
        let child = inode.data.read();
        Ok(Some(self.attr_of(&inode, &child)))
    }

    /// Finds an inode by its number and counts a reference of the kernel, for handles of files that
    /// it has forgotten meanwhile; `None` where there is no such file (any more).
    ///
    /// # Errors
    /// Those of reading; damage.
    pub fn lookup_number(&self, ino: u32) -> FsResult<Option<Attr>> {
        let own = ino < self.geo.first_ino && ino != crate::inode::ROOT_INO;
        let known = self.inodes.get(ino).is_some();
        if own || (!known && !self.alloc.is_inode_taken(ino)?) {
            return Ok(None);
        }
        let inode = self.iget(ino)?;
        let data = inode.data.read();
        if data.links == 0 {
            drop(data);
            drop(inode);
            self.inodes.drop_unused(ino);
            return Ok(None);
        }
        inode.lookups.fetch_add(1, Ordering::AcqRel);
        Ok(Some(self.attr_of(&inode, &data)))
    }

    /// Makes a new inode with a name and counts a reference of the kernel.
    ///
    /// # Errors
    /// [`FsError::Exists`], [`FsError::NoSpace`], [`FsError::TooManyLinks`], and others; nothing
    /// is left then.
    pub fn create(
        self: &Arc<Self>,
        parent: u32,
        name: &[u8],
        node: NewNode<'_>,
        umask: u32,
        caller: &Caller,
    ) -> FsResult<Attr> {
        self.with_space(|| self.try_create(parent, name, node, umask, caller))
    }

    fn try_create(
        self: &Arc<Self>,
        parent: u32,
        name: &[u8],
        node: NewNode<'_>,
        umask: u32,
        caller: &Caller,
    ) -> FsResult<Attr> {
        self.check_writable()?;
        check_name(name)?;
        if let NewNode::Symlink { target } = node {
            if target.is_empty() || target.len() >= self.geo.block_size as usize {
                return Err(if target.is_empty() {
                    FsError::NotFound
                } else {
                    FsError::NameTooLong
                });
            }
        }
        let dir = self.directory(parent)?;
        let mut dir_data = dir.data.write();
        check_dir_change(&dir_data)?;
        if dir::lookup(self, &dir, &dir_data, name)?.is_some() {
            return Err(FsError::Exists);
        }
        let is_dir = matches!(node, NewNode::Directory { .. });
        if is_dir && !self.can_link_dir(&dir_data) {
            return Err(FsError::TooManyLinks);
        }
        let credits = dir::add_credits(self) + xattr::credits() + ORPHAN_CREDITS + 16;
        let handle = self.journal.start(credits)?;
        let made = self.make_inode(&handle, &dir, &dir_data, node, umask, caller);
        let inode = match made {
            Ok(inode) => inode,
            Err(error) => return handle.finish(Err(error)),
        };
        let result = self.add_name(&handle, &dir, &mut dir_data, name, &inode);
        if let Err(error) = result {
            handle.note_failure(&error);
            self.unmake_inode(handle, &inode);
            return Err(error);
        }
        inode.lookups.store(1, Ordering::Release);
        self.inodes.insert(&inode);
        let attr = self.attr_of(&inode, &inode.data.read_nested());
        let tid = handle.tid();
        handle.stop()?;
        drop(dir_data);
        self.sync_change(tid)?;
        Ok(attr)
    }

    /// Makes an unnamed regular file, an orphan until it is linked, and counts a reference of the
    /// kernel.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn tmpfile(
        self: &Arc<Self>,
        parent: u32,
        mode: u16,
        umask: u32,
        caller: &Caller,
    ) -> FsResult<Attr> {
        self.check_writable()?;
        let dir = self.directory(parent)?;
        let dir_data = dir.data.write();
        check_dir_change(&dir_data)?;
        let handle = self.journal.start(xattr::credits() + ORPHAN_CREDITS + 8)?;
        let node = NewNode::Node {
            mode: libc::S_IFREG as u16 | (mode & 0o7777),
            rdev: 0,
        };
        let made = self.make_inode(&handle, &dir, &dir_data, node, umask, caller);
        let inode = match made {
            Ok(inode) => inode,
            Err(error) => return handle.finish(Err(error)),
        };
        let mut data = inode.data.write_nested();
        data.links = 0;
        let listed = self
            .orphan_add(&handle, &inode)
            .and_then(|()| self.write_inode(&handle, &inode, &data));
        let attr = self.attr_of(&inode, &data);
        drop(data);
        if let Err(error) = listed {
            handle.note_failure(&error);
            self.unmake_inode(handle, &inode);
            return Err(error);
        }
        inode.lookups.store(1, Ordering::Release);
        self.inodes.insert(&inode);
        handle.stop()?;
        Ok(attr)
    }

    fn can_link_dir(&self, parent: &InodeData) -> bool {
        self.geo.ro_compat.contains(RoCompat::DIR_NLINK) || parent.links < LINK_MAX
    }

    /// Makes an inode without a name. The directory's lock is held.
    pub(super) fn make_inode(
        &self,
        handle: &Handle,
        dir: &Arc<Inode>,
        dir_data: &InodeData,
        node: NewNode<'_>,
        umask: u32,
        caller: &Caller,
    ) -> FsResult<Arc<Inode>> {
        let mode = match node {
            NewNode::Node { mode, .. } => mode,
            NewNode::Directory { mode } => libc::S_IFDIR as u16 | (mode & 0o7777),
            NewNode::Symlink { .. } => libc::S_IFLNK as u16 | 0o777,
        };
        let mut data = InodeData {
            mode,
            ..InodeData::default()
        };
        let is_dir = data.is_dir();
        let kind = if is_dir {
            let top = dir.ino == ROOT_INO || dir_data.flags.contains(InodeFlags::TOPDIR);
            InodeUse::Directory { top }
        } else {
            InodeUse::Other
        };
        let ino = self.alloc.alloc_inode(handle, dir.ino, kind)?;
        let known = self.inodes.get(ino);
        if known.is_some_and(|known| known.lookups.load(Ordering::Acquire) > 0) {
            return Err(self.corrupt("inode bitmap: an inode in use is marked free", 0, ino));
        }
        let now = self.now();
        data.uid = caller.uid;
        data.gid = caller.gid;
        let setgid = libc::S_ISGID as u16;
        if dir_data.mode & setgid != 0 {
            data.gid = dir_data.gid;
            if is_dir {
                data.mode |= setgid;
            }
        }
        (data.atime, data.mtime, data.ctime, data.crtime) = (now, now, now, now);
        data.extra_isize = self.geo.want_extra_isize;
        let body = usize::from(self.geo.inode_size) - 128 - usize::from(data.extra_isize);
        data.ibody = SmallVec::from_elem(0, body);
        data.generation = next_generation();
        data.flags = inherited_flags(dir_data.flags, is_dir, data.is_file());
        if dir_data.flags.contains(InodeFlags::PROJINHERIT) {
            data.projid = dir_data.projid;
        }
        data.links = if is_dir { 2 } else { 1 };
        let inode = Inode::new(self.geo.csum_seed, ino, data);
        let filled = self.fill_inode(handle, dir, dir_data, &inode, node, umask);
        if let Err(error) = filled {
            let undone = self.undo_inode(handle, &inode, kind);
            return undone.and(Err(error));
        }
        Ok(inode)
    }

    fn fill_inode(
        &self,
        handle: &Handle,
        dir: &Arc<Inode>,
        dir_data: &InodeData,
        inode: &Arc<Inode>,
        node: NewNode<'_>,
        umask: u32,
    ) -> FsResult {
        let mut data = inode.data.write_nested();
        match node {
            NewNode::Node { rdev, .. } => {
                if data.is_file() {
                    map::init(&self.geo, &mut data);
                } else if matches!(data.file_type(), libc::S_IFCHR | libc::S_IFBLK) {
                    set_rdev(&mut data, rdev);
                }
                acl::inherit(self, handle, dir, dir_data, inode, &mut data, umask)?;
            }
            NewNode::Directory { .. } => {
                map::init(&self.geo, &mut data);
                acl::inherit(self, handle, dir, dir_data, inode, &mut data, umask)?;
                dir::init(self, handle, inode, &mut data, dir.ino)?;
            }
            NewNode::Symlink { target } => {
                data.size = target.len() as u64;
                if target.len() < data.block.len() {
                    data.block[..target.len()].copy_from_slice(target);
                } else {
                    map::init(&self.geo, &mut data);
                    self.write_long_target(handle, inode, &mut data, target)?;
                }
            }
        }
        inode.datasync_tid.store(handle.tid(), Ordering::Release);
        self.write_inode(handle, inode, &data)
    }

    fn write_long_target(
        &self,
        handle: &Handle,
        inode: &Inode,
        data: &mut InodeData,
        target: &[u8],
    ) -> FsResult {
        let goal = self.alloc.goal_for(inode.ino, data, 0);
        let block = self.alloc.alloc_meta(handle, goal)?;
        let run = crate::alloc::Run {
            start: block,
            len: 1,
        };
        map::insert(self, handle, inode, data, 0, run, Written::Yes)?;
        let buffer = handle.create(block, bufio::no_check())?;
        handle.write(&buffer)?[..target.len()].copy_from_slice(target);
        Ok(())
    }

    fn add_name(
        &self,
        handle: &Handle,
        dir: &Arc<Inode>,
        dir_data: &mut InodeData,
        name: &[u8],
        inode: &Arc<Inode>,
    ) -> FsResult {
        dir::add(
            self,
            handle,
            dir,
            dir_data,
            name,
            inode.ino,
            entry_type(inode.type_bits),
        )?;
        if inode.is_dir() {
            self.count_subdir(dir_data, 1);
        }
        self.touch_dir(handle, dir, dir_data)
    }

    /// Changes the link count of a directory by its subdirectories; 1 means too many to count.
    pub(crate) fn count_subdir(&self, data: &mut InodeData, change: i32) {
        if data.links == 1 {
            return;
        }
        let links = i32::from(data.links) + change;
        data.links = if links >= i32::from(LINK_MAX) {
            1
        } else {
            links.max(0) as u16
        };
    }

    /// Writes a directory whose content was changed.
    pub(crate) fn touch_dir(&self, handle: &Handle, dir: &Inode, data: &mut InodeData) -> FsResult {
        let now = self.now();
        data.mtime = now;
        data.ctime = now;
        data.count_change();
        dir.datasync_tid.store(handle.tid(), Ordering::Release);
        self.write_inode(handle, dir, data)
    }

    /// Takes back an inode whose content could not be made; it has at most an attribute block.
    fn undo_inode(&self, handle: &Handle, inode: &Arc<Inode>, kind: InodeUse) -> FsResult {
        let mut data = inode.data.write_nested();
        xattr::delete_all(self, handle, inode, &mut data)?;
        data.links = 0;
        data.dtime = self.now().sec as u32;
        self.write_inode(handle, inode, &data)?;
        self.alloc.free_inode(handle, inode.ino, kind)
    }

    /// Takes back an inode that got no name: as an orphan, deleted in the background.
    fn unmake_inode(self: &Arc<Self>, handle: Handle, inode: &Arc<Inode>) {
        let listed = {
            let mut data = inode.data.write_nested();
            data.links = 0;
            self.orphan_add(&handle, inode)
                .and_then(|()| self.write_inode(&handle, inode, &data))
        };
        self.inodes.insert(inode);
        let stopped = handle.stop();
        if let Err(error) = listed.and(stopped) {
            self.report_eviction(inode.ino, error);
        }
        self.put(inode.clone());
    }

    /// Gives an inode another name.
    ///
    /// # Errors
    /// [`FsError::Exists`], [`FsError::TooManyLinks`], [`FsError::NotPermitted`] for directories.
    pub fn link(self: &Arc<Self>, ino: u32, parent: u32, name: &[u8]) -> FsResult<Attr> {
        self.with_space(|| self.try_link(ino, parent, name))
    }

    fn try_link(self: &Arc<Self>, ino: u32, parent: u32, name: &[u8]) -> FsResult<Attr> {
        self.check_writable()?;
        check_name(name)?;
        let dir = self.directory(parent)?;
        let inode = self.iget(ino)?;
        if inode.is_dir() {
            return Err(FsError::NotPermitted);
        }
        let mut dir_data = dir.data.write();
        check_dir_change(&dir_data)?;
        let mut data = inode.data.write_nested();
        if data
            .flags
            .intersects(InodeFlags::IMMUTABLE | InodeFlags::APPEND)
        {
            return Err(FsError::NotPermitted);
        }
        if data.links >= LINK_MAX {
            return Err(FsError::TooManyLinks);
        }
        if data.links == 0 && !inode.orphan.is_listed() {
            return Err(FsError::NotFound);
        }
        if dir::lookup(self, &dir, &dir_data, name)?.is_some() {
            return Err(FsError::Exists);
        }
        let handle = self
            .journal
            .start(dir::add_credits(self) + ORPHAN_CREDITS + 4)?;
        let result = self
            .add_name(&handle, &dir, &mut dir_data, name, &inode)
            .and_then(|()| {
                if data.links == 0 {
                    self.orphan_remove(&handle, &inode)?;
                    data.dtime = 0;
                }
                data.links += 1;
                data.ctime = self.now();
                data.count_change();
                self.write_inode(&handle, &inode, &data)
            });
        if result.is_ok() {
            inode.lookups.fetch_add(1, Ordering::AcqRel);
            // The kernel makes a name while it keeps others from removing one.
            inode.unlinker.store(0, Ordering::Release);
        }
        let attr = self.attr_of(&inode, &data);
        let tid = handle.tid();
        handle.finish(result)?;
        drop(data);
        drop(dir_data);
        self.sync_change(tid)?;
        Ok(attr)
    }

    /// Removes a name of anything but a directory.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::IsDirectory`], [`FsError::NotPermitted`].
    pub fn unlink(self: &Arc<Self>, parent: u32, name: &[u8], caller: &Caller) -> FsResult {
        self.remove_name(parent, name, FileKind::Other, caller)
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::NotDirectory`], [`FsError::NotEmpty`].
    pub fn rmdir(self: &Arc<Self>, parent: u32, name: &[u8], caller: &Caller) -> FsResult {
        match name {
            b"." => Err(FsError::Invalid),
            b".." => Err(FsError::NotEmpty),
            _ => self.remove_name(parent, name, FileKind::Directory, caller),
        }
    }

    fn remove_name(
        self: &Arc<Self>,
        parent: u32,
        name: &[u8],
        kind: FileKind,
        caller: &Caller,
    ) -> FsResult {
        self.check_writable()?;
        check_name(name)?;
        let dir = self.directory(parent)?;
        let mut dir_data = dir.data.write();
        check_dir_change(&dir_data)?;
        let entry = dir::lookup(self, &dir, &dir_data, name)?.ok_or(FsError::NotFound)?;
        self.check_below(entry.ino, [parent, parent])?;
        let inode = self.iget_named(entry.ino)?;
        let mut data = inode.data.write_nested();
        check_removal(&dir_data, &data)?;
        match kind {
            FileKind::Other if inode.is_dir() => return Err(FsError::IsDirectory),
            FileKind::Directory if !inode.is_dir() => return Err(FsError::NotDirectory),
            FileKind::Directory if !dir::is_empty(self, &inode, &data)? => {
                return Err(FsError::NotEmpty);
            }
            _ => {}
        }
        let handle = self
            .journal
            .start(dir::add_credits(self) + ORPHAN_CREDITS + 4)?;
        let result = dir::remove(self, &handle, &dir, &mut dir_data, name).and_then(|_ino| {
            if inode.is_dir() {
                self.count_subdir(&mut dir_data, -1);
            }
            self.touch_dir(&handle, &dir, &mut dir_data)?;
            self.lose_link(&handle, &inode, &mut data, caller)
        });
        let tid = handle.tid();
        handle.finish(result)?;
        drop(data);
        drop(dir_data);
        self.put(inode);
        self.sync_change(tid)
    }

    /// Refuses a name of the root, or of one of the directories whose locks are held.
    pub(super) fn check_below(&self, ino: u32, dirs: [u32; 2]) -> FsResult {
        if ino == ROOT_INO || dirs.contains(&ino) {
            return Err(self.corrupt("directory entry: a directory above it", 0, dirs[0]));
        }
        Ok(())
    }

    /// Counts a name less; the last makes the inode an orphan.
    pub(super) fn lose_link(
        &self,
        handle: &Handle,
        inode: &Inode,
        data: &mut InodeData,
        caller: &Caller,
    ) -> FsResult {
        data.ctime = self.now();
        data.count_change();
        data.links = if inode.is_dir() {
            0
        } else {
            data.links.saturating_sub(1)
        };
        if data.links == 0 {
            self.orphan_add(handle, inode)?;
            self.orphans.note_unnamed();
        } else {
            let thread = match caller.thread {
                0 => UNKNOWN_THREAD,
                thread => thread,
            };
            inode.unlinker.store(thread, Ordering::Release);
        }
        self.write_inode(handle, inode, data)
    }

    /// Lists a directory from `cookie` on; see [`dir::read`].
    ///
    /// # Errors
    /// [`FsError::NotDirectory`], damage.
    pub fn readdir(
        &self,
        ino: u32,
        cookie: u64,
        emit: &mut dyn FnMut(&Entry<'_>) -> Emit,
    ) -> FsResult {
        let dir = self.directory(ino)?;
        let data = dir.data.read();
        dir::read(self, &dir, &data, cookie, emit)?;
        let touch = cookie == 0 && self.wants_atime(&data);
        drop(data);
        if touch {
            self.touch_atime(&dir);
        }
        Ok(())
    }

    /// As [`Self::readdir`], with the attributes of each entry but "." and "..", for which the
    /// kernel's reference is counted when `emit` took it.
    ///
    /// # Errors
    /// As [`Self::readdir`].
    pub fn readdirplus(
        &self,
        ino: u32,
        cookie: u64,
        emit: &mut dyn FnMut(&Entry<'_>, Option<&Attr>) -> Emit,
    ) -> FsResult {
        while let Some(busy) = self.try_readdirplus(ino, cookie, emit)? {
            drop(busy.data.read());
        }
        Ok(())
    }

    /// Gives a directory that has to be waited for, where nothing was taken before it. In a damaged
    /// file system it may be above the one that is read: no waiting for it under the lock.
    fn try_readdirplus(
        &self,
        ino: u32,
        cookie: u64,
        emit: &mut dyn FnMut(&Entry<'_>, Option<&Attr>) -> Emit,
    ) -> FsResult<Option<Arc<Inode>>> {
        let dir = self.directory(ino)?;
        let data = dir.data.read();
        let (mut failed, mut busy, mut taken_any) = (None, None, false);
        dir::read(self, &dir, &data, cookie, &mut |entry| {
            if matches!(entry.name, b"." | b"..") {
                let taken = emit(entry, None);
                taken_any |= taken == Emit::More;
                return taken;
            }
            if entry.ino == ino {
                // Damage, told as a lookup tells it; its lock is held.
                dir.lookups.fetch_add(1, Ordering::AcqRel);
                let taken = emit(entry, Some(&self.attr_of(&dir, &data)));
                if taken == Emit::Full {
                    dir.lookups.fetch_sub(1, Ordering::AcqRel);
                }
                taken_any |= taken == Emit::More;
                return taken;
            }
            let inode = match self.iget_named(entry.ino) {
                Ok(inode) => inode,
                Err(error) => {
                    failed = Some(error);
                    return Emit::Full;
                }
            };
            let attr = if inode.is_dir() {
                let data = inode.data.try_read();
                data.map(|data| self.attr_of(&inode, &data))
            } else {
                Some(self.attr_of(&inode, &inode.data.read_nested()))
            };
            let Some(attr) = attr else {
                busy = Some(inode);
                return Emit::Full;
            };
            // Before the entry goes out, so that a forget cannot come first.
            inode.lookups.fetch_add(1, Ordering::AcqRel);
            let taken = emit(entry, Some(&attr));
            taken_any |= taken == Emit::More;
            if taken == Emit::Full {
                inode.lookups.fetch_sub(1, Ordering::AcqRel);
                drop(inode);
                self.inodes.drop_unused(entry.ino);
            }
            taken
        })?;
        let touch = cookie == 0 && self.wants_atime(&data);
        drop(data);
        if touch {
            self.touch_atime(&dir);
        }
        // With an error the kernel would not see the entries before it, nor give them back. The next
        // call begins with the one that failed.
        match failed {
            Some(error) if !taken_any => Err(error),
            _ => Ok(busy.filter(|_| !taken_any)),
        }
    }
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum FileKind {
    Directory,
    Other,
}

/// Generations differ between mounts and between inodes of one.
fn next_generation() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let step = NEXT.fetch_add(1, Ordering::Relaxed);
    if step == 0 {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let start = since.map_or(1, |since| since.subsec_nanos() ^ since.as_secs() as u32);
        NEXT.fetch_add(start, Ordering::Relaxed);
        return start;
    }
    step
}
