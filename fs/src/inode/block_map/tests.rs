//! The map against a list of blocks, with pointer blocks so small that all levels are in use.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::{Strategy, prop_assert, prop_oneof, proptest};

use super::*;
use crate::format::extent::Bounds;

/// For what need only come to an end.
fn ends<T>(_: T) {}

#[derive(Debug, Eq, PartialEq)]
enum Failure {
    NoSpace,
    Corrupt(&'static str, u64),
}

struct Store {
    per: u32,
    nodes: BTreeMap<u64, RefCell<Vec<u8>>>,
    next: u64,
    space: usize,
}

impl Nodes for Store {
    type Error = Failure;
    fn bounds(&self) -> Bounds {
        Bounds {
            first: 1,
            end: 1 << 31,
        }
    }
    fn corrupt(&self, what: &'static str, block: u64) -> Failure {
        Failure::Corrupt(what, block)
    }
    fn read<R>(&self, block: u64, look: impl FnOnce(&[u8]) -> R) -> Result<R, Failure> {
        let node = self
            .nodes
            .get(&block)
            .ok_or(Failure::Corrupt("no such block", block))?;
        let node = node
            .try_borrow_mut()
            .expect("two blocks locked at a time, or one twice");
        Ok(look(&node))
    }
}

impl NodesMut for Store {
    fn write<R>(&mut self, block: u64, f: impl FnOnce(&mut [u8]) -> R) -> Result<R, Failure> {
        let node = self
            .nodes
            .get(&block)
            .ok_or(Failure::Corrupt("no such block", block))?;
        Ok(f(&mut node.borrow_mut()))
    }
    fn create(&mut self, _: u64) -> Result<u64, Failure> {
        if self.nodes.len() >= self.space {
            return Err(Failure::NoSpace);
        }
        self.next += 1;
        self.nodes
            .insert(self.next, RefCell::new(vec![0; self.per as usize * 4]));
        Ok(self.next)
    }
    fn free(&mut self, block: u64) -> Result<(), Failure> {
        let gone = self.nodes.remove(&block);
        gone.map(|_| ())
            .ok_or(Failure::Corrupt("freed twice", block))
    }
}

struct Rig {
    store: Store,
    root: [u8; 60],
    model: BTreeMap<u32, u64>,
    used: u32,
}

impl Rig {
    fn new(per: u32, space: usize) -> Self {
        let store = Store {
            per,
            nodes: BTreeMap::new(),
            next: 1 << 30,
            space,
        };
        Self {
            store,
            root: [0; 60],
            model: BTreeMap::new(),
            used: 1000,
        }
    }

    fn subtree(
        &self,
        block: u64,
        level: u32,
        base: u32,
        seen: &mut BTreeSet<u64>,
        flat: &mut BTreeMap<u32, u64>,
    ) {
        if block == 0 {
            return;
        }
        if level == 0 {
            flat.insert(base, block);
            return;
        }
        assert!(seen.insert(block), "shared pointer block");
        let data = self.store.nodes[&block].borrow();
        assert!(data.iter().any(|b| *b != 0), "empty pointer block kept");
        let span = self.store.per.pow(level - 1);
        for i in 0..self.store.per {
            let child = u64::from(pointer(&data, i as usize));
            self.subtree(child, level - 1, base + i * span, seen, flat);
        }
    }

    fn check(&self) {
        let (mut seen, mut flat) = (BTreeSet::new(), BTreeMap::new());
        let mut base = 0;
        for slot in 0..15 {
            let level = (slot as u32).saturating_sub(11);
            self.subtree(
                u64::from(pointer(&self.root, slot)),
                level,
                base,
                &mut seen,
                &mut flat,
            );
            base += self.store.per.pow(level);
        }
        assert_eq!(u64::from(base), max_blocks(self.store.per));
        assert_eq!(
            seen,
            self.store.nodes.keys().copied().collect(),
            "pointer blocks lost"
        );
        assert_eq!(flat, self.model);
    }

    fn check_lookup(&self, lblk: u32, max: u32) {
        match lookup(&self.store, &self.root, lblk, max, self.store.per).expect("lookup") {
            Found::Hole { len } => {
                assert!(len >= 1 && len <= max);
                assert!(self.model.range(lblk..lblk + len).next().is_none());
                let end = lblk + len;
                if len < max {
                    assert!(self.model.contains_key(&end), "hole ends before a mapping");
                }
            }
            Found::Mapped { pblk, len, .. } => {
                assert!(len >= 1 && len <= max);
                for i in 0..len {
                    assert_eq!(self.model[&(lblk + i)], pblk + u64::from(i));
                }
            }
        }
    }

    fn insert(&mut self, lblk: u32, len: u32, join: bool) {
        let top = max_blocks(self.store.per) as u32;
        let end = (lblk + len).min(top);
        let mut pos = lblk;
        while pos < end {
            let per = self.store.per;
            let run = match lookup(&self.store, &self.root, pos, end - pos, per).expect("lookup") {
                Found::Mapped { len, .. } => {
                    pos += len;
                    continue;
                }
                Found::Hole { len } => len,
            };
            if !join {
                self.used += 7;
            }
            let first = self.used;
            self.used += run;
            match insert(&mut self.store, &mut self.root, pos, first, run, per) {
                Ok(()) => {
                    self.model
                        .extend((0..run).map(|i| (pos + i, u64::from(first + i))));
                }
                Err(error) => assert_eq!(error, Failure::NoSpace),
            }
            self.check();
            pos += run;
        }
    }

