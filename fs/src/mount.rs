//! Mounting and unmounting: superblock, journal, allocator, orphans.
//!
//! ```text
//! superblock checked -> journal found through a look at the file system as it is -> replayed
//! -> fast commits replayed, on a file system assembled for that alone -> superblock read again -> needs_recovery set, durably -> journal open -> orphans -> requests
//! unmount: data drained -> journal committed, written home, marked empty -> superblock clean
//! ```

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use blockstack::direct_io::{DioConfig, DirectIo};
use blockstack::sync::{Mutex, Rank};
use blockstack::workqueue::Workqueue;
use blockstack::{BlkError, DynDevice, PagePool, Sector, read_wait};
use bufio::{Client, ClientConfig, no_check};
use zerocopy::FromBytes;

use crate::alloc::Alloc;
use crate::batch::Batch;
use crate::core::{Core, ErrorRecord, Fs};
use crate::error::{FsError, FsResult};
use crate::fast_commit::{self, FcError};
use crate::format::fast_commit::FastCommit;
use crate::format::features::{
    Compat, INCOMPAT_SUPPORTED, Incompat, RO_COMPAT_SUPPORTED, RoCompat, incompat_names,
    ro_compat_names,
};
use crate::format::superblock::{
    DEFM_JMODE, DEFM_JMODE_DATA, RawSuperblock, STATE_ERROR, STATE_VALID, SUPERBLOCK_OFFSET,
    SUPERBLOCK_SIZE, SuperblockError,
};
use crate::geometry::Geometry;
use crate::inode::map::{self, MapKind};
use crate::inode::{Inode, InodeTable, ROOT_INO};
use crate::journal::{Journal, JournalError, JournalExtent, Log};
use crate::options::{DataMode, MountOptions, OnError};
use crate::orphan::Orphans;

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
    /// The device cannot be written.
    #[error("device is read-only (mount with -o ro)")]
    DeviceReadOnly,
    /// Data cannot go through a journal that is not there.
    #[error("data=journal: the file system has no journal")]
    NoJournalForData,
    /// The journal cannot be used.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Fast commits of the kernel cannot be replayed.
    #[error("journal: fast commits (fast_commit): {0}; run e2fsck first")]
    FastCommits(#[from] FcError),
    /// Anything else.
    #[error("{what}: {source}")]
    Fs {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: FsError,
    },
}

