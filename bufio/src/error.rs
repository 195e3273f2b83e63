//! What can go wrong with a buffer.

use blockstack::BlkError;

/// Why a buffer could not be had or written.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum BufError {
    /// The device failed.
    #[error("block device: {0}")]
    Blk(#[from] BlkError),
    /// The content is not what the validator wants.
    #[error("block {block}: {what}")]
    Invalid {
        /// The block, in blocks of the client.
        block: u64,
        /// Structure and check that failed.
        what: &'static str,
    },
}
