//! The engine that hands calls to the system through an `io_uring`.
//!
//! Whoever submits a bio queues its first call under the queue lock and enters the ring (unless
//! plugged). A reaper thread takes completions, queues what a request needs next, and ends bios. What
//! their ends submit it enters itself: a few together, the last of them with its next wait.
//! At most `depth` requests are in flight; what comes beyond waits in a list, in order.
//!
//! A [lowered](crate::sched::lower) thread does not enter the ring: the system would report the ends
//! of its calls through it, and have those that must wait done by threads as low. It nudges the
//! reaper, which enters what is queued.
//!
//! Ownership: a slot holds its bio, and so the memory its call names, from the moment the call is
//! queued until its completion was reaped. The reaper holds the engine, and leaves only when no
//! slot is taken.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use io_uring::{EnterFlags, IoUring, opcode, squeue, types};
use rustix::event::{EventfdFlags, eventfd};

use super::fixed::Fixed;
use super::request::{Request, Step, Via};
use super::{Files, finish};
use crate::bio::Bio;
use crate::error::BlkResult;
use crate::plug::Kick;
use crate::sync::{Mutex, Rank};

/// `user_data` of the call that tells the reaper to look whether it should stop.
const WAKE: u64 = u64::MAX;
/// `user_data` of the poll for nudges.
const NUDGE: u64 = u64::MAX - 1;
/// So many bios the reaper ends, at most, before it enters what the first of them queued. Fewer cost
/// more system calls; with more, a host that does one call after another runs dry meanwhile.
const LATE_AT_MOST: u32 = 4;
/// Places of the descriptors in the ring's table.
const DIRECT: types::Fixed = types::Fixed(0);
const CACHED: types::Fixed = types::Fixed(1);

thread_local! {
    /// The engine whose reaper the thread is. It enters what is queued before it sleeps.
    static REAPS: Cell<usize> = const { Cell::new(0) };
    /// Of a reaper: whether calls were left for it to enter.
    static LATE: Cell<bool> = const { Cell::new(false) };
}

struct State {
    slots: Vec<Request>,
    free: Vec<u32>,
    overflow: VecDeque<Bio>,
    fixed: Fixed,
    stop: bool,
}

/// See the module's documentation.
pub(super) struct Uring {
    state: Mutex<State>,
    /// Bios taken and not ended; also read without the lock.
    busy: AtomicUsize,
    ring: IoUring,
    files: Arc<Files>,
    nudge: OwnedFd,
}

impl Uring {
    /// Sets a ring up and starts its reaper.
    pub(super) fn start(
        files: Arc<Files>,
        depth: u32,
    ) -> io::Result<(Arc<Self>, std::thread::JoinHandle<()>)> {
        // More entries than slots, for the wake-up call and the poll for nudges.
        let ring = IoUring::builder()
            .dontfork()
            .build((depth + 2).next_power_of_two())?;
        let nudge = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let direct = files.fd(Via::Direct);
        let cached = files.fd(Via::Cached);
        let fds: [RawFd; 2] = [direct, cached];
        ring.submitter().register_files(&fds)?;
        let engine = Arc::new(Self {
            state: Mutex::new(
                Rank::Queue,
                State {
                    slots: (0..depth).map(|_| Request::default()).collect(),
                    free: (0..depth).rev().collect(),
                    overflow: VecDeque::new(),
                    fixed: Fixed::new(&ring),
                    stop: false,
                },
            ),
            busy: AtomicUsize::new(0),
            ring,
            files,
            nudge,
        });
        {
            let _state = engine.state.lock();
            engine.await_nudge();
        }
        let reaper = engine.clone();
        let thread = std::thread::Builder::new()
            .name("blk-reaper".into())
            .spawn(move || reaper.reap())?;
        Ok((engine, thread))
    }

    /// Arenas of memory that the ring knows.
    #[cfg(test)]
    pub(super) fn arenas_known(&self) -> usize {
        self.state.lock().fixed.known()
    }

    /// Queues a call that the system does not take.
    #[cfg(test)]
    pub(super) fn queue_bad(&self) {
        let _state = self.state.lock();
        self.push(
            &opcode::Nop::new()
                .build()
                .personality(u16::MAX)
                .user_data(WAKE),
        );
    }

    /// Whether nothing is in flight. A thread that has calls in flight must not sleep in a call of
    /// its own: the system reports the completion of direct I/O through the thread that submitted
    /// it, which it can wake from a lock but not from a disk.
    pub(super) fn is_idle(&self) -> bool {
        self.busy.load(Ordering::Relaxed) == 0
    }

