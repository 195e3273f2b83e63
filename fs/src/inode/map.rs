//! Where a file's blocks are: extents or the classic block map, behind the same functions.
//!
//! The caller holds the inode's lock, for reading or writing as the function takes its data, and
//! writes the inode after a change. A lookup in a tree that lies in the inode takes no further
//! lock and allocates nothing.

use std::sync::Arc;

use bufio::{BufError, Invalid, Validator, no_check};

use crate::alloc::{BlockUse, Run};
use crate::core::{Core, Fs};
use crate::error::{FsError, FsResult};
use crate::format::csum::crc32c;
use crate::format::extent::{self, Bounds, Extent, ExtentState};
use crate::format::features::RoCompat;
use crate::format::inode::{InodeData, InodeFlags};
use crate::geometry::Geometry;
use crate::inode::extent_tree::{self, Found, Nodes, NodesMut, Removed};
use crate::inode::{Inode, block_map};
use crate::journal::Handle;

pub use super::range::{collapse, insert_range};

/// What a run of a file's blocks is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum MapKind {
    /// Nothing: reads as zeros.
    Hole,
    /// Blocks with data.
    Mapped,
    /// Blocks that read as zeros until written.
    Unwritten,
}

/// A run of a file's blocks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Mapping {
    /// First block of the file.
    pub lblk: u32,
    /// Blocks, at least 1.
    pub len: u32,
    /// First block of the file system; 0 for a hole.
    pub pblk: u64,
    /// What it is.
    pub kind: MapKind,
}

/// How new blocks begin.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Written {
    /// With data.
    Yes,
    /// As zeros.
    No,
}

/// What to look for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Seek {
    /// The next block with data.
    Data,
    /// The next hole.
    Hole,
}

/// Extents (or runs of pointers) that one step of a removal takes out at most: what a handle of
/// moderate size can account for.
const RUNS_PER_STEP: usize = 4;

/// Makes the root of an empty map, by extents where the file system has them.
pub fn init(geo: &Geometry, data: &mut InodeData) {
    if geo.has_extents() {
        data.flags.insert(InodeFlags::EXTENTS);
        extent::init(&mut data.block, 0);
    } else {
        data.flags.remove(InodeFlags::EXTENTS);
        data.block = [0; 60];
    }
}

/// Returns the largest size in bytes that a file mapped by extents, or by a block map, can have.
#[must_use]
pub fn max_file_size(geo: &Geometry, by_extents: bool) -> u64 {
    let bits = geo.block_bits;
    let huge = geo.ro_compat.contains(RoCompat::HUGE_FILE);
    // `i_blocks` counts the file's blocks in sectors: 32 bits of them, or 48.
    if by_extents {
        let most = if huge {
            i64::MAX as u64
        } else {
            u64::from(u32::MAX) >> (bits - 9) << bits
        };
        return (u64::from(u32::MAX) << bits).min(most);
    }
    let per = u64::from(geo.block_size / 4);
    let pointers = 1 + (1 + per) + (1 + per + per * per);
    let sectors = if huge {
        (1 << 48) - 1
    } else {
        u64::from(u32::MAX)
    };
    let counted = (sectors >> (bits - 9)).saturating_sub(pointers);
    block_map::max_blocks(geo.block_size / 4)
        .min(u64::from(u32::MAX))
        .min(counted)
        << bits
}

/// Gives a run from `lblk` on, at most `max` blocks: as long as one node of the map shows it.
///
/// A hole may go on behind the length given.
///
/// # Errors
/// [`FsError::Corrupt`] and what reading the map's blocks gives.
pub fn lookup(fs: &Fs, inode: &Inode, data: &InodeData, lblk: u32, max: u32) -> FsResult<Mapping> {
    let view = View {
        core: &fs.core,
        inode,
        by_extents: data.has_extents(),
    };
    let found = if data.has_extents() {
        extent_tree::lookup(&view, &data.block, lblk, max.max(1))?
    } else {
        block_map::lookup(&view, &data.block, lblk, max.max(1), per(fs))?
    };
    Ok(match found {
        Found::Hole { len } => Mapping {
            lblk,
            len,
            pblk: 0,
            kind: MapKind::Hole,
        },
        Found::Mapped {
            pblk,
            len,
            state: ExtentState::Written,
        } => Mapping {
            lblk,
            len,
            pblk,
            kind: MapKind::Mapped,
        },
        Found::Mapped {
            pblk,
            len,
            state: ExtentState::Unwritten,
        } => Mapping {
            lblk,
            len,
            pblk,
            kind: MapKind::Unwritten,
        },
    })
}

