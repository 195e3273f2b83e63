//! Allocator and maps on images of mke2fs; e2fsck and debugfs are the oracles.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use blockstack::backend::mem::{self, MemDisk};
use fs::alloc::{BlockUse, INODE_CREDITS, InodeUse, Privilege, Run};
use fs::format::superblock::{RawSuperblock, SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE};
use fs::inode::map::{self, MapKind, Seek, Written};
use fs::{Fs, FsError, Inode, InodeData, InodeFlags, MountOptions};
use zerocopy::{FromBytes, IntoBytes};

fn run(program: &str, args: &[&str], input: &str) -> (i32, String) {
    let mut child = Command::new(program)
        .args(args)
        .env("MKE2FS_CONFIG", "/etc/mke2fs.conf")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{program} (package e2fsprogs) does not start: {e}"));
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    let out = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    (
        out.status.code().unwrap_or(-1),
        text + &String::from_utf8_lossy(&out.stderr),
    )
}

fn debugfs(image: &Path, commands: &str) -> String {
    let (code, text) = run(
        "debugfs",
        &["-w", "-f", "-", image.to_str().unwrap()],
        commands,
    );
    assert_eq!(code, 0, "{text}");
    text
}

/// An image under test: a file while others look at it, a disk in memory while we do.
struct Image {
    file: tempfile::NamedTempFile,
    disk: Option<Arc<MemDisk>>,
}

impl Image {
    fn new(kind: &str, size: &str, prepare: &str) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap().to_owned();
        let mut args = vec!["-q", "-F"];
        args.extend(kind.split_whitespace());
        args.extend([path.as_str(), size]);
        let (code, text) = run("mke2fs", &args, "");
        assert_eq!(code, 0, "mke2fs {args:?}: {text}");
        if !prepare.is_empty() {
            debugfs(file.path(), prepare);
        }
        Self { file, disk: None }
    }

    fn mount(&mut self) -> Arc<Fs> {
        let disk = MemDisk::from_bytes("image", std::fs::read(self.file.path()).unwrap());
        self.disk = Some(disk.clone());
        Fs::mount(disk, MountOptions::default()).unwrap()
    }

    /// Unmounts, and lets e2fsck judge.
    fn check(&mut self, fs: Arc<Fs>, links: &str) -> String {
        fs.journal.shutdown().unwrap();
        let counts = fs.alloc.counts();
        drop(fs);
        let mut bytes = self.disk.take().unwrap().snapshot();
        let at = SUPERBLOCK_OFFSET as usize;
        let mut raw = RawSuperblock::read_from_bytes(&bytes[at..at + SUPERBLOCK_SIZE]).unwrap();
        raw.set_free_blocks(counts.free_blocks);
        raw.s_free_inodes_count.set(counts.free_inodes);
        raw.seal();
        bytes[at..at + SUPERBLOCK_SIZE].copy_from_slice(raw.as_bytes());
        std::fs::write(self.file.path(), bytes).unwrap();
        let mut said = String::new();
        if !links.is_empty() {
            said = debugfs(self.file.path(), links);
        }
        let (code, text) = run("e2fsck", &["-fn", self.file.path().to_str().unwrap()], "");
        if code != 0 {
            let keep = std::env::temp_dir().join("maps-failed.img");
            std::fs::copy(self.file.path(), &keep).unwrap();
            panic!("e2fsck on {}: {code}\n{text}\n{said}", keep.display());
        }
        let image = mem::Image::open(self.file.path()).unwrap();
        let report = fs::check::check(&image, &mut fs::check::Scratch::default());
        assert!(report.is_clean(), "our check: {report}");
        said
    }
}

/// For what need only come to an end.
fn ends<T>(_: T) {}

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: u32) -> u32 {
        ((self.next() >> 33) % u64::from(n)) as u32
    }
}

/// One file and what its map should say.
struct File {
    inode: Arc<Inode>,
    model: BTreeMap<u32, (u64, MapKind)>,
}

impl File {
    fn open(fs: &Fs, ino: u32, extents: bool) -> Self {
        let mut data = fs.read_inode(ino).unwrap();
        if !extents {
            data.flags.remove(InodeFlags::EXTENTS);
            data.block = [0; 60];
        }
        Self {
            inode: Inode::new(fs.geo.csum_seed, ino, data),
            model: BTreeMap::new(),
        }
    }

    fn finish(&self, fs: &Fs, h: &fs::Handle, data: &mut InodeData) {
        let end = self
            .model
            .last_key_value()
            .map_or(0, |(l, _)| u64::from(*l) + 1);
        data.size = end << fs.geo.block_bits;
        fs.write_inode(h, &self.inode, data).unwrap();
    }

