//! Metadata buffers over a block device, after dm-bufio.
//!
//! ```
//! use std::time::Duration;
//!
//! use blockstack::SectorCount;
//! use blockstack::backend::mem::MemDisk;
//! use blockstack::sync::Rank;
//! use bufio::{BufError, Client, ClientConfig, no_check};
//!
//! # fn main() -> Result<(), BufError> {
//! let config = ClientConfig {
//!     block_size: 4096,
//!     cache_bytes: 1 << 20,
//!     rank: Rank::FsBufio,
//!     writeback_age: Duration::from_secs(5),
//!     strict_holds: false,
//! };
//! let client = Client::new(MemDisk::new("mem0", SectorCount::new(1024)), config)?;
//! let buffer = client.read(7, no_check())?;
//! buffer.data_mut()[0] = 1;
//! buffer.mark_dirty();
//! client.write_dirty()?;
//! client.flush()?;
//! # Ok(())
//! # }
//! ```
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`client`] | the calls |
//! | [`buffer`] | a hold, guards of the content |
//! | [`validator`] | checks after a read, checksums before a write |
//! | [`error`] | what can go wrong |
//! | `state` | the phases of a buffer: the state machine and its invariants |
//! | `cache`, `read`, `lru` | map, misses, prefetch, eviction |
//! | `writeback`, `reserve` | writes and their thread; memory kept back, the hold contract |
//!
//! # Locking
//!
//! hit:     map shard (r), released
//! miss:    map shard (w), released; the bio is awaited with no lock held
//! write:   content (w) -> state shard, both released before the bio is submitted
//! end_io:  state shard; content (w) of a buffer nobody has; map shard (w), each alone
//!
//! Locks of the content are the callers' and have no rank: a caller that holds several orders them
//! itself. All others are leaves. [`ClientConfig::rank`] is where the calls stand in the order.
//!
//! # Not supported
//!
//! Blocks that are no power of two; dirty ranges of a block (a block is written whole).
#![forbid(unsafe_code)]

pub mod buffer;
mod cache;
pub mod client;
pub mod error;
mod hits;
mod lru;
mod map;
mod read;
mod release_move;
mod reserve;
mod span;
mod state;
pub mod validator;
mod writeback;

pub use buffer::{Buffer, ReadGuard, WriteGuard};
pub use client::{Client, ClientConfig, ClientStats};
pub use error::BufError;
pub use validator::{Invalid, Validator, no_check};
