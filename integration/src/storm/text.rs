//! Words of the text formats: escaped bytes and fields of a line.

use std::str::FromStr;

/// Escapes bytes into one word of printable ASCII; the empty string becomes `%`.
pub fn escape(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return "%".to_owned();
    }
    let mut word = String::with_capacity(bytes.len());
    for &byte in bytes {
        if byte.is_ascii_graphic() && !b"%=,;".contains(&byte) {
            word.push(char::from(byte));
        } else {
            word.push_str(&format!("%{byte:02x}"));
        }
    }
    word
}

/// Undoes [`escape`]; `None` when the word is damaged.
pub fn unescape(word: &str) -> Option<Vec<u8>> {
    if word == "%" {
        return Some(Vec::new());
    }
    let mut bytes = Vec::with_capacity(word.len());
    let mut rest = word.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte == b'%' {
            let (hex, tail) = tail.split_at_checked(2)?;
            bytes.push(u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok()?);
            rest = tail;
        } else {
            bytes.push(byte);
        }
    }
    Some(bytes)
}

/// Takes a line apart word by word; every error names the field.
pub struct Words<'a>(std::str::Split<'a, char>);

impl<'a> Words<'a> {
    /// Starts at the first word of `line`.
    pub fn new(line: &'a str) -> Self {
        Self(line.split(' '))
    }

    /// Takes the next word.
    pub fn word(&mut self, field: &str) -> Result<&'a str, String> {
        self.0.next().ok_or_else(|| format!("{field}: missing"))
    }

    /// Takes the next word as a number.
    pub fn num<T: FromStr>(&mut self, field: &str) -> Result<T, String> {
        let word = self.word(field)?;
        parse(word, field)
    }

    /// Takes the next word as an octal mode.
    pub fn octal(&mut self, field: &str) -> Result<u32, String> {
        let word = self.word(field)?;
        u32::from_str_radix(word, 8).map_err(|e| format!("{field}: {e}: {word:?}"))
    }

    /// Takes the next word as escaped bytes.
    pub fn bytes(&mut self, field: &str) -> Result<Vec<u8>, String> {
        let word = self.word(field)?;
        unescape(word).ok_or_else(|| format!("{field}: damaged escape: {word:?}"))
    }

    /// Takes the next word as an escaped string.
    pub fn string(&mut self, field: &str) -> Result<String, String> {
        String::from_utf8(self.bytes(field)?).map_err(|e| format!("{field}: {e}"))
    }

    /// Returns what is left as one line.
    pub fn rest(self) -> String {
        self.0.collect::<Vec<_>>().join(" ")
    }
}

/// Parses a number; the error names the field.
pub fn parse<T: FromStr>(word: &str, field: &str) -> Result<T, String> {
    word.parse()
        .map_err(|_ignored| format!("{field}: not a number: {word:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bytes_survive_the_escape() {
        let all: Vec<u8> = (0..=255).collect();
        let word = escape(&all);
        assert!(word.bytes().all(|b| b.is_ascii_graphic()));
        assert_eq!(unescape(&word), Some(all));
        assert_eq!(unescape(&escape(b"")), Some(Vec::new()));
        assert_eq!(unescape("a%4"), None);
    }
}
