//! Power cuts in a storm of operations: what e2fsck and our own mount make of what is left must be a
//! state that was there, as new as promised.
#![expect(clippy::unwrap_used, reason = "a test ends with a panic")]

mod storm;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockstack::DynDevice;
use blockstack::backend::mem::{Image, MemDisk};
use blockstack::testing::crash::{CrashDisk, CrashPoint, Timing};
use fs::ops::SetAttr;
use fs::options::DataMode;
use fs::{Fs, MountOptions};
use storm::history::{History, walk};
use storm::image::{Scratch, has_torn_superblock};
use storm::run::{Storm, noise};
use storm::{DIRECT, FILE, ME, ROOT, Random, fsync, write};

fn is_long() -> bool {
    std::env::var_os("FUSEFS_STACK_LONG").is_some_and(|value| value == "1")
}

/// Recovers with our own mount; checks what is there.
fn check_mount(
    scratch: &Scratch,
    image: Image,
    history: &History,
    at: u64,
    fsck: bool,
) -> Result<usize, String> {
    let disk = MemDisk::from_image("after", image);
    let dev: DynDevice = disk.clone();
    let fs = Fs::mount(dev, MountOptions::default()).map_err(|error| format!("mount: {error}"))?;
    let res = walk(&fs, history.model.with_sizes)
        .map_err(|error| format!("walk: {error}"))
        .and_then(|found| history.check(&fs, &found, at));
    fs.unmount().map_err(|error| format!("unmount: {error}"))?;
    drop(fs);
    let op = res?;
    if fsck {
        scratch
            .check(&disk.image())
            .map_err(|error| format!("after unmount: {error}"))?;
    }
    Ok(op)
}

/// What our own check makes of every point of a storm, as the next mount would find it.
fn check_points(about: &str, points: &[CrashPoint], seed: u64) {
    let mut memory = fs::check::Scratch::default();
    let mut random = Random(seed ^ 0xc4ec);
    for (number, point) in points.iter().enumerate() {
        let image = match random.below(3) {
            0 => point.durable(),
            _ => point.image(random.next()),
        };
        if has_torn_superblock(&image) {
            continue;
        }
        let report = fs::check::check(&image, &mut memory);
        if report.faults().next().is_some() {
            let kept = Scratch::keep(&image, &format!("power-{seed}-point-{number}"));
            let ops = point.ops;
            let kept = kept.display();
            panic!("{about}, cut at {ops} of the disk, our check:\n{report}image: {kept}");
        }
    }
}

struct Plan<'a> {
    args: &'a [&'a str],
    /// Cuts in a run without `FUSEFS_STACK_LONG`, and with it.
    cuts: [usize; 2],
    seed: u64,
    data: DataMode,
}

