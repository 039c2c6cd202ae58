//! A replica against a peer that lies: any sequence of messages that the codec lets through, with numbers
//! near what the replica knows and far from it. Nothing of it makes the replica panic, nor leaves a
//! log on disk that it can't be rebuilt from.
//!
//! Not that the peer can do no harm: who speaks as a leader of a later term is believed, and what it
//! commits is applied, changes of members included. So a command that can't be read, a kind of entry that isn't
//! known, or a change that leads nowhere ends the replica as it should ([`GroupError::Apply`]).

use proptest::collection::vec;
use proptest::prelude::*;
use raft::eraftpb::EntryType;

use super::*;
use crate::codec::SleepWord;
use crate::codec::membership::{MembershipEntry, encode};
use crate::codec::messages::check;
use crate::group::membership::{is_joint, next_members, without_joint};

/// A number in a message, by what the replica knows when it comes.
#[derive(Clone, Copy, Debug)]
enum Number {
    Zero,
    Term(i64),
    Last(i64),
    Committed(i64),
    Truncated(i64),
    Huge(u64),
}

/// What is in an entry.
#[derive(Clone, Copy, Debug)]
enum Content {
    Empty,
    Puts(u8),
    Garbage,
    /// A change of members, of such a kind, that follows on the present conf version or on another.
    Change(u8, i64),
}

/// One message: its kind, from whom, and its numbers.
#[derive(Clone, Debug)]
struct Lie {
    kind: MessageType,
    from: u64,
    term: Number,
    log_term: Number,
    index: Number,
    commit: Number,
    commit_term: Number,
    hint: Number,
    snapshot: Number,
    safe_index: Number,
    reject: bool,
    context: Vec<u8>,
    /// The entries: by how much the term rises before each.
    entries: Vec<(u8, Content)>,
}

#[derive(Clone, Debug)]
enum Step {
    Lie(Box<Lie>),
    /// The round of reads under way is confirmed, truly or not.
    Confirm(u64),
    Tick(u8),
    Persist,
    Submit(u8),
    Read,
    Campaign,
    Pause(bool),
    Fetched,
    Compact,
    Transfer(u64),
    Change(u8),
    Unreachable(u64),
}

fn number(near: bool) -> impl Strategy<Value = Number> {
    let far = prop_oneof![
        Just(Number::Zero),
        (-3..4i64).prop_map(Number::Committed),
        (-2..3i64).prop_map(Number::Truncated),
        prop::sample::select(vec![1, 1 << 31, 1 << 32, POSITION_MAX - 1, POSITION_MAX])
            .prop_map(Number::Huge),
    ];
    if near {
        prop_oneof![6 => (-2..3i64).prop_map(Number::Term), 1 => far].boxed()
    } else {
        prop_oneof![4 => (-3..4i64).prop_map(Number::Last), 2 => (-2..3i64).prop_map(Number::Term), 3 => far]
            .boxed()
    }
}

fn lie() -> impl Strategy<Value = Lie> {
    use MessageType::*;
    let kinds = vec![
        MsgAppend,
        MsgAppend,
        MsgAppend,
        MsgAppend,
        MsgAppendResponse,
        MsgAppendResponse,
        MsgRequestVote,
        MsgRequestVoteResponse,
        MsgRequestVoteResponse,
        MsgSnapshot,
        MsgHeartbeat,
        MsgHeartbeat,
        MsgHeartbeatResponse,
        MsgTransferLeader,
        MsgTimeoutNow,
        MsgReadIndex,
        MsgReadIndexResp,
        MsgRequestPreVote,
        MsgRequestPreVoteResponse,
        MsgRequestPreVoteResponse,
    ];
    let content = prop_oneof![
        2 => Just(Content::Empty),
        8 => (0..3u8).prop_map(Content::Puts),
        1 => Just(Content::Garbage),
        3 => (0..6u8, prop_oneof![8 => Just(0), 1 => Just(1), 1 => Just(-1)])
            .prop_map(|(kind, conf)| Content::Change(kind, conf)),
    ];
    let entries = vec((prop_oneof![6 => Just(0u8), 1 => Just(1u8)], content), 0..4);
    let from = prop::sample::select(vec![1, 1, 1, 2, 2, 2, 4, 77, u64::MAX]);
    (
        (prop::sample::select(kinds), from, number(true), number(true), number(false), number(false)),
        (number(true), number(false), number(false), number(false), any::<bool>(), vec(any::<u8>(), 0..20)),
        entries,
    )
        .prop_map(|(head, rest, entries)| {
            let (kind, from, term, log_term, index, commit) = head;
            let (commit_term, hint, snapshot, safe_index, reject, context) = rest;
            Lie {
                kind,
                from,
                term,
                log_term,
                index,
                commit,
                commit_term,
                hint,
                snapshot,
                safe_index,
                reject,
                context,
                entries,
            }
        })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        30 => lie().prop_map(|lie| Step::Lie(Box::new(lie))),
        3 => (1..3u64).prop_map(Step::Confirm),
        4 => (1..25u8).prop_map(Step::Tick),
        12 => Just(Step::Persist),
        4 => (1..4u8).prop_map(Step::Submit),
        2 => Just(Step::Read),
        3 => Just(Step::Campaign),
        2 => any::<bool>().prop_map(Step::Pause),
        2 => Just(Step::Fetched),
        2 => Just(Step::Compact),
        1 => (1..4u64).prop_map(Step::Transfer),
        2 => (0..6u8).prop_map(Step::Change),
        1 => (1..5u64).prop_map(Step::Unreachable),
    ]
}

