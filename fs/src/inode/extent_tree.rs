//! The extent tree of one file, over an abstract store of nodes.
//!
//! Every change of a leaf is one call of [`splice`]: some neighbouring extents of one leaf are
//! replaced by others. It splits and grows where the new ones do not fit, drops empty nodes, keeps
//! the keys of the index nodes equal to the first entry of their child (e2fsck insists), and pulls
//! a small tree back into the inode.
//!
//! # Invariants
//! 1. At most one node is locked at a time, so that a damaged tree in which a node is its own
//!    descendant cannot deadlock; `eh_depth`, which falls by one at each step, ends the walk.
//! 2. All nodes a split needs are allocated before the first is changed: without space the tree is
//!    as it was.

use smallvec::SmallVec;

use crate::format::extent::{self, Bounds, Child, Extent, ExtentState, Index, Leaf, Node};

/// Where the nodes are read; block 0 never holds one, so it stands for the root.
pub(crate) trait Nodes {
    /// What an operation fails with.
    type Error;
    /// Where file data and nodes may lie.
    fn bounds(&self) -> Bounds;
    /// Reports damage.
    fn corrupt(&self, what: &'static str, block: u64) -> Self::Error;
    /// Looks at a node.
    fn read<R>(&self, block: u64, look: impl FnOnce(&[u8]) -> R) -> Result<R, Self::Error>;
}

/// Where the nodes are changed.
pub(crate) trait NodesMut: Nodes {
    /// Changes a node.
    fn write<R>(
        &mut self,
        block: u64,
        change: impl FnOnce(&mut [u8]) -> R,
    ) -> Result<R, Self::Error>;
    /// Makes a new node, of zeros.
    fn create(&mut self, near: u64) -> Result<u64, Self::Error>;
    /// Gives a node back.
    fn free(&mut self, block: u64) -> Result<(), Self::Error>;
}

/// What a range of a file is mapped to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Found {
    /// So many blocks of the extent from here on, starting at the physical block.
    Mapped {
        pblk: u64,
        len: u32,
        state: ExtentState,
    },
    /// No mapping for so many blocks.
    Hole { len: u32 },
}

const ROOT: u64 = 0;
/// Behind the last logical block there can be.
const END: u64 = 1 << 32;

#[derive(Clone, Copy, Debug)]
struct Level {
    block: u64,
    at: usize,
    len: usize,
    max: usize,
    key: u32,
}

/// The way from the root to a leaf.
#[derive(Debug)]
struct Path {
    levels: SmallVec<[Level; 5]>,
    leaf: Place,
}

/// A leaf and the range of logical blocks it may map.
#[derive(Clone, Copy, Debug)]
struct Place {
    block: u64,
    lo: u32,
    hi: u64,
}

fn look<N: Nodes, R>(
    nodes: &N,
    root: &[u8],
    block: u64,
    f: impl FnOnce(&[u8]) -> R,
) -> Result<R, N::Error> {
    if block == ROOT {
        Ok(f(root))
    } else {
        nodes.read(block, f)
    }
}

fn change<N: NodesMut, R>(
    nodes: &mut N,
    root: &mut [u8],
    block: u64,
    f: impl FnOnce(&mut [u8]) -> R,
) -> Result<R, N::Error> {
    if block == ROOT {
        Ok(f(root))
    } else {
        nodes.write(block, f)
    }
}

/// Changes a node by a function that tells whether it could.
fn must<N: NodesMut>(
    nodes: &mut N,
    root: &mut [u8],
    block: u64,
    f: impl FnOnce(&mut [u8]) -> bool,
) -> Result<(), N::Error> {
    if change(nodes, root, block, f)? {
        Ok(())
    } else {
        Err(nodes.corrupt("extent node: changed shape under an operation", block))
    }
}

fn leaf_of<'a, N: Nodes>(nodes: &N, data: &'a [u8], block: u64) -> Result<Leaf<'a>, N::Error> {
    match extent::view(data, Some(0)) {
        Ok(Node::Leaf(leaf)) => Ok(leaf),
        Ok(Node::Index(_)) => Err(nodes.corrupt("extent node: eh_depth", block)),
        Err(e) => Err(nodes.corrupt(e.what(), block)),
    }
}

