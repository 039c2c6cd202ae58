//! How a replica comes to lead, hands leadership over, and stops.
//!
//! A voter leads. One that goes away with a joint change may come to lead, while it is needed for that, and so may one
//! that has lost its state; either gives way as soon as there is another.

use raft::{ProgressState, StateRole};

use super::driver::{Group, GroupError};
use super::election::{self, Ambition};
use super::types::{Effects, LeaderChange};
use crate::ids::{Index, ReplicaId};
use crate::limits;
use crate::placement::map::MemberRole;
use crate::refusal::Refusal;

impl<T> Group<T> {
    /// Whether this replica leads its group, as far as it knows.
    pub fn leads(&self) -> bool {
        self.raft.raft.state == StateRole::Leader
    }

    /// Whether this replica leads, and has applied an entry of its own term: then it has applied whatever was acknowledged
    /// before it led (Raft dissertation, §6.4).
    pub fn is_up_to_date(&self) -> bool {
        self.leads() && self.state.header().applied.term == self.raft.raft.term
    }

    /// Up to where entries are committed, as far as this replica knows.
    pub fn committed(&self) -> Index {
        self.raft.raft.raft_log.committed
    }

    /// Begins an election now, rather than after a timeout; for a new group's first leader.
    pub fn campaign(&mut self) -> Result<(), GroupError> {
        self.disturb();
        // raft-rs would let who has no vote stand all the same.
        if !self.recovering() && !self.stays_behind() && !self.state_lost && self.raft.raft.promotable() {
            self.raft.campaign()?;
        }
        Ok(())
    }

    /// Begins to move leadership to `to`. It succeeds, or lapses after [`limits::TRANSFER_TICKS_MAX`]
    /// ([`Group::take_lapsed`]). Only a leader can: a follower would send the request on, and none is taken from others. Nothing happens if `to` is no
    /// voter, or leaves the group, or has lost its state: it wouldn't take it.
    pub fn transfer(&mut self, to: ReplicaId) {
        self.disturb();
        if self.leads() && self.may_succeed(to) {
            self.hand_over(to);
        }
    }

    fn hand_over(&mut self, to: ReplicaId) {
        let lasts = self.raft.raft.lead_transferee == Some(to.0);
        self.raft.transfer_leader(to.0);
        if !lasts && self.raft.raft.lead_transferee == Some(to.0) {
            self.handing_over = Some((to, self.ticks));
        }
    }

    /// At a tick: gives up to hand leadership over where it isn't taken in time. Whoever was told to take it may do so
    /// still, by an election like any other.
    pub(super) fn watch_transfer(&mut self) {
        let Some((heir, since)) = self.handing_over else { return };
        let lasts = self.leads() && self.raft.raft.lead_transferee == Some(heir.0);
        if lasts && self.ticks - since < limits::TRANSFER_TICKS_MAX {
            return;
        }
        self.handing_over = None;
        if lasts {
            self.raft.raft.abort_leader_transfer();
            self.lapsed = Some(heir);
        }
    }

    /// Who hasn't taken leadership that was handed to it since this was asked last, though this replica leads still.
    pub fn take_lapsed(&mut self) -> Option<ReplicaId> {
        self.lapsed.take()
    }

    /// Whether leadership can be handed to a member, as far as its role and its state go.
    ///
    /// # Errors
    /// It can't, and why.
    pub fn check_successor(&self, to: ReplicaId) -> Result<(), Refusal> {
        let why = match self.role_of(to) {
            Some(role) if role.stays_voter() => None,
            Some(MemberRole::Learner) => Some("is a learner, and has no vote"),
            Some(_) => Some("leaves the group with the change of members under way"),
            None => Some("is no member"),
        };
        if let Some(why) = why {
            return Err(Refusal::Refused(format!("replica {to} can't lead shard {}: it {why}", self.shard)));
        }
        if self.lacks_state(to) {
            return Err(Refusal::Unavailable(
                format!("replica {to} has lost its state, and fetches it from this one").into(),
            ));
        }
        Ok(())
    }

