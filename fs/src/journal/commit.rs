//! Commits, and how a transaction gets into the log.
//!
//! Who waits for a commit that nobody has begun does it; that spares two changes of threads for
//! each fsync. Everybody else who waits for the same transaction shares it. The commit thread is
//! there for age, for requests nobody waits for, and for handles that need a new transaction.
//!
//! # The order of steps, and what a crash between them leaves
//!
//! 1. The transaction is locked and its handles stop. *Crash: nothing of it is on disk.*
//! 2. If the log was empty, the superblock says where it starts now, durably. *Crash: replay looks
//!    there and finds no commit record with the right number.*
//! 3. Revoke blocks, descriptor blocks and copies are written, zeros behind them, and awaited.
//!    *Crash: the same; what stands there has no commit record, or one of an earlier round, whose
//!    number is too old.*
//! 4. The commit record, with preflush and FUA: the flush makes step 3 durable, and the file data
//!    that was written before its metadata joined. *Crash before it is durable: as 3; of a torn one
//!    the first sector counts, all others are zeros before and after. After: the transaction is
//!    replayed.*
//! 5. Each buffer is marked dirty and unpinned, or stays pinned for the next transaction that has
//!    it; freed blocks are dropped from the cache, their numbers go to the hooks, waiters wake.
//!    *Crash: replayed; nothing that was freed had been given out before 4.*

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use blockstack::sync::MutexGuard;
use blockstack::{BioFlags, BlkError, BlkResult, Buf, PagePool, flush_wait, write_wait};

use super::io::{Batch, Disk};
use super::transaction::{Head, OlderCopy, Txn};
use super::{Jbd2, Logged, Mode, Shared, State, Stop};
use crate::format::jbd2::{
    DescriptorWriter, Incompat, MAGIC_BYTES, RevokeWriter, Tag, TagFlags, Tid, tid_geq,
};

/// Longest run of blocks behind one descriptor, in bytes: what waits in memory for its checksums.
const GROUP_BYTES: usize = 1 << 20;

impl Shared {
    /// The commit thread: commits what is old enough, and what nobody who waits could commit.
    pub(super) fn commit_loop(self: &Arc<Self>) {
        let mut state = self.state.lock();
        loop {
            if state.aborted {
                if std::mem::take(&mut state.record_errno) {
                    drop(state);
                    self.record_errno();
                    state = self.state.lock();
                    continue;
                }
                if state.stop != Stop::No {
                    return;
                }
                self.commit_work.wait(&mut state);
                continue;
            }
            if state.stop == Stop::Now {
                return;
            }
            if self.aborted.load(Ordering::Acquire) {
                // Whoever aborts is about to say so in the state.
                self.commit_work.wait(&mut state);
                continue;
            }
            if state.has_committer {
                self.commit_work.wait(&mut state);
                continue;
            }
            let Some(txn) = state.running.clone() else {
                if state.stop == Stop::Drain {
                    return;
                }
                self.commit_work.wait(&mut state);
                continue;
            };
            let deadline = txn.started + self.interval;
            let asked = state.stop == Stop::Drain || tid_geq(state.requested, txn.tid);
            if !asked && Instant::now() < deadline {
                self.commit_work.wait_until(&mut state, deadline);
                continue;
            }
            state = self.commit_running(state, &txn);
        }
    }

