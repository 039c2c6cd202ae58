//! Traced batches of one replica, and entries whose leader wants to know how long they take here.
//!
//! The group knows nothing of this: it is told neither the time nor what is traced. What comes out of a pump is
//! looked at instead, while there is something to look for.

use std::sync::Arc;
use std::time::Instant;

use raft::eraftpb::{Message, MessageType};

use crate::codec::trace::{self, FollowerTimes, Moment};
use crate::group::driver::Group;
use crate::group::types::{Effects, NumberedWrite};
use crate::ids::{Index, ReplicaId};
use crate::limits::TRACES_MAX;
use crate::node::ticket::Ticket;
use crate::node::trace::{Sheet, WriteStamps, micros};

/// See the module page.
#[derive(Default)]
pub(super) struct Traces {
    led: Vec<Led>,
    followed: Vec<Followed>,
}

/// A batch of this leader's that hasn't ended.
struct Led {
    sheet: Arc<Sheet>,
    /// Its place in the log, once it has one.
    entry: Option<Entry>,
    /// Holds a command or a change: it will have a place in the log.
    writes: bool,
    /// When the last came of what it waits for.
    decided: Option<Instant>,
    /// Nothing that comes now was waited for: its entry is committed, and may yet wait to be applied.
    committed: bool,
}

struct Entry {
    index: Index,
    write: Option<(u64, Arc<WriteStamps>)>,
}

/// An entry of a leader elsewhere, not yet acknowledged.
struct Followed {
    leader: u64,
    index: Index,
    arrived: Instant,
    write: Option<(u64, Arc<WriteStamps>)>,
}

impl Traces {
    /// Whether there is nothing to look for.
    pub(super) fn is_empty(&self) -> bool {
        self.led.is_empty() && self.followed.is_empty()
    }

    /// A traced batch is taken from the mailbox; whether it `writes` to the log. Beyond [`TRACES_MAX`] the moments from
    /// here on stay unknown.
    pub(super) fn taken(&mut self, sheet: Arc<Sheet>, writes: bool, now: Instant) {
        self.forget_ended();
        if self.led.len() < TRACES_MAX {
            sheet.stamp(Moment::Taken, now);
            self.led.push(Led { sheet, entry: None, writes, decided: None, committed: false });
        }
    }

    /// Operations that were refused before they reached the group end without a pump that tells. Left here, they would
    /// be looked for at every pump.
    fn forget_ended(&mut self) {
        self.led.retain(|led| Arc::strong_count(&led.sheet) > 1);
    }

    /// A message arrived at `arrived` and is about to be stepped. What it tells or asks for is taken out of it.
    pub(super) fn step(&mut self, message: &mut Message, arrived: Option<Instant>, now: Instant) {
        match message.get_msg_type() {
            MessageType::MsgAppend => {
                // What another leader wanted is never acknowledged to it: it has lost its place.
                self.followed.retain(|followed| followed.leader == message.from);
                let wanted = trace::read_wanted(&std::mem::take(&mut message.context));
                if let Some(index) = wanted {
                    // One that was never acknowledged, because its append was refused, gives way.
                    if self.followed.len() >= TRACES_MAX {
                        self.followed.remove(0);
                    }
                    let arrived = arrived.unwrap_or(now);
                    self.followed.push(Followed { leader: message.from, index, arrived, write: None });
                }
            }
            MessageType::MsgAppendResponse => {
                // This replica leads now.
                self.followed.clear();
                let told = trace::read_times(&std::mem::take(&mut message.context));
                for led in &mut self.led {
                    let Some(entry) = &led.entry else { continue };
                    if let Some((_, times)) = told.filter(|(index, _)| *index == entry.index) {
                        led.sheet.acknowledged(ReplicaId(message.from), times, now);
                    }
                    if !led.committed && !message.reject && message.index >= entry.index {
                        led.decided = Some(now);
                    }
                }
            }
            _ => (),
        }
    }

    /// Log writes up to this number are durable.
    pub(super) fn persisted(&mut self, number: u64, now: Instant) {
        for led in &mut self.led {
            let write = led.entry.as_ref().and_then(|entry| entry.write.as_ref());
            if let Some((_, stamps)) = write.filter(|(write, _)| *write <= number) {
                led.sheet.logged(stamps, now);
                if !led.committed {
                    led.decided = Some(now);
                }
            }
        }
    }

