//! Linearizability of each key's history: is there an order of its operations that respects real time
//! and in which each answer is right?
//!
//! The search of Wing and Gong with Lowe's memory of visited configurations, as in porcupine: take
//! any operation that began before every open operation's end, apply it to the model, go on; step
//! back when nothing fits. A write whose outcome is unknown may take effect at any time after its
//! start, or never. Keys are independent, so each is searched alone.
//!
//! Two things shorten it. A read that fits the state as it is takes its place at once: wherever else it
//! fits, it fits here too, and nothing depends on it. And versions rise along the order, since a shard
//! numbers its changes as it applies them: of the writes with a version only the lowest may be next.
//!
//! Many unknown writes still make that too long. Then the log of committed entries tells which of them took
//! effect, and which didn't: a history that fits no order with those contradicts the log, if nothing else.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::Violation;
use crate::ids::ShardId;
use crate::sim::history::{Action, Call, Condition, Found, Key, Told, Value};

/// Steps after which a search is given up that knows only what clients know.
const STEPS_BLIND_MAX: usize = 50_000;

/// Steps after which the search of one key is given up.
const STEPS_MAX: usize = 1_000_000;

/// A version that nobody was told.
const UNTOLD: u64 = 0;

/// The model of a key: its value and version, if it exists.
type State = Option<(Value, u64)>;

/// What the checks of all keys came to.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Searched {
    /// Keys whose history is linearizable.
    pub keys: usize,
    /// Keys whose search was given up.
    pub undecided: usize,
}

/// Checks the history of every key. `effect` tells the version that an operation made, if it made one.
pub fn check(calls: &[Call], effect: impl Fn(&Call) -> Option<u64>) -> Result<Searched, Violation> {
    let mut by_key: BTreeMap<(ShardId, Key), Vec<Call>> = BTreeMap::new();
    for call in calls {
        by_key.entry((call.shard, call.key)).or_default().push(*call);
    }
    let mut searched = Searched::default();
    for ((shard, key), calls) in by_key {
        let blind = linearizable(&calls, STEPS_BLIND_MAX);
        let decided = blind.or_else(|| {
            let calls: Vec<Call> = calls.iter().map(|call| with_effect(*call, effect(call))).collect();
            linearizable(&calls, STEPS_MAX)
        });
        match decided {
            Some(true) => searched.keys += 1,
            None => searched.undecided += 1,
            Some(false) => {
                let mut detail = format!("the history of key {key} of shard {shard} is not linearizable:");
                for call in relevant(&calls) {
                    detail += &format!(
                        "\n  {:>6} {:>6} client {} {:?} -> {:?}",
                        call.invoked,
                        if call.returned == u64::MAX { "-".into() } else { call.returned.to_string() },
                        call.client,
                        call.action,
                        call.told
                    );
                }
                return Err(Violation::new("linear", detail));
            }
        }
    }
    Ok(searched)
}

/// An operation of unknown outcome as what it came to. It may still take effect after its client gave up.
fn with_effect(call: Call, effect: Option<u64>) -> Call {
    let told = match (call.told, call.action, effect) {
        (Told::Unknown, Action::Put(_) | Action::Cas(..), Some(version)) => Told::Written(version),
        (Told::Unknown, Action::Put(_) | Action::Cas(..), None) => Told::Refused,
        (Told::Unknown, Action::Delete, Some(version)) => Told::Deleted(version),
        // Without a tag nobody knows which change is a deletion's.
        (Told::Unknown, Action::Delete, None) if call.tag.is_some() => Told::Refused,
        (told, ..) => told,
    };
    Call { told, ..call }
}

