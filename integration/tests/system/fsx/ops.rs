//! What is done to a file, and to its model.

use std::os::unix::fs::FileExt;

use rustix::fs::{Advice, FallocateFlags, SeekFrom, copy_file_range, fadvise, fallocate, seek};
use rustix::io::Errno;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use super::file::Worker;

/// The longest file, and the longest operation.
const MAX_SIZE: usize = 384 * 1024;
const MAX_OP: usize = 40 * 1024;
/// Of pages, and of what moves in a file with any of the block sizes.
const PAGE: usize = 4096;
/// What direct I/O begins and ends with.
const SECTOR: usize = 512;

impl Worker {
    pub fn step(&mut self) {
        self.steps += 1;
        match self.random.below(100) {
            0..12 => self.read(),
            12..32 => self.write(),
            32..40 => self.read_direct(),
            40..52 => self.write_direct(),
            52..58 => self.read_mapped(),
            58..66 => self.write_mapped(),
            66..72 => self.punch(),
            72..77 => self.zero_range(),
            77..80 => self.preallocate(),
            80..84 => self.copy(),
            84..88 => self.truncate(),
            88..91 => self.collapse(),
            91..94 => self.insert(),
            94..96 => self.sync(),
            96..98 => self.seek_data(),
            98 => self.drop_cache(),
            _ => self.reopen(),
        }
        if self.steps % 256 == 0 {
            self.check_all("from time to time");
        }
    }

    /// A range that lies in the model, with both ends multiples of `unit`; `None` where there is
    /// none.
    fn inside(&mut self, unit: usize) -> Option<(usize, usize)> {
        let units = self.model.len() / unit;
        if units == 0 {
            return None;
        }
        let at = self.random.below(units);
        let most = (units - at).min(MAX_OP / unit);
        let len = 1 + self.random.below(most);
        Some((at * unit, len * unit))
    }

    /// A range that may go beyond the end of a file of the worker's own.
    fn anywhere(&mut self, unit: usize) -> Option<(usize, usize)> {
        if !self.is_alone() {
            return self.inside(unit);
        }
        let reach = (self.model.len() + MAX_OP).min(MAX_SIZE);
        let at = self.random.below(reach / unit) * unit;
        let most = (MAX_SIZE - at).min(MAX_OP) / unit;
        let len = (1 + self.random.below(most)) * unit;
        Some((at, len))
    }

    fn noise(&mut self, len: usize) -> Vec<u8> {
        // Differs from block to block and from write to write, and is never zero.
        let stamp = self.random.next();
        (0..len)
            .map(|at| (stamp.wrapping_add((at as u64 / 128).wrapping_mul(0x9e37)) % 255 + 1) as u8)
            .collect()
    }