/// Names blocks for a hole; they were taken by `reserve` and `commit_run` in the same handle.
///
/// Without space for the map's own blocks nothing is changed.
///
/// # Errors
/// [`FsError::FileTooBig`] past the last block a map can name, [`FsError::NotSupported`] for
/// unwritten blocks in a block map, [`FsError::NoSpace`]; those of [`lookup`].
pub fn insert(
    fs: &Fs,
    h: &Handle,
    inode: &Inode,
    data: &mut InodeData,
    lblk: u32,
    run: Run,
    written: Written,
) -> FsResult {
    let end = u64::from(lblk) + u64::from(run.len);
    let limit = if data.has_extents() {
        u64::from(u32::MAX)
    } else {
        block_map::max_blocks(per(fs)).min(u64::from(u32::MAX))
    };
    if end > limit {
        return Err(FsError::FileTooBig);
    }
    let by_extents = data.has_extents();
    let mut tree = Tree::new(fs, h, inode, by_extents);
    let done = if by_extents {
        insert_extents(&mut tree, &mut data.block, lblk, run, written)
    } else if written == Written::No {
        Err(FsError::NotSupported)
    } else {
        match u32::try_from(run.start + u64::from(run.len) - 1).map(|_| run.start as u32) {
            Ok(start) => {
                block_map::insert(&mut tree, &mut data.block, lblk, start, run.len, per(fs))
            }
            Err(_past_32_bits) => Err(FsError::NoSpace),
        }
    };
    let added = tree.blocks + if done.is_ok() { i64::from(run.len) } else { 0 };
    account(fs, data, added);
    done
}

fn insert_extents(
    tree: &mut Tree<'_>,
    root: &mut [u8],
    lblk: u32,
    run: Run,
    written: Written,
) -> FsResult {
    let state = match written {
        Written::Yes => ExtentState::Written,
        Written::No => ExtentState::Unwritten,
    };
    let mut done = 0;
    while done < run.len {
        let e = Extent {
            lblk: lblk + done,
            len: (run.len - done).min(state.max_len()),
            pblk: run.start + u64::from(done),
            state,
        };
        if let Err(error) = extent_tree::insert(tree, root, e) {
            let mut rest = Some(lblk + done);
            while let Some(to) = rest.filter(|to| *to > lblk) {
                rest = extent_tree::remove_step(tree, root, lblk, to, RUNS_PER_STEP)?.rest;
            }
            return Err(error);
        }
        done += e.len;
    }
    Ok(())
}

/// Turns unwritten blocks into written ones; others of the range stay as they are.
///
/// # Errors
/// [`FsError::NoSpace`] where an extent must be split and there is no space for a block of the
/// tree; those of [`lookup`].
pub fn convert(
    fs: &Fs,
    h: &Handle,
    inode: &Inode,
    data: &mut InodeData,
    lblk: u32,
    len: u32,
) -> FsResult {
    if !data.has_extents() {
        return Ok(());
    }
    let mut tree = Tree::new(fs, h, inode, true);
    let done = extent_tree::convert(&mut tree, &mut data.block, lblk, lblk.saturating_add(len));
    let added = tree.blocks;
    account(fs, data, added);
    done
}

/// Frees blocks `from..to`; `u32::MAX` is the end.
///
/// Works from the end in steps that each leave a sound map. Where the handle has no credits left
/// it writes the inode and restarts the handle, so the caller has set size and orphan list before;
/// the inode's last change is the caller's to write.
///
/// # Errors
/// Those of [`lookup`]; [`FsError::NoSpace`] where a hole is punched into an extent and the tree
/// has to grow.
pub fn remove(
    fs: &Fs,
    h: &mut Handle,
    inode: &Inode,
    data: &mut InodeData,
    from: u32,
    to: u32,
) -> FsResult {
    let kind = data.file_type();
    // What went through the journal must be revoked when it is freed.
    let logged = kind == libc::S_IFDIR
        || kind == libc::S_IFLNK
        || data.flags.contains(InodeFlags::EA_INODE)
        || fs.journals_data(data);
    let what = if logged {
        BlockUse::Metadata
    } else {
        BlockUse::Data
    };
    let runs = runs_per_step(fs);
    let mut rest = Some(to);
    while let Some(to) = rest {
        ensure(fs, h, inode, data, step_credits(fs))?;
        let by_extents = data.has_extents();
        let mut tree = Tree::new(fs, h, inode, by_extents);
        let root = &mut data.block;
        let step = if by_extents {
            extent_tree::remove_step(&mut tree, root, from, to, runs)
        } else {
            block_map::remove_step(&mut tree, root, from, to, runs, per(fs))
        };
        let added = tree.blocks;
        account(fs, data, added);
        let Removed { freed, rest: left } = step?;
        for (pblk, len) in freed {
            account(fs, data, -i64::from(len));
            fs.alloc.free(h, pblk, len, what)?;
        }
        rest = left;
    }
    Ok(())
}

