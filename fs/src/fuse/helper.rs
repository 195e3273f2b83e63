//! Mounting through `fusermount3`, for users who may not call mount(2).
//!
//! `fuser` can do this, too, but then answers EACCES to all requests that do not come from the user
//! who mounted. The kernel keeps other users away itself where `allow_other` is missing, while its
//! own threads, which have no user and bring home what the page cache holds (times above all), get
//! through: their requests must be answered.
//!
//! Protocol: libfuse `util/fusermount.c`. The helper finds the number of a socket in an environment
//! variable, and sends the descriptor of `/dev/fuse` over it.

use std::ffi::OsString;
use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::io::FdFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use super::FuseConfig;

const SOCKET_ENV: &str = "_FUSE_COMMFD";
const PROGRAM_ENV: &str = "FUSERMOUNT_PATH";
const PROGRAM: &str = "fusermount3";

fn program() -> OsString {
    std::env::var_os(PROGRAM_ENV).unwrap_or_else(|| PROGRAM.into())
}

/// Mounts, and gives the connection to the kernel.
///
/// # Errors
/// What the helper says.
pub(super) fn mount(config: &FuseConfig) -> io::Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair()?;
    rustix::io::fcntl_setfd(&theirs, FdFlags::empty())?;
    let mut child = Command::new(program())
        .arg("-o")
        .arg(words(config))
        .arg("--")
        .arg(&config.mountpoint)
        .env(SOCKET_ENV, theirs.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    drop(theirs);
    let received = receive(&ours);
    let mut said = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        stderr.read_to_string(&mut said)?;
    }
    let status = child.wait()?;
    match received? {
        Some(fd) if status.success() => Ok(fd),
        _ if said.trim().is_empty() => Err(io::Error::other(format!("{PROGRAM}: {status}"))),
        _ => Err(io::Error::other(said.trim().to_owned())),
    }
}

/// Unmounts as soon as nobody uses it any more.
///
/// # Errors
/// What the helper says.
pub(super) fn unmount(mountpoint: &Path) -> io::Result<()> {
    let output = Command::new(program())
        .args(["-u", "-z", "--"])
        .arg(mountpoint)
        .stdin(Stdio::null())
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(said.trim().to_owned()))
}

fn receive(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    loop {
        let mut parts = [IoSliceMut::new(&mut byte)];
        match rustix::net::recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(_) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok(fd)
}

fn words(config: &FuseConfig) -> String {
    let either = |on, yes, no| if on { yes } else { no };
    let mut words = format!(
        "fsname={},default_permissions,{},{},{},{}",
        escape(&config.fsname),
        either(config.read_only, "ro", "rw"),
        either(config.suid, "suid", "nosuid"),
        either(config.dev, "dev", "nodev"),
        either(config.exec, "exec", "noexec"),
    );
    if let Some(subtype) = &config.subtype {
        words.push_str(",subtype=");
        words.push_str(&escape(subtype));
    }
    if config.noatime {
        words.push_str(",noatime");
    }
    words
}

/// Commas separate options.
fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace(',', "\\,")
}

#[cfg(test)]
mod tests {
    use super::{FuseConfig, words};

    #[test]
    fn a_comma_in_a_name_is_no_option() {
        let config = FuseConfig {
            fsname: "a,suid".into(),
            subtype: Some("b".into()),
            read_only: true,
            ..FuseConfig::default()
        };
        let want = "fsname=a\\,suid,default_permissions,ro,nosuid,nodev,exec,subtype=b";
        assert_eq!(words(&config), want);
    }
}
