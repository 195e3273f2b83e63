//! What happened when, what was promised, and whether a recovered file system keeps it.

use std::sync::Arc;

use fs::dir::Emit;
use fs::{Fs, FsResult};

use super::model::{Kind, Line, Model, SECTOR, Snapshot, attrs_line};
use super::{ROOT, read};

/// One operation of the storm.
pub struct Op {
    /// Operations of the disk that had begun when it began.
    pub began: u64,
    pub what: String,
    /// The names after it.
    pub after: Arc<Snapshot>,
}

/// What a call that makes things durable promised.
pub struct Promise {
    /// Operations of the disk that had begun when it returned.
    pub made: u64,
    /// The operation that promises.
    pub by: usize,
    /// All changes of metadata up to this operation.
    pub upto: usize,
    /// Content of these nodes up to the given operation.
    pub files: Vec<(usize, usize)>,
}

pub struct History {
    pub model: Model,
    /// The first is the state before the storm.
    pub ops: Vec<Op>,
    pub promises: Vec<Promise>,
}

/// A file system as it was found.
pub struct Found {
    pub lines: Vec<Line>,
    /// Of each line that is a file: its inode and size.
    files: Vec<Option<(u32, u64)>>,
}

/// Reads all names and attributes; data is read later.
pub fn walk(fs: &Arc<Fs>, with_sizes: bool) -> FsResult<Found> {
    let mut found = Found {
        lines: Vec::new(),
        files: Vec::new(),
    };
    let attr = fs.getattr(ROOT)?;
    visit(fs, "", ROOT, attr.nlink, with_sizes, &mut found)?;
    Ok(found)
}

fn visit(
    fs: &Arc<Fs>,
    path: &str,
    ino: u32,
    links: u32,
    with_sizes: bool,
    found: &mut Found,
) -> FsResult {
    let attr = fs.getattr(ino)?;
    let kind = u32::from(attr.mode) & libc::S_IFMT;
    let mut xattrs = Vec::new();
    for name in fs.listxattr(ino)?.split(|&byte| byte == 0) {
        if !name.is_empty() {
            let value = fs.getxattr(ino, name)?;
            xattrs.push((String::from_utf8_lossy(name).into_owned(), value));
        }
    }
    xattrs.sort();
    let (letter, target) = match kind {
        libc::S_IFDIR => ('d', Vec::new()),
        libc::S_IFLNK => ('l', fs.readlink(ino)?),
        _ => ('f', Vec::new()),
    };
    let is_file = kind == libc::S_IFREG;
    let size = (with_sizes && is_file).then_some(attr.size);
    found.lines.push(Line {
        path: if path.is_empty() { "/" } else { path }.to_owned(),
        attrs: attrs_line(letter, links, size, &target, xattrs.into_iter()),
    });
    found.files.push(is_file.then_some((ino, attr.size)));
    if kind != libc::S_IFDIR {
        return Ok(());
    }
    let mut names = Vec::new();
    fs.readdir(ino, 0, &mut |entry| {
        names.push((String::from_utf8_lossy(entry.name).into_owned(), entry.ino));
        Emit::More
    })?;
    names.sort();
    for (name, child) in names {
        // `noise` is another thread's, without promises.
        let skip = ino == ROOT && (name == "lost+found" || name == "noise");
        if name == "." || name == ".." || skip {
            continue;
        }
        // As a lookup gives it, and each name must be found.
        let looked_up = fs.lookup(ino, name.as_bytes())?.map(|attr| attr.ino);
        assert_eq!(looked_up, Some(child), "{path}/{name} is listed, not found");
        let links = fs.getattr(child)?.nlink;
        visit(
            fs,
            &format!("{path}/{name}"),
            child,
            links,
            with_sizes,
            found,
        )?;
    }
    Ok(())
}

