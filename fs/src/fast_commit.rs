//! Replay of fast commits: what the kernel noted since the last full commit becomes one.
//!
//! The log was replayed before, so the file system is as the last full commit left it. All that the
//! fast commits say is then changed in memory, within one handle, and committed to the log as the
//! transaction that they belong to. Before that commit the fast commits count and nothing of it is
//! on disk, after it they are of the past: no crash can leave a part of them, and none of them is
//! ever replayed over what another replay left.
//!
//! # What the tags mean
//!
//! A commit has the names that came and went, in their order, then the inodes, as they are at the
//! commit. What follows from that:
//!
//! 1. The link count of a file is the one of its record. Names count only for a file without one:
//!    that is a file that has lost its last name and was deleted.
//! 2. Directories have a record only where they are new, and are not noted when their link count
//!    changes, so each name of a directory counts in its parent. (The kernel's own replay leaves
//!    the counts as they were, for e2fsck to correct.)
//! 3. A record is needed before the names and ranges of its inode, wherever it stands. Where the
//!    inode's number was in use for another file, whose names went before, that file is deleted.
//! 4. A name whose directory or inode is not there is one of something that was deleted before the
//!    commit.
//!
//! # Blocks
//!
//! Data is where the kernel put it. All ranges that are added are kept from being handed out first,
//! so that new blocks of directories and of extent trees, for which the kernel had other places,
//! do not come from there. What is unmapped stays marked as used up to the end, as it may be mapped
//! again elsewhere; then the maps of all inodes that were touched say what is used.

mod ranges;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use crate::alloc::{InodeUse, Run};
use crate::core::Fs;
use crate::dir::{self, FileType};
use crate::error::FsError;
use crate::format::extent::{Extent, ExtentState};
use crate::format::fast_commit::{FastCommit, FcName, FcTag};
use crate::format::inode::{InodeData, InodeFlags};
use crate::inode::map::{self, MapKind, Written};
use crate::inode::{Inode, ROOT_INO};
use crate::journal::{Class, Handle};
use crate::ops::LINK_MAX;
use crate::ops::namei::entry_type;
use crate::xattr;

use ranges::Ranges;

/// Where `i_block` stands in an inode, and what follows it.
const BLOCK: std::ops::Range<usize> = 0x28..0x64;

/// Why fast commits cannot be replayed. Nothing of them was written then.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum FcError {
    /// The file system below.
    #[error(transparent)]
    Fs(#[from] FsError),
    /// A tag names an inode that no file can have.
    #[error("inode number {ino}")]
    Number {
        /// The number.
        ino: u32,
    },
    /// What is said of an inode cannot be.
    #[error("inode {ino}: {what}")]
    Inode {
        /// The inode.
        ino: u32,
        /// What is wrong.
        what: &'static str,
    },
    /// A range of blocks that no file can have.
    #[error("blocks {pblk}+{len} cannot belong to a file")]
    Blocks {
        /// First block.
        pblk: u64,
        /// Blocks.
        len: u32,
    },
    /// They change more than a transaction can hold.
    #[error("more than one transaction can hold")]
    TooLarge,
}

type FcResult<T = ()> = Result<T, FcError>;

fn wrong<T>(ino: u32, what: &'static str) -> FcResult<T> {
    Err(FcError::Inode { ino, what })
}

/// Replays `commits` on `fs`, which has nothing else to do and whose journal begins with the
/// transaction they belong to. Durable once the journal is shut down.
///
/// # Errors
/// [`FcError`]; the journal is then stopped and nothing is written.
pub(crate) fn replay(fs: &Arc<Fs>, commits: &[FastCommit]) -> FcResult {
    fs.alloc.open_reserve();
    // So that the links of the list of orphans, in the inodes, are kept.
    let _orphans = fs.find_orphans()?;
    let mut replay = Replay {
        fs,
        h: fs.journal.start(fs.journal.max_credits())?,
        touched: BTreeMap::new(),
        freed: Ranges::default(),
        freed_metadata: Ranges::default(),
    };
    match replay.run(commits) {
        Ok(()) => {
            let tags: usize = commits.iter().map(Vec::len).sum();
            log::info!(
                "journal: replayed {} fast commits, {tags} tags",
                commits.len()
            );
            Ok(replay.h.stop()?)
        }
        Err(error) => {
            // Before the handle ends, or it might be committed.
            fs.journal.stop_now();
            Err(error)
        }
    }
}

