//! The index of a directory: walking it and growing it.
//!
//! No operation holds the content of two blocks at once: images are made aside and written one
//! by one. What can fail for lack of space comes before the first change, and every step leaves
//! a valid tree, so that an error in the middle of a growth costs nothing.

use smallvec::SmallVec;

use crate::dir::store::{Store, StoreMut};
use crate::format::dirent::{self, needed_len};
use crate::format::htree::{self, DxEdit, DxEntries, DxError, DxKind, HashKind, Hasher};

/// One index block on the way from the root to a leaf.
struct Frame<B> {
    lblk: u32,
    block: B,
    kind: DxKind,
    /// The entry that was followed.
    at: usize,
    full: bool,
}

/// The way from the root to a leaf. At most three blocks: root and two levels of nodes.
pub(crate) struct Path<B> {
    frames: SmallVec<[Frame<B>; 3]>,
    leaf: u32,
    /// Leaves passed so far, to end a walk over a damaged tree.
    steps: u64,
}

/// An index whose root was checked.
pub(crate) struct Tree<B> {
    root: B,
    levels: u8,
    /// Hash function of this directory.
    pub hasher: Hasher,
}

/// Why an index cannot be used.
pub(crate) enum TreeError<E> {
    /// A block could not be read, or a leaf is damaged; the error is final.
    Store(E),
    /// The index is damaged; names may still be found by scanning all blocks.
    Index {
        /// Which check failed.
        what: &'static str,
        /// In which block of the directory.
        lblk: u32,
    },
}

impl<E> TreeError<E> {
    fn index(error: DxError, lblk: u32) -> Self {
        Self::Index {
            what: error.what(),
            lblk,
        }
    }

    /// Makes a final error of it, and reports the damage.
    pub fn report<S: Store<Error = E>>(self, store: &S) -> E {
        match self {
            Self::Store(error) => error,
            Self::Index { what, lblk } => store.corrupt(what, lblk),
        }
    }
}

type TreeResult<T, S> = Result<T, TreeError<<S as Store>::Error>>;

/// Reads the root of an indexed directory.
pub(crate) fn open<S: Store>(store: &S) -> TreeResult<Tree<S::Block>, S> {
    let config = store.config();
    let root = store.read(0).map_err(TreeError::Store)?;
    let info = htree::root_info(&store.bytes(&root), config.layout, config.max_levels)
        .map_err(|e| TreeError::index(e, 0))?;
    Ok(Tree {
        root,
        levels: info.levels,
        hasher: config.hasher(info.hash),
    })
}

impl<B: Clone> Tree<B> {
    /// Walks to the first leaf that may hold names with the hash `major`.
    pub fn descend<S: Store<Block = B>>(&self, store: &S, major: u32) -> TreeResult<Path<B>, S> {
        let mut path = Path {
            frames: SmallVec::new(),
            leaf: 0,
            steps: 0,
        };
        let (leaf, frame) = follow(store, 0, self.root.clone(), DxKind::Root, Some(major))?;
        path.frames.push(frame);
        path.leaf = leaf;
        for _ in 0..self.levels {
            path.push(store, Some(major))?;
        }
        Ok(path)
    }
}

/// Picks the entry of an index block for `major`, or its first; returns where it leads.
fn follow<S: Store>(
    store: &S,
    lblk: u32,
    block: S::Block,
    kind: DxKind,
    major: Option<u32>,
) -> TreeResult<(u32, Frame<S::Block>), S> {
    let (next, at, full) = {
        let bytes = store.bytes(&block);
        let entries = DxEntries::new(&bytes, kind, store.config().layout, store.blocks())
            .map_err(|e| TreeError::index(e, lblk))?;
        let at = major.map_or(0, |major| entries.search(major));
        let next = entries.block(at).map_err(|e| TreeError::index(e, lblk))?;
        (next, at, entries.is_full())
    };
    Ok((
        next,
        Frame {
            lblk,
            block,
            kind,
            at,
            full,
        },
    ))
}

impl<B: Clone> Path<B> {
    /// Returns the leaf the path ends at.
    pub fn leaf(&self) -> u32 {
        self.leaf
    }

