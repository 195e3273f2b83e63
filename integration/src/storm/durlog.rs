//! The durability log: what a worker was about to do and what came of it.
//!
//! It lies outside the mount and every record is one `write` to a file in append mode, so it
//! survives the death of the file system, and of the worker. Lines:
//!
//! ```text
//! storm-log 1 <seed> <worker> <uid> <gid>
//! R <id> <path> <ino>      a directory the worker starts with
//! B <n> <effect>           about to be called
//! E <n> <ino> [<effect>]   succeeded; the effect where it differs from what was begun
//! X <n> <errno>            failed in a way that is allowed
//! Z                        the worker ended as planned
//! ```
//!
//! A `B` without `E` or `X` can only be the last: the call during which the file system died.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::effect::{Effect, Id};
use super::error::{Context, Result, StormError};
use super::text::{Words, escape};

const MAGIC: &str = "storm-log 1";

/// Appends to a log.
pub struct LogWriter {
    file: File,
    path: PathBuf,
    number: u64,
}

impl LogWriter {
    /// Starts a log.
    pub fn create(path: &Path, seed: u64, worker: u64, owner: (u32, u32)) -> Result<Self> {
        std::fs::write(path, "").call("create", path)?;
        let file = File::options().append(true).open(path).call("open", path)?;
        let mut log = Self {
            file,
            path: path.to_path_buf(),
            number: 0,
        };
        log.line(&format!("{MAGIC} {seed} {worker} {} {}", owner.0, owner.1))?;
        Ok(log)
    }

    /// Records a directory the worker starts with.
    pub fn root(&mut self, id: Id, path: &str, ino: u64) -> Result<()> {
        self.line(&format!("R {id} {} {ino}", escape(path.as_bytes())))
    }

    /// Records what is about to be called.
    pub fn begin(&mut self, effect: &Effect) -> Result<()> {
        self.number += 1;
        self.line(&format!("B {} {effect}", self.number))
    }

    /// Records success.
    pub fn end(&mut self, ino: u64, actual: Option<&Effect>) -> Result<()> {
        let actual = actual.map_or(String::new(), |effect| format!(" {effect}"));
        self.line(&format!("E {} {ino}{actual}", self.number))
    }

    /// Records a failure that is allowed.
    pub fn abandon(&mut self, errno: i32) -> Result<()> {
        self.line(&format!("X {} {errno}", self.number))
    }

    /// Records the planned end.
    pub fn done(&mut self) -> Result<()> {
        self.line("Z")
    }

    fn line(&mut self, text: &str) -> Result<()> {
        self.file
            .write_all(format!("{text}\n").as_bytes())
            .call("append", &self.path)
    }
}

/// How a call ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// It succeeded with this effect; the inode number is that of a new object.
    Done(Effect, u64),
    /// It failed; data calls may have done a part.
    Failed(Effect),
    /// Nobody knows: the file system died meanwhile.
    Unknown(Effect),
}

/// A log as read back.
#[derive(Clone, Debug)]
pub struct Log {
    /// Where it was read from.
    pub file: PathBuf,
    /// Seed of the run.
    pub seed: u64,
    /// The worker.
    pub worker: u64,
    /// Who owns what the worker made.
    pub owner: (u32, u32),
    /// The directories it started with: id, path, inode number.
    pub roots: Vec<(Id, Vec<u8>, u64)>,
    /// Its calls in order.
    pub calls: Vec<Outcome>,
    /// Whether it ended as planned.
    pub complete: bool,
}

impl Log {
    /// Reads a log.
    ///
    /// # Errors
    ///
    /// Names file, line and field of the first thing that makes no sense. A last line without
    /// its end is taken as never written.
    pub fn read(file: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(file).call("read", file)?;
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let mut lines = whole.lines().enumerate();
        let at = |line: usize| {
            move |reason: String| StormError::Parse {
                file: file.to_path_buf(),
                line,
                reason,
            }
        };
        let header = lines.next().map_or("", |(_, line)| line);
        let mut log = parse_header(file, header).map_err(at(1))?;
        let mut open: Option<(u64, Effect)> = None;
        for (index, line) in lines {
            log.parse_line(line, &mut open).map_err(at(index + 1))?;
        }
        if let Some((_, effect)) = open {
            log.calls.push(Outcome::Unknown(effect));
        }
        Ok(log)
    }

    fn parse_line(
        &mut self,
        line: &str,
        open: &mut Option<(u64, Effect)>,
    ) -> std::result::Result<(), String> {
        let mut words = Words::new(line);
        let kind = words.word("record")?;
        match kind {
            "R" => {
                self.roots
                    .push((words.num("id")?, words.bytes("path")?, words.num("ino")?));
                return Ok(());
            }
            "Z" => {
                self.complete = true;
                return Ok(());
            }
            _ => {}
        }
        let number: u64 = words.num("number")?;
        if kind == "B" {
            if open.replace((number, Effect::from_words(words)?)).is_some() {
                return Err("the call before has no end".to_owned());
            }
            return Ok(());
        }
        let Some((_, begun)) = open.take().filter(|(begun, _)| *begun == number) else {
            return Err(format!("end of call {number}, which is not open"));
        };
        let outcome = match kind {
            "E" => {
                let ino = words.num("ino")?;
                let rest = words.rest();
                if rest.is_empty() {
                    Outcome::Done(begun, ino)
                } else {
                    // It did a part of what was begun, and nobody knows about the remainder.
                    self.calls.push(Outcome::Failed(begun));
                    Outcome::Done(Effect::from_words(Words::new(&rest))?, ino)
                }
            }
            "X" => Outcome::Failed(begun),
            other => return Err(format!("unknown record {other:?}")),
        };
        self.calls.push(outcome);
        Ok(())
    }
}

fn parse_header(file: &Path, header: &str) -> std::result::Result<Log, String> {
    let rest = header
        .strip_prefix(MAGIC)
        .ok_or_else(|| format!("expected \"{MAGIC} ...\", found {header:?}"))?;
    let mut words = Words::new(rest.trim_start());
    Ok(Log {
        file: file.to_path_buf(),
        seed: words.num("seed")?,
        worker: words.num("worker")?,
        owner: (words.num("uid")?, words.num("gid")?),
        roots: Vec::new(),
        calls: Vec::new(),
        complete: false,
    })
}
