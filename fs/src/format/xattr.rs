//! Extended attributes in an inode's body and in an attribute block: bytes only, no I/O.
//!
//! Format: Linux `Documentation/filesystems/ext4/attributes.rst`.
//!
//! Both places hold a list of entries that grows upwards, ended by four zero bytes, and values
//! that grow downwards from the end. Value offsets count from the first entry in an inode and
//! from the start of the block in a block.

use smallvec::SmallVec;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The start of an attribute block.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawXattrHeader {
    /// [`MAGIC`].
    pub h_magic: U32,
    /// Inodes that use the block.
    pub h_refcount: U32,
    /// 1.
    pub h_blocks: U32,
    /// Hash of all entries, 0 if the block may not be shared.
    pub h_hash: U32,
    /// crc32c of the file system's seed, the block number and the block.
    pub h_checksum: U32,
    /// Zero.
    pub h_reserved: [U32; 3],
}
const _: () = assert!(size_of::<RawXattrHeader>() == BLOCK_HEADER_LEN);

/// The fixed part of an entry; the name follows, padded to 4 bytes.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawXattrEntry {
    /// Bytes in the name.
    pub e_name_len: u8,
    /// Prefix of the name, see [`NameIndex`].
    pub e_name_index: u8,
    /// Where the value is.
    pub e_value_offs: U16,
    /// Inode that holds the value (feature `ea_inode`), or 0.
    pub e_value_inum: U32,
    /// Bytes in the value.
    pub e_value_size: U32,
    /// Hash of name and value; may be 0 in an inode.
    pub e_hash: U32,
}
const _: () = assert!(size_of::<RawXattrEntry>() == ENTRY_LEN);

/// Starts an attribute block and the attributes in an inode.
pub const MAGIC: u32 = 0xea02_0000;
/// Bytes of [`RawXattrHeader`].
pub const BLOCK_HEADER_LEN: usize = 32;
/// Bytes of the magic in an inode.
pub const IBODY_HEADER_LEN: usize = 4;
/// Most inodes that may share one block.
pub const MAX_REFCOUNT: u32 = 1024;
const ENTRY_LEN: usize = 16;
const END_LEN: usize = 4;
/// Where `h_checksum` is.
pub const CHECKSUM_AT: usize = 16;

/// Prefix of a name, stored as a number.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct NameIndex(pub u8);

impl NameIndex {
    /// `user.`
    pub const USER: Self = Self(1);
    /// `system.posix_acl_access`, the whole name.
    pub const ACL_ACCESS: Self = Self(2);
    /// `system.posix_acl_default`, the whole name.
    pub const ACL_DEFAULT: Self = Self(3);
    /// `trusted.`
    pub const TRUSTED: Self = Self(4);
    /// `security.`
    pub const SECURITY: Self = Self(6);
    const NAMES: [(Self, &'static str); 5] = [
        (Self::USER, "user."),
        (Self::ACL_ACCESS, "system.posix_acl_access"),
        (Self::ACL_DEFAULT, "system.posix_acl_default"),
        (Self::TRUSTED, "trusted."),
        (Self::SECURITY, "security."),
    ];

    /// Splits a full name into its stored prefix and the rest, which may be empty; `None` for
    /// names that are not to be had, such as the `system.data` of inline files.
    pub fn split(full: &[u8]) -> Option<(Self, &[u8])> {
        Self::NAMES.iter().find_map(|&(index, prefix)| {
            let rest = full.strip_prefix(prefix.as_bytes())?;
            (prefix.ends_with('.') || rest.is_empty()).then_some((index, rest))
        })
    }

    /// Returns what stands in front of the stored name; `None` for prefixes nobody may see.
    pub fn prefix(self) -> Option<&'static str> {
        Self::NAMES
            .iter()
            .find(|(index, _)| *index == self)
            .map(|(_, prefix)| *prefix)
    }
}

