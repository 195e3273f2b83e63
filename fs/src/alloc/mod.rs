//! Blocks and inodes: who is free, who is taken.
//!
//! Each group has a view in memory of what can be handed out ([`view`](self)'s `FreeMap`), derived
//! from its bitmap when the group is first used. [`Alloc::reserve`] takes blocks out of the view
//! only; [`Alloc::commit_run`] sets their bits on disk within a transaction; [`Alloc::free`] clears
//! bits on disk, and the view gets the blocks back when that transaction is committed.
//!
//! | module | what |
//! |---|---|
//! | `view` | the free items of a group in memory |
//! | `bits` | ranges of bits in an on-disk bitmap |
//! | `group` | descriptor and state of a group |
//! | `blocks` | reserve, commit, free blocks |
//! | `inodes` | take and free inodes |
//! | `claim` | blocks and inodes that a fast commit names |
//! | `trim` | discards of what is free |
//!
//! # Locking
//!
//! A group's `disk` lock (rank `ExtentTree`, I/O may be awaited) is held over a change of bitmap
//! and descriptor; the locks of its views (rank `BlockGroup`) are held for a search only, and
//! inside `disk` where both are needed. One group at a time. Two buffers are never locked at once,
//! so a damaged descriptor that names its own block as a bitmap cannot deadlock.
//!
//! # Counters
//!
//! `free` counts blocks in the views (and in the descriptors of groups not loaded yet). A
//! reservation first subtracts what it wants from it, and only then looks for a place: as long as
//! it is not negative, a place exists, so [`FsError::NoSpace`] is exact.

mod bits;
mod blocks;
mod claim;
mod group;
mod inodes;
mod trim;
mod view;

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use blockstack::sync::{Mutex, Rank};
use bufio::no_check;
use zerocopy::FromBytes;

use self::group::{Desc, Group};
pub use self::inodes::INODE_CREDITS;
use crate::core::Core;
use crate::error::FsResult;
use crate::format::features::Incompat;
use crate::format::group::GroupFlags;
use crate::format::superblock::{RawSuperblock, SUPERBLOCK_SIZE};
use crate::journal::{Class, CommitHooks, FreedRange, Handle};

/// A run of blocks of the file system.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Run {
    /// First block.
    pub start: u64,
    /// Blocks.
    pub len: u32,
}

/// Who asks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Privilege {
    /// May not use reserved blocks.
    User,
    /// May.
    Root,
}

/// What a freed block held.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BlockUse {
    /// File data.
    Data,
    /// Metadata that went through the journal.
    Metadata,
}

/// What an inode will be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum InodeUse {
    /// A directory; `top` for children of the root.
    Directory {
        /// Whether it stands in the root or a TOPDIR directory.
        top: bool,
    },
    /// Anything else.
    Other,
}

/// Free space.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct FsCounts {
    /// Free blocks, those reserved for root among them.
    pub free_blocks: u64,
    /// Blocks that an unprivileged user cannot have.
    pub reserved_blocks: u64,
    /// Free inodes.
    pub free_inodes: u32,
}

/// Up to so many groups the counters are summed up from the descriptors at mount; beyond, a clean
/// superblock is believed, so that the time to mount does not grow with the image.
const SUM_GROUPS: u32 = 1024;

/// The allocator.
pub struct Alloc {
    core: Arc<Core>,
    /// One for each block of descriptors.
    chunks: Box<[OnceLock<Box<[Group]>>]>,
    /// Blocks that can be reserved now.
    free: AtomicI64,
    /// Blocks freed by transactions not yet committed.
    pending: AtomicI64,
    /// Inodes that can be taken now, and those freed but not committed.
    free_inodes: AtomicI64,
    dirs: AtomicI64,
    /// Blocks for root only.
    reserved: i64,
    /// Blocks for the map's own blocks when all others are gone, so that data that is written can
    /// always be named. The kernel's ext4 keeps them where there are extents; on others it looks
    /// for all blocks of a write before it takes the data.
    spare: i64,
    /// Nothing is reserved for anybody.
    is_open: AtomicBool,
    /// Inodes freed by transactions not yet committed: transaction and number.
    freed_inodes: Mutex<Vec<(u32, u32)>>,
    /// Spreads top directories.
    spread: AtomicU32,
    /// The device refused a discard.
    no_discard: AtomicBool,
}