impl History {
    /// Whether what was found can be there after a power cut when `at` operations of the disk had
    /// begun.
    pub fn check(&self, fs: &Arc<Fs>, found: &Found, at: u64) -> Result<usize, String> {
        let last = self.ops.iter().rposition(|op| op.began < at).unwrap_or(0);
        let kept = || self.promises.iter().filter(|promise| promise.made < at);
        let first = kept().map(|promise| promise.upto).max().unwrap_or(0);
        let mut problem = None;
        for op in (first..=last).rev() {
            if self.ops[op].after.lines != found.lines {
                continue;
            }
            match self.check_content(fs, found, op, last, at) {
                Ok(()) => return Ok(op),
                Err(error) => problem = Some(problem.unwrap_or(error)),
            }
        }
        if let Some(problem) = problem {
            return Err(problem);
        }
        let any = (0..self.ops.len()).rfind(|&op| self.ops[op].after.lines == found.lines);
        let mut text = match any {
            Some(op) => format!("the names are those after operation {op}; "),
            None => "the names are those of no time; ".to_owned(),
        };
        let by = kept().rfind(|promise| promise.upto == first);
        let by = by.map_or("nobody", |promise| &self.ops[promise.by].what);
        text += &format!("promised were {first} by {by}, at most {last} had begun\n");
        let near = (first..=last)
            .min_by_key(|&op| diff(&self.ops[op].after.lines, &found.lines).len())
            .unwrap_or(first);
        text += &format!(
            "nearest is the state after {near}: {}\n",
            self.ops[near].what
        );
        for line in diff(&self.ops[near].after.lines, &found.lines) {
            text += &line;
            text.push('\n');
        }
        let from = near.saturating_sub(5);
        for (op, record) in self.ops.iter().enumerate().take(near + 6).skip(from) {
            text += &format!("  operation {op} (at {}): {}\n", record.began, record.what);
        }
        Err(text)
    }

    fn check_content(
        &self,
        fs: &Arc<Fs>,
        found: &Found,
        op: usize,
        last: usize,
        at: u64,
    ) -> Result<(), String> {
        for (index, &id) in self.ops[op].after.nodes.iter().enumerate() {
            let node = &self.model.nodes[id];
            let Some((ino, size)) = found.files[index] else {
                continue;
            };
            if !matches!(node.kind, Kind::File) {
                continue;
            }
            let oldest = self
                .promises
                .iter()
                .filter(|promise| promise.made < at)
                .flat_map(|promise| &promise.files)
                .filter(|file| file.0 == id)
                .map(|file| file.1)
                .max()
                .unwrap_or(0);
            let begin = node
                .versions
                .iter()
                .rposition(|version| version.op <= oldest);
            let end = node.versions.partition_point(|version| version.op <= last);
            let versions = &node.versions[begin.unwrap_or(0)..end];
            let path = short(&found.lines[index]);
            if !versions
                .iter()
                .any(|it| it.content.size == size || it.end == size)
            {
                let sizes: Vec<_> = versions.iter().map(|it| (it.op, it.content.size)).collect();
                let ops: Vec<_> = versions.iter().map(|version| version.op).collect();
                return Err(format!(
                    "{path} (node {id}): {size} bytes; may have (after operation, bytes) \
                     {sizes:?}\n{}",
                    self.about(&ops)
                ));
            }
            let bytes = read_all(fs, ino, size).map_err(|error| format!("{path}: {error}"))?;
            for (index, part) in bytes.chunks(SECTOR).enumerate() {
                let fits =
                    |content: &super::model::Content| content.sector(index)[..part.len()] == *part;
                if versions.iter().any(|it| fits(&it.content)) {
                    continue;
                }
                let ever = node.versions.iter().rfind(|it| fits(&it.content));
                let ops: Vec<_> = versions.iter().map(|version| version.op).collect();
                return Err(format!(
                    "{path} (node {id}, inode {ino}): sector {index} of {size} bytes, state after \
                     {op}: {:02x?}.. is of operation {:?}, may be of {ops:?}, promised {oldest}\n{}",
                    &part[..part.len().min(16)],
                    ever.map(|it| it.op),
                    self.about(&ops)
                ));
            }
        }
        Ok(())
    }

    fn about(&self, ops: &[usize]) -> String {
        ops.iter()
            .map(|&op| format!("  operation {op}: {}\n", self.ops[op].what))
            .collect()
    }
}

pub fn read_all(fs: &Arc<Fs>, ino: u32, size: u64) -> FsResult<Vec<u8>> {
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < size {
        let part = read(fs, ino, bytes.len() as u64, 1 << 17)?;
        assert!(!part.is_empty(), "inode {ino}: a short read");
        bytes.extend(part);
    }
    Ok(bytes)
}

fn diff(want: &[Line], have: &[Line]) -> Vec<String> {
    let missing = want.iter().filter(|line| !have.contains(line));
    let extra = have.iter().filter(|line| !want.contains(line));
    missing
        .map(|line| format!("  - {} {}", short(line), line.attrs))
        .chain(extra.map(|line| format!("  + {} {}", short(line), line.attrs)))
        .collect()
}

fn short(line: &Line) -> String {
    let names = line.path.split('/').map(|name| name.trim_end_matches('n'));
    names.collect::<Vec<_>>().join("/")
}
