//! What happened when, and what was promised, as the marks of a log tell it; and whether a
//! recovered file system keeps it.
//!
//! The marks of an operation are `B <number> <operation>` before it begins, and when it has ended
//! `E <number>`, or `X <number> <why>` where it was refused; `unmounted` stands at the end. A log
//! that says `page cache` comes from a real mount, whose writes have no order among each other; one
//! that says `unknown` from a program of which nobody knows what it does.

use blockstack::log_writes::Entry;

use super::model::{Model, Promised, SECTOR, Snapshot};
use super::script::Op;
use super::walk::Found;

const REFUSED: &str = ": refused";

/// Errors of which the model knows nothing; nothing has changed then.
fn may_fail(error: &str) -> bool {
    let known = [fs::FsError::NoSpace, fs::FsError::NotSupported];
    known.iter().any(|known| known.to_string() == error)
}

/// One operation.
struct Step {
    /// Entries of the log before it began.
    began: usize,
    /// As in the script.
    what: String,
    after: Snapshot,
}

struct Promise {
    /// Entries of the log when the call had returned.
    made: usize,
    /// The operation that promises.
    by: usize,
    promised: Promised,
}

/// See the module's documentation.
pub struct History {
    model: Model,
    /// The first is the state at the start.
    steps: Vec<Step>,
    promises: Vec<Promise>,
    /// What [`Found::others`] must be.
    others: u64,
    /// Whether anybody knows what names there should be.
    is_known: bool,
}

/// See the module's documentation.
pub const PAGE_CACHE: &str = "page cache";
/// See the module's documentation.
pub const UNKNOWN: &str = "unknown";

/// What a state may be, and must be.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Bounds {
    last: usize,
    promises: usize,
}

impl History {
    /// Reads the marks of a log. `model` is what was there at the start.
    ///
    /// # Errors
    /// A mark that makes no sense, or an operation that ended otherwise than the model says.
    pub fn new(mut model: Model, entries: &[Entry], others: u64) -> Result<Self, String> {
        let says = |word| {
            entries
                .iter()
                .any(|entry| entry.text().as_deref() == Some(word))
        };
        let is_known = !says(UNKNOWN);
        model.with_sizes = !says(PAGE_CACHE);
        let mut steps = vec![Step {
            began: 0,
            what: "the start".to_owned(),
            after: model.snapshot(),
        }];
        let mut promises = Vec::new();
        let mut open: Option<(usize, Op, Model)> = None;
        for (at, entry) in entries.iter().enumerate() {
            let Some(text) = entry.text() else { continue };
            let mut words = text.splitn(3, ' ');
            let kind = words.next().unwrap_or("");
            let number = words.next().and_then(|word| word.parse::<usize>().ok());
            let rest = words.next().unwrap_or("");
            match (kind, number) {
                _ if !is_known => {}
                ("B", Some(number)) if number == steps.len() => {
                    let op: Op = rest
                        .parse()
                        .map_err(|error| format!("mark {at}: {error}"))?;
                    let before = model.clone();
                    let refused = model.apply(&op, number).is_err();
                    if refused {
                        model = before.clone();
                    }
                    steps.push(Step {
                        began: at,
                        what: if refused {
                            format!("{op}{REFUSED}")
                        } else {
                            op.to_string()
                        },
                        after: model.snapshot(),
                    });
                    open = Some((number, op, before));
                }
                ("E" | "X", Some(number)) => {
                    let Some((_, op, before)) = open.take().filter(|open| open.0 == number) else {
                        return Err(format!("mark {at}: {text:?} ends what did not begin"));
                    };
                    let mut refused = steps[number].what.ends_with(REFUSED);
                    if kind == "X" && !refused && may_fail(rest) {
                        model = before;
                        refused = true;
                        steps[number].what = format!("{op}{REFUSED}");
                        steps[number].after = model.snapshot();
                    }
                    if refused != (kind == "X") {
                        let should = if refused { "be refused" } else { "succeed" };
                        return Err(format!(
                            "operation {number}, {op}, should {should}: {text:?}"
                        ));
                    }
                    if let Some(promised) = model.promised(&op, number).filter(|_| !refused) {
                        promises.push(Promise {
                            made: at,
                            by: number,
                            promised,
                        });
                    }
                }
                ("unmounted", None) => promises.push(Promise {
                    made: at,
                    by: steps.len() - 1,
                    promised: model.all(steps.len() - 1),
                }),
                _ => {}
            }
        }
        Ok(Self {
            model,
            steps,
            promises,
            others,
            is_known,
        })
    }

