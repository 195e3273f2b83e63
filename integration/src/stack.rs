//! Image to top device.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use blockstack::backend::file::{FileDisk, OpenError, OpenErrorKind, OpenOptions};
use blockstack::{DynDevice, Sector, SectorCount};
use dmtargets::{TableError, linear_over};
use rustix::fs::{major, minor};

/// Why there is no device for the file system.
#[derive(Debug, thiserror::Error)]
pub enum StackError {
    /// The image cannot be opened; the error names it.
    #[error("image {0}")]
    Open(OpenError),
    /// The image can be read only.
    #[error("image {0} (mount with -o ro to read it)")]
    ReadOnly(OpenError),
    /// The image is a block device that is set to be read only.
    #[error("image {image:?} is write-protected (mount with -o ro to read it)")]
    WriteProtected {
        /// As given.
        image: String,
    },
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

/// Whether it is a block device that blockdev(8) or its switch set to be read only.
fn is_write_protected(image: &Path) -> bool {
    let Ok(metadata) = std::fs::metadata(image) else {
        return false;
    };
    if !metadata.file_type().is_block_device() {
        return false;
    }
    let (major, minor) = (major(metadata.rdev()), minor(metadata.rdev()));
    std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/ro"))
        .is_ok_and(|word| word.trim() == "1")
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
    // Such a device can be opened for writing, and every write fails.
    if !read_only && is_write_protected(image) {
        return Err(StackError::WriteProtected {
            image: image_as_given.to_owned(),
        });
    }
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
