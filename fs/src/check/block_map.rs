//! Block maps: pointers, and blocks of pointers up to three levels high.

use super::extents::Walk;
use super::inodes::{Inode, Kind, RESIZE_INO};
use super::superblock::words;
use super::{Cx, Finding, State};
use crate::format::features::Incompat;

/// Pointers in the inode that lead to blocks of the file itself.
const DIRECT: u64 = 12;
const BAD_BLOCKS_INO: u32 = 1;

/// The largest file a block map can hold.
pub(super) fn max_size(block_bits: u32) -> u64 {
    let per_block = 1u64 << (block_bits - 2);
    let blocks = DIRECT + per_block + per_block.pow(2) + per_block.pow(3);
    blocks << block_bits
}

/// Walks the map whose pointers are in the inode.
pub(super) fn walk(cx: &Cx<'_>, state: &mut State, inode: &Inode<'_>, walk: &mut Walk) {
    let per_block = u64::from(cx.geo.block_size / 4);
    let mut map = Map {
        cx,
        state,
        inode,
        walk,
        buffers: Default::default(),
    };
    let mut lblk = 0;
    for (index, pblk) in words(&inode.raw.i_block).enumerate() {
        let depth = (index as u32).saturating_sub(11);
        if pblk != 0 && !map.pointer(pblk.into(), depth, lblk) {
            return;
        }
        lblk += per_block.pow(depth);
    }
    if map.walk.is_dir && map.walk.blocks > 0 && map.walk.end() == 0 {
        let dir = inode.ino;
        map.state.tell(Finding::DirectoryHole { dir, lblk: 0 });
    }
    if !map.walk.is_dir && map.walk.end() > 0 {
        map.walk.last_written = Some(map.walk.end() - 1);
    }
}

struct Map<'a, 'b> {
    cx: &'a Cx<'b>,
    state: &'a mut State,
    inode: &'a Inode<'b>,
    walk: &'a mut Walk,
    /// A block of pointers for each level.
    buffers: [Vec<u8>; 4],
}

impl Map<'_, '_> {
    /// Follows a pointer that is not 0; `depth` is 0 for a block of the file. `false` ends the walk.
    fn pointer(&mut self, pblk: u64, depth: u32, lblk: u64) -> bool {
        let ino = self.inode.ino;
        if !self.cx.holds(pblk, 1) {
            let finding = Finding::BlockOutside { ino, lblk, pblk };
            return self.walk.fault(self.state, finding);
        }
        if self.is_too_many(depth, lblk) {
            let finding = Finding::TooManyBlocks { ino, lblk };
            return self.walk.fault(self.state, finding);
        }
        self.walk.blocks += 1;
        // Everything else of the resize inode is metadata of the groups, checked with them.
        let is_claimed = if ino != RESIZE_INO || depth >= 2 {
            self.state.claim(ino, pblk)
        } else {
            true
        };
        if depth == 0 {
            let pblk = is_claimed.then_some(pblk);
            self.walk.map(self.state, lblk, pblk, 1);
            return true;
        }
        if !is_claimed {
            // Who has it already may have walked it, too.
            self.walk.note_damage();
            return true;
        }
        self.block(pblk, depth, lblk)
    }

    fn block(&mut self, pblk: u64, depth: u32, mut lblk: u64) -> bool {
        let mut bytes = std::mem::take(&mut self.buffers[depth as usize]);
        bytes.resize(self.cx.block_size(), 0);
        let per_block = u64::from(self.cx.geo.block_size / 4);
        let mut goes_on = true;
        if self.cx.read(self.state, pblk, &mut bytes) {
            for pointer in words(&bytes) {
                if pointer != 0 && !self.pointer(pointer.into(), depth - 1, lblk) {
                    goes_on = false;
                    break;
                }
                lblk += per_block.pow(depth - 1);
            }
        }
        self.buffers[depth as usize] = bytes;
        goes_on
    }

    fn is_too_many(&self, depth: u32, lblk: u64) -> bool {
        let geo = self.cx.geo;
        let log_size = geo.block_bits - 10;
        let most = 1u64 << (31 - log_size);
        let large_dir = geo.incompat.contains(Incompat::LARGEDIR);
        let is_data = depth == 0;
        if self.walk.blocks >= geo.blocks_count {
            return true;
        }
        match self.inode.kind {
            Kind::Directory => {
                let has_high = self.inode.raw.i_size_high.get() != 0;
                let is_past = is_data && lblk > 1 << (21 - log_size);
                (!large_dir && !has_high && is_past) || self.walk.blocks + 1 >= most
            }
            Kind::File => self.walk.blocks + 1 >= most,
            Kind::Link | Kind::Special | Kind::Unknown => {
                self.inode.ino != BAD_BLOCKS_INO && is_data && lblk > 0
            }
        }
    }
}
