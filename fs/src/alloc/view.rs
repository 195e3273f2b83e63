//! What can be handed out in one group: a bitmap in memory, one bit for each free item.
//!
//! # Invariants
//! 1. A set bit means: free on disk, not reserved, not freed by a transaction still uncommitted,
//!    and not part of the file system's own metadata. The owner of the view keeps this.
//! 2. `free` is the number of set bits.
//! 3. No bit is set below word `low`.
//! 4. No run of set bits is longer than `largest`.

/// A run of bits.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Span {
    pub(crate) start: u32,
    pub(crate) len: u32,
}

/// The free items of one group; see the module documentation.
#[derive(Debug)]
pub(crate) struct FreeMap {
    words: Box<[u64]>,
    bits: u32,
    free: u32,
    low: usize,
    largest: u32,
}

/// Runs looked at before the best so far must do; the kernel's `mb_max_to_scan`.
const MAX_RUNS: u32 = 200;

impl FreeMap {
    /// Makes a view of an on-disk bitmap, in which a set bit is a used item; bits missing there
    /// count as used.
    pub(crate) fn from_used(bitmap: &[u8], bits: u32) -> Self {
        let mut words: Box<[u64]> = bitmap
            .chunks(8)
            .map(|c| {
                let mut w = [0xffu8; 8];
                w[..c.len()].copy_from_slice(c);
                !u64::from_le_bytes(w)
            })
            .chain(std::iter::repeat(0))
            .take(word(bits.saturating_add(63)))
            .collect();
        if bits % 64 != 0
            && let Some(last) = words.last_mut()
        {
            *last &= (1 << (bits % 64)) - 1;
        }
        let free = words.iter().map(|w| w.count_ones()).sum();
        Self {
            words,
            bits,
            free,
            low: 0,
            largest: free,
        }
    }

    /// Returns the number of free items.
    pub(crate) fn free(&self) -> u32 {
        self.free
    }

    /// Returns an upper bound of the longest run.
    pub(crate) fn largest(&self) -> u32 {
        self.largest
    }

    /// Returns the length of the free run that begins at `start`, at most `max`.
    pub(crate) fn run_at(&self, start: u32, max: u32) -> u32 {
        let end = start.saturating_add(max).min(self.bits);
        if start >= end {
            0
        } else {
            self.next(start, end, 0) - start
        }
    }

    /// Finds a free run of `want` items, first at or after `near`, then before it; or the longest
    /// of those seen. The run returned is never longer than `want`.
    pub(crate) fn find(&mut self, near: u32, want: u32) -> Option<Span> {
        if self.free == 0 || want == 0 {
            return None;
        }
        let near = if near < self.bits { near } else { 0 };
        let want = want.min(self.bits);
        let mut best = Span { start: 0, len: 0 };
        let mut seen = 0;
        for (from, to) in [(near, self.bits), (0, near)] {
            let mut pos = from.max(bit(self.low));
            loop {
                pos = self.next(pos, to, !0);
                if pos >= to {
                    break;
                }
                // A run may cross `near` from below: its end counts, not `to`.
                let cap = pos.saturating_add(want).min(self.bits);
                let end = self.next(pos, cap, 0);
                let len = end - pos;
                if len >= want {
                    return Some(Span {
                        start: pos,
                        len: want,
                    });
                }
                if len > best.len {
                    best = Span { start: pos, len };
                }
                seen += 1;
                if seen >= MAX_RUNS {
                    return Some(best);
                }
                pos = end;
            }
        }
        // Each run was seen whole (one that `near` cuts was seen from its start in the second
        // pass), so the bound is now exact.
        self.largest = best.len;
        (best.len > 0).then_some(best)
    }

    /// Marks a run as no longer free; false, with nothing changed, if part of it is not free.
    #[must_use]
    pub(crate) fn take(&mut self, s: Span) -> bool {
        if !self.all(s, !0) {
            return false;
        }
        self.each(s, |w, m| *w &= !m);
        self.free -= s.len;
        self.largest = self.largest.min(self.free);
        while self.words.get(self.low) == Some(&0) {
            self.low += 1;
        }
        true
    }

    /// Marks a run as free; false, with nothing changed, if part of it is free already.
    #[must_use]
    pub(crate) fn give(&mut self, s: Span) -> bool {
        if !self.all(s, 0) {
            return false;
        }
        self.each(s, |w, m| *w |= m);
        self.free += s.len;
        self.low = self.low.min(word(s.start));
        let before = s.start - self.run_start(s.start);
        let after = self.run_at(s.start + s.len, self.bits);
        self.largest = self.largest.max(before + s.len + after);
        true
    }

    /// Marks whatever is free of a run as not free: metadata found where the bitmap had none.
    /// Returns how many items that were.
    pub(crate) fn exclude(&mut self, s: Span) -> u32 {
        let before = self.free;
        let end = s.start.saturating_add(s.len).min(self.bits);
        let mut pos = s.start;
        loop {
            pos = self.next(pos, end, !0);
            if pos >= end {
                break;
            }
            let len = self.run_at(pos, end - pos);
            if !self.take(Span { start: pos, len }) {
                break;
            }
            pos += len;
        }
        before - self.free
    }

    /// Returns the first free item at or after `from`, else the first of all.
    pub(crate) fn first(&self, from: u32) -> Option<u32> {
        let low = bit(self.low);
        let pos = self.next(from.max(low), self.bits, !0);
        if pos < self.bits {
            return Some(pos);
        }
        let pos = self.next(low, self.bits, !0);
        (pos < self.bits).then_some(pos)
    }

