//! The workload on a file system with ever more room: it runs out of blocks, and of inodes, at each
//! place where it takes some.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockstack::DynDevice;
use blockstack::backend::mem::{Image, MemDisk};
use fs::ops::SetAttr;
use fs::{Fs, FsError, MountOptions};

use super::script::{Script, check_promises};
use super::storm::image::Scratch;
use super::storm::{DIR, DIRECT, FILE, ME, ROOT, write};
use super::{PROGRESS, watch};

/// Room beyond which a workload that still fails is one that needs too much.
const MOST: u64 = 1200;

fn mount(disk: &Arc<MemDisk>) -> Arc<Fs> {
    let dev: DynDevice = disk.clone();
    let options = MountOptions {
        commit_secs: 60,
        ..MountOptions::default()
    };
    Fs::mount(dev, options).unwrap()
}

/// Takes all blocks for a file and gives the image.
fn without_blocks(made: Image) -> Image {
    let disk = MemDisk::from_image("full", made);
    let fs = mount(&disk);
    let ino = fs.create(ROOT, b"filler", FILE, 0, &ME).unwrap().ino;
    let block = fs.geo.block_size as usize;
    let (mut at, mut len) = (0, 1 << 18);
    while len >= block {
        match write(&fs, ino, at, &vec![1; len], DIRECT) {
            Ok(written) => at += u64::from(written),
            Err(FsError::NoSpace) => len /= 2,
            Err(error) => panic!("filling: {error}"),
        }
    }
    fs.unmount().unwrap();
    drop(fs);
    disk.image()
}

fn give_blocks(fs: &Arc<Fs>, count: u64) {
    let filler = fs.lookup(ROOT, b"filler").unwrap().unwrap();
    let size = Some(filler.size - count * u64::from(fs.geo.block_size));
    let set = SetAttr {
        size,
        ..SetAttr::default()
    };
    fs.setattr(filler.ino, &set, &ME).unwrap();
    fs.sync().unwrap();
}

/// Takes all inodes and gives the image.
fn without_inodes(made: Image) -> Image {
    let disk = MemDisk::from_image("full", made);
    let fs = mount(&disk);
    let dir = fs.create(ROOT, b"filler", DIR, 0, &ME).unwrap().ino;
    for number in 0.. {
        match fs.create(dir, format!("{number}").as_bytes(), FILE, 0, &ME) {
            Ok(_) => {}
            Err(FsError::NoSpace) => break,
            Err(error) => panic!("filling: {error}"),
        }
    }
    fs.unmount().unwrap();
    drop(fs);
    disk.image()
}

fn give_inodes(fs: &Arc<Fs>, count: u64) {
    let dir = fs.lookup(ROOT, b"filler").unwrap().unwrap().ino;
    for number in 0..count {
        let name = format!("{number}");
        let ino = fs.lookup(dir, name.as_bytes()).unwrap().unwrap().ino;
        fs.unlink(dir, name.as_bytes(), &ME).unwrap();
        fs.forget(ino, 2);
    }
    fs.sync().unwrap();
}

/// What was refused for want of room.
fn run(
    scratch: &Scratch,
    full: &Image,
    give: fn(&Arc<Fs>, u64),
    room: u64,
) -> Result<usize, String> {
    PROGRESS.fetch_add(1, Ordering::SeqCst);
    let disk = MemDisk::from_image("mem", full.clone());
    let fs = mount(&disk);
    give(&fs, room);
    let mut script = Script::new(&fs);
    script.run();
    let (book, failures) = script.close();
    if fs.is_read_only() {
        return Err("read-only, without an error of the device".to_owned());
    }
    for (what, error) in &failures {
        let needs_none = matches!(
            &what[..],
            "unlink" | "rmdir" | "read" | "readdir" | "lookup" | "fsync" | "sync" | "iget"
        );
        if *error != FsError::NoSpace || needs_none {
            return Err(format!("{what}: {error}"));
        }
    }
    fs.unmount().map_err(|error| format!("unmount: {error}"))?;
    drop(fs);
    let image = disk.image();
    let kept = |error| {
        let path = Scratch::keep(&image, "scarce");
        format!("{error}, image: {}", path.display())
    };
    scratch.check(&image).map_err(kept)?;
    check_promises(image.clone(), &book).map_err(kept)?;
    Ok(failures.len())
}

fn ever_more(full: &Image, give: fn(&Arc<Fs>, u64)) {
    watch();
    // Each run takes as long as a removed file is waited for.
    let step = if super::is_long() { 1 } else { 5 };
    let scratch = Scratch::new();
    let (mut room, mut runs) = (0, 0);
    loop {
        let refused = match run(&scratch, full, give, room) {
            Ok(refused) => refused,
            Err(error) => panic!("with room for {room}: {error}"),
        };
        runs += 1;
        assert!(room > 0 || refused > 0, "there was room from the start");
        if refused == 0 {
            break;
        }
        room += step;
        assert!(
            room < MOST,
            "{refused} operations fail though there is room"
        );
    }
    println!("{runs} runs, enough with room for {room}");
}

#[test]
fn out_of_space_at_each_block() {
    let scratch = Scratch::new();
    let made = scratch.try_mkfs(&super::EXT4, "6M").unwrap();
    ever_more(&without_blocks(made), give_blocks);
}

#[test]
fn out_of_space_at_each_block_of_an_ext3() {
    let scratch = Scratch::new();
    let made = scratch.try_mkfs(&super::EXT3, "6M").unwrap();
    ever_more(&without_blocks(made), give_blocks);
}

#[test]
fn out_of_inodes_at_each_name() {
    let scratch = Scratch::new();
    let args = [&super::EXT4[..], &["-N", "128"]].concat();
    let made = scratch.try_mkfs(&args, "6M").unwrap();
    ever_more(&without_inodes(made), give_inodes);
}