    /// Commits `txn`, the running transaction, on the calling thread; nobody else is doing so.
    pub(super) fn commit_running<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        txn: &Arc<Txn>,
    ) -> MutexGuard<'a, State> {
        state.has_committer = true;
        txn.locked.store(true, Ordering::SeqCst);
        while txn.updates.load(Ordering::SeqCst) > 0 && state.stop != Stop::Now {
            self.drained.wait(&mut state);
        }
        // A handle may have stopped halfway through its operation because of the abort.
        if state.stop == Stop::Now || self.aborted.load(Ordering::Acquire) {
            state.has_committer = false;
            return state;
        }
        state.running = None;
        state.committing = Some(txn.clone());
        self.unlocked.notify_all();
        drop(state);
        self.commit(txn);
        self.state.lock()
    }

    /// Ends with `has_committer` cleared; from then on somebody else may commit.
    fn commit(&self, txn: &Arc<Txn>) {
        let start = self.state.lock().head;
        let is_empty = txn.heads.lock_nested().is_empty();
        let written = match &self.mode {
            // Who asked for the commit wants data durable, too.
            Mode::Bare(_) if is_empty && !self.core.opts.barrier => Ok(None),
            Mode::Bare(disk) if is_empty => flush_wait(&disk.dev).map(|()| None),
            Mode::Bare(disk) => self.commit_in_place(disk, txn).map(|()| None),
            // Also where it is empty: a number that is missing in the log ends the replay.
            Mode::Jbd2(jbd2) => self.commit_to_log(jbd2, txn, start).map(Some),
        };
        match written {
            Ok(head) => self.finish(txn, start, head),
            Err(error) => {
                self.abort(&format!(
                    "transaction {} cannot be written: {error}",
                    txn.tid
                ));
            }
        }
    }

    /// Steps 2 to 4; gives the log block after the commit record.
    fn commit_to_log(&self, jbd2: &Jbd2, txn: &Txn, start: u32) -> BlkResult<u32> {
        let mut heads = txn.heads.lock_nested().clone();
        heads.retain(|head| head.has_copy_for(txn.tid));
        heads.sort_unstable_by_key(|head| head.block);
        let revokes = txn.revokes.take_sorted();
        self.check_room(jbd2, heads.len(), revokes.len(), start)?;
        self.prepare_superblock(jbd2, txn.tid, start, !revokes.is_empty())?;

        let mut writer = LogWriter::new(jbd2, start);
        writer.expect(jbd2.blocks_for(heads.len(), revokes.len(), self.block_size));
        writer.put_revokes(txn.tid, &revokes)?;
        writer.put_heads(txn.tid, &heads)?;
        let at = writer.put_zeros()?;
        writer.finish()?;

        let mut block = PagePool::shared().alloc_zeroed(self.block_size)?;
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        jbd2.csum
            .put_commit(&mut block, txn.tid, now.as_secs(), now.subsec_nanos(), 0);
        let flags = if self.core.opts.barrier {
            BioFlags::PREFLUSH | BioFlags::FUA | BioFlags::META
        } else {
            BioFlags::META
        };
        let pblk = jbd2.locate(at)?.0;
        write_wait(&jbd2.disk.dev, jbd2.disk.sector(pblk)?, block, flags)?;
        Ok(jbd2.geometry.advance(at, 1))
    }

    /// The reservations of handles make this true; a log block in use must not be overwritten
    /// even where they are wrong.
    fn check_room(&self, jbd2: &Jbd2, blocks: usize, revokes: usize, start: u32) -> BlkResult {
        let tail = self.state.lock().tail;
        let need = jbd2.blocks_for(blocks, revokes, self.block_size);
        let free = jbd2.geometry.free(start, tail) as usize;
        if need > free {
            log::error!("journal: a transaction needs {need} blocks, the log has {free}");
            return Err(BlkError::NoSpace);
        }
        Ok(())
    }

    /// Step 2; also says that revoke blocks occur, before the first does.
    fn prepare_superblock(&self, jbd2: &Jbd2, tid: Tid, start: u32, revokes: bool) -> BlkResult {
        let mut log = jbd2.log.lock();
        let mut incompat = log.sb.incompat();
        let on_disk = self.state.lock().tail_on_disk;
        if on_disk && (!revokes || incompat.contains(Incompat::REVOKE)) {
            return Ok(());
        }
        if revokes {
            incompat.insert(Incompat::REVOKE);
            let compat = log.sb.compat();
            log.sb.set_features(compat, incompat);
        }
        if on_disk {
            return log.write_superblock();
        }
        log.write_tail(tid, Some(start))?;
        let mut state = self.state.lock();
        state.tail_on_disk = true;
        state.tail = start;
        Ok(())
    }

    /// Step 5. `head` is where the next transaction goes, of one that is in the log.
    fn finish(&self, txn: &Arc<Txn>, start: u32, head: Option<u32>) {
        let in_log = head.is_some();
        let mut forget = Vec::new();
        let heads = txn.heads.lock_nested().clone();
        for head in &heads {
            self.finish_head(head, txn.tid, in_log, &mut forget);
        }
        for block in std::mem::take(&mut *txn.dropped.lock_nested()) {
            if self.drop_freed(block) {
                forget.push(block);
            }
        }
        forget
            .iter()
            .for_each(|&block| self.core.bufs.forget(block));
        txn.heads
            .lock_nested()
            .retain(|head| in_log && head.state.lock_nested().checkpoint == Some(txn.tid));

        // Before the waiters wake: who waits for space wants to see the blocks that came back.
        let freed = std::mem::take(&mut *txn.freed.lock_nested());
        // A write of what stood there may be on its way; it must not overtake a new owner's.
        for range in &freed {
            self.core
                .bufs
                .wait_writes(range.start, u64::from(range.len));
        }
        let hooks = self.state.lock().hooks.clone();
        if let Some(hooks) = hooks {
            hooks.committed(txn.tid, &freed);
        }

        let mut state = self.state.lock();
        debug_assert!(
            state
                .committing
                .as_ref()
                .is_some_and(|other| Arc::ptr_eq(other, txn)),
            "two commits at once"
        );
        state.committing = None;
        state.committed = txn.tid;
        // Only here, once: a waiter for the next transaction may begin to commit that one as soon
        // as the lock is free.
        state.has_committer = false;
        self.commit_work.notify_one();
        if let Some(head) = head {
            state.head = head;
            state.checkpoint.push_back(Logged {
                txn: txn.clone(),
                start,
            });
        }
        self.done.notify_all();
        self.space.notify_all();
        self.want_checkpoint(&mut state);
    }

    /// The transaction of `tid` is durable; what becomes of one of its blocks.
    fn finish_head(&self, head: &Arc<Head>, tid: Tid, in_log: bool, forget: &mut Vec<u64>) {
        let mut state = head.state.lock_nested();
        if state.older.as_ref().is_some_and(|&(older, _)| older == tid) {
            // The next transaction has it: it stays pinned for that one, and becomes dirty when
            // that one commits.
            let was_freed = matches!(state.older.take(), Some((_, OlderCopy::Freed)));
            if let Some(buf) = &state.buf {
                buf.unpin();
            }
            state.checkpoint = (in_log && !was_freed).then_some(tid);
            return;
        }
        if state.joined != Some(tid) {
            return;
        }
        state.joined = None;
        state.copied = false;
        head.publish(&state);
        let buf = state.buf.take();
        if std::mem::take(&mut state.freed) {
            state.checkpoint = None;
            forget.push(head.block);
        } else if in_log {
            state.checkpoint = Some(tid);
            // Dirty first, so that it cannot be evicted in between.
            buf.iter().for_each(bufio::Buffer::mark_dirty);
        }
        buf.iter().for_each(bufio::Buffer::unpin);
        if state.checkpoint.is_none() {
            state.dead = true;
            self.heads.remove(&head.block);
        }
    }

    /// A block that was freed while older transactions needed it; `true` where it is to be
    /// forgotten now.
    fn drop_freed(&self, block: u64) -> bool {
        let Some(head) = self.heads.get(&block).map(|head| head.clone()) else {
            return true;
        };
        let mut state = head.state.lock_nested();
        if state.joined.is_some() {
            return false;
        }
        state.checkpoint = None;
        state.dead = true;
        self.heads.remove(&block);
        true
    }

    /// Lets whoever opens the file system next know. Not where the list of orphans may have
    /// entries: e2fsck does not go through the list of a file system with errors, and then takes
    /// its links in `i_dtime` for damage that it does not repair without questions. What is
    /// committed is whole without the record, too.
    fn record_errno(&self) {
        let committed = self.state.lock().committed;
        let is_empty = match u32::try_from(self.core.orphan_list.load(Ordering::Acquire)) {
            Ok(emptied) => emptied == 0 || tid_geq(committed, emptied),
            Err(_listed) => false,
        };
        if !is_empty {
            return;
        }
        if let Mode::Jbd2(jbd2) = &self.mode {
            let mut log = jbd2.log.lock();
            log.sb.set_errno(libc::EIO);
            if let Err(error) = log.write_superblock() {
                log::error!("journal: the abort cannot be recorded: {error}");
            }
        }
    }
}

