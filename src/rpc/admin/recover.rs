//! Shards whose majority is gone for good.

use std::time::{Duration, Instant};

use super::survey::Reports;
use super::{Admin, REPORT};
use crate::client::admin::answers::{Recovery, ShardCopy};
use crate::group::types::GroupStatus;
use crate::ids::{Epoch, METADATA_SHARD, NodeId, ShardId};
use crate::machine::command::MetaCommand;
use crate::node::handle::{ReplicaHealth, ReplicaReport};
use crate::placement::map::{ClusterMap, Member, MemberRole, ShardRecord};
use crate::refusal::Refusal;
use crate::rpc::wire;

/// Pause between two looks at a replica that is to go on alone.
const POLL: Duration = Duration::from_millis(100);

impl Admin {
    /// What would be kept; with `accepted`, what was, once the replica leads its shard.
    ///
    /// The metadata shard's record comes first: from then on the node of the replica goes ahead by itself, and
    /// those of the others remove theirs. So a repetition finds the decision made, and waits for its end.
    pub(super) async fn recover(
        &self,
        shard: ShardId,
        node: NodeId,
        accepted: bool,
        deadline: Instant,
    ) -> Result<Recovery, Refusal> {
        let map = self.service.node.map();
        let reports = self.survey(&map, deadline).await;
        if accepted && let Some(decided) = decided_already(&map, &reports, shard, node) {
            return self.alone(decided, node, deadline).await;
        }
        let found = assess(&map, &reports, shard, node)?;
        if !accepted {
            return Ok(found);
        }
        if shard == METADATA_SHARD {
            return self.recover_metadata(found, node, deadline).await;
        }
        tracing::warn!(%shard, %node, replica = %found.keep, conf = found.conf, copies = ?found.copies, "a shard goes on with one replica alone, as an operator has decided");
        let command = MetaCommand::RecoverShard { shard, keep: found.keep, conf: found.conf };
        let version = self.decide(command, deadline.saturating_duration_since(Instant::now())).await?;
        self.caught_up(version, deadline).await.map_err(|_| going_on(shard))?;
        self.alone(found, node, deadline).await
    }

    /// Nobody can record the decision about the metadata shard while that has no leader: the node of the replica
    /// that is left carries it out, and it is recorded then.
    async fn recover_metadata(
        &self,
        found: Recovery,
        node: NodeId,
        deadline: Instant,
    ) -> Result<Recovery, Refusal> {
        let here = &self.service.node;
        if here.node() != node {
            return Err(Refusal::Refused(format!(
                "node {node} has to be asked itself about the metadata shard"
            )));
        }
        tracing::warn!(replica = %found.keep, conf = found.conf, copies = ?found.copies, "the metadata shard goes on with one replica alone, as an operator has decided");
        here.go_on_alone(METADATA_SHARD, found.conf).await?;
        let done = self.alone(found, node, deadline).await?;
        let command = MetaCommand::RecoverShard { shard: METADATA_SHARD, keep: done.keep, conf: done.conf };
        let recorded = self.decide(command, deadline.saturating_duration_since(Instant::now())).await;
        if let Err(refusal) = recorded {
            // The reconciler sees the same from the shard itself, and records it.
            tracing::info!(%refusal, "that the metadata shard goes on with one replica alone is not recorded yet");
        }
        Ok(done)
    }

