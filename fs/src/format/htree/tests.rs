use super::*;

const SEED: [u32; 4] = [0x6745_2301, 0xefcd_ab89, 0x6745_2301, 0xefcd_ab89];

fn long() -> String {
    "\u{e9}".repeat(40) + "x"
}

/// Made with `debugfs -R "dx_hash -h N -s 01234567-89ab-cdef-0123-456789abcdef NAME"`.
#[test]
fn hashes_are_those_of_debugfs() {
    let plain = "hello_world_this_is_a_long_name_over_thirty_two_bytes";
    let accents = "\u{fc}n\u{ef}c\u{f6}d\u{e9}";
    let long = long();
    let cases: &[(u8, &str, u32, u32)] = &[
        (0, "a", 0xe74b_53e2, 0),
        (1, "a", 0x35dc_0cc4, 0x3f1d_acef),
        (2, "a", 0x6d0e_a4c0, 0xc189_22df),
        (0, "abc", 0x75af_d992, 0),
        (1, "abc", 0xa68e_7118, 0x02bd_12cf),
        (2, "abc", 0xb143_5ec4, 0x3f7e_aa0e),
        (0, plain, 0xa465_1aca, 0),
        (1, plain, 0xb082_f130, 0x1347_a4aa),
        (2, plain, 0x369e_299e, 0x2d6a_4163),
        (0, accents, 0x225a_136c, 0),
        (1, accents, 0x973d_15d0, 0xfef4_68a7),
        (2, accents, 0xe7b7_3cae, 0xebed_1bcc),
        (3, accents, 0x3cb9_c78c, 0),
        (4, accents, 0xf10d_f150, 0x0187_0c9d),
        (5, accents, 0x2696_7c0c, 0x58f9_d9c4),
        (0, &long, 0x7ec1_9156, 0),
        (1, &long, 0x859c_4eb0, 0x5b4c_3057),
        (2, &long, 0xa088_b20c, 0x4af8_3018),
        (3, &long, 0xa63a_5226, 0),
        (4, &long, 0xa8ee_d8b4, 0xcbe6_efe0),
        (5, &long, 0xd1b6_6d8e, 0xdd6e_6294),
    ];
    let start = Hasher {
        kind: HashKind::HalfMd4,
        sign: CharSign::Signed,
        seed: [0; 4],
    };
    assert_eq!(
        start.hash(b"abc"),
        NameHash {
            major: 0xd196_a868,
            minor: 0xc420_eb28
        }
    );
    let seed = SEED;
    for &(version, name, major, minor) in cases {
        let sign = if version < 3 {
            CharSign::Signed
        } else {
            CharSign::Unsigned
        };
        let kind = HashKind::from_raw(version % 3).unwrap();
        let hasher = Hasher { kind, sign, seed };
        let want = NameHash { major, minor };
        assert_eq!(hasher.hash(name.as_bytes()), want, "{version} {name}");
    }
}
