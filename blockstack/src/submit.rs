//! Submission: recursion turned into iteration, depth first.
//!
//! A device's `submit` may submit further bios, to devices below or (the rest of a split) to
//! itself. Inside a submission these only go to a list of the thread; the outermost call works the
//! list off. New bios are sorted: those for other (lower) devices first, then those for the same
//! device, then what was there before. So stack depth costs no stack, and every bio allocated is
//! submitted before the next of its kind is needed:
//!
//! ```text
//! submit(A[0..16) on dm1)           list: -
//!   dm1: front A1 -> disk, rest A' -> dm1       list: A1(disk) A'(dm1)
//! pop A1: disk takes it             list: A'(dm1)
//! pop A': dm1 clones, maps -> disk  ...
//! ```

use std::cell::RefCell;
use std::collections::VecDeque;

use crate::bio::{Bio, BioFlags, Op};
use crate::error::BlkError;
use crate::lane::DevRef;
use crate::sync::prim::thread_local;

struct Lists {
    active: bool,
    /// Whether the thread will do nothing but wait for the bio it submits.
    stays: bool,
    /// Submitted by the device that is running now.
    new: VecDeque<Bio>,
    /// From before.
    old: VecDeque<Bio>,
}

impl Lists {
    const NONE: Self = Self {
        active: false,
        stays: false,
        new: VecDeque::new(),
        old: VecDeque::new(),
    };
}

thread_local! {
    static LISTS: RefCell<Lists> = const { RefCell::new(Lists::NONE) };
}

/// Whether the thread is inside a device's `submit`, where nothing may be waited for.
#[must_use]
pub fn in_submission() -> bool {
    LISTS
        .try_with(|lists| lists.borrow().active)
        .unwrap_or(false)
}

/// Takes the bios that `wanted` says from both of the thread's lists, in the order they would have
/// been submitted in, and gives them to `taker`. The others keep their order.
pub(crate) fn take_parked(wanted: impl Fn(&Bio) -> bool, mut taker: impl FnMut(Bio)) {
    let mut take = |which: fn(&mut Lists) -> &mut VecDeque<Bio>| {
        let count = LISTS.with_borrow_mut(|lists| which(lists).len());
        for _ in 0..count {
            // Once around: what stays goes to the back. Not borrowed while `taker` runs.
            let taken = LISTS.with_borrow_mut(|lists| {
                let list = which(lists);
                let bio = list.pop_front()?;
                if wanted(&bio) {
                    return Some(bio);
                }
                list.push_back(bio);
                None
            });
            if let Some(bio) = taken {
                taker(bio);
            }
        }
    };
    take(|lists| &mut lists.new);
    take(|lists| &mut lists.old);
}

/// As [`submit_bio`], for a thread that waits for the bio next and for nothing else: the device at
/// the bottom may do the system call itself, there and then, which saves waking two threads.
pub(crate) fn submit_and_stay(bio: Bio) {
    LISTS.with_borrow_mut(|lists| lists.stays = true);
    submit_bio(bio);
    LISTS.with_borrow_mut(|lists| lists.stays = false);
}

/// Whether the thread would do nothing better than the system calls of the bio it is submitting:
/// it waits for it, and no other bio waits to be submitted by it.
pub(crate) fn may_stay() -> bool {
    LISTS.with_borrow(|lists| {
        lists.active && lists.stays && lists.new.is_empty() && lists.old.is_empty()
    })
}

/// Sends a bio to the device it names. It ends through its `end_io`, perhaps before this returns.
pub fn submit_bio(bio: Bio) {
    let Some(bio) = checked(bio) else { return };
    let queued = LISTS.with_borrow_mut(|lists| {
        if lists.active {
            lists.new.push_back(bio);
            return None;
        }
        lists.active = true;
        Some(bio)
    });
    let Some(mut bio) = queued else { return };
    let _end = Outermost;
    loop {
        // The device may lose its last other reference while it has the bio.
        let Some(dev) = bio.dev_ref().cloned() else {
            bio.complete(Err(BlkError::NoDevice));
            return;
        };
        dev.stats().start(&mut bio);
        let on = dev.forward(bio).and_then(checked);
        match LISTS.with_borrow_mut(|lists| next(lists, on, &dev)) {
            Some(next) => bio = next,
            None => return,
        }
    }
}

