//! What a layer of device-mapper costs: one 4 KiB bio, bare and through linear devices.

#![allow(clippy::expect_used, reason = "a bench ends where something is wrong")]

use blockstack::backend::mem::MemDisk;
use blockstack::backend::null::NullDisk;
use blockstack::{
    Bio, BioSet, BlkResult, DynDevice, Op, PagePool, Sector, SectorCount, Wait, submit_bio,
};
use divan::counter::ItemsCount;
use dmtargets::linear_over;

fn main() {
    divan::main();
}

const SECTORS: u64 = 4096;
const BIOS: usize = 1000;
const LAYERS: [usize; 4] = [0, 1, 2, 8];

fn stack(mut dev: DynDevice, layers: usize) -> DynDevice {
    for _ in 0..layers {
        let len = SectorCount::new(dev.capacity().raw() - 8);
        dev = linear_over(dev, Sector::new(8), len).expect("a linear device");
    }
    dev
}

fn end(_: Bio, res: BlkResult) {
    res.expect("success");
}

fn run(bencher: divan::Bencher, dev: &DynDevice, op: Op) {
    let set: BioSet<()> = BioSet::new("bench", 4);
    bencher.counter(ItemsCount::new(BIOS)).bench_local(|| {
        for at in 0..BIOS as u64 {
            let mut bio = set.alloc(op, Wait::Yes).expect("a bio");
            bio.push(PagePool::shared().alloc(4096).expect("memory"))
                .expect("whole sectors");
            bio.set_dev(dev.clone(), Sector::new(at * 8 % 2048));
            bio.set_end_io(end);
            submit_bio(bio);
        }
    });
}

#[divan::bench(args = LAYERS)]
fn null_write(bencher: divan::Bencher, layers: usize) {
    let disk = NullDisk::new("null0", SectorCount::new(SECTORS));
    run(bencher, &stack(disk, layers), Op::Write);
}

#[divan::bench(args = LAYERS)]
fn mem_read(bencher: divan::Bencher, layers: usize) {
    let disk = MemDisk::new("mem0", SectorCount::new(SECTORS));
    run(bencher, &stack(disk, layers), Op::Read);
}
