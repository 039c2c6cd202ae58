//! One pass over a simulated replica: its effects are looked at by the checks and carried out, in the
//! order in which [`crate::node`] does it.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use raft::eraftpb::MessageType;

use super::checks::Violation;
use super::checks::leaders::Leaders;
use super::checks::state::{Truth, changed};
use super::disk::WriteName;
use super::network::Fate;
use super::planted::Planted;
use super::report::{Shown, note};
use super::shell::{Boundary, NodeEvent, ReplicaEvent};
use super::world::{Event, World};
use crate::codec::{GroupMessage, messages};
use crate::group::types::{Effects, LeaderChange};
use crate::ids::{Index, METADATA_SHARD, NodeId, ReplicaId, ShardId, Term};
use crate::placement::map::MemberRole;
use crate::storage::log::LogStore;

impl World {
    pub(super) fn pump(&mut self, id: NodeId, replica_id: ReplicaId) -> Result<(), Violation> {
        let now = self.clock.now;
        let Some(node) = self.nodes.get_mut(&id) else { return Ok(()) };
        let Some(replica) = node.process.as_mut().and_then(|p| p.replicas.get_mut(&replica_id)) else {
            return Ok(());
        };
        replica.pump_queued = false;
        let known = replica.group.state().known_bytes();
        replica.group.allow_known(self.options.known_bytes_max().saturating_sub(known));
        let members = &replica.group.state().header().members;
        let is_lone = members.iter().filter(|member| member.role.votes()).count() < 2;
        let (shard, incarnation) = (replica.shard, replica.incarnation);
        let fails = node.unreadable && self.dice.chance(300);
        let has_work = replica.group.has_work();
        node.disk.faulty.begin(fails);
        let pumped = catch_unwind(AssertUnwindSafe(|| replica.group.pump()));
        node.disk.faulty.end();
        let effects = match pumped {
            Ok(Ok(effects)) => effects,
            Ok(Err(error)) => return self.stops(id, replica_id, &error.to_string()),
            // raft-rs panics when its log can't be read; a node's supervisor takes that for a stop.
            Err(_) if self.excuse(id, replica_id, "").is_ok() => {
                return self.stops(id, replica_id, "a panic");
            }
            Err(panic) => resume_unwind(panic),
        };
        if !has_work && !effects.is_empty() {
            // A node would have left this pump out.
            let what =
                format!("a pump of replica {replica_id} does something where it said that there is no work");
            return Err(Violation::new("replica", what));
        }
        let dies = replica.dies.filter(|boundary| boundary.is_in(&effects));
        if dies == Some(Boundary::Applied) {
            return self.dies(id, replica_id);
        }
        // Nobody proposes marks here, and to a replica that does nothing about them they are empty entries.
        let Effects { messages, write, done, reads, fetch, snapshot, leader, marked: _, more } = effects;
        if let Some(first) = write.as_ref().and_then(|numbered| numbered.write.entries.first()) {
            let before = replica.terms.range(..first.index).next_back().map_or(0, |(_, term)| *term);
            replica.terms.split_off(&first.index);
            for entry in write.iter().flat_map(|numbered| &numbered.write.entries) {
                replica.terms.insert(entry.index, entry.term);
            }
            for entry in write.iter().flat_map(|numbered| &numbered.write.entries) {
                let change = changed(entry).map_err(|error| Violation::new("state", error))?;
                if let Some((_, members)) = change {
                    self.proposed.entry(shard).or_default().push((entry.index, members));
                }
            }
            // A lone replica leads a term before it is on disk, and leads it again after a crash.
            if before > 0 && !is_lone {
                let entries = write.iter().flat_map(|numbered| &numbered.write.entries);
                let entries: Vec<_> = entries.cloned().collect();
                self.logs.observe(shard, replica_id, before, &entries)?;
            }
        }
        if let Some(change) = leader {
            note!(self.trace, "{} replica {} {:?}", now, replica_id, Shown(change));
            observe_leader(
                &mut self.leaders,
                self.truths.get(&shard),
                shard,
                replica_id,
                change,
                &replica.terms,
            )?;
        }
        let (mut commits, mut has_map) = (Vec::new(), false);
        if let Some(truth) = self.truths.get_mut(&shard) {
            let header = replica.group.state().header();
            let (from, to) = (replica.observed + 1, header.applied.index);
            if from <= to {
                let term = replica.group.status().term;
                let entries = node.disk.log.entries(replica_id, from, to + 1, usize::MAX);
                let entries = entries.map_err(|e| Violation::new("disk", e.to_string()))?;
                if entries.len() as u64 != to + 1 - from {
                    let detail = format!("replica {replica_id} applied up to {to}, its log on disk has less");
                    return Err(Violation::new("state", detail));
                }
                for entry in &entries {
                    if entry.index > truth.last() {
                        commits.push((entry.index, entry.term));
                    }
                    truth.apply(shard, replica_id, term, entry)?;
                }
                replica.observed = to;
                has_map = shard == METADATA_SHARD;
                let state = replica.group.state();
                truth.compare(shard, replica_id, to, state, state.session_table())?;
                let (epoch, members) = (state.header().epoch, &state.header().members);
                let status = replica.group.status();
                let known = if status.recovering { status.committed } else { 0 };
                truth.members.compare(shard, replica_id, (to, known), epoch.conf, members)?;
                note!(self.trace, "{} replica {} applied {}", now, replica_id, to);
            }
        }
        let reader = (!reads.is_empty()).then(|| Box::new(replica.group.state().reader()));
        for (index, term) in commits {
            self.check_commit(shard, index, term)?;
        }
        for (to, message) in messages {
            self.send(id, to, message)?;
        }
        if dies == Some(Boundary::Sent) {
            return self.dies(id, replica_id);
        }
        if let Some(numbered) = write {
            let name = WriteName { replica: replica_id, incarnation, number: numbered.number };
            note!(
                self.trace,
                "{} replica {} writes {} entries {:?}",
                now,
                replica_id,
                numbered.write.entries.len(),
                numbered.write.hard_state.as_ref().map(|hs| (hs.term, hs.vote, hs.commit))
            );
            if let Some(node) = self.nodes.get_mut(&id) {
                let at_once = node.disk.write(name, numbered.write);
                let at_once = at_once.map_err(|e| Violation::new("disk", e.to_string()))?;
                if at_once {
                    let event =
                        NodeEvent::Replica(replica_id, incarnation, ReplicaEvent::Persisted(name.number));
                    self.clock.after(10, Event::Node(id, event));
                }
            }
        }
        self.drive_disk(id);
        if dies == Some(Boundary::Written) {
            return self.dies(id, replica_id);
        }
        for (token, result) in done {
            self.answer(id, replica_id, token, result)?;
        }
        if dies == Some(Boundary::Answered) {
            return self.dies(id, replica_id);
        }
        let mut later = |delay, event| {
            self.clock.after(delay, Event::Node(id, NodeEvent::Replica(replica_id, incarnation, event)));
        };
        if let Some(reader) = reader {
            later(self.dice.between(50, 3_000), ReplicaEvent::Read(reader, reads));
        }
        if let Some(fetch) = fetch {
            later(self.dice.between(50, 5_000), ReplicaEvent::Fetch(fetch));
        }
        if let Some(wanted) = snapshot {
            self.want_snapshot(id, replica_id, wanted);
        }
        if more {
            self.queue_pump(id, replica_id);
        }
        self.settle(id, replica_id)?;
        if has_map {
            self.publish(id, replica_id)?;
            self.check_new_map()?;
        }
        Ok(())
    }

