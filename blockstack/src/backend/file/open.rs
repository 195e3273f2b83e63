//! Opening an image or device: kinds, locks, abilities.
//!
//! # Locks against others
//!
//! - `flock`, exclusive or (read-only) shared: our own mounts, and programs that keep to it.
//! - Open-file-description locks on the bytes that qemu uses (100 and up: what a process does; 200
//!   and up: what it does not let others do; qemu's `block/file-posix.c`), so that a running
//!   virtual machine and a mount exclude each other.
//! - `O_EXCL` on block devices: the kernel's own mounts and device-mapper.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use rustix::fs::{AtFlags, FlockOperation, StatxFlags};

use super::Files;
use super::request::Caps;
use crate::device::Limits;
use crate::units::SectorCount;

/// Who does the system calls.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Engine {
    /// An `io_uring` where the host allows it, else threads.
    #[default]
    Auto,
    /// An `io_uring` or nothing.
    Uring,
    /// A few threads.
    Threads,
}

/// How an image is opened.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Refuses writes, and shares the image with other readers.
    pub read_only: bool,
    /// Goes past the host's page cache where the host allows it.
    pub direct: bool,
    /// Who does the system calls.
    pub engine: Engine,
    /// The most calls in flight in an `io_uring`.
    pub queue_depth: u32,
    /// The number of threads without.
    pub threads: u32,
    /// A thread that only waits for its bio does the calls itself, where that is the same.
    pub inline: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            direct: true,
            engine: Engine::Auto,
            queue_depth: 128,
            threads: 4,
            inline: true,
        }
    }
}

/// Why an image could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("{}: {kind}", path.display())]
pub struct OpenError {
    /// What is wrong.
    pub kind: OpenErrorKind,
    /// With what.
    pub path: PathBuf,
    /// The system's word on it.
    #[source]
    pub source: Option<io::Error>,
}

/// What can be wrong with an image.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum OpenErrorKind {
    /// There is no such file.
    #[error("no such file or device")]
    NotFound,
    /// The user may not open it.
    #[error("permission denied")]
    PermissionDenied,
    /// Another mount, virtual machine or the kernel has it.
    #[error("already in use by another mount or program")]
    InUse,
    /// It is a directory.
    #[error("is a directory, not an image or block device")]
    IsDirectory,
    /// It is a pipe, socket or character device.
    #[error("is neither a regular file nor a block device")]
    NotFileOrDevice,
    /// It holds less than one sector.
    #[error("is empty")]
    Empty,
    /// It, or the file system it is on, cannot be written; a read-only open may work.
    #[error("is read-only")]
    ReadOnly,
    /// Anything else that the system reports.
    #[error("cannot be opened")]
    System,
}

impl OpenError {
    pub(super) fn new(kind: OpenErrorKind, path: &Path, source: Option<io::Error>) -> Self {
        Self {
            kind,
            path: path.to_owned(),
            source,
        }
    }

    fn system(path: &Path, error: io::Error) -> Self {
        let kind = match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENXIO | libc::ENODEV | libc::ENOTDIR) => {
                OpenErrorKind::NotFound
            }
            Some(libc::EACCES | libc::EPERM) => OpenErrorKind::PermissionDenied,
            Some(libc::EBUSY | libc::ETXTBSY) => OpenErrorKind::InUse,
            Some(libc::EISDIR) => OpenErrorKind::IsDirectory,
            Some(libc::EROFS) => OpenErrorKind::ReadOnly,
            _ => OpenErrorKind::System,
        };
        Self::new(kind, path, Some(error))
    }
}

pub(super) struct Opened {
    pub(super) files: Files,
    pub(super) capacity: SectorCount,
    pub(super) limits: Limits,
}

