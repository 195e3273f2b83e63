//! A seeded storm of operations on a file system and on its model.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockstack::testing::crash::CrashDisk;
use fs::data::Origin;
use fs::ops::space::FallocMode;
use fs::ops::{NewNode, RenameFlags, SetAttr};
use fs::xattr::XattrMode;
use fs::{Fs, FsError, FsResult};

use super::history::{History, Op, Promise};
use super::model::{Kind, Model, Version};
use super::{DIR, DIRECT, FILE, ME, ROOT, Random, fsync, write};

/// Nodes a storm keeps at most, and bytes of a file.
const MAX_NODES: usize = 120;
const MAX_SIZE: u64 = 150_000;

pub struct Storm {
    fs: Arc<Fs>,
    disk: Arc<CrashDisk>,
    random: Random,
    history: History,
    /// Files without a name that are still open.
    zombies: Vec<usize>,
    op: usize,
    began: u64,
    /// Page cache writes, whose sizes are not in the order of operations.
    page_cache: bool,
    stamp: u8,
}

impl Storm {
    pub fn new(fs: &Arc<Fs>, disk: &Arc<CrashDisk>, seed: u64, page_cache: bool) -> Self {
        fs.create(ROOT, b"noise", DIR, 0, &ME).unwrap();
        fs.sync().unwrap();
        let mut model = Model::new(!page_cache);
        model.nodes[0].links = 4;
        let start = Op {
            began: 0,
            what: "start".to_owned(),
            after: Arc::new(model.snapshot()),
        };
        Self {
            fs: fs.clone(),
            disk: disk.clone(),
            random: Random(seed),
            history: History {
                model,
                ops: vec![start],
                promises: Vec::new(),
            },
            zombies: Vec::new(),
            op: 0,
            began: 0,
            page_cache,
            stamp: 0,
        }
    }

    /// Runs `ops` operations and gives what happened. Panics where one fails that should not.
    pub fn run(mut self, ops: usize) -> History {
        for op in 1..=ops {
            self.op = op;
            self.began = self.disk.ops();
            let what = match self.step() {
                Ok(what) => what,
                Err(error) => {
                    let tail: Vec<_> = self.history.ops.iter().rev().take(5).collect();
                    let tail: Vec<_> = tail.iter().map(|op| &op.what).collect();
                    panic!("operation {op} failed: {error}; before: {tail:?}");
                }
            };
            let after = match self.history.ops.last() {
                Some(last) if what.starts_with('=') => last.after.clone(),
                _ => Arc::new(self.history.model.snapshot()),
            };
            self.history.ops.push(Op {
                began: self.began,
                what,
                after,
            });
        }
        for id in std::mem::take(&mut self.zombies) {
            self.fs.forget(self.ino(id), 1);
        }
        self.history
    }

    fn ino(&self, id: usize) -> u32 {
        self.history.model.nodes[id].ino
    }

    fn named(&self, fits: impl Fn(&super::model::Node) -> bool) -> Vec<usize> {
        let mut ids = Vec::new();
        self.history.model.walk(&mut |_, id| {
            if fits(&self.history.model.nodes[id]) {
                ids.push(id);
            }
        });
        ids
    }

    fn any_dir(&mut self) -> usize {
        let mut dirs = self.named(super::model::Node::is_dir);
        dirs.push(0);
        self.random.pick(&dirs).unwrap_or(0)
    }

    fn any_file(&mut self) -> Option<usize> {
        let mut files = self.named(super::model::Node::is_file);
        files.sort_unstable();
        files.dedup();
        if self.random.one_in(12) {
            files = self.zombies.clone();
        }
        self.random.pick(&files)
    }

    /// A directory and one of its entries.
    fn any_name(&mut self) -> Option<(usize, String, usize)> {
        let mut names = Vec::new();
        let mut dirs = self.named(super::model::Node::is_dir);
        dirs.push(0);
        for dir in dirs {
            let entries = self.history.model.nodes[dir].entries();
            names.extend(entries.iter().map(|(name, &id)| (dir, name.clone(), id)));
        }
        let index = self.random.below(names.len() as u64) as usize;
        names.get(index).cloned()
    }

