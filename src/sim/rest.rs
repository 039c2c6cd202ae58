//! How replicas that sleep are woken, as [`crate::node`] does it, and the heartbeats of nodes that stand for theirs.

use raft::eraftpb::MessageType;

use super::Time;
use super::checks::Violation;
use super::network::Fate;
use super::planted::Planted;
use super::report::note;
use super::shell::NodeEvent;
use super::world::{Event, World};
use crate::codec::GroupMessage;
use crate::group::nodes::Alarm;
use crate::ids::{NodeId, ReplicaId};
use crate::limits;
use crate::placement::map::{Member, is_quorum};

impl World {
    /// At a tick of a node: who has fallen silent, and a sign of life to the others now and then.
    pub(super) fn watch(&mut self, id: NodeId) -> Result<(), Violation> {
        if self.options.sleep_after == 0 {
            return Ok(());
        }
        let Some(process) = self.nodes.get_mut(&id).and_then(|node| node.process.as_mut()) else {
            return Ok(());
        };
        let silent = process.nodes.tick();
        let beats = process.nodes.now().is_multiple_of(limits::HEARTBEAT_TICKS as u64);
        let (number, ended) = (process.number, process.ended);
        for node in silent {
            self.alarm(id, node, Alarm::Silent)?;
        }
        let others: Vec<NodeId> = self.nodes.keys().copied().filter(|other| *other != id && beats).collect();
        let now = self.clock.now;
        for other in others {
            let Fate::Arrives(arrivals) = self.network.send(now, id, other, &mut self.dice) else { continue };
            for at in arrivals {
                self.clock.after(at - now, Event::Node(other, NodeEvent::Heard(id, number, ended)));
            }
        }
        Ok(())
    }

    /// A node hears that another is alive.
    pub(super) fn on_heard(
        &mut self,
        id: NodeId,
        from: NodeId,
        number: u64,
        ended: u64,
    ) -> Result<(), Violation> {
        let process = self.nodes.get_mut(&id).and_then(|node| node.process.as_mut());
        match process.and_then(|process| process.nodes.heard(from, number, ended)) {
            Some(alarm) => self.alarm(id, from, alarm),
            None => Ok(()),
        }
    }

    /// A node finds that the process of another is gone, rightly or not.
    pub(super) fn on_gone(&mut self, id: NodeId, about: NodeId, number: u64) -> Result<(), Violation> {
        let process = self.nodes.get_mut(&id).and_then(|node| node.process.as_mut());
        match process.and_then(|process| process.nodes.gone(about, number)) {
            Some(alarm) => self.alarm(id, about, alarm),
            None => Ok(()),
        }
    }

    /// Some of the others find that a process of a node has ended, each as soon as its connection tells.
    pub(super) fn tell_gone(&mut self, about: NodeId, number: u64, most: Time) {
        let others: Vec<NodeId> = self.nodes.keys().copied().filter(|other| *other != about).collect();
        for other in others {
            // Where a link is down nobody answers, not even that nobody listens.
            let is_told = !self.network.is_blocked(other, about) && !self.network.is_blocked(about, other);
            if is_told && self.dice.chance(800) {
                let delay = self.dice.between(50, most);
                self.clock.after(delay, Event::Node(other, NodeEvent::Gone(about, number)));
            }
        }
    }

    fn alarm(&mut self, id: NodeId, about: NodeId, alarm: Alarm) -> Result<(), Violation> {
        if self.options.planted.is(Planted::AlarmsUnheard) {
            return Ok(());
        }
        let Some(process) = self.nodes.get_mut(&id).and_then(|node| node.process.as_mut()) else {
            return Ok(());
        };
        let (now, mut roused, mut vacancies) = (process.nodes.now(), Vec::new(), 0);
        for (replica_id, replica) in &mut process.replicas {
            let woken = replica.asleep_since;
            if let Some(since) = woken {
                let heeds = replica.group.heeds(about, alarm, &process.nodes);
                let Some(silence) = heeds else { continue };
                replica.asleep_since = None;
                replica.group.wake(now - since, silence);
            }
            let vacant = replica.group.alarmed(about, alarm).map_err(|error| {
                Violation::new("replica", format!("replica {replica_id}, {alarm:?} of node {about}: {error}"))
            })?;
            if woken.is_some() && !vacant {
                replica.group.call_leader();
            }
            if woken.is_some() || vacant {
                roused.push((*replica_id, woken.is_some()));
            }
            vacancies += usize::from(vacant);
        }
        (0..vacancies).for_each(|_| self.count("leaders found gone"));
        for (replica, woken) in roused {
            if woken {
                self.count("wakes by an alarm");
            }
            self.queue_pump(id, replica);
        }
        Ok(())
    }

