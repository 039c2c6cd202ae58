//! What operators decide, while the cluster is used: orders that are called off and taken back, orders whose
//! answers are lost, and a cluster map of which the last part is.

#[path = "support/cluster.rs"]
mod cluster;
#[path = "support/counters.rs"]
mod counters;
#[path = "operators/doubt.rs"]
mod doubt;
#[path = "grow/journal.rs"]
mod journal;
#[path = "operators/lagging.rs"]
mod lagging;
#[path = "support/replies.rs"]
mod replies;
#[path = "grow/rest.rs"]
mod rest;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use cluster::Cluster;
use counters::{Load, assert_exact};
use journal::{Journal, Record};
use pontoon::client::Client;
use pontoon::client::admin::answers::{RebalanceOrder, RebalancePlan};
use pontoon::ids::{METADATA_SHARD, NodeId, ShardId};
use pontoon::machine::command::PolicyChange;
use pontoon::placement::map::{ClusterMap, MemberRole, RebalanceState, Standing};
use pontoon::placement::rebalance::MoveKind;
use rest::{
    PATIENCE, Rest, assert_equal_content, living, patiently, picture, rebalance, set, take_back, until,
};
use tokio::sync::Semaphore;

/// For a cluster to come to rest.
const SETTLE: Duration = Duration::from_secs(120);

/// Clusters that run at the same time: each has a handful of processes.
static ROOM: Semaphore = Semaphore::const_new(2);

/// On which nodes each shard of databases is.
fn places(map: impl AsRef<ClusterMap>) -> BTreeMap<ShardId, BTreeSet<NodeId>> {
    let shards = living(map.as_ref()).filter(|shard| shard.id != METADATA_SHARD);
    shards.map(|shard| (shard.id, shard.members.iter().map(|m| m.node).collect())).collect()
}

/// Where a plan wants the shards that are there now.
fn planned(
    plan: &RebalancePlan,
    now: &BTreeMap<ShardId, BTreeSet<NodeId>>,
) -> BTreeMap<ShardId, BTreeSet<NodeId>> {
    let mut planned = now.clone();
    for one in plan.moves.iter().filter(|one| one.kind == MoveKind::Replica) {
        let nodes = planned.get_mut(&one.shard).expect("a shard of the database");
        assert!(nodes.remove(&one.from) && nodes.insert(one.to), "{one:?} of {plan:?}");
    }
    planned
}

/// Three nodes with a database of so many shards, and a second that is filled with so many values of 64 KiB; and a
/// fourth, to which nothing moves by itself.
async fn grown(shards: u32, values: u64) -> (Cluster, Client, Record) {
    let mut cluster = Cluster::new(3);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    set(&client, PolicyChange::Automatic(false)).await;
    cluster.database(&client, "db", 2, shards).await;
    let filled = cluster.database(&client, "filled", 2, shards).await;
    let filler = Journal::start(&filled, 16, 64 << 10, Duration::ZERO);
    filler.progress(values).await;
    let filler = filler.stop().await;
    cluster.join();
    (cluster, client, filler)
}

