//! What `e2fsck -fn` says of an image.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::{Command, Output};

use blockstack::backend::mem::Image;

use crate::base::Base;
use crate::storm::image::Scratch;

pub struct Verdict {
    pub code: i32,
    /// What it printed, without what it always prints.
    pub text: String,
}

impl Verdict {
    fn of(out: Output) -> Self {
        let printed = [out.stdout, out.stderr].concat();
        let printed = String::from_utf8_lossy(&printed);
        let told = printed.lines().filter(|line| !is_usual(line));
        Self {
            code: out.status.code().unwrap_or(-1),
            text: told.map(|line| format!("{line}\n")).collect(),
        }
    }

    /// Whether it found anything.
    pub fn is_told(&self) -> bool {
        self.code != 0 || !self.text.is_empty()
    }
}

/// Keeps a file for each sound image, and writes into it only what is damaged.
pub struct Oracle {
    dir: Scratch,
    files: HashMap<&'static str, File>,
}

impl Oracle {
    pub fn new() -> Self {
        Self {
            dir: Scratch::new(),
            files: HashMap::new(),
        }
    }

    /// What it says once it has replayed the log.
    pub fn judge_replayed(&mut self, image: &Image) -> Verdict {
        let path = self.dir.path("replayed");
        image.save(&path).unwrap();
        let mut replay = Command::new("e2fsck");
        let replay = replay.args(["-p", "-E", "journal_only"]).arg(&path);
        let replayed = Verdict::of(replay.output().unwrap());
        let check = Command::new("e2fsck").arg("-fn").arg(&path).output();
        let mut checked = Verdict::of(check.unwrap());
        // The mount that comes makes these counts anew.
        let of_mount = ["Free blocks count wrong (", "Free inodes count wrong ("];
        let is_fault = |line: &&str| !of_mount.iter().any(|begin| line.starts_with(begin));
        let lines = checked.text.lines().filter(is_fault);
        checked.text = lines.map(|line| format!("{line}\n")).collect();
        Verdict {
            // 1 says that it has changed something.
            code: (replayed.code & !1) | checked.code,
            text: replayed.text + &checked.text,
        }
    }

    pub fn judge(&mut self, base: &Base, image: &Image) -> Verdict {
        let path = self.dir.path(&base.name.replace(' ', "-"));
        let file = self.files.entry(base.name).or_insert_with(|| {
            base.image.save(&path).unwrap();
            File::options().write(true).open(&path).unwrap()
        });
        let unlike = image.parts_unlike(&base.image);
        let mut bytes = Vec::new();
        let mut put = |from: &Image| {
            for part in &unlike {
                bytes.resize(part.len(), 0);
                from.read_at(part.start, &mut bytes);
                file.write_all_at(&bytes, part.start as u64).unwrap();
            }
        };
        put(image);
        let out = Command::new("e2fsck")
            .arg("-fn")
            .arg(&path)
            .output()
            .unwrap();
        put(&base.image);
        Verdict::of(out)
    }
}

/// What it prints of a sound image, and advice.
fn is_usual(line: &str) -> bool {
    let begins = ["e2fsck 1.", "Pass ", "Warning: skipping journal recovery"];
    line.trim().is_empty()
        || begins.iter().any(|word| line.starts_with(word))
        || line.ends_with(" blocks") && line.contains("% non-contiguous)")
        || line.ends_with(": recovering journal")
        || line.ends_with(": Backing up journal inode block information.")
        || line == "Fix? no"
        || line.contains("extent tree (at level") && line.contains("could be")
}
