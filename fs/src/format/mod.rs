//! Bytes on disk: structures, checksums, nothing that does I/O.

pub mod csum;
pub mod dirent;
pub mod extent;
pub mod fast_commit;
pub mod features;
pub mod group;
pub mod htree;
pub mod inode;
pub mod jbd2;
pub mod superblock;
pub mod xattr;
