//! Comparing an object of the file system with what it should be.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::acl;
use super::content::{FileData, Source};
use super::error::{Context, Result, StormError, show};
use super::model::{Inode, Kind};
use super::sys;

/// How much is read and compared at once.
const CHUNK: u64 = 1 << 20;

/// How much of the edges of a hole is read although it should be zeros.
const HOLE_EDGE: u64 = 64 << 10;

/// Compares `len` bytes at `off`, fewer at the end of the file.
pub fn range(
    file: &File,
    path: &Path,
    data: &FileData,
    source: &Source,
    off: u64,
    len: u64,
) -> Result<()> {
    let mut actual = vec![0; len as usize];
    let count = sys::read_at(file, &mut actual, off).call("read", path)? as u64;
    let expected = len.min(data.size.saturating_sub(off));
    if count != expected {
        let what = format!("bytes read at {off}");
        return Err(StormError::mismatch(path, what, expected, count));
    }
    bytes(path, data, source, off, &actual[..count as usize])
}

/// Compares bytes that were read at `off`.
pub fn bytes(path: &Path, data: &FileData, source: &Source, off: u64, actual: &[u8]) -> Result<()> {
    let mut expected = vec![0; actual.len()];
    data.map.render(source, off, &mut expected);
    if expected == actual {
        return Ok(());
    }
    let differs = |(a, b): (&u8, &u8)| a != b;
    let pairs = || expected.iter().zip(actual);
    let first = pairs().position(differs).unwrap_or(0);
    let last = actual.len() - 1 - pairs().rev().position(differs).unwrap_or(0);
    let count = pairs().filter(|&(a, b)| a != b).count();
    let at = off + first as u64;
    let want = match data.map.slice(at, 1).first() {
        Some((_, ext)) if ext.stamp != 0 => format!("stamp {}", ext.stamp),
        Some(_) => "zeros of allocated space".to_owned(),
        None => "a hole".to_owned(),
    };
    let what = format!(
        "content at {at} ({count} bytes differ up to {}, file size {})",
        off + last as u64,
        data.size
    );
    let end = actual.len().min(first + 16);
    Err(StormError::mismatch(
        path,
        what,
        format!("{want} {:02x?}", &expected[first..end]),
        format!(
            "{} {:02x?}",
            identify(source, at, &actual[first..end]),
            &actual[first..end]
        ),
    ))
}

/// Guesses where wrong bytes come from.
fn identify(source: &Source, at: u64, bytes: &[u8]) -> String {
    const STAMPS: u64 = 1 << 18;
    if bytes.iter().all(|&b| b == 0) {
        return "zeros".to_owned();
    }
    let mut probe = vec![0; bytes.len()];
    for stamp in 1..STAMPS {
        source.fill(stamp, at, &mut probe);
        if probe == bytes && bytes.len() >= 4 {
            return format!("stamp {stamp} of the same offset");
        }
    }
    "unknown bytes".to_owned()
}

/// Compares a whole file: everything the model or the file system calls data, and the edges of
/// what both call a hole.
pub fn whole(file: &File, path: &Path, data: &FileData, source: &Source) -> Result<()> {
    let size = file.metadata().call("fstat", path)?.len();
    if size != data.size {
        return Err(StormError::mismatch(path, "size", data.size, size));
    }
    for (start, end) in ranges_to_read(file, path, data, size)? {
        let mut at = start;
        while at < end {
            let len = CHUNK.min(end - at);
            range(file, path, data, source, at, len)?;
            at += len;
        }
    }
    Ok(())
}

/// Returns the ranges of a file that can hold anything but zeros.
pub fn ranges_to_read(
    file: &File,
    path: &Path,
    data: &FileData,
    size: u64,
) -> Result<Vec<(u64, u64)>> {
    // Only a way to read less; whether the answers are right is the `seek` operation's question.
    // (The kernel's ext4 gives ENOENT for inline data that has just moved out.)
    let mut ranges = sys::data_ranges(file, size).unwrap_or_else(|error| {
        log::debug!("SEEK_DATA on {}: {error}", show(path));
        vec![(0, size)]
    });
    ranges.extend(data.map.iter().map(|(start, ext)| (start, start + ext.len)));
    ranges.push((0, 1));
    ranges.push((size.saturating_sub(1), size));
    for range in &mut ranges {
        range.0 = range.0.saturating_sub(HOLE_EDGE);
        range.1 = (range.1 + HOLE_EDGE).min(size);
    }
    ranges.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for (start, end) in ranges.into_iter().filter(|(start, end)| start < end) {
        match merged.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => merged.push((start, end)),
        }
    }
    Ok(merged)
}

