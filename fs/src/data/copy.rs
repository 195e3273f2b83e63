//! Finding data and holes, and copying between files.

use std::sync::Arc;

use super::{MAX_IO, Origin};
use crate::core::Fs;
use crate::error::{FsError, FsResult};
use crate::inode::Inode;
use crate::inode::map::{self, Seek};
use crate::ops::Caller;

impl Fs {
    /// Finds the next data or hole at or after `offset`, as `lseek` does.
    ///
    /// # Errors
    /// [`FsError::NoSuchAddress`] at or past the end of file, or without data behind `offset`.
    pub fn seek(self: &Arc<Self>, inode: &Inode, offset: u64, what: Seek) -> FsResult<u64> {
        self.wait_begun(inode);
        let data = inode.data.read();
        if offset >= data.size {
            return Err(FsError::NoSuchAddress);
        }
        let lblk = (offset >> self.geo.block_bits) as u32;
        let found = map::next(self, inode, &data, lblk, what)?;
        let found = found.map(|lblk| (u64::from(lblk) << self.geo.block_bits).max(offset));
        match (what, found) {
            (_, Some(at)) if at < data.size => Ok(at),
            (Seek::Hole, _) => Ok(data.size),
            (Seek::Data, _) => Err(FsError::NoSuchAddress),
        }
    }

    /// Copies up to `len` bytes between files; gives the bytes copied.
    ///
    /// # Errors
    /// Those of reading and writing, where nothing was copied.
    pub fn copy_range(
        self: &Arc<Self>,
        from: &Arc<Inode>,
        from_offset: u64,
        to: &Arc<Inode>,
        to_offset: u64,
        len: u64,
        caller: &Caller,
    ) -> FsResult<u64> {
        let mut copied = 0;
        while copied < len {
            let step = (len - copied).min(MAX_IO.into()) as u32;
            let part = self.copy_part(
                from,
                from_offset + copied,
                to,
                to_offset + copied,
                step,
                caller,
            );
            match part {
                Ok(0) => break,
                Ok(part) => copied += u64::from(part),
                Err(_) if copied > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(copied)
    }

    fn copy_part(
        self: &Arc<Self>,
        from: &Arc<Inode>,
        from_offset: u64,
        to: &Arc<Inode>,
        to_offset: u64,
        len: u32,
        caller: &Caller,
    ) -> FsResult<u32> {
        let (answer, wait) = answer_slot();
        self.read(
            from,
            from_offset,
            len,
            Box::new(move |res| answer(res.map(<[u8]>::to_vec))),
        );
        let bytes = wait.take()?;
        if bytes.is_empty() {
            return Ok(0);
        }
        let (answer, wait) = answer_slot();
        let origin = Origin::Direct {
            kill_priv: caller.uid != 0,
        };
        self.write(to, to_offset, &bytes, origin, caller, Box::new(answer));
        wait.take()
    }
}

struct Answer<T>(
    Arc<(
        blockstack::sync::Mutex<Option<FsResult<T>>>,
        blockstack::sync::Condvar,
    )>,
);

impl<T> Answer<T> {
    /// Waits for the answer.
    fn take(self) -> FsResult<T> {
        let (slot, woken) = &*self.0;
        let mut slot = slot.lock();
        loop {
            if let Some(answer) = slot.take() {
                return answer;
            }
            woken.wait(&mut slot);
        }
    }
}

/// A place for an answer that comes from another thread.
fn answer_slot<T: Send + 'static>() -> (impl FnOnce(FsResult<T>) + Send + 'static, Answer<T>) {
    let slot = Arc::new((
        blockstack::sync::Mutex::new(blockstack::sync::Rank::Pool, None),
        blockstack::sync::Condvar::new(),
    ));
    let answer = Answer(slot.clone());
    let put = move |value| {
        *slot.0.lock_nested() = Some(value);
        slot.1.notify_one();
    };
    (put, answer)
}
