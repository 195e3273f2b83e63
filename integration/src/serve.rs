//! One mount, from the first look at the image to the last write.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use fs::data::MAX_IO;
use fs::format::superblock::{SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE};
use fs::fuse::{FuseConfig, Server, Unmounter};
use fs::mount::needs_recovery;
use fs::options::Atime;
use fs::{Fs, FsError, MountOptions};
use rustix::fs::{Access, FlockOperation};
use rustix::mount::UnmountFlags;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::background::{self, BackgroundError};
use crate::cli::Plan;
use crate::guard::Guard;
use crate::messages;
use crate::places::{self, PlaceError, Places};
use crate::stack::{self, StackError};

/// What `findmnt` shows after `fuse.` unless told otherwise.
const SUBTYPE: &str = "fusefs-stack";
/// What libfuse, and after it fuser, look at first for their helper.
const FUSERMOUNT_ENV: &str = "FUSERMOUNT_PATH";

/// Why a mount did not come up or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Leaving the terminal failed.
    #[error(transparent)]
    Background(#[from] BackgroundError),
    /// The mountpoint cannot be used.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The image cannot be used.
    #[error(transparent)]
    Stack(#[from] StackError),
    /// Something FUSE needs is missing.
    #[error("{0}")]
    NoFuse(&'static str),
    /// The user may not mount there.
    #[error("mountpoint {path:?}: permission denied ({why})")]
    NotPermitted {
        /// The mountpoint.
        path: PathBuf,
        /// What is missing.
        why: &'static str,
    },
    /// `allow_other` without the administrator's permission.
    #[error("-o {name}: only allowed if /etc/fuse.conf has a line user_allow_other")]
    NoAllowOther {
        /// The option.
        name: &'static str,
    },
    /// Another process has the lock file, or it cannot be made.
    #[error("lockfile={path:?}")]
    Lock {
        /// As given.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The image holds nothing that can be mounted.
    #[error("cannot mount image {image:?}")]
    Mount {
        /// As given.
        image: String,
        /// Why.
        source: fs::mount::MountError,
    },
    /// The kernel or `fusermount3` refused.
    #[error("cannot mount on {path:?}: {text}")]
    Fuse {
        /// The mountpoint.
        path: PathBuf,
        /// What they said.
        text: String,
    },
    /// The mount came up but cannot be looked at.
    #[error("mountpoint {path:?} does not answer")]
    Silent {
        /// The mountpoint.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Reading requests ended with an error.
    #[error("the connection to the kernel broke")]
    Session {
        /// How.
        source: io::Error,
    },
    /// The last writes failed.
    #[error("unmounting image {image:?} failed: it may need e2fsck")]
    Unmount {
        /// As given.
        image: String,
        /// Why.
        source: FsError,
    },
    /// Threads or signals.
    #[error("cannot start")]
    System {
        /// Why.
        source: io::Error,
    },
}

/// Mounts, serves until unmounted, writes everything.
///
/// # Errors
/// Why not. Before the mount answers, nothing of the image has changed but by replaying its journal.
pub fn run(plan: &Plan, places: &Places, detached: bool) -> Result<(), ServeError> {
    let options = &plan.options;
    let fsname = options
        .fsname
        .clone()
        .unwrap_or_else(|| places.image_as_given.clone());
    let log = options.logfile.as_deref().map(background::open_log);
    let log = log.transpose()?;
    let lock = options.lockfile.as_deref().map(LockFile::take);
    let _lock = lock.transpose()?;
    if detached {
        background::leave_session()?;
    }
    let config = fuse_config(plan, places, &fsname);
    places::refuse_busy(&places.mountpoint, &fsname)?;
    check_fuse(&config)?;
    // Before the mount, so that no signal can end the process and leave a dead mount behind.
    let signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(system)?;

    let image = || places.image_as_given.clone();
    let fs = mount(plan, places)?;
    let served = serve(fs.clone(), &config, signals, detached, log.as_ref());
    let unmounted = fs.unmount();
    served?;
    unmounted.map_err(|source| ServeError::Unmount {
        image: image(),
        source,
    })
}

/// Opens the image and mounts the file system on it. One that is to be read only is opened so, unless
/// its journal has to be replayed: as with the kernel's, `ro` is about files.
fn mount(plan: &Plan, places: &Places) -> Result<Arc<Fs>, ServeError> {
    let options = &plan.options;
    let image = &places.image_as_given;
    let open = |read_only| stack::open(&places.image, image, options.offset, read_only);
    let read_only = options.fs.read_only;
    let replays = read_only
        && !options.fs.noload
        && journal_waits(&places.image, options.offset).unwrap_or(false);
    let dev = match open(read_only && !replays) {
        // Then the mount tells what it would need.
        Err(StackError::ReadOnly(_) | StackError::WriteProtected { .. }) if replays => open(true)?,
        opened => opened?,
    };
    if replays && !dev.limits().read_only {
        // What a crash left is deleted then, too. Where the file system is one that can only be
        // read, the mount below replays.
        let writable = MountOptions {
            read_only: false,
            ..options.fs.clone()
        };
        if let Ok(fs) = Fs::mount(dev.clone(), writable) {
            fs.unmount().map_err(|source| ServeError::Unmount {
                image: image.clone(),
                source,
            })?;
        }
    }
    Fs::mount(dev, options.fs.clone()).map_err(|source| ServeError::Mount {
        image: image.clone(),
        source,
    })
}

/// Whether the superblock says that the journal has to be replayed.
fn journal_waits(image: &Path, offset: u64) -> io::Result<bool> {
    let mut bytes = [0; SUPERBLOCK_SIZE];
    let file = File::open(image)?;
    file.read_exact_at(&mut bytes, offset.saturating_add(SUPERBLOCK_OFFSET))?;
    Ok(needs_recovery(&bytes))
}

/// Everything between the mounted file system and its unmounting.
fn serve(
    fs: Arc<Fs>,
    config: &FuseConfig,
    signals: Signals,
    detached: bool,
    log: Option<&File>,
) -> Result<(), ServeError> {
    let path = config.mountpoint.clone();
    let server = Server::mount(fs, config).map_err(|error| ServeError::Fuse {
        text: fuse_message(&error, &path),
        path,
    })?;
    unmount_on_signal(signals, server.unmounter(), config.mountpoint.clone())?;
    let log = log.map(File::try_clone).transpose().map_err(system)?;
    let answer = watch_start(config, server.unmounter(), detached, log)?;
    let guard = Guard::start(&config.mountpoint);
    let ran = server.run();
    drop(guard);
    // The thread can only have ended without a word by a panic, which it has told.
    if let Ok(Err(error)) = answer.recv() {
        return Err(error);
    }
    ran.map_err(|source| ServeError::Session { source })
}

/// Looks at the mountpoint as soon as it is served, and reports it.
fn watch_start(
    config: &FuseConfig,
    unmounter: Unmounter,
    detached: bool,
    log: Option<File>,
) -> Result<Receiver<Result<(), ServeError>>, ServeError> {
    let (sender, receiver) = channel();
    let path = config.mountpoint.clone();
    let watch = move || {
        let answers = look(&path).and_then(|()| {
            places::read_ahead(&path, MAX_IO);
            if detached {
                background::report_mounted(log.as_ref())?;
            } else if let Some(log) = &log {
                rustix::stdio::dup2_stderr(log).map_err(|errno| system(errno.into()))?;
            }
            messages::release();
            Ok(())
        });
        if answers.is_err() {
            if let Err(error) = unmounter.unmount() {
                log::error!("unmounting {path:?}: {error}");
            }
        }
        if sender.send(answers).is_err() {
            log::debug!("{path:?}: nobody waits for the start any more");
        }
    };
    let thread = thread::Builder::new().name("start".to_owned());
    thread.spawn(watch).map_err(system)?;
    Ok(receiver)
}

/// Whether the mountpoint answers. That it is no mountpoint any more is no error: somebody was fast.
fn look(path: &Path) -> Result<(), ServeError> {
    let silent = |source| ServeError::Silent {
        path: path.to_owned(),
        source,
    };
    rustix::fs::statfs(path).map_err(|errno| silent(errno.into()))?;
    std::fs::metadata(path).map(drop).map_err(silent)
}

fn unmount_on_signal(
    mut signals: Signals,
    unmounter: Unmounter,
    path: PathBuf,
) -> Result<(), ServeError> {
    let wait = move || {
        for signal in signals.forever() {
            log::info!("signal {signal}: unmounting");
            let Err(error) = unmounter.unmount() else {
                continue;
            };
            // Files are open: no new ones from now on, and the process ends with the last.
            log::warn!("signal {signal}: {path:?}: {error}; the process ends when it is not used");
            if let Err(error) = rustix::mount::unmount(&path, UnmountFlags::DETACH) {
                log::error!("signal {signal}: cannot unmount {path:?}: {error}");
            }
        }
    };
    let thread = thread::Builder::new().name("signals".to_owned());
    thread.spawn(wait).map(drop).map_err(system)
}

fn fuse_config(plan: &Plan, places: &Places, fsname: &str) -> FuseConfig {
    let options = &plan.options;
    let root = rustix::process::geteuid().is_root();
    let subtype = options.subtype.as_deref().unwrap_or(SUBTYPE);
    let mut config = FuseConfig {
        mountpoint: places.mountpoint.clone(),
        fsname: fsname.to_owned(),
        subtype: Some(subtype.to_owned()).filter(|name| !name.is_empty()),
        read_only: options.fs.read_only,
        allow_other: options.allow_other.unwrap_or(root && !options.allow_root),
        allow_root: options.allow_root,
        suid: options.suid.unwrap_or(root),
        dev: options.dev.unwrap_or(root),
        exec: options.exec.unwrap_or(true),
        noatime: options.fs.atime == Atime::Never,
        ..FuseConfig::default()
    };
    if let Some(loops) = options.loops {
        config.loops = loops;
    }
    config
}

/// Finds out what would make the mount fail, as long as the image is untouched.
fn check_fuse(config: &FuseConfig) -> Result<(), ServeError> {
    if !Path::new("/dev/fuse").exists() {
        return Err(ServeError::NoFuse(
            "there is no /dev/fuse: load the module (modprobe fuse), or give the device to the \
             container (--device /dev/fuse)",
        ));
    }
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    if !has_fusermount() {
        return Err(ServeError::NoFuse(
            "fusermount3 not found: install the package fuse3",
        ));
    }
    let conf = std::fs::read_to_string("/etc/fuse.conf").unwrap_or_default();
    if !conf.lines().any(|line| line.trim() == "user_allow_other") {
        let name = match (config.allow_other, config.allow_root) {
            (true, _) => Some("allow_other"),
            (_, true) => Some("allow_root"),
            _ => None,
        };
        if let Some(name) = name {
            return Err(ServeError::NoAllowOther { name });
        }
    }
    may_mount_on(&config.mountpoint)
}

/// The rules of `fusermount3`: the user can write there, and owns it where it is sticky.
fn may_mount_on(path: &Path) -> Result<(), ServeError> {
    let refuse = |why| ServeError::NotPermitted {
        path: path.to_owned(),
        why,
    };
    if rustix::fs::access(path, Access::WRITE_OK).is_err() {
        return Err(refuse("you cannot write to it"));
    }
    let metadata = std::fs::metadata(path).map_err(system)?;
    let sticky = metadata.mode() & 0o1000 != 0;
    if sticky && metadata.uid() != rustix::process::getuid().as_raw() {
        return Err(refuse("it is sticky and not yours"));
    }
    Ok(())
}

fn has_fusermount() -> bool {
    if let Some(path) = std::env::var_os(FUSERMOUNT_ENV) {
        return Path::new(&path).exists();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/bin".into(), "/sbin".into()])
        .any(|dir| dir.join("fusermount3").exists() || dir.join("fusermount").exists())
}

fn fuse_message(error: &io::Error, path: &Path) -> String {
    let text = error.to_string();
    let text = text.trim().trim_start_matches("fusermount3: ");
    match error.kind() {
        _ if text.is_empty() => "fusermount3 failed".to_owned(),
        io::ErrorKind::PermissionDenied if text.starts_with("Permission denied") => {
            "permission denied (may you use /dev/fuse?)".to_owned()
        }
        io::ErrorKind::NotFound => format!("{text} (is {path:?} still there?)"),
        _ => text.to_owned(),
    }
}

fn system(source: io::Error) -> ServeError {
    ServeError::System { source }
}

/// A locked file with the number of this process; gone when everything is on disk.
struct LockFile {
    path: PathBuf,
    _file: File,
}

impl LockFile {
    fn take(path: &Path) -> Result<Self, ServeError> {
        let failed = |source| ServeError::Lock {
            path: path.to_owned(),
            source,
        };
        // The process leaves its directory.
        let path = std::path::absolute(path).map_err(failed)?;
        let mut file = File::options()
            .create(true)
            .write(true)
            .truncate(false)
            .open(&path)
            .map_err(failed)?;
        let lock = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
        lock.map_err(|errno| match errno {
            rustix::io::Errno::WOULDBLOCK => failed(io::Error::other("another mount has it")),
            _ => failed(errno.into()),
        })?;
        file.set_len(0).map_err(failed)?;
        writeln!(file, "{}", std::process::id()).map_err(failed)?;
        Ok(Self { path, _file: file })
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            log::error!("lockfile={:?}: {error}", self.path);
        }
    }
}
