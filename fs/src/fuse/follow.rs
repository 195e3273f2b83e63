//! Who sends requests, and on which processor that thread runs.
//!
//! Many programs work on a file system with one thread that sends a request, waits for the answer,
//! and sends the next. Each time its processor goes to sleep, another one is woken to answer, and
//! goes to sleep itself while the first is woken. These wake-ups take longer than the requests, on
//! virtual machines many times as long. Where both threads share a processor, each is a change of
//! threads and nothing more. But the scheduler does the opposite: it moves a thread that is woken
//! away from the one that wakes it, to a processor that has nothing to do.
//!
//! It does not where the thread that wakes it runs only when nobody else wants to (`SCHED_IDLE`):
//! then that processor counts as one with nothing to do. So while requests of a single thread come
//! quickly one after another, they are read by a thread of that class, bound to the processor of its
//! client: the gate's *companion*. Such a thread gets next to nothing of a processor that somebody
//! else computes on, so it reads only while its client does little but wait for it; see
//! [`super::gate`] for what happens when that ends.
//!
//! Requests that carry much data are better answered on another processor while the client goes on,
//! so they end it, too.

use std::fs::File;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use blockstack::sched;

/// Requests of one thread in a row that make it worth a companion.
const ROW: u32 = 32;
/// A client that takes longer than this between two requests does other things.
const PAUSE: Duration = Duration::from_micros(500);
/// Bytes of a request that carries much data, and how many in a row end the companion's turn.
pub(super) const HEAVY: usize = 64 << 10;
const HEAVY_ROW: u32 = 4;
/// Requests of the companion after which it looks where its client is.
const AGAIN: u32 = 64;
/// A request that comes later than this may come from another processor.
const NEAR: Duration = Duration::from_micros(50);

/// The last requests. Written by the one thread that reads; where several do, the worst is a wrong
/// guess.
#[derive(Default)]
pub(super) struct Follow {
    /// Who sent the last request.
    client: AtomicU32,
    /// How many in a row.
    row: AtomicU32,
    /// How many of them carried much data, at the end.
    heavy: AtomicU32,
    /// The companion's requests since it looked where its client is.
    since: AtomicU32,
    /// How many there must be until it looks again because one came late.
    patience: AtomicU32,
    /// The processor it found, plus one.
    found: AtomicU32,
}

impl Follow {
    /// Notes a request of the thread `pid`, 0 where the kernel names none, that came `gap` after the
    /// last answer and carries `len` bytes of data. Returns whether a companion should read the next.
    pub(super) fn note(&self, pid: u32, len: usize, gap: Option<Duration>) -> bool {
        let mut row = self.row.load(Ordering::Relaxed);
        let heavy = match len {
            0..HEAVY => 0,
            _ => self.heavy.load(Ordering::Relaxed).saturating_add(1),
        };
        self.heavy.store(heavy, Ordering::Relaxed);
        if pid != 0 && pid != self.client.load(Ordering::Relaxed) {
            self.client.store(pid, Ordering::Relaxed);
            self.found.store(0, Ordering::Relaxed);
            row = 0;
        }
        if heavy >= HEAVY_ROW || gap.is_none_or(|gap| gap > PAUSE) {
            row = 0;
        }
        row = row.saturating_add(1);
        self.row.store(row, Ordering::Relaxed);
        row >= ROW
    }

    /// A companion begins its turn.
    pub(super) fn begin(&self) {
        self.found.store(0, Ordering::Relaxed);
    }

    /// Brings the calling companion to where its client is. `false` where that cannot be told.
    pub(super) fn go(&self, gap: Option<Duration>) -> bool {
        let since = self.since.load(Ordering::Relaxed).saturating_add(1);
        let patience = self.patience.load(Ordering::Relaxed);
        let found = self.found.load(Ordering::Relaxed);
        let late = gap.is_none_or(|gap| gap > NEAR);
        if found != 0 && since < AGAIN && !(late && since > patience) {
            self.since.store(since, Ordering::Relaxed);
            return true;
        }
        self.since.store(0, Ordering::Relaxed);
        let Some(cpu) = processor(self.client.load(Ordering::Relaxed)) else {
            return false;
        };
        let patience = match found == cpu + 1 {
            true => (patience * 2).clamp(1, AGAIN),
            false => 0,
        };
        self.patience.store(patience, Ordering::Relaxed);
        self.found.store(cpu + 1, Ordering::Relaxed);
        sched::bind(cpu as usize)
    }
}

/// The processor that a thread ran on last, as proc(5) tells it.
fn processor(pid: u32) -> Option<u32> {
    let mut path = [0; 32];
    let mut rest = &mut path[..];
    write!(rest, "/proc/{pid}/stat").ok()?;
    let unused = rest.len();
    let path = std::str::from_utf8(&path[..path.len() - unused]).ok()?;
    let mut text = [0; 1024];
    let len = File::open(path).ok()?.read(&mut text).ok()?;
    of_stat(&text[..len])
}

/// Field 39 of `/proc/PID/stat`. The second one, the name in parentheses, may hold anything.
fn of_stat(text: &[u8]) -> Option<u32> {
    let name_end = text.iter().rposition(|&byte| byte == b')')?;
    let field = text[name_end + 1..]
        .split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty())
        .nth(39 - 3)?;
    std::str::from_utf8(field).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Follow, HEAVY, HEAVY_ROW, PAUSE, ROW, of_stat, processor};

    const SOON: Option<Duration> = Some(Duration::from_micros(10));

    fn in_a_row(pid: u32) -> Follow {
        let follow = Follow::default();
        for _ in 1..ROW {
            assert!(!follow.note(pid, 0, SOON));
        }
        assert!(follow.note(pid, 0, SOON));
        follow
    }

    #[test]
    fn a_name_with_parentheses_and_spaces_is_passed_over() {
        let mut text = b"7 (a) b) S".to_vec();
        for field in 4..=52 {
            text.extend_from_slice(format!(" {field}").as_bytes());
        }
        assert_eq!(of_stat(&text), Some(39));
        assert_eq!(of_stat(b"7 (a) S 1 2"), None);
        assert_eq!(of_stat(b""), None);
        assert!(processor(std::process::id()).is_some());
    }

    #[test]
    fn a_row_ends_with_another_client_or_a_pause_or_much_data() {
        assert!(!in_a_row(7).note(8, 0, SOON));
        assert!(!in_a_row(7).note(7, 0, Some(PAUSE * 2)));
        let follow = in_a_row(7);
        for _ in 1..HEAVY_ROW {
            assert!(follow.note(7, HEAVY, SOON));
        }
        assert!(!follow.note(7, HEAVY, SOON));
    }

    #[test]
    fn requests_of_nobody_do_not_end_a_row() {
        assert!(in_a_row(7).note(0, 0, SOON));
    }
}
