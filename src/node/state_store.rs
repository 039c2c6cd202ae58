//! Opening the state of a node's replicas, or, if it is damaged, an empty store in its place.
//!
//! The state is what the cluster has of it everywhere: a replica that lost it gets another from its leader,
//! and keeps its vote and its log meanwhile ([`super::open`]). So damage there doesn't end the node. Nor is
//! anything believed of a state that isn't whole: all of it goes, with the redo files that were
//! made to it, and is kept aside for a person to look at ([`crate::storage::aside`]).
//!
//! An error of the system (no permission, a full or failing disk) says nothing about what is on disk: then
//! nothing is moved, and the node doesn't start. Nor does it if the state shows that the *log* has lost
//! entries: what the node promised its cluster to keep is gone then.

use std::sync::Arc;

use crate::storage::StorageError;
use crate::storage::aside;
use crate::storage::engine::{Engine, Store};
use crate::storage::engine_kind::{EngineKind, StateOptions};
use crate::storage::flush::Flusher;
use crate::storage::identity::{DataDir, IdentityError};
use crate::storage::keys;
use crate::storage::log::{LogStore, ReplicaPhase};
use crate::storage::state::StateHeader;

/// Opens the state in `dir`, of the replicas in `log`.
pub(super) fn open(
    dir: &DataDir,
    options: StateOptions,
    log: &dyn LogStore,
) -> Result<(Arc<dyn Store>, Flusher), StorageError> {
    let kind = EngineKind::of(&dir.state_path(), options.engine)?;
    tell_engine(dir, kind, options.engine);
    let why = match try_open(dir, kind, options, log) {
        Err(error @ StorageError::Damaged { .. }) => error.to_string(),
        result => return result,
    };
    let moved = aside::set_aside(dir, &why)?;
    tracing::warn!(
        why,
        "the state on this node is set aside as {}, and its redo files beside it; replicas whose log doesn't reach \
         back to their beginning get another state from their leaders. Nothing there is used any more, nor \
         removed: see to that when the node is whole again",
        moved.display()
    );
    try_open(dir, kind, options, log)
}

/// Tells which engine it is, and why, if nobody has chosen it and a new directory would get another.
fn tell_engine(dir: &DataDir, kind: EngineKind, asked: Option<EngineKind>) {
    let directory = dir.state_path();
    let directory = directory.display();
    match asked {
        None if kind != EngineKind::DEFAULT => tracing::info!(
            engine = kind.name(),
            %directory,
            "the state stays on the engine that made it; that of a new data directory is {}",
            EngineKind::DEFAULT
        ),
        _ => tracing::info!(engine = kind.name(), %directory, "opening the state"),
    }
}

fn try_open(
    dir: &DataDir,
    kind: EngineKind,
    options: StateOptions,
    log: &dyn LogStore,
) -> Result<(Arc<dyn Store>, Flusher), StorageError> {
    let engine = kind.open(&dir.state_path(), options, dir.store_id())?;
    if engine.created() && log.catalogue()?.iter().any(|record| record.phase == ReplicaPhase::Active) {
        tracing::warn!(
            directory = %dir.state_path().display(),
            "the state store is new, though there are replicas: what their logs don't reach back to comes from \
             their leaders"
        );
    }
    let flusher = Flusher::open(dir.redo_path(), engine.clone());
    // If the state is to be set aside, too: afterwards nothing would tell.
    check_logs(dir, &*engine, log)?;
    Ok((engine, flusher?))
}

