//! The journal on disk (jbd2): bytes only, no I/O.
//!
//! Format: Linux `Documentation/filesystems/ext4/journal.rst`. Everything in the journal is
//! big-endian, the opposite of ext4 itself.
//!
//! | item | what |
//! | --- | --- |
//! | [`RawHeader`], [`Header`] | the first 12 bytes of every block jbd2 owns |
//! | [`RawJournalSuperblock`], [`JournalSuperblock`] | block 0 of the journal |
//! | [`TagFormat`], [`Tag`], [`Tags`], [`DescriptorWriter`] | descriptor blocks |
//! | [`RawCommit`] | commit blocks |
//! | [`Revokes`], [`RevokeWriter`] | revoke blocks |
//! | [`Csum`] | the checksums of csum v2/v3; [`crc32_be`] is that of v1 |
//! | [`LogGeometry`] | arithmetic on the circular log |
//!
//! What stands in the fast-commit area at the end of a journal: [`super::fast_commit`].

use std::mem::{offset_of, size_of};

use zerocopy::big_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The number of a transaction; compared modulo 2^32 ([`tid_gt`]).
pub type Tid = u32;

/// First word of every block jbd2 owns, and of a data block that must be escaped.
pub const MAGIC: u32 = 0xC03B_3998;
/// The magic as it stands on disk.
pub const MAGIC_BYTES: [u8; 4] = MAGIC.to_be_bytes();

/// `h_blocktype` of a descriptor block.
pub const DESCRIPTOR_BLOCK: u32 = 1;
/// `h_blocktype` of a commit block.
pub const COMMIT_BLOCK: u32 = 2;
/// `h_blocktype` of a version 1 superblock.
pub const SUPERBLOCK_V1: u32 = 3;
/// `h_blocktype` of a version 2 superblock.
pub const SUPERBLOCK_V2: u32 = 4;
/// `h_blocktype` of a revoke block.
pub const REVOKE_BLOCK: u32 = 5;

/// A journal shorter than this is refused, as the kernel does.
pub const MIN_JOURNAL_BLOCKS: u32 = 1024;
/// Fast-commit blocks at the end of the log where the superblock says 0.
pub const DEFAULT_FC_BLOCKS: u32 = 256;

const CRC32_CHKSUM: u8 = 1;
const CRC32C_CHKSUM: u8 = 4;
const CRC32_CHKSUM_SIZE: u8 = 4;
const UUID_SIZE: usize = 16;
const TAIL_SIZE: usize = 4;
const HEADER_SIZE: usize = size_of::<RawHeader>();

bitflags::bitflags! {
    /// `s_feature_compat`.
    #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
    pub struct Compat: u32 {
        /// Commit blocks carry a crc32 of the whole transaction (csum v1).
        const CHECKSUM = 0x1;
        const _ = !0;
    }

    /// `s_feature_incompat`.
    #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
    pub struct Incompat: u32 {
        /// Revoke blocks occur.
        const REVOKE = 0x1;
        /// Block numbers have 64 bits.
        const BIT64 = 0x2;
        /// The commit block may reach the disk before the rest of its transaction.
        const ASYNC_COMMIT = 0x4;
        /// crc32c everywhere, 16 bits of it in a tag.
        const CSUM_V2 = 0x8;
        /// crc32c everywhere, 32 bits of it in a tag.
        const CSUM_V3 = 0x10;
        /// The end of the log is a fast-commit area.
        const FAST_COMMIT = 0x20;
        const _ = !0;
    }
}

/// What this reader and writer understand.
const KNOWN_INCOMPAT: Incompat = Incompat::REVOKE
    .union(Incompat::BIT64)
    .union(Incompat::ASYNC_COMMIT)
    .union(Incompat::CSUM_V2)
    .union(Incompat::CSUM_V3)
    .union(Incompat::FAST_COMMIT);

bitflags::bitflags! {
    /// `t_flags` of a tag.
    #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
    pub struct TagFlags: u16 {
        /// The first four bytes were the magic and are zero in the log.
        const ESCAPE = 0x1;
        /// No UUID follows this tag.
        const SAME_UUID = 0x2;
        /// Never written, kept for completeness.
        const DELETED = 0x4;
        /// The last tag of the descriptor block.
        const LAST_TAG = 0x8;
        const _ = !0;
    }
}

/// Whether transaction `a` is younger than `b`.
#[must_use]
pub const fn tid_gt(a: Tid, b: Tid) -> bool {
    a != b && a.wrapping_sub(b) < 1 << 31
}

/// Whether transaction `a` is `b` or younger.
#[must_use]
pub const fn tid_geq(a: Tid, b: Tid) -> bool {
    a.wrapping_sub(b) < 1 << 31
}