/// A change of members, for a group that may or may not have those for it.
fn change(kind: u8) -> MembershipChange {
    let of = |replica| vec![ReplicaId(replica)];
    match kind {
        0 => MembershipChange::AddLearners(vec![Member {
            replica: ReplicaId(4),
            node: NodeId(4),
            role: MemberRole::Learner,
        }]),
        1 => MembershipChange::RemoveLearners(of(4)),
        2 => MembershipChange::Exchange { promote: of(4), remove: of(3) },
        3 => MembershipChange::Exchange { promote: of(4), remove: vec![] },
        _ => MembershipChange::Exchange { promote: vec![], remove: of(u64::from(kind) - 3) },
    }
}

fn content(content: Content) -> (EntryType, Vec<u8>) {
    let put = || Command::Kv(KvCommand::Put { key: "k".into(), value: "v".into() });
    match content {
        Content::Empty => (EntryType::EntryNormal, Vec::new()),
        Content::Puts(count) => {
            let commands: Vec<_> = (0..=count).map(|_| (put(), None)).collect();
            (EntryType::EntryNormal, encode_entry(&commands, 0))
        }
        Content::Garbage => (EntryType::EntryNormal, vec![0xff; 9]),
        // With what raft itself reads: nothing may depend on that.
        Content::Change(kind, _) => (EntryType::EntryConfChangeV2, vec![kind; 3]),
    }
}

/// A replica, and the log read that it waits for.
struct Target {
    follower: Follower,
    fetch: Option<Fetch>,
    tokens: u64,
    answered: u64,
}

impl Target {
    /// What an entry says of the members: what follows on the present ones, if they can change so.
    fn context(&self, what: Content) -> Vec<u8> {
        let Content::Change(kind, off) = what else { return Vec::new() };
        let group = &self.follower.group;
        let members = match is_joint(group.members()) {
            true => Ok(without_joint(group.members())),
            false => next_members(group.members(), &change(kind)),
        };
        let Ok(members) = members else { return vec![kind; 5] };
        encode(&MembershipEntry { conf: group.epoch().conf.saturating_add_signed(off), members })
    }

    fn value(&self, number: Number) -> u64 {
        let status = self.follower.group.status();
        let near = |value: u64, by: i64| value.saturating_add_signed(by);
        match number {
            Number::Zero => 0,
            Number::Term(by) => near(status.term, by),
            Number::Last(by) => near(status.last, by),
            Number::Committed(by) => near(status.committed, by),
            Number::Truncated(by) => near(self.follower.group.raft.store().truncated().index, by),
            Number::Huge(value) => value,
        }
    }

    /// The message that a lie amounts to now: put right where the codec would refuse it for its form.
    fn message(&self, lie: &Lie) -> GroupMessage {
        let term = self.value(lie.term).max(1);
        let mut m = Message {
            msg_type: lie.kind,
            from: lie.from,
            to: 3,
            term,
            log_term: self.value(lie.log_term).min(term),
            index: self.value(lie.index),
            commit: self.value(lie.commit),
            commit_term: self.value(lie.commit_term).min(term),
            reject_hint: self.value(lie.hint),
            request_snapshot: if lie.reject { self.value(lie.snapshot) } else { 0 },
            reject: lie.reject,
            context: lie.context.clone().into(),
            ..Message::default()
        };
        match lie.kind {
            MessageType::MsgAppend => {
                let (mut index, mut of) = (m.index, m.log_term.max(1));
                for &(rise, what) in &lie.entries {
                    (index, of) = (index + 1, (of + u64::from(rise)).min(term));
                    let (entry_type, data) = content(what);
                    let data = data.into();
                    let context = self.context(what).into();
                    m.entries.push(Entry { index, term: of, data, entry_type, context, ..Entry::default() });
                }
            }
            MessageType::MsgSnapshot => {
                let metadata = m.mut_snapshot().mut_metadata();
                (metadata.index, metadata.term) = (self.value(lie.hint).max(1), term);
                metadata.mut_conf_state().voters = vec![1, 2, 3];
            }
            MessageType::MsgReadIndex | MessageType::MsgReadIndexResp => {
                m.entries = vec![Entry { data: "context".into(), ..Entry::default() }].into();
                if lie.kind == MessageType::MsgReadIndex {
                    m.term = 0;
                }
            }
            _ => {}
        }
        let safe_index = self.value(lie.safe_index);
        let beats = matches!(lie.kind, MessageType::MsgHeartbeat | MessageType::MsgHeartbeatResponse);
        let word = SleepWord { process: 1, round: lie.entries.len() as u64 };
        let sleep = (beats && lie.reject).then_some(word);
        GroupMessage {
            shard: ShardId(1),
            epoch: EPOCH,
            safe_index,
            message: m,
            node: NodeId::default(),
            sleep,
        }
    }

