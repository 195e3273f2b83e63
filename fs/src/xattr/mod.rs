//! Extended attributes: in the inode, and in one block that the kernel may share among inodes.
//!
//! Times and the write of the inode itself are the caller's: after a change the fields in `data`
//! are new (`ibody`, `file_acl`, `sectors`, with ACLs `mode`).

pub mod acl;
mod plan;

use std::sync::Arc;

use bufio::{BufError, Buffer, Invalid, Validator, no_check};

use crate::alloc::BlockUse;
use crate::core::Fs;
use crate::error::{FsError, FsResult};
use crate::format::csum::crc32c;
use crate::format::inode::InodeData;
use crate::format::xattr::{
    Area, CHECKSUM_AT, MAX_REFCOUNT, NameIndex, Value, XattrError, header, set_refcount,
};
use crate::inode::Inode;
use crate::journal::Handle;
use crate::xattr::acl::Which;
use crate::xattr::plan::{Areas, BlockPlan, Plan, PlanError};

/// What must be true of a name that is set.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum XattrMode {
    /// Nothing.
    Any,
    /// It is not there yet.
    Create,
    /// It is there.
    Replace,
}

const MAX_NAME_LEN: usize = 255;

/// Gives a value; the name is whole, such as `user.x`.
///
/// # Errors
/// [`FsError::NoData`], [`FsError::NotSupported`]; damage; I/O errors.
pub fn get(fs: &Fs, inode: &Inode, data: &InodeData, name: &[u8]) -> FsResult<Vec<u8>> {
    let (index, rest) = split_name(fs, name)?;
    match Which::from_index(index) {
        Some(which) => acl::get_value(fs, inode, data, which),
        None => get_stored(fs, inode, data, index, rest),
    }
}

/// Gives all names, each with a NUL after it; `trusted.` ones too, which are not for everybody.
///
/// # Errors
/// Damage; I/O errors.
pub fn list(fs: &Fs, inode: &Inode, data: &InodeData) -> FsResult<Vec<u8>> {
    let mut names = Vec::new();
    let mut add = |area: Area<'_>| {
        for item in area.items() {
            let visible = match item.index {
                NameIndex::USER => fs.opts.user_xattr,
                NameIndex::ACL_ACCESS | NameIndex::ACL_DEFAULT => fs.opts.acl,
                _ => true,
            };
            if let Some(prefix) = item.index.prefix().filter(|_| visible) {
                names.extend_from_slice(prefix.as_bytes());
                names.extend_from_slice(item.name);
                names.push(0);
            }
        }
    };
    if let Some(area) = ibody_area(fs, inode, data)? {
        add(area);
    }
    if let Some(buffer) = block(fs, inode, data)? {
        let bytes = buffer.data();
        add(Area::block(&bytes).map_err(|e| damaged(fs, inode, data, e))?);
    }
    Ok(names)
}

/// Sets a value, or removes it (`None`).
///
/// # Errors
/// [`FsError::Exists`] and [`FsError::NoData`] as `mode` says, [`FsError::NoSpace`],
/// [`FsError::Range`] for a long name, [`FsError::NotSupported`], for ACLs [`FsError::Invalid`];
/// damage; I/O errors.
pub fn set(
    fs: &Fs,
    handle: &Handle,
    inode: &Inode,
    data: &mut InodeData,
    name: &[u8],
    value: Option<&[u8]>,
    mode: XattrMode,
) -> FsResult {
    let (index, rest) = split_name(fs, name)?;
    match Which::from_index(index) {
        Some(which) => acl::set_value(fs, handle, inode, data, which, value),
        None => set_stored(fs, handle, inode, data, (index, rest), value, mode),
    }
}

/// Gives up the attribute block of an inode that is being deleted.
///
/// # Errors
/// Damage; I/O errors.
pub fn delete_all(fs: &Fs, handle: &Handle, inode: &Inode, data: &mut InodeData) -> FsResult {
    if let Some(buffer) = block(fs, inode, data)? {
        release(fs, handle, inode, data, buffer)?;
        data.file_acl = 0;
        data.sectors = data.sectors.saturating_sub(fs.geo.block_sectors());
    }
    Ok(())
}

