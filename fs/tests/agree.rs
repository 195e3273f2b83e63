//! Our own check against `e2fsck -fn`: images damaged one field at a time, half of them with all
//! checksums made right again, and for each the question whether something is wrong.
//!
//! `FUSEFS_STACK_SEED=7` or `FUSEFS_STACK_SEED=7..900` runs these seeds, `FUSEFS_STACK_LONG=1` more
//! than usual.
#![expect(clippy::unwrap_used, reason = "a test ends with a panic")]

#[path = "hostile/base.rs"]
mod base;
#[path = "agree/oracle.rs"]
mod oracle;
#[path = "agree/sites.rs"]
mod sites;
mod storm;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use base::{Base, Role, bases, named};
use blockstack::DynDevice;
use blockstack::backend::mem::Image;
use blockstack::testing::crash::{CrashDisk, Timing};
use fs::check::{Class, Finding, MAX_FINDINGS, Report, Scratch, check};
use fs::{Fs, MountOptions};
use oracle::{Oracle, Verdict};
use sites::{Damage, Sites};
use storm::{DIR, DIRECT, FILE, ME, ROOT, Random, write};

const WORKERS: usize = 2;

/// Where the two do not agree, and why that is right.
struct Known {
    /// Begins the name of the field.
    field: &'static str,
    /// What e2fsck prints where it sees something that we do not; empty where it is the other way.
    told: &'static str,
    why: &'static str,
}

const KNOWN: &[Known] = &[
    Known {
        field: "journal.s_errno",
        told: "Bad file descriptor",
        why: "e2fsck 1.47.0 means to clear it without a word, and fails as it may not write",
    },
    Known {
        field: "superblock.s_feature_",
        told: "",
        why: "what this program does not support it refuses by the name of the feature",
    },
    Known {
        field: "superblock.s_creator_os",
        told: "critical metadata",
        why: "on the Hurd an inode has one block more, its translator",
    },
];

/// As above, where e2fsck writes before it looks: it replays the log, and mends what it meets.
const KNOWN_WITH_LOG: &[Known] = &[
    Known {
        field: "superblock.s_feature_",
        told: "",
        why: "what this program does not support it refuses by the name of the feature",
    },
    Known {
        field: "superblock.s_wtime",
        told: "",
        why: "e2fsck writes the superblock, with the time of now",
    },
    Known {
        field: "superblock.s_free_",
        told: "",
        why: "a count above all there is; e2fsck tells of it as of any wrong count",
    },
    Known {
        field: "superblock.s_flags",
        told: "Adding dirhash hint",
        why: "e2fsck does that where it may write",
    },
    Known {
        field: "superblock.s_flags",
        told: "The test_fs flag is set",
        why: "e2fsck takes it away where it may write",
    },
    Known {
        field: "superblock.s_last_orphan",
        told: "orphan",
        why: "e2fsck looks at the list only where it may write",
    },
    Known {
        field: "journal.s_maxlen",
        told: "",
        why: "e2fsck takes a log for sound that is shorter than any may be",
    },
    Known {
        field: "journal.s_first",
        told: "",
        why: "e2fsck needs it only where the log goes around its end",
    },
    Known {
        field: "group.bg_inode_table_lo",
        told: "inode",
        why: "the log holds the right one; e2fsck has written the journal's inode by the wrong one",
    },
];

fn is_known(known: &[Known], damage: &Damage, verdict: &Verdict) -> bool {
    let field = |known: &&Known| damage.field.starts_with(known.field);
    known.iter().filter(field).any(|known| {
        !known.why.is_empty()
            && if known.told.is_empty() {
                !verdict.is_told()
            } else {
                verdict.text.contains(known.told)
            }
    })
}

