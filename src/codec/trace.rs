//! Where the time of one batch went, and how it travels: as the leader's answer to a client, and as what a
//! follower tells its leader of one entry.
//!
//! No clocks of two machines are compared: a follower tells how long it took, by its own clock, and
//! the leader when it sent and when it heard, by its own. What is left of that is the network's.
//!
//! Between replicas a trace uses the `context` of an append and of its answer, which raft leaves empty:
//!
//! | message | context |
//! |---|---|
//! | append | `t`, then the log index of an entry whose times are wanted: 8 bytes, the low byte first |
//! | its answer | `t`, that index, then three times of 4 bytes in microseconds: the whole, the wait, the sync; all ones in the last two: the entry was on disk before |
//!
//! A context of another form is none: a program that doesn't know of traces sends none, and
//! passes over what it is sent.

use raft::eraftpb::{Message, MessageType};

use super::CodecError;
use crate::ids::{Index, ReplicaId};
use crate::limits::MEMBERS_MAX;
use crate::schema::kv_capnp::{self, trace};

/// Moments in the life of a batch on its leader's node, in the order in which they come. See `Moment` in kv.capnp.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Moment {
    /// In the mailbox of the replica.
    Submitted,
    /// Out of it.
    Taken,
    /// In a log entry.
    Proposed,
    /// The write of the entry is handed to the log writer.
    LogQueued,
    /// The log writer begins it.
    LogBegun,
    /// It is on disk.
    LogSynced,
    /// The replica knows.
    LogTold,
    /// The last has come that was waited for.
    Decided,
    /// The last result is there.
    Answered,
    /// The answer is made.
    Done,
}

impl Moment {
    /// All of them, in order.
    pub const ALL: [Moment; 10] = [
        Moment::Submitted,
        Moment::Taken,
        Moment::Proposed,
        Moment::LogQueued,
        Moment::LogBegun,
        Moment::LogSynced,
        Moment::LogTold,
        Moment::Decided,
        Moment::Answered,
        Moment::Done,
    ];
}

/// Where the time of a batch went; in microseconds since its call arrived.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Trace {
    stamps: [Option<u32>; Moment::ALL.len()],
    /// The followers that the entry was sent to.
    pub followers: Vec<FollowerTrace>,
}

/// What the leader knows of one follower.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FollowerTrace {
    /// Which.
    pub replica: ReplicaId,
    /// When the entry left for it, in microseconds since the call arrived.
    pub sent_us: u32,
    /// When its acknowledgement came, likewise, and what it tells; `None`: not yet.
    pub answered: Option<(u32, FollowerTimes)>,
}

/// How long a follower took with an entry, by its own clock, in microseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FollowerTimes {
    /// From the arrival of the entry to the leaving of the answer.
    pub total_us: u32,
    /// Of that: until its log writer began, and the write with its sync. `None`: it had the entry already.
    pub log_us: Option<(u32, u32)>,
}

impl Trace {
    /// When that was; `None`: it isn't known.
    pub fn at(&self, moment: Moment) -> Option<u32> {
        self.stamps[moment as usize]
    }

    /// It was then, unless it was earlier.
    pub fn stamp(&mut self, moment: Moment, us: u32) {
        self.stamps[moment as usize].get_or_insert(us);
    }

    /// It was then, and not earlier.
    pub fn stamp_last(&mut self, moment: Moment, us: u32) {
        self.stamps[moment as usize] = Some(us);
    }

    /// From one moment to another; `None` if one of them isn't known, or they came in another order.
    pub fn between(&self, from: Moment, to: Moment) -> Option<u32> {
        self.at(to)?.checked_sub(self.at(from)?)
    }
}

/// The first byte of a context that is about a trace.
const MARK: u8 = b't';
/// In place of a time that isn't known.
const UNKNOWN: u32 = u32::MAX;

/// Whether a message may bring something about a trace.
pub fn may_concern(message: &Message) -> bool {
    !message.context.is_empty()
        && matches!(message.get_msg_type(), MessageType::MsgAppend | MessageType::MsgAppendResponse)
}

/// The context of an append one of whose entries is traced.
pub fn write_wanted(index: Index) -> Vec<u8> {
    [&[MARK][..], &index.to_le_bytes()].concat()
}

/// The entry whose times the sender of an append wants; `None`: of none.
pub fn read_wanted(context: &[u8]) -> Option<Index> {
    let (index, []) = context.strip_prefix(&[MARK])?.split_first_chunk()? else { return None };
    Some(Index::from_le_bytes(*index))
}

/// The context of an acknowledgement that tells them.
pub fn write_times(index: Index, times: FollowerTimes) -> Vec<u8> {
    let (wait, sync) = times.log_us.unwrap_or((UNKNOWN, UNKNOWN));
    let mut context = write_wanted(index);
    for us in [times.total_us, wait, sync] {
        context.extend_from_slice(&us.to_le_bytes());
    }
    context
}

/// What an acknowledgement tells, and of which entry.
pub fn read_times(context: &[u8]) -> Option<(Index, FollowerTimes)> {
    let (index, times) = context.strip_prefix(&[MARK])?.split_first_chunk()?;
    let (times, []) = times.as_chunks::<4>() else { return None };
    let [total_us, wait, sync] = <[[u8; 4]; 3]>::try_from(times).ok()?.map(u32::from_le_bytes);
    let log_us = (wait != UNKNOWN || sync != UNKNOWN).then_some((wait, sync));
    Some((Index::from_le_bytes(*index), FollowerTimes { total_us, log_us }))
}

