//! The content of a disk in memory, cheap to copy.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use crate::units::{SECTOR_SIZE, SectorCount};

/// Bytes that copies share until one of them changes.
const CHUNK: usize = 64 << 10;

/// The bytes of a disk. A clone costs a pointer for every 64 KiB; what was never written, or
/// zeroed as a whole, costs nothing.
#[derive(Clone)]
pub struct Image {
    chunks: Vec<Option<Arc<[u8; CHUNK]>>>,
    len: usize,
}

impl Image {
    /// Zeros.
    #[must_use]
    pub fn zeroed(size: SectorCount) -> Self {
        let len = (size.raw() as usize) * SECTOR_SIZE;
        Self {
            chunks: vec![None; len.div_ceil(CHUNK)],
            len,
        }
    }

    /// The given bytes, cut to whole sectors.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let sectors = bytes.len() / SECTOR_SIZE;
        let mut image = Self::zeroed(SectorCount::new(sectors as u64));
        for (index, chunk) in bytes[..image.len].chunks(CHUNK).enumerate() {
            if chunk.iter().any(|&byte| byte != 0) {
                image.write_at(index * CHUNK, chunk);
            }
        }
        image
    }

    /// The content of a file, cut to whole sectors; holes of the file cost nothing.
    ///
    /// # Errors
    /// The system's.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        let file = File::open(path)?;
        let sectors = file.metadata()?.len() / SECTOR_SIZE as u64;
        let mut image = Self::zeroed(SectorCount::new(sectors));
        let mut buf = vec![0; CHUNK];
        let mut at = 0u64;
        while at < image.len as u64 {
            match rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
                Ok(data) => at = data / CHUNK as u64 * CHUNK as u64,
                Err(rustix::io::Errno::NXIO) => break,
                Err(errno) => return Err(errno.into()),
            }
            let at_usize = at as usize;
            let part = CHUNK.min(image.len.saturating_sub(at_usize));
            file.read_exact_at(&mut buf[..part], at)?;
            if buf[..part].iter().any(|&byte| byte != 0) {
                image.write_at(at_usize, &buf[..part]);
            }
            at += CHUNK as u64;
        }
        Ok(image)
    }

    /// Writes the content to a new or existing file, leaving holes where it is zero.
    ///
    /// # Errors
    /// The system's.
    pub fn save(&self, path: impl AsRef<Path>) -> io::Result<()> {
        let file = File::create(path)?;
        file.set_len(self.len as u64)?;
        for (index, chunk) in self.chunks.iter().enumerate() {
            let Some(chunk) = chunk else { continue };
            let at = index * CHUNK;
            file.write_all_at(&chunk[..CHUNK.min(self.len - at)], at as u64)?;
        }
        Ok(())
    }

    /// Its size.
    #[must_use]
    pub fn size(&self) -> SectorCount {
        SectorCount::new((self.len / SECTOR_SIZE) as u64)
    }

    /// All bytes.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        for (chunk, out) in self.chunks.iter().zip(bytes.chunks_mut(CHUNK)) {
            if let Some(chunk) = chunk {
                out.copy_from_slice(&chunk[..out.len()]);
            }
        }
        bytes
    }

    /// Copies bytes out.
    ///
    /// # Panics
    /// Where the range ends past the end.
    pub fn read_at(&self, at: usize, out: &mut [u8]) {
        assert!(at + out.len() <= self.len, "read past the end of the image");
        for (index, start, range) in pieces(at, out.len()) {
            let part = &mut out[range.clone()];
            match &self.chunks[index] {
                Some(chunk) => part.copy_from_slice(&chunk[start..start + range.len()]),
                None => part.fill(0),
            }
        }
    }

    /// Copies bytes in.
    ///
    /// # Panics
    /// Where the range ends past the end.
    pub fn write_at(&mut self, at: usize, bytes: &[u8]) {
        assert!(
            at + bytes.len() <= self.len,
            "write past the end of the image"
        );
        for (index, start, range) in pieces(at, bytes.len()) {
            let chunk = self.chunks[index].get_or_insert_with(|| Arc::new([0; CHUNK]));
            let chunk = Arc::make_mut(chunk);
            chunk[start..start + range.len()].copy_from_slice(&bytes[range]);
        }
    }

    /// The parts, each with its place, that may differ from those of `other`, an image of the same
    /// size: what one of the two wrote since it was copied from the other.
    pub fn parts_unlike<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = (usize, &'a [u8])> {
        const ZEROS: &[u8; CHUNK] = &[0; CHUNK];
        let pairs = self.chunks.iter().zip(&other.chunks).enumerate();
        pairs.filter_map(|(index, pair)| {
            let bytes = match pair {
                (None, None) => return None,
                (Some(mine), Some(its)) if Arc::ptr_eq(mine, its) => return None,
                (Some(mine), _) => &mine[..],
                (None, Some(_)) => &ZEROS[..],
            };
            let at = index * CHUNK;
            Some((at, &bytes[..CHUNK.min(self.len - at)]))
        })
    }

    /// Zeroes a range.
    ///
    /// # Panics
    /// Where the range ends past the end.
    pub fn zero_at(&mut self, at: usize, len: usize) {
        assert!(at + len <= self.len, "zeroes past the end of the image");
        for (index, start, range) in pieces(at, len) {
            let slot = &mut self.chunks[index];
            if range.len() == CHUNK {
                *slot = None;
            } else if let Some(chunk) = slot {
                Arc::make_mut(chunk)[start..start + range.len()].fill(0);
            }
        }
    }
}

