//! What a target is.

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;

use blockstack::{Bio, BioFlags, BlkResult, DynDevice, Lanes, Limits, Op, Sector, SectorCount};

pub use crate::args::{Args, CtrError};
use crate::duplicates::Leg;
use crate::mapped::LiveRef;

/// Maps the bios of one row of a table. The core splits, clones, checks ranges, fans flushes and
/// discards out, stacks limits, prints; a target only says where a bio goes.
pub trait Target: Send + Sync + Sized + 'static {
    /// The word in the table.
    const NAME: &'static str;
    /// Lives in the clone's front pad; `()` when unused.
    type PerBio: Default + Send + 'static;
    /// Whether [`Self::map`] gives back every bio it gets, remapped or to be requeued, and neither
    /// keeps nor ends one. Such a bio costs a reference to the table less.
    const SENDS_ON: bool = false;

    /// Parses the words after the name. Not on the I/O path: may read metadata.
    ///
    /// # Errors
    /// What is wrong with the words, or with what they name.
    fn new(args: &mut Args<'_>, cx: &TableCx<'_>) -> Result<Self, CtrError>;
    /// Lower ranges in use: the core flushes and stacks limits from them.
    fn devices(&self) -> &[DevRange];
    /// Sends `bio` on its way; its sector is relative to this row. Must not wait, least of all for a
    /// bio that was mapped before: of several [duplicates](Self::duplicates) the earlier ones are
    /// submitted only after the last was mapped.
    fn map(&self, bio: DmBio<Self::PerBio>) -> MapResult<Self::PerBio>;
    /// Prints what [`Self::new`] parses.
    ///
    /// # Errors
    /// The writer's.
    fn table_args(&self, out: &mut dyn fmt::Write) -> fmt::Result;

    /// Called when the clone ended, without locks; what it gives back is what the bio ends with.
    fn end_io(&self, _: &mut DmBio<Self::PerBio>, res: BlkResult) -> BlkResult {
        res
    }
    /// Changes the limits that stack up from [`Self::devices`].
    fn limits(&self, _: &mut Limits) {}
    /// How a flush reaches the devices.
    fn flush_route(&self) -> FlushRoute {
        FlushRoute::EachDevice
    }
    /// How many bios the target gets for one of `op`; always the same number. [`Self::map`] is
    /// called for each, with the whole range; they are told apart by [`DmBio::nr`], cut down to what
    /// one leg holds by [`DmBio::remap_part`], or completed where that is nothing. Asked for
    /// discards and write-zeroes, which are not supported where it is zero, and for flushes where
    /// they go [through `map`](FlushRoute::ThroughMap). Bios with data come once: a target that
    /// wants more of them has a set of its own.
    ///
    /// The kernel's `num_discard_bios`, `num_write_zeroes_bios` and `num_flush_bios`.
    fn duplicates(&self, _: Op) -> usize {
        1
    }
    /// Prints what stands after the name in a status line.
    ///
    /// # Errors
    /// The writer's.
    fn status(&self, _: &mut dyn fmt::Write) -> fmt::Result {
        Ok(())
    }
    /// Hears of suspend and resume; may wait.
    ///
    /// # Errors
    /// Of [`Event::Preresume`]: the device stays suspended.
    fn event(&self, _: Event) -> BlkResult {
        Ok(())
    }
    /// Takes a message and gives the answer.
    ///
    /// # Errors
    /// Where it is not understood, or cannot be done.
    fn message(&self, _: &mut Args<'_>) -> Result<String, CtrError> {
        Err(CtrError::NoMessages)
    }
}

/// What became of a bio.
#[must_use]
pub enum MapResult<P = ()> {
    /// The core submits it to the device it now names.
    Remapped(DmBio<P>),
    /// The target owns it: queued, or already completed.
    Taken,
    /// The core holds it until the next resume, and maps it then anew; of several
    /// [duplicates](Target::duplicates) all, after those on their way ended.
    Requeue(DmBio<P>),
}

/// How a flush of the mapped device reaches what is below a row.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FlushRoute {
    /// A flush goes to each of the row's devices, past the target.
    EachDevice,
    /// The target maps an empty flush, or as many as it [says](Target::duplicates).
    ThroughMap,
}

