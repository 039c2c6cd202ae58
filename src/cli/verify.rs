//! `test leader-failure N` and `test replication N`: what becomes of a fresh cluster and its data
//! when the leader is killed.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::{Value, json};

use super::args::TestCommand;
use super::context::{Context, Session, block_on};
use super::failure::{Exit, Failure};
use super::output;
use super::serve::until_stopped;
use super::signals::Signals;
use super::trial::Trial;
use crate::client::Client;
use crate::limits::REPLICAS_MAX;
use crate::node::handle::NodeReport;
use crate::placement::map::{ClusterMap, ShardRecord};

/// Time for a whole test where none is given.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Fewest nodes of which a majority is left when one dies.
const NODES_MIN: u32 = 3;

/// How often nodes are asked for the leader they know, and how long one may take to answer.
const POLL: Duration = Duration::from_millis(25);
const REPORT_TIMEOUT: Duration = Duration::from_secs(2);

const DATABASE: &str = "test";
const KEY: &str = "testkey";
const VALUE: &str = "testval";

/// Which test.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    LeaderFailure,
    Replication,
}

/// What is told while a test runs, and the object that `--json` prints at its end.
struct Protocol {
    json: bool,
    began: Instant,
    object: Value,
}

/// `test ...`
pub fn test(context: &Context, command: &TestCommand) -> Result<Exit, Failure> {
    let (kind, nodes) = match command {
        TestCommand::LeaderFailure(args) => (Kind::LeaderFailure, args.nodes),
        TestCommand::Replication(args) => (Kind::Replication, args.nodes),
    };
    check_nodes(nodes)?;
    let signals = Signals::listen(None)?;
    let deadline = Instant::now() + context.timeout_or(TIMEOUT);
    let mut protocol = Protocol::new(context.json(), kind, nodes);
    block_on(async {
        let start = Trial::start(nodes, left(deadline));
        let Some(trial) = until_stopped(&signals, start).await else {
            return Err(stopped());
        };
        let mut trial = trial?;
        let run = run(kind, &mut trial, deadline, &mut protocol);
        let result = until_stopped(&signals, run).await.unwrap_or_else(|| Err(stopped()));
        let result = result.map_err(|failure| {
            if !signals.is_stopped() {
                // Before the nodes are gone: what they had to say.
                output::note(trial.tails());
            }
            // Whatever it was that didn't come about: the test has failed.
            Failure {
                message: format!("the test failed: {}", failure.message),
                ..Failure::negative("test_failed", "")
            }
        });
        let mut closed = Vec::new();
        trial.close(|host| closed.push(host.to_owned())).await;
        for host in &closed {
            protocol.timed(&format!("Closed server at {host}"))?;
        }
        protocol.object["closed"] = closed.into();
        protocol.object["passed"] = result.is_ok().into();
        protocol.end(kind, result)
    })
}

fn check_nodes(nodes: u32) -> Result<(), Failure> {
    if nodes < NODES_MIN {
        return Err(Failure::usage(
            "too_few_nodes",
            format!(
                "{} can't stand the loss of one: a majority of the replicas must live to elect a \
                 leader, and {nodes} less one is no majority of {nodes}; use at least {NODES_MIN}",
                output::count(nodes, "node")
            ),
        ));
    }
    if nodes > REPLICAS_MAX {
        return Err(Failure::usage(
            "too_many_nodes",
            format!(
                "each node of the test holds a replica of its shard, and a shard has at most \
                 {REPLICAS_MAX}; {nodes} nodes are too many"
            ),
        ));
    }
    Ok(())
}

fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
}

fn stopped() -> Failure {
    Failure::negative("stopped", "stopped before the test was done")
}

async fn run(
    kind: Kind,
    trial: &mut Trial,
    deadline: Instant,
    protocol: &mut Protocol,
) -> Result<(), Failure> {
    let nodes = trial.hosts().len() as u32;
    let session = Session::open(trial.hosts(), left(deadline)).await?;
    let client = &session.client;
    let result = async {
        client.create_database(DATABASE, nodes, 1, left(deadline)).await?;
        match kind {
            Kind::LeaderFailure => leader_failure(client, trial, deadline, protocol).await,
            Kind::Replication => replication(client, trial, deadline, protocol).await,
        }
    }
    .await;
    client.close().await;
    result
}

async fn leader_failure(
    client: &Client,
    trial: &mut Trial,
    deadline: Instant,
    protocol: &mut Protocol,
) -> Result<(), Failure> {
    let leader = agreed_leader(client, &trial.hosts(), None, deadline).await?;
    protocol.leaders("initial leader", "initial", &trial.hosts(), &leader)?;
    protocol.timed(&format!("Crashing leader at {leader}"))?;
    protocol.object["crashed"] = leader.as_str().into();
    trial.crash(&leader).await?;
    let killed = Instant::now();
    let successor = agreed_leader(client, &trial.hosts(), Some(&leader), deadline).await?;
    protocol.object["reelection_ms"] = (killed.elapsed().as_millis() as u64).into();
    protocol.leaders("after reelection", "after", &trial.hosts(), &successor)
}

