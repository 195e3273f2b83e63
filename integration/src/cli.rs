//! The command line.

use std::path::PathBuf;

use clap::{ArgAction, Parser};

use crate::options::{OptionError, Options};

const OPTIONS_HELP: &str = "\
Options after -o, separated by commas:
  ro, rw                   refuse changes; take them (default)
  offset=BYTES             where in IMAGE the file system starts (a partition), a multiple of 512
  relatime, strictatime, noatime
                           when reading updates access times (default: relatime)
  lazytime                 times alone are written with the next change, by fsync, at unmount
  sync                     every change is on disk before the call returns
  commit=SECONDS           longest time between commits of the journal (default: 5)
  errors=continue|remount-ro|panic
                           what damage found on the way does (default: as the superblock says)
  data=ordered|journal|writeback
                           what becomes of data at a commit (default: as the superblock says):
                           it was on disk before, it goes through the journal, it is not cared for
  noload, norecovery       do not replay the journal; only with ro
  nobarrier, barrier=0|1   do not flush the disk at commits; after a power cut all may be lost
  discard                  give freed blocks back to IMAGE (its file becomes sparse again)
  noacl, nouser_xattr      without POSIX ACLs, without attributes of the user name space
  cache_size=N[kmg]        memory for metadata (default: 32m)
  allow_other, allow_root  who else may look; a user needs user_allow_other in /etc/fuse.conf
  (no)suid, (no)dev, (no)exec
                           as for mount(8); the default is what is allowed: all for root, no
                           suid and dev for others
  fsname=NAME, subtype=NAME
                           source and type that findmnt shows (default: IMAGE, fusefs-stack)
  loops=N                  threads that read requests
  lockfile=PATH            a file that exists, and is locked, until everything is on disk
  logfile=PATH             messages after the start go there; else nowhere, without -f
default_permissions is always on. nodelalloc, block_validity, nofail, _netdev, x-* and others that
change nothing here are taken and ignored.

To unmount: fusermount3 -u MOUNTPOINT, umount, or SIGINT, SIGTERM, SIGHUP to the process. When the
process has ended, everything is in IMAGE.

Exit codes: 0 mounted (with -f: unmounted), 1 wrong command line, 32 mount or unmount failed.

fusefs-stack check IMAGE looks for faults and changes nothing (fusefs-stack check --help).
fusefs-stack crashtest IMAGE tries what power cuts leave (fusefs-stack crashtest --help).

Example:
  mke2fs -t ext4 disk.img 1G && mkdir -p mnt && fusefs-stack mnt disk.img";

/// Mounts an ext2, ext3 or ext4 image or block device, read-write and journalled, without root.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "fusefs-stack",
    version,
    disable_version_flag = true,
    after_help = OPTIONS_HELP,
    override_usage = "fusefs-stack [-o OPTIONS] [-f] [-d] MOUNTPOINT IMAGE"
)]
pub struct Args {
    /// The directory to mount on (both orders are taken: the directory is the mountpoint)
    #[arg(value_name = "MOUNTPOINT")]
    pub first: PathBuf,
    /// The image file or block device
    #[arg(value_name = "IMAGE")]
    pub second: PathBuf,
    /// Mount options, see below; may be repeated
    #[arg(short = 'o', value_name = "OPTIONS", action = ArgAction::Append)]
    pub options: Vec<String>,
    /// Stay in the foreground
    #[arg(short = 'f')]
    pub foreground: bool,
    /// Log what is being done to standard error; implies -f
    #[arg(short = 'd')]
    pub debug: bool,
    /// One thread reads requests; as -o loops=1
    #[arg(short = 's')]
    pub single: bool,
    /// Taken for mount(8), changes nothing
    #[arg(short = 'n', hide = true)]
    pub no_mtab: bool,
    /// Taken for mount(8), changes nothing
    #[arg(short = 'v', hide = true)]
    pub verbose: bool,
    /// Taken for mount(8), changes nothing
    #[arg(short = 't', value_name = "TYPE", hide = true)]
    pub fs_type: Option<String>,
    /// Print the version
    #[arg(short = 'V', long = "version", action = ArgAction::Version)]
    pub version: Option<bool>,
    /// Set by the program itself when it starts its second half
    #[arg(long, hide = true)]
    pub serve_detached: bool,
}

/// What the command line asks for.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Stays in the foreground.
    pub foreground: bool,
    /// Logs what is being done.
    pub debug: bool,
    /// Mount options.
    pub options: Options,
}

impl Plan {
    /// Checks all options.
    ///
    /// # Errors
    /// The first option that is wrong.
    pub fn new(args: &Args) -> Result<Self, OptionError> {
        let mut options = Options::parse(&args.options)?;
        if args.single {
            options.loops = Some(1);
        }
        Ok(Self {
            foreground: args.foreground || args.debug,
            debug: args.debug,
            options,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(words: &[&str]) -> Result<Args, clap::Error> {
        Args::try_parse_from([&["fusefs-stack"], words].concat())
    }

    #[test]
    fn definition_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn options_may_stand_anywhere() {
        let args = parse(&["-o", "ro", "mnt", "img", "-o", "sync,noatime", "-n", "-v"]).unwrap();
        assert_eq!(args.options, ["ro", "sync,noatime"]);
        assert_eq!(args.first, PathBuf::from("mnt"));
        assert_eq!(args.second, PathBuf::from("img"));
    }

    #[test]
    fn debug_stays_in_the_foreground() {
        let args = parse(&["-d", "mnt", "img"]).unwrap();
        assert!(Plan::new(&args).unwrap().foreground);
    }

    #[test]
    fn an_argument_too_many_or_too_few_is_refused() {
        assert!(parse(&["mnt"]).is_err());
        assert!(parse(&["mnt", "img", "other"]).is_err());
    }
}
