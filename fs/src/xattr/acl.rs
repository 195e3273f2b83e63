//! POSIX ACLs of inodes: the `system.posix_acl_*` attributes, `chmod`, and inheritance.

mod value;

use crate::core::Fs;
use crate::error::{FsError, FsResult};
use crate::format::inode::InodeData;
use crate::format::xattr::NameIndex;
use crate::inode::Inode;
use crate::journal::Handle;
use crate::xattr::{XattrMode, get_stored, set_stored};

pub use value::{Acl, AclEntry, AclError, Equivalence, Tag};

const TYPE_MASK: u16 = 0o170_000;
const DIRECTORY: u16 = 0o040_000;
const SYMLINK: u16 = 0o120_000;

/// Which of an inode's two ACLs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Which {
    /// Who may do what with the file.
    Access,
    /// What new files in the directory get.
    Default,
}

impl Which {
    pub(super) fn from_index(index: NameIndex) -> Option<Self> {
        match index {
            NameIndex::ACL_ACCESS => Some(Self::Access),
            NameIndex::ACL_DEFAULT => Some(Self::Default),
            _ => None,
        }
    }

    fn index(self) -> NameIndex {
        match self {
            Self::Access => NameIndex::ACL_ACCESS,
            Self::Default => NameIndex::ACL_DEFAULT,
        }
    }
}

/// Reads an ACL; `None` if there is none.
///
/// # Errors
/// I/O errors; damage.
pub fn read(fs: &Fs, inode: &Inode, data: &InodeData, which: Which) -> FsResult<Option<Acl>> {
    match get_stored(fs, inode, data, which.index(), b"") {
        Ok(bytes) => {
            Acl::from_disk(&bytes).map_err(|e| fs.corrupt(e.what(), data.file_acl, inode.ino))
        }
        Err(FsError::NoData) => Ok(None),
        Err(error) => Err(error),
    }
}

fn write(
    fs: &Fs,
    handle: &Handle,
    inode: &Inode,
    data: &mut InodeData,
    which: Which,
    acl: Option<&Acl>,
) -> FsResult {
    let bytes = acl.map(Acl::to_disk);
    let mode = XattrMode::Any;
    match set_stored(
        fs,
        handle,
        inode,
        data,
        (which.index(), b""),
        bytes.as_deref(),
        mode,
    ) {
        // Nothing to remove is as good as removed.
        Err(FsError::NoData) if acl.is_none() => Ok(()),
        result => result,
    }
}

/// Answers `getxattr`.
pub(super) fn get_value(
    fs: &Fs,
    inode: &Inode,
    data: &InodeData,
    which: Which,
) -> FsResult<Vec<u8>> {
    if !fs.opts.acl {
        return Err(FsError::NotSupported);
    }
    let acl = read(fs, inode, data, which)?;
    acl.map(|acl| acl.to_xattr()).ok_or(FsError::NoData)
}

/// Does `setxattr` and `removexattr`. An access ACL changes the permission bits of `data.mode`,
/// and is not stored if they say all of it. Whether the set-group-id bit must go as well, for a
/// caller outside the group, is the caller's to see to.
pub(super) fn set_value(
    fs: &Fs,
    handle: &Handle,
    inode: &Inode,
    data: &mut InodeData,
    which: Which,
    value: Option<&[u8]>,
) -> FsResult {
    let kind = data.mode & TYPE_MASK;
    if !fs.opts.acl || kind == SYMLINK {
        return Err(FsError::NotSupported);
    }
    let acl = match value.map(Acl::from_xattr) {
        None => None,
        Some(Ok(acl)) => acl,
        Some(Err(AclError::Version { .. })) => return Err(FsError::NotSupported),
        Some(Err(_)) => return Err(FsError::Invalid),
    };
    match which {
        Which::Access => set_access(fs, handle, inode, data, acl.as_ref()),
        Which::Default if kind == DIRECTORY => write(fs, handle, inode, data, which, acl.as_ref()),
        Which::Default if acl.is_some() => Err(FsError::AccessDenied),
        Which::Default => Ok(()),
    }
}

fn set_access(
    fs: &Fs,
    handle: &Handle,
    inode: &Inode,
    data: &mut InodeData,
    acl: Option<&Acl>,
) -> FsResult {
    let (bits, equivalence) = match acl {
        Some(acl) => acl.mode_bits(),
        None => (data.mode & 0o777, Equivalence::ModeOnly),
    };
    let stored = acl.filter(|_| equivalence == Equivalence::Extended);
    write(fs, handle, inode, data, Which::Access, stored)?;
    data.mode = (data.mode & !0o777) | bits;
    Ok(())
}

/// Gives a new inode what its directory's default ACL says: its ACLs and mode. `data.mode` is
/// the mode asked for; without a default ACL the umask is applied.
///
/// # Errors
/// [`FsError::NoSpace`]; damage; I/O errors.
pub fn inherit(
    fs: &Fs,
    handle: &Handle,
    parent: &Inode,
    parent_data: &InodeData,
    inode: &Inode,
    data: &mut InodeData,
    umask: u32,
) -> FsResult {
    let kind = data.mode & TYPE_MASK;
    if kind == SYMLINK {
        return Ok(());
    }
    let default = if fs.opts.acl {
        read(fs, parent, parent_data, Which::Default)?
    } else {
        None
    };
    let Some(default) = default else {
        let [low, high, ..] = umask.to_le_bytes();
        data.mode &= !(u16::from_le_bytes([low, high]) & 0o777);
        return Ok(());
    };
    let mut access = default.clone();
    data.mode = access.inherit(data.mode);
    if kind == DIRECTORY {
        write(fs, handle, inode, data, Which::Default, Some(&default))?;
    }
    if access.mode_bits().1 == Equivalence::Extended {
        write(fs, handle, inode, data, Which::Access, Some(&access))?;
    }
    Ok(())
}

/// After `data.mode` was changed by chmod: lets an access ACL say the same.
///
/// # Errors
/// Damage; I/O errors.
pub fn chmod(fs: &Fs, handle: &Handle, inode: &Inode, data: &mut InodeData) -> FsResult {
    if !fs.opts.acl || data.mode & TYPE_MASK == SYMLINK {
        return Ok(());
    }
    let Some(mut acl) = read(fs, inode, data, Which::Access)? else {
        return Ok(());
    };
    acl.chmod(data.mode);
    set_access(fs, handle, inode, data, Some(&acl))
}
