//! Who belongs to a shard, as its committed entries tell, and what must hold of it.
//!
//! A change of the members is in force at a replica once it has applied the entry. A leader may commit
//! entries behind a change before that, under the members before it; but it proposes the next change only
//! under the one before. So an entry is committed under the members that the last change before it made,
//! or under those before that change; and both of them have a majority that holds it if the weaker of the
//! two does, since a joint change lies between any two sets of voters.

use std::collections::{BTreeMap, BTreeSet};

use super::Violation;
use crate::ids::{GROUP_START, Index, NodeId, ReplicaId, ShardId};
use crate::placement::map::{Member, MemberRole};

/// Whether those members for whom `is` holds can decide without the others: they are a majority of the
/// voters, in both configurations during a joint change.
pub fn majority(members: &[Member], is: impl Fn(&Member) -> bool) -> bool {
    let of = |alone: MemberRole| {
        let voters = members.iter().filter(|m| m.role == MemberRole::Voter || m.role == alone);
        let (all, yes) = voters.fold((0, 0), |(all, yes), m| (all + 1, yes + usize::from(is(m))));
        yes > all / 2
    };
    of(MemberRole::Incoming) && of(MemberRole::Outgoing)
}

/// Whether a joint change is under way.
pub fn is_joint(members: &[Member]) -> bool {
    members.iter().any(|m| matches!(m.role, MemberRole::Incoming | MemberRole::Outgoing))
}

/// The members from one entry on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Configuration {
    /// The entry.
    pub index: Index,
    /// The conf version.
    pub conf: u64,
    /// The members.
    pub members: Vec<Member>,
}

/// All members that one shard ever had.
#[derive(Default)]
pub struct Members {
    /// In the order of the log. Empty only until the shard is placed.
    all: Vec<Configuration>,
    /// Who was a member once, and where.
    ever: BTreeMap<ReplicaId, NodeId>,
}

impl Members {
    /// Those of a new shard.
    pub fn first(conf: u64, members: Vec<Member>) -> Members {
        let ever = members.iter().map(|m| (m.replica, m.node)).collect();
        Members { all: vec![Configuration { index: GROUP_START.index, conf, members }], ever }
    }

    /// The newest that anybody has applied.
    pub fn newest(&self) -> Option<&Configuration> {
        self.all.last()
    }

    /// In force behind entry `index`.
    pub fn at(&self, index: Index) -> Option<&Configuration> {
        let next = self.all.partition_point(|c| c.index <= index);
        self.all.get(next.checked_sub(1)?)
    }

    /// Those of a conf version.
    pub fn of_conf(&self, conf: u64) -> Option<&Configuration> {
        self.all.iter().find(|c| c.conf == conf)
    }

    /// Whether a replica is or was a member.
    pub fn had(&self, replica: ReplicaId) -> bool {
        self.ever.contains_key(&replica)
    }

    /// How often they have changed.
    pub fn changes(&self) -> u64 {
        self.all.len().saturating_sub(1) as u64
    }

