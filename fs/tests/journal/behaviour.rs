//! What a journal does for those who use it.

use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use blockstack::backend::mem::MemDisk;
use blockstack::testing::faulty::{FaultyDisk, Kinds, Rule};
use blockstack::{BioFlags, BlockDevice, DynDevice, PagePool, Sector, write_wait};
use bufio::Validator;
use fs::journal::{Class, CommitHooks, FreedRange, JournalError, JournalExtent, Log};
use fs::{FsError, MountOptions};

use crate::support::{
    Random, Rig, Scratch, TailSum, block_size, fill, fs_blocks, is_filled, journal_extents, run,
    set_needs_recovery,
};

const EXT4: &[&str] = &["-t", "ext4", "-b", "4096", "-J", "size=4"];

struct Bench {
    scratch: Scratch,
    image: Vec<u8>,
    extents: Vec<JournalExtent>,
    disk: Arc<MemDisk>,
}

impl Bench {
    fn new(args: &[&str]) -> Self {
        let scratch = Scratch::new();
        let path = scratch.mkfs("image", 16, args);
        let mut image = std::fs::read(&path).unwrap();
        let has_journal = image[1024 + 0x5C] & 4 != 0;
        let extents = if has_journal {
            journal_extents(&path)
        } else {
            Vec::new()
        };
        set_needs_recovery(&mut image);
        let disk = MemDisk::from_bytes("mem", image.clone());
        Self {
            scratch,
            image,
            extents,
            disk,
        }
    }

    fn superblock(&self) -> &[u8] {
        &self.image[1024..2048]
    }

    fn dev(&self) -> DynDevice {
        self.disk.clone()
    }

    fn open(&self, opts: MountOptions) -> Rig {
        Rig::open(&self.dev(), self.superblock(), &self.extents, opts).unwrap()
    }

    fn log(&self) -> Log {
        let size = block_size(&self.image);
        Log::open(self.dev(), size, fs_blocks(&self.image), &self.extents).unwrap()
    }

    /// The `n`th of the blocks at the end of the image.
    fn block(&self, n: u64) -> u64 {
        fs_blocks(&self.image) - 400 + n
    }

    fn on_disk(&self, block: u64) -> Vec<u8> {
        let size = block_size(&self.image) as usize;
        self.disk.snapshot()[block as usize * size..][..size].to_vec()
    }
}

fn sum() -> Arc<dyn Validator> {
    Arc::new(TailSum)
}

fn put(rig: &Rig, block: u64, stamp: u64) -> u32 {
    let handle = rig.journal.start(4).unwrap();
    let buffer = handle.create(block, &sum()).unwrap();
    fill(&mut handle.write(&buffer).unwrap(), stamp, block);
    let tid = handle.tid();
    handle.stop().unwrap();
    tid
}

#[derive(Default)]
struct Hooks {
    freed: Mutex<Vec<FreedRange>>,
    aborted: AtomicBool,
}

impl CommitHooks for Hooks {
    fn committed(&self, _: u32, freed: &[FreedRange]) {
        self.freed.lock().unwrap().extend(freed);
    }

    fn aborted(&self) {
        self.aborted.store(true, Ordering::Release);
    }
}

#[test]
fn nothing_goes_home_before_the_commit_and_all_at_shutdown() {
    let bench = Bench::new(EXT4);
    let rig = bench.open(MountOptions::default());
    let block = bench.block(0);
    let before = bench.on_disk(block);
    let tid = put(&rig, block, 7);
    rig.core.bufs.write_dirty().unwrap();
    assert_eq!(bench.on_disk(block), before);
    rig.journal.commit_wait(tid).unwrap();
    rig.journal.shutdown().unwrap();
    assert!(is_filled(&bench.on_disk(block), 7, block));
    assert!(!bench.log().needs_recovery());
    assert_eq!(rig.journal.start(1).err(), Some(FsError::Aborted));
}

