//! Built-in workloads.
//!
//! `b3` is the bounded space of the study "Finding Crash-Consistency Bugs with Bounded Black-Box
//! Crash Testing" (CrashMonkey and ACE): few files in few directories, one and then two operations
//! exhaustively, each followed by `fsync` or `fdatasync` of what it touched, or of the directory
//! above, or by `sync`; between the two also by nothing. Writes through mappings need a real mount.
//!
//! `storm` draws long sequences of all operations.

use super::model::{Kind, Model};
use super::random::Random;
use super::script::{Falloc, How, Op};

/// What a workload finds, and the script that runs on it.
#[derive(Clone, Debug)]
pub struct Workload {
    /// For messages.
    pub name: String,
    /// Operations.
    pub ops: Vec<Op>,
}

/// Operations that make what the workloads of `b3` find.
#[must_use]
pub fn b3_setup() -> Vec<Op> {
    read(
        "mkdir A\nmkdir B\ncreate foo\nwrite foo 0 8192\ncreate A/foo\nwrite A/foo 0 5000\n\
         setxattr foo user.old 20\ncreate A/far\nsync",
    )
}

/// All operations of `b3`; in most places some are refused, and left out.
fn b3_ops() -> Vec<Op> {
    read(
        "create bar\ncreate A/bar\nmkdir C\nmkdir A/C\nsymlink foo A/sym\nsymlink A/foo sym\n\
         link foo bar\nlink foo A/bar\nlink A/foo bar\nlink A/foo B/foo\nlink bar B/bar\n\
         rename foo bar\nrename foo A/foo\nrename A/foo foo\nrename A/foo B/foo\nrename bar foo\n\
         rename A/bar A/foo\nrename bar A/bar\nrename A C\nrename A B\nrename B A/B\n\
         rename A/C B\nexchange foo A/foo\nexchange A B\n\
         unlink foo\nunlink A/foo\nunlink bar\nunlink A/bar\nunlink B/foo\nunlink A/far\n\
         rmdir B\nrmdir C\nrmdir A/C\n\
         write foo 8192 4096\nwrite foo 0 4096\nwrite foo 3000 3000\nwrite foo 20000 5000\n\
         write A/foo 5000 4096\nwrite A/foo 0 3000\nwrite bar 0 5000\nwrite A/bar 0 9000\n\
         dwrite foo 8192 4096\ndwrite foo 0 4096\ndwrite bar 4096 4096\nswrite foo 8192 100\n\
         swrite A/foo 1000 9000\nswrite bar 0 4096\n\
         falloc foo 8192 8192\nfalloc-keep foo 8192 8192\npunch foo 0 4096\npunch foo 1000 6000\n\
         zero foo 4096 8192\nzero-keep foo 8192 8192\nfalloc bar 0 4096\nfalloc-keep A/foo 8192 4096\n\
         truncate foo 0\ntruncate foo 3000\ntruncate foo 30000\ntruncate A/foo 2500\n\
         truncate bar 5000\n\
         setxattr foo user.new 30\nsetxattr foo user.big 300\nsetxattr foo user.old 25\n\
         rmxattr foo user.old\nsetxattr A user.dir 40\nsetxattr bar user.new 200\n\
         chmod foo 600\nchmod A 700",
    )
}

fn read(text: &str) -> Vec<Op> {
    // Of this module only; the test below reads all of it.
    super::script::parse(text).unwrap_or_default()
}

/// Paths that an operation touches, and the directories they are in.
fn touched(op: &Op) -> (Vec<String>, Vec<String>) {
    let paths: Vec<&String> = match op {
        Op::Mkdir(path)
        | Op::Create(path)
        | Op::Unlink(path)
        | Op::Rmdir(path)
        | Op::Symlink { path, .. }
        | Op::Write { path, .. }
        | Op::Truncate { path, .. }
        | Op::Falloc { path, .. }
        | Op::SetXattr { path, .. }
        | Op::RemoveXattr { path, .. }
        | Op::Chmod { path, .. }
        | Op::Fsync(path)
        | Op::Fdatasync(path) => vec![path],
        Op::Link { from, to } | Op::Rename { from, to } | Op::Exchange { from, to } => {
            vec![from, to]
        }
        Op::Sync => Vec::new(),
    };
    let parent = |path: &&String| path.rsplit_once('/').map_or(".", |(dir, _)| dir).to_owned();
    let mut parents: Vec<String> = paths.iter().map(parent).collect();
    parents.sort();
    parents.dedup();
    (paths.into_iter().cloned().collect(), parents)
}

