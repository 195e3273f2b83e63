//! Logs left by the kernel: our replay must give what e2fsck's gives, block for block.

use std::path::Path;
use std::process::Command;

use blockstack::DynDevice;
use blockstack::backend::mem::MemDisk;
use fs::journal::{JournalExtent, Log};

use crate::support::{Random, Scratch, block_size, fs_blocks, journal_extents, run};

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

/// Replays `image` with e2fsck and with ours; both must give the same, superblocks aside.
fn same_as_e2fsck(scratch: &Scratch, image: &[u8], extents: &[JournalExtent]) -> bool {
    let path = scratch.path("theirs");
    std::fs::write(&path, image).unwrap();
    let out = Command::new("e2fsck")
        .args(["-y", "-E", "journal_only"])
        .arg(&path)
        .output();
    let out = out.unwrap();
    let text = String::from_utf8_lossy(&out.stdout).to_string();
    let theirs = std::fs::read(&path).unwrap();

    let (size, blocks) = (block_size(image), fs_blocks(image));
    let disk = MemDisk::from_bytes("ours", image.to_vec());
    let log = Log::open(disk.clone() as DynDevice, size, blocks, extents);
    let replayed = match log.and_then(|mut log| log.recover()) {
        Ok(replayed) => replayed,
        Err(error) => {
            println!("ours: {error}; e2fsck: {text}");
            return false;
        }
    };
    let (ours, size) = (disk.snapshot(), size as usize);
    for (nr, (a, b)) in ours.chunks(size).zip(theirs.chunks(size)).enumerate() {
        let superblock = nr == 1024 / size || (nr == 0 && size > 1024);
        let in_journal = extents
            .iter()
            .any(|run| (run.pblk..run.pblk + u64::from(run.len)).contains(&(nr as u64)));
        assert!(
            a == b || superblock || in_journal,
            "block {nr} differs; {replayed:?}; {text}"
        );
    }
    true
}

#[test]
fn what_debugfs_writes_in_each_checksum_version() {
    for (version, features) in [
        // Without -c, debugfs takes version 1.
        ("", "^metadata_csum,64bit"),
        ("", "^metadata_csum,^64bit"),
        ("-c -v 2", "metadata_csum,^64bit"),
        ("-c -v 2", "metadata_csum,64bit"),
        ("-c -v 3", "metadata_csum,^64bit"),
        ("-c -v 3", "metadata_csum,64bit"),
    ] {
        let scratch = Scratch::new();
        let path = scratch.mkfs("image", 16, &["-t", "ext4", "-b", "1024", "-O", features]);
        let extents = journal_extents(&path);
        // Blocks of random bytes, one of which begins with the magic.
        let mut random = Random(7);
        let mut content: Vec<u8> = (0..16 * 1024).map(|_| random.next() as u8).collect();
        content[3 * 1024..3 * 1024 + 4].copy_from_slice(&[0xC0, 0x3B, 0x39, 0x98]);
        let data = scratch.path("data");
        std::fs::write(&data, &content).unwrap();
        let data = data.to_str().unwrap();
        let script = format!(
            "jo {version}\n\
             jw -b 15000-15015 {data}\njw -b 15100-15103,15200 {data}\n\
             jw -r 15003,15101\njw -b 15003 {data}\njw -r 15005\njc\n"
        );
        let commands = scratch.path("commands");
        std::fs::write(&commands, script).unwrap();
        run(
            "debugfs",
            &[
                "-w",
                "-f",
                commands.to_str().unwrap(),
                path.to_str().unwrap(),
            ],
        );
        let image = std::fs::read(&path).unwrap();
        let size = block_size(&image) as usize;
        assert!(same_as_e2fsck(&scratch, &image, &extents), "{version}");
        // And what is there is what was written.
        let disk = MemDisk::from_bytes("ours", image.clone());
        let dev = disk.clone() as DynDevice;
        let mut log = Log::open(dev, size as u32, fs_blocks(&image), &extents).unwrap();
        let replayed = log.recover().unwrap();
        println!("{version:8} {features}: {replayed:?}");
        assert_eq!((replayed.transactions, replayed.revoked), (5, 3));
        let ours = disk.snapshot();
        let block = |nr: usize| &ours[nr * size..][..size];
        let part = |nr: usize| &content[nr * size..][..size];
        assert_eq!(block(15000), part(0));
        assert_eq!(block(15003), part(0), "written after its revoke");
        assert_eq!(block(15015), part(15));
        assert_ne!(block(15005), part(5), "revoked");
        assert_ne!(block(15101), part(1), "revoked");
        assert_eq!(block(15200), part(4));
    }
}

