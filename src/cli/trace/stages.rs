//! Stages from the moments of a trace.

use std::collections::BTreeMap;

use crate::client::{OperationResult, Traced};
use crate::codec::trace::{FollowerTrace, Moment, Trace};
use crate::ids::ReplicaId;

/// Where the time of one operation went; in microseconds. `None`: it isn't known.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Stages {
    /// The whole.
    pub total: u64,
    /// What came one after the other, and together is the whole.
    pub in_a_row: Vec<(&'static str, Option<u64>)>,
    /// The leader's log; of a write.
    pub log: Option<LogStages>,
    /// The followers; of a write.
    pub followers: Vec<FollowerStages>,
}

/// The leader's log.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct LogStages {
    /// Until the log writer began.
    pub wait: Option<u64>,
    /// The write and its sync.
    pub sync: Option<u64>,
    /// Until the replica knew.
    pub told: Option<u64>,
    /// All of it.
    pub whole: Option<u64>,
}

/// One follower.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct FollowerStages {
    pub replica: ReplicaId,
    /// There and back, with both nodes' sending and receiving threads: what the follower didn't have it for.
    pub network: Option<u64>,
    /// By its own clock, as of the leader.
    pub wait: Option<u64>,
    pub sync: Option<u64>,
    /// What it had it for beyond these.
    pub rest: Option<u64>,
    /// From the sending to the answer.
    pub whole: Option<u64>,
    /// In how many traces it answered before the operation was.
    pub in_time: usize,
}

/// What a stage is, for a person.
pub(super) fn meaning(stage: &str) -> &'static str {
    match stage {
        "client" => "the library: its thread, the route, earlier attempts",
        "network" => "to the node and back, with both ends' RPC",
        "router" => "reading and checking the call, finding the replica",
        "mailbox" => "waiting for the replica",
        "propose" => "into a log entry, behind writes under way",
        "replicate" => "on disk at a majority: the leader's log and followers, side by side",
        "round" => "a majority still follows this leader",
        "apply" => "executing the entry",
        "read" => "memory, or the read thread",
        "reply" => "back to the call, and its answer made",
        _ => "",
    }
}

/// The stages of one operation.
pub(super) fn stages(traced: &Traced) -> Stages {
    let us = |time: std::time::Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let (total, call) = (us(traced.total), us(traced.call));
    let trace = traced.trace.clone().unwrap_or_default();
    let between = |from, to| trace.between(from, to).map(u64::from);
    let since = |to| trace.at(to).map(u64::from);
    let is_read = matches!(traced.result, OperationResult::Value(_));
    let network = since(Moment::Done).map(|done| call.saturating_sub(done));
    let mut in_a_row = vec![
        ("client", Some(total.saturating_sub(call))),
        ("network", network),
        ("router", since(Moment::Submitted)),
        ("mailbox", between(Moment::Submitted, Moment::Taken)),
    ];
    if is_read {
        in_a_row.push(("round", between(Moment::Taken, Moment::Decided)));
        in_a_row.push(("read", between(Moment::Decided, Moment::Answered)));
    } else {
        in_a_row.push(("propose", between(Moment::Taken, Moment::Proposed)));
        in_a_row.push(("replicate", between(Moment::Proposed, Moment::Decided)));
        in_a_row.push(("apply", between(Moment::Decided, Moment::Answered)));
    }
    in_a_row.push(("reply", between(Moment::Answered, Moment::Done)));
    let log = trace.at(Moment::LogQueued).map(|_| LogStages {
        wait: between(Moment::LogQueued, Moment::LogBegun),
        sync: between(Moment::LogBegun, Moment::LogSynced),
        told: between(Moment::LogSynced, Moment::LogTold),
        whole: between(Moment::LogQueued, Moment::LogTold),
    });
    let followers = trace.followers.iter().map(|follower| follower_stages(follower, &trace)).collect();
    Stages { total, in_a_row, log, followers }
}

