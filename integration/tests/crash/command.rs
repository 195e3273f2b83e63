//! The command, as its users see it, and workloads on real mounts.

use std::path::Path;
use std::process::{Command, Output};

use super::{Made, made};

const PROGRAM: &str = env!("CARGO_BIN_EXE_fusefs-stack");

fn image() -> Made {
    made(&["-t", "ext4", "-b", "1024", "-J", "size=1"], "8M")
}

fn crashtest(image: &Made, args: &[&str]) -> Output {
    let mut command = Command::new(PROGRAM);
    command.current_dir(image.dir.path());
    command.arg("crashtest").args(args).arg(&image.path);
    command.output().unwrap()
}

fn text(out: &Output) -> String {
    String::from_utf8_lossy(&[&out.stdout[..], &out.stderr].concat()).into_owned()
}

#[track_caller]
fn expect(out: &Output, code: i32, parts: &[&str]) {
    let text = text(out);
    assert_eq!(out.status.code(), Some(code), "{text}");
    for part in parts {
        assert!(text.contains(part), "no {part:?} in: {text}");
    }
}

/// Whether a file system can be mounted here; says so where not.
fn has_fuse(test: &str) -> bool {
    let there = Path::new("/dev/fuse").exists();
    if !there {
        let line = format!("SKIPPED {test}: there is no /dev/fuse\n");
        print!("{line}");
        if let Some(path) = std::env::var_os("FUSEFS_STACK_SKIPS") {
            let mut file = std::fs::File::options().append(true).open(path).unwrap();
            std::io::Write::write_all(&mut file, line.as_bytes()).unwrap();
        }
    }
    there
}

#[test]
fn the_exit_code_tells_what_came_of_it() {
    let image = image();
    let few = ["--workload", "b3-1", "--states", "60"];
    expect(&crashtest(&image, &few), 0, &["no violation", "states of"]);
    let json = crashtest(&image, &[&few[..], &["--json"]].concat());
    expect(&json, 0, &["{\"states\":6", "\"finds\":[]}"]);
    expect(
        &crashtest(&image, &["--workload", "none"]),
        1,
        &["none", "b3-1"],
    );
    expect(&crashtest(&image, &["--script", "gone"]), 1, &["gone"]);
    let both = ["--script", "a", "--command", "b"];
    expect(&crashtest(&image, &both), 1, &["cannot be used with"]);
    expect(
        &crashtest(&image, &["--help"]),
        0,
        &["--replay", "Examples"],
    );
    let other = image.dir.path().join("none");
    let gone = Command::new(PROGRAM)
        .args(["crashtest"])
        .arg(&other)
        .output()
        .unwrap();
    expect(&gone, 32, &["none", "No such file"]);
    let ext2 = made(&["-t", "ext2"], "8M");
    expect(&crashtest(&ext2, &[]), 32, &["no journal"]);
}

#[test]
fn a_signal_ends_a_run_that_says_what_it_has_seen() {
    let image = image();
    let mut command = Command::new(PROGRAM);
    command.args(["crashtest", "--states", "100000000", "--json"]);
    command
        .arg(&image.path)
        .stdout(std::process::Stdio::piped());
    let child = command.spawn().unwrap();
    // It hears of signals once it reads the image as a whole; one too early kills it.
    let pid = rustix::process::Pid::from_child(&child);
    let status = format!("/proc/{}/status", child.id());
    for _ in 0..1000 {
        let text = std::fs::read_to_string(&status).unwrap();
        let caught = text
            .lines()
            .find_map(|line| line.strip_prefix("SigCgt:"))
            .unwrap();
        // SIGTERM is 15.
        if u64::from_str_radix(caught.trim(), 16).unwrap() & (1 << 14) != 0 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let out = child.wait_with_output().unwrap();
    expect(&out, 130, &["{\"states\":", "\"finds\":[]}"]);
}

#[test]
fn a_find_is_written_and_shown_again() {
    let image = image();
    let found = crashtest(&image, &["--no-barrier", "--find", "it", "--threads", "1"]);
    expect(&found, 2, &["VIOLATION", "state: crash", "--replay it"]);
    let text = text(&found);
    let state = text
        .lines()
        .find(|line| line.starts_with("state: "))
        .unwrap();
    let again = crashtest(&image, &["--replay", "it"]);
    expect(&again, 2, &[state]);
    let other = crashtest(&image, &["--replay", "image"]);
    expect(&other, 32, &["not a log of writes"]);
}

#[test]
fn a_directory_of_that_name_is_a_mountpoint_as_ever() {
    let image = image();
    std::fs::create_dir(image.dir.path().join("crashtest")).unwrap();
    let mut command = Command::new(PROGRAM);
    command.current_dir(image.dir.path());
    // The mount is refused because of the image, in the words of a mount.
    let out = command.args(["crashtest", "gone"]).output().unwrap();
    expect(&out, 32, &["fusefs-stack: "]);
    assert!(!text(&out).contains("crashtest: "), "{}", text(&out));
    let few = ["--workload", "b3-1", "--states", "20"];
    expect(&crashtest(&image, &few), 0, &["no violation"]);
}

const SCRIPT: &str = "\
    mkdir d\ncreate d/f\nwrite d/f 0 30000\nfsync d/f\ncreate new\nmwrite d/f 5000 9000\n\
    write new 0 7000\nfdatasync new\nrename new d/f\nfsync d\ndwrite d/f 4096 4096\n\
    swrite d/f 100 50\nsetxattr d/f user.a 100\nlink d/f g\ntruncate g 3000\nfsync g\n\
    exchange d/f g\nsymlink target s\nchmod g 600\nfalloc g 8192 8192\npunch g 0 1000\n\
    rmxattr g user.a\nunlink s\nsync\nmkdir e\nrmdir e\nmkdir e\nunlink nothing\n";

#[test]
fn a_script_runs_on_a_mount_and_keeps_its_promises() {
    if !has_fuse("a_script_runs_on_a_mount_and_keeps_its_promises") {
        return;
    }
    let image = image();
    std::fs::write(image.dir.path().join("script"), SCRIPT).unwrap();
    let args = ["--script", "script", "--states", "1000"];
    expect(&crashtest(&image, &args), 0, &["no violation"]);
    let planted = [&args[..], &["--no-barrier"]].concat();
    expect(&crashtest(&image, &planted), 2, &["VIOLATION", "again: "]);
}

#[test]
fn what_a_command_writes_is_explored() {
    if !has_fuse("what_a_command_writes_is_explored") {
        return;
    }
    let image = image();
    let work = "mkdir a && echo text >a/b && sync a/b && echo here >$CRASHTEST_MARKS && \
        cp -r /etc/skel . && mv a/b c && test $PWD = $CRASHTEST_DIR && sync c";
    let args = ["--command", work, "--states", "300"];
    expect(
        &crashtest(&image, &args),
        0,
        &["no violation", "of 1 workloads"],
    );
    let args = ["--command", "exit 3", "--states", "300"];
    expect(&crashtest(&image, &args), 32, &["exit 3", "exit status: 3"]);
}
