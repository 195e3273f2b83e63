//! What the core does, for whatever target.
#![allow(clippy::unwrap_used, reason = "a test ends where something is wrong")]

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use blockstack::backend::mem::MemDisk;
use blockstack::{
    BioFlags, BlkError, BlkResult, BlockDevice, DynDevice, Limits, Op, Sector, SectorCount,
};
use parking_lot::Mutex;

use super::{MappedDevice, linear_over};
use crate::args::{Args, CtrError};
use crate::registry::Registry;
use crate::table::{Table, TableError};
use crate::target::{DevRange, DmBio, Event, FlushRoute, MapResult, Suspend, TableCx, Target};
use crate::testing::{Mood, Rig, RigConfig};

const TWO_ROWS: &str = "0 16 linear mem0 100\n16 48 linear mem1 0\n";

fn rig(rows: &str) -> Rig {
    let mut registry = Registry::standard();
    registry.register::<Odd>();
    Rig::with_registry(rows, RigConfig::default(), registry).unwrap()
}

/// A linear target that does unusual things, by its mode.
struct Odd {
    lower: [DevRange; 1],
    mode: &'static str,
    maps: AtomicUsize,
    ends: Arc<AtomicUsize>,
    requeue: AtomicBool,
    events: Mutex<Vec<Event>>,
    notifier: crate::target::Notifier,
}

const MODES: [(&str, &str); 3] = [
    ("through", "through"),
    ("requeue", "requeue"),
    ("drop", "drop"),
];

impl Target for Odd {
    const NAME: &'static str = "odd";
    type PerBio = Option<u64>;

    fn new(args: &mut Args<'_>, cx: &TableCx<'_>) -> Result<Self, CtrError> {
        let dev = cx.open(args.word("device")?)?;
        let mode = args.choice("mode", "a mode", &MODES)?;
        cx.split_at(SectorCount::new(8));
        Ok(Self {
            lower: [DevRange::new(dev, cx.start(), cx.len())?],
            mode,
            maps: AtomicUsize::new(0),
            ends: Arc::default(),
            requeue: AtomicBool::new(mode == "requeue"),
            events: Mutex::default(),
            notifier: cx.notifier(),
        })
    }
    fn devices(&self) -> &[DevRange] {
        &self.lower
    }
    fn map(&self, mut bio: DmBio<Option<u64>>) -> MapResult<Option<u64>> {
        assert_eq!(*bio.data_mut(), None, "the pad of an earlier bio");
        assert!(bio.len().raw() <= 8 - bio.sector().raw() % 8);
        self.maps.fetch_add(1, Ordering::SeqCst);
        *bio.data_mut() = Some(bio.sector().raw());
        if self.requeue.load(Ordering::SeqCst) {
            return MapResult::Requeue(bio);
        }
        if self.mode == "drop" {
            return MapResult::Taken;
        }
        bio.remap(&self.lower[0]);
        MapResult::Remapped(bio)
    }
    fn end_io(&self, bio: &mut DmBio<Option<u64>>, res: BlkResult) -> BlkResult {
        assert!(bio.data_mut().take().is_some());
        self.ends.fetch_add(1, Ordering::SeqCst);
        res
    }
    fn table_args(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        write!(out, "{} {}", self.lower[0].dev().name(), self.mode)
    }
    fn status(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        write!(out, "{} maps", self.maps.load(Ordering::SeqCst))
    }
    fn flush_route(&self) -> FlushRoute {
        FlushRoute::ThroughMap
    }
    fn event(&self, event: Event) -> BlkResult {
        self.events.lock().push(event);
        if event == Event::Preresume {
            self.requeue.store(false, Ordering::SeqCst);
        }
        Ok(())
    }
    fn message(&self, args: &mut Args<'_>) -> Result<String, CtrError> {
        match args.word("message")? {
            "events" => Ok(format!("{:?}", self.events.lock())),
            "ends" => Ok(self.ends.load(Ordering::SeqCst).to_string()),
            "shout" => {
                self.notifier.notify();
                Ok(String::new())
            }
            other => Err(CtrError::UnknownMessage(other.to_owned())),
        }
    }
}

