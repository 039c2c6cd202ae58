//! Disks that are truly full: a small file system in memory, which only a second process of the same test sees.
//!
//! To mount one takes root, or namespaces of users. Where neither is to be had the tests say so, and show nothing.

#[path = "support/cluster.rs"]
mod cluster;

use std::collections::BTreeMap;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use bytes::Bytes;
use cluster::{Cluster, Options, free_ports};
use pontoon::ids::{Epoch, GROUP_START, Incarnation, Position, RandomId, ReplicaId};
use pontoon::node::fatal::Fatal;
use pontoon::node::flusher::{FlushJob, FlushSink, FlushThread};
use pontoon::storage::engine::{Mutation, Store};
use pontoon::storage::engine_kind::{EngineKind, StateOptions};
use pontoon::storage::flush::{FlushStep, Flusher};
use pontoon::storage::pulse::Pulse;
use pontoon::storage::state::{Frozen, ReplicaState, StateHeader};
use pontoon::storage::{StateBatch, StateView, StorageError, keys};
use rustix::fs::{FallocateFlags, fallocate, statvfs};

/// Where the small file system is, in the process that sees it.
const DISK: &str = "PONTOON_TEST_DISK";
const PAGE: u64 = 4096;
const PATIENCE: Duration = Duration::from_secs(60);

/// A file system of some MiB, and a file on it that takes what others are not to have.
struct Disk {
    path: PathBuf,
    ballast: PathBuf,
}

impl Disk {
    /// Runs the test of that name again where there is one. `None`: that was done, or can't be.
    fn small(test: &str, mib: u32) -> Option<Disk> {
        if let Some(path) = std::env::var_os(DISK) {
            let path = PathBuf::from(path);
            return Some(Disk { ballast: path.join("ballast"), path });
        }
        let home = tempfile::tempdir().expect("a directory");
        let within = |namespaces: &str, command: &[&str]| {
            let script = format!("mount -t tmpfs -o size={mib}m none \"${DISK}\" && exec \"$@\"");
            let mut unshare = Command::new("unshare");
            unshare.args([namespaces, "sh", "-c", &script, "sh"]).args(command);
            unshare.env(DISK, home.path());
            unshare.status().is_ok_and(|status| status.success())
        };
        let Some(namespaces) = ["-m", "-Urm"].into_iter().find(|namespaces| within(namespaces, &["true"]))
        else {
            eprintln!("{test}: no file system may be mounted here, so nothing is shown");
            return None;
        };
        let program = std::env::current_exe().expect("this program");
        let program = program.to_str().expect("its path");
        assert!(within(namespaces, &[program, "--exact", test, "--nocapture"]), "it failed there");
        None
    }

    /// Takes all but so many pages.
    fn leave(&self, pages: u64) {
        self.give_back();
        let file = std::fs::File::create(&self.ballast).expect("a file");
        loop {
            let left = statvfs(&self.path).expect("its space");
            let taken = (left.f_bavail * left.f_frsize).saturating_sub(pages * PAGE);
            match fallocate(&file, FallocateFlags::empty(), 0, taken.max(1)) {
                Ok(()) => break,
                // A node has taken some of it meanwhile.
                Err(error) => assert_eq!(error, rustix::io::Errno::NOSPC),
            }
            assert!(taken > 0, "there is none");
        }
    }

    fn give_back(&self) {
        if self.ballast.exists() {
            std::fs::remove_file(&self.ballast).expect("removed");
        }
    }
}

fn open(path: &Path) -> Result<Arc<dyn Store>, StorageError> {
    let options = StateOptions { engine: None, cache_bytes: 1 << 20, synchronous: true };
    EngineKind::Fjall.open(path, options, RandomId([7; 16]))
}

fn content(engine: &dyn Store) -> BTreeMap<Vec<u8>, Bytes> {
    let (from, to) = keys::replica_range(ReplicaId(3));
    let mut found = BTreeMap::new();
    let mut visit = |key: &[u8], value| {
        found.insert(key.to_vec(), value);
        true
    };
    engine.scan(Bound::Included(&from), &to, &mut visit).expect("reads go on");
    found
}

/// What a flush does.
fn run(engine: &dyn Store, batch: &[Mutation]) -> Result<(), StorageError> {
    let mut run = engine.begin_run()?.expect("it takes runs");
    for (key, value) in batch {
        run.push(key, value.as_ref())?;
    }
    run.finish()
}

