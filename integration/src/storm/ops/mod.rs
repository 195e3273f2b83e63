//! The operations: which there are, how often each is drawn, and how arguments are chosen.

mod attrs;
mod checks;
mod data;
mod names;

use std::fs::File;
use std::rc::Rc;

use super::SHARED_DIRS;
use super::caps::Caps;
use super::effect::{Id, Name, Place};
use super::error::{Context, Result};
use super::rng::Rng;
use super::worker::{FIRST_SHARED, Handle, ROOT, Worker};

/// Longest path below the mount; leaves room below `PATH_MAX` for the mount's own path.
const MAX_PATH: usize = 3300;

/// What a run concentrates on.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub enum Profile {
    /// Everything.
    Full,
    /// All but ACLs.
    Noacl,
    /// All but attributes and ACLs.
    Noxattr,
    /// What the oldest and smallest file systems can do.
    Basic,
    /// Names and attributes before data.
    Meta,
    /// Data before names and attributes.
    Data,
    /// Many syncs, for kill tests.
    Sync,
}

macro_rules! op_kinds {
    ($($kind:ident $word:literal $weight:literal $group:ident $cap:literal,)*) => {
        /// One kind of step.
        #[derive(Clone, Copy, Debug, Eq, PartialEq)]
        pub enum OpKind { $($kind,)* }

        impl OpKind {
            /// Returns the word for statistics.
            pub fn word(self) -> &'static str {
                match self { $(Self::$kind => $word,)* }
            }
        }

        /// Kind, weight, group, and the capability it cannot do without.
        const TABLE: &[(OpKind, u32, Group, &str)] =
            &[$((OpKind::$kind, $weight, Group::$group, $cap),)*];
    };
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Group {
    Names,
    Special,
    Data,
    Space,
    Attrs,
    Xattr,
    Acl,
    Sync,
    Check,
    Forced,
}

op_kinds! {
    Create "create" 50 Names "",
    Mkdir "mkdir" 24 Names "",
    Symlink "symlink" 16 Names "",
    Mknod "mknod" 8 Special "",
    Tmpfile "tmpfile" 8 Special "tmpfile",
    Link "link" 20 Names "",
    Remove "remove" 36 Names "",
    Rename "rename" 50 Names "",
    Exchange "exchange" 12 Special "exchange",
    CreateBurst "create-burst" 3 Names "",
    RemoveBurst "remove-burst" 2 Names "",
    UnlinkOpen "unlink-open" 8 Names "",
    Shrink "shrink" 0 Forced "",
    Open "open" 12 Data "",
    Close "close" 8 Data "",
    Write "write" 130 Data "",
    Append "append" 30 Data "",
    DirectWrite "direct-write" 20 Data "direct",
    DirectRead "direct-read" 10 Data "direct",
    Truncate "truncate" 30 Data "",
    Fallocate "fallocate" 50 Space "",
    Copy "copy" 16 Space "copy-range",
    Read "read" 60 Check "",
    ReadAll "read-all" 14 Check "",
    Seek "seek" 5 Check "seek-hole",
    Stat "stat" 30 Check "",
    ReadDir "readdir" 14 Check "",
    Refuse "refuse" 16 Check "",
    Chmod "chmod" 16 Attrs "",
    Chown "chown" 10 Attrs "chown",
    Utimes "utimes" 16 Attrs "",
    SetXattr "setxattr" 40 Xattr "xattr",
    DelXattr "delxattr" 14 Xattr "xattr",
    SetAcl "setacl" 12 Acl "acl",
    Sync "sync" 12 Sync "",
    SyncDir "sync-dir" 5 Sync "",
    SyncFs "syncfs" 1 Sync "",
}

impl Profile {
    /// Draws a kind of step.
    pub fn draw(self, rng: &mut Rng, caps: &Caps) -> OpKind {
        let weights: Vec<u32> = TABLE
            .iter()
            .map(|&(_, weight, group, cap)| {
                let able = cap.is_empty() || caps.has(cap);
                if able { weight * self.factor(group) } else { 0 }
            })
            .collect();
        TABLE[rng.weighted(&weights)].0
    }

    fn factor(self, group: Group) -> u32 {
        match (self, group) {
            (_, Group::Forced) | (Self::Noacl | Self::Noxattr | Self::Basic, Group::Acl) => 0,
            (Self::Noxattr | Self::Basic, Group::Xattr) => 0,
            (Self::Basic, Group::Special | Group::Space) => 0,
            (Self::Meta, Group::Data | Group::Space) => 1,
            (Self::Data, Group::Names | Group::Special | Group::Attrs) => 1,
            (Self::Data, Group::Xattr | Group::Acl) => 1,
            (Self::Sync, Group::Sync) => 30,
            (Self::Sync, Group::Check) => 1,
            _ => 5,
        }
    }
}

