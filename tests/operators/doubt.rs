//! Orders whose answers are lost, while the metadata shard's leader dies: given once, and told rightly.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pontoon::client::admin::answers::RebalanceOrder;
use pontoon::client::options::ClientOptions;
use pontoon::client::{Client, ClientError};
use pontoon::ids::METADATA_SHARD;
use pontoon::machine::command::PolicyChange;
use pontoon::placement::map::{ClusterMap, Standing};

use crate::cluster::{Cluster, Options, free_ports};
use crate::replies::{Replies, Way};
use crate::rest::{PATIENCE, Rest, leader, living, picture, set, until};
use crate::{ROOM, SETTLE, eventually};

/// For an order of which several attempts are lost.
const LONG: Duration = Duration::from_secs(40);
/// More than an answer takes that isn't lost, and less than it takes to find out that one is.
const ANSWERED: Duration = Duration::from_millis(600);

/// What an order has changed: the version of each record that tells.
fn stamps(map: &ClusterMap) -> (u64, u64, BTreeMap<u64, u64>, BTreeMap<u64, u64>) {
    (
        map.policy.changed_at,
        map.rebalance.plan,
        map.nodes.values().map(|node| (node.id.0, node.changed_at)).collect(),
        map.databases.values().map(|database| (database.id.0, database.changed_at)).collect(),
    )
}

/// Gives an order none of whose answers comes back, until it is seen to be done; then the leader that decided it dies.
async fn in_doubt<F: Future<Output = Result<u64, ClientError>> + Send + 'static>(
    cluster: &mut Cluster,
    replies: &Replies,
    what: &str,
    order: impl FnOnce(Client) -> F,
    done: impl Fn(&ClusterMap) -> bool,
) {
    let giver = Client::connect_with(ClientOptions::new(replies.addresses())).await.expect("connecting");
    // It has its connections before, and none of them tells anything any more. New ones do.
    for node in (0..cluster.nodes.len()).filter(|node| cluster.runs(*node)) {
        let address = &replies.addresses()[node];
        // A machine that is slow for a second makes a node look gone.
        eventually("a report", async || {
            giver.node_report(address, PATIENCE).await.map_err(|error| error.to_string())
        })
        .await;
    }
    let begun = Instant::now();
    replies.mute(Way::Replies, false);
    let order = order(giver.clone());
    let mut given = tokio::spawn(async move { (order.await, begun.elapsed()) });
    let watcher = Client::connect_with(ClientOptions::new(replies.addresses())).await.expect("connecting");
    let (seen, ended) = tokio::select! {
        seen = until(&watcher, cluster, what, &done) => (seen, None),
        // Nobody sees one that failed, or that was answered though it wasn't done: that is told, not that time ran out.
        ended = &mut given => {
            let ended = ended.expect("no panic");
            let told = ended.0.as_ref().unwrap_or_else(|error| panic!("{what}: {error}\n{}", picture(cluster)));
            let map = until(&watcher, cluster, what, |map| map.version >= *told).await;
            assert!(done(&map), "{what}: answered at {told}, and not done\n{}", picture(cluster));
            (map, Some(ended))
        }
    };
    // An answer to the first attempt would have come by then. The leader's death tells that none comes: were it to die
    // sooner, the next one could have answered already.
    tokio::time::sleep(ANSWERED.saturating_sub(begun.elapsed())).await;
    let early = ended.is_some() || given.is_finished();
    let dies = leader(&watcher, cluster, METADATA_SHARD).await;
    cluster.kill(dies);
    let (told, took) = match ended {
        Some(ended) => ended,
        None => given.await.expect("no panic"),
    };
    let told = told.unwrap_or_else(|error| panic!("{what}: {error}"));
    cluster.spawn(dies);
    cluster.wait_ready(dies);
    // Whoever is asked may not have heard of it yet.
    let map = until(&watcher, cluster, what, |map| map.version >= told).await;
    assert_eq!(stamps(&map), stamps(&seen), "{what}: it was done twice");
    assert!(took >= ANSWERED, "{what}: it was answered after {took:?}");
    println!("{what}: at {told}, seen at {}; repeated before the leader died: {early}", seen.version);
    giver.close().await;
    watcher.close().await;
}

async fn client_map(replies: &Replies) -> Arc<ClusterMap> {
    let client = Client::connect_with(ClientOptions::new(replies.addresses())).await.expect("connecting");
    let map = client.map().await.expect("the map");
    client.close().await;
    map
}

