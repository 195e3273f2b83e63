//! The journal's superblock and its recovery.

use std::sync::Arc;

use blockstack::{BioFlags, BlkError, DynDevice, PagePool, flush_wait, read_wait, write_wait};

use super::io::{DeviceReplay, Disk, JournalExtent, JournalFile, JournalFileError};
use super::replay::{ReplayError, Replayed, replay};
use crate::format::jbd2::{Compat, Incompat, JournalSbError, JournalSuperblock, Tid};

/// Why a journal cannot be used.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum JournalError {
    /// The device failed.
    #[error("journal: block device: {0}")]
    Blk(#[from] BlkError),
    /// See [`JournalFileError`].
    #[error(transparent)]
    File(#[from] JournalFileError),
    /// See [`JournalSbError`].
    #[error(transparent)]
    Superblock(#[from] JournalSbError),
    /// See [`ReplayError`].
    #[error(transparent)]
    Replay(#[from] ReplayError),
    /// The journal is shared, or stands on a device of its own.
    #[error("external journal devices (journal_dev) are not supported")]
    External,
    /// The log is not empty, and nothing may be written.
    #[error(
        "the journal needs recovery, but the device is read-only; mount with noload to ignore it"
    )]
    NeedsRecovery,
    /// A thread could not be started.
    #[error("journal: cannot start its thread")]
    Thread,
}

/// A journal file whose superblock was read and checked.
pub struct Log {
    pub(super) disk: Arc<Disk>,
    pub(super) file: Arc<JournalFile>,
    pub(super) sb: JournalSuperblock,
    /// Block 0 of the journal; behind the superblock stands nothing, but it is kept.
    sb_block: Vec<u8>,
    fs_blocks: u64,
    /// Recovered but for fast commits: the log is empty, its superblock says where the transaction
    /// will stand that they become.
    pub(super) has_fast_commits: bool,
}

impl Log {
    /// Reads and checks the superblock of the journal that stands at `extents` of a file system of
    /// `fs_blocks` blocks.
    ///
    /// # Errors
    /// The device's, or what is wrong with the extents or the superblock.
    pub fn open(
        dev: DynDevice,
        block_size: u32,
        fs_blocks: u64,
        extents: &[JournalExtent],
    ) -> Result<Self, JournalError> {
        let file = JournalFile::new(extents, fs_blocks)?;
        let disk = Disk::new(dev, block_size as usize);
        let (pblk, _) = file.locate(0)?;
        let buf = PagePool::shared().alloc(disk.block_size)?;
        let buf = read_wait(&disk.dev, disk.sector(pblk)?, buf)?;
        let sb = JournalSuperblock::parse(&buf, block_size, u64::from(file.blocks()))?;
        if sb.users() > 1 {
            return Err(JournalError::External);
        }
        Ok(Self {
            disk: Arc::new(disk),
            file: Arc::new(file),
            sb,
            sb_block: buf.to_vec(),
            fs_blocks,
            has_fast_commits: false,
        })
    }

    /// Whether fast commits wait on top of a recovered log.
    #[must_use]
    pub fn has_fast_commits(&self) -> bool {
        self.has_fast_commits
    }

    /// Whether transactions wait to be replayed.
    #[must_use]
    pub fn needs_recovery(&self) -> bool {
        self.sb.start().is_some()
    }

    /// The error an aborted journal recorded (negative), or 0.
    #[must_use]
    pub fn errno(&self) -> i32 {
        self.sb.errno()
    }

    /// Replays the log if it is not empty, and marks it as empty. Whatever was read from the
    /// device before may be stale afterwards.
    ///
    /// Where fast commits wait on top of it, it is not marked as empty but as one that begins with
    /// the transaction they belong to, of which nothing is there yet: until that transaction is
    /// committed, fast commits are what counts, and from then on they are of the past. So
    /// [`Journal::open`](super::Journal::open) takes the log, and all that the fast commits say is
    /// to be changed in one handle.
    ///
    /// Crash windows: before the flush and before the superblock is written, the next recovery
    /// does all of it again, with the same result.
    ///
    /// # Errors
    /// See [`ReplayError`]; the log is then left as it is.
    pub fn recover(&mut self) -> Result<Replayed, JournalError> {
        let block_size = self.disk.block_size;
        let mut io = DeviceReplay::new(&self.disk, &self.file, self.fs_blocks);
        let replayed = replay(&self.sb, &mut io, block_size);
        let written = io.finish();
        let replayed = replayed?;
        written?;
        if self.needs_recovery() {
            flush_wait(&self.disk.dev)?;
            self.has_fast_commits = !replayed.fast_commits.is_empty();
            if self.has_fast_commits {
                self.sb.set_tail(replayed.end, Some(replayed.head));
            } else {
                // One number is left out, so that what an interrupted commit left in the log
                // cannot be taken for a part of the next transaction.
                self.sb.set_tail(replayed.end.wrapping_add(1), None);
                self.sb.set_head(replayed.head);
            }
            self.write_superblock()?;
            log::info!(
                "journal: recovered {} transactions, {} blocks, {} revoked",
                replayed.transactions,
                replayed.blocks,
                replayed.revoked
            );
        }
        Ok(replayed)
    }

    /// Sets the features ext4 gives a journal when it loads it; only for an empty log. They reach
    /// the disk with the next superblock.
    pub(super) fn adopt_features(&mut self, metadata_csum: bool, bit64: bool, fast_commit: bool) {
        let mut incompat = self.sb.incompat();
        let sums = Incompat::CSUM_V2 | Incompat::CSUM_V3 | Incompat::ASYNC_COMMIT;
        incompat.remove(sums);
        incompat.set(Incompat::CSUM_V3, metadata_csum);
        if bit64 {
            incompat.insert(Incompat::BIT64);
        }
        // Never used here, but kept free, as by the kernel: what stands there when the kernel makes
        // its first fast commit should not look like anything else.
        incompat.set(Incompat::FAST_COMMIT, fast_commit && self.sb.has_fc_room());
        self.sb
            .set_features(self.sb.compat().difference(Compat::CHECKSUM), incompat);
    }

    /// Marks the log as empty, durably, at the end of its use. As with the kernel, nothing is said
    /// of fast commits then, so that whoever does not know them can take it.
    pub(super) fn write_end(&mut self, tid: Tid, head: u32) -> Result<(), BlkError> {
        let incompat = self.sb.incompat().difference(Incompat::FAST_COMMIT);
        self.sb.set_features(self.sb.compat(), incompat);
        self.sb.set_head(head);
        self.write_tail(tid, None)
    }

    /// Records that the log starts at `start` with transaction `tid`, durably.
    pub(super) fn write_tail(&mut self, tid: Tid, start: Option<u32>) -> Result<(), BlkError> {
        self.sb.set_tail(tid, start);
        self.write_superblock()
    }

    /// Writes the superblock; durable when it returns.
    pub(super) fn write_superblock(&mut self) -> Result<(), BlkError> {
        let bytes = self.sb.to_bytes();
        self.sb_block[..bytes.len()].copy_from_slice(&bytes);
        let (pblk, _) = self.file.locate(0)?;
        let mut buf = PagePool::shared().alloc(self.sb_block.len())?;
        buf.copy_from_slice(&self.sb_block);
        let flags = BioFlags::FUA | BioFlags::META;
        write_wait(&self.disk.dev, self.disk.sector(pblk)?, buf, flags).map(drop)
    }
}
