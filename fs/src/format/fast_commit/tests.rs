use proptest::prelude::{Strategy, any, prop_assert, prop_assert_eq, prop_oneof, proptest};

use super::*;
use crate::format::extent::ExtentState;

const TID: Tid = 7;

fn tag_bytes(tag: u16, value: &[u8]) -> Vec<u8> {
    let len = value.len() as u16;
    [&tag.to_le_bytes(), &len.to_le_bytes(), value].concat()
}

fn encode(tag: &FcTag) -> Vec<u8> {
    let words = |words: &[u32]| -> Vec<u8> { words.iter().flat_map(|w| w.to_le_bytes()).collect() };
    let named = |of: &FcName| [words(&[of.parent, of.ino]), of.name.to_vec()].concat();
    match tag {
        FcTag::AddRange { ino, extent } => {
            let len = match extent.state {
                ExtentState::Written => extent.len,
                ExtentState::Unwritten => extent.len + 0x8000,
            };
            let high = (extent.pblk >> 32) as u32;
            let place = words(&[len | high << 16, extent.pblk as u32]);
            tag_bytes(ADD_RANGE, &[words(&[*ino, extent.lblk]), place].concat())
        }
        FcTag::DelRange { ino, lblk, len } => tag_bytes(DEL_RANGE, &words(&[*ino, *lblk, *len])),
        FcTag::Creat(of) => tag_bytes(CREAT, &named(of)),
        FcTag::Link(of) => tag_bytes(LINK, &named(of)),
        FcTag::Unlink(of) => tag_bytes(UNLINK, &named(of)),
        FcTag::Inode { ino, raw } => tag_bytes(INODE, &[words(&[*ino]), raw.to_vec()].concat()),
    }
}

/// Writes an area as the kernel does: a pad where the next tag does not fit, a tail that fills its
/// block.
struct Writer {
    block_size: usize,
    blocks: Vec<Vec<u8>>,
    crc: u32,
}

impl Writer {
    fn new(block_size: usize, features: u32, tid: Tid) -> Self {
        let mut writer = Self {
            block_size,
            blocks: vec![Vec::new()],
            crc: 0,
        };
        let head = [features.to_le_bytes(), tid.to_le_bytes()].concat();
        writer.put(&tag_bytes(HEAD, &head));
        writer
    }

    fn put(&mut self, bytes: &[u8]) {
        self.reserve(bytes.len());
        self.crc = crc32c(self.crc, bytes);
        self.blocks.last_mut().unwrap().extend(bytes);
    }

    fn reserve(&mut self, len: usize) {
        let used = self.blocks.last().unwrap().len();
        let room = self.block_size - used;
        if len + TL_LEN > room {
            let pad = tag_bytes(PAD, &vec![0; room - TL_LEN]);
            self.crc = crc32c(self.crc, &pad);
            self.blocks.last_mut().unwrap().extend(pad);
            self.blocks.push(Vec::new());
        }
    }

    fn tail(&mut self, tid: Tid) {
        self.reserve(TL_LEN + 8);
        let block = self.blocks.last_mut().unwrap();
        let len = self.block_size - block.len() - TL_LEN;
        let start = [
            TAIL.to_le_bytes().as_slice(),
            &(len as u16).to_le_bytes(),
            &tid.to_le_bytes(),
        ]
        .concat();
        let crc = crc32c(self.crc, &start);
        block.extend(start);
        block.extend(crc.to_le_bytes());
        block.resize(self.block_size, 0);
        self.blocks.push(Vec::new());
        self.crc = 0;
    }

    fn finish(mut self) -> Vec<u8> {
        self.blocks
            .iter_mut()
            .for_each(|block| block.resize(self.block_size, 0));
        self.blocks.concat()
    }
}

fn scan(area: &[u8], block_size: usize) -> Result<Vec<FastCommit>, FcScanError> {
    let mut scanner = FcScanner::new(TID);
    for block in area.chunks(block_size) {
        if scanner.block(block)? == FcScan::End {
            break;
        }
    }
    Ok(scanner.finish())
}

fn tags() -> impl Strategy<Value = FcTag> {
    let name = proptest::collection::vec(b'a'..=b'z', 1..=255);
    let of = (any::<u32>(), any::<u32>(), name).prop_map(|(parent, ino, name)| FcName {
        parent,
        ino,
        name: name.into(),
    });
    let raw = proptest::collection::vec(any::<u8>(), 128..=256);
    let range = (any::<u32>(), 0..u32::MAX / 2, 1..0x8000u32);
    prop_oneof![
        (range.clone(), 0..1u64 << 48, any::<bool>()).prop_map(
            |((ino, lblk, len), pblk, written)| {
                let state = if written {
                    ExtentState::Written
                } else {
                    ExtentState::Unwritten
                };
                let extent = Extent {
                    lblk,
                    len,
                    pblk,
                    state,
                };
                FcTag::AddRange { ino, extent }
            }
        ),
        range.prop_map(|(ino, lblk, len)| FcTag::DelRange { ino, lblk, len }),
        of.clone().prop_map(FcTag::Creat),
        of.clone().prop_map(FcTag::Link),
        of.prop_map(FcTag::Unlink),
        (any::<u32>(), raw).prop_map(|(ino, raw)| FcTag::Inode {
            ino,
            raw: raw.into()
        }),
    ]
}