/// Looks at a leaf.
fn in_leaf<N: Nodes, R>(
    nodes: &N,
    root: &[u8],
    block: u64,
    f: impl FnOnce(Leaf<'_>) -> R,
) -> Result<R, N::Error> {
    look(nodes, root, block, |data| {
        Ok(f(leaf_of(nodes, data, block)?))
    })?
}

/// Walks to the leaf that covers `lblk`; `visit` hears of each index node on the way.
fn descend<N: Nodes>(
    nodes: &N,
    root: &[u8],
    lblk: u32,
    mut visit: impl FnMut(Level),
) -> Result<Place, N::Error> {
    let mut place = Place {
        block: ROOT,
        lo: 0,
        hi: END,
    };
    let mut depth = extent::depth(root).map_err(|e| nodes.corrupt(e.what(), ROOT))?;
    while depth > 0 {
        let step = |index: Index<'_>| {
            let at = index.position(lblk);
            let child = index.at(at)?;
            let next = index.at(at + 1).map_or(place.hi, |c| u64::from(c.lblk));
            let level = Level {
                block: place.block,
                at,
                len: index.len(),
                max: index.max(),
                key: child.lblk,
            };
            // Keys outside the parent's range would make two ways to one block.
            let sound = child.lblk >= place.lo
                && u64::from(child.lblk) < next
                && next <= place.hi
                && nodes.bounds().holds(child.pblk, 1);
            sound.then_some((level, child, next))
        };
        let seen = look(nodes, root, place.block, |data| {
            match extent::view(data, Some(depth)) {
                Ok(Node::Index(index)) => Ok(step(index)),
                Ok(Node::Leaf(_)) => Err("extent node: eh_depth"),
                Err(e) => Err(e.what()),
            }
        })?;
        let (level, child, next) = match seen {
            Ok(Some(found)) => found,
            Ok(None) => return Err(nodes.corrupt("extent index: bad entry", place.block)),
            Err(what) => return Err(nodes.corrupt(what, place.block)),
        };
        visit(level);
        place = Place {
            block: child.pblk,
            lo: child.lblk,
            hi: next,
        };
        depth -= 1;
    }
    Ok(place)
}

fn find<N: Nodes>(nodes: &N, root: &[u8], lblk: u32) -> Result<Path, N::Error> {
    let mut levels = SmallVec::new();
    let leaf = descend(nodes, root, lblk, |level| levels.push(level))?;
    Ok(Path { levels, leaf })
}

/// Tells whether an extent of a leaf may be used.
fn sound<N: Nodes>(nodes: &N, place: &Place, e: &Extent, next: Option<Extent>) -> bool {
    e.len > 0
        && e.lblk >= place.lo
        && e.end() <= place.hi.min(END - 1)
        && next.is_none_or(|n| u64::from(n.lblk) >= e.end())
        && nodes.bounds().holds(e.pblk, u64::from(e.len))
}

/// Finds what `lblk` is mapped to: the longest run up to `max` that one leaf shows.
///
/// Allocates nothing; with the tree in the inode it touches nothing else.
pub(crate) fn lookup<N: Nodes>(
    nodes: &N,
    root: &[u8],
    lblk: u32,
    max: u32,
) -> Result<Found, N::Error> {
    let place = descend(nodes, root, lblk, |_| {})?;
    let found = in_leaf(nodes, root, place.block, |leaf| {
        let i = leaf.upper_bound(lblk);
        let next = leaf.at(i);
        if let Some(e) = i.checked_sub(1).and_then(|i| leaf.at(i))
            && e.end() > u64::from(lblk)
        {
            if !sound(nodes, &place, &e, next) {
                return None;
            }
            let skip = lblk - e.lblk;
            let mut len = e.len - skip;
            // Long extents are cut at 2^15 blocks: go on over the cut.
            let mut last = e;
            let mut j = i;
            while len < max
                && let Some(n) = leaf.at(j)
                && n.state == e.state
                && u64::from(n.lblk) == last.end()
                && n.pblk == last.pblk + u64::from(last.len)
                && sound(nodes, &place, &n, leaf.at(j + 1))
            {
                len = len.saturating_add(n.len);
                last = n;
                j += 1;
            }
            let pblk = e.pblk + u64::from(skip);
            return Some(Found::Mapped {
                pblk,
                len: len.min(max),
                state: e.state,
            });
        }
        let end = next.map_or(place.hi, |n| u64::from(n.lblk)).min(END - 1);
        let len = end
            .saturating_sub(u64::from(lblk))
            .clamp(1, u64::from(max.max(1)));
        Some(Found::Hole {
            len: u32::try_from(len).unwrap_or(u32::MAX),
        })
    })?;
    found.ok_or_else(|| nodes.corrupt("extent: outside its place", place.block))
}

