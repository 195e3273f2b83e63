//! Random calls against a model of what the client promises.

#![allow(clippy::unwrap_used, reason = "a test ends where something is wrong")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use bufio::{BufError, Buffer, Client, no_check};
use common::{TestDisk, eventually, rig};
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_oneof};
use proptest::{prop_assert, prop_assert_eq, proptest};

const BLOCKS: u64 = 12;
const SIZE: usize = 1024;
const SECTOR: usize = 512;

#[derive(Clone, Debug)]
enum Call {
    Read(u64),
    Write(u64, u8),
    WriteRange(u64, usize, usize, u8),
    New(u64, u8),
    Prefetch(u64, u64),
    Forget(u64),
    ForgetRange(u64, u64),
    Pin(u64),
    Unpin(u64),
    WriteDirty,
    WriteAsync,
    WriteBuffers(Vec<u64>),
    Move(u64, u64),
    Discard(u64, u64),
    DropBuffers,
    Shrink(usize),
    Minimum(usize),
    BadWrite(u64),
    BadRead(u64),
    Heal,
}

fn call() -> impl Strategy<Value = Call> {
    let block = || 0..BLOCKS;
    prop_oneof![
        4 => block().prop_map(Call::Read),
        6 => (block(), any::<u8>()).prop_map(|(block, tag)| Call::Write(block, tag)),
        6 => (block(), 0..SIZE, 1..SIZE, any::<u8>())
            .prop_map(|(block, at, len, tag)| Call::WriteRange(block, at, len, tag)),
        2 => (block(), any::<u8>()).prop_map(|(block, tag)| Call::New(block, tag)),
        1 => (block(), 0..6u64).prop_map(|(block, n)| Call::Prefetch(block, n)),
        2 => block().prop_map(Call::Forget),
        1 => (block(), 0..4u64).prop_map(|(block, n)| Call::ForgetRange(block, n)),
        1 => block().prop_map(Call::Pin),
        1 => block().prop_map(Call::Unpin),
        2 => Just(Call::WriteDirty),
        1 => Just(Call::WriteAsync),
        2 => proptest::collection::vec(block(), 1..6).prop_map(Call::WriteBuffers),
        1 => (block(), block()).prop_map(|(from, to)| Call::Move(from, to)),
        1 => (0..BLOCKS - 4, 1..4u64).prop_map(|(block, n)| Call::Discard(block, n)),
        1 => Just(Call::DropBuffers),
        1 => (0..8usize).prop_map(Call::Shrink),
        1 => (0..10usize).prop_map(Call::Minimum),
        1 => block().prop_map(Call::BadWrite),
        1 => block().prop_map(Call::BadRead),
        2 => Just(Call::Heal),
    ]
}

#[derive(Default)]
struct Model {
    /// What a read gives, where it is not what stands on the disk: exactly the dirty blocks.
    newer: BTreeMap<u64, Vec<u8>>,
    /// The bytes of these that may be written.
    marked: BTreeMap<u64, Range<usize>>,
    pinned: BTreeMap<u64, Buffer>,
    bad_reads: BTreeSet<u64>,
    /// A write that nobody waited for failed.
    async_error: bool,
    minimum: usize,
}

struct Run {
    disk: Arc<TestDisk>,
    client: Arc<Client>,
    model: Model,
}

fn all() -> Vec<u64> {
    (0..BLOCKS).collect()
}

impl Run {
    fn on_disk(&self, block: u64) -> Vec<u8> {
        let at = block as usize * SIZE;
        self.disk.set(|state| state.bytes[at..at + SIZE].to_vec())
    }

    fn expected(&self, block: u64) -> Vec<u8> {
        let newer = self.model.newer.get(&block).cloned();
        newer.unwrap_or_else(|| self.on_disk(block))
    }

    fn is_dirty(&self, block: u64) -> bool {
        self.client.get(block).is_some_and(|held| held.is_dirty())
    }

    fn mark(&mut self, block: u64, range: Range<usize>, content: Vec<u8>) {
        self.model.newer.insert(block, content);
        let marked = self.model.marked.entry(block).or_insert(range.clone());
        *marked = marked.start.min(range.start)..marked.end.max(range.end);
    }

    fn clean(&mut self, block: u64) {
        self.model.newer.remove(&block);
        self.model.marked.remove(&block);
    }

