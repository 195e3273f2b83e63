use std::cell::{Cell, Ref, RefCell, RefMut};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use proptest::prelude::*;

use super::list::list;
use super::store::{DirConfig, Store, StoreMut};
use super::{Emit, Entry, names};
use crate::format::dirent::DirLayout;
use crate::format::htree::{self, CharSign, DxEntries, DxKind, HashKind};

/// Blocks of one directory in memory.
struct Memory {
    config: DirConfig,
    blocks: Vec<Rc<RefCell<Vec<u8>>>>,
    indexed: bool,
    max_blocks: usize,
    warned: RefCell<Vec<&'static str>>,
    reads: Cell<u32>,
}

#[derive(Debug, Eq, PartialEq)]
enum MemoryError {
    Corrupt(&'static str, u32),
    NoSpace,
}

impl Store for Memory {
    type Block = Rc<RefCell<Vec<u8>>>;
    type Error = MemoryError;
    type Bytes<'a> = Ref<'a, [u8]>;

    fn config(&self) -> &DirConfig {
        &self.config
    }
    fn blocks(&self) -> u32 {
        self.blocks.len() as u32
    }
    fn indexed(&self) -> bool {
        self.indexed
    }
    fn read(&self, lblk: u32) -> Result<Self::Block, MemoryError> {
        self.reads.set(self.reads.get() + 1);
        Ok(Rc::clone(&self.blocks[lblk as usize]))
    }
    fn bytes<'a>(&'a self, block: &'a Self::Block) -> Ref<'a, [u8]> {
        Ref::map(block.borrow(), Vec::as_slice)
    }
    fn prefetch(&self, lblk: u32, count: u32) {
        assert!(lblk + count <= self.blocks());
    }
    fn corrupt(&self, what: &'static str, lblk: u32) -> MemoryError {
        MemoryError::Corrupt(what, lblk)
    }
    fn warn(&self, what: &'static str, _: u32) {
        self.warned.borrow_mut().push(what);
    }
}

impl StoreMut for Memory {
    type BytesMut<'a> = RefMut<'a, [u8]>;

    fn edit<'a>(&'a self, block: &'a Self::Block) -> Result<RefMut<'a, [u8]>, MemoryError> {
        Ok(RefMut::map(block.borrow_mut(), Vec::as_mut_slice))
    }
    fn append(&mut self) -> Result<(u32, Self::Block), MemoryError> {
        if self.blocks.len() >= self.max_blocks {
            return Err(MemoryError::NoSpace);
        }
        let block = Rc::new(RefCell::new(vec![0; self.config.layout.block_size]));
        self.blocks.push(Rc::clone(&block));
        Ok((self.blocks.len() as u32 - 1, block))
    }
    fn set_indexed(&mut self) {
        self.indexed = true;
    }
    fn clear_indexed(&mut self) {
        self.indexed = false;
    }
    fn full(&self) -> MemoryError {
        MemoryError::NoSpace
    }
}

fn config(block_size: usize, hash: Option<HashKind>, tail: bool) -> DirConfig {
    DirConfig {
        layout: DirLayout {
            block_size,
            filetype: true,
            tail,
            max_ino: 1 << 30,
        },
        dir_index: hash.is_some(),
        default_hash: hash,
        sign: CharSign::Signed,
        seed: [1, 2, 3, 4],
        max_levels: 1,
    }
}

fn memory(config: DirConfig) -> Memory {
    let mut store = Memory {
        config,
        blocks: Vec::new(),
        indexed: false,
        max_blocks: usize::MAX,
        warned: RefCell::new(Vec::new()),
        reads: Cell::new(0),
    };
    names::init(&mut store, 100, 2).unwrap();
    store
}

fn lookup(store: &Memory, name: &[u8]) -> Option<u32> {
    names::find(store, name).unwrap().map(|p| p.found.ino)
}

/// Lists everything in pieces of `piece` names.
fn list_all(store: &Memory, piece: usize) -> Vec<(Vec<u8>, u32, u64)> {
    let mut all = Vec::new();
    let mut cookie = 0;
    loop {
        let before = all.len();
        list(store, cookie, &mut |e: &Entry<'_>| {
            if all.len() - before == piece {
                return Emit::Full;
            }
            all.push((e.name.to_vec(), e.ino, e.next_cookie));
            Emit::More
        })
        .unwrap();
        match all.last() {
            Some(last) if all.len() > before => {
                assert!(last.2 > cookie, "cookies ascend");
                cookie = last.2;
            }
            _ => return all,
        }
    }
}

