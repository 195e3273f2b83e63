use super::*;

fn raw(incompat: Incompat) -> RawJournalSuperblock {
    let mut raw = RawJournalSuperblock::read_from_bytes(&[0; 1024]).unwrap();
    raw.s_header.h_magic = MAGIC.into();
    raw.s_header.h_blocktype = SUPERBLOCK_V2.into();
    raw.s_blocksize = 1024.into();
    raw.s_maxlen = 4096.into();
    raw.s_first = 1.into();
    raw.s_feature_incompat = incompat.bits().into();
    if incompat.intersects(Incompat::CSUM_V2 | Incompat::CSUM_V3) {
        raw.s_checksum_type = CRC32C_CHKSUM;
        raw.s_checksum = sb_checksum(&raw).into();
    }
    raw
}

fn parse(raw: &RawJournalSuperblock) -> Result<JournalSuperblock, JournalSbError> {
    JournalSuperblock::parse(raw.as_bytes(), 1024, 4096)
}

#[test]
fn superblock_comes_back_byte_for_byte() {
    for incompat in [
        Incompat::empty(),
        Incompat::CSUM_V3 | Incompat::BIT64,
        Incompat::CSUM_V2,
    ] {
        let raw = raw(incompat);
        let sb = parse(&raw).unwrap();
        assert_eq!(sb.to_bytes(), raw.as_bytes());
        assert_eq!(
            sb.geometry(),
            LogGeometry {
                first: 1,
                end: 4096
            }
        );
    }
}

#[test]
fn every_damage_has_its_error() {
    let damaged = |damage: fn(&mut RawJournalSuperblock)| {
        let mut raw = raw(Incompat::REVOKE);
        damage(&mut raw);
        parse(&raw).err().unwrap()
    };
    use JournalSbError as E;
    assert!(matches!(
        damaged(|r| r.s_header.h_magic = 1.into()),
        E::Magic { found: 1 }
    ));
    assert!(matches!(
        damaged(|r| r.s_header.h_blocktype = 1.into()),
        E::BlockType { found: 1 }
    ));
    assert!(matches!(
        damaged(|r| r.s_blocksize = 512.into()),
        E::BlockSize { found: 512, .. }
    ));
    assert!(matches!(
        damaged(|r| r.s_maxlen = 4097.into()),
        E::TooLong { maxlen: 4097, .. }
    ));
    assert!(matches!(
        damaged(|r| r.s_maxlen = 900.into()),
        E::TooShort { end: 900, .. }
    ));
    assert!(matches!(
        damaged(|r| r.s_first = 0.into()),
        E::First { first: 0, .. }
    ));
    assert!(matches!(
        damaged(|r| r.s_first = 4096.into()),
        E::First { first: 4096, .. }
    ));
    assert!(matches!(
        damaged(|r| r.s_start = 4096.into()),
        E::Start { start: 4096, .. }
    ));
    assert!(matches!(
        damaged(|r| r.s_feature_incompat = 0x40.into()),
        E::UnknownFeatures { unknown: 0x40 }
    ));
    assert!(matches!(
        damaged(|r| r.s_feature_ro_compat = 0x4.into()),
        E::UnknownFeatures { unknown: 0x4 }
    ));
    assert!(matches!(
        damaged(|r| r.s_feature_incompat = 0x18.into()),
        E::ChecksumFeatures { .. }
    ));
    assert!(matches!(
        damaged(|r| r.s_feature_incompat = 0x10.into()),
        E::ChecksumType { found: 0 }
    ));
    assert!(matches!(
        damaged(|r| {
            r.s_feature_incompat = 0x10.into();
            r.s_checksum_type = 4;
        }),
        E::Checksum { .. }
    ));
    assert!(matches!(
        damaged(|r| {
            r.s_feature_incompat = 0x20.into();
            r.s_num_fc_blks = 5000.into();
        }),
        E::FastCommitBlocks { fc: 5000, .. }
    ));
    assert!(matches!(
        JournalSuperblock::parse(&[0; 100], 1024, 4096),
        Err(E::Short { len: 100 })
    ));
}

#[test]
fn version_1_has_no_features() {
    let mut raw = raw(Incompat::empty());
    raw.s_header.h_blocktype = SUPERBLOCK_V1.into();
    raw.s_feature_incompat = 0xFFFF.into();
    let mut sb = parse(&raw).unwrap();
    assert_eq!(sb.incompat(), Incompat::empty());
    sb.set_features(Compat::empty(), Incompat::CSUM_V3);
    let bytes = sb.to_bytes();
    assert_eq!(Header::of(&bytes).map(|h| h.blocktype), Some(SUPERBLOCK_V2));
    assert!(JournalSuperblock::parse(&bytes, 1024, 4096).is_ok());
}

#[test]
fn errno_is_stored_negative() {
    let mut sb = parse(&raw(Incompat::empty())).unwrap();
    sb.set_errno(5);
    assert_eq!(sb.errno(), -5);
    assert_eq!(sb.to_bytes()[0x20..0x24], (-5i32).to_be_bytes());
}

#[test]
fn tag_sizes_are_those_of_the_kernel() {
    let size = |incompat| TagFormat::new(incompat).size();
    assert_eq!(size(Incompat::empty()), 8);
    assert_eq!(size(Incompat::BIT64), 12);
    assert_eq!(size(Incompat::CSUM_V2), 10);
    assert_eq!(size(Incompat::CSUM_V2 | Incompat::BIT64), 14);
    assert_eq!(size(Incompat::CSUM_V3), 16);
    assert_eq!(size(Incompat::CSUM_V3 | Incompat::BIT64), 16);
}

