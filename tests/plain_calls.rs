//! Calls in bare Cap'n Proto. Plain ones by key, `get`, `put`, `delete`, `cas`, as of a client without
//! routing: any node takes them and brings them to the shard's leader in one hop. And several batches in one call.

#[path = "support/cluster.rs"]
mod cluster;

use std::time::{Duration, Instant};

use capnp_rpc::rpc_twoparty_capnp::Side;
use capnp_rpc::{RpcSystem, twoparty};
use cluster::Cluster;
use pontoon::client::Client;
use pontoon::ids::ShardId;
use pontoon::limits::{
    ANSWER_BYTES_MAX, BATCH_OPERATIONS_MAX, GATHER_REST_MS, KEY_BYTES_MAX, MAP_WATCHES_MAX, VALUE_BYTES_MAX,
};
use pontoon::schema::admin_capnp::{NodeState, admin};
use pontoon::schema::kv_capnp::{answers, batch_request, batch_response, expect, gate, kv, op_result, rest};
use pontoon::schema::types_capnp::{Applied, error};
use pontoon::transport::rpc_stream::{reader_options, rpc_streams};
use pontoon::version::PROTOCOL_MAX;
use rustix::process::Signal;
use tokio::task::{LocalSet, spawn_local};

/// The service of the node at `address`, on a connection of its own.
async fn dial(address: &str) -> kv::Client {
    services(address).await.0
}

/// Both services of the node at `address`.
async fn services(address: &str) -> (kv::Client, admin::Client) {
    let stream = tokio::net::TcpStream::connect(address).await.expect("connected");
    let (reader, writer, flusher) = rpc_streams(stream).expect("a stream");
    let network = twoparty::VatNetwork::new(reader, writer, Side::Client, reader_options());
    let mut system = RpcSystem::new(Box::new(network), None);
    let gate: gate::Client = system.bootstrap(Side::Server);
    spawn_local(system);
    spawn_local(flusher);
    let mut open = gate.open_request();
    let mut range = open.get().init_hello().init_protocol();
    range.set_min(1);
    range.set_max(PROTOCOL_MAX);
    let welcome = open.send().promise.await.expect("a welcome");
    let welcome = welcome.get().expect("a welcome");
    (welcome.get_kv().expect("the service"), welcome.get_admin().expect("the other one"))
}

/// An answer, read.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Said {
    Value(Vec<u8>, u64),
    Absent,
    Written(u64),
    Deleted(u64),
    /// What is there instead.
    Mismatch(Option<(Vec<u8>, u64)>),
    Error {
        kind: &'static str,
        may_be_applied: bool,
        retryable: bool,
        message: String,
    },
}

fn read(result: op_result::Reader<'_>) -> Said {
    match result.which().expect("a known answer") {
        op_result::Value(found) => {
            Said::Value(found.get_value().expect("bytes").to_vec(), found.get_version())
        }
        op_result::Absent(()) => Said::Absent,
        op_result::Written(version) => Said::Written(version),
        op_result::Deleted(version) => Said::Deleted(version),
        op_result::Mismatch(there) => {
            let (value, version) = (there.get_value().expect("bytes").to_vec(), there.get_version());
            if !there.get_found() {
                assert_eq!((value.as_slice(), version), (b"".as_slice(), 0), "nothing is there");
            }
            Said::Mismatch(there.get_found().then_some((value, version)))
        }
        op_result::Error(error) => {
            let error = error.expect("an error");
            let kind = match error.which().expect("a known error") {
                error::UnknownDatabase(_) => "unknown database",
                error::Invalid(()) => "invalid",
                error::UnknownOutcome(()) => "unknown outcome",
                error::Unavailable(()) => "unavailable",
                _ => "another",
            };
            Said::Error {
                kind,
                may_be_applied: error.get_applied().expect("a known word") != Applied::No,
                retryable: error.get_retryable(),
                message: error.get_message().and_then(|m| Ok(m.to_string()?)).expect("text"),
            }
        }
    }
}

