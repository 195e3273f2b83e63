//! The journal against other people's programs: the kernel's ext4 leaves logs, e2fsck replays.
#![expect(clippy::unwrap_used, reason = "a test ends with a panic")]

mod support;

mod kernel_logs;
