//! A ring of a thread's own, for a thread that waits for its bio while it has others in flight.
//!
//! The system tells the end of direct I/O through the thread that entered the call. A thread that
//! sleeps for the disk in a call of its own is deaf meanwhile, and so the bios that it sent into the
//! shared ring would end late. In a ring it can be woken:
//!
//! ```text
//! thread: submit(A) to the shared ring, then read_wait(B)
//!   pread(B)                     A done: its end waits until B is done
//!   by the shared ring, sleep    B done: wakes thread, which tells the reaper, which wakes thread
//!   by a ring of its own         A done: wakes thread, which tells the reaper; B done: wakes thread
//! ```
//!
//! Nothing is in flight in it between calls, so one for each thread serves all devices.

use std::cell::Cell;
use std::io;
use std::time::Duration;

use io_uring::{IoUring, opcode, squeue, types};

use super::Files;
use super::request::Step;
use crate::bio::{Bio, BioFlags, Part};

thread_local! {
    static OWN: Cell<Option<IoUring>> = const { Cell::new(None) };
}

/// Whether a ring is faster than the shared one for `bio`. A sync or an `fallocate` is left to another
/// thread by any ring, and what a [lowered](crate::sched::lower) thread waits for to one that is not.
pub(super) fn suits(bio: &Bio) -> bool {
    let durable = BioFlags::FUA | BioFlags::PREFLUSH;
    bio.op().has_data() && !bio.flags().intersects(durable) && !crate::sched::is_lowered()
}

/// Does a call and waits for it: bytes moved, or a negative errno; `None` where the thread can have
/// no ring, or the call is none for it, and nothing was done.
pub(super) fn call(files: &Files, step: Step, parts: &[Part]) -> Option<i64> {
    let entry = entry(files, step, parts)?;
    let mut ring = match OWN.take() {
        Some(ring) => ring,
        None => IoUring::builder()
            .dontfork()
            .build(1)
            .inspect_err(|error| log::debug!("{}: no ring of its own: {error}", files.name))
            .ok()?,
    };
    // SAFETY: what the entry names, the parts and the memory of the bio in the caller's request,
    // stays there during this function, which returns only when the call was reaped, or when the
    // system has not taken it and the ring is dropped. Nobody else has the ring.
    #[expect(unsafe_code, reason = "a call on memory that a bio holds")]
    let pushed = unsafe { ring.submission().push(&entry) };
    pushed.ok()?;
    let res = reap(&mut ring, &files.name)?;
    OWN.set(Some(ring));
    Some(res)
}

/// Waits for the one call. `None` where the system does not take it.
fn reap(ring: &mut IoUring, name: &str) -> Option<i64> {
    loop {
        let error = ring.submit_and_wait(1).err();
        if let Some(completion) = ring.completion().next() {
            return Some(i64::from(completion.result()));
        }
        let errno = error.as_ref().and_then(io::Error::raw_os_error);
        if errno == Some(libc::EINTR) || error.is_none() {
            continue;
        }
        log::debug!("{name}: a ring of its own: {error:?}");
        if !ring.submission().is_empty() {
            return None;
        }
        // Taken: it ends some time, and its memory must stay until then.
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn entry(files: &Files, step: Step, parts: &[Part]) -> Option<squeue::Entry> {
    let iovecs: *const libc::iovec = parts.as_ptr().cast();
    let count = parts.len() as u32;
    match step {
        Step::Read { via, offset } => Some(
            opcode::Readv::new(types::Fd(files.fd(via)), iovecs, count)
                .offset(offset)
                .build(),
        ),
        Step::Write { via, offset, dsync } => Some(
            opcode::Writev::new(types::Fd(files.fd(via)), iovecs, count)
                .offset(offset)
                .rw_flags(if dsync { libc::RWF_DSYNC } else { 0 })
                .build(),
        ),
        Step::Sync | Step::Allocate { .. } | Step::End(_) => None,
    }
}
