//! One follower against messages that a peer may send it, with the log writer in hand.

use std::sync::Arc;

use bytes::Bytes;
use raft::StateRole;
use raft::eraftpb::{ConfState, Entry, Message, MessageType};

use super::*;
use crate::codec::messages::POSITION_MAX;
use crate::group::catch_up::Retention;
use crate::group::election;
use crate::group::held::HeldLog;
use crate::group::open::GroupOptions;
use crate::group::types::SnapshotWanted;
use crate::ids::{DatabaseId, GROUP_START};
use crate::machine::command::{Command, KvCommand, encode_entry};
use crate::placement::map::{Member, MemberRole};
use crate::placement::ring::RingRange;
use crate::storage::engine_memory::MemoryEngine;
use crate::storage::log::{LogStore, ReplicaPhase, ReplicaRecord};
use crate::storage::log_memory::MemoryLog;
use crate::storage::state::StateHeader;

#[path = "hostile_tests.rs"]
mod hostile;
#[path = "lost_tests.rs"]
mod lost;
#[path = "membership_tests.rs"]
mod membership;

const EPOCH: Epoch = Epoch { range: 1, conf: 1 };

/// Replica 3 of three, and its log.
struct Follower {
    group: Group<u64>,
    log: Arc<MemoryLog>,
    writes: VecDeque<NumberedWrite>,
    /// What left.
    sent: Vec<Message>,
    /// Snapshots that were asked of the shell.
    wanted: Vec<SnapshotWanted>,
    /// Marks that were told, each with what was applied then.
    marked: Vec<(Index, Index)>,
    /// What ended.
    done: Vec<(u64, Result<Output, Refusal>)>,
}

fn members(voters: &[u64]) -> Vec<Member> {
    let voter = |id: &u64| Member { replica: ReplicaId(*id), node: NodeId(*id), role: MemberRole::Voter };
    voters.iter().map(voter).collect()
}

impl Follower {
    fn new() -> Follower {
        Follower::among(&[1, 2, 3])
    }

    /// Replica 3 of these.
    fn among(voters: &[u64]) -> Follower {
        let log = Arc::new(MemoryLog::new());
        let record = ReplicaRecord {
            replica: ReplicaId(3),
            shard: ShardId(1),
            database: DatabaseId(1),
            machine: MachineKind::Kv,
            phase: ReplicaPhase::Active,
            range: RingRange::ALL,
            epoch: EPOCH,
            members: members(voters),
            members_at: 0,
            ordered_at: 0,
            generation: 1,
        };
        log.create(&[record]).unwrap();
        Follower::with(Follower::open(&log, voters), log)
    }

    fn with(group: Group<u64>, log: Arc<MemoryLog>) -> Follower {
        let (sent, wanted) = (Vec::new(), Vec::new());
        Follower { group, log, writes: VecDeque::new(), sent, wanted, marked: Vec::new(), done: Vec::new() }
    }

    /// The replica as its log tells, with nothing of the state on disk.
    fn open(log: &Arc<MemoryLog>, voters: &[u64]) -> Group<u64> {
        let replica = ReplicaId(3);
        let initial = StateHeader {
            // A newcomer stands nowhere.
            applied: if voters.is_empty() { Position::default() } else { GROUP_START },
            revision: 0,
            log_time: 0,
            epoch: EPOCH,
            members: members(voters),
            conf_state: ConfState { voters: voters.to_vec(), ..ConfState::default() },
        };
        let state = ReplicaState::open(Arc::new(MemoryEngine::new()), replica, 1, initial).unwrap();
        let state_of_log = log.load(replica).unwrap();
        Group::open(Follower::options(false), log.clone(), state_of_log, state).unwrap()
    }

    fn options(state_lost: bool) -> GroupOptions {
        GroupOptions {
            shard: ShardId(1),
            machine: MachineKind::Kv,
            replica: ReplicaId(3),
            incarnation: 1,
            retention: Retention::new(u64::MAX),
            logger: slog::Logger::root(slog::Discard, slog::o!()),
            cached: Arc::default(),
            held: Arc::new(HeldLog::new(u64::MAX)),
            state_lost,
        }
    }

    fn step(&mut self, message: Message) {
        self.step_under(EPOCH, message);
    }

