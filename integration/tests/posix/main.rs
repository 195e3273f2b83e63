//! POSIX, as the kernel's own file system means it.
//!
//! A case is a function that does something in the current directory and notes what came out: error
//! numbers, modes, counts, which times changed. Each is run on a mount of ours and on one of the
//! kernel's ext4 with an image made alike, and both must note the same. So the expectation is the
//! kernel's and not ours. What is noted is free of inode numbers and absolute times.
//!
//! Other users are threads: to Linux, ids, the current directory and the umask belong to a thread,
//! and so do, after `unshare`, the owner of POSIX locks.
//!
//! | module | what it looks at |
//! | --- | --- |
//! | `case` | running a case, notes |
//! | `calls` | system calls on paths of text |
//! | `known` | what cannot be the same, with the reason |
//! | `paths` | each call with each kind of path: too long, loops, not a directory, trailing slash |
//! | `access` | permission, by owner, group, other and root; sticky directories |
//! | `modes` | chmod, chown, set-id bits, umask, special files |
//! | `names` | link, unlink, mkdir, rmdir, symlink, counts of links, races for a name |
//! | `moves` | rename, with its flags |
//! | `opens` | open, truncate, append, programs that run (ETXTBSY) |
//! | `times` | utimensat, and which calls change which times |
//! | `mapped` | mapped memory, read and write, `O_DIRECT` |
//! | `locks` | flock, POSIX and open file description locks |
#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends at the first thing that is not as it should be"
)]

mod access;
mod calls;
mod case;
#[path = "../system/common.rs"]
#[allow(dead_code, reason = "shared with the system tests")]
mod common;
mod known;
mod locks;
mod mapped;
mod modes;
mod moves;
mod names;
mod opens;
mod paths;
mod times;

use std::path::{Path, PathBuf};

use case::{Case, Grain, Needs};
use common::{Access, Image, KernelMount, is_root, no_kernel, skip};
use tempfile::TempDir;

const ALL: &[&[Case]] = &[
    paths::CASES,
    access::CASES,
    modes::CASES,
    names::CASES,
    moves::CASES,
    opens::CASES,
    times::CASES,
    mapped::CASES,
    locks::CASES,
];

/// Those to which the format makes a difference.
const OF_FORMAT: &[&[Case]] = &[
    names::CASES,
    moves::CASES,
    opens::CASES,
    times::CASES,
    mapped::CASES,
];

/// What ours is compared with.
enum Control {
    Ext4 { mount: KernelMount, _image: Image },
    Plain(TempDir),
}

impl Control {
    fn new(test: &str, options: &str, size: &str) -> Self {
        match no_kernel() {
            None => {
                let image = Image::new(options, size);
                let dir = image.subdir("kernel");
                let mount = KernelMount::new(&image.path, &dir, Access::Write);
                Self::Ext4 {
                    mount,
                    _image: image,
                }
            }
            Some(why) => {
                skip(
                    test,
                    &format!("comparison with ext4, another instead: {why}"),
                );
                let shm = Path::new("/dev/shm");
                let parent = if shm.is_dir() {
                    shm.to_owned()
                } else {
                    std::env::temp_dir()
                };
                Self::Plain(tempfile::tempdir_in(parent).unwrap())
            }
        }
    }

    fn dir(&self) -> PathBuf {
        match self {
            Self::Ext4 { mount, .. } => mount.dir.clone(),
            Self::Plain(dir) => dir.path().to_owned(),
        }
    }

    fn cases(&self, test: &str, all: &'static [&[Case]]) -> Vec<&'static Case> {
        let can = |case: &&Case| match case.needs {
            Needs::Nothing => true,
            Needs::Root => is_root(),
            Needs::Ext4 => matches!(self, Self::Ext4 { .. }),
        };
        let (can, cannot): (Vec<_>, Vec<_>) = all.iter().copied().flatten().partition(can);
        if !cannot.is_empty() {
            let names: Vec<_> = cannot.iter().map(|case| case.name).collect();
            skip(test, &format!("{} needs root or ext4", names.join(", ")));
        }
        can
    }
}

/// Runs every case on ours and on the control, then asks the kernel whether what ours has written
/// is what it told.
fn compare(test: &str, options: &str, size: &str, grain: Grain) {
    if let Some(why) = common::no_fuse() {
        skip(test, why);
        return;
    }
    let _alone = case::alone();
    let control = Control::new(test, options, size);
    let image = Image::new(options, size);
    let mount = image.mount("");
    let mut differences = Vec::new();
    let mut notes = 0;
    let all = match grain {
        Grain::Nanosecond => ALL,
        Grain::Second => OF_FORMAT,
    };
    for case in control.cases(test, all) {
        let ours = case.run_in(&mount.dir, grain);
        let kernels = case.run_in(&control.dir(), grain);
        notes += kernels.len();
        differences.extend(case::differences(case.name, &ours, &kernels));
    }
    common::tell(&format!("{test}: {notes} outcomes compared"));
    // Blocks are allocated when they are written.
    rustix::fs::syncfs(std::fs::File::open(&mount.dir).unwrap()).unwrap();
    let told = case::listing(&mount.dir);
    mount.unmount();
    image.assert_clean();
    if matches!(control, Control::Ext4 { .. }) {
        let kernel = KernelMount::new(&image.path, &image.subdir("kernel"), Access::Read);
        let mut found = case::listing(&kernel.dir);
        let mut told = told;
        for list in [&mut told, &mut found] {
            list.retain(|(path, _)| !path.starts_with(times::OUT_OF_RANGE));
        }
        differences.extend(case::differences("what was written", &told, &found));
        let times = |dir: &Path| case::set_times(&dir.join(times::OUT_OF_RANGE));
        let (ours, kernels) = (times(&kernel.dir), times(&control.dir()));
        differences.extend(case::differences("times written", &ours, &kernels));
    }
    let complaints = known::sort_out(differences, grain);
    assert!(
        complaints.is_empty(),
        "{} differences:\n{}",
        complaints.len(),
        complaints.join("\n")
    );
}

#[test]
fn ext4() {
    compare("posix::ext4", "-t ext4", "256M", Grain::Nanosecond);
}

#[test]
fn ext2_small_inodes() {
    let options = "-t ext2 -b 1024 -I 128";
    compare("posix::ext2_small_inodes", options, "256M", Grain::Second);
}
