//! Which calls change which times, and which times can be set.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

use rustix::fs::{AtFlags, FallocateFlags, OFlags, Stat, Timespec, UTIME_NOW, UTIME_OMIT};
use rustix::time::{ClockId, clock_gettime};

use crate::calls::{
    MAKE, NOFOLLOW, chmod, chown, file, give, link, make, mkdir, mkfifo, omit, open, rename,
    rename_with, rmdir, setxattr, symlink, time, truncate, unlink, utimens,
};
use crate::case::{Case, Grain, Needs, OWNER, Out, Res, USERS, word};

pub const CASES: &[Case] = &[
    Case {
        name: "what_changes_times",
        needs: Needs::Ext4,
        run: what_changes,
    },
    Case {
        name: "who_sets_times",
        needs: Needs::Root,
        run: who_sets,
    },
    Case {
        name: "every_time",
        needs: Needs::Ext4,
        run: every_time,
    },
    Case {
        name: OUT_OF_RANGE,
        needs: Needs::Ext4,
        run: out_of_range,
    },
    Case {
        name: "times_of_open_files",
        needs: Needs::Ext4,
        run: of_open_files,
    },
    Case {
        name: "times_of_new_files",
        needs: Needs::Ext4,
        run: of_new_files,
    },
];

const OLD: Timespec = Timespec {
    tv_sec: 1_000_000_000,
    tv_nsec: 123_456_789,
};
const NONE: AtFlags = AtFlags::empty();

/// Returns when the clock from which the kernel takes times of files is later than now.
fn tick() {
    let clock = |id| {
        let time = clock_gettime(id);
        (time.tv_sec, time.tv_nsec)
    };
    let start = clock(ClockId::Realtime);
    for _ in 0..10_000 {
        if clock(ClockId::RealtimeCoarse) > start {
            return;
        }
        std::thread::sleep(std::time::Duration::from_micros(500));
    }
    panic!("the clock stands");
}

fn times(stat: &Stat) -> [(i64, u64); 3] {
    [
        (stat.st_atime, stat.st_atime_nsec),
        (stat.st_mtime, stat.st_mtime_nsec),
        (stat.st_ctime, stat.st_ctime_nsec),
    ]
}

/// `a`, `m` and `c` for what is not the same. A change of ctime within a second is not seen where
/// seconds are kept.
fn changes(before: &Stat, after: &Stat, grain: Grain) -> String {
    let mut changed = String::new();
    for (at, name) in ["a", "m", "c"].into_iter().enumerate() {
        let seen = grain == Grain::Nanosecond || at < 2;
        if seen && times(before)[at] != times(after)[at] {
            changed += name;
        }
    }
    changed
}