impl Worker {
    /// Makes one step of the given kind; nothing happens where the model has nothing to offer.
    pub fn run_op(&mut self, kind: OpKind) -> Result<()> {
        match kind {
            OpKind::Create => self.op_create().map(drop),
            OpKind::Mkdir => self.op_mkdir(),
            OpKind::Symlink => self.op_symlink(),
            OpKind::Mknod => self.op_mknod(),
            OpKind::Tmpfile => self.op_tmpfile(),
            OpKind::Link => self.op_link(),
            OpKind::Remove => self.op_remove(),
            OpKind::Rename => self.op_rename(),
            OpKind::Exchange => self.op_exchange(),
            OpKind::CreateBurst => self.op_create_burst(),
            OpKind::RemoveBurst => self.op_remove_burst(),
            OpKind::UnlinkOpen => self.op_unlink_open(),
            OpKind::Shrink => self.op_shrink(),
            OpKind::Open => self.op_open(),
            OpKind::Close => self.op_close(),
            OpKind::Write => self.op_write(),
            OpKind::Append => self.op_append(),
            OpKind::DirectWrite => self.op_direct_write(),
            OpKind::DirectRead => self.op_direct_read(),
            OpKind::Truncate => self.op_truncate(),
            OpKind::Fallocate => self.op_fallocate(),
            OpKind::Copy => self.op_copy(),
            OpKind::Read => self.op_read(),
            OpKind::ReadAll => self.op_read_all(),
            OpKind::Seek => self.op_seek(),
            OpKind::Stat => self.op_stat(),
            OpKind::ReadDir => self.op_readdir(),
            OpKind::Refuse => self.op_refuse(),
            OpKind::Chmod => self.op_chmod(),
            OpKind::Chown => self.op_chown(),
            OpKind::Utimes => self.op_utimes(),
            OpKind::SetXattr => self.op_setxattr(),
            OpKind::DelXattr => self.op_delxattr(),
            OpKind::SetAcl => self.op_setacl(),
            OpKind::Sync => self.op_sync(),
            OpKind::SyncDir => self.op_sync_dir(),
            OpKind::SyncFs => self.op_syncfs(),
        }
    }

    /// Picks a directory for a new entry.
    fn pick_parent(&mut self) -> Id {
        let dice = self.rng.below(100);
        let id = if dice < 25 {
            self.fat_dir.unwrap_or(ROOT)
        } else if dice < 50 {
            FIRST_SHARED + self.rng.below(SHARED_DIRS)
        } else {
            self.model.dirs.draw(&mut self.rng).unwrap_or(ROOT)
        };
        if self.path_len(id) > MAX_PATH {
            ROOT
        } else {
            id
        }
    }

    /// Picks a name that is free, in a directory drawn at random.
    fn pick_free(&mut self) -> Place {
        let parent = self.pick_parent();
        self.pick_free_in(parent)
    }

    /// Picks a name that is free in `parent`.
    fn pick_free_in(&mut self, parent: Id) -> Place {
        loop {
            let at = Place {
                parent,
                name: self.fresh_name(parent),
            };
            if self.model.lookup(&at).is_none() {
                return at;
            }
        }
    }

    /// Picks one of the entries of the worker.
    fn pick_entry(&mut self) -> Option<(Place, Id)> {
        let id = self.model.linked.draw(&mut self.rng)?;
        let at = self.pick_link(id)?;
        Some((at, id))
    }

    /// Picks one of the entries that lead to `id`.
    fn pick_link(&mut self, id: Id) -> Option<Place> {
        let links: Vec<Place> = self.model.inode(id)?.links.iter().cloned().collect();
        let index = self.rng.index(links.len());
        links.get(index).cloned()
    }

    /// Picks an object that is neither link nor special file.
    fn pick_plain(&mut self) -> Option<Id> {
        for _ in 0..8 {
            let id = self.model.linked.draw(&mut self.rng)?;
            let inode = self.model.inode(id)?;
            if inode.file().is_some() || inode.dir().is_some() {
                return Some(id);
            }
        }
        None
    }

    /// Picks a regular file and opens it, or takes one that is open already.
    fn pick_file(&mut self) -> Result<Option<Handle>> {
        if self.rng.chance(30) && !self.handles.is_empty() {
            let index = self.rng.index(self.handles.len());
            return Ok(self.handles.get(index).cloned());
        }
        let Some(id) = self.model.files.draw(&mut self.rng) else {
            return Ok(None);
        };
        let Some(at) = self.pick_link(id) else {
            return Ok(None);
        };
        let path = self.place_path(&at);
        self.describe("open", &path);
        let file = File::options()
            .read(true)
            .write(true)
            .open(&path)
            .call("open", &path)?;
        Ok(Some(Handle {
            id,
            file: Rc::new(file),
            path,
        }))
    }

    fn path_len(&self, id: Id) -> usize {
        self.model
            .path(id)
            .map_or(usize::MAX, |path| path.as_os_str().len())
    }

    /// Makes a name up; mostly short and plain, sometimes of 255 bytes, sometimes of any bytes.
    fn fresh_name(&mut self, parent: Id) -> Name {
        let is_shared = self
            .model
            .inode(parent)
            .is_some_and(|inode| inode.is_shared());
        let is_fat = self.fat_dir == Some(parent);
        let mut name = if is_shared {
            self.prefix()
        } else {
            Name::new()
        };
        let len = match self.rng.below(100) {
            0..70 if !is_fat => self.rng.within(3, 12),
            0..90 => self.rng.within(12, 60),
            90..97 => self.rng.within(60, 254),
            _ => 255,
        };
        let is_odd = self.rng.chance(8);
        while name.len() < len as usize {
            let byte = self.rng.below(256) as u8;
            match byte {
                0 | b'/' => {}
                _ if is_odd => name.push(byte),
                _ => name.push(b"abcdefghijklmnopqrstuvwxyz0123456789_-."[usize::from(byte) % 39]),
            }
        }
        if name.iter().all(|&b| b == b'.') {
            name[0] = b'd';
        }
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_but_the_forced_can_be_drawn() {
        let caps = Caps::from_text(&format!("1 1 {}", super::super::caps::KNOWN.join(",")));
        let caps = caps.unwrap();
        let mut rng = Rng::new(1, 1);
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..200_000 {
            seen.insert(Profile::Full.draw(&mut rng, &caps).word());
        }
        assert_eq!(seen.len(), TABLE.len() - 1);
        assert!(!seen.contains("shrink"));
    }
}
