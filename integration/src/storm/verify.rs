//! Compares a mount with manifests.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::content::Source;
use super::error::{Context, Result, StormError};
use super::manifest::{self, Manifest, Record};
use super::model::Kind;
use super::text::escape;
use super::{compare, shared_dir, sys};

/// How many failures are printed.
const PRINTED: usize = 40;

/// Collects failures, so that one run shows more than the first.
#[derive(Default)]
pub struct Report {
    failures: usize,
}

impl Report {
    /// Notes a failure and prints it unless there were too many.
    pub fn note(&mut self, result: Result<()>) {
        if let Err(error) = result {
            self.failures += 1;
            if self.failures <= PRINTED {
                log::error!("{error}");
            }
        }
    }

    /// Returns an error when there was a failure.
    pub fn finish(self) -> Result<()> {
        if self.failures == 0 {
            Ok(())
        } else {
            Err(StormError::Failures(self.failures))
        }
    }
}

/// Compares everything that the manifests name, and looks for what they do not.
///
/// Modification times may differ by `slack`. Over FUSE with a writeback cache the kernel shows its
/// own time of a write until the cache is dropped, and the server's, which is some milliseconds
/// later, from then on.
///
/// # Errors
///
/// Prints every difference and returns their number.
pub fn verify(mount: &Path, files: &[PathBuf], slack: Duration) -> Result<usize> {
    let manifests: Vec<Manifest> = files
        .iter()
        .map(|file| manifest::read(file))
        .collect::<Result<_>>()?;
    let mut report = Report::default();
    let mut names: BTreeSet<&[u8]> = BTreeSet::new();
    for manifest in &manifests {
        let source = Source::new(manifest.seed, manifest.worker.unwrap_or(u64::MAX));
        let mut groups = BTreeMap::new();
        for record in &manifest.records {
            names.insert(&record.path);
            report.note(check(mount, record, &source, slack, &mut groups));
        }
        let inodes: BTreeSet<u64> = groups.values().copied().collect();
        if inodes.len() != groups.len() {
            let (want, have) = (groups.len(), inodes.len());
            report.note(Err(StormError::mismatch(
                mount,
                "distinct inodes",
                want,
                have,
            )));
        }
    }
    let has_shared = manifests.iter().any(|manifest| manifest.worker.is_none());
    let workers: Vec<u64> = manifests
        .iter()
        .filter_map(|manifest| manifest.worker)
        .collect();
    let is_ours = |top: &[u8], name: &[u8]| match top {
        b"shared" if !has_shared => workers
            .iter()
            .any(|worker| name.starts_with(format!("p{worker}_").as_bytes())),
        _ => true,
    };
    let tops = workers.iter().map(|worker| format!("p{worker}"));
    for top in tops {
        find_extra(mount, Path::new(&top), &names, &|_| true, &mut report);
    }
    if has_shared {
        find_extra(mount, Path::new("shared"), &names, &|_| true, &mut report);
    } else {
        for index in 0..super::SHARED_DIRS {
            let ours = |name: &[u8]| is_ours(b"shared", name);
            find_extra(
                mount,
                Path::new(&shared_dir(index)),
                &names,
                &ours,
                &mut report,
            );
        }
    }
    report.finish()?;
    Ok(names.len())
}

fn check(
    mount: &Path,
    record: &Record,
    source: &Source,
    slack: Duration,
    groups: &mut BTreeMap<u64, u64>,
) -> Result<()> {
    let path = mount.join(OsStr::from_bytes(&record.path));
    let meta = path.symlink_metadata().call("stat", &path)?;
    let mut inode = record.inode.clone();
    let actual = sys::mtime(&meta);
    let is_near =
        |time: (i64, u32)| nanoseconds(time).abs_diff(nanoseconds(actual)) <= slack.as_nanos();
    if inode.mtime.is_some_and(is_near) {
        inode.mtime = Some(actual);
    }
    compare::stat(&path, &meta, &inode, record.nlink)?;
    let ino = meta.ino();
    let first = *groups.entry(record.group).or_insert(ino);
    if first != ino {
        return Err(StormError::mismatch(
            &path,
            "inode of a hard link",
            first,
            ino,
        ));
    }
    match &record.inode.kind {
        Kind::File(data) => {
            let file = File::open(&path).call("open", &path)?;
            compare::whole(&file, &path, data, source)?;
        }
        Kind::Symlink(target) => compare::target(&path, target)?,
        _ => {}
    }
    compare::xattrs(&path, &record.xattrs)
}

fn nanoseconds((sec, nsec): (i64, u32)) -> i128 {
    i128::from(sec) * 1_000_000_000 + i128::from(nsec)
}

/// Reports what the manifests do not name, at any depth below `top`.
fn find_extra(
    mount: &Path,
    top: &Path,
    names: &BTreeSet<&[u8]>,
    is_ours: &dyn Fn(&[u8]) -> bool,
    report: &mut Report,
) {
    match extra_in(mount, top, names, is_ours, report) {
        Ok(dirs) => {
            for dir in dirs {
                find_extra(mount, &dir, names, &|_| true, report);
            }
        }
        Err(error) => report.note(Err(error)),
    }
}

fn extra_in(
    mount: &Path,
    dir: &Path,
    names: &BTreeSet<&[u8]>,
    is_ours: &dyn Fn(&[u8]) -> bool,
    report: &mut Report,
) -> Result<Vec<PathBuf>> {
    let full = mount.join(dir);
    let mut dirs = Vec::new();
    for entry in std::fs::read_dir(&full).call("readdir", &full)? {
        let entry = entry.call("readdir", &full)?;
        let name = entry.file_name().into_vec();
        if !is_ours(&name) {
            continue;
        }
        let path = dir.join(OsStr::from_bytes(&name));
        if !names.contains(path.as_os_str().as_bytes()) {
            let what = format!("entry {}", escape(&name));
            report.note(Err(StormError::mismatch(&full, what, "absent", "present")));
        } else if entry.file_type().call("readdir", &path)?.is_dir() {
            dirs.push(path);
        }
    }
    Ok(dirs)
}

/// Replaces each directory by the manifests in it.
pub fn expand(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        for entry in std::fs::read_dir(path).call("readdir", path)? {
            let file = entry.call("readdir", path)?.path();
            if file
                .extension()
                .is_some_and(|extension| extension == "manifest")
            {
                files.push(file);
            }
        }
    }
    if files.is_empty() {
        return Err(StormError::Setup(
            "there is no manifest in what was given".to_owned(),
        ));
    }
    files.sort_unstable();
    Ok(files)
}
