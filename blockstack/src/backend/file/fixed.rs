//! Memory that a ring knows: the system looks its pages up once, not at every call.
//!
//! An arena of the shared page pool is registered when a call names a part of it first. Only of that
//! pool, which lives as long as the process: a table names pages, not addresses. Where another pool
//! went and its address came back, a call would move the pages that were there before:
//!
//! ```text
//! pool A maps 2 MiB at X, registered as 0        table 0: A's pages
//! pool A is dropped; pool B maps 2 MiB at X      table 0: A's pages, which nobody else has now
//! write from X by table 0                        the file gets what A held
//! ```
//!
//! Registered pages count as locked memory, of which an ordinary user has little.

use io_uring::IoUring;
use rustix::process::{Resource, geteuid, getrlimit};

use crate::buf::{ARENA, PagePool};

/// Places in the table, a power of two. Many more than arenas, as the address tells the place.
const PLACES: usize = 256;
/// The most arenas of one ring: 128 MiB.
const MAX_ARENAS: usize = 64;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Place {
    Free,
    /// The arena at this address.
    Known(usize),
    /// What is at this address must not be, or could not be, registered.
    Unknown(usize),
}

/// The table of a ring.
#[derive(Debug)]
pub(super) struct Fixed {
    places: Vec<Place>,
    /// Arenas that may yet be registered.
    left: usize,
}

impl Fixed {
    /// Prepares the ring's table; an empty one where the system has none.
    pub(super) fn new(ring: &IoUring) -> Self {
        let left = match ring.submitter().register_buffers_sparse(PLACES as u32) {
            Ok(()) => may_lock(),
            Err(error) => {
                log::debug!("no table of memory: {error}");
                0
            }
        };
        Self {
            places: vec![Place::Free; PLACES],
            left,
        }
    }

    /// Where in the table the memory is that begins at `addr`, which a bio in flight holds.
    pub(super) fn index(&mut self, ring: &IoUring, addr: usize) -> Option<u16> {
        let base = addr & !(ARENA - 1);
        let index = place_of(base);
        match self.places[index] {
            Place::Known(known) if known == base => Some(index as u16),
            Place::Free if self.left > 0 => self.learn(ring, base, index),
            Place::Known(_) | Place::Unknown(_) | Place::Free => None,
        }
    }

    #[cold]
    fn learn(&mut self, ring: &IoUring, base: usize, index: usize) -> Option<u16> {
        self.places[index] = Place::Unknown(base);
        if !PagePool::shared().has_arena(base) {
            return None;
        }
        if let Err(error) = register(ring, base, index) {
            log::debug!("no more memory is registered: {error}");
            self.left = 0;
            return None;
        }
        self.left -= 1;
        self.places[index] = Place::Known(base);
        Some(index as u16)
    }

    /// Arenas that were registered.
    #[cfg(test)]
    pub(super) fn known(&self) -> usize {
        let known = |place: &&Place| matches!(place, Place::Known(_));
        self.places.iter().filter(known).count()
    }
}

fn place_of(base: usize) -> usize {
    // Arenas lie next to each other, or next to other maps: any bit may be the one that differs.
    let number = (base / ARENA) as u64;
    (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - PLACES.ilog2())) as usize
}

/// A quarter of what the process may lock, so that something is left for others of the same user.
fn may_lock() -> usize {
    match getrlimit(Resource::Memlock).current {
        Some(limit) if !geteuid().is_root() => {
            let arenas = limit / 4 / ARENA as u64;
            usize::try_from(arenas).map_or(MAX_ARENAS, |arenas| arenas.min(MAX_ARENAS))
        }
        _ => MAX_ARENAS,
    }
}

#[expect(unsafe_code, reason = "the system learns of memory that bios hold")]
fn register(ring: &IoUring, base: usize, index: usize) -> std::io::Result<()> {
    let part = libc::iovec {
        iov_base: std::ptr::with_exposed_provenance_mut(base),
        iov_len: ARENA,
    };
    // SAFETY: `ARENA` bytes from `base` on are one map of the shared pool, asked just now, and that
    // pool is never dropped, so they stay mapped. The call only notes the pages; they are touched by
    // calls that name a part of them, which a bio holds for the time.
    unsafe {
        ring.submitter()
            .register_buffers_update(index as u32, &[part], None)
    }
}