    /// Looks at what came out of a pump. Returns the stamps that its log write is to bear.
    pub(super) fn pumped(
        &mut self,
        group: &Group<Ticket>,
        effects: &mut Effects<Ticket>,
    ) -> Option<Arc<WriteStamps>> {
        self.forget_ended();
        if self.is_empty() {
            return None;
        }
        let now = Instant::now();
        let stamps = effects.write.as_ref().map(|_| WriteStamps::queued(now));
        for led in self.led.iter_mut().filter(|led| led.writes && led.entry.is_none()) {
            if let Some(at) = group.proposed_at(|ticket| ticket.is_of(&led.sheet)) {
                led.sheet.stamp(Moment::Proposed, now);
                led.entry = Some(Entry { index: at.index, write: None });
            }
        }
        let committed = group.committed();
        for led in &mut self.led {
            led.committed = led.entry.as_ref().is_some_and(|entry| entry.index <= committed);
        }
        let mut borne = false;
        if let (Some(write), Some(stamps)) = (&effects.write, &stamps) {
            let entries = self.led.iter_mut().filter_map(|led| led.entry.as_mut());
            let led = entries.map(|entry| (entry.index, &mut entry.write));
            let followed = self.followed.iter_mut().map(|entry| (entry.index, &mut entry.write));
            for (index, place) in led.chain(followed) {
                if holds(write, index) {
                    *place = Some((write.number, stamps.clone()));
                    borne = true;
                }
            }
        }
        for (_, message) in &mut effects.messages {
            self.ask_or_tell(&mut message.message, now);
        }
        // Reads that memory can't answer are asked elsewhere from here on; what has ended needs nobody.
        let reads = effects.reads.iter().map(|(ticket, _)| ticket);
        let done = effects.done.iter().map(|(ticket, _)| ticket);
        for ticket in reads.chain(done) {
            let Some(at) = self.led.iter().position(|led| ticket.is_of(&led.sheet)) else { continue };
            let led = self.led.swap_remove(at);
            led.sheet.stamp(Moment::Decided, led.decided.unwrap_or(now));
        }
        stamps.filter(|_| borne)
    }

    /// A message leaves: a follower is asked for its times, or the leader is told those of this one.
    fn ask_or_tell(&mut self, message: &mut Message, now: Instant) {
        match message.get_msg_type() {
            MessageType::MsgAppend => {
                let (Some(first), Some(last)) = (message.entries.first(), message.entries.last()) else {
                    return;
                };
                let mut wanted = None;
                for led in &self.led {
                    let index = led.entry.as_ref().map(|entry| entry.index);
                    if let Some(index) = index.filter(|index| (first.index..=last.index).contains(index)) {
                        led.sheet.sent(ReplicaId(message.to), now);
                        wanted = wanted.max(Some(index));
                    }
                }
                if let Some(index) = wanted {
                    message.context = trace::write_wanted(index).into();
                }
            }
            MessageType::MsgAppendResponse if !message.reject => {
                let (to, upto) = (message.to, message.index);
                let of_this = |followed: &Followed| followed.leader == to && followed.index <= upto;
                // The last of them: an answer tells of one.
                let told = self.followed.iter().rposition(of_this).map(|at| self.followed.remove(at));
                self.followed.retain(|followed| !of_this(followed));
                if let Some(Followed { index, arrived, write, .. }) = told {
                    let log_us = write.and_then(|(_, stamps)| stamps.times(arrived));
                    let times = FollowerTimes { total_us: micros(arrived, now), log_us };
                    message.context = trace::write_times(index, times).into();
                }
            }
            _ => (),
        }
    }
}