    /// Whether a member has a prospect of the whole log soon, so that it may lead: it answers, and lacks no more than
    /// may be under way to it anyhow.
    ///
    /// # Errors
    /// It hasn't, and how far it is behind.
    pub fn check_in_reach(&self, to: ReplicaId) -> Result<(), Refusal> {
        let raft = &self.raft.raft;
        let (Some(node), Some(progress)) = (self.node_of(to), raft.prs().get(to.0)) else {
            return Ok(());
        };
        if !self.catch_up.is_active(to, self.ticks) {
            let why = format!("node {node} doesn't answer the leader of shard {}", self.shard);
            return Err(Refusal::Unavailable(why.into()));
        }
        let (last, matched) = (raft.raft_log.last_index(), progress.matched);
        let follows = progress.state == ProgressState::Replicate || matched == last;
        if follows && raft.store().bytes_behind(matched) <= limits::UNCOMMITTED_BYTES_MAX as u64 {
            return Ok(());
        }
        Err(Refusal::Behind { shard: self.shard, node, entries: last.saturating_sub(matched) })
    }

    /// How far this replica is to seek leadership from now on.
    pub fn set_ambition(&mut self, ambition: Ambition) {
        if self.leads() {
            self.disturb();
        }
        self.ambition = ambition;
        self.draw_timeout();
    }

    /// Whether leadership can be handed to `replica`, were it there.
    pub(super) fn may_succeed(&self, replica: ReplicaId) -> bool {
        self.role_of(replica).is_some_and(MemberRole::stays_voter) && !self.lacks_state(replica)
    }

    /// Voters other than this one that hold everything committed, state included, and stay, best first: whom to
    /// hand leadership to.
    pub fn successors(&self) -> Vec<ReplicaId> {
        self.others(|replica| self.may_succeed(replica))
    }

    /// Others than this one that answer, and that `may`, those that have most of the log first.
    fn others(&self, may: impl Fn(ReplicaId) -> bool) -> Vec<ReplicaId> {
        let mut others: Vec<_> = (self.raft.raft.prs().iter())
            .filter(|&(&id, _)| id != self.replica.0 && may(ReplicaId(id)))
            .filter(|&(&id, _)| self.catch_up.is_active(ReplicaId(id), self.ticks))
            .map(|(&id, progress)| (std::cmp::Reverse(progress.matched), id))
            .collect();
        others.sort_unstable();
        others.into_iter().map(|(_, id)| ReplicaId(id)).collect()
    }

    /// As a leader without a state: hands leadership to a voter that has one, and the whole log; to one that stays, if
    /// there is any. As one that leaves the group: to one that stays. If it doesn't take it, another has its turn when raft has given that up.
    pub(super) fn give_way(&mut self) {
        let raft = &self.raft.raft;
        let leaves = self.role() == Some(MemberRole::Outgoing);
        if !(self.state_lost || leaves) || !self.leads() || raft.lead_transferee.is_some() {
            return;
        }
        // While leadership is being handed over nothing is proposed: if nobody takes it, callers have their turn first.
        if !self.state_lost && self.ticks < self.gives_way_at {
            return;
        }
        let last = raft.raft_log.last_index();
        let mut fit = self.successors();
        if self.state_lost {
            fit.retain(|heir| self.matched(*heir) == last);
            if fit.is_empty() {
                // Nobody has a state who stays. One who leaves can give it to them, and then gives way itself.
                let leaves = |replica| self.role_of(replica) == Some(MemberRole::Outgoing);
                fit = self.others(|replica| leaves(replica) && !self.lacks_state(replica));
                fit.retain(|heir| self.matched(*heir) == last);
            }
        } else {
            // What it lacks it gets on the way.
            let near = self.followers();
            fit.retain(|heir| near.iter().any(|follower| follower.replica == *heir && follower.caught_up));
        }
        let turn = self.ticks / limits::ELECTION_TICKS_MIN as u64;
        if let Some(heir) = turn.checked_rem(fit.len() as u64).and_then(|turn| fit.get(turn as usize)) {
            self.gives_way_at = self.ticks + limits::GIVE_WAY_TICKS;
            self.hand_over(*heir);
        }
    }