/// A database through one node.
struct Door<'a> {
    kv: kv::Client,
    database: &'a str,
    timeout_ms: u32,
}

impl Door<'_> {
    async fn get(&self, key: &str) -> Said {
        let mut call = self.kv.get_request();
        call.get().set_database(self.database);
        call.get().set_key(key.as_bytes());
        call.get().set_timeout_ms(self.timeout_ms);
        let answer = call.send().promise.await.expect("an answer");
        read(answer.get().and_then(|answer| answer.get_result()).expect("a result"))
    }

    async fn delete(&self, key: &str) -> Said {
        let mut call = self.kv.delete_request();
        call.get().set_database(self.database);
        call.get().set_key(key.as_bytes());
        call.get().set_timeout_ms(self.timeout_ms);
        let answer = call.send().promise.await.expect("an answer");
        read(answer.get().and_then(|answer| answer.get_result()).expect("a result"))
    }

    async fn cas(&self, key: &str, expect: impl FnOnce(expect::Builder<'_>), value: &str) -> Said {
        let mut call = self.kv.cas_request();
        call.get().set_database(self.database);
        call.get().set_key(key.as_bytes());
        call.get().set_value(value.as_bytes());
        call.get().set_timeout_ms(self.timeout_ms);
        expect(call.get().init_expect());
        let answer = call.send().promise.await.expect("an answer");
        read(answer.get().and_then(|answer| answer.get_result()).expect("a result"))
    }
}

fn absent(mut expect: expect::Builder<'_>) {
    expect.set_absent(());
}

fn value(old: &str) -> impl FnOnce(expect::Builder<'_>) {
    move |mut expect| expect.set_value(old.as_bytes())
}

fn version(old: u64) -> impl FnOnce(expect::Builder<'_>) {
    move |mut expect| expect.set_version(old)
}

fn written(said: Said) -> u64 {
    match said {
        Said::Written(version) => version,
        other => panic!("{other:?}"),
    }
}

fn there(value: &str, version: u64) -> Said {
    Said::Mismatch(Some((value.as_bytes().to_vec(), version)))
}

/// Every answer that `delete` and `cas` can give, on a key that doesn't exist.
async fn converse(door: &Door<'_>, key: &str) {
    assert_eq!(door.delete(key).await, Said::Absent);
    assert_eq!(door.cas(key, value("one"), "x").await, Said::Mismatch(None));
    assert_eq!(door.cas(key, version(1), "x").await, Said::Mismatch(None));
    assert_eq!(door.get(key).await, Said::Absent, "a mismatch changes nothing");

    let first = written(door.cas(key, absent, "one").await);
    assert_eq!(door.cas(key, absent, "x").await, there("one", first));
    assert_eq!(door.cas(key, value("other"), "x").await, there("one", first));
    let second = written(door.cas(key, value("one"), "two").await);
    assert_eq!(door.cas(key, version(first), "x").await, there("two", second));
    let third = written(door.cas(key, version(second), "three").await);
    assert_eq!(door.get(key).await, Said::Value(b"three".to_vec(), third));

    let Said::Deleted(fourth) = door.delete(key).await else { panic!("it was there") };
    assert_eq!(door.delete(key).await, Said::Absent);
    assert_eq!(door.cas(key, version(third), "x").await, Said::Mismatch(None));
    assert_eq!(door.get(key).await, Said::Absent);
    assert!(first < second && second < third && third < fourth, "{first} {second} {third} {fourth}");
}

/// A key in each shard of a database, and the indexes of the nodes that hold the shard.
async fn keys(cluster: &Cluster, client: &Client, database: &str) -> Vec<(String, Vec<usize>)> {
    let map = client.map().await.expect("the map");
    let record = map.database(database).expect("the database");
    let in_shard = |shard| {
        (0..)
            .map(|n| format!("key-{n}"))
            .find(|key| map.shard_of_key(record, key.as_bytes()).is_some_and(|found| found.id == shard))
    };
    let index = |node| cluster.nodes.iter().position(|n| n.client == map.nodes[node].client_address);
    let shards = record.shards.iter().map(|shard| {
        let holders = map.shards[shard].members.iter().filter_map(|member| index(&member.node));
        (in_shard(*shard).expect("a key"), holders.collect())
    });
    shards.collect()
}

