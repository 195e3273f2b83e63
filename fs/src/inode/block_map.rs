//! The classic block map of one file, over an abstract store of pointer blocks.
//!
//! `i_block` holds 12 pointers to data, then one each to a single, double and triple indirect
//! block; zero is a hole. Format: Linux `Documentation/filesystems/ext4/ifork.rst`, section
//! "Direct/Indirect Block Addressing".
//!
//! The walk goes down at most three levels by count, whatever the blocks say, and locks one block
//! at a time; all blocks an insertion needs are allocated before the first pointer is set.

use smallvec::SmallVec;

use super::extent_tree::{Found, Nodes, NodesMut, Removed};
use crate::format::extent::ExtentState;

const DIRECT: u32 = 12;
const ROOT: u64 = 0;
/// Arrays one lookup looks through for the end of a hole.
const MAX_ARRAYS: u32 = 64;

/// Returns how many blocks a map with `per` pointers in a block can hold.
pub(crate) fn max_blocks(per: u32) -> u64 {
    let per = u64::from(per);
    u64::from(DIRECT) + per + per * per + per * per * per
}

/// Where a logical block hangs.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// Pointer blocks between the root and the data.
    depth: u32,
    /// Slot in the root.
    slot: usize,
    /// Number of the block below that slot; for a direct one 0.
    rel: u64,
    /// Blocks below the slot.
    span: u64,
}

fn place(lblk: u32, per: u32) -> Option<Place> {
    if lblk < DIRECT {
        return Some(Place {
            depth: 0,
            slot: lblk as usize,
            rel: 0,
            span: 1,
        });
    }
    let mut rel = u64::from(lblk - DIRECT);
    let mut span = u64::from(per);
    for depth in 1..=3 {
        if rel < span {
            return Some(Place {
                depth,
                slot: (DIRECT + depth - 1) as usize,
                rel,
                span,
            });
        }
        rel -= span;
        span *= u64::from(per);
    }
    None
}

fn pointer(data: &[u8], i: usize) -> u32 {
    match data.get(i * 4..i * 4 + 4) {
        Some(&[a, b, c, d]) => u32::from_le_bytes([a, b, c, d]),
        _ => 0,
    }
}

fn set_pointer(data: &mut [u8], i: usize, value: u32) {
    if let Some(slot) = data.get_mut(i * 4..i * 4 + 4) {
        slot.copy_from_slice(&value.to_le_bytes());
    }
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

/// One step down: the block (or the root) and the slot in it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Step {
    block: u64,
    at: usize,
}

/// The way to the array that holds a block's pointer, as far as it exists.
struct Way {
    steps: SmallVec<[Step; 4]>,
    /// The array: its block, the slot, and how many slots are left in it from there.
    array: Option<(u64, usize, u32)>,
    /// Where the way ends early: blocks from the wanted one to the end of the missing subtree.
    hole: u64,
}

fn walk<N: Nodes>(nodes: &N, root: &[u8], p: Place, per: u32) -> Result<Way, N::Error> {
    let mut way = Way {
        steps: SmallVec::new(),
        array: None,
        hole: 0,
    };
    if p.depth == 0 {
        way.array = Some((ROOT, p.slot, DIRECT - p.slot as u32));
        return Ok(way);
    }
    let mut step = Step {
        block: ROOT,
        at: p.slot,
    };
    let mut span = p.span;
    let mut rel = p.rel;
    for level in (1..=p.depth).rev() {
        way.steps.push(step);
        let block = u64::from(look(nodes, root, step.block, |data| {
            pointer(data, step.at)
        })?);
        if block == 0 {
            way.hole = span - rel;
            return Ok(way);
        }
        if !nodes.bounds().holds(block, 1) {
            return Err(nodes.corrupt("block map: pointer outside the filesystem", step.block));
        }
        span /= u64::from(per);
        let at = rel / span;
        rel %= span;
        step = Step {
            block,
            at: at as usize,
        };
        if level == 1 {
            way.array = Some((block, step.at, per - at as u32));
        }
    }
    Ok(way)
}

