//! Cutting a range out of a file, and opening one: everything behind it moves.
//!
//! Each step moves the extents of one leaf and leaves a sound tree. Where the journal cannot take
//! all steps in one transaction, a crash between two finds the file with part of it moved, as with
//! the kernel's ext4; the tree itself is whole at each commit.

use crate::core::Fs;
use crate::error::{FsError, FsResult};
use crate::format::inode::InodeData;
use crate::inode::Inode;
use crate::inode::extent_tree;
use crate::inode::map::{self, Tree, View, account, ensure, step_credits};
use crate::journal::Handle;

/// Cuts blocks out and moves what follows down.
///
/// # Errors
/// [`FsError::NotSupported`] for a file with a block map; those of [`map::remove`].
pub fn collapse(
    fs: &Fs,
    h: &mut Handle,
    inode: &Inode,
    data: &mut InodeData,
    at: u32,
    len: u32,
) -> FsResult {
    if !data.has_extents() {
        return Err(FsError::NotSupported);
    }
    let Some(behind) = at.checked_add(len).filter(|_| len > 0) else {
        return Err(FsError::Invalid);
    };
    map::remove(fs, h, inode, data, at, behind)?;
    let mut pos = Some(behind);
    while let Some(from) = pos {
        ensure(fs, h, inode, data, step_credits(fs))?;
        let mut tree = Tree::new(fs, h, inode, true);
        let step = extent_tree::shift_down_step(&mut tree, &mut data.block, from, len);
        let added = tree.blocks;
        account(fs, data, added);
        pos = step?;
    }
    Ok(())
}

/// Moves what follows up, leaving a hole.
///
/// # Errors
/// [`FsError::NotSupported`] for a file with a block map, [`FsError::FileTooBig`] where the last
/// block would pass the last one there can be; [`FsError::NoSpace`]; those of [`map::lookup`].
pub fn insert_range(
    fs: &Fs,
    h: &mut Handle,
    inode: &Inode,
    data: &mut InodeData,
    at: u32,
    len: u32,
) -> FsResult {
    if !data.has_extents() {
        return Err(FsError::NotSupported);
    }
    let view = View {
        core: &fs.core,
        inode,
        by_extents: true,
    };
    let end = extent_tree::end(&view, &data.block)?;
    if end > u64::from(at) && end + u64::from(len) > u64::from(u32::MAX) {
        return Err(FsError::FileTooBig);
    }
    ensure(fs, h, inode, data, step_credits(fs))?;
    let mut tree = Tree::new(fs, h, inode, true);
    let split = extent_tree::split_before(&mut tree, &mut data.block, at);
    let added = tree.blocks;
    account(fs, data, added);
    split?;
    let mut pos = Some(u32::MAX);
    while let Some(to) = pos {
        ensure(fs, h, inode, data, step_credits(fs))?;
        let mut tree = Tree::new(fs, h, inode, true);
        let step = extent_tree::shift_up_step(&mut tree, &mut data.block, at, to, len);
        let added = tree.blocks;
        account(fs, data, added);
        pos = step?;
    }
    Ok(())
}
