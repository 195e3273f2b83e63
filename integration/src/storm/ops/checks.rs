//! Operations that only look: content, attributes, directories, and calls that must be refused.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::DirEntryExt;
use std::path::Path;

use rustix::fs::RenameFlags;

use super::super::compare;
use super::super::effect::{Id, Place};
use super::super::error::{Context, Result, StormError};
use super::super::model::{Inode, Kind};
use super::super::sys;
use super::super::text::escape;
use super::super::worker::Worker;

/// What a server puts into directory entries when it does not want to say.
const UNKNOWN_INO: u64 = 0xffff_ffff;

impl Worker {
    pub(super) fn op_read(&mut self) -> Result<()> {
        let Some(handle) = self.pick_file()? else {
            return Ok(());
        };
        let size = self.model.file(handle.id).map_or(0, |data| data.size);
        let off = self.rng.below(size + 1 + size / 8);
        let len = self.random_len();
        self.describe(format!("read {} {off} {len}", handle.id), &handle.path);
        self.compare_range(&handle, off, len)
    }

    pub(super) fn op_read_all(&mut self) -> Result<()> {
        let Some(handle) = self.pick_file()? else {
            return Ok(());
        };
        let Some(data) = self.model.file(handle.id).cloned() else {
            return Ok(());
        };
        // SEEK_DATA may not know of pages that were never written back, see `op_seek`.
        if data.size > 8 << 20 {
            self.sync_file(&handle, true)?;
        }
        self.describe(format!("read all of {}", handle.id), &handle.path);
        compare::whole(&handle.file, &handle.path, &data, &self.source)
    }

    /// Checks that no content lies in what is reported as a hole.
    pub(super) fn op_seek(&mut self) -> Result<()> {
        let Some(handle) = self.pick_file()? else {
            return Ok(());
        };
        // Over FUSE the kernel asks the server, which has not seen dirty pages.
        self.sync_file(&handle, true)?;
        let Some(data) = self.model.file(handle.id).cloned() else {
            return Ok(());
        };
        self.describe(format!("seek in {}", handle.id), &handle.path);
        let ranges = sys::data_ranges(&handle.file, data.size).call("lseek", &handle.path)?;
        for (start, ext) in data.map.slice(0, data.size) {
            let end = start + ext.len;
            let is_inside = |&(from, to): &(u64, u64)| from <= start && end <= to;
            if ext.stamp != 0 && !ranges.iter().any(is_inside) {
                let expected = format!("{start}..{end} in data");
                let actual = format!("data in {ranges:?}");
                let what = "SEEK_DATA and SEEK_HOLE";
                return Err(StormError::mismatch(&handle.path, what, expected, actual));
            }
        }
        Ok(())
    }

    pub(super) fn op_stat(&mut self) -> Result<()> {
        if self.rng.chance(25) && !self.handles.is_empty() {
            let index = self.rng.index(self.handles.len());
            let handle = self.handles[index].clone();
            self.describe(format!("fstat {}", handle.id), &handle.path);
            let meta = handle.file.metadata().call("fstat", &handle.path)?;
            return match self.model.inode(handle.id) {
                Some(inode) => {
                    compare::stat(&handle.path, &meta, inode, self.model.nlink(handle.id))
                }
                None => Ok(()),
            };
        }
        let Some((at, id)) = self.pick_entry() else {
            return Ok(());
        };
        let path = self.place_path(&at);
        self.describe(format!("stat {id}"), &path);
        let meta = path.symlink_metadata().call("stat", &path)?;
        let Some(inode) = self.model.inode(id) else {
            return Ok(());
        };
        compare::stat(&path, &meta, inode, self.model.nlink(id))?;
        if let Kind::Symlink(target) = &inode.kind {
            return compare::target(&path, target);
        }
        if self.rng.chance(40) && (inode.file().is_some() || inode.dir().is_some()) {
            self.check_xattrs(id)?;
        }
        Ok(())
    }

    pub(super) fn op_readdir(&mut self) -> Result<()> {
        let id = self.pick_dir_to_read();
        let path = self.path(id);
        self.describe(format!("readdir {id}"), &path);
        let Some(dir) = self.model.inode(id) else {
            return Ok(());
        };
        let prefix = dir.is_shared().then(|| self.prefix());
        let mut actual = BTreeMap::new();
        for entry in std::fs::read_dir(&path).call("readdir", &path)? {
            let entry = entry.call("readdir", &path)?;
            let name = entry.file_name().into_vec();
            if prefix
                .as_ref()
                .is_some_and(|prefix| !name.starts_with(prefix))
            {
                continue;
            }
            let kind = entry.file_type().call("readdir", &path)?;
            let ino = match entry.ino() {
                // libfuse's readdir has only names, and the stat check sees the number anyway.
                UNKNOWN_INO => self.known_ino(id, &name),
                ino => ino,
            };
            let word = format!("{} {ino}", compare::file_type_word(kind));
            if actual.insert(name.clone(), word).is_some() {
                let what = format!("entry {}", escape(&name));
                return Err(StormError::mismatch(&path, what, "once", "twice"));
            }
        }
        let expected: BTreeMap<_, _> = dir
            .dir()
            .into_iter()
            .flatten()
            .filter_map(|(name, &child)| {
                let inode = self.model.inode(child)?;
                Some((
                    name.clone(),
                    format!("{} {}", compare::inode_word(inode), inode.ino),
                ))
            })
            .collect();
        let only = |a: &BTreeMap<Vec<u8>, String>, b: &BTreeMap<Vec<u8>, String>| {
            let words = a.iter().filter(|(name, word)| b.get(*name) != Some(*word));
            let words: Vec<_> = words
                .take(5)
                .map(|(name, word)| format!("{} {word}", escape(name)))
                .collect();
            if words.is_empty() {
                "nothing else".to_owned()
            } else {
                words.join(", ")
            }
        };
        if actual != expected {
            let (want, have) = (only(&expected, &actual), only(&actual, &expected));
            return Err(StormError::mismatch(&path, "entries", want, have));
        }
        Ok(())
    }

