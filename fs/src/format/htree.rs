//! The index of a directory: root, inner nodes, checksum tail, name hashes. Bytes only, no I/O.
//!
//! Format: Linux `Documentation/filesystems/ext4/directory.rst`, section "Hash Tree Directories".
//!
//! An index block is an array of (hash, block), ascending; an entry covers the hashes from its
//! own up to the next one's. The first entry's hash is not stored (it is the least there is); in
//! its place stand the array's limit and count. Bit 0 of a hash says that names with the same
//! hash may also be in the block before.

pub mod hash;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::format::dirent::{
    self, DirLayout, Dirent, DirentError, Dots, HEADER_LEN, MIN_REC_LEN, needed_len,
};
pub use hash::{CharSign, HashKind, Hasher, NameHash};

/// One index entry; in the first of a block `hash` holds limit (low half) and count (high half).
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawDxEntry {
    /// Least hash below this entry, bit 0 set if it continues from the block before.
    pub hash: U32,
    /// Logical block of the directory.
    pub block: U32,
}
const _: () = assert!(size_of::<RawDxEntry>() == ENTRY_LEN);

/// What stands behind "." and ".." in the root.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawDxRootInfo {
    /// 0.
    pub reserved_zero: U32,
    /// See [`HashKind`].
    pub hash_version: u8,
    /// 8.
    pub info_length: u8,
    /// Levels of nodes between root and leaves.
    pub indirect_levels: u8,
    /// 0.
    pub unused_flags: u8,
}
const _: () = assert!(size_of::<RawDxRootInfo>() == 8);

/// Behind the entries of an index block when directory blocks are checksummed.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawDxTail {
    /// Unused, but part of the checksum.
    pub dt_reserved: U32,
    /// crc32c of the inode's seed, the block up to the last used entry, and the tail with zero
    /// in this place.
    pub dt_checksum: U32,
}
const _: () = assert!(size_of::<RawDxTail>() == DX_TAIL_LEN);

const ENTRY_LEN: usize = 8;
/// Bytes of [`RawDxTail`].
pub const DX_TAIL_LEN: usize = 8;
/// Where the info of a root begins: behind "." and "..", 12 bytes each.
const INFO_AT: usize = 24;
/// Where the entries of a root begin.
const ROOT_ENTRIES: usize = 32;
/// Where the entries of a node begin: behind one unused directory entry.
const NODE_ENTRIES: usize = HEADER_LEN;
/// The high bits of a block number are reserved.
const BLOCK_MASK: u32 = 0x0fff_ffff;

/// What can be wrong with an index block; the caller adds block and inode number.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum DxError {
    /// "." and ".." of the root are not where they belong.
    #[error("index root: \".\" and \"..\" are damaged")]
    Dots,
    /// The root's info has an unknown length or a reserved field is used.
    #[error("index root: info_length {info_length}, unused_flags {unused_flags}")]
    Info {
        /// As found.
        info_length: u8,
        /// As found.
        unused_flags: u8,
    },
    /// The hash function does not exist.
    #[error("index root: unknown hash version {version}")]
    HashVersion {
        /// As found.
        version: u8,
    },
    /// The tree is deeper than the file system allows.
    #[error("index root: {levels} levels")]
    Levels {
        /// As found.
        levels: u8,
    },
    /// A node does not begin with an unused entry as long as the block.
    #[error("index node: does not look like one")]
    NotANode,
    /// The size of the array is not what the block holds.
    #[error("index block: limit {limit}, expected {want}")]
    Limit {
        /// As found.
        limit: u16,
        /// What it must be.
        want: u16,
    },
    /// There are no entries, or more than fit.
    #[error("index block: {count} entries of {limit}")]
    Count {
        /// As found.
        count: u16,
        /// How many fit.
        limit: u16,
    },
    /// An entry leads outside the directory, or to the root.
    #[error("index block: entry {index} leads to block {lblk}")]
    Block {
        /// Which entry.
        index: usize,
        /// As found.
        lblk: u32,
    },
    /// The hashes do not ascend.
    #[error("index block: the hash of entry {index} is out of order")]
    Order {
        /// Which entry.
        index: usize,
    },
}

impl DxError {
    /// Names the check that failed, without its numbers.
    pub fn what(&self) -> &'static str {
        match self {
            Self::Dots => "directory index root: \".\" and \"..\"",
            Self::Info { .. } => "directory index root: info",
            Self::HashVersion { .. } => "directory index root: hash version",
            Self::Levels { .. } => "directory index root: levels",
            Self::NotANode => "directory index node: shape",
            Self::Limit { .. } => "directory index: limit",
            Self::Count { .. } => "directory index: count",
            Self::Block { .. } => "directory index: block number",
            Self::Order { .. } => "directory index: hash order",
        }
    }
}

