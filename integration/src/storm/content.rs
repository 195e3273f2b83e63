//! What a file should contain, without holding the bytes.
//!
//! Every write gets a *stamp*, a number never used twice by one worker. The byte of stamp `s` at
//! position `p` is a pure function of (seed, worker, s, p), so a file is a map from offsets to
//! (stamp, position) and its bytes can be made again at any time: by the worker that compares,
//! after a remount, or after a crash from the log alone.

use std::collections::BTreeMap;

use super::rng::mix;

/// Makes the bytes of stamps for one worker of one run.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    key: u64,
}

impl Source {
    /// Makes the source of worker `worker` in the run of `seed`.
    pub fn new(seed: u64, worker: u64) -> Self {
        Self {
            key: mix(seed ^ mix(worker.wrapping_add(0x5707_0001))),
        }
    }

    /// Fills `buf` with the bytes of `stamp` from position `pos` on; stamp 0 is zeros.
    pub fn fill(&self, stamp: u64, pos: u64, buf: &mut [u8]) {
        if stamp == 0 {
            buf.fill(0);
            return;
        }
        let base = mix(self.key ^ mix(stamp));
        let word = |index: u64| mix(base.wrapping_add(index)).to_le_bytes();
        let head = ((8 - pos % 8) % 8).min(buf.len() as u64) as usize;
        let (first, rest) = buf.split_at_mut(head);
        if head > 0 {
            let skip = (pos % 8) as usize;
            first.copy_from_slice(&word(pos / 8)[skip..skip + head]);
        }
        let mut index = (pos + head as u64) / 8;
        let mut chunks = rest.chunks_exact_mut(8);
        for chunk in &mut chunks {
            chunk.copy_from_slice(&word(index));
            index += 1;
        }
        let tail = chunks.into_remainder();
        let len = tail.len();
        tail.copy_from_slice(&word(index)[..len]);
    }

    /// Returns `len` bytes of `stamp` from its start.
    pub fn bytes(&self, stamp: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.fill(stamp, 0, &mut bytes);
        bytes
    }
}

/// A run of bytes of one stamp; stamp 0 is allocated space that reads as zeros.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Extent {
    /// Length in bytes, never 0.
    pub len: u64,
    /// The stamp of the write the bytes came from.
    pub stamp: u64,
    /// Position within the stamp of the first byte.
    pub pos: u64,
}

/// Extents by file offset, not overlapping; gaps read as zeros.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ExtentMap {
    map: BTreeMap<u64, Extent>,
    total: u64,
}

impl ExtentMap {
    /// Iterates over the extents by ascending offset.
    pub fn iter(&self) -> impl Iterator<Item = (u64, Extent)> + '_ {
        self.map.iter().map(|(&off, &ext)| (off, ext))
    }

    /// Returns the number of bytes covered.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Tells whether `off` lies in an extent.
    pub fn covers(&self, off: u64) -> bool {
        self.map
            .range(..=off)
            .next_back()
            .is_some_and(|(&start, ext)| off - start < ext.len)
    }

    /// Takes `len` bytes at `off` out.
    pub fn clear(&mut self, off: u64, len: u64) {
        let end = off.saturating_add(len);
        self.split_at(off);
        self.split_at(end);
        let gone: Vec<u64> = self.map.range(off..end).map(|(&start, _)| start).collect();
        for start in gone {
            if let Some(ext) = self.map.remove(&start) {
                self.total -= ext.len;
            }
        }
    }

    /// Puts `ext` at `off` in place of what was there.
    pub fn put(&mut self, off: u64, ext: Extent) {
        if ext.len == 0 {
            return;
        }
        self.clear(off, ext.len);
        self.insert_raw(off, ext);
    }

    /// Covers the gaps within the range with zeros.
    pub fn fill_gaps(&mut self, off: u64, len: u64) {
        let end = off.saturating_add(len);
        let mut at = off;
        for (start, ext) in self.slice(off, len) {
            if start > at {
                self.insert_raw(
                    at,
                    Extent {
                        len: start - at,
                        stamp: 0,
                        pos: 0,
                    },
                );
            }
            at = start + ext.len;
        }
        if at < end {
            self.insert_raw(
                at,
                Extent {
                    len: end - at,
                    stamp: 0,
                    pos: 0,
                },
            );
        }
    }

    /// Returns the extents of a range, cut to it.
    pub fn slice(&self, off: u64, len: u64) -> Vec<(u64, Extent)> {
        let end = off.saturating_add(len);
        let first = self
            .map
            .range(..=off)
            .next_back()
            .map_or(off, |(&start, _)| start);
        let mut found = Vec::new();
        for (&start, &ext) in self.map.range(first..end) {
            let from = start.max(off);
            let to = (start + ext.len).min(end);
            if from < to {
                let pos = ext.pos + (from - start);
                found.push((
                    from,
                    Extent {
                        len: to - from,
                        stamp: ext.stamp,
                        pos,
                    },
                ));
            }
        }
        found
    }

    /// Takes `len` bytes at `off` out and moves what follows down.
    pub fn collapse(&mut self, off: u64, len: u64) {
        self.clear(off, len);
        let moved = self.map.split_off(&off);
        self.map
            .extend(moved.into_iter().map(|(start, ext)| (start - len, ext)));
    }

    /// Moves what lies at or behind `off` up by `len`, which leaves a gap.
    pub fn insert(&mut self, off: u64, len: u64) {
        self.split_at(off);
        let moved = self.map.split_off(&off);
        self.map
            .extend(moved.into_iter().map(|(start, ext)| (start + len, ext)));
    }

    /// Makes the bytes of the range that starts at `off`.
    pub fn render(&self, source: &Source, off: u64, buf: &mut [u8]) {
        buf.fill(0);
        for (start, ext) in self.slice(off, buf.len() as u64) {
            let from = (start - off) as usize;
            source.fill(ext.stamp, ext.pos, &mut buf[from..from + ext.len as usize]);
        }
    }

    fn insert_raw(&mut self, off: u64, ext: Extent) {
        self.total += ext.len;
        self.map.insert(off, ext);
    }

    fn split_at(&mut self, at: u64) {
        let Some((&start, &ext)) = self.map.range(..at).next_back() else {
            return;
        };
        if at - start >= ext.len {
            return;
        }
        let left = at - start;
        self.map.insert(start, Extent { len: left, ..ext });
        self.map.insert(
            at,
            Extent {
                len: ext.len - left,
                stamp: ext.stamp,
                pos: ext.pos + left,
            },
        );
    }
}

