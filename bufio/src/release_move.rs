//! Giving the content of a buffer to another block.

use std::sync::Arc;

use blockstack::Buf;
use blockstack::sync::prim::atomic::{self, Ordering};

use crate::buffer::{Buffer, Inner};
use crate::cache::Cache;
use crate::error::BufError;
use crate::state::Phase;
use crate::writeback::Origin;

impl Cache {
    pub(crate) fn release_move(self: &Arc<Self>, buffer: Buffer, to: u64) -> Result<(), BufError> {
        self.probe_rank();
        self.check_range(to)?;
        self.check_failed()?;
        let Buffer { inner, ticket } = buffer;
        if inner.block == to {
            return Ok(());
        }
        if inner.phase() != Phase::Clean {
            self.write_out(vec![inner.clone()], Origin::Caller)?;
        }
        let validator = inner.validator();
        match self.take_if_alone(inner) {
            Ok(buf) => {
                drop(ticket);
                let moved = Inner::new(self, to, Phase::Clean, Some(buf), &validator);
                self.displace(&moved);
                moved.mark_dirty(self.whole());
                Ok(())
            }
            // Not through a buffer of `to`: there may be no memory for one, and a thread that holds
            // one buffer must not need another.
            Err(shared) => self.write_copy(&shared, || {
                loop {
                    let place = self.unread(to, &validator);
                    self.displace(&place);
                    if self.change(&place, Phase::Reading, Phase::Doomed) {
                        return place;
                    }
                }
            }),
        }
    }

    /// Takes the memory of a buffer that only the caller and the map refer to.
    fn take_if_alone(&self, inner: Arc<Inner>) -> Result<Buf, Arc<Inner>> {
        let removed = self.map.remove_if(inner.block, |there| {
            // Two references, the map's and ours: under the map's lock nobody can come to hold it.
            let alone = there.id == inner.id && Arc::strong_count(there) == 2;
            atomic::fence(Ordering::Acquire);
            alone && there.phase() == Phase::Clean && !there.is_pinned()
        });
        if removed.is_none() {
            return Err(inner);
        }
        self.buffers.fetch_sub(1, Ordering::Relaxed);
        self.change(&inner, Phase::Clean, Phase::Gone);
        let buf = inner.lock_data().take();
        buf.ok_or(inner)
    }

    /// Enters `inner` in the place of the buffer that is there, when no write of the block is on
    /// its way any more.
    fn displace(&self, inner: &Arc<Inner>) {
        loop {
            self.forget(inner.block);
            self.wait_writes(inner.block, 1);
            if self.insert(inner).is_ok() {
                return;
            }
        }
    }
}
