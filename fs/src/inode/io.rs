//! Writes of a file that are under way.
//!
//! A write claims its blocks before it looks at the mapping and gives them back when the mapping
//! names what it wrote. Reads and writes of claimed blocks wait, without holding the inode's lock:
//! the end of a write takes it.
//!
//! Claims have numbers, in the order they were made. Who waits for what is under way (`fsync`) waits
//! for those with a lower number than the next, and so not for ever where others go on to write.
//! Who needs a file without any (truncate) sets a *bar*, which takes a number too: whatever comes
//! behind it waits until it is lifted. Who came before does not, or a stream of truncations would
//! stop writes for ever.

use std::sync::atomic::{AtomicU64, Ordering};

use blockstack::sync::{Condvar, Mutex, Rank};
use smallvec::SmallVec;

use crate::error::FsError;

/// Blocks `from..to` of the file, claimed by a write.
struct Claim {
    from: u32,
    to: u32,
    number: u64,
    /// Byte up to which the write will reach.
    end: u64,
}

#[derive(Default)]
struct Claims {
    ranges: SmallVec<[Claim; 2]>,
    /// Numbers of the bars that are set.
    bars: SmallVec<[u64; 1]>,
    /// The next number.
    next: u64,
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
            .any(|claim| from < claim.to && claim.from < to)
    }

    fn take_number(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        number
    }
}

/// Keeps what comes later away; lifted by a drop.
pub struct Bar<'a> {
    io: &'a IoState,
    number: u64,
}

impl Drop for Bar<'_> {
    fn drop(&mut self) {
        let mut claims = self.io.claims.lock();
        claims.bars.retain(|&mut number| number != self.number);
        drop(claims);
        self.io.freed.notify_all();
    }
}

