//! What the reconciler has heard, and for how long it hasn't.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::facts::Survey;
use super::view::View;
use crate::ids::{NodeId, ReplicaId, ShardId};
use crate::limits;
use crate::placement::map::{ClusterMap, Member, Standing};

struct Heard {
    at_ms: u64,
    survey: Survey,
}

/// The greatest conf version that was ever reported of a shard, and the members as of it. Whoever reports it
/// has applied it, so it is committed, whoever leads by now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Described {
    pub conf: u64,
    pub members: Vec<Member>,
}

/// See the module's page.
#[derive(Default)]
pub(super) struct Ears {
    surveys: BTreeMap<NodeId, Heard>,
    described: BTreeMap<ShardId, Described>,
    /// For how long each node of the map hasn't answered, counted in steps.
    silence: BTreeMap<NodeId, u64>,
    /// Who answered since the last step.
    answered: BTreeSet<NodeId>,
    /// Since when replicas on nodes that answer are sick, and why.
    sick: BTreeMap<(NodeId, ShardId, ReplicaId), (u64, String)>,
    /// Since when replicas that should be on an answering node aren't.
    missing: BTreeMap<(ShardId, ReplicaId), u64>,
    /// The last step.
    stepped_ms: Option<u64>,
}

impl Ears {
    pub fn heard(&mut self, now_ms: u64, survey: Survey) {
        let node = survey.node;
        for report in &survey.led {
            let conf = report.epoch.conf;
            if self.described.get(&report.shard).is_none_or(|known| known.conf < conf) {
                self.described.insert(report.shard, Described { conf, members: report.members.clone() });
            }
        }
        let mut sick = BTreeMap::new();
        for replica in &survey.sick {
            let place = (node, replica.shard, replica.replica);
            let since = self.sick.get(&place).map_or(now_ms, |(since, _)| *since);
            sick.insert(place, (since, replica.why.clone()));
        }
        self.sick.retain(|(on, ..), _| *on != node);
        self.sick.append(&mut sick);
        self.answered.insert(node);
        self.surveys.insert(node, Heard { at_ms: now_ms, survey });
    }

    /// To be called once in each step, before all else.
    pub fn step(&mut self, now_ms: u64, map: &ClusterMap) {
        // Time in which this reconciler stood still isn't counted: it says nothing of the others.
        let since_last = now_ms.saturating_sub(self.stepped_ms.unwrap_or(now_ms));
        let passed = since_last.min(limits::SILENCE_STEP_MS_MAX);
        self.stepped_ms = Some(now_ms);
        let living = map.nodes.values().filter(|node| node.standing != Standing::Removed);
        let silence = living.map(|node| {
            let before = self.silence.get(&node.id).copied().unwrap_or(0);
            (node.id, if self.answered.contains(&node.id) { 0 } else { before + passed })
        });
        self.silence = silence.collect();
        self.answered.clear();
        self.surveys.retain(|node, _| map.nodes.contains_key(node));
        self.described.retain(|shard, _| map.shards.get(shard).is_none_or(|record| !record.dropped));
        let answering: BTreeSet<NodeId> = self.fresh(now_ms).map(|survey| survey.node).collect();
        // A node that is silent may only have been stopped for a while: what it said before that counts no more.
        self.sick.retain(|(node, ..), _| answering.contains(node));
        self.look_for_missing(now_ms, map, &answering);
    }

    fn look_for_missing(&mut self, now_ms: u64, map: &ClusterMap, answering: &BTreeSet<NodeId>) {
        let held: HashSet<(ShardId, ReplicaId)> =
            self.fresh(now_ms).flat_map(|survey| survey.held.iter().copied()).collect();
        let mut missing = BTreeMap::new();
        for shard in map.shards.values().filter(|shard| !shard.dropped) {
            for member in shard.ordered().filter(|member| answering.contains(&member.node)) {
                let place = (shard.id, member.replica);
                if !held.contains(&place) {
                    missing.insert(place, self.missing.get(&place).copied().unwrap_or(now_ms));
                }
            }
        }
        self.missing = missing;
    }

    fn fresh(&self, now_ms: u64) -> impl Iterator<Item = &Survey> {
        let fresh = move |heard: &&Heard| heard.at_ms + limits::SURVEY_FRESH_MS >= now_ms;
        self.surveys.values().filter(fresh).map(|heard| &heard.survey)
    }

    /// Nodes that hold replicas of living shards, and of which: as those tell that answer.
    pub fn held(&self, now_ms: u64, map: &ClusterMap) -> impl Iterator<Item = (NodeId, ShardId)> {
        let living = |shard: &ShardId| map.shards.get(shard).is_some_and(|record| !record.dropped);
        let held = move |survey: &Survey| {
            let shards = survey.held.iter().map(|(shard, _)| *shard).filter(living);
            shards.map(|shard| (survey.node, shard)).collect::<Vec<_>>()
        };
        self.fresh(now_ms).flat_map(held)
    }

    /// What is known now.
    pub fn view<'a>(&'a self, now_ms: u64, map: &'a ClusterMap) -> View<'a> {
        let long = |since: u64| now_ms.saturating_sub(since) >= limits::SICK_MS;
        let mut sick = BTreeMap::new();
        for ((_, shard, replica), (since, why)) in &self.sick {
            if long(*since) {
                sick.insert((*shard, *replica), format!("doesn't serve: {why}"));
            }
        }
        for (place, since) in &self.missing {
            if long(*since) {
                sick.insert(*place, "isn't there".into());
            }
        }
        View::new(map, self.fresh(now_ms), &self.silence, sick)
    }

    pub fn described(&self, shard: ShardId) -> Option<&Described> {
        self.described.get(&shard)
    }

    pub fn silent_ms(&self, node: NodeId) -> u64 {
        self.silence.get(&node).copied().unwrap_or(0)
    }
}
