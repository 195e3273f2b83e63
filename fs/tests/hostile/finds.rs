//! What the seeds found, each with the damaged place made directly.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::time::Duration;

use blockstack::DynDevice;
use blockstack::backend::mem::MemDisk;
use fs::ops::{NewNode, RenameFlags};
use fs::{Fs, FsError, FsResult, MountOptions};

use super::base::{Base, Parts, Role, le32, named};
use crate::storm::{DIR, FILE, ME, ROOT};

/// Runs what once hung, on a thread of its own.
fn within<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = channel();
    std::thread::spawn(move || sender.send(what()));
    let ended = receiver.recv_timeout(Duration::from_secs(30));
    ended.unwrap_or_else(|error| panic!("a hang or a panic: {error}"))
}

/// Mounts a copy of the image with `change` made to it and the checksums right.
fn mounted(base: &Base, change: impl FnOnce(&mut Parts<'_>) -> Vec<u64>) -> Arc<Fs> {
    let mut image = base.image.clone();
    let geo = &base.geo;
    let image_ref = &mut image;
    let touched = change(&mut Parts {
        geo,
        image: image_ref,
    });
    base.seal(&mut image, &touched);
    let dev: DynDevice = MemDisk::from_image("damaged", image);
    Fs::mount(dev, MountOptions::default()).unwrap()
}

/// The inode of a path.
fn ino_of(base: &Base, path: &str) -> u32 {
    let fs = mounted(base, |_| Vec::new());
    let mut ino = ROOT;
    for name in path.split('/') {
        ino = fs.lookup(ino, name.as_bytes()).unwrap().unwrap().ino;
    }
    fs.unmount().unwrap();
    ino
}

/// Lets the entry `name` of a directory stand for another inode; gives the block.
fn retarget(base: &Base, parts: &mut Parts<'_>, name: &str, ino: u32) -> Vec<u64> {
    let dirs = base
        .roles
        .iter()
        .filter(|it| matches!(it.1, Role::Directory(_)));
    for (&block, _) in dirs {
        let bytes = parts.block(block);
        let found = bytes
            .windows(name.len())
            .position(|part| part == name.as_bytes());
        let Some(at) = found.and_then(|at| at.checked_sub(8)) else {
            continue;
        };
        if usize::from(bytes[at + 6]) == name.len() && le32(&bytes, at) != 0 {
            let at = parts.at(block) + at;
            parts.image.write_at(at, &ino.to_le_bytes());
            return vec![block];
        }
    }
    panic!("no entry {name}")
}

#[track_caller]
fn damaged<T>(res: FsResult<T>, want: &str) {
    match res {
        Err(FsError::Corrupt { what, .. }) if what == want => {}
        Err(error) => panic!("{error}, not {want}"),
        Ok(_) => panic!("no error, not {want}"),
    }
}

/// Went wrong: a read near the end of a file with a size that needs block numbers of over 32 bits
/// ended in an overflow.
#[test]
fn a_file_longer_than_any_can_be_is_refused() {
    let base = named("ext4 1k");
    let ino = ino_of(&base, "made/small");
    for high in [1 << 10, u32::MAX] {
        let fs = mounted(&base, |parts| {
            let at = parts.inode_at(ino).unwrap();
            parts.image.write_at(at + 108, &high.to_le_bytes());
            Vec::new()
        });
        damaged(fs.getattr(ino), "inode: i_size");
        fs.unmount().unwrap();
    }
}

/// Went wrong: the lock of the directory was taken twice, and never given.
#[test]
fn a_directory_in_itself_can_be_removed_by_nobody() {
    within(|| {
        let base = named("ext4 1k");
        let made = ino_of(&base, "made");
        let fs = mounted(&base, |parts| retarget(&base, parts, "inner", made));
        let want = "directory entry: a directory above it";
        let none = RenameFlags::empty();
        damaged(fs.rmdir(made, b"inner", &ME), want);
        damaged(fs.unlink(made, b"inner", &ME), want);
        damaged(fs.rename(made, b"inner", made, b"new", none, &ME), want);
        damaged(fs.rename(made, b"small", made, b"inner", none, &ME), want);
        let exchange = RenameFlags::EXCHANGE;
        damaged(
            fs.rename(made, b"small", made, b"inner", exchange, &ME),
            want,
        );
        fs.unmount().unwrap();
    });
}

/// Went wrong: as above, with the lock of the other directory.
#[test]
fn a_rename_does_not_wait_for_a_directory_that_it_has_locked() {
    within(|| {
        let base = named("ext4 1k");
        let dir = ino_of(&base, "dir");
        let fs = mounted(&base, |parts| retarget(&base, parts, "inner", dir));
        let made = fs.lookup(ROOT, b"made").unwrap().unwrap().ino;
        let want = "directory entry: a directory above it";
        let none = RenameFlags::empty();
        damaged(fs.rename(made, b"inner", dir, b"new", none, &ME), want);
        damaged(fs.rename(dir, b"fifo", made, b"inner", none, &ME), want);
        fs.unmount().unwrap();
    });
}

/// Went wrong: a listing took the lock of the directory once more, which waits for ever where
/// somebody waits to change it.
#[test]
fn a_listing_with_attributes_takes_the_lock_of_its_directory_once() {
    within(|| {
        let base = named("ext4 1k");
        let made = ino_of(&base, "made");
        let fs = mounted(&base, |parts| retarget(&base, parts, "inner", made));
        let writer = {
            let fs = fs.clone();
            let (sender, receiver) = channel();
            let writer = std::thread::spawn(move || {
                receiver.recv().unwrap();
                fs.create(made, b"new", FILE, 0, &ME).map(|_| ())
            });
            (sender, writer)
        };
        let dir = fs.iget(made).unwrap();
        let mut seen = 0;
        let res = fs.readdirplus(made, 0, &mut |entry, _| {
            if seen == 0 {
                writer.0.send(()).unwrap();
                // Until the writer waits for the lock: no further reader gets it then.
                while dir.data.try_read().is_some() {
                    std::thread::yield_now();
                }
            }
            seen += u32::from(entry.name == b"inner") + 1;
            fs::dir::Emit::More
        });
        res.unwrap();
        writer.1.join().unwrap().unwrap();
        assert!(seen > 4);
        fs.unmount().unwrap();
    });
}

/// Went wrong: an inode that the kernel knows was given to a new file.
#[test]
fn an_inode_in_use_is_not_made_again() {
    let base = named("ext4 1k");
    let ino = ino_of(&base, "made/small");
    let fs = mounted(&base, |parts| {
        let (group, index) = base.geo.group_of_ino(ino);
        let at = parts.at(le32(&parts.desc(group), 4).into()) + index as usize / 8;
        let mut byte = [0];
        parts.image.read_at(at, &mut byte);
        byte[0] &= !(1 << (index % 8));
        parts.image.write_at(at, &byte);
        let at = parts.desc_at(group) + 0xe;
        let mut free = [0; 2];
        parts.image.read_at(at, &mut free);
        let free = u16::from_le_bytes(free) + 1;
        parts.image.write_at(at, &free.to_le_bytes());
        Vec::new()
    });
    let made = fs.lookup(ROOT, b"made").unwrap().unwrap();
    fs.lookup(made.ino, b"small").unwrap().unwrap();
    let want = "inode bitmap: an inode in use is marked free";
    damaged(fs.create(ROOT, b"new", FILE, 0, &ME), want);
    assert_eq!(fs.getattr(ino).unwrap().size, 7);
    fs.unmount().unwrap();
}

/// Marks all blocks of a group as used but one of them.
fn leave_free(base: &Base, parts: &mut Parts<'_>, block: u64) -> Vec<u64> {
    let (group, index) = base.geo.group_of_block(block);
    let bitmap = u64::from(le32(&parts.desc(group), 0));
    let mut bytes = vec![255; base.geo.block_size as usize];
    bytes[index as usize / 8] &= !(1 << (index % 8));
    let at = parts.at(bitmap);
    parts.image.write_at(at, &bytes);
    vec![bitmap]
}

/// Went wrong: the new block of a directory was its own index, which a split overwrote and then
/// took for what it had been: an entry was put far outside of it.
#[test]
fn a_split_that_is_given_the_index_itself_is_refused() {
    for name in ["ext4 1k", "no csum", "ext3"] {
        let base = named(name);
        let dir = ino_of(&base, "dir");
        let fs = mounted(&base, |_| Vec::new());
        let root = {
            let inode = fs.iget(dir).unwrap();
            let data = inode.data.read();
            fs::inode::map::lookup(&fs, &inode, &data, 0, 1)
                .unwrap()
                .pblk
        };
        fs.unmount().unwrap();
        let fs = mounted(&base, |parts| leave_free(&base, parts, root));
        let failed = (0..300).find_map(|number| {
            let name = format!("{}-{number}", "b-long-name".repeat(7));
            fs.create(dir, name.as_bytes(), FILE, 0, &ME).err()
        });
        let what = "directory index: changed under an operation";
        damaged::<()>(Err(failed.unwrap()), what);
        fs.unmount().unwrap();
    }
}

/// Two directories, each in the other: their numbers.
fn circle(base: &Base) -> (Arc<Fs>, u32, u32) {
    let made = ino_of(base, "made");
    let inner = ino_of(base, "made/inner");
    let first = format!("{}-0", "n".repeat(150));
    let fs = mounted(base, |parts| retarget(base, parts, &first, made));
    assert_eq!(
        fs.lookup(inner, first.as_bytes()).unwrap().unwrap().ino,
        made
    );
    (fs, made, inner)
}

/// Until somebody who wants to change the directory holds up its readers.
fn wait_for_writer(fs: &Arc<Fs>, dir: u32) {
    let dir = fs.iget(dir).unwrap();
    while dir.data.try_read().is_some() {
        std::thread::yield_now();
    }
}

/// Went wrong: two listings, each with the lock that the other waited for, behind somebody who
/// waits for both.
#[test]
fn listings_of_directories_in_a_circle_do_not_wait_for_each_other() {
    within(|| {
        let base = named("ext4 1k");
        let (fs, made, inner) = circle(&base);
        let both = Arc::new(std::sync::Barrier::new(2));
        let list = |dir: u32, other: u32| {
            let (fs, both) = (fs.clone(), both.clone());
            std::thread::spawn(move || {
                let mut first = true;
                fs.readdirplus(dir, 0, &mut |_, _| {
                    if std::mem::take(&mut first) {
                        both.wait();
                        let writer = fs.clone();
                        std::thread::spawn(move || writer.create(dir, b"new", FILE, 0, &ME));
                        wait_for_writer(&fs, dir);
                        wait_for_writer(&fs, other);
                        both.wait();
                    }
                    fs::dir::Emit::More
                })
            })
        };
        let lists = [list(made, inner), list(inner, made)];
        for list in lists {
            list.join().unwrap().unwrap();
        }
    });
}

/// Went wrong: as above; a lookup kept the lock of its directory.
#[test]
fn a_lookup_waits_for_a_directory_without_a_lock() {
    within(|| {
        let base = named("ext4 1k");
        let (fs, made, inner) = circle(&base);
        let above = fs.iget(made).unwrap();
        let before = above.lookups.load(Ordering::SeqCst);
        let held = above.data.write();
        let looker = {
            let fs = fs.clone();
            let name = format!("{}-0", "n".repeat(150));
            std::thread::spawn(move || fs.lookup(inner, name.as_bytes()).unwrap().unwrap().ino)
        };
        while above.lookups.load(Ordering::SeqCst) == before {
            std::thread::yield_now();
        }
        let maker = fs.clone();
        let maker = std::thread::spawn(move || maker.create(inner, b"new", FILE, 0, &ME).map(drop));
        maker.join().unwrap().unwrap();
        drop(held);
        assert_eq!(looker.join().unwrap(), made);
        fs.unmount().unwrap();
    });
}

/// Went wrong: `.` and `..` came twice, where the first child was busy and the listing began anew.
#[test]
fn a_listing_that_meets_a_busy_directory_gives_nothing_twice() {
    within(|| {
        let base = named("ext4 1k");
        let fs = mounted(&base, |_| Vec::new());
        let made = fs.create(ROOT, b"outer", DIR, 0, &ME).unwrap().ino;
        let inner = fs.create(made, b"inner", DIR, 0, &ME).unwrap().ino;
        let child = fs.iget(inner).unwrap();
        let (is_held, let_go) = (channel(), channel::<()>());
        let holder = std::thread::spawn(move || {
            let _held = child.data.write();
            is_held.0.send(()).unwrap();
            let_go.1.recv().unwrap();
        });
        is_held.1.recv().unwrap();
        let (mut names, mut cookie) = (Vec::new(), 0);
        let mut list = |cookie: &mut u64| {
            fs.readdirplus(made, *cookie, &mut |entry, _| {
                names.push(entry.name.to_vec());
                *cookie = entry.next_cookie;
                fs::dir::Emit::More
            })
        };
        // Up to the child, which it does not wait for, having something to give.
        list(&mut cookie).unwrap();
        let_go.0.send(()).unwrap();
        holder.join().unwrap();
        list(&mut cookie).unwrap();
        let all = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all);
        assert!(names.contains(&b"inner".to_vec()) && names.contains(&b"..".to_vec()));
    });
}

/// Went wrong: a sound file system became read-only, as one with errors, where a symbolic link was
/// read while it was deleted.
#[test]
fn a_symbolic_link_that_is_gone_is_no_damage() {
    within(|| {
        let base = named("ext4 1k");
        let fs = mounted(&base, |_| Vec::new());
        for target in [&b"short"[..], &[b'y'; 300]] {
            let link = NewNode::Symlink { target };
            let ino = fs.create(ROOT, b"link", link, 0, &ME).unwrap().ino;
            assert_eq!(fs.readlink(ino).unwrap(), target);
            fs.unlink(ROOT, b"link", &ME).unwrap();
            fs.forget(ino, 1);
            // Until somebody else has deleted it.
            let error = loop {
                match fs.readlink(ino) {
                    Ok(_) => std::thread::yield_now(),
                    Err(error) => break error,
                }
            };
            assert_eq!(error, FsError::Stale);
        }
        fs.create(ROOT, b"new", FILE, 0, &ME).unwrap();
        fs.unmount().unwrap();
    });
}
