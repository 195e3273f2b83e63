//! `striped`: chunks of the row in turn on several devices.
//!
//! Table: `striped <stripes> <chunk> (<device> <start>)*`; `chunk` and `start` in sectors. Status:
//! `<stripes> <device>* 1 <A or D for each>`, D for one that has failed a bio.
//!
//! ```text
//! chunk of the row   0 1 2 3 4 5 ..      on stripe   chunk % stripes
//! three stripes      0 1 2 0 1 2         at chunk    chunk / stripes
//! ```

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

use blockstack::units::SECTOR_SHIFT;
use blockstack::{BlkError, BlkResult, Limits, Op, Sector, SectorCount};

use crate::target::{Args, CtrError, DevRange, DmBio, MapResult, Notifier, TableCx, Target};

/// Where a sector of the row is: stripe, and sector of that.
type Place = (usize, u64);

/// See the module documentation.
pub struct Striped {
    legs: Vec<DevRange>,
    chunk: u64,
    failed: Vec<AtomicBool>,
    notifier: Notifier,
}

impl Striped {
    fn place(&self, sector: u64) -> Place {
        let (chunk, inside) = (sector / self.chunk, sector % self.chunk);
        let count = self.legs.len() as u64;
        let leg = (chunk % count) as usize;
        (leg, chunk / count * self.chunk + inside)
    }

    /// The first sector of stripe `leg` that holds something from `sector` of the row on.
    fn first(&self, sector: u64, leg: usize) -> u64 {
        let (of, at) = self.place(sector);
        if of == leg {
            return at;
        }
        let chunk = at - at % self.chunk;
        // Stripes before it have their part of this round of chunks behind them.
        if leg < of { chunk + self.chunk } else { chunk }
    }
}

impl Target for Striped {
    const NAME: &'static str = "striped";
    /// Which stripe.
    type PerBio = usize;
    const SENDS_ON: bool = true;

    fn new(args: &mut Args<'_>, cx: &TableCx<'_>) -> Result<Self, CtrError> {
        let count: u32 = args.number("stripes", 1..=u32::MAX)?;
        let chunk = args.sectors("chunk")?.raw();
        if args.left() as u64 != 2 * u64::from(count) {
            return Err(CtrError::Unfit("not a device and a start for each stripe"));
        }
        let len = cx.len().raw();
        if len % u64::from(count) != 0 {
            return Err(CtrError::Unfit("length is no multiple of the stripes"));
        }
        let width = len / u64::from(count);
        if width % chunk != 0 {
            return Err(CtrError::Unfit(
                "length of a stripe is no multiple of the chunk",
            ));
        }
        let mut legs = Vec::new();
        while args.left() > 0 {
            let dev = cx.open(args.word("device")?)?;
            let start = args.sector("start")?;
            legs.push(DevRange::new(dev, start, SectorCount::new(width))?);
        }
        cx.split_at(SectorCount::new(chunk));
        Ok(Self {
            failed: legs.iter().map(|_| AtomicBool::new(false)).collect(),
            legs,
            chunk,
            notifier: cx.notifier(),
        })
    }

    fn devices(&self) -> &[DevRange] {
        &self.legs
    }

    fn map(&self, mut bio: DmBio<usize>) -> MapResult<usize> {
        let start = bio.sector().raw();
        if bio.op().has_data() || self.legs.len() == 1 {
            let (leg, at) = self.place(start);
            *bio.data_mut() = leg;
            bio.remap_to(&self.legs[leg], Sector::new(at));
            return MapResult::Remapped(bio);
        }
        let leg = bio.nr();
        let from = self.first(start, leg);
        let to = self.first(start + bio.len().raw(), leg);
        if from >= to {
            bio.complete(Ok(()));
            return MapResult::Taken;
        }
        *bio.data_mut() = leg;
        let len = SectorCount::new(to - from);
        bio.remap_part(&self.legs[leg], Sector::new(from), len);
        MapResult::Remapped(bio)
    }

    fn end_io(&self, bio: &mut DmBio<usize>, res: BlkResult) -> BlkResult {
        if let Err(error) = res
            && error != BlkError::NotSupported
            && !self.failed[*bio.data_mut()].swap(true, Ordering::Relaxed)
        {
            self.notifier.notify();
        }
        res
    }

    fn duplicates(&self, _: Op) -> usize {
        self.legs.len()
    }

    fn limits(&self, limits: &mut Limits) {
        let bytes = (self.chunk << SECTOR_SHIFT).saturating_mul(self.legs.len() as u64);
        limits.optimal_io_size = u32::try_from(bytes).unwrap_or(0);
    }

