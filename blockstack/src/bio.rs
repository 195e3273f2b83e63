//! The unit of I/O.
//!
//! A [`Bio`] is owned, moved from layer to layer, and ends exactly once: by [`Bio::complete`], or,
//! if it is dropped, with [`BlkError::Io`] and a line in the log. It comes from a
//! [`BioSet`] and goes back there, with the memory of its lists, when it is over.
//! The set's type parameter is the caller's data for each bio, the *front pad*; it is
//! allocated with the bio and is reached by [`Bio::pad_mut`].
//!
//! # Splitting
//!
//! [`Bio::split`] cuts the front off. Both pieces share the memory; the piece that keeps the
//! identity (and the owner's `end_io`) is the rest. The owner's `end_io` runs once, after all
//! pieces ended, with the first error among them:
//!
//! ```text
//! B[0..24)  --split(8)-->  F1[0..8)  B[8..24)  --split(8)-->  F2[8..16)  B[16..24)
//! join counter of B:  1           2                        3
//! F2 ends: 2.  B ends: 1, parked.  F1 ends: 0 -> end_io(B, first error)
//! ```
//!
//! # Cloning
//!
//! A stacking device allocates a clone from its own set, [takes over](Bio::clone_from_parent) the
//! data of the bio it was given, keeps that bio by value in the clone's pad, and ends it after the
//! clone ended.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use smallvec::SmallVec;

use crate::bio_set::{BioSet, Home, Inner};
use crate::buf::{Buf, Segment};
use crate::device::DynDevice;
use crate::error::{BlkError, BlkResult};
use crate::lane::{DevRef, Lanes};
use crate::sync::prim::atomic::{AtomicU8, AtomicU32, Ordering};
use crate::sync::{Mutex, Rank};
use crate::units::{SECTOR_SHIFT, SECTOR_SIZE, Sector, SectorCount};

/// What a bio asks for.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Op {
    /// Fill the segments from the device.
    Read,
    /// Write the segments to the device.
    Write,
    /// Make all writes that ended before durable; carries no data and no range.
    Flush,
    /// The range is not needed any more; what it reads as afterwards is undefined.
    Discard,
    /// The range reads as zeros afterwards; carries no data.
    WriteZeroes,
}

impl Op {
    /// Whether the bio carries segments.
    #[must_use]
    pub const fn has_data(self) -> bool {
        matches!(self, Self::Read | Self::Write)
    }

    /// Whether the device's content changes.
    #[must_use]
    pub const fn is_write(self) -> bool {
        matches!(self, Self::Write | Self::Discard | Self::WriteZeroes)
    }
}

bitflags::bitflags! {
    /// How a bio is to be done.
    #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
    pub struct BioFlags: u8 {
        /// Durable when it ends.
        const FUA = 1;
        /// All writes that ended before are made durable first.
        const PREFLUSH = 2;
        /// Somebody waits for it.
        const SYNC = 4;
        /// Metadata.
        const META = 8;
        /// Ahead of others.
        const PRIO = 16;
    }
}

/// Memory of a bio as a system call sees it; laid out as the system's `iovec`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Part {
    pub(crate) addr: usize,
    pub(crate) len: usize,
}
const _: () = assert!(size_of::<Part>() == size_of::<libc::iovec>());

/// How a bio ends: called once, without locks, perhaps on a thread that reaps completions, so it
/// must not wait.
pub type EndIo = fn(Bio, BlkResult);

/// Data of a bio's owner; any type with a default state will do.
pub trait Pad: Any + Send {
    /// Back to the default state, when the bio goes back to its set.
    fn recycle(&mut self);
}

impl<P: Default + Send + 'static> Pad for P {
    fn recycle(&mut self) {
        *self = P::default();
    }
}

/// Counts the pieces of a split bio.
pub(crate) struct Join {
    remaining: AtomicU32,
    /// `BlkError as u8` of the first piece that failed, or 0.
    first_error: AtomicU8,
    /// The bio whose end this is, once its own piece ended.
    parked: Mutex<Option<Bio>>,
}

