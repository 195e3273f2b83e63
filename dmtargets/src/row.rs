//! A target with its type erased, once.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, OnceLock};

use blockstack::sync::{Mutex, Rank};
use blockstack::{Bio, BioSet, BlkError, BlkResult, Limits, Op, Sector, Wait, submit_bio};

use crate::args::{Args, CtrError};
use crate::duplicates::{Leg, set_size};
use crate::mapped::{Live, finish};
use crate::target::{DevRange, DmBio, Event, FlushRoute, MapResult, TableCx, Target, Tio};

/// The sets of a mapped device: one for each kind of front pad. They outlive its tables, and have no
/// rescuers; see [`mapped`](crate::mapped#forward-progress).
pub(crate) struct Sets {
    name: String,
    pub(crate) limit: usize,
    by_pad: Mutex<HashMap<TypeId, Box<dyn Any + Send + Sync>>>,
}

impl Sets {
    pub(crate) fn new(name: &str, limit: usize) -> Self {
        Self {
            name: name.to_owned(),
            limit,
            by_pad: Mutex::new(Rank::Pool, HashMap::new()),
        }
    }

    fn of<P: Default + Send + 'static>(&self) -> BioSet<Tio<P>> {
        let mut by_pad = self.by_pad.lock_nested();
        let there = by_pad
            .entry(TypeId::of::<P>())
            .or_insert_with(|| Box::new(BioSet::<Tio<P>>::without_rescuer(&self.name, self.limit)));
        match there.downcast_ref::<BioSet<Tio<P>>>() {
            Some(set) => set.clone(),
            None => unreachable!("a set is entered under the type of its pad"),
        }
    }
}

pub(crate) trait Row: Any + Send + Sync {
    fn name(&self) -> &'static str;
    fn devices(&self) -> &[DevRange];
    fn table_args(&self, out: &mut dyn fmt::Write) -> fmt::Result;
    fn status(&self, out: &mut dyn fmt::Write) -> fmt::Result;
    fn limits(&self, limits: &mut Limits);
    fn flush_route(&self) -> FlushRoute;
    fn duplicates(&self, op: Op) -> usize;
    fn event(&self, event: Event) -> BlkResult;
    fn message(&self, args: &mut Args<'_>) -> Result<String, CtrError>;
    /// Gives the row the sets of its device.
    fn bind(&self, sets: &Sets);
    /// Clones `parent`, which lies in the row that begins at `start` and is the `row`th of `live`,
    /// and sends the clone on its way.
    fn map(&self, live: &Arc<Live>, row: usize, start: Sector, parent: Bio);
    /// Allocates one of several duplicates.
    fn leg(&self, op: Op, wait: Wait) -> Option<Bio>;
    /// Sends a duplicate, of [`Self::leg`], on its way; it begins at `sector` of the row, which is
    /// the `row`th of `live`.
    fn map_leg(&self, live: &Arc<Live>, row: usize, sector: Sector, bio: Bio, leg: Leg);
    /// Threads that wait for a clone.
    #[cfg(test)]
    fn waiting(&self) -> usize;
}

pub(crate) struct Typed<T: Target> {
    target: T,
    set: OnceLock<BioSet<Tio<T::PerBio>>>,
    /// Where the target wants several bios for one.
    legs: OnceLock<BioSet<Tio<T::PerBio>>>,
}

impl<T: Target> Typed<T> {
    pub(crate) fn boxed(target: T) -> Box<dyn Row> {
        Box::new(Self {
            target,
            set: OnceLock::new(),
            legs: OnceLock::new(),
        })
    }

    /// How many bios of the row's own set of duplicates one bio needs.
    fn most_legs(&self) -> usize {
        let several = |op| Some(self.target.duplicates(op)).filter(|&count| count > 1);
        let flushes = match self.target.flush_route() {
            FlushRoute::ThroughMap => self.target.duplicates(Op::Flush),
            FlushRoute::EachDevice => 0,
        };
        let ranges = [Op::Discard, Op::WriteZeroes]
            .into_iter()
            .filter_map(several);
        ranges.fold(flushes, usize::max)
    }
}

/// Makes a row of the words after the name; what a registry holds.
pub(crate) fn construct<T: Target>(
    args: &mut Args<'_>,
    cx: &TableCx<'_>,
) -> Result<Box<dyn Row>, CtrError> {
    let target = T::new(args, cx)?;
    args.finish()?;
    Ok(Typed::boxed(target))
}

impl<T: Target> Row for Typed<T> {
    fn name(&self) -> &'static str {
        T::NAME
    }

    fn devices(&self) -> &[DevRange] {
        self.target.devices()
    }

