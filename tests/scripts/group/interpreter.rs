//! Commands of the `group` scripts: one shard of real groups, whose messages, disk writes and time move
//! only when the script says so. Nodes and replicas have the same numbers. Nothing is pumped twice
//! unless there is more to do, and what comes out is printed in the order of the effects: leadership,
//! messages, the log write, ends of operations, a fetch.
//!
//! | command | does |
//! |---|---|
//! | `group [voters=3] [keep=BYTES] [held=BYTES] [sleep=TICKS]` | makes the group, which keeps so much log for a silent follower (unbounded), and half of the other number behind snapshots (unbounded), and goes to sleep after so many ticks (never); begins a script, or begins anew |
//! | `campaign N`, `transfer N M` | begins an election; hands leadership over |
//! | `elect N` | the same as `campaign`, then settles |
//! | `create N` | makes node N with a newcomer, which knows no members |
//! | `learners N R… [conf=C] [brief=yes]` | asks node N to add learners; for conf version C, else the one it is at; brief: settles |
//! | `exchange N [promote=R,…] [remove=R,…] [conf=C]` | asks for a joint change |
//! | `drop-learners N R… [conf=C]` | asks it to remove learners |
//! | `members [N]`, `followers N` | the members as applied at each node, or at N, and as recorded in its log; how far the others are |
//! | `destroy N` | the replica is gone for good |
//! | `put N KEY VALUE [pump=no] [brief=yes]`, `get N KEY [pump=no] [brief=yes]` | asks node N; operations are numbered #1, #2, … |
//! | `put … session=BYTE seq=N [acked=N] [open=MS]` | the same as a command of a session |
//! | `sessions N` | time and content of N's session table |
//! | `pump N` | does what inputs asked for |
//! | `deliver [to=N] [brief=yes]` | delivers the messages under way, in order, then pumps the receivers |
//! | `lose`, `unreachable N R` | drops the messages under way; N is told that R can't be reached |
//! | `persist N` | all log writes of N are durable |
//! | `fetch N` | reads the log entries that N asked for |
//! | `flush N` | makes N's state durable and drops the log entries that nobody needs |
//! | `compact N` | drops the log entries that nobody needs now |
//! | `make N` | N makes the snapshot that it was asked for, of its durable state |
//! | `bring N [lost=yes]` | that is installed where it is needed, or lost, and N is told |
//! | `beat N` | the others hear a heartbeat of node N |
//! | `gone N M` | node N finds that the present process of node M, or its last, is gone, whether or not it is |
//! | `rest` | who is asleep |
//! | `tick N COUNT [brief=yes]` | time passes at N; for `all`, at everybody. Brief: as `settle` prints |
//! | `pause N`, `resume N` | applying stops for want of memory |
//! | `cut N`, `heal` | N can't be reached nor reach others |
//! | `crash N`, `restart N [pump=no]` | writes that are not durable are lost |
//! | `forget N` | the state store of N, which is down, is gone |
//! | `settle` | delivers, persists and fetches until nothing moves; prints only who leads and ends of operations |
//! | `status` | where each replica stands |

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::ops::Bound;
use std::sync::Arc;

use pontoon::codec::GroupMessage;
use pontoon::group::catch_up::Retention;
use pontoon::group::driver::Group;
use pontoon::group::held::HeldLog;
use pontoon::group::nodes::{Alarm, Nodes};
use pontoon::group::open::GroupOptions;
use pontoon::group::types::{
    Effects, Fetch, MembershipChange, NumberedWrite, Operation, Output, SnapshotWanted,
};
use pontoon::ids::{DatabaseId, Epoch, GROUP_START, NodeId, Position, ReplicaId, ShardId};
use pontoon::machine::MachineKind;
use pontoon::machine::command::{Command, KvCommand, Query};
use pontoon::placement::map::{Member, MemberRole};
use pontoon::placement::ring::RingRange;
use pontoon::storage::engine::Engine;
use pontoon::storage::engine_memory::{CrashLoss, MemoryEngine};
use pontoon::storage::keys;
use pontoon::storage::log::{Install, LogStore, ReplicaPhase, ReplicaRecord};
use pontoon::storage::log_memory::MemoryLog;
use pontoon::storage::opened::OpenedState;
use pontoon::storage::state::StateHeader;

