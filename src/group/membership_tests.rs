//! Changes of members: which there are, what raft is told of them, and what one replica does about them.

use raft::eraftpb::{ConfChangeType, EntryType};

use super::lost::message;
use super::*;
use crate::codec::membership::{MembershipEntry, encode};
use crate::group::membership::{is_same, next_members, steps, without_joint};
use crate::placement::map::MemberRole::{Incoming, Learner, Outgoing, Voter};
use crate::storage::state::conf_state_of;

fn group(roles: &[(u64, MemberRole)]) -> Vec<Member> {
    let member = |&(id, role)| Member { replica: ReplicaId(id), node: NodeId(id + 10), role };
    roles.iter().map(member).collect()
}

/// What raft is told: a letter for the kind, and the replica.
fn told(before: &[(u64, MemberRole)], after: &[(u64, MemberRole)]) -> Result<Vec<String>, String> {
    let steps = steps(&group(before), &group(after))?;
    let step = |step: &raft::eraftpb::ConfChangeV2| {
        let singles = step.changes.iter().map(|single| {
            let kind = match single.get_change_type() {
                ConfChangeType::AddNode => "votes",
                ConfChangeType::AddLearnerNode => "learns",
                ConfChangeType::RemoveNode => "goes",
            };
            format!("{} {kind}", single.node_id)
        });
        let joint = match step.enter_joint() {
            Some(auto_leave) => format!("joint, ends by itself {auto_leave}: "),
            None if step.leave_joint() => "end".into(),
            None => String::new(),
        };
        joint + &singles.collect::<Vec<_>>().join(", ")
    };
    Ok(steps.iter().map(step).collect())
}

#[test]
fn learners_come_and_go_one_by_one_and_voters_all_at_once() {
    let three = [(1, Voter), (2, Voter), (3, Voter)];
    let learning = [(1, Voter), (2, Voter), (3, Voter), (4, Learner), (5, Learner)];
    assert_eq!(told(&three, &three).unwrap(), Vec::<String>::new());
    assert_eq!(told(&three, &learning).unwrap(), ["4 learns", "5 learns"]);
    assert_eq!(told(&learning, &three).unwrap(), ["4 goes", "5 goes"]);
    let joint = [(1, Voter), (2, Outgoing), (3, Voter), (4, Incoming), (5, Learner)];
    assert_eq!(told(&learning, &joint).unwrap(), ["joint, ends by itself false: 2 goes, 4 votes"]);
    let after = [(1, Voter), (3, Voter), (4, Voter), (5, Learner)];
    assert_eq!(told(&joint, &after).unwrap(), ["end"]);
    assert_eq!(without_joint(&group(&joint)), group(&after));
}

#[test]
fn nothing_else_leads_from_one_to_the_other() {
    let learning = [(1, Voter), (2, Voter), (4, Learner)];
    let joint = [(1, Voter), (2, Outgoing), (4, Incoming)];
    for after in [
        // A voter gone, made a learner, or come, without a joint change.
        &[(1, Voter), (4, Learner)][..],
        &[(1, Voter), (2, Learner), (4, Learner)],
        &[(1, Voter), (2, Voter), (4, Voter)],
        &[(1, Voter), (2, Voter), (4, Learner), (5, Voter)],
        // A joint change with one that wasn't there, without a learner that was, or that leaves no voter.
        &[(1, Voter), (2, Outgoing), (4, Incoming), (5, Learner)],
        &[(1, Voter), (2, Voter), (4, Learner), (5, Incoming)],
        &[(1, Voter), (2, Outgoing)],
        &[(1, Outgoing), (2, Outgoing), (4, Learner)],
        &[(1, Incoming), (2, Voter), (4, Learner)],
        &[],
    ] {
        assert!(told(&learning, after).is_err(), "{after:?}");
    }
    for after in [
        &[(1, Voter), (2, Voter), (4, Learner)][..],
        &[(1, Voter), (2, Outgoing), (4, Incoming)],
        &[(1, Voter)],
        &[(1, Voter), (4, Voter), (5, Learner)],
    ] {
        assert!(told(&joint, after).is_err(), "{after:?}");
    }
    let mut elsewhere = group(&learning);
    elsewhere[2].node = NodeId(99);
    assert!(steps(&group(&learning), &elsewhere).is_err());
}

