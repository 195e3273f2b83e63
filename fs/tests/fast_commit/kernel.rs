//! The kernel's ext4 on a loop device, and the programs of e2fsprogs.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use fs::journal::JournalExtent;

/// Runs a program; gives its exit code and words.
pub fn output(program: &str, args: &[&str]) -> (i32, String) {
    let out = Command::new(program).args(args).output();
    let out = out.unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = [out.stdout, out.stderr].concat();
    let text = String::from_utf8_lossy(&text).to_string();
    (out.status.code().unwrap_or(-1), text)
}

/// Runs a program that must succeed.
pub fn run(program: &str, args: &[&str]) -> String {
    let (code, text) = output(program, args);
    assert!(code == 0, "{program} {args:?}: {code}\n{text}");
    text
}

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

    pub fn mkfs(&self, args: &[&str], size: &str) -> PathBuf {
        let path = self.path("image");
        // Every fsync takes a block at least: with an area of the usual size the kernel soon turns
        // to a full commit.
        let area = "size=8,fast_commit_size=2048";
        let mut all = vec!["-q", "-F", "-t", "ext4", "-J", area, "-O", "fast_commit"];
        all.extend(args);
        all.extend([path.to_str().unwrap(), size]);
        run("mke2fs", &all);
        path
    }
}

/// A mount through a loop device.
pub struct Mount {
    pub at: PathBuf,
}

impl Mount {
    /// `None` where this is not allowed, or the kernel does not want to.
    pub fn new(scratch: &Scratch, image: &Path, options: &str) -> Option<Self> {
        let at = scratch.path("mnt");
        std::fs::create_dir_all(&at).unwrap();
        let (image, point) = (image.to_str()?, at.to_str()?);
        for _ in 0..3 {
            let (code, text) = output("mount", &["-t", "ext4", "-o", options, image, point]);
            if code != 0 {
                eprintln!("SKIPPED: mount through a loop device (needs root): {text}");
                return None;
            }
            let mount = Self { at: at.clone() };
            let flags = rustix::fs::statvfs(&at).unwrap().f_flag;
            if !flags.contains(rustix::fs::StatVfsMountFlags::RDONLY) {
                return Some(mount);
            }
            // A loop device stays read-only when somebody has made it so, whoever has it next.
            let device = run("findmnt", &["-n", "-o", "SOURCE", point]);
            run("blockdev", &["--setrw", device.trim()]);
        }
        panic!("mounts through loop devices are read-only");
    }

    /// Ends all writes at once, without a flush of the log; what was not synced is lost.
    pub fn shut_down(&self) {
        // `EXT4_IOC_SHUTDOWN`, `_IOR('X', 125, __u32)`, and `EXT4_GOING_FLAGS_NOLOGFLUSH`.
        const SHUTDOWN: libc::c_ulong = 0x8004_587d;
        let flags: u32 = 2;
        let root = std::fs::File::open(&self.at).unwrap();
        // SAFETY: the kernel reads one `u32` at the address, and `flags` lives until it returns.
        let res = unsafe { libc::ioctl(root.as_raw_fd(), SHUTDOWN, &raw const flags) };
        assert_eq!(res, 0, "{}", std::io::Error::last_os_error());
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let at = self.at.to_str().unwrap_or_default();
        // A program that another test has just started has its files for a moment.
        for _ in 0..200 {
            match output("umount", &[at]) {
                (0, _) => return,
                (_, text) => eprintln!("umount: {text}"),
            }
        }
    }
}

/// A file as it was found.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Node {
    mode: u32,
    owner: (u32, u32),
    /// Of all but directories: names, size, time of the last change.
    links: u64,
    size: u64,
    mtime: (i64, i64),
    rdev: u64,
    /// A sum of the content of a file, or of the target of a link. (Blocks are not compared: another
    /// tree of extents may take more of them, and e2fsck counts them.)
    content: u64,
    /// Attributes, as getfattr prints them.
    attrs: String,
}

pub type Tree = BTreeMap<PathBuf, Node>;

