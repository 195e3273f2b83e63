//! What the directory of a workload holds after each operation, and what may be there after a power
//! cut.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, LazyLock};

use super::script::{Falloc, How, Op};

/// The unit in which writes are mixed with what was there before.
pub const SECTOR: usize = 512;

type Sector = Arc<[u8; SECTOR]>;

static ZEROS: LazyLock<Sector> = LazyLock::new(|| Arc::new([0; SECTOR]));

/// Byte `at` of what operation `op` writes: no zero, and another for each operation and place.
#[must_use]
pub fn stamp(op: usize, at: u64) -> u8 {
    let word = (op as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ (at >> 3).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let word = word ^ (word >> 29);
    ((word >> ((at & 7) * 8)) as u8) | 1
}

/// The bytes that operation `op` writes.
#[must_use]
pub fn stamps(op: usize, at: u64, len: u64) -> Vec<u8> {
    (at..at + len).map(|at| stamp(op, at)).collect()
}

/// The value that operation `op` gives an attribute.
#[must_use]
pub fn xattr_value(op: usize, len: u64) -> Vec<u8> {
    stamps(op, 1 << 40, len)
}

/// The bytes of a file; versions share what they have in common.
#[derive(Clone, Debug, Default)]
pub struct Content {
    /// In bytes.
    pub size: u64,
    /// What is missing at the end is zeros; so is what stands behind `size`.
    sectors: Vec<Sector>,
}

impl Content {
    /// The given bytes.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Self {
        let mut content = Self::default();
        content.change(0, bytes.len() as u64, |at| bytes[at as usize]);
        content.size = bytes.len() as u64;
        content
    }

    /// The bytes of a sector.
    #[must_use]
    pub fn sector(&self, index: usize) -> &[u8; SECTOR] {
        self.sectors.get(index).unwrap_or(&ZEROS)
    }

    fn change(&mut self, from: u64, to: u64, byte: impl Fn(u64) -> u8) {
        if from >= to {
            return;
        }
        let last = (to as usize).div_ceil(SECTOR);
        if self.sectors.len() < last {
            self.sectors.resize(last, ZEROS.clone());
        }
        for index in from as usize / SECTOR..last {
            let start = (index * SECTOR) as u64;
            let sector = Arc::make_mut(&mut self.sectors[index]);
            for at in start.max(from)..(start + SECTOR as u64).min(to) {
                sector[(at - start) as usize] = byte(at);
            }
        }
    }

    fn zero(&mut self, from: u64, to: u64) {
        self.change(from, to.min(self.size), |_| 0);
    }

    fn truncate(&mut self, size: u64) {
        self.zero(size, self.size);
        self.size = size;
        self.sectors.truncate((size as usize).div_ceil(SECTOR));
    }
}

/// What a name stands for.
#[derive(Clone, Debug)]
pub enum Kind {
    /// A regular file.
    File,
    /// A symbolic link, and where to.
    Symlink(Vec<u8>),
    /// A directory.
    Dir {
        /// Its parent, 0 for the top.
        parent: usize,
        /// Names.
        entries: BTreeMap<String, usize>,
    },
    /// Anything else that was there before.
    Other,
}

/// Content after an operation that changed it.
#[derive(Clone, Debug)]
pub struct Version {
    /// The operation.
    pub op: usize,
    /// What it left.
    pub content: Content,
    /// Where the write ended. Writes of the page cache have no order among each other: the file may
    /// for a time have this size, with an earlier, longer write still on its way.
    pub end: u64,
}

/// An inode.
#[derive(Clone, Debug)]
pub struct Node {
    /// What it is.
    pub kind: Kind,
    /// Permissions.
    pub mode: u16,
    /// Names that stand for it.
    pub links: u32,
    /// Extended attributes.
    pub xattrs: BTreeMap<String, Vec<u8>>,
    /// Bytes now.
    pub content: Content,
    /// Bytes over time.
    pub versions: Vec<Version>,
    /// The last operation that changed its metadata.
    pub changed: usize,
    /// The last that made it, or changed its content, size or entries.
    pub data_changed: usize,
}

