//! Reads and writes of file data: mappings in, bios out.
//!
//! A file system maps a range of a file to [`Extent`]s and hands them in with one [`Buf`]; holes
//! are read as zeros, everything else goes to the device by bios that share the buffer, and when
//! the last has ended the request's [`DioDone`] gets buffer and result, once. The first error wins.
//!
//! A [`DirectIo`] belongs to a mount, a [`Dio`] to an open file or inode. Nothing is allocated for a
//! request after warm-up: what it needs lies in the pad of its bio.
//!
//! # One bio for each file
//!
//! The rule: a `Dio` keeps its control block and one bio of its own, large enough for the largest
//! request. A request takes that if it is free, else one from the mount's pool, else it waits for
//! whichever of the two comes back first. It is freed with the last reference to the `Dio`.
//!
//! Why: a pool that several devices share is empty once one of them keeps what it was given, and
//! then nothing moves on the others either. Below one mount stand several devices where its table
//! has several rows:
//!
//! ```text
//! row 1 suspended, row 2 fine             pool    bio of file b
//! writes of a, a, a ... to row 1          empty   free
//! write of b to row 2, from the pool      waits for row 1, for ever: the failure
//! write of b to row 2, by its own bio     empty   in use
//!   ends                                  empty   free, and so on without end
//! ```
//!
//! A request of several extents (or of one longer than the device takes) needs a piece for each but
//! the last, which the same devices could have swallowed. So each file that ever had such a request
//! also keeps one piece. It is used first; where it is in use and the mount's pool of pieces is
//! empty, the request waits for it, not for the pool: it is in flight to where this file's data is.
//! Each piece is submitted before the next is taken, so one is enough for any number of extents.
//!
//! "Large enough" is a matter of the number of segments. A request carries one buffer, so one
//! segment, whatever its length (up to [`MAX_BUF`](crate::buf::MAX_BUF), more than any request),
//! and a bio holds that and more in place. All bios are so of one size, and none need ever be
//! replaced by a larger one.
//!
//! Held by: `one_swallowed_row_does_not_stop_writes_to_another` (a row that keeps everything, and
//! thousands of writes of one and of several extents; without own bios, and without own pieces, the
//! same test stalls), `who_waits_takes_the_own_bio_when_it_comes_back`,
//! `the_own_bio_goes_with_the_last_reference`, and `tests/no_alloc.rs`, which counts allocations in
//! 100,000 writes of up to 2 MiB.
//!
//! # Deferred ends
//!
//! The rule: the end of a write into new or unwritten blocks, or of a request whose
//! [`DioDone::must_wait`] says so (synchronous writes), is handed to the mount's `dio` queue. The
//! queue is made on first need, by an exchange that one of several racing requests wins; it has a
//! bounded number of threads; and a request that would add to more than [`DioConfig::ends`] waiting
//! ends waits first, so that what waits takes bounded memory. A mount [drains](DirectIo::drain) it
//! before it ends and [lets its threads go](DirectIo::shut_down) then. The order is always:
//! [`DioDone::end_io`], then the count of requests in flight, then [`DioDone::done`]. The first
//! error of the pieces is the one that `end_io` gets, and what that makes of it is what `done` gets.
//!
//! Why: such a write ends with metadata, which must wait for locks and the journal, while bios end
//! where nothing may be awaited, since the wait could be for the next bio of the same thread:
//!
//! ```text
//! thread that reaps          queue "dio"               who truncates the file
//! bio ends -> queued                                   sees 1 in flight, waits
//! reaps bios of the journal  end_io: lock, journal
//!                            count 1 -> 0              goes on: metadata is changed
//!                            answer                    (answered: nothing is in flight)
//! ```
//!
//! A bio goes back before its end is queued. If ends held bios, a read that waits for one with its
//! inode locked would wait for an end that waits for that lock.
//!
//! Held by: `the_end_of_a_write_to_new_blocks_is_deferred` (order),
//! `the_first_error_wins_and_the_buffer_comes_back`, `one_piece_that_fails_fails_the_request`,
//! `ends_that_wait_are_bounded`, `first_writers_share_one_queue_that_goes_at_the_end`,
//! `a_length_of_no_sectors_is_answered`; over a whole file system: `fs/tests/direct.rs`.

