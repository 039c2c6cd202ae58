//! Nodes in the test's own process, for tests that look into them through their handles.
#![allow(dead_code)] // Each test binary uses its own part.

use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use pontoon::client::options::ClientOptions;
use pontoon::client::{Client, Database};
use pontoon::group::types::{Operation, Output};
use pontoon::ids::{METADATA_SHARD, ShardId};
use pontoon::machine::command::{Answer, Command, KvCommand, Query};
use pontoon::node::handle::NodeHandle;
use pontoon::node::{self, Listeners, RunningNode};
use pontoon::refusal::Refusal;
use pontoon::settings::Settings;

/// For whatever should take a moment, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A node that runs or not.
pub struct Local {
    pub settings: Settings,
    pub node: Option<RunningNode>,
}

/// Nodes of one cluster, started in an actor system of the test's.
pub struct LocalCluster {
    pub dir: tempfile::TempDir,
    pub nodes: Vec<Local>,
}

pub fn bind(address: SocketAddr) -> TcpListener {
    let begun = Instant::now();
    loop {
        match TcpListener::bind(address) {
            Ok(listener) => return listener,
            // A connection of the last holder may linger.
            Err(error) => assert!(begun.elapsed() < PATIENCE, "binding {address}: {error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn any_port() -> TcpListener {
    bind(SocketAddr::from(([127, 0, 0, 1], 0)))
}

impl LocalCluster {
    /// Starts `count` nodes that form a cluster, and waits until they have.
    pub async fn start(count: usize) -> LocalCluster {
        let cluster = LocalCluster::start_with(count, |peers| peers.to_vec()).await;
        cluster.wait_ready().await;
        cluster
    }

    /// The same without waiting; `advertise` makes the advertised peer addresses of the real ones.
    pub async fn start_with(
        count: usize,
        advertise: impl FnOnce(&[SocketAddr]) -> Vec<SocketAddr>,
    ) -> LocalCluster {
        LocalCluster::start_set(count, advertise, |_| ()).await
    }

    /// The same with settings that `alter` has seen.
    pub async fn start_set(
        count: usize,
        advertise: impl FnOnce(&[SocketAddr]) -> Vec<SocketAddr>,
        alter: impl Fn(&mut Settings),
    ) -> LocalCluster {
        let dir = tempfile::tempdir().expect("a directory");
        let ports: Vec<_> = (0..count).map(|_| (any_port(), any_port())).collect();
        let peers: Vec<_> = ports.iter().map(|(_, peer)| peer.local_addr().expect("an address")).collect();
        let advertised = advertise(&peers);
        let initial: Vec<_> = advertised.iter().map(ToString::to_string).collect();
        let mut nodes = Vec::new();
        for (i, (client, peer)) in ports.into_iter().enumerate() {
            let label = format!("n{}", i + 1);
            let address = client.local_addr().expect("an address");
            let mut settings =
                Settings::for_local_node(dir.path().join(&label), &label, address, peers[i], initial.clone());
            settings.peer.advertise = initial[i].clone();
            alter(&mut settings);
            let listeners = Listeners { client, peer, http: None };
            let node = node::start(settings.clone(), listeners).await.expect("starting");
            nodes.push(Local { settings, node: Some(node) });
        }
        LocalCluster { dir, nodes }
    }

    /// Starts one more node, which joins through the first.
    pub async fn join(&mut self) -> usize {
        let label = format!("n{}", self.nodes.len() + 1);
        let (client, peer) = (any_port(), any_port());
        let mut settings = Settings::for_local_node(
            self.dir.path().join(&label),
            &label,
            client.local_addr().expect("an address"),
            peer.local_addr().expect("an address"),
            Vec::new(),
        );
        settings.cluster.join = vec![self.nodes[0].settings.peer.advertise.clone()];
        let listeners = Listeners { client, peer, http: None };
        let node = node::start(settings.clone(), listeners).await.expect("starting");
        self.nodes.push(Local { settings, node: Some(node) });
        self.nodes.len() - 1
    }

    /// Starts a stopped node again, on the same ports.
    pub async fn restart(&mut self, node: usize) {
        let local = &mut self.nodes[node];
        assert!(local.node.is_none(), "it runs");
        let listeners = Listeners {
            client: bind(local.settings.client.listen),
            peer: bind(local.settings.peer.listen),
            http: None,
        };
        local.node = Some(node::start(local.settings.clone(), listeners).await.expect("starting"));
    }

    /// Stops a node cleanly.
    pub async fn stop(&mut self, node: usize) {
        let running = self.nodes[node].node.take().expect("running");
        running.stop(Duration::from_secs(5)).await.expect("stopping");
    }

    /// Stops all that run, at once.
    pub async fn stop_all(&mut self) {
        let running = self.nodes.iter_mut().filter_map(|local| local.node.take());
        let stops = running.map(|node| node.stop(Duration::from_secs(5)));
        for stopped in futures_util::future::join_all(stops).await {
            stopped.expect("stopping");
        }
    }

    /// Waits until every running node is ready and knows of all others.
    pub async fn wait_ready(&self) {
        let count = self.nodes.len();
        for local in &self.nodes {
            let Some(node) = &local.node else { continue };
            tokio::time::timeout(PATIENCE, node.ready()).await.expect("ready in time").expect("ready");
            let handle = node.handle();
            eventually("all nodes are in the map", || handle.map().nodes.len() >= count).await;
        }
    }

    /// A running node's handle.
    pub fn handle(&self, node: usize) -> NodeHandle {
        self.nodes[node].node.as_ref().expect("running").handle()
    }

    /// A client that knows all nodes.
    pub async fn client(&self) -> Client {
        let addresses: Vec<_> =
            self.nodes.iter().map(|local| local.settings.client.advertise.clone()).collect();
        Client::connect_with(ClientOptions::new(addresses)).await.expect("connecting")
    }

    /// Creates a database; returns it and its shards.
    pub async fn database(
        &self,
        client: &Client,
        name: &str,
        replicas: u32,
        shards: u32,
    ) -> (Database, Vec<ShardId>) {
        let (record, _) = client.create_database(name, replicas, shards, PATIENCE).await.expect("created");
        (client.database(name), record.shards)
    }

    /// Which running node leads `shard`, waiting until one does.
    pub async fn leader(&self, shard: ShardId) -> usize {
        let begun = Instant::now();
        loop {
            for (i, local) in self.nodes.iter().enumerate() {
                let Some(node) = &local.node else { continue };
                let report = node.handle().report().await;
                let here = report.replicas.into_iter().find(|r| r.shard == shard);
                if here.and_then(|r| r.group).is_some_and(|g| g.role == raft::StateRole::Leader) {
                    return i;
                }
            }
            assert!(begun.elapsed() < PATIENCE, "nobody leads shard {shard}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until all replicas have applied the same, everything committed included.
    pub async fn converge(&self) {
        let begun = Instant::now();
        loop {
            let mut at: std::collections::BTreeMap<ShardId, Vec<(u64, u64)>> = Default::default();
            for local in &self.nodes {
                let Some(node) = &local.node else { continue };
                for replica in node.handle().report().await.replicas {
                    let group = replica.group.map_or((0, u64::MAX), |g| (g.applied, g.last));
                    at.entry(replica.shard).or_default().push(group);
                }
            }
            let same = at
                .values()
                .all(|all| all.iter().all(|&(applied, last)| applied == last && all[0].0 == applied));
            if same && at.contains_key(&METADATA_SHARD) {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "replicas differ: {at:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Waits until `done` holds.
pub async fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A put, as a node takes it.
pub fn put(key: &str, value: &str) -> Operation {
    let (key, value) = (key.to_owned().into(), value.to_owned().into());
    Operation::Command { command: Command::Kv(KvCommand::Put { key, value }), session: None }
}

/// A get, as a node takes it.
pub fn get(key: &str) -> Operation {
    Operation::Query(Query::Get { key: key.to_owned().into() })
}

/// One operation on this node alone: it isn't sent on to a leader elsewhere.
pub async fn on_node(
    handle: &NodeHandle,
    shard: ShardId,
    operation: Operation,
    timeout: Duration,
) -> Result<Output, Refusal> {
    let range = handle.map().shards.get(&shard).map_or(0, |s| s.epoch.range);
    handle.submit(shard, range, vec![operation], timeout).await?.remove(0)
}

/// The value in an answer to a get.
pub fn value(output: Output) -> Option<String> {
    match output {
        Output::Answer(Answer::Value(found)) => {
            found.map(|found| String::from_utf8(found.value.to_vec()).expect("text"))
        }
        other => panic!("{other:?}"),
    }
}