    fn insert(&mut self, fs: &Fs, lblk: u32, len: u32, written: Written) -> Result<(), FsError> {
        let inode = self.inode.clone();
        let mut data = inode.data.write();
        let mut pos = lblk;
        while pos < lblk + len {
            let m = map::lookup(fs, &inode, &data, pos, lblk + len - pos).unwrap();
            if m.kind == MapKind::Hole {
                let h = fs.journal.start(200).unwrap();
                let goal = fs.alloc.goal_for(inode.ino, &data, pos);
                let got = fs.alloc.reserve(goal, m.len, 1, Privilege::Root);
                let run = match got {
                    Ok(run) => run,
                    Err(error) => {
                        self.finish(fs, &h, &mut data);
                        return Err(error);
                    }
                };
                fs.alloc.commit_run(&h, run).unwrap();
                let done = map::insert(fs, &h, &inode, &mut data, pos, run, written);
                if let Err(error) = done {
                    fs.alloc
                        .free(&h, run.start, run.len, BlockUse::Data)
                        .unwrap();
                    self.finish(fs, &h, &mut data);
                    return Err(error);
                }
                let kind = match written {
                    Written::Yes => MapKind::Mapped,
                    Written::No => MapKind::Unwritten,
                };
                for i in 0..run.len {
                    self.model.insert(pos + i, (run.start + u64::from(i), kind));
                }
                self.finish(fs, &h, &mut data);
                h.stop().unwrap();
                pos += run.len;
            } else {
                pos += m.len;
            }
        }
        Ok(())
    }

    fn change(
        &mut self,
        fs: &Fs,
        f: impl FnOnce(&mut fs::Handle, &Inode, &mut InodeData) -> Result<(), FsError>,
        model: impl FnOnce(&mut BTreeMap<u32, (u64, MapKind)>),
    ) {
        let inode = self.inode.clone();
        let mut data = inode.data.write();
        let mut h = fs.journal.start(200).unwrap();
        f(&mut h, &inode, &mut data).unwrap();
        model(&mut self.model);
        self.finish(fs, &h, &mut data);
        h.stop().unwrap();
    }

    fn remove(&mut self, fs: &Fs, from: u32, to: u32) {
        self.change(
            fs,
            |h, inode, data| map::remove(fs, h, inode, data, from, to),
            |m| m.retain(|l, _| *l < from || *l >= to),
        );
    }

    fn convert(&mut self, fs: &Fs, from: u32, len: u32) {
        self.change(
            fs,
            |h, inode, data| map::convert(fs, h, inode, data, from, len),
            |m| {
                m.range_mut(from..from + len)
                    .for_each(|(_, v)| v.1 = MapKind::Mapped)
            },
        );
    }

    fn collapse(&mut self, fs: &Fs, from: u32, len: u32) {
        self.change(
            fs,
            |h, inode, data| map::collapse(fs, h, inode, data, from, len),
            |m| {
                m.retain(|l, _| *l < from || *l >= from + len);
                let up = m.split_off(&from);
                m.extend(up.into_iter().map(|(l, v)| (l - len, v)));
            },
        );
    }

    fn open_range(&mut self, fs: &Fs, from: u32, len: u32) {
        self.change(
            fs,
            |h, inode, data| map::insert_range(fs, h, inode, data, from, len),
            |m| {
                let up = m.split_off(&from);
                m.extend(up.into_iter().map(|(l, v)| (l + len, v)));
            },
        );
    }

    fn check(&self, fs: &Fs, until: u32) {
        let data = self.inode.data.read();
        let mut pos = 0;
        let mut seen = BTreeMap::new();
        while pos < until {
            let m = map::lookup(fs, &self.inode, &data, pos, until - pos).unwrap();
            assert!(m.len >= 1 && m.len <= until - pos && m.lblk == pos);
            if m.kind != MapKind::Hole {
                seen.extend((0..m.len).map(|i| (pos + i, (m.pblk + u64::from(i), m.kind))));
            }
            pos += m.len;
        }
        let model: BTreeMap<_, _> = self.model.range(..until).map(|(k, v)| (*k, *v)).collect();
        assert_eq!(seen, model);
        let first = self
            .model
            .iter()
            .find(|(_, v)| v.1 == MapKind::Mapped)
            .map(|(k, _)| *k);
        assert_eq!(
            map::next(fs, &self.inode, &data, 0, Seek::Data).unwrap(),
            first
        );
        let on_disk = fs.read_inode(self.inode.ino).unwrap();
        assert_eq!((on_disk.block, on_disk.sectors), (data.block, data.sectors));
    }
}

