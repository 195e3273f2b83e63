//! What cannot be mounted is refused: one line, exit code 32, and no byte of the image changes.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};
use std::thread::sleep;
use std::time::Duration;

use crate::common::{Image, PROGRAM, detach, is_root, output, run, skip, text};
use crate::need_fuse;

fn mount(image: &Path, dir: &Path, options: &str) -> Output {
    let mut command = Command::new("timeout");
    command.args(["-k", "5", "60", PROGRAM]);
    if !options.is_empty() {
        command.arg("-o").arg(options);
    }
    output(command.arg(dir).arg(image))
}

/// Mounts what must be refused, and gives the one line that says why.
#[track_caller]
fn refused(image: &Path, dir: &Path, options: &str) -> String {
    let before = std::fs::read(image).ok();
    let output = mount(image, dir, options);
    let said = text(&output);
    detach(dir);
    assert_eq!(output.status.code(), Some(32), "{image:?}: {said}");
    assert_eq!(said.lines().count(), 1, "{image:?}: {said}");
    assert!(said.starts_with("fusefs-stack: "), "{said}");
    assert!(before == std::fs::read(image).ok(), "{image:?} was changed");
    said
}

/// As [`refused`], and the line has to have `parts`.
#[track_caller]
fn refused_because(image: &Path, dir: &Path, options: &str, parts: &[&str]) {
    let said = refused(image, dir, options);
    for part in parts {
        assert!(said.contains(part), "not named: {part}: {said}");
    }
}

#[test]
fn what_is_no_image() {
    let image = Image::new("-t ext4", "16M");
    let good = std::fs::read(&image.path).unwrap();
    let dir = image.subdir("mnt");
    let file = image.dir.path().join("file");
    let mut noise = vec![0u8; 1 << 20];
    let mut state = 1u64;
    for byte in &mut noise {
        state = state.wrapping_mul(6_364_136_223_846_793_005) + 1;
        *byte = state.to_le_bytes()[7];
    }
    for content in [
        &[][..],
        &[0],
        &good[..511],
        &good[..1024],
        &good[..1536],
        &good[..2047],
        &good[..2048],
        &good[..8192],
        &good[..good.len() / 2],
        &good[..good.len() - 1],
        &vec![0; 1 << 20],
        &vec![0xff; 1 << 20],
        &noise,
    ] {
        std::fs::write(&file, content).unwrap();
        refused(&file, &dir, "");
        refused(&file, &dir, "ro");
    }
    let none = image.dir.path().join("none");
    refused_because(&none, &dir, "", &["none", "does not exist"]);
    refused_because(Path::new("/dev/null"), &dir, "", &["/dev/null"]);
    refused_because(&dir, &dir, "", &["directories"]);
    refused_because(&image.path, &none, "", &["mountpoint", "none"]);
    refused_because(&image.path, &image.path, "", &["directory"]);
    refused_because(&image.path, &dir, "offset=17179869184", &["offset="]);
    refused(&image.path, &dir, "offset=512");
}

#[test]
fn what_is_in_use_or_busy() {
    need_fuse!("bad_input::what_is_in_use_or_busy");
    let image = Image::new("-t ext4", "16M");
    let other = Image::new("-t ext4", "16M");
    let mounted = image.mount("");
    refused_because(&image.path, &other.subdir("mnt"), "", &["in use"]);
    refused_because(&image.path, &other.subdir("mnt"), "ro", &["in use"]);
    let before = std::fs::read(&other.path).unwrap();
    let output = mount(&other.path, &mounted.dir, "");
    let said = text(&output);
    assert_eq!(output.status.code(), Some(32), "{said}");
    assert!(said.contains("busy") && said.lines().count() == 1, "{said}");
    assert!(before == std::fs::read(&other.path).unwrap());
    mounted.unmount();
    image.assert_clean();
}

