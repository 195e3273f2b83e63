//! One change of the file system, as the model applies it and the log records it.

use std::fmt;

use super::acl::Acl;
use super::text::{Words, escape};

/// Identifies an inode within one worker; never reused, unlike inode numbers.
pub type Id = u64;
/// A file name.
pub type Name = Vec<u8>;

/// A directory entry by its place.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Place {
    /// The directory.
    pub parent: Id,
    /// The name in it.
    pub name: Name,
}

/// What kind of object a creation makes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum NewNode {
    /// An empty regular file.
    File,
    /// An empty directory.
    Dir,
    /// A symbolic link with its target.
    Symlink(Vec<u8>),
    /// A FIFO.
    Fifo,
    /// A socket.
    Socket,
    /// A character device with major and minor number.
    Char(u32, u32),
}

/// The modes of `fallocate`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Falloc {
    /// Allocate; the file grows.
    Alloc,
    /// Allocate; the size stays.
    AllocKeep,
    /// Give space back.
    Punch,
    /// Make zeros; the file grows.
    Zero,
    /// Make zeros; the size stays.
    ZeroKeep,
    /// Take the range out of the file.
    Collapse,
    /// Put a hole into the file.
    Insert,
}

impl Falloc {
    /// All modes, in the order of the capability bits.
    pub const ALL: [Self; 7] = [
        Self::Alloc,
        Self::AllocKeep,
        Self::Punch,
        Self::Zero,
        Self::ZeroKeep,
        Self::Collapse,
        Self::Insert,
    ];

    /// Returns the word of the log.
    pub fn word(self) -> &'static str {
        match self {
            Self::Alloc => "alloc",
            Self::AllocKeep => "alloc-keep",
            Self::Punch => "punch",
            Self::Zero => "zero",
            Self::ZeroKeep => "zero-keep",
            Self::Collapse => "collapse",
            Self::Insert => "insert",
        }
    }
}

/// One change.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Effect {
    /// A new object with a new entry.
    Create {
        at: Place,
        id: Id,
        mode: u32,
        node: NewNode,
    },
    /// A new file without an entry (`O_TMPFILE`).
    Tmpfile { parent: Id, id: Id, mode: u32 },
    /// One more entry for an object.
    Link { at: Place, id: Id },
    /// An entry goes: unlink or rmdir.
    Remove { at: Place },
    /// An entry moves over `to`, or both change places.
    Rename {
        from: Place,
        to: Place,
        exchange: bool,
    },
    /// `len` bytes of `stamp`.
    Write {
        id: Id,
        off: u64,
        len: u64,
        stamp: u64,
    },
    /// `copy_file_range`.
    Copy {
        src: Id,
        src_off: u64,
        id: Id,
        off: u64,
        len: u64,
    },
    /// A new size.
    Truncate { id: Id, size: u64 },
    /// `fallocate`.
    Fallocate {
        id: Id,
        mode: Falloc,
        off: u64,
        len: u64,
    },
    /// New permission bits.
    Chmod { id: Id, mode: u32 },
    /// New owners.
    Chown { id: Id, uid: u32, gid: u32 },
    /// A new modification time.
    Utimes { id: Id, sec: i64, nsec: u32 },
    /// A user attribute; the value is the first `len` bytes of `stamp`.
    SetXattr {
        id: Id,
        name: String,
        stamp: u64,
        len: u64,
    },
    /// A user attribute goes.
    DelXattr { id: Id, name: String },
    /// A new ACL, or none.
    SetAcl {
        id: Id,
        default: bool,
        acl: Option<Acl>,
    },
    /// `fsync`, or `fdatasync` when `data` is set.
    Sync { id: Id, data: bool },
    /// `syncfs`.
    SyncFs,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.parent, escape(&self.name))
    }
}

impl Place {
    fn from_words(words: &mut Words<'_>) -> Result<Self, String> {
        Ok(Self {
            parent: words.num("parent")?,
            name: words.bytes("name")?,
        })
    }
}