impl Jbd2 {
    fn locate(&self, log_block: u32) -> BlkResult<(u64, u32)> {
        self.file.locate(log_block)
    }

    fn tags_per_group(&self, block_size: usize) -> usize {
        let fit = self.format.per_block(block_size, self.csum);
        fit.min((GROUP_BYTES / block_size).saturating_sub(1)).max(1)
    }

    /// Log blocks of a transaction, the commit record included.
    pub(super) fn blocks_for(&self, blocks: usize, revokes: usize, block_size: usize) -> usize {
        let per_revoke = RevokeWriter::new(self.format, self.csum).per_block(block_size);
        blocks + blocks.div_ceil(self.tags_per_group(block_size)) + revokes.div_ceil(per_revoke) + 1
    }
}

/// A run of log blocks being filled.
struct Chunk {
    pblk: u64,
    buf: Buf,
    used: usize,
}

/// A log block in a chunk that was not sent off yet.
#[derive(Clone, Copy)]
struct Slot {
    /// Counted from the first chunk ever.
    chunk: usize,
    offset: usize,
}

/// Fills log blocks in order and writes them in long bios.
struct LogWriter<'a> {
    jbd2: &'a Jbd2,
    disk: &'a Disk,
    batch: Arc<Batch>,
    at: u32,
    /// Blocks still to come, for the size of the next chunk.
    left: usize,
    chunks: VecDeque<Chunk>,
    /// Chunks sent off.
    sent: usize,
}

impl<'a> LogWriter<'a> {
    fn new(jbd2: &'a Jbd2, at: u32) -> Self {
        Self {
            jbd2,
            disk: &jbd2.disk,
            batch: Batch::new(),
            at,
            left: 0,
            chunks: VecDeque::new(),
            sent: 0,
        }
    }

