//! A rig around one target, and the contract that every target keeps.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends where something is wrong"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use blockstack::device::Stats;
use blockstack::sync::{Condvar, Mutex, Rank};
use blockstack::{
    Bio, BioFlags, BioSet, BlkError, BlkResult, BlockDevice, Buf, DynDevice, Limits, Op, PagePool,
    Sector, SectorCount, Wait, flush_wait, range_wait, read_wait, submit_bio, write_wait,
};

use crate::mapped::MappedDevice;
use crate::registry::Registry;
use crate::table::{Table, TableError};
use crate::target::Target;

/// Size of each disk of a rig, in sectors.
pub const DISK_SECTORS: u64 = 4096;
const DISKS: usize = 4;

/// What a disk of a rig does with the bios it gets.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Mood {
    /// What they ask for.
    Works,
    /// Fails them.
    Fails(BlkError),
    /// Drops them.
    Drops,
    /// Keeps them until it works again.
    Holds,
}

struct DiskState {
    bytes: Vec<u8>,
    mood: Mood,
    held: Vec<Bio>,
    written: Vec<Sector>,
    flushes: usize,
    discards: Vec<(Sector, SectorCount)>,
}

/// A disk in memory that keeps a record.
pub struct RigDisk {
    name: String,
    state: Mutex<DiskState>,
    limits: Limits,
    stats: Stats,
}

impl RigDisk {
    /// Makes a disk of zeros.
    #[must_use]
    pub fn new(name: &str, limits: Limits) -> Arc<Self> {
        let state = DiskState {
            bytes: vec![0; DISK_SECTORS as usize * 512],
            mood: Mood::Works,
            held: Vec::new(),
            written: Vec::new(),
            flushes: 0,
            discards: Vec::new(),
        };
        Arc::new(Self {
            name: name.to_owned(),
            state: Mutex::new(Rank::Queue, state),
            limits,
            stats: Stats::default(),
        })
    }

    /// First sectors of the writes done, in order.
    #[must_use]
    pub fn written(&self) -> Vec<Sector> {
        self.state.lock_nested().written.clone()
    }

    /// Flushes done.
    #[must_use]
    pub fn flushes(&self) -> usize {
        self.state.lock_nested().flushes
    }

    /// Discards done.
    #[must_use]
    pub fn discards(&self) -> Vec<(Sector, SectorCount)> {
        self.state.lock_nested().discards.clone()
    }

    /// Bios it keeps.
    #[must_use]
    pub fn held(&self) -> usize {
        self.state.lock_nested().held.len()
    }

    /// Changes what it does; what it kept is done when it works again.
    pub fn set_mood(&self, mood: Mood) {
        let mut state = self.state.lock_nested();
        state.mood = mood;
        let held = match mood {
            Mood::Holds => Vec::new(),
            _ => std::mem::take(&mut state.held),
        };
        drop(state);
        held.into_iter().for_each(|bio| self.submit(bio));
    }
}

impl DiskState {
    fn run(&mut self, bio: &mut Bio) {
        let at = bio.sector().raw() as usize * 512;
        if bio.op() == Op::Flush || bio.flags().contains(BioFlags::PREFLUSH) {
            self.flushes += 1;
        }
        match bio.op() {
            Op::Read => bio.fill_each(|offset, to| {
                to.copy_from_slice(&self.bytes[at + offset..at + offset + to.len()]);
            }),
            Op::Write => {
                self.written.push(bio.sector());
                bio.for_each_bytes(|offset, from| {
                    self.bytes[at + offset..at + offset + from.len()].copy_from_slice(from);
                });
            }
            Op::Flush => {}
            Op::Discard => {
                self.discards.push((bio.sector(), bio.len()));
                self.bytes[at..at + bio.byte_len()].fill(0);
            }
            Op::WriteZeroes => self.bytes[at..at + bio.byte_len()].fill(0),
        }
    }
}

