//! The parent of a run: prepares the mount, starts the workers, collects their manifests.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use super::caps::{self, Caps};
use super::error::{Context, Result, StormError};
use super::manifest;
use super::ops::Profile;
use super::worker::Outage;
use super::{SHARED_DIRS, shared_dir, sys, verify};

/// Options of `storm run`.
#[derive(Clone, Debug, clap::Args)]
pub struct RunArgs {
    /// The mounted directory to work in.
    #[arg(long, value_name = "MNT")]
    pub dir: PathBuf,
    /// Seed of all decisions.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Steps of all workers together.
    #[arg(long, default_value_t = 20_000)]
    pub ops: u64,
    /// Number of worker processes.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=64))]
    pub procs: u64,
    /// Bound of live data of all workers together, in bytes.
    #[arg(long, default_value_t = 48 << 20, value_name = "BYTES")]
    pub max_bytes: u64,
    /// Bound of objects of all workers together.
    #[arg(long, default_value_t = 6000, value_name = "COUNT")]
    pub max_files: usize,
    /// What to concentrate on.
    #[arg(long, value_enum, default_value = "full")]
    pub profile: Profile,
    /// Directory for the manifests, outside of MNT; a new one in the temporary directory if
    /// not given.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Write durability logs FILE.p0, FILE.p1, ... (outside of MNT).
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Remove what an earlier run left in MNT.
    #[arg(long)]
    pub wipe: bool,
    /// End without failure when the server of the mount dies.
    #[arg(long)]
    pub expect_kill: bool,
    /// As --expect-kill, and also when calls begin to give EIO or EROFS.
    #[arg(long)]
    pub expect_abort: bool,
    /// Do not compare the mount with the manifests at the end.
    #[arg(long)]
    pub no_verify: bool,
    /// Fail unless the file system has these abilities (see `storm caps`).
    #[arg(long, value_name = "WORD,...", default_value = "")]
    pub require: String,
    /// Do not use these abilities.
    #[arg(long, value_name = "WORD,...", default_value = "")]
    pub without: String,
}

/// Runs all workers and verifies what they leave.
///
/// # Errors
///
/// The first reason why the run is not a success; workers print theirs themselves.
pub fn run(args: &RunArgs) -> Result<()> {
    let start = Instant::now();
    let dir = args.dir.canonicalize().call("resolve", &args.dir)?;
    let out = out_dir(args, &dir)?;
    prepare(args, &dir)?;
    let caps = probe(args, &dir)?;
    let mut workers = Vec::new();
    for worker in 0..args.procs {
        workers.push(spawn(args, &dir, &out, &caps, worker)?);
    }
    let mut failed = 0;
    for (worker, mut child) in workers.into_iter().enumerate() {
        let status = child.wait().call("wait", Path::new("worker"))?;
        if !status.success() {
            log::error!("worker p{worker} failed: {status}");
            failed += 1;
        }
    }
    if failed > 0 {
        return Err(StormError::Failures(failed));
    }
    let manifests: Vec<PathBuf> = (0..args.procs)
        .map(|worker| manifest_path(&out, worker))
        .collect();
    let ended = manifests.iter().filter(|path| path.exists()).count();
    let seconds = start.elapsed().as_secs_f64();
    if ended < manifests.len() {
        println!(
            "seed {}: {ended} of {} workers reached their end before the file system was gone, {seconds:.1} s",
            args.seed, args.procs
        );
        return Ok(());
    }
    let shared = out.join("shared.manifest");
    manifest::write_shared(&dir, args.seed, &shared)?;
    println!(
        "seed {}: {} steps in {seconds:.1} s, manifests in {}",
        args.seed,
        args.ops,
        out.display()
    );
    if !args.no_verify {
        let all: Vec<PathBuf> = manifests.into_iter().chain([shared]).collect();
        let count = verify::verify(&dir, &all, Duration::ZERO)?;
        println!("seed {}: {count} names verified", args.seed);
    }
    Ok(())
}

/// Prints what the file system can do.
pub fn print_caps(dir: &Path) -> Result<()> {
    let caps = Caps::probe(dir)?;
    for word in caps::KNOWN {
        println!("{:4} {word}", if caps.has(word) { "yes" } else { "no" });
    }
    println!("collapse and insert in steps of {}", caps.shift_align);
    println!("links up to {} bytes", caps.symlink_max);
    Ok(())
}

