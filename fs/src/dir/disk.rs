//! The blocks of a directory on disk: mapping, buffer cache, journal, checksums.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bufio::{BufError, Buffer, Invalid, ReadGuard, Validator, no_check};

use crate::alloc::{BlockUse, Privilege};
use crate::core::Fs;
use crate::dir::store::{DirConfig, Store, StoreMut};
use crate::error::{FsError, FsResult};
use crate::format::csum::crc32c;
use crate::format::dirent::{self, DirLayout, TAIL_LEN};
use crate::format::features::{Compat, Incompat};
use crate::format::htree::{self, CharSign, DX_TAIL_LEN, DxKind, HashKind};
use crate::format::inode::{InodeData, InodeFlags};
use crate::geometry::Geometry;
use crate::inode::Inode;
use crate::inode::map::{self, MapKind, Written};
use crate::journal::{Handle, JournalWrite};

impl DirConfig {
    /// Derives the parameters from the superblock's.
    #[must_use]
    pub fn new(geo: &Geometry) -> Self {
        let large = geo.incompat.contains(Incompat::LARGEDIR);
        let unsigned = geo.hash_unsigned;
        Self {
            layout: DirLayout {
                block_size: geo.block_size as usize,
                filetype: geo.has_filetype(),
                tail: geo.metadata_csum(),
                max_ino: geo.inodes_count,
            },
            dir_index: geo.compat.contains(Compat::DIR_INDEX),
            default_hash: HashKind::from_raw(geo.def_hash_version),
            sign: if unsigned {
                CharSign::Unsigned
            } else {
                CharSign::Signed
            },
            seed: geo.hash_seed,
            max_levels: if large { 2 } else { 1 },
        }
    }
}

/// Checks and sets the checksums of one directory's blocks, whichever kind each is.
struct DirValidator {
    seed: u32,
    layout: DirLayout,
}

impl DirValidator {
    fn index_checksum(&self, data: &[u8], kind: DxKind) -> Option<(usize, u32)> {
        let span = htree::checksum_span(data, kind, self.layout)?;
        let tail = data.get(span.tail_at..span.tail_at + DX_TAIL_LEN)?;
        let crc = crc32c(self.seed, data.get(..span.covered)?);
        let crc = crc32c(crc32c(crc, &tail[..4]), &[0; 4]);
        Some((span.tail_at + 4, crc))
    }
}

impl Validator for DirValidator {
    fn check(&self, _: u64, data: &[u8]) -> Result<(), Invalid> {
        let (at, want) = match htree::kind_by_content(data, self.layout) {
            Some(kind) => {
                let what = "directory index: limit or count";
                self.index_checksum(data, kind).ok_or(Invalid { what })?
            }
            None => {
                dirent::tail(data).ok_or(Invalid {
                    what: "directory block: checksum tail",
                })?;
                let covered = &data[..data.len() - TAIL_LEN];
                (data.len() - 4, crc32c(self.seed, covered))
            }
        };
        if data[at..at + 4] == want.to_le_bytes() {
            Ok(())
        } else {
            Err(Invalid {
                what: "directory block: checksum",
            })
        }
    }

    fn prepare(&self, _: u64, data: &mut [u8]) {
        let place = match htree::kind_by_content(data, self.layout) {
            Some(kind) => self.index_checksum(data, kind),
            None => dirent::tail(data).map(|_| {
                let covered = &data[..data.len() - TAIL_LEN];
                (data.len() - 4, crc32c(self.seed, covered))
            }),
        };
        if let Some((at, csum)) = place {
            data[at..at + 4].copy_from_slice(&csum.to_le_bytes());
        }
    }
}

fn validator<'a>(fs: &Fs, inode: &'a Inode, layout: DirLayout) -> &'a Arc<dyn Validator> {
    inode.dir_validator.get_or_init(|| {
        if fs.geo.metadata_csum() {
            Arc::new(DirValidator {
                seed: inode.csum_seed,
                layout,
            })
        } else {
            no_check().clone()
        }
    })
}