/// What `mke2fs` makes, and whether files are mapped by extents.
const KINDS: &[(&str, bool)] = &[
    ("-t ext2 -b 1024", false),
    (
        "-t ext2 -b 1024 -O ^sparse_super,^resize_inode -g 2048",
        false,
    ),
    ("-t ext2 -b 4096 -g 2048", false),
    ("-t ext3 -b 2048 -O ^has_journal", false),
    ("-t ext4 -b 1024 -O ^has_journal", true),
    ("-t ext4 -b 1024 -O ^has_journal", false),
    ("-t ext4 -b 2048 -O ^has_journal -g 2048", true),
    ("-t ext4 -b 4096 -O ^has_journal -g 1024", true),
    ("-t ext4 -b 4096 -O ^has_journal", true),
    (
        "-t ext4 -b 1024 -O ^has_journal,^metadata_csum,uninit_bg -g 1024",
        true,
    ),
    ("-t ext4 -b 1024 -O ^has_journal,^flex_bg -g 2048", true),
    (
        "-t ext4 -b 1024 -O ^has_journal,^resize_inode,meta_bg -g 1024",
        true,
    ),
    (
        "-t ext4 -b 1024 -O ^has_journal,^64bit -I 128 -g 2048",
        true,
    ),
    (
        "-t ext4 -b 1024 -O ^has_journal,sparse_super2 -g 2048 -G 4",
        true,
    ),
];

fn with_files(n: u32) -> String {
    (0..n).map(|i| format!("write /dev/null f{i}\n")).collect()
}

/// A file made by debugfs in an empty file system has the first inodes behind lost+found.
const FIRST_FILE: u32 = 12;

fn storm(fs: &Fs, file: &mut File, rng: &mut Rng, extents: bool, steps: u32, span: u32) {
    for step in 0..steps {
        let at = match rng.below(3) {
            0 => rng.below(20),
            1 => rng.below(span.min(400)),
            _ => rng.below(span),
        };
        let len = if rng.below(4) == 0 {
            1 + rng.below(150)
        } else {
            1 + rng.below(5)
        };
        match rng.below(if extents { 12 } else { 8 }) {
            0..=4 => {
                let written = match extents && rng.below(2) == 0 {
                    true => Written::No,
                    false => Written::Yes,
                };
                match file.insert(fs, at, len, written) {
                    Ok(()) => {}
                    Err(FsError::NoSpace) => fs.journal.commit_all().unwrap(),
                    Err(error) => panic!("{error}"),
                }
            }
            5 => file.remove(fs, at, u32::MAX),
            6..=7 => file.remove(fs, at, at + len * 2),
            8..=9 => file.convert(fs, at, len * 4),
            10 => file.collapse(fs, at, len),
            _ => file.open_range(fs, at, len),
        }
        if step % 16 == 0 {
            file.check(fs, span + span / 2);
        }
    }
}

#[test]
fn storms_leave_images_that_e2fsck_likes() {
    for (n, (kind, extents)) in KINDS.iter().enumerate() {
        let mut image = Image::new(kind, "24M", &with_files(6));
        for round in 0..3 {
            let fs = image.mount();
            let before = fs.alloc.counts();
            let mut rng = Rng(0x9e37_79b9_7f4a_7c15 ^ (n as u64 + 1) << 8 ^ round);
            let mut files: Vec<File> = (0..6)
                .map(|i| File::open(&fs, FIRST_FILE + i, *extents))
                .collect();
            for file in &mut files {
                // What an earlier round left.
                let data = file.inode.data.read().clone();
                let bs = u64::from(fs.geo.block_size);
                if *extents && data.size > 0 {
                    let span = (data.size / bs) as u32;
                    let mut pos = 0;
                    while pos < span {
                        let m = map::lookup(&fs, &file.inode, &data, pos, span - pos).unwrap();
                        if m.kind != MapKind::Hole {
                            let new =
                                (0..m.len).map(|i| (pos + i, (m.pblk + u64::from(i), m.kind)));
                            file.model.extend(new);
                        }
                        pos += m.len;
                    }
                } else if data.size > 0 {
                    // The block map was dropped by `open`: take it up again.
                    *file = File::open(&fs, file.inode.ino, true);
                    file.remove(&fs, 0, u32::MAX);
                }
            }
            let used: u64 = files.iter().map(|f| f.inode.data.read().sectors).sum();
            for _ in 0..40 {
                let span = [100, 1000, 70_000][rng.below(3) as usize];
                let file = &mut files[rng.below(6) as usize];
                storm(&fs, file, &mut rng, *extents, 8, span);
            }
            let data: u64 = files.iter().map(|f| f.inode.data.read().sectors).sum();
            let after = fs.alloc.counts();
            let sectors = u64::from(fs.geo.block_size / 512);
            if *extents || round == 0 {
                assert_eq!(
                    before.free_blocks + used / sectors,
                    after.free_blocks + data / sectors
                );
            }
            if round == 2 {
                for file in &mut files {
                    file.remove(&fs, 0, u32::MAX);
                    assert_eq!(file.inode.data.read().sectors, 0, "{kind}");
                }
            }
            println!("{kind}: round {round}");
            drop(files);
            image.check(fs, "");
        }
    }
}