fn out_dir(args: &RunArgs, dir: &Path) -> Result<PathBuf> {
    let out = args.out.clone().unwrap_or_else(|| {
        let name = format!("storm-{}-{}", args.seed, std::process::id());
        std::env::temp_dir().join(name)
    });
    std::fs::create_dir_all(&out).call("mkdir", &out)?;
    let out = out.canonicalize().call("resolve", &out)?;
    let mut outside = vec![out.clone()];
    if let Some(log) = &args.log {
        let parent = log
            .parent()
            .filter(|p| !p.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        outside.push(parent.canonicalize().call("resolve", parent)?);
    }
    match outside.iter().find(|path| path.starts_with(dir)) {
        Some(path) => Err(StormError::Setup(format!(
            "{} lies in the directory under test, {}: give a path outside of it",
            path.display(),
            dir.display()
        ))),
        None => Ok(out),
    }
}

fn prepare(args: &RunArgs, dir: &Path) -> Result<()> {
    let own = (0..64)
        .map(|worker| format!("p{worker}"))
        .chain(["shared".to_owned()]);
    for name in own {
        let path = dir.join(name);
        match path.symlink_metadata() {
            Ok(_) if args.wipe => std::fs::remove_dir_all(&path).call("remove", &path)?,
            Ok(_) => {
                let text = format!(
                    "{} exists: use --wipe or an empty directory",
                    path.display()
                );
                return Err(StormError::Setup(text));
            }
            Err(_) => {}
        }
    }
    rustix::process::umask(rustix::fs::Mode::empty());
    let own = (0..args.procs).map(|worker| format!("p{worker}"));
    let shared = ["shared".to_owned()]
        .into_iter()
        .chain((0..SHARED_DIRS).map(shared_dir));
    let mut made = vec![dir.to_path_buf()];
    for name in own.chain(shared) {
        let path = dir.join(name);
        std::fs::create_dir(&path).call("mkdir", &path)?;
        made.push(path);
    }
    // The logs take these directories as given; syncfs would not do, it ends in the kernel when
    // the file system is a FUSE server.
    for path in made {
        std::fs::File::open(&path)
            .and_then(|dir| dir.sync_all())
            .call("fsync", &path)?;
    }
    Ok(())
}

fn probe(args: &RunArgs, dir: &Path) -> Result<Caps> {
    let required = caps::parse_required(&args.require).map_err(StormError::Setup)?;
    let without = caps::parse_required(&args.without).map_err(StormError::Setup)?;
    let mut caps = Caps::probe(&dir.join("shared"))?;
    let missing = caps.missing();
    if !missing.is_empty() {
        println!(
            "not tested, because the file system lacks it: {}",
            missing.join(" ")
        );
    }
    if let Some(word) = required.into_iter().find(|word| missing.contains(word)) {
        return Err(StormError::Setup(format!(
            "the file system lacks {word}, which is required"
        )));
    }
    without.into_iter().for_each(|word| caps.remove(word));
    sys::sync_fs(dir).call("syncfs", dir)?;
    Ok(caps)
}

fn spawn(args: &RunArgs, dir: &Path, out: &Path, caps: &Caps, worker: u64) -> Result<Child> {
    let exe = std::env::current_exe().call("find", Path::new("/proc/self/exe"))?;
    let outage = match (args.expect_abort, args.expect_kill) {
        (true, _) => Outage::Abort,
        (_, true) => Outage::Kill,
        _ => Outage::None,
    };
    let manifest = manifest_path(out, worker);
    if manifest.exists() {
        std::fs::remove_file(&manifest).call("unlink", &manifest)?;
    }
    let steps = args.ops / args.procs + u64::from(worker < args.ops % args.procs);
    let mut command = Command::new(&exe);
    command
        .arg("worker")
        .arg("--dir")
        .arg(dir)
        .arg("--manifest")
        .arg(&manifest);
    for (option, value) in [
        ("--worker", worker.to_string()),
        ("--seed", args.seed.to_string()),
        ("--ops", steps.to_string()),
        ("--max-bytes", (args.max_bytes / args.procs).to_string()),
        (
            "--max-files",
            (args.max_files / args.procs as usize).to_string(),
        ),
        ("--caps", caps.to_string()),
        ("--profile", word_of(args.profile)),
        ("--outage", word_of(outage)),
    ] {
        command.arg(option).arg(value);
    }
    if let Some(log) = &args.log {
        command.arg("--log").arg(log_path(log, worker));
    }
    command.spawn().call("start", &exe)
}

/// Returns the path of a worker's log.
pub fn log_path(base: &Path, worker: u64) -> PathBuf {
    let mut name = base.as_os_str().to_owned();
    name.push(format!(".p{worker}"));
    PathBuf::from(name)
}

fn manifest_path(out: &Path, worker: u64) -> PathBuf {
    out.join(format!("p{worker}.manifest"))
}

fn word_of(value: impl clap::ValueEnum) -> String {
    value
        .to_possible_value()
        .map_or(String::new(), |value| value.get_name().to_owned())
}
