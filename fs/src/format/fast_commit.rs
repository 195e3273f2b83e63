//! Fast commits: bytes only, no I/O.
//!
//! Between two full commits the kernel notes at the end of the journal what changed since the last
//! one, in a form shorter than whole blocks. A fast commit is a row of tags that ends in a tail with
//! a checksum; the first one begins with a head. All are little-endian, unlike the rest of the
//! journal.
//!
//! Format: Linux `Documentation/filesystems/ext4/journal.rst`, "Fast Commits", and the structures
//! of `fs/ext4/fast_commit.h`.

use std::mem::size_of;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::csum::crc32c;
use super::dirent::MAX_NAME_LEN;
use super::extent::{Extent, RawExtent};
use super::inode::GOOD_OLD_SIZE;
use super::jbd2::Tid;

const ADD_RANGE: u16 = 1;
const DEL_RANGE: u16 = 2;
const CREAT: u16 = 3;
const LINK: u16 = 4;
const UNLINK: u16 = 5;
const INODE: u16 = 6;
const PAD: u16 = 7;
const TAIL: u16 = 8;
const HEAD: u16 = 9;

/// `struct ext4_fc_tl`.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
struct RawTl {
    fc_tag: U16,
    fc_len: U16,
}
const TL_LEN: usize = size_of::<RawTl>();
const _: () = assert!(TL_LEN == 4);

/// `struct ext4_fc_head`.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHead {
    fc_features: U32,
    fc_tid: U32,
}

/// `struct ext4_fc_add_range`.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
struct RawAddRange {
    fc_ino: U32,
    fc_ex: RawExtent,
}
const _: () = assert!(size_of::<RawAddRange>() == 16);

/// `struct ext4_fc_del_range`.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
struct RawDelRange {
    fc_ino: U32,
    fc_lblk: U32,
    fc_len: U32,
}

/// `struct ext4_fc_dentry_info` without the name that follows.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
struct RawDentry {
    fc_parent_ino: U32,
    fc_ino: U32,
}

/// `struct ext4_fc_tail`.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
struct RawTail {
    fc_tid: U32,
    fc_crc: U32,
}

/// A name of an inode in a directory.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FcName {
    /// The directory.
    pub parent: u32,
    /// The inode.
    pub ino: u32,
    /// 1 to 255 bytes, a name that a file can have.
    pub name: Box<[u8]>,
}

/// What a tag says.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum FcTag {
    /// A run of an inode's blocks is mapped so.
    AddRange {
        /// The inode.
        ino: u32,
        /// The run; its length is not 0.
        extent: Extent,
    },
    /// A run of an inode's blocks is mapped no more.
    DelRange {
        /// The inode.
        ino: u32,
        /// First block of the file.
        lblk: u32,
        /// Blocks.
        len: u32,
    },
    /// A new inode and its name.
    Creat(FcName),
    /// A name more.
    Link(FcName),
    /// A name less.
    Unlink(FcName),
    /// The inode as it is at this commit.
    Inode {
        /// The inode.
        ino: u32,
        /// Its first bytes, at least 128; `i_block` is not what counts.
        raw: Box<[u8]>,
    },
}

/// Tags that count together or not at all.
pub type FastCommit = Vec<FcTag>;

/// Why fast commits that count cannot be read.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum FcScanError {
    /// Features of the head that nobody here knows.
    #[error("unknown features {features:#x}")]
    Features {
        /// `fc_features`.
        features: u32,
    },
    /// A tag that nobody here knows.
    #[error("unknown tag {tag}")]
    Tag {
        /// `fc_tag`.
        tag: u16,
    },
    /// A tag whose value cannot be right.
    #[error("tag {tag} with a wrong value of {len} bytes")]
    Value {
        /// `fc_tag`.
        tag: u16,
        /// `fc_len`.
        len: u16,
    },
}

fn name(value: &[u8]) -> Option<FcName> {
    let (raw, name) = RawDentry::ref_from_prefix(value).ok()?;
    let is_name = !matches!(name, [] | b"." | b"..")
        && name.len() <= MAX_NAME_LEN
        && !name.iter().any(|&byte| byte == b'/' || byte == 0);
    is_name.then(|| FcName {
        parent: raw.fc_parent_ino.get(),
        ino: raw.fc_ino.get(),
        name: name.into(),
    })
}