/// How a suspended device treats what is on its way.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Suspend {
    /// Everything that was accepted is done first.
    Flush,
    /// Targets may give back, by [`MapResult::Requeue`], what they hold.
    NoFlush,
}

/// What a target hears of.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Event {
    /// Bios still come; what the target has queued shall go on.
    Presuspend(Suspend),
    /// No bio is on its way any more, and none comes.
    Postsuspend,
    /// Bios are about to come.
    Preresume,
    /// Bios come.
    Resume,
}

/// A range of a lower device.
#[derive(Clone)]
pub struct DevRange {
    dev: Lanes,
    start: Sector,
    len: SectorCount,
}

impl DevRange {
    /// Makes a range.
    ///
    /// # Errors
    /// [`CtrError::RangePastEnd`] where it ends after the device.
    pub fn new(dev: DynDevice, start: Sector, len: SectorCount) -> Result<Self, CtrError> {
        let capacity = dev.capacity();
        let end = start.checked_add(len);
        if end.is_none_or(|end| end.raw() > capacity.raw()) {
            return Err(CtrError::RangePastEnd {
                dev: dev.name().to_owned(),
                start,
                len,
                capacity,
            });
        }
        let dev = Lanes::new(&dev);
        Ok(Self { dev, start, len })
    }

    /// The device.
    #[must_use]
    pub fn dev(&self) -> &DynDevice {
        self.dev.dev()
    }

    /// Its first sector.
    #[must_use]
    pub fn start(&self) -> Sector {
        self.start
    }

    /// Its length.
    #[must_use]
    pub fn len(&self) -> SectorCount {
        self.len
    }

    /// Whether it has no sectors.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == SectorCount::ZERO
    }
}

impl fmt::Debug for DevRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}+{}]", self.dev.name(), self.start, self.len)
    }
}

/// Where devices come from: a path, or the name of a device made earlier.
pub trait DeviceSource {
    /// Opens the device that a table names.
    ///
    /// # Errors
    /// [`BlkError::NoDevice`](blockstack::BlkError::NoDevice) where there is none, or why it cannot
    /// be opened.
    fn open(&self, name: &str) -> BlkResult<DynDevice>;
}

impl<F: Fn(&str) -> BlkResult<DynDevice>> DeviceSource for F {
    fn open(&self, name: &str) -> BlkResult<DynDevice> {
        self(name)
    }
}

/// What a target is told when it is made.
pub struct TableCx<'a> {
    devices: &'a dyn DeviceSource,
    start: Sector,
    len: SectorCount,
    pub(crate) max_io: Cell<Option<SectorCount>>,
    pub(crate) notifier: Notifier,
}

impl<'a> TableCx<'a> {
    pub(crate) fn new(devices: &'a dyn DeviceSource, start: Sector, len: SectorCount) -> Self {
        Self {
            devices,
            start,
            len,
            max_io: Cell::new(None),
            notifier: Notifier::default(),
        }
    }

    /// Opens a device.
    ///
    /// # Errors
    /// Why it cannot be had.
    pub fn open(&self, name: &str) -> Result<DynDevice, CtrError> {
        self.devices.open(name).map_err(|source| CtrError::Device {
            name: name.to_owned(),
            source,
        })
    }

    /// First sector of the row on the mapped device.
    #[must_use]
    pub fn start(&self) -> Sector {
        self.start
    }

    /// Length of the row.
    #[must_use]
    pub fn len(&self) -> SectorCount {
        self.len
    }

    /// Whether the row has no sectors; never.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == SectorCount::ZERO
    }

    /// Has the core split bios at each multiple of `len` from the row's start.
    pub fn split_at(&self, len: SectorCount) {
        self.max_io.set((len != SectorCount::ZERO).then_some(len));
    }

    /// Tells whoever waits for events of the mapped device.
    #[must_use]
    pub fn notifier(&self) -> Notifier {
        self.notifier.clone()
    }
}

/// Counts up the events of the mapped device a target belongs to.
#[derive(Clone, Default)]
pub struct Notifier(pub(crate) Arc<std::sync::OnceLock<Arc<crate::mapped::Events>>>);

impl Notifier {
    /// Something happened that a monitor wants to know.
    pub fn notify(&self) {
        if let Some(events) = self.0.get() {
            events.raise();
        }
    }
}

