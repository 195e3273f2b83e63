//! The engine for hosts without `io_uring`: a few threads that do the calls themselves.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::own_ring;
use super::request::{Request, Step, Via};
use super::{Files, finish};
use crate::bio::{Bio, Part};
use crate::error::BlkResult;
use crate::sync::{Condvar, Mutex, Rank};

struct State {
    waiting: VecDeque<Bio>,
    stop: bool,
}

/// See the module's documentation.
pub(super) struct Threads {
    state: Mutex<State>,
    work: Condvar,
    files: Arc<Files>,
}

impl Threads {
    /// Starts `count` threads.
    pub(super) fn start(
        files: Arc<Files>,
        count: u32,
    ) -> io::Result<(Arc<Self>, Vec<std::thread::JoinHandle<()>>)> {
        let engine = Arc::new(Self {
            state: Mutex::new(
                Rank::Queue,
                State {
                    waiting: VecDeque::new(),
                    stop: false,
                },
            ),
            work: Condvar::new(),
            files,
        });
        let spawn = |index| {
            let engine = engine.clone();
            std::thread::Builder::new()
                .name(format!("blk-io{index}"))
                .spawn(move || engine.work())
        };
        let threads = (0..count.max(1)).map(spawn).collect::<Result<_, _>>();
        if threads.is_err() {
            engine.stop();
        }
        Ok((engine, threads?))
    }

    /// Takes a bio.
    pub(super) fn submit(&self, bio: Bio) {
        self.state.lock().waiting.push_back(bio);
        self.work.notify_one();
    }

    /// Tells the threads to leave once nothing waits.
    pub(super) fn stop(&self) {
        self.state.lock_nested().stop = true;
        self.work.notify_all();
    }

    fn work(&self) {
        crate::sync::mark_completion_thread();
        let mut request = Request::default();
        loop {
            let mut state = self.state.lock();
            let bio = loop {
                if let Some(bio) = state.waiting.pop_front() {
                    break bio;
                }
                if state.stop {
                    return;
                }
                self.work.wait(&mut state);
            };
            drop(state);
            run(&self.files, &mut request, bio);
        }
    }
}

thread_local! {
    // For the calls that a thread does itself; used again.
    static OWN: Cell<Option<Box<Request>>> = const { Cell::new(None) };
}

/// How a thread that waits does the calls itself.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Itself {
    /// By plain calls: nothing that it sent is in flight.
    Alone,
    /// So that the system can tell it the ends of what it sent before.
    Beside,
}

/// Does a bio's calls on the thread that submitted it, which would wait for it anyway.
pub(super) fn run_here(files: &Files, bio: Bio, how: Itself) {
    let mut request = OWN.take().unwrap_or_default();
    request.begin(bio);
    let res = match how {
        Itself::Alone => request.run(files, call_or_block),
        Itself::Beside => request.run(files, ring_or_block),
    };
    if let Some(bio) = request.take() {
        OWN.set(Some(request));
        bio.complete(res);
    }
}

/// As [`call`]; tells the thread's hook where it may sleep. What the host has in memory is copied
/// without that.
fn call_or_block(files: &Files, step: Step, parts: &[Part]) -> i64 {
    match step {
        Step::Read {
            via: Via::Cached,
            offset,
        } => {
            let res = read_cached_now(files, offset, parts);
            if res > 0 {
                return res;
            }
        }
        Step::Write {
            via: Via::Cached,
            dsync: false,
            ..
        } => return call(files, step, parts),
        _ => {}
    }
    crate::sync::blocking(|| call(files, step, parts))
}

/// As [`call_or_block`], by a ring of the thread's own.
fn ring_or_block(files: &Files, step: Step, parts: &[Part]) -> i64 {
    let by_ring = crate::sync::blocking(|| own_ring::call(files, step, parts));
    by_ring.unwrap_or_else(|| call_or_block(files, step, parts))
}

/// Does a bio's calls on a thread of the engine and ends it.
fn run(files: &Files, request: &mut Request, bio: Bio) {
    request.begin(bio);
    let res = request.run(files, call);
    if let Some(bio) = request.take() {
        finish(bio, res);
    }
}

impl Request {
    fn run(&mut self, files: &Files, call: fn(&Files, Step, &[Part]) -> i64) -> BlkResult {
        loop {
            let step = self.step(&files.caps);
            if let Step::End(res) = step {
                return res;
            }
            let moved = call(files, step, &self.parts);
            self.result(moved, &files.caps, &files.name)?;
        }
    }
}

/// Reads only what the host has in memory.
#[expect(unsafe_code, reason = "system calls on memory that a bio holds")]
fn read_cached_now(files: &Files, offset: u64, parts: &[Part]) -> i64 {
    let iovecs: *const libc::iovec = parts.as_ptr().cast();
    let count = parts.len() as libc::c_int;
    let fd = files.fd(Via::Cached);
    // SAFETY: `parts` is laid out as `iovec` (asserted there) and names memory of the bio in the
    // caller's request, which stays there during the call and is this thread's to fill.
    unsafe { libc::preadv2(fd, iovecs, count, offset as libc::off_t, libc::RWF_NOWAIT) as i64 }
}

/// One system call: bytes moved, or a negative errno.
#[expect(unsafe_code, reason = "system calls on memory that a bio holds")]
fn call(files: &Files, step: Step, parts: &[Part]) -> i64 {
    let iovecs: *const libc::iovec = parts.as_ptr().cast();
    let count = parts.len() as libc::c_int;
    // The capacity was taken from a file size, which the system keeps in an `off_t`.
    let off = |offset: u64| offset as libc::off_t;
    let cached = files.fd(Via::Cached);
    let res = match step {
        // SAFETY: only a descriptor goes in, which `files` keeps open.
        Step::Sync => i64::from(unsafe { libc::fdatasync(cached) }),
        Step::Allocate { mode, offset, len } => {
            // SAFETY: only a descriptor, which `files` keeps open, and numbers go in.
            i64::from(unsafe { libc::fallocate(cached, mode, off(offset), off(len)) })
        }
        Step::Read { via, offset } => {
            // SAFETY: `parts` is laid out as `iovec` (asserted there) and names memory of the bio
            // in the request, which stays there during the call and is this thread's to fill.
            unsafe { libc::preadv(files.fd(via), iovecs, count, off(offset)) as i64 }
        }
        Step::Write { via, offset, dsync } => {
            let flags = if dsync { libc::RWF_DSYNC } else { 0 };
            // SAFETY: as for reads; the memory is only read.
            unsafe { libc::pwritev2(files.fd(via), iovecs, count, off(offset), flags) as i64 }
        }
        Step::End(_) => 0,
    };
    if res < 0 {
        let errno = io::Error::last_os_error().raw_os_error();
        return -i64::from(errno.unwrap_or(libc::EIO));
    }
    res
}
