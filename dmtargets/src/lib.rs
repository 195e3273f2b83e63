//! A device-mapper in user space: tables in `dmsetup` syntax, targets, mapped devices.
//!
//! ```
//! use std::sync::Arc;
//!
//! use blockstack::backend::mem::MemDisk;
//! use blockstack::{BlkError, DynDevice, SectorCount};
//! use dmtargets::{MappedDevice, Registry, Table};
//!
//! # fn main() -> Result<(), dmtargets::TableError> {
//! let disk: DynDevice = MemDisk::new("mem0", SectorCount::new(64));
//! let open = |name: &str| match name {
//!     "mem0" => Ok(disk.clone()),
//!     _ => Err(BlkError::NoDevice),
//! };
//! let rows = "0 16 linear mem0 8\n16 8 zero \n";
//! let table = Table::parse(rows, &Registry::standard(), &open)?;
//! let mapped: Arc<MappedDevice> = MappedDevice::create("demo", table)?;
//! assert_eq!(mapped.table(), rows);
//! # Ok(())
//! # }
//! ```
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`target`] | the trait, and what a target works with |
//! | [`args`] | words of a row, errors |
//! | [`table`] | rows, parsed and printed |
//! | [`concise`] | several devices on one line |
//! | [`mapped`] | the device: split, clone, suspend, resume, table swap |
//! | `flush` | how a flush reaches everything below |
//! | `duplicates` | several bios for one |
//! | `row` | a target with its type erased |
//! | [`registry`] | targets by name |
//! | [`linear`], [`striped`], [`unstriped`], [`delay`], [`zero`], [`error`] | targets |
//!
//! # Locking
//!
//! A mapped device takes no lock on the I/O path but those of the pools (leaves); see [`mapped`].
//!
//! # Not supported
//!
//! Targets that this crate does not name; `major:minor` for a device is up to the [`DeviceSource`].
#![forbid(unsafe_code)]

pub mod args;
pub mod concise;
pub mod delay;
mod duplicates;
pub mod error;
mod flush;
pub mod linear;
pub mod mapped;
pub mod registry;
mod row;
pub mod striped;
pub mod table;
pub mod target;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;
pub mod unstriped;
pub mod zero;

pub use args::{Args, CtrError};
pub use concise::ConciseDevice;
pub use mapped::{MappedDevice, linear_over};
pub use registry::Registry;
pub use table::{Table, TableError};
pub use target::{
    DevRange, DeviceSource, DmBio, Event, FlushRoute, MapResult, Notifier, Suspend, TableCx, Target,
};