fn follower_stages(follower: &FollowerTrace, trace: &Trace) -> FollowerStages {
    // What comes after the result may be on the sheet or not: by chance.
    let in_time = |at: &u32| trace.at(Moment::Answered).is_none_or(|answered| *at <= answered);
    let answered = follower.answered.filter(|(at, _)| in_time(at));
    let whole = answered.map(|(at, _)| u64::from(at.saturating_sub(follower.sent_us)));
    let times = answered.map(|(_, times)| times);
    let total = times.map(|times| u64::from(times.total_us));
    let log = times.and_then(|times| times.log_us).map(|(wait, sync)| (u64::from(wait), u64::from(sync)));
    FollowerStages {
        replica: follower.replica,
        network: whole.zip(total).map(|(whole, total)| whole.saturating_sub(total)),
        wait: log.map(|(wait, _)| wait),
        sync: log.map(|(_, sync)| sync),
        rest: total.zip(log).map(|(total, (wait, sync))| total.saturating_sub(wait + sync)),
        whole,
        in_time: usize::from(answered.is_some()),
    }
}

/// The median of each stage over several operations of one kind; of what isn't always known, over those where it is.
pub(super) fn median(all: &[Stages]) -> Stages {
    let of = |known: &mut dyn Iterator<Item = Option<u64>>| -> Option<u64> {
        let mut known: Vec<u64> = known.flatten().collect();
        known.sort_unstable();
        known.get(known.len() / 2).copied()
    };
    let mut in_a_row: Vec<(&'static str, Option<u64>)> = Vec::new();
    for (name, _) in all.iter().flat_map(|stages| &stages.in_a_row) {
        if in_a_row.iter().all(|(known, _)| known != name) {
            let times =
                |stages: &Stages| stages.in_a_row.iter().find(|(n, _)| n == name).and_then(|(_, us)| *us);
            in_a_row.push((name, of(&mut all.iter().map(times))));
        }
    }
    let logs: Vec<LogStages> = all.iter().filter_map(|stages| stages.log).collect();
    let log = (!logs.is_empty()).then(|| LogStages {
        wait: of(&mut logs.iter().map(|log| log.wait)),
        sync: of(&mut logs.iter().map(|log| log.sync)),
        told: of(&mut logs.iter().map(|log| log.told)),
        whole: of(&mut logs.iter().map(|log| log.whole)),
    });
    let mut by_replica: BTreeMap<ReplicaId, Vec<FollowerStages>> = BTreeMap::new();
    for follower in all.iter().flat_map(|stages| &stages.followers) {
        by_replica.entry(follower.replica).or_default().push(*follower);
    }
    let followers = by_replica.into_iter().map(|(replica, times)| FollowerStages {
        replica,
        network: of(&mut times.iter().map(|follower| follower.network)),
        wait: of(&mut times.iter().map(|follower| follower.wait)),
        sync: of(&mut times.iter().map(|follower| follower.sync)),
        rest: of(&mut times.iter().map(|follower| follower.rest)),
        whole: of(&mut times.iter().map(|follower| follower.whole)),
        in_time: times.iter().map(|follower| follower.in_time).sum(),
    });
    Stages {
        total: of(&mut all.iter().map(|stages| Some(stages.total))).unwrap_or(0),
        in_a_row,
        log,
        followers: followers.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use crate::codec::trace::FollowerTimes;
    use crate::ids::{NodeId, ShardId};

    fn write(call: u64, done: u32) -> Traced {
        let mut trace = Trace::default();
        let moments = [
            (Moment::Submitted, 10),
            (Moment::Taken, 15),
            (Moment::Proposed, 25),
            (Moment::LogQueued, 26),
            (Moment::LogBegun, 30),
            (Moment::LogSynced, 330),
            (Moment::LogTold, 340),
            (Moment::Decided, 400),
            (Moment::Answered, 410),
            (Moment::Done, done),
        ];
        moments.into_iter().for_each(|(moment, us)| trace.stamp(moment, us));
        let times = |total_us, log_us| Some(FollowerTimes { total_us, log_us });
        let follower = |replica, at: u32, times: Option<FollowerTimes>| FollowerTrace {
            replica: ReplicaId(replica),
            sent_us: 25,
            answered: times.map(|times| (at, times)),
        };
        trace.followers = vec![
            follower(2, 400, times(300, Some((5, 280)))),
            follower(3, 415, times(310, Some((5, 290)))),
            follower(4, 0, None),
            follower(5, 100, times(50, None)),
        ];
        Traced {
            result: OperationResult::Written(1),
            shard: ShardId(1),
            node: NodeId(1),
            total: Duration::from_micros(call + 50),
            call: Duration::from_micros(call),
            trace: Some(trace),
        }
    }

    #[test]
    fn the_stages_in_a_row_make_up_the_whole() {
        let stages = stages(&write(600, 420));
        let expected = [
            ("client", 50),
            ("network", 180),
            ("router", 10),
            ("mailbox", 5),
            ("propose", 10),
            ("replicate", 375),
            ("apply", 10),
            ("reply", 10),
        ];
        assert_eq!(stages.in_a_row, expected.map(|(name, us)| (name, Some(us))));
        assert_eq!(stages.in_a_row.iter().filter_map(|(_, us)| *us).sum::<u64>(), stages.total);
        assert!(stages.in_a_row.iter().all(|(name, _)| !meaning(name).is_empty()));
        let log = LogStages { wait: Some(4), sync: Some(300), told: Some(10), whole: Some(314) };
        assert_eq!(stages.log, Some(log));
    }

    #[test]
    fn what_a_follower_did_not_tell_in_time_is_not_known() {
        let stages = stages(&write(600, 420));
        let [first, late, silent, had_it] = stages.followers[..] else { panic!("{:?}", stages.followers) };
        let known = |f: FollowerStages| (f.network, f.wait, f.sync, f.rest, f.whole, f.in_time);
        assert_eq!(known(first), (Some(75), Some(5), Some(280), Some(15), Some(375), 1));
        assert_eq!(known(late), (None, None, None, None, None, 0));
        assert_eq!(known(silent), known(late));
        assert_eq!(known(had_it), (Some(25), None, None, None, Some(75), 1));
    }

    #[test]
    fn an_older_node_tells_nothing() {
        let traced = Traced { trace: None, ..write(600, 420) };
        let stages = stages(&traced);
        assert_eq!(stages.in_a_row[0], ("client", Some(50)));
        assert!(stages.in_a_row[1..].iter().all(|(_, us)| us.is_none()), "{stages:?}");
        assert_eq!((stages.log, stages.followers.len()), (None, 0));
    }

    #[test]
    fn a_read_has_a_round_and_no_log() {
        let mut trace = Trace::default();
        let moments = [
            (Moment::Submitted, 4),
            (Moment::Taken, 6),
            (Moment::Decided, 206),
            (Moment::Answered, 216),
            (Moment::Done, 220),
        ];
        moments.into_iter().for_each(|(moment, us)| trace.stamp(moment, us));
        let traced = Traced { result: OperationResult::Value(None), trace: Some(trace), ..write(300, 220) };
        let stages = stages(&traced);
        let expected = [
            ("client", 50),
            ("network", 80),
            ("router", 4),
            ("mailbox", 2),
            ("round", 200),
            ("read", 10),
            ("reply", 4),
        ];
        assert_eq!(stages.in_a_row, expected.map(|(name, us)| (name, Some(us))));
        assert_eq!(stages.log, None);
    }

    #[test]
    fn medians_are_those_of_what_is_known() {
        let unknown = Stages { log: None, ..stages(&Traced { trace: None, ..write(900, 420) }) };
        let all = [stages(&write(600, 420)), stages(&write(700, 420)), stages(&write(500, 420)), unknown];
        let median = median(&all);
        assert_eq!(median.total, 750);
        let of = |name| median.in_a_row.iter().find(|(n, _)| *n == name).and_then(|(_, us)| *us);
        assert_eq!((of("network"), of("replicate")), (Some(180), Some(375)));
        assert_eq!(median.followers.iter().map(|f| f.in_time).collect::<Vec<_>>(), [3, 0, 0, 3]);
        assert_eq!(median.followers[0].sync, Some(280));
    }
}
