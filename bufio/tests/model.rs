//! Random calls against a model of what the client promises.

#![allow(clippy::unwrap_used, reason = "a test ends where something is wrong")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bufio::{Buffer, Client, no_check};
use common::{TestDisk, rig};
use proptest::prelude::{Strategy, any, prop_oneof};
use proptest::{prop_assert, prop_assert_eq, proptest};

const BLOCKS: u64 = 12;

#[derive(Clone, Debug)]
enum Call {
    Read(u64),
    Write(u64, u8),
    New(u64, u8),
    Prefetch(u64, u64),
    Forget(u64),
    Pin(u64),
    Unpin(u64),
    WriteDirty,
    WriteBuffers(Vec<u64>),
    Move(u64, u64),
    Discard(u64, u64),
    DropBuffers,
    Shrink(usize),
    BadWrite(u64),
    BadRead(u64),
    Heal,
}

fn call() -> impl Strategy<Value = Call> {
    let block = || 0..BLOCKS;
    prop_oneof![
        4 => block().prop_map(Call::Read),
        6 => (block(), any::<u8>()).prop_map(|(block, tag)| Call::Write(block, tag)),
        2 => (block(), any::<u8>()).prop_map(|(block, tag)| Call::New(block, tag)),
        1 => (block(), 0..6u64).prop_map(|(block, n)| Call::Prefetch(block, n)),
        2 => block().prop_map(Call::Forget),
        1 => block().prop_map(Call::Pin),
        1 => block().prop_map(Call::Unpin),
        2 => proptest::strategy::Just(Call::WriteDirty),
        2 => proptest::collection::vec(block(), 1..6).prop_map(Call::WriteBuffers),
        1 => (block(), block()).prop_map(|(from, to)| Call::Move(from, to)),
        1 => (0..BLOCKS - 4, 1..4u64).prop_map(|(block, n)| Call::Discard(block, n)),
        1 => proptest::strategy::Just(Call::DropBuffers),
        1 => (0..8usize).prop_map(Call::Shrink),
        1 => block().prop_map(Call::BadWrite),
        1 => block().prop_map(Call::BadRead),
        2 => proptest::strategy::Just(Call::Heal),
    ]
}

#[derive(Default)]
struct Model {
    /// What a read gives, where it is not what stands on the disk.
    newer: BTreeMap<u64, u8>,
    pinned: BTreeMap<u64, Buffer>,
    bad_writes: BTreeSet<u64>,
    bad_reads: BTreeSet<u64>,
}

struct Run {
    disk: Arc<TestDisk>,
    client: Arc<Client>,
    model: Model,
}

impl Run {
    fn on_disk(&self, block: u64) -> u8 {
        self.disk.set(|state| state.bytes[block as usize * 1024])
    }

    fn expected(&self, block: u64) -> u8 {
        let newer = self.model.newer.get(&block).copied();
        newer.unwrap_or_else(|| self.on_disk(block))
    }

    /// What a write of `blocks` must have done.
    fn wrote(&mut self, blocks: &[u64], res: Result<(), bufio::BufError>) {
        let mut failed = false;
        for block in blocks {
            if self.model.pinned.contains_key(block) {
                continue;
            }
            if let Some(&tag) = self.model.newer.get(block) {
                let dirty = self.client.get(*block).is_some_and(|held| held.is_dirty());
                if dirty {
                    failed = true;
                } else {
                    assert_eq!(self.on_disk(*block), tag, "block {block} is clean");
                    self.model.newer.remove(block);
                }
            }
        }
        assert_eq!(
            res.is_err(),
            failed,
            "an error, and only an error, leaves dirt"
        );
        assert!(!failed || !self.model.bad_writes.is_empty());
    }

    fn forgotten(&mut self, block: u64) {
        self.model.newer.remove(&block);
        if let Some(held) = self.model.pinned.remove(&block) {
            held.unpin();
        }
    }

