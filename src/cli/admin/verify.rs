//! `admin database verify`: whether the replicas of each shard are equal.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::args::VerifyArgs;
use super::database::check_shard;
use super::{METADATA, role_name};
use crate::cli::context::{Context, Session, with_session};
use crate::cli::failure::{Exit, Failure};
use crate::cli::output;
use crate::cli::status::unknown_database;
use crate::client::admin::answers::{CheckedReplica, CheckedState, ShardCheck, Verdict};
use crate::client::{ClientError, NotApplied};
use crate::ids::{METADATA_SHARD, ShardId};
use crate::limits::{VERIFY_ATTEMPTS_MAX, VERIFY_MS_MAX};
use crate::refusal::Refusal;
use crate::storage::digest::StateDigest;

/// Pause between two attempts at a shard that isn't decided.
const PAUSE: Duration = Duration::from_millis(500);

/// Why there is no check of a shard at all.
#[derive(Clone, PartialEq, Eq, Debug)]
struct NoCheck {
    why: String,
    /// It won't be otherwise later.
    is_final: bool,
}

impl From<ClientError> for NoCheck {
    fn from(error: ClientError) -> NoCheck {
        let is_final = match &error {
            ClientError::Invalid(_) | ClientError::NotApplied(NotApplied::UnknownDatabase(_)) => true,
            ClientError::NotApplied(NotApplied::Closed) => true,
            // With more nodes up a quarantined shard has a leader again.
            ClientError::NotApplied(NotApplied::Refused(
                Refusal::ShardQuarantined(_) | Refusal::Deadline,
            )) => false,
            ClientError::NotApplied(NotApplied::Refused(refusal)) => !refusal.retryable(),
            ClientError::NotApplied(NotApplied::Unavailable { .. }) | ClientError::Unknown(_) => false,
        };
        NoCheck { why: error.to_string(), is_final }
    }
}

/// What became of one shard.
struct Checked {
    shard: ShardId,
    check: Result<ShardCheck, NoCheck>,
}

/// What is said of a shard, or of all.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Outcome {
    Equal,
    Undecided,
    Different,
}

impl Outcome {
    fn name(self) -> &'static str {
        match self {
            Outcome::Equal => "equal",
            Outcome::Undecided => "undecided",
            Outcome::Different => "different",
        }
    }

    fn exit(self) -> Exit {
        match self {
            Outcome::Equal => Exit::Done,
            Outcome::Undecided => Exit::Unavailable,
            Outcome::Different => Exit::Negative,
        }
    }
}

impl Checked {
    fn outcome(&self) -> Outcome {
        match self.check.as_ref().map(ShardCheck::verdict) {
            Ok(Verdict::Equal) => Outcome::Equal,
            Ok(Verdict::Different) => Outcome::Different,
            Ok(Verdict::GoneOn | Verdict::Unknown) | Err(_) => Outcome::Undecided,
        }
    }

    /// Another attempt at once may bring more luck, whoever else can't be asked.
    fn has_gone_on(&self) -> bool {
        let gone_on = |one: &CheckedReplica| matches!(one.state, CheckedState::GoneOn(_));
        self.outcome() == Outcome::Undecided
            && self.check.as_ref().is_ok_and(|check| check.replicas.iter().any(gone_on))
    }

    /// It may be decided later.
    fn is_open(&self) -> bool {
        self.outcome() == Outcome::Undecided && !self.check.as_ref().is_err_and(|none| none.is_final)
    }

    /// Why it isn't decided.
    fn obstacles(&self) -> String {
        let check = match &self.check {
            Ok(check) => check,
            Err(none) => return none.why.clone(),
        };
        let missing = check.replicas.iter().filter_map(|one| match &one.state {
            CheckedState::Digest(_) => None,
            CheckedState::GoneOn(why) | CheckedState::Missing(why) => {
                Some(format!("node {}: {why}", one.node))
            }
        });
        missing.collect::<Vec<_>>().join("; ")
    }
}

