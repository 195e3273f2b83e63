//! A walk over all names of a mounted file system that reads everything.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::channel;

use fs::dir::Emit;
use fs::{Fs, FsError, FsResult};

use super::disk::is_stale;
use super::model::{Content, Kind, Line, Model, Node, SECTOR, Version, attrs_line, hash_of};

const ROOT: u32 = 2;
/// Bytes of one read.
const PART: u32 = 1 << 17;

/// The directory that workloads have for themselves.
pub const WORK: &str = "crashtest.dir";

/// A file system as it was found.
#[derive(Debug)]
pub struct Found {
    /// Names below the workload's directory, that first.
    pub lines: Vec<Line>,
    /// Of `lines`.
    pub hash: u64,
    /// The content of each line that is a file.
    pub contents: Vec<Option<Vec<u8>>>,
    /// All other names, with attributes and content.
    pub others: u64,
    /// A file that shows what was never written.
    pub stale: Option<String>,
    /// How many names there are.
    pub names: usize,
}

struct Walk<'a> {
    fs: &'a Arc<Fs>,
    with_sizes: bool,
    found: Found,
    others: Vec<(Line, u64)>,
}

/// Where a walk is.
#[derive(Clone, Copy)]
enum Side {
    Work,
    Other,
}

fn read(fs: &Arc<Fs>, ino: u32, offset: u64) -> FsResult<Vec<u8>> {
    let (sender, receiver) = channel();
    let inode = fs.iget(ino)?;
    let reply = Box::new(move |res: Result<&[u8], FsError>| {
        // Nobody waits any more only where the wait below has failed.
        sender.send(res.map(<[u8]>::to_vec)).ok();
    });
    fs.read(&inode, offset, PART, reply);
    drop(inode);
    match receiver.recv() {
        Ok(res) => res,
        Err(_unanswered) => Err(FsError::Invalid),
    }
}

fn read_all(fs: &Arc<Fs>, ino: u32, size: u64, mut take: impl FnMut(&[u8])) -> FsResult {
    let mut at = 0;
    while at < size {
        let part = read(fs, ino, at)?;
        if part.is_empty() {
            return Err(FsError::Invalid);
        }
        take(&part);
        at += part.len() as u64;
    }
    Ok(())
}

/// Walks.
///
/// # Errors
/// The first thing that cannot be read, and where it stands.
pub fn walk(fs: &Arc<Fs>, with_sizes: bool) -> Result<Found, String> {
    let mut walk = Walk {
        fs,
        with_sizes,
        found: Found {
            lines: Vec::new(),
            hash: 0,
            contents: Vec::new(),
            others: 0,
            stale: None,
            names: 0,
        },
        others: Vec::new(),
    };
    walk.visit("", ROOT, Side::Other)?;
    let mut found = walk.found;
    found.hash = hash_of(&found.lines);
    found.others = hash_of(&walk.others);
    found.names = found.lines.len() + walk.others.len();
    Ok(found)
}

impl Walk<'_> {
    fn visit(&mut self, path: &str, ino: u32, side: Side) -> Result<(), String> {
        self.look(path, ino, side)
            .map_err(|error| format!("{path:?}, inode {ino}: {error}"))?;
        let attr = self
            .fs
            .getattr(ino)
            .map_err(|error| format!("{path:?}: {error}"))?;
        if u32::from(attr.mode) & libc::S_IFMT != libc::S_IFDIR {
            return Ok(());
        }
        let mut names = Vec::new();
        self.fs
            .readdir(ino, 0, &mut |entry| {
                names.push((entry.name.to_vec(), entry.ino));
                Emit::More
            })
            .map_err(|error| format!("{path:?}: readdir: {error}"))?;
        names.sort();
        for (name, child) in names {
            if name == b"." || name == b".." {
                continue;
            }
            // As a lookup gives it: each name must be found.
            let looked_up = self
                .fs
                .lookup(ino, &name)
                .map(|attr| attr.map(|attr| attr.ino));
            let text = String::from_utf8_lossy(&name);
            if looked_up != Ok(Some(child)) {
                return Err(format!(
                    "{path}/{text} is listed as {child}, lookup gives {looked_up:?}"
                ));
            }
            if ino == ROOT && text == WORK {
                self.visit("", child, Side::Work)?;
            } else {
                self.visit(&format!("{path}/{text}"), child, side)?;
            }
        }
        Ok(())
    }

    fn look(&mut self, path: &str, ino: u32, side: Side) -> FsResult {
        let attr = self.fs.getattr(ino)?;
        let mut xattrs = BTreeMap::new();
        for name in self.fs.listxattr(ino)?.split(|&byte| byte == 0) {
            if !name.is_empty() {
                let value = self.fs.getxattr(ino, name)?;
                xattrs.insert(String::from_utf8_lossy(name).into_owned(), value);
            }
        }
        let (letter, target) = match u32::from(attr.mode) & libc::S_IFMT {
            libc::S_IFDIR => ('d', Vec::new()),
            libc::S_IFLNK => ('l', self.fs.readlink(ino)?),
            libc::S_IFREG => ('f', Vec::new()),
            _ => ('o', Vec::new()),
        };
        let is_file = letter == 'f';
        let with_size = is_file && (self.with_sizes || matches!(side, Side::Other));
        let size = with_size.then_some(attr.size);
        let line = Line {
            path: path.to_owned(),
            attrs: attrs_line(letter, attr.mode, attr.nlink, size, &target, &xattrs),
        };
        let mut content = Vec::new();
        let mut sum = 0;
        let mut stale = None;
        if is_file {
            let mut at = 0;
            read_all(self.fs, ino, attr.size, |part| {
                for sector in part.chunks(SECTOR) {
                    if is_stale(sector) && stale.is_none() {
                        stale = Some(at);
                    }
                    at += sector.len() as u64;
                }
                match side {
                    Side::Work => content.extend_from_slice(part),
                    Side::Other => sum = hash_of(&(sum, part)),
                }
            })?;
        }
        if let (Some(at), None) = (stale, &self.found.stale) {
            let text = format!("{path:?}, inode {ino}: byte {at} shows what was never written");
            self.found.stale = Some(text);
        }
        match side {
            Side::Work => {
                self.found.lines.push(line);
                self.found.contents.push(is_file.then_some(content));
            }
            Side::Other => self.others.push((line, sum)),
        }
        Ok(())
    }
}

