//! The client library against scripted nodes on real sockets, and the client port of a node that is
//! only starting. What a real cluster does is for other tests; here each failure comes on cue.

#[path = "client_rpc/fake.rs"]
mod fake;
#[path = "client_rpc/follow.rs"]
mod follow;

use std::time::{Duration, Instant};

use bytes::Bytes;
use fake::{Act, Fakes, dead_address, hung_address, peer_port};
use pontoon::client::options::ClientOptions;
use pontoon::client::{
    Cas, Client, ClientError, Database, NotApplied, Operation, OperationResult, ScanOptions, Unknown,
};
use pontoon::ids::{DatabaseId, METADATA_SHARD, NodeId};
use pontoon::machine::command::Expect;
use pontoon::placement::map::{ShardRecord, Standing};

fn key(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

async fn connect(fakes: &Fakes) -> (Client, Database) {
    let client = Client::connect([fakes.address(1)]).await.unwrap();
    let database = client.database("db");
    (client, database)
}

#[tokio::test]
async fn operations_find_their_shards_and_come_back() {
    let fakes = Fakes::start(2, 4);
    let (client, db) = connect(&fakes).await;
    assert_eq!(db.get(key("a")).await.unwrap(), None);
    let first = db.put(key("a"), key("1")).await.unwrap();
    let found = db.get(key("a")).await.unwrap().unwrap();
    assert_eq!((found.value, found.version), (key("1"), first));
    let wrong = db.cas(key("a"), Expect::Absent, key("2")).await.unwrap();
    assert!(matches!(wrong, Cas::Mismatch(Some(there)) if there.value == key("1")));
    let right = Expect::Version(first);
    let second = match db.cas(key("a"), right, key("2")).await.unwrap() {
        Cas::Written(version) => version,
        other => panic!("{other:?}"),
    };
    assert!(second > first);
    assert!(db.delete(key("a")).await.unwrap().is_some());
    assert_eq!(db.delete(key("a")).await.unwrap(), None);

    let puts = (0..100).map(|n| Operation::Put(key(&format!("k{n:02}")), key(&n.to_string())));
    let mut operations: Vec<Operation> = puts.collect();
    operations.insert(7, Operation::Get(Bytes::new()));
    operations.push(Operation::Get(key("absent")));
    let ends = db.batch(operations).await;
    assert_eq!(ends.len(), 102);
    assert!(matches!(ends[7], Err(ClientError::Invalid(_))));
    assert_eq!(ends[101], Ok(OperationResult::Value(None)));
    let written = |end: &&Result<_, _>| matches!(end, Ok(OperationResult::Written(_)));
    assert_eq!(ends.iter().filter(written).count(), 100);

    let options = ScanOptions { prefix: key("k"), limit: Some(95), keys_only: false };
    let (mut scan, mut seen) = (db.scan(options), Vec::new());
    loop {
        let page = scan.next_page().await.unwrap();
        if page.is_empty() {
            break;
        }
        seen.extend(page.into_iter().map(|(key, _)| key));
    }
    assert_eq!(seen.len(), 95);
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 95);
    client.close().await;
    let closed = ClientError::NotApplied(NotApplied::Closed);
    assert_eq!(db.get(key("a")).await.unwrap_err(), closed);
}

#[tokio::test]
async fn operations_that_wait_share_a_call() {
    let fakes = Fakes::start(1, 1);
    fakes.always(1, Act::Slow(Duration::from_millis(20)));
    let (_client, db) = connect(&fakes).await;
    let tasks: Vec<_> = (0..300)
        .map(|n| {
            let db = db.clone();
            tokio::spawn(async move { db.put(key(&n.to_string()), key("v")).await })
        })
        .collect();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    let calls = fakes.calls(1);
    assert_eq!(calls.iter().sum::<usize>(), 300);
    assert!(calls.len() <= 20, "{} calls: {calls:?}", calls.len());
    // A lone operation doesn't wait for company.
    fakes.always(1, Act::Serve);
    let begun = Instant::now();
    db.get(key("1")).await.unwrap();
    assert!(begun.elapsed() < Duration::from_millis(500));
}

