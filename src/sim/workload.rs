//! Simulated clients: each does one operation after the other on the few keys of one shard, follows
//! hints to the leader, and tries again what certainly had no effect. Most have a session, and send a
//! command that may have had an effect again too, under the same tag; the others give it up.

use super::Time;
use super::dice::Dice;
use super::history::{Action, Condition, Found, Key, Told, Value};
use crate::group::types::{Operation, Output};
use crate::ids::{NodeId, SessionId, ShardId};
use crate::machine::command::{Answer, Command, Expect, KvCommand, KvReply, Query, Reply, Versioned};
use crate::machine::session::SessionTag;

/// Keys of a shard: few, so that operations meet.
pub const KEYS: Key = 3;

/// Time after which an operation is given up that could not be started.
pub const GIVE_UP: Time = 8_000_000;

/// Lifetime of sessions in milliseconds: longer than anything that a client has sent takes to arrive,
/// by the fastest clock.
const LIFETIME_MS: u32 = 20_000;

/// One in so many clients has no sessions.
const PLAIN: usize = 4;

/// The key as a shard sees it.
pub fn key_bytes(key: Key) -> Vec<u8> {
    format!("k{key}").into_bytes()
}

/// The value as a shard sees it. Of different lengths, as values are.
pub fn value_bytes(value: Value) -> Vec<u8> {
    let mut bytes = format!("v{value}").into_bytes();
    bytes.resize(bytes.len() + (value % 7) as usize, b'.');
    bytes
}

/// The other way round; `None` if nobody wrote this.
pub fn read_value(bytes: &[u8]) -> Option<Value> {
    let text = std::str::from_utf8(bytes).ok()?;
    let value = text.strip_prefix('v')?.trim_end_matches('.').parse().ok()?;
    (value_bytes(value) == bytes).then_some(value)
}

/// What an action asks of a replica.
pub fn operation(key: Key, action: Action, session: Option<SessionTag>) -> Operation {
    let key = key_bytes(key).into();
    let command = match action {
        Action::Get => return Operation::Query(Query::Get { key }),
        Action::Put(value) => KvCommand::Put { key, value: value_bytes(value).into() },
        Action::Delete => KvCommand::Delete { key },
        Action::Cas(condition, value) => {
            let expect = match condition {
                Condition::Absent => Expect::Absent,
                Condition::Value(value) => Expect::Value(value_bytes(value).into()),
                Condition::Version(version) => Expect::Version(version),
            };
            KvCommand::Cas { key, expect, value: value_bytes(value).into() }
        }
    };
    Operation::Command { command: Command::Kv(command), session }
}

/// What a client makes of an output. `Err`: not an answer to what it asked.
pub fn told(action: Action, output: &Output) -> Result<Told, String> {
    let told = match (action, output) {
        (Action::Get, Output::Answer(Answer::Value(value))) => Some(Told::Found(found(value.as_ref())?)),
        (Action::Put(_) | Action::Cas(..), Output::Reply(Reply::Kv(KvReply::Written(version)))) => {
            Some(Told::Written(*version))
        }
        (Action::Delete, Output::Reply(Reply::Kv(KvReply::Deleted(version)))) => {
            Some(Told::Deleted(*version))
        }
        (Action::Delete, Output::Reply(Reply::Kv(KvReply::Absent))) => Some(Told::Absent),
        (Action::Cas(..), Output::Reply(Reply::Kv(KvReply::Mismatch(value)))) => {
            Some(Told::Mismatch(found(value.as_ref())?))
        }
        _ => None,
    };
    told.ok_or_else(|| format!("{output:?} doesn't answer {action:?}"))
}

fn found(value: Option<&Versioned>) -> Result<Found, String> {
    let Some(versioned) = value else { return Ok(None) };
    let value = read_value(&versioned.value).ok_or_else(|| format!("nobody wrote {versioned:?}"))?;
    Ok(Some((value, versioned.version)))
}

/// The operation a client waits for.
pub struct Waiting {
    /// Its number in the history.
    pub call: usize,
    /// The key.
    pub key: Key,
    /// What was asked.
    pub action: Action,
    /// When it began.
    pub since: Time,
    /// The attempt under way; answers to others are ignored.
    pub token: u64,
    /// What all attempts are sent under.
    pub tag: Option<SessionTag>,
    /// An attempt may have had an effect, or may yet.
    pub perhaps_applied: bool,
}

/// A client's session.
struct ClientSession {
    id: SessionId,
    next: u64,
    /// The shard has been seen to have it.
    opened: bool,
}