/// `journal_header_t`.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawHeader {
    /// [`MAGIC`].
    pub h_magic: U32,
    /// One of the `*_BLOCK` constants.
    pub h_blocktype: U32,
    /// The transaction.
    pub h_sequence: U32,
}
const _: () = assert!(size_of::<RawHeader>() == 12);

/// The header of a block that starts with the magic.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Header {
    /// `h_blocktype`.
    pub blocktype: u32,
    /// `h_sequence`.
    pub sequence: Tid,
}

impl Header {
    /// Reads the header; `None` where the block does not start with the magic.
    #[must_use]
    pub fn of(block: &[u8]) -> Option<Self> {
        let (raw, _) = RawHeader::ref_from_prefix(block).ok()?;
        (raw.h_magic.get() == MAGIC).then(|| Self {
            blocktype: raw.h_blocktype.get(),
            sequence: raw.h_sequence.get(),
        })
    }

    /// Writes the header to the start of `block`, which is longer than a header.
    fn put(self, block: &mut [u8]) {
        let raw = RawHeader {
            h_magic: MAGIC.into(),
            h_blocktype: self.blocktype.into(),
            h_sequence: self.sequence.into(),
        };
        block[..HEADER_SIZE].copy_from_slice(raw.as_bytes());
    }
}

/// `journal_superblock_t`.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
#[expect(
    missing_docs,
    reason = "the names are those of the kernel's documentation"
)]
pub struct RawJournalSuperblock {
    pub s_header: RawHeader,
    pub s_blocksize: U32,
    pub s_maxlen: U32,
    pub s_first: U32,
    pub s_sequence: U32,
    pub s_start: U32,
    pub s_errno: I32,
    pub s_feature_compat: U32,
    pub s_feature_incompat: U32,
    pub s_feature_ro_compat: U32,
    pub s_uuid: [u8; 16],
    pub s_nr_users: U32,
    pub s_dynsuper: U32,
    pub s_max_transaction: U32,
    pub s_max_trans_data: U32,
    pub s_checksum_type: u8,
    pub s_padding2: [u8; 3],
    pub s_num_fc_blks: U32,
    pub s_head: U32,
    pub s_padding: [U32; 40],
    pub s_checksum: U32,
    pub s_users: [[u8; 16]; 48],
}
const _: () = assert!(size_of::<RawJournalSuperblock>() == 1024);
const _: () = assert!(offset_of!(RawJournalSuperblock, s_uuid) == 0x30);
const _: () = assert!(offset_of!(RawJournalSuperblock, s_num_fc_blks) == 0x54);
const _: () = assert!(offset_of!(RawJournalSuperblock, s_checksum) == 0xFC);

/// `struct commit_header`.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
#[expect(
    missing_docs,
    reason = "the names are those of the kernel's documentation"
)]
pub struct RawCommit {
    pub h_header: RawHeader,
    pub h_chksum_type: u8,
    pub h_chksum_size: u8,
    pub h_padding: [u8; 2],
    pub h_chksum: [U32; 8],
    pub h_commit_sec: U64,
    pub h_commit_nsec: U32,
}
const _: () = assert!(size_of::<RawCommit>() == 60);
const _: () = assert!(offset_of!(RawCommit, h_commit_sec) == 0x30);

/// `jbd2_journal_revoke_header_t`.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRevokeHeader {
    r_header: RawHeader,
    r_count: U32,
}
const REVOKE_HEADER_SIZE: usize = size_of::<RawRevokeHeader>();
const _: () = assert!(REVOKE_HEADER_SIZE == 16);

/// `journal_block_tag3_t` (csum v3).
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
struct RawTag3 {
    t_blocknr: U32,
    t_flags: U32,
    t_blocknr_high: U32,
    t_checksum: U32,
}
const _: () = assert!(size_of::<RawTag3>() == 16);

/// `journal_block_tag_t` (all others); `t_blocknr_high` exists with the 64bit feature only.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
struct RawTag {
    t_blocknr: U32,
    t_checksum: U16,
    t_flags: U16,
}
const _: () = assert!(size_of::<RawTag>() == 8);

