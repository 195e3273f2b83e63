//! A device that fails the operations it is told to, and can be told anew while it works.
//!
//! To try an error at every position of a workload: run it once, ask [`Faults::seen`] how many
//! operations there were, then run it again for each `n` below that with
//! [`Rule::nth(n)`](Rule::nth).

use std::ops::Range;
use std::sync::Arc;

use crate::bio::{Bio, BioFlags, Op};
use crate::device::{BlockDevice, DynDevice, Limits, Stats};
use crate::error::{BlkError, BlkResult};
use crate::forward::{Ended, Forward};
use crate::sync::{Mutex, Rank};
use crate::units::SectorCount;

bitflags::bitflags! {
    /// Kinds of operations.
    #[derive(Clone, Copy, Debug, Eq, PartialEq)]
    pub struct Kinds: u8 {
        /// Reads.
        const READ = 1;
        /// Writes.
        const WRITE = 2;
        /// Flushes of their own.
        const FLUSH = 4;
        /// Discards.
        const DISCARD = 8;
        /// Write-zeroes.
        const ZEROES = 16;
        /// Writes with a flush before, or durable at their end.
        const BARRIER = 32;
    }
}

impl Kinds {
    fn of(bio: &Bio) -> Self {
        let kind = match bio.op() {
            Op::Read => Self::READ,
            Op::Write => Self::WRITE,
            Op::Flush => Self::FLUSH,
            Op::Discard => Self::DISCARD,
            Op::WriteZeroes => Self::ZEROES,
        };
        if bio.flags().intersects(BioFlags::FUA | BioFlags::PREFLUSH) {
            kind | Self::BARRIER
        } else {
            kind
        }
    }
}

/// Whether the operation that fails is done all the same.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Failure {
    /// The lower device never hears of it.
    NotDone,
    /// The lower device does it; only the report is bad.
    Done,
}

/// Which operations fail.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Kinds that count and fail.
    pub kinds: Kinds,
    /// Sectors that an operation must touch; a flush touches none.
    pub sectors: Option<Range<u64>>,
    /// Operations that fit and are let through first.
    pub skip: u64,
    /// Operations that fail after that; `u64::MAX` for ever.
    pub times: u64,
    /// What they fail with.
    pub error: BlkError,
    /// Whether they are done.
    pub failure: Failure,
}

impl Rule {
    /// Every operation fails, for ever.
    #[must_use]
    pub fn all() -> Self {
        Self {
            kinds: Kinds::all(),
            sectors: None,
            skip: 0,
            times: u64::MAX,
            error: BlkError::Io,
            failure: Failure::NotDone,
        }
    }

    /// The operation after `n` others fails, once.
    #[must_use]
    pub fn nth(n: u64) -> Self {
        Self {
            skip: n,
            times: 1,
            ..Self::all()
        }
    }

    /// The same for operations of these kinds only.
    #[must_use]
    pub fn of(self, kinds: Kinds) -> Self {
        Self { kinds, ..self }
    }

    /// The same for operations that touch these sectors only.
    #[must_use]
    pub fn at(self, sectors: Range<u64>) -> Self {
        Self {
            sectors: Some(sectors),
            ..self
        }
    }

    /// The same, from that operation on for ever.
    #[must_use]
    pub fn for_ever(self) -> Self {
        Self {
            times: u64::MAX,
            ..self
        }
    }

    /// The same with another error.
    #[must_use]
    pub fn with(self, error: BlkError) -> Self {
        Self { error, ..self }
    }

    fn fits(&self, bio: &Bio) -> bool {
        let touches = self.sectors.as_ref().is_none_or(|range| {
            let start = bio.sector().raw();
            start < range.end && range.start < start + bio.len().raw()
        });
        touches && self.kinds.intersects(Kinds::of(bio))
    }
}

#[derive(Default)]
struct State {
    rules: Vec<Rule>,
    seen: u64,
    failed: u64,
    held: Option<Vec<Bio>>,
}

