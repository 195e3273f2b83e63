//! Logs of writes, read and written.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;

use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::format::{ENTRY_HEAD, LogError, LogFlags, MAGIC, RawLogEntry, RawLogSuper, VERSION};
use crate::backend::mem::Image;
use crate::units::SECTOR_SIZE;

/// What an entry wrote.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Data {
    /// Nothing: a flush, a discard.
    None,
    /// These bytes, or the text of a mark.
    Bytes(Arc<[u8]>),
    /// So many zeros.
    Zeros(usize),
}

impl Data {
    /// How many bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::None => 0,
            Self::Bytes(bytes) => bytes.len(),
            Self::Zeros(len) => *len,
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes bytes `from..to` of it to where they belong, `at` being the place of the first.
    pub(crate) fn apply(&self, image: &mut Image, at: usize, from: usize, to: usize) {
        match self {
            Self::None => {}
            Self::Bytes(bytes) => image.write_at(at + from, &bytes[from..to]),
            Self::Zeros(_) => image.zero_at(at + from, to - from),
        }
    }
}

/// One entry of a log; sectors are of 512 bytes, whatever those of the log are.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Entry {
    /// Where.
    pub sector: u64,
    /// How much.
    pub sectors: u64,
    /// What it is.
    pub flags: LogFlags,
    /// What was written.
    pub data: Data,
}

impl Entry {
    /// A flush.
    #[must_use]
    pub fn flush() -> Self {
        Self {
            sector: 0,
            sectors: 0,
            flags: LogFlags::FLUSH,
            data: Data::None,
        }
    }

    /// A text.
    #[must_use]
    pub fn mark(text: &str) -> Self {
        Self {
            sector: 0,
            sectors: 0,
            flags: LogFlags::MARK,
            data: Data::Bytes(text.as_bytes().into()),
        }
    }

    /// The text, where it is a mark.
    #[must_use]
    pub fn text(&self) -> Option<std::borrow::Cow<'_, str>> {
        match &self.data {
            Data::Bytes(bytes) if self.flags.contains(LogFlags::MARK) => {
                Some(String::from_utf8_lossy(bytes))
            }
            _ if self.flags.contains(LogFlags::MARK) => Some("".into()),
            _ => None,
        }
    }

    /// Where its first byte belongs.
    pub(crate) fn at(&self) -> usize {
        usize::try_from(self.sector).unwrap_or(usize::MAX / SECTOR_SIZE) * SECTOR_SIZE
    }
}

fn power_of_two_sector(found: u32) -> Result<usize, LogError> {
    match found {
        512..=65536 if found.is_power_of_two() => Ok(found as usize),
        _ => Err(LogError::SectorSize { found }),
    }
}

/// Reads a log entry by entry.
pub struct LogReader<R> {
    from: R,
    sector_size: usize,
    nr_entries: u64,
    next: u64,
}

impl<R: Read> LogReader<R> {
    /// Reads what a log begins with.
    ///
    /// # Errors
    /// [`LogError`].
    pub fn new(mut from: R) -> Result<Self, LogError> {
        let mut head = RawLogSuper::new_zeroed();
        from.read_exact(head.as_mut_bytes())?;
        if head.magic != MAGIC {
            let found = head.magic.get();
            return Err(LogError::Magic { found });
        }
        if head.version != VERSION {
            let found = head.version.get();
            return Err(LogError::Version { found });
        }
        let sector_size = power_of_two_sector(head.sectorsize.get())?;
        let mut reader = Self {
            from,
            sector_size,
            nr_entries: head.nr_entries.get(),
            next: 0,
        };
        reader.read_some(sector_size - size_of::<RawLogSuper>())?;
        Ok(reader)
    }

    /// Bytes of a sector of the log.
    #[must_use]
    pub fn sector_size(&self) -> usize {
        self.sector_size
    }

    /// Entries that the log says it has.
    #[must_use]
    pub fn nr_entries(&self) -> u64 {
        self.nr_entries
    }

    /// Reads `len` bytes; memory is taken as they come, not as the log says.
    fn read_some(&mut self, len: usize) -> Result<Vec<u8>, LogError> {
        let mut bytes = Vec::new();
        let read = (&mut self.from)
            .take(len as u64)
            .read_to_end(&mut bytes)
            .map_err(LogError::Io)?;
        if read < len {
            return Err(LogError::Truncated { entry: self.next });
        }
        Ok(bytes)
    }

