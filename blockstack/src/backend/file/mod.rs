//! Image files and block devices of the host.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `open` | opening, locking, finding out what the host can do |
//! | `request` | what a bio is to a file, one system call after another |
//! | `uring` | the engine over `io_uring` |
//! | `own_ring` | a ring for a thread that waits |
//! | `fixed` | memory that the ring knows |
//! | `threads` | the engine without |
//!
//! Direct I/O where the host allows it: it spares a copy and a second cache, and what a write left
//! behind is on its way to the medium. A bio that is not aligned as the host wants it (a host with
//! blocks of 4096 bytes below a file system of 1024) goes through the host's page cache; the host
//! keeps the two coherent as long as nobody has overlapping bios in flight.
//!
//! # Locking
//!
//! One `Queue` lock an engine; bios end without it. Bios end on threads of the engine, where
//! nothing may be awaited.

mod fixed;
mod open;
mod own_ring;
mod request;
#[cfg(test)]
#[cfg(not(miri))]
mod tests;
mod threads;
mod uring;

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use crate::bio::Bio;
use crate::device::{BlockDevice, Limits, Stats};
use crate::error::BlkResult;
use crate::sync::{Mutex, Rank};
use crate::units::SectorCount;

pub use open::{Engine, OpenError, OpenErrorKind, OpenOptions};
use request::{Caps, Via};
use threads::{Itself, Threads};
use uring::Uring;

/// Descriptors of one image, and what can be done with them.
struct Files {
    name: String,
    direct: Option<OwnedFd>,
    cached: OwnedFd,
    caps: Caps,
}

impl Files {
    fn fd(&self, via: Via) -> RawFd {
        match (via, &self.direct) {
            (Via::Direct, Some(direct)) => direct.as_raw_fd(),
            _ => self.cached.as_raw_fd(),
        }
    }
}

enum Running {
    Uring(Arc<Uring>),
    Threads(Arc<Threads>),
}

impl Running {
    /// How a thread that only waits for `bio` can do its calls itself.
    fn itself(&self, bio: &Bio) -> Option<Itself> {
        match self {
            Self::Uring(engine) if !engine.is_idle() => {
                own_ring::suits(bio).then_some(Itself::Beside)
            }
            Self::Uring(_) | Self::Threads(_) => Some(Itself::Alone),
        }
    }
}

/// An image file or block device of the host.
pub struct FileDisk {
    name: String,
    capacity: SectorCount,
    limits: Limits,
    files: Arc<Files>,
    engine: Running,
    threads: Mutex<Vec<JoinHandle<()>>>,
    inline: bool,
    stats: Stats,
}

impl FileDisk {
    /// Opens the image or device at `path` and locks it.
    ///
    /// Starts threads, which a fork does not take along: a program that goes to the background
    /// must have done so before.
    ///
    /// # Errors
    /// Why not, with the path.
    pub fn open(path: impl AsRef<Path>, options: OpenOptions) -> Result<Arc<Self>, OpenError> {
        let opened = open::open(path.as_ref(), options)?;
        let files = Arc::new(opened.files);
        let fail = |error| OpenError::new(OpenErrorKind::System, path.as_ref(), Some(error));
        let (engine, threads) = start(&files, options).map_err(fail)?;
        Ok(Arc::new(Self {
            name: files.name.clone(),
            capacity: opened.capacity,
            limits: opened.limits,
            files,
            engine,
            threads: Mutex::new(Rank::Queue, threads),
            inline: options.inline,
            stats: Stats::default(),
        }))
    }

    /// The descriptor of the image, for what a bio cannot say.
    #[must_use]
    pub fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.files.cached)
    }

    /// Whether I/O goes past the host's page cache.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.files.caps.direct.load(Ordering::Relaxed)
    }

    /// Whether I/O goes through an `io_uring`.
    #[must_use]
    pub fn is_uring(&self) -> bool {
        matches!(self.engine, Running::Uring(_))
    }
}

fn start(
    files: &Arc<Files>,
    options: OpenOptions,
) -> std::io::Result<(Running, Vec<JoinHandle<()>>)> {
    if options.engine != Engine::Threads {
        match Uring::start(files.clone(), options.queue_depth.clamp(1, 4096)) {
            Ok((engine, reaper)) => return Ok((Running::Uring(engine), vec![reaper])),
            Err(error) if options.engine == Engine::Uring => return Err(error),
            Err(error) => {
                log::warn!("{}: no io_uring ({error}), uses threads", files.name);
            }
        }
    }
    let (engine, threads) = Threads::start(files.clone(), options.threads)?;
    Ok((Running::Threads(engine), threads))
}

impl BlockDevice for FileDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn capacity(&self) -> SectorCount {
        self.capacity
    }

    fn limits(&self) -> Limits {
        let mut limits = self.limits;
        let caps = &self.files.caps;
        if !caps.punch.load(Ordering::Relaxed) {
            limits.max_discard_sectors = 0;
            limits.discard_granularity = 0;
            if !caps.zero_range.load(Ordering::Relaxed) {
                limits.max_write_zeroes_sectors = 0;
            }
        }
        limits
    }

    fn stats(&self) -> &Stats {
        &self.stats
    }

    fn submit(&self, bio: Bio) {
        if self.inline
            && let Some(how) = self.engine.itself(&bio)
            && crate::submit::may_stay()
        {
            threads::run_here(&self.files, bio, how);
            return;
        }
        match &self.engine {
            Running::Uring(engine) => engine.submit(bio),
            Running::Threads(engine) => engine.submit(bio),
        }
    }
}

impl Drop for FileDisk {
    fn drop(&mut self) {
        match &self.engine {
            Running::Uring(engine) => engine.stop(),
            Running::Threads(engine) => engine.stop(),
        }
        // Every bio in flight names this device, so nothing is in flight now; but the last one may
        // just be ending, and dropping the device, on a thread of the engine itself.
        let me = std::thread::current().id();
        for thread in self.threads.get_mut().drain(..) {
            if thread.thread().id() != me && thread.join().is_err() {
                log::error!("{}: a thread of the engine panicked", self.name);
            }
        }
        if let Running::Uring(engine) = &self.engine {
            engine.release_files();
        }
        // The ring may keep the open file alive for a while; the next mount must not find it locked.
        open::unlock(&self.files.cached);
    }
}

/// Ends a bio on a thread of an engine, which must outlive a panic of the bio's owner.
fn finish(bio: Bio, res: BlkResult) {
    let end = std::panic::AssertUnwindSafe(|| bio.complete(res));
    if std::panic::catch_unwind(end).is_err() {
        log::error!("the end of a bio panicked");
    }
}
