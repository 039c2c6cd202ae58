//! Nodes that were away for longer than the log is kept for them, or have lost their state store: they come
//! back by a snapshot, while writes go on, whatever is cut or killed on the way, and with every key as the
//! others have it.

#[path = "support/cluster.rs"]
mod cluster;
#[path = "support/proxy.rs"]
mod proxy;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cluster::{Cluster, Options, free_ports, http_get, metric};
use pontoon::client::{Client, Database};
use pontoon::codec::hello::Lane;
use pontoon::group::types::GroupStatus;
use pontoon::ids::{GROUP_START, METADATA_SHARD, NodeId, ShardId};
use pontoon::node::handle::{NodeReport, ReplicaHealth};
use pontoon::storage::StorageError;
use pontoon::storage::identity::{DataDir, IdentityError};
use pontoon::storage::log::LogStore;
use pontoon::storage::log_disk::{DiskLog, DiskLogOptions};
use proxy::Network;

const LONG: Duration = Duration::from_secs(60);
const KEYS: usize = 120;
const VALUE_BYTES: usize = 64 * 1024;

/// Three daemons with small logs and slow snapshots, and one database of one shard.
struct Setting {
    cluster: Cluster,
    http: Vec<u16>,
    client: Client,
    database: Database,
    network: Option<Network>,
}

/// Small logs: little is kept for who is away, and files are small enough to go.
fn settings(cluster: &Cluster, http: &[u16], snapshot_rate: &str) {
    for (node, port) in cluster.nodes.iter().zip(http) {
        let text = std::fs::read_to_string(&node.config).expect("its settings");
        let text = text
            .replace("memtable_bytes = \"32MiB\"", "memtable_bytes = \"16MiB\"\nlog_keep_bytes = \"64KiB\"")
            .replace("log_file_bytes = \"8MiB\"", "log_file_bytes = \"4MiB\"")
            .replace("log_bytes = \"64MiB\"", "log_bytes = \"16MiB\"");
        let more = format!(
            "[http]\nlisten = \"127.0.0.1:{port}\"\n[snapshot]\nbytes_per_second = \"{snapshot_rate}\"\n"
        );
        std::fs::write(&node.config, text + &more).expect("written");
    }
}

impl Setting {
    async fn new(snapshot_rate: &str, proxied: bool) -> Setting {
        let http = free_ports(3);
        let ports = free_ports(6);
        let targets: Vec<_> = ports[3..].iter().map(|port| ([127, 0, 0, 1], *port).into()).collect();
        let network = proxied.then(|| Network::new(&targets));
        let advertise =
            network.as_ref().map(|network| network.addresses().iter().map(|a| a.to_string()).collect());
        let mut cluster = Cluster::prepared(3, &ports, Options { advertise, ..Options::default() });
        settings(&cluster, &http, snapshot_rate);
        for node in 0..3 {
            cluster.spawn(node);
        }
        cluster.wait_all_ready();
        let client = cluster.client().await;
        let database = cluster.database(&client, "away", 3, 1).await.with_timeout(LONG);
        Setting { cluster, http, client, database, network }
    }

    fn shard(&self) -> ShardId {
        ShardId(1)
    }

    async fn report(&self, node: usize) -> Option<NodeReport> {
        let address = &self.cluster.nodes[node].client;
        self.client.node_report(address, Duration::from_secs(2)).await.ok()
    }