#[path = "words.rs"]
mod words;

use raft::eraftpb::MessageType;
use words::{describe, end, entries, tag};

use crate::script::{self, Interpreter};

const SHARD: ShardId = ShardId(1);
const GENERATION: u32 = 1;
/// What is kept of the log where a script doesn't say.
const KEEP_ALL: u64 = u64::MAX;
/// Rounds after which a group that doesn't come to rest is a mistake.
const SETTLE_ROUNDS_MAX: usize = 100;

/// What a snapshot holds, under keys that name no replica.
type Records = Vec<(Vec<u8>, bytes::Bytes)>;

/// The group of one script.
#[derive(Default)]
pub struct Groups {
    keep: u64,
    held: u64,
    sleep: u64,
    nodes: BTreeMap<u64, Node>,
    /// Messages under way, in the order they were sent.
    wire: VecDeque<(u64, u64, GroupMessage)>,
    cut: BTreeSet<u64>,
    operations: u64,
    incarnations: u64,
    /// While settling, messages and writes are not printed.
    brief: bool,
}

struct Node {
    log: Arc<MemoryLog>,
    held: Arc<HeldLog>,
    engine: Arc<MemoryEngine>,
    /// `None` while it is down.
    group: Option<Group<u64>>,
    /// Its process, while it runs, or the last one.
    process: u64,
    /// What it hears of the others.
    heard: Nodes,
    /// While its replica sleeps: since which tick.
    asleep_since: Option<u64>,
    writes: VecDeque<NumberedWrite>,
    fetch: Option<Fetch>,
    /// Snapshots that it was asked for, and those that are made, with position and records.
    snapshots: VecDeque<SnapshotWanted>,
    made: VecDeque<(SnapshotWanted, Position, Records)>,
    /// Of its state's keys.
    generation: u32,
    /// Up to where its state is durable.
    flushed: Position,
}

