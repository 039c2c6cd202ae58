//! What a replica does when the process in which its leader ran is gone: it doesn't wait for an election timeout.
//!
//! ```text
//!   the connection to a node ends, its port refuses the next, and none of its own is open here
//!        │                                         (or whoever answers there is another process)
//!   every group whose leader was there forgets it, and its voters campaign in turn:
//!        first at once ─► second after VACANT_TICKS ─► third … until somebody leads; or who has most of the log, when
//!                                                       another asks with less of it
//! ```
//!
//! *Why that is safe, also if the process lives after all* (a firewall, an address that has changed hands, a listener that has
//! closed). Nothing is promised to a leader but what is on disk here, and none of that is forgotten: the term, the vote
//! and the log stay as they are. What is forgotten is who leads, and with it that for an election timeout nobody else is given a
//! pre-vote: that is a courtesy, by which nodes that come and go don't disturb a leader, and no lease. Leaders have none: a
//! read waits for a round of heartbeats that a majority has answered in the leader's term, and a write for a majority's disks
//! ([`super::reads`]). So a leader that is alive and wrongly taken for dead by a majority loses its next election as it would by
//! [`Group::campaign`], and answers nobody with what is old. Invariant: *no answer of a leader depends on how long ago others
//! have heard it.* Who adds a lease of reads breaks it, and has to have followers wait here for what is left of the lease.
//!
//! *Why it does little harm then.* The candidate asks for pre-votes first. Who still hears the leader gives none, and
//! the leader's next heartbeat ends the attempt. Nobody's term has risen.
//!
//! *Why a process that ends again and again causes no storm.* There is something to forget only where it leads, and to lead
//! it has to be elected first. An alarm is told once for each process ([`super::nodes`]), and a vacancy lasts for
//! [`ELECTION_TICKS_MAX`] ticks at most; behind that are the usual timeouts.
//!
//! Not here: whether a process is gone. [`crate::node`] decides it, and nothing that matters is lost if it is wrong.

use raft::StateRole;
use raft::eraftpb::{Message, MessageType};

use super::driver::{Group, GroupError};
use super::election;
use crate::ids::{NodeId, ReplicaId, Term};
use crate::limits::{ELECTION_TICKS_MAX, ELECTION_TICKS_MIN, VACANT_TICKS};

/// A request for a pre-vote that came while the leader was thought to be there isn't looked at again after so many ticks.
const EARLY_TICKS_MAX: u64 = 2;

/// Of a replica: see the module page.
#[derive(Default)]
pub(super) struct Vacancy {
    /// The term whose leader is gone, and the tick at which that is news no more.
    open: Option<(Term, u64)>,
    /// Who asked for a pre-vote before this replica had heard that the leader is gone, and the tick at which.
    early: Option<Box<(u64, Message)>>,
}

impl Vacancy {
    /// A request that came too long before tick `now` to be looked at again needn't be kept.
    pub(super) fn forget_old(&mut self, now: u64) {
        self.early.take_if(|early| now - early.0 > EARLY_TICKS_MAX);
    }
}

impl<T> Group<T> {
    /// The process in which the leader ran is gone, if that was on this node. Returns whether it was.
    ///
    /// # Errors
    /// Those of [`Group::campaign`].
    pub fn leader_is_gone(&mut self, node: NodeId) -> Result<bool, GroupError> {
        let raft = &self.raft.raft;
        let leader = ReplicaId(raft.leader_id);
        let follows = raft.state == StateRole::Follower && raft.leader_id != raft::INVALID_ID;
        if !follows || self.is_asleep() || self.node_of(leader) != Some(node) {
            return Ok(false);
        }
        let (term, vote) = (self.raft.raft.term, self.raft.raft.vote);
        self.raft.raft.leader_id = raft::INVALID_ID;
        self.vacancy.open = Some((term, self.ticks + ELECTION_TICKS_MAX as u64));
        self.draw_timeout();
        // Who isn't fit to lead has its window behind the others'.
        self.raft.raft.election_elapsed = self.raft.raft.election_elapsed.max(ELECTION_TICKS_MIN);
        if self.may_stand() {
            match self.turn(leader) {
                Some(0) => self.stand()?,
                Some(turn) => self.stand_in(turn * VACANT_TICKS),
                None => {}
            }
        }
        if let Some(early) = self.vacancy.early.take()
            && self.ticks - early.0 <= EARLY_TICKS_MAX
            && early.1.term > term
        {
            let asked = early.1;
            let of = position(&asked);
            self.raft.step(asked)?;
            self.answer_with_more(of)?;
        }
        assert!(
            self.raft.raft.term == term && self.raft.raft.vote == vote || self.is_only_voter(),
            "what is promised stays"
        );
        Ok(true)
    }

