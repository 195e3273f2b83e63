//! The bios of a file: its own, and what it takes from the pools of its mount.

use super::{DioDone, File, Mount};
use crate::bio::{Bio, Op};
use crate::bio_set::{BioSet, Wait};
use crate::submit::in_submission;
use crate::sync::prim::OnceLock;
use crate::sync::prim::atomic::{AtomicUsize, Ordering};
use crate::sync::{Condvar, Mutex, Rank, assert_may_wait};
use crate::units::SectorCount;

/// Bios that only one file uses.
pub(super) struct Own {
    bio: Mutex<Option<Bio>>,
    /// A set of one; made when a request of several pieces comes first.
    piece: OnceLock<BioSet<()>>,
    /// Requests of the file that wait for a bio.
    waiting: AtomicUsize,
}

/// Requests of a mount that wait for a bio: any of the pool, or the one of their file.
pub(super) struct Back {
    waiting: AtomicUsize,
    lock: Mutex<()>,
    given: Condvar,
}

impl Default for Back {
    fn default() -> Self {
        Self {
            waiting: AtomicUsize::new(0),
            lock: Mutex::new(Rank::Pool, ()),
            given: Condvar::new(),
        }
    }
}

#[cfg(test)]
impl Back {
    /// Requests that wait for a bio.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }
}

impl Own {
    pub(super) fn new<D: DioDone>(mount: &Mount<D>) -> Self {
        let bio = keeps_bio(mount).then(|| mount.requests.alloc_own());
        Self {
            bio: Mutex::new(Rank::Pool, bio),
            piece: OnceLock::new(),
            waiting: AtomicUsize::new(0),
        }
    }
}

#[cfg(any(test, feature = "test-utils"))]
fn keeps_bio<D: DioDone>(mount: &Mount<D>) -> bool {
    mount.config.own != super::OwnBios::Off
}

#[cfg(any(test, feature = "test-utils"))]
fn keeps_piece<D: DioDone>(mount: &Mount<D>) -> bool {
    mount.config.own == super::OwnBios::Kept
}

#[cfg(not(any(test, feature = "test-utils")))]
const fn keeps_bio<D: DioDone>(_: &Mount<D>) -> bool {
    true
}

#[cfg(not(any(test, feature = "test-utils")))]
const fn keeps_piece<D: DioDone>(_: &Mount<D>) -> bool {
    true
}

impl<D: DioDone> File<D> {
    /// A bio for a request.
    pub(super) fn take_bio(&self, op: Op) -> Bio {
        self.try_bio(op).unwrap_or_else(|| self.wait_for_bio(op))
    }

    fn try_bio(&self, op: Op) -> Option<Bio> {
        if let Some(mut bio) = self.own.bio.lock_nested().take() {
            bio.reset(op);
            return Some(bio);
        }
        self.mount.requests.alloc(op, Wait::No)
    }

    #[cold]
    fn wait_for_bio(&self, op: Op) -> Bio {
        // The thread itself may keep bios of the pool back, and the set knows how to send them on.
        if in_submission()
            && let Some(bio) = self.mount.requests.alloc(op, Wait::Yes)
        {
            return bio;
        }
        assert_may_wait();
        let back = &self.mount.back;
        let mut lock = back.lock.lock_nested();
        // Counted before the next look: who gives a bio back after that look sees it.
        self.own.waiting.fetch_add(1, Ordering::SeqCst);
        back.waiting.fetch_add(1, Ordering::SeqCst);
        let bio = loop {
            match self.try_bio(op) {
                Some(bio) => break bio,
                None => back.given.wait(&mut lock),
            }
        };
        self.own.waiting.fetch_sub(1, Ordering::SeqCst);
        let others = back.waiting.fetch_sub(1, Ordering::SeqCst) > 1;
        drop(lock);
        // It may have been woken for one of the pool and have taken its own.
        if others {
            back.given.notify_one();
        }
        bio
    }

    /// The bio of a request comes back.
    pub(super) fn put_bio(&self, mut bio: Bio) {
        let back = &self.mount.back;
        if bio.is_own() {
            bio.reset(Op::Read);
            *self.own.bio.lock_nested() = Some(bio);
            if self.own.waiting.load(Ordering::SeqCst) > 0 {
                drop(back.lock.lock_nested());
                back.given.notify_all();
            }
            return;
        }
        drop(bio);
        if back.waiting.load(Ordering::SeqCst) > 0 {
            drop(back.lock.lock_nested());
            back.given.notify_one();
        }
    }

    /// Cuts the first `front` sectors off a request.
    pub(super) fn split(&self, bio: &mut Bio, front: SectorCount) -> Option<Bio> {
        let pool = &self.mount.pieces;
        if !keeps_piece(&self.mount) {
            return bio.split(front, pool, Wait::Yes);
        }
        let own = self.own.piece.get_or_init(|| BioSet::new("dio piece", 1));
        bio.split(front, own, Wait::No)
            .or_else(|| bio.split(front, pool, Wait::No))
            .or_else(|| bio.split(front, own, Wait::Yes))
    }
}
