//! The journal: its inode, its superblock, and the replay of what it holds into memory.

use blockstack::{BlkError, BlkResult};
use zerocopy::FromBytes;

use super::groups::{self, Group};
use super::runs::{self, FileRun};
use super::source::{Blocks, Overlay, Source};
use super::{Cx, Finding, State};
use crate::format::features::{Compat, Incompat};
use crate::format::inode::{InodeFlags, RawInode, inode_csum_seed, verify_inode};
use crate::format::jbd2::{
    self, DEFAULT_FC_BLOCKS, JournalSuperblock, MIN_JOURNAL_BLOCKS, RawJournalSuperblock,
    SUPERBLOCK_V1,
};
use crate::format::superblock::RawSuperblock;
use crate::geometry::Geometry;
use crate::journal::replay::{ReplayIo, Replayed, replay as replay_log};

/// `s_jnl_backup_type`: `s_jnl_blocks` holds the journal's map.
const BACKUP_BLOCKS: u8 = 1;

/// Checks the journal and replays it into `overlay`; `None` where nothing can be said about what
/// the file system will be.
pub(super) fn replay(
    source: &dyn Source,
    overlay: &mut Overlay,
    geo: &Geometry,
    raw: &RawSuperblock,
    state: &mut State,
) -> Option<()> {
    let has_journal = geo.compat.contains(Compat::HAS_JOURNAL);
    let needs_recovery = geo.incompat.contains(Incompat::RECOVER);
    let is_external = raw.s_journal_uuid != [0; 16];
    if !has_journal && !needs_recovery && geo.journal_inum == 0 && !is_external {
        return Some(());
    }
    if is_external {
        state.tell(Finding::JournalField {
            field: "s_journal_uuid",
            value: u64::from(raw.s_journal_dev.get()),
        });
        return None;
    }
    let Some((log, sb)) = open(source, overlay, geo, raw, state) else {
        // Without a log to replay the rest can be judged as it is.
        return (!needs_recovery).then_some(());
    };
    if !has_journal {
        let field = if needs_recovery {
            "s_feature_incompat (needs_recovery without has_journal)"
        } else {
            "s_journal_inum (without has_journal)"
        };
        let value = geo.journal_inum.into();
        state.tell(Finding::JournalField { field, value });
    }
    if needs_recovery {
        if sb.start().is_some() {
            return run(source, overlay, geo, state, &log, &sb);
        }
        return Some(());
    }
    if has_journal && sb.start().is_some() {
        state.tell(Finding::JournalNotEmpty);
    }
    if sb.errno() != 0 {
        let errno = sb.errno();
        state.tell(Finding::JournalErrno { errno });
    }
    Some(())
}

/// Finds the journal and reads its superblock.
fn open(
    source: &dyn Source,
    overlay: &Overlay,
    geo: &Geometry,
    raw: &RawSuperblock,
    state: &mut State,
) -> Option<(Vec<FileRun>, JournalSuperblock)> {
    let cx = Cx {
        blocks: Blocks {
            source,
            overlay,
            block_size: geo.block_size as usize,
        },
        geo,
        raw,
    };
    let ino = geo.journal_inum;
    let mut groups = Vec::new();
    if let Err(error) = groups::load(&cx, &mut groups) {
        state.tell(error);
        return None;
    }
    let needs_recovery = geo.incompat.contains(Incompat::RECOVER);
    // The log may hold a better descriptor, but not of the group that the log itself needs.
    let group = ino
        .checked_sub(1)
        .map_or(0, |index| index / geo.inodes_per_group);
    let desc = groups.get(group as usize);
    if needs_recovery && desc.is_some_and(|desc| !groups::has_table(geo, desc)) {
        groups::check_places(geo, group, &groups[group as usize], state);
        return None;
    }
    let found = inode(&cx, &groups, ino).and_then(|bytes| file(&cx, ino, &bytes));
    let log = match found {
        Ok(log) => log,
        Err(what) => {
            let has_copy = raw.s_jnl_backup_type == BACKUP_BLOCKS;
            let log = has_copy
                .then(|| file(&cx, ino, &backup(raw)).ok())
                .flatten();
            state.tell(Finding::JournalInode {
                ino,
                what,
                has_backup: log.is_some(),
            });
            log?
        }
    };
    let mut block = vec![0; cx.block_size()];
    let pblk = runs::locate(&log, 0)?;
    if !cx.read(state, pblk, &mut block) {
        return None;
    }
    check_fields(&block, state);
    let count = log.last().map_or(0, |run| run.lblk + run.len);
    match JournalSuperblock::parse(&block, geo.block_size, count) {
        Ok(sb) => Some((log, sb)),
        Err(error) => {
            state.tell(Finding::JournalSuper {
                error,
                needs_recovery,
            });
            None
        }
    }
}