/// Finds the last extent that begins at or before `lblk`, within the leaf that covers it.
pub(crate) fn before<N: Nodes>(
    nodes: &N,
    root: &[u8],
    lblk: u32,
) -> Result<Option<Extent>, N::Error> {
    let place = descend(nodes, root, lblk, |_| {})?;
    in_leaf(nodes, root, place.block, |leaf| {
        leaf.upper_bound(lblk)
            .checked_sub(1)
            .and_then(|i| leaf.at(i))
    })
}

/// Returns the block after the last one mapped.
pub(crate) fn end<N: Nodes>(nodes: &N, root: &[u8]) -> Result<u64, N::Error> {
    Ok(before(nodes, root, u32::MAX)?.map_or(0, |e| e.end()))
}

/// Maps `e`, which must lie in a hole, and merges it with its neighbours.
pub(crate) fn insert<N: NodesMut>(
    nodes: &mut N,
    root: &mut [u8],
    e: Extent,
) -> Result<(), N::Error> {
    let path = find(nodes, root, e.lblk)?;
    let (at, prev, next) = in_leaf(nodes, root, path.leaf.block, |leaf| {
        let i = leaf.upper_bound(e.lblk);
        (i, i.checked_sub(1).and_then(|i| leaf.at(i)), leaf.at(i))
    })?;
    let after = next
        .map_or(path.leaf.hi, |n| u64::from(n.lblk))
        .min(END - 1);
    if e.end() > after || prev.is_some_and(|p| p.end() > u64::from(e.lblk)) {
        return Err(nodes.corrupt("extent: blocks mapped twice", path.leaf.block));
    }
    replace(nodes, root, &path, at, 0, &[e])
}

/// Marks the unwritten extents within `lblk..end` as written.
pub(crate) fn convert<N: NodesMut>(
    nodes: &mut N,
    root: &mut [u8],
    lblk: u32,
    end: u32,
) -> Result<(), N::Error> {
    let mut pos = lblk;
    while pos < end {
        let path = find(nodes, root, pos)?;
        let place = path.leaf;
        let (at, here, next) = in_leaf(nodes, root, place.block, |leaf| {
            let mut i = leaf.upper_bound(pos);
            let covers = |e: &Extent| e.end() > u64::from(pos);
            if i > 0 && leaf.at(i - 1).as_ref().is_some_and(covers) {
                i -= 1;
            }
            (i, leaf.at(i), leaf.at(i + 1))
        })?;
        let Some(e) = here else {
            // Nothing more in this leaf.
            match u32::try_from(place.hi) {
                Ok(hi) if hi > pos => pos = hi,
                _ => break,
            }
            continue;
        };
        if !sound(nodes, &place, &e, next) {
            return Err(nodes.corrupt("extent: outside its place", place.block));
        }
        let e_end = u32::try_from(e.end()).unwrap_or(u32::MAX);
        let (from, to) = (e.lblk.max(pos), e_end.min(end));
        if from >= end {
            break;
        }
        if e.state == ExtentState::Unwritten {
            let part = |from: u32, to: u32, state| Extent {
                lblk: from,
                len: to - from,
                pblk: e.pblk + u64::from(from - e.lblk),
                state,
            };
            let mut new = SmallVec::<[Extent; 3]>::new();
            if e.lblk < from {
                new.push(part(e.lblk, from, ExtentState::Unwritten));
            }
            new.push(part(from, to, ExtentState::Written));
            if to < e_end {
                new.push(part(to, e_end, ExtentState::Unwritten));
            }
            replace(nodes, root, &path, at, 1, &new)?;
        }
        pos = to;
    }
    Ok(())
}

