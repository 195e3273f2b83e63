//! POSIX ACLs as extended attributes.
//!
//! Format: Linux `include/uapi/linux/posix_acl_xattr.h`, version 2.

use super::text::{Words, parse};

/// Name of the attribute with the ACL that is checked on access.
pub const ACCESS: &str = "system.posix_acl_access";
/// Name of the attribute with the ACL that new children of a directory get.
pub const DEFAULT: &str = "system.posix_acl_default";

const VERSION: u32 = 2;
const UNDEFINED_ID: u32 = u32::MAX;

/// An ACL with one named user and a mask: the smallest that a mode cannot express.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Acl {
    /// Permissions of the owner.
    pub user: u16,
    /// The named user.
    pub named: u32,
    /// Permissions of the named user.
    pub named_perm: u16,
    /// Permissions of the owning group.
    pub group: u16,
    /// Upper bound for all but owner and others; the group bits of the mode.
    pub mask: u16,
    /// Permissions of others.
    pub other: u16,
}

impl Acl {
    /// Returns the permission bits that `stat` shows.
    pub fn mode(&self) -> u32 {
        u32::from(self.user) << 6 | u32::from(self.mask) << 3 | u32::from(self.other)
    }

    /// Returns the ACL after a `chmod`.
    pub fn with_mode(self, mode: u32) -> Self {
        let bits = |shift: u32| (mode >> shift & 7) as u16;
        Self {
            user: bits(6),
            mask: bits(3),
            other: bits(0),
            ..self
        }
    }

    /// Returns the access ACL of a child made with `mode` where `self` is the default ACL.
    pub fn inherited(self, mode: u32) -> Self {
        let limit = self.with_mode(mode);
        Self {
            user: self.user & limit.user,
            mask: self.mask & limit.mask,
            other: self.other & limit.other,
            ..self
        }
    }

    /// Returns the value of the attribute.
    pub fn to_xattr(self) -> Vec<u8> {
        let entries = [
            (0x01_u16, self.user, UNDEFINED_ID),
            (0x02, self.named_perm, self.named),
            (0x04, self.group, UNDEFINED_ID),
            (0x10, self.mask, UNDEFINED_ID),
            (0x20, self.other, UNDEFINED_ID),
        ];
        let mut value = VERSION.to_le_bytes().to_vec();
        for (tag, perm, id) in entries {
            value.extend(tag.to_le_bytes());
            value.extend(perm.to_le_bytes());
            value.extend(id.to_le_bytes());
        }
        value
    }

    /// Returns the words of the log.
    pub fn to_words(self) -> String {
        let Self {
            user,
            named,
            named_perm,
            group,
            mask,
            other,
        } = self;
        format!("{user} {named} {named_perm} {group} {mask} {other}")
    }

    /// Reads the words of the log.
    pub fn from_words(words: &mut Words<'_>) -> Result<Self, String> {
        Ok(Self {
            user: words.num("user")?,
            named: parse(words.word("named")?, "named")?,
            named_perm: words.num("named permissions")?,
            group: words.num("group")?,
            mask: words.num("mask")?,
            other: words.num("other")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_gets_no_more_than_it_was_made_with() {
        let acl = Acl {
            user: 7,
            named: 5,
            named_perm: 7,
            group: 5,
            mask: 7,
            other: 4,
        };
        assert_eq!(acl.inherited(0o640).mode(), 0o640);
        assert_eq!(acl.inherited(0o777).mode(), 0o774);
        assert_eq!(acl.to_xattr().len(), 4 + 5 * 8);
    }
}