/// Runs a command that repeats what was done already: that is success.
fn repeats(cluster: &Cluster, args: &[&str], says: &str) {
    let output = cluster.run(args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{args:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains(says), "{args:?}: {text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orders_whose_answers_are_lost_are_given_once() {
    let _room = ROOM.acquire().await.expect("it isn't closed");
    let mut cluster = Cluster::prepared(4, &free_ports(8), Options::default());
    let replies = Replies::new(&cluster.addresses(), 7);
    for (node, address) in replies.addresses().iter().enumerate() {
        let config = &cluster.nodes[node].config;
        let text = std::fs::read_to_string(config).expect("its settings");
        let text = text.replace("[peer]\n", &format!("advertise = \"{address}\"\n[peer]\n"));
        std::fs::write(config, text).expect("written");
        cluster.spawn(node);
    }
    cluster.wait_all_ready();
    let client = Client::connect_with(ClientOptions::new(replies.addresses())).await.expect("connecting");
    set(&client, PolicyChange::Automatic(false)).await;
    let created = client.create_database("db", 1, 4, PATIENCE).await;
    created.expect("created");
    let rest = Rest { metadata: 3, ..Rest::default() };
    rest.reached(&client, &cluster, SETTLE).await;
    let map = client.map().await.expect("the map");
    // One that is no voter of the metadata shard: those die.
    let held = |node| map.shards[&METADATA_SHARD].member_on(node).is_some();
    let node = *map.nodes.keys().find(|node| !held(**node)).expect("four nodes, three voters");
    assert_eq!(node.0, 4, "the first three are voters");
    let name = node.to_string();
    client.close().await;

    in_doubt(
        &mut cluster,
        &replies,
        "a setting",
        async |client: Client| client.change_setting(PolicyChange::MovesAtATime(3), LONG).await,
        |map| map.policy.moves_at_a_time == 3,
    )
    .await;
    repeats(&cluster, &["admin", "settings", "set", "placement.moves_at_a_time", "3"], "3");
    in_doubt(
        &mut cluster,
        &replies,
        "another number of replicas",
        async |client: Client| {
            loop {
                match client.set_replicas("db", 3, LONG).await {
                    // So slow a machine is another matter.
                    Err(error) if error.to_string().contains("no answer from node") => {
                        println!("another number of replicas: {error}");
                    }
                    end => return end,
                }
            }
        },
        |map| map.database("db").expect("it").replicas == 3,
    )
    .await;
    repeats(&cluster, &["admin", "database", "set-replicas", "db", "3"], "3 replicas");
    in_doubt(
        &mut cluster,
        &replies,
        "a drain",
        async move |client: Client| client.set_standing(node, Standing::Draining, LONG).await,
        |map| map.nodes[&node].standing == Standing::Draining,
    )
    .await;
    repeats(&cluster, &["admin", "node", "drain", &name, "--wait"], "is empty");
    in_doubt(
        &mut cluster,
        &replies,
        "the end of a drain",
        async move |client: Client| client.set_standing(node, Standing::Member, LONG).await,
        |map| map.nodes[&node].standing == Standing::Member,
    )
    .await;
    repeats(&cluster, &["admin", "node", "drain", &name, "--cancel"], "takes replicas again");
    let client = Client::connect_with(ClientOptions::new(replies.addresses())).await.expect("connecting");
    // Who has restarted is looked at anew, and a plan of before is stale then.
    let mut last = None;
    let plan = eventually("there is something to move", async || {
        let plan = client.plan_rebalance(false, PATIENCE).await.map_err(|error| error.to_string())?;
        let same = last.replace(plan.id) == Some(plan.id);
        tokio::time::sleep(Duration::from_millis(500)).await;
        if plan.total.moves > 0 && same { Ok(plan.id) } else { Err(format!("{plan:?}")) }
    })
    .await;
    // Where nothing was ever moved: what moves nothing hasn't begun, and isn't at its end.
    let error = client.start_rebalance(0, PATIENCE).await.expect_err("refused").to_string();
    assert!(error.contains("nothing to begin"), "{error}");
    for order in [RebalanceOrder::Cancel, RebalanceOrder::Pause, RebalanceOrder::Resume] {
        let error = client.control_rebalance(0, order, PATIENCE).await.expect_err("refused").to_string();
        assert!(error.contains("no rebalancing was ever begun"), "{order:?}: {error}");
    }
    client.close().await;
    in_doubt(
        &mut cluster,
        &replies,
        "a rebalancing",
        async move |client: Client| {
            let mut plan = plan;
            loop {
                match client.start_rebalance(plan, LONG).await {
                    Err(error) if error.to_string().contains("stale") => {
                        println!("a rebalancing: {error}");
                        // Who is asked may not hear the others at first, and has nothing to move then.
                        plan = loop {
                            let fresh = client.plan_rebalance(false, LONG).await?;
                            if fresh.total.moves > 0 {
                                break fresh.id;
                            }
                            println!("a rebalancing: {fresh:?}");
                        };
                    }
                    end => return end,
                }
            }
        },
        |map| map.rebalance.plan != 0,
    )
    .await;
    let map = client_map(&replies).await;
    let plan = format!("{:016x}", map.rebalance.plan);
    repeats(&cluster, &["admin", "rebalance", "start", &plan, "--wait"], "is done");
    repeats(&cluster, &["admin", "node", "drain", &name, "--wait"], "is empty");
    in_doubt(
        &mut cluster,
        &replies,
        "a removal",
        async move |client: Client| client.set_standing(node, Standing::Removed, LONG).await,
        |map| map.nodes[&node].standing == Standing::Removed,
    )
    .await;
    repeats(&cluster, &["admin", "node", "remove", &name], "removed already");
    cluster.wait_exit(3, PATIENCE);
    let client = Client::connect_with(ClientOptions::new(replies.addresses())).await.expect("connecting");
    let map = Rest { metadata: 3, ..Rest::default() }.reached(&client, &cluster, SETTLE).await;
    assert!(living(&map).all(|shard| shard.ordered().all(|member| member.node != node)));
    client.close().await;
}
