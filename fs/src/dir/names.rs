//! Finding, adding and removing names, with or without an index.

use crate::dir::store::{Store, StoreMut};
use crate::dir::tree::{self, Place, TreeError};
use crate::format::dirent::{self, Dots, Found};
use crate::format::htree::{self, DxKind};

/// Blocks asked for at once where all blocks will be read.
const READ_AHEAD: u32 = 32;

/// Called for each block of a scan: asks for the next few in time.
pub(crate) fn read_ahead<S: Store>(store: &S, lblk: u32) {
    if lblk % READ_AHEAD == 0 && store.blocks() > lblk + 1 {
        store.prefetch(lblk, READ_AHEAD.min(store.blocks() - lblk));
    }
}

/// Calls `f` with every used entry of block `lblk`, whichever kind of block it is, until it
/// answers true.
pub(crate) fn any_in_block<S: Store>(
    store: &S,
    lblk: u32,
    block: &S::Block,
    mut f: impl FnMut(&dirent::Dirent<'_>) -> bool,
) -> Result<bool, S::Error> {
    let layout = store.config().layout;
    let bytes = store.bytes(block);
    // Without tails an index block reads as a leaf whose one entry covers it.
    let kind = if layout.tail {
        htree::kind_by_content(&bytes, layout)
    } else {
        None
    };
    let result = match kind {
        Some(DxKind::Node) => Ok(false),
        Some(DxKind::Root) => dirent::dots(&bytes, layout).and_then(|dots| {
            let dot = layout.entry(&bytes, 0, layout.block_size)?;
            let dotdot = layout.entry(&bytes, dots.parent_at, layout.block_size)?;
            Ok(f(&dot) || f(&dotdot))
        }),
        None => (|| {
            for entry in dirent::entries(&bytes, layout) {
                let e = entry?;
                if e.is_used() && f(&e) {
                    return Ok(true);
                }
            }
            Ok(false)
        })(),
    };
    drop(bytes);
    result.map_err(|e| store.corrupt(e.what(), lblk))
}

/// Looks for a name.
///
/// # Errors
/// A block on the way cannot be read or is damaged.
pub(crate) fn find<S: Store>(store: &S, name: &[u8]) -> Result<Option<Place<S::Block>>, S::Error> {
    if name == b"." || name == b".." {
        return find_dot(store, name).map(Some);
    }
    if store.indexed() && store.config().dir_index {
        match tree::find(store, name) {
            Ok(place) => return Ok(place),
            Err(TreeError::Store(error)) => return Err(error),
            // All names are still in the leaves; only the way to them is lost.
            Err(TreeError::Index { what, lblk }) => store.warn(what, lblk),
        }
    }
    find_linear(store, name)
}

fn find_dot<S: Store>(store: &S, name: &[u8]) -> Result<Place<S::Block>, S::Error> {
    let block = store.read(0)?;
    let Dots {
        this,
        parent,
        parent_at,
        ..
    } = dots(store, &block)?;
    let (offset, ino) = if name == b"." {
        (0, this)
    } else {
        (parent_at, parent)
    };
    let found = Found {
        offset,
        prev: None,
        ino,
        ftype: dirent::DIR_TYPE,
    };
    Ok(Place {
        lblk: 0,
        block,
        found,
    })
}

/// Reads "." and ".." of the first block.
pub(crate) fn dots<S: Store>(store: &S, block: &S::Block) -> Result<Dots, S::Error> {
    let dots = dirent::dots(&store.bytes(block), store.config().layout);
    dots.map_err(|e| store.corrupt(e.what(), 0))
}

fn find_linear<S: Store>(store: &S, name: &[u8]) -> Result<Option<Place<S::Block>>, S::Error> {
    for lblk in 0..store.blocks() {
        read_ahead(store, lblk);
        let block = store.read(lblk)?;
        let mut prev = None;
        let mut found = None;
        any_in_block(store, lblk, &block, |e| {
            if e.name == name {
                found = Some(Found {
                    offset: e.offset,
                    prev: None,
                    ino: e.ino,
                    ftype: e.ftype,
                });
            }
            found.is_some()
        })?;
        if let Some(mut found) = found {
            // The entry before may be unused, which the walk above does not show.
            let bytes = store.bytes(&block);
            for e in dirent::entries(&bytes, store.config().layout).flatten() {
                if e.offset == found.offset {
                    break;
                }
                prev = Some(e.offset);
            }
            found.prev = prev;
            drop(bytes);
            return Ok(Some(Place { lblk, block, found }));
        }
    }
    Ok(None)
}

/// Adds a name that is not there yet: (name, inode, file type byte).
///
/// # Errors
/// No space, or damage on the way.
pub(crate) fn add<S: StoreMut>(store: &mut S, entry: (&[u8], u32, u8)) -> Result<(), S::Error> {
    let config = *store.config();
    if store.indexed() && config.dir_index {
        return tree::insert(store, entry);
    }
    if store.indexed() {
        // Without the feature nobody keeps the index up to date: the root is free space now.
        store.clear_indexed();
    }
    let blocks = store.blocks();
    for lblk in 0..blocks {
        let block = store.read(lblk)?;
        let gap = dirent::find_gap(&store.bytes(&block), config.layout, entry.0.len());
        match gap {
            Ok(Some(gap)) => {
                let mut bytes = store.edit(&block)?;
                dirent::insert_at(&mut bytes, config.layout, gap, entry);
                return Ok(());
            }
            Ok(None) => {}
            Err(e) => return Err(store.corrupt(e.what(), lblk)),
        }
    }
    match config.default_hash {
        Some(hash) if blocks == 1 && config.dir_index => {
            tree::convert(store, hash)?;
            tree::insert(store, entry)
        }
        _ => {
            let (_, block) = store.append()?;
            let fits = dirent::fill(&mut store.edit(&block)?, config.layout, [entry]);
            debug_assert!(fits);
            Ok(())
        }
    }
}

/// Removes a name and returns the inode it named; `None` if it is not there.
///
/// # Errors
/// Damage on the way.
pub(crate) fn remove<S: StoreMut>(store: &mut S, name: &[u8]) -> Result<Option<u32>, S::Error> {
    let Some(place) = find(store, name)? else {
        return Ok(None);
    };
    let layout = store.config().layout;
    let done = dirent::remove(&mut store.edit(&place.block)?, layout, &place.found);
    done.map_err(|e| store.corrupt(e.what(), place.lblk))?;
    Ok(Some(place.found.ino))
}

/// Lets a name point to another inode; false if the name is not there.
///
/// # Errors
/// Damage on the way.
pub(crate) fn set<S: StoreMut>(
    store: &mut S,
    (name, ino, ftype): (&[u8], u32, u8),
) -> Result<bool, S::Error> {
    let Some(place) = find(store, name)? else {
        return Ok(false);
    };
    let layout = store.config().layout;
    dirent::retarget(
        &mut store.edit(&place.block)?,
        layout,
        &place.found,
        ino,
        ftype,
    );
    Ok(true)
}

/// Returns whether there is no name but "." and "..".
///
/// # Errors
/// A block cannot be read or is damaged.
pub(crate) fn is_empty<S: Store>(store: &S) -> Result<bool, S::Error> {
    if store.blocks() == 0 {
        return Err(store.corrupt("directory: size", 0));
    }
    for lblk in 0..store.blocks() {
        read_ahead(store, lblk);
        let block = store.read(lblk)?;
        if lblk == 0 {
            dots(store, &block)?;
        }
        if any_in_block(store, lblk, &block, |e| e.name != b"." && e.name != b"..")? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Makes the first block of a new, empty directory.
///
/// # Errors
/// No space.
pub(crate) fn init<S: StoreMut>(store: &mut S, ino: u32, parent: u32) -> Result<(), S::Error> {
    let layout = store.config().layout;
    let (_, block) = store.append()?;
    dirent::fill_dots(&mut store.edit(&block)?, layout, ino, parent);
    Ok(())
}