    fn new_name(&mut self) -> String {
        let len = if self.random.one_in(3) {
            80 + self.random.below(120) as usize
        } else {
            4
        };
        format!("{}-{}", self.op, "n".repeat(len))
    }

    fn changed(&mut self, ids: &[usize]) {
        for &id in ids {
            self.history.model.nodes[id].changed = self.op;
        }
    }

    fn listed(&mut self, dirs: &[usize]) {
        for &id in dirs {
            self.history.model.nodes[id].data_changed = self.op;
        }
    }

    fn versioned(&mut self, id: usize, end: Option<u64>) {
        let op = self.op;
        let node = &mut self.history.model.nodes[id];
        if node.changed == op {
            node.data_changed = op;
        }
        let content = node.content.clone();
        let end = end.unwrap_or(content.size);
        node.versions.push(Version { op, content, end });
    }

    fn step(&mut self) -> FsResult<String> {
        let count = self.history.model.snapshot().lines.len();
        let choice = self.random.below(100);
        if count < 12 || (choice < 14 && count < MAX_NODES) {
            return self.make();
        }
        match choice {
            0..38 => self.write(),
            38..44 => self.truncate(),
            44..49 => self.fallocate(),
            49 => self.shift(),
            50..57 => self.rename(),
            57 => self.exchange(),
            58..62 => self.link(),
            62..72 => self.remove(),
            72..78 => self.xattr(),
            78..86 => self.fsync(),
            86..88 => self.fsync_dir(),
            88 => self.sync(),
            89..92 => self.close_zombie(),
            92..96 => self.evict(),
            _ => self.start_commit(),
        }
    }

    fn make(&mut self) -> FsResult<String> {
        let dir = self.any_dir();
        let name = self.new_name();
        let target = vec![b't'; 1 + self.random.below(120) as usize];
        let (node, kind) = match self.random.below(8) {
            0 => (
                NewNode::Symlink { target: &target },
                Kind::Symlink(target.clone()),
            ),
            1 | 2 => {
                let entries = std::collections::BTreeMap::new();
                let parent = dir;
                (DIR, Kind::Dir { parent, entries })
            }
            _ => (FILE, Kind::File),
        };
        let attr = self
            .fs
            .create(self.ino(dir), name.as_bytes(), node, 0, &ME)?;
        let is_dir = matches!(kind, Kind::Dir { .. });
        let id = self.history.model.add(attr.ino, kind, self.op);
        let parent = &mut self.history.model.nodes[dir];
        parent.links += u32::from(is_dir);
        parent.entries_mut().insert(name.clone(), id);
        self.changed(&[dir, id]);
        self.listed(&[dir]);
        Ok(format!(
            "create node {id} inode {} as {name:.12} in node {dir}",
            attr.ino
        ))
    }

    fn write(&mut self) -> FsResult<String> {
        let Some(id) = self.any_file() else {
            return self.make();
        };
        let size = self.history.model.nodes[id].content.size;
        let at = match self.random.below(3) {
            0 => size,
            1 => self.random.below(size + 1),
            _ => self.random.below(MAX_SIZE) / 4096 * 4096,
        };
        let longest = if self.random.one_in(4) { 40_000 } else { 6000 };
        let len = 1 + self.random.below(longest).min(MAX_SIZE.saturating_sub(at));
        self.stamp = self.stamp.wrapping_add(1);
        let (stamp, op) = (self.stamp, self.op);
        let bytes: Vec<u8> = (0..len)
            .map(|index| match (at + index) % 16 {
                0 => stamp,
                1 => id as u8,
                2 => op as u8,
                3 => (op >> 8) as u8,
                other => (other as u8) ^ stamp,
            })
            .collect();
        let cached = self.page_cache && self.random.one_in(2);
        let origin = if cached { Origin::PageCache } else { DIRECT };
        let written = u64::from(write(&self.fs, self.ino(id), at, &bytes, origin)?);
        assert_eq!(written, len, "a short write");
        self.history.model.nodes[id].content.write(at, &bytes);
        if !cached || at + len > size {
            self.changed(&[id]);
        }
        self.versioned(id, self.page_cache.then_some(at + len));
        Ok(format!("write {len} at {at} to node {id} {origin:?}"))
    }

