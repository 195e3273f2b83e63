//! A check of a whole file system, read-only: what `e2fsck -fn` finds in structure, as typed
//! findings, fast enough to run after every transaction and on every crash state.
//!
//! It works on bytes, those of an image or of a device: nothing a mount has in memory is trusted or
//! asked. A log that waits for its replay is replayed into memory first, so that what is judged is
//! what the next mount makes of it. Log and orphans that wait are [`Class::Pending`], no faults.
//!
//! | module | what it looks at |
//! | --- | --- |
//! | [`finding`](Finding) | what can be found, and how bad it is |
//! | [`source`](Source) | images and devices |
//! | `superblock` | superblock, its copies, the resize inode |
//! | `groups` | descriptors; at the end bitmaps and counts |
//! | `journal` | the journal's inode and superblock, replay |
//! | `orphans` | orphan list and orphan file |
//! | `inodes` | inodes, one by one |
//! | `extents`, `block_map` | the maps of files, who owns which block |
//! | `xattrs` | attributes in inodes and blocks |
//! | `dirs`, `index` | directory blocks and entries, hash trees |
//! | `tree` | whether all is connected, link counts |
//!
//! # Bounds
//!
//! Memory is a few bits per block and per inode, eight bytes for each inode of the tables that are
//! in use, and what the directories' block lists and the largest directory's names take. No block of a map is walked twice: one that
//! has an owner already is reported and left alone, so that no damage makes a loop or a long walk.
//! At most [`MAX_FINDINGS`] findings are kept; the others are counted.
//!
//! # What it does not look at
//!
//! Quotas, and what the features ask for that this program does not support: such a file system is
//! refused by the name of the feature.

mod bits;
mod block_map;
mod dirs;
mod extents;
mod finding;
mod groups;
mod index;
mod inodes;
mod journal;
mod orphans;
mod runs;
mod source;
mod superblock;
mod tree;
mod xattrs;

use std::collections::HashMap;
use std::fmt;

pub use finding::{
    Class, EntryFault, ExtentFault, Finding, FlagFault, IndexFault, LinkFault, XattrFault,
};
pub use source::{DeviceSource, Source};

use crate::format::superblock::RawSuperblock;
use crate::geometry::Geometry;
use bits::Bits;
use source::{Blocks, Overlay};

/// Findings that a report keeps.
pub const MAX_FINDINGS: usize = 1000;

/// What a check found.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Report {
    findings: Vec<Finding>,
    /// Findings that were not kept, by whether they are faults.
    more: u64,
    more_pending: u64,
}

impl Report {
    /// Whether nothing is wrong; what waits for the next mount is not.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.more == 0 && self.faults().next().is_none()
    }

    /// Everything found, in the order of the check.
    #[must_use]
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// What is wrong, without what only waits for the next mount.
    pub fn faults(&self) -> impl Iterator<Item = &Finding> {
        self.findings
            .iter()
            .filter(|it| it.class() != Class::Pending)
    }

    /// The worst class there is; `None` where nothing was found.
    #[must_use]
    pub fn worst(&self) -> Option<Class> {
        self.findings.iter().map(Finding::class).max()
    }

    /// Findings past [`MAX_FINDINGS`].
    #[must_use]
    pub fn not_kept(&self) -> u64 {
        self.more + self.more_pending
    }

    fn push(&mut self, finding: Finding) {
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(finding);
        } else if finding.class() == Class::Pending {
            self.more_pending += 1;
        } else {
            self.more += 1;
        }
    }
}

impl fmt::Display for Report {
    /// One line for each finding.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            writeln!(f, "{}: {finding}", finding.class().name())?;
        }
        if self.not_kept() > 0 {
            writeln!(f, "and {} more", self.not_kept())?;
        }
        Ok(())
    }
}

/// Memory that checks use one after the other.
#[derive(Default)]
pub struct Scratch {
    overlay: Overlay,
    state: State,
}

/// What one check has gathered so far.
#[derive(Default)]
struct State {
    report: Report,
    groups: Vec<groups::Group>,
    /// Blocks with an owner.
    used: Bits,
    /// Those of superblocks, descriptors, bitmaps and inode tables.
    metadata: Bits,
    inos: InodeSets,
    /// `i_links_count` and the entries found, of each group's inodes that are looked at.
    links: Vec<Vec<(u16, u32)>>,
    dirs: Vec<dirs::Dir>,
    dir_blocks: Vec<dirs::DirBlock>,
    /// References that attribute blocks say they have, less those that were seen.
    xattr_blocks: HashMap<u64, i64>,
    names: Vec<dirs::NameAt>,
    index: Vec<index::IndexBlock>,
    large_files: Option<(u32, u64)>,
}

