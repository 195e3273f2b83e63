//! Many workloads on several threads.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use blockstack::log_writes::Entry;

use super::Error;
use super::exec::mount_options;
use super::explore::{Explorer, Violation};
use super::judge::Judge;
use super::kit::Kit;
use super::script::Op;
use super::workload::{self, Workload};

/// Operations of a storm.
const STORM_OPS: usize = 300;

/// What to run.
#[derive(Clone, Debug)]
pub enum Plan {
    /// The sequences of one operation of `b3`.
    B3One,
    /// Those of one and two.
    B3,
    /// Storms, one after the other.
    Storm,
    /// `b3` and storms by turns.
    All,
    /// The log of this one.
    Recorded {
        /// For messages.
        name: String,
        /// What was recorded, on the kit's image.
        entries: Arc<Vec<Entry>>,
    },
}

/// How to run it.
#[derive(Clone, Debug)]
pub struct Config {
    /// What.
    pub plan: Plan,
    /// About so many states.
    pub states: u64,
    /// For all that is drawn.
    pub seed: u64,
    /// Threads.
    pub threads: usize,
    /// One state in so many is also judged by e2fsck; 0: none.
    pub e2fsck_every: u64,
    /// The run ends with so many finds.
    pub max_finds: usize,
    /// Commits flush the disk; `false` is a planted fault.
    pub barrier: bool,
    /// Ends the run early, once somebody sets it.
    pub stop: Arc<AtomicBool>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            plan: Plan::All,
            states: 10_000,
            seed: 1,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            e2fsck_every: 200,
            max_finds: 1,
            barrier: true,
            stop: Arc::default(),
        }
    }
}

/// A violation, with what is needed to see it again.
pub struct Find {
    /// Of the workload.
    pub name: String,
    /// The script, numbered.
    pub script: String,
    /// The log.
    pub entries: Vec<Entry>,
    /// The smallest state that was found.
    pub violation: Violation,
}

/// What came of a run.
#[derive(Default)]
pub struct Summary {
    /// Workloads run.
    pub workloads: u64,
    /// Different states that were mounted and checked.
    pub states: u64,
    /// States drawn, also such as came up before.
    pub drawn: u64,
    /// States that e2fsck has seen.
    pub fscked: u64,
    /// Entries of all logs.
    pub entries: u64,
    /// How long it took.
    pub took: Duration,
    /// What was found.
    pub finds: Vec<Find>,
}

/// What a run tells on its way.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// States so far.
    pub states: u64,
    /// Workloads so far.
    pub workloads: u64,
    /// Finds so far.
    pub finds: usize,
}

enum Work {
    Script(Workload),
    Recorded(String, Arc<Vec<Entry>>),
}

struct Job {
    work: Work,
    /// Which part of its entries, of how many.
    part: (usize, usize),
    /// States at most.
    budget: u64,
    /// Variants drawn at each entry.
    variants: usize,
    seed: u64,
}

type Jobs = Box<dyn Iterator<Item = Job> + Send>;

fn jobs(kit: &Kit, config: &Config) -> Jobs {
    let seed = config.seed;
    let small = move |(index, workload): (usize, Workload)| Job {
        work: Work::Script(workload),
        part: (0, 1),
        budget: u64::MAX,
        variants: 10,
        seed: seed.wrapping_add(index as u64),
    };
    let model = kit.model.clone();
    let has_extents = kit.has_extents;
    let is_possible = move |workload: &Workload| {
        has_extents
            || !workload
                .ops
                .iter()
                .any(|op| matches!(op, Op::Falloc { .. }))
    };
    let start = model.clone();
    let storms = (0u64..).map(move |index| {
        let seed = seed.wrapping_add(index.wrapping_mul(0x1_0001));
        Job {
            work: Work::Script(workload::storm(&start, seed, STORM_OPS, has_extents)),
            part: (0, 1),
            budget: 3000,
            variants: 12,
            seed,
        }
    });
    let one = workload::b3_one(&model).into_iter();
    let two = workload::b3_two(&model, seed);
    match &config.plan {
        Plan::B3One => Box::new(one.filter(is_possible).enumerate().map(small)),
        Plan::B3 => Box::new(one.chain(two).filter(is_possible).enumerate().map(small)),
        Plan::Storm => Box::new(storms),
        Plan::Recorded { name, entries } => {
            // Each thread takes its part of the entries.
            let parts = config.threads.max(1);
            let (name, entries) = (name.clone(), entries.clone());
            let per_entry = config.states / (entries.len() as u64).max(1);
            let variants = per_entry.clamp(8, 400) as usize;
            let budget = config.states / parts as u64 + 1;
            Box::new((0..parts).map(move |part| Job {
                work: Work::Recorded(name.clone(), entries.clone()),
                part: (part, parts),
                budget,
                variants,
                seed,
            }))
        }
        Plan::All => {
            let mut b3 = one.chain(two).filter(is_possible).enumerate().map(small);
            let mut storms = storms;
            let mut turn = 0u64;
            Box::new(std::iter::from_fn(move || {
                turn += 1;
                if turn % 60 == 0 {
                    return storms.next();
                }
                b3.next().or_else(|| storms.next())
            }))
        }
    }
}

