//! flock, POSIX locks and locks of open file descriptions.
//!
//! A lock of an open file description meets those of the same process, and a thread whose table of
//! files is its own is to POSIX locks a process of its own; so no processes are needed.

use std::fs::File;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

use crate::calls::{MAKE, file, make, rename, unlink};
use crate::case::{Case, Needs, Out, Res, word};

pub const CASES: &[Case] = &[
    Case {
        name: "flock_matrix",
        needs: Needs::Nothing,
        run: flock_matrix,
    },
    Case {
        name: "flock_life",
        needs: Needs::Nothing,
        run: flock_life,
    },
    Case {
        name: "ranges",
        needs: Needs::Nothing,
        run: ranges,
    },
    Case {
        name: "posix_life",
        needs: Needs::Nothing,
        run: posix_life,
    },
    Case {
        name: "waiting",
        needs: Needs::Nothing,
        run: waiting,
    },
    Case {
        name: "deadlock",
        needs: Needs::Nothing,
        run: deadlock,
    },
];

const KINDS: [(&str, i32); 3] = [
    ("read", libc::F_RDLCK),
    ("write", libc::F_WRLCK),
    ("unlock", libc::F_UNLCK),
];

fn range(kind: i32, start: i64, len: i64) -> libc::flock {
    libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: len,
        l_pid: 0,
    }
}

fn answer(result: nix::Result<i32>) -> Res {
    match result {
        Ok(_) => Ok(()),
        Err(errno) => Err(Errno::from_raw_os_error(errno as i32)),
    }
}

fn posix(file: &File, kind: i32, start: i64, len: i64) -> Res {
    answer(fcntl(file, FcntlArg::F_SETLK(&range(kind, start, len))))
}

fn posix_wait(file: &File, kind: i32, start: i64, len: i64) -> Res {
    answer(fcntl(file, FcntlArg::F_SETLKW(&range(kind, start, len))))
}

fn ofd(file: &File, kind: i32, start: i64, len: i64) -> Res {
    answer(fcntl(file, FcntlArg::F_OFD_SETLK(&range(kind, start, len))))
}

/// The first lock in the way of a write lock of an open file description.
fn in_the_way(file: &File, start: i64, len: i64) -> String {
    let mut found = range(libc::F_WRLCK, start, len);
    match answer(fcntl(file, FcntlArg::F_OFD_GETLK(&mut found))) {
        Ok(()) => format!(
            "type {} from {} length {} of another {}",
            found.l_type,
            found.l_start,
            found.l_len,
            found.l_pid > 0
        ),
        error => word(&error),
    }
}

/// Runs something in what POSIX locks take for another process.
fn process<T: Send>(run: impl FnOnce() -> T + Send) -> T {
    let act = || {
        unshare(CloneFlags::CLONE_FILES).unwrap();
        run()
    };
    std::thread::scope(|scope| scope.spawn(act).join().unwrap())
}

fn flock_matrix(out: &mut Out) {
    use FlockOperation::{
        LockExclusive, LockShared, NonBlockingLockExclusive, NonBlockingLockShared,
        NonBlockingUnlock, Unlock,
    };
    make("f", b"", 0o644);
    let first = [
        ("none", None),
        ("sh", Some(LockShared)),
        ("ex", Some(LockExclusive)),
    ];
    let then = [
        ("sh", NonBlockingLockShared),
        ("ex", NonBlockingLockExclusive),
        ("un", NonBlockingUnlock),
    ];
    for flags in [OFlags::RDONLY, OFlags::WRONLY, OFlags::RDWR] {
        for (first_name, first) in first {
            for (then_name, then) in then {
                let (one, other) = (file("f", flags), file("f", flags));
                if let Some(first) = first {
                    flock(&one, first).unwrap();
                }
                let label = format!("{first_name} then {then_name}, {flags:?}");
                out.call(&label, flock(&other, then));
                out.call(format!("{label}, the first again"), flock(&one, then));
                flock(&one, Unlock).unwrap();
                out.call(
                    format!("{label}, when free"),
                    flock(&other, NonBlockingLockExclusive),
                );
                // POSIX locks do not meet these.
                if flags == OFlags::RDWR {
                    out.call(format!("{label}, POSIX"), posix(&one, libc::F_WRLCK, 0, 0));
                }
            }
        }
    }
    let dir = file(".", OFlags::RDONLY);
    let other = file(".", OFlags::RDONLY);
    out.call("a directory", flock(&dir, NonBlockingLockExclusive));
    out.call("it again", flock(&other, NonBlockingLockShared));
    let path = file("f", OFlags::PATH);
    out.call("a path", flock(&path, NonBlockingLockShared));
}