mod own;

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;

use crate::bio::{Bio, BioFlags, Op};
use crate::bio_set::BioSet;
use crate::buf::Buf;
use crate::device::DynDevice;
use crate::error::{BlkError, BlkResult};
use crate::lane::Lanes;
use crate::plug::Plug;
use crate::submit::{in_submission, submit_and_stay, submit_bio};
use crate::sync::prim::atomic::{AtomicUsize, Ordering};
use crate::sync::prim::thread_local;
use crate::sync::{Condvar, Mutex, Rank, assert_may_wait, in_completion_thread};
use crate::units::{SECTOR_SIZE, Sector, SectorCount};
use crate::workqueue::{OnceWorkqueue, Workqueue};
use own::{Back, Own};

/// What stands behind a part of a file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Mapping {
    /// Nothing; reads as zeros, cannot be written.
    Hole,
    /// Blocks never written; read as zeros, the end of a write is deferred.
    Unwritten,
    /// Blocks with data.
    Mapped,
    /// Blocks just allocated; as unwritten ones.
    New,
}

/// A part of a file and where it is on the device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Extent {
    /// What stands there.
    pub kind: Mapping,
    /// Where it begins; without meaning for a hole.
    pub sector: Sector,
    /// Its length.
    pub len: SectorCount,
}

/// How a request ends.
pub trait DioDone: Send + 'static {
    /// The file system's part, before the request counts as over: it may change the result. Where
    /// the end is deferred, it may wait for anything; else for nothing.
    ///
    /// # Errors
    /// Those of `res`, or its own.
    fn end_io(&mut self, res: BlkResult<usize>) -> BlkResult<usize> {
        res
    }

    /// Whether [`Self::end_io`] or [`Self::done`] has to wait, whatever blocks are written.
    fn must_wait(&self) -> bool {
        false
    }

    /// The answer: the buffer comes back, and the bytes read or written, or the first error. May be
    /// called before the request's `read` or `write` returned.
    fn done(self, buf: Buf, res: BlkResult<usize>);
}

impl<F: FnOnce(Buf, BlkResult<usize>) + Send + 'static> DioDone for F {
    fn done(self, buf: Buf, res: BlkResult<usize>) {
        self(buf, res);
    }
}

/// Sizes of a mount's pools.
#[derive(Clone, Copy, Debug)]
pub struct DioConfig {
    /// Requests in flight beyond the one that each open file can always have.
    pub requests: usize,
    /// Pieces in flight of requests with several extents.
    pub pieces: usize,
    /// Deferred ends at a time.
    pub workers: usize,
    /// Deferred ends that may wait before the next request of their kind waits.
    pub ends: usize,
    /// What tests switch off.
    #[cfg(any(test, feature = "test-utils"))]
    pub own: OwnBios,
}

/// Whether files keep bios of their own: without, tests show what they are for.
#[cfg(any(test, feature = "test-utils"))]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum OwnBios {
    /// A bio and a piece, as the module's documentation says.
    #[default]
    Kept,
    /// A bio; pieces come from the mount's pool alone.
    NoPieces,
    /// Everything comes from the mount's pools.
    Off,
}

impl Default for DioConfig {
    fn default() -> Self {
        Self {
            requests: 256,
            pieces: 256,
            workers: 4,
            ends: 1024,
            #[cfg(any(test, feature = "test-utils"))]
            own: OwnBios::Kept,
        }
    }
}

struct Mount<D: DioDone> {
    name: String,
    dev: Lanes,
    config: DioConfig,
    requests: BioSet<DioPad<D>>,
    pieces: BioSet<()>,
    /// Who waits for a bio.
    back: Back,
    done_queue: OnceWorkqueue<Ended<D>>,
}

/// The engine of a mount; clones share it.
pub struct DirectIo<D: DioDone>(Arc<Mount<D>>);

