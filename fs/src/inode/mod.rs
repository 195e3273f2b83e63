//! Inodes in memory.

pub(crate) mod block_map;
pub(crate) mod extent_tree;
pub mod io;
pub mod map;
pub mod range;
pub mod table;

use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use blockstack::sync::{Rank, RwLock};
use bufio::{Buffer, Validator, no_check};

use crate::core::{Core, Fs};
use crate::data::FileIo;
use crate::error::{FsError, FsResult};
use crate::format::inode::{InodeData, inode_csum_seed, seal_inode, verify_inode};
use crate::journal::{Class, Handle};
use crate::orphan::OrphanLink;

pub use io::{IoState, Unflushed};
pub use table::InodeTable;

/// Where `i_dtime` stands in an inode.
const DTIME: usize = 0x14;

/// In [`Inode::unlinker`]: a thread without a number.
pub const UNKNOWN_THREAD: u32 = u32::MAX;

/// The root directory.
pub const ROOT_INO: u32 = 2;

/// An inode in memory.
pub struct Inode {
    /// Its number.
    pub ino: u32,
    /// What the disk has of it; the lock is the inode's lock.
    pub data: RwLock<InodeData>,
    /// Seed of the checksums of the inode and of its blocks.
    pub csum_seed: u32,
    /// Checks the inode's extent blocks; made on first need.
    pub extent_validator: OnceLock<Arc<dyn Validator>>,
    /// Checks the inode's directory blocks; made on first need.
    pub dir_validator: OnceLock<Arc<dyn Validator>>,
    /// References the kernel holds.
    pub lookups: AtomicU64,
    /// Thread that removed one of several names of it, [`UNKNOWN_THREAD`] where nobody said who;
    /// 0 once the kernel is known to have heard of it.
    ///
    /// The kernel counts such a name less by itself when it has the answer. Somebody may ask for
    /// attributes before that, get the new count, and then the kernel counts once more. So until
    /// then attributes are given without a lifetime. That the thread sends another request, or that
    /// another name is made, tells that it is over.
    pub unlinker: AtomicU32,
    /// Transaction of the last change.
    pub tid: AtomicU32,
    /// Transaction of the last change that `fdatasync` waits for.
    pub datasync_tid: AtomicU32,
    /// Type bits of the mode, which never change.
    pub type_bits: u16,
    /// Since when its times are newer than what the journal has of it, in seconds since 1970; 0 for
    /// not at all. They are written with its next change, by `fsync`, and before it leaves the memory.
    pub lazy_since: AtomicI64,
    /// Its place in the list of orphans.
    pub orphan: OrphanLink,
    /// Writes under way.
    pub io: IoState,
    /// The control block of its data; made on first need.
    pub dio: OnceLock<FileIo>,
    /// Whether data was written since the device was last flushed for it.
    pub unflushed: Unflushed,
}

impl Inode {
    /// Makes an inode in memory; `fs_seed` is the file system's seed of checksums.
    #[must_use]
    pub fn new(fs_seed: u32, ino: u32, data: InodeData) -> Arc<Self> {
        Arc::new(Self {
            ino,
            csum_seed: inode_csum_seed(fs_seed, ino, data.generation),
            type_bits: data.mode & 0xf000,
            data: RwLock::new(Rank::Inode, data),
            extent_validator: OnceLock::new(),
            dir_validator: OnceLock::new(),
            lookups: AtomicU64::new(0),
            unlinker: AtomicU32::new(0),
            tid: AtomicU32::new(0),
            datasync_tid: AtomicU32::new(0),
            lazy_since: AtomicI64::new(0),
            orphan: OrphanLink::default(),
            io: IoState::default(),
            dio: OnceLock::new(),
            unflushed: Unflushed::default(),
        })
    }

    /// Whether it is a directory.
    #[must_use]
    pub fn is_dir(&self) -> bool {
        u32::from(self.type_bits) == libc::S_IFDIR
    }

    /// Whether it is a regular file.
    #[must_use]
    pub fn is_file(&self) -> bool {
        u32::from(self.type_bits) == libc::S_IFREG
    }
}

/// Blocks of an inode table read at once, as the kernel does (`inode_readahead_blks`).
const READ_AHEAD: u64 = 32;

impl Core {
    /// Block of a group's inode table, from its descriptor.
    ///
    /// # Errors
    /// A descriptor that cannot be read, or that names blocks outside.
    pub fn inode_table(&self, group: u32) -> FsResult<u64> {
        let (block, offset) = self.geo.group_desc_at(group);
        let buffer = self.bufs.read(block, no_check())?;
        let data = buffer.data();
        let low = le32(&data, offset + 8);
        let high = if self.geo.desc_size >= 64 {
            le32(&data, offset + 0x28)
        } else {
            0
        };
        let table = u64::from(low) | u64::from(high) << 32;
        if !self.geo.blocks_in_fs(table, self.geo.itable_blocks.into()) {
            return Err(self.corrupt("group descriptor: bg_inode_table", block, 0));
        }
        Ok(table)
    }

