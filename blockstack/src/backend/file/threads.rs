//! The engine for hosts without `io_uring`: a few threads that do the calls themselves.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::request::{Request, Step};
use super::{Files, finish};
use crate::bio::{Bio, Part};
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

/// Does a bio's calls on the calling thread and ends it.
pub(super) fn run(files: &Files, request: &mut Request, bio: Bio) {
    request.begin(bio);
    let res = loop {
        let step = request.step(&files.caps);
        if let Step::End(res) = step {
            break res;
        }
        let moved = call(files, step, &request.parts);
        if let Err(error) = request.result(moved, &files.caps, &files.name) {
            break Err(error);
        }
    };
    if let Some(bio) = request.take() {
        finish(bio, res);
    }
}

/// One system call: bytes moved, or a negative errno.
#[expect(unsafe_code, reason = "system calls on memory that a bio holds")]
fn call(files: &Files, step: Step, parts: &[Part]) -> i64 {
    let iovecs: *const libc::iovec = parts.as_ptr().cast();
    let count = parts.len() as libc::c_int;
    // The capacity was taken from a file size, which the system keeps in an `off_t`.
    let off = |offset: u64| offset as libc::off_t;
    let cached = files.fd(super::request::Via::Cached);
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