struct Shared<'a> {
    kit: &'a Kit,
    config: &'a Config,
    judge: &'a Judge,
    jobs: Mutex<Jobs>,
    summary: Mutex<Summary>,
    workloads: AtomicU64,
    finds: AtomicU64,
    error: Mutex<Option<Error>>,
}

/// Runs; `tell` hears of the progress a few times a second.
///
/// # Errors
/// Where workloads cannot be run at all.
pub fn run(kit: &Kit, config: &Config, mut tell: impl FnMut(Progress)) -> Result<Summary, Error> {
    let started = Instant::now();
    let judge = Judge::new(config.e2fsck_every)?;
    let shared = Shared {
        kit,
        config,
        judge: &judge,
        jobs: Mutex::new(jobs(kit, config)),
        summary: Mutex::new(Summary::default()),
        workloads: AtomicU64::new(0),
        finds: AtomicU64::new(0),
        error: Mutex::new(None),
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..config.threads.max(1))
            .map(|_| scope.spawn(|| shared.work()))
            .collect();
        while workers.iter().any(|worker| !worker.is_finished()) {
            tell(shared.progress());
            std::thread::park_timeout(Duration::from_millis(100));
        }
    });
    tell(shared.progress());
    kit.check_backing()?;
    let error = shared
        .error
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    if let Some(error) = error {
        return Err(error);
    }
    let summary = shared
        .summary
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    Ok(Summary {
        workloads: shared.workloads.into_inner(),
        fscked: judge.counts().1,
        took: started.elapsed(),
        ..summary
    })
}

impl Shared<'_> {
    fn progress(&self) -> Progress {
        Progress {
            states: self.judge.counts().0,
            workloads: self.workloads.load(Ordering::Relaxed),
            finds: self.finds.load(Ordering::Relaxed) as usize,
        }
    }

    fn is_over(&self) -> bool {
        self.config.stop.load(Ordering::Relaxed) || self.judge.counts().0 >= self.config.states
    }

    fn work(&self) {
        while !self.is_over() {
            let job = self
                .jobs
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .next();
            let Some(job) = job else { return };
            // The parts of one are one.
            self.workloads
                .fetch_add((job.part.0 == 0).into(), Ordering::Relaxed);
            if let Err(error) = self.one(&job) {
                self.config.stop.store(true, Ordering::Relaxed);
                let mut first = self.error.lock().unwrap_or_else(PoisonError::into_inner);
                first.get_or_insert(error);
            }
        }
    }

    fn one(&self, job: &Job) -> Result<(), Error> {
        let mut options = mount_options();
        options.barrier = self.config.barrier;
        let (name, entries) = match &job.work {
            Work::Script(workload) => {
                let entries = self.kit.record(&workload.ops, options)?;
                (&workload.name, Arc::new(entries))
            }
            Work::Recorded(name, entries) => (name, entries.clone()),
        };
        let history = self.kit.history(&entries);
        let history = history.map_err(|what| Error::Start(format!("{name}: {what}")))?;
        let explorer = Explorer {
            origin: &self.kit.origin,
            entries: &entries,
            history: &history,
            judge: self.judge,
            variants: job.variants,
            seed: job.seed,
        };
        // A long log is looked at here and there.
        let per_entry = job.variants as u64 + 1;
        let mine = entries.len() as u64 / job.part.1 as u64;
        let stride = (mine * per_entry / job.budget.max(1)).max(1);
        let mut random = super::random::Random::new(job.seed, 4);
        let explored = explorer.run(
            |at| at % job.part.1 == job.part.0 && random.below(stride) == 0,
            |states| states < job.budget && !self.is_over(),
        );
        let find = explored.violation.map(|violation| Find {
            name: name.clone(),
            script: history.script(),
            violation: explorer.shrink(&violation),
            entries: entries.to_vec(),
        });
        let mut summary = self.summary.lock().unwrap_or_else(PoisonError::into_inner);
        summary.states += explored.states;
        summary.drawn += explored.drawn;
        summary.entries += entries.len() as u64;
        if let Some(find) = find {
            summary.finds.push(find);
            self.finds.fetch_add(1, Ordering::Relaxed);
            if summary.finds.len() >= self.config.max_finds {
                self.config.stop.store(true, Ordering::Relaxed);
            }
        }
        Ok(())
    }
}