/// A directory of a mounted file system; `D` decides whether it can be changed.
pub(super) struct Disk<'a, D> {
    fs: &'a Fs,
    inode: &'a Inode,
    data: D,
    config: DirConfig,
}

/// The inode's fields, and the handle that changes belong to.
pub(super) struct Change<'a> {
    handle: &'a Handle,
    data: &'a mut InodeData,
}

impl Deref for Change<'_> {
    type Target = InodeData;
    fn deref(&self) -> &InodeData {
        self.data
    }
}

impl DerefMut for Change<'_> {
    fn deref_mut(&mut self) -> &mut InodeData {
        self.data
    }
}

impl<'a> Disk<'a, &'a InodeData> {
    pub fn reader(fs: &'a Fs, inode: &'a Inode, data: &'a InodeData) -> Self {
        Self {
            fs,
            inode,
            data,
            config: DirConfig::new(&fs.geo),
        }
    }
}

impl<'a> Disk<'a, Change<'a>> {
    pub fn writer(
        fs: &'a Fs,
        handle: &'a Handle,
        inode: &'a Inode,
        data: &'a mut InodeData,
    ) -> Self {
        Self {
            fs,
            inode,
            data: Change { handle, data },
            config: DirConfig::new(&fs.geo),
        }
    }
}

impl<D: Deref<Target = InodeData>> Store for Disk<'_, D> {
    type Block = Buffer;
    type Error = FsError;
    type Bytes<'b>
        = ReadGuard<'b>
    where
        Self: 'b;

    fn config(&self) -> &DirConfig {
        &self.config
    }

    fn blocks(&self) -> u32 {
        u32::try_from(self.data.size >> self.fs.geo.block_bits).unwrap_or(u32::MAX)
    }

    fn indexed(&self) -> bool {
        self.data.flags.contains(InodeFlags::INDEX)
    }

    fn read(&self, lblk: u32) -> FsResult<Buffer> {
        let mapping = map::lookup(self.fs, self.inode, &self.data, lblk, 1)?;
        if mapping.kind != MapKind::Mapped {
            return Err(self.corrupt("directory: a hole", lblk));
        }
        let validator = validator(self.fs, self.inode, self.config.layout);
        self.fs
            .bufs
            .read(mapping.pblk, validator)
            .map_err(|error| match error {
                BufError::Invalid { block, what } => self.fs.corrupt(what, block, self.inode.ino),
                BufError::Blk(_) => FsError::from(error),
            })
    }

    fn prefetch(&self, lblk: u32, count: u32) {
        let mapping = map::lookup(self.fs, self.inode, &self.data, lblk, count);
        // A hint: whoever reads the blocks will see what is wrong.
        if let Some(run) = mapping.ok().filter(|m| m.kind == MapKind::Mapped) {
            self.fs.bufs.prefetch(run.pblk, run.len.into());
        }
    }

    fn bytes<'b>(&'b self, block: &'b Buffer) -> ReadGuard<'b> {
        block.data()
    }

    fn corrupt(&self, what: &'static str, lblk: u32) -> FsError {
        let mapping = map::lookup(self.fs, self.inode, &self.data, lblk, 1);
        self.fs
            .corrupt(what, mapping.map_or(0, |m| m.pblk), self.inode.ino)
    }

    fn warn(&self, what: &'static str, lblk: u32) {
        // Every lookup comes here; one line for a directory is enough.
        static LAST: AtomicU32 = AtomicU32::new(0);
        let ino = self.inode.ino;
        if LAST.swap(ino, Ordering::Relaxed) != ino {
            log::warn!("directory {ino}: {what}, block {lblk} of the directory; run e2fsck -D");
        }
    }
}

impl StoreMut for Disk<'_, Change<'_>> {
    type BytesMut<'b>
        = JournalWrite<'b>
    where
        Self: 'b;