impl Interpreter for Groups {
    fn execute(&mut self, line: &script::Command) -> Result<String, String> {
        if line.name == "group" {
            let (keep, held) = (line.named_number("keep", KEEP_ALL)?, line.named_number("held", KEEP_ALL)?);
            let sleep = line.named_number("sleep", 0)?;
            *self = Groups { keep, held, sleep, ..Groups::default() };
            return self.create(line.named_number("voters", 3)?);
        }
        match line.name.as_str() {
            "campaign" => {
                let node = line.number(0)?;
                self.group(node)?.campaign().map_err(|e| e.to_string())?;
                self.pump(node)
            }
            "elect" => {
                let node = line.number(0)?;
                self.group(node)?.campaign().map_err(|e| e.to_string())?;
                self.brief = true;
                let begun = self.pump(node)?;
                Ok(begun + &self.settle()?)
            }
            "transfer" => {
                let node = line.number(0)?;
                self.group(node)?.transfer(ReplicaId(line.number(1)?));
                self.pump(node)
            }
            "create" => {
                let id = line.number(0)?;
                self.add(id, Vec::new())?;
                self.open(id)
            }
            "destroy" => {
                self.nodes.remove(&line.number(0)?);
                Ok(String::new())
            }
            "learners" => {
                let learner =
                    |id| Member { replica: ReplicaId(id), node: NodeId(id), role: MemberRole::Learner };
                let ids = words::ids(line)?;
                self.change(line, MembershipChange::AddLearners(ids.into_iter().map(learner).collect()))
            }
            "drop-learners" => {
                let ids = words::ids(line)?.into_iter().map(ReplicaId).collect();
                self.change(line, MembershipChange::RemoveLearners(ids))
            }
            "exchange" => {
                let (promote, remove) = (words::listed(line, "promote")?, words::listed(line, "remove")?);
                self.change(line, MembershipChange::Exchange { promote, remove })
            }
            "members" => match line.text(0) {
                Ok(_) => self.members(line.number(0)?),
                Err(_) => {
                    let ids: Vec<u64> = self.nodes.keys().copied().collect();
                    ids.into_iter().map(|id| self.members(id)).collect()
                }
            },
            "followers" => {
                let status = self.group(line.number(0)?)?.status();
                let lines = status.followers.iter().map(|f| {
                    let is = |flag, word| if flag { word } else { "" };
                    let (active, near) = (is(f.active, ", active"), is(f.caught_up, ", caught up"));
                    format!("{}: has {}{active}{near}\n", f.replica, f.matched)
                });
                Ok(lines.collect())
            }
            "put" => {
                let (key, mut value) = (line.word(1)?.to_vec().into(), line.word(2)?.to_vec());
                let bytes: usize = line.named_number("bytes", 0)?;
                value.resize(value.len().max(bytes), b'.');
                let value = value.into();
                let (command, session) = (Command::Kv(KvCommand::Put { key, value }), tag(line)?);
                self.submit(line, Operation::Command { command, session })
            }
            "get" => {
                let key = line.word(1)?.to_vec().into();
                self.submit(line, Operation::Query(Query::Get { key }))
            }
            "pump" => self.pump(line.number(0)?),
            "deliver" => {
                let to = line.named_text("to")?.map(|_| line.named_number("to", 0)).transpose()?;
                self.brief = line.named("brief").is_some();
                let output = self.deliver(to);
                self.brief = false;
                output
            }
            "lose" => {
                let lost = std::mem::take(&mut self.wire).len();
                Ok(format!("{lost} messages lost"))
            }
            "persist" => self.persist(line.number(0)?),
            "fetch" => self.fetch(line.number(0)?),
            "flush" => self.flush(line.number(0)?),
            "compact" => {
                let node = line.number(0)?;
                Ok(format!("{node}: {}", self.compact(node)?.trim_start_matches(", ")))
            }
            "make" => self.make(line.number(0)?),
            "bring" => {
                let lost = line.named("lost").is_some();
                self.bring(line.number(0)?, lost)
            }
            "tick" => {
                let count: u64 = line.number(1)?;
                let nodes: Vec<u64> = match line.text(0)?.as_str() {
                    "all" => self.nodes.keys().copied().collect(),
                    _ => vec![line.number(0)?],
                };
                let mut output = String::new();
                self.brief = line.named("brief").is_some();
                for _ in 0..count {
                    for &node in &nodes {
                        if self.group(node).is_ok() {
                            output += &self.tick(node)?;
                        }
                    }
                }
                self.brief = false;
                Ok(output)
            }
            "pause" | "resume" => {
                let node = line.number(0)?;
                self.group(node)?.pause_apply(line.name == "pause");
                self.pump(node)
            }
            "unreachable" => {
                let node = line.number(0)?;
                self.group(node)?.on_unreachable(ReplicaId(line.number(1)?));
                self.pump(node)
            }
            "cut" => {
                self.cut.insert(line.number(0)?);
                Ok(String::new())
            }
            "heal" => {
                self.cut.clear();
                Ok(String::new())
            }
            "crash" => self.crash(line.number(0)?),
            "restart" => {
                let node = line.number(0)?;
                let mut output = self.open(node)?;
                if line.named("pump").is_none() {
                    output += &self.pump(node)?;
                }
                Ok(output)
            }
            "forget" => {
                let node = self.node(line.number(0)?)?;
                if node.group.is_some() {
                    return Err("it is running".into());
                }
                node.engine = Arc::new(MemoryEngine::new());
                Ok(String::new())
            }
            "beat" => self.beat(line.number(0)?),
            "gone" => {
                let (id, about) = (line.number(0)?, line.number(1)?);
                let process = self.node(about)?.process;
                match self.node(id)?.heard.gone(NodeId(about), process) {
                    Some(alarm) => self.alarm(id, NodeId(about), alarm),
                    None => Ok(format!("{id}: that is no news\n")),
                }
            }
            "rest" => {
                let line = |(id, node): (&u64, &Node)| match (&node.group, node.asleep_since) {
                    (None, _) => format!("{id}: down\n"),
                    (_, Some(_)) => format!("{id}: asleep\n"),
                    (_, None) => format!("{id}: awake\n"),
                };
                Ok(self.nodes.iter().map(line).collect())
            }
            "settle" => self.settle(),
            "status" => self.status(),
            "sessions" => {
                let table = self.group(line.number(0)?)?.state().session_table().clone();
                let mut output = format!("time {}", table.log_time());
                for id in table.records().keys() {
                    let session = table.get(*id).ok_or("a session without content")?;
                    let (acked_below, results) = (session.acked_below(), session.results());
                    write!(output, "\n{:02x} acknowledged below {acked_below}, {results} results", id.0[0])
                        .map_err(|e| e.to_string())?;
                }
                Ok(output)
            }
            other => Err(format!("unknown command `{other}`")),
        }
    }
}

