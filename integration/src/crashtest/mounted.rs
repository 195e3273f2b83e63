//! Runs a script or a command on a real mount of a copy of the image, recorded.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use blockstack::DynDevice;
use blockstack::backend::mem::{Image, MemDisk};
use blockstack::log_writes::{Entry, Order, RecordDisk, Recorder};
use fs::fuse::{FuseConfig, Server};
use fs::{Fs, MountOptions};
use rustix::fs::{
    CWD, FallocateFlags, FileType, Mode, OFlags, RenameFlags, XattrFlags, fallocate, mknodat,
    removexattr, renameat_with, setxattr,
};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use super::Error;
use super::history::{PAGE_CACHE, UNKNOWN};
use super::model::{stamps, xattr_value};
use super::script::{Falloc, How, Op};
use super::walk::WORK;

type Log = Recorder<Vec<Entry>>;

/// Mounts a copy of `origin`, lets `work` do something in the directory of the workload, and
/// unmounts, all recorded.
fn record(
    origin: &Image,
    options: MountOptions,
    first_mark: &str,
    work: impl FnOnce(&Path, &Arc<Log>) -> Result<(), Error>,
) -> Result<Vec<Entry>, Error> {
    let place = tempfile::Builder::new()
        .prefix("crashtest.")
        .tempdir()
        .map_err(Error::Scratch)?;
    let recorder = Arc::new(Log::new(Order::Completion, Vec::new()));
    recorder.mark(first_mark);
    let dev: DynDevice = RecordDisk::new(
        MemDisk::from_image("work", origin.clone()),
        recorder.clone(),
    );
    let fs = Fs::mount(dev, options)?;
    let config = FuseConfig {
        mountpoint: place.path().to_owned(),
        fsname: "crashtest".to_owned(),
        ..FuseConfig::default()
    };
    let server = match Server::mount(fs.clone(), &config) {
        Ok(server) => server,
        Err(error) => {
            fs.unmount()?;
            return Err(Error::Fuse(error));
        }
    };
    let unmounter = server.unmounter();
    let served = std::thread::scope(|scope| {
        let serving = scope.spawn(move || server.run());
        let worked = work(&place.path().join(WORK), &recorder);
        let unmounted = unmounter.unmount().map_err(Error::Fuse);
        let served = match serving.join() {
            Ok(served) => served.map_err(Error::Fuse),
            Err(_panic) => Err(Error::Fuse(io::Error::other("the server panicked"))),
        };
        worked.and(unmounted).and(served)
    });
    let unmounted = fs.unmount();
    drop(fs);
    served?;
    unmounted?;
    recorder.mark("unmounted");
    Ok(recorder.finish())
}

/// Runs a script by system calls, in another process: one that touches a mapping of a file system
/// it serves itself may wait for ever. `program` is the one that [`apply_lines`] is called by, with
/// [`APPLY`] and a directory behind the word of the command.
///
/// # Errors
/// Where nothing can be mounted. Operations that fail are in the log.
pub fn record_script(
    origin: &Image,
    options: MountOptions,
    ops: &[Op],
    program: &Path,
) -> Result<Vec<Entry>, Error> {
    record(origin, options, PAGE_CACHE, |dir, recorder| {
        let failed = |why: String| Error::Command {
            command: program.display().to_string(),
            why,
        };
        let io_failed = |error: io::Error| failed(error.to_string());
        let mut child = Command::new(program)
            .args([super::command::WORD, APPLY])
            .arg(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(io_failed)?;
        let (to, from) = (child.stdin.take(), child.stdout.take());
        let (Some(mut to), Some(from)) = (to, from) else {
            return Err(failed("it has no pipes".to_owned()));
        };
        let mut answers = BufReader::new(from).lines();
        for (index, op) in ops.iter().enumerate() {
            let number = index + 1;
            recorder.mark(&format!("B {number} {op}"));
            let sent = to.write_all(format!("{number} {op}\n").as_bytes());
            sent.map_err(io_failed)?;
            let answer = answers
                .next()
                .unwrap_or(Err(io::ErrorKind::UnexpectedEof.into()));
            let answer = answer.map_err(io_failed)?;
            let (letter, error) = answer.split_once(' ').unwrap_or((&answer, ""));
            let mark = format!("{letter} {number} {error}");
            recorder.mark(mark.trim_end());
        }
        drop(to);
        child.wait().map(drop).map_err(io_failed)
    })
}

/// The word that asks a program for [`apply_lines`].
pub const APPLY: &str = "--apply";

/// Does operations that come line by line, `NUMBER OPERATION`, and answers each with `E`, or `X` and
/// why not.
///
/// # Errors
/// Where nobody listens, or a line is none.
pub fn apply_lines(dir: &Path, from: impl BufRead, mut to: impl Write) -> io::Result<()> {
    rustix::process::umask(Mode::empty());
    for line in from.lines() {
        let line = line?;
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let (number, op) = line.split_once(' ').ok_or_else(invalid)?;
        let number = number.parse().ok().ok_or_else(invalid)?;
        let op: Op = op.parse().ok().ok_or_else(invalid)?;
        match apply(dir, &op, number) {
            Ok(()) => writeln!(to, "E")?,
            Err(error) => writeln!(to, "X {}", describe(&error))?,
        }
        to.flush()?;
    }
    Ok(())
}

/// Errors that the judge must know have the words of the file system.
fn describe(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOSPC) => fs::FsError::NoSpace.to_string(),
        Some(libc::EOPNOTSUPP) => fs::FsError::NotSupported.to_string(),
        _ => error.to_string(),
    }
}

