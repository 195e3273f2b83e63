//! What the administrator asks for: shutdown, discards. What a full file system tells.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output};

use crate::common::{
    Image, Mount, PROGRAM, assert_clean, detach, is_root, output, run, shell, skip, text,
};
use crate::need_fuse;

/// A user who is not root.
const SOMEBODY: &str = "65534";

/// Ends the test that the macro stands in where the caller is not root.
macro_rules! need_root {
    ($test:expr) => {
        need_fuse!($test);
        if !is_root() {
            return skip($test, "needs root");
        }
    };
}

/// `FS_IOC_SHUTDOWN` on a file, `EXT4_GOING_FLAGS_NOLOGFLUSH`.
fn shut_down(file: &Path, user: &str) -> Output {
    let script = r#"open(my $f, "<", $ARGV[0]) or die "open: $!";
        my $flags = pack("L", 2); ioctl($f, 0x8004587d, $flags) or die "ioctl: $!\n";"#;
    let mut command = Command::new("setpriv");
    command.args(["--reuid", user, "--clear-groups", "perl", "-e", script]);
    output(command.arg(file))
}

#[test]
fn after_a_shutdown_everything_fails_and_what_was_synced_is_there() {
    need_root!("admin::after_a_shutdown_everything_fails_and_what_was_synced_is_there");
    let image = Image::new("-t ext4", "64M");
    let mount = image.mount("commit=1000");
    let (file, other) = (mount.dir.join("file"), mount.dir.join("other"));
    fs::write(&file, "synced").unwrap();
    // As FUSE does not tell of it, a shutdown that does not flush must.
    shell(&mount.dir, "sync -f .");
    let refused = shut_down(&file, SOMEBODY);
    assert!(
        text(&refused).contains("Operation not permitted"),
        "{refused:?}"
    );
    fs::write(&other, "still works").unwrap();
    let done = shut_down(&file, "0");
    assert!(done.status.success(), "{done:?}");
    let eio = Some(libc::EIO);
    let code = |result: std::io::Result<()>| result.err().and_then(|error| error.raw_os_error());
    assert_eq!(code(fs::write(mount.dir.join("new"), "")), eio);
    assert_eq!(code(fs::remove_file(&file)), eio);
    assert_eq!(code(fs::create_dir(mount.dir.join("dir"))), eio);
    assert_eq!(
        code(
            fs::read_dir(&mount.dir)
                .map(drop)
                .and_then(|()| list(&mount.dir))
        ),
        eio
    );
    let synced = File::open(&file).and_then(|file| file.sync_all());
    assert_eq!(code(synced), eio);
    mount.unmount();
    let mount = image.mount("");
    assert_eq!(fs::read(&file).unwrap(), b"synced");
    mount.unmount();
    image.assert_clean();
}

fn list(dir: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)? {
        entry?;
    }
    Ok(())
}