/// What the two make of one damaged image.
fn compare(
    known: &[Known],
    base: &Base,
    damage: &Damage,
    verdict: &Verdict,
    report: &Report,
) -> Result<(), String> {
    let ours = report.findings().iter().any(Finding::is_told_by_e2fsck);
    let is_fault = report.worst().is_some_and(|worst| worst >= Class::Preen);
    let agrees = ours == verdict.is_told() && (verdict.code == 0 || is_fault || ours);
    if agrees || is_known(known, damage, verdict) {
        return Ok(());
    }
    Err(format!(
        "{}: {damage}\ne2fsck -fn, exit code {}:\n{}our check:\n{report}",
        base.name, verdict.code, verdict.text
    ))
}

fn is_long() -> bool {
    std::env::var_os("FUSEFS_STACK_LONG").is_some_and(|value| value == "1")
}

/// A part of all.
fn wanted(part: u64) -> Range<u64> {
    let Ok(text) = std::env::var("FUSEFS_STACK_SEED") else {
        return 0..if is_long() { 40_000 } else { 2000 } / part;
    };
    match text.split_once("..") {
        Some((first, end)) => first.parse().unwrap()..end.parse().unwrap(),
        None => {
            let seed = text.parse().unwrap();
            seed..seed + 1
        }
    }
}

#[derive(Default)]
struct Totals {
    told: u64,
    quiet: u64,
    differ: Vec<String>,
    /// Findings by their name.
    kinds: BTreeMap<String, u64>,
}

impl Totals {
    fn add(&mut self, seed: u64, verdict: &Verdict, report: &Report, res: Result<(), String>) {
        let count = if verdict.is_told() {
            &mut self.told
        } else {
            &mut self.quiet
        };
        *count += 1;
        self.differ
            .extend(res.err().map(|text| format!("seed {seed}: {text}")));
        for finding in report.findings() {
            let debug = format!("{finding:?}");
            let kind = debug.split([' ', '(']).next().unwrap_or("").to_owned();
            *self.kinds.entry(kind).or_default() += 1;
        }
    }

    fn tell(&self, seeds: &Range<u64>, start: Instant) {
        println!(
            "{seeds:?}: {} told, {} quiet, {} differ, {} kinds of findings, in {:?}",
            self.told,
            self.quiet,
            self.differ.len(),
            self.kinds.len(),
            start.elapsed()
        );
        if std::env::var_os("FUSEFS_STACK_REASONS").is_some() {
            println!("{:#?}", self.kinds);
        }
        let count = seeds.end - seeds.start;
        if count >= 1000 {
            // Neither answer is the easy one.
            assert!(self.told > count / 4 && self.quiet > count / 20);
        }
        assert!(self.differ.is_empty(), "{}", self.differ.join("\n"));
    }
}

/// Damages images, `seeds` of them, and compares what the two say.
fn run(bases: &[Base], known: &[Known], seeds: &Range<u64>, judge: Judge) -> Totals {
    let bases: Vec<_> = bases.iter().map(|base| (base, Sites::of(base))).collect();
    let next = AtomicU64::new(seeds.start);
    let totals = Mutex::new(Totals::default());
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                let mut oracle = Oracle::new();
                let mut scratch = Scratch::default();
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        break;
                    }
                    let (base, sites) = &bases[seed as usize % bases.len()];
                    let mut random = Random(seed.wrapping_mul(0x1_0003));
                    let (image, damage) = sites.damage(base, &mut random);
                    let verdict = judge(&mut oracle, base, &image);
                    let report = check(&image, &mut scratch);
                    let res = compare(known, base, &damage, &verdict, &report);
                    totals.lock().unwrap().add(seed, &verdict, &report, res);
                }
            });
        }
    });
    totals.into_inner().unwrap()
}

type Judge = fn(&mut Oracle, &Base, &Image) -> Verdict;