/// Whether each log reaches as far as the state that was made from it. One that doesn't has lost entries
/// that this node has confirmed.
fn check_logs(dir: &DataDir, engine: &dyn Engine, log: &dyn LogStore) -> Result<(), StorageError> {
    for record in log.catalogue()? {
        if record.phase != ReplicaPhase::Active {
            continue;
        }
        let (replica, generation) = (record.replica, record.generation);
        let Some(bytes) = engine.get(&keys::header_key(replica, generation))? else {
            continue;
        };
        // What can't be read is seen to when the replica is opened, and so is a log that is damaged in itself.
        let Ok(header) = StateHeader::decode(&bytes, "the header of a state") else {
            continue;
        };
        let Ok(log) = log.load(replica) else {
            continue;
        };
        if header.applied.index > log.last {
            return Err(IdentityError::Damaged {
                path: dir.log_path().display().to_string(),
                detail: format!(
                    "the log of replica {replica} ends at entry {}, and its state has entry {}: entries that this \
                     node has confirmed are gone",
                    log.last, header.applied.index
                ),
            }
            .into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use raft::eraftpb::{ConfState, Entry};

    use super::*;
    use crate::ids::{DatabaseId, Epoch, Index, NodeId, Position, ReplicaId, ShardId};
    use crate::machine::MachineKind;
    use crate::node::open::{OpenedState, open_stores};
    use crate::placement::map::{Member, MemberRole};
    use crate::placement::ring::RingRange;
    use crate::storage::StateBatch;
    use crate::storage::flush::FlushPoint;
    use crate::storage::log::{LogWrite, ReplicaRecord};
    use crate::storage::log_memory::MemoryLog;
    use crate::storage::state::ReplicaState;

    const REPLICA: ReplicaId = ReplicaId(7);

    fn record() -> ReplicaRecord {
        ReplicaRecord {
            replica: REPLICA,
            shard: ShardId(1),
            database: DatabaseId(1),
            machine: MachineKind::Kv,
            phase: ReplicaPhase::Active,
            range: RingRange::ALL,
            epoch: Epoch { range: 1, conf: 1 },
            members: vec![Member { replica: REPLICA, node: NodeId(1), role: MemberRole::Voter }],
            members_at: 0,
            ordered_at: 0,
            generation: 1,
        }
    }

    /// The directory of a node that has applied and flushed up to entry 20, and compacted up to 15.
    struct Node {
        kind: EngineKind,
        home: tempfile::TempDir,
        log: MemoryLog,
    }

    impl Node {
        fn new(kind: EngineKind) -> Node {
            let node = Node { kind, home: tempfile::tempdir().unwrap(), log: MemoryLog::new() };
            node.log.create(&[record()]).unwrap();
            let entries = (6..=20).map(|index| Entry { index, term: 5, ..Default::default() }).collect();
            node.log
                .write(&[LogWrite { replica: REPLICA, entries, hard_state: None, membership: None }])
                .unwrap();
            let dir = node.dir();
            let (engine, mut flusher) = open(&dir, node.options(), &node.log).unwrap();
            let mut state = ReplicaState::open(engine, REPLICA, 1, header()).unwrap();
            for index in 6u64..=20 {
                state.put(&index.to_be_bytes(), bytes::Bytes::from(vec![index as u8; 300]));
                state.set_applied(Position { index, term: 5 });
                if index % 5 == 0 {
                    flusher.flush(&[state.freeze().unwrap()], &mut |_| {}).unwrap();
                }
            }
            node.log.compact(REPLICA, Position { index: 15, term: 5 }).unwrap();
            node
        }

        fn dir(&self) -> DataDir {
            DataDir::open(&self.home.path().join("node")).unwrap()
        }

        fn path(&self, name: &str) -> PathBuf {
            self.home.path().join("node").join(name)
        }

        fn options(&self) -> StateOptions {
            StateOptions { engine: Some(self.kind), cache_bytes: 1 << 20, synchronous: false }
        }

        /// Flips a bit of what it has of its replica's state.
        fn flip(&self) {
            let path = match self.kind {
                EngineKind::Sled => self.path("state").join("db"),
                EngineKind::Fjall => {
                    let tables = fs::read_dir(self.path("state").join("tables")).unwrap();
                    tables.map(|table| table.unwrap().path()).max().unwrap()
                }
            };
            let mut bytes = fs::read(&path).unwrap();
            let place = bytes.len().min(4000) / 2;
            bytes[place] ^= 1;
            fs::write(&path, bytes).unwrap();
        }

        /// The parts of a state that is set aside: redo files and state, and sums if it has any.
        fn parts(&self) -> usize {
            match self.kind {
                EngineKind::Sled => 3,
                EngineKind::Fjall => 2,
            }
        }

        /// Starts it, and tells where its replica stands, or why it has lost its state.
        fn start(&self) -> Result<Result<Index, String>, StorageError> {
            let dir = self.dir();
            let (engine, _flusher) = open(&dir, self.options(), &self.log)?;
            let engine: Arc<dyn Engine> = engine;
            Ok(match open_stores(&self.log, &engine, &record())?.1 {
                OpenedState::Whole(state) => Ok(state.header().applied.index),
                OpenedState::Lost { why, .. } => Err(why),
            })
        }

        /// The parts that are aside.
        fn aside(&self) -> usize {
            let names = fs::read_dir(self.home.path().join("node")).unwrap();
            names
                .filter(|item| item.as_ref().unwrap().file_name().to_string_lossy().contains(".aside-"))
                .count()
        }
    }

    fn header() -> StateHeader {
        StateHeader {
            applied: crate::ids::GROUP_START,
            revision: 0,
            log_time: 0,
            epoch: Epoch { range: 1, conf: 1 },
            members: Vec::new(),
            conf_state: ConfState::default(),
        }
    }

    #[test]
    fn a_damaged_state_is_set_aside_and_the_replica_knows_that_it_is_lost() {
        for kind in EngineKind::ALL {
            let node = Node::new(kind);
            assert_eq!(node.start().unwrap(), Ok(20));
            node.flip();
            for _ in 0..2 {
                let why = node.start().unwrap().unwrap_err();
                assert_eq!(why, "the state store has none, and its log begins after entry 15");
                assert_eq!(node.aside(), node.parts(), "once");
            }
        }
    }

    #[test]
    fn damage_that_was_noted_while_the_node_ran_is_acted_upon() {
        for kind in EngineKind::ALL {
            let node = Node::new(kind);
            let dir = node.dir();
            let (engine, flusher) = open(&dir, node.options(), &node.log).unwrap();
            let (told, hears) = std::sync::mpsc::channel();
            let told = std::sync::Mutex::new(told);
            engine.on_damage(Box::new(move |why| told.lock().unwrap().send(why.to_string()).unwrap()));
            // As good as a page that can't be read.
            let header = keys::header_key(REPLICA, 1);
            engine.spoil(&header);
            let error = engine.get(&header).unwrap_err();
            assert!(matches!(error, StorageError::Damaged { .. }), "{error}");
            assert_eq!(hears.recv().unwrap(), error.to_string());
            assert!(engine.get(b"another").is_err(), "nothing of it is believed any more");
            drop((engine, flusher, dir));
            assert!(node.start().unwrap().is_err());
            assert_eq!(node.aside(), node.parts());
        }
    }

    #[test]
    fn a_redo_file_that_is_damaged_takes_the_state_with_it() {
        for kind in EngineKind::ALL {
            let node = Node::new(kind);
            let dir = node.dir();
            let (engine, mut flusher) = open(&dir, node.options(), &node.log).unwrap();
            let mut state = ReplicaState::open(engine.clone(), REPLICA, 1, header()).unwrap();
            let entry = Entry { index: 21, term: 5, ..Default::default() };
            node.log
                .write(&[LogWrite {
                    replica: REPLICA,
                    entries: vec![entry],
                    hard_state: None,
                    membership: None,
                }])
                .unwrap();
            state.put(b"k", bytes::Bytes::from_static(b"v"));
            state.set_applied(Position { index: 21, term: 5 });
            flusher.set_hook(Box::new(|point| match point {
                FlushPoint::BatchWritten => {
                    Err(StorageError::Engine { engine: "test", reason: "crash".into() })
                }
                _ => Ok(()),
            }));
            flusher.flush(&[state.freeze().unwrap()], &mut |_| {}).unwrap_err();
            drop((engine, flusher, state, dir));
            let redo = fs::read_dir(node.path("redo")).unwrap().next().unwrap().unwrap().path();
            let mut bytes = fs::read(&redo).unwrap();
            bytes[40] ^= 1;
            fs::write(&redo, bytes).unwrap();
            assert!(node.start().unwrap().is_err());
            assert_eq!(node.aside(), node.parts());
        }
    }

    #[test]
    fn a_missing_state_is_a_lost_one() {
        for kind in EngineKind::ALL {
            let node = Node::new(kind);
            fs::remove_dir_all(node.path("state")).unwrap();
            if node.kind == EngineKind::Sled {
                fs::remove_file(node.path("state.sums")).unwrap();
            }
            assert!(node.start().unwrap().is_err());
            assert_eq!(node.aside(), 0, "there is nothing to keep");
        }
    }

    #[test]
    fn what_is_not_damage_moves_nothing() {
        for kind in EngineKind::ALL {
            let node = Node::new(kind);
            // A file of somebody else's.
            fs::write(node.path("redo").join("notes.txt"), "x").unwrap();
            assert!(node.start().is_err());
            fs::remove_file(node.path("redo").join("notes.txt")).unwrap();
            // A store that can't be read.
            let needed = match node.kind {
                EngineKind::Sled => node.path("state").join("conf"),
                EngineKind::Fjall => node.path("state").join("LOCK"),
            };
            fs::remove_file(&needed).unwrap();
            fs::create_dir(&needed).unwrap();
            let error = node.start().unwrap_err();
            assert!(matches!(error, StorageError::Io { .. }), "{error}");
            fs::remove_dir(&needed).unwrap();
            assert_eq!((node.start().unwrap(), node.aside()), (Ok(20), 0));
        }
    }

    #[test]
    fn a_log_that_is_shorter_than_the_state_ends_the_node() {
        for kind in EngineKind::ALL {
            let node = Node::new(kind);
            let short = MemoryLog::new();
            short.create(&[record()]).unwrap();
            let entries = (6..=19).map(|index| Entry { index, term: 5, ..Default::default() }).collect();
            short
                .write(&[LogWrite { replica: REPLICA, entries, hard_state: None, membership: None }])
                .unwrap();
            let node = Node { log: short, ..node };
            let error = node.start().unwrap_err();
            assert!(matches!(&error, StorageError::Identity(IdentityError::Damaged { .. })), "{error}");
            assert!(error.to_string().contains("ends at entry 19, and its state has entry 20"), "{error}");
            assert_eq!(node.aside(), 0);
        }
    }
}
