//! Images, mounts, commands, skipping.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_fusefs-stack");
/// The generator of operations.
pub const STORM: &str = env!("CARGO_BIN_EXE_storm");
/// Longer than anything takes; a hang ends here.
const PATIENCE: Duration = Duration::from_secs(60);

/// `short`, or `long` with `FUSEFS_STACK_LONG=1`.
pub fn count(short: u64, long: u64) -> u64 {
    match std::env::var("FUSEFS_STACK_LONG") {
        Ok(value) if value != "0" && !value.is_empty() => long,
        _ => short,
    }
}

/// The seed of this run, mixed with the name of the test.
pub fn seed(name: &str) -> u64 {
    let base: u64 = match std::env::var("FUSEFS_STACK_SEED") {
        Ok(text) => text.parse().expect("FUSEFS_STACK_SEED is a number"),
        Err(_) => 1,
    };
    name.bytes()
        .fold(base, |seed, byte| seed.wrapping_mul(31) + u64::from(byte))
        % 1_000_000
}

/// Says loudly that a test, or part of it, does not run here. `eprintln` would be swallowed.
pub fn skip(test: &str, why: &str) {
    let line = format!("SKIPPED {test}: {why}\n");
    tell(line.trim_end());
    if let Some(path) = std::env::var_os("FUSEFS_STACK_SKIPS") {
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .unwrap();
        file.write_all(line.as_bytes()).unwrap();
    }
}

/// Whether this process is root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Why FUSE mounts cannot be made here.
pub fn no_fuse() -> Option<&'static str> {
    static WHY: OnceLock<Option<&'static str>> = OnceLock::new();
    *WHY.get_or_init(|| {
        let device = OpenOptions::new().read(true).write(true).open("/dev/fuse");
        if device.is_err() {
            return Some("cannot open /dev/fuse");
        }
        let helper = Command::new("fusermount3").arg("-V").output();
        helper.is_err().then_some("fusermount3 is not installed")
    })
}

/// Why the kernel's ext4 cannot be asked here.
pub fn no_kernel() -> Option<&'static str> {
    static WHY: OnceLock<Option<&'static str>> = OnceLock::new();
    *WHY.get_or_init(|| {
        if !is_root() {
            return Some("mounting with the kernel needs root");
        }
        let image = Image::new("-t ext4", "8M");
        let dir = image.subdir("kernel");
        let mut mount = kernel_command(&image.path, &dir, Access::Read);
        if !mount.output().is_ok_and(|output| output.status.success()) {
            return Some("the kernel here mounts no ext4 image (loop devices?)");
        }
        run(Command::new("umount").arg(&dir));
        None
    })
}

/// Returns from a test that cannot run without FUSE.
#[macro_export]
macro_rules! need_fuse {
    ($test:expr) => {
        if let Some(why) = $crate::common::no_fuse() {
            $crate::common::skip($test, why);
            return;
        }
    };
}

/// Runs a command that must succeed.
#[track_caller]
pub fn run(command: &mut Command) -> String {
    let output = output(command);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}",
        output.status,
        text(&output)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a command that may fail, but must be there.
#[track_caller]
pub fn output(command: &mut Command) -> Output {
    match command.stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(error) => panic!("{command:?}: {error}"),
    }
}

/// Everything a command said.
pub fn text(output: &Output) -> String {
    let (out, err) = (&output.stdout, &output.stderr);
    String::from_utf8_lossy(out).into_owned() + &String::from_utf8_lossy(err)
}

/// A shell command line that must succeed.
#[track_caller]
pub fn shell(dir: &Path, script: &str) -> String {
    let script = format!("set -euo pipefail\n{script}");
    let limit = ["-k", "5", "600", "bash", "-c"];
    run(Command::new("timeout")
        .args(limit)
        .arg(script)
        .current_dir(dir))
}

/// An image in a directory of its own, which other files of a test may use.
pub struct Image {
    /// Gone with this.
    pub dir: TempDir,
    /// The image.
    pub path: PathBuf,
}

impl Image {
    /// Makes an empty file system; `options` are words for `mke2fs`.
    #[track_caller]
    pub fn new(options: &str, size: &str) -> Self {
        Self::filled(options, size, None)
    }

