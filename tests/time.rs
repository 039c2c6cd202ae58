//! A process that time passed by: a leader that is stopped for longer than an election, and goes on. And
//! nothing that anybody decides by a clock which can be set.

#[path = "support/cluster.rs"]
mod cluster;
#[path = "support/counters.rs"]
mod counters;
#[path = "sessions/wire.rs"]
#[allow(dead_code)]
mod wire;

use std::path::Path;
use std::time::{Duration, Instant};

use cluster::Cluster;
use counters::{Load, assert_exact};
use futures_util::future::join_all;
use pontoon::client::Client;
use pontoon::ids::ShardId;
use raft::StateRole;
use rustix::process::Signal;
use wire::{Session, What, Wire, dial};

/// For how long the leader is stopped: `PONTOON_PAUSE_SECONDS`, or a little longer than an election.
fn pause() -> Duration {
    let seconds = std::env::var("PONTOON_PAUSE_SECONDS").ok();
    Duration::from_secs(seconds.map_or(4, |seconds| seconds.parse().expect("a number of seconds")))
}

/// The index of the node that leads `shard`.
async fn leader(cluster: &Cluster, client: &Client, shard: ShardId) -> usize {
    let begun = Instant::now();
    loop {
        for (i, node) in cluster.nodes.iter().enumerate() {
            let Ok(report) = client.node_report(&node.client, Duration::from_secs(1)).await else { continue };
            let here = report.replicas.into_iter().find(|r| r.shard == shard);
            if here.and_then(|r| r.group).is_some_and(|g| g.role == StateRole::Leader) {
                return i;
            }
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "nobody leads shard {shard}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_leader_that_goes_on_reads_nothing_stale_and_doubles_nothing() {
    let mut cluster = Cluster::new(3);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    let database = cluster.database(&client, "stopped", 3, 1).await.with_timeout(Duration::from_secs(60));
    let map = client.map().await.expect("the map");
    let shard = map.database("stopped").expect("the database").shards[0];
    let mut last = database.put("k", "before").await.expect("a write");
    let mut own_writes = 1;
    let load = Load::start(&vec![database.clone(); 4], 12);
    load.progress(300).await;
    tokio::task::LocalSet::new()
        .run_until(async {
            let by_hand = Wire::new(&client, "stopped").await;
            for round in 0..2 {
                let stopped = leader(&cluster, &client, shard).await;
                // It has this connection while it still leads, and reads what is sent when it goes on.
                let kv = dial(&cluster.nodes[stopped].client).await.expect("connected");
                let warm = by_hand.send(&kv, Session::default(), &[(0, What::Get)]).await.expect("an answer");
                drop(warm);
                cluster.signal(stopped, Signal::STOP);
                let begun = Instant::now();
                last = database.put("k", format!("round {round}")).await.expect("the others elect a leader");
                own_writes += 1;
                load.progress(100).await;
                let asked = (0..16).map(|_| by_hand.send(&kv, Session::default(), &[(0, What::Get)]));
                let asked = tokio::time::timeout(Duration::from_secs(60), join_all(asked));
                let go_on = async {
                    tokio::time::sleep(pause().saturating_sub(begun.elapsed())).await;
                    cluster.signal(stopped, Signal::CONT);
                };
                let (answers, ()) = tokio::join!(asked, go_on);
                for answer in answers.expect("answers in time") {
                    match answer.expect("an answer").remove(0) {
                        Ok(version) => {
                            assert!(version >= last, "version {version} was read, {last} is there")
                        }
                        // Somebody else leads.
                        Err(refusal) => assert!(refusal.retryable(), "{refusal:?}"),
                    }
                }
                load.progress(200).await;
            }
        })
        .await;
    let mut tally = load.stop().await;
    assert_eq!(tally.errors, [], "a session expired, or a call was not answered in time");
    let found = database.get("k").await.expect("a read").expect("there");
    assert_eq!(found.version, last);
    *tally.writes.entry("k".into()).or_default() += own_writes;
    assert_exact(&client, "stopped", &database, &tally).await;
    client.close().await;
}

/// Lines of source files below `dir`, their tests left out, that `wanted` picks.
fn lines(dir: &Path, wanted: &dyn Fn(&str) -> bool, found: &mut Vec<String>) {
    let mut entries: Vec<_> =
        std::fs::read_dir(dir).expect("a directory").map(|e| e.expect("an entry").path()).collect();
    entries.sort();
    for path in entries {
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        if path.is_dir() {
            lines(&path, wanted, found);
        } else if name.ends_with(".rs") && !name.ends_with("tests.rs") {
            let text = std::fs::read_to_string(&path).expect("its text");
            let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
            let picked = code.lines().filter(|line| wanted(line)).map(str::trim);
            found.extend(picked.map(|line| format!("{}: {line}", path.display())));
        }
    }
}

/// Clocks that can be set: a jump of hours would reach whatever is decided by them.
#[test]
fn nothing_is_decided_by_a_clock_that_can_be_set() {
    let mut found = Vec::new();
    let clocks = ["SystemTime", "UNIX_EPOCH", "CLOCK_REALTIME", "ClockId::Realtime", ".modified()"];
    let wanted = |line: &str| {
        let line = line.trim_start();
        !line.starts_with("//")
            && !line.starts_with("use ")
            && clocks.iter().any(|clock| line.contains(clock))
    };
    lines(Path::new("src"), &wanted, &mut found);
    // What docs/testing.md says of them: names for what is set aside, and the time in a report.
    let allowed = [
        "src/cli/admin/recover.rs: let now = SystemTime::now()",
        "src/storage/aside.rs: let now = SystemTime::now()",
        "src/storage/identity/anew.rs: SystemTime::now()",
    ];
    let others: Vec<_> =
        found.iter().filter(|line| !allowed.iter().any(|allowed| line.starts_with(allowed))).collect();
    assert!(others.is_empty(), "a clock that can be set: {others:#?}");
    assert_eq!(found.len(), allowed.len(), "{found:#?}");
}
