//! A record of all writes, flushes and discards, with their data and in the format of the kernel's
//! device-mapper target `log-writes`, and what a power cut could leave of it.
//!
//! ```
//! use std::sync::Arc;
//! use blockstack::backend::mem::{Image, MemDisk};
//! use blockstack::log_writes::{Cached, Fate, Order, RecordDisk, Recorder};
//! use blockstack::{BioFlags, DynDevice, PagePool, Sector, SectorCount, flush_wait, write_wait};
//!
//! # fn main() -> Result<(), blockstack::BlkError> {
//! let size = SectorCount::new(64);
//! let recorder = Arc::new(Recorder::new(Order::Kernel, Vec::new()));
//! let disk: DynDevice = RecordDisk::new(MemDisk::new("mem", size), recorder.clone());
//! let mut buf = PagePool::shared().alloc(1024)?;
//! buf.fill(1);
//! let buf = write_wait(&disk, Sector::new(8), buf, BioFlags::empty())?;
//! flush_wait(&disk)?;
//! recorder.mark("flushed");
//! let mut after = Cached::new(Image::zeroed(size));
//! for entry in recorder.finish() {
//!     after.apply(&entry);
//! }
//! assert_eq!(after.uncertain().len(), 0);
//! # drop(buf);
//! # Ok(())
//! # }
//! ```
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`mod@format`] | the bytes of a log |
//! | `log` | logs, read and written |
//! | `recorder` | bios in, entries out |
//! | `state` | the disk after a part of a log and a power cut |
//!
//! # Order
//!
//! A log has things in the order in which they ended, once it is sure that they are not in a cache
//! any more. A plain write that has ended waits for a flush, and is logged, with all others that
//! had ended when that flush *began*, in front of the flush when it ends. FUA writes and marks are
//! logged at once. With W for a write, C for its end:
//!
//! ```text
//! Wa Wb Wc Cc Ca FLUSH FUAd Cb CFLUSH CFUAd ...     is logged as     c a FLUSH FUAd ... b FLUSH
//! ```
//!
//! Of two flushes on their way, the one that ends first also made durable what the older waits for.
//! [`Order::Completion`] keeps this but does not wait for a flush that has not begun.

pub mod format;
mod log;
mod recorder;
mod state;

pub use format::{LogError, LogFlags};
pub use log::{Data, Entry, LogReader, LogWriter, load, save};
pub use recorder::{Begun, Order, RecordDisk, Recorder, Sink};
pub use state::{Cached, Fate};

#[cfg(test)]
mod tests;