/// What can be wrong with a journal superblock.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum JournalSbError {
    /// The block is shorter than a superblock.
    #[error("journal superblock: only {len} bytes")]
    Short {
        /// The bytes there are.
        len: usize,
    },
    /// The first word is not jbd2's.
    #[error("journal superblock: magic number is {found:#010x}")]
    Magic {
        /// What stands there.
        found: u32,
    },
    /// Neither version 1 nor version 2.
    #[error("journal superblock: block type is {found}")]
    BlockType {
        /// `h_blocktype`.
        found: u32,
    },
    /// The checksum differs.
    #[error("journal superblock: checksum is {found:#010x}, expected {want:#010x}")]
    Checksum {
        /// `s_checksum`.
        found: u32,
        /// What it must be.
        want: u32,
    },
    /// A checksum type other than crc32c.
    #[error("journal superblock: checksum type is {found}")]
    ChecksumType {
        /// `s_checksum_type`.
        found: u8,
    },
    /// Two generations of checksums at once.
    #[error("journal superblock: contradicting checksum features {incompat:#x}")]
    ChecksumFeatures {
        /// `s_feature_incompat`.
        incompat: u32,
    },
    /// A feature nobody here knows.
    #[error("journal superblock: unknown incompatible features {unknown:#x}")]
    UnknownFeatures {
        /// The unknown bits.
        unknown: u32,
    },
    /// The journal's block size is not the file system's.
    #[error("journal superblock: block size is {found}, the file system's is {want}")]
    BlockSize {
        /// `s_blocksize`.
        found: u32,
        /// The file system's.
        want: u32,
    },
    /// The superblock says more blocks than the journal file has.
    #[error("journal superblock: {maxlen} blocks, but the journal file has {have}")]
    TooLong {
        /// `s_maxlen`.
        maxlen: u32,
        /// Blocks of the file.
        have: u64,
    },
    /// Fewer blocks than the kernel accepts.
    #[error("journal superblock: too short, first block {first}, end {end}")]
    TooShort {
        /// `s_first`.
        first: u32,
        /// First block past the log.
        end: u32,
    },
    /// `s_first` is 0 or outside.
    #[error("journal superblock: first log block {first} of {maxlen}")]
    First {
        /// `s_first`.
        first: u32,
        /// `s_maxlen`.
        maxlen: u32,
    },
    /// `s_start` is outside the log.
    #[error("journal superblock: log start {start} lies outside {first}..{end}")]
    Start {
        /// `s_start`.
        start: u32,
        /// First block of the log.
        first: u32,
        /// First block past it.
        end: u32,
    },
    /// The fast-commit area leaves no room for a log.
    #[error("journal superblock: {fc} fast-commit blocks of {maxlen}")]
    FastCommitBlocks {
        /// `s_num_fc_blks`.
        fc: u32,
        /// `s_maxlen`.
        maxlen: u32,
    },
}

/// A journal superblock whose fields were all checked once.
#[derive(Clone)]
pub struct JournalSuperblock {
    raw: RawJournalSuperblock,
    geometry: LogGeometry,
}

impl JournalSuperblock {
    /// Checks the superblock at the start of `block`, block 0 of a journal file of
    /// `journal_blocks` blocks in a file system of `block_size`.
    ///
    /// # Errors
    ///
    /// The first check that fails.
    pub fn parse(
        block: &[u8],
        block_size: u32,
        journal_blocks: u64,
    ) -> Result<Self, JournalSbError> {
        let Ok((raw, _)) = RawJournalSuperblock::ref_from_prefix(block) else {
            return Err(JournalSbError::Short { len: block.len() });
        };
        let mut raw = *raw;
        if raw.s_header.h_magic.get() != MAGIC {
            return Err(JournalSbError::Magic {
                found: raw.s_header.h_magic.get(),
            });
        }
        match raw.s_header.h_blocktype.get() {
            SUPERBLOCK_V2 => {}
            // A version 1 superblock ends before the features: what follows is not defined.
            SUPERBLOCK_V1 => {
                raw.as_mut_bytes()[offset_of!(RawJournalSuperblock, s_feature_compat)..].fill(0)
            }
            found => return Err(JournalSbError::BlockType { found }),
        }
        Self::check_features(&raw)?;
        let geometry = Self::check_geometry(&raw, block_size, journal_blocks)?;
        Ok(Self { raw, geometry })
    }

    fn check_features(raw: &RawJournalSuperblock) -> Result<(), JournalSbError> {
        let incompat = Incompat::from_bits_retain(raw.s_feature_incompat.get());
        let unknown = incompat.difference(KNOWN_INCOMPAT);
        let unknown = unknown.bits() | raw.s_feature_ro_compat.get();
        if unknown != 0 {
            return Err(JournalSbError::UnknownFeatures { unknown });
        }
        let v2or3 = incompat.intersection(Incompat::CSUM_V2.union(Incompat::CSUM_V3));
        let v1 = raw.s_feature_compat.get() & Compat::CHECKSUM.bits() != 0;
        if v2or3.bits().count_ones() + u32::from(v1) > 1 {
            return Err(JournalSbError::ChecksumFeatures {
                incompat: incompat.bits(),
            });
        }
        if !v2or3.is_empty() {
            if raw.s_checksum_type != CRC32C_CHKSUM {
                return Err(JournalSbError::ChecksumType {
                    found: raw.s_checksum_type,
                });
            }
            let (found, want) = (raw.s_checksum.get(), sb_checksum(raw));
            if found != want {
                return Err(JournalSbError::Checksum { found, want });
            }
        }
        Ok(())
    }