/// Ends a bio that its device must not get.
#[inline]
fn checked(mut bio: Bio) -> Option<Bio> {
    match check(&mut bio) {
        Ok(()) => Some(bio),
        Err(error) => {
            bio.complete(Err(error));
            None
        }
    }
}

/// The bio to go on with after `dev` had its turn and sent on `on`.
#[inline]
fn next(lists: &mut Lists, on: Option<Bio>, dev: &DevRef) -> Option<Bio> {
    if lists.new.is_empty() {
        return on.or_else(|| lists.old.pop_front());
    }
    lists.new.extend(on);
    sort_new(lists, dev);
    lists.old.pop_front()
}

/// Lower devices, then the same, then what was there before; the result stands in `old`.
fn sort_new(lists: &mut Lists, dev: &DevRef) {
    let is_same = |bio: &Bio| bio.dev_ref().is_some_and(|other| other.is(dev));
    // From the back, so that `push_front` keeps the order: first the same device's, then the lower
    // ones, which so come to stand before them.
    for pass_same in [true, false] {
        let count = lists.new.len();
        for _ in 0..count {
            let Some(bio) = lists.new.pop_back() else {
                break;
            };
            if is_same(&bio) == pass_same {
                lists.old.push_front(bio);
            } else {
                lists.new.push_front(bio);
            }
        }
    }
}

/// Ends the outermost submission also when a device panics.
struct Outermost;

impl Drop for Outermost {
    fn drop(&mut self) {
        let left = LISTS.with_borrow_mut(|lists| {
            lists.active = false;
            if lists.new.is_empty() && lists.old.is_empty() {
                return (VecDeque::new(), VecDeque::new());
            }
            (
                std::mem::take(&mut lists.new),
                std::mem::take(&mut lists.old),
            )
        });
        // Empty unless unwinding; dropping a live bio ends it with an error.
        drop(left);
    }
}

#[inline]
fn check(bio: &mut Bio) -> Result<(), BlkError> {
    let Some(dev) = bio.dev_ref() else {
        return Err(BlkError::NoDevice);
    };
    if bio.op() == Op::Flush {
        return Ok(());
    }
    let bounds = dev.bounds();
    let end = bio.sector().checked_add(bio.len());
    let outside = end.is_none_or(|end| end.raw() > bounds.capacity.raw());
    let units = u64::from(bounds.logical_block_size >> crate::units::SECTOR_SHIFT);
    let uneven = units > 1 && (bio.sector().raw() | bio.len().raw()) & (units - 1) != 0;
    if outside || uneven || bio.is_empty() || (bounds.read_only && bio.op().is_write()) {
        return check_again(bio, dev, outside, uneven, bounds.read_only);
    }
    Ok(())
}

/// What is wrong with a bio that something seems to be wrong with.
#[cold]
fn check_again(
    bio: &Bio,
    dev: &DevRef,
    outside: bool,
    uneven: bool,
    read_only: bool,
) -> Result<(), BlkError> {
    if bio.op().is_write() && read_only {
        log::error!(
            "{}: write at sector {} refused, read-only",
            dev.name(),
            bio.sector()
        );
        return Err(BlkError::ReadOnly);
    }
    if outside {
        log::error!(
            "{}: {:?} of {} sectors at {} beyond the end at {}",
            dev.name(),
            bio.op(),
            bio.len(),
            bio.sector(),
            dev.capacity()
        );
        return Err(BlkError::OutOfRange);
    }
    let is_empty_flush = bio.is_empty() && bio.flags().contains(BioFlags::PREFLUSH);
    if uneven || (bio.is_empty() && !is_empty_flush) {
        return Err(BlkError::Unaligned);
    }
    Ok(())
}