    /// What a write of `blocks` must have done; whether one of them failed.
    fn wrote(&mut self, blocks: &[u64]) -> bool {
        let mut failed = false;
        for &block in blocks {
            if self.model.pinned.contains_key(&block) {
                continue;
            }
            if let Some(newer) = self.model.newer.get(&block) {
                // The thread may be at it once more, where the first time failed: clean then, and
                // soon dirty again.
                let mut dirty = false;
                eventually("what is clean is on the disk", || {
                    dirty = self.is_dirty(block);
                    dirty || self.on_disk(block) == *newer
                });
                if dirty {
                    failed = true;
                } else {
                    self.clean(block);
                }
            }
        }
        let is_bad = self.disk.set(|state| !state.bad_writes.is_empty());
        assert!(!failed || is_bad, "nothing fails by itself");
        failed
    }

    fn write_dirty(&mut self) -> Result<(), BufError> {
        let res = self.client.write_dirty();
        let failed = self.wrote(&all());
        let expected = std::mem::take(&mut self.model.async_error) || failed;
        assert_eq!(res.is_err(), expected, "each error once");
        res
    }

    /// Only what was marked, in whole sectors, may have been written, and `also`.
    fn check_writes(&self, marked: &BTreeMap<u64, Range<usize>>, also: Option<u64>) {
        let writes = self.disk.set(|state| std::mem::take(&mut state.writes));
        for sector in writes.iter().flat_map(|&(at, len)| at..at + len) {
            let (block, at) = (sector / 2, sector as usize % 2 * SECTOR);
            let inside = |range: &Range<usize>| {
                let first = range.start / SECTOR * SECTOR;
                (first..range.end.next_multiple_of(SECTOR)).contains(&at)
            };
            assert!(
                also == Some(block) || marked.get(&block).is_some_and(inside),
                "sector {sector} was written"
            );
        }
    }

    fn forgotten(&mut self, block: u64) {
        self.clean(block);
        if let Some(held) = self.model.pinned.remove(&block) {
            held.unpin();
        }
    }

    fn step(&mut self, call: Call) {
        let marked = self.model.marked.clone();
        let target = match call {
            Call::Move(_, to) => Some(to),
            _ => None,
        };
        self.do_step(call);
        self.check_writes(&marked, target);
    }

    fn do_step(&mut self, call: Call) {
        match call {
            Call::Read(block) => {
                let cached = self.client.get(block).is_some();
                match self.client.read(block, no_check()) {
                    Ok(held) => assert_eq!(&*held.data(), self.expected(block)),
                    Err(_) => assert!(!cached && self.model.bad_reads.contains(&block)),
                }
            }
            Call::Write(block, tag) => {
                if let Ok(held) = self.client.read(block, no_check()) {
                    held.data_mut().fill(tag);
                    held.mark_dirty();
                    self.mark(block, 0..SIZE, vec![tag; SIZE]);
                }
            }
            Call::WriteRange(block, at, len, tag) => {
                if let Ok(held) = self.client.read(block, no_check()) {
                    let range = at..(at + len).min(SIZE);
                    let mut content = self.expected(block);
                    content[range.clone()].fill(tag);
                    held.data_mut()[range.clone()].fill(tag);
                    held.mark_dirty_range(range.clone());
                    self.mark(block, range, content);
                }
            }
            Call::New(block, tag) => {
                let held = self.client.new_zeroed(block, no_check()).unwrap();
                assert!(held.data().iter().all(|&byte| byte == 0));
                held.data_mut()[..SECTOR].fill(tag);
                // Whole all the same.
                held.mark_dirty_range(0..SECTOR);
                let mut content = vec![0; SIZE];
                content[..SECTOR].fill(tag);
                self.mark(block, 0..SIZE, content);
            }
            Call::Prefetch(block, n) => self.client.prefetch(block, n),
            Call::Forget(block) => {
                self.client.forget(block);
                self.forgotten(block);
            }
            Call::ForgetRange(block, n) => {
                self.client.forget_range(block, n);
                (block..block + n).for_each(|block| self.forgotten(block));
            }
            Call::Pin(block) => {
                if let Ok(held) = self.client.read(block, no_check()) {
                    self.model.pinned.entry(block).or_insert_with(|| {
                        held.pin();
                        held
                    });
                }
            }
            Call::Unpin(block) => {
                if let Some(held) = self.model.pinned.remove(&block) {
                    held.unpin();
                }
            }
            Call::WriteDirty => drop(self.write_dirty()),
            Call::WriteAsync => {
                let dirty = self.model.newer.keys();
                let due = dirty.filter(|at| !self.model.pinned.contains_key(at));
                let due = due.count() as u64;
                if due == 0 {
                    // It could not be seen when the thread is done.
                    return;
                }
                let written = self.client.stats().written + due;
                self.client.write_dirty_async();
                eventually("written in the background", || {
                    self.client.stats().written >= written
                });
                self.client.wait_writes(0, BLOCKS);
                self.model.async_error |= self.wrote(&all());
            }
            Call::WriteBuffers(blocks) => {
                let cached = blocks.iter().filter_map(|&at| self.client.get(at));
                let held: Vec<_> = cached.collect();
                let res = self.client.write_buffers(&held);
                let blocks: Vec<_> = held.iter().map(Buffer::block).collect();
                assert_eq!(res.is_err(), self.wrote(&blocks));
            }
            Call::Move(from, to) => self.release_move(from, to),
            Call::Discard(block, n) => {
                self.client.discard(block, n).unwrap();
                (block..block + n).for_each(|block| self.forgotten(block));
            }
            Call::DropBuffers => {
                self.client.drop_buffers();
                self.model.async_error |= self.wrote(&all());
            }
            Call::Shrink(blocks) => {
                let before = self.client.stats().buffers;
                self.client.shrink(blocks * SIZE);
                let least = self.model.minimum.max(blocks).min(before);
                assert!(self.client.stats().buffers >= least);
            }
            Call::Minimum(n) => {
                self.client.set_minimum_buffers(n);
                self.model.minimum = n;
            }
            Call::BadWrite(block) => {
                self.disk.set(|state| state.bad_writes.insert(block * 2));
            }
            Call::BadRead(block) => {
                self.model.bad_reads.insert(block);
                self.disk.set(|state| state.bad_reads.insert(block * 2 + 1));
            }
            Call::Heal => {
                self.model.bad_reads.clear();
                self.disk.set(|state| {
                    state.bad_writes.clear();
                    state.bad_reads.clear();
                });
            }
        }
    }