/// All ways to make the effect of an operation durable that `model`, which has it, allows.
fn persists(op: &Op, model: &Model, number: usize) -> Vec<Op> {
    let (paths, parents) = touched(op);
    let mut all = vec![Op::Sync];
    for path in paths {
        all.push(Op::Fsync(path.clone()));
        all.push(Op::Fdatasync(path));
    }
    all.extend(parents.into_iter().map(Op::Fsync));
    all.retain(|op| match op {
        // A symbolic link cannot be opened.
        Op::Fsync(path) | Op::Fdatasync(path) => model.kind(path).is_some_and(|kind| {
            matches!(kind, Kind::File | Kind::Dir { .. }) && model.clone().apply(op, number).is_ok()
        }),
        _ => true,
    });
    all
}

/// The sequences of `b3` with one operation, on what `start` has.
#[must_use]
pub fn b3_one(start: &Model) -> Vec<Workload> {
    let mut all = Vec::new();
    for (index, op) in b3_ops().into_iter().enumerate() {
        let mut model = start.clone();
        if model.apply(&op, 1).is_err() {
            continue;
        }
        for persist in persists(&op, &model, 2) {
            all.push(Workload {
                name: format!("b3-1/{index}: {op}; {persist}"),
                ops: vec![op.clone(), persist],
            });
        }
    }
    all
}

/// The sequences of `b3` with two operations, in an order drawn from the seed. The space is walked
/// as it is asked for.
pub fn b3_two(start: &Model, seed: u64) -> impl Iterator<Item = Workload> + Send + 'static {
    let start = start.clone();
    let ops = b3_ops();
    let mut pairs: Vec<(usize, usize)> = (0..ops.len())
        .flat_map(|first| (0..ops.len()).map(move |second| (first, second)))
        .collect();
    let mut random = Random::new(seed, 2);
    for index in 0..pairs.len() {
        let other = index + random.index(pairs.len() - index);
        pairs.swap(index, other);
    }
    pairs
        .into_iter()
        .flat_map(move |(first, second)| two(&start, &ops[first], &ops[second]))
}

fn two(start: &Model, first: &Op, second: &Op) -> Vec<Workload> {
    let mut model = start.clone();
    if model.apply(first, 1).is_err() {
        return Vec::new();
    }
    let mut between = vec![None];
    between.extend(persists(first, &model, 2).into_iter().map(Some));
    let mut all = Vec::new();
    for middle in between {
        let mut model = model.clone();
        if model.apply(second, 3).is_err() {
            continue;
        }
        for last in persists(second, &model, 4) {
            let mut ops = vec![first.clone()];
            ops.extend(middle.clone());
            ops.extend([second.clone(), last]);
            let words: Vec<String> = ops.iter().map(Op::to_string).collect();
            all.push(Workload {
                name: format!("b3-2: {}", words.join("; ")),
                ops,
            });
        }
    }
    all
}

/// The longest file of a storm, in bytes.
const MAX_SIZE: u64 = 120_000;

/// A long sequence drawn from a seed; `fallocs`: whether files can be preallocated and punched.
#[must_use]
pub fn storm(start: &Model, seed: u64, len: usize, fallocs: bool) -> Workload {
    let mut random = Random::new(seed, 3);
    let mut model = start.clone();
    let mut ops = Vec::new();
    while ops.len() < len {
        let number = ops.len() + 1;
        let Some(op) = draw(&model, number, &mut random) else {
            continue;
        };
        let is_possible = fallocs || !matches!(op, Op::Falloc { .. });
        if is_possible && model.apply(&op, number).is_ok() {
            ops.push(op);
        }
    }
    let name = format!("storm {seed}");
    Workload { name, ops }
}

