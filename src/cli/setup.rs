//! `setup`: a local cluster if there is none, and a database.
//!
//! The nodes run in this process, on loopback ports and in directories of their own, with the code
//! that `serve` runs. With `--detach` this process starts itself again in the background and waits
//! until that child is ready or has failed.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use futures_util::future::try_join_all;

use super::args::SetupArgs;
use super::context::{Context, Session, block_on};
use super::detach::detach;
use super::failure::{Exit, Failure};
use super::local::{ClusterFile, DatabaseEntry, Holder, LocalDir, LocalLock, NodeEntry, bind_free_port};
use super::locate::Place;
use super::output;
use super::serve::{
    bind, bound_to, failed_node, ignore_closed_pipe, on_system, run_until_stopped, start_log, stop_all,
    until_stopped,
};
use super::signals::Signals;
use super::status;
use crate::client::{Client, ClientError};
use crate::limits::TIMEOUT_MAX_MS;
use crate::node::handle::NodeHandle;
use crate::node::{self, Listeners, NodeError, RunningNode};
use crate::placement::map::{ClusterMap, DatabaseRecord};
use crate::settings::{LogFormat, LogSettings, Settings};

/// Deadline of a setup where none is given, and what each replica adds to it: thousands of them take a
/// while on a small machine, which also starts every node.
const TIMEOUT: Duration = Duration::from_secs(60);
const TIMEOUT_PER_REPLICA: Duration = Duration::from_millis(40);

/// How often another process's `cluster.json` is looked for.
const POLL: Duration = Duration::from_millis(20);

/// How often the process of the nodes looks whether the databases have changed.
const REFRESH: Duration = Duration::from_secs(1);

/// `setup NAME REPLICAS PARTITIONS`
pub fn setup(context: &Context, args: &SetupArgs) -> Result<Exit, Failure> {
    if let Some(nodes) = args.nodes
        && nodes < args.replicas
    {
        return Err(too_few_nodes(nodes, args.replicas));
    }
    let dir = match context.place()? {
        Place::Addresses(addresses) => return create_there(context, args, addresses, context.timeout()),
        Place::Local(path) => LocalDir::new(path),
    };
    dir.check_ours()?;
    if dir.holder()? != Holder::None {
        return create_in_running(context, args, &dir);
    }
    let cluster = dir.read()?;
    if let Some(cluster) = &cluster {
        check_against(cluster, args, &dir)?;
    }
    if args.detach {
        return detach(context, args, &dir);
    }
    match dir.lock()? {
        Ok(lock) => host(context, args, dir, lock),
        // Somebody else was faster.
        Err(_) => create_in_running(context, args, &dir),
    }
}

/// The deadline of each step of a setup.
pub fn timeout(context: &Context, args: &SetupArgs) -> Duration {
    timeout_beyond(TIMEOUT, context, args.replicas, args.partitions)
}

/// The deadline for making a database: `--timeout`, or `least` and what its replicas add to that.
pub fn timeout_beyond(least: Duration, context: &Context, replicas: u32, shards: u32) -> Duration {
    let most = Duration::from_millis(TIMEOUT_MAX_MS);
    context.timeout_or((least + TIMEOUT_PER_REPLICA * (replicas * shards)).min(most))
}

fn too_few_nodes(nodes: u32, replicas: u32) -> Failure {
    Failure::usage(
        "too_few_nodes",
        format!(
            "{} can't hold {} of a shard, each on a node of its own; use at least --nodes {replicas}",
            output::count(nodes, "node"),
            output::count(replicas, "replica")
        ),
    )
}

