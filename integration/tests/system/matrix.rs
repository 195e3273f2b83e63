//! Everything `mke2fs` makes of ext2, ext3 and ext4, at each block size, empty and filled, under a
//! storm of operations of several processes.

use std::path::Path;
use std::process::Command;

use crate::common::{
    Access, Image, KernelMount, STORM, assert_same_tree, count, make_tree, no_kernel, run, seed,
    shell, skip,
};
use crate::need_fuse;

/// Who put something there before.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Fill {
    Empty,
    Mke2fs,
    Kernel,
}

fn cell(test: &str, options: &str, fill: Fill) {
    need_fuse!(test);
    if fill == Fill::Kernel {
        if let Some(why) = no_kernel() {
            return skip(test, why);
        }
    }
    let source = tempfile::tempdir().unwrap();
    let tree = source.path().join("tree");
    if fill != Fill::Empty {
        make_tree(&tree);
    }
    let from = (fill == Fill::Mke2fs).then(|| source.path());
    let image = Image::filled(options, "256M", from);
    if fill == Fill::Kernel {
        fill_by_kernel(&image, &tree);
    }
    let seed = seed(test);
    let out = image.subdir("out");
    let mount = image.mount("");
    storm(&mount.dir, &out, seed, count(1500, 20_000));
    if fill != Fill::Empty {
        assert_same_tree(&tree, &mount.dir.join("tree"));
    }
    mount.unmount();
    image.assert_clean();

    // With nothing cached.
    let mount = image.mount("ro");
    verify(&mount.dir, &out);
    mount.unmount();
    if no_kernel().is_none() {
        let kernel = KernelMount::new(&image.path, &image.subdir("kernel"), Access::Read);
        verify(&kernel.dir, &out);
        if fill != Fill::Empty {
            assert_same_tree(&tree, &kernel.dir.join("tree"));
        }
    }
}

/// Besides the tree, leaves what only a kernel leaves: unwritten extents, deleted names in an
/// indexed directory, attributes in blocks.
fn fill_by_kernel(image: &Image, tree: &Path) {
    let kernel = KernelMount::new(&image.path, &image.subdir("kernel"), Access::Write);
    run(Command::new("cp")
        .args(["-a"])
        .arg(tree)
        .arg(kernel.dir.join("tree")));
    let script = "mkdir left; cd left
        for i in $(seq 3000); do : >a-name-of-some-length-$i; done
        rm a-name-of-some-length-*7*
        fallocate -l 5M unwritten 2>/dev/null || true
        for i in $(seq 200); do echo $i | dd of=holes bs=1024 seek=$((i * 3)) conv=notrunc 2>/dev/null; done
        setfattr -n user.a -v \"$(head -c 500 /dev/zero | tr '\\0' a)\" holes";
    shell(&kernel.dir, script);
}

fn storm(dir: &Path, out: &Path, seed: u64, ops: u64) {
    run(Command::new("timeout")
        .args(["-k", "5", "1800", STORM, "run", "--dir"])
        .arg(dir)
        .arg("--out")
        .arg(out)
        .args(["--seed", &seed.to_string()])
        .args(["--ops", &ops.to_string()])
        // e2fsck takes years from 2310 on for mistakes of old kernels.
        .args(["--without", "time-wide"]));
}

fn verify(dir: &Path, out: &Path) {
    run(Command::new(STORM)
        .args(["verify", "--dir"])
        .arg(dir)
        .arg("--manifest")
        .arg(out)
        // Under the writeback cache the kernel keeps the times and sends them later; now and then
        // the last ones it sends are a tick or two of its clock behind those it had shown.
        .args(["--mtime-slack", "20"]));
}

macro_rules! cells {
    ($($name:ident: $options:literal;)*) => {
        $(mod $name {
            use super::{cell, Fill};

            #[test]
            fn empty() {
                cell(concat!("matrix::", stringify!($name), "::empty"), $options, Fill::Empty);
            }

            #[test]
            fn filled_by_mke2fs() {
                let name = concat!("matrix::", stringify!($name), "::filled_by_mke2fs");
                cell(name, $options, Fill::Mke2fs);
            }

            #[test]
            fn filled_by_kernel() {
                let name = concat!("matrix::", stringify!($name), "::filled_by_kernel");
                cell(name, $options, Fill::Kernel);
            }
        })*
    };
}

cells! {
    ext2_1k: "-t ext2 -b 1024";
    ext2_2k: "-t ext2 -b 2048";
    ext2_4k: "-t ext2 -b 4096";
    ext3_1k: "-t ext3 -b 1024";
    ext3_2k: "-t ext3 -b 2048";
    ext3_4k: "-t ext3 -b 4096";
    ext4_1k: "-t ext4 -b 1024";
    ext4_2k: "-t ext4 -b 2048";
    ext4_4k: "-t ext4 -b 4096";
    ext2_small_inodes: "-t ext2 -b 1024 -I 128";
    ext4_orphan_file: "-t ext4 -O orphan_file";
    ext4_uninit_bg: "-t ext4 -O ^metadata_csum,uninit_bg,^64bit";
}