impl fmt::Display for NewNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File => f.write_str("file"),
            Self::Dir => f.write_str("dir"),
            Self::Symlink(target) => write!(f, "symlink {}", escape(target)),
            Self::Fifo => f.write_str("fifo"),
            Self::Socket => f.write_str("socket"),
            Self::Char(major, minor) => write!(f, "char {major} {minor}"),
        }
    }
}

impl NewNode {
    /// Reads the words that `Display` wrote.
    pub fn from_words(words: &mut Words<'_>) -> Result<Self, String> {
        Ok(match words.word("kind")? {
            "file" => Self::File,
            "dir" => Self::Dir,
            "symlink" => Self::Symlink(words.bytes("target")?),
            "fifo" => Self::Fifo,
            "socket" => Self::Socket,
            "char" => Self::Char(words.num("major")?, words.num("minor")?),
            other => return Err(format!("unknown kind {other:?}")),
        })
    }
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Create { at, id, mode, node } => write!(f, "create {at} {id} {mode:o} {node}"),
            Self::Tmpfile { parent, id, mode } => write!(f, "tmpfile {parent} {id} {mode:o}"),
            Self::Link { at, id } => write!(f, "link {at} {id}"),
            Self::Remove { at } => write!(f, "remove {at}"),
            Self::Rename { from, to, exchange } => {
                write!(f, "rename {from} {to} {}", u8::from(*exchange))
            }
            Self::Write {
                id,
                off,
                len,
                stamp,
            } => write!(f, "write {id} {off} {len} {stamp}"),
            Self::Copy {
                src,
                src_off,
                id,
                off,
                len,
            } => {
                write!(f, "copy {src} {src_off} {id} {off} {len}")
            }
            Self::Truncate { id, size } => write!(f, "truncate {id} {size}"),
            Self::Fallocate { id, mode, off, len } => {
                write!(f, "fallocate {id} {} {off} {len}", mode.word())
            }
            Self::Chmod { id, mode } => write!(f, "chmod {id} {mode:o}"),
            Self::Chown { id, uid, gid } => write!(f, "chown {id} {uid} {gid}"),
            Self::Utimes { id, sec, nsec } => write!(f, "utimes {id} {sec} {nsec}"),
            Self::SetXattr {
                id,
                name,
                stamp,
                len,
            } => {
                write!(f, "setxattr {id} {} {stamp} {len}", escape(name.as_bytes()))
            }
            Self::DelXattr { id, name } => write!(f, "delxattr {id} {}", escape(name.as_bytes())),
            Self::SetAcl { id, default, acl } => {
                write!(f, "setacl {id} {}", u8::from(*default))?;
                acl.map_or(Ok(()), |acl| write!(f, " {}", acl.to_words()))
            }
            Self::Sync { id, data } => write!(f, "sync {id} {}", u8::from(*data)),
            Self::SyncFs => f.write_str("syncfs"),
        }
    }
}

