//! Every parser on bytes that may be anything: noise, and blocks of a real image with changes. What
//! the fuzzers of `fs/fuzz` do for hours, for seconds.
#![expect(clippy::unwrap_used, reason = "a test ends with a panic")]

#[path = "../fuzz/src/parsers.rs"]
#[expect(
    clippy::let_underscore_must_use,
    clippy::cast_possible_truncation,
    reason = "an answer or an error, both are right"
)]
mod parsers;
mod storm;

use storm::Random;
use storm::image::Scratch;

/// Bytes of an image.
const LEN: usize = 8 << 20;

type Parser = fn(&[u8]);

const PARSERS: [(&str, Parser); 10] = [
    ("superblock", parsers::superblock),
    ("inode", parsers::inode),
    ("dirent", parsers::dirent),
    ("htree", parsers::htree),
    ("extent", parsers::extent),
    ("xattr", parsers::xattr),
    ("acl", parsers::acl),
    ("fast_commit", parsers::fast_commit),
    ("journal", parsers::journal),
    ("replay", parsers::replay),
];

fn all(bytes: &[u8]) {
    for (name, parser) in PARSERS {
        let res = std::panic::catch_unwind(|| parser(bytes));
        assert!(res.is_ok(), "{name} on {bytes:02x?}");
    }
}

fn change(bytes: &mut [u8], random: &mut Random) {
    for _ in 0..=random.below(6) {
        let at = random.below(bytes.len() as u64) as usize;
        bytes[at] = match random.below(4) {
            0 => 0,
            1 => 0xff,
            2 => bytes[at].wrapping_add(1),
            _ => random.next() as u8,
        };
    }
}

#[test]
fn noise_is_refused_or_read() {
    let mut random = Random(11);
    for _ in 0..1500 {
        let len = 1 + random.below(5000) as usize;
        let mut bytes: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
        all(&bytes);
        bytes.fill(0);
        change(&mut bytes, &mut random);
        all(&bytes);
    }
}

#[test]
fn real_blocks_with_changes_are_refused_or_read() {
    let scratch = Scratch::new();
    let tree = concat!(env!("CARGO_MANIFEST_DIR"), "/src");
    for (size, features) in [(1024, "metadata_csum"), (4096, "^metadata_csum")] {
        let (block_size, mut random) = (size.to_string(), Random(size as u64));
        let args = ["-t", "ext4", "-b", &block_size, "-O", features, "-d", tree];
        let image = scratch.try_mkfs(&args, "8M").unwrap();
        let mut block = vec![0; size];
        for number in 0..LEN / size {
            image.read_at(number * size, &mut block);
            if block.iter().all(|byte| *byte == 0) {
                continue;
            }
            let mut input = vec![random.next() as u8];
            input.extend_from_slice(&block);
            all(&block);
            for _ in 0..2 {
                change(&mut input, &mut random);
                all(&input);
            }
        }
        // A superblock stands behind the first KiB, inodes at no place that blocks begin at.
        let mut bytes = vec![0; 1024];
        for _ in 0..2000 {
            let at = 1024 + 128 * random.below((LEN as u64 - 4096) / 128) as usize;
            image.read_at(if random.one_in(8) { 1024 } else { at }, &mut bytes);
            change(&mut bytes, &mut random);
            all(&bytes);
        }
    }
}
