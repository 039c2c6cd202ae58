//! Nodes in this process, through their handles: formation, joining, overload, rules, stop and start.

#[path = "support/local.rs"]
mod local;

use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use capnp_rpc::rpc_twoparty_capnp::Side;
use capnp_rpc::{RpcSystem, twoparty};
use futures_util::io::AsyncRead;
use local::{LocalCluster, PATIENCE, eventually, get, on_node, put, value};
use pontoon::client::options::ClientOptions;
use pontoon::client::{Client, ClientError, NotApplied};
use pontoon::codec::peer::{PeerRequest, PeerResponse};
use pontoon::ids::{METADATA_SHARD, NodeId};
use pontoon::limits;
use pontoon::machine::command::{Expect, MetaCommand, MetaReply};
use pontoon::node::handle::NodePhase;
use pontoon::node::load::Load;
use pontoon::placement::plan::plan_database;
use pontoon::refusal::Refusal;
use pontoon::schema::kv_capnp::{gate, op_result};
use pontoon::transport::call::{CallError, HelloConfig, PeerClient};
use pontoon::transport::rpc_stream::{reader_options, rpc_streams};

#[actix::test]
async fn three_nodes_form_a_cluster_write_read_and_stop() {
    let mut cluster = LocalCluster::start(3).await;
    let handle = cluster.handle(1);
    let shards = plan_database(&handle.map(), "db", 3, 1).expect("a plan");
    let create = MetaCommand::CreateDatabase { name: "db".into(), replicas: 3, shards };
    let reply = handle.meta(create, PATIENCE).await.expect("created");
    assert!(matches!(reply, MetaReply::Database { created: true, .. }), "{reply:?}");
    eventually("the database is in the map", || handle.map().database("db").is_some()).await;
    let shard = handle.map().database("db").expect("seen").shards[0];

    let leader = cluster.leader(shard).await;
    on_node(&cluster.handle(leader), shard, put("k", "v"), PATIENCE).await.expect("written");
    let answer = on_node(&cluster.handle(leader), shard, get("k"), PATIENCE).await.expect("read");
    assert_eq!(value(answer).as_deref(), Some("v"));
    // Another node doesn't answer for the leader, it names it.
    let other = on_node(&cluster.handle((leader + 1) % 3), shard, get("k"), PATIENCE).await;
    let leader_id = cluster.handle(leader).node();
    assert_eq!(other, Err(Refusal::NotLeader { shard, leader: Some(leader_id) }));
    // A request routed by another map is sent back with the version in force.
    let stale = cluster.handle(leader).submit(shard, 77, vec![get("k")], PATIENCE).await;
    assert!(matches!(stale, Err(Refusal::StaleRoute { asked: 77, range_version: 1, .. })), "{stale:?}");
    cluster.stop_all().await;
}

#[actix::test]
async fn clusters_of_any_size_form() {
    for (count, voters) in [(1, 1), (2, 1), (4, 3), (5, 5)] {
        let mut cluster = LocalCluster::start(count).await;
        let map = cluster.handle(0).map();
        let mut ids: Vec<_> = (0..count).map(|node| cluster.handle(node).node().0).collect();
        ids.sort_unstable();
        assert_eq!(ids, (1..=count as u64).collect::<Vec<_>>());
        assert_eq!(map.shards[&METADATA_SHARD].members.len(), voters, "{count} nodes");
        let client = cluster.client().await;
        let replicas = count.min(3) as u32;
        let (database, _) = cluster.database(&client, "db", replicas, 3).await;
        for number in 0..10 {
            database.put(format!("key-{number}"), "v").await.expect("a write");
        }
        // More replicas than nodes: said at once, and nothing is created.
        let refused = client.create_database("wide", count as u32 + 1, 1, PATIENCE).await;
        assert!(matches!(refused, Err(ClientError::NotApplied(NotApplied::Refused(_)))), "{refused:?}");
        client.close().await;
        cluster.stop_all().await;
    }
}