/// Operations that constrain the order: not those that had no effect, nor reads without an answer.
fn relevant(calls: &[Call]) -> Vec<Call> {
    let mut relevant: Vec<Call> = calls
        .iter()
        .filter(|call| {
            call.told != Told::Refused && (call.action != Action::Get || call.told != Told::Unknown)
        })
        .copied()
        .collect();
    let sees_presence = relevant.iter().any(|call| {
        matches!(
            (call.action, call.told),
            (_, Told::Deleted(_)) | (Action::Cas(Condition::Version(_), _), Told::Written(_))
        )
    });
    if !sees_presence {
        // A write that nobody was told of, and whose value nobody saw, needs no place.
        let seen: BTreeSet<Value> = relevant.iter().filter_map(sees).collect();
        relevant.retain(|call| match call.action {
            Action::Put(value) | Action::Cas(_, value) => call.told != Told::Unknown || seen.contains(&value),
            Action::Get | Action::Delete => true,
        });
    }
    relevant.sort_by_key(|call| call.invoked);
    relevant
}

/// The value that the answer to a call depends on.
fn sees(call: &Call) -> Option<Value> {
    match (call.action, call.told) {
        (_, Told::Found(found) | Told::Mismatch(found)) => found.map(|(value, _)| value),
        (Action::Cas(Condition::Value(value), _), _) => Some(value),
        _ => None,
    }
}

/// Whether the history of one key is linearizable; `None` if that takes more steps than `steps_max`.
pub fn linearizable(calls: &[Call], steps_max: usize) -> Option<bool> {
    let calls = relevant(calls);
    let mut search = Search {
        done: vec![0; calls.len().div_ceil(64)],
        left: calls.iter().filter(|call| call.told != Told::Unknown).count(),
        calls,
        visited: HashSet::new(),
        steps_left: steps_max,
    };
    search.run(None, 0)
}

struct Search {
    /// In order of their starts.
    calls: Vec<Call>,
    /// A bit for each that has its place.
    done: Vec<u64>,
    /// Calls with an answer that have no place yet.
    left: usize,
    visited: HashSet<(Vec<u64>, State)>,
    steps_left: usize,
}

impl Search {
    fn run(&mut self, state: State, from: usize) -> Option<bool> {
        if self.left == 0 {
            return Some(true);
        }
        self.steps_left = self.steps_left.checked_sub(1)?;
        if !self.visited.insert((self.done.clone(), state)) {
            return Some(false);
        }
        let from = (from..self.calls.len()).find(|&at| !self.is_done(at)).unwrap_or(self.calls.len());
        let open = (from..self.calls.len()).filter(|&at| !self.is_done(at));
        let first_end = open.clone().map(|at| self.calls[at].returned).min().unwrap_or(u64::MAX);
        let next_version = open.clone().filter_map(|at| version(&self.calls[at])).min();
        let candidates: Vec<usize> = open.take_while(|&at| self.calls[at].invoked < first_end).collect();
        if let Some(&at) = candidates.iter().find(|&&at| only_sees(&self.calls[at], state)) {
            self.done[at / 64] |= 1 << (at % 64);
            self.left -= 1;
            let decided = self.run(state, from);
            self.done[at / 64] &= !(1 << (at % 64));
            self.left += 1;
            return decided;
        }
        for at in candidates {
            let call = self.calls[at];
            if version(&call).is_some_and(|version| Some(version) > next_version) {
                continue;
            }
            for next in apply(state, &call).into_iter().flatten() {
                let counts = usize::from(call.told != Told::Unknown);
                self.done[at / 64] |= 1 << (at % 64);
                self.left -= counts;
                match self.run(next, from) {
                    Some(false) => {}
                    decided => return decided,
                }
                self.done[at / 64] &= !(1 << (at % 64));
                self.left += counts;
            }
        }
        Some(false)
    }

    fn is_done(&self, at: usize) -> bool {
        self.done[at / 64] >> (at % 64) & 1 == 1
    }
}

/// The version of what a call is known to have changed.
fn version(call: &Call) -> Option<u64> {
    match call.told {
        Told::Written(version) | Told::Deleted(version) => Some(version),
        _ => None,
    }
}

