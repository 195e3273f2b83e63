//! Writes of a file that are under way.
//!
//! A write claims its blocks before it looks at the mapping and gives them back when the mapping
//! names what it wrote. Reads and writes of claimed blocks wait, without holding the inode's lock:
//! the end of a write takes it.

use blockstack::sync::{Condvar, Mutex, Rank};
use smallvec::SmallVec;

use crate::error::FsError;

#[derive(Default)]
struct Claims {
    /// Blocks `from..to` of the file.
    ranges: SmallVec<[(u32, u32); 4]>,
    /// Bytes up to which the file will reach when all claims are over.
    end: u64,
    /// The first error since `fsync` last asked.
    error: Option<FsError>,
    /// Where the last reservation ended: a file's block, and the block of the file system there.
    goal: (u32, u64),
}

/// See the module's documentation.
pub struct IoState {
    claims: Mutex<Claims>,
    freed: Condvar,
}

impl Default for IoState {
    fn default() -> Self {
        Self {
            claims: Mutex::new(Rank::Counters, Claims::default()),
            freed: Condvar::new(),
        }
    }
}

impl Claims {
    fn overlap(&self, from: u32, to: u32) -> bool {
        self.ranges
            .iter()
            .any(|&(start, end)| from < end && start < to)
    }
}

impl IoState {
    /// Waits until nobody has claimed any of `from..to`. The caller must hold no lock.
    pub fn wait_clear(&self, from: u32, to: u32) {
        let mut claims = self.claims.lock();
        while claims.overlap(from, to) {
            self.freed.wait(&mut claims);
        }
    }

    /// Whether any of `from..to` is claimed.
    pub fn is_claimed(&self, from: u32, to: u32) -> bool {
        self.claims.lock().overlap(from, to)
    }

    /// Claims `from..to` for a write that reaches to byte `end`, unless some of it is claimed.
    pub fn try_claim(&self, from: u32, to: u32, end: u64) -> bool {
        let mut claims = self.claims.lock();
        if claims.overlap(from, to) {
            return false;
        }
        claims.ranges.push((from, to));
        claims.end = claims.end.max(end);
        true
    }

    /// Gives a claim back.
    pub fn release(&self, from: u32, to: u32) {
        let mut claims = self.claims.lock();
        if let Some(index) = claims.ranges.iter().position(|&range| range == (from, to)) {
            claims.ranges.swap_remove(index);
        }
        if claims.ranges.is_empty() {
            claims.end = 0;
        }
        drop(claims);
        self.freed.notify_all();
    }

    /// Remembers an error for the next `fsync`.
    pub fn record(&self, error: FsError) {
        self.claims.lock().error.get_or_insert(error);
    }

    /// Takes the error since the last call.
    pub fn take_error(&self) -> Option<FsError> {
        self.claims.lock().error.take()
    }

    /// Bytes up to which claimed writes reach; 0 without any.
    pub fn end(&self) -> u64 {
        self.claims.lock().end
    }

    /// The block of the file system that would continue the last reservation, for block `lblk`.
    pub fn goal(&self, lblk: u32) -> Option<u64> {
        let goal = self.claims.lock().goal;
        (goal.0 == lblk && goal.1 != 0).then_some(goal.1)
    }

    /// Notes where a reservation ended.
    pub fn set_goal(&self, lblk: u32, pblk: u64) {
        self.claims.lock().goal = (lblk, pblk);
    }
}