#[test]
fn debugfs_and_e2fsck_read_our_log() {
    for args in [
        EXT4,
        &[
            "-t",
            "ext4",
            "-b",
            "2048",
            "-J",
            "size=2",
            "-O",
            "^metadata_csum,64bit",
        ],
        &["-t", "ext3", "-b", "1024", "-J", "size=1"],
    ] {
        let bench = Bench::new(args);
        let rig = bench.open(MountOptions::default());
        for n in 0..300 {
            put(&rig, bench.block(n), n + 1);
        }
        rig.journal.commit_all().unwrap();
        let handle = rig.journal.start(4).unwrap();
        handle.forget(bench.block(5)).unwrap();
        handle.free_after_commit(bench.block(5), 1);
        handle.stop().unwrap();
        put(&rig, bench.block(6), 1000);
        rig.journal.commit_all().unwrap();
        // The freed block holds data now, which replay must leave alone.
        let size = block_size(&bench.image) as usize;
        let buf = PagePool::shared().alloc_zeroed(size).unwrap();
        let sector = Sector::new(bench.block(5) * size as u64 / 512);
        drop(write_wait(&bench.dev(), sector, buf, BioFlags::empty()).unwrap());

        let path = bench.scratch.path("live");
        std::fs::write(&path, bench.disk.snapshot()).unwrap();
        let path = path.to_str().unwrap();
        let dump = run("debugfs", &["-R", "logdump -a", path]);
        assert!(dump.contains("Journal starts at block"), "{dump}");
        assert!(
            dump.contains(&format!("FS block {} ", bench.block(299))),
            "{dump}"
        );
        assert!(
            dump.contains(&format!("Revoke FS block {}", bench.block(5))),
            "{dump}"
        );
        assert!(dump.contains("commit block"), "{dump}");
        assert!(!dump.to_lowercase().contains("checksum"), "{dump}");

        let out = Command::new("e2fsck").args(["-fy", path]).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).to_string();
        assert!(
            out.status.code().unwrap() <= 1 && text.contains("recovering journal"),
            "{text}"
        );
        let image = std::fs::read(path).unwrap();
        for n in 0..300 {
            let block = bench.block(n);
            let stamp = if n == 6 { 1000 } else { n + 1 };
            let content = &image[block as usize * size..][..size];
            assert_eq!(is_filled(content, stamp, block), n != 5, "block {n}");
        }
    }
}

#[test]
fn the_kernel_replays_our_log() {
    let bench = Bench::new(EXT4);
    let rig = bench.open(MountOptions::default());
    for n in 0..300 {
        put(&rig, bench.block(n), n + 1);
    }
    rig.journal.commit_all().unwrap();
    let (path, mount) = (bench.scratch.path("live"), bench.scratch.path("mnt"));
    std::fs::write(&path, bench.disk.snapshot()).unwrap();
    std::fs::create_dir(&mount).unwrap();
    let mounted = Command::new("mount")
        .args(["-o", "loop"])
        .args([&path, &mount])
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: cannot mount through a loop device (needs root)");
        return;
    }
    run("umount", &[mount.to_str().unwrap()]);
    let image = std::fs::read(&path).unwrap();
    for n in 0..300 {
        let block = bench.block(n);
        assert!(
            is_filled(&image[block as usize * 4096..][..4096], n + 1, block),
            "block {n}"
        );
    }
    run("e2fsck", &["-fn", path.to_str().unwrap()]);
}

#[test]
fn freed_blocks_come_back_only_after_the_commit() {
    let bench = Bench::new(EXT4);
    for rig in [
        bench.open(MountOptions::default()),
        Rig::bare(&bench.dev(), bench.superblock(), MountOptions::default()),
    ] {
        let hooks = Arc::new(Hooks::default());
        rig.journal.set_commit_hooks(hooks.clone());
        put(&rig, bench.block(3), 1);
        rig.journal.commit_all().unwrap();
        let handle = rig.journal.start(2).unwrap();
        handle.forget(bench.block(3)).unwrap();
        handle.free_after_commit(bench.block(3), 1);
        let tid = handle.tid();
        handle.stop().unwrap();
        assert!(hooks.freed.lock().unwrap().is_empty());
        rig.journal.commit_wait(tid).unwrap();
        let freed = [FreedRange {
            start: bench.block(3),
            len: 1,
        }];
        assert_eq!(*hooks.freed.lock().unwrap(), freed);
        assert!(rig.core.bufs.get(bench.block(3)).is_none());
        rig.journal.shutdown().unwrap();
    }
}