impl BlockDevice for RigDisk {
    fn name(&self) -> &str {
        &self.name
    }
    fn capacity(&self) -> SectorCount {
        SectorCount::new(DISK_SECTORS)
    }
    fn limits(&self) -> Limits {
        self.limits
    }
    fn stats(&self) -> &Stats {
        &self.stats
    }
    fn submit(&self, mut bio: Bio) {
        let mut state = self.state.lock_nested();
        match state.mood {
            Mood::Holds => state.held.push(bio),
            Mood::Works => {
                state.run(&mut bio);
                drop(state);
                bio.complete(Ok(()));
            }
            Mood::Fails(error) => {
                drop(state);
                bio.complete(Err(error));
            }
            Mood::Drops => {
                drop(state);
                drop(bio);
            }
        }
    }
}

/// How a rig is made.
#[derive(Clone, Copy, Debug)]
pub struct RigConfig {
    /// Bios of each kind for clones.
    pub bios: usize,
    /// Of each disk.
    pub limits: Limits,
}

impl Default for RigConfig {
    fn default() -> Self {
        Self {
            bios: 32,
            limits: Limits::UNLIMITED,
        }
    }
}

/// Disks `mem0` to `mem3` and a mapped device over them.
pub struct Rig {
    disks: Vec<Arc<RigDisk>>,
    mapped: Arc<MappedDevice>,
    registry: Registry,
    ended: Arc<Ended>,
    bios: BioSet<EndPad>,
}

#[derive(Default)]
struct Ended {
    errors: AtomicUsize,
    count: AtomicUsize,
}

#[derive(Default)]
struct EndPad(Option<Arc<Ended>>);

impl Rig {
    /// Makes a device of one row, `target` and its words, of `len` sectors.
    ///
    /// # Panics
    /// Where there is something wrong with the row.
    #[must_use]
    pub fn new(row: &str, len: u64) -> Self {
        Self::of_table(&format!("0 {len} {row}"), RigConfig::default())
    }

    /// Makes a device of a table.
    ///
    /// # Panics
    /// Where there is something wrong with the table.
    #[must_use]
    pub fn of_table(rows: &str, config: RigConfig) -> Self {
        Self::with_registry(rows, config, Registry::standard()).expect("a good table")
    }

    /// Makes a device of a table with targets of `registry`.
    ///
    /// # Errors
    /// What is wrong with the table.
    pub fn with_registry(
        rows: &str,
        config: RigConfig,
        registry: Registry,
    ) -> Result<Self, TableError> {
        let disks: Vec<_> = (0..DISKS)
            .map(|at| RigDisk::new(&format!("mem{at}"), config.limits))
            .collect();
        let table = Self::parse(&disks, rows, &registry)?;
        Ok(Self {
            mapped: MappedDevice::with_bios("rig", table, config.bios)?,
            disks,
            registry,
            ended: Arc::default(),
            bios: BioSet::new("rig", 512),
        })
    }

    fn parse(disks: &[Arc<RigDisk>], rows: &str, registry: &Registry) -> Result<Table, TableError> {
        let open = |name: &str| {
            let disk = disks.iter().find(|disk| disk.name == name);
            disk.map(|disk| disk.clone() as DynDevice)
                .ok_or(BlkError::NoDevice)
        };
        Table::parse(rows, registry, &open)
    }

