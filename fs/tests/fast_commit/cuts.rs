//! Power cuts while fast commits are replayed: the next mount finds all of them or does all again.

use blockstack::DynDevice;
use blockstack::backend::mem::Image;
use blockstack::testing::crash::{CrashDisk, Timing};
use fs::{Fs, MountOptions};

use crate::kernel::{check, difference, journal_extents, kernel_tree};
use crate::list::list;
use crate::replay::{Made, mounted, pending};

/// Whether a power cut tore the superblock, for which nothing of the format helps.
fn has_torn_superblock(image: &Image) -> bool {
    let mut sb = [0; 1024];
    image.read_at(1024, &mut sb);
    let le32 = |at: usize| u32::from_le_bytes([sb[at], sb[at + 1], sb[at + 2], sb[at + 3]]);
    le32(0x64) & 0x400 != 0 && le32(0x3fc) != !crc32c::crc32c(&sb[..0x3fc])
}

fn cut(seed: u64, timing: Timing, draws: u64) -> Option<usize> {
    let made = Made::storm(seed)?;
    let image = made.load();
    let journal = journal_extents(&made.image);
    let waiting = pending(&journal, &image);
    assert!(!waiting.is_empty(), "seed {seed}: no fast commits");
    let disk = CrashDisk::from_image("crash", image, timing);
    disk.arm_every(1);
    let dev: DynDevice = disk.clone();
    let fs = Fs::mount(dev, MountOptions::default()).unwrap();
    let want = list(&fs).unwrap();
    fs.unmount().unwrap();
    drop(fs);
    let points = disk.take_points();
    let cut = made.scratch.path("cut");
    let (mut again, mut number, mut by_kernel) = (0, 0, 0);
    for point in &points {
        for draw in 0..draws {
            let image = point.image(draw);
            if has_torn_superblock(&image) {
                continue;
            }
            let about = format!("seed {seed} {timing:?}, draw {draw} at {}", point.ops);
            let options = MountOptions::default();
            let (found, after) = mounted(&image, &options, |fs| list(fs).unwrap())
                .unwrap_or_else(|error| panic!("{about}: {error}"));
            assert_eq!(found, want, "{about}");
            number += 1;
            let is_waiting = pending(&journal, &image) == waiting;
            again += usize::from(is_waiting);
            // Once they are of the past the kernel has a log as any other.
            if !is_waiting && number % 25 == 1 {
                image.save(&cut).unwrap();
                let tree = kernel_tree(&made.scratch, &cut).unwrap();
                let difference = difference(&tree, &made.tree);
                assert_eq!(difference, None, "{about}, for the kernel");
                by_kernel += 1;
            }
            if number % 25 == 0 {
                after.save(&cut).unwrap();
                check(&cut).unwrap_or_else(|error| panic!("{about}: {error}"));
            }
        }
    }
    println!("seed {seed} {timing:?}: {number} power cuts, {again} of them had it all to do");
    assert!(again > 10 && again < number && by_kernel > 0);
    Some(number)
}

#[test]
fn a_power_cut_in_the_replay_loses_nothing() {
    let long = std::env::var_os("FUSEFS_STACK_LONG").is_some_and(|value| value == "1");
    let (seeds, draws) = if long { (0..60, 8) } else { (0..2, 2) };
    for seed in seeds {
        let timing = if seed % 2 == 0 {
            Timing::AtOnce
        } else {
            Timing::Shuffled { seed }
        };
        if cut(seed, timing, draws).is_none() {
            return;
        }
    }
}
