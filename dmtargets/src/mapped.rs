//! A device made of a table.
//!
//! The live table hangs on one atomic pointer: a bio takes a guard of it, which the thread notes
//! where no other thread writes, and that guard, kept until the bio has ended, is also what a
//! suspend waits for: the exchange of the pointer turns guards into counted references. A suspended
//! device has the same table under another pointer, marked as not running; its bios are deferred
//! until the next resume.
//!
//! # Forward progress
//!
//! All bios of a device come from bounded sets, one bio in each is enough, and no set has a rescuer.
//! What holds instead:
//!
//! 1. A bio is split, and its front cloned and mapped, with one allocation from the set of pieces
//!    and one from that of clones. The rest is submitted to the device, which puts it on the list of
//!    the thread *behind* all that the front sends down: depth first. When it is taken up, whatever
//!    the thread took from the device's sets before is on its way.
//! 2. Of a bio without data a target may want several ([`duplicates`]), and a flush goes to
//!    each device below. These, of a set that holds nothing else, are allocated all or none: without
//!    waiting; then, where that fails, waiting, under one mutex of the device. Between them nothing
//!    is allocated from the device's sets, and all are taken up before anything of the device or of
//!    one above. There are no duplicates of writes with data.
//! 3. What is put aside for a resume holds no bio of the device: what was deferred came from above,
//!    and a piece that a target gives back leaves its set ([`BioSet::disown`]).
//! 4. A write whose flush is over is submitted by a queue of the device itself.
//!
//! So a thread that waits for a bio of a device waits for bios that are below it, on their way or on
//! the list of a thread that is itself busy, or waits, further down; and at the bottom nobody waits.
//!
//! ## Why
//!
//! Without 1 (`P1`, `P2` pieces of `B`; `C1` a clone; one bio in each set; also with a lock that
//! `map` takes and the end of the clone gives back, as a snapshot's):
//!
//! ```text
//! dm: split P1, map P1 -> C1                  list: C1
//! dm: split P2: waits for P1, which waits for C1, which waits behind this thread
//! ```
//!
//! The answer once was a rescuer: `C1` was handed to the device's thread. That thread has more to do
//! (`dm_wq_work`: first `md->rescued`, then `md->deferred`), and a snapshot's lock ties the knot:
//!
//! ```text
//! T: maps B1, takes the snapshot's lock, given back when B1's bios below end
//! T: waits for a bio; B1's bios below go to md->rescued
//! dm_wq_work: B2 of md->deferred -> snapshot_map: waits for the lock
//! B1's bios wait on md->rescued for dm_wq_work
//! ```
//!
//! Here nothing is handed over. [`MappedDevice::resume`] submits what was deferred, one bio after the
//! other, and may well be the one that is blocked in `map`; those behind it in its hands came from
//! above (3), so that nothing which it waits for waits for them:
//!
//! ```text
//! R: resume: B1 -> map takes the lock -> C1 below, held up there; B2 -> map waits for the lock
//! B3 .. B8 wait for R; C1 needs none of them, ends, the lock is free, R goes on
//! ```
//!
//! Without 2, three bios in the set of duplicates and three legs: a thread with two of them waits for
//! the third, which another has, that waits for its second.
//!
//! Without 3, one piece: `P1` is given back by the target and put aside with its place in the set.
//! The rest of its bio waits for a piece; the suspend waits for the rest; `P1` waits for the resume.
//!
//! Without 4, a queue for all devices, of which `top` is over `low`: its threads submit writes to
//! `top`, which wait for clones of `top`'s in `low`, which wait for writes to `low` behind them in
//! the queue. Submitted by whoever ends the flush, inside the submission of some other bio, the
//! write is taken up *before* what that has parked, and may wait for it.
//!
//! Duplicates are mapped one after the other, and only then submitted; so a target must not hold, from
//! the `map` of one to its end, what the `map` of the next waits for.
//!
//! ## Tests
//!
//! In `mapped/forward_progress.rs`, with a disk that ends bios late, in any order, and also inside
//! the submission of others: `one_to_eight_layers_get_by_with_one_bio_each_and_without_a_rescuer`,
//! `a_device_that_maps_all_pieces_at_once_would_stall` (1 switched off),
//! `as_many_bios_as_one_discard_needs_are_enough_for_all_threads`,
//! `two_threads_with_half_of_the_bios_each_would_stall` (2 switched off),
//! `a_lock_held_to_the_end_of_a_bio_is_given_back`,
//! `a_lock_whose_bio_is_parked_behind_the_thread_that_waits_for_it_would_stall` (1 switched off),
//! `the_one_who_resumes_may_be_blocked_in_map_with_deferred_bios_behind`,
//! `devices_are_suspended_and_resumed_while_others_hold_the_lock`,
//! `writes_after_a_flush_do_not_wait_for_those_of_devices_above`,
//! `one_queue_of_writes_for_all_devices_would_stall` (4 switched off). In `mapped/tests.rs`:
//! `a_piece_that_is_requeued_keeps_no_place_in_the_set_of_pieces` (3). For every target:
//! `one_bio_makes_progress` of `target_contract_tests`. What becomes
//! of duplicates (parts, errors, requeue) stands with the target `legs` beside the first.
//!
//! [`duplicates`]: crate::Target::duplicates
//!
//! # Locking
//!
//! submit:          none but leaves (the pools)
//! submit, stopped: gate (leaf)
//! several bios:    the mutex of duplicates, held while waiting for them, on a thread that submits
//! suspend, resume: admin -> gate, released before targets are told or bios are submitted

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, Guard};
use blockstack::device::Stats;
use blockstack::sync::{Condvar, Mutex, Rank, assert_may_wait};
use blockstack::units::SECTOR_SHIFT;
use blockstack::{
    Bio, BioFlags, BioSet, BlkError, BlkResult, BlockDevice, Bounds, DynDevice, Limits,
    OnceWorkqueue, Op, Sector, SectorCount, Wait, Workqueue, submit_bio,
};