impl Node {
    /// A node that was there at the start.
    #[must_use]
    pub fn new(kind: Kind, mode: u16, links: u32, op: usize) -> Self {
        let first = Version {
            op,
            content: Content::default(),
            end: 0,
        };
        Self {
            kind,
            mode,
            links,
            xattrs: BTreeMap::new(),
            content: Content::default(),
            versions: vec![first],
            changed: op,
            data_changed: op,
        }
    }

    fn is_dir(&self) -> bool {
        matches!(self.kind, Kind::Dir { .. })
    }
}

/// One name as a walk of the model or of a file system sees it.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Line {
    /// Below the top; empty for the top itself.
    pub path: String,
    /// Everything about it but its content.
    pub attrs: String,
}

/// Writes what a walk tells of a name.
#[must_use]
pub fn attrs_line(
    kind: char,
    mode: u16,
    links: u32,
    size: Option<u64>,
    target: &[u8],
    xattrs: &BTreeMap<String, Vec<u8>>,
) -> String {
    use std::fmt::Write;
    let mut line = format!("{kind} mode {:o} links {links}", mode & 0o7777);
    // Writing to a string does not fail.
    if let Some(size) = size {
        write!(line, " size {size}").ok();
    }
    if !target.is_empty() {
        write!(line, " -> {}", String::from_utf8_lossy(target)).ok();
    }
    for (name, value) in xattrs {
        write!(line, " {name}={}:{:08x}", value.len(), short_hash(value)).ok();
    }
    line
}

fn short_hash(bytes: &[u8]) -> u32 {
    hash_of(&bytes) as u32
}

/// A number for anything.
#[must_use]
pub fn hash_of(what: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    hasher.finish()
}

/// All names at one time, and the nodes they stand for.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Names, each directory before what is in it.
    pub lines: Vec<Line>,
    /// The node of each line.
    pub nodes: Vec<usize>,
    /// Of `lines`.
    pub hash: u64,
}

/// What a promise is about.
#[derive(Clone, Debug)]
pub struct Promised {
    /// All changes of names and attributes up to this operation.
    pub upto: usize,
    /// Content of these nodes up to the given operation.
    pub files: Vec<(usize, usize)>,
}

/// Why the model does not do an operation; a file system must refuse it too.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "as errno(3)")]
pub enum Refused {
    #[error("no such file or directory")]
    NotFound,
    #[error("file exists")]
    Exists,
    #[error("not a directory, or not a file")]
    Kind,
    #[error("directory not empty")]
    NotEmpty,
    #[error("invalid argument")]
    Invalid,
    #[error("no such attribute")]
    NoData,
}

/// The directory of a workload as it should be.
#[derive(Clone, Debug)]
pub struct Model {
    /// All nodes there ever were; the first is the top.
    pub nodes: Vec<Node>,
    /// Whether sizes are those of the names' time.
    pub with_sizes: bool,
}

impl Model {
    fn entries(&self, dir: usize) -> Result<&BTreeMap<String, usize>, Refused> {
        match &self.nodes[dir].kind {
            Kind::Dir { entries, .. } => Ok(entries),
            _ => Err(Refused::Kind),
        }
    }

    fn entries_mut(&mut self, dir: usize) -> Result<&mut BTreeMap<String, usize>, Refused> {
        match &mut self.nodes[dir].kind {
            Kind::Dir { entries, .. } => Ok(entries),
            _ => Err(Refused::Kind),
        }
    }

    fn find(&self, path: &str) -> Result<usize, Refused> {
        let mut node = 0;
        for name in path.split('/').filter(|name| *name != ".") {
            node = *self.entries(node)?.get(name).ok_or(Refused::NotFound)?;
        }
        Ok(node)
    }

    fn file(&self, path: &str) -> Result<usize, Refused> {
        let id = self.find(path)?;
        match self.nodes[id].kind {
            Kind::File => Ok(id),
            _ => Err(Refused::Kind),
        }
    }

    /// The directory of a name, and the name.
    fn place(&self, path: &str) -> Result<(usize, String), Refused> {
        let (dir, name) = match path.rsplit_once('/') {
            Some((dir, name)) => (self.find(dir)?, name),
            None => (0, path),
        };
        if name == "." {
            return Err(Refused::Invalid);
        }
        self.entries(dir)?;
        Ok((dir, name.to_owned()))
    }

