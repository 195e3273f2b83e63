//! An image of 1 TiB costs what one of 64 MiB does.

use std::time::{Duration, Instant};

use crate::common::{Image, tell};
use crate::need_fuse;

const CACHE_MIB: u64 = 32;

/// Time to mount and largest resident memory in KiB, each the median of several mounts.
fn cost(image: &Image) -> (Duration, u64) {
    let mut times = Vec::new();
    let mut sizes = Vec::new();
    for _ in 0..7 {
        let start = Instant::now();
        let mount = image.mount(&format!("cache_size={CACHE_MIB}m"));
        times.push(start.elapsed());
        std::fs::create_dir_all(mount.dir.join("a/b/c")).unwrap();
        std::fs::write(mount.dir.join("a/b/c/file"), vec![1; 1 << 20]).unwrap();
        std::fs::read_dir(&mount.dir).unwrap().count();
        let status = std::fs::read_to_string(format!("/proc/{}/status", mount.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1));
        sizes.push(kib.unwrap().parse().unwrap());
        mount.unmount();
    }
    times.sort();
    sizes.sort();
    (times[times.len() / 2], sizes[sizes.len() / 2])
}

#[test]
fn a_tebibyte_costs_what_64_mebibytes_do() {
    need_fuse!("big::a_tebibyte_costs_what_64_mebibytes_do");
    let lazy = "-t ext4 -E lazy_itable_init=1,lazy_journal_init=1";
    let (small_time, small_size) = cost(&Image::new(lazy, "64M"));
    let (big_time, big_size) = cost(&Image::new(lazy, "1T"));
    let ratio = big_time.as_secs_f64() / small_time.as_secs_f64();
    tell(&format!(
        "mount of 1 TiB / of 64 MiB: {ratio:.2} ({big_time:?} / {small_time:?}), \
         resident {big_size} / {small_size} KiB"
    ));
    // The clock of a machine that does other things as well.
    let bound = small_time * 3 + Duration::from_millis(30);
    assert!(big_time < bound, "{big_time:?} against {small_time:?}");
    assert!(big_size < (64 + CACHE_MIB) << 10, "{big_size} KiB resident");
}