#[tokio::test]
async fn deletes_and_cas_reach_their_shard_through_any_node() {
    let mut cluster = Cluster::new(3);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    LocalSet::new()
        .run_until(async {
            // One node holds a shard and leads it; then all hold it and one leads.
            for (database, replicas) in [("narrow", 1), ("wide", 3)] {
                cluster.database(&client, database, replicas, 3).await;
                let keys = keys(&cluster, &client, database).await;
                let mut without = 0;
                for (node, address) in cluster.addresses().iter().enumerate() {
                    let door = Door { kv: dial(address).await, database, timeout_ms: 0 };
                    for (key, holders) in &keys {
                        without += usize::from(!holders.contains(&node));
                        converse(&door, key).await;
                    }
                }
                assert_eq!(without, if replicas == 1 { 6 } else { 0 }, "{keys:?}");
            }
        })
        .await;
    client.close().await;
}

#[tokio::test]
async fn what_a_plain_call_can_not_do_is_said() {
    let mut cluster = Cluster::new(1);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    cluster.database(&client, "db", 1, 1).await;
    LocalSet::new()
        .run_until(async {
            let kv = dial(&cluster.nodes[0].client).await;
            let door = Door { kv: kv.clone(), database: "db", timeout_ms: 500 };
            let long = "k".repeat(KEY_BYTES_MAX + 1);
            for said in [
                door.delete("").await,
                door.cas("", absent, "x").await,
                door.delete(&long).await,
                door.cas(&long, absent, "x").await,
            ] {
                let Said::Error { kind: "invalid", may_be_applied: false, retryable: false, message } = said
                else {
                    panic!("{said:?}")
                };
                assert!(message.contains("key"), "{message}");
            }
            let nowhere = Door { kv, database: "nowhere", timeout_ms: 3_000 };
            for said in [nowhere.delete("k").await, nowhere.cas("k", absent, "x").await] {
                let Said::Error { kind: "unknown database", may_be_applied: false, message, .. } = said
                else {
                    panic!("{said:?}")
                };
                assert!(message.contains("nowhere"), "{message}");
            }
        })
        .await;
    client.close().await;
}

/// A write that was sent on and got no answer is neither repeated nor said to have failed.
#[tokio::test]
async fn a_forwarded_write_says_what_is_known_of_it() {
    let mut cluster = Cluster::new(3);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    cluster.database(&client, "db", 1, 3).await;
    let keys = keys(&cluster, &client, "db").await;
    let (key, holders) = keys.iter().find(|(_, holders)| holders != &[0]).expect("not all on one node");
    let holder = holders[0];
    LocalSet::new()
        .run_until(async {
            let kv = dial(&cluster.nodes[0].client).await;
            let door = Door { kv: kv.clone(), database: "db", timeout_ms: 0 };
            let patient = Door { kv: kv.clone(), database: "db", timeout_ms: 8_000 };
            let brief = Door { kv, database: "db", timeout_ms: 700 };
            // Of the same shard, by its tag.
            let doomed = &format!("{{{key}}}");
            let first = written(door.cas(key, absent, "one").await);
            written(door.cas(doomed, absent, "one").await);

            // The holder takes the calls and says nothing.
            cluster.signal(holder, Signal::STOP);
            let begun = Instant::now();
            let said = tokio::join!(patient.cas(key, version(first), "two"), patient.delete(doomed));
            let took = begun.elapsed();
            cluster.signal(holder, Signal::CONT);
            for said in [said.0, said.1] {
                let Said::Error { kind: "unknown outcome", may_be_applied: true, .. } = said else {
                    panic!("{said:?}")
                };
            }
            assert!(took < Duration::from_secs(6), "it was tried again: {took:?}");

            // The holder is gone, and what it had of them: nothing was sent.
            cluster.kill(holder);
            let begun = Instant::now();
            for said in [brief.delete(key).await, brief.cas(key, version(first), "x").await] {
                let Said::Error { kind: "unavailable", may_be_applied: false, retryable: true, .. } = said
                else {
                    panic!("{said:?}")
                };
            }
            assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
            cluster.spawn(holder);
            cluster.wait_ready(holder);
            // Whether they arrived is a race: it may have been told that they were given up before it looked at them.
            let changed = match door.get(key).await {
                Said::Value(value, second) if value == b"two" => u64::from(second > first),
                Said::Value(value, second) if value == b"one" && second == first => 0,
                other => panic!("{other:?}"),
            };
            let deleted = match door.get(doomed).await {
                Said::Value(..) => 0,
                Said::Absent => 1,
                other => panic!("{other:?}"),
            };
            let Said::Deleted(third) = door.delete(key).await else { panic!("it was there") };
            // One version for each write that was applied, none for those that were not.
            assert_eq!(third, first + 1 + changed + deleted + 1);
        })
        .await;
    client.close().await;
}