/// Those whose calls are answered have the next operation at once, and it shares the next call with what waited.
#[tokio::test]
async fn who_was_answered_shares_the_next_call_with_those_who_wait() {
    const EACH: usize = 20;
    let fakes = Fakes::start(1, 1);
    // Not so long that those who wait would leave beside it.
    fakes.next(1, Act::Slow(Duration::from_millis(3)));
    let local = tokio::task::LocalSet::new();
    let loops = local.run_until(async {
        let client = Client::connect_here(ClientOptions::new([fakes.address(1)])).await.unwrap();
        let mut loops = Vec::new();
        for half in 0..2 {
            for one in 0..4 {
                let db = client.database("db");
                loops.push(tokio::task::spawn_local(async move {
                    for _ in 0..EACH {
                        db.put(key(&format!("{half}{one}")), key("v")).await.unwrap();
                    }
                }));
            }
            // The second half comes while the first has a call under way.
            while fakes.calls(1).is_empty() {
                tokio::task::yield_now().await;
            }
        }
        for one in loops {
            one.await.unwrap();
        }
        client.close().await;
    });
    loops.await;
    let calls = fakes.calls(1);
    assert_eq!(calls.iter().sum::<usize>(), 8 * EACH);
    assert!(calls.len() <= EACH + EACH / 2, "halves that take turns make twice {EACH} calls: {calls:?}");
}

#[tokio::test]
async fn a_command_whose_answer_is_lost_is_repeated_and_takes_effect_once() {
    let fakes = Fakes::start(1, 1);
    let (_client, db) = connect(&fakes).await;
    let lose = || {
        fakes.next(1, Act::ApplyAndDrop);
        fakes.next(1, Act::Unknown);
    };
    lose();
    assert_eq!(db.put(key("a"), key("1")).await, Ok(1));
    lose();
    assert_eq!(db.cas(key("a"), Expect::Version(1), key("2")).await, Ok(Cas::Written(2)));
    lose();
    assert_eq!(db.delete(key("a")).await, Ok(Some(3)));
    lose();
    assert_eq!(db.get(key("a")).await, Ok(None));
    // The three attempts of each command carry one tag, and ask for the session until it is there.
    let tags = fakes.tags();
    let ttl_ms = 10 * pontoon::limits::TIMEOUT_DEFAULT_MS as u32;
    for (at, tags) in tags.iter().enumerate().take(9) {
        let sequence = at as u64 / 3 + 1;
        assert_eq!(tags.session, fakes.tags()[0].session);
        assert_eq!(tags.sequences, [sequence]);
        assert_eq!(tags.acked_below, sequence, "each was answered before the next");
        assert_eq!(tags.open_ttl_ms, if at < 3 { ttl_ms } else { 0 });
    }
    assert_eq!(tags[0].session.len(), 16);
    let reads: Vec<_> = tags[9..].iter().map(|tags| (tags.session.len(), &tags.sequences[..])).collect();
    assert_eq!(reads, [(0, &[0][..]); 3], "reads need no session");
}

#[tokio::test]
async fn an_expired_session_is_replaced_unless_the_outcome_is_unknown() {
    let fakes = Fakes::start(1, 1);
    let (_client, db) = connect(&fakes).await;
    assert_eq!(db.put(key("a"), key("1")).await, Ok(1));
    fakes.next(1, Act::Forget);
    assert_eq!(db.put(key("a"), key("2")).await, Ok(2));
    let tags = fakes.tags();
    assert_eq!(tags.len(), 3);
    assert_ne!(tags[1].session, tags[2].session);
    assert_eq!((tags[2].acked_below, &tags[2].sequences[..]), (1, &[1][..]));
    assert!(tags[2].open_ttl_ms > 0);
    // Whether the first attempt took effect can't be told any more, and another could do it again.
    fakes.next(1, Act::ApplyAndDrop);
    fakes.next(1, Act::Forget);
    let lost = db.put(key("a"), key("3")).await;
    assert_eq!(lost, Err(ClientError::Unknown(Unknown::SessionExpired)));
    assert_eq!(fakes.tags().len(), 5);
    assert_eq!(db.put(key("a"), key("4")).await, Ok(4));
}