#[test]
fn files_of_others_are_read() {
    for (kind, _) in KINDS {
        let mut content = vec![0u8; 600 * 1024];
        let mut rng = Rng(77);
        for (i, piece) in content.chunks_mut(1024).enumerate() {
            if i % 7 < 3 || i > 400 {
                piece.fill_with(|| rng.next() as u8);
            }
        }
        let source = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(source.path(), &content).unwrap();
        let write = format!("write {} f\n", source.path().display());
        let mut image = Image::new(kind, "24M", &write);
        let fs = image.mount();
        let data = fs.read_inode(FIRST_FILE).unwrap();
        let inode = Inode::new(fs.geo.csum_seed, FIRST_FILE, data);
        let data = inode.data.read();
        assert_eq!(data.size, content.len() as u64);
        let bytes = image.disk.as_ref().unwrap().snapshot();
        let bs = fs.geo.block_size as usize;
        let mut got = vec![0u8; content.len()];
        let blocks = (content.len() / bs) as u32;
        let mut pos = 0;
        while pos < blocks {
            let m = map::lookup(&fs, &inode, &data, pos, blocks - pos).unwrap();
            if m.kind == MapKind::Mapped {
                let (from, to) = (m.pblk as usize * bs, pos as usize * bs);
                let len = m.len as usize * bs;
                got[to..to + len].copy_from_slice(&bytes[from..from + len]);
            }
            pos += m.len;
        }
        assert!(got == content, "{kind}");
    }
}

#[test]
fn what_we_map_is_what_debugfs_sees() {
    for (kind, extents) in KINDS {
        let mut image = Image::new(kind, "24M", &with_files(1));
        let fs = image.mount();
        let mut file = File::open(&fs, FIRST_FILE, *extents);
        for i in 0..300 {
            file.insert(&fs, i * 3, 1 + i % 2, Written::Yes).unwrap();
        }
        let model = file.model.clone();
        let mut ask: String = String::new();
        let asked: Vec<u32> = (0..900).step_by(7).collect();
        for lblk in &asked {
            ask += &format!("bmap <{FIRST_FILE}> {lblk}\n");
        }
        drop(file);
        let said = image.check(fs, &ask);
        let answers: Vec<u64> = said
            .lines()
            .filter_map(|line| line.split_whitespace().next()?.parse().ok())
            .collect();
        let want: Vec<u64> = asked
            .iter()
            .map(|l| model.get(l).map_or(0, |v| v.0))
            .collect();
        assert_eq!(answers, want, "{kind}: {said}");
    }
}

#[test]
fn a_full_file_system_says_so_and_recovers() {
    for (kind, extents) in KINDS {
        let mut image = Image::new(kind, "10M", &with_files(2));
        let fs = image.mount();
        let mut file = File::open(&fs, FIRST_FILE, *extents);
        let mut other = File::open(&fs, FIRST_FILE + 1, *extents);
        let before = fs.alloc.counts();
        let mut lblk = 0;
        let error = loop {
            match file.insert(&fs, lblk, 3, Written::Yes) {
                Ok(()) => lblk += 5,
                Err(error) => break error,
            }
        };
        assert_eq!(error, FsError::NoSpace);
        let user = fs.alloc.reserve(0, 1, 1, Privilege::User);
        assert_eq!(user, Err(FsError::NoSpace));
        file.check(&fs, lblk + 10);
        file.remove(&fs, 0, u32::MAX);
        fs.journal.commit_all().unwrap();
        assert_eq!(fs.alloc.counts().free_blocks, before.free_blocks, "{kind}");
        assert_eq!(fs.alloc.pending_blocks(), 0);
        other.insert(&fs, 0, 1000, Written::Yes).unwrap();
        drop((file, other));
        image.check(fs, "");
    }
}