/// Where an index block stands in its tree.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum DxKind {
    /// Block 0.
    Root,
    /// Any other.
    Node,
}

impl DxKind {
    /// Returns where the entries begin.
    pub fn entries_at(self) -> usize {
        match self {
            Self::Root => ROOT_ENTRIES,
            Self::Node => NODE_ENTRIES,
        }
    }

    /// Returns how many entries a block of this kind holds.
    pub fn limit(self, layout: DirLayout) -> u16 {
        let tail = if layout.tail { DX_TAIL_LEN } else { 0 };
        let space = layout.block_size - self.entries_at() - tail;
        u16::try_from(space / ENTRY_LEN).unwrap_or(u16::MAX)
    }
}

/// Tells an index block from a leaf by its content, for blocks that end in checksum tails only:
/// no leaf entry can reach into its tail, but the entries that cover an index do.
pub fn kind_by_content(block: &[u8], layout: DirLayout) -> Option<DxKind> {
    let rec_len = |at: usize| {
        let raw = block.get(at + 4..at + 6)?;
        Some(layout.decode_rec_len(u16::from_le_bytes(raw.try_into().ok()?)))
    };
    let first = rec_len(0)?;
    if first == layout.block_size {
        return Some(DxKind::Node);
    }
    if first != MIN_REC_LEN || rec_len(MIN_REC_LEN)? != layout.block_size - MIN_REC_LEN {
        return None;
    }
    let (info, _) = RawDxRootInfo::ref_from_prefix(block.get(INFO_AT..)?).ok()?;
    (info.reserved_zero.get() == 0 && info.info_length == 8).then_some(DxKind::Root)
}

/// What the root says about its tree.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DxRoot {
    /// Hash function of this directory.
    pub hash: HashKind,
    /// Levels of nodes between root and leaves.
    pub levels: u8,
}

/// Reads and checks the root's info; `max_levels` is the highest `indirect_levels` allowed.
///
/// # Errors
/// Names the first check that fails.
pub fn root_info(block: &[u8], layout: DirLayout, max_levels: u8) -> Result<DxRoot, DxError> {
    let dot = layout.entry(block, 0, layout.block_size);
    let dotdot = layout.entry(block, MIN_REC_LEN, layout.block_size);
    let (Ok(dot), Ok(dotdot)) = (dot, dotdot) else {
        return Err(DxError::Dots);
    };
    let covers = dotdot.rec_len == layout.block_size - MIN_REC_LEN;
    if dot.name != b"." || dot.rec_len != MIN_REC_LEN || dotdot.name != b".." || !covers {
        return Err(DxError::Dots);
    }
    let Ok((info, _)) = RawDxRootInfo::ref_from_prefix(&block[INFO_AT..]) else {
        return Err(DxError::Dots);
    };
    if info.info_length != 8 || info.unused_flags & 1 != 0 {
        let (info_length, unused_flags) = (info.info_length, info.unused_flags);
        return Err(DxError::Info {
            info_length,
            unused_flags,
        });
    }
    let Some(hash) = HashKind::from_raw(info.hash_version) else {
        return Err(DxError::HashVersion {
            version: info.hash_version,
        });
    };
    if info.indirect_levels > max_levels {
        return Err(DxError::Levels {
            levels: info.indirect_levels,
        });
    }
    Ok(DxRoot {
        hash,
        levels: info.indirect_levels,
    })
}

/// The entries of one index block, limit and count checked.
#[derive(Clone, Copy, Debug)]
pub struct DxEntries<'a> {
    entries: &'a [RawDxEntry],
    limit: u16,
    blocks: u32,
}

impl<'a> DxEntries<'a> {
    /// Checks the shape of an index block of a directory of `blocks` blocks.
    ///
    /// # Errors
    /// Names the first check that fails.
    pub fn new(
        block: &'a [u8],
        kind: DxKind,
        layout: DirLayout,
        blocks: u32,
    ) -> Result<Self, DxError> {
        if kind == DxKind::Node {
            let (ino, rest) = block.split_at(4);
            let rec_len = layout.decode_rec_len(u16::from_le_bytes([rest[0], rest[1]]));
            if ino != [0; 4] || rec_len != layout.block_size {
                return Err(DxError::NotANode);
            }
        }
        let want = kind.limit(layout);
        let at = kind.entries_at();
        let space = &block[at..at + usize::from(want) * ENTRY_LEN];
        let Ok(all) = <[RawDxEntry]>::ref_from_bytes(space) else {
            return Err(DxError::NotANode);
        };
        let (limit, count) = split_count(all[0].hash.get());
        if limit != want {
            return Err(DxError::Limit { limit, want });
        }
        if count == 0 || count > limit {
            return Err(DxError::Count { count, limit });
        }
        Ok(Self {
            entries: &all[..usize::from(count)],
            limit,
            blocks,
        })
    }