/// Cuts the power from a mount of a sound image when changes are in the log, and nothing else waits.
fn with_log(name: &'static str, base: &Base) -> Base {
    let disk = CrashDisk::from_image(name, base.image.clone(), Timing::AtOnce);
    let dev: DynDevice = disk.clone();
    let fs = Fs::mount(dev, MountOptions::default()).unwrap();
    for number in 0..30 {
        let name = format!("late-{number}");
        let dir = fs.create(ROOT, name.as_bytes(), DIR, 0, &ME).unwrap().ino;
        let file = fs.create(dir, b"file", FILE, 0, &ME).unwrap().ino;
        write(&fs, file, 0, &vec![7; number * 500 + 1], DIRECT).unwrap();
        fs.link(file, ROOT, format!("link-{number}").as_bytes())
            .unwrap();
        if number % 5 == 0 {
            fs.sync().unwrap();
        }
    }
    fs.sync().unwrap();
    let image = disk.point().durable();
    fs.unmount().unwrap();
    Base::new(name, image)
}

#[test]
fn one_damaged_field_is_seen_by_both_or_by_neither() {
    let mut bases = bases();
    bases.retain(|base| !base.name.starts_with("log"));
    for base in &bases {
        let report = check(&base.image, &mut Scratch::default());
        assert!(report.findings().is_empty(), "{}: {report}", base.name);
    }
    let (seeds, start) = (wanted(1), Instant::now());
    let totals = run(&bases, KNOWN, &seeds, |oracle, base, image| {
        oracle.judge(base, image)
    });
    totals.tell(&seeds, start);
    if seeds.end - seeds.start >= 2000 {
        assert!(totals.kinds.len() >= 60, "{:?}", totals.kinds);
    }
}

#[test]
fn one_damaged_field_is_seen_after_the_replay_of_the_log() {
    let bases = [
        with_log("log of ext4 1k", &named("ext4 1k")),
        with_log("log of no csum", &named("no csum")),
        with_log("log of ext3", &named("ext3")),
        with_log("log of groups", &named("groups")),
    ];
    for base in &bases {
        let report = check(&base.image, &mut Scratch::default());
        let pending = report.findings().first();
        assert!(report.is_clean(), "{}: {report}", base.name);
        assert!(
            matches!(pending, Some(Finding::ReplayPending { .. })),
            "{}: {report}",
            base.name
        );
    }
    let (seeds, start) = (wanted(8), Instant::now());
    let totals = run(&bases, KNOWN_WITH_LOG, &seeds, |oracle, _, image| {
        oracle.judge_replayed(image)
    });
    totals.tell(&seeds, start);
}

/// Whatever stands in the blocks of metadata, a check ends, soon, with a report of bounded length.
#[test]
fn a_check_of_any_bytes_ends() {
    let bases = bases();
    let mut scratch = Scratch::default();
    let count: u64 = if is_long() { 60_000 } else { 2000 };
    let mut slowest = (Duration::ZERO, 0);
    for seed in 0..count {
        let base = &bases[seed as usize % bases.len()];
        let mut random = Random(seed.wrapping_mul(0x1_0007));
        let mut image = base.image.clone();
        let size = base.geo.block_size as usize;
        let mut touched = Vec::new();
        for _ in 0..=random.below(4) {
            let (block, other) = (any_block(base, &mut random), any_block(base, &mut random));
            let mut bytes = vec![0; size];
            if random.one_in(2) {
                image.read_at(other as usize * size, &mut bytes);
            } else {
                bytes.fill_with(|| random.next() as u8);
                let head = random.below(64) as usize;
                image.read_at(block as usize * size, &mut bytes[..head]);
            }
            image.write_at(block as usize * size, &bytes);
            touched.push(block);
        }
        if random.one_in(2) {
            base.seal(&mut image, &touched);
        }
        let start = Instant::now();
        let report = check(&image, &mut scratch);
        slowest = slowest.max((start.elapsed(), seed));
        assert!(report.findings().len() <= MAX_FINDINGS, "seed {seed}");
    }
    println!("the slowest of {count}: {slowest:?} (time, seed)");
    assert!(slowest.0 < Duration::from_secs(10), "{slowest:?}");
}

/// A block of metadata that is not the superblock's.
fn any_block(base: &Base, random: &mut Random) -> u64 {
    loop {
        let kind = &base.kinds[random.below(base.kinds.len() as u64) as usize];
        let (block, role) = kind[random.below(kind.len() as u64) as usize];
        if role != Role::Super {
            return block;
        }
    }
}