/// Runs a command with the shell, in the directory of the workload. It may write lines to the file
/// that `CRASHTEST_MARKS` names; they stand in the log.
///
/// # Errors
/// Where nothing can be mounted, or the command fails.
pub fn record_command(
    origin: &Image,
    options: MountOptions,
    command: &str,
) -> Result<Vec<Entry>, Error> {
    record(origin, options, UNKNOWN, |dir, recorder| {
        let failed = |why: String| Error::Command {
            command: command.to_owned(),
            why,
        };
        let place = tempfile::tempdir().map_err(Error::Scratch)?;
        let marks = place.path().join("marks");
        let mode = Mode::RUSR | Mode::WUSR;
        mknodat(CWD, &marks, FileType::Fifo, mode, 0).map_err(|errno| failed(errno.to_string()))?;
        // Open for both, so that the lines do not end with the first who writes some.
        let pipe = OpenOptions::new().read(true).write(true).open(&marks);
        let mut pipe = pipe.map_err(|error| failed(error.to_string()))?;
        let lines = BufReader::new(
            pipe.try_clone()
                .map_err(|error| failed(error.to_string()))?,
        );
        let status = std::thread::scope(|scope| {
            scope.spawn(|| {
                for line in lines
                    .lines()
                    .map_while(Result::ok)
                    .take_while(|line| line != END)
                {
                    recorder.mark(&format!("M {line}"));
                }
            });
            let status = Command::new("sh")
                .arg("-c")
                .arg(command)
                .current_dir(dir)
                .env("CRASHTEST_MARKS", &marks)
                .env("CRASHTEST_DIR", dir)
                .status();
            pipe.write_all(format!("{END}\n").as_bytes()).and(status)
        });
        match status {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(failed(status.to_string())),
            Err(error) => Err(failed(error.to_string())),
        }
    })
}

/// Ends the marks of a command.
const END: &str = "\u{4}end of the marks";

fn open(path: &Path, flags: OFlags) -> io::Result<File> {
    let file = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC | flags, Mode::empty())?;
    Ok(File::from(file))
}

fn apply(dir: &Path, op: &Op, number: usize) -> io::Result<()> {
    let at = |path: &str| -> PathBuf { dir.join(path) };
    match op {
        Op::Mkdir(path) => std::fs::DirBuilder::new().mode(0o755).create(at(path)),
        Op::Create(path) => {
            let mut options = OpenOptions::new();
            options.write(true).create_new(true).mode(0o644);
            options.open(at(path)).map(drop)
        }
        Op::Symlink { target, path } => std::os::unix::fs::symlink(target, at(path)),
        Op::Link { from, to } => std::fs::hard_link(at(from), at(to)),
        Op::Unlink(path) => std::fs::remove_file(at(path)),
        Op::Rmdir(path) => std::fs::remove_dir(at(path)),
        Op::Rename { from, to } => std::fs::rename(at(from), at(to)),
        Op::Exchange { from, to } => Ok(renameat_with(
            CWD,
            at(from),
            CWD,
            at(to),
            RenameFlags::EXCHANGE,
        )?),
        Op::Write {
            path,
            at: start,
            len,
            how,
        } => {
            let bytes = stamps(number, *start, *len);
            match how {
                How::Plain => open(&at(path), OFlags::empty())?.write_all_at(&bytes, *start),
                How::Direct => open(&at(path), OFlags::DIRECT)?.write_all_at(&bytes, *start),
                How::Sync => open(&at(path), OFlags::SYNC)?.write_all_at(&bytes, *start),
                How::Mapped => write_mapped(&at(path), *start, &bytes),
            }
        }
        Op::Truncate { path, size } => open(&at(path), OFlags::empty())?.set_len(*size),
        Op::Falloc {
            path,
            at: start,
            len,
            mode,
        } => {
            let keep = FallocateFlags::KEEP_SIZE;
            let mode = match mode {
                Falloc::Plain => FallocateFlags::empty(),
                Falloc::KeepSize => keep,
                Falloc::Punch => FallocateFlags::PUNCH_HOLE | keep,
                Falloc::Zero => FallocateFlags::ZERO_RANGE,
                Falloc::ZeroKeepSize => FallocateFlags::ZERO_RANGE | keep,
            };
            Ok(fallocate(
                open(&at(path), OFlags::empty())?,
                mode,
                *start,
                *len,
            )?)
        }
        Op::SetXattr { path, name, len } => {
            let value = xattr_value(number, *len);
            Ok(setxattr(at(path), name, &value, XattrFlags::empty())?)
        }
        Op::RemoveXattr { path, name } => Ok(removexattr(at(path), name)?),
        Op::Chmod { path, mode } => {
            std::fs::set_permissions(at(path), Permissions::from_mode((*mode).into()))
        }
        Op::Fsync(path) => File::open(at(path))?.sync_all(),
        Op::Fdatasync(path) => File::open(at(path))?.sync_data(),
        Op::Sync => sync_all(dir),
    }
}

/// `sync` is no promise over FUSE: it does not reach the server.
fn sync_all(dir: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sync_all(&entry.path())?;
        } else if kind.is_file() {
            File::open(entry.path())?.sync_all()?;
        }
    }
    File::open(dir)?.sync_all()
}

fn write_mapped(path: &Path, at: u64, bytes: &[u8]) -> io::Result<()> {
    let file = open(path, OFlags::empty())?;
    let end = at as usize + bytes.len();
    if bytes.is_empty() || file.metadata()?.len() < end as u64 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let from = FileOffset::new(file, 0);
    let map: MmapRegion<()> =
        MmapRegion::from_file(from, end).map_err(|error| io::Error::other(error.to_string()))?;
    let part = map.get_slice(at as usize, bytes.len());
    let part = part.map_err(|error| io::Error::other(error.to_string()))?;
    part.copy_from(bytes);
    Ok(())
}
