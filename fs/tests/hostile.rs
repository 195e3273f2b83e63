//! Damaged images, mounted in process: whatever stands in them, every operation ends, with an
//! answer or an error.
//!
//! `FUSEFS_STACK_SEED=7` or `FUSEFS_STACK_SEED=7..900` runs these seeds, `FUSEFS_STACK_LONG=1` more
//! than usual, `FUSEFS_STACK_REASONS=1` prints what was refused, and with `FUSEFS_STACK_HOLD=1` a
//! hang stays for an hour, for a debugger.
#![expect(clippy::unwrap_used, reason = "a test ends with a panic")]
#![expect(unsafe_code, reason = "an allocator that counts")]

#[path = "hostile/base.rs"]
mod base;
#[path = "hostile/damage.rs"]
mod damage;
#[path = "hostile/exercise.rs"]
mod exercise;
#[path = "hostile/finds.rs"]
mod finds;
mod storm;

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, Once};
use std::time::{Duration, Instant};

use base::{Base, bases};
use damage::damage;
use exercise::{Outcome, exercise};
use fs::check::{Scratch, check};
use storm::Random;

struct Counting;

/// Bytes that are allocated now, and the most there were.
static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: passes everything on to the system's allocator, unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let before = LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        PEAK.fetch_max(before + layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise about `layout` is the system's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: `ptr` came from `alloc` above, so from the system, with this layout.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes in use at a time at most; the sound images and a few mounts take a tenth of it.
const MOST_BYTES: usize = 512 << 20;
/// How long a seed may take.
const MOST_TIME: Duration = Duration::from_secs(60);
const WORKERS: usize = 2;

/// The seed each worker is at, plus one; 0 between seeds.
static AT: [AtomicU64; WORKERS] = [const { AtomicU64::new(0) }; WORKERS];
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn seeds_at() -> Vec<u64> {
    let at = AT.iter().map(|at| at.load(Ordering::SeqCst));
    at.filter(|&at| at != 0).map(|at| at - 1).collect()
}

/// Keeps panics of all threads, and ends the process where a seed takes too long or too much.
fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let thread = std::thread::current();
            let name = thread.name().unwrap_or("?").to_owned();
            let what = format!("seeds {:?}, thread {name}: {info}", seeds_at());
            PANICS.lock().unwrap().push(what);
            before(info);
        }));
        std::thread::spawn(|| {
            let mut since = [(0, 0); WORKERS];
            let tick = Duration::from_millis(20);
            loop {
                std::thread::sleep(tick);
                for (since, at) in since.iter_mut().zip(&AT) {
                    let at = at.load(Ordering::SeqCst);
                    *since = if at == since.0 {
                        (at, since.1 + 1)
                    } else {
                        (at, 0)
                    };
                    if at != 0 && tick * since.1 > MOST_TIME {
                        eprintln!("seed {} hangs", at - 1);
                        if std::env::var_os("FUSEFS_STACK_HOLD").is_some() {
                            std::thread::sleep(Duration::from_secs(3600));
                        }
                        std::process::abort();
                    }
                }
                let peak = PEAK.load(Ordering::Relaxed);
                if peak > MOST_BYTES {
                    eprintln!("seeds {:?} take {peak} bytes", seeds_at());
                    std::process::abort();
                }
            }
        });
    });
}

fn try_seed(bases: &[Base], seed: u64) -> Outcome {
    let base = &bases[seed as usize % bases.len()];
    let mut random = Random(seed.wrapping_mul(0x1_0001));
    let image = damage(base, &mut random);
    let report = check(&image, &mut Scratch::default());
    let outcome = exercise(&format!("s{seed}"), image, random.next());
    if report.faults().next().is_none() {
        agree(&format!("seed {seed}, {}: {report}", base.name), &outcome);
    }
    outcome
}

/// Where our check finds nothing, nothing else may, and it stays so.
fn agree(about: &str, outcome: &Outcome) {
    assert!(outcome.refused.is_none(), "{about}: {:?}", outcome.refused);
    assert!(!outcome.has_damage(), "{about}: {:?}", outcome.errors);
    // Without a journal, what lost its name while somebody knew it stays, for e2fsck to free.
    let after = outcome.after.as_ref();
    if let Some(after) = after.filter(|after| storm::image::has_journal(after)) {
        let report = check(after, &mut Scratch::default());
        assert!(report.is_clean(), "{about}, afterwards: {report}");
    }
}

