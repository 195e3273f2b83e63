//! The end state of a run as text, one object a line.
//!
//! ```text
//! storm-manifest 1 <seed> <worker>|shared
//! <path> <group> <mode> <uid> <gid> <nlink>|- <sec> <nsec> <xattrs>|- <kind ...>
//! ```
//!
//! Lines with the same group are names of one inode. `<xattrs>` is `name=value,...`, escaped. A
//! file's kind is `file <size> <extents>|-` with extents `offset:length:stamp:position,...`: the
//! content itself is made again from the seed, so that a difference can be shown byte by byte.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::content::{Extent, FileData};
use super::effect::NewNode;
use super::error::{Context, Result, StormError};
use super::model::{Inode, Kind};
use super::text::{Words, escape, parse, unescape};
use super::worker::Worker;
use super::{SHARED_DIRS, compare, shared_dir, sys};

const MAGIC: &str = "storm-manifest 1";

/// One name of one object.
#[derive(Clone, Debug)]
pub struct Record {
    /// Path below the mount.
    pub path: Vec<u8>,
    /// Which names are of the same inode.
    pub group: u64,
    /// The object; entries of directories are left out, the paths say them.
    pub inode: Inode,
    /// Link count, where it is known.
    pub nlink: Option<u64>,
    /// All attributes, ACLs included.
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

/// A whole manifest.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// Seed of the run.
    pub seed: u64,
    /// The worker; `None` for the shared directories themselves.
    pub worker: Option<u64>,
    /// All names.
    pub records: Vec<Record>,
}

/// Reads the final times of all objects of a worker and writes its manifest.
pub fn write_worker(worker: &Worker) -> Result<()> {
    let mut text = format!("{MAGIC} {} {}\n", worker.args.seed, worker.args.worker);
    let mut lines = Vec::new();
    for (id, inode) in worker
        .model
        .inodes()
        .filter(|(_, inode)| !inode.is_shared())
    {
        let path = worker.path(id);
        let meta = path.symlink_metadata().call("stat", &path)?;
        let nlink = worker.model.nlink(id);
        compare::stat(&path, &meta, inode, nlink)?;
        let mut inode = inode.clone();
        inode.mtime = Some(sys::mtime(&meta));
        let xattrs = compare::expected_xattrs(&inode, &worker.source);
        let mut names: Vec<PathBuf> = inode
            .links
            .iter()
            .filter_map(|at| worker.model.place_path(at))
            .collect();
        names.extend(inode.root.iter().filter_map(|_| worker.model.path(id)));
        for name in names {
            let path = name.as_os_str().as_bytes().to_vec();
            let record = Record {
                path,
                group: id,
                inode: inode.clone(),
                nlink,
                xattrs: xattrs.clone(),
            };
            lines.push(line(&record));
        }
    }
    lines.sort_unstable();
    lines.iter().for_each(|line| text.push_str(line));
    std::fs::write(&worker.args.manifest, text).call("write", &worker.args.manifest)
}

/// Writes the manifest of the shared directories, after all workers have ended.
pub fn write_shared(mount: &Path, seed: u64, file: &Path) -> Result<()> {
    let mut text = format!("{MAGIC} {seed} shared\n");
    let names = (0..SHARED_DIRS)
        .map(shared_dir)
        .chain(["shared".to_owned()]);
    for (group, name) in names.enumerate() {
        let path = mount.join(&name);
        let meta = path.symlink_metadata().call("stat", &path)?;
        let inode = Inode {
            kind: Kind::Dir(BTreeMap::new()),
            mode: meta.mode() & 0o7777,
            uid: meta.uid(),
            gid: meta.gid(),
            ino: 0,
            links: Default::default(),
            root: None,
            mtime: Some(sys::mtime(&meta)),
            xattrs: BTreeMap::new(),
            acl: None,
            default_acl: None,
        };
        // The count covers all workers' directories, so a reader can check it after a remount.
        let nlink = Some(meta.nlink());
        let xattrs = BTreeMap::new();
        let record = Record {
            path: name.into_bytes(),
            group: group as u64,
            inode,
            nlink,
            xattrs,
        };
        text.push_str(&line(&record));
    }
    std::fs::write(file, text).call("write", file)
}

/// Reads a manifest.
///
/// # Errors
///
/// Names file, line and field of the first thing that makes no sense.
pub fn read(file: &Path) -> Result<Manifest> {
    let text = std::fs::read_to_string(file).call("read", file)?;
    let at = |line: usize| {
        move |reason: String| StormError::Parse {
            file: file.to_path_buf(),
            line,
            reason,
        }
    };
    let mut lines = text.lines();
    let header = lines.next().unwrap_or_default();
    let rest = header
        .strip_prefix(MAGIC)
        .ok_or_else(|| at(1)(format!("expected \"{MAGIC} ...\", found {header:?}")))?;
    let mut words = Words::new(rest.trim_start());
    let seed = words.num("seed").map_err(at(1))?;
    let worker = match words.word("worker").map_err(at(1))? {
        "shared" => None,
        word => Some(parse(word, "worker").map_err(at(1))?),
    };
    let records = lines
        .enumerate()
        .map(|(index, line)| parse_line(line).map_err(at(index + 2)))
        .collect::<Result<_>>()?;
    Ok(Manifest {
        seed,
        worker,
        records,
    })
}

