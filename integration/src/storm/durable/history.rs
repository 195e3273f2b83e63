//! The calls of a log, replayed: the last state, and for each object what was promised of it.

use std::collections::{BTreeSet, HashMap};

use super::super::content::{Extent, ExtentMap, FileData};
use super::super::durlog::{Log, Outcome};
use super::super::effect::{Effect, Falloc, Id, Name, Place};
use super::super::model::{Inode, Model};
use super::disk::Found;

/// What a file may hold after a crash.
#[derive(Clone, Debug, Default)]
pub struct FileStates {
    /// The content that was synced last; empty if none was.
    pub synced: FileData,
    /// Whether any was.
    pub is_synced: bool,
    /// The ranges that calls since then may have changed.
    pub touched: ExtentMap,
    /// What those calls put there.
    pub later: Vec<(u64, Extent)>,
    /// From where on content may have moved, so that any byte may be anywhere.
    pub wild_from: Option<u64>,
    /// The smallest size since then.
    pub size_low: u64,
    /// The largest size since then.
    pub size_high: u64,
}

impl FileStates {
    fn touch(&mut self, off: u64, len: u64) {
        self.touched.put(
            off,
            Extent {
                len,
                stamp: 0,
                pos: 0,
            },
        );
    }

    fn sync(&mut self, data: &FileData) {
        let (size_low, size_high) = (data.size, data.size);
        *self = Self {
            synced: data.clone(),
            is_synced: true,
            size_low,
            size_high,
            ..Self::default()
        };
    }
}

/// The log, replayed.
pub struct History {
    /// The state after all calls, the unfinished one included.
    pub model: Model,
    /// How many calls have promised something.
    pub syncs: usize,
    /// The largest call up to which all metadata is durable.
    pub durable: usize,
    changes: HashMap<Place, usize>,
    last_mods: HashMap<Id, usize>,
    limits: HashMap<Id, usize>,
    files: HashMap<Id, FileStates>,
    names: HashMap<Id, BTreeSet<Name>>,
    by_ino: HashMap<u64, Vec<Id>>,
}

impl History {
    /// Replays a log; calls are numbered from 1.
    pub fn replay(log: &Log, trust_syncfs: bool) -> std::result::Result<Self, String> {
        let mut history = Self {
            model: start(log),
            syncs: 0,
            durable: 0,
            changes: HashMap::new(),
            last_mods: HashMap::new(),
            limits: HashMap::new(),
            files: HashMap::new(),
            names: HashMap::new(),
            by_ino: HashMap::new(),
        };
        for (index, call) in log.calls.iter().enumerate() {
            let number = index + 1;
            if let Outcome::Done(Effect::Sync { .. } | Effect::SyncFs, _) = call {
                history.syncs += 1;
            }
            match call {
                Outcome::Done(effect, ino) => {
                    history.change(number, effect, *ino)?;
                    match effect {
                        Effect::Sync { id, data } => history.sync(*id, *data),
                        Effect::SyncFs if trust_syncfs => history.sync_all(number),
                        _ => {}
                    }
                }
                // Part of it may have been done.
                Outcome::Failed(effect) => history.touch(effect),
                Outcome::Unknown(effect) => history.change(number, effect, 0)?,
            }
        }
        Ok(history)
    }

    /// Returns the call up to which a sync of `id` has made metadata durable; 0 for none.
    pub fn durable_to(&self, id: Id) -> usize {
        self.limits.get(&id).copied().unwrap_or(0)
    }

    /// Returns the last call that is sure to have changed the inode.
    pub fn last_mod(&self, id: Id) -> usize {
        self.last_mods.get(&id).copied().unwrap_or(0)
    }

    /// Returns the last call that changed an entry.
    pub fn last_change(&self, at: &Place) -> Option<usize> {
        self.changes.get(at).copied()
    }

    /// Tells whether an entry of the last state must exist when all up to call `limit` is
    /// durable: neither it nor an entry above was touched later.
    pub fn is_bound(&self, at: &Place, limit: usize) -> bool {
        let mut at = at;
        loop {
            if self.last_change(at).is_none_or(|change| change > limit) {
                return false;
            }
            let Some(parent) = self.model.inode(at.parent) else {
                return false;
            };
            if parent.root.is_some() {
                return true;
            }
            match parent.links.first() {
                Some(place) => at = place,
                None => return false,
            }
        }
    }

