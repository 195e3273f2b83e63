//! What cannot be the same, with the reason.
//!
//! All of it is decided by the kernel's FUSE client before a request is sent, or by the protocol.

use crate::case::{Difference, Grain};

struct Known {
    case: &'static str,
    /// Ends of labels; an empty one stands for all.
    labels: &'static [&'static str],
    why: &'static str,
}

const ALL: &[Known] = &[
    Known {
        case: "chown_by_everybody",
        labels: &[
            " to None None by owner",
            " to None None by fellow",
            " to None None by member",
            " to None None by other",
            " to None None by root",
        ],
        why: "chown(-1, -1) is not sent",
    },
    Known {
        case: "set_id_bits_go",
        labels: &[
            "2767 by other",
            "2767 by other, after",
            "6766 by other",
            "6766 by other, after",
        ],
        why: "the protocol clears the set-group-id bit only where the group may execute",
    },
    Known {
        case: "what_changes_times",
        labels: &["read", "read twice", "read at the end"],
        why: "a read of cached pages is not sent",
    },
    Known {
        case: "what_changes_times",
        labels: &["truncate to the same"],
        why: "times are the client's, which does not set them then",
    },
    Known {
        case: "times_out_of_range",
        labels: &[""],
        why: "the client knows no limits of times; they show when the file is read again",
    },
    Known {
        case: "behind_the_end",
        labels: &[""],
        why: "the client does not clear what was mapped behind the end",
    },
    Known {
        case: "immutable_and_append_only",
        labels: &["write, immutable", "append, immutable", "write, append"],
        why: "an open is not sent",
    },
    Known {
        case: "what was written",
        labels: &[
            "immutable_and_append_only/immutable",
            "immutable_and_append_only/append",
        ],
        why: "the client does not know that an ioctl changed ctime",
    },
    Known {
        case: "collapse_and_insert",
        labels: &[""],
        why: "the client refuses these modes of fallocate",
    },
];

impl Known {
    fn covers(&self, difference: &Difference) -> bool {
        let ends = |label: &&str| difference.label.ends_with(label);
        difference.case == self.case && self.labels.iter().any(ends)
    }
}

/// What is not known, and what is known and not so any more.
pub fn sort_out(mut differences: Vec<Difference>, grain: Grain) -> Vec<String> {
    let mut complaints = Vec::new();
    for known in ALL {
        let before = differences.len();
        differences.retain(|difference| !known.covers(difference));
        if before == differences.len() && grain == Grain::Nanosecond {
            let (case, labels, why) = (known.case, known.labels, known.why);
            complaints.push(format!(
                "{case}: {labels:?} are the same now, so not: {why}"
            ));
        }
    }
    let tell = |difference: Difference| {
        let Difference { case, label, text } = difference;
        format!("{case}: {label}: {text}")
    };
    complaints.extend(differences.into_iter().map(tell));
    complaints
}
