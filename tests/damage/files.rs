//! The files of a node's directory, by what they are for, and what may happen to them.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use pontoon::storage::engine_kind::EngineKind;

/// A file of a node's directory, or all of a kind.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Class {
    Identity,
    Lock,
    Map,
    /// The append files of the log, by number.
    LogFirst,
    LogMiddle,
    LogLast,
    /// What the log has written anew of old files.
    LogRewrite,
    LogMark,
    Log,
    StateDb,
    StateConf,
    StateSnap,
    StateSums,
    /// Which version of the state counts, on fjall.
    StateCurrent,
    /// That version.
    StateVersion,
    /// The table of it that was made last.
    StateTable,
    State,
    RedoFile,
    Redo,
    SnapshotFile,
}

impl Class {
    pub const ALL: [Class; 20] = [
        Class::Identity,
        Class::Lock,
        Class::Map,
        Class::LogFirst,
        Class::LogMiddle,
        Class::LogLast,
        Class::LogRewrite,
        Class::LogMark,
        Class::Log,
        Class::StateDb,
        Class::StateConf,
        Class::StateSnap,
        Class::StateSums,
        Class::StateCurrent,
        Class::StateVersion,
        Class::StateTable,
        Class::State,
        Class::RedoFile,
        Class::Redo,
        Class::SnapshotFile,
    ];

    /// Where it is in this directory, if it is there.
    pub fn find(self, dir: &Path) -> Option<PathBuf> {
        let nth = |part: &str, is: fn(&str) -> bool, pick: fn(usize) -> Option<usize>| {
            let mut names = names(&dir.join(part));
            names.retain(|name| is(name));
            pick(names.len()).map(|at| dir.join(part).join(&names[at]))
        };
        let append = |name: &str| name.ends_with(".raftlog");
        let last = |count: usize| count.checked_sub(1);
        // What was freed stays there under its name until it is used again.
        let needed = |pick: fn(usize) -> Option<usize>| {
            let mut names = names(&dir.join("log"));
            let number = |name: &String| name.strip_suffix(".raftlog")?.parse::<u64>().ok();
            let first = first_needed(dir);
            names.retain(|name| number(name).is_some_and(|number| number >= first));
            pick(names.len()).map(|at| dir.join("log").join(&names[at]))
        };
        let path = match self {
            Class::Identity => dir.join("IDENTITY"),
            Class::Lock => dir.join("LOCK"),
            Class::Map => dir.join("map"),
            Class::LogFirst => needed(|count| (count > 0).then_some(0))?,
            Class::LogMiddle => needed(|count| (count > 2).then_some(count / 2))?,
            Class::LogLast => nth("log", append, last)?,
            Class::LogRewrite => nth("log", |name| name.ends_with(".rewrite"), last)?,
            Class::LogMark => dir.join("log.mark"),
            Class::Log => dir.join("log"),
            Class::StateDb => dir.join("state/db"),
            Class::StateConf => dir.join("state/conf"),
            Class::StateSnap => nth("state", |name| name.starts_with("snap."), last)?,
            Class::StateSums => dir.join("state.sums"),
            Class::StateCurrent => dir.join("state/current"),
            Class::StateVersion => {
                let current = fs::read(dir.join("state/current")).ok()?;
                let number = u64::from_le_bytes(current[..8].try_into().expect("a number"));
                dir.join(format!("state/v{number}"))
            }
            Class::StateTable => {
                let version = fs::read(Class::StateVersion.find(dir)?).ok()?;
                let number = |path: &PathBuf| path.file_name()?.to_str()?.parse::<u64>().ok();
                let mut tables = files(&dir.join("state/tables"));
                // The node may have been killed while it made one, or removed one: that counts for nothing.
                tables.retain(|path| number(path).is_some_and(|number| is_named(&version, number, path)));
                tables.into_iter().max_by_key(number)?
            }
            Class::State => dir.join("state"),
            Class::RedoFile => nth("redo", |name| name.ends_with(".redo"), last)?,
            Class::Redo => dir.join("redo"),
            Class::SnapshotFile => files(&dir.join("snapshots")).pop()?,
        };
        path.exists().then_some(path)
    }

    pub fn is_directory(self) -> bool {
        matches!(self, Class::Log | Class::State | Class::Redo)
    }

    /// The engine that alone makes such a file.
    pub fn engine(self) -> Option<EngineKind> {
        match self {
            Class::StateDb | Class::StateConf | Class::StateSnap | Class::StateSums => Some(EngineKind::Sled),
            Class::StateCurrent | Class::StateVersion | Class::StateTable => Some(EngineKind::Fjall),
            _ => None,
        }
    }

    /// Whether it is part of the state, which an engine keeps, or of a flush into that.
    pub fn is_state(self) -> bool {
        self.engine().is_some() || matches!(self, Class::State | Class::RedoFile | Class::Redo)
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Class::Identity => "`IDENTITY`",
            Class::Lock => "`LOCK`",
            Class::Map => "`map`",
            Class::LogFirst => "`log/*.raftlog`, the first",
            Class::LogMiddle => "`log/*.raftlog`, one in the middle",
            Class::LogLast => "`log/*.raftlog`, the last",
            Class::LogRewrite => "`log/*.rewrite`",
            Class::LogMark => "`log.mark`",
            Class::Log => "`log/`, all of it",
            Class::StateDb => "`state/db`",
            Class::StateConf => "`state/conf`",
            Class::StateSnap => "`state/snap.*`",
            Class::StateSums => "`state.sums`",
            Class::StateCurrent => "`state/current`",
            Class::StateVersion => "`state/v*`",
            Class::StateTable => "`state/tables/*`",
            Class::State => "`state/`, all of it",
            Class::RedoFile => "`redo/*.redo`",
            Class::Redo => "`redo/`, all of it",
            Class::SnapshotFile => "a file in `snapshots/`",
        })
    }
}