    /// The node that a shard's leader is on, by index.
    async fn leader(&self) -> usize {
        let begun = Instant::now();
        loop {
            for node in 0..3 {
                let leads = self.report(node).await.is_some_and(|report| {
                    report.replicas.iter().any(|r| {
                        let leads = |g: &GroupStatus| g.role == raft::StateRole::Leader;
                        r.shard == self.shard() && r.group.as_ref().is_some_and(leads)
                    })
                });
                if leads {
                    return node;
                }
            }
            assert!(begun.elapsed() < LONG, "no leader");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Sum of a metric of a node; 0 if it has none yet.
    fn metric(&self, node: usize, name: &str) -> f64 {
        http_get(self.http[node], "/metrics").map_or(0.0, |(_, text)| metric(&text, name).unwrap_or(0.0))
    }

    async fn until(&self, what: &str, mut condition: impl AsyncFnMut(&Setting) -> bool) {
        let begun = Instant::now();
        while !condition(self).await {
            if begun.elapsed() > LONG {
                let logs: Vec<_> = (0..3).map(|node| self.cluster.log(node)).collect();
                panic!("never: {what}; the logs:\n{}", logs.join("\n---\n"));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Overwrites all keys, a few times.
    async fn fill(&self, round: u8, times: usize) {
        let keys: Vec<usize> = (0..times * KEYS).collect();
        // So many at a time that a file of the log isn't filled by one write.
        for keys in keys.chunks(20) {
            let puts = keys.iter().map(|number| {
                let (time, key) = (number / KEYS, number % KEYS);
                let value = vec![round.wrapping_add(time as u8).wrapping_add(key as u8); VALUE_BYTES];
                self.database.put(format!("key-{key}"), value)
            });
            for put in futures_util::future::join_all(puts).await {
                put.expect("written");
            }
        }
    }

    /// What a node tells of its replica's log.
    async fn group(&self, node: usize) -> Option<GroupStatus> {
        let report = self.report(node).await?;
        report.replicas.into_iter().find(|replica| replica.shard == self.shard())?.group
    }

    /// Kills a node that doesn't lead, and writes until its place in the log is gone, wherever the leader is then.
    async fn leave_one_behind(&mut self) -> usize {
        self.fill(1, 1).await;
        let leader = self.leader().await;
        let victim = (leader + 1) % 3;
        let has = self.group(leader).await.expect("the leader's log").last;
        self.cluster.kill(victim);
        // Much of the log is kept for who is away for a moment, and a quick disk takes all this in one.
        let begun = Instant::now();
        loop {
            self.fill(50, 3).await;
            let mut others = Vec::new();
            for node in (0..3).filter(|node| *node != victim) {
                others.push(self.group(node).await.map_or(0, |group| group.truncated));
            }
            if others.iter().all(|truncated| *truncated > has) {
                return victim;
            }
            assert!(begun.elapsed() < 3 * LONG, "never: logs without {has}; they begin behind {others:?}");
        }
    }

    /// Kills nodes at a moment at which none of them could make its state from its log alone.
    async fn kill_compacted(&mut self, nodes: &[usize]) {
        let begun = Instant::now();
        loop {
            nodes.iter().for_each(|node| self.cluster.kill(*node));
            if nodes.iter().all(|node| is_compacted(&self.cluster.nodes[*node].data)) {
                return;
            }
            assert!(begun.elapsed() < LONG, "never: compacted logs");
            nodes.iter().for_each(|node| self.cluster.spawn(*node));
            nodes.iter().for_each(|node| drop(self.cluster.wait_ready(*node)));
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    /// Takes a node that is down its state store.
    fn lose_state(&self, node: usize) {
        for part in ["state", "redo"] {
            std::fs::remove_dir_all(self.cluster.nodes[node].data.join(part)).expect("removed");
        }
    }

    /// How a node's replica of a shard is.
    async fn health(&self, node: usize, shard: ShardId) -> Option<ReplicaHealth> {
        let report = self.report(node).await?;
        report.replicas.into_iter().find(|replica| replica.shard == shard).map(|replica| replica.health)
    }

    /// Waits until a node has applied all that the others have committed.
    async fn caught_up(&self, node: usize) {
        self.until("a replica without a lag", async |setting| {
            let mut applied = 0;
            let mut committed = 0;
            for other in 0..3 {
                let Some(report) = setting.report(other).await else { continue };
                let group = report.replicas.iter().find(|r| r.shard == setting.shard());
                let Some(group) = group.and_then(|r| r.group.as_ref()) else { continue };
                committed = committed.max(group.committed);
                if other == node {
                    applied = group.applied;
                }
            }
            applied > 0 && applied + 2 >= committed
        })
        .await;
    }

    /// Every key as `expected` says, read from this node's own state: it leads.
    async fn assert_content(&self, node: usize, expected: u8) {
        let to = NodeId(self.report(node).await.expect("its report").node.0);
        let begun = Instant::now();
        while self.leader().await != node {
            if let Err(error) = self.client.transfer_leader(self.shard(), to, Duration::from_secs(5)).await {
                assert!(begun.elapsed() < LONG, "{error}");
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        for key in 0..KEYS {
            let found = self.database.get(format!("key-{key}")).await.expect("a read").expect("there");
            let value = vec![expected.wrapping_add(key as u8); VALUE_BYTES];
            assert!(found.value == value, "key-{key} is {} of {}", found.value[0], found.value.len());
        }
        assert_eq!(self.leader().await, node, "another node was read from");
    }
}

/// Writes small values under keys of their own until it is stopped; counts what went wrong.
struct Load {
    stop: Arc<AtomicBool>,
    writes: Arc<AtomicU64>,
    writers: Vec<tokio::task::JoinHandle<Vec<String>>>,
}

impl Load {
    fn start(database: &Database) -> Load {
        let (stop, writes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let writers = (0..4).map(|writer| {
            let (database, stop, writes) = (database.clone(), stop.clone(), writes.clone());
            tokio::spawn(async move {
                let mut errors = Vec::new();
                for number in 0u64.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    if let Err(error) = database.put(format!("load-{writer}"), number.to_string()).await {
                        errors.push(error.to_string());
                    }
                    writes.fetch_add(1, Ordering::Relaxed);
                }
                errors
            })
        });
        Load { writers: writers.collect(), stop, writes }
    }

    async fn stop(self) -> (u64, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        let mut errors = Vec::new();
        for writer in self.writers {
            errors.extend(writer.await.expect("a writer"));
        }
        (self.writes.load(Ordering::Relaxed), errors)
    }
}

/// Refusals of a node because something was full.
fn busy(setting: &Setting, node: usize) -> f64 {
    let (_, text) = http_get(setting.http[node], "/metrics").expect("metrics");
    let lines = text.lines().filter(|line| line.contains("reason=\"busy\""));
    lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
}

/// Whether the logs of all replicas in a node's directory, but for the metadata, begin later than they did.
fn is_compacted(data: &Path) -> bool {
    let dir = DataDir::open(data).expect("its directory");
    let options = DiskLogOptions { file_bytes: 4 << 20, purge_bytes: 16 << 20, spare_files: 0 };
    // A process that another test starts at this moment has our locks too, until it has become another program.
    let begun = Instant::now();
    let log = loop {
        match DiskLog::open_existing(&dir.log_path(), options, dir.store_id()) {
            Err(StorageError::Identity(IdentityError::InUse { .. })) if begun.elapsed() < LONG => {
                std::thread::sleep(Duration::from_millis(10));
            }
            opened => break opened.expect("its log"),
        }
    };
    let records = log.catalogue().expect("its replicas");
    let mut replicas = records.iter().filter(|record| record.shard != METADATA_SHARD);
    replicas.all(|record| log.load(record.replica).expect("a log").truncated != GROUP_START)
}

fn bytes_under(path: &Path) -> u64 {
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    entries.map(|entry| entry.metadata().map_or(0, |metadata| metadata.len())).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_away_too_long_comes_back_by_a_snapshot_while_writes_go_on() {
    let mut setting = Setting::new("4MiB", false).await;
    let victim = setting.leave_one_behind().await;
    let leader = setting.leader().await;
    let load = Load::start(&setting.database);
    let before = busy(&setting, leader);
    setting.cluster.spawn(victim);
    setting.cluster.wait_ready(victim);
    setting
        .until("a replica that says it is installing", async |setting| {
            let report = setting.report(victim).await;
            report.is_some_and(|r| r.replicas.iter().any(|r| r.health == ReplicaHealth::Installing))
        })
        .await;
    setting
        .until("an installed snapshot", async |s| {
            s.metric(victim, "pontoon_snapshots_installed_total") >= 1.0
        })
        .await;
    setting.caught_up(victim).await;
    assert_eq!(busy(&setting, leader), before, "writes were refused for a snapshot");
    let (writes, errors) = load.stop().await;
    assert_eq!(errors, Vec::<String>::new());
    assert!(writes > 100, "{writes} writes meanwhile");
    assert!(setting.metric(leader, "pontoon_snapshots_sent_total") >= 1.0);
    setting.assert_content(victim, 52).await;

    // What it had before goes, and what was received; and it starts from what it has now.
    let received = setting.cluster.nodes[victim].data.join("snapshots/in");
    setting.until("no received files", async |_| bytes_under(&received) == 0).await;
    setting.cluster.kill(victim);
    setting.cluster.spawn(victim);
    setting.cluster.wait_ready(victim);
    setting.caught_up(victim).await;
    setting.assert_content(victim, 52).await;
    setting.client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_whose_connection_is_cut_goes_on_where_it_ended() {
    let mut setting = Setting::new("2MiB", true).await;
    let victim = setting.leave_one_behind().await;
    setting.cluster.spawn(victim);
    setting.cluster.wait_ready(victim);
    for _ in 0..2 {
        setting
            .until("two megabytes of a snapshot", async |setting| {
                setting.network.as_ref().expect("proxies").passed(Lane::Snapshot) > 2 << 20
            })
            .await;
        setting.network.as_ref().expect("proxies").break_lane(Lane::Snapshot);
    }
    setting
        .until("an installed snapshot", async |s| {
            s.metric(victim, "pontoon_snapshots_installed_total") >= 1.0
        })
        .await;
    let resumed: f64 = (0..3).map(|n| setting.metric(n, "pontoon_snapshots_resumed_total")).sum();
    let made: f64 = (0..3).map(|n| setting.metric(n, "pontoon_snapshots_made_total")).sum();
    assert!(resumed >= 2.0, "{resumed} resumed");
    assert_eq!(made, 1.0, "one file serves all attempts");
    setting.caught_up(victim).await;
    setting.assert_content(victim, 52).await;
    setting.client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_that_is_killed_goes_on_with_what_it_has() {
    let mut setting = Setting::new("2MiB", false).await;
    let victim = setting.leave_one_behind().await;
    let received = setting.cluster.nodes[victim].data.join("snapshots/in");
    setting.cluster.spawn(victim);
    setting.cluster.wait_ready(victim);
    setting.until("two megabytes of a snapshot", async |_| bytes_under(&received) > 2 << 20).await;
    setting.cluster.kill(victim);
    assert!(bytes_under(&received) > 2 << 20, "what was received is kept");
    setting.cluster.spawn(victim);
    setting.cluster.wait_ready(victim);
    setting
        .until("an installed snapshot", async |s| {
            s.metric(victim, "pontoon_snapshots_installed_total") >= 1.0
        })
        .await;
    let resumed: f64 = (0..3).map(|n| setting.metric(n, "pontoon_snapshots_resumed_total")).sum();
    assert!(resumed >= 1.0, "{resumed} resumed");
    setting.caught_up(victim).await;
    setting.assert_content(victim, 52).await;
    setting.client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sender_that_is_killed_is_followed_by_the_next_leader() {
    let mut setting = Setting::new("2MiB", false).await;
    let victim = setting.leave_one_behind().await;
    let leader = setting.leader().await;
    let received = setting.cluster.nodes[victim].data.join("snapshots/in");
    setting.cluster.spawn(victim);
    setting.cluster.wait_ready(victim);
    setting.until("two megabytes of a snapshot", async |_| bytes_under(&received) > 2 << 20).await;
    setting.cluster.kill(leader);
    setting
        .until("an installed snapshot", async |s| {
            s.metric(victim, "pontoon_snapshots_installed_total") >= 1.0
        })
        .await;
    setting.caught_up(victim).await;
    setting.assert_content(victim, 52).await;
    setting.cluster.spawn(leader);
    setting.cluster.wait_ready(leader);
    setting.caught_up(leader).await;
    setting.client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_stays_bounded_while_a_node_is_dead() {
    let mut setting = Setting::new("64MiB", false).await;
    let victim = setting.leave_one_behind().await;
    setting.fill(100, 20).await;
    // Some 180 MiB were written since the node has died. Purges come every ten seconds; the engine keeps
    // files for reuse, half as many again as the bound has room for.
    let mut last = Vec::new();
    setting
        .until("logs of a fraction of that", async |setting| {
            let logs = (0..3).filter(|node| *node != victim);
            last = logs.map(|node| bytes_under(&setting.cluster.nodes[node].data.join("log"))).collect();
            last.iter().max() < Some(&(96 << 20))
        })
        .await;
    println!("{last:?} bytes of log");
    setting.client.close().await;
}

fn refetches(health: &Option<ReplicaHealth>) -> bool {
    matches!(health, Some(ReplicaHealth::Refetching(why)) if why.contains("its log begins after"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_its_state_store_counts_for_a_majority_and_gets_its_state_from_the_others() {
    let mut setting = Setting::new("1MiB", false).await;
    setting.fill(1, 2).await;
    let leader = setting.leader().await;
    let (victim, third) = ((leader + 1) % 3, (leader + 2) % 3);
    setting.kill_compacted(&[victim]).await;
    setting.lose_state(victim);
    setting.cluster.spawn(victim);
    setting.cluster.wait_ready(victim);
    setting
        .until("a replica that says that its state is lost", async |setting| {
            refetches(&setting.health(victim, setting.shard()).await)
        })
        .await;
    let (status, why) = http_get(setting.http[victim], "/readyz").expect("an answer");
    assert_eq!(status, 503, "{why}");
    assert!(why.contains("refetching"), "{why}");
    let status = String::from_utf8(setting.cluster.run(&["status"]).stdout).expect("text");
    assert!(status.contains("refetching: the state store has none"), "{status}");

    // Without a third node, what it acknowledges is what makes a majority.
    setting.cluster.kill(third);
    assert!(refetches(&setting.health(victim, setting.shard()).await), "too fast to see");
    setting.fill(9, 1).await;
    let begun = Instant::now();
    setting
        .until("a whole replica", async |setting| {
            setting.health(victim, setting.shard()).await == Some(ReplicaHealth::Serving)
        })
        .await;
    println!("whole {:?} after the writes", begun.elapsed());
    for (name, least) in [("pontoon_states_lost_total", 1.0), ("pontoon_states_refetched_total", 1.0)] {
        assert!(setting.metric(victim, name) >= least, "{name}");
    }
    assert!(setting.cluster.log(victim).contains("the replica's state is lost"), "a line in the log");
    assert_eq!(http_get(setting.http[victim], "/readyz").expect("an answer").0, 200);
    setting.caught_up(victim).await;
    setting.assert_content(victim, 9).await;

    // It starts from what it has now.
    setting.cluster.spawn(third);
    setting.cluster.wait_ready(third);
    setting.cluster.kill(victim);
    setting.cluster.spawn(victim);
    setting.cluster.wait_ready(victim);
    setting.caught_up(victim).await;
    setting.assert_content(victim, 9).await;
    setting.client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_that_nobody_has_any_more_is_told_as_such_and_the_nodes_live_on() {
    let mut setting = Setting::new("64MiB", false).await;
    setting.fill(1, 2).await;
    let single = setting.cluster.database(&setting.client, "single", 1, 1).await.with_timeout(LONG);
    let replicated = std::mem::replace(&mut setting.database, single);
    setting.fill(1, 2).await;
    setting.database = replicated;
    setting.kill_compacted(&[0, 1, 2]).await;
    for node in 0..3 {
        setting.lose_state(node);
        setting.cluster.spawn(node);
    }
    setting.cluster.wait_all_ready();
    for node in 0..3 {
        let health = setting.health(node, setting.shard()).await;
        assert!(refetches(&health), "{health:?}");
    }
    let failed = async |setting: &Setting, node| match setting.health(node, ShardId(2)).await {
        Some(ReplicaHealth::Failed(why)) => Some(why),
        _ => None,
    };
    let mut whys = Vec::new();
    for node in 0..3 {
        whys.extend(failed(&setting, node).await);
    }
    assert_eq!(whys.len(), 1, "one node has the only copy");
    assert!(whys[0].contains("only copy is lost") && whys[0].contains("backup"), "{}", whys[0]);
    let status = setting.cluster.run(&["status"]);
    let text = String::from_utf8(status.stdout).expect("text");
    assert!(text.contains("1 shard has lost its state at every replica"), "{text}");
    // Nobody leads, so nobody makes up a state.
    let read = setting.database.clone().with_timeout(Duration::from_secs(2)).get("key-1").await;
    assert!(read.is_err(), "{read:?}");
    setting.client.close().await;
}
