//! Telling the device what is free: at commit with `discard`, or on demand (FITRIM).

use std::sync::atomic::Ordering;

use super::view::Span;
use super::{Alloc, Run};
use crate::error::{FsError, FsResult};

/// Blocks taken out of the view for one discard at most: while it runs nobody can have them.
const CHUNK: u32 = 8192;

impl Alloc {
    /// Discards blocks that a committed transaction freed and nobody can have yet.
    pub(super) fn discard_freed(&self, start: u64, len: u32) {
        if let Err(error) = self.core.bufs.discard(start, len.into()) {
            self.no_discard.store(true, Ordering::Relaxed);
            log::warn!("discard refused, no more are sent: {error}");
        }
    }

    /// Discards the free blocks of `start..start + len` in runs of `min_len` and more. Returns how
    /// many blocks that were.
    ///
    /// # Errors
    /// What the device says; bitmaps that cannot be read.
    pub fn trim(&self, start: u64, len: u64, min_len: u64) -> FsResult<u64> {
        let geo = &self.core.geo;
        let begin = start.max(geo.first_data_block.into());
        let end = start.saturating_add(len).min(geo.blocks_count);
        let min = u32::try_from(min_len.max(1)).unwrap_or(u32::MAX);
        let mut trimmed = 0;
        if begin >= end {
            return Ok(0);
        }
        for g in geo.group_of_block(begin).0..=geo.group_of_block(end - 1).0 {
            let first = geo.group_first_block(g);
            let to = (end - first).min(geo.group_blocks(g).into()) as u32;
            let mut at = begin.saturating_sub(first) as u32;
            match self.load_blocks(g) {
                // Noted, and out of use.
                Err(FsError::Corrupt { .. }) => continue,
                other => other?,
            }
            while let Some(span) = self.take_free(g, at, to, min)? {
                at = span.start + span.len;
                let run = Run {
                    start: first + u64::from(span.start),
                    len: span.len,
                };
                let done = self.core.bufs.discard(run.start, run.len.into());
                self.unreserve(run);
                done?;
                trimmed += u64::from(run.len);
            }
        }
        Ok(trimmed)
    }

    /// Reserves the first free run of at least `min` blocks within `at..to` of a group.
    fn take_free(&self, g: u32, at: u32, to: u32, min: u32) -> FsResult<Option<Span>> {
        let group = self.group(g)?;
        let mut view = group.blocks.lock();
        let Some(map) = view.as_mut() else {
            return Ok(None);
        };
        let mut pos = at;
        while pos < to {
            // `first` starts over at the end: what comes back then lies before `pos`.
            let Some(start) = map.first(pos).filter(|s| *s >= pos && *s < to) else {
                break;
            };
            let run = map.run_at(start, to - start);
            let span = Span {
                start,
                len: run.min(CHUNK),
            };
            if run >= min && map.take(span) {
                group.publish_blocks(map);
                self.free.fetch_sub(span.len.into(), Ordering::AcqRel);
                return Ok(Some(span));
            }
            pos = start + run.max(1);
        }
        Ok(None)
    }
}
