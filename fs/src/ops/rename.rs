//! rename, in all its kinds.

use std::sync::Arc;

use blockstack::sync::RwLockWriteGuard;

use super::namei::{check_dir_change, check_name, check_removal, entry_type};
use super::{Caller, NewNode};
use crate::core::Fs;
use crate::dir;
use crate::error::{FsError, FsResult};
use crate::format::inode::InodeData;
use crate::inode::{Inode, ROOT_INO};
use crate::journal::Handle;
use crate::orphan::ORPHAN_CREDITS;

bitflags::bitflags! {
    /// `renameat2`'s flags.
    #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
    pub struct RenameFlags: u32 {
        /// Fail where the new name is taken.
        const NOREPLACE = 1;
        /// Both names are there, and change places.
        const EXCHANGE = 2;
        /// Leave a whiteout (character device 0:0) at the old name.
        const WHITEOUT = 4;
    }
}

/// The locks of both directories; both names may be in the same one.
struct Parents<'a> {
    old: RwLockWriteGuard<'a, InodeData>,
    /// `None` where it is the same directory.
    new: Option<RwLockWriteGuard<'a, InodeData>>,
}

impl Parents<'_> {
    fn new_data(&mut self) -> &mut InodeData {
        match &mut self.new {
            Some(data) => data,
            None => &mut self.old,
        }
    }
}

struct Names<'a> {
    old_dir: &'a Arc<Inode>,
    old_name: &'a [u8],
    new_dir: &'a Arc<Inode>,
    new_name: &'a [u8],
}

impl Fs {
    /// Renames.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::Exists`] with `NOREPLACE`, [`FsError::NotEmpty`],
    /// [`FsError::IsDirectory`], [`FsError::NotDirectory`], [`FsError::Invalid`] for a directory
    /// into itself, [`FsError::TooManyLinks`].
    pub fn rename(
        self: &Arc<Self>,
        old_parent: u32,
        old_name: &[u8],
        new_parent: u32,
        new_name: &[u8],
        flags: RenameFlags,
        caller: &Caller,
    ) -> FsResult {
        self.with_space(|| {
            self.try_rename(old_parent, old_name, new_parent, new_name, flags, caller)
        })
    }

    fn try_rename(
        self: &Arc<Self>,
        old_parent: u32,
        old_name: &[u8],
        new_parent: u32,
        new_name: &[u8],
        flags: RenameFlags,
        caller: &Caller,
    ) -> FsResult {
        self.check_writable()?;
        check_name(old_name)?;
        check_name(new_name)?;
        let exchange = flags.contains(RenameFlags::EXCHANGE);
        let others = RenameFlags::NOREPLACE | RenameFlags::WHITEOUT;
        if !RenameFlags::all().contains(flags) || (exchange && flags.intersects(others)) {
            return Err(FsError::Invalid);
        }
        let old_dir = self.directory(old_parent)?;
        let new_dir = self.directory(new_parent)?;
        let names = Names {
            old_dir: &old_dir,
            old_name,
            new_dir: &new_dir,
            new_name,
        };
        let cross = old_parent != new_parent;
        // A directory that stands in two places, or in none, is the one thing that e2fsck asks
        // about. Without a log only a small commit keeps the time short in which a crash leaves it.
        let by_itself = cross && !self.journal.has_log();
        if by_itself {
            self.journal.commit_all()?;
        }
        let one_at_a_time = cross.then(|| self.rename_lock.lock());
        // Which of the two is above the other, and by which child of it: that child must not be
        // what is moved. Nobody else changes the way up meanwhile.
        let way_to_new = if cross {
            self.way_down(old_parent, new_parent)?
        } else {
            None
        };
        let way_to_old = if cross {
            self.way_down(new_parent, old_parent)?
        } else {
            None
        };
        let old_first = way_to_new.is_some() || (way_to_old.is_none() && old_parent < new_parent);
        let mut parents = lock_parents(&old_dir, &new_dir, old_first);
        check_dir_change(&parents.old)?;
        check_dir_change(parents.new_data())?;
        let source =
            dir::lookup(self, &old_dir, &parents.old, old_name)?.ok_or(FsError::NotFound)?;
        let target = dir::lookup(self, &new_dir, parents.new_data(), new_name)?;
        if target.is_some() && flags.contains(RenameFlags::NOREPLACE) {
            return Err(FsError::Exists);
        }
        if exchange && target.is_none() {
            return Err(FsError::NotFound);
        }
        if target.is_some_and(|target| target.ino == source.ino) {
            return Ok(());
        }
        if way_to_new == Some(source.ino) {
            return Err(FsError::Invalid);
        }
        if target.is_some_and(|target| way_to_old == Some(target.ino)) {
            return Err(if exchange {
                FsError::Invalid
            } else {
                FsError::NotEmpty
            });
        }
        for entry in [Some(source), target].into_iter().flatten() {
            self.check_below(entry.ino, [old_parent, new_parent])?;
        }
        let source = self.iget_named(source.ino)?;
        let target = target
            .map(|target| self.iget_named(target.ino))
            .transpose()?;
        let tid = match &target {
            Some(target) if exchange => self.exchange(&names, &mut parents, &source, target)?,
            _ => self.replace(
                &names,
                &mut parents,
                &source,
                target.as_ref(),
                flags,
                caller,
            )?,
        };
        drop(parents);
        drop(one_at_a_time);
        if let Some(target) = target {
            self.put(target);
        }
        if by_itself {
            self.journal.commit_wait(tid)?;
        }
        self.sync_change(tid)
    }

