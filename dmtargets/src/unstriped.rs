//! `unstriped`: one stripe of what something else has striped over one device.
//!
//! Table: `unstriped <stripes> <chunk> <stripe> <device> <start>`; stripes count from 0, `chunk` and
//! `start` in sectors.

use std::fmt;

use blockstack::{Sector, SectorCount};

use crate::target::{Args, CtrError, DevRange, DmBio, MapResult, TableCx, Target};

/// See the module documentation.
pub struct Unstriped {
    stripes: u64,
    chunk: u64,
    stripe: u64,
    /// From the first chunk of the first stripe to the end of the last of this one.
    lower: [DevRange; 1],
}

impl Target for Unstriped {
    const NAME: &'static str = "unstriped";
    type PerBio = ();
    const SENDS_ON: bool = true;

    fn new(args: &mut Args<'_>, cx: &TableCx<'_>) -> Result<Self, CtrError> {
        let stripes: u32 = args.number("stripes", 1..=u32::MAX)?;
        let chunk: u32 = args.number("chunk", 1..=u32::MAX)?;
        let stripe: u32 = args.number("stripe", 0..=stripes - 1)?;
        let dev = cx.open(args.word("device")?)?;
        let start = args.sector("start")?;
        args.finish()?;
        let (stripes, chunk, stripe) = (stripes.into(), u64::from(chunk), u64::from(stripe));
        let chunks = cx.len().raw() / chunk;
        if cx.len().raw() % chunk != 0 {
            return Err(CtrError::Unfit("length is no multiple of the chunk"));
        }
        let before = (chunks - 1)
            .checked_mul(stripes)
            .and_then(|before| (before + stripe + 1).checked_mul(chunk))
            .ok_or(CtrError::Unfit("a stripe longer than any device"))?;
        let lower = [DevRange::new(dev, start, SectorCount::new(before))?];
        cx.split_at(SectorCount::new(chunk));
        Ok(Self {
            stripes,
            chunk,
            stripe,
            lower,
        })
    }

    fn devices(&self) -> &[DevRange] {
        &self.lower
    }

    fn map(&self, mut bio: DmBio) -> MapResult {
        let (chunk, inside) = (
            bio.sector().raw() / self.chunk,
            bio.sector().raw() % self.chunk,
        );
        let at = (chunk * self.stripes + self.stripe) * self.chunk + inside;
        bio.remap_to(&self.lower[0], Sector::new(at));
        MapResult::Remapped(bio)
    }

    fn table_args(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        let [lower] = &self.lower;
        let (name, start) = (lower.dev().name(), lower.start());
        write!(
            out,
            "{} {} {} {name} {start}",
            self.stripes, self.chunk, self.stripe
        )
    }
}

#[cfg(test)]
mod tests {
    use blockstack::Sector;

    use crate::testing::Rig;

    crate::target_contract_tests!(super::Unstriped, "unstriped 3 8 1 mem0 16");

    #[test]
    fn chunks_are_those_of_one_stripe() {
        let rig = Rig::new("unstriped 3 4 1 mem0 100", 16);
        rig.write(Sector::new(0), &[1; 16 * 512]).unwrap();
        let written: Vec<u64> = rig
            .disk("mem0")
            .written()
            .iter()
            .map(|at| at.raw())
            .collect();
        assert_eq!(written, [104, 116, 128, 140]);
    }

    #[test]
    fn what_is_striped_again_is_what_it_was() {
        let table = "0 64 unstriped 2 8 0 mem0 0\n64 64 unstriped 2 8 1 mem0 0";
        let rig = Rig::of_table(table, crate::testing::RigConfig::default());
        rig.write(Sector::new(0), &[1; 64 * 512]).unwrap();
        rig.write(Sector::new(64), &[2; 64 * 512]).unwrap();
        let plain = rig.table("0 128 linear mem0 0").unwrap();
        rig.mapped().load(plain).unwrap();
        rig.mapped().resume().unwrap();
        for chunk in 0..16 {
            let content = rig.read(Sector::new(chunk * 8), 8).unwrap();
            assert_eq!(content, [1 + (chunk % 2) as u8; 4096], "chunk {chunk}");
        }
    }
}
