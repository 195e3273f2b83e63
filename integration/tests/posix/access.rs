//! Permission.

use rustix::fs::{Access, OFlags, Timespec, UTIME_NOW};

use crate::calls::{
    NOFOLLOW, chmod, chown, describe, getxattr, give, link, make, mkdir, mkfifo, open, rename,
    rmdir, setxattr, symlink, time, tree, truncate, unlink, utimens,
};
use crate::case::{Case, FELLOW, MEMBER, Needs, OTHER, OWNER, Out, Res, USERS, word};

pub const CASES: &[Case] = &[
    Case {
        name: "directory_bits",
        needs: Needs::Root,
        run: directory_bits,
    },
    Case {
        name: "file_bits",
        needs: Needs::Root,
        run: file_bits,
    },
    Case {
        name: "sticky",
        needs: Needs::Root,
        run: sticky,
    },
    Case {
        name: "bits_on_the_way",
        needs: Needs::Root,
        run: on_the_way,
    },
    Case {
        name: "root_may",
        needs: Needs::Root,
        run: root_may,
    },
];

/// The modes in which one class has `bits` and the two others the opposite, so that taking the
/// wrong class is seen.
fn modes(bits: u32) -> [u32; 3] {
    let not = bits ^ 7;
    [
        bits << 6 | not << 3 | not,
        not << 6 | bits << 3 | not,
        not << 6 | not << 3 | bits,
    ]
}

type Call = (&'static str, fn() -> Res);

const IN_DIRECTORY: &[Call] = &[
    ("list", || {
        let dir = open("d", OFlags::RDONLY | OFlags::DIRECTORY, 0)?;
        rustix::fs::Dir::read_from(dir).map(drop)
    }),
    ("stat", || rustix::fs::stat("d/f").map(drop)),
    ("open", || open("d/f", OFlags::RDONLY, 0).map(drop)),
    ("create", || {
        open("d/new", OFlags::CREATE | OFlags::WRONLY, 0o600).map(drop)
    }),
    ("mkdir", || mkdir("d/newdir", 0o700)),
    ("mkfifo", || mkfifo("d/newfifo", 0o600)),
    ("symlink", || symlink("x", "d/newlink")),
    ("link into", || link("mine", "d/newname")),
    ("rename in", || rename("d/f", "d/g")),
    ("rename back", || rename("d/g", "d/f")),
    ("rename out", || rename("d/f", "f-out")),
    ("rename into", || rename("f-out", "d/f")),
    ("unlink", || unlink("d/f")),
    ("rmdir", || rmdir("d/sub")),
    ("readlink", || {
        rustix::fs::readlink("d/link", Vec::new()).map(drop)
    }),
    ("chmod below", || chmod("d/f2", 0o640)),
    ("access", || rustix::fs::access("d/f2", Access::EXISTS)),
    ("chdir and stat", || {
        rustix::fs::stat("d/sub/../../d/f2").map(drop)
    }),
];

fn directory_bits(out: &mut Out) {
    for (who, user) in USERS {
        for bits in 0..8 {
            for mode in modes(bits) {
                let name = format!("{who}-{mode:o}");
                mkdir(&name, 0o777).unwrap();
                rustix::process::chdir(name.as_str()).unwrap();
                mkdir("d", 0o777).unwrap();
                for file in ["d/f", "d/f2", "mine"] {
                    make(file, b"x", 0o666);
                    give(file, user);
                }
                mkdir("d/sub", 0o777).unwrap();
                symlink("target", "d/link").unwrap();
                give("d/sub", user);
                give("d", OWNER);
                chmod("d", mode).unwrap();
                // One thread for all calls of a user: a thread costs more than a call.
                let words = user.does(|| {
                    let all = IN_DIRECTORY.iter();
                    all.map(|(call, run)| (*call, word(&run())))
                        .collect::<Vec<_>>()
                });
                for (call, word) in words {
                    out.text(format!("{call}, {who}, {mode:o}"), word);
                }
                out.note(format!("after, {who}, {mode:o}"), tree("."));
                rustix::process::chdir("..").unwrap();
            }
        }
    }
}

const NOW: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: UTIME_NOW,
};

