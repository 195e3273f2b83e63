//! Leaving the terminal: the second half of the program is a second process.
//!
//! The first half starts itself again with `--serve-detached`, standard output being a pipe, and
//! waits. The second half mounts, reports through the pipe, and only then lets go of standard
//! error, so that all that can go wrong at a mount is told to whoever started it:
//!
//! ```text
//! first                         second
//! start second ---------------> mount, look at the mountpoint
//! wait for a word on the pipe   standard error to log file or /dev/null
//! exit 0 <---- "mounted" ------ standard output to /dev/null
//! exit with second's code <---- (end of file: it has printed why)
//! ```

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::MOUNT_FAILED;

const MOUNTED: &[u8] = b"mounted\n";

/// Why the second half could not be started or let go.
#[derive(Debug, thiserror::Error)]
pub enum BackgroundError {
    /// It could not be started.
    #[error("cannot start {program:?} in the background")]
    Start {
        /// This program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A signal ended it.
    #[error("ended in the background before the mount answered: {status}")]
    Killed {
        /// How.
        status: std::process::ExitStatus,
    },
    /// The log could not be opened.
    #[error("logfile={path:?}")]
    Log {
        /// As given.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The second half cannot leave the session, directory or terminal.
    #[error("cannot leave the terminal")]
    Leave {
        /// Why.
        source: io::Error,
    },
}

/// Starts the second half, waits for its word, and gives the code to exit with.
///
/// # Errors
/// Where it could not be started, or ended by a signal; else it has said itself what was wrong.
pub fn start() -> Result<u8, BackgroundError> {
    let program = match std::env::current_exe() {
        Ok(program) => program,
        // Without /proc.
        Err(_) => PathBuf::from(std::env::args_os().next().unwrap_or_default()),
    };
    let failed = |source| BackgroundError::Start {
        program: program.clone(),
        source,
    };
    let mut child = Command::new(&program)
        .arg("--serve-detached")
        .args(std::env::args_os().skip(1))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let mut word = Vec::new();
    if let Some(mut pipe) = child.stdout.take() {
        // The child keeps the pipe no longer than until it has spoken or ended.
        pipe.read_to_end(&mut word).map_err(failed)?;
    }
    if word == MOUNTED {
        return Ok(0);
    }
    let status = child.wait().map_err(failed)?;
    match status.code() {
        Some(0) => Ok(0),
        Some(code) => Ok(u8::try_from(code).unwrap_or(MOUNT_FAILED)),
        None => Err(BackgroundError::Killed { status }),
    }
}

/// Leaves the session of whoever started the program.
///
/// # Errors
/// If the system refuses.
pub fn leave_session() -> Result<(), BackgroundError> {
    let leave = |errno: rustix::io::Errno| BackgroundError::Leave {
        source: errno.into(),
    };
    rustix::process::setsid().map_err(leave)?;
    // Neither the mountpoint's parent nor anything else is kept busy.
    rustix::process::chdir("/").map_err(leave)
}

/// Opens the file for messages.
///
/// # Errors
/// With its path.
pub fn open_log(path: &Path) -> Result<File, BackgroundError> {
    let opened = OpenOptions::new().create(true).append(true).open(path);
    opened.map_err(|source| BackgroundError::Log {
        path: path.to_owned(),
        source,
    })
}

/// Tells the first half that the mount answers, and lets go of standard output and error.
///
/// # Errors
/// If nobody listens any more: then nobody knows of the mount, and it should not stay.
pub fn report_mounted(log: Option<&File>) -> Result<(), BackgroundError> {
    let leave = |source| BackgroundError::Leave { source };
    let null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(leave)?;
    let mut pipe = io::stdout().lock();
    pipe.write_all(MOUNTED)
        .and_then(|()| pipe.flush())
        .map_err(leave)?;
    // Standard error first: the first half exits when the pipe closes, and by then whoever reads
    // its standard error has to see the end of that, too.
    let stderr = rustix::stdio::dup2_stderr(log.unwrap_or(&null));
    stderr.map_err(|errno| leave(errno.into()))?;
    rustix::stdio::dup2_stdout(&null).map_err(|errno| leave(errno.into()))
}
