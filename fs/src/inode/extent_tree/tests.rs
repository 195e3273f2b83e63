//! The tree against a list of blocks, with nodes so small that five levels are soon reached.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::{Strategy, prop_assert, prop_oneof, proptest};

use super::*;

/// For what need only come to an end.
fn ends<T>(_: T) {}

#[derive(Debug, Eq, PartialEq)]
enum Failure {
    NoSpace,
    Corrupt(&'static str, u64),
}

struct Store {
    node_len: usize,
    nodes: BTreeMap<u64, RefCell<Vec<u8>>>,
    next: u64,
    space: usize,
}

impl Nodes for Store {
    type Error = Failure;
    fn bounds(&self) -> Bounds {
        Bounds {
            first: 1,
            end: 1 << 40,
        }
    }
    fn corrupt(&self, what: &'static str, block: u64) -> Failure {
        Failure::Corrupt(what, block)
    }
    fn read<R>(&self, block: u64, look: impl FnOnce(&[u8]) -> R) -> Result<R, Failure> {
        let node = self
            .nodes
            .get(&block)
            .ok_or(Failure::Corrupt("no such node", block))?;
        let node = node
            .try_borrow_mut()
            .expect("two nodes locked at a time, or one twice");
        Ok(look(&node))
    }
}

impl NodesMut for Store {
    fn write<R>(&mut self, block: u64, f: impl FnOnce(&mut [u8]) -> R) -> Result<R, Failure> {
        let node = self
            .nodes
            .get(&block)
            .ok_or(Failure::Corrupt("no such node", block))?;
        Ok(f(&mut node.borrow_mut()))
    }
    fn create(&mut self, _: u64) -> Result<u64, Failure> {
        if self.nodes.len() >= self.space {
            return Err(Failure::NoSpace);
        }
        self.next += 1;
        self.nodes
            .insert(self.next, RefCell::new(vec![0; self.node_len]));
        Ok(self.next)
    }
    fn free(&mut self, block: u64) -> Result<(), Failure> {
        let gone = self.nodes.remove(&block);
        gone.map(|_| ())
            .ok_or(Failure::Corrupt("freed twice", block))
    }
}

type Model = BTreeMap<u32, (u64, ExtentState)>;

struct Rig {
    store: Store,
    root: [u8; extent::ROOT_LEN],
    model: Model,
    freed: BTreeSet<u64>,
    used: u64,
}

impl Rig {
    fn new(entries: usize, space: usize) -> Self {
        let mut root = [0; extent::ROOT_LEN];
        extent::init(&mut root, 0);
        let store = Store {
            node_len: 12 + 12 * entries + 4,
            nodes: BTreeMap::new(),
            next: 1 << 30,
            space,
        };
        Self {
            store,
            root,
            model: Model::new(),
            freed: BTreeSet::new(),
            used: 1000,
        }
    }

    /// Extents as the tree holds them, after checking its shape.
    fn walk(&self) -> Vec<Extent> {
        let mut out = Vec::new();
        let mut seen = BTreeSet::new();
        let depth = extent::depth(&self.root).expect("root");
        self.walk_node(&self.root, depth, &mut out, &mut seen);
        assert_eq!(
            seen,
            self.store.nodes.keys().copied().collect(),
            "nodes lost or shared"
        );
        let ordered = out.windows(2).all(|w| w[0].end() <= u64::from(w[1].lblk));
        assert!(ordered, "leaves out of order");
        out
    }

    fn walk_node(&self, data: &[u8], depth: u16, out: &mut Vec<Extent>, seen: &mut BTreeSet<u64>) {
        extent::check(data, Some(depth), self.store.bounds()).expect("sound node");
        match extent::view(data, Some(depth)).expect("node") {
            Node::Leaf(leaf) => out.extend(leaf.iter()),
            Node::Index(index) => {
                for c in index.iter() {
                    assert!(seen.insert(c.pblk));
                    let child = self.store.nodes[&c.pblk].borrow();
                    assert_eq!(extent::first_key(&child), Some(c.lblk), "key of a child");
                    self.walk_node(&child, depth - 1, out, seen);
                }
            }
        }
    }

