//! Operations on attributes.

use super::super::acl::{self, Acl};
use super::super::effect::{Effect, NewNode};
use super::super::error::{Context, Result};
use super::super::model::Inode;
use super::super::worker::Worker;
use super::super::{compare, sys};

/// Errnos that mean an attribute is too large.
const TOO_LARGE: [i32; 2] = [libc::ENOSPC, libc::E2BIG];

/// Bound of what one object's attributes take together.
const XATTR_BYTES: u64 = 3000;

impl Worker {
    pub(super) fn op_chmod(&mut self) -> Result<()> {
        let Some(id) = self.pick_plain() else {
            return Ok(());
        };
        let is_dir = self.model.inode(id).and_then(Inode::dir).is_some();
        let mode = self.random_mode(if is_dir { NewNode::Dir } else { NewNode::File });
        let path = self.path(id);
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
        self.perform(Effect::Chmod { id, mode }, "chmod", &path, &[], || {
            std::fs::set_permissions(&path, permissions)
        })?;
        Ok(())
    }

    pub(super) fn op_chown(&mut self) -> Result<()> {
        let Some((at, id)) = self.pick_entry() else {
            return Ok(());
        };
        // Ids above 65535 use the high halves of the inode.
        let bound = if self.rng.chance(50) {
            1 << 16
        } else {
            1 << 31
        };
        let uid = self.rng.below(bound) as u32;
        let gid = self.rng.below(1 << 20) as u32;
        let path = self.place_path(&at);
        self.perform(Effect::Chown { id, uid, gid }, "chown", &path, &[], || {
            std::os::unix::fs::lchown(&path, Some(uid), Some(gid))
        })?;
        Ok(())
    }

    pub(super) fn op_utimes(&mut self) -> Result<()> {
        let Some((at, id)) = self.pick_entry() else {
            return Ok(());
        };
        let sec = if self.caps.has("time-wide") && self.rng.chance(30) {
            self.rng.below((1 << 34) - (1 << 31)) as i64 - (1 << 31)
        } else {
            self.rng.below(1 << 31) as i64
        };
        let nsec = if self.caps.has("time-ns") {
            self.rng.below(1_000_000_000) as u32
        } else {
            0
        };
        let path = self.place_path(&at);
        self.perform(
            Effect::Utimes { id, sec, nsec },
            "utimensat",
            &path,
            &[],
            || sys::utimes(&path, sec, nsec),
        )?;
        Ok(())
    }

    pub(super) fn op_setxattr(&mut self) -> Result<()> {
        let Some(id) = self.pick_plain() else {
            return Ok(());
        };
        let name = self.xattr_name();
        let len = match self.rng.below(10) {
            0..6 => self.rng.within(0, 40),
            6..9 => self.rng.within(0, 300),
            _ => self.rng.within(300, 2800),
        };
        // Equal values let the file system share attribute blocks between files.
        let stamp = if self.rng.chance(40) {
            self.rng.within(1, 8)
        } else {
            self.new_stamp()
        };
        let others = self.model.inode(id).map_or(0, |inode| {
            let others = inode.xattrs.iter().filter(|(other, _)| **other != name);
            others.map(|(_, (_, len))| len + 32).sum()
        });
        if others + len > XATTR_BYTES {
            return Ok(());
        }
        let path = self.path(id);
        let value = self.source.bytes(stamp, len as usize);
        let effect = Effect::SetXattr {
            id,
            name: name.clone(),
            stamp,
            len,
        };
        let set = self.perform(effect, "setxattr", &path, &TOO_LARGE, || {
            sys::set_xattr(&path, &name, &value)
        })?;
        if set.is_none() || self.rng.chance(30) {
            self.check_xattrs(id)
        } else {
            Ok(())
        }
    }

    pub(super) fn op_delxattr(&mut self) -> Result<()> {
        let Some(id) = self.pick_plain() else {
            return Ok(());
        };
        let names: Vec<String> = self
            .model
            .inode(id)
            .into_iter()
            .flat_map(|i| i.xattrs.keys().cloned())
            .collect();
        let path = self.path(id);
        if names.is_empty() {
            return self.check_missing_xattr(id);
        }
        let name = names[self.rng.index(names.len())].clone();
        let effect = Effect::DelXattr {
            id,
            name: name.clone(),
        };
        self.perform(effect, "removexattr", &path, &[], || {
            sys::remove_xattr(&path, &name)
        })?;
        if self.rng.chance(30) {
            self.check_xattrs(id)
        } else {
            Ok(())
        }
    }

    fn check_missing_xattr(&mut self, id: u64) -> Result<()> {
        let path = self.path(id);
        self.describe("remove a missing attribute", &path);
        match sys::remove_xattr(&path, "user.missing") {
            Err(error) if error.raw_os_error() == Some(libc::ENODATA) => Ok(()),
            Err(error) => Err(error).call("removexattr", &path),
            Ok(()) => Err(super::super::error::StormError::mismatch(
                &path,
                "removal of a missing attribute",
                "ENODATA",
                "success",
            )),
        }
    }

    pub(super) fn op_setacl(&mut self) -> Result<()> {
        let Some(id) = self.pick_plain() else {
            return Ok(());
        };
        let Some(inode) = self.model.inode(id) else {
            return Ok(());
        };
        let (is_dir, acls) = (inode.dir().is_some(), (inode.acl, inode.default_acl));
        let default = is_dir && self.rng.chance(40);
        let present = if default { acls.1 } else { acls.0 };
        let owner = if self.is_root { 0 } else { 7 };
        let mut perm = || self.rng.below(8) as u16;
        let (user, named_perm, group, mask, other) =
            (perm() | owner, perm(), perm(), perm(), perm());
        let named = 1000 + self.rng.below(5) as u32;
        let new = Acl {
            user,
            named,
            named_perm,
            group,
            mask,
            other,
        };
        let acl = if present.is_some() && self.rng.chance(40) {
            None
        } else {
            Some(new)
        };
        let path = self.path(id);
        let name = if default { acl::DEFAULT } else { acl::ACCESS };
        let effect = Effect::SetAcl { id, default, acl };
        let set = self.perform(effect, "set ACL", &path, &TOO_LARGE, || match acl {
            Some(acl) => sys::set_xattr(&path, name, &acl.to_xattr()),
            None => sys::remove_xattr(&path, name),
        })?;
        if set.is_none() || self.rng.chance(30) {
            self.check_xattrs(id)
        } else {
            Ok(())
        }
    }

    pub(super) fn check_xattrs(&mut self, id: u64) -> Result<()> {
        let Some(inode) = self.model.inode(id) else {
            return Ok(());
        };
        let expected = compare::expected_xattrs(inode, &self.source);
        let path = self.path(id);
        self.describe("compare attributes", &path);
        compare::xattrs(&path, &expected)
    }

    fn xattr_name(&mut self) -> String {
        const NAMES: [&str; 6] = ["user.a", "user.b", "user.mime_type", "user.c", "user.d", ""];
        match NAMES[self.rng.index(NAMES.len())] {
            "" => format!("user.{}", "n".repeat(self.rng.within(1, 100) as usize)),
            name => name.to_owned(),
        }
    }
}
