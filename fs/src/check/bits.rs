//! A set of numbers below a bound, one bit for each.

/// The set; its memory is used again by [`Bits::reset`].
#[derive(Debug, Default)]
pub(super) struct Bits {
    words: Vec<u64>,
    len: u64,
}

impl Bits {
    /// Makes it an empty set of numbers below `len`.
    pub(super) fn reset(&mut self, len: u64) {
        self.words.clear();
        // A set that cannot be addressed could not be reached by a number either.
        let words = usize::try_from(len.div_ceil(64)).unwrap_or(usize::MAX);
        self.words.resize(words, 0);
        self.len = len;
    }

    pub(super) fn has(&self, at: u64) -> bool {
        at < self.len && self.words[(at / 64) as usize] >> (at % 64) & 1 == 1
    }

    /// Adds a number; answers whether it was new.
    pub(super) fn add(&mut self, at: u64) -> bool {
        if at >= self.len {
            return false;
        }
        let word = &mut self.words[(at / 64) as usize];
        let bit = 1 << (at % 64);
        let is_new = *word & bit == 0;
        *word |= bit;
        is_new
    }

    /// Adds `len` numbers from `at` on, which must lie below the bound; answers how many of them
    /// were there, and the first.
    pub(super) fn add_range(&mut self, at: u64, len: u64) -> (u64, u64) {
        let end = (at.saturating_add(len)).min(self.len);
        let (mut old, mut first) = (0, at);
        let mut from = at;
        while from < end {
            let upto = ((from | 63) + 1).min(end);
            let count = upto - from;
            let mask = (!0 >> (64 - count)) << (from % 64);
            let word = &mut self.words[(from / 64) as usize];
            let both = *word & mask;
            if both != 0 {
                if old == 0 {
                    first = (from & !63) + u64::from(both.trailing_zeros());
                }
                old += u64::from(both.count_ones());
            }
            *word |= mask;
            from = upto;
        }
        (old, first)
    }

    /// The 64 bits from `at` on, as far as there are so many.
    pub(super) fn word(&self, at: u64) -> u64 {
        let (index, shift) = ((at / 64) as usize, at % 64);
        let low = self.words.get(index).copied().unwrap_or(0) >> shift;
        if shift == 0 {
            return low;
        }
        low | self.words.get(index + 1).copied().unwrap_or(0) << (64 - shift)
    }
}

#[cfg(test)]
mod tests {
    use super::Bits;

    #[test]
    fn a_range_tells_what_was_there() {
        let mut bits = Bits::default();
        bits.reset(300);
        assert_eq!(bits.add_range(60, 140), (0, 60));
        assert!(!bits.has(59) && bits.has(60) && bits.has(199) && !bits.has(200));
        assert_eq!(bits.add_range(190, 100), (10, 190));
        assert_eq!(bits.add_range(0, 61), (1, 60));
        assert!(!bits.add(5) && bits.add(295) && !bits.add(300));
        assert_eq!(bits.word(295), 1);
        assert_eq!(bits.word(290) & 0x3f, 0x20);
        assert_eq!(bits.word(10), !0);
    }
}
