//! Changes of a group's members.
//!
//! ```text
//!  asked of the leader ─► checked ─► in the log ─► committed ─► recorded ─► in force ─► told
//!                                                                  │
//!                          commit index and members durable here, before anything else happens
//! ```
//!
//! *What an entry says.* Its context names all members after it, with their roles, and the conf version that it
//! follows on ([`crate::codec::membership`]). The roles say everything: the configuration that raft counts by, and
//! what raft is told of the change (`steps`), are made of them, and what raft makes of it is held against
//! them. raft's own encoding of a change lies in the entry's data for its checks at the leader, and is never read.
//!
//! *One at a time.* A change is proposed only when the one before is in force at the leader, so the conf version
//! it follows on is that of the state to which it is applied. A leader takes everything in its log before its term for
//! a change that isn't.
//!
//! *Joint changes.* Voters change through a joint configuration, in which a decision takes a majority of the voters
//! before and of those after. Learners come and go without: they count nowhere. A joint change ends by an
//! entry of its own, which whoever leads proposes as soon as the change is in force. Not a leader that goes away
//! with it: that one hands leadership to a voter that stays. If it comes to lead nevertheless, because it has that
//! entry and nobody else was elected, it stops leading when that is in force.
//!
//! *The barrier.* A replica that was started again must not go by members that it has gone beyond before: it could elect or
//! be elected by a majority that is none. So before a change is in force, a hard state is durable that
//! says it is committed, whereupon a start re-applies it before anything else, and with it in one write the members as
//! of then, in the replica's record: a replica that has lost its state begins with those ([`super::lost`]).
//! As nothing is compacted that isn't applied, no change is compacted that isn't recorded.
//!
//! *Newcomers.* A replica that is created for a group that exists knows no members, and its log begins before any
//! group's, so that it gets a snapshot first. Until then it votes for whom it is asked to vote for, as any replica does
//! (it is asked by those who count it), and never stands for election.

use std::collections::BTreeMap;

use raft::eraftpb::{ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState, Entry};
use raft::{ProgressState, StateRole};

use super::driver::{Group, GroupError, Unpersisted, busy};
use super::types::{Effects, FollowerStatus, MembershipChange, NumberedWrite, Output};
use crate::codec::membership::{self, MembershipEntry};
use crate::failpoints::failpoint;
use crate::ids::{Epoch, Index, NodeId, Position, ReplicaId, Term};
use crate::limits;
use crate::machine::ApplyError;
use crate::placement::map::{Member, MemberRole, is_quorum};
use crate::placement::members::Members;
use crate::refusal::Refusal;
use crate::storage::log::{LogWrite, RecordedMembership};
use crate::storage::state::conf_state_of;

/// A committed change of members that waits for its record.
pub(super) struct Barrier {
    record: RecordedMembership,
    /// The write that has it, once that is handed out.
    write: Option<u64>,
}

impl Barrier {
    /// Of the change.
    pub(super) fn index(&self) -> Index {
        self.record.index
    }
}

impl<T> Group<T> {
    // ---------------------------------------------------------------------------------- proposing

    /// Proposes the changes that were asked for, or says why not. None of them waits.
    pub(super) fn propose_changes(&mut self) {
        for (token, conf, change) in std::mem::take(&mut self.changes) {
            match self.begin_change(conf, &change) {
                Ok(position) => self.proposals.insert(position, vec![token]),
                Err(refusal) => self.done.push((token, Err(refusal))),
            }
        }
    }

