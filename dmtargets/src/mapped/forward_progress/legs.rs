//! `legs`: chunks that go round several ranges; discards and the like go to each range as one bio.
//!
//! Table: `legs <chunk> (<device> <start>)+`.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};

use blockstack::{BlkResult, Op, Sector, SectorCount};

use crate::args::{Args, CtrError};
use crate::target::{DevRange, DmBio, Event, FlushRoute, MapResult, TableCx, Target};

const NOBODY: usize = usize::MAX;

/// See the module's documentation.
pub(super) struct Legs {
    chunk: u64,
    legs: Vec<DevRange>,
    /// Which leg gives its duplicates back, until the next resume.
    requeues: AtomicUsize,
    /// Which leg loses its duplicates.
    loses: AtomicUsize,
    maps: AtomicUsize,
}

impl Legs {
    fn locate(&self, sector: u64) -> (usize, u64) {
        let (chunk, inside) = (sector / self.chunk, sector % self.chunk);
        let legs = self.legs.len() as u64;
        ((chunk % legs) as usize, chunk / legs * self.chunk + inside)
    }

    /// How much of the row's first `sector` sectors lies on a leg.
    fn before(&self, sector: u64, leg: usize) -> u64 {
        let (at, offset) = self.locate(sector);
        let begin = offset - offset % self.chunk;
        match leg.cmp(&at) {
            std::cmp::Ordering::Less => begin + self.chunk,
            std::cmp::Ordering::Equal => offset,
            std::cmp::Ordering::Greater => begin,
        }
    }
}

impl Target for Legs {
    const NAME: &'static str = "legs";
    type PerBio = Option<usize>;

    fn new(args: &mut Args<'_>, cx: &TableCx<'_>) -> Result<Self, CtrError> {
        let chunk = args.number("chunk", 1..=1 << 20)?;
        let count = (args.left() / 2).max(1) as u64;
        let chunks = cx.len().raw().div_ceil(chunk);
        let each = SectorCount::new(match count {
            1 => cx.len().raw(),
            _ => chunks.div_ceil(count) * chunk,
        });
        let mut legs = Vec::new();
        for _ in 0..count {
            let dev = cx.open(args.word("device")?)?;
            legs.push(DevRange::new(dev, args.sector("start")?, each)?);
        }
        cx.split_at(SectorCount::new(chunk));
        Ok(Self {
            chunk,
            legs,
            requeues: AtomicUsize::new(NOBODY),
            loses: AtomicUsize::new(NOBODY),
            maps: AtomicUsize::new(0),
        })
    }
    fn devices(&self) -> &[DevRange] {
        &self.legs
    }
    fn duplicates(&self, op: Op) -> usize {
        assert!(!op.has_data(), "writes with data come once");
        self.legs.len()
    }
    fn flush_route(&self) -> FlushRoute {
        FlushRoute::ThroughMap
    }
    fn map(&self, mut bio: DmBio<Option<usize>>) -> MapResult<Option<usize>> {
        let nr = bio.nr();
        assert_eq!(bio.data_mut().replace(nr), None, "the pad of another");
        self.maps.fetch_add(1, Ordering::SeqCst);
        if bio.op().has_data() {
            let (leg, offset) = self.locate(bio.sector().raw());
            bio.remap_to(&self.legs[leg], Sector::new(offset));
            return MapResult::Remapped(bio);
        }
        if self.requeues.load(Ordering::SeqCst) == nr {
            return MapResult::Requeue(bio);
        }
        if self.loses.load(Ordering::SeqCst) == nr {
            return MapResult::Taken;
        }
        let leg = &self.legs[nr];
        if bio.op() == Op::Flush {
            assert_eq!(bio.sector(), Sector::ZERO, "of a bio used before");
            bio.remap_to(leg, Sector::ZERO);
            return MapResult::Remapped(bio);
        }
        let start = bio.sector().raw();
        let from = self.before(start, nr);
        let to = self.before(start + bio.len().raw(), nr);
        if from == to {
            bio.complete(Ok(()));
            return MapResult::Taken;
        }
        bio.remap_part(leg, Sector::new(from), SectorCount::new(to - from));
        MapResult::Remapped(bio)
    }
    fn end_io(&self, bio: &mut DmBio<Option<usize>>, res: BlkResult) -> BlkResult {
        assert_eq!(bio.data_mut().take(), Some(bio.nr()), "ends once");
        res
    }
    fn event(&self, event: Event) -> BlkResult {
        if event == Event::Preresume {
            self.requeues.store(NOBODY, Ordering::SeqCst);
        }
        Ok(())
    }
    fn message(&self, args: &mut Args<'_>) -> Result<String, CtrError> {
        let what = match args.word("message")? {
            "requeue" => &self.requeues,
            "lose" => &self.loses,
            "maps" => return Ok(self.maps.swap(0, Ordering::SeqCst).to_string()),
            other => return Err(CtrError::UnknownMessage(other.to_owned())),
        };
        let leg = args.number("leg", 0..=self.legs.len())?;
        what.store(leg, Ordering::SeqCst);
        Ok(String::new())
    }
    fn table_args(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        write!(out, "{}", self.chunk)?;
        for leg in &self.legs {
            write!(out, " {} {}", leg.dev().name(), leg.start())?;
        }
        Ok(())
    }
}