use crate::args::{Args, CtrError};
#[cfg(test)]
use crate::duplicates::Cure;
use crate::duplicates::{self, Duplicates};
use crate::flush::FlushPlan;
use crate::linear::Linear;
use crate::row::{Row, Sets};
use crate::table::{Table, TableError, TableRow, print_rows};
use crate::target::{DevRange, Event, Suspend};

/// Bios of each kind that a device has for its clones, where nothing else is asked for.
const BIOS: usize = 256;

/// Threads of a device that submit writes whose flush is over.
const WRITERS: usize = 4;

/// A counter that can be waited for.
pub(crate) struct Events {
    count: AtomicU64,
    lock: Mutex<()>,
    raised: Condvar,
}

impl Events {
    pub(crate) fn raise(&self) {
        self.count.fetch_add(1, Ordering::AcqRel);
        drop(self.lock.lock_nested());
        self.raised.notify_all();
    }
}

/// Longest bio of each kind in a row, in sectors; zero where not supported.
#[derive(Clone, Copy)]
struct Longest {
    data: u64,
    discard: u64,
    zeroes: u64,
}

/// A bio with data that ends at most there and is at most so long, in sectors, is the first row's
/// as it is.
#[derive(Clone, Copy, Default)]
struct Plain {
    end: u64,
    longest: u64,
}

/// A table in the hands of a device.
pub(crate) struct Bound {
    pub(crate) rows: Vec<TableRow>,
    longest: Vec<Longest>,
    plain: Plain,
    limits: Limits,
    pub(crate) flush: FlushPlan,
}