    /// Returns what a file may hold.
    pub fn file(&self, id: Id) -> Option<&FileStates> {
        self.files.get(&id)
    }

    /// Tells whether the content of a file was synced at least once.
    pub fn is_synced(&self, id: Id) -> bool {
        self.file(id).is_some_and(|states| states.is_synced)
    }

    /// Returns the objects that an entry on disk may be: an inode number is used again.
    pub fn candidates(&self, found: &Found) -> Vec<Id> {
        let known = self.by_ino.get(&found.ino).into_iter().flatten();
        let unknown = self.by_ino.get(&0).into_iter().flatten();
        let had_name = |id: &&Id| {
            self.names
                .get(*id)
                .is_some_and(|names| names.contains(&found.name))
        };
        let all: Vec<Id> = known.chain(unknown).filter(had_name).copied().collect();
        let is_bound = |id: &&Id| {
            let limit = self.durable_to(**id);
            let links = self.model.inode(**id).map(|inode| &inode.links);
            links.into_iter().flatten().any(|at| {
                let parent = self.model.inode(at.parent).map(|inode| inode.ino);
                let is_here = at.name == found.name && parent == Some(found.parent);
                is_here && self.is_bound(at, limit)
            })
        };
        match all.iter().find(is_bound) {
            Some(&id) => vec![id],
            None => all,
        }
    }

    fn change(
        &mut self,
        number: usize,
        effect: &Effect,
        ino: u64,
    ) -> std::result::Result<(), String> {
        for id in surely_changed(&self.model, effect) {
            self.last_mods.insert(id, number);
        }
        self.touch(effect);
        for change in self.model.apply(effect)? {
            if let Some(id) = change.new {
                self.names
                    .entry(id)
                    .or_default()
                    .insert(change.at.name.clone());
            }
            self.changes.insert(change.at, number);
        }
        if let Effect::Create { id, .. } | Effect::Tmpfile { id, .. } = effect {
            self.model.set_ino(*id, ino);
            self.by_ino.entry(ino).or_default().push(*id);
            if self.model.file(*id).is_some() {
                self.files.insert(*id, FileStates::default());
            }
        }
        if let Some((id, data)) =
            changed_file(effect).and_then(|id| Some((id, self.model.file(id)?)))
        {
            let states = self.files.entry(id).or_default();
            states.size_low = states.size_low.min(data.size);
            states.size_high = states.size_high.max(data.size);
        }
        Ok(())
    }

    /// Notes what a data call may do, wholly or in part; called before the model changes.
    fn touch(&mut self, effect: &Effect) {
        let Some(id) = changed_file(effect) else {
            return;
        };
        let size = self.model.file(id).map_or(0, |data| data.size);
        let copied = match effect {
            Effect::Copy {
                src,
                src_off,
                off,
                len,
                ..
            } => {
                let extents = self
                    .model
                    .file(*src)
                    .map(|data| data.map.slice(*src_off, *len));
                let moved = |(start, ext): (u64, Extent)| (start - src_off + off, ext);
                extents.into_iter().flatten().map(moved).collect()
            }
            _ => Vec::new(),
        };
        let states = self.files.entry(id).or_default();
        match *effect {
            Effect::Write {
                off, len, stamp, ..
            } => {
                states.touch(off, len);
                states.later.push((
                    off,
                    Extent {
                        len,
                        stamp,
                        pos: off,
                    },
                ));
                states.size_high = states.size_high.max(off + len);
            }
            Effect::Copy { off, len, .. } => {
                states.touch(off, len);
                states.later.extend(copied);
                states.size_high = states.size_high.max(off + len);
            }
            Effect::Truncate { size: new, .. } => states.touch(new.min(size), u64::MAX >> 1),
            Effect::Fallocate { mode, off, len, .. } => match mode {
                Falloc::Alloc => states.size_high = states.size_high.max(off + len),
                Falloc::AllocKeep => {}
                Falloc::Punch | Falloc::ZeroKeep => states.touch(off, len),
                Falloc::Zero => {
                    states.touch(off, len);
                    states.size_high = states.size_high.max(off + len);
                }
                Falloc::Collapse | Falloc::Insert => {
                    states.touch(off, u64::MAX >> 1);
                    states.wild_from = Some(states.wild_from.map_or(off, |from| from.min(off)));
                    states.size_high = states.size_high.max(size + len);
                }
            },
            _ => {}
        }
    }

