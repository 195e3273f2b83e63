//! What the mounted file system can do, found out by trying.
//!
//! A run uses only what works, so that an errno during the run is never explained away; what does
//! not work is printed, and `--require` turns it into a failure.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{RenameFlags, SeekFrom};

use super::acl::{self, Acl};
use super::effect::{Falloc, NewNode};
use super::error::{Context, Result};
use super::sys;
use super::text::Words;

/// Everything that a file system may lack, by its word.
pub const KNOWN: [&str; 20] = [
    "time-ns",
    "time-wide",
    "xattr",
    "acl",
    "direct",
    "noreplace",
    "exchange",
    "char",
    "chown",
    "copy-range",
    "seek-hole",
    "tmpfile",
    "alloc",
    "alloc-keep",
    "punch",
    "zero",
    "zero-keep",
    "collapse",
    "insert",
    "long-symlink",
];

/// What the file system can do.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Caps {
    words: BTreeSet<String>,
    /// Alignment of collapse and insert.
    pub shift_align: u64,
    /// Length of the longest symbolic link.
    pub symlink_max: u64,
}

impl Caps {
    /// Tells whether the file system has what `word` names.
    pub fn has(&self, word: &str) -> bool {
        self.words.contains(word)
    }

    /// Takes an ability out.
    pub fn remove(&mut self, word: &str) {
        self.words.remove(word);
    }

    /// Returns what is missing.
    pub fn missing(&self) -> Vec<&'static str> {
        KNOWN.into_iter().filter(|word| !self.has(word)).collect()
    }

    /// Reads the words that `Display` wrote.
    pub fn from_text(text: &str) -> std::result::Result<Self, String> {
        let mut words = Words::new(text);
        let shift_align = words.num("alignment")?;
        let symlink_max = words.num("link length")?;
        let list = words.word("list")?;
        let words = list.split(',').map(str::to_owned).collect();
        Ok(Self {
            words,
            shift_align,
            symlink_max,
        })
    }

    /// Tries everything in `dir`.
    ///
    /// # Errors
    ///
    /// Fails when even plain files cannot be made there.
    pub fn probe(dir: &Path) -> Result<Self> {
        let mut caps = Self {
            words: BTreeSet::new(),
            shift_align: 0,
            symlink_max: 0,
        };
        let path = dir.join("probe");
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .call("create", &path)?;
        let block = vec![0xa5_u8; 1 << 20];
        for index in 0..4 {
            file.write_all_at(&block, index << 20)
                .call("write", &path)?;
        }
        caps.probe_attributes(&path);
        caps.probe_data(&path, &file);
        caps.probe_names(dir, &path);
        std::fs::remove_file(&path).call("unlink", &path)?;
        Ok(caps)
    }

    fn note<T>(&mut self, word: &str, result: io::Result<T>) {
        match result {
            Ok(_) => {
                self.words.insert(word.to_owned());
            }
            Err(error) => log::debug!("{word}: {error}"),
        }
    }

    fn probe_attributes(&mut self, path: &Path) {
        let times = |sec, nsec| {
            sys::utimes(path, sec, nsec)?;
            let read = sys::mtime(&path.symlink_metadata()?);
            check(read == (sec, nsec), || {
                format!("{sec}.{nsec} became {read:?}")
            })
        };
        self.note("time-ns", times(1_234_567_890, 123_456_789));
        self.note(
            "time-wide",
            times(6_000_000_000, 1).and_then(|()| times(-1_000_000_000, 1)),
        );
        self.note("xattr", sys::set_xattr(path, "user.probe", b"value"));
        let acl = Acl {
            user: 6,
            named: 4711,
            named_perm: 4,
            group: 4,
            mask: 4,
            other: 4,
        };
        self.note("acl", sys::set_xattr(path, acl::ACCESS, &acl.to_xattr()));
        self.note(
            "chown",
            std::os::unix::fs::lchown(path, Some(4711), Some(4712)),
        );
    }

    fn probe_data(&mut self, path: &Path, file: &File) {
        let direct = || {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_DIRECT)
                .open(path)?;
            let mut buf = sys::AlignedBuf::new(4096);
            file.write_at(buf.bytes(), 0)?;
            file.read_at(buf.bytes(), 0)
        };
        self.note("direct", direct());
        let (_, copied) = sys::copy_range(file, 0, file, 3 << 20, 4096);
        self.note("copy-range", copied);
        for mode in [
            Falloc::Alloc,
            Falloc::AllocKeep,
            Falloc::Zero,
            Falloc::ZeroKeep,
        ] {
            self.note(mode.word(), sys::fallocate(file, mode, 0, 4096));
        }
        self.note(
            Falloc::Punch.word(),
            sys::fallocate(file, Falloc::Punch, 0, 1 << 20),
        );
        let hole = rustix::fs::seek(file, SeekFrom::Hole(0)).map_err(io::Error::from);
        self.note(
            "seek-hole",
            hole.and_then(|at| check(at == 0, || format!("hole at {at}"))),
        );
        // The step is a cluster where the file system has those.
        self.shift_align = 1024;
        while self.shift_align < 1 << 20 {
            match sys::fallocate(file, Falloc::Insert, self.shift_align, self.shift_align) {
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => self.shift_align *= 2,
                _ => break,
            }
        }
        for mode in [Falloc::Insert, Falloc::Collapse] {
            self.note(mode.word(), sys::fallocate(file, mode, 0, self.shift_align));
        }
    }

    fn probe_names(&mut self, dir: &Path, path: &Path) {
        let other = dir.join("probe2");
        let made = sys::rename(path, &other, RenameFlags::NOREPLACE)
            .and_then(|()| std::fs::rename(&other, path));
        self.note("noreplace", made);
        let exchanged =
            File::create(&other).and_then(|_| sys::rename(path, &other, RenameFlags::EXCHANGE));
        if exchanged.is_ok() {
            self.note("exchange", std::fs::rename(&other, path));
        } else {
            self.note("exchange", exchanged);
            remove(&other);
        }
        self.note("char", sys::mknod(&other, &NewNode::Char(5, 70_000), 0o600));
        remove(&other);
        for len in [3000, 2047, 1023, 255] {
            let made = std::os::unix::fs::symlink("t".repeat(len), &other);
            if made.is_ok() {
                self.symlink_max = len as u64;
                remove(&other);
                break;
            }
        }
        self.note(
            "long-symlink",
            check(self.symlink_max >= 1023, || "too short".to_owned()),
        );
        let tmpfile = || {
            let file = OpenOptions::new()
                .write(true)
                .custom_flags(libc::O_TMPFILE)
                .mode(0o600)
                .open(dir)?;
            link_tmpfile(&file, &other)?;
            check(file.metadata()?.nlink() == 1, || "link count".to_owned())
        };
        self.note("tmpfile", tmpfile());
        remove(&other);
    }
}

