//! What our replay makes of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockstack::DynDevice;
use blockstack::backend::mem::{Image, MemDisk};
use fs::format::fast_commit::{FastCommit, FcTag};
use fs::journal::{JournalExtent, Log};
use fs::{Fs, MountOptions};

use crate::kernel::{
    Mount, Scratch, Tree, check, debugfs_tags, difference, journal_extents, journal_features,
    kernel_tree, run, walk,
};
use crate::work::Work;

/// An image with fast commits that wait.
pub struct Made {
    pub scratch: Scratch,
    pub image: PathBuf,
    /// The tree when it was shut down.
    pub tree: Tree,
}

impl Made {
    /// Makes one; `work` may give what is to be kept open until the end. `None` without root.
    pub fn new<T>(args: &[&str], work: impl FnOnce(&Path) -> T) -> Option<Self> {
        let scratch = Scratch::new();
        let image = scratch.mkfs(args, "64M");
        let made = Self {
            scratch,
            image,
            tree: Tree::new(),
        };
        made.more(work)
    }

    /// Goes on with what is there.
    pub fn more<T>(mut self, work: impl FnOnce(&Path) -> T) -> Option<Self> {
        let mount = Mount::new(&self.scratch, &self.image, "loop,commit=900")?;
        let open = work(&mount.at);
        self.tree = walk(&mount.at);
        mount.shut_down();
        drop(open);
        drop(mount);
        Some(self)
    }

    /// One of a seed's storm.
    pub fn storm(seed: u64) -> Option<Self> {
        Self::new(shape(seed), |root| {
            let mut work = Work::new(root, seed);
            work.prepare();
            run("sync", &["-f", root.to_str().unwrap()]);
            work.run(5 + seed as u32 * 7 % 60);
        })
    }

    pub fn load(&self) -> Image {
        Image::open(&self.image).unwrap()
    }
}

fn le32(image: &Image, at: usize) -> u32 {
    let mut bytes = [0; 4];
    image.read_at(at, &mut bytes);
    u32::from_le_bytes(bytes)
}

/// What our scan finds.
pub fn pending(journal: &[JournalExtent], image: &Image) -> Vec<FastCommit> {
    let disk: DynDevice = MemDisk::from_image("scan", image.clone());
    let block_size = 1024 << le32(image, 1024 + 24);
    let blocks = le32(image, 1024 + 4).into();
    let mut log = Log::open(disk, block_size, blocks, journal).unwrap();
    log.recover().unwrap().fast_commits
}

pub fn replay(image: &Image) -> Result<Image, String> {
    mounted(image, &MountOptions::default(), |_| ()).map(|(_, after)| after)
}

/// Mounts an image, looks, unmounts; gives what it is then.
pub fn mounted<T>(
    image: &Image,
    options: &MountOptions,
    look: impl FnOnce(&Arc<Fs>) -> T,
) -> Result<(T, Image), String> {
    let disk = MemDisk::from_image("mounted", image.clone());
    let dev: DynDevice = disk.clone();
    let fs = Fs::mount(dev, options.clone()).map_err(|error| error.to_string())?;
    let found = look(&fs);
    fs.unmount().map_err(|error| format!("unmount: {error}"))?;
    drop(fs);
    Ok((found, disk.image()))
}

/// A commit as debugfs prints it.
fn printed(commits: &[FastCommit]) -> Vec<String> {
    let name = |name: &[u8]| String::from_utf8_lossy(name).to_string();
    let tag = |tag: &FcTag| match tag {
        FcTag::AddRange { ino, extent } => {
            let (lblk, pblk, len) = (extent.lblk, extent.pblk, extent.len);
            format!("ADD_RANGE, inode {ino}, lblk {lblk}, pblk {pblk}, len {len}")
        }
        FcTag::DelRange { ino, lblk, len } => {
            let (lblk, len) = (*lblk as i32, *len as i32);
            format!("DEL_RANGE, inode {ino}, lblk {lblk}, len {len}")
        }
        FcTag::Creat(of) => {
            let (parent, ino, name) = (of.parent, of.ino, name(&of.name));
            format!("CREAT_DENTRY, parent {parent}, ino {ino}, name \"{name}")
        }
        FcTag::Link(of) => {
            let (parent, ino, name) = (of.parent, of.ino, name(&of.name));
            format!("ADD_ENTRY, parent {parent}, ino {ino}, name \"{name}")
        }
        FcTag::Unlink(of) => {
            let (parent, ino, name) = (of.parent, of.ino, name(&of.name));
            format!("DEL_ENTRY, parent {parent}, ino {ino}, name \"{name}")
        }
        FcTag::Inode { ino, .. } => format!("INODE, inode {ino}"),
    };
    let with_tail = |commit: &FastCommit| {
        let tags: Vec<_> = commit.iter().map(tag).collect();
        tags.into_iter().chain(["TAIL".to_owned()])
    };
    commits.iter().flat_map(with_tail).collect()
}

