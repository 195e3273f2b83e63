//! Each request of the protocol, turned into an operation.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use blockstack::workqueue::Workqueue;
use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, Notifier, OpenFlags,
    RenameFlags as FuseRenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::FuseConfig;
use super::attrs::{
    file_attr, ino, kind_of_entry, kind_of_mode, negative, node, set_time, timespec,
};
use super::errno::errno;
use super::gate::Gate;
use super::lost::Lost;
use crate::core::Fs;
use crate::data::{MAX_IO, Origin};
use crate::dir::Emit;
use crate::error::{FsError, FsResult};
use crate::inode::map::Seek;
use crate::ops::space::FallocMode;
use crate::ops::{Attr, Caller, NAME_MAX, NewNode, RenameFlags, SetAttr, Shutdown, ioctl::FsXattr};
use crate::xattr::XattrMode;

/// Nobody else changes the image.
const FOREVER: Duration = Duration::from_secs(1 << 30);

const FS_IOC_GETFLAGS: u32 = 0x8008_6601;
const FS_IOC_SETFLAGS: u32 = 0x4008_6602;
const FS_IOC_GETVERSION: u32 = 0x8008_7601;
const FS_IOC_SETVERSION: u32 = 0x4008_7602;
const FS_IOC_FSGETXATTR: u32 = 0x801c_581f;
const FS_IOC_FSSETXATTR: u32 = 0x401c_5820;
const FITRIM: u32 = 0xc018_5879;
/// Also `XFS_IOC_GOINGDOWN` and `EXT4_IOC_SHUTDOWN`.
const FS_IOC_SHUTDOWN: u32 = 0x8004_587d;

/// A search for data or a hole.
///
/// The kernel asks without writing back first, so data may stand in its page cache where the disk
/// has a hole. It is told to drop the file's pages, which writes the changed ones: these writes are
/// requests that somebody else must answer meanwhile, so this is not done by a thread that reads
/// requests.
struct SeekJob {
    node: INodeNo,
    offset: u64,
    what: Seek,
    reply: ReplyLseek,
}

/// Set when the connection is there.
type Notify = Arc<OnceLock<Notifier>>;

/// What `fuser` calls.
pub(super) struct Requests {
    fs: Arc<Fs>,
    gate: Arc<Gate>,
    read_only: bool,
    notify: Notify,
    seeks: Workqueue<SeekJob>,
    lost: Arc<Lost>,
}

fn seek(fs: &Arc<Fs>, notify: &Notify, job: SeekJob) {
    let written = match notify.get() {
        Some(notifier) => notifier.inval_inode(job.node, 0, 0),
        None => Ok(()),
    };
    if let Err(error) = written {
        // The kernel does not have the inode any more, so it has no pages of it either.
        if error.kind() != io::ErrorKind::NotFound {
            log::error!(
                "node {}: the page cache cannot be written back: {error}",
                job.node.0
            );
            return job.reply.error(Errno::EIO);
        }
    }
    let found = fs
        .iget(ino(job.node))
        .and_then(|inode| fs.seek(&inode, job.offset, job.what));
    match found {
        Ok(at) => job.reply.offset(at as i64),
        Err(error) => job.reply.error(code(error)),
    }
}

/// A request being handled.
struct Turn<'a>(&'a Gate);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

fn code(error: FsError) -> Errno {
    Errno::from_i32(errno(error))
}

fn caller(request: &Request) -> Caller {
    Caller {
        uid: request.uid(),
        gid: request.gid(),
        thread: request.pid(),
        keeps_times: true,
    }
}

/// Whether the caller may keep a set-group-id bit of that group: one of its own, or root.
fn is_in_group(request: &Request, gid: u32) -> bool {
    if request.uid() == 0 || request.gid() == gid {
        return true;
    }
    // FUSE sends no further groups.
    let status = std::fs::read_to_string(format!("/proc/{}/status", request.pid()));
    let status = status.unwrap_or_default();
    let groups = status.lines().find_map(|line| line.strip_prefix("Groups:"));
    let wanted = gid.to_string();
    groups.is_some_and(|groups| groups.split_whitespace().any(|group| group == wanted))
}