/// What the existing cluster says to the wish; its file is a hint, the cluster itself asks again.
fn check_against(cluster: &ClusterFile, args: &SetupArgs, dir: &LocalDir) -> Result<(), Failure> {
    if let Some(db) = cluster.databases.iter().find(|db| db.name == args.name) {
        check_numbers(&args.name, (args.replicas, args.partitions), (db.replicas, db.shards))?;
    }
    let nodes = cluster.nodes.len() as u32;
    if let Some(asked) = args.nodes.filter(|asked| *asked != nodes) {
        return Err(Failure::usage(
            "other_nodes",
            format!(
                "the local cluster in {} has {}, not {asked}; leave out --nodes, choose another --data, or \
                 remove it with `pontoon clean`",
                dir.path().display(),
                output::count(nodes, "node")
            ),
        ));
    }
    if nodes < args.replicas {
        return Err(Failure::usage(
            "too_few_nodes",
            format!(
                "the local cluster in {} has {} and can't hold {} of a shard, each on a node of its own; \
                 ask for {nodes} at most, choose another --data, or remove it with `pontoon clean`",
                dir.path().display(),
                output::count(nodes, "node"),
                output::count(args.replicas, "replica")
            ),
        ));
    }
    Ok(())
}

/// Compares (replicas, shards).
fn check_numbers(name: &str, asked: (u32, u32), have: (u32, u32)) -> Result<(), Failure> {
    if asked == have {
        return Ok(());
    }
    Err(Failure::negative(
        "database_exists",
        format!(
            "database `{name}` exists with {}; {} were asked for. Use its numbers, another name, or drop it \
             with `pontoon db drop`",
            numbers(have.0, have.1),
            numbers(asked.0, asked.1)
        ),
    ))
}

/// In words.
fn numbers(replicas: u32, shards: u32) -> String {
    format!("{} and {}", output::count(replicas, "replica"), output::count(shards, "shard"))
}

fn create_in_running(context: &Context, args: &SetupArgs, dir: &LocalDir) -> Result<Exit, Failure> {
    // A cluster that is just starting has the lock a moment before its file.
    let deadline = Instant::now() + timeout(context, args);
    let cluster = loop {
        if let Some(cluster) = dir.read()? {
            break cluster;
        }
        if Instant::now() >= deadline {
            return Err(Failure::unavailable(format!(
                "a process holds {} and has not described its cluster; see `pontoon stop`",
                dir.path().display()
            )));
        }
        std::thread::sleep(POLL);
    };
    check_against(&cluster, args, dir)?;
    // Its nodes may be starting.
    create_there(context, args, cluster.addresses(), timeout(context, args))
}

/// Creates the database in a cluster that runs elsewhere, whose nodes have `connect` to answer at all.
fn create_there(
    context: &Context,
    args: &SetupArgs,
    addresses: Vec<String>,
    connect: Duration,
) -> Result<Exit, Failure> {
    let deadline = Instant::now() + timeout(context, args);
    block_on(async {
        let session = Session::open(addresses, connect).await?;
        let result = async {
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            create(&session.client, args, left).await?;
            show(context, &session.client, args, None).await
        }
        .await;
        session.client.close().await;
        result?;
        Ok(Exit::Done)
    })
}

/// Creates a database, unless it is there with the same numbers; returns whether it was made now.
/// With other numbers the failure shows both.
pub async fn create_database(
    client: &Client,
    name: &str,
    replicas: u32,
    shards: u32,
    timeout: Duration,
) -> Result<(DatabaseRecord, bool), Failure> {
    let map = client.map().await?;
    if let Some(db) = map.database(name) {
        check_numbers(name, (replicas, shards), (db.replicas, db.shards.len() as u32))?;
    }
    // Also where it exists: this waits until each of its shards has a leader.
    let made = client.create_database(name, replicas, shards, timeout);
    made.await.map_err(|error| {
        let what = format!("creating database `{name}` with {}", numbers(replicas, shards));
        match error {
            ClientError::Unknown(why) => Failure::unknown(format!(
                "{what}: {why}; it may be under way, and the same command again waits for its end"
            )),
            error => {
                let failure = Failure::from(error);
                Failure { message: format!("{what}: {}", failure.message), ..failure }
            }
        }
    })
}

async fn create(client: &Client, args: &SetupArgs, timeout: Duration) -> Result<(), Failure> {
    create_database(client, &args.name, args.replicas, args.partitions, timeout).await.map(drop)
}

