//! Bios in, entries out, in the order of the kernel's `log-writes`.

use std::collections::VecDeque;
use std::sync::Arc;

use super::format::LogFlags;
use super::log::{Data, Entry};
use crate::bio::{Bio, BioFlags, Op};
use crate::device::{BlockDevice, DynDevice, Limits, Stats};
use crate::error::BlkResult;
use crate::forward::{Ended, Forward};
use crate::sync::{Mutex, Rank};
use crate::units::SectorCount;

/// Takes the entries of a log, in order. Called under a lock, so it must not wait.
pub trait Sink: Send + 'static {
    /// Takes the next.
    fn append(&mut self, entry: Entry);
}

impl Sink for Vec<Entry> {
    fn append(&mut self, entry: Entry) {
        self.push(entry);
    }
}

/// When a plain write is logged.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Order {
    /// As the kernel does: with the flush that made it durable.
    Kernel,
    /// When it has ended; behind a flush that was on its way then. What was in the cache while
    /// something else became durable can be told from such a log too.
    Completion,
}

/// A bio on its way.
#[derive(Debug, Default)]
pub struct Begun {
    flush: Option<u64>,
    entry: Option<Entry>,
}

struct InFlight {
    id: u64,
    /// Writes that had ended when it began.
    covers: Vec<Entry>,
}

struct State<S> {
    sink: S,
    /// Writes that have ended and are not logged yet.
    unflushed: Vec<Entry>,
    /// Flushes on their way, oldest first.
    flushes: VecDeque<InFlight>,
    next: u64,
}

impl<S: Sink> State<S> {
    fn log(&mut self, entries: Vec<Entry>) {
        for entry in entries {
            self.sink.append(entry);
        }
    }

    fn begin_flush(&mut self) -> u64 {
        let id = self.next;
        self.next += 1;
        let covers = std::mem::take(&mut self.unflushed);
        self.flushes.push_back(InFlight { id, covers });
        id
    }

    /// What ended before the flush began is durable, also what an older flush, which is still on
    /// its way, was to make so.
    fn end_flush(&mut self, id: u64, order: Order, res: BlkResult) {
        let Some(index) = self.flushes.iter().position(|flush| flush.id == id) else {
            return;
        };
        if res.is_err() {
            // A later flush may do it.
            if let Some(flush) = self.flushes.remove(index) {
                let heir = self.flushes.get_mut(index);
                let heir = heir.map_or(&mut self.unflushed, |heir| &mut heir.covers);
                heir.splice(0..0, flush.covers);
            }
        } else {
            for older in 0..=index {
                let covers = std::mem::take(&mut self.flushes[older].covers);
                self.log(covers);
            }
            self.flushes.remove(index);
            self.sink.append(Entry::flush());
        }
        if order == Order::Completion && self.flushes.is_empty() {
            let held = std::mem::take(&mut self.unflushed);
            self.log(held);
        }
    }
}

/// Makes a log of the bios it is told of. A device or target tells it of each bio before it is sent
/// on, and when it has ended, before its owner hears of that.
pub struct Recorder<S> {
    order: Order,
    state: Mutex<State<S>>,
}

impl<S: Sink> Recorder<S> {
    /// Makes one that logs to `sink`.
    #[must_use]
    pub fn new(order: Order, sink: S) -> Self {
        let state = State {
            sink,
            unflushed: Vec::new(),
            flushes: VecDeque::new(),
            next: 0,
        };
        Self {
            order,
            state: Mutex::new(Rank::Queue, state),
        }
    }