/// Unmaps blocks `from..to` and gives them to `gone` instead of freeing them; all in one handle.
///
/// # Errors
/// As [`remove`].
pub(crate) fn unmap(
    fs: &Fs,
    h: &Handle,
    inode: &Inode,
    data: &mut InodeData,
    (from, to): (u32, u32),
    gone: &mut dyn FnMut(u64, u32),
) -> FsResult {
    let mut rest = Some(to);
    while let Some(to) = rest {
        let by_extents = data.has_extents();
        let mut tree = Tree::new(fs, h, inode, by_extents);
        let root = &mut data.block;
        let step = if by_extents {
            extent_tree::remove_step(&mut tree, root, from, to, RUNS_PER_STEP)
        } else {
            block_map::remove_step(&mut tree, root, from, to, RUNS_PER_STEP, per(fs))
        };
        let added = tree.blocks;
        account(fs, data, added);
        let Removed { freed, rest: left } = step?;
        for (pblk, len) in freed {
            account(fs, data, -i64::from(len));
            gone(pblk, len);
        }
        rest = left;
    }
    Ok(())
}

/// The next data or hole at or after `lblk`; `None` where there is none. Unwritten blocks count as
/// a hole.
///
/// # Errors
/// Those of [`lookup`].
pub fn next(
    fs: &Fs,
    inode: &Inode,
    data: &InodeData,
    lblk: u32,
    what: Seek,
) -> FsResult<Option<u32>> {
    let mut pos = lblk;
    while pos < u32::MAX {
        let m = lookup(fs, inode, data, pos, u32::MAX - pos)?;
        if (m.kind == MapKind::Mapped) == (what == Seek::Data) {
            return Ok(Some(pos));
        }
        pos = pos.saturating_add(m.len);
    }
    Ok(None)
}

/// Credits for the mapping's own blocks when `runs` runs are inserted, or converted.
#[must_use]
pub fn meta_credits(data: &InodeData, runs: u32) -> u32 {
    // A new node costs itself, a bitmap and a group descriptor.
    let each = if data.has_extents() {
        let depth = u32::from(extent::depth(&data.block).unwrap_or(0));
        3 * (depth + 2) + depth + 1
    } else {
        3 * 3 + 4
    };
    each.saturating_mul(runs)
}

/// Credits of one step of a removal or shift, the inode's block among them.
pub(super) fn step_credits(fs: &Fs) -> u32 {
    credits_for(fs, runs_per_step(fs))
}

/// Runs freed at once: fewer where groups are small and the log is short, as a run of many groups
/// changes the bitmap of each.
fn runs_per_step(fs: &Fs) -> usize {
    let most = fs.journal.max_credits() / 2;
    let fits = |&runs: &usize| credits_for(fs, runs) <= most;
    (1..=RUNS_PER_STEP).rev().find(fits).unwrap_or(1)
}

fn credits_for(fs: &Fs, runs: usize) -> u32 {
    let each = extent::WRITTEN_MAX_LEN / fs.geo.blocks_per_group + 2;
    let bitmaps = (runs as u32 * each).min(fs.geo.group_count);
    let descriptors = bitmaps.min(fs.geo.gdt_blocks());
    bitmaps + descriptors + 4 * u32::from(extent::MAX_DEPTH) + 8
}

/// Makes sure that the handle has credits, by a restart if need be.
pub(super) fn ensure(
    fs: &Fs,
    h: &mut Handle,
    inode: &Inode,
    data: &InodeData,
    credits: u32,
) -> FsResult {
    if h.has_credits(credits) || h.extend(credits)? {
        return Ok(());
    }
    fs.write_inode(h, inode, data)?;
    h.restart(credits)
}

/// Adds blocks to what the file uses.
pub(super) fn account(fs: &Fs, data: &mut InodeData, blocks: i64) {
    let sectors = blocks.unsigned_abs() * fs.geo.block_sectors();
    data.sectors = if blocks < 0 {
        data.sectors.saturating_sub(sectors)
    } else {
        data.sectors.saturating_add(sectors)
    };
}

fn per(core: &Core) -> u32 {
    core.geo.block_size / 4
}

/// The blocks of one file's map, for reading.
pub(super) struct View<'a> {
    pub(super) core: &'a Core,
    pub(super) inode: &'a Inode,
    pub(super) by_extents: bool,
}