    /// Parses another table over the same disks.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn table(&self, rows: &str) -> Result<Table, TableError> {
        Self::parse(&self.disks, rows, &self.registry)
    }

    /// The device under test.
    #[must_use]
    pub fn mapped(&self) -> &Arc<MappedDevice> {
        &self.mapped
    }

    /// The device under test, as callers see it.
    #[must_use]
    pub fn dev(&self) -> DynDevice {
        self.mapped.clone()
    }

    /// One of the disks.
    ///
    /// # Panics
    /// Where there is none of this name.
    #[must_use]
    pub fn disk(&self, name: &str) -> &RigDisk {
        let disk = self.disks.iter().find(|disk| disk.name == name);
        disk.expect("a disk of the rig")
    }

    /// The disks that the table uses.
    #[must_use]
    pub fn used(&self) -> Vec<&RigDisk> {
        let devices = self.mapped.devices();
        let used = |disk: &&Arc<RigDisk>| devices.iter().any(|dev| dev.name() == disk.name);
        self.disks.iter().filter(used).map(|disk| &**disk).collect()
    }

    /// Has all disks do the same.
    pub fn set_mood(&self, mood: Mood) {
        self.disks.iter().for_each(|disk| disk.set_mood(mood));
    }

    /// Writes and waits.
    ///
    /// # Errors
    /// What the write ended with.
    pub fn write(&self, sector: Sector, bytes: &[u8]) -> BlkResult {
        self.write_flags(sector, bytes, BioFlags::empty())
    }

    /// Writes with flags and waits.
    ///
    /// # Errors
    /// What the write ended with.
    pub fn write_flags(&self, sector: Sector, bytes: &[u8], flags: BioFlags) -> BlkResult {
        write_wait(&self.dev(), sector, buf_of(bytes), flags).map(drop)
    }

    /// Reads `n` sectors and waits.
    ///
    /// # Errors
    /// What the read ended with.
    pub fn read(&self, sector: Sector, n: usize) -> BlkResult<Vec<u8>> {
        let mut buf = PagePool::shared().alloc(n * 512)?;
        buf.fill(0xee);
        read_wait(&self.dev(), sector, buf).map(|buf| buf.to_vec())
    }

    /// Flushes and waits.
    ///
    /// # Errors
    /// What the flush ended with.
    pub fn flush(&self) -> BlkResult {
        flush_wait(&self.dev())
    }

    /// Discards or zeroes and waits.
    ///
    /// # Errors
    /// What it ended with.
    pub fn range(&self, op: Op, sector: Sector, len: u64) -> BlkResult {
        range_wait(&self.dev(), op, sector, SectorCount::new(len))
    }

    /// Submits a bio without waiting for its end; `None` for bytes means that it has no data.
    pub fn start(&self, op: Op, sector: Sector, bytes: Option<&[u8]>, len: u64) {
        let mut bio = self.bios.alloc(op, Wait::Yes).expect("bios of the rig");
        bio.set_dev(self.dev(), sector);
        match bytes {
            Some(bytes) => bio.push(buf_of(bytes)).expect("whole sectors"),
            None if op != Op::Flush => bio.set_len(SectorCount::new(len)),
            None => {}
        }
        bio.set_end_io(|mut bio, res| {
            let ended = bio.pad_mut::<EndPad>().0.take().expect("ends once");
            drop(bio);
            ended
                .errors
                .fetch_add(usize::from(res.is_err()), Ordering::SeqCst);
            ended.count.fetch_add(1, Ordering::SeqCst);
        });
        bio.pad_mut::<EndPad>().0 = Some(self.ended.clone());
        submit_bio(bio);
    }

    /// Bios of [`Self::start`] that ended, and of those the failed ones.
    #[must_use]
    pub fn ended(&self) -> (usize, usize) {
        let ended = &self.ended;
        (
            ended.count.load(Ordering::SeqCst),
            ended.errors.load(Ordering::SeqCst),
        )
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // Bios still held would keep the device, and be reported as lost.
        self.set_mood(Mood::Works);
    }
}

fn buf_of(bytes: &[u8]) -> Buf {
    let mut buf = PagePool::shared().alloc(bytes.len()).expect("memory");
    buf.copy_from_slice(bytes);
    buf
}

/// What reads of a target give.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Keeps {
    /// What was written.
    Data,
    /// Zeros, whatever was written.
    Nothing,
    /// Errors.
    Errors,
}

/// Holds a thread until another lets it go on.
#[derive(Default)]
struct Flag(Condvar, std::sync::OnceLock<()>);

/// The contract of all targets, a function for each clause; see
/// [`target_contract_tests`](crate::target_contract_tests).
pub mod contract {
    use super::{
        Arc, BlkError, Flag, Keeps, Mood, Op, Ordering, Registry, Rig, RigConfig, Sector, Target,
    };
    use crate::target::Suspend;

    /// Length of the row under test, in sectors.
    const LEN: u64 = 512;

