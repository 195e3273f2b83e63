//! What the file system should look like: one worker's objects, in memory.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::acl::Acl;
use super::content::FileData;
use super::effect::{Effect, Falloc, Id, Name, NewNode, Place};
use super::rng::Rng;

/// The kind of an object with what only that kind has.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// A regular file.
    File(FileData),
    /// A directory and those of its entries that the worker owns.
    Dir(BTreeMap<Name, Id>),
    /// A symbolic link and its target.
    Symlink(Vec<u8>),
    /// A FIFO.
    Fifo,
    /// A socket.
    Socket,
    /// A character device.
    Char(u32, u32),
}

/// One object.
#[derive(Clone, Debug)]
pub struct Inode {
    /// Kind and content.
    pub kind: Kind,
    /// Permission bits with the sticky bit.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Owning group.
    pub gid: u32,
    /// The inode number seen at creation; 0 when not known.
    pub ino: u64,
    /// The entries that lead here.
    pub links: BTreeSet<Place>,
    /// Path below the mount for the directories a worker starts with.
    pub root: Option<Vec<u8>>,
    /// The modification time where it was set and nothing has changed it since.
    pub mtime: Option<(i64, u32)>,
    /// User attributes: stamp and length of the value.
    pub xattrs: BTreeMap<String, (u64, u64)>,
    /// The access ACL, where it says more than the mode.
    pub acl: Option<Acl>,
    /// The default ACL of a directory.
    pub default_acl: Option<Acl>,
}

impl Inode {
    /// Returns the file data of a regular file.
    pub fn file(&self) -> Option<&FileData> {
        match &self.kind {
            Kind::File(data) => Some(data),
            _ => None,
        }
    }

    /// Returns the entries of a directory.
    pub fn dir(&self) -> Option<&BTreeMap<Name, Id>> {
        match &self.kind {
            Kind::Dir(entries) => Some(entries),
            _ => None,
        }
    }

    /// Tells whether other workers have entries in this directory too.
    pub fn is_shared(&self) -> bool {
        self.root
            .as_ref()
            .is_some_and(|path| path.starts_with(b"shared"))
    }
}

/// Ids in an order that depends on the operations alone, for drawing at random.
#[derive(Clone, Debug, Default)]
pub struct Pool {
    ids: Vec<Id>,
    at: HashMap<Id, usize>,
}

impl Pool {
    /// Returns all members.
    pub fn ids(&self) -> &[Id] {
        &self.ids
    }

    /// Draws a member at random.
    pub fn draw(&self, rng: &mut Rng) -> Option<Id> {
        self.ids.get(rng.index(self.ids.len())).copied()
    }

    fn add(&mut self, id: Id) {
        if let std::collections::hash_map::Entry::Vacant(slot) = self.at.entry(id) {
            slot.insert(self.ids.len());
            self.ids.push(id);
        }
    }

    fn remove(&mut self, id: Id) {
        if let Some(index) = self.at.remove(&id) {
            self.ids.swap_remove(index);
            if let Some(&moved) = self.ids.get(index) {
                self.at.insert(moved, index);
            }
        }
    }
}

/// An entry that a change made, took away, or pointed elsewhere.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EdgeChange {
    /// Which entry.
    pub at: Place,
    /// What it led to before.
    pub old: Option<Id>,
    /// What it leads to now.
    pub new: Option<Id>,
}

/// All objects of one worker.
#[derive(Clone, Debug, Default)]
pub struct Model {
    inodes: HashMap<Id, Inode>,
    /// Who owns what is created.
    owner: (u32, u32),
    used: u64,
    /// Regular files with at least one entry.
    pub files: Pool,
    /// Directories, the starting ones included.
    pub dirs: Pool,
    /// Every object with an entry.
    pub linked: Pool,
}

impl Model {
    /// Makes a model without objects; `owner` is what new objects get as uid and gid.
    pub fn new(owner: (u32, u32)) -> Self {
        Self {
            owner,
            ..Self::default()
        }
    }

    /// Adds a directory the worker starts with.
    pub fn add_root(&mut self, id: Id, path: Vec<u8>, ino: u64) {
        let mut inode = self.blank(Kind::Dir(BTreeMap::new()), 0o777);
        inode.root = Some(path);
        inode.ino = ino;
        self.inodes.insert(id, inode);
        self.dirs.add(id);
    }

    /// Looks an object up.
    pub fn inode(&self, id: Id) -> Option<&Inode> {
        self.inodes.get(&id)
    }

