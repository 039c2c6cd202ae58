//! Shards whose majority is gone for good.

use std::time::Instant;

use super::Admin;
use super::survey::Reports;
use crate::client::admin::answers::{Recovery, ShardCopy};
use crate::ids::{METADATA_SHARD, NodeId, ReplicaId, ShardId};
use crate::node::handle::{ReplicaHealth, ReplicaReport};
use crate::placement::map::{ClusterMap, Member, ShardRecord};
use crate::refusal::Refusal;

impl Admin {
    pub(super) async fn recover(
        &self,
        shard: ShardId,
        node: NodeId,
        accepted: bool,
        deadline: Instant,
    ) -> Result<Recovery, Refusal> {
        let map = self.service.node.map();
        let reports = self.survey(&map, deadline).await;
        let found = assess(&map, &reports, shard, node)?;
        if !accepted {
            return Ok(found);
        }
        Err(Refusal::Refused("not yet".into()))
    }
}

/// What there is of a shard, and whether it may go on with the replica on `node` alone.
fn assess(map: &ClusterMap, reports: &Reports, shard: ShardId, node: NodeId) -> Result<Recovery, Refusal> {
    let refused = |text: String| Err(Refusal::Refused(text));
    let Some(record) = map.shards.get(&shard).filter(|record| !record.dropped) else {
        return refused(format!("there is no shard {shard}"));
    };
    if shard == METADATA_SHARD {
        return refused("the metadata shard can't be recovered from here".into());
    }
    let copies: Vec<ShardCopy> = record.members.iter().map(|member| copy(reports, member)).collect();
    let Some(keep) = copies.iter().find(|copy| copy.node == node) else {
        let nodes: Vec<_> = record.members.iter().map(|member| member.node.to_string()).collect();
        return refused(format!(
            "node {node} holds no replica of shard {shard}; nodes {} do",
            nodes.join(", ")
        ));
    };
    if !keep.answers {
        return refused(format!(
            "node {node} does not answer, or does not have its replica of shard {shard}"
        ));
    }
    if !keep.serves {
        return refused(format!(
            "the replica of shard {shard} on node {node} has no state to go on with; see `pontoon status`"
        ));
    }
    if has_majority(record, &copies) {
        return refused(format!(
            "a majority of the replicas of shard {shard} answers: it isn't lost, and recovers by itself"
        ));
    }
    let better = copies.iter().filter(|copy| copy.serves && copy.committed > keep.committed);
    if let Some(better) = better.max_by_key(|copy| copy.committed) {
        return refused(format!(
            "node {} has more of shard {shard} than node {node}: entries up to {}, not {}; name that one",
            better.node, better.committed, keep.committed
        ));
    }
    let newest = copies.iter().map(|copy| conf_of(reports, copy)).max().unwrap_or(0);
    Ok(Recovery {
        shard,
        database: map.databases.get(&record.database).map_or_else(String::new, |db| db.name.clone()),
        keep: keep.replica,
        conf: generation_after(record.epoch.conf.max(newest)),
        copies,
        done: false,
    })
}

/// The first conf version of the next generation: no other change comes near it.
fn generation_after(conf: u64) -> u64 {
    ((conf >> 32) + 1) << 32
}

fn report_of<'a>(reports: &'a Reports, node: NodeId, replica: ReplicaId) -> Option<&'a ReplicaReport> {
    reports.0.get(&node)?.replicas.iter().find(|report| report.replica == replica)
}

fn conf_of(reports: &Reports, copy: &ShardCopy) -> u64 {
    let group = report_of(reports, copy.node, copy.replica).and_then(|report| report.group.as_ref());
    group.map_or(0, |group| group.epoch.conf)
}

fn copy(reports: &Reports, member: &Member) -> ShardCopy {
    let report = report_of(reports, member.node, member.replica);
    let group = report.and_then(|report| report.group.as_ref());
    let whole = |health: &ReplicaHealth| {
        matches!(health, ReplicaHealth::Serving | ReplicaHealth::Recovering | ReplicaHealth::Installing)
    };
    ShardCopy {
        node: member.node,
        replica: member.replica,
        role: member.role,
        answers: report.is_some(),
        serves: group.is_some() && report.is_some_and(|report| whole(&report.health)),
        term: group.map_or(0, |group| group.term),
        applied: group.map_or(0, |group| group.applied),
        committed: group.map_or(0, |group| group.committed),
        last: group.map_or(0, |group| group.last),
        keys: report.map_or(0, |report| report.keys),
        bytes: report.map_or(0, |report| report.bytes),
    }
}

/// Whether so many replicas are there that the shard can elect a leader, or could after a restart of nodes.
/// During a joint change that takes a majority of both configurations.
fn has_majority(record: &ShardRecord, copies: &[ShardCopy]) -> bool {
    let holds = |counts: fn(&Member) -> bool| {
        let voters = record.members.iter().filter(|member| counts(member));
        let there = |member: &&Member| copies.iter().any(|c| c.replica == member.replica && c.answers);
        let (all, there) = (voters.clone().count(), voters.filter(there).count());
        all == 0 || there > all / 2
    };
    use crate::placement::map::MemberRole::{Incoming, Outgoing, Voter};
    holds(|m| matches!(m.role, Voter | Incoming)) && holds(|m| matches!(m.role, Voter | Outgoing))
}
