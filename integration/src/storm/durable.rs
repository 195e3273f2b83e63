//! Checks after a crash.
