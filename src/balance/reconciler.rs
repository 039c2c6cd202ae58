//! One round: from what is known to what is to be done.

use std::collections::{BTreeMap, BTreeSet};

use super::ears::Ears;
use super::even;
use super::facts::{Action, Survey};
use super::moves::{self, Next};
use super::pace::Paces;
use super::view::{Led, View};
use super::wants::{self, Urgency, Want};
use crate::group::types::MembershipChange;
use crate::ids::{NodeId, ReplicaId, ShardId};
use crate::limits;
use crate::machine::command::MetaCommand;
use crate::placement::loads::Loads;
use crate::placement::map::{ClusterMap, Member, MemberRole, ShardMove, ShardRecord, Standing};
use crate::placement::rebalance::{Known, ShardSize};

/// Compares what is wanted with what is, and names the next steps. See the module's page.
#[derive(Default)]
pub struct Reconciler {
    ears: Ears,
    memory: Memory,
    stuck: BTreeMap<ShardId, String>,
    known: Known,
}

/// What a round leaves for the next: when to repeat, and what didn't work. Lost with the reconciler, it costs
/// a repetition.
#[derive(Default)]
pub(super) struct Memory {
    paces: Paces,
    /// Moves that are rolled back: the conf version at which their newcomers were last removed.
    fences: BTreeMap<(ShardId, u64), u64>,
    /// Moves that lack something.
    stalls: BTreeMap<(ShardId, u64), Stall>,
    /// How far the newcomers of moves have come, and since when they have come no further.
    growth: BTreeMap<(ShardId, u64), Growth>,
    /// Nodes on which a new replica of a shard came to nothing, and until when others are preferred.
    shunned: BTreeMap<(ShardId, NodeId), u64>,
    /// Why steps were refused, and when that was told.
    refusals: BTreeMap<ShardId, (u64, String)>,
    /// When the last step was.
    now_ms: u64,
    pub even: even::Memory,
}

/// For how long a move has lacked something.
#[derive(Clone, Copy, Default)]
struct Stall {
    /// Milliseconds: they grow while it does, and go, half as fast, while it doesn't. What comes and goes is as
    /// good as not there.
    for_ms: u64,
    /// When that was last counted.
    at_ms: u64,
}

/// How far the newcomers of a move have come.
#[derive(Clone, Copy)]
struct Growth {
    /// The entries that they have, in all.
    matched: u64,
    /// Since when they have no more.
    since_ms: u64,
    /// The most that a leader has said the shard holds: a new one has yet to count.
    bytes: u64,
}

impl Stall {
    fn count(&mut self, now_ms: u64, lacks: bool) {
        // Time in which nobody looked counts for nothing.
        let passed = now_ms.saturating_sub(self.at_ms).min(limits::SILENCE_STEP_MS_MAX);
        self.at_ms = now_ms;
        self.for_ms = match lacks {
            true => self.for_ms.saturating_add(passed),
            false => self.for_ms.saturating_sub(passed.div_ceil(2)),
        };
    }
}

impl Reconciler {
    /// One that knows nothing yet: made anew whenever this node becomes the leader of the metadata shard.
    pub fn new() -> Reconciler {
        Reconciler::default()
    }

    /// A node answered at `now_ms`.
    pub fn heard(&mut self, now_ms: u64, survey: Survey) {
        self.ears.heard(now_ms, survey);
    }

    /// A step for this shard was refused, in these words; they go into [`Reconciler::stuck`].
    pub fn refused(&mut self, shard: ShardId, why: String) {
        self.memory.refusals.insert(shard, (self.memory.now_ms, why));
    }

    /// A step for this shard was taken: it goes on. What was refused before, of another kind too, is told again when it is
    /// refused again.
    pub fn done(&mut self, shard: ShardId) {
        self.memory.refusals.remove(&shard);
    }

    /// An action that the last step named hasn't been begun, for want of room: the next names it again.
    pub fn put_off(&mut self, action: &Action) {
        self.memory.paces.put_off(action);
    }

