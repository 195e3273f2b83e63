//! Names: made, removed, counted, raced for.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Barrier;

use rustix::fs::{AtFlags, FileType, OFlags};

use crate::calls::{
    MAKE, chmod, describe, file, link, make, mkdir, mkfifo, mknod, open, rename, rmdir, symlink,
    tree, truncate, unlink,
};
use crate::case::{Case, Needs, OTHER, Out, Res, word};
use crate::common::count;

pub const CASES: &[Case] = &[
    Case {
        name: "links_of_files",
        needs: Needs::Nothing,
        run: links_of_files,
    },
    Case {
        name: "links_of_directories",
        needs: Needs::Ext4,
        run: links_of_directories,
    },
    Case {
        name: "link_max",
        needs: Needs::Ext4,
        run: link_max,
    },
    Case {
        name: "removed_while_open",
        needs: Needs::Nothing,
        run: removed_while_open,
    },
    Case {
        name: "directory_removed_while_open",
        needs: Needs::Ext4,
        run: directory_removed_while_open,
    },
    Case {
        name: "immutable_and_append_only",
        needs: Needs::Ext4,
        run: flags,
    },
    Case {
        name: "races",
        needs: Needs::Nothing,
        run: races,
    },
];

fn links_of_files(out: &mut Out) {
    make("file", b"content", 0o644);
    mkfifo("fifo", 0o644).unwrap();
    mknod("socket", FileType::Socket, 0o644, 0).unwrap();
    symlink("nowhere", "link").unwrap();
    for name in ["file", "fifo", "socket", "link"] {
        let (second, third) = (format!("{name}-2"), format!("{name}-3"));
        out.call(format!("{name}, second"), link(name, &second));
        out.text(name, describe(name));
        chmod(&second, 0o600).ok();
        out.call(format!("{name}, third"), link(&second, &third));
        out.text(name, describe(&third));
        out.call(format!("{name}, first goes"), unlink(name));
        out.text(name, describe(&third));
        out.call(format!("{name}, there"), link(&second, &third));
        out.call(format!("{name}, onto its other"), rename(&second, &third));
        out.note(format!("{name}, after"), tree("."));
        out.call(format!("{name}, second goes"), unlink(&second));
        out.text(name, describe(&third));
        out.call(format!("{name}, third goes"), unlink(&third));
        out.text(name, describe(&third));
    }
    mkdir("dir", 0o755).unwrap();
    out.call("a directory", link("dir", "other"));
    out.call("an empty target", symlink("", "empty"));
}

fn links_of_directories(out: &mut Out) {
    let links = |path: &str| rustix::fs::stat(path).map(|stat| stat.st_nlink);
    mkdir("a", 0o755).unwrap();
    mkdir("b", 0o755).unwrap();
    out.value("new", links("a"));
    for at in 0..5 {
        mkdir(&format!("a/{at}"), 0o755).unwrap();
        out.value("a", links("a"));
    }
    out.call("not empty", rmdir("a"));
    rename("a/0", "b/0").unwrap();
    out.note("moved", (links("a").ok(), links("b").ok()));
    rename("a/1", "b/0").unwrap();
    out.note("moved over", (links("a").ok(), links("b").ok()));
    rename("a/2", "a/3").unwrap();
    out.value("over a sister", links("a"));
    rmdir("a/3").unwrap();
    out.value("removed", links("a"));
    make("a/file", b"", 0o644);
    out.call("rmdir of a file", rmdir("a/file"));
    out.call("unlink of a directory", unlink("a/4"));
    out.call("rmdir .", rmdir("a/4/."));
    out.call("rmdir ..", rmdir("a/4/.."));
    out.note("after", tree("."));
    let sizes = std::fs::metadata("a").unwrap();
    out.note("blocks", std::os::unix::fs::MetadataExt::size(&sizes));
}

