//! Directory entries and the blocks that hold them: bytes only, no I/O.
//!
//! Format: Linux `Documentation/filesystems/ext4/directory.rst`.
//!
//! A block is a chain of entries; each `rec_len` leads to the next and the last one ends at the
//! end of the block, or at its tail where directory checksums are on. An entry with inode 0 is
//! free space. Nothing here trusts a length read from the block.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The fixed part of an entry; the name follows.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawDirent {
    /// Inode number, 0 for an unused entry.
    pub inode: U32,
    /// Distance to the next entry, see [`DirLayout::decode_rec_len`].
    pub rec_len: U16,
    /// Bytes in the name.
    pub name_len: u8,
    /// File type with the `filetype` feature, else the (zero) high byte of the name length.
    pub file_type: u8,
}
const _: () = assert!(size_of::<RawDirent>() == HEADER_LEN);

/// The last bytes of a leaf block when directory blocks are checksummed.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawDirentTail {
    /// Looks like an unused entry to old readers.
    pub det_reserved_zero1: U32,
    /// 12.
    pub det_rec_len: U16,
    /// Looks like an empty name.
    pub det_reserved_zero2: u8,
    /// [`TAIL_FILE_TYPE`].
    pub det_reserved_ft: u8,
    /// crc32c of the inode's seed and the block up to the tail.
    pub det_checksum: U32,
}
const _: () = assert!(size_of::<RawDirentTail>() == TAIL_LEN);

/// Bytes before the name.
pub const HEADER_LEN: usize = 8;
/// Bytes of [`RawDirentTail`].
pub const TAIL_LEN: usize = 12;
/// File type byte of a directory.
pub const DIR_TYPE: u8 = 2;
/// Marks the checksum tail.
pub const TAIL_FILE_TYPE: u8 = 0xde;
/// Longest name.
pub const MAX_NAME_LEN: usize = 255;
/// Space of the shortest entry.
pub const MIN_REC_LEN: usize = 12;
/// Largest space one entry may need.
pub const MAX_REC_LEN: usize = needed_len(MAX_NAME_LEN);

/// Returns the space an entry with a name of `name_len` bytes needs.
pub const fn needed_len(name_len: usize) -> usize {
    (HEADER_LEN + name_len + 3) & !3
}

/// How directory blocks of one file system look.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DirLayout {
    /// Bytes of a block.
    pub block_size: usize,
    /// Entries carry a file type (feature `filetype`).
    pub filetype: bool,
    /// Blocks end in a checksum tail (feature `metadata_csum`).
    pub tail: bool,
    /// Highest valid inode number.
    pub max_ino: u32,
}

/// What can be wrong with a directory block; the caller adds block and inode number.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum DirentError {
    /// `rec_len` is too small for any entry, or no multiple of 4.
    #[error("directory entry at {offset}: rec_len {rec_len} is impossible")]
    RecLen {
        /// Where in the block.
        offset: usize,
        /// What was found.
        rec_len: usize,
    },
    /// The name does not fit in `rec_len`.
    #[error("directory entry at {offset}: rec_len {rec_len} is too small for name_len {name_len}")]
    NameLen {
        /// Where in the block.
        offset: usize,
        /// Space of the entry.
        rec_len: usize,
        /// Bytes of the name.
        name_len: usize,
    },
    /// The entry runs past the end of the block, or leaves less than an entry behind it.
    #[error("directory entry at {offset}: rec_len {rec_len} runs past the block")]
    Overrun {
        /// Where in the block.
        offset: usize,
        /// What was found.
        rec_len: usize,
    },
    /// The inode number does not exist in this file system.
    #[error("directory entry at {offset}: inode {ino} is out of bounds")]
    Inode {
        /// Where in the block.
        offset: usize,
        /// What was found.
        ino: u32,
    },
    /// A used entry has no name.
    #[error("directory entry at {offset}: empty name")]
    EmptyName {
        /// Where in the block.
        offset: usize,
    },
    /// The first two entries are not "." and "..".
    #[error("first directory block does not begin with \".\" and \"..\"")]
    Dots,
}