    fn reach(&mut self, end: usize) {
        if self.model.len() < end {
            self.model.resize(end, 0);
        }
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.reach(at + bytes.len());
        self.model[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn read(&mut self) {
        let Some((at, len)) = self.inside(1) else {
            return;
        };
        let mut bytes = vec![0; len];
        let res = self.file.read_exact_at(&mut bytes, self.offset(at));
        if let Err(error) = res {
            self.wrong(&format!("read of {len} at {at}: {error}"));
        }
        self.compare("read", at, &bytes);
    }

    fn write(&mut self) {
        let Some((at, len)) = self.anywhere(1) else {
            return;
        };
        self.tell(format!("write {at} +{len}"));
        let bytes = self.noise(len);
        if let Err(error) = self.file.write_all_at(&bytes, self.offset(at)) {
            self.wrong(&format!("write: {error}"));
        }
        self.put(at, &bytes);
    }

    fn read_direct(&mut self) {
        let Some((at, len)) = self.inside(SECTOR) else {
            return;
        };
        let mut memory = Aligned::new(len);
        let res = self.direct.read_exact_at(memory.bytes(), self.offset(at));
        if let Err(error) = res {
            self.wrong(&format!("direct read of {len} at {at}: {error}"));
        }
        self.compare("direct read", at, memory.bytes());
    }

    fn write_direct(&mut self) {
        let Some((at, len)) = self.anywhere(SECTOR) else {
            return;
        };
        self.tell(format!("direct write {at} +{len}"));
        let bytes = self.noise(len);
        let mut memory = Aligned::new(len);
        memory.bytes().copy_from_slice(&bytes);
        if let Err(error) = self.direct.write_all_at(memory.bytes(), self.offset(at)) {
            self.wrong(&format!("direct write: {error}"));
        }
        self.put(at, &bytes);
    }

    /// Maps the pages that `at..at + len` lies in, which are the worker's alone.
    fn map(&self, at: usize, len: usize, prot: i32) -> (MmapRegion<()>, usize) {
        let skip = at % PAGE;
        let start = self.offset(at - skip);
        let file = FileOffset::new(self.file.try_clone().unwrap(), start);
        match MmapRegion::build(Some(file), skip + len, prot, libc::MAP_SHARED) {
            Ok(map) => (map, skip),
            Err(error) => self.wrong(&format!("mmap of {len} at {at}: {error}")),
        }
    }

    fn read_mapped(&mut self) {
        let Some((at, len)) = self.inside(1) else {
            return;
        };
        let (map, skip) = self.map(at, len, libc::PROT_READ);
        let mut bytes = vec![0; len];
        map.get_slice(skip, len).unwrap().copy_to(&mut bytes);
        self.compare("mapped read", at, &bytes);
    }

    fn write_mapped(&mut self) {
        let Some((at, len)) = self.inside(1) else {
            return;
        };
        self.tell(format!("mapped write {at} +{len}"));
        let bytes = self.noise(len);
        let (map, skip) = self.map(at, len, libc::PROT_READ | libc::PROT_WRITE);
        map.get_slice(skip, len).unwrap().copy_from(&bytes);
        self.put(at, &bytes);
    }

    /// Calls `fallocate`; `false` where the file cannot do that.
    fn allocate(&self, flags: FallocateFlags, at: usize, len: usize) -> bool {
        match fallocate(&self.file, flags, self.offset(at), len as u64) {
            Ok(()) => true,
            Err(Errno::OPNOTSUPP) => false,
            Err(error) => self.wrong(&format!("fallocate {flags:?} {at} +{len}: {error}")),
        }
    }

    fn zero_model(&mut self, at: usize, len: usize) {
        let end = (at + len).min(self.model.len());
        self.model[at.min(end)..end].fill(0);
    }

    fn punch(&mut self) {
        let Some((at, len)) = self.anywhere(1) else {
            return;
        };
        self.tell(format!("punch {at} +{len}"));
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if self.allocate(flags, at, len) {
            self.zero_model(at, len);
        }
    }

    fn zero_range(&mut self) {
        let Some((at, len)) = self.anywhere(1) else {
            return;
        };
        let keep = self.random.one_in(2);
        self.tell(format!("zero {at} +{len}, keep size {keep}"));
        let mut flags = FallocateFlags::ZERO_RANGE;
        flags.set(FallocateFlags::KEEP_SIZE, keep);
        if self.allocate(flags, at, len) {
            if !keep {
                self.reach(at + len);
            }
            self.zero_model(at, len);
        }
    }

    fn preallocate(&mut self) {
        let Some((at, len)) = self.anywhere(1) else {
            return;
        };
        let keep = self.random.one_in(2);
        self.tell(format!("allocate {at} +{len}, keep size {keep}"));
        let mut flags = FallocateFlags::empty();
        flags.set(FallocateFlags::KEEP_SIZE, keep);
        if self.allocate(flags, at, len) && !keep {
            self.reach(at + len);
        }
    }

    fn copy(&mut self) {
        let (Some((from, len)), Some((to, _))) = (self.inside(1), self.anywhere(1)) else {
            return;
        };
        let room = if self.is_alone() {
            MAX_SIZE
        } else {
            self.model.len()
        };
        let len = len.min(room - to);
        if len == 0 || (from < to + len && to < from + len) {
            return;
        }
        self.tell(format!("copy {from} +{len} to {to}"));
        let mut done = 0;
        while done < len {
            let (mut from, mut to) = (self.offset(from + done), self.offset(to + done));
            let (source, target) = (Some(&mut from), Some(&mut to));
            match copy_file_range(&self.file, source, &self.file, target, len - done) {
                Ok(0) => self.wrong("copy_file_range: nothing copied"),
                Ok(count) => done += count,
                Err(error) => self.wrong(&format!("copy_file_range: {error}")),
            }
        }
        let bytes = self.model[from..from + len].to_vec();
        self.put(to, &bytes);
    }

    fn truncate(&mut self) {
        if !self.is_alone() {
            return self.punch();
        }
        let size = self.random.below(MAX_SIZE);
        self.tell(format!("truncate from {} to {size}", self.model.len()));
        if let Err(error) = self.file.set_len(size as u64) {
            self.wrong(&format!("truncate: {error}"));
        }
        self.model.resize(size, 0);
    }

    fn collapse(&mut self) {
        if !self.is_alone() {
            return self.write_mapped();
        }
        let Some((at, len)) = self.inside(PAGE) else {
            return;
        };
        if at + len >= self.model.len() {
            return;
        }
        self.tell(format!("collapse {at} +{len}"));
        if self.allocate(FallocateFlags::COLLAPSE_RANGE, at, len) {
            self.model.drain(at..at + len);
        }
    }

    fn insert(&mut self) {
        if !self.is_alone() {
            return self.write_direct();
        }
        let Some((at, len)) = self.inside(PAGE) else {
            return;
        };
        if self.model.len() + len > MAX_SIZE {
            return;
        }
        self.tell(format!("insert {at} +{len}"));
        if self.allocate(FallocateFlags::INSERT_RANGE, at, len) {
            let zeros = std::iter::repeat_n(0, len);
            self.model.splice(at..at, zeros);
        }
    }

    fn sync(&mut self) {
        let data_only = self.random.one_in(2);
        self.tell(format!("sync, data only {data_only}"));
        let res = if data_only {
            self.file.sync_data()
        } else {
            self.file.sync_all()
        };
        if let Err(error) = res {
            self.wrong(&format!("fsync: {error}"));
        }
    }

    /// What is no data must be zeros.
    fn seek_data(&mut self) {
        if self.model.is_empty() {
            return;
        }
        let at = self.random.below(self.model.len());
        let data = match seek(&self.file, SeekFrom::Data(self.offset(at))) {
            Ok(found) => (found as usize).saturating_sub(self.place.base),
            Err(Errno::NXIO) => self.model.len(),
            Err(error) => self.wrong(&format!("SEEK_DATA from {at}: {error}")),
        };
        let end = data.min(self.model.len());
        if data < at || self.model[at..end].iter().any(|byte| *byte != 0) {
            self.wrong(&format!("SEEK_DATA from {at} passes over data, to {data}"));
        }
        match seek(&self.file, SeekFrom::Hole(self.offset(at))) {
            Ok(hole) if hole >= self.offset(at) => {}
            other => self.wrong(&format!("SEEK_HOLE from {at}: {other:?}")),
        }
    }

    fn drop_cache(&mut self) {
        self.tell("drop what is cached".to_owned());
        if let Err(error) = fadvise(&self.file, 0, None, Advice::DontNeed) {
            self.wrong(&format!("fadvise: {error}"));
        }
    }
}

/// Memory that begins where direct I/O wants it to.
struct Aligned {
    memory: Vec<u8>,
    len: usize,
}

impl Aligned {
    fn new(len: usize) -> Self {
        let memory = vec![0; len + PAGE];
        Self { memory, len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        let start = self.memory.as_ptr().align_offset(PAGE);
        &mut self.memory[start..start + self.len]
    }
}