mod tests {
    use blockstack::{BlkError, BlockDevice, Op, Sector};

    use super::super::until;
    use super::Legs;
    use crate::registry::Registry;
    use crate::target::Suspend;
    use crate::testing::{Mood, Rig, RigConfig};

    crate::target_contract_tests!(Legs, "legs 8 mem0 0 mem1 100 mem2 7");

    fn rig(rows: &str) -> Rig {
        let mut registry = Registry::standard();
        registry.register::<Legs>();
        let config = RigConfig {
            bios: 1,
            ..RigConfig::default()
        };
        Rig::with_registry(rows, config, registry).unwrap()
    }

    const THREE: &str = "0 240 legs 8 mem0 0 mem1 100 mem2 7\n";

    fn maps(rig: &Rig) -> String {
        rig.mapped().message(Sector::ZERO, "maps").unwrap()
    }

    fn tell(rig: &Rig, text: &str) {
        rig.mapped().message(Sector::ZERO, text).unwrap();
    }

    #[test]
    fn each_leg_gets_its_part_of_a_discard_as_one_bio() {
        let rig = rig(THREE);
        rig.range(Op::Discard, Sector::new(11), 26).unwrap();
        let discards = |disk: &str| -> Vec<(u64, u64)> {
            let done = rig.disk(disk).discards();
            done.iter().map(|(at, len)| (at.raw(), len.raw())).collect()
        };
        assert_eq!(discards("mem0"), [(8, 8)]);
        assert_eq!(discards("mem1"), [(103, 10)]);
        assert_eq!(discards("mem2"), [(7, 8)]);
        rig.range(Op::Discard, Sector::new(17), 3).unwrap();
        assert_eq!((discards("mem0").len(), discards("mem1").len()), (1, 1));
        assert_eq!(discards("mem2")[1], (8, 3), "the others have nothing of it");
        assert_eq!(maps(&rig), "6", "also those with nothing are mapped");
        rig.range(Op::WriteZeroes, Sector::ZERO, 240).unwrap();
        assert_eq!(maps(&rig), "3");
        rig.write(Sector::ZERO, &[1; 24 * 512]).unwrap();
        assert_eq!(maps(&rig), "3", "a write comes once for each chunk");
    }

    /// A discard that crosses rows is split there, and only there.
    #[test]
    fn a_discard_over_two_rows_is_duplicated_in_each() {
        let rig = rig("0 48 legs 8 mem0 0 mem1 0\n48 48 legs 8 mem2 0 mem3 0\n");
        rig.range(Op::Discard, Sector::new(8), 80).unwrap();
        for disk in ["mem0", "mem1", "mem2", "mem3"] {
            assert_eq!(rig.disk(disk).discards().len(), 1, "{disk}");
        }
    }