#[test]
fn inodes_come_and_go() {
    for (kind, _) in KINDS {
        let mut image = Image::new(kind, "24M", "mkdir d\n");
        let fs = image.mount();
        let before = fs.alloc.counts();
        let mut rng = Rng(5);
        let mut live: Vec<(u32, Arc<Inode>)> = Vec::new();
        for round in 0..400 {
            if live.len() < 30 || rng.below(3) > 0 {
                let h = fs.journal.start(INODE_CREDITS + 2).unwrap();
                let parent = live.get(round % 40).map_or(2, |l| l.0);
                let ino = fs.alloc.alloc_inode(&h, parent, InodeUse::Other).unwrap();
                assert!(live.iter().all(|l| l.0 != ino), "inode {ino} twice");
                let mut data = InodeData {
                    mode: 0o100_644,
                    links: 1,
                    extra_isize: fs.geo.want_extra_isize,
                    generation: rng.below(u32::MAX),
                    ..InodeData::default()
                };
                map::init(&fs.geo, &mut data);
                let inode = Inode::new(fs.geo.csum_seed, ino, data);
                let data = inode.data.read().clone();
                fs.write_inode(&h, &inode, &data).unwrap();
                h.stop().unwrap();
                live.push((ino, inode));
            } else {
                let (ino, inode) = live.swap_remove(rng.below(live.len() as u32) as usize);
                let h = fs.journal.start(INODE_CREDITS + 2).unwrap();
                let mut data = inode.data.write();
                data.links = 0;
                data.dtime = 1_700_000_000;
                fs.write_inode(&h, &inode, &data).unwrap();
                fs.alloc.free_inode(&h, ino, InodeUse::Other).unwrap();
                h.stop().unwrap();
            }
        }
        assert_eq!(
            fs.alloc.counts().free_inodes + live.len() as u32,
            before.free_inodes
        );
        let keep = live.split_off(20);
        for (ino, inode) in &keep {
            let h = fs.journal.start(INODE_CREDITS + 2).unwrap();
            let mut data = inode.data.write();
            data.links = 0;
            data.dtime = 1_700_000_000;
            fs.write_inode(&h, inode, &data).unwrap();
            fs.alloc.free_inode(&h, *ino, InodeUse::Other).unwrap();
            h.stop().unwrap();
        }
        let links: String = live
            .iter()
            .map(|(ino, _)| format!("ln <{ino}> /d/n{ino}\n"))
            .collect();
        drop((live, keep));
        image.check(fs, &links);
    }
}

#[test]
fn an_inode_table_of_garbage_shows_no_old_inodes() {
    // As after mke2fs with lazy_itable_init on a disk with an older file system: everything the
    // descriptors call unused holds live inodes of that one.
    let kind = "-t ext4 -b 1024 -g 1024 -O ^has_journal -E lazy_itable_init=1";
    let mut image = Image::new(kind, "24M", "mkdir d\n");
    let (_, text) = run("dumpe2fs", &[image.file.path().to_str().unwrap()], "");
    let number = |s: &str| s.trim().parse::<usize>().unwrap();
    let per_group = text
        .lines()
        .find_map(|l| l.strip_prefix("Inodes per group:").map(number))
        .unwrap();
    let mut bytes = std::fs::read(image.file.path()).unwrap();
    let root = {
        let line = text.lines().find(|l| l.contains("Inode table at")).unwrap();
        let at = line
            .split("Inode table at ")
            .nth(1)
            .unwrap()
            .split('-')
            .next()
            .unwrap();
        number(at) * 1024 + 256
    };
    let old: Vec<u8> = bytes[root..root + 256].to_vec();
    let mut poisoned = 0;
    for line in text.lines() {
        if let Some(rest) = line.split("Inode table at ").nth(1) {
            let table = number(rest.split('-').next().unwrap());
            poisoned = table;
        }
        if let Some((_, n)) = line.rsplit_once(", ")
            && let Some(n) = n.strip_suffix(" unused inodes")
        {
            for i in (per_group - number(n)).div_ceil(4) * 4..per_group {
                let at = poisoned * 1024 + i * 256;
                bytes[at..at + 256].copy_from_slice(&old);
            }
        }
    }
    std::fs::write(image.file.path(), bytes).unwrap();
    let fs = image.mount();
    let mut links = String::new();
    for i in 0..100 {
        let h = fs.journal.start(INODE_CREDITS + 2).unwrap();
        let ino = fs.alloc.alloc_inode(&h, 2, InodeUse::Other).unwrap();
        let mut data = InodeData {
            mode: 0o100_644,
            links: 1,
            extra_isize: fs.geo.want_extra_isize,
            ..InodeData::default()
        };
        map::init(&fs.geo, &mut data);
        let inode = Inode::new(fs.geo.csum_seed, ino, data);
        let data = inode.data.read().clone();
        fs.write_inode(&h, &inode, &data).unwrap();
        h.stop().unwrap();
        if i < 25 {
            links += &format!("ln <{ino}> /d/n{ino}\n");
        } else {
            let h = fs.journal.start(INODE_CREDITS + 2).unwrap();
            let mut data = data;
            data.links = 0;
            data.dtime = 1_700_000_000;
            fs.write_inode(&h, &inode, &data).unwrap();
            fs.alloc.free_inode(&h, ino, InodeUse::Other).unwrap();
            h.stop().unwrap();
        }
    }
    image.check(fs, &links);
}

