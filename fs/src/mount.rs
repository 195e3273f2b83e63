//! Mounting: superblock, checks, journal, allocator.

use std::sync::Arc;
use std::time::Duration;

use blockstack::sync::Rank;
use blockstack::{BlkError, DynDevice, PagePool, Sector, read_wait};
use bufio::{Client, ClientConfig};
use zerocopy::FromBytes;

use crate::alloc::Alloc;
use crate::core::{Core, Fs};
use crate::error::FsError;
use crate::format::features::{
    INCOMPAT_SUPPORTED, RO_COMPAT_SUPPORTED, incompat_names, ro_compat_names,
};
use crate::format::superblock::{
    RawSuperblock, SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE, SuperblockError,
};
use crate::geometry::Geometry;
use crate::inode::InodeTable;
use crate::journal::Journal;
use crate::options::{MountOptions, OnError};

/// Why a file system could not be mounted.
#[derive(Clone, Debug, thiserror::Error)]
pub enum MountError {
    /// The superblock could not be read.
    #[error("cannot read the superblock: {0}")]
    Read(BlkError),
    /// The superblock is not one, or wrong.
    #[error(transparent)]
    Superblock(#[from] SuperblockError),
    /// The device ends before the file system does.
    #[error("image is too small: the file system has {want} bytes, the device {have}")]
    TooSmall {
        /// Bytes of the file system.
        want: u64,
        /// Bytes of the device.
        have: u64,
    },
    /// Features this program cannot read.
    #[error("unsupported features: {0}")]
    Incompat(String),
    /// Features this program cannot write.
    #[error("features that allow only reading (mount with -o ro): {0}")]
    RoCompat(String),
    /// Anything else.
    #[error("{what}: {source}")]
    Fs {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: FsError,
    },
}

fn read_superblock(dev: &DynDevice) -> Result<RawSuperblock, MountError> {
    let have = dev.capacity().bytes().unwrap_or(u64::MAX);
    if have < SUPERBLOCK_OFFSET + SUPERBLOCK_SIZE as u64 {
        let want = SUPERBLOCK_OFFSET + SUPERBLOCK_SIZE as u64;
        return Err(MountError::TooSmall { want, have });
    }
    // A whole 4 KiB, so that devices with large sectors do not mind.
    let len = have.min(4096) as usize;
    let buf = PagePool::shared().alloc(len).map_err(MountError::Read)?;
    let buf = read_wait(dev, Sector::ZERO, buf).map_err(MountError::Read)?;
    let at = SUPERBLOCK_OFFSET as usize;
    match RawSuperblock::read_from_bytes(&buf[at..at + SUPERBLOCK_SIZE]) {
        Ok(raw) => Ok(raw),
        Err(_size) => Err(MountError::Read(BlkError::Io)),
    }
}

impl Fs {
    /// Mounts the file system on `dev`.
    ///
    /// # Errors
    /// What is wrong; nothing was written then.
    pub fn mount(dev: DynDevice, opts: MountOptions) -> Result<Arc<Self>, MountError> {
        let raw = read_superblock(&dev)?;
        let geo = Geometry::new(&raw)?;
        let want = geo.blocks_count << geo.block_bits;
        let have = dev.capacity().bytes().unwrap_or(u64::MAX);
        if want > have {
            return Err(MountError::TooSmall { want, have });
        }
        let unsupported = geo.incompat.difference(INCOMPAT_SUPPORTED);
        if !unsupported.is_empty() {
            return Err(MountError::Incompat(incompat_names(unsupported.bits())));
        }
        let read_only = geo.ro_compat.difference(RO_COMPAT_SUPPORTED);
        if !read_only.is_empty() && !opts.read_only {
            return Err(MountError::RoCompat(ro_compat_names(read_only.bits())));
        }
        let on_error = opts.errors.unwrap_or(match raw.s_errors.get() {
            2 => OnError::RemountRo,
            3 => OnError::Panic,
            _ => OnError::Continue,
        });
        let config = ClientConfig {
            block_size: geo.block_size,
            cache_bytes: opts.cache_bytes,
            rank: Rank::FsBufio,
            writeback_age: Duration::from_secs(30),
            strict_holds: false,
        };
        let failed = |what| move |source: FsError| MountError::Fs { what, source };
        let bufs = Client::new(dev, config)
            .map_err(|error| failed("buffer cache")(FsError::from(error)))?;
        let core = Arc::new(Core::new(geo, bufs, opts, on_error));
        let journal = Journal::bare(core.clone());
        let alloc = Alloc::new(core.clone()).map_err(failed("allocator"))?;
        journal.set_commit_hooks(alloc.clone());
        Ok(Arc::new(Self {
            core,
            journal,
            alloc,
            inodes: InodeTable::default(),
        }))
    }
}
