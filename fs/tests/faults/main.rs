//! An error at each position of a workload in turn: every operation ends, none panics, what `fsync`
//! promised is there, and e2fsck repairs the rest without questions.
#![expect(clippy::unwrap_used, reason = "a test ends with a panic")]

mod scarce;
mod script;
#[path = "../storm/mod.rs"]
mod storm;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blockstack::DynDevice;
use blockstack::backend::mem::{Image, MemDisk};
use blockstack::testing::faulty::{Failure, FaultyDisk, Kinds, Rule};
use fs::options::DataMode;
use fs::{Fs, FsError, MountOptions};
use script::{Book, Script, check_promises};
use storm::image::{Scratch, has_error_state, has_journal};
use storm::{DIRECT, FILE, ME, ROOT, write};

static PROGRESS: AtomicU64 = AtomicU64::new(0);
static PANICS: AtomicU64 = AtomicU64::new(0);

fn is_long() -> bool {
    std::env::var_os("FUSEFS_STACK_LONG").is_some_and(|value| value == "1")
}

/// Ends the process where nothing moves for a minute, and counts panics of all threads.
fn watch() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.fetch_add(1, Ordering::SeqCst);
            before(info);
        }));
        std::thread::spawn(|| {
            let (mut seen, mut since) = (0, Instant::now());
            loop {
                std::thread::sleep(Duration::from_millis(500));
                let now = PROGRESS.load(Ordering::SeqCst);
                if now != seen {
                    (seen, since) = (now, Instant::now());
                } else if since.elapsed() > Duration::from_secs(60) {
                    eprintln!("no progress for a minute: a hang (run with FAULT_LOG=1)");
                    std::process::abort();
                }
            }
        });
    });
}

/// Mounts, runs the workload under `rule`, checks; gives the operations of the device.
fn run(scratch: &Scratch, made: &Image, data: DataMode, rule: Option<Rule>) -> Result<u64, String> {
    let disk = MemDisk::from_image("mem", made.clone());
    let (faulty, faults) = FaultyDisk::new(disk.clone());
    if let Some(rule) = rule.clone() {
        faults.add(rule);
    }
    let panics = PANICS.load(Ordering::SeqCst);
    let options = MountOptions {
        commit_secs: 60,
        data: Some(data),
        ..MountOptions::default()
    };
    let mut book = Book::default();
    let mut unmounted = Err("not mounted".to_owned());
    let mut failures = Vec::new();
    PROGRESS.fetch_add(1, Ordering::SeqCst);
    let dev: DynDevice = faulty;
    match Fs::mount(dev, options) {
        Err(error) => {
            if faults.failed() == 0 {
                return Err(format!("mount without a fault: {error}"));
            }
        }
        Ok(fs) => {
            let mut script = Script::new(&fs);
            script.run();
            if fs.journal.is_aborted() || fs.bufs.is_failed() {
                let refused = fs.create(ROOT, b"refused", FILE, 0, &ME).err();
                if !matches!(refused, Some(FsError::ReadOnly | FsError::Aborted)) {
                    return Err(format!("after an abort, create gives {refused:?}"));
                }
                if !fs.is_read_only() {
                    return Err("not read-only after an abort".to_owned());
                }
            }
            (book, failures) = script.close();
            unmounted = fs.unmount().map_err(|error| error.to_string());
            PROGRESS.fetch_add(1, Ordering::SeqCst);
        }
    }
    let seen = faults.seen();
    if PANICS.load(Ordering::SeqCst) != panics {
        return Err("a thread panicked".to_owned());
    }
    if faults.failed() == 0 && (!failures.is_empty() || unmounted.is_err()) {
        return Err(format!(
            "errors without a fault: {failures:?}, {unmounted:?}"
        ));
    }
    let image = disk.image();
    let about = |error: String| {
        let kept = Scratch::keep(&image, "faults");
        let failures: Vec<_> = failures.iter().take(4).collect();
        format!(
            "{error}\nunmount: {unmounted:?}, first failures {failures:?}, image: {}",
            kept.display()
        )
    };
    if unmounted.is_ok() && !has_error_state(&image) {
        scratch
            .check(&image)
            .map_err(|error| about(format!("after unmount: {error}")))?;
    }
    if unmounted.is_err() && !has_journal(&image) {
        // A commit in place that was cut short by an error is no state that was ever there.
        return Ok(seen);
    }
    let (code, text, repaired) = scratch.repair(&image);
    if !(0..=2).contains(&code) {
        return Err(about(format!("e2fsck -fp: exit code {code}\n{text}")));
    }
    PROGRESS.fetch_add(1, Ordering::SeqCst);
    scratch
        .check(&repaired)
        .map_err(|error| about(format!("after e2fsck -fp: {error}")))?;
    check_promises(repaired, &book).map_err(|error| about(format!("after e2fsck: {error}")))?;
    let after = check_promises(image.clone(), &book)
        .map_err(|error| about(format!("mounted again: {error}")))?;
    if !has_error_state(&after) {
        scratch
            .check(&after)
            .map_err(|error| about(format!("mounted again, unmounted: {error}")))?;
    }
    Ok(seen)
}