    fn pump(&mut self) -> Result<(), GroupError> {
        loop {
            let effects = self.follower.group.pump()?;
            self.follower.writes.extend(effects.write);
            self.fetch = effects.fetch.or(self.fetch.take());
            self.answered += (effects.done.len() + effects.reads.len()) as u64;
            for (_, message) in &effects.messages {
                // What it says itself is fit to be sent, or it would stay silent for ever.
                check(message).expect("a message of its own");
            }
            if !effects.more {
                return Ok(());
            }
        }
    }

    fn take(&mut self, step: &Step) -> Result<(), GroupError> {
        let group = &mut self.follower.group;
        match step {
            Step::Lie(lie) => {
                let message = self.message(lie);
                if check(&message).is_ok() {
                    self.follower.group.step(message)?;
                }
            }
            Step::Confirm(from) => {
                let context = group.raft.raft.read_only.last_pending_request_ctx();
                let term = group.raft.raft.term;
                let mut m = Message { from: *from, to: 3, term, ..Message::default() };
                m.set_msg_type(MessageType::MsgHeartbeatResponse);
                m.context = context.unwrap_or_default().into();
                let message = GroupMessage {
                    shard: ShardId(1),
                    epoch: EPOCH,
                    safe_index: 0,
                    message: m,
                    node: NodeId::default(),
                    sleep: None,
                };
                self.follower.group.step(message)?;
            }
            Step::Tick(count) => (0..*count).for_each(|_| group.tick()),
            Step::Persist => {
                if let Some(numbered) = self.follower.writes.pop_front() {
                    self.follower.log.write(&[numbered.write])?;
                    group.on_persisted(numbered.number);
                }
            }
            Step::Submit(count) => {
                for _ in 0..*count {
                    let command = Command::Kv(KvCommand::Delete { key: "k".into() });
                    group.submit(Operation::Command { command, session: None }, self.tokens);
                    self.tokens += 1;
                }
            }
            Step::Read => {
                group.submit(Operation::Query(Query::Get { key: "k".into() }), self.tokens);
                self.tokens += 1;
            }
            Step::Change(kind) => {
                let conf = group.epoch().conf;
                group.submit(Operation::Change { conf, change: change(*kind) }, self.tokens);
                self.tokens += 1;
            }
            Step::Campaign => group.campaign()?,
            Step::Pause(paused) => group.pause_apply(*paused),
            Step::Fetched => {
                if let Some(fetch) = self.fetch.take() {
                    let read = (self.follower.log)
                        .entries(ReplicaId(3), fetch.low, fetch.high, fetch.max_bytes)
                        .unwrap_or_default();
                    group.on_fetched(read);
                }
            }
            Step::Compact => {
                if let Some(frozen) = group.freeze() {
                    let applied = frozen.header.applied;
                    if let Some(to) = group.compact(applied) {
                        self.follower.log.compact(ReplicaId(3), to)?;
                    }
                    group.release(applied.index);
                }
            }
            Step::Transfer(to) => group.transfer(ReplicaId(*to)),
            Step::Unreachable(replica) => group.on_unreachable(ReplicaId(*replica)),
        }
        self.pump()
    }
}

proptest! {
    #[test]
    fn no_message_of_a_peer_makes_a_group_panic(others in 0..4usize, steps in vec(step(), 1..60)) {
        // Mostly of three, sometimes of two, or alone.
        let voters = &[3, 1, 2][..1 + others.min(2)];
        let mut target = Target { follower: Follower::among(voters), fetch: None, tokens: 0, answered: 0 };
        target.follower.group.sleep_after(2, 1);
        for step in &steps {
            match target.take(step) {
                Ok(()) => {}
                // What was committed can't be applied: the replica stops, as it should.
                Err(GroupError::Apply(_)) => return Ok(()),
                Err(error) => panic!("{error}"),
            }
        }
        let left = target.follower.group.abandon("the end").len() as u64;
        prop_assert_eq!(target.answered + left, target.tokens, "everyone is answered once");
        // A crash now: what is on disk can be opened, and applied. (A compacted log needs its state.)
        let log = target.follower.log;
        if log.load(ReplicaId(3)).unwrap().truncated == GROUP_START {
            let group = Follower::open(&log, voters);
            let follower = Follower::with(group, log);
            let mut target = Target { follower, fetch: None, tokens: 0, answered: 0 };
            let mut result = target.pump();
            // Each change of members waits for its record.
            while result.is_ok() && !target.follower.writes.is_empty() {
                result = target.take(&Step::Persist);
            }
            match result {
                Ok(()) => prop_assert!(!target.follower.group.recovering()),
                Err(error) => prop_assert!(matches!(error, GroupError::Apply(_)), "{}", error),
            }
        }
    }
}
