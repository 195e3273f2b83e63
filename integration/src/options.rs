//! The words after `-o`.

use std::path::PathBuf;

use fs::MountOptions;
use fs::options::{Atime, DataMode, OnError};

/// Metadata cache sizes that are taken.
const CACHE_BYTES: std::ops::RangeInclusive<u64> = 1 << 20..=64 << 30;

/// Options that other drivers know and that change nothing here.
const IGNORED: &[&str] = &[
    "async",
    "auto",
    "auto_da_alloc",
    "block_validity",
    "bsddf",
    "defaults",
    "delalloc",
    "diratime",
    "dioread_lock",
    "dioread_nolock",
    "i_version",
    "init_itable",
    "iversion",
    "journal_checksum",
    "kernel_cache",
    "large_read",
    "loop",
    "_netdev",
    "noauto",
    "noauto_da_alloc",
    "noblock_validity",
    "nodelalloc",
    "nodiratime",
    "nofail",
    "nojournal_checksum",
    "nogrpid",
    "noinit_itable",
    "noiversion",
    "nomand",
    "noquota",
    "nouser",
    "owner",
    "silent",
    "sysvgroups",
    "user",
    "users",
    "group",
];

/// Options with a value that change nothing here.
const IGNORED_WITH_VALUE: &[&str] = &[
    "comment",
    // No block is named before its data is on disk: there is nothing to abort for.
    "data_err",
    "helper",
    "inode_readahead_blks",
    "journal_ioprio",
    "max_batch_time",
    "mb_optimize_scan",
    "min_batch_time",
    "prefetch_block_bitmaps",
    "stripe",
];

/// Options that mean something which this version cannot do.
const REFUSED: &[(&str, &str)] = &[
    ("abort", "not supported"),
    ("auto_unmount", "not supported"),
    ("dax", "a file system in user space has no DAX"),
    ("grpid", "not supported"),
    ("bsdgroups", "not supported"),
    ("inlinecrypt", "encryption is not supported"),
    ("journal_async_commit", "not supported"),
    ("journal_dev", "an external journal is not supported"),
    ("journal_path", "an external journal is not supported"),
    ("jqfmt", "quota is not supported"),
    ("minixdf", "not supported"),
    ("nouid32", "not supported"),
    ("prjquota", "quota is not supported"),
    ("quota", "quota is not supported"),
    ("usrquota", "quota is not supported"),
    ("grpquota", "quota is not supported"),
    ("usrjquota", "quota is not supported"),
    ("grpjquota", "quota is not supported"),
    ("remount", "not supported: unmount and mount again"),
    ("resuid", "not supported"),
    ("resgid", "not supported"),
    (
        "sb",
        "a backup superblock cannot be chosen; run e2fsck -b first",
    ),
    ("test_dummy_encryption", "encryption is not supported"),
];

/// What is wrong with an option.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum OptionError {
    /// Nobody knows it.
    #[error("-o {name}: unknown option (see fusefs-stack --help)")]
    Unknown {
        /// As given.
        name: String,
    },
    /// It is known elsewhere.
    #[error("-o {name}: {why}")]
    Refused {
        /// As given.
        name: String,
        /// Why it is not taken.
        why: &'static str,
    },
    /// Its value is wrong.
    #[error("-o {name}={value}: not {want}")]
    Value {
        /// The option.
        name: &'static str,
        /// As given.
        value: String,
        /// What would be right.
        want: &'static str,
    },
    /// It stands without a value.
    #[error("-o {name}: needs a value")]
    NoValue {
        /// The option.
        name: String,
    },
    /// Two options that exclude each other.
    #[error("-o {name}: {why}")]
    Conflict {
        /// The option.
        name: &'static str,
        /// What it does not go with.
        why: &'static str,
    },
}

