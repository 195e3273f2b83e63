//! `delay`: reads, writes and flushes go down later, by times of their own, and where wanted to
//! devices of their own.
//!
//! Table: `delay <device> <start> <ms> [<device> <start> <ms> [<device> <start> <ms>]]`: reads; then
//! writes, else as reads; then flushes, else as writes. Status: how many reads, writes and flushes
//! wait.
//!
//! A flush goes to each of the devices: what a write to another one promised would be lost. (The
//! kernel's goes to the device of flushes only.)
//!
//! # Locking
//!
//! One lock for what waits, a leaf; nothing is submitted under it.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blockstack::sched::spawn;
use blockstack::sync::{Condvar, Mutex, Rank};
use blockstack::{BioFlags, BlkError, BlkResult, Op, Sector};

use crate::target::{
    Args, CtrError, DevRange, DmBio, Event, FlushRoute, MapResult, TableCx, Target,
};

/// Reads, writes, flushes.
const CLASSES: usize = 3;

/// Bios of one class, the one to go first in front: all wait equally long.
type Line = VecDeque<(Instant, DmBio)>;

#[derive(Default)]
struct State {
    lines: [Line; CLASSES],
    has_thread: bool,
    over: bool,
}

impl State {
    fn next(&self) -> Option<Instant> {
        let fronts = self.lines.iter().filter_map(VecDeque::front);
        fronts.map(|(when, _)| *when).min()
    }

    /// The bio of some line that is due.
    fn due(&mut self, now: Instant) -> Option<DmBio> {
        let is_due = |line: &&mut Line| line.front().is_some_and(|(when, _)| *when <= now);
        let line = self.lines.iter_mut().find(is_due)?;
        line.pop_front().map(|(_, bio)| bio)
    }
}

/// What waits, and the thread that sends it down.
struct Waiting {
    state: Mutex<State>,
    changed: Condvar,
}

impl Waiting {
    fn run(&self) {
        let mut state = self.state.lock();
        loop {
            let now = Instant::now();
            if let Some(bio) = state.due(now) {
                drop(state);
                bio.submit();
                state = self.state.lock();
                continue;
            }
            if state.over {
                return;
            }
            match state.next() {
                Some(when) => {
                    self.changed.wait_until(&mut state, when);
                }
                None => self.changed.wait(&mut state),
            }
        }
    }

    /// Puts a bio in its line.
    fn put(self: &Arc<Self>, class: usize, delay: Duration, bio: DmBio) {
        let mut state = self.state.lock_nested();
        if !state.has_thread {
            let me = self.clone();
            if let Err(error) = spawn("dm-delay".to_owned(), move || me.run()) {
                drop(state);
                log::error!("cannot start the thread of a delay: {error}");
                return bio.complete(Err(BlkError::NoMemory));
            }
            state.has_thread = true;
        }
        state.lines[class].push_back((Instant::now() + delay, bio));
        drop(state);
        self.changed.notify_one();
    }

    /// Sends down at once what waits.
    fn release(&self) {
        let lines = std::mem::take(&mut self.state.lock_nested().lines);
        lines
            .into_iter()
            .flatten()
            .for_each(|(_, bio)| bio.submit());
    }
}

/// See the module documentation.
pub struct Delay {
    /// As many as the row names.
    ranges: Vec<DevRange>,
    delays: Vec<Duration>,
    /// Ranges of which no earlier one is on the same device.
    flushed: Vec<usize>,
    waiting: Arc<Waiting>,
    /// Not while the device is about to be suspended.
    may_delay: AtomicBool,
}

impl Delay {
    /// Which of the ranges a class has.
    fn range(&self, class: usize) -> usize {
        class.min(self.ranges.len() - 1)
    }
}

impl Target for Delay {
    const NAME: &'static str = "delay";
    type PerBio = ();

    fn new(args: &mut Args<'_>, cx: &TableCx<'_>) -> Result<Self, CtrError> {
        let (mut ranges, mut delays) = (Vec::new(), Vec::new());
        while ranges.is_empty() || (ranges.len() < CLASSES && args.left() > 0) {
            let dev = cx.open(args.word("device")?)?;
            let start = args.sector("start")?;
            let delay: u32 = args.number("milliseconds", 0..=u32::MAX)?;
            ranges.push(DevRange::new(dev, start, cx.len())?);
            delays.push(Duration::from_millis(delay.into()));
        }
        args.finish()?;
        let is_first = |at: &usize| {
            let same = |other: &DevRange| Arc::ptr_eq(other.dev(), ranges[*at].dev());
            !ranges[..*at].iter().any(same)
        };
        let flushed = (0..ranges.len()).filter(is_first).collect();
        let waiting = Waiting {
            state: Mutex::new(Rank::Queue, State::default()),
            changed: Condvar::new(),
        };
        Ok(Self {
            ranges,
            delays,
            flushed,
            waiting: Arc::new(waiting),
            may_delay: AtomicBool::new(true),
        })
    }