    fn step(&mut self, call: Call) {
        match call {
            Call::Read(block) => {
                let cached = self.client.get(block).is_some();
                match self.client.read(block, no_check()) {
                    Ok(held) => assert_eq!(held.data()[0], self.expected(block)),
                    Err(_) => assert!(!cached && self.model.bad_reads.contains(&block)),
                }
            }
            Call::Write(block, tag) => {
                if let Ok(held) = self.client.read(block, no_check()) {
                    held.data_mut().fill(tag);
                    held.mark_dirty();
                    self.model.newer.insert(block, tag);
                }
            }
            Call::New(block, tag) => {
                let held = self.client.new_zeroed(block, no_check()).unwrap();
                assert!(held.data().iter().all(|&byte| byte == 0));
                held.data_mut().fill(tag);
                held.mark_dirty();
                self.model.newer.insert(block, tag);
            }
            Call::Prefetch(block, n) => self.client.prefetch(block, n),
            Call::Forget(block) => {
                self.client.forget(block);
                self.forgotten(block);
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
            Call::WriteDirty => {
                let res = self.client.write_dirty();
                self.wrote(&(0..BLOCKS).collect::<Vec<_>>(), res);
            }
            Call::WriteBuffers(blocks) => {
                let held: Vec<_> = blocks
                    .iter()
                    .filter_map(|&at| self.client.get(at))
                    .collect();
                let res = self.client.write_buffers(&held);
                let cached: Vec<_> = held.iter().map(Buffer::block).collect();
                self.wrote(&cached, res);
            }
            Call::Move(from, to) => {
                if from == to || self.model.pinned.contains_key(&from) {
                    return;
                }
                let Ok(held) = self.client.read(from, no_check()) else {
                    return;
                };
                let tag = self.expected(from);
                let moved = self.client.release_move(held, to);
                // A source that cannot be written keeps its content, and `to` is untouched.
                let source_dirty = self.client.get(from).is_some_and(|held| held.is_dirty());
                if source_dirty {
                    assert!(moved.is_err());
                    return;
                }
                assert_eq!(moved, Ok(()));
                self.model.newer.remove(&from);
                self.forgotten(to);
                self.model.newer.insert(to, tag);
                assert_eq!(self.on_disk(from), tag);
            }
            Call::Discard(block, n) => {
                self.client.discard(block, n).unwrap();
                (block..block + n).for_each(|block| self.forgotten(block));
            }
            Call::DropBuffers => {
                self.client.drop_buffers();
                // Reports what drop_buffers could not write, and tries again.
                let res = self.client.write_dirty();
                let dirty = (0..BLOCKS)
                    .filter_map(|block| self.client.get(block))
                    .filter(|held| !held.is_pinned())
                    .any(|held| held.is_dirty());
                assert_eq!(res.is_err(), dirty);
                let again = self.client.write_dirty();
                self.wrote(&(0..BLOCKS).collect::<Vec<_>>(), again);
            }
            Call::Shrink(blocks) => self.client.shrink(blocks * 1024),
            Call::BadWrite(block) => {
                self.model.bad_writes.insert(block);
                self.disk.set(|state| state.bad_writes.insert(block * 2));
            }
            Call::BadRead(block) => {
                self.model.bad_reads.insert(block);
                self.disk.set(|state| state.bad_reads.insert(block * 2 + 1));
            }
            Call::Heal => {
                self.model.bad_writes.clear();
                self.model.bad_reads.clear();
                self.disk.set(|state| {
                    state.bad_writes.clear();
                    state.bad_reads.clear();
                });
            }
        }
    }
}

proptest! {
    #[test]
    fn client_keeps_its_promises(calls in proptest::collection::vec(call(), 1..120)) {
        let (disk, client) = rig(BLOCKS * 2);
        let mut run = Run { disk, client, model: Model::default() };
        for call in calls {
            run.step(call);
            prop_assert_eq!(run.client.stats().pinned, run.model.pinned.len());
        }
        run.step(Call::Heal);
        let pinned: Vec<u64> = run.model.pinned.keys().copied().collect();
        pinned.into_iter().for_each(|block| run.step(Call::Unpin(block)));
        run.step(Call::WriteDirty);
        prop_assert!(run.model.newer.is_empty());
        prop_assert_eq!(run.client.stats().dirty, 0);
        prop_assert_eq!(run.disk.set(|state| state.overlaps), 0);
    }
}