#[test]
fn a_configuration_is_in_the_roles() {
    let conf = conf_state_of(&group(&[(1, Voter), (2, Outgoing), (3, Learner), (4, Incoming)]));
    assert_eq!((conf.voters, conf.voters_outgoing, conf.learners), (vec![1, 4], vec![1, 2], vec![3]));
    assert!(conf.learners_next.is_empty() && !conf.auto_leave);
    let conf = conf_state_of(&group(&[(1, Voter), (2, Learner)]));
    assert_eq!((conf.voters, conf.voters_outgoing, conf.learners), (vec![1], vec![], vec![2]));
    let of = |voters: &[u64]| ConfState { voters: voters.to_vec(), ..ConfState::default() };
    assert!(is_same(&of(&[1, 2]), &of(&[2, 1])) && !is_same(&of(&[1, 2]), &of(&[1, 2, 2])));
    assert!(!is_same(&of(&[1]), &ConfState { learners: vec![2], ..of(&[1]) }));
}

#[test]
fn members_keep_their_places_and_a_node_holds_one_replica() {
    let members = group(&[(3, Voter), (1, Voter), (2, Learner)]);
    let learner = |replica, node| Member { replica: ReplicaId(replica), node: NodeId(node), role: Voter };
    let add = |learners: &[Member]| next_members(&members, &MembershipChange::AddLearners(learners.to_vec()));
    let grown = group(&[(3, Voter), (1, Voter), (2, Learner), (9, Learner)]);
    // One that is there already, and the same one twice.
    assert_eq!(add(&[learner(2, 12), learner(9, 19), learner(9, 19)]).unwrap(), grown);
    for wrong in [learner(9, 13), learner(2, 19), learner(0, 19), learner(u64::MAX, 19), learner(9, 0)] {
        assert!(add(&[wrong]).is_err(), "{wrong:?}");
    }
    let many: Vec<Member> = (0..limits::MEMBERS_MAX as u64).map(|at| learner(20 + at, 40 + at)).collect();
    assert!(add(&many[3..]).is_ok() && add(&many[2..]).is_err());
    let of = |ids: &[u64]| ids.iter().copied().map(ReplicaId).collect::<Vec<_>>();
    let exchange = |promote: &[u64], remove: &[u64]| {
        next_members(&members, &MembershipChange::Exchange { promote: of(promote), remove: of(remove) })
    };
    assert_eq!(exchange(&[2], &[3]).unwrap(), group(&[(3, Outgoing), (1, Voter), (2, Incoming)]));
    for (promote, remove) in
        [(&[2, 2][..], &[][..]), (&[], &[1, 1]), (&[1], &[]), (&[], &[2]), (&[], &[3, 1])]
    {
        assert!(exchange(promote, remove).is_err(), "{promote:?} {remove:?}");
    }
}

/// An entry that says that these are the members after conf version `conf`.
fn change(index: Index, conf: u64, members: Vec<Member>) -> Entry {
    let context = encode(&MembershipEntry { conf, members }).into();
    let mut entry = Entry { index, term: 6, context, ..Entry::default() };
    entry.set_entry_type(EntryType::EntryConfChangeV2);
    entry
}

/// An append of leader 1 in term 6.
fn entries(entries: Vec<Entry>, commit: Index) -> Message {
    let first = entries.first().map_or(GROUP_START.index + 1, |entry| entry.index);
    let term = if first == GROUP_START.index + 1 { GROUP_START.term } else { 6 };
    let mut append = append(1, 6, Position { index: first - 1, term }, &[], commit, 0);
    append.entries = entries.into();
    append
}