impl Groups {
    /// Time passes at a node: its replica isn't told while it sleeps.
    fn tick(&mut self, id: u64) -> Result<String, String> {
        let node = self.node(id)?;
        let silent = node.heard.tick();
        let mut output = String::new();
        for other in silent {
            output += &self.alarm(id, other, Alarm::Silent)?;
        }
        let node = self.node(id)?;
        if let Some(group) = node.group.as_mut().filter(|_| node.asleep_since.is_none()) {
            group.tick();
        }
        Ok(output + &self.pump(id)?)
    }

    fn beat(&mut self, from: u64) -> Result<String, String> {
        let process = self.node(from)?.process;
        let others: Vec<u64> = self.nodes.keys().copied().filter(|id| *id != from).collect();
        let mut output = String::new();
        for id in others {
            if let Some(alarm) = self.node(id)?.heard.heard(NodeId(from), process, 0) {
                output += &self.alarm(id, NodeId(from), alarm)?;
            }
        }
        Ok(output)
    }

    fn alarm(&mut self, id: u64, about: NodeId, alarm: Alarm) -> Result<String, String> {
        let node = self.node(id)?;
        let Some(group) = node.group.as_mut() else { return Ok(String::new()) };
        let Some(since) = node.asleep_since else {
            let vacant = group.alarmed(about, alarm).map_err(|error| error.to_string())?;
            return if vacant { self.pump(id) } else { Ok(String::new()) };
        };
        let Some(silence) = group.heeds(about, alarm, &node.heard) else { return Ok(String::new()) };
        node.asleep_since = None;
        group.wake(node.heard.now() - since, silence);
        if !group.alarmed(about, alarm).map_err(|error| error.to_string())? {
            group.call_leader();
        }
        Ok(format!("{id}: wakes, node {about} is {}\n", format!("{alarm:?}").to_lowercase())
            + &self.pump(id)?)
    }

    /// Something is about to happen to a replica.
    fn rouse(&mut self, id: u64) -> Result<(), String> {
        let node = self.node(id)?;
        if let (Some(group), Some(since)) = (node.group.as_mut(), node.asleep_since.take()) {
            group.wake(node.heard.now() - since, group.leader_silence(&node.heard));
        }
        Ok(())
    }

    /// Takes note of whether a replica is asleep.
    fn rests(&mut self, id: u64) -> Result<String, String> {
        let node = self.node(id)?;
        let Some(group) = node.group.as_mut() else { return Ok(String::new()) };
        match (group.is_asleep(), node.asleep_since.is_some()) {
            (true, false) if group.is_watched_over(&node.heard) => {
                node.asleep_since = Some(node.heard.now());
                Ok(format!("{id}: falls asleep\n"))
            }
            (true, false) => {
                group.wake(0, group.leader_silence(&node.heard));
                Ok(format!("{id}: can't sleep, there is a node that isn't heard\n"))
            }
            (false, true) => {
                node.asleep_since = None;
                Ok(String::new())
            }
            _ => Ok(String::new()),
        }
    }

    fn group(&mut self, node: u64) -> Result<&mut Group<u64>, String> {
        let found = self.node(node)?.group.as_mut();
        found.ok_or_else(|| format!("node {node} is down"))
    }

