//! Every field of an image's metadata, by name, and one of them damaged.

use std::fmt;

use blockstack::backend::mem::Image;

use crate::base::{Base, Parts, Role, le16, le32};
use crate::storm::Random;

/// A field: its name, where it is, how long, and which end first.
#[derive(Clone, Debug)]
pub struct Site {
    name: String,
    at: usize,
    len: usize,
    is_big_endian: bool,
    block: u64,
}

/// What was done.
pub struct Damage {
    pub field: String,
    at: usize,
    old: u64,
    new: u64,
    is_sealed: bool,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sealed = if self.is_sealed { "sealed" } else { "as it is" };
        write!(
            f,
            "{} at {:#x}: {:#x} -> {:#x}, {sealed}",
            self.field, self.at, self.old, self.new
        )
    }
}

/// The fields of one image, one list for each kind of structure.
pub struct Sites {
    kinds: Vec<Vec<Site>>,
}

type Fields = &'static [(&'static str, usize, usize)];

const SUPER: Fields = &[
    ("s_inodes_count", 0x0, 4),
    ("s_blocks_count_lo", 0x4, 4),
    ("s_r_blocks_count_lo", 0x8, 4),
    ("s_free_blocks_count_lo", 0xc, 4),
    ("s_free_inodes_count", 0x10, 4),
    ("s_first_data_block", 0x14, 4),
    ("s_log_block_size", 0x18, 4),
    ("s_log_cluster_size", 0x1c, 4),
    ("s_blocks_per_group", 0x20, 4),
    ("s_clusters_per_group", 0x24, 4),
    ("s_inodes_per_group", 0x28, 4),
    ("s_mtime", 0x2c, 4),
    ("s_wtime", 0x30, 4),
    ("s_mnt_count", 0x34, 2),
    ("s_max_mnt_count", 0x36, 2),
    ("s_magic", 0x38, 2),
    ("s_state", 0x3a, 2),
    ("s_errors", 0x3c, 2),
    ("s_minor_rev_level", 0x3e, 2),
    ("s_lastcheck", 0x40, 4),
    ("s_checkinterval", 0x44, 4),
    ("s_creator_os", 0x48, 4),
    ("s_rev_level", 0x4c, 4),
    ("s_def_resuid", 0x50, 2),
    ("s_def_resgid", 0x52, 2),
    ("s_first_ino", 0x54, 4),
    ("s_inode_size", 0x58, 2),
    ("s_block_group_nr", 0x5a, 2),
    ("s_feature_compat", 0x5c, 4),
    ("s_feature_incompat", 0x60, 4),
    ("s_feature_ro_compat", 0x64, 4),
    ("s_uuid", 0x68, 4),
    ("s_reserved_gdt_blocks", 0xce, 2),
    ("s_journal_uuid", 0xd0, 4),
    ("s_journal_inum", 0xe0, 4),
    ("s_journal_dev", 0xe4, 4),
    ("s_last_orphan", 0xe8, 4),
    ("s_hash_seed", 0xec, 4),
    ("s_def_hash_version", 0xfc, 1),
    ("s_jnl_backup_type", 0xfd, 1),
    ("s_desc_size", 0xfe, 2),
    ("s_default_mount_opts", 0x100, 4),
    ("s_first_meta_bg", 0x104, 4),
    ("s_mkfs_time", 0x108, 4),
    ("s_jnl_blocks", 0x10c, 4),
    ("s_blocks_count_hi", 0x150, 4),
    ("s_r_blocks_count_hi", 0x154, 4),
    ("s_free_blocks_count_hi", 0x158, 4),
    ("s_min_extra_isize", 0x15c, 2),
    ("s_want_extra_isize", 0x15e, 2),
    ("s_flags", 0x160, 4),
    ("s_raid_stride", 0x164, 2),
    ("s_mmp_block", 0x168, 8),
    ("s_log_groups_per_flex", 0x174, 1),
    ("s_checksum_type", 0x175, 1),
    ("s_usr_quota_inum", 0x240, 4),
    ("s_grp_quota_inum", 0x244, 4),
    ("s_overhead_clusters", 0x248, 4),
    ("s_backup_bgs", 0x24c, 4),
    ("s_lpf_ino", 0x268, 4),
    ("s_prj_quota_inum", 0x26c, 4),
    ("s_checksum_seed", 0x270, 4),
    ("s_orphan_file_inum", 0x280, 4),
    ("s_checksum", 0x3fc, 4),
];

