//! A cluster whose members change while nodes die and the network fails: whatever is under way is ended or
//! taken back, and in the end every shard is whole.

#[path = "support/cluster.rs"]
mod cluster;
#[path = "support/counters.rs"]
mod counters;
#[path = "grow/journal.rs"]
mod journal;
#[path = "support/proxy.rs"]
mod proxy;
#[path = "grow/rest.rs"]
mod rest;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use cluster::{Cluster, Options, free_ports};
use counters::{Load, assert_exact};
use journal::Journal;
use pontoon::client::{Client, ClientError, Database};
use pontoon::ids::{METADATA_SHARD, NodeId, ShardId};
use pontoon::machine::command::PolicyChange;
use pontoon::node::handle::ReplicaHealth;
use pontoon::placement::map::{ClusterMap, Standing};
use proxy::Network;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rest::{PATIENCE, Rest, assert_equal_content, id, leader, living, picture, set, until};
use tokio::sync::Semaphore;

/// For a cluster to come to rest after nodes came or went.
const SETTLE: Duration = Duration::from_secs(120);
/// An operation that meets several deaths in a row still ends well.
const DEADLINE: Duration = Duration::from_secs(60);

/// Clusters that run at the same time: each has a handful of processes.
static ROOM: Semaphore = Semaphore::const_new(2);

async fn started(nodes: usize) -> (Cluster, Client) {
    let mut cluster = Cluster::new(nodes);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    (cluster, client)
}

fn moving(map: &ClusterMap) -> bool {
    living(map).any(|shard| shard.moving.is_some())
}

/// What must hold when all is over: nothing is lost, doubled, left over, or different.
async fn assert_whole(client: &Client, cluster: &Cluster, load: Load, database: &Database, metadata: usize) {
    load.progress(50).await;
    let tally = load.stop().await;
    assert_eq!(tally.errors, []);
    Rest { metadata, quiet: true, ..Rest::default() }.reached(client, cluster, SETTLE).await;
    assert_exact(client, "db", database, &tally).await;
    assert_equal_content(client, "db").await;
}