    /// Returns the number of entries, at least 1.
    #[expect(
        clippy::len_without_is_empty,
        reason = "never empty, checked when made"
    )]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Returns whether there is no room for one more.
    pub fn is_full(&self) -> bool {
        self.entries.len() == usize::from(self.limit)
    }

    /// Returns the hash of entry `index`; 0 for the first.
    pub fn hash(&self, index: usize) -> u32 {
        if index == 0 {
            0
        } else {
            self.entries[index].hash.get()
        }
    }

    /// Returns the block that entry `index` leads to.
    ///
    /// # Errors
    /// It leads outside the directory or to its root.
    pub fn block(&self, index: usize) -> Result<u32, DxError> {
        let lblk = self.entries[index].block.get() & BLOCK_MASK;
        if lblk == 0 || lblk >= self.blocks {
            return Err(DxError::Block { index, lblk });
        }
        Ok(lblk)
    }

    /// Returns the entry whose range holds `hash`.
    pub fn search(&self, hash: u32) -> usize {
        self.entries[1..].partition_point(|e| e.hash.get() <= hash)
    }

    /// Checks that the hashes ascend.
    ///
    /// # Errors
    /// They do not.
    pub fn check_order(&self) -> Result<(), DxError> {
        for index in 2..self.entries.len() {
            if self.hash(index - 1) > self.hash(index) {
                return Err(DxError::Order { index });
            }
        }
        Ok(())
    }
}

fn split_count(word: u32) -> (u16, u16) {
    let [l0, l1, c0, c1] = word.to_le_bytes();
    (u16::from_le_bytes([l0, l1]), u16::from_le_bytes([c0, c1]))
}

/// Changes the entries of one index block whose shape was checked by [`DxEntries::new`].
pub struct DxEdit<'a> {
    entries: &'a mut [RawDxEntry],
}

impl<'a> DxEdit<'a> {
    /// Takes an index block of the given kind, as long as the layout says.
    pub fn new(block: &'a mut [u8], kind: DxKind, layout: DirLayout) -> Self {
        let at = kind.entries_at();
        let space = &mut block[at..at + usize::from(kind.limit(layout)) * ENTRY_LEN];
        // A whole number of entries without alignment: the cast cannot fail.
        Self {
            entries: <[RawDxEntry]>::mut_from_bytes(space).unwrap_or_default(),
        }
    }

    fn count(&self) -> usize {
        usize::from(split_count(self.entries[0].hash.get()).1)
    }

    fn set_count(&mut self, count: usize) {
        let limit = u32::try_from(self.entries.len()).unwrap_or(u32::MAX) & 0xffff;
        let count = u32::try_from(count).unwrap_or(u32::MAX) & 0xffff;
        self.entries[0].hash = U32::new(limit | (count << 16));
    }

    /// Puts an entry at `index`, at least 1; `false` where the block has no such place or no room:
    /// what else was written since it was checked may be the same block, in a damaged file system.
    #[must_use]
    pub fn insert(&mut self, index: usize, hash: u32, lblk: u32) -> bool {
        let count = self.count();
        if index == 0 || index > count || count >= self.entries.len() {
            return false;
        }
        self.entries.copy_within(index..count, index + 1);
        self.entries[index] = RawDxEntry {
            hash: U32::new(hash),
            block: U32::new(lblk),
        };
        self.set_count(count + 1);
        true
    }

    /// Keeps the first `count` entries; `false` as with [`Self::insert`].
    #[must_use]
    pub fn truncate(&mut self, count: usize) -> bool {
        let old = self.count();
        if count == 0 || count > old || old > self.entries.len() {
            return false;
        }
        self.entries[count..old].fill(RawDxEntry {
            hash: U32::ZERO,
            block: U32::ZERO,
        });
        self.set_count(count);
        true
    }

    /// Makes `entries` the content; the hash of the first is dropped.
    pub fn assign(&mut self, entries: &[(u32, u32)]) {
        debug_assert!(!entries.is_empty() && entries.len() <= self.entries.len());
        self.entries.fill(RawDxEntry {
            hash: U32::ZERO,
            block: U32::ZERO,
        });
        for (slot, &(hash, lblk)) in self.entries.iter_mut().zip(entries) {
            *slot = RawDxEntry {
                hash: U32::new(hash),
                block: U32::new(lblk),
            };
        }
        self.set_count(entries.len());
    }
}

/// Makes an empty node of a zeroed block; [`DxEdit::assign`] must follow.
pub fn fill_node(block: &mut [u8], layout: DirLayout) {
    block.fill(0);
    let rec_len = layout.encode_rec_len(layout.block_size);
    block[4..6].copy_from_slice(&rec_len.to_le_bytes());
}

