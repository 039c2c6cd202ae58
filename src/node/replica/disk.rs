//! What a replica does about its node's disk: refuses new values where there is no room for them, and
//! sees to it that another replica leads while this one's disk is full or hangs or falls behind, or its node is to be
//! emptied.

use std::time::{Duration, Instant};

use actix::prelude::*;

use super::ReplicaActor;
use crate::group::election::Ambition;
use crate::group::types::Operation;
use crate::ids::{NodeId, ReplicaId};
use crate::limits;
use crate::machine::command::{Command, KvCommand};
use crate::node::messages::DiskNews;
use crate::placement::map::is_quorum;
use crate::refusal::Refusal;

impl ReplicaActor {
    /// Why no new value can be taken now; `None` if there is room, or if this isn't for the replica to
    /// say, since another leads.
    ///
    /// The leader's own disk counts, and those of a majority: what they acknowledge they must keep.
    pub(super) fn no_room(&self) -> Option<Refusal> {
        let disk = &self.shared.disk;
        if !self.group.leads() {
            return None;
        }
        if disk.is_full() {
            let free = disk.free_bytes();
            return Some(Refusal::DiskFull(format!("the shard's node has {free} bytes free").into()));
        }
        if !disk.any_other_full() {
            return None;
        }
        let members = self.group.members();
        let voters = members.iter().filter(|m| m.role.votes());
        let (all, full) =
            voters.fold((0, 0), |(all, full), m| (all + 1, full + usize::from(disk.is_full_on(m.node))));
        (!is_quorum(members, |m| !disk.is_full_on(m.node))).then(|| {
            Refusal::DiskFull(
                format!("{full} of the {all} nodes of the shard are below their reserve").into(),
            )
        })
    }

    /// At a tick: a leader that shouldn't lead goes on looking for somebody to lead instead.
    pub(super) fn make_way_now_and_then(&mut self) {
        if (self.disk.full || self.disk.draining) && self.ticks.is_multiple_of(limits::MAKE_WAY_TICKS) {
            self.make_way();
        } else {
            self.make_way_while_held_up();
        }
    }

    /// As one that can't apply for want of memory: hands leadership on, to another one each time it is tried. Who can't
    /// either doesn't take it.
    fn make_way_while_held_up(&mut self) {
        let due = |ticks: &u64| ticks.is_multiple_of(limits::MAKE_WAY_TICKS);
        let Some(ticks) = self.group.held_up_ticks().filter(due).filter(|_| self.group.leads()) else {
            return;
        };
        let heirs = self.heirs_with_room();
        let turn = (ticks / limits::MAKE_WAY_TICKS).checked_rem(heirs.len() as u64);
        if let Some(heir) = turn.and_then(|turn| heirs.get(turn as usize))
            && self.begin_with(*heir).is_ok()
        {
            let why = "the state store takes nothing more at present";
            tracing::info!(shard = %self.shard, to = %heir, why, "handing leadership over");
            self.group.transfer(*heir);
        }
    }

    /// Hands leadership, if this replica has it, to one whose node has room and stays.
    fn make_way(&mut self) {
        if self.group.leads()
            && let Some(heir) = self.willing_heir()
        {
            let why = if self.disk.full { "the disk is full" } else { "the node is to be emptied" };
            tracing::info!(shard = %self.shard, to = %heir, why, "handing leadership over");
            self.group.transfer(heir);
        }
    }

    /// The best successor, of those whose nodes have room and stay if there are any. Leadership is to be handed to it at once.
    pub(super) fn heir(&self) -> Option<ReplicaId> {
        self.willing_heir().or_else(|| self.group.successors().first().copied())
    }

    /// The best successor whose node has room and stays, and to which leadership may be handed; that is to be done at once.
    fn willing_heir(&self) -> Option<ReplicaId> {
        self.heirs_with_room().into_iter().find(|heir| self.begin_with(*heir).is_ok())
    }

    /// Leadership is about to be handed to a member.
    ///
    /// # Errors
    /// Its node hasn't taken it lately, and for how long it shouldn't be.
    fn begin_with(&self, heir: ReplicaId) -> Result<(), Duration> {
        self.group.node_of(heir).map_or(Ok(()), |node| self.shared.reluctance.begin(node, Instant::now()))
    }

    /// At a tick: takes note of a node that hasn't taken leadership.
    pub(super) fn note_lapsed(&mut self) {
        let Some(heir) = self.group.take_lapsed() else { return };
        if let Some(node) = self.group.node_of(heir) {
            self.shared.reluctance.lapsed(node, Instant::now());
            tracing::info!(shard = %self.shard, to = %heir, %node, "leadership was handed over, and not taken");
        }
    }

    /// Leadership is about to be handed to a member, as somebody has asked for.
    ///
    /// # Errors
    /// Its node has failed to take it lately, and when it is tried again.
    pub(super) fn check_willing(&self, to: ReplicaId) -> Result<(), Refusal> {
        let Some(node) = self.group.node_of(to) else { return Ok(()) };
        self.shared.reluctance.begin(node, Instant::now()).map_err(|wait| {
            Refusal::Unavailable(
                format!(
                    "node {node} has not taken leadership that was handed to it: it is tried again in {} ms; is its disk well?",
                    wait.as_millis()
                )
                .into(),
            )
        })
    }

    /// Successors whose nodes have room and stay, and haven't failed to take leadership lately.
    fn heirs_with_room(&self) -> Vec<ReplicaId> {
        let map = self.shared.router.map();
        let stays = |node: NodeId| map.nodes.get(&node).is_none_or(|record| record.standing.takes_replicas());
        let (disk, reluctance, now) = (&self.shared.disk, &self.shared.reluctance, Instant::now());
        let has_room = |heir: &ReplicaId| {
            self.group.node_of(*heir).is_none_or(|node| {
                stays(node) && !disk.is_full_on(node) && reluctance.wait(node, now).is_none()
            })
        };
        self.group.successors().into_iter().filter(has_room).collect()
    }
}

/// Whether an operation takes space for good, if it is carried out.
pub(super) fn adds_value(operation: &Operation) -> bool {
    matches!(
        operation,
        Operation::Command { command: Command::Kv(KvCommand::Put { .. } | KvCommand::Cas { .. }), .. }
    )
}

impl Handler<DiskNews> for ReplicaActor {
    type Result = ();
    fn handle(&mut self, news: DiskNews, ctx: &mut Context<Self>) {
        // Who doesn't lead has nothing to hand over.
        if self.group.leads() {
            self.rouse();
        }
        let before = std::mem::replace(&mut self.disk, news);
        self.group.set_ambition(match news {
            DiskNews { stalled: true, .. } => Ambition::None,
            DiskNews { full: true, .. } | DiskNews { draining: true, .. } => Ambition::Last,
            DiskNews { .. } => Ambition::Usual,
        });
        if news.stalled && !before.stalled {
            // It needs no disk of ours: the order to campaign leaves at once, or with the successor's
            // acknowledgement. Once: whether anybody takes it is out of our hands.
            if self.group.leads()
                && let Some(heir) = self.heir()
            {
                tracing::info!(shard = %self.shard, to = %heir, "handing leadership over: the disk hangs");
                self.group.transfer(heir);
            }
        } else if (news.full && !before.full) || (news.draining && !before.draining) {
            self.make_way();
        }
        self.queue_pump(ctx);
    }
}
