//! Requests of the FUSE protocol, and the operations that answer them.
//!
//! The kernel is told to keep names, attributes, pages and links as long as it likes: nobody else
//! changes the image. It need not tell us of opens and closes either: an inode lives while the
//! kernel knows its number, so an unlinked file is deleted when that ends, and permission is checked
//! by the kernel. So opening, reading and closing a cached file costs no request at all. For the
//! same reason a file is created by MKNOD, which leaves nothing to be released.

mod attrs;
mod errno;
mod follow;
mod gate;
mod helper;
mod lost;
mod requests;

use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;

use blockstack::sync::{Mutex, Rank};
use fuser::{Config, MountOption, Session, SessionACL, SessionUnmounter};

use crate::core::Fs;

/// How a file system is mounted.
#[derive(Clone, Debug)]
pub struct FuseConfig {
    /// Where.
    pub mountpoint: PathBuf,
    /// What `findmnt` shows as the source.
    pub fsname: String,
    /// What follows `fuse.` in the type.
    pub subtype: Option<String>,
    /// Refuse changes.
    pub read_only: bool,
    /// Other users may use it.
    pub allow_other: bool,
    /// Root may use it.
    pub allow_root: bool,
    /// Set-user-id bits count.
    pub suid: bool,
    /// Device files work.
    pub dev: bool,
    /// Programs can be run.
    pub exec: bool,
    /// The kernel shows `noatime`.
    pub noatime: bool,
    /// Threads that read requests at a time.
    pub loops: usize,
    /// Threads in all: so many requests can wait at a time.
    pub threads: usize,
}

impl Default for FuseConfig {
    fn default() -> Self {
        Self {
            mountpoint: PathBuf::new(),
            fsname: "fusefs-stack".into(),
            subtype: None,
            read_only: false,
            allow_other: false,
            allow_root: false,
            suid: false,
            dev: false,
            exec: true,
            noatime: false,
            loops: 1,
            threads: 24,
        }
    }
}

impl FuseConfig {
    fn to_fuser(&self) -> Config {
        let either = |on, yes, no| if on { yes } else { no };
        let mut options = vec![
            MountOption::FSName(self.fsname.clone()),
            MountOption::DefaultPermissions,
            either(self.read_only, MountOption::RO, MountOption::RW),
            either(self.suid, MountOption::Suid, MountOption::NoSuid),
            either(self.dev, MountOption::Dev, MountOption::NoDev),
            either(self.exec, MountOption::Exec, MountOption::NoExec),
        ];
        // Not `Subtype`: fuser drops that where it can mount without `fusermount3`.
        if let Some(subtype) = &self.subtype {
            options.push(MountOption::CUSTOM(format!("subtype={subtype}")));
        }
        if self.noatime {
            options.push(MountOption::NoAtime);
        }
        let mut config = Config::default();
        config.mount_options = options;
        config.acl = match (self.allow_other, self.allow_root) {
            (true, _) => SessionACL::All,
            (false, true) => SessionACL::RootAndOwner,
            (false, false) => SessionACL::Owner,
        };
        config.n_threads = Some(self.threads());
        config
    }

    /// Threads in all, one at least beside those that read.
    fn threads(&self) -> usize {
        self.threads.max(self.loops + 1)
    }
}

/// A mounted file system that answers requests while [`Self::run`] runs.
pub struct Server {
    session: Session<requests::Requests>,
    unmounter: Unmounter,
}

/// Unmounts from another thread; clones do the same.
#[derive(Clone)]
pub struct Unmounter(Arc<Mutex<How>>);

enum How {
    Session(SessionUnmounter),
    Helper(PathBuf),
    Done,
}

impl Unmounter {
    fn new(how: How) -> Self {
        Self(Arc::new(Mutex::new(Rank::Mount, how)))
    }

    /// Unmounts; nothing where it was done before.
    ///
    /// # Errors
    /// Those of umount(2) or `fusermount3`.
    pub fn unmount(&self) -> io::Result<()> {
        let mut how = self.0.lock();
        match &mut *how {
            How::Session(session) => session.unmount(),
            How::Helper(mountpoint) => {
                helper::unmount(mountpoint)?;
                *how = How::Done;
                Ok(())
            }
            How::Done => Ok(()),
        }
    }

    /// The mount is gone. What is mounted there from now on is somebody else's.
    fn forget(&self) {
        let mut how = self.0.lock();
        if matches!(*how, How::Helper(_)) {
            *how = How::Done;
        }
    }
}

impl Server {
    /// Mounts and greets the kernel.
    ///
    /// # Errors
    /// Those of mount(2) or `fusermount3`, in its words.
    pub fn mount(fs: Arc<Fs>, config: &FuseConfig) -> io::Result<Self> {
        let requests = requests::Requests::new(fs, config)?;
        let notify = requests.notify();
        let gate = requests.gate();
        let mut fuser_config = config.to_fuser();
        let alone = fuser_config.acl == SessionACL::Owner;
        let (session, how) = if alone && !rustix::process::geteuid().is_root() {
            // See `helper`: fuser must not turn anybody away.
            fuser_config.acl = SessionACL::All;
            let connection = helper::mount(config)?;
            let greeted = Session::from_fd(requests, connection, fuser_config.acl, fuser_config);
            let mountpoint = config.mountpoint.clone();
            match greeted {
                Ok(session) => (session, How::Helper(mountpoint)),
                Err(error) => {
                    helper::unmount(&mountpoint)?;
                    return Err(error);
                }
            }
        } else {
            let mut session = Session::new(requests, &config.mountpoint, &fuser_config)?;
            let unmounter = session.unmount_callable();
            (session, How::Session(unmounter))
        };
        notify.get_or_init(|| session.notifier());
        gate.set_connection(session.as_fd().try_clone_to_owned()?);
        let unmounter = Unmounter::new(how);
        Ok(Self { session, unmounter })
    }

    /// Something that unmounts.
    #[must_use]
    pub fn unmounter(&self) -> Unmounter {
        self.unmounter.clone()
    }

    /// Answers requests until the mount is gone, however it was unmounted.
    ///
    /// # Errors
    /// Those of reading requests.
    pub fn run(self) -> io::Result<()> {
        let Self { session, unmounter } = self;
        let ran = session.run();
        if ran.is_err() {
            unmounter.unmount()?;
        }
        unmounter.forget();
        ran
    }
}
