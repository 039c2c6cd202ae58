//! Tests of [`super`]: what is refused, and that refusing changes nothing.

use std::os::unix::fs::PermissionsExt;

use super::*;

fn home() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a").join("node");
    (dir, path)
}

fn refusal(path: &Path) -> IdentityError {
    DataDir::open(path).err().expect("must be refused")
}

/// Begins anew where a saved map is the id of its cluster.
fn begin_anew(path: &Path) -> Result<(DataDir, Option<PathBuf>), IdentityError> {
    DataDir::begin_anew(path, RandomId::from_slice)
}

#[test]
fn a_new_directory_remembers_who_it_is() {
    let (_home, path) = home();
    let cluster = ClusterId::random();
    let mut dir = DataDir::open(&path).unwrap();
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    assert!(dir.log_path().is_dir() && dir.state_path().is_dir() && dir.redo_path().is_dir());
    assert_eq!((dir.cluster_id(), dir.node()), (None, None));
    let store = dir.store_id();
    dir.record_cluster(cluster).unwrap();
    drop(dir);
    let mut dir = DataDir::open(&path).unwrap();
    assert_eq!((dir.store_id(), dir.cluster_id()), (store, Some(cluster)));
    dir.record_member(cluster, NodeId(4)).unwrap();
    drop(dir);
    let mut dir = DataDir::open(&path).unwrap();
    assert_eq!(dir.node(), Some(NodeId(4)));
    dir.record_member(cluster, NodeId(4)).unwrap();

    let error = dir.record_cluster(ClusterId::random()).unwrap_err();
    assert!(matches!(error, IdentityError::OtherCluster { .. }));
    let error = dir.record_member(cluster, NodeId(5)).unwrap_err();
    assert!(matches!(error, IdentityError::OtherNode { .. }));
    assert_eq!((dir.cluster_id(), dir.node()), (Some(cluster), Some(NodeId(4))));
}

#[test]
fn one_process_at_a_time() {
    let (_home, path) = home();
    let dir = DataDir::open(&path).unwrap();
    let message = refusal(&path).to_string();
    let pid = format!("in use by another process (pid {})", std::process::id());
    assert!(message.contains(&pid), "{message}");
    assert!(matches!(check_unused(&path), Err(IdentityError::InUse { .. })));
    assert!(matches!(begin_anew(&path), Err(IdentityError::InUse { .. })));
    drop(dir);
    check_unused(&path).unwrap();
    DataDir::open(&path).unwrap();
}

#[test]
fn strangers_are_left_alone() {
    let (_home, path) = home();
    fs::create_dir_all(&path).unwrap();
    fs::write(path.join("thesis.tex"), "years of work").unwrap();
    assert!(matches!(refusal(&path), IdentityError::NotOurs { .. }));
    assert!(matches!(begin_anew(&path), Err(IdentityError::NotOurs { .. })));
    assert!(!is_ours(&path));
    assert_eq!(fs::read_dir(&path).unwrap().count(), 1, "nothing was added");
    fs::write(path.join(IDENTITY), "my identity").unwrap();
    assert!(!is_ours(&path), "another program's file of that name");
    assert!(matches!(refusal(&path), IdentityError::Damaged { .. }));
    assert!(matches!(begin_anew(&path), Err(IdentityError::NotOurs { .. })));
    assert_eq!(fs::read_dir(&path).unwrap().filter(|e| e.as_ref().unwrap().file_name() != LOCK).count(), 2);
    let file = path.join("thesis.tex");
    assert!(matches!(refusal(&file), IdentityError::Io { .. }), "not a directory");
}

#[test]
fn what_a_crash_in_the_first_moment_leaves_is_as_good_as_empty() {
    let (_home, path) = home();
    fs::create_dir_all(&path).unwrap();
    fs::write(path.join(LOCK), "12345\n").unwrap();
    fs::write(path.join("IDENTITY.tmp"), "half").unwrap();
    DataDir::open(&path).unwrap();
    assert!(is_ours(&path));
    assert!(!path.join("IDENTITY.tmp").exists());
}