    /// Whether sizes belong to the names' time.
    #[must_use]
    pub fn with_sizes(&self) -> bool {
        self.model.with_sizes
    }

    /// What a state after the first `at` entries may be.
    #[must_use]
    pub fn bounds(&self, at: usize) -> Bounds {
        Bounds {
            last: self.steps[1..].partition_point(|step| step.began < at),
            promises: self.promises.partition_point(|promise| promise.made < at),
        }
    }

    /// Whether what was found can be there within `bounds`.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn check(&self, found: &Found, bounds: Bounds) -> Result<(), String> {
        if let Some(stale) = &found.stale {
            return Err(stale.clone());
        }
        if !self.is_known {
            return Ok(());
        }
        if self.others != found.others {
            return Err("files that the workload does not touch have changed".to_owned());
        }
        let last = bounds.last;
        let kept = &self.promises[..bounds.promises];
        let strongest = kept.iter().max_by_key(|promise| promise.promised.upto);
        let first = strongest.map_or(0, |promise| promise.promised.upto);
        let mut problem = None;
        for step in (first..=last).rev() {
            let after = &self.steps[step].after;
            if after.hash != found.hash || after.lines != found.lines {
                continue;
            }
            match self.check_content(found, step, last, kept) {
                Ok(()) => return Ok(()),
                Err(error) => problem = Some(problem.unwrap_or(error)),
            }
        }
        Err(problem.unwrap_or_else(|| self.wrong_names(found, first, last, strongest)))
    }

    fn wrong_names(
        &self,
        found: &Found,
        first: usize,
        last: usize,
        strongest: Option<&Promise>,
    ) -> String {
        let same = |step: &Step| step.after.lines == found.lines;
        let mut text = match self.steps.iter().rposition(same) {
            Some(step) => format!("the names are those after operation {step}; "),
            None => "the names are those of no time; ".to_owned(),
        };
        match strongest {
            Some(promise) => {
                let by = &self.steps[promise.by].what;
                text += &format!(
                    "operation {} ({by}) promised those after {first}",
                    promise.by
                );
            }
            None => text += "nothing was promised",
        }
        text += &format!(", {last} at most had begun\n");
        let differences = |step: &usize| diff(&self.steps[*step].after, found).len();
        let near = (first..=last).min_by_key(differences).unwrap_or(first);
        text += &format!(
            "nearest are those after {near} ({})\n",
            self.steps[near].what
        );
        for line in diff(&self.steps[near].after, found) {
            text += &line;
            text.push('\n');
        }
        text
    }

    fn check_content(
        &self,
        found: &Found,
        step: usize,
        last: usize,
        kept: &[Promise],
    ) -> Result<(), String> {
        let nodes = &self.steps[step].after.nodes;
        for (index, &id) in nodes.iter().enumerate() {
            let Some(bytes) = found.contents.get(index).and_then(Option::as_ref) else {
                continue;
            };
            let promised = kept.iter().flat_map(|promise| &promise.promised.files);
            let oldest = promised
                .filter(|file| file.0 == id)
                .map(|file| file.1)
                .max();
            let oldest = oldest.unwrap_or(0);
            let all = &self.model.nodes[id].versions;
            let begin = all
                .iter()
                .rposition(|version| version.op <= oldest)
                .unwrap_or(0);
            let end = all.partition_point(|version| version.op <= last);
            let versions = &all[begin..end.max(begin)];
            let path = &found.lines[index].path;
            let size = bytes.len() as u64;
            if !versions
                .iter()
                .any(|it| it.content.size == size || it.end == size)
            {
                let sizes: Vec<_> = versions.iter().map(|it| (it.op, it.content.size)).collect();
                return Err(format!(
                    "{path:?} has {size} bytes; it may have, as (after operation, bytes), {sizes:?}"
                ));
            }
            for (sector, part) in bytes.chunks(SECTOR).enumerate() {
                let fits =
                    |content: &super::model::Content| content.sector(sector)[..part.len()] == *part;
                if versions.iter().any(|it| fits(&it.content)) {
                    continue;
                }
                let ever = all.iter().rfind(|it| fits(&it.content)).map(|it| it.op);
                let ops: Vec<_> = versions.iter().map(|version| version.op).collect();
                return Err(format!(
                    "{path:?}: sector {sector} of {size} bytes is as after operation {ever:?}, may \
                     be as after {ops:?}; promised was {oldest}: {:02x?}..",
                    &part[..part.len().min(16)],
                ));
            }
        }
        Ok(())
    }

    /// The operations, each on a line.
    #[must_use]
    pub fn script(&self) -> String {
        let numbered = self.steps.iter().enumerate();
        numbered
            .map(|(number, step)| format!("{number:4} {}\n", step.what))
            .collect()
    }
}