/// Credits for setting a value, without the write of the inode: two blocks, each with bitmap and
/// group descriptor.
#[must_use]
pub fn credits() -> u32 {
    6
}

fn split_name<'a>(fs: &Fs, name: &'a [u8]) -> FsResult<(NameIndex, &'a [u8])> {
    let (index, rest) = NameIndex::split(name).ok_or(FsError::NotSupported)?;
    if index == NameIndex::USER && !fs.opts.user_xattr {
        return Err(FsError::NotSupported);
    }
    if rest.is_empty() && Which::from_index(index).is_none() {
        return Err(FsError::Invalid);
    }
    if rest.len() > MAX_NAME_LEN {
        return Err(FsError::Range);
    }
    Ok((index, rest))
}

/// Reads a value as it is stored.
fn get_stored(
    fs: &Fs,
    inode: &Inode,
    data: &InodeData,
    index: NameIndex,
    name: &[u8],
) -> FsResult<Vec<u8>> {
    let value = |value: Value<'_>| match value {
        Value::Here(bytes) => Ok(bytes.to_vec()),
        Value::Inode { .. } => {
            let what = "attribute: a value in an inode, without the feature ea_inode";
            Err(fs.corrupt(what, data.file_acl, inode.ino))
        }
    };
    if let Some(area) = ibody_area(fs, inode, data)? {
        if let Some(item) = area.find(index, name) {
            return value(item.value);
        }
    }
    if let Some(buffer) = block(fs, inode, data)? {
        let bytes = buffer.data();
        let area = Area::block(&bytes).map_err(|e| damaged(fs, inode, data, e))?;
        if let Some(item) = area.find(index, name) {
            return value(item.value);
        }
    }
    Err(FsError::NoData)
}

/// Stores or removes a value.
fn set_stored(
    fs: &Fs,
    handle: &Handle,
    inode: &Inode,
    data: &mut InodeData,
    name: (NameIndex, &[u8]),
    value: Option<&[u8]>,
    mode: XattrMode,
) -> FsResult {
    let old = block(fs, inode, data)?;
    let planned = {
        let bytes = old.as_ref().map(Buffer::data);
        let areas = Areas {
            ibody: usable_ibody(data),
            block: bytes.as_deref(),
            block_size: fs.geo.block_size as usize,
        };
        areas.set(name, value, mode)
    };
    let plan = planned.map_err(|error| match error {
        PlanError::Exists => FsError::Exists,
        PlanError::NoData => FsError::NoData,
        PlanError::NoSpace => FsError::NoSpace,
        PlanError::Ibody(e) => fs.corrupt(e.what(), 0, inode.ino),
        PlanError::Block(e) => damaged(fs, inode, data, e),
    })?;
    // The block first: it may fail for lack of space, the inode cannot.
    let Plan { ibody, block } = plan;
    match block {
        BlockPlan::Keep => {}
        BlockPlan::Drop => {
            if let Some(old) = old {
                release(fs, handle, inode, data, old)?;
                data.file_acl = 0;
                data.sectors = data.sectors.saturating_sub(fs.geo.block_sectors());
            }
        }
        BlockPlan::Replace(image) => replace_block(fs, handle, inode, data, old, &image)?,
    }
    if let Some(ibody) = ibody {
        data.ibody.copy_from_slice(&ibody);
    }
    Ok(())
}

/// Gives an inode an attribute block with this content: its own one if nobody else uses it.
fn replace_block(
    fs: &Fs,
    handle: &Handle,
    inode: &Inode,
    data: &mut InodeData,
    old: Option<Buffer>,
    image: &[u8],
) -> FsResult {
    if let Some(old) = &old {
        if refcount(fs, inode, data, old)? == 1 {
            handle.write(old)?.copy_from_slice(image);
            return Ok(());
        }
    }
    let goal = fs.alloc.goal_for(inode.ino, data, 0);
    let pblk = fs.alloc.alloc_meta(handle, goal)?;
    let buffer = handle.create(pblk, &validator(fs))?;
    handle.write(&buffer)?.copy_from_slice(image);
    match old {
        Some(old) => release(fs, handle, inode, data, old)?,
        None => data.sectors += fs.geo.block_sectors(),
    }
    data.file_acl = pblk;
    Ok(())
}

