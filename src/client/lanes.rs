//! Queues of operations: a lane per shard for those that read, and one for those that write. Sans-I/O.
//!
//! An operation leaves at once while no call of its lane is under way; otherwise it waits, and all that wait
//! leave together in the next call. So a lone operation never waits, and the busier a shard, the larger its
//! calls: what a call costs, and the log entry that it becomes, is shared by all of its operations. Who is answered
//! by a call may ask for the next operation before the next call leaves. A read
//! doesn't wait for the disk that writes wait for, so each have calls of their own.
//!
//! More calls than one, up to [`CALLS_PER_SHARD_MAX`], are under way where one after the other wouldn't do: while
//! much waits ([`CALL_OPERATIONS_MIN`], [`CALL_BYTES_MIN`]), and beside a call that takes long
//! ([`CALL_GATHER_MS`]), be it that its node is far away or that it hangs.
//!
//! A lane for writes has a session, whose tags its commands get when they leave for the first time. A call
//! has one session: a command of another one waits for the next, and so does what stands behind it. What
//! leaves again goes first, since others may have to wait until it has ended.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::retry::Kind;
use super::session::{Current, Moment, Session};
use super::ticket::Ticket;
use crate::ids::{SessionId, ShardId};
use crate::limits::{
    BATCH_BYTES_MAX, BATCH_OPERATIONS_MAX, CALL_BYTES_MIN, CALL_GATHER_MS, CALL_OPERATIONS_MIN,
    CALLS_PER_SHARD_MAX,
};

/// Which queue.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct LaneId {
    /// To which shard.
    pub shard: ShardId,
    /// Whether its operations read, or write.
    pub reads: bool,
}

impl LaneId {
    /// Where operations of this kind go.
    pub fn of(shard: ShardId, kind: Kind) -> LaneId {
        LaneId { shard, reads: kind == Kind::Read }
    }
}

#[derive(Default)]
struct Lane {
    queue: VecDeque<Ticket>,
    /// Of the keys and values in the queue.
    bytes: usize,
    calls: usize,
    /// When the last call left.
    left: Moment,
    /// No deadline in the queue is before this; `None` for an empty queue.
    earliest: Option<Instant>,
    session: Current,
}

impl Lane {
    /// Whether a call may leave now, if something waits.
    fn is_free(&self, now: Moment) -> bool {
        match self.calls {
            0 => true,
            CALLS_PER_SHARD_MAX.. => false,
            _ => {
                self.queue.len() >= CALL_OPERATIONS_MIN
                    || self.bytes >= CALL_BYTES_MIN
                    || now.saturating_sub(self.left) >= Duration::from_millis(CALL_GATHER_MS)
            }
        }
    }
}

/// All queues.
#[derive(Default)]
pub struct Lanes {
    lanes: HashMap<LaneId, Lane>,
}

/// What to do next for a lane.
pub enum Next {
    /// Nothing: no operation waits, or does so to share the next call, or for a command of its session to end.
    Wait,
    /// Send these; [`Lanes::finished`] tells when the call is over. `stale` were queued under another
    /// range version and must be routed anew: their keys may belong to another shard now.
    Call {
        /// To send.
        batch: Vec<Ticket>,
        /// To route anew.
        stale: Vec<Ticket>,
    },
}

impl Lanes {
    /// Adds an operation to the queue for its kind of a shard, and tells which that is.
    pub fn push(&mut self, shard: ShardId, ticket: Ticket) -> LaneId {
        let id = LaneId::of(shard, ticket.kind);
        let lane = self.lanes.entry(id).or_default();
        let at = ticket.deadline.at;
        lane.bytes += ticket.operation.size();
        lane.earliest = Some(lane.earliest.map_or(at, |earliest| earliest.min(at)));
        match ticket.tag {
            Some(_) => lane.queue.push_front(ticket),
            None => lane.queue.push_back(ticket),
        }
        id
    }

