//! The metadata shard goes on with a replica that has missed a part of what was decided.

use std::collections::BTreeMap;
use std::time::Duration;

use pontoon::client::{Client, Database};
use pontoon::ids::{METADATA_SHARD, NodeId, ShardId};
use pontoon::machine::command::PolicyChange;
use pontoon::placement::map::{ClusterMap, Standing};

use crate::cluster::Cluster;
use crate::rest::{PATIENCE, id, living, set, until};
use crate::{ROOM, eventually};

/// Puts values until each shard has one: a key of each.
async fn fill(client: &Client, name: &str, value: &str) -> BTreeMap<ShardId, String> {
    let map = client.map().await.expect("the map");
    let database = map.database(name).expect("the database");
    let mut keys = BTreeMap::new();
    for number in 0.. {
        let key = format!("key-{number}");
        let shard = map.shard_of_key(database, key.as_bytes()).expect("a shard").id;
        if keys.contains_key(&shard) {
            continue;
        }
        client.database(name).put(key.clone(), value.to_owned()).await.expect("a write");
        keys.insert(shard, key);
        if keys.len() == database.shards.len() {
            break;
        }
    }
    keys
}

/// Waits until a key is served, with this value.
async fn serves(database: &Database, key: &str, value: &str) {
    let patient = database.with_timeout(Duration::from_secs(2));
    eventually(&format!("{key} is served"), async || match patient.get(key.to_owned()).await {
        Ok(Some(found)) if found.value == value => Ok(()),
        Ok(found) => panic!("{key} is {found:?}, not {value}"),
        Err(error) => Err(error.to_string()),
    })
    .await;
}

/// Shards of a database that are on a node alone.
fn on(map: &ClusterMap, name: &str, node: NodeId) -> Vec<ShardId> {
    let database = map.database(name).expect("the database").id;
    let alone = |members: &[_]| matches!(members, [pontoon::placement::map::Member { node: only, .. }] if *only == node);
    living(map).filter(|s| s.database == database && alone(&s.members)).map(|s| s.id).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_metadata_voter_that_lags_goes_on_and_who_joined_since_is_a_member_again() {
    let _room = ROOM.acquire().await.expect("it isn't closed");
    let mut cluster = Cluster::new(3);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    set(&client, PolicyChange::ReplaceAfterMs(0)).await;
    cluster.database(&client, "kept", 1, 9).await;
    cluster.database(&client, "dropped", 1, 1).await;
    let kept = fill(&client, "kept", "old").await;
    // Node 3 has heard of all that, and of nothing that follows.
    let seen = client.map().await.expect("the map").version;
    let third = id(&client, &cluster, 2).await;
    eventually("node 3 has it all", async || {
        let report = client.node_report(&cluster.nodes[2].client, PATIENCE).await;
        let report = report.map_err(|error| error.to_string())?;
        let metadata = report.replicas.iter().find(|replica| replica.shard == METADATA_SHARD);
        let group = metadata.and_then(|replica| replica.group.as_ref()).ok_or("no replica")?;
        if group.applied == group.last { Ok(()) } else { Err(format!("{group:?}")) }
    })
    .await;
    cluster.kill(2);
    cluster.database(&client, "since", 3, 2).await;
    client.database("since").put("k", "v").await.expect("a write");
    client.drop_database("dropped", PATIENCE).await.expect("dropped");
    // A plan says whom it was made without; that nothing moves there is no sign of what a node is worth.
    eventually("who isn't there is named", async || {
        let plan = client.plan_rebalance(false, PATIENCE).await.map_err(|error| error.to_string())?;
        // On a machine that is slow for a second others look gone too.
        if plan.silent.contains(&third) { Ok(()) } else { Err(format!("{plan:?}")) }
    })
    .await;
    let joined = cluster.join();
    let fourth = id(&client, &cluster, joined).await;
    // It gets its share of what was there before. That isn't done by itself while a node doesn't answer.
    eventually("a rebalancing begins", async || {
        let plan = client.plan_rebalance(false, PATIENCE).await.map_err(|error| error.to_string())?;
        if plan.total.moves < 2 {
            return Err(format!("{plan:?}"));
        }
        client.start_rebalance(plan.id, PATIENCE).await.map_err(|error| error.to_string())
    })
    .await;
    let moved = until(&client, &cluster, "replicas move to the new node", |map| {
        map.rebalance.plan != 0
            && living(map).all(|s| s.moving.is_none() && s.target.is_none())
            && on(map, "kept", fourth).len() >= 2
    })
    .await;
    assert!(moved.version > seen);
    let (on_third, on_fourth) = (on(&moved, "kept", third), on(&moved, "kept", fourth));
    println!(
        "{} shards are on the voter that is left, {} on who joined since",
        on_third.len(),
        on_fourth.len()
    );
    client.close().await;

    // The other two, and with them all that was decided, are gone for good.
    for node in [0, 1] {
        cluster.kill(node);
        std::fs::remove_dir_all(&cluster.nodes[node].data).expect("its disk");
    }
    cluster.spawn(2);
    cluster.wait_ready(2);
    let report = cluster.dir.path().join("report.json");
    let recover = ["admin", "recover", "(metadata)", "0", "--from", "3"];
    let shown = cluster.run(&recover);
    let text = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert_eq!(shown.status.code(), Some(1), "{text}{}", String::from_utf8_lossy(&shown.stderr));
    for part in ["Databases", "joined since", "ersions of"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let accepted =
        [&recover[..], &["--accept-data-loss", "--report", report.to_str().expect("a path")]].concat();
    let done = cluster.run(&accepted);
    assert!(done.status.success(), "{}\n{}", String::from_utf8_lossy(&done.stderr), cluster.log(2));

    // Who joined since makes itself known again, under the same number; and so what moved to it is found.
    let client = cluster.client().await;
    let map =
        until(&client, &cluster, "the fourth node is known again", |map| map.nodes.contains_key(&fourth))
            .await;
    assert_eq!(map.nodes[&fourth].standing, Standing::Member);
    assert_eq!(map.nodes[&fourth].client_address, cluster.nodes[joined].client);
    assert!(map.version >= 1 << 32, "{}", map.version);
    assert_eq!(map.nodes.len(), 4, "{:?}", map.nodes);
    let database = client.database("kept");
    for shard in on_third.iter().chain(&on_fourth) {
        serves(&database, &kept[shard], "old").await;
        database.put(kept[shard].clone(), "new").await.expect("a write");
    }
    // As documented: databases made since aren't there, dropped ones are again.
    let map = client.map().await.expect("the map");
    assert!(map.database("since").is_none() && map.database("dropped").is_some());
    client.drop_database("dropped", PATIENCE).await.expect("dropped again");
    // All ids are new ones, and both nodes take replicas; the others are given up.
    for node in map.nodes.keys().filter(|node| ![third, fourth].contains(node)) {
        client.set_standing(*node, Standing::Leaving, PATIENCE).await.expect("given up");
    }
    let next = cluster.database(&client, "since", 2, 2).await;
    next.put("k", "again").await.expect("a write");
    let map = client.map().await.expect("the map");
    assert!(map.database("since").expect("it").id.0 > 1 << 32);
    // A restart changes nothing of it.
    cluster.kill(joined);
    cluster.spawn(joined);
    cluster.wait_ready(joined);
    let fifth = cluster.join();
    let fifth = id(&client, &cluster, fifth).await;
    assert!(fifth.0 > 1 << 32, "{fifth}");
    for shard in on_fourth {
        serves(&database, &kept[&shard], "new").await;
    }
    assert_eq!(client.map().await.expect("the map").nodes.len(), 5);
    client.close().await;
}
