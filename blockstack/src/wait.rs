//! Bios that a thread waits for.

use std::cell::Cell;
use std::sync::Arc;

use crate::bio::{Bio, BioFlags, Op};
use crate::bio_set::BioSet;
use crate::buf::Buf;
use crate::device::DynDevice;
use crate::error::{BlkError, BlkResult};
use crate::submit::submit_and_stay;
use crate::sync::prim::{Global, thread_local};
use crate::sync::{Condvar, Mutex, Rank, assert_may_wait};
use crate::units::{Sector, SectorCount};

#[derive(Default)]
struct WaitPad(Option<Arc<Waiter>>);

struct Waiter {
    done: Mutex<Option<(Bio, BlkResult)>>,
    woken: Condvar,
}

thread_local! {
    // A thread waits for one bio at a time; waiter and bio are used again. As the bio is the
    // thread's own, no device that swallows bios can keep it from another device.
    static WAITER: Arc<Waiter> = Arc::new(Waiter {
        done: Mutex::new(Rank::Pool, None),
        woken: Condvar::new(),
    });
    static OWN: Cell<Option<Bio>> = const { Cell::new(None) };
}

fn set() -> &'static BioSet<WaitPad> {
    static SET: Global<BioSet<WaitPad>> = Global::new(|| BioSet::new("wait", 1));
    SET.get()
}

fn end_io(mut bio: Bio, res: BlkResult) {
    let Some(waiter) = bio.pad_mut::<WaitPad>().0.take() else {
        return;
    };
    *waiter.done.lock_nested() = Some((bio, res));
    waiter.woken.notify_one();
}

/// Submits a bio built by `fill` and waits for its end. Request context only.
fn run(op: Op, fill: impl FnOnce(&mut Bio) -> BlkResult) -> (Option<Buf>, BlkResult) {
    assert_may_wait();
    let mut bio = OWN.take().unwrap_or_else(|| set().alloc_own());
    bio.reset(op);
    if let Err(error) = fill(&mut bio) {
        bio.reset(op);
        OWN.set(Some(bio));
        return (None, Err(error));
    }
    let waiter = WAITER.with(Arc::clone);
    bio.pad_mut::<WaitPad>().0 = Some(waiter.clone());
    bio.set_end_io(end_io);
    submit_and_stay(bio);
    let mut done = waiter.done.lock_nested();
    loop {
        if let Some((mut bio, res)) = done.take() {
            drop(done);
            let buf = bio.take_buf();
            // Lets go of the device.
            bio.reset(op);
            OWN.set(Some(bio));
            return (buf, res);
        }
        waiter.woken.wait(&mut done);
    }
}

fn with_data(
    op: Op,
    dev: &DynDevice,
    sector: Sector,
    buf: Buf,
    flags: BioFlags,
) -> (Option<Buf>, BlkResult) {
    run(op, |bio| {
        bio.set_flags(flags);
        bio.set_dev(dev.clone(), sector);
        bio.push(buf).map_err(|_buf| BlkError::Unaligned)
    })
}

/// Reads into `buf`, whose length is a multiple of 512 bytes, and gives it back.
///
/// # Errors
/// What the device reports.
pub fn read_wait(dev: &DynDevice, sector: Sector, buf: Buf) -> BlkResult<Buf> {
    match with_data(Op::Read, dev, sector, buf, BioFlags::SYNC) {
        (Some(buf), Ok(())) => Ok(buf),
        (_, Err(error)) => Err(error),
        (None, Ok(())) => Err(BlkError::Io),
    }
}

/// Writes `buf`, whose length is a multiple of 512 bytes, and gives it back.
///
/// # Errors
/// What the device reports.
pub fn write_wait(dev: &DynDevice, sector: Sector, buf: Buf, flags: BioFlags) -> BlkResult<Buf> {
    match with_data(Op::Write, dev, sector, buf, flags | BioFlags::SYNC) {
        (Some(buf), Ok(())) => Ok(buf),
        (_, Err(error)) => Err(error),
        (None, Ok(())) => Err(BlkError::Io),
    }
}

/// Makes all writes that ended before durable.
///
/// # Errors
/// What the device reports.
pub fn flush_wait(dev: &DynDevice) -> BlkResult {
    run(Op::Flush, |bio| {
        bio.set_dev(dev.clone(), Sector::ZERO);
        Ok(())
    })
    .1
}

/// Discards or zeroes a range.
///
/// # Errors
/// What the device reports; [`BlkError::NotSupported`] where it cannot.
pub fn range_wait(dev: &DynDevice, op: Op, sector: Sector, len: SectorCount) -> BlkResult {
    run(op, |bio| {
        bio.set_dev(dev.clone(), sector);
        bio.set_len(len);
        Ok(())
    })
    .1
}
