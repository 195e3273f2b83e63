//! chmod, chown, set-id bits, umask, special files.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::{AtFlags, FallocateFlags, FileType, Mode, OFlags, makedev};

use crate::calls::{
    NOFOLLOW, chmod, chown, describe, give, make, mkdir, mkfifo, mknod, open, setxattr, symlink,
    tree, truncate,
};
use crate::case::{Case, MEMBER, Needs, OTHER, OWNER, Out, Res, USERS, word};

pub const CASES: &[Case] = &[
    Case {
        name: "chmod_every_mode",
        needs: Needs::Root,
        run: chmod_every_mode,
    },
    Case {
        name: "chown_by_everybody",
        needs: Needs::Root,
        run: chown_by_everybody,
    },
    Case {
        name: "set_id_bits_go",
        needs: Needs::Root,
        run: set_id_bits_go,
    },
    Case {
        name: "new_with_umask",
        needs: Needs::Root,
        run: new_with_umask,
    },
    Case {
        name: "special_files",
        needs: Needs::Root,
        run: special_files,
    },
    Case {
        name: "capability_goes",
        needs: Needs::Root,
        run: capability_goes,
    },
];

/// Makes one of each kind for the owner.
fn kinds() -> [&'static str; 4] {
    make("file", b"x", 0o644);
    mkdir("dir", 0o755).unwrap();
    mkfifo("fifo", 0o644).unwrap();
    symlink("file", "link").unwrap();
    for name in ["file", "dir", "fifo", "link"] {
        give(name, OWNER);
    }
    ["file", "dir", "fifo", "link"]
}

fn chmod_every_mode(out: &mut Out) {
    let names = kinds();
    let modes = [
        0, 1, 0o22, 0o444, 0o755, 0o777, 0o1000, 0o1644, 0o2000, 0o2644, 0o2755, 0o4000, 0o4711,
        0o6755, 0o7777,
    ];
    for name in names {
        for mode in modes {
            out.call(format!("{name} {mode:o} by root"), chmod(name, mode));
            out.text(
                format!("{name} {mode:o} by root, after"),
                describe(name) + &describe("file"),
            );
            for (who, user) in USERS {
                let label = format!("{name} {mode:o} by {who}");
                out.call(&label, user.does(|| chmod(name, mode)));
                out.text(format!("{label}, after"), describe(name));
                let fd = open(name, OFlags::RDWR, 0).or_else(|_| open(name, OFlags::RDONLY, 0));
                let result = user
                    .does(|| fd.and_then(|fd| rustix::fs::fchmod(fd, Mode::from_raw_mode(mode))));
                out.call(format!("{label} by descriptor"), result);
                out.text(format!("{label}, after that"), describe(name));
            }
        }
    }
    // A group of the owner's that the file has not: the set-group-id bit cannot be set.
    for (who, gid) in [("own", OWNER.gid), ("foreign", OTHER.gid)] {
        chown("file", None, Some(gid), NOFOLLOW).unwrap();
        chown("dir", None, Some(gid), NOFOLLOW).unwrap();
        for name in ["file", "dir"] {
            out.call(
                format!("set-group-id, {name}, {who} group"),
                OWNER.does(|| chmod(name, 0o6775)),
            );
            out.text(format!("{name}, {who} group"), describe(name));
        }
    }
}

