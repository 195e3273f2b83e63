//! Extent tree nodes: bytes only, no I/O.
//!
//! Format: Linux `Documentation/filesystems/ext4/ifork.rst`, section "Extent Tree".
//!
//! A node is a header and a sorted array of 12-byte entries: extents in a leaf (depth 0), child
//! pointers in an index node. The root is the 60 bytes of `i_block`; every other node fills a
//! block. [`view`] checks in constant time what makes reading safe (magic, depth, counts within the
//! bytes at hand); [`check`] looks at every entry and is meant for a block just read from disk.
//!
//! ```text
//! eh_magic eh_entries eh_max eh_depth eh_generation | entry 0 | entry 1 | ... | et_checksum
//! 0        2          4      6        8               12        24              12 + 12 * eh_max
//! ```

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `eh_magic` of every node.
pub const MAGIC: u16 = 0xf30a;
/// The deepest tree the format allows.
pub const MAX_DEPTH: u16 = 5;
/// Bytes of the root node in the inode.
pub const ROOT_LEN: usize = 60;
/// Most blocks one written extent maps.
pub const WRITTEN_MAX_LEN: u32 = 0x8000;
/// Most blocks one unwritten extent maps; the length field keeps its top bit as the mark.
pub const UNWRITTEN_MAX_LEN: u32 = 0x7fff;

const HEADER_LEN: usize = size_of::<RawExtentHeader>();
const ENTRY_LEN: usize = size_of::<RawExtent>();

/// The head of every node.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawExtentHeader {
    /// [`MAGIC`].
    pub eh_magic: U16,
    /// Entries in use.
    pub eh_entries: U16,
    /// Room for entries.
    pub eh_max: U16,
    /// 0 in a leaf, else the height above the leaves.
    pub eh_depth: U16,
    /// Not used by ext4; kept.
    pub eh_generation: U32,
}
const _: () = assert!(size_of::<RawExtentHeader>() == 12);

/// An entry of a leaf.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawExtent {
    /// First logical block.
    pub ee_block: U32,
    /// Length; above [`WRITTEN_MAX_LEN`] the extent is unwritten and that much shorter.
    pub ee_len: U16,
    /// First physical block, bits 32 to 47.
    pub ee_start_hi: U16,
    /// First physical block, low 32 bits.
    pub ee_start_lo: U32,
}
const _: () = assert!(size_of::<RawExtent>() == 12);
const _: () = assert!(offset_of!(RawExtent, ee_start_lo) == 8);

/// An entry of an index node.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawExtentIdx {
    /// First logical block the child covers.
    pub ei_block: U32,
    /// The child's block, low 32 bits.
    pub ei_leaf_lo: U32,
    /// The child's block, bits 32 to 47.
    pub ei_leaf_hi: U16,
    /// Unused.
    pub ei_unused: U16,
}
const _: () = assert!(size_of::<RawExtentIdx>() == 12);
const _: () = assert!(offset_of!(RawExtentIdx, ei_leaf_hi) == 8);

/// The tail of a node that is a block, at `12 + 12 * eh_max`, with `metadata_csum`.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawExtentTail {
    /// crc32c of inode seed and node up to this field.
    pub et_checksum: U32,
}
const _: () = assert!(size_of::<RawExtentTail>() == 4);

/// Whether the blocks of an extent hold data.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ExtentState {
    /// The blocks hold the file's data.
    Written,
    /// The blocks are allocated and read as zeros.
    Unwritten,
}

impl ExtentState {
    /// Returns the most blocks one extent of this state maps.
    pub const fn max_len(self) -> u32 {
        match self {
            Self::Written => WRITTEN_MAX_LEN,
            Self::Unwritten => UNWRITTEN_MAX_LEN,
        }
    }
}

/// One extent, decoded.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Extent {
    /// First logical block.
    pub lblk: u32,
    /// Blocks; 1 to [`ExtentState::max_len`].
    pub len: u32,
    /// First physical block.
    pub pblk: u64,
    /// Written or not.
    pub state: ExtentState,
}

impl Extent {
    /// Returns the logical block after the last one; 2^32 is possible, so this is wider.
    pub fn end(&self) -> u64 {
        u64::from(self.lblk) + u64::from(self.len)
    }

