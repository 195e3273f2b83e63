//! Whether all directories hang together, and everything has as many names as it says.

use super::inodes::ROOT_INO;
use super::{Cx, Finding, State};
use crate::format::features::Compat;

/// A directory with more is said to have one link.
const LINK_MAX: u32 = 65_000;
const BAD_BLOCKS_INO: u32 = 1;

/// Checks the tree and the link counts.
pub(super) fn check(cx: &Cx<'_>, state: &mut State) {
    if !state.inos.used.has(ROOT_INO.into()) || !state.inos.dirs.has(ROOT_INO.into()) {
        state.tell(Finding::NoRoot);
    }
    connect(state);
    count(cx, state);
}

fn connect(state: &mut State) {
    for at in 0..state.dirs.len() {
        climb(state, at);
        let dir = &state.dirs[at];
        let (dir, found, want) = (dir.ino, dir.dotdot, dir.parent);
        if found != want {
            state.tell(Finding::DotDot { dir, found, want });
        }
    }
}

fn place_of(state: &State, dir: u32) -> Option<usize> {
    // The list is sorted, as the inodes were looked at in order.
    state.dirs.binary_search_by_key(&dir, |dir| dir.ino).ok()
}

/// Goes up to the root or to what was connected before; each directory is passed once.
fn climb(state: &mut State, start: usize) {
    let by = state.dirs[start].ino;
    let mut at = start;
    loop {
        let dir = &mut state.dirs[at];
        let ino = dir.ino;
        if ino == ROOT_INO {
            return;
        }
        if dir.passed_by != 0 {
            if dir.passed_by == by {
                state.tell(Finding::Circle { dir: ino });
            }
            return;
        }
        dir.passed_by = by;
        let parent = dir.parent;
        match place_of(state, parent) {
            Some(next) => at = next,
            None => {
                state.tell(Finding::Unconnected { dir: ino });
                return;
            }
        }
    }
}

fn count(cx: &Cx<'_>, state: &mut State) {
    let geo = cx.geo;
    for group in 0..geo.group_count {
        let scanned = state.links.get(group as usize).map_or(0, Vec::len);
        let first = group * geo.inodes_per_group + 1;
        for ino in first..first + scanned as u32 {
            count_one(cx, state, ino);
        }
    }
}

fn count_one(cx: &Cx<'_>, state: &mut State, ino: u32) {
    let geo = cx.geo;
    let is_reserved = ino > ROOT_INO && ino < geo.first_ino;
    let is_hidden = ino == geo.orphan_file_inum || ino == cx.raw.s_prj_quota_inum.get();
    if is_reserved || is_hidden || ino == BAD_BLOCKS_INO || !state.inos.used.has(ino.into()) {
        return;
    }
    let Some(&mut (found, counted)) = state.links_of(geo, ino) else {
        return;
    };
    let found = u32::from(found);
    if counted == 0 {
        state.tell(Finding::Unattached { ino });
        return;
    }
    let is_dir = state.inos.dirs.has(ino.into());
    let want = if is_dir && counted > LINK_MAX {
        1
    } else {
        counted
    };
    // A directory that once had too many to count says so for good.
    let gave_up = is_dir
        && found == 1
        && want > 1
        && geo.compat.contains(Compat::DIR_INDEX)
        && is_indexed(state, ino);
    if found != want && !gave_up {
        state.tell(Finding::Links { ino, found, want });
    }
}

fn is_indexed(state: &State, ino: u32) -> bool {
    place_of(state, ino).is_some_and(|at| state.dirs[at].is_indexed)
}