    /// Waits until the replica leads under the conf version that it was given, or a later one.
    async fn alone(&self, recovery: Recovery, node: NodeId, deadline: Instant) -> Result<Recovery, Refusal> {
        loop {
            let map = self.service.node.map();
            let report = match map.nodes.get(&node) {
                Some(_) if node == self.service.node.node() => Some(self.service.node.report().await),
                Some(record) => self.service.client.report(&record.client_address, REPORT).await.ok(),
                None => None,
            };
            let replicas = report.iter().flat_map(|report| &report.replicas);
            let mut groups = replicas.filter(|r| r.replica == recovery.keep).filter_map(|r| r.group.as_ref());
            if groups.any(|g| g.role == raft::StateRole::Leader && g.epoch.conf >= recovery.conf) {
                return Ok(Recovery { done: true, ..recovery });
            }
            if Instant::now() + POLL >= deadline {
                return Err(going_on(recovery.shard));
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

fn going_on(shard: ShardId) -> Refusal {
    wire::not_yet(format!(
        "it is decided, and the replica that is left of shard {shard} didn't lead in time; it goes on by itself"
    ))
}

/// A recovery with this very replica that the map has already, and that is not followed by anything else.
fn decided_already(map: &ClusterMap, reports: &Reports, shard: ShardId, node: NodeId) -> Option<Recovery> {
    let record = map.shards.get(&shard).filter(|record| !record.dropped)?;
    let [only] = &record.members[..] else { return None };
    (only.node == node && record.epoch.generation() > 0).then(|| Recovery {
        shard,
        database: database_name(map, record),
        keep: only.replica,
        conf: record.epoch.conf,
        copies: vec![copy(reports, only)],
        done: false,
    })
}

fn database_name(map: &ClusterMap, record: &ShardRecord) -> String {
    if record.id == METADATA_SHARD {
        return "(metadata)".into();
    }
    map.databases.get(&record.database).map_or_else(String::new, |database| database.name.clone())
}

/// What there is of a shard, and whether it may go on with the replica on `node` alone.
fn assess(map: &ClusterMap, reports: &Reports, shard: ShardId, node: NodeId) -> Result<Recovery, Refusal> {
    let refused = |text: String| Err(Refusal::Refused(text));
    let Some(record) = map.shards.get(&shard).filter(|record| !record.dropped) else {
        return refused(format!("there is no shard {shard}"));
    };
    let copies: Vec<ShardCopy> = record.members.iter().map(|member| copy(reports, member)).collect();
    let Some(keep) = copies.iter().find(|copy| copy.node == node) else {
        let nodes: Vec<_> = record.members.iter().map(|member| member.node.to_string()).collect();
        let nodes = nodes.join(", ");
        return refused(format!(
            "node {node} holds no replica of shard {shard}; those of nodes {nodes} are its"
        ));
    };
    if !keep.answers {
        return refused(format!(
            "node {node} does not answer, or does not have its replica of shard {shard}"
        ));
    }
    if !keep.serves || keep.role == MemberRole::Learner {
        return refused(format!(
            "the replica of shard {shard} on node {node} is not one to go on with: it has no state, or no vote; see \
             `pontoon status`"
        ));
    }
    if has_majority(record, reports) {
        return refused(format!(
            "a majority of the replicas of shard {shard} is there: the shard isn't lost. Where they don't serve, \
             `pontoon status` says why"
        ));
    }
    let better = copies.iter().filter(|copy| copy.serves && copy.committed > keep.committed);
    if let Some(better) = better.max_by_key(|copy| copy.committed) {
        return refused(format!(
            "node {} has more of shard {shard} than node {node}: entries up to {}, not {}; name that one",
            better.node, better.committed, keep.committed
        ));
    }
    let confs = record.members.iter().filter_map(|member| Some(group_of(reports, member)?.epoch.conf));
    let newest = confs.max().unwrap_or(0).max(record.epoch.conf);
    let Some(conf) = Epoch::next_generation(newest) else {
        return refused(format!("shard {shard} has no later conf version than {newest}"));
    };
    let database = database_name(map, record);
    Ok(Recovery { shard, database, keep: keep.replica, conf, copies, done: false })
}

fn report_of<'a>(reports: &'a Reports, member: &Member) -> Option<&'a ReplicaReport> {
    let report = reports.0.get(&member.node)?;
    report.replicas.iter().find(|report| report.replica == member.replica)
}

fn group_of<'a>(reports: &'a Reports, member: &Member) -> Option<&'a GroupStatus> {
    report_of(reports, member)?.group.as_ref()
}

fn copy(reports: &Reports, member: &Member) -> ShardCopy {
    let report = report_of(reports, member);
    let group = group_of(reports, member);
    let whole = |report: &ReplicaReport| {
        matches!(
            report.health,
            ReplicaHealth::Serving | ReplicaHealth::Recovering | ReplicaHealth::Installing
        )
    };
    ShardCopy {
        node: member.node,
        replica: member.replica,
        role: member.role,
        answers: report.is_some(),
        serves: group.is_some() && report.is_some_and(whole),
        term: group.map_or(0, |group| group.term),
        applied: group.map_or(0, |group| group.applied),
        committed: group.map_or(0, |group| group.committed),
        last: group.map_or(0, |group| group.last),
        keys: report.map_or(0, |report| report.keys),
        bytes: report.map_or(0, |report| report.bytes),
    }
}

