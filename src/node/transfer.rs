//! Moving the leadership of a shard to a given node, as an operator or the reconciler asks for.
//!
//! One attempt: raft takes no commands while it lasts, for at most [`limits::TRANSFER_TICKS_MAX`]. So none is begun with a
//! replica that has no prospect of the whole log in that time; and one that has lapsed isn't begun again here: whoever
//! asked hears what was in the way, and decides.

use std::time::{Duration, Instant};

use raft::StateRole;

use super::handle::NodeHandle;
use super::messages::{AskStatus, Transfer};
use crate::group::types::GroupStatus;
use crate::ids::{NodeId, ShardId};
use crate::limits;
use crate::refusal::Refusal;

impl NodeHandle {
    /// Moves the leadership of `shard` from this node's replica to the one on `to`, and waits until it has moved.
    ///
    /// # Errors
    /// [`Refusal::Behind`] if that replica lacks too much of the log; another one if it can't lead or doesn't
    /// take over, or this one doesn't lead.
    pub async fn transfer(&self, shard: ShardId, to: NodeId, timeout: Duration) -> Result<(), Refusal> {
        let addr = self.member()?.router.replica(shard)?;
        let gone = |_| Refusal::Unavailable("the replica is being rebuilt after a crash".into());
        if to == self.node() {
            return Ok(());
        }
        let begun = Instant::now();
        let mut course = Course::new(shard, to, timeout);
        loop {
            let status = addr.send(AskStatus).await.map_err(gone)?;
            match course.next(&status, begun.elapsed()) {
                Step::Moved => return Ok(()),
                Step::Begin => {
                    let answer = addr.send(Transfer(Some(to))).await.map_err(gone)?;
                    course.answered(answer, begun.elapsed())?;
                }
                Step::Wait => {}
                Step::End(why) => return Err(why),
            }
            tokio::time::sleep(Duration::from_millis(limits::META_RETRY_MS)).await;
        }
    }
}

/// What to do next.
#[derive(PartialEq, Eq, Debug)]
enum Step {
    Begin,
    Wait,
    Moved,
    End(Refusal),
}

/// How an attempt goes. Times count from its begin.
struct Course {
    shard: ShardId,
    to: NodeId,
    timeout: Duration,
    /// When raft began, if it has.
    since: Option<Duration>,
}

impl Course {
    fn new(shard: ShardId, to: NodeId, timeout: Duration) -> Course {
        Course { shard, to, timeout, since: None }
    }

    fn next(&self, status: &GroupStatus, now: Duration) -> Step {
        if status.role != StateRole::Leader {
            let leader = status.leader.and_then(|leader| {
                status.members.iter().find(|member| member.replica == leader).map(|member| member.node)
            });
            return match leader {
                Some(node) if node == self.to => Step::Moved,
                // Another one, by an election of its own.
                Some(_) => Step::End(Refusal::NotLeader { shard: self.shard, leader }),
                None if now >= self.timeout => Step::End(self.has_not_taken()),
                None => Step::Wait,
            };
        }
        let lapses = Duration::from_millis(limits::TRANSFER_MS_MAX);
        match self.since {
            None => Step::Begin,
            Some(since) if now >= since + lapses || now >= self.timeout => Step::End(self.why_not(status)),
            Some(_) => Step::Wait,
        }
    }

    /// The replica that leads has begun, or has said why it doesn't. It may be a moment's matter.
    fn answered(&mut self, answer: Result<(), Refusal>, now: Duration) -> Result<(), Refusal> {
        let patience = self.timeout.min(Duration::from_millis(limits::TRANSFER_WAIT_MS));
        match answer {
            Ok(()) => self.since = Some(now),
            Err(Refusal::Behind { .. } | Refusal::Unavailable(_)) if now < patience => {}
            Err(why) => return Err(why),
        }
        Ok(())
    }

