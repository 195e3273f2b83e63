//! Orphans: inodes without a name that are still open, and files whose truncation is under way.
//!
//! What a crash leaves of them is deleted or truncated at the next mount. They are found through a
//! list (`s_last_orphan` in the superblock, then `i_dtime` of each inode) or, with the `orphan_file`
//! feature, through the blocks of a hidden file.
//!
//! Without a journal neither is written, as the kernel's ext2 does: a list that is changed in place
//! cannot be kept whole, while an inode with blocks and without a name is what e2fsck frees unasked.
//!
//! Format: Linux `Documentation/filesystems/ext4/orphan.rst`.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use blockstack::sync::{Condvar, Mutex, Rank};
use bufio::{Buffer, Invalid, Validator, no_check};

use crate::core::{Core, Fs, ORPHANS_LISTED};
use crate::error::{FsError, FsResult};
use crate::format::csum::crc32c;
use crate::format::features::{Compat, RoCompat};
use crate::format::inode::inode_csum_seed;
use crate::inode::map::{self, MapKind};
use crate::inode::{Inode, ROOT_INO};
use crate::journal::Handle;

/// Credits for [`Fs::orphan_add`] or [`Fs::orphan_remove`].
pub const ORPHAN_CREDITS: u32 = 4;

const TAIL_MAGIC: u32 = 0x0b10_ca04;
const TAIL_SIZE: usize = 8;
const S_LAST_ORPHAN: usize = 0xe8;

/// An inode's place among the orphans.
#[derive(Debug, Default)]
pub struct OrphanLink {
    /// 0 not listed, 1 on the list, 2 in the file, 3 known in memory only.
    state: AtomicU8,
    /// On the list: the next inode. In the file: block and slot.
    place: AtomicU32,
}

impl OrphanLink {
    /// Whether the inode is an orphan.
    #[must_use]
    pub fn is_listed(&self) -> bool {
        self.state.load(Ordering::Acquire) != 0
    }

    /// The next inode, where it is on the list.
    #[must_use]
    pub fn next(&self) -> Option<u32> {
        (self.state.load(Ordering::Acquire) == 1).then(|| self.place.load(Ordering::Acquire))
    }

    /// Takes the place of an inode of the same number.
    pub(crate) fn take_over(&self, other: &Self) {
        self.set(
            other.state.load(Ordering::Acquire),
            other.place.load(Ordering::Acquire),
        );
    }

    fn set(&self, state: u8, place: u32) {
        self.place.store(place, Ordering::Release);
        self.state.store(state, Ordering::Release);
    }
}

struct OrphanFile {
    /// Blocks of the file.
    blocks: Vec<u64>,
    validator: Arc<dyn Validator>,
    /// Free slots, block by block.
    free: Vec<u32>,
}

#[derive(Default)]
struct State {
    /// First of the list.
    first: u32,
    /// Who names whom: the inode before, or 0 for the superblock.
    before: HashMap<u32, u32>,
    file: Option<OrphanFile>,
}

/// What becomes of files whose last name was removed.
#[derive(Default)]
struct Farewells {
    /// When the last one lost its name.
    unnamed: Option<Instant>,
    /// How many were given up by the kernel so far.
    given_up: u64,
}

/// The orphans of a mounted file system.
pub struct Orphans {
    state: Mutex<State>,
    farewells: Mutex<Farewells>,
    given_up: Condvar,
    /// Whoever gives files up does so by itself, soon after it has removed them.
    farewells_follow: AtomicBool,
}

impl Default for Orphans {
    fn default() -> Self {
        Self {
            state: Mutex::new(Rank::ExtentTree, State::default()),
            farewells: Mutex::new(Rank::Counters, Farewells::default()),
            given_up: Condvar::new(),
            farewells_follow: AtomicBool::new(false),
        }
    }
}

/// How long after the removal of a file the kernel may take to say that nobody has it open.
const FAREWELL: Duration = Duration::from_millis(200);

impl Orphans {
    /// The file system stands below a kernel: that a removed file is not open comes after the answer
    /// to its removal, and is worth waiting for where there is no space.
    pub fn expect_farewells(&self) {
        self.farewells_follow.store(true, Ordering::Release);
    }

    /// A file lost its last name.
    pub(crate) fn note_unnamed(&self) {
        self.farewells.lock().unnamed = Some(Instant::now());
    }

    /// The kernel has given up a file without a name.
    pub(crate) fn note_given_up(&self) {
        self.farewells.lock().given_up += 1;
        self.given_up.notify_all();
    }

    /// Where a file was removed just now, waits for the kernel's word that it may be deleted: that
    /// comes after the removal was answered. `false` where none came. The caller holds no lock.
    pub(crate) fn wait_for_farewell(&self) -> bool {
        if !self.farewells_follow.load(Ordering::Acquire) {
            return false;
        }
        let mut farewells = self.farewells.lock();
        let seen = farewells.given_up;
        while farewells.given_up == seen {
            let Some(unnamed) = farewells.unnamed else {
                return false;
            };
            if !self.given_up.wait_until(&mut farewells, unnamed + FAREWELL) {
                return farewells.given_up != seen;
            }
        }
        true
    }
}

