//! Devices at the bottom of a stack.

pub mod mem;
