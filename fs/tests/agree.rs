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

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use base::{Base, bases};
use fs::check::{Class, Finding, Report, Scratch, check};
use oracle::{Oracle, Verdict};
use sites::{Damage, Sites};
use storm::Random;

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

fn is_known(damage: &Damage, verdict: &Verdict) -> bool {
    let field = |known: &&Known| damage.field.starts_with(known.field);
    KNOWN.iter().filter(field).any(|known| {
        !known.why.is_empty()
            && if known.told.is_empty() {
                !verdict.is_told()
            } else {
                verdict.text.contains(known.told)
            }
    })
}

/// What the two make of one damaged image.
fn compare(base: &Base, damage: &Damage, verdict: &Verdict, report: &Report) -> Result<(), String> {
    let ours = report.findings().iter().any(Finding::is_told_by_e2fsck);
    let is_fault = report.worst().is_some_and(|worst| worst >= Class::Preen);
    let agrees = ours == verdict.is_told() && (verdict.code == 0 || is_fault || ours);
    if agrees || is_known(damage, verdict) {
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

fn wanted() -> Range<u64> {
    let Ok(text) = std::env::var("FUSEFS_STACK_SEED") else {
        return 0..if is_long() { 40_000 } else { 2000 };
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
}

#[test]
fn one_damaged_field_is_seen_by_both_or_by_neither() {
    let bases = bases();
    let bases: Vec<_> = bases
        .iter()
        .map(|base| (base, Sites::of(base)))
        .filter(|(base, _)| !base.name.starts_with("log"))
        .collect();
    for (base, _) in &bases {
        let report = check(&base.image, &mut Scratch::default());
        assert!(report.findings().is_empty(), "{}: {report}", base.name);
    }
    let seeds = wanted();
    let next = AtomicU64::new(seeds.start);
    let totals = Mutex::new(Totals::default());
    let start = Instant::now();
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
                    let verdict = oracle.judge(base, &image);
                    let report = check(&image, &mut scratch);
                    let res = compare(base, &damage, &verdict, &report);
                    let mut totals = totals.lock().unwrap();
                    if verdict.is_told() {
                        totals.told += 1;
                    } else {
                        totals.quiet += 1;
                    }
                    totals
                        .differ
                        .extend(res.err().map(|text| format!("seed {seed}: {text}")));
                }
            });
        }
    });
    let totals = totals.into_inner().unwrap();
    println!(
        "{seeds:?}: {} told, {} quiet, {} differ, in {:?}",
        totals.told,
        totals.quiet,
        totals.differ.len(),
        start.elapsed()
    );
    let count = seeds.end - seeds.start;
    if count >= 1000 {
        // Neither answer is the easy one.
        assert!(totals.told > count / 4 && totals.quiet > count / 20);
    }
    assert!(totals.differ.is_empty(), "{}", totals.differ.join("\n"));
}