fn with_roles(roles: [MemberRole; 3]) -> Vec<Member> {
    let with = |(member, role)| Member { role, ..member };
    members(&[1, 2, 3]).into_iter().zip(roles).map(with).collect()
}

#[test]
fn a_change_is_in_force_when_its_record_is_durable() {
    let mut follower = Follower::new();
    let joint = with_roles([Voter, Outgoing, Voter]);
    follower.step(entries(vec![change(6, 1, joint.clone())], 6));
    // The entry itself; then, since it is committed, its record.
    follower.persist();
    assert_eq!((follower.applied(), follower.group.epoch().conf), (5, 1));
    let write = &follower.writes.front().expect("a record").write;
    let membership = write.membership.as_ref().expect("members");
    assert_eq!((membership.index, membership.epoch.conf, &membership.members), (6, 2, &joint));
    assert_eq!(write.hard_state.as_ref().map(|hard_state| hard_state.commit), Some(6));
    // Nothing happens meanwhile, whatever comes.
    follower.step(append(1, 6, Position { index: 6, term: 6 }, &[6], 7, 1));
    for _ in 0..3 * limits::ELECTION_TICKS_MAX {
        follower.group.tick();
        follower.pump();
    }
    assert_eq!((follower.applied(), follower.group.status().role), (5, StateRole::Follower));
    follower.persist();
    assert_eq!((follower.applied(), follower.group.epoch().conf), (6, 2));
    assert_eq!(follower.group.members(), joint);
    follower.persist();
    assert_eq!(follower.applied(), 7);
}

#[test]
fn a_change_that_nobody_can_have_proposed_stops_the_replica() {
    let joint = with_roles([Voter, Outgoing, Voter]);
    let garbage = Entry { context: vec![7; 9].into(), ..change(6, 1, Vec::new()) };
    let gone = with_roles([Voter, Voter, Voter])[..2].to_vec();
    for wrong in [change(6, 2, joint.clone()), change(6, 0, joint), change(6, 1, gone), garbage] {
        let mut follower = Follower::new();
        follower.step(entries(vec![wrong.clone()], 6));
        let numbered = follower.writes.pop_front().expect("a write");
        follower.group.on_persisted(numbered.number);
        let error = follower.group.pump().err().expect("it can't go on");
        assert!(matches!(error, GroupError::Apply(ApplyError::Membership { index: 6, .. })), "{error}");
        assert_eq!(follower.group.applying(), Some(6), "the entry at fault");
    }
}

#[test]
fn no_snapshot_names_members_that_its_position_does_not_have() {
    let mut replica = Follower::new();
    let joint = with_roles([Voter, Outgoing, Voter]);
    let after = without_joint(&joint);
    replica.step(append(1, 6, GROUP_START, &[6], 6, 1));
    replica.step(entries(vec![change(7, 1, joint), change(8, 2, after.clone())], 8));
    while !replica.writes.is_empty() {
        replica.persist();
    }
    // It is started again, and nothing of its state was flushed: so it begins with the members of its record.
    let Follower { log, .. } = replica;
    let record = log.load(ReplicaId(3)).unwrap();
    assert_eq!((record.membership.index, &record.membership.members), (8, &after));
    let header = StateHeader {
        applied: GROUP_START,
        revision: 0,
        log_time: 0,
        epoch: record.membership.epoch,
        conf_state: conf_state_of(&after),
        members: after.clone(),
    };
    let state = ReplicaState::at(Arc::new(MemoryEngine::new()), ReplicaId(3), 1, header);
    let group = Group::open(Follower::options(false), log.clone(), record, state).unwrap();
    let mut replica = Follower::with(group, log);
    replica.group.pump().unwrap();
    let frozen = replica.group.freeze().expect("it has applied up to the first of the changes");
    assert_eq!((frozen.header.applied.index, &frozen.header.members), (7, &after));
    replica.pump();
    assert_eq!((replica.applied(), replica.group.epoch().conf, replica.group.recovering()), (8, 3, false));
    // Now it leads, and somebody needs a state.
    replica.step(message(MessageType::MsgTimeoutNow, 1, 6));
    replica.persist();
    replica.step(message(MessageType::MsgRequestVoteResponse, 1, 7));
    assert!(replica.group.leads());
    let asks = message(MessageType::MsgHeartbeatResponse, 1, 7);
    replica.step(Message { request_snapshot: GROUP_START.index, ..asks });
    assert_eq!(replica.wanted.iter().map(|wanted| wanted.least).collect::<Vec<_>>(), [8]);
}

