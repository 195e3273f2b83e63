//! Where a file's blocks are.

use crate::alloc::Run;
use crate::core::Fs;
use crate::error::{FsError, FsResult};
use crate::format::inode::InodeData;
use crate::inode::Inode;
use crate::journal::Handle;

/// What a run of a file's blocks is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum MapKind {
    /// Nothing: reads as zeros.
    Hole,
    /// Blocks with data.
    Mapped,
    /// Blocks that read as zeros until written.
    Unwritten,
}

/// A run of a file's blocks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Mapping {
    /// First block of the file.
    pub lblk: u32,
    /// Blocks, at least 1.
    pub len: u32,
    /// First block of the file system; 0 for a hole.
    pub pblk: u64,
    /// What it is.
    pub kind: MapKind,
}

/// How new blocks begin.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Written {
    /// With data.
    Yes,
    /// As zeros.
    No,
}

/// What to look for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Seek {
    /// The next block with data.
    Data,
    /// The next hole.
    Hole,
}

/// Gives the longest run from `lblk` on, at most `max` blocks.
pub fn lookup(_: &Fs, _: &Inode, _: &InodeData, _lblk: u32, _max: u32) -> FsResult<Mapping> {
    Err(FsError::NotSupported)
}

/// Names blocks for a hole; they were taken by `reserve` and `commit_run` in the same handle.
pub fn insert(
    _: &Fs,
    _: &Handle,
    _: &Inode,
    _: &mut InodeData,
    _lblk: u32,
    _: Run,
    _: Written,
) -> FsResult {
    Err(FsError::NotSupported)
}

/// Turns unwritten blocks into written ones.
pub fn convert(
    _: &Fs,
    _: &Handle,
    _: &Inode,
    _: &mut InodeData,
    _lblk: u32,
    _len: u32,
) -> FsResult {
    Err(FsError::NotSupported)
}

/// Frees blocks `from..to`; `u32::MAX` is the end.
pub fn remove(
    _: &Fs,
    _: &mut Handle,
    _: &Inode,
    _: &mut InodeData,
    _from: u32,
    _to: u32,
) -> FsResult {
    Err(FsError::NotSupported)
}

/// Cuts blocks out and moves what follows down.
pub fn collapse(
    _: &Fs,
    _: &mut Handle,
    _: &Inode,
    _: &mut InodeData,
    _at: u32,
    _len: u32,
) -> FsResult {
    Err(FsError::NotSupported)
}

/// Moves what follows up, leaving a hole.
pub fn insert_range(
    _: &Fs,
    _: &mut Handle,
    _: &Inode,
    _: &mut InodeData,
    _at: u32,
    _len: u32,
) -> FsResult {
    Err(FsError::NotSupported)
}

/// The next data or hole at or after `lblk`; `None` where there is none.
pub fn next(_: &Fs, _: &Inode, _: &InodeData, _lblk: u32, _: Seek) -> FsResult<Option<u32>> {
    Err(FsError::NotSupported)
}

/// Credits for the mapping's own blocks when `runs` runs are inserted.
#[must_use]
pub fn meta_credits(_: &InodeData, runs: u32) -> u32 {
    8 * runs
}
