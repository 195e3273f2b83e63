//! What the directory algorithms need from below: the blocks of one directory.
//!
//! The algorithms are generic over it, so that they run unchanged, and at no cost, over the
//! buffer cache and over plain memory in tests.

use std::ops::{Deref, DerefMut};

use crate::format::dirent::DirLayout;
use crate::format::htree::{CharSign, HashKind, Hasher};

/// How the directories of one file system are read and grown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DirConfig {
    /// How blocks look.
    pub layout: DirLayout,
    /// Whether directories may have an index (feature `dir_index`).
    pub dir_index: bool,
    /// Hash function of new indexes; `None` if the superblock names an unknown one.
    pub default_hash: Option<HashKind>,
    /// Superblock's flag for the hash functions.
    pub sign: CharSign,
    /// Superblock's hash seed.
    pub seed: [u32; 4],
    /// Highest number of node levels between root and leaves.
    pub max_levels: u8,
}

impl DirConfig {
    /// Returns the hash function `kind` as this file system uses it.
    pub fn hasher(&self, kind: HashKind) -> Hasher {
        Hasher {
            kind,
            sign: self.sign,
            seed: self.seed,
        }
    }
}

/// The blocks of one directory, for reading.
pub(crate) trait Store {
    /// A hold on a block.
    type Block: Clone;
    /// Why a block cannot be had.
    type Error;
    /// The content of a block.
    type Bytes<'a>: Deref<Target = [u8]>
    where
        Self: 'a;

    /// Returns the file system's parameters.
    fn config(&self) -> &DirConfig;
    /// Returns how many blocks the directory has.
    fn blocks(&self) -> u32;
    /// Returns whether the directory says that it has an index.
    fn indexed(&self) -> bool;
    /// Reads a block.
    ///
    /// # Errors
    /// The block is a hole, cannot be read, or its checksum is wrong.
    fn read(&self, lblk: u32) -> Result<Self::Block, Self::Error>;
    /// Starts to read blocks that will be asked for soon.
    fn prefetch(&self, lblk: u32, count: u32);
    /// Returns the content of a block.
    fn bytes<'a>(&'a self, block: &'a Self::Block) -> Self::Bytes<'a>;
    /// Reports damage and makes the error for it.
    fn corrupt(&self, what: &'static str, lblk: u32) -> Self::Error;
    /// Reports damage that can be worked around.
    fn warn(&self, what: &'static str, lblk: u32);
}

/// The blocks of one directory, for changing, inside one journal handle.
pub(crate) trait StoreMut: Store {
    /// Write access to a block.
    type BytesMut<'a>: DerefMut<Target = [u8]>
    where
        Self: 'a;

    /// Joins a block to the transaction and opens it for change.
    ///
    /// # Errors
    /// The journal has failed.
    fn edit<'a>(&'a self, block: &'a Self::Block) -> Result<Self::BytesMut<'a>, Self::Error>;
    /// Adds a zeroed block at the end of the directory.
    ///
    /// # Errors
    /// No space, or the directory is as large as it can be.
    fn append(&mut self) -> Result<(u32, Self::Block), Self::Error>;
    /// Says that the directory has an index now.
    fn set_indexed(&mut self);
    /// Says that the directory's index must not be used any more.
    fn clear_indexed(&mut self);
    /// Makes the error for an index that cannot grow.
    fn full(&self) -> Self::Error;
}
