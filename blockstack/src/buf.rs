//! Aligned memory for I/O, pooled.
//!
//! A [`PagePool`] takes memory from the system as anonymous maps of 2 MiB (which the kernel can
//! back with huge pages), cuts it into chunks of a few sizes and keeps freed chunks, so that the
//! I/O path neither allocates from the heap nor maps memory after warm-up. A [`Buf`] owns one chunk
//! alone. While a bio carries it, the bio's [`Segment`]s name parts of it: see the invariant there.
//!
//! Checkers of memory cannot see inside a map who leaves his chunk, or uses one that was given back.
//! For them (Miri; valgrind in a build with `--cfg apart`) each chunk is an allocation of its own,
//! and one that comes back is freed and allocated anew. `contrib/sanitize` runs both.
//!
//! # Locking
//!
//! One leaf lock a size class, held for a push or a pop.

use std::alloc::Layout;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memmap2::MmapMut;

use crate::error::BlkError;
use crate::sync::prim::Global;
use crate::sync::prim::atomic::{AtomicUsize, Ordering};
use crate::sync::{Condvar, Mutex, Rank};

/// Every buffer begins at a multiple of this many bytes, which suits `O_DIRECT` on any device.
pub const ALIGN: usize = 4096;

/// Sizes of chunks, in bytes.
const CLASSES: [usize; 7] = [4096, 8192, 16384, 65536, 262_144, 1_048_576, 2_097_152];
/// What is mapped at a time.
pub(crate) const ARENA: usize = 2 << 20;
/// The largest buffer that can be had, in bytes.
pub const MAX_BUF: usize = CLASSES[CLASSES.len() - 1];

/// Whether each chunk is an allocation of its own.
const APART: bool = cfg!(any(miri, apart));

struct Chunk {
    ptr: NonNull<u8>,
}

// SAFETY: a chunk is only an address inside one of the pool's maps; who owns the `Chunk` value owns
// the bytes, and it is moved, never shared.
#[expect(unsafe_code, reason = "aligned memory is what this module is for")]
unsafe impl Send for Chunk {}

/// How chunks are allocated where they are [`APART`].
fn layout(size: usize) -> Option<Layout> {
    Layout::from_size_align(size, ALIGN).ok()
}

impl Chunk {
    #[expect(unsafe_code, reason = "aligned memory is what this module is for")]
    fn apart(size: usize) -> Option<Self> {
        let layout = layout(size).filter(|layout| layout.size() > 0)?;
        // SAFETY: the size is not zero, checked above.
        let ptr = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) })?;
        Some(Self { ptr })
    }

    /// Gives back what [`Self::apart`] allocated with the same size.
    #[expect(unsafe_code, reason = "aligned memory is what this module is for")]
    fn free_apart(self, size: usize) {
        if let Some(layout) = layout(size) {
            // SAFETY: where chunks are apart, each is from `apart` with the size of its class, and
            // the value, which is consumed, was the only one.
            unsafe { std::alloc::dealloc(self.ptr.as_ptr(), layout) };
        }
    }
}

struct Arenas {
    maps: Vec<MmapMut>,
    /// Where the last arena begins. All chunks are derived from this one address, never from a
    /// reference to the map, which would claim the bytes of chunks that others own.
    base: Option<Chunk>,
    /// Bytes of the last map handed out so far.
    used: usize,
}

impl Arenas {
    /// The `size` bytes from `offset` on in the last map.
    #[expect(unsafe_code, reason = "aligned memory is what this module is for")]
    fn chunk(&self, offset: usize, size: usize) -> Option<Chunk> {
        if APART {
            return Chunk::apart(size);
        }
        let base = self.base.as_ref()?;
        assert!(offset + size <= ARENA, "chunk outside its map");
        // SAFETY: `ARENA` bytes from `base` on belong to a map that lives as long as the pool, and
        // the sum stays inside, checked above.
        let ptr = unsafe { base.ptr.add(offset) };
        Some(Chunk { ptr })
    }
}

#[derive(Default)]
struct Free {
    chunks: Vec<Chunk>,
    /// Buffers of this class that somebody has.
    live: usize,
    waiting: usize,
}

impl Free {
    fn take(&mut self) -> Option<Chunk> {
        let chunk = self.chunks.pop()?;
        self.live += 1;
        Some(chunk)
    }
}

struct Pool {
    free: [Mutex<Free>; CLASSES.len()],
    returned: [Condvar; CLASSES.len()],
    arenas: Mutex<Arenas>,
    limit: usize,
    mapped: AtomicUsize,
}

