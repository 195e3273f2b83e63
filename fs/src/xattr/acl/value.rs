//! POSIX ACLs: their two byte forms, and what they have to do with a file's mode.
//!
//! Programs see version 2 (8 bytes an entry), the disk holds version 1, in which entries without
//! an id are 4 bytes long.

use smallvec::SmallVec;

/// What can be wrong with an ACL.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum AclError {
    /// The version is not the one of this form.
    #[error("acl: version {version}")]
    Version {
        /// As found.
        version: u32,
    },
    /// The bytes do not end with an entry.
    #[error("acl: {len} bytes")]
    Length {
        /// As found.
        len: usize,
    },
    /// An entry has an unknown tag, permissions beyond rwx, or no valid id.
    #[error("acl: entry {index}")]
    Entry {
        /// Which one.
        index: usize,
    },
    /// Entries are missing, twice there, or in the wrong order.
    #[error("acl: entries missing, repeated or out of order")]
    Order,
}

impl AclError {
    /// Names the check that failed, without its numbers.
    pub fn what(&self) -> &'static str {
        match self {
            Self::Version { .. } => "acl: version",
            Self::Length { .. } => "acl: length",
            Self::Entry { .. } => "acl: entry",
            Self::Order => "acl: order of entries",
        }
    }
}

/// Whom an entry is about.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Tag {
    /// The owner.
    UserObj,
    /// The user with this id.
    User(u32),
    /// The owning group.
    GroupObj,
    /// The group with this id.
    Group(u32),
    /// The most that named users, the owning group and named groups get.
    Mask,
    /// Everybody else.
    Other,
}

const NO_ID: u32 = u32::MAX;

impl Tag {
    fn decode(raw: u16, id: Option<u32>) -> Option<Self> {
        let id = || id.filter(|&id| id != NO_ID);
        match raw {
            0x01 => Some(Self::UserObj),
            0x02 => id().map(Self::User),
            0x04 => Some(Self::GroupObj),
            0x08 => id().map(Self::Group),
            0x10 => Some(Self::Mask),
            0x20 => Some(Self::Other),
            _ => None,
        }
    }

    fn raw(self) -> u16 {
        match self {
            Self::UserObj => 0x01,
            Self::User(_) => 0x02,
            Self::GroupObj => 0x04,
            Self::Group(_) => 0x08,
            Self::Mask => 0x10,
            Self::Other => 0x20,
        }
    }

    fn id(self) -> Option<u32> {
        match self {
            Self::User(id) | Self::Group(id) => Some(id),
            _ => None,
        }
    }
}

/// One entry: whom, and what of rwx.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct AclEntry {
    /// Whom it is about.
    pub tag: Tag,
    /// 0..=7.
    pub perm: u16,
}

/// A valid ACL.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Acl {
    entries: SmallVec<[AclEntry; 8]>,
}

/// What the mode says once an ACL was applied to it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Equivalence {
    /// The mode says all; no ACL need be stored.
    ModeOnly,
    /// There is more than the mode can say.
    Extended,
}

const XATTR_VERSION: u32 = 2;
const DISK_VERSION: u32 = 1;
const HEADER_LEN: usize = 4;
const XATTR_ENTRY_LEN: usize = 8;
const DISK_SHORT_LEN: usize = 4;

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn check_version(bytes: &[u8], want: u32) -> Result<(), AclError> {
    match u32_at(bytes, 0) {
        Some(version) if version == want => Ok(()),
        Some(version) => Err(AclError::Version { version }),
        None => Err(AclError::Length { len: bytes.len() }),
    }
}

impl Acl {
    /// Decodes and checks what `setxattr` brings; `None` if there are no entries, which asks for
    /// removal.
    ///
    /// # Errors
    /// Names the first check that fails.
    pub fn from_xattr(bytes: &[u8]) -> Result<Option<Self>, AclError> {
        check_version(bytes, XATTR_VERSION)?;
        let body = &bytes[HEADER_LEN..];
        if body.len() % XATTR_ENTRY_LEN != 0 {
            return Err(AclError::Length { len: bytes.len() });
        }
        let mut entries = SmallVec::new();
        for (index, raw) in body.chunks_exact(XATTR_ENTRY_LEN).enumerate() {
            let tag = u16_at(raw, 0).and_then(|tag| Tag::decode(tag, u32_at(raw, 4)));
            let (Some(tag), Some(perm)) = (tag, u16_at(raw, 2)) else {
                return Err(AclError::Entry { index });
            };
            entries.push(AclEntry { tag, perm });
        }
        if entries.is_empty() {
            return Ok(None);
        }
        Self { entries }.checked().map(Some)
    }