/// `admin database verify DB`
pub fn verify(context: &Context, args: &VerifyArgs) -> Result<Exit, Failure> {
    let checked = with_session(context, async |session| {
        let shards = shards(session, args).await?;
        let terms = Terms {
            wait: args.wait,
            limit: context.global.timeout.map(|_| Instant::now() + session.remaining()),
            pause: PAUSE,
        };
        let ask = async |shard, within| {
            let check = session.client.verify_shard(shard, within).await.map_err(NoCheck::from);
            Checked { shard, check }
        };
        Ok(check_all(terms, &shards, ask, output::note).await)
    })?;
    let outcome = checked.iter().map(Checked::outcome).max().unwrap_or(Outcome::Equal);
    match context.json() {
        true => output::json(&json_of(&args.db, outcome, &checked))?,
        false => output::line(text_of(outcome, &checked))?,
    }
    Ok(outcome.exit())
}

/// The shards that are meant.
async fn shards(session: &Session, args: &VerifyArgs) -> Result<Vec<ShardId>, Failure> {
    if args.db == METADATA && args.shard.is_none_or(|shard| shard == METADATA_SHARD) {
        return Ok(vec![METADATA_SHARD]);
    }
    let map = session.client.map_naming(&args.db).await?;
    match args.shard {
        Some(shard) => check_shard(&map, &args.db, shard).map(|()| vec![shard]),
        None => match map.database(&args.db) {
            Some(database) => Ok(database.shards.clone()),
            None => Err(unknown_database(&map, &args.db)),
        },
    }
}

/// How long shards are asked about.
#[derive(Clone, Copy)]
struct Terms {
    /// Until all are decided.
    wait: bool,
    /// No longer than this.
    limit: Option<Instant>,
    /// Between two attempts at a shard.
    pause: Duration,
}

impl Terms {
    /// There is no time for another attempt.
    fn are_over(self) -> bool {
        self.limit.is_some_and(|limit| Instant::now() + self.pause >= limit)
    }

    /// Time for an attempt at one shard if so many follow it: one of which nothing is to be had leaves them some.
    fn share(self, following: usize) -> Duration {
        let left = self.limit.map(|limit| limit.saturating_duration_since(Instant::now()));
        let share = left.map(|left| if following > 0 { left / 2 } else { left });
        let longest = Duration::from_millis(VERIFY_MS_MAX);
        // Never nothing: that an attempt has no time it says by itself.
        share.unwrap_or(longest).clamp(Duration::from_millis(1), longest)
    }
}

/// Checks one shard after the other, for a node reads one replica at a time, and keeps still what waits to be read.
/// Only then those are waited for that aren't decided: none of them hides a difference in another. Where there
/// is a difference, nothing is waited for any more.
async fn check_all(
    terms: Terms,
    shards: &[ShardId],
    ask: impl AsyncFn(ShardId, Duration) -> Checked,
    mut tell: impl FnMut(String),
) -> Vec<Checked> {
    let mut all: Vec<Checked> = Vec::with_capacity(shards.len());
    for (following, shard) in (0..shards.len()).rev().zip(shards) {
        let mut attempts = 1;
        let mut checked = ask(*shard, terms.share(following)).await;
        while checked.has_gone_on() && attempts < VERIFY_ATTEMPTS_MAX && !terms.are_over() {
            tokio::time::sleep(terms.pause).await;
            checked = ask(*shard, terms.share(following)).await;
            attempts += 1;
        }
        all.push(checked);
    }
    let mut told: BTreeMap<ShardId, String> = BTreeMap::new();
    loop {
        let open: Vec<usize> = (0..all.len()).filter(|at| all[*at].is_open()).collect();
        if !terms.wait || open.is_empty() {
            return all;
        }
        for (following, at) in (0..open.len()).rev().zip(&open) {
            if terms.are_over() || all.iter().any(|one| one.outcome() == Outcome::Different) {
                return all;
            }
            let shard = all[*at].shard;
            let why = all[*at].obstacles();
            if told.get(&shard) != Some(&why) {
                tell(format!("waiting: shard {shard}: {}", output::printable(why.as_bytes())));
                told.insert(shard, why);
            }
            tokio::time::sleep(terms.pause).await;
            all[*at] = ask(shard, terms.share(following)).await;
        }
    }
}

/// 128 bits as 32 hexadecimal digits.
fn hash(number: u128) -> String {
    format!("{number:032x}")
}

