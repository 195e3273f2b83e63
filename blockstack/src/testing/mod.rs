//! Devices for tests: they fail, lose power, or tell what they see.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`faulty`] | fails, or holds back, the operations it is told to |
//! | [`crash`] | knows what a power cut could leave behind |
//! | [`observer`] | tells of the start and the end of each bio |

pub mod crash;
pub mod faulty;
pub mod observer;

use std::sync::Arc;

use crate::bio::Bio;
use crate::bio_set::{BioSet, Wait};
use crate::device::DynDevice;
use crate::error::{BlkError, BlkResult};
use crate::submit::submit_bio;

/// Hears of the end of a bio that was passed on.
trait Ended: Send + Sync {
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
struct Forward {
    lower: DynDevice,
    set: BioSet<ForwardPad>,
}

impl Forward {
    fn new(lower: DynDevice) -> Self {
        Self {
            lower,
            set: BioSet::new("testing", 256),
        }
    }

    /// Sends a clone of `bio`, which ends with what `ended` makes of the clone's end.
    fn send(&self, bio: Bio, ended: Arc<dyn Ended>) {
        let Some(mut clone) = self.set.alloc(bio.op(), Wait::Yes) else {
            bio.complete(Err(BlkError::NoMemory));
            return;
        };
        clone.clone_from_parent(&bio, bio.sector());
        clone.set_dev(self.lower.clone(), bio.sector());
        clone.set_end_io(forwarded);
        let pad = clone.pad_mut::<ForwardPad>();
        pad.parent = Some(bio);
        pad.ended = Some(ended);
        submit_bio(clone);
    }
}

fn forwarded(mut clone: Bio, res: BlkResult) {
    let ForwardPad { parent, ended } = std::mem::take(clone.pad_mut::<ForwardPad>());
    drop(clone);
    if let (Some(parent), Some(ended)) = (parent, ended) {
        let res = ended.ended(&parent, res);
        parent.complete(res);
    }
}