/// Cuts the extent that lies across the border before `lblk` in two.
pub(crate) fn split_before<N: NodesMut>(
    nodes: &mut N,
    root: &mut [u8],
    lblk: u32,
) -> Result<(), N::Error> {
    let path = find(nodes, root, lblk)?;
    let place = path.leaf;
    let (at, across) = in_leaf(nodes, root, place.block, |leaf| {
        let i = leaf.upper_bound(lblk);
        let e = i.checked_sub(1).and_then(|i| leaf.at(i));
        (i, e.filter(|e| e.lblk < lblk && e.end() > u64::from(lblk)))
    })?;
    let Some(e) = across else { return Ok(()) };
    if !sound(nodes, &place, &e, None) {
        return Err(nodes.corrupt("extent: outside its place", place.block));
    }
    let len = lblk - e.lblk;
    let right = Extent {
        lblk,
        len: e.len - len,
        pblk: e.pblk + u64::from(len),
        ..e
    };
    splice(nodes, root, &path, at - 1, 1, &[Extent { len, ..e }, right])
}

/// One step of [`remove_step`].
#[derive(Debug, Default)]
pub(crate) struct Removed {
    /// Runs of physical blocks no longer mapped; the caller frees them in the same transaction.
    pub(crate) freed: SmallVec<[(u64, u32); 16]>,
    /// What is left to remove ends here; `None` when all is done.
    pub(crate) rest: Option<u32>,
}

/// Unmaps the last up to `max_runs` extents (or parts of them) of one leaf within `from..to`.
pub(crate) fn remove_step<N: NodesMut>(
    nodes: &mut N,
    root: &mut [u8],
    from: u32,
    to: u32,
    max_runs: usize,
) -> Result<Removed, N::Error> {
    let mut out = Removed::default();
    if from >= to {
        return Ok(out);
    }
    let path = find(nodes, root, to - 1)?;
    let place = path.leaf;
    let mut new = SmallVec::<[Extent; 2]>::new();
    let (empty, range) = in_leaf(nodes, root, place.block, |leaf| {
        let last = leaf.upper_bound(to - 1);
        let mut first = last;
        // Where the leaf before this one ends.
        out.rest = (place.lo > from && place.lo < to).then_some(place.lo);
        while let Some(e) = first.checked_sub(1).and_then(|i| leaf.at(i)) {
            if !sound(nodes, &place, &e, leaf.at(first)) {
                return Err(());
            }
            let e_end = u32::try_from(e.end()).unwrap_or(u32::MAX);
            if e_end <= from {
                out.rest = None;
                break;
            }
            if last - first == max_runs {
                out.rest = Some(e_end.min(to));
                break;
            }
            let (cut, cut_end) = (e.lblk.max(from), e_end.min(to));
            out.freed
                .push((e.pblk + u64::from(cut - e.lblk), cut_end - cut));
            first -= 1;
            if e_end > to {
                let pblk = e.pblk + u64::from(to - e.lblk);
                new.push(Extent {
                    lblk: to,
                    len: e_end - to,
                    pblk,
                    ..e
                });
            }
            if e.lblk <= from {
                if e.lblk < from {
                    new.insert(
                        0,
                        Extent {
                            len: from - e.lblk,
                            ..e
                        },
                    );
                }
                out.rest = None;
                break;
            }
        }
        Ok((leaf.is_empty(), first..last))
    })?
    .map_err(|()| nodes.corrupt("extent: outside its place", place.block))?;
    if !range.is_empty() {
        splice(nodes, root, &path, range.start, range.len(), &new)?;
    } else if empty && !path.levels.is_empty() && place.lo < to {
        drop_leaf(nodes, root, &path)?;
    }
    Ok(out)
}

