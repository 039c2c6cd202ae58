//! How replicas that sleep are woken, as [`crate::node`] does it, and the heartbeats of nodes that stand for theirs.

use raft::eraftpb::MessageType;

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

impl World {
    /// At a tick of a node: who has fallen silent, and a sign of life to the others now and then.
    pub(super) fn watch(&mut self, id: NodeId) {
        if self.options.sleep_after == 0 {
            return;
        }
        let Some(process) = self.nodes.get_mut(&id).and_then(|node| node.process.as_mut()) else { return };
        let silent = process.nodes.tick();
        let beats = process.nodes.now().is_multiple_of(limits::HEARTBEAT_TICKS as u64);
        let (number, ended) = (process.number, process.ended);
        for node in silent {
            self.alarm(id, node, Alarm::Silent);
        }
        let others: Vec<NodeId> = self.nodes.keys().copied().filter(|other| *other != id && beats).collect();
        let now = self.clock.now;
        for other in others {
            let Fate::Arrives(arrivals) = self.network.send(now, id, other, &mut self.dice) else { continue };
            for at in arrivals {
                self.clock.after(at - now, Event::Node(other, NodeEvent::Heard(id, number, ended)));
            }
        }
    }

    /// A node hears that another is alive.
    pub(super) fn on_heard(&mut self, id: NodeId, from: NodeId, number: u64, ended: u64) {
        let process = self.nodes.get_mut(&id).and_then(|node| node.process.as_mut());
        if let Some(alarm) = process.and_then(|process| process.nodes.heard(from, number, ended)) {
            self.alarm(id, from, alarm);
        }
    }

    fn alarm(&mut self, id: NodeId, about: NodeId, alarm: Alarm) {
        if self.options.planted.is(Planted::AlarmsUnheard) {
            return;
        }
        let Some(process) = self.nodes.get_mut(&id).and_then(|node| node.process.as_mut()) else { return };
        let (now, mut woken) = (process.nodes.now(), Vec::new());
        for (replica_id, replica) in &mut process.replicas {
            let Some(since) = replica.asleep_since else {
                replica.group.alarmed();
                continue;
            };
            if let Some(silence) = replica.group.heeds(about, alarm, &process.nodes) {
                replica.asleep_since = None;
                replica.group.wake(now - since, silence);
                replica.group.call_leader();
                woken.push(*replica_id);
            }
        }
        for replica in woken {
            self.count("wakes by an alarm");
            self.queue_pump(id, replica);
        }
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
    fn check_sleep(&self, id: NodeId, leader: ReplicaId) -> Result<(), Violation> {
        let Some(replica) = self.nodes.get(&id).and_then(|node| node.replica(leader)) else { return Ok(()) };
        let (word, status) = (replica.group.last_word(), replica.group.status());
        for member in status.members.iter().filter(|member| member.replica != leader) {
            if !self.agreed.contains(&(member.replica, word)) {
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
        Ok(())
    }

    /// What a message says about sleep, for the check.
    pub(super) fn note_agreement(&mut self, message: &GroupMessage) {
        let Some(word) = message.sleep else { return };
        let (to, from) = (ReplicaId(message.message.to), ReplicaId(message.message.from));
        match message.message.get_msg_type() {
            MessageType::MsgHeartbeat => drop(self.asked.insert(to, word)),
            _ => drop(self.agreed.insert((from, word))),
        }
    }

    /// An answer to a heartbeat says what its sender was asked last.
    pub(super) fn assume_agreement(&self, message: &mut GroupMessage) {
        if message.message.get_msg_type() == MessageType::MsgHeartbeatResponse {
            message.sleep = self.asked.get(&ReplicaId(message.message.from)).copied();
        }
    }
}
