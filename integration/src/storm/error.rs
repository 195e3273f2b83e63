//! Why a run or a check ended.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::text::escape;

/// The result of anything here that can end a run.
pub type Result<T> = std::result::Result<T, StormError>;

/// Why a run or a check ended.
#[derive(Debug, thiserror::Error)]
pub enum StormError {
    /// A system call gave an errno that the model does not allow.
    #[error("{call} on {path}: {source}", path = show(path))]
    Call {
        /// Name of the call.
        call: &'static str,
        /// The object it was made on.
        path: PathBuf,
        /// What it returned.
        #[source]
        source: io::Error,
    },
    /// The file system and the model disagree.
    #[error("{path}: {what}: expected {expected}, actual {actual}", path = show(path))]
    Mismatch {
        /// The object that differs.
        path: PathBuf,
        /// Which property differs.
        what: String,
        /// The model's value.
        expected: String,
        /// The file system's value.
        actual: String,
    },
    /// The file system behind the mount is gone, which a kill test expects.
    #[error("the file system stopped answering: {0}")]
    Gone(io::Error),
    /// A manifest or log line makes no sense.
    #[error("{file} line {line}: {reason}", file = show(file))]
    Parse {
        /// The file read.
        file: PathBuf,
        /// Line number from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// The run cannot start as asked.
    #[error("{0}")]
    Setup(String),
    /// One or more checks failed; each has been printed.
    #[error("{0} failure(s)")]
    Failures(usize),
    /// A step of a worker failed.
    #[error("seed {seed} worker p{worker} op {op} ({step}): {source}")]
    Step {
        /// Seed of the run.
        seed: u64,
        /// Number of the worker.
        worker: u64,
        /// Number of the step within the worker.
        op: u64,
        /// What the step does.
        step: String,
        /// What went wrong.
        #[source]
        source: Box<StormError>,
    },
}

impl StormError {
    /// Says that `path` differs from the model in `what`.
    pub fn mismatch(
        path: &Path,
        what: impl Into<String>,
        expected: impl ToString,
        actual: impl ToString,
    ) -> Self {
        Self::Mismatch {
            path: path.to_path_buf(),
            what: what.into(),
            expected: expected.to_string(),
            actual: actual.to_string(),
        }
    }
}

/// Writes a path in printable ASCII.
pub fn show(path: &Path) -> String {
    escape(path.as_os_str().as_bytes())
}

/// Adds call and path to an I/O error.
pub trait Context<T> {
    /// Turns the error into [`StormError::Call`].
    fn call(self, call: &'static str, path: &Path) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn call(self, call: &'static str, path: &Path) -> Result<T> {
        self.map_err(|error| StormError::Call {
            call,
            path: path.to_path_buf(),
            source: error.into(),
        })
    }
}