#[derive(Default)]
struct InodeSets {
    used: Bits,
    dirs: Bits,
    files: Bits,
    /// Deleted ones that wait for their blocks to be freed.
    orphans: Bits,
    /// Those that an orphan list or file names.
    listed: Bits,
    /// Those whose mode says nothing sensible.
    bad: Bits,
}

impl State {
    fn reset(&mut self) {
        self.report = Report::default();
        self.groups.clear();
        self.links.iter_mut().for_each(Vec::clear);
        self.dirs.clear();
        self.dir_blocks.clear();
        self.xattr_blocks.clear();
        self.names.clear();
        self.index.clear();
        self.large_files = None;
    }

    fn size_to(&mut self, geo: &Geometry) {
        self.used.reset(geo.blocks_count);
        self.metadata.reset(geo.blocks_count);
        let inodes = u64::from(geo.inodes_count) + 1;
        let sets = &mut self.inos;
        for set in [
            &mut sets.used,
            &mut sets.dirs,
            &mut sets.files,
            &mut sets.orphans,
            &mut sets.listed,
            &mut sets.bad,
        ] {
            set.reset(inodes);
        }
        self.links.resize(geo.group_count as usize, Vec::new());
    }

    /// Link count and entries found of an inode that is looked at.
    fn links_of(&mut self, geo: &Geometry, ino: u32) -> Option<&mut (u16, u32)> {
        let (group, index) = geo.group_of_ino(ino);
        self.links.get_mut(group as usize)?.get_mut(index as usize)
    }

    fn tell(&mut self, finding: Finding) {
        self.report.push(finding);
    }

    /// Gives a block an owner; whether it had none.
    fn claim(&mut self, ino: u32, pblk: u64) -> bool {
        let is_new = self.used.add(pblk);
        if !is_new {
            self.tell(Finding::BlocksTwice {
                ino,
                pblk,
                count: 1,
            });
        }
        is_new
    }

    /// As [`Self::claim`], for neighbours; whether none of them had an owner.
    fn claim_range(&mut self, ino: u32, pblk: u64, len: u64) -> bool {
        let (count, first) = self.used.add_range(pblk, len);
        if count > 0 {
            self.tell(Finding::BlocksTwice {
                ino,
                pblk: first,
                count,
            });
        }
        count == 0
    }
}

/// What stays the same through a check.
#[derive(Clone, Copy)]
struct Cx<'a> {
    blocks: Blocks<'a>,
    geo: &'a Geometry,
    raw: &'a RawSuperblock,
}

impl Cx<'_> {
    /// Reads a block; where that fails, it is told and `false`.
    fn read(&self, state: &mut State, block: u64, out: &mut [u8]) -> bool {
        match self.blocks.read(block, out) {
            Ok(()) => true,
            Err(error) => {
                state.tell(Finding::Read { block, error });
                false
            }
        }
    }

    fn holds(&self, pblk: u64, len: u64) -> bool {
        self.geo.blocks_in_fs(pblk, len)
    }

    fn block_size(&self) -> usize {
        self.geo.block_size as usize
    }
}

/// Checks the file system in `source`, in memory that is used again.
pub fn check(source: &dyn Source, scratch: &mut Scratch) -> Report {
    let Scratch { overlay, state } = scratch;
    overlay.clear();
    state.reset();
    run(source, overlay, state);
    std::mem::take(&mut state.report)
}

fn run(source: &dyn Source, overlay: &mut Overlay, state: &mut State) -> Option<()> {
    let raw = superblock::read(source, overlay, state)?;
    let geo = superblock::geometry(source, &raw, state)?;
    journal::replay(source, overlay, &geo, &raw, state)?;
    // The log may hold another superblock.
    let raw = superblock::read(source, overlay, state)?;
    let geo = superblock::geometry(source, &raw, state)?;
    let cx = Cx {
        blocks: Blocks {
            source,
            overlay,
            block_size: geo.block_size as usize,
        },
        geo: &geo,
        raw: &raw,
    };
    state.size_to(&geo);
    superblock::check(&cx, state);
    if let Err(error) = groups::load(&cx, &mut state.groups) {
        state.tell(error);
        return None;
    }
    groups::check_descriptors(&cx, state)?;
    superblock::check_copies(&cx, state);
    superblock::check_resize_inode(&cx, state);
    orphans::find(&cx, state);
    inodes::scan(&cx, state);
    dirs::check(&cx, state);
    tree::check(&cx, state);
    groups::check_bitmaps(&cx, state);
    Some(())
}