/// A pool of aligned memory; clones share it.
#[derive(Clone)]
pub struct PagePool(Arc<Pool>);

fn class_of(len: usize) -> Result<usize, BlkError> {
    match CLASSES.iter().position(|&size| size >= len) {
        Some(class) if len > 0 => Ok(class),
        _ => Err(BlkError::Unaligned),
    }
}

impl PagePool {
    /// Makes a pool that maps at most `limit` bytes (rounded up to 2 MiB).
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self(Arc::new(Pool {
            free: std::array::from_fn(|_| Mutex::new(Rank::Pool, Free::default())),
            returned: std::array::from_fn(|_| Condvar::new()),
            arenas: Mutex::new(
                Rank::Pool,
                Arenas {
                    maps: Vec::new(),
                    base: None,
                    used: ARENA,
                },
            ),
            limit: limit.div_ceil(ARENA) * ARENA,
            mapped: AtomicUsize::new(0),
        }))
    }

    /// The pool that most users share: at most 1 GiB, mapped as needed.
    #[must_use]
    pub fn shared() -> &'static Self {
        static SHARED: Global<PagePool> = Global::new(|| PagePool::new(1 << 30));
        SHARED.get()
    }

    /// Bytes mapped so far.
    #[must_use]
    pub fn mapped(&self) -> usize {
        self.0.mapped.load(Ordering::Relaxed)
    }

    /// Takes a buffer of `len` bytes; what stands in it is undefined but initialized.
    ///
    /// # Errors
    /// [`BlkError::NoMemory`] where the pool's limit is reached or the system refuses;
    /// [`BlkError::Unaligned`] for a `len` of zero or above [`MAX_BUF`].
    pub fn alloc(&self, len: usize) -> Result<Buf, BlkError> {
        let class = class_of(len)?;
        let recycled = self.0.free[class].lock().take();
        let chunk = match recycled {
            Some(chunk) => chunk,
            None => {
                let chunk = self.carve(class)?;
                self.0.free[class].lock().live += 1;
                chunk
            }
        };
        Ok(Buf {
            ptr: chunk.ptr,
            len,
            class,
            pool: self.0.clone(),
        })
    }

    /// After [`BlkError::NoMemory`], waits until a buffer of `len` bytes may be had: others may be
    /// faster. At most for `limit`, since buffers that hold a cache do not come back by themselves.
    /// The caller must hold nothing that the owners of buffers wait for.
    ///
    /// # Errors
    /// [`BlkError::NoMemory`] where the time is over, or nobody has a buffer of that class.
    pub fn wait_for(&self, len: usize, limit: Duration) -> Result<(), BlkError> {
        let class = class_of(len)?;
        let deadline = Instant::now() + limit;
        let mut free = self.0.free[class].lock();
        while free.chunks.is_empty() {
            if free.live == 0 {
                return Err(BlkError::NoMemory);
            }
            free.waiting += 1;
            let woken = self.0.returned[class].wait_until(&mut free, deadline);
            free.waiting -= 1;
            if !woken && free.chunks.is_empty() {
                return Err(BlkError::NoMemory);
            }
        }
        Ok(())
    }

    /// As [`Self::alloc`], filled with zeros.
    ///
    /// # Errors
    /// As [`Self::alloc`].
    pub fn alloc_zeroed(&self, len: usize) -> Result<Buf, BlkError> {
        let mut buf = self.alloc(len)?;
        buf.fill(0);
        Ok(buf)
    }

    /// Whether one of the pool's arenas begins at `base`.
    pub(crate) fn has_arena(&self, base: usize) -> bool {
        let begins = |map: &MmapMut| map.as_ptr().addr().next_multiple_of(ARENA) == base;
        self.0.arenas.lock().maps.iter().any(begins)
    }

    fn carve(&self, class: usize) -> Result<Chunk, BlkError> {
        let size = CLASSES[class];
        let mut arenas = self.0.arenas.lock();
        if arenas.used + size > ARENA {
            if self.0.mapped.load(Ordering::Relaxed) + ARENA > self.0.limit {
                return Err(BlkError::NoMemory);
            }
            let map = if APART { None } else { Some(map_arena()?) };
            // What is left of the last arena goes to the smaller classes.
            let rest = arenas.used;
            if rest < ARENA {
                self.recycle_tail(&arenas, rest);
            }
            if let Some(mut map) = map {
                arenas.base = aligned_arena(&mut map);
                arenas.maps.push(map);
            }
            arenas.used = 0;
            self.0.mapped.fetch_add(ARENA, Ordering::Relaxed);
        }
        let offset = arenas.used;
        arenas.used += size;
        arenas.chunk(offset, size).ok_or(BlkError::NoMemory)
    }

    fn recycle_tail(&self, arenas: &Arenas, mut from: usize) {
        for (class, &size) in CLASSES.iter().enumerate().rev() {
            while from + size <= ARENA {
                let Some(chunk) = arenas.chunk(from, size) else {
                    return;
                };
                self.0.free[class].lock_nested().chunks.push(chunk);
                from += size;
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if !APART {
            return;
        }
        for (class, &size) in CLASSES.iter().enumerate() {
            for chunk in self.free[class].lock_nested().chunks.drain(..) {
                chunk.free_apart(size);
            }
        }
    }
}

/// Twice an arena, so that an aligned one lies in it; what is not touched costs nothing.
fn map_arena() -> Result<MmapMut, BlkError> {
    MmapMut::map_anon(2 * ARENA).map_err(|error| {
        log::error!("page pool: cannot map {ARENA} bytes: {error}");
        BlkError::NoMemory
    })
}

/// The part of a map that is one huge page, if the kernel likes.
#[expect(unsafe_code, reason = "aligned memory is what this module is for")]
fn aligned_arena(map: &mut MmapMut) -> Option<Chunk> {
    let start = map.as_mut_ptr();
    let skip = start.align_offset(ARENA);
    // Only a wish: without it the pages are small.
    if skip < ARENA
        && let Err(error) = map.advise_range(memmap2::Advice::HugePage, skip, ARENA)
    {
        log::debug!("page pool: no huge pages: {error}");
    }
    if skip >= ARENA {
        return None;
    }
    // SAFETY: `skip` is less than half of the map's length.
    let ptr = NonNull::new(unsafe { start.add(skip) })?;
    Some(Chunk { ptr })
}

impl fmt::Debug for PagePool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PagePool")
            .field("mapped", &self.mapped())
            .finish_non_exhaustive()
    }
}