#[test]
fn bios_are_split_at_rows() {
    let rig = rig(TWO_ROWS);
    let bytes: Vec<u8> = (0..32u8).flat_map(|at| [at; 512]).collect();
    rig.write(Sector::new(4), &bytes).unwrap();
    assert_eq!(rig.disk("mem0").written(), [Sector::new(104)]);
    assert_eq!(rig.disk("mem1").written(), [Sector::new(0)]);
    assert_eq!(rig.read(Sector::new(4), 32).unwrap(), bytes);
    assert_eq!(
        rig.read(Sector::new(60), 8),
        Err(BlkError::OutOfRange),
        "past the last row"
    );
}

#[test]
fn one_error_among_the_pieces_is_the_bios() {
    let rig = rig(TWO_ROWS);
    rig.disk("mem1").set_mood(Mood::Fails(BlkError::NoSpace));
    assert_eq!(
        rig.write(Sector::new(4), &[1; 32 * 512]),
        Err(BlkError::NoSpace)
    );
    assert_eq!(rig.disk("mem0").written().len(), 1);
    assert_eq!(rig.flush(), Err(BlkError::NoSpace));
}

#[test]
fn a_flush_goes_to_each_device_once() {
    let rig = rig("0 8 linear mem0 0\n8 8 linear mem1 0\n16 8 linear mem0 64\n24 8 zero\n");
    rig.flush().unwrap();
    assert_eq!(rig.disk("mem0").flushes(), 1);
    assert_eq!(rig.disk("mem1").flushes(), 1);
    assert_eq!(rig.disk("mem2").flushes(), 0);
}

/// Without the flush of the other device a commit record could be durable before what it commits.
#[test]
fn a_write_with_a_flush_before_flushes_all_devices_first() {
    let rig = rig(TWO_ROWS);
    rig.disk("mem0").set_mood(Mood::Holds);
    rig.disk("mem1").set_mood(Mood::Holds);
    let flags = BioFlags::PREFLUSH | BioFlags::FUA;
    std::thread::scope(|scope| {
        let write = scope.spawn(|| rig.write_flags(Sector::new(20), &[1; 512], flags));
        while rig.disk("mem0").held() + rig.disk("mem1").held() < 2 {
            std::thread::yield_now();
        }
        rig.disk("mem1").set_mood(Mood::Works);
        assert_eq!(rig.disk("mem1").flushes(), 1);
        assert!(rig.disk("mem1").written().is_empty(), "mem0 is not flushed");
        rig.disk("mem0").set_mood(Mood::Works);
        write.join().unwrap().unwrap();
    });
    assert_eq!(rig.disk("mem1").written(), [Sector::new(4)]);
    rig.disk("mem0").set_mood(Mood::Fails(BlkError::Io));
    let flags = BioFlags::PREFLUSH;
    assert_eq!(
        rig.write_flags(Sector::new(21), &[1; 512], flags),
        Err(BlkError::Io)
    );
    assert_eq!(
        rig.disk("mem1").written().len(),
        1,
        "no write after a failed flush"
    );
}

#[test]
fn a_flush_rides_with_the_write_over_one_device() {
    let rig = rig("0 8 linear mem0 0\n8 8 linear mem0 64\n");
    rig.write_flags(Sector::new(1), &[1; 512], BioFlags::PREFLUSH)
        .unwrap();
    assert_eq!(rig.disk("mem0").flushes(), 1);
    assert_eq!(rig.mapped().stats().snapshot().writes, 1);
}

#[test]
fn a_target_can_map_flushes_and_has_a_pad_of_its_own() {
    let rig = rig("0 64 odd mem0 through\n64 8 linear mem1 0\n");
    rig.flush().unwrap();
    assert_eq!(
        (rig.disk("mem0").flushes(), rig.disk("mem1").flushes()),
        (1, 1)
    );
    rig.write(Sector::new(4), &[1; 16 * 512]).unwrap();
    assert_eq!(
        rig.disk("mem0").written().len(),
        3,
        "split at multiples of 8"
    );
    assert_eq!(rig.mapped().message(Sector::ZERO, "ends").unwrap(), "4");
    assert_eq!(rig.mapped().status(), "0 64 odd 4 maps\n64 8 linear \n");
}

#[test]
fn a_bio_that_the_target_loses_ends_with_an_error() {
    let rig = rig("0 64 odd mem0 drop\n");
    assert_eq!(rig.write(Sector::new(4), &[1; 512]), Err(BlkError::Io));
    assert_eq!(rig.flush(), Err(BlkError::Io));
    rig.mapped().suspend(Suspend::Flush).unwrap();
}