    fn check(&self) {
        let mut flat = Model::new();
        for e in self.walk() {
            for i in 0..e.len {
                flat.insert(e.lblk + i, (e.pblk + u64::from(i), e.state));
            }
        }
        assert_eq!(flat, self.model);
    }

    fn check_lookup(&self, lblk: u32, max: u32) {
        let found = lookup(&self.store, &self.root, lblk, max).expect("lookup");
        match found {
            Found::Hole { len } => {
                assert!(len >= 1 && len <= max);
                assert!(
                    self.model
                        .range(lblk..lblk.saturating_add(len))
                        .next()
                        .is_none()
                );
                let end = lblk.saturating_add(len);
                if len < max && end < u32::MAX {
                    assert!(self.model.contains_key(&end), "hole ends before a mapping");
                }
            }
            Found::Mapped { pblk, len, state } => {
                assert!(len >= 1 && len <= max);
                for i in 0..len {
                    assert_eq!(self.model[&(lblk + i)], (pblk + u64::from(i), state));
                }
            }
        }
    }

    /// Maps what is a hole within the range, contiguous with the block before if `join`.
    fn insert(&mut self, lblk: u32, len: u32, state: ExtentState, join: bool) {
        let len = len.min(u32::MAX - lblk);
        let mut pos = lblk;
        while pos < lblk + len {
            let run = match lookup(&self.store, &self.root, pos, lblk + len - pos).expect("lookup")
            {
                Found::Mapped { len, .. } => {
                    pos += len;
                    continue;
                }
                Found::Hole { len } => len,
            };
            let before = pos
                .checked_sub(1)
                .and_then(|p| self.model.get(&p))
                .map(|b| b.0 + 1);
            let taken = |p: u64| self.model.values().any(|v| v.0 == p);
            let pblk = match before {
                Some(p) if join && (0..run).all(|i| !taken(p + u64::from(i))) => p,
                _ => {
                    self.used += 70_000;
                    self.used
                }
            };
            let e = Extent {
                lblk: pos,
                len: run,
                pblk,
                state,
            };
            match insert(&mut self.store, &mut self.root, e) {
                Ok(()) => {
                    for i in 0..run {
                        self.model.insert(pos + i, (pblk + u64::from(i), state));
                    }
                }
                Err(error) => assert_eq!(error, Failure::NoSpace),
            }
            self.check();
            pos += run;
        }
    }

    fn remove(&mut self, from: u32, to: u32, step: usize) {
        let mut end = Some(to);
        let mut turns = 0;
        while let Some(to) = end {
            let removed = match remove_step(&mut self.store, &mut self.root, from, to, step) {
                Ok(removed) => removed,
                Err(error) => {
                    assert_eq!(error, Failure::NoSpace);
                    return self.check();
                }
            };
            for (pblk, len) in &removed.freed {
                assert!(*len > 0);
                for p in *pblk..*pblk + u64::from(*len) {
                    let at = self.model.iter().find(|(_, v)| v.0 == p).map(|(k, _)| *k);
                    let at = at.expect("freed block was mapped");
                    assert!((from..to).contains(&at));
                    self.model.remove(&at);
                    self.freed.insert(p);
                }
            }
            self.check();
            assert!(
                removed
                    .rest
                    .is_none_or(|r| r < to || !removed.freed.is_empty())
            );
            end = removed.rest;
            turns += 1;
            assert!(turns < 10_000);
        }
        assert!(
            self.model.range(from..to).next().is_none(),
            "range not empty"
        );
    }

    fn convert(&mut self, from: u32, to: u32) {
        let done = convert(&mut self.store, &mut self.root, from, to);
        if done.is_ok() {
            self.model
                .range_mut(from..to)
                .for_each(|(_, v)| v.1 = ExtentState::Written);
        } else {
            assert_eq!(done, Err(Failure::NoSpace));
            // What was converted before stays so.
            for (lblk, v) in self.model.range_mut(from..to) {
                if let Ok(Found::Mapped { state, .. }) = lookup(&self.store, &self.root, *lblk, 1) {
                    v.1 = state;
                }
            }
        }
        self.check();
    }