/// Bytes that a file takes on its own file system.
fn taken(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

const BIG: u64 = 32 << 20;

/// Writes a big file and removes it. Returns what the image took in between, and takes after the
/// blocks came back, or after some time.
fn write_and_remove(image: &Image, mount: &Mount) -> (u64, u64) {
    shell(&mount.dir, "head -c 32M /dev/urandom >big; sync big");
    let full = taken(&image.path);
    fs::remove_file(mount.dir.join("big")).unwrap();
    // The file is deleted in the background, and its blocks come back with a commit.
    for round in 0..100 {
        shell(&mount.dir, &format!("echo {round} >small; sync small"));
        if taken(&image.path) + BIG / 2 < full {
            break;
        }
    }
    (full, taken(&image.path))
}

#[test]
fn discard_gives_back_what_is_freed_and_nothing_does_without() {
    need_fuse!("admin::discard_gives_back_what_is_freed_and_nothing_does_without");
    for (options, gives_back) in [("discard", true), ("", false)] {
        let image = Image::new("-t ext4", "128M");
        let mount = image.mount(options);
        let (full, after) = write_and_remove(&image, &mount);
        assert!(full > BIG, "{full}");
        assert_eq!(
            after + BIG / 2 < full,
            gives_back,
            "{options:?}: {full} {after}"
        );
        mount.unmount();
        image.assert_clean();
    }
}

#[test]
fn fstrim_gives_back_what_is_free() {
    need_root!("admin::fstrim_gives_back_what_is_free");
    let image = Image::new("-t ext4", "128M");
    let mount = image.mount("");
    let kept = vec![7; 1 << 20];
    fs::write(mount.dir.join("kept"), &kept).unwrap();
    let (full, after) = write_and_remove(&image, &mount);
    assert_eq!(after.max(full), after, "nothing came back yet");
    let mut fstrim = Command::new("setpriv");
    fstrim.args(["--reuid", SOMEBODY, "--clear-groups", "fstrim"]);
    let refused = output(fstrim.arg(&mount.dir));
    assert!(
        text(&refused).contains("Operation not permitted"),
        "{refused:?}"
    );
    let said = run(Command::new("fstrim").arg("-v").arg(&mount.dir));
    let last = taken(&image.path);
    assert!(last + BIG / 2 < after, "{said}: {after} to {last}");
    // Runs longer than a group can have: as the kernel's.
    let too_long = output(Command::new("fstrim").args(["-m", "1G"]).arg(&mount.dir));
    assert!(text(&too_long).contains("Invalid argument"), "{too_long:?}");
    assert_eq!(fs::read(mount.dir.join("kept")).unwrap(), kept);
    mount.unmount();
    image.assert_clean();
}

/// What was lost: everything. A program that writes until the disk is full, as `dd` does, wrote for
/// ever: the page cache took it all, and the error was told only to `fsync` and `close`.
#[test]
fn who_writes_until_the_disk_is_full_is_told() {
    need_fuse!("admin::who_writes_until_the_disk_is_full_is_told");
    let image = Image::new("-t ext4", "64M");
    let mount = image.mount("");
    let path = mount.dir.join("fill");
    let mut file = File::create(&path).unwrap();
    let bytes = vec![1; 1 << 20];
    let mut written = 0_u64;
    let error = loop {
        match file.write(&bytes) {
            Ok(n) => written += n as u64,
            Err(error) => break error,
        }
        assert!(written < 16 << 30, "no error after {written} bytes");
    };
    assert_eq!(error.kind(), ErrorKind::StorageFull);
    // Once for each time: who looks at the file, or goes on with what fits, is not in its way.
    assert!(fs::metadata(&path).unwrap().len() >= 32 << 20);
    drop(file);
    fs::remove_file(&path).unwrap();
    fs::write(&path, "fits").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"fits");
    mount.unmount();
    image.assert_clean();
}

/// As the kernel's ext4 does where the device can be written: `ro` is about files.
#[test]
fn a_read_only_mount_replays_the_journal() {
    need_fuse!("admin::a_read_only_mount_replays_the_journal");
    let image = Image::new("-t ext4", "64M");
    let mut mount = image.mount("");
    let path = mount.dir.join("file");
    fs::write(&path, "synced").unwrap();
    shell(&mount.dir, "sync file");
    // Removed and still open: what a crash leaves.
    let doomed = File::create_new(mount.dir.join("doomed")).unwrap();
    fs::remove_file(mount.dir.join("doomed")).unwrap();
    shell(&mount.dir, "sync file");
    mount.kill();
    drop(doomed);
    detach(&mount.dir);
    // Not the image itself: the system takes its time to close what a killed process had open.
    let copy = image.copy("copy");
    let mount = Mount::new(&copy, &mount.dir, "ro");
    assert_eq!(fs::read(&path).unwrap(), b"synced");
    let refused = fs::write(&path, "changed").unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ReadOnlyFilesystem);
    mount.unmount();
    assert_clean(&copy);
}

/// As `chmod`: the kernel leaves it to the server, and FUSE sends one group only.
#[test]
fn an_acl_of_somebody_outside_the_group_clears_the_set_group_id_bit() {
    need_root!("admin::an_acl_of_somebody_outside_the_group_clears_the_set_group_id_bit");
    let image = Image::new("-t ext4", "64M");
    let mount = image.mount("");
    let path = mount.dir.join("file");
    for (groups, kept) in [("1", false), ("1,1234", true)] {
        fs::write(&path, "").unwrap();
        shell(
            &mount.dir,
            &format!("chown {SOMEBODY}:1234 file; chmod 2771 file"),
        );
        let mut setfacl = Command::new("setpriv");
        setfacl.args(["--reuid", SOMEBODY, "--regid", "1", "--groups", groups]);
        run(setfacl.args(["setfacl", "-m", "u:2:r"]).arg(&path));
        let mode = fs::metadata(&path).unwrap().mode();
        assert_eq!(mode & 0o2000 != 0, kept, "groups {groups}: {mode:o}");
        fs::remove_file(&path).unwrap();
    }
    mount.unmount();
    image.assert_clean();
}

