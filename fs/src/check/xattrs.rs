//! Attributes: bounds, hashes, order, checksums, and how many inodes share a block.

use super::finding::XattrFault;
use super::inodes::Inode;
use super::{Cx, Finding, State};
use crate::format::csum::crc32c;
use crate::format::features::Compat;
use crate::format::inode::GOOD_OLD_SIZE;
use crate::format::xattr::{
    BLOCK_HEADER_LEN, CHECKSUM_AT, IBODY_HEADER_LEN, MAGIC, RawXattrEntry, entry_hash, header,
};
use zerocopy::FromBytes;

const ENTRY_LEN: usize = 16;
/// The longest value beside its entry.
const MAX_VALUE: u32 = 1 << 16;

const fn padded(len: usize) -> usize {
    (len + 3) & !3
}

/// Parts of some bytes, none of which overlaps another.
#[derive(Default)]
struct Taken(Vec<(usize, usize)>);

impl Taken {
    /// Takes `len` bytes of `end`; `false` where they are taken or not there.
    fn take(&mut self, at: usize, len: usize, end: usize) -> bool {
        let upto = at.saturating_add(len);
        let index = self.0.partition_point(|&(start, _)| start < at);
        let is_before = index == 0 || self.0[index - 1].1 <= at;
        let is_behind = self.0.get(index).is_none_or(|&(start, _)| upto <= start);
        if upto > end || len == 0 || !is_before || !is_behind {
            return false;
        }
        self.0.insert(index, (at, upto));
        true
    }
}

/// The hash over name and value, with the name's characters taken as signed.
fn signed_hash(name: &[u8], value: &[u8]) -> u32 {
    // The value is hashed on top of the name: rotating is all the value does to it.
    let plain = name
        .iter()
        .fold(0_u32, |hash, &b| hash.rotate_left(5) ^ u32::from(b));
    let signed = name.iter().fold(0_u32, |hash, &b| {
        let wide = i32::from(i8::from_le_bytes([b]));
        hash.rotate_left(5) ^ u32::from_le_bytes(wide.to_le_bytes())
    });
    let turns = (value.len().div_ceil(4) as u32 * 16) % 32;
    entry_hash(name, value) ^ (plain ^ signed).rotate_left(turns)
}

fn entry_at(bytes: &[u8], at: usize) -> Option<RawXattrEntry> {
    let (entry, _) = RawXattrEntry::read_from_prefix(bytes.get(at..)?).ok()?;
    Some(entry)
}

fn is_last(bytes: &[u8], at: usize) -> bool {
    bytes.get(at..at + 4).is_none_or(|word| word == [0; 4])
}

/// Checks how many bytes the fields of an inode have behind the first 128; where they can be so
/// many, gives what stands behind 128 bytes, and their number.
pub(super) fn check_extra<'a>(
    state: &mut State,
    inode: &Inode<'a>,
    is_hidden: bool,
) -> Option<(&'a [u8], usize)> {
    let rest = inode.bytes.get(GOOD_OLD_SIZE..)?;
    let value = u16::from_le_bytes([*rest.first()?, *rest.get(1)?]);
    let extra = usize::from(value);
    if extra != 0 && (extra < 4 || extra > rest.len() || extra % 4 != 0) {
        let ino = inode.ino;
        state.tell(Finding::ExtraSize {
            ino,
            value,
            is_hidden,
        });
        return None;
    }
    Some((rest, extra))
}

/// Checks the attributes behind the fields of an inode, and the length of these.
pub(super) fn check_inode(state: &mut State, inode: &Inode<'_>) {
    let ino = inode.ino;
    let Some((rest, extra)) = check_extra(state, inode, false) else {
        return;
    };
    if extra + IBODY_HEADER_LEN >= rest.len() {
        return;
    }
    let body = &rest[extra..];
    if body[..4] != MAGIC.to_le_bytes() {
        return;
    }
    if let Err((offset, fault)) = check_ibody(body) {
        let offset = offset as u32;
        state.tell(Finding::InodeXattr { ino, offset, fault });
    }
}

/// As e2fsck counts: what is left shrinks with each name and value.
fn check_ibody(body: &[u8]) -> Result<(), (usize, XattrFault)> {
    let end = body.len();
    let mut taken = Taken::default();
    let mut left = end - IBODY_HEADER_LEN;
    let mut at = IBODY_HEADER_LEN;
    let mut oddity = Ok(());
    taken.take(0, IBODY_HEADER_LEN, end);
    while left >= ENTRY_LEN && !is_last(body, at) {
        let Some(entry) = entry_at(body, at) else {
            return Err((at, XattrFault::Entry));
        };
        let name_len = usize::from(entry.e_name_len);
        let len = padded(ENTRY_LEN + name_len);
        if !taken.take(at, len, end) {
            return Err((at, XattrFault::Entry));
        }
        left -= ENTRY_LEN;
        left = left
            .checked_sub(padded(name_len))
            .ok_or((at, XattrFault::NameLen))?;
        let name = &body[at + ENTRY_LEN..][..name_len];
        if entry.e_value_inum.get() != 0 {
            return Err((at, XattrFault::ValueInode));
        }
        let size = usize::try_from(entry.e_value_size.get()).unwrap_or(usize::MAX);
        left = left.checked_sub(size).ok_or((at, XattrFault::ValueSize))?;
        let start = IBODY_HEADER_LEN + usize::from(entry.e_value_offs.get());
        if size != 0 && !taken.take(start, padded(size), end) {
            return Err((at, XattrFault::Value));
        }
        // The padding is hashed, too; it should be zero.
        let value = if size == 0 {
            &[]
        } else {
            &body[start..start + padded(size)]
        };
        let hash = entry.e_hash.get();
        // Old inodes have none.
        if hash != 0 && hash != entry_hash(name, value) && hash != signed_hash(name, value) {
            return Err((at, XattrFault::Hash));
        }
        if name.contains(&0) {
            oddity = Err((at, XattrFault::Name));
        }
        at += len;
    }
    if !taken.take(at, 4, end) {
        return Err((at, XattrFault::Entry));
    }
    oddity
}