    fn check_geometry(
        raw: &RawJournalSuperblock,
        block_size: u32,
        journal_blocks: u64,
    ) -> Result<LogGeometry, JournalSbError> {
        if raw.s_blocksize.get() != block_size {
            let found = raw.s_blocksize.get();
            return Err(JournalSbError::BlockSize {
                found,
                want: block_size,
            });
        }
        let (maxlen, first) = (raw.s_maxlen.get(), raw.s_first.get());
        if u64::from(maxlen) > journal_blocks {
            return Err(JournalSbError::TooLong {
                maxlen,
                have: journal_blocks,
            });
        }
        if first == 0 || first >= maxlen {
            return Err(JournalSbError::First { first, maxlen });
        }
        let end = log_end(raw)?;
        // The kernel counts the superblock's block as part of the log here.
        if end < MIN_JOURNAL_BLOCKS || first > end - MIN_JOURNAL_BLOCKS + 1 {
            return Err(JournalSbError::TooShort { first, end });
        }
        let start = raw.s_start.get();
        if start != 0 && !(first..end).contains(&start) {
            return Err(JournalSbError::Start { start, first, end });
        }
        Ok(LogGeometry { first, end })
    }

    /// The log without the superblock and the fast-commit area.
    #[must_use]
    pub const fn geometry(&self) -> LogGeometry {
        self.geometry
    }

    /// Blocks of the journal as the superblock counts them (`s_maxlen`).
    #[must_use]
    pub fn maxlen(&self) -> u32 {
        self.raw.s_maxlen.get()
    }

    /// The first transaction replay has to look for (`s_sequence`).
    #[must_use]
    pub fn sequence(&self) -> Tid {
        self.raw.s_sequence.get()
    }

    /// Where the log starts; `None` for an empty journal (`s_start` = 0).
    #[must_use]
    pub fn start(&self) -> Option<u32> {
        Some(self.raw.s_start.get()).filter(|&start| start != 0)
    }

    /// The error an aborted journal recorded; 0 for none. Stored negative, as the kernel does.
    #[must_use]
    pub fn errno(&self) -> i32 {
        self.raw.s_errno.get()
    }

    /// `s_feature_incompat`.
    #[must_use]
    pub fn incompat(&self) -> Incompat {
        Incompat::from_bits_retain(self.raw.s_feature_incompat.get())
    }

    /// `s_feature_compat`.
    #[must_use]
    pub fn compat(&self) -> Compat {
        Compat::from_bits_retain(self.raw.s_feature_compat.get())
    }

    /// `s_uuid`.
    #[must_use]
    pub const fn uuid(&self) -> [u8; 16] {
        self.raw.s_uuid
    }

    /// File systems that share the journal; more than one means an external journal.
    #[must_use]
    pub fn users(&self) -> u32 {
        self.raw.s_nr_users.get()
    }

    /// The checksums this journal's features ask for.
    #[must_use]
    pub fn csum(&self) -> Csum {
        if self
            .incompat()
            .intersects(Incompat::CSUM_V2.union(Incompat::CSUM_V3))
        {
            Csum::V23 {
                seed: crc32c(!0, &self.raw.s_uuid),
            }
        } else if self.compat().contains(Compat::CHECKSUM) {
            Csum::V1
        } else {
            Csum::None
        }
    }

    /// The form of the tags this journal's features ask for.
    #[must_use]
    pub fn tag_format(&self) -> TagFormat {
        TagFormat::new(self.incompat())
    }

    /// Blocks kept for fast commits, from `geometry().end` on; 0 without the feature.
    #[must_use]
    pub fn fc_len(&self) -> u32 {
        self.maxlen() - self.geometry.end
    }

    /// Sets where the log starts and which transaction is there; `None` marks it empty.
    pub fn set_tail(&mut self, sequence: Tid, start: Option<u32>) {
        self.raw.s_sequence = sequence.into();
        self.raw.s_start = start.unwrap_or(0).into();
    }

    /// Records the head, which e2fsprogs and the kernel read as a hint for an empty journal.
    pub fn set_head(&mut self, head: u32) {
        self.raw.s_head = head.into();
    }

    /// Records an abort (a positive errno) or, with 0, clears it.
    pub fn set_errno(&mut self, errno: i32) {
        self.raw.s_errno = errno.wrapping_neg().into();
    }

    /// Whether a fast-commit area would leave room for a log.
    #[must_use]
    pub fn has_fc_room(&self) -> bool {
        let mut raw = self.raw;
        let incompat = self.incompat().union(Incompat::FAST_COMMIT);
        raw.s_feature_incompat = incompat.bits().into();
        log_end(&raw).is_ok_and(|end| self.geometry.first + MIN_JOURNAL_BLOCKS <= end + 1)
    }

