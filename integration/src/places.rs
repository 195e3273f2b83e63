//! Which argument is the mountpoint and which the image, and whether they can be.

use std::fs::Metadata;
use std::io;
use std::path::{Path, PathBuf};

/// Mountpoint and image, both absolute.
#[derive(Clone, Debug)]
pub struct Places {
    /// An existing directory.
    pub mountpoint: PathBuf,
    /// An existing file of any kind.
    pub image: PathBuf,
    /// The image as it was given.
    pub image_as_given: String,
}

/// What is wrong with the two arguments.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// Both are directories.
    #[error("both {first:?} and {second:?} are directories: one has to be an image")]
    BothDirectories {
        /// First argument.
        first: PathBuf,
        /// Second argument.
        second: PathBuf,
    },
    /// None is a directory.
    #[error("neither {first:?} nor {second:?} is a directory: one has to be the mountpoint")]
    NoDirectory {
        /// First argument.
        first: PathBuf,
        /// Second argument.
        second: PathBuf,
    },
    /// The mountpoint is missing.
    #[error("mountpoint {path:?} does not exist")]
    NoMountpoint {
        /// As given.
        path: PathBuf,
    },
    /// The image is missing.
    #[error("image {path:?} does not exist")]
    NoImage {
        /// As given.
        path: PathBuf,
    },
    /// A mount whose process has died.
    #[error(
        "mountpoint {path:?}: a file system whose process is gone is still mounted there \
         (fusermount3 -u {path:?} removes it)"
    )]
    DeadMount {
        /// As given.
        path: PathBuf,
    },
    /// Already a mount of this program.
    #[error("mountpoint {path:?} is busy: {source_name:?} is already mounted there")]
    Busy {
        /// As given.
        path: PathBuf,
        /// What is mounted.
        source_name: String,
    },
    /// It cannot be looked at.
    #[error("cannot look at {path:?}")]
    Look {
        /// As given.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Tells mountpoint and image apart.
///
/// # Errors
/// What is wrong with them; nothing was opened.
pub fn find(first: &Path, second: &Path) -> Result<Places, PlaceError> {
    let (mountpoint, image) = match (look(first)?, look(second)?) {
        (Some(a), Some(b)) if a.is_dir() && b.is_dir() => {
            let (first, second) = (first.to_owned(), second.to_owned());
            return Err(PlaceError::BothDirectories { first, second });
        }
        (Some(a), Some(_)) if a.is_dir() => (first, second),
        (Some(_), Some(b)) if b.is_dir() => (second, first),
        (Some(a), None) if a.is_dir() => return Err(no_image(second)),
        (None, Some(b)) if b.is_dir() => return Err(no_image(first)),
        (Some(_), None) => return Err(no_mountpoint(second)),
        (None, Some(_) | None) => return Err(no_mountpoint(first)),
        (Some(_), Some(_)) => {
            let (first, second) = (first.to_owned(), second.to_owned());
            return Err(PlaceError::NoDirectory { first, second });
        }
    };
    Ok(Places {
        mountpoint: absolute(mountpoint)?,
        image: absolute(image)?,
        image_as_given: image.to_string_lossy().into_owned(),
    })
}

/// Refuses a mountpoint that this program, or the same image, is mounted on already.
///
/// # Errors
/// [`PlaceError::Busy`].
pub fn refuse_busy(mountpoint: &Path, fsname: &str) -> Result<(), PlaceError> {
    // Without /proc nothing can be said; the lock on the image still stands.
    let Ok(table) = std::fs::read_to_string("/proc/self/mountinfo") else {
        return Ok(());
    };
    match top_mount(&table, mountpoint) {
        Some(Top { kind, source, .. }) if kind == "fuse.fusefs-stack" || source == fsname => {
            let path = mountpoint.to_owned();
            // Attributes may come from the kernel's cache; this asks whoever serves.
            Err(match rustix::fs::statfs(mountpoint) {
                Err(rustix::io::Errno::NOTCONN) => PlaceError::DeadMount { path },
                _ => PlaceError::Busy {
                    path,
                    source_name: source,
                },
            })
        }
        _ => Ok(()),
    }
}

/// Lets the kernel read ahead `bytes` of a file in `mountpoint`, where FUSE mounts begin with 128
/// KiB in requests of as much, and a request costs more than its data. Only root may; others keep
/// what they have.
pub fn read_ahead(mountpoint: &Path, bytes: u32) {
    let Some(top) = fuse_mount(mountpoint) else {
        return;
    };
    let path = format!("/sys/class/bdi/{}/read_ahead_kb", top.device);
    if let Err(error) = std::fs::write(&path, (bytes / 1024).to_string()) {
        log::debug!("{path}: {error}");
    }
}

/// The FUSE mount on a path. Asks nobody who serves; where it was unmounted meanwhile, it does not
/// tell of what lies below, as stat(2) would.
pub fn fuse_mount(mountpoint: &Path) -> Option<Top> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    top_mount(&table, mountpoint).filter(|top| top.kind.starts_with("fuse"))
}

