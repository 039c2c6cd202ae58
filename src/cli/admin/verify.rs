//! `admin database verify`: whether the replicas of each shard are equal.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use serde_json::{Value, json};

use super::args::VerifyArgs;
use super::database::check_shard;
use super::{METADATA, role_name};
use crate::cli::context::{Context, Session, with_session};
use crate::cli::failure::{Exit, Failure};
use crate::cli::output;
use crate::cli::status::unknown_database;
use crate::client::admin::answers::{CheckedReplica, CheckedState, ShardCheck, Verdict};
use crate::ids::{METADATA_SHARD, ShardId};
use crate::limits::{VERIFIED_MAX, VERIFY_ATTEMPTS_MAX, VERIFY_MS_MAX};
use crate::storage::digest::StateDigest;

/// Pause between two attempts at a shard that isn't decided.
const PAUSE: Duration = Duration::from_millis(500);

/// What became of one shard: a check, or why there was none at all.
struct Checked {
    shard: ShardId,
    check: Result<ShardCheck, String>,
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

    /// Another attempt at once may bring more luck.
    fn has_gone_on(&self) -> bool {
        self.check.as_ref().is_ok_and(|check| check.verdict() == Verdict::GoneOn)
    }

    /// Why it isn't decided.
    fn obstacles(&self) -> String {
        let check = match &self.check {
            Ok(check) => check,
            Err(why) => return why.clone(),
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
        let each = shards.into_iter().map(|shard| check(context, session, args.wait, shard));
        Ok(stream::iter(each).buffered(VERIFIED_MAX).collect::<Vec<_>>().await)
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

/// Checks a shard until it is decided, or there is no point in going on.
async fn check(context: &Context, session: &Session, wait: bool, shard: ShardId) -> Checked {
    let limited = context.global.timeout.is_some();
    let longest = Duration::from_millis(VERIFY_MS_MAX);
    let (mut attempts, mut told) = (0, None);
    loop {
        let left = if limited { session.remaining().min(longest) } else { longest };
        let check = session.client.verify_shard(shard, left).await.map_err(|error| error.to_string());
        let checked = Checked { shard, check };
        attempts += 1;
        let again = wait || (checked.has_gone_on() && attempts < VERIFY_ATTEMPTS_MAX);
        let over = limited && session.remaining() <= PAUSE;
        if checked.outcome() != Outcome::Undecided || !again || over {
            return checked;
        }
        if wait {
            let why = checked.obstacles();
            if told.as_ref() != Some(&why) {
                output::note(format!("waiting: shard {shard}: {}", output::printable(why.as_bytes())));
                told = Some(why);
            }
        }
        tokio::time::sleep(PAUSE).await;
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
            Err(why) => json!({"shard": id, "result": result, "index": null, "replicas": [], "why": why}),
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

    #[test]
    fn replicas_that_differ_are_named_with_what_they_are() {
        let all = [
            checked(4, vec![told(1), told(1)]),
            checked(5, vec![told(1), told(2), told(1)]),
            checked(6, vec![told(1), CheckedState::Missing("no answer".into())]),
            Checked { shard: ShardId(7), check: Err("no leader".into()) },
        ];
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
        let gone_on = checked(4, vec![told(1), CheckedState::GoneOn("it has gone on".into())]);
        assert!(gone_on.has_gone_on());
        assert_eq!((gone_on.outcome(), gone_on.outcome().exit()), (Outcome::Undecided, Exit::Unavailable));
        assert!(
            text_of(Outcome::Undecided, &[gone_on])
                .ends_with("1 shard undecided; try again, or with --wait, once all nodes answer")
        );
        let missing = checked(4, vec![told(1), CheckedState::Missing("no answer".into())]);
        assert!(!missing.has_gone_on());
    }
}