fn storm(scratch: &Scratch, made: &Image, data: DataMode, seed: u64, cuts: usize) -> usize {
    let mut random = Random(seed ^ 0xfeed);
    let timing = if random.one_in(2) {
        Timing::Shuffled { seed }
    } else {
        Timing::AtOnce
    };
    let (page_cache, noisy) = (random.one_in(2), random.one_in(2));
    let disk = CrashDisk::from_image("crash", made.clone(), timing);
    let dev: DynDevice = disk.clone();
    let options = MountOptions {
        commit_secs: 1,
        data: Some(data),
        ..MountOptions::default()
    };
    let fs = Fs::mount(dev, options).unwrap();
    let storm = Storm::new(&fs, &disk, seed, page_cache);
    disk.arm_every(1 + random.below(12));
    let stop = AtomicBool::new(!noisy);
    let history = std::thread::scope(|scope| {
        let noise = scope.spawn(|| noise(&fs, seed, &stop));
        let history = storm.run(400);
        stop.store(true, Ordering::Release);
        noise.join().unwrap();
        history
    });
    let about = format!("seed {seed} {timing:?}, page cache {page_cache}, noise {noisy}");
    // The live file system is as the model.
    let found = walk(&fs, false).unwrap();
    let end = Arc::new(history.model.snapshot());
    if !page_cache {
        let found = walk(&fs, true).unwrap();
        assert!(
            end.lines == found.lines,
            "{about}: the live names are wrong"
        );
    }
    drop(found);
    fs.unmount().unwrap();
    drop(fs);
    disk.arm_every(0);
    if let Err(error) = scratch.check(&disk.live()) {
        let kept = Scratch::keep(&disk.live(), &format!("power-{seed}"));
        panic!("{about}, unmounted: {error}\nimage: {}", kept.display());
    }
    let mut points = disk.take_points();
    check_points(&about, &points, seed);
    for chosen in 0..cuts.min(points.len()) {
        let other = chosen + random.below((points.len() - chosen) as u64) as usize;
        points.swap(chosen, other);
    }
    points.truncate(cuts);
    for (number, point) in points.iter().enumerate() {
        let mut image = point.image(random.next());
        while has_torn_superblock(&image) {
            image = point.image(random.next());
        }
        let fail = |error: String| -> ! {
            let kept = Scratch::keep(&image, &format!("power-{seed}-{number}"));
            panic!(
                "{about}, cut at {} of the disk: {error}\nimage: {}",
                point.ops,
                kept.display()
            )
        };
        let fsck = number % 3 == 0;
        match check_mount(scratch, image.clone(), &history, point.ops, fsck) {
            Ok(_) => {}
            Err(error) => fail(format!("our mount: {error}")),
        }
        if number % 3 != 2 {
            match scratch.replay(&image) {
                Ok(None) => {}
                Ok(Some(after)) => {
                    let checked = check_mount(scratch, after, &history, point.ops, false);
                    if let Err(error) = checked {
                        fail(format!("after e2fsck: {error}"));
                    }
                }
                Err(error) => fail(error),
            }
        }
    }
    points.len()
}

fn power_cuts(plan: &Plan<'_>) {
    storm::log_to_stderr();
    let scratch = Scratch::new();
    let Some(made) = scratch.try_mkfs(plan.args, "24M") else {
        println!("SKIPPED: this mke2fs cannot make {:?}", plan.args);
        return;
    };
    let want = std::env::var("POWER_CUTS")
        .ok()
        .and_then(|text| text.parse().ok());
    let want = want.unwrap_or(plan.cuts[usize::from(is_long())]);
    if let Ok(seed) = std::env::var("POWER_SEED") {
        storm(&scratch, &made, plan.data, seed.parse().unwrap(), 40);
        return;
    }
    let (mut done, mut seed) = (0, plan.seed);
    while done < want {
        done += storm(&scratch, &made, plan.data, seed, 20);
        seed += 1;
    }
    println!(
        "{:?}: {done} power cuts in {} storms",
        plan.args,
        seed - plan.seed
    );
}

#[test]
fn power_cuts_on_ext4() {
    power_cuts(&Plan {
        args: &["-t", "ext4", "-b", "4096", "-J", "size=4"],
        cuts: [120, 1000],
        seed: 1000,
        data: DataMode::Ordered,
    });
}

#[test]
fn power_cuts_on_ext4_with_blocks_of_1k() {
    power_cuts(&Plan {
        args: &["-t", "ext4", "-b", "1024", "-J", "size=1"],
        cuts: [80, 500],
        seed: 2000,
        data: DataMode::Ordered,
    });
}

#[test]
fn power_cuts_on_ext3() {
    power_cuts(&Plan {
        args: &["-t", "ext3", "-b", "1024", "-J", "size=1"],
        cuts: [80, 500],
        seed: 3000,
        data: DataMode::Ordered,
    });
}

#[test]
fn power_cuts_without_checksums() {
    power_cuts(&Plan {
        args: &[
            "-t",
            "ext4",
            "-O",
            "^metadata_csum,uninit_bg",
            "-J",
            "size=4",
        ],
        cuts: [80, 500],
        seed: 4000,
        data: DataMode::Ordered,
    });
}

