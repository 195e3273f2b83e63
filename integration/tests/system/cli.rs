//! Arguments, options, exit codes, signals, the background.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread::sleep;
use std::time::Duration;

use crate::common::{Image, PROGRAM, detach, is_root, output, run, shell, skip, text, tool};
use crate::need_fuse;

/// Removes the mount when a test fails in between.
struct Detach(PathBuf);

impl Drop for Detach {
    fn drop(&mut self) {
        detach(&self.0);
    }
}

fn program(args: &[&str]) -> Output {
    output(Command::new(PROGRAM).args(args))
}

fn utf8(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Type and source of what is mounted on `dir`, and its options.
fn mounted(dir: &Path) -> Option<String> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = table
        .lines()
        .find(|line| line.split(' ').nth(4) == dir.to_str())?;
    Some(line.to_owned())
}

/// Unmounts and waits until the process has put everything on disk and removed its lock file.
fn unmount(dir: &Path, lock: &Path) {
    run(Command::new("fusermount3").arg("-u").arg(dir));
    for _ in 0..6000 {
        if !lock.exists() {
            return;
        }
        sleep(Duration::from_millis(10));
    }
    panic!("the process does not end");
}

#[test]
fn help_and_version_go_to_standard_output() {
    for (word, part) in [
        ("--help", "MOUNTPOINT"),
        ("-h", "fusermount3 -u"),
        ("-V", env!("CARGO_PKG_VERSION")),
        ("--version", "fusefs-stack"),
    ] {
        let output = program(&[word]);
        assert_eq!(output.status.code(), Some(0), "{word}");
        let out = String::from_utf8(output.stdout).unwrap();
        assert!(out.contains(part), "{word}: {out}");
        assert!(output.stderr.is_empty());
    }
}

#[test]
fn check_tells_what_is_wrong_and_changes_nothing() {
    let image = Image::new("-t ext4", "16M");
    let path = utf8(&image.path);
    let sound = program(&["check", path]);
    assert_eq!(sound.status.code(), Some(0), "{}", text(&sound));
    run(tool("debugfs")
        .args(["-w", "-R", "sif <2> links_count 77"])
        .arg(path));
    let before = std::fs::read(&image.path).unwrap();
    let found = program(&["check", path]);
    let line = "preen: inode 2: i_links_count is 77, expected 3";
    assert_eq!(found.status.code(), Some(4), "{}", text(&found));
    assert!(text(&found).contains(line), "{}", text(&found));
    let json = program(&["check", "--json", path]);
    let part = "\"clean\":false,\"findings\":[{\"class\":\"preen\",\"kind\":\"Links\",";
    assert_eq!(json.status.code(), Some(4));
    assert!(text(&json).contains(part), "{}", text(&json));
    assert!(std::fs::read(&image.path).unwrap() == before);
    assert_eq!(program(&["check"]).status.code(), Some(16));
    assert_eq!(program(&["check", "/nowhere"]).status.code(), Some(8));
}

#[test]
fn a_mountpoint_with_the_name_of_a_command_is_a_mountpoint() {
    let image = Image::new("-t ext4", "8M");
    image.subdir("check");
    let mut command = Command::new(PROGRAM);
    command.current_dir(image.path.parent().unwrap());
    let output = output(command.args(["check", "no-such-image"]));
    assert_eq!(output.status.code(), Some(32), "{}", text(&output));
}