/// Each shard has a session of its own, and only what has ended is acknowledged.
#[tokio::test]
async fn commands_under_way_are_not_acknowledged() {
    let fakes = Fakes::start(1, 4);
    let (_client, db) = connect(&fakes).await;
    fakes.always(1, Act::Slow(Duration::from_millis(5)));
    let tasks: Vec<_> = (0..8)
        .map(|task| {
            let db = db.clone();
            tokio::spawn(async move {
                for n in 0..20 {
                    db.put(key(&format!("{task}/{n}")), key("v")).await.unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let tags = fakes.tags();
    let mut sessions: Vec<_> = tags.iter().map(|tags| &tags.session).collect();
    sessions.sort();
    sessions.dedup();
    assert_eq!(sessions.len(), 4);
    for tags in &tags {
        assert!(tags.sequences.iter().all(|sequence| *sequence >= tags.acked_below), "{tags:?}");
    }
    // It does advance.
    let last = tags.iter().map(|tags| tags.acked_below).max();
    assert!(last > Some(8), "{last:?}");
    let mut given: Vec<_> =
        tags.iter().flat_map(|tags| tags.sequences.iter().map(|n| (tags.session.clone(), *n))).collect();
    given.sort();
    given.dedup();
    assert_eq!(given.len(), 160);
}

#[tokio::test]
async fn redirects_are_followed_and_remembered() {
    let fakes = Fakes::start(3, 1);
    fakes.always(1, Act::NotLeader(Some(3)));
    let (_client, db) = connect(&fakes).await;
    let begun = Instant::now();
    db.put(key("a"), key("1")).await.unwrap();
    assert!(begun.elapsed() < Duration::from_millis(500));
    db.put(key("b"), key("1")).await.unwrap();
    assert_eq!(fakes.calls(1), [1]);
    assert_eq!(fakes.calls(2), [0; 0]);
    assert_eq!(fakes.calls(3), [1, 1]);
    // No hint: the members in turn.
    fakes.always(3, Act::NotLeader(None));
    fakes.always(1, Act::NotLeader(None));
    db.put(key("c"), key("1")).await.unwrap();
    assert_eq!(fakes.calls(2), [1]);
}

#[tokio::test]
async fn a_cas_that_was_not_applied_is_tried_elsewhere() {
    let fakes = Fakes::start(2, 1);
    let (_client, db) = connect(&fakes).await;
    fakes.next(1, Act::Busy(30));
    fakes.next(1, Act::NotLeader(Some(2)));
    let begun = Instant::now();
    let done = db.cas(key("a"), Expect::Absent, key("1")).await;
    assert_eq!(done, Ok(Cas::Written(1)));
    assert!(begun.elapsed() >= Duration::from_millis(30), "the busy node's wish");
    assert_eq!((fakes.calls(1).len(), fakes.calls(2).len()), (2, 1));
}

#[tokio::test]
async fn a_stale_route_is_healed_by_the_answer() {
    let fakes = Fakes::start(2, 1);
    let (_client, db) = connect(&fakes).await;
    db.put(key("a"), key("1")).await.unwrap();
    // The shard changes its range version; only the answer tells.
    fakes.change_map(|map| {
        let shard = map.shards.values_mut().find(|s| s.id.0 == 1).unwrap();
        shard.epoch.range += 1;
        shard.changed_at = 2;
    });
    let begun = Instant::now();
    db.put(key("a"), key("2")).await.unwrap();
    assert!(begun.elapsed() < Duration::from_millis(500));
    assert_eq!(fakes.calls(1), [1, 1, 1]);
}

#[tokio::test]
async fn a_database_made_later_is_found_and_an_unknown_one_refused() {
    let fakes = Fakes::start(2, 1);
    let (client, _db) = connect(&fakes).await;
    let later = client.database("later");
    let refused = later.get(key("a")).await.unwrap_err();
    let unknown = ClientError::NotApplied(NotApplied::UnknownDatabase("later".into()));
    assert_eq!(refused, unknown);
    fakes.change_map(|map| {
        map.version += 1;
        let version = map.version;
        for database in map.databases.values_mut() {
            database.name = "later".into();
            database.changed_at = version;
        }
    });
    later.put(key("a"), key("1")).await.unwrap();
}

#[tokio::test]
async fn any_seed_may_be_down_and_a_dead_node_is_left() {
    let fakes = Fakes::start(3, 1);
    let seeds = [dead_address(), fakes.address(2), dead_address()];
    let client = Client::connect(seeds).await.unwrap();
    let db = client.database("db");
    db.put(key("a"), key("1")).await.unwrap();
    assert_eq!(fakes.calls(1), [1]);
    fakes.kill(1);
    let begun = Instant::now();
    db.put(key("b"), key("1")).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(1));
    assert_eq!(fakes.calls(2), [1]);
    assert_eq!(client.map().await.unwrap().nodes.len(), 3);

    let nobody =
        ClientOptions { timeout: Duration::from_millis(300), ..ClientOptions::new([dead_address()]) };
    let begun = Instant::now();
    let error = Client::connect_with(nobody).await.err().unwrap();
    assert!(matches!(error, ClientError::NotApplied(NotApplied::Unavailable { .. })));
    assert!(begun.elapsed() < Duration::from_secs(1));
}

#[tokio::test]
async fn peer_ports_alone_are_named_at_once() {
    let ports = [peer_port(), peer_port()];
    let named = |error: ClientError| {
        let ClientError::Invalid(text) = &error else { panic!("{error:?}") };
        assert!(text.contains("peer port") && text.contains("clients use 192.0.2.1:7101"), "{text}");
        assert!(ports.iter().all(|port| text.contains(port.as_str())), "{text}");
    };
    let begun = Instant::now();
    named(Client::connect(ports.clone()).await.err().unwrap());
    let client = Client::unconnected(ClientOptions::new(ports.clone())).unwrap();
    named(client.database("db").put(key("a"), key("1")).await.unwrap_err());
    named(client.database("db").scan(ScanOptions::default()).next_page().await.unwrap_err());
    named(client.create_database("new", 1, 1, Duration::from_secs(10)).await.unwrap_err());
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());

    // A node that is down may come back: worth the time that was given.
    let seeds = [ports[0].clone(), dead_address()];
    let brief = ClientOptions { timeout: Duration::from_millis(300), ..ClientOptions::new(seeds) };
    let error = Client::connect_with(brief).await.err().unwrap();
    assert!(matches!(error, ClientError::NotApplied(NotApplied::Unavailable { .. })), "{error:?}");
    assert!(error.to_string().contains("peer port"), "{error}");

    // One good address is enough.
    let fakes = Fakes::start(1, 1);
    let client = Client::connect([ports[0].clone(), fakes.address(1), ports[1].clone()]).await.unwrap();
    client.database("db").put(key("a"), key("1")).await.unwrap();
}

#[tokio::test]
async fn a_hung_leader_is_left_for_another() {
    let fakes = Fakes::start(2, 1);
    let (_client, db) = connect(&fakes).await;
    fakes.always(1, Act::Hang);
    let begun = Instant::now();
    db.put(key("a"), key("1")).await.unwrap();
    let took = begun.elapsed();
    assert!(took > Duration::from_secs(1) && took < Duration::from_secs(4), "{took:?}");
    let begun = Instant::now();
    db.put(key("b"), key("1")).await.unwrap();
    assert!(begun.elapsed() < Duration::from_millis(500), "the new leader is known");
}

#[tokio::test]
async fn deadlines_hold_and_say_what_is_known() {
    let fakes = Fakes::start(1, 1);
    let (_client, db) = connect(&fakes).await;
    fakes.always(1, Act::Hang);
    let brief = db.with_timeout(Duration::from_millis(300));
    let begun = Instant::now();
    let (read, write, cas) = tokio::join!(
        brief.get(key("a")),
        brief.put(key("a"), key("1")),
        brief.cas(key("a"), Expect::Absent, key("1")),
    );
    assert!(matches!(read, Err(ClientError::NotApplied(NotApplied::Unavailable { .. }))));
    assert!(matches!(write, Err(ClientError::Unknown(_))));
    assert!(matches!(cas, Err(ClientError::Unknown(_))));
    // All calls of the shard hang: what waits behind them ends in time too, certainly not applied.
    let many: Vec<_> = (0..40)
        .map(|n| {
            let (long, brief) = (db.clone(), brief.clone());
            tokio::spawn(async move {
                // One at a time, each not waiting long for the call before, fills the lane; the last ones have to wait.
                let after = if n < 20 { 10 * n } else { 400 + n };
                tokio::time::sleep(Duration::from_millis(after)).await;
                let db = if n < 20 { long.with_timeout(Duration::from_secs(2)) } else { brief };
                let begun = Instant::now();
                (db.put(key("q"), key("1")).await, begun.elapsed(), n)
            })
        })
        .collect();
    let mut not_sent = 0;
    for task in many {
        let (end, took, n) = task.await.unwrap();
        // Before those whose calls hang have ended, who have more time; and before anybody would be asked again.
        let most = if n < 20 { 2_900 } else { 1_200 };
        assert!(took < Duration::from_millis(most), "{took:?} for {n}");
        not_sent += usize::from(matches!(end, Err(ClientError::NotApplied(_))));
        assert!(end.is_err());
    }
    assert!(not_sent >= 20, "{not_sent} were never sent");
    assert!(begun.elapsed() < Duration::from_secs(6));
}

#[tokio::test]
async fn close_answers_everybody_within_a_second() {
    let fakes = Fakes::start(1, 1);
    let (client, db) = connect(&fakes).await;
    fakes.always(1, Act::Hang);
    let pending: Vec<_> = (0..10)
        .map(|n| {
            let db = db.clone();
            tokio::spawn(async move { db.put(key(&n.to_string()), key("1")).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let begun = Instant::now();
    client.close().await;
    for task in pending {
        assert!(task.await.unwrap().is_err());
    }
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    client.close().await;
}

/// The caller's runtime needs no timer, no I/O, and may be another one for each call.
#[test]
fn any_runtime_will_do() {
    let fakes = Fakes::start(1, 1);
    let bare = || tokio::runtime::Builder::new_current_thread().build().unwrap();
    let client = bare().block_on(Client::connect([fakes.address(1)])).unwrap();
    let db = client.database("db");
    let threads: Vec<_> = (0..4)
        .map(|n: u32| {
            let db = db.clone();
            std::thread::spawn(move || {
                bare().block_on(async { db.put(key(&n.to_string()), key("v")).await.unwrap() })
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    bare().block_on(client.close());
}

/// A client that works in the `LocalSet` of its owner: what is asked there and elsewhere, how it is closed, and how it
/// ends with the set.
#[test]
fn a_client_of_a_local_set_has_no_thread_and_ends_with_the_set() {
    let fakes = Fakes::start(2, 4);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let closed = ClientError::NotApplied(NotApplied::Closed);
    let of_here = tokio::task::LocalSet::new();
    let left = of_here.block_on(&runtime, async {
        let options = ClientOptions::new([fakes.address(1)]);
        let client = Client::connect_here(options.clone()).await.unwrap();
        let db = client.database("db");
        let done = std::rc::Rc::new(std::cell::Cell::new(0));
        let puts = (0..100).map(|n| {
            let (db, done) = (db.clone(), done.clone());
            tokio::task::spawn_local(async move {
                db.put(key(&n.to_string()), key("v")).await.unwrap();
                done.set(done.get() + 1);
            })
        });
        for put in puts.collect::<Vec<_>>() {
            put.await.unwrap();
        }
        assert_eq!(done.get(), 100);
        // Asked on another thread, it is answered by this one.
        let elsewhere = db.clone();
        let asked = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(elsewhere.get(key("7")))
        });
        while !asked.is_finished() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(asked.join().unwrap().unwrap().unwrap().value, key("v"));
        client.close().await;
        assert_eq!(db.get(key("7")).await.unwrap_err(), closed);
        Client::connect_here(options).await.unwrap()
    });
    // What is dropped holds timers and sockets.
    let entered = runtime.enter();
    drop(of_here);
    drop(entered);
    assert_eq!(runtime.block_on(left.database("db").get(key("7"))).unwrap_err(), closed);
    // That of one that is gone already.
    runtime.block_on(left.close());
}

#[tokio::test]
async fn another_protocol_version_is_named() {
    let fakes = Fakes::start(1, 1);
    fakes.always(1, Act::WrongVersion);
    let options = ClientOptions { timeout: Duration::from_secs(2), ..ClientOptions::new([fakes.address(1)]) };
    let error = Client::connect_with(options).await.err().unwrap().to_string();
    assert!(error.contains("protocol"), "{error}");
}

#[tokio::test]
async fn a_node_with_another_identity_is_not_written_to() {
    let fakes = Fakes::start(2, 1);
    let (_client, db) = connect(&fakes).await;
    // The map says that node 1 is where node 2 listens.
    fakes.change_map(|map| {
        map.version += 1;
        let version = map.version;
        let address = map.nodes[&NodeId(2)].client_address.clone();
        for node in map.nodes.values_mut() {
            node.client_address = address.clone();
            node.changed_at = version;
        }
    });
    _client.map().await.unwrap();
    let brief = db.with_timeout(Duration::from_millis(500));
    brief.put(key("a"), key("1")).await.unwrap();
    assert_eq!(fakes.calls(1), [0; 0]);
    assert_eq!(fakes.calls(2), [1], "as node 2, not as node 1");
}

mod port {
    use super::*;
    use pontoon::node::handle::{NodeHandle, NodePhase};
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use tokio::sync::oneshot;

    /// The client port of a node that is starting. Ends when the sender is dropped.
    fn serve() -> (String, oneshot::Sender<()>, std::thread::JoinHandle<()>) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let local = tokio::task::LocalSet::new();
            local.block_on(&runtime.unwrap(), async {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                pontoon::rpc::serve(listener, NodeHandle::new("n1".into()), stopped).await;
            });
        });
        (address, stop, thread)
    }

    fn answer_to(address: &str, bytes: &[u8]) -> Vec<u8> {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            Ok(_) => (),
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => (),
            Err(e) => panic!("not closed: {e}"),
        }
        answer
    }

    #[tokio::test]
    async fn garbage_costs_only_its_own_connection() {
        let (address, _stop, _thread) = serve();
        let garbage: [&[u8]; 5] = [
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            &[0xff; 64],
            // One segment of 8 GiB; a message without a root; an RPC message of an unknown kind.
            &[0, 0, 0, 0, 0xff, 0xff, 0xff, 0x3f],
            b"\x00\x00\x00\x00\x02\x00\x00\x00PPPPPPPPPPPPPPPP",
            b"PNTX\x01\x00\x00\x00",
        ];
        for bytes in garbage {
            let at = address.clone();
            let (bytes, sent) = (bytes.to_vec(), bytes.to_vec());
            let answer = tokio::task::spawn_blocking(move || answer_to(&at, &bytes));
            assert!(answer.await.unwrap().len() < 4096, "{sent:?}");
        }
        let client = Client::unconnected(ClientOptions::new([address.clone()])).unwrap();
        let report = client.node_report(&address, Duration::from_secs(5)).await.unwrap();
        assert_eq!((report.phase, report.label.as_str()), (NodePhase::Starting, "n1"));
    }

    #[tokio::test]
    async fn a_node_on_the_client_port_is_told_so() {
        let (address, _stop, _thread) = serve();
        let preamble = pontoon::transport::frame::preamble();
        let answer = tokio::task::spawn_blocking(move || answer_to(&address, &preamble));
        let answer = answer.await.unwrap();
        let text = String::from_utf8_lossy(&answer);
        assert!(text.contains("client port"), "{text}");
    }

    #[tokio::test]
    async fn a_starting_node_says_not_applied() {
        let (address, _stop, _thread) = serve();
        let options =
            ClientOptions { timeout: Duration::from_millis(200), ..ClientOptions::new([address.clone()]) };
        let client = Client::unconnected(options).unwrap();
        let error = client.database("db").put(key("a"), key("1")).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, ClientError::NotApplied(NotApplied::Unavailable { .. })), "{text}");
        assert!(text.contains("isn't a member"), "{text}");
        let made = client.create_database("db", 1, 1, Duration::from_secs(3)).await;
        assert!(matches!(made, Err(ClientError::NotApplied(_))), "{made:?}");
        let made = client.create_database("d b", 1, 1, Duration::from_millis(200)).await;
        assert!(matches!(made, Err(ClientError::Invalid(_))), "{made:?}");
    }

    #[tokio::test]
    async fn stopping_closes_what_is_open() {
        let (address, stop, thread) = serve();
        let client = Client::unconnected(ClientOptions::new([address.clone()])).unwrap();
        client.node_report(&address, Duration::from_secs(5)).await.unwrap();
        let begun = Instant::now();
        drop(stop);
        tokio::task::spawn_blocking(move || thread.join().unwrap()).await.unwrap();
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
        assert!(client.node_report(&address, Duration::from_secs(5)).await.is_err());
    }
}

/// The metadata nodes are asked first, in the same order each time.
#[tokio::test]
async fn a_change_of_the_cluster_leaves_a_node_that_hangs_for_another() {
    let fakes = Fakes::start(3, 1);
    fakes.change_map(|map| {
        let first = map.shards.values().next().expect("a shard").clone();
        map.shards.insert(METADATA_SHARD, ShardRecord { id: METADATA_SHARD, ..first });
    });
    let hung = (1..=3).min_by_key(|&node| fakes.address(node)).expect("three nodes");
    let (client, _) = connect(&fakes).await;
    client.map().await.expect("the map");
    fakes.always(hung, Act::Hang);
    let begun = Instant::now();
    client.drop_database("db", Duration::from_secs(7)).await.expect("by the next one");
    let took = begun.elapsed();
    assert!((Duration::from_secs(2)..Duration::from_secs(6)).contains(&took), "{took:?}");
    client.close().await;
}

/// Has the map say that node 1 is where somebody accepts and never answers, and that it alone holds the
/// metadata shard, so that it is asked first.
fn hang_first(fakes: &Fakes) -> std::net::TcpListener {
    let (listener, address) = hung_address();
    fakes.change_map(|map| {
        let mut first = map.shards.values().next().expect("a shard").clone();
        first.members.truncate(1);
        map.shards.insert(METADATA_SHARD, ShardRecord { id: METADATA_SHARD, ..first });
        map.nodes.get_mut(&NodeId(1)).expect("node 1").client_address = address;
    });
    listener
}

#[tokio::test]
async fn a_node_that_welcomes_nobody_costs_a_moment() {
    let fakes = Fakes::start(3, 1);
    let _hung = hang_first(&fakes);
    let (_listener, another) = hung_address();
    // A black hole, or, where there is no way there at all, a network that says so.
    let seeds = [another, "192.0.2.1:7101".into(), dead_address(), fakes.address(2)];
    let brief = ClientOptions { timeout: Duration::from_millis(900), ..ClientOptions::new(seeds) };
    let begun = Instant::now();
    let client = Client::connect_with(brief).await.unwrap();
    let db = client.database("db");
    // The first member of the shard hangs.
    db.put(key("a"), key("1")).await.unwrap();
    db.scan(ScanOptions::default()).next_page().await.unwrap();
    client.map().await.unwrap();
    client.drop_database("db", Duration::from_millis(900)).await.unwrap();
    assert_eq!(fakes.drops(), [1]);
    // Each of them alone would take as long as a node may take to welcome.
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    client.close().await;
}

#[tokio::test]
async fn a_node_that_stands_still_is_left_before_an_attempt_is_over() {
    let fakes = Fakes::start(2, 1);
    let (_client, db) = connect(&fakes).await;
    db.put(key("a"), key("1")).await.unwrap();
    fakes.next(1, Act::Freeze(Duration::from_secs(4)));
    let begun = Instant::now();
    assert_eq!(db.put(key("b"), key("1")).await, Ok(2));
    let took = begun.elapsed();
    assert!(took > Duration::from_millis(900) && took < Duration::from_millis(1_800), "{took:?}");
    // What it does when it goes on, it does for a command that is known.
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(fakes.calls(1).len(), 2);
    assert_eq!(db.put(key("c"), key("1")).await, Ok(3));
}

#[tokio::test]
async fn a_shard_that_nobody_leads_is_told_with_what_each_node_said() {
    let fakes = Fakes::start(3, 1);
    let (_client, db) = connect(&fakes).await;
    db.put(key("a"), key("1")).await.unwrap();
    let dead = fakes.address(2);
    fakes.kill(2);
    fakes.always(1, Act::NotLeader(None));
    fakes.always(3, Act::NotLeader(Some(2)));
    let brief = db.with_timeout(Duration::from_millis(700));
    let error = brief.put(key("a"), key("2")).await.unwrap_err();
    let ClientError::NotApplied(NotApplied::Unavailable { last, .. }) = &error else { panic!("{error:?}") };
    for part in [
        "shard 1 had no leader that answered for 0.",
        &format!("node 1 at {}: it knows no leader", fakes.address(1)),
        &format!("node 2 at {dead}: Connection refused"),
        &format!("node 3 at {}: it follows node 2", fakes.address(3)),
    ] {
        assert!(last.contains(part), "no {part:?} in {last}");
    }
    // All seeds are told too, where not even a map is to be had.
    let (_listener, hung) = hung_address();
    let seeds = [dead.clone(), hung.clone()];
    let nobody = ClientOptions { timeout: Duration::from_millis(300), ..ClientOptions::new(seeds) };
    let error = Client::connect_with(nobody).await.err().unwrap().to_string();
    let parts = [format!("{dead}: Connection refused"), format!("{hung}: no answer")];
    assert!(parts.iter().all(|part| error.contains(part)), "{error}");
}

#[tokio::test]
async fn a_drop_in_doubt_leaves_a_newer_database_of_the_name_alone() {
    let fakes = Fakes::start(2, 1);
    let (client, _) = connect(&fakes).await;
    fakes.next(1, Act::ApplyAndDrop);
    fakes.next(2, Act::ApplyAndDrop);
    // The second answer that would be lost is that of the newer database.
    client.drop_database("db", Duration::from_secs(5)).await.expect("dropped by the first attempt");
    assert_eq!(fakes.drops(), [1, 1]);
    fakes.change_map(|map| assert!(!map.databases[&DatabaseId(2)].dropped));
    client.close().await;
}

#[tokio::test]
async fn an_order_in_doubt_leaves_a_newer_one_alone() {
    let fakes = Fakes::start(2, 1);
    let (client, _) = connect(&fakes).await;
    fakes.next(1, Act::ApplyAndDrop);
    fakes.next(2, Act::ApplyAndDrop);
    let given = client.set_standing(NodeId(2), Standing::Draining, Duration::from_secs(5)).await;
    // It was carried out once; whether, the second answer doesn't tell.
    let Err(ClientError::Unknown(why)) = given else { panic!("{given:?}") };
    assert!(why.to_string().contains("has changed meanwhile"), "{why}");
    let orders = fakes.orders();
    assert!(matches!(orders[..], [first, second] if first == second && first > 0), "{orders:?}");
    fakes.change_map(|map| assert_eq!(map.nodes[&NodeId(2)].standing, Standing::Member));
    client.close().await;
}

#[tokio::test]
async fn an_order_by_an_old_map_is_given_anew_by_the_one_of_now() {
    let fakes = Fakes::start(2, 1);
    let (client, _) = connect(&fakes).await;
    fakes.change_map(|map| {
        map.version += 5;
        map.nodes.get_mut(&NodeId(2)).unwrap().changed_at = map.version;
    });
    let given = client.set_standing(NodeId(2), Standing::Draining, Duration::from_secs(5)).await;
    let version = given.expect("by the map of now");
    assert_eq!(fakes.orders().last(), Some(&(version - 1)));
    fakes.change_map(|map| assert_eq!(map.nodes[&NodeId(2)].standing, Standing::Draining));
    client.close().await;
}