/// The records of one commit.
struct Records<'a> {
    /// The last one of each inode.
    raw: HashMap<u32, &'a [u8]>,
    applied: HashSet<u32>,
}

impl<'a> Records<'a> {
    fn of(commit: &'a [FcTag]) -> Self {
        let raw = commit.iter().filter_map(|tag| match tag {
            FcTag::Inode { ino, raw } => Some((*ino, &**raw)),
            _ => None,
        });
        Self {
            raw: raw.collect(),
            applied: HashSet::new(),
        }
    }

    fn has(&self, ino: u32) -> bool {
        self.raw.contains_key(&ino)
    }
}

/// An inode that a tag names.
struct Touched {
    inode: Arc<Inode>,
    /// Not deleted.
    is_alive: bool,
    /// Made by a record; it has no name but those that were added since.
    is_new: bool,
    /// Names added, less those removed.
    names: i64,
    /// A new directory without "." and "..".
    is_bare: bool,
}

impl Touched {
    fn new(inode: Arc<Inode>) -> Self {
        Self {
            inode,
            is_alive: true,
            is_new: false,
            names: 0,
            is_bare: false,
        }
    }
}

struct Replay<'a> {
    fs: &'a Arc<Fs>,
    h: Handle,
    touched: BTreeMap<u32, Touched>,
    /// Blocks of data that were unmapped.
    freed: Ranges,
    /// Blocks of directories and symbolic links that were.
    freed_metadata: Ranges,
}

/// Whether `i_block` is a map.
fn has_map(data: &InodeData) -> bool {
    match data.file_type() {
        libc::S_IFREG | libc::S_IFDIR => true,
        libc::S_IFLNK => data.has_extents() || data.sectors > 0,
        _ => false,
    }
}

fn use_of(data: &InodeData) -> InodeUse {
    if data.is_dir() {
        InodeUse::Directory { top: false }
    } else {
        InodeUse::Other
    }
}