#[test]
fn newer_and_damaged_identities_are_refused() {
    let (_home, path) = home();
    drop(DataDir::open(&path).unwrap());
    let file = path.join(IDENTITY);
    let good = fs::read(&file).unwrap();
    let (_, body) = unseal(IDENTITY_MAGIC, &good).unwrap();
    fs::write(&file, seal(IDENTITY_MAGIC, 2, body)).unwrap();
    let message = refusal(&path).to_string();
    assert!(message.contains("format 2, this program knows up to 1"), "{message}");
    for place in 0..good.len() {
        let mut bad = good.clone();
        bad[place] ^= 1;
        fs::write(&file, &bad).unwrap();
        assert!(matches!(refusal(&path), IdentityError::Damaged { .. }), "flipped at {place}");
        fs::write(&file, &good[..place]).unwrap();
        assert!(matches!(refusal(&path), IdentityError::Damaged { .. }), "cut at {place}");
    }
    fs::write(&file, &good).unwrap();
    DataDir::open(&path).unwrap();
}

/// A member's directory with content in it, closed.
fn member(path: &Path) -> (StoreId, ClusterId) {
    let mut dir = DataDir::open(path).unwrap();
    let cluster = ClusterId::random();
    dir.record_member(cluster, NodeId(4)).unwrap();
    dir.save_map(&cluster.0).unwrap();
    fs::write(dir.log_path().join("1.raftlog"), "entries").unwrap();
    fs::write(dir.state_path().join("db"), "values").unwrap();
    (dir.store_id(), cluster)
}

#[test]
fn beginning_anew_keeps_everything_but_the_identity() {
    let (_home, path) = home();
    let (store, cluster) = member(&path);
    let (mut dir, aside) = begin_anew(&path).unwrap();
    let aside = aside.unwrap();
    assert_ne!(dir.store_id(), store);
    assert_eq!((dir.cluster_id(), dir.node(), dir.rejoins()), (Some(cluster), None, true));
    assert!(matches!(dir.record_cluster(ClusterId::random()), Err(IdentityError::OtherCluster { .. })));
    assert!(matches!(refusal(&path), IdentityError::InUse { .. }), "the lock is held all the time");
    let new = dir.store_id();
    dir.record_member(cluster, NodeId(5)).unwrap();
    drop(dir);
    let dir = DataDir::open(&path).unwrap();
    assert_eq!((dir.store_id(), dir.node(), dir.rejoins()), (new, Some(NodeId(5)), true));
    assert_eq!(fs::read_dir(dir.log_path()).unwrap().count(), 0);
    assert_eq!(dir.load_map(), None);
    for name in ["log/1.raftlog", "state/db", "redo", "map"] {
        assert!(aside.join(name).exists(), "{name}");
    }
    // What was set aside is a directory as good as it was.
    let old = DataDir::open(&aside).unwrap();
    assert_eq!((old.store_id(), old.node(), old.rejoins()), (store, Some(NodeId(4)), false));
    drop(dir);
    // Once more, even within the same second: nothing is overwritten.
    let (_dir, second) = begin_anew(&path).unwrap();
    assert_ne!(second.unwrap(), aside);
    assert!(aside.join("log/1.raftlog").exists());
}

#[test]
fn without_its_identity_a_directory_is_known_by_its_stores() {
    for damage in [None, Some(""), Some("PONTNOD"), Some("PONTNODEand rubbish")] {
        let (_home, path) = home();
        let (_, cluster) = member(&path);
        match damage {
            None => fs::remove_file(path.join(IDENTITY)).unwrap(),
            Some(text) => fs::write(path.join(IDENTITY), text).unwrap(),
        }
        match (damage, refusal(&path)) {
            (None, IdentityError::Nameless { .. }) | (Some(_), IdentityError::Damaged { .. }) => {}
            (_, other) => panic!("{damage:?}: {other}"),
        }
        assert!(StorageError::from(DataDir::open_to_rejoin(&path).err().unwrap()).ends_identity());
        let (dir, aside) = begin_anew(&path).unwrap();
        assert_eq!((dir.cluster_id(), dir.node(), dir.rejoins()), (Some(cluster), None, true), "by its map");
        assert_eq!(aside.unwrap().join(IDENTITY).exists(), damage.is_some());
    }
    // A file of another kind among them: it may be somebody else's.
    let (_home, path) = home();
    member(&path);
    fs::remove_file(path.join(IDENTITY)).unwrap();
    fs::write(path.join("thesis.tex"), "years of work").unwrap();
    assert!(matches!(refusal(&path), IdentityError::NotOurs { .. }));
    assert!(matches!(begin_anew(&path), Err(IdentityError::NotOurs { .. })));
    assert!(path.join("log/1.raftlog").exists());
}