/// Lets go of an attribute block: one user less, or freed.
fn release(fs: &Fs, handle: &Handle, inode: &Inode, data: &InodeData, buffer: Buffer) -> FsResult {
    let refcount = refcount(fs, inode, data, &buffer)?;
    if refcount > 1 {
        set_refcount(&mut handle.write(&buffer)?, refcount - 1);
        return Ok(());
    }
    let pblk = buffer.block();
    drop(buffer);
    fs.alloc.free(handle, pblk, 1, BlockUse::Metadata)
}

fn refcount(fs: &Fs, inode: &Inode, data: &InodeData, buffer: &Buffer) -> FsResult<u32> {
    let refcount = header(&buffer.data()).map(|header| header.h_refcount.get());
    match refcount {
        Ok(refcount) if (1..=MAX_REFCOUNT).contains(&refcount) => Ok(refcount),
        Ok(refcount) => Err(damaged(fs, inode, data, XattrError::Refcount { refcount })),
        Err(e) => Err(damaged(fs, inode, data, e)),
    }
}

fn damaged(fs: &Fs, inode: &Inode, data: &InodeData, error: XattrError) -> FsError {
    log::error!("inode {}: {error}", inode.ino);
    fs.corrupt(error.what(), data.file_acl, inode.ino)
}

/// The inode's bytes for attributes. An inode without extra fields has none: old kernels left
/// such inodes with anything there.
fn usable_ibody(data: &InodeData) -> &[u8] {
    if data.extra_isize == 0 {
        &[]
    } else {
        &data.ibody
    }
}

fn ibody_area<'a>(fs: &Fs, inode: &Inode, data: &'a InodeData) -> FsResult<Option<Area<'a>>> {
    Area::ibody(usable_ibody(data)).map_err(|e| {
        log::error!("inode {}: {e}", inode.ino);
        fs.corrupt(e.what(), 0, inode.ino)
    })
}

/// Reads the attribute block, if there is one.
fn block(fs: &Fs, inode: &Inode, data: &InodeData) -> FsResult<Option<Buffer>> {
    let pblk = data.file_acl;
    if pblk == 0 {
        return Ok(None);
    }
    if !fs.geo.blocks_in_fs(pblk, 1) {
        return Err(fs.corrupt("inode: i_file_acl", pblk, inode.ino));
    }
    match fs.bufs.read(pblk, &validator(fs)) {
        Ok(buffer) => Ok(Some(buffer)),
        Err(BufError::Invalid { block, what }) => Err(fs.corrupt(what, block, inode.ino)),
        Err(error) => Err(error.into()),
    }
}

/// Checks and sets the checksum of an attribute block.
struct BlockValidator {
    seed: u32,
}

impl BlockValidator {
    fn checksum(&self, block: u64, data: &[u8]) -> [u8; 4] {
        let crc = crc32c(self.seed, &block.to_le_bytes());
        let crc = crc32c(crc32c(crc, &data[..CHECKSUM_AT]), &[0; 4]);
        crc32c(crc, &data[CHECKSUM_AT + 4..]).to_le_bytes()
    }
}

impl Validator for BlockValidator {
    fn check(&self, block: u64, data: &[u8]) -> Result<(), Invalid> {
        if data[CHECKSUM_AT..CHECKSUM_AT + 4] == self.checksum(block, data) {
            Ok(())
        } else {
            Err(Invalid {
                what: "attribute block: checksum",
            })
        }
    }

    fn prepare(&self, block: u64, data: &mut [u8]) {
        let csum = self.checksum(block, data);
        data[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&csum);
    }
}

fn validator(fs: &Fs) -> Arc<dyn Validator> {
    if fs.geo.metadata_csum() {
        Arc::new(BlockValidator {
            seed: fs.geo.csum_seed,
        })
    } else {
        no_check().clone()
    }
}