/// Prints addresses, the shard map with leaders, and `ready`, in one write.
async fn show(
    context: &Context,
    client: &Client,
    args: &SetupArgs,
    dir: Option<&LocalDir>,
) -> Result<(), Failure> {
    let seen = status::look(client, Some(&args.name), status::REPORT_TIMEOUT).await?;
    if context.json() {
        let mut object = seen.json();
        object["ready"] = true.into();
        object["data"] = dir.map(|dir| dir.path().display().to_string()).into();
        return output::json(&object);
    }
    let place = dir.map_or(String::new(), |dir| format!(" in {}", dir.path().display()));
    output::bytes(
        format!("cluster {}{place}\n{}\n{}\nready\n", seen.cluster_id, seen.node_table(), seen.shard_table())
            .as_bytes(),
    )
}

/// Runs the nodes in this process.
fn host(context: &Context, args: &SetupArgs, dir: LocalDir, lock: LocalLock) -> Result<Exit, Failure> {
    let signals = Signals::listen(Some(super::serve::STOP_LIMIT))?;
    let (mut cluster, ports) = match dir.read()? {
        Some(cluster) => {
            // Looked at before, but without the lock.
            check_against(&cluster, args, &dir)?;
            let ports = bind_kept(&cluster, &dir)?;
            (cluster, ports)
        }
        None => choose_nodes(args.nodes.unwrap_or(args.replicas))?,
    };
    cluster.pid = Some(std::process::id());
    dir.write(&cluster)?;
    let settings: Vec<Settings> = all_settings(&cluster, &dir);
    start_log(&log_settings(args.detached))?;
    let timeout = timeout(context, args);
    let result = on_system(async {
        // Nodes that run so far, kept here so that a failed start stops them too.
        let mut nodes = Vec::new();
        let start = start_nodes(&mut nodes, settings, ports, timeout);
        let started = match until_stopped(&signals, start).await {
            None => Ok(false),
            Some(Err(failure)) => Err(failure),
            Some(Ok(())) => {
                let publish = publish(context, args, &dir, &mut cluster, timeout);
                until_stopped(&signals, publish).await.transpose().map(|done| done.is_some())
            }
        };
        match started {
            Ok(true) => {
                let handle = nodes.first().map(RunningNode::handle);
                tokio::select! {
                    result = run_until_stopped(nodes, &signals) => result,
                    never = keep_current(&dir, &mut cluster, handle) => match never {},
                }
            }
            Ok(false) => {
                stop_all(nodes).await;
                Ok(Exit::Done)
            }
            Err(failure) => {
                stop_all(nodes).await;
                Err(failure)
            }
        }
    });
    cluster.pid = None;
    if let Err(failure) = dir.write(&cluster) {
        output::note(failure.message);
    }
    // Held until the process is gone: who finds it free may rely on that nothing of the cluster runs.
    std::mem::forget(lock);
    result
}

/// On a terminal only what calls for attention, which the connections among nodes of one process
/// never do: while the cluster forms some are refused. In the log file of a cluster in the background
/// everything of interest. `PONTOON__LOG__LEVEL` overrides, as it does for `serve`.
fn log_settings(detached: bool) -> LogSettings {
    const TERMINAL: &str = "warn,pontoon::transport::link=error";
    let level = std::env::var("PONTOON__LOG__LEVEL").ok().filter(|level| !level.is_empty());
    LogSettings {
        level: level.unwrap_or_else(|| if detached { "info" } else { TERMINAL }.to_owned()),
        format: LogFormat::Text,
    }
}

async fn start_nodes(
    nodes: &mut Vec<RunningNode>,
    settings: Vec<Settings>,
    ports: Vec<Listeners>,
    timeout: Duration,
) -> Result<(), Failure> {
    for (settings, listeners) in settings.into_iter().zip(ports) {
        let label = settings.node.id.clone();
        let node =
            node::start(settings, listeners).await.map_err(|error| named(&label, failed_local(error)))?;
        nodes.push(node);
    }
    let ready = try_join_all(nodes.iter().map(async |node| {
        tokio::select! {
            ready = node.ready() => ready,
            error = node.failed() => Err(error),
        }
    }));
    tokio::time::timeout(timeout, ready)
        .await
        .map_err(|_| {
            Failure::unavailable(format!(
                "the nodes were not ready within {}; see the log, or allow more time with --timeout",
                output::seconds(timeout)
            ))
        })?
        .map_err(failed_node)?;
    Ok(())
}

