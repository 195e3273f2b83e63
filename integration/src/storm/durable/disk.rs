//! What is on disk in the places of one worker.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::super::compare;
use super::super::durlog::Log;
use super::super::effect::{Id, Name};
use super::super::error::{Context, Result};

/// One entry.
#[derive(Clone, Debug)]
pub struct Found {
    /// Full path.
    pub path: PathBuf,
    /// The name.
    pub name: Name,
    /// Inode number of the directory.
    pub parent: u64,
    /// Inode number of the object.
    pub ino: u64,
    /// Type of the object, as a word.
    pub kind: &'static str,
}

/// All entries of one worker, by the inode number of their directory.
pub struct Disk {
    entries: BTreeMap<(u64, Name), Found>,
    by_ino: HashMap<u64, (u64, Name)>,
    roots: HashMap<Id, u64>,
}

impl Disk {
    /// Walks the places where the worker of `log` may have entries.
    pub fn walk(mount: &Path, log: &Log) -> Result<Self> {
        let (entries, by_ino) = (BTreeMap::new(), HashMap::new());
        let mut disk = Self {
            entries,
            by_ino,
            roots: HashMap::new(),
        };
        let prefix = format!("p{}_", log.worker);
        for (id, path, _) in &log.roots {
            let is_shared = path.starts_with(b"shared");
            let path = mount.join(OsStr::from_bytes(path));
            let Ok(meta) = path.symlink_metadata() else {
                continue;
            };
            disk.roots.insert(*id, meta.ino());
            let prefix = if is_shared { prefix.as_bytes() } else { b"" };
            disk.walk_dir(&path, meta.ino(), prefix)?;
        }
        Ok(disk)
    }

    fn walk_dir(&mut self, dir: &Path, parent: u64, prefix: &[u8]) -> Result<()> {
        for entry in std::fs::read_dir(dir).call("readdir", dir)? {
            let name = entry.call("readdir", dir)?.file_name().into_vec();
            if !name.starts_with(prefix) {
                continue;
            }
            let path = dir.join(OsStr::from_bytes(&name));
            let meta = path.symlink_metadata().call("stat", &path)?;
            let (ino, kind) = (meta.ino(), compare::type_word(&meta));
            let key = (parent, name.clone());
            self.by_ino.insert(ino, key.clone());
            self.entries.insert(
                key,
                Found {
                    path: path.clone(),
                    name,
                    parent,
                    ino,
                    kind,
                },
            );
            if meta.is_dir() {
                self.walk_dir(&path, ino, b"")?;
            }
        }
        Ok(())
    }

    /// Returns the inode number of a directory that the worker started with.
    pub fn root_ino(&self, id: Id) -> Option<u64> {
        self.roots.get(&id).copied()
    }

    /// Looks an entry up.
    pub fn lookup(&self, parent: u64, name: &[u8]) -> Option<&Found> {
        self.entries.get(&(parent, name.to_vec()))
    }

    /// Returns one of the entries of an inode.
    pub fn by_ino(&self, ino: u64) -> Option<&Found> {
        self.entries.get(self.by_ino.get(&ino)?)
    }

    /// Returns the names in a directory.
    pub fn names_in(&self, parent: u64) -> impl Iterator<Item = &[u8]> {
        let range = (parent, Name::new())..(parent + 1, Name::new());
        self.entries
            .range(range)
            .map(|((_, name), _)| name.as_slice())
    }

    /// Returns all entries.
    pub fn all(&self) -> impl Iterator<Item = &Found> {
        self.entries.values()
    }

    /// Returns the entries of regular files.
    pub fn files(&self) -> impl Iterator<Item = &Found> {
        self.all().filter(|found| found.kind == "file")
    }
}
