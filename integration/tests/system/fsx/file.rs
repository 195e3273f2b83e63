//! A file, or a part of one, and what it must hold.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Operations that are told where one goes wrong.
const TOLD: usize = 40;

/// Where a worker works.
#[derive(Clone)]
pub struct Place {
    path: PathBuf,
    /// First byte of the region.
    pub base: usize,
    /// Its length; `None` where the file is the worker's alone.
    len: Option<usize>,
}

impl Place {
    pub fn whole(path: &Path) -> Self {
        let path = path.to_owned();
        let (base, len) = (0, None);
        Self { path, base, len }
    }

    pub fn region(path: &Path, base: usize, len: usize) -> Self {
        let (path, len) = (path.to_owned(), Some(len));
        Self { path, base, len }
    }
}

/// A stream of numbers that a seed stands for.
pub struct Random(u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`, which is not zero.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

pub struct Worker {
    pub place: Place,
    pub random: Random,
    pub file: File,
    pub direct: File,
    /// What the region, or the whole file, holds.
    pub model: Vec<u8>,
    pub steps: u64,
    seed: u64,
    told: VecDeque<String>,
}

impl Worker {
    pub fn new(place: Place, seed: u64) -> Self {
        let (file, direct) = open(&place.path);
        Self {
            model: vec![0; place.len.unwrap_or(0)],
            place,
            random: Random(seed),
            file,
            direct,
            steps: 0,
            seed,
            told: VecDeque::new(),
        }
    }

    /// Whether the file is the worker's alone, so that its size may change.
    pub fn is_alone(&self) -> bool {
        self.place.len.is_none()
    }

    /// Where byte `at` of the model stands in the file.
    pub fn offset(&self, at: usize) -> u64 {
        (self.place.base + at) as u64
    }

    pub fn tell(&mut self, what: String) {
        if self.told.len() == TOLD {
            self.told.pop_front();
        }
        self.told.push_back(what);
    }

    pub fn reopen(&mut self) {
        (self.file, self.direct) = open(&self.place.path);
    }

    /// Ends the test with what this worker did last.
    pub fn wrong(&self, what: &str) -> ! {
        let told: Vec<_> = self.told.iter().map(String::as_str).collect();
        panic!(
            "{} from {}, seed {}, operation {}: {what}\nbefore it:\n  {}",
            self.place.path.display(),
            self.place.base,
            self.seed,
            self.steps,
            told.join("\n  ")
        );
    }

    /// Holds what was read from `at` on against the model.
    pub fn compare(&self, how: &str, at: usize, got: &[u8]) {
        let want = &self.model[at..];
        if want.len() < got.len() {
            self.wrong(&format!(
                "{how}: {} bytes beyond the end",
                got.len() - want.len()
            ));
        }
        let differs = want.iter().zip(got).position(|(want, got)| want != got);
        if let Some(first) = differs {
            let count = want
                .iter()
                .zip(got)
                .filter(|(want, got)| want != got)
                .count();
            self.wrong(&format!(
                "{how} of {} bytes at {at}: {count} are wrong, the first at {}: {:#x} instead of {:#x}",
                got.len(),
                at + first,
                got[first],
                want[first]
            ));
        }
    }

    pub fn check_all(&self, when: &str) {
        if self.is_alone() {
            let size = self.file.metadata().unwrap().len();
            if size != self.model.len() as u64 {
                self.wrong(&format!(
                    "{when}: size {size} instead of {}",
                    self.model.len()
                ));
            }
        }
        let mut content = vec![0; self.model.len()];
        if let Err(error) = self.file.read_exact_at(&mut content, self.offset(0)) {
            self.wrong(&format!("{when}: {error}"));
        }
        self.compare(when, 0, &content);
    }

    /// Closes the file.
    pub fn end(self) -> Ended {
        let (place, seed, model, steps) = (self.place, self.seed, self.model, self.steps);
        Ended {
            place,
            seed,
            model,
            steps,
        }
    }
}

/// What a worker leaves behind.
pub struct Ended {
    place: Place,
    seed: u64,
    model: Vec<u8>,
    pub steps: u64,
}

impl Ended {
    /// On a later mount.
    pub fn check(self) {
        let mut worker = Worker::new(self.place, self.seed);
        worker.model = self.model;
        worker.check_all("mounted again");
    }
}

fn open(path: &Path) -> (File, File) {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    let file = options.open(path).unwrap();
    let direct = options.custom_flags(libc::O_DIRECT).open(path).unwrap();
    (file, direct)
}
