//! A replica whose state is lost, and the leader that it asks for another.

use super::*;
use crate::codec::messages::check;
use crate::group::election;
use crate::storage::state::conf_state_of;
use raft::StateRole;

const TRUNCATED: Position = Position { index: 7, term: 6 };
const LAST: Position = Position { index: 9, term: 6 };

/// Replica 3 in term 6, whose log begins after [`TRUNCATED`] and ends with [`LAST`], all of it committed.
fn lost() -> Follower {
    lost_among([MemberRole::Voter; 3])
}

/// The same, where replicas 1 to 3 have these roles.
fn lost_among(roles: [MemberRole; 3]) -> Follower {
    let mut follower = Follower::new();
    follower.step(append(1, 6, GROUP_START, &[6, 6, 6, 6], LAST.index, 1));
    follower.persist();
    let Follower { group, log, .. } = follower;
    let with = |(member, role)| Member { role, ..member };
    let members: Vec<Member> = members(&[1, 2, 3]).into_iter().zip(roles).map(with).collect();
    let conf_state = conf_state_of(&members);
    let header = StateHeader { applied: TRUNCATED, conf_state, members, ..group.state().header().clone() };
    log.compact(ReplicaId(3), TRUNCATED).unwrap();
    let state = ReplicaState::at(Arc::new(MemoryEngine::new()), ReplicaId(3), 1, header);
    let found = log.load(ReplicaId(3)).unwrap();
    let group = Group::open(Follower::options(true), log.clone(), found, state).unwrap();
    let mut follower = Follower::with(group, log);
    follower.pump();
    follower
}

pub(super) fn message(kind: MessageType, from: u64, term: Term) -> Message {
    let mut message = Message { from, to: 3, term, ..Message::default() };
    message.set_msg_type(kind);
    message
}

fn heartbeat(term: Term, commit: Index) -> Message {
    Message { commit, ..message(MessageType::MsgHeartbeat, 1, term) }
}

fn vote_request(term: Term) -> Message {
    let Position { index, term: log_term } = LAST;
    Message { index, log_term, ..message(MessageType::MsgRequestVote, 2, term) }
}

impl Follower {
    /// The messages of a kind that left since the last look at any.
    fn take(&mut self, kind: MessageType) -> Vec<Message> {
        let sent = std::mem::take(&mut self.sent);
        sent.into_iter().filter(|message| message.get_msg_type() == kind).collect()
    }
}

#[test]
fn it_keeps_its_promises_and_applies_nothing() {
    let mut follower = lost();
    assert!(!follower.group.recovering());
    follower.step(append(1, 6, LAST, &[6], LAST.index + 1, 1));
    assert!(follower.take(MessageType::MsgAppendResponse).is_empty(), "not durable yet");
    follower.persist();
    let told = follower.take(MessageType::MsgAppendResponse);
    assert_eq!((told.len(), told[0].index, told[0].reject), (1, LAST.index + 1, false));
    let status = follower.group.status();
    assert_eq!((status.committed, status.applied), (LAST.index + 1, TRUNCATED.index));
    assert_eq!(status.state_lost, Some(TRUNCATED.index));
    // Nothing of its empty state reaches the disk, nor does its log lose what a snapshot goes on with.
    assert!(follower.group.freeze().is_none());
    follower.group.safe_index = LAST.index;
    assert_eq!(follower.group.compact(LAST), None);
    follower.group.press_log();
    assert_eq!(follower.group.compact(LAST), None);
    assert!(follower.group.at_rest());
}

