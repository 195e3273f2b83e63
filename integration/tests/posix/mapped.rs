//! Mapped memory, read and write, and `O_DIRECT` see each other's changes.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::{FallocateFlags, OFlags};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use crate::calls::{MAKE, describe, file, make, rename, truncate, unlink};
use crate::case::{Case, Needs, Out};

pub const CASES: &[Case] = &[
    Case {
        name: "every_way_sees_every_way",
        needs: Needs::Ext4,
        run: every_way,
    },
    Case {
        name: "maps_and_sizes",
        needs: Needs::Ext4,
        run: sizes,
    },
    Case {
        name: "behind_the_end",
        needs: Needs::Ext4,
        run: behind_the_end,
    },
    Case {
        name: "collapse_and_insert",
        needs: Needs::Ext4,
        run: collapse_and_insert,
    },
    Case {
        name: "maps_and_holes",
        needs: Needs::Ext4,
        run: holes,
    },
    Case {
        name: "who_may_map",
        needs: Needs::Nothing,
        run: who_may,
    },
    Case {
        name: "maps_outlive",
        needs: Needs::Nothing,
        run: outlive,
    },
    Case {
        name: "direct_alignment",
        needs: Needs::Ext4,
        run: alignment,
    },
];

const PAGE: usize = 4096;
const LEN: usize = 16 * PAGE;
const READ: i32 = libc::PROT_READ;
const BOTH: i32 = libc::PROT_READ | libc::PROT_WRITE;

type Map = MmapRegion<()>;

/// mmap(2) from the start of a file.
fn map_with(file: &File, len: usize, prot: i32, flags: i32) -> Result<Map, String> {
    let file = FileOffset::new(file.try_clone().unwrap(), 0);
    Map::build(Some(file), len, prot, flags).map_err(|error| match error {
        vm_memory::mmap::MmapRegionError::Mmap(error) => format!("{:?}", error.raw_os_error()),
        other => other.to_string(),
    })
}

fn map(file: &File, len: usize) -> Map {
    map_with(file, len, BOTH, libc::MAP_SHARED).unwrap()
}

fn put(map: &Map, at: usize, bytes: &[u8]) {
    map.get_slice(at, bytes.len()).unwrap().copy_from(bytes);
}

fn get(map: &Map, at: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    map.get_slice(at, len).unwrap().copy_to(&mut bytes);
    bytes
}

/// Memory on a page boundary, as `O_DIRECT` wants it.
struct Page(Vec<u8>);

impl Page {
    fn new(byte: u8) -> Self {
        Self(vec![byte; 2 * PAGE])
    }

    fn bytes(&mut self) -> &mut [u8] {
        let start = self.0.as_ptr().align_offset(PAGE);
        &mut self.0[start..start + PAGE]
    }
}

/// One file, opened and mapped in several ways.
struct Ways {
    buffered: File,
    direct: File,
    map: Map,
    other_map: Map,
}

const WAYS: [&str; 4] = ["buffered", "direct", "mapped", "mapped elsewhere"];

impl Ways {
    fn new(path: &str) -> Self {
        let buffered = file(path, OFlags::RDWR);
        let direct = file(path, OFlags::RDWR | OFlags::DIRECT);
        let map_it = || map(&file(path, OFlags::RDWR), LEN);
        let (map, other_map) = (map_it(), map_it());
        Self {
            buffered,
            direct,
            map,
            other_map,
        }
    }

    /// Fills a page.
    fn write(&self, way: usize, page: usize, byte: u8) -> bool {
        let at = page * PAGE;
        match way {
            0 => self.buffered.write_all_at(&[byte; PAGE], at as u64).is_ok(),
            1 => {
                let mut memory = Page::new(byte);
                self.direct.write_all_at(memory.bytes(), at as u64).is_ok()
            }
            2 => {
                put(&self.map, at, &[byte; PAGE]);
                true
            }
            _ => {
                put(&self.other_map, at, &[byte; PAGE]);
                true
            }
        }
    }