impl Replay<'_> {
    fn run(&mut self, commits: &[FastCommit]) -> FcResult {
        for tag in commits.iter().flatten() {
            if let FcTag::AddRange { extent, .. } = tag {
                self.keep(extent)?;
            }
        }
        for commit in commits {
            let mut records = Records::of(commit);
            for tag in commit {
                self.tag(&mut records, tag)?;
                if !self.h.has_credits(1) {
                    return Err(FcError::TooLarge);
                }
            }
        }
        self.delete_nameless()?;
        self.set_bitmaps()
    }

    fn keep(&self, extent: &Extent) -> FcResult {
        let run = Run {
            start: extent.pblk,
            len: extent.len,
        };
        if self.fs.alloc.keep(run)? {
            return Ok(());
        }
        Err(FcError::Blocks {
            pblk: extent.pblk,
            len: extent.len,
        })
    }

    fn tag(&mut self, records: &mut Records<'_>, tag: &FcTag) -> FcResult {
        match tag {
            FcTag::Inode { ino, .. } => self.record(records, *ino),
            FcTag::Creat(of) => {
                self.record(records, of.ino)?;
                self.creat(records, of)
            }
            FcTag::Link(of) => {
                self.record(records, of.ino)?;
                self.link(records, of)
            }
            FcTag::Unlink(of) => self.unlink(records, of),
            FcTag::AddRange { ino, extent } => {
                self.record(records, *ino)?;
                self.add_range(*ino, extent)
            }
            FcTag::DelRange { ino, lblk, len } => {
                self.record(records, *ino)?;
                self.del_range(*ino, *lblk, lblk.saturating_add(*len))
            }
        }
    }

    /// Gives an inode that is in use.
    fn find(&mut self, ino: u32) -> FcResult<Option<Arc<Inode>>> {
        let geo = &self.fs.geo;
        if ino > geo.inodes_count || (ino < geo.first_ino && ino != ROOT_INO) {
            return Err(FcError::Number { ino });
        }
        if let Some(touched) = self.touched.get(&ino) {
            return Ok(touched.is_alive.then(|| touched.inode.clone()));
        }
        if !self.fs.alloc.is_inode_used(ino)? {
            return Ok(None);
        }
        let inode = self.fs.iget(ino)?;
        self.touched.insert(ino, Touched::new(inode.clone()));
        Ok(Some(inode))
    }

    fn find_dir(&mut self, ino: u32) -> FcResult<Option<Arc<Inode>>> {
        let dir = self.find(ino)?.filter(|dir| dir.is_dir());
        let is_bare = self.touched.get(&ino).is_some_and(|dir| dir.is_bare);
        Ok(dir.filter(|_| !is_bare))
    }

    /// Applies the record of an inode, if the commit has one and it was not applied yet.
    fn record(&mut self, records: &mut Records<'_>, ino: u32) -> FcResult {
        let Some(&raw) = records.raw.get(&ino) else {
            return Ok(());
        };
        if !records.applied.insert(ino) {
            return Ok(());
        }
        let home = self.find(ino)?;
        // All but the map, and the attributes behind what was recorded.
        let size = usize::from(self.fs.geo.inode_size);
        let mut bytes = vec![0; size];
        if raw.len() > size {
            return wrong(ino, "a record longer than an inode");
        }
        if home.is_some() {
            let (buffer, offset) = self.fs.inode_buffer(ino)?;
            bytes.copy_from_slice(&buffer.data()[offset..offset + size]);
        }
        bytes[..raw.len()].copy_from_slice(raw);
        let Ok(data) = InodeData::decode(&bytes, self.fs.geo.block_bits) else {
            return wrong(ino, "i_extra_isize");
        };
        self.check_record(ino, &data)?;
        let same = home.filter(|home| {
            let old = home.data.read();
            old.generation == data.generation && old.file_type() == data.file_type()
        });
        match same {
            Some(inode) => self.update(&inode, data, &bytes),
            None => {
                // Attributes of whoever had the number before are not its own.
                bytes[raw.len()..].fill(0);
                match InodeData::decode(&bytes, self.fs.geo.block_bits) {
                    Ok(data) => self.make(ino, data, &bytes),
                    Err(_) => wrong(ino, "i_extra_isize"),
                }
            }
        }
    }

    fn check_record(&self, ino: u32, data: &InodeData) -> FcResult {
        let unsupported = InodeFlags::COMPR
            | InodeFlags::ENCRYPT
            | InodeFlags::VERITY
            | InodeFlags::EA_INODE
            | InodeFlags::INLINE_DATA
            | InodeFlags::CASEFOLD;
        if data.flags.intersects(unsupported) {
            return wrong(ino, "flags that are not supported");
        }
        if entry_type(data.mode) == FileType::Unknown {
            return wrong(ino, "i_mode");
        }
        if data.size > u64::from(u32::MAX) << self.fs.geo.block_bits {
            return wrong(ino, "i_size");
        }
        if data.has_extents() && !self.fs.geo.has_extents() {
            return wrong(ino, "extents in a file system without");
        }
        Ok(())
    }

    /// Writes an inode, with fields that nobody here knows from `bytes`.
    fn write(&self, inode: &Inode, data: &InodeData, bytes: &[u8]) -> FcResult {
        {
            let (buffer, offset) = self.fs.inode_buffer(inode.ino)?;
            let mut block = self.h.write_class(&buffer, Class::Inodes)?;
            block[offset..offset + bytes.len()].copy_from_slice(bytes);
        }
        Ok(self.fs.write_inode(&self.h, inode, data)?)
    }

    /// The inode is the one that is there: its record has all but its map and its blocks.
    fn update(&mut self, inode: &Arc<Inode>, mut new: InodeData, bytes: &[u8]) -> FcResult {
        let mut data = inode.data.write();
        if new.file_acl != data.file_acl {
            return wrong(inode.ino, "a block of attributes that no full commit has");
        }
        if new.has_extents() != data.has_extents() {
            return wrong(inode.ino, "another kind of map");
        }
        new.block = data.block;
        new.sectors = data.sectors;
        new.dtime = 0;
        if inode.is_dir() {
            new.links = data.links;
            new.size = data.size;
            let index = data.flags.contains(InodeFlags::INDEX);
            new.flags.set(InodeFlags::INDEX, index);
        }
        *data = new;
        self.write(inode, &data, bytes)
    }

    /// The inode is new; whoever had its number is gone.
    fn make(&mut self, ino: u32, mut data: InodeData, bytes: &[u8]) -> FcResult {
        if ino == ROOT_INO {
            return wrong(ino, "another root directory");
        }
        if data.file_acl != 0 {
            return wrong(ino, "a block of attributes that no full commit has");
        }
        let old = self.find(ino)?;
        if let Some(old) = &old {
            self.release(old)?;
        }
        data.sectors = 0;
        data.dtime = 0;
        let is_fast = data.is_symlink() && !data.has_extents() && data.size < BLOCK.len() as u64;
        let keeps = is_fast
            || !matches!(
                data.file_type(),
                libc::S_IFREG | libc::S_IFDIR | libc::S_IFLNK
            );
        if data.has_extents() {
            map::init(&self.fs.geo, &mut data);
        } else if !keeps {
            data.block = [0; 60];
        }
        let is_dir = data.is_dir();
        if is_dir {
            data.size = 0;
            data.links = 2;
            data.flags.remove(InodeFlags::INDEX);
        }
        self.fs.alloc.claim_inode(&self.h, ino, use_of(&data))?;
        let inode = Inode::new(self.fs.geo.csum_seed, ino, data);
        if let Some(old) = old {
            inode.orphan.take_over(&old.orphan);
        }
        self.fs.inodes.insert(&inode);
        self.write(&inode, &inode.data.read(), bytes)?;
        let touched = Touched {
            is_new: true,
            is_bare: is_dir,
            ..Touched::new(inode)
        };
        self.touched.insert(ino, touched);
        Ok(())
    }

    fn creat(&mut self, records: &Records<'_>, of: &FcName) -> FcResult {
        let Some(inode) = self.find(of.ino)? else {
            return wrong(of.ino, "a name before the inode");
        };
        let Some(dir) = self.find_dir(of.parent)? else {
            return Ok(());
        };
        if inode.is_dir() {
            let touched = self.touched.get_mut(&of.ino);
            if touched.as_ref().is_some_and(|touched| touched.names > 0) {
                return wrong(of.ino, "a second name of a directory");
            }
            if touched.is_some_and(|touched| std::mem::take(&mut touched.is_bare)) {
                let mut data = inode.data.write();
                dir::init(self.fs, &self.h, &inode, &mut data, of.parent)?;
                self.fs.write_inode(&self.h, &inode, &data)?;
            }
        }
        self.add_name(records, &dir, &inode, of).map(drop)
    }

    fn link(&mut self, records: &Records<'_>, of: &FcName) -> FcResult {
        let (Some(inode), Some(dir)) = (self.find(of.ino)?, self.find_dir(of.parent)?) else {
            return Ok(());
        };
        if inode.is_dir() {
            return wrong(of.ino, "a second name of a directory");
        }
        if self.add_name(records, &dir, &inode, of)? && !records.has(of.ino) {
            let mut data = inode.data.write();
            data.links = data.links.saturating_add(1).min(LINK_MAX);
            self.fs.write_inode(&self.h, &inode, &data)?;
        }
        Ok(())
    }

    /// Adds a name; false where it was there.
    fn add_name(
        &mut self,
        records: &Records<'_>,
        dir: &Arc<Inode>,
        inode: &Arc<Inode>,
        of: &FcName,
    ) -> FcResult<bool> {
        let there = dir::lookup(self.fs, dir, &dir.data.read(), &of.name)?;
        match there {
            Some(entry) if entry.ino == of.ino => return Ok(false),
            Some(entry) => {
                let other = FcName {
                    ino: entry.ino,
                    ..of.clone()
                };
                self.unlink(records, &other)?;
            }
            None => {}
        }
        let mut data = dir.data.write();
        let ftype = entry_type(inode.type_bits);
        dir::add(self.fs, &self.h, dir, &mut data, &of.name, of.ino, ftype)?;
        if inode.is_dir() {
            self.fs.count_subdir(&mut data, 1);
        }
        self.fs.touch_dir(&self.h, dir, &mut data)?;
        if let Some(touched) = self.touched.get_mut(&of.ino) {
            touched.names += 1;
        }
        Ok(true)
    }

    fn unlink(&mut self, records: &Records<'_>, of: &FcName) -> FcResult {
        let Some(dir) = self.find_dir(of.parent)? else {
            return Ok(());
        };
        let entry = dir::lookup(self.fs, &dir, &dir.data.read(), &of.name)?;
        let Some(entry) = entry.filter(|entry| entry.ino == of.ino) else {
            return Ok(());
        };
        if of.ino == ROOT_INO || of.ino == of.parent {
            return wrong(of.ino, "a name of a directory above");
        }
        let inode = self.find(of.ino)?;
        let is_dir = match (entry.ftype, &inode) {
            (FileType::Unknown, Some(inode)) => inode.is_dir(),
            (ftype, _) => ftype == FileType::Directory,
        };
        {
            let mut data = dir.data.write();
            dir::remove(self.fs, &self.h, &dir, &mut data, &of.name)?;
            if is_dir {
                self.fs.count_subdir(&mut data, -1);
            }
            self.fs.touch_dir(&self.h, &dir, &mut data)?;
        }
        if let Some(touched) = self.touched.get_mut(&of.ino) {
            touched.names -= 1;
        }
        let Some(inode) = inode else { return Ok(()) };
        // With a record to come, its number is another's.
        let has_other = records.has(of.ino) && !records.applied.contains(&of.ino);
        if inode.is_dir() && !has_other {
            self.lose_dir(&inode)
        } else if !records.has(of.ino) {
            let mut data = inode.data.write();
            data.links = data.links.saturating_sub(1);
            data.ctime = self.fs.now();
            Ok(self.fs.write_inode(&self.h, &inode, &data)?)
        } else {
            Ok(())
        }
    }

    fn lose_dir(&mut self, inode: &Arc<Inode>) -> FcResult {
        let mut data = inode.data.write();
        let is_bare = self.touched.get(&inode.ino).is_some_and(|dir| dir.is_bare);
        if !is_bare && !dir::is_empty(self.fs, inode, &data)? {
            return wrong(inode.ino, "a directory removed that is not empty");
        }
        data.links = 0;
        Ok(self.fs.write_inode(&self.h, inode, &data)?)
    }

    fn add_range(&mut self, ino: u32, extent: &Extent) -> FcResult {
        let Some(inode) = self.find(ino)? else {
            return Ok(());
        };
        let mut data = inode.data.write();
        if inode.is_dir() || !has_map(&data) {
            return wrong(ino, "blocks of something that has none");
        }
        let (kind, written) = match extent.state {
            ExtentState::Written => (MapKind::Mapped, Written::Yes),
            ExtentState::Unwritten => (MapKind::Unwritten, Written::No),
        };
        let (mut at, end) = (extent.lblk, extent.lblk.saturating_add(extent.len));
        while at < end {
            let found = map::lookup(self.fs, &inode, &data, at, end - at)?;
            let next = at.saturating_add(found.len);
            let run = Run {
                start: extent.pblk + u64::from(at - extent.lblk),
                len: found.len,
            };
            if found.kind != kind || found.pblk != run.start {
                if found.kind != MapKind::Hole {
                    let freed = &mut self.freed;
                    map::unmap(
                        self.fs,
                        &self.h,
                        &inode,
                        &mut data,
                        (at, next),
                        &mut |pblk, len| freed.insert(pblk, len),
                    )?;
                }
                map::insert(self.fs, &self.h, &inode, &mut data, at, run, written)?;
            }
            at = next;
        }
        Ok(self.fs.write_inode(&self.h, &inode, &data)?)
    }

    fn del_range(&mut self, ino: u32, from: u32, to: u32) -> FcResult {
        let Some(inode) = self.find(ino)? else {
            return Ok(());
        };
        let mut data = inode.data.write();
        if inode.is_dir() || !has_map(&data) {
            return wrong(ino, "blocks of something that has none");
        }
        self.unmap(&inode, &mut data, from, to)?;
        Ok(self.fs.write_inode(&self.h, &inode, &data)?)
    }

    fn unmap(&mut self, inode: &Inode, data: &mut InodeData, from: u32, to: u32) -> FcResult {
        let freed = if inode.is_file() {
            &mut self.freed
        } else {
            &mut self.freed_metadata
        };
        let gone = &mut |pblk, len| freed.insert(pblk, len);
        Ok(map::unmap(self.fs, &self.h, inode, data, (from, to), gone)?)
    }

    /// Takes an inode out of use.
    fn release(&mut self, inode: &Arc<Inode>) -> FcResult {
        let mut data = inode.data.write();
        if has_map(&data) {
            self.unmap(inode, &mut data, 0, u32::MAX)?;
        }
        xattr::delete_all(self.fs, &self.h, inode, &mut data)?;
        data.links = 0;
        data.size = 0;
        data.dtime = self.fs.now().sec as u32;
        self.fs.write_inode(&self.h, inode, &data)?;
        self.fs
            .alloc
            .free_inode(&self.h, inode.ino, use_of(&data))?;
        if let Some(touched) = self.touched.get_mut(&inode.ino) {
            touched.is_alive = false;
        }
        Ok(())
    }

    /// Deletes what has lost its last name; not where the list of orphans has it already, which is
    /// gone through when all else is done.
    fn delete_nameless(&mut self) -> FcResult {
        let inos: Vec<u32> = self.touched.keys().copied().collect();
        for ino in inos {
            let Some(touched) = self.touched.get(&ino).filter(|touched| touched.is_alive) else {
                continue;
            };
            let inode = touched.inode.clone();
            let links = inode.data.read().links;
            if links == 0 && !inode.orphan.is_listed() {
                self.release(&inode)?;
            } else if links > 0 && touched.is_new && touched.names <= 0 {
                return wrong(ino, "no name");
            }
        }
        Ok(())
    }

    /// Sets the bits of all blocks that the inodes touched have, clears those of what they had.
    fn set_bitmaps(&mut self) -> FcResult {
        for touched in self.touched.values().filter(|touched| touched.is_alive) {
            let data = touched.inode.data.read();
            if !has_map(&data) {
                continue;
            }
            let mut at = 0;
            while at < u32::MAX {
                let found = map::lookup(self.fs, &touched.inode, &data, at, u32::MAX - at)?;
                if found.kind != MapKind::Hole {
                    self.freed.remove(found.pblk, found.len);
                    self.freed_metadata.remove(found.pblk, found.len);
                    let run = Run {
                        start: found.pblk,
                        len: found.len,
                    };
                    self.fs.alloc.claim_run(&self.h, run)?;
                }
                at = at.saturating_add(found.len);
            }
        }
        for run in self.freed.runs() {
            self.fs.alloc.release_run(&self.h, run)?;
        }
        for run in self.freed_metadata.runs() {
            self.fs.alloc.release_run(&self.h, run)?;
            for block in run.start..run.start + u64::from(run.len) {
                self.h.forget(block)?;
            }
        }
        if self.h.has_credits(1) {
            Ok(())
        } else {
            Err(FcError::TooLarge)
        }
    }
}