/// Checks a whole index as e2fsck does: ranges, order, each block used once.
fn check_index(store: &Memory) {
    let layout = store.config.layout;
    let root = store.blocks[0].borrow();
    let info = htree::root_info(&root, layout, store.config.max_levels).unwrap();
    let hasher = store.config.hasher(info.hash);
    let mut seen = BTreeSet::from([0]);
    check_node(store, &hasher, 0, info.levels, (0, u32::MAX), &mut seen);
    assert_eq!(seen.len(), store.blocks.len(), "every block is reached");
}

fn check_node(
    store: &Memory,
    hasher: &htree::Hasher,
    lblk: u32,
    levels: u8,
    (from, to): (u32, u32),
    seen: &mut BTreeSet<u32>,
) {
    let layout = store.config.layout;
    let block = store.blocks[lblk as usize].borrow();
    let kind = if lblk == 0 {
        DxKind::Root
    } else {
        DxKind::Node
    };
    let entries = DxEntries::new(&block, kind, layout, store.blocks()).unwrap();
    entries.check_order().unwrap();
    for i in 0..entries.len() {
        let child = entries.block(i).unwrap();
        assert!(seen.insert(child), "block {child} is used twice");
        let low = if i == 0 { from } else { entries.hash(i) };
        let high = if i + 1 < entries.len() {
            entries.hash(i + 1)
        } else {
            to
        };
        assert!(low >= from && high <= to);
        if levels > 0 {
            check_node(store, hasher, child, levels - 1, (low, high), seen);
        } else {
            let leaf = store.blocks[child as usize].borrow();
            for e in crate::format::dirent::entries(&leaf, layout) {
                let e = e.unwrap();
                if e.is_used() {
                    let major = hasher.hash(e.name).major;
                    assert!(
                        major >= low & !1 && major <= high,
                        "{major:x} in {low:x}..{high:x}"
                    );
                    assert!(major < high || high & 1 == 1 || high == u32::MAX);
                }
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    Add(u16),
    Remove(u16),
    Set(u16),
}

/// Different numbers give different names, of all lengths.
fn name(n: u16) -> Vec<u8> {
    let mut name = format!("{n:x}").into_bytes();
    let len = usize::from(n).wrapping_mul(2_654_435_761) % 251;
    name.resize(name.len().max(len), b'\xe4');
    name
}

fn op() -> impl Strategy<Value = Op> {
    let n = 0..600_u16;
    prop_oneof![
        6 => n.clone().prop_map(Op::Add),
        3 => n.clone().prop_map(Op::Remove),
        1 => n.prop_map(Op::Set),
    ]
}

fn configs() -> impl Strategy<Value = DirConfig> {
    let hashes = prop_oneof![
        Just(None),
        Just(Some(HashKind::Legacy)),
        Just(Some(HashKind::HalfMd4)),
        Just(Some(HashKind::Tea)),
    ];
    let sizes = prop_oneof![Just(1024_usize), Just(2048), Just(4096), Just(65536)];
    (sizes, hashes, any::<bool>()).prop_map(|(size, hash, tail)| config(size, hash, tail))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_directory_is_a_map(config in configs(), ops in prop::collection::vec(op(), 1..900)) {
        let mut store = memory(config);
        let mut model = BTreeMap::new();
        for (i, op) in ops.iter().enumerate() {
            let ino = 1000 + i as u32;
            match op {
                Op::Add(n) if !model.contains_key(&name(*n)) => {
                    names::add(&mut store, (&name(*n), ino, 1)).unwrap();
                    model.insert(name(*n), ino);
                }
                Op::Add(n) => prop_assert!(lookup(&store, &name(*n)).is_some()),
                Op::Remove(n) => {
                    let removed = names::remove(&mut store, &name(*n)).unwrap();
                    prop_assert_eq!(removed, model.remove(&name(*n)));
                }
                Op::Set(n) => {
                    let there = names::set(&mut store, (&name(*n), ino, 2)).unwrap();
                    prop_assert_eq!(there, model.contains_key(&name(*n)));
                    model.entry(name(*n)).and_modify(|old| *old = ino);
                }
            }
        }
        for n in 0..600 {
            prop_assert_eq!(lookup(&store, &name(n)), model.get(&name(n)).copied());
        }
        prop_assert_eq!(names::is_empty(&store).unwrap(), model.is_empty());
        if store.indexed {
            check_index(&store);
        }
        for piece in [1, 7, usize::MAX] {
            let listed = list_all(&store, piece);
            prop_assert_eq!(&listed[0].0[..], b".");
            prop_assert_eq!(&listed[1].0[..], b"..");
            let map: BTreeMap<_, _> = listed.iter().skip(2).map(|e| (e.0.clone(), e.1)).collect();
            prop_assert_eq!(map.len(), listed.len() - 2);
            prop_assert_eq!(&map, &model);
        }
        prop_assert!(store.warned.borrow().is_empty());
    }

    /// Names that are there from the first to the last call are listed exactly once.
    #[test]
    fn a_listing_survives_changes(
        config in configs(),
        start in 0..300_u16,
        piece in 1..40_usize,
        ops in prop::collection::vec(op(), 1..600),
    ) {
        let mut store = memory(config);
        let mut there = BTreeSet::new();
        for n in 0..start {
            names::add(&mut store, (&name(n), 1000 + u32::from(n), 1)).unwrap();
            there.insert(name(n));
        }
        let mut stable = there.clone();
        let mut seen = BTreeMap::<Vec<u8>, u32>::new();
        let mut ops = ops.iter();
        let mut cookie = 0;
        loop {
            let mut got = Vec::new();
            list(&store, cookie, &mut |e| {
                if got.len() == piece {
                    return Emit::Full;
                }
                got.push((e.name.to_vec(), e.next_cookie));
                Emit::More
            })
            .unwrap();
            let Some(last) = got.last() else { break };
            cookie = last.1;
            for (name, _) in got {
                *seen.entry(name).or_default() += 1;
            }
            for op in ops.by_ref().take(20) {
                let (Op::Add(n) | Op::Remove(n) | Op::Set(n)) = op;
                if there.remove(&name(*n)) {
                    names::remove(&mut store, &name(*n)).unwrap();
                    stable.remove(&name(*n));
                } else {
                    names::add(&mut store, (&name(*n), 5000, 1)).unwrap();
                    there.insert(name(*n));
                }
            }
        }
        for name in stable {
            prop_assert_eq!(seen.get(&name), Some(&1));
        }
    }

    /// Whatever the bytes are: an error or an answer, but no panic and no endless walk.
    #[test]
    fn damage_is_survived(
        config in configs(),
        names in 0..400_u16,
        hits in prop::collection::vec((any::<u32>(), any::<u32>(), any::<u8>()), 1..30),
    ) {
        let mut store = memory(config);
        for n in 0..names {
            names::add(&mut store, (&name(n), 1000, 1)).unwrap();
        }
        store.max_blocks = store.blocks.len() + 50;
        for (block, at, value) in hits {
            let block = block as usize % store.blocks.len();
            // Most hits go where the structure is.
            let at = at as usize % if at & 3 == 0 { config.layout.block_size } else { 64 };
            store.blocks[block].borrow_mut()[at] = value;
        }
        for n in (0..names + 50).step_by(7) {
            drop(names::find(&store, &name(n)));
            drop(names::remove(&mut store, &name(n)));
            drop(names::add(&mut store, (&name(n), 5, 1)));
        }
        drop(names::is_empty(&store));
        let mut count = 0_u64;
        drop(list(&store, 0, &mut |_| {
            count += 1;
            Emit::More
        }));
        prop_assert!(count < 10_000_000);
    }
}

/// Counts the entries of a one-level index that continue the leaf before.
fn continuations(store: &Memory) -> usize {
    let root = store.blocks[0].borrow();
    let layout = store.config.layout;
    let entries = DxEntries::new(&root, DxKind::Root, layout, store.blocks()).unwrap();
    (0..entries.len())
        .filter(|&i| entries.hash(i) & 1 == 1)
        .count()
}

#[test]
fn colliding_names_go_on_in_the_next_leaf() {
    // With a zero seed and 1 KiB blocks, names that differ only behind what `legacy` sees do not
    // exist, so the collisions are searched for: 31 bits collide after some 50,000 names.
    let mut store = memory(config(1024, Some(HashKind::Legacy), true));
    let hasher = store.config.hasher(HashKind::Legacy);
    let mut by_hash = BTreeMap::<u32, Vec<Vec<u8>>>::new();
    for n in 0..400_000_u32 {
        let name = format!("{n}").into_bytes();
        by_hash
            .entry(hasher.hash(&name).major)
            .or_default()
            .push(name);
    }
    let groups: Vec<_> = by_hash.into_values().filter(|g| g.len() > 1).collect();
    assert!(groups.len() > 5);
    // Long enough that a leaf holds few.
    let mut all = BTreeSet::new();
    for name in groups.iter().flatten() {
        names::add(&mut store, (name, 7, 1)).unwrap();
        all.insert(name.clone());
    }
    check_index(&store);
    assert!(continuations(&store) > 0);
    for piece in [1, 3, 1000] {
        let listed: Vec<_> = list_all(&store, piece)
            .into_iter()
            .skip(2)
            .map(|e| e.0)
            .collect();
        assert_eq!(listed.len(), all.len());
        assert_eq!(listed.into_iter().collect::<BTreeSet<_>>(), all);
    }
    for name in &all {
        assert_eq!(names::remove(&mut store, name).unwrap(), Some(7));
    }
    assert!(names::is_empty(&store).unwrap());
}

#[test]
fn an_index_grows_levels_and_then_says_full() {
    let mut store = memory(config(1024, Some(HashKind::HalfMd4), true));
    let long = |n: u32| format!("{n:0>200}").into_bytes();
    let mut n = 0;
    let error = loop {
        if let Err(e) = names::add(&mut store, (&long(n), n + 1, 1)) {
            break e;
        }
        n += 1;
    };
    assert_eq!(error, MemoryError::NoSpace);
    assert!(n > 20_000, "{n}");
    check_index(&store);
    for i in (0..n).step_by(97) {
        assert_eq!(lookup(&store, &long(i)), Some(i + 1));
    }
    assert_eq!(lookup(&store, &long(n)), None);
    // With one level more (feature large_dir) the same directory goes on growing.
    store.config.max_levels = 2;
    for i in n..n + 20_000 {
        names::add(&mut store, (&long(i), i + 1, 1)).unwrap();
    }
    check_index(&store);
    assert_eq!(list_all(&store, 1000).len(), n as usize + 20_002);
}

#[test]
fn no_space_leaves_a_valid_directory() {
    for max in 1..40 {
        let mut store = memory(config(1024, Some(HashKind::Tea), false));
        store.max_blocks = max;
        let mut n = 0;
        while names::add(&mut store, (&name(n), 9, 1)).is_ok() {
            n += 1;
        }
        if store.indexed {
            check_index(&store);
        }
        for i in 0..n {
            assert_eq!(lookup(&store, &name(i)), Some(9));
        }
        assert_eq!(lookup(&store, &name(n)), None);
    }
}

#[test]
fn a_broken_index_still_finds_names() {
    let mut store = memory(config(1024, Some(HashKind::HalfMd4), true));
    for n in 0..300 {
        names::add(&mut store, (&name(n), 9, 1)).unwrap();
    }
    // The hash version of the root.
    store.blocks[0].borrow_mut()[28] = 77;
    assert_eq!(lookup(&store, &name(250)), Some(9));
    assert_eq!(
        store.warned.borrow()[..],
        ["directory index root: hash version"]
    );
    let error = names::add(&mut store, (b"new", 9, 1));
    assert_eq!(
        error,
        Err(MemoryError::Corrupt(
            "directory index root: hash version",
            0
        ))
    );
    assert_eq!(list_all(&store, 10).len(), 302);
    assert_eq!(names::remove(&mut store, &name(250)).unwrap(), Some(9));
    assert_eq!(lookup(&store, &name(250)), None);
}

#[test]
fn parent_can_be_changed_with_and_without_index() {
    for count in [0, 300] {
        let mut store = memory(config(1024, Some(HashKind::HalfMd4), true));
        for n in 0..count {
            names::add(&mut store, (&name(n), 9, 1)).unwrap();
        }
        assert_eq!(lookup(&store, b"."), Some(100));
        assert_eq!(lookup(&store, b".."), Some(2));
        assert!(names::set(&mut store, (b"..", 55, 2)).unwrap());
        assert_eq!(lookup(&store, b".."), Some(55));
        assert_eq!(list_all(&store, 1)[1].1, 55);
    }
}

#[test]
fn costs_stay_the_same_in_a_large_directory() {
    const COUNT: u32 = 200_000;
    let mut store = memory(config(4096, Some(HashKind::HalfMd4), true));
    let name = |n: u32| format!("file-{n:07}").into_bytes();
    for n in 0..COUNT {
        store.reads.set(0);
        names::add(&mut store, (&name(n), n + 1, 1)).unwrap();
        // The root once more after it was read, a node, the leaf; all again after a split above.
        assert!(store.reads.get() <= 9, "{}", store.reads.get());
    }
    check_index(&store);
    for n in 0..COUNT {
        store.reads.set(0);
        assert_eq!(lookup(&store, &name(n)), Some(n + 1));
        assert_eq!(store.reads.get(), 3, "root, node, leaf");
    }
    for n in 0..COUNT {
        store.reads.set(0);
        assert_eq!(names::remove(&mut store, &name(n)).unwrap(), Some(n + 1));
        assert_eq!(store.reads.get(), 3, "root, node, leaf");
    }
    assert!(names::is_empty(&store).unwrap());
}
