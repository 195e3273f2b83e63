//! Many files in one directory: each costs what the first did.

use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::common::{Image, count, tell};
use crate::need_fuse;

const PARTS: u64 = 8;

/// Does something to each file, and compares what the first and the last part cost.
fn phase(name: &str, files: u64, mut act: impl FnMut(u64)) {
    let part = files / PARTS;
    let times: Vec<Duration> = (0..PARTS)
        .map(|number| {
            let start = Instant::now();
            (number * part..(number + 1) * part).for_each(&mut act);
            start.elapsed()
        })
        .collect();
    let micros = |time: Duration| time.as_secs_f64() * 1e6 / part as f64;
    let total: Duration = times.iter().sum();
    let (first, last) = (micros(times[0]), micros(times[times.len() - 1]));
    tell(&format!(
        "{name}: {:.1} us a file, {first:.1} in the first eighth, {last:.1} in the last",
        micros(total) / PARTS as f64
    ));
    // Far from linear growth, and far from the noise of a busy machine.
    assert!(
        last < first * 5.0 + 50.0,
        "{name}: {first} us grew to {last}"
    );
}

#[test]
fn costs_do_not_grow() {
    need_fuse!("many::costs_do_not_grow");
    let files = count(16_000, 200_000);
    let image = Image::new("-t ext4 -N 250000", "512M");
    let mount = image.mount("");
    let dir = mount.dir.join("many");
    std::fs::create_dir(&dir).unwrap();
    let path = |dir: &PathBuf, number: u64| dir.join(format!("a file with number {number:06}"));
    phase("create", files, |number| {
        File::create_new(path(&dir, number)).unwrap();
    });
    assert_eq!(std::fs::read_dir(&dir).unwrap().count() as u64, files);
    mount.unmount();
    image.assert_clean();

    let mount = image.mount("");
    let start = Instant::now();
    assert_eq!(std::fs::read_dir(&dir).unwrap().count() as u64, files);
    let each = start.elapsed().as_secs_f64() * 1e6 / files as f64;
    tell(&format!("list: {each:.2} us a file"));
    phase("look up", files, |number| {
        std::fs::metadata(path(&dir, number)).unwrap();
    });
    let renamed = |number: u64| dir.join(format!("renamed to number {number}"));
    phase("rename", files, |number| {
        std::fs::rename(path(&dir, number), renamed(number)).unwrap();
    });
    phase("delete", files, |number| {
        std::fs::remove_file(renamed(number)).unwrap();
    });
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
    std::fs::remove_dir(&dir).unwrap();
    mount.unmount();
    image.assert_clean();
}
