//! Images to damage, and what lies where in them.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use blockstack::DynDevice;
use blockstack::backend::mem::{Image, MemDisk};
use blockstack::testing::crash::{CrashDisk, Timing};
use fs::format::csum::crc32c;
use fs::format::dirent::{self, DirLayout, TAIL_LEN};
use fs::format::extent::{self, Node};
use fs::format::group::group_checksum;
use fs::format::htree::{self, DX_TAIL_LEN};
use fs::format::inode::{inode_csum_seed, seal_inode};
use fs::format::jbd2;
use fs::format::xattr::CHECKSUM_AT;
use fs::ops::NewNode;
use fs::xattr::XattrMode;
use fs::{Fs, Geometry, InodeData, MountOptions};

use crate::storm::image::Scratch;
use crate::storm::{DIR, DIRECT, FILE, ME, ROOT, write};

/// What a block of an image is.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Role {
    Super,
    Groups,
    BlockBitmap(u32),
    InodeBitmap(u32),
    InodeTable,
    /// Extents, with the checksum seed of the inode.
    Extents(u32),
    /// Pointers of a block map.
    Pointers,
    /// A directory's block, with the checksum seed of the inode.
    Directory(u32),
    Attributes,
    Journal,
    /// The orphan file, with its checksum seed.
    Orphans(u32),
    Data,
}

/// A sound image, and its map.
pub struct Base {
    pub name: &'static str,
    pub image: Image,
    pub geo: Geometry,
    /// One list for each kind of role.
    pub kinds: Vec<Vec<(u64, Role)>>,
    pub roles: BTreeMap<u64, Role>,
    /// Inodes in use.
    pub inos: Vec<u32>,
}

pub fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    le32(bytes, at).swap_bytes()
}

pub fn geometry(image: &Image) -> Geometry {
    let mut sb = [0; 1024];
    image.read_at(1024, &mut sb);
    Geometry::new(&zerocopy::FromBytes::read_from_bytes(&sb[..]).unwrap()).unwrap()
}

/// Reads and writes the parts of an image by their numbers.
pub struct Parts<'a> {
    pub geo: &'a Geometry,
    pub image: &'a mut Image,
}

impl Parts<'_> {
    pub fn block(&self, block: u64) -> Vec<u8> {
        let mut bytes = vec![0; self.geo.block_size as usize];
        self.image.read_at(self.at(block), &mut bytes);
        bytes
    }

    pub fn at(&self, block: u64) -> usize {
        (block as usize) << self.geo.block_bits
    }

    pub fn desc_at(&self, group: u32) -> usize {
        let (block, offset) = self.geo.group_desc_at(group);
        self.at(block) + offset
    }

    pub fn desc(&self, group: u32) -> Vec<u8> {
        let mut bytes = vec![0; self.geo.desc_size.into()];
        self.image.read_at(self.desc_at(group), &mut bytes);
        bytes
    }

    /// Where an inode stands, by what the image says at present; `None` where that is nowhere.
    pub fn inode_at(&self, ino: u32) -> Option<usize> {
        let (group, index) = self.geo.group_of_ino(ino);
        let table = u64::from(le32(&self.desc(group), 8));
        let blocks = u64::from(self.geo.itable_blocks);
        let size = usize::from(self.geo.inode_size);
        let inside = table + blocks <= self.geo.blocks_count;
        inside.then(|| self.at(table) + index as usize * size)
    }

    pub fn inode(&self, ino: u32) -> Option<Vec<u8>> {
        let mut bytes = vec![0; self.geo.inode_size.into()];
        self.image.read_at(self.inode_at(ino)?, &mut bytes);
        Some(bytes)
    }
}