#[test]
fn it_votes_once_the_leader_that_it_has_heard_is_silent() {
    let mut follower = lost();
    follower.step(heartbeat(6, LAST.index));
    follower.step(vote_request(7));
    assert_eq!(follower.group.status().term, 6, "it counts on its leader");
    for _ in 0..limits::ELECTION_TICKS_MIN {
        follower.group.tick();
    }
    follower.step(vote_request(7));
    assert!(
        follower.take(MessageType::MsgRequestVoteResponse).is_empty(),
        "a vote leaves when it is durable"
    );
    follower.persist();
    let votes = follower.take(MessageType::MsgRequestVoteResponse);
    assert_eq!((votes.len(), votes[0].reject, votes[0].to), (1, false, 2));
    assert_eq!(follower.log.load(ReplicaId(3)).unwrap().hard_state.vote, 2);
    // Nobody gets another one in this term, nor does a candidate whose log lacks what it has acknowledged.
    follower.step(Message { from: 1, ..vote_request(7) });
    follower.step(Message { index: LAST.index - 1, ..vote_request(8) });
    while !follower.writes.is_empty() {
        follower.persist();
    }
    let refused = follower.take(MessageType::MsgRequestVoteResponse);
    assert_eq!(refused.iter().map(|vote| vote.reject).collect::<Vec<_>>(), [true, true]);
}

#[test]
fn it_begins_no_election_before_all_others_and_takes_no_leadership() {
    let mut follower = lost();
    follower.step(heartbeat(6, LAST.index));
    follower.step(message(MessageType::MsgTimeoutNow, 1, 6));
    // All the others have had the time to try, those that come last among them.
    let others = limits::ELECTION_TICKS_MAX + election::LAST_TICKS;
    for _ in 0..others {
        follower.group.tick();
        follower.pump();
    }
    follower.group.campaign().unwrap();
    follower.pump();
    // Whatever is said of its disk meanwhile.
    follower.group.set_ambition(Ambition::Usual);
    follower.step(heartbeat(6, LAST.index));
    for _ in 0..others {
        follower.group.tick();
        follower.pump();
    }
    assert_eq!((follower.group.status().role, follower.group.status().term), (StateRole::Follower, 6));
    // Nor ever, if it is to stay behind for another reason.
    follower.group.set_ambition(Ambition::None);
    for _ in 0..3 * election::LOST_TICKS {
        follower.group.tick();
        follower.pump();
    }
    assert_eq!((follower.group.status().role, follower.group.status().term), (StateRole::Follower, 6));
    assert!(follower.writes.is_empty());
}

/// Replica 3, elected after all the others were silent, with its first entry on disk.
fn lost_leader() -> Follower {
    lost_leader_among([MemberRole::Voter; 3])
}

fn lost_leader_among(roles: [MemberRole; 3]) -> Follower {
    let mut follower = lost_among(roles);
    follower.step(heartbeat(6, LAST.index));
    for _ in 0..limits::ELECTION_TICKS_MAX + election::LOST_TICKS {
        follower.group.tick();
        follower.pump();
    }
    assert_eq!(follower.group.status().role, StateRole::PreCandidate);
    follower.step(message(MessageType::MsgRequestPreVoteResponse, 1, 7));
    assert_eq!(follower.group.status().role, StateRole::Candidate);
    while !follower.writes.is_empty() {
        follower.persist();
    }
    follower.step(message(MessageType::MsgRequestVoteResponse, 1, 7));
    while !follower.writes.is_empty() {
        follower.persist();
    }
    assert_eq!(follower.group.status().role, StateRole::Leader);
    follower
}