    /// Goes one level down.
    fn push<S: Store<Block = B>>(&mut self, store: &S, major: Option<u32>) -> TreeResult<(), S> {
        let lblk = self.leaf;
        let block = store.read(lblk).map_err(TreeError::Store)?;
        let (next, frame) = follow(store, lblk, block, DxKind::Node, major)?;
        self.frames.push(frame);
        self.leaf = next;
        Ok(())
    }

    /// Returns the least hash of the leaf the path ends at, with the bit of continuation.
    pub fn leaf_hash<S: Store<Block = B>>(&self, store: &S) -> TreeResult<u32, S> {
        for frame in self.frames.iter().rev() {
            if frame.at > 0 {
                let bytes = store.bytes(&frame.block);
                return Ok(frame.entries(store, &bytes)?.hash(frame.at));
            }
        }
        Ok(0)
    }

    /// Returns the least hash of the next leaf, with the bit of continuation.
    pub fn next_hash<S: Store<Block = B>>(&self, store: &S) -> TreeResult<Option<u32>, S> {
        for frame in self.frames.iter().rev() {
            let bytes = store.bytes(&frame.block);
            let entries = frame.entries(store, &bytes)?;
            if frame.at + 1 < entries.len() {
                return Ok(Some(entries.hash(frame.at + 1)));
            }
        }
        Ok(None)
    }

    /// Moves on to the next leaf; false at the last one, where the path then stays.
    pub fn advance<S: Store<Block = B>>(&mut self, store: &S) -> TreeResult<bool, S> {
        // A sound tree leads to each block once.
        self.steps += 1;
        if self.steps > u64::from(store.blocks()) {
            return Err(TreeError::Index {
                what: "directory index: a loop",
                lblk: self.leaf,
            });
        }
        let depth = self.frames.len();
        let mut turn = None;
        for (level, frame) in self.frames.iter().enumerate().rev() {
            let bytes = store.bytes(&frame.block);
            let entries = frame.entries(store, &bytes)?;
            if frame.at + 1 < entries.len() {
                let next = entries.block(frame.at + 1);
                let next = next.map_err(|e| TreeError::index(e, frame.lblk))?;
                turn = Some((level, next));
                break;
            }
        }
        let Some((level, next)) = turn else {
            return Ok(false);
        };
        self.frames.truncate(level + 1);
        self.frames[level].at += 1;
        self.leaf = next;
        while self.frames.len() < depth {
            self.push(store, None)?;
        }
        Ok(true)
    }
}

impl<B: Clone> Frame<B> {
    fn entries<'a, S: Store<Block = B>>(
        &self,
        store: &S,
        bytes: &'a [u8],
    ) -> TreeResult<DxEntries<'a>, S> {
        DxEntries::new(bytes, self.kind, store.config().layout, store.blocks())
            .map_err(|e| TreeError::index(e, self.lblk))
    }
}

/// Where a name was found.
pub(crate) struct Place<B> {
    /// Block of the directory.
    pub lblk: u32,
    /// The block.
    pub block: B,
    /// The entry in it.
    pub found: dirent::Found,
}

/// Looks for a name through the index.
pub(crate) fn find<S: Store>(store: &S, name: &[u8]) -> TreeResult<Option<Place<S::Block>>, S> {
    let tree = open(store)?;
    let major = tree.hasher.hash(name).major;
    let mut path = tree.descend(store, major)?;
    loop {
        let lblk = path.leaf();
        let block = store.read(lblk).map_err(TreeError::Store)?;
        let found = dirent::find(&store.bytes(&block), store.config().layout, name);
        match found {
            Ok(Some(found)) => return Ok(Some(Place { lblk, block, found })),
            Ok(None) => {}
            Err(e) => return Err(TreeError::Store(store.corrupt(e.what(), lblk))),
        }
        // Names of one hash may go on in the next leaf, which then says so in bit 0.
        if path.next_hash(store)? != Some(major | 1) || !path.advance(store)? {
            return Ok(None);
        }
    }
}