#[test]
fn directories_spread_over_the_flex_groups() {
    let kind = "-t ext4 -b 1024 -g 1024 -G 4 -O ^has_journal";
    let mut image = Image::new(kind, "24M", "");
    let fs = image.mount();
    let h = fs.journal.start(400).unwrap();
    let mut groups = std::collections::BTreeSet::new();
    for _ in 0..12 {
        let top = InodeUse::Directory { top: true };
        let ino = fs.alloc.alloc_inode(&h, 2, top).unwrap();
        groups.insert(fs.geo.group_of_ino(ino).0 / 4);
        let below = fs
            .alloc
            .alloc_inode(&h, ino, InodeUse::Directory { top: false })
            .unwrap();
        assert_eq!(
            fs.geo.group_of_ino(below).0 / 4,
            fs.geo.group_of_ino(ino).0 / 4
        );
    }
    // The first two hold tables and backups, and so fewer free blocks than the average.
    assert!(groups.len() >= 4, "{groups:?}");
}

#[test]
fn reservations_are_exact_and_come_back() {
    let mut image = Image::new("-t ext4 -b 1024 -g 1024 -O ^has_journal", "10M", "");
    let fs = image.mount();
    let free = fs.alloc.counts().free_blocks;
    let spare = fs.alloc.counts().reserved_blocks;
    let mut runs: Vec<Run> = Vec::new();
    let mut sum = 0;
    while let Ok(run) = fs.alloc.reserve(5000, 700, 1, Privilege::User) {
        sum += u64::from(run.len);
        runs.push(run);
    }
    assert_eq!(sum, free - spare);
    runs.sort_by_key(|r| r.start);
    assert!(
        runs.windows(2)
            .all(|w| w[0].start + u64::from(w[0].len) <= w[1].start)
    );
    runs.drain(..).for_each(|run| fs.alloc.unreserve(run));
    assert_eq!(fs.alloc.counts().free_blocks, free);
    image.check(fs, "");
}

#[test]
fn a_streaming_file_is_in_few_pieces() {
    let mut image = Image::new("-t ext4 -b 4096 -O ^has_journal", "64M", &with_files(1));
    let fs = image.mount();
    let mut file = File::open(&fs, FIRST_FILE, true);
    for i in 0..2000 {
        file.insert(&fs, i * 4, 4, Written::Yes).unwrap();
    }
    let mut pieces = 1;
    let all: Vec<u64> = file.model.values().map(|v| v.0).collect();
    pieces += all.windows(2).filter(|w| w[0] + 1 != w[1]).count();
    assert!(pieces <= 4, "{pieces} pieces");
    drop(file);
    image.check(fs, "");
}

#[test]
fn threads_share_the_allocator() {
    for kind in ["-t ext4 -b 1024 -O ^has_journal -g 1024", "-t ext2 -b 1024"] {
        let extents = kind.contains("ext4");
        let mut image = Image::new(kind, "24M", &with_files(4));
        let fs = image.mount();
        std::thread::scope(|scope| {
            for i in 0..4 {
                let fs = &fs;
                scope.spawn(move || {
                    let mut rng = Rng(900 + u64::from(i));
                    let mut file = File::open(fs, FIRST_FILE + i, extents);
                    storm(fs, &mut file, &mut rng, extents, 150, 3000);
                    file.check(fs, 6000);
                });
            }
        });
        image.check(fs, "");
    }
}