impl Bound {
    fn new(table: Table, sets: &Sets, events: &Arc<Events>) -> Result<Self, TableError> {
        let mut limits = Limits::UNLIMITED;
        let mut longest = Vec::with_capacity(table.rows.len());
        for row in &table.rows {
            let mut below = Limits::UNLIMITED;
            for range in row.row.devices() {
                below = below.stack(range.dev().limits());
            }
            row.row.limits(&mut below);
            if row.row.duplicates(Op::Discard) == 0 {
                below.max_discard_sectors = 0;
            }
            if row.row.duplicates(Op::WriteZeroes) == 0 {
                below.max_write_zeroes_sectors = 0;
            }
            let unit = u64::from(below.logical_block_size >> SECTOR_SHIFT);
            let whole = |sectors: u64| {
                if sectors > unit {
                    sectors - sectors % unit
                } else {
                    sectors
                }
            };
            longest.push(Longest {
                data: whole(u64::from(below.max_sectors)).max(unit),
                discard: whole(below.max_discard_sectors),
                zeroes: whole(below.max_write_zeroes_sectors),
            });
            limits = limits.stack(below);
            row.row.bind(sets);
            row.notifier.0.get_or_init(|| events.clone());
        }
        let unit = u64::from(limits.logical_block_size >> SECTOR_SHIFT);
        let inside = |row: &TableRow| row.start.raw() % unit != 0 || row.end() % unit != 0;
        if let Some(row) = table.rows.iter().position(inside) {
            return Err(TableError::Unaligned {
                row: row + 1,
                block_size: limits.logical_block_size,
            });
        }
        let flush = FlushPlan::new(&table.rows, sets.limit);
        let plain = match (&table.rows[..], &longest[..]) {
            ([row, ..], [longest, ..]) if row.max_io.is_none() => Plain {
                end: row.end(),
                longest: longest.data,
            },
            _ => Plain::default(),
        };
        Ok(Self {
            rows: table.rows,
            longest,
            plain,
            limits,
            flush,
        })
    }

    /// No table: what a removed device has.
    fn nothing() -> Self {
        Self {
            rows: Vec::new(),
            longest: Vec::new(),
            plain: Plain::default(),
            limits: Limits::UNLIMITED,
            flush: FlushPlan::new(&[], 1),
        }
    }

    fn capacity(&self) -> SectorCount {
        SectorCount::new(self.rows.last().map_or(0, TableRow::end))
    }

    fn find(&self, sector: Sector) -> Option<usize> {
        let after = self.rows.partition_point(|row| row.start <= sector);
        let at = after.checked_sub(1)?;
        (sector.raw() < self.rows[at].end()).then_some(at)
    }

    /// How many duplicates the row wants of a bio.
    fn duplicates(&self, at: usize, op: Op) -> usize {
        if op.has_data() {
            return 1;
        }
        self.rows[at].row.duplicates(op)
    }

    /// How much of `bio` the row may get at once; zero where the row does not support it.
    fn front(&self, at: usize, bio: &Bio) -> u64 {
        let row = &self.rows[at];
        let mut len = bio.len().raw().min(row.end() - bio.sector().raw());
        // A target that gets a discard for each leg takes it whole, as far as the row goes.
        if let Some(max) = row.max_io
            && self.duplicates(at, bio.op()) == 1
        {
            let inside = (bio.sector().raw() - row.start.raw()) % max.raw();
            len = len.min(max.raw() - inside);
        }
        let longest = &self.longest[at];
        len.min(match bio.op() {
            Op::Read | Op::Write => longest.data,
            Op::Discard => longest.discard,
            Op::WriteZeroes => longest.zeroes,
            Op::Flush => 0,
        })
    }
}

/// A table as bios see it.
pub(crate) struct Live {
    pub(crate) bound: Arc<Bound>,
    running: bool,
    gate: Arc<Gate>,
}

/// A table that cannot go away, and for which a suspend waits.
pub(crate) type LiveRef = Guard<Arc<Live>>;

/// A second reference.
pub(crate) fn again(live: &LiveRef) -> LiveRef {
    Guard::from_inner(Arc::clone(live))
}