/// Sets the checksum of a block that carries its own.
pub fn seal_block(geo: &Geometry, role: Role, block: u64, bytes: &mut [u8]) {
    let size = bytes.len();
    match role {
        Role::Extents(seed) => {
            if let Some(at) = extent::tail_offset(bytes).filter(|&at| at + 4 <= size) {
                let sum = crc32c(seed, &bytes[..at]);
                bytes[at..at + 4].copy_from_slice(&sum.to_le_bytes());
            }
        }
        Role::Directory(seed) => seal_directory(geo, seed, bytes),
        Role::Attributes => {
            let sum = crc32c(geo.csum_seed, &block.to_le_bytes());
            bytes[CHECKSUM_AT..CHECKSUM_AT + 4].fill(0);
            let sum = crc32c(sum, bytes);
            bytes[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&sum.to_le_bytes());
        }
        Role::Orphans(seed) => {
            let sum = crc32c(seed, &block.to_le_bytes());
            let sum = crc32c(sum, &bytes[..size - 8]);
            bytes[size - 4..].copy_from_slice(&sum.to_le_bytes());
        }
        _ => {}
    }
}

fn seal_directory(geo: &Geometry, seed: u32, bytes: &mut [u8]) {
    let layout = DirLayout {
        block_size: bytes.len(),
        filetype: geo.has_filetype(),
        tail: true,
        max_ino: geo.inodes_count,
    };
    let place = match htree::kind_by_content(bytes, layout) {
        Some(kind) => htree::checksum_span(bytes, kind, layout).and_then(|span| {
            let tail = bytes.get(span.tail_at..span.tail_at + DX_TAIL_LEN)?;
            let sum = crc32c(seed, bytes.get(..span.covered)?);
            Some((span.tail_at + 4, crc32c(crc32c(sum, &tail[..4]), &[0; 4])))
        }),
        None => dirent::tail(bytes).map(|_| {
            let covered = &bytes[..bytes.len() - TAIL_LEN];
            (bytes.len() - 4, crc32c(seed, covered))
        }),
    };
    if let Some((at, sum)) = place {
        bytes[at..at + 4].copy_from_slice(&sum.to_le_bytes());
    }
}

fn tree(parts: &Parts<'_>, node: &[u8], into: &mut Vec<(u64, bool)>, is_map: bool) {
    match extent::view(node, None).unwrap() {
        Node::Leaf(leaf) => {
            for it in leaf.iter() {
                into.extend((it.pblk..it.pblk + u64::from(it.len)).map(|block| (block, is_map)));
            }
        }
        Node::Index(index) => {
            for child in index.iter() {
                into.push((child.pblk, true));
                tree(parts, &parts.block(child.pblk), into, is_map);
            }
        }
    }
}

fn pointers(parts: &Parts<'_>, block: u64, depth: u32, into: &mut Vec<(u64, bool)>) {
    if block == 0 {
        return;
    }
    into.push((block, depth > 0));
    if depth > 0 {
        for chunk in parts.block(block).chunks(4) {
            pointers(parts, u64::from(le32(chunk, 0)), depth - 1, into);
        }
    }
}

/// The blocks of a file, each with whether it is one of its map.
fn blocks_of(parts: &Parts<'_>, data: &InodeData) -> Vec<(u64, bool)> {
    let mut blocks = Vec::new();
    if data.has_extents() {
        tree(parts, &data.block, &mut blocks, false);
    } else {
        for (index, chunk) in data.block.chunks(4).enumerate() {
            let depth = (index as u32).saturating_sub(11);
            pointers(parts, u64::from(le32(chunk, 0)), depth, &mut blocks);
        }
    }
    blocks
}

fn map_inode(parts: &Parts<'_>, ino: u32, data: &InodeData, roles: &mut BTreeMap<u64, Role>) {
    let geo = parts.geo;
    let seed = inode_csum_seed(geo.csum_seed, ino, data.generation);
    if data.file_acl != 0 {
        roles.insert(data.file_acl, Role::Attributes);
    }
    let is_fast = data.is_symlink() && data.sectors == 0;
    if is_fast || !(data.is_symlink() || data.is_dir() || data.is_file()) {
        return;
    }
    for (index, (block, is_map)) in blocks_of(parts, data).into_iter().enumerate() {
        let role = match is_map {
            true if data.has_extents() => Role::Extents(seed),
            true => Role::Pointers,
            false if data.is_dir() => Role::Directory(seed),
            false if ino == geo.journal_inum => Role::Journal,
            false if ino == geo.orphan_file_inum => Role::Orphans(seed),
            // A few stand for all.
            false if index < 3 => Role::Data,
            false => continue,
        };
        roles.insert(block, role);
    }
}