/// Whether the answer to `call` is right in `state`, and tells nothing of it that isn't known.
fn only_sees(call: &Call, state: State) -> bool {
    let sees = matches!(call.told, Told::Found(_) | Told::Mismatch(_) | Told::Absent);
    sees && apply(state, call) == [Some(state), None]
}

/// The states after `call` if it may take place in `state`; at most two.
fn apply(state: State, call: &Call) -> [Option<State>; 2] {
    let one = |next: State| [Some(next), None];
    const NO: [Option<State>; 2] = [None, None];
    match (call.action, call.told) {
        (Action::Get, Told::Found(found)) => [agree(state, found), None],
        (Action::Put(value), Told::Written(version)) => one(Some((value, version))),
        (Action::Put(value), Told::Unknown) => one(Some((value, UNTOLD))),
        (Action::Delete, Told::Deleted(_)) if state.is_some() => one(None),
        (Action::Delete, Told::Absent) if state.is_none() => one(None),
        (Action::Delete, Told::Unknown) if state.is_some() => one(None),
        (Action::Cas(condition, value), Told::Written(version)) => match holds(condition, state) {
            Some(false) => NO,
            Some(true) | None => one(Some((value, version))),
        },
        (Action::Cas(condition, value), Told::Unknown) => match holds(condition, state) {
            Some(false) => NO,
            Some(true) | None => one(Some((value, UNTOLD))),
        },
        (Action::Cas(condition, _), Told::Mismatch(found)) if holds(condition, found) == Some(false) => {
            [agree(state, found), None]
        }
        _ => NO,
    }
}

/// The state, with what an answer tells of its version, unless it contradicts the answer.
fn agree(state: State, found: Found) -> Option<State> {
    match (state, found) {
        (None, None) => Some(None),
        (Some((value, version)), Some(seen))
            if value == seen.0 && (version == UNTOLD || version == seen.1) =>
        {
            Some(found)
        }
        _ => None,
    }
}