    fn begin_change(&mut self, conf: u64, change: &MembershipChange) -> Result<Position, Refusal> {
        if !self.leads() {
            return Err(self.not_leader());
        }
        let known = self.epoch().conf;
        if conf != known {
            return Err(Refusal::Refused(format!(
                "stale: shard {} has conf version {known}, the change was for {conf}",
                self.shard
            )));
        }
        if is_joint(self.members()) {
            return Err(unavailable("a joint change of the members has not ended yet"));
        }
        if !self.is_settled() {
            return Err(unavailable("an earlier change of the members may not be in force yet"));
        }
        let members = next_members(self.members(), change).map_err(Refusal::Refused)?;
        if let MembershipChange::Exchange { promote, remove } = change {
            if remove.contains(&self.replica) {
                return Err(unavailable(format!(
                    "replica {} leads; it has to hand leadership over before it is removed",
                    self.replica
                )));
            }
            self.check_exchange(promote, &members)?;
        }
        let position = self.propose_members(members)?;
        failpoint!(ChangeProposed, self.replica);
        Ok(position)
    }

    /// Whether every change of members in the log is in force, and the leader knows that.
    fn is_settled(&self) -> bool {
        self.raft.raft.commit_to_current_term()
            && !self.raft.raft.has_pending_conf()
            && self.barrier.is_none()
    }

    /// Whether the group goes on serving while the change is under way, and afterwards.
    fn check_exchange(&self, promote: &[ReplicaId], members: &[Member]) -> Result<(), Refusal> {
        let followers: BTreeMap<ReplicaId, FollowerStatus> =
            self.followers().into_iter().map(|status| (status.replica, status)).collect();
        for replica in promote {
            let reason = match followers.get(replica) {
                Some(status) if status.caught_up => continue,
                Some(status) if !status.active => "does not answer".into(),
                _ if self.lacks_state(*replica) => "has lost its state".into(),
                Some(status) => {
                    let last = self.raft.raft.raft_log.last_index();
                    format!("is not caught up: it has entries up to {} of {last}", status.matched)
                }
                None => "is no member".into(),
            };
            return Err(unavailable(format!("replica {replica} {reason}")));
        }
        let is_active = |member: &Member| {
            member.replica == self.replica || followers.get(&member.replica).is_some_and(|f| f.active)
        };
        if is_quorum(members, is_active) {
            return Ok(());
        }
        let silent = members.iter().filter(|m| m.role.votes() && !is_active(m));
        let silent: Vec<_> = silent.map(|m| m.replica.to_string()).collect();
        Err(unavailable(format!(
            "the voters before the change or those after it could not decide: no answer of replica {}",
            silent.join(", ")
        )))
    }

    /// Puts the change to `members` into the log.
    fn propose_members(&mut self, members: Vec<Member>) -> Result<Position, Refusal> {
        let steps = steps(self.members(), &members).map_err(Refusal::Refused)?;
        let entry = MembershipEntry { conf: self.epoch().conf, members };
        let index = self.raft.raft.raft_log.last_index() + 1;
        // raft would put an empty entry in its place.
        assert!(!self.raft.raft.has_pending_conf(), "one change of members at a time");
        // Leadership is moving, or too much is uncommitted.
        let refuse = |_| busy("uncommitted entries of the shard");
        self.raft.propose_conf_change(membership::encode(&entry), for_proposal(steps)).map_err(refuse)?;
        assert_eq!(self.raft.raft.raft_log.last_index(), index, "a change is one entry");
        Ok(Position { index, term: self.raft.raft.term })
    }

    /// Ends a joint change that is in force, if this replica leads and stays.
    pub(super) fn leave_joint(&mut self) {
        if !self.may_leave_joint() {
            return;
        }
        let members = without_joint(self.members());
        match self.propose_members(members) {
            Ok(_) => {
                failpoint!(ChangeLeaves, self.replica);
            }
            // Tried again with the next tick.
            Err(refusal) => {
                tracing::debug!(shard = %self.shard, %refusal, "a joint change can't be ended yet")
            }
        }
    }

    /// Whether it is for this replica to end a joint change, and can be done.
    pub(super) fn may_leave_joint(&self) -> bool {
        self.leads()
            && !self.state_lost
            && self.role().is_some_and(MemberRole::stays_voter)
            && is_joint(self.members())
            && self.is_settled()
            && self.raft.raft.lead_transferee.is_none()
    }

