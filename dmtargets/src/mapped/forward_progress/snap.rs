//! `snap`: a target with a lock that a bio takes in `map` and gives back at its end, as a snapshot
//! does while it copies.
//!
//! Table: `snap <device>`. Against the contract it waits in `map`, and with a lock nobody ranks: the
//! point is that what it waits for is on its way, never parked behind its own thread.

use std::fmt;

use blockstack::{BlkResult, Sector, SectorCount};
use parking_lot::{Condvar, Mutex};

use crate::args::{Args, CtrError};
use crate::target::{DevRange, DmBio, MapResult, TableCx, Target};

#[derive(Default)]
struct State {
    taken: bool,
    /// Threads that wait in `map`.
    blocked: usize,
}

/// See the module's documentation.
pub(super) struct Snap {
    lower: [DevRange; 1],
    state: Mutex<State>,
    free: Condvar,
}

impl Target for Snap {
    const NAME: &'static str = "snap";
    type PerBio = ();

    fn new(args: &mut Args<'_>, cx: &TableCx<'_>) -> Result<Self, CtrError> {
        let dev = cx.open(args.word("device")?)?;
        cx.split_at(SectorCount::new(8));
        Ok(Self {
            lower: [DevRange::new(dev, Sector::ZERO, cx.len())?],
            state: Mutex::default(),
            free: Condvar::new(),
        })
    }
    fn devices(&self) -> &[DevRange] {
        &self.lower
    }
    fn map(&self, mut bio: DmBio) -> MapResult {
        let mut state = self.state.lock();
        state.blocked += 1;
        while state.taken {
            self.free.wait(&mut state);
        }
        state.blocked -= 1;
        state.taken = true;
        drop(state);
        bio.remap(&self.lower[0]);
        MapResult::Remapped(bio)
    }
    fn end_io(&self, _: &mut DmBio, res: BlkResult) -> BlkResult {
        self.state.lock().taken = false;
        self.free.notify_one();
        res
    }
    /// Whether the lock is taken, and how many threads wait for it.
    fn message(&self, _: &mut Args<'_>) -> Result<String, CtrError> {
        let state = self.state.lock();
        Ok(format!("{} {}", state.taken, state.blocked))
    }
    fn table_args(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        write!(out, "{}", self.lower[0].dev().name())
    }
}