#[test]
fn it_leads_where_nobody_else_does_and_gives_way_to_the_first_that_has_a_state_and_the_log() {
    let mut leader = lost_leader();
    leader.group.submit(Operation::Query(Query::Get { key: "k".into() }), 1);
    let delete = Command::Kv(KvCommand::Delete { key: "k".into() });
    leader.group.submit(Operation::Command { command: delete, session: None }, 2);
    let done = leader.group.pump().unwrap().done;
    assert_eq!(done.len(), 2);
    assert!(done.iter().all(|(_, end)| matches!(end, Err(Refusal::Unavailable(_)))), "{done:?}");
    let last = LAST.index + 1;
    assert_eq!(leader.group.status().last, last, "its first entry, and nothing else");
    // Two answer: one lacks its state, one an entry.
    let acknowledge = |from, index| Message { index, ..message(MessageType::MsgAppendResponse, from, 7) };
    let answer = |from, least| Message {
        request_snapshot: least,
        ..message(MessageType::MsgHeartbeatResponse, from, 7)
    };
    leader.step(answer(1, 5));
    leader.step(acknowledge(1, last));
    leader.step(acknowledge(2, last - 1));
    leader.group.tick();
    leader.pump();
    let status = leader.group.status();
    assert_eq!((status.committed, status.applied), (last, TRUNCATED.index));
    assert!(leader.wanted.is_empty(), "it has no state to give");
    assert!(leader.take(MessageType::MsgTimeoutNow).is_empty());
    assert_eq!(leader.group.safe_index(), leader.group.safe_index, "it has nobody compact");
    leader.step(acknowledge(2, last));
    leader.group.tick();
    leader.pump();
    let handed = leader.take(MessageType::MsgTimeoutNow);
    assert_eq!(handed.iter().map(|message| message.to).collect::<Vec<_>>(), [2]);
}

#[test]
fn where_nobody_stays_who_has_a_state_it_gives_way_to_one_who_leaves() {
    let handed = |role, lost: &[u64]| {
        let mut leader = lost_leader_among([role, MemberRole::Outgoing, MemberRole::Voter]);
        for from in [1, 2] {
            let least = if lost.contains(&from) { 5 } else { 0 };
            let answer = message(MessageType::MsgHeartbeatResponse, from, 7);
            leader.step(Message { request_snapshot: least, ..answer });
            let acknowledged = message(MessageType::MsgAppendResponse, from, 7);
            leader.step(Message { index: LAST.index + 1, ..acknowledged });
        }
        leader.group.tick();
        leader.pump();
        leader.take(MessageType::MsgTimeoutNow).iter().map(|message| message.to).collect::<Vec<_>>()
    };
    assert_eq!(handed(MemberRole::Voter, &[]), [1]);
    assert_eq!(handed(MemberRole::Voter, &[1]), [2]);
    assert_eq!(handed(MemberRole::Outgoing, &[1]), [2]);
    assert!(handed(MemberRole::Voter, &[1, 2]).is_empty());
}

#[test]
fn raft_need_not_read_what_it_does_not_apply() {
    let mut follower = lost();
    assert_eq!(follower.group.raft.raft.raft_log.applied, LAST.index);
    follower.step(append(1, 6, LAST, &[6], LAST.index + 1, 1));
    follower.persist();
    assert_eq!(follower.group.raft.raft.raft_log.applied, LAST.index + 1);
}

#[test]
fn it_answers_no_caller() {
    let mut follower = lost();
    let ask = |follower: &mut Follower| {
        follower.group.submit(Operation::Query(Query::Get { key: "k".into() }), 1);
        let mut done = follower.group.pump().unwrap().done;
        done.pop().expect("an end").1.unwrap_err()
    };
    let refusal = ask(&mut follower);
    assert!(matches!(&refusal, Refusal::Unavailable(why) if why.contains("state was lost")), "{refusal}");
    follower.step(heartbeat(6, LAST.index));
    let leader = Some(NodeId(1));
    assert_eq!(ask(&mut follower), Refusal::NotLeader { shard: ShardId(1), leader });
}

#[test]
fn it_asks_with_each_answer_to_a_heartbeat_and_with_nothing_else() {
    let mut follower = lost();
    for round in 0..3 {
        follower.sent.clear();
        follower.step(heartbeat(6, LAST.index));
        follower.step(append(1, 6, LAST, &[], LAST.index, 1));
        let asked: Vec<_> = follower.sent.iter().map(|m| (m.get_msg_type(), m.request_snapshot)).collect();
        assert_eq!(
            asked,
            [(MessageType::MsgHeartbeatResponse, TRUNCATED.index), (MessageType::MsgAppendResponse, 0)],
            "round {round}"
        );
    }
    for message in follower.sent {
        check(&GroupMessage {
            shard: ShardId(1),
            epoch: EPOCH,
            safe_index: 0,
            message,
            node: NodeId::default(),
            sleep: None,
        })
        .unwrap();
    }
}

