//! Units of position and length on a block device.
//!
//! A sector is always 512 bytes, whatever the device's block size, as in the kernel.

use std::fmt;

/// log2 of the sector size.
pub const SECTOR_SHIFT: u32 = 9;
/// Bytes in a sector.
pub const SECTOR_SIZE: usize = 512;

/// A position on a device, in sectors of 512 bytes from its start.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Sector(u64);

/// A length on a device, in sectors of 512 bytes.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct SectorCount(u64);

impl Sector {
    /// The first sector of a device.
    pub const ZERO: Self = Self(0);

    /// Makes a position from a number of sectors.
    #[must_use]
    pub const fn new(sectors: u64) -> Self {
        Self(sectors)
    }

    /// Makes a position from bytes; `None` where `bytes` is no multiple of 512.
    #[must_use]
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        if bytes % SECTOR_SIZE as u64 == 0 {
            Some(Self(bytes >> SECTOR_SHIFT))
        } else {
            None
        }
    }

    /// The position as a number of sectors.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// The position in bytes; `None` on overflow.
    #[must_use]
    pub const fn bytes(self) -> Option<u64> {
        self.0.checked_mul(SECTOR_SIZE as u64)
    }

    /// The position `count` sectors further on; `None` on overflow.
    #[must_use]
    pub const fn checked_add(self, count: SectorCount) -> Option<Self> {
        match self.0.checked_add(count.0) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }

    /// The distance from `start` to `self`; `None` where `start` lies behind.
    #[must_use]
    pub const fn checked_since(self, start: Self) -> Option<SectorCount> {
        match self.0.checked_sub(start.0) {
            Some(difference) => Some(SectorCount(difference)),
            None => None,
        }
    }
}

impl SectorCount {
    /// No sectors.
    pub const ZERO: Self = Self(0);

    /// Makes a length from a number of sectors.
    #[must_use]
    pub const fn new(sectors: u64) -> Self {
        Self(sectors)
    }

    /// Makes a length from bytes; `None` where `bytes` is no multiple of 512.
    #[must_use]
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        if bytes % SECTOR_SIZE as u64 == 0 {
            Some(Self(bytes >> SECTOR_SHIFT))
        } else {
            None
        }
    }

    /// The length as a number of sectors.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// The length in bytes; `None` on overflow.
    #[must_use]
    pub const fn bytes(self) -> Option<u64> {
        self.0.checked_mul(SECTOR_SIZE as u64)
    }
}

impl fmt::Display for Sector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for SectorCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
