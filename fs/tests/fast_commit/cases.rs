//! Cases that a storm seldom meets.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use blockstack::backend::mem::Image;
use fs::MountOptions;
use rustix::fs::{AtFlags, CWD, FallocateFlags, Mode, OFlags, fallocate, linkat, open};

use crate::kernel::{check, run};
use crate::list::list;
use crate::replay::{Made, mounted, verify};
use crate::work::Work;

fn sync(root: &Path) {
    run("sync", &["-f", root.to_str().unwrap()]);
}

/// Makes an image by `work` and verifies our replay of it.
fn case<T>(work: impl FnOnce(&Path) -> T) {
    case_of(&["-b", "1024"], work);
}

fn case_of<T>(args: &[&str], work: impl FnOnce(&Path) -> T) {
    let Some(made) = Made::new(args, work) else {
        return;
    };
    let verified = verify(&made, false).unwrap();
    println!("{} fast commits", verified.commits);
    assert!(verified.commits > 0, "no fast commits");
}

#[test]
fn files_without_a_name_are_deleted() {
    case(|root| {
        let before = File::create(root.join("before")).unwrap();
        let within = File::create(root.join("within")).unwrap();
        let other = File::create(root.join("other")).unwrap();
        for file in [&before, &within] {
            file.write_all_at(&[7; 30_000], 0).unwrap();
        }
        // One is an orphan that a full commit has, one loses its name in a fast commit; both are
        // written to while they have none.
        std::fs::remove_file(root.join("before")).unwrap();
        sync(root);
        std::fs::remove_file(root.join("within")).unwrap();
        other.sync_all().unwrap();
        for file in [&before, &within] {
            file.write_all_at(&[8; 50_000], 20_000).unwrap();
            file.sync_all().unwrap();
        }
        other.write_all_at(&[9; 10], 0).unwrap();
        other.sync_all().unwrap();
        [before, within, other]
    });
}

#[test]
fn a_file_made_without_a_name_gets_one() {
    case(|root| {
        let keep = File::create(root.join("keep")).unwrap();
        sync(root);
        let flags = OFlags::TMPFILE | OFlags::RDWR;
        let file = File::from(open(root, flags, Mode::from_raw_mode(0o640)).unwrap());
        file.write_all_at(&[5; 9000], 0).unwrap();
        let number = format!("/proc/self/fd/{}", file.as_raw_fd());
        linkat(
            CWD,
            number,
            CWD,
            root.join("named"),
            AtFlags::SYMLINK_FOLLOW,
        )
        .unwrap();
        file.sync_all().unwrap();
        keep.write_all_at(&[1], 0).unwrap();
        keep.sync_all().unwrap();
    });
}

#[test]
fn new_directories_grow_and_go() {
    case(|root| {
        let keep = File::create(root.join("keep")).unwrap();
        std::fs::create_dir_all(root.join("old/empty")).unwrap();
        sync(root);
        let mut deep = root.join("new");
        for level in 0..6 {
            std::fs::create_dir(&deep).unwrap();
            for number in 0..30 {
                File::create(deep.join(format!("{level}-{number}"))).unwrap();
                std::fs::create_dir(deep.join(format!("d{number}"))).unwrap();
            }
            keep.write_all_at(&[level], 0).unwrap();
            keep.sync_all().unwrap();
            deep = deep.join("d3");
            std::fs::remove_dir(&deep).unwrap();
        }
        // An index of its own, made while it is replayed.
        let many = root.join("index");
        std::fs::create_dir(&many).unwrap();
        for number in 0..400 {
            File::create(many.join(format!("a-name-that-takes-room-{number}"))).unwrap();
        }
        keep.sync_all().unwrap();
        for number in (0..400).step_by(3) {
            std::fs::remove_file(many.join(format!("a-name-that-takes-room-{number}"))).unwrap();
        }
        std::fs::remove_dir(root.join("old/empty")).unwrap();
        std::fs::remove_dir(root.join("old")).unwrap();
        keep.write_all_at(&[77], 0).unwrap();
        keep.sync_all().unwrap();
    });
}

/// The map of a file grows out of the inode, and shrinks, while it is replayed.
#[test]
fn maps_grow_and_shrink() {
    case(|root| {
        let grows = File::create(root.join("grows")).unwrap();
        let shrinks = File::create(root.join("shrinks")).unwrap();
        let mixed = File::create(root.join("mixed")).unwrap();
        for at in 0..400 {
            shrinks.write_all_at(&[at as u8; 700], at * 3000).unwrap();
        }
        fallocate(&mixed, FallocateFlags::empty(), 0, 400_000).unwrap();
        sync(root);
        for at in 0..400 {
            grows.write_all_at(&[at as u8; 700], at * 3000).unwrap();
        }
        grows.sync_all().unwrap();
        for at in 0..50 {
            mixed.write_all_at(&[at as u8; 1024], at * 7168).unwrap();
        }
        mixed.sync_all().unwrap();
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        for at in 0..30 {
            fallocate(&mixed, punch, at * 9216, 2048).unwrap();
            fallocate(&grows, punch, at * 30_000, 9000).unwrap();
        }
        mixed.sync_all().unwrap();
        shrinks.set_len(5000).unwrap();
        shrinks.sync_all().unwrap();
        grows.set_len(700_001).unwrap();
        grows.sync_all().unwrap();
    });
}