#[test]
fn what_it_does_not_apply_leaves_its_memory() {
    let mut follower = lost();
    let mut after = LAST;
    let mib = 1024 * 1024;
    let count = 4 + limits::ENTRY_CACHE_BYTES / mib;
    for _ in 0..count {
        follower.step(append(1, 6, after, &[6], after.index + 1, mib));
        after = Position { index: after.index + 1, term: 6 };
        follower.persist();
    }
    follower.group.tick();
    assert!(follower.group.raft.store().cache_bytes() <= limits::ENTRY_CACHE_BYTES + 2 * mib);
    assert_eq!(follower.applied(), TRUNCATED.index);
}

#[test]
fn a_state_that_stands_elsewhere_than_its_log_begins_is_none_that_was_lost() {
    let follower = lost();
    let header = StateHeader { applied: LAST, ..follower.group.state().header().clone() };
    let state = ReplicaState::at(Arc::new(MemoryEngine::new()), ReplicaId(3), 1, header);
    let found = follower.log.load(ReplicaId(3)).unwrap();
    let opened = Group::<u64>::open(Follower::options(true), follower.log.clone(), found, state);
    assert!(matches!(opened, Err(GroupError::Storage(StorageError::Damaged { .. }))));
}

// ------------------------------------------------------------------------------------- its leader

/// Replica 3 leads with one entry, which replica 1 has and all have committed.
fn asked_leader() -> Follower {
    let mut leader = leader();
    while !leader.writes.is_empty() {
        leader.persist();
    }
    let Position { index, term } = first();
    leader.step(Message { index, ..message(MessageType::MsgAppendResponse, 1, term) });
    assert_eq!(leader.applied(), index);
    leader
}

fn first() -> Position {
    Position { index: GROUP_START.index + 1, term: GROUP_START.term + 1 }
}

/// Replica `from` answers a heartbeat, and asks for a snapshot unless `least` is 0.
fn answer(from: u64, least: Index) -> Message {
    Message { request_snapshot: least, ..message(MessageType::MsgHeartbeatResponse, from, first().term) }
}

#[test]
fn a_leader_has_one_snapshot_brought_to_a_follower_that_lacks_nothing_but_its_state() {
    let mut leader = asked_leader();
    let (follower, at) = (ReplicaId(1), first());
    leader.step(answer(1, at.index));
    let order = SnapshotWanted { to: follower, node: NodeId(1), term: at.term, least: at.index };
    assert_eq!(leader.wanted, [order]);
    // It is asked again and again, and sees that the follower has every entry.
    for _ in 0..3 * limits::SNAPSHOT_RETRY_TICKS {
        leader.group.tick();
        leader.step(answer(1, at.index));
    }
    assert_eq!(leader.wanted.len(), 1);
    assert!(!leader.group.snapshot_made(follower, GROUP_START), "too old");
    assert!(leader.group.snapshot_made(follower, at));
    leader.group.tick();
    leader.group.snapshot_done(follower, true);
    // An answer from before may still be on its way.
    leader.group.tick();
    leader.step(answer(1, at.index));
    assert_eq!(leader.wanted.len(), 1);
    leader.step(answer(1, 0));
    assert!(!leader.group.lacks_state(follower));
    for _ in 0..3 * limits::SNAPSHOT_RETRY_TICKS {
        leader.group.tick();
        leader.step(answer(1, 0));
    }
    assert_eq!(leader.wanted.len(), 1, "it has its state");
}

#[test]
fn a_snapshot_for_who_lacks_no_entry_holds_no_log() {
    let mut leader = asked_leader();
    let Position { index, term } = first();
    leader.step(Message { index, ..message(MessageType::MsgAppendResponse, 2, term) });
    leader.step(answer(1, index));
    assert_eq!(leader.wanted.len(), 1);
    assert_eq!(leader.group.safe_index(), index);
}