/// What can be wrong with stored attributes; the caller adds block and inode number.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum XattrError {
    /// The block does not begin with [`MAGIC`], or `h_blocks` is not 1.
    #[error("attribute block: magic {magic:#x}, blocks {blocks}")]
    Header {
        /// As found.
        magic: u32,
        /// As found.
        blocks: u32,
    },
    /// The reference count is impossible.
    #[error("attribute block: refcount {refcount}")]
    Refcount {
        /// As found.
        refcount: u32,
    },
    /// The list of entries runs past the end.
    #[error("attribute entry at {offset}: past the end")]
    Entry {
        /// Where it begins.
        offset: usize,
    },
    /// The name holds a zero byte.
    #[error("attribute entry at {offset}: zero byte in the name")]
    Name {
        /// Where it begins.
        offset: usize,
    },
    /// The value runs past the end or into the entries.
    #[error("attribute entry at {offset}: value at {value_offs}, {value_size} bytes")]
    Value {
        /// Where it begins.
        offset: usize,
        /// As found.
        value_offs: u16,
        /// As found.
        value_size: u32,
    },
}

impl XattrError {
    /// Names the check that failed, without its numbers.
    pub fn what(&self) -> &'static str {
        match self {
            Self::Header { .. } => "attribute block: header",
            Self::Refcount { .. } => "attribute block: refcount",
            Self::Entry { .. } => "attribute: entry past the end",
            Self::Name { .. } => "attribute: zero byte in the name",
            Self::Value { .. } => "attribute: value out of bounds",
        }
    }
}

/// Where the value of an attribute is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Value<'a> {
    /// Beside the entry.
    Here(&'a [u8]),
    /// In an inode of its own.
    Inode {
        /// Its number.
        ino: u32,
        /// Bytes of the value.
        size: u32,
        /// Hash of name and value.
        hash: u32,
    },
}

impl Value<'_> {
    fn space(&self) -> usize {
        match self {
            Self::Here(value) => padded(value.len()),
            Self::Inode { .. } => 0,
        }
    }
}

/// One attribute.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Item<'a> {
    /// Prefix of the name.
    pub index: NameIndex,
    /// The name without its prefix.
    pub name: &'a [u8],
    /// The value.
    pub value: Value<'a>,
}

impl Item<'_> {
    fn entry_space(&self) -> usize {
        padded(ENTRY_LEN + self.name.len())
    }

    /// Orders the entries of a block.
    fn order(&self) -> (NameIndex, usize, &[u8]) {
        (self.index, self.name.len(), self.name)
    }

    /// Returns whether this is the attribute `index`, `name`.
    pub fn is(&self, index: NameIndex, name: &[u8]) -> bool {
        self.index == index && self.name == name
    }
}

/// A handful of attributes.
pub type Items<'a> = SmallVec<[Item<'a>; 8]>;

const fn padded(len: usize) -> usize {
    (len + 3) & !3
}

/// Which of the two places.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Place {
    /// Behind the fields of an inode.
    Ibody,
    /// A block of its own.
    Block,
}

impl Place {
    /// Where the first entry is.
    fn first(self) -> usize {
        match self {
            Self::Ibody => IBODY_HEADER_LEN,
            Self::Block => BLOCK_HEADER_LEN,
        }
    }

    /// What value offsets count from.
    fn base(self) -> usize {
        match self {
            Self::Ibody => IBODY_HEADER_LEN,
            Self::Block => 0,
        }
    }
}

/// The attributes in one place, checked.
#[derive(Clone, Copy, Debug)]
pub struct Area<'a> {
    bytes: &'a [u8],
    place: Place,
}

impl<'a> Area<'a> {
    /// Checks the attributes in the bytes of an inode behind its fields; without the magic there
    /// are none.
    ///
    /// # Errors
    /// Names the first check that fails.
    pub fn ibody(bytes: &'a [u8]) -> Result<Option<Self>, XattrError> {
        if bytes.len() < IBODY_HEADER_LEN + END_LEN || bytes[..4] != MAGIC.to_le_bytes() {
            return Ok(None);
        }
        Self::checked(bytes, Place::Ibody).map(Some)
    }

    /// Checks an attribute block.
    ///
    /// # Errors
    /// Names the first check that fails.
    pub fn block(bytes: &'a [u8]) -> Result<Self, XattrError> {
        let header = header(bytes)?;
        let refcount = header.h_refcount.get();
        if refcount == 0 || refcount > MAX_REFCOUNT {
            return Err(XattrError::Refcount { refcount });
        }
        Self::checked(bytes, Place::Block)
    }