/// Ranges that are added to a file without extents.
#[test]
fn block_maps_are_replayed() {
    let args = ["-b", "1024", "-O", "^extents,^64bit"];
    case_of(&args, |root| {
        let file = File::create(root.join("file")).unwrap();
        file.write_all_at(&[1; 5000], 0).unwrap();
        sync(root);
        for (at, len) in [(20_000, 3000), (900_000, 3000), (300_000, 200_000)] {
            file.write_all_at(&vec![at as u8; len], at).unwrap();
            file.sync_all().unwrap();
        }
        file.set_len(400_001).unwrap();
        file.sync_all().unwrap();
        let new = File::create(root.join("new")).unwrap();
        new.write_all_at(&[9; 300_000], 0).unwrap();
        new.sync_all().unwrap();
        std::fs::create_dir(root.join("dir")).unwrap();
        // Longer: a write in place within a tick changes nothing that a commit is made for.
        file.write_all_at(&[7; 30], 450_000).unwrap();
        file.sync_all().unwrap();
    });
}

/// The number of a deleted file is used again at once, by files and by directories.
#[test]
fn numbers_are_used_again() {
    case(|root| {
        let keep = File::create(root.join("keep")).unwrap();
        for number in 0..40 {
            let name = root.join(format!("f{number}"));
            std::fs::write(&name, vec![number; 6000]).unwrap();
            std::fs::create_dir(root.join(format!("d{number}"))).unwrap();
        }
        sync(root);
        for round in 0..4 {
            for number in 0..40 {
                let (file, dir) = (format!("f{number}"), format!("d{number}"));
                if (number + round) % 3 == 0 {
                    std::fs::remove_file(root.join(&file)).unwrap();
                    std::fs::remove_dir(root.join(&dir)).unwrap();
                    std::fs::create_dir(root.join(&dir)).unwrap();
                    let file = File::create(root.join(&file)).unwrap();
                    file.write_all_at(&[round; 3000], 0).unwrap();
                    file.sync_all().unwrap();
                }
            }
            keep.write_all_at(&[round], 0).unwrap();
            keep.sync_all().unwrap();
        }
    });
}

/// The kernel goes on with what we leave, and makes fast commits again.
#[test]
fn the_kernel_and_we_take_turns() {
    let Some(mut made) = Made::storm(10) else {
        return;
    };
    for round in 0..3 {
        let verified = verify(&made, false).unwrap();
        assert!(verified.commits > 0, "round {round}: no fast commits");
        let path = made.image.clone();
        let ours = made.scratch.path("ours");
        std::fs::copy(&ours, &path).unwrap();
        made = made
            .more(|root| {
                let dir = root.join(format!("round{round}"));
                std::fs::create_dir(&dir).unwrap();
                let mut work = Work::new(&dir, round);
                work.prepare();
                sync(root);
                work.run(40);
            })
            .unwrap();
    }
}

/// A mount that only reads finds what was synced, too.
#[test]
fn a_mount_to_read_replays() {
    let Some(made) = Made::storm(11) else { return };
    let image = made.load();
    let read_only = MountOptions {
        read_only: true,
        ..MountOptions::default()
    };
    let look = |image: &Image, options: &MountOptions| {
        mounted(image, options, |fs| list(fs).unwrap()).unwrap()
    };
    let (found, after) = look(&image, &read_only);
    let (want, _) = look(&image, &MountOptions::default());
    assert_eq!(found, want);
    // And leaves them replayed.
    let (again, after) = look(&after, &MountOptions::default());
    assert_eq!(again, want);
    let path = made.scratch.path("after");
    after.save(&path).unwrap();
    check(&path).unwrap();
}

/// Nearly everything is in use, the part reserved for root too: the blocks that the replay needs for
/// directories and maps are only just there, and next to them lies data.
#[test]
fn a_full_file_system_is_replayed() {
    case(|root| {
        let keep = File::create(root.join("keep")).unwrap();
        let filler = File::create(root.join("filler")).unwrap();
        let free = || {
            let stat = rustix::fs::statvfs(root).unwrap();
            stat.f_bfree * stat.f_frsize
        };
        // The kernel keeps some blocks for itself, which it counts as free.
        let (mut len, mut size) = (free() / 2, 0);
        while len >= 4096 {
            if fallocate(&filler, FallocateFlags::empty(), size, len).is_ok() {
                size += len;
            }
            len /= 2;
        }
        filler.set_len(size - 700_000).unwrap();
        sync(root);
        for number in 0..12 {
            let dir = root.join(format!("dir{number}"));
            std::fs::create_dir(&dir).unwrap();
            for name in 0..40 {
                File::create(dir.join(format!("a-name-of-some-length-{name}"))).unwrap();
            }
            let file = File::create(dir.join("data")).unwrap();
            for at in 0..9 {
                file.write_all_at(&[number; 1500], at * 3000).unwrap();
            }
            file.sync_all().unwrap();
        }
        keep.write_all_at(&[1; 100], 0).unwrap();
        keep.sync_all().unwrap();
        println!("{} bytes left", free());
    });
}
