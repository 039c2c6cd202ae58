//! The keys that exist: names, kinds and ranges, in one table. Loading, the unknown-key check and
//! the test that holds `config/default.toml` to the same set all read it.

use crate::limits::{
    NAME_BYTES_MAX, PEER_IDLE_MS_MAX, SNAPSHOT_CHUNK_BYTES, SNAPSHOTS_SENT_MAX, VALUE_BYTES_MAX,
};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
const GIB: u64 = 1024 * MIB;

/// Least bound for all memtables together. While half of it is free an entry of any size is applied, which
/// adds a value at most: that must fit in there.
const MEMTABLE_BYTES_MIN: u64 = 16 * MIB;
const _: () = assert!(MEMTABLE_BYTES_MIN / 2 >= VALUE_BYTES_MAX as u64);

/// Least rate of snapshots: a node that sends as many as it may at a time has a chunk of each for its
/// receiver before that takes the connection for dead.
const SNAPSHOT_BYTES_PER_SECOND_MIN: u64 = MIB;
const _: () = assert!(
    (SNAPSHOTS_SENT_MAX * SNAPSHOT_CHUNK_BYTES) as u64 * 1000
        <= SNAPSHOT_BYTES_PER_SECOND_MIN * (PEER_IDLE_MS_MAX / 4)
);

/// Most addresses in `cluster.initial` or `cluster.join`.
pub(super) const ADDRESSES_MAX: usize = 64;
/// The raft log must have room for at least this many of its files: the log engine purges whole
/// files, and with fewer it would rewrite what it has just written.
pub(super) const LOG_FILES_MIN: u64 = 4;
/// Longest label, zone or cluster name, in bytes.
pub(super) const LABEL_BYTES_MAX: usize = NAME_BYTES_MAX;

/// What values a key takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A string.
    Text,
    /// A whole number within a range.
    Count { min: u64, max: u64 },
    /// Bytes: a whole number, or a string with a unit, within a range.
    Size { min: u64, max: u64 },
    /// An array of strings; in the environment one string with commas.
    List,
}

/// One key.
#[derive(Debug)]
pub(super) struct Key {
    /// `section.name`.
    pub name: &'static str,
    /// The values it takes.
    pub kind: Kind,
}

const fn text(name: &'static str) -> Key {
    Key { name, kind: Kind::Text }
}

const fn list(name: &'static str) -> Key {
    Key { name, kind: Kind::List }
}

const fn count(name: &'static str, min: u64, max: u64) -> Key {
    Key { name, kind: Kind::Count { min, max } }
}

const fn size(name: &'static str, min: u64, max: u64) -> Key {
    Key { name, kind: Kind::Size { min, max } }
}

/// Every key, in the order of `config/default.toml`.
pub(super) const KEYS: &[Key] = &[
    text("node.id"),
    text("node.data_dir"),
    text("node.zone"),
    count("node.weight", 1, 10_000),
    count("node.data_threads", 0, 256),
    text("client.listen"),
    text("client.advertise"),
    text("peer.listen"),
    text("peer.advertise"),
    text("http.listen"),
    text("cluster.name"),
    list("cluster.initial"),
    list("cluster.join"),
    count("raft.hibernate_after_ms", 0, 86_400_000),
    text("log.level"),
    text("log.format"),
    text("storage.engine"),
    size("storage.cache_bytes", MIB, 64 * GIB),
    size("storage.memtable_bytes", MEMTABLE_BYTES_MIN, 64 * GIB),
    size("storage.log_file_bytes", MIB, GIB),
    size("storage.log_bytes", 16 * MIB, 1024 * GIB),
    size("storage.log_keep_bytes", 64 * KIB, 64 * GIB),
    count("storage.log_spare_files", 0, 64),
    size("storage.reserve_bytes", 0, 1024 * GIB),
    size("snapshot.bytes_per_second", SNAPSHOT_BYTES_PER_SECOND_MIN, 64 * GIB),
];

/// The key of that name.
pub(super) fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

/// Whether keys begin with `name.`.
pub(super) fn is_section(name: &str) -> bool {
    sections().any(|section| section == name)
}

fn sections() -> impl Iterator<Item = &'static str> {
    KEYS.iter().filter_map(|key| key.name.split_once('.').map(|(section, _)| section))
}