fn map_image(image: &Image, roles: &mut BTreeMap<u64, Role>, inos: &mut Vec<u32>) {
    let geo = geometry(image);
    let parts = Parts {
        geo: &geo,
        image: &mut image.clone(),
    };
    roles.insert(geo.superblock_at().0, Role::Super);
    for group in 0..geo.group_count {
        roles
            .entry(geo.group_desc_at(group).0)
            .or_insert(Role::Groups);
        let desc = parts.desc(group);
        roles.insert(le32(&desc, 0).into(), Role::BlockBitmap(group));
        roles.insert(le32(&desc, 4).into(), Role::InodeBitmap(group));
        for index in 0..geo.inodes_per_group {
            let ino = group * geo.inodes_per_group + index + 1;
            let bytes = parts.inode(ino).unwrap();
            let data = InodeData::decode(&bytes, geo.block_bits).unwrap();
            if data.mode == 0 || (data.links == 0 && ino != geo.journal_inum) {
                continue;
            }
            inos.push(ino);
            let at = parts.inode_at(ino).unwrap() >> geo.block_bits;
            roles.insert(at as u64, Role::InodeTable);
            map_inode(&parts, ino, &data, roles);
        }
    }
    inos.sort_unstable();
    inos.dedup();
}

impl Base {
    pub fn new(name: &'static str, image: Image) -> Self {
        let (mut roles, mut inos) = (BTreeMap::new(), Vec::new());
        map_image(&image, &mut roles, &mut inos);
        // What a log holds comes to its place only with a mount.
        let disk = MemDisk::from_image("settled", image.clone());
        let dev: DynDevice = disk.clone();
        let fs = Fs::mount(dev, MountOptions::default()).unwrap();
        fs.unmount().unwrap();
        drop(fs);
        map_image(&disk.image(), &mut roles, &mut inos);
        let mut kinds: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for (&block, &role) in &roles {
            let kind = format!("{role:?}");
            let kind = kind.split('(').next().unwrap().to_owned();
            kinds.entry(kind).or_default().push((block, role));
        }
        Self {
            name,
            geo: geometry(&image),
            image,
            kinds: kinds.into_values().collect(),
            roles,
            inos,
        }
    }

    /// Makes all checksums of the image right again that damage to `touched` can have broken.
    pub fn seal(&self, image: &mut Image, touched: &[u64]) {
        let geo = &self.geo;
        let mut parts = Parts { geo, image };
        if geo.metadata_csum() {
            self.seal_journal(&mut parts);
            for &block in touched {
                if let Some(&role) = self.roles.get(&block) {
                    let mut bytes = parts.block(block);
                    seal_block(geo, role, block, &mut bytes);
                    let at = parts.at(block);
                    parts.image.write_at(at, &bytes);
                }
            }
            for &ino in &self.inos {
                if let (Some(at), Some(mut bytes)) = (parts.inode_at(ino), parts.inode(ino)) {
                    let before = bytes.clone();
                    let seed = inode_csum_seed(geo.csum_seed, ino, le32(&bytes, 100));
                    seal_inode(seed, &mut bytes);
                    if bytes != before {
                        parts.image.write_at(at, &bytes);
                    }
                }
            }
        }
        self.seal_groups(&mut parts, touched);
        let mut sb = [0; 1024];
        parts.image.read_at(1024, &mut sb);
        if geo.metadata_csum() {
            let sum = crc32c(!0, &sb[..1020]);
            parts.image.write_at(1024 + 1020, &sum.to_le_bytes());
        }
    }

