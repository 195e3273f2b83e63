//! The language of workloads: one operation a line.
//!
//! ```text
//! mkdir A                     write FILE AT LEN         fsync PATH
//! create A/file               dwrite FILE AT LEN        fdatasync PATH
//! symlink TARGET A/name       swrite FILE AT LEN        sync
//! link A/file B/name          mwrite FILE AT LEN        setxattr PATH NAME LEN
//! unlink A/file               truncate FILE SIZE        rmxattr PATH NAME
//! rmdir A                     falloc FILE AT LEN        chmod PATH MODE
//! rename A/file B/name        falloc-keep FILE AT LEN   zero FILE AT LEN
//! exchange A/file B/name      punch FILE AT LEN         zero-keep FILE AT LEN
//! ```
//!
//! `write` goes through the page cache where there is one, `dwrite` past it, `swrite` is a write
//! with `O_SYNC`, `mwrite` one through a mapping (on real mounts only). What is written is made of
//! the number of the operation and the place in the file. Names have no blanks. Empty lines, and
//! those that begin with `#`, are nothing.

use std::fmt;
use std::str::FromStr;

/// How bytes are written.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum How {
    /// As programs do.
    Plain,
    /// `O_DIRECT`.
    Direct,
    /// `O_SYNC`.
    Sync,
    /// Through a shared mapping.
    Mapped,
}

/// What `fallocate` is to do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(missing_docs, reason = "as the flags of fallocate(2)")]
pub enum Falloc {
    Plain,
    KeepSize,
    Punch,
    Zero,
    ZeroKeepSize,
}

/// One operation.
#[derive(Clone, Debug, Eq, PartialEq)]
#[expect(missing_docs, reason = "as the system calls")]
pub enum Op {
    Mkdir(String),
    Create(String),
    Symlink {
        target: String,
        path: String,
    },
    Link {
        from: String,
        to: String,
    },
    Unlink(String),
    Rmdir(String),
    Rename {
        from: String,
        to: String,
    },
    Exchange {
        from: String,
        to: String,
    },
    Write {
        path: String,
        at: u64,
        len: u64,
        how: How,
    },
    Truncate {
        path: String,
        size: u64,
    },
    Falloc {
        path: String,
        at: u64,
        len: u64,
        mode: Falloc,
    },
    SetXattr {
        path: String,
        name: String,
        len: u64,
    },
    RemoveXattr {
        path: String,
        name: String,
    },
    Chmod {
        path: String,
        mode: u16,
    },
    Fsync(String),
    Fdatasync(String),
    Sync,
}

impl Op {
    /// Whether it makes something durable when it returns.
    #[must_use]
    pub fn promises(&self) -> bool {
        let how = match self {
            Self::Write { how, .. } => *how,
            _ => How::Plain,
        };
        how == How::Sync || matches!(self, Self::Fsync(_) | Self::Fdatasync(_) | Self::Sync)
    }

    /// The longest that a file gets, in bytes: what a script asks for is not believed.
    pub const MAX_SIZE: u64 = 16 << 20;
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mkdir(path) => write!(f, "mkdir {path}"),
            Self::Create(path) => write!(f, "create {path}"),
            Self::Symlink { target, path } => write!(f, "symlink {target} {path}"),
            Self::Link { from, to } => write!(f, "link {from} {to}"),
            Self::Unlink(path) => write!(f, "unlink {path}"),
            Self::Rmdir(path) => write!(f, "rmdir {path}"),
            Self::Rename { from, to } => write!(f, "rename {from} {to}"),
            Self::Exchange { from, to } => write!(f, "exchange {from} {to}"),
            Self::Write { path, at, len, how } => {
                let word = match how {
                    How::Plain => "write",
                    How::Direct => "dwrite",
                    How::Sync => "swrite",
                    How::Mapped => "mwrite",
                };
                write!(f, "{word} {path} {at} {len}")
            }
            Self::Truncate { path, size } => write!(f, "truncate {path} {size}"),
            Self::Falloc {
                path,
                at,
                len,
                mode,
            } => {
                let word = match mode {
                    Falloc::Plain => "falloc",
                    Falloc::KeepSize => "falloc-keep",
                    Falloc::Punch => "punch",
                    Falloc::Zero => "zero",
                    Falloc::ZeroKeepSize => "zero-keep",
                };
                write!(f, "{word} {path} {at} {len}")
            }
            Self::SetXattr { path, name, len } => write!(f, "setxattr {path} {name} {len}"),
            Self::RemoveXattr { path, name } => write!(f, "rmxattr {path} {name}"),
            Self::Chmod { path, mode } => write!(f, "chmod {path} {mode:o}"),
            Self::Fsync(path) => write!(f, "fsync {path}"),
            Self::Fdatasync(path) => write!(f, "fdatasync {path}"),
            Self::Sync => write!(f, "sync"),
        }
    }
}

/// What is wrong with a line of a script.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ScriptError {
    /// Nobody knows the operation.
    #[error("{0:?}: no such operation")]
    Unknown(String),
    /// It has other arguments.
    #[error("{line:?}: {want} arguments are needed")]
    Count {
        /// As given.
        line: String,
        /// How many.
        want: usize,
    },
    /// Not a number, or one too large.
    #[error("{0:?}: not a number that files can have here")]
    Number(String),
    /// A path that leaves the directory of the test, or is none.
    #[error("{0:?}: paths are relative, without . and ..")]
    Path(String),
    /// Which line it was.
    #[error("line {number}: {error}")]
    Line {
        /// From 1.
        number: usize,
        /// What is wrong.
        error: Box<Self>,
    },
}

fn number(word: &str) -> Result<u64, ScriptError> {
    match word.parse() {
        Ok(number) if number <= Op::MAX_SIZE / 2 => Ok(number),
        _ => Err(ScriptError::Number(word.to_owned())),
    }
}

