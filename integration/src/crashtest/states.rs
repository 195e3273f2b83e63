//! Crash states: what a power cut after a part of a log can leave.

use std::ops::Range;

use blockstack::backend::mem::Image;
use blockstack::log_writes::{Cached, Entry, Fate, LogFlags};

use super::random::Random;

/// Sectors of a page.
const PAGE: usize = 8;

/// One state: the first `prefix` entries of the log, and the writes among those since the last
/// flush that are not on the disk as a whole.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct State {
    /// Entries of the log.
    pub prefix: usize,
    /// Entries and their fates, ascending; none is [`Fate::Kept`].
    pub broken: Vec<(usize, Fate)>,
}

/// Goes along a log.
#[derive(Clone)]
pub struct Cursor<'a> {
    entries: &'a [Entry],
    cached: Cached,
    /// Entries that `cached` has as uncertain.
    pending: Vec<usize>,
    at: usize,
}

impl<'a> Cursor<'a> {
    /// The start.
    #[must_use]
    pub fn new(origin: &Image, entries: &'a [Entry]) -> Self {
        Self {
            entries,
            cached: Cached::new(origin.clone()),
            pending: Vec::new(),
            at: 0,
        }
    }

    /// Takes one more entry; `in_flight`: it has not ended, so its being FUA means nothing yet.
    fn take(&mut self, in_flight: bool) {
        let Some(entry) = self.entries.get(self.at) else {
            return;
        };
        let before = self.cached.uncertain().len();
        if in_flight && entry.flags.contains(LogFlags::FUA) {
            let mut entry = entry.clone();
            entry.flags.remove(LogFlags::FUA);
            self.cached.apply(&entry);
        } else {
            self.cached.apply(entry);
        }
        let now = self.cached.uncertain().len();
        if now < before || entry.flags.contains(LogFlags::FLUSH) {
            self.pending.clear();
        }
        if now > self.pending.len() {
            self.pending.push(self.at);
        }
        self.at += 1;
    }

    /// Takes one more entry; `false` at the end.
    pub fn step(&mut self) -> bool {
        let more = self.at < self.entries.len();
        self.take(false);
        more
    }

    /// Entries taken.
    #[must_use]
    pub fn at(&self) -> usize {
        self.at
    }

    /// The state in which nothing is there that is not certain.
    #[must_use]
    pub fn all_lost(&self) -> State {
        let lost = self.pending.iter().map(|&entry| (entry, Fate::Lost));
        State {
            prefix: self.at,
            broken: lost.collect(),
        }
    }

    /// What becomes of the disk where the given entries are broken.
    #[must_use]
    pub fn outcome(&self, broken: &[(usize, Fate)]) -> Image {
        let fate = |index: &usize| {
            let found = broken.iter().find(|(entry, _)| entry == index);
            found.map_or(Fate::Kept, |(_, fate)| fate.clone())
        };
        let fates: Vec<_> = self.pending.iter().map(fate).collect();
        self.cached.outcome(&fates)
    }