const GROUP: Fields = &[
    ("bg_block_bitmap_lo", 0x0, 4),
    ("bg_inode_bitmap_lo", 0x4, 4),
    ("bg_inode_table_lo", 0x8, 4),
    ("bg_free_blocks_count_lo", 0xc, 2),
    ("bg_free_inodes_count_lo", 0xe, 2),
    ("bg_used_dirs_count_lo", 0x10, 2),
    ("bg_flags", 0x12, 2),
    ("bg_exclude_bitmap_lo", 0x14, 4),
    ("bg_block_bitmap_csum_lo", 0x18, 2),
    ("bg_inode_bitmap_csum_lo", 0x1a, 2),
    ("bg_itable_unused_lo", 0x1c, 2),
    ("bg_checksum", 0x1e, 2),
];

const GROUP_HIGH: Fields = &[
    ("bg_block_bitmap_hi", 0x20, 4),
    ("bg_inode_bitmap_hi", 0x24, 4),
    ("bg_inode_table_hi", 0x28, 4),
    ("bg_free_blocks_count_hi", 0x2c, 2),
    ("bg_free_inodes_count_hi", 0x2e, 2),
    ("bg_used_dirs_count_hi", 0x30, 2),
    ("bg_itable_unused_hi", 0x32, 2),
    ("bg_block_bitmap_csum_hi", 0x38, 2),
    ("bg_inode_bitmap_csum_hi", 0x3a, 2),
];

const INODE: Fields = &[
    ("i_mode", 0x0, 2),
    ("i_uid", 0x2, 2),
    ("i_size_lo", 0x4, 4),
    ("i_atime", 0x8, 4),
    ("i_ctime", 0xc, 4),
    ("i_mtime", 0x10, 4),
    ("i_dtime", 0x14, 4),
    ("i_gid", 0x18, 2),
    ("i_links_count", 0x1a, 2),
    ("i_blocks_lo", 0x1c, 4),
    ("i_flags", 0x20, 4),
    ("i_version", 0x24, 4),
    ("i_generation", 0x64, 4),
    ("i_file_acl_lo", 0x68, 4),
    ("i_size_high", 0x6c, 4),
    ("i_obso_faddr", 0x70, 4),
    ("i_blocks_high", 0x74, 2),
    ("i_file_acl_high", 0x76, 2),
    ("i_uid_high", 0x78, 2),
    ("i_checksum_lo", 0x7c, 2),
    ("i_reserved", 0x7e, 2),
];

const INODE_EXTRA: Fields = &[
    ("i_extra_isize", 0x80, 2),
    ("i_checksum_hi", 0x82, 2),
    ("i_ctime_extra", 0x84, 4),
    ("i_crtime", 0x90, 4),
    ("i_crtime_extra", 0x94, 4),
    ("i_version_hi", 0x98, 4),
    ("i_projid", 0x9c, 4),
];

const EXTENT_HEADER: Fields = &[
    ("eh_magic", 0, 2),
    ("eh_entries", 2, 2),
    ("eh_max", 4, 2),
    ("eh_depth", 6, 2),
    ("eh_generation", 8, 4),
];

const EXTENT: Fields = &[
    ("ee_block", 0, 4),
    ("ee_len", 4, 2),
    ("ee_start_hi", 6, 2),
    ("ee_start_lo", 8, 4),
];

const EXTENT_INDEX: Fields = &[
    ("ei_block", 0, 4),
    ("ei_leaf_lo", 4, 4),
    ("ei_leaf_hi", 8, 2),
    ("ei_unused", 10, 2),
];

const XATTR_HEADER: Fields = &[
    ("h_magic", 0, 4),
    ("h_refcount", 4, 4),
    ("h_blocks", 8, 4),
    ("h_hash", 12, 4),
    ("h_checksum", 16, 4),
];

