//! `fusefs-stack check`: looks for faults in a file system, changes nothing.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use fs::check::{DeviceSource, Finding, Report, Scratch, check};

use crate::stack;

/// The word that stands first.
pub const WORD: &str = "check";

/// fsck(8): faults were found, and left.
const FAULTS: u8 = 4;
/// fsck(8): something kept it from looking.
const FAILED: u8 = 8;
/// fsck(8): the command line is wrong.
const USAGE: u8 = 16;

/// Looks for faults in an ext2, ext3 or ext4 image or block device, and changes nothing.
///
/// A log that waits for its replay is replayed in memory; it and orphans are told as pending, and
/// are no faults.
#[derive(Debug, Parser)]
#[command(
    name = "fusefs-stack check",
    after_help = "Exit codes: 0 no faults, 4 faults, 8 IMAGE cannot be read, 16 wrong command line."
)]
struct Args {
    /// The image file or block device
    image: PathBuf,
    /// One JSON object instead of lines
    #[arg(long)]
    json: bool,
    /// Where in IMAGE the file system starts, a multiple of 512
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    offset: u64,
}

/// Whether the words ask for this command; a mountpoint of that name goes first, as ever.
pub fn is_asked_for(words: &[OsString]) -> bool {
    words.first().is_some_and(|word| word == WORD) && !Path::new(WORD).is_dir()
}

/// Runs the command with the words behind its name.
pub fn run(words: &[OsString]) -> ExitCode {
    let name = OsString::from("fusefs-stack check");
    let args = match Args::try_parse_from([&[name], words].concat()) {
        Ok(args) => args,
        Err(error) => {
            // A closed standard output is no reason to fail.
            drop(error.print());
            let is_help = error.kind() == ErrorKind::DisplayHelp;
            return ExitCode::from(if is_help { 0 } else { USAGE });
        }
    };
    let image = args.image.display().to_string();
    if args.offset % 512 != 0 {
        eprintln!(
            "fusefs-stack: --offset {}: not a multiple of 512",
            args.offset
        );
        return ExitCode::from(USAGE);
    }
    let dev = match stack::open(&args.image, &image, args.offset, true) {
        Ok(dev) => dev,
        Err(error) => return crate::fail(&error, FAILED),
    };
    let report = check(&DeviceSource::new(dev), &mut Scratch::default());
    let text = if args.json {
        as_json(&image, &report)
    } else {
        as_lines(&image, &report)
    };
    drop(std::io::stdout().write_all(text.as_bytes()));
    ExitCode::from(code(&report))
}

fn code(report: &Report) -> u8 {
    let is_read = |it: &Finding| !matches!(it, Finding::Read { .. });
    match report.is_clean() {
        true => 0,
        false if report.findings().iter().all(is_read) => FAULTS,
        false => FAULTS | FAILED,
    }
}

fn as_lines(image: &str, report: &Report) -> String {
    let mut text = report.to_string();
    let faults = report.faults().count() as u64;
    let more = if report.not_kept() > 0 {
        " and more"
    } else {
        ""
    };
    let end = match (report.is_clean(), faults) {
        (true, _) => "no faults".to_owned(),
        (false, 1) if more.is_empty() => "1 fault".to_owned(),
        (false, count) => format!("{count} faults{more}"),
    };
    text.push_str(&format!("{image}: {end}\n"));
    text
}

fn as_json(image: &str, report: &Report) -> String {
    let mut text = String::from("{\"image\":");
    quote(&mut text, image);
    text.push_str(&format!(",\"clean\":{},\"findings\":[", report.is_clean()));
    for (index, finding) in report.findings().iter().enumerate() {
        if index > 0 {
            text.push(',');
        }
        let debug = format!("{finding:?}");
        let kind = debug.split([' ', '(', '{']).next().unwrap_or("");
        text.push_str("{\"class\":");
        quote(&mut text, finding.class().name());
        text.push_str(",\"kind\":");
        quote(&mut text, kind);
        text.push_str(",\"text\":");
        quote(&mut text, &finding.to_string());
        text.push('}');
    }
    text.push_str(&format!("],\"not_kept\":{}}}\n", report.not_kept()));
    text
}

/// Adds a JSON string.
fn quote(text: &mut String, value: &str) {
    text.push('"');
    for c in value.chars() {
        match c {
            '"' | '\\' => text.extend(['\\', c]),
            c if c < ' ' => drop(write!(text, "\\u{:04x}", u32::from(c))),
            c => text.push(c),
        }
    }
    text.push('"');
}

#[cfg(test)]
mod tests {
    use super::{Args, quote};
    use clap::CommandFactory;

    #[test]
    fn definition_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn strings_are_quoted() {
        let mut text = String::new();
        quote(&mut text, "a\"b\\c\nd\u{e9}");
        assert_eq!(text, "\"a\\\"b\\\\c\\u000ad\u{e9}\"");
    }
}