#[test]
fn descriptors_come_back_in_every_format() {
    for incompat in [
        Incompat::empty(),
        Incompat::BIT64,
        Incompat::CSUM_V2,
        Incompat::CSUM_V2 | Incompat::BIT64,
        Incompat::CSUM_V3,
        Incompat::CSUM_V3 | Incompat::BIT64,
    ] {
        let csum = if incompat.intersects(Incompat::CSUM_V2 | Incompat::CSUM_V3) {
            Csum::V23 { seed: 77 }
        } else {
            Csum::None
        };
        let format = TagFormat::new(incompat);
        for count in [1, 2, format.per_block(1024, csum)] {
            let mut block = vec![0; 1024];
            let mut writer = DescriptorWriter::new(&mut block, 9, format, csum);
            let high = if incompat.contains(Incompat::BIT64) {
                1 << 40
            } else {
                0
            };
            let tag = |i: usize| Tag {
                block: high + 1000 + i as u64,
                flags: if i % 3 == 0 {
                    TagFlags::ESCAPE
                } else {
                    TagFlags::empty()
                },
                checksum: csum.tag_sum(9, &i.to_be_bytes()),
            };
            for i in 0..count {
                writer.push(&mut block, tag(i), &[0xAA; 16]);
            }
            writer.finish(&mut block);
            assert_eq!(
                Header::of(&block),
                Some(Header {
                    blocktype: 1,
                    sequence: 9
                })
            );
            assert!(csum.block_ok(&block));
            let tags: Vec<_> = Tags::new(&block, format, csum).collect();
            assert_eq!(tags.len(), count);
            for (i, found) in tags.iter().enumerate() {
                assert_eq!(found.block, tag(i).block);
                assert_eq!(found.flags.contains(TagFlags::ESCAPE), i % 3 == 0);
                assert_eq!(found.flags.contains(TagFlags::SAME_UUID), i != 0);
                assert_eq!(found.flags.contains(TagFlags::LAST_TAG), i + 1 == count);
                assert!(format.sum_ok(found, csum.tag_sum(9, &i.to_be_bytes())));
            }
            if csum != Csum::None {
                block[20] ^= 1;
                assert!(!csum.block_ok(&block));
            }
        }
    }
}

#[test]
fn a_descriptor_without_a_last_tag_ends_with_the_block() {
    let block = vec![0; 1024];
    for incompat in [Incompat::empty(), Incompat::CSUM_V3] {
        let tags = Tags::new(&block, TagFormat::new(incompat), Csum::None);
        assert!(tags.count() <= 1024 / 24);
    }
}

#[test]
fn revokes_come_back_and_counts_are_checked() {
    for incompat in [Incompat::empty(), Incompat::BIT64] {
        let csum = Csum::V23 { seed: 3 };
        let writer = RevokeWriter::new(TagFormat::new(incompat), csum);
        let blocks: Vec<u64> = (0..writer.per_block(1024) as u64)
            .map(|i| i * 3 + 7)
            .collect();
        let mut block = vec![0; 1024];
        writer.put(&mut block, 5, &blocks);
        let wide = incompat.contains(Incompat::BIT64);
        assert!(csum.block_ok(&block));
        assert_eq!(
            Revokes::new(&block, wide, csum)
                .unwrap()
                .collect::<Vec<_>>(),
            blocks
        );
        block[12..16].copy_from_slice(&1021u32.to_be_bytes());
        assert_eq!(
            Revokes::new(&block, wide, csum).err(),
            Some(RevokeCountError { count: 1021 })
        );
        block[12..16].copy_from_slice(&3u32.to_be_bytes());
        assert_eq!(Revokes::new(&block, wide, csum).unwrap().count(), 0);
    }
}

#[test]
fn commit_blocks_are_checked_in_every_version() {
    for csum in [Csum::None, Csum::V1, Csum::V23 { seed: 1 }] {
        let mut block = vec![0; 4096];
        csum.put_commit(&mut block, 4, 1_700_000_000, 5, 0x1234);
        assert_eq!(commit_time(&block), (1_700_000_000, 5));
        assert!(csum.commit_ok(&block, 0x1234));
        // Stale bytes behind the record, left where only the first sector reached the disk.
        let mut torn = block.clone();
        torn[512..].fill(9);
        assert!(csum.commit_ok(&torn, 0x1234));
        block[0x38] ^= 1;
        assert_eq!(
            csum.commit_ok(&block, 0x1234),
            !matches!(csum, Csum::V23 { .. })
        );
        assert_eq!(csum.commit_ok(&block, 0x1235), csum == Csum::None);
    }
}

#[test]
fn crc32_be_is_the_kernels() {
    // The check value of CRC-32/MPEG-2, which is this algorithm.
    assert_eq!(crc32_be(!0, b"123456789"), 0x0376_E6E7);
}

#[test]
fn the_log_is_a_circle() {
    let log = LogGeometry { first: 1, end: 11 };
    assert_eq!(log.len(), 10);
    assert_eq!(log.advance(10, 1), 1);
    assert_eq!(log.advance(3, 10), 3);
    assert_eq!(log.distance(8, 2), 4);
    assert_eq!(log.distance(2, 2), 0);
    assert_eq!(log.free(5, 5), 9);
    assert_eq!(log.free(4, 5), 0);
    for from in 1..11 {
        for n in 0..10 {
            assert_eq!(log.distance(from, log.advance(from, n)), n);
        }
    }
}

#[test]
fn tids_wrap() {
    assert!(tid_gt(1, u32::MAX));
    assert!(!tid_gt(u32::MAX, 1));
    assert!(tid_geq(7, 7) && !tid_gt(7, 7));
}
