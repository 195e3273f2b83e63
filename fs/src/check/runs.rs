//! Where the blocks of one file are, for the files that the check itself reads: the journal and
//! the orphan file. Nothing is claimed here, and the first fault ends it.

use zerocopy::FromBytes;

use super::Cx;
use super::superblock::words;
use crate::format::extent::{self, Bounds, Node};
use crate::format::inode::{InodeFlags, RawInode};

/// Blocks `lblk..lblk + len` of the file stand at `pblk`.
#[derive(Clone, Copy, Debug)]
pub(super) struct FileRun {
    pub(super) lblk: u64,
    pub(super) pblk: u64,
    pub(super) len: u64,
}

/// The runs of a file without a hole before block `count`.
pub(super) fn of_inode(cx: &Cx<'_>, bytes: &[u8], count: u64) -> Result<Vec<FileRun>, &'static str> {
    let Ok((raw, _)) = RawInode::read_from_prefix(bytes) else {
        return Err("no inode");
    };
    let mut runs = Vec::new();
    let flags = InodeFlags::from_bits_retain(raw.i_flags.get());
    let mut left = cx.geo.blocks_count;
    if flags.contains(InodeFlags::EXTENTS) {
        node(cx, &raw.i_block, None, &mut left, &mut runs)?;
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

fn node(
    cx: &Cx<'_>,
    bytes: &[u8],
    depth: Option<u16>,
    left: &mut u64,
    runs: &mut Vec<FileRun>,
) -> Result<(), &'static str> {
    let bounds = Bounds {
        first: cx.geo.first_data_block.into(),
        end: cx.geo.blocks_count,
    };
    extent::check(bytes, depth, bounds).map_err(|error| error.what())?;
    let height = extent::depth(bytes).map_err(|error| error.what())?;
    match extent::view(bytes, depth).map_err(|error| error.what())? {
        Node::Leaf(leaf) => {
            for it in leaf.iter() {
                push(
                    runs,
                    FileRun {
                        lblk: it.lblk.into(),
                        pblk: it.pblk,
                        len: it.len.into(),
                    },
                )?;
            }
        }
        Node::Index(index) => {
            let mut block = vec![0; cx.block_size()];
            for child in index.iter() {
                *left = left.checked_sub(1).ok_or("its map is too long")?;
                let res = cx.blocks.read(child.pblk, &mut block);
                res.map_err(|_error| "its map cannot be read")?;
                node(cx, &block, Some(height - 1), left, runs)?;
            }
        }
    }
    Ok(())
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
    let index = runs.partition_point(|run| run.lblk <= lblk).checked_sub(1)?;
    let run = runs.get(index)?;
    let skip = lblk - run.lblk;
    (skip < run.len).then(|| run.pblk + skip)
}
