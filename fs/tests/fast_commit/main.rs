//! Fast commits that this machine's kernel left: made by operations on a loop mount that is shut
//! down without a flush of its log, replayed by ours, judged by e2fsck, by what the files were, and
//! by what the kernel's own replay makes of the same image.
#![expect(clippy::unwrap_used, reason = "a test ends with a panic")]
#![expect(unsafe_code, reason = "the ioctl that shuts a file system down")]

mod cases;
mod cuts;
mod damage;
mod kernel;
mod list;
mod replay;
mod work;
