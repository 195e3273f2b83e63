//! Metadata buffers over a block device, after dm-bufio.
#![forbid(unsafe_code)]

pub mod buffer;
pub mod client;
pub mod error;
pub mod validator;

pub use buffer::{Buffer, ReadGuard, WriteGuard};
pub use client::{Client, ClientConfig};
pub use error::BufError;
pub use validator::{Invalid, Validator, no_check};