impl Join {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            remaining: AtomicU32::new(0),
            first_error: AtomicU8::new(0),
            parked: Mutex::new(Rank::Pool, None),
        })
    }

    fn record(&self, res: BlkResult) {
        if let Err(error) = res {
            // First error wins; a later one changes nothing.
            let first = &self.first_error;
            first
                .compare_exchange(0, error as u8, Ordering::Relaxed, Ordering::Relaxed)
                .ok();
        }
    }

    /// One piece is over; the last one ends the bio.
    fn put(&self) {
        if self.remaining.fetch_sub(1, Ordering::AcqRel) == 1 {
            let bio = self.parked.lock_nested().take();
            let res = match BlkError::from_code(self.first_error.load(Ordering::Relaxed)) {
                None => Ok(()),
                Some(error) => Err(error),
            };
            if let Some(bio) = bio {
                bio.end(res);
            }
        }
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Life {
    /// In its owner's hands or on its way.
    Live,
    /// `complete` was called.
    Ended,
}

pub(crate) struct Core {
    op: Op,
    flags: BioFlags,
    life: Life,
    /// Whether `join` counts pieces of this bio.
    split: bool,
    /// Whether the device it names has counted it.
    counted: bool,
    sector: Sector,
    len: SectorCount,
    /// Set, and not left over from the use before.
    named: bool,
    /// Whether a set keeps the device of the use before for the next.
    keeps_dev: bool,
    dev: Option<DevRef>,
    end_io: EndIo,
    segments: SmallVec<[Segment; 4]>,
    bufs: SmallVec<[Buf; 2]>,
    join: Arc<Join>,
    /// The join counter that a front piece reports to.
    piece_of: Option<Arc<Join>>,
    /// The set it belongs to, also while it is not handed out.
    pub(crate) home: Option<Arc<Home>>,
    /// When the device it now names accepted it, where that is sampled.
    pub(crate) started: Option<Instant>,
}

impl Core {
    #[inline]
    fn recycle(&mut self) {
        self.flags = BioFlags::empty();
        self.split = false;
        self.sector = Sector::ZERO;
        self.len = SectorCount::ZERO;
        self.named = false;
        if !self.keeps_dev {
            self.dev = None;
        }
        self.end_io = no_end_io;
        if !self.segments.is_empty() {
            self.segments.clear();
        }
        if !self.bufs.is_empty() {
            self.bufs.clear();
        }
        self.started = None;
    }
}

/// A bio's memory. The pad has an allocation of its own, so that a node is known by one word, which
/// a pool can exchange at once.
pub(crate) struct Node {
    pub(crate) core: Core,
    pad: Box<dyn Pad>,
}

fn no_end_io(_: Bio, _: BlkResult) {}

impl Node {
    pub(crate) fn new<P: Pad + Default>(home: Option<Arc<Home>>, keeps_dev: bool) -> Box<Self> {
        Box::new(Self {
            core: Core {
                op: Op::Read,
                flags: BioFlags::empty(),
                life: Life::Ended,
                split: false,
                counted: false,
                sector: Sector::ZERO,
                len: SectorCount::ZERO,
                named: false,
                keeps_dev,
                dev: None,
                end_io: no_end_io,
                segments: SmallVec::new(),
                bufs: SmallVec::new(),
                join: Join::new(),
                piece_of: None,
                home,
                started: None,
            },
            pad: Box::new(P::default()),
        })
    }

    /// Makes it as it was when new, but for the memory of its lists.
    fn recycle(&mut self) {
        self.core.recycle();
        self.pad.recycle();
    }

    pub(crate) fn forget_dev(&mut self) {
        self.core.dev = None;
    }
}

/// One request to a block device; see the module's documentation.
pub struct Bio(Option<Box<Node>>);

impl Bio {
    /// A bio that belongs to no pool; it must be [reset](Self::reset) before use.
    pub(crate) fn without_home(node: Box<Node>) -> Self {
        Self(Some(node))
    }

    /// Whether it belongs to no pool.
    pub(crate) fn is_own(&self) -> bool {
        self.core().home.is_none()
    }

    /// Whether it came from `set`.
    #[inline]
    pub(crate) fn is_of(&self, set: &Inner) -> bool {
        let home = self.core().home.as_ref();
        home.is_some_and(|home| std::ptr::eq(home.set(), set))
    }

    pub(crate) fn from_node(mut node: Box<Node>, op: Op) -> Self {
        node.core.op = op;
        node.core.life = Life::Live;
        Self(Some(node))
    }

    /// The memory of a bio that is over, for its set.
    pub(crate) fn into_node(mut self) -> Option<Box<Node>> {
        if self.core().life == Life::Live || self.core().piece_of.is_some() {
            return None;
        }
        let mut node = self.0.take()?;
        node.core.recycle();
        Some(node)
    }

    #[expect(
        clippy::expect_used,
        reason = "taken only by drop, after which nobody has the bio"
    )]
    fn core(&self) -> &Core {
        &self.0.as_ref().expect("a live bio has its node").core
    }

    #[expect(
        clippy::expect_used,
        reason = "taken only by drop, after which nobody has the bio"
    )]
    pub(crate) fn core_mut(&mut self) -> &mut Core {
        &mut self.0.as_mut().expect("a live bio has its node").core
    }

    /// What it asks for.
    #[must_use]
    pub fn op(&self) -> Op {
        self.core().op
    }

    /// How it is to be done.
    #[must_use]
    pub fn flags(&self) -> BioFlags {
        self.core().flags
    }

    /// Sets how it is to be done.
    pub fn set_flags(&mut self, flags: BioFlags) {
        self.core_mut().flags = flags;
    }

    /// Where it begins on the device it names, in sectors.
    #[must_use]
    pub fn sector(&self) -> Sector {
        self.core().sector
    }

    /// Its length in sectors; zero for a flush.
    #[must_use]
    pub fn len(&self) -> SectorCount {
        self.core().len
    }

    /// Whether it has no range.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.core().len == SectorCount::ZERO
    }

    /// The device it goes to.
    #[must_use]
    pub fn dev(&self) -> Option<&DynDevice> {
        self.dev_ref().map(DevRef::dev)
    }

    #[inline]
    pub(crate) fn dev_ref(&self) -> Option<&DevRef> {
        let core = self.core();
        core.dev.as_ref().filter(|_| core.named)
    }

    /// Marks the bio as counted by the device it names; `false` where it was so before.
    #[inline]
    pub(crate) fn account(&mut self) -> bool {
        !std::mem::replace(&mut self.core_mut().counted, true)
    }

    /// Names device and sector together.
    pub fn set_dev(&mut self, dev: DynDevice, sector: Sector) {
        let stays = |old: &DevRef| old.is_dev(&dev);
        self.leave(stays);
        let core = self.core_mut();
        core.dev = Some(DevRef::Plain(dev));
        core.named = true;
        core.sector = sector;
    }

    /// As [`Self::set_dev`], by the reference of the thread's lane.
    #[inline]
    pub fn set_lane(&mut self, lanes: &Lanes, sector: Sector) {
        self.leave(|old| lanes.are_of(old));
        let core = self.core_mut();
        if !core.dev.as_ref().is_some_and(|dev| lanes.are_of(dev)) {
            core.dev = Some(lanes.here());
        }
        core.named = true;
        core.sector = sector;
    }

    /// The device it names gets it no more, unless `stays`.
    #[inline]
    fn leave(&mut self, stays: impl FnOnce(&DevRef) -> bool) {
        let core = self.core_mut();
        if core.counted
            && let Some(old) = &core.dev
            && !stays(old)
        {
            old.stats().pass_on();
            core.counted = false;
            core.started = None;
        }
    }

    /// Sets the length of a discard or write-zeroes; other bios take it from their segments.
    pub fn set_len(&mut self, len: SectorCount) {
        debug_assert!(
            !self.op().has_data(),
            "the length of a bio with data is its segments'"
        );
        self.core_mut().len = len;
    }

    /// Sets what happens at the end.
    pub fn set_end_io(&mut self, end_io: EndIo) {
        self.core_mut().end_io = end_io;
    }

    /// Appends a whole buffer; its length must be a multiple of 512 bytes.
    ///
    /// # Errors
    /// Gives the buffer back where its length is none.
    pub fn push(&mut self, mut buf: Buf) -> Result<(), Buf> {
        let Some(len) = SectorCount::from_bytes(buf.len() as u64) else {
            return Err(buf);
        };
        let core = self.core_mut();
        debug_assert!(core.op.has_data(), "only reads and writes carry data");
        core.len = SectorCount::new(core.len.raw() + len.raw());
        core.segments.push(buf.segment());
        core.bufs.push(buf);
        Ok(())
    }

    /// Takes the buffers back, in the order they were pushed. Called by the owner when the bio has
    /// ended.
    pub fn take_bufs(&mut self) -> impl Iterator<Item = Buf> + use<> {
        let core = self.core_mut();
        core.segments.clear();
        core.len = SectorCount::ZERO;
        std::mem::take(&mut core.bufs).into_iter()
    }

    /// Takes back the only (or first) buffer.
    pub fn take_buf(&mut self) -> Option<Buf> {
        let core = self.core_mut();
        core.segments.clear();
        core.len = SectorCount::ZERO;
        let buf = (!core.bufs.is_empty()).then(|| core.bufs.remove(0));
        core.bufs.clear();
        buf
    }

    /// The memory to read into or write from.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.core().segments
    }

    /// Copies the data of a write out, for a backend in memory; `visit` gets byte offset and bytes.
    pub fn for_each_bytes(&self, mut visit: impl FnMut(usize, &[u8])) {
        debug_assert_eq!(self.op(), Op::Write);
        let mut offset = 0;
        for segment in &self.core().segments {
            visit(offset, segment.bytes());
            offset += segment.len();
        }
    }

    /// Fills the segments of a read, for a backend in memory; `fill` gets byte offset and bytes.
    pub fn fill_each(&mut self, mut fill: impl FnMut(usize, &mut [u8])) {
        debug_assert_eq!(self.op(), Op::Read);
        let mut offset = 0;
        for segment in &mut self.core_mut().segments {
            fill(offset, segment.bytes_mut());
            offset += segment.len();
        }
    }

    /// The owner's data, of the type of the set it came from.
    ///
    /// # Panics
    /// Where `P` is another type: a bio reached an `end_io` that is not its owner's.
    #[expect(
        clippy::expect_used,
        reason = "set and end_io are chosen together by the owner"
    )]
    pub fn pad_mut<P: Pad>(&mut self) -> &mut P {
        let node = self.0.as_mut().expect("a live bio has its node");
        let pad: &mut dyn Any = node.pad.as_mut();
        pad.downcast_mut()
            .expect("pad of the type of the bio's set")
    }

    /// As [`Self::pad_mut`], to look at.
    ///
    /// # Panics
    /// As [`Self::pad_mut`].
    #[expect(
        clippy::expect_used,
        reason = "set and end_io are chosen together by the owner"
    )]
    #[must_use]
    pub fn pad<P: Pad>(&self) -> &P {
        let node = self.0.as_ref().expect("a live bio has its node");
        let pad: &dyn Any = node.pad.as_ref();
        pad.downcast_ref()
            .expect("pad of the type of the bio's set")
    }

    /// Makes this bio, fresh from a stacking device's set, name the same length, flags and memory as
    /// `parent`, which the caller must then keep in this bio's pad until it ended; `sector` is where
    /// it begins in whatever the caller counts from until it names a device.
    #[inline]
    pub fn clone_from_parent(&mut self, parent: &Self, sector: Sector) {
        let from = parent.core();
        let core = self.core_mut();
        core.op = from.op;
        core.flags = from.flags;
        core.sector = sector;
        core.len = from.len;
        debug_assert!(core.segments.is_empty(), "a clone is fresh from its set");
        match from.segments.as_slice() {
            [one] => core.segments.push(one.alias()),
            all => core.segments.extend(all.iter().map(Segment::alias)),
        }
    }

    /// Cuts the first `front` sectors off into a bio from `set`; see the module's documentation.
    /// The front names the same device and flags, `PREFLUSH` stays with the front only, `FUA` with
    /// both. `None`, and nothing changed, where `front` is not inside the bio or the set gave none.
    pub fn split(
        &mut self,
        front: SectorCount,
        set: &BioSet<()>,
        wait: crate::Wait,
    ) -> Option<Self> {
        if front == SectorCount::ZERO || front >= self.len() {
            return None;
        }
        let mut piece = set.alloc(self.op(), wait)?;
        let core = self.core_mut();
        if !core.split {
            core.split = true;
            core.join.remaining.store(1, Ordering::Relaxed);
            core.join.first_error.store(0, Ordering::Relaxed);
        }
        core.join.remaining.fetch_add(1, Ordering::Relaxed);
        let to = piece.core_mut();
        to.flags = core.flags;
        to.sector = core.sector;
        to.len = front;
        to.dev.clone_from(&core.dev);
        to.named = core.named;
        to.piece_of = Some(core.join.clone());
        if core.op.has_data() {
            let mut bytes = front.raw() as usize * SECTOR_SIZE;
            let mut whole = 0;
            for segment in &mut core.segments {
                let take = bytes.min(segment.len());
                to.segments.push(segment.cut_front(take));
                bytes -= take;
                if segment.is_empty() {
                    whole += 1;
                }
                if bytes == 0 {
                    break;
                }
            }
            core.segments.drain(..whole);
        }
        core.flags.remove(BioFlags::PREFLUSH);
        core.sector = Sector::new(core.sector.raw() + front.raw());
        core.len = SectorCount::new(core.len.raw() - front.raw());
        Some(piece)
    }

    /// Ends the bio.
    pub fn complete(mut self, res: BlkResult) {
        let core = self.core_mut();
        if core.split {
            let join = core.join.clone();
            join.record(res);
            *join.parked.lock_nested() = Some(self);
            join.put();
        } else {
            self.end(res);
        }
    }

    fn end(mut self, res: BlkResult) {
        let core = self.core_mut();
        core.life = Life::Ended;
        core.split = false;
        if core.counted {
            core.counted = false;
            let started = core.started.take();
            if let Some(dev) = &core.dev {
                dev.stats().end(started, res);
            }
        }
        // A piece has no owner of its own, also where it was split again on its way down.
        if let Some(join) = core.piece_of.take() {
            join.record(res);
            // The piece's segments must be gone before the owner can take its memory back.
            drop(self);
            join.put();
            return;
        }
        let end_io = core.end_io;
        end_io(self, res);
    }

    /// Makes a bio that has ended, or was never submitted, ready for another use by its owner. What
    /// buffers it still has go back to their pool; the pad stays as it is.
    ///
    /// # Panics
    /// In debug builds, where the bio is on its way.
    pub fn reset(&mut self, op: Op) {
        let core = self.core_mut();
        debug_assert!(
            core.life == Life::Ended || (!core.named && !core.split),
            "reset of a bio that did not end"
        );
        core.op = op;
        core.flags = BioFlags::empty();
        core.life = Life::Live;
        core.split = false;
        core.sector = Sector::ZERO;
        core.len = SectorCount::ZERO;
        core.named = false;
        core.dev = None;
        core.end_io = no_end_io;
        core.segments.clear();
        core.bufs.clear();
        core.started = None;
    }

    /// Names the memory behind byte `skip` of the segments to a system call: addresses and lengths
    /// of at most `max` parts replace what stands in `out`. The memory stays valid, and belongs to
    /// the one who executes the bio, until the bio ends.
    pub(crate) fn parts(&self, mut skip: usize, max: usize, out: &mut Vec<Part>) {
        out.clear();
        for segment in self.segments() {
            if skip >= segment.len() {
                skip -= segment.len();
                continue;
            }
            if out.len() == max {
                break;
            }
            out.push(Part {
                addr: segment.as_ptr().wrapping_add(skip).expose_provenance(),
                len: segment.len() - skip,
            });
            skip = 0;
        }
    }

    /// Bytes of its range; zero for a flush.
    #[must_use]
    pub fn byte_len(&self) -> usize {
        (self.len().raw() as usize) << SECTOR_SHIFT
    }
}