#[test]
fn a_snapshot_that_failed_is_asked_for_again_after_a_rest() {
    let mut leader = asked_leader();
    let at = first();
    leader.step(answer(1, at.index));
    leader.group.snapshot_done(ReplicaId(1), false);
    for tick in 1..limits::SNAPSHOT_RETRY_TICKS {
        leader.group.tick();
        leader.step(answer(1, at.index));
        assert_eq!(leader.wanted.len(), 1, "tick {tick}");
    }
    leader.group.tick();
    leader.step(answer(1, at.index));
    assert_eq!(leader.wanted.len(), 2);
}

#[test]
fn leadership_is_not_handed_to_who_has_lost_its_state() {
    let mut leader = asked_leader();
    leader.step(answer(2, 0));
    leader.step(answer(1, first().index));
    assert_eq!(leader.group.successors(), [ReplicaId(2)]);
    leader.group.transfer(ReplicaId(1));
    assert_eq!(leader.group.raft.raft.lead_transferee, None);
    leader.step(answer(1, 0));
    assert_eq!(leader.group.successors(), [ReplicaId(1), ReplicaId(2)]);
}

#[test]
fn leadership_that_is_not_taken_is_kept_and_commands_go_on() {
    let mut leader = asked_leader();
    leader.step(answer(2, 0));
    leader.group.transfer(ReplicaId(2));
    for _ in 0..limits::TRANSFER_TICKS_MAX {
        assert_eq!(leader.group.raft.raft.lead_transferee, Some(2));
        assert_eq!(leader.group.take_lapsed(), None);
        leader.group.tick();
    }
    assert!(leader.group.leads());
    assert_eq!(leader.group.raft.raft.lead_transferee, None, "raft takes no commands before that");
    assert_eq!(leader.group.take_lapsed(), Some(ReplicaId(2)));
    leader.group.tick();
    assert_eq!(leader.group.take_lapsed(), None, "it is told once");
}

#[test]
fn the_log_is_not_held_for_ever_for_who_answers_and_acknowledges_nothing() {
    let mut leader = asked_leader();
    for _ in 0..limits::FOLLOWER_DEAD_TICKS {
        assert!(!leader.group.catch_up.is_calm(), "how far replica 2 is isn't known");
        leader.group.tick();
        // As one does whose disk hangs.
        leader.step(answer(2, 0));
    }
    assert!(leader.group.leads());
    assert!(leader.group.catch_up.is_calm());
}

#[test]
fn only_a_member_that_answers_its_present_leader_is_heard() {
    let mut leader = asked_leader();
    let at = first();
    leader.step(answer(9, at.index));
    leader.step(Message { term: at.term - 1, ..answer(1, at.index) });
    leader.step(answer(1, at.index + 1));
    leader.step(answer(1, POSITION_MAX));
    assert_eq!((leader.wanted.as_slice(), leader.group.lacks_state(ReplicaId(1))), (&[][..], false));

    let mut follower = Follower::new();
    follower.step(append(1, 6, GROUP_START, &[6], 6, 1));
    follower.step(answer(2, GROUP_START.index));
    assert_eq!((follower.wanted.as_slice(), follower.group.lacks_state(ReplicaId(2))), (&[][..], false));
}

#[test]
fn what_the_leader_has_not_applied_is_waited_for() {
    let mut leader = asked_leader();
    let delete = Command::Kv(KvCommand::Delete { key: "k".into() });
    leader.group.submit(Operation::Command { command: delete, session: None }, 1);
    leader.pump();
    let next = first().index + 1;
    leader.step(answer(1, next));
    assert!(leader.wanted.is_empty(), "not committed");
    while !leader.writes.is_empty() {
        leader.persist();
    }
    leader.step(Message { index: next, ..message(MessageType::MsgAppendResponse, 2, first().term) });
    leader.step(answer(1, next));
    assert_eq!(leader.wanted.iter().map(|wanted| wanted.least).collect::<Vec<_>>(), [next]);
}