fn flock_life(out: &mut Out) {
    let exclusive = FlockOperation::NonBlockingLockExclusive;
    make("f", b"", 0o644);
    let one = file("f", OFlags::RDWR);
    let other = file("f", OFlags::RDWR);
    flock(&one, exclusive).unwrap();
    let copy = one.try_clone().unwrap();
    out.call("a copy has it too", flock(&copy, exclusive));
    drop(one);
    out.call("one of two closed", flock(&other, exclusive));
    drop(copy);
    out.call("both closed", flock(&other, exclusive));
    rename("f", "g").unwrap();
    let renamed = file("g", OFlags::RDWR);
    out.call("renamed", flock(&renamed, exclusive));
    unlink("g").unwrap();
    make("g", b"", 0o644);
    out.call(
        "another of the name",
        flock(file("g", OFlags::RDWR), exclusive),
    );
    out.call("down", flock(&other, FlockOperation::LockShared));
    out.call(
        "shared",
        flock(&renamed, FlockOperation::NonBlockingLockShared),
    );
    out.call("up", flock(&other, exclusive));
}

fn ranges(out: &mut Out) {
    make("f", b"0123456789", 0o644);
    let spans = [
        (0, 0),
        (0, 10),
        (5, 10),
        (9, 1),
        (10, 0),
        (10, -5),
        (100, 1),
    ];
    for (first_name, first) in KINDS {
        for (then_name, then) in KINDS {
            for (start, len) in spans {
                for (other_start, other_len) in spans {
                    let (one, other) = (file("f", OFlags::RDWR), file("f", OFlags::RDWR));
                    let label = format!(
                        "{first_name} {start}+{len} then {then_name} {other_start}+{other_len}"
                    );
                    // Closing any file of a process gives up its POSIX locks.
                    let set = ofd(&one, first, start, len);
                    let meets = ofd(&other, then, other_start, other_len);
                    let posix = posix(&other, then, other_start, other_len);
                    let words = [word(&set), word(&meets), word(&posix)];
                    out.note(label, (words, in_the_way(&other, 0, 0)));
                }
            }
        }
    }
    // Locks of one owner join and part.
    let (one, other) = (file("f", OFlags::RDWR), file("f", OFlags::RDWR));
    for (kind, start, len) in [
        (libc::F_WRLCK, 0, 10),
        (libc::F_WRLCK, 20, 10),
        (libc::F_WRLCK, 10, 10),
        (libc::F_UNLCK, 5, 10),
        (libc::F_RDLCK, 2, 20),
        (libc::F_UNLCK, 0, 3),
        (libc::F_UNLCK, 0, 0),
    ] {
        out.call(
            format!("{kind} {start}+{len}"),
            posix(&one, kind, start, len),
        );
        let seen: Vec<_> = [0, 5, 12, 25]
            .into_iter()
            .map(|at| in_the_way(&other, at, 0))
            .collect();
        out.note(format!("after {kind} {start}+{len}"), seen);
    }
    // What cannot be.
    out.call("before the start", posix(&one, libc::F_WRLCK, -1, 5));
    out.call("to before it", posix(&one, libc::F_WRLCK, 2, -5));
    out.call(
        "past the end of numbers",
        posix(&one, libc::F_WRLCK, i64::MAX, 5),
    );
    out.call("no kind", posix(&one, 77, 0, 5));
    let (r, w) = (file("f", OFlags::RDONLY), file("f", OFlags::WRONLY));
    for (name, kind) in KINDS {
        out.call(format!("{name}, open to read"), posix(&r, kind, 0, 1));
        out.call(format!("{name}, open to write"), posix(&w, kind, 0, 1));
    }
}

