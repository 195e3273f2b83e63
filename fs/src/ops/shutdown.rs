//! Shutting a mounted file system down: what is not on disk by then is lost, as in a power cut, while
//! the mount stays and answers with errors.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::core::{DOWN, Fs, HALTING};
use crate::error::FsResult;

/// What becomes durable first, as the flags of the kernel's `EXT4_IOC_SHUTDOWN` say.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Shutdown {
    /// `EXT4_GOING_FLAGS_DEFAULT`: everything.
    #[default]
    Everything,
    /// `EXT4_GOING_FLAGS_LOGFLUSH`: what the journal has. Data under way is lost.
    Log,
    /// `EXT4_GOING_FLAGS_NOLOGFLUSH`: only what is durable now.
    Nothing,
}

impl Fs {
    /// Ends everything but [`Fs::unmount`]: what is asked for from now on gets
    /// [`FsError::ShutDown`](crate::FsError::ShutDown). The next mount replays the journal.
    ///
    /// # Errors
    /// None, as with the kernel's: what could not be made durable first is lost as well.
    pub fn shut_down(self: &Arc<Self>, how: Shutdown) -> FsResult {
        if self.is_shut_down() {
            return Ok(());
        }
        let flushed = match how {
            Shutdown::Everything => self.sync(),
            Shutdown::Log => self.journal.commit_all(),
            Shutdown::Nothing => Ok(()),
        };
        if let Err(error) = flushed {
            log::error!("shutdown: not all could be written first: {error}");
        }
        self.shutdown.store(HALTING, Ordering::Release);
        self.journal.halt();
        self.shutdown.store(DOWN, Ordering::Release);
        log::warn!("file system was shut down");
        Ok(())
    }
}