    /// Tells whether `next` goes on where this extent ends, on disk and in the file, and both fit
    /// in one extent.
    pub fn merges_with(&self, next: &Extent) -> bool {
        self.state == next.state
            && self.end() == u64::from(next.lblk)
            && self.pblk + u64::from(self.len) == next.pblk
            && self.len + next.len <= self.state.max_len()
    }

    pub(super) fn decode(raw: &RawExtent) -> Self {
        let len = u32::from(raw.ee_len.get());
        let (len, state) = if len > WRITTEN_MAX_LEN {
            (len - WRITTEN_MAX_LEN, ExtentState::Unwritten)
        } else {
            (len, ExtentState::Written)
        };
        Self {
            lblk: raw.ee_block.get(),
            len,
            pblk: join(raw.ee_start_lo, raw.ee_start_hi),
            state,
        }
    }

    fn encode(&self) -> RawExtent {
        // Zero is damage, but damage that is moved must stay what it is.
        debug_assert!(self.len <= self.state.max_len());
        let len = match self.state {
            ExtentState::Written => self.len,
            ExtentState::Unwritten => self.len + WRITTEN_MAX_LEN,
        };
        let (lo, hi) = split(self.pblk);
        RawExtent {
            ee_block: U32::new(self.lblk),
            ee_len: U16::new(low16(len)),
            ee_start_hi: hi,
            ee_start_lo: lo,
        }
    }
}

/// One child pointer, decoded.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Child {
    /// First logical block the child covers.
    pub lblk: u32,
    /// The child's block.
    pub pblk: u64,
}

impl Child {
    fn decode(raw: &RawExtentIdx) -> Self {
        Self {
            lblk: raw.ei_block.get(),
            pblk: join(raw.ei_leaf_lo, raw.ei_leaf_hi),
        }
    }

    fn encode(&self) -> RawExtentIdx {
        let (lo, hi) = split(self.pblk);
        RawExtentIdx {
            ei_block: U32::new(self.lblk),
            ei_leaf_lo: lo,
            ei_leaf_hi: hi,
            ei_unused: U16::new(0),
        }
    }
}

/// What can be wrong with a node; the caller adds inode and block number.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum NodeError {
    /// Too few bytes for a header.
    #[error("extent node of {len} bytes")]
    Short {
        /// Bytes at hand.
        len: usize,
    },
    /// Not an extent node.
    #[error("eh_magic is {found:#06x}")]
    Magic {
        /// What stands there.
        found: u16,
    },
    /// The node is not where the tree says it is.
    #[error("eh_depth is {found}, expected {want}")]
    Depth {
        /// What stands there.
        found: u16,
        /// What its parent asks for.
        want: u16,
    },
    /// Deeper than the format allows.
    #[error("eh_depth is {found}")]
    TooDeep {
        /// What stands there.
        found: u16,
    },
    /// `eh_max` is zero or does not fit.
    #[error("eh_max is {max}, room for {room}")]
    Max {
        /// What stands there.
        max: u16,
        /// Entries that fit into the bytes.
        room: u16,
    },
    /// More entries than room.
    #[error("eh_entries is {entries} of {max}")]
    Entries {
        /// What stands there.
        entries: u16,
        /// `eh_max`.
        max: u16,
    },
    /// An index node without children.
    #[error("index node without entries")]
    Empty,
    /// An extent of length zero, or one that runs past the last logical block.
    #[error("entry {index}: bad length")]
    Length {
        /// Position in the node.
        index: u16,
    },
    /// Entries overlap or are not ascending.
    #[error("entry {index}: out of order")]
    Order {
        /// Position in the node.
        index: u16,
    },
    /// An entry points outside the file system.
    #[error("entry {index}: block {block} lies outside the filesystem")]
    OutsideFs {
        /// Position in the node.
        index: u16,
        /// The block it names.
        block: u64,
    },
}

impl NodeError {
    /// Returns a fixed text for reports that cannot carry values.
    pub const fn what(self) -> &'static str {
        match self {
            Self::Short { .. } => "extent node: too short",
            Self::Magic { .. } => "extent node: eh_magic",
            Self::Depth { .. } | Self::TooDeep { .. } => "extent node: eh_depth",
            Self::Max { .. } => "extent node: eh_max",
            Self::Entries { .. } => "extent node: eh_entries",
            Self::Empty => "extent index: no entries",
            Self::Length { .. } => "extent: ee_len",
            Self::Order { .. } => "extent node: entries out of order",
            Self::OutsideFs { .. } => "extent node: block outside the filesystem",
        }
    }
}