/// Alone in a group from which its leader went away, a replica would lead as soon as it wants to: raft-rs 0.7.0 panics
/// then if its log isn't durable.
#[test]
fn who_is_left_alone_leads_when_its_log_is_durable() {
    let mut follower = Follower::new();
    let joint = with_roles([Outgoing, Outgoing, Voter]);
    let alone = without_joint(&joint);
    follower.step(entries(vec![change(6, 1, joint), change(7, 2, alone.clone())], 7));
    while !follower.writes.is_empty() {
        follower.persist();
    }
    assert_eq!(follower.group.members(), alone);
    // Its leader hasn't seen that yet, and sends one more. It is listened to.
    follower.step(append(1, 6, Position { index: 7, term: 6 }, &[6], 7, 1));
    assert_eq!(follower.group.status().last, 8);
    let mut order = message(MessageType::MsgTimeoutNow, 1, 6);
    order.to = 3;
    follower.step(order);
    follower.group.campaign().unwrap();
    for _ in 0..5 * limits::ELECTION_TICKS_MAX {
        follower.group.tick();
        follower.pump();
    }
    assert_eq!(follower.group.status().role, StateRole::Follower);
    follower.persist();
    for _ in 0..limits::ELECTION_TICKS_MAX {
        follower.group.tick();
        follower.pump();
    }
    assert!(follower.group.leads());
    while !follower.writes.is_empty() {
        follower.persist();
    }
    assert_eq!(follower.applied(), follower.group.status().last);
}

#[test]
fn no_leader_brings_a_log_on_from_before_the_group() {
    let mut follower = Follower::among(&[]);
    let status = follower.group.status();
    assert_eq!((status.last, status.term, status.recovering), (0, 0, false));
    follower.step(append(1, 6, Position::default(), &[6, 6], 2, 1));
    assert_eq!((follower.group.status().last, follower.group.status().term), (0, 0));
    // It stands for nothing, however long it waits and whoever asks.
    for _ in 0..5 * limits::ELECTION_TICKS_MAX {
        follower.group.tick();
    }
    follower.group.campaign().unwrap();
    follower.step(Message { to: 3, ..message(MessageType::MsgTimeoutNow, 1, 6) });
    assert_eq!(follower.group.status().role, StateRole::Follower);
}

#[test]
fn a_state_with_other_members_than_its_configuration_is_refused() {
    let log = Arc::new(MemoryLog::new());
    let follower = Follower::new();
    let header = StateHeader {
        conf_state: ConfState { voters: vec![1, 2], ..ConfState::default() },
        ..follower.group.state().header().clone()
    };
    log.create(&follower.log.catalogue().unwrap()).unwrap();
    let state = ReplicaState::open(Arc::new(MemoryEngine::new()), ReplicaId(3), 1, header).unwrap();
    let opened =
        Group::<u64>::open(Follower::options(false), log.clone(), log.load(ReplicaId(3)).unwrap(), state);
    let error = opened.err().expect("which of them counts?");
    assert!(error.to_string().contains("its configuration is"), "{error}");
}

