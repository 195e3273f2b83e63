//! The tests of the module's section on forward progress: all pools as small as can be, disks that
//! end bios late and in any order, many threads. What is said to be the cure of a deadlock is
//! switched off in a process of its own, which must then stall.

mod late;
mod legs;
mod snap;
mod stall;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockstack::{
    BioFlags, BlkError, DynDevice, Op, PagePool, Sector, SectorCount, Workqueue, flush_wait,
    range_wait, read_wait, write_wait,
};

use self::late::Late;
use self::legs::Legs;
use self::snap::Snap;
use self::stall::{CASE, Outcome, Workers, exit_with, in_another_process};
use super::MappedDevice;
use crate::duplicates::Cure;
use crate::registry::Registry;
use crate::table::Table;
use crate::target::Suspend;

fn registry() -> Registry {
    let mut registry = Registry::standard();
    registry.register::<Legs>();
    registry.register::<Snap>();
    registry
}

/// A device over some of `below`, which are known by their places: `0`, `1` and so on.
fn device(name: &str, rows: &str, below: &[DynDevice], bios: usize) -> Arc<MappedDevice> {
    let open = |place: &str| {
        let place: usize = place.parse().map_err(|_no_number| BlkError::NoDevice)?;
        below.get(place).cloned().ok_or(BlkError::NoDevice)
    };
    let table = Table::parse(rows, &registry(), &open).unwrap();
    MappedDevice::with_bios(name, table, bios).unwrap()
}

fn lates(count: u64) -> (Vec<Arc<Late>>, Vec<DynDevice>) {
    let disks: Vec<_> = (0..count)
        .map(|at| Late::new(&format!("late{at}"), 77 + at))
        .collect();
    let devices = disks.iter().map(|disk| disk.clone() as DynDevice).collect();
    (disks, devices)
}

/// Threads that wait for bios of `mapped`, or for a lock of its targets, and writes for threads.
fn waiting(mapped: &MappedDevice) -> usize {
    let live = mapped.live.load();
    let rows = live.bound.rows.iter();
    let for_bios: usize = rows.map(|row| row.row.waiting()).sum();
    super::release(live);
    let blocked = mapped.message(Sector::ZERO, "state").ok();
    let blocked = blocked.and_then(|state| state.split(' ').nth(1)?.parse().ok());
    let gate = &mapped.gate;
    let for_several = gate.duplicates.waiting.load(Ordering::SeqCst);
    let queued = gate.writes.get().map_or(0, Workqueue::pending);
    gate.pieces.waiting() + for_bios + for_several + blocked.unwrap_or(0) + queued
}

/// Writes, zeroes, discards and flushes in an area of its own, and compares with a model.
fn use_area(dev: &DynDevice, start: u64, len: u64, round: usize) {
    let mut buf = PagePool::shared().alloc(len as usize * 512).unwrap();
    // Each sector says which it is, so that a misplaced one is seen.
    for (sector, bytes) in (start..).zip(buf.chunks_mut(512)) {
        bytes.fill(round as u8 | 1);
        bytes[..8].copy_from_slice(&sector.to_le_bytes());
    }
    let mut model = buf.to_vec();
    let at = Sector::new(start);
    let flags = match round % 2 {
        0 => BioFlags::PREFLUSH,
        _ => BioFlags::empty(),
    };
    let buf = write_wait(dev, at, buf, flags).unwrap();
    flush_wait(dev).unwrap();
    for (op, from) in [(Op::Discard, 3), (Op::WriteZeroes, len / 2)] {
        let count = len / 2 - 5 - round as u64 % 3;
        let from = from + round as u64 % 3;
        range_wait(dev, op, Sector::new(start + from), SectorCount::new(count)).unwrap();
        model[from as usize * 512..(from + count) as usize * 512].fill(0);
    }
    let buf = read_wait(dev, at, buf).unwrap();
    assert!(*buf == *model, "{len} at {start}, round {round}");
}

/// Threads that discard and zero on three legs, with as many bios as one of them needs.
fn on_three_legs(off: Option<Cure>, rounds: usize) -> Outcome {
    const THREADS: usize = 16;
    let (disks, below) = lates(3);
    let mapped = device("dup", "0 3000 legs 8 0 0 1 100 2 7\n", &below, 1);
    if let Some(cure) = off {
        mapped.gate.duplicates.off.set(cure).unwrap();
    }
    let dev: DynDevice = mapped.clone();
    let workers = Workers::start(THREADS, rounds, move |number, round| {
        use_area(&dev, number as u64 * 100, 90, round);
    });
    workers.watch(&disks, || waiting(&mapped))
}

#[test]
fn as_many_bios_as_one_discard_needs_are_enough_for_all_threads() {
    assert_eq!(on_three_legs(None, 20), Outcome::Finished);
}

#[test]
fn two_threads_with_half_of_the_bios_each_would_stall() {
    assert_eq!(in_another_process("one at a time"), Outcome::Stalled);
}

