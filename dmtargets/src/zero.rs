//! `zero`: reads give zeros, writes are forgotten.
//!
//! Table: `zero`.

use std::fmt;

use blockstack::Op;

use crate::target::{Args, CtrError, DevRange, DmBio, MapResult, TableCx, Target};

/// See the module documentation.
pub struct Zero;

impl Target for Zero {
    const NAME: &'static str = "zero";
    type PerBio = ();

    fn new(args: &mut Args<'_>, _: &TableCx<'_>) -> Result<Self, CtrError> {
        args.finish()?;
        Ok(Self)
    }

    fn devices(&self) -> &[DevRange] {
        &[]
    }

    fn map(&self, mut bio: DmBio) -> MapResult {
        if bio.op() == Op::Read {
            bio.fill_each(|_, segment| segment.fill(0));
        }
        bio.complete(Ok(()));
        MapResult::Taken
    }

    fn table_args(&self, _: &mut dyn fmt::Write) -> fmt::Result {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use blockstack::Sector;

    use crate::testing::Rig;

    crate::target_contract_tests!(super::Zero, "zero", forgets);

    #[test]
    fn reads_give_zeros_after_a_write() {
        let rig = Rig::new("zero", 64);
        rig.write(Sector::new(3), &[7; 512]).unwrap();
        assert_eq!(rig.read(Sector::new(3), 1).unwrap(), [0; 512]);
    }
}