impl Live {
    pub(crate) fn row(&self, at: usize) -> Option<&dyn Row> {
        self.bound.rows.get(at).map(|row| row.row.as_ref())
    }

    pub(crate) fn duplicates(&self) -> &Duplicates {
        &self.gate.duplicates
    }

    /// Submits a write whose flush is over, from a context that may wait for a clone.
    pub(crate) fn queue_write(&self, write: Bio) {
        let make = || Workqueue::new("dm-after-flush", WRITERS, submit_bio);
        #[cfg(test)]
        if !self.duplicates().has(Cure::OwnQueue) {
            ALL_WRITES.get_or_make(make).unwrap().queue(write);
            return;
        }
        match self.gate.writes.get_or_make(make) {
            Ok(queue) => queue.queue(write),
            Err(error) => {
                log::error!("cannot start a thread for writes after a flush: {error}");
                write.complete(Err(BlkError::NoMemory));
            }
        }
    }
}

/// Holds `parent`, which was on its way under `live`, until the next resume.
pub(crate) fn requeue(live: LiveRef, mut parent: Bio) {
    // A piece of a longer bio: others, whom the suspend before that resume waits for, may wait for
    // its place.
    live.gate.pieces.disown(&mut parent);
    live.gate.deferred.lock_nested().push_back(parent);
    release(live);
}

/// In place of the queues of the devices, where a test switches those off.
#[cfg(test)]
static ALL_WRITES: OnceWorkqueue<Bio> = OnceWorkqueue::new();

/// What a device keeps whatever its table.
struct Gate {
    /// Of a stopped device: what came, and what is to be mapped anew.
    deferred: Mutex<VecDeque<Bio>>,
    /// Somebody waits for bios to end.
    draining: AtomicBool,
    drained: Condvar,
    /// Front pieces of bios that are too long.
    pieces: BioSet<()>,
    duplicates: Duplicates,
    /// Writes whose flush is over.
    writes: OnceWorkqueue<Bio>,
}

/// Ends `parent`, which was on its way under `live`.
#[inline]
pub(crate) fn finish(live: LiveRef, parent: Bio, res: BlkResult) {
    parent.complete(res);
    release(live);
}

#[inline]
pub(crate) fn release(live: LiveRef) {
    let draining = live.gate.draining.load(Ordering::SeqCst);
    let gate = draining.then(|| live.gate.clone());
    drop(live);
    if let Some(gate) = gate {
        gate.drained.notify_all();
    }
}

/// See the module's documentation.
pub struct MappedDevice {
    name: String,
    live: ArcSwap<Live>,
    gate: Arc<Gate>,
    /// Of the live table, for a look at every bio: sectors, and limits as [`pack`] puts them.
    capacity: AtomicU64,
    bounds: AtomicU64,
    sets: Sets,
    events: Arc<Events>,
    /// One administrative call at a time; holds the table that was loaded and is not live. Those
    /// calls come with no lock held, hence the outermost rank.
    admin: Mutex<Option<Arc<Bound>>>,
    stats: Stats,
}

impl MappedDevice {
    /// Makes a device of `table` and starts it.
    ///
    /// # Errors
    /// Where rows and devices do not fit together.
    pub fn create(name: &str, table: Table) -> Result<Arc<Self>, TableError> {
        Self::with_bios(name, table, BIOS)
    }