/// As many names as an inode can have: by full counts only, as it takes a while.
fn link_max(out: &mut Out) {
    make("file", b"", 0o644);
    let most = count(300, 66_000);
    let made = (0..most).find_map(|at| match link("file", &format!("l{at}")) {
        Ok(()) => None,
        error => Some((at, word(&error))),
    });
    out.note("links made", made);
    out.text("file", describe("file"));
    out.call("one goes", unlink("l7"));
    out.call("one comes", link("file", "again"));
    mkdir("dirs", 0o755).unwrap();
    let made = (0..most).find_map(|at| match mkdir(&format!("dirs/{at}"), 0o755) {
        Ok(()) => None,
        error => Some((at, word(&error))),
    });
    out.note("directories made", made);
    out.text("dirs", describe("dirs"));
}

fn removed_while_open(out: &mut Out) {
    let open_file = file("f", MAKE);
    open_file.write_all_at(b"still here", 0).unwrap();
    link("f", "second").unwrap();
    unlink("f").unwrap();
    let look = |file: &File| rustix::fs::fstat(file).map(|stat| (stat.st_nlink, stat.st_size));
    out.value("one name left", look(&open_file));
    unlink("second").unwrap();
    out.value("no name left", look(&open_file));
    let mut buf = [0; 10];
    out.note("read", open_file.read_at(&mut buf, 0).ok());
    out.note("content", buf);
    out.note("write", open_file.write_at(b"more", 100_000).ok());
    out.value("grown", look(&open_file));
    out.note("shrunk", open_file.set_len(3).ok());
    out.value("shrunk", look(&open_file));
    let mode = rustix::fs::fchmod(&open_file, rustix::fs::Mode::from_raw_mode(0o600));
    out.call("chmod", mode);
    make("f", b"another", 0o644);
    out.text("another of the name", describe("f"));
    out.value("the old one", look(&open_file));
    // By way of /proc, a file without a name gets none again.
    let path = format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&open_file)
    );
    let cwd = rustix::fs::CWD;
    let flags = AtFlags::SYMLINK_FOLLOW;
    out.call("link", rustix::fs::linkat(cwd, path, cwd, "back", flags));
    let over = file("over", MAKE);
    make("new", b"new", 0o644);
    rename("new", "over").unwrap();
    out.value("replaced", look(&over));
}

fn directory_removed_while_open(out: &mut Out) {
    mkdir("d", 0o755).unwrap();
    let dir = open("d", OFlags::RDONLY | OFlags::DIRECTORY, 0).unwrap();
    rmdir("d").unwrap();
    let stat = rustix::fs::fstat(&dir);
    out.value("links", stat.map(|stat| stat.st_nlink));
    let mode = rustix::fs::Mode::from_raw_mode(0o644);
    let flags = OFlags::CREATE | OFlags::WRONLY;
    out.call("create", rustix::fs::openat(&dir, "x", flags, mode));
    out.call("mkdir", rustix::fs::mkdirat(&dir, "x", mode));
    out.call("stat .", rustix::fs::statat(&dir, ".", AtFlags::empty()));
    out.call("stat ..", rustix::fs::statat(&dir, "..", AtFlags::empty()));
    let mut names = 0;
    let mut failed = None;
    match rustix::fs::Dir::read_from(&dir) {
        Ok(entries) => entries.for_each(|entry| match entry {
            Ok(_) => names += 1,
            Err(error) => failed = Some(error),
        }),
        Err(error) => failed = Some(error),
    }
    out.note("names", (names, failed));
    // As the place one is in.
    mkdir("e", 0o755).unwrap();
    rustix::process::chdir("e").unwrap();
    rmdir("../e").unwrap();
    out.call("mkdir where nothing is", mkdir("x", 0o755));
    out.call("stat where nothing is", rustix::fs::stat("."));
    out.call("rename where nothing is", rename("../d", "d"));
}