fn chown_by_everybody(out: &mut Out) {
    let names = kinds();
    let targets = [
        (None, None),
        (Some(OWNER.uid), None),
        (Some(OTHER.uid), None),
        (None, Some(OWNER.gid)),
        (None, Some(OTHER.gid)),
        (None, Some(MEMBER.gid)),
        (Some(OWNER.uid), Some(OWNER.gid)),
        (Some(OTHER.uid), Some(OTHER.gid)),
        (Some(70_000), Some(80_000)),
        (Some(u32::MAX - 1), Some(u32::MAX - 1)),
    ];
    let everybody = USERS.map(|(who, user)| (who, Some(user)));
    let everybody = everybody.into_iter().chain([("root", None)]);
    for (who, user) in everybody {
        for name in names {
            for mode in [0o644, 0o4755, 0o2755, 0o2745, 0o6777, 0o6666] {
                for (uid, gid) in targets {
                    give(name, OWNER);
                    if name != "link" {
                        chmod(name, mode).unwrap();
                    }
                    let call = || chown(name, uid, gid, NOFOLLOW);
                    let result = match user {
                        Some(user) if user.uid == OTHER.uid && mode != 0o6777 => continue,
                        Some(user) => user.does(call),
                        None => call(),
                    };
                    out.text(
                        format!("{name} {mode:o} to {uid:?} {gid:?} by {who}"),
                        format!("{} {}", word(&result), describe(name)),
                    );
                }
            }
        }
    }
    give("file", OWNER);
    give("link", OWNER);
    let follow = AtFlags::empty();
    out.call("through link", chown("link", Some(7), Some(8), follow));
    out.text("link", describe("link"));
    out.text("its target", describe("file"));
}

type Change = (&'static str, fn(&File) -> std::io::Result<()>);

const CHANGES: &[Change] = &[
    ("write", |file| file.write_all_at(b"y", 0)),
    ("write nothing", |file| file.write_at(b"", 0).map(drop)),
    ("append", |file| file.write_all_at(b"y", 9000)),
    ("ftruncate", |file| file.set_len(1)),
    ("ftruncate up", |file| file.set_len(5000)),
    ("ftruncate to the same", |file| file.set_len(4)),
    ("fallocate", |file| {
        Ok(rustix::fs::fallocate(
            file,
            FallocateFlags::empty(),
            0,
            8192,
        )?)
    }),
    ("fallocate, size kept", |file| {
        let flags = FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(file, flags, 0, 8192)?)
    }),
    ("punch", |file| {
        let flags = FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE;
        Ok(rustix::fs::fallocate(file, flags, 0, 4096)?)
    }),
    ("copy_file_range", |file| {
        let source = File::open("source")?;
        rustix::fs::copy_file_range(source, None, file, None, 4)?;
        Ok(())
    }),
    ("read", |file| file.read_at(&mut [0], 0).map(drop)),
];

fn set_id_bits_go(out: &mut Out) {
    make("source", b"data", 0o644);
    let everybody = USERS.map(|(who, user)| (who, Some(user)));
    let everybody = everybody.into_iter().chain([("root", None)]);
    for (who, user) in everybody {
        for mode in [0o4777, 0o2777, 0o2767, 0o6777, 0o6766, 0o1777] {
            for (change, run) in CHANGES {
                let label = format!("{change}, {mode:o} by {who}");
                make("f", b"four", 0o777);
                give("f", OWNER);
                chmod("f", mode).unwrap();
                let act = || {
                    let file = File::options().read(true).write(true).open("f").unwrap();
                    run(&file).map_err(|error| error.raw_os_error())
                };
                let result = match user {
                    Some(user) => user.does(act),
                    None => act(),
                };
                out.note(&label, result);
                out.text(format!("{label}, after"), describe("f"));
            }
            for (call, run) in [
                ("truncate", (|| truncate("f", 1)) as fn() -> Res),
                ("O_TRUNC", || {
                    open("f", OFlags::WRONLY | OFlags::TRUNC, 0).map(drop)
                }),
            ] {
                make("f", b"four", 0o777);
                give("f", OWNER);
                chmod("f", mode).unwrap();
                let result = match user {
                    Some(user) => user.does(run),
                    None => run(),
                };
                let label = format!("{call}, {mode:o} by {who}");
                out.text(label, format!("{} {}", word(&result), describe("f")));
            }
        }
    }
}