const XATTR_ENTRY: Fields = &[
    ("e_name_len", 0, 1),
    ("e_name_index", 1, 1),
    ("e_value_offs", 2, 2),
    ("e_value_inum", 4, 4),
    ("e_value_size", 8, 4),
    ("e_hash", 12, 4),
    ("e_name", 16, 1),
];

const DIRENT: Fields = &[
    ("inode", 0, 4),
    ("rec_len", 4, 2),
    ("name_len", 6, 1),
    ("file_type", 7, 1),
    ("name", 8, 1),
];

const DX_INFO: Fields = &[
    ("dx reserved_zero", 24, 4),
    ("dx hash_version", 28, 1),
    ("dx info_length", 29, 1),
    ("dx indirect_levels", 30, 1),
    ("dx unused_flags", 31, 1),
];

const JOURNAL: Fields = &[
    ("h_magic", 0, 4),
    ("h_blocktype", 4, 4),
    ("s_blocksize", 0xc, 4),
    ("s_maxlen", 0x10, 4),
    ("s_first", 0x14, 4),
    ("s_sequence", 0x18, 4),
    ("s_start", 0x1c, 4),
    ("s_errno", 0x20, 4),
    ("s_feature_compat", 0x24, 4),
    ("s_feature_incompat", 0x28, 4),
    ("s_feature_ro_compat", 0x2c, 4),
    ("s_nr_users", 0x40, 4),
    ("s_checksum_type", 0x50, 1),
    ("s_checksum", 0xfc, 4),
];

/// Gathers the fields of one image.
struct Gather<'a> {
    base: &'a Base,
    image: Image,
    kinds: Vec<(&'static str, Vec<Site>)>,
}