    fn expect(&mut self, blocks: usize) {
        self.left = blocks;
    }

    /// The next log block; its content is undefined.
    fn next(&mut self) -> BlkResult<Slot> {
        let size = self.disk.block_size;
        if self
            .chunks
            .back()
            .is_none_or(|chunk| chunk.used == chunk.buf.len())
        {
            let (pblk, run) = self.jbd2.locate(self.at)?;
            let run = run.min(self.jbd2.geometry.end - self.at) as usize;
            let blocks = run.min(self.disk.max_blocks()).min(self.left.max(1));
            let buf = self.alloc(blocks * size)?;
            self.chunks.push_back(Chunk { pblk, buf, used: 0 });
        }
        let Some(chunk) = self.chunks.back_mut() else {
            return Err(BlkError::NoMemory);
        };
        let offset = chunk.used;
        chunk.used += size;
        self.at = self.jbd2.geometry.advance(self.at, 1);
        self.left = self.left.saturating_sub(1);
        Ok(Slot {
            chunk: self.sent + self.chunks.len() - 1,
            offset,
        })
    }

    /// Memory comes back when what is under way ends.
    fn alloc(&self, len: usize) -> BlkResult<Buf> {
        match PagePool::shared().alloc(len) {
            Err(BlkError::NoMemory) => {
                self.batch.wait()?;
                PagePool::shared().alloc(len)
            }
            res => res,
        }
    }

    fn slot(&mut self, slot: Slot) -> &mut [u8] {
        let size = self.disk.block_size;
        &mut self.chunks[slot.chunk - self.sent].buf[slot.offset..][..size]
    }

    fn put_revokes(&mut self, tid: Tid, revokes: &[u64]) -> BlkResult {
        let writer = RevokeWriter::new(self.jbd2.format, self.jbd2.csum);
        for group in revokes.chunks(writer.per_block(self.disk.block_size)) {
            let slot = self.next()?;
            let block = self.slot(slot);
            block.fill(0);
            writer.put(block, tid, group);
            self.send_full()?;
        }
        Ok(())
    }

    fn put_heads(&mut self, tid: Tid, heads: &[Arc<Head>]) -> BlkResult {
        let (format, csum, uuid) = (self.jbd2.format, self.jbd2.csum, self.jbd2.uuid);
        for group in heads.chunks(self.jbd2.tags_per_group(self.disk.block_size)) {
            let descriptor = self.next()?;
            let block = self.slot(descriptor);
            block.fill(0);
            let mut tags = DescriptorWriter::new(block, tid, format, csum);
            for head in group {
                let slot = self.next()?;
                let data = self.slot(slot);
                if !head.copy_for(tid, data) {
                    // Decided when the transaction had no handle left; nothing can change it.
                    log::error!("journal: block {} has lost its copy", head.block);
                    return Err(BlkError::Io);
                }
                let mut flags = TagFlags::empty();
                if data.starts_with(&MAGIC_BYTES) {
                    data[..MAGIC_BYTES.len()].fill(0);
                    flags = TagFlags::ESCAPE;
                }
                let checksum = csum.tag_sum(tid, data);
                let tag = Tag {
                    block: head.block,
                    flags,
                    checksum,
                };
                tags.push(self.slot(descriptor), tag, &uuid);
            }
            tags.finish(self.slot(descriptor));
            self.send_full()?;
        }
        Ok(())
    }

    /// Sends off the chunks that are full; called when no descriptor is open.
    fn send_full(&mut self) -> BlkResult {
        while self
            .chunks
            .front()
            .is_some_and(|chunk| chunk.used == chunk.buf.len())
        {
            self.send_first()?;
        }
        Ok(())
    }

    fn send_first(&mut self) -> BlkResult {
        if let Some(mut chunk) = self.chunks.pop_front() {
            self.sent += 1;
            chunk.buf.set_len(chunk.used)?;
            let buf = std::iter::once(chunk.buf);
            self.disk
                .write(&self.batch, chunk.pblk, BioFlags::empty(), buf)?;
        }
        Ok(())
    }

    /// Clears the place of the commit record, so that a torn write of it leaves either zeros or
    /// the record: e2fsck takes a record with something else behind it for damage. Gives the place.
    fn put_zeros(&mut self) -> BlkResult<u32> {
        let at = self.at;
        let slot = self.next()?;
        self.slot(slot).fill(0);
        Ok(at)
    }

    /// Sends the rest and waits for all.
    fn finish(mut self) -> BlkResult {
        let mut res = Ok(());
        while res.is_ok() && !self.chunks.is_empty() {
            res = self.send_first();
        }
        let done = self.batch.wait();
        res.and(done)
    }
}