    fn checked(bytes: &'a [u8], place: Place) -> Result<Self, XattrError> {
        let area = Self { bytes, place };
        let mut end = place.first();
        while let Some(entry) = area.raw(end)? {
            end += padded(ENTRY_LEN + usize::from(entry.e_name_len));
        }
        let mut offset = place.first();
        while let Some(entry) = area.raw(offset)? {
            let next = offset + padded(ENTRY_LEN + usize::from(entry.e_name_len));
            if bytes[offset + ENTRY_LEN..next][..usize::from(entry.e_name_len)].contains(&0) {
                return Err(XattrError::Name { offset });
            }
            let (value_offs, value_size) = (entry.e_value_offs.get(), entry.e_value_size.get());
            let start = place.base() + usize::from(value_offs);
            let size = usize::try_from(value_size).unwrap_or(usize::MAX);
            let fits =
                start >= end + END_LEN && size < bytes.len() && start + padded(size) <= bytes.len();
            if entry.e_value_inum.get() == 0 && size != 0 && !fits {
                return Err(XattrError::Value {
                    offset,
                    value_offs,
                    value_size,
                });
            }
            offset = next;
        }
        Ok(area)
    }

    /// Returns the entry at `offset`, `None` at the end of the list.
    fn raw(&self, offset: usize) -> Result<Option<&'a RawXattrEntry>, XattrError> {
        let error = XattrError::Entry { offset };
        let rest = self.bytes.get(offset..).ok_or(error)?;
        if rest.get(..END_LEN).ok_or(error)? == [0; END_LEN] {
            return Ok(None);
        }
        let Ok((entry, _)) = RawXattrEntry::ref_from_prefix(rest) else {
            return Err(error);
        };
        if padded(ENTRY_LEN + usize::from(entry.e_name_len)) + END_LEN > rest.len() {
            return Err(error);
        }
        Ok(Some(entry))
    }

    /// Walks the attributes in stored order.
    pub fn items(&self) -> impl Iterator<Item = Item<'a>> + use<'a> {
        let area = *self;
        let mut offset = area.place.first();
        std::iter::from_fn(move || {
            // Checked when the area was made: neither an error nor a bad range is left.
            let entry = area.raw(offset).ok().flatten()?;
            let name_at = offset + ENTRY_LEN;
            let name = &area.bytes[name_at..name_at + usize::from(entry.e_name_len)];
            offset += padded(ENTRY_LEN + name.len());
            let size = entry.e_value_size.get();
            let value = if entry.e_value_inum.get() != 0 {
                Value::Inode {
                    ino: entry.e_value_inum.get(),
                    size,
                    hash: entry.e_hash.get(),
                }
            } else if size == 0 {
                Value::Here(&[])
            } else {
                let start = area.place.base() + usize::from(entry.e_value_offs.get());
                Value::Here(&area.bytes[start..start + usize::try_from(size).ok()?])
            };
            Some(Item {
                index: NameIndex(entry.e_name_index),
                name,
                value,
            })
        })
    }

    /// Looks for an attribute.
    pub fn find(&self, index: NameIndex, name: &[u8]) -> Option<Item<'a>> {
        self.items().find(|item| item.is(index, name))
    }
}

/// Reads the header of an attribute block.
///
/// # Errors
/// It is not one.
pub fn header(block: &[u8]) -> Result<&RawXattrHeader, XattrError> {
    let Ok((header, _)) = RawXattrHeader::ref_from_prefix(block) else {
        return Err(XattrError::Header {
            magic: 0,
            blocks: 0,
        });
    };
    let (magic, blocks) = (header.h_magic.get(), header.h_blocks.get());
    if magic != MAGIC || blocks != 1 {
        return Err(XattrError::Header { magic, blocks });
    }
    Ok(header)
}

/// Changes the reference count of an attribute block.
pub fn set_refcount(block: &mut [u8], refcount: u32) {
    block[4..8].copy_from_slice(&refcount.to_le_bytes());
}

