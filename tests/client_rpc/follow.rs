//! How a client hears of changes in the cluster while it has nothing to do.

use std::time::{Duration, Instant};

use pontoon::client::options::ClientOptions;
use pontoon::client::{Client, ClientError, NotApplied, ScanOptions};
use pontoon::ids::{DatabaseId, METADATA_DATABASE, METADATA_SHARD, NodeId, ShardId};
use pontoon::placement::map::{ClusterMap, DatabaseRecord, NodeRecord, Standing};

use super::fake::{Act, Fakes};
use super::{connect, key};

const PATIENCE: Duration = Duration::from_secs(20);

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Has the database be on `nodes` alone, and the others removed.
fn moved(map: &mut ClusterMap, nodes: &[u64]) {
    map.version += 1;
    let version = map.version;
    for node in map.nodes.values_mut() {
        node.standing = if nodes.contains(&node.id.0) { Standing::Member } else { Standing::Removed };
        node.changed_at = version;
    }
    for shard in map.shards.values_mut() {
        shard.members.retain(|member| nodes.contains(&member.node.0));
        shard.epoch.conf += 1;
        shard.changed_at = version;
    }
}

#[tokio::test]
async fn an_idle_client_follows_a_cluster_all_of_whose_addresses_are_replaced() {
    let fakes = Fakes::start(6, 2);
    // Half of the nodes aren't there yet.
    let mut whole = ClusterMap::default();
    fakes.change_map(|map| {
        whole = map.clone();
        map.nodes.retain(|node, _| node.0 <= 3);
        map.shards.values_mut().for_each(|shard| shard.members.retain(|member| member.node.0 <= 3));
    });
    let client = Client::connect((1..=3).map(|node| fakes.address(node))).await.unwrap();
    let db = client.database("db");
    db.put(key("a"), key("1")).await.unwrap();

    fakes.change_map(|map| {
        *map = whole;
        moved(map, &[4, 5, 6]);
    });
    // It asks for nothing meanwhile, and waits at one of the new ones in the end.
    let waits = || (4..=6).any(|node| fakes.map_calls(node).0 > 0);
    until("the client waits at a new node", waits).await;
    for node in 1..=3 {
        fakes.kill(node);
    }
    let begun = Instant::now();
    db.put(key("a"), key("2")).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    assert_eq!(fakes.calls(4).len(), 1, "the first member was asked at once");
    client.close().await;
}

#[tokio::test]
async fn a_client_waits_elsewhere_when_the_node_where_it_waits_fails() {
    let fakes = Fakes::start(3, 1);
    let (client, db) = connect(&fakes).await;
    let place = |gone: &[u64]| (1..=3).find(|node| !gone.contains(node) && fakes.map_calls(*node).0 > 0);
    until("it waits", || place(&[]).is_some()).await;
    let first = place(&[]).unwrap();
    fakes.kill(first);
    until("it waits at another", || place(&[first]).is_some()).await;
    let second = place(&[first]).unwrap();
    fakes.kill(second);
    let left = 6 - first - second;
    until("it waits at the last", || fakes.map_calls(left).0 > 0).await;
    // It doesn't press, and hears of what happens.
    fakes.change_map(|map| moved(map, &[left]));
    until("it has heard, and waits again", || fakes.map_calls(left).0 > 1).await;
    db.put(key("a"), key("1")).await.unwrap();
    assert_eq!(fakes.calls(left).len(), 1);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(fakes.map_calls(left).0 <= 4, "{:?}", fakes.map_calls(left));
    client.close().await;
}

#[tokio::test]
async fn where_no_call_can_wait_the_map_is_asked_for_now_and_then() {
    let fakes = Fakes::start(2, 1);
    fakes.is_old(1);
    fakes.is_old(2);
    let (client, db) = connect(&fakes).await;
    let before = fakes.map_calls(1).1 + fakes.map_calls(2).1;
    fakes.change_map(|map| moved(map, &[2]));
    let polled = || fakes.map_calls(1).1 + fakes.map_calls(2).1 - before;
    until("it asks once", || polled() > 0).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(polled(), 1, "and not again at once");
    db.put(key("a"), key("1")).await.unwrap();
    assert_eq!((fakes.calls(1).len(), fakes.calls(2).len()), (0, 1), "it has heard");
    client.close().await;
}

