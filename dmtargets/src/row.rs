//! A target with its type erased, once.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::fmt;
use std::sync::OnceLock;

use blockstack::sync::{Mutex, Rank};
use blockstack::{Bio, BioSet, BlkError, BlkResult, Limits, Op, Sector, Wait, submit_bio};

use crate::args::{Args, CtrError};
use crate::duplicates::{Leg, set_size};
use crate::mapped::{LiveRef, again, finish, requeue};
use crate::target::{
    DevRange, DmBio, Event, FlushRoute, LegOrigin, MapResult, Origin, TableCx, Target, Tio,
};

/// A set of any pad.
trait Pool: Any + Send + Sync {
    fn forget_devices(&self);
}

impl<P: Default + Send + 'static> Pool for BioSet<Tio<P>> {
    fn forget_devices(&self) {
        BioSet::forget_devices(self);
    }
}

/// The sets of a mapped device: one for each kind of front pad. They outlive its tables, and have no
/// rescuers; see [`mapped`](crate::mapped#forward-progress).
pub(crate) struct Sets {
    name: String,
    pub(crate) limit: usize,
    by_pad: Mutex<HashMap<TypeId, Box<dyn Pool>>>,
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
            .or_insert_with(|| Box::new(BioSet::<Tio<P>>::keeping_devices(&self.name, self.limit)));
        let there: &dyn Any = there.as_ref();
        match there.downcast_ref::<BioSet<Tio<P>>>() {
            Some(set) => set.clone(),
            None => unreachable!("a set is entered under the type of its pad"),
        }
    }

    /// Lets go of the devices below that free clones still name.
    pub(crate) fn forget_devices(&self) {
        let by_pad = self.by_pad.lock_nested();
        by_pad.values().for_each(|set| set.forget_devices());
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
    /// and sends the clone on its way, or gives it back for the caller to do that.
    fn map(&self, live: &LiveRef, row: usize, start: Sector, parent: Bio) -> Option<Mapped>;
    /// Takes a clone that has ended, and says what its parent ends with.
    fn end(&self, clone: Bio, res: BlkResult) -> BlkResult;
    /// Allocates one of several duplicates.
    fn leg(&self, op: Op, wait: Wait) -> Option<Bio>;
    /// Sends a duplicate, of [`Self::leg`], on its way; it begins at `sector` of the row, which is
    /// the `row`th of `live`.
    fn map_leg(&self, live: &LiveRef, row: usize, sector: Sector, bio: Bio, leg: Leg);
    /// Takes the duplicate `nr` that has ended, and says what it ends with.
    fn end_leg(&self, bio: Bio, nr: usize, res: BlkResult) -> BlkResult;
    /// Threads that wait for a clone.
    #[cfg(test)]
    fn waiting(&self) -> usize;
}

/// A mapped clone that has to be told whose it is.
pub(crate) struct Mapped {
    clone: Bio,
    parent: Bio,
    tell: fn(&mut Bio, Bio, LiveRef, usize),
}

impl Mapped {
    /// The clone, with the reference of its parent to the table.
    #[inline]
    pub(crate) fn told(self, live: LiveRef, row: usize) -> Bio {
        let Self {
            mut clone,
            parent,
            tell,
        } = self;
        tell(&mut clone, parent, live, row);
        clone
    }
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

