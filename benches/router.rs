//! What it costs to find the shard of a key, and the node to ask: once for each operation, in the client and in a node
//! that takes plain calls.
//!
//! `cargo bench --bench router`.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use pontoon::client::routing::Routing;
use pontoon::ids::{DatabaseId, Epoch, NodeId, RandomId, ReplicaId, ShardId};
use pontoon::placement::map::{
    ClusterMap, DatabaseRecord, Member, MemberRole, NodeRecord, ShardRecord, Standing,
};
use pontoon::placement::ring;

const NODES: u64 = 3;
const NAME: &str = "db";

/// A database of so many shards, each on all nodes.
fn map(shards: u32) -> ClusterMap {
    let node = |id: u64| NodeRecord {
        id: NodeId(id),
        label: format!("n{id}"),
        client_address: format!("127.0.0.1:71{id:02}"),
        peer_address: format!("127.0.0.1:72{id:02}"),
        zone: String::new(),
        weight: 100,
        store_id: RandomId([id as u8; 16]),
        standing: Standing::Member,
        changed_at: 1,
    };
    let member = |shard: u64, node: u64| Member {
        replica: ReplicaId(shard * NODES + node),
        node: NodeId(node),
        role: MemberRole::Voter,
    };
    let shard = |(id, range)| ShardRecord {
        id: ShardId(id),
        database: DatabaseId(1),
        range,
        epoch: Epoch { range: 1, conf: 1 },
        members: (1..=NODES).map(|node| member(id, node)).collect(),
        dropped: false,
        moving: None,
        target: None,
        previous: None,
        changed_at: 1,
    };
    let records: Vec<ShardRecord> = (1..).zip(ring::equal_ranges(shards)).map(shard).collect();
    let database = DatabaseRecord {
        id: DatabaseId(1),
        name: NAME.into(),
        replicas: NODES as u32,
        shards: records.iter().map(|record| record.id).collect(),
        dropped: false,
        changed_at: 1,
    };
    ClusterMap {
        cluster_id: RandomId([1; 16]),
        version: 1,
        nodes: (1..=NODES).map(|id| (NodeId(id), node(id))).collect(),
        databases: [(database.id, database)].into(),
        shards: records.into_iter().map(|record| (record.id, record)).collect(),
        ..ClusterMap::default()
    }
}

fn router(criterion: &mut Criterion) {
    let mut number = 0_u64;
    let mut key = move || {
        number = number.wrapping_add(7919);
        format!("k{:015}", number % 1_000_000)
    };
    let mut group = criterion.benchmark_group("router");
    // What is in all of the others.
    group.bench_function("make a key", |b| b.iter(&mut key));
    group.bench_function("key to position", |b| b.iter(|| ring::position(black_box(key().as_bytes()))));
    for shards in [8, 4096] {
        let map = map(shards);
        let mut routing = Routing::default();
        routing.adopt(Arc::new(map.clone()));
        let database = map.database(NAME).expect("it has one");
        group.bench_function(format!("key to shard, of {shards}, in the map"), |b| {
            b.iter(|| map.shard_of_key(database, key().as_bytes()).expect("a shard").id);
        });
        group.bench_function(format!("key to shard, of {shards}, in the client"), |b| {
            b.iter(|| routing.route(NAME, key().as_bytes()).expect("a route"));
        });
        group.bench_function(format!("key to node, of {shards} shards, in the client"), |b| {
            b.iter(|| {
                let route = routing.route(NAME, key().as_bytes()).expect("a route");
                routing.target(route.shard).expect("a node")
            });
        });
    }
    group.finish();
}

criterion_group!(benches, router);
criterion_main!(benches);
