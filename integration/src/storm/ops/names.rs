//! Operations on names: what makes, moves and removes entries.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::RenameFlags;

use super::super::caps::link_tmpfile;
use super::super::effect::{Effect, Id, NewNode, Place};
use super::super::error::{Context, Result};
use super::super::model::Inode;
use super::super::sys;
use super::super::worker::{Handle, MAX_HANDLES, ROOT, Worker};
use super::MAX_PATH;

impl Worker {
    pub(super) fn op_create(&mut self) -> Result<Option<Id>> {
        let at = self.pick_free();
        self.create_file(at)
    }

    fn create_file(&mut self, at: Place) -> Result<Option<Id>> {
        let mode = self.random_mode(NewNode::File);
        let path = self.place_path(&at);
        let id = self.new_id();
        let effect = Effect::Create {
            at,
            id,
            mode,
            node: NewNode::File,
        };
        let keep_open = self.handles.len() < MAX_HANDLES && self.rng.chance(10);
        let mut kept = None;
        let made = self.perform_new(effect, "create", &path, || {
            let file = File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(mode)
                .open(&path)?;
            let ino = file.metadata()?.ino();
            kept = Some(file);
            Ok(ino)
        })?;
        if let (true, true, Some(file)) = (made, keep_open, kept) {
            self.handles.push(Handle {
                id,
                file: Rc::new(file),
                path,
            });
        }
        Ok(made.then_some(id))
    }

    pub(super) fn op_mkdir(&mut self) -> Result<()> {
        let at = self.pick_free();
        self.make_dir(at).map(drop)
    }

    fn make_dir(&mut self, at: Place) -> Result<Option<Id>> {
        let mode = self.random_mode(NewNode::Dir);
        let path = self.place_path(&at);
        let id = self.new_id();
        let effect = Effect::Create {
            at,
            id,
            mode,
            node: NewNode::Dir,
        };
        let made = self.perform_new(effect, "mkdir", &path, || {
            std::fs::DirBuilder::new().mode(mode).create(&path)?;
            ino_of(&path)
        })?;
        Ok(made.then_some(id))
    }

    pub(super) fn op_symlink(&mut self) -> Result<()> {
        let max = self.caps.symlink_max;
        // Up to 59 bytes fit into the inode, which is the border to get wrong.
        let len = match self.rng.below(10) {
            0..4 => self.rng.within(1, 58),
            4..6 => self.rng.within(57, 62),
            6..9 => self.rng.within(61, 300),
            _ => self.rng.within(300, 3000),
        };
        let mut target = Vec::new();
        while (target.len() as u64) < len.min(max) {
            target.push(b'a' + self.rng.below(26) as u8);
        }
        let at = self.pick_free();
        let path = self.place_path(&at);
        let id = self.new_id();
        let to = PathBuf::from(std::ffi::OsString::from_vec(target.clone()));
        let effect = Effect::Create {
            at,
            id,
            mode: 0o777,
            node: NewNode::Symlink(target),
        };
        self.perform_new(effect, "symlink", &path, || {
            std::os::unix::fs::symlink(&to, &path)?;
            ino_of(&path)
        })?;
        Ok(())
    }

    pub(super) fn op_mknod(&mut self) -> Result<()> {
        let node = match self.rng.below(4) {
            0 | 1 => NewNode::Fifo,
            2 if self.caps.has("char") => {
                NewNode::Char(self.rng.below(4096) as u32, self.rng.below(1 << 20) as u32)
            }
            _ => NewNode::Socket,
        };
        let at = self.pick_free();
        let mode = self.random_mode(NewNode::File);
        let path = self.place_path(&at);
        let id = self.new_id();
        let effect = Effect::Create {
            at,
            id,
            mode,
            node: node.clone(),
        };
        self.perform_new(effect, "mknod", &path, || {
            sys::mknod(&path, &node, mode)?;
            ino_of(&path)
        })?;
        Ok(())
    }

