//! File data: reads, writes, and what waits for them.
//!
//! # A write
//!
//! ```text
//! claim the blocks, reserve new ones in memory, copy the data into an aligned buffer
//! -> bios -> device                        (answered here if it came from the page cache)
//! -> in place: claim given back            (in the completion)
//! -> new blocks or a longer file: dio_done -> one handle: bitmap, mapping, size, times
//!    -> claim given back -> answered
//! ```
//!
//! No block is named on disk before its data is there, so a commit has no data to wait for. A write
//! that came from the kernel's page cache is answered when it is under way, as the page cache of any
//! file system promises nothing before `fsync`; an error then comes up in the next `fsync`.
//!
//! # Locking
//!
//! write: claim -> inode (w) -> group; its end: inode (w) -> transaction -> extent tree -> group
//! read: wait for claims -> inode (r), released before the bios end
//! truncate, punch: bar -> claims and requests drained without a lock -> inode (w), bar lifted
//!     -> transaction

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use std::time::Duration;

use blockstack::direct_io::{Dio, DioDone, DirectIo, Extent, Mapping as DioMapping};
use blockstack::sync::{RwLockWriteGuard, blocking};
use blockstack::{BioFlags, BlkError, BlkResult, Buf, PagePool, Sector, SectorCount, read_wait};
use smallvec::SmallVec;

use crate::alloc::{Privilege, Run};
use crate::batch::{Gathered, SMALL};
use crate::core::Fs;
use crate::error::{FsError, FsResult};
use crate::format::inode::{InodeData, InodeFlags};
use crate::inode::Inode;
use crate::inode::map::{self, MapKind, Written};
use crate::ops::{Caller, RECLAIMS};

mod copy;
mod durable;
mod journalled;

/// The engine of a mount's file data.
pub type DataIo = DirectIo<IoEnd>;
/// The control block of a file's data.
pub type FileIo = Dio<IoEnd>;
/// Takes the answer of a read.
pub type ReadReply = Box<dyn FnOnce(FsResult<&[u8]>) + Send>;
/// Takes the answer of a write: bytes written.
pub type WriteReply = Box<dyn FnOnce(FsResult<u32>) + Send>;

/// The longest read or write, in bytes.
pub const MAX_IO: u32 = 1 << 20;
/// Bytes of page cache writes under way above which they are answered at their end.
const WRITE_BEHIND: usize = 64 << 20;
/// Credits for naming the blocks of a write.
const WRITE_CREDITS: u32 = 16;

/// Where a write comes from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Origin {
    /// The kernel's page cache, which keeps size and times itself.
    PageCache,
    /// A caller that waits, and whose set-user-id bits are to be dropped or not.
    Direct {
        /// Whether the kernel asked to drop them.
        kill_priv: bool,
    },
}

/// How a request of file data ends.
pub struct IoEnd {
    fs: Arc<Fs>,
    kind: EndKind,
}

enum EndKind {
    Read {
        skip: usize,
        len: usize,
        reply: ReadReply,
        /// Kept until the bytes are there.
        _inode: Arc<Inode>,
    },
    Write(Gathered),
    Batch(Vec<Gathered>),
}

/// What is to be done when the data of a write is on the device.
pub(crate) struct WriteEnd {
    from: u32,
    to: u32,
    /// Byte behind the last written.
    end: u64,
    bytes: u32,
    /// Whether the times are set here.
    stamps: bool,
    /// Whether the file gets longer, as far as known at the start.
    extends: bool,
    /// Whether it is to be durable before it is answered.
    sync: bool,
    origin: Origin,
    /// Reserved runs, and the file's blocks they are for.
    new: SmallVec<[(u32, Run); 4]>,
    unwritten: SmallVec<[(u32, u32); 2]>,
    reply: Option<WriteReply>,
    /// What the caller gets; the engine's result knows only the device's errors.
    outcome: FsResult,
    behind: usize,
}