    fn node(&mut self, node: u64) -> Result<&mut Node, String> {
        self.nodes.get_mut(&node).ok_or_else(|| format!("there is no node {node}"))
    }

    fn create(&mut self, voters: u64) -> Result<String, String> {
        let member = |id| Member { replica: ReplicaId(id), node: NodeId(id), role: MemberRole::Voter };
        let members: Vec<Member> = (1..=voters).map(member).collect();
        for id in 1..=voters {
            self.add(id, members.clone())?;
        }
        for id in 1..=voters {
            self.open(id)?;
        }
        Ok(format!("{voters} voters, log begins after {} of term {}", GROUP_START.index, GROUP_START.term))
    }

    /// A node with a replica that was created with `members`.
    fn add(&mut self, id: u64, members: Vec<Member>) -> Result<(), String> {
        let log = Arc::new(MemoryLog::new());
        let record = ReplicaRecord {
            replica: ReplicaId(id),
            shard: SHARD,
            database: DatabaseId(1),
            machine: MachineKind::Kv,
            phase: ReplicaPhase::Active,
            range: RingRange::ALL,
            epoch: Epoch { range: 1, conf: 1 },
            members,
            members_at: 0,
            ordered_at: 0,
            generation: GENERATION,
        };
        let flushed = record.beginning();
        log.create(&[record]).map_err(|e| e.to_string())?;
        let engine = Arc::new(MemoryEngine::new());
        let node = Node {
            log,
            held: Arc::new(HeldLog::new(self.held)),
            engine,
            group: None,
            process: 0,
            heard: Nodes::new(),
            asleep_since: None,
            writes: VecDeque::new(),
            fetch: None,
            snapshots: VecDeque::new(),
            made: VecDeque::new(),
            generation: GENERATION,
            flushed,
        };
        match self.nodes.insert(id, node) {
            None => Ok(()),
            Some(_) => Err(format!("there is a node {id} already")),
        }
    }

    /// Asks for a change of members.
    fn change(&mut self, line: &script::Command, change: MembershipChange) -> Result<String, String> {
        let node: u64 = line.number(0)?;
        let conf = match line.named("conf") {
            Some(_) => line.named_number("conf", 0)?,
            None => self.group(node)?.epoch().conf,
        };
        self.submit(line, Operation::Change { conf, change })
    }

    fn members(&mut self, id: u64) -> Result<String, String> {
        let node = self.node(id)?;
        let catalogue = node.log.catalogue().map_err(|e| e.to_string())?;
        let record = catalogue.first().ok_or("it has no replica")?;
        let recorded = format!("recorded at {}: {}", record.members_at, words::members(&record.members));
        let Some(group) = &node.group else { return Ok(format!("{id}: down; {recorded}\n")) };
        let (conf, members) = (group.epoch().conf, words::members(group.members()));
        Ok(format!("{id}: conf {conf}: {members}; {recorded}\n"))
    }

    fn open(&mut self, id: u64) -> Result<String, String> {
        self.incarnations += 1;
        let incarnation = self.incarnations;
        let (retention, sleep) = (Retention::new(self.keep), self.sleep);
        let node = self.node(id)?;
        if node.group.is_some() {
            return Err(format!("node {id} is running"));
        }
        let replica = ReplicaId(id);
        let catalogue = node.log.catalogue().map_err(|e| e.to_string())?;
        let record = catalogue.first().ok_or("it has no replica")?;
        let log = node.log.load(replica).map_err(|e| e.to_string())?;
        let engine: Arc<dyn Engine> = node.engine.clone();
        let (state, why) = match OpenedState::open(&engine, record, &log).map_err(|e| e.to_string())? {
            OpenedState::Whole(state) => (state, None),
            OpenedState::Lost { state, why } => (state, Some(why)),
        };
        let options = GroupOptions {
            retention,
            shard: SHARD,
            machine: MachineKind::Kv,
            replica,
            incarnation,
            logger: slog::Logger::root(slog::Discard, slog::o!()),
            cached: Arc::default(),
            held: node.held.clone(),
            state_lost: why.is_some(),
        };
        let (last, applied) = (log.last, state.header().applied.index);
        let (term, commit) = (log.hard_state.term, log.hard_state.commit);
        let mut group = Group::open(options, node.log.clone(), log, state).map_err(|e| e.to_string())?;
        let recovering = if group.recovering() { ", re-applies" } else { "" };
        if sleep > 0 {
            group.sleep_after(sleep, incarnation);
        }
        (node.group, node.process, node.asleep_since) = (Some(group), incarnation, None);
        let state = why.map_or(format!("to {applied}"), |why| format!("lost: {why}"));
        Ok(format!(
            "{id}: starts in term {term}, log to {last}, commit {commit}, state {state}{recovering}\n"
        ))
    }

