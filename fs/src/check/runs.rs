//! Where the blocks of one file are, for the files that the check itself reads: the journal and
//! the orphan file. Nothing is claimed here, and the first fault ends it.

use zerocopy::FromBytes;

use super::Cx;
use super::superblock::words;
use crate::format::csum::crc32c;
use crate::format::extent::{self, Bounds, Node};
use crate::format::inode::{InodeFlags, RawInode, inode_csum_seed};

/// Blocks `lblk..lblk + len` of the file stand at `pblk`.
#[derive(Clone, Copy, Debug)]
pub(super) struct FileRun {
    pub(super) lblk: u64,
    pub(super) pblk: u64,
    pub(super) len: u64,
}

/// The runs of a file without a hole before block `count`.
pub(super) fn of_inode(
    cx: &Cx<'_>,
    ino: u32,
    bytes: &[u8],
    count: u64,
) -> Result<Vec<FileRun>, &'static str> {
    let Ok((raw, _)) = RawInode::read_from_prefix(bytes) else {
        return Err("no inode");
    };
    let mut runs = Vec::new();
    let flags = InodeFlags::from_bits_retain(raw.i_flags.get());
    if flags.contains(InodeFlags::EXTENTS) {
        let mut tree = Tree {
            cx,
            seed: inode_csum_seed(cx.geo.csum_seed, ino, raw.i_generation.get()),
            left: cx.geo.blocks_count,
        };
        tree.node(&raw.i_block, None, &mut runs)?;
    } else {
        for (index, pblk) in words(&raw.i_block).enumerate() {
            let depth = (index as u32).saturating_sub(11);
            let lblk = runs_end(&runs);
            if lblk < count {
                pointers(cx, pblk.into(), depth, (lblk, count), &mut runs)?;
            }
        }
    }
    if runs_end(&runs) < count {
        return Err("its map ends early");
    }
    Ok(runs)
}

/// Where the runs stop to follow each other.
fn runs_end(runs: &[FileRun]) -> u64 {
    runs.last().map_or(0, |run| run.lblk + run.len)
}

fn push(runs: &mut Vec<FileRun>, new: FileRun) -> Result<(), &'static str> {
    if new.lblk != runs_end(runs) {
        return Err("a hole in its map");
    }
    match runs.last_mut() {
        Some(run) if run.pblk + run.len == new.pblk => run.len += new.len,
        _ => runs.push(new),
    }
    Ok(())
}

struct Tree<'a> {
    cx: &'a Cx<'a>,
    /// Seed of the checksums of its nodes.
    seed: u32,
    /// Nodes that it may still have.
    left: u64,
}

impl Tree<'_> {
    fn node(
        &mut self,
        bytes: &[u8],
        depth: Option<u16>,
        runs: &mut Vec<FileRun>,
    ) -> Result<(), &'static str> {
        let bounds = Bounds {
            first: self.cx.geo.first_data_block.into(),
            end: self.cx.geo.blocks_count,
        };
        extent::check(bytes, depth, bounds).map_err(|error| error.what())?;
        let height = extent::depth(bytes).map_err(|error| error.what())?;
        match extent::view(bytes, depth).map_err(|error| error.what())? {
            Node::Leaf(leaf) => {
                for it in leaf.iter() {
                    let (lblk, pblk, len) = (it.lblk.into(), it.pblk, it.len.into());
                    push(runs, FileRun { lblk, pblk, len })?;
                }
            }
            Node::Index(index) => {
                let mut block = vec![0; self.cx.block_size()];
                for child in index.iter() {
                    self.left = self.left.checked_sub(1).ok_or("its map is too long")?;
                    let res = self.cx.blocks.read(child.pblk, &mut block);
                    res.map_err(|_error| "its map cannot be read")?;
                    self.check_sum(&block)?;
                    self.node(&block, Some(height - 1), runs)?;
                }
            }
        }
        Ok(())
    }

    fn check_sum(&self, block: &[u8]) -> Result<(), &'static str> {
        let at = extent::tail_offset(block).ok_or("a node of its map is damaged")?;
        let want = crc32c(self.seed, &block[..at]).to_le_bytes();
        if self.cx.geo.metadata_csum() && block[at..at + 4] != want {
            return Err("et_checksum of its map is wrong");
        }
        Ok(())
    }
}

fn pointers(
    cx: &Cx<'_>,
    pblk: u64,
    depth: u32,
    (lblk, count): (u64, u64),
    runs: &mut Vec<FileRun>,
) -> Result<(), &'static str> {
    if pblk == 0 {
        return Err("a hole in its map");
    }
    if !cx.holds(pblk, 1) {
        return Err("a block outside the file system");
    }
    if depth == 0 {
        return push(runs, FileRun { lblk, pblk, len: 1 });
    }
    let mut block = vec![0; cx.block_size()];
    let res = cx.blocks.read(pblk, &mut block);
    res.map_err(|_error| "its map cannot be read")?;
    for pblk in words(&block) {
        let lblk = runs_end(runs);
        if lblk >= count {
            break;
        }
        pointers(cx, pblk.into(), depth - 1, (lblk, count), runs)?;
    }
    Ok(())
}

/// Finds a block of the file.
pub(super) fn locate(runs: &[FileRun], lblk: u64) -> Option<u64> {
    let index = runs
        .partition_point(|run| run.lblk <= lblk)
        .checked_sub(1)?;
    let run = runs.get(index)?;
    let skip = lblk - run.lblk;
    (skip < run.len).then(|| run.pblk + skip)
}