fn failed(what: &'static str) -> impl Fn(FsError) -> MountError {
    move |source| MountError::Fs { what, source }
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

/// Whether a superblock says that the journal has to be replayed.
#[must_use]
pub fn needs_recovery(superblock: &[u8]) -> bool {
    RawSuperblock::ref_from_prefix(superblock)
        .is_ok_and(|(raw, _)| raw.incompat().contains(Incompat::RECOVER))
}

/// Sets the checksum of a superblock at the start of `bytes`, where the file system has one.
pub(crate) fn seal_superblock(bytes: &mut [u8]) {
    if let Ok((raw, _)) = RawSuperblock::mut_from_prefix(bytes) {
        raw.seal();
    }
}

fn check_features(geo: &Geometry, read_only: bool) -> Result<(), MountError> {
    let unsupported = geo.incompat.difference(INCOMPAT_SUPPORTED);
    if !unsupported.is_empty() {
        return Err(MountError::Incompat(incompat_names(unsupported.bits())));
    }
    let unwritable = geo.ro_compat.difference(RO_COMPAT_SUPPORTED);
    if !unwritable.is_empty() && !read_only {
        return Err(MountError::RoCompat(ro_compat_names(unwritable.bits())));
    }
    Ok(())
}

fn check_device(geo: &Geometry, dev: &DynDevice, read_only: bool) -> Result<(), MountError> {
    let want = geo.blocks_count << geo.block_bits;
    let have = dev.capacity().bytes().unwrap_or(u64::MAX);
    if want > have {
        return Err(MountError::TooSmall { want, have });
    }
    if dev.limits().read_only && !read_only {
        return Err(MountError::DeviceReadOnly);
    }
    Ok(())
}

/// What `tune2fs -o journal_data` and its like have set.
fn default_data_mode(raw: &RawSuperblock) -> DataMode {
    match raw.s_default_mount_opts.get() & DEFM_JMODE {
        DEFM_JMODE_DATA => DataMode::Journal,
        DEFM_JMODE => DataMode::Writeback,
        _ => DataMode::Ordered,
    }
}

/// Blocks that hold the file system's own structures.
fn overhead(geo: &Geometry) -> u64 {
    let gdt = u64::from(geo.gdt_blocks()) + u64::from(geo.reserved_gdt_blocks);
    let supers = (0..geo.group_count)
        .filter(|&group| geo.group_has_super(group))
        .count() as u64;
    let tables = u64::from(geo.group_count) * (u64::from(geo.itable_blocks) + 2);
    u64::from(geo.first_data_block) + supers * (1 + gdt) + tables
}

/// How long what has no name and no user may wait for others to be deleted with.
const EVICTIONS_WAIT: Duration = Duration::from_millis(1);

impl Fs {
    /// Mounts the file system on `dev`.
    ///
    /// # Errors
    /// What is wrong; nothing was written then, but for a journal that was replayed.
    pub fn mount(dev: DynDevice, mut opts: MountOptions) -> Result<Arc<Self>, MountError> {
        let raw = read_superblock(&dev)?;
        let geo = Geometry::new(&raw)?;
        check_features(&geo, opts.read_only)?;
        check_device(&geo, &dev, opts.read_only)?;
        if opts.data == Some(DataMode::Journal) && !geo.compat.contains(Compat::HAS_JOURNAL) {
            return Err(MountError::NoJournalForData);
        }
        opts.data.get_or_insert(default_data_mode(&raw));
        let log = if geo.compat.contains(Compat::HAS_JOURNAL) {
            Self::recover(&dev, &raw, geo, &opts)?
        } else if geo.incompat.contains(Incompat::RECOVER) {
            let value = raw.s_feature_incompat.get().into();
            let want = "no needs_recovery without has_journal";
            return Err(SuperblockError::Field {
                field: "s_feature_incompat",
                value,
                want,
            }
            .into());
        } else {
            None
        };
        // The journal may have brought another superblock.
        let raw = read_superblock(&dev)?;
        let geo = Geometry::new(&raw)?;
        check_features(&geo, opts.read_only)?;
        check_device(&geo, &dev, opts.read_only)?;
        let has_log = log.is_some();
        let fs = Self::assemble(dev, &raw, geo, opts, log)?;
        let root = fs.iget(ROOT_INO).map_err(failed("root directory"))?;
        if !root.is_dir() || root.data.read().links == 0 {
            let source = fs.corrupt("root inode: i_mode", 0, ROOT_INO);
            return Err(failed("root directory")(source));
        }
        root.lookups.store(1, Ordering::Release);
        // Before anything is written: what is wrong here is a reason not to mount.
        let orphans = fs.find_orphans().map_err(failed("orphans"))?;
        if !fs.is_read_only() {
            fs.mark_mounted(has_log).map_err(failed("superblock"))?;
        }
        fs.clear_orphans(orphans).map_err(failed("orphans"))?;
        Ok(fs)
    }

    /// Finds the journal and replays it.
    fn recover(
        dev: &DynDevice,
        raw: &RawSuperblock,
        geo: Geometry,
        opts: &MountOptions,
    ) -> Result<Option<Log>, MountError> {
        if geo.journal_inum == 0 {
            return Err(JournalError::External.into());
        }
        if opts.noload {
            return Ok(None);
        }
        let needs_recovery = geo.incompat.contains(Incompat::RECOVER);
        let (block_size, blocks) = (geo.block_size, geo.blocks_count);
        let probe = MountOptions {
            read_only: true,
            ..opts.clone()
        };
        let probe = Self::assemble(dev.clone(), raw, geo, probe, None)?;
        let extents = probe.journal_extents().map_err(failed("journal inode"))?;
        probe.journal.shutdown().map_err(failed("journal"))?;
        drop(probe);
        let mut log = Log::open(dev.clone(), block_size, blocks, &extents)?;
        if log.needs_recovery() || needs_recovery {
            if dev.limits().read_only {
                return Err(JournalError::NeedsRecovery.into());
            }
            let commits = log.recover()?.fast_commits;
            if log.has_fast_commits() {
                Self::replay_fast_commits(dev, opts, log, &commits)?;
                log = Log::open(dev.clone(), block_size, blocks, &extents)?;
            }
        }
        Ok((!opts.read_only).then_some(log))
    }

    /// Replays what stands on top of a recovered log, on a file system of its own.
    fn replay_fast_commits(
        dev: &DynDevice,
        opts: &MountOptions,
        log: Log,
        commits: &[FastCommit],
    ) -> Result<(), MountError> {
        // The journal may have brought another superblock.
        let raw = read_superblock(dev)?;
        let geo = Geometry::new(&raw)?;
        check_features(&geo, false)?;
        check_device(&geo, dev, false)?;
        let opts = MountOptions {
            read_only: false,
            sync: false,
            discard: false,
            errors: Some(OnError::Continue),
            ..opts.clone()
        };
        let fs = Self::assemble(dev.clone(), &raw, geo, opts, Some(log))?;
        fast_commit::replay(&fs, commits)?;
        fs.journal.shutdown().map_err(failed("fast commits"))
    }

    fn journal_extents(&self) -> FsResult<Vec<JournalExtent>> {
        let ino = self.geo.journal_inum;
        let inode = self.iget(ino)?;
        let data = inode.data.read();
        let blocks = data.size >> self.geo.block_bits;
        let Ok(blocks) = u32::try_from(blocks) else {
            return Err(self.corrupt("journal inode: i_size", 0, ino));
        };
        if !data.is_file() || data.links == 0 {
            return Err(self.corrupt("journal inode: i_mode", 0, ino));
        }
        let mut extents = Vec::new();
        let mut lblk = 0;
        while lblk < blocks {
            let mapping = map::lookup(self, &inode, &data, lblk, blocks - lblk)?;
            if mapping.kind != MapKind::Mapped {
                return Err(self.corrupt("journal inode: a hole", 0, ino));
            }
            extents.push(JournalExtent {
                lblk,
                pblk: mapping.pblk,
                len: mapping.len,
            });
            lblk += mapping.len;
        }
        Ok(extents)
    }

    fn assemble(
        dev: DynDevice,
        raw: &RawSuperblock,
        geo: Geometry,
        opts: MountOptions,
        log: Option<Log>,
    ) -> Result<Arc<Self>, MountError> {
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
        let overhead = overhead(&geo);
        let bufs = Client::new(dev.clone(), config)
            .map_err(|error| failed("buffer cache")(FsError::from(error)))?;
        let core = Arc::new(Core::new(geo, bufs, opts, on_error));
        let alloc = Alloc::new(core.clone()).map_err(failed("allocator"))?;
        let journal = match log {
            Some(log) => Journal::open(core.clone(), log)?,
            None => Journal::bare(core.clone()),
        };
        journal.set_commit_hooks(alloc.clone());
        let evictions = |weak: Weak<Self>| {
            Workqueue::lingering("evict", 1, EVICTIONS_WAIT, move |inode: Arc<Inode>| {
                if let Some(fs) = weak.upgrade() {
                    fs.evict(inode);
                }
            })
        };
        let mut spawn_error = None;
        // By its name, the threads of several mounts can be told apart.
        let name = dev.name().rsplit('/').next().unwrap_or("fs").to_owned();
        let data_io = DirectIo::new(&name, dev, DioConfig::default());
        let fs = Arc::new_cyclic(|weak: &Weak<Self>| {
            let queue = evictions(weak.clone());
            Self {
                core,
                journal,
                alloc,
                inodes: InodeTable::default(),
                orphans: Orphans::default(),
                batch: Batch::new(),
                data_io,
                behind: AtomicUsize::new(0),
                rename_lock: Mutex::new(Rank::Rename, ()),
                overhead,
                evictions: queue.map_err(|error| spawn_error = Some(error)).ok(),
            }
        });
        if let Err(error) = fs.batch.start(Arc::downgrade(&fs)) {
            spawn_error.get_or_insert(error);
        }
        match spawn_error {
            None => Ok(fs),
            Some(error) => {
                log::error!("cannot start a thread: {error}");
                Err(failed("thread")(FsError::NoMemory))
            }
        }
    }

    fn evict(self: &Arc<Self>, inode: Arc<Inode>) {
        let ino = inode.ino;
        // Since it was queued somebody may have got hold of it again (a link of an unnamed file).
        if inode.lookups.load(Ordering::Acquire) == 0 {
            if inode.orphan.is_listed() {
                if let Err(error) = self.delete(&inode) {
                    self.report_eviction(ino, error);
                }
            } else if let Err(error) = self.write_times(&inode) {
                log::debug!("inode {ino}: times lost: {error}");
            }
        }
        drop(inode);
        self.inodes.drop_unused(ino);
    }

    /// Waits until what is to be deleted, and to leave the memory, has.
    pub fn evict_all(&self) {
        if let Some(evictions) = &self.evictions {
            evictions.flush();
        }
    }

    /// Changes the superblock on disk at once, outside of any transaction.
    fn change_superblock(&self, change: impl FnOnce(&mut RawSuperblock)) -> FsResult {
        let (block, offset) = self.geo.superblock_at();
        let buffer = self.bufs.read(block, no_check())?;
        {
            let mut data = buffer.data_mut();
            match RawSuperblock::mut_from_bytes(&mut data[offset..offset + SUPERBLOCK_SIZE]) {
                Ok(raw) => {
                    change(raw);
                    let now = self.now().sec;
                    raw.s_wtime.set(now as u32);
                    raw.s_wtime_hi = (now >> 32) as u8;
                    raw.seal();
                }
                Err(_size) => return Err(FsError::Invalid),
            }
        }
        buffer.mark_dirty();
        self.bufs.write_buffers(&[buffer])?;
        Ok(self.bufs.flush()?)
    }

    fn mark_mounted(&self, has_log: bool) -> FsResult {
        let now = self.now().sec;
        self.change_superblock(|raw| {
            raw.s_state.set(raw.s_state.get() & !STATE_VALID);
            raw.s_mnt_count.set(raw.s_mnt_count.get().wrapping_add(1));
            raw.s_mtime.set(now as u32);
            raw.s_mtime_hi = (now >> 32) as u8;
            let mut incompat = raw.incompat();
            incompat.set(Incompat::RECOVER, has_log);
            raw.s_feature_incompat.set(incompat.bits());
            if raw.compat().contains(Compat::ORPHAN_FILE) {
                let ro_compat = raw.ro_compat() | RoCompat::ORPHAN_PRESENT;
                raw.s_feature_ro_compat.set(ro_compat.bits());
            }
        })
    }

    /// Makes everything durable and leaves the file system clean. No requests may come any more.
    ///
    /// # Errors
    /// The first one met; the file system is then left as after a crash, to be replayed.
    pub fn unmount(self: &Arc<Self>) -> FsResult {
        let mut first = Ok(());
        for inode in self.inodes.all() {
            self.wait_begun(&inode);
            if let Some(dio) = inode.dio.get() {
                dio.wait_idle();
            }
            if let Some(error) = inode.io.take_error() {
                first = first.and(Err(error));
            }
            // What the kernel still knew is forgotten with the mount.
            inode.lookups.store(0, Ordering::Release);
            self.put(inode);
        }
        self.data_io.shut_down();
        self.batch.stop();
        if let Some(evictions) = &self.evictions {
            evictions.drain();
        }
        if self.opts.read_only {
            return first;
        }
        if self.is_shut_down() {
            // What was lost by that was told. The log is left for the next mount.
            self.journal.shutdown().ok();
            return Ok(());
        }
        let aborted = self.journal.is_aborted();
        self.journal.shutdown()?;
        self.bufs.write_dirty()?;
        self.bufs.flush()?;
        if aborted {
            return first.and(Err(FsError::Aborted));
        }
        self.mark_clean()?;
        first
    }

    fn mark_clean(&self) -> FsResult {
        let counts = self.alloc.counts();
        let no_orphans = self.no_orphans();
        let (count, first, last) = {
            let mut errors = self.errors.lock();
            (
                std::mem::take(&mut errors.count),
                errors.first.take(),
                errors.last.take(),
            )
        };
        self.change_superblock(|raw| {
            let mut state = raw.s_state.get() | STATE_VALID;
            if count > 0 {
                state |= STATE_ERROR;
            }
            raw.s_state.set(state);
            raw.set_free_blocks(counts.free_blocks);
            raw.s_free_inodes_count.set(counts.free_inodes);
            let mut incompat = raw.incompat();
            incompat.remove(Incompat::RECOVER);
            raw.s_feature_incompat.set(incompat.bits());
            if no_orphans {
                let ro_compat = raw.ro_compat() - RoCompat::ORPHAN_PRESENT;
                raw.s_feature_ro_compat.set(ro_compat.bits());
            }
            record_errors(raw, count, first, last);
        })
    }
}

fn record_errors(
    raw: &mut RawSuperblock,
    count: u32,
    first: Option<ErrorRecord>,
    last: Option<ErrorRecord>,
) {
    let name = |what: &str| {
        let mut field = [0; 32];
        for (to, from) in field.iter_mut().zip(what.bytes().take(31)) {
            *to = from;
        }
        field
    };
    if let (Some(first), 0) = (first, raw.s_error_count.get()) {
        raw.s_first_error_time.set(first.time.sec as u32);
        raw.s_first_error_time_hi = (first.time.sec >> 32) as u8;
        raw.s_first_error_ino.set(first.ino);
        raw.s_first_error_block.set(first.block);
        raw.s_first_error_func = name(first.what);
    }
    if let Some(last) = last {
        raw.s_last_error_time.set(last.time.sec as u32);
        raw.s_last_error_time_hi = (last.time.sec >> 32) as u8;
        raw.s_last_error_ino.set(last.ino);
        raw.s_last_error_block.set(last.block);
        raw.s_last_error_func = name(last.what);
    }
    raw.s_error_count
        .set(raw.s_error_count.get().saturating_add(count));
}

#[cfg(test)]
mod tests {
    use super::RawSuperblock;
    use zerocopy::IntoBytes;

    #[test]
    fn sealing_a_part_of_a_block_changes_only_the_checksum() {
        let mut bytes = [7u8; 2048];
        let before = bytes;
        super::seal_superblock(&mut bytes);
        assert_eq!(bytes[..0x3fc], before[..0x3fc]);
        assert_eq!(bytes[0x400..], before[0x400..]);
        assert_eq!(
            std::mem::size_of::<RawSuperblock>(),
            before[..1024].as_bytes().len()
        );
    }
}