struct OrphanBlock {
    seed: u32,
    csum: bool,
}

impl Validator for OrphanBlock {
    fn check(&self, block: u64, data: &[u8]) -> Result<(), Invalid> {
        let at = data.len() - TAIL_SIZE;
        if le32(data, at) != TAIL_MAGIC {
            return Err(Invalid {
                what: "orphan file block: ob_magic",
            });
        }
        if self.csum && le32(data, at + 4) != self.checksum(block, data) {
            return Err(Invalid {
                what: "orphan file block: ob_checksum",
            });
        }
        Ok(())
    }

    fn prepare(&self, block: u64, data: &mut [u8]) {
        if self.csum {
            let at = data.len() - 4;
            let csum = self.checksum(block, data);
            data[at..].copy_from_slice(&csum.to_le_bytes());
        }
    }
}

impl OrphanBlock {
    fn checksum(&self, block: u64, data: &[u8]) -> u32 {
        let crc = crc32c(self.seed, &block.to_le_bytes());
        crc32c(crc, &data[..data.len() - TAIL_SIZE])
    }
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

impl Core {
    fn superblock(&self) -> FsResult<(Buffer, usize)> {
        let (block, offset) = self.geo.superblock_at();
        Ok((self.bufs.read(block, no_check())?, offset))
    }
}

impl Fs {
    /// Puts an inode among the orphans, as part of `handle`; nothing where it is there already. The
    /// caller holds the inode's lock and writes the inode afterwards.
    ///
    /// # Errors
    /// Buffers that cannot be read; an aborted journal.
    pub fn orphan_add(&self, handle: &Handle, inode: &Inode) -> FsResult {
        if inode.orphan.is_listed() {
            return Ok(());
        }
        if !self.journal.has_log() {
            inode.orphan.set(3, 0);
            return Ok(());
        }
        let mut state = self.orphans.state.lock();
        if let Some(file) = &mut state.file {
            if let Some(slot) = file.free.pop() {
                let per_block = self.geo.block_size / 4 - 2;
                let block = file.blocks[(slot / per_block) as usize];
                let validator = file.validator.clone();
                let buffer = self.bufs.read(block, &validator)?;
                let at = (slot % per_block) as usize * 4;
                handle.write(&buffer)?[at..at + 4].copy_from_slice(&inode.ino.to_le_bytes());
                inode.orphan.set(2, slot);
                return Ok(());
            }
        }
        let first = state.first;
        self.write_last_orphan(handle, inode.ino)?;
        if first != 0 {
            state.before.insert(first, inode.ino);
        }
        state.before.insert(inode.ino, 0);
        state.first = inode.ino;
        inode.orphan.set(1, first);
        Ok(())
    }

    /// Takes an inode out of the orphans, as part of `handle`. The caller holds the inode's lock
    /// and writes the inode afterwards.
    ///
    /// # Errors
    /// Buffers that cannot be read; an aborted journal.
    pub fn orphan_remove(&self, handle: &Handle, inode: &Inode) -> FsResult {
        if !inode.orphan.is_listed() {
            return Ok(());
        }
        if inode.orphan.state.load(Ordering::Acquire) == 3 {
            inode.orphan.set(0, 0);
            return Ok(());
        }
        let mut state = self.orphans.state.lock();
        let Some(next) = inode.orphan.next() else {
            let slot = inode.orphan.place.load(Ordering::Acquire);
            if let Some(file) = &mut state.file {
                let per_block = self.geo.block_size / 4 - 2;
                let block = file.blocks[(slot / per_block) as usize];
                let validator = file.validator.clone();
                file.free.push(slot);
                let buffer = self.bufs.read(block, &validator)?;
                let at = (slot % per_block) as usize * 4;
                handle.write(&buffer)?[at..at + 4].fill(0);
            }
            inode.orphan.set(0, 0);
            return Ok(());
        };
        let before = state.before.remove(&inode.ino).unwrap_or(0);
        if before == 0 {
            self.write_last_orphan(handle, next)?;
            state.first = next;
        } else {
            let previous = self.iget(before)?;
            previous.orphan.set(1, next);
            self.write_orphan_link(handle, &previous, next)?;
        }
        if next != 0 {
            state.before.insert(next, before);
        }
        inode.orphan.set(0, 0);
        Ok(())
    }

    fn write_last_orphan(&self, handle: &Handle, ino: u32) -> FsResult {
        let list = if ino == 0 {
            handle.tid().into()
        } else {
            ORPHANS_LISTED
        };
        self.core.orphan_list.store(list, Ordering::Release);
        let (buffer, offset) = self.core.superblock()?;
        let mut block = handle.write(&buffer)?;
        let at = offset + S_LAST_ORPHAN;
        block[at..at + 4].copy_from_slice(&ino.to_le_bytes());
        crate::mount::seal_superblock(&mut block[offset..]);
        Ok(())
    }

