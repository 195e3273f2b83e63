//! The image under test: read where it stands, never written, its free blocks filled with what
//! nobody wrote.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

use blockstack::backend::mem::{Backing, FileBacking, Image, MemDisk};
use blockstack::device::Stats;
use blockstack::{Bio, BlockDevice, DynDevice, Limits, Op, SectorCount};
use fs::{Fs, MountOptions};

use super::Error;

/// Each sector of what nobody wrote begins so.
const STALE: &[u8; 16] = b"NEVER WRITTEN!\xfe\xff";

/// Whether a sector of a file shows a free block as it was at the start.
#[must_use]
pub fn is_stale(sector: &[u8]) -> bool {
    sector.starts_with(STALE)
}

/// An image whose free blocks are filled with [`STALE`].
struct Filled {
    below: Image,
    /// Free bytes: start and end, whole sectors.
    free: BTreeMap<u64, u64>,
}

impl Backing for Filled {
    fn read_at(&self, at: u64, out: &mut [u8]) {
        self.below.read_at(at as usize, out);
        let end = at + out.len() as u64;
        let first = self
            .free
            .range(..=at)
            .next_back()
            .map_or(at, |(start, _)| *start);
        for (&from, &to) in self.free.range(first..end) {
            for byte in from.max(at)..to.min(end) {
                let place = (byte % 512) as usize;
                out[(byte - at) as usize] = STALE.get(place).copied().unwrap_or(0xd5);
            }
        }
    }
}

/// A disk that only takes note of what is discarded.
struct FreeFinder {
    lower: Arc<MemDisk>,
    free: Mutex<Vec<Range<u64>>>,
    stats: Stats,
}

impl BlockDevice for FreeFinder {
    fn name(&self) -> &str {
        "free blocks"
    }
    fn capacity(&self) -> SectorCount {
        self.lower.capacity()
    }
    fn limits(&self) -> Limits {
        self.lower.limits()
    }
    fn stats(&self) -> &Stats {
        &self.stats
    }
    fn submit(&self, mut bio: Bio) {
        if bio.op() == Op::Discard {
            let start = bio.sector().raw() * 512;
            let range = start..start + bio.len().raw() * 512;
            self.free
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(range);
            bio.complete(Ok(()));
            return;
        }
        let sector = bio.sector();
        bio.set_dev(self.lower.clone(), sector);
        blockstack::submit_bio(bio);
    }
}

/// Opens an image, or a block device, to look at; nothing is ever written to it.
///
/// # Errors
/// The system's.
pub fn open(path: &Path) -> Result<(Image, Arc<FileBacking>), Error> {
    let failed = |source| Error::Image {
        path: path.to_owned(),
        source,
    };
    let backing = Arc::new(FileBacking::open(path).map_err(failed)?);
    let size = backing.size().map_err(failed)?;
    Ok((Image::over(size, backing.clone()), backing))
}

/// Fills the free blocks of a copy of a file system with what nobody wrote. The journal must have
/// nothing to replay.
///
/// # Errors
/// Where it cannot be mounted.
pub fn fill_free(below: &Image) -> Result<Image, Error> {
    let finder = Arc::new(FreeFinder {
        lower: MemDisk::from_image("look", below.clone()),
        free: Mutex::new(Vec::new()),
        stats: Stats::default(),
    });
    let dev: DynDevice = finder.clone();
    let fs = Fs::mount(dev, MountOptions::default())?;
    let trimmed = fs.alloc.trim(0, u64::MAX, 1);
    let unmounted = fs.unmount();
    trimmed.and(unmounted.map(|()| 0)).map_err(Error::Fs)?;
    drop(fs);
    let free = std::mem::take(&mut *finder.free.lock().unwrap_or_else(PoisonError::into_inner));
    let free = free
        .into_iter()
        .map(|range| (range.start, range.end))
        .collect();
    let filled = Filled {
        below: below.clone(),
        free,
    };
    Ok(Image::over(below.size(), Arc::new(filled)))
}

fn le32(image: &Image, at: usize) -> u32 {
    let mut bytes = [0; 4];
    image.read_at(at, &mut bytes);
    u32::from_le_bytes(bytes)
}

/// Whether a power cut tore the superblock: its checksum stands in another sector than what it is
/// for. Nothing of the format helps on a disk that does not write the two as one; the kernel's ext4
/// has the same gap.
#[must_use]
pub fn has_torn_superblock(image: &Image) -> bool {
    const METADATA_CSUM: u32 = 0x400;
    let mut sb = [0; 1020];
    image.read_at(1024, &mut sb);
    le32(image, 1024 + 0x64) & METADATA_CSUM != 0
        && le32(image, 1024 + 0x3fc) != !crc32c::crc32c(&sb)
}

/// Whether the file system has a journal.
#[must_use]
pub fn has_journal(image: &Image) -> bool {
    le32(image, 1024 + 0x5c) & 4 != 0
}

/// A directory for images that programs look at, in memory where there is such a place.
pub struct Scratch(tempfile::TempDir);

impl Scratch {
    /// Makes one.
    ///
    /// # Errors
    /// The system's.
    pub fn new() -> Result<Self, Error> {
        let shm = Path::new("/dev/shm");
        let dir = if shm.is_dir() {
            tempfile::tempdir_in(shm)
        } else {
            tempfile::tempdir()
        };
        dir.map(Self).map_err(Error::Scratch)
    }

    /// The path of a file in it.
    #[must_use]
    pub fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    /// What `e2fsck -fn` complains about.
    ///
    /// # Errors
    /// Its words, or why it does not run.
    pub fn e2fsck(&self, image: &Image, name: &str) -> Result<(), String> {
        let path = self.path(name);
        image
            .save(&path)
            .map_err(|error| format!("{path:?}: {error}"))?;
        let out = tool("e2fsck").arg("-fn").arg(&path).output();
        std::fs::remove_file(&path).map_err(|error| format!("{path:?}: {error}"))?;
        let out = out.map_err(|error| format!("e2fsck: {error}"))?;
        if out.status.success() {
            return Ok(());
        }
        let text = [&out.stdout[..], &out.stderr].concat();
        let text = String::from_utf8_lossy(&text).replace(&*path.to_string_lossy(), "image");
        Err(format!("e2fsck -fn: {}\n{text}", out.status))
    }
}

/// A program of e2fsprogs, which are not in the PATH of every user.
#[must_use]
pub fn tool(name: &str) -> Command {
    let path = ["/usr/sbin", "/sbin"]
        .map(|dir| Path::new(dir).join(name))
        .into_iter()
        .find(|path| path.exists());
    Command::new(path.unwrap_or(name.into()))
}