    /// Makes a file system with the content of `tree`.
    #[track_caller]
    pub fn filled(options: &str, size: &str, tree: Option<&Path>) -> Self {
        let image = Self::raw();
        let owner = format!(
            "root_owner={}:{}",
            rustix::process::getuid().as_raw(),
            rustix::process::getgid().as_raw()
        );
        let mut command = tool("mke2fs");
        command.args(["-q", "-F"]);
        // Of several -E only the last would count.
        match options.split_once("-E ") {
            Some((words, extended)) => command
                .args(words.split_whitespace())
                .arg("-E")
                .arg(format!("{owner},{extended}")),
            None => command
                .args(options.split_whitespace())
                .arg("-E")
                .arg(owner),
        };
        if let Some(tree) = tree {
            command.arg("-d").arg(tree);
        }
        run(command.arg(&image.path).arg(size));
        image
    }

    /// No file yet, only its path.
    pub fn raw() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("fusefs-stack-test.")
            .tempdir()
            .unwrap();
        let path = dir.path().join("image");
        Self { dir, path }
    }

    /// Makes a directory beside the image, if it is not there.
    pub fn subdir(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    /// Mounts the image with the program under test.
    #[track_caller]
    pub fn mount(&self, options: &str) -> Mount {
        Mount::new(&self.path, &self.subdir("mnt"), options)
    }

    /// `e2fsck -fn` finds nothing.
    #[track_caller]
    pub fn assert_clean(&self) {
        assert_clean(&self.path);
    }

    /// A copy of the image in the same directory.
    pub fn copy(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        run(Command::new("cp")
            .args(["--sparse=always", "--reflink=auto"])
            .arg(&self.path)
            .arg(&path));
        path
    }
}

/// A program of e2fsprogs, which are not in the PATH of every user.
pub fn tool(name: &str) -> Command {
    let path = ["/usr/sbin", "/sbin"]
        .map(|dir| Path::new(dir).join(name))
        .into_iter()
        .find(|path| path.exists());
    Command::new(path.unwrap_or(name.into()))
}

/// `e2fsck -fn` and our own check find nothing.
#[track_caller]
pub fn assert_clean(image: &Path) {
    let output = output(tool("e2fsck").arg("-fn").arg(image));
    assert!(
        output.status.success(),
        "e2fsck -fn {image:?}: {}\n{}",
        output.status,
        text(&output)
    );
    let own = output_of_check(image);
    assert_eq!(own.status.code(), Some(0), "our check: {}", text(&own));
}

/// What `fusefs-stack check` says.
pub fn output_of_check(image: &Path) -> Output {
    output(Command::new(PROGRAM).arg("check").arg(image))
}

/// A running mount, in the foreground of a process of its own.
pub struct Mount {
    /// The mountpoint.
    pub dir: PathBuf,
    log: PathBuf,
    child: Child,
    done: bool,
}

impl Mount {
    /// Mounts `image` on `dir` and waits until it answers.
    #[track_caller]
    pub fn new(image: &Path, dir: &Path, options: &str) -> Self {
        let before = std::fs::metadata(dir).unwrap().dev();
        let log = dir.with_extension("log");
        let mut command = Command::new(PROGRAM);
        command.arg("-f");
        if !options.is_empty() {
            command.arg("-o").arg(options);
        }
        let child = command
            .arg(dir)
            .arg(image)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let mut mount = Self {
            dir: dir.to_owned(),
            log,
            child,
            done: false,
        };
        let start = Instant::now();
        loop {
            match std::fs::metadata(dir) {
                Ok(metadata) if metadata.dev() != before => return mount,
                _ => {}
            }
            if let Some(status) = mount.child.try_wait().unwrap() {
                mount.done = true;
                panic!("mount of {image:?}: {status}\n{}", mount.log());
            }
            if start.elapsed() > PATIENCE {
                panic!("mount of {image:?} does not answer\n{}", mount.log());
            }
            sleep(Duration::from_millis(2));
        }
    }

    /// The process that serves.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Unmounts as a user does, and waits for the end of the process, which must be a good one.
    #[track_caller]
    pub fn unmount(mut self) {
        let log = self.log();
        // The program itself may still be looking at its mount.
        for attempt in 0.. {
            let output = output(Command::new("fusermount3").arg("-u").arg(&self.dir));
            if output.status.success() {
                break;
            }
            assert!(attempt < 50, "{}", text(&output));
            sleep(Duration::from_millis(10));
        }
        let status = self.wait();
        let log = log + &self.log();
        assert!(status.success(), "{status} at unmount\n{log}");
        assert!(!log.contains("panicked"), "{log}");
    }