    fn map(&self, live: &LiveRef, row: usize, start: Sector, parent: Bio) -> Option<Mapped> {
        let set = self.set.get();
        let clone = set.and_then(|set| set.alloc(parent.op(), Wait::Yes));
        let Some(mut clone) = clone else {
            parent.complete(Err(BlkError::NoMemory));
            return None;
        };
        clone.clone_from_parent(&parent);
        clone.set_end_io(clone_end::<T::PerBio>);
        let sector = Sector::new(parent.sector().raw().saturating_sub(start.raw()));
        if T::SENDS_ON {
            return match self.target.map(DmBio::new(clone, sector)) {
                MapResult::Remapped(DmBio { bio: clone, .. }) => Some(Mapped {
                    clone,
                    parent,
                    tell: tell::<T::PerBio>,
                }),
                MapResult::Requeue(_) => {
                    requeue(again(live), parent);
                    None
                }
                MapResult::Taken => {
                    debug_assert!(false, "{} kept a bio", T::NAME);
                    parent.complete(Err(BlkError::Io));
                    None
                }
            };
        }
        // It may end, on another thread, before `map` returns.
        let live = again(live);
        tell::<T::PerBio>(&mut clone, parent, live, row);
        match self.target.map(DmBio::new(clone, sector)) {
            MapResult::Remapped(bio) => submit_bio(bio.bio),
            MapResult::Taken => {}
            MapResult::Requeue(mut bio) => {
                let origin = bio.bio.pad_mut::<Tio<T::PerBio>>().origin.take();
                drop(bio);
                if let Some(Origin { parent, live, .. }) = origin {
                    requeue(live, parent);
                }
            }
        }
        None
    }

    #[inline]
    fn end(&self, clone: Bio, res: BlkResult) -> BlkResult {
        let sector = clone.sector();
        let mut bio = DmBio::new(clone, sector);
        let res = self.target.end_io(&mut bio, res);
        if size_of::<T::PerBio>() > 0 {
            *bio.data_mut() = T::PerBio::default();
        }
        match self.set.get() {
            Some(set) => set.give_back(bio.bio),
            None => drop(bio),
        }
        res
    }

    fn leg(&self, op: Op, wait: Wait) -> Option<Bio> {
        self.legs.get()?.alloc(op, wait)
    }

    fn map_leg(&self, live: &LiveRef, row: usize, sector: Sector, mut bio: Bio, leg: Leg) {
        bio.set_end_io(leg_end::<T::PerBio>);
        let nr = leg.nr;
        bio.pad_mut::<Tio<T::PerBio>>().leg = Some(LegOrigin {
            live: again(live),
            leg,
            row,
        });
        match self.target.map(DmBio::leg(bio, sector, nr)) {
            MapResult::Remapped(bio) => submit_bio(bio.bio),
            MapResult::Taken => {}
            MapResult::Requeue(mut bio) => {
                let origin = bio.bio.pad_mut::<Tio<T::PerBio>>().leg.take();
                drop(bio);
                if let Some(LegOrigin { leg, .. }) = origin {
                    leg.requeue();
                }
            }
        }
    }

    fn end_leg(&self, bio: Bio, nr: usize, res: BlkResult) -> BlkResult {
        let sector = bio.sector();
        let mut bio = DmBio::leg(bio, sector, nr);
        self.target.end_io(&mut bio, res)
    }

    #[cfg(test)]
    fn waiting(&self) -> usize {
        self.set.get().map_or(0, BioSet::waiting)
    }
}

fn leg_end<P: Default + Send + 'static>(mut bio: Bio, res: BlkResult) {
    let Some(LegOrigin { leg, live, row }) = bio.pad_mut::<Tio<P>>().leg.take() else {
        return;
    };
    let res = match live.row(row) {
        Some(row) => row.end_leg(bio, leg.nr, res),
        None => {
            drop(bio);
            res
        }
    };
    // The one that has all legs tells a suspend.
    drop(live);
    leg.end(res);
}

fn tell<P: Default + Send + 'static>(clone: &mut Bio, parent: Bio, live: LiveRef, row: usize) {
    let told = &mut clone.pad_mut::<Tio<P>>().origin;
    debug_assert!(told.is_none(), "a clone of two bios");
    if told.is_none() {
        *told = Some(Origin { parent, live, row });
    }
}

fn clone_end<P: Default + Send + 'static>(mut clone: Bio, res: BlkResult) {
    let Some(Origin { parent, live, row }) = clone.pad_mut::<Tio<P>>().origin.take() else {
        return;
    };
    // The clone names the parent's memory, so it goes first.
    let res = match live.row(row) {
        Some(row) => row.end(clone, res),
        None => {
            drop(clone);
            res
        }
    };
    finish(live, parent, res);
}