fn each_position(args: &[&str], size: &str, rule: impl Fn(u64) -> Rule) {
    each_position_of(DataMode::Ordered, args, size, rule);
}

fn each_position_of(data: DataMode, args: &[&str], size: &str, rule: impl Fn(u64) -> Rule) {
    watch();
    storm::log_to_stderr();
    let scratch = Scratch::new();
    let tree = concat!(env!("CARGO_MANIFEST_DIR"), "/src");
    let args = [args, &["-d", tree]].concat();
    let made = scratch.try_mkfs(&args, size).unwrap();
    let count = run(&scratch, &made, data, None).unwrap();
    let only = std::env::var("FAULT_AT")
        .ok()
        .map(|text| text.parse::<u64>().unwrap());
    let mut failed = Vec::new();
    for position in only.map_or(0..count, |at| at..at + 1) {
        if let Err(error) = run(&scratch, &made, data, Some(rule(position))) {
            println!("error at operation {position} of {count}: {error}");
            failed.push(position);
            assert!(failed.len() < 8, "failed at positions {failed:?}");
        }
    }
    assert!(failed.is_empty(), "failed at positions {failed:?}");
    println!("{args:?}: {count} positions");
}

const EXT4: [&str; 6] = ["-t", "ext4", "-b", "1024", "-J", "size=1"];
const EXT3: [&str; 6] = ["-t", "ext3", "-b", "1024", "-J", "size=1"];

#[test]
fn each_operation_fails_once() {
    each_position(&EXT4, "12M", Rule::nth);
}

#[test]
fn each_operation_fails_for_ever() {
    each_position(&EXT4, "12M", |at| Rule::nth(at).for_ever());
}

#[test]
fn each_write_and_flush_is_done_but_reported_as_failed() {
    let kinds = Kinds::WRITE | Kinds::FLUSH;
    each_position(&EXT4, "12M", |at| Rule {
        failure: Failure::Done,
        ..Rule::nth(at).of(kinds)
    });
}

#[test]
fn each_write_and_flush_fails_for_ever_while_reads_work() {
    let kinds = Kinds::WRITE | Kinds::FLUSH;
    each_position(&EXT4, "12M", |at| Rule::nth(at).of(kinds).for_ever());
}

#[test]
fn each_operation_fails_once_on_ext3() {
    each_position(&EXT3, "12M", Rule::nth);
}

#[test]
fn each_operation_fails_once_with_data_in_the_journal() {
    let args = ["-t", "ext4", "-b", "1024", "-J", "size=4"];
    each_position_of(DataMode::Journal, &args, "16M", Rule::nth);
}

#[test]
fn each_write_and_flush_fails_for_ever_with_data_in_the_journal() {
    let args = ["-t", "ext4", "-b", "1024", "-J", "size=4"];
    let kinds = Kinds::WRITE | Kinds::FLUSH;
    each_position_of(DataMode::Journal, &args, "16M", |at| {
        Rule::nth(at).of(kinds).for_ever()
    });
}

#[test]
fn each_operation_fails_once_without_a_journal() {
    each_position(&["-t", "ext2", "-b", "1024"], "12M", Rule::nth);
}

/// Lost: the whole file system, for who does not know what to answer to e2fsck.
#[test]
fn an_abort_while_files_without_a_name_are_open_needs_no_questions() {
    let scratch = Scratch::new();
    let disk = MemDisk::from_image("mem", scratch.try_mkfs(&EXT4, "12M").unwrap());
    let (faulty, faults) = FaultyDisk::new(disk.clone());
    let dev: DynDevice = faulty;
    let fs = Fs::mount(dev, MountOptions::default()).unwrap();
    for name in [b"one", b"two"] {
        let ino = fs.create(ROOT, name, FILE, 0, &ME).unwrap().ino;
        write(&fs, ino, 0, &[1; 5000], DIRECT).unwrap();
        fs.unlink(ROOT, name, &ME).unwrap();
    }
    fs.sync().unwrap();
    faults.add(Rule::nth(0).of(Kinds::WRITE));
    fs.create(ROOT, b"three", FILE, 0, &ME).unwrap();
    fs.sync().unwrap_err();
    fs.unmount().unwrap_err();
    let (code, text, repaired) = scratch.repair(&disk.image());
    assert!(code <= 1, "exit code {code}: {text}");
    scratch.check(&repaired).unwrap();
}