#[test]
fn without_a_journal_commits_write_in_place() {
    let bench = Bench::new(&["-t", "ext2", "-b", "4096"]);
    let rig = Rig::bare(&bench.dev(), bench.superblock(), MountOptions::default());
    let handle = rig.journal.start(4).unwrap();
    let buffer = handle.create(bench.block(0), &sum()).unwrap();
    fill(
        &mut handle.write_class(&buffer, Class::Bitmaps).unwrap(),
        9,
        bench.block(0),
    );
    let tid = handle.tid();
    handle.stop().unwrap();
    rig.journal.commit_wait(tid).unwrap();
    assert!(is_filled(&bench.on_disk(bench.block(0)), 9, bench.block(0)));
    // The next transaction joins it again.
    let handle = rig.journal.start(4).unwrap();
    fill(&mut handle.write(&buffer).unwrap(), 10, bench.block(0));
    handle.stop().unwrap();
    rig.journal.commit_all().unwrap();
    assert!(is_filled(
        &bench.on_disk(bench.block(0)),
        10,
        bench.block(0)
    ));
    rig.journal.shutdown().unwrap();
}

#[test]
fn a_change_by_the_next_transaction_does_not_reach_the_log() {
    for args in [EXT4, &["-t", "ext2", "-b", "4096"]] {
        let bench = Bench::new(args);
        let rig = if bench.extents.is_empty() {
            Rig::bare(&bench.dev(), bench.superblock(), MountOptions::default())
        } else {
            bench.open(MountOptions::default())
        };
        let (low, high, freed) = (bench.block(1), bench.block(2), bench.block(3));
        put(&rig, low, 1);
        put(&rig, freed, 1);
        let tid = put(&rig, high, 1);
        let low_buffer = rig.core.bufs.get(low).unwrap();
        let high_buffer = rig.core.bufs.get(high).unwrap();
        std::thread::scope(|scope| {
            // The commit copies in order of blocks, and hangs at the first one.
            let reader = low_buffer.data();
            let waiter = scope.spawn(|| rig.journal.commit_wait(tid));
            let handle = loop {
                let handle = rig.journal.start(4).unwrap();
                if handle.tid() != tid {
                    break handle;
                }
                drop(handle);
                std::thread::yield_now();
            };
            fill(&mut handle.write(&high_buffer).unwrap(), 2, high);
            handle.forget(freed).unwrap();
            // The cache must not write the new content either.
            rig.core.bufs.write_dirty().unwrap();
            drop(reader);
            waiter.join().unwrap().unwrap();
            drop(handle);
        });
        assert!(
            rig.core.bufs.get(freed).is_some(),
            "freed, but not yet committed so"
        );
        drop(rig);
        if !bench.extents.is_empty() {
            assert_eq!(bench.log().recover().unwrap().transactions, 1);
        }
        for block in [low, high, freed] {
            assert!(is_filled(&bench.on_disk(block), 1, block));
        }
    }
}

#[test]
fn transactions_commit_by_age() {
    let bench = Bench::new(EXT4);
    let opts = MountOptions {
        commit_secs: 1,
        ..MountOptions::default()
    };
    let rig = bench.open(opts);
    let hooks = Arc::new(Hooks::default());
    rig.journal.set_commit_hooks(hooks.clone());
    let handle = rig.journal.start(1).unwrap();
    handle.free_after_commit(1, 1);
    handle.stop().unwrap();
    let start = Instant::now();
    while hooks.freed.lock().unwrap().is_empty() {
        assert!(start.elapsed() < Duration::from_secs(10), "no commit");
        std::thread::yield_now();
    }
    assert!(start.elapsed() > Duration::from_millis(800));
}

