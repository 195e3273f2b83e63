//! Operations on the content of files.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::rc::Rc;

use super::super::compare;
use super::super::content::{FileData, Source};
use super::super::effect::{Effect, Falloc, Id};
use super::super::error::{Context, Result, StormError};
use super::super::sys::{self, AlignedBuf, DIRECT_ALIGN};
use super::super::worker::{Handle, MAX_HANDLES, Worker};

/// Largest file: far enough for triple indirection to matter, small enough for 1 KiB blocks.
const MAX_SIZE: u64 = 1 << 30;

impl Worker {
    pub(super) fn op_open(&mut self) -> Result<()> {
        if self.handles.len() >= MAX_HANDLES {
            return self.op_close();
        }
        let Some(id) = self.model.files.draw(&mut self.rng) else {
            return Ok(());
        };
        let path = self.path(id);
        self.describe("open", &path);
        let file = File::options()
            .read(true)
            .write(true)
            .open(&path)
            .call("open", &path)?;
        self.handles.push(Handle {
            id,
            file: Rc::new(file),
            path,
        });
        Ok(())
    }

    pub(super) fn op_close(&mut self) -> Result<()> {
        if !self.handles.is_empty() {
            let index = self.rng.index(self.handles.len());
            self.close(index);
        }
        Ok(())
    }

    pub(super) fn op_write(&mut self) -> Result<()> {
        let Some(handle) = self.pick_file()? else {
            return Ok(());
        };
        let (len, mut off) = (self.random_len(), self.random_off(handle.id));
        if self.rng.chance(20) {
            off &= !4095;
        }
        let stamp = self.new_stamp();
        let mut bytes = vec![0; len as usize];
        self.source.fill(stamp, off, &mut bytes);
        let effect = Effect::Write {
            id: handle.id,
            off,
            len,
            stamp,
        };
        self.begin(&effect, &handle.path)?;
        let (done, result) = write_at(&handle.file, &bytes, off);
        self.settle_write(&handle, effect, done, result)
    }

    pub(super) fn op_append(&mut self) -> Result<()> {
        let Some(id) = self.model.files.draw(&mut self.rng) else {
            return Ok(());
        };
        let size = self.model.file(id).map_or(0, |data| data.size);
        let len = self.random_len().min(64 << 10);
        if size + len > MAX_SIZE {
            return Ok(());
        }
        let path = self.path(id);
        let stamp = self.new_stamp();
        let mut bytes = vec![0; len as usize];
        self.source.fill(stamp, size, &mut bytes);
        self.describe("open to append", &path);
        let mut file = File::options()
            .read(true)
            .append(true)
            .open(&path)
            .call("open", &path)?;
        let effect = Effect::Write {
            id,
            off: size,
            len,
            stamp,
        };
        self.begin(&effect, &path)?;
        let (mut done, mut result) = (0, Ok(()));
        while done < len && result.is_ok() {
            match file.write(&bytes[done as usize..]) {
                Ok(count) => done += count as u64,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => result = Err(error),
            }
        }
        let handle = Handle {
            id,
            file: Rc::new(file),
            path,
        };
        self.settle_write(&handle, effect, done, result)
    }

    pub(super) fn op_direct_write(&mut self) -> Result<()> {
        let Some(id) = self.model.files.draw(&mut self.rng) else {
            return Ok(());
        };
        let most = if self.rng.chance(12) { 64 } else { 8 };
        let len = DIRECT_ALIGN * self.rng.within(1, most);
        let off = self.random_off(id) & !(DIRECT_ALIGN - 1);
        let stamp = self.new_stamp();
        let mut buf = AlignedBuf::new(len as usize);
        self.source.fill(stamp, off, buf.bytes());
        let path = self.path(id);
        self.describe("open O_DIRECT", &path);
        let file = open_direct(&path).call("open", &path)?;
        let effect = Effect::Write {
            id,
            off,
            len,
            stamp,
        };
        self.begin(&effect, &path)?;
        let (done, result) = write_at(&file, buf.bytes(), off);
        if let Err(error) = &result {
            if done == 0 && error.raw_os_error() == Some(libc::EINVAL) {
                return self.abandon("O_DIRECT write", error);
            }
        }
        // Read back through the page cache, which has to notice.
        let file = File::options()
            .read(true)
            .write(true)
            .open(&path)
            .call("open", &path)?;
        self.settle_write(
            &Handle {
                id,
                file: Rc::new(file),
                path,
            },
            effect,
            done,
            result,
        )
    }

