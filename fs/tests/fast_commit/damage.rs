//! Damaged fast-commit areas: nothing is replayed that was not committed, and nothing panics.

use std::path::Path;

use blockstack::backend::mem::Image;
use fs::MountOptions;
use fs::format::csum::crc32c;
use fs::format::jbd2::JournalSuperblock;
use fs::journal::JournalExtent;

use crate::kernel::{check, journal_extents};
use crate::list::list;
use crate::replay::{Made, mounted, pending};
use crate::work::Random;

const PAD: u16 = 7;
const TAIL: u16 = 8;
const HEAD: u16 = 9;

/// The fast-commit area of an image.
struct Area {
    extents: Vec<JournalExtent>,
    block_size: usize,
    /// Its blocks in the journal.
    blocks: std::ops::Range<u32>,
}

impl Area {
    fn of(path: &Path, image: &Image) -> Self {
        let mut word = [0; 4];
        image.read_at(1024 + 24, &mut word);
        let block_size = 1024 << u32::from_le_bytes(word);
        let extents = journal_extents(path);
        let mut sb = vec![0; block_size];
        image.read_at(extents[0].pblk as usize * block_size, &mut sb);
        let sb = JournalSuperblock::parse(&sb, block_size as u32, u64::MAX).unwrap();
        Self {
            extents,
            block_size,
            blocks: sb.geometry().end + 1..sb.maxlen(),
        }
    }

    fn place(&self, block: u32) -> usize {
        let run = |run: &&JournalExtent| (run.lblk..run.lblk + run.len).contains(&block);
        let run = self.extents.iter().find(run).unwrap();
        (run.pblk as usize + (block - run.lblk) as usize) * self.block_size
    }

    fn read(&self, image: &Image) -> Vec<Vec<u8>> {
        let block = |block| {
            let mut bytes = vec![0; self.block_size];
            image.read_at(self.place(block), &mut bytes);
            bytes
        };
        self.blocks.clone().map(block).collect()
    }

    fn write(&self, image: &mut Image, blocks: &[Vec<u8>]) {
        for (at, bytes) in self.blocks.clone().zip(blocks) {
            image.write_at(self.place(at), bytes);
        }
    }
}

/// The tags of the area, those that fill it aside, as (tag, value).
fn tags(blocks: &[Vec<u8>]) -> Vec<(u16, Vec<u8>)> {
    let mut tags = Vec::new();
    for block in blocks {
        let mut rest = &block[..];
        while let [a, b, c, d, value @ ..] = rest {
            let (tag, len) = (u16::from_le_bytes([*a, *b]), u16::from_le_bytes([*c, *d]));
            let (true, Some(bytes)) = ((1..=HEAD).contains(&tag), value.get(..len.into())) else {
                return tags;
            };
            if tag != PAD {
                tags.push((tag, bytes.to_vec()));
            }
            rest = &value[len.into()..];
        }
    }
    tags
}

/// Writes tags as the kernel does, with checksums that are right.
fn encode(tags: &[(u16, Vec<u8>)], block_size: usize, count: usize) -> Vec<Vec<u8>> {
    let mut blocks = vec![Vec::new()];
    let mut crc = 0;
    let whole = |tag: u16, value: &[u8]| {
        let len = value.len() as u16;
        [&tag.to_le_bytes(), &len.to_le_bytes(), value].concat()
    };
    for (tag, value) in tags {
        let len = if *tag == TAIL { 8 } else { value.len() };
        let used = blocks.last().map_or(0, Vec::len);
        let room = block_size - used;
        if 4 + len + 4 > room {
            let pad = whole(PAD, &vec![0; room - 4]);
            crc = crc32c(crc, &pad);
            blocks.last_mut().unwrap().extend(pad);
            blocks.push(Vec::new());
        }
        let block = blocks.last_mut().unwrap();
        if *tag == TAIL {
            let fill = (block_size - block.len() - 4) as u16;
            let start = [&TAIL.to_le_bytes(), &fill.to_le_bytes(), &value[..4]].concat();
            crc = crc32c(crc, &start);
            block.extend(start);
            block.extend(crc.to_le_bytes());
            block.resize(block_size, 0);
            blocks.push(Vec::new());
            crc = 0;
        } else {
            let bytes = whole(*tag, value);
            crc = crc32c(crc, &bytes);
            block.extend(bytes);
        }
    }
    blocks.resize(count, Vec::new());
    blocks
        .iter_mut()
        .for_each(|block| block.resize(block_size, 0));
    blocks
}

fn count(short: u64, long: u64) -> u64 {
    let is_long = std::env::var_os("FUSEFS_STACK_LONG").is_some_and(|value| value == "1");
    if is_long { long } else { short }
}