impl DirentError {
    /// Names the check that failed, without its numbers.
    pub fn what(&self) -> &'static str {
        match self {
            Self::RecLen { .. } => "directory entry: rec_len",
            Self::NameLen { .. } => "directory entry: name_len",
            Self::Overrun { .. } => "directory entry: rec_len past the block",
            Self::Inode { .. } => "directory entry: inode out of bounds",
            Self::EmptyName { .. } => "directory entry: empty name",
            Self::Dots => "directory: \".\" and \"..\" missing",
        }
    }
}

/// One entry, checked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Dirent<'a> {
    /// Where in the block.
    pub offset: usize,
    /// Distance to the next entry.
    pub rec_len: usize,
    /// Inode number, 0 for an unused entry.
    pub ino: u32,
    /// File type byte as stored; 0 (unknown) without the feature.
    pub ftype: u8,
    /// The name; empty for an unused entry.
    pub name: &'a [u8],
}

impl Dirent<'_> {
    /// Returns the bytes of the entry that are in use.
    pub fn used(&self) -> usize {
        if self.ino == 0 {
            0
        } else {
            needed_len(self.name.len())
        }
    }

    /// Returns whether the entry names a file.
    pub fn is_used(&self) -> bool {
        self.ino != 0
    }
}

/// Where [`find`] found a name.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Found {
    /// Offset of the entry.
    pub offset: usize,
    /// Offset of the entry before it in the block.
    pub prev: Option<usize>,
    /// Inode number.
    pub ino: u32,
    /// File type byte.
    pub ftype: u8,
}

impl DirLayout {
    /// Returns the end of the entries of a leaf block.
    pub fn end(&self) -> usize {
        if self.tail {
            self.block_size - TAIL_LEN
        } else {
            self.block_size
        }
    }

    /// Decodes a stored `rec_len`: with blocks of 64 KiB the two low bits carry bits 16 and 17.
    pub fn decode_rec_len(&self, raw: u16) -> usize {
        let len = usize::from(raw);
        if self.block_size < 65536 {
            len
        } else if raw == u16::MAX || raw == 0 {
            self.block_size
        } else {
            (len & 0xfffc) | ((len & 3) << 16)
        }
    }

    /// Encodes a `rec_len`, a multiple of 4 of at most the block size.
    pub fn encode_rec_len(&self, len: usize) -> u16 {
        debug_assert!(len % 4 == 0 && len <= self.block_size);
        if self.block_size >= 65536 && len == self.block_size {
            return u16::MAX;
        }
        u16::try_from((len & 0xfffc) | (len >> 16)).unwrap_or(u16::MAX)
    }

    fn header<'a>(&self, block: &'a [u8], offset: usize) -> Option<&'a RawDirent> {
        let bytes = block.get(offset..offset + HEADER_LEN)?;
        RawDirent::ref_from_bytes(bytes).ok()
    }

    /// Reads and checks the entry at `offset` of a block whose entries end at `end`.
    ///
    /// # Errors
    /// Names the first check that fails.
    #[inline]
    pub fn entry<'a>(
        &self,
        block: &'a [u8],
        offset: usize,
        end: usize,
    ) -> Result<Dirent<'a>, DirentError> {
        let Some(raw) = self.header(block, offset) else {
            return Err(DirentError::Overrun { offset, rec_len: 0 });
        };
        let rec_len = self.decode_rec_len(raw.rec_len.get());
        let name_len = usize::from(raw.name_len);
        let ino = raw.inode.get();
        if rec_len < MIN_REC_LEN || rec_len % 4 != 0 {
            return Err(DirentError::RecLen { offset, rec_len });
        }
        if rec_len < needed_len(name_len) {
            return Err(DirentError::NameLen {
                offset,
                rec_len,
                name_len,
            });
        }
        let next = offset + rec_len;
        if next > end || (next != end && next + MIN_REC_LEN > end) {
            return Err(DirentError::Overrun { offset, rec_len });
        }
        if ino > self.max_ino {
            return Err(DirentError::Inode { offset, ino });
        }
        if ino == 0 {
            return Ok(Dirent {
                offset,
                rec_len,
                ino,
                ftype: 0,
                name: &[],
            });
        }
        if name_len == 0 {
            return Err(DirentError::EmptyName { offset });
        }
        let start = offset + HEADER_LEN;
        let Some(name) = block.get(start..start + name_len) else {
            return Err(DirentError::Overrun { offset, rec_len });
        };
        let ftype = if self.filetype { raw.file_type } else { 0 };
        Ok(Dirent {
            offset,
            rec_len,
            ino,
            ftype,
            name,
        })
    }

    fn put_header(&self, block: &mut [u8], offset: usize, ino: u32, rec_len: usize) {
        if let Ok((raw, _)) = RawDirent::mut_from_prefix(&mut block[offset..]) {
            raw.inode = U32::new(ino);
            raw.rec_len = U16::new(self.encode_rec_len(rec_len));
            raw.name_len = 0;
            raw.file_type = 0;
        }
    }

    fn put_entry(
        &self,
        block: &mut [u8],
        offset: usize,
        rec_len: usize,
        (name, ino, ftype): (&[u8], u32, u8),
    ) {
        debug_assert!(needed_len(name.len()) <= rec_len && name.len() <= MAX_NAME_LEN);
        self.put_header(block, offset, ino, rec_len);
        block[offset + 6] = u8::try_from(name.len()).unwrap_or(u8::MAX);
        block[offset + 7] = if self.filetype { ftype } else { 0 };
        let start = offset + HEADER_LEN;
        block[start..start + name.len()].copy_from_slice(name);
        block[start + name.len()..offset + needed_len(name.len())].fill(0);
    }

    fn set_rec_len(&self, block: &mut [u8], offset: usize, rec_len: usize) {
        let raw = self.encode_rec_len(rec_len).to_le_bytes();
        block[offset + 4..offset + 6].copy_from_slice(&raw);
    }
}