fn inode(cx: &Cx<'_>, groups: &[Group], ino: u32) -> Result<Vec<u8>, &'static str> {
    let (block, at) = groups::inode_at(cx.geo, groups, ino).ok_or("no such inode")?;
    let mut bytes = vec![0; cx.block_size()];
    let res = cx.blocks.read(block, &mut bytes);
    res.map_err(|_error| "it cannot be read")?;
    bytes.drain(..at);
    bytes.truncate(cx.geo.inode_size.into());
    let (raw, _) = RawInode::read_from_prefix(&bytes).map_err(|_error| "no inode")?;
    let seed = inode_csum_seed(cx.geo.csum_seed, ino, raw.i_generation.get());
    if cx.geo.metadata_csum() && verify_inode(seed, &bytes).is_err() {
        return Err("i_checksum is wrong");
    }
    Ok(bytes)
}

/// The blocks of a journal's file.
fn file(cx: &Cx<'_>, ino: u32, bytes: &[u8]) -> Result<Vec<FileRun>, &'static str> {
    let (raw, _) = RawInode::read_from_prefix(bytes).map_err(|_error| "no inode")?;
    if raw.i_links_count.get() == 0 {
        return Err("i_links_count is 0");
    }
    if u32::from(raw.i_mode.get()) & libc::S_IFMT != libc::S_IFREG {
        return Err("i_mode is no regular file's");
    }
    if InodeFlags::from_bits_retain(raw.i_flags.get()).contains(InodeFlags::ENCRYPT) {
        return Err("i_flags say encrypted");
    }
    let size = u64::from(raw.i_size_lo.get()) | u64::from(raw.i_size_high.get()) << 32;
    let count = size.div_ceil(cx.geo.block_size.into());
    if size >> cx.geo.block_bits < MIN_JOURNAL_BLOCKS.into() {
        return Err("i_size is too small");
    }
    if count > cx.geo.blocks_count {
        return Err("i_size is larger than the file system");
    }
    let mut runs = runs::of_inode(cx, ino, bytes, count)?;
    // What lies past the end is no part of the journal.
    while let Some(run) = runs.last_mut() {
        if run.lblk >= count {
            runs.pop();
        } else {
            run.len = run.len.min(count - run.lblk);
            break;
        }
    }
    Ok(runs)
}

/// An inode made of the copy of its map in the superblock; as in e2fsck, only of a block map.
fn backup(raw: &RawSuperblock) -> Vec<u8> {
    let mut bytes = vec![0; 128];
    let words = raw.s_jnl_blocks.map(|word| word.get());
    bytes[0..2].copy_from_slice(&0o100_600_u16.to_le_bytes());
    bytes[4..8].copy_from_slice(&words[16].to_le_bytes());
    bytes[0x6c..0x70].copy_from_slice(&words[15].to_le_bytes());
    bytes[0x1a..0x1c].copy_from_slice(&1_u16.to_le_bytes());
    for (out, word) in bytes[0x28..0x64].chunks_exact_mut(4).zip(words) {
        out.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// Fields that the log's reader does not need.
fn check_fields(block: &[u8], state: &mut State) {
    let Ok((raw, _)) = RawJournalSuperblock::read_from_prefix(block) else {
        return;
    };
    let maxlen = raw.s_maxlen.get();
    let fc = match raw.s_num_fc_blks.get() {
        0 => DEFAULT_FC_BLOCKS,
        fc => fc,
    };
    let has_fc = raw.s_feature_incompat.get() & jbd2::Incompat::FAST_COMMIT.bits() != 0;
    if has_fc && maxlen.saturating_sub(fc) < MIN_JOURNAL_BLOCKS {
        let (field, value) = ("s_num_fc_blks", fc.into());
        state.tell(Finding::JournalField { field, value });
    }
    let is_v1 = raw.s_header.h_blocktype.get() == SUPERBLOCK_V1;
    let features = raw.s_feature_compat.get()
        | raw.s_feature_incompat.get()
        | raw.s_feature_ro_compat.get()
        | raw.s_nr_users.get();
    if is_v1 && features != 0 {
        let field = "features of a version 1 superblock";
        let value = features.into();
        state.tell(Finding::JournalField { field, value });
    }
    if !is_v1 && raw.s_nr_users.get() > 1 {
        let (field, value) = ("s_nr_users", raw.s_nr_users.get().into());
        state.tell(Finding::JournalField { field, value });
    }
}

fn run(
    source: &dyn Source,
    overlay: &mut Overlay,
    geo: &Geometry,
    state: &mut State,
    log: &[FileRun],
    sb: &JournalSuperblock,
) -> Option<()> {
    let mut io = MemoryReplay {
        source,
        overlay,
        log,
        geo,
    };
    match replay_log(sb, &mut io, geo.block_size as usize) {
        Ok(Replayed {
            transactions,
            blocks,
            ..
        }) => {
            state.tell(Finding::ReplayPending {
                transactions,
                blocks,
            });
            Some(())
        }
        Err(error) => {
            state.tell(Finding::JournalReplay(error));
            None
        }
    }
}

/// Reads the log, and keeps what belongs home in memory.
struct MemoryReplay<'a> {
    source: &'a dyn Source,
    overlay: &'a mut Overlay,
    log: &'a [FileRun],
    geo: &'a Geometry,
}

impl ReplayIo for MemoryReplay<'_> {
    fn read_log(&mut self, log_block: u32, out: &mut [u8]) -> BlkResult {
        let pblk = runs::locate(self.log, log_block.into()).ok_or(BlkError::OutOfRange)?;
        self.source.read_at(pblk << self.geo.block_bits, out)
    }

    fn write_home(&mut self, block: u64, data: &[u8]) -> BlkResult {
        self.overlay.put(block, data);
        Ok(())
    }

    fn is_home(&self, block: u64) -> bool {
        let in_log = |run: &FileRun| block >= run.pblk && block - run.pblk < run.len;
        block < self.geo.blocks_count && !self.log.iter().any(in_log)
    }
}
