//! What a layer of device-mapper costs: one 4 KiB bio, bare and through linear devices, by one
//! thread and by two.
//!
//! `cargo bench -p dmtargets --bench layer`: a table in nanoseconds, medians of rounds in which all
//! stacks take turns. `-- count LAYERS BIOS` only sends so many bios, for a program that counts
//! instructions; `contrib/bench-layers` does that.

#![allow(clippy::expect_used, reason = "a bench ends where something is wrong")]

use std::cell::Cell;
use std::sync::Barrier;
use std::time::Instant;

use blockstack::backend::null::NullDisk;
use blockstack::{
    Bio, BioSet, BlkResult, Buf, DynDevice, Lanes, Op, PagePool, Sector, SectorCount, Wait,
    submit_bio,
};
use dmtargets::linear_over;

const SECTORS: u64 = 4096;
/// So many that two threads have come to run on two processors long before the end.
const BIOS: u64 = 100_000;
const ROUNDS: usize = 21;
const LAYERS: [usize; 5] = [0, 1, 2, 4, 8];

fn stack(layers: usize) -> Lanes {
    let mut dev: DynDevice = NullDisk::new("null0", SectorCount::new(SECTORS));
    for _ in 0..layers {
        let len = SectorCount::new(dev.capacity().raw() - 8);
        dev = linear_over(dev, Sector::new(8), len).expect("a linear device");
    }
    Lanes::new(&dev)
}

thread_local! {
    /// The memory of the thread's bios.
    static BUF: Cell<Option<Buf>> = const { Cell::new(None) };
}

fn end(mut bio: Bio, res: BlkResult) {
    res.expect("success");
    BUF.set(bio.take_buf());
}

fn send(set: &BioSet<()>, dev: &Lanes, bios: u64) {
    let first = PagePool::shared().alloc(4096).expect("memory");
    BUF.set(Some(first));
    for at in 0..bios {
        let mut bio = set.alloc(Op::Write, Wait::Yes).expect("a bio");
        let buf = BUF.take().expect("the memory of the bio before");
        bio.push(buf).expect("whole sectors");
        bio.set_lane(dev, Sector::new(at * 8 % 2048));
        bio.set_end_io(end);
        submit_bio(bio);
    }
    BUF.take();
}

/// Nanoseconds a bio of each of `threads`.
fn round(dev: &Lanes, threads: usize) -> f64 {
    let set = BioSet::new("bench", 16);
    if threads == 1 {
        let start = Instant::now();
        send(&set, dev, BIOS);
        return start.elapsed().as_nanos() as f64 / BIOS as f64;
    }
    let barrier = Barrier::new(threads);
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    send(&set, dev, 1000);
                    barrier.wait();
                    let start = Instant::now();
                    send(&set, dev, BIOS);
                    start.elapsed().as_nanos() as f64 / BIOS as f64
                })
            })
            .collect();
        let times = all.into_iter().map(|one| one.join().expect("no panic"));
        times.sum::<f64>() / threads as f64
    })
}

/// The `part`th hundredth of `values`.
fn quantile(values: &mut [f64], part: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    values[(values.len() - 1) * part / 100]
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [_, layers, bios] = &args[..]
        && args[0] == "count"
    {
        let (layers, bios) = (layers.parse(), bios.parse());
        let dev = stack(layers.expect("LAYERS is a number"));
        send(&BioSet::new("bench", 16), &dev, bios.expect("BIOS is one"));
        return;
    }
    let stacks: Vec<_> = LAYERS.iter().map(|&layers| stack(layers)).collect();
    let mut times = vec![[Vec::new(), Vec::new()]; stacks.len()];
    for _ in 0..ROUNDS {
        for (dev, times) in stacks.iter().zip(&mut times) {
            for threads in [1, 2] {
                times[threads - 1].push(round(dev, threads));
            }
        }
    }
    for (what, part) in [("median", 50), ("fastest twentieth", 5)] {
        println!("\n{what}, ns       1 thread            2 threads");
        println!("layers     a bio   a layer     a bio   a layer   together");
        let mut base = [0.0; 2];
        for (layers, [one, two]) in LAYERS.iter().zip(&mut times) {
            let (one, two) = (quantile(one, part), quantile(two, part));
            if *layers == 0 {
                base = [one, two];
            }
            let each = |time: f64, base: f64| match layers {
                0 => "-".to_owned(),
                n => format!("{:.0}", (time - base) / *n as f64),
            };
            println!(
                "{layers:6} {one:9.0} {:>9} {two:9.0} {:>9} {:8.2} x",
                each(one, base[0]),
                each(two, base[1]),
                2.0 * one / two,
            );
        }
    }
}