/// At each step there is room for another part of a flush: of its table, of the version that names that, of the file that
/// names the version.
#[test]
fn a_store_on_a_full_disk_keeps_what_it_has_and_goes_on_when_there_is_room() {
    let name = "a_store_on_a_full_disk_keeps_what_it_has_and_goes_on_when_there_is_room";
    let Some(disk) = Disk::small(name, 16) else { return };
    let path = disk.path.join("state");
    let mut engine = open(&path).expect("opened");
    let mut model = BTreeMap::new();
    let mut refused = [0; 3];
    for step in 0..240u64 {
        let pages = step % 24;
        let key = |number: u64| keys::user_key(ReplicaId(3), 1, &((step + number) % 40).to_be_bytes());
        let value = Bytes::from([step as u8].repeat(6000));
        let mut batch: Vec<Mutation> =
            (0..8).map(|number| (key(number), (number % 5 > 0).then(|| value.clone()))).collect();
        batch.sort();
        let apply = |model: &mut BTreeMap<Vec<u8>, Bytes>| {
            for (key, value) in &batch {
                match value {
                    Some(value) => drop(model.insert(key.clone(), value.clone())),
                    None => drop(model.remove(key)),
                }
            }
        };
        disk.leave(pages);
        if step % 2 == 0 {
            match run(&*engine, &batch) {
                Ok(()) => apply(&mut model),
                Err(error) => {
                    assert!(error.is_full(), "{pages} pages: {error}");
                    refused[0] += 1;
                    assert!(content(&*engine) == model, "{pages} pages: part of a flush is there");
                    disk.give_back();
                    run(&*engine, &batch).expect("there is room");
                    apply(&mut model);
                }
            }
        } else {
            engine.write(&batch).expect("in memory");
            apply(&mut model);
            if let Err(error) = engine.sync() {
                assert!(error.is_full(), "{pages} pages: {error}");
                refused[1] += 1;
                assert!(content(&*engine) == model);
                disk.give_back();
                engine.sync().expect("there is room");
            }
        }
        assert!(content(&*engine) == model, "{pages} pages");
        if step % 5 == 0 {
            drop(engine);
            disk.leave(pages / 4);
            engine = open(&path).unwrap_or_else(|error| {
                assert!(error.is_full(), "{pages} pages: {error}");
                refused[2] += 1;
                disk.give_back();
                open(&path).expect("there is room")
            });
            assert!(content(&*engine) == model, "{pages} pages");
        }
        disk.give_back();
    }
    println!("refused: runs, syncs, openings: {refused:?}");
    assert!(refused[0] > 20 && refused[1] > 20, "the case is one: {refused:?}");
    drop(engine);
    let engine = open(&path).expect("opened");
    assert!(engine.disk_bytes() < 4 << 20, "remains are there: {} bytes", engine.disk_bytes());
}

type Told = (FlushStep, ReplicaId);

struct Tells(Mutex<mpsc::Sender<Told>>);

impl FlushSink for Tells {
    fn flushed(&self, step: FlushStep, batch: Vec<(ReplicaId, Incarnation, Position)>) {
        let told = self.0.lock().expect("locked");
        // A test that has failed listens no more.
        batch.into_iter().for_each(|(replica, ..)| told.send((step, replica)).unwrap_or_default());
    }
}

fn state(engine: Arc<dyn Store>, replica: u64) -> ReplicaState {
    let initial = StateHeader {
        applied: GROUP_START,
        revision: 0,
        log_time: 0,
        epoch: Epoch { range: 1, conf: 1 },
        members: Vec::new(),
        conf_state: Default::default(),
    };
    ReplicaState::open(engine, ReplicaId(replica), 0, initial).expect("opened")
}

/// What a replica that has written so many MiB has to flush.
fn frozen(engine: Arc<dyn Store>, replica: u64, mib: u64) -> Arc<Frozen> {
    let mut state = state(engine, replica);
    for number in 0..mib * 16 {
        // Not to be made smaller by anybody.
        let mut noise = number + replica;
        let value: Vec<u8> = std::iter::repeat_with(|| {
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (noise >> 56) as u8
        })
        .take(1 << 16)
        .collect();
        state.put(&number.to_be_bytes(), value.into());
    }
    state.set_applied(Position { index: 6, term: 5 });
    state.freeze().expect("a change")
}