impl Gather<'_> {
    fn add(&mut self, kind: &'static str, what: &str, at: usize, fields: Fields) {
        let bits = self.base.geo.block_bits;
        let sites = fields.iter().map(|&(name, offset, len)| Site {
            name: format!("{what}.{name}"),
            at: at + offset,
            len,
            is_big_endian: kind == "journal",
            block: ((at + offset) >> bits) as u64,
        });
        match self.kinds.iter_mut().find(|it| it.0 == kind) {
            Some((_, list)) => list.extend(sites),
            None => self.kinds.push((kind, sites.collect())),
        }
    }

    fn bytes(&self, block: u64) -> (usize, Vec<u8>) {
        let size = self.base.geo.block_size as usize;
        let mut bytes = vec![0; size];
        let at = block as usize * size;
        self.image.read_at(at, &mut bytes);
        (at, bytes)
    }

    fn extent_node(&mut self, what: &str, at: usize, bytes: &[u8]) {
        self.add("extent", what, at, EXTENT_HEADER);
        let (count, depth) = (usize::from(le16(bytes, 2)), le16(bytes, 6));
        let fields = if depth == 0 { EXTENT } else { EXTENT_INDEX };
        for index in [0, 1, count / 2, count.saturating_sub(1)] {
            if index < count {
                self.add("extent", what, at + 12 + index * 12, fields);
            }
        }
        if bytes.len() > 60 {
            let tail = 12 + 12 * usize::from(le16(bytes, 4));
            self.add("extent", what, at + tail, &[("et_checksum", 0, 4)]);
        }
    }

    fn attributes(&mut self, what: &str, at: usize, bytes: &[u8], first: usize) {
        let mut offset = first;
        while offset + 20 <= bytes.len() && le32(bytes, offset) != 0 {
            self.add("attributes", what, at + offset, XATTR_ENTRY);
            offset += (16 + usize::from(bytes[offset]) + 3) & !3;
        }
        if offset + 4 <= bytes.len() {
            self.add("attributes", what, at + offset, &[("end", 0, 4)]);
        }
        let end = at + bytes.len() - 4;
        self.add("attributes", what, end, &[("value", 0, 4)]);
    }

    fn inode(&mut self, ino: u32) {
        let base = self.base;
        let mut image = self.image.clone();
        let parts = Parts {
            geo: &base.geo,
            image: &mut image,
        };
        let (Some(at), Some(bytes)) = (parts.inode_at(ino), parts.inode(ino)) else {
            return;
        };
        let what = match (ino, le16(&bytes, 0) >> 12) {
            (1..=10, _) => format!("inode {ino}"),
            (_, 4) => "directory inode".to_owned(),
            (_, 8) => "file inode".to_owned(),
            (_, 10) => "link inode".to_owned(),
            _ => "other inode".to_owned(),
        };
        self.add("inode", &what, at, INODE);
        if bytes.len() > 128 {
            self.add("inode", &what, at, INODE_EXTRA);
            let extra = 128 + usize::from(le16(&bytes, 128));
            if bytes.len() >= extra + 8 && le32(&bytes, extra) == 0xea02_0000 {
                self.add("attributes", &what, at + extra, &[("h_magic", 0, 4)]);
                self.attributes(&what, at + extra, &bytes[extra..], 4);
            }
        }
        if le32(&bytes, 0x20) & 0x8_0000 != 0 {
            self.extent_node(&what, at + 40, &bytes[40..100]);
        } else {
            for index in [0, 1, 4, 11, 12, 13, 14] {
                self.add("pointers", &what, at + 40 + index * 4, &[("i_block", 0, 4)]);
            }
        }
    }

    fn directory(&mut self, block: u64) {
        let (at, bytes) = self.bytes(block);
        let size = bytes.len();
        let is_node = usize::from(le16(&bytes, 4)) == size;
        let is_root = le16(&bytes, 4) == 12 && usize::from(le16(&bytes, 16)) == size - 12;
        let is_root = is_root && bytes[29] == 8 && le16(&bytes, 32) > 100;
        if is_root {
            self.add("index", "root", at, DX_INFO);
        }
        if is_root || (is_node && le16(&bytes, 8) > 100) {
            let start = if is_root { 32 } else { 8 };
            let what = if is_root { "root" } else { "node" };
            let fields: Fields = &[("limit", 0, 2), ("count", 2, 2), ("block", 4, 4)];
            self.add("index", what, at + start, fields);
            let (limit, count) = (le16(&bytes, start), usize::from(le16(&bytes, start + 2)));
            for index in [1, count / 2, count - 1] {
                if index > 0 && index < count {
                    let fields: Fields = &[("hash", 0, 4), ("block", 4, 4)];
                    self.add("index", what, at + start + index * 8, fields);
                }
            }
            let tail = start + usize::from(limit) * 8;
            if tail + 8 <= size {
                self.add("index", what, at + tail, &[("dt_checksum", 4, 4)]);
            }
        }
        let mut offset = 0;
        let mut number = 0;
        while offset + 8 <= size && number < 60 {
            let name = match number {
                0 if bytes[offset + 8] == b'.' => "dot",
                1 if bytes[offset + 8] == b'.' => "dotdot",
                _ => "entry",
            };
            self.add("directory", name, at + offset, DIRENT);
            let len = usize::from(le16(&bytes, offset + 4));
            if len < 8 {
                break;
            }
            offset += len;
            number += 1;
        }
        let fields: Fields = &[
            ("det_reserved_zero1", 0, 4),
            ("det_rec_len", 4, 2),
            ("det_reserved_zero2", 6, 1),
            ("det_reserved_ft", 7, 1),
            ("det_checksum", 8, 4),
        ];
        if self.base.geo.metadata_csum() {
            self.add("directory", "tail", at + size - 12, fields);
        }
    }

    fn bitmap(&mut self, kind: &'static str, block: u64, bits: u32) {
        let (at, bytes) = self.bytes(block);
        for number in 0..16 {
            let byte = number * (bits as usize / 8) / 16;
            self.add(kind, "bitmap", at + byte, &[("byte", 0, 1)]);
        }
        self.add(kind, "bitmap", at + bytes.len() - 1, &[("last byte", 0, 1)]);
        let last = (bits as usize / 8).min(bytes.len() - 1);
        self.add(kind, "bitmap", at + last, &[("byte at the end", 0, 1)]);
    }
}

