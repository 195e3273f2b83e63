//! Checks that names and attributes are those after one of the calls.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use super::super::compare;
use super::super::content::Source;
use super::super::durlog::{Log, Outcome};
use super::super::effect::{Effect, Id, Name};
use super::super::error::{Context, Result, StormError};
use super::super::model::{EdgeChange, Inode, Kind, Model};
use super::super::text::escape;
use super::super::verify::Report;
use super::disk::Disk;
use super::history::{self, History};

/// An entry in terms of the disk: directory, name, object.
type Edge = (u64, Name, u64);

/// A changed entry with the inode numbers it led to before and leads to now.
type NumberedChange = (EdgeChange, Option<u64>, Option<u64>);

/// How the names after some number of calls differ from those on disk.
#[derive(Default)]
struct Difference {
    /// +1 for what only the model has, -1 for what only the disk has; equal ones are left out.
    edges: HashMap<Edge, i32>,
}

impl Difference {
    fn add(&mut self, edge: Edge, amount: i32) {
        let count = self.edges.entry(edge.clone()).or_default();
        *count += amount;
        if *count == 0 {
            self.edges.remove(&edge);
        }
    }
}

/// The moments that fit, and what objects looked like around them.
struct Moments {
    first: usize,
    last: usize,
}

/// Looks for a moment at or behind the durable prefix whose names are those on disk, then checks
/// all attributes against the same moments; returns a line for the summary.
pub fn check(log: &Log, history: &History, disk: &Disk, report: &mut Report) -> Result<String> {
    let moments = match find_moments(log, history, disk)? {
        Ok(moments) => moments,
        Err(text) => {
            let path = log.file.clone();
            let what = "names on disk";
            let expected = format!(
                "those after one of the calls {}..={}",
                history.durable,
                log.calls.len()
            );
            report.note(Err(StormError::mismatch(&path, what, expected, text)));
            return Ok("no consistent moment".to_owned());
        }
    };
    check_attributes(log, &moments, disk, report)?;
    let Moments { first, last } = moments;
    Ok(format!(
        "durable to call {}, state of call {first}..={last}",
        history.durable
    ))
}

/// Compares an object on disk with the attributes the model has for it.
pub fn compare_attributes(path: &Path, inode: &Inode, source: &Source) -> Result<()> {
    let meta = path.symlink_metadata().call("stat", path)?;
    compare::attributes(path, &meta, inode)?;
    if let Kind::Symlink(target) = &inode.kind {
        compare::target(path, target)?;
    }
    compare::xattrs(path, &compare::expected_xattrs(inode, source))
}

/// Replays the names; the inner error says how the closest moment differs.
fn find_moments(
    log: &Log,
    history: &History,
    disk: &Disk,
) -> Result<std::result::Result<Moments, String>> {
    let mut model = history::start(log);
    let mut difference = Difference::default();
    for found in disk.all() {
        difference.add((found.parent, found.name.clone(), found.ino), -1);
    }
    let mut found: Option<Moments> = None;
    let mut closest: Option<(usize, usize, String)> = None;
    for number in 0..=log.calls.len() {
        if number > 0 {
            step(&mut model, &log.calls[number - 1], disk, &mut difference)?;
        }
        if number < history.durable {
            continue;
        }
        let count = difference.edges.len();
        if count == 0 {
            let first = found.map_or(number, |moments| moments.first);
            found = Some(Moments {
                first,
                last: number,
            });
        } else if closest.as_ref().is_none_or(|(least, ..)| count < *least) {
            closest = Some((count, number, describe(&difference)));
        }
    }
    let text = closest.map_or(String::new(), |(count, number, text)| {
        format!("closest is call {number} with {count} differences: {text}")
    });
    Ok(found.ok_or(text))
}

/// Applies one call to model and difference.
fn step(model: &mut Model, call: &Outcome, disk: &Disk, difference: &mut Difference) -> Result<()> {
    for (change, old, new) in apply(model, call, disk)? {
        let parent = model.inode(change.at.parent).map_or(0, |inode| inode.ino);
        if let Some(ino) = old {
            difference.add((parent, change.at.name.clone(), ino), -1);
        }
        if let Some(ino) = new {
            difference.add((parent, change.at.name, ino), 1);
        }
    }
    Ok(())
}

