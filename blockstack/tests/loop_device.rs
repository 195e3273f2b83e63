//! A block device with blocks of 4096 bytes, the kernel's own locks on it, and its discards.
//!
//! Needs root and a free loop device, so it runs only when asked for:
//! `cargo test -p blockstack --test loop_device -- --ignored`.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::process::Command;

use blockstack::backend::file::{Engine, FileDisk, OpenErrorKind, OpenOptions};
use blockstack::{
    BioFlags, BlkError, BlockDevice, DynDevice, Op, PagePool, Sector, SectorCount, flush_wait,
    range_wait, read_wait, write_wait,
};

struct Loop(String);

impl Loop {
    fn new(image: &std::path::Path, sector_size: u32) -> Self {
        let out = Command::new("losetup")
            .args([
                "--find",
                "--show",
                "--sector-size",
                &sector_size.to_string(),
            ])
            .arg(image)
            .output()
            .unwrap();
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        Self(String::from_utf8(out.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let status = Command::new("losetup").args(["-d", &self.0]).status();
        assert!(status.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

#[test]
#[ignore = "needs root and a free loop device"]
fn a_device_with_coarse_blocks_serves_fine_bios() {
    for (engine, inline) in [
        (Engine::Uring, true),
        (Engine::Uring, false),
        (Engine::Threads, false),
    ] {
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        file.as_file().set_len(16 << 20).unwrap();
        let device = Loop::new(file.path(), 4096);
        let options = OpenOptions {
            engine,
            inline,
            ..OpenOptions::default()
        };
        let disk = FileDisk::open(&device.0, options).unwrap();
        assert_eq!(disk.capacity(), SectorCount::new(32768));
        assert!(disk.is_direct());
        let limits = disk.limits();
        assert_eq!(
            (limits.logical_block_size, limits.physical_block_size),
            (512, 4096)
        );
        let dev: DynDevice = disk;
        for (sector, len) in [
            (0u64, 4096usize),
            (3, 512),
            (9, 8192),
            (80, 65536),
            (32767, 512),
        ] {
            let mut buf = PagePool::shared().alloc(len).unwrap();
            buf.fill((sector as u8).wrapping_add(1));
            let mut buf = write_wait(&dev, Sector::new(sector), buf, BioFlags::FUA).unwrap();
            buf.fill(0);
            let buf = read_wait(&dev, Sector::new(sector), buf).unwrap();
            assert!(
                buf.iter()
                    .all(|&byte| byte == (sector as u8).wrapping_add(1))
            );
        }
        flush_wait(&dev).unwrap();
        range_wait(&dev, Op::Discard, Sector::new(80), SectorCount::new(128)).unwrap();
        range_wait(&dev, Op::WriteZeroes, Sector::new(8), SectorCount::new(8)).unwrap();
        let buf = PagePool::shared().alloc(8192).unwrap();
        let buf = read_wait(&dev, Sector::new(8), buf).unwrap();
        assert!(buf[..4096].iter().all(|&byte| byte == 0));
        assert!(buf[4096..4608].iter().all(|&byte| byte == 10));
        // What is finer than the device's block is refused, and a discard does what it can.
        let fine = |op| range_wait(&dev, op, Sector::new(17), SectorCount::new(9));
        assert_eq!(fine(Op::WriteZeroes), Err(BlkError::NotSupported));
        assert_eq!(fine(Op::Discard), Ok(()));
        let buf = read_wait(&dev, Sector::new(8), buf).unwrap();
        assert!(buf[4096..4608].iter().all(|&byte| byte == 10));
    }
}

#[test]
#[ignore = "needs root and a free loop device"]
fn what_the_kernel_has_mounted_is_in_use() {
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.as_file().set_len(16 << 20).unwrap();
    let mkfs = Command::new("mke2fs")
        .args(["-q", "-F"])
        .arg(file.path())
        .status();
    assert!(mkfs.unwrap().success());
    let device = Loop::new(file.path(), 512);
    let dir = tempfile::tempdir().unwrap();
    let mount = Command::new("mount")
        .arg(&device.0)
        .arg(dir.path())
        .status();
    assert!(mount.unwrap().success());
    let error = FileDisk::open(&device.0, OpenOptions::default()).err();
    let umount = Command::new("umount").arg(dir.path()).status();
    assert!(umount.unwrap().success());
    assert_eq!(error.map(|error| error.kind), Some(OpenErrorKind::InUse));
    let first = FileDisk::open(&device.0, OpenOptions::default()).unwrap();
    let second = FileDisk::open(&device.0, OpenOptions::default())
        .err()
        .unwrap();
    assert_eq!(second.kind, OpenErrorKind::InUse);
    drop(first);
    drop(FileDisk::open(&device.0, OpenOptions::default()).unwrap());
}