    fn read_entry(&mut self) -> Result<Entry, LogError> {
        let entry = self.next;
        let sector = self.read_some(self.sector_size)?;
        let Ok((raw, rest)) = RawLogEntry::read_from_prefix(&sector) else {
            return Err(LogError::Truncated { entry });
        };
        let (flags, nr_sectors) = (raw.flags.get(), raw.nr_sectors.get());
        if flags == 0 && nr_sectors == 0 {
            return Err(LogError::Empty { entry });
        }
        let Some(known) = LogFlags::from_bits(flags) else {
            return Err(LogError::Flags { entry, flags });
        };
        let (first, units) = (raw.sector.get(), (self.sector_size / SECTOR_SIZE) as u64);
        let end = first.checked_add(nr_sectors);
        let in_range = end
            .and_then(|end| end.checked_mul(self.sector_size as u64))
            .is_some_and(|end| usize::try_from(end).is_ok_and(|end| isize::try_from(end).is_ok()));
        if !in_range {
            let sector = first;
            return Err(LogError::Range {
                entry,
                sector,
                nr_sectors,
            });
        }
        let data = if known.contains(LogFlags::MARK) {
            let (len, most) = (raw.data_len.get(), rest.len());
            let text = usize::try_from(len).ok().and_then(|len| rest.get(..len));
            match text {
                Some(text) => Data::Bytes(text.into()),
                None => return Err(LogError::Mark { entry, len, most }),
            }
        } else if known.contains(LogFlags::DISCARD) || nr_sectors == 0 {
            Data::None
        } else {
            let len = nr_sectors as usize * self.sector_size;
            let bytes = self.read_some(len)?;
            if bytes.iter().all(|&byte| byte == 0) {
                Data::Zeros(len)
            } else {
                Data::Bytes(bytes.into())
            }
        };
        Ok(Entry {
            sector: first * units,
            sectors: nr_sectors * units,
            flags: known,
            data,
        })
    }
}

impl<R: Read> Iterator for LogReader<R> {
    type Item = Result<Entry, LogError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next >= self.nr_entries {
            return None;
        }
        let entry = self.read_entry();
        self.next = if entry.is_ok() {
            self.next + 1
        } else {
            self.nr_entries
        };
        Some(entry)
    }
}

/// Writes a log entry by entry.
pub struct LogWriter<W> {
    to: W,
    sector_size: usize,
    nr_entries: u64,
}

impl<W: Write + Seek> LogWriter<W> {
    /// Begins a log.
    ///
    /// # Errors
    /// [`LogError::SectorSize`], and those of writing.
    pub fn new(to: W, sector_size: u32) -> Result<Self, LogError> {
        let sector_size = power_of_two_sector(sector_size)?;
        let mut writer = Self {
            to,
            sector_size,
            nr_entries: 0,
        };
        writer.write_super()?;
        writer.to.seek(SeekFrom::Start(sector_size as u64))?;
        Ok(writer)
    }

    fn write_super(&mut self) -> Result<(), LogError> {
        let mut head = RawLogSuper::new_zeroed();
        head.magic.set(MAGIC);
        head.version.set(VERSION);
        head.nr_entries.set(self.nr_entries);
        head.sectorsize.set(self.sector_size as u32);
        self.to.rewind()?;
        self.write_padded(head.as_bytes(), &[])
    }

    fn write_padded(&mut self, head: &[u8], text: &[u8]) -> Result<(), LogError> {
        let mut sector = vec![0; self.sector_size];
        sector[..head.len()].copy_from_slice(head);
        sector[head.len()..head.len() + text.len()].copy_from_slice(text);
        Ok(self.to.write_all(&sector)?)
    }

    /// Appends an entry. A mark is cut to what fits.
    ///
    /// # Errors
    /// [`LogError::Range`] where it is no whole number of the log's sectors; those of writing.
    pub fn append(&mut self, entry: &Entry) -> Result<(), LogError> {
        let units = (self.sector_size / SECTOR_SIZE) as u64;
        if entry.sector % units != 0 || entry.sectors % units != 0 {
            return Err(LogError::Range {
                entry: self.nr_entries,
                sector: entry.sector,
                nr_sectors: entry.sectors,
            });
        }
        let is_mark = entry.flags.contains(LogFlags::MARK);
        let text = match &entry.data {
            // The kernel keeps one byte for a zero at the end.
            Data::Bytes(text) if is_mark => {
                &text[..text.len().min(self.sector_size - ENTRY_HEAD - 1)]
            }
            _ => &[],
        };
        let mut head = RawLogEntry::new_zeroed();
        head.sector.set(entry.sector / units);
        head.nr_sectors.set(entry.sectors / units);
        head.flags.set(entry.flags.bits());
        head.data_len.set(text.len() as u64);
        self.write_padded(head.as_bytes(), text)?;
        match &entry.data {
            Data::Bytes(bytes) if !is_mark => self.to.write_all(bytes)?,
            Data::Zeros(len) => {
                std::io::copy(&mut std::io::repeat(0).take(*len as u64), &mut self.to)?;
            }
            _ => {}
        }
        self.nr_entries += 1;
        Ok(())
    }

    /// Ends the log.
    ///
    /// # Errors
    /// Those of writing.
    pub fn finish(mut self) -> Result<W, LogError> {
        let end = self.to.stream_position()?;
        self.write_super()?;
        self.to.seek(SeekFrom::Start(end))?;
        self.to.flush()?;
        Ok(self.to)
    }
}

/// Reads the log in a file.
///
/// # Errors
/// [`LogError`].
pub fn load(path: &Path) -> Result<Vec<Entry>, LogError> {
    LogReader::new(BufReader::new(File::open(path)?))?.collect()
}

/// Writes a log to a new or existing file.
///
/// # Errors
/// Those of writing.
pub fn save(entries: &[Entry], path: &Path) -> Result<(), LogError> {
    let mut writer = LogWriter::new(BufWriter::new(File::create(path)?), SECTOR_SIZE as u32)?;
    for entry in entries {
        writer.append(entry)?;
    }
    writer.finish().map(drop)
}