    /// Chooses the features ext4 gives its journal at mount; only for an empty log, where they
    /// change how it is read. Turns a version 1 superblock into version 2.
    pub fn set_features(&mut self, compat: Compat, incompat: Incompat) {
        self.raw.s_header.h_blocktype = SUPERBLOCK_V2.into();
        self.raw.s_feature_compat = compat.bits().into();
        self.raw.s_feature_incompat = incompat.bits().into();
        let v23 = incompat.intersects(Incompat::CSUM_V2.union(Incompat::CSUM_V3));
        self.raw.s_checksum_type = if v23 { CRC32C_CHKSUM } else { 0 };
        if let Ok(end) = log_end(&self.raw) {
            self.geometry.end = end;
        }
    }

    /// The 1024 bytes for the disk, with their checksum.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; 1024] {
        let mut raw = self.raw;
        let v23 = matches!(self.csum(), Csum::V23 { .. });
        raw.s_checksum = if v23 {
            sb_checksum(&raw).into()
        } else {
            U32::ZERO
        };
        zerocopy::transmute!(raw)
    }
}

/// The block after the last one of the log.
fn log_end(raw: &RawJournalSuperblock) -> Result<u32, JournalSbError> {
    let maxlen = raw.s_maxlen.get();
    if raw.s_feature_incompat.get() & Incompat::FAST_COMMIT.bits() == 0 {
        return Ok(maxlen);
    }
    let fc = fc_blocks(raw);
    maxlen
        .checked_sub(fc)
        .filter(|&end| end > raw.s_first.get())
        .ok_or(JournalSbError::FastCommitBlocks { fc, maxlen })
}

fn fc_blocks(raw: &RawJournalSuperblock) -> u32 {
    match raw.s_num_fc_blks.get() {
        0 => DEFAULT_FC_BLOCKS,
        n => n,
    }
}

fn sb_checksum(raw: &RawJournalSuperblock) -> u32 {
    let mut copy = *raw;
    copy.s_checksum = U32::ZERO;
    crc32c(!0, copy.as_bytes())
}

/// crc32c as the kernel calls it: the state goes in and comes out without inversion.
fn crc32c(state: u32, data: &[u8]) -> u32 {
    !crc32c::crc32c_append(!state, data)
}

const CRC32_BE: [u32; 256] = {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let mut crc = (i as u32) << 24;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 << 31 == 0 {
                crc << 1
            } else {
                crc << 1 ^ 0x04C1_1DB7
            };
            bit += 1;
        }
        table[i] = crc;
        i += 1;
    }
    table
};

/// The checksum of csum v1: crc32, most significant bit first, no inversion; starts at `!0`.
#[must_use]
pub fn crc32_be(state: u32, data: &[u8]) -> u32 {
    data.iter().fold(state, |crc, &byte| {
        let [top, ..] = crc.to_be_bytes();
        crc << 8 ^ CRC32_BE[usize::from(top ^ byte)]
    })
}

/// Which checksums the blocks of a journal carry.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Csum {
    /// None.
    None,
    /// A crc32 of the whole transaction in the commit block.
    V1,
    /// crc32c in each tag, at the end of descriptor and revoke blocks and in the commit block.
    V23 {
        /// crc32c of the journal's UUID.
        seed: u32,
    },
}

impl Csum {
    /// Bytes the checksum takes at the end of a descriptor or revoke block.
    #[must_use]
    pub const fn tail_len(self) -> usize {
        match self {
            Self::V23 { .. } => TAIL_SIZE,
            Self::None | Self::V1 => 0,
        }
    }

    fn block_sum(seed: u32, block: &[u8]) -> u32 {
        let body = block.len() - TAIL_SIZE;
        crc32c(crc32c(seed, &block[..body]), &[0; TAIL_SIZE])
    }

    /// Writes the tail of a descriptor or revoke block.
    pub fn seal_block(self, block: &mut [u8]) {
        if let Self::V23 { seed } = self {
            let sum = Self::block_sum(seed, block);
            let body = block.len() - TAIL_SIZE;
            block[body..].copy_from_slice(&sum.to_be_bytes());
        }
    }

    /// Whether the tail of a descriptor or revoke block is right.
    #[must_use]
    pub fn block_ok(self, block: &[u8]) -> bool {
        match self {
            Self::V23 { seed } => block.ends_with(&Self::block_sum(seed, block).to_be_bytes()),
            Self::None | Self::V1 => true,
        }
    }

    /// The checksum a tag carries for `data`, the block as it stands in the log (escaped).
    #[must_use]
    pub fn tag_sum(self, sequence: Tid, data: &[u8]) -> u32 {
        match self {
            Self::V23 { seed } => crc32c(crc32c(seed, &sequence.to_be_bytes()), data),
            Self::None | Self::V1 => 0,
        }
    }