    fn sync(&mut self, id: Id, data_only: bool) {
        if let Some(data) = self.model.file(id) {
            self.files.entry(id).or_default().sync(data);
        }
        if !data_only {
            let last = self.last_mod(id);
            let limit = self.limits.entry(id).or_default();
            *limit = last.max(*limit);
            self.durable = self.durable.max(*limit);
        }
    }

    fn sync_all(&mut self, number: usize) {
        let ids: Vec<Id> = self.model.inodes().map(|(id, _)| id).collect();
        for id in ids {
            self.sync(id, true);
            self.limits.insert(id, number);
        }
        self.durable = number;
    }
}

/// Returns the model before the first call.
pub fn start(log: &Log) -> Model {
    let mut model = Model::new(log.owner);
    for (id, path, ino) in &log.roots {
        model.add_root(*id, path.clone(), *ino);
    }
    model
}

/// Returns the file whose content or size a call changes.
fn changed_file(effect: &Effect) -> Option<Id> {
    match effect {
        Effect::Write { id, .. }
        | Effect::Copy { id, .. }
        | Effect::Truncate { id, .. }
        | Effect::Fallocate { id, .. } => Some(*id),
        _ => None,
    }
}

/// Returns the inodes that a call changes in a way that must end up in a transaction.
///
/// Fewer than it really changes is safe, more is not: a call that sets what is set already may
/// be left out by the file system, and so may new times within one clock tick.
fn surely_changed(model: &Model, effect: &Effect) -> Vec<Id> {
    let when = |id: Id, differs: bool| if differs { vec![id] } else { Vec::new() };
    let size = |id: Id| model.file(id).map_or(0, |data| data.size);
    let inode = |id: Id| model.inode(id);
    match effect {
        Effect::Create { at, id, .. } | Effect::Link { at, id } => vec![at.parent, *id],
        Effect::Tmpfile { id, .. } => vec![*id],
        Effect::Remove { at } => model.lookup(at).into_iter().chain([at.parent]).collect(),
        Effect::Rename { from, to, .. } => {
            let (moved, over) = (model.lookup(from), model.lookup(to));
            if moved == over {
                return Vec::new();
            }
            moved
                .into_iter()
                .chain(over)
                .chain([from.parent, to.parent])
                .collect()
        }
        Effect::Write { id, off, len, .. } | Effect::Copy { id, off, len, .. } => {
            when(*id, off + len > size(*id))
        }
        Effect::Truncate { id, size: new } => when(*id, *new != size(*id)),
        Effect::Fallocate { .. } | Effect::Sync { .. } | Effect::SyncFs => Vec::new(),
        Effect::Chmod { id, mode } => when(*id, inode(*id).is_some_and(|i| i.mode != *mode)),
        Effect::Chown { id, uid, gid } => when(
            *id,
            inode(*id).is_some_and(|i| (i.uid, i.gid) != (*uid, *gid)),
        ),
        Effect::Utimes { id, sec, nsec } => when(
            *id,
            inode(*id).is_some_and(|i| i.mtime != Some((*sec, *nsec))),
        ),
        Effect::SetXattr {
            id,
            name,
            stamp,
            len,
        } => when(
            *id,
            inode(*id).is_some_and(|i| i.xattrs.get(name) != Some(&(*stamp, *len))),
        ),
        Effect::DelXattr { id, .. } => vec![*id],
        Effect::SetAcl { id, default, acl } => {
            let old = |i: &Inode| if *default { i.default_acl } else { i.acl };
            when(*id, inode(*id).is_some_and(|i| old(i) != *acl))
        }
    }
}
