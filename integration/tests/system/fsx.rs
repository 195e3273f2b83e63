//! As xfstests' `fsx`, by many threads at once: reads and writes, buffered, mapped and direct, all
//! modes of `fallocate`, truncation, `copy_file_range` and `fsync`, each held against a model in
//! memory. Some threads have a file each, others each a region of one file, so that the same inode
//! is changed in several ways at the same time.
//!
//! `FSX_SECONDS` says how long each of the tests runs.

mod file;
mod ops;

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::common::{Image, count, no_kernel, run, seed, skip};
use crate::need_fuse;
use file::{Ended, Place, Worker};

/// Threads with a file of their own, and threads that share one.
const ALONE: usize = 3;
const TOGETHER: usize = 3;
/// Bytes of the shared file that a thread has.
const REGION: usize = 192 * 1024;

fn seconds() -> Duration {
    let text = std::env::var("FSX_SECONDS").ok();
    let given = text.map(|text| text.parse().expect("FSX_SECONDS is a number"));
    Duration::from_secs(given.unwrap_or_else(|| count(35, 600)))
}

fn places(dir: &Path) -> Vec<Place> {
    let alone = (0..ALONE).map(|at| Place::whole(&dir.join(format!("alone{at}"))));
    let shared = dir.join("shared");
    let together = (0..TOGETHER).map(|at| Place::region(&shared, at * REGION, REGION));
    alone.chain(together).collect()
}

/// Runs all threads on `dir` and gives what the files must hold.
fn storm(dir: &Path, seed: u64, time: Duration) -> Vec<Ended> {
    let whole = (TOGETHER * REGION) as u64;
    let shared = std::fs::File::create(dir.join("shared")).unwrap();
    shared.set_len(whole).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stop = &stop;
        let threads: Vec<_> = places(dir)
            .into_iter()
            .zip(seed..)
            .map(|(place, seed)| {
                scope.spawn(move || {
                    let mut worker = Worker::new(place, seed);
                    let end = Instant::now() + time;
                    while Instant::now() < end && !stop.load(Ordering::Relaxed) {
                        worker.step();
                    }
                    worker.check_all("at the end");
                    worker.end()
                })
            })
            .collect();
        let workers: Vec<_> = threads
            .into_iter()
            .map(|thread| {
                let ended = thread.join();
                stop.store(
                    ended.is_err() || stop.load(Ordering::Relaxed),
                    Ordering::Relaxed,
                );
                ended
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

fn fsx(test: &str, mke2fs: &str, options: &str) {
    need_fuse!(test);
    let image = Image::new(mke2fs, "96M");
    let mount = image.mount(options);
    let workers = storm(&mount.dir, seed(test), seconds());
    let steps: u64 = workers.iter().map(|worker| worker.steps).sum();
    mount.unmount();
    image.assert_clean();
    let mount = image.mount(options);
    workers.into_iter().for_each(Ended::check);
    mount.unmount();
    image.assert_clean();
    println!("{test}: {steps} operations");
}

#[test]
fn ext4() {
    fsx("fsx::ext4", "-t ext4 -b 4096", "");
}

#[test]
fn ext4_with_small_blocks() {
    let name = "fsx::ext4_with_small_blocks";
    fsx(name, "-t ext4 -b 1024", "");
}

#[test]
fn ext4_with_data_in_the_journal() {
    let name = "fsx::ext4_with_data_in_the_journal";
    fsx(name, "-t ext4 -b 4096", "data=journal");
}

#[test]
fn ext3_whose_files_have_block_maps() {
    let name = "fsx::ext3_whose_files_have_block_maps";
    fsx(name, "-t ext3 -b 1024", "");
}

/// What is a mistake of the model, the kernel's ext4 would show.
#[test]
fn the_model_is_right_about_the_kernels_ext4() {
    let name = "fsx::the_model_is_right_about_the_kernels_ext4";
    if let Some(why) = no_kernel() {
        skip(name, why);
        return;
    }
    let image = Image::new("-t ext4 -b 4096", "96M");
    let dir = image.subdir("kernel");
    run(Command::new("mount")
        .args(["-o", "loop"])
        .arg(&image.path)
        .arg(&dir));
    let unmount = Unmount(&dir);
    storm(&dir, seed(name), seconds() / 8);
    drop(unmount);
}

struct Unmount<'a>(&'a Path);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        let umount = Command::new("umount").arg(self.0).status();
        if !umount.is_ok_and(|status| status.success()) {
            eprintln!("{} stays mounted", self.0.display());
        }
    }
}