    /// Fills `block` (zeroed before) with a commit record; `v1_sum` is the crc32 of the
    /// transaction's descriptor and data blocks.
    pub fn put_commit(self, block: &mut [u8], sequence: Tid, sec: u64, nsec: u32, v1_sum: u32) {
        let mut raw = RawCommit {
            h_header: RawHeader {
                h_magic: MAGIC.into(),
                h_blocktype: COMMIT_BLOCK.into(),
                h_sequence: sequence.into(),
            },
            h_chksum_type: 0,
            h_chksum_size: 0,
            h_padding: [0; 2],
            h_chksum: [U32::ZERO; 8],
            h_commit_sec: sec.into(),
            h_commit_nsec: nsec.into(),
        };
        match self {
            Self::None => {}
            Self::V1 => {
                raw.h_chksum_type = CRC32_CHKSUM;
                raw.h_chksum_size = CRC32_CHKSUM_SIZE;
                raw.h_chksum[0] = v1_sum.into();
            }
            Self::V23 { seed } => {
                // The sum covers the whole block with its own field zero.
                block[..size_of::<RawCommit>()].copy_from_slice(raw.as_bytes());
                raw.h_chksum[0] = crc32c(seed, block).into();
            }
        }
        block[..size_of::<RawCommit>()].copy_from_slice(raw.as_bytes());
    }

    /// Checks a commit block; `v1_sum` is that of the blocks seen since the commit before.
    #[must_use]
    pub fn commit_ok(self, block: &[u8], v1_sum: u32) -> bool {
        let Ok((raw, rest)) = RawCommit::ref_from_prefix(block) else {
            return false;
        };
        match self {
            Self::None => true,
            Self::V1 => {
                let stored = (raw.h_chksum_type, raw.h_chksum_size, raw.h_chksum[0].get());
                // All zero: written while the feature was off.
                stored == (CRC32_CHKSUM, CRC32_CHKSUM_SIZE, v1_sum) || stored == (0, 0, 0)
            }
            Self::V23 { seed } => {
                let mut copy = *raw;
                copy.h_chksum[0] = U32::ZERO;
                let head = crc32c(seed, copy.as_bytes());
                let found = raw.h_chksum[0].get();
                // A torn commit block is good when only what follows the record is stale: the
                // record itself fits the first sector and the rest was written as zeros.
                found == crc32c(head, rest) || found == crc32c_zeros(head, rest.len())
            }
        }
    }
}

fn crc32c_zeros(mut state: u32, mut len: usize) -> u32 {
    const ZEROS: [u8; 512] = [0; 512];
    while len > 0 {
        let n = len.min(ZEROS.len());
        state = crc32c(state, &ZEROS[..n]);
        len -= n;
    }
    state
}

/// Seconds and nanoseconds a commit block says it was written at.
#[must_use]
pub fn commit_time(block: &[u8]) -> (u64, u32) {
    RawCommit::ref_from_prefix(block).map_or((0, 0), |(raw, _)| {
        (raw.h_commit_sec.get(), raw.h_commit_nsec.get())
    })
}

/// The form of the tags in a descriptor block.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TagFormat {
    kind: TagKind,
    wide: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum TagKind {
    Plain,
    V2,
    V3,
}

impl TagFormat {
    /// The form these features ask for.
    #[must_use]
    pub fn new(incompat: Incompat) -> Self {
        let kind = if incompat.contains(Incompat::CSUM_V3) {
            TagKind::V3
        } else if incompat.contains(Incompat::CSUM_V2) {
            TagKind::V2
        } else {
            TagKind::Plain
        };
        Self {
            kind,
            wide: incompat.contains(Incompat::BIT64),
        }
    }

    /// Bytes of a tag without the UUID that follows the first one.
    #[must_use]
    pub const fn size(self) -> usize {
        let high = if self.wide { 4 } else { 0 };
        match self.kind {
            TagKind::V3 => size_of::<RawTag3>(),
            // Two bytes too many since v2 was invented; they are part of the format now.
            TagKind::V2 => size_of::<RawTag>() + 2 + high,
            TagKind::Plain => size_of::<RawTag>() + high,
        }
    }

    /// Tags that fit a descriptor block of `block_size`.
    #[must_use]
    pub const fn per_block(self, block_size: usize, csum: Csum) -> usize {
        (block_size - HEADER_SIZE - UUID_SIZE - csum.tail_len()) / self.size()
    }

    /// Whether `sum` is what the tag carries.
    #[must_use]
    pub fn sum_ok(self, tag: &Tag, sum: u32) -> bool {
        match self.kind {
            TagKind::Plain => true,
            TagKind::V2 => tag.checksum == sum & 0xFFFF,
            TagKind::V3 => tag.checksum == sum,
        }
    }