    // ----------------------------------------------------------------------------------- applying

    /// Whether the committed change in the entry at `index` may take effect. If not, its record is on its way to
    /// the disk, or is about to be.
    fn is_recorded(&mut self, index: Index, entry: &MembershipEntry) -> bool {
        if index <= self.recorded {
            return true;
        }
        if self.barrier.as_ref().is_none_or(|barrier| barrier.record.index != index) {
            failpoint!(ChangeCommitted, self.replica);
            let mut epoch = self.epoch();
            epoch.conf = entry.conf.saturating_add(1);
            let record = RecordedMembership { index, epoch, members: entry.members.clone() };
            self.barrier = Some(Box::new(Barrier { record, write: None }));
        }
        false
    }

    /// Has the members that a barrier is about written, with the commit index that covers them.
    pub(super) fn write_barrier(&mut self, effects: &mut Effects<T>) {
        let Some(barrier) = self.barrier.as_mut().filter(|barrier| barrier.write.is_none()) else { return };
        let (writes, replica) = (&mut self.writes, self.replica);
        let hard_state = self.raft.raft.hard_state();
        assert!(hard_state.commit >= barrier.record.index, "only what is committed is handed out");
        let unpersisted = &mut self.unpersisted;
        let numbered = effects.write.get_or_insert_with(|| {
            *writes += 1;
            // Of no ready: those before it wait for their own writes, or are done.
            let term = hard_state.term;
            unpersisted.push_back(Unpersisted {
                ready: 0,
                write: *writes,
                entries: None,
                term,
                messages: Vec::new(),
            });
            let write = LogWrite { replica, entries: Vec::new(), hard_state: None, membership: None };
            NumberedWrite { number: *writes, write }
        });
        numbered.write.hard_state = Some(hard_state);
        numbered.write.membership = Some(barrier.record.clone());
        barrier.write = Some(numbered.number);
    }

    /// The write of this number, and all before it, are durable.
    pub(super) fn pass_barrier(&mut self, number: u64) {
        if let Some(barrier) = &self.barrier
            && barrier.write.is_some_and(|write| write <= number)
        {
            self.recorded = barrier.record.index;
            self.barrier = None;
            failpoint!(ChangeRecorded, self.replica);
        }
    }

    /// Carries out a committed change of members, if it is recorded. False: it isn't yet.
    pub(super) fn apply_change(&mut self, entry: &Entry) -> Result<bool, GroupError> {
        let position = Position { index: entry.index, term: entry.term };
        self.applying = Some(position.index);
        let change = membership::decode(&entry.context).map_err(|e| bad_change(position, e.to_string()))?;
        let known = self.epoch().conf;
        // A state that was never flushed begins with the members of the replica's record, which are later ones.
        let is_included = change.conf < known && position.index <= self.recover_to;
        if change.conf != known && !is_included {
            let reason = format!("it follows on conf version {}, not on {known}", change.conf);
            return Err(bad_change(position, reason));
        }
        if is_included {
            self.ahead_to = position.index;
        } else {
            let steps =
                steps(self.members(), &change.members).map_err(|reason| bad_change(position, reason))?;
            if !self.is_recorded(position.index, &change) {
                self.applying = None;
                return Ok(false);
            }
            self.put_in_force(change, steps).map_err(|reason| bad_change(position, reason))?;
        }
        if !self.state_lost {
            self.state.set_applied(position);
        }
        self.applying = None;
        failpoint!(ChangeApplied, self.replica);
        let decided = self.proposals.decide(position);
        let conf = self.epoch().conf;
        self.done.extend(decided.applied.into_iter().map(|token| (token, Ok(Output::Changed(conf)))));
        self.done.extend(decided.superseded.into_iter().map(|t| (t, Err(Refusal::Superseded))));
        Ok(true)
    }