/// Compares what `stat` shows of an object, size and times left out.
pub fn attributes(path: &Path, meta: &Metadata, inode: &Inode) -> Result<()> {
    differ(path, "type", kind_word(&inode.kind), type_word(meta))?;
    if !matches!(inode.kind, Kind::Symlink(_)) {
        let actual = format!("{:o}", meta.mode() & 0o7777);
        differ(path, "mode", format!("{:o}", inode.mode), actual)?;
    }
    differ(path, "uid", inode.uid, meta.uid())?;
    differ(path, "gid", inode.gid, meta.gid())?;
    match &inode.kind {
        Kind::Symlink(target) => differ(path, "size", target.len(), meta.len()),
        Kind::Char(major, minor) => {
            let rdev = meta.rdev();
            let actual = format!("{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev));
            differ(path, "device", format!("{major}:{minor}"), actual)
        }
        Kind::File(_) | Kind::Dir(_) | Kind::Fifo | Kind::Socket => Ok(()),
    }
}

/// Compares all that `stat` shows.
pub fn stat(path: &Path, meta: &Metadata, inode: &Inode, nlink: Option<u64>) -> Result<()> {
    attributes(path, meta, inode)?;
    if let Some(nlink) = nlink {
        differ(path, "link count", nlink, meta.nlink())?;
    }
    if inode.ino != 0 {
        differ(path, "inode number", inode.ino, meta.ino())?;
    }
    if let Some(time) = inode.mtime {
        mtime(path, meta, time)?;
    }
    match &inode.kind {
        Kind::File(data) => differ(path, "size", data.size, meta.len()),
        _ => Ok(()),
    }
}

/// Compares the modification time.
pub fn mtime(path: &Path, meta: &Metadata, (sec, nsec): (i64, u32)) -> Result<()> {
    let actual = sys::mtime(meta);
    differ(
        path,
        "mtime",
        format!("{sec}.{nsec:09}"),
        format!("{}.{:09}", actual.0, actual.1),
    )
}

fn differ(path: &Path, what: &str, expected: impl ToString, actual: impl ToString) -> Result<()> {
    let (expected, actual) = (expected.to_string(), actual.to_string());
    if expected == actual {
        return Ok(());
    }
    Err(StormError::mismatch(path, what, expected, actual))
}

/// Compares the target of a symbolic link.
pub fn target(path: &Path, expected: &[u8]) -> Result<()> {
    let actual = std::fs::read_link(path).call("readlink", path)?;
    if actual.as_os_str().as_bytes() == expected {
        return Ok(());
    }
    let expected = String::from_utf8_lossy(expected);
    Err(StormError::mismatch(
        path,
        "link target",
        expected,
        actual.display(),
    ))
}

/// Returns the attributes that an object should have.
pub fn expected_xattrs(inode: &Inode, source: &Source) -> BTreeMap<String, Vec<u8>> {
    let mut all: BTreeMap<String, Vec<u8>> = inode
        .xattrs
        .iter()
        .map(|(name, &(stamp, len))| (name.clone(), source.bytes(stamp, len as usize)))
        .collect();
    if let Some(acl) = inode.acl {
        all.insert(acl::ACCESS.to_owned(), acl.to_xattr());
    }
    if let Some(acl) = inode.default_acl {
        all.insert(acl::DEFAULT.to_owned(), acl.to_xattr());
    }
    all
}

/// Compares attributes and ACLs.
pub fn xattrs(path: &Path, expected: &BTreeMap<String, Vec<u8>>) -> Result<()> {
    let actual = sys::xattrs(path).call("getxattr", path)?;
    if actual == *expected {
        return Ok(());
    }
    let brief = |map: &BTreeMap<String, Vec<u8>>, other: &BTreeMap<String, Vec<u8>>| {
        let differing = map
            .iter()
            .filter(|(name, value)| other.get(*name) != Some(*value));
        let words = differing.map(|(name, value)| {
            format!(
                "{name} ({} bytes {:02x?})",
                value.len(),
                &value[..value.len().min(12)]
            )
        });
        let words: Vec<String> = words.collect();
        if words.is_empty() {
            "nothing else".to_owned()
        } else {
            words.join(", ")
        }
    };
    let (want, have) = (brief(expected, &actual), brief(&actual, expected));
    Err(StormError::mismatch(
        path,
        "extended attributes",
        want,
        have,
    ))
}

fn kind_word(kind: &Kind) -> &'static str {
    match kind {
        Kind::File(_) => "file",
        Kind::Dir(_) => "dir",
        Kind::Symlink(_) => "symlink",
        Kind::Fifo => "fifo",
        Kind::Socket => "socket",
        Kind::Char(..) => "char",
    }
}

/// Returns the word for the type of an object.
pub fn type_word(meta: &Metadata) -> &'static str {
    file_type_word(meta.file_type())
}

/// Returns the word for a type.
pub fn file_type_word(kind: std::fs::FileType) -> &'static str {
    if kind.is_file() {
        "file"
    } else if kind.is_dir() {
        "dir"
    } else if kind.is_symlink() {
        "symlink"
    } else if kind.is_fifo() {
        "fifo"
    } else if kind.is_socket() {
        "socket"
    } else if kind.is_char_device() {
        "char"
    } else {
        "block"
    }
}

/// Returns the word for the type of an object of the model.
pub fn inode_word(inode: &Inode) -> &'static str {
    kind_word(&inode.kind)
}
