//! How the journal reaches the device: where its blocks are, bios in batches.

use std::sync::Arc;

use blockstack::sync::{Condvar, Mutex, Rank};
use blockstack::{
    Bio, BioFlags, BioSet, BlkError, BlkResult, Buf, DynDevice, Lanes, Op, PagePool, Plug, Sector,
    Wait, read_wait, submit_bio,
};

use super::replay::ReplayIo;

/// Longest bio the journal makes, in bytes.
pub(super) const MAX_BIO: usize = 1 << 20;
/// Bytes the replay reads at once.
const READ_AHEAD: usize = 1 << 18;
/// Bios in flight; with [`MAX_BIO`] the bound on the memory of a commit.
const BIOS: usize = 16;

/// A run of the journal file: `len` blocks from logical block `lblk` on stand at `pblk`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct JournalExtent {
    /// The first block in the journal file.
    pub lblk: u32,
    /// The first block in the file system.
    pub pblk: u64,
    /// Blocks of the run.
    pub len: u32,
}

/// Why the extents of a journal file are refused.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum JournalFileError {
    /// The file has no blocks.
    #[error("journal inode: no blocks")]
    Empty,
    /// Not every block is mapped.
    #[error("journal inode: block {lblk} is not mapped")]
    Hole {
        /// The first block without a place.
        lblk: u32,
    },
    /// A run lies outside the file system.
    #[error("journal inode: blocks {pblk}+{len} lie outside the file system")]
    Outside {
        /// The first block of the run.
        pblk: u64,
        /// Its length.
        len: u32,
    },
}

/// Where the blocks of the journal are.
#[derive(Debug)]
pub(super) struct JournalFile {
    runs: Vec<JournalExtent>,
    blocks: u32,
}

impl JournalFile {
    pub(super) fn new(extents: &[JournalExtent], fs_blocks: u64) -> Result<Self, JournalFileError> {
        let mut runs: Vec<_> = extents.iter().copied().filter(|run| run.len > 0).collect();
        runs.sort_unstable_by_key(|run| run.lblk);
        let mut blocks = 0;
        for run in &runs {
            if run.lblk != blocks {
                return Err(JournalFileError::Hole { lblk: blocks });
            }
            let end = run.pblk.checked_add(u64::from(run.len));
            if run.pblk == 0 || end.is_none_or(|end| end > fs_blocks) {
                return Err(JournalFileError::Outside {
                    pblk: run.pblk,
                    len: run.len,
                });
            }
            blocks = run
                .lblk
                .checked_add(run.len)
                .ok_or(JournalFileError::Outside {
                    pblk: run.pblk,
                    len: run.len,
                })?;
        }
        if blocks == 0 {
            return Err(JournalFileError::Empty);
        }
        Ok(Self { runs, blocks })
    }

    pub(super) const fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Where `lblk` is, and how many blocks from it on are neighbours on the device.
    pub(super) fn locate(&self, lblk: u32) -> BlkResult<(u64, u32)> {
        let index = self.runs.partition_point(|run| run.lblk <= lblk);
        let run = index.checked_sub(1).and_then(|index| self.runs.get(index));
        let run = run.ok_or(BlkError::OutOfRange)?;
        let skip = lblk - run.lblk;
        if skip >= run.len {
            return Err(BlkError::OutOfRange);
        }
        Ok((run.pblk + u64::from(skip), run.len - skip))
    }

    /// Whether a block of the file system belongs to the journal.
    pub(super) fn contains(&self, pblk: u64) -> bool {
        self.runs
            .iter()
            .any(|run| pblk >= run.pblk && pblk - run.pblk < u64::from(run.len))
    }
}

/// The device, in blocks of the file system.
pub(super) struct Disk {
    pub(super) dev: Lanes,
    pub(super) block_size: usize,
    bios: BioSet<Option<Arc<Batch>>>,
}

impl Disk {
    pub(super) fn new(dev: DynDevice, block_size: usize) -> Self {
        Self {
            dev: Lanes::new(&dev),
            block_size,
            bios: BioSet::new("journal", BIOS),
        }
    }

    pub(super) fn sector(&self, block: u64) -> BlkResult<Sector> {
        block
            .checked_mul(self.block_size as u64)
            .and_then(Sector::from_bytes)
            .ok_or(BlkError::OutOfRange)
    }

    /// Longest bio in blocks, at least one.
    pub(super) fn max_blocks(&self) -> usize {
        let limit = (self.dev.limits().max_sectors as usize) << blockstack::units::SECTOR_SHIFT;
        (limit.min(MAX_BIO) / self.block_size).max(1)
    }

    /// Starts to write `bufs`, one after the other, from `block` on.
    pub(super) fn write(
        &self,
        batch: &Arc<Batch>,
        block: u64,
        flags: BioFlags,
        bufs: impl Iterator<Item = Buf>,
    ) -> BlkResult {
        let sector = self.sector(block)?;
        let mut bio = self
            .bios
            .alloc(Op::Write, Wait::Yes)
            .ok_or(BlkError::NoMemory)?;
        for buf in bufs {
            bio.push(buf).map_err(|_buf| BlkError::Unaligned)?;
        }
        bio.set_lane(&self.dev, sector);
        bio.set_flags(flags | BioFlags::META | BioFlags::SYNC);
        bio.set_end_io(write_ended);
        *bio.pad_mut::<Option<Arc<Batch>>>() = Some(batch.clone());
        batch.state.lock_nested().in_flight += 1;
        submit_bio(bio);
        Ok(())
    }
}

