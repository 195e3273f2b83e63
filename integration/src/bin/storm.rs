//! Random operations against a mounted file system, checked against a model; see [`storm`].

#![forbid(unsafe_code)]

#[path = "../storm/mod.rs"]
mod storm;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

/// Random operations against a mounted file system, checked against a model.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run operations in MNT and compare it with the model on the way and at the end.
    Run(storm::run::RunArgs),
    /// Compare a mount with the manifests of an earlier run.
    Verify {
        /// The mounted directory.
        #[arg(long, value_name = "MNT")]
        dir: PathBuf,
        /// Manifests, or directories that hold them.
        #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
        manifest: Vec<PathBuf>,
        /// By how many milliseconds modification times may differ.
        #[arg(long, value_name = "MS", default_value_t = 0)]
        mtime_slack: u64,
    },
    /// After a crash and replay: check that nothing that was synced is lost.
    CheckDurable(storm::durable::DurableArgs),
    /// Print what the file system of a directory can do.
    Caps {
        /// A directory on it.
        #[arg(long, value_name = "MNT")]
        dir: PathBuf,
    },
    /// One worker of a run.
    #[command(hide = true)]
    Worker(storm::worker::WorkerArgs),
}

fn main() -> ExitCode {
    let default = env_logger::Env::default().default_filter_or("warn");
    env_logger::Builder::from_env(default)
        .format_timestamp(None)
        .init();
    let result = match Cli::parse().command {
        Command::Run(args) => storm::run::run(&args),
        Command::Verify {
            dir,
            manifest,
            mtime_slack,
        } => storm::verify::expand(&manifest)
            .and_then(|files| {
                storm::verify::verify(&dir, &files, Duration::from_millis(mtime_slack))
            })
            .map(|count| println!("{count} names verified")),
        Command::CheckDurable(args) => storm::durable::check(&args),
        Command::Caps { dir } => storm::run::print_caps(&dir),
        Command::Worker(args) => storm::worker::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("storm: FAILED: {error}");
            ExitCode::FAILURE
        }
    }
}