/// Returns whether `items` fit in `len` bytes of an inode or block.
pub fn fits(items: &[Item<'_>], place: Place, len: usize) -> bool {
    let space: usize = items
        .iter()
        .map(|i| i.entry_space() + i.value.space())
        .sum();
    len >= place.first() && space + END_LEN <= len - place.first()
}

/// Writes `items`, which must fit, as the bytes of an inode behind its fields; all zero if there
/// are none.
pub fn encode_ibody(bytes: &mut [u8], items: &[Item<'_>]) {
    bytes.fill(0);
    if !items.is_empty() {
        bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
        encode(bytes, Place::Ibody, items);
    }
}

/// Writes `items`, which must fit, as an attribute block with reference count 1; sorts them.
pub fn encode_block(bytes: &mut [u8], items: &mut [Item<'_>]) {
    items.sort_by(|a, b| a.order().cmp(&b.order()));
    bytes.fill(0);
    let hash = encode(bytes, Place::Block, items);
    let header = RawXattrHeader {
        h_magic: U32::new(MAGIC),
        h_refcount: U32::new(1),
        h_blocks: U32::new(1),
        h_hash: U32::new(hash),
        h_checksum: U32::ZERO,
        h_reserved: [U32::ZERO; 3],
    };
    bytes[..BLOCK_HEADER_LEN].copy_from_slice(header.as_bytes());
}

/// Writes entries and values into zeroed bytes and returns the hash of all.
fn encode(bytes: &mut [u8], place: Place, items: &[Item<'_>]) -> u32 {
    debug_assert!(fits(items, place, bytes.len()));
    let mut offset = place.first();
    let mut end = bytes.len();
    let mut all = Some(0_u32);
    for item in items {
        let mut entry = RawXattrEntry {
            e_name_len: u8::try_from(item.name.len()).unwrap_or(u8::MAX),
            e_name_index: item.index.0,
            e_value_offs: U16::ZERO,
            e_value_inum: U32::ZERO,
            e_value_size: U32::ZERO,
            e_hash: U32::ZERO,
        };
        match item.value {
            Value::Here(value) => {
                if !value.is_empty() {
                    end -= padded(value.len());
                    bytes[end..end + value.len()].copy_from_slice(value);
                    let offs = u16::try_from(end - place.base()).unwrap_or(u16::MAX);
                    entry.e_value_offs = U16::new(offs);
                    entry.e_value_size = U32::new(u32::try_from(value.len()).unwrap_or(u32::MAX));
                }
                // As the kernel: hashes are there to find equal blocks, inodes need none.
                if place == Place::Block {
                    entry.e_hash = U32::new(entry_hash(item.name, value));
                }
            }
            Value::Inode { ino, size, hash } => {
                entry.e_value_inum = U32::new(ino);
                entry.e_value_size = U32::new(size);
                entry.e_hash = U32::new(hash);
            }
        }
        // One entry without a hash, and the block must not be shared.
        all = match entry.e_hash.get() {
            0 => None,
            hash => all.map(|all| (all << 16) ^ (all >> 16) ^ hash),
        };
        let name_at = offset + ENTRY_LEN;
        bytes[offset..name_at].copy_from_slice(entry.as_bytes());
        bytes[name_at..name_at + item.name.len()].copy_from_slice(item.name);
        offset += item.entry_space();
    }
    all.unwrap_or(0)
}

/// Hashes name and value of an entry in a block. Kernels before 6.2 hashed the name with signed
/// bytes on some machines; nothing but the sharing of blocks depends on it.
pub fn entry_hash(name: &[u8], value: &[u8]) -> u32 {
    let hash = name
        .iter()
        .fold(0_u32, |hash, &b| hash.rotate_left(5) ^ u32::from(b));
    value.chunks(4).fold(hash, |hash, quad| {
        let mut word = [0; 4];
        word[..quad.len()].copy_from_slice(quad);
        hash.rotate_left(16) ^ u32::from_le_bytes(word)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    type Map = BTreeMap<(u8, Vec<u8>), Vec<u8>>;

    fn items(map: &Map) -> Vec<Item<'_>> {
        map.iter()
            .map(|((index, name), value)| Item {
                index: NameIndex(*index),
                name,
                value: Value::Here(value),
            })
            .collect()
    }

    fn map(area: Area<'_>) -> Map {
        area.items()
            .map(|item| match item.value {
                Value::Here(value) => ((item.index.0, item.name.to_vec()), value.to_vec()),
                Value::Inode { .. } => panic!("no such value was written"),
            })
            .collect()
    }

    fn maps() -> impl Strategy<Value = Map> {
        let name = (1..9_u8, prop::collection::vec(1..=255_u8, 0..40));
        prop::collection::btree_map(name, prop::collection::vec(any::<u8>(), 0..60), 0..12)
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(map_in in maps()) {
            let mut list = items(&map_in);
            let mut block = vec![0xaa; 4096];
            encode_block(&mut block, &mut list);
            prop_assert_eq!(map(Area::block(&block).unwrap()), map_in.clone());
            let sorted: Vec<_> = Area::block(&block).unwrap().items().collect();
            prop_assert!(sorted.is_sorted_by_key(|i| (i.index, i.name.len(), i.name.to_vec())));

            let mut ibody = vec![0xaa; 160];
            while !fits(&list, Place::Ibody, ibody.len()) {
                list.pop();
            }
            encode_ibody(&mut ibody, &list);
            let back = Area::ibody(&ibody).unwrap().map(map).unwrap_or_default();
            prop_assert_eq!(back.len(), list.len());
            prop_assert!(back.iter().all(|(k, v)| map_in.get(k) == Some(v)));
        }

        #[test]
        fn damage_is_an_error_or_an_answer(
            map_in in maps(),
            hits in prop::collection::vec((0..4096_usize, any::<u8>()), 1..20),
        ) {
            let mut block = vec![0; 4096];
            encode_block(&mut block, &mut items(&map_in));
            for (at, value) in hits {
                block[if at % 2 == 0 { at } else { at % 256 }] = value;
            }
            if let Ok(area) = Area::block(&block) {
                prop_assert!(area.items().count() < 256);
            }
            if let Ok(Some(area)) = Area::ibody(&block[..at_most(&block)]) {
                prop_assert!(area.items().count() < 256);
            }
        }
    }

    fn at_most(block: &[u8]) -> usize {
        usize::from(block[40]) + 4
    }

    #[test]
    fn names_split_at_their_prefix() {
        let split = |name: &'static str| NameIndex::split(name.as_bytes());
        assert_eq!(split("user.x.y"), Some((NameIndex::USER, &b"x.y"[..])));
        assert_eq!(
            split("system.posix_acl_access"),
            Some((NameIndex::ACL_ACCESS, &b""[..]))
        );
        assert_eq!(split("system.posix_acl_accessx"), None);
        assert_eq!(split("system.data"), None);
        assert_eq!(split("btrfs.x"), None);
        assert_eq!(NameIndex::SECURITY.prefix(), Some("security."));
        assert_eq!(NameIndex(9).prefix(), None);
    }

    #[test]
    fn each_damage_has_its_name() {
        let mut good = vec![0; 1024];
        let (index, value) = (NameIndex::USER, Value::Here(b"value"));
        encode_block(
            &mut good,
            &mut [Item {
                index,
                name: b"name",
                value,
            }],
        );
        let sound = good.clone();
        let damaged = |at: usize, byte: u8| {
            let mut block = sound.clone();
            block[at] = byte;
            Area::block(&block).unwrap_err()
        };
        assert_eq!(
            damaged(0, 1),
            XattrError::Header {
                magic: MAGIC + 1,
                blocks: 1
            }
        );
        assert_eq!(damaged(4, 0), XattrError::Refcount { refcount: 0 });
        assert_eq!(damaged(48, 0), XattrError::Name { offset: 32 });
        let value = XattrError::Value {
            offset: 32,
            value_offs: 1016,
            value_size: 255,
        };
        assert_eq!(damaged(40, 255), value);
        good[32..].fill(0xff);
        assert!(matches!(
            Area::block(&good).unwrap_err(),
            XattrError::Entry { .. }
        ));
    }
}