/// What was lost: the mode that `stat` shows, where the kernel had it from before. It does not expect
/// that preallocation, a copy or a direct write clears the set-user-id bit.
#[test]
fn what_changes_a_file_clears_its_set_user_id_bit_at_once() {
    need_root!("admin::what_changes_a_file_clears_its_set_user_id_bit_at_once");
    let image = Image::new("-t ext4", "64M");
    let mount = image.mount("");
    let changes = [
        "fallocate -l 8192 file",
        "fallocate -p -l 4096 file",
        "dd if=/dev/zero of=file bs=4096 count=1 oflag=direct conv=notrunc",
        "dd if=/dev/zero of=file bs=4096 count=1 conv=notrunc",
    ];
    let mut wrong = Vec::new();
    for (change, before) in changes
        .iter()
        .flat_map(|change| [(change, "6766"), (change, "6776")])
    {
        shell(
            &mount.dir,
            &format!(
                "head -c 16384 /dev/zero >file; chmod {before} file; sync file; stat file
                setpriv --reuid {SOMEBODY} --regid {SOMEBODY} --clear-groups {change}"
            ),
        );
        // Which asks for the mode alone: of other attributes the kernel knows that they changed.
        let mode = shell(&mount.dir, "stat -c %a file");
        if format!("6{}", mode.trim()) != before {
            wrong.push(format!("{change}: {before} became {mode}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    mount.unmount();
    image.assert_clean();
}

/// What was seen: a device that is set to be read only can be opened for writing, and then every
/// write fails, with an error that says nothing of it.
#[test]
fn a_write_protected_device_is_named_as_such() {
    need_root!("admin::a_write_protected_device_is_named_as_such");
    let image = Image::new("-t ext4", "64M");
    let found = output(
        Command::new("losetup")
            .args(["-f", "--show"])
            .arg(&image.path),
    );
    if !found.status.success() {
        return skip(
            "admin::a_write_protected_device_is_named_as_such",
            "no loop device",
        );
    }
    let device = String::from_utf8_lossy(&found.stdout).trim().to_owned();
    let dir = image.subdir("mnt");
    run(Command::new("blockdev").args(["--setro", &device]));
    let refused = output(Command::new(PROGRAM).arg(&dir).arg(&device));
    if refused.status.success() {
        detach(&dir);
    } else {
        Mount::new(device.as_ref(), &dir, "ro").unmount();
    }
    // It would stay so for whoever has the loop device next.
    run(Command::new("blockdev").args(["--setrw", &device]));
    run(Command::new("losetup").args(["-d", &device]));
    let said = text(&refused);
    assert_eq!(refused.status.code(), Some(32), "{said}");
    assert!(
        said.contains("is write-protected (mount with -o ro"),
        "{said}"
    );
}

/// What mount(8) and umount(8) run.
#[test]
fn the_mount_helper_remounts_binds_and_waits() {
    need_root!("admin::the_mount_helper_remounts_binds_and_waits");
    let image = Image::new("-t ext4", "256M");
    let (one, two) = (image.subdir("one"), image.subdir("two"));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../contrib/mount.fuse.fusefs-stack");
    let names = ["mount", "umount"].map(|name| image.dir.path().join(format!("{name}.fuse.x")));
    for name in &names {
        std::os::unix::fs::symlink(&script, name).unwrap();
    }
    let helper = |name: &Path, words: &[&Path]| {
        let mut command = Command::new(name);
        output(command.args(words).env("FUSEFS_STACK", PROGRAM))
    };
    let [mount, umount] = names;
    let done = |output: Output| assert!(output.status.success(), "{}", text(&output));
    let refused = |output: Output| assert!(!output.status.success(), "{}", text(&output));
    let option = |word: &'static str| [Path::new("-o"), Path::new(word)];
    let at = |dir, words: [&'static Path; 2]| [&image.path, dir, words[0], words[1]].map(Path::new);

    done(helper(&mount, &at(&one, option("rw,loop"))));
    fs::write(one.join("file"), "content").unwrap();
    done(helper(&mount, &at(&one, option("remount,ro"))));
    let error = fs::write(one.join("new"), "").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnlyFilesystem);
    done(helper(&mount, &at(&one, option("remount,rw"))));
    done(helper(&mount, &at(&two, option("ro"))));
    assert_eq!(fs::read(two.join("file")).unwrap(), b"content");
    let error = fs::write(two.join("new"), "").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnlyFilesystem);
    done(helper(&umount, &[&two]));
    // Much that is left to be written when the kernel has let go.
    shell(&one, "for i in $(seq 2000); do : >$i; done");
    done(helper(&umount, &[&one]));
    assert_eq!(superblock_state(&image.path), 1, "not unmounted yet");
    image.assert_clean();
    refused(helper(&umount, &[&one]));
}

/// `s_state` of an image: 1 where it was unmounted to the end.
fn superblock_state(image: &Path) -> u8 {
    use std::os::unix::fs::FileExt;
    let mut byte = [0];
    let file = File::open(image).unwrap();
    file.read_exact_at(&mut byte, 1024 + 0x3a).unwrap();
    byte[0]
}
