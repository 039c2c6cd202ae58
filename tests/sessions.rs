//! Sessions on real daemons: what is sent again takes effect once, whoever dies meanwhile; the table that
//! makes it so survives with the data, and stays small.

#[path = "support/cluster.rs"]
mod cluster;
#[path = "support/counters.rs"]
mod counters;
#[path = "support/replies.rs"]
mod replies;
#[path = "sessions/wire.rs"]
mod wire;

use std::time::{Duration, Instant};

use cluster::{Cluster, Options, free_ports, http_get, metric};
use counters::{Load, assert_exact};
use pontoon::client::options::ClientOptions;
use pontoon::client::{Client, Database};
use pontoon::refusal::{Outcome, Refusal};
use replies::{Odds, Replies};
use wire::{Session, What, Wire};

/// A session of its own for each use.
fn id(number: u64) -> [u8; 16] {
    let mut id = *b"a session of ...";
    id[8..].copy_from_slice(&number.to_be_bytes());
    id
}

/// Inserts lines into the settings of a node that hasn't started.
fn configure(cluster: &Cluster, node: usize, replace: &str, with: &str) {
    let config = &cluster.nodes[node].config;
    let text = std::fs::read_to_string(config).expect("its settings");
    assert!(text.contains(replace), "{text}");
    std::fs::write(config, text.replace(replace, with)).expect("written");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counters_are_exact_though_replies_are_cut_and_leaders_killed() {
    let mut cluster = Cluster::prepared(3, &free_ports(6), Options::default());
    let replies = Replies::new(&cluster.addresses(), 7);
    for (node, address) in replies.addresses().iter().enumerate() {
        configure(&cluster, node, "[peer]\n", &format!("advertise = \"{address}\"\n[peer]\n"));
        cluster.spawn(node);
    }
    cluster.wait_all_ready();
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients
            .push(Client::connect_with(ClientOptions::new(replies.addresses())).await.expect("connecting"));
    }
    cluster.database(&clients[0], "exact", 3, 4).await;
    // Enough that no outcome stays unknown: then every number below is exact.
    let patient = |client: &Client| client.database("exact").with_timeout(Duration::from_secs(120));
    let databases: Vec<Database> = clients.iter().map(patient).collect();

    replies.set(Odds { close: 15, silence: 2, late: 2 });
    let load = Load::start(&databases, 16);
    for round in 0..4 {
        load.progress(400).await;
        cluster.kill(round % 3);
        load.progress(150).await;
        cluster.spawn(round % 3);
        cluster.wait_ready(round % 3);
    }
    load.progress(400).await;
    // How many replies that were is up to the machine: the busier it is, the more a reply answers.
    let begun = Instant::now();
    while replies.faults() <= 10 {
        assert!(begun.elapsed() < Duration::from_secs(60), "only {} replies were lost", replies.faults());
        load.progress(100).await;
    }
    let tally = load.stop().await;
    replies.set(Odds::default());
    assert_eq!(tally.errors, []);
    let faults = replies.faults();
    println!("{} writes, {} additions, {faults} faults", tally.writes.values().sum::<u64>(), tally.added);
    // Late requests arrive, if any are still on their way.
    tokio::time::sleep(Duration::from_secs(3)).await;

    assert_exact(&clients[0], "exact", &databases[0], &tally).await;
    for client in clients {
        client.close().await;
    }
}

