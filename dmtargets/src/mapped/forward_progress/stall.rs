//! Tells a stall from slowness, by what threads and disks are at and not by a clock alone.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use super::late::Late;

/// How a run ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Outcome {
    Finished,
    /// All threads that were left wait, no disk has anything to do, and so it stays.
    Stalled,
}

/// Looks for which nothing may have changed, where a stall is what is looked for.
const SAME: u32 = 200;
/// And where it would be a failure: a thread may be kept from running by others for long.
const SAME_FOR_SURE: u32 = 5000;

/// Threads that submit bios, one at a time each and known by its number.
pub(super) struct Workers {
    threads: Vec<JoinHandle<()>>,
    /// Rounds ended so far.
    rounds: Arc<AtomicUsize>,
}

impl Workers {
    /// Has `count` threads do `work` for each of `rounds`; `FUSEFS_STACK_LONG=1` makes them many.
    pub(super) fn start(
        count: usize,
        rounds: usize,
        work: impl Fn(usize, usize) + Clone + Send + 'static,
    ) -> Self {
        let long = std::env::var_os("FUSEFS_STACK_LONG").is_some_and(|long| long == "1");
        let rounds = if long && rounds > 1 {
            rounds * 20
        } else {
            rounds
        };
        let ended = Arc::new(AtomicUsize::new(0));
        let spawn = |number| {
            let (ended, work) = (ended.clone(), work.clone());
            std::thread::spawn(move || {
                for round in 0..rounds {
                    work(number, round);
                    ended.fetch_add(1, Ordering::SeqCst);
                }
            })
        };
        Self {
            threads: (0..count).map(spawn).collect(),
            rounds: ended,
        }
    }

    /// Waits for the threads, as long as anything moves. `waiting` counts those that wait for a bio
    /// or for a lock of a target; where they stall, they are left behind.
    pub(super) fn watch(self, disks: &[Arc<Late>], waiting: impl Fn() -> usize) -> Outcome {
        let begun = Instant::now();
        let enough = match std::env::var_os(CASE) {
            Some(_) => SAME,
            None => SAME_FOR_SURE,
        };
        let (mut before, mut same) = (None, 0);
        while same < enough {
            let left = self.threads.iter().filter(|t| !t.is_finished()).count();
            if left == 0 {
                for thread in self.threads {
                    thread.join().unwrap();
                }
                return Outcome::Finished;
            }
            let counts: Vec<_> = disks.iter().map(|disk| disk.counts()).collect();
            let idle = counts.iter().all(|(accepted, ended)| accepted == ended);
            let now = Some((left, self.rounds.load(Ordering::SeqCst), counts));
            let stands_still = idle && waiting() >= left && now == before;
            same = if stands_still { same + 1 } else { 0 };
            before = now;
            let slow = begun.elapsed() > Duration::from_secs(300);
            assert!(
                !slow,
                "neither an end nor a stall: {before:?}, {} wait",
                waiting()
            );
            sleep(Duration::from_millis(2));
        }
        Outcome::Stalled
    }
}

/// Names the case that a process of its own runs.
pub(super) const CASE: &str = "DMTARGETS_STALL_CASE";

const FINISHED: i32 = 40;
const STALLED: i32 = 41;

/// Runs a case in a process of its own, as threads that stall never end.
pub(super) fn in_another_process(case: &str) -> Outcome {
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact"])
        .arg("mapped::forward_progress::one_case")
        .env(CASE, case)
        .status()
        .unwrap();
    match status.code() {
        Some(FINISHED) => Outcome::Finished,
        Some(STALLED) => Outcome::Stalled,
        _ => panic!("{case}: {status}"),
    }
}

/// Ends the process with what [`in_another_process`] looks for.
pub(super) fn exit_with(outcome: Outcome) -> ! {
    std::process::exit(match outcome {
        Outcome::Finished => FINISHED,
        Outcome::Stalled => STALLED,
    })
}
