//! One worker: draws operations, makes them, and keeps model and log in step.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::caps::Caps;
use super::content::Source;
use super::durlog::LogWriter;
use super::effect::{Effect, Id, Name, Place};
use super::error::{Context, Result, StormError, show};
use super::model::Model;
use super::ops::{OpKind, Profile};
use super::rng::Rng;
use super::{SHARED_DIRS, shared_dir};

/// Id of the worker's own directory.
pub const ROOT: Id = 1;
/// Id of the first shared directory.
pub const FIRST_SHARED: Id = 2;
/// How many files a worker keeps open.
pub const MAX_HANDLES: usize = 6;

/// Which failures of the file system itself end a worker without blame.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub enum Outage {
    /// None: every errno the model does not allow fails the run.
    None,
    /// The server of the mount is killed during the run.
    Kill,
    /// As `Kill`, or the mount stays and answers `EIO` or `EROFS` from some point on.
    Abort,
}

/// What a worker is told to do.
#[derive(Clone, Debug, clap::Args)]
pub struct WorkerArgs {
    /// The mounted directory.
    #[arg(long)]
    pub dir: PathBuf,
    /// Number of this worker.
    #[arg(long)]
    pub worker: u64,
    /// Seed of the run.
    #[arg(long)]
    pub seed: u64,
    /// Steps to make.
    #[arg(long)]
    pub ops: u64,
    /// Bound of live data in bytes.
    #[arg(long)]
    pub max_bytes: u64,
    /// Bound of objects.
    #[arg(long)]
    pub max_files: usize,
    /// Which operations are drawn how often.
    #[arg(long)]
    pub profile: Profile,
    /// What the file system can do, as probed.
    #[arg(long)]
    pub caps: String,
    /// Where the durability log goes.
    #[arg(long)]
    pub log: Option<PathBuf>,
    /// Where the manifest goes.
    #[arg(long)]
    pub manifest: PathBuf,
    /// Which failures of the file system end the worker without blame.
    #[arg(long)]
    pub outage: Outage,
}

/// An open file.
#[derive(Clone)]
pub struct Handle {
    /// Which object.
    pub id: Id,
    /// The open file.
    pub file: Rc<File>,
    /// The path it was opened by, for messages.
    pub path: PathBuf,
}

/// The state of a worker.
pub struct Worker {
    /// What it was told.
    pub args: WorkerArgs,
    /// What the file system can do.
    pub caps: Caps,
    /// What the file system should look like.
    pub model: Model,
    /// Where decisions come from.
    pub rng: Rng,
    /// Where content comes from.
    pub source: Source,
    /// Files that stay open over several steps.
    pub handles: Vec<Handle>,
    /// Whether the process may do what only root may.
    pub is_root: bool,
    /// The directory that gets very many entries.
    pub fat_dir: Option<Id>,
    log: Option<LogWriter>,
    next_id: Id,
    next_stamp: u64,
    step: String,
    counts: BTreeMap<&'static str, u64>,
    tolerated: BTreeMap<String, u64>,
}

/// Runs a worker from start to manifest.
///
/// # Errors
///
/// The first disagreement of model and file system, with step and seed.
pub fn run(args: WorkerArgs) -> Result<()> {
    rustix::process::umask(rustix::fs::Mode::empty());
    let mut worker = Worker::new(args)?;
    match worker.run_steps().and_then(|()| worker.finish()) {
        Err(StormError::Step { source, op, .. }) if matches!(*source, StormError::Gone(_)) => {
            log::info!("p{}: stopped at op {op}: {source}", worker.args.worker);
            Ok(())
        }
        other => other,
    }
}

impl Worker {
    fn new(args: WorkerArgs) -> Result<Self> {
        let caps = Caps::from_text(&args.caps).map_err(StormError::Setup)?;
        let uid = rustix::process::geteuid().as_raw();
        let owner = (uid, rustix::process::getegid().as_raw());
        let mut model = Model::new(owner);
        let mut roots = vec![(ROOT, format!("p{}", args.worker))];
        roots.extend((0..SHARED_DIRS).map(|index| (FIRST_SHARED + index, shared_dir(index))));
        let mut log = match &args.log {
            Some(path) => Some(LogWriter::create(path, args.seed, args.worker, owner)?),
            None => None,
        };
        for (id, name) in roots {
            use std::os::unix::fs::MetadataExt;
            let path = args.dir.join(&name);
            let ino = path.symlink_metadata().call("stat", &path)?.ino();
            if let Some(log) = &mut log {
                log.root(id, &name, ino)?;
            }
            model.add_root(id, name.into_bytes(), ino);
        }
        Ok(Self {
            rng: Rng::new(args.seed, args.worker),
            source: Source::new(args.seed, args.worker),
            caps,
            model,
            handles: Vec::new(),
            is_root: uid == 0,
            fat_dir: None,
            log,
            next_id: 100,
            next_stamp: 1,
            step: "start".to_owned(),
            counts: BTreeMap::new(),
            tolerated: BTreeMap::new(),
            args,
        })
    }

