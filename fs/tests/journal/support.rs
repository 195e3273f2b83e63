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
