//! Seeded damage to an image.

use blockstack::backend::mem::Image;

use super::base::{Base, Parts, Role, le16, le32};
use crate::storm::Random;

/// Gives a damaged copy of the image.
pub fn damage(base: &Base, random: &mut Random) -> Image {
    let mut image = base.image.clone();
    let mut sealed = random.one_in(2);
    let mut touched = Vec::new();
    for _ in 0..=random.below(8) {
        let kind = random.below(base.kinds.len() as u64) as usize;
        let kind = &base.kinds[kind];
        let (block, role) = kind[random.below(kind.len() as u64) as usize];
        touched.push(block);
        if random.one_in(12) {
            free_in_use(base, &mut image, random, &mut touched);
            // With a wrong count nobody would allocate there.
            sealed = true;
            continue;
        }
        if random.one_in(12) {
            swap_or_copy(base, &mut image, block, random, &mut touched);
            continue;
        }
        let place = place(base, &mut image, block, role, random);
        let size = base.geo.block_size as usize;
        touched.push((place / size) as u64);
        change(base, &mut image, place, role == Role::Journal, random);
    }
    if sealed {
        base.seal(&mut image, &touched);
    }
    image
}

fn any_block(base: &Base, random: &mut Random) -> u64 {
    let kind = &base.kinds[random.below(base.kinds.len() as u64) as usize];
    kind[random.below(kind.len() as u64) as usize].0
}

/// Lets a group offer little but what is in use.
fn free_in_use(base: &Base, image: &mut Image, random: &mut Random, touched: &mut Vec<u64>) {
    let geo = &base.geo;
    let parts = Parts { geo, image };
    let of_inodes = random.one_in(4);
    let mut chosen = Vec::new();
    for _ in 0..=random.below(6) {
        chosen.push(if of_inodes {
            geo.group_of_ino(base.inos[random.below(base.inos.len() as u64) as usize])
        } else {
            geo.group_of_block(any_block(base, random).max(1))
        });
    }
    let Some(&(group, _)) = chosen.first() else {
        return;
    };
    let field = if of_inodes { 4 } else { 0 };
    let bitmap = u64::from(le32(&parts.desc(group), field));
    if bitmap >= geo.blocks_count {
        return;
    }
    let mut bytes = vec![255; geo.block_size as usize];
    for &(_, index) in chosen.iter().filter(|it| it.0 == group) {
        bytes[index as usize / 8] &= !(1 << (index % 8));
    }
    let at = parts.at(bitmap);
    parts.image.write_at(at, &bytes);
    touched.push(bitmap);
}

fn swap_or_copy(
    base: &Base,
    image: &mut Image,
    block: u64,
    random: &mut Random,
    touched: &mut Vec<u64>,
) {
    let geo = &base.geo;
    let other = any_block(base, random);
    let parts = Parts { geo, image };
    let (one, two) = (parts.block(block), parts.block(other));
    let (at, other_at) = (parts.at(block), parts.at(other));
    match random.below(4) {
        0 => {
            parts.image.write_at(at, &two);
            parts.image.write_at(other_at, &one);
            touched.push(other);
        }
        1 | 2 => parts.image.write_at(at, &two),
        _ => {
            let byte = if random.one_in(2) { 0 } else { 255 };
            parts.image.write_at(at, &vec![byte; one.len()]);
        }
    }
}

/// A byte of the block that something reads.
fn place(base: &Base, image: &mut Image, block: u64, role: Role, random: &mut Random) -> usize {
    let geo = &base.geo;
    let parts = Parts { geo, image };
    let (at, size) = (parts.at(block), u64::from(geo.block_size));
    let mut below = |n: u64| random.below(n) as usize;
    match role {
        Role::Super => {
            1024 + if below(3) == 0 {
                below(1024)
            } else {
                below(0x108)
            }
        }
        Role::Groups => {
            let group = below(geo.group_count.into()) as u32;
            parts.desc_at(group) + below(geo.desc_size.into())
        }
        Role::InodeTable => {
            let ino = base.inos[below(base.inos.len() as u64)];
            // The inodes all the others hang on, more often.
            let ino = if below(5) == 0 { [2, 8][below(2)] } else { ino };
            let start = parts.inode_at(ino).unwrap_or(at);
            let end = usize::from(geo.inode_size);
            match below(4) {
                0 => start + below(end as u64),
                1 => start + below(36),
                2 => start + 128 + below(end as u64 - 127).min(31),
                _ => start + 40 + below(64),
            }
        }
        Role::Extents(_) => {
            let most = [36, size][below(2)];
            at + below(most)
        }
        Role::Directory(_) if below(3) > 0 => {
            let bytes = parts.block(block);
            let mut offset = 0;
            for _ in 0..below(20) {
                let next = offset + usize::from(le16(&bytes, offset + 4)).max(8);
                if next + 8 > bytes.len() {
                    break;
                }
                offset = next;
            }
            at + offset + below(8)
        }
        Role::Directory(_) | Role::Attributes | Role::Journal => {
            let most = [96, size][below(2)];
            at + below(most)
        }
        Role::Pointers | Role::Orphans(_) | Role::Data => at + below(size),
        Role::BlockBitmap(group) => at + below(u64::from(geo.group_blocks(group) / 8).max(1)),
        Role::InodeBitmap(_) => at + below(u64::from(geo.inodes_per_group / 8)),
    }
    .min(at_most(base))
}

fn at_most(base: &Base) -> usize {
    ((base.geo.blocks_count << base.geo.block_bits) - 8) as usize
}

fn change(base: &Base, image: &mut Image, place: usize, is_journal: bool, random: &mut Random) {
    let mut old = [0; 4];
    let aligned = place & !3;
    image.read_at(aligned, &mut old);
    let word = le32(&old, 0);
    let near = [
        0,
        1,
        u32::MAX,
        u32::MAX - 1,
        1 << 31,
        word.wrapping_add(1),
        word.wrapping_sub(1),
        word << 1,
    ];
    let value = match random.below(4) {
        0 | 1 => near[random.below(near.len() as u64) as usize],
        // Another structure's block, or another inode: two owners of one thing.
        2 if random.one_in(2) => any_block(base, random) as u32,
        2 => base.inos[random.below(base.inos.len() as u64) as usize],
        _ => random.next() as u32,
    };
    let bytes = if is_journal {
        value.to_be_bytes()
    } else {
        value.to_le_bytes()
    };
    match random.below(8) {
        0 | 1 => {
            let mut byte = [0];
            image.read_at(place, &mut byte);
            byte[0] ^= 1 << random.below(8);
            image.write_at(place, &byte);
        }
        2 => image.write_at(place, &[if random.one_in(2) { 0 } else { 255 }]),
        3 | 4 => {
            let half = if is_journal { &bytes[2..] } else { &bytes[..2] };
            image.write_at(place & !1, half);
        }
        _ => image.write_at(aligned, &bytes),
    }
}