fn draw(model: &Model, number: usize, random: &mut Random) -> Option<Op> {
    let (files, dirs, names) = model.names();
    let new_name = |random: &mut Random| {
        let dir = random.pick(&dirs).map_or("", String::as_str);
        let long = if random.below(3) == 0 {
            80 + random.index(100)
        } else {
            1
        };
        let name = format!("{number}{}", "n".repeat(long));
        if dir.is_empty() {
            name
        } else {
            format!("{dir}/{name}")
        }
    };
    let fresh = new_name(random);
    let file = |random: &mut Random| random.pick(&files).cloned();
    let any = |random: &mut Random| random.pick(&names).cloned();
    let few = names.len() < 8;
    let choice = if few {
        random.below(14)
    } else {
        random.below(100)
    };
    Some(match choice {
        0..9 => Op::Create(fresh),
        9..12 => Op::Mkdir(fresh),
        12..14 => Op::Symlink {
            target: "t".repeat(1 + random.index(120)),
            path: fresh,
        },
        14..40 => {
            let path = file(random)?;
            let size = model.size(&path);
            let at = match random.below(3) {
                0 => size,
                1 => random.below(size + 1),
                _ => random.below(MAX_SIZE) / 4096 * 4096,
            };
            let longest = if random.below(4) == 0 { 40_000 } else { 6000 };
            let len = 1 + random.below(longest).min(MAX_SIZE.saturating_sub(at));
            let how = if random.below(8) == 0 {
                How::Sync
            } else {
                How::Plain
            };
            Op::Write { path, at, len, how }
        }
        40..46 => {
            let path = file(random)?;
            let size = model.size(&path);
            let size = match random.below(4) {
                0 => 0,
                1 => random.below(MAX_SIZE),
                _ => random.below(size + 1),
            };
            Op::Truncate { path, size }
        }
        46..51 => {
            let modes = [
                Falloc::Plain,
                Falloc::KeepSize,
                Falloc::Punch,
                Falloc::Punch,
                Falloc::Zero,
                Falloc::ZeroKeepSize,
            ];
            Op::Falloc {
                path: file(random)?,
                at: random.below(MAX_SIZE / 2),
                len: 1 + random.below(MAX_SIZE / 2),
                mode: *random.pick(&modes)?,
            }
        }
        51..57 => {
            let from = any(random)?;
            let to = if random.below(2) == 0 {
                any(random)?
            } else {
                fresh
            };
            Op::Rename { from, to }
        }
        57 => Op::Exchange {
            from: any(random)?,
            to: any(random)?,
        },
        58..62 => Op::Link {
            from: file(random)?,
            to: fresh,
        },
        62..72 => {
            let path = any(random)?;
            match model.kind(&path)? {
                Kind::Dir { .. } => Op::Rmdir(path),
                _ => Op::Unlink(path),
            }
        }
        72..78 => {
            let path = file(random)?;
            let name = format!("user.{}", random.below(4));
            if random.below(3) == 0 {
                Op::RemoveXattr { path, name }
            } else {
                let longest = if random.below(3) == 0 { 300 } else { 30 };
                let len = random.below(longest);
                Op::SetXattr { path, name, len }
            }
        }
        78..80 => Op::Chmod {
            path: file(random)?,
            mode: 0o600 + random.below(0o100) as u16,
        },
        80..88 => Op::Fsync(file(random)?),
        88..92 => Op::Fdatasync(file(random)?),
        92..96 => Op::Fsync(random.pick(&dirs).filter(|dir| !dir.is_empty()).cloned()?),
        96 => Op::Sync,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::{Kind, Model, b3_one, b3_ops, b3_setup, b3_two, storm};
    use crate::crashtest::model::Node;

    fn start() -> Model {
        let entries = BTreeMap::new();
        let mut model = Model {
            nodes: vec![Node::new(Kind::Dir { parent: 0, entries }, 0o755, 2, 0)],
            with_sizes: true,
        };
        for op in b3_setup() {
            model.apply(&op, 0).unwrap();
        }
        model
    }

    #[test]
    fn the_space_of_one_and_two_operations_is_as_large_as_it_should_be() {
        assert!(b3_setup().len() > 5 && b3_ops().len() > 60);
        let one = b3_one(&start());
        assert!(one.len() > 150, "{}", one.len());
        assert!(one.iter().all(|workload| workload.ops.len() == 2));
        let two = b3_two(&start(), 1).count();
        assert!(two > 30_000, "{two}");
        // Another order, the same space.
        assert_eq!(b3_two(&start(), 2).count(), two);
    }

    #[test]
    fn a_storm_comes_back_with_its_seed() {
        let (a, b) = (storm(&start(), 5, 200, true), storm(&start(), 5, 200, true));
        assert_eq!(a.ops, b.ops);
        assert_ne!(a.ops, storm(&start(), 6, 200, true).ops);
    }
}