    fn rig<T: Target>(row: &str, config: RigConfig) -> Rig {
        try_rig::<T>(&format!("0 {LEN} {row}"), config).expect("a good row")
    }

    fn try_rig<T: Target>(table: &str, config: RigConfig) -> Result<Rig, crate::TableError> {
        let mut registry = Registry::standard();
        registry.register::<T>();
        Rig::with_registry(table, config, registry)
    }

    /// A row is printed as it was parsed.
    pub fn line_round_trips<T: Target>(row: &str) {
        let rig = rig::<T>(row, RigConfig::default());
        let args = row.strip_prefix(T::NAME).expect("a row of the target");
        let args = args.strip_prefix(' ').unwrap_or(args);
        assert_eq!(
            rig.mapped().table(),
            format!("0 {LEN} {} {args}\n", T::NAME)
        );
        let again = rig.table(&rig.mapped().table()).expect("what it prints");
        assert_eq!(again.to_string(), rig.mapped().table());
    }

    /// Missing, surplus and bad words are refused, or at least no reason to panic.
    pub fn bad_words_are_refused<T: Target>(row: &str) {
        let words: Vec<&str> = row.split(' ').collect();
        let make = |words: &[&str]| {
            try_rig::<T>(
                &format!("0 {LEN} {}", words.join(" ")),
                RigConfig::default(),
            )
            .map(drop)
        };
        let mut surplus = words.clone();
        surplus.push("surplus-word");
        assert!(make(&surplus).is_err(), "a surplus word");
        if words.len() > 1 {
            assert!(make(&words[..1]).is_err(), "no words");
        }
        for at in 1..words.len() {
            let _some_words_are_optional = make(&words[..at]);
            for bad in ["no-such-thing", "-1", "99999999999999999999", "\u{e9}"] {
                let mut changed = words.clone();
                changed[at] = bad;
                let refused = make(&changed).is_err();
                assert!(refused || !words[at].starts_with("mem"), "{changed:?}");
            }
        }
    }

    /// A row longer than what is below is refused.
    pub fn range_past_the_end_is_refused<T: Target>(row: &str) {
        let has_devices = !rig::<T>(row, RigConfig::default()).used().is_empty();
        let long = try_rig::<T>(&format!("0 {} {row}", 1u64 << 40), RigConfig::default());
        assert_eq!(long.is_err(), has_devices);
    }

    /// An empty flush reaches each device.
    pub fn flush_reaches_every_device<T: Target>(row: &str) {
        let rig = rig::<T>(row, RigConfig::default());
        rig.flush().expect("a flush");
        assert!(rig.used().iter().all(|disk| disk.flushes() >= 1));
    }