    /// Takes a bio.
    pub(super) fn submit(self: &Arc<Self>, bio: Bio) {
        self.busy.fetch_add(1, Ordering::Relaxed);
        let ended = {
            let mut state = self.state.lock();
            match state.free.pop() {
                None => {
                    state.overflow.push_back(bio);
                    return;
                }
                Some(slot) => {
                    state.slots[slot as usize].begin(bio);
                    self.advance(&mut state, slot)
                }
            }
        };
        if let Some((bio, res)) = ended {
            self.busy.fetch_sub(1, Ordering::Relaxed);
            bio.complete(res);
            return;
        }
        if !crate::plug::hold(self) {
            self.kick();
        }
    }

    /// Tells the reaper to leave once nothing is in flight.
    pub(super) fn stop(&self) {
        let mut state = self.state.lock_nested();
        state.stop = true;
        self.push(&opcode::Nop::new().build().user_data(WAKE));
        drop(state);
        self.kick();
        // The table's references would keep the files open until the ring's memory is gone, which
        // the system frees at its leisure.
    }

    /// Gives the descriptors up; after the reaper has left.
    pub(super) fn release_files(&self) {
        if let Err(error) = self.ring.submitter().unregister_files() {
            log::debug!("{}: unregister: {error}", self.files.name);
        }
    }

    /// Queues the next call of the request in `slot`, or frees the slot and gives bio and result.
    fn advance(&self, state: &mut State, slot: u32) -> Option<(Bio, BlkResult)> {
        let request = &mut state.slots[slot as usize];
        let step = request.step(&self.files.caps);
        let entry = match step {
            Step::End(res) => {
                let bio = request.take();
                state.free.push(slot);
                return bio.map(|bio| (bio, res));
            }
            Step::Sync => opcode::Fsync::new(CACHED)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            Step::Allocate { mode, offset, len } => opcode::Fallocate::new(CACHED, len)
                .offset(offset)
                .mode(mode)
                .build(),
            Step::Read { via, offset } => match request.parts.as_slice() {
                [part] => {
                    // `limit` keeps a part far below 4 GiB.
                    let len = part.len as u32;
                    let addr = std::ptr::with_exposed_provenance_mut(part.addr);
                    match state.fixed.index(&self.ring, part.addr) {
                        Some(index) => opcode::ReadFixed::new(fixed(via), addr, len, index)
                            .offset(offset)
                            .build(),
                        None => opcode::Read::new(fixed(via), addr, len)
                            .offset(offset)
                            .build(),
                    }
                }
                parts => opcode::Readv::new(fixed(via), parts.as_ptr().cast(), parts.len() as u32)
                    .offset(offset)
                    .build(),
            },
            Step::Write { via, offset, dsync } => {
                let flags = if dsync { libc::RWF_DSYNC } else { 0 };
                match request.parts.as_slice() {
                    [part] => {
                        let len = part.len as u32;
                        let addr = std::ptr::with_exposed_provenance(part.addr);
                        match state.fixed.index(&self.ring, part.addr) {
                            Some(index) => opcode::WriteFixed::new(fixed(via), addr, len, index)
                                .offset(offset)
                                .rw_flags(flags)
                                .build(),
                            None => opcode::Write::new(fixed(via), addr, len)
                                .offset(offset)
                                .rw_flags(flags)
                                .build(),
                        }
                    }
                    parts => {
                        opcode::Writev::new(fixed(via), parts.as_ptr().cast(), parts.len() as u32)
                            .offset(offset)
                            .rw_flags(flags)
                            .build()
                    }
                }
            }
        };
        self.push(&entry.user_data(u64::from(slot)));
        None
    }

    /// Queues a call; the caller holds the queue lock.
    fn push(&self, entry: &squeue::Entry) {
        loop {
            // SAFETY: all users of the submission queue hold the lock on `state`, so this is the
            // only one; and what the entry names (the bio's memory, the slot's parts) stays until
            // its completion was reaped, because the slot is not freed before.
            #[expect(unsafe_code, reason = "the ring is shared under our own lock")]
            let pushed = unsafe { self.ring.submission_shared().push(entry) };
            match pushed {
                Ok(()) => return,
                // A slot has one call at most and the ring has more entries than slots, so it is
                // full only of calls that were not entered yet.
                Err(_full) => self.enter(),
            }
        }
    }

