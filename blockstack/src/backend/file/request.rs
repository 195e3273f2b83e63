//! What a bio is to a file: one system call after another until it is over.
//!
//! ```text
//! write PREFLUSH|FUA:  fdatasync -> write with RWF_DSYNC -> (short? the rest) -> end
//! write FUA, no DSYNC: write -> fdatasync -> end
//! ```
//!
//! Both engines run this machine; they differ in who does the call.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::bio::{Bio, BioFlags, Op, Part};
use crate::buf::ALIGN;
use crate::error::{BlkError, BlkResult};
use crate::units::SECTOR_SIZE;

/// What the host can do; learned at open, and unlearned when it refuses.
#[derive(Debug)]
pub(super) struct Caps {
    pub(super) read_only: bool,
    /// Offsets and lengths of direct I/O are multiples of this many bytes.
    pub(super) offset_align: usize,
    /// Addresses of direct I/O are multiples of this many bytes.
    pub(super) memory_align: usize,
    /// Ranges to punch or zero are multiples of this many bytes.
    pub(super) range_align: u64,
    /// Whether there is a descriptor with `O_DIRECT`, and it works.
    pub(super) direct: AtomicBool,
    pub(super) punch: AtomicBool,
    pub(super) zero_range: AtomicBool,
    pub(super) dsync: AtomicBool,
}

impl Caps {
    fn forget(&self, cap: &AtomicBool, device: &str, what: &str) {
        if cap.swap(false, Ordering::Relaxed) {
            log::warn!("{device}: {what}");
        }
    }
}

/// Which of the device's descriptors a call uses.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Via {
    Direct,
    Cached,
}

/// The next system call of a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Step {
    /// `fdatasync`.
    Sync,
    /// Read into the request's `parts` from `offset` on.
    Read { via: Via, offset: u64 },
    /// Write the request's `parts` from `offset` on, durable where `dsync`.
    Write { via: Via, offset: u64, dsync: bool },
    /// `fallocate` with `mode`.
    Allocate { mode: i32, offset: u64, len: u64 },
    /// It is over.
    End(BlkResult),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Phase {
    Preflush,
    Main,
    /// The sync after a FUA write without `RWF_DSYNC`.
    Postflush,
    Over,
}

/// How often a call that the system asks to repeat is repeated.
const MAX_RETRIES: u32 = 1000;
/// The most parts of memory that one call takes.
const MAX_PARTS: usize = 1024;
/// The most bytes that one call moves; the system's own limit is a little below 2 GiB.
const MAX_BYTES: usize = 1 << 30;

/// A place for one bio in flight; its memory is used again for the next.
#[derive(Debug, Default)]
pub(super) struct Request {
    bio: Option<Bio>,
    phase: Option<Phase>,
    /// Bytes moved so far.
    done: usize,
    retries: u32,
    last: Option<Step>,
    /// What the next read or write moves; laid out as the system's `iovec`.
    pub(super) parts: Vec<Part>,
}

impl Request {
    /// Takes a bio; the place must be free.
    pub(super) fn begin(&mut self, bio: Bio) {
        debug_assert!(self.bio.is_none(), "place taken twice");
        let preflush = bio.op() == Op::Flush || bio.flags().contains(BioFlags::PREFLUSH);
        self.phase = Some(if preflush {
            Phase::Preflush
        } else {
            Phase::Main
        });
        self.bio = Some(bio);
        self.done = 0;
        self.retries = 0;
        self.last = None;
    }

    /// Gives the bio up; the place is free again.
    pub(super) fn take(&mut self) -> Option<Bio> {
        self.phase = None;
        self.bio.take()
    }

    /// The call to do next.
    pub(super) fn step(&mut self, caps: &Caps) -> Step {
        let step = self.next(caps);
        self.last = Some(step);
        step
    }

    fn next(&mut self, caps: &Caps) -> Step {
        let (Some(bio), Some(phase)) = (&self.bio, self.phase) else {
            return Step::End(Err(BlkError::Io));
        };
        match phase {
            // Nothing was written through a read-only descriptor.
            Phase::Preflush if caps.read_only => Step::End(Ok(())),
            Phase::Preflush | Phase::Postflush => Step::Sync,
            Phase::Over => Step::End(Ok(())),
            Phase::Main => {
                // `submit_bio` checked the range against the capacity, so this fits.
                let offset = bio.sector().raw() * SECTOR_SIZE as u64 + self.done as u64;
                match bio.op() {
                    Op::Flush => Step::End(Ok(())),
                    Op::Read | Op::Write => {
                        bio.parts(self.done, MAX_PARTS, &mut self.parts);
                        limit(&mut self.parts);
                        let via = choose(&self.parts, offset, caps);
                        if bio.op() == Op::Read {
                            Step::Read { via, offset }
                        } else {
                            let fua = bio.flags().contains(BioFlags::FUA);
                            let dsync = fua && caps.dsync.load(Ordering::Relaxed);
                            Step::Write { via, offset, dsync }
                        }
                    }
                    op @ (Op::Discard | Op::WriteZeroes) => {
                        let zero = op == Op::WriteZeroes && caps.zero_range.load(Ordering::Relaxed);
                        let mode = if zero {
                            libc::FALLOC_FL_ZERO_RANGE
                        } else if caps.punch.load(Ordering::Relaxed) {
                            libc::FALLOC_FL_PUNCH_HOLE
                        } else {
                            return Step::End(Err(BlkError::NotSupported));
                        };
                        let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
                        range(op, mode, offset, bio.byte_len() as u64, caps.range_align)
                    }
                }
            }
        }
    }

