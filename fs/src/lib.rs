//! ext2, ext3 and ext4 over a block device, journalled, answered through FUSE.
#![forbid(unsafe_code)]

pub mod alloc;
pub mod batch;
pub mod check;
pub mod core;
pub mod data;
pub mod dir;
pub mod error;
pub mod fast_commit;
pub mod format;
pub mod fuse;
pub mod geometry;
pub mod inode;
pub mod journal;
pub mod mount;
pub mod ops;
pub mod options;
pub mod orphan;
pub mod xattr;

pub use crate::core::{Core, Fs};
pub use error::{FsError, FsResult};
pub use format::inode::{InodeData, InodeFlags, Timespec};
pub use geometry::Geometry;
pub use inode::Inode;
pub use journal::{Handle, Journal};
pub use options::MountOptions;
