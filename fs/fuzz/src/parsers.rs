//! What is done with bytes that may be anything: each parser of a format, and what is done with
//! what it lets pass.
//!
//! The fuzzers of this folder call these, and so does a test of the crate with seeded bytes.

use std::collections::HashMap;

use blockstack::{BlkError, BlkResult};
use fs::Geometry;
use fs::format::dirent::{self, DirLayout};
use fs::format::extent::{self, Bounds, Node};
use fs::format::fast_commit::{FcScan, FcScanner};
use fs::format::htree::{self, CharSign, DxEntries, DxKind, Hasher};
use fs::format::inode::InodeData;
use fs::format::jbd2::{
    Csum, Header, Incompat, JournalSuperblock, Revokes, TagFormat, Tags, commit_time,
};
use fs::format::superblock::RawSuperblock;
use fs::format::xattr::{self, Area, NameIndex};
use fs::journal::replay::{ReplayIo, replay as replay_log};
use fs::xattr::acl::Acl;
use zerocopy::FromBytes;

/// The first byte, and the rest.
fn choice(bytes: &[u8]) -> (u8, &[u8]) {
    bytes
        .split_first()
        .map_or((0, bytes), |(first, rest)| (*first, rest))
}

/// As long as a block, filled up with zeros.
fn block(bytes: &[u8], size: usize) -> Vec<u8> {
    let mut block = vec![0; size];
    let len = bytes.len().min(size);
    block[..len].copy_from_slice(&bytes[..len]);
    block
}

/// The superblock, and the geometry that it tells.
pub fn superblock(bytes: &[u8]) {
    let mut bytes = block(bytes, 1024);
    for sealed in [false, true] {
        if sealed {
            let Ok(raw) = RawSuperblock::mut_from_bytes(&mut bytes) else {
                return;
            };
            raw.seal();
        }
        let Ok(raw) = RawSuperblock::read_from_bytes(&bytes) else {
            return;
        };
        let Ok(geo) = Geometry::new(&raw) else {
            continue;
        };
        for group in [0, 1, geo.group_count / 2, geo.group_count - 1] {
            if group < geo.group_count {
                let (at, offset) = geo.group_desc_at(group);
                assert!(geo.blocks_in_fs(at, 1) && offset < geo.block_size as usize);
                assert!(geo.group_first_block(group) < geo.blocks_count);
                assert!(geo.group_blocks(group) <= geo.blocks_per_group);
            }
        }
    }
}

/// An inode, decoded and encoded again.
pub fn inode(bytes: &[u8]) {
    let (choice, bytes) = choice(bytes);
    let size = [128, 160, 256, 1024][usize::from(choice % 4)];
    let mut bytes = block(bytes, size);
    let Ok(data) = InodeData::decode(&bytes, 12) else {
        return;
    };
    if data.encode(&mut bytes, 12).is_ok() {
        let again = InodeData::decode(&bytes, 12);
        assert_eq!(again.as_ref().map(|data| data.size), Ok(data.size));
    }
}

fn layout(choice: u8) -> DirLayout {
    DirLayout {
        block_size: [1024, 4096, 65536][usize::from(choice % 3)],
        filetype: choice & 4 == 0,
        tail: choice & 8 == 0,
        max_ino: 1000,
    }
}

/// A block of a directory: listed, searched, filled and emptied.
pub fn dirent(bytes: &[u8]) {
    let (choice, bytes) = choice(bytes);
    let layout = layout(choice);
    let mut block = block(bytes, layout.block_size);
    let names: Vec<Vec<u8>> = dirent::entries(&block, layout)
        .map_while(Result::ok)
        .filter(|entry| entry.is_used())
        .map(|entry| entry.name.to_vec())
        .collect();
    let _ = dirent::dots(&block, layout);
    let _ = dirent::tail(&block);
    let _ = dirent::insert(&mut block, layout, b"a new name", 12, 1);
    for name in names {
        if let Ok(Some(found)) = dirent::find(&block, layout, &name) {
            let _ = dirent::remove(&mut block, layout, &found);
        }
    }
}

/// Index blocks of a directory, and leaves to be split.
pub fn htree(bytes: &[u8]) {
    let (choice, bytes) = choice(bytes);
    let layout = layout(choice);
    let block = block(bytes, layout.block_size);
    let kind = htree::kind_by_content(&block, layout);
    for kind in [Some(DxKind::Root), Some(DxKind::Node), kind]
        .into_iter()
        .flatten()
    {
        let _ = htree::checksum_span(&block, kind, layout);
        if let Ok(entries) = DxEntries::new(&block, kind, layout, 500) {
            let _ = entries.check_order();
            for hash in [0, 1, 0x8000_0000, u32::MAX] {
                let at = entries.search(hash);
                let _ = entries.block(at);
            }
        }
    }
    if let Ok(root) = htree::root_info(&block, layout, 3) {
        let hasher = Hasher {
            kind: root.hash,
            sign: CharSign::Unsigned,
            seed: [1, 2, 3, 4],
        };
        let _ = htree::split_leaf(&block, layout, &hasher);
    }
    let _ = htree::convert(&block, layout);
}

