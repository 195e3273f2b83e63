//! Commits without a journal: in place, in phases.
//!
//! There is no atomicity without a log. The order makes what a crash leaves repairable without
//! questions: first blocks that nothing names yet, then inodes, then what names inodes (directories)
//! and all else, then bitmaps and group descriptors. Freed blocks come back after the last phase,
//! as with a journal.

use blockstack::{BlkResult, flush_wait};

use super::io::{Disk, HomeWriter};
use super::transaction::Txn;
use super::{Class, Shared};

impl Shared {
    /// Writes all blocks of `txn`; the caller ends the transaction.
    pub(super) fn commit_in_place(&self, disk: &Disk, txn: &Txn) -> BlkResult {
        let heads = txn.heads.lock_nested().clone();
        let mut writer = HomeWriter::new(disk);
        for class in Class::ALL {
            // The next transaction can join a block, and change its class, at any time: the last
            // phase takes whatever is left.
            let is_last = class == Class::Bitmaps;
            let mut wrote = false;
            for head in &heads {
                if (is_last || head.class() == class as u8) && head.has_copy_for(txn.tid) {
                    writer.push(head.block, |out| {
                        head.copy_for(txn.tid, out);
                    })?;
                    wrote = true;
                }
            }
            writer.write_all()?;
            if wrote && self.core.opts.barrier {
                flush_wait(&disk.dev)?;
            }
        }
        Ok(())
    }
}