    fn remove(&mut self, from: u32, to: u32, runs: usize) {
        let mut end = Some(to);
        let mut turns = 0;
        while let Some(to) = end {
            let per = self.store.per;
            let removed = remove_step(&mut self.store, &mut self.root, from, to, runs, per);
            let removed = removed.expect("remove");
            assert!(removed.freed.len() <= runs);
            for (pblk, len) in &removed.freed {
                for p in *pblk..*pblk + u64::from(*len) {
                    let at = self.model.iter().find(|(_, v)| **v == p).map(|(k, _)| *k);
                    let at = at.expect("freed block was mapped");
                    assert!((from..to).contains(&at));
                    self.model.remove(&at);
                }
            }
            self.check();
            end = removed.rest;
            turns += 1;
            assert!(turns < 10_000);
        }
        assert!(
            self.model.range(from..to).next().is_none(),
            "range not empty"
        );
    }
}

#[derive(Clone, Debug)]
enum Op {
    Insert { lblk: u32, len: u32, join: bool },
    Remove { from: u32, len: u32, runs: usize },
    Lookup { lblk: u32, max: u32 },
}

fn op() -> impl Strategy<Value = Op> {
    let at = || prop_oneof![0..30u32, 0..600u32];
    let len = || prop_oneof![4 => 1..4u32, 1 => 1..90u32];
    prop_oneof![
        6 => (at(), len(), proptest::bool::ANY)
            .prop_map(|(lblk, len, join)| Op::Insert { lblk, len, join }),
        3 => (at(), prop_oneof![3 => 1..8u32, 1 => 1..600u32], 1..6usize)
            .prop_map(|(from, len, runs)| Op::Remove { from, len, runs }),
        3 => (at(), len()).prop_map(|(lblk, max)| Op::Lookup { lblk, max }),
    ]
}

fn run(rig: &mut Rig, ops: Vec<Op>) {
    for op in ops {
        match op {
            Op::Insert { lblk, len, join } => rig.insert(lblk, len, join),
            Op::Remove { from, len, runs } => rig.remove(from, from + len, runs),
            Op::Lookup { lblk, max } => rig.check_lookup(lblk, max),
        }
        rig.check();
    }
}

proptest! {
    #[test]
    fn behaves_like_a_list_of_blocks(
        ops in proptest::collection::vec(op(), 1..100),
        per in prop_oneof![4..5u32, 8..9u32],
    ) {
        run(&mut Rig::new(per, usize::MAX), ops);
    }

    #[test]
    fn without_space_nothing_changes(
        ops in proptest::collection::vec(op(), 1..100),
        space in 0..20usize,
    ) {
        run(&mut Rig::new(4, space), ops);
    }

    #[test]
    fn damage_ends_in_an_error_or_not_at_all(
        fill in proptest::collection::vec(op(), 10..60),
        ops in proptest::collection::vec(op(), 1..30),
        hits in proptest::collection::vec((0..1000usize, 0..8usize, 0..1000usize), 1..6),
    ) {
        let mut rig = Rig::new(8, 1000);
        run(&mut rig, fill);
        let blocks: Vec<u64> = rig.store.nodes.keys().copied().collect();
        for (node, at, to) in hits {
            // Pointers to other pointer blocks, to nowhere and out of the file system.
            let value = match to % 4 {
                0 => u32::MAX,
                1 => to as u32,
                _ => blocks.get(to % blocks.len().max(1)).map_or(3, |b| *b as u32),
            };
            match blocks.get(node % blocks.len().max(1)) {
                Some(b) => set_pointer(&mut rig.store.nodes[b].borrow_mut(), at, value),
                None => set_pointer(&mut rig.root, 8 + at % 7, value),
            }
        }
        let (s, r) = (&mut rig.store, &mut rig.root);
        for op in ops {
            match op {
                Op::Insert { lblk, len, .. } => {
                    ends(insert(s, r, lblk, 5_000_000, len, 8));
                }
                Op::Remove { from, len, runs } => {
                    let mut to = Some(from + len);
                    let mut turns = 0;
                    while let Some(t) = to {
                        to = remove_step(s, r, from, t, runs, 8).ok().and_then(|x| x.rest);
                        turns += 1;
                        prop_assert!(turns < 10_000);
                    }
                }
                Op::Lookup { lblk, max } => { ends(lookup(s, r, lblk, max, 8)); }
            }
        }
    }
}

#[test]
fn places_are_numbered_without_gaps() {
    for per in [4u32, 8, 256] {
        let mut before: Option<Place> = None;
        for lblk in 0..u32::try_from(max_blocks(per).min(200_000)).expect("small") {
            let p = place(lblk, per).expect("inside");
            assert!(p.rel < p.span);
            if let Some(b) = before {
                let next = p.slot == b.slot && p.rel == b.rel + 1;
                let step = p.slot == b.slot + 1 && p.rel == 0 && b.rel + 1 == b.span;
                assert!(next || step, "{lblk}");
            }
            before = Some(p);
        }
    }
    assert!(place(u32::try_from(max_blocks(8)).expect("small"), 8).is_none());
}

#[test]
fn an_empty_pointer_block_found_on_the_way_is_freed() {
    let mut rig = Rig::new(4, 100);
    rig.insert(20, 1, false);
    let dind = u64::from(pointer(&rig.root, 13));
    let ind = u64::from(pointer(&rig.store.nodes[&dind].borrow(), 1));
    rig.store.nodes[&ind].borrow_mut().fill(0);
    rig.model.clear();
    rig.remove(0, u32::MAX, 8);
    assert!(rig.store.nodes.is_empty());
    assert_eq!(rig.root, [0; 60]);
}
