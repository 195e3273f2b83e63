//! Listing a directory from a cookie on.
//!
//! A cookie says where to go on; 0 is the start. It must keep its meaning while names come and
//! go, and while a one-block directory turns into an indexed one:
//!
//! - Linear directories are listed by position, and the cookie is a byte offset: an entry never
//!   moves. An offset into the middle of an entry (its own was removed) means the next one.
//! - Directories that are indexed, or may become so, are listed by hash, which a name keeps
//!   wherever it is moved. Cookie 1 is behind ".", cookie 2 behind "..", and `2 + position` goes
//!   on at `position`: 60 bits of hash, then 3 bits to count names with the very same 60 bits.

use std::cmp::Ordering;

use crate::dir::store::Store;
use crate::dir::tree::{self, Tree, TreeError};
use crate::dir::{Emit, Entry, FileType, names};
use crate::format::dirent;
use crate::format::htree::{HashKind, Hasher};

/// Offsets of directories are signed in many programs.
const MAX_COOKIE: u64 = u64::MAX >> 1;
const BEHIND_DOT: u64 = 1;
const BEHIND_DOTDOT: u64 = 2;
/// Bits of a position that count names with equal keys.
const RANK_BITS: u32 = 3;
const MAX_RANK: u64 = (1 << RANK_BITS) - 1;
/// Bits of the minor hash in a key; the major has 31.
const MINOR_BITS: u32 = 29;

/// Orders the names of a directory: 60 bits.
fn key_of(hasher: &Hasher, name: &[u8]) -> u64 {
    let mut hash = hasher.hash(name);
    if hasher.kind == HashKind::Legacy {
        // That function has no minor hash, and in 31 bits names of a large directory collide.
        hash.minor = Hasher {
            kind: HashKind::HalfMd4,
            ..*hasher
        }
        .hash(name)
        .minor;
    }
    key_from(hash.major, u64::from(hash.minor >> (32 - MINOR_BITS)))
}

fn key_from(major: u32, minor: u64) -> u64 {
    (u64::from(major >> 1) << MINOR_BITS) | minor
}