#[test]
fn power_cuts_with_an_orphan_file() {
    let features = "metadata_csum,orphan_file,metadata_csum_seed";
    power_cuts(&Plan {
        args: &["-t", "ext4", "-O", features, "-J", "size=4"],
        cuts: [80, 500],
        seed: 5000,
        data: DataMode::Ordered,
    });
}

#[test]
fn power_cuts_with_data_in_the_journal() {
    power_cuts(&Plan {
        args: &["-t", "ext4", "-b", "1024", "-J", "size=4"],
        cuts: [80, 500],
        seed: 6000,
        data: DataMode::Journal,
    });
}

/// What `data=journal` is for: a write in place is there as a whole or not at all.
#[test]
fn a_write_through_the_journal_is_never_half_there() {
    const LEN: usize = 64 * 1024;
    let scratch = Scratch::new();
    let (disk, fs) = mounted_with(&scratch, DataMode::Journal);
    let file = fs.create(ROOT, b"file", FILE, 0, &ME).unwrap();
    write(&fs, file.ino, 0, &[1; LEN], DIRECT).unwrap();
    fsync(&fs, file.ino, false).unwrap();
    disk.arm_every(1);
    for byte in 2..6 {
        write(&fs, file.ino, 0, &[byte; LEN], DIRECT).unwrap();
        fsync(&fs, file.ino, false).unwrap();
    }
    disk.arm_every(0);
    let mut random = Random(7);
    let mut seen = [0; 6];
    for point in disk.take_points() {
        let dev: DynDevice = MemDisk::from_image("after", point.image(random.next()));
        let after = Fs::mount(dev, MountOptions::default()).unwrap();
        let content = storm::read(&after, file.ino, 0, LEN as u32).unwrap();
        let whole = content.iter().all(|byte| *byte == content[0]);
        assert!(whole && content.len() == LEN, "cut at {}", point.ops);
        seen[usize::from(content[0])] += 1;
    }
    assert!(seen[1..5].iter().all(|&count| count > 0), "{seen:?}");
}

/// A mount that power is cut from.
fn mounted(scratch: &Scratch) -> (Arc<CrashDisk>, Arc<Fs>) {
    mounted_with(scratch, DataMode::Ordered)
}

fn mounted_with(scratch: &Scratch, data: DataMode) -> (Arc<CrashDisk>, Arc<Fs>) {
    let made = scratch
        .try_mkfs(&["-t", "ext4", "-J", "size=4"], "24M")
        .unwrap();
    let disk = CrashDisk::from_image("crash", made, Timing::AtOnce);
    let dev: DynDevice = disk.clone();
    let options = MountOptions {
        data: Some(data),
        ..MountOptions::default()
    };
    (disk, Fs::mount(dev, options).unwrap())
}

fn after_power_cut(scratch: &Scratch, disk: &CrashDisk) -> Arc<Fs> {
    let image = disk.point().durable();
    scratch.replay(&image).unwrap();
    let dev: DynDevice = MemDisk::from_image("after", image);
    Fs::mount(dev, MountOptions::default()).unwrap()
}

/// Lost: a new file, though `fsync` had returned.
#[test]
fn fsync_waits_for_changes_from_before_an_inode_left_the_memory() {
    let scratch = Scratch::new();
    let (disk, fs) = mounted(&scratch);
    let file = fs.create(ROOT, b"file", FILE, 0, &ME).unwrap();
    write(&fs, file.ino, 0, b"content", DIRECT).unwrap();
    fs.forget(file.ino, 1);
    fs.lookup(ROOT, b"file").unwrap().unwrap();
    fsync(&fs, file.ino, false).unwrap();
    let after = after_power_cut(&scratch, &disk);
    assert_eq!(after.lookup(ROOT, b"file").unwrap().unwrap().size, 7);
}