/// The first file of the raft log that its mark asks for. Of the mark's two slots the one with the greater number counts.
fn first_needed(dir: &Path) -> u64 {
    let mark = fs::read(dir.join("log.mark")).unwrap_or_default();
    let number = |at: usize| {
        let bytes = mark.get(at..)?.first_chunk()?;
        Some(u64::from_le_bytes(*bytes))
    };
    // Behind magic, format version, this number, a store id, and how many writes there were.
    [0, 512].into_iter().max_by_key(|slot| number(slot + 12)).and_then(|slot| number(slot + 44)).unwrap_or(0)
}

/// Whether a version of fjall's tree names this table: by its number, the kind of its checksum, and that.
fn is_named(version: &[u8], number: u64, table: &Path) -> bool {
    let sum = xxhash_rust::xxh3::xxh3_128(&fs::read(table).expect("a table"));
    let name = [&number.to_le_bytes()[..], &[0], &sum.to_le_bytes()].concat();
    version.windows(name.len()).any(|window| window == name)
}

/// What happens to a file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Damage {
    FlipStart,
    FlipMiddle,
    FlipEnd,
    /// One bit in every so many bytes.
    FlipMany,
    Half,
    Empty,
    Delete,
    Older,
}

impl Damage {
    pub const ALL: [Damage; 8] = [
        Damage::FlipStart,
        Damage::FlipMiddle,
        Damage::FlipEnd,
        Damage::FlipMany,
        Damage::Half,
        Damage::Empty,
        Damage::Delete,
        Damage::Older,
    ];

    /// Does it to what `class` names in `dir`, of which `older` is an older copy. False: there is nothing
    /// to do it to, or it would change nothing.
    pub fn inflict(self, class: Class, dir: &Path, older: &Path) -> bool {
        let Some(path) = class.find(dir) else { return false };
        if self == Damage::Older {
            let copy = older.join(path.strip_prefix(dir).expect("within it"));
            if !copy.exists() || same(&copy, &path) {
                return false;
            }
            remove(&path);
            copy_all(&copy, &path);
            return true;
        }
        if self == Damage::Delete {
            remove(&path);
            return true;
        }
        if class.is_directory() {
            return false;
        }
        let mut bytes = fs::read(&path).expect("reading");
        let len = bytes.len();
        if len == 0 {
            return false;
        }
        match self {
            Damage::FlipStart => flip(&mut bytes, [0]),
            Damage::FlipMiddle => flip(&mut bytes, [len / 2]),
            Damage::FlipEnd => {
                let last = bytes.iter().rposition(|byte| *byte != 0);
                flip(&mut bytes, last);
            }
            Damage::FlipMany => flip(&mut bytes, (7..len).step_by(FLIP_EVERY)),
            Damage::Half => bytes.truncate(len / 2),
            Damage::Empty => bytes.clear(),
            Damage::Delete | Damage::Older => unreachable!("done above"),
        }
        // The same file as before, whatever it is known as to the file system.
        fs::write(&path, bytes).expect("writing");
        true
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Damage::FlipStart => "a bit flipped at its start",
            Damage::FlipMiddle => "a bit flipped in its middle",
            Damage::FlipEnd => "a bit flipped at its end",
            Damage::FlipMany => "many bits flipped",
            Damage::Half => "cut to half",
            Damage::Empty => "cut to nothing",
            Damage::Delete => "deleted",
            Damage::Older => "replaced by an older copy",
        })
    }
}

/// Distance of flipped bits.
const FLIP_EVERY: usize = 4099;

fn flip(bytes: &mut [u8], places: impl IntoIterator<Item = usize>) {
    for place in places {
        bytes[place] ^= 0x10;
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
        .collect();
    names.sort();
    names
}

/// All files below a directory.
pub fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for name in names(dir) {
        let path = dir.join(name);
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found
}

/// Whether both hold the same.
fn same(one: &Path, other: &Path) -> bool {
    let content = |base: &Path| -> Vec<(PathBuf, Vec<u8>)> {
        let all = if base.is_dir() { files(base) } else { vec![base.to_owned()] };
        let relative = |path: &PathBuf| path.strip_prefix(base).expect("within it").to_owned();
        let bytes = |path: &PathBuf| {
            let mut bytes = fs::read(path).expect("reading");
            if path.extension().is_some_and(|kind| kind == "raftlog" || kind == "rewrite") {
                // The zeros behind a log's end are room for it, which a kill leaves and the next start cuts off.
                bytes.truncate(bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1));
            }
            bytes
        };
        all.iter().map(|path| (relative(path), bytes(path))).collect()
    };
    content(one) == content(other)
}

pub fn remove(path: &Path) {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    removed.expect("removing");
}

/// Copies a file or a directory with everything in it.
pub fn copy_all(from: &Path, to: &Path) {
    if !from.is_dir() {
        fs::copy(from, to).expect("copying");
        return;
    }
    fs::create_dir(to).expect("a directory");
    for name in names(from) {
        copy_all(&from.join(&name), &to.join(&name));
    }
}