impl Alloc {
    /// Makes the allocator; groups are loaded when first needed.
    ///
    /// # Errors
    /// A superblock or descriptors that cannot be read.
    pub fn new(core: Arc<Core>) -> FsResult<Arc<Self>> {
        let geo = &core.geo;
        let (block, offset) = geo.superblock_at();
        let buffer = core.bufs.read(block, no_check())?;
        let raw = {
            let data = buffer.data();
            let bytes = data.get(offset..offset + SUPERBLOCK_SIZE);
            bytes.and_then(|bytes| RawSuperblock::read_from_bytes(bytes).ok())
        };
        let Some(raw) = raw else {
            return Err(core.corrupt("superblock: size", block, 0));
        };
        let clean = raw.s_state.get() & 1 == 1 && !geo.incompat.contains(Incompat::RECOVER);
        let total = geo.blocks_count as i64;
        let chunks = geo.gdt_blocks();
        let alloc = Arc::new(Self {
            chunks: (0..chunks).map(|_| OnceLock::new()).collect(),
            free: AtomicI64::new(raw.free_blocks() as i64),
            pending: AtomicI64::new(0),
            free_inodes: AtomicI64::new(raw.s_free_inodes_count.get().into()),
            dirs: AtomicI64::new(0),
            reserved: raw.reserved_blocks() as i64,
            spare: (total / 50).min(4096),
            is_open: AtomicBool::new(false),
            freed_inodes: Mutex::new(Rank::Counters, Vec::new()),
            spread: AtomicU32::new(raw.s_wtime.get()),
            no_discard: AtomicBool::new(false),
            core: core.clone(),
        });
        if !clean || geo.group_count <= SUM_GROUPS {
            let (mut blocks, mut inodes) = (0i64, 0i64);
            core.bufs.prefetch(geo.group_desc_at(0).0, chunks.into());
            for g in 0..geo.group_count {
                let group = alloc.group(g)?;
                blocks += i64::from(group.free_blocks.load(Ordering::Relaxed));
                inodes += i64::from(group.free_inodes.load(Ordering::Relaxed));
            }
            alloc.free.store(blocks, Ordering::Relaxed);
            alloc.free_inodes.store(inodes, Ordering::Relaxed);
        }
        Ok(alloc)
    }

    /// Free space now: what the superblock and `statfs` should say.
    #[must_use]
    pub fn counts(&self) -> FsCounts {
        let free = self.free.load(Ordering::Relaxed) + self.pending.load(Ordering::Relaxed);
        let inodes = self.free_inodes.load(Ordering::Relaxed);
        FsCounts {
            free_blocks: u64::try_from(free).unwrap_or(0),
            reserved_blocks: u64::try_from(self.reserved + self.spare).unwrap_or(0),
            free_inodes: u32::try_from(inodes).unwrap_or(0),
        }
    }

    /// Blocks freed by transactions not yet committed: after [`FsError::NoSpace`] a commit makes
    /// them available.
    ///
    /// [`FsError::NoSpace`]: crate::FsError::NoSpace
    #[must_use]
    pub fn pending_blocks(&self) -> u64 {
        u64::try_from(self.pending.load(Ordering::Relaxed)).unwrap_or(0)
    }

    /// Whether a commit makes blocks available, or inodes where there are none. (An operation that
    /// found no block has given its inode back, which is no reason for a commit.)
    pub(crate) fn has_pending(&self) -> bool {
        let freed = self.freed_inodes.lock().len() as i64;
        let all_freed = freed > 0 && self.free_inodes.load(Ordering::Relaxed) <= freed;
        self.pending_blocks() > 0 || all_freed
    }