/// Walks all entries of a leaf block, used or not, and ends after the first error.
pub struct Entries<'a> {
    block: &'a [u8],
    layout: DirLayout,
    offset: usize,
    end: usize,
}

/// Returns the entries of a leaf block.
pub fn entries(block: &[u8], layout: DirLayout) -> Entries<'_> {
    let end = layout.end().min(block.len());
    Entries {
        block,
        layout,
        offset: 0,
        end,
    }
}

impl<'a> Iterator for Entries<'a> {
    type Item = Result<Dirent<'a>, DirentError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.offset >= self.end {
            return None;
        }
        let entry = self.layout.entry(self.block, self.offset, self.end);
        match &entry {
            Ok(e) => self.offset += e.rec_len,
            Err(_) => self.offset = self.end,
        }
        Some(entry)
    }
}

/// Looks for `name` in a leaf block.
///
/// # Errors
/// An entry in front of the name is damaged.
pub fn find(block: &[u8], layout: DirLayout, name: &[u8]) -> Result<Option<Found>, DirentError> {
    let mut prev = None;
    for entry in entries(block, layout) {
        let e = entry?;
        if e.name == name && e.ino != 0 {
            return Ok(Some(Found {
                offset: e.offset,
                prev,
                ino: e.ino,
                ftype: e.ftype,
            }));
        }
        prev = Some(e.offset);
    }
    Ok(None)
}

/// Puts an entry into the first gap that holds it; answers whether there was one.
///
/// # Errors
/// An entry in front of the gap is damaged; the block is unchanged.
pub fn insert(
    block: &mut [u8],
    layout: DirLayout,
    name: &[u8],
    ino: u32,
    ftype: u8,
) -> Result<bool, DirentError> {
    let Some(gap) = find_gap(block, layout, name.len())? else {
        return Ok(false);
    };
    insert_at(block, layout, gap, (name, ino, ftype));
    Ok(true)
}

/// A place for a new entry, as found by [`find_gap`] in the same, unchanged block.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Gap {
    offset: usize,
    rec_len: usize,
    used: usize,
}

/// Finds the first gap that holds a name of `name_len` bytes.
///
/// # Errors
/// An entry in front of the gap is damaged.
pub fn find_gap(
    block: &[u8],
    layout: DirLayout,
    name_len: usize,
) -> Result<Option<Gap>, DirentError> {
    let need = needed_len(name_len);
    for entry in entries(block, layout) {
        let e = entry?;
        if e.rec_len - e.used() >= need {
            return Ok(Some(Gap {
                offset: e.offset,
                rec_len: e.rec_len,
                used: e.used(),
            }));
        }
    }
    Ok(None)
}

