//! The program `fusefs-stack`: mounts an ext2, ext3 or ext4 image through FUSE.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `cli` | the command line |
//! | `options` | the words after `-o` |
//! | `places` | which argument is the mountpoint, and whether it can be one |
//! | `stack` | image to top device |
//! | `background` | leaving the terminal once the mount answers |
//! | `serve` | one mount, from first look to last write |
#![forbid(unsafe_code)]

mod background;
mod cli;
mod options;
mod places;
mod serve;
mod stack;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use cli::{Args, Plan};

/// mount(8): the command line is wrong.
const USAGE: u8 = 1;
/// mount(8): the mount, or what must happen at its end, failed.
const MOUNT_FAILED: u8 = 32;

fn main() -> ExitCode {
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
        start_log(&plan);
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
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    eprintln!("{}", line.replace('\n', " ").trim_end());
    ExitCode::from(code)
}

fn start_log(plan: &Plan) {
    // When the mount goes away first, fuser warns that it cannot unmount it.
    let level = if plan.debug {
        "debug"
    } else {
        "warn,fuser=error"
    };
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(level)).init();
}