/// What the failure of a node means here: it has no settings file to rejoin with.
fn failed_local(error: NodeError) -> Failure {
    match error {
        NodeError::Storage(error) if error.ends_identity() => Failure::usage(
            "damaged",
            format!(
                "{error}. Look after the disk first. A local cluster can't replace a node: `pontoon clean` removes \
                 it with its data"
            ),
        ),
        error => failed_node(error),
    }
}

fn named(label: &str, failure: Failure) -> Failure {
    Failure { message: format!("node {label}: {}", failure.message), ..failure }
}

/// Creates the database and tells the world where it is.
async fn publish(
    context: &Context,
    args: &SetupArgs,
    dir: &LocalDir,
    cluster: &mut ClusterFile,
    timeout: Duration,
) -> Result<(), Failure> {
    let session = Session::open(cluster.addresses(), timeout).await?;
    let result = async {
        create(&session.client, args, session.remaining()).await?;
        let map = session.client.map().await?;
        refresh(cluster, &map);
        dir.write(cluster)?;
        show(context, &session.client, args, Some(dir)).await.or_else(ignore_closed_pipe)
    }
    .await;
    session.client.close().await;
    result
}

/// Takes over what the map tells. Returns whether anything changed.
fn refresh(cluster: &mut ClusterFile, map: &ClusterMap) -> bool {
    let cluster_id = Some(map.cluster_id.to_string());
    let databases: Vec<DatabaseEntry> = status::databases(map)
        .map(|db| DatabaseEntry {
            name: db.name.clone(),
            replicas: db.replicas,
            shards: db.shards.len() as u32,
        })
        .collect();
    let changed = cluster.cluster_id != cluster_id || cluster.databases != databases;
    cluster.cluster_id = cluster_id;
    cluster.databases = databases;
    changed
}

/// Keeps `cluster.json` in step with the databases, and with the nodes that run: whoever put an older or
/// another one in its place, or removed it, hid them from every other terminal.
async fn keep_current(dir: &LocalDir, cluster: &mut ClusterFile, handle: Option<NodeHandle>) -> Infallible {
    let Some(handle) = handle else {
        return std::future::pending().await;
    };
    let (mut seen, mut told) = (handle.map().version, false);
    loop {
        tokio::time::sleep(REFRESH).await;
        let map = handle.map();
        let changed = std::mem::replace(&mut seen, map.version) != map.version && refresh(cluster, &map);
        // One that can't be read isn't what was written either.
        let stale = changed || dir.read().ok().flatten().as_ref() != Some(&*cluster);
        match stale.then(|| dir.write(cluster)) {
            // A stale hint is no reason to stop serving.
            Some(Err(failure)) if !told => {
                output::note(format!("{}; other terminals see an old cluster.json", failure.message));
                told = true;
            }
            Some(Err(_)) => (),
            Some(Ok(())) | None => told = false,
        }
    }
}

/// The ports that the nodes had when they were made.
fn bind_kept(cluster: &ClusterFile, dir: &LocalDir) -> Result<Vec<Listeners>, Failure> {
    let bind = |node: &NodeEntry, what, address| {
        bind(&format!("{} port of node {}", what, node.label), address).map_err(|failure| Failure {
            message: format!(
                "{}. The local cluster in {} keeps its ports; `pontoon clean` gives it others, and \
                 removes its data",
                failure.message,
                dir.path().display()
            ),
            ..failure
        })
    };
    cluster
        .nodes
        .iter()
        .map(|node| {
            Ok(Listeners {
                client: bind(node, "client", node.client)?,
                peer: bind(node, "peer", node.peer)?,
                http: None,
            })
        })
        .collect()
}