    /// To know it from others.
    fn id(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    fn reap(&self) {
        crate::sync::mark_completion_thread();
        REAPS.set(self.id());
        LATE.set(true);
        let mut ended: Vec<(Bio, BlkResult)> = Vec::with_capacity(64);
        loop {
            self.wait();
            let leave = {
                let mut state = self.state.lock();
                // SAFETY: only the reaper touches the completion queue.
                #[expect(unsafe_code, reason = "the ring is shared, this end is the reaper's")]
                let completions = unsafe { self.ring.completion_shared() };
                for completion in completions {
                    if completion.user_data() == NUDGE {
                        self.take_nudge();
                        LATE.set(true);
                        continue;
                    }
                    if completion.result() < 0 {
                        // Where the system does not take a call, it leaves those behind it queued.
                        LATE.set(true);
                    }
                    let Ok(slot) = u32::try_from(completion.user_data()) else {
                        continue;
                    };
                    let res = i64::from(completion.result());
                    if self.completed(&mut state, slot, res, &mut ended) {
                        LATE.set(true);
                    }
                }
                state.stop && state.free.len() == state.slots.len() && state.overflow.is_empty()
            };
            self.busy.fetch_sub(ended.len(), Ordering::Relaxed);
            if !ended.is_empty() && LATE.take() {
                self.enter();
            }
            let mut late = 0;
            for (bio, res) in ended.drain(..) {
                finish(bio, res);
                late += u32::from(LATE.get());
                if late == LATE_AT_MOST {
                    late = 0;
                    LATE.set(false);
                    self.enter();
                }
            }
            if leave {
                return;
            }
        }
    }

    /// One completion; says whether calls were queued.
    fn completed(
        &self,
        state: &mut State,
        slot: u32,
        res: i64,
        ended: &mut Vec<(Bio, BlkResult)>,
    ) -> bool {
        let request = &mut state.slots[slot as usize];
        match request.result(res, &self.files.caps, &self.files.name) {
            Ok(()) => match self.advance(state, slot) {
                None => return true,
                Some(over) => ended.push(over),
            },
            Err(error) => {
                if let Some(bio) = request.take() {
                    ended.push((bio, Err(error)));
                }
                state.free.push(slot);
            }
        }
        let mut queued = false;
        while let Some(bio) = state.overflow.pop_front() {
            let Some(slot) = state.free.pop() else {
                state.overflow.push_front(bio);
                break;
            };
            state.slots[slot as usize].begin(bio);
            match self.advance(state, slot) {
                None => queued = true,
                Some(over) => ended.push(over),
            }
        }
        queued
    }

    /// Queues the poll for the next nudge; the caller holds the queue lock.
    fn await_nudge(&self) {
        let fd = types::Fd(self.nudge.as_raw_fd());
        let poll = opcode::PollAdd::new(fd, libc::POLLIN as u32).build();
        self.push(&poll.user_data(NUDGE));
    }

    /// For the reaper, which enters what is queued after this; the caller holds the queue lock.
    fn take_nudge(&self) {
        let mut count = [0; 8];
        // Nothing to read is no harm: an entry more than is needed.
        rustix::io::read(&self.nudge, &mut count).ok();
        self.await_nudge();
    }

    /// Enters what is queued.
    fn enter(&self) {
        loop {
            match self.ring.submit() {
                Ok(_) => return,
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => {
                    self.trouble(&error);
                }
            }
        }
    }

    /// Enters what was left for it and sleeps until there is a completion. What others have queued
    /// they enter themselves, and both would only meet on the ring's lock in the system.
    fn wait(&self) {
        let res = if LATE.take() {
            self.ring.submit_and_wait(1)
        } else {
            self.sleep()
        };
        if let Err(error) = res {
            LATE.set(true);
            self.trouble(&error);
        }
    }

    #[expect(unsafe_code, reason = "the safe calls enter what others queued")]
    fn sleep(&self) -> io::Result<usize> {
        let flags = EnterFlags::GETEVENTS.bits();
        // SAFETY: no entry is taken and no argument goes in: the call only waits.
        unsafe {
            self.ring
                .submitter()
                .enter::<libc::sigset_t>(0, 1, flags, None)
        }
    }

    fn trouble(&self, error: &io::Error) {
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            // Short of memory or of room for completions: the reaper makes room.
            Some(libc::EAGAIN | libc::EBUSY) => std::thread::sleep(Duration::from_millis(1)),
            _ => {
                log::error!("{}: io_uring_enter: {error}", self.files.name);
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

impl Kick for Uring {
    fn kick(&self) {
        if REAPS.get() == self.id() {
            LATE.set(true);
            return;
        }
        // Any number will do; where the sum of many that nobody took yet is too large, so will none.
        let number = [1, 0, 0, 0, 0, 0, 0, 0];
        let nudged = crate::sched::is_lowered() && rustix::io::write(&self.nudge, &number).is_ok();
        if !nudged {
            self.enter();
        }
    }
}

fn fixed(via: Via) -> types::Fixed {
    match via {
        Via::Direct => DIRECT,
        Via::Cached => CACHED,
    }
}