#[derive(Default)]
struct Totals {
    mounted: u64,
    refused: u64,
    damaged: u64,
    done: u64,
    /// The longest time, and its seed.
    slowest: (Duration, u64),
    reasons: BTreeMap<String, u64>,
}

fn run(bases: &[Base], seeds: Range<u64>) -> Totals {
    let totals = Mutex::new(Totals::default());
    let next = AtomicU64::new(seeds.start);
    let failed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for at in &AT {
            let (totals, next, failed, end) = (&totals, &next, &failed, seeds.end);
            scope.spawn(move || {
                loop {
                    let seed = next.fetch_add(1, Ordering::SeqCst);
                    if seed >= end {
                        break;
                    }
                    if seed % 10_000 == 0 && seed > 0 {
                        println!("at seed {seed}");
                    }
                    at.store(seed + 1, Ordering::SeqCst);
                    let start = Instant::now();
                    let res = catch_unwind(AssertUnwindSafe(|| try_seed(bases, seed)));
                    at.store(0, Ordering::SeqCst);
                    match res {
                        Ok(outcome) => totals.lock().unwrap().add(outcome, (start.elapsed(), seed)),
                        Err(_panic) => failed.store(true, Ordering::SeqCst),
                    }
                }
            });
        }
    });
    let panics = std::mem::take(&mut *PANICS.lock().unwrap());
    assert!(
        panics.is_empty() && !failed.into_inner(),
        "{} panics:\n{}",
        panics.len(),
        panics.join("\n")
    );
    totals.into_inner().unwrap()
}

impl Totals {
    fn add(&mut self, outcome: Outcome, took: (Duration, u64)) {
        self.slowest = self.slowest.max(took);
        self.damaged += u64::from(outcome.has_damage());
        self.done += outcome.done;
        match outcome.refused {
            Some(_) => self.refused += 1,
            None => self.mounted += 1,
        }
        for (reason, count) in outcome.errors {
            *self.reasons.entry(reason).or_default() += count;
        }
    }
}

fn is_long() -> bool {
    std::env::var_os("FUSEFS_STACK_LONG").is_some_and(|value| value == "1")
}

fn wanted() -> Range<u64> {
    let Ok(text) = std::env::var("FUSEFS_STACK_SEED") else {
        return 0..if is_long() { 100_000 } else { 2000 };
    };
    match text.split_once("..") {
        Some((first, end)) => first.parse().unwrap()..end.parse().unwrap(),
        None => {
            let seed = text.parse().unwrap();
            seed..seed + 1
        }
    }
}

/// The whole of it: no panic, no hang, no memory without bounds.
#[test]
fn damaged_images_end_in_answers_and_errors() {
    storm::log_to_stderr();
    let bases = bases();
    watch();
    for base in &bases {
        let sound = exercise(base.name, base.image.clone(), 7);
        let lost = sound.refused.is_some() || sound.has_damage();
        assert!(!lost && sound.done > 300, "{}: {sound:?}", base.name);
    }
    let seeds = wanted();
    let start = Instant::now();
    let totals = run(&bases, seeds.clone());
    println!(
        "{seeds:?} on {} images in {:?}: {} mounted, {} of them saw damage, {} refused, {} operations, longest (time, seed) {:?}",
        bases.len(),
        start.elapsed(),
        totals.mounted,
        totals.damaged,
        totals.refused,
        totals.done,
        totals.slowest
    );
    let peak = PEAK.load(Ordering::Relaxed);
    println!("{peak} bytes were in use at most");
    assert!(peak <= MOST_BYTES);
    if std::env::var_os("FUSEFS_STACK_REASONS").is_some() {
        println!("{:#?}", totals.reasons);
    }
    let count = seeds.end - seeds.start;
    if count >= 1000 {
        // The damage reaches what it is meant for.
        let reached = [totals.mounted, totals.refused, totals.damaged];
        assert!(
            reached.iter().all(|&n| n > count / 20),
            "{reached:?} of {count}"
        );
    }
}