    /// Reads give what the target promises, wherever bios begin and end; discards and write-zeroes
    /// change their range and nothing else.
    pub fn reads_follow_writes<T: Target>(row: &str, keeps: Keeps) {
        let config = RigConfig {
            limits: blockstack::Limits {
                max_sectors: 24,
                ..blockstack::Limits::UNLIMITED
            },
            ..RigConfig::default()
        };
        let rig = rig::<T>(row, config);
        let mut model = vec![0u8; LEN as usize * 512];
        // Of a discarded sector nobody knows what it reads as.
        let mut known = vec![true; LEN as usize];
        let mut random = 0x9e37_79b9_u64;
        let mut below = |n: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % n
        };
        for round in 0..400u64 {
            let len = 1 + below(96);
            let start = below(LEN - len + 1);
            let bytes = start as usize * 512..(start + len) as usize * 512;
            let sector = Sector::new(start);
            let sectors = start as usize..(start + len) as usize;
            if below(4) == 0 {
                let op = [Op::Discard, Op::WriteZeroes][below(2) as usize];
                if rig.range(op, sector, len).is_ok() {
                    known[sectors].fill(op == Op::WriteZeroes);
                    model[bytes].fill(0);
                }
                continue;
            }
            if below(2) == 0 {
                known[sectors].fill(true);
                // Each sector says which it is, so that a misplaced one is seen.
                for (at, chunk) in model[bytes.clone()].chunks_mut(512).enumerate() {
                    chunk.fill(round as u8);
                    chunk[..8].copy_from_slice(&(start + at as u64).to_le_bytes());
                }
                let res = rig.write(sector, &model[bytes]);
                assert_eq!(res.is_err(), keeps == Keeps::Errors);
                continue;
            }
            match (keeps, rig.read(sector, len as usize)) {
                (Keeps::Data, Ok(mut read)) => {
                    for (found, at) in read.chunks_mut(512).zip(sectors) {
                        if !known[at] {
                            found.copy_from_slice(&model[at * 512..][..512]);
                        }
                    }
                    assert!(read == model[bytes], "{len} at {start}");
                }
                (Keeps::Nothing, Ok(read)) => assert!(read.iter().all(|&byte| byte == 0)),
                (Keeps::Errors, Err(BlkError::Io)) => {}
                (_, res) => panic!("{len} at {start}: {:?}", res.map(drop)),
            }
        }
    }

    /// An error of a lower device is the caller's.
    pub fn lower_error_comes_up<T: Target>(row: &str) {
        let rig = rig::<T>(row, RigConfig::default());
        if rig.used().is_empty() {
            return;
        }
        rig.set_mood(Mood::Fails(BlkError::Io));
        let whole = vec![1; LEN as usize * 512];
        assert!(rig.write(Sector::ZERO, &whole).is_err());
        assert!(rig.read(Sector::ZERO, LEN as usize).is_err());
        assert!(rig.range(Op::WriteZeroes, Sector::ZERO, LEN).is_err());
        assert!(rig.flush().is_err());
        rig.set_mood(Mood::Works);
        assert_eq!(rig.flush(), Ok(()));
    }

    /// A lower device that loses a bio ends it with an error.
    pub fn dropped_bio_ends<T: Target>(row: &str) {
        let rig = rig::<T>(row, RigConfig::default());
        if rig.used().is_empty() {
            return;
        }
        rig.set_mood(Mood::Drops);
        let whole = vec![1; LEN as usize * 512];
        assert_eq!(rig.write(Sector::ZERO, &whole), Err(BlkError::Io));
        assert!(rig.range(Op::WriteZeroes, Sector::ZERO, LEN).is_err());
        assert_eq!(rig.flush(), Err(BlkError::Io));
        rig.set_mood(Mood::Works);
    }

    /// One bio for clones is enough, for any number of pieces and of threads, and as many as one
    /// discard needs where a target gets several.
    pub fn one_bio_makes_progress<T: Target>(row: &str) {
        let config = RigConfig {
            bios: 1,
            limits: blockstack::Limits {
                max_sectors: 8,
                ..blockstack::Limits::UNLIMITED
            },
        };
        let rig = rig::<T>(row, config);
        let bytes = vec![3; 200 * 512];
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for at in 0..50 {
                        rig.start(Op::Write, Sector::new(at), Some(&bytes), 0);
                        rig.start(Op::Flush, Sector::ZERO, None, 0);
                        rig.start(Op::Discard, Sector::new(at), None, 200);
                        rig.start(Op::WriteZeroes, Sector::new(at), None, 200);
                    }
                });
            }
        });
        wait(&rig, 800);
    }

    fn wait(rig: &Rig, count: usize) {
        let start = std::time::Instant::now();
        while rig.ended().0 < count {
            assert!(
                start.elapsed().as_secs() < 20,
                "{} of {count} bios ended",
                rig.ended().0
            );
            std::thread::yield_now();
        }
    }

    /// A suspend waits for bios on their way; those that come are deferred to the resume.
    pub fn suspend_waits_and_defers<T: Target>(row: &str) {
        let rig = rig::<T>(row, RigConfig::default());
        let has_devices = !rig.used().is_empty();
        rig.set_mood(Mood::Holds);
        let bytes = vec![5; 512];
        rig.start(Op::Write, Sector::new(1), Some(&bytes), 0);
        let done = Arc::new(Flag::default());
        std::thread::scope(|scope| {
            let suspend = scope.spawn(|| {
                let res = rig.mapped().suspend(Suspend::Flush);
                done.1.get_or_init(|| ());
                done.0.notify_all();
                res
            });
            while !rig.mapped().is_suspended() {
                std::thread::yield_now();
            }
            if has_devices {
                assert!(done.1.get().is_none(), "suspended over a bio on its way");
            }
            rig.set_mood(Mood::Works);
            suspend.join().expect("suspend").expect("suspend");
        });
        assert_eq!(rig.ended().0, 1);
        rig.start(Op::Write, Sector::new(2), Some(&bytes), 0);
        rig.start(Op::Flush, Sector::ZERO, None, 0);
        assert_eq!(rig.ended().0, 1, "deferred");
        rig.mapped().resume().expect("resume");
        wait(&rig, 3);
    }

    /// Each bio ends once, also while the device is suspended and resumed all the time.
    pub fn every_bio_ends_once<T: Target>(row: &str) {
        const BIOS: usize = 2000;
        let rig = rig::<T>(row, RigConfig::default());
        let stop = std::sync::atomic::AtomicBool::new(false);
        let bytes = vec![5; 16 * 512];
        std::thread::scope(|scope| {
            let admin = scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    rig.mapped().suspend(Suspend::Flush).expect("suspend");
                    rig.mapped().resume().expect("resume");
                    std::thread::yield_now();
                }
            });
            for at in 0..BIOS {
                let sector = Sector::new(at as u64 % (LEN - 16));
                match at % 8 {
                    0 => rig.start(Op::Flush, Sector::ZERO, None, 0),
                    1 => rig.start(Op::Discard, sector, None, 16),
                    _ => rig.start(Op::Write, sector, Some(&bytes), 0),
                }
            }
            wait(&rig, BIOS);
            stop.store(true, Ordering::Relaxed);
            admin.join().expect("admin");
        });
        assert_eq!(rig.ended().0, BIOS);
    }
}