    fn seal_groups(&self, parts: &mut Parts<'_>, touched: &[u64]) {
        let geo = &self.geo;
        for group in 0..geo.group_count {
            let mut desc = parts.desc(group);
            let blocks = geo.group_blocks(group);
            // Where the location is, the count of free ones, the checksum; how many bits.
            let bitmaps = [
                ((0, 0xc, 0x18, 0x38), geo.blocks_per_group, blocks),
                (
                    (4, 0xe, 0x1a, 0x3a),
                    geo.inodes_per_group,
                    geo.inodes_per_group,
                ),
            ];
            for ((at, free, low, high), bits, used) in bitmaps {
                let block = u64::from(le32(&desc, at));
                if touched.contains(&block) && block < geo.blocks_count {
                    let bitmap = parts.block(block);
                    let is_free = |bit: u32| bitmap[bit as usize / 8] & (1 << (bit % 8)) == 0;
                    let count = (0..used).filter(|&bit| is_free(bit)).count() as u16;
                    desc[free..free + 2].copy_from_slice(&count.to_le_bytes());
                }
                if geo.metadata_csum() && block < geo.blocks_count {
                    let bitmap = parts.block(block);
                    let sum = crc32c(geo.csum_seed, &bitmap[..bits as usize / 8]).to_le_bytes();
                    desc[low..low + 2].copy_from_slice(&sum[..2]);
                    if desc.len() >= 64 {
                        desc[high..high + 2].copy_from_slice(&sum[2..]);
                    }
                }
            }
            let sum = group_checksum(geo.group_csum, group, &desc);
            desc[0x1e..0x20].copy_from_slice(&sum.to_le_bytes());
            let at = parts.desc_at(group);
            parts.image.write_at(at, &desc);
        }
    }

    /// The blocks of the journal, in the order of the log.
    fn journal(&self) -> Vec<u64> {
        let blocks = self.roles.iter();
        let blocks = blocks.filter(|&(_, &role)| role == Role::Journal);
        blocks.map(|(&block, _)| block).collect()
    }

    /// Seals what the log holds for other places, the tags, and the blocks of the log.
    fn seal_journal(&self, parts: &mut Parts<'_>) {
        let log = self.journal();
        let Some(&first) = log.first() else {
            return;
        };
        let mut sb = parts.block(first);
        // Checksums of version 3, or none.
        let seed = (be32(&sb, 0x28) & 0x10 != 0).then(|| crc32c(!0, &sb[0x30..0x40]));
        let mut index = 1;
        while index < log.len() {
            let mut bytes = parts.block(log[index]);
            let at = parts.at(log[index]);
            index += 1;
            if be32(&bytes, 0) != jbd2::MAGIC {
                continue;
            }
            let (kind, sequence) = (be32(&bytes, 4), be32(&bytes, 8));
            match (kind, seed) {
                (1, Some(seed)) => {
                    index = self.seal_tags(parts, &log, index, &mut bytes, (seed, sequence));
                    jbd2::Csum::V23 { seed }.seal_block(&mut bytes);
                }
                (5, Some(seed)) => jbd2::Csum::V23 { seed }.seal_block(&mut bytes),
                (2, Some(seed)) => {
                    bytes[16..20].fill(0);
                    let sum = crc32c(seed, &bytes);
                    bytes[16..20].copy_from_slice(&sum.to_be_bytes());
                }
                _ => continue,
            }
            parts.image.write_at(at, &bytes);
        }
        if seed.is_some() {
            sb[0xfc..0x100].fill(0);
            let sum = crc32c(!0, &sb[..1024]);
            sb[0xfc..0x100].copy_from_slice(&sum.to_be_bytes());
            let at = parts.at(first);
            parts.image.write_at(at, &sb);
        }
    }

    fn seal_tags(
        &self,
        parts: &mut Parts<'_>,
        log: &[u64],
        mut index: usize,
        desc: &mut [u8],
        (seed, sequence): (u32, u32),
    ) -> usize {
        let mut at = 12;
        while at + 16 <= desc.len() - 4 && index < log.len() {
            let (target, flags) = (be32(desc, at).into(), be32(desc, at + 4));
            let mut bytes = parts.block(log[index]);
            if let Some(&role) = self.roles.get(&target) {
                if role == Role::InodeTable {
                    self.seal_inodes_in(parts, target, &mut bytes);
                } else {
                    seal_block(&self.geo, role, target, &mut bytes);
                }
                let to = parts.at(log[index]);
                parts.image.write_at(to, &bytes);
            }
            let sum = crc32c(crc32c(seed, &sequence.to_be_bytes()), &bytes);
            desc[at + 12..at + 16].copy_from_slice(&sum.to_be_bytes());
            at += if flags & 2 == 0 { 32 } else { 16 };
            index += 1;
            if flags & 8 != 0 {
                break;
            }
        }
        index
    }

