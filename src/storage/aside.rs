//! Setting the state of a node aside: what is damaged makes room for an empty store, and is kept.
//!
//! ```text
//! DIR/state, DIR/state.sums, DIR/redo  ─►  DIR/state.aside-<seconds>, DIR/state.sums.aside-<seconds>, …
//! DIR/state.damaged                        from the moment of the decision until all of it has moved
//! ```
//!
//! The parts belong together: a state without its redo file may hold half a flush, and a redo file over
//! another state than it was made to is worse than none. So the decision is made durable first, as a
//! marker with the name that the parts get; whoever finds it at a start begins, or ends, the move before
//! anything is opened. What finds damage while the node runs leaves the marker for the next start, which
//! might not see it by itself.
//!
//! Nothing of it is ever deleted here: a person may want to look at it, or may have no other copy.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::atomic_file::{self, io_error};
use super::identity::DataDir;
use super::{StorageError, beside};

/// Ending of the marker beside the state.
const MARKER: &str = "damaged";

/// What a marker says.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Marker {
    /// Ending of the names that the parts get. 0: it can't be read.
    seconds: u64,
    why: String,
}

/// Notes durably that the store in `state` is damaged: the next start sets it aside. The first reason
/// that was noted stays.
pub fn note_damage(state: &Path, why: &str) -> Result<(), StorageError> {
    mark(state, why).map(drop)
}

/// Why the store in `state` is to be set aside, if that was noted.
pub fn noted_damage(state: &Path) -> Result<Option<String>, StorageError> {
    Ok(read(state)?.map(|marker| marker.why))
}

/// Moves state and redo files aside and leaves empty directories. Nobody has them open. After a crash it
/// is gone on with by calling it again, as [`noted_damage`] asks for. Returns where the state is now.
pub fn set_aside(dir: &DataDir, why: &str) -> Result<PathBuf, StorageError> {
    let state = dir.state_path();
    let marker = mark(&state, why)?;
    for part in [dir.redo_path(), beside(&state, super::sled_sums::ENDING), state.clone()] {
        let to = aside(&part, marker.seconds);
        if to.exists() {
            // What has moved has left an empty directory, if any: nothing was opened since.
            if holds_anything(&part)? {
                return Err(io_error("renaming", &part)(ErrorKind::AlreadyExists.into()));
            }
            continue;
        }
        match fs::rename(&part, &to) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            result => result.map_err(io_error("renaming", &part))?,
        }
    }
    for part in [dir.redo_path(), state.clone()] {
        fs::create_dir_all(&part).map_err(io_error("creating", &part))?;
    }
    atomic_file::sync_dir(dir.path())?;
    atomic_file::remove(&beside(&state, MARKER))?;
    Ok(aside(&state, marker.seconds))
}

/// The marker, which is made if there is none.
fn mark(state: &Path, why: &str) -> Result<Marker, StorageError> {
    let found = read(state)?;
    if let Some(marker) = found.clone().filter(|marker| marker.seconds != 0) {
        return Ok(marker);
    }
    let why = found.map_or(why.to_owned(), |unreadable| unreadable.why);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    // Names that were given before, in this second or by another clock, are not given again.
    let taken = |seconds: &u64| {
        let sums = beside(state, super::sled_sums::ENDING);
        [state.to_owned(), state.with_file_name("redo"), sums]
            .iter()
            .any(|part| aside(part, *seconds).exists())
    };
    let seconds = (now.max(1)..).find(|seconds| !taken(seconds)).unwrap_or(now);
    let marker = Marker { seconds, why };
    let text = format!("{}\n{}\n", marker.seconds, marker.why);
    atomic_file::replace(&beside(state, MARKER), text.as_bytes())?;
    Ok(marker)
}

/// Whether a part is there, and more than an empty directory.
fn holds_anything(part: &Path) -> Result<bool, StorageError> {
    match fs::read_dir(part) {
        Ok(mut items) => Ok(items.next().is_some()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) if error.kind() == ErrorKind::NotADirectory => Ok(true),
        Err(error) => Err(io_error("listing", part)(error)),
    }
}

