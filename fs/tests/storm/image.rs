//! Images made by mke2fs, judged by e2fsck.

use std::path::{Path, PathBuf};
use std::process::Command;

use blockstack::backend::mem::Image;
use fs::check::Finding;

/// A directory for images, in memory where there is such a place.
pub struct Scratch(tempfile::TempDir);

impl Scratch {
    pub fn new() -> Self {
        let shm = Path::new("/dev/shm");
        let dir = if shm.is_dir() {
            tempfile::tempdir_in(shm)
        } else {
            tempfile::tempdir()
        };
        Self(dir.unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Makes a file system; `None` where this mke2fs does not know how.
    pub fn try_mkfs(&self, args: &[&str], size: &str) -> Option<Image> {
        let path = self.path("made");
        let out = Command::new("mke2fs")
            .args(["-q", "-F"])
            .args(args)
            .arg(&path)
            .arg(size)
            .output()
            .unwrap_or_else(|error| panic!("mke2fs (package e2fsprogs): {error}"));
        if !out.status.success() {
            println!("mke2fs {args:?}: {}", String::from_utf8_lossy(&out.stderr));
            return None;
        }
        let image = Image::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        Some(image)
    }

    /// What `e2fsck -fn` and our own check complain about.
    pub fn check(&self, image: &Image) -> Result<(), String> {
        let report = fs::check::check(image, &mut fs::check::Scratch::default());
        // That there were errors may be known.
        let known = |it: &Finding| {
            matches!(
                it,
                Finding::ErrorState { .. } | Finding::JournalErrno { .. }
            )
        };
        if !report.faults().all(known) {
            return Err(format!("our check:\n{report}"));
        }
        let path = self.path("checked");
        image.save(&path).unwrap();
        let res = check(&path);
        std::fs::remove_file(&path).unwrap();
        res
    }

    /// Lets `e2fsck -fp` replay and clear orphans; anything else it says is an error. Gives what it
    /// made of the image, which is clean then; `None` where e2fsck has lost something: its 1.47.0
    /// frees the attribute block of a file whose truncation it finishes.
    pub fn replay(&self, image: &Image) -> Result<Option<Image>, String> {
        let path = self.path("replayed");
        image.save(&path).unwrap();
        let res = preen(&path).and_then(|whole| check(&path).map(|()| whole));
        let after = Image::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        res.map(|whole| whole.then_some(after))
    }

    /// Lets `e2fsck -fp` repair what it can without questions; gives its exit code and words.
    pub fn repair(&self, image: &Image) -> (i32, String, Image) {
        let path = self.path("repaired");
        image.save(&path).unwrap();
        let (code, text) = e2fsck("-fp", &path);
        let after = Image::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        (code, text, after)
    }

    /// Keeps an image for who looks into a failure.
    pub fn keep(image: &Image, name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("{name}-{}.img", std::process::id()));
        image.save(&path).unwrap();
        path
    }
}

/// Whether a power cut tore the superblock: its checksum stands in another sector than what it is
/// for. Nothing of the format helps on a disk that does not write the two as one; the kernel's ext4
/// has the same gap.
pub fn has_torn_superblock(image: &Image) -> bool {
    const METADATA_CSUM: u32 = 0x400;
    let mut sb = [0; 1024];
    image.read_at(1024, &mut sb);
    let le32 = |at: usize| u32::from_le_bytes([sb[at], sb[at + 1], sb[at + 2], sb[at + 3]]);
    le32(0x64) & METADATA_CSUM != 0 && le32(0x3fc) != !crc32c::crc32c(&sb[..0x3fc])
}

pub fn has_journal(image: &Image) -> bool {
    let mut compat = [0; 4];
    image.read_at(1024 + 0x5c, &mut compat);
    compat[0] & 4 != 0
}

/// Whether the superblock says that there were errors.
pub fn has_error_state(image: &Image) -> bool {
    let mut state = [0; 2];
    image.read_at(1024 + 0x3a, &mut state);
    state[0] & 2 != 0
}

fn e2fsck(how: &str, path: &Path) -> (i32, String) {
    let out = Command::new("e2fsck").arg(how).arg(path).output().unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    (out.status.code().unwrap_or(-1), text)
}

fn check(path: &Path) -> Result<(), String> {
    let (code, text) = e2fsck("-fn", path);
    if code == 0 {
        Ok(())
    } else {
        Err(format!("e2fsck -fn: exit code {code}\n{text}"))
    }
}

fn is_harmless(line: &str) -> bool {
    let known = [
        "recovering journal",
        "Clearing orphaned inode",
        "Truncating orphaned inode",
        "% non-contiguous)",
        // Of the orphan file, once its orphans are cleared, and where there were none.
        "Feature orphan_present is set but orphan file is clean.",
        "CLEARED.",
    ];
    let orphan_file = line.contains("Orphan file (inode") && line.ends_with("is not clean.");
    line.trim().is_empty() || orphan_file || known.iter().any(|known| line.contains(known))
}

/// See [`Scratch::replay`].
fn is_attribute_loss(line: &str, text: &str) -> bool {
    let Some((_, rest)) = line.split_once("Inode ") else {
        return false;
    };
    let Some((ino, rest)) = rest.split_once(", i_blocks is ") else {
        return false;
    };
    rest.ends_with("FIXED.") && text.contains(&format!("Truncating orphaned inode {ino} "))
}

/// Gives whether nothing was lost.
fn preen(path: &Path) -> Result<bool, String> {
    let (code, text) = e2fsck("-fp", path);
    let mut whole = true;
    for line in text.lines().filter(|line| !is_harmless(line)) {
        if !is_attribute_loss(line, &text) {
            return Err(format!("e2fsck -fp: exit code {code}\n{text}"));
        }
        whole = false;
    }
    if code == 0 || code == 1 {
        Ok(whole)
    } else {
        Err(format!("e2fsck -fp: exit code {code}\n{text}"))
    }
}