/// Puts an entry (name, inode, file type) into a gap.
pub fn insert_at(block: &mut [u8], layout: DirLayout, gap: Gap, entry: (&[u8], u32, u8)) {
    if gap.used > 0 {
        layout.set_rec_len(block, gap.offset, gap.used);
    }
    layout.put_entry(block, gap.offset + gap.used, gap.rec_len - gap.used, entry);
}

/// Removes an entry found by [`find`] in the same, unchanged block: its space goes to the entry
/// before it, and its name is wiped.
///
/// # Errors
/// One of the two entries is damaged; the block is unchanged.
pub fn remove(block: &mut [u8], layout: DirLayout, found: &Found) -> Result<(), DirentError> {
    let end = layout.end();
    let rec_len = layout.entry(block, found.offset, end)?.rec_len;
    let wipe_from = match found.prev {
        Some(prev) => {
            let prev_len = layout.entry(block, prev, end)?.rec_len;
            layout.set_rec_len(block, prev, prev_len + rec_len);
            found.offset
        }
        None => {
            layout.put_header(block, found.offset, 0, rec_len);
            found.offset + HEADER_LEN
        }
    };
    block[wipe_from..found.offset + rec_len].fill(0);
    Ok(())
}

/// Changes where an entry found by [`find`] points to.
pub fn retarget(block: &mut [u8], layout: DirLayout, found: &Found, ino: u32, ftype: u8) {
    block[found.offset..found.offset + 4].copy_from_slice(&ino.to_le_bytes());
    if layout.filetype {
        block[found.offset + 7] = ftype;
    }
}

/// Fills a leaf block with `entries` (name, inode, file type), packed, and writes the tail.
///
/// Answers false, with undefined content, when they do not fit.
pub fn fill<'a>(
    block: &mut [u8],
    layout: DirLayout,
    entries: impl IntoIterator<Item = (&'a [u8], u32, u8)>,
) -> bool {
    let end = layout.end();
    let mut last = None;
    let mut offset = 0;
    block.fill(0);
    for entry in entries {
        let len = needed_len(entry.0.len());
        if offset + len > end {
            return false;
        }
        layout.put_entry(block, offset, len, entry);
        last = Some(offset);
        offset += len;
    }
    match last {
        Some(last) => layout.set_rec_len(block, last, end - last),
        None => layout.put_header(block, 0, 0, end),
    }
    put_tail(block, layout);
    true
}

/// Makes the first block of a new directory.
pub fn fill_dots(block: &mut [u8], layout: DirLayout, ino: u32, parent: u32) {
    let dots: [(&[u8], u32, u8); 2] = [(b".", ino, DIR_TYPE), (b"..", parent, DIR_TYPE)];
    let fits = fill(block, layout, dots);
    debug_assert!(fits);
}

/// Writes the tail of a leaf block, its checksum still zero.
fn put_tail(block: &mut [u8], layout: DirLayout) {
    if layout.tail {
        let tail = RawDirentTail {
            det_reserved_zero1: U32::ZERO,
            det_rec_len: U16::new(12),
            det_reserved_zero2: 0,
            det_reserved_ft: TAIL_FILE_TYPE,
            det_checksum: U32::ZERO,
        };
        block[layout.block_size - TAIL_LEN..].copy_from_slice(tail.as_bytes());
    }
}

/// Returns the tail of a leaf block if it is there.
pub fn tail(block: &[u8]) -> Option<&RawDirentTail> {
    let (_, tail) = RawDirentTail::ref_from_suffix(block).ok()?;
    let shaped = tail.det_reserved_zero1.get() == 0
        && tail.det_rec_len.get() == 12
        && tail.det_reserved_zero2 == 0
        && tail.det_reserved_ft == TAIL_FILE_TYPE;
    shaped.then_some(tail)
}

/// The inodes that "." and ".." of a first directory block name.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Dots {
    /// Inode of ".".
    pub this: u32,
    /// Inode of "..".
    pub parent: u32,
    /// Where the entry ".." is.
    pub parent_at: usize,
    /// Where the entries after ".." begin.
    pub rest: usize,
}