    /// As [`Self::create`], with `bios` bios of each kind for clones; one is enough.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn with_bios(name: &str, table: Table, bios: usize) -> Result<Arc<Self>, TableError> {
        let events = Arc::new(Events {
            count: AtomicU64::new(0),
            lock: Mutex::new(Rank::Pool, ()),
            raised: Condvar::new(),
        });
        let sets = Sets::new(name, bios);
        let gate = Arc::new(Gate {
            deferred: Mutex::new(Rank::Pool, VecDeque::new()),
            draining: AtomicBool::new(false),
            drained: Condvar::new(),
            pieces: BioSet::without_rescuer(name, bios),
            duplicates: Duplicates::new(),
            writes: OnceWorkqueue::new(),
        });
        let bound = Arc::new(Bound::new(table, &sets, &events)?);
        Ok(Arc::new(Self {
            name: name.to_owned(),
            capacity: AtomicU64::new(bound.capacity().raw()),
            bounds: AtomicU64::new(pack(&bound.limits)),
            live: ArcSwap::from_pointee(Live {
                bound,
                running: true,
                gate: gate.clone(),
            }),
            gate,
            sets,
            events,
            admin: Mutex::new(Rank::Mount, None),
            stats: Stats::default(),
        }))
    }

    /// Loads a table that becomes live at the next [`Self::resume`].
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn load(&self, table: Table) -> Result<(), TableError> {
        let bound = Bound::new(table, &self.sets, &self.events)?;
        *self.admin.lock() = Some(Arc::new(bound));
        Ok(())
    }

    /// Drops a table that was loaded and is not live.
    pub fn clear(&self) {
        let loaded = self.admin.lock().take();
        drop(loaded);
    }

    /// Stops the device: bios that come are deferred, and those on their way are waited for.
    ///
    /// # Errors
    /// What a target reports; the device is stopped all the same.
    pub fn suspend(&self, mode: Suspend) -> BlkResult {
        assert_may_wait();
        let _admin = self.admin.lock();
        self.stop(mode)
    }

    fn stop(&self, mode: Suspend) -> BlkResult {
        let live = self.live.load_full();
        if !live.running {
            return Ok(());
        }
        let before = tell(&live.bound, Event::Presuspend(mode));
        let bound = live.bound.clone();
        drop(live);
        self.gate.draining.store(true, Ordering::SeqCst);
        let old = self.enter(bound.clone(), false);
        let mut deferred = self.gate.deferred.lock_nested();
        while Arc::strong_count(&old) > 1 {
            // The last bio may have looked at `draining` too early; the timeout makes that good.
            self.gate
                .drained
                .wait_for(&mut deferred, Duration::from_millis(1));
        }
        drop(deferred);
        self.gate.draining.store(false, Ordering::SeqCst);
        self.sets.forget_devices();
        before.and(tell(&bound, Event::Postsuspend))
    }

    /// Makes a table the live one; gives back what was live.
    fn enter(&self, bound: Arc<Bound>, running: bool) -> Arc<Live> {
        // Bios that were held against the numbers of before are found out by the rows.
        let capacity = bound.capacity().raw();
        self.capacity.store(capacity, Ordering::Relaxed);
        self.bounds.store(pack(&bound.limits), Ordering::Relaxed);
        let live = Arc::new(Live {
            bound,
            running,
            gate: self.gate.clone(),
        });
        self.live.swap(live)
    }

    /// Starts the device, with the table loaded last where there is one; a running device is
    /// suspended for the change.
    ///
    /// # Errors
    /// What a target reports; the device stays stopped.
    pub fn resume(&self) -> BlkResult {
        let mut admin = self.admin.lock();
        let running = self.live.load().running;
        if running && admin.is_none() {
            return Ok(());
        }
        if running {
            self.stop(Suspend::Flush)?;
        }
        let bound = match admin.take() {
            Some(loaded) => loaded,
            None => self.live.load().bound.clone(),
        };
        if let Err(error) = tell(&bound, Event::Preresume) {
            *admin = Some(bound);
            return Err(error);
        }
        self.go(bound.clone());
        tell(&bound, Event::Resume)
    }

    fn go(&self, bound: Arc<Bound>) {
        let mut gate = self.gate.deferred.lock_nested();
        // Under the gate: who defers looks again while holding it.
        let old = self.enter(bound, true);
        let deferred = std::mem::take(&mut *gate);
        drop(gate);
        drop(old);
        deferred.into_iter().for_each(submit_bio);
    }

    /// Stops the device for ever: deferred and later bios end with an error, and the devices below
    /// are let go.
    pub fn remove(&self) {
        let mut admin = self.admin.lock();
        if let Err(error) = self.stop(Suspend::NoFlush) {
            log::warn!("{}: remove: {error}", self.name);
        }
        *admin = None;
        self.go(Arc::new(Bound::nothing()));
    }

    /// Whether bios are deferred.
    #[must_use]
    pub fn is_suspended(&self) -> bool {
        !self.live.load().running
    }

    /// The live table as `dmsetup table` prints it.
    #[must_use]
    pub fn table(&self) -> String {
        self.print(|row, out| row.table_args(out))
    }

    /// What `dmsetup status` prints.
    #[must_use]
    pub fn status(&self) -> String {
        self.print(|row, out| row.status(out))
    }

    fn print(&self, words: fn(&dyn Row, &mut dyn fmt::Write) -> fmt::Result) -> String {
        let mut out = String::new();
        if print_rows(&self.live.load().bound.rows, &mut out, words).is_err() {
            log::error!("{}: a target could not print itself", self.name);
        }
        out
    }

    /// Sends a message to the target of `sector`, and gives its answer.
    ///
    /// # Errors
    /// The target's, or where there is none.
    pub fn message(&self, sector: Sector, text: &str) -> Result<String, CtrError> {
        let live = self.live.load();
        let words: Vec<&str> = text.split_ascii_whitespace().collect();
        let row = live.bound.find(sector).and_then(|at| live.row(at));
        let answer = match row {
            Some(row) => row.message(&mut Args::new(&words, 1)),
            None => Err(CtrError::Unfit("no target at this sector")),
        };
        release(live);
        answer
    }

    /// Events of the targets so far.
    #[must_use]
    pub fn event_count(&self) -> u64 {
        self.events.count.load(Ordering::Acquire)
    }

    /// Waits until there were other than `seen` events, or the time is over; gives their count.
    #[must_use]
    pub fn wait_event(&self, seen: u64, timeout: Duration) -> u64 {
        assert_may_wait();
        let deadline = Instant::now() + timeout;
        let mut lock = self.events.lock.lock_nested();
        while self.event_count() == seen && self.events.raised.wait_until(&mut lock, deadline) {}
        self.event_count()
    }

    /// The devices below, each once.
    #[must_use]
    pub fn devices(&self) -> Vec<DynDevice> {
        self.live.load().bound.flush.below().to_vec()
    }

    #[inline]
    fn process(&self, live: LiveRef, bio: Bio) -> Option<Bio> {
        let bound = &live.bound;
        let plain = bio.op().has_data() && !bio.flags().contains(BioFlags::PREFLUSH);
        let end = bio.sector().raw() + bio.len().raw();
        if plain && end <= bound.plain.end && bio.len().raw() <= bound.plain.longest {
            return send(live, 0, bio);
        }
        self.process_any(live, bio)
    }

    fn process_any(&self, live: LiveRef, mut bio: Bio) -> Option<Bio> {
        let bound = &live.bound;
        let flushes = bio.op() == Op::Flush
            || bio.is_empty()
            || (bio.flags().contains(BioFlags::PREFLUSH) && !bound.flush.may_ride());
        if flushes {
            crate::flush::fan_out(&live, bio);
            return None;
        }
        let Some(at) = bound.find(bio.sector()) else {
            bio.complete(Err(BlkError::OutOfRange));
            return None;
        };
        let front = bound.front(at, &bio);
        if front < bio.len().raw() {
            bio = self.split(&live, front, bio)?;
        }
        match bound.duplicates(at, bio.op()) {
            1 => send(live, at, bio),
            count => {
                duplicates::map(&live, at, count, bio);
                None
            }
        }
    }

    /// Cuts the front off and submits the rest.
    #[cold]
    #[cfg_attr(
        not(test),
        expect(unused_variables, reason = "a test switches depth first off")
    )]
    fn split(&self, live: &LiveRef, front: u64, mut bio: Bio) -> Option<Bio> {
        if front == 0 {
            bio.complete(Err(BlkError::NotSupported));
            return None;
        }
        let piece = bio.split(SectorCount::new(front), &self.gate.pieces, Wait::Yes);
        let Some(piece) = piece else {
            bio.complete(Err(BlkError::NoMemory));
            return None;
        };
        #[cfg(test)]
        if !self.gate.duplicates.has(Cure::DepthFirst) {
            for bio in [piece, bio] {
                let on = self.process(again(live), bio);
                on.into_iter().for_each(submit_bio);
            }
            return None;
        }
        // Onto the thread's list, behind what the front sends down.
        submit_bio(bio);
        Some(piece)
    }

    fn defer(&self, bio: Bio) -> Option<Bio> {
        let mut deferred = self.gate.deferred.lock_nested();
        if self.live.load().running {
            return Some(bio);
        }
        deferred.push_back(bio);
        None
    }
}

