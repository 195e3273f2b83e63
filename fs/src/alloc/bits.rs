//! Ranges of bits in an on-disk bitmap: bit `i` is bit `i % 8` of byte `i / 8`.

/// Calls `f` with each byte that bits `start..start + len` touch and the mask of those in it.
fn each(start: u32, len: u32, mut f: impl FnMut(usize, u8) -> bool) -> bool {
    let end = u64::from(start) + u64::from(len);
    let mut pos = u64::from(start);
    while pos < end {
        let shift = (pos % 8) as u32;
        let n = (end - pos).min(u64::from(8 - shift)) as u32;
        let mask = (0xffu8 >> (8 - n)) << shift;
        if !f((pos / 8) as usize, mask) {
            return false;
        }
        pos += u64::from(n);
    }
    true
}

/// Tells whether all bits of a range are set; those outside the bitmap are not.
pub(super) fn all_set(bitmap: &[u8], start: u32, len: u32) -> bool {
    each(start, len, |i, mask| {
        bitmap.get(i).is_some_and(|b| b & mask == mask)
    })
}

/// Tells whether all bits of a range are clear; those outside the bitmap are not.
pub(super) fn all_clear(bitmap: &[u8], start: u32, len: u32) -> bool {
    each(start, len, |i, mask| {
        bitmap.get(i).is_some_and(|b| b & mask == 0)
    })
}

/// Counts the bits of a range that are set.
pub(super) fn count(bitmap: &[u8], start: u32, len: u32) -> u32 {
    let mut ones = 0;
    each(start, len, |i, mask| {
        ones += bitmap.get(i).map_or(0, |b| (b & mask).count_ones());
        true
    });
    ones
}

/// Sets the bits of a range.
pub(super) fn set(bitmap: &mut [u8], start: u32, len: u32) {
    each(start, len, |i, mask| {
        bitmap.get_mut(i).map(|b| *b |= mask).is_some()
    });
}

/// Clears the bits of a range.
pub(super) fn clear(bitmap: &mut [u8], start: u32, len: u32) {
    each(start, len, |i, mask| {
        bitmap.get_mut(i).map(|b| *b &= !mask).is_some()
    });
}

#[cfg(test)]
mod tests {
    use super::{all_clear, all_set, clear, count, set};

    #[test]
    fn ranges_begin_and_end_inside_bytes() {
        for start in 0..20u32 {
            for len in 1..20u32 {
                let mut map = [0u8; 5];
                set(&mut map, start, len);
                for bit in 0..40 {
                    let want = (start..start + len).contains(&bit);
                    assert_eq!(all_set(&map, bit, 1), want);
                    assert_eq!(all_clear(&map, bit, 1), !want);
                }
                assert!(all_set(&map, start, len) && !all_set(&map, start, len + 1));
                assert_eq!(count(&map, 0, 50), len);
                assert_eq!(count(&map, start + 1, 40), len - 1);
                clear(&mut map, start, len);
                assert_eq!(map, [0; 5]);
            }
        }
        assert!(!all_set(&[0xff], 4, 8) && !all_clear(&[0], 4, 8));
    }
}