fn flags(out: &mut Out) {
    use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
    for (name, flag) in [("immutable", IFlags::IMMUTABLE), ("append", IFlags::APPEND)] {
        make(name, b"content", 0o644);
        let dir = format!("{name}-dir");
        mkdir(&dir, 0o755).unwrap();
        make(&format!("{dir}/f"), b"", 0o644);
        for path in [name, dir.as_str()] {
            let fd = open(path, OFlags::RDONLY, 0).unwrap();
            let old = ioctl_getflags(&fd).unwrap();
            let by_other = OTHER.does(|| ioctl_setflags(&fd, old | flag));
            out.call(format!("set {path} by other"), by_other);
            out.call(format!("set {path}"), ioctl_setflags(&fd, old | flag));
        }
        let calls: &[(&str, &dyn Fn() -> Res)] = &[
            ("read", &|| open(name, OFlags::RDONLY, 0).map(drop)),
            ("write", &|| open(name, OFlags::WRONLY, 0).map(drop)),
            ("append", &|| {
                open(name, OFlags::WRONLY | OFlags::APPEND, 0).map(drop)
            }),
            ("truncate", &|| truncate(name, 0)),
            ("chmod", &|| chmod(name, 0o600)),
            ("link", &|| link(name, "new")),
            ("rename", &|| rename(name, "new")),
            ("unlink", &|| unlink(name)),
            ("setxattr", &|| crate::calls::setxattr(name, "user.x", b"v")),
            ("times", &|| {
                let time = crate::calls::time(1, 1);
                crate::calls::utimens(name, time, time, AtFlags::empty())
            }),
            ("create below", &|| {
                open(&format!("{dir}/new"), OFlags::CREATE, 0o644).map(drop)
            }),
            ("mkdir below", &|| mkdir(&format!("{dir}/newdir"), 0o755)),
            ("unlink below", &|| unlink(&format!("{dir}/f"))),
            ("rename below", &|| {
                rename(&format!("{dir}/f"), &format!("{dir}/g"))
            }),
            ("rmdir", &|| rmdir(&dir)),
        ];
        for (call, run) in calls {
            out.call(format!("{call}, {name}"), run());
        }
        for path in [name, dir.as_str()] {
            let fd = open(path, OFlags::RDONLY, 0);
            let set = IFlags::IMMUTABLE | IFlags::APPEND;
            let cleared = fd.and_then(|fd| ioctl_setflags(&fd, ioctl_getflags(&fd)? - set));
            out.call(format!("clear {path}"), cleared);
        }
    }
    out.note("after", tree("."));
}

/// Runs `act` in many threads at once; how often each outcome came.
fn race(act: impl Fn(usize) -> Res + Sync) -> BTreeMap<String, usize> {
    const THREADS: usize = 4;
    let start = Barrier::new(THREADS);
    let words: Vec<String> = std::thread::scope(|scope| {
        let spawn = |at| {
            let (start, act) = (&start, &act);
            scope.spawn(move || {
                start.wait();
                word(&act(at))
            })
        };
        let threads: Vec<_> = (0..THREADS).map(spawn).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    let mut counts = BTreeMap::new();
    for word in words {
        *counts.entry(word).or_insert(0) += 1;
    }
    counts
}

/// Of many that try, one wins.
fn races(out: &mut Out) {
    let mut seen: BTreeMap<&str, BTreeMap<BTreeMap<String, usize>, usize>> = BTreeMap::new();
    let mut add = |what, counts| *seen.entry(what).or_default().entry(counts).or_insert(0) += 1;
    for round in 0..count(50, 1000) {
        let name = format!("n{round}");
        let exclusive = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY;
        add("O_EXCL", race(|_| open(&name, exclusive, 0o600).map(drop)));
        add("O_CREAT", {
            let name = format!("c{round}");
            race(|_| open(&name, OFlags::CREATE | OFlags::WRONLY, 0o600).map(drop))
        });
        add("link", {
            let to = format!("l{round}");
            race(|_| link(&name, &to))
        });
        add(
            "rename from one",
            race(|at| rename(&name, &format!("r{round}-{at}"))),
        );
        add("mkdir", {
            let name = format!("d{round}");
            race(|_| mkdir(&name, 0o700))
        });
        add("symlink", {
            let name = format!("s{round}");
            race(|_| symlink("x", &name))
        });
        add("unlink", race(|_| unlink(&format!("s{round}"))));
        add("rmdir", race(|_| rmdir(&format!("d{round}"))));
        add("rename to one", {
            for at in 0..4 {
                make(&format!("from{round}-{at}"), b"", 0o600);
            }
            let to = format!("to{round}");
            race(|at| rename(&format!("from{round}-{at}"), &to))
        });
    }
    out.note("outcomes", seen);
    let left = std::fs::read_dir(".").unwrap().count();
    out.note("names left", left);
}
