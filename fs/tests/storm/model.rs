//! What a file system should hold, and what it may hold after a power cut.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Arc, LazyLock};

pub const SECTOR: usize = 512;

type Sector = Arc<[u8; SECTOR]>;

static ZEROS: LazyLock<Sector> = LazyLock::new(|| Arc::new([0; SECTOR]));

/// The bytes of a file; versions share what they have in common.
#[derive(Clone, Default)]
pub struct Content {
    pub size: u64,
    /// What is missing at the end is zeros; so is what stands behind `size`.
    sectors: Vec<Sector>,
}

impl Content {
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

    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        let end = at + bytes.len() as u64;
        self.change(at, end, |byte| bytes[(byte - at) as usize]);
        self.size = self.size.max(end);
    }

    pub fn zero(&mut self, from: u64, to: u64) {
        self.change(from, to.min(self.size), |_| 0);
    }

    pub fn truncate(&mut self, size: u64) {
        self.zero(size, self.size);
        self.size = size;
        self.sectors.truncate((size as usize).div_ceil(SECTOR));
    }

    /// Cuts `from..to` out, or opens it; both in whole sectors.
    pub fn shift(&mut self, from: u64, to: u64, collapse: bool) {
        let last = (self.size as usize).div_ceil(SECTOR);
        self.sectors.resize(last, ZEROS.clone());
        let (at, end) = (from as usize / SECTOR, to as usize / SECTOR);
        if collapse {
            self.sectors.drain(at..end);
            self.size -= to - from;
        } else {
            let zeros = std::iter::repeat_n(ZEROS.clone(), end - at);
            self.sectors.splice(at..at, zeros);
            self.size += to - from;
        }
    }

    pub fn to_vec(&self) -> Vec<u8> {
        let len = self.size as usize;
        let mut bytes: Vec<u8> = (0..len.div_ceil(SECTOR))
            .flat_map(|index| *self.sector(index))
            .collect();
        bytes.truncate(len);
        bytes
    }
}

pub enum Kind {
    File,
    Symlink(Vec<u8>),
    Dir {
        parent: usize,
        entries: BTreeMap<String, usize>,
    },
}

/// Content after an operation that changed it.
pub struct Version {
    pub op: usize,
    pub content: Content,
    /// Where the write ended. Writes of the page cache have no order among each other: the file may
    /// for a time have this size, with an earlier, longer write still on its way.
    pub end: u64,
}

/// An inode of the model.
pub struct Node {
    pub ino: u32,
    pub kind: Kind,
    pub links: u32,
    pub xattrs: BTreeMap<String, Vec<u8>>,
    pub content: Content,
    pub versions: Vec<Version>,
    /// The last operation that changed its metadata.
    pub changed: usize,
    /// The last that made it, or changed its content, size or entries.
    pub data_changed: usize,
}

impl Node {
    pub fn entries(&self) -> &BTreeMap<String, usize> {
        match &self.kind {
            Kind::Dir { entries, .. } => entries,
            _ => panic!("not a directory"),
        }
    }

    pub fn entries_mut(&mut self) -> &mut BTreeMap<String, usize> {
        match &mut self.kind {
            Kind::Dir { entries, .. } => entries,
            _ => panic!("not a directory"),
        }
    }

    pub fn is_file(&self) -> bool {
        matches!(self.kind, Kind::File)
    }

    pub fn is_dir(&self) -> bool {
        matches!(self.kind, Kind::Dir { .. })
    }
}

/// One name, as a walk of the model or of the file system sees it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Line {
    pub path: String,
    pub attrs: String,
}

/// All names at one time, and the nodes of the model they stand for.
pub struct Snapshot {
    pub lines: Vec<Line>,
    pub nodes: Vec<usize>,
}

pub fn attrs_line(
    kind: char,
    links: u32,
    size: Option<u64>,
    target: &[u8],
    xattrs: impl Iterator<Item = (String, Vec<u8>)>,
) -> String {
    let mut line = format!("{kind} links {links}");
    if let Some(size) = size {
        write!(line, " size {size}").unwrap();
    }
    if !target.is_empty() {
        write!(line, " -> {}", String::from_utf8_lossy(target)).unwrap();
    }
    for (name, value) in xattrs {
        let sum = crc32c::crc32c(&value);
        write!(line, " {name}={}:{sum:08x}", value.len()).unwrap();
    }
    line
}

/// The file system as it should be.
pub struct Model {
    pub nodes: Vec<Node>,
    /// Nodes that have a name, directories and others.
    pub with_sizes: bool,
}

impl Model {
    pub fn new(with_sizes: bool) -> Self {
        let kind = Kind::Dir {
            parent: 0,
            entries: BTreeMap::new(),
        };
        let mut model = Self {
            nodes: Vec::new(),
            with_sizes,
        };
        model.add(super::ROOT, kind, 0);
        // lost+found
        model.nodes[0].links = 3;
        model
    }

    pub fn add(&mut self, ino: u32, kind: Kind, op: usize) -> usize {
        let links = if matches!(kind, Kind::Dir { .. }) {
            2
        } else {
            1
        };
        self.nodes.push(Node {
            ino,
            kind,
            links,
            xattrs: BTreeMap::new(),
            content: Content::default(),
            versions: vec![Version {
                op,
                content: Content::default(),
                end: 0,
            }],
            changed: op,
            data_changed: op,
        });
        self.nodes.len() - 1
    }

    /// Nodes with names, each directory with the name of its parent first.
    pub fn walk(&self, visit: &mut impl FnMut(&str, usize)) {
        self.walk_dir(0, "", visit);
    }

    fn walk_dir(&self, dir: usize, path: &str, visit: &mut impl FnMut(&str, usize)) {
        for (name, &id) in self.nodes[dir].entries() {
            let path = format!("{path}/{name}");
            visit(&path, id);
            if self.nodes[id].is_dir() {
                self.walk_dir(id, &path, visit);
            }
        }
    }

    pub fn snapshot(&self) -> Snapshot {
        let mut snapshot = Snapshot {
            lines: Vec::new(),
            nodes: Vec::new(),
        };
        let mut push = |path: &str, id: usize| {
            let node = &self.nodes[id];
            let (kind, target): (_, &[u8]) = match &node.kind {
                Kind::File => ('f', &[]),
                Kind::Symlink(target) => ('l', target),
                Kind::Dir { .. } => ('d', &[]),
            };
            let size = (self.with_sizes && node.is_file()).then_some(node.content.size);
            let xattrs = node.xattrs.iter().map(|(n, v)| (n.clone(), v.clone()));
            snapshot.lines.push(Line {
                path: path.to_owned(),
                attrs: attrs_line(kind, node.links, size, target, xattrs),
            });
            snapshot.nodes.push(id);
        };
        push("/", 0);
        self.walk(&mut push);
        snapshot
    }

    /// Whether `dir` is `top` or stands below it.
    pub fn is_below(&self, mut dir: usize, top: usize) -> bool {
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
}