    /// Waits for the end of the process.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait().unwrap() {
                self.done = true;
                return status;
            }
            sleep(Duration::from_millis(2));
        }
        panic!("process does not end\n{}", self.log());
    }

    /// Ends the process at once; the dead mount stays, see [`detach`].
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.wait();
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if !self.done {
            drop(self.child.kill());
            // A process that does not end must not keep the test that tells of it.
            drop(Command::new("umount").arg("-f").arg(&self.dir).output());
            detach(&self.dir);
            drop(self.child.wait());
        }
    }
}

/// Removes what is mounted on `dir`, dead or alive.
pub fn detach(dir: &Path) {
    drop(
        Command::new("fusermount3")
            .args(["-u", "-z", "-q"])
            .arg(dir)
            .output(),
    );
}

/// What the kernel may do with an image.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Access {
    /// Look.
    Read,
    /// Look and change.
    Write,
}

/// An image that the kernel has mounted.
pub struct KernelMount {
    /// The mountpoint.
    pub dir: PathBuf,
}

impl KernelMount {
    /// Mounts through a loop device.
    #[track_caller]
    pub fn new(image: &Path, dir: &Path, access: Access) -> Self {
        run(&mut kernel_command(image, dir, access));
        let dir = dir.to_owned();
        Self { dir }
    }
}

impl Drop for KernelMount {
    fn drop(&mut self) {
        let output = Command::new("umount").arg(&self.dir).output();
        if !std::thread::panicking() {
            assert!(output.unwrap().status.success());
        }
    }
}

fn kernel_command(image: &Path, dir: &Path, access: Access) -> Command {
    let options = match access {
        // Without noload the kernel would replay a journal that should be empty.
        Access::Read => "loop,ro,noload",
        Access::Write => "loop",
    };
    let mut command = Command::new("mount");
    command.args(["-t", "ext4", "-o", options]);
    command.arg(image).arg(dir);
    command
}

/// Makes a tree with something of everything: files of many sizes, with holes, links of both
/// kinds, a directory large enough for an index, names of all lengths, modes, attributes.
pub fn make_tree(dir: &Path) {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    std::fs::create_dir_all(dir).unwrap();
    for name in ["blockstack", "bufio", "dmtargets", "fs"] {
        let source = sources.join(name).join("src");
        run(Command::new("cp")
            .args(["-r", "--no-target-directory"])
            .arg(source)
            .arg(dir.join(name)));
    }
    let script = r#"
        mkdir many deep sizes
        for i in $(seq 400); do printf '%s' "$i" >"many/file number $i with a name that is not short"; done
        printf 'x%.0s' $(seq 255) >name; mv name "$(cat name)"
        d=deep; for i in $(seq 20); do d=$d/$i; done; mkdir -p $d; echo bottom >$d/file
        for n in 0 1 59 60 61 155 156 1023 1024 1025 4095 4096 4097 12288 13000 70000 1000000; do
            head -c $n /dev/urandom >sizes/$n
        done
        truncate -s 3M sizes/hole; printf end >>sizes/hole
        ln sizes/4096 hard; ln -s sizes/1024 short-link
        ln -s "$(head -c 200 /dev/zero | tr '\0' 'l')" long-link
        mkfifo pipe; chmod 0640 sizes/1; chmod 1777 many; chmod 4711 sizes/59
        setfattr -n user.short -v value sizes/60 || true
        setfattr -n user.long -v "$(head -c 700 /dev/zero | tr '\0' 'v')" sizes/61 || true
    "#;
    shell(dir, script);
}

/// Both trees hold the same names, bytes, modes, owners, times (to the second), links and
/// attributes.
#[track_caller]
pub fn assert_same_tree(one: &Path, other: &Path) {
    let listing = r#"
        find . ! -type d -printf '%P %y %m %s %U %G %n %Ts %l\n' -o -printf '%P d %m %U %G %Ts\n' | LC_ALL=C sort
        find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
        find . -print0 | LC_ALL=C sort -z | xargs -0 getfattr -h -d -m user
    "#;
    let (one_list, other_list) = (shell(one, listing), shell(other, listing));
    if one_list != other_list {
        let differing: Vec<_> = one_list
            .lines()
            .zip(other_list.lines())
            .filter(|(a, b)| a != b)
            .take(5)
            .collect();
        panic!(
            "{one:?} and {other:?} differ, {} and {} lines: {differing:#?}",
            one_list.lines().count(),
            other_list.lines().count()
        );
    }
}

/// Prints a line that the test harness does not swallow.
pub fn tell(line: &str) {
    let line = line.to_owned() + "\n";
    std::io::stderr().write_all(line.as_bytes()).unwrap();
}