    fn edit<'b>(&'b self, block: &'b Buffer) -> FsResult<JournalWrite<'b>> {
        self.data.handle.write(block)
    }

    fn append(&mut self) -> FsResult<(u32, Buffer)> {
        let (fs, inode, handle) = (self.fs, self.inode, self.data.handle);
        let block_size = u64::from(fs.geo.block_size);
        let lblk = self.blocks();
        let size = (u64::from(lblk) + 1) * block_size;
        // The upper half of the size means something else in directories without large_dir, and
        // index entries have 28 bits for a block.
        let large = fs.geo.incompat.contains(Incompat::LARGEDIR);
        let max = if large {
            block_size << 28
        } else {
            u64::from(u32::MAX)
        };
        if size > max {
            return Err(FsError::NoSpace);
        }
        let goal = fs.alloc.goal_for(inode.ino, &self.data, lblk);
        let run = fs.alloc.reserve(goal, 1, 1, Privilege::User)?;
        if let Err(error) = fs.alloc.commit_run(handle, run) {
            fs.alloc.unreserve(run);
            return Err(error);
        }
        let mapped = map::insert(fs, handle, inode, &mut self.data, lblk, run, Written::Yes);
        if let Err(error) = mapped {
            fs.alloc.free(handle, run.start, run.len, BlockUse::Data)?;
            return Err(error);
        }
        let validator = validator(fs, inode, self.config.layout);
        let buffer = handle.create(run.start, validator)?;
        self.data.size = size;
        Ok((lblk, buffer))
    }

    fn set_indexed(&mut self) {
        self.data.flags.insert(InodeFlags::INDEX);
    }

    fn clear_indexed(&mut self) {
        self.data.flags.remove(InodeFlags::INDEX);
    }

    fn full(&self) -> FsError {
        log::warn!("directory {}: index full", self.inode.ino);
        FsError::NoSpace
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kinds(block_size: usize) -> (DirValidator, [Vec<u8>; 3]) {
        let layout = DirLayout {
            block_size,
            filetype: true,
            tail: true,
            max_ino: 100,
        };
        let mut leaf = vec![0; block_size];
        dirent::fill_dots(&mut leaf, layout, 12, 2);
        let mut root = leaf.clone();
        let dots = dirent::dots(&root, layout).unwrap();
        htree::make_root(&mut root, layout, &dots, HashKind::Tea, 1);
        let mut node = vec![0; block_size];
        htree::fill_node(&mut node, layout);
        htree::DxEdit::new(&mut node, DxKind::Node, layout).assign(&[(0, 3), (77, 4)]);
        (DirValidator { seed: 99, layout }, [leaf, root, node])
    }

    proptest! {
        #[test]
        fn a_flipped_bit_is_seen(bits in 10..13_u32, at in any::<prop::sample::Index>(), bit in 0..8) {
            let (validator, blocks) = kinds(1 << bits);
            for mut block in blocks {
                validator.prepare(7, &mut block);
                prop_assert_eq!(validator.check(7, &block), Ok(()));
                let used = match htree::kind_by_content(&block, validator.layout) {
                    None => block.len(),
                    Some(kind) => htree::checksum_span(&block, kind, validator.layout).unwrap().covered,
                };
                block[at.index(used)] ^= 1_u8 << bit;
                prop_assert!(validator.check(7, &block).is_err());
            }
        }

        #[test]
        fn any_bytes_are_survived(head in prop::collection::vec(any::<u8>(), 48), limit in any::<u32>()) {
            let (validator, blocks) = kinds(1024);
            for mut block in blocks {
                block[32..36].copy_from_slice(&limit.to_le_bytes());
                prop_assert!(validator.check(7, &block).is_err());
                block[..48].copy_from_slice(&head);
                validator.prepare(7, &mut block);
            }
        }
    }
}