/// Lost: a new, empty file, though `fdatasync` had returned.
#[test]
fn fdatasync_of_a_new_file_waits_for_its_name() {
    let scratch = Scratch::new();
    let (disk, fs) = mounted(&scratch);
    let file = fs.create(ROOT, b"file", FILE, 0, &ME).unwrap();
    fsync(&fs, file.ino, true).unwrap();
    let after = after_power_cut(&scratch, &disk);
    assert!(after.lookup(ROOT, b"file").unwrap().is_some());
}

/// Lost: all that was committed behind a transaction without a change, until the log was emptied.
#[test]
fn a_transaction_without_a_change_does_not_end_the_replay() {
    let scratch = Scratch::new();
    let (disk, fs) = mounted(&scratch);
    fs.create(ROOT, b"before", FILE, 0, &ME).unwrap();
    fs.sync().unwrap();
    fs.journal.start(1).unwrap().stop().unwrap();
    fs.sync().unwrap();
    fs.create(ROOT, b"behind", FILE, 0, &ME).unwrap();
    fs.sync().unwrap();
    let after = after_power_cut(&scratch, &disk);
    assert!(after.lookup(ROOT, b"behind").unwrap().is_some());
}

/// Lost: inode and blocks of the file, for good.
#[test]
fn a_file_that_is_truncated_after_it_was_unlinked_is_deleted_at_the_last_close() {
    let scratch = Scratch::new();
    let (disk, fs) = mounted(&scratch);
    let free = fs.statfs().ffree;
    let file = fs.create(ROOT, b"file", FILE, 0, &ME).unwrap();
    write(&fs, file.ino, 0, &[7; 50_000], DIRECT).unwrap();
    fs.unlink(ROOT, b"file", &ME).unwrap();
    let size = Some(5000);
    fs.setattr(
        file.ino,
        &SetAttr {
            size,
            ..SetAttr::default()
        },
        &ME,
    )
    .unwrap();
    fs.forget(file.ino, 1);
    fs.unmount().unwrap();
    assert_eq!(fs.statfs().ffree, free);
    drop(fs);
    scratch.check(&disk.live()).unwrap();
}

/// Lost: the space of every deleted or truncated file, and all later mounts, where groups are small
/// and the log is short: one step of the removal asked for more of it than there is.
#[test]
fn files_are_deleted_where_groups_are_small_and_the_log_is_short() {
    let scratch = Scratch::new();
    for features in ["^flex_bg", "^flex_bg,^extents,^64bit"] {
        let args = ["-b", "1024", "-g", "256", "-O", features, "-J", "size=1"];
        let made = scratch.try_mkfs(&[&["-t", "ext4"], &args[..]].concat(), "24M");
        let disk = CrashDisk::from_image("small", made.unwrap(), Timing::AtOnce);
        let dev: DynDevice = disk.clone();
        let fs = Fs::mount(dev, MountOptions::default()).unwrap();
        // What belongs to the directory stays.
        fs.create(ROOT, b"other", FILE, 0, &ME).unwrap();
        let free = fs.statfs();
        let file = fs.create(ROOT, b"file", FILE, 0, &ME).unwrap();
        for at in 0..20 {
            write(&fs, file.ino, at << 18, &[7; 200_000], DIRECT).unwrap();
        }
        let size = Some(1_000_000);
        let shorter = SetAttr {
            size,
            ..SetAttr::default()
        };
        fs.setattr(file.ino, &shorter, &ME).unwrap();
        fs.unlink(ROOT, b"file", &ME).unwrap();
        fs.forget(file.ino, 1);
        fs.evict_all();
        fs.sync().unwrap();
        let after = fs.statfs();
        assert_eq!((after.ffree, after.bfree), (free.ffree, free.bfree));
        fs.unmount().unwrap();
        drop(fs);
        scratch.check(&disk.live()).unwrap();
    }
}
