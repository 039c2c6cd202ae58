//! Nodes in this process, through their handles: formation, a database, a write and a read.

use std::net::TcpListener;
use std::time::Duration;

use pontoon::group::types::{Operation, Output};
use pontoon::machine::command::{Answer, Command, KvCommand, MetaCommand, MetaReply, Query};
use pontoon::node::{self, Listeners, RunningNode};
use pontoon::placement::plan::plan_database;
use pontoon::refusal::Refusal;
use pontoon::settings::Settings;

const PATIENCE: Duration = Duration::from_secs(10);

async fn start(count: usize, dir: &std::path::Path) -> Vec<RunningNode> {
    let bind = || TcpListener::bind("127.0.0.1:0").expect("a port");
    let listeners: Vec<_> =
        (0..count).map(|_| Listeners { client: bind(), peer: bind(), http: None }).collect();
    let peers: Vec<_> = listeners.iter().map(|l| l.peer.local_addr().expect("an address")).collect();
    let initial: Vec<_> = peers.iter().map(ToString::to_string).collect();
    let mut nodes = Vec::new();
    for (i, listeners) in listeners.into_iter().enumerate() {
        let label = format!("n{}", i + 1);
        let client = listeners.client.local_addr().expect("an address");
        let settings = Settings::for_local_node(dir.join(&label), &label, client, peers[i], initial.clone());
        nodes.push(node::start(settings, listeners).await.expect("starting"));
    }
    for node in &nodes {
        tokio::time::timeout(PATIENCE, node.ready()).await.expect("in time").expect("ready");
    }
    nodes
}

/// Runs one operation on whichever node leads.
async fn on_leader(nodes: &[RunningNode], database: &str, operation: Operation) -> Output {
    let begun = std::time::Instant::now();
    loop {
        for node in nodes {
            let handle = node.handle();
            let map = handle.map();
            let Some(shard) = map.database(database).map(|d| d.shards[0]) else { continue };
            let range = map.shards[&shard].epoch.range;
            match handle.submit(shard, range, vec![operation.clone()], PATIENCE).await {
                Ok(mut results) => match results.remove(0) {
                    Ok(output) => return output,
                    Err(Refusal::NotLeader { .. } | Refusal::Unavailable(_)) => {}
                    Err(other) => panic!("{other}"),
                },
                Err(Refusal::StaleRoute { .. } | Refusal::Unavailable(_)) => {}
                Err(other) => panic!("{other}"),
            }
        }
        assert!(begun.elapsed() < PATIENCE, "no leader");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[actix::test]
async fn three_nodes_form_a_cluster_write_read_and_stop() {
    let dir = tempfile::tempdir().expect("a directory");
    let nodes = start(3, dir.path()).await;
    let handle = nodes[1].handle();
    let begun = std::time::Instant::now();
    while handle.map().nodes.len() < 3 {
        assert!(begun.elapsed() < PATIENCE, "the map is {:?}", handle.map());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let shards = plan_database(&handle.map(), "db", 3, 1).expect("a plan");
    let create = MetaCommand::CreateDatabase { name: "db".into(), replicas: 3, shards };
    let reply = handle.meta(create, PATIENCE).await.expect("created");
    assert!(matches!(reply, MetaReply::Database { created: true, .. }), "{reply:?}");

    let put = KvCommand::Put { key: "k".into(), value: "v".into() };
    on_leader(&nodes, "db", Operation::Command(Command::Kv(put))).await;
    let answer = on_leader(&nodes, "db", Operation::Query(Query::Get { key: "k".into() })).await;
    match answer {
        Output::Answer(Answer::Value(Some(found))) => {
            assert_eq!((&found.value[..], found.version), (&b"v"[..], 1))
        }
        other => panic!("{other:?}"),
    }
    for node in nodes {
        node.stop(Duration::from_secs(5)).await.expect("stopping");
    }
}