/// The chunks that a range touches: index, start in the chunk, range in the caller's bytes.
fn pieces(at: usize, len: usize) -> impl Iterator<Item = (usize, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let (index, start) = ((at + done) / CHUNK, (at + done) % CHUNK);
        let part = (CHUNK - start).min(len - done);
        let range = done..done + part;
        done += part;
        Some((index, start, range))
    })
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

impl PartialEq for Image {
    fn eq(&self, other: &Self) -> bool {
        let zeros = |chunk: &[u8; CHUNK]| chunk.iter().all(|&byte| byte == 0);
        self.len == other.len
            && self
                .chunks
                .iter()
                .zip(&other.chunks)
                .all(|pair| match pair {
                    (None, None) => true,
                    (Some(a), Some(b)) => Arc::ptr_eq(a, b) || a == b,
                    (Some(chunk), None) | (None, Some(chunk)) => zeros(chunk),
                })
    }
}

#[cfg(test)]
mod tests {
    use super::{CHUNK, Image};
    use crate::SectorCount;

    #[test]
    fn copies_are_apart_and_equal_what_was_written() {
        let mut model = vec![0u8; 5 * CHUNK + 1536];
        let mut image = Image::zeroed(SectorCount::new(model.len() as u64 / 512));
        for (step, at, len) in [
            (1u8, 100, 900),
            (2, CHUNK - 7, 3 * CHUNK),
            (3, 5 * CHUNK, 1536),
        ] {
            model[at..at + len].fill(step);
            image.write_at(at, &vec![step; len]);
        }
        let before = image.clone();
        image.zero_at(300, 2 * CHUNK);
        assert_eq!(before.to_vec(), model);
        assert_ne!(before, image);
        model[300..300 + 2 * CHUNK].fill(0);
        assert_eq!(image.to_vec(), model);
        assert_eq!(Image::from_bytes(&model), image);
        let unlike: Vec<_> = image.parts_unlike(&before).map(|(at, _)| at).collect();
        assert_eq!(unlike, [0, CHUNK, 2 * CHUNK]);
        for (at, bytes) in image.parts_unlike(&before) {
            assert_eq!(bytes, &model[at..at + bytes.len()]);
        }
        let mut part = vec![9; 1000];
        image.read_at(3 * CHUNK - 500, &mut part);
        assert_eq!(part, &model[3 * CHUNK - 500..3 * CHUNK + 500]);
    }

    #[test]
    #[cfg_attr(miri, ignore = "needs a file system that knows holes")]
    fn files_come_back_with_their_holes() {
        let mut image = Image::zeroed(SectorCount::new(4096));
        image.write_at(5 * CHUNK + 512, &[7; 1024]);
        let file = tempfile::NamedTempFile::new().unwrap();
        image.save(file.path()).unwrap();
        assert_eq!(Image::open(file.path()).unwrap(), image);
        let blocks = std::fs::metadata(file.path())
            .map(|metadata| std::os::unix::fs::MetadataExt::blocks(&metadata));
        assert!(blocks.unwrap() <= 256);
    }
}