    /// Iterates over all objects, in no order.
    pub fn inodes(&self) -> impl Iterator<Item = (Id, &Inode)> {
        self.inodes.iter().map(|(&id, inode)| (id, inode))
    }

    /// Looks a regular file up.
    pub fn file(&self, id: Id) -> Option<&FileData> {
        self.inode(id)?.file()
    }

    /// Looks an entry up.
    pub fn lookup(&self, at: &Place) -> Option<Id> {
        self.inode(at.parent)?.dir()?.get(&at.name).copied()
    }

    /// Records the inode number of a new object.
    pub fn set_ino(&mut self, id: Id, ino: u64) {
        if let Some(inode) = self.inodes.get_mut(&id) {
            inode.ino = ino;
        }
    }

    /// Returns about how many bytes the files take.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// Drops an object without entries, once nobody has it open.
    pub fn forget(&mut self, id: Id) {
        if self
            .inode(id)
            .is_some_and(|inode| inode.links.is_empty() && inode.root.is_none())
        {
            self.used -= self.file(id).map_or(0, |data| data.map.total());
            self.inodes.remove(&id);
        }
    }

    /// Returns the path below the mount of one of an object's entries.
    pub fn path(&self, id: Id) -> Option<PathBuf> {
        let inode = self.inode(id)?;
        if let Some(root) = &inode.root {
            return Some(PathBuf::from(OsString::from_vec(root.clone())));
        }
        self.place_path(inode.links.first()?)
    }

    /// Returns the path below the mount of an entry.
    pub fn place_path(&self, at: &Place) -> Option<PathBuf> {
        let mut path = self.path(at.parent)?;
        path.push(OsString::from_vec(at.name.clone()));
        Some(path)
    }

    /// Tells whether directory `above` is `id` or one of the directories above it.
    pub fn is_above(&self, above: Id, id: Id) -> bool {
        let mut at = id;
        loop {
            if at == above {
                return true;
            }
            match self.inode(at).and_then(|inode| inode.links.first()) {
                Some(place) => at = place.parent,
                None => return false,
            }
        }
    }

    /// Returns the length of the longest path below an object, itself not counted.
    pub fn height(&self, id: Id) -> usize {
        let Some(entries) = self.inode(id).and_then(Inode::dir) else {
            return 0;
        };
        entries
            .iter()
            .map(|(name, &child)| 1 + name.len() + self.height(child))
            .max()
            .unwrap_or(0)
    }

    /// Returns how many links `stat` should show; `None` for a shared directory.
    pub fn nlink(&self, id: Id) -> Option<u64> {
        let inode = self.inode(id)?;
        if inode.is_shared() {
            return None;
        }
        Some(match inode.dir() {
            Some(entries) => {
                let is_dir = |id: &&Id| self.inode(**id).is_some_and(|child| child.dir().is_some());
                2 + entries.values().filter(is_dir).count() as u64
            }
            None => inode.links.len() as u64,
        })
    }

    /// Applies one change and returns the entries it touched.
    ///
    /// # Errors
    ///
    /// Says what is wrong when the change does not fit the model; only a damaged log does that.
    pub fn apply(&mut self, effect: &Effect) -> Result<Vec<EdgeChange>, String> {
        match effect {
            Effect::Create { at, id, mode, node } => {
                self.create(at.parent, *id, *mode, node)?;
                Ok(vec![self.set_entry(at, Some(*id))?])
            }
            Effect::Tmpfile { parent, id, mode } => {
                self.create(*parent, *id, *mode, &NewNode::File)?;
                Ok(Vec::new())
            }
            Effect::Link { at, id } => Ok(vec![self.set_entry(at, Some(*id))?]),
            Effect::Remove { at } => Ok(vec![self.set_entry(at, None)?]),
            Effect::Rename { from, to, exchange } => self.rename(from, to, *exchange),
            Effect::Sync { .. } | Effect::SyncFs => Ok(Vec::new()),
            Effect::Write { id, .. }
            | Effect::Copy { id, .. }
            | Effect::Truncate { id, .. }
            | Effect::Fallocate { id, .. } => {
                self.change_data(*id, effect)?;
                Ok(Vec::new())
            }
            Effect::Chmod { id, .. }
            | Effect::Chown { id, .. }
            | Effect::Utimes { id, .. }
            | Effect::SetXattr { id, .. }
            | Effect::DelXattr { id, .. }
            | Effect::SetAcl { id, .. } => {
                set_attribute(self.get_mut(*id)?, effect);
                Ok(Vec::new())
            }
        }
    }