    /// Takes the result of the last call: bytes moved, or a negative errno.
    pub(super) fn result(&mut self, res: i64, caps: &Caps, device: &str) -> BlkResult {
        if let Ok(moved) = usize::try_from(res) {
            return self.moved(moved, device);
        }
        let errno = i32::try_from(-res).unwrap_or(libc::EIO);
        // `ECANCELED`: the thread that submitted the call ended before it was done.
        if matches!(errno, libc::EINTR | libc::EAGAIN | libc::ECANCELED)
            && self.retries < MAX_RETRIES
        {
            self.retries += 1;
            return Ok(());
        }
        match self.last {
            Some(
                Step::Read {
                    via: Via::Direct, ..
                }
                | Step::Write {
                    via: Via::Direct, ..
                },
            ) if errno == libc::EINVAL => {
                caps.forget(
                    &caps.direct,
                    device,
                    "direct I/O refused, goes through the host's page cache from now on",
                );
                return Ok(());
            }
            Some(Step::Write { dsync: true, .. }) if errno == libc::EOPNOTSUPP => {
                caps.forget(&caps.dsync, device, "no RWF_DSYNC, uses fdatasync");
                return Ok(());
            }
            Some(Step::Allocate { mode, .. })
                if matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV) =>
            {
                if mode & libc::FALLOC_FL_ZERO_RANGE != 0 {
                    caps.forget(&caps.zero_range, device, "host cannot zero ranges");
                } else {
                    caps.forget(&caps.punch, device, "host cannot punch holes");
                }
                return Ok(());
            }
            _ => {}
        }
        self.log(device, &std::io::Error::from_raw_os_error(errno));
        // What is not aligned was refused by `submit_bio`; here it means something else.
        Err(match BlkError::from_errno(errno) {
            BlkError::Unaligned => BlkError::Io,
            error => error,
        })
    }

    fn moved(&mut self, moved: usize, device: &str) -> BlkResult {
        self.retries = 0;
        let Some(bio) = &self.bio else {
            return Err(BlkError::Io);
        };
        let fua = bio.flags().contains(BioFlags::FUA);
        let next = match self.last {
            Some(Step::Sync) if self.phase == Some(Phase::Preflush) && !bio.is_empty() => {
                Phase::Main
            }
            Some(Step::Read { .. } | Step::Write { .. }) => {
                if moved == 0 {
                    self.log(device, &"transferred nothing; was the image cut short?");
                    return Err(BlkError::Io);
                }
                self.done += moved;
                let synced = matches!(self.last, Some(Step::Write { dsync: true, .. }));
                if self.done < bio.byte_len() {
                    Phase::Main
                } else if fua && bio.op() == Op::Write && !synced {
                    Phase::Postflush
                } else {
                    Phase::Over
                }
            }
            Some(Step::Allocate { .. }) if fua => Phase::Postflush,
            _ => Phase::Over,
        };
        self.phase = Some(next);
        Ok(())
    }

    fn log(&self, device: &str, error: &dyn std::fmt::Display) {
        if let Some(bio) = &self.bio {
            log::error!(
                "{device}: {:?} of {} sectors at {}, {:?}: {error}",
                bio.op(),
                bio.len(),
                bio.sector(),
                self.last,
            );
        }
    }
}

/// Discards what the host can of a range; zeroes all of it or refuses.
fn range(op: Op, mode: i32, offset: u64, len: u64, align: u64) -> Step {
    let start = offset.next_multiple_of(align);
    let end = (offset + len) / align * align;
    if op == Op::WriteZeroes && (start != offset || end != offset + len) {
        return Step::End(Err(BlkError::NotSupported));
    }
    if start >= end {
        return Step::End(Ok(()));
    }
    Step::Allocate {
        mode,
        offset: start,
        len: end - start,
    }
}

/// Cuts what one call moves to [`MAX_BYTES`].
fn limit(parts: &mut Vec<Part>) {
    let mut sum = 0;
    for (index, part) in parts.iter().enumerate() {
        sum += part.len;
        if sum > MAX_BYTES {
            parts.truncate(index.max(1));
            return;
        }
    }
}

/// Direct, where the whole call is aligned as the host wants it.
fn choose(parts: &[Part], offset: u64, caps: &Caps) -> Via {
    if !caps.direct.load(Ordering::Relaxed) {
        return Via::Cached;
    }
    // Buffers begin at multiples of `ALIGN`, so a coarser demand can only be met by chance.
    let memory = caps.memory_align.min(ALIGN);
    let fits = offset % caps.offset_align as u64 == 0
        && parts
            .iter()
            .all(|part| part.addr % memory == 0 && part.len % caps.offset_align == 0);
    if fits { Via::Direct } else { Via::Cached }
}

#[cfg(test)]
mod tests;
