use std::sync::atomic::{AtomicBool, Ordering};

use super::{Caps, Request, Step, Via};
use crate::{Bio, BioFlags, BioSet, BlkError, BlkResult, Op, PagePool, SectorCount, Wait};

fn caps() -> Caps {
    Caps {
        read_only: false,
        offset_align: 4096,
        memory_align: 512,
        range_align: 512,
        direct: AtomicBool::new(true),
        punch: AtomicBool::new(true),
        zero_range: AtomicBool::new(true),
        dsync: AtomicBool::new(true),
    }
}

fn bio(op: Op, bytes: &[usize], flags: BioFlags) -> Bio {
    let mut bio = BioSet::<()>::new("test", 1).alloc(op, Wait::No).unwrap();
    for len in bytes {
        bio.push(PagePool::shared().alloc(*len).unwrap()).unwrap();
    }
    bio.set_flags(flags);
    bio
}

/// Runs a bio against the answers of a host; gives the calls and the end.
fn run(caps: &Caps, bio: Bio, answers: &[i64]) -> (Vec<Step>, BlkResult) {
    let mut request = Request::default();
    request.begin(bio);
    let mut steps = Vec::new();
    let mut answers = answers.iter();
    loop {
        let step = request.step(caps);
        if let Step::End(res) = step {
            assert_eq!(answers.next(), None, "more answers than calls");
            return (steps, res);
        }
        steps.push(step);
        let answer = *answers.next().unwrap();
        if let Err(error) = request.result(answer, caps, "test") {
            return (steps, Err(error));
        }
    }
}

fn write(via: Via, offset: u64, dsync: bool) -> Step {
    Step::Write { via, offset, dsync }
}

#[test]
fn a_barrier_is_flush_write_and_the_rest_of_a_short_write() {
    let flags = BioFlags::PREFLUSH | BioFlags::FUA;
    let (steps, res) = run(
        &caps(),
        bio(Op::Write, &[8192], flags),
        &[0, 4096, 512, 3584],
    );
    let (direct, cached) = (Via::Direct, Via::Cached);
    assert_eq!(
        steps,
        [
            Step::Sync,
            write(direct, 0, true),
            write(direct, 4096, true),
            // Not at a multiple of the host's block any more.
            write(cached, 4608, true),
        ]
    );
    assert_eq!(res, Ok(()));
}

#[test]
fn a_host_without_dsync_gets_a_sync_after() {
    let caps = caps();
    let answers = [-i64::from(libc::EOPNOTSUPP), 4096, 0];
    let (steps, res) = run(&caps, bio(Op::Write, &[4096], BioFlags::FUA), &answers);
    let again = write(Via::Direct, 0, false);
    assert_eq!(steps, [write(Via::Direct, 0, true), again, Step::Sync]);
    assert_eq!(res, Ok(()));
    let (steps, _) = run(&caps, bio(Op::Write, &[4096], BioFlags::FUA), &[4096, 0]);
    assert_eq!(steps, [again, Step::Sync]);
}

#[test]
fn a_failed_flush_before_a_write_keeps_the_write_from_happening() {
    let bio = bio(Op::Write, &[4096], BioFlags::PREFLUSH);
    let (steps, res) = run(&caps(), bio, &[-i64::from(libc::EIO)]);
    assert_eq!((steps, res), (vec![Step::Sync], Err(BlkError::Io)));
}

#[test]
fn interrupted_calls_are_repeated_but_not_for_ever() {
    let flush = || bio(Op::Flush, &[], BioFlags::empty());
    let (eintr, eagain) = (-i64::from(libc::EINTR), -i64::from(libc::EAGAIN));
    let (steps, res) = run(&caps(), flush(), &[eintr, eagain, eintr, 0]);
    assert_eq!((steps.len(), res), (4, Ok(())));
    let (steps, res) = run(&caps(), flush(), &vec![eagain; 5000]);
    assert_eq!((steps.len(), res), (1001, Err(BlkError::Again)));
}

#[test]
fn direct_refused_later_goes_through_the_page_cache() {
    let caps = caps();
    let answers = [-i64::from(libc::EINVAL), 4096];
    let (steps, res) = run(&caps, bio(Op::Read, &[4096], BioFlags::empty()), &answers);
    let read = |via| Step::Read { via, offset: 0 };
    assert_eq!(steps, [read(Via::Direct), read(Via::Cached)]);
    assert_eq!((res, caps.direct.load(Ordering::Relaxed)), (Ok(()), false));
    let answers = [-i64::from(libc::EINVAL)];
    let (_, res) = run(&caps, bio(Op::Read, &[4096], BioFlags::empty()), &answers);
    assert_eq!(res, Err(BlkError::Io));
}

#[test]
fn nothing_read_is_an_error() {
    let (_, res) = run(
        &caps(),
        bio(Op::Read, &[8192], BioFlags::empty()),
        &[4096, 0],
    );
    assert_eq!(res, Err(BlkError::Io));
}

#[test]
fn what_the_host_cannot_zero_is_punched_then_refused() {
    let caps = caps();
    let zeroes = || {
        let mut bio = bio(Op::WriteZeroes, &[], BioFlags::empty());
        bio.set_len(SectorCount::new(8));
        bio
    };
    let no = -i64::from(libc::EOPNOTSUPP);
    let (steps, res) = run(&caps, zeroes(), &[no, 0]);
    assert_eq!((steps.len(), res), (2, Ok(())));
    let (steps, res) = run(&caps, zeroes(), &[no]);
    assert_eq!((steps.len(), res), (1, Err(BlkError::NotSupported)));
    let (steps, res) = run(&caps, zeroes(), &[]);
    assert_eq!((steps.len(), res), (0, Err(BlkError::NotSupported)));
}

#[test]
fn errors_of_the_host_keep_their_meaning() {
    for (errno, error) in [
        (libc::ENOSPC, BlkError::NoSpace),
        (libc::EIO, BlkError::Io),
        (libc::ENODEV, BlkError::NoDevice),
    ] {
        let bio = bio(Op::Write, &[4096], BioFlags::empty());
        assert_eq!(run(&caps(), bio, &[-i64::from(errno)]).1, Err(error));
    }
}

#[test]
fn many_parts_go_in_several_calls() {
    let bio = bio(Op::Write, &vec![512; 1500], BioFlags::empty());
    let (steps, res) = run(&caps(), bio, &[1024 * 512, 476 * 512]);
    let cached = |offset| write(Via::Cached, offset, false);
    assert_eq!((steps, res), (vec![cached(0), cached(1024 * 512)], Ok(())));
}