fn json_of(name: &str, outcome: Outcome, checked: &[Checked]) -> Value {
    let replica = |check: &ShardCheck, one: &CheckedReplica| {
        let digest = one.digest();
        json!({
            "node": one.node.0,
            "replica": one.replica.0,
            "role": role_name(one.role),
            "leader": one.replica == check.leader,
            "data": digest.map(|digest| hash(digest.data)),
            "sessions": digest.map(|digest| hash(digest.sessions)),
            "keys": digest.map(|digest| digest.keys),
            "bytes": digest.map(|digest| digest.bytes),
            "why": match &one.state {
                CheckedState::Digest(_) => None,
                CheckedState::GoneOn(why) | CheckedState::Missing(why) => Some(why),
            },
        })
    };
    let shard = |checked: &Checked| {
        let (result, id) = (checked.outcome().name(), checked.shard.0);
        match &checked.check {
            Ok(check) => {
                let replicas: Vec<_> = check.replicas.iter().map(|one| replica(check, one)).collect();
                json!({"shard": id, "result": result, "index": check.index, "replicas": replicas, "why": null})
            }
            Err(none) => {
                json!({"shard": id, "result": result, "index": null, "replicas": [], "why": none.why})
            }
        }
    };
    let shards: Vec<_> = checked.iter().map(shard).collect();
    json!({"database": name, "result": outcome.name(), "shards": shards})
}

fn text_of(outcome: Outcome, checked: &[Checked]) -> String {
    let mut text: Vec<String> = checked.iter().map(shard_text).collect();
    let count = |of: Outcome| {
        let count = checked.iter().filter(|checked| checked.outcome() == of).count() as u64;
        output::count(count, "shard")
    };
    match outcome {
        Outcome::Equal => {}
        Outcome::Undecided => text.push(format!(
            "{} undecided; try again, or with --wait, once all nodes answer",
            count(Outcome::Undecided)
        )),
        Outcome::Different => text.push(format!(
            "{} with replicas that differ: a replica is damaged, or there is a fault in the program. Where most \
             replicas are alike, replace the others; `Replicas that differ` in docs/operations.md says how",
            count(Outcome::Different)
        )),
    }
    text.join("\n")
}