/// Has the row `at` map `bio`, which lies in it; gives a clone that is to be sent on.
#[inline]
fn send(live: LiveRef, at: usize, bio: Bio) -> Option<Bio> {
    let row = &live.bound.rows[at];
    let tell = row.tell;
    let (mut clone, parent) = row.row.map(&live, at, row.inside(bio.sector()), bio)?;
    tell(&mut clone, parent, live, at);
    Some(clone)
}

/// In what [`pack`] gives.
const READ_ONLY: u64 = 1 << 32;

/// Block size and [`READ_ONLY`] in one word.
fn pack(limits: &Limits) -> u64 {
    let read_only = if limits.read_only { READ_ONLY } else { 0 };
    u64::from(limits.logical_block_size) | read_only
}

fn tell(bound: &Bound, event: Event) -> BlkResult {
    bound
        .rows
        .iter()
        .map(|row| row.row.event(event))
        .fold(Ok(()), BlkResult::and)
}

impl BlockDevice for MappedDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn capacity(&self) -> SectorCount {
        self.live.load().bound.capacity()
    }

    fn limits(&self) -> Limits {
        self.live.load().bound.limits
    }

    fn stats(&self) -> &Stats {
        &self.stats
    }

    #[inline]
    fn bounds(&self) -> Bounds {
        let packed = self.bounds.load(Ordering::Relaxed);
        Bounds {
            capacity: SectorCount::new(self.capacity.load(Ordering::Relaxed)),
            logical_block_size: packed as u32,
            read_only: packed & READ_ONLY != 0,
        }
    }

    fn submit(&self, bio: Bio) {
        if let Some(on) = self.forward(bio) {
            submit_bio(on);
        }
    }

    fn forward(&self, mut bio: Bio) -> Option<Bio> {
        loop {
            // A guard, not a count: a suspend that swaps the pointer makes it one.
            let live = self.live.load();
            if live.running {
                return self.process(live, bio);
            }
            drop(live);
            bio = self.defer(bio)?;
        }
    }
}

impl fmt::Debug for MappedDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MappedDevice")
            .field("name", &self.name)
            .field("suspended", &self.is_suspended())
            .field("table", &self.table())
            .finish_non_exhaustive()
    }
}

/// A device that is `len` sectors of `dev` from `start` on.
///
/// # Errors
/// Where the range is not on `dev`, or not on its block boundaries.
pub fn linear_over(
    dev: DynDevice,
    start: Sector,
    len: SectorCount,
) -> Result<Arc<MappedDevice>, TableError> {
    let name = format!("linear:{}:{start}", dev.name());
    let range = DevRange::new(dev, start, len).map_err(|source| TableError::Target {
        row: 1,
        target: "linear",
        source,
    })?;
    MappedDevice::create(&name, Table::single(len, Linear::over(range))?)
}

#[cfg(test)]
mod forward_progress;
#[cfg(test)]
mod tests;