    /// Seals the inodes in the log's copy of a block of the inode table.
    fn seal_inodes_in(&self, parts: &Parts<'_>, block: u64, bytes: &mut [u8]) {
        let start = parts.at(block);
        for &ino in &self.inos {
            let Some(at) = parts.inode_at(ino).and_then(|at| at.checked_sub(start)) else {
                continue;
            };
            let size = usize::from(self.geo.inode_size);
            if let Some(inode) = bytes.get_mut(at..at + size) {
                let seed = inode_csum_seed(self.geo.csum_seed, ino, le32(inode, 100));
                seal_inode(seed, inode);
            }
        }
    }
}

fn run(program: &str, args: &[&str], path: &Path) {
    let out = Command::new(program).args(args).arg(path).output().unwrap();
    let code = out.status.code().unwrap_or(-1);
    let text = String::from_utf8_lossy(&out.stdout);
    assert!((0..2).contains(&code), "{program} {args:?}: {code}\n{text}");
}

/// A tree for `mke2fs -d`.
fn source(dir: &Path) {
    use std::os::unix::fs::FileExt;
    std::fs::create_dir_all(dir.join("made/inner")).unwrap();
    std::fs::write(dir.join("made/small"), b"content").unwrap();
    std::fs::write(dir.join("made/larger"), vec![7; 70_000]).unwrap();
    let sparse = std::fs::File::create(dir.join("made/sparse")).unwrap();
    for at in 0..40 {
        sparse.write_all_at(&[at as u8; 4096], at * 12288).unwrap();
    }
    std::os::unix::fs::symlink("small", dir.join("made/fast")).unwrap();
    std::os::unix::fs::symlink("x/".repeat(90), dir.join("made/slow")).unwrap();
    for number in 0..40 {
        let name = format!("{}-{number}", "n".repeat(150));
        std::fs::write(dir.join("made/inner").join(name), b"").unwrap();
    }
}

/// What our own mount adds: an index of its own, attributes in inode and block, extents in blocks.
fn fill(fs: &Arc<Fs>) {
    let dir = fs.create(ROOT, b"dir", DIR, 0, &ME).unwrap();
    for number in 0..90 {
        let name = format!("{}-{number}", "a-long-name".repeat(7));
        let node = if number % 30 == 0 { DIR } else { FILE };
        fs.create(dir.ino, name.as_bytes(), node, 0, &ME).unwrap();
    }
    let file = fs.create(ROOT, b"file", FILE, 0, &ME).unwrap();
    for at in 0..400 {
        write(fs, file.ino, at * 8192, &[at as u8; 1000], DIRECT).unwrap();
    }
    for (name, len) in [("user.small", 9), ("user.large", 600), ("trusted.t", 40)] {
        for ino in [file.ino, dir.ino] {
            let value = vec![5; len];
            fs.setxattr(ino, name.as_bytes(), Some(&value), XattrMode::Any)
                .unwrap();
        }
    }
    let target = [b'y'; 300];
    let link = NewNode::Symlink { target: &target };
    fs.create(dir.ino, b"slow", link, 0, &ME).unwrap();
    let fifo = NewNode::Node {
        mode: 0o010_644,
        rdev: 0,
    };
    fs.create(dir.ino, b"fifo", fifo, 0, &ME).unwrap();
}

/// Changes that stay in the log, and inodes that have lost their name.
fn leave(fs: &Arc<Fs>) {
    for number in 0..6 {
        let name = format!("doomed-{number}");
        let doomed = fs.create(ROOT, name.as_bytes(), FILE, 0, &ME).unwrap();
        write(fs, doomed.ino, 0, &[9; 9000], DIRECT).unwrap();
        fs.unlink(ROOT, name.as_bytes(), &ME).unwrap();
    }
    fs.sync().unwrap();
    for number in 0..20 {
        let name = format!("late-{number}");
        let late = fs.create(ROOT, name.as_bytes(), DIR, 0, &ME).unwrap();
        fs.create(late.ino, b"inside", FILE, 0, &ME).unwrap();
        if number % 3 == 0 {
            fs.unlink(late.ino, b"inside", &ME).unwrap();
            fs.rmdir(ROOT, name.as_bytes(), &ME).unwrap();
        }
    }
    fs.sync().unwrap();
}

