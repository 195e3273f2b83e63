//! The words of a table row, and what can be wrong with them.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::str::FromStr;

use blockstack::{BlkError, Sector, SectorCount};

/// Why a target could not be made, or did not understand a message.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum CtrError {
    /// The row ends too soon.
    #[error("word {word}, {name}: missing")]
    Missing {
        /// Position in the row, from 1.
        word: usize,
        /// What should stand there.
        name: &'static str,
    },
    /// The row goes on.
    #[error("word {word}: nothing more is expected: {value:?}")]
    Extra {
        /// Position in the row, from 1.
        word: usize,
        /// What stands there.
        value: String,
    },
    /// A word that is not what it should be.
    #[error("word {word}, {name}: not {want}: {value:?}")]
    Not {
        /// Position in the row, from 1.
        word: usize,
        /// What should stand there.
        name: &'static str,
        /// Of what kind that is.
        want: &'static str,
        /// What stands there.
        value: String,
    },
    /// A number outside its bounds.
    #[error("word {word}, {name}: {value} is not in {min}..={max}")]
    Bounds {
        /// Position in the row, from 1.
        word: usize,
        /// What should stand there.
        name: &'static str,
        /// What stands there.
        value: String,
        /// Least value.
        min: String,
        /// Greatest value.
        max: String,
    },
    /// A device that cannot be had.
    #[error("device {name:?}: {source}")]
    Device {
        /// As the row names it.
        name: String,
        /// Why.
        source: BlkError,
    },
    /// A range that is not on its device.
    #[error("device {dev:?}: {len} sectors from {start} end after the last of {capacity}")]
    RangePastEnd {
        /// The device's name.
        dev: String,
        /// First sector.
        start: Sector,
        /// Length.
        len: SectorCount,
        /// The device's size.
        capacity: SectorCount,
    },
    /// Arguments that are well-formed, but not together.
    #[error("{0}")]
    Unfit(&'static str),
    /// The target has no messages.
    #[error("target takes no messages")]
    NoMessages,
    /// A message the target does not know.
    #[error("unknown message {0:?}")]
    UnknownMessage(String),
}

/// Takes words off a row, one after the other.
#[derive(Debug)]
pub struct Args<'a> {
    words: &'a [&'a str],
    /// Position of the first word left, from 1.
    at: usize,
}

impl<'a> Args<'a> {
    /// Makes arguments of `words`, the first of which is the `first`th of its row.
    #[must_use]
    pub fn new(words: &'a [&'a str], first: usize) -> Self {
        Self { words, at: first }
    }

    /// The next word, where there is one.
    pub fn optional(&mut self) -> Option<&'a str> {
        let (first, rest) = self.words.split_first()?;
        self.words = rest;
        self.at += 1;
        Some(first)
    }

    /// The next word.
    ///
    /// # Errors
    /// Where there is none.
    pub fn word(&mut self, name: &'static str) -> Result<&'a str, CtrError> {
        self.optional().ok_or(CtrError::Missing {
            word: self.at,
            name,
        })
    }

    /// The next word as a position.
    ///
    /// # Errors
    /// Where there is none, or it is none.
    pub fn sector(&mut self, name: &'static str) -> Result<Sector, CtrError> {
        Ok(Sector::new(self.parse(name, "a sector number")?))
    }

    /// The next word as a length that is not zero.
    ///
    /// # Errors
    /// Where there is none, or it is none.
    pub fn sectors(&mut self, name: &'static str) -> Result<SectorCount, CtrError> {
        self.number(name, 1..=u64::MAX).map(SectorCount::new)
    }

    /// The next word as a number within `bounds`.
    ///
    /// # Errors
    /// Where there is none, or it is none, or not within.
    pub fn number<N: FromStr + PartialOrd + Display>(
        &mut self,
        name: &'static str,
        bounds: RangeInclusive<N>,
    ) -> Result<N, CtrError> {
        let word = self.at;
        let number: N = self.parse(name, "a number")?;
        if bounds.contains(&number) {
            return Ok(number);
        }
        Err(CtrError::Bounds {
            word,
            name,
            value: number.to_string(),
            min: bounds.start().to_string(),
            max: bounds.end().to_string(),
        })
    }

    fn parse<N: FromStr>(&mut self, name: &'static str, want: &'static str) -> Result<N, CtrError> {
        let word = self.at;
        let value = self.word(name)?;
        // `FromStr` of integers takes a sign; dmsetup does not.
        let digits = value.bytes().all(|byte| byte.is_ascii_digit());
        let parsed = if digits { value.parse().ok() } else { None };
        parsed.ok_or_else(|| CtrError::Not {
            word,
            name,
            want,
            value: value.to_owned(),
        })
    }

    /// The next word as one of `choices`.
    ///
    /// # Errors
    /// Where there is none, or it is another.
    pub fn choice<C: Copy>(
        &mut self,
        name: &'static str,
        want: &'static str,
        choices: &[(&str, C)],
    ) -> Result<C, CtrError> {
        let word = self.at;
        let value = self.word(name)?;
        let chosen = choices.iter().find(|(text, _)| *text == value);
        chosen.map(|&(_, choice)| choice).ok_or(CtrError::Not {
            word,
            name,
            want,
            value: value.to_owned(),
        })
    }

    /// Words left.
    #[must_use]
    pub fn left(&self) -> usize {
        self.words.len()
    }

    /// Checks that nothing is left.
    ///
    /// # Errors
    /// Where a word is.
    pub fn finish(&mut self) -> Result<(), CtrError> {
        match self.words.first() {
            None => Ok(()),
            Some(value) => Err(CtrError::Extra {
                word: self.at,
                value: (*value).to_owned(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Args, CtrError};

    #[test]
    fn errors_name_word_argument_and_value() {
        let mut args = Args::new(&["mem0", "12x", "+5", "9", "rest"], 4);
        assert_eq!(args.word("device"), Ok("mem0"));
        let error = args.sector("start").unwrap_err();
        assert_eq!(
            error.to_string(),
            "word 5, start: not a sector number: \"12x\""
        );
        assert!(matches!(
            args.number("count", 0..=9u32),
            Err(CtrError::Not { word: 6, .. })
        ));
        let error = args.number("count", 1..=4u32).unwrap_err();
        assert_eq!(error.to_string(), "word 7, count: 9 is not in 1..=4");
        let error = args.finish().unwrap_err();
        assert_eq!(
            error.to_string(),
            "word 8: nothing more is expected: \"rest\""
        );
        args.optional();
        let error = args.word("leg").unwrap_err();
        assert_eq!(error.to_string(), "word 9, leg: missing");
    }

    #[test]
    fn numbers_too_large_are_refused() {
        let mut args = Args::new(&["18446744073709551616"], 1);
        assert!(args.sector("start").is_err());
    }
}