    fn run_steps(&mut self) -> Result<()> {
        for op in 0..self.args.ops {
            let kind = self.draw();
            self.step = format!("{kind:?}");
            *self.counts.entry(kind.word()).or_default() += 1;
            let result = self.run_op(kind);
            self.blame(op, result)?;
        }
        Ok(())
    }

    /// Flushes everything, compares everything, and writes the manifest.
    fn finish(&mut self) -> Result<()> {
        self.step = "finish".to_owned();
        let result = self.write_down();
        self.blame(self.args.ops, result)?;
        log::info!("p{}: {:?}", self.args.worker, self.counts);
        if !self.tolerated.is_empty() {
            log::warn!("p{}: tolerated: {:?}", self.args.worker, self.tolerated);
        }
        Ok(())
    }

    fn write_down(&mut self) -> Result<()> {
        self.close_all();
        let dir = self.args.dir.join(format!("p{}", self.args.worker));
        self.perform(Effect::SyncFs, "syncfs", &dir, &[], || {
            super::sys::sync_fs(&dir)
        })?;
        super::manifest::write_worker(self)?;
        if let Some(log) = &mut self.log {
            log.done()?;
        }
        Ok(())
    }

    /// Says where an error came up, and tells an outage that was asked for from a failure.
    fn blame(&self, op: u64, result: Result<()>) -> Result<()> {
        result.map_err(|error| StormError::Step {
            seed: self.args.seed,
            worker: self.args.worker,
            op,
            step: self.step.clone(),
            source: Box::new(self.judge(error)),
        })
    }

    fn judge(&self, error: StormError) -> StormError {
        let errno = match &error {
            StormError::Call { source, .. } => source.raw_os_error(),
            _ => None,
        };
        // A file system that dies leaves a moment in which cached answers and errors mix; only
        // what is seen while it lives counts against it.
        let is_gone = match self.args.outage {
            Outage::None => false,
            Outage::Kill => is_dead(&self.args.dir, errno),
            Outage::Abort => {
                matches!(errno, Some(libc::EIO | libc::EROFS))
                    || is_dead(&self.args.dir, errno)
                    || refuses_sync(&self.args.dir)
            }
        };
        if is_gone {
            let errno = errno.unwrap_or(libc::ENOTCONN);
            log::debug!("p{}: gone at: {error}", self.args.worker);
            return StormError::Gone(io::Error::from_raw_os_error(errno));
        }
        error
    }

    /// Notes in the messages what the step is about.
    pub fn describe(&mut self, what: impl std::fmt::Display, path: &Path) {
        self.step = format!("{what} @ {}", show(path));
    }

    /// Returns an id that was never used.
    pub fn new_id(&mut self) -> Id {
        self.next_id += 1;
        self.next_id
    }

    /// Returns a stamp that was never used.
    pub fn new_stamp(&mut self) -> u64 {
        self.next_stamp += 1;
        // The first ones are for attribute values that several files have in common.
        self.next_stamp + 100
    }

    /// Returns the path of an object.
    pub fn path(&self, id: Id) -> PathBuf {
        self.args.dir.join(self.model.path(id).unwrap_or_default())
    }

    /// Returns the path of an entry.
    pub fn place_path(&self, at: &Place) -> PathBuf {
        self.args
            .dir
            .join(self.model.place_path(at).unwrap_or_default())
    }

    /// Returns what every name of this worker starts with in a shared directory.
    pub fn prefix(&self) -> Name {
        format!("p{}_", self.args.worker).into_bytes()
    }

    /// Makes one change: log, call, model, log.
    ///
    /// An errno in `allowed` means that nothing has changed, and gives `None`.
    pub fn perform<T>(
        &mut self,
        effect: Effect,
        call: &'static str,
        path: &Path,
        allowed: &[i32],
        run: impl FnOnce() -> io::Result<T>,
    ) -> Result<Option<T>> {
        self.begin(&effect, path)?;
        match run() {
            Ok(value) => {
                self.end(&effect, 0, false)?;
                Ok(Some(value))
            }
            Err(error) if is_one_of(&error, allowed) => {
                self.abandon(call, &error)?;
                Ok(None)
            }
            Err(error) => Err(error).call(call, path),
        }
    }