    /// A message is about to be handed to raft, which takes no notice of it if it asks for a pre-vote while there is a leader.
    pub(super) fn keep_early(&mut self, message: &Message) {
        if message.get_msg_type() == MessageType::MsgRequestPreVote
            && self.raft.raft.leader_id != raft::INVALID_ID
            && !self.leads()
        {
            self.vacancy.early = Some(Box::new((self.ticks, message.clone())));
        }
    }

    /// Another has asked for a pre-vote whose log ends at `of`. If this replica has more of the log it can't give
    /// it: then it asks itself, whoever's turn it is.
    pub(super) fn answer_with_more(&mut self, of: (Term, u64)) -> Result<(), GroupError> {
        let log = &self.raft.raft.raft_log;
        let more = (log.last_term(), log.last_index()) > of;
        let waits = self.is_vacant() && self.raft.raft.state == StateRole::Follower;
        if more && waits && self.may_stand() { self.stand() } else { Ok(()) }
    }

    /// After a tick: whoever hasn't got enough pre-votes asks again when all have had their turn, since the others may
    /// not have heard of the vacancy when it asked first.
    pub(super) fn stand_again(&mut self) {
        let raft = &self.raft.raft;
        if raft.state == StateRole::PreCandidate && raft.election_elapsed == 0 && self.is_vacant() {
            self.stand_in(self.round());
        }
    }

    /// Whether the leader is gone, since a moment ago, and nobody leads yet.
    fn is_vacant(&self) -> bool {
        let raft = &self.raft.raft;
        let is_open = |(term, until)| term == raft.term && self.ticks < until;
        raft.leader_id == raft::INVALID_ID && self.vacancy.open.is_some_and(is_open)
    }

    /// Whether this replica may lead like any other.
    fn may_stand(&self) -> bool {
        self.takes_leadership() && !self.recovering() && self.raft.raft.promotable()
    }

    fn stand(&mut self) -> Result<(), GroupError> {
        self.campaign()?;
        self.stand_in(self.round());
        Ok(())
    }

    /// Begins an election after so many ticks, if nobody leads by then.
    fn stand_in(&mut self, ticks: usize) {
        let raft = &mut self.raft.raft;
        if matches!(raft.state, StateRole::Follower | StateRole::PreCandidate) {
            raft.election_elapsed = raft.randomized_election_timeout().saturating_sub(ticks);
        }
    }

    /// Ticks in which each voter but the leader has its turn.
    fn round(&self) -> usize {
        let voters = self.members().iter().filter(|member| member.role.votes()).count();
        voters.saturating_sub(1).max(1) * VACANT_TICKS
    }

    /// The turn of this replica among the voters but the leader; none, if it is no voter. The order is that of the timeouts
    /// of the term, so it is another in each group, and all replicas know it.
    fn turn(&self, leader: ReplicaId) -> Option<usize> {
        let mut voters: Vec<_> =
            self.members().iter().filter(|member| member.role.votes()).map(|m| m.replica).collect();
        voters.sort_unstable();
        let term = self.raft.raft.term;
        let mut order: Vec<_> = (voters.iter().enumerate())
            .filter(|(_, replica)| **replica != leader)
            .map(|(rank, replica)| (election::timeout_ticks(self.shard, term, rank), *replica))
            .collect();
        order.sort_unstable();
        order.iter().position(|(_, replica)| *replica == self.replica)
    }
}

/// Where the log of whoever asks for a vote ends.
pub(super) fn position(asked: &Message) -> (Term, u64) {
    (asked.log_term, asked.index)
}