/// The part of the device that file data and tree blocks may lie in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Bounds {
    /// First usable block.
    pub first: u64,
    /// Block after the last one.
    pub end: u64,
}

impl Bounds {
    /// Tells whether `len` blocks from `pblk` lie inside.
    pub fn holds(&self, pblk: u64, len: u64) -> bool {
        pblk >= self.first && pblk < self.end && len <= self.end - pblk
    }
}

/// A node whose header fits its bytes.
#[derive(Clone, Copy, Debug)]
pub enum Node<'a> {
    /// Depth 0.
    Leaf(Leaf<'a>),
    /// Depth 1 and above.
    Index(Index<'a>),
}

/// The extents of a leaf.
#[derive(Clone, Copy, Debug)]
pub struct Leaf<'a> {
    entries: &'a [RawExtent],
    max: u16,
}

/// The children of an index node.
#[derive(Clone, Copy, Debug)]
pub struct Index<'a> {
    entries: &'a [RawExtentIdx],
    max: u16,
}

impl Leaf<'_> {
    /// Returns the number of extents.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Tells whether there is no extent.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns the number of extents that fit.
    pub fn max(&self) -> usize {
        usize::from(self.max)
    }

    /// Returns extent `i`.
    pub fn at(&self, i: usize) -> Option<Extent> {
        self.entries.get(i).map(Extent::decode)
    }

    /// Returns how many extents start at or before `lblk`.
    pub fn upper_bound(&self, lblk: u32) -> usize {
        self.entries.partition_point(|e| e.ee_block.get() <= lblk)
    }

    /// Iterates over the extents.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = Extent> + '_ {
        self.entries.iter().map(Extent::decode)
    }
}

impl Index<'_> {
    /// Returns the number of children.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Tells whether there is no child.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns the number of children that fit.
    pub fn max(&self) -> usize {
        usize::from(self.max)
    }

    /// Returns child `i`.
    pub fn at(&self, i: usize) -> Option<Child> {
        self.entries.get(i).map(Child::decode)
    }

    /// Returns the position of the child that covers `lblk`: the last that starts at or before it,
    /// or the first.
    pub fn position(&self, lblk: u32) -> usize {
        self.entries
            .partition_point(|e| e.ei_block.get() <= lblk)
            .saturating_sub(1)
    }

    /// Iterates over the children.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = Child> + '_ {
        self.entries.iter().map(Child::decode)
    }
}

/// Returns how many entries fit into a node of `len` bytes; the checksum tail always fits behind
/// them, since no block size is a multiple of 12.
pub const fn room(len: usize) -> u16 {
    let n = len.saturating_sub(HEADER_LEN) / ENTRY_LEN;
    if n > 0xffff { 0xffff } else { low16(n as u32) }
}

/// Returns the byte offset of the checksum tail, if the header makes sense and it fits.
pub fn tail_offset(data: &[u8]) -> Option<usize> {
    let h = header(data).ok()?;
    let at = HEADER_LEN + ENTRY_LEN * usize::from(h.eh_max.get());
    (at + size_of::<RawExtentTail>() <= data.len()).then_some(at)
}

/// Returns `eh_depth` of a node with a sound header.
///
/// # Errors
/// What is wrong with the header.
pub fn depth(data: &[u8]) -> Result<u16, NodeError> {
    header(data).map(|h| h.eh_depth.get())
}

