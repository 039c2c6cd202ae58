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
    assert!(matches!(set_aside(&path), Err(IdentityError::InUse { .. })));
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
    assert!(matches!(set_aside(&path), Err(IdentityError::NotOurs { .. })));
    assert!(!is_ours(&path));
    assert_eq!(fs::read_dir(&path).unwrap().count(), 1, "nothing was added");
    fs::write(path.join(IDENTITY), "my identity").unwrap();
    assert!(!is_ours(&path), "another program's file of that name");
    assert!(matches!(refusal(&path), IdentityError::Damaged { .. }));
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

#[test]
fn a_directory_set_aside_keeps_everything() {
    let (_home, path) = home();
    let dir = DataDir::open(&path).unwrap();
    let store = dir.store_id();
    drop(dir);
    fs::write(path.join("log").join("1"), "entries").unwrap();
    let aside = set_aside(&path).unwrap();
    assert!(!path.exists());
    assert!(aside.join("log").join("1").exists());
    assert_ne!(DataDir::open(&path).unwrap().store_id(), store);
    assert_eq!(DataDir::open(&aside).unwrap().store_id(), store);
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