    pub(super) fn op_direct_read(&mut self) -> Result<()> {
        let Some(id) = self.model.files.draw(&mut self.rng) else {
            return Ok(());
        };
        let Some(data) = self.model.file(id).cloned() else {
            return Ok(());
        };
        let off = self.rng.below(data.size + 1) & !(DIRECT_ALIGN - 1);
        let len = DIRECT_ALIGN * self.rng.within(1, 16);
        let path = self.path(id);
        self.describe(format!("direct read {id} {off} {len}"), &path);
        let file = open_direct(&path).call("open", &path)?;
        let mut buf = AlignedBuf::new(len as usize);
        let count = match sys::read_at(&file, buf.bytes(), off) {
            // The remainder behind a short read is not aligned, so a repeated call may be refused.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
            other => other.call("O_DIRECT read", &path)?,
        };
        let expected = len.min(data.size - off);
        if count as u64 != expected {
            let what = format!("bytes read at {off} with O_DIRECT");
            return Err(StormError::mismatch(&path, what, expected, count));
        }
        compare::bytes(&path, &data, &self.source, off, &buf.bytes()[..count])
    }

    pub(super) fn op_truncate(&mut self) -> Result<()> {
        let Some(handle) = self.pick_file()? else {
            return Ok(());
        };
        let old = self.model.file(handle.id).map_or(0, |data| data.size);
        let size = match self.rng.below(20) {
            0..3 => 0,
            3..12 => self.rng.below(old + 1),
            12..18 => (old + self.rng.below(64 << 10)).min(MAX_SIZE),
            18 => old & !4095,
            _ => self.rng.below(MAX_SIZE),
        };
        let effect = Effect::Truncate {
            id: handle.id,
            size,
        };
        self.perform(effect, "ftruncate", &handle.path, &[], || {
            handle.file.set_len(size)
        })?;
        if self.rng.chance(25) {
            let from = size.saturating_sub(8192);
            self.compare_range(&handle, from, 16384)?;
        }
        Ok(())
    }

