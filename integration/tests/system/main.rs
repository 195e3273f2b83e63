//! Whole-system tests: the built program, images made by `mke2fs`, mounts of the kernel, judged by
//! `e2fsck`, by the kernel's own ext4, and by a model in memory (`storm`).
//!
//! | module | what it shows |
//! | --- | --- |
//! | `admin` | shutdown, discards, what a full file system tells |
//! | `common` | images, mounts, commands, skipping |
//! | `cli` | arguments, options, exit codes, signals, the background |
//! | `matrix` | {ext2, ext3, ext4} x block size x how it was filled, under a storm |
//! | `fsx` | a file, or regions of one, changed in every way by many threads at once |
//! | `kill` | SIGKILL at any time costs nothing that was synced |
//! | `links` | counts of links, seen by others while names go |
//! | `bad_input` | what cannot be mounted is refused in one line and stays as it was |
//! | `big` | an image of 1 TiB costs what one of 64 MiB does |
//! | `many` | many files in one directory |
//! | `suspend` | a device below that stops for a while costs only time |
//!
//! `FUSEFS_STACK_LONG=1` runs full counts, `FUSEFS_STACK_SEED=N` other seeds. What cannot run here
//! says so on standard error and in the file `$FUSEFS_STACK_SKIPS`.
#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends at the first thing that is not as it should be"
)]

mod admin;
mod bad_input;
mod big;
mod cli;
mod common;
mod fsx;
mod kill;
mod links;
mod many;
mod matrix;
mod suspend;
