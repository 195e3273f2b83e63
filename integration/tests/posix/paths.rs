//! Each call with each kind of path.

use rustix::fs::{Access, AtFlags, CWD, FileType, OFlags};

use crate::calls::{
    NOFOLLOW, chmod, chown, getxattr, link, make, mkdir, mkfifo, mknod, open, rename, rmdir,
    setxattr, symlink, time, tree, truncate, unlink, utimens,
};
use crate::case::{Case, Needs, OTHER, Out, Res, word};

pub const CASES: &[Case] = &[
    Case {
        name: "paths_by_root",
        needs: Needs::Ext4,
        run: |out| every_call(out, false),
    },
    Case {
        name: "paths_by_other",
        needs: Needs::Ext4,
        run: |out| every_call(out, true),
    },
    Case {
        name: "long_names_in_full_use",
        needs: Needs::Nothing,
        run: long_names,
    },
    Case {
        name: "long_targets",
        needs: Needs::Ext4,
        run: long_targets,
    },
    Case {
        name: "other_file_system",
        needs: Needs::Nothing,
        run: other_file_system,
    },
];

type Call = (&'static str, fn(&str) -> Res);

const CALLS: &[Call] = &[
    ("stat", |path| rustix::fs::stat(path).map(drop)),
    ("lstat", |path| rustix::fs::lstat(path).map(drop)),
    ("access", |path| rustix::fs::access(path, Access::READ_OK)),
    ("readlink", |path| {
        rustix::fs::readlink(path, Vec::new()).map(drop)
    }),
    ("open to read", |path| {
        open(path, OFlags::RDONLY, 0).map(drop)
    }),
    ("open to write", |path| {
        open(path, OFlags::WRONLY, 0).map(drop)
    }),
    ("open O_CREAT", |path| {
        open(path, OFlags::RDWR | OFlags::CREATE, 0o640).map(drop)
    }),
    ("open O_CREAT O_EXCL", |path| {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
        open(path, flags, 0o640).map(drop)
    }),
    ("open O_TRUNC", |path| {
        open(path, OFlags::WRONLY | OFlags::TRUNC, 0).map(drop)
    }),
    ("open O_DIRECTORY", |path| {
        open(path, OFlags::RDONLY | OFlags::DIRECTORY, 0).map(drop)
    }),
    ("open O_NOFOLLOW", |path| {
        open(path, OFlags::RDONLY | OFlags::NOFOLLOW, 0).map(drop)
    }),
    ("open O_PATH O_NOFOLLOW", |path| {
        open(path, OFlags::PATH | OFlags::NOFOLLOW, 0).map(drop)
    }),
    ("chmod", |path| chmod(path, 0o711)),
    ("chown", |path| {
        chown(path, Some(77), Some(78), AtFlags::empty())
    }),
    ("lchown", |path| chown(path, Some(77), Some(78), NOFOLLOW)),
    ("truncate", |path| truncate(path, 3)),
    ("utimensat", |path| {
        utimens(path, time(5, 6), time(7, 8), AtFlags::empty())
    }),
    ("lutimes", |path| {
        utimens(path, time(5, 6), time(7, 8), NOFOLLOW)
    }),
    ("setxattr", |path| setxattr(path, "user.a", b"value")),
    ("getxattr", |path| getxattr(path, "user.a").map(drop)),
    ("mkdir", |path| mkdir(path, 0o750)),
    ("mkfifo", |path| mkfifo(path, 0o640)),
    ("mknod socket", |path| {
        mknod(path, FileType::Socket, 0o640, 0)
    }),
    ("mknod device", |path| {
        mknod(path, FileType::CharacterDevice, 0o640, 0x103)
    }),
    ("rmdir", rmdir),
    ("unlink", unlink),
    ("symlink at", |path| symlink("file", path)),
    ("symlink to", |path| symlink(path, "new")),
    ("link from", |path| link(path, "new")),
    ("link from, followed", |path| {
        rustix::fs::linkat(CWD, path, CWD, "new", AtFlags::SYMLINK_FOLLOW)
    }),
    ("link to", |path| link("file", path)),
    ("rename from", |path| rename(path, "new")),
    ("rename file to", |path| rename("file", path)),
    ("rename dir to", |path| rename("full", path)),
    ("rename to itself", |path| rename(path, path)),
    ("rename onto dir", |path| rename(path, "dir")),
];

/// Labels and paths; those of great length by name.
fn every_path() -> Vec<(&'static str, String)> {
    let plain = [
        "missing",
        "missing/",
        "missing/.",
        "missing/x",
        "file",
        "file/",
        "file/.",
        "file/..",
        "file/x",
        "dir",
        "dir/",
        "dir/.",
        "dir/..",
        "dir/../file",
        "dir/new",
        "dir/new/",
        "full",
        "full/",
        "full/inside",
        "full/../full",
        "",
        ".",
        "..",
        "./",
        "loop",
        "loop/",
        "loop/x",
        "dangling",
        "dangling/",
        "dangling/x",
        "to-file",
        "to-file/",
        "to-dir",
        "to-dir/",
        "to-dir/new",
        "fifo",
        "socket",
        "device",
        "device/",
        "chain39",
        "chain40",
    ];
    let mut paths: Vec<_> = plain.map(|path| (path, path.to_owned())).into();
    paths.push(("name of 255", "n".repeat(255)));
    paths.push(("name of 256", "n".repeat(256)));
    paths.push(("name of 256 below", format!("dir/{}", "n".repeat(256))));
    paths.push(("path of 4095", format!("{}new", "./".repeat(2046))));
    paths.push(("path of 4096", format!("{}.new", "./".repeat(2046))));
    paths.push((
        "file at the end of 4095",
        format!("{}/file", "./".repeat(2045) + "."),
    ));
    paths
}

fn fixture() {
    make("file", b"some content", 0o666);
    mkdir("dir", 0o777).unwrap();
    mkdir("full", 0o777).unwrap();
    make("full/inside", b"inside", 0o666);
    symlink("loop", "loop").unwrap();
    symlink("nowhere", "dangling").unwrap();
    symlink("file", "to-file").unwrap();
    symlink("dir", "to-dir").unwrap();
    mkfifo("fifo", 0o666).unwrap();
    mknod("socket", FileType::Socket, 0o666, 0).unwrap();
    mknod("device", FileType::CharacterDevice, 0o666, 0x103).unwrap();
    symlink("file", "chain0").unwrap();
    for at in 1..=40 {
        symlink(&format!("chain{}", at - 1), &format!("chain{at}")).unwrap();
    }
}

/// What a call can have changed: all but the links that only make the path long.
fn state() -> Vec<String> {
    let mut state = tree(".");
    state.retain(|line| !line.starts_with("chain"));
    state
}

fn every_call(out: &mut Out, by_other: bool) {
    let paths = every_path();
    let mut todo: Vec<_> = CALLS
        .iter()
        .flat_map(|call| paths.iter().map(move |path| (call, path)))
        .collect();
    todo.reverse();
    let mut round = 0;
    while !todo.is_empty() {
        // A directory for each call that changes anything, and left for the kernel to read.
        round += 1;
        let name = round.to_string();
        mkdir(&name, 0o777).unwrap();
        rustix::process::chdir(name.as_str()).unwrap();
        fixture();
        let mut until_one_works = || {
            while let Some(((call_name, call), (path_name, path))) = todo.pop() {
                let result = call(path);
                let label = format!("{call_name} {path_name:?}");
                out.text(&label, word(&result));
                if result.is_ok() {
                    return label;
                }
            }
            "the last".into()
        };
        let label: String = if by_other {
            OTHER.does(until_one_works)
        } else {
            until_one_works()
        };
        out.note(format!("{label}, after"), state());
        rustix::process::chdir("..").unwrap();
    }
}

fn long_names(out: &mut Out) {
    let name = |len: usize, with: &str| with.repeat(len);
    for len in [1, 127, 254, 255, 256, 300] {
        out.call(format!("mkdir {len}"), mkdir(&name(len, "d"), 0o755));
        let flags = OFlags::CREATE | OFlags::WRONLY;
        out.call(format!("create {len}"), open(&name(len, "f"), flags, 0o644));
        out.call(
            format!("rename {len}"),
            rename(&name(len, "f"), &name(len, "g")),
        );
        out.call(
            format!("rename to one more {len}"),
            rename(&name(len, "g"), &name(len + 1, "g")),
        );
        out.call(
            format!("link {len}"),
            link(&name(len, "g"), &name(len, "h")),
        );
        out.call(format!("unlink {len}"), unlink(&name(len, "h")));
        out.call(format!("rmdir {len}"), rmdir(&name(len, "d")));
    }
    // Names of bytes that are no text.
    for byte in [1_u8, b'\\', b'\n', 0x7f, 0x80, 0xff] {
        let name = [byte, byte];
        let made = rustix::fs::mkdir(name.as_slice(), 0o755.into());
        out.call(format!("mkdir of byte {byte:#x}"), made);
    }
    let names: Vec<_> = std::fs::read_dir(".")
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    let mut names: Vec<_> = names
        .iter()
        .map(|name| name.as_encoded_bytes().to_owned())
        .collect();
    names.sort();
    out.note("names", names);
}

fn long_targets(out: &mut Out) {
    for len in [1, 58, 59, 60, 61, 100, 1000, 1023, 1024, 4094, 4095, 4096] {
        let (target, path) = ("t".repeat(len), format!("link{len}"));
        out.call(format!("symlink to {len}"), symlink(&target, &path));
        let read = rustix::fs::readlink(path.as_str(), Vec::new());
        out.value(
            format!("readlink of {len}"),
            read.map(|read| (read.as_bytes() == target.as_bytes(), read.count_bytes())),
        );
        out.call(
            format!("stat through {len}"),
            rustix::fs::stat(path.as_str()),
        );
    }
    out.note("tree", tree("."));
}

fn other_file_system(out: &mut Out) {
    make("file", b"", 0o644);
    mkdir("dir", 0o755).unwrap();
    let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
    let there = |name: &str| elsewhere.path().join(name).to_str().unwrap().to_owned();
    make(&there("there"), b"", 0o644);
    out.call("rename away", rename("file", &there("new")));
    out.call("rename dir away", rename("dir", &there("new")));
    out.call("rename here", rename(&there("there"), "new"));
    out.call("rename over", rename(&there("there"), "file"));
    out.call("link away", link("file", &there("new")));
    out.call("link here", link(&there("there"), "new"));
    out.note("tree", tree("."));
}