    fn put_in_force(&mut self, change: MembershipEntry, steps: Vec<ConfChangeV2>) -> Result<(), String> {
        for step in steps {
            self.raft.apply_conf_change(&step).map_err(|error| error.to_string())?;
        }
        let (expected, found) = (conf_state_of(&change.members), self.raft.raft.prs().conf().to_conf_state());
        if !is_same(&expected, &found) {
            return Err(format!("raft has come to {found:?}, not to {expected:?}"));
        }
        let mut epoch = self.epoch();
        epoch.conf = change.conf.saturating_add(1);
        tracing::info!(shard = %self.shard, replica = %self.replica, conf = epoch.conf, members = %Members(&change.members), "the members have changed");
        self.state.set_membership(epoch, change.members);
        let is_member = |replica: ReplicaId| self.state.header().members.iter().any(|m| m.replica == replica);
        self.strangers.retain(|replica| !is_member(replica));
        self.confs.retain(is_member);
        self.catch_up.retain(is_member);
        self.beats.retain(is_member);
        self.step_down_if_removed();
        // Ranks are others.
        self.timeout.0 = Term::MAX;
        self.draw_timeout();
        Ok(())
    }

    // ------------------------------------------------------------------------------------ queries

    /// The members, as applied here.
    pub fn members(&self) -> &[Member] {
        &self.state.header().members
    }

    /// The role of this replica; `None` if it isn't a member (yet, or any more).
    pub fn role(&self) -> Option<MemberRole> {
        self.role_of(self.replica)
    }

    pub(super) fn role_of(&self, replica: ReplicaId) -> Option<MemberRole> {
        self.members().iter().find(|m| m.replica == replica).map(|m| m.role)
    }

    /// How far the others are, if this replica leads; by id.
    pub(super) fn followers(&self) -> Vec<FollowerStatus> {
        if self.raft.raft.state != StateRole::Leader {
            return Vec::new();
        }
        let (last, log) = (self.raft.raft.raft_log.last_index(), self.raft.store());
        let mut followers: Vec<_> = (self.raft.raft.prs().iter())
            .filter(|&(&id, _)| id != self.replica.0)
            .map(|(&id, progress)| {
                let (replica, matched) = (ReplicaId(id), progress.matched);
                let active = self.catch_up.is_active(replica, self.ticks);
                // How large the entries are that were there at the start isn't known.
                let is_near = last.saturating_sub(matched) <= limits::CAUGHT_UP_ENTRIES_MAX
                    && log.bytes_behind(matched) <= limits::CAUGHT_UP_BYTES_MAX;
                // One that has everything is sent nothing, in whatever state a lost message has left its progress.
                let follows = progress.state == ProgressState::Replicate || matched == last;
                let caught_up = active && is_near && follows && !self.lacks_state(replica);
                FollowerStatus { replica, matched, active, caught_up }
            })
            .collect();
        followers.sort_unstable_by_key(|status| status.replica);
        followers
    }

    /// Whether nobody else than the members is needed any more, whatever happens: a majority of the voters has the
    /// present members in force, durably, as it has said. Those who left with a joint change may go for good only then.
    ///
    /// A leader that is alone with that may end for good before anybody hears of it. Those who are left would still
    /// take the change for one that hasn't ended, and could elect nobody without the voters of before it. If a majority
    /// knows, one who does is left together with any majority, and tells the others with the next election.
    pub fn members_are_known(&self) -> bool {
        let conf = self.epoch().conf;
        let knows = |member: &Member| {
            member.replica == self.replica
                || self.confs.get(member.replica).is_some_and(|known| *known >= conf)
        };
        is_joint(self.members()) || is_quorum(self.members(), knows)
    }

    /// A replica has written, and said which members it has in force.
    pub(super) fn hear_conf(&mut self, from: ReplicaId, epoch: Epoch) {
        if self.node_of(from).is_some() {
            let known = self.confs.or_insert(from, 0);
            *known = epoch.conf.max(*known);
        }
    }