    fn release_move(&mut self, from: u64, to: u64) {
        if from == to {
            return;
        }
        let Ok(held) = self.client.read(from, no_check()) else {
            return;
        };
        let content = self.expected(from);
        let shared = self.model.pinned.contains_key(&from);
        let moved = self.client.release_move(held, to);
        if !shared && self.is_dirty(from) {
            // A source that cannot be written keeps its content, and `to` is untouched.
            assert!(moved.is_err());
            return;
        }
        self.forgotten(to);
        // The thread may still hold what it has just written: then it stays, too.
        let held = !shared && self.client.get(from).is_some();
        if held {
            self.clean(from);
            assert_eq!(self.on_disk(from), content);
        }
        if shared || held {
            assert!(self.client.get(to).is_none());
            let is_bad = self.disk.set(|state| state.bad_writes.contains(&(to * 2)));
            assert_eq!(moved.is_err(), is_bad);
            assert!(is_bad || self.on_disk(to) == content);
        } else {
            assert_eq!(moved, Ok(()));
            self.clean(from);
            assert_eq!(self.on_disk(from), content);
            assert!(self.client.get(from).is_none());
            self.mark(to, 0..SIZE, content);
        }
    }
}

fn cases() -> u32 {
    let is_long = std::env::var_os("FUSEFS_STACK_LONG").is_some();
    if is_long { 20_000 } else { 1000 }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases()))]
    #[test]
    fn client_keeps_its_promises(calls in proptest::collection::vec(call(), 1..120)) {
        let (disk, client) = rig(BLOCKS * 2);
        let mut run = Run { disk, client, model: Model::default() };
        for call in calls {
            run.step(call);
            prop_assert_eq!(run.client.stats().pinned, run.model.pinned.len());
            let dirty = (0..BLOCKS).filter(|&block| run.is_dirty(block)).count();
            prop_assert_eq!(run.client.stats().dirty, dirty);
            prop_assert_eq!(run.model.newer.len(), dirty);
        }
        run.step(Call::Heal);
        let pinned: Vec<u64> = run.model.pinned.keys().copied().collect();
        pinned.into_iter().for_each(|block| run.step(Call::Unpin(block)));
        run.step(Call::WriteDirty);
        prop_assert_eq!(run.write_dirty(), Ok(()));
        prop_assert!(run.model.newer.is_empty());
        prop_assert_eq!(run.client.stats().dirty, 0);
        prop_assert_eq!(run.disk.set(|state| state.overlaps), 0);
    }
}
