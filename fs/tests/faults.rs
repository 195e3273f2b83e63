//! An error at each position of a workload in turn: every operation ends, none panics, what `fsync`
//! promised is there, and e2fsck repairs the rest without questions.
#![expect(clippy::unwrap_used, reason = "a test ends with a panic")]

mod storm;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blockstack::DynDevice;
use blockstack::backend::mem::{Image, MemDisk};
use blockstack::testing::faulty::{Failure, FaultyDisk, Kinds, Rule};
use fs::data::Origin;
use fs::dir::Emit;
use fs::ops::space::FallocMode;
use fs::ops::{NewNode, RenameFlags, SetAttr};
use fs::options::DataMode;
use fs::xattr::XattrMode;
use fs::{Fs, FsError, FsResult, MountOptions};
use storm::history::read_all;
use storm::image::{Scratch, has_error_state, has_journal};
use storm::{DIR, DIRECT, FILE, ME, ROOT, fsync, write};

static PROGRESS: AtomicU64 = AtomicU64::new(0);
static PANICS: AtomicU64 = AtomicU64::new(0);

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

/// What a path must be once it was promised.
#[derive(Clone, Debug, Eq, PartialEq)]
enum State {
    File(Vec<u8>),
    Other,
    Absent,
}

/// Runs the workload and keeps book.
struct Script {
    fs: Arc<Fs>,
    promised: BTreeMap<String, State>,
    attribute: Option<Vec<u8>>,
    failures: Vec<(String, FsError)>,
}

fn pattern(stamp: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 64) as u8 ^ stamp).collect()
}

impl Script {
    fn note<T>(&mut self, what: &str, res: FsResult<T>) -> Option<T> {
        PROGRESS.fetch_add(1, Ordering::SeqCst);
        if std::env::var_os("FAULT_LOG").is_some() {
            eprintln!("{what}: {:?}", res.as_ref().err());
        }
        match res {
            Ok(value) => Some(value),
            Err(error) => {
                self.failures.push((what.to_owned(), error));
                None
            }
        }
    }

    fn create(&mut self, dir: u32, path: &str, node: NewNode<'_>) -> Option<u32> {
        let name = path.rsplit('/').next().unwrap();
        self.promised.remove(path);
        let made = self.fs.create(dir, name.as_bytes(), node, 0, &ME);
        self.note(path, made).map(|attr| attr.ino)
    }

    fn write(&mut self, ino: u32, at: u64, bytes: &[u8], origin: Origin) -> Option<()> {
        let res = write(&self.fs, ino, at, bytes, origin);
        let res = res.map(|written| assert_eq!(written as usize, bytes.len()));
        self.note("write", res)
    }

    fn fsync(&mut self, ino: u32, path: &str, content: &[u8]) -> Option<()> {
        let res = fsync(&self.fs, ino, false);
        self.note("fsync", res)?;
        let state = State::File(content.to_vec());
        self.promised.insert(path.to_owned(), state);
        Some(())
    }

    fn file(&mut self, dir: u32, path: &str, stamp: u8, len: usize, origin: Origin) -> Option<u32> {
        let ino = self.create(dir, path, FILE)?;
        let bytes = pattern(stamp, len);
        self.write(ino, 0, &bytes, origin)?;
        self.fsync(ino, path, &bytes)?;
        Some(ino)
    }

    fn sync(&mut self, states: &[(&str, State)]) -> Option<()> {
        let res = self.fs.sync();
        self.note("sync", res)?;
        let states = states
            .iter()
            .map(|(path, state)| ((*path).to_owned(), state.clone()));
        self.promised.extend(states);
        Some(())
    }

    fn resize(&mut self, ino: u32, size: u64) -> Option<()> {
        let set = SetAttr {
            size: Some(size),
            ..SetAttr::default()
        };
        let res = self.fs.setattr(ino, &set, &ME);
        self.note("truncate", res).map(|_| ())
    }