#[test]
fn what_a_dead_process_left_mounted() {
    need_fuse!("bad_input::what_a_dead_process_left_mounted");
    let image = Image::new("-t ext4", "16M");
    let mounted = image.mount("");
    let pid = mounted.pid().to_string();
    run(Command::new("kill").args(["-s", "KILL", &pid]));
    // Until the kernel has noticed.
    for _ in 0..500 {
        if rustix::fs::statfs(&mounted.dir).is_err() {
            break;
        }
        sleep(Duration::from_millis(10));
    }
    let said = text(&mount(&image.path, &mounted.dir, ""));
    assert!(said.contains("fusermount3 -u"), "{said}");
}

#[test]
fn what_a_user_may_not() {
    let test = "bad_input::what_a_user_may_not";
    if !is_root() {
        return skip(test, "needs root to become somebody else");
    }
    let image = Image::new("-t ext4", "16M");
    let open = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    open(image.dir.path(), 0o755);
    let dir = image.subdir("mnt");
    // Somebody else's program: the build directory may be closed to others.
    let program = image.dir.path().join("fusefs-stack");
    std::fs::copy(PROGRAM, &program).unwrap();
    let nobody = |words: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        command.arg(&program).args(words);
        let said = output(command.arg(&dir).arg(&image.path));
        assert_eq!(said.status.code(), Some(32), "{}", text(&said));
        assert_eq!(text(&said).lines().count(), 1, "{}", text(&said));
        text(&said)
    };
    let before = std::fs::read(&image.path).unwrap();
    open(&image.path, 0o600);
    open(&dir, 0o777);
    let said = nobody(&[]);
    assert!(said.contains("permission denied"), "{said}");
    open(&image.path, 0o644);
    let said = nobody(&[]);
    assert!(said.contains("-o ro"), "{said}");
    open(&image.path, 0o666);
    open(&dir, 0o755);
    let said = nobody(&[]);
    assert!(
        said.contains("mountpoint") && said.contains("write"),
        "{said}"
    );
    open(&dir, 0o1777);
    let said = nobody(&[]);
    assert!(said.contains("sticky"), "{said}");
    open(&dir, 0o777);
    let conf = std::fs::read_to_string("/etc/fuse.conf").unwrap_or_default();
    if !conf.lines().any(|line| line.trim() == "user_allow_other") {
        let said = nobody(&["-o", "allow_other"]);
        assert!(said.contains("user_allow_other"), "{said}");
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    command.arg(&program).arg(&dir).arg(&image.path);
    let said = output(command.env("FUSERMOUNT_PATH", "/nonexistent/fusermount3"));
    assert_eq!(said.status.code(), Some(32));
    assert!(text(&said).contains("package fuse3"), "{}", text(&said));
    assert!(before == std::fs::read(&image.path).unwrap(), "was changed");
}

