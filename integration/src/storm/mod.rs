//! Storm: seeded random operations against a mounted directory, checked against a model.
//!
//! Storm knows POSIX and nothing else, so the same run judges any file system: the one under
//! test and, to judge storm, the kernel's own.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `run` | the parent: prepares the mount, starts workers, collects manifests |
//! | `worker`, `ops` | one worker process: draws operations, makes and checks them |
//! | `model`, `effect`, `content`, `acl` | what the file system should look like |
//! | `manifest`, `verify` | the end state as text, and its comparison with a mount |
//! | `durlog`, `durable` | the record of every promise, and its check after a crash |
//! | `compare`, `sys`, `caps`, `rng`, `text`, `error` | tools |
//!
//! # What is not supported
//!
//! Shared mappings, quota, and any other writer in the directories of the run.

pub mod acl;
pub mod caps;
pub mod compare;
pub mod content;
pub mod durable;
pub mod durlog;
pub mod effect;
pub mod error;
pub mod manifest;
pub mod model;
pub mod ops;
pub mod rng;
pub mod run;
pub mod sys;
pub mod text;
pub mod verify;
pub mod worker;

/// How many directories all workers share.
pub const SHARED_DIRS: u64 = 4;

/// Returns the path of a shared directory below the mount.
pub fn shared_dir(index: u64) -> String {
    format!("shared/s{index}")
}