    /// Entry `index` is committed, and makes these the members.
    pub fn change(
        &mut self,
        shard: ShardId,
        index: Index,
        conf: u64,
        members: &[Member],
    ) -> Result<(), Violation> {
        let violation = |what: String| {
            Err(Violation::new("members", format!("entry {index} of shard {shard} {what}: {members:?}")))
        };
        let Some(before) = self.all.last() else { return violation("changes nobody".into()) };
        if conf != before.conf + 1 {
            return violation(format!("makes conf version {conf} after {}", before.conf));
        }
        let nodes: BTreeSet<NodeId> = members.iter().map(|m| m.node).collect();
        if nodes.len() < members.len() {
            return violation("has two members on one node".into());
        }
        if !members.iter().any(|m| m.role.stays_voter()) {
            return violation("leaves no voter".into());
        }
        for member in members {
            let was = before.members.iter().find(|m| m.replica == member.replica);
            match was {
                Some(was) if was.node != member.node => {
                    return violation(format!("moves replica {} to another node", member.replica));
                }
                None if self.ever.contains_key(&member.replica) => {
                    return violation(format!("has replica {} again, which had left", member.replica));
                }
                _ => {}
            }
        }
        // What was decided under the one set must bind the other.
        let voters = |of: &[Member], alone: MemberRole| -> BTreeSet<ReplicaId> {
            of.iter().filter(|m| m.role == MemberRole::Voter || m.role == alone).map(|m| m.replica).collect()
        };
        let old = voters(&before.members, MemberRole::Incoming);
        let bound = match (is_joint(&before.members), is_joint(members)) {
            (false, true) => voters(members, MemberRole::Outgoing) == old,
            (true, false) | (false, false) => voters(members, MemberRole::Incoming) == old,
            (true, true) => false,
        };
        if !bound {
            return violation(format!("goes over from {:?}", before.members));
        }
        self.ever.extend(members.iter().map(|m| (m.replica, m.node)));
        self.all.push(Configuration { index, conf, members: members.to_vec() });
        Ok(())
    }

    /// `replica` has applied up to `applied`, and takes these for the members. They may be those of a later entry
    /// that it knows to be committed: of one up to `known`.
    pub fn compare(
        &self,
        shard: ShardId,
        replica: ReplicaId,
        (applied, known): (Index, Index),
        conf: u64,
        members: &[Member],
    ) -> Result<(), Violation> {
        // A newcomer that has no snapshot yet.
        if applied < GROUP_START.index && members.is_empty() {
            return Ok(());
        }
        let sorted = |members: &[Member]| {
            let mut members = members.to_vec();
            members.sort_by_key(|m| m.replica);
            members
        };
        let later = self.all.iter().filter(|c| (applied + 1..=known).contains(&c.index));
        let mut may_be = self.at(applied).into_iter().chain(later);
        if may_be.any(|c| c.conf == conf && sorted(&c.members) == sorted(members)) {
            return Ok(());
        }
        Err(Violation::new(
            "members",
            format!(
                "replica {replica} of shard {shard} has at entry {applied} conf version {conf}, {members:?}, in \
                 place of {:?}",
                self.at(applied)
            ),
        ))
    }

    /// Entry `index` is found to be committed: enough of the voters that count for it have it on disk, as
    /// `durable` tells.
    pub fn check_commit(
        &self,
        shard: ShardId,
        index: Index,
        durable: impl Fn(&Member) -> bool,
    ) -> Result<(), Violation> {
        let next = self.all.partition_point(|c| c.index < index);
        let mut counted = self.all[..next].iter().rev().take(2);
        if counted.any(|c| majority(&c.members, &durable)) {
            return Ok(());
        }
        let newest = self.all[..next].last();
        let have: Vec<ReplicaId> =
            (newest.iter().flat_map(|c| &c.members)).filter(|m| durable(m)).map(|m| m.replica).collect();
        Err(Violation::new(
            "quorum",
            format!("entry {index} of shard {shard} is applied, and on disk at {have:?} of {newest:?}"),
        ))
    }
}

/// Every replica that a node ever made, and those that are removed.
#[derive(Default)]
pub struct Replicas {
    made: BTreeMap<ReplicaId, NodeId>,
    removed: BTreeSet<ReplicaId>,
}

impl Replicas {
    /// A node makes a replica that it doesn't have.
    pub fn make(&mut self, replica: ReplicaId, node: NodeId) -> Result<(), Violation> {
        if let Some(before) = self.made.insert(replica, node) {
            let detail = format!("node {node} makes replica {replica}, which node {before} has made before");
            return Err(Violation::new("members", detail));
        }
        Ok(())
    }

    /// The tombstone of a replica is on disk.
    pub fn remove(&mut self, replica: ReplicaId) {
        self.removed.insert(replica);
    }