/// A field of the superblock: offset, bytes, name (super.rst).
type Field = (usize, usize, &'static str);

const FIELDS: &[Field] = &[
    (0x00, 4, "s_inodes_count"),
    (0x04, 4, "s_blocks_count_lo"),
    (0x08, 4, "s_r_blocks_count_lo"),
    (0x0c, 4, "s_free_blocks_count_lo"),
    (0x10, 4, "s_free_inodes_count"),
    (0x14, 4, "s_first_data_block"),
    (0x18, 4, "s_log_block_size"),
    (0x1c, 4, "s_log_cluster_size"),
    (0x20, 4, "s_blocks_per_group"),
    (0x24, 4, "s_clusters_per_group"),
    (0x28, 4, "s_inodes_per_group"),
    (0x2c, 4, "s_mtime"),
    (0x30, 4, "s_wtime"),
    (0x34, 2, "s_mnt_count"),
    (0x36, 2, "s_max_mnt_count"),
    (0x38, 2, "s_magic"),
    (0x3a, 2, "s_state"),
    (0x3c, 2, "s_errors"),
    (0x3e, 2, "s_minor_rev_level"),
    (0x40, 4, "s_lastcheck"),
    (0x44, 4, "s_checkinterval"),
    (0x48, 4, "s_creator_os"),
    (0x4c, 4, "s_rev_level"),
    (0x50, 2, "s_def_resuid"),
    (0x52, 2, "s_def_resgid"),
    (0x54, 4, "s_first_ino"),
    (0x58, 2, "s_inode_size"),
    (0x5a, 2, "s_block_group_nr"),
    (0x5c, 4, "s_feature_compat"),
    (0x60, 4, "s_feature_incompat"),
    (0x64, 4, "s_feature_ro_compat"),
    (0xc8, 4, "s_algorithm_usage_bitmap"),
    (0xcc, 1, "s_prealloc_blocks"),
    (0xcd, 1, "s_prealloc_dir_blocks"),
    (0xce, 2, "s_reserved_gdt_blocks"),
    (0xe0, 4, "s_journal_inum"),
    (0xe4, 4, "s_journal_dev"),
    (0xe8, 4, "s_last_orphan"),
    (0xec, 4, "s_hash_seed"),
    (0xfc, 1, "s_def_hash_version"),
    (0xfd, 1, "s_jnl_backup_type"),
    (0xfe, 2, "s_desc_size"),
    (0x100, 4, "s_default_mount_opts"),
    (0x104, 4, "s_first_meta_bg"),
    (0x108, 4, "s_mkfs_time"),
    (0x10c, 4, "s_jnl_blocks"),
    (0x150, 4, "s_blocks_count_hi"),
    (0x154, 4, "s_r_blocks_count_hi"),
    (0x158, 4, "s_free_blocks_count_hi"),
    (0x15c, 2, "s_min_extra_isize"),
    (0x15e, 2, "s_want_extra_isize"),
    (0x160, 4, "s_flags"),
    (0x164, 2, "s_raid_stride"),
    (0x166, 2, "s_mmp_interval"),
    (0x168, 8, "s_mmp_block"),
    (0x170, 4, "s_raid_stripe_width"),
    (0x174, 1, "s_log_groups_per_flex"),
    (0x175, 1, "s_checksum_type"),
    (0x176, 2, "s_encryption_level"),
    (0x178, 8, "s_kbytes_written"),
    (0x180, 4, "s_snapshot_inum"),
    (0x194, 4, "s_error_count"),
    (0x240, 4, "s_usr_quota_inum"),
    (0x244, 4, "s_grp_quota_inum"),
    (0x248, 4, "s_overhead_blocks"),
    (0x24c, 8, "s_backup_bgs"),
    (0x268, 4, "s_lpf_ino"),
    (0x26c, 4, "s_prj_quota_inum"),
    (0x270, 4, "s_checksum_seed"),
    (0x27c, 2, "s_encoding"),
    (0x27e, 2, "s_encoding_flags"),
    (0x280, 4, "s_orphan_file_inum"),
];

const SUPERBLOCK: usize = 1024;

/// Sets the checksum of the superblock to what it should be (checksums.rst).
fn fix_checksum(image: &mut [u8]) {
    let sum = !crc32c::crc32c(&image[SUPERBLOCK..SUPERBLOCK + 0x3fc]);
    image[SUPERBLOCK + 0x3fc..SUPERBLOCK + 0x400].copy_from_slice(&sum.to_le_bytes());
}

/// Each field in turn 0, 1 and all ones: refused as it should be, or mounted, looked at, written
/// to and unmounted without a panic or a hang.
fn absurd_fields(options: &str) {
    let image = Image::new(options, "4M");
    let good = std::fs::read(&image.path).unwrap();
    let dir = image.subdir("mnt");
    let mut faults = Vec::new();
    let (mut refusals, mut mounts) = (0, 0);
    for &(offset, len, name) in FIELDS {
        for value in [0u64, 1, u64::MAX] {
            let mut bytes = good.clone();
            let at = SUPERBLOCK + offset;
            bytes[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
            if options.contains("ext4") {
                fix_checksum(&mut bytes);
            }
            std::fs::write(&image.path, &bytes).unwrap();
            match try_mount(&image, &dir, &bytes) {
                Ok(true) => mounts += 1,
                Ok(false) => refusals += 1,
                Err(fault) => faults.push(format!("{name} = {value:#x}: {fault}")),
            }
        }
    }
    assert!(faults.is_empty(), "{options}:\n{}", faults.join("\n"));
    // Else the loop tested nothing.
    assert!(refusals > 20 && mounts > 20, "{refusals} and {mounts}");
}

/// Whether it could be mounted; what was wrong with how that, or the refusal, went.
fn try_mount(image: &Image, dir: &Path, bytes: &[u8]) -> Result<bool, String> {
    let (lock, log) = (image.dir.path().join("lock"), image.dir.path().join("log"));
    drop(std::fs::remove_file(&log));
    let options = format!("lockfile={},logfile={}", lock.display(), log.display());
    let output = mount(&image.path, dir, &options);
    let said = text(&output);
    match output.status.code() {
        Some(0) => {}
        Some(32) if said.lines().count() != 1 => return Err(format!("not one line: {said}")),
        Some(32) if std::fs::read(&image.path).unwrap() != bytes => {
            return Err(format!("image changed: {said}"));
        }
        Some(32) => return Ok(false),
        code => return Err(format!("exit code {code:?}: {said}")),
    }
    drop(crate::common::output(
        Command::new("timeout").args(["60", "ls", "-laR"]).arg(dir),
    ));
    drop(std::fs::write(dir.join("file"), vec![1; 10_000]));
    drop(std::fs::create_dir(dir.join("dir")));
    drop(std::fs::remove_file(dir.join("file")));
    detach(dir);
    let mut patience = 3000;
    while lock.exists() {
        patience -= 1;
        if patience == 0 {
            return Err("process does not end".to_owned());
        }
        sleep(Duration::from_millis(10));
    }
    let log = std::fs::read_to_string(&log).unwrap_or_default();
    if log.contains("panicked") {
        return Err(log);
    }
    Ok(true)
}

#[test]
fn absurd_fields_of_ext4() {
    need_fuse!("bad_input::absurd_fields_of_ext4");
    absurd_fields("-t ext4 -b 1024 -O metadata_csum,64bit,orphan_file");
}

#[test]
fn absurd_fields_of_ext2() {
    need_fuse!("bad_input::absurd_fields_of_ext2");
    absurd_fields("-t ext2 -b 1024");
}

#[test]
fn a_wrong_checksum_is_named() {
    let image = Image::new("-t ext4 -O metadata_csum", "4M");
    let mut bytes = std::fs::read(&image.path).unwrap();
    bytes[SUPERBLOCK + 0x78] ^= 1;
    std::fs::write(&image.path, bytes).unwrap();
    refused_because(&image.path, &image.subdir("mnt"), "", &["checksum"]);
}

#[test]
fn data_cannot_go_through_a_journal_that_is_not_there() {
    let image = Image::new("-t ext2", "8M");
    let parts = ["data=journal", "no journal"];
    refused_because(&image.path, &image.subdir("mnt"), "data=journal", &parts);
}

#[test]
fn unknown_features_are_named() {
    need_fuse!("bad_input::unknown_features_are_named");
    let image = Image::new("-t ext4 -O metadata_csum", "4M");
    let dir = image.subdir("mnt");
    let good = std::fs::read(&image.path).unwrap();
    let set = |field: usize, bit: u32| {
        let mut bytes = good.clone();
        let at = SUPERBLOCK + field + bit as usize / 8;
        bytes[at] |= 1 << (bit % 8);
        fix_checksum(&mut bytes);
        std::fs::write(&image.path, bytes).unwrap();
    };
    // Incompatible: nothing goes.
    for bit in [18, 24, 30, 31] {
        set(0x60, bit);
        refused_because(&image.path, &dir, "", &["unsupported features"]);
        refused_because(&image.path, &dir, "ro", &["unsupported features"]);
    }
    // Compatible for reading.
    for bit in [18, 24, 31] {
        set(0x64, bit);
        refused_because(&image.path, &dir, "", &["-o ro"]);
        image.mount("ro").unmount();
    }
}