    fn crash(&mut self, id: u64) -> Result<String, String> {
        self.group(id)?;
        let node = self.node(id)?;
        node.group = None;
        node.fetch = None;
        node.snapshots.clear();
        node.made.clear();
        node.engine.crash(CrashLoss::Everything);
        let lost = std::mem::take(&mut node.writes).len();
        Ok(format!("{id}: {lost} writes lost"))
    }

    fn submit(&mut self, line: &script::Command, operation: Operation) -> Result<String, String> {
        let node = line.number(0)?;
        self.operations += 1;
        let token = self.operations;
        if self.node(node)?.asleep_since.is_some() {
            self.rouse(node)?;
            self.group(node)?.call_leader();
        }
        self.group(node)?.submit(operation, token);
        if line.named("pump").is_some() {
            return Ok(String::new());
        }
        // Settles at once, where how it goes is shown elsewhere.
        self.brief = line.named("brief").is_some();
        let begun = self.pump(node)?;
        if self.brief { Ok(begun + &self.settle()?) } else { Ok(begun) }
    }

    fn deliver(&mut self, only: Option<u64>) -> Result<String, String> {
        let (mut receivers, mut rested) = (BTreeSet::new(), String::new());
        for (from, to, message) in std::mem::take(&mut self.wire) {
            if only.is_some_and(|only| only != to) {
                self.wire.push_back((from, to, message));
                continue;
            }
            let cut = self.cut.contains(&from) || self.cut.contains(&to);
            if cut || self.group(to).is_err() {
                continue;
            }
            let message = GroupMessage { node: NodeId(from), ..message };
            if !self.group(to)?.sleeps_through(&message) {
                self.rouse(to)?;
            }
            self.group(to)?.step(message).map_err(|e| e.to_string())?;
            rested += &self.rests(to)?;
            receivers.insert(to);
        }
        let pumped: Result<String, String> = receivers.into_iter().map(|node| self.pump(node)).collect();
        Ok(rested + &pumped?)
    }

    fn persist(&mut self, id: u64) -> Result<String, String> {
        let node = self.node(id)?;
        let Some(last) = node.writes.back().map(|write| write.number) else {
            return Ok(format!("{id}: nothing to write"));
        };
        let writes: Vec<_> = node.writes.drain(..).map(|numbered| numbered.write).collect();
        node.log.write(&writes).map_err(|e| e.to_string())?;
        self.group(id)?.on_persisted(last);
        self.pump(id)
    }

    fn fetch(&mut self, id: u64) -> Result<String, String> {
        let node = self.node(id)?;
        let fetch = node.fetch.take().ok_or_else(|| format!("node {id} asked for nothing"))?;
        let entries = node.log.entries(ReplicaId(id), fetch.low, fetch.high, fetch.max_bytes);
        let entries = entries.map_err(|e| e.to_string())?;
        self.group(id)?.on_fetched(entries);
        self.pump(id)
    }

    fn flush(&mut self, id: u64) -> Result<String, String> {
        let Some(frozen) = self.group(id)?.freeze() else {
            return Ok(format!("{id}: nothing to flush"));
        };
        let applied = frozen.header.applied;
        let node = self.node(id)?;
        let flushed = node.engine.write(&frozen.mutations()).and_then(|()| node.engine.sync());
        flushed.map_err(|e| e.to_string())?;
        node.flushed = applied;
        self.group(id)?.release(applied.index);
        Ok(format!("{id}: state durable to {}{}", applied.index, self.compact(id)?))
    }

