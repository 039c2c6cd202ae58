//! What the nodes do for one operation: their counters before and after, divided by the operations between.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::{Map, Value, json};

use crate::cli::failure::Failure;
use crate::cli::output;
use crate::client::{Client, ClientError};
use crate::ids::NodeId;
use crate::placement::map::Standing;
use crate::telemetry::counters::Counters;
use crate::telemetry::{metrics as names, process};

/// What is told of an operation: its name with `--json`, what it is, and the counters that are summed for it.
const FIGURES: &[(&str, &str, &[&str])] = &[
    ("fsyncs", "syncs of files", &[names::LOG_SYNCS, names::STATE_SYNCS]),
    ("log_fsyncs", "of them, of the raft log", &[names::LOG_SYNCS]),
    ("log_writes", "writes of the raft log", &[names::LOG_WRITES]),
    ("log_entries", "entries in them", &[names::LOG_ENTRIES]),
    ("log_bytes", "bytes in them", &[names::LOG_BYTES]),
    ("commands", "commands proposed", &[names::PROPOSALS]),
    ("entries", "entries made of them", &[names::ENTRIES_PROPOSED]),
    ("entries_applied", "entries executed", &[names::APPLY_ENTRIES]),
    ("readies", "readies of raft", &[names::READIES]),
    ("messages", "raft messages between nodes", &[names::RAFT_MESSAGES]),
    ("frames", "frames that carry them", &[names::PEER_SENT_FRAMES]),
    ("peer_bytes", "bytes of these", &[names::PEER_SENT_BYTES]),
    ("reads", "linearizable reads", &[names::READS]),
    ("read_calls", "system calls that read", &[process::READ_CALLS]),
    ("write_calls", "system calls that write", &[process::WRITE_CALLS]),
    ("switches_voluntary", "context switches: to wait", &[process::SWITCHES_VOLUNTARY]),
    ("switches_forced", "context switches: forced", &[process::SWITCHES_FORCED]),
    ("server_cpu_us", "µs of processor, all nodes", &[process::CPU_US]),
];

/// The same for the load generator itself.
const OWN: &[(&str, &str, &[&str])] = &[
    ("client_cpu_us", "µs of processor, this process", &[process::CPU_US]),
    ("client_read_calls", "its system calls that read", &[process::READ_CALLS]),
    ("client_write_calls", "its system calls that write", &[process::WRITE_CALLS]),
    ("client_switches", "its context switches", &[process::SWITCHES_VOLUNTARY, process::SWITCHES_FORCED]),
];

/// What is told apart by one label: its name with `--json`, and of which counter.
const PARTS: &[(&str, &str, &str)] = &[
    ("messages_by_kind", "raft messages", names::RAFT_MESSAGES),
    ("reads_by_source", "reads answered from", names::READS_SERVED),
    ("frames_by_lane", "frames", names::PEER_SENT_FRAMES),
    ("server_cpu_us_by_thread", "µs of processor of threads", process::CPU_US),
];

/// What isn't counted, and why.
const NOT_COUNTED: &str =
    "allocations: counting them takes an allocator of unsafe code, which this program has none of";

/// Looks at the counters of all nodes, before and after.
pub(super) struct Looks<'a> {
    client: &'a Client,
    nodes: BTreeMap<NodeId, String>,
    timeout: Duration,
    before: RefCell<Option<Look>>,
}

/// The counters of all processes at one time.
struct Look {
    /// By process: nodes may share one.
    processes: BTreeMap<u64, Counters>,
    own: Counters,
    silent: Vec<String>,
}

/// What was counted between two looks.
#[derive(Debug)]
pub(super) struct Explained {
    /// Of all processes that were there at both looks.
    servers: Counters,
    processes: usize,
    own: Counters,
    /// Bytes resident in all of them, at the end.
    resident: f64,
    /// What is missing; for a person.
    missing: Vec<String>,
}

