//! Checks of a block after it was read, checksums before it is written.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// Structure and check that failed, such as `"extent block: checksum"`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Invalid {
    /// See the type.
    pub what: &'static str,
}

/// Knows one kind of block.
pub trait Validator: Send + Sync {
    /// Checks a block that was just read.
    ///
    /// # Errors
    /// What is wrong with it; the buffer is then not cached.
    fn check(&self, block: u64, data: &[u8]) -> Result<(), Invalid>;
    /// Sets the checksum, just before the content goes to the disk or into a log.
    fn prepare(&self, block: u64, data: &mut [u8]);
    /// The bytes that [`Self::prepare`] may change in a block of `len` bytes. A write of a part of
    /// the block takes them along, or the checksum on the disk would not be that of the content; so
    /// a kind of block that does not say is always written whole.
    fn prepared_range(&self, len: usize) -> Range<usize> {
        0..len
    }
}

struct NoCheck;

impl Validator for NoCheck {
    fn check(&self, _: u64, _: &[u8]) -> Result<(), Invalid> {
        Ok(())
    }
    fn prepare(&self, _: u64, _: &mut [u8]) {}
    fn prepared_range(&self, _: usize) -> Range<usize> {
        0..0
    }
}

/// The validator of blocks without a checksum of their own.
#[must_use]
pub fn no_check() -> &'static Arc<dyn Validator> {
    static NO_CHECK: OnceLock<Arc<dyn Validator>> = OnceLock::new();
    NO_CHECK.get_or_init(|| Arc::new(NoCheck))
}