fn path(word: &str) -> Result<String, ScriptError> {
    let good = word == "."
        || word
            .split('/')
            .all(|name| !name.is_empty() && name != "." && name != ".." && name.len() <= 255);
    if good && word.len() < 3000 {
        Ok(word.to_owned())
    } else {
        Err(ScriptError::Path(word.to_owned()))
    }
}

impl FromStr for Op {
    type Err = ScriptError;

    fn from_str(line: &str) -> Result<Self, ScriptError> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let Some((&name, args)) = words.split_first() else {
            return Err(ScriptError::Unknown(String::new()));
        };
        let want = match name {
            "sync" => 0,
            "mkdir" | "create" | "unlink" | "rmdir" | "fsync" | "fdatasync" => 1,
            "symlink" | "link" | "rename" | "exchange" | "truncate" | "rmxattr" | "chmod" => 2,
            "write" | "dwrite" | "swrite" | "mwrite" | "falloc" | "falloc-keep" | "punch"
            | "zero" | "zero-keep" | "setxattr" => 3,
            _ => return Err(ScriptError::Unknown(name.to_owned())),
        };
        if args.len() != want {
            let line = line.to_owned();
            return Err(ScriptError::Count { line, want });
        }
        let written = |how| -> Result<Self, ScriptError> {
            let (path, at, len) = (path(args[0])?, number(args[1])?, number(args[2])?);
            Ok(Self::Write { path, at, len, how })
        };
        let falloc = |mode| -> Result<Self, ScriptError> {
            let (path, at, len) = (path(args[0])?, number(args[1])?, number(args[2])?);
            Ok(Self::Falloc {
                path,
                at,
                len,
                mode,
            })
        };
        let two =
            || -> Result<(String, String), ScriptError> { Ok((path(args[0])?, path(args[1])?)) };
        Ok(match name {
            "mkdir" => Self::Mkdir(path(args[0])?),
            "create" => Self::Create(path(args[0])?),
            "unlink" => Self::Unlink(path(args[0])?),
            "rmdir" => Self::Rmdir(path(args[0])?),
            "fsync" => Self::Fsync(path(args[0])?),
            "fdatasync" => Self::Fdatasync(path(args[0])?),
            "symlink" => Self::Symlink {
                target: args[0].to_owned(),
                path: path(args[1])?,
            },
            "link" => {
                let (from, to) = two()?;
                Self::Link { from, to }
            }
            "rename" => {
                let (from, to) = two()?;
                Self::Rename { from, to }
            }
            "exchange" => {
                let (from, to) = two()?;
                Self::Exchange { from, to }
            }
            "truncate" => Self::Truncate {
                path: path(args[0])?,
                size: number(args[1])?,
            },
            "rmxattr" => Self::RemoveXattr {
                path: path(args[0])?,
                name: args[1].to_owned(),
            },
            "chmod" => Self::Chmod {
                path: path(args[0])?,
                mode: u16::from_str_radix(args[1], 8)
                    .ok()
                    .filter(|mode| *mode <= 0o7777)
                    .ok_or_else(|| ScriptError::Number(args[1].to_owned()))?,
            },
            "setxattr" => Self::SetXattr {
                path: path(args[0])?,
                name: args[1].to_owned(),
                len: number(args[2])?,
            },
            "write" => written(How::Plain)?,
            "dwrite" => written(How::Direct)?,
            "swrite" => written(How::Sync)?,
            "mwrite" => written(How::Mapped)?,
            "falloc" => falloc(Falloc::Plain)?,
            "falloc-keep" => falloc(Falloc::KeepSize)?,
            "punch" => falloc(Falloc::Punch)?,
            "zero" => falloc(Falloc::Zero)?,
            "zero-keep" => falloc(Falloc::ZeroKeepSize)?,
            _ => Self::Sync,
        })
    }
}

/// Reads a script.
///
/// # Errors
/// The first line that is wrong.
pub fn parse(text: &str) -> Result<Vec<Op>, ScriptError> {
    let lines = text
        .lines()
        .enumerate()
        .map(|(index, line)| (index + 1, line.trim()));
    let lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|(number, line)| {
            line.parse().map_err(|error| ScriptError::Line {
                number,
                error: Box::new(error),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{Op, ScriptError, parse};

    #[test]
    fn each_operation_is_read_as_it_is_printed() {
        let lines = "mkdir A\ncreate A/f\nsymlink ../x s\nlink A/f g\nunlink g\nrmdir A\n\
            rename A B\nexchange A B\nwrite f 0 4096\ndwrite f 512 512\nswrite f 1 2\n\
            mwrite f 0 1\ntruncate f 7\nfalloc f 0 1\nfalloc-keep f 0 1\npunch f 0 1\nzero f 0 1\n\
            zero-keep f 0 1\nsetxattr f user.a 3\nrmxattr f user.a\nchmod f 640\nfsync .\n\
            fdatasync f\nsync";
        let ops = parse(&format!("# all\n\n{lines}\n")).unwrap();
        let printed: Vec<String> = ops.iter().map(Op::to_string).collect();
        assert_eq!(printed.join("\n"), lines);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, want) in [
            ("jump f", "line 1: \"jump\": no such operation"),
            ("sync\nmkdir", "line 2: \"mkdir\": 1 arguments are needed"),
            (
                "write f 0 99999999999",
                "line 1: \"99999999999\": not a number",
            ),
            ("mkdir ../x", "line 1: \"../x\": paths are relative"),
            ("chmod f 9", "line 1: \"9\": not a number"),
        ] {
            let error: ScriptError = parse(text).unwrap_err();
            assert!(error.to_string().starts_with(want), "{error}");
        }
    }
}