    fn truncate(&mut self) -> FsResult<String> {
        let Some(id) = self.any_file() else {
            return self.make();
        };
        let old = self.history.model.nodes[id].content.size;
        let size = match self.random.below(4) {
            0 => 0,
            1 => self.random.below(MAX_SIZE),
            _ => self.random.below(old + 1),
        };
        let set = SetAttr {
            size: Some(size),
            ..SetAttr::default()
        };
        self.fs.setattr(self.ino(id), &set, &ME)?;
        self.history.model.nodes[id].content.truncate(size);
        self.changed(&[id]);
        self.versioned(id, None);
        Ok(format!("truncate node {id} from {old} to {size}"))
    }

    fn fallocate(&mut self) -> FsResult<String> {
        let Some(id) = self.any_file() else {
            return self.make();
        };
        let inode = self.fs.iget(self.ino(id))?;
        let keep = FallocMode::KEEP_SIZE;
        let modes = [
            FallocMode::empty(),
            keep,
            FallocMode::PUNCH_HOLE | keep,
            FallocMode::PUNCH_HOLE | keep,
            FallocMode::ZERO_RANGE,
            FallocMode::ZERO_RANGE | keep,
        ];
        let mode = self.random.pick(&modes).unwrap_or(keep);
        let at = self.random.below(MAX_SIZE / 2);
        let len = 1 + self.random.below(MAX_SIZE / 2);
        match self.fs.fallocate(&inode, mode, at, len, &ME) {
            Ok(()) => {}
            Err(FsError::NotSupported) if !self.fs.geo.has_extents() => {
                return Ok(format!(
                    "= fallocate {mode:?} node {id} {at} {len}: not supported"
                ));
            }
            Err(error) => return Err(error),
        }
        let content = &mut self.history.model.nodes[id].content;
        if mode.intersects(FallocMode::PUNCH_HOLE | FallocMode::ZERO_RANGE) {
            content.zero(at, at + len);
        }
        if !mode.contains(keep) {
            content.size = content.size.max(at + len);
        }
        self.changed(&[id]);
        self.versioned(id, None);
        Ok(format!("fallocate {mode:?} node {id} {at} {len}"))
    }

    /// Cuts blocks out of a file, or opens a hole.
    fn shift(&mut self) -> FsResult<String> {
        let Some(id) = self.any_file() else {
            return self.make();
        };
        let block = u64::from(self.fs.geo.block_size);
        let size = self.history.model.nodes[id].content.size;
        let collapse = self.random.one_in(2);
        let at = self.random.below(size / block + 1) * block;
        let len = (1 + self.random.below(6)) * block;
        let fits = at + if collapse { len } else { 0 } < size;
        let mode = if collapse {
            FallocMode::COLLAPSE_RANGE
        } else {
            FallocMode::INSERT_RANGE
        };
        let what = format!("fallocate {mode:?} node {id} {at} {len}");
        let inode = self.fs.iget(self.ino(id))?;
        match self.fs.fallocate(&inode, mode, at, len, &ME) {
            Ok(()) => assert!(fits, "{what} was not refused"),
            Err(FsError::NotSupported) if !self.fs.geo.has_extents() => {
                return Ok(format!("= {what}"));
            }
            Err(FsError::Invalid) if !fits => return Ok(format!("= {what}: refused")),
            Err(error) => return Err(error),
        }
        let content = &mut self.history.model.nodes[id].content;
        content.shift(at, at + len, collapse);
        self.changed(&[id]);
        self.versioned(id, None);
        // A later write in place could reach blocks whose move a power cut takes back.
        fsync(&self.fs, self.ino(id), false)?;
        self.promise(self.op, vec![(id, self.op)]);
        Ok(what + ", fsync")
    }

