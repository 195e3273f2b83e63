//! How a flush of a mapped device reaches everything below.
//!
//! Each device gets one flush, and each row that wants them as many as it says through its `map`,
//! as [duplicates](crate::duplicates) of the one.

use std::sync::Arc;

use blockstack::{
    Bio, BioFlags, BioSet, BlkError, BlkResult, DynDevice, Lanes, Op, Sector, Wait, submit_bio,
};

use crate::duplicates::{self, Leg, Legs, set_size};
use crate::mapped::{Live, LiveRef, finish, release};
use crate::table::TableRow;
use crate::target::FlushRoute;

/// Where flushes of one table go.
pub(crate) struct FlushPlan {
    /// Those that get one each.
    devices: Vec<Lanes>,
    /// Devices of all rows.
    below: Vec<DynDevice>,
    /// Rows that map an empty flush, and which of their flushes it is.
    through: Vec<(usize, usize)>,
    /// Whether a bio with data and a flush before it may carry the flush down itself.
    may_ride: bool,
    set: BioSet<FlushPad>,
}

#[derive(Default)]
struct FlushPad(Option<Leg>);

impl FlushPlan {
    pub(crate) fn new(rows: &[TableRow], bios: usize) -> Self {
        let mut devices: Vec<DynDevice> = Vec::new();
        let mut through = Vec::new();
        for (at, row) in rows.iter().enumerate() {
            for range in row.row.devices() {
                if !devices.iter().any(|dev| Arc::ptr_eq(dev, range.dev())) {
                    devices.push(range.dev().clone());
                }
            }
            if row.row.flush_route() == FlushRoute::ThroughMap {
                through.extend((0..row.row.duplicates(Op::Flush)).map(|nr| (at, nr)));
            }
        }
        // Of a row through which flushes are mapped the devices are the target's business.
        let own = |dev: &DynDevice| {
            rows.iter().any(|row| {
                let mut below = row.row.devices().iter();
                row.row.flush_route() == FlushRoute::EachDevice
                    && below.any(|range| Arc::ptr_eq(range.dev(), dev))
            })
        };
        let below = devices;
        let devices: Vec<_> = below
            .iter()
            .filter(|dev| own(dev))
            .map(Lanes::new)
            .collect();
        let all_below = rows.iter().all(|row| {
            row.row.flush_route() == FlushRoute::EachDevice && !row.row.devices().is_empty()
        });
        let may_ride =
            through.is_empty() && (devices.is_empty() || (devices.len() == 1 && all_below));
        Self {
            may_ride,
            set: BioSet::without_rescuer("dm-flush", set_size(devices.len(), bios)),
            devices,
            below,
            through,
        }
    }

    pub(crate) fn below(&self) -> &[DynDevice] {
        &self.below
    }

    pub(crate) fn may_ride(&self) -> bool {
        self.may_ride
    }
}

impl Legs for FlushPlan {
    fn count(&self) -> usize {
        self.devices.len() + self.through.len()
    }

    fn alloc(&self, live: &Live, _: &Bio, at: usize, wait: Wait) -> Option<Bio> {
        match at.checked_sub(self.devices.len()) {
            None => self.set.alloc(Op::Flush, wait),
            Some(at) => live.row(self.through[at].0)?.leg(Op::Flush, wait),
        }
    }

    fn send(&self, live: &LiveRef, at: usize, mut bio: Bio, mut leg: Leg) {
        if let Some(dev) = self.devices.get(at) {
            bio.set_lane(dev, Sector::ZERO);
            bio.set_end_io(flush_end);
            bio.pad_mut::<FlushPad>().0 = Some(leg);
            submit_bio(bio);
            return;
        }
        let (at, nr) = self.through[at - self.devices.len()];
        leg.nr = nr;
        let row = live.bound.rows[at].row.as_ref();
        row.map_leg(live, at, bio, leg);
    }
}

/// Flushes everything below for `parent`, and then does its write where it has data.
pub(crate) fn fan_out(live: &LiveRef, parent: Bio) {
    if live.bound.rows.is_empty() {
        parent.complete(Err(BlkError::NoDevice));
        return;
    }
    duplicates::fan_out(live, parent, &live.bound.flush, flushed);
}

fn flush_end(mut bio: Bio, res: BlkResult) {
    let leg = bio.pad_mut::<FlushPad>().0.take();
    drop(bio);
    if let Some(leg) = leg {
        leg.end(res);
    }
}

/// The flush for `parent` is over.
fn flushed(live: LiveRef, mut parent: Bio, res: BlkResult) {
    if res.is_err() || parent.is_empty() {
        finish(live, parent, res);
        return;
    }
    // Its write is to come. To map it may mean to wait for a clone, which an `end_io` must not, be
    // it on a thread that submits something else: what that has parked may be what is waited for.
    parent.set_flags(parent.flags().difference(BioFlags::PREFLUSH));
    live.queue_write(parent);
    release(live);
}
