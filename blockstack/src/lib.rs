//! A stacking block layer in user space: bios, sets of bios, submission, devices.
//!
//! Meaning follows the kernel's block layer; the shape is Rust's.
//!
//! ```
//! use blockstack::backend::mem::MemDisk;
//! use blockstack::{BioFlags, DynDevice, PagePool, Sector, SectorCount, read_wait, write_wait};
//!
//! # fn main() -> Result<(), blockstack::BlkError> {
//! let disk: DynDevice = MemDisk::new("mem0", SectorCount::new(64));
//! let mut buf = PagePool::shared().alloc(512)?;
//! buf.fill(7);
//! let buf = write_wait(&disk, Sector::new(3), buf, BioFlags::FUA)?;
//! assert!(read_wait(&disk, Sector::new(3), buf)?.iter().all(|&byte| byte == 7));
//! # Ok(())
//! # }
//! ```
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`units`] | sectors and lengths |
//! | [`error`] | the code that ends a bio |
//! | [`sync`] | locks with ranks, the hook that hears of waits, what both are made of |
//! | [`buf`] | aligned memory |
//! | [`bio`], [`bio_set`] | the unit of I/O and its pools |
//! | [`submit`] | recursion turned into iteration |
//! | [`plug`] | several bios sent with one system call |
//! | [`wait`] | bios that a thread waits for |
//! | [`direct_io`] | mappings in, bios out |
//! | [`workqueue`] | threads for what must not be done where it comes up |
//! | [`sched`] | where and how urgently a thread runs |
//! | [`lane`] | what keeps processors out of each other's cache lines |
//! | [`device`] | the trait, limits, counters |
//! | [`backend`] | the bottom of a stack |
//! | [`log_writes`] | a record of all writes, and what a power cut leaves of it |
//!
//! With the feature `test-utils`, `testing` holds devices that fail, lose power, or tell what they
//! see.
//!
//! # Locking
//!
//! Ranks stand in [`sync::Rank`]. This crate itself takes only `Queue` and `Pool` locks.
#![deny(unsafe_code)]

pub mod backend;
pub mod bio;
pub mod bio_set;
pub mod buf;
pub mod device;
pub mod direct_io;
pub mod error;
mod forward;
pub mod lane;
pub mod log_writes;
pub mod plug;
pub mod sched;
pub mod submit;
pub mod sync;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;
pub mod units;
pub mod wait;
pub mod workqueue;

pub use bio::{Bio, BioFlags, Op};
pub use bio_set::{BioSet, Rescue, Wait};
pub use buf::{Buf, PagePool};
pub use device::{BlockDevice, Bounds, DynDevice, Limits};
pub use direct_io::{Dio, DioConfig, DioDone, DirectIo, Extent, Mapping};
pub use error::{BlkError, BlkResult};
pub use lane::Lanes;
pub use plug::Plug;
pub use submit::submit_bio;
pub use units::{Sector, SectorCount};
pub use wait::{flush_wait, range_wait, read_wait, write_wait};
pub use workqueue::{OnceWorkqueue, Workqueue};