#[test]
fn damaged_logs_end_where_they_end_for_e2fsck() {
    let scratch = Scratch::new();
    let args = [
        "-t",
        "ext4",
        "-b",
        "1024",
        "-J",
        "size=1",
        "-O",
        "metadata_csum,64bit",
    ];
    let path = scratch.mkfs("image", 16, &args);
    let copy = scratch.path("copy");
    if !leave_a_log(&path, &copy, &scratch.path("mnt")) {
        return;
    }
    let (image, extents) = (std::fs::read(&copy).unwrap(), journal_extents(&copy));
    let mut random = Random(3);
    let mut same = 0;
    for _ in 0..60 {
        let mut bad = image.clone();
        let within = if random.below(2) == 0 {
            random.below(60)
        } else {
            random.below(1024)
        };
        let block = (extents[0].pblk + 1 + random.below(260)) * 1024;
        // Behind the record of a commit block we, and newer kernels, do not mind.
        if bad[block as usize + 7] == 2 && within >= 60 {
            continue;
        }
        let at = block + within;
        bad[at as usize] ^= 1 << random.below(8);
        same += u32::from(same_as_e2fsck(&scratch, &bad, &extents));
    }
    println!("{same} of 60 replayed alike, the rest refused by ours");
    assert!(same > 5);
}

#[test]
fn fast_commits_wait_until_they_are_replayed() {
    let scratch = Scratch::new();
    let path = scratch.mkfs(
        "image",
        64,
        &["-t", "ext4", "-b", "4096", "-O", "fast_commit"],
    );
    let (copy, mount) = (scratch.path("copy"), scratch.path("mnt"));
    std::fs::create_dir(&mount).unwrap();
    let status = Command::new("mount")
        .args(["-o", "loop,commit=300"])
        .args([&path, &mount])
        .status();
    if !status.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: cannot mount through a loop device (needs root)");
        return;
    }
    let file = std::fs::File::create(mount.join("file")).unwrap();
    file.sync_all().unwrap();
    run("sync", &["-f", mount.to_str().unwrap()]);
    for n in 0..5u8 {
        std::io::Write::write_all(&mut &file, &[n; 5000]).unwrap();
        file.sync_all().unwrap();
    }
    run(
        "cp",
        &[
            "--reflink=never",
            path.to_str().unwrap(),
            copy.to_str().unwrap(),
        ],
    );
    drop(file);
    run("umount", &[mount.to_str().unwrap()]);
    let image = std::fs::read(&copy).unwrap();
    let disk = MemDisk::from_bytes("fast", image.clone());
    let extents = journal_extents(&copy);
    let dev = disk as DynDevice;
    let mut log = Log::open(dev.clone(), 4096, fs_blocks(&image), &extents).unwrap();
    let found = log.recover().unwrap();
    assert!(!found.fast_commits.is_empty() && log.has_fast_commits());
    // The log alone is recovered, and so they wait still.
    let mut log = Log::open(dev, 4096, fs_blocks(&image), &extents).unwrap();
    let again = log.recover().unwrap();
    assert_eq!(again.transactions, 0);
    assert_eq!(again.fast_commits, found.fast_commits);
    // Once unmounted there is nothing to replay.
    let image = std::fs::read(&path).unwrap();
    let disk = MemDisk::from_bytes("clean", image.clone());
    let mut log = Log::open(disk as DynDevice, 4096, fs_blocks(&image), &extents).unwrap();
    assert!(log.recover().unwrap().fast_commits.is_empty());
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