#[actix::test]
async fn late_nodes_join_and_a_wiped_one_joins_anew() {
    let mut cluster = LocalCluster::start(2).await;
    let joined = cluster.join().await;
    cluster.wait_ready().await;
    assert_eq!(cluster.handle(joined).node(), NodeId(3));
    let client = cluster.client().await;
    let (database, _) = cluster.database(&client, "db", 3, 2).await;
    database.put("k", "v").await.expect("a write");

    // With its directory gone it is somebody else: a vote that it forgot must not be given twice.
    cluster.stop(joined).await;
    std::fs::remove_dir_all(&cluster.nodes[joined].settings.node.data_dir).expect("removed");
    cluster.restart(joined).await;
    let node = cluster.nodes[joined].node.as_ref().expect("running");
    tokio::time::timeout(PATIENCE, node.ready()).await.expect("in time").expect("ready");
    assert_eq!(cluster.handle(joined).node(), NodeId(4));
    let own = cluster.handle(joined).report().await;
    assert!(own.replicas.is_empty(), "it holds nothing that the old one held: {own:?}");

    // The old node's replicas are without it, and serve.
    database.put("k", "w").await.expect("a write");
    // So does a listed node: it joins through the others rather than form anew.
    cluster.stop(1).await;
    std::fs::remove_dir_all(&cluster.nodes[1].settings.node.data_dir).expect("removed");
    cluster.restart(1).await;
    let node = cluster.nodes[1].node.as_ref().expect("running");
    tokio::time::timeout(PATIENCE, node.ready()).await.expect("in time").expect("ready");
    assert_eq!(cluster.handle(1).node(), NodeId(5));
    assert_eq!(cluster.handle(1).map().cluster_id, cluster.handle(0).map().cluster_id);
    client.close().await;
    cluster.stop_all().await;
}

#[actix::test]
async fn a_cluster_that_stops_comes_back_with_everything() {
    let mut cluster = LocalCluster::start(3).await;
    let client = cluster.client().await;
    let (database, _) = cluster.database(&client, "db", 3, 4).await;
    for number in 0..50 {
        database.put(format!("key-{number}"), number.to_string()).await.expect("a write");
    }
    let ids: Vec<_> = (0..3).map(|node| cluster.handle(node).node()).collect();
    for _ in 0..2 {
        // With connections open.
        cluster.stop_all().await;
        for node in 0..3 {
            cluster.restart(node).await;
        }
        cluster.wait_ready().await;
        assert_eq!((0..3).map(|node| cluster.handle(node).node()).collect::<Vec<_>>(), ids);
        for number in 0..50 {
            let found = database.get(format!("key-{number}")).await.expect("a read").expect("there");
            assert_eq!(found.value, number.to_string());
        }
    }
    client.close().await;
    cluster.stop_all().await;
}

/// A rolling restart is routine: nobody should have to ask what became of a cas.
#[actix::test]
async fn nodes_stopped_in_turn_leave_no_operation_in_doubt() {
    let mut cluster = LocalCluster::start(3).await;
    let client = cluster.client().await;
    let (database, _) = cluster.database(&client, "db", 3, 4).await;
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mut writers = Vec::new();
    for writer in 0..8 {
        let (database, stop) = (database.clone(), stop.clone());
        writers.push(actix::spawn(async move {
            let key = format!("key-{writer}");
            let mut version = database.put(key.clone(), "0").await.expect("a write");
            let mut count = 0_u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                match database.cas(key.clone(), Expect::Version(version), "next").await {
                    Ok(pontoon::client::Cas::Written(written)) => version = written,
                    other => panic!("{key}: {other:?}"),
                }
                count += 1;
            }
            count
        }));
    }
    for node in 0..3 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let begun = Instant::now();
        cluster.stop(node).await;
        assert!(begun.elapsed() < Duration::from_secs(4), "stopping took {:?}", begun.elapsed());
        tokio::time::sleep(Duration::from_millis(500)).await;
        cluster.restart(node).await;
        cluster.wait_ready().await;
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    for writer in writers {
        assert!(writer.await.expect("no operation in doubt") > 0);
    }
    client.close().await;
    cluster.stop_all().await;
}