    /// Something is about to happen to a replica: it is to be awake.
    pub(super) fn rouse(&mut self, id: NodeId, replica_id: ReplicaId) {
        let Some(process) = self.nodes.get_mut(&id).and_then(|node| node.process.as_mut()) else { return };
        let Some(replica) = process.replicas.get_mut(&replica_id) else { return };
        if let Some(since) = replica.asleep_since.take() {
            let silence = replica.group.leader_silence(&process.nodes);
            replica.group.wake(process.nodes.now() - since, silence);
        }
    }

    /// Takes note of whether a replica is asleep.
    pub(super) fn settle(&mut self, id: NodeId, replica_id: ReplicaId) -> Result<(), Violation> {
        let Some(process) = self.nodes.get_mut(&id).and_then(|node| node.process.as_mut()) else {
            return Ok(());
        };
        let Some(replica) = process.replicas.get_mut(&replica_id) else { return Ok(()) };
        match (replica.group.is_asleep(), replica.asleep_since.is_some()) {
            (true, false) => {}
            (false, true) => {
                replica.asleep_since = None;
                return Ok(());
            }
            _ => return Ok(()),
        }
        if !replica.group.is_watched_over(&process.nodes) {
            let silence = replica.group.leader_silence(&process.nodes);
            replica.group.wake(0, silence);
            return Ok(());
        }
        replica.asleep_since = Some(process.nodes.now());
        let leads = replica.group.leads();
        note!(self.trace, "{} replica {} falls asleep, leads {}", self.clock.now, replica_id, leads);
        self.count(if leads { "groups that fell asleep" } else { "followers that fell asleep" });
        self.compact(id, replica_id);
        if leads { self.check_sleep(id, replica_id) } else { Ok(()) }
    }

    /// A leader has fallen asleep.
    fn check_sleep(&mut self, id: NodeId, leader: ReplicaId) -> Result<(), Violation> {
        let without = self.check_agreement(id, leader)?;
        (0..without).for_each(|_| self.count("members without which a group fell asleep"));
        Ok(())
    }

    /// Returns how many members haven't agreed: of each its leader's node must know that it isn't there.
    fn check_agreement(&self, id: NodeId, leader: ReplicaId) -> Result<usize, Violation> {
        let Some(process) = self.nodes.get(&id).and_then(|node| node.process.as_ref()) else { return Ok(0) };
        let Some(replica) = process.replicas.get(&leader) else { return Ok(0) };
        let (word, status) = (replica.group.last_word(), replica.group.status());
        let agrees = |member: &Member| {
            member.replica == leader || self.agreed.contains(&(member.replica, status.term, word))
        };
        if !is_quorum(&status.members, agrees) {
            let detail = format!("replica {leader} fell asleep, and no majority has agreed to it");
            return Err(Violation::new("sleep", detail));
        }
        let mut without = 0;
        for member in status.members.iter().filter(|member| member.replica != leader) {
            if !agrees(member) {
                if process.nodes.process(member.node).is_none() {
                    without += 1;
                    continue;
                }
                let other = member.replica;
                let detail = format!("replica {leader} fell asleep, and replica {other} hasn't agreed to it");
                return Err(Violation::new("sleep", detail));
            }
            // It may be down by now, or may have been opened anew.
            let Some(other) = self.nodes.get(&member.node).and_then(|node| node.replica(member.replica))
            else {
                continue;
            };
            // What it has applied and compacted since, others of the group being further by now, the check of logs has seen.
            let compacted = !other.terms.contains_key(&status.last)
                && other.group.state().header().applied.index >= status.last;
            if !compacted && other.terms.get(&status.last) != Some(&status.last_term) {
                let detail = format!(
                    "replica {leader} fell asleep at entry {}, and replica {} doesn't have that",
                    status.last, member.replica
                );
                return Err(Violation::new("sleep", detail));
            }
        }
        Ok(without)
    }

    /// What a message says about sleep, for the check.
    pub(super) fn note_agreement(&mut self, message: &GroupMessage) {
        let Some(word) = message.sleep else { return };
        let (to, from) = (ReplicaId(message.message.to), ReplicaId(message.message.from));
        match message.message.get_msg_type() {
            MessageType::MsgHeartbeat => drop(self.asked.insert(to, word)),
            _ => drop(self.agreed.insert((from, message.message.term, word))),
        }
    }

    /// An answer to a heartbeat says what its sender was asked last.
    pub(super) fn assume_agreement(&self, message: &mut GroupMessage) {
        if message.message.get_msg_type() == MessageType::MsgHeartbeatResponse {
            message.sleep = self.asked.get(&ReplicaId(message.message.from)).copied();
        }
    }
}
