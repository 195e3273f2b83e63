//! A load on the `io_uring` backend as fio makes one: random places of a file, a constant number of
//! requests in flight, one thread that submits. `contrib/bench-ring` runs it and fio in turn.
//!
//! ```text
//! cargo bench -p blockstack --bench ring -- DEPTH read|write SECONDS FILE [HOW]
//! ```
//!
//! HOW says who submits:
//!
//! - `thread` (unless told otherwise): one thread, which sleeps until a bio is back;
//! - `ends`: the end of each bio submits the next;
//! - `wait`: a thread that waits for each bio, `inline` the same where it may do the calls itself;
//!   DEPTH of them;
//! - `beside`: a thread that waits for each bio, and is the one that counts, while DEPTH others are in
//!   flight as with `ends`.
//!
//! Prints requests a second and the processor time of each in microseconds.
#![expect(
    clippy::unwrap_used,
    reason = "a benchmark that cannot run may as well stop"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blockstack::backend::file::{Engine, FileDisk, OpenOptions};
use blockstack::{
    Bio, BioFlags, BioSet, BlkResult, DynDevice, Op, PagePool, Sector, Wait, read_wait, submit_bio,
    write_wait,
};

const LEN: u64 = 4096;

/// What the ends of bios and those who submit share.
struct Run {
    dev: DynDevice,
    op: Op,
    until: Instant,
    done: AtomicU64,
}

struct Places {
    state: u64,
    blocks: u64,
}

impl Places {
    fn new(dev: &DynDevice, seed: u64) -> Self {
        Self {
            state: seed,
            blocks: dev.capacity().raw() * 512 / LEN,
        }
    }

    fn next(&mut self) -> Sector {
        self.state = self
            .state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        Sector::from_bytes((self.state >> 20) % self.blocks * LEN).unwrap()
    }
}

#[derive(Default)]
struct Mine {
    run: Option<Arc<Run>>,
    /// Where the next ones go, for a bio that submits its successor.
    places: Option<Places>,
}

fn ended(mut bio: Bio, res: BlkResult) {
    res.unwrap();
    let run = bio.pad_mut::<Mine>().run.take().unwrap();
    drop(bio);
    run.done.fetch_add(1, Ordering::Relaxed);
}

fn thread(run: &Arc<Run>, depth: usize) {
    let set = BioSet::<Mine>::new("bench", depth);
    let mut places = Places::new(&run.dev, 1);
    while Instant::now() < run.until {
        let mut bio = set.alloc(run.op, Wait::Yes).unwrap();
        let buf = PagePool::shared().alloc(LEN as usize).unwrap();
        bio.push(buf).unwrap();
        bio.set_dev(run.dev.clone(), places.next());
        bio.set_end_io(ended);
        bio.pad_mut::<Mine>().run = Some(run.clone());
        submit_bio(bio);
    }
    drain(&set);
}

fn ended_and_next(mut bio: Bio, res: BlkResult) {
    res.unwrap();
    let mine = std::mem::take(bio.pad_mut::<Mine>());
    let run = mine.run.as_ref().unwrap();
    run.done.fetch_add(1, Ordering::Relaxed);
    if Instant::now() < run.until {
        let buf = bio.take_buf().unwrap();
        bio.reset(run.op);
        bio.push(buf).unwrap();
        submit_next(bio, mine);
    }
}

fn submit_next(mut bio: Bio, mut mine: Mine) {
    let dev = mine.run.as_ref().unwrap().dev.clone();
    bio.set_dev(dev, mine.places.as_mut().unwrap().next());
    bio.set_end_io(ended_and_next);
    *bio.pad_mut::<Mine>() = mine;
    submit_bio(bio);
}

fn ends(run: &Arc<Run>, depth: usize) {
    let set = BioSet::<Mine>::new("bench", depth);
    for seed in 1..=depth as u64 {
        let mut bio = set.alloc(run.op, Wait::Yes).unwrap();
        let buf = PagePool::shared().alloc(LEN as usize).unwrap();
        bio.push(buf).unwrap();
        let mine = Mine {
            run: Some(run.clone()),
            places: Some(Places::new(
                &run.dev,
                seed.wrapping_mul(0x9e37_79b9_7f4a_7c15),
            )),
        };
        submit_next(bio, mine);
    }
    std::thread::sleep(run.until - Instant::now());
    drain(&set);
}

fn drain(set: &BioSet<Mine>) {
    while set.in_use() > 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn wait(run: &Arc<Run>, seed: u64) {
    let mut held = Some(PagePool::shared().alloc(LEN as usize).unwrap());
    let mut places = Places::new(&run.dev, seed);
    while Instant::now() < run.until {
        let buf = held.take().unwrap();
        let back = match run.op {
            Op::Read => read_wait(&run.dev, places.next(), buf),
            _ => write_wait(&run.dev, places.next(), buf, BioFlags::empty()),
        };
        held = Some(back.unwrap());
        run.done.fetch_add(1, Ordering::Relaxed);
    }
}

/// Of the process so far.
fn processor_time() -> Duration {
    let clock = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(clock.tv_sec as u64, clock.tv_nsec as u32)
}

fn main() {
    // `cargo bench` adds an argument of its own.
    let args: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| word != "--bench")
        .collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let (depth, op, seconds, file, how) = match *words.as_slice() {
        [depth, op, seconds, file] => (depth, op, seconds, file, "thread"),
        [depth, op, seconds, file, how] => (depth, op, seconds, file, how),
        _ => {
            println!(
                "SKIPPED: wants DEPTH read|write SECONDS FILE [thread|ends|wait|inline|beside]"
            );
            return;
        }
    };
    let depth: usize = depth.parse().unwrap();
    let options = OpenOptions {
        engine: Engine::Uring,
        inline: matches!(how, "inline" | "beside"),
        ..OpenOptions::default()
    };
    let dev = FileDisk::open(file, options).unwrap();
    assert!(dev.is_direct(), "no direct I/O on this file");
    let start = Instant::now();
    let before = processor_time();
    let run = Arc::new(Run {
        dev,
        op: if op == "write" { Op::Write } else { Op::Read },
        until: start + Duration::from_secs_f64(seconds.parse().unwrap()),
        done: AtomicU64::new(0),
    });
    match how {
        "thread" => thread(&run, depth),
        "ends" => ends(&run, depth),
        "wait" | "inline" => std::thread::scope(|scope| {
            for seed in 1..=depth as u64 {
                let run = &run;
                scope.spawn(move || wait(run, seed));
            }
        }),
        "beside" => std::thread::scope(|scope| {
            let others = Arc::new(Run {
                dev: run.dev.clone(),
                done: AtomicU64::new(0),
                ..*run
            });
            scope.spawn(move || ends(&others, depth));
            wait(&run, u64::MAX);
        }),
        other => panic!("{other}: no such way to submit"),
    }
    let done = run.done.load(Ordering::Relaxed) as f64;
    let rate = done / start.elapsed().as_secs_f64();
    let each = (processor_time() - before).as_secs_f64() * 1e6 / done;
    println!("{rate:.0} {each:.2}");
}
