//! `error`: every read and write fails.
//!
//! Table: `error`.

use std::fmt;

use blockstack::BlkError;

use crate::target::{Args, CtrError, DevRange, DmBio, MapResult, TableCx, Target};

/// See the module documentation.
pub struct Error;

impl Target for Error {
    const NAME: &'static str = "error";
    type PerBio = ();

    fn new(args: &mut Args<'_>, _: &TableCx<'_>) -> Result<Self, CtrError> {
        args.finish()?;
        Ok(Self)
    }

    fn devices(&self) -> &[DevRange] {
        &[]
    }

    fn map(&self, bio: DmBio) -> MapResult {
        bio.complete(Err(BlkError::Io));
        MapResult::Taken
    }

    fn table_args(&self, _: &mut dyn fmt::Write) -> fmt::Result {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use blockstack::{BlkError, Sector};

    use crate::testing::Rig;

    crate::target_contract_tests!(super::Error, "error", fails);

    #[test]
    fn reads_and_writes_fail() {
        let rig = Rig::new("error", 64);
        assert_eq!(rig.write(Sector::new(3), &[7; 512]), Err(BlkError::Io));
        assert_eq!(rig.read(Sector::new(3), 1), Err(BlkError::Io));
    }
}
