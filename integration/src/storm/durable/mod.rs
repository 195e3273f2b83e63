//! Checks after a crash and replay that every promise was kept.
//!
//! The log gives a worker's calls in order; the worker is single-threaded, so each call had
//! returned before the next began. With the journal of ext3 and ext4 in ordered mode:
//!
//! 1. `fsync` and `fdatasync` of a file: what the file held is durable. A byte that no later call
//!    could change is unchanged; any other is as before, as some later call made it, or zero. The
//!    last part also holds for files that were never synced: ordered mode shows no stale blocks.
//! 2. `fsync` commits the transaction of the last change of that inode, and with it every change
//!    before: so if that change was call `k`, all of this worker's metadata up to `k` is durable.
//!    An `fsync` of an inode without a change since the last commit need not commit anything,
//!    which is why `k` and not the number of the `fsync` counts.
//! 3. Transactions become durable in order, and every change of names belongs to exactly one:
//!    after a crash the names are those after call `P` for some `P`.
//!
//! Without `strong`, 1 is checked, and 2 for the synced object, its entries and the directories
//! above: an entry must be there unless a later call touched it or what is above it. With
//! `strong`, 3 is checked with `P` at or behind the largest `k` of 2, and all attributes.
//!
//! `syncfs` promises the same for everything, but the kernel does not pass it on to a FUSE
//! server (only to virtiofs), so it counts only with `trust_syncfs`.

mod bytes;
mod disk;
mod history;
mod prefix;

use std::fs::File;
use std::path::{Path, PathBuf};

use super::compare;
use super::content::Source;
use super::durlog::Log;
use super::effect::{Id, Place};
use super::error::{Context, Result, StormError};
use super::model::Kind;
use super::text::escape;
use super::verify::Report;
use disk::Disk;
use history::History;

/// Options of `storm check-durable`.
#[derive(Clone, Debug, clap::Args)]
pub struct DurableArgs {
    /// The directory where the file system is mounted again.
    #[arg(long, value_name = "MNT")]
    pub dir: PathBuf,
    /// The logs, or the FILE given to `run --log`.
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    pub log: Vec<PathBuf>,
    /// Check all metadata: names and attributes are those at one moment, not before the last
    /// commit that a sync forced.
    #[arg(long)]
    pub strong: bool,
    /// Count syncfs as a promise (true for the kernel's own file systems, not over FUSE).
    #[arg(long)]
    pub trust_syncfs: bool,
    /// Do not look for bytes that were never written, as data=writeback may show.
    #[arg(long)]
    pub no_stale_check: bool,
}

/// Checks all logs.
///
/// # Errors
///
/// Prints every broken promise and returns their number.
pub fn check(args: &DurableArgs) -> Result<()> {
    let mut report = Report::default();
    for path in expand(&args.log)? {
        let log = Log::read(&path)?;
        let history = History::replay(&log, args.trust_syncfs).map_err(|reason| {
            StormError::Setup(format!(
                "{}: the calls make no sense: {reason}",
                path.display()
            ))
        })?;
        let mut check = Check {
            args,
            log: &log,
            history,
            report: &mut report,
        };
        check.all()?;
    }
    report.finish()
}

struct Check<'a> {
    args: &'a DurableArgs,
    log: &'a Log,
    history: History,
    report: &'a mut Report,
}