    /// Encodes for `getxattr`.
    pub fn to_xattr(&self) -> Vec<u8> {
        let mut bytes = XATTR_VERSION.to_le_bytes().to_vec();
        for e in &self.entries {
            bytes.extend_from_slice(&e.tag.raw().to_le_bytes());
            bytes.extend_from_slice(&e.perm.to_le_bytes());
            bytes.extend_from_slice(&e.tag.id().unwrap_or(NO_ID).to_le_bytes());
        }
        bytes
    }

    /// Decodes and checks the value stored on disk; `None` if there are no entries.
    ///
    /// # Errors
    /// Names the first check that fails.
    pub fn from_disk(bytes: &[u8]) -> Result<Option<Self>, AclError> {
        check_version(bytes, DISK_VERSION)?;
        let mut entries = SmallVec::new();
        let mut at = HEADER_LEN;
        while at < bytes.len() {
            let (Some(raw), Some(perm)) = (u16_at(bytes, at), u16_at(bytes, at + 2)) else {
                return Err(AclError::Length { len: bytes.len() });
            };
            let id = u32_at(bytes, at + DISK_SHORT_LEN);
            let Some(tag) = Tag::decode(raw, id) else {
                return Err(AclError::Entry {
                    index: entries.len(),
                });
            };
            at += DISK_SHORT_LEN + if tag.id().is_some() { 4 } else { 0 };
            entries.push(AclEntry { tag, perm });
        }
        if entries.is_empty() {
            return Ok(None);
        }
        Self { entries }.checked().map(Some)
    }

    /// Encodes for the disk.
    pub fn to_disk(&self) -> Vec<u8> {
        let mut bytes = DISK_VERSION.to_le_bytes().to_vec();
        for e in &self.entries {
            bytes.extend_from_slice(&e.tag.raw().to_le_bytes());
            bytes.extend_from_slice(&e.perm.to_le_bytes());
            if let Some(id) = e.tag.id() {
                bytes.extend_from_slice(&id.to_le_bytes());
            }
        }
        bytes
    }

    /// Returns the entries: owner, named users, group, named groups, mask, other.
    pub fn entries(&self) -> &[AclEntry] {
        &self.entries
    }

    /// Checks order and completeness as the kernel does; named ids may repeat, as they may there.
    fn checked(self) -> Result<Self, AclError> {
        if let Some(index) = self.entries.iter().position(|e| e.perm > 7) {
            return Err(AclError::Entry { index });
        }
        let step = |tag: Tag| match tag {
            Tag::UserObj => 0,
            Tag::User(_) => 1,
            Tag::GroupObj => 2,
            Tag::Group(_) => 3,
            Tag::Mask => 4,
            Tag::Other => 5,
        };
        let ordered = self.entries.windows(2).all(|pair| {
            let (a, b) = (step(pair[0].tag), step(pair[1].tag));
            a < b || (a == b && pair[0].tag.id().is_some())
        });
        let has = |tag| self.entries.iter().any(|e| e.tag == tag);
        let named = self.entries.iter().any(|e| e.tag.id().is_some());
        let complete = has(Tag::UserObj) && has(Tag::GroupObj) && has(Tag::Other);
        if ordered && complete && (has(Tag::Mask) || !named) {
            Ok(self)
        } else {
            Err(AclError::Order)
        }
    }

    /// Returns the mode bits that show this ACL, and whether they are all there is to it.
    pub fn mode_bits(&self) -> (u16, Equivalence) {
        let mut mode = 0;
        let mut equivalence = Equivalence::ModeOnly;
        let mut mask = None;
        for e in &self.entries {
            match e.tag {
                Tag::UserObj => mode |= e.perm << 6,
                Tag::GroupObj => mode |= e.perm << 3,
                Tag::Other => mode |= e.perm,
                Tag::Mask => mask = Some(e.perm),
                Tag::User(_) | Tag::Group(_) => {}
            }
            if matches!(e.tag, Tag::Mask | Tag::User(_) | Tag::Group(_)) {
                equivalence = Equivalence::Extended;
            }
        }
        if let Some(mask) = mask {
            mode = (mode & !0o070) | (mask << 3);
        }
        (mode, equivalence)
    }

    /// The entry that the group bits of the mode stand for.
    fn group_class(&mut self) -> Option<&mut AclEntry> {
        let tag = if self.entries.iter().any(|e| e.tag == Tag::Mask) {
            Tag::Mask
        } else {
            Tag::GroupObj
        };
        self.entries.iter_mut().find(|e| e.tag == tag)
    }