async fn replication(
    client: &Client,
    trial: &mut Trial,
    deadline: Instant,
    protocol: &mut Protocol,
) -> Result<(), Failure> {
    let leader = agreed_leader(client, &trial.hosts(), None, deadline).await?;
    protocol.leaders("initial leader", "initial", &trial.hosts(), &leader)?;
    protocol.timed(&format!("Adding a {KEY} with {VALUE} to the cluster .."))?;
    let database = client.database(DATABASE);
    database.with_timeout(left(deadline)).put(KEY, VALUE).await?;
    // It may have moved meanwhile; the one that acknowledged is the one to kill.
    let leader = agreed_leader(client, &trial.hosts(), None, deadline).await?;
    protocol.timed("Crashing leader to trigger a reelection ..")?;
    protocol.timed(&format!("Crashing leader at {leader}"))?;
    protocol.object["crashed"] = leader.as_str().into();
    trial.crash(&leader).await?;
    let killed = Instant::now();
    protocol.timed(&format!("Polling the cluster for {KEY} .."))?;
    let found = database.with_timeout(left(deadline)).get(KEY).await?;
    protocol.object["recovery_ms"] = (killed.elapsed().as_millis() as u64).into();
    let successor = agreed_leader(client, &trial.hosts(), Some(&leader), deadline).await?;
    protocol.leaders("after reelection", "after", &trial.hosts(), &successor)?;
    let text = found.map_or("nothing".to_owned(), |found| output::printable(&found.value));
    protocol.object["returned"] = text.as_str().into();
    if text == VALUE {
        Ok(())
    } else {
        Err(Failure::negative("test_failed", format!("the cluster returned {text} instead of {VALUE}")))
    }
}

/// Asks each of `hosts`, by itself, for the leader it knows, until all name the same one, and not
/// `dead`.
async fn agreed_leader(
    client: &Client,
    hosts: &[String],
    dead: Option<&str>,
    deadline: Instant,
) -> Result<String, Failure> {
    loop {
        let map = client.map().await?;
        let shard = map
            .database(DATABASE)
            .and_then(|db| map.shards.get(db.shards.first()?))
            .ok_or_else(|| Failure::internal("the cluster has no shard for the test"))?;
        let timeout = REPORT_TIMEOUT.min(left(deadline));
        let known = join_all(hosts.iter().map(async |host| {
            let report = client.node_report(host, timeout).await.ok()?;
            known_leader(&map, shard, &report)
        }))
        .await;
        if let Some(Some(first)) = known.first()
            && Some(first.as_str()) != dead
            && known.iter().all(|leader| leader.as_ref() == Some(first))
        {
            return Ok(first.clone());
        }
        if Instant::now() >= deadline {
            let views: Vec<String> = hosts
                .iter()
                .zip(&known)
                .map(|(host, leader)| match leader {
                    Some(leader) => format!("{host} knows {leader}"),
                    None => format!("{host} knows none"),
                })
                .collect();
            return Err(Failure::unavailable(format!(
                "the nodes did not agree on a living leader in time: {}",
                views.join(", ")
            )));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Client address of the leader that a node knows for a shard.
fn known_leader(map: &ClusterMap, shard: &ShardRecord, report: &NodeReport) -> Option<String> {
    let replica = report.replicas.iter().find(|r| r.shard == shard.id)?;
    let leader = replica.group.as_ref()?.leader?;
    let node = map.nodes.get(&shard.node_of(leader)?)?;
    Some(node.client_address.clone())
}

impl Protocol {
    fn new(json: bool, kind: Kind, nodes: u32) -> Protocol {
        let name = match kind {
            Kind::LeaderFailure => "leader-failure",
            Kind::Replication => "replication",
        };
        Protocol {
            json,
            began: Instant::now(),
            object: json!({"test": name, "nodes": nodes, "passed": false}),
        }
    }

    /// A line of the report: with `--json` stdout is for the object.
    fn line(&self, text: &str) -> Result<(), Failure> {
        if self.json {
            output::note(text);
            Ok(())
        } else {
            output::line(text)
        }
    }

    /// A line with the time since the test began.
    fn timed(&self, text: &str) -> Result<(), Failure> {
        self.line(&format!("{text} ({:.2} s)", self.began.elapsed().as_secs_f64()))
    }

    /// A line for each node on the leader it knows.
    fn leaders(&mut self, when: &str, field: &str, hosts: &[String], leader: &str) -> Result<(), Failure> {
        for host in hosts {
            self.timed(&format!("At host {host}, {when} {leader}"))?;
        }
        let views = hosts.iter().map(|host| json!({"host": host, "leader": leader}));
        self.object[field] = views.collect();
        Ok(())
    }

    /// The last line, or the object.
    fn end(mut self, kind: Kind, result: Result<(), Failure>) -> Result<Exit, Failure> {
        self.object["seconds"] = self.began.elapsed().as_secs_f64().into();
        if kind == Kind::Replication
            && let Some(returned) = self.object["returned"].as_str()
        {
            self.line(&format!("The cluster returned (which should be '{VALUE}'): {returned}"))?;
        } else if kind == Kind::LeaderFailure && result.is_ok() {
            self.timed("Leader reelection test is done")?;
        }
        if self.json {
            output::json(&self.object)?;
        }
        result.map(|()| Exit::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_few_and_too_many_nodes_are_a_mistake_of_usage() {
        for (nodes, ok) in [(0, false), (1, false), (2, false), (3, true), (7, true), (8, false)] {
            let checked = check_nodes(nodes);
            assert_eq!(checked.is_ok(), ok, "{nodes}");
            if let Err(failure) = checked {
                assert_eq!(failure.exit, Exit::Usage);
                let why = if nodes < 3 { "majority" } else { "at most 7" };
                assert!(failure.message.contains(why), "{failure}");
            }
        }
    }
}
