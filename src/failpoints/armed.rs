//! The points of a build for tests, and rules about what happens there.
//!
//! Rules are separated by `;`, and the parts of a rule by `:`, for instance
//!
//! ```text
//! panic:replica/*:p=0.01:seed=7:each=3;delay:log/sync.before:ms=200:times=1
//! ```
//!
//! | part | meaning |
//! |---|---|
//! | `panic`, `error`, `delay` | what happens |
//! | a name, or the beginning of names and `*` | at which points |
//! | `p=X` | with this probability; else always |
//! | `seed=N` | the sequence of chances; else 0 |
//! | `skip=N` | not the first N times |
//! | `times=N` | N times at most |
//! | `each=N` | only to replicas that the rules together have ended fewer than N times |
//! | `replica=N` | to this replica alone |
//! | `data=TEXT` | only to entries in whose bytes this is |
//! | `ms=N` | for so long (of `delay`; else 100) |
//!
//! The rules hold for the whole process. A seed gives the same chances, not the same events: threads pass
//! the points in an order of their own.

use std::collections::BTreeMap;
use std::panic::Location;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

use crate::ids::ReplicaId;

/// Rules that a process starts with.
pub const VARIABLE: &str = "PONTOON_TEST_HOOKS";

macro_rules! points {
    ($($variant:ident = $name:literal, $what:literal, $errors:literal;)*) => {
        /// A point. The first part of its name tells who passes it, and so what a panic there ends:
        /// `replica` and `receive` that replica's start or that transfer alone, all others the node.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[allow(missing_docs)] // Each has its text in `POINTS`.
        pub enum Point {
            $($variant,)*
        }

        /// All points: name, and when it is passed.
        pub const POINTS: &[(&str, &str)] = &[$(($name, $what),)*];

        impl Point {
            /// Its name.
            pub fn name(self) -> &'static str {
                match self {
                    $(Point::$variant => $name,)*
                }
            }
        }

        const ERRORS: &[(&str, bool)] = &[$(($name, $errors),)*];
    };
}