    fn exchange(&mut self) -> FsResult<String> {
        let (Some((dir, name, id)), Some((to, new_name, other))) =
            (self.any_name(), self.any_name())
        else {
            return self.make();
        };
        let what =
            format!("exchange node {id} {name:.12} in {dir} and {other} {new_name:.12} in {to}");
        let (from_ino, to_ino) = (self.ino(dir), self.ino(to));
        let res = self.fs.rename(
            from_ino,
            name.as_bytes(),
            to_ino,
            new_name.as_bytes(),
            RenameFlags::EXCHANGE,
            &ME,
        );
        let model = &self.history.model;
        let (is_dir, other_is_dir) = (model.nodes[id].is_dir(), model.nodes[other].is_dir());
        if id == other {
            res?;
            return Ok(format!("= {what}"));
        }
        let refused =
            (is_dir && model.is_below(to, id)) || (other_is_dir && model.is_below(dir, other));
        match (res, refused) {
            (Ok(()), false) => {}
            (Err(_), true) => return Ok(format!("= {what}: refused")),
            (Err(error), false) => return Err(error),
            (Ok(()), true) => panic!("{what} was not refused"),
        }
        let nodes = &mut self.history.model.nodes;
        nodes[dir].entries_mut().insert(name, other);
        nodes[to].entries_mut().insert(new_name, id);
        for (moved, is_dir, old, new) in [(id, is_dir, dir, to), (other, other_is_dir, to, dir)] {
            if is_dir {
                nodes[old].links -= 1;
                nodes[new].links += 1;
            }
            if let Kind::Dir { parent, .. } = &mut nodes[moved].kind {
                *parent = new;
            }
        }
        self.changed(&[dir, to, id, other]);
        self.listed(&[dir, to]);
        Ok(what)
    }

    fn rename(&mut self) -> FsResult<String> {
        let Some((dir, name, id)) = self.any_name() else {
            return self.make();
        };
        let over = if self.random.one_in(2) {
            self.any_name()
        } else {
            None
        };
        let (to, new_name, target) = match over {
            Some((to, name, target)) => (to, name, Some(target)),
            None => (self.any_dir(), self.new_name(), None),
        };
        let none = RenameFlags::empty();
        let (from_ino, to_ino) = (self.ino(dir), self.ino(to));
        let what = format!(
            "rename node {id} {name:.12} in {dir} to {new_name:.12} in {to} over {target:?}"
        );
        let renamed = self.fs.rename(
            from_ino,
            name.as_bytes(),
            to_ino,
            new_name.as_bytes(),
            none,
            &ME,
        );
        let model = &self.history.model;
        let is_dir = model.nodes[id].is_dir();
        if target == Some(id) {
            renamed?;
            return Ok(format!("= {what}"));
        }
        let refused = (is_dir && model.is_below(to, id))
            || target.is_some_and(|target| {
                let node = &model.nodes[target];
                node.is_dir() != is_dir || (node.is_dir() && !node.entries().is_empty())
            });
        match (renamed, refused) {
            (Ok(()), false) => {}
            (Err(_), true) => return Ok(format!("= {what}: refused")),
            (Err(error), false) => return Err(error),
            (Ok(()), true) => panic!("{what} was not refused"),
        }
        let nodes = &mut self.history.model.nodes;
        nodes[dir].entries_mut().remove(&name);
        nodes[to].entries_mut().insert(new_name, id);
        if is_dir {
            nodes[dir].links -= 1;
            nodes[to].links += 1;
        }
        if let Kind::Dir { parent, .. } = &mut nodes[id].kind {
            *parent = to;
        }
        self.changed(&[dir, to, id]);
        self.listed(&[dir, to]);
        if let Some(target) = target {
            self.lost_name(to, target);
        }
        Ok(what)
    }