/// All options; `None` where the default depends on who mounts.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// For the file system.
    pub fs: MountOptions,
    /// Where in the image it starts, in bytes.
    pub offset: u64,
    /// Other users may look.
    pub allow_other: Option<bool>,
    /// Root may look.
    pub allow_root: bool,
    /// Set-user-id bits count.
    pub suid: Option<bool>,
    /// Device nodes are devices.
    pub dev: Option<bool>,
    /// Programs can be run.
    pub exec: Option<bool>,
    /// What `findmnt` shows as source.
    pub fsname: Option<String>,
    /// What `findmnt` shows after `fuse.`.
    pub subtype: Option<String>,
    /// Threads that read requests.
    pub loops: Option<usize>,
    /// Exists as long as the image is in use.
    pub lockfile: Option<PathBuf>,
    /// Where messages go.
    pub logfile: Option<PathBuf>,
}

impl Options {
    /// Takes lists of options in the order given; the last of contradicting ones counts.
    ///
    /// # Errors
    /// The first option that is wrong.
    pub fn parse(lists: &[String]) -> Result<Self, OptionError> {
        let mut options = Self::default();
        for list in lists {
            for word in split(list) {
                options.take(&word)?;
            }
        }
        options.check()?;
        Ok(options)
    }

    fn take(&mut self, word: &str) -> Result<(), OptionError> {
        let (name, value) = match word.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (word, None),
        };
        let taken = match value {
            None => self.take_flag(name),
            Some(value) => self.take_value(name, value)?,
        };
        if taken {
            return Ok(());
        }
        let ignored = match value {
            None => IGNORED.contains(&name),
            Some(_) => IGNORED_WITH_VALUE.contains(&name),
        };
        if ignored || name.starts_with("x-") || name.starts_with("X-") {
            log::debug!("-o {word}: changes nothing here");
            return Ok(());
        }
        if let Some((_, why)) = REFUSED.iter().find(|(refused, _)| *refused == name) {
            let name = word.to_owned();
            return Err(OptionError::Refused { name, why });
        }
        // Only to tell the user more than "unknown".
        if value.is_none() && Self::default().take_value(name, "").is_err() {
            let name = name.to_owned();
            return Err(OptionError::NoValue { name });
        }
        Err(OptionError::Unknown {
            name: word.to_owned(),
        })
    }

    /// Whether the word is an option without value; then it was taken.
    fn take_flag(&mut self, name: &str) -> bool {
        match name {
            "ro" => self.fs.read_only = true,
            "rw" => self.fs.read_only = false,
            "noatime" => self.fs.atime = Atime::Never,
            "relatime" | "atime" | "nostrictatime" => self.fs.atime = Atime::Relative,
            "strictatime" | "norelatime" => self.fs.atime = Atime::Strict,
            "lazytime" => self.fs.lazytime = true,
            "nolazytime" => self.fs.lazytime = false,
            "sync" | "dirsync" => self.fs.sync = true,
            "async" => self.fs.sync = false,
            "noload" | "norecovery" => self.fs.noload = true,
            "acl" => self.fs.acl = true,
            "noacl" => self.fs.acl = false,
            "user_xattr" => self.fs.user_xattr = true,
            "nouser_xattr" => self.fs.user_xattr = false,
            "discard" => self.fs.discard = true,
            "nodiscard" => self.fs.discard = false,
            "barrier" => self.fs.barrier = true,
            "nobarrier" => self.fs.barrier = false,
            "allow_other" => self.allow_other = Some(true),
            "noallow_other" => self.allow_other = Some(false),
            "allow_root" => self.allow_root = true,
            // Always on: the rights of files are checked by the kernel.
            "default_permissions" => {}
            "suid" => self.suid = Some(true),
            "nosuid" => self.suid = Some(false),
            "dev" => self.dev = Some(true),
            "nodev" => self.dev = Some(false),
            "exec" => self.exec = Some(true),
            "noexec" => self.exec = Some(false),
            _ => return false,
        }
        true
    }

    /// Whether the word is an option with a value; then it was taken.
    fn take_value(&mut self, name: &str, value: &str) -> Result<bool, OptionError> {
        match name {
            "offset" => {
                let want = "a number of bytes that is a multiple of 512";
                let bytes = size(value).filter(|bytes| bytes % 512 == 0);
                self.offset = bytes.ok_or_else(|| wrong("offset", value, want))?;
            }
            "commit" => {
                let secs: u32 = number("commit", value, "a number of seconds")?;
                self.fs.commit_secs = if secs == 0 { 5 } else { secs };
            }
            "data" => self.fs.data = Some(data_mode(value)?),
            "errors" => self.fs.errors = Some(on_error(value)?),
            "barrier" => {
                self.fs.barrier = match value {
                    "0" => false,
                    "1" => true,
                    _ => return Err(wrong("barrier", value, "0 or 1")),
                }
            }
            "cache_size" => {
                let bytes = size(value).filter(|bytes| CACHE_BYTES.contains(bytes));
                let bytes = bytes.and_then(|bytes| usize::try_from(bytes).ok());
                let want = "a size of 1m to 64g, like 32m";
                self.fs.cache_bytes = bytes.ok_or_else(|| wrong("cache_size", value, want))?;
            }
            "loops" => {
                let want = "a number of threads, 1 to 64";
                let loops: usize = number("loops", value, want)?;
                if !(1..=64).contains(&loops) {
                    return Err(wrong("loops", value, want));
                }
                self.loops = Some(loops);
            }
            "fsname" => self.fsname = Some(text("fsname", value, "a name")?.to_owned()),
            // Empty: none, for those who want the type "fuse".
            "subtype" => self.subtype = Some(value.to_owned()),
            "lockfile" => self.lockfile = Some(text("lockfile", value, "a path")?.into()),
            "logfile" => self.logfile = Some(text("logfile", value, "a path")?.into()),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn check(&self) -> Result<(), OptionError> {
        if self.fs.noload && !self.fs.read_only {
            return Err(OptionError::Conflict {
                name: "noload",
                why: "only together with ro: writing without replaying the journal destroys",
            });
        }
        if self.allow_root && self.allow_other == Some(true) {
            return Err(OptionError::Conflict {
                name: "allow_root",
                why: "not together with allow_other",
            });
        }
        Ok(())
    }
}

/// Splits at commas; `\,` and `\\` stand for themselves.
fn split(list: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut chars = list.chars();
    while let Some(c) = chars.next() {
        let c = match c {
            ',' => {
                words.push(String::new());
                continue;
            }
            '\\' => chars.next().unwrap_or('\\'),
            _ => c,
        };
        if let Some(last) = words.last_mut() {
            last.push(c);
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

fn wrong(name: &'static str, value: &str, want: &'static str) -> OptionError {
    let value = value.to_owned();
    OptionError::Value { name, value, want }
}

fn number<T: std::str::FromStr>(
    name: &'static str,
    value: &str,
    want: &'static str,
) -> Result<T, OptionError> {
    match value.parse() {
        Ok(number) => Ok(number),
        Err(_) => Err(wrong(name, value, want)),
    }
}

fn text<'a>(
    name: &'static str,
    value: &'a str,
    want: &'static str,
) -> Result<&'a str, OptionError> {
    if value.is_empty() {
        return Err(wrong(name, value, want));
    }
    Ok(value)
}

/// A number with an optional unit of 1024, 1024^2, 1024^3 or 1024^4.
fn size(value: &str) -> Option<u64> {
    let unit = match value.bytes().last()?.to_ascii_lowercase() {
        b'k' => 10,
        b'm' => 20,
        b'g' => 30,
        b't' => 40,
        _ => 0,
    };
    let digits = if unit == 0 {
        value
    } else {
        &value[..value.len() - 1]
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << unit)
}

fn data_mode(value: &str) -> Result<DataMode, OptionError> {
    match value {
        "ordered" => Ok(DataMode::Ordered),
        "journal" => Ok(DataMode::Journal),
        "writeback" => Ok(DataMode::Writeback),
        _ => Err(wrong("data", value, "ordered, journal or writeback")),
    }
}

fn on_error(value: &str) -> Result<OnError, OptionError> {
    match value {
        "continue" => Ok(OnError::Continue),
        "remount-ro" => Ok(OnError::RemountRo),
        "panic" => Ok(OnError::Panic),
        _ => Err(wrong("errors", value, "continue, remount-ro or panic")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(list: &str) -> Result<Options, OptionError> {
        Options::parse(&[list.to_owned()])
    }

    #[test]
    fn known_options_are_taken() {
        let list = "rw,offset=1048576,noatime,sync,commit=30,data=ordered,errors=remount-ro,noacl,\
            nouser_xattr,allow_other,default_permissions,fsname=a\\,b,subtype=s,loops=4,\
            cache_size=64m,discard,barrier=0,suid,nodev,exec,lockfile=/l,logfile=/g";
        let options = parse(list).unwrap();
        assert_eq!(options.offset, 1 << 20);
        assert_eq!(options.fs.atime, Atime::Never);
        assert_eq!(options.fs.commit_secs, 30);
        assert_eq!(options.fs.errors, Some(OnError::RemountRo));
        assert_eq!(options.fs.cache_bytes, 64 << 20);
        assert_eq!(options.fsname.as_deref(), Some("a,b"));
        assert_eq!(options.loops, Some(4));
        assert!(options.fs.sync && options.fs.discard);
        assert!(!options.fs.acl && !options.fs.user_xattr && !options.fs.barrier);
        let access = (options.allow_other, options.suid, options.dev, options.exec);
        assert_eq!(access, (Some(true), Some(true), Some(false), Some(true)));
    }

    #[test]
    fn the_last_of_two_counts() {
        assert!(!parse("ro,rw").unwrap().fs.read_only);
        assert!(parse("rw,ro").unwrap().fs.read_only);
    }

    #[test]
    fn options_without_meaning_are_ignored() {
        parse("defaults,nofail,_netdev,x-systemd.automount,x-gvfs-name=a,nodelalloc,,").unwrap();
        parse("noblock_validity,user,noauto,stripe=4").unwrap();
    }

    #[test]
    fn errors_name_option_and_value() {
        for (list, message) in [
            (
                "fnord",
                "-o fnord: unknown option (see fusefs-stack --help)",
            ),
            ("x=1", "-o x=1: unknown option (see fusefs-stack --help)"),
            ("ro=1", "-o ro=1: unknown option (see fusefs-stack --help)"),
            ("commit", "-o commit: needs a value"),
            ("commit=-1", "-o commit=-1: not a number of seconds"),
            (
                "offset=100",
                "-o offset=100: not a number of bytes that is a multiple of 512",
            ),
            ("data=x", "-o data=x: not ordered, journal or writeback"),
            ("errors=x", "-o errors=x: not continue, remount-ro or panic"),
            (
                "cache_size=1",
                "-o cache_size=1: not a size of 1m to 64g, like 32m",
            ),
            ("loops=0", "-o loops=0: not a number of threads, 1 to 64"),
            (
                "remount,ro",
                "-o remount: not supported: unmount and mount again",
            ),
            ("lockfile=", "-o lockfile=: not a path"),
        ] {
            assert_eq!(parse(list).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn noload_needs_ro() {
        assert!(matches!(parse("noload"), Err(OptionError::Conflict { .. })));
        assert!(parse("norecovery,ro").unwrap().fs.noload);
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("512"), Some(512));
        assert_eq!(size("4K"), Some(4096));
        assert_eq!(size("1t"), Some(1 << 40));
        assert_eq!(size("k"), None);
        assert_eq!(size(""), None);
        assert_eq!(size("99999999999t"), None);
    }
}