    /// Finds what a crash left to delete or truncate, and readies the orphan file. At mount, before
    /// anything is written.
    ///
    /// # Errors
    /// A list or a file that is damaged.
    pub(crate) fn find_orphans(&self) -> FsResult<Vec<Arc<Inode>>> {
        let mut inos = Vec::new();
        self.read_list(&mut inos)?;
        self.read_file(&mut inos)?;
        Ok(inos)
    }

    /// Deletes or truncates what [`Self::find_orphans`] found.
    ///
    /// # Errors
    /// Those of deleting and truncating.
    pub(crate) fn clear_orphans(self: &Arc<Self>, inos: Vec<Arc<Inode>>) -> FsResult {
        if self.is_read_only() {
            return Ok(());
        }
        for inode in inos {
            let ino = inode.ino;
            let links = inode.data.read().links;
            if links == 0 {
                self.delete(&inode)?;
                log::info!("deleted inode {ino}, left without a name");
            } else {
                self.finish_truncate(&inode)?;
                log::info!("finished the truncation of inode {ino}");
            }
            drop(inode);
            self.inodes.drop_unused(ino);
        }
        Ok(())
    }

    fn listed(&self, ino: u32) -> FsResult<Arc<Inode>> {
        if ino > self.geo.inodes_count || (ino < self.geo.first_ino && ino != ROOT_INO) {
            return Err(self.corrupt("orphan list: inode number", 0, ino));
        }
        self.iget(ino)
    }

    fn read_list(&self, inos: &mut Vec<Arc<Inode>>) -> FsResult {
        let (buffer, offset) = self.core.superblock()?;
        let mut next = le32(&buffer.data(), offset + S_LAST_ORPHAN);
        let mut state = self.orphans.state.lock();
        state.first = next;
        if next != 0 {
            self.core
                .orphan_list
                .store(ORPHANS_LISTED, Ordering::Release);
        }
        let mut before = 0;
        while next != 0 {
            if state.before.insert(next, before).is_some() {
                return Err(self.corrupt("orphan list: a loop", buffer.block(), next));
            }
            drop(state);
            let inode = self.listed(next)?;
            let following = inode.data.read().dtime;
            inode.orphan.set(1, following);
            before = next;
            next = following;
            inos.push(inode);
            state = self.orphans.state.lock();
        }
        Ok(())
    }

    fn read_file(&self, inos: &mut Vec<Arc<Inode>>) -> FsResult {
        if !self.geo.compat.contains(Compat::ORPHAN_FILE) {
            return Ok(());
        }
        let ino = self.geo.orphan_file_inum;
        let inode = self.iget(ino)?;
        let data = inode.data.read().clone();
        let count = data.size.div_ceil(u64::from(self.geo.block_size));
        if !data.is_file() || count == 0 || count > 512 {
            return Err(self.corrupt("orphan file: i_size", 0, ino));
        }
        let validator: Arc<dyn Validator> = Arc::new(OrphanBlock {
            seed: inode_csum_seed(self.geo.csum_seed, ino, data.generation),
            csum: self.geo.metadata_csum(),
        });
        let per_block = self.geo.block_size / 4 - 2;
        let mut file = OrphanFile {
            blocks: Vec::new(),
            validator,
            free: Vec::new(),
        };
        let pending = self.geo.ro_compat.contains(RoCompat::ORPHAN_PRESENT);
        for lblk in 0..count as u32 {
            let mapping = map::lookup(self, &inode, &data, lblk, 1)?;
            if mapping.kind != MapKind::Mapped {
                return Err(self.corrupt("orphan file: a hole", 0, ino));
            }
            file.blocks.push(mapping.pblk);
            let buffer = self.bufs.read(mapping.pblk, &file.validator)?;
            for index in 0..per_block {
                let slot = lblk * per_block + index;
                let orphan = le32(&buffer.data(), index as usize * 4);
                if orphan == 0 {
                    file.free.push(slot);
                } else if pending {
                    let inode = self.listed(orphan)?;
                    inode.orphan.set(2, slot);
                    inos.push(inode);
                } else {
                    return Err(self.corrupt(
                        "orphan file: entries but no orphan_present",
                        0,
                        orphan,
                    ));
                }
            }
        }
        file.free.reverse();
        self.orphans.state.lock().file = Some(file);
        Ok(())
    }

    /// Whether no inode is an orphan.
    #[must_use]
    pub(crate) fn no_orphans(&self) -> bool {
        let state = self.orphans.state.lock();
        let per_block = self.geo.block_size / 4 - 2;
        let all_free = state
            .file
            .as_ref()
            .is_none_or(|file| file.free.len() == file.blocks.len() * per_block as usize);
        state.first == 0 && all_free
    }

    /// An error of deleting in the background, for the log.
    pub(crate) fn report_eviction(&self, ino: u32, error: FsError) {
        if self.is_shut_down() {
            return;
        }
        log::error!("inode {ino} without a name could not be deleted: {error}; it stays an orphan");
    }
}
