//! The content of a disk in memory, cheap to copy.

use std::fmt;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use crate::units::{SECTOR_SIZE, SectorCount};

/// Bytes that copies share until one of them changes.
const PAGE: usize = 4096;
/// Slots of a node.
const FAN_SHIFT: u32 = 6;
const FAN: usize = 1 << FAN_SHIFT;
/// Bytes of a file that are read at a time.
const CHUNK: usize = 64 << 10;

/// What an image shows where nothing was written to it.
pub trait Backing: Send + Sync {
    /// Fills `out` with the bytes from `at` on.
    fn read_at(&self, at: u64, out: &mut [u8]);
}

/// A file that is read when its content is asked for.
pub struct FileBacking {
    file: File,
    failed: AtomicBool,
}

impl FileBacking {
    /// Opens a file to be read.
    ///
    /// # Errors
    /// The system's.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        let file = File::open(path)?;
        let failed = AtomicBool::new(false);
        Ok(Self { file, failed })
    }

    /// Its size, cut to whole sectors; of a block device too.
    ///
    /// # Errors
    /// The system's.
    pub fn size(&self) -> io::Result<SectorCount> {
        let end = rustix::fs::seek(&self.file, rustix::fs::SeekFrom::End(0))?;
        Ok(SectorCount::new(end / SECTOR_SIZE as u64))
    }

    /// Whether a read failed since it was opened; what was asked for then read as zeros.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }
}

impl Backing for FileBacking {
    fn read_at(&self, at: u64, out: &mut [u8]) {
        if let Err(error) = self.file.read_exact_at(out, at) {
            if !self.failed.swap(true, Ordering::AcqRel) {
                log::error!("reading what stands below an image, at byte {at}: {error}");
            }
            out.fill(0);
        }
    }
}

struct Page {
    bytes: [u8; PAGE],
    /// Of the bytes, once somebody has asked.
    sum: OnceLock<u64>,
}

impl Page {
    fn new(bytes: [u8; PAGE]) -> Self {
        let sum = OnceLock::new();
        Self { bytes, sum }
    }

    fn bytes_mut(&mut self) -> &mut [u8; PAGE] {
        self.sum = OnceLock::new();
        &mut self.bytes
    }

    fn sum(&self) -> u64 {
        *self.sum.get_or_init(|| {
            let mut hasher = DefaultHasher::new();
            hasher.write(&self.bytes);
            hasher.finish()
        })
    }
}

impl Clone for Page {
    fn clone(&self) -> Self {
        Self::new(self.bytes)
    }
}

/// What stands in a part of the disk.
#[derive(Clone)]
enum Slot {
    /// What the backing has; zeros where there is none.
    Base,
    Zero,
    Page(Arc<Page>),
    Node(Arc<Node>),
}

#[derive(Clone)]
struct Node {
    slots: [Slot; FAN],
}

impl Slot {
    /// The node in this slot, made of what was there as a whole where it was none.
    fn node_mut(&mut self) -> Option<&mut Node> {
        if matches!(self, Self::Base | Self::Zero) {
            let whole = self.clone();
            let slots = std::array::from_fn(|_| whole.clone());
            *self = Self::Node(Arc::new(Node { slots }));
        }
        match self {
            Self::Node(node) => Some(Arc::make_mut(node)),
            _ => None,
        }
    }

    fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Base, Self::Base) | (Self::Zero, Self::Zero) => true,
            (Self::Page(a), Self::Page(b)) => Arc::ptr_eq(a, b) || a.bytes == b.bytes,
            (Self::Node(a), Self::Node(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

/// The bytes of a disk: a tree of pages that copies share. A copy costs a pointer, a change the
/// path to the page; what was never written, or zeroed as a whole, costs nothing.
#[derive(Clone)]
pub struct Image {
    root: Slot,
    /// Nodes between the root and a page.
    levels: u32,
    len: usize,
    backing: Option<Arc<dyn Backing>>,
}

impl Image {
    /// Zeros.
    #[must_use]
    pub fn zeroed(size: SectorCount) -> Self {
        let len = (size.raw() as usize) * SECTOR_SIZE;
        let pages = len.div_ceil(PAGE);
        let mut levels = 0;
        while pages > 1 << (levels * FAN_SHIFT) {
            levels += 1;
        }
        Self {
            root: Slot::Base,
            levels,
            len,
            backing: None,
        }
    }

    /// What `backing` has, until it is written to; the backing itself never changes.
    #[must_use]
    pub fn over(size: SectorCount, backing: Arc<dyn Backing>) -> Self {
        let backing = Some(backing);
        Self {
            backing,
            ..Self::zeroed(size)
        }
    }

    /// The given bytes, cut to whole sectors.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let sectors = bytes.len() / SECTOR_SIZE;
        let mut image = Self::zeroed(SectorCount::new(sectors as u64));
        for (index, page) in bytes[..image.len].chunks(PAGE).enumerate() {
            if page.iter().any(|&byte| byte != 0) {
                image.write_at(index * PAGE, page);
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
            let chunk = CHUNK.min(image.len.saturating_sub(at as usize));
            file.read_exact_at(&mut buf[..chunk], at)?;
            for (index, page) in buf[..chunk].chunks(PAGE).enumerate() {
                if page.iter().any(|&byte| byte != 0) {
                    image.write_at(at as usize + index * PAGE, page);
                }
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
        let mut bytes = [0; PAGE];
        let mut page = 0;
        while page < self.len.div_ceil(PAGE) {
            let (slot, whole) = self.find(page);
            let is_hole = match slot {
                Slot::Zero => true,
                Slot::Base => self.backing.is_none(),
                Slot::Page(_) | Slot::Node(_) => false,
            };
            if is_hole {
                page = whole.end;
                continue;
            }
            let at = page * PAGE;
            let part = PAGE.min(self.len - at);
            self.read_at(at, &mut bytes[..part]);
            if bytes[..part].iter().any(|&byte| byte != 0) {
                file.write_all_at(&bytes[..part], at as u64)?;
            }
            page += 1;
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
        self.read_at(0, &mut bytes);
        bytes
    }

    /// What holds the bytes of a page, and the pages it holds.
    fn find(&self, page: usize) -> (&Slot, Range<usize>) {
        let (mut slot, mut level) = (&self.root, self.levels);
        while let Slot::Node(node) = slot {
            level -= 1;
            slot = &node.slots[slot_of(page, level)];
        }
        let span = 1 << (level * FAN_SHIFT);
        let start = page / span * span;
        (slot, start..start + span)
    }

    fn read_base(&self, at: usize, out: &mut [u8]) {
        match &self.backing {
            Some(backing) => backing.read_at(at as u64, out),
            None => out.fill(0),
        }
    }

    /// A page to be changed; `whole`: all of it, so what was there does not matter.
    fn page_mut(&mut self, page: usize, whole: bool) -> &mut [u8; PAGE] {
        let mut fresh = [0; PAGE];
        if !whole && matches!(self.find(page).0, Slot::Base) {
            let at = page * PAGE;
            let part = PAGE.min(self.len - at);
            self.read_base(at, &mut fresh[..part]);
        }
        let (mut slot, mut level) = (&mut self.root, self.levels);
        while level > 0 {
            level -= 1;
            match slot.node_mut() {
                Some(node) => slot = &mut node.slots[slot_of(page, level)],
                None => unreachable!("pages stand below all nodes"),
            }
        }
        if !matches!(slot, Slot::Page(_)) {
            *slot = Slot::Page(Arc::new(Page::new(fresh)));
        }
        match slot {
            Slot::Page(page) => Arc::make_mut(page).bytes_mut(),
            _ => unreachable!("it was just made"),
        }
    }

    /// Copies bytes out.
    ///
    /// # Panics
    /// Where the range ends past the end.
    pub fn read_at(&self, at: usize, out: &mut [u8]) {
        assert!(at + out.len() <= self.len, "read past the end of the image");
        let mut done = 0;
        while done < out.len() {
            let (page, start) = ((at + done) / PAGE, (at + done) % PAGE);
            let (slot, span) = self.find(page);
            let end = match slot {
                // Many pages at once.
                Slot::Base | Slot::Zero => (span.end * PAGE).min(at + out.len()),
                _ => (page * PAGE + PAGE).min(at + out.len()),
            };
            let part = &mut out[done..end - at];
            match slot {
                Slot::Page(page) => part.copy_from_slice(&page.bytes[start..start + part.len()]),
                Slot::Base => self.read_base(at + done, part),
                Slot::Zero | Slot::Node(_) => part.fill(0),
            }
            done = end - at;
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
        for (page, start, range) in pieces(at, bytes.len()) {
            let to = self.page_mut(page, range.len() == PAGE);
            to[start..start + range.len()].copy_from_slice(&bytes[range]);
        }
    }

    /// The ranges of bytes that may differ from those of `other`, an image of the same size, each no
    /// longer than a page: what one of the two wrote since it was copied from the other.
    #[must_use]
    pub fn parts_unlike(&self, other: &Self) -> Vec<Range<usize>> {
        let mut pages = Vec::new();
        unlike(&self.root, &other.root, self.levels, 0, &mut pages);
        let pages = pages.into_iter().flatten();
        pages
            .map(|page| page * PAGE..(page * PAGE + PAGE).min(self.len))
            .filter(|part| !part.is_empty())
            .collect()
    }

    /// Zeroes a range.
    ///
    /// # Panics
    /// Where the range ends past the end.
    pub fn zero_at(&mut self, at: usize, len: usize) {
        assert!(at + len <= self.len, "zeroes past the end of the image");
        let end = at + len;
        // The last page may be a part of one only.
        let whole = at.div_ceil(PAGE)..if end == self.len {
            end.div_ceil(PAGE)
        } else {
            end / PAGE
        };
        if whole.is_empty() {
            self.zero_part(at, end);
            return;
        }
        self.zero_part(at, whole.start * PAGE);
        self.zero_part(whole.end * PAGE, end);
        clear(&mut self.root, self.levels, 0, &whole);
    }

    /// Zeroes a range that does not fill a page.
    fn zero_part(&mut self, from: usize, to: usize) {
        if from >= to {
            return;
        }
        for (page, start, range) in pieces(from, to - from) {
            let is_zero = match self.find(page).0 {
                Slot::Zero => true,
                Slot::Base => self.backing.is_none(),
                Slot::Page(_) | Slot::Node(_) => false,
            };
            if !is_zero {
                self.page_mut(page, false)[start..start + range.len()].fill(0);
            }
        }
    }

    /// A number for all that differs from `origin`, of which this is a changed copy: two copies with
    /// the same content have the same.
    #[must_use]
    pub fn difference(&self, origin: &Self) -> u64 {
        let mut sum = 0;
        differ(&self.root, &origin.root, self.levels, 0, &mut sum);
        sum
    }
}

fn slot_of(page: usize, level: u32) -> usize {
    (page >> (level * FAN_SHIFT)) & (FAN - 1)
}

/// Makes the pages of `range` zeros; the slot's first page is `first`.
fn clear(slot: &mut Slot, level: u32, first: usize, range: &Range<usize>) {
    let span = 1 << (level * FAN_SHIFT);
    if first >= range.end || first + span <= range.start || matches!(slot, Slot::Zero) {
        return;
    }
    if range.start <= first && first + span <= range.end {
        *slot = Slot::Zero;
        return;
    }
    if let Some(node) = slot.node_mut() {
        let below = span >> FAN_SHIFT;
        for (index, slot) in node.slots.iter_mut().enumerate() {
            clear(slot, level - 1, first + index * below, range);
        }
    }
}

fn differ(slot: &Slot, origin: &Slot, level: u32, first: usize, sum: &mut u64) {
    if slot.same(origin) {
        return;
    }
    let Slot::Node(node) = slot else {
        let mut hasher = DefaultHasher::new();
        (first, level).hash(&mut hasher);
        match slot {
            Slot::Page(page) => page.sum().hash(&mut hasher),
            _ => matches!(slot, Slot::Zero).hash(&mut hasher),
        }
        *sum = sum.wrapping_add(hasher.finish());
        return;
    };
    let below = 1 << ((level - 1) * FAN_SHIFT);
    for (index, slot) in node.slots.iter().enumerate() {
        let origin = match origin {
            Slot::Node(origin) => &origin.slots[index],
            whole => whole,
        };
        differ(slot, origin, level - 1, first + index * below, sum);
    }
}

/// Notes the pages of two trees that may not be the same.
fn unlike(slot: &Slot, other: &Slot, level: u32, first: usize, pages: &mut Vec<Range<usize>>) {
    if slot.same(other) {
        return;
    }
    if !matches!((slot, other), (Slot::Node(_), _) | (_, Slot::Node(_))) {
        pages.push(first..first + (1 << (level * FAN_SHIFT)));
        return;
    }
    let below = |whole: &Slot, index: usize| match whole {
        Slot::Node(node) => node.slots[index].clone(),
        whole => whole.clone(),
    };
    for index in 0..FAN {
        let first = first + (index << ((level - 1) * FAN_SHIFT));
        unlike(
            &below(slot, index),
            &below(other, index),
            level - 1,
            first,
            pages,
        );
    }
}

/// The pages that a range touches: index, start in the page, range in the caller's bytes.
fn pieces(at: usize, len: usize) -> impl Iterator<Item = (usize, usize, Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let (page, start) = ((at + done) / PAGE, (at + done) % PAGE);
        let part = (PAGE - start).min(len - done);
        let range = done..done + part;
        done += part;
        Some((page, start, range))
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
        if self.len != other.len {
            return false;
        }
        let same_backing = match (&self.backing, &other.backing) {
            (None, None) => true,
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            _ => false,
        };
        let (mut a, mut b) = ([0; PAGE], [0; PAGE]);
        let mut page = 0;
        while page < self.len.div_ceil(PAGE) {
            let ((mine, span), (theirs, other_span)) = (self.find(page), other.find(page));
            if mine.same(theirs) && (same_backing || !matches!(mine, Slot::Base)) {
                page = span.end.min(other_span.end);
                continue;
            }
            let at = page * PAGE;
            let part = PAGE.min(self.len - at);
            self.read_at(at, &mut a[..part]);
            other.read_at(at, &mut b[..part]);
            if a[..part] != b[..part] {
                return false;
            }
            page += 1;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{Backing, CHUNK, Image};
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
        let mut patched = before.to_vec();
        let unlike = image.parts_unlike(&before);
        let most = 2 * CHUNK + 2 * super::PAGE;
        assert!(
            unlike.iter().map(std::ops::Range::len).sum::<usize>() <= most,
            "{unlike:?}"
        );
        for part in unlike {
            image.read_at(part.start, &mut patched[part]);
        }
        assert_eq!(patched, model);
        let mut part = vec![9; 1000];
        image.read_at(3 * CHUNK - 500, &mut part);
        assert_eq!(part, &model[3 * CHUNK - 500..3 * CHUNK + 500]);
        image.zero_at(0, model.len());
        assert_eq!(image, Image::zeroed(image.size()));
    }

    struct Counting;

    impl Backing for Counting {
        fn read_at(&self, at: u64, out: &mut [u8]) {
            for (index, byte) in out.iter_mut().enumerate() {
                *byte = ((at as usize + index) / 512) as u8;
            }
        }
    }

    #[test]
    fn what_was_not_written_is_the_backings() {
        let size = SectorCount::new((1 << 40) / 512);
        let origin = Image::over(size, Arc::new(Counting));
        let mut image = origin.clone();
        image.write_at(512 * 1000 + 7, &[0xff; 10]);
        image.zero_at(512 * 2000, 512 * 100);
        let mut out = [0; 512];
        for (sector, want) in [(999, 999 % 256), (2000, 0), (2099, 0), (2100, 2100 % 256)] {
            image.read_at(sector * 512, &mut out);
            assert!(out.iter().all(|&byte| usize::from(byte) == want));
        }
        image.read_at(512 * 1000, &mut out);
        assert_eq!(out[..7], [1000u16 as u8; 7]);
        assert_eq!(out[7..17], [0xff; 10]);
        assert_eq!(out[17], 1000u16 as u8);
        // As large as it is: what is compared and discarded costs by what was touched.
        image.zero_at(1 << 30, 1 << 39);
        assert_ne!(image, origin);
    }

    #[test]
    fn equal_differences_are_equal_content() {
        let mut origin = Image::zeroed(SectorCount::new(1 << 20));
        origin.write_at(77777, &[5; 9000]);
        let (mut a, mut b) = (origin.clone(), origin.clone());
        assert_eq!(a.difference(&origin), 0);
        a.write_at(80000, &[6; 700]);
        a.write_at(200_000, &[7; 700]);
        assert_ne!(a.difference(&origin), 0);
        b.write_at(200_000, &[7; 700]);
        assert_ne!(a.difference(&origin), b.difference(&origin));
        b.write_at(80000, &[6; 700]);
        assert_eq!(a.difference(&origin), b.difference(&origin));
        a.write_at(80000, &[5; 700]);
        let mut only = origin.clone();
        only.write_at(200_000, &[7; 700]);
        assert_eq!(a.difference(&origin), only.difference(&origin));
    }

    #[test]
    #[cfg_attr(miri, ignore = "needs a file system that knows holes")]
    fn files_come_back_with_their_holes() {
        let mut image = Image::zeroed(SectorCount::new(4096));
        image.write_at(5 * CHUNK + 512, &[7; 1024]);
        let file = tempfile::NamedTempFile::new().unwrap();
        image.save(file.path()).unwrap();
        assert_eq!(Image::open(file.path()).unwrap(), image);
        let lazy = super::FileBacking::open(file.path()).unwrap();
        let size = lazy.size().unwrap();
        assert_eq!(Image::over(size, Arc::new(lazy)), image);
        let blocks = std::fs::metadata(file.path())
            .map(|metadata| std::os::unix::fs::MetadataExt::blocks(&metadata));
        assert!(blocks.unwrap() <= 256);
    }
}
