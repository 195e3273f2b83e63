//! Replay of a log that was not emptied: scan, revoke, replay, as the kernel does it.
//!
//! 1. **Scan** finds the last transaction whose commit block is there and right.
//! 2. **Revoke** collects the revoked blocks of all of them, and where the youngest copy of each
//!    block stands.
//! 3. **Replay** copies the blocks home.
//!
//! On top of the last transaction there may be fast commits, in an area of their own behind the log:
//! they are read with the scan and handed to the caller.
//!
//! Nothing here trusts the log: every pass is bounded by the log's length, block numbers are
//! checked against the file system, nothing is allocated by a size that stands on disk.

use std::collections::HashMap;

use blockstack::{BlkError, BlkResult};

use super::revoke::FoundRevokes;
use crate::format::fast_commit::{FastCommit, FcScan, FcScanError, FcScanner};
use crate::format::jbd2::{
    COMMIT_BLOCK, Csum, DESCRIPTOR_BLOCK, Header, Incompat, JournalSuperblock, MAGIC_BYTES,
    REVOKE_BLOCK, RevokeCountError, Revokes, Tag, TagFlags, TagFormat, Tags, Tid, commit_time,
    crc32_be,
};

/// Where the log is read from and the blocks are written to.
pub trait ReplayIo {
    /// Reads block `log_block` of the journal.
    ///
    /// # Errors
    /// The device's.
    fn read_log(&mut self, log_block: u32, out: &mut [u8]) -> BlkResult;
    /// Writes a block of the file system; may be done later, but in order for one block.
    ///
    /// # Errors
    /// The device's.
    fn write_home(&mut self, block: u64, data: &[u8]) -> BlkResult;
    /// Whether a tag may name `block`: inside the file system, outside the journal.
    fn is_home(&self, block: u64) -> bool;
}

/// Why a log could not be replayed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ReplayError {
    /// A block of the log cannot be read.
    #[error("journal: block {log_block}: {error}")]
    Read {
        /// The block of the journal.
        log_block: u32,
        /// The device's error.
        error: BlkError,
    },
    /// A block cannot be written home.
    #[error("journal: writing block {block} home: {error}")]
    Write {
        /// The block of the file system.
        block: u64,
        /// The device's error.
        error: BlkError,
    },
    /// A descriptor or revoke block inside a committed transaction is damaged.
    #[error("journal: transaction {tid}: descriptor or revoke block with a wrong checksum")]
    BlockChecksum {
        /// The transaction.
        tid: Tid,
    },
    /// The copy of a block in the log is damaged.
    #[error("journal: transaction {tid}: wrong checksum of the copy of block {block}")]
    DataChecksum {
        /// The transaction.
        tid: Tid,
        /// The block of the file system.
        block: u64,
    },
    /// A commit block is there but wrong, and nothing says that it is stale.
    #[error("journal: transaction {tid}: commit block with a wrong checksum")]
    CommitChecksum {
        /// The transaction.
        tid: Tid,
    },
    /// A tag names a block outside the file system, or inside the journal.
    #[error("journal: transaction {tid}: a tag names block {block}")]
    BadTag {
        /// The transaction.
        tid: Tid,
        /// The block named.
        block: u64,
    },
    /// See [`RevokeCountError`].
    #[error("journal: transaction {tid}: {source}")]
    Revoke {
        /// The transaction.
        tid: Tid,
        /// What is wrong.
        source: RevokeCountError,
    },
    /// A fast commit that counts cannot be read.
    #[error("journal: fast commits (fast_commit) of transaction {tid}: {source}; run e2fsck first")]
    FastCommits {
        /// The transaction they are made on top of, less one.
        tid: Tid,
        /// What is wrong.
        source: FcScanError,
    },
}

/// What a replay did.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Replayed {
    /// The transaction after the last one replayed.
    pub end: Tid,
    /// The log block after that transaction.
    pub head: u32,
    /// Transactions replayed.
    pub transactions: u32,
    /// Blocks written home.
    pub blocks: u64,
    /// Copies not written because of a revoke.
    pub revoked: u64,
    /// Fast commits on top of the last transaction, oldest first; not replayed.
    pub fast_commits: Vec<FastCommit>,
}

/// Replays the log that `sb` describes; does nothing where it is empty.
///
/// Whoever calls this marks the log as empty afterwards, once what was written is durable.
///
/// # Errors
/// See [`ReplayError`]. As in the kernel, everything that could be replayed was, even so.
pub fn replay(
    sb: &JournalSuperblock,
    io: &mut dyn ReplayIo,
    block_size: usize,
) -> Result<Replayed, ReplayError> {
    let Some(start) = sb.start() else {
        return Ok(Replayed {
            end: sb.sequence(),
            head: sb.geometry().first,
            transactions: 0,
            blocks: 0,
            revoked: 0,
            fast_commits: Vec::new(),
        });
    };
    let mut log = Log {
        sb,
        io,
        csum: sb.csum(),
        format: sb.tag_format(),
        wide: sb.incompat().contains(Incompat::BIT64),
        start,
        block: vec![0; block_size],
        data: vec![0; block_size],
    };
    let scan = log.scan()?;
    let fast_commits = log.scan_fast_commits(scan.end)?;
    let (revokes, youngest) = log.collect_revokes(scan.end)?;
    let (blocks, revoked) = log.replay(scan.end, &revokes, &youngest)?;
    if let Some(error) = scan.failed {
        return Err(error);
    }
    Ok(Replayed {
        end: scan.end,
        head: scan.head,
        transactions: scan.end.wrapping_sub(sb.sequence()),
        blocks,
        revoked,
        fast_commits,
    })
}