    /// Lets the ACL follow a `chmod`.
    pub fn chmod(&mut self, mode: u16) {
        for e in &mut self.entries {
            match e.tag {
                Tag::UserObj => e.perm = (mode >> 6) & 7,
                Tag::Other => e.perm = mode & 7,
                _ => {}
            }
        }
        if let Some(e) = self.group_class() {
            e.perm = (mode >> 3) & 7;
        }
    }

    /// Turns a default ACL into the access ACL of a new file that is created with `mode`: each
    /// side loses what the other does not grant. Returns the mode of the new file.
    pub fn inherit(&mut self, mode: u16) -> u16 {
        let mut bits = mode;
        let mut meet = |perm: &mut u16, shift: u16| {
            *perm &= (mode >> shift) & 7;
            bits = (bits & !(7 << shift)) | (*perm << shift);
        };
        for e in &mut self.entries {
            match e.tag {
                Tag::UserObj => meet(&mut e.perm, 6),
                Tag::Other => meet(&mut e.perm, 0),
                _ => {}
            }
        }
        if let Some(e) = self.group_class() {
            meet(&mut e.perm, 3);
        }
        bits
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn acl(entries: &[(Tag, u16)]) -> Acl {
        let entries = entries
            .iter()
            .map(|&(tag, perm)| AclEntry { tag, perm })
            .collect();
        Acl { entries }.checked().unwrap()
    }

    fn acls() -> impl Strategy<Value = Acl> {
        let named = prop::collection::vec((0..10_u32, 0..8_u16), 0..4);
        let obj = (0..8_u16, 0..8_u16, 0..8_u16);
        (obj, named.clone(), named, prop::option::of(0..8_u16)).prop_map(
            |((u, g, o), users, groups, mask)| {
                let named = !users.is_empty() || !groups.is_empty();
                let mask = mask.or(named.then_some(7));
                let mut list = vec![(Tag::UserObj, u)];
                list.extend(users.iter().map(|&(id, p)| (Tag::User(id), p)));
                list.push((Tag::GroupObj, g));
                list.extend(groups.iter().map(|&(id, p)| (Tag::Group(id), p)));
                list.extend(mask.map(|p| (Tag::Mask, p)));
                list.push((Tag::Other, o));
                acl(&list)
            },
        )
    }

    proptest! {
        #[test]
        fn both_forms_round_trip(acl in acls()) {
            prop_assert_eq!(Acl::from_xattr(&acl.to_xattr()), Ok(Some(acl.clone())));
            prop_assert_eq!(Acl::from_disk(&acl.to_disk()), Ok(Some(acl)));
        }

        #[test]
        fn mode_and_acl_agree_after_chmod_and_inherit(acl in acls(), mode in 0..0o10000_u16) {
            let mut changed = acl.clone();
            changed.chmod(mode);
            prop_assert_eq!(changed.mode_bits().0, mode & 0o777);
            let mut heir = acl.clone();
            let new = heir.inherit(mode);
            prop_assert_eq!(heir.mode_bits().0, new & 0o777);
            prop_assert_eq!(new, mode & (acl.mode_bits().0 | 0o7000));
        }

        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            drop(Acl::from_xattr(&bytes));
            drop(Acl::from_disk(&bytes));
        }
    }

    #[test]
    fn wrong_acls_are_refused() {
        let refuse = |entries: &[(Tag, u16)]| {
            let entries = entries
                .iter()
                .map(|&(tag, perm)| AclEntry { tag, perm })
                .collect();
            Acl { entries }.checked().unwrap_err()
        };
        use Tag::{GroupObj, Mask, Other, User, UserObj};
        assert_eq!(refuse(&[(UserObj, 7), (GroupObj, 7)]), AclError::Order);
        assert_eq!(
            refuse(&[(GroupObj, 7), (UserObj, 7), (Other, 7)]),
            AclError::Order
        );
        assert_eq!(
            refuse(&[(UserObj, 7), (UserObj, 7), (GroupObj, 7), (Other, 7)]),
            AclError::Order
        );
        let no_mask = [(UserObj, 7), (User(1), 7), (GroupObj, 7), (Other, 7)];
        assert_eq!(refuse(&no_mask), AclError::Order);
        let perm = [(UserObj, 7), (GroupObj, 8), (Mask, 7), (Other, 7)];
        assert_eq!(refuse(&perm), AclError::Entry { index: 1 });
        assert_eq!(
            Acl::from_xattr(&[1, 0, 0, 0]),
            Err(AclError::Version { version: 1 })
        );
        assert_eq!(Acl::from_xattr(&[2, 0, 0, 0]), Ok(None));
        assert_eq!(
            Acl::from_xattr(&[2, 0, 0, 0, 1]),
            Err(AclError::Length { len: 5 })
        );
    }
}