    fn changed(&mut self, ids: &[usize], op: usize) {
        for &id in ids {
            self.nodes[id].changed = op;
        }
    }

    fn listed(&mut self, dirs: &[usize], op: usize) {
        for &id in dirs {
            self.nodes[id].changed = op;
            self.nodes[id].data_changed = op;
        }
    }

    fn make(&mut self, path: &str, kind: Kind, mode: u16, op: usize) -> Result<(), Refused> {
        let (dir, name) = self.place(path)?;
        if self.entries(dir)?.contains_key(&name) {
            return Err(Refused::Exists);
        }
        let (kind, is_dir) = match kind {
            Kind::Dir { entries, .. } => {
                let parent = dir;
                (Kind::Dir { parent, entries }, true)
            }
            other => (other, false),
        };
        let id = self.nodes.len();
        let links = 1 + u32::from(is_dir);
        self.nodes.push(Node::new(kind, mode, links, op));
        self.entries_mut(dir)?.insert(name, id);
        self.nodes[dir].links += u32::from(is_dir);
        self.listed(&[dir], op);
        Ok(())
    }

    /// A node lost its name in `dir`.
    fn lost_name(&mut self, dir: usize, id: usize, op: usize) {
        self.changed(&[id], op);
        self.listed(&[dir], op);
        if self.nodes[id].is_dir() {
            self.nodes[id].links = 0;
            self.nodes[dir].links -= 1;
        } else {
            self.nodes[id].links -= 1;
        }
    }

    fn is_below(&self, mut dir: usize, top: usize) -> bool {
        loop {
            if dir == top {
                return true;
            }
            match self.nodes[dir].kind {
                Kind::Dir { parent, .. } if dir != 0 => dir = parent,
                _ => return false,
            }
        }
    }

    fn move_dir(&mut self, id: usize, from: usize, to: usize) {
        if let Kind::Dir { parent, .. } = &mut self.nodes[id].kind {
            *parent = to;
            self.nodes[from].links -= 1;
            self.nodes[to].links += 1;
        }
    }

    fn rename(&mut self, from: &str, to: &str, op: usize) -> Result<(), Refused> {
        let (dir, name) = self.place(from)?;
        let (to_dir, new_name) = self.place(to)?;
        let id = *self.entries(dir)?.get(&name).ok_or(Refused::NotFound)?;
        let target = self.entries(to_dir)?.get(&new_name).copied();
        if target == Some(id) {
            return Ok(());
        }
        let is_dir = self.nodes[id].is_dir();
        if is_dir && self.is_below(to_dir, id) {
            return Err(Refused::Invalid);
        }
        if let Some(target) = target {
            if self.nodes[target].is_dir() != is_dir {
                return Err(Refused::Kind);
            }
            if is_dir && !self.entries(target)?.is_empty() {
                return Err(Refused::NotEmpty);
            }
        }
        self.entries_mut(dir)?.remove(&name);
        self.entries_mut(to_dir)?.insert(new_name, id);
        self.move_dir(id, dir, to_dir);
        self.changed(&[id], op);
        self.listed(&[dir, to_dir], op);
        if let Some(target) = target {
            self.lost_name(to_dir, target, op);
        }
        Ok(())
    }

    fn exchange(&mut self, from: &str, to: &str, op: usize) -> Result<(), Refused> {
        let (dir, name) = self.place(from)?;
        let (to_dir, new_name) = self.place(to)?;
        let id = *self.entries(dir)?.get(&name).ok_or(Refused::NotFound)?;
        let other = *self
            .entries(to_dir)?
            .get(&new_name)
            .ok_or(Refused::NotFound)?;
        if id == other {
            return Ok(());
        }
        let refused = (self.nodes[id].is_dir() && self.is_below(to_dir, id))
            || (self.nodes[other].is_dir() && self.is_below(dir, other));
        if refused {
            return Err(Refused::Invalid);
        }
        self.entries_mut(dir)?.insert(name, other);
        self.entries_mut(to_dir)?.insert(new_name, id);
        self.move_dir(id, dir, to_dir);
        self.move_dir(other, to_dir, dir);
        self.changed(&[id, other], op);
        self.listed(&[dir, to_dir], op);
        Ok(())
    }

