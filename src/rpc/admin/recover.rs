//! Shards whose majority is gone for good.

use std::time::{Duration, Instant};

use raft::StateRole;

use super::survey::Reports;
use super::{Admin, REPORT};
use crate::client::admin::answers::{Recovery, ShardCopy};
use crate::group::types::GroupStatus;
use crate::ids::{Epoch, METADATA_SHARD, NodeId, ShardId, generation_start};
use crate::machine::command::MetaCommand;
use crate::node::handle::{ReplicaHealth, ReplicaReport};
use crate::placement::map::{ClusterMap, Member, MemberRole, ShardRecord};
use crate::refusal::Refusal;
use crate::rpc::wire;

/// Pause between two looks at a replica that is to go on alone.
const POLL: Duration = Duration::from_millis(100);

/// So often is looked again whether the majority is gone, before anything is done about it.
const LOOKS: u32 = 3;

/// Time over which that is done: a node that restarts, or is too busy to answer, is not gone.
const LOOKS_OVER: Duration = Duration::from_secs(5);

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
        let here = &self.service.node;
        let mut reports = self.survey(&here.map(), deadline).await;
        if let Some(decided) = decided_already(&here.map(), &reports, shard, node) {
            return match accepted {
                true => self.alone(decided, node, deadline).await,
                false => Ok(decided),
            };
        }
        let mut found = assess(&here.map(), &reports, shard, node, false)?;
        if !accepted {
            return Ok(found);
        }
        if shard == METADATA_SHARD && here.node() != node {
            return Err(Refusal::Refused(format!(
                "node {node} has to be asked itself about the metadata shard"
            )));
        }
        let over = LOOKS_OVER.min(deadline.saturating_duration_since(Instant::now()) / 2);
        for look in 1..=LOOKS {
            tokio::time::sleep(over / LOOKS).await;
            let map = here.map();
            reports.add(self.survey(&map, deadline).await);
            found = assess(&map, &reports, shard, node, look == LOOKS)?;
        }
        tracing::warn!(%shard, %node, replica = %found.keep, conf = found.conf, copies = ?found.copies, "a shard goes on with one replica alone, as an operator has decided");
        let found = Recovery { decided: true, ..found };
        if shard == METADATA_SHARD {
            // Nobody can record that while it has no leader: its log begins the new generation with it.
            here.go_on_alone(METADATA_SHARD, found.conf).await?;
            return self.alone(found, node, deadline).await;
        }
        let command = MetaCommand::RecoverShard { shard, keep: found.keep, conf: found.conf };
        let version = self.decide(command, deadline.saturating_duration_since(Instant::now())).await?;
        self.caught_up(version, deadline).await.map_err(|_| going_on(shard))?;
        self.alone(found, node, deadline).await
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
            if groups.any(|g| g.role == StateRole::Leader && g.epoch.conf >= recovery.conf) {
                return Ok(Recovery { done: true, decided: true, ..recovery });
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

/// A recovery with this very replica that is decided, and not followed by anything else: the map has it, or, of the
/// metadata shard, the replica itself.
fn decided_already(map: &ClusterMap, reports: &Reports, shard: ShardId, node: NodeId) -> Option<Recovery> {
    let record = map.shards.get(&shard).filter(|record| !record.dropped)?;
    let own = record.ordered().find(|member| member.node == node)?;
    let group = group_of(reports, own);
    let conf = match (&record.members[..], group) {
        ([only], _) if only.node == node && record.epoch.generation() > 0 => record.epoch.conf,
        // Until it has come to that entry of its log, the map doesn't tell.
        (_, Some(group)) if shard == METADATA_SHARD && is_ahead(group, record) => {
            generation_start(group.epoch.conf)
        }
        _ => return None,
    };
    let leads = group.is_some_and(|group| group.role == StateRole::Leader && group.epoch.conf >= conf);
    Some(Recovery {
        shard,
        database: database_name(map, record),
        keep: own.replica,
        conf,
        copies: record.members.iter().map(|member| copy(reports, member)).collect(),
        done: leads,
        decided: true,
    })
}

/// Whether a replica is of a later generation than its record.
fn is_ahead(group: &GroupStatus, record: &ShardRecord) -> bool {
    group.epoch.generation() > record.epoch.generation()
}

fn database_name(map: &ClusterMap, record: &ShardRecord) -> String {
    if record.id == METADATA_SHARD {
        return "(metadata)".into();
    }
    map.databases.get(&record.database).map_or_else(String::new, |database| database.name.clone())
}

/// What there is of a shard, and whether it may go on with the replica on `node` alone. `settled`: leaders have had
/// the time to find out that they have no majority.
fn assess(
    map: &ClusterMap,
    reports: &Reports,
    shard: ShardId,
    node: NodeId,
    settled: bool,
) -> Result<Recovery, Refusal> {
    let refused = |text: String| Err(Refusal::Refused(text));
    let Some(record) = map.shards.get(&shard).filter(|record| !record.dropped) else {
        return refused(format!("there is no shard {shard}"));
    };
    let record = &as_known(record, reports, node);
    let copies: Vec<ShardCopy> = record.ordered().map(|member| copy(reports, member)).collect();
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
    let groups = || reports.of(shard).filter_map(|(node, report)| Some((node, report.group.as_ref()?)));
    if let Some((other, group)) = groups().find(|(_, group)| group.epoch.conf > record.epoch.conf) {
        return refused(format!(
            "the replica of shard {shard} on node {other} knows members of conf version {}, the map those of {}: what \
             is gone can't be told before the map follows, which takes a moment; try again. {}",
            group.epoch.conf,
            record.epoch.conf,
            told(&copies)
        ));
    }
    if has_majority(record, reports) {
        return refused(format!(
            "a majority of the replicas of shard {shard} is there: the shard isn't lost. Where they don't serve, \
             `pontoon status` says why. {}",
            told(&copies)
        ));
    }
    if settled && let Some((leader, _)) = groups().find(|(_, group)| group.role == StateRole::Leader) {
        return refused(format!(
            "node {leader} leads shard {shard}: the shard isn't lost, or that node hasn't found out yet, which takes it \
             some seconds. {}",
            told(&copies)
        ));
    }
    // As in an election: who ends in the later term knows more, whoever has heard of more that is committed (Raft
    // §5.4.1). Learners have no say in what is committed, so one may have what never was.
    let ends = |copy: &ShardCopy| (copy.last_term, copy.last);
    let voters = copies.iter().filter(|copy| copy.serves && copy.role.votes());
    if let Some(better) = voters.filter(|copy| ends(copy) > ends(keep)).max_by_key(|copy| ends(copy)) {
        return refused(format!(
            "node {} has more of shard {shard} than node {node}: entries up to {} of term {}, not {} of term {}; name \
             that one",
            better.node, better.last, better.last_term, keep.last, keep.last_term
        ));
    }
    // Nor may a map that its own shard has lost be of a later generation: whoever has it wouldn't take another.
    let newest = if shard == METADATA_SHARD { map.version.max(record.epoch.conf) } else { record.epoch.conf };
    let Some(conf) = Epoch::next_generation(newest) else {
        return refused(format!("shard {shard} has no later conf version than {newest}"));
    };
    let database = database_name(map, record);
    Ok(Recovery { shard, database, keep: keep.replica, conf, copies, done: false, decided: false })
}

/// The record with the members as the replica on `node` knows them, if that is more: this node's own tells of them. A
/// map that can't follow any more, since its own shard is lost, must not be in the way.
fn as_known(record: &ShardRecord, reports: &Reports, node: NodeId) -> ShardRecord {
    let mut known = record.clone();
    let own = record.ordered().find(|member| member.node == node);
    if let Some(group) = own.and_then(|member| group_of(reports, member))
        && group.epoch.conf > record.epoch.conf
        && !group.members.is_empty()
    {
        known.members = group.members.clone();
        known.epoch.conf = group.epoch.conf;
    }
    known
}

/// Which node has said what, for a person.
fn told(copies: &[ShardCopy]) -> String {
    let told = copies.iter().map(|copy| match copy {
        ShardCopy { answers: false, node, .. } => format!("node {node} doesn't answer, or has none"),
        ShardCopy { serves: false, node, .. } => format!("that on node {node} can't be used"),
        copy => format!("that on node {} ends with {} of term {}", copy.node, copy.last, copy.last_term),
    });
    format!("Its replicas: {}", told.collect::<Vec<_>>().join("; "))
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
        last_term: group.map_or(0, |group| group.last_term),
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
            epoch: Epoch { range: 1, conf: 6 },
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
                role: StateRole::Follower,
                learner: false,
                term: 7,
                leader: None,
                applied: committed,
                committed,
                truncated: 0,
                last: committed + 1,
                last_term: 7,
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

    fn with_group(reports: &mut Reports, node: u64, change: impl FnOnce(&mut GroupStatus)) {
        change(reports.0.get_mut(&NodeId(node)).unwrap().replicas[0].group.as_mut().unwrap());
    }

    fn refusal(reports: &Reports, node: u64) -> String {
        assess(&map(), reports, SHARD, NodeId(node), false).unwrap_err().to_string()
    }

    #[test]
    fn one_of_three_may_go_on_alone_in_the_next_generation() {
        let recovery = assess(&map(), &reports(&[(2, 40)]), SHARD, NodeId(2), false).unwrap();
        assert_eq!((recovery.keep, recovery.conf, recovery.done), (ReplicaId(12), 1 << 32, false));
        assert_eq!(recovery.database, "demo");
        let answers: Vec<_> = recovery.copies.iter().map(|copy| copy.answers).collect();
        assert_eq!(answers, [false, true, false]);
        assert_eq!((recovery.copies[1].committed, recovery.copies[1].last), (40, 41));
    }

    #[test]
    fn what_the_map_doesnt_know_yet_is_not_decided_about() {
        let mut behind = reports(&[(2, 40)]);
        with_group(&mut behind, 2, |group| group.epoch.conf = 7);
        assert!(refusal(&behind, 2).contains("conf version 7, the map those of 6"));
        // This node's own replica tells who they are.
        let member =
            |node| Member { replica: ReplicaId(10 + node), node: NodeId(node), role: MemberRole::Voter };
        let mut known = behind;
        with_group(&mut known, 2, |group| group.members = vec![member(2), member(7)]);
        let recovery = assess(&map(), &known, SHARD, NodeId(2), true).unwrap();
        assert_eq!(recovery.copies.iter().map(|copy| copy.node.0).collect::<Vec<_>>(), [2, 7]);
        with_group(&mut known, 2, |group| group.epoch.conf = 3 << 32);
        assert_eq!(assess(&map(), &known, SHARD, NodeId(2), true).unwrap().conf, 4 << 32);
        // Another that is further, also one that the map doesn't name.
        let mut further = reports(&[(2, 40), (9, 40)]);
        with_group(&mut further, 9, |group| group.epoch.conf = 7);
        assert!(refusal(&further, 2).contains("on node 9 knows"));
    }

    #[test]
    fn who_is_led_has_lost_nothing() {
        let mut led = reports(&[(2, 40), (9, 40)]);
        with_group(&mut led, 9, |group| group.role = StateRole::Leader);
        let refused = |settled| assess(&map(), &led, SHARD, NodeId(2), settled);
        assert!(refused(true).unwrap_err().to_string().contains("node 9 leads"));
        assert!(refused(false).is_ok(), "it may not know yet that it is alone");
    }

    #[test]
    fn the_log_that_would_win_an_election_is_kept() {
        let mut five = map();
        let shard = five.shards.get_mut(&SHARD).unwrap();
        let member = |node, role| Member { replica: ReplicaId(10 + node), node: NodeId(node), role };
        shard.members.extend([member(4, MemberRole::Voter), member(5, MemberRole::Voter)]);
        shard.members.push(member(6, MemberRole::Learner));
        let two = |change: fn(&mut GroupStatus)| {
            let mut two = reports(&[(1, 40), (2, 40), (6, 90)]);
            with_group(&mut two, 1, change);
            assess(&five, &two, SHARD, NodeId(2), true).map_err(|refusal| refusal.to_string())
        };
        assert!(two(|_| ()).is_ok(), "as much, and a learner with more");
        assert!(two(|group| group.committed = 60).is_ok(), "who has heard of more has no more");
        assert!(two(|group| group.last = 42).unwrap_err().contains("node 1 has more"));
        assert!(two(|group| (group.last_term, group.last) = (8, 3)).unwrap_err().contains("3 of term 8"));
        assert!(two(|group| (group.last_term, group.last) = (6, 99)).is_ok(), "entries that were superseded");
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
        assert!(assess(&map(), &ill(ReplicaHealth::Failed), SHARD, NodeId(2), false).is_ok());
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
        let refused = assess(&five, &two, SHARD, NodeId(1), false).unwrap_err().to_string();
        assert!(
            refused.contains("node 2 has more") && refused.contains("up to 51 of term 7, not 41"),
            "{refused}"
        );
        assert!(assess(&five, &two, SHARD, NodeId(2), false).is_ok());
        assert!(refusal(&reports(&[(2, 40)]), 1).contains("does not answer"));
        assert!(refusal(&reports(&[(2, 40)]), 9).contains("nodes 1, 2, 3 are its"));
        let error = assess(&map(), &reports(&[]), ShardId(9), NodeId(1), false).unwrap_err();
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
        assert!(decided.decided && !decided.done);
        assert_eq!(decided_already(&map, &there, SHARD, NodeId(1)), None);
        let mut leads = reports(&[(2, 40)]);
        with_group(&mut leads, 2, |group| {
            (group.role, group.epoch.conf) = (StateRole::Leader, 1 << 32);
        });
        assert!(decided_already(&map, &leads, SHARD, NodeId(2)).unwrap().done);
    }

    #[test]
    fn the_metadata_shards_own_decision_is_found_at_its_replica() {
        let mut map = map();
        let metadata = ShardRecord { id: METADATA_SHARD, ..map.shards[&SHARD].clone() };
        map.shards.insert(METADATA_SHARD, metadata);
        map.version = (4 << 32) + 9;
        let mut there = reports(&[(2, 40)]);
        there.0.get_mut(&NodeId(2)).unwrap().replicas[0].shard = METADATA_SHARD;
        assert_eq!(decided_already(&map, &there, METADATA_SHARD, NodeId(2)), None);
        // Of a later generation than any map that this node has seen.
        assert_eq!(assess(&map, &there, METADATA_SHARD, NodeId(2), true).unwrap().conf, 5 << 32);
        with_group(&mut there, 2, |group| group.epoch.conf = (5 << 32) + 1);
        let decided = decided_already(&map, &there, METADATA_SHARD, NodeId(2)).unwrap();
        assert_eq!((decided.conf, decided.keep), (5 << 32, ReplicaId(12)));
    }
}