/// Waits until a rebalancing has ended, and nothing moves.
async fn ended(client: &Client, cluster: &Cluster) {
    until(client, cluster, "the rebalancing has ended", |map| {
        let ended = matches!(map.rebalance.state, RebalanceState::Idle | RebalanceState::Failed);
        ended && living(map).all(|shard| shard.moving.is_none())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rebalancing_that_is_cancelled_leaves_no_move_half_done() {
    let _room = ROOM.acquire().await.expect("it isn't closed");
    let (cluster, client, filler) = grown(8, 400).await;
    let database = client.database("db").with_timeout(SETTLE);
    // At so low a rate moves are caught in the middle.
    set(&client, PolicyChange::BytesPerSecond(1 << 20)).await;
    set(&client, PolicyChange::MovesAtATime(3)).await;
    let rest = Rest { metadata: 3, ..Rest::default() };
    let before = places(rest.reached(&client, &cluster, SETTLE).await);
    let load = Load::start(std::slice::from_ref(&database), 4);
    load.progress(50).await;

    let plan = rebalance(&client).await;
    let planned = planned(&plan, &before);
    let caught = until(&client, &cluster, "a move is in flight", |map| {
        living(map).any(|shard| shard.members.iter().any(|member| member.role == MemberRole::Learner))
    })
    .await;
    client.control_rebalance(plan.id, RebalanceOrder::Cancel, PATIENCE).await.expect("cancelled");
    // Once more: that is done.
    client.control_rebalance(plan.id, RebalanceOrder::Cancel, PATIENCE).await.expect("cancelled already");
    let refused = client.control_rebalance(plan.id, RebalanceOrder::Resume, PATIENCE).await;
    assert!(refused.is_err(), "what was cancelled isn't resumed");
    ended(&client, &cluster).await;
    let map = client.map().await.expect("the map");
    assert_eq!((map.rebalance.plan, map.rebalance.state), (plan.id, RebalanceState::Idle));
    assert!(map.rebalance.reason.contains("operator"), "{:?}", map.rebalance);
    load.progress(50).await;

    // No replica more or less than asked, no orphan: and each shard is where it was or should have come.
    let after = places(rest.reached(&client, &cluster, SETTLE).await);
    let halfway: Vec<_> =
        after.iter().filter(|(id, nodes)| **nodes != before[*id] && **nodes != planned[*id]).collect();
    assert!(halfway.is_empty(), "{halfway:?} of {plan:?}");
    let moved = |places: &BTreeMap<_, _>| after.iter().filter(|(id, nodes)| places[*id] != **nodes).count();
    println!(
        "{} shards had moved, {} had still to; caught at {}",
        moved(&before),
        moved(&planned),
        caught.version
    );
    assert!(moved(&planned) > 0, "it was over before it was cancelled");
    let status = client.rebalance_status(PATIENCE).await.expect("its status");
    assert!(status.done < status.total && status.has_ended(), "{status:?}");

    // What had moved can be taken back, replicas and leadership; if nothing had, that is the reason not to.
    set(&client, PolicyChange::BytesPerSecond(0)).await;
    if moved(&before) > 0 {
        take_back(&client, plan.id).await;
        ended(&client, &cluster).await;
    } else {
        // Leadership may have moved.
        let nothing = ["where it was before plan", "no rebalancing to take back"];
        let undone = patiently("the way back, or that there is none", async || {
            match client.undo_rebalance(plan.id, PATIENCE).await.map_err(|error| error.to_string()) {
                Ok(_) => Ok(true),
                Err(error) if nothing.iter().any(|reason| error.contains(reason)) => Ok(false),
                Err(error) => Err(error),
            }
        });
        if undone.await {
            ended(&client, &cluster).await;
        }
    }
    assert_eq!(places(rest.reached(&client, &cluster, SETTLE).await), before);
    load.progress(50).await;
    let tally = load.stop().await;
    assert_eq!(tally.errors, []);
    assert_exact(&client, "db", &database, &tally).await;
    filler.assert_kept(&client.database("filled")).await;
    Rest { quiet: true, ..rest }.reached(&client, &cluster, SETTLE).await;
    assert_equal_content(&client, "db").await;
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rebalancing_is_taken_back_under_load_or_refused_with_the_reason() {
    let _room = ROOM.acquire().await.expect("it isn't closed");
    let (cluster, client, filler) = grown(6, 16).await;
    let database = client.database("db").with_timeout(SETTLE);
    let load = Load::start(std::slice::from_ref(&database), 4);
    load.progress(50).await;
    let rest = Rest { metadata: 3, ..Rest::default() };
    let before = places(rest.reached(&client, &cluster, SETTLE).await);
    let plan = rebalance(&client).await;
    let planned = planned(&plan, &before);
    let refused = client.undo_rebalance(plan.id, PATIENCE).await;
    // It may have been that fast.
    if let Err(error) = &refused {
        assert!(error.to_string().contains("under way: cancel it first"), "{error}");
        ended(&client, &cluster).await;
        assert_eq!(places(rest.reached(&client, &cluster, SETTLE).await), planned);
        load.progress(50).await;

        let other = client.undo_rebalance(plan.id + 1, PATIENCE).await.expect_err("refused").to_string();
        assert!(other.contains("is not the last one"), "{other}");
        take_back(&client, plan.id).await;
    }
    // Begun already.
    let back = take_back(&client, plan.id).await;
    assert_eq!(client.map().await.expect("the map").rebalance.plan, back);
    ended(&client, &cluster).await;
    assert_eq!(places(rest.reached(&client, &cluster, SETTLE).await), before);
    let status = client.rebalance_status(PATIENCE).await.expect("its status");
    assert_eq!((status.plan, status.done), (back, status.total));
    // The way back can be taken back as well, but not to a node that takes nothing any more.
    let new = plan.moves.iter().find(|one| one.kind == MoveKind::Replica).expect("a move").to;
    client.set_standing(new, Standing::Draining, PATIENCE).await.expect("draining");
    let error = client.undo_rebalance(back, PATIENCE).await.expect_err("refused").to_string();
    assert!(error.contains(&format!("node {new}, which held shard")), "{error}");
    assert!(error.contains("is being emptied"), "{error}");
    client.set_standing(new, Standing::Member, PATIENCE).await.expect("a member");
    load.progress(50).await;
    let tally = load.stop().await;
    assert_eq!(tally.errors, [], "{}", picture(&cluster));
    assert_exact(&client, "db", &database, &tally).await;
    filler.assert_kept(&client.database("filled")).await;
    Rest { quiet: true, ..rest }.reached(&client, &cluster, SETTLE).await;
    assert_equal_content(&client, "db").await;
    client.close().await;
}

/// Waits until it is so, of whatever.
async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Result<T, String>) -> T {
    let begun = Instant::now();
    loop {
        match look().await {
            Ok(found) => return found,
            Err(missing) => assert!(begun.elapsed() < SETTLE, "not in time: {what}: {missing}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