/// Whether a write has this entry.
fn holds(write: &NumberedWrite, index: Index) -> bool {
    let entries = &write.write.entries;
    let (first, last) = (entries.first(), entries.last());
    first.zip(last).is_some_and(|(first, last)| (first.index..=last.index).contains(&index))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use raft::eraftpb::Entry as LogEntry;

    use super::*;

    fn append(to: u64, indexes: std::ops::RangeInclusive<u64>) -> Message {
        let entries = indexes.map(|index| LogEntry { index, ..LogEntry::default() });
        let mut message =
            Message { from: 1, to, entries: entries.collect::<Vec<_>>().into(), ..Message::default() };
        message.set_msg_type(MessageType::MsgAppend);
        message
    }

    fn acknowledgement(from: u64, index: u64, reject: bool) -> Message {
        let mut message = Message { from, to: 1, index, reject, ..Message::default() };
        message.set_msg_type(MessageType::MsgAppendResponse);
        message
    }

    /// An entry at index 7 of leader 1 goes to follower 2, whose answer tells its times.
    #[test]
    fn a_follower_tells_how_long_it_took_and_the_leader_notes_it() {
        let began = Instant::now();
        let at = |us| began + Duration::from_micros(us);
        let sheet = Sheet::begin(began);
        let _ticket = sheet.clone();
        let mut leader = Traces::default();
        assert!(leader.is_empty());
        leader.taken(sheet.clone(), true, at(5));
        leader.led[0].entry = Some(Entry { index: 7, write: None });
        let mut elsewhere = append(2, 4..=6);
        leader.ask_or_tell(&mut elsewhere, at(9));
        assert!(elsewhere.context.is_empty(), "the entry isn't in it");
        let mut sent = append(2, 6..=8);
        leader.ask_or_tell(&mut sent, at(10));

        let mut follower = Traces::default();
        follower.step(&mut sent, Some(at(1_000)), at(1_010));
        assert!(sent.context.is_empty(), "raft sees nothing of it");
        let write = WriteStamps::queued(at(1_011));
        write.begin(at(1_020));
        write.synced(at(1_200));
        follower.followed[0].write = Some((3, write));
        for mut other in [acknowledgement(2, 6, false), acknowledgement(2, 9, true)] {
            follower.ask_or_tell(&mut other, at(1_100));
            assert!(other.context.is_empty(), "{other:?} acknowledges no entry 7");
        }
        let mut answer = acknowledgement(2, 8, false);
        follower.ask_or_tell(&mut answer, at(1_250));
        assert!(follower.is_empty(), "told once");

        leader.step(&mut answer, Some(at(500)), at(510));
        assert!(answer.context.is_empty());
        let trace = sheet.end(at(600));
        let times = FollowerTimes { total_us: 250, log_us: Some((20, 180)) };
        let [noted] = trace.followers[..] else { panic!("{trace:?}") };
        assert_eq!((noted.replica, noted.sent_us, noted.answered), (ReplicaId(2), 10, Some((510, times))));
        assert_eq!(leader.led[0].decided, Some(at(510)));
    }

    #[test]
    fn what_nobody_waits_for_is_forgotten_and_the_rest_is_bounded() {
        let now = Instant::now();
        let mut traces = Traces::default();
        let kept: Vec<_> = (0..TRACES_MAX).map(|_| Sheet::begin(now)).collect();
        traces.taken(Sheet::begin(now), true, now);
        kept.iter().for_each(|sheet| traces.taken(sheet.clone(), true, now));
        assert_eq!(traces.led.len(), TRACES_MAX, "the first had no ticket any more");
        traces.taken(kept[0].clone(), true, now);
        assert_eq!(traces.led.len(), TRACES_MAX);
        for index in 1..=TRACES_MAX as u64 + 1 {
            let mut message = append(2, index..=index);
            message.context = trace::write_wanted(index).into();
            traces.step(&mut message, None, now);
        }
        assert_eq!((traces.followed.len(), traces.followed[0].index), (TRACES_MAX, 2));
        // What was never acknowledged goes with its leader: else it would be looked for at every pump.
        let mut other = append(2, 70..=70);
        other.from = 3;
        other.context = trace::write_wanted(70).into();
        traces.step(&mut other, None, now);
        assert_eq!(traces.followed.iter().map(|f| (f.leader, f.index)).collect::<Vec<_>>(), [(3, 70)]);
        traces.step(&mut acknowledgement(2, 5, false), None, now);
        assert!(traces.followed.is_empty(), "this replica leads");
    }

    /// A write that is committed and waits to be applied, as where memory is short, is still being applied then.
    #[test]
    fn what_comes_after_the_commit_was_not_waited_for() {
        let began = Instant::now();
        let at = |us| began + Duration::from_micros(us);
        let sheet = Sheet::begin(began);
        let mut traces = Traces::default();
        traces.taken(sheet.clone(), true, at(5));
        let write = WriteStamps::queued(at(6));
        traces.led[0].entry = Some(Entry { index: 7, write: Some((1, write)) });
        traces.step(&mut acknowledgement(2, 7, false), None, at(300));
        traces.led[0].committed = true;
        traces.step(&mut acknowledgement(3, 7, false), None, at(5_000));
        traces.persisted(1, at(6_000));
        assert_eq!(traces.led[0].decided, Some(at(300)));
        assert_eq!(sheet.end(at(7_000)).at(Moment::LogTold), Some(6_000), "it is told all the same");
    }
}
