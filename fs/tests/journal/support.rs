//! Images, and the programs that make and check them.

use std::path::{Path, PathBuf};
use std::process::Command;

use fs::journal::io::JournalExtent;

/// Runs a program; panics with its output where it fails.
pub fn run(program: &str, args: &[&str]) -> String {
    let out = Command::new(program).args(args).output().unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    assert!(
        out.status.success(),
        "{program} {args:?}: {}\n{text}",
        out.status
    );
    text
}

/// A scratch directory and images in it.
pub struct Scratch(tempfile::TempDir);

impl Scratch {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Makes an image with mke2fs.
    pub fn mkfs(&self, name: &str, megabytes: u64, args: &[&str]) -> PathBuf {
        let path = self.path(name);
        std::fs::File::create(&path)
            .unwrap()
            .set_len(megabytes << 20)
            .unwrap();
        let mut all = vec!["-F", "-q"];
        all.extend(args);
        all.push(path.to_str().unwrap());
        run("mke2fs", &all);
        path
    }
}

fn u32_at(image: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(image[at..at + 4].try_into().unwrap())
}

pub fn block_size(image: &[u8]) -> u32 {
    1024 << u32_at(image, 1024 + 24)
}

pub fn fs_blocks(image: &[u8]) -> u64 {
    u64::from(u32_at(image, 1024 + 4))
}

/// Where debugfs says the journal is.
pub fn journal_extents(path: &Path) -> Vec<JournalExtent> {
    let text = run("debugfs", &["-R", "stat <8>", path.to_str().unwrap()]);
    let list = text
        .split_once("EXTENTS:")
        .or_else(|| text.split_once("BLOCKS:"))
        .unwrap()
        .1;
    let range = |text: &str| -> Option<(u64, u64)> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        Some((first.parse().ok()?, last.parse().ok()?))
    };
    let mut extents = Vec::new();
    for entry in list.split(',') {
        let Some((logical, physical)) = entry.trim().split_once("):") else {
            continue;
        };
        let Some((first, last)) = range(logical.trim_start_matches('(')) else {
            continue;
        };
        let (pblk, _) = range(physical.lines().next().unwrap().trim()).unwrap();
        extents.push(JournalExtent {
            lblk: first as u32,
            pblk,
            len: (last - first + 1) as u32,
        });
    }
    extents
}

/// Bytes an image's superblock says `needs_recovery` in; fixes the checksum.
pub fn set_needs_recovery(image: &mut [u8]) {
    let sb = &mut image[1024..2048];
    sb[0x60] |= 4;
    if sb[0x64 + 1] & 4 != 0 {
        let sum = !crc32c::crc32c(&sb[..1020]);
        sb[1020..].copy_from_slice(&sum.to_le_bytes());
    }
}

/// A small generator of random numbers.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// The checksum of test blocks, at their end, so that `prepare` has something to do.
pub struct TailSum;

impl bufio::Validator for TailSum {
    fn check(&self, _: u64, data: &[u8]) -> Result<(), bufio::Invalid> {
        let body = data.len() - 4;
        if data[body..] == crc32c::crc32c(&data[..body]).to_le_bytes() {
            Ok(())
        } else {
            Err(bufio::Invalid {
                what: "test block: checksum",
            })
        }
    }

    fn prepare(&self, _: u64, data: &mut [u8]) {
        let body = data.len() - 4;
        let sum = crc32c::crc32c(&data[..body]);
        data[body..].copy_from_slice(&sum.to_le_bytes());
    }
}

/// Fills a test block; every fifth starts with the magic of jbd2.
pub fn fill(data: &mut [u8], stamp: u64, block: u64) {
    data.fill(stamp as u8);
    data[8..16].copy_from_slice(&stamp.to_le_bytes());
    data[16..24].copy_from_slice(&block.to_le_bytes());
    if stamp % 5 == 0 {
        data[..4].copy_from_slice(&[0xC0, 0x3B, 0x39, 0x98]);
    }
}

/// Whether a block is what [`fill`] and [`TailSum`] made.
pub fn is_filled(data: &[u8], stamp: u64, block: u64) -> bool {
    let mut want = vec![0; data.len()];
    fill(&mut want, stamp, block);
    bufio::Validator::prepare(&TailSum, block, &mut want);
    want == data
}

/// A file system's core over `dev`, with a journal in it.
pub struct Rig {
    pub core: std::sync::Arc<fs::Core>,
    pub journal: std::sync::Arc<fs::Journal>,
}

impl Rig {
    /// Recovers the log at `extents`, and takes it into use.
    pub fn open(
        dev: &blockstack::DynDevice,
        superblock: &[u8],
        extents: &[JournalExtent],
        opts: fs::MountOptions,
    ) -> Result<Self, fs::journal::JournalError> {
        let core = core(dev, superblock, opts);
        let geo = &core.geo;
        let mut log =
            fs::journal::Log::open(dev.clone(), geo.block_size, geo.blocks_count, extents)?;
        log.recover()?;
        let journal = fs::Journal::open(core.clone(), log)?;
        Ok(Self { core, journal })
    }

    pub fn bare(dev: &blockstack::DynDevice, superblock: &[u8], opts: fs::MountOptions) -> Self {
        let core = core(dev, superblock, opts);
        Self {
            journal: fs::Journal::bare(core.clone()),
            core,
        }
    }
}

fn core(
    dev: &blockstack::DynDevice,
    superblock: &[u8],
    opts: fs::MountOptions,
) -> std::sync::Arc<fs::Core> {
    let raw = zerocopy::FromBytes::read_from_bytes(superblock).unwrap();
    let geo = fs::Geometry::new(&raw).unwrap();
    let config = bufio::ClientConfig {
        block_size: geo.block_size,
        cache_bytes: 1 << 20,
        rank: blockstack::sync::Rank::FsBufio,
        writeback_age: std::time::Duration::from_millis(50),
        strict_holds: false,
    };
    let bufs = bufio::Client::new(dev.clone(), config).unwrap();
    std::sync::Arc::new(fs::Core::new(
        geo,
        bufs,
        opts,
        fs::options::OnError::Continue,
    ))
}