points! {
    Open = "replica/open", "before a group is made of what was read from disk", false;
    Step = "replica/step", "before a message of another replica is taken in", true;
    HardState = "replica/hard-state", "a term or a vote has changed in memory, nothing of it has left", false;
    WriteBefore = "replica/write.before", "messages that may leave early have left, the write has not", true;
    WriteAfter = "replica/write.after", "the write is with the log writer", true;
    Persisted = "replica/persisted", "the write is durable, what waits for that has not left", true;
    ApplyBefore = "replica/apply.before", "before a committed entry is applied", true;
    ApplyMiddle = "replica/apply.middle", "the entry's commands are carried out, its position isn't set", false;
    ApplyAfter = "replica/apply.after", "after that, nobody has been answered", false;
    ChangeProposed = "replica/change.proposed", "a change of members is in the leader's log, nothing of it has left", false;
    ChangeCommitted = "replica/change.committed", "a change of members is committed, its record isn't written", false;
    ChangeRecorded = "replica/change.recorded", "the record is durable, the change isn't in force", false;
    ChangeApplied = "replica/change.applied", "the change is in force, nobody was told", false;
    ChangeLeaves = "replica/change.leaves", "the end of a joint change is in the leader's log, nothing of it has left", false;
    Answer = "replica/answer", "before the answers of a pass are given", true;
    FreezeBefore = "replica/freeze.before", "before a memtable is frozen", false;
    FreezeMiddle = "replica/freeze.middle", "the memtable is frozen, the flush thread doesn't have it", false;
    FreezeAfter = "replica/freeze.after", "the flush thread has it", false;
    FlushLogged = "replica/flush.logged", "before the replica notes that its flush is in a redo file", false;
    FlushAbsorbed = "replica/flush.absorbed", "before the replica releases what the engine has", false;
    Compact = "replica/compact", "before the log writer is asked to compact", false;
    SnapshotWanted = "replica/snapshot.wanted", "a follower needs a snapshot, nobody was told", true;
    SnapshotMade = "replica/snapshot.made", "before the leader notes that a snapshot is made", false;
    SnapshotDone = "replica/snapshot.done", "before the leader notes that a follower has a snapshot", false;
    LogSyncBefore = "log/sync.before", "a batch is gathered, nothing of it is written", false;
    LogSyncAfter = "log/sync.after", "the batch is durable, nobody was told", false;
    LogCreateBefore = "log/create.before", "before new replicas are recorded", false;
    LogCreateAfter = "log/create.after", "they are recorded, nobody was told", false;
    LogRemoveBefore = "log/remove.before", "a replica is to go, its tombstone isn't written", false;
    LogRemoveAfter = "log/remove.after", "the tombstone is durable, its state is still there", false;
    LogCompactBefore = "log/compact.before", "before the log is compacted", false;
    LogCompactAfter = "log/compact.after", "after that", false;
    LogInstallBefore = "log/install.before", "a snapshot is loaded, the record that switches to it isn't written", false;
    LogInstallAfter = "log/install.after", "the record is durable, nobody was told", false;
    LogPurge = "log/purge", "before old files of the log are looked for", false;
    FlushRedoWritten = "flush/redo-written", "the redo file is written, not synced", false;
    FlushRedoDurable = "flush/redo-durable", "it is durable, the engine has nothing of it", false;
    FlushBatchWritten = "flush/batch-written", "the engine has a part of it", false;
    FlushEngineSynced = "flush/engine-synced", "the engine is durable, the redo file is still there", false;
    FlushRedoRemoved = "flush/redo-removed", "the redo file is gone", false;
    SnapshotMake = "snapshot/make", "before the making of a snapshot begins", false;
    SnapshotStep = "snapshot/step", "between two steps of that", false;
    SnapshotLoad = "snapshot/load", "between two steps of the loading of one", false;
    SnapshotLoaded = "snapshot/loaded", "all of it is loaded and durable, nobody was told", false;
    SnapshotSend = "send/snapshot", "before a snapshot is offered to another node", false;
    SnapshotReceive = "receive/snapshot", "before a chunk is added to what was received", true;
    ReadEngine = "read/engine", "before queries are answered from the engine", false;
    InstallBefore = "supervisor/install.before", "a snapshot is loaded, the replica still runs", false;
    RecoverBefore = "supervisor/recover.before", "a replica that is to go on alone runs still", false;
    RecoverReopen = "supervisor/recover.reopen", "that it goes on alone is durable, it isn't opened", false;
    InstallReopen = "supervisor/install.reopen", "the record is durable, the replica isn't opened", false;
    Rebuild = "supervisor/rebuild", "a crashed replica is fenced, nothing of it was read", false;
    NewcomerCreated = "supervisor/newcomer.created", "a replica that a move brings is recorded, and not opened", false;
    OrderReceived = "order/received", "an order of the reconciler is here, nothing was done", false;
    OrderCarriedOut = "order/carried-out", "what was ordered is done, nobody was told", false;
    ReconcileMetaBefore = "reconciler/meta.before", "before a command of the reconciler goes to the metadata shard", false;
    ReconcileMetaAfter = "reconciler/meta.after", "after that", false;
    ReconcileOrderBefore = "reconciler/order.before", "before an order of the reconciler leaves", false;
    ReconcileOrderAfter = "reconciler/order.after", "after its end is known", false;
}

/// Whether what is done at the point of this name can fail: there, and nowhere else, `error` makes sense.
pub fn can_fail(name: &str) -> bool {
    ERRORS.contains(&(name, true))
}

/// What happens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Injection {
    Panic,
    Error,
    Delay(Duration),
}

#[derive(Debug)]
struct Rule {
    action: Injection,
    /// The name, or how it begins.
    name: String,
    prefix: bool,
    /// In 2^-32.
    chance: Option<u64>,
    dice: u64,
    skip: u64,
    times: Option<u64>,
    each: Option<u32>,
    replica: Option<ReplicaId>,
    data: Option<String>,
}

/// Whether there are any rules: with none, a point costs one look at this.
static ARMED: AtomicBool = AtomicBool::new(false);
static RULES: Mutex<Rules> = Mutex::new(Rules { rules: Vec::new(), ended: BTreeMap::new() });

/// All rules, and what they have done.
struct Rules {
    rules: Vec<Rule>,
    /// How often each replica was ended.
    ended: BTreeMap<ReplicaId, u32>,
}

fn rules() -> MutexGuard<'static, Rules> {
    // Nothing panics while it is held.
    RULES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Replaces the rules. With none of them nothing happens any more.
