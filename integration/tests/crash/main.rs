//! Crash states in the run of every change: ten thousand over several kinds of images; and faults
//! planted that must be found.
#![expect(clippy::unwrap_used, reason = "a test ends with a panic")]

mod command;

use std::path::PathBuf;
use std::process::Command;

use blockstack::log_writes::{Entry, LogFlags};
use fusefs_stack::crashtest::disk::tool;
use fusefs_stack::crashtest::exec::mount_options;
use fusefs_stack::crashtest::explore::Explorer;
use fusefs_stack::crashtest::judge::Judge;
use fusefs_stack::crashtest::kit::Kit;
use fusefs_stack::crashtest::run::{Config, Plan, Summary, run};
use fusefs_stack::crashtest::states::State;
use fusefs_stack::crashtest::workload::b3_setup;
use fusefs_stack::crashtest::{Error, script};

fn is_long() -> bool {
    std::env::var_os("FUSEFS_STACK_LONG").is_some_and(|value| value == "1")
}

fn words(program: &mut Command) -> (bool, String) {
    let out = program
        .output()
        .unwrap_or_else(|error| panic!("{program:?}: {error}"));
    let text = String::from_utf8_lossy(&[&out.stdout[..], &out.stderr].concat()).into_owned();
    (out.status.success(), text)
}

struct Made {
    dir: tempfile::TempDir,
    path: PathBuf,
}

/// An image made by mke2fs.
fn made(args: &[&str], size: &str) -> Made {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let mut mkfs = tool("mke2fs");
    mkfs.args(["-q", "-F"]).args(args).arg(&path).arg(size);
    let (ok, text) = words(&mut mkfs);
    assert!(ok, "{mkfs:?}: {text}");
    Made { dir, path }
}

fn tell(what: &str, summary: &Summary) {
    println!(
        "{what}: {} states ({} drawn) of {} workloads, {} entries, {} seen by e2fsck, in {:.1?}",
        summary.states,
        summary.drawn,
        summary.workloads,
        summary.entries,
        summary.fscked,
        summary.took
    );
    for find in &summary.finds {
        let violation = &find.violation;
        println!(
            "{}\n{}\n{}",
            find.name,
            violation.state.print(),
            violation.what
        );
    }
}

fn explore(args: &[&str], size: &str, states: u64) {
    let image = made(args, size);
    let before = std::fs::read(&image.path).unwrap();
    let kit = Kit::new(&image.path, &b3_setup()).unwrap();
    let config = Config {
        plan: Plan::All,
        states: if is_long() { states * 20 } else { states },
        threads: 2,
        ..Config::default()
    };
    let summary = run(&kit, &config, |_| ()).unwrap();
    tell(&format!("{args:?}"), &summary);
    assert!(summary.finds.is_empty(), "see above");
    assert!(summary.states >= config.states);
    assert!(summary.fscked > summary.states / 300);
    assert!(
        std::fs::read(&image.path).unwrap() == before,
        "the image was written to"
    );
}

#[test]
fn states_of_ext4() {
    explore(&["-t", "ext4", "-b", "4096", "-J", "size=4"], "16M", 4000);
}

#[test]
fn states_of_ext4_with_blocks_of_1k() {
    explore(&["-t", "ext4", "-b", "1024", "-J", "size=1"], "8M", 2500);
}

#[test]
fn states_of_ext3() {
    explore(&["-t", "ext3", "-b", "1024", "-J", "size=1"], "8M", 2000);
}

#[test]
fn states_without_checksums() {
    let features = "^metadata_csum,uninit_bg";
    explore(&["-t", "ext4", "-O", features, "-J", "size=4"], "16M", 1500);
}

#[test]
fn an_image_without_a_journal_is_refused() {
    let image = made(&["-t", "ext2"], "8M");
    assert!(matches!(Kit::new(&image.path, &[]), Err(Error::NoJournal)));
}

/// The planted fault: the commit record is written without the flush before it.
fn without_flushes(entries: Vec<Entry>) -> Vec<Entry> {
    let is_flush = |entry: &Entry| entry.flags == LogFlags::FLUSH;
    entries
        .into_iter()
        .filter(|entry| !is_flush(entry))
        .collect()
}

const SCRIPT: &str = "create A/new\nwrite A/new 0 20000\nfsync A/new\nrename A/new foo\nfsync A";

#[test]
fn a_commit_without_its_flush_is_found_and_made_small_and_comes_back_from_its_file() {
    let image = made(&["-t", "ext4", "-b", "4096", "-J", "size=4"], "16M");
    let kit = Kit::new(&image.path, &b3_setup()).unwrap();
    let ops = script::parse(SCRIPT).unwrap();
    let whole = kit.record(&ops, mount_options()).unwrap();
    let judge = Judge::new(1).unwrap();
    let find = |entries: &[Entry], variants| {
        let history = kit.history(entries).unwrap();
        let explorer = Explorer {
            origin: &kit.origin,
            entries,
            history: &history,
            judge: &judge,
            variants,
            seed: 1,
        };
        let violation = explorer.run(|_| true, |_| true).violation?;
        let small = explorer.shrink(&violation);
        assert!(explorer.fault_of(&small.state).is_some());
        Some((violation, small))
    };
    assert!(find(&whole, 16).is_none(), "as it is, all is well");
    let entries = without_flushes(whole);
    let (first, small) = find(&entries, 16).expect("the fault was not found");
    println!(
        "found {}, made {}",
        first.state.print(),
        small.state.print()
    );
    println!("{}", small.what);
    assert_eq!(
        small.state.broken.len(),
        1,
        "one write too many that is not there"
    );
    assert!(small.state.prefix <= first.state.prefix);

    let file = image.dir.path().join("find");
    kit.save_find(&file, &entries, &small).unwrap();
    let (again, log, state) = Kit::load_find(&image.path, &file).unwrap();
    assert_eq!(state, small.state);
    let history = again.history(&log).unwrap();
    let explorer = Explorer {
        origin: &again.origin,
        entries: &log,
        history: &history,
        judge: &judge,
        variants: 0,
        seed: 0,
    };
    assert_eq!(explorer.fault_of(&state), Some(small.what));
    let fine = State {
        broken: Vec::new(),
        ..state
    };
    assert_eq!(explorer.fault_of(&fine), None);
}

#[test]
fn a_mount_that_never_flushes_is_found() {
    let image = made(&["-t", "ext4", "-b", "1024", "-J", "size=1"], "8M");
    let kit = Kit::new(&image.path, &b3_setup()).unwrap();
    let config = Config {
        barrier: false,
        threads: 2,
        ..Config::default()
    };
    let summary = run(&kit, &config, |_| ()).unwrap();
    tell("without barriers", &summary);
    assert!(!summary.finds.is_empty());
}