#[tokio::test]
async fn learners_and_removed_nodes_are_not_asked() {
    use pontoon::placement::map::MemberRole;
    let fakes = Fakes::start(4, 1);
    fakes.change_map(|map| {
        let members = &mut map.shards.values_mut().next().unwrap().members;
        members[0].role = MemberRole::Learner;
        map.nodes.get_mut(&NodeId(2)).unwrap().standing = Standing::Removed;
    });
    let (client, db) = connect(&fakes).await;
    fakes.next(3, Act::NotLeader(None));
    fakes.next(4, Act::NotLeader(None));
    fakes.next(3, Act::NotLeader(Some(2)));
    fakes.next(4, Act::NotLeader(Some(3)));
    db.put(key("a"), key("1")).await.unwrap();
    let calls: Vec<usize> = (1..=4).map(|node| fakes.calls(node).len()).collect();
    assert_eq!(calls, [0, 0, 3, 2]);
    // But for one that is named as the leader: by now it may be.
    fakes.next(3, Act::NotLeader(Some(1)));
    db.put(key("a"), key("2")).await.unwrap();
    assert_eq!(fakes.calls(1).len(), 1);
    client.close().await;
}

#[tokio::test]
async fn a_client_leaves_nodes_that_are_cut_off_and_keeps_no_connection_to_them() {
    let fakes = Fakes::start(4, 1);
    (1..=3).for_each(|node| fakes.is_cut_off(node, true));
    // The first serves its data too.
    let (client, db) = connect(&fakes).await;
    db.put(key("a"), key("1")).await.unwrap();
    until("it waits at the only node that hears anything", || fakes.map_calls(4).0 > 0).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(fakes.map_calls(4).0, 1, "and stays there");
    until("the others are closed", || (1..=4).map(|node| fakes.open(node)).eq([1, 0, 0, 1])).await;
    // Where all are, it asks ever less often.
    fakes.is_cut_off(4, true);
    let calls = || (1..=4).map(|node| fakes.map_calls(node).0).sum::<usize>();
    let before = calls();
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!((2..=20).contains(&(calls() - before)), "{} calls", calls() - before);
    // One that hears again is found, whichever it is.
    fakes.is_cut_off(2, false);
    let all = |node| fakes.map_calls(node).0;
    let (there, before) = (all(2), calls());
    until("it waits there", || all(2) > there).await;
    assert!(calls() - before <= 8, "{} calls", calls() - before);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let after = calls();
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!(calls(), after, "and stays there");
    db.put(key("a"), key("2")).await.unwrap();
    client.close().await;
}

#[tokio::test]
async fn only_a_node_that_hears_can_say_that_there_is_no_such_database() {
    let fakes = Fakes::start(3, 1);
    (1..=3).for_each(|node| fakes.is_cut_off(node, true));
    let (client, _db) = connect(&fakes).await;
    let later = client.database("later");
    let patient = later.clone().with_timeout(Duration::from_millis(500));
    let error = patient.get(key("a")).await.unwrap_err();
    assert!(matches!(error, ClientError::NotApplied(NotApplied::Unavailable { .. })), "{error:?}");
    let error = patient.scan(ScanOptions::default()).next_page().await.unwrap_err();
    assert!(matches!(error, ClientError::NotApplied(NotApplied::Unavailable { .. })), "{error:?}");
    // One of them is enough.
    fakes.is_cut_off(2, false);
    let refused = later.get(key("a")).await.unwrap_err();
    assert_eq!(refused, ClientError::NotApplied(NotApplied::UnknownDatabase("later".into())));
    client.close().await;
}

