//! The command `fusefs-stack crashtest`.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use clap::error::ErrorKind;
use clap::{ArgGroup, Parser, ValueEnum};
use fs::MountOptions;
use signal_hook::consts::{SIGINT, SIGTERM};

use super::exec::mount_options;
use super::explore::{Explorer, Violation};
use super::judge::Judge;
use super::kit::Kit;
use super::mounted::{APPLY, apply_lines, record_command, record_script};
use super::run::{Config, Find, Plan, Progress, Summary, run};
use super::workload::b3_setup;
use super::{Error, script};

/// The word that the command line begins with.
pub const WORD: &str = "crashtest";

const CLEAN: u8 = 0;
const USAGE: u8 = 1;
const VIOLATION: u8 = 2;
const FAILED: u8 = 32;
const INTERRUPTED: u8 = 130;

const HELP: &str = "\
The image is only read; everything happens on a copy in memory that costs by what is changed. A
workload runs on it, and all it writes to the disk is recorded. Then crash states are built: each
moment of the record, with writes since the last flush lost, alone there, or torn between sectors
and pages. Each state is mounted, its journal replayed, all names and all data read. It must be a
state that was there, as new as fsync, fdatasync, O_SYNC and sync promised, and show nothing that
was never written. e2fsck judges a sample, where it is installed.

Workloads:
  b3      all sequences of one, then of two operations on few files, each made durable in all ways
          (as in the study of CrashMonkey and ACE)
  b3-1    those of one operation
  storm   long sequences of all operations, drawn from the seed
  all     b3 and storms by turns (default)

--command and --script run on a real mount (FUSE) of the copy, in an empty directory of their own.
Of a command nobody knows what it promises: names and content are not judged, but for what was never
written. It can name moments: echo TEXT > $CRASHTEST_MARKS. A script has one operation a line:
  mkdir P         unlink P        rename P P      write F AT LEN     setxattr P NAME LEN
  create F        rmdir P         exchange P P    dwrite F AT LEN    rmxattr P NAME
  symlink T P     truncate F N    chmod P MODE    swrite F AT LEN    falloc F AT LEN
  link F P        fsync P         sync            mwrite F AT LEN    falloc-keep F AT LEN
                  fdatasync P                     punch F AT LEN     zero F AT LEN
                                                                     zero-keep F AT LEN
(dwrite: O_DIRECT, swrite: O_SYNC, mwrite: through a mapping)

A state that may not be is made as small as it can be and written to a file: a log in the format of
the kernel's dm-log-writes, whose last mark names the state. --replay shows it again; the log also
replays with replay-log of xfstests.

SIGINT or SIGTERM ends a run early; it still says what it has seen.

Exit codes: 0 no violation, 1 wrong command line, 2 violation found, 32 could not be run, 130 ended
early.

Examples:
  mke2fs -t ext4 disk.img 64M && fusefs-stack crashtest disk.img
  fusefs-stack crashtest --command 'cp -r /etc/skel . && sync' disk.img
  fusefs-stack crashtest --replay crashtest.find disk.img";

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Name {
    B3,
    #[value(name = "b3-1")]
    B3One,
    Storm,
    All,
}

/// Looks for states after a power cut that a file system may not be in.
#[derive(Debug, Parser)]
#[command(
    name = "fusefs-stack crashtest",
    after_help = HELP,
    override_usage = "fusefs-stack crashtest [OPTIONS] IMAGE",
    group = ArgGroup::new("what").args(["workload", "command", "script", "replay"])
)]
struct Args {
    /// The image file or block device; only read. It needs a journal
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
    /// A built-in workload
    #[arg(long, value_name = "NAME", default_value = "all")]
    workload: Name,
    /// A shell command to run on a mount
    #[arg(long, value_name = "CMD")]
    command: Option<String>,
    /// A script of operations to run on a mount
    #[arg(long, value_name = "FILE")]
    script: Option<PathBuf>,
    /// Shows a find again
    #[arg(long, value_name = "FILE")]
    replay: Option<PathBuf>,
    /// How many different states
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    states: u64,
    /// The same seed gives the same states
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// Threads [default: one for each processor]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// One state in N is also judged by e2fsck; 0: none
    #[arg(long, value_name = "N", default_value_t = 200)]
    e2fsck: u64,
    /// Where to write a find
    #[arg(long, value_name = "FILE", default_value = "crashtest.find")]
    find: PathBuf,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
    /// Test the test: commits do not flush the disk
    #[arg(long, hide = true)]
    no_barrier: bool,
}

/// Whether the words of a command line mean this command: a directory of its name is a mountpoint
/// where only an image follows, as it always was.
#[must_use]
pub fn is_meant(words: &[OsString]) -> bool {
    let Some((first, rest)) = words.split_first() else {
        return false;
    };
    let is_mount = match rest {
        [image] => !image.to_string_lossy().starts_with('-') && Path::new(WORD).is_dir(),
        _ => false,
    };
    first == WORD && !is_mount
}