#[test]
fn what_is_not_whole_does_not_count() {
    let Some(made) = Made::storm(6) else { return };
    let image = made.load();
    let area = Area::of(&made.image, &image);
    let blocks = area.read(&image);
    let commits = pending(&area.extents, &image);
    let used = blocks
        .iter()
        .rposition(|block| block.iter().any(|&byte| byte != 0))
        .unwrap()
        + 1;
    let mut random = Random(6);
    let path = made.scratch.path("damaged");
    let (mut refused, mut shorter) = (0, 0);
    for number in 0..count(120, 5000) {
        let mut bad = blocks.clone();
        let at = random.below(used as u64) as usize;
        if number % 6 == 0 {
            bad[at..].iter_mut().for_each(|block| block.fill(0));
        } else {
            let most = if number % 2 == 0 {
                100
            } else {
                area.block_size
            };
            let byte = random.below(most as u64) as usize;
            bad[at][byte] ^= 1 << random.below(8);
        }
        let mut damaged = image.clone();
        area.write(&mut damaged, &bad);
        let mounted = mounted(&damaged, &MountOptions::default(), |fs| list(fs).unwrap());
        let after = match mounted {
            Ok((_, after)) => after,
            // Features that nobody knows.
            Err(error) => {
                assert!(error.contains("fast_commit"), "{error}");
                refused += 1;
                continue;
            }
        };
        let found = pending(&area.extents, &damaged);
        assert!(commits.starts_with(&found));
        shorter += u64::from(found.len() < commits.len());
        if number % 10 == 0 {
            after.save(&path).unwrap();
            check(&path).unwrap();
        }
    }
    println!(
        "{shorter} with fewer than {} commits, {refused} refused",
        commits.len()
    );
    assert!(shorter > 10);
}

/// Changes tags at random, but makes the checksums right.
fn forge(tags: &mut Vec<(u16, Vec<u8>)>, random: &mut Random) {
    for _ in 0..=random.below(3) {
        let at = 1 + random.below(tags.len() as u64 - 1) as usize;
        if tags[at].0 == TAIL {
            continue;
        }
        let len = tags[at].1.len() as u64;
        match random.below(8) {
            0 => drop(tags.remove(at)),
            1 => tags.insert(at, tags[at].clone()),
            2 => {
                let other = 1 + random.below(tags.len() as u64 - 1) as usize;
                if tags[other].0 != TAIL {
                    tags.swap(at, other);
                }
            }
            3 => tags[at].0 = 1 + random.below(6) as u16,
            4 | 5 if len >= 8 => {
                // A number that is likely to be one of something.
                let word = random.below(4.min(len / 4)) as usize * 4;
                let value = random.below(400) as u32;
                tags[at].1[word..word + 4].copy_from_slice(&value.to_le_bytes());
            }
            _ if len > 0 => {
                let byte = random.below(len.min(180)) as usize;
                tags[at].1[byte] ^= 1 << random.below(8);
            }
            _ => {}
        }
        if tags.len() < 3 {
            return;
        }
    }
}

#[test]
fn forged_commits_are_survived() {
    let Some(made) = Made::storm(11) else { return };
    let image = made.load();
    let area = Area::of(&made.image, &image);
    let blocks = area.read(&image);
    let whole = tags(&blocks);
    // What was read comes back.
    let same = encode(&whole, area.block_size, blocks.len());
    let mut copy = image.clone();
    area.write(&mut copy, &same);
    assert_eq!(
        pending(&area.extents, &copy),
        pending(&area.extents, &image)
    );
    let (mut refused, mut taken) = (0, 0);
    let first = std::env::var("FORGE_SEED")
        .ok()
        .and_then(|text| text.parse().ok());
    let seeds = first.map_or(0..count(150, 20_000), |first: u64| first..first + 1);
    for seed in seeds {
        let mut random = Random(seed);
        let mut forged = whole.clone();
        forge(&mut forged, &mut random);
        let mut bad = image.clone();
        area.write(&mut bad, &encode(&forged, area.block_size, blocks.len()));
        // A panic tells the seed.
        let about = format!("seed {seed}");
        let mounted = |image: &Image| mounted(image, &MountOptions::default(), |fs| drop(list(fs)));
        match mounted(&bad) {
            Ok(_) => taken += 1,
            Err(error) => {
                refused += 1;
                // Nothing was written of it: the next mount says the same.
                let again = mounted(&bad).err();
                assert_eq!(again.as_ref(), Some(&error), "{about}");
            }
        }
    }
    println!("{taken} taken, {refused} refused");
    assert!(first.is_some() || (taken > 20 && refused > 20));
}