/// Adds a name through the index.
///
/// # Errors
/// The index is damaged or full, or there is no space; the directory is valid and unchanged but
/// for index blocks that may have been split.
pub(crate) fn insert<S: StoreMut>(store: &mut S, entry: (&[u8], u32, u8)) -> Result<(), S::Error> {
    let layout = store.config().layout;
    let tree = open(store).map_err(|e| e.report(store))?;
    let major = tree.hasher.hash(entry.0).major;
    let path = tree.descend(store, major).map_err(|e| e.report(store))?;
    let lblk = path.leaf();
    let leaf = store.read(lblk)?;
    let gap = dirent::find_gap(&store.bytes(&leaf), layout, entry.0.len());
    match gap {
        Ok(Some(gap)) => {
            dirent::insert_at(&mut store.edit(&leaf)?, layout, gap, entry);
            Ok(())
        }
        Ok(None) if pack_and_insert(store, lblk, &leaf, entry)? => Ok(()),
        Ok(None) => {
            let path = with_room(store, &tree.hasher, major, path)?;
            split_and_insert(store, &tree.hasher, &path, (lblk, leaf), entry)
        }
        Err(e) => Err(store.corrupt(e.what(), lblk)),
    }
}

/// Adds a name to a leaf whose free space is enough but scattered; false if it is not enough.
/// Offsets mean nothing in an indexed directory, so entries may move.
fn pack_and_insert<S: StoreMut>(
    store: &S,
    lblk: u32,
    leaf: &S::Block,
    entry: (&[u8], u32, u8),
) -> Result<bool, S::Error> {
    let layout = store.config().layout;
    let packed = {
        let bytes = store.bytes(leaf);
        let mut free = layout.end();
        for e in dirent::entries(&bytes, layout) {
            match e {
                Ok(e) => free -= e.used(),
                Err(e) => return Err(store.corrupt(e.what(), lblk)),
            }
        }
        if free < needed_len(entry.0.len()) {
            return Ok(false);
        }
        let used = dirent::entries(&bytes, layout)
            .flatten()
            .filter(|e| e.is_used());
        let mut image = vec![0; layout.block_size];
        let all = used.map(|e| (e.name, e.ino, e.ftype)).chain([entry]);
        let fits = dirent::fill(&mut image, layout, all);
        debug_assert!(fits);
        image
    };
    store.edit(leaf)?.copy_from_slice(&packed);
    Ok(true)
}

/// Makes room for one more leaf in the index block above the leaf of `major`.
fn with_room<S: StoreMut>(
    store: &mut S,
    hasher: &Hasher,
    major: u32,
    mut path: Path<S::Block>,
) -> Result<Path<S::Block>, S::Error> {
    // Each round adds a level or splits a node, and there are at most `max_levels` of both.
    for _ in 0..2 * usize::from(store.config().max_levels) {
        if path.frames.last().is_some_and(|f| !f.full) {
            break;
        }
        grow_index(store, hasher.kind, &path)?;
        let tree = open(store).map_err(|e| e.report(store))?;
        path = tree.descend(store, major).map_err(|e| e.report(store))?;
    }
    Ok(path)
}

/// Splits a full node below a parent with room, or adds a level.
fn grow_index<S: StoreMut>(
    store: &mut S,
    hash: HashKind,
    path: &Path<S::Block>,
) -> Result<(), S::Error> {
    let layout = store.config().layout;
    let mut level = path.frames.len() - 1;
    while level > 0 && path.frames[level - 1].full {
        level -= 1;
    }
    let frame = &path.frames[level];
    let list = {
        let bytes = store.bytes(&frame.block);
        let entries = DxEntries::new(&bytes, frame.kind, layout, store.blocks());
        entries.and_then(|e| {
            e.check_order()?;
            (0..e.len())
                .map(|i| Ok((e.hash(i), e.block(i)?)))
                .collect::<Result<Vec<_>, _>>()
        })
    };
    let list = list.map_err(|e| store.corrupt(e.what(), frame.lblk))?;
    let levels = path.frames.len();
    if level == 0 && levels > usize::from(store.config().max_levels) {
        return Err(store.full());
    }
    let (new_lblk, new) = store.append()?;
    let moved = if level == 0 { 0 } else { list.len() / 2 };
    {
        let mut bytes = store.edit(&new)?;
        htree::fill_node(&mut bytes, layout);
        DxEdit::new(&mut bytes, DxKind::Node, layout).assign(&list[moved..]);
    }
    let changed = {
        let mut bytes = store.edit(&frame.block)?;
        if level == 0 {
            htree::set_info(&mut bytes, hash, u8::try_from(levels).unwrap_or(u8::MAX));
        }
        let mut edit = DxEdit::new(&mut bytes, frame.kind, layout);
        if level == 0 {
            edit.assign(&[(0, new_lblk)]);
            true
        } else {
            edit.truncate(moved)
        }
    };
    if !changed {
        return Err(store.corrupt(CHANGED, frame.lblk));
    }
    if level > 0 {
        let parent = &path.frames[level - 1];
        insert_entry(store, parent, (list[moved].0, new_lblk))?;
    }
    Ok(())
}