    /// What a page is full of.
    fn read(&self, way: usize, page: usize) -> Option<u8> {
        let at = page * PAGE;
        let mut bytes = vec![0; PAGE];
        match way {
            0 => self.buffered.read_exact_at(&mut bytes, at as u64).ok()?,
            1 => {
                let mut memory = Page::new(0);
                self.direct.read_exact_at(memory.bytes(), at as u64).ok()?;
                bytes.copy_from_slice(memory.bytes());
            }
            2 => bytes = get(&self.map, at, PAGE),
            _ => bytes = get(&self.other_map, at, PAGE),
        }
        let first = bytes[0];
        bytes.iter().all(|&byte| byte == first).then_some(first)
    }
}

/// What is written in one way is read in each other, whoever looked or wrote before; over blocks, a
/// hole, and preallocated space.
fn every_way(out: &mut Out) {
    for ground in ["blocks", "hole", "preallocated"] {
        make(ground, b"", 0o644);
        let handle = file(ground, OFlags::RDWR);
        match ground {
            "blocks" => {
                handle.write_all_at(&[1; LEN], 0).unwrap();
                handle.sync_all().unwrap();
            }
            "hole" => handle.set_len(LEN as u64).unwrap(),
            _ => {
                let mode = FallocateFlags::empty();
                let space = rustix::fs::fallocate(&handle, mode, 0, LEN as u64);
                out.call(ground, space);
                handle.set_len(LEN as u64).unwrap();
            }
        }
        let ways = Ways::new(ground);
        let mut byte = 1;
        for (first, first_name) in WAYS.iter().enumerate() {
            for (second, second_name) in WAYS.iter().enumerate() {
                let page = first * WAYS.len() + second;
                let label = format!("{ground}, {first_name} then {second_name}");
                byte += 1;
                let look = |way| ways.read(way, page);
                out.note(format!("{label}, before"), [0, 1, 2, 3].map(look));
                let wrote = ways.write(first, page, byte);
                out.note(&label, (wrote, [1, 0, 3, 2].map(look)));
                byte += 1;
                let wrote = ways.write(second, page, byte);
                out.note(format!("{label}, over"), (wrote, [2, 1, 0, 3].map(look)));
                byte += 1;
                // Two changes of one page, in both ways, without a look between.
                let wrote = ways.write(first, page, byte) && ways.write(second, page, byte + 1);
                byte += 1;
                out.note(format!("{label}, both"), (wrote, [1, 2, 0, 3].map(look)));
            }
        }
        handle.sync_all().unwrap();
        out.text(ground, describe(ground));
    }
    // Parts of a page.
    make("parts", &[1; 2 * PAGE], 0o644);
    let handle = file("parts", OFlags::RDWR);
    let shared = map(&handle, 2 * PAGE);
    put(&shared, 10, b"mapped");
    handle.write_all_at(b"written", 14).unwrap();
    put(&shared, PAGE - 2, b"over");
    let mut bytes = vec![0; 24];
    handle.read_exact_at(&mut bytes, 4).unwrap();
    out.note("parts by read", bytes);
    out.note("parts by map", get(&shared, 4, 24));
    let mut page = Page::new(0);
    let direct = file("parts", OFlags::RDWR | OFlags::DIRECT);
    direct.read_exact_at(page.bytes(), 0).unwrap();
    out.note("parts by direct", page.bytes()[4..28].to_vec());
    out.note("over two pages", get(&shared, PAGE - 3, 6));
}

/// What stands behind the end in the last page is not the file's.
fn behind_the_end(out: &mut Out) {
    let handle = file("f", MAKE);
    handle.write_all_at(&[1; 2 * PAGE], 0).unwrap();
    let shared = map(&handle, 2 * PAGE);
    truncate("f", 100).unwrap();
    put(&shared, 100, b"lost");
    truncate("f", 2 * PAGE as u64).unwrap();
    out.note("grown", get(&shared, 98, 8));
    let mut bytes = vec![0; 8];
    handle.read_exact_at(&mut bytes, 98).unwrap();
    out.note("grown, read", &bytes);
    truncate("f", 200).unwrap();
    put(&shared, 200, b"lost again");
    handle.write_all_at(b"far", 5000).unwrap();
    handle.read_exact_at(&mut bytes, 198).unwrap();
    out.note("written behind", bytes);
}