    /// A message whose sender has this epoch.
    fn step_under(&mut self, epoch: Epoch, message: Message) {
        let message = GroupMessage {
            shard: ShardId(1),
            epoch,
            safe_index: 0,
            message,
            node: NodeId::default(),
            sleep: None,
        };
        self.group.step(message).unwrap();
        self.pump();
    }

    fn pump(&mut self) {
        loop {
            let effects = self.group.pump().unwrap();
            self.writes.extend(effects.write);
            self.sent.extend(effects.messages.into_iter().map(|(_, message)| message.message));
            self.wanted.extend(effects.snapshot);
            self.marked.extend(effects.marked.map(|index| (index, self.applied())));
            self.done.extend(effects.done);
            if !effects.more {
                return;
            }
        }
    }

    /// The next log write is durable.
    fn persist(&mut self) {
        let numbered = self.writes.pop_front().expect("a write");
        self.log.write(&[numbered.write]).unwrap();
        self.group.on_persisted(numbered.number);
        self.pump();
    }

    fn applied(&self) -> Index {
        self.group.status().applied
    }
}

/// An append of the leader `from`: entries of the terms given, after entry `after`, committed up to `commit`.
fn append(from: u64, term: Term, after: Position, terms: &[Term], commit: Index, bytes: usize) -> Message {
    let mut message =
        Message { from, to: 3, term, index: after.index, log_term: after.term, commit, ..Message::default() };
    message.set_msg_type(MessageType::MsgAppend);
    for (index, term) in (after.index + 1..).zip(terms) {
        let command = KvCommand::Put { key: "k".into(), value: vec![0; bytes].into() };
        let data = encode_entry(&[(Command::Kv(command), None)], 0).into();
        message.entries.push(Entry { index, term: *term, data, ..Entry::default() });
    }
    message
}

#[test]
fn a_request_that_a_follower_would_forward_is_dropped() {
    let mut follower = Follower::new();
    follower.step(append(1, 6, GROUP_START, &[6], 6, 1));
    let mut message = Message { from: 2, to: 3, term: 6, ..Message::default() };
    message.set_msg_type(MessageType::MsgTransferLeader);
    // raft-rs panics on it, in a follower that knows its leader.
    follower.step(message);
    assert_eq!(follower.group.status().leader, Some(ReplicaId(1)));
}

#[test]
fn a_term_that_no_peer_can_have_reached_is_not_believed() {
    let mut follower = Follower::new();
    follower.step(append(1, 6, GROUP_START, &[6], 6, 1));
    // The last that the codec lets through: in the election after it, this replica would be mute.
    follower.step(append(2, POSITION_MAX, GROUP_START, &[], 6, 1));
    assert_eq!((follower.group.status().term, follower.group.status().leader), (6, Some(ReplicaId(1))));
    follower.step(append(2, 6 + limits::TERM_JUMP_MAX, GROUP_START, &[], 6, 1));
    assert_eq!(follower.group.status().leader, Some(ReplicaId(2)));
}

#[test]
fn a_vote_counts_only_once_it_was_asked_for() {
    let mut follower = Follower::new();
    follower.step(append(1, 6, GROUP_START, &[6], 5, 1));
    let mut message = Message { from: 1, to: 3, term: 6, ..Message::default() };
    message.set_msg_type(MessageType::MsgTimeoutNow);
    follower.step(message);
    let mut vote = Message { from: 1, to: 3, term: 7, ..Message::default() };
    vote.set_msg_type(MessageType::MsgRequestVoteResponse);
    // Its request waits for the disk.
    follower.step(vote.clone());
    assert_eq!(follower.group.status().role, StateRole::Candidate);
    while !follower.writes.is_empty() {
        follower.persist();
    }
    follower.step(vote);
    assert_eq!(follower.group.status().role, StateRole::Leader);
}

#[test]
fn a_group_of_one_voter_follows_nobody() {
    let mut alone = Follower::among(&[3]);
    alone.step(append(1, 6, GROUP_START, &[6], 6, 1));
    let status = alone.group.status();
    assert_eq!((status.term, status.last), (GROUP_START.term, GROUP_START.index));
    alone.group.campaign().unwrap();
    alone.pump();
    assert!(alone.group.leads());
}