/// The end of the log, as found by the scan.
struct Scan {
    end: Tid,
    head: u32,
    /// What to report after everything before it was replayed.
    failed: Option<ReplayError>,
}

struct Log<'a> {
    sb: &'a JournalSuperblock,
    io: &'a mut dyn ReplayIo,
    csum: Csum,
    format: TagFormat,
    wide: bool,
    start: u32,
    /// The control block at hand.
    block: Vec<u8>,
    /// The data block at hand.
    data: Vec<u8>,
}

/// A position in the log; counts the blocks passed, so that no log is walked twice.
#[derive(Clone, Copy)]
struct Cursor {
    at: u32,
    left: u32,
}

impl Log<'_> {
    fn cursor(&self) -> Cursor {
        Cursor {
            at: self.start,
            left: self.sb.geometry().len(),
        }
    }

    /// Moves on by `n` blocks; `None` where that would pass the whole log.
    fn step(&self, cursor: Cursor, n: usize) -> Option<Cursor> {
        let n = u32::try_from(n).ok().filter(|&n| n <= cursor.left)?;
        Some(Cursor {
            at: self.sb.geometry().advance(cursor.at, n),
            left: cursor.left - n,
        })
    }

    fn read_control(&mut self, log_block: u32) -> Result<(), ReplayError> {
        self.io
            .read_log(log_block, &mut self.block)
            .map_err(|error| ReplayError::Read { log_block, error })
    }

    fn read_data(&mut self, log_block: u32) -> Result<(), ReplayError> {
        self.io
            .read_log(log_block, &mut self.data)
            .map_err(|error| ReplayError::Read { log_block, error })
    }

    /// Reads the control block at `cursor`; `None` where the log ends there.
    fn control(&mut self, cursor: Cursor, tid: Tid) -> Result<Option<u32>, ReplayError> {
        if cursor.left == 0 {
            return Ok(None);
        }
        self.read_control(cursor.at)?;
        let header = Header::of(&self.block).filter(|header| header.sequence == tid);
        Ok(header.map(|header| header.blocktype))
    }

    fn tags(&self) -> Tags<'_> {
        Tags::new(&self.block, self.format, self.csum)
    }

    fn scan(&mut self) -> Result<Scan, ReplayError> {
        let mut cursor = self.cursor();
        let mut scan = Scan {
            end: self.sb.sequence(),
            head: self.start,
            failed: None,
        };
        let mut v1_sum = !0;
        let mut last_time = 0;
        // A control block with a wrong checksum is damage only when its transaction turns out to
        // be committed and younger than the one before; else it is what an earlier round of the
        // log left there, with a transaction number that happens to fit.
        let mut suspect = false;
        while let Some(blocktype) = self.control(cursor, scan.end)? {
            let after = match blocktype {
                DESCRIPTOR_BLOCK => {
                    suspect |= !self.csum.block_ok(&self.block);
                    let count = self.tags().count();
                    let next = self.step(cursor, 1 + count);
                    if self.csum == Csum::V1 && next.is_some() {
                        v1_sum = self.sum_v1(cursor, count, v1_sum)?;
                    }
                    next
                }
                REVOKE_BLOCK => {
                    suspect |= !self.csum.block_ok(&self.block);
                    self.step(cursor, 1)
                }
                COMMIT_BLOCK => {
                    let (time, _) = commit_time(&self.block);
                    let sum_ok = self.csum.commit_ok(&self.block, v1_sum);
                    if (suspect || !sum_ok) && time < last_time {
                        break;
                    }
                    if suspect {
                        return Err(ReplayError::BlockChecksum { tid: scan.end });
                    }
                    if !sum_ok {
                        // With async_commit the commit block may be on disk before the rest:
                        // then this is how an interrupted commit looks.
                        if !self.sb.incompat().contains(Incompat::ASYNC_COMMIT) {
                            scan.failed = Some(ReplayError::CommitChecksum { tid: scan.end });
                        }
                        break;
                    }
                    last_time = time;
                    v1_sum = !0;
                    let next = self.step(cursor, 1);
                    scan.end = scan.end.wrapping_add(1);
                    scan.head = next.map_or(cursor.at, |next| next.at);
                    next
                }
                _ => break,
            };
            match after {
                Some(next) => cursor = next,
                None => break,
            }
        }
        Ok(scan)
    }

    /// Reads the fast commits on top of the transaction before `tid`.
    fn scan_fast_commits(&mut self, tid: Tid) -> Result<Vec<FastCommit>, ReplayError> {
        let mut scanner = FcScanner::new(tid);
        // The kernel leaves one block free between the log and the fast commits.
        for log_block in self.sb.geometry().end + 1..self.sb.maxlen() {
            self.read_control(log_block)?;
            let scanned = scanner
                .block(&self.block)
                .map_err(|source| ReplayError::FastCommits { tid, source })?;
            if scanned == FcScan::End {
                break;
            }
        }
        Ok(scanner.finish())
    }

    fn sum_v1(&mut self, cursor: Cursor, count: usize, sum: u32) -> Result<u32, ReplayError> {
        let mut sum = crc32_be(sum, &self.block);
        let mut at = cursor.at;
        for _ in 0..count {
            at = self.sb.geometry().advance(at, 1);
            self.read_data(at)?;
            sum = crc32_be(sum, &self.data);
        }
        Ok(sum)
    }

    /// Calls `visit` for each control block of the transactions before `end`. The scan has been
    /// over them all, so a log that ends early cannot be; it would only end the walk.
    fn walk(
        &mut self,
        end: Tid,
        mut visit: impl FnMut(&mut Self, u32, Tid, Cursor) -> Result<(), ReplayError>,
    ) -> Result<(), ReplayError> {
        let mut cursor = self.cursor();
        let mut tid = self.sb.sequence();
        while tid != end {
            let Some(blocktype) = self.control(cursor, tid)? else {
                break;
            };
            let len = match blocktype {
                DESCRIPTOR_BLOCK => 1 + self.tags().count(),
                COMMIT_BLOCK | REVOKE_BLOCK => 1,
                _ => break,
            };
            visit(self, blocktype, tid, cursor)?;
            if blocktype == COMMIT_BLOCK {
                tid = tid.wrapping_add(1);
            }
            let Some(next) = self.step(cursor, len) else {
                break;
            };
            cursor = next;
        }
        Ok(())
    }

    /// The log block of each of the tags at `cursor`.
    fn tagged(&self, cursor: Cursor) -> Vec<(u32, Tag)> {
        let mut at = cursor.at;
        self.tags()
            .map(|tag| {
                at = self.sb.geometry().advance(at, 1);
                (at, tag)
            })
            .collect()
    }

    fn collect_revokes(
        &mut self,
        end: Tid,
    ) -> Result<(FoundRevokes, HashMap<u64, u32>), ReplayError> {
        let mut revokes = FoundRevokes::default();
        let mut youngest = HashMap::new();
        self.walk(end, |log, blocktype, tid, cursor| {
            match blocktype {
                REVOKE_BLOCK => {
                    let found = Revokes::new(&log.block, log.wide, log.csum)
                        .map_err(|source| ReplayError::Revoke { tid, source })?;
                    found.for_each(|block| revokes.insert(block, tid));
                }
                DESCRIPTOR_BLOCK => {
                    for (at, tag) in log.tagged(cursor) {
                        if !log.io.is_home(tag.block) {
                            return Err(ReplayError::BadTag {
                                tid,
                                block: tag.block,
                            });
                        }
                        youngest.insert(tag.block, at);
                    }
                }
                _ => {}
            }
            Ok(())
        })?;
        Ok((revokes, youngest))
    }

    fn replay(
        &mut self,
        end: Tid,
        revokes: &FoundRevokes,
        youngest: &HashMap<u64, u32>,
    ) -> Result<(u64, u64), ReplayError> {
        let (mut written, mut revoked) = (0, 0);
        let mut first = Ok(());
        self.walk(end, |log, blocktype, tid, cursor| {
            if blocktype != DESCRIPTOR_BLOCK {
                return Ok(());
            }
            for (at, tag) in log.tagged(cursor) {
                if revokes.covers(tag.block, tid) {
                    revoked += 1;
                } else if youngest.get(&tag.block) == Some(&at) {
                    match log.copy_home(at, &tag, tid) {
                        Ok(()) => written += 1,
                        Err(error) => first = first.and(Err(error)),
                    }
                }
            }
            Ok(())
        })?;
        first.map(|()| (written, revoked))
    }

    fn copy_home(&mut self, at: u32, tag: &Tag, tid: Tid) -> Result<(), ReplayError> {
        self.read_data(at)?;
        if !self.format.sum_ok(tag, self.csum.tag_sum(tid, &self.data)) {
            return Err(ReplayError::DataChecksum {
                tid,
                block: tag.block,
            });
        }
        if tag.flags.contains(TagFlags::ESCAPE) {
            self.data[..MAGIC_BYTES.len()].copy_from_slice(&MAGIC_BYTES);
        }
        self.io
            .write_home(tag.block, &self.data)
            .map_err(|error| ReplayError::Write {
                block: tag.block,
                error,
            })
    }
}
