//! What an operation can fail with.

use blockstack::BlkError;
use bufio::BufError;

/// The result of an operation.
pub type FsResult<T = ()> = Result<T, FsError>;

/// Why an operation failed; `fuse/errno.rs` alone turns it into an errno.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum FsError {
    /// No such file or directory.
    #[error("no such file or directory")]
    NotFound,
    /// The name is taken.
    #[error("file exists")]
    Exists,
    /// Not a directory.
    #[error("not a directory")]
    NotDirectory,
    /// A directory.
    #[error("is a directory")]
    IsDirectory,
    /// The directory has entries.
    #[error("directory not empty")]
    NotEmpty,
    /// No free block or inode.
    #[error("no space left on device")]
    NoSpace,
    /// A name of over 255 bytes.
    #[error("file name too long")]
    NameTooLong,
    /// Not allowed at all, to nobody or to this caller.
    #[error("operation not permitted")]
    NotPermitted,
    /// Permission bits or ACL say no.
    #[error("permission denied")]
    AccessDenied,
    /// Mounted read-only, or made so by an error.
    #[error("read-only file system")]
    ReadOnly,
    /// An argument is wrong.
    #[error("invalid argument")]
    Invalid,
    /// The caller's buffer is too small.
    #[error("result too large for the buffer")]
    Range,
    /// No such attribute.
    #[error("no such attribute")]
    NoData,
    /// Too many hard links.
    #[error("too many links")]
    TooManyLinks,
    /// Beyond the largest file.
    #[error("file too large")]
    FileTooBig,
    /// The file system cannot do this.
    #[error("operation not supported")]
    NotSupported,
    /// In use.
    #[error("busy")]
    Busy,
    /// On another file system or project.
    #[error("cross-device link")]
    CrossDevice,
    /// Nothing there: past the end of file, or no data after it.
    #[error("no such address")]
    NoSuchAddress,
    /// An argument list or attribute is too long.
    #[error("argument too long")]
    TooBig,
    /// A value does not fit its type.
    #[error("value too large")]
    Overflow,
    /// No such ioctl.
    #[error("inappropriate ioctl")]
    NotTty,
    /// No memory.
    #[error("out of memory")]
    NoMemory,
    /// The inode number is not in use any more.
    #[error("stale file handle")]
    Stale,
    /// Shut down by an ioctl: nothing is done any more.
    #[error("file system was shut down")]
    ShutDown,
    /// The journal was aborted after an error.
    #[error("journal aborted")]
    Aborted,
    /// A buffer could not be read or written.
    #[error(transparent)]
    Buf(BufError),
    /// File data could not be read or written.
    #[error(transparent)]
    Data(#[from] BlkError),
    /// The file system is damaged.
    #[error("damaged: {what}, block {block}, inode {ino}")]
    Corrupt {
        /// Structure and field.
        what: &'static str,
        /// The block it stands in, or 0.
        block: u64,
        /// The inode it belongs to, or 0.
        ino: u32,
    },
}

impl From<BufError> for FsError {
    fn from(error: BufError) -> Self {
        match error {
            BufError::Invalid { block, what } => Self::Corrupt {
                what,
                block,
                ino: 0,
            },
            BufError::Blk(_) => Self::Buf(error),
        }
    }
}
