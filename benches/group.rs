//! What consensus costs by itself: three replicas of a shard in one thread, with their log and state
//! in memory and messages handed over by hand.
//!
//! `cargo bench --bench group`. A figure is operations a second, of all three replicas' work.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pontoon::codec::GroupMessage;
use pontoon::group::catch_up::Retention;
use pontoon::group::driver::Group;
use pontoon::group::held::HeldLog;
use pontoon::group::open::GroupOptions;
use pontoon::group::types::Operation;
use pontoon::ids::{DatabaseId, Epoch, GROUP_START, NodeId, ReplicaId, ShardId};
use pontoon::machine::MachineKind;
use pontoon::machine::command::{Command, KvCommand, Query};
use pontoon::placement::map::{Member, MemberRole};
use pontoon::placement::ring::RingRange;
use pontoon::storage::engine_memory::MemoryEngine;
use pontoon::storage::log::{LogStore, ReplicaPhase, ReplicaRecord};
use pontoon::storage::log_memory::MemoryLog;
use pontoon::storage::state::{ReplicaState, StateHeader};
use raft::eraftpb::ConfState;

const SHARD: ShardId = ShardId(1);
const GENERATION: u32 = 1;
const VALUE_BYTES: usize = 128;
/// Keys that are written over and over, so that the memtables stay as they are.
const KEYS: u64 = 10_000;
/// Operations between compactions of the logs.
const KEEP: u64 = 100_000;

struct Replica {
    id: ReplicaId,
    group: Group<()>,
    log: Arc<MemoryLog>,
    inbox: VecDeque<GroupMessage>,
}

struct Trio {
    /// The first leads.
    replicas: Vec<Replica>,
    operations: u64,
    compacted: u64,
}

impl Replica {
    fn open(id: u64, members: &[Member]) -> Replica {
        let replica = ReplicaId(id);
        let epoch = Epoch { range: 1, conf: 1 };
        let log = Arc::new(MemoryLog::new());
        let record = ReplicaRecord {
            replica,
            shard: SHARD,
            database: DatabaseId(1),
            machine: MachineKind::Kv,
            phase: ReplicaPhase::Active,
            range: RingRange::ALL,
            epoch,
            members: members.to_vec(),
            members_at: 0,
            ordered_at: 0,
            generation: GENERATION,
        };
        log.create(&[record]).unwrap();
        let voters = members.iter().map(|member| member.replica.0).collect();
        let initial = StateHeader {
            applied: GROUP_START,
            revision: 0,
            log_time: 0,
            epoch,
            members: members.to_vec(),
            conf_state: ConfState { voters, ..ConfState::default() },
        };
        let engine = Arc::new(MemoryEngine::new());
        let state = ReplicaState::open(engine, replica, GENERATION, initial).unwrap();
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let machine = MachineKind::Kv;
        let cached = Arc::default();
        let (retention, state_lost) = (Retention::new(u64::MAX), false);
        let options = GroupOptions {
            shard: SHARD,
            machine,
            replica,
            incarnation: 1,
            retention,
            logger,
            cached,
            held: Arc::new(HeldLog::new(0)),
            state_lost,
        };
        let group = Group::open(options, log.clone(), log.load(replica).unwrap(), state).unwrap();
        Replica { id: replica, group, log, inbox: VecDeque::new() }
    }

    /// Takes in what has arrived, then works until nothing is left; durability takes no time.
    /// Returns what is to be sent, and how many operations ended.
    fn work(&mut self) -> (Vec<(NodeId, GroupMessage)>, u64) {
        for message in self.inbox.drain(..) {
            self.group.step(message).unwrap();
        }
        let (mut messages, mut ended) = (Vec::new(), 0);
        loop {
            let effects = self.group.pump().unwrap();
            messages.extend(effects.messages);
            ended += (effects.done.len() + effects.reads.len()) as u64;
            assert!(effects.done.iter().all(|(_, result)| result.is_ok()));
            match effects.write {
                Some(numbered) => {
                    self.log.write(&[numbered.write]).unwrap();
                    self.group.on_persisted(numbered.number);
                }
                None if effects.more => {}
                None => return (messages, ended),
            }
        }
    }
}

impl Trio {
    fn new() -> Trio {
        let member = |id| Member { replica: ReplicaId(id), node: NodeId(id), role: MemberRole::Voter };
        let members: Vec<Member> = (1..=3).map(member).collect();
        let replicas = (1..=3).map(|id| Replica::open(id, &members)).collect();
        let mut trio = Trio { replicas, operations: 0, compacted: 0 };
        trio.replicas[0].group.campaign().unwrap();
        trio.settle();
        assert!(trio.replicas[0].group.leads());
        trio
    }

    /// Works and delivers until nothing moves; returns how many operations ended.
    fn settle(&mut self) -> u64 {
        let mut total = 0;
        loop {
            let mut quiet = true;
            for at in 0..self.replicas.len() {
                let (messages, ended) = self.replicas[at].work();
                total += ended;
                quiet &= messages.is_empty();
                for (node, message) in messages {
                    self.replicas[node.0 as usize - 1].inbox.push_back(message);
                }
            }
            if quiet {
                return total;
            }
        }
    }

    /// Asks the leader for `count` operations and waits for the ends of all: together, which lets
    /// them share entries and rounds, or one after the other.
    fn run(&mut self, count: u64, together: bool, operation: impl Fn(Bytes) -> Operation) {
        let mut ended = 0;
        for _ in 0..count {
            self.operations += 1;
            let key = format!("k{:015}", self.operations * 7919 % KEYS);
            self.replicas[0].group.submit(operation(key.into()), ());
            if !together {
                ended += self.settle();
            }
        }
        ended += self.settle();
        assert_eq!(ended, count);
        if self.operations - self.compacted > KEEP {
            self.compacted = self.operations;
            self.compact();
        }
    }

    /// As if all state were durable, which nobody will need here.
    fn compact(&mut self) {
        for Replica { id, group, log, .. } in &mut self.replicas {
            let applied = group.state().header().applied;
            if let Some(to) = group.compact(applied) {
                log.compact(*id, to).unwrap();
            }
        }
    }
}

fn operations(criterion: &mut Criterion) {
    let value = Bytes::from(vec![7; VALUE_BYTES]);
    let put = |key| {
        let command = Command::Kv(KvCommand::Put { key, value: value.clone() });
        Operation::Command { command, session: None }
    };
    let get = |key| Operation::Query(Query::Get { key });
    let mut trio = Trio::new();
    let mut group = criterion.benchmark_group("group");
    for (count, together) in [(1, false), (64, false), (64, true), (1024, true)] {
        let how = if together { "together" } else { "one by one" };
        group.throughput(Throughput::Elements(count));
        group.bench_function(format!("{count} puts {how}"), |b| b.iter(|| trio.run(count, together, put)));
        group.bench_function(format!("{count} gets {how}"), |b| b.iter(|| trio.run(count, together, get)));
    }
    group.finish();
}

criterion_group!(benches, operations);
criterion_main!(benches);