    /// The content of a file was changed.
    fn versioned(&mut self, id: usize, op: usize, end: Option<u64>) {
        let node = &mut self.nodes[id];
        let content = node.content.clone();
        let end = end.unwrap_or(content.size);
        node.versions.push(Version { op, content, end });
    }

    fn falloc(&mut self, id: usize, mode: Falloc, at: u64, len: u64) -> Result<(), Refused> {
        if len == 0 {
            return Err(Refused::Invalid);
        }
        let content = &mut self.nodes[id].content;
        if matches!(mode, Falloc::Punch | Falloc::Zero | Falloc::ZeroKeepSize) {
            content.zero(at, at + len);
        }
        if matches!(mode, Falloc::Plain | Falloc::Zero) {
            content.size = content.size.max(at + len);
        }
        Ok(())
    }

    /// Does an operation.
    ///
    /// # Errors
    /// Nothing is changed then.
    pub fn apply(&mut self, what: &Op, op: usize) -> Result<(), Refused> {
        match what {
            Op::Mkdir(path) => {
                let entries = BTreeMap::new();
                self.make(path, Kind::Dir { parent: 0, entries }, 0o755, op)
            }
            Op::Create(path) => self.make(path, Kind::File, 0o644, op),
            Op::Symlink { target, path } => {
                self.make(path, Kind::Symlink(target.clone().into_bytes()), 0o777, op)
            }
            Op::Link { from, to } => {
                let id = self.find(from)?;
                let (dir, name) = self.place(to)?;
                if self.nodes[id].is_dir() {
                    return Err(Refused::Kind);
                }
                if self.entries(dir)?.contains_key(&name) {
                    return Err(Refused::Exists);
                }
                self.entries_mut(dir)?.insert(name, id);
                self.nodes[id].links += 1;
                self.changed(&[id], op);
                self.listed(&[dir], op);
                Ok(())
            }
            Op::Unlink(path) | Op::Rmdir(path) => {
                let (dir, name) = self.place(path)?;
                let id = *self.entries(dir)?.get(&name).ok_or(Refused::NotFound)?;
                if self.nodes[id].is_dir() != matches!(what, Op::Rmdir(_)) {
                    return Err(Refused::Kind);
                }
                if self.entries(id).is_ok_and(|entries| !entries.is_empty()) {
                    return Err(Refused::NotEmpty);
                }
                self.entries_mut(dir)?.remove(&name);
                self.lost_name(dir, id, op);
                Ok(())
            }
            Op::Rename { from, to } => self.rename(from, to, op),
            Op::Exchange { from, to } => self.exchange(from, to, op),
            Op::Write { path, at, len, .. } => {
                let id = self.file(path)?;
                let end = at + len;
                if *len == 0 {
                    return Ok(());
                }
                let content = &mut self.nodes[id].content;
                if matches!(
                    what,
                    Op::Write {
                        how: How::Mapped,
                        ..
                    }
                ) && end > content.size
                {
                    return Err(Refused::Invalid);
                }
                let grows = end > content.size;
                content.change(*at, end, |at| stamp(op, at));
                content.size = content.size.max(end);
                self.versioned(id, op, (!self.with_sizes).then_some(end));
                // A write in place through the page cache brings no change of metadata in time.
                if grows || self.with_sizes {
                    self.changed(&[id], op);
                }
                if grows {
                    self.nodes[id].data_changed = op;
                }
                Ok(())
            }
            Op::Truncate { path, size } => {
                let id = self.file(path)?;
                self.nodes[id].content.truncate(*size);
                self.versioned(id, op, None);
                self.listed(&[id], op);
                Ok(())
            }
            Op::Falloc {
                path,
                at,
                len,
                mode,
            } => {
                let id = self.file(path)?;
                self.falloc(id, *mode, *at, *len)?;
                self.versioned(id, op, None);
                self.listed(&[id], op);
                Ok(())
            }
            Op::SetXattr { path, name, len } => {
                let id = self.find(path)?;
                self.nodes[id]
                    .xattrs
                    .insert(name.clone(), xattr_value(op, *len));
                self.changed(&[id], op);
                Ok(())
            }
            Op::RemoveXattr { path, name } => {
                let id = self.find(path)?;
                self.nodes[id].xattrs.remove(name).ok_or(Refused::NoData)?;
                self.changed(&[id], op);
                Ok(())
            }
            Op::Chmod { path, mode } => {
                let id = self.find(path)?;
                self.nodes[id].mode = *mode;
                self.changed(&[id], op);
                Ok(())
            }
            Op::Fsync(path) | Op::Fdatasync(path) => self.find(path).map(drop),
            Op::Sync => Ok(()),
        }
    }