fn sizes(out: &mut Out) {
    let handle = file("f", MAKE);
    handle.write_all_at(&[1; 2 * PAGE], 0).unwrap();
    let shared = map(&handle, 2 * PAGE);
    truncate("f", 100).unwrap();
    out.note("behind the end", get(&shared, 98, 4));
    out.text("its size", describe("f"));
    truncate("f", 2 * PAGE as u64).unwrap();
    out.note("grown", get(&shared, 98, 8));
    out.note("grown, the next page", get(&shared, PAGE, 4));
    put(&shared, PAGE, b"kept");
    let mut bytes = vec![0; 8];
    handle.read_exact_at(&mut bytes, 98).unwrap();
    out.note("grown, read", bytes);
    handle.sync_all().unwrap();
    out.note("all of it", crc32c::crc32c(&std::fs::read("f").unwrap()));
    // Growing under a map that is larger.
    make("g", b"small", 0o644);
    let large = file("g", OFlags::RDWR);
    large.set_len(LEN as u64).unwrap();
    let shared = map(&large, LEN);
    large.set_len(5).unwrap();
    large.set_len(3 * PAGE as u64).unwrap();
    put(&shared, 2 * PAGE, b"here");
    large.sync_all().unwrap();
    out.note("g", crc32c::crc32c(&std::fs::read("g").unwrap()));
    out.text("g", describe("g"));
}

/// A file of 16 pages, each full of its number from 1 on.
fn numbered(name: &str) -> File {
    let handle = file(name, MAKE);
    for page in 0..16_u8 {
        let at = u64::from(page) * PAGE as u64;
        handle.write_all_at(&[page + 1; PAGE], at).unwrap();
    }
    handle
}

fn collapse_and_insert(out: &mut Out) {
    change_range(out, "collapse", FallocateFlags::COLLAPSE_RANGE);
    change_range(out, "insert", FallocateFlags::INSERT_RANGE);
}

/// Four pages of a mapped file are changed by `fallocate`.
fn change_range(out: &mut Out, name: &str, flags: FallocateFlags) {
    let handle = numbered(name);
    let shared = map(&handle, LEN);
    put(&shared, 3 * PAGE, &[99]);
    let page = PAGE as u64;
    let result = rustix::fs::fallocate(&handle, flags, 2 * page, 4 * page);
    out.call(name, result);
    let first: Vec<_> = (0..12)
        .map(|page| get(&shared, page * PAGE, 1)[0])
        .collect();
    out.note(format!("{name}, mapped"), first);
    let content = std::fs::read(name).unwrap();
    out.note(
        format!("{name}, read"),
        (content.len(), crc32c::crc32c(&content)),
    );
    put(&shared, 2 * PAGE, &[77]);
    handle.sync_all().unwrap();
    out.note(
        format!("{name}, after"),
        crc32c::crc32c(&std::fs::read(name).unwrap()),
    );
}

fn holes(out: &mut Out) {
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    change_range(out, "punch", punch);
    change_range(out, "zero", FallocateFlags::ZERO_RANGE);
    let handle = numbered("source");
    let shared = map(&handle, LEN);
    put(&shared, 5, b"not yet written");
    let copy = file("copy", MAKE);
    copy.set_len(LEN as u64).unwrap();
    let copy_map = map(&copy, LEN);
    put(&copy_map, 0, b"overwritten");
    let copied = rustix::fs::copy_file_range(&handle, None, &copy, None, LEN);
    out.value("copied", copied);
    out.note("copy, mapped", get(&copy_map, 0, 24));
    out.note("copy", crc32c::crc32c(&std::fs::read("copy").unwrap()));
    let hole = file("sparse", MAKE);
    hole.set_len(LEN as u64).unwrap();
    let sparse = map(&hole, LEN);
    put(&sparse, 7 * PAGE, b"data");
    drop(sparse);
    hole.sync_all().unwrap();
    out.note("blocks", hole.metadata().unwrap().blocks() > 0);
}

