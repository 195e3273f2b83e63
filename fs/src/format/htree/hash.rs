//! The name hashes of indexed directories.
//!
//! Format: Linux `Documentation/filesystems/ext4/directory.rst`, section "Hash Tree Directories".

/// A hash function for names, without its seed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum HashKind {
    /// The first one; has no minor hash.
    Legacy,
    /// MD4 cut to three rounds; today's default.
    HalfMd4,
    /// Tiny encryption algorithm.
    Tea,
}

impl HashKind {
    /// Decodes the byte of an index root or of the superblock.
    pub fn from_raw(raw: u8) -> Option<Self> {
        match raw {
            0 => Some(Self::Legacy),
            1 => Some(Self::HalfMd4),
            2 => Some(Self::Tea),
            _ => None,
        }
    }

    /// Encodes for an index root.
    pub fn to_raw(self) -> u8 {
        match self {
            Self::Legacy => 0,
            Self::HalfMd4 => 1,
            Self::Tea => 2,
        }
    }
}

/// Whether the machine that made the file system had a signed `char`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CharSign {
    /// Bytes are -128..=127.
    Signed,
    /// Bytes are 0..=255.
    Unsigned,
}

impl CharSign {
    #[inline]
    fn widen(self, byte: u8) -> u32 {
        match self {
            Self::Signed => {
                let signed = i32::from(i8::from_le_bytes([byte]));
                u32::from_le_bytes(signed.to_le_bytes())
            }
            Self::Unsigned => u32::from(byte),
        }
    }
}

/// A hash function with everything that decides its values.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Hasher {
    /// Which function.
    pub kind: HashKind,
    /// How bytes widen.
    pub sign: CharSign,
    /// The superblock's `s_hash_seed`; all zero means the standard start values.
    pub seed: [u32; 4],
}

/// The hash of a name; bit 0 of `major` is always 0.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct NameHash {
    /// Orders the index.
    pub major: u32,
    /// Orders names of one `major` while listing; not on disk.
    pub minor: u32,
}

/// The last value a hash may have shifted left by one: directory offsets end there.
const EOF: u32 = 0xffff_fffe;
const START: [u32; 4] = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476];

impl Hasher {
    /// Hashes `name`.
    pub fn hash(&self, name: &[u8]) -> NameHash {
        let start = if self.seed == [0; 4] {
            START
        } else {
            self.seed
        };
        let (major, minor) = match self.kind {
            HashKind::Legacy => (self.legacy(name), 0),
            HashKind::HalfMd4 => {
                let mut state = start;
                for chunk in name.chunks(32).enumerate() {
                    let words = self.words::<8>(chunk.1, name.len() - 32 * chunk.0);
                    half_md4(&mut state, &words);
                }
                (state[1], state[2])
            }
            HashKind::Tea => {
                let mut state = start;
                for chunk in name.chunks(16).enumerate() {
                    let words = self.words::<4>(chunk.1, name.len() - 16 * chunk.0);
                    tea(&mut state, &words);
                }
                (state[0], state[1])
            }
        };
        let major = major & !1;
        let major = if major == EOF { EOF - 2 } else { major };
        NameHash { major, minor }
    }

    fn legacy(&self, name: &[u8]) -> u32 {
        let (mut hash0, mut hash1) = (0x12a3_fe2d_u32, 0x37ab_e8f9_u32);
        for &byte in name {
            let mixed = hash0 ^ self.sign.widen(byte).wrapping_mul(7_152_373);
            let mut hash = hash1.wrapping_add(mixed);
            if hash & 0x8000_0000 != 0 {
                hash = hash.wrapping_sub(0x7fff_ffff);
            }
            hash1 = hash0;
            hash0 = hash;
        }
        hash0 << 1
    }

    /// Packs bytes big end first into `N` words, padded with the length of what is left of the
    /// name.
    #[inline]
    fn words<const N: usize>(&self, bytes: &[u8], left: usize) -> [u32; N] {
        // A name has at most 255 bytes, so the length fits the byte it is repeated from.
        let len = u32::try_from(left).unwrap_or(u32::MAX);
        let pad = len | (len << 8);
        let pad = pad | (pad << 16);
        let mut words = [pad; N];
        for (word, quad) in words.iter_mut().zip(bytes.chunks(4)) {
            *word = quad
                .iter()
                .fold(pad, |val, &b| self.sign.widen(b).wrapping_add(val << 8));
        }
        words
    }
}

fn tea(state: &mut [u32; 4], words: &[u32; 4]) {
    const DELTA: u32 = 0x9e37_79b9;
    let [mut b0, mut b1, ..] = *state;
    let [a, b, c, d] = *words;
    let mut sum = 0_u32;
    for _ in 0..16 {
        sum = sum.wrapping_add(DELTA);
        b0 = b0.wrapping_add(
            (b1 << 4).wrapping_add(a) ^ b1.wrapping_add(sum) ^ (b1 >> 5).wrapping_add(b),
        );
        b1 = b1.wrapping_add(
            (b0 << 4).wrapping_add(c) ^ b0.wrapping_add(sum) ^ (b0 >> 5).wrapping_add(d),
        );
    }
    state[0] = state[0].wrapping_add(b0);
    state[1] = state[1].wrapping_add(b1);
}

fn half_md4(state: &mut [u32; 4], words: &[u32; 8]) {
    const ROUND2: u32 = 0x5a82_7999;
    const ROUND3: u32 = 0x6ed9_eba1;
    let choose = |x: u32, y: u32, z: u32| z ^ (x & (y ^ z));
    let majority = |x: u32, y: u32, z: u32| (x & y).wrapping_add((x ^ y) & z);
    let parity = |x: u32, y: u32, z: u32| x ^ y ^ z;

    let [mut a, mut b, mut c, mut d] = *state;
    // After each step the four registers turn by one place.
    let mut step = |mixed: fn(u32, u32, u32) -> u32, add: u32, rotate: u32| {
        let next = a
            .wrapping_add(mixed(b, c, d))
            .wrapping_add(add)
            .rotate_left(rotate);
        (a, d, c, b) = (d, c, b, next);
    };
    for (i, rotate) in [3, 7, 11, 19, 3, 7, 11, 19].into_iter().enumerate() {
        step(choose, words[i], rotate);
    }
    for (i, rotate) in [1, 3, 5, 7, 0, 2, 4, 6]
        .into_iter()
        .zip([3, 5, 9, 13, 3, 5, 9, 13])
    {
        step(majority, words[i].wrapping_add(ROUND2), rotate);
    }
    for (i, rotate) in [3, 7, 2, 6, 1, 5, 0, 4]
        .into_iter()
        .zip([3, 9, 11, 15, 3, 9, 11, 15])
    {
        step(parity, words[i].wrapping_add(ROUND3), rotate);
    }
    for (word, add) in state.iter_mut().zip([a, b, c, d]) {
        *word = word.wrapping_add(add);
    }
}