impl fmt::Display for Caps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list: Vec<&str> = self.words.iter().map(String::as_str).collect();
        write!(
            f,
            "{} {} {}",
            self.shift_align,
            self.symlink_max,
            list.join(",")
        )
    }
}

/// Gives a file that was opened with `O_TMPFILE` its first name.
pub fn link_tmpfile(file: &File, path: &Path) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let from = format!("/proc/self/fd/{}", file.as_raw_fd());
    let cwd = rustix::fs::CWD;
    Ok(rustix::fs::linkat(
        cwd,
        from,
        cwd,
        path,
        rustix::fs::AtFlags::SYMLINK_FOLLOW,
    )?)
}

/// Checks the words of `--require`.
pub fn parse_required(list: &str) -> std::result::Result<Vec<&'static str>, String> {
    let find = |word: &str| {
        let known = KNOWN.into_iter().find(|known| *known == word);
        known.ok_or_else(|| format!("{word:?} is none of {}", KNOWN.join(",")))
    };
    list.split(',')
        .filter(|word| !word.is_empty())
        .map(find)
        .collect()
}

fn check(good: bool, text: impl FnOnce() -> String) -> io::Result<()> {
    if good {
        Ok(())
    } else {
        Err(io::Error::other(text()))
    }
}

fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        log::debug!("{}: {error}", path.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_survive_the_command_line() {
        let words = ["xattr", "acl"].map(str::to_owned).into();
        let caps = Caps {
            words,
            shift_align: 4096,
            symlink_max: 1023,
        };
        assert_eq!(Caps::from_text(&caps.to_string()), Ok(caps));
    }
}