    /// A file without a name, which stays open, is linked, or both.
    pub(super) fn op_tmpfile(&mut self) -> Result<()> {
        let parent = self.pick_parent();
        let dir = self.path(parent);
        let mode = self.random_mode(NewNode::File);
        let id = self.new_id();
        let mut opened = None;
        let effect = Effect::Tmpfile { parent, id, mode };
        let made = self.perform_new(effect, "tmpfile", &dir, || {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_TMPFILE)
                .mode(mode)
                .open(&dir)?;
            let ino = file.metadata()?.ino();
            opened = Some(file);
            Ok(ino)
        })?;
        let (true, Some(file)) = (made, opened) else {
            return Ok(());
        };
        if self.rng.chance(60) {
            let at = self.pick_free();
            let path = self.place_path(&at);
            let effect = Effect::Link { at, id };
            self.perform(effect, "linkat", &path, &[libc::ENOSPC], || {
                link_tmpfile(&file, &path)
            })?;
        }
        if self.handles.len() < MAX_HANDLES {
            self.handles.push(Handle {
                id,
                file: Rc::new(file),
                path: dir,
            });
        } else {
            drop(file);
            self.forget_if_unused(id);
        }
        Ok(())
    }

    pub(super) fn op_link(&mut self) -> Result<()> {
        let Some((from, id)) = self.pick_entry() else {
            return Ok(());
        };
        if self
            .model
            .inode(id)
            .is_none_or(|inode| inode.dir().is_some())
        {
            return Ok(());
        }
        let at = self.pick_free();
        let (old, path) = (self.place_path(&from), self.place_path(&at));
        let effect = Effect::Link { at, id };
        let linked = self.perform(effect, "link", &path, &[libc::ENOSPC], || {
            std::fs::hard_link(&old, &path)
        })?;
        if linked.is_none() {
            self.expect_absent(&path)
        } else {
            Ok(())
        }
    }

    pub(super) fn op_remove(&mut self) -> Result<()> {
        match self.pick_entry() {
            Some((at, id)) => self.remove_entry(at, id),
            None => Ok(()),
        }
    }

    fn remove_entry(&mut self, at: Place, id: Id) -> Result<()> {
        let path = self.place_path(&at);
        let entries = self.model.inode(id).and_then(Inode::dir);
        if entries.is_some_and(|entries| !entries.is_empty()) {
            return Ok(());
        }
        let is_dir = entries.is_some();
        let effect = Effect::Remove { at };
        let removed = self.perform(effect, "remove", &path, &[libc::ENOSPC], || {
            if is_dir {
                std::fs::remove_dir(&path)
            } else {
                std::fs::remove_file(&path)
            }
        })?;
        if removed.is_some() {
            if self.fat_dir == Some(id) {
                self.fat_dir = None;
            }
            self.forget_if_unused(id);
            if self.rng.chance(20) {
                self.describe("look for what was removed", &path);
                self.expect_absent(&path)?;
            }
        }
        Ok(())
    }

    pub(super) fn op_rename(&mut self) -> Result<()> {
        let Some((from, id)) = self.pick_entry() else {
            return Ok(());
        };
        let over_existing = self.rng.chance(35);
        let picked = if over_existing {
            self.pick_entry()
        } else {
            None
        };
        let (to, over) = match picked {
            Some((to, over)) if self.may_replace(id, over) && self.owns_name(&to) => {
                (to, Some(over))
            }
            _ if self.rng.chance(25) => (self.pick_free_in(from.parent), None),
            _ => (self.pick_free(), None),
        };
        if !self.may_move(id, &to) {
            return Ok(());
        }
        let (old, new) = (self.place_path(&from), self.place_path(&to));
        let use_noreplace = over.is_none() && self.caps.has("noreplace") && self.rng.chance(30);
        let flags = if use_noreplace {
            RenameFlags::NOREPLACE
        } else {
            RenameFlags::empty()
        };
        let effect = Effect::Rename {
            from,
            to,
            exchange: false,
        };
        let renamed = self.perform(effect, "rename", &old, &[libc::ENOSPC], || {
            sys::rename(&old, &new, flags)
        })?;
        if renamed.is_some() {
            if let Some(over) = over {
                if self.fat_dir == Some(over) && over != id {
                    self.fat_dir = None;
                }
                self.forget_if_unused(over);
            }
        }
        Ok(())
    }

    pub(super) fn op_exchange(&mut self) -> Result<()> {
        let (Some((from, a)), Some((to, b))) = (self.pick_entry(), self.pick_entry()) else {
            return Ok(());
        };
        if from == to || !self.may_move(a, &to) || !self.may_move(b, &from) {
            return Ok(());
        }
        let (old, new) = (self.place_path(&from), self.place_path(&to));
        let effect = Effect::Rename {
            from,
            to,
            exchange: true,
        };
        self.perform(effect, "exchange", &old, &[libc::ENOSPC], || {
            sys::rename(&old, &new, RenameFlags::EXCHANGE)
        })?;
        Ok(())
    }

    /// Tells whether a rename of `id` may land on `over`.
    fn may_replace(&self, id: Id, over: Id) -> bool {
        let entries = |id| self.model.inode(id).and_then(Inode::dir);
        match (entries(id), entries(over)) {
            (None, None) => true,
            (Some(_), Some(target)) => target.is_empty() && id != over,
            _ => false,
        }
    }

    /// Tells whether `id` may move to `to`: not below itself, and no path gets too long.
    fn may_move(&self, id: Id, to: &Place) -> bool {
        if self.model.inode(id).and_then(Inode::dir).is_none() {
            return true;
        }
        let len = self.path_len(to.parent) + 1 + to.name.len() + self.model.height(id);
        !self.model.is_above(id, to.parent) && len < MAX_PATH
    }

    /// Tells whether the place is one this worker may put entries at.
    fn owns_name(&self, at: &Place) -> bool {
        let is_shared = self.model.inode(at.parent).is_some_and(Inode::is_shared);
        !is_shared || at.name.starts_with(&self.prefix())
    }

    /// Makes enough files in one directory that its index has to split.
    pub(super) fn op_create_burst(&mut self) -> Result<()> {
        if self.fat_dir.is_none() {
            let at = self.pick_free_in(ROOT);
            self.fat_dir = self.make_dir(at)?;
        }
        let parent = match self.fat_dir {
            Some(id) if self.rng.chance(60) && self.path_len(id) < MAX_PATH => id,
            _ => self.pick_parent(),
        };
        let room = self
            .args
            .max_files
            .saturating_sub(self.model.linked.ids().len()) as u64;
        for _ in 0..self.rng.within(20, 200).min(room) {
            let at = self.pick_free_in(parent);
            self.create_file(at)?;
        }
        Ok(())
    }

    /// Removes a large part of one directory.
    pub(super) fn op_remove_burst(&mut self) -> Result<()> {
        let parent = match self.fat_dir {
            Some(id) if self.rng.chance(60) => id,
            _ => self.pick_parent(),
        };
        let entries = self.model.inode(parent).and_then(Inode::dir);
        let mut entries: Vec<_> = entries
            .into_iter()
            .flatten()
            .map(|(name, &id)| (name.clone(), id))
            .collect();
        if entries.len() < 10 {
            // Too small to matter: take any.
            for _ in 0..20 {
                self.op_remove()?;
            }
            return Ok(());
        }
        for _ in 0..self.rng.within(10, entries.len() as u64) {
            let (name, id) = entries.swap_remove(self.rng.index(entries.len()));
            self.remove_entry(Place { parent, name }, id)?;
        }
        Ok(())
    }

    /// Takes all names of an open file away; later steps go on using it.
    pub(super) fn op_unlink_open(&mut self) -> Result<()> {
        if self.handles.is_empty() {
            return Ok(());
        }
        let index = self.rng.index(self.handles.len());
        let id = self.handles[index].id;
        let links = self
            .model
            .inode(id)
            .map(|inode| inode.links.clone())
            .unwrap_or_default();
        if links.len() > 2 {
            return Ok(());
        }
        for at in links {
            self.remove_entry(at, id)?;
        }
        Ok(())
    }

    /// Gives space back: truncates or removes files until a quarter of the bound is free.
    pub(super) fn op_shrink(&mut self) -> Result<()> {
        while self.model.used() > self.args.max_bytes * 3 / 4 {
            if !self.handles.is_empty() && self.rng.chance(20) {
                let index = self.rng.index(self.handles.len());
                self.close(index);
            }
            let largest = self
                .model
                .files
                .ids()
                .iter()
                .copied()
                .max_by_key(|&id| (self.model.file(id).map_or(0, |data| data.map.total()), id));
            let Some(id) = largest else {
                while !self.handles.is_empty() {
                    self.close(0);
                }
                return Ok(());
            };
            if self.rng.chance(50) {
                self.truncate_by_path(id, 0)?;
            } else if let Some(at) = self.pick_link(id) {
                self.remove_entry(at, id)?;
            }
        }
        Ok(())
    }

    pub(super) fn truncate_by_path(&mut self, id: Id, size: u64) -> Result<()> {
        let path = self.path(id);
        self.describe("open to truncate", &path);
        let file = File::options()
            .write(true)
            .open(&path)
            .call("open", &path)?;
        let effect = Effect::Truncate { id, size };
        self.perform(effect, "truncate", &path, &[], || file.set_len(size))?;
        Ok(())
    }

    /// Draws permission bits; without root the owner keeps all, or later steps would be refused.
    pub(super) fn random_mode(&mut self, node: NewNode) -> u32 {
        let owner = if self.is_root { 0 } else { 0o700 };
        let sticky = if node == NewNode::Dir && self.rng.chance(10) {
            0o1000
        } else {
            0
        };
        self.rng.below(0o1000) as u32 | owner | sticky
    }
}

fn ino_of(path: &Path) -> io::Result<u64> {
    Ok(path.symlink_metadata()?.ino())
}
