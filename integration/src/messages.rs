//! Messages: held back until the mount answers.
//!
//! A mount that fails says so in one line; what the layers below have logged on the way would be a
//! second one that says the same. So messages wait until it is known whether the mount succeeds,
//! but for those who asked for them with `-d` or `RUST_LOG`.

use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

use env_logger::{Builder, Env, Target};

/// Messages that wait; `None` once they go out at once.
static HELD: Mutex<Option<Vec<u8>>> = Mutex::new(None);

struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match HELD.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(held) => {
                held.extend_from_slice(bytes);
                Ok(bytes.len())
            }
            None => io::stderr().write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// Starts the log.
pub fn start(debug: bool) {
    // When the mount goes away first, fuser warns that it cannot unmount it.
    let level = if debug { "debug" } else { "warn,fuser=error" };
    if !debug && std::env::var_os("RUST_LOG").is_none() {
        *HELD.lock().unwrap_or_else(PoisonError::into_inner) = Some(Vec::new());
    }
    Builder::from_env(Env::default().default_filter_or(level))
        .target(Target::Pipe(Box::new(Stderr)))
        .init();
}

/// Starts the log for those who mount what is broken on purpose: nothing is told unless asked for.
pub fn start_quiet() {
    Builder::from_env(Env::default().default_filter_or("off")).init();
}

/// Lets go of what was held back: the mount answers.
pub fn release() {
    let held = HELD
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take()
        .unwrap_or_default();
    // Standard error may be closed; there is no other place to say so.
    drop(io::stderr().write_all(&held));
}
