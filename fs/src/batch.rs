//! Small writes from the page cache, gathered.
//!
//! Small files are written one block at a time, each when it is closed, and the allocator places
//! them one behind the other. A request to the device for each would cost more than all the rest of
//! making a file. So a small write whose blocks continue the last one's is copied behind it, and
//! the whole goes to the device as one request: when a megabyte is full, when a write comes that
//! does not continue it, when somebody waits for one of the writes, or after a few milliseconds.
//!
//! The writes were answered when they came in; what that means stands in [`crate::data`].
//!
//! # Locking
//!
//! `open` (rank `Counters`) is held for a copy of at most [`SMALL`] bytes, under the inode lock of
//! the write. It is the one lock that writes to different files share; requests of more than
//! [`SMALL`] bytes, reads and direct writes never take it.

use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use blockstack::direct_io::{Extent, Mapping};
use blockstack::sync::{Condvar, Mutex, Rank};
use blockstack::{BioFlags, Buf, PagePool, Sector, SectorCount};

use crate::core::Fs;
use crate::data::{IoEnd, WriteEnd};
use crate::error::{FsError, FsResult};
use crate::inode::Inode;

/// The longest write that is gathered, in bytes.
pub(crate) const SMALL: usize = 64 << 10;
/// Bytes of a full batch.
const FULL: usize = 1 << 20;
/// How long a write waits for others.
const LINGER: Duration = Duration::from_millis(4);

/// A write whose data stands in a batch.
pub(crate) struct Gathered {
    pub(crate) inode: Arc<Inode>,
    pub(crate) write: WriteEnd,
}

/// Writes that lie one behind the other on the device.
struct Run {
    start: Sector,
    buf: Buf,
    len: usize,
    writes: Vec<Gathered>,
}

impl Run {
    fn end(&self) -> u64 {
        self.start.raw() + (self.len as u64 >> 9)
    }
}

#[derive(Default)]
struct Open {
    run: Option<Run>,
    stop: bool,
}

struct Shared {
    open: Mutex<Open>,
    first: Condvar,
}

/// See the module's documentation.
pub struct Batch {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Batch {
    pub(crate) fn new() -> Self {
        Self {
            shared: Arc::new(Shared {
                open: Mutex::new(Rank::Counters, Open::default()),
                first: Condvar::new(),
            }),
            thread: Mutex::new(Rank::Mount, None),
        }
    }

    /// Starts the thread that sends what waited long enough.
    pub(crate) fn start(&self, fs: Weak<Fs>) -> std::io::Result<()> {
        let shared = self.shared.clone();
        let body = move || {
            loop {
                {
                    let mut open = shared.open.lock();
                    while open.run.is_none() && !open.stop {
                        shared.first.wait(&mut open);
                    }
                    if open.stop {
                        return;
                    }
                }
                std::thread::sleep(LINGER);
                match fs.upgrade() {
                    Some(fs) => fs.flush_batch(),
                    None => return,
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("batch".into())
            .spawn(body)?;
        *self.thread.lock() = Some(thread);
        Ok(())
    }

    /// Ends the thread; nothing may be open any more.
    pub(crate) fn stop(&self) {
        self.shared.open.lock().stop = true;
        self.shared.first.notify_all();
        // The thread itself may be the one that drops the last reference to the file system.
        let thread = self.thread.lock().take();
        if let Some(thread) =
            thread.filter(|thread| thread.thread().id() != std::thread::current().id())
        {
            if thread.join().is_err() {
                log::error!("the thread that sends small writes panicked");
            }
        }
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Fs {
    /// Adds a small write; gives it back where there is no memory for it.
    #[must_use]
    pub(crate) fn gather(
        self: &Arc<Self>,
        start: Sector,
        bytes: &[u8],
        write: Gathered,
    ) -> Option<Gathered> {
        let full = {
            let mut open = self.batch.shared.open.lock();
            let continues = open
                .run
                .as_ref()
                .is_some_and(|run| run.end() == start.raw() && run.len + bytes.len() <= FULL);
            let before = if continues { None } else { open.run.take() };
            if open.run.is_none() {
                let buf = match PagePool::shared().alloc(FULL) {
                    Ok(buf) => buf,
                    Err(_no_memory) => {
                        open.run = before;
                        return Some(write);
                    }
                };
                open.run = Some(Run {
                    start,
                    buf,
                    len: 0,
                    writes: Vec::new(),
                });
                if before.is_none() {
                    self.batch.shared.first.notify_one();
                }
            }
            if let Some(run) = &mut open.run {
                run.buf[run.len..run.len + bytes.len()].copy_from_slice(bytes);
                run.len += bytes.len();
                run.writes.push(write);
            }
            before
        };
        if let Some(run) = full {
            self.send(run);
        }
        None
    }

    /// Sends what was gathered so far.
    pub(crate) fn flush_batch(self: &Arc<Self>) {
        let run = self.batch.shared.open.lock().run.take();
        if let Some(run) = run {
            self.send(run);
        }
    }

    fn send(self: &Arc<Self>, mut run: Run) {
        let extent = Extent {
            // Its end changes metadata, so it must not run where bios end.
            kind: Mapping::New,
            sector: run.start,
            len: SectorCount::new(run.len as u64 >> 9),
        };
        let shortened: FsResult = run.buf.set_len(run.len).map_err(FsError::from);
        if let Err(error) = shortened {
            log::error!("batch of {} bytes: {error}", run.len);
        }
        // By the bio of one of the files: one of all batches could be kept by a device that is
        // frozen, while this batch is for another.
        let Some(inode) = run.writes.first().map(|first| first.inode.clone()) else {
            return;
        };
        let end = IoEnd::batch(self.clone(), run.writes);
        self.file_io(&inode)
            .write(&[extent], run.buf, BioFlags::empty(), end);
    }
}