/// Mode and group of what is made, by umask and by the directory's set-group-id bit.
fn new_with_umask(out: &mut Out) {
    for umask in [0, 0o022, 0o027, 0o077, 0o777] {
        for dir_mode in [0o777, 0o2777, 0o3777] {
            let dir = format!("d-{umask:o}-{dir_mode:o}");
            mkdir(&dir, 0o777).unwrap();
            chown(&dir, None, Some(OTHER.gid), NOFOLLOW).unwrap();
            chmod(&dir, dir_mode).unwrap();
            for mode in [0o777, 0o666, 0o640, 0o6777, 0o7777, 0o2755, 0o2745] {
                let at = |name: &str| format!("{dir}/{name}-{mode:o}");
                rustix::process::umask(Mode::from_raw_mode(umask));
                let make_all = |suffix: &'static str| {
                    let at = |name: &str| at(name) + suffix;
                    let file = open(&at("file"), OFlags::CREATE | OFlags::WRONLY, mode);
                    [
                        word(&file),
                        word(&mkdir(&at("dir"), mode)),
                        word(&mkfifo(&at("fifo"), mode)),
                        word(&mknod(&at("node"), FileType::RegularFile, mode, 0)),
                        word(&symlink("x", &at("link"))),
                    ]
                };
                let by_root = make_all("");
                let by_owner = OWNER.does(|| make_all("o"));
                let by_member = MEMBER.does(|| make_all("m"));
                rustix::process::umask(Mode::empty());
                out.note(format!("{dir}, {mode:o}"), (by_root, by_owner, by_member));
            }
            out.note(format!("{dir}, after"), tree(&dir));
        }
    }
}

fn special_files(out: &mut Out) {
    let kinds = [
        ("file", FileType::RegularFile),
        ("fifo", FileType::Fifo),
        ("socket", FileType::Socket),
        ("char", FileType::CharacterDevice),
        ("block", FileType::BlockDevice),
        ("dir", FileType::Directory),
        ("link", FileType::Symlink),
    ];
    for (name, kind) in kinds {
        for (major, minor) in [
            (0, 0),
            (1, 3),
            (7, 255),
            (255, 255),
            (256, 0),
            (4000, 1_000_000),
        ] {
            let path = format!("{name}-{major}-{minor}");
            let made = mknod(&path, kind, 0o640, makedev(major, minor));
            out.call(format!("{path} by root"), made);
            out.text(&path, describe(&path));
            let path = path + "-owner";
            let made = OWNER.does(|| mknod(&path, kind, 0o640, makedev(major, minor)));
            out.call(format!("{path} by owner"), made);
            out.text(&path, describe(&path));
        }
    }
    mknod("null", FileType::CharacterDevice, 0o666, makedev(1, 3)).unwrap();
    let null = File::options().read(true).write(true).open("null");
    let null = null.map_err(|error| error.raw_os_error());
    out.note("open null", null.as_ref().err());
    if let Ok(null) = null {
        out.note("write to null", null.write_at(b"gone", 0).ok());
        out.note("read of null", null.read_at(&mut [0], 0).ok());
        out.text("null", describe("null"));
    }
    out.call("fifo read only", open("fifo-0-0", OFlags::RDONLY, 0));
    out.call("fifo write only", open("fifo-0-0", OFlags::WRONLY, 0));
    out.call("fifo both", open("fifo-0-0", OFlags::RDWR, 0));
    out.call("socket", open("socket-0-0", OFlags::RDWR, 0));
    out.call("fifo, truncate", truncate("fifo-0-0", 0));
}

/// `security.capability` is lost with a change by anybody.
fn capability_goes(out: &mut Out) {
    // VFS_CAP_REVISION_2, CAP_NET_RAW.
    let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let mut attempt = |what: &str, run: &dyn Fn()| {
        make("f", b"four", 0o666);
        let set = setxattr("f", "security.capability", capability);
        run();
        let left = rustix::fs::getxattr("f", "security.capability", [0_u8; 64].as_mut_slice());
        out.note(what, (word(&set), word(&left)));
    };
    attempt("nothing", &|| {});
    attempt("write", &|| {
        let file = File::options().write(true).open("f").unwrap();
        file.write_all_at(b"x", 0).unwrap();
    });
    attempt("truncate", &|| truncate("f", 1).unwrap());
    attempt("chown", &|| give("f", OWNER));
    attempt("chmod", &|| chmod("f", 0o600).unwrap());
    attempt("write by other", &|| {
        chmod("f", 0o666).unwrap();
        OTHER.does(|| {
            let file = File::options().write(true).open("f").unwrap();
            file.write_all_at(b"x", 0).unwrap();
        });
    });
}
