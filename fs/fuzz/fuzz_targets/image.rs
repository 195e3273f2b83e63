#![no_main]
//! An image with changes here and there, mounted, walked, read, written and unmounted in process.
//!
//! The first byte chooses the image, the second whether checksums are made right again, two more are
//! the seed of what is done. Then five bytes a change: kind of block, which of these, where, what.

#[path = "../../tests/hostile/base.rs"]
mod base;
#[path = "../../tests/hostile/exercise.rs"]
mod exercise;
#[path = "../../tests/storm/mod.rs"]
#[allow(dead_code, reason = "shared with tests, which use more of it")]
mod storm;

use std::sync::OnceLock;

use base::{Base, bases};

static BASES: OnceLock<Vec<Base>> = OnceLock::new();

/// Changes of one input.
const MOST: usize = 24;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let [which, sealed, seed @ ..] = bytes else {
        return;
    };
    let (Some(seed), Some(changes)) = (seed.get(..2), seed.get(2..)) else {
        return;
    };
    let bases = BASES.get_or_init(bases);
    let base = &bases[usize::from(*which) % bases.len()];
    let mut image = base.image.clone();
    let mut touched = Vec::new();
    for change in changes.chunks_exact(5).take(MOST) {
        let kind = &base.kinds[usize::from(change[0]) % base.kinds.len()];
        let (block, _) = kind[usize::from(change[1]) % kind.len()];
        let size = base.geo.block_size as usize;
        let at = usize::from(u16::from_le_bytes([change[2], change[3]])) % size;
        image.write_at(((block as usize) << base.geo.block_bits) + at, &change[4..]);
        touched.push(block);
    }
    if sealed % 2 == 0 {
        base.seal(&mut image, &touched);
    }
    let seed = u16::from_le_bytes([seed[0], seed[1]]);
    exercise::exercise("fuzzed", image, seed.into());
});