#[actix::test]
async fn what_is_too_much_is_refused_at_once_and_the_rest_is_done() {
    let mut cluster = LocalCluster::start(1).await;
    let client = cluster.client().await;
    let (database, shards) = cluster.database(&client, "db", 1, 1).await;
    let (handle, shard) = (cluster.handle(0), shards[0]);
    cluster.leader(shard).await;

    // Twice what a replica holds, all at once.
    let batches = 2 * limits::REPLICA_PENDING_MAX / limits::BATCH_OPERATIONS_MAX;
    let batch: Vec<_> =
        (0..limits::BATCH_OPERATIONS_MAX).map(|number| put(&format!("{number}"), "v")).collect();
    let submits = (0..batches).map(|_| handle.submit(shard, 1, batch.clone(), PATIENCE));
    let (mut done, mut busy) = (0, 0);
    for results in futures_util::future::join_all(submits).await {
        for result in results.expect("admitted") {
            match result {
                Ok(_) => done += 1,
                Err(refusal @ Refusal::Busy { retry_after_ms, .. }) => {
                    assert!(retry_after_ms > 0 && refusal.retryable());
                    busy += 1;
                }
                Err(other) => panic!("{other}"),
            }
        }
    }
    assert_eq!(done + busy, batches * limits::BATCH_OPERATIONS_MAX);
    assert!(done >= limits::REPLICA_PENDING_MAX / 2 && busy > 0, "{done} done, {busy} refused");

    // Clients come back by themselves. One alone keeps so few calls under way that it is never refused.
    let mut clients = Vec::new();
    for _ in 0..8 {
        let mut options = ClientOptions::new([cluster.nodes[0].settings.client.advertise.clone()]);
        options.timeout = Duration::from_secs(60);
        clients.push(Client::connect_with(options).await.expect("connecting"));
    }
    let databases: Vec<_> = clients.iter().map(|client| client.database("db")).collect();
    let puts = databases.iter().flat_map(|database| {
        (0..limits::REPLICA_PENDING_MAX / 4).map(|number| database.put(format!("{number}"), "w"))
    });
    for result in futures_util::future::join_all(puts).await {
        result.expect("retried until it was done");
    }
    for client in clients {
        client.close().await;
    }
    let last = database.get("0").await.expect("a read").expect("there");
    assert_eq!(last.value, "w");
    client.close().await;
    cluster.stop_all().await;
}