/// Moves the extents of one leaf that begin at or behind `from` down by `by` blocks. Returns where
/// to go on. The range they move to must be a hole.
pub(crate) fn shift_down_step<N: NodesMut>(
    nodes: &mut N,
    root: &mut [u8],
    from: u32,
    by: u32,
) -> Result<Option<u32>, N::Error> {
    let path = find(nodes, root, from)?;
    let place = path.leaf;
    let (at, moved) = in_leaf(nodes, root, place.block, |leaf| {
        let at = from.checked_sub(1).map_or(0, |f| leaf.upper_bound(f));
        (at, leaf.iter().skip(at).collect::<Vec<_>>())
    })?;
    let next = u32::try_from(place.hi).ok().filter(|hi| *hi > from);
    if !moved.is_empty() {
        let shifted = shifted(&moved, |lblk| lblk.checked_sub(by));
        let Some(shifted) = shifted else {
            return Err(nodes.corrupt("extent: outside its place", place.block));
        };
        replace(nodes, root, &path, at, moved.len(), &shifted)?;
    }
    Ok(next)
}

/// Moves the extents of one leaf that begin in `from..to` up by `by` blocks, last leaf first.
/// Returns the new `to`. The caller has made sure that the last one does not pass the limit.
pub(crate) fn shift_up_step<N: NodesMut>(
    nodes: &mut N,
    root: &mut [u8],
    from: u32,
    to: u32,
    by: u32,
) -> Result<Option<u32>, N::Error> {
    let Some(last) = to.checked_sub(1).filter(|last| *last >= from) else {
        return Ok(None);
    };
    let path = find(nodes, root, last)?;
    let place = path.leaf;
    let (at, moved) = in_leaf(nodes, root, place.block, |leaf| {
        let at = from.checked_sub(1).map_or(0, |f| leaf.upper_bound(f));
        let end = leaf.upper_bound(last).max(at);
        (at, leaf.iter().skip(at).take(end - at).collect::<Vec<_>>())
    })?;
    if !moved.is_empty() {
        let fits = moved.last().is_some_and(|e| e.end() + u64::from(by) < END);
        let shifted = shifted(&moved, |lblk| lblk.checked_add(by)).filter(|_| fits);
        let Some(shifted) = shifted else {
            return Err(nodes.corrupt("extent: outside its place", place.block));
        };
        splice(nodes, root, &path, at, moved.len(), &shifted)?;
    }
    Ok((place.lo > from && place.lo < to).then_some(place.lo))
}

fn shifted(all: &[Extent], f: impl Fn(u32) -> Option<u32>) -> Option<Vec<Extent>> {
    all.iter()
        .map(|e| {
            Some(Extent {
                lblk: f(e.lblk)?,
                ..*e
            })
        })
        .collect()
}

/// Replaces extents `at..at + remove` of the leaf by `new` (not empty), merged with each other and
/// with the extents on both sides.
fn replace<N: NodesMut>(
    nodes: &mut N,
    root: &mut [u8],
    path: &Path,
    at: usize,
    remove: usize,
    new: &[Extent],
) -> Result<(), N::Error> {
    let (prev, next) = in_leaf(nodes, root, path.leaf.block, |leaf| {
        (
            at.checked_sub(1).and_then(|i| leaf.at(i)),
            leaf.at(at + remove),
        )
    })?;
    let prev = prev.filter(|p| new.first().is_some_and(|n| p.merges_with(n)));
    let next = next.filter(|n| new.last().is_some_and(|l| l.merges_with(n)));
    let mut merged = SmallVec::<[Extent; 5]>::new();
    for e in prev.iter().chain(new).chain(next.iter()) {
        match merged.last_mut() {
            Some(last) if last.merges_with(e) => last.len += e.len,
            _ => merged.push(*e),
        }
    }
    let at = at - usize::from(prev.is_some());
    let remove = remove + usize::from(prev.is_some()) + usize::from(next.is_some());
    splice(nodes, root, path, at, remove, &merged)
}

