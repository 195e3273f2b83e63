//! A set of blocks, in runs.

use std::collections::BTreeMap;

use crate::alloc::Run;

/// A set of blocks; first block to the block after the last, no two runs touch.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    pub(super) fn insert(&mut self, start: u64, len: u32) {
        let (mut start, mut end) = (start, start.saturating_add(len.into()));
        if start == end {
            return;
        }
        while let Some((&other, &other_end)) = self.0.range(..=end).next_back() {
            if other_end < start {
                break;
            }
            self.0.remove(&other);
            start = start.min(other);
            end = end.max(other_end);
        }
        self.0.insert(start, end);
    }

    pub(super) fn remove(&mut self, start: u64, len: u32) {
        let end = start.saturating_add(len.into());
        if start == end {
            return;
        }
        while let Some((&other, &other_end)) = self.0.range(..end).next_back() {
            if other_end <= start {
                break;
            }
            self.0.remove(&other);
            if other < start {
                self.0.insert(other, start);
            }
            if other_end > end {
                self.0.insert(end, other_end);
            }
        }
    }

    /// The runs, cut where one is longer than a run can be.
    pub(super) fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        self.0.iter().flat_map(|(&start, &end)| {
            let step = 1 << 30;
            (start..end).step_by(step).map(move |start| Run {
                start,
                len: u32::try_from(end - start).map_or(step as u32, |left| left.min(step as u32)),
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

    use super::Ranges;

    proptest! {
        #[test]
        fn behaves_like_a_set_of_blocks(
            steps in proptest::collection::vec((any::<bool>(), 0..60u64, 0..20u32), 0..40),
        ) {
            let mut ranges = Ranges::default();
            let mut model = BTreeSet::new();
            for (insert, start, len) in steps {
                let blocks = start..start + u64::from(len);
                if insert {
                    ranges.insert(start, len);
                    model.extend(blocks);
                } else {
                    ranges.remove(start, len);
                    model.retain(|block| !blocks.contains(block));
                }
                let runs: Vec<_> = ranges.runs().collect();
                let found: Vec<u64> = runs
                    .iter()
                    .flat_map(|run| run.start..run.start + u64::from(run.len))
                    .collect();
                prop_assert_eq!(&found, &model.iter().copied().collect::<Vec<_>>());
                let apart = |pair: &[crate::alloc::Run]| {
                    pair[0].start + u64::from(pair[0].len) < pair[1].start
                };
                prop_assert!(runs.windows(2).all(apart));
            }
        }
    }

    #[test]
    fn long_runs_are_cut() {
        let mut ranges = Ranges::default();
        (0..3).for_each(|at| ranges.insert(5 + at * 0x8000_0000, 0x8000_0000));
        let len: u64 = ranges.runs().map(|run| u64::from(run.len)).sum();
        assert_eq!(len, 0x1_8000_0000);
    }
}
