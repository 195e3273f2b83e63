//! A part of a block.

use std::ops::Range;

/// Bytes from `start` to `end` of a block; none where the two are equal.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Span {
    start: u32,
    end: u32,
}

impl Span {
    pub(crate) const EMPTY: Self = Self { start: 0, end: 0 };

    /// The part of `range` that lies in a block of `len` bytes.
    pub(crate) fn new(range: Range<usize>, len: usize) -> Self {
        let (start, end) = (range.start.min(len) as u32, range.end.min(len) as u32);
        if start < end {
            Self { start, end }
        } else {
            Self::EMPTY
        }
    }

    pub(crate) fn whole(len: usize) -> Self {
        Self::new(0..len, len)
    }

    pub(crate) fn is_empty(self) -> bool {
        self.start == self.end
    }

    pub(crate) fn covers(self, other: Self) -> bool {
        other.is_empty() || (self.start <= other.start && other.end <= self.end)
    }

    /// The shortest one that covers both, with what lies between them.
    pub(crate) fn join(self, other: Self) -> Self {
        if self.is_empty() {
            return other;
        }
        if other.is_empty() {
            return self;
        }
        Self {
            start: self.start.min(other.start),
            end: self.end.max(other.end),
        }
    }

    /// Grown to multiples of `align`, a power of two that divides the block.
    pub(crate) fn round_out(self, align: u32) -> Self {
        Self {
            start: self.start & !(align - 1),
            end: self.end.next_multiple_of(align),
        }
    }

    pub(crate) fn start(self) -> usize {
        self.start as usize
    }

    pub(crate) fn len(self) -> usize {
        (self.end - self.start) as usize
    }

    pub(crate) fn range(self) -> Range<usize> {
        self.start as usize..self.end as usize
    }

    /// As one word, for an atomic.
    pub(crate) fn pack(self) -> u64 {
        u64::from(self.start) << 32 | u64::from(self.end)
    }

    pub(crate) fn unpack(word: u64) -> Self {
        Self {
            start: (word >> 32) as u32,
            end: word as u32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Span;

    #[test]
    fn spans_join_over_the_gap_and_round_outward() {
        let (one, two) = (Span::new(10..20, 1024), Span::new(600..700, 1024));
        assert_eq!(one.join(two).range(), 10..700);
        assert_eq!(two.join(one), one.join(two));
        assert_eq!(one.join(Span::EMPTY), one);
        assert_eq!(Span::EMPTY.join(one), one);
        assert_eq!(two.round_out(512).range(), 512..1024);
        assert!(one.join(two).covers(two) && !one.covers(two) && one.covers(Span::EMPTY));
        assert_eq!(Span::unpack(two.pack()), two);
    }

    #[test]
    fn what_lies_outside_the_block_is_left_out() {
        assert_eq!(Span::new(1000..5000, 1024).range(), 1000..1024);
        assert!(Span::new(2000..3000, 1024).is_empty());
    }
}