    /// States after the entries taken so far and the one that comes next, which is on its way: at
    /// most `budget`, without those that are a prefix.
    #[must_use]
    pub fn variants(&self, budget: usize, random: &mut Random) -> (Self, Vec<State>) {
        let mut next = self.clone();
        next.take(true);
        let sectors: Vec<usize> = next.cached.uncertain().collect();
        let count = sectors.len();
        let mut all: Vec<Vec<(usize, Fate)>> = Vec::new();
        let Some(last) = count.checked_sub(1) else {
            return (next, Vec::new());
        };
        let lose = |index: usize| (next.pending[index], Fate::Lost);
        all.push((0..count).map(lose).collect());
        // The newest write torn, all before it there.
        let len = sectors[last];
        let mut cuts = vec![1, len / 2, len.saturating_sub(1)];
        cuts.extend((1..5).map(|page| page * PAGE));
        cuts.retain(|&cut| cut > 0 && cut < len);
        cuts.sort_unstable();
        cuts.dedup();
        for &cut in &cuts {
            let kept = std::iter::once(0..cut).collect();
            all.push(vec![(next.pending[last], Fate::Torn(kept))]);
        }
        if let Some(&cut) = cuts.first() {
            let kept = std::iter::once(cut..len).collect();
            all.push(vec![(next.pending[last], Fate::Torn(kept))]);
        }
        // One lost, or one alone there.
        if count > 1 {
            let some = if count <= 8 {
                (0..count).collect()
            } else {
                let mut some: Vec<usize> = (0..8).map(|_| random.index(count)).collect();
                some.sort_unstable();
                some.dedup();
                some
            };
            for index in some {
                all.push(vec![lose(index)]);
                all.push(
                    (0..count)
                        .filter(|&other| other != index)
                        .map(lose)
                        .collect(),
                );
            }
        }
        while all.len() > budget {
            all.swap_remove(random.index(all.len()));
        }
        // Any mixture, as far as there is more than one can tell apart.
        if count > 1 || len > 1 {
            for _ in all.len()..budget {
                let fates = (0..count).map(|index| (index, draw(sectors[index], random)));
                let broken = fates.filter(|(_, fate)| *fate != Fate::Kept);
                all.push(
                    broken
                        .map(|(index, fate)| (next.pending[index], fate))
                        .collect(),
                );
            }
        }
        let prefix = next.at;
        let states = all
            .into_iter()
            .map(|broken| State { prefix, broken })
            .collect();
        (next, states)
    }
}

fn draw(sectors: usize, random: &mut Random) -> Fate {
    let unit = if random.below(2) == 0 { 1 } else { PAGE };
    match random.below(8) {
        0..3 => Fate::Kept,
        3..6 => Fate::Lost,
        6 => Fate::Torn(std::iter::once(0..random.index(sectors / unit + 1) * unit).collect()),
        _ => {
            let mut kept: Vec<Range<usize>> = Vec::new();
            for from in (0..sectors).step_by(unit) {
                let to = (from + unit).min(sectors);
                match kept.last_mut() {
                    _ if random.below(2) == 0 => {}
                    Some(last) if last.end == from => last.end = to,
                    _ => kept.push(from..to),
                }
            }
            Fate::Torn(kept)
        }
    }
}

/// The disk in a state.
#[must_use]
pub fn build(origin: &Image, entries: &[Entry], state: &State) -> Image {
    let mut cursor = Cursor::new(origin, entries);
    let prefix = state.prefix.min(entries.len());
    let last = prefix.saturating_sub(1);
    while cursor.at < last {
        cursor.take(false);
    }
    if prefix > 0 {
        // A state that breaks its last write tells that it had not ended.
        cursor.take(state.broken.iter().any(|(entry, _)| *entry == last));
    }
    cursor.outcome(&state.broken)
}

impl State {
    /// In words that [`Self::parse`] reads: `crash 17 lost 12 torn 14 0-1,5-8`.
    #[must_use]
    pub fn print(&self) -> String {
        let mut text = format!("crash {}", self.prefix);
        for (entry, fate) in &self.broken {
            match fate {
                Fate::Kept => {}
                Fate::Lost => text += &format!(" lost {entry}"),
                Fate::Torn(kept) => {
                    let ranges: Vec<_> = kept
                        .iter()
                        .map(|r| format!("{}-{}", r.start, r.end))
                        .collect();
                    let ranges = if ranges.is_empty() {
                        "none".to_owned()
                    } else {
                        ranges.join(",")
                    };
                    text += &format!(" torn {entry} {ranges}");
                }
            }
        }
        text
    }

    /// Reads what [`Self::print`] wrote.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace();
        if words.next() != Some("crash") {
            return None;
        }
        let prefix = words.next()?.parse().ok()?;
        let mut broken = Vec::new();
        while let Some(word) = words.next() {
            let entry = words.next()?.parse().ok()?;
            let fate = match word {
                "lost" => Fate::Lost,
                "torn" => match words.next()? {
                    "none" => Fate::Torn(Vec::new()),
                    ranges => {
                        let range = |text: &str| {
                            let (from, to) = text.split_once('-')?;
                            Some(from.parse().ok()?..to.parse().ok()?)
                        };
                        Fate::Torn(ranges.split(',').map(range).collect::<Option<_>>()?)
                    }
                },
                _ => return None,
            };
            broken.push((entry, fate));
        }
        Some(Self { prefix, broken })
    }
}