/// Runs the command; `words` are those behind [`WORD`].
#[must_use]
pub fn main(words: &[OsString]) -> ExitCode {
    if let [first, dir] = words
        && first == APPLY
    {
        let done = apply_lines(
            Path::new(dir),
            std::io::stdin().lock(),
            std::io::stdout().lock(),
        );
        return ExitCode::from(if done.is_ok() { CLEAN } else { FAILED });
    }
    let name = OsString::from("fusefs-stack crashtest");
    let args = match Args::try_parse_from(std::iter::once(&name).chain(words)) {
        Ok(args) => args,
        Err(error) => {
            // A closed standard output is no reason to fail.
            drop(error.print());
            let told = matches!(
                error.kind(),
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
            );
            return ExitCode::from(if told { CLEAN } else { USAGE });
        }
    };
    let done = match &args.replay {
        Some(find) => replay(&args, find),
        None => search(&args),
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let mut line = format!("fusefs-stack crashtest: {error}");
            let mut cause = std::error::Error::source(&error);
            while let Some(error) = cause {
                let text = error.to_string();
                if !line.ends_with(&text) {
                    line = format!("{line}: {text}");
                }
                cause = error.source();
            }
            eprintln!("{line}");
            let usage = matches!(error, Error::Script { .. });
            ExitCode::from(if usage { USAGE } else { FAILED })
        }
    }
}

/// Programs that are not there do not judge.
fn e2fsck_every(args: &Args) -> u64 {
    let there = super::disk::tool("e2fsck").arg("-V").output().is_ok();
    if !there && args.e2fsck > 0 {
        eprintln!("fusefs-stack crashtest: e2fsck (package e2fsprogs) not found, goes on without");
    }
    if there { args.e2fsck } else { 0 }
}

/// This program, to be started again.
fn program() -> Result<PathBuf, Error> {
    std::env::current_exe().map_err(|error| Error::Command {
        command: WORD.to_owned(),
        why: error.to_string(),
    })
}

fn plan(args: &Args) -> Result<(Kit, Plan), Error> {
    let options = MountOptions {
        barrier: !args.no_barrier,
        ..mount_options()
    };
    if let Some(path) = &args.script {
        let failed = |why: String| Error::Script {
            path: path.clone(),
            why,
        };
        let text = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
        let ops = script::parse(&text).map_err(|error| failed(error.to_string()))?;
        let kit = Kit::new(&args.image, &[])?;
        let entries = Arc::new(record_script(&kit.origin, options, &ops, &program()?)?);
        let name = format!("script {}", path.display());
        return Ok((kit, Plan::Recorded { name, entries }));
    }
    if let Some(command) = &args.command {
        let kit = Kit::new(&args.image, &[])?;
        let entries = Arc::new(record_command(&kit.origin, options, command)?);
        let name = format!("command {command}");
        return Ok((kit, Plan::Recorded { name, entries }));
    }
    let kit = Kit::new(&args.image, &b3_setup())?;
    let plan = match args.workload {
        Name::B3 => Plan::B3,
        Name::B3One => Plan::B3One,
        Name::Storm => Plan::Storm,
        Name::All => Plan::All,
    };
    Ok((kit, plan))
}

fn search(args: &Args) -> Result<u8, Error> {
    let (kit, plan) = plan(args)?;
    let config = Config {
        plan,
        states: args.states,
        seed: args.seed,
        threads: args.threads.unwrap_or(Config::default().threads),
        e2fsck_every: e2fsck_every(args),
        max_finds: 1,
        barrier: !args.no_barrier,
        stop: Arc::default(),
    };
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        for flag in [&config.stop, &interrupted] {
            signal_hook::flag::register(signal, flag.clone()).map_err(Error::Signal)?;
        }
    }
    let mut bar = Bar::new(args.states);
    let summary = run(&kit, &config, |progress| bar.show(progress))?;
    bar.clear();
    let find = summary.finds.first();
    if let Some(find) = find {
        kit.save_find(&args.find, &find.entries, &find.violation)?;
    }
    let text = if args.json {
        json(&summary, &args.find)
    } else {
        words(&summary, args)
    };
    print(&text);
    Ok(if find.is_some() {
        VIOLATION
    } else if interrupted.load(Ordering::Relaxed) {
        INTERRUPTED
    } else {
        CLEAN
    })
}

fn replay(args: &Args, find: &Path) -> Result<u8, Error> {
    let (kit, entries, state) = Kit::load_find(&args.image, find)?;
    let history = kit.history(&entries).map_err(Error::Start)?;
    let judge = Judge::new(u64::from(e2fsck_every(args) > 0))?;
    let explorer = Explorer {
        origin: &kit.origin,
        entries: &entries,
        history: &history,
        judge: &judge,
        variants: 0,
        seed: 0,
    };
    let what = explorer.fault_of(&state);
    kit.check_backing()?;
    let Some(what) = what else {
        print("this state is as it may be: no violation\n");
        return Ok(CLEAN);
    };
    let violation = Violation { state, what };
    print(&describe(&violation, &entries, &history.script()));
    Ok(VIOLATION)
}