impl Effect {
    /// Reads the words that `Display` wrote.
    pub fn from_words(mut words: Words<'_>) -> Result<Self, String> {
        let w = &mut words;
        Ok(match w.word("effect")? {
            "create" => Self::Create {
                at: Place::from_words(w)?,
                id: w.num("id")?,
                mode: w.octal("mode")?,
                node: NewNode::from_words(w)?,
            },
            "tmpfile" => Self::Tmpfile {
                parent: w.num("parent")?,
                id: w.num("id")?,
                mode: w.octal("mode")?,
            },
            "link" => Self::Link {
                at: Place::from_words(w)?,
                id: w.num("id")?,
            },
            "remove" => Self::Remove {
                at: Place::from_words(w)?,
            },
            "rename" => Self::Rename {
                from: Place::from_words(w)?,
                to: Place::from_words(w)?,
                exchange: w.num::<u8>("exchange")? != 0,
            },
            "write" => Self::Write {
                id: w.num("id")?,
                off: w.num("offset")?,
                len: w.num("length")?,
                stamp: w.num("stamp")?,
            },
            "copy" => Self::Copy {
                src: w.num("source")?,
                src_off: w.num("source offset")?,
                id: w.num("id")?,
                off: w.num("offset")?,
                len: w.num("length")?,
            },
            "truncate" => Self::Truncate {
                id: w.num("id")?,
                size: w.num("size")?,
            },
            "fallocate" => Self::Fallocate {
                id: w.num("id")?,
                mode: falloc(w.word("mode")?)?,
                off: w.num("offset")?,
                len: w.num("length")?,
            },
            "chmod" => Self::Chmod {
                id: w.num("id")?,
                mode: w.octal("mode")?,
            },
            "chown" => Self::Chown {
                id: w.num("id")?,
                uid: w.num("uid")?,
                gid: w.num("gid")?,
            },
            "utimes" => Self::Utimes {
                id: w.num("id")?,
                sec: w.num("seconds")?,
                nsec: w.num("ns")?,
            },
            "setxattr" => Self::SetXattr {
                id: w.num("id")?,
                name: w.string("name")?,
                stamp: w.num("stamp")?,
                len: w.num("length")?,
            },
            "delxattr" => Self::DelXattr {
                id: w.num("id")?,
                name: w.string("name")?,
            },
            "setacl" => {
                let (id, default) = (w.num("id")?, w.num::<u8>("default")? != 0);
                let rest = words.rest();
                let acl = match rest.as_str() {
                    "" => None,
                    rest => Some(Acl::from_words(&mut Words::new(rest))?),
                };
                Self::SetAcl { id, default, acl }
            }
            "sync" => Self::Sync {
                id: w.num("id")?,
                data: w.num::<u8>("data")? != 0,
            },
            "syncfs" => Self::SyncFs,
            other => return Err(format!("unknown effect {other:?}")),
        })
    }
}

fn falloc(word: &str) -> Result<Falloc, String> {
    Falloc::ALL
        .into_iter()
        .find(|mode| mode.word() == word)
        .ok_or_else(|| format!("unknown fallocate mode {word:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_effect_survives_the_log() {
        let at = Place {
            parent: 3,
            name: b"a b%\xff\n".to_vec(),
        };
        let to = Place {
            parent: 4,
            name: b"x".to_vec(),
        };
        let acl = Acl {
            user: 7,
            named: 5,
            named_perm: 6,
            group: 5,
            mask: 4,
            other: 0,
        };
        let node = NewNode::Symlink(b"../t t".to_vec());
        let name = "user.n=1".to_owned();
        let effects = [
            Effect::Create {
                at: at.clone(),
                id: 9,
                mode: 0o644,
                node,
            },
            Effect::Create {
                at: to.clone(),
                id: 9,
                mode: 0o600,
                node: NewNode::Char(5, 70000),
            },
            Effect::Tmpfile {
                parent: 1,
                id: 9,
                mode: 0o600,
            },
            Effect::Link {
                at: at.clone(),
                id: 9,
            },
            Effect::Remove { at: at.clone() },
            Effect::Rename {
                from: at,
                to,
                exchange: true,
            },
            Effect::Write {
                id: 1,
                off: 2,
                len: 3,
                stamp: 4,
            },
            Effect::Copy {
                src: 1,
                src_off: 2,
                id: 3,
                off: 4,
                len: 5,
            },
            Effect::Truncate { id: 1, size: 2 },
            Effect::Fallocate {
                id: 1,
                mode: Falloc::ZeroKeep,
                off: 2,
                len: 3,
            },
            Effect::Chmod {
                id: 1,
                mode: 0o1755,
            },
            Effect::Chown {
                id: 1,
                uid: 2,
                gid: 3,
            },
            Effect::Utimes {
                id: 1,
                sec: -5,
                nsec: 6,
            },
            Effect::SetXattr {
                id: 1,
                name: name.clone(),
                stamp: 2,
                len: 3,
            },
            Effect::DelXattr { id: 1, name },
            Effect::SetAcl {
                id: 1,
                default: true,
                acl: Some(acl),
            },
            Effect::SetAcl {
                id: 1,
                default: false,
                acl: None,
            },
            Effect::Sync { id: 1, data: true },
            Effect::SyncFs,
        ];
        for effect in effects {
            let line = effect.to_string();
            assert_eq!(Effect::from_words(Words::new(&line)), Ok(effect), "{line}");
        }
    }
}
