//! rename, with its flags.

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{FileType, OFlags, RenameFlags};

use crate::calls::{
    describe, getxattr, give, link, make, mkdir, mkfifo, mknod, open, rename, rename_with, rmdir,
    setxattr, symlink, tree,
};
use crate::case::{Case, Needs, OTHER, OWNER, Out};

pub const CASES: &[Case] = &[
    Case {
        name: "every_kind_onto_every_kind",
        needs: Needs::Ext4,
        run: every_kind,
    },
    Case {
        name: "directories_below_themselves",
        needs: Needs::Ext4,
        run: below_themselves,
    },
    Case {
        name: "what_a_file_keeps",
        needs: Needs::Nothing,
        run: keeps,
    },
    Case {
        name: "directories_of_others",
        needs: Needs::Root,
        run: of_others,
    },
];

const KINDS: [&str; 8] = [
    "file", "dir", "full", "link", "fifo", "socket", "device", "missing",
];

fn make_kind(kind: &str, path: &str) {
    match kind {
        "file" => make(path, b"content", 0o644),
        "dir" => mkdir(path, 0o755).unwrap(),
        "full" => {
            mkdir(path, 0o755).unwrap();
            make(&format!("{path}/inside"), b"", 0o644);
        }
        "link" => symlink("target", path).unwrap(),
        "fifo" => mkfifo(path, 0o644).unwrap(),
        "socket" => mknod(path, FileType::Socket, 0o644, 0).unwrap(),
        "device" => mknod(path, FileType::CharacterDevice, 0o644, 0x103).unwrap(),
        _ => {}
    }
}

/// Among what was seen: a whiteout that was damage to whoever listed it. It had the number of a file
/// deleted a moment before, which was still in memory.
fn every_kind(out: &mut Out) {
    let all = [
        ("plain", RenameFlags::empty()),
        ("noreplace", RenameFlags::NOREPLACE),
        ("exchange", RenameFlags::EXCHANGE),
        ("whiteout", RenameFlags::WHITEOUT),
        (
            "noreplace and exchange",
            RenameFlags::NOREPLACE | RenameFlags::EXCHANGE,
        ),
        (
            "noreplace and whiteout",
            RenameFlags::NOREPLACE | RenameFlags::WHITEOUT,
        ),
        ("unknown", RenameFlags::from_bits_retain(8)),
    ];
    for (flags_name, flags) in all {
        for from in KINDS {
            for to in KINDS {
                for across in [false, true] {
                    let way = if across { "across" } else { "within" };
                    let label = format!("{from} to {to}, {flags_name}, {way}");
                    let dir = label.replace([' ', ','], "-");
                    mkdir(&dir, 0o755).unwrap();
                    rustix::process::chdir(dir.as_str()).unwrap();
                    mkdir("a", 0o755).unwrap();
                    mkdir("b", 0o755).unwrap();
                    let target = if across { "b/to" } else { "a/to" };
                    make_kind(from, "a/from");
                    make_kind(to, target);
                    out.call(&label, rename_with("a/from", target, flags));
                    out.note(format!("{label}, after"), tree("."));
                    rustix::process::chdir("..").unwrap();
                }
            }
        }
    }
}

fn below_themselves(out: &mut Out) {
    mkdir("a", 0o755).unwrap();
    mkdir("a/b", 0o755).unwrap();
    mkdir("a/b/c", 0o755).unwrap();
    make("a/file", b"", 0o644);
    for (from, to) in [
        ("a", "a/b"),
        ("a", "a/x"),
        ("a", "a/b/c/x"),
        ("a/b", "a"),
        ("a/b/c", "a"),
        ("a", "a"),
        ("a/file", "a"),
        ("a", "a/file"),
        ("a/.", "x"),
        ("a/..", "x"),
        ("a/b", "a/b/."),
    ] {
        for (name, flags) in [
            ("plain", RenameFlags::empty()),
            ("exchange", RenameFlags::EXCHANGE),
            ("noreplace", RenameFlags::NOREPLACE),
        ] {
            out.call(
                format!("{from} to {to}, {name}"),
                rename_with(from, to, flags),
            );
        }
    }
    out.note("after", tree("."));
    rename("a/b/c", "c").unwrap();
    out.note("after one moved up", tree("."));
    let parent = |path: &str| std::fs::metadata(path).unwrap().ino();
    out.note("its parent", parent("c/..") == parent("."));
    rename("c", "a/c").unwrap();
    out.note("its parent", parent("a/c/..") == parent("a"));
    rename_with("a/c", "a/b", RenameFlags::EXCHANGE).unwrap();
    mkdir("far", 0o755).unwrap();
    rename_with("a/c", "far", RenameFlags::EXCHANGE).unwrap();
    out.note("exchanged", parent("far/..") == parent("."));
    out.note("exchanged", parent("a/c/..") == parent("a"));
    out.note("after all", tree("."));
}

fn keeps(out: &mut Out) {
    make("f", b"content", 0o640);
    setxattr("f", "user.x", b"value").ok();
    link("f", "second").unwrap();
    let ino = |path: &str| std::fs::symlink_metadata(path).map(|meta| meta.ino()).ok();
    let before = ino("f");
    let kept = File::open("f").unwrap();
    rename("f", "g").unwrap();
    out.note("same inode", before == ino("g"));
    out.value("attribute", getxattr("g", "user.x"));
    out.text("renamed", describe("g"));
    out.note("open", kept.metadata().map(|meta| meta.nlink()).ok());
    out.call("onto its second name", rename("g", "second"));
    out.note(
        "both are there",
        (ino("g") == before, ino("second") == before),
    );
    make("other", b"longer content", 0o600);
    out.call("onto another", rename("g", "other"));
    out.text("other", describe("other"));
    rename("second", "other").unwrap();
    out.note("after", tree("."));
    // A directory that somebody lists or stands in.
    mkdir("d", 0o755).unwrap();
    mkdir("d/e", 0o755).unwrap();
    let dir = open("d/e", OFlags::RDONLY, 0).unwrap();
    rename("d/e", "e").unwrap();
    let made = rustix::fs::mkdirat(&dir, "inside", 0o755.into());
    out.call("made through the open one", made);
    out.note("tree", tree("."));
    out.call("rmdir", rmdir("d"));
}

/// Moving a directory to another parent changes its "..", so its owner's permission is needed.
fn of_others(out: &mut Out) {
    mkdir("a", 0o777).unwrap();
    mkdir("b", 0o777).unwrap();
    for mode in [0o755, 0o555, 0o777] {
        for (whose, owner) in [("mine", OTHER), ("theirs", OWNER)] {
            mkdir("a/d", mode).unwrap();
            give("a/d", owner);
            let label = format!("{whose}, {mode:o}");
            out.call(
                format!("within, {label}"),
                OTHER.does(|| rename("a/d", "a/e").and_then(|()| rename("a/e", "a/d"))),
            );
            out.call(
                format!("to another, {label}"),
                OTHER.does(|| rename("a/d", "b/d")),
            );
            mkdir("over", 0o777).unwrap();
            give("over", owner);
            out.call(
                format!("over it, {label}"),
                OTHER.does(|| rename("over", "b/d")),
            );
            out.note(format!("after, {label}"), tree("."));
            for path in ["a/d", "b/d", "over"] {
                rmdir(path).ok();
            }
        }
    }
}