#[test]
fn who_was_given_up_is_not_obeyed_by_those_who_went_on() {
    use MessageType::*;
    let log = Arc::new(MemoryLog::new());
    let before = Follower::new();
    log.create(&before.log.catalogue().unwrap()).unwrap();
    // It has joined those who went on.
    let epoch = Epoch { conf: (1 << 32) + 4, ..EPOCH };
    let header = StateHeader { epoch, ..before.group.state().header().clone() };
    let state = ReplicaState::at(Arc::new(MemoryEngine::new()), ReplicaId(3), 1, header);
    let opened = Group::open(Follower::options(false), log.clone(), log.load(ReplicaId(3)).unwrap(), state);
    let mut follower = Follower::with(opened.unwrap(), log);
    let terms = |follower: &Follower| (follower.group.status().term, follower.group.status().last);
    let asks = [MsgHeartbeat, MsgRequestVote, MsgRequestPreVote, MsgTimeoutNow];
    let mut orders: Vec<Message> =
        asks.map(|kind| Message { to: 3, index: 9, log_term: 6, ..message(kind, 1, 7) }).into();
    orders.push(append(1, 7, GROUP_START, &[7], 5, 1));
    for conf in [0, 1, u64::from(u32::MAX)] {
        for order in &orders {
            follower.step_under(Epoch { conf, ..EPOCH }, order.clone());
            assert_eq!(terms(&follower), (GROUP_START.term, GROUP_START.index), "{order:?}");
            assert!(follower.sent.is_empty() && follower.writes.is_empty(), "{order:?}");
        }
    }
    // Its own leader may not have come to the last change of members again, after a start.
    follower.step_under(Epoch { conf: 1 << 32, ..EPOCH }, append(1, 7, GROUP_START, &[7], 5, 1));
    assert_eq!(terms(&follower), (7, GROUP_START.index + 1));
}

#[test]
fn leadership_goes_to_who_votes_now_and_later() {
    let mut leader = leader();
    leader.group.state.set_membership(EPOCH, with_roles([Learner, Outgoing, Voter]));
    for (replica, why) in [
        (1, "replica 1 can't lead shard 1: it is a learner, and has no vote"),
        (2, "replica 2 can't lead shard 1: it leaves the group with the change of members under way"),
        (4, "replica 4 can't lead shard 1: it is no member"),
    ] {
        assert_eq!(leader.group.check_successor(ReplicaId(replica)), Err(Refusal::Refused(why.into())));
    }
    leader.group.state.set_membership(EPOCH, with_roles([Incoming, Voter, Voter]));
    assert_eq!(leader.group.check_successor(ReplicaId(1)), Ok(()));
    let asks = message(MessageType::MsgHeartbeatResponse, 2, GROUP_START.term + 1);
    leader.step(Message { request_snapshot: GROUP_START.index, ..asks });
    assert!(matches!(leader.group.check_successor(ReplicaId(2)), Err(Refusal::Unavailable(_))));
}

#[test]
fn new_members_are_told_of_when_a_majority_of_the_voters_goes_by_them() {
    let mut leader = leader();
    assert!(leader.group.members_are_known(), "a vote tells");
    let after = Epoch { conf: 3, ..EPOCH };
    leader.group.state.set_membership(after, with_roles([Learner, Voter, Voter]));
    let answer = |from| message(MessageType::MsgHeartbeatResponse, from, GROUP_START.term + 1);
    leader.step_under(after, answer(1));
    assert!(!leader.group.members_are_known(), "a learner counts for nothing");
    leader.step_under(Epoch { conf: 2, ..EPOCH }, answer(2));
    assert!(!leader.group.members_are_known(), "it takes the joint change for one that goes on");
    leader.step_under(after, answer(2));
    // What it once had in force it has recorded.
    leader.step_under(EPOCH, answer(2));
    assert!(leader.group.members_are_known());
    // Nobody goes as long as a joint change goes on.
    leader.group.state.set_membership(Epoch { conf: 4, ..EPOCH }, with_roles([Incoming, Outgoing, Voter]));
    assert!(leader.group.members_are_known());
}