    /// A bio begins. Data is copied now, as it may be somebody else's when the bio has ended.
    #[must_use]
    pub fn begin(&self, bio: &Bio) -> Begun {
        let flags = bio.flags();
        let mut begun = Begun::default();
        let data = match bio.op() {
            Op::Read => return begun,
            Op::Flush => None,
            Op::Write => {
                let mut bytes = Vec::with_capacity(bio.byte_len());
                bio.for_each_bytes(|_, part| bytes.extend_from_slice(part));
                Some(Data::Bytes(bytes.into()))
            }
            Op::WriteZeroes => Some(Data::Zeros(bio.byte_len())),
            Op::Discard => Some(Data::None),
        };
        if bio.op() == Op::Flush || flags.contains(BioFlags::PREFLUSH) {
            begun.flush = Some(self.state.lock_nested().begin_flush());
        }
        let Some(data) = data.filter(|_| !bio.is_empty()) else {
            return begun;
        };
        let mut log_flags = LogFlags::empty();
        log_flags.set(LogFlags::FUA, flags.contains(BioFlags::FUA));
        log_flags.set(LogFlags::METADATA, flags.contains(BioFlags::META));
        log_flags.set(LogFlags::DISCARD, bio.op() == Op::Discard);
        begun.entry = Some(Entry {
            sector: bio.sector().raw(),
            sectors: bio.len().raw(),
            flags: log_flags,
            data,
        });
        begun
    }

    /// It ended. What failed is not logged.
    pub fn end(&self, begun: Begun, res: BlkResult) {
        if begun.flush.is_none() && begun.entry.is_none() {
            return;
        }
        let mut state = self.state.lock_nested();
        if let Some(id) = begun.flush {
            state.end_flush(id, self.order, res);
        }
        let Some(entry) = begun.entry.filter(|_| res.is_ok()) else {
            return;
        };
        let waits = self.order == Order::Kernel || !state.flushes.is_empty();
        if waits && !entry.flags.contains(LogFlags::FUA) {
            state.unflushed.push(entry);
        } else {
            state.sink.append(entry);
        }
    }

    /// Puts a text into the log.
    pub fn mark(&self, text: &str) {
        self.state.lock_nested().sink.append(Entry::mark(text));
    }

    /// Ends the log with what has ended and was never flushed, and gives what was logged.
    #[must_use]
    pub fn finish(&self) -> S
    where
        S: Default,
    {
        let mut state = self.state.lock_nested();
        for flush in std::mem::take(&mut state.flushes) {
            state.log(flush.covers);
        }
        let rest = std::mem::take(&mut state.unflushed);
        state.log(rest);
        std::mem::take(&mut state.sink)
    }

    /// Looks at what was logged so far.
    pub fn with_sink<T>(&self, look: impl FnOnce(&mut S) -> T) -> T {
        look(&mut self.state.lock_nested().sink)
    }
}

struct OneBio<S> {
    recorder: Arc<Recorder<S>>,
    begun: Mutex<Option<Begun>>,
}

impl<S: Sink> Ended for OneBio<S> {
    fn ended(&self, _: &Bio, res: BlkResult) -> BlkResult {
        let begun = self.begun.lock_nested().take();
        if let Some(begun) = begun {
            self.recorder.end(begun, res);
        }
        res
    }
}

/// A device that passes all bios on and records them.
pub struct RecordDisk<S> {
    name: String,
    recorder: Arc<Recorder<S>>,
    forward: Forward,
    stats: Stats,
}

impl<S: Sink> RecordDisk<S> {
    /// Makes a device above `lower` that tells `recorder`.
    #[must_use]
    pub fn new(lower: DynDevice, recorder: Arc<Recorder<S>>) -> Arc<Self> {
        Arc::new(Self {
            name: format!("recorded {}", lower.name()),
            recorder,
            forward: Forward::new(lower),
            stats: Stats::default(),
        })
    }
}

impl<S: Sink> BlockDevice for RecordDisk<S> {
    fn name(&self) -> &str {
        &self.name
    }

    fn capacity(&self) -> SectorCount {
        self.forward.lower.capacity()
    }

    /// As those below; with a cache, so that flushes are not left out.
    fn limits(&self) -> Limits {
        Limits {
            volatile_cache: true,
            ..self.forward.lower.limits()
        }
    }

    fn stats(&self) -> &Stats {
        &self.stats
    }

    fn submit(&self, bio: Bio) {
        if bio.op() == Op::Read {
            self.forward.send_plain(bio);
            return;
        }
        let begun = self.recorder.begin(&bio);
        let one = OneBio {
            recorder: self.recorder.clone(),
            begun: Mutex::new(Rank::Pool, Some(begun)),
        };
        self.forward.send(bio, Arc::new(one));
    }
}