    fn decode(self, bytes: &[u8]) -> Option<Tag> {
        match self.kind {
            TagKind::V3 => {
                let (raw, _) = RawTag3::ref_from_prefix(bytes).ok()?;
                let high = if self.wide {
                    raw.t_blocknr_high.get()
                } else {
                    0
                };
                let [_, _, hi, lo] = raw.t_flags.get().to_be_bytes();
                Some(Tag {
                    block: u64::from(high) << 32 | u64::from(raw.t_blocknr.get()),
                    flags: TagFlags::from_bits_retain(u16::from_be_bytes([hi, lo])),
                    checksum: raw.t_checksum.get(),
                })
            }
            TagKind::V2 | TagKind::Plain => {
                let (raw, rest) = RawTag::ref_from_prefix(bytes).ok()?;
                let high = if self.wide {
                    U32::ref_from_prefix(rest).ok()?.0.get()
                } else {
                    0
                };
                Some(Tag {
                    block: u64::from(high) << 32 | u64::from(raw.t_blocknr.get()),
                    flags: TagFlags::from_bits_retain(raw.t_flags.get()),
                    checksum: u32::from(raw.t_checksum.get()),
                })
            }
        }
    }

    /// Writes a tag to the start of `out`, which is zeroed and long enough.
    fn encode(self, tag: &Tag, out: &mut [u8]) {
        let [h0, h1, h2, h3, l0, l1, l2, l3] = tag.block.to_be_bytes();
        let (high, low) = ([h0, h1, h2, h3].into(), [l0, l1, l2, l3].into());
        match self.kind {
            TagKind::V3 => {
                let raw = RawTag3 {
                    t_blocknr: low,
                    t_flags: u32::from(tag.flags.bits()).into(),
                    t_blocknr_high: if self.wide { high } else { U32::ZERO },
                    t_checksum: tag.checksum.into(),
                };
                out[..size_of::<RawTag3>()].copy_from_slice(raw.as_bytes());
            }
            TagKind::V2 | TagKind::Plain => {
                let [_, _, c0, c1] = tag.checksum.to_be_bytes();
                let sum = if self.kind == TagKind::V2 {
                    [c0, c1].into()
                } else {
                    U16::ZERO
                };
                let raw = RawTag {
                    t_blocknr: low,
                    t_checksum: sum,
                    t_flags: tag.flags.bits().into(),
                };
                out[..size_of::<RawTag>()].copy_from_slice(raw.as_bytes());
                if self.wide {
                    out[size_of::<RawTag>()..][..4].copy_from_slice(high.as_bytes());
                }
            }
        }
    }
}

/// One entry of a descriptor block: the log block at the same position holds `block`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Tag {
    /// Where the block belongs.
    pub block: u64,
    /// `t_flags`.
    pub flags: TagFlags,
    /// 32 bits with csum v3, 16 with v2, else without meaning.
    pub checksum: u32,
}

/// The tags of a descriptor block, in order; ends at the last tag or where the block does.
#[derive(Clone, Debug)]
pub struct Tags<'a> {
    rest: &'a [u8],
    format: TagFormat,
}

impl<'a> Tags<'a> {
    /// Reads the tags of `block`.
    #[must_use]
    pub fn new(block: &'a [u8], format: TagFormat, csum: Csum) -> Self {
        let end = block.len().saturating_sub(csum.tail_len());
        Self {
            rest: block.get(HEADER_SIZE..end).unwrap_or(&[]),
            format,
        }
    }
}

impl Iterator for Tags<'_> {
    type Item = Tag;

    fn next(&mut self) -> Option<Tag> {
        let size = self.format.size();
        if self.rest.len() < size {
            return None;
        }
        let tag = self.format.decode(self.rest)?;
        let uuid = if tag.flags.contains(TagFlags::SAME_UUID) {
            0
        } else {
            UUID_SIZE
        };
        self.rest = if tag.flags.contains(TagFlags::LAST_TAG) {
            &[]
        } else {
            self.rest.get(size + uuid..).unwrap_or(&[])
        };
        Some(tag)
    }
}

/// Fills one descriptor block.
#[derive(Debug)]
pub struct DescriptorWriter {
    format: TagFormat,
    csum: Csum,
    at: usize,
    last: usize,
    flags_at_last: Option<Tag>,
}

impl DescriptorWriter {
    /// Starts a descriptor block in `block`, which is zeroed.
    pub fn new(block: &mut [u8], sequence: Tid, format: TagFormat, csum: Csum) -> Self {
        Header {
            blocktype: DESCRIPTOR_BLOCK,
            sequence,
        }
        .put(block);
        Self {
            format,
            csum,
            at: HEADER_SIZE,
            last: HEADER_SIZE,
            flags_at_last: None,
        }
    }

