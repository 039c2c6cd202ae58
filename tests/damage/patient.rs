//! Three nodes with data in them, one of which is stopped, damaged and started again, and what must hold
//! of it then.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::join_all;
use pontoon::client::{Cas, Client, Database};
use pontoon::ids::{NodeId, ShardId};
use pontoon::machine::command::Expect;
use pontoon::node::handle::ReplicaHealth;
use pontoon::storage::engine_kind::EngineKind;
use raft::StateRole;
use rustix::process::{Pid, Signal, kill_process};

use crate::cluster::{Cluster, Options, STOPPED, free_ports, http_get};
use crate::files::{Class, Damage, copy_all, files, remove};

/// Which of the nodes.
const NODE: usize = 2;

const COUNTER: &str = "counter";
const LARGE_BYTES: usize = 60_000;
/// More than half of what the memtables may hold: a round over them has them flushed.
const LARGE_KEYS: u64 = 160;

/// Keys that go round these values.
const TURNED_KEYS: usize = 24;
const TURNS: [&str; 3] = ["a", "b", "c"];

/// How long a node may take to start, and to be whole again: on a machine that does much else, too.
const WHOLE: Duration = Duration::from_secs(240);

/// How a node was stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    Clean,
    Kill,
    /// Killed, after it has written its memtables to the state store since the last time.
    Flushed,
    /// Killed while it did so.
    InFlush,
    /// Killed while it received the state of a replica.
    InInstall,
}

/// What came of a damage.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Outcome {
    /// The node started, and had everything.
    Whole,
    /// The node started, made the file anew, and had everything.
    Remade,
    /// The node started, and got its state from the others.
    Refetched,
    /// It didn't start, and said what to do.
    Refused,
}

pub struct Patient {
    cluster: Cluster,
    client: Client,
    database: Database,
    shards: Vec<ShardId>,
    http: u16,
    /// What was acknowledged: each key's value.
    model: BTreeMap<String, String>,
    count: u64,
    writes: u64,
    /// How, unless it runs.
    stopped: Option<Stop>,
    /// Kills at a chosen moment so far: each comes a little later in what goes on then.
    kills: u64,
    /// The directory as it was when the node stopped last, and the time before that.
    copy: PathBuf,
    older: PathBuf,
}