#[test]
fn at_a_mark_the_shell_sees_the_state_as_it_is_there() {
    let mut alone = Follower::among(&[3]);
    alone.group.campaign().unwrap();
    alone.pump();
    let first = GROUP_START.index + 1;
    // Two share one mark; a command follows before it is durable.
    alone.group.submit(Operation::Mark, 1);
    alone.group.submit(Operation::Mark, 2);
    alone.pump();
    let delete = KvCommand::Delete { key: "k".into() };
    alone.group.submit(Operation::Command { command: Command::Kv(delete), session: None }, 3);
    alone.pump();
    assert_eq!(alone.done, []);
    while !alone.writes.is_empty() {
        alone.persist();
    }
    let mark = first + 1;
    assert_eq!(alone.marked, [(mark, mark)], "nothing behind it is applied when it is told");
    assert_eq!(alone.applied(), mark + 1, "and then the rest is");
    let ends: Vec<_> = alone.done.iter().map(|(token, end)| (*token, end.as_ref().ok())).collect();
    assert_eq!(ends[..2], [(1, Some(&Output::Marked(mark))), (2, Some(&Output::Marked(mark)))]);
    assert!(matches!(ends[2..], [(3, Some(Output::Reply(_)))]), "{ends:?}");
    assert!(alone.group.at_rest());
}

#[test]
fn a_follower_knows_a_mark_and_proposes_none() {
    let mut follower = Follower::new();
    let mut message = append(1, 6, GROUP_START, &[6, 6, 6], 8, 1);
    let entry = &mut message.entries[1];
    (entry.data, entry.context) = (Bytes::new(), Bytes::from_static(b"mark"));
    follower.step(message);
    while !follower.writes.is_empty() {
        follower.persist();
    }
    assert_eq!((follower.marked.clone(), follower.applied()), (vec![(7, 7)], 8));
    assert_eq!(follower.group.state().header().revision, 2, "two puts, and nothing else");
    follower.group.submit(Operation::Mark, 1);
    follower.pump();
    let refused = Refusal::NotLeader { shard: ShardId(1), leader: Some(NodeId(1)) };
    assert_eq!(follower.done, [(1, Err(refused))]);
}

/// Replica 3 as the leader of the first term.
fn leader() -> Follower {
    let mut leader = Follower::new();
    leader.group.campaign().unwrap();
    for kind in [MessageType::MsgRequestPreVoteResponse, MessageType::MsgRequestVoteResponse] {
        leader.pump();
        while !leader.writes.is_empty() {
            leader.persist();
        }
        let mut vote = Message { from: 1, to: 3, term: GROUP_START.term + 1, ..Message::default() };
        vote.set_msg_type(kind);
        leader.step(vote);
    }
    assert!(leader.group.leads());
    leader
}

#[test]
fn an_acknowledgement_of_what_the_leader_does_not_have_commits_nothing() {
    let mut leader = leader();
    let own = leader.group.status();
    let mut far = Message { from: 1, to: 3, term: own.term, index: own.last + 1, ..Message::default() };
    far.set_msg_type(MessageType::MsgAppendResponse);
    leader.step(far.clone());
    leader.group.submit(
        Operation::Command { command: Command::Kv(KvCommand::Delete { key: "k".into() }), session: None },
        1,
    );
    leader.pump();
    while !leader.writes.is_empty() {
        leader.persist();
    }
    assert_eq!(leader.group.status().committed, GROUP_START.index);
    // Now it has the entry, and believes it.
    leader.step(far);
    assert_eq!(leader.group.status().committed, own.last + 1);
}

#[test]
fn the_acknowledgement_of_a_replaced_write_counts_for_nothing() {
    let mut follower = Follower::new();
    // Three leaders one after the other, while the log writer is busy; the last has the first one's entries.
    follower.step(append(1, 6, GROUP_START, &[6, 6, 6], 0, 1));
    follower.step(append(2, 7, GROUP_START, &[7], 0, 1));
    follower.step(append(1, 8, GROUP_START, &[6, 6, 6], 8, 1));
    follower.persist();
    // What is on disk now is about to be overwritten: entry 6 of term 7, and nothing behind it.
    assert_eq!(follower.applied(), GROUP_START.index);
    follower.persist();
    assert_eq!(follower.applied(), GROUP_START.index);
    follower.persist();
    assert_eq!(follower.applied(), GROUP_START.index + 3);
}