/// Labels and free ports for new nodes.
fn choose_nodes(count: u32) -> Result<(ClusterFile, Vec<Listeners>), Failure> {
    let free = || {
        bind_free_port()
            .map_err(|error| Failure::usage("address", format!("no free port on 127.0.0.1: {error}")))
    };
    let mut nodes = Vec::new();
    let mut ports = Vec::new();
    for number in 1..=count {
        let (client, peer) = (free()?, free()?);
        nodes.push(NodeEntry {
            label: format!("n{number}"),
            client: bound_to(&client)?,
            peer: bound_to(&peer)?,
        });
        ports.push(Listeners { client, peer, http: None });
    }
    Ok((ClusterFile::new(nodes), ports))
}

fn all_settings(cluster: &ClusterFile, dir: &LocalDir) -> Vec<Settings> {
    let initial: Vec<String> = cluster.nodes.iter().map(|n| n.peer.to_string()).collect();
    cluster
        .nodes
        .iter()
        .map(|node| {
            Settings::for_local_node(
                dir.node_dir(&node.label),
                &node.label,
                node.client,
                node.peer,
                initial.clone(),
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(name: &str, replicas: u32, partitions: u32, nodes: Option<u32>) -> SetupArgs {
        SetupArgs { name: name.into(), replicas, partitions, nodes, detach: false, detached: false }
    }

    #[test]
    fn an_existing_cluster_answers_the_wish() {
        let (mut cluster, _ports) = choose_nodes(3).unwrap();
        cluster.databases.push(DatabaseEntry { name: "a".into(), replicas: 3, shards: 5 });
        let dir = LocalDir::new("/somewhere".into());
        let check = |wish: SetupArgs| check_against(&cluster, &wish, &dir).map_err(|f| f.exit);
        assert_eq!(check(wish("a", 3, 5, None)), Ok(()));
        assert_eq!(check(wish("a", 3, 5, Some(3))), Ok(()));
        assert_eq!(check(wish("b", 1, 9, None)), Ok(()));
        assert_eq!(check(wish("a", 3, 6, None)), Err(Exit::Negative));
        assert_eq!(check(wish("a", 1, 5, None)), Err(Exit::Negative));
        assert_eq!(check(wish("b", 5, 5, None)), Err(Exit::Usage));
        // Another database of the name comes first: both numbers are shown.
        assert_eq!(check(wish("a", 5, 5, None)), Err(Exit::Negative));
        assert_eq!(check(wish("a", 3, 6, Some(4))), Err(Exit::Negative));
        let failure = check_against(&cluster, &wish("b", 5, 5, None), &dir).unwrap_err();
        assert!(!failure.message.contains("--nodes"), "nodes can't be added by it: {failure}");
        assert_eq!(check(wish("b", 3, 5, Some(4))), Err(Exit::Usage));
    }

    #[test]
    fn both_numbers_are_shown() {
        let failure = check_numbers("a", (5, 8), (3, 4)).unwrap_err();
        for part in ["3 replicas and 4 shards", "5 replicas and 8 shards", "`a`"] {
            assert!(failure.message.contains(part), "{failure}");
        }
    }

    #[test]
    fn new_nodes_have_their_own_ports() {
        let (cluster, ports) = choose_nodes(3).unwrap();
        assert_eq!((cluster.nodes.len(), ports.len()), (3, 3));
        let mut all: Vec<_> = cluster.nodes.iter().flat_map(|n| [n.client, n.peer]).collect();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 6);
        let settings = all_settings(&cluster, &LocalDir::new("/d".into()));
        assert_eq!(settings[2].node.data_dir, std::path::Path::new("/d/nodes/n3"));
        assert!(settings.iter().all(|s| s.cluster.initial.len() == 3));
        // The same ports again while they are held: the failure names one of them.
        let failure = bind_kept(&cluster, &LocalDir::new("/d".into())).err().unwrap();
        assert!(failure.message.contains(&cluster.nodes[0].client.to_string()), "{failure}");
        assert_eq!(failure.exit, Exit::Usage);
    }
}