impl Patient {
    /// With its state on that engine.
    pub async fn new(engine: EngineKind) -> Patient {
        let ports = free_ports(7);
        let mut cluster = Cluster::prepared(3, &ports[..6], Options::default());
        for (index, node) in cluster.nodes.iter().enumerate() {
            let mut text = fs::read_to_string(&node.config).expect("its settings");
            for (key, from, to) in [
                ("memtable_bytes", "32MiB", "16MiB"),
                ("log_file_bytes", "8MiB", "1MiB"),
                ("log_bytes", "64MiB", "16MiB\"\nlog_keep_bytes = \"64KiB"),
            ] {
                let (from, to) = (format!("{key} = \"{from}\""), format!("{key} = \"{to}\""));
                assert!(text.contains(&from), "{from} in {text}");
                text = text.replace(&from, &to);
            }
            text.push_str(&format!("engine = \"{engine}\"\n"));
            // Slow enough to be killed meanwhile.
            text.push_str("[snapshot]\nbytes_per_second = \"16MiB\"\n");
            if index == NODE {
                text.push_str(&format!("[http]\nlisten = \"127.0.0.1:{}\"\n", ports[6]));
            }
            fs::write(&node.config, text).expect("its settings");
        }
        for node in 0..3 {
            cluster.spawn(node);
        }
        cluster.wait_all_ready();
        let client = cluster.client().await;
        let database = cluster.database(&client, "db", 3, 2).await.with_timeout(WHOLE);
        let shards = client.map().await.expect("the map").shards.keys().copied().collect();
        let (copy, older) = (cluster.dir.path().join("copy"), cluster.dir.path().join("older"));
        let (model, http) = (BTreeMap::new(), ports[6]);
        let mut patient = Patient {
            cluster,
            client,
            database,
            shards,
            http,
            model,
            count: 0,
            writes: 0,
            stopped: None,
            kills: 0,
            copy,
            older,
        };
        // More than the log keeps, so that old files are freed and what they still held is written anew.
        patient.fill(16 << 20).await;
        let log = patient.dir().join("log");
        let begun = Instant::now();
        while log.join("0000000000000001.raftlog").exists() {
            assert!(begun.elapsed() < WHOLE, "its log is never purged: {:?}", files(&log));
            // It is purged for what it holds, and on a busy machine little writes fill it in no time that would do.
            patient.fill(1 << 20).await;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        patient.write(64 << 10).await;
        patient
    }

    fn dir(&self) -> PathBuf {
        self.cluster.nodes[NODE].data.clone()
    }

    /// Writes until the log has so many bytes more, in large values.
    async fn fill(&mut self, bytes: usize) {
        let mut left = bytes;
        while left > 0 {
            let writes = (left / LARGE_BYTES).clamp(1, 16) as u64;
            let keys: Vec<(String, String)> = (0..writes)
                .map(|write| {
                    let number = self.writes + write;
                    (format!("large-{}", number % LARGE_KEYS), format!("{number:0>LARGE_BYTES$}"))
                })
                .collect();
            self.writes += writes;
            let puts = keys.iter().map(|(key, value)| self.database.put(key.clone(), value.clone()));
            for result in join_all(puts).await {
                result.expect("a write");
            }
            self.model.extend(keys);
            self.turn().await;
            left = left.saturating_sub(writes as usize * LARGE_BYTES);
        }
    }

    /// Turns each of some keys to its next value, if it has the one before. Done again to a state that is
    /// partly ahead, as half a flush is, that ends elsewhere.
    async fn turn(&mut self) {
        let turns: Vec<(String, &str, &str)> = (0..TURNED_KEYS)
            .map(|key| {
                let key = format!("turned-{key}");
                let now = self.model.get(&key).map_or("", String::as_str);
                let at = TURNS.iter().position(|turn| *turn == now).unwrap_or(TURNS.len() - 1);
                (key, TURNS[at], TURNS[(at + 1) % TURNS.len()])
            })
            .collect();
        let sent = turns.iter().map(|(key, from, to)| {
            let expect = match self.model.contains_key(key) {
                true => Expect::Value(Bytes::from_static(from.as_bytes())),
                false => Expect::Absent,
            };
            self.database.cas(key.clone(), expect, *to)
        });
        for result in join_all(sent).await {
            assert!(matches!(result.expect("a turn"), Cas::Written(_)), "nobody else turns it");
        }
        self.model.extend(turns.into_iter().map(|(key, _, to)| (key, to.to_owned())));
    }

    /// Small writes of each kind, and large ones.
    async fn write(&mut self, bytes: usize) {
        self.fill(bytes).await;
        for _ in 0..16 {
            self.writes += 1;
            let (key, value) = (format!("small-{}", self.writes % 50), self.writes.to_string());
            self.database.put(key.clone(), value.clone()).await.expect("a write");
            self.model.insert(key, value);
        }
        let key = format!("small-{}", self.writes % 7);
        let found = self.database.delete(key.clone()).await.expect("a delete");
        assert_eq!(found.is_some(), self.model.remove(&key).is_some(), "{key}");
        self.add().await;
    }

    /// Adds one to a counter, once.
    async fn add(&mut self) {
        let found = self.database.get(COUNTER).await.expect("a read");
        let (expect, count) = match &found {
            None => (Expect::Absent, 0),
            Some(found) => (Expect::Version(found.version), number(&found.value)),
        };
        assert_eq!(count, self.count, "additions were lost or made twice");
        let written = self.database.cas(COUNTER, expect, (count + 1).to_string()).await.expect("an addition");
        assert!(matches!(written, Cas::Written(_)), "nobody else adds");
        self.count += 1;
        self.model.insert(COUNTER.into(), self.count.to_string());
    }

    /// Stops the node, and takes a copy of its directory.
    async fn stop(&mut self, stop: Stop) {
        let found = match stop {
            Stop::InFlush => Class::RedoFile,
            _ => Class::SnapshotFile,
        };
        match stop {
            Stop::Kill => self.cluster.kill(NODE),
            Stop::Flushed => {
                self.fill(10 << 20).await;
                tokio::time::sleep(Duration::from_millis(500)).await;
                self.cluster.kill(NODE);
            }
            Stop::Clean => {
                self.cluster.signal(NODE, Signal::TERM);
                assert_eq!(self.cluster.wait_exit(NODE, STOPPED).code(), Some(0));
                // The stores were closed: there is no room behind the log's end any more.
                let last = Class::LogLast.find(&self.dir()).expect("a file of the log");
                assert!(!fs::read(&last).expect("reading").ends_with(&[0; 64]), "{last:?} wasn't closed");
            }
            Stop::InFlush | Stop::InInstall => {
                // What is looked for may be gone again before the node is: sooner, the quicker the disk.
                let mut attempts = 0;
                loop {
                    let after = Duration::from_millis(40 * self.kills % 160) / (1 << attempts);
                    self.kill_at(stop, found, after).await;
                    self.kills += 1;
                    if is_there(found, &self.dir()) {
                        break;
                    }
                    attempts += 1;
                    assert!(attempts < 20, "{found} is never there when it is killed");
                    self.cluster.spawn(NODE);
                    self.cluster.wait_ready(NODE);
                    self.whole().await;
                }
            }
        }
        // What an operator does once the node is whole.
        for name in fs::read_dir(self.dir()).expect("listing") {
            let path = name.expect("an entry").path();
            if path.to_string_lossy().contains(".aside-") {
                remove(&path);
            }
        }
        if self.older.exists() {
            remove(&self.older);
        }
        if self.copy.exists() {
            fs::rename(&self.copy, &self.older).expect("renaming");
        }
        copy_all(&self.dir(), &self.copy);
        self.stopped = Some(stop);
    }

    /// Kills the node so long after it has such a file.
    async fn kill_at(&mut self, stop: Stop, found: Class, after: Duration) {
        if stop == Stop::InInstall {
            self.fill(10 << 20).await;
            self.cluster.kill(NODE);
            for gone in [Class::State, Class::StateSums] {
                if let Some(gone) = gone.find(&self.dir()) {
                    remove(&gone);
                }
            }
            self.cluster.spawn(NODE);
        }
        let (dir, pid) = (self.dir(), self.cluster.pid(NODE));
        let killer = std::thread::spawn(move || {
            let begun = Instant::now();
            while !is_there(found, &dir) {
                assert!(begun.elapsed() < Duration::from_secs(120), "there is never {found}");
                // A redo file is there for some milliseconds, and on a busy machine who sleeps comes too late.
                std::thread::yield_now();
            }
            std::thread::sleep(after);
            let pid = Pid::from_raw(pid as i32).expect("a pid");
            kill_process(pid, Signal::KILL).expect("killing it");
        });
        while !killer.is_finished() {
            match stop {
                Stop::InFlush => self.fill(512 << 10).await,
                _ => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
        killer.join().expect("it was seen");
        self.cluster.kill(NODE);
    }

    /// Stops the node, damages it, and starts it again. What came of it; `None`: there was nothing to damage.
    pub async fn try_out(&mut self, class: Class, damage: Damage, stop: Stop) -> Option<Outcome> {
        if self.stopped.is_some_and(|stopped| stopped != stop) {
            self.cluster.spawn(NODE);
            self.cluster.wait_ready(NODE);
            self.whole().await;
            self.stopped = None;
        }
        if self.stopped.is_none() {
            self.write(64 << 10).await;
            self.stop(stop).await;
        }
        let (dir, older) = (self.dir(), self.older.clone());
        if !damage.inflict(class, &dir, &older) {
            return None;
        }
        // What it must fetch, or learn by its log.
        self.write(64 << 10).await;
        let log = self.cluster.nodes[NODE].config.with_extension("log");
        let before = fs::metadata(&log).map_or(0, |log| log.len() as usize);
        let said = move || {
            let text = fs::read(&log).expect("its log");
            String::from_utf8_lossy(&text[before..]).into_owned()
        };
        // Twice: what a first start has tidied up must not make a second one succeed.
        for attempt in 1..=2 {
            self.cluster.spawn(NODE);
            let Some(code) = self.cluster.ready_or_exit(NODE, WHOLE) else {
                assert_eq!(attempt, 1, "{class}, {damage}: it starts at the second attempt:\n{}", said());
                break;
            };
            let said = said();
            let last = said.lines().last().unwrap_or_default();
            println!("{class}, {damage}: exit {code:?}: {last}");
            assert_eq!(code, Some(2), "{class}, {damage}: {said}");
            assert!(last.contains("--rejoin"), "{class}, {damage}: it doesn't say what to do: {said}");
            assert!(last.contains(&dir.display().to_string()), "{class}, {damage}: it names no file: {said}");
            if attempt == 2 {
                // It hasn't run since: nobody was promised anything.
                remove(&dir);
                copy_all(&self.copy, &dir);
                return Some(Outcome::Refused);
            }
        }
        self.whole().await;
        self.all_there().await;
        let said = said();
        for line in said.lines().filter(|line| line.contains("WARN") || line.contains("ERROR")) {
            println!("{class}, {damage}: {line}");
        }
        // Others may warn of a slow machine.
        let told_by = ["WARN pontoon::storage", "WARN pontoon::node::start", "WARN pontoon::node::map_cache"];
        let outcome = if stop == Stop::InInstall {
            // Its state was lost before; what it had of another is made anew, damaged or not.
            Outcome::Remade
        } else if said.contains("state is lost") {
            Outcome::Refetched
        } else if said.lines().any(|line| told_by.iter().any(|by| line.contains(by))) {
            Outcome::Remade
        } else {
            Outcome::Whole
        };
        self.stopped = None;
        Some(outcome)
    }

    /// Waits until every replica of the node serves.
    async fn whole(&self) {
        let begun = Instant::now();
        loop {
            let report =
                self.client.node_report(&self.cluster.nodes[NODE].client, Duration::from_secs(2)).await;
            let replicas = report.as_ref().map_or(&[][..], |report| &report.replicas);
            let serve = replicas.iter().filter(|replica| replica.health == ReplicaHealth::Serving).count();
            let ready = http_get(self.http, "/readyz").is_ok_and(|(status, _)| status == 200);
            if serve == self.shards.len() && ready {
                return;
            }
            if begun.elapsed() > WHOLE {
                let health: Vec<_> = replicas.iter().map(|r| (r.shard, r.health.clone())).collect();
                panic!("not whole after {WHOLE:?}: {health:?}; its log:\n{}", self.cluster.log(NODE));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Makes the node the leader of every shard, and reads everything from it.
    async fn all_there(&mut self) {
        let report = self.client.node_report(&self.cluster.nodes[NODE].client, Duration::from_secs(2)).await;
        let node = report.expect("a report").node;
        let begun = Instant::now();
        loop {
            self.lead(node).await;
            let found = self.read_all().await;
            let led = self.led_by(node).await;
            if led {
                assert_eq!(found.len(), self.model.len());
                for (key, value) in &self.model {
                    let found = found.get(key).unwrap_or_else(|| panic!("{key} is gone"));
                    assert!(
                        found == value,
                        "{key}: {} was acknowledged, {} is there",
                        show(value),
                        show(found)
                    );
                }
                break;
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "it doesn't go on leading");
        }
        self.add().await;
    }

    async fn lead(&self, node: NodeId) {
        let begun = Instant::now();
        for shard in &self.shards {
            // A replica serves before it has all entries behind the snapshot it got, and is refused as a leader until then.
            while let Err(error) = self.client.transfer_leader(*shard, node, Duration::from_secs(20)).await {
                assert!(
                    begun.elapsed() < WHOLE,
                    "shard {shard}: {error}; its log:\n{}",
                    self.cluster.log(NODE)
                );
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }

    async fn led_by(&self, node: NodeId) -> bool {
        let report = self.client.node_report(&self.cluster.nodes[NODE].client, Duration::from_secs(2)).await;
        let report = report.expect("a report");
        assert_eq!(report.node, node);
        let leads = |replica: &pontoon::node::handle::ReplicaReport| {
            replica.group.as_ref().is_some_and(|group| group.role == StateRole::Leader)
        };
        report.replicas.iter().filter(|replica| leads(replica)).count() == self.shards.len()
    }

    async fn read_all(&self) -> BTreeMap<String, String> {
        let mut found = BTreeMap::new();
        let mut scan = self.database.scan(Default::default());
        loop {
            let page = scan.next_page().await.expect("a page");
            if page.is_empty() {
                return found;
            }
            for (key, value) in page {
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                found.insert(text(&key), text(&value.value));
            }
        }
    }
}

/// Whether there is such a file with something in it.
fn is_there(class: Class, dir: &Path) -> bool {
    class.find(dir).and_then(|path| fs::metadata(path).ok()).is_some_and(|file| file.len() > 4096)
}

fn number(value: &[u8]) -> u64 {
    String::from_utf8_lossy(value).parse().expect("a number")
}

fn show(value: &str) -> &str {
    let digits = value.trim_start_matches('0');
    if digits.is_empty() { "0" } else { digits }
}
