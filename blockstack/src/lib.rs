//! Stub.
pub mod error;
pub mod units;