    /// What to do now. To be called about every second, with a clock that never goes back, after the answers
    /// that came were told to [`Reconciler::heard`]. What was done already is named again, at growing
    /// intervals, until map or reports show it.
    pub fn step(&mut self, now_ms: u64, map: &ClusterMap) -> Vec<Action> {
        self.memory.now_ms = now_ms;
        self.memory.forget(map);
        self.ears.step(now_ms, map);
        let view = self.ears.view(now_ms, map);
        self.known = known(&view);
        let mut round = Round {
            ears: &self.ears,
            memory: &mut self.memory,
            view,
            actions: Vec::new(),
            stuck: BTreeMap::new(),
            transfers: 0,
        };
        round.run(&mut self.known);
        self.stuck = round.stuck;
        round.actions
    }

    /// Shards for which something stands still, and why, as of the last step.
    pub fn stuck(&self) -> Vec<(ShardId, String)> {
        let refused = self.memory.refusals.iter().map(|(shard, (_, why))| (*shard, why.clone()));
        let mut all: BTreeMap<ShardId, String> = refused.collect();
        all.extend(self.stuck.clone());
        all.into_iter().collect()
    }

    /// What planners should know, as of the last step.
    pub fn known(&self) -> &Known {
        &self.known
    }

    /// For how long a node hasn't answered, in milliseconds, as of the last step: time in which nobody asked
    /// doesn't count.
    pub fn silent_ms(&self, node: NodeId) -> u64 {
        self.ears.silent_ms(node)
    }
}

impl Memory {
    /// Forgets what is of no use any more.
    fn forget(&mut self, map: &ClusterMap) {
        let now_ms = self.now_ms;
        let under_way = |shard: ShardId, id: u64| {
            map.shards.get(&shard).and_then(|record| record.moving.as_ref()).is_some_and(|m| m.id == id)
        };
        self.paces.forget(now_ms);
        self.fences.retain(|(shard, id), _| under_way(*shard, *id));
        self.stalls.retain(|(shard, id), _| under_way(*shard, *id));
        self.growth.retain(|(shard, id), _| under_way(*shard, *id));
        self.shunned.retain(|_, until| now_ms < *until);
        self.refusals.retain(|_, (at, _)| now_ms < *at + 2 * limits::STEP_RETRY_MS_MAX);
    }
}

fn known(view: &View) -> Known {
    let size = |led: &Led| ShardSize { keys: led.report.keys, bytes: led.report.bytes };
    Known {
        leaders: view.leaders.iter().map(|(shard, led)| (*shard, led.node)).collect(),
        sizes: view.leaders.iter().map(|(shard, led)| (*shard, size(led))).collect(),
        unfit: view.unfit(),
        taken_over: view.nodes.iter().filter(|(_, node)| node.taken_over).map(|(id, _)| *id).collect(),
        fixed: BTreeSet::new(),
    }
}

/// The work of one step.
pub(super) struct Round<'a> {
    ears: &'a Ears,
    pub memory: &'a mut Memory,
    pub view: View<'a>,
    actions: Vec<Action>,
    stuck: BTreeMap<ShardId, String>,
    /// Leaderships moved in this step.
    transfers: usize,
}

impl<'a> Round<'a> {
    fn run(&mut self, known: &mut Known) {
        let map = self.view.map;
        let mut wants = Vec::new();
        let mut moving = 0;
        let mut observed = 0;
        for record in map.shards.values().filter(|shard| !shard.dropped) {
            if self.observe(record, observed) {
                observed += 1;
            }
            if let Some(led) = self.settled_leader(record) {
                let leaves = self.leave(record, led);
                match &record.moving {
                    // Its leader is about to be another.
                    Some(_) if leaves => {}
                    Some(under_way) => self.go_on(record, under_way, led),
                    None => wants.extend(self.want(record, led)),
                }
            }
            if let Some(under_way) = &record.moving {
                moving += u32::from(self.goes_on(record, under_way));
            }
        }
        wants.sort_by_key(|(record, _, want): &(&ShardRecord, Led, Want)| (want.urgency, record.id));
        // What a shard wants may have to wait, or it can want nothing since nobody leads it; that doesn't stand in the
        // way of even load of the others.
        let first = wants.iter().filter(|(_, _, want)| want.urgency != Urgency::Target);
        known.fixed = first.map(|(record, ..)| record.id).collect();
        known.fixed.extend(self.unserved());
        let quiet = moving == 0;
        let begun = self.begin(&wants, moving, known);
        self.control_rebalance();
        self.end_leaving();
        if quiet && begun == 0 {
            even::spread(self, known);
        }
    }