    /// Reads what was there before.
    fn read_tree(&mut self, dir: u32, depth: u32) -> Option<()> {
        let mut found = Vec::new();
        let res = self.fs.readdir(dir, 0, &mut |entry| {
            if !entry.name.starts_with(b".") && entry.name != b"lost+found" {
                found.push(entry.name.to_vec());
            }
            Emit::More
        });
        self.note("readdir", res)?;
        for name in found.into_iter().take(6) {
            let res = self.fs.lookup(dir, &name);
            let Some(attr) = self.note("lookup", res).flatten() else {
                continue;
            };
            if u32::from(attr.mode) & libc::S_IFMT != libc::S_IFDIR {
                let res = read_all(&self.fs, attr.ino, attr.size);
                self.note("read", res);
                // Changes of inodes and directories that are not in memory.
                let res = self
                    .fs
                    .setxattr(attr.ino, b"user.x", Some(b"y"), XattrMode::Any);
                self.note("setxattr", res);
                if attr.size % 2 == 0 {
                    let res = self.fs.unlink(dir, &name, &ME);
                    self.note("unlink", res);
                } else {
                    self.resize(attr.ino, attr.size / 2);
                }
            } else if depth < 2 {
                self.create(attr.ino, "/new", FILE);
                self.read_tree(attr.ino, depth + 1);
            }
            self.fs.forget(attr.ino, 1);
        }
        Some(())
    }

    fn run(&mut self) {
        self.read_tree(ROOT, 0);
        self.files();
        self.names();
        self.space();
        self.attributes();
        self.big_directory();
        // Deletion at the last close, and reading what is not in memory.
        if let Some(ino) = self.create(ROOT, "/gone", FILE) {
            self.write(ino, 0, &pattern(9, 30_000), DIRECT);
            let res = self.fs.unlink(ROOT, b"gone", &ME);
            if self.note("unlink", res).is_some() {
                self.fs.forget(ino, 1);
                self.sync(&[("/gone", State::Absent)]);
            }
        }
    }

    fn files(&mut self) -> Option<()> {
        self.file(ROOT, "/subect", 1, 20_000, DIRECT);
        let ino = self.file(ROOT, "/cached", 2, 30_000, Origin::PageCache)?;
        // In place, without metadata: an error must come up in fsync.
        self.promised.remove("/cached");
        let bytes = pattern(3, 30_000);
        self.write(ino, 0, &bytes, Origin::PageCache)?;
        self.fsync(ino, "/cached", &bytes)
    }

    fn names(&mut self) -> Option<()> {
        let dir = self.create(ROOT, "/sub", DIR)?;
        self.file(dir, "/sub/inner", 4, 7000, DIRECT);
        let ino = self.create(ROOT, "/before", FILE)?;
        let bytes = pattern(5, 9000);
        self.write(ino, 0, &bytes, DIRECT)?;
        let none = RenameFlags::empty();
        let res = self.fs.rename(ROOT, b"before", dir, b"after", none, &ME);
        self.note("rename", res)?;
        if self.fsync(ino, "/sub/after", &bytes).is_some() {
            self.promised.insert("/before".to_owned(), State::Absent);
        }
        let over = self.file(ROOT, "/over", 6, 3000, DIRECT)?;
        self.promised.remove("/over");
        self.promised.remove("/sub/after");
        let res = self.fs.rename(dir, b"after", ROOT, b"over", none, &ME);
        self.note("rename over", res)?;
        self.fs.forget(over, 1);
        self.fsync(ino, "/over", &bytes);
        self.promised.remove("/over");
        let res = self.fs.link(ino, dir, b"link");
        self.note("link", res)?;
        let res = self.fs.unlink(ROOT, b"over", &ME);
        self.note("unlink", res)?;
        let target = vec![b't'; 200];
        self.create(dir, "/sub/symlink", NewNode::Symlink { target: &target })?;
        self.create(ROOT, "/empty", DIR)?;
        let res = self.fs.rmdir(ROOT, b"empty", &ME);
        self.note("rmdir", res)?;
        self.sync(&[
            ("/sub/link", State::File(bytes)),
            ("/over", State::Absent),
            ("/empty", State::Absent),
            ("/sub/symlink", State::Other),
        ])
    }