fn line(record: &Record) -> String {
    let inode = &record.inode;
    let (sec, nsec) = inode.mtime.unwrap_or_default();
    let nlink = record
        .nlink
        .map_or("-".to_owned(), |nlink| nlink.to_string());
    let xattrs: Vec<String> = record
        .xattrs
        .iter()
        .map(|(name, value)| format!("{}={}", escape(name.as_bytes()), escape(value)))
        .collect();
    let mut text = format!(
        "{} {} {:o} {} {} {nlink} {sec} {nsec} {} ",
        escape(&record.path),
        record.group,
        inode.mode,
        inode.uid,
        inode.gid,
        if xattrs.is_empty() {
            "-".to_owned()
        } else {
            xattrs.join(",")
        },
    );
    match &inode.kind {
        Kind::File(data) => text.push_str(&file_words(data)),
        Kind::Dir(_) => text.push_str("dir"),
        Kind::Symlink(target) => text.push_str(&NewNode::Symlink(target.clone()).to_string()),
        Kind::Fifo => text.push_str("fifo"),
        Kind::Socket => text.push_str("socket"),
        Kind::Char(major, minor) => text.push_str(&NewNode::Char(*major, *minor).to_string()),
    }
    text.push('\n');
    text
}

fn file_words(data: &FileData) -> String {
    let mut text = format!("file {} ", data.size);
    for (off, ext) in data.map.iter().filter(|(_, ext)| ext.stamp != 0) {
        // Writing to a string cannot fail.
        if write!(text, "{off}:{}:{}:{},", ext.len, ext.stamp, ext.pos).is_err() {
            break;
        }
    }
    match text.pop() {
        Some(' ') | None => text + " -",
        Some(_) => text,
    }
}

fn parse_line(line: &str) -> std::result::Result<Record, String> {
    let mut words = Words::new(line);
    let path = words.bytes("path")?;
    let group = words.num("group")?;
    let mode = words.octal("mode")?;
    let (uid, gid) = (words.num("uid")?, words.num("gid")?);
    let nlink = match words.word("nlink")? {
        "-" => None,
        word => Some(parse(word, "nlink")?),
    };
    let mtime = (words.num("seconds")?, words.num("nanoseconds")?);
    let xattrs = match words.word("xattrs")? {
        "-" => BTreeMap::new(),
        list => list
            .split(',')
            .map(parse_xattr)
            .collect::<std::result::Result<_, _>>()?,
    };
    let rest = words.rest();
    let kind = match rest.strip_prefix("file ") {
        Some(data) => Kind::File(parse_file(data)?),
        None => match NewNode::from_words(&mut Words::new(&rest))? {
            NewNode::File => return Err("file without size".to_owned()),
            NewNode::Dir => Kind::Dir(BTreeMap::new()),
            NewNode::Symlink(target) => Kind::Symlink(target),
            NewNode::Fifo => Kind::Fifo,
            NewNode::Socket => Kind::Socket,
            NewNode::Char(major, minor) => Kind::Char(major, minor),
        },
    };
    let inode = Inode {
        kind,
        mode,
        uid,
        gid,
        ino: 0,
        links: Default::default(),
        root: None,
        mtime: Some(mtime),
        xattrs: BTreeMap::new(),
        acl: None,
        default_acl: None,
    };
    Ok(Record {
        path,
        group,
        inode,
        nlink,
        xattrs,
    })
}

fn parse_xattr(word: &str) -> std::result::Result<(String, Vec<u8>), String> {
    let damaged = || format!("xattrs: damaged: {word:?}");
    let (name, value) = word.split_once('=').ok_or_else(damaged)?;
    let name = unescape(name)
        .and_then(|name| String::from_utf8(name).ok())
        .ok_or_else(damaged)?;
    Ok((name, unescape(value).ok_or_else(damaged)?))
}

fn parse_file(text: &str) -> std::result::Result<FileData, String> {
    let mut words = Words::new(text);
    let mut data = FileData {
        size: words.num("size")?,
        ..FileData::default()
    };
    let list = words.word("extents")?;
    for word in list.split(',').filter(|_| list != "-") {
        let mut fields = word.split(':').map(|field| parse::<u64>(field, "extent"));
        let mut field = || {
            fields
                .next()
                .unwrap_or_else(|| Err(format!("extent: {word:?}")))
        };
        let off = field()?;
        data.map.put(
            off,
            Extent {
                len: field()?,
                stamp: field()?,
                pos: field()?,
            },
        );
    }
    Ok(data)
}
