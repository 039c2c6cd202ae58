//! Nodes that can't hear each other: no stale read, nothing acknowledged by the wrong side, and no
//! more disturbance than an election takes.

#[path = "support/local.rs"]
mod local;
#[path = "support/proxy.rs"]
mod proxy;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use local::{LocalCluster, get, on_node, put, value};
use pontoon::client::{Client, Database};
use pontoon::ids::ShardId;
use proxy::Network;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// The longest election timeout, twice (a split vote, a slow machine), and what a client needs to
/// find the new leader.
const ELECTION: Duration = Duration::from_secs(6);

struct Setup {
    cluster: LocalCluster,
    network: Network,
    client: Client,
    database: Database,
    shard: ShardId,
}

async fn setup() -> Setup {
    let mut network = None;
    let cluster =
        LocalCluster::start_with(3, |peers| network.insert(Network::new(peers)).addresses().to_vec()).await;
    cluster.wait_ready().await;
    let client = cluster.client().await;
    let (database, shards) = cluster.database(&client, "parted", 3, 1).await;
    Setup { cluster, network: network.expect("made above"), client, database, shard: shards[0] }
}

/// The id by which the network knows a node.
fn id(setup: &Setup, node: usize) -> u64 {
    setup.cluster.handle(node).node().0
}