    fn table_args(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        write!(out, "{} {}", self.legs.len(), self.chunk)?;
        self.legs
            .iter()
            .try_for_each(|leg| write!(out, " {} {}", leg.dev().name(), leg.start()))
    }

    fn status(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        write!(out, "{} ", self.legs.len())?;
        self.legs
            .iter()
            .try_for_each(|leg| write!(out, "{} ", leg.dev().name()))?;
        out.write_str("1 ")?;
        self.failed.iter().try_for_each(|failed| {
            let failed = failed.load(Ordering::Relaxed);
            out.write_char(if failed { 'D' } else { 'A' })
        })
    }
}

#[cfg(test)]
mod tests {
    use blockstack::{BlkError, Op, Sector};

    use crate::testing::{Mood, Rig};

    crate::target_contract_tests!(super::Striped, "striped 2 8 mem0 0 mem1 16");

    mod of_one {
        crate::target_contract_tests!(crate::striped::Striped, "striped 1 64 mem2 0");
    }

    mod of_four {
        crate::target_contract_tests!(
            crate::striped::Striped,
            "striped 4 1 mem0 0 mem1 1 mem2 2 mem3 3"
        );
    }

    #[test]
    fn chunks_go_round() {
        let rig = Rig::new("striped 3 4 mem0 0 mem1 100 mem2 0", 48);
        for chunk in 0..12u64 {
            rig.write(Sector::new(chunk * 4), &[chunk as u8; 2048])
                .unwrap();
        }
        let at = |sectors: [u64; 4]| sectors.map(Sector::new);
        assert_eq!(rig.disk("mem0").written(), at([0, 4, 8, 12]));
        assert_eq!(rig.disk("mem1").written(), at([100, 104, 108, 112]));
        assert_eq!(rig.disk("mem2").written(), at([0, 4, 8, 12]));
    }

    #[test]
    fn a_discard_reaches_each_stripe_it_touches_once_and_no_other() {
        let rig = Rig::new("striped 3 4 mem0 0 mem1 100 mem2 0", 48);
        // Chunks 1, 2 and half of 3, which is on the first again.
        rig.range(Op::Discard, Sector::new(4), 10).unwrap();
        let raw = |name: &str| -> Vec<(u64, u64)> {
            let discards = rig.disk(name).discards();
            discards
                .iter()
                .map(|(at, len)| (at.raw(), len.raw()))
                .collect()
        };
        assert_eq!(raw("mem0"), [(4, 2)]);
        assert_eq!(raw("mem1"), [(100, 4)]);
        assert_eq!(raw("mem2"), [(0, 4)]);
        rig.range(Op::Discard, Sector::new(1), 2).unwrap();
        assert_eq!(raw("mem1").len() + raw("mem2").len(), 2, "untouched");
    }

    #[test]
    fn the_status_names_the_stripe_that_failed() {
        let rig = Rig::new("striped 2 8 mem0 0 mem1 0", 64);
        assert_eq!(rig.mapped().status(), "0 64 striped 2 mem0 mem1 1 AA\n");
        let seen = rig.mapped().event_count();
        rig.disk("mem1").set_mood(Mood::Fails(BlkError::Io));
        rig.write(Sector::new(0), &[1; 512]).unwrap();
        assert_eq!(rig.write(Sector::new(8), &[1; 512]), Err(BlkError::Io));
        assert_eq!(rig.mapped().status(), "0 64 striped 2 mem0 mem1 1 AD\n");
        assert!(rig.mapped().event_count() > seen);
    }

    #[test]
    fn stripes_that_do_not_fit_are_named() {
        let rig = Rig::new("striped 2 8 mem0 0 mem1 0", 64);
        for (row, what) in [
            ("0 64 striped 0 8", "stripes: 0"),
            ("0 64 striped 2 0 mem0 0 mem1 0", "chunk: 0"),
            ("0 64 striped 3 8 mem0 0 mem1 0", "each stripe"),
            ("0 65 striped 2 8 mem0 0 mem1 0", "multiple of the stripes"),
            ("0 72 striped 2 8 mem0 0 mem1 0", "multiple of the chunk"),
            ("0 64 striped 2 8 mem0 0 mem1 4090", "mem1"),
        ] {
            let error = std::error::Error::source(&rig.table(row).unwrap_err())
                .map(ToString::to_string)
                .unwrap_or_default();
            assert!(error.contains(what), "{row}: {error}");
        }
    }
}
