//! Mounts a crash state, replays it, walks over everything, and judges.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockstack::DynDevice;
use blockstack::backend::mem::{Image, MemDisk};
use fs::{Fs, check};

use super::Error;
use super::disk::Scratch;
use super::exec::mount_options;
use super::walk::{Found, walk};

/// Judges states; shared by threads.
pub struct Judge {
    scratch: Scratch,
    /// One state in so many is also judged by e2fsck; 0: none.
    e2fsck_every: u64,
    states: AtomicU64,
    fscked: AtomicU64,
}

impl Judge {
    /// Makes one.
    ///
    /// # Errors
    /// Where there is no place for images.
    pub fn new(e2fsck_every: u64) -> Result<Self, Error> {
        Ok(Self {
            scratch: Scratch::new()?,
            e2fsck_every,
            states: AtomicU64::new(0),
            fscked: AtomicU64::new(0),
        })
    }

    /// States seen so far, and how many of them e2fsck saw.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (count(&self.states), count(&self.fscked))
    }

    /// Mounts, replays, walks, unmounts; counts the state where it is new.
    ///
    /// # Errors
    /// What is wrong with the file system, in words.
    pub fn examine(&self, image: Image, with_sizes: bool, is_new: bool) -> Result<Found, String> {
        let number = self.states.fetch_add(is_new.into(), Ordering::Relaxed);
        let fsck = is_new && self.e2fsck_every > 0 && number % self.e2fsck_every == 0;
        self.look(image, with_sizes, fsck)
    }

    /// As [`Self::examine`], always with e2fsck where that is used at all; not counted.
    ///
    /// # Errors
    /// As [`Self::examine`].
    pub fn examine_again(&self, image: Image, with_sizes: bool) -> Result<Found, String> {
        self.look(image, with_sizes, self.e2fsck_every > 0)
    }

    fn look(&self, image: Image, with_sizes: bool, fsck: bool) -> Result<Found, String> {
        let disk = MemDisk::from_image("after", image);
        let dev: DynDevice = disk.clone();
        let looked = catch_unwind(AssertUnwindSafe(|| mount_and_walk(dev, with_sizes)));
        let found = match looked {
            Ok(found) => found?,
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
                return Err(format!("panic: {}", text.unwrap_or("?")));
            }
        };
        let after = disk.image();
        own_check(&after)?;
        if fsck {
            self.fscked.fetch_add(1, Ordering::Relaxed);
            let name = format!("{:?}", std::thread::current().id());
            let words = self.scratch.e2fsck(&after, &name);
            words.map_err(|error| format!("after mount and unmount: {error}"))?;
        }
        Ok(found)
    }
}

fn mount_and_walk(dev: DynDevice, with_sizes: bool) -> Result<Found, String> {
    let fs: Arc<Fs> = Fs::mount(dev, mount_options()).map_err(|error| format!("mount: {error}"))?;
    let found = walk(&fs, with_sizes);
    let unmounted = fs.unmount();
    let found = found.map_err(|error| format!("walk: {error}"))?;
    unmounted.map_err(|error| format!("unmount: {error}"))?;
    Ok(found)
}

thread_local! {
    /// Memory of the check, used again for the next state.
    static CHECK: RefCell<check::Scratch> = RefCell::default();
}

/// The file system's own check of an image that was unmounted.
fn own_check(image: &Image) -> Result<(), String> {
    let report = CHECK.with_borrow_mut(|scratch| check::check(image, scratch));
    match report.faults().next() {
        None => Ok(()),
        Some(fault) => Err(format!("after mount and unmount: {fault}")),
    }
}