/// What is mounted exactly on a path.
#[derive(Debug, Eq, PartialEq)]
pub struct Top {
    /// Major and minor number, as `8:1`.
    pub device: String,
    kind: String,
    source: String,
}

/// Looks for `path` in the text of `mountinfo` (proc(5)).
fn top_mount(table: &str, path: &Path) -> Option<Top> {
    let mut top = None;
    for line in table.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let mut left = left.split(' ').skip(2);
        let (Some(device), Some(target)) = (left.next(), left.nth(1)) else {
            continue;
        };
        let mut right = right.split(' ');
        if let (Some(kind), Some(source)) = (right.next(), right.next()) {
            if Path::new(&unescape(target)) == path {
                top = Some(Top {
                    device: device.to_owned(),
                    kind: kind.to_owned(),
                    source: unescape(source),
                });
            }
        }
    }
    top
}

/// Undoes the octal escapes of `mountinfo`.
fn unescape(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = text.get(at + 1..at + 4);
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if bytes[at] == b'\\' => {
                out.push(byte);
                at += 4;
            }
            _ => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn look(path: &Path) -> Result<Option<Metadata>, PlaceError> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => Err(PlaceError::DeadMount {
            path: path.to_owned(),
        }),
        Err(source) => Err(PlaceError::Look {
            path: path.to_owned(),
            source,
        }),
    }
}

fn absolute(path: &Path) -> Result<PathBuf, PlaceError> {
    path.canonicalize().map_err(|source| PlaceError::Look {
        path: path.to_owned(),
        source,
    })
}

fn no_image(path: &Path) -> PlaceError {
    let path = path.to_owned();
    PlaceError::NoImage { path }
}

fn no_mountpoint(path: &Path) -> PlaceError {
    let path = path.to_owned();
    PlaceError::NoMountpoint { path }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_is_the_mountpoint() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("img");
        std::fs::write(&image, "").unwrap();
        for (first, second) in [(dir.path(), image.as_path()), (&image, dir.path())] {
            let places = find(first, second).unwrap();
            assert!(places.mountpoint.is_dir());
            assert!(places.image.is_file());
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (file, none) = (dir.path().join("file"), dir.path().join("none"));
        std::fs::write(&file, "").unwrap();
        let error = |a: &Path, b: &Path| find(a, b).unwrap_err();
        assert!(matches!(
            error(dir.path(), dir.path()),
            PlaceError::BothDirectories { .. }
        ));
        assert!(matches!(
            error(&file, &file),
            PlaceError::NoDirectory { .. }
        ));
        assert!(matches!(
            error(dir.path(), &none),
            PlaceError::NoImage { .. }
        ));
        assert!(matches!(
            error(&none, &file),
            PlaceError::NoMountpoint { .. }
        ));
        assert!(matches!(
            error(&none, &none),
            PlaceError::NoMountpoint { .. }
        ));
    }

    #[test]
    fn the_mount_on_top_counts() {
        let table = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
            30 22 0:30 / /a\\040b rw shared:1 - fuse.fusefs-stack /x\\040y.img rw,user_id=0\n";
        let top = |path: &str| top_mount(table, Path::new(path));
        let ours = Some(Top {
            device: "0:30".to_owned(),
            kind: "fuse.fusefs-stack".to_owned(),
            source: "/x y.img".to_owned(),
        });
        assert_eq!(top("/a b"), ours);
        assert_eq!(top("/a"), None);
    }
}