#[test]
fn a_wrong_command_line_ends_with_1() {
    let image = Image::new("-t ext4", "8M");
    let (dir, path) = (image.subdir("mnt"), utf8(&image.path));
    let dir = utf8(&dir);
    for (args, part) in [
        (&[][..], "MOUNTPOINT"),
        (&[dir], "IMAGE"),
        (&["-x", dir, path], "-x"),
        (&["-o", "fnord", dir, path], "fnord"),
        (&["-o", "ro,data=none", dir, path], "data=none"),
        (&["-o", "noload", dir, path], "ro"),
        (&["-o", "commit=soon", dir, path], "soon"),
    ] {
        let output = program(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let text = text(&output);
        assert!(text.contains(part), "{args:?}: {text}");
    }
}

#[test]
fn goes_to_the_background_when_the_mount_answers() {
    need_fuse!("cli::goes_to_the_background_when_the_mount_answers");
    let image = Image::new("-t ext4", "16M");
    let (dir, lock) = (image.subdir("mnt"), image.dir.path().join("lock"));
    let _detach = Detach(dir.clone());
    let options = format!("lockfile={}", utf8(&lock));
    // The order of arguments does not matter.
    for (round, swap) in [false, true].into_iter().enumerate() {
        let (first, second) = if swap {
            (&image.path, &dir)
        } else {
            (&dir, &image.path)
        };
        let args = ["-o", &options, utf8(first), utf8(second)];
        // Returns only because the process in the background holds none of the pipes.
        let output = program(&args);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output));
        assert_eq!(text(&output), "");
        let line = mounted(&dir).expect("mounted when the program returns");
        let source = format!("- fuse.fusefs-stack {} ", utf8(&image.path));
        assert!(line.contains(&source), "{line}");
        assert!(lock.exists());
        assert_eq!(dir.join("file").exists(), round == 1);
        std::fs::write(dir.join("file"), "content").unwrap();
        unmount(&dir, &lock);
        image.assert_clean();
    }
}

#[test]
fn root_mounts_as_mount_does() {
    let test = "cli::root_mounts_as_mount_does";
    need_fuse!(test);
    if !is_root() {
        return skip(test, "needs root");
    }
    let image = Image::new("-t ext4", "16M");
    let mount = image.mount("");
    let line = mounted(&mount.dir).unwrap();
    assert!(line.contains("allow_other"), "{line}");
    assert!(line.contains("default_permissions"), "{line}");
    assert!(
        !line.contains("nosuid") && !line.contains("nodev"),
        "{line}"
    );
    mount.unmount();

    let mount = image.mount("nosuid,nodev,noexec,noallow_other,fsname=a name,subtype=ext4");
    let line = mounted(&mount.dir).unwrap();
    assert!(!line.contains("allow_other"), "{line}");
    for part in ["nosuid", "nodev", "noexec", " - fuse.ext4 a\\040name "] {
        assert!(line.contains(part), "{part}: {line}");
    }
    mount.unmount();
}

#[test]
fn signals_unmount_cleanly() {
    need_fuse!("cli::signals_unmount_cleanly");
    for signal in ["INT", "TERM", "HUP"] {
        let image = Image::new("-t ext4", "16M");
        let mut mount = image.mount("");
        std::fs::write(mount.dir.join("file"), vec![7; 300_000]).unwrap();
        let pid = mount.pid().to_string();
        run(Command::new("kill").args(["-s", signal, &pid]));
        let status = mount.wait();
        assert!(status.success(), "SIG{signal}: {status}\n{}", mount.log());
        assert!(mounted(&mount.dir).is_none(), "SIG{signal}: still mounted");
        image.assert_clean();
        let mount = image.mount("ro");
        let content = std::fs::read(mount.dir.join("file")).unwrap();
        assert!(content == vec![7; 300_000], "SIG{signal}: content is lost");
        mount.unmount();
    }
}

#[test]
fn read_only_changes_no_byte() {
    need_fuse!("cli::read_only_changes_no_byte");
    for options in ["-t ext2", "-t ext3", "-t ext4"] {
        let image = Image::new(options, "16M");
        let mount = image.mount("");
        std::fs::write(mount.dir.join("file"), "content").unwrap();
        mount.unmount();
        let before = std::fs::read(&image.path).unwrap();
        let mount = image.mount("ro");
        let path = mount.dir.join("file");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "content");
        let error = std::fs::write(&path, "other").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        let error = std::fs::create_dir(mount.dir.join("new")).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        mount.unmount();
        assert!(before == std::fs::read(&image.path).unwrap(), "{options}");
    }
}

