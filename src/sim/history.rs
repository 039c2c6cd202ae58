//! What clients asked and were told, in real-time order.

use crate::ids::{SessionId, ShardId};

/// A key of the workload: the n-th of its shard.
pub type Key = u8;

/// A value of the workload. No two writes have the same one.
pub type Value = u64;

/// A value and its version.
pub type Found = Option<(Value, u64)>;

/// The condition of a compare-and-set.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Condition {
    /// The key must be absent.
    Absent,
    /// It must have this value.
    Value(Value),
    /// It must have this version.
    Version(u64),
}

/// What was asked.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Action {
    /// A linearizable read.
    Get,
    /// A write.
    Put(Value),
    /// A removal.
    Delete,
    /// A conditional write.
    Cas(Condition, Value),
}

/// What the client was told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Told {
    /// Nothing, or that the outcome is unknown: it may take effect at any time after its start.
    Unknown,
    /// That it certainly had no effect.
    Refused,
    /// Get: this was there.
    Found(Found),
    /// Put, cas: written with this version.
    Written(u64),
    /// Delete: removed with this version.
    Deleted(u64),
    /// Delete: nothing was there.
    Absent,
    /// Cas: this was there instead.
    Mismatch(Found),
}

impl Told {
    /// The version that the operation itself made.
    pub fn version(self) -> Option<u64> {
        match self {
            Told::Written(version) | Told::Deleted(version) => Some(version),
            _ => None,
        }
    }
}

/// One operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Call {
    /// Who asked.
    pub client: usize,
    /// Of which shard.
    pub shard: ShardId,
    /// About which key.
    pub key: Key,
    /// What.
    pub action: Action,
    /// Session and sequence under which it was sent last, if it was.
    pub tag: Option<(SessionId, u64)>,
    /// Place of its start in the order of all starts and ends.
    pub invoked: u64,
    /// Place of its end; `u64::MAX` if it never ended.
    pub returned: u64,
    /// What came of it.
    pub told: Told,
}

/// See the module page.
#[derive(Default)]
pub struct History {
    /// In order of their starts.
    pub calls: Vec<Call>,
    next: u64,
}

impl History {
    /// An operation starts. Returns its number.
    pub fn invoke(&mut self, client: usize, shard: ShardId, key: Key, action: Action) -> usize {
        let invoked = self.place();
        let told = Told::Unknown;
        let (tag, returned) = (None, u64::MAX);
        self.calls.push(Call { client, shard, key, action, tag, invoked, returned, told });
        self.calls.len() - 1
    }

    /// An operation ends. One whose outcome is unknown never ends.
    pub fn end(&mut self, number: usize, told: Told) {
        let returned = self.place();
        let call = &mut self.calls[number];
        call.told = told;
        if told != Told::Unknown {
            call.returned = returned;
        }
    }

    fn place(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}
