//! The journal against other people's programs, power cuts and errors: the kernel's ext4 leaves
//! logs, e2fsck replays ours, debugfs prints them.
#![expect(clippy::unwrap_used, reason = "a test ends with a panic")]

mod support;

mod behaviour;
mod crash;
mod kernel_logs;