/// Gives a view of a node of the given depth, or of any depth for `None`.
///
/// Constant time: entries are not looked at. Every accessor of the view stays inside the bytes
/// whatever they say.
///
/// # Errors
/// What is wrong with the header.
pub fn view(data: &[u8], want_depth: Option<u16>) -> Result<Node<'_>, NodeError> {
    let h = header(data)?;
    let depth = h.eh_depth.get();
    if let Some(want) = want_depth
        && want != depth
    {
        return Err(NodeError::Depth { found: depth, want });
    }
    let max = h.eh_max.get();
    let n = usize::from(h.eh_entries.get());
    let short = NodeError::Short { len: data.len() };
    let body = data
        .get(HEADER_LEN..HEADER_LEN + n * ENTRY_LEN)
        .ok_or(short)?;
    if depth == 0 {
        let Ok(entries) = <[RawExtent]>::ref_from_bytes(body) else {
            return Err(short);
        };
        Ok(Node::Leaf(Leaf { entries, max }))
    } else {
        if n == 0 {
            return Err(NodeError::Empty);
        }
        let Ok(entries) = <[RawExtentIdx]>::ref_from_bytes(body) else {
            return Err(short);
        };
        Ok(Node::Index(Index { entries, max }))
    }
}

/// Checks a whole node: header, order of entries, and that they stay inside the file system.
///
/// # Errors
/// The first thing that is wrong.
pub fn check(data: &[u8], want_depth: Option<u16>, bounds: Bounds) -> Result<(), NodeError> {
    let mut next = 0u64;
    match view(data, want_depth)? {
        Node::Leaf(leaf) => {
            for (i, e) in leaf.iter().enumerate() {
                let index = low16(i as u32);
                // Block 2^32 - 1 is no logical block: a length of 2^32 blocks could not be told
                // from zero.
                if e.len == 0 || e.end() > u64::from(u32::MAX) {
                    return Err(NodeError::Length { index });
                }
                if u64::from(e.lblk) < next {
                    return Err(NodeError::Order { index });
                }
                if !bounds.holds(e.pblk, u64::from(e.len)) {
                    return Err(NodeError::OutsideFs {
                        index,
                        block: e.pblk,
                    });
                }
                next = e.end();
            }
        }
        Node::Index(children) => {
            for (i, c) in children.iter().enumerate() {
                let index = low16(i as u32);
                if u64::from(c.lblk) < next {
                    return Err(NodeError::Order { index });
                }
                if !bounds.holds(c.pblk, 1) {
                    return Err(NodeError::OutsideFs {
                        index,
                        block: c.pblk,
                    });
                }
                next = u64::from(c.lblk) + 1;
            }
        }
    }
    Ok(())
}

/// Makes an empty node of the given depth out of `data`; bytes behind the header are zeroed.
pub fn init(data: &mut [u8], depth: u16) {
    data.fill(0);
    let max = room(data.len());
    write_header(
        data,
        &RawExtentHeader {
            eh_magic: U16::new(MAGIC),
            eh_entries: U16::new(0),
            eh_max: U16::new(max),
            eh_depth: U16::new(depth),
            eh_generation: U32::new(0),
        },
    );
}

/// Replaces extents `at..at + remove` of a leaf by `new`.
///
/// Returns false, with nothing changed, if they do not fit or the node is no such leaf.
#[must_use]
pub fn splice(data: &mut [u8], at: usize, remove: usize, new: &[Extent]) -> bool {
    let Ok(Node::Leaf(leaf)) = view(data, Some(0)) else {
        return false;
    };
    let (n, max) = (leaf.len(), leaf.max());
    if !open_gap(data, n, max, at, remove, new.len()) {
        return false;
    }
    for (i, e) in new.iter().enumerate() {
        put(data, at + i, e.encode().as_bytes());
    }
    true
}

/// Replaces children `at..at + remove` of an index node by `new`.
///
/// Returns false, with nothing changed, if they do not fit or the node is no index node.
#[must_use]
pub fn splice_children(data: &mut [u8], at: usize, remove: usize, new: &[Child]) -> bool {
    let Ok(h) = header(data) else { return false };
    let (n, max) = (usize::from(h.eh_entries.get()), usize::from(h.eh_max.get()));
    if h.eh_depth.get() == 0 || !open_gap(data, n, max, at, remove, new.len()) {
        return false;
    }
    for (i, c) in new.iter().enumerate() {
        put(data, at + i, c.encode().as_bytes());
    }
    true
}

/// Sets the first logical block of child `at`; false if there is none.
#[must_use]
pub fn set_key(data: &mut [u8], at: usize, lblk: u32) -> bool {
    let old = match view(data, None) {
        Ok(Node::Index(children)) => children.at(at),
        _ => None,
    };
    match old {
        Some(c) => {
            put(data, at, Child { lblk, pblk: c.pblk }.encode().as_bytes());
            true
        }
        None => false,
    }
}