fn node(path: &Path) -> Node {
    let meta = std::fs::symlink_metadata(path).unwrap();
    let kind = meta.file_type();
    let mut hasher = DefaultHasher::new();
    if kind.is_file() {
        std::fs::read(path).unwrap().hash(&mut hasher);
    } else if kind.is_symlink() {
        std::fs::read_link(path).unwrap().hash(&mut hasher);
    }
    let is_dir = kind.is_dir();
    let is_device = kind.is_char_device() || kind.is_block_device();
    Node {
        mode: meta.mode(),
        owner: (meta.uid(), meta.gid()),
        links: if is_dir { 0 } else { meta.nlink() },
        size: if is_dir { 0 } else { meta.size() },
        mtime: if is_dir {
            (0, 0)
        } else {
            (meta.mtime(), meta.mtime_nsec())
        },
        rdev: if is_device { meta.rdev() } else { 0 },
        content: hasher.finish(),
        attrs: String::new(),
    }
}

fn visit(root: &Path, dir: &Path, tree: &mut Tree) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let node = node(&path);
        let is_dir = node.mode & libc::S_IFMT == libc::S_IFDIR;
        tree.insert(path.strip_prefix(root).unwrap().to_owned(), node);
        if is_dir {
            visit(root, &path, tree);
        }
    }
}

/// All there is below a mount.
pub fn walk(root: &Path) -> Tree {
    let mut tree = Tree::new();
    visit(root, root, &mut tree);
    // Where getfattr is missing, attributes are not compared.
    let found = Command::new("getfattr")
        .args(["-R", "-h", "-d", "-m", "-", "."])
        .current_dir(root)
        .output();
    if let Ok(found) = found {
        let text = String::from_utf8_lossy(&found.stdout).to_string();
        for part in text.split("\n\n").filter(|part| !part.is_empty()) {
            let (name, attrs) = part.split_once('\n').unwrap();
            let name = name.trim_start_matches("# file: ");
            if let Some(node) = tree.get_mut(Path::new(name)) {
                node.attrs = attrs.to_owned();
            }
        }
    }
    tree
}

/// What an image has for the kernel, which may replay it.
pub fn kernel_tree(scratch: &Scratch, image: &Path) -> Option<Tree> {
    let mount = Mount::new(scratch, image, "loop")?;
    Some(walk(&mount.at))
}

/// The first difference of two trees.
pub fn difference(ours: &Tree, theirs: &Tree) -> Option<String> {
    let names: std::collections::BTreeSet<_> = ours.keys().chain(theirs.keys()).collect();
    names.into_iter().find_map(|name| {
        let (a, b) = (ours.get(name), theirs.get(name));
        (a != b).then(|| format!("{}: {a:?}, not {b:?}", name.display()))
    })
}

/// What `e2fsck -fn` says, where it does not say that all is well.
pub fn check(path: &Path) -> Result<(), String> {
    match output("e2fsck", &["-fn", path.to_str().unwrap()]) {
        (0, _) => Ok(()),
        (code, text) => Err(format!("e2fsck -fn: {code}\n{text}")),
    }
}

/// Where debugfs says the journal is.
pub fn journal_extents(path: &Path) -> Vec<JournalExtent> {
    let text = run("debugfs", &["-c", "-R", "stat <8>", path.to_str().unwrap()]);
    let extents = text.split_once("EXTENTS:");
    let Some((_, list)) = extents.or_else(|| text.split_once("BLOCKS:")) else {
        panic!("debugfs: {text}");
    };
    let range = |text: &str| -> Option<(u64, u64)> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        Some((first.parse().ok()?, last.parse().ok()?))
    };
    let entries = list.split(',').filter_map(|entry| {
        let (logical, physical) = entry.trim().split_once("):")?;
        let (first, last) = range(logical.trim_start_matches('('))?;
        let (pblk, _) = range(physical.lines().next()?.trim())?;
        Some(JournalExtent {
            lblk: first as u32,
            pblk,
            len: (last - first + 1) as u32,
        })
    });
    entries.collect()
}

/// What dumpe2fs says of the journal's features.
pub fn journal_features(path: &Path) -> String {
    let (_, text) = output("dumpe2fs", &["-h", path.to_str().unwrap()]);
    let line = text
        .lines()
        .find(|line| line.starts_with("Journal features"));
    line.unwrap().to_owned()
}

/// The tags in the fast-commit area, as debugfs prints them.
pub fn debugfs_tags(path: &Path) -> Vec<String> {
    let text = run("debugfs", &["-c", "-R", "logdump", path.to_str().unwrap()]);
    let (_, area) = text
        .split_once("*** Fast Commit Area ***")
        .unwrap_or_default();
    let lines = area.lines().filter_map(|line| line.strip_prefix("tag "));
    lines.map(|line| line.trim().to_owned()).collect()
}