    /// The state of a group; reads its block of descriptors on first use.
    fn group(&self, g: u32) -> FsResult<&Group> {
        let geo = &self.core.geo;
        let (chunk, at) = (g / geo.desc_per_block, g % geo.desc_per_block);
        let Some(cell) = self.chunks.get(chunk as usize) else {
            return Err(self.core.corrupt("group: number past the last", 0, 0));
        };
        let groups = match cell.get() {
            Some(groups) => groups,
            None => {
                let fresh = self.load_chunk(chunk)?;
                cell.get_or_init(|| fresh)
            }
        };
        groups
            .get(at as usize)
            .ok_or_else(|| self.core.corrupt("group: number past the last", 0, 0))
    }

    fn load_chunk(&self, chunk: u32) -> FsResult<Box<[Group]>> {
        let geo = &self.core.geo;
        let first = chunk * geo.desc_per_block;
        let last = (first + geo.desc_per_block).min(geo.group_count);
        let (block, _) = geo.group_desc_at(first);
        let buffer = self.core.bufs.read(block, no_check())?;
        let mut dirs = 0;
        let mut wrong = None;
        let groups = {
            let data = buffer.data();
            let groups = (first..last).map(|g| {
                let (_, offset) = geo.group_desc_at(g);
                let bytes = data
                    .get(offset..offset + usize::from(geo.desc_size))
                    .unwrap_or(&[]);
                let Some(desc) = Desc::decode(geo, bytes) else {
                    return Group::bad();
                };
                match desc.check(geo, g, bytes) {
                    Ok(()) => {
                        dirs += i64::from(desc.used_dirs);
                        Group::new(&desc)
                    }
                    Err(what) => {
                        log::error!("group {g}: {what}");
                        wrong = Some(what);
                        Group::bad()
                    }
                }
            });
            groups.collect()
        };
        if let Some(what) = wrong {
            // Goes on without these groups, unless errors= says otherwise.
            let _: crate::FsError = self.core.corrupt(what, block, 0);
        }
        self.dirs.fetch_add(dirs, Ordering::Relaxed);
        Ok(groups)
    }

    /// Reads a descriptor.
    fn desc(&self, g: u32) -> FsResult<Desc> {
        let geo = &self.core.geo;
        let (block, offset) = geo.group_desc_at(g);
        let buffer = self.core.bufs.read(block, no_check())?;
        let desc = {
            let data = buffer.data();
            let bytes = data.get(offset..offset + usize::from(geo.desc_size));
            bytes.and_then(|bytes| Desc::decode(geo, bytes))
        };
        desc.ok_or_else(|| self.core.corrupt("group descriptor: size", block, 0))
    }

    /// Changes a descriptor.
    fn change_desc(&self, h: &Handle, g: u32, change: impl FnOnce(&mut Desc)) -> FsResult {
        let geo = &self.core.geo;
        let (block, offset) = geo.group_desc_at(g);
        let buffer = self.core.bufs.read(block, no_check())?;
        let mut data = h.write_class(&buffer, Class::Bitmaps)?;
        let bytes = data.get_mut(offset..offset + usize::from(geo.desc_size));
        if let Some(bytes) = bytes
            && let Some(mut desc) = Desc::decode(geo, bytes)
        {
            change(&mut desc);
            desc.encode(geo, g, bytes);
        }
        Ok(())
    }

    /// Whether bitmaps may be uninitialized.
    fn uninit(&self, desc: &Desc, flag: GroupFlags) -> bool {
        self.core.geo.group_desc_csum() && desc.flags.contains(flag)
    }

    /// Groups of a flex group.
    fn flex_size(&self) -> u32 {
        1u32.checked_shl(self.core.geo.log_groups_per_flex.into())
            .unwrap_or(1 << 31)
            .min(self.core.geo.group_count.next_power_of_two())
    }
}

impl CommitHooks for Alloc {
    fn committed(&self, tid: u32, freed: &[FreedRange]) {
        for range in freed {
            // Before anybody can write there again.
            if self.core.opts.discard && !self.no_discard.load(Ordering::Relaxed) {
                self.discard_freed(range.start, range.len);
            }
            self.blocks_committed(range.start, range.len);
        }
        self.inodes_committed(tid);
    }
}