    /// Names a step, unless that was done a short while ago.
    pub fn act(&mut self, action: Action) -> bool {
        let due = self.memory.paces.due(self.memory.now_ms, &action);
        if due {
            self.actions.push(action);
        }
        due
    }

    pub fn now_ms(&self) -> u64 {
        self.memory.now_ms
    }

    /// Names a handover of leadership, as long as there haven't been too many in this step. Returns whether it
    /// did.
    pub fn transfer(&mut self, shard: ShardId, from: NodeId, to: NodeId) -> bool {
        if self.transfers >= limits::LEADER_TRANSFERS_MAX
            || !self.act(Action::Transfer { node: from, shard, to })
        {
            return false;
        }
        self.transfers += 1;
        if let Some(leads) = self.view.leads.get_mut(&from) {
            *leads = leads.saturating_sub(1);
        }
        *self.view.leads.entry(to).or_default() += 1;
        true
    }

    fn wait(&mut self, shard: ShardId, why: String) {
        self.stuck.insert(shard, why);
    }

    /// Has the map take over what the shard itself says of its members. Returns whether it was behind.
    fn observe(&mut self, record: &ShardRecord, observed: usize) -> bool {
        let Some(described) = self.ears.described(record.id) else { return false };
        let behind = described.conf > record.epoch.conf;
        if behind && observed < limits::OBSERVATIONS_MAX {
            let (shard, conf, members) = (record.id, described.conf, described.members.clone());
            self.act(Action::Meta(MetaCommand::ObserveShard { shard, conf, members }));
        }
        behind
    }