const ON_FILE: &[Call] = &[
    ("read", || open("f", OFlags::RDONLY, 0).map(drop)),
    ("write", || open("f", OFlags::WRONLY, 0).map(drop)),
    ("both", || open("f", OFlags::RDWR, 0).map(drop)),
    ("read and truncate", || {
        open("f", OFlags::RDONLY | OFlags::TRUNC, 0).map(drop)
    }),
    ("create", || {
        open("f", OFlags::RDONLY | OFlags::CREATE, 0).map(drop)
    }),
    ("truncate", || truncate("f", 1)),
    ("times now", || {
        utimens("f", NOW, NOW, rustix::fs::AtFlags::empty())
    }),
    ("times set", || {
        utimens("f", time(1, 2), time(3, 4), rustix::fs::AtFlags::empty())
    }),
    ("access read", || rustix::fs::access("f", Access::READ_OK)),
    ("access write", || rustix::fs::access("f", Access::WRITE_OK)),
    ("access exec", || rustix::fs::access("f", Access::EXEC_OK)),
    ("setxattr", || setxattr("f", "user.x", b"v")),
    ("getxattr", || getxattr("f", "user.x").map(drop)),
    ("set trusted", || setxattr("f", "trusted.x", b"v")),
    ("get trusted", || getxattr("f", "trusted.x").map(drop)),
    ("link", || link("f", "hard")),
    ("rename", || rename("f", "f")),
    ("O_NOATIME", || {
        open("f", OFlags::RDONLY | OFlags::NOATIME, 0).map(drop)
    }),
];

fn file_bits(out: &mut Out) {
    for (who, user) in USERS {
        for bits in 0..8 {
            for mode in modes(bits) {
                let name = format!("{who}-{mode:o}");
                mkdir(&name, 0o777).unwrap();
                rustix::process::chdir(name.as_str()).unwrap();
                make("f", b"#!/bin/true\n", 0o666);
                give("f", OWNER);
                chmod("f", mode).unwrap();
                let words = user.does(|| {
                    let all = ON_FILE.iter();
                    all.map(|(call, run)| (*call, word(&run())))
                        .collect::<Vec<_>>()
                });
                for (call, word) in words {
                    out.text(format!("{call}, {who}, {mode:o}"), word);
                }
                out.note(format!("after, {who}, {mode:o}"), describe("f"));
                rustix::process::chdir("..").unwrap();
            }
        }
    }
}

const IN_STICKY: &[Call] = &[
    ("rename within", || rename("s/f", "s/g")),
    ("rename back", || rename("s/g", "s/f")),
    ("rename out", || rename("s/f", "f-out")),
    ("rename in again", || rename("f-out", "s/f")),
    ("rename over", || rename("s/mine", "s/f")),
    ("rename dir over", || rename("s/minedir", "s/dir")),
    ("rename dir out", || rename("s/dir", "dir-out")),
    ("rmdir", || rmdir("s/dir")),
    ("exchange", || {
        crate::calls::rename_with("s/other", "s/mine2", rustix::fs::RenameFlags::EXCHANGE)
    }),
    ("unlink link", || unlink("s/link")),
    ("unlink", || unlink("s/f")),
];