/// Tells a [`FaultyDisk`] what to do; clones share it.
#[derive(Clone)]
pub struct Faults(Arc<Mutex<State>>);

impl Faults {
    /// Adds a rule; the first that fits an operation decides.
    pub fn add(&self, rule: Rule) {
        self.0.lock_nested().rules.push(rule);
    }

    /// Forgets all rules and begins to count anew.
    pub fn clear(&self) {
        let mut state = self.0.lock_nested();
        state.rules.clear();
        state.seen = 0;
        state.failed = 0;
    }

    /// Operations since the start or the last [`Self::clear`].
    #[must_use]
    pub fn seen(&self) -> u64 {
        self.0.lock_nested().seen
    }

    /// Those that were made to fail.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.0.lock_nested().failed
    }

    /// Swallows operations from now on, as a frozen device does, until [`Self::release`].
    pub fn hold(&self) {
        self.0.lock_nested().held.get_or_insert_default();
    }

    /// Operations swallowed now.
    #[must_use]
    pub fn held(&self) -> usize {
        self.0.lock_nested().held.as_ref().map_or(0, Vec::len)
    }

    /// Does what was swallowed, in order, and swallows no more.
    pub fn release(&self) {
        let held = self.0.lock_nested().held.take();
        for bio in held.into_iter().flatten() {
            // Back through the device it names, which is the faulty one.
            crate::submit::submit_bio(bio);
        }
    }

    fn decide(&self, bio: Bio) -> Decision {
        let mut state = self.0.lock_nested();
        if let Some(held) = &mut state.held {
            held.push(bio);
            return Decision::Held;
        }
        state.seen += 1;
        let mut verdict = None;
        // Every rule counts, also those behind the one that decides.
        for rule in state.rules.iter_mut().filter(|rule| rule.fits(&bio)) {
            if rule.skip > 0 {
                rule.skip -= 1;
            } else if rule.times > 0 && verdict.is_none() {
                if rule.times != u64::MAX {
                    rule.times -= 1;
                }
                verdict = Some((rule.error, rule.failure));
            }
        }
        if verdict.is_some() {
            state.failed += 1;
        }
        Decision::Go(bio, verdict)
    }
}

enum Decision {
    Held,
    Go(Bio, Option<(BlkError, Failure)>),
}

/// See the module's documentation.
pub struct FaultyDisk {
    name: String,
    forward: Forward,
    faults: Faults,
    stats: Stats,
}

impl FaultyDisk {
    /// Makes a device above `lower`, without rules, and what tells it more.
    #[must_use]
    pub fn new(lower: DynDevice) -> (Arc<Self>, Faults) {
        let faults = Faults(Arc::new(Mutex::new(Rank::Pool, State::default())));
        let disk = Arc::new(Self {
            name: format!("faulty {}", lower.name()),
            forward: Forward::new(lower),
            faults: faults.clone(),
            stats: Stats::default(),
        });
        (disk, faults)
    }
}

struct Verdict(Option<BlkError>);

impl Ended for Verdict {
    fn ended(&self, _: &Bio, res: BlkResult) -> BlkResult {
        self.0.map_or(res, Err)
    }
}

impl BlockDevice for FaultyDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn capacity(&self) -> SectorCount {
        self.forward.lower.capacity()
    }

    fn limits(&self) -> Limits {
        self.forward.lower.limits()
    }

    fn stats(&self) -> &Stats {
        &self.stats
    }

    fn submit(&self, bio: Bio) {
        match self.faults.decide(bio) {
            Decision::Held => {}
            Decision::Go(bio, Some((error, Failure::NotDone))) => bio.complete(Err(error)),
            Decision::Go(bio, verdict) => {
                let error = verdict.map(|(error, _)| error);
                self.forward.send(bio, Arc::new(Verdict(error)));
            }
        }
    }
}