/// Of a node on `port`.
fn metrics(port: u16) -> impl Fn(&str) -> f64 {
    move |name| {
        let (status, text) = http_get(port, "/metrics").expect("an answer");
        assert_eq!(status, 200, "{text}");
        metric(&text, name).unwrap_or(0.0)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_survives_the_death_of_all_nodes() {
    let http = free_ports(3);
    let mut cluster = Cluster::prepared(3, &free_ports(6), Options::default());
    for (node, port) in http.iter().enumerate() {
        configure(&cluster, node, "memtable_bytes = \"32MiB\"", "memtable_bytes = \"16MiB\"");
        configure(&cluster, node, "[node]\n", &format!("[http]\nlisten = \"127.0.0.1:{port}\"\n[node]\n"));
        cluster.spawn(node);
    }
    cluster.wait_all_ready();
    let client = cluster.client().await;
    let database = cluster.database(&client, "lasting", 3, 1).await;
    tokio::task::LocalSet::new()
        .run_until(async {
            let mut wire = Wire::new(&client, "lasting").await;
            let id = id(1);
            let opening = Session { id: &id, open_ttl_ms: 600_000, acked_below: 1 };
            let opened = Session { open_ttl_ms: 0, ..opening };
            let first = wire.one(opening, 1, What::Put("first")).await.expect("a write");
            let second = wire.one(opened, 2, What::Delete).await.expect("a deletion");
            assert_eq!((first, second), (1, 2));
            // The memtable that holds them goes to disk: there are flushes beyond those of now.
            let flushes = |port: &u16| metrics(*port)("pontoon_flush_seconds_count");
            let before: Vec<f64> = http.iter().map(flushes).collect();
            let mut big = 2;
            let begun = Instant::now();
            while http.iter().zip(&before).any(|(port, before)| flushes(port) < before + 2.0) {
                big = database.put("big", vec![7; 4 << 20]).await.expect("a great value");
                assert!(begun.elapsed() < Duration::from_secs(60), "no node flushes");
            }
            for node in 0..3 {
                cluster.kill(node);
            }
            for node in 0..3 {
                cluster.spawn(node);
            }
            cluster.wait_all_ready();
            // The answers of then, though by now each would have another.
            assert_eq!(wire.one(opened, 1, What::Put("again")).await, Ok(first));
            assert_eq!(wire.one(opened, 2, What::Delete).await, Ok(second));
            assert_eq!(wire.one(Session::default(), 0, What::Get).await, Ok(0), "neither was done again");
            assert_eq!(wire.one(opened, 3, What::Create("new")).await, Ok(big + 1));
        })
        .await;
    client.close().await;
}

/// The fixed fields and the text of a refusal of one's session.
fn assert_session_refusal(refusal: &Refusal, expected: &Refusal) {
    assert_eq!(refusal, expected);
    assert_eq!((refusal.outcome(), refusal.retryable()), (Outcome::Unknown, false));
    assert!(refusal.to_string().contains("session"), "{refusal}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_made_by_hand_get_the_answers_of_the_protocol() {
    let mut cluster = Cluster::new(1);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    cluster.database(&client, "byhand", 1, 1).await;
    tokio::task::LocalSet::new()
        .run_until(async {
            let mut wire = Wire::new(&client, "byhand").await;
            let (id, other) = (id(1), id(2));
            let opening = Session { id: &id, open_ttl_ms: 10_000, acked_below: 0 };
            let opened = Session { open_ttl_ms: 0, ..opening };
            // Without having been opened.
            let refused = wire.one(opened, 1, What::Put("x")).await.unwrap_err();
            assert_session_refusal(&refused, &Refusal::SessionExpired);
            assert_eq!(wire.one(opened, 0, What::Get).await, Ok(0), "nothing was done");
            // A batch opens it, and is split anew at will.
            let kv = wire.leader().await;
            let batch = [(1, What::Create("a")), (0, What::Get), (2, What::Create("b")), (0, What::Put("p"))];
            let ends = wire.send(&kv, opening, &batch).await.expect("an answer");
            assert_eq!(ends[0], Ok(1));
            assert!(ends.iter().all(Result::is_ok), "{ends:?}");
            assert_eq!(wire.one(opened, 1, What::Create("a")).await, Ok(1));
            // The second failed, and is told what is there by now; when it could succeed, that it may not.
            assert_eq!(wire.one(opened, 2, What::Create("b")).await, Ok(2), "the other put's version");
            assert_eq!(wire.one(Session::default(), 0, What::Delete).await, Ok(3));
            let refused = wire.one(opened, 2, What::Create("b")).await.unwrap_err();
            assert_session_refusal(&refused, &Refusal::StaleCommand);
            assert_eq!(wire.one(opened, 0, What::Get).await, Ok(0));
            // Another session's numbers are its own.
            let second = Session { id: &other, ..opening };
            assert_eq!(wire.one(second, 1, What::Put("c")).await, Ok(4));
            // What is acknowledged is forgotten, and not done again.
            let acked = Session { acked_below: 3, ..opened };
            assert_eq!(wire.one(acked, 3, What::Put("d")).await, Ok(5));
            let refused = wire.one(opened, 1, What::Create("a")).await.unwrap_err();
            assert_session_refusal(&refused, &Refusal::StaleCommand);
            assert_eq!(wire.one(opened, 3, What::Put("d")).await, Ok(5));
            // What makes no sense does nothing.
            for (session, sequence, what) in [
                (Session { id: &id[..15], ..opening }, 4, What::Put("x")),
                (Session { id: &[], open_ttl_ms: 1, acked_below: 0 }, 0, What::Put("x")),
                (Session::default(), 4, What::Put("x")),
                (Session { acked_below: 5, ..opened }, 4, What::Put("x")),
                (opened, 4, What::Get),
            ] {
                let refused = wire.one(session, sequence, what).await;
                assert!(matches!(refused, Err(Refusal::Invalid(_))), "{session:?} {what:?}: {refused:?}");
            }
            assert_eq!(wire.one(opened, 4, What::Put("e")).await, Ok(6));
        })
        .await;
    client.close().await;
}

/// A command of the shell is a client of its own, with a session that nobody closes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_short_lived_session_costs_one_entry_and_is_forgotten() {
    let http = free_ports(1)[0];
    let mut cluster = Cluster::prepared(1, &free_ports(2), Options::default());
    configure(&cluster, 0, "[node]\n", &format!("[http]\nlisten = \"127.0.0.1:{http}\"\n[node]\n"));
    cluster.spawn(0);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    let database = cluster.database(&client, "brief", 1, 1).await;
    database.put("warm", "up").await.expect("a write");
    let value = metrics(http);
    let counts = || ["pontoon_proposals_total", "pontoon_log_entries_total"].map(&value);
    // What a new cluster and a new database bring with them is over when nothing moves any more.
    let mut before = counts();
    loop {
        tokio::time::sleep(Duration::from_millis(700)).await;
        let now = counts();
        if now == before {
            break;
        }
        before = now;
    }
    let set = |n: u64| {
        let ended = cluster.run(&["set", "brief", &format!("k{n}"), "v", "--timeout", "1s"]);
        assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    };
    (0..20).for_each(set);
    let after = counts();
    assert_eq!([after[0] - before[0], after[1] - before[1]], [20.0, 20.0]);
    // Theirs and our own; the gauge follows in a moment.
    let begun = Instant::now();
    let waits = |what: &str| {
        let sessions = value("pontoon_sessions");
        assert!(begun.elapsed() < Duration::from_secs(60), "{sessions} sessions, and not {what}");
    };
    while value("pontoon_sessions") < 21.0 {
        waits("those that were begun");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // They live for ten deadlines, at least ten seconds, of the log's own time.
    while value("pontoon_sessions") > 5.0 {
        waits("those of the last seconds");
        tokio::time::sleep(Duration::from_secs(3)).await;
        set(99);
    }
    client.close().await;
}

/// As many sessions as a shard may have, and more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_table_refuses_new_sessions_and_serves_the_others() {
    let mut cluster = Cluster::new(1);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    cluster.database(&client, "full", 1, 1).await;
    tokio::task::LocalSet::new()
        .run_until(async {
            let mut wire = Wire::new(&client, "full").await;
            let kv = wire.leader().await;
            let most = pontoon::machine::session::SESSIONS_MAX as u64;
            // None of them expires meanwhile.
            fn opening(id: &[u8; 16]) -> Session<'_> {
                Session { id, open_ttl_ms: 600_000, acked_below: 0 }
            }
            let mut number = 0;
            while number < most {
                let ids: Vec<_> = (number..most.min(number + 512)).map(id).collect();
                number += ids.len() as u64;
                let put = [(1, What::Put("v"))];
                let sent = ids.iter().map(|id| wire.send(&kv, opening(id), &put));
                for ends in futures_util::future::join_all(sent).await {
                    assert!(ends.expect("an answer")[0].is_ok());
                }
            }
            let late = id(most);
            let refused = wire.one(opening(&late), 1, What::Put("v")).await.unwrap_err();
            assert!(matches!(refused, Refusal::Busy { .. }), "{refused:?}");
            assert_eq!((refused.outcome(), refused.retryable()), (Outcome::NotApplied, true));
            assert_eq!(wire.one(opening(&id(7)), 1, What::Put("v")).await, Ok(8), "the answer of before");
            assert_eq!(wire.one(opening(&id(7)), 2, What::Put("w")).await, Ok(most + 1));
            // Without a session all is as ever.
            assert_eq!(wire.one(Session::default(), 0, What::Put("x")).await, Ok(most + 2));
        })
        .await;
    client.close().await;
}