#[test]
fn a_requeued_bio_is_mapped_anew_at_the_next_resume() {
    let rig = rig("0 64 odd mem0 requeue\n");
    rig.start(Op::Write, Sector::new(4), Some(&[1; 512]), 0);
    assert_eq!(rig.ended().0, 0);
    rig.mapped().suspend(Suspend::NoFlush).unwrap();
    rig.mapped().resume().unwrap();
    assert_eq!(rig.ended(), (1, 0));
    assert_eq!(rig.disk("mem0").written(), [Sector::new(4)]);
    assert_eq!(
        rig.mapped().message(Sector::ZERO, "events").unwrap(),
        "[Presuspend(NoFlush), Postsuspend, Preresume, Resume]"
    );
}

/// With one piece for all, kept by what is held for the next resume, the second would be waited for
/// for ever, and the suspend before that resume would wait for who waits.
#[test]
fn a_piece_that_is_requeued_keeps_no_place_in_the_set_of_pieces() {
    let mut registry = Registry::standard();
    registry.register::<Odd>();
    let config = RigConfig {
        bios: 1,
        ..RigConfig::default()
    };
    let (done, over) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let rig = Rig::with_registry("0 64 odd mem0 requeue\n", config, registry).unwrap();
        rig.start(Op::Write, Sector::new(4), Some(&[1; 24 * 512]), 0);
        rig.mapped().suspend(Suspend::NoFlush).unwrap();
        rig.mapped().resume().unwrap();
        done.send((rig.ended(), rig.disk("mem0").written().len()))
            .unwrap();
    });
    let ended = over.recv_timeout(Duration::from_secs(20));
    assert_eq!(ended, Ok(((1, 0), 4)), "or waits for a piece");
}

#[test]
fn messages_and_events() {
    let rig = rig("0 64 odd mem0 through\n64 8 linear mem1 0\n");
    let mapped = rig.mapped();
    assert_eq!(
        mapped.message(Sector::ZERO, "nonsense"),
        Err(CtrError::UnknownMessage("nonsense".to_owned()))
    );
    assert_eq!(
        mapped.message(Sector::new(64), "x"),
        Err(CtrError::NoMessages)
    );
    assert!(mapped.message(Sector::new(72), "x").is_err());
    assert_eq!(mapped.wait_event(0, Duration::from_millis(1)), 0);
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| mapped.wait_event(0, Duration::from_secs(20)));
        mapped.message(Sector::ZERO, "shout").unwrap();
        assert_eq!(waiter.join().unwrap(), 1);
    });
}

#[test]
fn a_table_is_swapped_under_load_without_a_lost_bio() {
    let rig = rig("0 64 linear mem0 0\n");
    let swaps = AtomicUsize::new(0);
    let mut writes = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while swaps.load(Ordering::SeqCst) < 200 {
                let at = swaps.fetch_add(1, Ordering::SeqCst);
                let rows = ["0 64 linear mem1 0\n", TWO_ROWS, "0 64 linear mem2 8\n"];
                let table = rig.table(rows[at % 3]).unwrap();
                rig.mapped().load(table).unwrap();
                rig.mapped().resume().unwrap();
            }
        });
        while swaps.load(Ordering::SeqCst) < 200 {
            let sector = Sector::new(writes as u64 % 60);
            rig.start(Op::Write, sector, Some(&[1; 4 * 512]), 0);
            writes += 1;
        }
    });
    assert_eq!(rig.ended(), (writes, 0));
}

#[test]
fn capacity_and_limits_follow_the_table() {
    let rig = rig("0 64 linear mem0 0\n");
    assert_eq!(rig.mapped().capacity(), SectorCount::new(64));
    rig.mapped()
        .load(rig.table("0 8 zero\n8 8 error").unwrap())
        .unwrap();
    assert_eq!(
        rig.mapped().capacity(),
        SectorCount::new(64),
        "not live yet"
    );
    rig.mapped().resume().unwrap();
    assert_eq!(rig.mapped().capacity(), SectorCount::new(16));
    assert_eq!(rig.mapped().table(), "0 8 zero \n8 8 error \n");
}