/// The map's version after version `since`, or how the call failed.
async fn watch(kv: &kv::Client, since: u64, ms: u32) -> Result<(u64, usize), capnp::Error> {
    let mut call = kv.watch_map_request();
    call.get().set_since(since);
    call.get().set_timeout_ms(ms);
    let answer = call.send().promise.await?;
    let delta = answer.get()?.get_delta()?;
    assert!(delta.get_since() == since || delta.get_since() == 0);
    Ok((delta.get_version(), delta.get_databases()?.len() as usize))
}

#[tokio::test]
async fn a_call_for_news_of_the_map_waits_for_them_and_not_for_ever() {
    let mut cluster = Cluster::new(1);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    let waiting = async {
        let kv = dial(&cluster.nodes[0].client).await;
        let version = watch(&kv, 0, 60_000).await.expect("there is a map").0;
        let begun = Instant::now();
        assert_eq!(watch(&kv, version, 300).await.expect("in time"), (version, 0), "nothing new");
        assert!(begun.elapsed() >= Duration::from_millis(300));
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());

        // Another connection's calls are its own; a further one of this is refused, and harms none.
        let other = dial(&cluster.nodes[0].client).await;
        let waits: Vec<_> = (0..MAP_WATCHES_MAX)
            .map(|_| {
                spawn_local({
                    let kv = kv.clone();
                    async move { watch(&kv, version, 0).await }
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(100)).await;
        let refused = watch(&kv, version, 0).await.expect_err("one too many");
        assert_eq!(refused.kind, capnp::ErrorKind::Overloaded, "{refused}");
        let elsewhere = spawn_local(async move { watch(&other, version, 0).await });
        let begun = Instant::now();
        cluster.database(&client, "news", 1, 1).await;
        for wait in waits.into_iter().chain([elsewhere]) {
            let (now, databases) = wait.await.expect("it ended").expect("an answer");
            assert!(now > version);
            assert_eq!(databases, 1, "the new one");
        }
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        // Who has gone makes room.
        let kv = dial(&cluster.nodes[0].client).await;
        for _ in 0..=MAP_WATCHES_MAX {
            watch(&kv, 0, 0).await.expect("the whole map, at once");
        }
    };
    LocalSet::new().run_until(waiting).await;
    client.close().await;
}

/// Values that don't fit into one answer come in several: none of them is refused.
#[tokio::test]
async fn great_values_of_several_batches_come_in_several_answers() {
    let mut cluster = Cluster::new(1);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    let great = cluster.database(&client, "great", 1, 1).await.with_timeout(Duration::from_secs(30));
    let value = vec![b'v'; VALUE_BYTES_MAX - 1];
    great.put("great", value.clone()).await.expect("room for it");
    let map = client.map().await.expect("the map");
    let shard = &map.shards[&map.database("great").expect("the database").shards[0]];
    let count = u32::try_from(2 * ANSWER_BYTES_MAX / VALUE_BYTES_MAX + 1).expect("a number");
    let reading = async {
        let kv = dial(&cluster.nodes[0].client).await;
        let mut call = kv.gather_request();
        let mut list = call.get().init_requests(count);
        for at in 0..count {
            let mut batch = list.reborrow().get(at);
            batch.set_shard(shard.id.0);
            batch.set_range_version(shard.epoch.range);
            batch.set_timeout_ms(30_000);
            let mut operation = batch.init_operations(1).get(0);
            operation.set_key(b"great");
            operation.set_get(());
        }
        let values = |answers: answers::Reader<'_>| {
            let list = answers.get_list().expect("answers");
            for answer in list.iter() {
                let response = answer.get_response().expect("a response");
                let Ok(batch_response::Results(Ok(results))) = response.which() else { panic!("no results") };
                match read(results.get(0)) {
                    Said::Value(found, _) => assert!(found == value, "another value"),
                    other => panic!("{other:?}"),
                }
            }
            (list.len(), answers.has_rest().then(|| answers.get_rest().expect("a capability")))
        };
        let answer = call.send().promise.await.expect("an answer");
        let (mut found, mut rest) = values(answer.get().unwrap().get_answers().unwrap());
        assert!(rest.is_some(), "more than a message may hold");
        while let Some(further) = rest {
            let answer = further.next_request().send().promise.await.expect("an answer");
            let (more, after) = values(answer.get().unwrap().get_answers().unwrap());
            found += more;
            rest = after;
        }
        assert_eq!(found, count);
    };
    LocalSet::new().run_until(reading).await;
    client.close().await;
}

/// Fills in a batch of one put.
fn put_in(mut batch: batch_request::Builder<'_>, (shard, version): (ShardId, u64), key: &str, ms: u32) {
    batch.set_shard(shard.0);
    batch.set_range_version(version);
    batch.set_timeout_ms(ms);
    let mut operation = batch.init_operations(1).get(0);
    operation.set_key(key.as_bytes());
    operation.set_put(b"value");
}

/// What came of a put, as a batch of one: written, or whether it may have been.
fn outcome(response: batch_response::Reader<'_>) -> Result<(), bool> {
    let said = match response.which().expect("a known answer") {
        batch_response::Results(results) => read(results.expect("results").get(0)),
        batch_response::Error(error) => {
            return Err(error.expect("an error").get_applied().expect("a known word") != Applied::No);
        }
    };
    match said {
        Said::Written(_) => Ok(()),
        Said::Error { may_be_applied, .. } => Err(may_be_applied),
        other => panic!("{other:?}"),
    }
}

/// A request's place in the call, and what came of it.
type Placed = (u32, Result<(), bool>);

/// The answers in a message, and the way to the others.
fn answers_in(answers: answers::Reader<'_>) -> (Vec<Placed>, Option<rest::Client>) {
    let list = answers.get_list().expect("answers");
    let list = list.iter().map(|a| (a.get_request(), outcome(a.get_response().expect("a response"))));
    (list.collect(), answers.has_rest().then(|| answers.get_rest().expect("a capability")))
}

/// A batch whose shard has lost its majority doesn't hold up those that came with it, and is answered in its time.
#[tokio::test]
async fn batches_in_one_call_end_each_in_its_time() {
    let mut cluster = Cluster::new(3);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    cluster.database(&client, "narrow", 1, 3).await;
    cluster.database(&client, "wide", 3, 3).await;
    let narrow = keys(&cluster, &client, "narrow").await;
    let wide = keys(&cluster, &client, "wide").await;
    let map = client.map().await.expect("the map");
    let place = |database: &str, key: &str| {
        let record = map.database(database).expect("the database");
        let shard = map.shard_of_key(record, key.as_bytes()).expect("a shard");
        (shard.id, shard.epoch.range)
    };
    LocalSet::new()
        .run_until(async {
            // A node that leads one of each.
            let mut found = None;
            for (alone, holders) in &narrow {
                let kv = dial(&cluster.nodes[holders[0]].client).await;
                for (shared, _) in &wide {
                    let mut call = kv.batch_request();
                    put_in(call.get().init_request(), place("wide", shared), shared, 1_000);
                    let answer = call.send().promise.await.expect("an answer");
                    if outcome(answer.get().and_then(|a| a.get_response()).expect("a response")).is_ok() {
                        found = Some((holders[0], kv.clone(), alone, shared));
                    }
                }
            }
            let (node, kv, alone, shared) = found.expect("three nodes share three shards");
            let gather = |requests: u32, ms| {
                let mut call = kv.gather_request();
                let mut list = call.get().init_requests(requests);
                for at in 0..requests {
                    let (database, key) = if at == 0 { ("wide", shared) } else { ("narrow", alone) };
                    put_in(list.reborrow().get(at), place(database, key), key, ms);
                }
                call.send().promise
            };
            let answer = gather(3, 5_000).await.expect("an answer");
            let (mut said, mut rest) = answers_in(answer.get().unwrap().get_answers().unwrap());
            while let Some(further) = rest {
                let answer = further.next_request().send().promise.await.expect("an answer");
                let (more, after) = answers_in(answer.get().unwrap().get_answers().unwrap());
                said.extend(more);
                rest = after;
            }
            said.sort_by_key(|(request, _)| *request);
            assert_eq!(said, [(0, Ok(())), (1, Ok(())), (2, Ok(()))]);

            for other in (0..3).filter(|other| *other != node) {
                cluster.signal(other, Signal::STOP);
            }
            let begun = Instant::now();
            let (left, answer) = tokio::join!(gather(2, 5_000), gather(2, 5_000));
            let left = left.expect("an answer").get().unwrap().get_answers().unwrap().get_rest();
            let left = left.expect("the way to the other");
            let (answer, answered) = (answer.expect("an answer"), Instant::now());
            let (said, rest) = answers_in(answer.get().unwrap().get_answers().unwrap());
            assert_eq!(said, [(1, Ok(()))], "the other can't be written");
            assert!(begun.elapsed() < Duration::from_millis(4_000), "it was held up: {:?}", begun.elapsed());
            let rest = rest.expect("the way to the other");
            let answer = rest.next_request().send().promise.await.expect("an answer");
            let (said, after) = answers_in(answer.get().unwrap().get_answers().unwrap());
            assert_eq!(said, [(0, Err(true))], "it may have been written, or will be");
            assert!(after.is_none());
            assert!(rest.next_request().send().promise.await.is_err(), "it was asked for");
            // The node began to wait before its answer came here.
            tokio::time::sleep_until((answered + Duration::from_millis(GATHER_REST_MS + 1_000)).into()).await;
            assert!(left.next_request().send().promise.await.is_err(), "it is too late for that");

            for many in [BATCH_OPERATIONS_MAX + 1, 100_000] {
                let many = u32::try_from(many).expect("a number");
                let error = gather(many, 700).await.err().expect("too many");
                assert!(error.to_string().contains("split it"), "{error}");
            }
            for other in (0..3).filter(|other| *other != node) {
                cluster.signal(other, Signal::CONT);
            }
        })
        .await;
    client.close().await;
}

#[tokio::test]
async fn a_node_says_that_it_is_there_without_telling_of_its_replicas() {
    let mut cluster = Cluster::new(1);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    cluster.database(&client, "some", 1, 3).await;
    let asking = async {
        let (_, admin) = services(&cluster.nodes[0].client).await;
        for (brief, held) in [(true, 0), (false, 4)] {
            let mut call = admin.node_status_request();
            call.get().set_brief(brief);
            let answer = call.send().promise.await.expect("an answer");
            let status = answer.get().and_then(|answer| answer.get_status()).expect("a status");
            assert_eq!((status.get_node(), status.get_state()), (1, Ok(NodeState::Ready)));
            assert_eq!(status.get_replicas().expect("a list").len(), held, "brief: {brief}");
        }
    };
    LocalSet::new().run_until(asking).await;
    client.close().await;
}