    /// Why leadership hasn't moved, though raft had begun.
    fn why_not(&self, status: &GroupStatus) -> Refusal {
        let replica =
            status.members.iter().find(|member| member.node == self.to).map(|member| member.replica);
        let follower = status.followers.iter().find(|follower| Some(follower.replica) == replica);
        match follower {
            Some(follower) if follower.active && !follower.caught_up && follower.matched < status.last => {
                Refusal::Behind { shard: self.shard, node: self.to, entries: status.last - follower.matched }
            }
            _ => self.has_not_taken(),
        }
    }

    fn has_not_taken(&self) -> Refusal {
        let (to, shard) = (self.to, self.shard);
        let why = format!(
            "node {to} has not taken the leadership of shard {shard}: is it in reach, and its disk well?"
        );
        Refusal::Unavailable(why.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::types::FollowerStatus;
    use crate::ids::{Epoch, ReplicaId};
    use crate::placement::map::{Member, MemberRole};

    const SHARD: ShardId = ShardId(5);
    const TO: NodeId = NodeId(2);
    const LIMIT: Duration = Duration::from_secs(10);

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn status(role: StateRole, leader: Option<u64>, matched: u64, caught_up: bool) -> GroupStatus {
        let member = |n| Member { replica: ReplicaId(10 + n), node: NodeId(n), role: MemberRole::Voter };
        GroupStatus {
            role,
            learner: false,
            term: 7,
            leader: leader.map(ReplicaId),
            applied: 100,
            committed: 100,
            truncated: 0,
            last: 5_000,
            last_term: 7,
            recovering: false,
            state_lost: None,
            incarnation: 1,
            epoch: Epoch::default(),
            members: vec![member(1), member(2), member(3)],
            followers: vec![FollowerStatus { replica: ReplicaId(12), matched, active: true, caught_up }],
        }
    }

    #[test]
    fn one_attempt_and_its_end() {
        let leads = status(StateRole::Leader, Some(11), 5_000, true);
        let mut course = Course::new(SHARD, TO, LIMIT);
        assert_eq!(course.next(&leads, at(0)), Step::Begin);
        assert_eq!(course.answered(Ok(()), at(1)), Ok(()));
        assert_eq!(course.next(&leads, at(20)), Step::Wait, "raft is at it");
        let nobody = status(StateRole::Follower, None, 0, false);
        assert_eq!(course.next(&nobody, at(40)), Step::Wait);
        assert_eq!(course.next(&status(StateRole::Follower, Some(12), 0, false), at(60)), Step::Moved);
        let other = status(StateRole::Follower, Some(13), 0, false);
        let elsewhere = Refusal::NotLeader { shard: SHARD, leader: Some(NodeId(3)) };
        assert_eq!(course.next(&other, at(60)), Step::End(elsewhere));
        let lapsed = at(1 + limits::TRANSFER_MS_MAX);
        assert!(matches!(course.next(&leads, lapsed), Step::End(Refusal::Unavailable(_))));
    }

    #[test]
    fn who_is_behind_is_waited_for_a_moment_and_then_named() {
        let behind = || Err(Refusal::Behind { shard: SHARD, node: TO, entries: 4_900 });
        let mut course = Course::new(SHARD, TO, LIMIT);
        assert_eq!(course.answered(behind(), at(10)), Ok(()));
        let leads = status(StateRole::Leader, Some(11), 100, false);
        assert_eq!(course.next(&leads, at(30)), Step::Begin, "it is tried again");
        assert_eq!(course.answered(behind(), at(limits::TRANSFER_WAIT_MS)), behind());
        // It was near enough to begin, and hasn't made it.
        assert_eq!(course.answered(Ok(()), at(40)), Ok(()));
        let lapsed = at(40 + limits::TRANSFER_MS_MAX);
        let told = Refusal::Behind { shard: SHARD, node: TO, entries: 4_900 };
        assert_eq!(course.next(&leads, lapsed), Step::End(told));
        let refused = || Err(Refusal::Refused("it is a learner".into()));
        assert_eq!(course.answered(refused(), at(0)), refused(), "that doesn't pass");
    }
}