    /// The buffer of an inode, and the byte offset in it.
    ///
    /// # Errors
    /// [`FsError::Stale`] for a number outside; else as [`Self::inode_table`].
    pub fn inode_buffer(&self, ino: u32) -> FsResult<(Buffer, usize)> {
        if ino == 0 || ino > self.geo.inodes_count {
            return Err(FsError::Stale);
        }
        let (group, index) = self.geo.group_of_ino(ino);
        let byte = u64::from(index) * u64::from(self.geo.inode_size);
        let table = self.inode_table(group)?;
        let at = byte >> self.geo.block_bits;
        let block = table + at;
        let buffer = match self.bufs.get(block) {
            Some(buffer) => buffer,
            None => {
                // Whoever asks for one inode of a directory asks for its neighbours next.
                let from = at - at % READ_AHEAD;
                let to = (from + READ_AHEAD).min(self.geo.itable_blocks.into());
                self.bufs.prefetch(table + from, to - from);
                self.bufs.read(block, no_check())?
            }
        };
        Ok((buffer, (byte & u64::from(self.geo.block_size - 1)) as usize))
    }

    /// Reads an inode from its table.
    ///
    /// # Errors
    /// A table that cannot be read, a checksum or field that is wrong.
    pub fn read_inode(&self, ino: u32) -> FsResult<InodeData> {
        let (buffer, offset) = self.inode_buffer(ino)?;
        let block = buffer.block();
        let data = buffer.data();
        let bytes = &data[offset..offset + usize::from(self.geo.inode_size)];
        let inode = InodeData::decode(bytes, self.geo.block_bits).map_err(|error| {
            log::error!("inode {ino}: {error}");
            self.corrupt("inode: i_extra_isize", block, ino)
        })?;
        let in_use = inode.links > 0 || inode.mode != 0;
        if self.geo.metadata_csum() && in_use {
            let seed = inode_csum_seed(self.geo.csum_seed, ino, inode.generation);
            verify_inode(seed, bytes).map_err(|error| {
                log::error!("inode {ino}: {error}");
                self.corrupt("inode: i_checksum", block, ino)
            })?;
        }
        // Blocks of a file have numbers of 32 bits, the last of which no file has.
        if in_use && inode.size > u64::from(u32::MAX) << self.geo.block_bits {
            return Err(self.corrupt("inode: i_size", block, ino));
        }
        Ok(inode)
    }
}

impl Fs {
    /// Writes an inode into its table, as part of `handle`'s transaction.
    ///
    /// # Errors
    /// A table that cannot be read; an aborted journal.
    pub fn write_inode(&self, handle: &Handle, inode: &Inode, data: &InodeData) -> FsResult {
        let (buffer, offset) = self.inode_buffer(inode.ino)?;
        let mut block = handle.write_class(&buffer, Class::Inodes)?;
        let bytes = &mut block[offset..offset + usize::from(self.geo.inode_size)];
        data.encode(bytes, self.geo.block_bits).map_err(|error| {
            log::error!("inode {}: {error}", inode.ino);
            FsError::Invalid
        })?;
        if let Some(next) = inode.orphan.next() {
            // While it is on the list of orphans the field names the next one.
            bytes[DTIME..DTIME + 4].copy_from_slice(&next.to_le_bytes());
        }
        if self.geo.metadata_csum() {
            seal_inode(inode.csum_seed, bytes);
        }
        inode.tid.store(handle.tid(), Ordering::Release);
        inode.lazy_since.store(0, Ordering::Release);
        Ok(())
    }
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

impl Fs {
    /// Lets an orphan's inode on disk name the next one.
    ///
    /// # Errors
    /// As [`Self::write_inode`].
    pub(crate) fn write_orphan_link(&self, handle: &Handle, inode: &Inode, next: u32) -> FsResult {
        let (buffer, offset) = self.inode_buffer(inode.ino)?;
        let mut block = handle.write_class(&buffer, Class::Inodes)?;
        let bytes = &mut block[offset..offset + usize::from(self.geo.inode_size)];
        bytes[DTIME..DTIME + 4].copy_from_slice(&next.to_le_bytes());
        if self.geo.metadata_csum() {
            seal_inode(inode.csum_seed, bytes);
        }
        Ok(())
    }
}