    /// Remembers from where a replica writes that is no member as far as known here: it may be one already, or
    /// this one may be a newcomer that knows nobody.
    pub(super) fn remember_stranger(&mut self, replica: ReplicaId, node: NodeId) {
        if node == NodeId::default() || self.node_of(replica).is_some() {
            return;
        }
        if self.strangers.len() >= limits::MEMBERS_MAX && !self.strangers.contains(replica) {
            self.strangers.clear();
        }
        self.strangers.insert(replica, node);
    }

    /// The node of a member, or of another replica that has written.
    pub(super) fn node_of_any(&self, replica: ReplicaId) -> Option<NodeId> {
        self.node_of(replica).or_else(|| self.strangers.get(replica).copied())
    }
}

fn bad_change(at: Position, reason: String) -> GroupError {
    ApplyError::Membership { index: at.index, reason }.into()
}

fn unavailable(reason: impl Into<std::borrow::Cow<'static, str>>) -> Refusal {
    Refusal::Unavailable(reason.into())
}

/// Whether `members` are in the middle of a joint change.
pub(super) fn is_joint(members: &[Member]) -> bool {
    members.iter().any(|m| matches!(m.role, MemberRole::Incoming | MemberRole::Outgoing))
}

/// The members when the joint change has ended.
pub(super) fn without_joint(members: &[Member]) -> Vec<Member> {
    let stays = members.iter().filter(|m| m.role != MemberRole::Outgoing);
    stays.map(|m| if m.role.stays_voter() { Member { role: MemberRole::Voter, ..*m } } else { *m }).collect()
}

/// The members after `change`; those who stay keep their places. The error says which rule it breaks.
pub(super) fn next_members(members: &[Member], change: &MembershipChange) -> Result<Vec<Member>, String> {
    let mut after = members.to_vec();
    let role_of = |replica| members.iter().find(|m| m.replica == replica).map(|m| m.role);
    match change {
        MembershipChange::AddLearners(learners) => {
            for Member { replica, node, .. } in learners {
                if replica.0 == 0 || replica.0 == u64::MAX || node.0 == 0 {
                    return Err(format!("there can be no replica {replica} on node {node}"));
                }
                match after.iter().find(|m| m.replica == *replica || m.node == *node) {
                    Some(m) if (m.replica, m.node) == (*replica, *node) => continue,
                    Some(m) => {
                        let (held, holder) = (m.replica, m.node);
                        return Err(format!(
                            "replica {replica} can't be added on node {node}: replica {held} is on node {holder}"
                        ));
                    }
                    None => {}
                }
                after.push(Member { replica: *replica, node: *node, role: MemberRole::Learner });
            }
        }
        MembershipChange::Exchange { promote, remove } => {
            if promote.is_empty() && remove.is_empty() {
                return Err("a joint change of nothing".into());
            }
            for (replicas, from, to, rule) in [
                (promote, MemberRole::Learner, MemberRole::Incoming, "only a learner becomes a voter"),
                (remove, MemberRole::Voter, MemberRole::Outgoing, "only a voter goes with a joint change"),
            ] {
                for replica in replicas {
                    let place = after.iter_mut().find(|m| m.replica == *replica && m.role == from);
                    let Some(member) = place else {
                        let is = match role_of(*replica) {
                            None => "no member",
                            Some(MemberRole::Learner) => "a learner",
                            Some(_) => "a voter",
                        };
                        return Err(format!("replica {replica} is {is}; {rule}"));
                    };
                    member.role = to;
                }
            }
            if !after.iter().any(|m| m.role.stays_voter()) {
                return Err("no voter would be left".into());
            }
        }
        MembershipChange::RemoveLearners(learners) => {
            if let Some(replica) = learners.iter().find(|r| role_of(**r).is_some_and(MemberRole::votes)) {
                return Err(format!("replica {replica} is no learner, it votes"));
            }
            after.retain(|m| !learners.contains(&m.replica));
        }
    }
    if after.len() > limits::MEMBERS_MAX {
        return Err(format!("{} members are more than {}", after.len(), limits::MEMBERS_MAX));
    }
    Ok(after)
}