    fn collapse(&mut self, from: u32, len: u32) {
        self.remove(from, from + len, 4);
        if self.model.range(from..from + len).next().is_some() {
            return; // no space for the split
        }
        let mut pos = Some(from + len);
        while let Some(p) = pos {
            pos = shift_down_step(&mut self.store, &mut self.root, p, len).expect("shift");
        }
        let above = self.model.split_off(&(from + len));
        self.model
            .extend(above.into_iter().map(|(k, v)| (k - len, v)));
        self.check();
    }

    fn insert_range(&mut self, from: u32, len: u32) {
        match split_before(&mut self.store, &mut self.root, from) {
            Err(Failure::NoSpace) => return self.check(),
            other => other.expect("split"),
        }
        self.check();
        let mut to = Some(u32::MAX);
        while let Some(t) = to {
            to = shift_up_step(&mut self.store, &mut self.root, from, t, len).expect("shift");
        }
        let above = self.model.split_off(&from);
        self.model
            .extend(above.into_iter().map(|(k, v)| (k + len, v)));
        self.check();
    }
}

#[derive(Clone, Debug)]
enum Op {
    Insert {
        lblk: u32,
        len: u32,
        written: bool,
        join: bool,
    },
    Remove {
        from: u32,
        len: u32,
        step: usize,
    },
    Convert {
        from: u32,
        len: u32,
    },
    Lookup {
        lblk: u32,
        max: u32,
    },
    Collapse {
        from: u32,
        len: u32,
    },
    InsertRange {
        from: u32,
        len: u32,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let at = || 0..400u32;
    let len = || prop_oneof![4 => 1..4u32, 1 => 1..60u32];
    prop_oneof![
        8 => (at(), len(), proptest::bool::ANY, proptest::bool::ANY)
            .prop_map(|(lblk, len, written, join)| Op::Insert { lblk, len, written, join }),
        3 => (at(), prop_oneof![3 => 1..8u32, 1 => 1..400u32], 1..6usize)
            .prop_map(|(from, len, step)| Op::Remove { from, len, step }),
        4 => (at(), len()).prop_map(|(from, len)| Op::Convert { from, len }),
        4 => (at(), len()).prop_map(|(lblk, max)| Op::Lookup { lblk, max }),
        1 => (at(), len()).prop_map(|(from, len)| Op::Collapse { from, len }),
        1 => (at(), 1..10u32).prop_map(|(from, len)| Op::InsertRange { from, len }),
    ]
}

fn state(written: bool) -> ExtentState {
    if written {
        ExtentState::Written
    } else {
        ExtentState::Unwritten
    }
}

fn run(rig: &mut Rig, ops: Vec<Op>) {
    for op in ops {
        match op {
            Op::Insert {
                lblk,
                len,
                written,
                join,
            } => rig.insert(lblk, len, state(written), join),
            Op::Remove { from, len, step } => rig.remove(from, from + len, step),
            Op::Convert { from, len } => rig.convert(from, from + len),
            Op::Lookup { lblk, max } => rig.check_lookup(lblk, max),
            Op::Collapse { from, len } => rig.collapse(from, len),
            Op::InsertRange { from, len } => rig.insert_range(from, len),
        }
        rig.check();
    }
}

proptest! {
    #[test]
    fn behaves_like_a_list_of_blocks(
        ops in proptest::collection::vec(op(), 1..120),
        entries in prop_oneof![7..9usize, 84..85usize],
    ) {
        run(&mut Rig::new(entries, usize::MAX), ops);
    }

    #[test]
    fn without_space_nothing_changes(
        ops in proptest::collection::vec(op(), 1..120),
        space in 0..20usize,
    ) {
        run(&mut Rig::new(7, space), ops);
    }

    /// Whatever the node says, operations end and report.
    #[test]
    fn damage_ends_in_an_error_or_not_at_all(
        ops in proptest::collection::vec(op(), 1..30),
        fill in proptest::collection::vec(op(), 20..80),
        hits in proptest::collection::vec((0..1000usize, 0..96usize, 0u8..=255), 1..6),
    ) {
        let mut rig = Rig::new(7, 1000);
        run(&mut rig, fill);
        for (node, at, byte) in hits {
            let n = rig.store.nodes.len();
            if n == 0 {
                rig.root[at % extent::ROOT_LEN] = byte;
            } else if let Some(node) = rig.store.nodes.values().nth(node % n) {
                node.borrow_mut()[at] = byte;
            }
        }
        let (s, r) = (&mut rig.store, &mut rig.root);
        for op in ops {
            match op {
                Op::Insert { lblk, len, written, .. } => {
                    let e = Extent { lblk, len, pblk: 5_000_000, state: state(written) };
                    ends(insert(s, r, e));
                }
                Op::Remove { from, len, step } => {
                    let mut to = Some(from + len);
                    let mut turns = 0;
                    while let Some(t) = to {
                        to = remove_step(s, r, from, t, step).ok().and_then(|x| x.rest);
                        turns += 1;
                        prop_assert!(turns < 10_000);
                    }
                }
                Op::Convert { from, len } => { ends(convert(s, r, from, from + len)); }
                Op::Lookup { lblk, max } => { ends(lookup(s, r, lblk, max)); }
                Op::Collapse { from, len } => {
                    ends(shift_down_step(s, r, from, len));
                }
                Op::InsertRange { from, len } => {
                    ends(split_before(s, r, from));
                    ends(shift_up_step(s, r, from, u32::MAX, len));
                }
            }
        }
        ends(before(s, r, 17));
    }
}

#[test]
fn appending_fills_the_leaves() {
    let mut rig = Rig::new(7, usize::MAX);
    for i in 0..300 {
        rig.insert(i * 2, 1, ExtentState::Written, false);
    }
    let leaves = 300usize.div_ceil(7);
    let nodes = rig.store.nodes.len();
    assert!(
        nodes <= leaves + leaves.div_ceil(6) + 4,
        "{nodes} nodes for {leaves} full leaves"
    );
    assert!(extent::depth(&rig.root).expect("root") >= 2);
    rig.remove(0, u32::MAX, 16);
    assert_eq!(
        (rig.store.nodes.len(), extent::depth(&rig.root)),
        (0, Ok(0))
    );
}

#[test]
fn the_last_logical_block_can_be_mapped_and_no_further() {
    let mut rig = Rig::new(7, usize::MAX);
    rig.insert(u32::MAX - 3, 3, ExtentState::Written, false);
    rig.check_lookup(u32::MAX - 1, 1);
    rig.check_lookup(0, u32::MAX);
    let beyond = Extent {
        lblk: u32::MAX,
        len: 1,
        pblk: 9,
        state: ExtentState::Written,
    };
    assert!(matches!(
        insert(&mut rig.store, &mut rig.root, beyond),
        Err(Failure::Corrupt(..))
    ));
    assert_eq!(end(&rig.store, &rig.root), Ok(u64::from(u32::MAX)));
    rig.remove(5, u32::MAX, 1);
}

#[test]
fn extents_are_cut_at_their_longest_and_read_as_one() {
    let mut rig = Rig::new(7, usize::MAX);
    for i in 0..3 {
        let e = Extent {
            lblk: i * 0x8000,
            len: 0x8000,
            pblk: 0x10_0000 + u64::from(i) * 0x8000,
            state: ExtentState::Written,
        };
        insert(&mut rig.store, &mut rig.root, e).expect("insert");
    }
    let got = lookup(&rig.store, &rig.root, 5, u32::MAX).expect("lookup");
    let want = Found::Mapped {
        pblk: 0x10_0005,
        len: 3 * 0x8000 - 5,
        state: ExtentState::Written,
    };
    assert_eq!(got, want);
    assert_eq!(rig.walk().len(), 3);
}

#[test]
fn a_converted_extent_merges_with_both_neighbours() {
    let mut rig = Rig::new(7, usize::MAX);
    rig.insert(0, 4, ExtentState::Written, true);
    rig.insert(4, 4, ExtentState::Unwritten, true);
    rig.insert(8, 4, ExtentState::Written, true);
    assert_eq!(rig.walk().len(), 3);
    rig.convert(4, 6);
    assert_eq!(rig.walk().len(), 3);
    rig.convert(5, 20);
    assert_eq!(rig.walk().len(), 1);
}