    fn blank(&self, kind: Kind, mode: u32) -> Inode {
        Inode {
            kind,
            mode,
            uid: self.owner.0,
            gid: self.owner.1,
            ino: 0,
            links: BTreeSet::new(),
            root: None,
            mtime: None,
            xattrs: BTreeMap::new(),
            acl: None,
            default_acl: None,
        }
    }

    fn get_mut(&mut self, id: Id) -> Result<&mut Inode, String> {
        self.inodes
            .get_mut(&id)
            .ok_or_else(|| format!("no object {id}"))
    }

    fn create(&mut self, parent: Id, id: Id, mode: u32, node: &NewNode) -> Result<(), String> {
        let kind = match node {
            NewNode::File => Kind::File(FileData::default()),
            NewNode::Dir => Kind::Dir(BTreeMap::new()),
            NewNode::Symlink(target) => Kind::Symlink(target.clone()),
            NewNode::Fifo => Kind::Fifo,
            NewNode::Socket => Kind::Socket,
            NewNode::Char(major, minor) => Kind::Char(*major, *minor),
        };
        let mut inode = self.blank(kind, mode);
        let inherited = self.get_mut(parent)?.default_acl;
        if let (Some(acl), false) = (inherited, matches!(node, NewNode::Symlink(_))) {
            let acl = acl.inherited(mode);
            inode.mode = mode & !0o777 | acl.mode();
            inode.acl = Some(acl);
            if *node == NewNode::Dir {
                inode.default_acl = inherited;
            }
        }
        match self.inodes.insert(id, inode) {
            None => Ok(()),
            Some(_) => Err(format!("object {id} created twice")),
        }
    }

    /// Makes an entry lead to `new`, keeping links, pools and times in step.
    fn set_entry(&mut self, at: &Place, new: Option<Id>) -> Result<EdgeChange, String> {
        let parent = self.get_mut(at.parent)?;
        parent.mtime = None;
        let Kind::Dir(entries) = &mut parent.kind else {
            return Err(format!("object {} is not a directory", at.parent));
        };
        let old = match new {
            Some(id) => entries.insert(at.name.clone(), id),
            None => entries.remove(&at.name),
        };
        if let Some(id) = old {
            let inode = self.get_mut(id)?;
            inode.links.remove(at);
            if inode.links.is_empty() {
                self.files.remove(id);
                self.dirs.remove(id);
                self.linked.remove(id);
            }
        }
        if let Some(id) = new {
            let inode = self.get_mut(id)?;
            inode.links.insert(at.clone());
            match inode.kind {
                Kind::File(_) => self.files.add(id),
                Kind::Dir(_) => self.dirs.add(id),
                _ => {}
            }
            self.linked.add(id);
        }
        Ok(EdgeChange {
            at: at.clone(),
            old,
            new,
        })
    }

    fn rename(
        &mut self,
        from: &Place,
        to: &Place,
        exchange: bool,
    ) -> Result<Vec<EdgeChange>, String> {
        let moved = self
            .lookup(from)
            .ok_or_else(|| format!("no entry {from}"))?;
        let target = self.lookup(to);
        // POSIX: two names of one inode are left alone.
        if target == Some(moved) {
            return Ok(Vec::new());
        }
        let back = if exchange { target } else { None };
        let over = self.set_entry(to, None)?;
        let mut gone = self.set_entry(from, None)?;
        let mut made = self.set_entry(to, Some(moved))?;
        made.old = over.old;
        if back.is_some() {
            gone = EdgeChange {
                old: gone.old,
                ..self.set_entry(from, back)?
            };
        }
        Ok(vec![gone, made])
    }

    fn change_data(&mut self, id: Id, effect: &Effect) -> Result<(), String> {
        let copied = match effect {
            Effect::Copy {
                src, src_off, len, ..
            } => {
                let data = self.file(*src).ok_or_else(|| format!("no file {src}"))?;
                data.map.slice(*src_off, *len)
            }
            _ => Vec::new(),
        };
        let inode = self.get_mut(id)?;
        inode.mtime = None;
        let Kind::File(data) = &mut inode.kind else {
            return Err(format!("object {id} is not a file"));
        };
        let before = data.map.total();
        match *effect {
            Effect::Write {
                off, len, stamp, ..
            } => data.write(off, len, stamp),
            Effect::Copy {
                src_off, off, len, ..
            } => data.copy_in(&copied, src_off, off, len),
            Effect::Truncate { size, .. } => data.truncate(size),
            Effect::Fallocate { mode, off, len, .. } => fallocate(data, mode, off, len),
            _ => {}
        }
        let after = data.map.total();
        self.used = self.used - before + after;
        Ok(())
    }
}