/// What becomes of the mount that fills an image.
#[derive(Clone, Copy, Eq, PartialEq)]
enum End {
    Unmount,
    PowerCut,
}

fn make(name: &'static str, args: &[&str], size: &str, end: End) -> Option<Base> {
    let scratch = Scratch::new();
    let tree = scratch.path("tree");
    source(&tree);
    let from = ["-d", tree.to_str().unwrap(), "-N", "256"];
    // The same image in each run, or a seed would mean nothing in the next.
    let uuid = "4f1d6c52-7f0a-4b1e-9d3c-0a5b6c7d8e9f";
    let hash_seed = format!("hash_seed={uuid}");
    let fixed = ["-U", uuid, "-E", &hash_seed];
    let image = scratch.try_mkfs(&[args, &from, &fixed].concat(), size)?;
    let path = scratch.path("indexed");
    image.save(&path).unwrap();
    run("e2fsck", &["-fyD"], &path);
    let image = Image::open(&path).unwrap();
    let disk = CrashDisk::from_image("base", image, Timing::AtOnce);
    let dev: DynDevice = disk.clone();
    let fs = Fs::mount(dev, MountOptions::default()).unwrap();
    fill(&fs);
    if end == End::PowerCut {
        leave(&fs);
        let image = disk.point().durable();
        fs.unmount().unwrap();
        return Some(Base::new(name, image));
    }
    fs.unmount().unwrap();
    scratch.check(&disk.live()).unwrap();
    Some(Base::new(name, disk.live()))
}

type Recipe = (&'static str, Vec<&'static str>, &'static str, End);

fn recipes() -> Vec<Recipe> {
    let ext4 = |more: &[&'static str]| [&["-t", "ext4"], more].concat();
    let no_csum = "^metadata_csum,uninit_bg";
    let orphan = "metadata_csum,orphan_file";
    vec![
        (
            "ext4 1k",
            ext4(&["-b", "1024", "-J", "size=1"]),
            "12M",
            End::Unmount,
        ),
        (
            "ext4 4k",
            ext4(&["-b", "4096", "-J", "size=4"]),
            "20M",
            End::Unmount,
        ),
        (
            "no csum",
            ext4(&["-b", "1024", "-O", no_csum, "-J", "size=1"]),
            "12M",
            End::Unmount,
        ),
        (
            "ext3",
            vec!["-t", "ext3", "-b", "1024", "-J", "size=1"],
            "12M",
            End::Unmount,
        ),
        (
            "ext2",
            vec!["-t", "ext2", "-b", "1024", "-I", "128"],
            "12M",
            End::Unmount,
        ),
        (
            "ext2 4k",
            vec!["-t", "ext2", "-b", "4096"],
            "16M",
            End::Unmount,
        ),
        (
            "log 1k",
            ext4(&["-b", "1024", "-J", "size=1"]),
            "12M",
            End::PowerCut,
        ),
        (
            "log no csum",
            ext4(&["-b", "1024", "-O", no_csum, "-J", "size=1"]),
            "12M",
            End::PowerCut,
        ),
        (
            "log orphan",
            ext4(&["-b", "1024", "-O", orphan, "-J", "size=1"]),
            "12M",
            End::PowerCut,
        ),
        (
            "groups",
            ext4(&["-b", "1024", "-g", "1024", "-O", "^flex_bg", "-J", "size=1"]),
            "12M",
            End::Unmount,
        ),
    ]
}

/// All images that this machine's mke2fs can make.
pub fn bases() -> Vec<Base> {
    let made: Vec<_> = recipes()
        .into_iter()
        .filter_map(|(name, args, size, end)| make(name, &args, size, end))
        .collect();
    assert!(made.len() >= 8, "mke2fs made only {} images", made.len());
    made
}

/// One of them.
#[allow(dead_code, reason = "not every test needs it")]
pub fn named(want: &str) -> Base {
    let recipe = recipes().into_iter().find(|recipe| recipe.0 == want);
    let (name, args, size, end) = recipe.unwrap();
    make(name, &args, size, end).unwrap()
}
