//! Image to top device.

use std::path::Path;

use blockstack::backend::file::{FileDisk, OpenError, OpenErrorKind, OpenOptions};
use blockstack::{DynDevice, Sector, SectorCount};
use dmtargets::{TableError, linear_over};

/// Why there is no device for the file system.
#[derive(Debug, thiserror::Error)]
pub enum StackError {
    /// The image cannot be opened; the error names it.
    #[error("image {0}")]
    Open(OpenError),
    /// The image can be read only.
    #[error("image {0} (mount with -o ro to read it)")]
    ReadOnly(OpenError),
    /// The file system would start behind the end of the image.
    #[error("-o offset={offset}: image {image:?} has only {bytes} bytes")]
    Offset {
        /// As given.
        offset: u64,
        /// As given.
        image: String,
        /// Its size.
        bytes: u64,
    },
    /// The device above the image cannot be made.
    #[error("device above the image")]
    Table(#[from] TableError),
}

/// Opens the image and builds what the file system stands on.
///
/// # Errors
/// What is wrong with the image or the offset.
pub fn open(
    image: &Path,
    image_as_given: &str,
    offset: u64,
    read_only: bool,
) -> Result<DynDevice, StackError> {
    let options = OpenOptions {
        read_only,
        ..OpenOptions::default()
    };
    let disk = FileDisk::open(image, options).map_err(|error| {
        let kind = error.kind;
        // A user may lack only the right to write.
        let readable =
            kind == OpenErrorKind::PermissionDenied && std::fs::File::open(image).is_ok();
        if !read_only && (kind == OpenErrorKind::ReadOnly || readable) {
            StackError::ReadOnly(error)
        } else {
            StackError::Open(error)
        }
    })?;
    let disk: DynDevice = disk;
    let bytes = disk.capacity().bytes().unwrap_or(u64::MAX);
    if offset >= bytes {
        return Err(StackError::Offset {
            offset,
            image: image_as_given.to_owned(),
            bytes,
        });
    }
    let start = offset / 512;
    let len = SectorCount::new(disk.capacity().raw() - start);
    Ok(linear_over(disk, Sector::new(start), len)?)
}
