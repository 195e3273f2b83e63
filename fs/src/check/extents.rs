//! Extent trees: every node and every extent, and the blocks they take.

use super::dirs::DirBlock;
use super::finding::ExtentFault;
use super::inodes::{Inode, Kind};
use super::{Cx, Finding, State};
use crate::format::csum::crc32c;
use crate::format::extent::{self, Extent, ExtentState, MAGIC, NodeError, RawExtentHeader, room};
use crate::format::features::Incompat;

/// A tree higher than this is not walked.
const MAX_LEVELS: u16 = 8;
/// A file with so many faults in its map is left alone.
const MAX_FAULTS: u32 = 50;

/// What the walk over a file's map has found.
pub(super) struct Walk {
    ino: u32,
    pub(super) is_dir: bool,
    /// Blocks of the file and of its map.
    pub(super) blocks: u64,
    /// The last block of the file that is mapped.
    last: Option<u64>,
    /// The last one that is not unwritten.
    pub(super) last_written: Option<u64>,
    /// The first block that an extent may still map.
    next: u64,
    /// Where the file ends by its size, in blocks.
    size_end: u64,
    faults: u32,
}

impl Walk {
    pub(super) fn new(cx: &Cx<'_>, inode: &Inode<'_>) -> Self {
        Self {
            ino: inode.ino,
            is_dir: inode.kind == Kind::Directory,
            blocks: 0,
            last: None,
            last_written: None,
            next: 0,
            size_end: inode.size.div_ceil(cx.geo.block_size.into()),
            faults: 0,
        }
    }

    /// The block after the last one.
    pub(super) fn end(&self) -> u64 {
        self.last.map_or(0, |last| last + 1)
    }

    /// Whether the counts cannot be trusted.
    pub(super) fn is_damaged(&self) -> bool {
        self.faults > 0
    }

    /// Notes a fault that was told of.
    pub(super) fn note_damage(&mut self) {
        self.faults += 1;
    }

    /// Tells of a fault of the map; `false` after too many.
    pub(super) fn fault(&mut self, state: &mut State, finding: Finding) -> bool {
        state.tell(finding);
        self.faults += 1;
        self.faults < MAX_FAULTS
    }

    /// Notes that blocks of the file are mapped; of a directory each one, and the holes before it.
    /// What another file has, too, is `None`: no directory is longer than the file system.
    pub(super) fn map(&mut self, state: &mut State, lblk: u64, pblk: Option<u64>, len: u64) {
        if self.is_dir {
            if lblk > self.end() {
                let (dir, lblk) = (self.ino, self.end());
                self.fault(state, Finding::DirectoryHole { dir, lblk });
            }
            if let Some(pblk) = pblk {
                let blocks = (0..len).map(|at| DirBlock {
                    lblk: (lblk + at) as u32,
                    pblk: pblk + at,
                });
                state.dir_blocks.extend(blocks);
            }
        }
        self.last = Some(lblk + len - 1);
    }
}

/// Whether bytes begin as a sound node does.
pub(super) fn is_header(bytes: &[u8]) -> bool {
    header_error(bytes, None).is_none()
}

/// As e2fsck: `eh_max` may leave two entries unused.
fn header_error(bytes: &[u8], want: Option<u16>) -> Option<NodeError> {
    let (header, _) = zerocopy::Ref::<_, RawExtentHeader>::from_prefix(bytes).ok()?;
    let (magic, max) = (header.eh_magic.get(), header.eh_max.get());
    let (entries, depth) = (header.eh_entries.get(), header.eh_depth.get());
    let room = room(bytes.len());
    if magic != MAGIC {
        return Some(NodeError::Magic { found: magic });
    }
    if entries > max {
        return Some(NodeError::Entries { entries, max });
    }
    if max > room || max + 2 < room {
        return Some(NodeError::Max { max, room });
    }
    match want {
        Some(want) if want != depth => Some(NodeError::Depth { found: depth, want }),
        _ => None,
    }
}

/// Walks the tree whose root is in the inode.
pub(super) fn walk(cx: &Cx<'_>, state: &mut State, inode: &Inode<'_>, walk: &mut Walk) {
    let root = &inode.raw.i_block;
    let ino = inode.ino;
    if let Some(error) = header_error(root, None) {
        walk.fault(
            state,
            Finding::ExtentNode {
                ino,
                block: 0,
                error,
            },
        );
        return;
    }
    // Not as our own reader takes it: that one refuses what is too deep.
    let depth = u16::from_le_bytes([root[6], root[7]]);
    if depth > MAX_LEVELS || depth > max_depth(cx) {
        let error = NodeError::TooDeep { found: depth };
        let block = 0;
        walk.fault(state, Finding::ExtentNode { ino, block, error });
        if depth > MAX_LEVELS {
            return;
        }
    }
    let mut tree = Tree {
        cx,
        state,
        inode,
        walk,
        above: Vec::new(),
    };
    let end = tree.walk.size_end;
    tree.node(root, depth, 0, None, end);
}

