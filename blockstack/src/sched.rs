//! Where and how urgently a thread runs.
//!
//! A thread can be bound to one processor, and can be made to run only where nobody else wants to
//! ([`lower`], `SCHED_IDLE`). The kernel gives both to the threads that such a thread starts. So
//! threads that may be started by one are started by [`spawn`], which lets another do it.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Read};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};

use rustix::process::Pid;
use rustix::thread::{CpuSet, gettid, sched_getaffinity, sched_setaffinity};
use thread_priority::{
    NormalThreadSchedulePolicy, ThreadId, ThreadPriority, ThreadSchedulePolicy,
    set_thread_priority_and_policy, thread_native_id,
};

use crate::sync::prim::thread::{Builder, JoinHandle};

struct Start {
    name: String,
    body: Box<dyn FnOnce() + Send>,
    started: SyncSender<io::Result<JoinHandle<()>>>,
}

/// Processors of the process when a thread was lowered first.
static ALL: OnceLock<CpuSet> = OnceLock::new();

/// Leads to a thread that is neither bound nor lowered, once one was.
static PLAIN: OnceLock<Sender<Start>> = OnceLock::new();

thread_local! {
    static LOWERED: Cell<bool> = const { Cell::new(false) };
    static BOUND: Cell<Option<usize>> = const { Cell::new(None) };
}

/// How many processors the calling thread may use; 1 where that cannot be told.
#[must_use]
pub fn processors() -> u32 {
    sched_getaffinity(None).map_or(1, |set| set.count())
}

/// How many threads of the system run or want to, as `/proc/loadavg` tells it.
#[must_use]
pub fn runnable() -> Option<u32> {
    let mut text = [0; 128];
    let len = File::open("/proc/loadavg")
        .and_then(|mut file| file.read(&mut text))
        .ok()?;
    let text = std::str::from_utf8(&text[..len]).ok()?;
    let (running, _all) = text.split(' ').nth(3)?.split_once('/')?;
    running.parse().ok()
}

/// A thread that was lowered.
#[derive(Clone, Copy, Debug)]
pub struct Lowered {
    thread: Pid,
    handle: ThreadId,
}

impl Lowered {
    /// Lets the thread run on all processors that the process had when a thread was lowered first,
    /// and, where the system allows that, as urgently as others, until it is lowered again.
    pub fn raise(&self) {
        free_thread(Some(self.thread));
        let normal = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Other);
        if let Err(error) = set_thread_priority_and_policy(self.handle, ThreadPriority::Min, normal)
        {
            log::debug!("a thread stays as low as it is: {error:?}");
        }
    }
}

/// Makes the calling thread one that runs only where no other thread wants to. Without privileges
/// that is for ever: the kernel lets nobody come back.
///
/// # Errors
/// Those of sched_setscheduler(2), and of starting a thread.
pub fn lower() -> io::Result<Lowered> {
    if ALL.get().is_none() {
        let all = sched_getaffinity(None)?;
        ALL.get_or_init(|| all);
    }
    if PLAIN.get().is_none() {
        let (sender, starts) = channel::<Start>();
        let starter = std::thread::Builder::new().name("starter".into());
        starter.spawn(move || {
            for Start {
                name,
                body,
                started,
            } in starts
            {
                // Whoever asked waits.
                let lost = started.send(Builder::new().name(name).spawn(body));
                debug_assert!(lost.is_ok());
            }
        })?;
        PLAIN.get_or_init(|| sender);
    }
    let idle = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Idle);
    set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, idle)
        .map_err(|error| io::Error::other(format!("{error:?}")))?;
    LOWERED.set(true);
    Ok(Lowered {
        thread: gettid(),
        handle: thread_native_id(),
    })
}

/// Binds the calling thread, which must have been [lowered](lower), to processor `cpu`, and says
/// whether it is bound to it now: not where the process may not use that processor.
pub fn bind(cpu: usize) -> bool {
    if BOUND.get() == Some(cpu) {
        return true;
    }
    if cpu >= CpuSet::MAX_CPU || !LOWERED.get() {
        return false;
    }
    let mut one = CpuSet::new();
    one.set(cpu);
    let bound = sched_setaffinity(None, &one).is_ok();
    if bound {
        BOUND.set(Some(cpu));
    }
    bound
}

/// Ends what [`bind`] began.
pub fn free() {
    if BOUND.take().is_some() {
        free_thread(None);
    }
}

fn free_thread(thread: Option<Pid>) {
    let Some(all) = ALL.get() else { return };
    if let Err(errno) = sched_setaffinity(thread, all) {
        // It stays where it is: slower, not wrong.
        log::debug!("the processors of a thread cannot be set: {errno}");
    }
}

/// Whether the calling thread was lowered: it should do nothing that others wait for.
#[must_use]
pub fn is_lowered() -> bool {
    LOWERED.get()
}

/// Starts a thread that is neither bound nor lowered, whoever calls.
///
/// # Errors
/// Those of starting a thread.
pub fn spawn(name: String, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    match PLAIN.get() {
        Some(plain) if LOWERED.get() => {
            let (started, answer) = sync_channel(1);
            let start = Start {
                name,
                body: Box::new(body),
                started,
            };
            let gone = |_| io::Error::other("the thread that starts others is gone");
            plain.send(start).map_err(|lost| gone(lost.to_string()))?;
            answer.recv().map_err(|lost| gone(lost.to_string()))?
        }
        _ => Builder::new().name(name).spawn(body),
    }
}

#[cfg(test)]
mod tests {
    use rustix::thread::{sched_getaffinity, sched_getcpu};

    use super::{bind, free, lower, runnable, spawn};

    /// `SCHED_IDLE` in field 41 of `/proc/thread-self/stat`.
    fn is_idle() -> bool {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        let fields = stat.rsplit(')').next().unwrap();
        fields.split_whitespace().nth(41 - 3) == Some("5")
    }

    #[test]
    fn this_thread_at_least_is_runnable() {
        assert!(runnable().is_some_and(|running| running >= 1));
    }

    #[test]
    fn a_raised_thread_runs_everywhere() {
        let all = sched_getaffinity(None).unwrap();
        std::thread::spawn(move || {
            let lowered = lower().unwrap();
            assert!(bind(sched_getcpu()));
            std::thread::spawn(move || lowered.raise()).join().unwrap();
            assert_eq!(sched_getaffinity(None).unwrap(), all);
            // Where the system allowed it, again.
            lower().unwrap();
            assert!(is_idle());
        })
        .join()
        .unwrap();
    }

    #[test]
    fn threads_of_a_lowered_one_run_as_others_do() {
        let all = sched_getaffinity(None).unwrap();
        assert!(!bind(sched_getcpu()), "only a lowered thread");
        std::thread::spawn(move || {
            lower().unwrap();
            assert!(bind(sched_getcpu()));
            assert!(is_idle());
            assert_eq!(sched_getaffinity(None).unwrap().count(), 1);
            let (tell, told) = std::sync::mpsc::channel();
            let child = spawn("child".into(), move || {
                tell.send((is_idle(), sched_getaffinity(None).unwrap()))
                    .unwrap();
            });
            assert_eq!(told.recv().unwrap(), (false, all));
            child.unwrap().join().unwrap();
            free();
            assert_eq!(sched_getaffinity(None).unwrap(), all);
        })
        .join()
        .unwrap();
        assert!(!is_idle());
    }
}
