//! Logs left by the kernel: our replay must give what e2fsck's gives, block for block.

use std::path::Path;
use std::process::Command;

use blockstack::DynDevice;
use blockstack::backend::mem::MemDisk;
use fs::journal::Log;

use crate::support::{Scratch, block_size, fs_blocks, journal_extents, run};

/// Mounts `image`, works in it, and copies the backing file to `copy` while it is mounted.
fn leave_a_log(image: &Path, copy: &Path, mount: &Path) -> bool {
    std::fs::create_dir_all(mount).unwrap();
    let mounted = Command::new("mount")
        .args(["-o", "loop,commit=300"])
        .args([image, mount])
        .status()
        .is_ok_and(|status| status.success());
    if !mounted {
        eprintln!("SKIPPED: cannot mount through a loop device (needs root)");
        return false;
    }
    let script = "
        set -e
        cd \"$0\"
        for d in 1 2 3 4 5 6; do
            mkdir d$d; for i in $(seq 40); do echo $d $i > d$d/file-with-a-long-name-$i; done
            sync -f .
        done
        rm -r d2 d4; sync -f .
        for i in $(seq 20); do mkdir e$i; done; sync -f .
        rmdir e1 e3 e5 e7; seq 1 20000 > big; ln -s $(seq -s- 60) link; sync -f .
        rm -r d1; for i in $(seq 30); do seq 1 500 > reuse$i; done; sync -f .
        printf '\\300\\073\\071\\230magic' > d3/magic; truncate -s 0 big; mv d3 d5/; sync -f .
    ";
    let done = Command::new("sh")
        .args(["-c", script])
        .arg(mount)
        .status()
        .unwrap();
    run(
        "cp",
        &[
            "--reflink=never",
            image.to_str().unwrap(),
            copy.to_str().unwrap(),
        ],
    );
    run("umount", &[mount.to_str().unwrap()]);
    assert!(done.success());
    true
}

fn compare(args: &[&str]) {
    let scratch = Scratch::new();
    let image = scratch.mkfs("image", 64, args);
    let (ours, theirs) = (scratch.path("ours"), scratch.path("theirs"));
    if !leave_a_log(&image, &ours, &scratch.path("mnt")) {
        return;
    }
    run("cp", &[ours.to_str().unwrap(), theirs.to_str().unwrap()]);
    // Exit code 1 says that something was changed.
    let out = Command::new("e2fsck")
        .args(["-y", "-E", "journal_only"])
        .arg(&theirs)
        .output();
    assert!(out.unwrap().status.code().unwrap() <= 1);

    let bytes = std::fs::read(&ours).unwrap();
    let extents = journal_extents(&ours);
    let (size, blocks) = (block_size(&bytes), fs_blocks(&bytes));
    let disk = MemDisk::from_bytes("ours", bytes);
    let mut log = Log::open(disk.clone() as DynDevice, size, blocks, &extents).unwrap();
    assert!(log.needs_recovery(), "the kernel left an empty log");
    let replayed = log.recover().unwrap();
    println!("{args:?}: {replayed:?}");
    assert!(replayed.transactions > 5 && replayed.blocks > 10);
    assert!(
        replayed.revoked > 0,
        "the script should lead to revoked copies"
    );

    let (ours, theirs) = (disk.snapshot(), std::fs::read(&theirs).unwrap());
    let journal_sb = extents[0].pblk;
    let size = size as usize;
    for (nr, (a, b)) in ours.chunks(size).zip(theirs.chunks(size)).enumerate() {
        // The superblock of the file system and that of the journal carry times and counts.
        let superblock = nr == 1024 / size || (nr == 0 && size > 1024);
        if nr as u64 != journal_sb && !superblock {
            assert!(a == b, "{args:?}: block {nr} differs");
        }
    }
    // A log marked empty is not replayed again.
    let mut again = Log::open(disk.clone() as DynDevice, size as u32, blocks, &extents).unwrap();
    assert!(!again.needs_recovery());
    assert_eq!(again.recover().unwrap().blocks, 0);
    // And the whole image is sound once e2fsck cleared needs_recovery.
    let path = scratch.path("checked");
    std::fs::write(&path, disk.snapshot()).unwrap();
    let out = Command::new("e2fsck")
        .args(["-fy"])
        .arg(&path)
        .output()
        .unwrap();
    assert!(
        out.status.code().unwrap() <= 1,
        "{}",
        String::from_utf8_lossy(&out.stdout)
    );
}

#[test]
fn ext4_with_csum_v3_and_64bit() {
    compare(&["-t", "ext4", "-b", "4096", "-O", "64bit,metadata_csum"]);
}

#[test]
fn ext4_without_checksums() {
    compare(&["-t", "ext4", "-b", "4096", "-O", "^metadata_csum,^64bit"]);
}

#[test]
fn ext4_64bit_without_checksums() {
    compare(&["-t", "ext4", "-b", "2048", "-O", "^metadata_csum,64bit"]);
}

#[test]
fn ext4_with_blocks_of_1k() {
    compare(&["-t", "ext4", "-b", "1024", "-O", "^64bit,metadata_csum"]);
}

#[test]
fn ext3() {
    compare(&["-t", "ext3", "-b", "1024"]);
    compare(&["-t", "ext3", "-b", "4096"]);
}