    /// A node lost a name in `dir`.
    fn lost_name(&mut self, dir: usize, id: usize) {
        self.changed(&[dir, id]);
        self.listed(&[dir]);
        let node = &mut self.history.model.nodes[id];
        let is_dir = node.is_dir();
        node.links = if is_dir { 0 } else { node.links - 1 };
        let gone = node.links == 0;
        let is_file = node.is_file();
        if is_dir {
            self.history.model.nodes[dir].links -= 1;
        }
        if !gone {
            return;
        }
        if is_file && self.random.one_in(3) {
            self.zombies.push(id);
        } else {
            self.fs.forget(self.ino(id), 1);
        }
    }

    fn link(&mut self) -> FsResult<String> {
        let files = self.named(|node| !node.is_dir());
        let Some(id) = self.random.pick(&files) else {
            return self.make();
        };
        let dir = self.any_dir();
        let name = self.new_name();
        let ino = self.ino(id);
        self.fs.link(ino, self.ino(dir), name.as_bytes())?;
        self.fs.forget(ino, 1);
        let nodes = &mut self.history.model.nodes;
        nodes[id].links += 1;
        nodes[dir].entries_mut().insert(name.clone(), id);
        self.changed(&[dir, id]);
        self.listed(&[dir]);
        Ok(format!("link node {id} as {name:.12} in {dir}"))
    }

    fn remove(&mut self) -> FsResult<String> {
        let Some((dir, name, id)) = self.any_name() else {
            return self.make();
        };
        let ino = self.ino(dir);
        let node = &self.history.model.nodes[id];
        let what = format!("remove node {id} {name:.12} from {dir}");
        if node.is_dir() {
            let is_empty = node.entries().is_empty();
            match self.fs.rmdir(ino, name.as_bytes(), &ME) {
                Ok(()) if is_empty => {}
                Err(FsError::NotEmpty) if !is_empty => return Ok(format!("= {what}: not empty")),
                other => panic!("{what}: {other:?}"),
            }
        } else {
            self.fs.unlink(ino, name.as_bytes(), &ME)?;
        }
        let parent = &mut self.history.model.nodes[dir];
        parent.entries_mut().remove(&name);
        self.lost_name(dir, id);
        Ok(what)
    }

    fn xattr(&mut self) -> FsResult<String> {
        let ids = self.named(|node| !matches!(node.kind, Kind::Symlink(_)));
        let Some(id) = self.random.pick(&ids) else {
            return self.make();
        };
        let name = format!("user.{}", self.random.below(4));
        let longest = if self.random.one_in(3) { 300 } else { 30 };
        let value = vec![self.op as u8; self.random.below(longest) as usize];
        let remove = self.random.one_in(3);
        let set = (!remove).then_some(&value[..]);
        let ino = self.ino(id);
        let what = format!("xattr {name} of node {id}: {:?}", set.map(<[u8]>::len));
        let had = self.history.model.nodes[id].xattrs.contains_key(&name);
        match self.fs.setxattr(ino, name.as_bytes(), set, XattrMode::Any) {
            Ok(()) => {}
            Err(FsError::NoData) if remove && !had => return Ok(format!("= {what}: none")),
            Err(FsError::NoSpace) if !remove => return Ok(format!("= {what}: no space")),
            Err(error) => return Err(error),
        }
        let xattrs = &mut self.history.model.nodes[id].xattrs;
        if remove {
            xattrs.remove(&name);
        } else {
            xattrs.insert(name, value);
        }
        self.changed(&[id]);
        Ok(what)
    }

    fn promise(&mut self, upto: usize, files: Vec<(usize, usize)>) {
        let made = self.disk.ops();
        self.history.promises.push(Promise {
            made,
            by: self.op,
            upto,
            files,
        });
    }