/// Memory from a [`PagePool`], owned alone, aligned to [`ALIGN`].
pub struct Buf {
    ptr: NonNull<u8>,
    len: usize,
    class: usize,
    pool: Arc<Pool>,
}

// SAFETY: a `Buf` owns its bytes alone, like a `Box<[u8]>`.
#[expect(unsafe_code, reason = "aligned memory is what this module is for")]
unsafe impl Send for Buf {}
// SAFETY: shared references give only shared slices.
#[expect(unsafe_code, reason = "aligned memory is what this module is for")]
unsafe impl Sync for Buf {}

impl Buf {
    /// Bytes the chunk behind the buffer can hold.
    #[must_use]
    pub fn capacity(&self) -> usize {
        CLASSES[self.class]
    }

    /// Changes the length within the capacity; bytes gained have undefined but initialized content.
    ///
    /// # Errors
    /// [`BlkError::NoMemory`] where `len` is above the capacity.
    pub fn set_len(&mut self, len: usize) -> Result<(), BlkError> {
        if len > self.capacity() {
            return Err(BlkError::NoMemory);
        }
        self.len = len;
        Ok(())
    }

    /// The whole buffer as a segment; see the invariant at [`Segment`].
    pub(crate) fn segment(&mut self) -> Segment {
        Segment {
            ptr: self.ptr,
            len: self.len,
        }
    }
}