    /// As [`Worker::perform`] for a creation; `run` returns the inode number.
    pub fn perform_new(
        &mut self,
        effect: Effect,
        call: &'static str,
        path: &Path,
        run: impl FnOnce() -> io::Result<u64>,
    ) -> Result<bool> {
        self.begin(&effect, path)?;
        match run() {
            Ok(ino) => {
                self.end(&effect, ino, false)?;
                Ok(true)
            }
            Err(error) if is_one_of(&error, &[libc::ENOSPC]) => {
                self.abandon(call, &error)?;
                if matches!(effect, Effect::Create { .. }) {
                    self.expect_absent(path)?;
                }
                Ok(false)
            }
            Err(error) => Err(error).call(call, path),
        }
    }

    /// Logs what is about to happen.
    pub fn begin(&mut self, effect: &Effect, path: &Path) -> Result<()> {
        self.describe(effect, path);
        self.log.as_mut().map_or(Ok(()), |log| log.begin(effect))
    }

    /// Logs and applies what has happened; `changed` when it is not what was begun.
    pub fn end(&mut self, effect: &Effect, ino: u64, changed: bool) -> Result<()> {
        self.model.apply(effect).map_err(StormError::Setup)?;
        if let Effect::Create { id, .. } | Effect::Tmpfile { id, .. } = effect {
            self.model.set_ino(*id, ino);
        }
        self.log
            .as_mut()
            .map_or(Ok(()), |log| log.end(ino, changed.then_some(effect)))
    }

    /// Logs that what was begun has failed in a way that is allowed.
    pub fn abandon(&mut self, call: &str, error: &io::Error) -> Result<()> {
        let errno = error.raw_os_error().unwrap_or(0);
        *self
            .tolerated
            .entry(format!("{call}: {error}"))
            .or_default() += 1;
        self.log.as_mut().map_or(Ok(()), |log| log.abandon(errno))
    }

    /// Fails when something has the name `path`.
    pub fn expect_absent(&self, path: &Path) -> Result<()> {
        match path.symlink_metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error).call("stat", path),
            Ok(_) => Err(StormError::mismatch(path, "entry", "absent", "present")),
        }
    }

    /// Forgets an object if it has neither entries nor open files.
    pub fn forget_if_unused(&mut self, id: Id) {
        if !self.handles.iter().any(|handle| handle.id == id) {
            self.model.forget(id);
        }
    }

    /// Closes one of the open files.
    pub fn close(&mut self, index: usize) {
        let handle = self.handles.swap_remove(index);
        let id = handle.id;
        drop(handle);
        self.forget_if_unused(id);
    }

    fn close_all(&mut self) {
        while !self.handles.is_empty() {
            self.close(0);
        }
    }

    fn draw(&mut self) -> OpKind {
        if self.model.used() > self.args.max_bytes {
            return OpKind::Shrink;
        }
        if self.model.linked.ids().len() > self.args.max_files {
            return OpKind::RemoveBurst;
        }
        self.args.profile.draw(&mut self.rng, &self.caps)
    }
}

fn is_one_of(error: &io::Error, allowed: &[i32]) -> bool {
    error
        .raw_os_error()
        .is_some_and(|errno| allowed.contains(&errno))
}

/// Tells whether the file system has given up on writing.
fn refuses_sync(dir: &Path) -> bool {
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.is_err_and(|error| is_one_of(&error, &[libc::EIO, libc::EROFS, libc::ENOTCONN]))
}

/// Tells whether the mount has lost its server, with some patience where `errno` hints at it.
fn is_dead(dir: &Path, errno: Option<i32>) -> bool {
    let hint = matches!(
        errno,
        Some(libc::ENOTCONN | libc::ECONNABORTED | libc::EIO | libc::ESHUTDOWN | libc::ENODEV)
    );
    let start = Instant::now();
    loop {
        let dead = match rustix::fs::statvfs(dir) {
            Ok(_) => false,
            Err(error) => matches!(
                error.raw_os_error(),
                libc::ENOTCONN | libc::ECONNABORTED | libc::ESHUTDOWN
            ),
        };
        // ENOTCONN has no other source than a dead connection, even if the directory has been
        // unmounted or mounted anew since.
        let sure = matches!(errno, Some(libc::ENOTCONN | libc::ECONNABORTED));
        if dead || sure {
            return true;
        }
        if !hint || start.elapsed() > Duration::from_secs(3) {
            return false;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
