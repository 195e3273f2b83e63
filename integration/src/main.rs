//! The program `fusefs-stack`: mounts an ext2, ext3 or ext4 image through FUSE. `crashtest` stands in
//! the library.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `cli` | the command line |
//! | `check` | the command `check` |
//! | `messages` | the log |
//! | `options` | the words after `-o` |
//! | `places` | which argument is the mountpoint, and whether it can be one |
//! | `stack` | image to top device |
//! | `background` | leaving the terminal once the mount answers |
//! | `guard` | ends the connection where the program is killed |
//! | `serve` | one mount, from first look to last write |
#![forbid(unsafe_code)]

mod background;
mod check;
mod cli;
mod guard;
mod messages;
mod options;
mod places;
mod serve;
mod stack;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use fusefs_stack::crashtest::command as crashtest;

use cli::{Args, Plan};

/// mount(8): the command line is wrong.
const USAGE: u8 = 1;
/// mount(8): the mount, or what must happen at its end, failed.
const MOUNT_FAILED: u8 = 32;

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let Some((_, rest)) = words
        .split_first()
        .filter(|(first, _)| *first == guard::WORD)
    {
        return guard::run(rest);
    }
    if check::is_asked_for(&words) {
        return check::run(&words[1..]);
    }
    if crashtest::is_meant(&words) {
        messages::start_quiet();
        return crashtest::main(&words[1..]);
    }
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => return explain(&error),
    };
    let plan = match Plan::new(&args) {
        Ok(plan) => plan,
        Err(error) => return fail(&error, USAGE),
    };
    // A failed check is the same here and in the child, and is told without starting one.
    let places = match places::find(&args.first, &args.second) {
        Ok(places) => places,
        Err(error) => return fail(&error, MOUNT_FAILED),
    };
    if plan.foreground || args.serve_detached {
        messages::start(plan.debug);
        let detached = args.serve_detached;
        return match serve::run(&plan, &places, detached) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error, MOUNT_FAILED),
        };
    }
    match background::start() {
        Ok(code) => ExitCode::from(code),
        Err(error) => fail(&error, MOUNT_FAILED),
    }
}

/// Prints help or what is wrong with the command line.
fn explain(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // A closed standard output is no reason to fail.
            drop(error.print());
            ExitCode::SUCCESS
        }
        _ => {
            drop(error.print());
            ExitCode::from(USAGE)
        }
    }
}

/// Prints an error with what caused it in one line.
fn fail(error: &dyn std::error::Error, code: u8) -> ExitCode {
    let mut line = format!("fusefs-stack: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        // Some errors print what caused them themselves.
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    eprintln!("{}", line.replace('\n', " ").trim_end());
    ExitCode::from(code)
}