impl IoState {
    /// Sets a bar.
    pub fn bar(&self) -> Bar<'_> {
        let mut claims = self.claims.lock();
        let number = claims.take_number();
        claims.bars.push(number);
        Bar { io: self, number }
    }

    /// Waits until nobody has claimed any of `from..to`, and bars that are set now are lifted. The
    /// caller must hold no lock.
    pub fn wait_clear(&self, from: u32, to: u32) {
        let now = self.claims.lock().next;
        self.wait_clear_behind(now, from, to);
    }

    fn wait_clear_behind(&self, now: u64, from: u32, to: u32) {
        let mut claims = self.claims.lock();
        while claims.overlap(from, to) || claims.bars.iter().any(|&number| number < now) {
            self.freed.wait(&mut claims);
        }
    }

    /// Waits until the writes that are under way now are over. The caller must hold no lock.
    pub fn wait_begun(&self) {
        let now = self.claims.lock().next;
        self.wait_begun_before(now);
    }

    fn wait_begun_before(&self, now: u64) {
        let mut claims = self.claims.lock();
        while claims.ranges.iter().any(|claim| claim.number < now) {
            self.freed.wait(&mut claims);
        }
    }

    /// Waits until no write is under way. The caller has set a bar and holds no lock.
    pub fn wait_none(&self) {
        let mut claims = self.claims.lock();
        while !claims.ranges.is_empty() {
            self.freed.wait(&mut claims);
        }
    }

    /// Whether [`Self::wait_clear`] would wait.
    pub fn is_busy(&self, from: u32, to: u32) -> bool {
        let claims = self.claims.lock();
        !claims.bars.is_empty() || claims.overlap(from, to)
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
        let number = claims.take_number();
        claims.ranges.push(Claim {
            from,
            to,
            number,
            end,
        });
        true
    }

    /// The write that claimed `from..to` will reach only to byte `end`.
    pub fn shorten(&self, from: u32, to: u32, end: u64) {
        let mut claims = self.claims.lock();
        let mut ranges = claims.ranges.iter_mut();
        if let Some(claim) = ranges.find(|claim| (claim.from, claim.to) == (from, to)) {
            claim.end = end;
        }
    }

    /// Gives a claim back.
    pub fn release(&self, from: u32, to: u32) {
        let mut claims = self.claims.lock();
        let mut ranges = claims.ranges.iter();
        if let Some(index) = ranges.position(|claim| (claim.from, claim.to) == (from, to)) {
            claims.ranges.swap_remove(index);
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
        let claims = self.claims.lock();
        let ends = claims.ranges.iter().map(|claim| claim.end);
        ends.max().unwrap_or(0)
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

/// Whether data was written that a flush of the device has not made durable yet.
///
/// A flag would not do: who finds it cleared does not know whether the flush has ended that it was
/// cleared for.
#[derive(Default)]
pub struct Unflushed {
    written: AtomicU64,
    flushed: AtomicU64,
}

impl Unflushed {
    /// Data was written; gives how often that was so.
    pub fn mark(&self) -> u64 {
        self.written.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// How often data was written so far, where some of it still needs a flush.
    pub fn needed(&self) -> Option<u64> {
        let written = self.written.load(Ordering::Acquire);
        (self.flushed.load(Ordering::Acquire) < written).then_some(written)
    }

    /// A flush has ended that began after what was `written` had been.
    pub fn flushed(&self, written: u64) {
        self.flushed.fetch_max(written, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::{IoState, Unflushed};

    /// Runs `wait` in a thread; gives what hears of its end.
    fn waiter(
        io: &Arc<IoState>,
        wait: impl FnOnce(&IoState) + Send + 'static,
    ) -> std::sync::mpsc::Receiver<()> {
        let (to, ended) = channel();
        let io = io.clone();
        std::thread::spawn(move || {
            wait(&io);
            to.send(()).unwrap();
        });
        ended
    }

    const LONG: Duration = Duration::from_secs(60);
    /// Long enough for a thread that does not wait to get through, mostly.
    const SHORT: Duration = Duration::from_millis(50);

    /// Lost: `fsync` of a file that others go on to write never came to an end.
    #[test]
    fn what_begins_later_is_not_waited_for() {
        let io = Arc::new(IoState::default());
        assert!(io.try_claim(0, 1, 1));
        let now = io.claims.lock().next;
        let ended = waiter(&io, move |io| io.wait_begun_before(now));
        assert!(ended.recv_timeout(SHORT).is_err());
        assert!(io.try_claim(1, 2, 2));
        io.release(0, 1);
        ended.recv_timeout(LONG).unwrap();
        assert_eq!(io.end(), 2);
    }

    /// Lost: a truncation of a file that others go on to write never came to its turn.
    #[test]
    fn a_bar_keeps_away_what_comes_behind_it() {
        let io = Arc::new(IoState::default());
        let bar = io.bar();
        assert!(io.is_busy(0, 1) && !io.is_claimed(0, 1));
        let now = io.claims.lock().next;
        let ended = waiter(&io, move |io| io.wait_clear_behind(now, 0, 1));
        assert!(ended.recv_timeout(SHORT).is_err());
        // The second bar comes behind the waiter.
        let second = io.bar();
        drop(bar);
        ended.recv_timeout(LONG).unwrap();
        let ended = waiter(&io, |io| io.wait_clear(0, 1));
        assert!(ended.recv_timeout(SHORT).is_err());
        drop(second);
        ended.recv_timeout(LONG).unwrap();
        assert!(!io.is_busy(0, 1));
    }

    #[test]
    fn a_flush_that_has_not_ended_is_still_needed() {
        let unflushed = Unflushed::default();
        assert_eq!(unflushed.needed(), None);
        unflushed.mark();
        let first = unflushed.needed().unwrap();
        assert_eq!(unflushed.needed(), Some(first));
        unflushed.mark();
        unflushed.flushed(first);
        let second = unflushed.needed().unwrap();
        unflushed.flushed(second);
        unflushed.flushed(first);
        assert_eq!(unflushed.needed(), None);
    }
}