    /// The child of `above` through which the way leads down to `below`; `None` where `below` is
    /// not under it. The rename lock is held, so that the way stays; no inode lock is.
    fn way_down(&self, above: u32, below: u32) -> FsResult<Option<u32>> {
        let mut ino = below;
        for _ in 0..self.geo.inodes_count {
            if ino == ROOT_INO {
                return Ok(None);
            }
            let dir = self.directory(ino)?;
            let data = dir.data.read();
            let parent = match dir::lookup(self, &dir, &data, b"..")? {
                Some(entry) => entry.ino,
                None => return Err(self.corrupt("directory: no '..'", 0, ino)),
            };
            if parent == above {
                return Ok(Some(ino));
            }
            ino = parent;
        }
        Err(self.corrupt("directory: '..' runs in a circle", 0, below))
    }

    fn replace(
        self: &Arc<Self>,
        names: &Names<'_>,
        parents: &mut Parents<'_>,
        source: &Arc<Inode>,
        target: Option<&Arc<Inode>>,
        flags: RenameFlags,
        caller: &Caller,
    ) -> FsResult<u32> {
        let (mut source_data, mut target_data) =
            lock_children(source, target.map(|target| &**target));
        check_removal(&parents.old, &source_data)?;
        if let (Some(target), Some(data)) = (target, &target_data) {
            check_removal(parents.new_data(), data)?;
            if source.is_dir() && !target.is_dir() {
                return Err(FsError::NotDirectory);
            }
            if !source.is_dir() && target.is_dir() {
                return Err(FsError::IsDirectory);
            }
            if target.is_dir() && !dir::is_empty(self, target, data)? {
                return Err(FsError::NotEmpty);
            }
        }
        let credits = 2 * dir::add_credits(self) + 2 * ORPHAN_CREDITS + 24;
        let handle = self.journal.start(credits)?;
        let mut result = self.move_name(&handle, names, parents, source, target.is_some());
        if result.is_ok() {
            result = if flags.contains(RenameFlags::WHITEOUT) {
                self.set_whiteout(&handle, names, parents, caller)
            } else {
                dir::remove(
                    self,
                    &handle,
                    names.old_dir,
                    &mut parents.old,
                    names.old_name,
                )
                .map(|_| ())
            };
        }
        result = result.and_then(|()| {
            if source.is_dir() {
                if parents.new.is_some() {
                    self.set_parent(&handle, source, &mut source_data, names.new_dir.ino)?;
                    self.count_subdir(&mut parents.old, -1);
                    self.count_subdir(parents.new_data(), 1);
                }
                if target.is_some() {
                    self.count_subdir(parents.new_data(), -1);
                }
            }
            self.touch_parents(&handle, names, parents)?;
            source_data.ctime = self.now();
            source_data.count_change();
            self.write_inode(&handle, source, &source_data)?;
            match (target, &mut target_data) {
                (Some(target), Some(data)) => self.lose_link(&handle, target, data, caller),
                _ => Ok(()),
            }
        });
        let tid = handle.tid();
        handle.finish(result)?;
        Ok(tid)
    }

    fn move_name(
        &self,
        handle: &Handle,
        names: &Names<'_>,
        parents: &mut Parents<'_>,
        source: &Inode,
        replaces: bool,
    ) -> FsResult {
        let kind = entry_type(source.type_bits);
        let (dir, data, name) = (names.new_dir, parents.new_data(), names.new_name);
        if replaces {
            dir::set_entry(self, handle, dir, data, name, source.ino, kind)
        } else {
            dir::add(self, handle, dir, data, name, source.ino, kind)
        }
    }