/// Four nodes and a fifth that joins; while replicas move to it one of the five dies for good.
async fn a_node_dies_in_the_middle(victim: usize) {
    let _room = ROOM.acquire().await.expect("it isn't closed");
    let (mut cluster, client) = started(4).await;
    let database = cluster.database(&client, "db", 3, 6).await.with_timeout(DEADLINE);
    Rest { metadata: 3, even: true, ..Rest::default() }.reached(&client, &cluster, SETTLE).await;
    set(&client, PolicyChange::ReplaceAfterMs(10_000)).await;
    set(&client, PolicyChange::MovesAtATime(2)).await;
    let load = Load::start(std::slice::from_ref(&database), 4);
    load.progress(50).await;
    cluster.join();
    until(&client, &cluster, "replicas move to the new node", moving).await;
    // Not at the very first step.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let dead = id(&client, &cluster, victim).await;
    cluster.kill(victim);
    until(&client, &cluster, "nothing is on the dead node", |map| {
        living(map).all(|shard| shard.ordered().all(|member| member.node != dead))
    })
    .await;
    Rest { metadata: 3, even: true, ..Rest::default() }.reached(&client, &cluster, SETTLE).await;
    assert_whole(&client, &cluster, load, &database, 3).await;
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_node_that_dies_while_it_is_filled_is_replaced() {
    a_node_dies_in_the_middle(4).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_node_that_dies_while_another_is_filled_is_replaced() {
    a_node_dies_in_the_middle(0).await;
}

/// Sets what goes wrong in a node.
async fn arm(client: &Client, cluster: &Cluster, node: usize, rules: &str) {
    let armed = client.inject(&cluster.nodes[node].client, METADATA_SHARD, &format!("arm={rules}")).await;
    match armed {
        // The node may be gone before it has answered.
        Ok(()) | Err(ClientError::Unknown(_)) => {}
        armed => armed.unwrap_or_else(|error| panic!("{rules}: {error}")),
    }
}

/// Has replicas move: one node gives all that it has away, or the one that did gets its share again. Whether it is the
/// former. A node that has nothing to give lets the next one do so.
async fn stir(client: &Client, cluster: &Cluster, node: usize) -> bool {
    let map = client.map().await.expect("the map");
    let drained = map.nodes.values().find(|node| node.standing == Standing::Draining).map(|node| node.id);
    let (node, standing) = match drained {
        Some(drained) => (drained, Standing::Member),
        None => {
            let mut next = id(client, cluster, node).await;
            for step in 1..cluster.nodes.len() {
                if living(&map).any(|shard| shard.member_on(next).is_some()) {
                    break;
                }
                next = id(client, cluster, (node + step) % cluster.nodes.len()).await;
            }
            (next, Standing::Draining)
        }
    };
    client.set_standing(node, standing, PATIENCE).await.expect("decided");
    drained.is_none()
}

/// Where the reconciler is struck, and how many steps later than the next.
const STEPS: [(&str, u32); 10] = [
    ("meta.before", 0),
    ("order.after", 0),
    ("meta.after", 1),
    ("order.before", 0),
    ("meta.after", 0),
    ("meta.before", 1),
    ("order.after", 1),
    ("meta.before", 2),
    ("order.before", 1),
    ("meta.after", 2),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_metadata_leader_that_dies_between_the_steps_of_a_move_is_followed_by_one_that_ends_it() {
    let _room = ROOM.acquire().await.expect("it isn't closed");
    let (mut cluster, client) = started(4).await;
    let database = cluster.database(&client, "db", 3, 2).await.with_timeout(DEADLINE);
    Rest { metadata: 3, ..Rest::default() }.reached(&client, &cluster, SETTLE).await;
    set(&client, PolicyChange::MovesAtATime(1)).await;
    let load = Load::start(std::slice::from_ref(&database), 4);
    load.progress(50).await;
    for (round, (point, skip)) in STEPS.into_iter().enumerate() {
        a_node_dies_at(&client, &mut cluster, round, &format!("reconciler/{point}"), skip).await;
    }
    ends_whole(&client, cluster, load, &database).await;
    client.close().await;
}

/// Has moves go on until one of four nodes comes to `point`, `skip` times later than the first time, and dies there;
/// then it runs again, and no rule is left.
async fn a_node_dies_at(client: &Client, cluster: &mut Cluster, round: usize, point: &str, skip: u32) {
    for node in 0..4 {
        arm(client, cluster, node, &format!("panic:{point}:skip={skip}:times=1")).await;
    }
    let begun = Instant::now();
    // Orders are taken back only when they have come to something, or hardly will: on a busy machine it takes a while.
    let mut stirs_after = begun;
    let (first, status) = loop {
        if let Some(ended) = (0..4).find_map(|node| Some((node, cluster.ended(node)?))) {
            break ended;
        }
        match client.map().await {
            Ok(map) if moving(&map) => stirs_after = Instant::now(),
            Ok(_) if Instant::now() >= stirs_after => {
                let drains = stir(client, cluster, round % 4).await;
                stirs_after = Instant::now() + Duration::from_millis(if drains { 3_000 } else { 500 });
            }
            _ => {}
        }
        assert!(begun.elapsed() < PATIENCE, "nobody came to {point}\n{}", picture(cluster));
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    println!("{point}, {skip} later: node {} after {:?}", first + 1, begun.elapsed());
    let mut dead = vec![(first, status)];
    for node in (0..4).filter(|node| *node != first) {
        // Another may have come there meanwhile.
        if client.inject(&cluster.nodes[node].client, METADATA_SHARD, "arm=").await.is_err() {
            dead.push((node, cluster.wait_exit(node, PATIENCE)));
        }
    }
    for (node, status) in dead {
        let log = cluster.log(node);
        assert_eq!(status.code(), Some(70), "{log}");
        assert!(log.contains(&format!("injected panic at {point}")), "{log}");
        cluster.spawn(node);
        cluster.wait_ready(node);
    }
}

/// Every node is a member again, and nothing that was under way, or was counted, is lost.
async fn ends_whole(client: &Client, cluster: Cluster, load: Load, database: &Database) {
    if client.map().await.expect("the map").nodes.values().any(|node| node.standing != Standing::Member) {
        stir(client, &cluster, 0).await;
    }
    assert_whole(client, &cluster, load, database, 3).await;
}

/// Where a node is struck that an order came to, or a new replica, and how often it comes there before.
const PARTS: [(&str, u32); 6] = [
    ("order/received", 0),
    ("supervisor/newcomer.created", 0),
    ("order/carried-out", 0),
    ("order/carried-out", 1),
    ("order/received", 1),
    ("supervisor/newcomer.created", 0),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_dies_at_an_order_or_with_a_new_replica_takes_its_part_of_the_move_up_again() {
    let _room = ROOM.acquire().await.expect("it isn't closed");
    let (mut cluster, client) = started(4).await;
    let database = cluster.database(&client, "db", 3, 2).await.with_timeout(DEADLINE);
    Rest { metadata: 3, ..Rest::default() }.reached(&client, &cluster, SETTLE).await;
    set(&client, PolicyChange::MovesAtATime(1)).await;
    let load = Load::start(std::slice::from_ref(&database), 4);
    load.progress(50).await;
    for (round, (point, skip)) in PARTS.into_iter().enumerate() {
        a_node_dies_at(&client, &mut cluster, round, point, skip).await;
    }
    ends_whole(&client, cluster, load, &database).await;
    client.close().await;
}

/// The node, of those that run, that holds no voter of the shard.
fn outsider(map: &ClusterMap, shard: ShardId) -> NodeId {
    let held = |node: &NodeId| map.shards[&shard].ordered().any(|member| member.node == *node);
    *map.nodes.keys().find(|node| !held(node)).expect("four nodes, three members")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_both_of_whose_ends_die_comes_again() {
    let _room = ROOM.acquire().await.expect("it isn't closed");
    let (mut cluster, client) = started(4).await;
    let database = cluster.database(&client, "db", 3, 1).await.with_timeout(DEADLINE);
    Rest { metadata: 3, ..Rest::default() }.reached(&client, &cluster, SETTLE).await;
    let filler = Journal::start(&database, 4, 64 << 10, Duration::ZERO);
    filler.progress(160).await;
    let record = filler.stop().await;
    record.assert_kept(&database).await;
    // Ten seconds for what is there.
    set(&client, PolicyChange::BytesPerSecond(1 << 20)).await;
    let map = client.map().await.expect("the map");
    let shard = map.database("db").expect("the database").shards[0];
    let sender = leader(&client, &cluster, shard).await;
    let sending = id(&client, &cluster, sender).await;
    let receiving = outsider(&map, shard);
    let goes = map.shards[&shard].members.iter().map(|m| m.node).find(|node| *node != sending);
    client.set_standing(goes.expect("a follower"), Standing::Draining, PATIENCE).await.expect("draining");
    let receiver = {
        let address = &map.nodes[&receiving].client_address;
        (0..4).find(|node| cluster.nodes[*node].client == *address).expect("it is one of them")
    };
    let begun = Instant::now();
    loop {
        let report = client.node_report(&cluster.nodes[receiver].client, PATIENCE).await.expect("a report");
        let here = report.replicas.iter().find(|replica| replica.shard == shard);
        if here.is_some_and(|replica| replica.health == ReplicaHealth::Installing) {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "no snapshot is sent: {here:?}\n{}", picture(&cluster));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    cluster.kill(receiver);
    cluster.kill(sender);
    let load = Journal::start(&database, 2, 256, Duration::from_millis(5));
    load.progress(20).await;
    for node in [sender, receiver] {
        cluster.spawn(node);
        cluster.wait_ready(node);
    }
    set(&client, PolicyChange::BytesPerSecond(0)).await;
    Rest { metadata: 3, ..Rest::default() }.reached(&client, &cluster, SETTLE).await;
    let map = client.map().await.expect("the map");
    assert!(map.shards[&shard].member_on(receiving).is_some(), "{:?}", map.shards[&shard]);
    let later = load.stop().await;
    later.assert_kept(&database).await;
    record.assert_kept(&database).await;
    Rest { metadata: 3, quiet: true, ..Rest::default() }.reached(&client, &cluster, SETTLE).await;
    assert_equal_content(&client, "db").await;
    client.close().await;
}

/// Greatest conf version of a shard that any node has applied.
async fn conf(client: &Client, cluster: &Cluster, shard: ShardId) -> u64 {
    let mut most = 0;
    for node in &cluster.nodes {
        if let Ok(report) = client.node_report(&node.client, Duration::from_secs(2)).await {
            let here = report.replicas.iter().find(|r| r.shard == shard).and_then(|r| r.group.as_ref());
            most = here.map_or(0, |group| group.epoch.conf).max(most);
        }
    }
    most
}

/// Who is cut off while both configurations count.
#[derive(Clone, Copy, Debug)]
enum Cut {
    Leader,
    Comes,
    Goes,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_during_a_joint_change_stops_nothing_for_good() {
    let _room = ROOM.acquire().await.expect("it isn't closed");
    let ports = free_ports(8);
    let peers: Vec<_> = ports[4..].iter().map(|port| SocketAddr::from(([127, 0, 0, 1], *port))).collect();
    let network = Network::new(&peers);
    let advertise = network.addresses().iter().map(SocketAddr::to_string).collect();
    let options = Options { advertise: Some(advertise), ..Options::default() };
    let mut cluster = Cluster::with(4, &ports, options);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    let database = cluster.database(&client, "db", 3, 1).await.with_timeout(DEADLINE);
    let load = Load::start(std::slice::from_ref(&database), 4);
    for cut in [Cut::Leader, Cut::Comes, Cut::Goes] {
        let map = Rest { metadata: 3, ..Rest::default() }.reached(&client, &cluster, SETTLE).await;
        let shard = map.database("db").expect("the database").shards[0];
        let before = map.shards[&shard].epoch.conf;
        let leads = leader(&client, &cluster, shard).await;
        let leads = id(&client, &cluster, leads).await;
        let goes = map.shards[&shard].members.iter().map(|m| m.node).find(|node| *node != leads);
        let (goes, comes) = (goes.expect("a follower"), outsider(&map, shard));
        // So that there is time to see it: learner, joint change, its end are one version each.
        for from in 1..=4 {
            for to in 1..=4 {
                network.delay(from, to, Duration::from_millis(150));
            }
        }
        client.set_standing(goes, Standing::Draining, PATIENCE).await.expect("draining");
        let begun = Instant::now();
        while conf(&client, &cluster, shard).await < before + 2 {
            assert!(begun.elapsed() < PATIENCE, "no joint change\n{}", picture(&cluster));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let now = conf(&client, &cluster, shard).await;
        network.isolate(match cut {
            Cut::Leader => leads.0,
            Cut::Comes => comes.0,
            Cut::Goes => goes.0,
        });
        // Two of three are left in each of the two configurations.
        load.progress(50).await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        println!("{cut:?} was cut off at conf {now}, {} above {before}", now - before);
        network.heal();
        let map = until(&client, &cluster, "the node is empty", |map| {
            living(map).all(|shard| shard.ordered().all(|member| member.node != goes))
        })
        .await;
        assert!(map.shards[&shard].member_on(comes).is_some(), "{:?}", map.shards[&shard]);
        client.set_standing(goes, Standing::Member, PATIENCE).await.expect("it is back");
    }
    assert_whole(&client, &cluster, load, &database, 3).await;
    client.close().await;
}

/// What befalls the cluster next.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// One node gives away what it has, or the one that does gets its share again.
    Drain(usize),
    /// Copies of each shard.
    Replicas(u32),
    /// A node dies, and is back after so many milliseconds.
    Crash(usize, u64),
    /// Whatever the reconciler or a replica is at, there the node's part of it breaks off.
    Break(usize, &'static str),
    /// Nothing for so many milliseconds.
    Calm(u64),
}

/// Where members change, and replicas come and go.
const BREAKS: [&str; 12] = [
    "panic:replica/change.proposed:times=1",
    "panic:replica/change.committed:times=1",
    "panic:replica/change.recorded:times=1",
    "panic:replica/change.applied:times=1",
    "panic:replica/change.leaves:times=1",
    "panic:log/create.after:times=1",
    "panic:log/remove.before:times=1",
    "panic:log/remove.after:times=1",
    "panic:log/install.after:times=1",
    "panic:supervisor/newcomer.created:times=1",
    "panic:order/received:times=1",
    "panic:order/carried-out:times=1",
];

fn event(dice: &mut StdRng, nodes: usize) -> Event {
    let node = dice.random_range(0..nodes);
    match dice.random_range(0..10) {
        0..3 => Event::Drain(node),
        3 => Event::Replicas([1, 3, 3, 5][dice.random_range(0..4)]),
        4..6 => Event::Crash(node, dice.random_range(0..2_500)),
        6..9 => Event::Break(node, BREAKS[dice.random_range(0..BREAKS.len())]),
        _ => Event::Calm(dice.random_range(0..3_000)),
    }
}

/// `PONTOON_GROW_SEEDS=1..20 cargo test --test grow_fire anything -- --nocapture` looks longer, half a minute a seed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn anything_may_break_while_members_change_and_nothing_is_lost() {
    let seeds = std::env::var("PONTOON_GROW_SEEDS").unwrap_or("1..2".into());
    let (first, last) = seeds.split_once("..").expect("FIRST..LAST");
    let number = |text: &str| text.parse::<u64>().expect("a number");
    for seed in number(first)..number(last) {
        let _room = ROOM.acquire().await.expect("it isn't closed");
        println!("seed {seed}");
        let mut dice = StdRng::seed_from_u64(seed);
        let (mut cluster, client) = started(5).await;
        let database = cluster.database(&client, "db", 3, 4).await.with_timeout(DEADLINE);
        let load = Load::start(std::slice::from_ref(&database), 4);
        load.progress(50).await;
        for _ in 0..14 {
            let next = event(&mut dice, cluster.nodes.len());
            println!("{next:?}");
            match next {
                Event::Drain(node) => {
                    stir(&client, &cluster, node).await;
                }
                Event::Replicas(copies) => {
                    // Refused while fewer nodes are up than it takes.
                    let decided = client.set_replicas("db", copies, PATIENCE).await;
                    println!("{decided:?}");
                }
                Event::Crash(node, ms) => {
                    cluster.kill(node);
                    tokio::time::sleep(Duration::from_millis(ms)).await;
                    cluster.spawn(node);
                    cluster.wait_ready(node);
                }
                Event::Break(node, rule) => arm(&client, &cluster, node, rule).await,
                Event::Calm(ms) => tokio::time::sleep(Duration::from_millis(ms)).await,
            }
            tokio::time::sleep(Duration::from_millis(dice.random_range(0..1_000))).await;
            for node in 0..cluster.nodes.len() {
                if let Some(ended) = cluster.ended(node) {
                    assert_eq!(ended.code(), Some(70), "{}", cluster.log(node));
                    cluster.spawn(node);
                    cluster.wait_ready(node);
                }
            }
        }
        calm(&client, &mut cluster).await;
        assert_whole(&client, &cluster, load, &database, 5).await;
        client.close().await;
    }
}

/// Nothing breaks any more, every node runs and is a member, and each shard gets three copies.
async fn calm(client: &Client, cluster: &mut Cluster) {
    for node in 0..cluster.nodes.len() {
        // One that ends just now comes back without rules.
        if cluster.ended(node).is_none() {
            arm(client, cluster, node, "").await;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        if !cluster.runs(node) || cluster.ended(node).is_some() {
            cluster.spawn(node);
            cluster.wait_ready(node);
        }
    }
    client.set_replicas("db", 3, PATIENCE).await.expect("all are up");
    let map = client.map().await.expect("the map");
    for drained in map.nodes.values().filter(|node| node.standing == Standing::Draining) {
        client.set_standing(drained.id, Standing::Member, PATIENCE).await.expect("it is back");
    }
}