fn diff(want: &Snapshot, have: &Found) -> Vec<String> {
    let missing = want.lines.iter().filter(|line| !have.lines.contains(line));
    let extra = have.lines.iter().filter(|line| !want.lines.contains(line));
    missing
        .map(|line| format!("  - {:?} {}", line.path, line.attrs))
        .chain(extra.map(|line| format!("  + {:?} {}", line.path, line.attrs)))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use blockstack::log_writes::Entry;

    use super::{Bounds, Found, History, PAGE_CACHE, UNKNOWN};
    use crate::crashtest::model::{Kind, Model, Node};
    use crate::crashtest::script::{Op, parse};

    fn start() -> Model {
        let entries = BTreeMap::new();
        let kind = Kind::Dir { parent: 0, entries };
        Model {
            nodes: vec![Node::new(kind, 0o755, 2, 0)],
            with_sizes: true,
        }
    }

    /// Marks of a script whose operations all succeed.
    fn marks(script: &str) -> Vec<Entry> {
        let ops = parse(script).unwrap();
        let marks = ops.iter().enumerate().flat_map(|(index, op)| {
            let number = index + 1;
            [format!("B {number} {op}"), format!("E {number}")]
        });
        marks.map(|mark| Entry::mark(&mark)).collect()
    }

    /// What is there after some operations.
    fn after(script: &str, with_sizes: bool) -> Found {
        let mut model = start();
        model.with_sizes = with_sizes;
        for (index, op) in parse(script).unwrap().iter().enumerate() {
            model.apply(op, index + 1).unwrap();
        }
        let snapshot = model.snapshot();
        let content = |id: &usize| {
            let node = &model.nodes[*id];
            let bytes = (0..node.content.size.div_ceil(512))
                .flat_map(|sector| *node.content.sector(sector as usize));
            let bytes = bytes.take(node.content.size as usize).collect();
            matches!(node.kind, Kind::File).then_some(bytes)
        };
        Found {
            contents: snapshot.nodes.iter().map(content).collect(),
            hash: snapshot.hash,
            names: snapshot.lines.len(),
            lines: snapshot.lines,
            others: 7,
            stale: None,
        }
    }

    fn check(script: &str, found: &Found) -> Result<(), String> {
        let entries = marks(script);
        let history = History::new(start(), &entries, 7).unwrap();
        history.check(found, history.bounds(entries.len()))
    }

    #[test]
    fn a_state_may_be_as_new_as_promised_or_newer() {
        let script = "create f\nfsync f\ncreate g\nrename g h";
        for (upto, may_be) in [(0, false), (1, true), (2, true), (3, true), (4, true)] {
            let part: Vec<&str> = script.lines().take(upto).collect();
            let found = after(&part.join("\n"), true);
            assert_eq!(check(script, &found).is_ok(), may_be, "after {upto}");
        }
        let early = marks(script);
        let history = History::new(start(), &early, 7).unwrap();
        let before_fsync = history.bounds(3);
        let begun = Bounds {
            last: 1,
            promises: 0,
        };
        assert_eq!(before_fsync, Bounds { last: 2, ..begun });
        assert!(history.check(&after("", true), before_fsync).is_ok());
        let error = history.check(&after("create f\nsync\ncreate g", true), before_fsync);
        assert!(error.unwrap_err().contains("those after operation 3"));
    }

    #[test]
    fn a_rename_over_a_file_is_there_or_not() {
        let script = "create f\nwrite f 0 600\ncreate g\nwrite g 0 900\nsync\nrename g f";
        assert!(check(script, &after(script, true)).is_ok());
        let before = script.trim_end_matches("\nrename g f");
        assert!(check(script, &after(before, true)).is_ok());
        let neither = format!("{before}\nunlink f\nunlink g");
        let both = format!("{before}\nunlink f\nlink g f");
        for wrong in [neither, both] {
            let error = check(script, &after(&wrong, true)).unwrap_err();
            assert!(error.contains("promised those after 5"), "{error}");
        }
    }

    #[test]
    fn what_was_synced_stays_and_what_was_never_written_does_not_show() {
        let script = "create f\nwrite f 0 2000\nfsync f\nwrite f 0 2000";
        let old = after("create f\nwrite f 0 2000", true);
        let new = after(script, true);
        let file = |found: &Found| found.contents[1].clone().unwrap();
        let with = |bytes: Vec<u8>| {
            let mut found = after(script, true);
            found.contents[1] = Some(bytes);
            found
        };
        assert!(check(script, &old).is_ok() && check(script, &new).is_ok());
        // Sectors of either.
        let mixed = [&file(&old)[..512], &file(&new)[512..]].concat();
        assert!(check(script, &with(mixed)).is_ok());
        // Neither: within a sector, zeros, or something else.
        let torn = [&file(&old)[..100], &file(&new)[100..]].concat();
        assert!(check(script, &with(torn)).unwrap_err().contains("sector 0"));
        let zeros = check(script, &with(vec![0; 2000])).unwrap_err();
        assert!(zeros.contains("as after operation Some(1)"), "{zeros}");
        assert!(
            check(script, &with(vec![9; 2000]))
                .unwrap_err()
                .contains("operation None")
        );
        let mut stale = after(script, true);
        stale.stale = Some("stale".to_owned());
        assert_eq!(check(script, &stale).unwrap_err(), "stale");
        let mut others = after(script, true);
        others.others = 8;
        assert!(
            check(script, &others)
                .unwrap_err()
                .contains("does not touch")
        );
    }

    #[test]
    fn writes_of_the_page_cache_have_no_order() {
        let script = "create f\nwrite f 0 600\nwrite f 600 900\nsync";
        let mut entries = marks(script);
        entries.insert(0, Entry::mark(PAGE_CACHE));
        let history = History::new(start(), &entries, 7).unwrap();
        let begun = history.bounds(entries.len() - 1);
        assert_eq!(begun.promises, 0);
        assert!(history.check(&after("create f", false), begun).is_ok());
        assert!(history.check(&after(script, false), begun).is_ok());
        let all = history.bounds(entries.len());
        assert!(history.check(&after("create f", false), all).is_err());
    }

    #[test]
    fn of_a_command_only_what_was_never_written_is_judged() {
        let entries = [Entry::mark(UNKNOWN), Entry::mark("B 1 no operation")];
        let history = History::new(start(), &entries, 7).unwrap();
        let bounds = history.bounds(2);
        assert!(history.check(&after("mkdir any", true), bounds).is_ok());
        let mut stale = after("", true);
        stale.stale = Some("stale".to_owned());
        assert!(history.check(&stale, bounds).is_err());
    }

    #[test]
    fn an_operation_must_end_as_the_model_says() {
        let log = |marks: &[&str]| {
            let entries: Vec<_> = marks.iter().map(|mark| Entry::mark(mark)).collect();
            History::new(start(), &entries, 7).map(|history| history.script())
        };
        assert!(log(&["B 1 unlink f", "E 1"]).is_err());
        assert!(log(&["B 1 create f", "X 1 file exists"]).is_err());
        assert!(log(&["B 1 unlink f", "X 1 no such file"]).is_ok());
        let full = log(&["B 1 create f", "X 1 no space left on device"]).unwrap();
        assert!(full.contains("create f: refused"));
        assert!(log(&["E 1"]).is_err());
        assert!("jump".parse::<Op>().is_err() && log(&["B 1 jump"]).is_err());
    }
}
