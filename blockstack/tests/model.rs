//! Random bios against a model, over every backend: the bytes agree, and every bio ends once.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use blockstack::backend::file::{Engine, FileDisk, OpenOptions};
use blockstack::backend::mem::{Image, MemDisk};
use blockstack::testing::crash::{CrashDisk, Timing};
use blockstack::testing::observer::{Event, Observer};
use blockstack::{
    Bio, BioFlags, BioSet, BlkResult, Buf, Dio, DioConfig, DirectIo, DynDevice, Extent, Mapping,
    Op, PagePool, Plug, Sector, SectorCount, Wait, submit_bio,
};
use proptest::prelude::*;

const SECTORS: u64 = 512;

#[derive(Clone, Debug)]
struct Ask {
    op: Op,
    sector: u64,
    len: u64,
    /// Where the memory of the bio is cut into buffers.
    cut: u64,
    flags: u8,
}

fn ask() -> impl Strategy<Value = Ask> {
    let op = prop_oneof![
        4 => Just(Op::Read),
        5 => Just(Op::Write),
        1 => Just(Op::Flush),
        1 => Just(Op::Discard),
        1 => Just(Op::WriteZeroes),
    ];
    (op, 0..SECTORS, 1..80u64, 0..80u64, 0..4u8).prop_map(|(op, sector, len, cut, flags)| Ask {
        op,
        sector,
        len: len.min(SECTORS - sector),
        cut,
        flags,
    })
}

fn overlaps(a: &Ask, b: &Ask) -> bool {
    a.op != Op::Flush
        && b.op != Op::Flush
        && a.sector < b.sector + b.len
        && b.sector < a.sector + a.len
}

/// Which bio, how it ended, its buffers.
type End = (usize, BlkResult, Vec<Buf>);

#[derive(Default)]
struct Pad(Option<(usize, Sender<End>)>);

fn ended(mut bio: Bio, res: BlkResult) {
    let (index, to) = bio.pad_mut::<Pad>().0.take().unwrap();
    let bufs = bio.take_bufs().collect();
    drop(bio);
    to.send((index, res, bufs)).unwrap();
}

/// Sends all of `batch`, which do not overlap, and gives back what was read.
fn send(dev: &DynDevice, set: &BioSet<Pad>, batch: &[Ask], tag: u8) -> Receiver<End> {
    let (to, from) = channel();
    let _plug = Plug::new();
    for (index, ask) in batch.iter().enumerate() {
        let mut bio = set.alloc(ask.op, Wait::Yes).unwrap();
        let mut flags = BioFlags::empty();
        flags.set(BioFlags::FUA, ask.flags & 1 != 0 && ask.op == Op::Write);
        flags.set(
            BioFlags::PREFLUSH,
            ask.flags & 2 != 0 && ask.op == Op::Write,
        );
        bio.set_flags(flags);
        bio.set_dev(dev.clone(), Sector::new(ask.sector));
        match ask.op {
            Op::Read | Op::Write => {
                let cut = ask.cut % ask.len;
                for len in [cut, ask.len - cut] {
                    if len > 0 {
                        let mut buf = PagePool::shared().alloc(len as usize * 512).unwrap();
                        buf.fill(tag.wrapping_add(index as u8));
                        bio.push(buf).unwrap();
                    }
                }
            }
            Op::Discard | Op::WriteZeroes => bio.set_len(SectorCount::new(ask.len)),
            Op::Flush => {}
        }
        bio.set_end_io(ended);
        bio.pad_mut::<Pad>().0 = Some((index, to.clone()));
        submit_bio(bio);
    }
    from
}

fn check(dev: &DynDevice, batches: &[Vec<Ask>]) -> Result<(), TestCaseError> {
    let starts = Arc::new(AtomicUsize::new(0));
    let ends = Arc::new(AtomicUsize::new(0));
    let (s, e) = (starts.clone(), ends.clone());
    let observer: DynDevice = Observer::new(
        dev.clone(),
        Arc::new(move |event| {
            let count = if matches!(event, Event::Start { .. }) {
                &s
            } else {
                &e
            };
            count.fetch_add(1, Ordering::SeqCst);
        }),
    );
    let set = BioSet::new("model", 64);
    let mut model = vec![0u8; SECTORS as usize * 512];
    let mut sent = 0;
    for (round, asked) in batches.iter().enumerate() {
        let mut batch: Vec<Ask> = Vec::new();
        for ask in asked {
            if !batch.iter().any(|other| overlaps(ask, other)) {
                batch.push(ask.clone());
            }
        }
        let tag = (round * 16 + 1) as u8;
        let mut seen = vec![0; batch.len()];
        for (index, res, bufs) in send(&observer, &set, &batch, tag) {
            seen[index] += 1;
            prop_assert_eq!(res, Ok(()));
            let ask = &batch[index];
            let range = ask.sector as usize * 512..(ask.sector + ask.len) as usize * 512;
            match ask.op {
                Op::Read => {
                    let got: Vec<u8> = bufs.iter().flat_map(|buf| buf.to_vec()).collect();
                    prop_assert!(got == model[range], "{:?} in round {}", ask, round);
                }
                Op::Write => model[range].fill(tag.wrapping_add(index as u8)),
                Op::Discard | Op::WriteZeroes => model[range].fill(0),
                Op::Flush => {}
            }
        }
        prop_assert!(seen.iter().all(|&count| count == 1), "ends: {:?}", seen);
        sent += batch.len();
    }
    prop_assert_eq!(set.in_use(), 0);
    prop_assert_eq!(starts.load(Ordering::SeqCst), sent);
    prop_assert_eq!(ends.load(Ordering::SeqCst), sent);
    let all = PagePool::shared().alloc(model.len()).unwrap();
    let all = blockstack::read_wait(dev, Sector::ZERO, all).unwrap();
    prop_assert!(*all == *model);
    Ok(())
}

