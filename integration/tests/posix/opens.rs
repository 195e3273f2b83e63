//! open, truncate, append, programs that run.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

use rustix::fs::{OFlags, Timespec};

use crate::calls::{
    MAKE, chmod, describe, file, give, link, make, mkdir, open, rename, symlink, tree, truncate,
    unlink,
};
use crate::case::{Case, Needs, OTHER, OWNER, Out};

pub const CASES: &[Case] = &[
    Case {
        name: "every_flag",
        needs: Needs::Ext4,
        run: every_flag,
    },
    Case {
        name: "what_a_descriptor_may",
        needs: Needs::Nothing,
        run: descriptor,
    },
    Case {
        name: "sizes",
        needs: Needs::Ext4,
        run: sizes,
    },
    Case {
        name: "append",
        needs: Needs::Nothing,
        run: append,
    },
    Case {
        name: "busy_text",
        needs: Needs::Root,
        run: busy_text,
    },
];

fn every_flag(out: &mut Out) {
    let access = [
        ("r", OFlags::RDONLY),
        ("w", OFlags::WRONLY),
        ("rw", OFlags::RDWR),
    ];
    let more = [
        ("", OFlags::empty()),
        ("creat", OFlags::CREATE),
        ("excl", OFlags::EXCL),
        ("creat excl", OFlags::CREATE.union(OFlags::EXCL)),
        ("trunc", OFlags::TRUNC),
        ("creat trunc", OFlags::CREATE.union(OFlags::TRUNC)),
        ("append", OFlags::APPEND),
        ("append trunc", OFlags::APPEND.union(OFlags::TRUNC)),
        ("directory", OFlags::DIRECTORY),
        ("creat directory", OFlags::CREATE.union(OFlags::DIRECTORY)),
        ("nofollow", OFlags::NOFOLLOW),
        ("creat nofollow", OFlags::CREATE.union(OFlags::NOFOLLOW)),
        ("sync", OFlags::SYNC),
        ("dsync", OFlags::DSYNC),
        ("direct", OFlags::DIRECT),
        ("path", OFlags::PATH),
        ("noatime", OFlags::NOATIME),
    ];
    mkdir("dir", 0o755).unwrap();
    symlink("file", "link").unwrap();
    symlink("dangling-target", "dangling").unwrap();
    symlink("dir", "dirlink").unwrap();
    for (access_name, access) in access {
        for (name, flags) in more {
            for path in ["file", "dir", "link", "dangling", "dirlink", "missing"] {
                make("file", b"content", 0o644);
                let label = format!("{path}, {access_name} {name}");
                out.call(&label, open(path, access | flags, 0o604));
                out.note(format!("{label}, after"), tree("."));
                unlink("missing").ok();
                unlink("dangling-target").ok();
            }
        }
    }
}