#[test]
fn credits_bound_a_transaction() {
    let bench = Bench::new(EXT4);
    let rig = bench.open(MountOptions::default());
    let max = rig.journal.max_credits();
    assert_eq!(rig.journal.start(max + 1).err(), Some(FsError::NoSpace));
    let mut handle = rig.journal.start(max).unwrap();
    assert!(handle.has_credits(max) && !handle.has_credits(max + 1));
    assert!(!handle.extend(1).unwrap());
    let tid = handle.tid();
    put_with(&handle, bench.block(1), 3);
    assert!(!handle.has_credits(max));
    // The rest of the credits comes back, so the next handle shares the transaction.
    handle.restart(max - 1).unwrap();
    assert_eq!(handle.tid(), tid);
    assert!(!handle.extend(1).unwrap());
    // Too large for what is left: the transaction commits first.
    put_with(&handle, bench.block(2), 3);
    handle.restart(max - 1).unwrap();
    assert_ne!(handle.tid(), tid);
    handle.stop().unwrap();
    rig.journal.shutdown().unwrap();
}

fn put_with(handle: &fs::Handle, block: u64, stamp: u64) {
    let buffer = handle.create(block, &sum()).unwrap();
    fill(&mut handle.write(&buffer).unwrap(), stamp, block);
}

#[test]
fn sync_mounts_commit_each_handle() {
    let bench = Bench::new(EXT4);
    let rig = bench.open(MountOptions {
        sync: true,
        ..MountOptions::default()
    });
    put(&rig, bench.block(0), 5);
    drop(rig);
    assert_eq!(bench.log().recover().unwrap().transactions, 1);
    assert!(is_filled(&bench.on_disk(bench.block(0)), 5, bench.block(0)));
}

#[test]
fn a_failed_log_write_aborts() {
    let bench = Bench::new(EXT4);
    let (faulty, faults) = FaultyDisk::new(bench.dev());
    let dev: DynDevice = faulty;
    let rig = Rig::open(
        &dev,
        bench.superblock(),
        &bench.extents,
        MountOptions::default(),
    )
    .unwrap();
    let hooks = Arc::new(Hooks::default());
    rig.journal.set_commit_hooks(hooks.clone());
    put(&rig, bench.block(0), 1);
    rig.journal.commit_all().unwrap();
    let before = bench.on_disk(bench.block(1));
    let tid = put(&rig, bench.block(1), 1);
    let handle = rig.journal.start(1).unwrap();
    handle.free_after_commit(77, 1);
    handle.stop().unwrap();
    faults.add(Rule::nth(1).of(Kinds::WRITE));
    assert_eq!(rig.journal.commit_wait(tid), Err(FsError::Aborted));
    assert!(rig.journal.is_aborted() && rig.core.is_read_only());
    assert!(hooks.aborted.load(Ordering::Acquire));
    assert!(
        hooks.freed.lock().unwrap().is_empty(),
        "a block freed by what never committed"
    );
    assert_eq!(rig.journal.start(1).err(), Some(FsError::Aborted));
    assert_eq!(rig.journal.shutdown(), Err(FsError::Aborted));
    drop(rig);
    assert_eq!(bench.on_disk(bench.block(1)), before);
    // What had committed is replayed, and the error stands in the superblock of the journal.
    let mut log = bench.log();
    assert_eq!(log.errno(), -libc::EIO);
    assert_eq!(log.recover().unwrap().transactions, 1);
    assert!(is_filled(&bench.on_disk(bench.block(0)), 1, bench.block(0)));
}

#[test]
fn a_log_that_is_not_empty_is_not_taken_into_use() {
    let bench = Bench::new(EXT4);
    let rig = bench.open(MountOptions::default());
    put(&rig, bench.block(0), 1);
    rig.journal.commit_all().unwrap();
    let core = rig.core.clone();
    drop(rig);
    let refused = fs::Journal::open(core, bench.log()).err();
    assert_eq!(refused, Some(JournalError::NeedsRecovery));
}