pub(super) fn open(path: &Path, options: OpenOptions) -> Result<Opened, OpenError> {
    let system = |error| OpenError::system(path, error);
    let refuse = |kind| OpenError::new(kind, path, None);
    // Before `open`, which would wait for a writer of a pipe and run the side effects of a tape.
    let metadata = std::fs::metadata(path).map_err(system)?;
    let kind = metadata.file_type();
    if kind.is_dir() {
        return Err(refuse(OpenErrorKind::IsDirectory));
    }
    if !kind.is_file() && !kind.is_block_device() {
        return Err(refuse(OpenErrorKind::NotFileOrDevice));
    }
    let is_device = kind.is_block_device();
    let exclusive = if is_device && !options.read_only {
        libc::O_EXCL
    } else {
        0
    };
    let cached = File::options()
        .read(true)
        .write(!options.read_only)
        .custom_flags(libc::O_CLOEXEC | exclusive)
        .open(path)
        .map_err(system)?;
    // What was looked at may have been replaced before it was opened.
    let metadata = cached.metadata().map_err(system)?;
    if metadata.file_type() != kind {
        return Err(refuse(OpenErrorKind::NotFileOrDevice));
    }
    lock(&cached, path, options.read_only, is_device)?;
    let bytes = if is_device {
        rustix::fs::seek(&cached, rustix::fs::SeekFrom::End(0))
            .map_err(|errno| system(errno.into()))?
    } else {
        metadata.len()
    };
    let capacity = SectorCount::new(bytes >> crate::units::SECTOR_SHIFT);
    if capacity == SectorCount::ZERO {
        return Err(refuse(OpenErrorKind::Empty));
    }
    let name = path.to_string_lossy().into_owned();
    let direct = if options.direct {
        reopen_direct(&cached, &name, options.read_only)
    } else {
        None
    };
    let align = direct.as_ref().map_or(Align::FINEST, dio_align);
    let geometry = Geometry::of(&cached, &metadata, is_device);
    let caps = Caps {
        read_only: options.read_only,
        offset_align: align.offset,
        memory_align: align.memory,
        range_align: if is_device {
            block_size_of_device(&cached).unwrap_or(512) as u64
        } else {
            512
        },
        direct: AtomicBool::new(direct.is_some()),
        punch: AtomicBool::new(!options.read_only && can_punch(&cached, is_device, bytes)),
        zero_range: AtomicBool::new(!options.read_only),
        dsync: AtomicBool::new(true),
    };
    let limits = Limits {
        // What is finer than the host's block goes through its page cache, so it can be offered.
        logical_block_size: 512,
        physical_block_size: geometry.physical.max(align.offset as u32),
        max_sectors: 1 << 14,
        optimal_io_size: geometry.optimal,
        discard_granularity: geometry.discard_granularity,
        volatile_cache: true,
        fua: true,
        read_only: options.read_only,
        ..Limits::UNLIMITED
    };
    Ok(Opened {
        files: Files {
            name,
            direct,
            cached: cached.into(),
            caps,
        },
        capacity,
        limits,
    })
}

/// A second descriptor of the very same file, with `O_DIRECT`.
fn reopen_direct(cached: &File, name: &str, read_only: bool) -> Option<OwnedFd> {
    let link = format!("/proc/self/fd/{}", cached.as_raw_fd());
    let opened = File::options()
        .read(true)
        .write(!read_only)
        .custom_flags(libc::O_CLOEXEC | libc::O_DIRECT)
        .open(link);
    match opened {
        Ok(file) => Some(file.into()),
        Err(error) => {
            log::warn!("{name}: no direct I/O ({error}), goes through the host's page cache");
            None
        }
    }
}

struct Align {
    offset: usize,
    memory: usize,
}

impl Align {
    const FINEST: Self = Self {
        offset: 512,
        memory: 512,
    };
}

/// What direct I/O asks of offsets and addresses.
fn dio_align(direct: &OwnedFd) -> Align {
    let flags = AtFlags::EMPTY_PATH;
    if let Ok(stat) = rustix::fs::statx(direct, "", flags, StatxFlags::DIOALIGN)
        && stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0
        && stat.stx_dio_offset_align > 0
    {
        return Align {
            offset: (stat.stx_dio_offset_align as usize).max(512),
            memory: (stat.stx_dio_mem_align as usize).max(1),
        };
    }
    // Kernels before 6.1 do not tell. 512 is right nearly everywhere; where it is not, the first
    // refusal turns direct I/O off.
    match block_size_of_device(direct) {
        Some(size) => Align {
            offset: size,
            memory: 512,
        },
        None => Align::FINEST,
    }
}

/// The logical block size of a block device; `None` for a file.
fn block_size_of_device(fd: &impl AsFd) -> Option<usize> {
    rustix::fs::ioctl_blksszget(fd)
        .ok()
        .map(|size| (size as usize).max(512))
}

struct Geometry {
    physical: u32,
    optimal: u32,
    discard_granularity: u32,
}

impl Geometry {
    fn of(file: &File, metadata: &std::fs::Metadata, is_device: bool) -> Self {
        if !is_device {
            let block = u32::try_from(metadata.blksize()).unwrap_or(4096);
            let block = if block.is_power_of_two() {
                block.clamp(512, 65536)
            } else {
                4096
            };
            return Self {
                physical: 512,
                optimal: 0,
                discard_granularity: block,
            };
        }
        let physical = rustix::fs::ioctl_blkpbszget(file).unwrap_or(512);
        let queue = queue_directory(metadata);
        let optimal = read_number(&queue.join("optimal_io_size")).unwrap_or(0);
        let granularity = read_number(&queue.join("discard_granularity")).unwrap_or(0);
        Self {
            physical: physical.clamp(512, 65536),
            optimal: u32::try_from(optimal).unwrap_or(0),
            discard_granularity: u32::try_from(granularity).unwrap_or(0).max(512),
        }
    }
}

/// Where the kernel tells of a device's queue, also of the one behind a partition.
fn queue_directory(metadata: &std::fs::Metadata) -> PathBuf {
    let rdev = metadata.rdev();
    let device = format!(
        "/sys/dev/block/{}:{}",
        rustix::fs::major(rdev),
        rustix::fs::minor(rdev)
    );
    let own = Path::new(&device).join("queue");
    if own.exists() {
        own
    } else {
        Path::new(&device).join("../queue")
    }
}