    /// A replica is opened.
    pub fn open(&self, replica: ReplicaId) -> Result<(), Violation> {
        if self.removed.contains(&replica) {
            return Err(Violation::new("members", format!("replica {replica} is back from its tombstone")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use MemberRole::{Incoming, Learner, Outgoing, Voter};

    fn members(roles: &[(u64, MemberRole)]) -> Vec<Member> {
        roles.iter().map(|&(id, role)| Member { replica: ReplicaId(id), node: NodeId(id), role }).collect()
    }

    #[test]
    fn both_configurations_decide_and_learners_never() {
        let has = |ids: &'static [u64]| move |m: &Member| ids.contains(&m.replica.0);
        let simple = members(&[(1, Voter), (2, Voter), (3, Voter), (4, Learner)]);
        assert!(majority(&simple, has(&[1, 2])));
        assert!(!majority(&simple, has(&[1, 4])));
        let joint = members(&[(1, Voter), (2, Outgoing), (3, Outgoing), (4, Incoming), (5, Incoming)]);
        assert!(majority(&joint, has(&[1, 2, 4])));
        assert!(!majority(&joint, has(&[1, 2, 3])));
        assert!(!majority(&joint, has(&[1, 4, 5])));
    }

    #[test]
    fn changes_that_break_a_rule_are_seen() {
        let shard = ShardId(1);
        let mut all = Members::first(1, members(&[(1, Voter)]));
        let learner = members(&[(1, Voter), (2, Learner)]);
        let joint = members(&[(1, Outgoing), (2, Incoming)]);
        let moved = members(&[(2, Voter)]);
        assert!(all.change(shard, 6, 3, &learner).is_err(), "a version is left out");
        all.change(shard, 6, 2, &learner).unwrap();
        assert!(all.change(shard, 7, 3, &members(&[(2, Voter)])).is_err(), "no joint change between");
        all.change(shard, 7, 3, &joint).unwrap();
        assert!(all.change(shard, 8, 4, &learner).is_err(), "a joint change goes back");
        all.change(shard, 8, 4, &moved).unwrap();
        let back = members(&[(2, Voter), (1, Learner)]);
        assert!(all.change(shard, 9, 5, &back).is_err(), "a replica comes back");
        let crowded =
            [&moved[..], &[Member { replica: ReplicaId(3), node: NodeId(2), role: Learner }]].concat();
        assert!(all.change(shard, 9, 5, &crowded).is_err(), "two on one node");

        let compare = |applied, known, conf, members: &[Member]| {
            all.compare(shard, ReplicaId(2), (applied, known), conf, members)
        };
        assert!(compare(7, 0, 3, &joint).is_ok());
        assert!(compare(7, 0, 2, &joint).is_err());
        assert!(compare(8, 0, 4, &joint).is_err());
        assert!(compare(6, 0, 3, &joint).is_err());
        assert!(compare(6, 7, 3, &joint).is_ok(), "known to be committed");
        assert!(compare(0, 0, 0, &[]).is_ok(), "a newcomer");
    }

    #[test]
    fn an_entry_without_a_majority_is_seen() {
        let shard = ShardId(1);
        let mut all = Members::first(1, members(&[(1, Voter), (2, Voter), (3, Voter)]));
        all.change(shard, 8, 2, &members(&[(1, Voter), (2, Outgoing), (3, Outgoing), (4, Incoming)]))
            .unwrap();
        let check = |index, ids: &[u64]| all.check_commit(shard, index, |m| ids.contains(&m.replica.0));
        assert!(check(7, &[1, 2]).is_ok());
        assert!(check(7, &[1]).is_err());
        assert!(check(9, &[1, 2]).is_ok(), "committed before the change was in force");
        assert!(check(9, &[1, 4]).is_err());
    }

    #[test]
    fn replicas_that_come_back_are_seen() {
        let mut replicas = Replicas::default();
        replicas.make(ReplicaId(1), NodeId(1)).unwrap();
        assert!(replicas.make(ReplicaId(1), NodeId(2)).is_err());
        replicas.open(ReplicaId(1)).unwrap();
        replicas.remove(ReplicaId(1));
        assert!(replicas.open(ReplicaId(1)).is_err());
    }
}