/// Writes a trace.
pub fn write_trace(from: &Trace, mut to: trace::Builder<'_>) {
    let known: Vec<_> = Moment::ALL.into_iter().filter_map(|m| Some((m, from.at(m)?))).collect();
    let mut list = to.reborrow().init_stamps(known.len() as u32);
    for (at, (moment, us)) in (0..).zip(known) {
        let mut stamp = list.reborrow().get(at);
        stamp.set_moment(schema_moment(moment));
        stamp.set_us(us);
    }
    let mut list = to.init_followers(from.followers.len() as u32);
    for (at, follower) in (0..).zip(&from.followers) {
        let mut to = list.reborrow().get(at);
        to.set_replica(follower.replica.0);
        to.set_sent_us(follower.sent_us);
        if let Some((answered_us, times)) = follower.answered {
            to.set_answered(true);
            to.set_answered_us(answered_us);
            to.set_total_us(times.total_us);
            if let Some((wait, sync)) = times.log_us {
                to.set_logged(true);
                to.set_wait_us(wait);
                to.set_sync_us(sync);
            }
        }
    }
}

/// Reads a trace. Moments of a later version are passed over.
pub fn read_trace(from: trace::Reader<'_>) -> Result<Trace, CodecError> {
    let mut trace = Trace::default();
    for stamp in from.get_stamps()?.iter() {
        if let Ok(moment) = stamp.get_moment() {
            trace.stamp(domain_moment(moment), stamp.get_us());
        }
    }
    let followers = from.get_followers()?;
    if followers.len() as usize > MEMBERS_MAX {
        return Err(CodecError::Malformed {
            what: "Trace",
            detail: format!("{} followers", followers.len()),
        });
    }
    for follower in followers.iter() {
        let log_us = follower.get_logged().then(|| (follower.get_wait_us(), follower.get_sync_us()));
        let times = FollowerTimes { total_us: follower.get_total_us(), log_us };
        trace.followers.push(FollowerTrace {
            replica: ReplicaId(follower.get_replica()),
            sent_us: follower.get_sent_us(),
            answered: follower.get_answered().then(|| (follower.get_answered_us(), times)),
        });
    }
    Ok(trace)
}

fn schema_moment(moment: Moment) -> kv_capnp::Moment {
    match moment {
        Moment::Submitted => kv_capnp::Moment::Submitted,
        Moment::Taken => kv_capnp::Moment::Taken,
        Moment::Proposed => kv_capnp::Moment::Proposed,
        Moment::LogQueued => kv_capnp::Moment::LogQueued,
        Moment::LogBegun => kv_capnp::Moment::LogBegun,
        Moment::LogSynced => kv_capnp::Moment::LogSynced,
        Moment::LogTold => kv_capnp::Moment::LogTold,
        Moment::Decided => kv_capnp::Moment::Decided,
        Moment::Answered => kv_capnp::Moment::Answered,
        Moment::Done => kv_capnp::Moment::Done,
    }
}

fn domain_moment(moment: kv_capnp::Moment) -> Moment {
    match moment {
        kv_capnp::Moment::Submitted => Moment::Submitted,
        kv_capnp::Moment::Taken => Moment::Taken,
        kv_capnp::Moment::Proposed => Moment::Proposed,
        kv_capnp::Moment::LogQueued => Moment::LogQueued,
        kv_capnp::Moment::LogBegun => Moment::LogBegun,
        kv_capnp::Moment::LogSynced => Moment::LogSynced,
        kv_capnp::Moment::LogTold => Moment::LogTold,
        kv_capnp::Moment::Decided => Moment::Decided,
        kv_capnp::Moment::Answered => Moment::Answered,
        kv_capnp::Moment::Done => Moment::Done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_come_back_and_others_are_none() {
        assert_eq!(read_wanted(&write_wanted(1 << 40)), Some(1 << 40));
        for log_us in [None, Some((3, 250)), Some((0, 0))] {
            let times = FollowerTimes { total_us: 700, log_us };
            assert_eq!(read_times(&write_times(9, times)), Some((9, times)));
        }
        let times = write_times(9, FollowerTimes { total_us: 1, log_us: None });
        assert_eq!((read_wanted(&times), read_times(&write_wanted(9))), (None, None));
        for end in 0..times.len() {
            assert_eq!(read_times(&times[..end]), None, "{end} bytes");
        }
        let longer = [&times[..], &[0]].concat();
        assert_eq!(
            (read_wanted(b""), read_wanted(b"CampaignElection"), read_times(&longer)),
            (None, None, None)
        );
    }

    #[test]
    fn a_trace_comes_back_with_what_is_known() {
        let mut trace = Trace::default();
        for (moment, us) in [(Moment::Submitted, 7), (Moment::Proposed, 20), (Moment::Done, 900)] {
            trace.stamp(moment, us);
        }
        trace.stamp(Moment::Proposed, 500);
        trace.stamp_last(Moment::Done, 901);
        let times = FollowerTimes { total_us: 300, log_us: Some((10, 200)) };
        for (replica, answered) in
            [(2, Some((700, times))), (3, None), (4, Some((5, FollowerTimes { log_us: None, ..times })))]
        {
            trace.followers.push(FollowerTrace { replica: ReplicaId(replica), sent_us: 21, answered });
        }
        let mut message = capnp::message::Builder::new_default();
        write_trace(&trace, message.init_root());
        let read = read_trace(message.get_root_as_reader().unwrap()).unwrap();
        assert_eq!(read, trace);
        assert_eq!(read.between(Moment::Submitted, Moment::Proposed), Some(13));
        assert_eq!(read.between(Moment::Taken, Moment::Proposed), None, "it isn't known");
        assert_eq!(read.between(Moment::Done, Moment::Proposed), None, "they came in another order");
    }
}