/// Layers over two disks: chunks of different sizes, every third with three legs, which send
/// duplicates, down the same device. All split what comes from above.
fn layers(depth: usize, bios: usize) -> (Vec<Arc<Late>>, Vec<Arc<MappedDevice>>) {
    let (disks, mut below) = lates(2);
    let mut mapped: Vec<Arc<MappedDevice>> = Vec::new();
    for layer in 0..depth {
        let chunk = [16, 5, 24, 7][layer % 4];
        let len = below[0].capacity().raw();
        let rows = match (layer, layer % 3) {
            (0, _) => format!("0 1995 legs {chunk} 0 0\n1995 1600 linear 1 13\n"),
            (_, 1) => {
                let each = len / 3 / chunk * chunk;
                let (second, third) = (each, 2 * each);
                format!("0 {} legs {chunk} 0 0 0 {second} 0 {third}\n", 3 * each)
            }
            _ => format!("0 777 legs {chunk} 0 0\n777 {} linear 0 777\n", len - 777),
        };
        let made = device(&format!("layer{layer}"), &rows, &below, bios);
        mapped.push(made.clone());
        below = vec![made];
    }
    (disks, mapped)
}

fn through_layers(depth: usize, bios: usize, off: Option<Cure>) -> Outcome {
    const THREADS: usize = 16;
    let (disks, mapped) = layers(depth, bios);
    let top = mapped.last().unwrap();
    if let Some(cure) = off {
        top.gate.duplicates.off.set(cure).unwrap();
    }
    let dev: DynDevice = top.clone();
    let area = dev.capacity().raw() / THREADS as u64;
    let workers = Workers::start(THREADS, 2, move |number, round| {
        use_area(&dev, number as u64 * area, area.min(150), round);
    });
    let outcome = workers.watch(&disks, || mapped.iter().map(|dev| waiting(dev)).sum());
    // While the devices are there; their sets have their name.
    let rescuers = threads().filter(|name| name.starts_with("rescue layer"));
    assert_eq!(rescuers.count(), 0);
    outcome
}

#[test]
fn one_to_eight_layers_get_by_with_one_bio_each_and_without_a_rescuer() {
    for depth in 1..=8 {
        for bios in [1, 2] {
            let outcome = through_layers(depth, bios, None);
            assert_eq!(outcome, Outcome::Finished, "{depth} layers, {bios} bios");
        }
    }
}

/// Names of the threads of this process.
fn threads() -> impl Iterator<Item = String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
}

#[test]
fn a_device_that_maps_all_pieces_at_once_would_stall() {
    assert_eq!(in_another_process("depth first"), Outcome::Stalled);
}

/// `snap` over a device that splits, over a disk.
fn snap(bios: usize) -> (Arc<Late>, Arc<MappedDevice>, Arc<MappedDevice>) {
    let (mut disks, below) = lates(1);
    let rows = "0 1000 legs 3 0 8\n1000 1000 linear 0 1500\n";
    let middle = device("middle", rows, &below, 1);
    let below: [DynDevice; 1] = [middle.clone()];
    let top = device("snap", "0 1024 snap 0\n", &below, bios);
    (disks.remove(0), middle, top)
}

fn write(dev: &DynDevice, sector: u64, len: usize, byte: u8) {
    let mut buf = PagePool::shared().alloc(len * 512).unwrap();
    buf.fill(byte);
    let buf = write_wait(dev, Sector::new(sector), buf, BioFlags::empty()).unwrap();
    let buf = read_wait(dev, Sector::new(sector), buf).unwrap();
    assert!(buf.iter().all(|&other| other == byte));
}

fn with_the_lock(off: Option<Cure>) -> Outcome {
    let (disk, middle, top) = snap(4);
    if let Some(cure) = off {
        top.gate.duplicates.off.set(cure).unwrap();
    }
    let dev: DynDevice = top.clone();
    let workers = Workers::start(8, 10, move |number, round| {
        write(
            &dev,
            number as u64 * 100 + round as u64 % 36,
            64,
            number as u8,
        );
    });
    workers.watch(&[disk], || waiting(&top) + waiting(&middle))
}

#[test]
fn a_lock_held_to_the_end_of_a_bio_is_given_back() {
    assert_eq!(with_the_lock(None), Outcome::Finished);
}

#[test]
fn a_lock_whose_bio_is_parked_behind_the_thread_that_waits_for_it_would_stall() {
    assert_eq!(in_another_process("lock"), Outcome::Stalled);
}

fn until(what: impl Fn() -> bool) {
    let begun = std::time::Instant::now();
    while !what() {
        assert!(begun.elapsed().as_secs() < 60, "never came");
        std::thread::yield_now();
    }
}