fn posix_life(out: &mut Out) {
    make("f", b"", 0o644);
    let (one, probe) = (file("f", OFlags::RDWR), file("f", OFlags::RDWR));
    posix(&one, libc::F_WRLCK, 0, 10).unwrap();
    out.text("taken", in_the_way(&probe, 0, 0));
    out.call("once more", posix(&one, libc::F_WRLCK, 0, 10));
    out.call(
        "another process",
        process(|| posix(&one, libc::F_RDLCK, 5, 1)),
    );
    out.call(
        "another process, beside it",
        process(|| {
            let taken = posix(&one, libc::F_RDLCK, 10, 1);
            posix(&one, libc::F_UNLCK, 10, 1).and(taken)
        }),
    );
    out.text("when that has ended", in_the_way(&probe, 10, 0));
    drop(file("f", OFlags::RDONLY));
    out.text("any descriptor closed", in_the_way(&probe, 0, 0));
    posix(&one, libc::F_RDLCK, 0, 10).unwrap();
    out.call(
        "another reads",
        process(|| {
            let taken = posix(&one, libc::F_RDLCK, 0, 10);
            posix(&one, libc::F_UNLCK, 0, 10).and(taken)
        }),
    );
    out.call(
        "another writes",
        process(|| posix(&one, libc::F_WRLCK, 0, 10)),
    );
    // A lock does not hinder anybody who does not ask.
    ofd(&probe, libc::F_UNLCK, 0, 0).unwrap();
    std::fs::write("f", b"written").unwrap();
    out.note("written", std::fs::read("f").ok());
}

fn waiting(out: &mut Out) {
    make("f", b"", 0o644);
    type Take = fn(&File) -> Res;
    let kinds: [(&str, Take, Take); 3] = [
        (
            "flock",
            |file| flock(file, FlockOperation::LockExclusive),
            |file| flock(file, FlockOperation::Unlock),
        ),
        (
            "description",
            |file| {
                answer(fcntl(
                    file,
                    FcntlArg::F_OFD_SETLKW(&range(libc::F_WRLCK, 0, 0)),
                ))
            },
            |file| ofd(file, libc::F_UNLCK, 0, 0),
        ),
        (
            "posix",
            |file| posix_wait(file, libc::F_WRLCK, 0, 0),
            |file| posix(file, libc::F_UNLCK, 0, 0),
        ),
    ];
    for (name, take, release) in kinds {
        // Who waits gets it after it was released, and counts that are not atomic stay right.
        let one = file("f", OFlags::RDWR);
        take(&one).unwrap();
        let (released, start) = (AtomicBool::new(false), Barrier::new(2));
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                unshare(CloneFlags::CLONE_FILES).unwrap();
                let other = file("f", OFlags::RDWR);
                start.wait();
                let result = take(&other);
                (word(&result), released.load(Ordering::SeqCst))
            });
            start.wait();
            for _ in 0..100 {
                std::thread::yield_now();
            }
            released.store(true, Ordering::SeqCst);
            release(&one).unwrap();
            out.note(name, waiter.join().unwrap());
        });
        make("count", b"0", 0o644);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    unshare(CloneFlags::CLONE_FILES).unwrap();
                    let lock = file("f", OFlags::RDWR);
                    for _ in 0..50 {
                        take(&lock).unwrap();
                        let count = std::fs::read_to_string("count").unwrap();
                        let next = count.parse::<u32>().unwrap() + 1;
                        std::fs::write("count", next.to_string()).unwrap();
                        release(&lock).unwrap();
                    }
                });
            }
        });
        out.note(
            format!("{name}, counted"),
            std::fs::read_to_string("count").ok(),
        );
    }
}

/// Of two that wait for each other, the one that came last is told.
fn deadlock(out: &mut Out) {
    drop(file("f", MAKE));
    let start = Barrier::new(2);
    let run = |own: i64, wanted: i64| {
        unshare(CloneFlags::CLONE_FILES).unwrap();
        let file = file("f", OFlags::RDWR);
        posix(&file, libc::F_WRLCK, own, 1).unwrap();
        start.wait();
        let result = posix_wait(&file, libc::F_WRLCK, wanted, 1);
        posix(&file, libc::F_UNLCK, 0, 0).unwrap();
        word(&result)
    };
    let mut words = std::thread::scope(|scope| {
        let one = scope.spawn(|| run(0, 1));
        let other = scope.spawn(|| run(1, 0));
        [one.join().unwrap(), other.join().unwrap()]
    });
    words.sort();
    out.note("the two", words);
}