impl WriteEnd {
    /// Whether size, times or mode change, whatever the blocks.
    fn changes_inode(&self) -> bool {
        self.extends || self.stamps || self.origin == Origin::Direct { kill_priv: true }
    }
}

impl Gathered {
    /// The data is on the device, or will never be there.
    fn end(&mut self, fs: &Fs, res: BlkResult<()>) {
        let Self { inode, write } = self;
        let outcome = match res {
            Ok(()) => fs.end_write(inode, write),
            Err(error) => {
                for &(_, run) in &write.new {
                    fs.alloc.unreserve(run);
                }
                Err(error.into())
            }
        };
        if let (Err(error), None) = (outcome, &write.reply) {
            log::error!("inode {}: data lost: {error}", inode.ino);
            inode.io.record(error);
        }
        write.outcome = outcome;
        inode.io.release(write.from, write.to);
        fs.behind.fetch_sub(write.behind, Ordering::AcqRel);
    }
}

impl IoEnd {
    pub(crate) fn batch(fs: Arc<Fs>, writes: Vec<Gathered>) -> Self {
        Self {
            fs,
            kind: EndKind::Batch(writes),
        }
    }
}

impl DioDone for IoEnd {
    fn end_io(&mut self, res: BlkResult<usize>) -> BlkResult<usize> {
        let over = res.map(|_bytes| ());
        match &mut self.kind {
            EndKind::Read { .. } => {}
            EndKind::Write(write) => write.end(&self.fs, over),
            EndKind::Batch(writes) => writes
                .iter_mut()
                .for_each(|write| write.end(&self.fs, over)),
        }
        res
    }

    fn must_wait(&self) -> bool {
        match &self.kind {
            EndKind::Read { .. } => false,
            EndKind::Write(write) => write.write.changes_inode() || write.write.sync,
            EndKind::Batch(_) => true,
        }
    }

    fn done(self, buf: Buf, res: BlkResult<usize>) {
        match self.kind {
            EndKind::Read {
                skip, len, reply, ..
            } => match res {
                Ok(_) => reply(Ok(&buf[skip..skip + len])),
                Err(error) => reply(Err(error.into())),
            },
            EndKind::Write(Gathered { write, .. }) => {
                drop(buf);
                if let Some(reply) = write.reply {
                    reply(write.outcome.map(|()| write.bytes));
                }
            }
            EndKind::Batch(_) => {}
        }
    }
}

/// An inode with no data under way, locked.
pub struct Quiet<'a>(RwLockWriteGuard<'a, InodeData>);

impl Deref for Quiet<'_> {
    type Target = InodeData;
    fn deref(&self) -> &InodeData {
        &self.0
    }
}

impl DerefMut for Quiet<'_> {
    fn deref_mut(&mut self) -> &mut InodeData {
        &mut self.0
    }
}

/// The device's place of a run of blocks.
fn extent(fs: &Fs, kind: DioMapping, pblk: u64, len: u32) -> Extent {
    let sectors = fs.geo.block_sectors();
    Extent {
        kind,
        sector: Sector::new(pblk * sectors),
        len: SectorCount::new(u64::from(len) * sectors),
    }
}

struct Plan {
    extents: SmallVec<[Extent; 8]>,
    new: SmallVec<[(u32, Run); 4]>,
    unwritten: SmallVec<[(u32, u32); 2]>,
    /// Block behind the last planned.
    to: u32,
}

/// Why a read was not begun.
enum ReadError {
    Failed(FsError),
    /// Worth another try when somebody gives a buffer back.
    NoMemory {
        bytes: usize,
    },
}

/// Tries after which a lack of memory is told to the caller, and the longest wait before each.
const MEMORY_TRIES: u32 = 16;
const MEMORY_WAIT: Duration = Duration::from_secs(10);

/// Waits for a buffer of `bytes` before try number `tries`. No lock may be held: the ends of writes
/// take those of inodes.
fn wait_for_memory(bytes: usize, tries: u32) -> FsResult {
    if tries > MEMORY_TRIES {
        return Err(BlkError::NoMemory.into());
    }
    PagePool::shared().wait_for(bytes, MEMORY_WAIT)?;
    if tries > 1 {
        // It was something else that was missing; others get on meanwhile.
        blocking(|| std::thread::sleep(Duration::from_millis(tries.into())));
    }
    Ok(())
}