/// Applies `fallocate` to file data.
fn fallocate(data: &mut FileData, mode: Falloc, off: u64, len: u64) {
    match mode {
        Falloc::Alloc | Falloc::AllocKeep => data.map.fill_gaps(off, len),
        Falloc::Zero | Falloc::ZeroKeep => {
            data.map.clear(off, len);
            data.map.fill_gaps(off, len);
        }
        Falloc::Punch => data.map.clear(off, len),
        Falloc::Collapse => {
            data.map.collapse(off, len);
            data.size -= len.min(data.size);
        }
        Falloc::Insert => {
            data.map.insert(off, len);
            data.size += len;
        }
    }
    if matches!(mode, Falloc::Alloc | Falloc::Zero) {
        data.size = data.size.max(off + len);
    }
}

fn set_attribute(inode: &mut Inode, effect: &Effect) {
    match effect {
        Effect::Chmod { mode, .. } => {
            inode.mode = *mode;
            inode.acl = inode.acl.map(|acl| acl.with_mode(*mode));
        }
        Effect::Chown { uid, gid, .. } => (inode.uid, inode.gid) = (*uid, *gid),
        Effect::Utimes { sec, nsec, .. } => inode.mtime = Some((*sec, *nsec)),
        Effect::SetXattr {
            name, stamp, len, ..
        } => {
            inode.xattrs.insert(name.clone(), (*stamp, *len));
        }
        Effect::DelXattr { name, .. } => {
            inode.xattrs.remove(name);
        }
        Effect::SetAcl {
            default: true, acl, ..
        } => inode.default_acl = *acl,
        Effect::SetAcl {
            default: false,
            acl,
            ..
        } => {
            if let Some(acl) = acl {
                inode.mode = inode.mode & !0o777 | acl.mode();
            }
            inode.acl = *acl;
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(parent: Id, name: &str) -> Place {
        Place {
            parent,
            name: name.as_bytes().to_vec(),
        }
    }

    fn model() -> Model {
        let mut model = Model::new((0, 0));
        model.add_root(1, b"p0".to_vec(), 10);
        for (id, name) in [(5, "a"), (6, "b")] {
            let (at, node) = (place(1, name), NewNode::File);
            model
                .apply(&Effect::Create {
                    at,
                    id,
                    mode: 0o644,
                    node,
                })
                .unwrap();
        }
        model
    }

    fn rename(model: &mut Model, from: &str, to: &str, exchange: bool) -> Vec<EdgeChange> {
        let (from, to) = (place(1, from), place(1, to));
        model.apply(&Effect::Rename { from, to, exchange }).unwrap()
    }

    #[test]
    fn rename_over_a_file_unlinks_it() {
        let mut model = model();
        let changes = rename(&mut model, "a", "b", false);
        assert_eq!(
            changes[0],
            EdgeChange {
                at: place(1, "a"),
                old: Some(5),
                new: None
            }
        );
        assert_eq!(
            changes[1],
            EdgeChange {
                at: place(1, "b"),
                old: Some(6),
                new: Some(5)
            }
        );
        assert_eq!(model.nlink(6), Some(0));
        assert_eq!(model.files.ids(), [5]);
    }

    #[test]
    fn rename_of_one_inode_onto_itself_keeps_both_names() {
        let mut model = model();
        model
            .apply(&Effect::Link {
                at: place(1, "c"),
                id: 5,
            })
            .unwrap();
        assert_eq!(rename(&mut model, "a", "c", false), []);
        assert_eq!(model.nlink(5), Some(2));
    }

    #[test]
    fn exchange_reports_both_entries() {
        let mut model = model();
        let changes = rename(&mut model, "a", "b", true);
        assert_eq!(
            changes[0],
            EdgeChange {
                at: place(1, "a"),
                old: Some(5),
                new: Some(6)
            }
        );
        assert_eq!(
            changes[1],
            EdgeChange {
                at: place(1, "b"),
                old: Some(6),
                new: Some(5)
            }
        );
    }
}
