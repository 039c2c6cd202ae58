//! A crash, and damage on top of it.

use super::*;

/// Killed at any point, and a file damaged then: what is opened is the state at some applied index, exactly,
/// or nothing is.
#[test]
fn damage_after_a_crash_is_never_a_wrong_state() {
    for kind in EngineKind::ALL {
        damage_after_a_crash_on(kind);
    }
}

fn damage_after_a_crash_on(kind: EngineKind) {
    // Enough for sled to have many segments.
    let logs = REPLICAS.map(|replica| Log::draw(replica, 5000, 2500, true));
    let home = tempfile::tempdir().unwrap();
    let mut seed = 11u64;
    let mut draw = move |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed >> 20) as usize % below
    };
    let (mut refused, mut whole) = (0, 0);
    let step = if kind == EngineKind::Sled { 3 } else { 1 };
    for copied in images(home.path(), kind, &logs, 2, false, &[Image::Killed]).into_iter().step_by(step) {
        let redo = fs::read_dir(copied.path.join("redo")).unwrap().next();
        let redo = redo.map(|item| Path::new("redo").join(item.unwrap().file_name()));
        let state = copied.path.join("state");
        let mut damages = match kind {
            EngineKind::Sled => {
                let db = || Path::new("state").join("db");
                vec![("flip", db()), ("flip", db()), ("flip", db()), ("flip", "state.sums".into())]
            }
            EngineKind::Fjall => [state.clone(), state.join("tables")]
                .iter()
                .flat_map(|dir| fs::read_dir(dir).unwrap())
                .map(|item| item.unwrap().path())
                .filter(|path| path.is_file() && fs::metadata(path).unwrap().len() > 0)
                .flat_map(|path| {
                    let path = path.strip_prefix(&copied.path).unwrap().to_owned();
                    [("flip", path.clone()), ("remove", path)]
                })
                .collect(),
        };
        if let Some(redo) = redo {
            damages.extend([("flip", redo.clone()), ("remove", redo)]);
        }
        for (damage, file) in damages {
            let node = home.path().join("damaged");
            copy_dir(&copied.path, &node);
            let path = node.join(&file);
            if damage == "remove" {
                fs::remove_file(&path).unwrap();
            } else {
                let mut bytes = fs::read(&path).unwrap();
                let at = draw(bytes.len());
                bytes[at] ^= 1 << draw(8);
                fs::write(&path, bytes).unwrap();
            }
            let opened = open(kind, &node, false).and_then(|engine| {
                Flusher::open(node.join("redo"), engine.clone())?;
                Ok(engine)
            });
            match opened {
                Ok(engine) => {
                    for log in &logs {
                        let difference = log.difference(&log.open(engine.clone()));
                        assert_eq!(difference, None, "point {}: {damage} {}", copied.point, file.display());
                    }
                    whole += 1;
                }
                Err(StorageError::Damaged { .. } | StorageError::Identity(_)) => refused += 1,
                Err(error) => panic!("point {}: {damage} {}: {error}", copied.point, file.display()),
            }
            fs::remove_dir_all(&node).unwrap();
        }
        fs::remove_dir_all(copied.path).unwrap();
    }
    assert!(refused > 60 && whole > 10, "{refused} refused, {whole} whole");
}