    fn table_args(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        self.target.table_args(out)
    }

    fn status(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        self.target.status(out)
    }

    fn limits(&self, limits: &mut Limits) {
        self.target.limits(limits);
    }

    fn flush_route(&self) -> FlushRoute {
        self.target.flush_route()
    }

    fn duplicates(&self, op: Op) -> usize {
        self.target.duplicates(op)
    }

    fn event(&self, event: Event) -> BlkResult {
        self.target.event(event)
    }

    fn message(&self, args: &mut Args<'_>) -> Result<String, CtrError> {
        self.target.message(args)
    }

    fn bind(&self, sets: &Sets) {
        self.set.get_or_init(|| sets.of::<T::PerBio>());
        let most = self.most_legs();
        if most > 0 {
            let size = set_size(most, sets.limit);
            self.legs
                .get_or_init(|| BioSet::without_rescuer(&sets.name, size));
        }
    }

    fn map(&self, live: &Arc<Live>, row: usize, start: Sector, parent: Bio) {
        let clone = self
            .set
            .get()
            .and_then(|set| set.alloc(parent.op(), Wait::Yes));
        let Some(mut clone) = clone else {
            parent.complete(Err(BlkError::NoMemory));
            return;
        };
        clone.clone_from_parent(&parent);
        clone.set_end_io(clone_end::<T>);
        let sector = Sector::new(parent.sector().raw().saturating_sub(start.raw()));
        let tio = clone.pad_mut::<Tio<T::PerBio>>();
        tio.parent = Some(parent);
        tio.live = Some(live.clone());
        tio.row = row;
        match self.target.map(DmBio::new(clone, sector)) {
            MapResult::Remapped(bio) => submit_bio(bio.bio),
            MapResult::Taken => {}
            MapResult::Requeue(mut bio) => {
                let tio = bio.bio.pad_mut::<Tio<T::PerBio>>();
                if let (Some(parent), Some(live)) = (tio.parent.take(), tio.live.take()) {
                    drop(bio);
                    live.requeue(parent);
                }
            }
        }
    }

    fn leg(&self, op: Op, wait: Wait) -> Option<Bio> {
        self.legs.get()?.alloc(op, wait)
    }

    fn map_leg(&self, live: &Arc<Live>, row: usize, sector: Sector, mut bio: Bio, leg: Leg) {
        bio.set_end_io(leg_end::<T>);
        let nr = leg.nr;
        let tio = bio.pad_mut::<Tio<T::PerBio>>();
        tio.leg = Some(leg);
        tio.live = Some(live.clone());
        tio.row = row;
        match self.target.map(DmBio::leg(bio, sector, nr)) {
            MapResult::Remapped(bio) => submit_bio(bio.bio),
            MapResult::Taken => {}
            MapResult::Requeue(mut bio) => {
                let tio = bio.bio.pad_mut::<Tio<T::PerBio>>();
                let leg = tio.leg.take();
                drop(bio);
                if let Some(leg) = leg {
                    leg.requeue();
                }
            }
        }
    }

    #[cfg(test)]
    fn waiting(&self) -> usize {
        self.set.get().map_or(0, BioSet::waiting)
    }
}

fn leg_end<T: Target>(mut bio: Bio, res: BlkResult) {
    let tio = bio.pad_mut::<Tio<T::PerBio>>();
    let (Some(leg), Some(live), row) = (tio.leg.take(), tio.live.take(), tio.row) else {
        return;
    };
    let sector = bio.sector();
    let mut bio = DmBio::leg(bio, sector, leg.nr);
    let typed: Option<&Typed<T>> = live
        .row(row)
        .and_then(|row| (row as &dyn Any).downcast_ref());
    let res = match typed {
        Some(typed) => typed.target.end_io(&mut bio, res),
        None => res,
    };
    drop(bio);
    // The one that has all legs tells a suspend.
    drop(live);
    leg.end(res);
}

fn clone_end<T: Target>(mut clone: Bio, res: BlkResult) {
    let tio = clone.pad_mut::<Tio<T::PerBio>>();
    let (Some(parent), Some(live), row) = (tio.parent.take(), tio.live.take(), tio.row) else {
        return;
    };
    let sector = clone.sector();
    let mut bio = DmBio::new(clone, sector);
    let typed: Option<&Typed<T>> = live
        .row(row)
        .and_then(|row| (row as &dyn Any).downcast_ref());
    let res = match typed {
        Some(typed) => typed.target.end_io(&mut bio, res),
        None => res,
    };
    // The clone names the parent's memory, so it goes first.
    drop(bio);
    finish(live, parent, res);
}