    fn devices(&self) -> &[DevRange] {
        &self.ranges
    }

    fn map(&self, mut bio: DmBio) -> MapResult {
        let has_flush = bio.flags().contains(BioFlags::PREFLUSH);
        let class = match bio.op() {
            Op::Read => 0,
            Op::Write if has_flush => 2,
            Op::Write | Op::Discard | Op::WriteZeroes => 1,
            Op::Flush => 2,
        };
        let range = if bio.op() == Op::Flush {
            let range = self.flushed[bio.nr()];
            bio.remap_to(&self.ranges[range], Sector::ZERO);
            self.range(class)
        } else {
            let range = self.range(class);
            bio.remap(&self.ranges[range]);
            range
        };
        let delay = self.delays[range];
        if delay.is_zero() || !self.may_delay.load(Ordering::Acquire) {
            return MapResult::Remapped(bio);
        }
        self.waiting.put(class, delay, bio);
        MapResult::Taken
    }

    fn flush_route(&self) -> FlushRoute {
        FlushRoute::ThroughMap
    }

    fn duplicates(&self, op: Op) -> usize {
        match op {
            Op::Flush => self.flushed.len(),
            _ => 1,
        }
    }

    fn event(&self, event: Event) -> BlkResult {
        match event {
            Event::Presuspend(_) => {
                self.may_delay.store(false, Ordering::Release);
                self.waiting.release();
            }
            Event::Resume => self.may_delay.store(true, Ordering::Release),
            Event::Postsuspend | Event::Preresume => {}
        }
        Ok(())
    }

    fn table_args(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        let rows = self.ranges.iter().zip(&self.delays);
        for (at, (range, delay)) in rows.enumerate() {
            let space = if at == 0 { "" } else { " " };
            let (name, start) = (range.dev().name(), range.start());
            write!(out, "{space}{name} {start} {}", delay.as_millis())?;
        }
        Ok(())
    }

    fn status(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        let state = self.waiting.state.lock_nested();
        let [reads, writes, flushes] = &state.lines;
        write!(out, "{} {} {}", reads.len(), writes.len(), flushes.len())
    }
}

impl Drop for Delay {
    // Nothing waits any more: each bio keeps the table, and so this. The thread ends by itself.
    fn drop(&mut self) {
        self.waiting.state.lock_nested().over = true;
        self.waiting.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use blockstack::{Op, Sector};

    use crate::target::Suspend;
    use crate::testing::Rig;

    crate::target_contract_tests!(super::Delay, "delay mem0 8 0");

    mod of_two {
        crate::target_contract_tests!(crate::delay::Delay, "delay mem0 8 0 mem0 8 1");
    }

    mod of_three {
        crate::target_contract_tests!(crate::delay::Delay, "delay mem0 8 0 mem0 8 0 mem1 0 1");
    }

    /// Longer than any test takes.
    const HOUR: u32 = 3_600_000;

    #[test]
    fn each_class_waits_and_a_suspend_ends_that() {
        let rig = Rig::new(
            &format!("delay mem0 0 {HOUR} mem1 0 {HOUR} mem2 0 {HOUR}"),
            64,
        );
        rig.start(Op::Read, Sector::new(1), Some(&[0; 512]), 0);
        rig.start(Op::Write, Sector::new(2), Some(&[1; 512]), 0);
        rig.start(Op::Write, Sector::new(3), Some(&[1; 512]), 0);
        rig.start(Op::Flush, Sector::ZERO, None, 0);
        // A flush for each of the three devices.
        assert_eq!(rig.mapped().status(), "0 64 delay 1 2 3\n");
        assert_eq!((rig.ended(), rig.disk("mem1").written()), ((0, 0), vec![]));
        rig.mapped().suspend(Suspend::Flush).unwrap();
        assert_eq!(rig.ended(), (4, 0));
        assert_eq!(rig.disk("mem1").written(), [2, 3].map(Sector::new));
        assert_eq!(rig.mapped().status(), "0 64 delay 0 0 0\n");
        rig.mapped().resume().unwrap();
        rig.start(Op::Write, Sector::new(2), Some(&[1; 512]), 0);
        assert_eq!(rig.mapped().status(), "0 64 delay 0 1 0\n");
        rig.mapped().suspend(Suspend::NoFlush).unwrap();
        assert_eq!(rig.ended(), (5, 0));
    }

    #[test]
    fn what_waited_long_enough_goes_down_in_order() {
        let rig = Rig::new("delay mem0 0 0 mem0 0 3", 64);
        for at in 0..20 {
            rig.start(Op::Write, Sector::new(at), Some(&[1; 512]), 0);
        }
        rig.write(Sector::new(20), &[1; 512]).unwrap();
        let order: Vec<u64> = rig
            .disk("mem0")
            .written()
            .iter()
            .map(|at| at.raw())
            .collect();
        assert_eq!(order, (0..=20).collect::<Vec<_>>());
    }
}
