//! Checks the bytes of one file against all that they may be.

use std::fs::File;
use std::path::Path;

use super::super::compare;
use super::super::content::Source;
use super::super::error::{Context, Result, StormError};
use super::super::sys;
use super::history::FileStates;

const CHUNK: u64 = 1 << 20;

/// Checks size and content; `stale` also looks for bytes that no call wrote.
pub fn check(
    file: &File,
    path: &Path,
    states: &FileStates,
    source: &Source,
    stale: bool,
) -> Result<()> {
    let size = file.metadata().call("fstat", path)?.len();
    if size < states.size_low || size > states.size_high {
        let what = if states.is_synced {
            "size of a synced file"
        } else {
            "size"
        };
        let range = format!("{}..={}", states.size_low, states.size_high);
        return Err(StormError::mismatch(path, what, range, size));
    }
    for (start, end) in compare::ranges_to_read(file, path, &states.synced, size)? {
        let mut at = start;
        while at < end {
            let mut actual = vec![0; CHUNK.min(end - at) as usize];
            let count = sys::read_at(file, &mut actual, at).call("read", path)?;
            if count < actual.len() {
                let what = format!("bytes read at {at}");
                return Err(StormError::mismatch(path, what, actual.len(), count));
            }
            check_chunk(path, states, source, stale, at, &actual)?;
            at += count as u64;
        }
    }
    Ok(())
}

fn check_chunk(
    path: &Path,
    states: &FileStates,
    source: &Source,
    stale: bool,
    off: u64,
    actual: &[u8],
) -> Result<()> {
    let mut expected = vec![0; actual.len()];
    states.synced.map.render(source, off, &mut expected);
    if expected == actual {
        return Ok(());
    }
    let mut strange = vec![false; actual.len()];
    for (index, (want, have)) in expected.iter().zip(actual).enumerate() {
        let at = off + index as u64;
        if want == have {
            continue;
        }
        if at < states.synced.size && !states.touched.covers(at) {
            return compare::bytes(path, &states.synced, source, off, actual).map_err(|error| {
                let what = format!("synced content that nothing touched, at {at}");
                StormError::mismatch(path, what, "kept", error)
            });
        }
        let is_wild = states.wild_from.is_some_and(|from| at >= from);
        strange[index] = stale && *have != 0 && !is_wild;
    }
    explain(states, source, off, actual, &mut strange);
    match strange.iter().position(|&is_strange| is_strange) {
        None => Ok(()),
        Some(index) => {
            let end = actual.len().min(index + 16);
            let what = format!("content at {}", off + index as u64);
            let have = format!("{:02x?}", &actual[index..end]);
            Err(StormError::mismatch(
                path,
                what,
                "zeros or bytes that were written there",
                have,
            ))
        }
    }
}

/// Clears the marks of bytes that one of the later calls wrote.
fn explain(states: &FileStates, source: &Source, off: u64, actual: &[u8], strange: &mut [bool]) {
    let end = off + actual.len() as u64;
    for &(start, ext) in &states.later {
        let (from, to) = (start.max(off), (start + ext.len).min(end));
        if from >= to {
            continue;
        }
        let mut bytes = vec![0; (to - from) as usize];
        source.fill(ext.stamp, ext.pos + (from - start), &mut bytes);
        let base = (from - off) as usize;
        for (index, byte) in bytes.iter().enumerate() {
            if actual[base + index] == *byte {
                strange[base + index] = false;
            }
        }
    }
}
