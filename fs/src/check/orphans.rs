//! Inodes that a crash left to be deleted or truncated: the list and the file.

use zerocopy::FromBytes;

use super::{Cx, Finding, State, groups, runs};
use crate::format::csum::crc32c;
use crate::format::features::{Compat, RoCompat};
use crate::format::inode::{RawInode, inode_csum_seed};

const TAIL_MAGIC: u32 = 0x0b10_ca04;
const TAIL_LEN: usize = 8;

/// Notes who is listed; what is to become of each is told when its inode is looked at.
pub(super) fn find(cx: &Cx<'_>, state: &mut State) {
    walk_list(cx, state);
    if cx.geo.compat.contains(Compat::ORPHAN_FILE) {
        walk_file(cx, state);
    } else if cx.geo.ro_compat.contains(RoCompat::ORPHAN_PRESENT) {
        state.tell(Finding::OrphanPresent);
    }
}

fn read(cx: &Cx<'_>, state: &mut State, ino: u32) -> Option<RawInode> {
    let mut bytes = vec![0; usize::from(cx.geo.inode_size)];
    if !groups::read_inode(cx, state, ino, &mut bytes) {
        return None;
    }
    RawInode::read_from_prefix(&bytes).ok().map(|(raw, _)| raw)
}

fn walk_list(cx: &Cx<'_>, state: &mut State) {
    let mut next = cx.raw.s_last_orphan.get();
    while next != 0 {
        let ino = next;
        let is_listed = state.inos.listed.has(ino.into());
        let mut tell = |what| state.tell(Finding::OrphanList { ino, what });
        if ino < cx.geo.first_ino || ino > cx.geo.inodes_count {
            tell("no inode that may be an orphan");
            return;
        }
        if is_listed {
            tell("a loop");
            return;
        }
        let Some(raw) = read(cx, state, ino) else {
            return;
        };
        if raw.i_mode.get() == 0 {
            state.tell(Finding::OrphanList {
                ino,
                what: "a free inode",
            });
            return;
        }
        note(state, ino, &raw);
        next = raw.i_dtime.get();
    }
}

fn note(state: &mut State, ino: u32, raw: &RawInode) {
    state.inos.listed.add(ino.into());
    if raw.i_links_count.get() == 0 {
        state.inos.orphans.add(ino.into());
    }
}

fn walk_file(cx: &Cx<'_>, state: &mut State) {
    let ino = cx.geo.orphan_file_inum;
    let Some(raw) = read(cx, state, ino) else {
        let what = "s_orphan_file_inum is no inode";
        state.tell(Finding::OrphanFile { lblk: 0, what });
        return;
    };
    let size = u64::from(raw.i_size_lo.get()) | u64::from(raw.i_size_high.get()) << 32;
    let count = size >> cx.geo.block_bits;
    if size % u64::from(cx.geo.block_size) != 0 || count > cx.geo.blocks_count {
        let what = "i_size is not a number of blocks";
        state.tell(Finding::OrphanFile { lblk: 0, what });
        return;
    }
    let mut bytes = vec![0; usize::from(cx.geo.inode_size)];
    if !groups::read_inode(cx, state, ino, &mut bytes) {
        return;
    }
    let runs = match runs::of_inode(cx, ino, &bytes, count) {
        Ok(runs) => runs,
        Err(what) => {
            state.tell(Finding::OrphanFile { lblk: 0, what });
            return;
        }
    };
    let seed = inode_csum_seed(cx.geo.csum_seed, ino, raw.i_generation.get());
    let mut block = vec![0; cx.block_size()];
    let mut found = 0;
    for lblk in 0..count {
        let Some(pblk) = runs::locate(&runs, lblk) else {
            return;
        };
        if cx.read(state, pblk, &mut block) {
            found += walk_block(cx, state, (lblk, pblk), seed, &block);
        }
    }
    if found == 0 && cx.geo.ro_compat.contains(RoCompat::ORPHAN_PRESENT) {
        state.tell(Finding::OrphanFileClean);
    }
}

/// Gives how many entries are used.
fn walk_block(
    cx: &Cx<'_>,
    state: &mut State,
    (lblk, pblk): (u64, u64),
    seed: u32,
    block: &[u8],
) -> u32 {
    let (entries, tail) = block.split_at(block.len() - TAIL_LEN);
    let mut words = super::superblock::words(tail);
    let (magic, csum) = (words.next(), words.next());
    if magic != Some(TAIL_MAGIC) {
        let what = "ob_magic is wrong";
        state.tell(Finding::OrphanFile { lblk, what });
        return 0;
    }
    let want = crc32c(crc32c(seed, &pblk.to_le_bytes()), entries);
    if cx.geo.metadata_csum() && csum != Some(want) {
        let what = "ob_checksum is wrong";
        state.tell(Finding::OrphanFile { lblk, what });
    }
    let mut found = 0;
    for ino in super::superblock::words(entries).filter(|&ino| ino != 0) {
        found += 1;
        let is_listed = state.inos.listed.has(ino.into());
        let mut tell = |what| state.tell(Finding::OrphanFile { lblk, what });
        if !cx.geo.ro_compat.contains(RoCompat::ORPHAN_PRESENT) {
            tell("an entry without orphan_present");
            continue;
        }
        if ino < cx.geo.first_ino || ino > cx.geo.inodes_count {
            tell("an entry that is no inode");
            continue;
        }
        if is_listed {
            tell("an inode that is listed twice");
            continue;
        }
        if let Some(raw) = read(cx, state, ino) {
            note(state, ino, &raw);
        }
    }
    found
}