fn descriptor(out: &mut Out) {
    make("f", b"content", 0o644);
    for (name, flags) in [
        ("r", OFlags::RDONLY),
        ("w", OFlags::WRONLY),
        ("rw", OFlags::RDWR),
        ("path", OFlags::PATH),
    ] {
        let fd = open("f", flags, 0).unwrap();
        let mut buf = [0; 3];
        out.value(format!("read, {name}"), rustix::io::read(&fd, &mut buf[..]));
        out.value(format!("write, {name}"), rustix::io::write(&fd, b"x"));
        out.call(format!("ftruncate, {name}"), rustix::fs::ftruncate(&fd, 5));
        out.call(format!("fsync, {name}"), rustix::fs::fsync(&fd));
        out.call(
            format!("fchmod, {name}"),
            rustix::fs::fchmod(&fd, 0o600.into()),
        );
        out.call(format!("fstat, {name}"), rustix::fs::fstat(&fd));
        let mode = rustix::fs::FallocateFlags::empty();
        out.call(
            format!("fallocate, {name}"),
            rustix::fs::fallocate(&fd, mode, 0, 10),
        );
        let times = rustix::fs::Timestamps {
            last_access: crate::calls::time(1, 1),
            last_modification: Timespec {
                tv_sec: 2,
                tv_nsec: 2,
            },
        };
        out.call(
            format!("futimens, {name}"),
            rustix::fs::futimens(&fd, &times),
        );
        out.value(
            format!("seek before the start, {name}"),
            rustix::fs::seek(&fd, rustix::fs::SeekFrom::Current(-100)),
        );
        out.text(format!("after, {name}"), describe("f"));
    }
    // Files made without the permission their maker asks for.
    for mode in [0, 0o400, 0o200] {
        let path = format!("mode{mode:o}");
        let made = open(&path, MAKE, mode);
        let file = made.map(File::from);
        let done = file.map(|mut file| {
            let write = file.write_all(b"x");
            file.rewind().unwrap();
            let read = file.read_to_end(&mut Vec::new());
            (write.is_ok(), read.ok())
        });
        out.value(format!("made with {mode:o}"), done);
    }
    // A directory.
    mkdir("d", 0o755).unwrap();
    let fd = open("d", OFlags::RDONLY, 0).unwrap();
    out.value(
        "read of a directory",
        rustix::io::read(&fd, &mut [0; 10][..]),
    );
    out.call("ftruncate of a directory", rustix::fs::ftruncate(&fd, 0));
    out.call("fsync of a directory", rustix::fs::fsync(&fd));
    out.call("fdatasync of a directory", rustix::fs::fdatasync(&fd));
}

fn sizes(out: &mut Out) {
    let sizes: [u64; 12] = [
        0,
        1,
        4095,
        4096,
        4097,
        100_000,
        1 << 31,
        1 << 32,
        (1 << 44) - 4096,
        1 << 44,
        1 << 60,
        i64::MAX as u64,
    ];
    make("f", b"content", 0o644);
    for size in sizes {
        out.call(format!("truncate to {size}"), truncate("f", size));
        out.text(format!("after {size}"), describe("f"));
        let handle = file("f", OFlags::RDWR);
        out.call(
            format!("ftruncate to {size}"),
            rustix::fs::ftruncate(&handle, size / 2),
        );
        out.text(format!("after {size} / 2"), describe("f"));
        // Further on the client of FUSE takes data that nobody can store.
        if size < (1 << 44) - 4096 {
            let wrote = handle.write_at(b"end", size.saturating_sub(1));
            out.note(
                format!("write at {size}"),
                wrote.map_err(|error| error.raw_os_error()),
            );
            out.text(format!("after write at {size}"), describe("f"));
        }
        let mode = rustix::fs::FallocateFlags::empty();
        if !(200_000..=1 << 44).contains(&size) {
            out.call(
                format!("fallocate to {size}"),
                rustix::fs::fallocate(&handle, mode, 0, size),
            );
        }
    }
    truncate("f", 0).unwrap();
    // What was cut off comes back as zeros.
    for cut in [1, 100, 1024, 4095, 4096, 5000] {
        make("z", &[7; 10_000], 0o644);
        truncate("z", cut).unwrap();
        truncate("z", 12_000).unwrap();
        let content = std::fs::read("z").unwrap();
        let sevens = content.iter().filter(|&&byte| byte == 7).count();
        out.note(format!("cut at {cut}"), (content.len(), sevens));
        let handle = file("z", OFlags::RDWR);
        handle.set_len(cut).unwrap();
        handle.write_all_at(b"x", 11_000).unwrap();
        let content = std::fs::read("z").unwrap();
        let sevens = content.iter().filter(|&&byte| byte == 7).count();
        out.note(format!("cut at {cut}, written"), (content.len(), sevens));
    }
    give("z", OWNER);
    out.call("truncate by other", OTHER.does(|| truncate("z", 0)));
    out.call("truncate by owner", OWNER.does(|| truncate("z", 0)));
}