    fn known_ino(&self, parent: Id, name: &[u8]) -> u64 {
        let at = Place {
            parent,
            name: name.to_vec(),
        };
        let inode = self.model.lookup(&at).and_then(|id| self.model.inode(id));
        inode.map_or(UNKNOWN_INO, |inode| inode.ino)
    }

    fn pick_dir_to_read(&mut self) -> Id {
        match self.fat_dir {
            Some(id) if self.rng.chance(20) => id,
            _ => self.pick_any_dir(),
        }
    }

    fn pick_any_dir(&mut self) -> Id {
        self.model.dirs.draw(&mut self.rng).unwrap_or(super::ROOT)
    }

    /// Makes a call that must fail and change nothing.
    pub(super) fn op_refuse(&mut self) -> Result<()> {
        let (Some((at, id)), Some((other, other_id))) = (self.pick_entry(), self.pick_entry())
        else {
            return Ok(());
        };
        let (path, second) = (self.place_path(&at), self.place_path(&other));
        let free = self.pick_free();
        let roll = self.rng.below(12);
        let fresh = self.place_path(&free);
        let entries = |id| self.model.inode(id).and_then(Inode::dir);
        let (dir, other_dir) = (entries(id), entries(other_id));
        let is_full = |dir: Option<&BTreeMap<_, _>>| dir.is_some_and(|dir| !dir.is_empty());
        let (what, result, errnos): (&str, io::Result<()>, &[i32]) = match roll {
            0 => {
                let made = File::options()
                    .write(true)
                    .create_new(true)
                    .open(&path)
                    .map(drop);
                ("exclusive create of what exists", made, &[libc::EEXIST])
            }
            1 => (
                "mkdir of what exists",
                std::fs::create_dir(&path),
                &[libc::EEXIST],
            ),
            2 if is_full(dir) => (
                "rmdir of a full directory",
                std::fs::remove_dir(&path),
                &[libc::ENOTEMPTY],
            ),
            3 if dir.is_some() => (
                "unlink of a directory",
                unlink(&path),
                &[libc::EISDIR, libc::EPERM],
            ),
            4 if dir.is_none() => (
                "rmdir of a file",
                std::fs::remove_dir(&path),
                &[libc::ENOTDIR],
            ),
            5 if self.caps.has("noreplace") && at != other => {
                let made = sys::rename(&path, &second, RenameFlags::NOREPLACE);
                // A directory can be above the other path, which is tested for first.
                (
                    "NOREPLACE over what exists",
                    made,
                    &[libc::EEXIST, libc::EINVAL, libc::ENOTEMPTY],
                )
            }
            6 => (
                "rename of nothing",
                std::fs::rename(&fresh, &path),
                &[libc::ENOENT],
            ),
            7 if dir.is_some() && other_dir.is_none() => (
                "directory over file",
                std::fs::rename(&path, &second),
                &[libc::ENOTDIR, libc::EINVAL],
            ),
            8 if dir.is_none() && other_dir.is_some() => {
                let made = std::fs::rename(&path, &second);
                (
                    "file over directory",
                    made,
                    &[libc::EISDIR, libc::ENOTEMPTY],
                )
            }
            9 if dir.is_some() && is_full(other_dir) && id != other_id => {
                let made = std::fs::rename(&path, &second);
                (
                    "directory over full one",
                    made,
                    &[libc::ENOTEMPTY, libc::EEXIST, libc::EINVAL],
                )
            }
            10 => {
                let long = Place {
                    parent: free.parent,
                    name: vec![b'l'; 256],
                };
                let made = File::create(self.place_path(&long)).map(drop);
                ("name of 256 bytes", made, &[libc::ENAMETOOLONG])
            }
            11 => {
                let made = std::fs::hard_link(&path, &second);
                ("link over what exists", made, &[libc::EEXIST, libc::EPERM])
            }
            _ => (
                "open of nothing",
                File::open(&fresh).map(drop),
                &[libc::ENOENT],
            ),
        };
        self.describe(format!("{what} ({})", second.display()), &path);
        match result {
            Err(error) if error.raw_os_error().is_some_and(|e| errnos.contains(&e)) => Ok(()),
            Err(error) => Err(error).call("refusal", &path),
            Ok(()) => Err(StormError::mismatch(&path, what, "a refusal", "success")),
        }
    }
}

fn unlink(path: &Path) -> io::Result<()> {
    Ok(rustix::fs::unlink(path.as_os_str().as_bytes())?)
}