    /// Notices who leads, and sends away whom it can't serve any more.
    pub(super) fn follow_leadership(&mut self, effects: &mut Effects<T>) {
        let raft = &self.raft.raft;
        let now = LeaderChange {
            term: raft.term,
            leader: (raft.leader_id != 0).then_some(ReplicaId(raft.leader_id)),
            local: raft.state == StateRole::Leader,
        };
        if now != self.leader {
            if self.leader.local && !now.local {
                // While older proposals wait, theirs is the time that counts.
                if self.stepped_down.is_none() || !self.proposals.any_below(self.leader.term) {
                    self.stepped_down = Some(self.ticks);
                }
            }
            self.leader = now;
            self.catch_up.reset();
            if now.local {
                let others = self.raft.raft.prs().iter().map(|(id, _)| ReplicaId(*id));
                let others = others.filter(|id| *id != self.replica);
                self.catch_up.begin(others, self.raft.raft.raft_log.store(), self.ticks);
            }
            effects.leader = Some(now);
        }
        let waiting = !self.queued.is_empty() || !self.marks.is_empty() || !self.reads.is_empty();
        if !now.local && waiting {
            let refusal = self.not_leader();
            let queued = self.queued.drain().into_iter().chain(std::mem::take(&mut self.marks));
            let reads = self.reads.drain().into_iter().map(|(token, _)| token);
            self.done.extend(queued.chain(reads).map(|token| (token, Err(refusal.clone()))));
        }
    }

    /// A leader that isn't counted any more stops at once: raft-rs would go on, and panic when it counts what
    /// is on its own disk. It hastens the election of the next.
    pub(super) fn step_down_if_removed(&mut self) {
        if !self.leads() || self.role().is_some_and(MemberRole::votes) {
            return;
        }
        let last = self.raft.raft.raft_log.last_index();
        if let Some(heir) = self.successors().into_iter().find(|heir| self.matched(*heir) == last) {
            self.raft.raft.send_timeout_now(heir.0);
        }
        let term = self.raft.raft.term;
        self.raft.raft.become_follower(term, raft::INVALID_ID);
    }

    /// So much is committed and not applied that this replica begins no election: as a leader it
    /// could serve nobody for long, and raft-rs would read all of that at once, looking for
    /// changes of membership in it. What isn't known to be committed doesn't count, however much it is: only a
    /// leader can commit it, so whoever waited for that would wait for ever.
    fn backlogged(&self) -> bool {
        let (log, committed) = (self.raft.store(), self.raft.raft.raft_log.committed);
        let behind = log.bytes_behind(self.done_to()).saturating_sub(log.bytes_behind(committed));
        behind > limits::CAMPAIGN_BACKLOG_BYTES_MAX
    }

    /// Whether it must not come to lead.
    pub(super) fn stays_behind(&self) -> bool {
        self.ambition == Ambition::None || self.backlogged() || self.awaits_its_log()
    }

    /// Whether it takes leadership that is handed to it.
    pub(super) fn takes_leadership(&self) -> bool {
        !self.stays_behind() && !self.state_lost && !self.is_held_up()
    }

    /// Whether this replica is the only voter, by a change of members, and entries of the leader before are on their
    /// way to its disk. raft-rs would have it lead at once, for want of anybody to ask, and takes it for granted
    /// that its log is durable.
    fn awaits_its_log(&self) -> bool {
        let log = &self.raft.raft.raft_log;
        log.last_index() > log.persisted && self.is_only_voter()
    }

    /// The refusal that sends a caller to the leader.
    pub fn not_leader(&self) -> Refusal {
        let leader = ReplicaId(self.raft.raft.leader_id);
        let leader = (leader != self.replica).then(|| self.node_of_any(leader)).flatten();
        Refusal::NotLeader { shard: self.shard, leader }
    }

    pub(super) fn draw_timeout(&mut self) {
        // raft-rs draws at random whenever it resets, within a term too; ours is put back after every input.
        let term = self.raft.raft.term;
        if self.timeout.0 != term {
            let voters = self.members().iter().filter(|m| m.role.votes()).map(|m| m.replica);
            let rank = election::rank(self.replica, voters);
            self.timeout = (term, election::timeout_ticks(self.shard, term, rank));
        }
        // Who stays behind gets one that its ticks don't reach.
        let late = match self.ambition {
            _ if self.state_lost => election::LOST_TICKS,
            _ if self.stays_behind() || self.is_held_up() => election::LAST_TICKS,
            Ambition::Usual if self.role() != Some(MemberRole::Outgoing) => 0,
            _ => election::LAST_TICKS,
        };
        if self.raft.raft.randomized_election_timeout() != self.timeout.1 + late {
            self.raft.raft.set_randomized_election_timeout(self.timeout.1 + late);
        }
    }
}