impl Deref for Buf {
    type Target = [u8];
    #[expect(unsafe_code, reason = "aligned memory is what this module is for")]
    fn deref(&self) -> &[u8] {
        // SAFETY: `ptr` points to at least `len` bytes of a map that lives as long as `pool`; they
        // were zeroed by the system when mapped, and this `Buf` alone owns them.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for Buf {
    #[expect(unsafe_code, reason = "aligned memory is what this module is for")]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` is unique, and so is the owner of the bytes.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        let mut chunk = Chunk { ptr: self.ptr };
        if APART {
            // The new one first, lest the old one's address is had again.
            if let Some(new) = Chunk::apart(self.capacity()) {
                std::mem::replace(&mut chunk, new).free_apart(self.capacity());
            }
        }
        let mut free = self.pool.free[self.class].lock_nested();
        free.chunks.push(chunk);
        free.live -= 1;
        if free.waiting > 0 {
            drop(free);
            // All: one that is woken may take another class next, or nothing.
            self.pool.returned[self.class].notify_all();
        }
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buf")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

/// A part of the memory that a bio carries.
///
/// Invariant, kept by `bio`: a segment lives in a bio that owns the [`Buf`], or in a bio whose
/// completion the owner awaits (a clone holds its parent by value; the parent of a split is held by
/// its join counter until all pieces ended). Segments of bios that can be in flight at the same
/// time do not overlap, unless all of them are writes, which only read the memory. So the bytes are
/// alive, and the one who executes the bio may touch them.
pub struct Segment {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: by the invariant of the type, the bio that carries the segment may be executed, and so
// the bytes touched, by any thread that owns it.
#[expect(unsafe_code, reason = "aligned memory is what this module is for")]
unsafe impl Send for Segment {}
// SAFETY: through a shared segment the bytes can only be read, or handed as an address to the
// kernel by a backend that owns the bio.
#[expect(unsafe_code, reason = "aligned memory is what this module is for")]
unsafe impl Sync for Segment {}

impl Segment {
    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the segment has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where the bytes are, for a system call of a backend.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// A second name for the same bytes, for a clone or for both sides of a split.
    pub(crate) fn alias(&self) -> Self {
        Self {
            ptr: self.ptr,
            len: self.len,
        }
    }

    /// Cuts off the first `at` bytes and gives them back.
    ///
    /// # Panics
    /// Where `at` is above the length.
    #[expect(unsafe_code, reason = "aligned memory is what this module is for")]
    pub(crate) fn cut_front(&mut self, at: usize) -> Self {
        assert!(
            at <= self.len,
            "cut of {at} bytes from a segment of {}",
            self.len
        );
        let front = Self {
            ptr: self.ptr,
            len: at,
        };
        // SAFETY: `at <= len`, so the sum stays inside the chunk or one past its end.
        self.ptr = unsafe { self.ptr.add(at) };
        self.len -= at;
        front
    }

    /// The bytes of a write.
    #[must_use]
    #[expect(unsafe_code, reason = "aligned memory is what this module is for")]
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the type's invariant: alive, and nobody writes while a bio that names them is in
        // flight, but its executor, who is the caller.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }

    /// The bytes of a read, to be filled.
    #[must_use]
    #[expect(unsafe_code, reason = "aligned memory is what this module is for")]
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the type's invariant: alive, and of a read no other segment names these bytes
        // that could be used before this bio ended; `&mut self` makes the borrow unique.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Segment")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{ALIGN, ARENA, BlkError, MAX_BUF, PagePool};

    #[test]
    fn buffers_are_aligned_and_apart() {
        let pool = PagePool::new(8 << 20);
        let mut bufs: Vec<_> = (0..40u8)
            .map(|i| (i, pool.alloc(1000 + 4096 * usize::from(i % 5)).unwrap()))
            .collect();
        for (tag, buf) in &mut bufs {
            assert_eq!(buf.as_ptr() as usize % ALIGN, 0);
            buf.fill(*tag);
        }
        for (tag, buf) in &bufs {
            assert!(buf.iter().all(|byte| byte == tag));
        }
    }

    #[test]
    fn memory_is_reused_and_bounded() {
        let pool = PagePool::new(ARENA);
        let first = pool.alloc(MAX_BUF).unwrap();
        assert_eq!(pool.alloc(1).err(), Some(BlkError::NoMemory));
        drop(first);
        assert!(pool.alloc(MAX_BUF).is_ok());
        assert_eq!(pool.mapped(), ARENA);
    }

    #[test]
    fn who_waits_for_memory_gets_what_comes_back() {
        let pool = PagePool::new(ARENA);
        let all = pool.alloc(MAX_BUF).unwrap();
        let waits = {
            let pool = pool.clone();
            std::thread::spawn(move || {
                pool.wait_for(MAX_BUF, Duration::from_secs(60))?;
                pool.alloc(MAX_BUF).map(drop)
            })
        };
        while pool.0.free[super::CLASSES.len() - 1].lock().waiting == 0 {
            std::thread::yield_now();
        }
        drop(all);
        assert_eq!(waits.join().unwrap(), Ok(()));
        // A buffer that nobody has cannot come back.
        let _all = pool.alloc(MAX_BUF).unwrap();
        let limit = Duration::from_secs(60);
        assert_eq!(pool.wait_for(1, limit), Err(BlkError::NoMemory));
        // One that stays is waited for in vain.
        let limit = Duration::from_millis(1);
        assert_eq!(pool.wait_for(MAX_BUF, limit), Err(BlkError::NoMemory));
    }

    #[test]
    fn absurd_lengths_are_refused() {
        let pool = PagePool::new(ARENA);
        assert_eq!(pool.alloc(0).err(), Some(BlkError::Unaligned));
        assert_eq!(pool.alloc(MAX_BUF + 1).err(), Some(BlkError::Unaligned));
    }
}