fn read(state: &Path) -> Result<Option<Marker>, StorageError> {
    let path = beside(state, MARKER);
    let text = match fs::read(&path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("reading", &path)(error)),
    };
    let (seconds, why) = text.split_once('\n').unwrap_or_default();
    Ok(Some(match seconds.parse() {
        Ok(seconds) => Marker { seconds, why: why.trim_end().to_owned() },
        // Whatever has become of it, it was made for this one purpose.
        Err(_) => Marker { seconds: 0, why: format!("{} says so", path.display()) },
    }))
}

fn aside(part: &Path, seconds: u64) -> PathBuf {
    beside(part, &format!("aside-{seconds}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data_dir(home: &Path) -> DataDir {
        DataDir::open(&home.join("node")).unwrap()
    }

    /// Puts a file into each part.
    fn fill(dir: &DataDir, text: &str) {
        fs::write(dir.state_path().join("db"), text).unwrap();
        fs::write(dir.redo_path().join("1.redo"), text).unwrap();
        fs::write(beside(&dir.state_path(), "sums"), text).unwrap();
    }

    fn texts(dir: &DataDir, seconds: u64) -> [String; 3] {
        let read = |part: PathBuf, file: &str| fs::read_to_string(aside(&part, seconds).join(file)).unwrap();
        [
            read(dir.state_path(), "db"),
            read(dir.redo_path(), "1.redo"),
            fs::read_to_string(aside(&beside(&dir.state_path(), "sums"), seconds)).unwrap(),
        ]
    }

    fn seconds_of(aside: &Path) -> u64 {
        aside.to_str().unwrap().rsplit_once('-').unwrap().1.parse().unwrap()
    }

    #[test]
    fn the_parts_move_together_and_are_kept() {
        let home = tempfile::tempdir().unwrap();
        let dir = data_dir(home.path());
        let mut moved = Vec::new();
        for text in ["first", "second"] {
            fill(&dir, text);
            let aside = set_aside(&dir, "a test").unwrap();
            assert!(fs::read_dir(dir.state_path()).unwrap().next().is_none());
            assert!(fs::read_dir(dir.redo_path()).unwrap().next().is_none());
            assert_eq!(noted_damage(&dir.state_path()).unwrap(), None);
            moved.push(seconds_of(&aside));
        }
        assert_ne!(moved[0], moved[1], "within one second too");
        assert_eq!(texts(&dir, moved[0]), ["first"; 3]);
        assert_eq!(texts(&dir, moved[1]), ["second"; 3]);
    }

    #[test]
    fn a_move_that_was_cut_short_is_ended() {
        for moved in 0..=3 {
            let home = tempfile::tempdir().unwrap();
            let dir = data_dir(home.path());
            fill(&dir, "kept");
            note_damage(&dir.state_path(), "the disk\nis old").unwrap();
            let seconds = read(&dir.state_path()).unwrap().unwrap().seconds;
            let parts = [dir.redo_path(), beside(&dir.state_path(), "sums"), dir.state_path()];
            for part in &parts[..moved] {
                fs::rename(part, aside(part, seconds)).unwrap();
            }
            // The next start makes what is missing, and looks for a marker before it opens anything.
            drop(dir);
            let dir = data_dir(home.path());
            assert_eq!(noted_damage(&dir.state_path()).unwrap().as_deref(), Some("the disk\nis old"));
            assert_eq!(seconds_of(&set_aside(&dir, "another reason").unwrap()), seconds);
            assert_eq!(texts(&dir, seconds), ["kept"; 3]);
            assert_eq!(noted_damage(&dir.state_path()).unwrap(), None);
        }
    }

    #[test]
    fn a_damaged_marker_is_still_one() {
        let home = tempfile::tempdir().unwrap();
        let dir = data_dir(home.path());
        for text in ["", "x", "\n", "1x\nwhy", "0\nwhy"] {
            fill(&dir, text);
            fs::write(beside(&dir.state_path(), MARKER), text).unwrap();
            assert!(noted_damage(&dir.state_path()).unwrap().is_some(), "{text:?}");
            // Each has a name of its own.
            let seconds = seconds_of(&set_aside(&dir, "why").unwrap());
            assert_eq!(texts(&dir, seconds), [text; 3]);
            assert!(!holds_anything(&dir.state_path()).unwrap());
        }
    }
}