/// Makes the tests that every target has to pass, in a module `contract`; the row is one that fits
/// on disks `mem0` to `mem3` of 4096 sectors with a length of 512. `forgets` and `fails` after the
/// row say that the target keeps nothing, or fails all reads and writes.
#[macro_export]
macro_rules! target_contract_tests {
    ($target:ty, $row:literal) => {
        $crate::target_contract_tests!(@tests $target, $row, $crate::testing::Keeps::Data);
    };
    ($target:ty, $row:literal, forgets) => {
        $crate::target_contract_tests!(@tests $target, $row, $crate::testing::Keeps::Nothing);
    };
    ($target:ty, $row:literal, fails) => {
        $crate::target_contract_tests!(@tests $target, $row, $crate::testing::Keeps::Errors);
    };
    (@tests $target:ty, $row:literal, $keeps:expr) => {
        #[test]
        fn line_round_trips() {
            $crate::testing::contract::line_round_trips::<$target>($row);
        }
        #[test]
        fn bad_words_are_refused() {
            $crate::testing::contract::bad_words_are_refused::<$target>($row);
        }
        #[test]
        fn range_past_the_end_is_refused() {
            $crate::testing::contract::range_past_the_end_is_refused::<$target>($row);
        }
        #[test]
        fn flush_reaches_every_device() {
            $crate::testing::contract::flush_reaches_every_device::<$target>($row);
        }
        #[test]
        fn reads_follow_writes() {
            $crate::testing::contract::reads_follow_writes::<$target>($row, $keeps);
        }
        #[test]
        fn lower_error_comes_up() {
            $crate::testing::contract::lower_error_comes_up::<$target>($row);
        }
        #[test]
        fn dropped_bio_ends() {
            $crate::testing::contract::dropped_bio_ends::<$target>($row);
        }
        #[test]
        fn one_bio_makes_progress() {
            $crate::testing::contract::one_bio_makes_progress::<$target>($row);
        }
        #[test]
        fn suspend_waits_and_defers() {
            $crate::testing::contract::suspend_waits_and_defers::<$target>($row);
        }
        #[test]
        fn every_bio_ends_once() {
            $crate::testing::contract::every_bio_ends_once::<$target>($row);
        }
    };
}