/// What a bio of a set was made for.
pub(crate) enum Whose {
    /// A bio, whose clone it is.
    Clone(Bio),
    /// One of several duplicates.
    Leg(Leg),
}

/// Where a bio of a set belongs to.
pub(crate) struct Origin {
    pub(crate) whose: Whose,
    /// Keeps the table, and tells a suspend that this bio is on its way.
    pub(crate) live: LiveRef,
    pub(crate) row: usize,
}

/// What the core keeps with each clone.
#[derive(Default)]
pub(crate) struct Tio<P> {
    pub(crate) origin: Option<Origin>,
    /// Which of several duplicates.
    pub(crate) nr: usize,
    pub(crate) data: P,
}

/// A clone of a bio, in the hands of a target. A drop ends it with an error, as of any bio.
pub struct DmBio<P = ()> {
    /// Counts its sectors from the start of the row until it is remapped.
    pub(crate) bio: Bio,
    pad: std::marker::PhantomData<fn() -> P>,
}

impl<P: Default + Send + 'static> DmBio<P> {
    pub(crate) fn new(bio: Bio) -> Self {
        Self {
            bio,
            pad: std::marker::PhantomData,
        }
    }

    /// What it asks for.
    #[must_use]
    pub fn op(&self) -> Op {
        self.bio.op()
    }

    /// How it is to be done.
    #[must_use]
    pub fn flags(&self) -> BioFlags {
        self.bio.flags()
    }

    /// Where it begins, from the start of the row; after a remap: of the device it names.
    #[must_use]
    pub fn sector(&self) -> Sector {
        self.bio.sector()
    }

    /// Its length; zero for a flush.
    #[must_use]
    pub fn len(&self) -> SectorCount {
        self.bio.len()
    }

    /// Whether it has no range.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bio.is_empty()
    }

    /// Which of its [duplicates](Target::duplicates) it is, from zero; the kernel's
    /// `dm_bio_get_target_bio_nr`.
    #[must_use]
    pub fn nr(&self) -> usize {
        self.bio.pad::<Tio<P>>().nr
    }

    /// The target's data.
    #[must_use]
    pub fn data_mut(&mut self) -> &mut P {
        &mut self.bio.pad_mut::<Tio<P>>().data
    }

    /// Names the device of `range`, and there the sector as far from its start as the bio was from
    /// the row's.
    pub fn remap(&mut self, range: &DevRange) {
        self.remap_to(range, self.sector());
    }

    /// Names the device of `range`, and there the sector `offset` from its start.
    pub fn remap_to(&mut self, range: &DevRange, offset: Sector) {
        debug_assert!(
            offset.raw() + self.len().raw() <= range.len.raw(),
            "a bio of {} sectors at {offset} leaves {range:?}",
            self.len()
        );
        let sector = Sector::new(range.start.raw() + offset.raw());
        self.bio.set_lane(&range.dev, sector);
    }

    /// As [`Self::remap_to`], with the length that the device is to get: for a discard or
    /// write-zeroes of which it holds a part. Where that is empty, [complete](Self::complete) the
    /// bio instead.
    pub fn remap_part(&mut self, range: &DevRange, offset: Sector, len: SectorCount) {
        debug_assert!(
            len.raw() > 0 && len.raw() <= self.len().raw(),
            "{len} sectors of {self:?}"
        );
        self.bio.set_len(len);
        self.remap_to(range, offset);
    }

    /// Copies the data of a write out; `visit` gets byte offset and bytes.
    pub fn for_each_bytes(&self, visit: impl FnMut(usize, &[u8])) {
        self.bio.for_each_bytes(visit);
    }

    /// Fills the memory of a read; `fill` gets byte offset and bytes.
    pub fn fill_each(&mut self, fill: impl FnMut(usize, &mut [u8])) {
        self.bio.fill_each(fill);
    }

    /// Ends it.
    pub fn complete(self, res: BlkResult) {
        self.bio.complete(res);
    }

    /// Submits it, remapped, from a context of the target's own.
    pub fn submit(self) {
        blockstack::submit_bio(self.bio);
    }
}

impl<P> fmt::Debug for DmBio<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} of {} at {}",
            self.bio.op(),
            self.bio.len(),
            self.bio.sector()
        )
    }
}