/// The scenario of the mail: the thread that submits what was deferred is blocked in `map`, with
/// bios behind it, by a lock whose bio is held up below.
#[test]
fn the_one_who_resumes_may_be_blocked_in_map_with_deferred_bios_behind() {
    for bios in [2, 4] {
        let (disk, middle, top) = snap(bios);
        let dev: DynDevice = top.clone();
        let state = || top.message(Sector::ZERO, "state").unwrap();
        top.suspend(Suspend::Flush).unwrap();
        // One piece each, so that the lock alone is waited for.
        let early = Workers::start(8, 1, move |number, _| {
            write(&dev, number as u64 * 8, 8, number as u8);
        });
        until(|| top.gate.deferred.lock_nested().len() == 8);
        middle.suspend(Suspend::Flush).unwrap();
        let resumed = top.clone();
        let resume = Workers::start(1, 1, move |_, _| resumed.resume().unwrap());
        until(|| state() == "true 1");
        assert_eq!(middle.gate.deferred.lock_nested().len(), 1);
        let dev: DynDevice = top.clone();
        let late = Workers::start(4, 1, move |number, _| {
            write(&dev, 500 + number as u64 * 64, 64, number as u8);
        });
        until(|| waiting(&top) == 5);
        assert_eq!(disk.counts(), (0, 0), "held up below");
        middle.resume().unwrap();
        let disks = [disk];
        for workers in [resume, early, late] {
            let outcome = workers.watch(&disks, || waiting(&top) + waiting(&middle));
            assert_eq!(outcome, Outcome::Finished, "{bios} bios");
        }
        assert_eq!(state(), "false 0");
    }
}

/// As above by chance, many times.
#[test]
fn devices_are_suspended_and_resumed_while_others_hold_the_lock() {
    for bios in [1, 2, 4] {
        let (disk, middle, top) = snap(bios);
        let dev: DynDevice = top.clone();
        let workers = Workers::start(8, 20, move |number, round| {
            write(
                &dev,
                number as u64 * 100 + round as u64 % 36,
                64,
                number as u8,
            );
        });
        let (upper, lower) = (top.clone(), middle.clone());
        let admin = Workers::start(1, 20, move |_, round| {
            for dev in [&lower, &upper] {
                dev.suspend(Suspend::Flush).unwrap();
                if round % 3 == 0 {
                    std::thread::yield_now();
                }
                dev.resume().unwrap();
            }
        });
        let disks = [disk];
        for workers in [admin, workers] {
            let outcome = workers.watch(&disks, || waiting(&top) + waiting(&middle));
            assert_eq!(outcome, Outcome::Finished, "{bios} bios");
        }
    }
}

/// Writes with a flush before, to a device over two others and to the one that is over the next.
fn with_flushes(off: Option<Cure>, rounds: usize) -> Outcome {
    let (disks, mut below) = lates(3);
    let other = below.remove(2);
    let rows = "0 1000 linear 0 0\n1000 1000 linear 1 0\n";
    let bottom = device("bottom", rows, &below, 1);
    let below: [DynDevice; 1] = [bottom.clone()];
    let middle = device("middle", "0 2000 linear 0 0\n", &below, 1);
    let rows = "0 2000 linear 0 0\n2000 100 linear 1 0\n";
    let top = device("top", rows, &[middle.clone(), other], 16);
    let devices: [DynDevice; 2] = [top.clone(), middle.clone()];
    let all = [top, middle, bottom];
    for dev in &all {
        if let Some(cure) = off {
            dev.gate.duplicates.off.set(cure).unwrap();
        }
    }
    let workers = Workers::start(24, rounds, move |number, _| {
        let dev = &devices[number % 2];
        let buf = PagePool::shared().alloc(512).unwrap();
        let sector = Sector::new(900 + number as u64 * 8);
        write_wait(dev, sector, buf, BioFlags::PREFLUSH).unwrap();
    });
    workers.watch(&disks, || {
        let shared = super::ALL_WRITES.get().map_or(0, Workqueue::pending);
        shared + all.iter().map(|dev| waiting(dev)).sum::<usize>()
    })
}

#[test]
fn writes_after_a_flush_do_not_wait_for_those_of_devices_above() {
    assert_eq!(with_flushes(None, 40), Outcome::Finished);
}

/// The queue's threads wait for clones of `middle`, and those for writes of `bottom` behind them.
#[test]
fn one_queue_of_writes_for_all_devices_would_stall() {
    assert_eq!(in_another_process("own queue"), Outcome::Stalled);
}

/// What the others run in a process of its own.
#[test]
#[ignore = "run by other tests, with a case"]
fn one_case() {
    let Ok(case) = std::env::var(CASE) else {
        return;
    };
    exit_with(match case.as_str() {
        "one at a time" => on_three_legs(Some(Cure::OneAtATime), 1000),
        "depth first" => through_layers(2, 1, Some(Cure::DepthFirst)),
        "lock" => with_the_lock(Some(Cure::DepthFirst)),
        "own queue" => with_flushes(Some(Cure::OwnQueue), 1000),
        _ => panic!("no case {case}"),
    });
}
