//! The format of a log of writes: bytes only, no I/O.
//!
//! Format: `struct log_write_super` and `struct log_write_entry` of Linux
//! `drivers/md/dm-log-writes.c`; `Documentation/admin-guide/device-mapper/log-writes.rst`.
//! The super sector and the head of each entry fill a sector of the log each; what a write wrote
//! follows its head, the text of a mark stands inside its sector.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What a log begins with.
pub const MAGIC: u64 = 0x006a_7366_7773_6872;
/// The one version there is.
pub const VERSION: u64 = 1;

/// The first bytes of a log.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
#[expect(missing_docs, reason = "names of the kernel")]
pub struct RawLogSuper {
    pub magic: U64,
    pub version: U64,
    pub nr_entries: U64,
    pub sectorsize: U32,
}
const _: () = assert!(size_of::<RawLogSuper>() == 28);

/// The first bytes of an entry.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
#[expect(missing_docs, reason = "names of the kernel")]
pub struct RawLogEntry {
    pub sector: U64,
    pub nr_sectors: U64,
    pub flags: U64,
    pub data_len: U64,
}
const _: () = assert!(size_of::<RawLogEntry>() == 32);

/// Bytes of an entry's head, in front of the text of a mark.
pub const ENTRY_HEAD: usize = size_of::<RawLogEntry>();

bitflags::bitflags! {
    /// What an entry is.
    #[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
    pub struct LogFlags: u64 {
        /// What was logged before is durable.
        const FLUSH = 1;
        /// The write was durable when it ended.
        const FUA = 2;
        /// A discard: no data follows.
        const DISCARD = 4;
        /// A text.
        const MARK = 8;
        /// Metadata.
        const METADATA = 16;
    }
}

/// What can be wrong with a log; the caller adds which.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// It cannot be read or written.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// It does not begin as one.
    #[error("not a log of writes: it begins with {found:#x}")]
    Magic {
        /// What stands there.
        found: u64,
    },
    /// It is of another version.
    #[error("version {found}, not {VERSION}")]
    Version {
        /// What stands there.
        found: u64,
    },
    /// Its sectors have no size that sectors have.
    #[error("sectorsize {found} is not a power of two from 512 to 65536")]
    SectorSize {
        /// What stands there.
        found: u32,
    },
    /// It ends before its last entry does.
    #[error("entry {entry}: the log ends")]
    Truncated {
        /// Which.
        entry: u64,
    },
    /// It is nothing: no length and no flag.
    #[error("entry {entry} is empty")]
    Empty {
        /// Which.
        entry: u64,
    },
    /// A flag that nobody knows.
    #[error("entry {entry}: unknown flags {flags:#x}")]
    Flags {
        /// Which.
        entry: u64,
        /// All of its flags.
        flags: u64,
    },
    /// Its range ends behind the last sector there can be.
    #[error("entry {entry}: {nr_sectors} sectors at {sector} are out of range")]
    Range {
        /// Which.
        entry: u64,
        /// Where, in sectors of the log.
        sector: u64,
        /// How much, in sectors of the log.
        nr_sectors: u64,
    },
    /// The text of a mark does not fit.
    #[error("entry {entry}: a mark of {len} bytes, at most {most} fit")]
    Mark {
        /// Which.
        entry: u64,
        /// Its length.
        len: u64,
        /// What fits.
        most: usize,
    },
}
