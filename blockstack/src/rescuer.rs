//! The thread that submits what a waiting thread would hold back.

use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};

use crate::bio::Bio;
use crate::sync::{Mutex, Rank};

/// Submits `bios`, in order, from the helper thread.
pub(crate) fn submit_elsewhere(bios: Vec<Bio>) {
    static THREAD: OnceLock<Mutex<Option<Sender<Vec<Bio>>>>> = OnceLock::new();
    let sender = THREAD.get_or_init(|| {
        let (sender, receiver) = channel::<Vec<Bio>>();
        let spawned = std::thread::Builder::new()
            .name("bio-rescuer".into())
            .spawn(move || {
                while let Ok(bios) = receiver.recv() {
                    bios.into_iter().for_each(crate::submit::submit_bio);
                }
            });
        match spawned {
            Ok(_) => Mutex::new(Rank::Pool, Some(sender)),
            Err(error) => {
                log::error!("cannot start the rescuer thread: {error}");
                Mutex::new(Rank::Pool, None)
            }
        }
    });
    match &*sender.lock_nested() {
        // Where the thread is gone the bios come back in the error and end when it is dropped.
        Some(sender) => drop(sender.send(bios)),
        None => drop(bios),
    }
}