impl Drop for Bio {
    #[inline]
    fn drop(&mut self) {
        if let Some(node) = self.0.take() {
            Self::release(node);
        }
    }
}

impl Bio {
    /// What a drop does with the memory.
    fn release(mut node: Box<Node>) {
        if node.core.life == Life::Live {
            if node.core.named || node.core.split {
                let dev = node.core.dev.as_ref();
                let name = dev.map(|dev| dev.name().to_owned());
                log::error!(
                    "bio dropped before it ended: {:?} of {} sectors at {} on {}",
                    node.core.op,
                    node.core.len,
                    node.core.sector,
                    name.as_deref().unwrap_or("-"),
                );
                Self(Some(node)).complete(Err(BlkError::Io));
                return;
            }
            // Never submitted: nobody waits for it.
            node.core.life = Life::Ended;
        }
        let join = node.core.piece_of.take();
        node.recycle();
        if let Some(home) = node.core.home.clone() {
            home.set().put(node);
        }
        // As at the end of any piece: it is gone before its owner hears.
        if let Some(join) = join {
            join.record(Err(BlkError::Io));
            join.put();
        }
    }
}

impl fmt::Debug for Bio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let core = self.core();
        f.debug_struct("Bio")
            .field("op", &core.op)
            .field("flags", &core.flags)
            .field("sector", &core.sector.raw())
            .field("len", &core.len.raw())
            .field("dev", &core.dev.as_ref().map(|dev| dev.name().to_owned()))
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
