//! Devices at the bottom of a stack.

pub mod file;
pub mod mem;