///
/// # Errors
/// What is wrong with the text; the rules stay as they were.
pub fn arm(text: &str) -> Result<(), String> {
    let parsed = text.split(';').map(str::trim).filter(|rule| !rule.is_empty()).map(Rule::parse);
    let parsed: Vec<Rule> = parsed.collect::<Result<_, _>>()?;
    let mut rules = rules();
    ARMED.store(!parsed.is_empty(), Ordering::Relaxed);
    *rules = Rules { rules: parsed, ended: BTreeMap::new() };
    Ok(())
}

/// Takes the rules that the environment names, once per process.
///
/// # Errors
/// What is wrong with them.
pub fn arm_from_environment() -> Result<(), String> {
    static ONCE: Once = Once::new();
    let mut armed = Ok(());
    ONCE.call_once(|| {
        if let Ok(text) = std::env::var(VARIABLE) {
            armed = arm(&text).map_err(|error| format!("{VARIABLE}: {error}"));
        }
    });
    armed
}

/// Work has come to a point. `data`: of the entry that it is about, if it is.
#[track_caller]
pub fn at(point: Point, replica: Option<ReplicaId>, data: &[u8]) {
    // No rule reports an error where none can be: those are refused.
    fails(point, replica, data);
}

/// Work has come to a point where it can fail: why, if it is to.
#[track_caller]
pub fn fails(point: Point, replica: Option<ReplicaId>, data: &[u8]) -> Option<String> {
    if ARMED.load(Ordering::Relaxed) { strike(point, replica, data) } else { None }
}

#[track_caller]
fn strike(point: Point, replica: Option<ReplicaId>, data: &[u8]) -> Option<String> {
    let name = point.name();
    let action = rules().strike(name, replica, data)?;
    match action {
        Injection::Panic => panic!("injected panic at {name}"),
        Injection::Error => Some(format!("injected error at {name}")),
        Injection::Delay(time) => {
            let place = Location::caller();
            tracing::warn!(point = name, ?replica, ?time, %place, "injected delay");
            std::thread::sleep(time);
            None
        }
    }
}

impl Rules {
    /// What the first rule that strikes has happen.
    fn strike(&mut self, name: &str, replica: Option<ReplicaId>, data: &[u8]) -> Option<Injection> {
        let ended = replica.map_or(0, |replica| self.ended.get(&replica).copied().unwrap_or(0));
        let action = self.rules.iter_mut().find_map(|rule| rule.strikes(name, replica, ended, data))?;
        if let (Some(replica), Injection::Panic | Injection::Error) = (replica, action) {
            *self.ended.entry(replica).or_default() += 1;
        }
        Some(action)
    }
}

impl Rule {
    fn parse(text: &str) -> Result<Rule, String> {
        let mut parts = text.split(':');
        let (action, name) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let (name, prefix) = match name.strip_suffix('*') {
            Some(start) => (start, true),
            None => (name, false),
        };
        let mut rule = Rule {
            action: match action {
                "panic" => Injection::Panic,
                "error" => Injection::Error,
                "delay" => Injection::Delay(Duration::from_millis(100)),
                other => return Err(format!("`{other}` is neither panic, error nor delay")),
            },
            name: name.to_owned(),
            prefix,
            chance: None,
            dice: 0,
            skip: 0,
            times: None,
            each: None,
            replica: None,
            data: None,
        };
        let mut named = ERRORS.iter().filter(|(name, _)| rule.names(name)).peekable();
        if named.peek().is_none() {
            return Err(format!("`{name}` names no point"));
        }
        if rule.action == Injection::Error
            && let Some((name, _)) = named.find(|(_, errors)| !errors)
        {
            return Err(format!("nothing at {name} can report an error"));
        }
        for part in parts {
            rule.take(part).ok_or_else(|| format!("`{part}` is not understood"))?;
        }
        Ok(rule)
    }

    /// One more part; `None` if it can't be read.
    fn take(&mut self, part: &str) -> Option<()> {
        let (what, value) = part.split_once('=')?;
        match what {
            "p" => {
                let chance = value.parse::<f64>().ok().filter(|p| (0.0..=1.0).contains(p))?;
                self.chance = Some((chance * (1_u64 << 32) as f64) as u64);
            }
            "seed" => self.dice = value.parse().ok()?,
            "skip" => self.skip = value.parse().ok()?,
            "times" => self.times = Some(value.parse().ok()?),
            "each" => self.each = Some(value.parse().ok()?),
            "replica" => self.replica = Some(ReplicaId(value.parse().ok()?)),
            "data" => self.data = Some(value.to_owned()),
            "ms" if matches!(self.action, Injection::Delay(_)) => {
                self.action = Injection::Delay(Duration::from_millis(value.parse().ok()?));
            }
            _ => return None,
        }
        Some(())
    }

