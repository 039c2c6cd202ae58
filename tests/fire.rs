//! Supervision under fire: replicas that panic at any boundary of their work while clients use them,
//! threads that panic and take their node along, and an entry that no replica survives.

#[path = "support/cluster.rs"]
mod cluster;
#[path = "support/counters.rs"]
mod counters;
#[path = "fire/filler.rs"]
mod filler;
#[path = "fire/registers.rs"]
mod registers;
#[path = "fire/replicas.rs"]
mod replicas;

use std::collections::BTreeMap;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use cluster::{Cluster, Options, STOPPED, free_ports};
use counters::{Load, Tally, assert_exact};
use filler::Filler;
use pontoon::client::{Client, ClientError, Database, NotApplied};
use pontoon::failpoints::{POINTS, can_fail};
use pontoon::ids::{METADATA_SHARD, ShardId};
use pontoon::limits;
use pontoon::node::handle::{ReplicaHealth, ReplicaReport};
use pontoon::refusal::Refusal;
use registers::Registers;
use replicas::{assert_equal_replicas, caught_up, content, leads, report};

/// For a node to come to a point, too, to which it comes with some megabytes that are written: on a busy machine, minutes.
const PATIENCE: Duration = Duration::from_secs(180);
/// Of each of two databases.
const SHARDS: u32 = 4;

/// Nodes that flush often, keep little of their logs for others, and send snapshots fast.
fn prepared(count: usize) -> Cluster {
    prepared_with(count, Vec::new())
}

/// The same, with more in the environment of each.
fn prepared_with(count: usize, env: Vec<(&'static str, String)>) -> Cluster {
    let extra = "[snapshot]\nbytes_per_second = \"64MiB\"\n".to_owned();
    let options = Options { extra, env, ..Options::default() };
    let cluster = Cluster::prepared(count, &free_ports(2 * count), options);
    for node in &cluster.nodes {
        let text = std::fs::read_to_string(&node.config).expect("its settings");
        let text = text
            .replace("memtable_bytes = \"32MiB\"", "memtable_bytes = \"16MiB\"\nlog_keep_bytes = \"64KiB\"")
            .replace("log_file_bytes = \"8MiB\"", "log_file_bytes = \"4MiB\"")
            .replace("log_bytes = \"64MiB\"", "log_bytes = \"16MiB\"");
        std::fs::write(&node.config, text).expect("written");
    }
    cluster
}

fn started(count: usize) -> Cluster {
    let mut cluster = prepared(count);
    for node in 0..count {
        cluster.spawn(node);
    }
    cluster.wait_all_ready();
    cluster
}

/// Sets what goes wrong in a node; nothing, if there are no rules.
async fn arm(client: &Client, cluster: &Cluster, node: usize, rules: &str) {
    let armed = client.inject(&cluster.nodes[node].client, METADATA_SHARD, &format!("arm={rules}")).await;
    match armed {
        // The node may be gone before it has answered.
        Ok(()) | Err(ClientError::Unknown(_)) if !rules.is_empty() => {}
        armed => armed.unwrap_or_else(|error| panic!("{rules}: {error}")),
    }
}

/// How often, by point, a node's log tells of a failure on purpose.
fn struck(cluster: &Cluster, node: usize) -> BTreeMap<&'static str, usize> {
    let log = cluster.whole_log(node);
    let crashes: Vec<&str> = log.lines().filter(|line| line.contains("replica crashed")).collect();
    let of = |point: &str| {
        let names = |line: &&&str| {
            let texts = [format!("injected panic at {point}"), format!("injected error at {point}")];
            let mut ends = texts.iter().filter_map(|text| Some(line.split_once(text.as_str())?.1));
            // The name of one may begin that of another.
            ends.any(|rest| !rest.starts_with(|c: char| c.is_alphanumeric() || ".-".contains(c)))
        };
        crashes.iter().filter(names).count()
    };
    POINTS.iter().map(|(point, _)| (*point, of(point))).filter(|(_, count)| *count > 0).collect()
}

/// The same of all nodes.
fn struck_anywhere(cluster: &Cluster) -> BTreeMap<&'static str, usize> {
    (0..cluster.nodes.len()).flat_map(|node| struck(cluster, node)).collect()
}