/// While the log's disk stands, clients give up and come again. What they left must neither be carried
/// out when the disk is back, nor take memory that nobody counts.
#[actix::test]
async fn what_nobody_waits_for_any_more_is_not_begun() {
    let mut cluster = LocalCluster::start(1).await;
    let client = cluster.client().await;
    let (_, shards) = cluster.database(&client, "db", 1, 1).await;
    let (handle, shard) = (cluster.handle(0), shards[0]);
    cluster.leader(shard).await;
    handle.inject(shard, "log-stall").await.expect("test hooks");

    let mut begun = Vec::new();
    for number in 0..limits::WRITES_IN_FLIGHT_MAX {
        let handle = handle.clone();
        let operation = put(&format!("begun-{number}"), "v");
        begun.push(actix::spawn(async move { on_node(&handle, shard, operation, PATIENCE).await }));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let load = Arc::<Load>::default();
    let admitted = Some(Arc::new(load.admit(2, 0).expect("nothing else")));
    let late = vec![put("late", "v"), get("late")];
    let impatient = Duration::from_millis(100);
    let ends = handle.submit_admitted(shard, 1, late, impatient, admitted, None).await.expect("taken");
    assert!(matches!(ends[0], Err(Refusal::Unknown(_))), "{ends:?}");
    assert!(begun.iter().all(|begun| !begun.is_finished()), "the disk stands still");
    eventually("they don't count any more", || load.operations() == 0).await;
    assert!(begun.iter().all(|begun| !begun.is_finished()), "before the disk is back");

    for begun in begun {
        begun.await.expect("no panic").expect("written");
    }
    let answer = on_node(&handle, shard, get("late"), PATIENCE).await.expect("read");
    assert_eq!(value(answer), None);
    client.close().await;
    cluster.stop_all().await;
}

/// A client's reading side, until it is let read.
struct Shut<R> {
    inner: R,
    open: tokio::sync::watch::Receiver<bool>,
}

impl<R: AsyncRead + Unpin> AsyncRead for Shut<R> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, to: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut open = self.open.clone();
        if pin!(open.wait_for(|open| *open)).poll(cx).is_pending() {
            // The test opens it while nothing else goes on: looking again now and then will do.
            let waker = cx.waker().clone();
            actix::spawn(async move {
                tokio::time::sleep(Duration::from_millis(10)).await;
                waker.wake();
            });
            return Poll::Pending;
        }
        Pin::new(&mut self.inner).poll_read(cx, to)
    }
}

/// The memory of a node is not for the answers of clients that don't read them.
#[actix::test]
async fn a_client_that_reads_no_answers_is_given_only_so_many() {
    const CALLS: usize = 100;
    let mut cluster = LocalCluster::start(1).await;
    let client = cluster.client().await;
    let (database, _) = cluster.database(&client, "db", 1, 1).await;
    let great = limits::VALUE_BYTES_MAX / 2;
    database.put("k", vec![7; great]).await.expect("a write");

    let address = &cluster.nodes[0].settings.client.advertise;
    let stream = tokio::net::TcpStream::connect(address).await.expect("connecting");
    let (reader, writer, flusher) = rpc_streams(stream).expect("streams");
    let (open, shut) = tokio::sync::watch::channel(true);
    let reader = Shut { inner: reader, open: shut };
    let network = twoparty::VatNetwork::new(reader, writer, Side::Client, reader_options());
    let mut system = RpcSystem::new(Box::new(network), None);
    let gate: gate::Client = system.bootstrap(Side::Server);
    actix::spawn(flusher);
    actix::spawn(system);
    let mut hello = gate.open_request();
    let mut range = hello.get().init_hello().init_protocol();
    range.set_min(1);
    range.set_max(1);
    let welcome = hello.send().promise.await.expect("a welcome");
    let kv = welcome.get().and_then(|welcome| welcome.get_kv()).expect("the service");

    open.send_replace(false);
    let calls: Vec<_> = (0..CALLS)
        .map(|_| {
            let mut call = kv.get_request();
            call.get().set_database("db");
            call.get().set_key(b"k");
            call.send().promise
        })
        .collect();
    // All are taken in long before that.
    tokio::time::sleep(Duration::from_secs(1)).await;
    open.send_replace(true);
    let (mut values, mut busy) = (0, 0);
    for answer in futures_util::future::join_all(calls).await {
        let answer = answer.expect("an answer to each");
        let result = answer.get().and_then(|answer| answer.get_result()).expect("readable");
        match result.which().expect("a known end") {
            op_result::Value(value) => {
                assert_eq!(value.get_value().expect("readable").len(), great);
                values += 1;
            }
            op_result::Error(_) => busy += 1,
            _ => panic!("a get is a value or an error"),
        }
    }
    assert_eq!(values + busy, CALLS);
    assert!(values * great >= limits::CONNECTION_UNSENT_BYTES_MAX, "{values} are within the bound");
    assert!(busy > 0, "all {values} were kept for who didn't read");
    client.close().await;
    cluster.stop_all().await;
}

