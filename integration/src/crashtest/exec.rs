//! Runs a script on a file system in this process, and records what it writes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::channel;

use blockstack::DynDevice;
use blockstack::backend::mem::{Image, MemDisk};
use blockstack::log_writes::{Entry, Order, RecordDisk, Recorder};
use fs::data::Origin;
use fs::ops::space::FallocMode;
use fs::ops::{Caller, NewNode, RenameFlags, SetAttr};
use fs::xattr::XattrMode;
use fs::{Fs, FsError, FsResult, MountOptions};

use super::Error;
use super::model::{stamps, xattr_value};
use super::script::{Falloc, How, Op};
use super::walk::WORK;

const ROOT: u32 = 2;
const ME: Caller = Caller {
    uid: 0,
    gid: 0,
    thread: 0,
    keeps_times: false,
};
const FILE: NewNode<'static> = NewNode::Node {
    mode: 0o100_644,
    rdev: 0,
};
const DIR: NewNode<'static> = NewNode::Directory { mode: 0o755 };

/// Options of all mounts here: no timer commits, so that a seed gives the same again.
#[must_use]
pub fn mount_options() -> MountOptions {
    MountOptions {
        commit_secs: 3600,
        cache_bytes: 4 << 20,
        ..MountOptions::default()
    }
}

struct Runner<'a> {
    fs: &'a Arc<Fs>,
    /// References that the kernel would hold.
    refs: BTreeMap<u32, u64>,
}

impl Runner<'_> {
    fn find(&mut self, path: &str) -> FsResult<u32> {
        let mut ino = ROOT;
        let names = path.split('/').filter(|name| *name != ".");
        for name in std::iter::once(WORK).chain(names) {
            ino = match self.fs.lookup(ino, name.as_bytes())? {
                Some(attr) => attr.ino,
                None => return Err(FsError::NotFound),
            };
            self.hold(ino);
        }
        Ok(ino)
    }

    fn hold(&mut self, ino: u32) {
        *self.refs.entry(ino).or_insert(0) += 1;
    }

    fn release(&mut self) {
        for (ino, count) in std::mem::take(&mut self.refs) {
            self.fs.forget(ino, count);
        }
    }

    fn place<'p>(&mut self, path: &'p str) -> FsResult<(u32, &'p [u8])> {
        match path.rsplit_once('/') {
            Some((dir, name)) => Ok((self.find(dir)?, name.as_bytes())),
            None => Ok((self.find(".")?, path.as_bytes())),
        }
    }

    fn create(&mut self, path: &str, node: NewNode<'_>) -> FsResult {
        let (dir, name) = self.place(path)?;
        let attr = self.fs.create(dir, name, node, 0, &ME)?;
        self.hold(attr.ino);
        Ok(())
    }

    fn rename(&mut self, from: &str, to: &str, flags: RenameFlags) -> FsResult {
        let (old_dir, old_name) = self.place(from)?;
        let (new_dir, new_name) = self.place(to)?;
        self.fs
            .rename(old_dir, old_name, new_dir, new_name, flags, &ME)
    }

    fn write(&mut self, ino: u32, at: u64, bytes: &[u8]) -> FsResult {
        let (sender, receiver) = channel();
        let inode = self.fs.iget(ino)?;
        let reply = Box::new(move |res| {
            sender.send(res).ok();
        });
        let origin = Origin::Direct { kill_priv: false };
        self.fs.write(&inode, at, bytes, origin, &ME, reply);
        drop(inode);
        match receiver.recv() {
            Ok(Ok(written)) if written as usize == bytes.len() => Ok(()),
            Ok(Err(error)) => Err(error),
            _ => Err(FsError::Invalid),
        }
    }

    fn apply(&mut self, op: &Op, number: usize) -> FsResult {
        match op {
            Op::Mkdir(path) => self.create(path, DIR),
            Op::Create(path) => self.create(path, FILE),
            Op::Symlink { target, path } => {
                let target = target.as_bytes();
                self.create(path, NewNode::Symlink { target })
            }
            Op::Link { from, to } => {
                let ino = self.find(from)?;
                let (dir, name) = self.place(to)?;
                self.fs.link(ino, dir, name)?;
                self.hold(ino);
                Ok(())
            }
            Op::Unlink(path) => {
                let (dir, name) = self.place(path)?;
                self.fs.unlink(dir, name, &ME)
            }
            Op::Rmdir(path) => {
                let (dir, name) = self.place(path)?;
                self.fs.rmdir(dir, name, &ME)
            }
            Op::Rename { from, to } => self.rename(from, to, RenameFlags::empty()),
            Op::Exchange { from, to } => self.rename(from, to, RenameFlags::EXCHANGE),
            Op::Write { path, at, len, how } => {
                if *how == How::Mapped {
                    return Err(FsError::NotSupported);
                }
                let ino = self.find(path)?;
                // The parts of what one request carries.
                let bytes = stamps(number, *at, *len);
                for (index, part) in bytes.chunks(1 << 20).enumerate() {
                    self.write(ino, at + (index << 20) as u64, part)?;
                }
                if *how == How::Sync {
                    return self.fs.fsync(&*self.fs.iget(ino)?, false);
                }
                Ok(())
            }
            Op::Truncate { path, size } => {
                let size = Some(*size);
                let ino = self.find(path)?;
                let set = SetAttr {
                    size,
                    ..SetAttr::default()
                };
                self.fs.setattr(ino, &set, &ME).map(drop)
            }
            Op::Falloc {
                path,
                at,
                len,
                mode,
            } => {
                let keep = FallocMode::KEEP_SIZE;
                let mode = match mode {
                    Falloc::Plain => FallocMode::empty(),
                    Falloc::KeepSize => keep,
                    Falloc::Punch => FallocMode::PUNCH_HOLE | keep,
                    Falloc::Zero => FallocMode::ZERO_RANGE,
                    Falloc::ZeroKeepSize => FallocMode::ZERO_RANGE | keep,
                };
                let ino = self.find(path)?;
                self.fs.fallocate(&self.fs.iget(ino)?, mode, *at, *len, &ME)
            }
            Op::SetXattr { path, name, len } => {
                let ino = self.find(path)?;
                let value = xattr_value(number, *len);
                self.fs
                    .setxattr(ino, name.as_bytes(), Some(&value), XattrMode::Any)
            }
            Op::RemoveXattr { path, name } => {
                let ino = self.find(path)?;
                self.fs.setxattr(ino, name.as_bytes(), None, XattrMode::Any)
            }
            Op::Chmod { path, mode } => {
                let mode = Some(*mode);
                let ino = self.find(path)?;
                let set = SetAttr {
                    mode,
                    ..SetAttr::default()
                };
                self.fs.setattr(ino, &set, &ME).map(drop)
            }
            Op::Fsync(path) | Op::Fdatasync(path) => {
                let ino = self.find(path)?;
                let inode = self.fs.iget(ino)?;
                self.fs.fsync(&inode, matches!(op, Op::Fdatasync(_)))
            }
            Op::Sync => self.fs.sync(),
        }
    }
}