impl View<'_> {
    fn validator(&self) -> &Arc<dyn Validator> {
        if self.by_extents {
            self.inode.extent_validator.get_or_init(|| {
                let geo = &self.core.geo;
                let seed = geo.metadata_csum().then_some(self.inode.csum_seed);
                Arc::new(ExtentBlock {
                    seed,
                    bounds: bounds(geo),
                })
            })
        } else {
            no_check()
        }
    }

    fn buffer(&self, block: u64) -> FsResult<bufio::Buffer> {
        match self.core.bufs.read(block, self.validator()) {
            Ok(buffer) => Ok(buffer),
            Err(BufError::Invalid { what, .. }) => Err(self.corrupt(what, block)),
            Err(error) => Err(error.into()),
        }
    }
}

impl Nodes for View<'_> {
    type Error = FsError;
    fn bounds(&self) -> Bounds {
        bounds(&self.core.geo)
    }
    fn corrupt(&self, what: &'static str, block: u64) -> FsError {
        self.core.corrupt(what, block, self.inode.ino)
    }
    fn read<R>(&self, block: u64, look: impl FnOnce(&[u8]) -> R) -> FsResult<R> {
        let buffer = self.buffer(block)?;
        let data = buffer.data();
        Ok(look(&data))
    }
}

/// The blocks of one file's map, for changing.
pub(super) struct Tree<'a> {
    view: View<'a>,
    fs: &'a Fs,
    h: &'a Handle,
    /// Blocks the map has taken, less those it gave back.
    pub(super) blocks: i64,
}

impl<'a> Tree<'a> {
    pub(super) fn new(fs: &'a Fs, h: &'a Handle, inode: &'a Inode, by_extents: bool) -> Self {
        Self {
            view: View {
                core: &fs.core,
                inode,
                by_extents,
            },
            fs,
            h,
            blocks: 0,
        }
    }
}

impl Nodes for Tree<'_> {
    type Error = FsError;
    fn bounds(&self) -> Bounds {
        self.view.bounds()
    }
    fn corrupt(&self, what: &'static str, block: u64) -> FsError {
        self.view.corrupt(what, block)
    }
    fn read<R>(&self, block: u64, look: impl FnOnce(&[u8]) -> R) -> FsResult<R> {
        self.view.read(block, look)
    }
}

impl NodesMut for Tree<'_> {
    fn write<R>(&mut self, block: u64, change: impl FnOnce(&mut [u8]) -> R) -> FsResult<R> {
        let buffer = self.view.buffer(block)?;
        let mut data = self.h.write(&buffer)?;
        Ok(change(&mut data))
    }
    fn create(&mut self, near: u64) -> FsResult<u64> {
        let block = self.fs.alloc.alloc_meta(self.h, near)?;
        let made = self.h.create(block, self.view.validator());
        if let Err(error) = made {
            self.fs.alloc.free(self.h, block, 1, BlockUse::Metadata)?;
            return Err(error);
        }
        self.blocks += 1;
        Ok(block)
    }
    fn free(&mut self, block: u64) -> FsResult {
        self.blocks -= 1;
        self.fs.alloc.free(self.h, block, 1, BlockUse::Metadata)
    }
}

/// Where data and map blocks may lie: anywhere behind the superblock.
pub(crate) fn bounds(geo: &Geometry) -> Bounds {
    Bounds {
        first: u64::from(geo.first_data_block) + 1,
        end: geo.blocks_count,
    }
}

/// Checks and seals the extent blocks of one inode.
struct ExtentBlock {
    /// The inode's checksum seed, where there are checksums.
    seed: Option<u32>,
    bounds: Bounds,
}

impl Validator for ExtentBlock {
    fn check(&self, block: u64, data: &[u8]) -> Result<(), Invalid> {
        if let Some(seed) = self.seed {
            let Some(at) = extent::tail_offset(data) else {
                return Err(Invalid {
                    what: "extent block: header",
                });
            };
            if data.get(at..at + 4) != Some(&crc32c(seed, &data[..at]).to_le_bytes()[..]) {
                return Err(Invalid {
                    what: "extent block: checksum",
                });
            }
        }
        extent::check(data, None, self.bounds).map_err(|error| {
            log::error!("block {block}: {error}");
            Invalid { what: error.what() }
        })
    }

    fn prepare(&self, _: u64, data: &mut [u8]) {
        if let Some(seed) = self.seed
            && let Some(at) = extent::tail_offset(data)
        {
            let csum = crc32c(seed, &data[..at]).to_le_bytes();
            if let Some(tail) = data.get_mut(at..at + 4) {
                tail.copy_from_slice(&csum);
            }
        }
    }
}