fn write_ended(mut bio: Bio, res: BlkResult) {
    let batch = bio.pad_mut::<Option<Arc<Batch>>>().take();
    // The bio must be back in its set before the waiter goes on, or the next one could wait for it.
    drop(bio);
    if let Some(batch) = batch {
        let mut state = batch.state.lock_nested();
        state.in_flight -= 1;
        state.first = state.first.and(res);
        if state.in_flight == 0 {
            batch.done.notify_all();
        }
    }
}

struct BatchState {
    in_flight: usize,
    first: BlkResult,
}

/// Writes that are waited for together.
pub(super) struct Batch {
    state: Mutex<BatchState>,
    done: Condvar,
}

impl Batch {
    pub(super) fn new() -> Arc<Self> {
        let state = BatchState {
            in_flight: 0,
            first: Ok(()),
        };
        Arc::new(Self {
            state: Mutex::new(Rank::Queue, state),
            done: Condvar::new(),
        })
    }

    /// Waits for all of them; gives the first error.
    pub(super) fn wait(&self) -> BlkResult {
        let mut state = self.state.lock_nested();
        while state.in_flight > 0 {
            self.done.wait(&mut state);
        }
        std::mem::replace(&mut state.first, Ok(()))
    }
}

/// Writes blocks to where they belong, sorted, neighbours in one bio.
pub(super) struct HomeWriter<'a> {
    disk: &'a Disk,
    batch: Arc<Batch>,
    pending: Vec<(u64, Buf)>,
    bytes: usize,
}

impl<'a> HomeWriter<'a> {
    /// Bytes gathered before they are written.
    const GATHER: usize = 4 << 20;

    pub(super) fn new(disk: &'a Disk) -> Self {
        Self {
            disk,
            batch: Batch::new(),
            pending: Vec::new(),
            bytes: 0,
        }
    }

    /// Adds a block; `fill` gets its memory.
    pub(super) fn push(&mut self, block: u64, fill: impl FnOnce(&mut [u8])) -> BlkResult {
        let mut buf = PagePool::shared().alloc(self.disk.block_size)?;
        fill(&mut buf);
        self.pending.push((block, buf));
        self.bytes += self.disk.block_size;
        if self.bytes >= Self::GATHER {
            self.write_all()
        } else {
            Ok(())
        }
    }

    /// Writes what was gathered and waits for it.
    pub(super) fn write_all(&mut self) -> BlkResult {
        let max = self.disk.max_blocks();
        self.pending.sort_by_key(|&(block, _)| block);
        self.bytes = 0;
        let mut run: Vec<Buf> = Vec::with_capacity(max.min(self.pending.len()));
        let mut start = 0;
        let mut res = Ok(());
        // All with one call to the system: a SIGKILL comes before it or after it.
        let _plug = Plug::new();
        for (block, buf) in self.pending.drain(..) {
            if !run.is_empty() && (block != start + run.len() as u64 || run.len() == max) {
                let sent = self
                    .disk
                    .write(&self.batch, start, BioFlags::empty(), run.drain(..));
                res = res.and(sent);
            }
            if run.is_empty() {
                start = block;
            }
            run.push(buf);
        }
        if !run.is_empty() {
            let sent = self
                .disk
                .write(&self.batch, start, BioFlags::empty(), run.drain(..));
            res = res.and(sent);
        }
        let done = self.batch.wait();
        res.and(done)
    }
}

/// [`ReplayIo`] over the device.
pub(super) struct DeviceReplay<'a> {
    disk: &'a Disk,
    file: &'a JournalFile,
    fs_blocks: u64,
    window: Option<(u32, Buf)>,
    home: HomeWriter<'a>,
}

impl<'a> DeviceReplay<'a> {
    pub(super) fn new(disk: &'a Disk, file: &'a JournalFile, fs_blocks: u64) -> Self {
        Self {
            disk,
            file,
            fs_blocks,
            window: None,
            home: HomeWriter::new(disk),
        }
    }

    /// Writes what is still in memory.
    pub(super) fn finish(&mut self) -> BlkResult {
        self.home.write_all()
    }

    fn in_window(&self, log_block: u32) -> Option<&[u8]> {
        let (first, buf) = self.window.as_ref()?;
        let skip = log_block.checked_sub(*first)? as usize * self.disk.block_size;
        buf.get(skip..skip + self.disk.block_size)
    }
}

impl ReplayIo for DeviceReplay<'_> {
    fn read_log(&mut self, log_block: u32, out: &mut [u8]) -> BlkResult {
        if let Some(data) = self.in_window(log_block) {
            out.copy_from_slice(data);
            return Ok(());
        }
        let (pblk, run) = self.file.locate(log_block)?;
        let blocks = (READ_AHEAD / self.disk.block_size).clamp(1, run as usize);
        let buf = PagePool::shared().alloc(blocks * self.disk.block_size)?;
        let buf = read_wait(&self.disk.dev, self.disk.sector(pblk)?, buf)?;
        out.copy_from_slice(&buf[..self.disk.block_size]);
        self.window = Some((log_block, buf));
        Ok(())
    }

    fn write_home(&mut self, block: u64, data: &[u8]) -> BlkResult {
        self.home.push(block, |out| out.copy_from_slice(data))
    }

    fn is_home(&self, block: u64) -> bool {
        block < self.fs_blocks && !self.file.contains(block)
    }
}