impl Sites {
    pub fn of(base: &Base) -> Self {
        let mut gather = Gather {
            base,
            image: base.image.clone(),
            kinds: Vec::new(),
        };
        let geo = &base.geo;
        gather.add("super", "superblock", 1024, SUPER);
        for group in 0..geo.group_count {
            let (block, offset) = geo.group_desc_at(group);
            let at = ((block as usize) << geo.block_bits) + offset;
            gather.add("group", "group", at, GROUP);
            if geo.desc_size >= 64 {
                gather.add("group", "group", at, GROUP_HIGH);
            }
        }
        let reserved = (1..=10).filter(|ino| !base.inos.contains(ino));
        for ino in reserved.chain(base.inos.iter().copied()) {
            gather.inode(ino);
        }
        let mut has_journal = false;
        for (&block, &role) in &base.roles {
            let (at, bytes) = gather.bytes(block);
            match role {
                Role::Extents(_) => gather.extent_node("extent block", at, &bytes),
                Role::Pointers => {
                    for index in [0, 1, 5, bytes.len() / 4 - 1] {
                        gather.add("pointers", "block", at + index * 4, &[("pointer", 0, 4)]);
                    }
                }
                Role::Directory(_) => gather.directory(block),
                Role::Attributes => {
                    gather.add("attributes", "attribute block", at, XATTR_HEADER);
                    gather.attributes("attribute block", at, &bytes, 32);
                }
                Role::Journal if !has_journal => {
                    has_journal = true;
                    gather.add("journal", "journal", at, JOURNAL);
                }
                Role::Orphans(_) => {
                    let end = at + bytes.len() - 8;
                    let fields: Fields = &[("ob_magic", 0, 4), ("ob_checksum", 4, 4)];
                    gather.add("orphans", "orphan file", at, &[("entry", 0, 4)]);
                    gather.add("orphans", "orphan file", end, fields);
                }
                Role::BlockBitmap(group) => {
                    gather.bitmap("block bitmap", block, geo.group_blocks(group));
                }
                Role::InodeBitmap(_) => {
                    gather.bitmap("inode bitmap", block, geo.inodes_per_group);
                }
                _ => {}
            }
        }
        Self {
            kinds: gather.kinds.into_iter().map(|(_, list)| list).collect(),
        }
    }

    /// Damages one field of a copy of the image.
    pub fn damage(&self, base: &Base, random: &mut Random) -> (Image, Damage) {
        let mut image = base.image.clone();
        let kind = &self.kinds[random.below(self.kinds.len() as u64) as usize];
        let site = &kind[random.below(kind.len() as u64) as usize];
        let mut bytes = [0; 8];
        let field = &mut bytes[..site.len];
        image.read_at(site.at, field);
        if site.is_big_endian {
            field.reverse();
        }
        let old = u64::from_le_bytes(bytes);
        let mask = !0 >> (64 - site.len * 8);
        let new = value(base, old, mask, random) & mask;
        let mut bytes = new.to_le_bytes();
        let field = &mut bytes[..site.len];
        if site.is_big_endian {
            field.reverse();
        }
        image.write_at(site.at, field);
        let is_sealed = random.one_in(2);
        if is_sealed {
            base.seal(&mut image, &[site.block]);
        }
        let damage = Damage {
            field: site.name.clone(),
            at: site.at,
            old,
            new,
            is_sealed,
        };
        (image, damage)
    }
}

fn value(base: &Base, old: u64, mask: u64, random: &mut Random) -> u64 {
    let near = [
        0,
        1,
        mask,
        mask - 1,
        mask >> 1,
        (mask >> 1) + 1,
        old.wrapping_add(1),
        old.wrapping_sub(1),
        old.wrapping_add(4),
        old << 1,
        old >> 1,
    ];
    match random.below(8) {
        0..=3 => near[random.below(near.len() as u64) as usize],
        4 | 5 => old ^ 1 << random.below(u64::from(64 - mask.leading_zeros())),
        6 if random.one_in(2) => {
            let kind = &base.kinds[random.below(base.kinds.len() as u64) as usize];
            kind[random.below(kind.len() as u64) as usize].0
        }
        6 => u64::from(base.inos[random.below(base.inos.len() as u64) as usize]),
        _ => random.next(),
    }
}