impl<D: DioDone> Clone for DirectIo<D> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<D: DioDone> DirectIo<D> {
    /// Makes the engine for the mount `name` on `dev`.
    #[must_use]
    pub fn new(name: &str, dev: DynDevice, config: DioConfig) -> Self {
        Self(Arc::new(Mount {
            name: name.to_owned(),
            dev: Lanes::new(&dev),
            config,
            requests: BioSet::new("dio", config.requests),
            pieces: BioSet::new("dio pieces", config.pieces),
            back: Back::default(),
            done_queue: OnceWorkqueue::new(),
        }))
    }

    /// Makes the control block of an open file or inode.
    #[must_use]
    pub fn open(&self) -> Dio<D> {
        Dio(Arc::new(File {
            mount: self.0.clone(),
            own: Own::new(&self.0),
            in_flight: AtomicUsize::new(0),
            lock: Mutex::new(Rank::Pool, ()),
            idle: Condvar::new(),
        }))
    }

    /// Waits until no deferred end is waiting or running; before an unmount, when all files are
    /// [idle](Dio::wait_idle).
    pub fn drain(&self) {
        if let Some(queue) = self.0.done_queue.get() {
            queue.drain();
        }
    }

    /// As [`Self::drain`], and ends the threads that do deferred ends. After it no request should
    /// come; the end of one that comes all the same starts a thread again.
    pub fn shut_down(&self) {
        if let Some(queue) = self.0.done_queue.get() {
            queue.end_threads();
        }
    }
}

impl<D: DioDone> fmt::Debug for DirectIo<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirectIo")
            .field("name", &self.0.name)
            .finish_non_exhaustive()
    }
}

struct File<D: DioDone> {
    mount: Arc<Mount<D>>,
    own: Own,
    in_flight: AtomicUsize,
    lock: Mutex<()>,
    idle: Condvar,
}

/// The control block of an open file or inode; clones share it.
pub struct Dio<D: DioDone>(Arc<File<D>>);

impl<D: DioDone> Clone for Dio<D> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

/// A request, in the pad of its bio.
struct Request<D: DioDone> {
    file: Arc<File<D>>,
    bytes: usize,
    end: End<D>,
}

enum End<D> {
    Here(D),
    Deferred(D),
    Wake(Arc<Waiter>),
}

struct DioPad<D: DioDone>(Option<Request<D>>);

impl<D: DioDone> Default for DioPad<D> {
    fn default() -> Self {
        Self(None)
    }
}

/// A request whose bios are over.
struct Ended<D: DioDone> {
    file: Arc<File<D>>,
    buf: Buf,
    res: BlkResult<usize>,
    done: D,
}

struct Waiter {
    over: Mutex<Option<(Buf, BlkResult<usize>)>>,
    woken: Condvar,
}

thread_local! {
    // A thread waits for one request at a time; the waiter is used again.
    static WAITER: Arc<Waiter> = Arc::new(Waiter {
        over: Mutex::new(Rank::Pool, None),
        woken: Condvar::new(),
    });
}

impl<D: DioDone> Dio<D> {
    /// Reads the extents, which together are as long as `buf`, into it. Where all bios the file and
    /// its mount may have are in flight, waits for one; where too many ends are deferred, and this
    /// one would be, for them. So the caller must hold nothing that these need.
    pub fn read(&self, extents: &[Extent], mut buf: Buf, done: D) {
        let end = if done.must_wait() {
            End::Deferred(done)
        } else {
            End::Here(done)
        };
        zero_holes(extents, &mut buf);
        self.start(Op::Read, extents, buf, BioFlags::empty(), end);
    }

    /// Writes `buf` to the extents, which together are as long.
    pub fn write(&self, extents: &[Extent], buf: Buf, flags: BioFlags, done: D) {
        let end = if done.must_wait() || extents.iter().any(is_new) {
            End::Deferred(done)
        } else {
            End::Here(done)
        };
        self.start(Op::Write, extents, buf, flags, end);
    }

    /// Reads as [`Self::read`] and waits for the end.
    pub fn read_wait(&self, extents: &[Extent], mut buf: Buf) -> (Option<Buf>, BlkResult<usize>) {
        zero_holes(extents, &mut buf);
        self.start_and_wait(Op::Read, extents, buf, BioFlags::SYNC)
    }