#[test]
fn offset_finds_a_partition() {
    need_fuse!("cli::offset_finds_a_partition");
    let inner = Image::new("-t ext4", "16M");
    let disk = Image::raw();
    let offset = 1 << 20;
    let mut bytes = vec![0xa5; offset];
    bytes.extend(std::fs::read(&inner.path).unwrap());
    bytes.extend(vec![0x5a; offset]);
    std::fs::write(&disk.path, &bytes).unwrap();

    let mount = disk.mount(&format!("offset={offset}"));
    std::fs::write(mount.dir.join("file"), "content").unwrap();
    mount.unmount();

    let bytes = std::fs::read(&disk.path).unwrap();
    let (before, rest) = bytes.split_at(offset);
    let (partition, after) = rest.split_at(16 << 20);
    assert!(before.iter().all(|&byte| byte == 0xa5), "written before it");
    assert!(after.iter().all(|&byte| byte == 0x5a), "written behind it");
    std::fs::write(&inner.path, partition).unwrap();
    inner.assert_clean();
    let mount = inner.mount("ro");
    let content = std::fs::read_to_string(mount.dir.join("file")).unwrap();
    assert_eq!(content, "content");
    mount.unmount();
}

#[test]
fn an_open_file_keeps_the_process_until_it_is_closed() {
    need_fuse!("cli::an_open_file_keeps_the_process_until_it_is_closed");
    let image = Image::new("-t ext4", "16M");
    let mut mount = image.mount("");
    let file = std::fs::File::create(mount.dir.join("file")).unwrap();
    let busy = output(Command::new("fusermount3").arg("-u").arg(&mount.dir));
    assert!(!busy.status.success(), "unmounted while a file is open");
    detach(&mount.dir);
    std::io::Write::write_all(&mut &file, b"late").unwrap();
    drop(file);
    assert!(mount.wait().success(), "{}", mount.log());
    image.assert_clean();
    let mount = image.mount("ro");
    let content = std::fs::read_to_string(mount.dir.join("file")).unwrap();
    assert_eq!(content, "late");
    mount.unmount();
}

#[test]
fn a_shell_session_works() {
    need_fuse!("cli::a_shell_session_works");
    let image = Image::new("-t ext4", "64M");
    let mount = image.mount("");
    let script = "
        mkdir -p a/b/c && echo one >a/b/c/f && ln a/b/c/f hard && ln -s a/b/c/f soft
        cat soft hard | cmp - <(printf 'one\\none\\n')
        mv a/b/c/f g && test $(stat -c %h g) = 2 && chmod 0600 g && test $(stat -c %a g) = 600
        truncate -s 1M g && test $(stat -c %s g) = 1048576
        dd if=/dev/urandom of=rnd bs=64k count=20 2>/dev/null && cp rnd copy && cmp rnd copy
        tar cf t.tar a hard rnd && mkdir out && tar xf t.tar -C out && cmp out/rnd rnd
        for i in $(seq 300); do echo $i >a/$i; done; test $(find a -type f | wc -l) = 300
        rm -r a out && test ! -e a && sync -f .
        touch -d '2001-02-03 04:05:06.789' g && test \"$(stat -c %y g | cut -c 1-23)\" = '2001-02-03 04:05:06.789'
        mkfifo p && mknod -m 600 s p && test -p s";
    shell(&mount.dir, script);
    mount.unmount();
    image.assert_clean();
}

/// The kernel asks where data is without writing its page cache back: a copy that leaves holes out
/// would have lost what had just been written.
#[test]
fn data_just_written_is_found_by_seek() {
    need_fuse!("cli::data_just_written_is_found_by_seek");
    let image = Image::new("-t ext4", "64M");
    let mount = image.mount("");
    let script = "
        truncate -s 1M sparse
        echo late | dd of=sparse bs=4096 seek=100 conv=notrunc status=none
        cp --sparse=always sparse copy
        cmp sparse copy && test \"$(tail -c +409601 copy | head -c 4)\" = late";
    shell(&mount.dir, script);
    mount.unmount();
    image.assert_clean();
}