fn batches() -> impl Strategy<Value = Vec<Vec<Ask>>> {
    prop::collection::vec(prop::collection::vec(ask(), 1..12), 1..12)
}

fn over_file(options: OpenOptions, batches: &[Vec<Ask>]) -> Result<(), TestCaseError> {
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.as_file().set_len(SECTORS * 512).unwrap();
    let dev: DynDevice = FileDisk::open(file.path(), options).unwrap();
    check(&dev, batches)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn memory(batches in batches()) {
        let dev: DynDevice = MemDisk::new("mem", SectorCount::new(SECTORS));
        check(&dev, &batches)?;
    }

    #[test]
    fn late_and_shuffled(batches in batches(), seed: u64) {
        let image = Image::zeroed(SectorCount::new(SECTORS));
        let dev: DynDevice = CrashDisk::from_image("crash", image, Timing::Shuffled { seed });
        check(&dev, &batches)?;
    }

    #[test]
    fn file_uring(batches in batches(), direct: bool, depth in 1..9u32) {
        let engine = Engine::Uring;
        over_file(OpenOptions { engine, direct, queue_depth: depth, ..Default::default() }, &batches)?;
    }

    #[test]
    fn file_threads(batches in batches(), direct: bool, threads in 1..5u32) {
        let engine = Engine::Threads;
        over_file(OpenOptions { engine, direct, threads, ..Default::default() }, &batches)?;
    }

    /// Extents in any order on the device, holes among them, against what they should give.
    #[test]
    fn direct_io(parts in prop::collection::vec((0..4u8, 1..20u64), 1..12), seed: u64) {
        let bytes: Vec<u8> = (0..SECTORS).flat_map(|sector| [sector as u8; 512]).collect();
        let image = Image::from_bytes(&bytes);
        let disk = CrashDisk::from_image("disk", image, Timing::Shuffled { seed });
        let engine = DirectIo::<Box<dyn FnOnce(Buf, BlkResult<usize>) + Send>>::new(
            "model", disk.clone(), DioConfig { requests: 1, pieces: 1, workers: 1, ..DioConfig::default() });
        let dio: Dio<_> = engine.open();
        let kinds = [Mapping::Hole, Mapping::Unwritten, Mapping::Mapped, Mapping::Mapped];
        // Extents on the device do not overlap; they go down from the end.
        let mut top = SECTORS;
        let mut extents = Vec::new();
        let mut expected = Vec::new();
        for (kind, len) in parts {
            top -= len;
            let kind = kinds[usize::from(kind)];
            extents.push(Extent { kind, sector: Sector::new(top), len: SectorCount::new(len) });
            for sector in top..top + len {
                let byte = if kind == Mapping::Mapped { sector as u8 } else { 0 };
                expected.extend([byte; 512]);
            }
        }
        let mut buf = PagePool::shared().alloc(expected.len()).unwrap();
        buf.fill(0xee);
        let (buf, res) = dio.read_wait(&extents, buf);
        prop_assert_eq!(res, Ok(expected.len()));
        prop_assert!(*buf.unwrap() == *expected);
        extents.retain(|extent| extent.kind != Mapping::Hole);
        let bytes: usize = extents.iter().map(|extent| extent.len.raw() as usize * 512).sum();
        if bytes > 0 {
            let mut buf = PagePool::shared().alloc(bytes).unwrap();
            for (index, sector) in buf.chunks_mut(512).enumerate() {
                sector.fill(index as u8 ^ 0xa5);
            }
            let (to, from) = channel();
            let sent = buf.to_vec();
            dio.write(&extents, buf, BioFlags::FUA, Box::new(move |_, res| to.send(res).unwrap()));
            prop_assert_eq!(from.recv().unwrap(), Ok(bytes));
            let durable = disk.point().durable();
            let mut at = 0;
            for extent in &extents {
                let mut got = vec![0; extent.len.raw() as usize * 512];
                durable.read_at(extent.sector.raw() as usize * 512, &mut got);
                prop_assert!(got == sent[at..at + got.len()]);
                at += got.len();
            }
        }
        dio.wait_idle();
        engine.drain();
    }
}