/// What a block in two places of a directory looks like, or one in use that was free to take.
const CHANGED: &str = "directory index: changed under an operation";

/// Adds an entry behind the one that the way took.
fn insert_entry<S: StoreMut>(
    store: &S,
    parent: &Frame<S::Block>,
    (hash, lblk): (u32, u32),
) -> Result<(), S::Error> {
    let layout = store.config().layout;
    let inserted = {
        let mut bytes = store.edit(&parent.block)?;
        let mut edit = DxEdit::new(&mut bytes, parent.kind, layout);
        edit.insert(parent.at + 1, hash, lblk)
    };
    if inserted {
        Ok(())
    } else {
        Err(store.corrupt(CHANGED, parent.lblk))
    }
}

/// Splits a full leaf by hash and adds a name to the half it belongs to.
fn split_and_insert<S: StoreMut>(
    store: &mut S,
    hasher: &Hasher,
    path: &Path<S::Block>,
    (lblk, leaf): (u32, S::Block),
    entry @ (name, ino, ftype): (&[u8], u32, u8),
) -> Result<(), S::Error> {
    let layout = store.config().layout;
    let Some(parent) = path.frames.last().filter(|f| !f.full && path.leaf == lblk) else {
        return Err(store.corrupt("directory index: does not grow", lblk));
    };
    let split = htree::split_leaf(&store.bytes(&leaf), layout, hasher);
    let mut split = match split {
        Ok(Some(split)) => split,
        Ok(None) => return Err(store.corrupt("directory leaf: full but empty", lblk)),
        Err(e) => return Err(store.corrupt(e.what(), lblk)),
    };
    let major = hasher.hash(entry.0).major;
    let half = if major >= split.hash & !1 {
        &mut split.high
    } else {
        &mut split.low
    };
    match dirent::insert(half, layout, name, ino, ftype) {
        Ok(true) => {}
        // Entries of at most 264 bytes always leave room in half a block of 1 KiB.
        Ok(false) => return Err(store.full()),
        Err(e) => return Err(store.corrupt(e.what(), lblk)),
    }
    let (new_lblk, new) = store.append()?;
    store.edit(&new)?.copy_from_slice(&split.high);
    store.edit(&leaf)?.copy_from_slice(&split.low);
    insert_entry(store, parent, (split.hash, new_lblk))
}

/// Turns a directory of one linear block into an index with one leaf.
///
/// # Errors
/// No space, or the block is damaged; nothing has changed then.
pub(crate) fn convert<S: StoreMut>(store: &mut S, hash: HashKind) -> Result<(), S::Error> {
    let layout = store.config().layout;
    let first = store.read(0)?;
    let images = {
        let bytes = store.bytes(&first);
        htree::convert(&bytes, layout)
    };
    let (dots, image) = images.map_err(|e| store.corrupt(e.what(), 0))?;
    let (leaf_lblk, leaf) = store.append()?;
    store.edit(&leaf)?.copy_from_slice(&image);
    htree::make_root(&mut store.edit(&first)?, layout, &dots, hash, leaf_lblk);
    store.set_indexed();
    Ok(())
}
