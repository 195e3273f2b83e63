//! Commits without a journal: in place, in phases.
//!
//! There is no atomicity without a log. The order makes what a crash leaves repairable without
//! questions:
//!
//! ```text
//! 1 blocks that nothing names yet
//! 2 inode tables, but inodes that come into use stay free: who loses its last name is gone
//! 3 what names inodes (directories) and all else: names of inodes that are still free
//! 4 inode tables: those inodes come into use
//! 5 bitmaps and group descriptors, and what joined the next transaction meanwhile
//! ```
//!
//! A name of a free inode is removed by e2fsck unasked, and counts are corrected; an inode in use
//! without a name would be asked about, and is not there between any two steps. Freed blocks come
//! back after the last phase, as with a journal.

use blockstack::{BlkResult, PagePool, flush_wait, read_wait};

use super::io::{Disk, HomeWriter};
use super::transaction::Txn;
use super::{Class, Shared};

/// Where `i_links_count` stands in an inode.
const LINKS: usize = 26;

/// Keeps the inodes of a table block free that are free in `old`.
fn keep_free(block: &mut [u8], old: &[u8], inode_size: usize) {
    let slots = block
        .chunks_exact_mut(inode_size)
        .zip(old.chunks_exact(inode_size));
    for (inode, before) in slots {
        if before[LINKS..LINKS + 2] == [0, 0] && inode[LINKS..LINKS + 2] != [0, 0] {
            inode.copy_from_slice(before);
        }
    }
}

impl Shared {
    /// Writes all blocks of `txn`; the caller ends the transaction.
    pub(super) fn commit_in_place(&self, disk: &Disk, txn: &Txn) -> BlkResult {
        let heads = txn.heads.lock_nested().clone();
        let inode_size = usize::from(self.core.geo.inode_size);
        let mut tables = Vec::new();
        let mut writer = HomeWriter::new(disk);
        for class in Class::ALL {
            // The next transaction can join a block, and change its class, at any time: the last
            // phase takes whatever is left.
            let is_last = class == Class::Bitmaps;
            for head in &heads {
                if !(is_last || head.class() == class as u8) || !head.has_copy_for(txn.tid) {
                    continue;
                }
                if class == Class::Inodes {
                    let mut table = vec![0; disk.block_size];
                    head.copy_for(txn.tid, &mut table);
                    let old = PagePool::shared().alloc(disk.block_size)?;
                    let old = read_wait(&disk.dev, disk.sector(head.block)?, old)?;
                    writer.push(head.block, |out| {
                        out.copy_from_slice(&table);
                        keep_free(out, &old, inode_size);
                    })?;
                    tables.push((head.block, table));
                } else {
                    writer.push(head.block, |out| {
                        head.copy_for(txn.tid, out);
                    })?;
                }
            }
            self.end_phase(disk, &mut writer)?;
            if class == Class::Other {
                for (block, table) in tables.drain(..) {
                    writer.push(block, |out| out.copy_from_slice(&table))?;
                }
                self.end_phase(disk, &mut writer)?;
            }
        }
        Ok(())
    }

    fn end_phase(&self, disk: &Disk, writer: &mut HomeWriter<'_>) -> BlkResult {
        writer.write_all()?;
        if self.core.opts.barrier {
            flush_wait(&disk.dev)
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{LINKS, keep_free};

    #[test]
    fn an_inode_comes_into_use_only_after_its_name() {
        let inode = |links: u8, tag: u8| {
            let mut bytes = [tag; 128];
            bytes[LINKS..LINKS + 2].copy_from_slice(&[links, 0]);
            bytes
        };
        let old = [inode(0, 1), inode(1, 2), inode(2, 3)].concat();
        let mut new = [inode(1, 4), inode(0, 5), inode(2, 6)].concat();
        keep_free(&mut new, &old, 128);
        assert_eq!(new, [inode(0, 1), inode(0, 5), inode(2, 6)].concat());
    }
}
