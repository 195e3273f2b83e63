//! Writes that the page cache took, and that there was no space for.
//!
//! The kernel takes what a program writes without asking whether it fits, and hears of it when it
//! writes back; it then tells whoever calls `fsync` or `close`. A program that does neither, and
//! writes until there is an error, would write for ever, and all of it would be lost.
//!
//! But before each write the kernel looks up the size of the file, which means a GETATTR where it
//! does not have the attributes. So they are taken away from it, and the error is the answer to that
//! request: the next `write` returns it. A GETATTR for somebody's `stat` names no open file, and is
//! answered as ever; one for a read beyond the end, or a seek to it, may take the error for itself.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use blockstack::sync::{Mutex, Rank};
use blockstack::workqueue::Workqueue;
use fuser::{INodeNo, Notifier};

/// Files whose next `write` is to fail.
pub(super) struct Lost {
    nodes: Mutex<Vec<INodeNo>>,
    /// How many, for those who look without the lock.
    count: AtomicUsize,
    invalidate: Workqueue<INodeNo>,
}

impl Lost {
    pub(super) fn new(notify: Arc<OnceLock<Notifier>>) -> io::Result<Arc<Self>> {
        let forget = move |node: INodeNo| {
            // A negative offset: the attributes, and no pages.
            let told = notify.get().map_or(Ok(()), |n| n.inval_inode(node, -1, 0));
            if let Err(error) = told {
                log::debug!("node {}: attributes stay with the kernel: {error}", node.0);
            }
        };
        Ok(Arc::new(Self {
            nodes: Mutex::new(Rank::Counters, Vec::new()),
            count: AtomicUsize::new(0),
            invalidate: Workqueue::new("lost", 1, forget)?,
        }))
    }

    /// A write of `node` found no space. Not before that write is answered: the kernel may have to
    /// wait for it.
    pub(super) fn note(&self, node: INodeNo) {
        let mut nodes = self.nodes.lock();
        if !nodes.contains(&node) {
            nodes.push(node);
            self.count.store(nodes.len(), Ordering::Release);
        }
        drop(nodes);
        self.invalidate.queue(node);
    }

    /// Whether the write that asks for attributes of `node` is to fail. Once for each time.
    pub(super) fn take(&self, node: INodeNo) -> bool {
        if self.count.load(Ordering::Acquire) == 0 {
            return false;
        }
        let mut nodes = self.nodes.lock();
        let before = nodes.len();
        nodes.retain(|&lost| lost != node);
        self.count.store(nodes.len(), Ordering::Release);
        nodes.len() < before
    }

    /// The kernel does not know `node` any more.
    pub(super) fn forget(&self, node: INodeNo) {
        self.take(node);
    }
}