#[test]
fn a_write_without_entries_does_not_make_those_durable_that_are_being_replaced() {
    let mut follower = Follower::new();
    follower.step(append(1, 6, GROUP_START, &[6, 6, 6], 0, 1));
    // A new term, and nothing else; then as above.
    follower.step(append(2, 7, GROUP_START, &[], 0, 1));
    follower.step(append(2, 7, GROUP_START, &[7], 0, 1));
    follower.step(append(1, 8, GROUP_START, &[6, 6, 6], 8, 1));
    assert_eq!(follower.writes.len(), 4);
    for _ in 0..3 {
        follower.persist();
        assert_eq!(follower.applied(), GROUP_START.index);
    }
    follower.persist();
    assert_eq!(follower.applied(), GROUP_START.index + 3);
}

#[test]
fn a_follower_that_does_not_apply_keeps_neither_its_backlog_in_memory_nor_an_election() {
    let mut follower = Follower::new();
    follower.group.pause_apply(true);
    let mut after = GROUP_START;
    let mib = 1024 * 1024;
    let count = 4 + limits::CAMPAIGN_BACKLOG_BYTES_MAX as usize / mib;
    for _ in 0..count {
        follower.step(append(1, 6, after, &[6], after.index + 1, mib));
        after = Position { index: after.index + 1, term: 6 };
        follower.persist();
    }
    follower.pump();
    assert!(follower.group.raft.store().cache_bytes() <= limits::ENTRY_CACHE_BYTES + 2 * mib);
    for _ in 0..3 * limits::ELECTION_TICKS_MAX {
        follower.group.tick();
    }
    follower.group.campaign().unwrap();
    follower.pump();
    assert_eq!((follower.group.status().term, follower.applied()), (6, GROUP_START.index));
    // With memory again it reads what it needs from the log, and may lead.
    follower.group.pause_apply(false);
    follower.pump();
    assert_eq!(follower.applied(), after.index);
    follower.group.campaign().unwrap();
    follower.pump();
    assert_eq!(follower.group.status().role, StateRole::PreCandidate);
}

#[test]
fn entries_that_only_a_leader_can_commit_keep_nobody_from_an_election() {
    let mut follower = Follower::new();
    let (mut after, mib) = (GROUP_START, 1024 * 1024);
    // Its leader ends before it tells that they are committed.
    for _ in 0..4 + limits::CAMPAIGN_BACKLOG_BYTES_MAX as usize / mib {
        follower.step(append(1, 6, after, &[6], GROUP_START.index, mib));
        after = Position { index: after.index + 1, term: 6 };
        follower.persist();
    }
    assert_eq!(follower.applied(), GROUP_START.index);
    for _ in 0..limits::ELECTION_TICKS_MAX {
        follower.group.tick();
        follower.pump();
    }
    assert_eq!(follower.group.status().role, StateRole::PreCandidate);
}

#[test]
fn a_pass_asks_the_state_engine_a_bounded_number_of_times() {
    let mut follower = Follower::new();
    let delete = |at: u64| Command::Kv(KvCommand::Delete { key: at.to_be_bytes().to_vec().into() });
    let entries: Vec<Entry> = (0..10)
        .map(|number| {
            let commands: Vec<_> = (0..100).map(|at| (delete(number * 100 + at), None)).collect();
            let (index, term) = (GROUP_START.index + 1 + number, 6);
            Entry { index, term, data: encode_entry(&commands, 0).into(), ..Entry::default() }
        })
        .collect();
    let mut message = append(1, 6, GROUP_START, &[], GROUP_START.index + 10, 0);
    message.entries = entries.into();
    follower.step(message);
    let numbered = follower.writes.pop_front().expect("a write");
    follower.log.write(&[numbered.write]).unwrap();
    follower.group.on_persisted(numbered.number);
    let mut passes = 0;
    while follower.applied() < GROUP_START.index + 10 {
        let before = follower.group.state().engine_reads();
        follower.group.pump().unwrap();
        // What the bound allows, and the rest of the entry that went beyond it.
        assert!(follower.group.state().engine_reads() - before < limits::APPLY_PASS_READS + 100);
        passes += 1;
    }
    assert_eq!(passes, 5);
}

#[test]
fn a_replica_without_ambition_neither_campaigns_nor_takes_leadership() {
    let mut follower = Follower::new();
    follower.step(append(1, 6, GROUP_START, &[6], 5, 10));
    follower.persist();
    let order = |term| {
        let mut message = Message { from: 1, to: 3, term, ..Message::default() };
        message.set_msg_type(MessageType::MsgTimeoutNow);
        message
    };
    follower.group.set_ambition(Ambition::None);
    follower.step(order(6));
    for _ in 0..5 * limits::ELECTION_TICKS_MAX {
        follower.group.tick();
        follower.pump();
    }
    follower.group.campaign().unwrap();
    follower.pump();
    assert_eq!((follower.group.status().role, follower.group.status().term), (StateRole::Follower, 6));
    assert!(follower.writes.is_empty(), "it votes for nobody");
    follower.group.set_ambition(Ambition::Usual);
    follower.step(order(6));
    assert_eq!(follower.group.status().role, StateRole::Candidate);
}