/// Checks the attribute block of an inode; whether it counts as the inode's.
pub(super) fn check_block(cx: &Cx<'_>, state: &mut State, inode: &Inode<'_>) -> bool {
    let (ino, block) = (inode.ino, inode.file_acl);
    if block == 0 {
        return false;
    }
    if !cx.geo.compat.contains(Compat::EXT_ATTR) || !cx.holds(block, 1) {
        state.tell(Finding::XattrBlock { ino, block });
        return false;
    }
    if let Some(left) = state.xattr_blocks.get_mut(&block) {
        *left -= 1;
        return true;
    }
    let mut bytes = vec![0; cx.block_size()];
    if !cx.read(state, block, &mut bytes) {
        return false;
    }
    let refcount = match header(&bytes) {
        Ok(header) => {
            check_sum(cx, state, (ino, block), &bytes);
            header.h_refcount.get()
        }
        Err(error) => {
            state.tell(Finding::XattrHeader { ino, block, error });
            return false;
        }
    };
    let res = check_entries(&bytes);
    if let Err((offset, fault)) = res {
        let offset = offset as u32;
        state.tell(Finding::BlockXattr {
            ino,
            block,
            offset,
            fault,
        });
    }
    state.claim(ino, block);
    state.xattr_blocks.insert(block, i64::from(refcount) - 1);
    true
}

fn check_sum(cx: &Cx<'_>, state: &mut State, (ino, block): (u32, u64), bytes: &[u8]) {
    if !cx.geo.metadata_csum() {
        return;
    }
    let (before, rest) = bytes.split_at(CHECKSUM_AT);
    let found = u32::from_le_bytes([rest[0], rest[1], rest[2], rest[3]]);
    let seed = crc32c(cx.geo.csum_seed, &block.to_le_bytes());
    let want = crc32c(crc32c(crc32c(seed, before), &[0; 4]), &rest[4..]);
    if found != want {
        state.tell(Finding::XattrChecksum {
            ino,
            block,
            found,
            want,
        });
    }
}

/// Not `h_hash`, which only helps to find equal blocks, and which mke2fs makes in a way of its own.
fn check_entries(bytes: &[u8]) -> Result<(), (usize, XattrFault)> {
    let end = bytes.len();
    let mut taken = Taken::default();
    let mut at = BLOCK_HEADER_LEN;
    let mut before: Option<(u8, usize, &[u8])> = None;
    let mut oddity = Ok(());
    taken.take(0, BLOCK_HEADER_LEN, end);
    while at < end && !is_last(bytes, at) {
        let Some(entry) = entry_at(bytes, at) else {
            return Err((at, XattrFault::Entry));
        };
        let name_len = usize::from(entry.e_name_len);
        let len = padded(ENTRY_LEN + name_len);
        if !taken.take(at, len, end) {
            return Err((at, XattrFault::Entry));
        }
        if entry.e_name_index == 0 {
            return Err((at, XattrFault::NameIndex));
        }
        if entry.e_value_inum.get() != 0 {
            return Err((at, XattrFault::ValueInode));
        }
        let (start, size) = (
            usize::from(entry.e_value_offs.get()),
            entry.e_value_size.get(),
        );
        if size > MAX_VALUE || start + size as usize > end {
            return Err((at, XattrFault::ValueSize));
        }
        let size = size as usize;
        if size != 0 && !taken.take(start, padded(size), end) {
            return Err((at, XattrFault::Value));
        }
        let value = if size == 0 {
            &[]
        } else {
            &bytes[start..start + padded(size)]
        };
        let name = &bytes[at + ENTRY_LEN..][..name_len];
        let hash = entry.e_hash.get();
        if hash != entry_hash(name, value) && hash != signed_hash(name, value) {
            return Err((at, XattrFault::Hash));
        }
        let key = (entry.e_name_index, name_len, name);
        if let Some(before) = before
            && before >= key
        {
            let is_same = before == key;
            let fault = if is_same {
                XattrFault::Twice
            } else {
                XattrFault::Order
            };
            oddity = Err((at, fault));
        }
        if name.contains(&0) {
            oddity = Err((at, XattrFault::Name));
        }
        before = Some(key);
        at += len;
    }
    if !taken.take(at, 4, end) {
        return Err((at, XattrFault::Entry));
    }
    oddity
}

/// Tells of a block that says it has more or fewer inodes than use it.
pub(super) fn tell_refcount(cx: &Cx<'_>, state: &mut State, block: u64, left: i64) {
    let mut bytes = vec![0; cx.block_size()];
    if !cx.read(state, block, &mut bytes) {
        return;
    }
    let found = header(&bytes).map_or(0, |header| header.h_refcount.get());
    let want = u64::try_from(i64::from(found) - left).unwrap_or(0);
    state.tell(Finding::XattrRefcount { block, found, want });
}