/// Applies one call; returns the changed entries with the inode numbers before and after.
fn apply(model: &mut Model, call: &Outcome, disk: &Disk) -> Result<Vec<NumberedChange>> {
    let (effect, ino) = match call {
        Outcome::Done(effect, ino) => (effect, *ino),
        Outcome::Failed(_) => return Ok(Vec::new()),
        Outcome::Unknown(effect) => (effect, 0),
    };
    let changes = model.apply(effect).map_err(StormError::Setup)?;
    if let Effect::Create { at, id, .. } = effect {
        // Nobody has seen the number of an object whose creation was cut short.
        let parent = model.inode(at.parent).map_or(0, |inode| inode.ino);
        let seen = || disk.lookup(parent, &at.name).map_or(0, |found| found.ino);
        model.set_ino(*id, if ino == 0 { seen() } else { ino });
    } else if let Effect::Tmpfile { id, .. } = effect {
        model.set_ino(*id, ino);
    }
    let ino = |id: Option<Id>| id.and_then(|id| model.inode(id)).map(|inode| inode.ino);
    Ok(changes
        .into_iter()
        .map(|c| (c.clone(), ino(c.old), ino(c.new)))
        .collect())
}

fn describe(difference: &Difference) -> String {
    let mut words: Vec<String> = difference
        .edges
        .iter()
        .map(|((parent, name, ino), count)| {
            let side = if *count > 0 { "missing" } else { "extra" };
            format!("{side} {} -> {ino} in {parent}", escape(name))
        })
        .collect();
    words.sort_unstable();
    words.truncate(8);
    words.join(", ")
}

/// Checks that each object on disk has attributes it had at one of the moments.
fn check_attributes(log: &Log, moments: &Moments, disk: &Disk, report: &mut Report) -> Result<()> {
    let source = Source::new(log.seed, log.worker);
    let mut model = history::start(log);
    let mut states: BTreeMap<u64, Vec<Inode>> = BTreeMap::new();
    for number in 1..=moments.last {
        let call = &log.calls[number - 1];
        apply(&mut model, call, disk)?;
        if number == moments.first {
            for (_, inode) in model.inodes() {
                states.entry(inode.ino).or_default().push(bare(inode));
            }
        } else if number > moments.first {
            if let Some(inode) = changed_object(call).and_then(|id| model.inode(id)) {
                states.entry(inode.ino).or_default().push(bare(inode));
            }
        }
    }
    for found in disk.all() {
        let mut first = None;
        let mut fits = false;
        // The latest state is the likeliest, and the one to show when none fits.
        for inode in states.get(&found.ino).into_iter().flatten().rev() {
            match compare_attributes(&found.path, inode, &source) {
                Ok(()) => fits = true,
                Err(error) => first = first.or(Some(error)),
            }
            if fits {
                break;
            }
        }
        if let (false, Some(error)) = (fits, first) {
            report.note(Err(error));
        }
    }
    Ok(())
}

/// Returns the object whose attributes a call sets.
fn changed_object(call: &Outcome) -> Option<Id> {
    let (Outcome::Done(effect, _) | Outcome::Unknown(effect)) = call else {
        return None;
    };
    match effect {
        Effect::Create { id, .. }
        | Effect::Tmpfile { id, .. }
        | Effect::Chmod { id, .. }
        | Effect::Chown { id, .. }
        | Effect::SetXattr { id, .. }
        | Effect::DelXattr { id, .. }
        | Effect::SetAcl { id, .. } => Some(*id),
        _ => None,
    }
}

/// Returns an object without its content and entries, which are checked elsewhere.
fn bare(inode: &Inode) -> Inode {
    let kind = match &inode.kind {
        Kind::File(_) => Kind::File(Default::default()),
        Kind::Dir(_) => Kind::Dir(Default::default()),
        other => other.clone(),
    };
    Inode {
        kind,
        links: Default::default(),
        root: inode.root.clone(),
        xattrs: inode.xattrs.clone(),
        mtime: None,
        ..*inode
    }
}