/// The model of what a walk has found.
#[must_use]
pub fn model_of(found: &Found, attrs: &BTreeMap<String, Known>, with_sizes: bool) -> Model {
    let mut model = Model {
        nodes: Vec::new(),
        with_sizes,
    };
    let mut by_ino: BTreeMap<u32, usize> = BTreeMap::new();
    for (line, content) in found.lines.iter().zip(&found.contents) {
        let Some(known) = attrs.get(&line.path) else {
            continue;
        };
        let id = *by_ino.entry(known.ino).or_insert_with(|| {
            let kind = match u32::from(known.mode) & libc::S_IFMT {
                libc::S_IFDIR => Kind::Dir {
                    parent: 0,
                    entries: BTreeMap::new(),
                },
                libc::S_IFLNK => Kind::Symlink(known.target.clone()),
                libc::S_IFREG => Kind::File,
                _ => Kind::Other,
            };
            let mut node = Node::new(kind, known.mode & 0o7777, known.links, 0);
            node.xattrs = known.xattrs.clone();
            if let Some(content) = content {
                node.content = Content::new(content);
                node.versions = vec![Version {
                    op: 0,
                    content: node.content.clone(),
                    end: node.content.size,
                }];
            }
            model.nodes.push(node);
            model.nodes.len() - 1
        });
        let Some((dir, name)) = line.path.rsplit_once('/') else {
            continue;
        };
        let dir = attrs.get(dir).and_then(|dir| by_ino.get(&dir.ino)).copied();
        let dir = dir.unwrap_or(0);
        if let Kind::Dir { entries, .. } = &mut model.nodes[dir].kind {
            entries.insert(name.to_owned(), id);
        }
        if let Kind::Dir { parent, .. } = &mut model.nodes[id].kind {
            *parent = dir;
        }
    }
    model
}

/// What the model needs to know of an inode.
#[derive(Debug)]
pub struct Known {
    ino: u32,
    mode: u16,
    links: u32,
    target: Vec<u8>,
    xattrs: BTreeMap<String, Vec<u8>>,
}

/// Asks for what [`model_of`] needs.
///
/// # Errors
/// The first thing that cannot be read.
pub fn known(fs: &Arc<Fs>, found: &Found) -> FsResult<BTreeMap<String, Known>> {
    let mut all = BTreeMap::new();
    for line in &found.lines {
        let mut ino = ROOT;
        let below = line.path.split('/').skip(1);
        for name in std::iter::once(WORK).chain(below) {
            ino = match fs.lookup(ino, name.as_bytes())? {
                Some(attr) => attr.ino,
                None => return Err(FsError::NotFound),
            };
        }
        let attr = fs.getattr(ino)?;
        let mut xattrs = BTreeMap::new();
        for name in fs.listxattr(ino)?.split(|&byte| byte == 0) {
            if !name.is_empty() {
                let text = String::from_utf8_lossy(name).into_owned();
                xattrs.insert(text, fs.getxattr(ino, name)?);
            }
        }
        let is_link = u32::from(attr.mode) & libc::S_IFMT == libc::S_IFLNK;
        let target = if is_link {
            fs.readlink(ino)?
        } else {
            Vec::new()
        };
        let known = Known {
            ino,
            mode: attr.mode,
            links: attr.nlink,
            target,
            xattrs,
        };
        all.insert(line.path.clone(), known);
    }
    Ok(all)
}