#[test]
fn threads_share_commits_and_lose_nothing() {
    for args in [EXT4, &["-t", "ext3", "-b", "1024", "-J", "size=1"]] {
        let bench = Bench::new(args);
        let rig = bench.open(MountOptions::default());
        let shared: Vec<u64> = (0..8).map(|n| bench.block(n)).collect();
        for &block in &shared {
            put(&rig, block, 0);
        }
        let total = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let (rig, bench, shared, total) = (&rig, &bench, &shared, &total);
                scope.spawn(move || {
                    let mut random = Random(thread);
                    let own: Vec<u64> =
                        (0..60).map(|n| bench.block(20 + thread * 60 + n)).collect();
                    for round in 1..=2000u64 {
                        let handle = rig.journal.start(8).unwrap();
                        // A counter in a shared block: an update lost would be missing.
                        let block = shared[random.below(8) as usize];
                        let buffer = rig.core.bufs.read(block, &sum()).unwrap();
                        let mut data = handle.write(&buffer).unwrap();
                        let at = 100 + 8 * thread as usize;
                        let count = u64::from_le_bytes(data[at..at + 8].try_into().unwrap());
                        data[at..at + 8].copy_from_slice(&(count + 1).to_le_bytes());
                        drop(data);
                        total.fetch_add(1, Ordering::Relaxed);
                        for _ in 0..3 {
                            let block = own[random.below(60) as usize];
                            if round <= 60 || random.below(20) == 0 {
                                put_with(&handle, block, round);
                            } else if let Some(buffer) = rig.core.bufs.get(block) {
                                fill(&mut handle.write(&buffer).unwrap(), round, block);
                            }
                        }
                        let tid = handle.tid();
                        handle.stop().unwrap();
                        if random.below(50) == 0 {
                            rig.journal.commit_wait(tid).unwrap();
                        }
                    }
                });
            }
        });
        rig.journal.shutdown().unwrap();
        let mut found = 0;
        for &block in &shared {
            let data = bench.on_disk(block);
            TailSum.check(block, &data).unwrap();
            for thread in 0..4 {
                let at = 100 + 8 * thread;
                // fill(0) leaves zeros there.
                found += u64::from_le_bytes(data[at..at + 8].try_into().unwrap());
            }
        }
        assert_eq!(found, total.load(Ordering::Relaxed));
        assert!(!bench.log().needs_recovery());
    }
}

#[test]
fn a_damaged_log_never_panics_hangs_or_writes_outside() {
    for args in [EXT4, &["-t", "ext3", "-b", "1024", "-J", "size=1"]] {
        let bench = Bench::new(args);
        let rig = bench.open(MountOptions::default());
        for n in 0..200 {
            put(&rig, bench.block(n), n + 1);
            if n % 20 == 0 {
                rig.journal.commit_all().unwrap();
            }
            if n % 30 == 7 {
                let handle = rig.journal.start(1).unwrap();
                handle.forget(bench.block(n)).unwrap();
                handle.stop().unwrap();
            }
        }
        rig.journal.commit_all().unwrap();
        drop(rig);
        let image = bench.disk.snapshot();
        let size = block_size(&image) as u64;
        let mut random = Random(9);
        let (mut fine, mut refused) = (0, 0);
        for _ in 0..400 {
            let mut bad = image.clone();
            for _ in 0..=random.below(3) {
                let log_block = random.below(280);
                let within = if random.below(2) == 0 {
                    random.below(64)
                } else {
                    random.below(size)
                };
                let at = (bench.extents[0].pblk + log_block) * size + within;
                bad[at as usize] = random.next() as u8;
            }
            let dev: DynDevice = MemDisk::from_bytes("bad", bad);
            let log = Log::open(dev, size as u32, fs_blocks(&image), &bench.extents);
            match log.and_then(|mut log| log.recover()) {
                Ok(_) => fine += 1,
                Err(_) => refused += 1,
            }
        }
        println!("{args:?}: {fine} replayed, {refused} refused");
        assert!(fine > 0 && refused > 0);
    }
}

#[test]
#[ignore = "a measurement: run in a release build with --nocapture"]
fn cost_of_a_handle() {
    let bench = Bench::new(EXT4);
    let rig = bench.open(MountOptions::default());
    put(&rig, bench.block(0), 1);
    let buffer = rig.core.bufs.get(bench.block(0)).unwrap();
    let n = 1_000_000u32;
    let start = Instant::now();
    for _ in 0..n {
        rig.journal.start(8).unwrap().stop().unwrap();
    }
    println!("start + stop: {:?}", start.elapsed() / n);
    let handle = rig.journal.start(8).unwrap();
    let start = Instant::now();
    for _ in 0..n {
        drop(handle.write(&buffer).unwrap());
    }
    println!("write of a joined buffer: {:?}", start.elapsed() / n);
    handle.stop().unwrap();
    println!("device: {:?}", bench.disk.stats().snapshot());
}
