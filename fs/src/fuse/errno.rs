//! The errno of each error; the only place that knows.

use bufio::BufError;

use crate::error::FsError;

/// What the kernel's ext4 would return. Damage is `EUCLEAN`, as the kernel's `EFSCORRUPTED` is.
pub(super) fn errno(error: FsError) -> i32 {
    match error {
        FsError::NotFound => libc::ENOENT,
        FsError::Exists => libc::EEXIST,
        FsError::NotDirectory => libc::ENOTDIR,
        FsError::IsDirectory => libc::EISDIR,
        FsError::NotEmpty => libc::ENOTEMPTY,
        FsError::NoSpace => libc::ENOSPC,
        FsError::NameTooLong => libc::ENAMETOOLONG,
        FsError::NotPermitted => libc::EPERM,
        FsError::AccessDenied => libc::EACCES,
        FsError::ReadOnly | FsError::Aborted => libc::EROFS,
        FsError::Invalid => libc::EINVAL,
        FsError::Range => libc::ERANGE,
        FsError::NoData => libc::ENODATA,
        FsError::TooManyLinks => libc::EMLINK,
        FsError::FileTooBig => libc::EFBIG,
        FsError::NotSupported => libc::EOPNOTSUPP,
        FsError::Busy => libc::EBUSY,
        FsError::CrossDevice => libc::EXDEV,
        FsError::NoSuchAddress => libc::ENXIO,
        FsError::TooBig => libc::E2BIG,
        FsError::Overflow => libc::EOVERFLOW,
        FsError::NotTty => libc::ENOTTY,
        FsError::NoMemory => libc::ENOMEM,
        FsError::ShutDown => libc::EIO,
        FsError::Stale => libc::ESTALE,
        FsError::Buf(BufError::Blk(error)) | FsError::Data(error) => error.to_errno(),
        FsError::Buf(BufError::Invalid { .. }) | FsError::Corrupt { .. } => libc::EUCLEAN,
    }
}