impl<'a> Looks<'a> {
    /// At the nodes of the client's cluster.
    pub(super) async fn at_nodes(client: &'a Client, timeout: Duration) -> Result<Looks<'a>, ClientError> {
        let map = client.map().await?;
        // The map remembers those that were removed, for ever.
        let there = map.nodes.values().filter(|node| node.standing != Standing::Removed);
        let nodes = there.map(|node| (node.id, node.client_address.clone())).collect();
        Ok(Looks { client, nodes, timeout, before: RefCell::default() })
    }

    /// The first look.
    pub(super) async fn begin(&self) {
        let look = self.look().await;
        *self.before.borrow_mut() = Some(look);
    }

    /// The second look, and what was counted since the first.
    pub(super) async fn end(self) -> Result<Explained, Failure> {
        let after = self.look().await;
        match self.before.into_inner() {
            Some(before) => Ok(explain(before, after)),
            None => Err(Failure::negative("stopped", "stopped before anything was counted")),
        }
    }

    async fn look(&self) -> Look {
        let ask = |(node, address): (&NodeId, &String)| {
            let (node, address) = (*node, address.clone());
            async move {
                let counters = self.client.node_counters(&address, self.timeout).await;
                counters.map_err(|error| format!("node {node} doesn't tell: {error}"))
            }
        };
        // Before they answer: one that doesn't may take longer than the whole measurement.
        let own = own();
        let answers = join_all(self.nodes.iter().map(ask)).await;
        let mut look = Look { processes: BTreeMap::new(), own, silent: Vec::new() };
        for answer in answers {
            match answer {
                Ok(counters) => drop(look.processes.insert(counters.process, counters)),
                Err(why) => look.silent.push(why),
            }
        }
        look
    }
}

/// The load generator's own counters. `/proc` answers from memory, so nobody is held up.
fn own() -> Counters {
    Counters { process: 0, values: process::counters() }
}

fn explain(before: Look, after: Look) -> Explained {
    let mut missing = after.silent;
    missing.extend(before.silent);
    missing.sort();
    missing.dedup();
    let (mut servers, mut processes, mut resident) = (Counters::default(), 0, 0.0);
    for (process, counters) in &after.processes {
        let Some(then) = before.processes.get(process) else {
            missing.push("a process began while it was measured: its part is missing".into());
            continue;
        };
        processes += 1;
        resident += counters.get(process::RESIDENT_BYTES).unwrap_or(0.0);
        for (name, value) in counters.since(then).values {
            *servers.values.entry(name).or_insert(0.0) += value;
        }
    }
    Explained { servers, processes, own: after.own.since(&before.own), resident, missing }
}

/// The sum of some counters for one operation; `None`: none of them is known, or there was no operation.
fn figure(counters: &Counters, of: &[&str], operations: u64) -> Option<f64> {
    let known: Vec<f64> = of.iter().filter_map(|name| counters.get(name)).collect();
    (!known.is_empty() && operations > 0).then(|| known.iter().sum::<f64>() / operations as f64)
}

impl Explained {
    fn figures(&self, operations: u64) -> impl Iterator<Item = (&'static str, &'static str, Option<f64>)> {
        let servers =
            FIGURES.iter().map(move |(name, what, of)| (*name, *what, figure(&self.servers, of, operations)));
        let own = OWN.iter().map(move |(name, what, of)| (*name, *what, figure(&self.own, of, operations)));
        servers.chain(own)
    }

    fn parts(&self, counter: &str, operations: u64) -> Vec<(String, f64)> {
        let each = |(part, value): (String, f64)| (part, value / operations.max(1) as f64);
        let parts = self.servers.labelled(counter).into_iter().filter(|(_, value)| *value > 0.0);
        let mut parts: Vec<_> = parts.map(each).collect();
        parts.sort_by(|(_, a), (_, b)| b.total_cmp(a));
        parts
    }