type Call = (&'static str, fn() -> Res);

const CALLS: &[Call] = &[
    ("nothing", || Ok(())),
    ("stat", || rustix::fs::stat("f").map(drop)),
    ("access", || {
        rustix::fs::access("f", rustix::fs::Access::READ_OK)
    }),
    ("open and close", || open("f", OFlags::RDWR, 0).map(drop)),
    ("read", || {
        file("f", OFlags::RDONLY).read_at(&mut [0; 4], 0).unwrap();
        Ok(())
    }),
    ("read twice", || {
        let file = file("f", OFlags::RDONLY);
        file.read_at(&mut [0; 4], 0).unwrap();
        file.read_at(&mut [0; 4], 0).unwrap();
        Ok(())
    }),
    ("read at the end", || {
        let file = file("f", OFlags::RDONLY);
        file.read_at(&mut [0; 4], 1 << 20).unwrap();
        Ok(())
    }),
    ("read, O_NOATIME", || {
        let file = file("f", OFlags::RDONLY | OFlags::NOATIME);
        file.read_at(&mut [0; 4], 0).unwrap();
        Ok(())
    }),
    ("write", || {
        file("f", OFlags::WRONLY).write_at(b"x", 0).unwrap();
        Ok(())
    }),
    ("write nothing", || {
        file("f", OFlags::WRONLY).write_at(b"", 0).unwrap();
        Ok(())
    }),
    ("append", || {
        let mut file = file("f", OFlags::WRONLY | OFlags::APPEND);
        file.write_all(b"x").unwrap();
        Ok(())
    }),
    ("O_TRUNC", || {
        open("f", OFlags::WRONLY | OFlags::TRUNC, 0).map(drop)
    }),
    ("O_TRUNC of an empty one", || {
        open("empty", OFlags::WRONLY | OFlags::TRUNC, 0).map(drop)
    }),
    ("O_CREAT of one that is there", || {
        open("f", MAKE, 0o600).map(drop)
    }),
    ("truncate", || truncate("f", 3)),
    ("truncate up", || truncate("f", 30_000)),
    ("truncate to the same", || truncate("f", 7)),
    ("ftruncate", || {
        rustix::fs::ftruncate(file("f", OFlags::WRONLY), 3)
    }),
    ("ftruncate to the same", || {
        rustix::fs::ftruncate(file("f", OFlags::WRONLY), 7)
    }),
    ("ftruncate of an empty one", || {
        rustix::fs::ftruncate(file("empty", OFlags::WRONLY), 0)
    }),
    ("fallocate", || {
        let file = file("f", OFlags::WRONLY);
        rustix::fs::fallocate(file, FallocateFlags::empty(), 0, 20_000)
    }),
    ("fallocate, size kept", || {
        let file = file("f", OFlags::WRONLY);
        rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, 0, 20_000)
    }),
    ("punch", || {
        let flags = FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE;
        rustix::fs::fallocate(file("f", OFlags::WRONLY), flags, 0, 4)
    }),
    ("copy_file_range", || {
        let (from, to) = (file("f", OFlags::RDONLY), file("empty", OFlags::WRONLY));
        rustix::fs::copy_file_range(from, None, to, None, 7).map(drop)
    }),
    ("chmod", || chmod("f", 0o600)),
    ("chmod to the same", || chmod("f", 0o644)),
    ("chown", || chown("f", Some(7), Some(8), NONE)),
    ("chown to nobody", || chown("f", None, None, NONE)),
    ("lchown of the link", || {
        chown("link", Some(7), None, NOFOLLOW)
    }),
    ("utimensat", || utimens("f", time(1, 2), time(3, 4), NONE)),
    ("utimensat, atime only", || {
        utimens("f", time(1, 2), omit(), NONE)
    }),
    ("utimensat, neither", || utimens("f", omit(), omit(), NONE)),
    ("setxattr", || setxattr("f", "user.x", b"value")),
    ("removexattr", || rustix::fs::removexattr("f", "user.there")),
    ("removexattr of none", || {
        rustix::fs::removexattr("f", "user.none")
    }),
    ("getxattr", || {
        crate::calls::getxattr("f", "user.there").map(drop)
    }),
    ("link", || link("f", "new")),
    ("link that fails", || link("f", "empty")),
    ("link into", || link("f", "d/new")),
    ("unlink", || unlink("f")),
    ("unlink one of two", || unlink("d/second")),
    ("unlink that fails", || unlink("d")),
    ("rename", || rename("f", "new")),
    ("rename into", || rename("f", "d/new")),
    ("rename over", || rename("f", "empty")),
    ("rename over its other name", || rename("two", "d/second")),
    ("rename of a directory", || rename("e", "new")),
    ("rename of a directory into", || rename("e", "d/new")),
    ("rename over a directory", || rename("e", "d/sub")),
    ("exchange", || {
        rename_with("f", "d/in", rustix::fs::RenameFlags::EXCHANGE)
    }),
    ("rename that fails", || rename("f", "d")),
    ("create", || open("new", MAKE, 0o600).map(drop)),
    ("create below", || open("d/new", MAKE, 0o600).map(drop)),
    ("mkdir", || mkdir("new", 0o755)),
    ("mkdir below", || mkdir("d/new", 0o755)),
    ("mkdir that fails", || mkdir("f", 0o755)),
    ("rmdir", || rmdir("e")),
    ("rmdir below", || rmdir("d/sub")),
    ("rmdir that fails", || rmdir("d")),
    ("symlink", || symlink("x", "new")),
    ("mkfifo", || mkfifo("new", 0o644)),
    ("readlink", || {
        rustix::fs::readlink("link", Vec::new()).map(drop)
    }),
    ("stat through a link", || rustix::fs::stat("link").map(drop)),
    ("list", || {
        std::fs::read_dir("d").unwrap().for_each(drop);
        Ok(())
    }),
    ("lookup of none", || rustix::fs::stat("d/none").map(drop)),
    ("sync", || rustix::fs::fsync(file("f", OFlags::RDWR))),
];