    fn space(&mut self) -> Option<()> {
        let ino = self.file(ROOT, "/short", 7, 60_000, DIRECT)?;
        self.promised.remove("/short");
        self.resize(ino, 5000)?;
        self.resize(ino, 8000)?;
        let mut bytes = pattern(7, 5000);
        bytes.resize(8000, 0);
        self.fsync(ino, "/short", &bytes);
        let ino = self.file(ROOT, "/holes", 8, 50_000, DIRECT)?;
        self.promised.remove("/holes");
        let inode = self.note("iget", self.fs.clone().iget(ino))?;
        let punch = FallocMode::PUNCH_HOLE | FallocMode::KEEP_SIZE;
        let res = self.fs.fallocate(&inode, punch, 3000, 20_000, &ME);
        self.note("punch", res)?;
        let mut bytes = pattern(8, 50_000);
        bytes[3000..23_000].fill(0);
        if self.fs.geo.has_extents() {
            let none = FallocMode::empty();
            let res = self.fs.fallocate(&inode, none, 50_000, 30_000, &ME);
            self.note("fallocate", res)?;
            bytes.resize(80_000, 0);
            self.write(ino, 60_000, &[1; 3000], DIRECT)?;
            bytes[60_000..63_000].fill(1);
        }
        self.fsync(ino, "/holes", &bytes)
    }

    fn attributes(&mut self) -> Option<()> {
        let ino = self.file(ROOT, "/attributes", 9, 100, DIRECT)?;
        for len in [20, 600] {
            let value = pattern(10, len);
            self.attribute = None;
            let res = self
                .fs
                .setxattr(ino, b"user.name", Some(&value), XattrMode::Any);
            self.note("setxattr", res)?;
            let res = fsync(&self.fs, ino, false);
            self.note("fsync", res)?;
            self.attribute = Some(value);
        }
        Some(())
    }

    fn big_directory(&mut self) -> Option<()> {
        let dir = self.create(ROOT, "/big", DIR)?;
        let long = "n".repeat(60);
        let mut made = Vec::new();
        for index in 0..70 {
            let path = format!("/big/{index}-{long}");
            if self.create(dir, &path, FILE).is_some() {
                made.push(path);
            }
        }
        let states: Vec<_> = made
            .iter()
            .map(|path| (path.as_str(), State::File(Vec::new())))
            .collect();
        self.sync(&states)
    }
}

fn look_up(fs: &Arc<Fs>, path: &str) -> FsResult<Option<u32>> {
    let mut ino = ROOT;
    for name in path.split('/').skip(1) {
        match fs.lookup(ino, name.as_bytes())? {
            Some(attr) => ino = attr.ino,
            None => return Ok(None),
        }
    }
    Ok(Some(ino))
}

/// Whether a healed device has what was promised.
fn check_promises(image: Image, script: &Book) -> Result<Image, String> {
    let disk = MemDisk::from_image("healed", image);
    let dev: DynDevice = disk.clone();
    let fs = Fs::mount(dev, MountOptions::default()).map_err(|error| format!("mount: {error}"))?;
    for (path, state) in &script.promised {
        PROGRESS.fetch_add(1, Ordering::SeqCst);
        let ino = look_up(&fs, path).map_err(|error| format!("{path}: {error}"))?;
        let found = match ino {
            None => State::Absent,
            Some(_) if *state == State::Other => State::Other,
            Some(ino) => {
                let size = fs
                    .getattr(ino)
                    .map_err(|error| format!("{path}: {error}"))?
                    .size;
                State::File(read_all(&fs, ino, size).map_err(|error| format!("{path}: {error}"))?)
            }
        };
        if found != *state {
            let what = |state: &State| match state {
                State::File(bytes) => format!("{} bytes {:02x?}", bytes.len(), bytes.get(..8)),
                other => format!("{other:?}"),
            };
            return Err(format!(
                "{path}: promised {}, found {}",
                what(state),
                what(&found)
            ));
        }
    }
    if let Some(value) = &script.attribute {
        let ino = look_up(&fs, "/attributes")
            .unwrap()
            .ok_or("/attributes is gone")?;
        let found = fs
            .getxattr(ino, b"user.name")
            .map_err(|error| format!("xattr: {error}"))?;
        if found != *value {
            return Err(format!(
                "attribute of {} bytes, promised {}",
                found.len(),
                value.len()
            ));
        }
    }
    fs.unmount().map_err(|error| format!("unmount: {error}"))?;
    drop(fs);
    Ok(disk.image())
}

#[derive(Default)]
struct Book {
    promised: BTreeMap<String, State>,
    attribute: Option<Vec<u8>>,
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
            let mut script = Script {
                fs: fs.clone(),
                promised: BTreeMap::new(),
                attribute: None,
                failures: Vec::new(),
            };
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
            book.promised = std::mem::take(&mut script.promised);
            book.attribute = script.attribute.take();
            failures = std::mem::take(&mut script.failures);
            drop(script);
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