/// Whether a condition holds; `None` if that depends on a version nobody was told.
fn holds(condition: Condition, state: State) -> Option<bool> {
    match (condition, state) {
        (Condition::Absent, state) => Some(state.is_none()),
        (_, None) => Some(false),
        (Condition::Value(value), Some(state)) => Some(value == state.0),
        (Condition::Version(_), Some((_, UNTOLD))) => None,
        (Condition::Version(version), Some(state)) => Some(version == state.1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(invoked: u64, returned: u64, action: Action, told: Told) -> Call {
        Call { client: 0, shard: ShardId(1), key: 0, action, tag: None, invoked, returned, told }
    }

    fn put(invoked: u64, returned: u64, value: Value) -> Call {
        call(invoked, returned, Action::Put(value), Told::Written(value))
    }

    fn get(invoked: u64, returned: u64, value: Value) -> Call {
        let found = (value != 0).then_some((value, value));
        call(invoked, returned, Action::Get, Told::Found(found))
    }

    fn linearizable(calls: &[Call]) -> Option<bool> {
        super::linearizable(calls, STEPS_MAX)
    }

    #[test]
    fn a_stale_read_is_not_linearizable() {
        assert_eq!(linearizable(&[put(1, 2, 1), put(3, 4, 2), get(5, 6, 2)]), Some(true));
        assert_eq!(linearizable(&[put(1, 2, 1), put(3, 4, 2), get(5, 6, 1)]), Some(false));
        assert_eq!(linearizable(&[put(1, 2, 1), put(3, 7, 2), get(5, 6, 1)]), Some(true));
        assert_eq!(linearizable(&[put(1, 2, 1), get(3, 4, 0)]), Some(false));
    }

    #[test]
    fn reads_never_go_back() {
        let back = [put(1, 2, 1), put(3, 20, 2), get(4, 5, 2), get(6, 7, 1)];
        assert_eq!(linearizable(&back), Some(false));
    }

    #[test]
    fn an_unknown_write_happens_late_or_never() {
        let lost = call(3, u64::MAX, Action::Put(2), Told::Unknown);
        assert_eq!(linearizable(&[put(1, 2, 1), lost, get(5, 6, 1), get(7, 8, 2)]), Some(true));
        assert_eq!(linearizable(&[put(1, 2, 1), lost, get(5, 6, 1), get(7, 8, 1)]), Some(true));
        assert_eq!(linearizable(&[put(1, 2, 1), lost, get(5, 6, 2), get(7, 8, 1)]), Some(false));
        let refused = call(3, 4, Action::Put(2), Told::Refused);
        assert_eq!(linearizable(&[put(1, 2, 1), refused, get(5, 6, 2)]), Some(false));
    }

    #[test]
    fn conditions_count() {
        let cas = |invoked, condition, told| call(invoked, invoked + 1, Action::Cas(condition, 2), told);
        let won = Told::Written(2);
        assert_eq!(linearizable(&[put(1, 2, 1), cas(3, Condition::Value(1), won)]), Some(true));
        assert_eq!(linearizable(&[put(1, 2, 1), cas(3, Condition::Absent, won)]), Some(false));
        assert_eq!(linearizable(&[put(1, 2, 1), cas(3, Condition::Version(9), won)]), Some(false));
        let lost = Told::Mismatch(Some((1, 1)));
        assert_eq!(linearizable(&[put(1, 2, 1), cas(3, Condition::Absent, lost)]), Some(true));
        assert_eq!(linearizable(&[put(1, 2, 1), cas(3, Condition::Value(1), lost)]), Some(false));
        let deleted = call(3, 4, Action::Delete, Told::Deleted(7));
        assert_eq!(linearizable(&[put(1, 2, 1), deleted, get(5, 6, 0)]), Some(true));
        assert_eq!(linearizable(&[deleted]), Some(false));
    }

    #[test]
    fn versions_rise() {
        let put = |value, version| call(1, 10, Action::Put(value), Told::Written(version));
        let deleted = call(1, 10, Action::Delete, Told::Deleted(7));
        assert_eq!(linearizable(&[put(1, 8), put(2, 3), get(11, 12, 0)]), Some(false));
        let last = |value, version| call(11, 12, Action::Get, Told::Found(Some((value, version))));
        assert_eq!(linearizable(&[put(1, 8), put(2, 3), last(1, 8)]), Some(true));
        assert_eq!(linearizable(&[put(1, 8), put(2, 3), last(2, 3)]), Some(false));
        assert_eq!(linearizable(&[put(1, 8), put(2, 3), deleted, last(1, 8)]), Some(true));
        assert_eq!(linearizable(&[put(1, 6), put(2, 3), deleted, last(1, 6)]), Some(false));
    }

    #[test]
    fn what_takes_too_long_is_decided_by_what_took_effect() {
        const WRITES: u64 = 24;
        let lost = |value| call(value, u64::MAX, Action::Put(value), Told::Unknown);
        let read = |at, value| call(at, at + 1, Action::Get, Told::Found(Some((value, value))));
        let mut calls: Vec<Call> = (1..=WRITES).map(lost).collect();
        calls.extend((1..=WRITES).map(|value| read(100 + 2 * value, value)));
        let effect = |call: &Call| match call.action {
            Action::Put(version) => Some(version),
            _ => None,
        };
        assert_eq!(check(&calls, effect), Ok(Searched { keys: 1, undecided: 0 }));
        // The first value once more: it was written once.
        calls.push(read(300, 1));
        assert_eq!(super::linearizable(&calls, STEPS_BLIND_MAX), None);
        let violation = check(&calls, effect).expect_err("not linearizable");
        assert_eq!(violation.check, "linear");
    }

    #[test]
    fn an_unknown_write_can_explain_a_deletion() {
        let lost = call(1, u64::MAX, Action::Put(9), Told::Unknown);
        let deleted = call(3, 4, Action::Delete, Told::Deleted(7));
        assert_eq!(linearizable(&[lost, deleted]), Some(true));
    }
}