/// What debugfs finds in the area begins with what we do.
fn agrees_with_debugfs(path: &Path, commits: &[FastCommit]) {
    let theirs = debugfs_tags(path).into_iter().filter_map(|line| {
        let kind = line.split(',').next()?;
        match kind {
            "HEAD" | "PAD" => None,
            "TAIL" => Some(kind.to_owned()),
            _ => Some(line),
        }
    });
    let (ours, theirs) = (printed(commits), theirs.collect::<Vec<_>>());
    for (at, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
        // It prints names without regard to where they end.
        assert!(
            theirs.starts_with(ours.as_str()),
            "tag {at}: {ours}, not {theirs}"
        );
    }
    assert!(ours.len() <= theirs.len());
}

/// What the kernel's own replay gives. That of 6.18 refuses some of its own fast commits, loses the
/// new file where a number is used again, and runs into a BUG over files without extents, after
/// which no `sync` on that machine ends: it is asked for storms of the shapes below only.
#[derive(Debug, Eq, PartialEq)]
pub enum Kernel {
    NotAsked,
    Same,
    Differs(String),
    Refuses,
}

pub struct Verified {
    /// Fast commits that waited.
    pub commits: usize,
    pub kernel: Kernel,
}

/// Replays, and compares with what was synced; and with the kernel's replay, where it is asked.
pub fn verify(made: &Made, ask_kernel: bool) -> Result<Verified, String> {
    let image = made.load();
    let commits = pending(&journal_extents(&made.image), &image);
    agrees_with_debugfs(&made.image, &commits);
    let ours = made.scratch.path("ours");
    replay(&image)?.save(&ours).unwrap();
    let features = journal_features(&ours);
    if features.contains("FEATURE_I5") || features.contains("fast_commit") {
        return Err(format!(
            "a clean journal that says more than the kernel's: {features}"
        ));
    }
    check(&ours)?;
    let found = kernel_tree(&made.scratch, &ours).ok_or("the kernel does not mount ours")?;
    check(&ours).map_err(|error| format!("after the kernel's mount: {error}"))?;
    if let Some(difference) = difference(&found, &made.tree) {
        return Err(format!("ours and what was synced: {difference}"));
    }
    let commits = commits.len();
    if !ask_kernel {
        let kernel = Kernel::NotAsked;
        return Ok(Verified { commits, kernel });
    }
    let theirs = made.scratch.path("theirs");
    run(
        "cp",
        &[made.image.to_str().unwrap(), theirs.to_str().unwrap()],
    );
    let kernel = match kernel_tree(&made.scratch, &theirs) {
        None => Kernel::Refuses,
        Some(theirs) => match difference(&found, &theirs) {
            None => Kernel::Same,
            Some(difference) => Kernel::Differs(difference),
        },
    };
    Ok(Verified { commits, kernel })
}

const SHAPES: [&[&str]; 7] = [
    &["-b", "4096"],
    &["-b", "1024"],
    &["-b", "2048", "-O", "^metadata_csum,^64bit"],
    &["-b", "4096", "-I", "128", "-O", "^flex_bg"],
    &["-b", "1024", "-g", "2048", "-O", "^metadata_csum,uninit_bg"],
    &["-b", "1024", "-O", "orphan_file"],
    &["-b", "4096", "-O", "^dir_index,^huge_file"],
];

fn shape(seed: u64) -> &'static [&'static str] {
    SHAPES[seed as usize % SHAPES.len()]
}

fn storm(seed: u64) -> Option<Verified> {
    let args = shape(seed);
    let made = Made::storm(seed)?;
    match verify(&made, asks_kernel()) {
        Ok(verified) => {
            let (commits, kernel) = (verified.commits, &verified.kernel);
            println!("seed {seed} {args:?}: {commits} fast commits, the kernel: {kernel:?}");
            Some(verified)
        }
        Err(error) => {
            let kept = std::env::temp_dir().join(format!("fast-commit-{seed}.img"));
            std::fs::copy(&made.image, &kept).unwrap();
            panic!("seed {seed} {args:?}: {error}\nimage: {}", kept.display());
        }
    }
}

/// Whether the kernel replays the same images: `FAST_COMMIT_KERNEL=1`. Not by itself: its replay is
/// code that few run, and on a file system without extents 6.18 stops with a BUG, after which every
/// `sync` of the machine waits for ever.
fn asks_kernel() -> bool {
    std::env::var_os("FAST_COMMIT_KERNEL").is_some_and(|value| value == "1")
}

/// Seeds from `FAST_COMMIT_SEEDS` (first..last), else a few.
fn seeds() -> std::ops::Range<u64> {
    let given = std::env::var("FAST_COMMIT_SEEDS").ok();
    given
        .and_then(|text| {
            let (first, last) = text.split_once("..")?;
            Some(first.parse().ok()?..last.parse().ok()?)
        })
        .unwrap_or(0..14)
}

#[test]
fn what_was_synced_by_fast_commits_is_there() {
    let mut all = Vec::new();
    for seed in seeds() {
        let Some(verified) = storm(seed) else { return };
        all.push(verified);
    }
    let with_commits = all.iter().filter(|seed| seed.commits > 0);
    let same = with_commits
        .clone()
        .filter(|seed| seed.kernel == Kernel::Same)
        .count();
    let with_commits = with_commits.count();
    let count = all.len();
    println!("{count} images, {with_commits} with fast commits, {same} the same for the kernel");
    assert!(with_commits * 2 > count && (same * 2 > with_commits || !asks_kernel()));
}