fn sticky(out: &mut Out) {
    let people = [OWNER, FELLOW, MEMBER, OTHER];
    for (who, user) in USERS {
        for (of_dir, dir_owner) in USERS {
            for (at, owner) in people.into_iter().enumerate() {
                for mode in [0o1777, 0o777] {
                    let label = format!("{who} in {of_dir}'s {mode:o}, file of {at}");
                    let name = format!("{who}-{of_dir}-{at}-{mode:o}");
                    mkdir(&name, 0o777).unwrap();
                    rustix::process::chdir(name.as_str()).unwrap();
                    mkdir("s", 0o777).unwrap();
                    for file in ["s/f", "s/other"] {
                        make(file, b"", 0o666);
                        give(file, owner);
                    }
                    mkdir("s/dir", 0o777).unwrap();
                    symlink("f", "s/link").unwrap();
                    give("s/dir", owner);
                    give("s/link", owner);
                    for file in ["s/mine", "s/mine2"] {
                        make(file, b"", 0o666);
                        give(file, user);
                    }
                    mkdir("s/minedir", 0o777).unwrap();
                    give("s/minedir", user);
                    give("s", dir_owner);
                    chmod("s", mode).unwrap();
                    let words = user.does(|| {
                        let all = IN_STICKY.iter();
                        all.map(|(call, run)| (*call, word(&run())))
                            .collect::<Vec<_>>()
                    });
                    for (call, word) in words {
                        out.text(format!("{call}, {label}"), word);
                    }
                    out.note(format!("after, {label}"), tree("."));
                    rustix::process::chdir("..").unwrap();
                }
            }
        }
    }
}

/// Search permission is needed in every directory of a path, and asked anew after a change.
fn on_the_way(out: &mut Out) {
    mkdir("a", 0o777).unwrap();
    mkdir("a/b", 0o777).unwrap();
    make("a/b/f", b"x", 0o666);
    let look = || {
        let stat = rustix::fs::stat("a/b/f").map(drop);
        let list = open("a", OFlags::RDONLY | OFlags::DIRECTORY, 0).map(drop);
        (word(&stat), word(&list))
    };
    for mode in [0o777, 0o776, 0o773, 0o771, 0o770, 0o700, 0o777] {
        chmod("a", mode).unwrap();
        out.note(format!("other, {mode:o}"), OTHER.does(look));
        out.note(format!("root, {mode:o}"), look());
    }
    chown("a", Some(OTHER.uid), None, NOFOLLOW).unwrap();
    chmod("a", 0o700).unwrap();
    out.note("other as owner", OTHER.does(look));
    chown("a", Some(OWNER.uid), Some(OTHER.gid), NOFOLLOW).unwrap();
    chmod("a", 0o710).unwrap();
    out.note("other as group", OTHER.does(look));
    // What is open stays open.
    make("open", b"kept", 0o644);
    give("open", OWNER);
    let read = OTHER.does(|| {
        let file = open("open", OFlags::RDONLY, 0)?;
        Ok::<_, rustix::io::Errno>(file)
    });
    chmod("open", 0).unwrap();
    let mut buf = [0; 4];
    let read = OTHER.does(|| rustix::io::read(read.unwrap(), &mut buf[..]));
    out.value("read of what was opened before", read);
    out.call(
        "opened after",
        OTHER.does(|| open("open", OFlags::RDONLY, 0)),
    );
}

fn root_may(out: &mut Out) {
    mkdir("d", 0).unwrap();
    give("d", OWNER);
    make("f", b"x", 0);
    give("f", OWNER);
    out.call("create", open("d/x", OFlags::CREATE, 0o600));
    out.call("list", open("d", OFlags::RDONLY, 0));
    out.call("read", open("f", OFlags::RDONLY, 0));
    out.call("write", open("f", OFlags::WRONLY, 0));
    out.call("exec", rustix::fs::access("f", Access::EXEC_OK));
    chmod("f", 0o001).unwrap();
    out.call("exec by one bit", rustix::fs::access("f", Access::EXEC_OK));
    out.call("set trusted", setxattr("f", "trusted.x", b"v"));
    out.call(
        "other lists no trusted",
        OTHER.does(|| {
            let mut names = [0_u8; 100];
            let len = rustix::fs::listxattr("f", names.as_mut_slice())?;
            if len > 0 {
                return Err(rustix::io::Errno::EXIST);
            }
            Ok(())
        }),
    );
}