#[actix::test]
async fn an_isolated_leader_serves_no_stale_read_and_acknowledges_nothing() {
    let mut s = setup().await;
    s.database.put("k", "old").await.expect("a write");
    let leader = s.cluster.leader(s.shard).await;
    s.network.isolate(id(&s, leader));

    // What is asked of the isolated node from now on can't be answered with a value or a success.
    let stop = Arc::new(AtomicBool::new(false));
    let (handle, stopped, shard) = (s.cluster.handle(leader), stop.clone(), s.shard);
    let asked = actix::spawn(async move {
        let mut answers = 0;
        while !stopped.load(Ordering::Relaxed) {
            let patience = Duration::from_millis(300);
            let read = on_node(&handle, shard, get("k"), patience).await;
            assert!(read.is_err(), "an isolated node answered a read: {read:?}");
            let write = on_node(&handle, shard, put("k", "isolated"), patience).await;
            assert!(write.is_err(), "an isolated node acknowledged a write: {write:?}");
            answers += 1;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        answers
    });

    let begun = Instant::now();
    s.database.put("k", "new").await.expect("the majority elects a leader and serves");
    assert!(begun.elapsed() < ELECTION, "it took {:?}", begun.elapsed());
    let read = s.database.get("k").await.expect("a read").expect("there");
    assert_eq!(read.value, "new");
    // Long enough for the isolated leader to notice that it has no quorum.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    stop.store(true, Ordering::Relaxed);
    assert!(asked.await.expect("no stale answer") > 3);
    assert_ne!(s.cluster.leader(s.shard).await, leader);

    s.network.heal();
    s.cluster.converge().await;
    let read = s.database.get("k").await.expect("a read").expect("there");
    assert_eq!(read.value, "new", "a write of the isolated leader came through");
    // The node serves again, and what it serves is new.
    s.client.transfer_leader(s.shard, s.cluster.handle(leader).node(), local::PATIENCE).await.expect("moved");
    let begun = Instant::now();
    loop {
        match on_node(&s.cluster.handle(leader), s.shard, get("k"), local::PATIENCE).await {
            Ok(answer) => break assert_eq!(value(answer).as_deref(), Some("new")),
            Err(error) => assert!(begun.elapsed() < local::PATIENCE, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    s.client.close().await;
    s.cluster.stop_all().await;
}

/// Writes for a while; the longest that one took.
async fn longest_write(database: &Database, time: Duration) -> Duration {
    let begun = Instant::now();
    let mut longest = Duration::ZERO;
    while begun.elapsed() < time {
        let each = Instant::now();
        database.put("k", "v").await.expect("no write fails within its deadline");
        longest = longest.max(each.elapsed());
    }
    longest
}

async fn term(s: &Setup, node: usize) -> u64 {
    let report = s.cluster.handle(node).report().await;
    let replica = report.replicas.into_iter().find(|r| r.shard == s.shard).expect("a replica");
    replica.group.expect("running").term
}

#[actix::test]
async fn a_follower_cut_off_one_way_or_from_one_side_disturbs_nobody() {
    let mut s = setup().await;
    s.database.put("k", "v").await.expect("a write");
    let leader = s.cluster.leader(s.shard).await;
    let term_before = term(&s, leader).await;
    let (follower, other) = ((leader + 1) % 3, (leader + 2) % 3);
    let (l, f, o) = (id(&s, leader), id(&s, follower), id(&s, other));
    // Of the cuts each lets the follower hear less: it isn't heard; it doesn't hear the leader; both;
    // it hears and is heard by nobody.
    let cuts: [&[(u64, u64)]; 4] =
        [&[(f, l), (f, o)], &[(l, f)], &[(l, f), (f, l)], &[(l, f), (f, l), (o, f), (f, o)]];
    for cut in cuts {
        for &(from, to) in cut {
            s.network.cut(from, to);
        }
        let longest = longest_write(&s.database, Duration::from_millis(3500)).await;
        assert!(longest < Duration::from_millis(1500), "a write took {longest:?} with {cut:?} cut");
        s.network.heal();
        s.cluster.converge().await;
        let longest = longest_write(&s.database, Duration::from_millis(300)).await;
        assert!(longest < Duration::from_millis(1500), "a write took {longest:?} after {cut:?} healed");
        assert_eq!(s.cluster.leader(s.shard).await, leader, "leadership moved for {cut:?}");
        assert_eq!(term(&s, leader).await, term_before, "there was an election for {cut:?}");
    }
    s.client.close().await;
    s.cluster.stop_all().await;
}

#[actix::test]
async fn a_leader_that_hears_nobody_is_replaced_within_an_election() {
    let mut s = setup().await;
    s.database.put("k", "v").await.expect("a write");
    let leader = s.cluster.leader(s.shard).await;
    for other in (0..3).filter(|other| *other != leader) {
        s.network.cut(id(&s, other), id(&s, leader));
    }
    let longest = longest_write(&s.database, Duration::from_secs(6)).await;
    assert!(longest < ELECTION, "a write took {longest:?}");
    assert_ne!(s.cluster.leader(s.shard).await, leader, "it can't lead");
    s.network.heal();
    s.cluster.converge().await;
    assert!(longest_write(&s.database, Duration::from_millis(300)).await < ELECTION);
    s.client.close().await;
    s.cluster.stop_all().await;
}

/// Cuts a node off and back on, `times` times, for times that `dice` draws, while somebody writes.
async fn flap(s: &Setup, node: u64, times: u32, dice: &mut StdRng) -> Duration {
    let mut longest = Duration::ZERO;
    for _ in 0..times {
        s.network.isolate(node);
        let down = Duration::from_millis(dice.random_range(100..1500));
        longest = longest.max(longest_write(&s.database, down).await);
        s.network.heal();
        let up = Duration::from_millis(dice.random_range(50..400));
        longest = longest.max(longest_write(&s.database, up).await);
    }
    longest
}

/// With pre-vote and check-quorum a node that comes and goes can neither win an election nor end a
/// leadership: its term doesn't grow while it is away.
#[actix::test]
async fn a_flapping_node_loses_its_leadership_once_and_disturbs_nobody_else() {
    let mut s = setup().await;
    let mut dice = StdRng::seed_from_u64(11);
    s.database.put("k", "v").await.expect("a write");
    let leader = s.cluster.leader(s.shard).await;
    let begun = term(&s, leader).await;
    let follower = id(&s, (leader + 1) % 3);
    let longest = flap(&s, follower, 5, &mut dice).await;
    assert!(longest < Duration::from_millis(1500), "a write took {longest:?} while a follower flapped");
    s.cluster.converge().await;
    assert_eq!((s.cluster.leader(s.shard).await, term(&s, leader).await), (leader, begun), "an election");

    // The leader: cut off for long enough, it is replaced.
    s.network.isolate(id(&s, leader));
    let longest = longest_write(&s.database, Duration::from_secs(3)).await;
    assert!(longest < ELECTION, "a write took {longest:?}");
    s.network.heal();
    s.cluster.converge().await;
    let next = s.cluster.leader(s.shard).await;
    let elected = term(&s, next).await;
    assert!(next != leader && elected <= begun + 2, "from term {begun} to {elected} for one election");
    // From then on it is a follower as any other.
    let longest = flap(&s, id(&s, leader), 5, &mut dice).await;
    assert!(longest < Duration::from_millis(1500), "a write took {longest:?} while the old leader flapped");
    s.cluster.converge().await;
    assert_eq!((s.cluster.leader(s.shard).await, term(&s, next).await), (next, elected), "an election");
    s.client.close().await;
    s.cluster.stop_all().await;
}