#[actix::test]
async fn rules_and_limits_are_told_as_what_they_are() {
    let mut cluster = LocalCluster::start(3).await;
    let client = cluster.client().await;
    let (database, _) = cluster.database(&client, "db", 3, 1).await;
    let (key_max, value_max) = (limits::KEY_BYTES_MAX, limits::VALUE_BYTES_MAX);

    let greatest = vec![7; value_max];
    database.put("k".repeat(key_max), greatest.clone()).await.expect("the greatest key and value");
    let found = database.get("k".repeat(key_max)).await.expect("a read").expect("there");
    assert!(found.value == greatest);
    database.put("empty", "").await.expect("an empty value");
    assert_eq!(database.get("empty").await.expect("a read").expect("there").value, "");

    let invalid = |result: Result<u64, ClientError>| match result {
        Err(ClientError::Invalid(text)) => text,
        other => panic!("{other:?}"),
    };
    let text = invalid(database.put("k", vec![7; value_max + 1]).await);
    assert!(text.contains(&value_max.to_string()), "{text}");
    assert!(invalid(database.put("", "v").await).contains("empty"));
    assert!(invalid(database.put("k".repeat(key_max + 1), "v").await).contains(&key_max.to_string()));
    let unknown = client.database("nowhere").get("k").await;
    assert_eq!(unknown, Err(ClientError::NotApplied(NotApplied::UnknownDatabase("nowhere".into()))));

    client.close().await;
    cluster.stop_all().await;
}