/// As deep as e2fsck takes a tree to be useful.
fn max_depth(cx: &Cx<'_>) -> u16 {
    let per_block = (cx.geo.block_size - 12) / 12;
    // 2^32 blocks, of which the root tells 4 apart.
    let levels = 1 + (31 - 2) / per_block.ilog2();
    u16::try_from(levels).unwrap_or(MAX_LEVELS)
}

struct Tree<'a, 'b> {
    cx: &'a Cx<'b>,
    state: &'a mut State,
    inode: &'a Inode<'b>,
    walk: &'a mut Walk,
    /// The nodes above.
    above: Vec<u64>,
}

impl Tree<'_, '_> {
    /// Walks a node with a sound header. `first` is where it may start, `last` the last block that
    /// the index above gives it, `end` where that index ends. `false` ends the walk.
    fn node(&mut self, bytes: &[u8], depth: u16, first: u64, last: Option<u64>, end: u64) -> bool {
        let Ok(node) = entries(bytes) else {
            return false;
        };
        if depth == 0 {
            let mut start = first;
            return node.chunks_exact(12).all(|entry| {
                let it = decode(entry);
                let goes_on = self.extent(&it, start, last);
                start = start.max(it.end().saturating_sub(1));
                goes_on
            });
        }
        let count = node.len() / 12;
        (0..count).all(|index| {
            let entry = &node[index * 12..][..12];
            let (lblk, pblk) = child(entry);
            let next = node.get((index + 1) * 12..).filter(|rest| rest.len() >= 12);
            let upto = next.map_or(end, |next| child(next).0.into());
            // As e2fsck: a length of 32 bits, so that an index past the end of the file bounds
            // nothing.
            let len = (upto as u32).wrapping_sub(lblk);
            let child_last = (u64::from(lblk) + u64::from(len)).wrapping_sub(1);
            self.index((lblk, pblk), depth, (first, last), (child_last, upto))
        })
    }

    fn tell(&mut self, it: &Extent, fault: ExtentFault) -> bool {
        let ino = self.inode.ino;
        let finding = Finding::Extent {
            ino,
            lblk: it.lblk,
            len: it.len,
            pblk: it.pblk,
            fault,
        };
        self.walk.fault(self.state, finding)
    }

    fn index(
        &mut self,
        (lblk, pblk): (u32, u64),
        depth: u16,
        (first, last): (u64, Option<u64>),
        (child_last, upto): (u64, u64),
    ) -> bool {
        let it = Extent {
            lblk,
            len: 0,
            pblk,
            state: ExtentState::Written,
        };
        let ino = self.inode.ino;
        if !self.cx.holds(pblk, 1) || pblk == 0 {
            return self.tell(&it, ExtentFault::Outside);
        }
        if u64::from(lblk) < first {
            return self.tell(&it, ExtentFault::Order);
        }
        let is_past = last.is_some_and(|last| last != 0 && child_last > last);
        if is_past && !self.is_past_end(child_last, ExtentState::Written) {
            return self.tell(&it, ExtentFault::PastIndex);
        }
        if self.above.contains(&pblk) {
            return self.tell(&it, ExtentFault::Cycle);
        }
        if !self.state.claim(ino, pblk) {
            self.walk.faults += 1;
            return true;
        }
        self.walk.blocks += 1;
        let mut bytes = vec![0; self.cx.block_size()];
        if !self.cx.read(self.state, pblk, &mut bytes) {
            self.walk.faults += 1;
            return true;
        }
        match header_error(&bytes, Some(depth - 1)) {
            None => {}
            Some(error) => {
                let block = pblk;
                let finding = Finding::ExtentNode { ino, block, error };
                if !matches!(error, NodeError::Depth { .. }) {
                    return self.walk.fault(self.state, finding);
                }
                // e2fsck goes by the height of the root alone.
                self.state.tell(finding);
            }
        }
        let node = entries(&bytes).unwrap_or(&[]);
        if node.is_empty() {
            let (block, error) = (pblk, NodeError::Empty);
            let finding = Finding::ExtentNode { ino, block, error };
            return self.walk.fault(self.state, finding);
        }
        self.check_sum(pblk, &bytes);
        let start = if depth == 1 {
            decode(node).lblk
        } else {
            child(node).0
        };
        if start != lblk && !self.tell(&it, ExtentFault::IndexStart) {
            return false;
        }
        self.above.push(pblk);
        let goes_on = self.node(&bytes, depth - 1, start.into(), Some(child_last), upto);
        self.above.pop();
        goes_on
    }