/// Finds what `lblk` is mapped to: a run of at most `max` blocks within one array of pointers, or
/// a hole, which may go on behind the length given.
pub(crate) fn lookup<N: Nodes>(
    nodes: &N,
    root: &[u8],
    lblk: u32,
    max: u32,
    per: u32,
) -> Result<Found, N::Error> {
    let max = max.max(1);
    let mut hole = 0u32;
    for _ in 0..MAX_ARRAYS {
        let left = max - hole;
        let here = lblk.checked_add(hole).and_then(|l| place(l, per));
        let Some(p) = here else {
            return Ok(Found::Hole { len: max });
        };
        let way = walk(nodes, root, p, per)?;
        let Some((block, at, room)) = way.array else {
            hole += u32::try_from(way.hole).unwrap_or(u32::MAX).min(left);
            if hole >= max {
                break;
            }
            continue;
        };
        let limit = room.min(left) as usize;
        let (first, len) = look(nodes, root, block, |data| {
            let first = pointer(data, at);
            let goes_on = |i: &usize| {
                let want = if first == 0 {
                    Some(0)
                } else {
                    first.checked_add(*i as u32)
                };
                Some(pointer(data, at + i)) == want
            };
            (first, (0..limit).take_while(goes_on).count() as u32)
        })?;
        if first != 0 {
            if hole > 0 {
                break;
            }
            if !nodes.bounds().holds(u64::from(first), u64::from(len)) {
                return Err(nodes.corrupt("block map: pointer outside the filesystem", block));
            }
            let pblk = u64::from(first);
            return Ok(Found::Mapped {
                pblk,
                len,
                state: ExtentState::Written,
            });
        }
        hole += len;
        if hole >= max || (len as usize) < limit {
            break;
        }
    }
    Ok(Found::Hole { len: hole.max(1) })
}

/// Gives a block near which `lblk` would best be: behind the block before it, else near the
/// pointer block it hangs on.
pub(crate) fn before<N: Nodes>(
    nodes: &N,
    root: &[u8],
    lblk: u32,
    per: u32,
) -> Result<Option<u64>, N::Error> {
    let Some(p) = place(lblk, per) else {
        return Ok(None);
    };
    let way = walk(nodes, root, p, per)?;
    if let Some((block, at, _)) = way.array {
        let first = if block == ROOT { 0 } else { block + 1 };
        return look(nodes, root, block, |data| {
            let prev = (0..at).rev().map(|i| pointer(data, i)).find(|p| *p != 0);
            prev.map_or(first, |p| u64::from(p) + 1)
        })
        .map(|goal| Some(goal).filter(|g| *g != 0));
    }
    // The array is missing: behind the block before, which hangs somewhere else.
    Ok(
        match lblk
            .checked_sub(1)
            .map(|l| lookup(nodes, root, l, 1, per))
            .transpose()?
        {
            Some(Found::Mapped { pblk, .. }) => Some(pblk + 1),
            _ => way.steps.last().map(|s| s.block + 1).filter(|b| *b > 1),
        },
    )
}