    /// Takes the next call of a lane, whose shard's range version is now `range_version` (`None`: the map
    /// has no such shard any more). Counts it as under way, unless its batch is empty. Commands get
    /// their tags, by the time `now`; `draw` gives the id of a new session.
    pub fn next(
        &mut self,
        id: LaneId,
        range_version: Option<u64>,
        now: Moment,
        draw: &mut dyn FnMut() -> SessionId,
    ) -> Next {
        let Some(lane) = self.lanes.get_mut(&id) else {
            return Next::Wait;
        };
        if lane.queue.is_empty() || !lane.is_free(now) {
            return Next::Wait;
        }
        let (mut batch, mut stale, mut bytes) = (Vec::new(), Vec::new(), 0);
        let mut session: Option<Rc<Session>> = None;
        while let Some(ticket) = lane.queue.front_mut() {
            let fresh = Some(ticket.range_version) == range_version;
            if fresh && ticket.open() {
                let size = ticket.operation.size();
                let full = batch.len() == BATCH_OPERATIONS_MAX || bytes + size > BATCH_BYTES_MAX;
                if full && !batch.is_empty() {
                    break;
                }
                if ticket.kind == Kind::ExactlyOnce {
                    if ticket.tag.is_none() {
                        let within = ticket.deadline.within;
                        ticket.tag = lane.session.tag(within, session.as_ref(), now, draw);
                    }
                    let own = ticket.tag.as_ref().map(|tag| tag.session());
                    match (&session, own) {
                        (None, Some(own)) => session = Some(own.clone()),
                        (Some(session), Some(own)) if Rc::ptr_eq(session, own) => (),
                        _ => break,
                    }
                }
                bytes += size;
            }
            let Some(ticket) = lane.queue.pop_front() else {
                break;
            };
            lane.bytes -= ticket.operation.size();
            if !ticket.open() {
                // Its caller is gone, or it has expired: not sent.
            } else if !fresh {
                stale.push(ticket);
            } else {
                batch.push(ticket);
            }
        }
        if lane.queue.is_empty() {
            lane.earliest = None;
        } else if batch.is_empty() && stale.is_empty() {
            return Next::Wait;
        }
        if !batch.is_empty() {
            lane.calls += 1;
            lane.left = now;
        }
        Next::Call { batch, stale }
    }

    /// Lanes in which something waits though another call might be made at `now`.
    pub fn held(&self, now: Moment) -> impl Iterator<Item = LaneId> {
        let held = move |lane: &Lane| !lane.queue.is_empty() && lane.is_free(now);
        self.lanes.iter().filter(move |(_, lane)| held(lane)).map(|(id, _)| *id)
    }

    /// Whether anything waits in a lane.
    pub fn holds_any(&self, id: LaneId) -> bool {
        self.lanes.get(&id).is_some_and(|lane| !lane.queue.is_empty())
    }

    /// A call of a lane is over.
    pub fn finished(&mut self, id: LaneId) {
        if let Some(lane) = self.lanes.get_mut(&id) {
            lane.calls = lane.calls.saturating_sub(1);
        }
    }

    /// Answers queued operations whose time is over. Returns whether any are left in a queue.
    pub fn expire(&mut self, now: Instant) -> bool {
        let mut left = false;
        for lane in self.lanes.values_mut() {
            if lane.earliest.is_some_and(|earliest| earliest <= now) {
                let waiting = "it waited behind others for the leader of its shard";
                for ticket in &mut lane.queue {
                    ticket.expire(now, waiting);
                }
                lane.queue.retain(Ticket::open);
                lane.bytes = lane.queue.iter().map(|t| t.operation.size()).sum();
                lane.earliest = lane.queue.iter().map(|t| t.deadline.at).min();
            }
            left |= !lane.queue.is_empty();
        }
        left
    }