/// Bytes of metadata changed at random: operations end, in an error or not, and nothing panics.
#[test]
fn damaged_images_give_errors() {
    let kinds = [
        "-t ext2 -b 1024 -g 1024",
        "-t ext4 -b 1024 -g 1024 -O ^has_journal,^metadata_csum,^uninit_bg",
        "-t ext4 -b 1024 -g 1024 -G 4 -O ^has_journal",
    ];
    for kind in kinds {
        let extents = kind.contains("ext4");
        let mut image = Image::new(kind, "6M", &with_files(4));
        let fs = image.mount();
        let mut blocks: Vec<u64> = (0..8).map(|g| fs.geo.group_desc_at(g).0).collect();
        for i in 0..4 {
            let mut file = File::open(&fs, FIRST_FILE + i, extents);
            storm(
                &fs,
                &mut file,
                &mut Rng(3 + u64::from(i)),
                extents,
                60,
                2000,
            );
            for l in 0..200 {
                file.insert(&fs, 3000 + l * 2, 1, Written::Yes).unwrap();
            }
            // The blocks of the map: what the file uses beside its data.
            let data = file.inode.data.read();
            let at = if extents { 16..20 } else { 48..52 };
            let bytes: [u8; 4] = data.block[at].try_into().unwrap();
            blocks.push(u64::from(u32::from_le_bytes(bytes)));
        }
        for g in 0..fs.geo.group_count {
            blocks.push(fs.inode_table(g).unwrap());
        }
        image.check(fs, "");
        let good = std::fs::read(image.file.path()).unwrap();
        for seed in 1..60u64 {
            let mut rng = Rng(seed * 0x1234_5677);
            let mut bytes = good.clone();
            for _ in 0..1 + rng.below(12) {
                let block = match rng.below(3) {
                    0 => 3 + u64::from(rng.below(100)),
                    _ => blocks[rng.below(blocks.len() as u32) as usize],
                };
                let at = block as usize * 1024 + rng.below(1024) as usize;
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = rng.next() as u8;
                }
            }
            let disk = MemDisk::from_bytes("damaged", bytes);
            let Ok(fs) = Fs::mount(disk, MountOptions::default()) else {
                continue;
            };
            for i in 0..4 {
                let Ok(data) = fs.read_inode(FIRST_FILE + i) else {
                    continue;
                };
                let inode = Inode::new(fs.geo.csum_seed, FIRST_FILE + i, data);
                let mut data = inode.data.write();
                for _ in 0..40 {
                    let mut h = fs.journal.start(200).unwrap();
                    let (at, len) = (rng.below(4000), 1 + rng.below(50));
                    let d = &mut *data;
                    match rng.below(7) {
                        0 => ends(map::lookup(&fs, &inode, d, at, len)),
                        1 => ends(map::remove(&fs, &mut h, &inode, d, at, at + len)),
                        2 => ends(map::convert(&fs, &h, &inode, d, at, len)),
                        3 => ends(map::collapse(&fs, &mut h, &inode, d, at, len)),
                        4 => ends(map::insert_range(&fs, &mut h, &inode, d, at, len)),
                        5 => ends(fs.alloc.alloc_inode(&h, 2, InodeUse::Other)),
                        _ => {
                            let goal = fs.alloc.goal_for(inode.ino, d, at);
                            let run = fs.alloc.reserve(goal, len, 1, Privilege::Root);
                            if let Ok(run) = run
                                && fs.alloc.commit_run(&h, run).is_ok()
                            {
                                ends(map::insert(&fs, &h, &inode, d, at, run, Written::Yes));
                            }
                        }
                    }
                }
                let mut h = fs.journal.start(200).unwrap();
                ends(map::remove(&fs, &mut h, &inode, &mut data, 0, u32::MAX));
            }
        }
    }
}

/// The memory disk zeroes what is discarded: only what was free may have changed.
#[test]
fn a_trim_touches_free_blocks_only() {
    let mut image = Image::new(
        "-t ext4 -b 1024 -g 1024 -O ^has_journal",
        "12M",
        &with_files(1),
    );
    let fs = image.mount();
    let mut file = File::open(&fs, FIRST_FILE, true);
    for i in 0..500 {
        file.insert(&fs, i * 2, 1, Written::Yes).unwrap();
    }
    file.remove(&fs, 100, 300);
    fs.journal.commit_all().unwrap();
    let mut bytes = image.disk.as_ref().unwrap().snapshot();
    drop((file, fs));
    // Marks the empty blocks, those of data among them; tables must stay empty.
    let fs = Fs::mount(
        MemDisk::from_bytes("image", bytes.clone()),
        MountOptions::default(),
    );
    let fs = fs.unwrap();
    let inode = Inode::new(
        fs.geo.csum_seed,
        FIRST_FILE,
        fs.read_inode(FIRST_FILE).unwrap(),
    );
    let data = inode.data.read().clone();
    let mut marked: Vec<u64> = (0..1000)
        .map(|lblk| map::lookup(&fs, &inode, &data, lblk, 1).unwrap().pblk)
        .collect();
    while let Ok(run) = fs.alloc.reserve(0, 100, 1, Privilege::Root) {
        marked.extend(run.start..run.start + u64::from(run.len));
    }
    drop(fs);
    for block in marked.into_iter().filter(|b| *b != 0) {
        let block = &mut bytes[block as usize * 1024..][..1024];
        if block.iter().all(|b| *b == 0) {
            block[..8].copy_from_slice(b"old data");
        }
    }
    let disk = MemDisk::from_bytes("image", bytes.clone());
    let fs = Fs::mount(disk.clone(), MountOptions::default()).unwrap();
    let free = fs.alloc.counts().free_blocks;
    assert_eq!(fs.alloc.trim(0, u64::MAX, 1), Ok(free));
    assert_eq!(fs.alloc.counts().free_blocks, free);
    let now = disk.snapshot();
    let changed = bytes
        .chunks(1024)
        .zip(now.chunks(1024))
        .filter(|(a, b)| a != b)
        .count();
    assert!(changed > 0 && changed as u64 <= free, "{changed} of {free}");
    let inode = Inode::new(
        fs.geo.csum_seed,
        FIRST_FILE,
        fs.read_inode(FIRST_FILE).unwrap(),
    );
    let data = inode.data.read();
    for lblk in 0..1000 {
        let m = map::lookup(&fs, &inode, &data, lblk, 1).unwrap();
        if m.kind == MapKind::Mapped {
            let at = m.pblk as usize * 1024;
            assert_eq!(now[at..at + 8], *b"old data");
        }
    }
}