#[test]
fn cut_short_anywhere_beginning_anew_can_go_on_and_the_old_node_has_no_log() {
    for has_identity in [true, false] {
        // What is moved before the cut.
        for moved in [&[][..], &["log"], &["log", "state"], &["log", "state", "redo", "map"]] {
            let (_home, path) = home();
            let (store, _) = member(&path);
            let aside = path.join("aside-1");
            fs::create_dir(&aside).unwrap();
            if has_identity {
                fs::hard_link(path.join(IDENTITY), aside.join(IDENTITY)).unwrap();
            } else {
                fs::remove_file(path.join(IDENTITY)).unwrap();
            }
            for name in moved {
                fs::rename(path.join(name), aside.join(name)).unwrap();
            }
            match DataDir::open(&path) {
                Ok(dir) => {
                    assert!(has_identity);
                    assert_eq!((dir.store_id(), dir.node()), (store, Some(NodeId(4))));
                    let entries = fs::read_dir(dir.log_path()).unwrap().count();
                    assert_eq!(entries, usize::from(moved.is_empty()), "refused, once the log is gone");
                }
                Err(IdentityError::Nameless { .. }) => assert!(!has_identity),
                Err(error) => panic!("{moved:?}: {error}"),
            }
            let (dir, second) = begin_anew(&path).unwrap();
            assert!(dir.rejoins() && dir.node().is_none() && dir.store_id() != store);
            for name in ["log/1.raftlog", "state/db", "map"] {
                let kept = [Some(&aside), second.as_ref()].into_iter().flatten();
                assert_eq!(kept.filter(|aside| aside.join(name).exists()).count(), 1, "{moved:?}: {name}");
            }
        }
    }
}

#[test]
fn a_directory_made_to_rejoin_remembers_that() {
    let (_home, path) = home();
    assert!(DataDir::open_to_rejoin(&path).unwrap().rejoins());
    assert!(DataDir::open(&path).unwrap().rejoins());
    let (_home, path) = home();
    assert!(!DataDir::open(&path).unwrap().rejoins());
    assert!(DataDir::open_to_rejoin(&path).unwrap().rejoins(), "it is no member yet");
    assert!(DataDir::open(&path).unwrap().rejoins());
    let (_home, path) = home();
    member(&path);
    assert!(!DataDir::open_to_rejoin(&path).unwrap().rejoins(), "it is one already");
}

#[test]
fn a_map_is_kept_or_forgotten_whole() {
    let (_home, path) = home();
    let dir = DataDir::open(&path).unwrap();
    assert_eq!(dir.load_map(), None);
    dir.save_map(b"one").unwrap();
    dir.save_map(b"two").unwrap();
    assert_eq!(dir.load_map().unwrap(), b"two");
    let file = path.join(MAP);
    let mut bytes = fs::read(&file).unwrap();
    bytes[21] ^= 1;
    fs::write(&file, bytes).unwrap();
    assert_eq!(dir.load_map(), None);
    fs::write(&file, seal(MAP_MAGIC, 9, b"later")).unwrap();
    assert_eq!(dir.load_map(), None);
}

#[test]
fn the_state_of_either_engine_alone_shows_that_there_was_a_node() {
    for file in ["state/db", "state/current"] {
        let (_home, path) = home();
        fs::create_dir_all(path.join("state")).unwrap();
        fs::write(path.join(file), "values").unwrap();
        assert!(matches!(refusal(&path), IdentityError::Nameless { .. }), "{file}");
    }
}