/// What raft is to be told to come from the members `before` to those `after`, one step after the other; the
/// error says why no change leads there. Several learners take several steps, since raft-rs makes a joint change of
/// what is more than one; each of them leaves the voters as they are, so it is safe to take them at once.
pub(super) fn steps(before: &[Member], after: &[Member]) -> Result<Vec<ConfChangeV2>, String> {
    use MemberRole::{Incoming, Learner, Outgoing, Voter};
    let single = |kind, replica: ReplicaId| {
        let mut single = ConfChangeSingle { node_id: replica.0, ..ConfChangeSingle::default() };
        single.set_change_type(kind);
        single
    };
    if is_joint(before) {
        let ends = !is_joint(after) && after == without_joint(before);
        return if ends {
            Ok(vec![ConfChangeV2::default()])
        } else {
            Err("it doesn't end the joint change".into())
        };
    }
    let joint = is_joint(after);
    let mut singles = Vec::new();
    for old in before {
        let new = after.iter().find(|m| m.replica == old.replica);
        let kind = match (old.role, new.map(|m| m.role)) {
            (Voter, Some(Voter)) | (Learner, Some(Learner)) => None,
            (Learner, Some(Incoming)) => Some(ConfChangeType::AddNode),
            (Voter, Some(Outgoing)) => Some(ConfChangeType::RemoveNode),
            (Learner, None) if !joint => Some(ConfChangeType::RemoveNode),
            (from, to) => return Err(format!("replica {} can't go from {from:?} to {to:?}", old.replica)),
        };
        if new.is_some_and(|new| new.node != old.node) {
            return Err(format!("replica {} can't go to another node", old.replica));
        }
        singles.extend(kind.map(|kind| single(kind, old.replica)));
    }
    for new in after.iter().filter(|new| before.iter().all(|m| m.replica != new.replica)) {
        if joint || new.role != Learner {
            return Err(format!("replica {} can't begin as {:?}", new.replica, new.role));
        }
        singles.push(single(ConfChangeType::AddLearnerNode, new.replica));
    }
    if !after.iter().any(|m| m.role.stays_voter()) {
        return Err("no voter is left".into());
    }
    if joint {
        let mut change = ConfChangeV2 { changes: singles.into(), ..ConfChangeV2::default() };
        change.set_transition(ConfChangeTransition::Explicit);
        return Ok(vec![change]);
    }
    let alone = |single| ConfChangeV2 { changes: vec![single].into(), ..ConfChangeV2::default() };
    Ok(singles.into_iter().map(alone).collect())
}

/// `steps` in the one form that raft takes for its checks when they are proposed: it only looks whether a joint
/// change is begun or ended. A change of nothing must not look like the end of one: it names replica 0, which is none.
fn for_proposal(steps: Vec<ConfChangeV2>) -> ConfChangeV2 {
    let mut all = ConfChangeV2::default();
    if steps.is_empty() {
        all.mut_changes().push(ConfChangeSingle::default());
    }
    for mut step in steps {
        all.set_transition(step.get_transition());
        step.take_changes().into_iter().for_each(|single| all.mut_changes().push(single));
    }
    all
}

/// Whether both count alike. raft lists ids in no order.
pub(super) fn is_same(one: &ConfState, other: &ConfState) -> bool {
    let sorted = |ids: &[u64]| {
        let mut ids = ids.to_vec();
        ids.sort_unstable();
        ids
    };
    let all = |state: &ConfState| {
        let lists = [&state.voters, &state.voters_outgoing, &state.learners, &state.learners_next];
        (lists.map(|ids| sorted(ids)), state.auto_leave)
    };
    all(one) == all(other)
}
