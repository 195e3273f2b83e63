//! Devices that pass each bio on as it is.

use std::sync::Arc;

use crate::bio::Bio;
use crate::bio_set::{BioSet, Wait};
use crate::device::DynDevice;
use crate::error::{BlkError, BlkResult};
use crate::submit::submit_bio;

/// Hears of the end of a bio that was passed on.
pub(crate) trait Ended: Send + Sync {
    /// May change the result.
    fn ended(&self, bio: &Bio, res: BlkResult) -> BlkResult;
}

/// The pad of a clone.
#[derive(Default)]
struct ForwardPad {
    parent: Option<Bio>,
    ended: Option<Arc<dyn Ended>>,
}

/// Passes bios on to a lower device, one clone each.
pub(crate) struct Forward {
    pub(crate) lower: DynDevice,
    set: BioSet<ForwardPad>,
}

impl Forward {
    pub(crate) fn new(lower: DynDevice) -> Self {
        Self {
            lower,
            set: BioSet::new("forward", 256),
        }
    }

    /// Sends a clone of `bio`, which ends as the clone does.
    pub(crate) fn send_plain(&self, bio: Bio) {
        self.send_to(bio, None);
    }

    /// Sends a clone of `bio`, which ends with what `ended` makes of the clone's end.
    pub(crate) fn send(&self, bio: Bio, ended: Arc<dyn Ended>) {
        self.send_to(bio, Some(ended));
    }

    fn send_to(&self, bio: Bio, ended: Option<Arc<dyn Ended>>) {
        let Some(mut clone) = self.set.alloc(bio.op(), Wait::Yes) else {
            bio.complete(Err(BlkError::NoMemory));
            return;
        };
        clone.clone_from_parent(&bio, bio.sector());
        clone.set_dev(self.lower.clone(), bio.sector());
        clone.set_end_io(forwarded);
        let pad = clone.pad_mut::<ForwardPad>();
        pad.parent = Some(bio);
        pad.ended = ended;
        submit_bio(clone);
    }
}

fn forwarded(mut clone: Bio, res: BlkResult) {
    let ForwardPad { parent, ended } = std::mem::take(clone.pad_mut::<ForwardPad>());
    drop(clone);
    if let Some(parent) = parent {
        let res = ended.map_or(res, |ended| ended.ended(&parent, res));
        parent.complete(res);
    }
}