    /// The replica ends in the middle of a pass.
    fn dies(&mut self, id: NodeId, replica_id: ReplicaId) -> Result<(), Violation> {
        self.count("replica crashes within a pass");
        self.crash_replica(id, replica_id);
        Ok(())
    }

    /// An acknowledgement of a learner is taken for that of a voter.
    fn count_learner(&self, message: &mut GroupMessage) {
        let members = self.members(message.shard);
        let learns = |id| members.iter().any(|m| m.replica.0 == id && m.role == MemberRole::Learner);
        let acknowledges = message.message.get_msg_type() == MessageType::MsgAppendResponse;
        let voter = members.iter().find(|m| m.role.votes() && m.replica.0 != message.message.to);
        if let Some(voter) = voter.filter(|_| acknowledges && learns(message.message.from)) {
            message.message.from = voter.replica.0;
        }
    }

    fn send(&mut self, from: NodeId, to: NodeId, mut message: GroupMessage) -> Result<(), Violation> {
        if self.options.planted.is(Planted::LearnerCounted) {
            self.count_learner(&mut message);
        }
        self.note_agreement(&message);
        if self.options.planted.is(Planted::AgreementAssumed) {
            self.assume_agreement(&mut message);
        }
        messages::check(&message)
            .map_err(|error| Violation::new("messages", format!("{error}: {:?}", message.message)))?;
        let now = self.clock.now;
        let m = &message.message;
        note!(
            self.trace,
            "{} {}->{} {:?} term {} index {} log term {} commit {} entries {} reject {} safe {}",
            now,
            m.from,
            m.to,
            m.get_msg_type(),
            m.term,
            m.index,
            m.log_term,
            m.commit,
            m.entries.len(),
            m.reject,
            message.safe_index
        );
        let fate = self.network.send(now, from, to, &mut self.dice);
        let (what, noticed) = match &fate {
            Fate::Arrives(at) if at.len() > 1 => ("messages duplicated", 0),
            Fate::Arrives(_) => ("", 0),
            Fate::Lost => ("messages lost", 50),
            Fate::Corrupted => ("frames corrupted", 500),
            Fate::Vanishes => ("messages vanished", 0),
        };
        if !what.is_empty() {
            self.count(what);
        }
        if noticed > 0 && self.dice.chance(noticed) {
            let delay = self.dice.between(100, 100_000);
            self.clock.after(delay, Event::Node(from, NodeEvent::Unreachable(to)));
        }
        let Fate::Arrives(arrivals) = fate else { return Ok(()) };
        for at in arrivals {
            let event = NodeEvent::Message(from, Box::new(message.clone()));
            self.clock.after(at - now, Event::Node(to, event));
        }
        Ok(())
    }
}

fn observe_leader(
    leaders: &mut Leaders,
    truth: Option<&Truth>,
    shard: ShardId,
    replica: ReplicaId,
    change: LeaderChange,
    terms: &BTreeMap<Index, Term>,
) -> Result<(), Violation> {
    if let Some(leader) = change.leader {
        leaders.observe(shard, change.term, leader)?;
    }
    let (true, Some(truth)) = (change.local, truth) else { return Ok(()) };
    // Compacted entries are on disk at every replica; what is missing behind the last has no term.
    let first = terms.keys().next().copied().unwrap_or(Index::MAX);
    truth.check_leader(shard, replica, change.term, |index| {
        (index >= first).then(|| terms.get(&index).copied().unwrap_or(0))
    })
}
