//! `linear`: one contiguous range of one device.
//!
//! Table: `linear <device> <start>`; `start` in sectors of `<device>`.

use std::fmt;

use crate::target::{Args, CtrError, DevRange, DmBio, MapResult, TableCx, Target};

/// See the module documentation.
pub struct Linear {
    lower: [DevRange; 1],
}

impl Linear {
    /// Makes a target that maps to `lower`.
    #[must_use]
    pub fn over(lower: DevRange) -> Self {
        Self { lower: [lower] }
    }
}

impl Target for Linear {
    const NAME: &'static str = "linear";
    type PerBio = ();
    const SENDS_ON: bool = true;

    fn new(args: &mut Args<'_>, cx: &TableCx<'_>) -> Result<Self, CtrError> {
        let dev = cx.open(args.word("device")?)?;
        let start = args.sector("start")?;
        args.finish()?;
        // `DevRange::new` refuses a range that runs past the end of `dev`.
        Ok(Self::over(DevRange::new(dev, start, cx.len())?))
    }

    fn devices(&self) -> &[DevRange] {
        &self.lower
    }

    fn map(&self, mut bio: DmBio) -> MapResult {
        bio.remap(&self.lower[0]); // sets device and sector together
        MapResult::Remapped(bio)
    }

    fn table_args(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        let [lower] = &self.lower;
        write!(out, "{} {}", lower.dev().name(), lower.start())
    }
}

#[cfg(test)]
mod tests {
    use blockstack::Sector;

    use crate::testing::Rig;

    crate::target_contract_tests!(super::Linear, "linear mem0 8");

    #[test]
    fn start_is_added_to_the_sector() {
        let rig = Rig::new("linear mem0 8", 64);
        rig.write(Sector::new(3), &[7; 512]).unwrap();
        assert_eq!(rig.disk("mem0").written(), [Sector::new(11)]);
    }
}
