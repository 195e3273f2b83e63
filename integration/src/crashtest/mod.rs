//! Crash states: a workload runs on a copy of an image with a recorder below; then what power cuts
//! could have left is built from the record, mounted, replayed and judged.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`command`] | the command `crashtest` |
//! | [`run`] | many workloads on several threads |
//! | [`workload`] | the built-in ones |
//! | [`script`] | their language |
//! | [`exec`] | runs a script in this process, recorded |
//! | [`mounted`] | runs a script or a command on a real mount, recorded |
//! | [`model`], [`history`] | what must be there, what may be |
//! | [`states`] | what a power cut can leave of a log |
//! | [`judge`], [`walk`] | mounts a state and looks at all of it |
//! | [`explore`] | all states of a log; shrinks what it finds |
//! | [`kit`] | an image made ready; finds as files |
//! | [`disk`] | the image, its free blocks filled with what nobody wrote |
//!
//! States live in memory, over the image: each costs by what it changes.
//!
//! # What is not supported
//!
//! File systems without a journal: until e2fsck has seen them, a power cut may leave anything.

pub mod command;
pub mod disk;
pub mod exec;
pub mod explore;
pub mod history;
pub mod judge;
pub mod kit;
pub mod model;
pub mod mounted;
pub mod random;
pub mod run;
pub mod script;
pub mod states;
pub mod walk;
pub mod workload;

use std::path::PathBuf;

/// Why a test of crash states could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image cannot be read.
    #[error("image {path:?}")]
    Image {
        /// As given.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A part of it could not be read on the way.
    #[error("the image could not be read everywhere; what was found counts for nothing")]
    Unreadable,
    /// It has no journal.
    #[error(
        "the file system has no journal: until e2fsck has seen it, a power cut may leave anything"
    )]
    NoJournal,
    /// The name of the workloads' directory is taken.
    #[error("the image has a {} already", walk::WORK)]
    WorkDir,
    /// It cannot be mounted.
    #[error(transparent)]
    Mount(#[from] fs::mount::MountError),
    /// Something else is wrong with it.
    #[error("file system: {0}")]
    Fs(#[from] fs::FsError),
    /// Something is wrong before anything was done to it.
    #[error("the image before the test: {0}")]
    Start(String),
    /// Signals cannot be heard of.
    #[error("signals")]
    Signal(#[source] std::io::Error),
    /// No place for images that e2fsck is to see.
    #[error("no directory for images")]
    Scratch(#[source] std::io::Error),
    /// The file of a find.
    #[error("{path:?}")]
    Find {
        /// As given.
        path: PathBuf,
        /// Why.
        source: blockstack::log_writes::LogError,
    },
    /// The mount did not come up, or did not end well.
    #[error("mount: {0}")]
    Fuse(#[source] std::io::Error),
    /// The command did not run, or failed.
    #[error("command {command:?}: {why}")]
    Command {
        /// As given.
        command: String,
        /// What became of it.
        why: String,
    },
    /// A script cannot be read.
    #[error("script {path:?}: {why}")]
    Script {
        /// As given.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// A log, but no find.
    #[error("{path:?} is no find of crashtest")]
    NoFind {
        /// As given.
        path: PathBuf,
    },
}