    /// Returns the first bit in `from..to` that equals the bits of `like`, or `to`.
    fn next(&self, from: u32, to: u32, like: u64) -> u32 {
        if from >= to {
            return to;
        }
        let flip = !like;
        let mut i = word(from);
        let mut mask = !0u64 << (from % 64);
        while let Some(w) = self.words.get(i) {
            let hit = (w ^ flip) & mask;
            if hit != 0 {
                return (bit(i) + hit.trailing_zeros()).min(to);
            }
            i += 1;
            if bit(i) >= to {
                break;
            }
            mask = !0;
        }
        to
    }

    /// Returns the start of the free run that ends before `end`, or `end`.
    fn run_start(&self, end: u32) -> u32 {
        let mut pos = end;
        while pos > 0 {
            let i = word(pos - 1);
            let Some(w) = self.words.get(i) else { break };
            // Bits of this word below `pos`, moved to the top.
            let below = pos - bit(i);
            let ones = (!(w << (64 - below))).leading_zeros().min(below);
            pos -= ones;
            if ones < below {
                break;
            }
        }
        pos
    }

    fn all(&self, s: Span, like: u64) -> bool {
        match s.start.checked_add(s.len) {
            Some(end) if end <= self.bits && s.len > 0 => self.next(s.start, end, !like) == end,
            _ => false,
        }
    }

    fn each(&mut self, s: Span, f: impl Fn(&mut u64, u64)) {
        let end = s.start + s.len;
        let mut pos = s.start;
        while pos < end {
            let n = (end - pos).min(64 - pos % 64);
            let mask = (!0u64 >> (64 - n)) << (pos % 64);
            if let Some(w) = self.words.get_mut(word(pos)) {
                f(w, mask);
            }
            pos += n;
        }
    }
}

fn word(bit: u32) -> usize {
    (bit / 64) as usize
}

fn bit(word: usize) -> u32 {
    (word as u32).saturating_mul(64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{Strategy, any, prop_assert, prop_assert_eq, prop_oneof, proptest};

    use super::*;

    #[derive(Clone, Debug)]
    enum Op {
        Take(u32, u32),
        Give(u32, u32),
        Exclude(u32, u32),
        Find(u32, u32),
        First(u32),
    }

    fn ops(bits: u32) -> impl Strategy<Value = Vec<Op>> {
        let range = move || (0..bits + 10, prop_oneof![1..8u32, 1..bits + 10]);
        proptest::collection::vec(
            prop_oneof![
                range().prop_map(|(s, l)| Op::Take(s, l)),
                range().prop_map(|(s, l)| Op::Give(s, l)),
                range().prop_map(|(s, l)| Op::Exclude(s, l)),
                range().prop_map(|(s, l)| Op::Find(s, l)),
                (0..bits).prop_map(Op::First),
            ],
            1..60,
        )
    }

    fn longest(model: &[bool]) -> u32 {
        model
            .split(|f| !f)
            .map(|r| r.len() as u32)
            .max()
            .unwrap_or(0)
    }

    proptest! {
        #[test]
        fn behaves_like_a_list_of_bools(
            bytes in proptest::collection::vec(prop_oneof![0u8..=255, 0u8..1, 255u8..=255], 40),
            bits in 1u32..330,
            ops in ops(320),
        ) {
            let mut map = FreeMap::from_used(&bytes, bits);
            let mut model: Vec<bool> = (0..bits as usize)
                .map(|i| i / 8 < bytes.len() && bytes[i / 8] >> (i % 8) & 1 == 0)
                .collect();
            for op in ops {
                match op {
                    Op::Take(s, l) | Op::Give(s, l) => {
                        let give = matches!(op, Op::Give(..));
                        let span = Span { start: s, len: l };
                        let range = s as usize..(s + l) as usize;
                        let fits = model.get(range.clone())
                            .is_some_and(|r| r.iter().all(|f| *f != give));
                        prop_assert_eq!(if give { map.give(span) } else { map.take(span) }, fits);
                        if fits {
                            model[range].fill(give);
                        }
                    }
                    Op::Exclude(s, l) => {
                        let mut n = 0;
                        for f in model.iter_mut().skip(s as usize).take(l as usize) {
                            n += u32::from(*f);
                            *f = false;
                        }
                        prop_assert_eq!(map.exclude(Span { start: s, len: l }), n);
                    }
                    Op::Find(near, want) => {
                        let want = want.min(bits);
                        match map.find(near, want) {
                            None => prop_assert!(!model.contains(&true)),
                            Some(s) => {
                                let r = &model[s.start as usize..(s.start + s.len) as usize];
                                prop_assert!(r.iter().all(|f| *f));
                                prop_assert_eq!(s.len, want.min(longest(&model)));
                            }
                        }
                    }
                    Op::First(from) => {
                        let at = model.iter().skip(from as usize).position(|f| *f)
                            .map(|i| i as u32 + from)
                            .or(model.iter().position(|f| *f).map(|i| i as u32));
                        prop_assert_eq!(map.first(from), at);
                    }
                }
                prop_assert_eq!(map.free() as usize, model.iter().filter(|f| **f).count());
                prop_assert!(map.largest() >= longest(&model));
            }
        }

        #[test]
        fn a_run_is_seen_whole(start in 0u32..200, len in 1u32..100, near in any::<u32>()) {
            let mut map = FreeMap::from_used(&[0xff; 40], 320);
            let span = Span { start, len };
            prop_assert!(map.give(span));
            prop_assert_eq!(map.run_at(start, 320), len);
            prop_assert_eq!(map.largest(), len);
            let near = near % 320;
            let got = map.find(near, len + 1);
            prop_assert_eq!(got.map(|s| s.len), Some(len));
        }
    }
}