fn append(out: &mut Out) {
    make("log", b"start\n", 0o644);
    let mut one = file("log", OFlags::WRONLY | OFlags::APPEND);
    let mut other = file("log", OFlags::WRONLY | OFlags::APPEND);
    one.write_all(b"one\n").unwrap();
    other.write_all(b"other\n").unwrap();
    one.seek(SeekFrom::Start(0)).unwrap();
    one.write_all(b"at the end\n").unwrap();
    truncate("log", 6).unwrap();
    other.write_all(b"after the cut\n").unwrap();
    out.note("content", std::fs::read_to_string("log").ok());
    // Of several that append at once, none writes over another.
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                let mut log = file("many", OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE);
                for at in 0..100 {
                    log.write_all(format!("{thread} {at:04}\n").as_bytes())
                        .unwrap();
                }
            });
        }
    });
    let content = std::fs::read_to_string("many").unwrap();
    let mut lines: Vec<_> = content.lines().collect();
    lines.sort_unstable();
    lines.dedup();
    out.note("lines", (lines.len(), content.len()));
}

/// What can be done to a program by path, while it runs or while somebody writes it.
fn touch_program(out: &mut Out, when: &str) {
    out.call(format!("write, {when}"), open("prog", OFlags::WRONLY, 0));
    out.call(format!("both, {when}"), open("prog", OFlags::RDWR, 0));
    out.call(format!("read, {when}"), open("prog", OFlags::RDONLY, 0));
    let trunc = OFlags::RDONLY | OFlags::TRUNC;
    out.call(
        format!("read and cut, {when}"),
        open("prog-link", trunc, 0).map(drop),
    );
    out.call(format!("truncate, {when}"), truncate("prog", 1 << 30));
    out.call(format!("chmod, {when}"), chmod("prog", 0o755));
    out.call(format!("link, {when}"), link("prog", "second"));
    out.call(format!("rename, {when}"), rename("second", "third"));
    out.call(format!("unlink, {when}"), unlink("third"));
}

fn busy_text(out: &mut Out) {
    make("prog", &std::fs::read("/bin/cat").unwrap(), 0o755);
    make("other", b"", 0o755);
    symlink("other", "prog-link").unwrap();
    let run = || {
        let mut command = Command::new("./prog");
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        command.spawn().map_err(|error| error.raw_os_error())
    };
    touch_program(out, "before");
    make("prog", &std::fs::read("/bin/cat").unwrap(), 0o755);
    let mut child = run().unwrap();
    unlink("prog-link").unwrap();
    symlink("prog", "prog-link").unwrap();
    touch_program(out, "running");
    // It reads until its input ends.
    drop(child.stdin.take());
    out.note("ends well", child.wait().unwrap().success());
    let written = file("prog", OFlags::WRONLY);
    out.note("run while written", run().err());
    drop(written);
    let mut child = run().unwrap();
    drop(child.stdin.take());
    out.note("run after", child.wait().unwrap().success());
    chmod("prog", 0o644).unwrap();
    out.note("run without a bit", run().err());
    make("script", b"#!/bin/sh\nexit 7\n", 0o755);
    let status = Command::new("./script").status();
    out.note("script", status.map(|status| status.code()).ok());
    make("rubbish", b"\x7fELF rubbish", 0o755);
    let status = Command::new("./rubbish").status();
    out.note(
        "rubbish",
        status.map_err(|error| error.raw_os_error()).err(),
    );
    // Set-user-id programs count.
    make("id", &std::fs::read("/usr/bin/id").unwrap(), 0o755);
    give("id", OWNER);
    for mode in [0o755, 0o4755, 0o2755, 0o6755] {
        chmod("id", mode).unwrap();
        for which in ["-u", "-g"] {
            let said = OTHER.does(|| Command::new("./id").arg(which).output());
            let said = said.map(|said| String::from_utf8_lossy(&said.stdout).into_owned());
            out.note(format!("id {which}, {mode:o}"), said.ok());
        }
    }
}
