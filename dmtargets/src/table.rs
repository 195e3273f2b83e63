//! A table: rows `start length target args`, one after the other without a gap.

use std::fmt;

use blockstack::{Sector, SectorCount};

use crate::args::{Args, CtrError};
use crate::registry::Registry;
use crate::row::{Row, Tell, Typed};
use crate::target::{DeviceSource, Notifier, TableCx, Target};

/// Why a table is none. Rows count from 1.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum TableError {
    /// Nothing in it.
    #[error("table has no rows")]
    Empty,
    /// A row does not begin with `start length target`.
    #[error("row {row}: not `start length target args`: {text:?}")]
    Form {
        /// The row.
        row: usize,
        /// What stands there.
        text: String,
    },
    /// A row does not begin where the one before ends.
    #[error("row {row}: begins at {found}, not at {want}")]
    Gap {
        /// The row.
        row: usize,
        /// Where it begins.
        found: Sector,
        /// Where it should.
        want: Sector,
    },
    /// A row has no sectors, or ends after the last that can be numbered.
    #[error("row {row}: {len} is no length for a row at {start}")]
    Length {
        /// The row.
        row: usize,
        /// Where it begins.
        start: Sector,
        /// Its length.
        len: SectorCount,
    },
    /// A target that is not known.
    #[error("row {row}: no target {name:?}")]
    NoTarget {
        /// The row.
        row: usize,
        /// Its name.
        name: String,
    },
    /// The target refuses.
    #[error("row {row}, {target}: {source}")]
    Target {
        /// The row.
        row: usize,
        /// The target's name.
        target: &'static str,
        /// Why.
        source: CtrError,
    },
    /// A row boundary inside a logical block of the devices below.
    #[error("row {row}: boundary inside a logical block of {block_size} bytes")]
    Unaligned {
        /// The row.
        row: usize,
        /// Of the whole table.
        block_size: u32,
    },
}

pub(crate) struct TableRow {
    pub(crate) start: Sector,
    pub(crate) len: SectorCount,
    pub(crate) max_io: Option<SectorCount>,
    pub(crate) notifier: Notifier,
    pub(crate) tell: Tell,
    pub(crate) row: Box<dyn Row>,
}

impl TableRow {
    fn new(start: Sector, len: SectorCount, row: Box<dyn Row>) -> Self {
        Self {
            start,
            len,
            max_io: None,
            notifier: Notifier::default(),
            tell: row.teller(),
            row,
        }
    }

    /// `sector` of the device, which lies in the row, counted from the row's start.
    pub(crate) fn inside(&self, sector: Sector) -> Sector {
        Sector::new(sector.raw() - self.start.raw())
    }

    pub(crate) fn end(&self) -> u64 {
        self.start.raw() + self.len.raw()
    }
}

/// Rows with their targets, not yet those of a device.
#[derive(Default)]
pub struct Table {
    pub(crate) rows: Vec<TableRow>,
}

impl Table {
    /// Parses rows, one a line; empty lines and those that begin with `#` do not count.
    ///
    /// # Errors
    /// What is wrong with which row.
    pub fn parse(
        text: &str,
        registry: &Registry,
        devices: &dyn DeviceSource,
    ) -> Result<Self, TableError> {
        let mut table = Self::default();
        let lines = text.lines().map(str::trim);
        for line in lines.filter(|line| !line.is_empty() && !line.starts_with('#')) {
            table.parse_row(line, registry, devices)?;
        }
        if table.rows.is_empty() {
            return Err(TableError::Empty);
        }
        Ok(table)
    }

    fn parse_row(
        &mut self,
        line: &str,
        registry: &Registry,
        devices: &dyn DeviceSource,
    ) -> Result<(), TableError> {
        let row = self.rows.len() + 1;
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let mut args = Args::new(&words, 1);
        let form = || TableError::Form {
            row,
            text: line.to_owned(),
        };
        let (Ok(start), Ok(len), Some(name)) = (
            args.sector("start"),
            args.number("length", 0..=u64::MAX).map(SectorCount::new),
            args.optional(),
        ) else {
            return Err(form());
        };
        self.check_place(start, len)?;
        let Some(construct) = registry.find(name) else {
            return Err(TableError::NoTarget {
                row,
                name: name.to_owned(),
            });
        };
        let cx = TableCx::new(devices, start, len);
        let made = construct(&mut args, &cx).map_err(|source| TableError::Target {
            row,
            target: registry.names().find(|known| *known == name).unwrap_or("?"),
            source,
        })?;
        self.rows.push(TableRow {
            max_io: cx.max_io.get(),
            notifier: cx.notifier(),
            ..TableRow::new(start, len, made)
        });
        Ok(())
    }

    fn check_place(&self, start: Sector, len: SectorCount) -> Result<(), TableError> {
        let row = self.rows.len() + 1;
        let want = Sector::new(self.len().raw());
        if start != want {
            return Err(TableError::Gap {
                row,
                found: start,
                want,
            });
        }
        let end = start.checked_add(len).and_then(Sector::bytes);
        if len == SectorCount::ZERO || end.is_none() {
            return Err(TableError::Length { row, start, len });
        }
        Ok(())
    }

    /// A table of one row.
    ///
    /// # Errors
    /// [`TableError::Length`].
    pub fn single<T: Target>(len: SectorCount, target: T) -> Result<Self, TableError> {
        let mut table = Self::default();
        table.check_place(Sector::ZERO, len)?;
        table
            .rows
            .push(TableRow::new(Sector::ZERO, len, Typed::boxed(target)));
        Ok(table)
    }

    /// Sectors of all rows.
    #[must_use]
    pub fn len(&self) -> SectorCount {
        SectorCount::new(self.rows.last().map_or(0, TableRow::end))
    }

    /// Whether it has no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

/// Prints rows as `dmsetup table` does: a line each, with a space after the name of a target also
/// where it has no arguments.
pub(crate) fn print_rows(
    rows: &[TableRow],
    out: &mut dyn fmt::Write,
    words: fn(&dyn Row, &mut dyn fmt::Write) -> fmt::Result,
) -> fmt::Result {
    for row in rows {
        write!(out, "{} {} {} ", row.start, row.len, row.row.name())?;
        words(row.row.as_ref(), out)?;
        out.write_str("\n")?;
    }
    Ok(())
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        print_rows(&self.rows, f, |row, out| row.table_args(out))
    }
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