/// Reads "." and ".." of a first block, linear or the root of an index.
///
/// # Errors
/// They are damaged or not there.
pub fn dots(block: &[u8], layout: DirLayout) -> Result<Dots, DirentError> {
    // The ".." of an index root covers the whole block, tail and all.
    let end = layout.block_size;
    let dot = layout.entry(block, 0, end)?;
    if dot.name != b"." || dot.rec_len + MIN_REC_LEN > end {
        return Err(DirentError::Dots);
    }
    let dotdot = layout.entry(block, dot.rec_len, end)?;
    if dotdot.name != b".." {
        return Err(DirentError::Dots);
    }
    let at = dotdot.offset;
    Ok(Dots {
        this: dot.ino,
        parent: dotdot.ino,
        parent_at: at,
        rest: at + dotdot.rec_len,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(block_size: usize, tail: bool) -> DirLayout {
        DirLayout {
            block_size,
            filetype: true,
            tail,
            max_ino: 100,
        }
    }

    /// `mke2fs -t ext4 -b 1024 -N 16`, first block of the root directory, without its checksum.
    #[test]
    fn dots_are_as_mke2fs_makes_them() {
        let mut block = vec![0xaa; 1024];
        fill_dots(&mut block, layout(1024, true), 2, 2);
        assert_eq!(block[..12], *b"\x02\0\0\0\x0c\0\x01\x02.\0\0\0");
        assert_eq!(block[12..24], *b"\x02\0\0\0\xe8\x03\x02\x02..\0\0");
        assert!(block[24..1012].iter().all(|&b| b == 0));
        assert_eq!(block[1012..], *b"\0\0\0\0\x0c\0\0\xde\0\0\0\0");
        assert!(tail(&block).is_some());
    }

    #[test]
    fn lengths_of_64k_blocks_fit_16_bits() {
        let big = layout(65536, false);
        for len in (12..=65536).step_by(4) {
            assert_eq!(big.decode_rec_len(big.encode_rec_len(len)), len);
        }
        assert_eq!(big.encode_rec_len(65536), 0xffff);
        assert_eq!(big.decode_rec_len(0), 65536);
        let small = layout(4096, false);
        assert_eq!(small.decode_rec_len(0xffff), 0xffff);
    }

    #[test]
    fn each_damage_has_its_name() {
        let good = {
            let mut block = vec![0; 1024];
            fill_dots(&mut block, layout(1024, false), 2, 2);
            block
        };
        let damaged = |at: usize, bytes: &[u8]| {
            let mut block = good.clone();
            block[at..at + bytes.len()].copy_from_slice(bytes);
            find(&block, layout(1024, false), b"x").unwrap_err()
        };
        assert_eq!(
            damaged(4, &[8]),
            DirentError::RecLen {
                offset: 0,
                rec_len: 8
            }
        );
        assert_eq!(
            damaged(4, &[14]),
            DirentError::RecLen {
                offset: 0,
                rec_len: 14
            }
        );
        let short = DirentError::NameLen {
            offset: 0,
            rec_len: 12,
            name_len: 5,
        };
        assert_eq!(damaged(6, &[5]), short);
        let long = DirentError::Overrun {
            offset: 12,
            rec_len: 1016,
        };
        assert_eq!(damaged(16, &1016_u16.to_le_bytes()), long);
        let gap = DirentError::Overrun {
            offset: 12,
            rec_len: 1004,
        };
        assert_eq!(damaged(16, &1004_u16.to_le_bytes()), gap);
        assert_eq!(
            damaged(12, &[101]),
            DirentError::Inode {
                offset: 12,
                ino: 101
            }
        );
        assert_eq!(damaged(6, &[0]), DirentError::EmptyName { offset: 0 });
    }

    #[test]
    fn removal_wipes_the_name() {
        let l = layout(1024, true);
        let mut block = vec![0; 1024];
        assert!(fill(
            &mut block,
            l,
            [(&b"secret"[..], 3, 1), (b"other", 4, 1)]
        ));
        for name in [&b"other"[..], b"secret"] {
            let found = find(&block, l, name).unwrap().unwrap();
            remove(&mut block, l, &found).unwrap();
        }
        assert!(!block.windows(3).any(|w| w == b"sec" || w == b"oth"));
        let all: Vec<_> = entries(&block, l).map(Result::unwrap).collect();
        assert_eq!(all.len(), 1);
        assert_eq!((all[0].ino, all[0].rec_len), (0, 1012));
    }
}
