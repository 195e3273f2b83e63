//! Devices at the bottom of a stack.

pub mod file;
mod image;
pub mod mem;
pub mod null;