/// Takes a first linear block apart: its "." and "..", and a leaf of all other entries.
///
/// # Errors
/// An entry is damaged.
pub fn convert(block: &[u8], layout: DirLayout) -> Result<(Dots, Vec<u8>), DirentError> {
    let dots = dirent::dots(block, layout)?;
    let mut list = Vec::with_capacity(layout.block_size / MIN_REC_LEN);
    for entry in dirent::entries(block, layout) {
        let e = entry?;
        if e.is_used() && e.offset >= dots.rest {
            list.push((e.name, e.ino, e.ftype));
        }
    }
    let mut leaf = vec![0; layout.block_size];
    let fits = dirent::fill(&mut leaf, layout, list);
    debug_assert!(fits);
    Ok((dots, leaf))
}

/// Makes the root of an index with one leaf.
pub fn make_root(block: &mut [u8], layout: DirLayout, dots: &Dots, hash: HashKind, leaf: u32) {
    dirent::fill_dots(block, layout, dots.this, dots.parent);
    block[INFO_AT..].fill(0);
    let rec_len = layout.encode_rec_len(layout.block_size - MIN_REC_LEN);
    block[MIN_REC_LEN + 4..MIN_REC_LEN + 6].copy_from_slice(&rec_len.to_le_bytes());
    set_info(block, hash, 0);
    DxEdit::new(block, DxKind::Root, layout).assign(&[(0, leaf)]);
}

/// Writes the root's info.
pub fn set_info(block: &mut [u8], hash: HashKind, levels: u8) {
    block[INFO_AT + 4..INFO_AT + 8].copy_from_slice(&[hash.to_raw(), 8, levels, 0]);
}

/// Where the checksum of an index block is and what it covers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DxChecksumSpan {
    /// Bytes from the start of the block.
    pub covered: usize,
    /// Where [`RawDxTail`] begins.
    pub tail_at: usize,
}

/// Finds the checksum of an index block; `None` if limit and count make no sense.
pub fn checksum_span(block: &[u8], kind: DxKind, layout: DirLayout) -> Option<DxChecksumSpan> {
    let at = kind.entries_at();
    let word = block.get(at..at + 4)?;
    let (limit, count) = split_count(u32::from_le_bytes(word.try_into().ok()?));
    if limit != kind.limit(layout) || count > limit {
        return None;
    }
    let covered = at + usize::from(count) * ENTRY_LEN;
    Some(DxChecksumSpan {
        covered,
        tail_at: at + usize::from(limit) * ENTRY_LEN,
    })
}

/// What becomes of a full leaf: two images, and the index entry of the second.
pub struct LeafSplit {
    /// New content of the leaf.
    pub low: Vec<u8>,
    /// Content of the leaf after it.
    pub high: Vec<u8>,
    /// Least hash in `high`, bit 0 set if `low` ends with the same hash.
    pub hash: u32,
}

/// Splits the entries of a leaf by hash, so that both halves use about the same space.
///
/// `None` if there are fewer than two entries.
///
/// # Errors
/// An entry is damaged.
pub fn split_leaf(
    block: &[u8],
    layout: DirLayout,
    hasher: &Hasher,
) -> Result<Option<LeafSplit>, DirentError> {
    let mut list = Vec::with_capacity(layout.block_size / MIN_REC_LEN);
    let mut total = 0;
    for entry in dirent::entries(block, layout) {
        let e = entry?;
        if e.is_used() {
            total += needed_len(e.name.len());
            list.push((hasher.hash(e.name).major, e));
        }
    }
    if list.len() < 2 {
        return Ok(None);
    }
    list.sort_by_key(|&(hash, e)| (hash, e.offset));
    // The entry that straddles the middle goes where its larger part is.
    let mut at = 0;
    let mut size = 0;
    while at < list.len() - 1 {
        let len = needed_len(list[at].1.name.len());
        if at > 0 && size + len / 2 > total / 2 {
            break;
        }
        size += len;
        at += 1;
    }
    let (low, high) = list.split_at(at);
    let hash = high[0].0;
    let continued = u32::from(low[low.len() - 1].0 == hash);
    let image = |half: &[(u32, Dirent<'_>)]| {
        let mut image = vec![0; layout.block_size];
        let fits = dirent::fill(
            &mut image,
            layout,
            half.iter().map(|(_, e)| (e.name, e.ino, e.ftype)),
        );
        debug_assert!(fits);
        image
    };
    Ok(Some(LeafSplit {
        low: image(low),
        high: image(high),
        hash: hash | continued,
    }))
}

#[cfg(test)]
mod tests;