/// The environment variable that overrides a key.
pub(super) fn environment_name(key: &str) -> String {
    format!("{ENVIRONMENT_PREFIX}{}", key.to_uppercase().replace('.', "__"))
}

/// How the name of an environment variable that sets a key begins.
pub(super) const ENVIRONMENT_PREFIX: &str = "PONTOON__";

/// The key, or for a name without a dot also the section, that was probably meant by `name`.
pub(super) fn suggestion(name: &str) -> Option<&'static str> {
    let sections = sections().filter(|_| !name.contains('.'));
    let near = KEYS
        .iter()
        .map(|key| key.name)
        .chain(sections)
        .map(|known| (distance(name, known), known))
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, known)| *distance <= if known.len() < 6 { 1 } else { 2 })
        .map(|(_, known)| known);
    near.or_else(|| {
        // The right name in the wrong section, or in none.
        let last = name.rsplit('.').next()?;
        let mut same = KEYS
            .iter()
            .map(|key| key.name)
            .filter(|known| known.ends_with(last) && known[..known.len() - last.len()].ends_with('.'));
        match (same.next(), same.next()) {
            (Some(only), None) => Some(only),
            _ => None,
        }
    })
}

/// Levenshtein distance. Names are short, the quadratic table is no matter; a very long unknown
/// key is cut, it is near to nothing anyway.
fn distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.chars().take(64).collect();
    let b: Vec<char> = b.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// Bytes as people write them: `64MiB`, or the plain number where no unit fits.
pub(super) fn show_size(bytes: u64) -> String {
    let units = [("GiB", GIB), ("MiB", MIB), ("KiB", KIB)];
    match units.iter().find(|(_, unit)| bytes >= *unit && bytes.is_multiple_of(*unit)) {
        Some((name, unit)) => format!("{}{name}", bytes / unit),
        None => bytes.to_string(),
    }
}

/// Reads `67108864`, `64MiB` or `64 MiB`. The reason tells what would be right.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim() {
        "" | "B" => Some(1),
        "KiB" => Some(KIB),
        "MiB" => Some(MIB),
        "GiB" => Some(GIB),
        _ => None,
    };
    let (Ok(number), Some(factor)) = (number.parse::<u64>(), factor) else {
        return Err(format!(
            "{text:?} is not a size; write bytes as 67108864, or with a unit of KiB, MiB or GiB as \"64MiB\""
        ));
    };
    number.checked_mul(factor).ok_or_else(|| format!("{text:?} is beyond all bounds"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("node.id", "node.id"), 0);
    }

    #[test]
    fn suggestions() {
        assert_eq!(suggestion("node.wieght"), Some("node.weight"));
        assert_eq!(suggestion("nodes.id"), Some("node.id"));
        assert_eq!(suggestion("nodes"), Some("node"));
        assert_eq!(suggestion("data_dir"), Some("node.data_dir"));
        assert_eq!(suggestion("raft.cache_bytes"), Some("storage.cache_bytes"));
        assert_eq!(suggestion("listen"), None, "three keys end so");
        assert_eq!(suggestion("tls.certificate"), None);
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_size("64MiB"), Ok(64 * MIB));
        assert_eq!(parse_size(" 1 GiB "), Ok(GIB));
        assert_eq!(parse_size("12"), Ok(12));
        assert_eq!(parse_size("12B"), Ok(12));
        for bad in ["", "MiB", "64MB", "-1", "1.5GiB", "64mib", "99999999999999999999", "99999999999GiB"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        for bytes in [0, 1, 1023, 1024, 3 * MIB, GIB, GIB + MIB, u64::MAX] {
            assert_eq!(parse_size(&show_size(bytes)), Ok(bytes));
        }
    }

    #[test]
    fn every_name_has_one_section_and_its_own_variable() {
        let mut variables: Vec<String> = KEYS.iter().map(|k| environment_name(k.name)).collect();
        assert!(KEYS.iter().all(|k| k.name.matches('.').count() == 1));
        variables.sort();
        variables.dedup();
        assert_eq!(variables.len(), KEYS.len());
        assert_eq!(environment_name("node.data_dir"), "PONTOON__NODE__DATA_DIR");
    }
}