/// Moves the entries from `at` on to the end of `right`, an empty node of the same depth.
///
/// Returns false, with nothing changed, if they do not fit.
#[must_use]
pub fn split_at(left: &mut [u8], right: &mut [u8], at: usize) -> bool {
    let (Ok(l), Ok(r)) = (header(left), header(right)) else {
        return false;
    };
    let n = usize::from(l.eh_entries.get());
    if r.eh_entries.get() != 0
        || l.eh_depth != r.eh_depth
        || at > n
        || n - at > usize::from(r.eh_max.get())
    {
        return false;
    }
    let (from, to) = (offset(at), offset(n));
    let Some(moved) = left.get(from..to) else {
        return false;
    };
    let Some(dst) = right.get_mut(HEADER_LEN..HEADER_LEN + (to - from)) else {
        return false;
    };
    dst.copy_from_slice(moved);
    if let Some(gone) = left.get_mut(from..to) {
        gone.fill(0);
    }
    set_entries(left, at);
    set_entries(right, n - at);
    true
}

/// Turns the root into an index node one level higher with one child, and gives the old root's
/// entries to `child`, which becomes that child. The child's bytes are overwritten.
///
/// Returns false, with nothing changed, if the root is no node.
#[must_use]
pub fn grow(root: &mut [u8], child: &mut [u8], child_block: u64) -> bool {
    let Ok(h) = header(root) else { return false };
    let n = usize::from(h.eh_entries.get());
    let depth = h.eh_depth.get();
    let Some(entries) = root.get(HEADER_LEN..offset(n)) else {
        return false;
    };
    if n > usize::from(room(child.len())) {
        return false;
    }
    init(child, depth);
    if let Some(dst) = child.get_mut(HEADER_LEN..offset(n)) {
        dst.copy_from_slice(entries);
    }
    set_entries(child, n);
    let lblk = first_key(child).unwrap_or(0);
    init(root, depth + 1);
    set_entries(root, 1);
    put(
        root,
        0,
        Child {
            lblk,
            pblk: child_block,
        }
        .encode()
        .as_bytes(),
    );
    true
}

/// Makes the root a copy of `child`, its only child, if the entries fit.
#[must_use]
pub fn pull_up(root: &mut [u8], child: &[u8]) -> bool {
    let Ok(h) = header(child) else { return false };
    let n = usize::from(h.eh_entries.get());
    if n > usize::from(room(root.len())) {
        return false;
    }
    let Some(entries) = child.get(HEADER_LEN..offset(n)) else {
        return false;
    };
    init(root, h.eh_depth.get());
    if let Some(dst) = root.get_mut(HEADER_LEN..offset(n)) {
        dst.copy_from_slice(entries);
    }
    set_entries(root, n);
    true
}

/// Returns the first logical block of the first entry.
pub fn first_key(data: &[u8]) -> Option<u32> {
    // Both kinds of entry begin with it.
    match view(data, None).ok()? {
        Node::Leaf(leaf) => leaf.at(0).map(|e| e.lblk),
        Node::Index(children) => children.at(0).map(|c| c.lblk),
    }
}

fn header(data: &[u8]) -> Result<&RawExtentHeader, NodeError> {
    let Ok((h, _)) = RawExtentHeader::ref_from_prefix(data) else {
        return Err(NodeError::Short { len: data.len() });
    };
    let (magic, entries) = (h.eh_magic.get(), h.eh_entries.get());
    let (max, depth) = (h.eh_max.get(), h.eh_depth.get());
    if magic != MAGIC {
        return Err(NodeError::Magic { found: magic });
    }
    if depth > MAX_DEPTH {
        return Err(NodeError::TooDeep { found: depth });
    }
    let room = room(data.len());
    if max == 0 || max > room {
        return Err(NodeError::Max { max, room });
    }
    if entries > max {
        return Err(NodeError::Entries { entries, max });
    }
    Ok(h)
}

fn write_header(data: &mut [u8], h: &RawExtentHeader) {
    if let Some(dst) = data.get_mut(..HEADER_LEN) {
        dst.copy_from_slice(h.as_bytes());
    }
}