    fn fsync(&mut self) -> FsResult<String> {
        let Some(id) = self.any_file() else {
            return self.make();
        };
        let datasync = self.random.one_in(3);
        fsync(&self.fs, self.ino(id), datasync)?;
        let node = &self.history.model.nodes[id];
        let upto = if datasync {
            node.data_changed
        } else {
            node.changed
        };
        self.promise(upto, vec![(id, self.op)]);
        Ok(format!(
            "= fsync node {id}, datasync {datasync}, names up to {upto}"
        ))
    }

    fn fsync_dir(&mut self) -> FsResult<String> {
        let id = self.any_dir();
        let datasync = self.random.one_in(2);
        fsync(&self.fs, self.ino(id), datasync)?;
        let node = &self.history.model.nodes[id];
        let upto = if datasync {
            node.data_changed
        } else {
            node.changed
        };
        self.promise(upto, Vec::new());
        Ok(format!("= fsync directory node {id}, names up to {upto}"))
    }

    fn sync(&mut self) -> FsResult<String> {
        self.fs.sync()?;
        let all = (0..self.history.model.nodes.len()).map(|id| (id, self.op));
        self.promise(self.op, all.collect());
        Ok("= sync".to_owned())
    }

    fn close_zombie(&mut self) -> FsResult<String> {
        if self.zombies.is_empty() {
            return Ok("= nothing".to_owned());
        }
        let index = self.random.below(self.zombies.len() as u64) as usize;
        let id = self.zombies.swap_remove(index);
        self.fs.forget(self.ino(id), 1);
        Ok(format!("= close node {id}"))
    }

    /// The kernel forgets an inode and asks for it again.
    fn evict(&mut self) -> FsResult<String> {
        let Some((dir, name, id)) = self.any_name() else {
            return self.make();
        };
        self.fs.forget(self.ino(id), 1);
        let found = self.fs.lookup(self.ino(dir), name.as_bytes())?;
        assert_eq!(found.map(|attr| attr.ino), Some(self.ino(id)));
        if self.random.one_in(2) && self.history.model.nodes[id].is_file() {
            fsync(&self.fs, self.ino(id), false)?;
            let upto = self.history.model.nodes[id].changed;
            self.promise(upto, vec![(id, self.op)]);
            return Ok(format!("= evict and fsync node {id}, names up to {upto}"));
        }
        Ok(format!("= evict node {id}"))
    }

    fn start_commit(&mut self) -> FsResult<String> {
        let Some((_, _, id)) = self.any_name() else {
            return self.make();
        };
        let tid = self.fs.iget(self.ino(id))?.tid.load(Ordering::Acquire);
        if tid != 0 {
            self.fs.journal.start_commit(tid);
        }
        Ok(format!("= start commit {tid}"))
    }
}

/// Makes and removes files in a directory of its own until told to stop, so that transactions
/// overlap.
pub fn noise(fs: &Arc<Fs>, seed: u64, stop: &AtomicBool) {
    let mut random = Random(seed);
    let dir = fs.lookup(ROOT, b"noise").unwrap().unwrap().ino;
    let mut names: Vec<(String, u32)> = Vec::new();
    let mut count = 0;
    while !stop.load(Ordering::Acquire) {
        count += 1;
        match random.below(6) {
            0..2 if names.len() < 40 => {
                let name = format!("noise-{count}");
                let attr = fs.create(dir, name.as_bytes(), FILE, 0, &ME).unwrap();
                names.push((name, attr.ino));
            }
            2 if !names.is_empty() => {
                let index = random.below(names.len() as u64) as usize;
                let (name, ino) = names.swap_remove(index);
                fs.unlink(dir, name.as_bytes(), &ME).unwrap();
                fs.forget(ino, 1);
            }
            _ => {
                let index = random.below(names.len() as u64) as usize;
                if let Some(&(_, ino)) = names.get(index) {
                    let at = random.below(60_000);
                    write(fs, ino, at, &[0xee; 5000], Origin::PageCache).unwrap();
                    if random.one_in(10) {
                        fsync(fs, ino, false).unwrap();
                    }
                }
            }
        }
    }
}