/// Points of replicas that were not struck.
fn missed(struck: &BTreeMap<&'static str, usize>) -> Vec<&'static str> {
    // Whether a follower needs a snapshot, and a memtable is in the way of a compaction, is left to chance.
    let by_chance =
        ["replica/open", "replica/snapshot.wanted", "replica/snapshot.made", "replica/snapshot.done"];
    let points = POINTS.iter().map(|(name, _)| *name).filter(|name| name.starts_with("replica/"));
    // Nobody's members change here: that is for `grow_fire`.
    let points = points.filter(|name| !name.starts_with("replica/change."));
    points.filter(|point| !struck.contains_key(point) && !by_chance.contains(point)).collect()
}

/// Waits until every replica of every node serves.
async fn all_serve(client: &Client, cluster: &Cluster) {
    let begun = Instant::now();
    for node in 0..cluster.nodes.len() {
        loop {
            let report = report(client, cluster, node).await;
            let serves = |r: &ReplicaReport| r.health == ReplicaHealth::Serving && r.group.is_some();
            if report.replicas.iter().all(serves) && report.replicas.len() as u32 == 2 * SHARDS + 1 {
                break;
            }
            assert!(begun.elapsed() < PATIENCE, "node {node}: {:#?}\n{}", report.replicas, cluster.log(node));
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// What goes wrong in `node` of three: each point of replicas at least once in one of them, and any by
/// chance; never so often in one replica that it would be quarantined.
fn fire(node: usize, seed: u64) -> String {
    let most = limits::CRASHES_MAX - 1;
    let points = POINTS.iter().map(|(name, _)| *name).filter(|name| name.starts_with("replica/"));
    let mut rules = Vec::new();
    for (at, point) in points.enumerate() {
        // Passed some thousand times a second, or a few times in all.
        let is = |names: &[&str]| names.iter().any(|name| point.contains(name));
        let (skip, chance) = match () {
            () if is(&["snapshot", "open"]) => (0, 0.3),
            () if is(&["freeze", "flush", "compact", "hard-state"]) => (at % 3, 0.03),
            () => (150 * (at + 1), 0.0002),
        };
        if at % 3 == node {
            rules.push(format!("panic:{point}:skip={skip}:times=1:each={most}"));
        }
        let fault = if can_fail(point) && seed.is_multiple_of(2) { "error" } else { "panic" };
        rules.push(format!("{fault}:{point}:p={chance}:seed={}:each={most}", seed + at as u64));
    }
    // Results that come late, to the next start of a replica.
    for point in ["log/sync.before", "log/sync.after", "flush/redo-durable", "flush/engine-synced"] {
        rules.push(format!("delay:{point}:p=0.01:seed={seed}:ms=40"));
    }
    rules.join(";")
}

/// What a node says that a panic at `point` has ended.
fn thread_of(point: &str) -> &'static str {
    match point.split('/').next() {
        Some("log") if point == "log/purge" => "the thread log-purge panicked",
        Some("log") => "the thread log-writer panicked",
        Some("flush") => "the flush thread panicked",
        Some("snapshot") => "the snapshot thread panicked",
        Some("send") => "the thread that sends snapshots panicked",
        Some("read") => "the read thread panicked",
        Some("supervisor") => "the supervisor panicked",
        _ => panic!("a panic at {point} ends no node"),
    }
}

/// Waits for the node's end, for that reason.
fn ends_at(cluster: &mut Cluster, node: usize, point: &str) {
    let status = cluster.wait_exit(node, PATIENCE);
    assert_ended_at(cluster, node, status, point);
}

/// That the node has ended for that reason.
fn assert_ended_at(cluster: &Cluster, node: usize, status: ExitStatus, point: &str) {
    let log = cluster.log(node);
    assert_eq!(status.code(), Some(70), "{point}: {log}");
    // Other threads may have a last word after that.
    let last = log.lines().rfind(|line| line.starts_with("error: ")).unwrap_or_default();
    let says = last.contains(thread_of(point)) && last.contains(&format!("injected panic at {point}"));
    assert!(says, "{point}: {log}");
}

/// `PONTOON_FIRE_ROUNDS=20 PONTOON_FIRE_SEED=1 cargo test --test fire panics_at -- --nocapture` goes on for
/// about half an hour.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn panics_at_every_boundary_lose_nothing_double_nothing_and_stay_alone() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let rounds = number("PONTOON_FIRE_ROUNDS").unwrap_or(1);
    let seed = number("PONTOON_FIRE_SEED").unwrap_or(1);
    let mut cluster = started(3);
    let client = cluster.client().await;
    cluster.database(&client, "fire", 3, SHARDS).await;
    let database = client.database("fire").with_timeout(Duration::from_secs(120));
    let other = cluster.client().await;
    let others = [database.clone(), other.database("fire").with_timeout(Duration::from_secs(120))];
    let filled = cluster.database(&client, "filled", 3, SHARDS).await.with_timeout(Duration::from_secs(120));
    let (mut all, mut tally) = (BTreeMap::new(), Tally::default());
    let mut quiet_since = Instant::now();
    for round in 0..rounds {
        if round > 0 {
            // What a replica was spared for lies behind it.
            let window = Duration::from_millis(limits::CRASH_WINDOW_MS + 1_000);
            tokio::time::sleep(window.saturating_sub(quiet_since.elapsed())).await;
        }
        let before: Vec<_> = (0..3).map(|node| struck(&cluster, node)).collect();
        let load = Load::start(&others, 8);
        let registers = Registers::start(&filled, 3, round);
        let filler = Filler::start(&filled, 6, Duration::from_millis(5));
        load.progress(100).await;
        for node in 0..3 {
            arm(&client, &cluster, node, &fire(node, seed + 1_001 * round)).await;
        }
        tokio::time::sleep(Duration::from_secs(4)).await;
        // One was away for longer than the log is kept, and comes back into the fire.
        let away = (round % 3) as usize;
        cluster.kill(away);
        tokio::time::sleep(Duration::from_millis(2_500)).await;
        cluster.spawn_armed(away, &fire(away, seed + 1_001 * round + 501));
        cluster.wait_ready(away);
        tokio::time::sleep(Duration::from_secs(6)).await;
        // A machine that is slow comes to all of them later.
        let begun = Instant::now();
        while rounds == 1 && begun.elapsed() < PATIENCE && !missed(&struck_anywhere(&cluster)).is_empty() {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        for node in 0..3 {
            arm(&client, &cluster, node, "").await;
        }
        quiet_since = Instant::now();
        filler.stop().await;
        let (keys, undecided, unknown) = registers.check().await;
        tally.add(load.stop().await);
        assert_eq!(tally.errors, []);

        // Nothing is quarantined, and what restarts is counted.
        all_serve(&client, &cluster).await;
        let mut now = Vec::new();
        for (node, before) in before.iter().enumerate() {
            let found = struck(&cluster, node);
            let crashes = cluster.whole_log(node).matches("replica crashed").count();
            assert_eq!(
                found.values().sum::<usize>(),
                crashes,
                "node {node} had others than those on purpose"
            );
            let restarts: u32 =
                report(&client, &cluster, node).await.replicas.iter().map(|r| r.restarts).sum();
            if rounds == 1 && node != away {
                assert_eq!(restarts as usize, crashes, "node {node}");
            }
            for (point, count) in &found {
                *all.entry(*point).or_insert(0) += count - before.get(point).unwrap_or(&0);
            }
            now.push(crashes);
        }
        println!(
            "round {round}: {} writes, {} additions, {keys} keys linearizable ({undecided} undecided, {unknown} \
             writes of unknown outcome), crashes {now:?}",
            tally.writes.values().sum::<u64>(),
            tally.added
        );
        assert!(undecided * 10 <= keys && keys >= 3, "{undecided} of {keys}");
        if round + 1 == rounds {
            assert_exact(&client, "fire", &database, &tally).await;
        }
        for name in ["fire", "filled"] {
            assert_equal_replicas(&client, &cluster, name).await;
        }
    }
    println!("{all:?}");
    assert_eq!(missed(&all), Vec::<&str>::new(), "points where nothing happened");
    other.close().await;
    client.close().await;
}

/// Each of them ends the node, which is alone: what it has acknowledged is on its own disk, or lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thread_that_all_share_ends_the_node_and_the_next_start_has_everything() {
    let mut cluster = started(1);
    let client = cluster.client().await;
    cluster.database(&client, "shared", 1, 2).await;
    let database = client.database("shared").with_timeout(Duration::from_secs(120));
    let filled = cluster.database(&client, "filled", 1, 2).await.with_timeout(Duration::from_secs(120));
    filled.put("cold", "v").await.expect("a write");
    let load = Load::start(std::slice::from_ref(&database), 6);
    let filler = Filler::start(&filled, 6, Duration::from_millis(2));
    let points: Vec<_> = (POINTS.iter().map(|(name, _)| *name))
        .filter(|name| ["log/", "flush/", "read/"].iter().any(|class| name.starts_with(class)))
        .filter(|name| !name.starts_with("log/install"))
        .chain(["supervisor/rebuild"])
        .collect();
    assert_eq!(points.len(), 16);
    for (at, point) in points.into_iter().enumerate() {
        load.progress(30).await;
        // Not always at once.
        arm(&client, &cluster, 0, &format!("panic:{point}:skip={}", at % 2)).await;
        let provoked = match point {
            "log/create.before" | "log/create.after" => {
                let client = client.clone();
                let name = format!("new-{at}");
                Some(tokio::spawn(async move {
                    for part in 0..=at % 2 {
                        let name = format!("{name}-{part}");
                        client.create_database(&name, 1, 1, PATIENCE).await.expect("created in the end");
                    }
                }))
            }
            "log/remove.before" | "log/remove.after" => {
                let client = client.clone();
                let name = format!("gone-{at}");
                Some(tokio::spawn(async move {
                    for part in 0..=at % 2 {
                        let name = format!("{name}-{part}");
                        client.create_database(&name, 1, 1, PATIENCE).await.expect("created");
                        client.drop_database(&name, PATIENCE).await.expect("dropped in the end");
                    }
                }))
            }
            "read/engine" => {
                let database = filled.clone();
                Some(tokio::spawn(async move {
                    content(&database).await;
                }))
            }
            "supervisor/rebuild" => {
                let address = cluster.nodes[0].client.clone();
                let client = client.clone();
                Some(tokio::spawn(async move {
                    for shard in [1, 2] {
                        // The node may be gone before it has answered.
                        client.inject(&address, ShardId(shard), "panic").await.ok();
                    }
                }))
            }
            _ => None,
        };
        ends_at(&mut cluster, 0, point);
        cluster.spawn(0);
        cluster.wait_ready(0);
        if let Some(provoked) = provoked {
            provoked.await.expect("it ended well");
        }
    }
    load.progress(30).await;
    filler.stop().await;
    let tally = load.stop().await;
    assert_eq!(tally.errors, []);
    assert_exact(&client, "shared", &database, &tally).await;
    assert_eq!(filled.get("cold").await.expect("a read").expect("there").value, "v");
    client.close().await;
}

/// As if the engine waited for itself, or the disk didn't answer: all that helps is another start.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_store_that_hangs_ends_the_node_and_the_next_start_has_everything() {
    let patience_ms = 5_000;
    let mut cluster = prepared_with(1, vec![("PONTOON_TEST_STALL_MS", patience_ms.to_string())]);
    cluster.spawn(0);
    cluster.wait_ready(0);
    let client = cluster.client().await;
    cluster.database(&client, "kept", 1, 2).await;
    let database = client.database("kept").with_timeout(Duration::from_secs(120));
    let filled = cluster.database(&client, "filled", 1, 2).await.with_timeout(Duration::from_secs(120));
    filled.put("cold", "v").await.expect("a write");
    let load = Load::start(std::slice::from_ref(&database), 6);
    let filler = Filler::start(&filled, 6, Duration::from_millis(2));
    // A flush that takes longer than that, and gets on, is none that hangs.
    let step_ms = patience_ms / 4;
    let begun = Instant::now();
    arm(&client, &cluster, 0, &format!("delay:flush/batch-written:ms={step_ms}:times=6")).await;
    filler.progress(100).await;
    while begun.elapsed() < Duration::from_millis(6 * step_ms + 2_000) {
        let ended = cluster.ended(0);
        assert!(ended.is_none(), "{ended:?}: {}", cluster.log(0));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    for (point, what) in [("flush/batch-written", "flushing state to disk"), ("read/engine", "reading state")]
    {
        load.progress(30).await;
        arm(&client, &cluster, 0, &format!("delay:{point}:ms=600000:times=1")).await;
        // What memory doesn't have.
        let asked = filled.clone();
        let asks = tokio::spawn(async move { content(&asked).await });
        let status = cluster.wait_exit(0, PATIENCE);
        let log = cluster.log(0);
        assert_eq!(status.code(), Some(70), "{point}: {log}");
        let last = log.lines().rfind(|line| line.starts_with("error: ")).unwrap_or_default();
        assert!(last.contains("the state store hangs") && last.contains(what), "{point}: {log}");
        cluster.spawn(0);
        cluster.wait_ready(0);
        asks.await.expect("it ended well");
    }
    load.progress(30).await;
    filler.stop().await;
    let tally = load.stop().await;
    assert_eq!(tally.errors, []);
    assert_exact(&client, "kept", &database, &tally).await;
    assert_eq!(filled.get("cold").await.expect("a read").expect("there").value, "v");
    client.close().await;
}

/// The node of three that leads a shard, all of which run.
async fn leader_of(client: &Client, cluster: &Cluster, shard: ShardId) -> usize {
    let begun = Instant::now();
    loop {
        for node in 0..3 {
            if leads(&report(client, cluster, node).await, shard) {
                return node;
            }
        }
        assert!(begun.elapsed() < PATIENCE, "nobody leads");
    }
}

/// Kills a node, and writes until the others' logs don't hold any more what it lacks: it needs a snapshot then.
async fn leave_behind(
    client: &Client,
    cluster: &mut Cluster,
    database: &Database,
    away: usize,
    shard: ShardId,
) {
    let group = async |cluster: &Cluster, node| {
        let replicas = report(client, cluster, node).await.replicas;
        replicas.into_iter().find(|replica| replica.shard == shard)?.group
    };
    let leader = leader_of(client, cluster, shard).await;
    let has = group(cluster, leader).await.expect("the leader's log").last;
    cluster.kill(away);
    let begun = Instant::now();
    loop {
        let filler = Filler::start(database, 8, Duration::from_millis(2));
        filler.progress(200).await;
        filler.stop().await;
        let mut truncated = Vec::new();
        for node in (0..3).filter(|node| *node != away) {
            truncated.push(group(cluster, node).await.map_or(0, |group| group.truncated));
        }
        if truncated.iter().all(|index| *index > has) {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "never: logs without {has}; they begin behind {truncated:?}");
    }
}

/// Waits until one of these nodes has ended.
async fn first_to_end(cluster: &mut Cluster, nodes: &[usize]) -> (usize, ExitStatus) {
    let begun = Instant::now();
    loop {
        if let Some(ended) = nodes.iter().find_map(|node| Some((*node, cluster.ended(*node)?))) {
            return ended;
        }
        let logs = || nodes.iter().map(|node| cluster.log(*node)).collect::<Vec<_>>().join("\n---\n");
        assert!(begun.elapsed() < PATIENCE, "none of {nodes:?} ends:\n{}", logs());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The same for what makes, sends and installs snapshots: of the nodes of a shard one is brought up to date.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thread_that_panics_over_a_snapshot_ends_its_node_and_the_snapshot_comes_after_all() {
    let mut cluster = started(3);
    let client = cluster.client().await;
    cluster.database(&client, "behind", 3, 1).await;
    let database = client.database("behind").with_timeout(Duration::from_secs(120));
    let shard = ShardId(1);
    let load = Load::start(std::slice::from_ref(&database), 4);
    let makers = ["snapshot/make", "snapshot/step", "send/snapshot"];
    let takers = [
        "snapshot/load",
        "snapshot/loaded",
        "supervisor/install.before",
        "log/install.before",
        "log/install.after",
        "supervisor/install.reopen",
    ];
    for point in makers.into_iter().chain(takers) {
        // The leader is the one that makes it; another one was away.
        let leader = leader_of(&client, &cluster, shard).await;
        let away = (leader + 1) % 3;
        let others: Vec<usize> = (0..3).filter(|node| *node != away).collect();
        leave_behind(&client, &mut cluster, &database, away, shard).await;
        let rules = format!("panic:{point}");
        let ends = if makers.contains(&point) {
            for node in &others {
                arm(&client, &cluster, *node, &rules).await;
            }
            cluster.spawn(away);
            &others[..]
        } else {
            cluster.spawn_armed(away, &rules);
            &[away]
        };
        let (ended, status) = first_to_end(&mut cluster, ends).await;
        assert_ended_at(&cluster, ended, status, point);
        cluster.spawn(ended);
        for node in others.into_iter().filter(|node| makers.contains(&point) && *node != ended) {
            // It may have been elected, and have come there as well.
            let begun = Instant::now();
            let status = loop {
                let address = &cluster.nodes[node].client;
                let disarmed = client.inject(address, METADATA_SHARD, "arm=").await.is_ok();
                match cluster.ended(node) {
                    None if !disarmed => assert!(begun.elapsed() < PATIENCE, "{}", cluster.log(node)),
                    status => break status,
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            };
            if let Some(status) = status {
                assert_ended_at(&cluster, node, status, point);
                cluster.spawn(node);
                cluster.wait_ready(node);
            }
        }
        cluster.wait_ready(ended);
        caught_up(&client, &cluster, away, shard).await;
    }
    let tally = load.stop().await;
    assert_eq!(tally.errors, []);
    assert_equal_replicas(&client, &cluster, "behind").await;
    client.close().await;
}

/// It is said at once, and by how much; nobody waits for a leader meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_is_behind_is_not_made_leader_and_the_operator_hears_why() {
    let mut cluster = started(3);
    let client = cluster.client().await;
    cluster.database(&client, "behind", 3, 1).await;
    let database = client.database("behind").with_timeout(Duration::from_secs(120));
    let shard = ShardId(1);
    let leader = leader_of(&client, &cluster, shard).await;
    let away = (leader + 1) % 3;
    let id = report(&client, &cluster, away).await.node.0.to_string();
    let to_lead = ["admin", "transfer-leader", "behind", "1", &id, "--timeout", "30s"];
    leave_behind(&client, &mut cluster, &database, away, shard).await;
    // For as long as it takes to ask, on a busy machine.
    cluster.spawn_armed(away, "delay:snapshot/load:ms=5000");
    cluster.wait_ready(away);
    let begun = Instant::now();
    let told = loop {
        let asked = Instant::now();
        let told = cluster.run(&to_lead);
        let says = String::from_utf8_lossy(&told.stderr).into_owned();
        // Until it is heard of again.
        if !says.contains("doesn't answer") {
            assert!(asked.elapsed() < Duration::from_secs(10), "after {:?}", asked.elapsed());
            break (told.status.code(), says);
        }
        assert!(begun.elapsed() < PATIENCE, "{says}\n{}", cluster.log(away));
    };
    assert_eq!(told.0, Some(1), "{told:?}");
    assert!(told.1.contains("entries of its log") && told.1.contains("caught up"), "{told:?}");
    database.put("k", "v").await.expect("somebody leads");
    arm(&client, &cluster, away, "").await;
    caught_up(&client, &cluster, away, shard).await;
    let begun = Instant::now();
    // Until its leader has noticed.
    while cluster.run(&to_lead).status.code() != Some(0) {
        assert!(begun.elapsed() < PATIENCE, "{}", cluster.log(away));
    }
    assert_eq!(leader_of(&client, &cluster, shard).await, away);
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_entry_that_no_replica_survives_takes_its_shard_out_of_service_and_nothing_else() {
    let mut cluster = prepared(3);
    // Also in their next lives.
    let poison = "panic:replica/apply.before:data=poison";
    for node in 0..3 {
        cluster.spawn_armed(node, poison);
    }
    cluster.wait_all_ready();
    let client = cluster.client().await;
    let database = cluster.database(&client, "victim", 3, 4).await;
    for number in 0..40 {
        database.put(format!("key-{number}"), "before").await.expect("a write");
    }
    let map = client.map().await.expect("the map");
    let record = map.database("victim").expect("the database").clone();
    let shard_of = |key: &str| map.shard_of_key(&record, key.as_bytes()).expect("a shard").id;
    let shard = shard_of("key-0");

    // Its caller can't be told that it had no effect.
    let begun = Instant::now();
    let error = database.with_timeout(PATIENCE).put("key-0", "poison").await.expect_err("nobody applies it");
    assert!(matches!(error, ClientError::Unknown(_)), "{error}");
    assert!(error.to_string().contains("quarantined"), "{error}");
    // All others are told that the shard is out of service, and why, and don't wait for the deadline.
    for _ in 0..2 {
        let asked = Instant::now();
        let read = database.with_timeout(PATIENCE).get("key-0").await.expect_err("nobody serves it");
        let write =
            database.with_timeout(PATIENCE).put("key-0", "after").await.expect_err("nobody serves it");
        for error in [read, write] {
            let ClientError::NotApplied(NotApplied::Refused(Refusal::ShardQuarantined(why))) = &error else {
                panic!("{error:?}");
            };
            assert!(why.contains("of its log crashed it 5 times in a row: injected panic"), "{why}");
        }
        assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    }
    println!("quarantined after {:?}", begun.elapsed());
    let serves_on = async |what: &str| {
        for key in (0..40).map(|number| format!("key-{number}")).filter(|key| shard_of(key) != shard) {
            database.put(key.clone(), what.to_owned()).await.unwrap_or_else(|e| panic!("{what}: {key}: {e}"));
            let found = database.get(key.clone()).await.expect("a read").expect("there");
            assert_eq!(found.value, *what, "{key}");
        }
    };
    serves_on("meanwhile").await;

    // A person sees it.
    let set = cluster.run(&["set", "victim", "key-0", "x"]);
    let says = String::from_utf8_lossy(&set.stderr);
    assert_eq!(set.status.code(), Some(3), "{says}");
    assert!(says.contains("the shard is quarantined") && says.contains("pontoon status"), "{says}");
    let set = cluster.run(&["set", "victim", "key-0", "x", "--json"]);
    let says = String::from_utf8_lossy(&set.stdout) + String::from_utf8_lossy(&set.stderr);
    assert!(says.contains("\"quarantined\""), "{says}");
    let status = cluster.run(&["status", "victim", "--json"]);
    let text = String::from_utf8_lossy(&status.stdout);
    assert_eq!(status.status.code(), Some(1), "{text}");
    let status: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let shards = status["databases"][0]["shards"].as_array().expect("shards");
    for seen in shards {
        let expected = if seen["id"] == shard.0 { "quarantined" } else { "ok" };
        assert_eq!(seen["state"], expected, "{seen}");
    }

    // The next start of a node tries again, a few times, and serves the rest.
    for node in 0..3 {
        cluster.signal(node, rustix::process::Signal::TERM);
        assert_eq!(cluster.wait_exit(node, STOPPED).code(), Some(0), "{}", cluster.log(node));
        cluster.spawn_armed(node, poison);
        cluster.wait_ready(node);
    }
    let quarantined = async |node| {
        let report = report(&client, &cluster, node).await;
        let here = report.replicas.into_iter().find(|r| r.shard == shard).expect("a replica");
        (matches!(here.health, ReplicaHealth::Quarantined(_)), here.restarts)
    };
    let begun = Instant::now();
    loop {
        let mut count = 0;
        for node in 0..3 {
            count += usize::from(quarantined(node).await.0);
        }
        if count >= 2 {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "{count} are quarantined");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    serves_on("after").await;
    for node in 0..3 {
        let (_, restarts) = quarantined(node).await;
        assert!(restarts < limits::CRASHES_MAX as u32, "node {node}: {restarts}");
    }

    // Without the fault, as after an upgrade that mends it, the entry is applied, and nothing was lost.
    for node in 0..3 {
        cluster.kill(node);
        cluster.spawn(node);
    }
    cluster.wait_all_ready();
    let found = database.with_timeout(PATIENCE).get("key-0").await.expect("a read").expect("there");
    assert_eq!(found.value, "poison");
    client.close().await;
}

#[test]
fn the_page_on_tests_lists_every_point() {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/testing.md")).unwrap();
    for (name, what) in POINTS {
        assert!(page.contains(&format!("| `{name}` | {what} |")), "{name}");
    }
}