    pub(super) fn op_fallocate(&mut self) -> Result<()> {
        let mode = Falloc::ALL[self.rng.index(Falloc::ALL.len())];
        if !self.caps.has(mode.word()) {
            return Ok(());
        }
        let Some(handle) = self.pick_file()? else {
            return Ok(());
        };
        let id = handle.id;
        let size = self.model.file(id).map_or(0, |data| data.size);
        let (off, len) = match mode {
            Falloc::Collapse | Falloc::Insert => {
                let step = self.caps.shift_align;
                let len = step * self.rng.within(1, 16);
                let off = self.rng.below(size) / step * step;
                let fits = match mode {
                    Falloc::Collapse => off + len < size,
                    _ => off < size && size + len <= MAX_SIZE,
                };
                if !fits {
                    return Ok(());
                }
                (off, len)
            }
            _ => (self.random_off(id), self.random_len()),
        };
        let effect = Effect::Fallocate { id, mode, off, len };
        self.begin(&effect, &handle.path)?;
        match sys::fallocate(&handle.file, mode, off, len) {
            Ok(()) => self.end(&effect, 0, false)?,
            // Files without extents, as in ext3, know some of the modes only.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                return self.abandon(mode.word(), &error);
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                self.abandon("fallocate", &error)?;
                return self.salvage(&handle, off, len, None);
            }
            Err(error) => return Err(error).call("fallocate", &handle.path),
        }
        if self.rng.chance(40) {
            let from = off.saturating_sub(5000);
            self.compare_range(&handle, from, (len + 10_000).min(1 << 20))?;
        }
        Ok(())
    }

    pub(super) fn op_copy(&mut self) -> Result<()> {
        let (Some(from), Some(to)) = (self.pick_file()?, self.pick_file()?) else {
            return Ok(());
        };
        let size = self.model.file(from.id).map_or(0, |data| data.size);
        let src_off = self.rng.below(size + 1);
        let off = self.random_off(to.id);
        let len = self.random_len().min(256 << 10);
        // Within one file the source must not grow while it is copied.
        let overlaps = from.id == to.id && (src_off.abs_diff(off) < len || src_off + len > size);
        if overlaps || src_off == size {
            return Ok(());
        }
        let effect = Effect::Copy {
            src: from.id,
            src_off,
            id: to.id,
            off,
            len,
        };
        self.begin(&effect, &to.path)?;
        let (done, result) = sys::copy_range(&from.file, src_off, &to.file, off, len);
        let expected = len.min(size - src_off);
        let actual = Effect::Copy {
            src: from.id,
            src_off,
            id: to.id,
            off,
            len: done,
        };
        match result {
            Ok(()) if done != expected => {
                return Err(StormError::mismatch(
                    &to.path,
                    "bytes copied",
                    expected,
                    done,
                ));
            }
            Err(error) if error.raw_os_error() != Some(libc::ENOSPC) => {
                return Err(error).call("copy_file_range", &to.path);
            }
            Err(error) if done == 0 => {
                self.abandon("copy_file_range", &error)?;
                return self.salvage(&to, off, len, None);
            }
            Err(error) => {
                self.end(&actual, 0, true)?;
                log::debug!("copy ended after {done} of {len} bytes: {error}");
                return self.salvage(&to, off + done, len - done, None);
            }
            Ok(()) => {}
        }
        self.end(&actual, 0, done != len)?;
        if self.rng.chance(40) {
            self.compare_range(&to, off, done)?;
        }
        Ok(())
    }

    pub(super) fn op_sync(&mut self) -> Result<()> {
        let Some(handle) = self.pick_file()? else {
            return Ok(());
        };
        let data = self.rng.chance(35);
        self.sync_file(&handle, data)
    }

    pub(super) fn sync_file(&mut self, handle: &Handle, data: bool) -> Result<()> {
        let effect = Effect::Sync {
            id: handle.id,
            data,
        };
        self.perform(effect, "fsync", &handle.path, &[], || {
            if data {
                handle.file.sync_data()
            } else {
                handle.file.sync_all()
            }
        })?;
        Ok(())
    }

    pub(super) fn op_sync_dir(&mut self) -> Result<()> {
        let Some(id) = self.model.dirs.draw(&mut self.rng) else {
            return Ok(());
        };
        let path = self.path(id);
        self.describe("open", &path);
        let dir = File::open(&path).call("open", &path)?;
        self.perform(
            Effect::Sync { id, data: false },
            "fsync",
            &path,
            &[],
            || dir.sync_all(),
        )?;
        Ok(())
    }

    pub(super) fn op_syncfs(&mut self) -> Result<()> {
        let dir = self.args.dir.clone();
        self.perform(Effect::SyncFs, "syncfs", &dir, &[], || sys::sync_fs(&dir))?;
        Ok(())
    }

    pub(super) fn compare_range(&mut self, handle: &Handle, off: u64, len: u64) -> Result<()> {
        let Some(data) = self.model.file(handle.id) else {
            return Ok(());
        };
        compare::range(&handle.file, &handle.path, data, &self.source, off, len)
    }

    /// Brings the model in step with a write that may have ended early.
    fn settle_write(
        &mut self,
        handle: &Handle,
        effect: Effect,
        done: u64,
        result: io::Result<()>,
    ) -> Result<()> {
        let Effect::Write {
            id,
            off,
            len,
            stamp,
        } = effect
        else {
            return Ok(());
        };
        match result {
            Ok(()) => self.end(&effect, 0, false)?,
            Err(error) if error.raw_os_error() != Some(libc::ENOSPC) => {
                return Err(error).call("write", &handle.path);
            }
            Err(error) if done == 0 => {
                self.abandon("write", &error)?;
                return self.salvage(handle, off, len, Some(stamp));
            }
            Err(error) => {
                self.end(
                    &Effect::Write {
                        id,
                        off,
                        len: done,
                        stamp,
                    },
                    0,
                    true,
                )?;
                // Seen with O_DIRECT: more is there than the count says.
                log::debug!("write ended after {done} of {len} bytes: {error}");
                return self.salvage(handle, off + done, len - done, Some(stamp));
            }
        }
        if self.rng.chance(20) {
            let from = off.saturating_sub(100);
            self.compare_range(handle, from, done + 200)?;
        }
        Ok(())
    }

    /// After a call that ran out of space: checks that the damage is within its range, then cuts
    /// the file there, so that its content is known again.
    fn salvage(&mut self, handle: &Handle, off: u64, len: u64, stamp: Option<u64>) -> Result<()> {
        let Some(old) = self.model.file(handle.id).cloned() else {
            return Ok(());
        };
        let path = &handle.path;
        self.describe(format!("check after ENOSPC at {off} len {len}"), path);
        let size = handle.file.metadata().call("fstat", path)?.len();
        let largest = old.size.max(off + len);
        if size < old.size || size > largest {
            let range = format!("{}..={largest}", old.size);
            return Err(StormError::mismatch(path, "size after ENOSPC", range, size));
        }
        let mut new = old.clone();
        new.size = size;
        let before = off.saturating_sub(1 << 20);
        compare::range(&handle.file, path, &new, &self.source, before, off - before)?;
        if off + len < old.size {
            let rest = (old.size - off - len).min(1 << 20);
            compare::range(&handle.file, path, &new, &self.source, off + len, rest)?;
        }
        if let Some(stamp) = stamp {
            let mut data = new.clone();
            data.write(off, len, stamp);
            either(
                handle,
                &self.source,
                [&new, &data],
                off,
                len.min(size.saturating_sub(off)),
            )?;
        }
        let size = off.min(old.size);
        let effect = Effect::Truncate {
            id: handle.id,
            size,
        };
        self.perform(effect, "ftruncate", path, &[], || handle.file.set_len(size))?;
        Ok(())
    }

    /// Draws a length: often small, sometimes many blocks.
    pub(super) fn random_len(&mut self) -> u64 {
        match self.rng.below(100) {
            0..40 => self.rng.within(1, 512),
            40..72 => self.rng.within(1, 8 << 10),
            72..82 => 4096 * self.rng.within(1, 8),
            82..93 => self.rng.within(1, 64 << 10),
            93..98 => self.rng.within(1, 256 << 10),
            _ => self.rng.within(1, 1 << 20),
        }
    }

    /// Draws an offset: mostly within or at the end of the file, sometimes far behind it.
    pub(super) fn random_off(&mut self, id: Id) -> u64 {
        let size = self.model.file(id).map_or(0, |data| data.size);
        let off = match self.rng.below(100) {
            0..55 => self.rng.below(size + 1),
            55..75 => size,
            75..92 => self.rng.below(size + (64 << 10)),
            92..97 => self.rng.below(16 << 20),
            _ => self.rng.below(MAX_SIZE),
        };
        off.min(MAX_SIZE - (2 << 20))
    }
}

/// Checks that each byte of a range is that of one of two contents.
fn either(
    handle: &Handle,
    source: &Source,
    contents: [&FileData; 2],
    off: u64,
    len: u64,
) -> Result<()> {
    let mut actual = vec![0; len as usize];
    let count = sys::read_at(&handle.file, &mut actual, off).call("read", &handle.path)?;
    let [mut old, mut new] = [vec![0; count], vec![0; count]];
    contents[0].map.render(source, off, &mut old);
    contents[1].map.render(source, off, &mut new);
    let bad = (0..count).find(|&i| actual[i] != old[i] && actual[i] != new[i]);
    match bad {
        None => Ok(()),
        Some(at) => compare::bytes(&handle.path, contents[0], source, off, &actual[..=at]),
    }
}

/// Writes all of `bytes`; returns how much was written before the first error.
fn write_at(file: &File, bytes: &[u8], off: u64) -> (u64, io::Result<()>) {
    let mut done = 0;
    while done < bytes.len() {
        match file.write_at(&bytes[done..], off + done as u64) {
            Ok(0) => return (done as u64, Err(io::ErrorKind::WriteZero.into())),
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (done as u64, Err(error)),
        }
    }
    (done as u64, Ok(()))
}

fn open_direct(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
}