/// A removal that no single transaction could hold.
#[test]
fn a_removal_goes_on_over_restarts() {
    for (kind, extents) in [
        ("-t ext4 -b 1024 -O ^has_journal", true),
        ("-t ext2 -b 1024", false),
    ] {
        let mut image = Image::new(kind, "64M", &with_files(2));
        let fs = image.mount();
        let mut files: Vec<File> = (0..2)
            .map(|i| File::open(&fs, FIRST_FILE + i, extents))
            .collect();
        for i in 0..4000 {
            let file = &mut files[i % 2];
            file.insert(&fs, i as u32 * 3, 1, Written::Yes).unwrap();
        }
        files[0].change(
            &fs,
            |h, inode, data| {
                h.restart(8)?;
                map::remove(&fs, h, inode, data, 0, u32::MAX)
            },
            BTreeMap::clear,
        );
        files[0].check(&fs, 20_000);
        files[1].check(&fs, 20_000);
        drop(files);
        image.check(fs, "");
    }
}

/// Not a test: prints what the common paths cost.
#[test]
#[ignore = "prints times; run it in a release build"]
fn costs() {
    let mut image = Image::new("-t ext4 -b 4096 -O ^has_journal", "256M", &with_files(2));
    let fs = image.mount();
    let time = |what: &str, n: u32, f: &mut dyn FnMut(u32)| {
        let begin = std::time::Instant::now();
        (0..n).for_each(f);
        println!("{what}: {} ns", begin.elapsed().as_nanos() / u128::from(n));
    };
    let mut file = File::open(&fs, FIRST_FILE, true);
    file.insert(&fs, 0, 1000, Written::Yes).unwrap();
    let data = file.inode.data.read().clone();
    time("lookup, tree in the inode", 1_000_000, &mut |i| {
        std::hint::black_box(map::lookup(&fs, &file.inode, &data, i % 1000, 8).unwrap());
    });
    let mut other = File::open(&fs, FIRST_FILE + 1, true);
    for i in 0..2000 {
        other.insert(&fs, i * 2, 1, Written::Yes).unwrap();
    }
    let data = other.inode.data.read().clone();
    time("lookup, tree of two levels", 1_000_000, &mut |i| {
        std::hint::black_box(map::lookup(&fs, &other.inode, &data, i % 4000, 8).unwrap());
    });
    let h = fs.journal.start(100).unwrap();
    let mut goal = 20_000;
    let mut runs = Vec::with_capacity(10_000);
    time("reserve one block", 10_000, &mut |_| {
        let run = fs.alloc.reserve(goal, 1, 1, Privilege::User).unwrap();
        goal = run.start + 1;
        runs.push(run);
    });
    time("commit one block", 10_000, &mut |i| {
        fs.alloc.commit_run(&h, runs[i as usize]).unwrap();
    });
    time("free one block", 10_000, &mut |i| {
        fs.alloc
            .free(&h, runs[i as usize].start, 1, BlockUse::Data)
            .unwrap();
    });
    let mut inodes = Vec::new();
    time("take an inode", 5_000, &mut |_| {
        inodes.push(fs.alloc.alloc_inode(&h, 2, InodeUse::Other).unwrap());
    });
    time("free an inode", 5_000, &mut |i| {
        fs.alloc
            .free_inode(&h, inodes[i as usize], InodeUse::Other)
            .unwrap();
    });
}