    fn names(&self, name: &str) -> bool {
        if self.prefix { name.starts_with(&self.name) } else { name == self.name }
    }

    /// Whether it strikes now a replica that was `ended` so often; that it has is noted.
    fn strikes(
        &mut self,
        name: &str,
        replica: Option<ReplicaId>,
        ended: u32,
        data: &[u8],
    ) -> Option<Injection> {
        let contains = |text: &String| data.windows(text.len().max(1)).any(|part| part == text.as_bytes());
        let concerns = self.names(name)
            && (self.replica.is_none() || self.replica == replica)
            && self.each.is_none_or(|each| ended < each)
            && self.data.as_ref().is_none_or(contains);
        if !concerns || self.times == Some(0) || self.chance.is_some_and(|chance| self.roll() >= chance) {
            return None;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return None;
        }
        self.times = self.times.map(|times| times - 1);
        Some(self.action)
    }

    /// A number below 2^32 (SplitMix64).
    fn roll(&mut self) -> u64 {
        self.dice = self.dice.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.dice;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) >> 32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Rules {
        let rules = text.split(';').map(|rule| Rule::parse(rule).unwrap()).collect();
        Rules { rules, ended: BTreeMap::new() }
    }

    fn strike(rules: &mut Rules, name: &str, replica: u64, data: &str) -> bool {
        rules.strike(name, Some(ReplicaId(replica)), data.as_bytes()).is_some()
    }

    #[test]
    fn rules_strike_whom_they_name_as_often_as_they_say() {
        let mut rules = of("panic:replica/apply.*:skip=1:times=3");
        assert!(!strike(&mut rules, "log/sync.after", 1, ""));
        let times: Vec<bool> = (0..5).map(|_| strike(&mut rules, "replica/apply.after", 1, "")).collect();
        assert_eq!(times, [false, true, true, true, false]);

        let mut rules = of("delay:replica/apply.before:replica=7:data=poison:ms=5");
        assert_eq!(rules.rules[0].action, Injection::Delay(Duration::from_millis(5)));
        assert!(!strike(&mut rules, "replica/apply.before", 8, "a poison pill"));
        assert!(!strike(&mut rules, "replica/apply.before", 7, "a pill"));
        assert!(strike(&mut rules, "replica/apply.before", 7, "a poison pill"));

        // A delay ends nobody; the other two count together.
        let mut rules = of("delay:replica/open;panic:replica/step:each=2;error:replica/answer:each=2");
        assert!(strike(&mut rules, "replica/open", 1, ""));
        assert!(strike(&mut rules, "replica/step", 1, ""));
        assert!(strike(&mut rules, "replica/answer", 1, ""));
        assert!(!strike(&mut rules, "replica/step", 1, ""));
        assert!(strike(&mut rules, "replica/step", 2, ""));
    }

    #[test]
    fn a_seed_gives_the_same_chances() {
        let draw = |seed: u64| -> Vec<bool> {
            let mut rules = of(&format!("panic:replica/step:p=0.25:seed={seed}"));
            (0..4_000).map(|_| strike(&mut rules, "replica/step", 1, "")).collect()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
        let struck = draw(7).into_iter().filter(|struck| *struck).count();
        assert!((800..1_200).contains(&struck), "{struck} of 4000");
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (rule, why) in [
            ("burn:replica/step", "neither panic, error nor delay"),
            ("panic:replica/nowhere", "names no point"),
            ("panic", "names no point"),
            ("error:log/*", "nothing at log/sync.before can report an error"),
            ("panic:replica/step:p=2", "`p=2` is not understood"),
            ("panic:replica/step:ms=2", "`ms=2` is not understood"),
            ("panic:replica/step:often", "`often` is not understood"),
        ] {
            let error = Rule::parse(rule).expect_err(rule);
            assert!(error.contains(why), "{rule}: {error}");
        }
        for (name, what) in POINTS {
            assert!(Rule::parse(&format!("panic:{name}")).is_ok() && !what.is_empty(), "{name}");
        }
    }
}
