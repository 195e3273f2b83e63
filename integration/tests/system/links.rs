//! Names and counts of links, seen by others while names go.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::{Image, count};
use crate::need_fuse;

/// Lists `dir` and looks at `dir/x` until it has one link.
fn list_until_one_link(dir: &Path) {
    loop {
        assert_eq!(fs::read_dir(dir).unwrap().count(), 1);
        match fs::metadata(dir.join("x")).unwrap().nlink() {
            2 => {}
            1 => return,
            other => panic!("{other} links while the second name goes"),
        }
    }
}

/// What was lost: the count of a file that had just lost one of two names. Who listed the other's
/// directory before the kernel had the answer gave it the new count, of which it took another one.
#[test]
fn a_name_that_goes_is_counted_once_whoever_lists_meanwhile() {
    need_fuse!("links::a_name_that_goes_is_counted_once_whoever_lists_meanwhile");
    let image = Image::new("-t ext4", "64M");
    // Each answer waits for a commit, so that there is time before it.
    let mount = image.mount("sync");
    let (a, b) = (mount.dir.join("a"), mount.dir.join("b"));
    fs::create_dir(&a).unwrap();
    fs::create_dir(&b).unwrap();
    for _ in 0..count(30, 300) {
        fs::write(a.join("x"), "").unwrap();
        fs::hard_link(a.join("x"), b.join("x")).unwrap();
        let other = b.clone();
        let lists = std::thread::spawn(move || list_until_one_link(&other));
        fs::remove_file(a.join("x")).unwrap();
        lists.join().unwrap();
        assert_eq!(fs::metadata(b.join("x")).unwrap().nlink(), 1);
        fs::remove_file(b.join("x")).unwrap();
    }
    mount.unmount();
    image.assert_clean();
}

/// What was seen: a name that had been removed, in a listing begun after that. Where the server says
/// that it need not hear of opens of directories, the kernel keeps listings; one that another thread
/// had begun before came into the kept one of after, as new.
#[test]
fn a_name_that_went_is_not_listed_whoever_lists_meanwhile() {
    need_fuse!("links::a_name_that_went_is_not_listed_whoever_lists_meanwhile");
    let image = Image::new("-t ext4", "64M");
    let mount = image.mount("");
    let dir = mount.dir.join("shared");
    fs::create_dir(&dir).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    fs::read_dir(&dir).unwrap().for_each(drop);
                }
            });
        }
        // Also when an assertion of this thread fails.
        let _stop = Stop(&stop);
        for round in 0..count(1500, 20_000) {
            let path = dir.join(round.to_string());
            symlink("nowhere", &path).unwrap();
            fs::remove_file(&path).unwrap();
            let seen: Vec<_> = fs::read_dir(&dir).unwrap().map(|e| e.unwrap()).collect();
            assert!(seen.is_empty(), "round {round}: {seen:?} after the removal");
        }
    });
    mount.unmount();
    image.assert_clean();
}

/// Ends the threads that list.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