    fn compact(&mut self, id: u64) -> Result<String, String> {
        let flushed = self.node(id)?.flushed;
        let Some(to) = self.group(id)?.compact(flushed) else { return Ok(String::new()) };
        self.node(id)?.log.compact(ReplicaId(id), to).map_err(|e| e.to_string())?;
        Ok(format!(", log begins after {}", to.index))
    }

    fn make(&mut self, id: u64) -> Result<String, String> {
        let node = self.node(id)?;
        let at = node.flushed;
        let Some(wanted) = node.snapshots.front().copied() else {
            return Err(format!("node {id} was asked for no snapshot"));
        };
        let mut records = Records::new();
        let (from, end) = keys::generation_range(ReplicaId(id), node.generation);
        let scanned = node.engine.scan(Bound::Included(&from), &end, &mut |key, value| {
            records.extend(keys::local_key(key).map(|local| (local.to_vec(), value)));
            true
        });
        scanned.map_err(|e| e.to_string())?;
        let (to, least) = (wanted.to, wanted.least);
        if at.index < least {
            return Ok(format!("{id}: its state is durable to {} only", at.index));
        }
        node.snapshots.pop_front();
        if self.group(id)?.snapshot_made(to, at) {
            self.node(id)?.made.push_back((wanted, at, records));
            return Ok(format!("{id}: snapshot for {to} at {} of term {}", at.index, at.term));
        }
        Ok(format!("{id}: the snapshot for {to} isn't wanted any more"))
    }

    /// Installs a snapshot as a node would: a new generation of state, one step of the log, and the
    /// replica is opened anew.
    fn bring(&mut self, id: u64, lost: bool) -> Result<String, String> {
        let node = self.node(id)?;
        let Some((wanted, position, records)) = node.made.pop_front() else {
            return Err(format!("node {id} has made no snapshot"));
        };
        let to = wanted.to;
        let mut output = String::new();
        if !lost {
            let target = self.node(to.0)?;
            let generation = target.generation + 1;
            let batch: Vec<_> = (records.into_iter())
                .map(|(local, value)| (keys::from_local(to, generation, &local), Some(value)))
                .collect();
            let header = batch.iter().find(|(key, _)| *key == keys::header_key(to, generation));
            let header = header.and_then(|(_, value)| value.as_ref()).ok_or("a snapshot without a header")?;
            let header = StateHeader::decode(header, "the snapshot").map_err(|e| e.to_string())?;
            let StateHeader { epoch, members, .. } = header;
            target.engine.write(&batch).and_then(|()| target.engine.sync()).map_err(|e| e.to_string())?;
            let lost = std::mem::take(&mut target.writes).len();
            if lost > 0 {
                return Err(format!("node {to} still has writes under way"));
            }
            let state_lost = target.group.as_ref().is_some_and(Group::state_lost);
            let install =
                Install { generation, position, leader_term: wanted.term, epoch, members, state_lost };
            target.group = None;
            match target.log.install(to, &install) {
                Ok(()) => (target.generation, target.flushed) = (generation, position),
                Err(error) => output += &format!("{to}: {error}\n"),
            }
            output += &self.open(to.0)?;
            output += &self.pump(to.0)?;
        }
        self.group(id)?.snapshot_done(to, !lost);
        Ok(output + &self.pump(id)?)
    }

    fn settle(&mut self) -> Result<String, String> {
        self.brief = true;
        let mut output = String::new();
        for _ in 0..SETTLE_ROUNDS_MAX {
            for id in self.nodes.keys().copied().collect::<Vec<_>>() {
                let node = self.node(id)?;
                let (writes, fetch) = (!node.writes.is_empty(), node.fetch.is_some());
                if writes {
                    output += &self.persist(id)?;
                }
                if fetch {
                    output += &self.fetch(id)?;
                }
            }
            if self.wire.is_empty() && self.nodes.values().all(|n| n.writes.is_empty() && n.fetch.is_none()) {
                self.brief = false;
                return Ok(output);
            }
            output += &self.deliver(None)?;
        }
        Err("the group doesn't come to rest".into())
    }