/// Of 24 MiB that are to be flushed there is room for one half: the least goes whole, the next as far as its file.
#[test]
fn what_there_is_room_for_is_flushed_and_the_rest_goes_on_when_there_is_more() {
    let name = "what_there_is_room_for_is_flushed_and_the_rest_goes_on_when_there_is_more";
    let Some(disk) = Disk::small(name, 96) else { return };
    for killed in [false, true] {
        let (path, redo) =
            (disk.path.join(format!("state-{killed}")), disk.path.join(format!("redo-{killed}")));
        let engine = open(&path).expect("opened");
        let flusher = Flusher::open(redo.clone(), engine.clone()).expect("opened");
        let fatal = Fatal::new();
        let (thread, joined) =
            FlushThread::start(flusher, fatal.clone(), Pulse::default()).expect("a thread");
        let (told, steps) = mpsc::channel();
        let sink = Arc::new(Tells(Mutex::new(told)));
        disk.leave(15 << 20 >> 12);
        // None is flushed before all are there.
        let (all_are_there, waits) = mpsc::channel();
        thread.run(Box::new(move |_| waits.recv().expect("they come")));
        for (replica, mib) in [(1, 14), (2, 6), (3, 4)] {
            let frozen = frozen(engine.clone(), replica, mib);
            thread.submit(FlushJob { incarnation: 1, frozen, done: sink.clone() });
        }
        all_are_there.send(()).expect("it waits");
        let next =
            || steps.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("it waits: {:?}", fatal.reason()));
        let (least, middle) = (ReplicaId(3), ReplicaId(2));
        assert_eq!(next(), (FlushStep::Logged, least));
        assert_eq!(next(), (FlushStep::Absorbed, least));
        assert_eq!(next(), (FlushStep::Logged, middle), "for its file there is room");
        std::thread::sleep(Duration::from_secs(1));
        assert!(
            steps.try_recv().is_err() && fatal.reason().is_none(),
            "it has no room: {:?}",
            fatal.reason()
        );
        assert_eq!(state(engine.clone(), 2).header().applied, GROUP_START);
        if !killed {
            disk.give_back();
            assert_eq!(next(), (FlushStep::Absorbed, middle));
            assert_eq!(next(), (FlushStep::Logged, ReplicaId(1)));
            assert_eq!(next(), (FlushStep::Absorbed, ReplicaId(1)));
        }
        thread.close();
        joined.join().expect("it ends, whether there is room or not");
        disk.give_back();
        drop(engine);
        let engine = open(&path).expect("opened");
        drop(Flusher::open(redo.clone(), engine.clone()).expect("the file is what the state store lacks"));
        for (replica, mib) in [(1, 14), (2, 6), (3, 4)] {
            let flushed = replica > 1 || !killed;
            let state = state(engine.clone(), replica);
            assert_eq!(state.header().applied.index > GROUP_START.index, flushed, "{replica}");
            for number in 0..mib * 16u64 {
                let found = state.get(&number.to_be_bytes()).expect("read");
                assert_eq!(found.is_some_and(|value| value.len() == 1 << 16), flushed, "{replica}: {number}");
            }
        }
        assert_eq!(std::fs::read_dir(&redo).expect("listed").count(), 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_on_a_full_disk_loses_nothing_and_takes_writes_when_there_is_room() {
    let name = "a_node_on_a_full_disk_loses_nothing_and_takes_writes_when_there_is_room";
    let Some(disk) = Disk::small(name, 256) else { return };
    let options = Options { extra: "reserve_bytes = \"0\"\n".into(), ..Options::default() };
    let mut cluster = Cluster::prepared(1, &free_ports(2), options);
    // Its directory alone: what it logs is to be read.
    let node = &cluster.nodes[0];
    let text = std::fs::read_to_string(&node.config).expect("its settings");
    let data = format!("{:?}", node.data);
    assert!(text.contains(&data), "{text}");
    let text = text.replace(&data, &format!("{:?}", disk.path.join("n1")));
    std::fs::write(&node.config, text).expect("its settings");
    cluster.spawn(0);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    cluster.database(&client, "full", 1, 2).await;
    let (hasty, patient) = (
        client.database("full").with_timeout(Duration::from_secs(2)),
        client.database("full").with_timeout(PATIENCE),
    );
    // Values tell their keys. An attempt that failed may have been carried out, so no key is used again.
    let value = |key: &str| key.repeat(4000);
    let (mut acknowledged, mut number) = (Vec::new(), 0);
    for pages in [6_000, 2_500, 300, 40] {
        disk.leave(pages);
        let begun = Instant::now();
        loop {
            let key = format!("key-{number:08}");
            number += 1;
            match hasty.put(key.clone(), value(&key)).await {
                Ok(_) => acknowledged.push(key),
                Err(error) => {
                    println!("{pages} pages: after {number} writes: {error}");
                    break;
                }
            }
            assert!(begun.elapsed() < PATIENCE, "{pages} pages: it never fills");
        }
        for key in acknowledged.iter().rev().step_by(7).take(40) {
            // Without a reserve there may be entries that are committed and find no room to be applied: then it is busy.
            match hasty.get(key.clone()).await {
                Ok(found) => assert!(found.expect("it is there").value == value(key).as_bytes(), "{key}"),
                Err(error) => {
                    assert!(
                        error.to_string().contains("too much is in flight"),
                        "{error}:\n{}",
                        cluster.log(0)
                    );
                    break;
                }
            }
        }
        assert!(cluster.ended(0).is_none(), "{pages} pages: it ended:\n{}", cluster.log(0));
        disk.give_back();
        let key = format!("room-{pages}");
        patient.put(key.clone(), value(&key)).await.expect("there is room");
        acknowledged.push(key);
    }
    for again in [false, true] {
        if again {
            cluster.kill(0);
            cluster.spawn(0);
            cluster.wait_ready(0);
        }
        for key in &acknowledged {
            let found = patient.get(key.clone()).await.expect("a read").expect("it is there");
            assert!(found.value == value(key).as_bytes(), "{key}");
        }
    }
    let log = cluster.log(0);
    assert!(!log.contains("set aside") && !log.contains("is lost"), "{log}");
    client.close().await;
}