/// Replaces extents `at..at + remove` of the leaf at the end of `path` by `new`, which lie in
/// order between the neighbours. `path` is stale afterwards.
fn splice<N: NodesMut>(
    nodes: &mut N,
    root: &mut [u8],
    path: &Path,
    at: usize,
    remove: usize,
    new: &[Extent],
) -> Result<(), N::Error> {
    let block = path.leaf.block;
    let (len, max) = in_leaf(nodes, root, block, |leaf| (leaf.len(), leaf.max()))?;
    if remove > len || at > len - remove {
        return Err(nodes.corrupt("extent node: changed shape under an operation", block));
    }
    let after = len - remove + new.len();
    if after == 0 && !path.levels.is_empty() {
        return drop_leaf(nodes, root, path);
    }
    if after <= max {
        must(nodes, root, block, |data| {
            extent::splice(data, at, remove, new)
        })?;
        if at == 0
            && let Some(first) = look(nodes, root, block, extent::first_key)?
        {
            fix_keys(nodes, root, &path.levels, first)?;
        }
        if after < len {
            shrink(nodes, root)?;
        }
        return Ok(());
    }

    let mut all = in_leaf(nodes, root, block, |leaf| leaf.iter().collect::<Vec<_>>())?;
    if all.len() != len {
        return Err(nodes.corrupt("extent node: changed shape under an operation", block));
    }
    all.splice(at..at + remove, new.iter().copied());
    let mut spare = Spare::take(nodes, path)?;
    let done = (|| {
        if at == 0
            && let Some(first) = all.first()
        {
            fix_keys(nodes, root, &path.levels, first.lblk)?;
        }
        if path.levels.is_empty() {
            let child = spare.next(nodes)?;
            grow(nodes, root, child)?;
            must(nodes, root, child, |data| {
                extent::splice(data, at, remove, new)
            })?;
            let key = all.first().map_or(0, |e| e.lblk);
            return must(nodes, root, ROOT, |data| extent::set_key(data, 0, key));
        }
        // At the end of the file fill the leaf: what is appended later goes to the new one.
        let append = at + remove == len && path.leaf.hi == END;
        let keep = if append {
            max
        } else {
            (all.len() / 2).min(max)
        };
        let (left, right) = all.split_at(keep.min(all.len() - 1));
        let right_block = spare.next(nodes)?;
        must(nodes, root, right_block, |data| {
            extent::init(data, 0);
            extent::splice(data, 0, 0, right)
        })?;
        must(nodes, root, block, |data| {
            extent::splice(data, 0, len, left)
        })?;
        let key = right.first().map_or(0, |e| e.lblk);
        add_child(
            nodes,
            root,
            &path.levels,
            Child {
                lblk: key,
                pblk: right_block,
            },
            &mut spare,
        )
    })();
    spare.give_back(nodes, done)
}

/// Nodes allocated ahead of a split.
struct Spare(SmallVec<[u64; 6]>);

impl Spare {
    /// Allocates what splitting the leaf takes at most.
    fn take<N: NodesMut>(nodes: &mut N, path: &Path) -> Result<Self, N::Error> {
        let depth = path.levels.len();
        let full = path
            .levels
            .iter()
            .rev()
            .take_while(|l| l.len >= l.max)
            .count();
        // One for the leaf (or the root that is one), one for each full index node above; if the
        // last of these is the root, it grows into it instead of being split.
        let count = 1 + full;
        if full == depth && depth >= usize::from(extent::MAX_DEPTH) {
            return Err(nodes.corrupt("extent tree: too deep", path.leaf.block));
        }
        let mut spare = Self(SmallVec::new());
        let mut near = path.leaf.block;
        for _ in 0..count {
            match nodes.create(near) {
                Ok(block) => {
                    near = block;
                    spare.0.insert(0, block);
                }
                Err(error) => return spare.give_back(nodes, Err(error)).map(|()| Self::none()),
            }
        }
        Ok(spare)
    }

    fn none() -> Self {
        Self(SmallVec::new())
    }

    fn next<N: Nodes>(&mut self, nodes: &N) -> Result<u64, N::Error> {
        self.0
            .pop()
            .ok_or_else(|| nodes.corrupt("extent tree: split of an unknown shape", ROOT))
    }

    /// Frees what was not used.
    fn give_back<N: NodesMut>(
        self,
        nodes: &mut N,
        done: Result<(), N::Error>,
    ) -> Result<(), N::Error> {
        let mut done = done;
        for block in self.0 {
            done = done.and(nodes.free(block));
        }
        done
    }
}

/// Moves the root's entries into the new node `child` and makes it the root's only child.
fn grow<N: NodesMut>(nodes: &mut N, root: &mut [u8], child: u64) -> Result<(), N::Error> {
    if nodes.write(child, |data| extent::grow(root, data, child))? {
        Ok(())
    } else {
        Err(nodes.corrupt("extent root: not a node", ROOT))
    }
}