    /// The leader of a shard whose members are settled; else says, or does, what is in the way.
    fn settled_leader(&mut self, record: &ShardRecord) -> Option<Led<'a>> {
        let Some(led) = self.view.leaders.get(&record.id).copied() else {
            let why = self.leaderless(record);
            self.wait(record.id, why);
            return None;
        };
        let known = self.ears.described(record.id).map_or(0, |described| described.conf);
        if led.conf() < known.max(record.epoch.conf) {
            let known = known.max(record.epoch.conf);
            let why = format!("its leader is at conf version {}, not yet at {known}", led.conf());
            self.wait(record.id, why);
            return None;
        }
        if led.joint() {
            // The group itself ends it.
            if let Err(why) = led.joint_quorums() {
                self.wait(record.id, format!("a joint change can't end: only {why}"));
            }
            return None;
        }
        let moving = record.moving.as_ref();
        let named = |replica: &ReplicaId| {
            let named = |moving: &ShardMove| {
                moving.removes.contains(replica) || moving.adds.iter().any(|add| add.replica == *replica)
            };
            moving.is_some_and(named)
        };
        let learners = led.report.members.iter().filter(|m| m.role == MemberRole::Learner);
        let strays: Vec<ReplicaId> = learners.map(|m| m.replica).filter(|replica| !named(replica)).collect();
        if !strays.is_empty() {
            // Added by an order that came late, for a move that was rolled back.
            let change = MembershipChange::RemoveLearners(strays);
            let (node, shard, conf) = (led.node, record.id, led.conf());
            self.act(Action::Change { node, shard, conf, change });
            return None;
        }
        Some(led)
    }

    /// What is with the voters of a shard that nobody says he leads.
    fn leaderless(&self, record: &ShardRecord) -> String {
        let reason = |member: &Member| {
            if let Some(why) = self.view.lost(record.id, member) {
                return Some(why);
            }
            let silent = self.view.nodes.get(&member.node).is_some_and(|node| !node.alive);
            silent.then(|| format!("node {} doesn't answer", member.node))
        };
        let voters = record.members.iter().filter(|member| member.role.votes());
        let reasons: Vec<String> = voters.filter_map(reason).collect();
        match reasons.is_empty() {
            true => "no leader is known".into(),
            false => format!("no leader is known: {}", reasons.join("; ")),
        }
    }

    /// Leadership leaves nodes that are to be emptied, or were given up. Returns whether it does now.
    fn leave(&mut self, record: &ShardRecord, led: Led) -> bool {
        let standing = self.view.nodes.get(&led.node).map(|node| node.standing);
        let removes = record.moving.as_ref().map_or(&[][..], |moving| &moving.removes);
        // Not to another that has to give it on, or back.
        let may_lead = |to: &NodeId| self.view.nodes.get(to).is_some_and(|node| node.may_lead);
        let heir = moves::heir(&self.view, led, removes).filter(may_lead);
        standing != Some(Standing::Member) && heir.is_some_and(|to| self.transfer(record.id, led.node, to))
    }

    /// Whether a move gets anywhere: one without a leader, or that has lacked something for long, doesn't, and
    /// must not hold the others up. To be called once in a step, after all else.
    fn goes_on(&mut self, record: &ShardRecord, moving: &ShardMove) -> bool {
        let now_ms = self.now_ms();
        let stall =
            self.memory.stalls.entry((record.id, moving.id)).or_insert(Stall { for_ms: 0, at_ms: now_ms });
        stall.count(now_ms, self.stuck.contains_key(&record.id));
        stall.for_ms < limits::SICK_MS && self.view.leaders.contains_key(&record.id)
    }

    /// Whether the newcomers of a move have come no further for longer than copying the shard can take.
    fn stands_still(&mut self, record: &ShardRecord, moving: &ShardMove, led: Led) -> bool {
        let now_ms = self.now_ms();
        let matched = |add: &Member| led.follower(add.replica).map_or(0, |follower| follower.matched);
        let matched = moving.adds.iter().map(matched).fold(0, u64::saturating_add);
        let growth = self.memory.growth.entry((record.id, moving.id));
        let growth = growth.or_insert(Growth { matched, since_ms: now_ms, bytes: 0 });
        if matched > growth.matched {
            (growth.matched, growth.since_ms) = (matched, now_ms);
        }
        growth.bytes = growth.bytes.max(led.report.bytes);
        let policy = &self.view.map.policy;
        let rate = match policy.bytes_per_second {
            0 => limits::CATCH_UP_BYTES_PER_SECOND,
            limit => limit,
        };
        // A snapshot counts when it has been taken over as a whole, and others are sent beside it.
        let others = u64::from(policy.moves_at_a_time.saturating_mul(limits::REPAIR_MOVES_FACTOR));
        // To make it and to load it takes as long again as to send it.
        let copied = growth.bytes.saturating_mul(2).saturating_mul(others);
        let copying_ms = copied.saturating_mul(1000) / rate.max(1);
        now_ms.saturating_sub(growth.since_ms) >= copying_ms.saturating_add(limits::CATCH_UP_STILL_MS)
    }

    /// A node that was given up and on which nothing is any more is removed: whoever gave it up may have been
    /// interrupted. That is for good, and the map alone may know too little: it may not have followed yet, or have been
    /// recovered from an old replica. So each shard has to have told who its members are since this reconciler began, by a
    /// leader that is no older than the map; and a node that answers must hold nothing. One that is dead can't tell
    /// what it holds: of it only the shards do.
    fn end_leaving(&mut self) {
        let map = self.view.map;
        let leaving = map.nodes.values().filter(|node| node.standing == Standing::Leaving);
        let mut empty: BTreeSet<NodeId> = leaving.map(|node| node.id).collect();
        if empty.is_empty() {
            return;
        }
        let mut untold = Vec::new();
        for shard in map.shards.values().filter(|shard| !shard.dropped) {
            let described = self.ears.described(shard.id);
            let said = described.map_or(&[][..], |described| &described.members);
            for member in shard.ordered().chain(said) {
                empty.remove(&member.node);
            }
            if described.is_none_or(|described| described.conf < shard.epoch.conf) {
                untold.push(shard.id);
            }
        }
        // What isn't a member any more its node removes by itself, and then tells no longer.
        for (node, shard) in self.ears.held(self.now_ms(), map) {
            if empty.remove(&node) {
                let why = || format!("node {node}, which was given up, holds a replica of it");
                self.stuck.entry(shard).or_insert_with(why);
            }
        }
        let Some(first) = empty.first().filter(|_| !untold.is_empty()) else {
            return self.remove_first(&empty);
        };
        for shard in untold {
            let why = self.stuck.entry(shard).or_insert_with(|| "no leader is known".into());
            why.push_str(&format!(
                "; node {first}, which was given up, isn't removed before a leader has told who is a member"
            ));
        }
    }

    fn remove_first(&mut self, empty: &BTreeSet<NodeId>) {
        // It is for good: so not if somebody has taken the node back by then.
        if let Some(record) = empty.first().and_then(|node| self.view.map.nodes.get(node)) {
            let command = MetaCommand::SetStanding { node: record.id, standing: Standing::Removed };
            self.act(Action::Meta(command.seen(record.changed_at)));
        }
    }

    fn go_on(&mut self, record: &ShardRecord, moving: &ShardMove, led: Led) {
        let place = (record.id, moving.id);
        let fenced = self.memory.fences.get(&place).copied();
        let mut next = moves::next(&self.view, record, moving, led, fenced);
        if let Next::CatchingUp(node) = next
            && self.stands_still(record, moving, led)
        {
            next = Next::Stalled(format!("the new replica on node {node} comes no further"));
        }
        match next {
            Next::Nothing | Next::CatchingUp(_) => {}
            Next::Wait(why) => self.wait(record.id, why),
            Next::Do(Action::Transfer { node, to, .. }) => {
                self.transfer(record.id, node, to);
            }
            Next::Do(action) => {
                if let Action::Meta(MetaCommand::CancelMove { .. }) = action {
                    self.shun(record.id, moving);
                }
                self.act(action);
            }
            Next::Fence(conf, action) => {
                self.memory.fences.insert(place, conf);
                self.act(action);
            }
            Next::Stalled(why) => {
                let mut stall = self.memory.stalls.get(&place).copied().unwrap_or_default();
                stall.count(self.now_ms(), true);
                if stall.for_ms >= limits::SICK_MS {
                    self.shun(record.id, moving);
                    self.act(Action::Meta(MetaCommand::CancelMove { shard: record.id, id: moving.id }));
                }
                self.wait(record.id, why);
            }
        }
    }

    /// Other nodes are preferred for a while.
    fn shun(&mut self, shard: ShardId, moving: &ShardMove) {
        let until = self.now_ms() + limits::SHUN_MS;
        self.memory.shunned.extend(moving.adds.iter().map(|add| ((shard, add.node), until)));
    }

    fn want(&mut self, record: &'a ShardRecord, led: Led<'a>) -> Option<(&'a ShardRecord, Led<'a>, Want)> {
        if record.epoch.conf != led.conf() {
            return None;
        }
        let want = wants::want(&self.view, record, led)?;
        Some((record, led, want))
    }

    /// Begins what is most pressing, as far as the policy allows beside those under way. Returns how many.
    fn begin(&mut self, wants: &[(&'a ShardRecord, Led<'a>, Want)], moving: u32, known: &Known) -> u32 {
        if wants.is_empty() {
            return 0;
        }
        let most = self.view.map.policy.moves_at_a_time;
        let mut loads = Loads::new(self.view.map, &known.unfit);
        let mut begun = 0;
        for (record, led, want) in wants {
            let bound = match want.urgency {
                Urgency::Repair(_) => most.saturating_mul(limits::REPAIR_MOVES_FACTOR),
                _ => most,
            };
            if moving + begun >= bound {
                // Wants are in order of urgency: none of the rest has a greater bound. That a plan's shards wait
                // for each other is as it should be.
                if want.urgency != Urgency::Target {
                    let (why, before) = (&want.why, moving + begun);
                    self.wait(record.id, format!("{why}; it waits for {before} moves under way"));
                }
                continue;
            }
            let shunned = self.memory.shunned.range((record.id, NodeId(0))..=(record.id, NodeId(u64::MAX)));
            let shunned: Vec<NodeId> = shunned.map(|((_, node), _)| *node).collect();
            match wants::begin(&self.view, &mut loads, record, *led, want, &shunned) {
                Ok(begin) => {
                    let (shard, conf) = (record.id, record.epoch.conf);
                    let (adds, removes, cause) = (begin.adds, begin.removes, begin.cause);
                    self.act(Action::Meta(MetaCommand::BeginMove { shard, conf, adds, removes, cause }));
                    begun += 1;
                }
                Err(why) => self.wait(record.id, why),
            }
        }
        begun
    }
}

#[cfg(test)]
mod tests;
