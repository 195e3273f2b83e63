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
    DevRange, DmBio, Event, FlushRoute, MapResult, Origin, TableCx, Target, Tio, Whose,
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

/// The sets of a mapped device: one for each kind of front pad. They outlive its tables.
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
            .or_insert_with(|| Box::new(BioSet::<Tio<P>>::for_clones(&self.name, self.limit)));
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
    /// Clones `parent`, which is the `row`th row's of `live` and begins at `sector` of that, and sends
    /// the clone on its way, or gives it back, with its parent, for the caller to do that.
    fn map(&self, live: &LiveRef, row: usize, sector: Sector, parent: Bio) -> Option<(Bio, Bio)>;
    /// How a clone that [`Self::map`] gave back learns whose it is.
    fn teller(&self) -> Tell;
    /// Allocates one of several duplicates.
    fn leg(&self, op: Op, wait: Wait) -> Option<Bio>;
    /// Sends a duplicate, of [`Self::leg`], on its way; the row is the `row`th of `live`.
    fn map_leg(&self, live: &LiveRef, row: usize, bio: Bio, leg: Leg);
    /// Takes a bio that has ended, and says what that ends with for which it was made.
    fn end(&self, bio: Bio, whose: &Whose, res: BlkResult) -> BlkResult;
    /// Threads that wait for a clone.
    #[cfg(test)]
    fn waiting(&self) -> usize;
}

/// Tells a clone its parent, with the reference of that to the table, and the row.
pub(crate) type Tell = fn(&mut Bio, Bio, LiveRef, usize);

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

    /// Has the target map a bio that knows whose it is, and sends it on or puts it off.
    fn map_told(&self, bio: Bio) {
        match self.target.map(DmBio::new(bio)) {
            MapResult::Remapped(bio) => submit_bio(bio.bio),
            MapResult::Taken => {}
            MapResult::Requeue(mut bio) => {
                let origin = bio.bio.pad_mut::<Tio<T::PerBio>>().origin.take();
                drop(bio);
                if let Some(Origin { whose, live, .. }) = origin {
                    put_off(live, whose);
                }
            }
        }
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

    fn map(&self, live: &LiveRef, row: usize, sector: Sector, parent: Bio) -> Option<(Bio, Bio)> {
        let set = self.set.get();
        let clone = set.and_then(|set| set.alloc(parent.op(), Wait::Yes));
        let Some(mut clone) = clone else {
            parent.complete(Err(BlkError::NoMemory));
            return None;
        };
        clone.clone_from_parent(&parent, sector);
        clone.set_end_io(end_io::<T::PerBio>);
        if T::SENDS_ON {
            return match self.target.map(DmBio::new(clone)) {
                MapResult::Remapped(DmBio { bio: clone, .. }) => Some((clone, parent)),
                MapResult::Requeue(clone) => {
                    // It names the parent's memory.
                    drop(clone);
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
        tell_clone::<T::PerBio>(&mut clone, parent, live, row);
        self.map_told(clone);
        None
    }

    fn teller(&self) -> Tell {
        tell_clone::<T::PerBio>
    }

    fn leg(&self, op: Op, wait: Wait) -> Option<Bio> {
        self.legs.get()?.alloc(op, wait)
    }

    fn map_leg(&self, live: &LiveRef, row: usize, mut bio: Bio, leg: Leg) {
        bio.set_end_io(end_io::<T::PerBio>);
        bio.pad_mut::<Tio<T::PerBio>>().nr = leg.nr;
        tell::<T::PerBio>(&mut bio, Whose::Leg(leg), again(live), row);
        self.map_told(bio);
    }

    #[cfg(test)]
    fn waiting(&self) -> usize {
        self.set.get().map_or(0, BioSet::waiting)
    }

    #[inline]
    fn end(&self, bio: Bio, whose: &Whose, res: BlkResult) -> BlkResult {
        let set = match whose {
            Whose::Clone(_) => self.set.get(),
            Whose::Leg(_) => self.legs.get(),
        };
        let mut bio = DmBio::new(bio);
        let res = self.target.end_io(&mut bio, res);
        if size_of::<T::PerBio>() > 0 {
            *bio.data_mut() = T::PerBio::default();
        }
        match set {
            Some(set) => set.give_back(bio.bio),
            None => drop(bio),
        }
        res
    }
}

#[inline]
fn tell<P: Default + Send + 'static>(bio: &mut Bio, whose: Whose, live: LiveRef, row: usize) {
    let told = &mut bio.pad_mut::<Tio<P>>().origin;
    debug_assert!(told.is_none(), "a bio made for two");
    if told.is_none() {
        *told = Some(Origin { whose, live, row });
    }
}

fn tell_clone<P>(clone: &mut Bio, parent: Bio, live: LiveRef, row: usize)
where
    P: Default + Send + 'static,
{
    tell::<P>(clone, Whose::Clone(parent), live, row);
}

/// Holds what a bio was made for until the next resume.
fn put_off(live: LiveRef, whose: Whose) {
    match whose {
        Whose::Clone(parent) => requeue(live, parent),
        Whose::Leg(leg) => leg.requeue(),
    }
}

fn end_io<P: Default + Send + 'static>(mut bio: Bio, res: BlkResult) {
    let Some(Origin { whose, live, row }) = bio.pad_mut::<Tio<P>>().origin.take() else {
        return;
    };
    // It names the memory of the one it was made for, so it goes first.
    let res = match live.row(row) {
        Some(row) => row.end(bio, &whose, res),
        None => {
            drop(bio);
            res
        }
    };
    match whose {
        Whose::Clone(parent) => finish(live, parent, res),
        Whose::Leg(leg) => {
            // The one that has all legs tells a suspend.
            drop(live);
            leg.end(res);
        }
    }
}
