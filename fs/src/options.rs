//! Mount options of the file system.

/// What an error in metadata does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OnError {
    /// Note it in the superblock and go on.
    Continue,
    /// Refuse writes from then on.
    RemountRo,
    /// End the process.
    Panic,
}

/// Which writes of data a commit waits for.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum DataMode {
    /// Data is on disk before metadata that names it.
    #[default]
    Ordered,
    /// Data goes through the journal, as metadata does.
    Journal,
    /// Data may come to the disk after metadata that names it. The same as [`Self::Ordered`] here,
    /// where a commit never waits for data.
    Writeback,
}

/// When reads update access times.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Atime {
    /// When it is older than the last change, or than a day.
    #[default]
    Relative,
    /// At each read.
    Strict,
    /// Never.
    Never,
}

/// Mount options of the file system; those of FUSE stand in `integration`.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// Refuse all changes.
    pub read_only: bool,
    /// Do not replay the journal; only with `read_only`.
    pub noload: bool,
    /// Each change is durable before it is answered.
    pub sync: bool,
    /// Seconds between commits.
    pub commit_secs: u32,
    /// `None`: as the superblock says.
    pub errors: Option<OnError>,
    /// Ordering of data and metadata; `None`: as the superblock says.
    pub data: Option<DataMode>,
    /// Access times.
    pub atime: Atime,
    /// Times alone are not written at once: see [`Inode::lazy_since`](crate::inode::Inode).
    pub lazytime: bool,
    /// POSIX ACLs.
    pub acl: bool,
    /// Attributes of the user name space.
    pub user_xattr: bool,
    /// Bytes of metadata the cache aims to stay under.
    pub cache_bytes: usize,
    /// Whether commits flush the device.
    pub barrier: bool,
    /// Discard freed blocks after commit.
    pub discard: bool,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            noload: false,
            sync: false,
            commit_secs: 5,
            errors: None,
            data: None,
            atime: Atime::Relative,
            lazytime: false,
            acl: true,
            user_xattr: true,
            cache_bytes: 32 << 20,
            barrier: true,
            discard: false,
        }
    }
}