fn shard_text(checked: &Checked) -> String {
    let (shard, outcome) = (checked.shard, checked.outcome());
    let mut text = match (&checked.check, outcome) {
        (Ok(check), Outcome::Equal) => format!(
            "shard {shard}: {} equal at entry {}",
            output::count(check.replicas.len() as u64, "replica"),
            check.index
        ),
        (Ok(check), Outcome::Different) => {
            format!("shard {shard}: replicas differ at entry {}", check.index)
        }
        (Ok(check), Outcome::Undecided) => {
            let told = check.replicas.iter().filter(|one| one.digest().is_some()).count();
            let of = output::count(check.replicas.len() as u64, "replica");
            format!("shard {shard}: undecided, {told} of {of} told, at entry {}", check.index)
        }
        (Err(_), _) => format!("shard {shard}: undecided"),
    };
    if let (Ok(check), Outcome::Equal | Outcome::Different) = (&checked.check, outcome) {
        let mut alike: BTreeMap<(u128, u128), (StateDigest, Vec<String>)> = BTreeMap::new();
        for one in &check.replicas {
            let Some(digest) = one.digest() else { continue };
            let leads = if one.replica == check.leader { " (leader)" } else { "" };
            let (_, nodes) = alike.entry((digest.data, digest.sessions)).or_insert((*digest, Vec::new()));
            nodes.push(format!("{}{leads}", one.node));
        }
        for (digest, nodes) in alike.values() {
            let on = match outcome {
                Outcome::Different => {
                    format!(
                        "\n  data {}, sessions {}, node {}",
                        hash(digest.data),
                        hash(digest.sessions),
                        nodes.join(", ")
                    )
                }
                _ => String::new(),
            };
            text.push_str(&format!(
                "{on}: {}, {}",
                output::count(digest.keys, "key"),
                output::size(digest.bytes)
            ));
        }
    }
    let obstacles = checked.obstacles();
    if !obstacles.is_empty() {
        text.push_str(&format!("\n  {}", output::printable(obstacles.as_bytes())));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::ids::{NodeId, ReplicaId};
    use crate::placement::map::MemberRole;

    fn told(data: u128) -> CheckedState {
        CheckedState::Digest(StateDigest { index: 77, data, sessions: 5, keys: 1, bytes: 2048 })
    }

    fn checked(shard: u64, states: Vec<CheckedState>) -> Checked {
        let replicas = (1..).zip(states).map(|(node, state)| CheckedReplica {
            node: NodeId(node),
            replica: ReplicaId(10 + node),
            role: MemberRole::Voter,
            state,
        });
        let check = ShardCheck {
            shard: ShardId(shard),
            index: 77,
            leader: ReplicaId(11),
            replicas: replicas.collect(),
        };
        Checked { shard: ShardId(shard), check: Ok(check) }
    }

    fn none(shard: u64, why: &str, is_final: bool) -> Checked {
        Checked { shard: ShardId(shard), check: Err(NoCheck { why: why.into(), is_final }) }
    }

    fn missing(shard: u64) -> Checked {
        checked(shard, vec![told(1), CheckedState::Missing("no answer".into())])
    }

    fn gone_on(shard: u64) -> Checked {
        checked(shard, vec![told(1), CheckedState::GoneOn("it has gone on".into())])
    }

    fn equal(shard: u64) -> Checked {
        checked(shard, vec![told(1), told(1)])
    }

    /// Asks about shards 1 to 3, `wait` or not, where `answer` is told the shard and how many were asked before. The
    /// outcomes, which shards were asked in turn, and how much was said of waiting.
    fn asked(
        wait: bool,
        limit: Option<Duration>,
        answer: impl Fn(u64, usize) -> Checked,
    ) -> (Vec<Outcome>, Vec<u64>, usize) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let (asked, mut notes) = (RefCell::new(Vec::new()), 0);
        let limit = limit.map(|limit| Instant::now() + limit);
        let terms = Terms { wait, limit, pause: Duration::from_millis(1) };
        let ask = async |shard: ShardId, _| {
            let before = asked.borrow().len();
            asked.borrow_mut().push(shard.0);
            answer(shard.0, before)
        };
        let shards = [1, 2, 3].map(ShardId);
        let all = check_all(terms, &shards, ask, |_| notes += 1);
        let bounded = async { tokio::time::timeout(Duration::from_secs(20), all).await };
        let all = runtime.block_on(bounded).expect("it ends by itself");
        (all.iter().map(Checked::outcome).collect(), asked.into_inner(), notes)
    }

    #[test]
    fn one_that_is_waited_for_hides_no_difference() {
        use Outcome::{Different, Equal, Undecided};
        let found = asked(true, None, |shard, _| match shard {
            1 => missing(1),
            2 => checked(2, vec![told(1), told(2)]),
            _ => equal(3),
        });
        assert_eq!(found, (vec![Undecided, Different, Equal], vec![1, 2, 3], 0));
        // One that comes to light while others are waited for, too.
        let found = asked(true, None, |shard, before| match (shard, before) {
            (3, 5..) => checked(3, vec![told(1), told(2)]),
            (2, _) => equal(2),
            (shard, _) => missing(shard),
        });
        assert_eq!(found, (vec![Undecided, Equal, Different], vec![1, 2, 3, 1, 3, 1, 3], 2));
    }

    #[test]
    fn what_is_decided_is_not_asked_again_and_what_is_final_not_waited_for() {
        use Outcome::{Equal, Undecided};
        let answer = |shard, before| match shard {
            1 if before < 4 => missing(1),
            3 => none(3, "there is no shard 3", true),
            shard => equal(shard),
        };
        assert_eq!(asked(true, None, answer), (vec![Equal, Equal, Undecided], vec![1, 2, 3, 1, 1], 1));
        assert_eq!(asked(false, None, answer), (vec![Undecided, Equal, Undecided], vec![1, 2, 3], 0));
        // Until the time is over.
        let (outcomes, shards, notes) =
            asked(true, Some(Duration::from_millis(50)), |shard, _| missing(shard));
        assert_eq!((outcomes, &shards[..3]), (vec![Undecided; 3], &[1, 2, 3][..]));
        assert!(notes <= 3, "{notes}");
    }

    #[test]
    fn what_has_gone_on_is_tried_several_times() {
        let (outcomes, shards, _) = asked(false, None, |shard, _| match shard {
            2 => gone_on(2),
            shard => equal(shard),
        });
        assert_eq!(outcomes, [Outcome::Equal, Outcome::Undecided, Outcome::Equal]);
        let tried = shards.iter().filter(|shard| **shard == 2).count();
        assert_eq!((tried, shards.len()), (VERIFY_ATTEMPTS_MAX, 2 + VERIFY_ATTEMPTS_MAX));
    }

    #[test]
    fn a_shard_has_all_the_time_there_is_unless_others_follow() {
        let pause = Duration::from_millis(1);
        let longest = Duration::from_millis(VERIFY_MS_MAX);
        let terms = Terms { wait: false, limit: None, pause };
        assert_eq!((terms.share(0), terms.share(7)), (longest, longest));
        let terms = Terms { limit: Some(Instant::now() + Duration::from_secs(400)), ..terms };
        let about = |share: Duration, seconds| share.as_secs().abs_diff(seconds) <= 30;
        assert!(about(terms.share(0), 400) && about(terms.share(1), 200) && !terms.are_over());
        let terms = Terms { limit: Some(Instant::now()), ..terms };
        assert!(!terms.share(3).is_zero() && terms.are_over());
    }

    #[test]
    fn what_is_refused_for_good_is_told_from_what_passes() {
        let refused = |refusal| NoCheck::from(ClientError::NotApplied(NotApplied::Refused(refusal))).is_final;
        assert!(refused(Refusal::Refused("there is no shard 3".into())));
        assert!(!refused(Refusal::Unavailable("no leader".into())));
        assert!(!refused(Refusal::ShardQuarantined("it crashes".into())));
        let last = "no answer".to_owned();
        let unavailable = NotApplied::Unavailable { within: Duration::ZERO, last };
        assert!(!NoCheck::from(ClientError::NotApplied(unavailable)).is_final);
    }

    #[test]
    fn replicas_that_differ_are_named_with_what_they_are() {
        let all =
            [equal(4), checked(5, vec![told(1), told(2), told(1)]), missing(6), none(7, "no leader", false)];
        let outcome = all.iter().map(Checked::outcome).max().unwrap();
        assert_eq!((outcome, outcome.exit()), (Outcome::Different, Exit::Negative));
        let text = text_of(outcome, &all);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(
            lines[..7],
            [
                "shard 4: 2 replicas equal at entry 77: 1 key, 2.0 KiB",
                "shard 5: replicas differ at entry 77",
                "  data 00000000000000000000000000000001, sessions 00000000000000000000000000000005, \
                 node 1 (leader), 3: 1 key, 2.0 KiB",
                "  data 00000000000000000000000000000002, sessions 00000000000000000000000000000005, node 2: 1 key, \
                 2.0 KiB",
                "shard 6: undecided, 1 of 2 replicas told, at entry 77",
                "  node 2: no answer",
                "shard 7: undecided",
            ]
        );
        let json = json_of("db", outcome, &all);
        assert_eq!(
            (&json["result"], &json["shards"][1]["result"]),
            (&json!("different"), &json!("different"))
        );
        assert_eq!(json["shards"][2]["replicas"][1]["why"], json!("no answer"));
        assert_eq!(
            json["shards"][3],
            json!({
                "shard": 7, "result": "undecided", "index": null, "replicas": [], "why": "no leader",
            })
        );
        assert_eq!(
            json["shards"][0]["replicas"][0],
            json!({
                "node": 1, "replica": 11, "role": "voter", "leader": true,
                "data": "00000000000000000000000000000001", "sessions": "00000000000000000000000000000005",
                "keys": 1, "bytes": 2048, "why": null,
            })
        );
    }

    #[test]
    fn undecided_is_neither_equal_nor_different() {
        let gone_on = gone_on(4);
        assert!(gone_on.has_gone_on());
        assert_eq!((gone_on.outcome(), gone_on.outcome().exit()), (Outcome::Undecided, Exit::Unavailable));
        assert!(
            text_of(Outcome::Undecided, &[gone_on])
                .ends_with("1 shard undecided; try again, or with --wait, once all nodes answer")
        );
        assert!(!missing(4).has_gone_on() && missing(4).is_open());
        // That one is out of reach doesn't keep the others from being compared.
        let states = vec![told(1), CheckedState::GoneOn("on".into()), CheckedState::Missing("no".into())];
        assert!(checked(4, states).has_gone_on());
        let differ = vec![told(1), told(2), CheckedState::GoneOn("on".into())];
        assert!(!checked(4, differ).has_gone_on());
    }
}