/// Lists names from `cookie` on until `emit` has enough or there are no more.
///
/// # Errors
/// A block cannot be read or is damaged; names before it were emitted.
pub(crate) fn list<S: Store>(
    store: &S,
    cookie: u64,
    emit: &mut dyn FnMut(&Entry<'_>) -> Emit,
) -> Result<(), S::Error> {
    let config = store.config();
    if !config.dir_index {
        return list_linear(store, cookie, emit);
    }
    if store.indexed() {
        return match tree::open(store) {
            Ok(tree) => list_hashed(store, &tree.hasher, Some(&tree), cookie, emit),
            Err(TreeError::Store(error)) => Err(error),
            Err(TreeError::Index { what, lblk }) => {
                store.warn(what, lblk);
                list_linear(store, cookie, emit)
            }
        };
    }
    match config.default_hash {
        Some(hash) if store.blocks() == 1 => {
            list_hashed(store, &config.hasher(hash), None, cookie, emit)
        }
        _ => list_linear(store, cookie, emit),
    }
}

fn list_linear<S: Store>(
    store: &S,
    cookie: u64,
    emit: &mut dyn FnMut(&Entry<'_>) -> Emit,
) -> Result<(), S::Error> {
    let size = store.config().layout.block_size as u64;
    let first = u32::try_from(cookie / size).unwrap_or(u32::MAX);
    let mut scratch = Scratch::default();
    for lblk in first..store.blocks() {
        names::read_ahead(store, lblk);
        let block = store.read(lblk)?;
        let start = u64::from(lblk) * size;
        scratch.clear();
        // Copied out: the receiver may take locks that come before the one on the content.
        names::any_in_block(store, lblk, &block, |e| {
            if start + e.offset as u64 >= cookie {
                scratch.push(start + (e.offset + e.rec_len) as u64, e);
            }
            false
        })?;
        drop(block);
        for item in &scratch.items {
            if emit(&scratch.entry(item, item.key)) == Emit::Full {
                return Ok(());
            }
        }
    }
    Ok(())
}

fn list_hashed<S: Store>(
    store: &S,
    hasher: &Hasher,
    tree: Option<&Tree<S::Block>>,
    cookie: u64,
    emit: &mut dyn FnMut(&Entry<'_>) -> Emit,
) -> Result<(), S::Error> {
    if cookie < BEHIND_DOTDOT {
        // The leaves come in the order of hashes, so at best all of a small directory is there.
        names::read_ahead(store, 0);
        let first = store.read(0)?;
        let dots = names::dots(store, &first)?;
        drop(first);
        let ftype = if store.config().layout.filetype {
            FileType::Directory
        } else {
            FileType::Unknown
        };
        let both = [
            Entry {
                ino: dots.this,
                ftype,
                name: b".",
                next_cookie: BEHIND_DOT,
            },
            Entry {
                ino: dots.parent,
                ftype,
                name: b"..",
                next_cookie: BEHIND_DOTDOT,
            },
        ];
        for entry in both.iter().filter(|e| e.next_cookie > cookie) {
            if emit(entry) == Emit::Full {
                return Ok(());
            }
        }
    }
    let position = cookie.saturating_sub(BEHIND_DOTDOT);
    let mut scratch = Scratch::default();
    let Some(tree) = tree else {
        scratch.collect(store, 0, hasher, 0, u64::MAX)?;
        scratch.emit_from(position, emit);
        return Ok(());
    };
    let major = (position >> (RANK_BITS + MINOR_BITS)).min(u64::from(u32::MAX >> 1));
    let major = u32::try_from(major).unwrap_or(u32::MAX >> 1) << 1;
    match list_tree(store, tree, major, position, &mut scratch, emit) {
        Ok(()) => Ok(()),
        Err(e) => Err(e.report(store)),
    }
}

fn list_tree<S: Store>(
    store: &S,
    tree: &Tree<S::Block>,
    major: u32,
    position: u64,
    scratch: &mut Scratch,
    emit: &mut dyn FnMut(&Entry<'_>) -> Emit,
) -> Result<(), TreeError<S::Error>> {
    let mut path = tree.descend(store, major)?;
    let mut least = key_from(path.leaf_hash(store)?, 0);
    loop {
        // Names of one hash are sorted together, so leaves that continue each other are one.
        scratch.clear();
        let next = loop {
            let next = path.next_hash(store)?;
            let most = match next {
                Some(next) if next & 1 == 1 => key_from(next, (1 << MINOR_BITS) - 1),
                Some(next) => key_from(next, 0).saturating_sub(1),
                None => u64::MAX,
            };
            let collected = scratch.collect(store, path.leaf(), &tree.hasher, least, most);
            collected.map_err(TreeError::Store)?;
            match next {
                Some(next) if next & 1 == 1 => {
                    path.advance(store)?;
                }
                _ => break next,
            }
        };
        if scratch.emit_from(position, emit) == Emit::Full {
            return Ok(());
        }
        match next {
            Some(next) if path.advance(store)? => least = least.max(key_from(next, 0)),
            _ => return Ok(()),
        }
    }
}

/// Names copied out of blocks, to be sorted.
#[derive(Default)]
struct Scratch {
    items: Vec<Item>,
    names: Vec<u8>,
}

#[derive(Clone, Copy)]
struct Item {
    /// The hash key, or the next offset in a linear directory.
    key: u64,
    ino: u32,
    ftype: u8,
    start: usize,
    len: usize,
}

impl Scratch {
    fn clear(&mut self) {
        self.items.clear();
        self.names.clear();
    }

    fn push(&mut self, key: u64, e: &dirent::Dirent<'_>) {
        let (start, len) = (self.names.len(), e.name.len());
        self.names.extend_from_slice(e.name);
        self.items.push(Item {
            key,
            ino: e.ino,
            ftype: e.ftype,
            start,
            len,
        });
    }

    fn name(&self, item: &Item) -> &[u8] {
        &self.names[item.start..item.start + item.len]
    }

    fn entry<'a>(&'a self, item: &Item, next_cookie: u64) -> Entry<'a> {
        Entry {
            ino: item.ino,
            ftype: FileType::from_raw(item.ftype),
            name: self.name(item),
            next_cookie,
        }
    }

    /// Adds the names of a leaf. Keys outside the leaf's range can only be found in a damaged
    /// tree; they are moved to its bounds, so that a listing never goes back.
    fn collect<S: Store>(
        &mut self,
        store: &S,
        lblk: u32,
        hasher: &Hasher,
        least: u64,
        most: u64,
    ) -> Result<(), S::Error> {
        let block = store.read(lblk)?;
        names::any_in_block(store, lblk, &block, |e| {
            if lblk != 0 || (e.name != b"." && e.name != b"..") {
                self.push(key_of(hasher, e.name).min(most).max(least), e);
            }
            false
        })?;
        Ok(())
    }

    /// Sorts, and emits what is not before `position`.
    fn emit_from(&mut self, position: u64, emit: &mut dyn FnMut(&Entry<'_>) -> Emit) -> Emit {
        let names = &self.names;
        let name = |i: &Item| &names[i.start..i.start + i.len];
        self.items.sort_unstable_by(|a, b| match a.key.cmp(&b.key) {
            Ordering::Equal => name(a).cmp(name(b)),
            other => other,
        });
        let mut rank = 0;
        for (i, item) in self.items.iter().enumerate() {
            let at = (item.key << RANK_BITS) | rank;
            let next = self.items.get(i + 1);
            // More than 8 names with the same 60 bits do not happen by chance.
            let same = rank < MAX_RANK && next.is_some_and(|next| next.key == item.key);
            rank = if same { rank + 1 } else { 0 };
            let behind = if same {
                at + 1
            } else {
                (item.key + 1) << RANK_BITS
            };
            if at < position {
                continue;
            }
            let next_cookie = (behind + BEHIND_DOTDOT).min(MAX_COOKIE);
            if emit(&self.entry(item, next_cookie)) == Emit::Full {
                return Emit::Full;
            }
        }
        Emit::More
    }
}
