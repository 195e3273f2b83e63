//! An image made ready for workloads, and the workloads run on it.

use std::path::Path;
use std::sync::Arc;

use blockstack::DynDevice;
use blockstack::backend::mem::{FileBacking, Image, MemDisk};
use blockstack::log_writes::{Cached, Entry, load, save};
use fs::{Fs, MountOptions};

use super::Error;
use super::disk::{fill_free, has_journal, open};
use super::exec::{mount_options, record};
use super::explore::Violation;
use super::history::History;
use super::model::Model;
use super::script::Op;
use super::states::State;
use super::walk::{known, model_of, walk};

/// Stands in a log where the preparation ends.
const START: &str = "start";

/// An image made ready.
pub struct Kit {
    backing: Arc<FileBacking>,
    /// The writes of the preparation.
    prepared: Vec<Entry>,
    /// What workloads begin with: the prepared image, its free blocks filled.
    pub origin: Image,
    /// What is in the directory of the workloads.
    pub model: Model,
    /// Whether files can be preallocated and punched.
    pub has_extents: bool,
    others: u64,
}

fn apply_all(image: &Image, entries: &[Entry]) -> Image {
    let mut cached = Cached::new(image.clone());
    entries.iter().for_each(|entry| cached.apply(entry));
    cached.flush();
    cached.durable().clone()
}

impl Kit {
    /// Makes the image in a file ready: its journal is replayed, the directory of the workload made
    /// with what `setup` makes in it. The file itself is only read.
    ///
    /// # Errors
    /// What is wrong with the image.
    pub fn new(path: &Path, setup: &[Op]) -> Result<Self, Error> {
        let (image, backing) = open(path)?;
        if !has_journal(&image) {
            return Err(Error::NoJournal);
        }
        let mut prepared = record(&image, setup, mount_options(), true)?.entries;
        prepared.retain(|entry| entry.text().is_none());
        Self::from_parts(&image, backing, prepared)
    }

    fn from_parts(
        image: &Image,
        backing: Arc<FileBacking>,
        prepared: Vec<Entry>,
    ) -> Result<Self, Error> {
        let origin = fill_free(&apply_all(image, &prepared))?;
        let dev: DynDevice = MemDisk::from_image("look", origin.clone());
        let fs = Fs::mount(dev, mount_options())?;
        let has_extents = fs.geo.has_extents();
        let looked = walk(&fs, true).map_err(Error::Start).and_then(|found| {
            let attrs = known(&fs, &found)?;
            let model = model_of(&found, &attrs, true);
            Ok((found, model))
        });
        let unmounted = fs.unmount();
        let (found, model) = looked?;
        unmounted?;
        if let Some(stale) = found.stale {
            return Err(Error::Start(stale));
        }
        Ok(Self {
            backing,
            prepared,
            origin,
            model,
            has_extents,
            others: found.others,
        })
    }

    /// Runs a workload and records it.
    ///
    /// # Errors
    /// Where it cannot be mounted or unmounted.
    pub fn record(&self, ops: &[Op], options: MountOptions) -> Result<Vec<Entry>, Error> {
        Ok(record(&self.origin, ops, options, false)?.entries)
    }

    /// What the marks of a log tell.
    ///
    /// # Errors
    /// Where an operation did what it should not.
    pub fn history(&self, entries: &[Entry]) -> Result<History, String> {
        History::new(self.model.clone(), entries, self.others)
    }

    /// Whether all of the image could be read so far.
    ///
    /// # Errors
    /// Where not.
    pub fn check_backing(&self) -> Result<(), Error> {
        if self.backing.has_failed() {
            return Err(Error::Unreadable);
        }
        Ok(())
    }

    /// Writes a violation to a file: the log of preparation and workload, as far as the state needs
    /// it, with the state as its last mark.
    ///
    /// # Errors
    /// Those of writing.
    pub fn save_find(
        &self,
        path: &Path,
        entries: &[Entry],
        violation: &Violation,
    ) -> Result<(), Error> {
        let mut all = self.prepared.clone();
        all.push(Entry::mark(START));
        all.extend_from_slice(&entries[..violation.state.prefix.min(entries.len())]);
        // A mark holds less than a sector; the state may need several.
        for part in violation.state.print().as_bytes().chunks(400) {
            all.push(Entry::mark(&format!("S {}", String::from_utf8_lossy(part))));
        }
        save(&all, path).map_err(|source| Error::Find {
            path: path.to_owned(),
            source,
        })
    }

    /// Reads what [`Self::save_find`] wrote: the kit, the log, and the state.
    ///
    /// # Errors
    /// Where the file is no find, or not of this image.
    pub fn load_find(image: &Path, path: &Path) -> Result<(Self, Vec<Entry>, State), Error> {
        let mut all = load(path).map_err(|source| Error::Find {
            path: path.to_owned(),
            source,
        })?;
        let no_find = || Error::NoFind {
            path: path.to_owned(),
        };
        let mut state = String::new();
        all.retain(|entry| match entry.text() {
            Some(text) if text.starts_with("S ") => {
                state += &text[2..];
                false
            }
            _ => true,
        });
        let state = State::parse(&state).ok_or_else(no_find)?;
        let start = all
            .iter()
            .position(|entry| entry.text().as_deref() == Some(START));
        let start = start.ok_or_else(no_find)?;
        let entries = all.split_off(start + 1);
        all.truncate(start);
        let (below, backing) = open(image)?;
        if !has_journal(&below) {
            return Err(Error::NoJournal);
        }
        Ok((Self::from_parts(&below, backing, all)?, entries, state))
    }
}