impl Fs {
    pub(crate) fn file_io<'a>(&self, inode: &'a Inode) -> &'a FileIo {
        inode.dio.get_or_init(|| self.data_io.open())
    }

    /// Waits until no write of blocks `from..to` is under way, and behind whoever waits for a file
    /// without any. The caller must hold no lock.
    pub(crate) fn wait_clear(self: &Arc<Self>, inode: &Inode, from: u32, to: u32) {
        if inode.io.is_busy(from, to) {
            self.flush_batch();
            inode.io.wait_clear(from, to);
        }
    }

    /// Waits until the writes that are under way now are over. The caller must hold no lock.
    pub(crate) fn wait_begun(self: &Arc<Self>, inode: &Inode) {
        if inode.io.is_claimed(0, u32::MAX) {
            self.flush_batch();
            inode.io.wait_begun();
        }
    }

    /// Waits until no data of the inode is under way and locks it. What comes meanwhile waits
    /// behind it.
    pub(crate) fn quiesce<'a>(self: &Arc<Self>, inode: &'a Inode) -> Quiet<'a> {
        let _bar = inode.io.bar();
        loop {
            if inode.io.is_claimed(0, u32::MAX) {
                self.flush_batch();
                inode.io.wait_none();
            }
            if let Some(dio) = inode.dio.get() {
                dio.wait_idle();
            }
            let data = inode.data.write();
            let idle = inode.dio.get().is_none_or(|dio| dio.in_flight() == 0);
            if idle && !inode.io.is_claimed(0, u32::MAX) {
                return Quiet(data);
            }
        }
    }

    /// The size a caller sees: that of writes under way, too.
    pub(crate) fn visible_size(&self, inode: &Inode, data: &InodeData) -> u64 {
        if inode.is_file() {
            data.size.max(inode.io.end())
        } else {
            data.size
        }
    }

    /// Reads up to `len` bytes at `offset` and answers, perhaps from another thread.
    pub fn read(self: &Arc<Self>, inode: &Arc<Inode>, offset: u64, len: u32, mut reply: ReadReply) {
        for tries in 1.. {
            let (error, back) = match self.try_read(inode, offset, len, reply) {
                Ok(()) => return,
                Err(failed) => failed,
            };
            let again = match error {
                ReadError::Failed(error) => Err(error),
                ReadError::NoMemory { bytes } => wait_for_memory(bytes, tries),
            };
            match again {
                Ok(()) => reply = back,
                Err(error) => return back(Err(error)),
            }
        }
    }

    fn try_read(
        self: &Arc<Self>,
        inode: &Arc<Inode>,
        offset: u64,
        len: u32,
        reply: ReadReply,
    ) -> Result<(), (ReadError, ReadReply)> {
        if !inode.is_file() {
            let error = if inode.is_dir() {
                FsError::IsDirectory
            } else {
                FsError::Invalid
            };
            return Err((ReadError::Failed(error), reply));
        }
        let block_bits = self.geo.block_bits;
        let len = len.min(MAX_IO);
        let Some(end) = offset.checked_add(len.into()) else {
            return Err((ReadError::Failed(FsError::Invalid), reply));
        };
        let last = end
            .div_ceil(u64::from(self.geo.block_size))
            .min(u32::MAX.into()) as u32;
        let first = (offset >> block_bits).min(u32::MAX.into()) as u32;
        let (data, size) = loop {
            self.wait_clear(inode, first, last);
            let data = inode.data.read();
            if !inode.io.is_claimed(first, last) {
                let size = self.visible_size(inode, &data);
                break (data, size);
            }
        };
        if offset >= size || len == 0 {
            drop(data);
            reply(Ok(&[]));
            return Ok(());
        }
        let len = u64::from(len).min(size - offset) as usize;
        let skip = (offset - (u64::from(first) << block_bits)) as usize;
        let to = (offset + len as u64).div_ceil(u64::from(self.geo.block_size)) as u32;
        let mut extents = SmallVec::<[Extent; 8]>::new();
        let mut lblk = first;
        while lblk < to {
            let mapping = match map::lookup(self, inode, &data, lblk, to - lblk) {
                Ok(mapping) => mapping,
                Err(error) => return Err((ReadError::Failed(error), reply)),
            };
            let kind = match mapping.kind {
                MapKind::Hole => DioMapping::Hole,
                MapKind::Mapped => DioMapping::Mapped,
                MapKind::Unwritten => DioMapping::Unwritten,
            };
            extents.push(extent(self, kind, mapping.pblk, mapping.len));
            lblk += mapping.len;
        }
        let bytes = ((to - first) << block_bits) as usize;
        let buf = match PagePool::shared().alloc(bytes) {
            Ok(buf) => buf,
            Err(BlkError::NoMemory) => return Err((ReadError::NoMemory { bytes }, reply)),
            Err(error) => return Err((ReadError::Failed(error.into()), reply)),
        };
        let touch = self.wants_atime(&data);
        if self.journals_data(&data) {
            let mut buf = buf;
            let filled = self.read_journalled(&extents, &mut buf);
            drop(data);
            reply(filled.map(|()| &buf[skip..skip + len]));
            if touch {
                self.touch_atime(inode);
            }
            return Ok(());
        }
        let end = IoEnd {
            fs: self.clone(),
            kind: EndKind::Read {
                skip,
                len,
                reply,
                _inode: inode.clone(),
            },
        };
        self.file_io(inode).read(&extents, buf, end);
        drop(data);
        if touch {
            self.touch_atime(inode);
        }
        Ok(())
    }

    /// Writes `bytes` at `offset` and answers, perhaps from another thread.
    pub fn write(
        self: &Arc<Self>,
        inode: &Arc<Inode>,
        offset: u64,
        bytes: &[u8],
        origin: Origin,
        caller: &Caller,
        reply: WriteReply,
    ) {
        if let Err((error, reply)) = self.try_write(inode, offset, bytes, origin, caller, reply) {
            reply(Err(error));
        }
    }

    fn check_write(&self, inode: &Inode, offset: u64, len: usize) -> FsResult<u64> {
        self.check_writable()?;
        if !inode.is_file() {
            return Err(if inode.is_dir() {
                FsError::IsDirectory
            } else {
                FsError::Invalid
            });
        }
        let end = offset.checked_add(len as u64).ok_or(FsError::FileTooBig)?;
        if len > MAX_IO as usize {
            return Err(FsError::Invalid);
        }
        Ok(end)
    }

    fn try_write(
        self: &Arc<Self>,
        inode: &Arc<Inode>,
        offset: u64,
        bytes: &[u8],
        origin: Origin,
        caller: &Caller,
        reply: WriteReply,
    ) -> Result<(), (FsError, WriteReply)> {
        let end = match self.check_write(inode, offset, bytes.len()) {
            Ok(end) => end,
            Err(error) => return Err((error, reply)),
        };
        if bytes.is_empty() {
            reply(Ok(0));
            return Ok(());
        }
        let block_size = u64::from(self.geo.block_size);
        let from = offset >> self.geo.block_bits;
        let to = end.div_ceil(block_size);
        if to >= u64::from(u32::MAX) {
            return Err((FsError::FileTooBig, reply));
        }
        if self.journals_data(&inode.data.read()) {
            reply(self.write_journalled(inode, offset, bytes, origin, caller));
            return Ok(());
        }
        let (from, to) = (from as u32, to as u32);
        let mut data = loop {
            self.wait_clear(inode, from, to);
            let data = inode.data.write();
            if inode.io.try_claim(from, to, end) {
                break data;
            }
        };
        let mut reclaims = 0;
        let mut tries = 0;
        let prepared = loop {
            let prepared =
                self.prepare_write(inode, &data, offset, bytes, (from, to), origin, caller);
            let error = match prepared {
                Err(FsError::NoSpace) if reclaims < RECLAIMS => FsError::NoSpace,
                Err(error @ FsError::Data(BlkError::NoMemory)) => error,
                _ => break prepared,
            };
            // The claim keeps others away meanwhile.
            drop(data);
            let gained = if error == FsError::NoSpace {
                reclaims += 1;
                self.reclaim()
            } else {
                tries += 1;
                wait_for_memory((to - from) as usize * block_size as usize, tries).map(|()| true)
            };
            data = inode.data.write();
            match gained {
                Ok(true) => {}
                Ok(false) => break Err(error),
                Err(error) => break Err(error),
            }
        };
        let (plan, buf, reached) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                drop(data);
                inode.io.release(from, to);
                return Err((error, reply));
            }
        };
        if reached < end {
            inode.io.shorten(from, to, reached);
        }
        let end = reached;
        let extends = end > data.size;
        let sync = self.opts.sync || data.flags.contains(InodeFlags::SYNC);
        drop(data);
        let mut write = WriteEnd {
            from,
            to,
            end,
            bytes: (end - offset) as u32,
            stamps: origin != Origin::PageCache && !caller.keeps_times,
            extends,
            sync,
            origin,
            new: plan.new,
            unwritten: plan.unwritten,
            reply: None,
            outcome: Ok(()),
            behind: 0,
        };
        let mut early = None;
        let behind = self.behind.load(Ordering::Acquire);
        if origin == Origin::PageCache && !sync && behind < WRITE_BEHIND {
            write.behind = buf.len();
            self.behind.fetch_add(write.behind, Ordering::AcqRel);
            early = Some((reply, write.bytes));
        } else {
            write.reply = Some(reply);
        }
        let write = Gathered {
            inode: inode.clone(),
            write,
        };
        let small = early.is_some() && buf.len() <= SMALL;
        let gathered = match (&plan.extents[..], small) {
            ([extent], true) => self.gather(extent.sector, &buf, write),
            _ => Some(write),
        };
        if let Some(write) = gathered {
            let done = IoEnd {
                fs: self.clone(),
                kind: EndKind::Write(write),
            };
            self.file_io(inode)
                .write(&plan.extents, buf, BioFlags::empty(), done);
        }
        if let Some((reply, written)) = early {
            reply(Ok(written));
        }
        Ok(())
    }

    /// Plans a write and fills its buffer; gives also the byte behind the last that fits.
    #[expect(
        clippy::too_many_arguments,
        reason = "one step of `try_write`, apart for its length"
    )]
    fn prepare_write(
        &self,
        inode: &Inode,
        data: &InodeData,
        offset: u64,
        bytes: &[u8],
        (from, to): (u32, u32),
        origin: Origin,
        caller: &Caller,
    ) -> FsResult<(Plan, Buf, u64)> {
        let mut end = offset + bytes.len() as u64;
        Self::check_place(&self.geo, data, end)?;
        let plan = self.plan_write(inode, data, from, to, caller);
        let mut plan = match plan {
            Ok(plan) => plan,
            Err(stopped) => {
                let (error, partial) = *stopped;
                let first = (u64::from(partial.to) << self.geo.block_bits).saturating_sub(offset);
                // A caller that waits can be told of a short write; the page cache cannot.
                if origin == Origin::PageCache || partial.to == from || first == 0 {
                    partial
                        .new
                        .iter()
                        .for_each(|&(_, run)| self.alloc.unreserve(run));
                    return Err(error);
                }
                end = u64::from(partial.to) << self.geo.block_bits;
                partial
            }
        };
        let filled = self.fill(data, offset, &bytes[..(end - offset) as usize], from, &plan);
        match filled {
            Ok(buf) => Ok((plan, buf, end)),
            Err(error) => {
                plan.new
                    .drain(..)
                    .for_each(|(_, run)| self.alloc.unreserve(run));
                Err(error)
            }
        }
    }

    fn plan_write(
        &self,
        inode: &Inode,
        data: &InodeData,
        from: u32,
        to: u32,
        caller: &Caller,
    ) -> Result<Plan, Box<(FsError, Plan)>> {
        let mut plan = Plan {
            extents: SmallVec::new(),
            new: SmallVec::new(),
            unwritten: SmallVec::new(),
            to: from,
        };
        let privilege = self.privilege(caller);
        while plan.to < to {
            let lblk = plan.to;
            let mapping = match map::lookup(self, inode, data, lblk, to - lblk) {
                Ok(mapping) => mapping,
                Err(error) => return Err(Box::new((error, plan))),
            };
            let (kind, pblk, len) = match mapping.kind {
                MapKind::Mapped => (DioMapping::Mapped, mapping.pblk, mapping.len),
                MapKind::Unwritten => {
                    plan.unwritten.push((lblk, mapping.len));
                    (DioMapping::Unwritten, mapping.pblk, mapping.len)
                }
                MapKind::Hole => {
                    let goal = inode
                        .io
                        .goal(lblk)
                        .unwrap_or_else(|| self.alloc.goal_for(inode.ino, data, lblk));
                    match self.alloc.reserve(goal, mapping.len, 1, privilege) {
                        Ok(run) => {
                            // What the blocks held as metadata may still be on its way home.
                            self.bufs.wait_writes(run.start, run.len.into());
                            plan.new.push((lblk, run));
                            inode
                                .io
                                .set_goal(lblk + run.len, run.start + u64::from(run.len));
                            (DioMapping::New, run.start, run.len)
                        }
                        Err(error) => return Err(Box::new((error, plan))),
                    }
                }
            };
            plan.extents.push(extent(self, kind, pblk, len));
            plan.to += len;
        }
        Ok(plan)
    }

    /// Copies the data into an aligned buffer; what stands before and behind it in its blocks comes
    /// from the disk, or is zeros.
    fn fill(
        &self,
        data: &InodeData,
        offset: u64,
        bytes: &[u8],
        from: u32,
        plan: &Plan,
    ) -> FsResult<Buf> {
        let block_size = self.geo.block_size as usize;
        let start = u64::from(from) << self.geo.block_bits;
        let head = (offset - start) as usize;
        let total = ((plan.to - from) as usize) << self.geo.block_bits;
        let mut buf = PagePool::shared().alloc(total)?;
        let tail = head + bytes.len();
        let size = data.size;
        if head > 0 {
            self.old_block(plan, 0, start, size, &mut buf[..block_size])?;
        }
        let last = total - block_size;
        if tail < total && (last > 0 || head == 0) {
            let at = start + last as u64;
            self.old_block(plan, last, at, size, &mut buf[last..])?;
        }
        buf[head..tail].copy_from_slice(bytes);
        Ok(buf)
    }

    /// The block at byte `skip` of the plan as it is now; zeros beyond the end of file.
    fn old_block(&self, plan: &Plan, skip: usize, at: u64, size: u64, out: &mut [u8]) -> FsResult {
        let mut left = skip as u64 >> 9;
        for extent in &plan.extents {
            if left >= extent.len.raw() {
                left -= extent.len.raw();
                continue;
            }
            if extent.kind != DioMapping::Mapped {
                break;
            }
            let sector = Sector::new(extent.sector.raw() + left);
            let buf = PagePool::shared().alloc(out.len())?;
            let buf = read_wait(&self.dev, sector, buf)?;
            let valid = size.saturating_sub(at).min(out.len() as u64) as usize;
            out[..valid].copy_from_slice(&buf[..valid]);
            out[valid..].fill(0);
            return Ok(());
        }
        out.fill(0);
        Ok(())
    }

    pub(crate) fn privilege(&self, caller: &Caller) -> Privilege {
        let root = caller.uid == 0
            || caller.uid == u32::from(self.geo.resuid)
            || (self.geo.resgid != 0 && caller.gid == u32::from(self.geo.resgid));
        if root {
            Privilege::Root
        } else {
            Privilege::User
        }
    }

    /// The data is on the device: lets the inode name it.
    fn end_write(&self, inode: &Arc<Inode>, write: &WriteEnd) -> FsResult {
        let written = inode.unflushed.mark();
        let needs_metadata =
            !write.new.is_empty() || !write.unwritten.is_empty() || write.changes_inode();
        if needs_metadata {
            let mut data = inode.data.write();
            self.name_blocks(inode, &mut data, write)?;
            if self.opts.sync {
                // The handle has waited for its commit, which flushed.
                inode.unflushed.flushed(written);
            }
        }
        if write.sync {
            self.persist(inode, inode.datasync_tid.load(Ordering::Acquire))?;
        }
        Ok(())
    }

    fn name_blocks(&self, inode: &Arc<Inode>, data: &mut InodeData, write: &WriteEnd) -> FsResult {
        let runs = (write.new.len() + write.unwritten.len()) as u32;
        let credits = WRITE_CREDITS + map::meta_credits(data, runs.max(1)) + 2 * runs;
        let handle = match self.journal.start(credits) {
            Ok(handle) => handle,
            Err(error) => {
                write
                    .new
                    .iter()
                    .for_each(|&(_, run)| self.alloc.unreserve(run));
                return Err(error);
            }
        };
        let mut result = Ok(());
        // Block behind the last that may be named.
        let mut named = 0;
        for &(lblk, run) in &write.new {
            if result.is_err() {
                self.alloc.unreserve(run);
                continue;
            }
            result = self.alloc.commit_run(&handle, run);
            if result.is_ok() {
                result = map::insert(self, &handle, inode, data, lblk, run, Written::Yes);
                if result.is_err() {
                    // The bits are set on disk: the blocks go back with the transaction.
                    let back =
                        self.alloc
                            .free(&handle, run.start, run.len, crate::alloc::BlockUse::Data);
                    result = result.and(back);
                } else {
                    named = named.max(lblk + run.len);
                }
            }
        }
        for &(lblk, len) in &write.unwritten {
            if result.is_ok() {
                named = named.max(lblk + len);
                result = map::convert(self, &handle, inode, data, lblk, len);
            }
        }
        let end = match result {
            Ok(()) => write.end,
            // A file with blocks of data behind its end is a damaged one.
            Err(_) => write.end.min(u64::from(named) << self.geo.block_bits),
        };
        data.size = data.size.max(end);
        self.stamp_write(data, write.origin, write.stamps);
        let written = self.write_inode(&handle, inode, data);
        inode.datasync_tid.store(handle.tid(), Ordering::Release);
        handle.finish(result.and(written))
    }

    /// Zeros bytes `from..to` of a file where they are mapped; both in the same block. The inode is
    /// quiet.
    pub(crate) fn zero_partial(
        &self,
        inode: &Inode,
        data: &InodeData,
        from: u64,
        to: u64,
    ) -> FsResult {
        if from >= to {
            return Ok(());
        }
        let lblk = (from >> self.geo.block_bits) as u32;
        let mapping = map::lookup(self, inode, data, lblk, 1)?;
        if mapping.kind != MapKind::Mapped {
            return Ok(());
        }
        let start = u64::from(lblk) << self.geo.block_bits;
        let (from, to) = ((from - start) as usize, (to - start) as usize);
        if self.journals_data(data) {
            return self.zero_journalled(mapping.pblk, from, to);
        }
        let sector = Sector::new(mapping.pblk * self.geo.block_sectors());
        let buf = PagePool::shared().alloc(self.geo.block_size as usize)?;
        let mut buf = read_wait(&self.dev, sector, buf)?;
        buf[from..to].fill(0);
        blockstack::write_wait(&self.dev, sector, buf, BioFlags::empty())?;
        inode.unflushed.mark();
        Ok(())
    }
}

/// Bytes of page cache writes under way.
pub type Behind = AtomicUsize;