    #[test]
    fn the_first_error_of_a_leg_is_the_discards_and_it_ends_once() {
        let rig = rig(THREE);
        rig.set_mood(Mood::Holds);
        rig.start(Op::Discard, Sector::ZERO, None, 240);
        assert_eq!(rig.disk("mem1").held(), 1);
        rig.disk("mem1").set_mood(Mood::Works);
        rig.disk("mem2").set_mood(Mood::Fails(BlkError::NoSpace));
        assert_eq!(rig.ended(), (0, 0), "one is still on its way");
        rig.disk("mem0").set_mood(Mood::Fails(BlkError::Io));
        assert_eq!(rig.ended(), (1, 1));
        assert_eq!(
            rig.disk("mem1").discards().len(),
            1,
            "an error elsewhere stops no leg"
        );
        std::thread::scope(|scope| {
            rig.set_mood(Mood::Holds);
            let zero = scope.spawn(|| rig.range(Op::WriteZeroes, Sector::ZERO, 240));
            let held = |disk: &&str| rig.disk(disk).held() == 1;
            until(|| ["mem0", "mem1", "mem2"].iter().all(held));
            rig.disk("mem2").set_mood(Mood::Fails(BlkError::NoSpace));
            rig.disk("mem0").set_mood(Mood::Fails(BlkError::Io));
            rig.disk("mem1").set_mood(Mood::Works);
            assert_eq!(zero.join().unwrap(), Err(BlkError::NoSpace));
        });
    }

    #[test]
    fn a_leg_that_the_target_loses_fails_the_discard() {
        let rig = rig(THREE);
        tell(&rig, "lose 1");
        assert_eq!(rig.range(Op::Discard, Sector::ZERO, 240), Err(BlkError::Io));
        assert_eq!(rig.flush(), Err(BlkError::Io));
        tell(&rig, "lose 3");
        rig.range(Op::Discard, Sector::ZERO, 240).unwrap();
    }

    /// With legs of its own put aside the device would have none for what comes.
    #[test]
    fn a_discard_of_which_one_leg_is_given_back_is_done_anew_with_all() {
        let rig = rig(THREE);
        tell(&rig, "requeue 1");
        for _ in 0..5 {
            rig.start(Op::Discard, Sector::ZERO, None, 240);
            rig.start(Op::Flush, Sector::ZERO, None, 0);
        }
        assert_eq!(rig.ended(), (0, 0));
        assert_eq!(
            rig.disk("mem2").discards().len(),
            5,
            "those on their way end"
        );
        rig.mapped().suspend(Suspend::NoFlush).unwrap();
        rig.mapped().resume().unwrap();
        assert_eq!(rig.ended(), (10, 0));
        assert_eq!(rig.disk("mem1").discards().len(), 5);
        assert_eq!(rig.disk("mem2").discards().len(), 10);
    }

    #[test]
    fn flushes_through_several_rows_and_to_devices_need_one_bio_each() {
        let rows = "0 24 legs 8 mem0 0 mem1 0 mem2 0\n24 8 legs 8 mem0 64\n32 8 linear mem3 0\n";
        let rig = rig(rows);
        rig.flush().unwrap();
        let flushes = ["mem0", "mem1", "mem2", "mem3"].map(|disk| rig.disk(disk).flushes());
        assert_eq!(flushes, [2, 1, 1, 1]);
        rig.disk("mem2").set_mood(Mood::Fails(BlkError::NoSpace));
        assert_eq!(rig.flush(), Err(BlkError::NoSpace));
    }

    #[test]
    fn devices_below_are_named_also_where_flushes_go_through_the_target() {
        let rig = rig("0 24 legs 8 mem0 0 mem2 0\n24 8 linear mem2 64\n");
        let names: Vec<_> = rig
            .used()
            .iter()
            .map(|disk| disk.name().to_owned())
            .collect();
        assert_eq!(names, ["mem0", "mem2"]);
    }
}
