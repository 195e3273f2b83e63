//! SIGKILL at a random moment of a storm: the journal is replayed by `e2fsck` and by our own next
//! mount, nothing is damaged, and every byte whose `fsync` had returned is there.

use std::fs::File;
use std::io::Write;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use rustix::fs::SeekFrom;

use crate::common::{
    Image, STORM, assert_clean, count, detach, is_root, output, run, seed, skip, text, tool,
};
use crate::need_fuse;

/// One storm, one kill, all checks.
fn round(options: &str, mount: &str, seed: u64) {
    let image = Image::new(options, "128M");
    let log = image.dir.path().join("promises");
    let mut mount = image.mount(mount);
    let mut storm = Command::new("timeout")
        .args(["-k", "5", "300", STORM, "run", "--expect-kill"])
        .arg("--dir")
        .arg(&mount.dir)
        .arg("--out")
        .arg(image.subdir("out"))
        .arg("--log")
        .arg(&log)
        .args(["--seed", &seed.to_string(), "--ops", "1000000"])
        // e2fsck takes years from 2310 on for mistakes of old kernels.
        .args(["--without", "time-wide"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // From the first operations to a few commits of the journal later.
    let moment = Duration::from_millis(300 + seed.wrapping_mul(2_654_435_761) % 7000);
    sleep(moment);
    assert!(storm.try_wait().unwrap().is_none(), "storm ended by itself");
    mount.kill();
    let ended = storm.wait_with_output().unwrap();
    // Not before: storm would find an empty directory.
    detach(&mount.dir);
    let what = format!("{options}, seed {seed}, killed after {moment:?}");
    assert!(ended.status.success(), "{what}: storm\n{}", text(&ended));

    let copy = image.copy("copy");
    let repaired = output(tool("e2fsck").arg("-p").arg(&copy));
    let code = repaired.status.code();
    // The one thing that no order of writes can spare an ext2: a directory that was on its way from
    // one directory to another stands in both, and e2fsck asks which is meant.
    let in_two_places =
        options.contains("ext2") && text(&repaired).contains("is a link to directory");
    if in_two_places {
        eprintln!("{what}: a directory on its way stands in two places, repaired with -y");
        output(tool("e2fsck").arg("-fy").arg(&copy));
    }
    assert!(
        in_two_places || matches!(code, Some(0 | 1)),
        "{what}: e2fsck -p: {code:?}\n{}",
        text(&repaired)
    );
    assert_clean(&copy);
    std::fs::remove_file(&copy).unwrap();

    // ext2 has no journal: its repair is e2fsck's work, before the next mount.
    if options.contains("ext2") {
        let answer = if in_two_places { "-fy" } else { "-p" };
        output(tool("e2fsck").arg(answer).arg(&image.path));
    }
    let mount = image.mount("");
    let checked = output(
        Command::new(STORM)
            .args(["check-durable", "--dir"])
            .arg(&mount.dir)
            .arg("--log")
            .arg(&log)
            .args(strong(options)),
    );
    assert!(
        checked.status.success(),
        "{what}: promises\n{}",
        text(&checked)
    );
    // It is alive, not only readable.
    run(Command::new("cp")
        .args(["-r", env!("CARGO_MANIFEST_DIR")])
        .arg(mount.dir.join("after")));
    mount.unmount();
    image.assert_clean();
}

/// Without a journal names are not those of one moment.
fn strong(options: &str) -> &'static [&'static str] {
    if options.contains("ext2") {
        &[]
    } else {
        &["--strong"]
    }
}

fn rounds(test: &str, options: &str, mount: &str, short: u64, long: u64) {
    need_fuse!(test);
    for round_number in 0..count(short, long) {
        round(options, mount, seed(test) + round_number);
    }
}

#[test]
fn ext4_survives() {
    rounds("kill::ext4_survives", "-t ext4 -b 4096", "", 4, 60);
}

#[test]
fn ext4_with_small_blocks_survives() {
    let name = "kill::ext4_with_small_blocks_survives";
    rounds(name, "-t ext4 -b 1024", "", 2, 20);
}

#[test]
fn ext3_survives() {
    rounds("kill::ext3_survives", "-t ext3 -b 4096", "", 2, 20);
}

#[test]
fn ext4_with_data_in_the_journal_survives() {
    let name = "kill::ext4_with_data_in_the_journal_survives";
    rounds(name, "-t ext4 -b 4096", "data=journal", 2, 20);
}

#[test]
fn ext2_is_repaired_without_questions() {
    let name = "kill::ext2_is_repaired_without_questions";
    rounds(name, "-t ext2 -b 4096", "", 2, 20);
}

/// What was lost: everything that used the mount, for ever. A search for data makes the kernel write
/// the file back first; a server killed meanwhile could not end for its thread that waited for that,
/// nor could the connection.
#[test]
fn a_kill_while_the_kernel_writes_back_ends_all() {
    need_fuse!("kill::a_kill_while_the_kernel_writes_back_ends_all");
    if !is_root()
        && std::fs::read_dir("/sys/fs/fuse/connections")
            .map_or(true, |mut list| list.next().is_none())
    {
        return skip(
            "kill::a_kill_while_the_kernel_writes_back_ends_all",
            "no fusectl",
        );
    }
    for _ in 0..count(5, 50) {
        let image = Image::new("-t ext4", "128M");
        let mut mount = image.mount("");
        let mut file = File::create_new(mount.dir.join("file")).unwrap();
        file.write_all(&vec![7; 40 << 20]).unwrap();
        let seeks = std::thread::spawn(move || {
            // Data, or the error of the connection's end.
            rustix::fs::seek(&file, SeekFrom::Data(0)).ok();
        });
        sleep(Duration::from_millis(5));
        mount.kill();
        seeks.join().unwrap();
        detach(&mount.dir);
    }
}