fn empty(reply: ReplyEmpty, result: FsResult) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(code(error)),
    }
}

fn xattr_answer(reply: ReplyXattr, size: u32, result: FsResult<Vec<u8>>) {
    match result {
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() > size as usize => reply.error(Errno::ERANGE),
        Ok(value) => reply.data(&value),
        Err(error) => reply.error(code(error)),
    }
}

impl Requests {
    pub(super) fn new(fs: Arc<Fs>, config: &FuseConfig) -> io::Result<Self> {
        let notify = Notify::default();
        let (to_fs, to_notify) = (fs.clone(), notify.clone());
        let seeks = Workqueue::new("seek", 2, move |job| seek(&to_fs, &to_notify, job))?;
        let lost = Lost::new(notify.clone())?;
        fs.orphans.expect_farewells();
        Ok(Self {
            fs,
            lost,
            gate: Gate::new(config.loops, config.threads()),
            read_only: config.read_only,
            notify,
            seeks,
        })
    }

    pub(super) fn notify(&self) -> Notify {
        self.notify.clone()
    }

    pub(super) fn gate(&self) -> Arc<Gate> {
        self.gate.clone()
    }

    fn turn(&self, request: &Request) -> Turn<'_> {
        self.turn_with(request, 0)
    }

    /// A turn for a request that carries `len` bytes of data.
    fn turn_with(&self, request: &Request, len: usize) -> Turn<'_> {
        self.gate.enter(request.pid(), len);
        Turn(&self.gate)
    }

    /// How long the kernel may keep attributes.
    fn lifetime(&self, request: &Request, attr: &Attr) -> &'static Duration {
        if attr.unlinker == 0 {
            return &FOREVER;
        }
        if attr.unlinker != request.pid() {
            return &Duration::ZERO;
        }
        self.fs.settle(attr.ino, attr.unlinker);
        &FOREVER
    }

    fn entry(&self, request: &Request, reply: ReplyEntry, result: FsResult<Attr>) {
        match result {
            Ok(attr) => {
                let generation = Generation(attr.generation.into());
                let mut shown = file_attr(&attr, self.fs.geo.block_size);
                // `fuser` takes the node id from here.
                shown.ino = node(attr.ino);
                reply.entry_with_ttls(self.lifetime(request, &attr), &FOREVER, &shown, generation);
            }
            Err(error) => reply.error(code(error)),
        }
    }

    fn attr(&self, request: &Request, reply: ReplyAttr, result: FsResult<Attr>) {
        match result {
            Ok(attr) => {
                let lifetime = self.lifetime(request, &attr);
                reply.attr(lifetime, &file_attr(&attr, self.fs.geo.block_size));
            }
            Err(error) => reply.error(code(error)),
        }
    }

    /// A request will change the content of a file, and the kernel does not say whether that clears
    /// bits of its mode.
    fn remove_privileges(&self, request: &Request, node: INodeNo) -> FsResult {
        match request.uid() {
            0 => Ok(()),
            _ => self.kill_privileges(request, node),
        }
    }

    /// Clears the bits of a file's mode that a change of its content clears. The kernel does not
    /// expect that, and must hear of it.
    fn kill_privileges(&self, request: &Request, node: INodeNo) -> FsResult {
        let in_group = |gid| is_in_group(request, gid);
        if self.fs.remove_privileges(ino(node), in_group)?
            && let Some(notifier) = self.notify.get()
            && let Err(error) = notifier.inval_inode(node, -1, 0)
        {
            log::debug!("node {}: the mode stays with the kernel: {error}", node.0);
        }
        Ok(())
    }

    fn run_ioctl(&self, uid: u32, ino: u32, cmd: u32, input: &[u8]) -> FsResult<Vec<u8>> {
        let admin = || {
            if uid == 0 {
                Ok(())
            } else {
                Err(FsError::NotPermitted)
            }
        };
        let long = |at: usize| -> FsResult<u64> {
            let bytes = input.get(at..at + 8).ok_or(FsError::Invalid)?;
            bytes
                .try_into()
                .map(u64::from_le_bytes)
                .or(Err(FsError::Invalid))
        };
        let word = |at: usize| -> FsResult<u32> {
            let bytes = input.get(at..at + 4).ok_or(FsError::Invalid)?;
            bytes
                .try_into()
                .map(u32::from_le_bytes)
                .or(Err(FsError::Invalid))
        };
        match cmd {
            FS_IOC_GETFLAGS => Ok(self.fs.flags(ino)?.to_le_bytes().to_vec()),
            FS_IOC_SETFLAGS => self.fs.set_flags(ino, word(0)?).map(|()| Vec::new()),
            FS_IOC_GETVERSION => Ok(self.fs.generation(ino)?.to_le_bytes().to_vec()),
            FS_IOC_SETVERSION => self.fs.set_generation(ino, word(0)?).map(|()| Vec::new()),
            FS_IOC_FSGETXATTR => {
                let set = self.fs.fsxattr(ino)?;
                let mut out = vec![0; 28];
                out[..4].copy_from_slice(&set.xflags.to_le_bytes());
                out[12..16].copy_from_slice(&set.projid.to_le_bytes());
                Ok(out)
            }
            FS_IOC_FSSETXATTR => {
                let set = FsXattr {
                    xflags: word(0)?,
                    projid: word(12)?,
                };
                self.fs.set_fsxattr(ino, set).map(|()| Vec::new())
            }
            FITRIM => {
                admin()?;
                let trimmed = self.fs.trim(long(0)?, long(8)?, long(16)?)?;
                let mut out = input[..24].to_vec();
                out[8..16].copy_from_slice(&trimmed.to_le_bytes());
                Ok(out)
            }
            FS_IOC_SHUTDOWN => {
                admin()?;
                // By the number's direction its argument is an answer, so FUSE does not send which
                // of the three ways is meant; nor does it send `sync`, so what that has promised
                // may not be durable yet.
                self.fs.shut_down(Shutdown::Everything).map(|()| vec![0; 4])
            }
            _ => Err(FsError::NotTty),
        }
    }
}