    fn check_sum(&mut self, block: u64, bytes: &[u8]) {
        if !self.cx.geo.metadata_csum() {
            return;
        }
        // The header is sound: eh_max leaves room for the tail.
        let at = 12 + 12 * usize::from(u16::from_le_bytes([bytes[4], bytes[5]]));
        let Some(tail) = bytes.get(at..at + 4) else {
            return;
        };
        let want = crc32c(self.inode.seed, &bytes[..at]);
        let found = u32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]);
        if found != want {
            let ino = self.inode.ino;
            self.state.tell(Finding::ExtentChecksum {
                ino,
                block,
                found,
                want,
            });
        }
    }

    /// Blocks past the end of the file may be there where they are unwritten.
    fn is_past_end(&self, last: u64, state: ExtentState) -> bool {
        let is_past = last.wrapping_add(1) > self.walk.size_end;
        let is_verity = self
            .inode
            .flags
            .contains(crate::format::inode::InodeFlags::VERITY);
        is_past && (state == ExtentState::Unwritten || is_verity)
    }

    fn extent(&mut self, it: &Extent, start: u64, last: Option<u64>) -> bool {
        let (lblk, len) = (u64::from(it.lblk), u64::from(it.len));
        let it_last = (lblk + len).wrapping_sub(1);
        let fault = if it.pblk == 0 || !self.cx.holds(it.pblk, 1) {
            Some(ExtentFault::Outside)
        } else if lblk < start {
            Some(ExtentFault::Order)
        } else if last.is_some_and(|last| last != 0 && it_last > last)
            && !self.is_past_end(it_last, it.state)
        {
            Some(ExtentFault::PastIndex)
        } else if len == 0 {
            Some(ExtentFault::Empty)
        } else if !self.cx.holds(it.pblk, len) {
            Some(ExtentFault::EndsOutside)
        } else if self.is_too_large(lblk + len) {
            Some(ExtentFault::DirectoryTooLarge)
        } else if lblk < self.walk.next {
            Some(ExtentFault::Collision)
        } else {
            None
        };
        if let Some(fault) = fault {
            return self.tell(it, fault);
        }
        self.walk.next = lblk + len;
        let is_unwritten = it.state == ExtentState::Unwritten;
        if self.walk.is_dir && is_unwritten && !self.tell(it, ExtentFault::Unwritten) {
            return false;
        }
        let is_claimed = self.state.claim_range(self.inode.ino, it.pblk, len);
        self.walk.blocks += len;
        let pblk = is_claimed.then_some(it.pblk);
        self.walk.map(self.state, lblk, pblk, len);
        if !self.walk.is_dir && !is_unwritten {
            self.walk.last_written = Some(it_last);
        }
        true
    }

    fn is_too_large(&self, end: u64) -> bool {
        let geo = self.cx.geo;
        self.walk.is_dir
            && self.inode.raw.i_size_high.get() == 0
            && !geo.incompat.contains(Incompat::LARGEDIR)
            && end > 1 << (21 - (geo.block_bits - 10))
    }
}

/// The bytes of a node's entries.
fn entries(bytes: &[u8]) -> Result<&[u8], NodeError> {
    let short = NodeError::Short { len: bytes.len() };
    let (header, rest) =
        zerocopy::Ref::<_, RawExtentHeader>::from_prefix(bytes).map_err(|_error| short)?;
    let count = usize::from(header.eh_entries.get());
    rest.get(..count * 12).ok_or(short)
}

fn decode(entry: &[u8]) -> Extent {
    let word = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
    let long = |at: usize| u32::from(word(at)) | u32::from(word(at + 2)) << 16;
    let len = u32::from(word(4));
    let (len, state) = if len > extent::WRITTEN_MAX_LEN {
        (len - extent::WRITTEN_MAX_LEN, ExtentState::Unwritten)
    } else {
        (len, ExtentState::Written)
    };
    Extent {
        lblk: long(0),
        len,
        pblk: u64::from(long(8)) | u64::from(word(6)) << 32,
        state,
    }
}

fn child(entry: &[u8]) -> (u32, u64) {
    let word = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
    let long = |at: usize| u32::from(word(at)) | u32::from(word(at + 2)) << 16;
    (long(0), u64::from(long(4)) | u64::from(word(8)) << 32)
}
