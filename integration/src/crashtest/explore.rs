//! Goes through the states of a log; shrinks what it finds.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use blockstack::backend::mem::Image;
use blockstack::log_writes::{Entry, Fate};

use super::disk::has_torn_superblock;
use super::history::{Bounds, History};
use super::judge::Judge;
use super::random::Random;
use super::states::{Cursor, State, build};
use super::walk::Found;

/// What is explored.
pub struct Explorer<'a> {
    /// The disk in front of the log.
    pub origin: &'a Image,
    /// The log.
    pub entries: &'a [Entry],
    /// What the log's marks tell.
    pub history: &'a History,
    /// Judges states.
    pub judge: &'a Judge,
    /// Variants drawn at each entry.
    pub variants: usize,
    /// For drawing.
    pub seed: u64,
}

/// A state that may not be.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Which.
    pub state: State,
    /// What is wrong, in words.
    pub what: String,
}

/// What came of a part of a log.
#[derive(Debug, Default)]
pub struct Explored {
    /// Different states that were mounted and checked.
    pub states: u64,
    /// States drawn, also such as came up before.
    pub drawn: u64,
    /// The first that may not be.
    pub violation: Option<Violation>,
}

/// Lengths of the log that are tried to make a find shorter.
const SHORTER: usize = 500;

/// Bytes of what was found that are kept.
const KEPT: usize = 64 << 20;

/// As one state looks the same at many moments, with other promises, what was found is kept.
#[derive(Default)]
struct Seen {
    found: HashMap<u64, Result<Arc<Found>, String>>,
    bytes: usize,
    states: HashSet<u64>,
    judged: HashSet<(u64, Bounds)>,
}

impl Seen {
    fn keep(&mut self, hash: u64, found: Result<Arc<Found>, String>) {
        if self.bytes > KEPT {
            self.found.clear();
            self.bytes = 0;
        }
        if let Ok(found) = &found {
            self.bytes += found.contents.iter().flatten().map(Vec::len).sum::<usize>();
        }
        self.found.insert(hash, found);
    }
}

impl Explorer<'_> {
    /// Explores; `wants` says at which entries, `goes_on` whether to go on after so many states.
    pub fn run(
        &self,
        mut wants: impl FnMut(usize) -> bool,
        mut goes_on: impl FnMut(u64) -> bool,
    ) -> Explored {
        let mut explored = Explored::default();
        let mut seen = Seen::default();
        let mut cursor = Cursor::new(self.origin, self.entries);
        while goes_on(explored.states) {
            let at = cursor.at();
            if wants(at) {
                let mut random = Random::new(self.seed, at as u64);
                let prefix = State {
                    prefix: at,
                    broken: Vec::new(),
                };
                self.judge_state(&cursor, prefix, &mut seen, &mut explored);
                // Marks change nothing but what is promised; all of it must be there.
                let (next, states) = if self
                    .entries
                    .get(at)
                    .is_some_and(|next| next.text().is_none())
                {
                    cursor.variants(self.variants, &mut random)
                } else {
                    (cursor.clone(), Vec::from([cursor.all_lost()]))
                };
                for state in states {
                    self.judge_state(&next, state, &mut seen, &mut explored);
                    if explored.violation.is_some() {
                        break;
                    }
                }
            }
            if explored.violation.is_some() || !cursor.step() {
                break;
            }
        }
        explored
    }

    fn judge_state(
        &self,
        cursor: &Cursor<'_>,
        state: State,
        seen: &mut Seen,
        explored: &mut Explored,
    ) {
        if explored.violation.is_some() {
            return;
        }
        explored.drawn += 1;
        let image = cursor.outcome(&state.broken);
        let hash = image.difference(self.origin);
        let bounds = self.history.bounds(state.prefix);
        if !seen.judged.insert((hash, bounds)) || has_torn_superblock(&image) {
            return;
        }
        let found = match seen.found.get(&hash) {
            Some(found) => found.clone(),
            None => {
                let is_new = seen.states.insert(hash);
                explored.states += u64::from(is_new);
                let sizes = self.history.with_sizes();
                let found = self.judge.examine(image, sizes, is_new).map(Arc::new);
                seen.keep(hash, found.clone());
                found
            }
        };
        let verdict = found.and_then(|found| self.history.check(&found, bounds));
        if let Err(what) = verdict {
            explored.violation = Some(Violation { state, what });
        }
    }

    /// What is wrong with one state, if anything is.
    #[must_use]
    pub fn fault_of(&self, state: &State) -> Option<String> {
        let image = build(self.origin, self.entries, state);
        if has_torn_superblock(&image) {
            return None;
        }
        let found = self.judge.examine_again(image, self.history.with_sizes());
        let bounds = self.history.bounds(state.prefix);
        found
            .and_then(|found| self.history.check(&found, bounds))
            .err()
    }

    /// Makes a violation smaller: fewer writes broken, none of them torn where losing it will do,
    /// a shorter log.
    #[must_use]
    pub fn shrink(&self, violation: &Violation) -> Violation {
        let mut best = violation.clone();
        let mut attempt = |best: &mut Violation, state: State| match self.fault_of(&state) {
            Some(what) => {
                *best = Violation { state, what };
                true
            }
            None => false,
        };
        fewer(&mut best, &mut attempt);
        for index in 0..best.state.broken.len() {
            let mut state = best.state.clone();
            if matches!(state.broken[index].1, Fate::Torn(_)) {
                state.broken[index].1 = Fate::Lost;
                attempt(&mut best, state);
            }
        }
        // The shortest log that will do, among some hundreds.
        let shortest = best.state.broken.last().map_or(0, |(entry, _)| entry + 1);
        let step = (best.state.prefix.saturating_sub(shortest) / SHORTER).max(1);
        for prefix in (shortest..best.state.prefix).step_by(step) {
            let mut state = best.state.clone();
            state.prefix = prefix;
            if attempt(&mut best, state) {
                break;
            }
        }
        best
    }
}

/// Delta debugging over what is broken: leaves out halves, quarters, ..., one by one.
fn fewer(best: &mut Violation, attempt: &mut impl FnMut(&mut Violation, State) -> bool) {
    let mut parts = 2;
    while !best.state.broken.is_empty() {
        let len = best.state.broken.len();
        let size = len.div_ceil(parts);
        let mut smaller = false;
        for from in (0..len).step_by(size) {
            let mut state = best.state.clone();
            state.broken.drain(from..(from + size).min(len));
            if attempt(best, state) {
                smaller = true;
                break;
            }
        }
        if smaller {
            parts = 2.max(parts - 1);
        } else if size == 1 {
            break;
        } else {
            parts = (parts * 2).min(len);
        }
    }
}
