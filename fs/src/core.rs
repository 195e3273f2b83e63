//! What all parts of a mounted file system share.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};

use blockstack::DynDevice;
use blockstack::sync::{Mutex, Rank};
use blockstack::workqueue::Workqueue;
use bufio::Client;
use rustix::time::{ClockId, clock_gettime};

use crate::alloc::Alloc;
use crate::batch::Batch;
use crate::data::DataIo;
use crate::error::{FsError, FsResult};
use crate::format::inode::Timespec;
use crate::geometry::Geometry;
use crate::inode::{Inode, InodeTable};
use crate::journal::Journal;
use crate::options::{MountOptions, OnError};
use crate::orphan::Orphans;

/// The first second that an inode can hold, and the last one that a large inode can.
const FIRST_SECOND: i64 = i32::MIN as i64;
const LAST_SECOND: i64 = i32::MAX as i64 + (3 << 32);

/// The first or last error found, as the superblock records it.
#[derive(Clone, Copy, Debug)]
pub struct ErrorRecord {
    /// Structure and field.
    pub what: &'static str,
    /// Block, or 0.
    pub block: u64,
    /// Inode, or 0.
    pub ino: u32,
    /// When.
    pub time: Timespec,
}

/// Errors since the mount that the superblock does not have yet.
#[derive(Debug, Default)]
pub struct ErrorLog {
    /// How many.
    pub count: u32,
    /// The first.
    pub first: Option<ErrorRecord>,
    /// The last.
    pub last: Option<ErrorRecord>,
}

/// Geometry, buffers, options and the state of health.
pub struct Core {
    /// The shape.
    pub geo: Geometry,
    /// Metadata buffers, in blocks of the file system.
    pub bufs: Arc<Client>,
    /// The device below.
    pub dev: DynDevice,
    /// Mount options.
    pub opts: MountOptions,
    /// What an error in metadata does.
    pub on_error: OnError,
    /// Set by options, by the device, or by an error.
    pub read_only: AtomicBool,
    /// Whether nothing is done any more; see [`Fs::shut_down`].
    pub(crate) shutdown: AtomicU8,
    /// Errors to record.
    pub errors: Mutex<ErrorLog>,
    /// Whether the list of orphans is empty, for an abort: [`ORPHANS_LISTED`], or the transaction
    /// that emptied it, or 0.
    pub(crate) orphan_list: AtomicU64,
}

/// In [`Core::shutdown`]: as ever, the journal is being halted, everything is refused. An operation
/// that is stopped halfway must find the journal halted, or it could be committed halfway.
pub(crate) const LIVE: u8 = 0;
pub(crate) const HALTING: u8 = 1;
pub(crate) const DOWN: u8 = 2;

/// See [`Core::orphan_list`].
pub(crate) const ORPHANS_LISTED: u64 = u64::MAX;

impl Core {
    /// Joins the parts.
    #[must_use]
    pub fn new(geo: Geometry, bufs: Arc<Client>, opts: MountOptions, on_error: OnError) -> Self {
        Self {
            geo,
            dev: bufs.dev().clone(),
            bufs,
            read_only: AtomicBool::new(opts.read_only),
            opts,
            on_error,
            shutdown: AtomicU8::new(LIVE),
            errors: Mutex::new(Rank::Counters, ErrorLog::default()),
            orphan_list: AtomicU64::new(0),
        }
    }

    /// The time for an inode: the clock that the kernel takes for times of files, which moves a tick
    /// at a time. Where the kernel keeps the time of a change itself (its writeback cache), it finds
    /// ours the same within a tick and need not send another.
    #[must_use]
    pub fn now(&self) -> Timespec {
        let now = clock_gettime(ClockId::RealtimeCoarse);
        self.storable(Timespec {
            sec: now.tv_sec,
            nsec: u32::try_from(now.tv_nsec).unwrap_or(0),
        })
    }

    /// What an inode of this file system can hold of a time: the smallest ones hold whole seconds.
    #[must_use]
    pub fn storable(&self, time: Timespec) -> Timespec {
        let (last, nsec) = match self.geo.inode_size {
            0..=128 => (i32::MAX.into(), 0),
            _ => (LAST_SECOND, time.nsec),
        };
        let sec = time.sec.clamp(FIRST_SECOND, last);
        // As the kernel's `timestamp_truncate`.
        let nsec = if sec == FIRST_SECOND || sec == last {
            0
        } else {
            nsec
        };
        Timespec { sec, nsec }
    }

    /// Notes that the file system is damaged, once in the log and for the superblock, does what
    /// `errors=` says, and gives the error to return.
    pub fn corrupt(&self, what: &'static str, block: u64, ino: u32) -> FsError {
        log::error!("file system damaged: {what}, block {block}, inode {ino}");
        self.note_error(what, block, ino);
        FsError::Corrupt { what, block, ino }
    }

    /// Notes an error for the superblock and does what `errors=` says.
    pub fn note_error(&self, what: &'static str, block: u64, ino: u32) {
        let record = ErrorRecord {
            what,
            block,
            ino,
            time: self.now(),
        };
        {
            let mut errors = self.errors.lock();
            errors.count = errors.count.saturating_add(1);
            errors.first.get_or_insert(record);
            errors.last = Some(record);
        }
        match self.on_error {
            OnError::Continue => {}
            OnError::RemountRo => self.make_read_only("an error, as errors=remount-ro says"),
            OnError::Panic => {
                log::error!("ending the process, as errors=panic says");
                std::process::abort();
            }
        }
    }

    /// Refuses changes from now on.
    pub fn make_read_only(&self, why: &str) {
        if !self.read_only.swap(true, Ordering::AcqRel) {
            log::error!("file system is read-only from now on: {why}");
        }
    }

    /// Whether changes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::Acquire)
    }

    /// Whether the file system was shut down.
    #[must_use]
    pub fn is_shut_down(&self) -> bool {
        self.shutdown.load(Ordering::Acquire) == DOWN
    }

    /// What a journal that takes nothing any more answers.
    pub(crate) fn refusal(&self) -> FsError {
        if self.shutdown.load(Ordering::Acquire) == LIVE {
            FsError::Aborted
        } else {
            FsError::ShutDown
        }
    }

    /// [`FsError::ReadOnly`] where changes are refused, [`FsError::ShutDown`] where everything is.
    ///
    /// # Errors
    /// See above.
    pub fn check_writable(&self) -> FsResult {
        if self.is_shut_down() {
            Err(FsError::ShutDown)
        } else if self.is_read_only() {
            Err(FsError::ReadOnly)
        } else {
            Ok(())
        }
    }
}

/// A mounted file system.
pub struct Fs {
    /// What all parts share.
    pub core: Arc<Core>,
    /// The journal, or what stands for it.
    pub journal: Arc<Journal>,
    /// Blocks and inodes.
    pub alloc: Arc<Alloc>,
    /// Inodes in memory.
    pub inodes: InodeTable,
    /// Inodes without a name.
    pub orphans: Orphans,
    /// File data.
    pub data_io: DataIo,
    /// Small writes, gathered.
    pub batch: Batch,
    /// Bytes of page cache writes under way.
    pub behind: AtomicUsize,
    /// Held by a rename between directories.
    pub rename_lock: Mutex<()>,
    /// Blocks that the file system itself takes.
    pub overhead: u64,
    /// Deletes in the background what has no name and no user.
    pub(crate) evictions: Option<Workqueue<Arc<Inode>>>,
}

impl Deref for Fs {
    type Target = Core;
    fn deref(&self) -> &Core {
        &self.core
    }
}
