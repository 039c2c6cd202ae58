//! How a replica that sleeps is kept from the ticks of its thread, and woken in time.
//!
//! Whether it sleeps, its group decides ([`crate::group::sleep`]). Here that is held against what the thread has heard of
//! other nodes, and told to the roster, by which the hub knows whom to tick.

use actix::prelude::*;

use super::ReplicaActor;
use crate::codec::GroupMessage;
use crate::node::messages::{LeaderRests, NodeAlarm};

impl ReplicaActor {
    /// A request has come.
    pub(super) fn rouse_for_a_request(&mut self) {
        if self.asleep_since.is_some() {
            self.rouse();
            self.group.call_leader();
        }
    }

    /// Something is about to happen to the replica: it is to be awake.
    pub(super) fn rouse(&mut self) {
        if self.asleep_since.is_some() {
            let silence = self.roster.ask(|nodes| self.group.leader_silence(nodes));
            self.wake(silence);
        }
    }

    /// The same, if the message wakes it.
    pub(super) fn rouse_for(&mut self, message: &GroupMessage) {
        if self.asleep_since.is_some() && !self.group.sleeps_through(message) {
            self.rouse();
        }
    }

    fn wake(&mut self, silence: u64) {
        let now = self.roster.ask(|nodes| nodes.now());
        let slept = self.asleep_since.take().map_or(0, |since| now - since);
        self.group.wake(slept, silence);
        self.tell_rest(false);
        self.roster.wakes(self.replica, self.incarnation);
    }

    /// Takes note of whether the replica is asleep, after whatever has happened to it.
    pub(super) fn settle(&mut self) {
        match (self.group.is_asleep(), self.asleep_since.is_some()) {
            (true, false) => {
                if !self.roster.ask(|nodes| self.group.is_watched_over(nodes)) {
                    let silence = self.roster.ask(|nodes| self.group.leader_silence(nodes));
                    return self.group.wake(0, silence);
                }
                self.asleep_since = Some(self.roster.sleeps(self.replica, self.incarnation));
                self.tell_rest(self.group.leads());
                // The next look would come with a tick; and others have more use for what was read here.
                self.compact();
                self.forget_all_known();
            }
            (false, true) => {
                // The group woke by itself.
                self.asleep_since = None;
                self.tell_rest(false);
                self.roster.wakes(self.replica, self.incarnation);
            }
            _ => {}
        }
    }
}

impl ReplicaActor {
    /// Whoever surveys the node needn't ask a leader that sleeps: nothing changes meanwhile.
    fn tell_rest(&mut self, rests: bool) {
        if std::mem::replace(&mut self.rests_as_leader, rests) != rests {
            let status = rests.then(|| Box::new(self.group.status()));
            self.guard.supervisor.do_send(LeaderRests { replica: self.replica, status });
        }
    }
}

impl Handler<NodeAlarm> for ReplicaActor {
    type Result = ();
    fn handle(&mut self, NodeAlarm(node, alarm): NodeAlarm, ctx: &mut Context<Self>) {
        let woken = self.asleep_since.is_some();
        if woken {
            let heeds = self.roster.ask(|nodes| self.group.heeds(node, alarm, nodes));
            let Some(silence) = heeds else { return };
            self.wake(silence);
        }
        match self.group.alarmed(node, alarm) {
            Ok(vacant) => {
                if woken && !vacant {
                    self.group.call_leader();
                }
                if woken || vacant {
                    self.queue_pump(ctx);
                }
            }
            Err(error) => self.fail(error.to_string(), ctx),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use crate::group::types::{MembershipChange, Operation};
    use crate::ids::{NodeId, ReplicaId, ShardId};
    use crate::node::fence_tests::put;
    use crate::node::messages::Freeze;
    use crate::node::test_node::{PATIENCE, TestNode};
    use crate::placement::map::{Member, MemberRole};

    async fn until(what: &str, reached: impl Fn() -> bool) {
        let begun = Instant::now();
        while !reached() {
            assert!(begun.elapsed() < PATIENCE, "not {what} in time");
            actix::clock::sleep(Duration::from_millis(5)).await;
        }
    }

    #[actix::test]
    async fn who_sleeps_knows_nothing_of_the_engine() {
        let dir = tempfile::tempdir().expect("a directory");
        let node = TestNode::sleeping_after(dir.path(), 20).led().await;
        let memory = &node.shared.memory;
        let replica = node.shared.router.replica(ShardId(1)).expect("it runs");
        replica.send(Freeze { for_log: false }).await.expect("it runs");
        until("flushed", || memory.bytes() == (0, 0)).await;
        node.submit(put("d", "later"))
            .await
            .expect("an answer")
            .expect("started")
            .remove(0)
            .expect("written");
        // Memory isn't short, so nobody who is awake gives anything back.
        until("asleep", || memory.known() == 0).await;
        replica.send(Freeze { for_log: false }).await.expect("it runs");
        until("flushed", || memory.bytes() == (0, 0)).await;
        until("without what it has flushed", || memory.known() == 0).await;
        assert_eq!(node.value("d").await.as_deref(), Some(&b"later"[..]));
        node.stop().await;
    }

    /// A log that is too large as a whole gives way where its oldest entries are, also if their group sleeps.
    #[actix::test]
    async fn who_sleeps_without_a_member_keeps_no_log_for_it_where_that_is_too_large() {
        let dir = tempfile::tempdir().expect("a directory");
        let node = TestNode::sleeping_after(dir.path(), 20).led().await;
        let memory = &node.shared.memory;
        let replica = node.shared.router.replica(ShardId(1)).expect("it runs");
        let absent = Member { replica: ReplicaId(9), node: NodeId(2), role: MemberRole::Learner };
        let change = MembershipChange::AddLearners(vec![absent]);
        for operation in [Operation::Change { conf: 1, change }, put("d", "later")] {
            node.submit(operation).await.expect("an answer").expect("started").remove(0).expect("done");
        }
        // Who is awake knows what it has flushed.
        replica.send(Freeze { for_log: false }).await.expect("it runs");
        until("flushed", || memory.bytes() == (0, 0)).await;
        until("asleep", || memory.known() == 0).await;
        let (begins, last) = node.logs()[&1];
        assert!(begins < last, "what it lacks is kept for it: {begins}, {last}");
        replica.send(Freeze { for_log: true }).await.expect("it runs");
        until("let go", || node.logs()[&1].0 == last).await;
        assert_eq!(memory.known(), 0, "nobody woke for that");
        node.stop().await;
    }
}