    /// Writes as [`Self::write`] and waits for the end of the bios; what a deferred end would do is
    /// the caller's.
    pub fn write_wait(
        &self,
        extents: &[Extent],
        buf: Buf,
        flags: BioFlags,
    ) -> (Option<Buf>, BlkResult<usize>) {
        self.start_and_wait(Op::Write, extents, buf, flags | BioFlags::SYNC)
    }

    /// Requests in flight, deferred ends included.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.0.in_flight.load(Ordering::Acquire)
    }

    /// Waits until no request is in flight. New ones must be kept away by the caller.
    pub fn wait_idle(&self) {
        if self.in_flight() == 0 {
            return;
        }
        assert_may_wait();
        let mut lock = self.0.lock.lock_nested();
        while self.in_flight() > 0 {
            self.0.idle.wait(&mut lock);
        }
    }

    fn start_and_wait(
        &self,
        op: Op,
        extents: &[Extent],
        buf: Buf,
        flags: BioFlags,
    ) -> (Option<Buf>, BlkResult<usize>) {
        assert_may_wait();
        let waiter = WAITER.with(Arc::clone);
        self.start(op, extents, buf, flags, End::Wake(waiter.clone()));
        let mut over = waiter.over.lock_nested();
        loop {
            if let Some((buf, res)) = over.take() {
                return (Some(buf), res);
            }
            waiter.woken.wait(&mut over);
        }
    }

    fn start(&self, op: Op, extents: &[Extent], buf: Buf, flags: BioFlags, end: End<D>) {
        let file = &self.0;
        file.in_flight.fetch_add(1, Ordering::AcqRel);
        let bytes = buf.len();
        let stays = matches!(end, End::Wake(_));
        let checked = check(op, extents, bytes).and_then(|()| file.prepare(&end));
        let request = Request {
            file: file.clone(),
            bytes,
            end,
        };
        if let Err(error) = checked {
            request.over(buf, Err(error));
            return;
        }
        let mut bio = file.take_bio(op);
        // `check` refused a length that is no multiple of 512.
        if let Err(buf) = bio.push(buf) {
            file.put_bio(bio);
            request.over(buf, Err(BlkError::Unaligned));
            return;
        }
        bio.set_flags(flags);
        bio.set_end_io(end_io::<D>);
        bio.pad_mut::<DioPad<D>>().0 = Some(request);
        send(file, extents, bio, stays);
    }
}

fn is_new(extent: &Extent) -> bool {
    matches!(extent.kind, Mapping::New | Mapping::Unwritten)
}

fn reads_as_zeros(extent: &Extent) -> bool {
    extent.kind != Mapping::Mapped
}

fn zero_holes(extents: &[Extent], buf: &mut Buf) {
    let mut at = 0usize;
    for extent in extents {
        let len = (extent.len.raw() as usize).saturating_mul(SECTOR_SIZE);
        let end = at.saturating_add(len).min(buf.len());
        if reads_as_zeros(extent) {
            buf[at..end].fill(0);
        }
        at = end;
    }
}

fn check(op: Op, extents: &[Extent], bytes: usize) -> BlkResult {
    let mut sectors = 0u64;
    for extent in extents {
        if extent.len == SectorCount::ZERO || (op == Op::Write && extent.kind == Mapping::Hole) {
            return Err(BlkError::Unaligned);
        }
        sectors = sectors.saturating_add(extent.len.raw());
    }
    if sectors.checked_mul(SECTOR_SIZE as u64) != Some(bytes as u64) {
        return Err(BlkError::Unaligned);
    }
    Ok(())
}