fn set_entries(data: &mut [u8], n: usize) {
    if let Ok((h, _)) = RawExtentHeader::mut_from_prefix(data) {
        h.eh_entries = U16::new(low16(n as u32));
    }
}

const fn offset(i: usize) -> usize {
    HEADER_LEN + i * ENTRY_LEN
}

fn put(data: &mut [u8], i: usize, entry: &[u8]) {
    if let Some(dst) = data.get_mut(offset(i)..offset(i + 1)) {
        dst.copy_from_slice(entry);
    }
}

/// Makes `add` entries of room in place of `remove` entries at `at`.
fn open_gap(data: &mut [u8], n: usize, max: usize, at: usize, remove: usize, add: usize) -> bool {
    if at > n || remove > n - at || n - remove + add > max || data.len() < offset(max) {
        return false;
    }
    let after = n - remove + add;
    data.copy_within(offset(at + remove)..offset(n), offset(at + add));
    if after < n {
        data[offset(after)..offset(n)].fill(0);
    }
    set_entries(data, after);
    true
}

fn join(lo: U32, hi: U16) -> u64 {
    u64::from(lo.get()) | u64::from(hi.get()) << 32
}

fn split(block: u64) -> (U32, U16) {
    debug_assert!(block < 1 << 48);
    let [b0, b1, b2, b3, b4, b5, ..] = block.to_le_bytes();
    (U32::from_bytes([b0, b1, b2, b3]), U16::from_bytes([b4, b5]))
}