    /// How many there are.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.lanes.len()
    }

    /// Forgets the shards that `keep` doesn't name and nothing waits for.
    pub fn prune(&mut self, keep: impl Fn(ShardId) -> bool) {
        self.lanes.retain(|id, lane| keep(id.shard) || lane.calls > 0 || !lane.queue.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::ticket::{Deadline, Load, Reply};
    use crate::client::{End, Operation};
    use crate::machine::session::RESULTS_MAX;
    use bytes::Bytes;
    use std::rc::Rc;
    use tokio::sync::oneshot;

    const SHARD: ShardId = ShardId(1);
    const WRITES: LaneId = LaneId { shard: SHARD, reads: false };
    const READS: LaneId = LaneId { shard: SHARD, reads: true };

    fn ticket(value_bytes: usize, ms: u64) -> (Ticket, oneshot::Receiver<End>) {
        let (reply, end) = oneshot::channel();
        let operation = Operation::Put(Bytes::from_static(b"k"), vec![0; value_bytes].into());
        let deadline = Deadline::after(Duration::from_millis(ms));
        let load = Rc::<Load>::default();
        let reply = Reply::One(reply, None);
        let mut ticket = Ticket::new(operation, "db".into(), deadline, false, reply, &load);
        ticket.range_version = 1;
        (ticket, end)
    }

    fn get() -> (Ticket, oneshot::Receiver<End>) {
        let (reply, end) = oneshot::channel();
        let deadline = Deadline::after(Duration::from_secs(1));
        let (get, reply) = (Operation::Get(Bytes::from_static(b"k")), Reply::One(reply, None));
        let mut ticket = Ticket::new(get, "db".into(), deadline, false, reply, &Rc::default());
        ticket.range_version = 1;
        (ticket, end)
    }

    fn next_at(lanes: &mut Lanes, id: LaneId, ms: u64) -> Next {
        lanes.next(id, Some(1), Duration::from_millis(ms), &mut SessionId::random)
    }

    fn next(lanes: &mut Lanes) -> Next {
        next_at(lanes, WRITES, 0)
    }

    fn sizes(lanes: &mut Lanes) -> Option<(usize, usize)> {
        sizes_at(lanes, 0)
    }

    fn sizes_at(lanes: &mut Lanes, ms: u64) -> Option<(usize, usize)> {
        match next_at(lanes, WRITES, ms) {
            Next::Wait => None,
            Next::Call { batch, stale } => Some((batch.len(), stale.len())),
        }
    }

    #[test]
    fn a_lone_operation_goes_at_once_and_the_rest_together() {
        let mut lanes = Lanes::default();
        let mut ends = Vec::new();
        let mut push = |lanes: &mut Lanes, count| {
            for _ in 0..count {
                let (ticket, end) = ticket(1, 1000);
                ends.push(end);
                lanes.push(SHARD, ticket);
            }
        };
        push(&mut lanes, 1);
        assert_eq!(sizes(&mut lanes), Some((1, 0)));
        push(&mut lanes, 7);
        assert_eq!(sizes(&mut lanes), None, "they share the next");
        lanes.finished(WRITES);
        assert_eq!(sizes(&mut lanes), Some((7, 0)));
        // So many that calls beside each other are worth it, up to a point.
        push(&mut lanes, BATCH_OPERATIONS_MAX + CALL_OPERATIONS_MIN);
        assert_eq!(sizes(&mut lanes), Some((BATCH_OPERATIONS_MAX, 0)));
        assert_eq!(sizes(&mut lanes), Some((CALL_OPERATIONS_MIN, 0)));
        push(&mut lanes, CALL_OPERATIONS_MIN - 1);
        assert_eq!(sizes(&mut lanes), None);
        push(&mut lanes, 1);
        assert_eq!(sizes(&mut lanes), Some((CALL_OPERATIONS_MIN, 0)));
        push(&mut lanes, CALL_OPERATIONS_MIN);
        assert_eq!(sizes(&mut lanes), None, "as many calls as there may be");
    }

    #[test]
    fn nobody_waits_long_for_a_call_under_way_nor_a_read_for_a_write() {
        let mut lanes = Lanes::default();
        let mut ends = Vec::new();
        for calls in 0..CALLS_PER_SHARD_MAX as u64 + 1 {
            let (put, end) = ticket(1, 1000);
            ends.push(end);
            assert_eq!(lanes.push(SHARD, put), WRITES);
            let at = calls * CALL_GATHER_MS;
            if calls > 0 {
                assert_eq!(sizes_at(&mut lanes, at - 1), None);
                assert_eq!(lanes.held(Duration::from_millis(at - 1)).count(), 0);
            }
            let sent = (calls < CALLS_PER_SHARD_MAX as u64).then_some((1, 0));
            assert_eq!(sizes_at(&mut lanes, at), sent);
        }
        let (get, end) = get();
        ends.push(end);
        assert_eq!(lanes.push(SHARD, get), READS);
        assert_eq!(lanes.held(Duration::ZERO).collect::<Vec<_>>(), [READS]);
        assert!(matches!(next_at(&mut lanes, READS, 0), Next::Call { batch, .. } if batch.len() == 1));
    }

    #[test]
    fn large_operations_have_calls_beside_each_other() {
        let mut lanes = Lanes::default();
        let (mut kept, bytes) = (Vec::new(), CALL_BYTES_MIN - 1);
        for (bytes, sent) in [(bytes, true), (bytes - 1, false), (1, true), (1, false), (bytes, true)] {
            let (ticket, end) = ticket(bytes, 1000);
            kept.push(end);
            lanes.push(SHARD, ticket);
            assert_eq!(sizes(&mut lanes).is_some(), sent, "{bytes}");
        }
    }

    #[test]
    fn calls_are_bounded_in_bytes_but_hold_one() {
        let mut lanes = Lanes::default();
        let (mut kept, half) = (Vec::new(), BATCH_BYTES_MAX / 2);
        for bytes in [2 * BATCH_BYTES_MAX, half, half - 8, half] {
            let (ticket, end) = ticket(bytes, 1000);
            kept.push(end);
            lanes.push(SHARD, ticket);
        }
        assert_eq!(sizes(&mut lanes), Some((1, 0)));
        assert_eq!(sizes(&mut lanes), Some((2, 0)));
        assert_eq!(sizes(&mut lanes), Some((1, 0)));
    }

    #[test]
    fn stale_and_abandoned_operations_are_not_sent() {
        let mut lanes = Lanes::default();
        let (mut old, _end) = ticket(1, 1000);
        old.range_version = 0;
        lanes.push(SHARD, old);
        let (abandoned, end) = ticket(1, 1000);
        drop(end);
        lanes.push(SHARD, abandoned);
        let (good, _end2) = ticket(1, 1000);
        lanes.push(SHARD, good);
        assert_eq!(sizes(&mut lanes), Some((1, 1)));
    }

    #[test]
    fn a_command_gets_a_tag_when_it_leaves_and_keeps_it() {
        let mut lanes = Lanes::default();
        let (put, _end) = ticket(1, 1000);
        lanes.push(SHARD, put);
        let Next::Call { mut batch, .. } = next(&mut lanes) else { panic!("nothing to send") };
        let tag = batch[0].tag.as_ref().unwrap();
        let (session, sequence) = (tag.session().clone(), tag.sequence());
        // Meanwhile the lane has taken another session; the second attempt is of the first all the same,
        // and those of the new one don't share its call.
        session.lost();
        let (newer, _newer_end) = ticket(1, 1000);
        let (last, _last_end) = ticket(1, 1000);
        lanes.push(SHARD, newer);
        lanes.push(SHARD, batch.remove(0));
        lanes.push(SHARD, last);
        let mut sent = Vec::new();
        for _ in 0..2 {
            lanes.finished(WRITES);
            let Next::Call { batch, .. } = next(&mut lanes) else { panic!("nothing to send") };
            sent.push(batch);
        }
        assert_eq!(sent.iter().map(Vec::len).collect::<Vec<_>>(), [1, 2]);
        let tag = sent[0][0].tag.as_ref().unwrap();
        assert!(Rc::ptr_eq(tag.session(), &session), "what leaves again goes first");
        assert_eq!(tag.sequence(), sequence);
        let newer = |at: usize| sent[1][at].tag.as_ref().unwrap();
        assert!(Rc::ptr_eq(newer(0).session(), newer(1).session()));
        assert_eq!((newer(0).sequence(), newer(1).sequence()), (1, 2));
    }

    /// A session's window of results is as wide as the shard allows; who comes then waits, and goes as
    /// soon as the command at its start has ended.
    #[test]
    fn a_command_that_is_held_up_holds_up_only_so_many() {
        let mut lanes = Lanes::default();
        let mut kept = Vec::new();
        let mut call = |lanes: &mut Lanes| {
            for _ in 0..BATCH_OPERATIONS_MAX {
                let (ticket, end) = ticket(1, 1000);
                kept.push(end);
                lanes.push(SHARD, ticket);
            }
            let sent = next(lanes);
            lanes.finished(WRITES);
            sent
        };
        let Next::Call { batch: mut stuck, .. } = call(&mut lanes) else { panic!("nothing to send") };
        stuck.truncate(1);
        for _ in 1..RESULTS_MAX / BATCH_OPERATIONS_MAX {
            assert!(matches!(call(&mut lanes), Next::Call { .. }));
        }
        assert_eq!(lanes.held(Duration::ZERO).count(), 0);
        assert!(matches!(call(&mut lanes), Next::Wait));
        assert_eq!(lanes.held(Duration::ZERO).collect::<Vec<_>>(), [WRITES]);
        // Sent again it isn't behind those that wait for it.
        lanes.push(SHARD, stuck.remove(0));
        let Next::Call { batch, .. } = next(&mut lanes) else { panic!("nothing to send") };
        assert_eq!(batch.len(), 1);
        drop(batch);
        assert_eq!(sizes(&mut lanes), Some((BATCH_OPERATIONS_MAX, 0)));
    }

    #[test]
    fn what_waits_too_long_is_answered() {
        let mut lanes = Lanes::default();
        let begun = Instant::now();
        let (short, mut short_end) = ticket(1, 10);
        let (long, mut long_end) = ticket(1, 1_000_000);
        lanes.push(SHARD, long);
        lanes.push(SHARD, short);
        assert!(lanes.expire(begun));
        assert!(short_end.try_recv().is_err());
        assert!(lanes.expire(Instant::now() + Duration::from_millis(20)));
        assert!(short_end.try_recv().unwrap().is_err());
        assert!(long_end.try_recv().is_err());
        assert!(!lanes.expire(Instant::now() + Duration::from_secs(2_000)));
        assert!(long_end.try_recv().unwrap().is_err());
    }
}