impl Check<'_> {
    fn all(&mut self) -> Result<()> {
        let disk = Disk::walk(&self.args.dir, self.log)?;
        for (id, path, ino) in &self.log.roots {
            let actual = disk.root_ino(*id);
            if actual != Some(*ino) {
                let path = self.args.dir.join(String::from_utf8_lossy(path).as_ref());
                let actual = actual.map_or("nothing".to_owned(), |ino| ino.to_string());
                self.report.note(Err(StormError::mismatch(
                    &path,
                    "inode number",
                    ino,
                    actual,
                )));
                return Ok(());
            }
        }
        let names = self.check_names(&disk);
        let files = self.check_contents(&disk);
        let prefix = if self.args.strong {
            format!(
                ", {}",
                prefix::check(self.log, &self.history, &disk, self.report)?
            )
        } else {
            String::new()
        };
        println!(
            "p{}: {} calls, {} syncs, {names} names and {files} files promised{prefix}",
            self.log.worker,
            self.log.calls.len(),
            self.history.syncs,
        );
        Ok(())
    }

    /// Checks entries and attributes of everything synced; returns how many entries were bound.
    fn check_names(&mut self, disk: &Disk) -> usize {
        let mut bound = 0;
        let mut ids: Vec<Id> = self.history.model.inodes().map(|(id, _)| id).collect();
        ids.sort_unstable();
        for id in ids {
            let limit = self.history.durable_to(id);
            let Some(inode) = self.history.model.inode(id) else {
                continue;
            };
            if limit == 0 {
                continue;
            }
            let links: Vec<Place> = inode.links.iter().cloned().collect();
            let mut is_there = inode.root.is_some();
            for at in links.iter().filter(|at| self.history.is_bound(at, limit)) {
                bound += 1;
                let result = self.expect_entry(disk, at, id, "entry of a synced object");
                is_there |= result.is_ok();
                self.report.note(result);
            }
            if is_there {
                bound += self.check_entries(disk, id, limit);
                self.check_attributes(disk, id, limit);
            }
        }
        bound
    }

    fn expect_entry(&self, disk: &Disk, at: &Place, id: Id, what: &str) -> Result<()> {
        let model = &self.history.model;
        let ino = |id| model.inode(id).map_or(0, |inode| inode.ino);
        let actual = disk.lookup(ino(at.parent), &at.name).map(|found| found.ino);
        if actual == Some(ino(id)) {
            return Ok(());
        }
        let path = self.args.dir.join(model.place_path(at).unwrap_or_default());
        let actual = actual.map_or("nothing".to_owned(), |ino| format!("inode {ino}"));
        Err(StormError::mismatch(
            &path,
            what,
            format!("inode {}", ino(id)),
            actual,
        ))
    }

    /// Checks the entries of a synced directory, both ways.
    fn check_entries(&mut self, disk: &Disk, id: Id, limit: usize) -> usize {
        let Some(inode) = self.history.model.inode(id) else {
            return 0;
        };
        let Some(entries) = inode.dir() else { return 0 };
        let mut bound = 0;
        let mut results = Vec::new();
        for (name, &child) in entries {
            let at = Place {
                parent: id,
                name: name.clone(),
            };
            if self.history.is_bound(&at, limit) {
                bound += 1;
                let what = "entry of a synced directory";
                results.push(self.expect_entry(disk, &at, child, what));
            }
        }
        for name in disk
            .names_in(inode.ino)
            .filter(|name| !entries.contains_key(*name))
        {
            let at = Place {
                parent: id,
                name: name.to_vec(),
            };
            let is_later = self
                .history
                .last_change(&at)
                .is_some_and(|change| change > limit);
            if !is_later {
                let path = self
                    .args
                    .dir
                    .join(self.history.model.path(id).unwrap_or_default());
                let what = format!("entry {} of a synced directory", escape(name));
                results.push(Err(StormError::mismatch(&path, what, "absent", "present")));
            }
        }
        results
            .into_iter()
            .for_each(|result| self.report.note(result));
        bound
    }

    fn check_attributes(&mut self, disk: &Disk, id: Id, limit: usize) {
        if self.history.last_mod(id) > limit {
            return;
        }
        let Some(inode) = self.history.model.inode(id) else {
            return;
        };
        if inode.is_shared() || inode.root.is_some() {
            return;
        }
        let source = Source::new(self.log.seed, self.log.worker);
        if let Some(found) = disk.by_ino(inode.ino) {
            let result = prefix::compare_attributes(&found.path, inode, &source).and_then(|()| {
                let Some(mtime) = inode.mtime else {
                    return Ok(());
                };
                let meta = found.path.symlink_metadata().call("stat", &found.path)?;
                compare::mtime(&found.path, &meta, mtime)
            });
            self.report.note(result);
        }
    }

    /// Checks every file on disk against what it may hold; returns how many were synced.
    fn check_contents(&mut self, disk: &Disk) -> usize {
        let mut promised = 0;
        for found in disk.files() {
            let candidates = self.history.candidates(found);
            if candidates.iter().any(|&id| self.history.is_synced(id)) {
                promised += 1;
            }
            let result = self.check_content(&found.path, &candidates);
            self.report.note(result);
        }
        promised
    }

    fn check_content(&self, path: &Path, candidates: &[Id]) -> Result<()> {
        let source = Source::new(self.log.seed, self.log.worker);
        let mut first = None;
        for &id in candidates {
            let is_file = self
                .history
                .model
                .inode(id)
                .is_some_and(|inode| matches!(inode.kind, Kind::File(_)));
            let Some(states) = self.history.file(id).filter(|_| is_file) else {
                continue;
            };
            let file = File::open(path).call("open", path)?;
            match bytes::check(&file, path, states, &source, !self.args.no_stale_check) {
                Ok(()) => return Ok(()),
                Err(error) => first = first.or(Some(error)),
            }
        }
        let unknown = || StormError::mismatch(path, "file", "one the log knows", "another");
        Err(first.unwrap_or_else(unknown))
    }
}

/// Replaces a base name by the logs that a run made of it.
fn expand(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        if path.exists() {
            files.push(path.clone());
            continue;
        }
        let logs: Vec<PathBuf> = (0..64)
            .map(|worker| super::run::log_path(path, worker))
            .filter(|p| p.exists())
            .collect();
        if logs.is_empty() {
            let text = format!("there is neither {0} nor {0}.p0", path.display());
            return Err(StormError::Setup(text));
        }
        files.extend(logs);
    }
    Ok(files)
}