/// Reads the value of a tag that says something about a file; `None` where it is wrong.
fn value(tag: u16, value: &[u8]) -> Option<FcTag> {
    match tag {
        ADD_RANGE => {
            let raw = RawAddRange::ref_from_bytes(value).ok()?;
            let extent = Extent::decode(&raw.fc_ex);
            let ino = raw.fc_ino.get();
            let fits = extent.len > 0 && extent.end() <= u64::from(u32::MAX);
            fits.then_some(FcTag::AddRange { ino, extent })
        }
        DEL_RANGE => {
            let raw = RawDelRange::ref_from_bytes(value).ok()?;
            Some(FcTag::DelRange {
                ino: raw.fc_ino.get(),
                lblk: raw.fc_lblk.get(),
                len: raw.fc_len.get(),
            })
        }
        CREAT => name(value).map(FcTag::Creat),
        LINK => name(value).map(FcTag::Link),
        UNLINK => name(value).map(FcTag::Unlink),
        INODE => {
            let (ino, raw) = U32::ref_from_prefix(value).ok()?;
            (raw.len() >= GOOD_OLD_SIZE).then(|| FcTag::Inode {
                ino: ino.get(),
                raw: raw.into(),
            })
        }
        _ => None,
    }
}

/// Whether the area goes on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FcScan {
    /// The next block may belong to it.
    More,
    /// It ends here.
    End,
}

/// Reads a fast-commit area block by block, up to the last tail that is right.
///
/// The area is never cleared: it ends where something does not fit.
#[derive(Debug)]
pub struct FcScanner {
    expected: Tid,
    /// Nothing was read yet.
    is_start: bool,
    /// Checksum of the commit at hand so far.
    crc: u32,
    current: FastCommit,
    /// The first thing of the commit at hand that cannot be read.
    unread: Option<FcScanError>,
    commits: Vec<FastCommit>,
}

impl FcScanner {
    /// Begins with an area whose commits count if they belong to transaction `expected`.
    #[must_use]
    pub fn new(expected: Tid) -> Self {
        Self {
            expected,
            is_start: true,
            crc: 0,
            current: Vec::new(),
            unread: None,
            commits: Vec::new(),
        }
    }

    /// Reads the next block.
    ///
    /// # Errors
    /// [`FcScanError`] for what belongs to a commit that counts and cannot be read.
    pub fn block(&mut self, block: &[u8]) -> Result<FcScan, FcScanError> {
        let mut rest = block;
        // What is too short for a tag at the end of a block is left unused.
        while let Ok((tl, after)) = RawTl::ref_from_prefix(rest) {
            let tag = tl.fc_tag.get();
            let len = usize::from(tl.fc_len.get());
            // A tag never goes on in the next block.
            let Some(value) = after.get(..len) else {
                return Ok(FcScan::End);
            };
            let whole = &rest[..TL_LEN + len];
            let is_start = std::mem::take(&mut self.is_start);
            if is_start != (tag == HEAD) || !self.tag(tl, whole, value)? {
                return Ok(FcScan::End);
            }
            rest = &after[len..];
        }
        Ok(FcScan::More)
    }

    /// Reads one tag; false where the area ends before it.
    fn tag(&mut self, tl: &RawTl, whole: &[u8], bytes: &[u8]) -> Result<bool, FcScanError> {
        let (tag, len) = (tl.fc_tag.get(), tl.fc_len.get());
        match tag {
            HEAD => {
                let Ok((head, _)) = RawHead::ref_from_prefix(bytes) else {
                    return Ok(false);
                };
                if head.fc_tid.get() != self.expected {
                    return Ok(false);
                }
                let features = head.fc_features.get();
                if features != 0 {
                    return Err(FcScanError::Features { features });
                }
            }
            TAIL => return self.tail(whole, bytes),
            PAD => {}
            ADD_RANGE..=INODE => match value(tag, bytes) {
                Some(value) => self.current.push(value),
                None => {
                    self.unread.get_or_insert(FcScanError::Value { tag, len });
                }
            },
            _ => {
                self.unread.get_or_insert(FcScanError::Tag { tag });
            }
        }
        self.crc = crc32c(self.crc, whole);
        Ok(true)
    }

    fn tail(&mut self, whole: &[u8], bytes: &[u8]) -> Result<bool, FcScanError> {
        let Ok((tail, _)) = RawTail::ref_from_prefix(bytes) else {
            return Ok(false);
        };
        let crc = crc32c(self.crc, &whole[..TL_LEN + size_of::<U32>()]);
        if tail.fc_tid.get() != self.expected || tail.fc_crc.get() != crc {
            return Ok(false);
        }
        if let Some(error) = self.unread {
            return Err(error);
        }
        self.crc = 0;
        self.commits.push(std::mem::take(&mut self.current));
        Ok(true)
    }

    /// The commits that count, oldest first.
    #[must_use]
    pub fn finish(self) -> Vec<FastCommit> {
        self.commits
    }
}

#[cfg(test)]
mod tests;