fn who_may(out: &mut Out) {
    make("f", &[1; PAGE], 0o644);
    for (open_name, flags) in [
        ("r", OFlags::RDONLY),
        ("w", OFlags::WRONLY),
        ("rw", OFlags::RDWR),
        ("append", OFlags::RDWR | OFlags::APPEND),
        ("direct", OFlags::RDWR | OFlags::DIRECT),
    ] {
        let handle = file("f", flags);
        for (name, prot, kind) in [
            ("shared to read", READ, libc::MAP_SHARED),
            ("shared to write", BOTH, libc::MAP_SHARED),
            ("private to read", READ, libc::MAP_PRIVATE),
            ("private to write", BOTH, libc::MAP_PRIVATE),
        ] {
            let made = map_with(&handle, PAGE, prot, kind).map(|_| ());
            out.note(format!("{name}, {open_name}"), made);
        }
    }
    let private = map_with(&file("f", OFlags::RDONLY), PAGE, BOTH, libc::MAP_PRIVATE).unwrap();
    put(&private, 0, b"mine");
    out.note("private", get(&private, 0, 5));
    out.note("the file", std::fs::read("f").unwrap()[..5].to_vec());
    let whole = map(&file("f", OFlags::RDWR), PAGE);
    put(&whole, 4, b"!");
    out.note("private sees", get(&private, 0, 5));
}

fn outlive(out: &mut Out) {
    let handle = file("f", MAKE);
    handle.set_len(LEN as u64).unwrap();
    let shared = map(&handle, LEN);
    drop(handle);
    put(&shared, 0, b"after close");
    out.note("read", std::fs::read("f").unwrap()[..11].to_vec());
    rename("f", "g").unwrap();
    put(&shared, PAGE, b"after rename");
    out.note(
        "read",
        std::fs::read("g").unwrap()[PAGE..PAGE + 12].to_vec(),
    );
    unlink("g").unwrap();
    put(&shared, 2 * PAGE, b"after unlink");
    out.note("still there", get(&shared, 2 * PAGE, 12));
    drop(shared);
    // Changes reach the file though nobody asked for it.
    let handle = file("h", MAKE);
    handle.set_len(LEN as u64).unwrap();
    let shared = map(&handle, LEN);
    put(&shared, 3 * PAGE, b"unasked");
    drop((shared, handle));
    let content = std::fs::read("h").unwrap();
    out.note("unasked", content[3 * PAGE..3 * PAGE + 7].to_vec());
}

/// Sizes and places that direct I/O takes or refuses.
fn alignment(out: &mut Out) {
    make("f", &[5; LEN], 0o644);
    let direct = file("f", OFlags::RDWR | OFlags::DIRECT);
    for (offset, skip, len) in [
        (0, 0, PAGE),
        (PAGE, 0, PAGE),
        (0, 0, 512),
        (512, 0, 512),
        (LEN - 512, 0, PAGE),
        (LEN, 0, PAGE),
        (LEN + PAGE, 0, PAGE),
    ] {
        let mut page = Page::new(9);
        let bytes = &mut page.bytes()[skip..len];
        let read = direct.read_at(bytes, offset as u64);
        out.note(format!("read of {len} at {offset}"), read.ok());
    }
    let mut page = Page::new(6);
    let wrote = direct.write_at(page.bytes(), LEN as u64);
    out.note("write at the end", wrote.ok());
    out.text("grown", describe("f"));
    let wrote = direct.write_at(page.bytes(), 10 * LEN as u64);
    out.note("write far behind", wrote.ok());
    out.text("with a hole", describe("f"));
    truncate("f", 5000).unwrap();
    let read = direct.read_at(page.bytes(), PAGE as u64);
    out.note("read over the end", read.ok());
    out.note("content", crc32c::crc32c(&std::fs::read("f").unwrap()));
}