    /// For programs.
    pub(super) fn json(&self, operations: u64) -> Value {
        let rounded = |value: f64| (value * 10_000.0).round() / 10_000.0;
        let mut each = Map::new();
        for (name, _, value) in self.figures(operations) {
            each.insert(name.into(), value.map(rounded).into());
        }
        for (name, _, counter) in PARTS {
            let parts = self.parts(counter, operations).into_iter();
            each.insert(
                (*name).into(),
                parts.map(|(part, value)| (part, rounded(value).into())).collect::<Map<_, _>>().into(),
            );
        }
        json!({
            "processes": self.processes,
            "per_operation": each,
            "resident_bytes": self.resident as u64,
            "missing": self.missing,
            "not_counted": [NOT_COUNTED],
        })
    }

    /// For people.
    pub(super) fn print(&self, operations: u64) -> Result<(), Failure> {
        for why in &self.missing {
            output::note(why);
        }
        let mut table = output::table(&["for one operation", "", "in parts"]);
        for (name, what, value) in self.figures(operations) {
            // Counters that stand still are of another workload.
            if value.is_none_or(|value| value == 0.0) {
                continue;
            }
            let of = PARTS
                .iter()
                .find(|(part, ..)| part.strip_prefix(name).is_some_and(|rest| rest.starts_with("_by_")));
            let parts = of.map_or_else(Vec::new, |(.., counter)| self.parts(counter, operations));
            let parts: Vec<String> =
                parts.iter().take(5).map(|(part, value)| format!("{part} {}", shown(*value))).collect();
            table.add_row([what.to_owned(), value.map_or_else(String::new, shown), parts.join(", ")]);
        }
        output::line(table.to_string())?;
        let (processes, resident) = (self.processes, output::size(self.resident as u64));
        output::line(format!("{processes} server processes, {resident} resident. Not counted: {NOT_COUNTED}"))
    }
}

fn shown(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters(process: u64, values: &[(&str, f64)]) -> Counters {
        Counters {
            process,
            values: values.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect(),
        }
    }

    fn look(processes: Vec<Counters>, own: f64, silent: &[&str]) -> Look {
        Look {
            processes: processes.into_iter().map(|counters| (counters.process, counters)).collect(),
            own: counters(0, &[(process::CPU_US, own)]),
            silent: silent.iter().map(|why| (*why).to_owned()).collect(),
        }
    }

    #[test]
    fn counters_of_all_processes_are_summed_and_divided() {
        let at = |process, syncs, state, append| {
            counters(
                process,
                &[
                    (names::LOG_SYNCS, syncs),
                    (names::STATE_SYNCS, state),
                    ("pontoon_raft_messages_total{kind=\"append\"}", append),
                    (process::RESIDENT_BYTES, 100.0),
                ],
            )
        };
        let before = look(vec![at(1, 10.0, 0.0, 5.0), at(2, 20.0, 0.0, 0.0)], 1_000.0, &[]);
        // One process was there at the end alone: since when it counts isn't known.
        let after = look(
            vec![at(1, 40.0, 5.0, 25.0), at(2, 30.0, 0.0, 20.0), at(3, 7.0, 0.0, 0.0)],
            5_000.0,
            &["node 9"],
        );
        let explained = explain(before, after);
        assert_eq!((explained.processes, explained.resident), (2, 200.0));
        assert_eq!(explained.missing.len(), 2, "{:?}", explained.missing);
        let json = explained.json(20);
        let each = &json["per_operation"];
        assert_eq!((&each["fsyncs"], &each["log_fsyncs"]), (&json!(2.25), &json!(2.0)));
        assert_eq!(each["messages_by_kind"], json!({"append": 2.0}));
        assert_eq!((&each["messages"], &each["client_cpu_us"]), (&json!(2.0), &json!(200.0)));
        assert_eq!(each["readies"], Value::Null, "nobody counts them");
        assert!(explained.json(0)["per_operation"]["fsyncs"].is_null(), "no operation, no figure");
    }

    #[test]
    fn names_of_figures_are_told_apart() {
        let names: std::collections::BTreeSet<_> = FIGURES
            .iter()
            .chain(OWN)
            .map(|(name, ..)| name)
            .chain(PARTS.iter().map(|(name, ..)| name))
            .collect();
        assert_eq!(names.len(), FIGURES.len() + OWN.len() + PARTS.len());
    }
}