    /// Pumps a node until it has no more to do, and prints its effects.
    fn pump(&mut self, id: u64) -> Result<String, String> {
        let mut output = String::new();
        loop {
            let effects = self.group(id)?.pump().map_err(|e| e.to_string())?;
            let more = effects.more;
            output += &self.carry_out(id, effects)?;
            output += &self.rests(id)?;
            if !more {
                return Ok(output);
            }
        }
    }

    fn carry_out(&mut self, id: u64, effects: Effects<u64>) -> Result<String, String> {
        let Effects { messages, write, done, reads, fetch, snapshot, leader, marked: _, more: _ } = effects;
        let mut lines = Vec::new();
        if let Some(change) = leader {
            let who = match change.leader {
                Some(_) if change.local => "leads".into(),
                Some(leader) => format!("follows {leader}"),
                None => "knows no leader".into(),
            };
            if change.local || !self.brief {
                lines.push(format!("{id}: {who} in term {}", change.term));
            }
        }
        for (to, message) in messages {
            if !self.brief {
                let asks = match (message.sleep.is_some(), message.message.get_msg_type()) {
                    (true, MessageType::MsgHeartbeat) => ", sleep?",
                    (true, _) => ", agreed",
                    _ => "",
                };
                lines.push(format!("{id} -> {to}: {}{asks}", describe(&message.message)));
            }
            self.wire.push_back((id, to.0, message));
        }
        if let Some(numbered) = write {
            if !self.brief {
                let mut line = format!("{id}: write {}", numbered.number);
                line += &entries(&numbered.write.entries);
                if let Some(hard_state) = &numbered.write.hard_state {
                    let (term, vote) = (hard_state.term, hard_state.vote);
                    line += &format!(", term {term} vote {vote} commit {}", hard_state.commit);
                }
                if let Some(membership) = &numbered.write.membership {
                    let (conf, members) = (membership.epoch.conf, words::members(&membership.members));
                    line += &format!(", members as of {} (conf {conf}: {members})", membership.index);
                }
                lines.push(line);
            }
            self.node(id)?.writes.push_back(numbered);
        }
        for (token, result) in done {
            lines.push(format!("{id}: #{token} {}", end(&result)));
        }
        if !reads.is_empty() {
            let reader = self.group(id)?.state().reader();
            for (token, query) in reads {
                let answer = MachineKind::Kv.query(&query, &reader).map_err(|e| e.to_string())?;
                lines.push(format!("{id}: #{token} {} (from the engine)", end(&Ok(Output::Answer(answer)))));
            }
        }
        if let Some(fetch) = fetch {
            if !self.brief {
                lines.push(format!("{id}: fetch entries {} to {}", fetch.low, fetch.high - 1));
            }
            self.node(id)?.fetch = Some(fetch);
        }
        if let Some(wanted) = snapshot {
            lines.push(format!("{id}: wants a snapshot for {}, of {} or later", wanted.to, wanted.least));
            self.node(id)?.snapshots.push_back(wanted);
        }
        Ok(lines.into_iter().map(|line| line + "\n").collect())
    }

    fn status(&mut self) -> Result<String, String> {
        let mut output = String::new();
        for (id, node) in &self.nodes {
            let Some(group) = &node.group else {
                output += &format!("{id}: down\n");
                continue;
            };
            let status = group.status();
            let leader = status.leader.map_or("none".into(), |leader| leader.to_string());
            output += &format!(
                "{id}: {:?}, term {}, leader {leader}, last {}, committed {}, applied {}{}\n",
                status.role,
                status.term,
                status.last,
                status.committed,
                status.applied,
                match (status.recovering, status.state_lost, group.role()) {
                    (true, ..) => ", recovering",
                    (_, Some(_), _) => ", without a state",
                    (.., None) => ", no member",
                    (.., Some(MemberRole::Learner)) => ", learner",
                    _ => "",
                }
            );
        }
        Ok(output)
    }
}
