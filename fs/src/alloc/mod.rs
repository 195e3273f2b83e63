//! Blocks and inodes: who is free, who is taken.

use std::sync::Arc;

use crate::core::Core;
use crate::error::{FsError, FsResult};
use crate::format::inode::InodeData;
use crate::journal::{CommitHooks, FreedRange, Handle};

/// A run of blocks of the file system.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Run {
    /// First block.
    pub start: u64,
    /// Blocks.
    pub len: u32,
}

/// Who asks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Privilege {
    /// May not use reserved blocks.
    User,
    /// May.
    Root,
}

/// What a freed block held.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BlockUse {
    /// File data.
    Data,
    /// Metadata that went through the journal.
    Metadata,
}

/// What an inode will be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum InodeUse {
    /// A directory; `top` for children of the root.
    Directory {
        /// Whether it stands in the root or a TOPDIR directory.
        top: bool,
    },
    /// Anything else.
    Other,
}

/// Free space.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct FsCounts {
    /// Free blocks, those reserved for root among them.
    pub free_blocks: u64,
    /// Blocks for root only.
    pub reserved_blocks: u64,
    /// Free inodes.
    pub free_inodes: u32,
}

/// The allocator.
pub struct Alloc {
    _core: Arc<Core>,
}

impl Alloc {
    /// Makes the allocator; groups are loaded when first needed.
    pub fn new(core: Arc<Core>) -> FsResult<Arc<Self>> {
        Ok(Arc::new(Self { _core: core }))
    }

    /// Takes `min..=want` blocks near `goal`, in memory only.
    pub fn reserve(&self, _goal: u64, _want: u32, _min: u32, _: Privilege) -> FsResult<Run> {
        Err(FsError::NoSpace)
    }

    /// Gives back a reservation that never reached the disk.
    pub fn unreserve(&self, _: Run) {}

    /// Marks reserved blocks as used on disk.
    pub fn commit_run(&self, _: &Handle, _: Run) -> FsResult {
        Err(FsError::NotSupported)
    }

    /// Takes one block for metadata, in memory and on disk.
    pub fn alloc_meta(&self, _: &Handle, _goal: u64) -> FsResult<u64> {
        Err(FsError::NotSupported)
    }

    /// Frees blocks on disk; they are not handed out before the transaction is committed.
    pub fn free(&self, _: &Handle, _pblk: u64, _len: u32, _: BlockUse) -> FsResult {
        Err(FsError::NotSupported)
    }

    /// Takes an inode near `parent`.
    pub fn alloc_inode(&self, _: &Handle, _parent: u32, _: InodeUse) -> FsResult<u32> {
        Err(FsError::NotSupported)
    }

    /// Frees an inode.
    pub fn free_inode(&self, _: &Handle, _ino: u32, _: InodeUse) -> FsResult {
        Err(FsError::NotSupported)
    }

    /// Where a block of a file had best be.
    #[must_use]
    pub fn goal_for(&self, _ino: u32, _: &InodeData, _lblk: u32) -> u64 {
        0
    }

    /// Free space now.
    #[must_use]
    pub fn counts(&self) -> FsCounts {
        FsCounts::default()
    }
}

impl CommitHooks for Alloc {
    fn committed(&self, _tid: u32, _freed: &[FreedRange]) {}
}