fn what_changes(out: &mut Out) {
    const LOOK: [&str; 10] = [
        ".", "f", "empty", "d", "d/in", "d/second", "d/sub", "e", "link", "two",
    ];
    for (at, (name, call)) in CALLS.iter().enumerate() {
        let dir = at.to_string();
        mkdir(&dir, 0o755).unwrap();
        rustix::process::chdir(dir.as_str()).unwrap();
        make("f", b"content", 0o644);
        setxattr("f", "user.there", b"value").unwrap();
        make("empty", b"", 0o644);
        make("two", b"two names", 0o644);
        for dir in ["d", "d/sub", "e"] {
            mkdir(dir, 0o755).unwrap();
        }
        make("d/in", b"inside", 0o644);
        link("two", "d/second").unwrap();
        symlink("f", "link").unwrap();
        for path in LOOK {
            utimens(path, OLD, OLD, NOFOLLOW).unwrap();
        }
        // Held, so that what loses its name can still be asked.
        let open: Vec<_> = LOOK
            .into_iter()
            .map(|path| open(path, OFlags::PATH | OFlags::NOFOLLOW, 0).unwrap())
            .collect();
        let stat = |fd| rustix::fs::statat(fd, "", AtFlags::EMPTY_PATH).unwrap();
        let before: Vec<_> = open.iter().map(stat).collect();
        tick();
        let result = call();
        let after: Vec<_> = open.iter().map(stat).collect();
        let mut text = word(&result);
        for ((path, before), after) in LOOK.iter().zip(&before).zip(&after) {
            let changed = changes(before, after, out.grain());
            if !changed.is_empty() {
                text += &format!(" {path}:{changed}");
            }
        }
        out.text(name, text);
        rustix::process::chdir("..").unwrap();
    }
}

fn who_sets(out: &mut Out) {
    let now = time(0, UTIME_NOW);
    let kinds = [
        ("both", time(10, 1), time(20, 2)),
        ("now", now, now),
        ("atime now", now, omit()),
        ("mtime now", omit(), now),
        ("atime", time(10, 1), omit()),
        ("mtime", omit(), time(20, 2)),
        ("atime now, mtime", now, time(20, 2)),
        ("neither", omit(), omit()),
        ("invalid", time(1, 1_000_000_000), time(1, 1)),
        ("negative", time(1, -1), time(1, 1)),
        ("omit with seconds", time(99, UTIME_OMIT), time(1, 1)),
    ];
    make("f", b"x", 0o644);
    mkdir("d", 0o755).unwrap();
    symlink("f", "l").unwrap();
    let everybody = USERS.map(|(who, user)| (who, Some(user)));
    let everybody: Vec<_> = everybody.into_iter().chain([("root", None)]).collect();
    for path in ["f", "d", "l"] {
        give(path, OWNER);
        for mode in [0o600, 0o666, 0o444, 0] {
            if path != "l" {
                chmod(path, mode).unwrap();
            }
            for (who, user) in &everybody {
                for (what, access, modification) in kinds {
                    utimens(path, OLD, OLD, NOFOLLOW).unwrap();
                    let before = rustix::fs::lstat(path).unwrap();
                    let set = || utimens(path, access, modification, NOFOLLOW);
                    let result = match user {
                        Some(user) => user.does(set),
                        None => set(),
                    };
                    let after = rustix::fs::lstat(path).unwrap();
                    let text = word(&result) + " " + &changes(&before, &after, Grain::Second);
                    let exact = times(&after)[..2]
                        .iter()
                        .filter(|time| [(10, 1), (20, 2)].contains(*time))
                        .count();
                    let label = format!("{path} {mode:o}, {what} by {who}");
                    out.text(label, format!("{text} exact {exact}"));
                }
            }
        }
    }
}

const NANOSECONDS: [i64; 5] = [0, 1, 999, 123_456_789, 999_999_999];
/// The first and the last second of ext4, with large inodes and with small ones.
const FIRST: i64 = -(1 << 31);
const LAST: i64 = (1 << 34) - (1 << 31) - 1;
const LAST_SMALL: i64 = (1 << 31) - 1;

fn every_time(out: &mut Out) {
    let last = match out.grain() {
        Grain::Nanosecond => LAST,
        Grain::Second => LAST_SMALL,
    };
    let seconds = [
        FIRST + 1,
        -1_000_000_000,
        -1,
        0,
        1,
        (1 << 31) - 2,
        (1 << 31) - 1,
        1 << 31,
        (1 << 32) - 1,
        1 << 32,
        (1 << 33) + 5,
        LAST - 1,
    ];
    let seconds = seconds.into_iter().filter(|&sec| sec < last);
    set_each(out, seconds);
}