/// Whether so many replicas are there that the shard can elect a leader, or could after a restart of nodes: during
/// a joint change by either configuration. One that can't be opened, since its disk is damaged, isn't there.
fn has_majority(record: &ShardRecord, reports: &Reports) -> bool {
    let is_there = |member: &&Member| {
        report_of(reports, member).is_some_and(|report| !matches!(report.health, ReplicaHealth::Failed(_)))
    };
    let holds = |counts: fn(MemberRole) -> bool| {
        let voters = record.members.iter().filter(|member| counts(member.role));
        let (all, there) = (voters.clone().count(), voters.filter(is_there).count());
        all == 0 || there > all / 2
    };
    holds(MemberRole::was_voter) && holds(MemberRole::stays_voter)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{DatabaseId, ReplicaId};
    use crate::node::handle::{NodePhase, NodeReport};
    use crate::placement::map::DatabaseRecord;
    use crate::placement::ring::RingRange;

    const SHARD: ShardId = ShardId(4);

    /// A shard of three voters on nodes 1 to 3.
    fn map() -> ClusterMap {
        let member =
            |node| Member { replica: ReplicaId(10 + node), node: NodeId(node), role: MemberRole::Voter };
        let shard = ShardRecord {
            id: SHARD,
            database: DatabaseId(1),
            range: RingRange::ALL,
            epoch: Epoch { range: 1, conf: 5 },
            members: (1..=3).map(member).collect(),
            dropped: false,
            moving: None,
            target: None,
            previous: None,
            changed_at: 3,
        };
        let database = DatabaseRecord {
            id: DatabaseId(1),
            name: "demo".into(),
            replicas: 3,
            shards: vec![SHARD],
            dropped: false,
            changed_at: 1,
        };
        ClusterMap {
            shards: [(SHARD, shard)].into(),
            databases: [(database.id, database)].into(),
            ..ClusterMap::default()
        }
    }

    /// Nodes that answer, with how far their replicas are committed.
    fn reports(nodes: &[(u64, u64)]) -> Reports {
        let report = |&(node, committed): &(u64, u64)| {
            let group = GroupStatus {
                role: raft::StateRole::Follower,
                learner: false,
                term: 7,
                leader: None,
                applied: committed,
                committed,
                last: committed + 1,
                recovering: false,
                state_lost: None,
                incarnation: 1,
                epoch: Epoch { range: 1, conf: 6 },
                members: Vec::new(),
                followers: Vec::new(),
            };
            let replica = ReplicaReport {
                shard: SHARD,
                replica: ReplicaId(10 + node),
                health: ReplicaHealth::Serving,
                group: Some(group),
                restarts: 0,
                keys: 3,
                bytes: 30,
            };
            let report = NodeReport {
                node: NodeId(node),
                label: String::new(),
                phase: NodePhase::Ready,
                disk_bytes: 0,
                replicas: vec![replica],
                uptime: Duration::ZERO,
                snapshot_bytes: 0,
                stuck: Vec::new(),
            };
            (NodeId(node), report)
        };
        Reports(nodes.iter().map(report).collect())
    }

    fn refusal(reports: &Reports, node: u64) -> String {
        assess(&map(), reports, SHARD, NodeId(node)).unwrap_err().to_string()
    }

    #[test]
    fn one_of_three_may_go_on_alone_in_the_next_generation() {
        let recovery = assess(&map(), &reports(&[(2, 40)]), SHARD, NodeId(2)).unwrap();
        assert_eq!((recovery.keep, recovery.conf, recovery.done), (ReplicaId(12), 1 << 32, false));
        assert_eq!(recovery.database, "demo");
        let answers: Vec<_> = recovery.copies.iter().map(|copy| copy.answers).collect();
        assert_eq!(answers, [false, true, false]);
        assert_eq!((recovery.copies[1].committed, recovery.copies[1].last), (40, 41));
        // Known to the replica alone, the map being behind.
        let mut behind = reports(&[(2, 40)]);
        let replicas = &mut behind.0.get_mut(&NodeId(2)).unwrap().replicas;
        replicas[0].group.as_mut().unwrap().epoch.conf = 3 << 32;
        assert_eq!(assess(&map(), &behind, SHARD, NodeId(2)).unwrap().conf, 4 << 32);
    }

    #[test]
    fn what_isnt_lost_is_not_given_up() {
        assert!(refusal(&reports(&[(1, 40), (2, 40)]), 2).contains("a majority"));
        // Quarantined ones are there; after a restart they serve again. Damaged ones aren't.
        let ill = |health: fn(String) -> ReplicaHealth| {
            let mut ill = reports(&[(1, 40), (2, 40)]);
            ill.0.get_mut(&NodeId(1)).unwrap().replicas[0].health = health("why".into());
            ill.0.get_mut(&NodeId(1)).unwrap().replicas[0].group = None;
            ill
        };
        assert!(refusal(&ill(ReplicaHealth::Quarantined), 2).contains("a majority"));
        assert!(assess(&map(), &ill(ReplicaHealth::Failed), SHARD, NodeId(2)).is_ok());
        assert!(refusal(&ill(ReplicaHealth::Failed), 1).contains("not one to go on with"));
    }

    #[test]
    fn during_a_joint_change_either_majority_may_be_missing() {
        let mut map = map();
        let shard = map.shards.get_mut(&SHARD).unwrap();
        shard.members[2].role = MemberRole::Outgoing;
        let incoming =
            |node| Member { replica: ReplicaId(10 + node), node: NodeId(node), role: MemberRole::Incoming };
        shard.members.extend([incoming(4), incoming(5)]);
        // 1, 2, 3 before; 1, 2, 4, 5 after.
        let has = |nodes: &[u64]| {
            let nodes: Vec<_> = nodes.iter().map(|node| (*node, 40)).collect();
            has_majority(&map.shards[&SHARD], &reports(&nodes))
        };
        assert!(!has(&[1, 2]) && !has(&[1, 4, 5]) && has(&[1, 2, 4]));
    }

    #[test]
    fn the_wrong_replica_is_refused() {
        let mut five = map();
        let shard = five.shards.get_mut(&SHARD).unwrap();
        let member =
            |node| Member { replica: ReplicaId(10 + node), node: NodeId(node), role: MemberRole::Voter };
        shard.members.extend([member(4), member(5)]);
        let two = reports(&[(1, 40), (2, 50)]);
        let refused = assess(&five, &two, SHARD, NodeId(1)).unwrap_err().to_string();
        assert!(refused.contains("node 2 has more") && refused.contains("up to 50, not 40"), "{refused}");
        assert!(assess(&five, &two, SHARD, NodeId(2)).is_ok());
        assert!(refusal(&reports(&[(2, 40)]), 1).contains("does not answer"));
        assert!(refusal(&reports(&[(2, 40)]), 9).contains("nodes 1, 2, 3 are its"));
        let error = assess(&map(), &reports(&[]), ShardId(9), NodeId(1)).unwrap_err();
        assert!(error.to_string().contains("no shard 9"));
    }

    #[test]
    fn a_decision_is_not_made_twice() {
        let mut map = map();
        let there = reports(&[(2, 40)]);
        assert_eq!(decided_already(&map, &there, SHARD, NodeId(2)), None);
        let shard = map.shards.get_mut(&SHARD).unwrap();
        shard.members.retain(|member| member.node == NodeId(2));
        assert_eq!(decided_already(&map, &there, SHARD, NodeId(2)), None, "it has shrunk by itself");
        map.shards.get_mut(&SHARD).unwrap().epoch.conf = 1 << 32;
        let decided = decided_already(&map, &there, SHARD, NodeId(2)).unwrap();
        assert_eq!((decided.keep, decided.conf), (ReplicaId(12), 1 << 32));
        assert_eq!(decided_already(&map, &there, SHARD, NodeId(1)), None);
    }
}