/// A run, recorded.
pub struct Recording {
    /// The log, from the mount to the end of the unmount.
    pub entries: Vec<Entry>,
    /// The disk at the end.
    pub end: Image,
}

/// Mounts a copy of `origin`, runs `ops`, and unmounts, all recorded. With `makes_dir` the directory
/// of the workload is made first.
///
/// # Errors
/// Where it cannot be mounted or unmounted. Operations that fail are in the log.
pub fn record(
    origin: &Image,
    ops: &[Op],
    options: MountOptions,
    makes_dir: bool,
) -> Result<Recording, Error> {
    let disk = MemDisk::from_image("work", origin.clone());
    let recorder = Arc::new(Recorder::new(Order::Completion, Vec::new()));
    let dev: DynDevice = RecordDisk::new(disk.clone(), recorder.clone());
    let fs = Fs::mount(dev, options)?;
    let mut runner = Runner {
        fs: &fs,
        refs: BTreeMap::new(),
    };
    let made = if makes_dir {
        make_work_dir(&fs)
    } else {
        Ok(())
    };
    for (index, op) in ops.iter().enumerate() {
        let number = index + 1;
        recorder.mark(&format!("B {number} {op}"));
        match runner.apply(op, number) {
            Ok(()) => recorder.mark(&format!("E {number}")),
            Err(error) => recorder.mark(&format!("X {number} {error}")),
        }
        // The kernel keeps what it knows until there is reason not to.
        let loses = matches!(op, Op::Unlink(_) | Op::Rmdir(_) | Op::Rename { .. });
        if loses || number % 5 == 0 {
            runner.release();
        }
    }
    runner.release();
    let unmounted = fs.unmount();
    drop(fs);
    made?;
    unmounted.map_err(Error::Fs)?;
    recorder.mark("unmounted");
    Ok(Recording {
        entries: recorder.finish(),
        end: disk.image(),
    })
}

fn make_work_dir(fs: &Arc<Fs>) -> Result<(), Error> {
    match fs.create(ROOT, WORK.as_bytes(), DIR, 0, &ME) {
        Ok(attr) => {
            fs.forget(attr.ino, 1);
            Ok(())
        }
        Err(FsError::Exists) => Err(Error::WorkDir),
        Err(error) => Err(Error::Fs(error)),
    }
}
