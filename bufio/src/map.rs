//! Which buffer holds a block.
//!
//! A hash table of a fixed size, with at least a bucket for each block that the cache aims at, where
//! each bucket has a lock and a cache line of its own. A hit writes that line and its buffer's and no other, so that
//! threads that hit different blocks do not slow each other: with a lock for each shard, as
//! concurrent maps have it, a line belongs to whoever came last, and of 64 shards and two threads
//! every second hit finds it at the other processor.

use std::sync::Arc;

use blockstack::sync::prim::RwLock;
use smallvec::SmallVec;

use crate::buffer::Inner;

/// Entries for which a bucket needs no memory beside its line.
const INLINE: usize = 3;
const MIN_BITS: u32 = if cfg!(shuttle) { 1 } else { 6 };
/// Four MiB of buckets; a larger cache gets longer chains.
const MAX_BITS: u32 = 16;

type Chain = SmallVec<[(u64, Arc<Inner>); INLINE]>;

#[repr(align(64))]
struct Bucket(RwLock<Chain>);

pub(crate) struct Map {
    buckets: Box<[Bucket]>,
    shift: u32,
}

impl Map {
    /// A map for about `wanted` blocks.
    pub(crate) fn new(wanted: usize) -> Self {
        let bits = wanted.next_power_of_two().trailing_zeros();
        let bits = bits.clamp(MIN_BITS, MAX_BITS);
        Self {
            buckets: (0..1usize << bits)
                .map(|_| Bucket(RwLock::new(Chain::new())))
                .collect(),
            shift: u64::BITS - bits,
        }
    }

    /// Neighbours go to buckets far apart, and nobody outside chooses block numbers freely enough
    /// to make them meet.
    fn bucket(&self, block: u64) -> &RwLock<Chain> {
        let hash = block.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        &self.buckets[(hash >> self.shift) as usize].0
    }

    pub(crate) fn get(&self, block: u64) -> Option<Arc<Inner>> {
        let chain = self.bucket(block).read();
        let found = chain.iter().find(|(at, _)| *at == block);
        found.map(|(_, inner)| inner.clone())
    }

    /// Enters `inner`; gives the one that is there already back as the error.
    pub(crate) fn insert(&self, inner: &Arc<Inner>) -> Result<(), Arc<Inner>> {
        let mut chain = self.bucket(inner.block).write();
        match chain.iter().find(|(at, _)| *at == inner.block) {
            Some((_, there)) => Err(there.clone()),
            None => {
                chain.push((inner.block, inner.clone()));
                Ok(())
            }
        }
    }

    /// Takes the buffer of `block` out if `fits` says so, which is asked with the lock held: nobody
    /// can come to hold the buffer meanwhile.
    pub(crate) fn remove_if(
        &self,
        block: u64,
        fits: impl FnOnce(&mut Arc<Inner>) -> bool,
    ) -> Option<Arc<Inner>> {
        let mut chain = self.bucket(block).write();
        let at = chain.iter().position(|(at, _)| *at == block)?;
        fits(&mut chain[at].1).then(|| chain.swap_remove(at).1)
    }

    /// The blocks that are there.
    pub(crate) fn blocks(&self) -> Vec<u64> {
        let mut blocks = Vec::new();
        for bucket in &self.buckets {
            blocks.extend(bucket.0.read().iter().map(|(block, _)| *block));
        }
        blocks
    }

    pub(crate) fn clear(&self) {
        for bucket in &self.buckets {
            // Dropped without the lock: what a buffer drops with it is not ours to know.
            let chain = std::mem::take(&mut *bucket.0.write());
            drop(chain);
        }
    }
}