    /// Adds a tag; `flags` may say `ESCAPE`, the rest is set here. The caller adds no more than
    /// [`TagFormat::per_block`].
    pub fn push(&mut self, block: &mut [u8], mut tag: Tag, uuid: &[u8; 16]) {
        let first = self.flags_at_last.is_none();
        tag.flags.set(TagFlags::SAME_UUID, !first);
        self.format.encode(&tag, &mut block[self.at..]);
        self.last = self.at;
        self.at += self.format.size();
        if first {
            block[self.at..][..UUID_SIZE].copy_from_slice(uuid);
            self.at += UUID_SIZE;
        }
        self.flags_at_last = Some(tag);
    }

    /// Marks the last tag and writes the checksum.
    pub fn finish(self, block: &mut [u8]) {
        if let Some(mut tag) = self.flags_at_last {
            tag.flags.insert(TagFlags::LAST_TAG);
            self.format.encode(&tag, &mut block[self.last..]);
        }
        self.csum.seal_block(block);
    }
}

/// A revoke block whose byte count lies outside the block.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("revoke block: {count} bytes used")]
pub struct RevokeCountError {
    /// `r_count`.
    pub count: u32,
}

/// The block numbers of a revoke block.
#[derive(Clone, Debug)]
pub struct Revokes<'a> {
    rest: &'a [u8],
    wide: bool,
}

impl<'a> Revokes<'a> {
    /// Reads a revoke block.
    ///
    /// # Errors
    ///
    /// The block says it uses more bytes than it has.
    pub fn new(block: &'a [u8], wide: bool, csum: Csum) -> Result<Self, RevokeCountError> {
        let count = RawRevokeHeader::ref_from_prefix(block).map_or(0, |(raw, _)| raw.r_count.get());
        let end = usize::try_from(count)
            .ok()
            .filter(|&end| end <= block.len() - csum.tail_len())
            .ok_or(RevokeCountError { count })?;
        Ok(Self {
            rest: block.get(REVOKE_HEADER_SIZE..end).unwrap_or(&[]),
            wide,
        })
    }
}

impl Iterator for Revokes<'_> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        if self.wide {
            let (block, rest) = U64::ref_from_prefix(self.rest).ok()?;
            self.rest = rest;
            Some(block.get())
        } else {
            let (block, rest) = U32::ref_from_prefix(self.rest).ok()?;
            self.rest = rest;
            Some(u64::from(block.get()))
        }
    }
}

/// Fills revoke blocks.
#[derive(Clone, Copy, Debug)]
pub struct RevokeWriter {
    wide: bool,
    csum: Csum,
}

impl RevokeWriter {
    /// For a journal whose block numbers are as wide as those of its tags.
    #[must_use]
    pub const fn new(format: TagFormat, csum: Csum) -> Self {
        Self {
            wide: format.wide,
            csum,
        }
    }

    const fn record(self) -> usize {
        if self.wide { 8 } else { 4 }
    }

    /// Records that fit one block.
    #[must_use]
    pub const fn per_block(self, block_size: usize) -> usize {
        (block_size - REVOKE_HEADER_SIZE - self.csum.tail_len()) / self.record()
    }

    /// Fills `block` (zeroed before) with `blocks`, no more than [`Self::per_block`].
    pub fn put(self, block: &mut [u8], sequence: Tid, blocks: &[u64]) {
        Header {
            blocktype: REVOKE_BLOCK,
            sequence,
        }
        .put(block);
        let mut at = REVOKE_HEADER_SIZE;
        for nr in blocks {
            let bytes = nr.to_be_bytes();
            let bytes = &bytes[bytes.len() - self.record()..];
            block[at..][..bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        }
        // `at` is at most a block long, and blocks have at most 65536 bytes.
        let count = U32::new(u32::try_from(at).unwrap_or(0));
        block[HEADER_SIZE..REVOKE_HEADER_SIZE].copy_from_slice(count.as_bytes());
        self.csum.seal_block(block);
    }
}

/// The circular log: blocks `first..end` of the journal.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct LogGeometry {
    /// The first block of the log.
    pub first: u32,
    /// The first block past it.
    pub end: u32,
}

impl LogGeometry {
    /// Blocks of the log.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a log is never of length 0")]
    pub const fn len(self) -> u32 {
        self.end - self.first
    }

    /// The block `n` blocks after `block`; `n` is at most the length of the log.
    #[must_use]
    pub const fn advance(self, block: u32, n: u32) -> u32 {
        let room = self.end - block;
        if n < room {
            block + n
        } else {
            self.first + (n - room)
        }
    }

    /// Steps from `from` on to `to`, less than the length of the log.
    #[must_use]
    pub const fn distance(self, from: u32, to: u32) -> u32 {
        if to >= from {
            to - from
        } else {
            self.len() - (from - to)
        }
    }

    /// Blocks that can be written at `head` while the log starts at `tail`. One block stays
    /// free, so that `head == tail` always means an empty log.
    #[must_use]
    pub const fn free(self, head: u32, tail: u32) -> u32 {
        self.len() - self.distance(tail, head) - 1
    }
}

#[cfg(test)]
mod tests;