/// One client.
pub struct Client {
    /// The shard it works on.
    pub shard: ShardId,
    /// Operations it has yet to begin of its own choice.
    pub budget: usize,
    /// Operations it is told to do, before those.
    pub script: Vec<(Key, Action)>,
    /// Operations of its script that had a result.
    pub scripted: usize,
    /// Whom it takes for the leader.
    pub leader: Option<NodeId>,
    /// The operation under way.
    pub waiting: Option<Waiting>,
    /// What it last saw of each key, to make conditions that may hold.
    seen: [Found; KEYS as usize],
    session: Option<ClientSession>,
    attempts: u64,
    values: Value,
    number: usize,
}

impl Client {
    /// The `number`-th client.
    pub fn new(number: usize, shard: ShardId, budget: usize) -> Client {
        Client {
            shard,
            budget,
            script: Vec::new(),
            scripted: 0,
            leader: None,
            waiting: None,
            seen: [None; KEYS as usize],
            session: None,
            attempts: 0,
            values: 0,
            number,
        }
    }

    /// Whether it has nothing to do.
    pub fn is_idle(&self) -> bool {
        self.budget == 0 && self.script.is_empty() && self.waiting.is_none()
    }

    /// The client that a token belongs to.
    pub fn of_token(token: u64) -> usize {
        usize::try_from(token >> 32).unwrap_or(usize::MAX)
    }

    /// A token for a new attempt.
    pub fn next_token(&mut self) -> u64 {
        self.attempts += 1;
        (self.number as u64) << 32 | self.attempts
    }

    /// A value that nobody else writes.
    pub fn next_value(&mut self) -> Value {
        self.values += 1;
        (self.number as u64 + 1) * 1_000_000 + self.values
    }

    /// What it does next, if it still wants something.
    pub fn choose(&mut self, dice: &mut Dice) -> Option<(Key, Action)> {
        if !self.script.is_empty() {
            return Some(self.script.remove(0));
        }
        self.budget = self.budget.checked_sub(1)?;
        let key = dice.between(0, KEYS.into()) as Key;
        let seen = self.seen[usize::from(key)];
        let action = match dice.below(10) {
            0..4 => Action::Get,
            4..7 => Action::Put(self.next_value()),
            7 => Action::Delete,
            _ => {
                let condition = match seen {
                    None => Condition::Absent,
                    Some((value, _)) if dice.chance(600) => Condition::Value(value),
                    Some((_, version)) => Condition::Version(version),
                };
                Action::Cas(condition, self.next_value())
            }
        };
        Some((key, action))
    }

    /// The tag for a new command, if the client uses sessions: of its session or, now and then, of a
    /// new one.
    pub fn next_tag(&mut self, dice: &mut Dice) -> Option<SessionTag> {
        if self.number % PLAIN == PLAIN - 1 {
            return None;
        }
        if self.session.is_none() || dice.chance(50) {
            let mut id = [0; 16];
            id[..8].copy_from_slice(&(self.number as u64).to_be_bytes());
            id[8..].copy_from_slice(&dice.any().to_be_bytes());
            self.session = Some(ClientSession { id: SessionId::from_slice(&id)?, next: 1, opened: false });
        }
        let session = self.session.as_mut()?;
        let sequence = session.next;
        session.next += 1;
        let open = (!session.opened).then_some(LIFETIME_MS);
        // One operation at a time: all before are over.
        Some(SessionTag { session: session.id, sequence, acked_below: sequence, open })
    }

    /// An answer shows that the shard has the session, or that it hasn't.
    pub fn session_is(&mut self, there: bool) {
        match &mut self.session {
            Some(session) if there => session.opened = true,
            _ => self.session = None,
        }
    }

    /// Remembers what an answer tells of its key.
    pub fn learn(&mut self, key: Key, action: Action, told: Told) {
        let seen = &mut self.seen[usize::from(key)];
        match (action, told) {
            (_, Told::Found(found) | Told::Mismatch(found)) => *seen = found,
            (Action::Put(value) | Action::Cas(_, value), Told::Written(version)) => {
                *seen = Some((value, version));
            }
            (_, Told::Deleted(_) | Told::Absent) => *seen = None,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_back_and_others_are_not() {
        for value in [1, 1_000_001, 42] {
            assert_eq!(read_value(&value_bytes(value)), Some(value));
        }
        for other in ["", "v", "v1..........", "w1", "v01"] {
            assert_eq!(read_value(other.as_bytes()), None, "{other}");
        }
    }
}