/// A node of an extent tree.
pub fn extent(bytes: &[u8]) {
    let (choice, bytes) = choice(bytes);
    let size = [60, 1024, 4096][usize::from(choice % 3)];
    let mut block = block(bytes, size);
    let bounds = Bounds {
        first: 1,
        end: 1 << 20,
    };
    let _ = extent::depth(&block);
    let _ = extent::tail_offset(&block);
    let _ = extent::first_key(&block);
    if extent::check(&block, None, bounds).is_err() {
        return;
    }
    let found = match extent::view(&block, None) {
        Ok(Node::Leaf(leaf)) => leaf.at(leaf.upper_bound(7).saturating_sub(1)),
        Ok(Node::Index(index)) => {
            let _ = index.at(index.position(7));
            None
        }
        Err(_) => None,
    };
    if let Some(extent) = found {
        let _ = extent::splice(&mut block, 0, 1, &[extent]);
    }
    let mut child = vec![0; 4096];
    let _ = extent::grow(&mut block, &mut child, 100);
}

/// Attributes behind an inode and in a block.
pub fn xattr(bytes: &[u8]) {
    let (choice, bytes) = choice(bytes);
    let area = if choice % 2 == 0 {
        Area::ibody(bytes).ok().flatten()
    } else {
        let _ = xattr::header(bytes);
        Area::block(bytes).ok()
    };
    let Some(area) = area else { return };
    let mut items: Vec<_> = area.items().collect();
    for item in &items {
        assert!(area.find(item.index, item.name).is_some());
    }
    let _ = area.find(NameIndex(1), b"missing");
    if xattr::fits(&items, xattr::Place::Block, 4096) {
        let mut out = vec![0; 4096];
        xattr::encode_block(&mut out, &mut items);
        assert!(Area::block(&out).is_ok(), "what was written is not taken");
    }
}

/// ACLs as they stand on disk, and as a caller gives them.
pub fn acl(bytes: &[u8]) {
    if let Ok(Some(mut acl)) = Acl::from_disk(bytes) {
        let again = Acl::from_disk(&acl.to_disk());
        assert_eq!(
            again.ok().flatten().map(|acl| acl.entries().len()),
            Some(acl.entries().len())
        );
        acl.chmod(0o640);
        let _ = acl.inherit(0o777);
        let _ = acl.mode_bits();
    }
    if let Ok(Some(acl)) = Acl::from_xattr(bytes) {
        assert!(Acl::from_xattr(&acl.to_xattr()).is_ok());
    }
}

/// Blocks of the journal.
pub fn journal(bytes: &[u8]) {
    let (choice, bytes) = choice(bytes);
    let block = block(bytes, 1024);
    if let Ok(sb) = JournalSuperblock::parse(&block, 1024, 1024) {
        let again = JournalSuperblock::parse(&sb.to_bytes(), 1024, 1024);
        assert!(again.is_ok());
    }
    let _ = Header::of(&block);
    let _ = commit_time(&block);
    let csum = [Csum::None, Csum::V1, Csum::V23 { seed: 1 }][usize::from(choice % 3)];
    let format = TagFormat::new(Incompat::from_bits_retain(u32::from(choice)));
    assert!(Tags::new(&block, format, csum).count() <= block.len());
    if let Ok(revokes) = Revokes::new(&block, choice & 16 == 0, csum) {
        assert!(revokes.count() <= block.len());
    }
    let _ = csum.commit_ok(&block, 0);
    let _ = csum.block_ok(&block);
}

/// The area of fast commits.
pub fn fast_commit(bytes: &[u8]) {
    let (choice, bytes) = choice(bytes);
    let mut scanner = FcScanner::new(u32::from(choice % 8));
    for part in bytes.chunks(1024) {
        match scanner.block(&block(part, 1024)) {
            Ok(FcScan::More) => {}
            Ok(_) | Err(_) => break,
        }
    }
    let tags: usize = scanner.finish().iter().map(Vec::len).sum();
    assert!(tags <= bytes.len());
}

const LOG_BLOCK: usize = 1024;

struct Memory<'a> {
    log: &'a [u8],
    home: HashMap<u64, Vec<u8>>,
}

impl ReplayIo for Memory<'_> {
    fn read_log(&mut self, log_block: u32, out: &mut [u8]) -> BlkResult {
        let at = log_block as usize * LOG_BLOCK;
        let rest = self.log.get(at..).ok_or(BlkError::OutOfRange)?;
        out.copy_from_slice(&block(rest, out.len()));
        Ok(())
    }

    fn write_home(&mut self, block: u64, data: &[u8]) -> BlkResult {
        self.home.insert(block, data.to_vec());
        Ok(())
    }

    fn is_home(&self, block: u64) -> bool {
        block > 0 && block < 4096
    }
}

/// A whole log.
pub fn replay(log: &[u8]) {
    let blocks = (log.len() / LOG_BLOCK) as u64;
    let Ok(sb) = JournalSuperblock::parse(log, LOG_BLOCK as u32, blocks) else {
        return;
    };
    let mut io = Memory {
        log,
        home: HashMap::new(),
    };
    let _ = replay_log(&sb, &mut io, LOG_BLOCK);
}