#[actix::test]
async fn a_dropped_database_is_gone_for_good_also_under_load() {
    let mut cluster = LocalCluster::start(3).await;
    let client = cluster.client().await;
    for round in 0..3 {
        let (database, shards) = cluster.database(&client, "db", 3, 4).await;
        assert_eq!(database.get("key-0").await.expect("a read"), None, "round {round} begins empty");
        let writers: Vec<_> = (0..8)
            .map(|writer| {
                let database = database.clone();
                actix::spawn(async move {
                    loop {
                        match database.put(format!("key-{writer}"), "v").await {
                            Ok(_) => {}
                            Err(ClientError::NotApplied(NotApplied::UnknownDatabase(_))) => return,
                            // The answer to the last one may have gone with its replica.
                            Err(ClientError::Unknown(_)) => return,
                            Err(other) => panic!("{other}"),
                        }
                    }
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(300)).await;
        client.drop_database("db", PATIENCE).await.expect("dropped");
        for writer in writers {
            tokio::time::timeout(PATIENCE, writer).await.expect("in time").expect("a writer");
        }
        for node in 0..3 {
            let handle = cluster.handle(node);
            let begun = Instant::now();
            while handle.report().await.replicas.iter().any(|r| shards.contains(&r.shard)) {
                assert!(begun.elapsed() < PATIENCE, "node {node} still holds a dropped shard");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        // Tombstones don't rise.
        cluster.stop(round).await;
        cluster.restart(round).await;
        cluster.wait_ready().await;
        let held = cluster.handle(round).report().await.replicas;
        assert_eq!(held.len(), 1, "only the metadata replica: {held:?}");
    }
    client.close().await;
    cluster.stop_all().await;
}

/// A leader that hasn't heard of the drop would still acknowledge writes, which are then lost.
#[actix::test]
async fn once_a_drop_is_answered_no_shard_of_the_database_has_a_majority() {
    let mut cluster = LocalCluster::start(3).await;
    let client = cluster.client().await;
    for round in 0..5 {
        let (_, shards) = cluster.database(&client, "db", 3, 8).await;
        client.drop_database("db", PATIENCE).await.expect("dropped");
        let mut held = Vec::new();
        for node in 0..3 {
            held.extend(cluster.handle(node).report().await.replicas.into_iter().map(|r| r.shard));
        }
        for shard in shards {
            let holders = held.iter().filter(|held| **held == shard).count();
            assert!(holders <= 1, "round {round}: {holders} nodes still hold shard {shard}");
        }
    }
    client.close().await;
    cluster.stop_all().await;
}

#[actix::test]
async fn stopped_at_any_moment_of_its_start_a_node_leaves_its_directory_free() {
    let mut cluster = LocalCluster::start_with(1, |peers| peers.to_vec()).await;
    for millis in (0..120).step_by(8) {
        tokio::time::sleep(Duration::from_millis(millis)).await;
        cluster.stop(0).await;
        cluster.restart(0).await;
    }
    cluster.wait_ready().await;
    cluster.stop_all().await;
}

#[actix::test]
async fn a_node_without_company_waits_and_stops_when_told() {
    let mut cluster = LocalCluster::start_with(3, |peers| peers.to_vec()).await;
    // The second and third go before a cluster is formed, or just after; the first must cope with both.
    cluster.stop(2).await;
    cluster.stop(1).await;
    let handle = cluster.handle(0);
    if handle.phase() == NodePhase::Starting {
        assert_eq!(handle.node(), NodeId(0));
        let refused = handle.submit(METADATA_SHARD, 1, vec![get("k")], PATIENCE).await;
        assert!(matches!(refused, Err(Refusal::Unavailable(_))), "{refused:?}");
    }
    let begun = Instant::now();
    cluster.stop(0).await;
    assert!(begun.elapsed() < Duration::from_secs(4), "stopping took {:?}", begun.elapsed());
    for node in 0..3 {
        cluster.restart(node).await;
    }
    cluster.wait_ready().await;
    cluster.stop_all().await;
}

/// Two nodes of a cluster are replaced, at their addresses, by nodes of clusters of their own. The one
/// that is left still takes them for its own, and must not have them do what it is asked.
#[actix::test]
async fn a_command_is_never_executed_by_another_cluster() {
    let mut cluster = LocalCluster::start(3).await;
    let old = cluster.handle(0).map().cluster_id;
    for node in 1..3 {
        cluster.stop(node).await;
        let settings = &mut cluster.nodes[node].settings;
        std::fs::remove_dir_all(&settings.node.data_dir).expect("removed");
        settings.cluster.initial = vec![settings.peer.advertise.clone()];
        cluster.restart(node).await;
        let node = cluster.nodes[node].node.as_ref().expect("running");
        tokio::time::timeout(PATIENCE, node.ready()).await.expect("in time").expect("ready");
    }
    let other = cluster.handle(1);
    let create = |shards| MetaCommand::CreateDatabase { name: "app".into(), replicas: 1, shards };
    let shards = plan_database(&other.map(), "app", 1, 1).expect("a plan");
    other.meta(create(shards), PATIENCE).await.expect("created");

    let drop = MetaCommand::DropDatabase { name: "app".into(), id: None };
    let refused = cluster.handle(0).meta(drop.clone(), Duration::from_secs(5)).await;
    assert!(refused.is_err(), "without a majority nothing can be dropped: {refused:?}");
    // Nor by who doesn't say which cluster it means.
    let address = &cluster.nodes[1].settings.peer.advertise;
    let unnamed = HelloConfig::default();
    let named = HelloConfig { cluster_id: Some(old), ..unnamed };
    for request in [PeerRequest::Meta(drop), PeerRequest::Map { since: 0 }] {
        let answer = PeerClient::call(address, unnamed, request.clone(), PATIENCE).await;
        assert!(matches!(answer, Ok(PeerResponse::Refused(Refusal::Refused(_)))), "{answer:?}");
        let answer = PeerClient::call(address, named, request, PATIENCE).await;
        assert!(matches!(answer, Err(CallError::Refused { .. })), "{answer:?}");
    }
    let databases = other.map();
    assert!(databases.database("app").is_some_and(|database| !database.dropped));
    cluster.stop_all().await;
}