/// Sends the parts of `bio` to where the extents say; the bio itself is the last.
fn send<D: DioDone>(file: &File<D>, extents: &[Extent], mut bio: Bio, stays: bool) {
    let mount = &file.mount;
    let op = bio.op();
    let max = u64::from(mount.dev.limits().max_sectors.max(1));
    let plug = Plug::new();
    let mut left = bio.len().raw();
    for extent in extents {
        let to_device = op == Op::Write || !reads_as_zeros(extent);
        let mut sector = extent.sector.raw();
        let mut rest = extent.len.raw();
        while rest > 0 {
            let len = if to_device { rest.min(max) } else { rest };
            rest -= len;
            left -= len;
            if left == 0 {
                // What was held back so far goes first: the thread may stay with this one.
                drop(plug);
                go(mount, to_device, Sector::new(sector), bio, stays);
                return;
            }
            match file.split(&mut bio, SectorCount::new(len)) {
                Some(piece) => go(mount, to_device, Sector::new(sector), piece, false),
                None => {
                    bio.complete(Err(BlkError::NoMemory));
                    return;
                }
            }
            sector = sector.saturating_add(len);
        }
    }
    // Not reached: `check` saw that the extents are as long as the bio.
    bio.complete(Err(BlkError::Unaligned));
}

fn go<D: DioDone>(mount: &Mount<D>, to_device: bool, sector: Sector, mut bio: Bio, stays: bool) {
    if to_device {
        bio.set_lane(&mount.dev, sector);
        if stays {
            submit_and_stay(bio);
        } else {
            submit_bio(bio);
        }
    } else {
        bio.complete(Ok(()));
    }
}

fn end_io<D: DioDone>(mut bio: Bio, res: BlkResult) {
    let request = bio.pad_mut::<DioPad<D>>().0.take();
    let buf = bio.take_buf();
    let (Some(request), Some(buf)) = (request, buf) else {
        log::error!("a direct I/O bio ended without its request");
        return;
    };
    request.file.put_bio(bio);
    let res = res.map(|()| request.bytes);
    request.over(buf, res);
}

impl<D: DioDone> Request<D> {
    /// The bios are over, or there were none.
    fn over(self, buf: Buf, res: BlkResult<usize>) {
        let Self { file, end, .. } = self;
        match end {
            End::Here(done) => Ended {
                file,
                buf,
                res,
                done,
            }
            .finish(),
            End::Deferred(done) => {
                let ended = Ended {
                    file: file.clone(),
                    buf,
                    res,
                    done,
                };
                match file.mount.done_queue.get() {
                    Some(queue) => queue.queue(ended),
                    // It could not be made: then nothing was sent, and who asked waits here.
                    None => ended.finish(),
                }
            }
            End::Wake(waiter) => {
                file.over();
                *waiter.over.lock_nested() = Some((buf, res));
                waiter.woken.notify_one();
            }
        }
    }
}

thread_local! {
    /// Whether the thread does a deferred end.
    static ENDS: Cell<bool> = const { Cell::new(false) };
}

impl<D: DioDone> Ended<D> {
    fn finish(mut self) {
        let res = self.done.end_io(self.res);
        self.file.over();
        self.done.done(self.buf, res);
    }

    fn finish_deferred(self) {
        ENDS.set(true);
        self.finish();
    }
}

impl<D: DioDone> File<D> {
    /// Sees that the queue is there, and has room, before a request needs it.
    fn prepare(&self, end: &End<D>) -> BlkResult {
        if !matches!(end, End::Deferred(_)) {
            return Ok(());
        }
        let mount = &self.mount;
        let make = || {
            let name = format!("dio/{}", mount.name);
            Workqueue::new(&name, mount.config.workers, Ended::finish_deferred)
        };
        let queue = match mount.done_queue.get_or_make(make) {
            Ok(queue) => queue,
            Err(error) => {
                log::error!("dio/{}: no queue: {error}", mount.name);
                return Err(BlkError::NoMemory);
            }
        };
        // An answer that asks for more must not wait for the ends behind it.
        if !ENDS.get() && !in_submission() && !in_completion_thread() {
            queue.wait_below(mount.config.ends);
        }
        Ok(())
    }

    /// The request is over.
    fn over(&self) {
        if self.in_flight.fetch_sub(1, Ordering::AcqRel) == 1 {
            drop(self.lock.lock_nested());
            self.idle.notify_all();
        }
    }
}

impl<D: DioDone> fmt::Debug for Dio<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dio")
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
