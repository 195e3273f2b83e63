//! Extended attributes.

use crate::core::Fs;
use crate::error::{FsError, FsResult};
use crate::format::inode::InodeData;
use crate::inode::Inode;
use crate::journal::Handle;

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

/// Gives a value; the name is whole, such as `user.x`.
pub fn get(_: &Fs, _: &Inode, _: &InodeData, _name: &[u8]) -> FsResult<Vec<u8>> {
    Err(FsError::NoData)
}

/// Gives all names, each with a NUL after it.
pub fn list(_: &Fs, _: &Inode, _: &InodeData) -> FsResult<Vec<u8>> {
    Ok(Vec::new())
}

/// Sets a value, or removes it (`None`).
pub fn set(
    _: &Fs,
    _: &Handle,
    _: &Inode,
    _: &mut InodeData,
    _name: &[u8],
    _value: Option<&[u8]>,
    _: XattrMode,
) -> FsResult {
    Err(FsError::NotSupported)
}

/// Gives up the attribute block of an inode that is being deleted.
pub fn delete_all(_: &Fs, _: &Handle, _: &Inode, _: &mut InodeData) -> FsResult {
    Ok(())
}

/// Credits for setting a value.
#[must_use]
pub fn credits() -> u32 {
    8
}

/// POSIX ACLs.
pub mod acl {
    use crate::core::Fs;
    use crate::error::FsResult;
    use crate::format::inode::InodeData;
    use crate::inode::Inode;
    use crate::journal::Handle;

    /// Gives a new inode what its directory's default ACL says: its ACLs and mode. `data.mode` is
    /// the mode asked for; without a default ACL the umask is applied.
    pub fn inherit(
        _: &Fs,
        _: &Handle,
        _parent: &Inode,
        _parent_data: &InodeData,
        _: &Inode,
        data: &mut InodeData,
        umask: u32,
    ) -> FsResult {
        data.mode &= !(umask as u16 & 0o777);
        Ok(())
    }

    /// After `data.mode` was changed by chmod: lets an access ACL say the same.
    pub fn chmod(_: &Fs, _: &Handle, _: &Inode, _: &mut InodeData) -> FsResult {
        Ok(())
    }
}
