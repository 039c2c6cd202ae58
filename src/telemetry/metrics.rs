//! Metrics: the names, in one table, and the recorder that renders them for Prometheus.
//!
//! The rest of the program uses the `metrics` macros with the names here, as
//! `metrics::counter!(REPLICA_RESTARTS).increment(1)`. Until [`install`] is called those do nothing and
//! cost next to nothing. A process has one recorder, whatever the number of its nodes.
//!
//! A macro looks its counter up by name at each event, under a lock. What is counted for each operation,
//! message or write is counted through the handles in [`super::hot`] instead.

use std::sync::OnceLock;
use std::time::Duration;

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use super::hot;
use crate::version;

/// What a metric counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows while the process lives.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Durations in seconds, in buckets.
    Histogram,
}

/// One metric.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// What it counts.
    pub kind: Kind,
    /// The names of its labels.
    pub labels: &'static [&'static str],
    /// What it means, with the unit.
    pub help: &'static str,
}

macro_rules! metrics_table {
    ($($constant:ident = $name:literal, $kind:ident, $labels:expr, $help:literal;)*) => {
        $(#[doc = $help] pub const $constant: &str = $name;)*

        /// Every metric there is.
        pub const METRICS: &[Metric] = &[$(Metric {
            name: $name,
            kind: Kind::$kind,
            labels: &$labels,
            help: $help,
        }),*];
    };
}

metrics_table! {
    BUILD_INFO = "pontoon_build_info", Gauge, ["version", "commit"],
        "Always 1; the labels tell the version and the commit of the program.";
    PROPOSALS = "pontoon_proposals_total", Counter, [],
        "Commands accepted by leaders on this node for the log.";
    READS = "pontoon_reads_total", Counter, [],
        "Linearizable reads accepted by leaders on this node.";
    READS_SERVED = "pontoon_reads_served_total", Counter, ["source"],
        "The same by where their value comes from: memory, or the state store by way of the read thread.";
    ENTRIES_PROPOSED = "pontoon_entries_proposed_total", Counter, [],
        "Log entries made by leaders on this node of the commands that waited; each holds one or many.";
    READIES = "pontoon_readies_total", Counter, [],
        "Passes over a replica in which raft had something to write, to send or to apply.";
    RAFT_MESSAGES = "pontoon_raft_messages_total", Counter, ["kind"],
        "Raft messages from replicas of this node to others, by kind.";
    REFUSALS = "pontoon_refusals_total", Counter, ["reason"],
        "Operations refused by replicas of this node, by reason.";
    LOG_SYNC_SECONDS = "pontoon_log_sync_seconds", Histogram, [],
        "Time to write one gathered batch of all groups to the raft log and sync it, in seconds.";
    LOG_ENTRIES = "pontoon_log_entries_total", Counter, [],
        "Entries made durable in the raft log.";
    LOG_WRITES = "pontoon_log_writes_total", Counter, [],
        "Appends to the raft log, each of which gathers writes of many groups behind one sync.";
    LOG_SYNCS = "pontoon_log_syncs_total", Counter, [],
        "Syncs of the raft log's files: one for each append, and a few when a file is begun or rewritten.";
    LOG_BYTES = "pontoon_log_bytes_total", Counter, [],
        "Bytes made durable in the raft log, about.";
    STATE_SYNCS = "pontoon_state_syncs_total", Counter, [],
        "Syncs of files and directories other than the raft log's: redo files, the state store, snapshots.";
    LOG_QUEUE_BYTES = "pontoon_log_queue_bytes", Gauge, [],
        "Bytes of entries that wait on this node, for their replica or for the raft log's disk.";
    APPENDS_DROPPED = "pontoon_appends_dropped_total", Counter, [],
        "Appends of leaders dropped because too much waited for the raft log; raft sends them again.";
    APPLY_ENTRIES = "pontoon_apply_entries_total", Counter, [],
        "Committed entries executed by replicas of this node.";
    REPLICAS = "pontoon_replicas", Gauge, [],
        "Replicas that run on this node.";
    REPLICAS_ASLEEP = "pontoon_replicas_asleep", Gauge, [],
        "Replicas on this node whose groups have nothing to do, and sleep.";
    LEADERS = "pontoon_leaders", Gauge, [],
        "Replicas on this node that lead their group.";
    LEADER_CHANGES = "pontoon_leader_changes_total", Counter, [],
        "Changes of leader that replicas of this node have seen.";
    REPLICA_RESTARTS = "pontoon_replica_restarts_total", Counter, [],
        "Replicas of this node that were rebuilt after a crash.";
    FLUSH_SECONDS = "pontoon_flush_seconds", Histogram, [],
        "Time of one round that moves frozen memtables into the state store, in seconds.";
    MEMTABLE_BYTES = "pontoon_memtable_bytes", Gauge, [],
        "Memtables of all replicas on this node, in bytes.";
    PAUSED_REPLICAS = "pontoon_paused_replicas", Gauge, [],
        "Replicas on this node that hold so much of that memory that they apply nothing for now.";
    KNOWN_BYTES = "pontoon_known_bytes", Gauge, [],
        "What is known of the state store on this node without asking it, in bytes: what memtables leave of their bound.";
    SESSIONS = "pontoon_sessions", Gauge, [],
        "Clients' sessions that the shards of this node remember, counted for each replica.";
    CACHED_ENTRY_BYTES = "pontoon_cached_entry_bytes", Gauge, [],
        "Log entries in memory of all replicas on this node, in bytes.";
    SNAPSHOTS_MADE = "pontoon_snapshots_made_total", Counter, [],
        "Snapshot files made of shards on this node.";
    SNAPSHOTS_SENT = "pontoon_snapshots_sent_total", Counter, [],
        "Snapshots that were brought to a replica on another node and installed there.";
    SNAPSHOTS_INSTALLED = "pontoon_snapshots_installed_total", Counter, [],
        "Snapshots that were received and installed on this node.";
    SNAPSHOTS_RESUMED = "pontoon_snapshots_resumed_total", Counter, [],
        "Transfers of a snapshot from this node that went on where an earlier one was cut.";
    SNAPSHOTS_FAILED = "pontoon_snapshots_failed_total", Counter, ["step"],
        "Snapshots that could not be made, sent or installed on this node; another one follows if it is needed still.";
    SNAPSHOTS_OUTRUN = "pontoon_snapshots_outrun_total", Counter, [],
        "Snapshots from this node that came to nothing, because more was written meanwhile than it keeps of the log: others follow.";
    HELD_LOG_BYTES = "pontoon_held_log_bytes", Gauge, [],
        "Raft log that leaders on this node keep for replicas on their way back by a snapshot, in bytes.";
    STATES_LOST = "pontoon_states_lost_total", Counter, [],
        "Replicas of this node that were started without their state, because it was lost.";
    STATES_REFETCHED = "pontoon_states_refetched_total", Counter, [],
        "Replicas of this node that got a state from their leader in place of a lost one.";
    PEER_SENT_FRAMES = "pontoon_peer_sent_frames_total", Counter, ["lane"],
        "Frames sent to other nodes, by class of connection.";
    PEER_SENT_MESSAGES = "pontoon_peer_sent_messages_total", Counter, ["lane"],
        "Raft messages sent to other nodes.";
    PEER_SENT_BYTES = "pontoon_peer_sent_bytes_total", Counter, ["lane"],
        "Bytes sent to other nodes.";
    PEER_RECEIVED_FRAMES = "pontoon_peer_received_frames_total", Counter, ["lane"],
        "Frames received from other nodes.";
    PEER_RECEIVED_MESSAGES = "pontoon_peer_received_messages_total", Counter, ["lane"],
        "Raft messages received from other nodes.";
    PEER_RECEIVED_BYTES = "pontoon_peer_received_bytes_total", Counter, ["lane"],
        "Bytes received from other nodes.";
    PEER_MESSAGES_DROPPED = "pontoon_peer_messages_dropped_total", Counter, ["lane", "why"],
        "Raft messages that never left this node; raft sends them again.";
    PEER_DROPPED = "pontoon_peer_dropped_total", Counter, [],
        "Raft messages that arrived while their replica's mailbox was full; raft sends them again.";
    PEER_RECONNECTS = "pontoon_peer_reconnects_total", Counter, ["lane"],
        "Connections to other nodes made anew after one was lost.";
    PEER_CONNECTIONS = "pontoon_peer_connections", Gauge, [],
        "Connections from other nodes.";
    PEER_MALFORMED = "pontoon_peer_malformed_total", Counter, [],
        "Peer connections closed because of what came over them.";
    PEER_FOREIGN = "pontoon_peer_foreign_total", Counter, [],
        "Connections to the peer port that don't begin as a node's; told that it is no port for clients.";
    PEER_REFUSED = "pontoon_peer_refused_total", Counter, [],
        "Peer connections refused at their greeting.";
    MOVES = "pontoon_moves", Gauge, [],
        "Shards of the cluster whose members are being changed, as this node knows.";
    MOVES_ENDED = "pontoon_moves_ended_total", Counter, ["outcome"],
        "Changes of a shard's members that this node has seen to their end as the one that leads the metadata shard: done, or rolled_back.";
    RECONCILER_STEPS = "pontoon_reconciler_steps_total", Counter, ["outcome"],
        "Commands and orders by which this node, leading the metadata shard, brings the cluster to what it should be: done, refused, or failed.";
    SNAPSHOT_SENT_BYTES = "pontoon_snapshot_sent_bytes_total", Counter, [],
        "Bytes that this node has sent in snapshots, of what their files hold.";
    MAP_VERSION = "pontoon_map_version", Gauge, [],
        "Version of the cluster map that this node knows.";
    DISK_BYTES = "pontoon_disk_bytes", Gauge, [],
        "Size of the data directory as last measured, in bytes.";
    DISK_FREE_BYTES = "pontoon_disk_free_bytes", Gauge, [],
        "Free space of the data directory's file system, in bytes.";
    READ_ONLY = "pontoon_read_only", Gauge, [],
        "1 while that is below the reserve and the node takes no new values, else 0.";
    LOG_STALLS = "pontoon_log_stalls_total", Counter, [],
        "Writes of the raft log that took so long that leaders of this node handed over.";
}

/// Upper bounds of the buckets of all histograms, in seconds: from a fast disk's sync to a stall.
const SECONDS_BUCKETS: &[f64] =
    &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

/// Samples of histograms are gathered in memory and folded into buckets at this pace.
const UPKEEP: Duration = Duration::from_secs(5);

/// Why there are no metrics.
#[derive(Debug, Clone, thiserror::Error)]
pub enum MetricsError {
    /// Another recorder is in place.
    #[error("this process records its metrics elsewhere already")]
    Taken,
    /// The recorder can't be built, or its thread can't be started.
    #[error("metrics can't be recorded: {0}")]
    Recorder(String),
}

/// Installs the recorder for this process. Further calls give the same.
///
/// # Errors
/// Another recorder is in place, or a thread can't be started; the same at each further call.
pub fn install() -> Result<PrometheusHandle, MetricsError> {
    static RECORDER: OnceLock<Result<PrometheusHandle, MetricsError>> = OnceLock::new();
    RECORDER.get_or_init(install_once).clone()
}

fn install_once() -> Result<PrometheusHandle, MetricsError> {
    let recorder = builder().map_err(|error| MetricsError::Recorder(error.to_string()))?.build_recorder();
    let handle = recorder.handle();
    // Before the recorder is in place: without upkeep, samples would pile up in memory until
    // somebody asks for the page.
    let upkeep = handle.clone();
    std::thread::Builder::new()
        .name("metrics".into())
        .spawn(move || {
            loop {
                std::thread::sleep(UPKEEP);
                upkeep.run_upkeep();
            }
        })
        .map_err(|error| MetricsError::Recorder(error.to_string()))?;
    metrics::set_global_recorder(recorder).map_err(|_| MetricsError::Taken)?;
    describe();
    hot::bind();
    Ok(handle)
}

fn builder() -> Result<PrometheusBuilder, BuildError> {
    PrometheusBuilder::new().set_buckets_for_metric(Matcher::Suffix("_seconds".into()), SECONDS_BUCKETS)
}

/// Tells the recorder in force the meaning of every metric.
fn describe() {
    for metric in METRICS {
        match metric.kind {
            Kind::Counter => metrics::describe_counter!(metric.name, metric.help),
            Kind::Gauge => metrics::describe_gauge!(metric.name, metric.help),
            Kind::Histogram => metrics::describe_histogram!(metric.name, metric.help),
        }
    }
    // A counter that shows only once it has counted hides its first event from whoever watches its rise.
    for metric in METRICS.iter().filter(|metric| metric.kind == Kind::Counter && metric.labels.is_empty()) {
        metrics::counter!(metric.name).increment(0);
    }
    metrics::gauge!(BUILD_INFO, "version" => version::SOFTWARE, "commit" => version::COMMIT).set(1.0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    /// Names in a page, with HELP and TYPE and the number of samples. Fails on what isn't the
    /// Prometheus text format.
    fn parse(page: &str) -> BTreeMap<String, (String, String, usize)> {
        let mut metrics: BTreeMap<String, (String, String, usize)> = BTreeMap::new();
        for line in page.lines().filter(|line| !line.is_empty()) {
            if let Some(comment) = line.strip_prefix("# ") {
                let mut words = comment.splitn(3, ' ');
                let (what, name) = (words.next().unwrap(), words.next().unwrap());
                let rest = words.next().unwrap_or_default().to_owned();
                let entry = metrics.entry(name.into()).or_default();
                match what {
                    "HELP" => entry.0 = rest,
                    "TYPE" => entry.1 = rest,
                    _ => panic!("{line}"),
                }
                continue;
            }
            let (series, value) = line.rsplit_once(' ').expect(line);
            value.parse::<f64>().expect(line);
            let (name, labels) = match series.split_once('{') {
                Some((name, labels)) => (name, labels.strip_suffix('}').expect(line)),
                None => (series, ""),
            };
            for label in labels.split(',').filter(|label| !label.is_empty()) {
                let (_, value) = label.split_once('=').expect(line);
                assert!(value.starts_with('"') && value.ends_with('"'), "{line}");
            }
            let base = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|suffix| name.strip_suffix(suffix))
                .unwrap_or(name);
            metrics.get_mut(base).expect(line).2 += 1;
        }
        metrics
    }

    #[test]
    fn every_metric_is_described_and_the_page_parses() {
        let recorder = builder().unwrap().build_recorder();
        metrics::with_local_recorder(&recorder, || {
            describe();
            for metric in METRICS {
                let labels: Vec<_> = metric.labels.iter().map(|l| (*l, "a\"b")).collect();
                match metric.kind {
                    Kind::Counter => metrics::counter!(metric.name, &labels).increment(3),
                    Kind::Gauge => metrics::gauge!(metric.name, &labels).set(2.5),
                    Kind::Histogram => metrics::histogram!(metric.name, &labels).record(0.02),
                }
            }
        });
        let page = recorder.handle().render();
        let parsed = parse(&page);
        assert_eq!(parsed.len(), METRICS.len(), "{page}");
        for metric in METRICS {
            let (help, kind, samples) = &parsed[metric.name];
            assert_eq!(help, metric.help);
            let expected = match metric.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Histogram => "histogram",
            };
            assert_eq!(kind, expected, "{}", metric.name);
            assert!(*samples > 0, "{}", metric.name);
        }
        assert!(page.contains("pontoon_log_sync_seconds_bucket{le=\"0.025\"} 1"), "{page}");
        assert!(page.contains("pontoon_log_sync_seconds_bucket{le=\"0.01\"} 0"), "{page}");
    }

    #[test]
    fn counters_are_there_before_they_count() {
        let recorder = builder().unwrap().build_recorder();
        metrics::with_local_recorder(&recorder, describe);
        let page = recorder.handle().render();
        for name in [REPLICA_RESTARTS, PEER_MALFORMED, LEADER_CHANGES] {
            assert!(page.contains(&format!("\n{name} 0\n")), "{name}: {page}");
        }
    }

    #[test]
    fn names_follow_the_conventions() {
        let names: BTreeSet<_> = METRICS.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), METRICS.len(), "a name twice");
        for metric in METRICS {
            assert!(metric.name.starts_with("pontoon_"), "{}", metric.name);
            let counter = metric.name.ends_with("_total");
            assert_eq!(counter, metric.kind == Kind::Counter, "{}", metric.name);
            let seconds = metric.name.ends_with("_seconds");
            assert_eq!(seconds, metric.kind == Kind::Histogram, "{}", metric.name);
            assert!(metric.help.len() > 10 && metric.help.ends_with('.'), "{}", metric.name);
        }
    }

    #[test]
    fn installing_twice_gives_the_same_page() {
        let first = install().unwrap();
        let second = install().unwrap();
        metrics::gauge!(MAP_VERSION).set(41.0);
        assert!(first.render().contains("pontoon_map_version 41"));
        assert!(second.render().contains("pontoon_map_version 41"));
        assert!(first.render().contains("pontoon_build_info{"));
    }
}
