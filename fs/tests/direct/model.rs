//! What a file may hold after many writes at once: stamps, and what may have been the last.

use std::sync::atomic::{AtomicU64, Ordering};

use blockstack::sync::{Mutex, Rank};

/// Each so many bytes of a file say where they are from.
pub const UNIT: usize = 1024;
/// What stands in blocks that no file has.
pub const POISON: u8 = 0xb5;

const MAGIC: u64 = 0x5ace_57a3_9d10_77e1;
/// An operation that has not been answered.
const OPEN: u64 = u64::MAX;

/// A unit of a file as some write left it; version 0 is zeros.
pub fn stamp(file: u64, unit: u64, version: u64, out: &mut [u8]) {
    if version == 0 {
        out.fill(0);
        return;
    }
    let words = [MAGIC ^ version, file, unit, version];
    for (index, word) in out.chunks_exact_mut(8).enumerate() {
        let value = words[index % 4] ^ (index / 4) as u64;
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// The version of a unit.
pub fn version(file: u64, unit: u64, bytes: &[u8]) -> Result<u64, String> {
    if bytes.iter().all(|&byte| byte == 0) {
        return Ok(0);
    }
    let word = |at: usize| u64::from_le_bytes(bytes[8 * at..8 * at + 8].try_into().unwrap());
    let version = word(3);
    let mut expected = vec![0; bytes.len()];
    stamp(file, unit, version, &mut expected);
    if version != 0 && bytes == expected {
        return Ok(version);
    }
    let what = if bytes.contains(&POISON) {
        "old content of the disk"
    } else {
        "content of something else"
    };
    Err(format!(
        "file {file} unit {unit}: {what}: {:016x} {:016x} {:016x} {:016x}",
        word(0),
        word(1),
        word(2),
        word(3)
    ))
}

struct Op {
    from: u64,
    to: u64,
    version: u64,
    began: u64,
    ended: u64,
}

/// What was done to one file, and when.
pub struct History {
    pub file: u64,
    ops: Mutex<Vec<Op>>,
}

/// The time of all histories.
static CLOCK: AtomicU64 = AtomicU64::new(1);

pub fn now() -> u64 {
    CLOCK.fetch_add(1, Ordering::SeqCst)
}

impl History {
    pub fn new(file: u64) -> Self {
        Self {
            file,
            ops: Mutex::new(Rank::Pool, Vec::new()),
        }
    }

    /// Begins an operation that leaves `version` in units `from..to`; gives its number.
    pub fn begin(&self, from: u64, to: u64, version: u64) -> usize {
        let mut ops = self.ops.lock();
        ops.push(Op {
            from,
            to,
            version,
            began: now(),
            ended: OPEN,
        });
        ops.len() - 1
    }

    /// It was answered.
    pub fn end(&self, op: usize) {
        self.ops.lock()[op].ended = now();
    }

    pub fn len(&self) -> usize {
        self.ops.lock().len()
    }

    /// Whether all operations were answered.
    pub fn is_over(&self) -> bool {
        self.ops.lock().iter().all(|op| op.ended != OPEN)
    }

    /// Whether some operation has left `version` there.
    pub fn knows(&self, unit: u64, version: u64) -> bool {
        let ops = self.ops.lock();
        let there = |op: &Op| op.version == version && (op.from..op.to).contains(&unit);
        version == 0 || ops.iter().any(there)
    }

    /// Whether what is found at the end may be what the last operation left: no other began after
    /// it was over.
    pub fn check(&self, found: &[u8], units: u64) -> Result<(), String> {
        let ops = self.ops.lock();
        for unit in 0..units {
            let at = unit as usize * UNIT;
            let mut bytes = [0; UNIT];
            let there = found.get(at..found.len().min(at + UNIT)).unwrap_or(&[]);
            bytes[..there.len()].copy_from_slice(there);
            let version = version(self.file, unit, &bytes)?;
            let touching = || ops.iter().filter(|op| (op.from..op.to).contains(&unit));
            let last_began = touching().map(|op| op.began).max().unwrap_or(0);
            let may_be_last = touching().any(|op| op.version == version && op.ended >= last_began);
            if !(may_be_last || (version == 0 && last_began == 0)) {
                return Err(format!(
                    "file {} unit {unit}: version {version:#x} was written over",
                    self.file
                ));
            }
        }
        Ok(())
    }
}