    /// What is durable once an operation has returned.
    #[must_use]
    pub fn promised(&self, what: &Op, op: usize) -> Option<Promised> {
        let file = |path: &str, datasync: bool| {
            let id = self.find(path).ok()?;
            let node = &self.nodes[id];
            let upto = if datasync {
                node.data_changed
            } else {
                node.changed
            };
            let files = vec![(id, op)];
            Some(Promised { upto, files })
        };
        match what {
            Op::Fsync(path) => file(path, false),
            Op::Fdatasync(path) => file(path, true),
            Op::Write {
                path,
                how: How::Sync,
                ..
            } => file(path, false),
            Op::Sync => Some(self.all(op)),
            _ => None,
        }
    }

    /// The promise that all there is after an operation is durable.
    #[must_use]
    pub fn all(&self, op: usize) -> Promised {
        let files = (0..self.nodes.len()).map(|id| (id, op));
        Promised {
            upto: op,
            files: files.collect(),
        }
    }

    /// What a path stands for.
    #[must_use]
    pub fn kind(&self, path: &str) -> Option<&Kind> {
        self.find(path).ok().map(|id| &self.nodes[id].kind)
    }

    /// Bytes of a file.
    #[must_use]
    pub fn size(&self, path: &str) -> u64 {
        self.find(path).map_or(0, |id| self.nodes[id].content.size)
    }

    /// Paths of files, of directories (the top is empty), and of all but the top.
    #[must_use]
    pub fn names(&self) -> (Vec<String>, Vec<String>, Vec<String>) {
        let (mut files, mut dirs, mut names) = (Vec::new(), Vec::new(), Vec::new());
        let snapshot = self.snapshot();
        for (line, &id) in snapshot.lines.iter().zip(&snapshot.nodes) {
            let path = line.path.trim_start_matches('/').to_owned();
            match self.nodes[id].kind {
                Kind::File => files.push(path.clone()),
                Kind::Dir { .. } => dirs.push(path.clone()),
                _ => {}
            }
            if !path.is_empty() {
                names.push(path);
            }
        }
        (files, dirs, names)
    }

    /// All names now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let (mut lines, mut nodes) = (Vec::new(), Vec::new());
        self.visit("", 0, &mut lines, &mut nodes);
        let hash = hash_of(&lines);
        Snapshot { lines, nodes, hash }
    }

    fn visit(&self, path: &str, id: usize, lines: &mut Vec<Line>, nodes: &mut Vec<usize>) {
        let node = &self.nodes[id];
        let (letter, target): (_, &[u8]) = match &node.kind {
            Kind::File => ('f', &[]),
            Kind::Symlink(target) => ('l', target),
            Kind::Dir { .. } => ('d', &[]),
            Kind::Other => ('o', &[]),
        };
        let size = (self.with_sizes && letter == 'f').then_some(node.content.size);
        let attrs = attrs_line(letter, node.mode, node.links, size, target, &node.xattrs);
        let line = Line {
            path: path.to_owned(),
            attrs,
        };
        lines.push(line);
        nodes.push(id);
        if let Kind::Dir { entries, .. } = &node.kind {
            for (name, &id) in entries {
                self.visit(&format!("{path}/{name}"), id, lines, nodes);
            }
        }
    }
}
