//! The error code that travels in a bio.

/// Why a bio failed. Small and `Copy`, as the kernel's `blk_status_t`: the place that detects a
/// fault logs it once, with device, operation and sector; everybody above passes the code on.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, thiserror::Error)]
#[repr(u8)]
pub enum BlkError {
    /// The device failed, or a bio was lost.
    #[error("input/output error")]
    Io = 1,
    /// The device below ran out of space (thin images, sparse files on a full host).
    #[error("no space left on the device below")]
    NoSpace,
    /// The device does not know this operation.
    #[error("operation not supported by the device")]
    NotSupported,
    /// A write to a read-only device.
    #[error("device is read-only")]
    ReadOnly,
    /// The range ends past the end of the device.
    #[error("beyond the end of the device")]
    OutOfRange,
    /// Sector, length or memory is not aligned to the device's logical block size.
    #[error("not aligned to the logical block size")]
    Unaligned,
    /// A checksum or integrity tag did not match.
    #[error("data integrity error")]
    Protection,
    /// No memory, where waiting for it was not allowed.
    #[error("out of memory")]
    NoMemory,
    /// The operation would have to wait, and `NOWAIT` was asked for.
    #[error("would block")]
    Again,
    /// The device is gone.
    #[error("no such device")]
    NoDevice,
    /// The device did not answer in time.
    #[error("timed out")]
    TimedOut,
}

/// The result that ends a bio.
pub type BlkResult<T = ()> = Result<T, BlkError>;

impl BlkError {
    /// The errno a caller of the kernel's block layer would see for this code.
    #[must_use]
    pub const fn to_errno(self) -> i32 {
        match self {
            Self::Io => libc::EIO,
            Self::NoSpace => libc::ENOSPC,
            Self::NotSupported => libc::EOPNOTSUPP,
            Self::ReadOnly => libc::EROFS,
            Self::OutOfRange => libc::EIO,
            Self::Unaligned => libc::EINVAL,
            Self::Protection => libc::EILSEQ,
            Self::NoMemory => libc::ENOMEM,
            Self::Again => libc::EAGAIN,
            Self::NoDevice => libc::ENODEV,
            Self::TimedOut => libc::ETIMEDOUT,
        }
    }

    /// The code for an errno that a system call of a backend returned.
    #[must_use]
    pub const fn from_errno(errno: i32) -> Self {
        match errno {
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => Self::NoSpace,
            libc::EOPNOTSUPP | libc::ENOSYS => Self::NotSupported,
            libc::EROFS => Self::ReadOnly,
            libc::EINVAL => Self::Unaligned,
            libc::EILSEQ | libc::EBADMSG => Self::Protection,
            libc::ENOMEM => Self::NoMemory,
            libc::EAGAIN => Self::Again,
            libc::ENODEV | libc::ENXIO => Self::NoDevice,
            libc::ETIMEDOUT => Self::TimedOut,
            _ => Self::Io,
        }
    }

    /// The inverse of `self as u8`; `None` for zero (success).
    pub(crate) const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0 => return None,
            2 => Self::NoSpace,
            3 => Self::NotSupported,
            4 => Self::ReadOnly,
            5 => Self::OutOfRange,
            6 => Self::Unaligned,
            7 => Self::Protection,
            8 => Self::NoMemory,
            9 => Self::Again,
            10 => Self::NoDevice,
            11 => Self::TimedOut,
            _ => Self::Io,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::BlkError;

    #[test]
    fn every_code_comes_back() {
        for code in 1..=11u8 {
            assert_eq!(BlkError::from_code(code).map(|e| e as u8), Some(code));
        }
        assert_eq!(BlkError::from_code(0), None);
    }
}
