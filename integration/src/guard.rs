//! A second process that ends the connection to the kernel where the first is killed.
//!
//! When a server is killed, the system closes its connection, and whoever waits for an answer gets
//! an error. But not while one of the server's threads is inside the system, waiting for the page
//! cache to be written: only the server could take those writes, so that thread would never leave,
//! the connection stay, and all who use the mount wait for ever. (A search for data makes the kernel
//! write back first, and so waits there.)
//!
//! So a small process waits for the end of the server's first thread, and ends the connection from
//! outside: through the file that the kernel has for that, or, for root, as a forced unmount does. It
//! opens that file at the start; a later connection of the same number is not reached through it.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{Write, stdin};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use rustix::fs::{Mode, OFlags, open};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, getpid, getppid, setsid};
use signal_hook::consts::SIGTERM;
use signal_hook::iterator::Signals;

use crate::places;

/// The first word of the second process.
pub const WORD: &str = "--guard";

/// The process; ended with this.
#[derive(Debug)]
pub struct Guard(Child);

impl Guard {
    /// Starts it. `None` where it could do nothing, or cannot be started: then a mount whose server
    /// is killed at a bad moment needs `umount -f`.
    ///
    /// To be called by the thread whose end is to be noticed.
    pub fn start(mountpoint: &Path) -> Option<Self> {
        let top = places::fuse_mount(mountpoint)?;
        let minor = top.device.split_once(':')?.1;
        let path = format!("/sys/fs/fuse/connections/{minor}/abort");
        let file = OpenOptions::new().write(true).open(&path);
        let stdin = match file {
            Ok(file) => Stdio::from(file),
            Err(_) if rustix::process::geteuid().is_root() => Stdio::null(),
            Err(error) => {
                log::debug!("{path}: {error}");
                return None;
            }
        };
        let started = Command::new(std::env::current_exe().ok()?)
            .arg(WORD)
            .arg(getpid().as_raw_nonzero().to_string())
            .arg(&top.device)
            .arg(mountpoint)
            .stdin(stdin)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        started
            .inspect_err(|error| log::debug!("no guard: {error}"))
            .ok()
            .map(Self)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Err(error) = self.0.kill().and_then(|()| self.0.wait()) {
            log::debug!("the guard cannot be ended: {error}");
        }
    }
}

/// The second process, with the words after [`WORD`]: its parent, device, mountpoint.
pub fn run(words: &[OsString]) -> ExitCode {
    let [parent, device, mountpoint] = words else {
        return ExitCode::FAILURE;
    };
    let parent = parent.to_str().and_then(|word| word.parse().ok());
    let Some(parent) = parent.and_then(Pid::from_raw) else {
        return ExitCode::FAILURE;
    };
    if watch(parent).is_some() && has_ended(parent) {
        end(device, &PathBuf::from(mountpoint))
    } else {
        ExitCode::FAILURE
    }
}

/// Returns when a signal came, or the parent had ended before.
fn watch(parent: Pid) -> Option<()> {
    // Signals for the server are not for this process, nor is `killall` by its name.
    setsid().ok()?;
    rustix::thread::set_name(c"fuse-guard").ok()?;
    let mut signals = Signals::new([SIGTERM]).ok()?;
    rustix::process::set_parent_process_death_signal(Some(Signal::TERM)).ok()?;
    if getppid() == Some(parent) {
        signals.forever().next()?;
    }
    Some(())
}

/// Whether the first thread of `pid` has ended, rather than somebody sent a signal. The word comes
/// a moment before that can be seen. The process itself may still be there, and be the parent, for
/// the sake of the thread this is about.
fn has_ended(pid: Pid) -> bool {
    let path = format!("/proc/{}/stat", pid.as_raw_nonzero());
    for _ in 0..100 {
        let Ok(stat) = std::fs::read_to_string(&path) else {
            return true;
        };
        let state = stat.rsplit(") ").next();
        if state.is_some_and(|state| state.starts_with(['Z', 'X'])) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

fn end(device: &OsString, mountpoint: &Path) -> ExitCode {
    let stdin = stdin().as_fd().try_clone_to_owned().map(File::from);
    let Ok(mut file) = stdin else {
        return ExitCode::FAILURE;
    };
    // Not where there is `/dev/null` in the place of the file. Fails where the connection is gone.
    let has_file = file.metadata().is_ok_and(|what| what.is_file());
    if has_file {
        return match file.write_all(b"1") {
            Ok(()) => ExitCode::SUCCESS,
            Err(_gone) => ExitCode::FAILURE,
        };
    }
    // A forced unmount ends the connection first. The mount itself shall stay, dead, as after any
    // SIGKILL: whoever goes on to write by its path must not write into the directory below. So it
    // is kept busy.
    let Ok(_busy) = open(mountpoint, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) else {
        return ExitCode::FAILURE;
    };
    let still = places::fuse_mount(mountpoint).is_some_and(|top| top.device.as_str() == device);
    if still {
        unmount(mountpoint, UnmountFlags::FORCE).ok();
    }
    ExitCode::SUCCESS
}