impl Filesystem for Requests {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let mut wanted = vec![
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_NO_OPEN_SUPPORT,
            InitFlags::FUSE_HAS_IOCTL_DIR,
            InitFlags::FUSE_DONT_MASK,
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
            InitFlags::FUSE_EXPORT_SUPPORT,
        ];
        if !self.read_only {
            wanted.push(InitFlags::FUSE_WRITEBACK_CACHE);
        }
        if self.fs.opts.acl {
            wanted.push(InitFlags::FUSE_POSIX_ACL);
        }
        for flag in wanted {
            if let Err(missing) = config.add_capabilities(flag) {
                log::debug!("the kernel's FUSE lacks {missing:?}");
            }
        }
        let granularity = match self.fs.geo.inode_size {
            0..=128 => Duration::from_secs(1),
            _ => Duration::from_nanos(1),
        };
        if config.set_time_granularity(granularity).is_err() {
            log::debug!("the kernel keeps times of its own granularity");
        }
        // Each of these answers with the nearest value the kernel takes.
        if let Err(nearest) = config.set_max_write(MAX_IO) {
            config.set_max_write(nearest).ok();
        }
        if let Err(nearest) = config.set_max_readahead(MAX_IO) {
            config.set_max_readahead(nearest).ok();
        }
        config.set_max_background(64).ok();
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let _turn = self.turn(request);
        let found = match name.as_bytes() {
            // The kernel asks for a file by its number alone, from a handle of it.
            b"." => match self.fs.lookup_number(ino(parent)) {
                Ok(None) => Err(FsError::Stale),
                found => found,
            },
            name => self.fs.lookup(ino(parent), name),
        };
        match found {
            Ok(None) => reply.entry(&FOREVER, &negative(), Generation(0)),
            Ok(Some(attr)) => self.entry(request, reply, Ok(attr)),
            Err(error) => reply.error(code(error)),
        }
    }

    fn forget(&self, _: &Request, node: INodeNo, nlookup: u64) {
        // Several come in one request, and nobody waits for them: no turn of its own for each.
        self.lost.forget(node);
        self.fs.forget(ino(node), nlookup);
        self.gate.after_forget();
    }

    fn getattr(
        &self,
        request: &Request,
        node: INodeNo,
        file: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        let _turn = self.turn(request);
        if file.is_some() && self.lost.take(node) {
            return reply.error(code(FsError::NoSpace));
        }
        self.attr(request, reply, self.fs.getattr(ino(node)));
    }

    fn setattr(
        &self,
        request: &Request,
        node: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        ctime: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let _turn = self.turn(request);
        let set = SetAttr {
            mode: mode.map(|mode| mode as u16),
            uid,
            gid,
            size,
            atime: atime.map(set_time),
            mtime: mtime.map(set_time),
            ctime: ctime.map(timespec),
        };
        self.attr(
            request,
            reply,
            self.fs.setattr(ino(node), &set, &caller(request)),
        );
    }

    fn readlink(&self, request: &Request, node: INodeNo, reply: ReplyData) {
        let _turn = self.turn(request);
        match self.fs.readlink(ino(node)) {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(code(error)),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let _turn = self.turn(request);
        let node = NewNode::Node {
            mode: mode as u16,
            rdev,
        };
        let made = self
            .fs
            .create(ino(parent), name.as_bytes(), node, umask, &caller(request));
        self.entry(request, reply, made);
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let _turn = self.turn(request);
        let node = NewNode::Directory { mode: mode as u16 };
        let made = self
            .fs
            .create(ino(parent), name.as_bytes(), node, umask, &caller(request));
        self.entry(request, reply, made);
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _turn = self.turn(request);
        let caller = caller(request);
        empty(reply, self.fs.unlink(ino(parent), name.as_bytes(), &caller));
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _turn = self.turn(request);
        let caller = caller(request);
        empty(reply, self.fs.rmdir(ino(parent), name.as_bytes(), &caller));
    }

    fn symlink(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let _turn = self.turn(request);
        let node = NewNode::Symlink {
            target: target.as_os_str().as_bytes(),
        };
        let made = self
            .fs
            .create(ino(parent), name.as_bytes(), node, 0, &caller(request));
        self.entry(request, reply, made);
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: FuseRenameFlags,
        reply: ReplyEmpty,
    ) {
        let _turn = self.turn(request);
        let flags = RenameFlags::from_bits_retain(flags.bits());
        let result = self.fs.rename(
            ino(parent),
            name.as_bytes(),
            ino(new_parent),
            new_name.as_bytes(),
            flags,
            &caller(request),
        );
        empty(reply, result);
    }

    fn link(
        &self,
        request: &Request,
        node: INodeNo,
        new_parent: INodeNo,
        new_name: &OsStr,
        reply: ReplyEntry,
    ) {
        let _turn = self.turn(request);
        self.entry(
            request,
            reply,
            self.fs
                .link(ino(node), ino(new_parent), new_name.as_bytes()),
        );
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // From now on the kernel opens and closes by itself.
        reply.error(Errno::ENOSYS);
    }

    fn opendir(&self, request: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // Not as for files: a kernel that opens by itself keeps listings, and takes what a listing
        // of before a change brings late into the one of after it.
        let _turn = self.turn(request);
        reply.opened(FileHandle(0), FopenFlags::empty());
    }

    fn create(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        // From now on the kernel sends MKNOD, whose files need no release.
        reply.error(Errno::ENOSYS);
    }

    fn read(
        &self,
        request: &Request,
        node: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let _turn = self.turn_with(request, size as usize);
        let inode = match self.fs.iget(ino(node)) {
            Ok(inode) => inode,
            Err(error) => return reply.error(code(error)),
        };
        let answer = move |result: FsResult<&[u8]>| match result {
            Ok(bytes) => reply.data(bytes),
            Err(error) => reply.error(code(error)),
        };
        self.fs.read(&inode, offset, size, Box::new(answer));
    }

    fn write(
        &self,
        request: &Request,
        node: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let _turn = self.turn_with(request, data.len());
        let inode = match self.fs.iget(ino(node)) {
            Ok(inode) => inode,
            Err(error) => return reply.error(code(error)),
        };
        let origin = if write_flags.contains(WriteFlags::FUSE_WRITE_CACHE) {
            Origin::PageCache
        } else {
            let kill_priv = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
            if kill_priv && let Err(error) = self.kill_privileges(request, node) {
                return reply.error(code(error));
            }
            Origin::Direct { kill_priv }
        };
        let lost = (origin == Origin::PageCache).then(|| self.lost.clone());
        let answer = move |result: FsResult<u32>| match result {
            Ok(written) => reply.written(written),
            Err(error) => {
                reply.error(code(error));
                if let (FsError::NoSpace, Some(lost)) = (error, lost) {
                    lost.note(node);
                }
            }
        };
        self.fs.write(
            &inode,
            offset,
            data,
            origin,
            &caller(request),
            Box::new(answer),
        );
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // Nothing happens at a close; the kernel need not ask again.
        reply.error(Errno::ENOSYS);
    }

    fn fsync(
        &self,
        request: &Request,
        node: INodeNo,
        _: FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        let _turn = self.turn(request);
        let result = self
            .fs
            .iget(ino(node))
            .and_then(|inode| self.fs.fsync(&inode, datasync));
        empty(reply, result);
    }

    fn readdir(
        &self,
        request: &Request,
        node_id: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let _turn = self.turn(request);
        let result = self.fs.readdir(ino(node_id), offset, &mut |entry| {
            let kind = kind_of_entry(entry.ftype).unwrap_or_else(|| {
                // An image without file types in its directories: the inode knows.
                match self.fs.iget_named(entry.ino) {
                    Ok(inode) => kind_of_mode(inode.type_bits),
                    Err(_logged) => fuser::FileType::RegularFile,
                }
            });
            let name = OsStr::from_bytes(entry.name);
            if reply.add(INodeNo(entry.ino.into()), entry.next_cookie, kind, name) {
                Emit::Full
            } else {
                Emit::More
            }
        });
        match result {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(code(error)),
        }
    }

    fn readdirplus(
        &self,
        request: &Request,
        node_id: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let _turn = self.turn(request);
        let result = self
            .fs
            .readdirplus(ino(node_id), offset, &mut |entry, attr| {
                let name = OsStr::from_bytes(entry.name);
                let (attr, generation, lifetime) = match attr {
                    Some(attr) => (
                        file_attr(attr, self.fs.geo.block_size),
                        Generation(attr.generation.into()),
                        self.lifetime(request, attr),
                    ),
                    // "." and "..": the kernel takes only number and name.
                    None => {
                        let mut attr = negative();
                        attr.kind = fuser::FileType::Directory;
                        attr.ino = INodeNo(entry.ino.into());
                        (attr, Generation(0), &FOREVER)
                    }
                };
                let full = reply.add(
                    attr.ino,
                    entry.next_cookie,
                    name,
                    lifetime,
                    &attr,
                    generation,
                );
                if full { Emit::Full } else { Emit::More }
            });
        match result {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(code(error)),
        }
    }

    fn fsyncdir(
        &self,
        request: &Request,
        node: INodeNo,
        _: FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        let _turn = self.turn(request);
        let result = self
            .fs
            .iget(ino(node))
            .and_then(|inode| self.fs.fsync(&inode, datasync));
        empty(reply, result);
    }

    fn statfs(&self, request: &Request, _: INodeNo, reply: ReplyStatfs) {
        let _turn = self.turn(request);
        let stat = self.fs.statfs();
        reply.statfs(
            stat.blocks,
            stat.bfree,
            stat.bavail,
            stat.files,
            stat.ffree,
            stat.bsize,
            NAME_MAX as u32,
            stat.bsize,
        );
    }

    fn setxattr(
        &self,
        request: &Request,
        node: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _: u32,
        reply: ReplyEmpty,
    ) {
        let _turn = self.turn(request);
        let mode = match flags {
            0 => XattrMode::Any,
            libc::XATTR_CREATE => XattrMode::Create,
            libc::XATTR_REPLACE => XattrMode::Replace,
            _ => return reply.error(Errno::EINVAL),
        };
        let name = name.as_bytes();
        let set = self.fs.setxattr(ino(node), name, Some(value), mode);
        let set = set.and_then(|()| {
            // As the kernel's `posix_acl_update_mode`.
            if name == b"system.posix_acl_access" {
                let in_group = |gid| is_in_group(request, gid);
                self.fs.drop_foreign_setgid(ino(node), in_group).map(drop)
            } else {
                Ok(())
            }
        });
        empty(reply, set);
    }

    fn getxattr(
        &self,
        request: &Request,
        node: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        let _turn = self.turn(request);
        xattr_answer(reply, size, self.fs.getxattr(ino(node), name.as_bytes()));
    }

    fn listxattr(&self, request: &Request, node: INodeNo, size: u32, reply: ReplyXattr) {
        let _turn = self.turn(request);
        let mut names = self.fs.listxattr(ino(node));
        if request.uid() != 0 {
            // As the kernel's own file systems do: trusted attributes are for root.
            names = names.map(|names| {
                let shown = names.split_inclusive(|&byte| byte == 0);
                shown
                    .filter(|name| !name.starts_with(b"trusted."))
                    .flatten()
                    .copied()
                    .collect()
            });
        }
        xattr_answer(reply, size, names);
    }

    fn removexattr(&self, request: &Request, node: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _turn = self.turn(request);
        let result = self
            .fs
            .setxattr(ino(node), name.as_bytes(), None, XattrMode::Replace);
        empty(reply, result);
    }

    fn ioctl(
        &self,
        request: &Request,
        node: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        cmd: u32,
        in_data: &[u8],
        out_size: u32,
        reply: ReplyIoctl,
    ) {
        let _turn = self.turn(request);
        match self.run_ioctl(request.uid(), ino(node), cmd, in_data) {
            Ok(out) => reply.ioctl(0, &out[..out.len().min(out_size as usize)]),
            Err(error) => reply.error(code(error)),
        }
    }

    fn fallocate(
        &self,
        request: &Request,
        node: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let _turn = self.turn(request);
        let result = FallocMode::from_bits(mode)
            .ok_or(FsError::NotSupported)
            .and_then(|mode| {
                let inode = self.fs.iget(ino(node))?;
                self.remove_privileges(request, node)?;
                self.fs
                    .fallocate(&inode, mode, offset, length, &caller(request))
            });
        empty(reply, result);
    }

    fn lseek(
        &self,
        request: &Request,
        node: INodeNo,
        _: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let _turn = self.turn(request);
        let what = match whence {
            libc::SEEK_DATA => Seek::Data,
            libc::SEEK_HOLE => Seek::Hole,
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(offset) = u64::try_from(offset) else {
            return reply.error(Errno::ENXIO);
        };
        self.seeks.queue(SeekJob {
            node,
            offset,
            what,
            reply,
        });
    }

    fn copy_file_range(
        &self,
        request: &Request,
        ino_in: INodeNo,
        _: FileHandle,
        offset_in: u64,
        ino_out: INodeNo,
        _: FileHandle,
        offset_out: u64,
        len: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let _turn = self.turn(request);
        let result = (|| {
            let from = self.fs.iget(ino(ino_in))?;
            let to = self.fs.iget(ino(ino_out))?;
            // The answer counts in 32 bits.
            let len = len.min(1 << 30);
            self.remove_privileges(request, ino_out)?;
            self.fs
                .copy_range(&from, offset_in, &to, offset_out, len, &caller(request))
        })();
        match result {
            Ok(copied) => reply.written(copied as u32),
            Err(error) => reply.error(code(error)),
        }
    }
}