#[test]
fn lower_limits_stack_and_split() {
    let config = RigConfig {
        limits: Limits {
            logical_block_size: 4096,
            max_sectors: 20,
            max_discard_sectors: 32,
            max_write_zeroes_sectors: 0,
            ..Limits::UNLIMITED
        },
        ..RigConfig::default()
    };
    let rig = Rig::of_table("0 512 linear mem0 8\n", config);
    let limits = rig.mapped().limits();
    assert_eq!((limits.logical_block_size, limits.max_sectors), (4096, 20));
    assert_eq!(
        rig.write(Sector::new(1), &[0; 4096]),
        Err(BlkError::Unaligned)
    );
    rig.write(Sector::new(8), &[1; 40 * 512]).unwrap();
    let at = |sectors: [u64; 3]| sectors.map(Sector::new);
    assert_eq!(rig.disk("mem0").written(), at([16, 32, 48]), "whole blocks");
    rig.range(Op::Discard, Sector::ZERO, 80).unwrap();
    let lengths: Vec<u64> = rig
        .disk("mem0")
        .discards()
        .iter()
        .map(|(_, len)| len.raw())
        .collect();
    assert_eq!(lengths, [32, 32, 16]);
    assert_eq!(
        rig.range(Op::WriteZeroes, Sector::ZERO, 8),
        Err(BlkError::NotSupported)
    );
    let unaligned = Rig::with_registry("0 9 linear mem0 0\n", config, Registry::standard());
    assert_eq!(
        unaligned.err(),
        Some(TableError::Unaligned {
            row: 1,
            block_size: 4096
        })
    );
}

#[test]
fn a_removed_device_ends_what_it_deferred_and_lets_go() {
    let disk = MemDisk::new("mem0", SectorCount::new(64));
    let mapped = linear_over(disk.clone(), Sector::new(8), SectorCount::new(8)).unwrap();
    mapped.suspend(Suspend::Flush).unwrap();
    std::thread::scope(|scope| {
        let dev: DynDevice = mapped.clone();
        let flush = scope.spawn(move || blockstack::flush_wait(&dev));
        while mapped.gate.deferred.lock_nested().is_empty() {
            std::thread::yield_now();
        }
        mapped.remove();
        assert_eq!(flush.join().unwrap(), Err(BlkError::NoDevice));
    });
    assert_eq!(mapped.capacity(), SectorCount::ZERO);
    assert_eq!(Arc::strong_count(&disk), 1);
    let weak = Arc::downgrade(&mapped);
    drop(mapped);
    assert!(weak.upgrade().is_none());
}

#[test]
fn tables_that_are_none_are_refused_by_row() {
    let open = |_: &str| -> BlkResult<DynDevice> { Err(BlkError::NoDevice) };
    let error = |text: &str| {
        Table::parse(text, &Registry::standard(), &open)
            .map(drop)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(error("# nothing\n\n"), "table has no rows");
    assert_eq!(error("1 8 zero"), "row 1: begins at 1, not at 0");
    assert_eq!(error("0 8 zero\n9 8 zero"), "row 2: begins at 9, not at 8");
    assert_eq!(error("0 8 zero\n4 8 zero"), "row 2: begins at 4, not at 8");
    assert_eq!(error("0 0 zero"), "row 1: 0 is no length for a row at 0");
    assert_eq!(error("0 8 nil"), "row 1: no target \"nil\"");
    assert_eq!(
        error("0 eight zero"),
        "row 1: not `start length target args`: \"0 eight zero\""
    );
    assert_eq!(
        error("0 8 linear mem9 0"),
        "row 1, linear: device \"mem9\": no such device"
    );
    assert!(error("0 18446744073709551615 zero").starts_with("row 1: 1844"));
}

/// Three layers with one bio each, all of which split, under several threads.
#[test]
fn a_stack_with_one_bio_a_layer_makes_progress() {
    let limits = Limits {
        max_sectors: 8,
        ..Limits::UNLIMITED
    };
    let disk = crate::testing::RigDisk::new("mem0", limits);
    let mut top: DynDevice = disk;
    for layer in 0..3 {
        let below = top.clone();
        let open = |_: &str| Ok(below.clone());
        let rows = "0 100 linear x 0\n100 900 linear x 100\n";
        let table = Table::parse(rows, &Registry::standard(), &open).unwrap();
        top = MappedDevice::with_bios(&format!("layer{layer}"), table, 1).unwrap();
    }
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let top = &top;
            scope.spawn(move || {
                for round in 0..60 {
                    let buf = blockstack::PagePool::shared().alloc(65536).unwrap();
                    let sector = Sector::new(thread * 50 + round);
                    blockstack::write_wait(top, sector, buf, BioFlags::empty()).unwrap();
                    blockstack::flush_wait(top).unwrap();
                }
            });
        }
    });
}