/// Size and extents of a regular file.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct FileData {
    /// The size `stat` should report.
    pub size: u64,
    /// The content; may reach past `size` where space was allocated with `KEEP_SIZE`.
    pub map: ExtentMap,
}

impl FileData {
    /// Applies a write of `len` bytes of `stamp`; positions are file offsets, so that stale bytes
    /// can be told from misplaced ones.
    pub fn write(&mut self, off: u64, len: u64, stamp: u64) {
        self.map.put(
            off,
            Extent {
                len,
                stamp,
                pos: off,
            },
        );
        self.size = self.size.max(off + len);
    }

    /// Applies a copy of `len` bytes into this file; `from` are the extents of the source.
    pub fn copy_in(&mut self, from: &[(u64, Extent)], src_off: u64, off: u64, len: u64) {
        self.map.put(
            off,
            Extent {
                len,
                stamp: 0,
                pos: 0,
            },
        );
        for &(start, ext) in from {
            self.map.put(off + (start - src_off), ext);
        }
        self.size = self.size.max(off + len);
    }

    /// Applies a change of the size; shrinking also gives back space past the new end.
    pub fn truncate(&mut self, size: u64) {
        if size <= self.size {
            self.map.clear(size, u64::MAX - size);
        } else {
            // Space allocated past the end becomes part of the file and reads as zeros; it is
            // stamp 0 already, because writes never leave content behind the end.
        }
        self.size = size;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storm::rng::Rng;

    #[test]
    fn bytes_depend_on_the_position_alone() {
        let source = Source::new(3, 1);
        let whole = source.bytes(9, 100);
        for start in 0..40 {
            for len in [0, 1, 3, 7, 8, 9, 31] {
                let mut part = vec![0; len];
                source.fill(9, start as u64, &mut part);
                assert_eq!(part, whole[start..start + len], "start {start} len {len}");
            }
        }
    }

    /// The extent map against plain bytes under random edits.
    #[test]
    fn extents_render_what_plain_bytes_hold() {
        const SPACE: u64 = 400;
        let source = Source::new(5, 0);
        let mut rng = Rng::new(11, 0);
        let mut file = FileData::default();
        let mut plain: Vec<u8> = Vec::new();
        for stamp in 1..4000_u64 {
            let off = rng.below(SPACE);
            let len = rng.within(1, 60);
            let size = plain.len() as u64;
            match rng.below(6) {
                0 | 1 => {
                    file.write(off, len, stamp);
                    plain.resize(plain.len().max((off + len) as usize), 0);
                    source.fill(stamp, off, &mut plain[off as usize..(off + len) as usize]);
                }
                2 => {
                    file.truncate(off);
                    plain.resize(off as usize, 0);
                }
                3 if off + len < size => {
                    file.map.collapse(off, len);
                    file.size -= len;
                    plain.drain(off as usize..(off + len) as usize);
                }
                4 if off < size && size + len < SPACE => {
                    file.map.insert(off, len);
                    file.size += len;
                    let gap = vec![0; len as usize];
                    plain.splice(off as usize..off as usize, gap);
                }
                5 => {
                    file.map.fill_gaps(off, len);
                    let total: u64 = file.map.iter().map(|(_, ext)| ext.len).sum();
                    assert_eq!(total, file.map.total());
                }
                _ => {}
            }
            let mut rendered = vec![0; plain.len()];
            file.map.render(&source, 0, &mut rendered);
            assert_eq!(rendered, plain);
            assert_eq!(file.size, plain.len() as u64);
        }
    }
}