#[tokio::test]
async fn only_a_node_that_hears_can_say_that_there_is_nothing_to_change() {
    let fakes = Fakes::start(3, 1);
    (1..=3).for_each(|node| fakes.is_cut_off(node, true));
    let short = Duration::from_millis(500);
    let options = ClientOptions { timeout: short, ..ClientOptions::new([fakes.address(1)]) };
    let client = Client::connect_with(options).await.unwrap();
    let lead = || client.transfer_leader(ShardId(99), NodeId(1), short);
    let refuse = || client.drop_database("later", short);
    let errors = [
        lead().await.unwrap_err(),
        refuse().await.unwrap_err(),
        client.map_naming("later").await.unwrap_err(),
    ];
    for error in errors {
        // Mostly with the reason: the last attempt may end with the time.
        assert!(matches!(error, ClientError::NotApplied(NotApplied::Unavailable { .. })), "{error:?}");
    }
    assert!(client.map_naming("db").await.is_ok(), "whoever has it needn't hear of more");
    // One of them is enough.
    fakes.is_cut_off(2, false);
    let error = lead().await.unwrap_err();
    assert!(matches!(&error, ClientError::NotApplied(NotApplied::Refused(_))), "{error:?}");
    assert!(error.to_string().contains("there is no shard 99"), "{error}");
    let unknown = ClientError::NotApplied(NotApplied::UnknownDatabase("later".into()));
    assert_eq!(refuse().await.unwrap_err(), unknown);
    assert!(client.map_naming("later").await.unwrap().database("later").is_none());
    client.close().await;
}

/// What a command tells, which knows the address of the first node, and its exit code.
async fn command(fakes: &Fakes, args: &[&str]) -> (String, Option<i32>) {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_pontoon"));
    command.args(args).args(["--cluster", &fakes.address(1), "--timeout", "1s"]).kill_on_drop(true);
    let output = command.stdin(std::process::Stdio::null()).output().await.unwrap();
    (String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned(), output.status.code())
}

#[tokio::test]
async fn a_command_believes_no_node_without_news_that_something_is_not_there() {
    let fakes = Fakes::start(2, 1);
    // The first is always asked first.
    fakes.change_map(|map| {
        let mut metadata = map.shards[&ShardId(1)].clone();
        (metadata.id, metadata.database) = (METADATA_SHARD, METADATA_DATABASE);
        metadata.members.truncate(1);
        map.shards.insert(metadata.id, metadata);
    });
    (1..=2).for_each(|node| fakes.is_old(node));
    fakes.stays_behind(1);
    fakes.change_map(|map| {
        map.version += 1;
        let changed_at = map.version;
        let later = map.databases[&DatabaseId(1)].clone();
        let later = DatabaseRecord { id: DatabaseId(2), name: "later".into(), changed_at, ..later };
        map.databases.insert(later.id, later);
        let third = map.nodes[&NodeId(2)].clone();
        map.nodes.insert(NodeId(3), NodeRecord { id: NodeId(3), changed_at, ..third });
    });
    let (told, code) = command(&fakes, &["route", "later", "k", "--json"]).await;
    assert_eq!(code, Some(0), "{told}");
    let (told, code) = command(&fakes, &["admin", "transfer-leader", "later", "7", "1"]).await;
    assert!(code == Some(1) && told.contains("`later` has no shard 7; it has 1"), "{told}");
    // These nodes can't be asked to decide anything, which is another matter.
    let (told, _) = command(&fakes, &["admin", "node", "drain", "3"]).await;
    assert!(!told.contains("there is no node"), "{told}");

    let nothing = [
        &["status", "nothing"][..],
        &["route", "nothing", "k"],
        &["admin", "database", "verify", "nothing"],
        &["admin", "database", "set-replicas", "nothing", "1"],
        &["admin", "transfer-leader", "nothing", "7", "1"],
        &["admin", "node", "drain", "9"],
        &["admin", "node", "add", "192.0.2.1:7101"],
    ];
    for args in nothing {
        let (told, code) = command(&fakes, args).await;
        assert_eq!(code, Some(1), "{args:?}: {told}");
    }
    fakes.is_cut_off(2, true);
    for args in nothing {
        let (told, code) = command(&fakes, args).await;
        assert_eq!(code, Some(3), "{args:?}: {told}");
    }
}
