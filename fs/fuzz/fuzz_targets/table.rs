#![no_main]
//! Tables as `dmsetup` takes them.

use blockstack::backend::null::NullDisk;
use blockstack::{BlkError, BlkResult, DynDevice, SectorCount};
use dmtargets::{MappedDevice, Registry, Table, concise};

libfuzzer_sys::fuzz_target!(|text: &str| {
    let disk: DynDevice = NullDisk::new("null0", SectorCount::new(1 << 20));
    let source = move |name: &str| -> BlkResult<DynDevice> {
        match name {
            "null0" => Ok(disk.clone()),
            _ => Err(BlkError::NoDevice),
        }
    };
    let registry = Registry::standard();
    let mut tables = vec![text.to_owned()];
    if let Ok(devices) = concise::parse(text) {
        tables.extend(devices.into_iter().map(|device| device.rows));
    }
    for text in tables {
        let Ok(table) = Table::parse(&text, &registry, &source) else {
            continue;
        };
        if let Ok(device) = MappedDevice::create("fuzzed", table) {
            // What was taken is printed, and taken again.
            let printed = device.table();
            assert!(
                Table::parse(&printed, &registry, &source).is_ok(),
                "{printed}"
            );
            let _ = device.status();
            device.remove();
        }
    }
});