/// Adds a child behind the one that the last of `levels` points at.
fn add_child<N: NodesMut>(
    nodes: &mut N,
    root: &mut [u8],
    levels: &[Level],
    child: Child,
    spare: &mut Spare,
) -> Result<(), N::Error> {
    let Some((level, above)) = levels.split_last() else {
        return Err(nodes.corrupt("extent tree: split of an unknown shape", ROOT));
    };
    let (block, at) = (level.block, level.at + 1);
    if level.len < level.max {
        return must(nodes, root, block, |data| {
            extent::splice_children(data, at, 0, &[child])
        });
    }
    if above.is_empty() {
        let new = spare.next(nodes)?;
        grow(nodes, root, new)?;
        return must(nodes, root, new, |data| {
            extent::splice_children(data, at, 0, &[child])
        });
    }
    let (depth, mut all) = look(nodes, root, block, |data| match extent::view(data, None) {
        Ok(Node::Index(index)) => Ok((extent::depth(data), index.iter().collect::<Vec<_>>())),
        Ok(Node::Leaf(_)) => Err("extent node: eh_depth"),
        Err(e) => Err(e.what()),
    })?
    .map_err(|what| nodes.corrupt(what, block))?;
    let depth = depth.map_err(|e| nodes.corrupt(e.what(), block))?;
    let len = all.len();
    all.insert(at.min(len), child);
    let keep = if at == len { len } else { all.len() / 2 };
    let (left, right) = all.split_at(keep);
    let right_block = spare.next(nodes)?;
    must(nodes, root, right_block, |data| {
        extent::init(data, depth);
        extent::splice_children(data, 0, 0, right)
    })?;
    must(nodes, root, block, |data| {
        extent::splice_children(data, 0, len, left)
    })?;
    let key = right.first().map_or(0, |c| c.lblk);
    add_child(
        nodes,
        root,
        above,
        Child {
            lblk: key,
            pblk: right_block,
        },
        spare,
    )
}

/// Makes `key` the first logical block of the way down `levels`.
fn fix_keys<N: NodesMut>(
    nodes: &mut N,
    root: &mut [u8],
    levels: &[Level],
    key: u32,
) -> Result<(), N::Error> {
    for level in levels.iter().rev() {
        if level.key != key {
            must(nodes, root, level.block, |data| {
                extent::set_key(data, level.at, key)
            })?;
        }
        if level.at != 0 {
            break;
        }
    }
    Ok(())
}

/// Removes the leaf at the end of `path`, and index nodes that become empty.
fn drop_leaf<N: NodesMut>(nodes: &mut N, root: &mut [u8], path: &Path) -> Result<(), N::Error> {
    nodes.free(path.leaf.block)?;
    let mut levels = path.levels.as_slice();
    while let Some((level, above)) = levels.split_last() {
        if level.len > 1 {
            must(nodes, root, level.block, |data| {
                extent::splice_children(data, level.at, 1, &[])
            })?;
            if level.at == 0
                && let Some(key) = look(nodes, root, level.block, extent::first_key)?
            {
                fix_keys(nodes, root, above, key)?;
            }
            return shrink(nodes, root);
        }
        if level.block == ROOT {
            extent::init(root, 0);
        } else {
            nodes.free(level.block)?;
        }
        levels = above;
    }
    Ok(())
}

/// Pulls an only child that fits into the root.
fn shrink<N: NodesMut>(nodes: &mut N, root: &mut [u8]) -> Result<(), N::Error> {
    loop {
        let (depth, child) = match extent::view(root, None) {
            Ok(Node::Index(index)) if index.len() == 1 => {
                (extent::depth(root).unwrap_or(0), index.at(0))
            }
            _ => return Ok(()),
        };
        let Some(child) = child else { return Ok(()) };
        let pulled = nodes.read(child.pblk, |data| {
            extent::depth(data).is_ok_and(|d| d + 1 == depth) && extent::pull_up(root, data)
        })?;
        if !pulled {
            return Ok(());
        }
        nodes.free(child.pblk)?;
    }
}

#[cfg(test)]
mod tests;