/// Maps `len` blocks from `lblk`, which must be a hole, to those from `pblk`.
pub(crate) fn insert<N: NodesMut>(
    nodes: &mut N,
    root: &mut [u8],
    lblk: u32,
    pblk: u32,
    len: u32,
    per: u32,
) -> Result<(), N::Error> {
    let end = u64::from(lblk) + u64::from(len);
    if end > max_blocks(per).min(u64::from(u32::MAX)) {
        return Err(nodes.corrupt("block map: past its last block", ROOT));
    }
    // First look: nothing mapped there, and how many pointer blocks are missing.
    let mut missing = 0;
    let mut last = [u64::MAX; 4];
    for_arrays(lblk, len, per, |p, _, n| {
        let way = walk(nodes, root, p, per)?;
        match way.array {
            Some((block, at, _)) => {
                let hole = look(nodes, root, block, |data| {
                    (at..at + n as usize).all(|i| pointer(data, i) == 0)
                })?;
                if !hole {
                    return Err(nodes.corrupt("block map: blocks mapped twice", block));
                }
            }
            None => {
                let mut span = p.span;
                for level in (1..=p.depth).rev() {
                    // The block of this level is named by slot and position; arrays come in
                    // ascending order, so one seen before is the last one seen.
                    let name = (p.rel / span) << 2 | u64::from(p.depth);
                    let exists = way.steps.len() > (p.depth - level + 1) as usize;
                    if let Some(seen) = last.get_mut(level as usize)
                        && !exists
                        && *seen != name
                    {
                        *seen = name;
                        missing += 1;
                    }
                    span /= u64::from(per);
                }
            }
        }
        Ok(())
    })?;
    let mut spare = SmallVec::<[u64; 4]>::new();
    for _ in 0..missing {
        match nodes.create(spare.last().map_or(u64::from(pblk), |b| *b)) {
            Ok(block) => spare.push(block),
            Err(error) => {
                for block in spare {
                    nodes.free(block)?;
                }
                return Err(error);
            }
        }
    }
    spare.reverse();

    let mut pending = SmallVec::<[(Place, u32, u32); 4]>::new();
    for_arrays(lblk, len, per, |p, skip, n| {
        pending.push((p, skip, n));
        Ok(())
    })?;
    for (p, skip, n) in pending {
        let (block, at) = loop {
            let way = walk(nodes, root, p, per)?;
            if let Some((block, at, _)) = way.array {
                break (block, at);
            }
            let (Some(step), Some(new)) = (way.steps.last(), spare.pop()) else {
                return Err(nodes.corrupt("block map: changed shape under an operation", ROOT));
            };
            let Ok(new) = u32::try_from(new) else {
                return Err(nodes.corrupt("block map: block number past 32 bits", step.block));
            };
            change(nodes, root, step.block, |data| {
                set_pointer(data, step.at, new)
            })?;
        };
        change(nodes, root, block, |data| {
            for i in 0..n {
                set_pointer(data, at + i as usize, pblk + skip + i);
            }
        })?;
    }
    for block in spare {
        nodes.free(block)?;
    }
    Ok(())
}

/// Calls `f` for each array of pointers a range touches, with its place, how many blocks of the
/// range come before it, and how many it holds.
fn for_arrays<E>(
    lblk: u32,
    len: u32,
    per: u32,
    mut f: impl FnMut(Place, u32, u32) -> Result<(), E>,
) -> Result<(), E> {
    let mut done = 0;
    while done < len {
        let Some(p) = place(lblk + done, per) else {
            break;
        };
        let room = match p.depth {
            0 => DIRECT - p.slot as u32,
            _ => per - (p.rel % u64::from(per)) as u32,
        };
        let n = room.min(len - done);
        f(p, done, n)?;
        done += n;
    }
    Ok(())
}

/// Unmaps the last up to `max_runs` runs of blocks of one array within `from..to`, and frees
/// pointer blocks that become empty.
pub(crate) fn remove_step<N: NodesMut>(
    nodes: &mut N,
    root: &mut [u8],
    from: u32,
    to: u32,
    max_runs: usize,
    per: u32,
) -> Result<Removed, N::Error> {
    let mut out = Removed::default();
    let limit = u32::try_from(max_blocks(per)).unwrap_or(u32::MAX);
    let mut to = to.min(limit);
    while from < to {
        let last = to - 1;
        let Some(p) = place(last, per) else {
            return Ok(out);
        };
        let Some(target) = last_array(nodes, root, p, last, from, per)? else {
            return Ok(out);
        };
        match target {
            Target::Skip(next) => to = next,
            Target::Empty { steps, base } => {
                unlink(nodes, root, &steps)?;
                out.rest = (base > from).then_some(base);
                return Ok(out);
            }
            Target::Array {
                steps,
                block,
                base,
                at,
            } => {
                // `at` is the slot of the last block to look at, `base` the block of slot 0.
                let low = from.saturating_sub(base) as usize;
                let (kept, cleared) = change(nodes, root, block, |data| {
                    clear_runs(data, low, at, max_runs, &mut out)
                })?;
                let inside = |r: &(u64, u32)| nodes.bounds().holds(r.0, u64::from(r.1));
                if !out.freed.iter().all(inside) {
                    return Err(nodes.corrupt("block map: pointer outside the filesystem", block));
                }
                let next = base.saturating_add(cleared as u32);
                if kept && out.freed.is_empty() {
                    to = next;
                    continue;
                }
                out.rest = (next > from).then_some(next);
                if !kept {
                    unlink(nodes, root, &steps)?;
                }
                return Ok(out);
            }
        }
    }
    Ok(out)
}