fn print(text: &str) {
    // A closed standard output is no reason to fail.
    drop(std::io::stdout().write_all(text.as_bytes()));
}

fn describe(
    violation: &Violation,
    entries: &[blockstack::log_writes::Entry],
    script: &str,
) -> String {
    let state = &violation.state;
    let mut text = format!("violation: {}\n", violation.what.trim_end());
    // Writing to a string does not fail.
    writeln!(text, "state: {}", state.print()).ok();
    for (index, fate) in &state.broken {
        if let Some(entry) = entries.get(*index) {
            writeln!(
                text,
                "  write {index}, {} sectors at {}: {fate:?}",
                entry.sectors, entry.sector
            )
            .ok();
        }
    }
    let before = &entries[..state.prefix.min(entries.len())];
    if let Some(mark) = before.iter().rev().find_map(|entry| entry.text()) {
        writeln!(text, "  last mark before the power cut: {mark}").ok();
    }
    if script.lines().count() > 1 {
        writeln!(text, "operations:\n{}", script.trim_end()).ok();
    }
    text
}

fn words(summary: &Summary, args: &Args) -> String {
    let seconds = summary.took.as_secs_f64();
    let mut text = format!(
        "{} states of {} workloads ({} drawn, {} records), {} seen by e2fsck, in {seconds:.1} s: {}\n",
        summary.states,
        summary.workloads,
        summary.drawn,
        summary.entries,
        summary.fscked,
        if summary.finds.is_empty() {
            "no violation"
        } else {
            "VIOLATION"
        }
    );
    for find in &summary.finds {
        text += &format!("workload: {}\n", find.name);
        text += &describe(&find.violation, &find.entries, &find.script);
        let image = args.image.display();
        let file = args.find.display();
        text += &format!("again: fusefs-stack crashtest --replay {file} {image}\n");
    }
    text
}

fn quoted(text: &str) -> String {
    let mut quoted = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\n' => quoted += "\\n",
            c if c < ' ' => quoted += &format!("\\u{:04x}", u32::from(c)),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

fn json(summary: &Summary, file: &Path) -> String {
    let find = |find: &Find| {
        format!(
            "{{\"workload\":{},\"what\":{},\"state\":{},\"file\":{}}}",
            quoted(&find.name),
            quoted(&find.violation.what),
            quoted(&find.violation.state.print()),
            quoted(&file.to_string_lossy()),
        )
    };
    let finds: Vec<String> = summary.finds.iter().map(find).collect();
    format!(
        "{{\"states\":{},\"drawn\":{},\"workloads\":{},\"records\":{},\"e2fsck\":{},\
         \"seconds\":{:.3},\"finds\":[{}]}}\n",
        summary.states,
        summary.drawn,
        summary.workloads,
        summary.entries,
        summary.fscked,
        summary.took.as_secs_f64(),
        finds.join(",")
    )
}

/// A bar on standard error, where that is a terminal.
struct Bar {
    states: u64,
    started: Instant,
    shown: bool,
}

impl Bar {
    fn new(states: u64) -> Self {
        Self {
            states: states.max(1),
            started: Instant::now(),
            shown: std::io::stderr().is_terminal(),
        }
    }

    fn show(&mut self, progress: Progress) {
        const WIDTH: u64 = 30;
        if !self.shown {
            return;
        }
        let done = (progress.states.min(self.states) * WIDTH / self.states) as usize;
        let bar = "#".repeat(done) + &" ".repeat(WIDTH as usize - done);
        let seconds = self.started.elapsed().as_secs();
        eprint!(
            "\r[{bar}] {} of {} states, {} workloads, {:02}:{:02}",
            progress.states,
            self.states,
            progress.workloads,
            seconds / 60,
            seconds % 60
        );
    }

    fn clear(&self) {
        if self.shown {
            eprint!("\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use clap::CommandFactory;

    use super::{Args, is_meant, quoted};

    #[test]
    fn definition_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn only_the_first_word_counts() {
        let meant = |words: &[&str]| {
            let words: Vec<OsString> = words.iter().map(OsString::from).collect();
            is_meant(&words)
        };
        assert!(meant(&["crashtest", "img"]));
        assert!(meant(&["crashtest", "--help"]));
        assert!(!meant(&["mnt", "crashtest"]));
        assert!(!meant(&["./crashtest", "img"]));
        assert!(!meant(&[]));
    }

    #[test]
    fn text_is_quoted_for_json() {
        assert_eq!(quoted("a\"b\\\n\u{1}"), r#""a\"b\\\n\u0001""#);
    }
}