/// The directory of [`out_of_range`].
pub const OUT_OF_RANGE: &str = "times_out_of_range";

fn out_of_range(out: &mut Out) {
    // `i64::MIN` is left out: fuser 0.18 cannot read it, and ends a thread of the server.
    let seconds = [
        -(1 << 40),
        FIRST - 1,
        FIRST,
        LAST_SMALL,
        LAST_SMALL + 1,
        LAST,
        LAST + 1,
        (1 << 34) + 7,
        1 << 40,
    ];
    set_each(out, seconds.into_iter());
}

fn set_each(out: &mut Out, seconds: impl Iterator<Item = i64>) {
    for sec in seconds {
        for nsec in NANOSECONDS {
            let path = format!("f{sec}.{nsec}");
            make(&path, b"", 0o644);
            let set = utimens(&path, time(sec, nsec), time(sec / 2, nsec), NONE);
            out.call(format!("set {sec}.{nsec}"), set);
            let stat = rustix::fs::stat(path.as_str()).unwrap();
            // One that was refused has the time of now.
            if set.is_ok() {
                out.note(format!("{sec}.{nsec}"), &times(&stat)[..2]);
            }
        }
    }
}

fn of_open_files(out: &mut Out) {
    let grain = out.grain();
    let handle = file("f", MAKE);
    let mut step = |what: &str, run: &dyn Fn(&File)| {
        utimens("f", OLD, OLD, NONE).unwrap();
        tick();
        let before = rustix::fs::fstat(&handle).unwrap();
        run(&handle);
        let by_file = rustix::fs::fstat(&handle).unwrap();
        let by_path = rustix::fs::stat("f").unwrap();
        out.note(
            what,
            (
                changes(&before, &by_file, grain),
                times(&by_file) == times(&by_path),
            ),
        );
    };
    step("write", &|file| file.write_all_at(b"x", 0).unwrap());
    step("write and sync", &|file| {
        file.write_all_at(b"x", 0).unwrap();
        file.sync_all().unwrap();
    });
    step("write, then times set", &|file| {
        file.write_all_at(b"x", 0).unwrap();
        utimens("f", OLD, OLD, NONE).unwrap();
    });
    step("write, then times set, then sync", &|file| {
        file.write_all_at(b"x", 5000).unwrap();
        utimens("f", OLD, OLD, NONE).unwrap();
        file.sync_all().unwrap();
    });
    step("futimens", &|file| {
        let times = rustix::fs::Timestamps {
            last_access: time(1, 2),
            last_modification: time(3, 4),
        };
        rustix::fs::futimens(file, &times).unwrap();
    });
    step("truncate by path", &|_| truncate("f", 3).unwrap());
    step("chmod by path", &|_| chmod("f", 0o600).unwrap());
    drop(handle);
    let before = rustix::fs::stat("f").unwrap();
    tick();
    rustix::fs::syncfs(open(".", OFlags::RDONLY, 0).unwrap()).unwrap();
    let after = rustix::fs::stat("f").unwrap();
    out.note("sync later", changes(&before, &after, grain));
}

/// New things have the time of now, the same in all fields, and so has their directory.
fn of_new_files(out: &mut Out) {
    type Make = (&'static str, fn(&str) -> Res);
    let makes: [Make; 5] = [
        ("file", |path| open(path, MAKE, 0o644).map(drop)),
        ("dir", |path| mkdir(path, 0o755)),
        ("fifo", |path| mkfifo(path, 0o644)),
        ("link", |path| symlink("x", path)),
        ("long link", |path| symlink(&"x".repeat(100), path)),
    ];
    for (name, run) in makes {
        let dir = format!("in-{}", name.replace(' ', "-"));
        mkdir(&dir, 0o755).unwrap();
        let start = clock_gettime(ClockId::RealtimeCoarse).tv_sec;
        let path = format!("{dir}/new");
        run(&path).unwrap();
        let stat = rustix::fs::lstat(path.as_str()).unwrap();
        let [access, modification, change] = times(&stat);
        let now = |time: (i64, u64)| (start..start + 60).contains(&time.0);
        out.note(
            name,
            (now(change), access == modification, modification == change),
        );
        let dir = rustix::fs::stat(dir.as_str()).unwrap();
        let [_, modification, change] = times(&dir);
        out.note(
            format!("directory of {name}"),
            (now(change), modification == change),
        );
    }
}