fn read_number(path: &Path) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Whether holes can be punched. A file is asked by punching beyond its end, where nothing is.
fn can_punch(file: &File, is_device: bool, bytes: u64) -> bool {
    if is_device {
        let Ok(metadata) = file.metadata() else {
            return false;
        };
        let max = read_number(&queue_directory(&metadata).join("discard_max_bytes"));
        return max.is_some_and(|max| max > 0);
    }
    use rustix::fs::FallocateFlags;
    let beyond = bytes.next_multiple_of(1 << 20);
    rustix::fs::fallocate(
        file,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        beyond,
        4096,
    )
    .is_ok()
}

/// How long others, who only look at a device when it appears, are given to let go of it.
const PROBE_TRIES: u32 = 20;
const PROBE_PAUSE: Duration = Duration::from_millis(25);

fn lock(file: &File, path: &Path, read_only: bool, is_device: bool) -> Result<(), OpenError> {
    let in_use = |error: io::Error| OpenError::new(OpenErrorKind::InUse, path, Some(error));
    let operation = if read_only {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    let mut tries = if is_device { PROBE_TRIES } else { 1 };
    loop {
        match rustix::fs::flock(file, operation) {
            Ok(()) => break,
            Err(rustix::io::Errno::WOULDBLOCK) if tries > 1 => {
                tries -= 1;
                std::thread::sleep(PROBE_PAUSE);
            }
            Err(errno @ rustix::io::Errno::WOULDBLOCK) => return Err(in_use(errno.into())),
            Err(errno @ rustix::io::Errno::INTR) => log::trace!("flock: {errno}"),
            Err(errno) => {
                log::warn!("{}: cannot be locked: {errno}", path.display());
                break;
            }
        }
    }
    if !is_device {
        if read_only && has_qemu_writer(file) {
            return Err(OpenError::new(OpenErrorKind::InUse, path, None));
        }
        for range in QemuRange::of(read_only) {
            match range.take(file) {
                Ok(()) => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                    return Err(in_use(error));
                }
                Err(error) => log::debug!("{}: byte lock: {error}", path.display()),
            }
        }
    }
    Ok(())
}

/// Bytes of an image that qemu locks to tell what it does, and what it does not share.
struct QemuRange {
    start: i64,
    len: i64,
    kind: libc::c_int,
}

impl QemuRange {
    const DOES: i64 = 100;
    const UNSHARED: i64 = 200;
    const READ: i64 = 0;
    const WRITE: i64 = 1;
    const RESIZE: i64 = 3;
    const COUNT: i64 = 64;

    fn of(read_only: bool) -> Vec<Self> {
        let byte = |base: i64, what: i64| Self {
            start: base + what,
            len: 1,
            kind: libc::F_RDLCK,
        };
        if read_only {
            // Reads; lets nobody write or resize. Our own writers hold all bytes exclusively.
            return vec![
                byte(Self::DOES, Self::READ),
                byte(Self::UNSHARED, Self::WRITE),
                byte(Self::UNSHARED, Self::RESIZE),
            ];
        }
        let all = |start| Self {
            start,
            len: Self::COUNT,
            kind: libc::F_WRLCK,
        };
        vec![all(Self::DOES), all(Self::UNSHARED)]
    }

    fn take(&self, file: &File) -> io::Result<()> {
        set_lock(file, self.kind, self.start, self.len)
    }
}

/// Whether a virtual machine says that it writes, which a shared lock of ours does not notice.
fn has_qemu_writer(file: &File) -> bool {
    let start = QemuRange::DOES + QemuRange::WRITE;
    would_conflict(file, libc::F_WRLCK, start, 1)
}

/// Whether another open file holds a lock that excludes this one.
#[expect(unsafe_code, reason = "rustix has no open-file-description locks")]
fn would_conflict(file: &File, kind: libc::c_int, start: i64, len: i64) -> bool {
    let mut lock = byte_lock(kind, start, len);
    // SAFETY: the descriptor is open (it is borrowed), and `lock` lives during the call.
    let res = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    res == 0 && libc::c_int::from(lock.l_type) != libc::F_UNLCK
}

#[expect(unsafe_code, reason = "rustix has no open-file-description locks")]
fn byte_lock(kind: libc::c_int, start: i64, len: i64) -> libc::flock {
    // SAFETY: `flock` is plain numbers, for which zero is a value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = start;
    lock.l_len = len;
    lock
}

/// Sets or clears an open-file-description lock.
#[expect(unsafe_code, reason = "rustix has no open-file-description locks")]
fn set_lock(file: &impl AsRawFd, kind: libc::c_int, start: i64, len: i64) -> io::Result<()> {
    let lock = byte_lock(kind, start, len);
    // SAFETY: the descriptor is open (it is borrowed), and `lock` lives during the call.
    let res = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if res == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Gives all locks up, also where somebody else still refers to the open file.
pub(super) fn unlock(file: &OwnedFd) {
    if let Err(errno) = rustix::fs::flock(file, FlockOperation::Unlock) {
        log::debug!("unlock: {errno}");
    }
    if let Err(error) = set_lock(file, libc::F_UNLCK, 0, 0) {
        log::debug!("unlock: {error}");
    }
}