/// Clears pointers of `low..=high` from above until `max_runs` runs are found. Returns whether
/// any pointer is left in the whole array, and the first slot cleared or seen empty.
fn clear_runs(
    data: &mut [u8],
    low: usize,
    high: usize,
    max_runs: usize,
    out: &mut Removed,
) -> (bool, usize) {
    let mut i = high + 1;
    while i > low {
        let p = pointer(data, i - 1);
        if p != 0 {
            let full = out.freed.len() >= max_runs;
            match out.freed.last_mut() {
                Some((first, len)) if u64::from(p) + 1 == *first => {
                    *first -= 1;
                    *len += 1;
                }
                _ if full => break,
                _ => out.freed.push((u64::from(p), 1)),
            }
            set_pointer(data, i - 1, 0);
        }
        i -= 1;
    }
    (data.iter().any(|b| *b != 0), i)
}

enum Target {
    /// Nothing at or behind this block within the range.
    Skip(u32),
    /// A pointer block with nothing in it.
    Empty {
        steps: SmallVec<[Step; 4]>,
        base: u32,
    },
    /// An array of data pointers that may hold some in the range.
    Array {
        steps: SmallVec<[Step; 4]>,
        block: u64,
        base: u32,
        at: usize,
    },
}

/// Finds the array with the last pointer at or before `last` (which hangs at `p`), in the subtree
/// of its slot.
fn last_array<N: Nodes>(
    nodes: &N,
    root: &[u8],
    p: Place,
    last: u32,
    from: u32,
    per: u32,
) -> Result<Option<Target>, N::Error> {
    if p.depth == 0 {
        return Ok(Some(Target::Array {
            steps: SmallVec::new(),
            block: ROOT,
            base: 0,
            at: p.slot,
        }));
    }
    let mut steps = SmallVec::new();
    let mut step = Step {
        block: ROOT,
        at: p.slot,
    };
    let mut span = p.span;
    // First block of the subtree, and the last one looked for, counted from there.
    let mut base = last - u32::try_from(p.rel).unwrap_or(0);
    let mut rel = p.rel;
    for level in (1..=p.depth).rev() {
        steps.push(step);
        let block = u64::from(look(nodes, root, step.block, |data| {
            pointer(data, step.at)
        })?);
        if block == 0 {
            return Ok(Some(Target::Skip(base)));
        }
        if !nodes.bounds().holds(block, 1) {
            return Err(nodes.corrupt("block map: pointer outside the filesystem", step.block));
        }
        span /= u64::from(per);
        let high = (rel / span) as usize;
        if level == 1 {
            return Ok(Some(Target::Array {
                steps,
                block,
                base,
                at: high,
            }));
        }
        let (last_set, any) = nodes.read(block, |data| {
            let last_set = (0..=high).rev().find(|i| pointer(data, *i) != 0);
            (last_set, last_set.is_some() || data.iter().any(|b| *b != 0))
        })?;
        let Some(at) = last_set else {
            // A block kept by what lies behind the range, or empty and only in part in the range:
            // an empty one is of no use to anybody.
            return Ok(Some(if any {
                Target::Skip(base)
            } else {
                Target::Empty { steps, base }
            }));
        };
        let child = u64::from(base) + at as u64 * span;
        base = u32::try_from(child).unwrap_or(u32::MAX);
        if child + span <= u64::from(from) {
            return Ok(None);
        }
        rel = if at == high { rel % span } else { span - 1 };
        step = Step { block, at };
    }
    Ok(None)
}

/// Frees the pointer block that the last of `steps` points at, and those above that become empty.
fn unlink<N: NodesMut>(nodes: &mut N, root: &mut [u8], steps: &[Step]) -> Result<(), N::Error> {
    for step in steps.iter().rev() {
        let (gone, empty) = change(nodes, root, step.block, |data| {
            let gone = pointer(data, step.at);
            set_pointer(data, step.at, 0);
            (gone, data.iter().all(|b| *b == 0))
        })?;
        if gone != 0 {
            nodes.free(u64::from(gone))?;
        }
        if !empty {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