fn commits() -> impl Strategy<Value = Vec<FastCommit>> {
    proptest::collection::vec(proptest::collection::vec(tags(), 0..20), 1..5)
}

/// The area, and the block of each tail.
fn write(commits: &[FastCommit], block_size: usize) -> (Vec<u8>, Vec<usize>) {
    let mut writer = Writer::new(block_size, 0, TID);
    let mut tails = Vec::new();
    for commit in commits {
        commit.iter().for_each(|tag| writer.put(&encode(tag)));
        writer.tail(TID);
        tails.push(writer.blocks.len() - 2);
    }
    (writer.finish(), tails)
}

proptest! {
    #[test]
    fn commits_come_back(commits in commits(), bits in 10..13u32) {
        let (area, _) = write(&commits, 1usize << bits);
        prop_assert_eq!(scan(&area, 1usize << bits), Ok(commits));
    }

    #[test]
    fn damage_ends_the_area(
        commits in commits(),
        at in any::<proptest::sample::Index>(),
        bit in 0..8,
    ) {
        let (mut area, _) = write(&commits, 1024);
        let at = at.index(area.len());
        area[at] ^= 1u8 << bit;
        // Behind a tail, and behind the last, nothing counts, so nothing may be lost.
        match scan(&area, 1024) {
            Ok(found) => prop_assert!(commits.starts_with(&found)),
            Err(error) => {
                let by_features = matches!(error, FcScanError::Features { .. });
                prop_assert!(by_features, "{}", error);
            }
        }
    }

    #[test]
    fn a_shorter_area_keeps_its_first_commits(
        commits in commits(),
        blocks in any::<proptest::sample::Index>(),
    ) {
        let (area, tails) = write(&commits, 1024);
        let blocks = blocks.index(area.len() / 1024 + 1);
        let found = scan(&area[..blocks * 1024], 1024).unwrap();
        prop_assert_eq!(found.len(), tails.iter().filter(|&&tail| tail < blocks).count());
        prop_assert!(commits.starts_with(&found));
    }

    #[test]
    fn any_bytes_are_survived(
        bytes in proptest::collection::vec(any::<u8>(), 0..3000),
        headed in any::<bool>(),
    ) {
        let mut area = if headed {
            let (mut area, _) = write(&[], 1024);
            area.truncate(TL_LEN + 8);
            area
        } else {
            Vec::new()
        };
        area.extend(bytes);
        prop_assert_eq!(scan(&area, 1024).unwrap_or_default(), Vec::<FastCommit>::new());
    }
}

#[test]
fn an_area_of_another_transaction_is_none() {
    let mut writer = Writer::new(1024, 0, TID - 1);
    writer.tail(TID - 1);
    assert_eq!(scan(&writer.finish(), 1024), Ok(vec![]));
    // Nor do unknown features of it matter.
    let mut writer = Writer::new(1024, 1, TID - 1);
    writer.tail(TID - 1);
    assert_eq!(scan(&writer.finish(), 1024), Ok(vec![]));
    assert_eq!(scan(&[0; 2048], 1024), Ok(vec![]));
}

#[test]
fn what_is_not_known_is_refused_where_it_counts() {
    let mut writer = Writer::new(1024, 4, TID);
    writer.tail(TID);
    let error = FcScanError::Features { features: 4 };
    assert_eq!(scan(&writer.finish(), 1024), Err(error));

    let strange = |tag: u16, value: &[u8], has_tail: bool| {
        let mut writer = Writer::new(1024, 0, TID);
        writer.tail(TID);
        writer.put(&tag_bytes(tag, value));
        if has_tail {
            writer.tail(TID);
        }
        scan(&writer.finish(), 1024)
    };
    assert_eq!(
        strange(10, &[1, 2], true),
        Err(FcScanError::Tag { tag: 10 })
    );
    assert_eq!(strange(10, &[1, 2], false), Ok(vec![vec![]]));
    for (tag, value) in [
        (ADD_RANGE, &[0; 15][..]),
        (ADD_RANGE, &[0; 16]),
        (DEL_RANGE, &[0; 13]),
        (CREAT, &[0; 8]),
        (LINK, b"ppppiiii.."),
        (UNLINK, b"ppppiiiia/b"),
        (INODE, &[0; 131]),
    ] {
        let len = value.len() as u16;
        let error = FcScanError::Value { tag, len };
        assert_eq!(strange(tag, value, true), Err(error));
        assert_eq!(strange(tag, value, false), Ok(vec![vec![]]));
    }
}

/// `PAD` of older kernels leaves the last byte of a block alone.
#[test]
fn a_byte_behind_the_pad_does_not_end_the_area() {
    let tag = FcTag::DelRange {
        ino: 12,
        lblk: 1,
        len: 2,
    };
    let mut writer = Writer::new(1024, 0, TID);
    let room = 1024 - writer.blocks[0].len() - TL_LEN;
    let pad = tag_bytes(PAD, &vec![0; room - 1]);
    writer.crc = crc32c(writer.crc, &pad);
    writer.blocks[0].extend(pad);
    writer.blocks[0].push(0xee);
    writer.blocks.push(Vec::new());
    writer.put(&encode(&tag));
    writer.tail(TID);
    assert_eq!(scan(&writer.finish(), 1024), Ok(vec![vec![tag]]));
}