const fn low16(v: u32) -> u16 {
    let [a, b, ..] = v.to_le_bytes();
    u16::from_le_bytes([a, b])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// For what need only come to an end.
    fn ends<T>(_: T) {}

    const FS: Bounds = Bounds {
        first: 1,
        end: 1 << 20,
    };

    fn ext(lblk: u32, len: u32, pblk: u64) -> Extent {
        Extent {
            lblk,
            len,
            pblk,
            state: ExtentState::Written,
        }
    }

    fn leaf_of(extents: &[Extent]) -> Vec<u8> {
        let mut data = vec![0; 1024];
        init(&mut data, 0);
        assert!(splice(&mut data, 0, 0, extents));
        data
    }

    /// `mke2fs -t ext4 -b 1024`, a file of 20 KiB at block 1301, `debugfs -R 'dump_inode'`-like
    /// bytes of `i_block`: one written extent of 20 blocks, then one unwritten of 3.
    #[test]
    fn golden_bytes_decode_and_encode_the_same() {
        let mut bytes = [0u8; ROOT_LEN];
        bytes[..12].copy_from_slice(&[0x0a, 0xf3, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
        bytes[12..24].copy_from_slice(&[0, 0, 0, 0, 20, 0, 0, 0, 0x15, 5, 0, 0]);
        bytes[24..36].copy_from_slice(&[0x20, 0, 0, 0, 3, 0x80, 1, 0, 0x40, 6, 0, 0]);
        let Ok(Node::Leaf(leaf)) = view(&bytes, Some(0)) else {
            panic!("not a leaf")
        };
        let got: Vec<_> = leaf.iter().collect();
        let second = Extent {
            lblk: 32,
            len: 3,
            pblk: 0x1_0000_0640,
            state: ExtentState::Unwritten,
        };
        assert_eq!(got, [ext(0, 20, 1301), second]);
        let mut again = [0u8; ROOT_LEN];
        init(&mut again, 0);
        assert!(splice(&mut again, 0, 0, &got));
        assert_eq!(again, bytes);
    }

    #[test]
    fn a_written_extent_of_full_length_is_not_taken_for_unwritten() {
        let data = leaf_of(&[ext(0, WRITTEN_MAX_LEN, 100)]);
        let Ok(Node::Leaf(leaf)) = view(&data, Some(0)) else {
            panic!("not a leaf")
        };
        assert_eq!(leaf.at(0), Some(ext(0, WRITTEN_MAX_LEN, 100)));
    }

    #[test]
    fn each_kind_of_damage_is_named() {
        let good = leaf_of(&[ext(0, 4, 100), ext(10, 4, 200)]);
        assert_eq!(check(&good, Some(0), FS), Ok(()));
        let damage = |at: usize, bytes: &[u8]| {
            let mut d = good.clone();
            d[at..at + bytes.len()].copy_from_slice(bytes);
            check(&d, Some(0), FS).err()
        };
        assert_eq!(damage(0, &[0, 0]), Some(NodeError::Magic { found: 0 }));
        assert_eq!(
            damage(6, &[1]),
            Some(NodeError::Depth { found: 1, want: 0 })
        );
        assert_eq!(damage(6, &[6]), Some(NodeError::TooDeep { found: 6 }));
        assert_eq!(damage(4, &[85]), Some(NodeError::Max { max: 85, room: 84 }));
        assert_eq!(damage(4, &[0]), Some(NodeError::Max { max: 0, room: 84 }));
        assert_eq!(
            damage(2, &[85]),
            Some(NodeError::Entries {
                entries: 85,
                max: 84
            })
        );
        assert_eq!(damage(16, &[0]), Some(NodeError::Length { index: 0 }));
        assert_eq!(
            damage(24, &[0xff, 0xff, 0xff, 0xff]),
            Some(NodeError::Length { index: 1 })
        );
        assert_eq!(damage(24, &[3]), Some(NodeError::Order { index: 1 }));
        assert_eq!(
            damage(18, &[1]),
            Some(NodeError::OutsideFs {
                index: 0,
                block: 0x1_0000_0064
            })
        );
        assert_eq!(
            check(&good[..8], None, FS),
            Err(NodeError::Short { len: 8 })
        );
        let mut empty = vec![0; 1024];
        init(&mut empty, 1);
        assert_eq!(check(&empty, Some(1), FS), Err(NodeError::Empty));
    }

    #[test]
    fn grow_then_pull_up_gives_the_same_root() {
        let mut root = [0u8; ROOT_LEN];
        init(&mut root, 0);
        assert!(splice(
            &mut root,
            0,
            0,
            &[ext(5, 1, 10), ext(7, 1, 20), ext(9, 1, 30)]
        ));
        let before = root;
        let mut child = vec![0xff; 1024];
        assert!(grow(&mut root, &mut child, 77));
        let Ok(Node::Index(ix)) = view(&root, Some(1)) else {
            panic!("not an index")
        };
        assert_eq!(ix.at(0), Some(Child { lblk: 5, pblk: 77 }));
        assert!(pull_up(&mut root, &child));
        assert_eq!(root, before);
    }

    #[test]
    fn split_moves_the_upper_entries() {
        let all: Vec<_> = (0..84)
            .map(|i| ext(i * 2, 1, 100 + u64::from(i) * 2))
            .collect();
        let mut left = leaf_of(&all);
        let mut right = vec![0; 1024];
        init(&mut right, 0);
        assert!(split_at(&mut left, &mut right, 50));
        let (Ok(Node::Leaf(l)), Ok(Node::Leaf(r))) = (view(&left, None), view(&right, None)) else {
            panic!("not leaves")
        };
        assert_eq!((l.len(), r.len()), (50, 34));
        assert_eq!(l.iter().chain(r.iter()).collect::<Vec<_>>(), all);
    }

    proptest::proptest! {
        /// Whatever the bytes, looking at them ends and stays inside.
        #[test]
        fn noise_never_panics(mut data in proptest::collection::vec(0u8..=255, 0..200),
                              sane in proptest::bool::ANY, k in 0usize..20) {
            if sane && data.len() >= 8 {
                data[..2].copy_from_slice(&MAGIC.to_le_bytes());
                data[3] = 0; data[5] = 0; data[6] &= 7; data[7] = 0;
            }
            ends(check(&data, None, FS).is_ok());
            ends((first_key(&data), tail_offset(&data)));
            if let Ok(Node::Leaf(l)) = view(&data, None) {
                ends((l.upper_bound(7), l.at(k)));
            }
            let mut other = vec![0; 128];
            ends((splice(&mut data, k, 1, &[ext(1, 1, 1)]), set_key(&mut data, k, 3)));
            ends(splice_children(&mut data, k, 0, &[Child { lblk: 0, pblk: 1 }]));
            ends(grow(&mut data, &mut other, 3));
            ends(pull_up(&mut other, &data));
        }
    }
}
