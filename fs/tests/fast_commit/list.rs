//! All there is in a file system mounted in process.

use std::fmt::Write;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::mpsc::channel;

use fs::dir::Emit;
use fs::{Fs, FsError, FsResult};

fn content(fs: &Arc<Fs>, ino: u32, size: u64) -> FsResult<u64> {
    const PART: u64 = 1 << 20;
    let mut hasher = DefaultHasher::new();
    for at in (0..size).step_by(PART as usize) {
        let (sender, receiver) = channel();
        let reply = Box::new(move |res: Result<&[u8], FsError>| {
            sender.send(res.map(<[u8]>::to_vec)).unwrap();
        });
        let inode = fs.iget(ino)?;
        fs.read(&inode, at, PART.min(size - at) as u32, reply);
        receiver.recv().unwrap()?.hash(&mut hasher);
    }
    Ok(hasher.finish())
}

/// One line for each name: attributes, links of directories too, content.
pub fn list(fs: &Arc<Fs>) -> FsResult<Vec<String>> {
    let mut lines = Vec::new();
    visit(fs, "", 2, &mut lines)?;
    lines.sort();
    Ok(lines)
}

fn visit(fs: &Arc<Fs>, path: &str, ino: u32, lines: &mut Vec<String>) -> FsResult {
    let attr = fs.getattr(ino)?;
    let (mode, links, uid, rdev) = (attr.mode, attr.nlink, attr.uid, attr.rdev);
    let mut line = format!("{path} {mode:o} {links} {uid} {rdev}");
    for name in fs.listxattr(ino)?.split(|&byte| byte == 0) {
        if !name.is_empty() {
            let value = fs.getxattr(ino, name)?;
            write!(line, " {name:?}={value:?}").unwrap();
        }
    }
    let mut names = Vec::new();
    match u32::from(mode) & libc::S_IFMT {
        libc::S_IFREG => {
            let sum = content(fs, ino, attr.size)?;
            write!(line, " {} {sum:x} {:?}", attr.size, attr.mtime).unwrap();
        }
        libc::S_IFLNK => write!(line, " {:?}", fs.readlink(ino)?).unwrap(),
        libc::S_IFDIR => fs.readdir(ino, 0, &mut |entry| {
            if !matches!(entry.name, b"." | b"..") {
                let name = String::from_utf8_lossy(entry.name).to_string();
                names.push((format!("{path}/{name}"), entry.ino));
            }
            Emit::More
        })?,
        _ => {}
    }
    lines.push(line);
    for (path, ino) in names {
        visit(fs, &path, ino, lines)?;
    }
    Ok(())
}