#[test]
fn a_replica_that_is_to_lead_last_waits_until_all_others_have_tried() {
    for (ambition, ticks) in [
        (Ambition::Usual, limits::ELECTION_TICKS_MIN..limits::ELECTION_TICKS_MAX),
        (Ambition::Last, limits::ELECTION_TICKS_MAX..limits::ELECTION_TICKS_MAX + election::LAST_TICKS),
    ] {
        let mut follower = Follower::new();
        follower.group.set_ambition(ambition);
        let mut waited = 0;
        while follower.group.status().role == StateRole::Follower {
            follower.group.tick();
            follower.pump();
            waited += 1;
        }
        assert!(ticks.contains(&waited), "{ambition:?}: {waited}");
    }
}

#[test]
fn a_replica_that_has_long_not_applied_takes_no_leadership_and_stands_last() {
    let mut follower = Follower::new();
    follower.step(append(1, 6, GROUP_START, &[6], 5, 10));
    follower.persist();
    let mut order = Message { from: 1, to: 3, term: 6, ..Message::default() };
    order.set_msg_type(MessageType::MsgTimeoutNow);
    follower.group.pause_apply(true);
    let heartbeat = |follower: &mut Follower| follower.step(append(1, 6, GROUP_START, &[], 5, 0));
    for _ in 0..limits::HELD_UP_TICKS {
        assert_eq!(follower.group.held_up_ticks(), None);
        heartbeat(&mut follower);
        follower.group.tick();
        // Told again, it doesn't begin anew.
        follower.group.pause_apply(true);
    }
    assert_eq!(follower.group.held_up_ticks(), Some(0));
    follower.step(order.clone());
    assert_eq!(follower.group.status().role, StateRole::Follower, "the order is passed over");
    let mut waited = 0;
    while follower.group.status().role == StateRole::Follower {
        follower.group.tick();
        follower.pump();
        waited += 1;
    }
    let last = limits::ELECTION_TICKS_MAX..=limits::ELECTION_TICKS_MAX + election::LAST_TICKS;
    assert!(last.contains(&waited), "after {waited} ticks");

    let mut follower = Follower::new();
    follower.step(append(1, 6, GROUP_START, &[6], 5, 10));
    follower.persist();
    follower.group.pause_apply(true);
    for _ in 0..2 * limits::HELD_UP_TICKS {
        heartbeat(&mut follower);
        follower.group.tick();
    }
    follower.group.pause_apply(false);
    assert_eq!(follower.group.held_up_ticks(), None);
    follower.step(order);
    assert_eq!(follower.group.status().role, StateRole::Candidate, "it applies again");
}

#[test]
fn a_pass_is_known_before_it_is_made() {
    let mut follower = Follower::new();
    assert_eq!(follower.group.next_pass_bytes(), 0);
    follower.group.pause_apply(true);
    let quarter = limits::APPLY_PASS_BYTES as usize / 4;
    let sizes =
        [(100, 100..500), (quarter, quarter..quarter + 1000), (quarter, 2 * quarter..2 * quarter + 1500)];
    let mut after = GROUP_START;
    for (bytes, pass) in sizes {
        let before = follower.group.next_pass_bytes();
        follower.step(append(1, 6, after, &[6], after.index + 1, bytes));
        assert_eq!(follower.group.next_pass_bytes(), before, "what isn't durable isn't applied");
        after = Position { index: after.index + 1, term: 6 };
        follower.persist();
        let adds = follower.group.next_pass_bytes();
        assert!(pass.contains(&adds), "{adds} of {pass:?}");
    }
    // More than the cache holds.
    follower.step(append(1, 6, after, &[6], after.index + 1, 3 * quarter));
    follower.persist();
    assert_eq!(follower.group.next_pass_bytes(), 4 * quarter);
    follower.group.pause_apply(false);
    follower.pump();
    follower.pump();
    assert_eq!((follower.group.next_pass_bytes(), follower.applied()), (0, GROUP_START.index + 4));
}