    fn touch_parents(
        &self,
        handle: &Handle,
        names: &Names<'_>,
        parents: &mut Parents<'_>,
    ) -> FsResult {
        self.touch_dir(handle, names.old_dir, &mut parents.old)?;
        match &mut parents.new {
            Some(data) => self.touch_dir(handle, names.new_dir, data),
            None => Ok(()),
        }
    }

    fn set_parent(
        &self,
        handle: &Handle,
        dir: &Inode,
        data: &mut InodeData,
        parent: u32,
    ) -> FsResult {
        dir::set_entry(
            self,
            handle,
            dir,
            data,
            b"..",
            parent,
            dir::FileType::Directory,
        )
    }

    fn set_whiteout(
        &self,
        handle: &Handle,
        names: &Names<'_>,
        parents: &mut Parents<'_>,
        caller: &Caller,
    ) -> FsResult {
        let node = NewNode::Node {
            mode: libc::S_IFCHR as u16,
            rdev: 0,
        };
        let whiteout = self.make_inode(handle, names.old_dir, &parents.old, node, 0, caller)?;
        let ino = whiteout.ino;
        // A deleted inode of this number may not have left the memory yet.
        self.inodes.insert(&whiteout);
        drop(whiteout);
        let (dir, data, name) = (names.old_dir, &mut parents.old, names.old_name);
        let kind = dir::FileType::CharDevice;
        let set = dir::set_entry(self, handle, dir, data, name, ino, kind);
        self.inodes.drop_unused(ino);
        set
    }

    fn exchange(
        &self,
        names: &Names<'_>,
        parents: &mut Parents<'_>,
        source: &Arc<Inode>,
        target: &Arc<Inode>,
    ) -> FsResult<u32> {
        let (mut source_data, target_data) = lock_children(source, Some(target));
        let Some(mut target_data) = target_data else {
            return Err(FsError::NotFound);
        };
        check_removal(&parents.old, &source_data)?;
        check_removal(parents.new_data(), &target_data)?;
        let handle = self.journal.start(2 * dir::add_credits(self) + 24)?;
        let result = self
            .move_name(&handle, names, parents, source, true)
            .and_then(|()| {
                let kind = entry_type(target.type_bits);
                let (dir, data, name) = (names.old_dir, &mut parents.old, names.old_name);
                dir::set_entry(self, &handle, dir, data, name, target.ino, kind)?;
                if parents.new.is_some() {
                    if source.is_dir() {
                        self.set_parent(&handle, source, &mut source_data, names.new_dir.ino)?;
                    }
                    if target.is_dir() {
                        self.set_parent(&handle, target, &mut target_data, names.old_dir.ino)?;
                    }
                    let change = i32::from(target.is_dir()) - i32::from(source.is_dir());
                    self.count_subdir(&mut parents.old, change);
                    self.count_subdir(parents.new_data(), -change);
                }
                self.touch_parents(&handle, names, parents)?;
                let now = self.now();
                source_data.ctime = now;
                source_data.count_change();
                target_data.ctime = now;
                target_data.count_change();
                self.write_inode(&handle, source, &source_data)?;
                self.write_inode(&handle, target, &target_data)
            });
        let tid = handle.tid();
        handle.finish(result)?;
        Ok(tid)
    }
}

fn lock_parents<'a>(old: &'a Inode, new: &'a Inode, old_first: bool) -> Parents<'a> {
    if old.ino == new.ino {
        return Parents {
            old: old.data.write(),
            new: None,
        };
    }
    if old_first {
        let old = old.data.write();
        Parents {
            old,
            new: Some(new.data.write_nested()),
        }
    } else {
        let new = new.data.write();
        Parents {
            old: old.data.write_nested(),
            new: Some(new),
        }
    }
}

/// Locks one or two children, in the order of their numbers.
fn lock_children<'a>(
    source: &'a Inode,
    target: Option<&'a Inode>,
) -> (
    RwLockWriteGuard<'a, InodeData>,
    Option<RwLockWriteGuard<'a, InodeData>>,
) {
    match target {
        Some(target) if target.ino < source.ino => {
            let target = target.data.write_nested();
            (source.data.write_nested(), Some(target))
        }
        target => {
            let source = source.data.write_nested();
            (source, target.map(|target| target.data.write_nested()))
        }
    }
}
