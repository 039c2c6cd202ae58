//! How the metadata machine keeps its records.
//!
//! | key | value |
//! |---|---|
//! | `c` | the cluster's identity and the counters: see [`Counters`] |
//! | `n` + NodeId | a node |
//! | `d` + DatabaseId | a database, dropped ones too |
//! | `i` + name | the DatabaseId of the living database of that name |
//! | `s` + ShardId | a shard |
//! | `p` | what operators have set; none: [`PolicyRecord::default`] |
//! | `r` | the last rebalancing; none: there never was one |
//!
//! Ids are 8 bytes, big-endian, so that keys are in order of ids. Each value is a stored value
//! ([`super::super::value`]) whose revision is the map version of its last change and whose bytes are a
//! Cap'n Proto message of schema/types.capnp, or, for `c` and `i`, numbers of 8 bytes, big-endian.

use std::ops::Bound;

use bytes::Bytes;
use capnp::message::{Builder, HeapAllocator};
use capnp::serialize;

use super::super::value;
use crate::codec::meta::{MessageReader, read_message};
use crate::codec::{CodecError, records};
use crate::ids::{ClusterId, RandomId};
use crate::placement::map::{DatabaseRecord, NodeRecord, PolicyRecord, RebalanceRecord, ShardRecord};
use crate::storage::{StateBatch, StateView, StorageError};

const COUNTERS_KEY: &[u8] = b"c";
const NAME_TABLE: u8 = b'i';

/// The cluster's identity and the next id of each kind. There is none until the cluster is formed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Counters {
    pub cluster_id: ClusterId,
    pub next_node: u64,
    pub next_database: u64,
    pub next_shard: u64,
    pub next_replica: u64,
}

/// So many ids of each kind are passed over when the metadata shard goes on with less than it had: more than any
/// cluster can have given out since. Part of the format.
const IDS_PASSED_OVER: u64 = 1 << 32;

impl Counters {
    /// These, behind all ids that can have been given out by one who knew more.
    pub(super) fn behind_all_given_out(self) -> Counters {
        let behind = |next: u64| next.saturating_add(IDS_PASSED_OVER);
        Counters {
            cluster_id: self.cluster_id,
            next_node: behind(self.next_node),
            next_database: behind(self.next_database),
            next_shard: behind(self.next_shard),
            next_replica: behind(self.next_replica),
        }
    }
}

/// What is kept as a message.
pub(super) trait Stored: Sized {
    /// What it is, for messages.
    const NAME: &'static str;

    fn changed_at(&self) -> u64;
    fn write(&self, message: &mut Builder<HeapAllocator>);
    fn read(message: &MessageReader<'_>) -> Result<Self, CodecError>;

    /// The value under its key.
    fn encode(&self) -> Bytes {
        let mut message = Builder::new_default();
        self.write(&mut message);
        value::encode(self.changed_at(), &serialize::write_message_to_words(&message))
    }
}

/// A record with a table of its own.
pub(super) trait Record: Stored {
    /// First byte of its keys.
    const TABLE: u8;

    fn id(&self) -> u64;
}

/// A record of which there is one. Its default stands for it until it is first stored: what it says is part of
/// the format, as far as applying a command looks at it.
pub(super) trait Single: Stored + Default {
    /// Its key.
    const KEY: &'static [u8];
}

macro_rules! stored {
    ($type:ty, $name:literal, $write:ident, $read:ident) => {
        impl Stored for $type {
            const NAME: &'static str = $name;

            fn changed_at(&self) -> u64 {
                self.changed_at
            }

            fn write(&self, message: &mut Builder<HeapAllocator>) {
                records::$write(self, message.init_root());
            }

            fn read(message: &MessageReader<'_>) -> Result<Self, CodecError> {
                records::$read(message.get_root()?)
            }
        }
    };
}

macro_rules! record {
    ($type:ty, $table:literal, $name:literal, $write:ident, $read:ident) => {
        stored!($type, $name, $write, $read);
        impl Record for $type {
            const TABLE: u8 = $table;

            fn id(&self) -> u64 {
                self.id.0
            }
        }
    };
}

macro_rules! single {
    ($type:ty, $key:literal, $name:literal, $write:ident, $read:ident) => {
        stored!($type, $name, $write, $read);
        impl Single for $type {
            const KEY: &'static [u8] = $key;
        }
    };
}

record!(NodeRecord, b'n', "node", write_node, read_node);
record!(DatabaseRecord, b'd', "database", write_database, read_database);
record!(ShardRecord, b's', "shard", write_shard, read_shard);
single!(PolicyRecord, b"p", "the policy", write_policy, read_policy);
single!(RebalanceRecord, b"r", "the last rebalancing", write_rebalance, read_rebalance);

/// The one record of that kind.
pub(super) fn load_single<S: Single>(state: &dyn StateView) -> Result<S, StorageError> {
    let Some(stored) = state.get(S::KEY)? else {
        return Ok(S::default());
    };
    let bytes = value::decode(&stored).map_err(|e| damaged(S::NAME, e))?.value;
    read_message(S::NAME, &bytes, S::read).map_err(|e| damaged(S::NAME, e))
}

/// Stores the one record of that kind.
pub(super) fn save_single<S: Single>(record: &S, state: &mut dyn StateBatch) {
    state.put(S::KEY, record.encode());
}

/// The record of that id.
pub(super) fn load<R: Record>(state: &dyn StateView, id: u64) -> Result<Option<R>, StorageError> {
    let stored = state.get(&key::<R>(id))?;
    stored.map(|stored| decode(id, &stored)).transpose()
}

/// Stores a record under its id.
pub(super) fn save<R: Record>(record: &R, state: &mut dyn StateBatch) {
    state.put(&key::<R>(record.id()), record.encode());
}

/// All records of a kind, by id.
pub(super) fn all<R: Record>(state: &dyn StateView) -> Result<Vec<R>, StorageError> {
    changed(0, state)
}

/// The records of a kind that changed after map version `since`, by id. Costs a look at each that there is, but
/// only those that changed are read.
pub(super) fn changed<R: Record>(since: u64, state: &dyn StateView) -> Result<Vec<R>, StorageError> {
    let mut found = Ok(Vec::new());
    state.scan(Bound::Included(&[R::TABLE]), &mut |key, stored| {
        let Some(id) = key.strip_prefix(&[R::TABLE]) else {
            return false;
        };
        if since > 0 && value::header(stored).is_ok_and(|(changed_at, _)| changed_at <= since) {
            return true;
        }
        let record = match id.try_into().map(u64::from_be_bytes) {
            Ok(id) => decode::<R>(id, stored),
            Err(_) => Err(damaged(R::NAME, "its key has no id of 8 bytes")),
        };
        match (&mut found, record) {
            (Ok(records), Ok(record)) => records.push(record),
            (_, Err(error)) => found = Err(error),
            (Err(_), Ok(_)) => {}
        }
        found.is_ok()
    })?;
    found
}

/// The counters; `None` while the cluster isn't formed.
pub(super) fn load_counters(state: &dyn StateView) -> Result<Option<Counters>, StorageError> {
    const WHAT: &str = "the counters";
    let Some(stored) = state.get(COUNTERS_KEY)? else {
        return Ok(None);
    };
    let bytes = value::decode(&stored).map_err(|e| damaged(WHAT, e))?.value;
    let Some((id, numbers)) = bytes.split_first_chunk::<16>() else {
        return Err(damaged(WHAT, "they end early"));
    };
    match numbers.as_chunks::<8>() {
        ([node, database, shard, replica], []) => Ok(Some(Counters {
            cluster_id: RandomId(*id),
            next_node: u64::from_be_bytes(*node),
            next_database: u64::from_be_bytes(*database),
            next_shard: u64::from_be_bytes(*shard),
            next_replica: u64::from_be_bytes(*replica),
        })),
        _ => Err(damaged(WHAT, format!("{} bytes", bytes.len()))),
    }
}

/// Stores the counters as of map version `version`.
pub(super) fn save_counters(counters: &Counters, version: u64, state: &mut dyn StateBatch) {
    let mut bytes = counters.cluster_id.0.to_vec();
    for number in [counters.next_node, counters.next_database, counters.next_shard, counters.next_replica] {
        bytes.extend(number.to_be_bytes());
    }
    state.put(COUNTERS_KEY, value::encode(version, &bytes));
}

/// The living database of that name.
pub(super) fn load_by_name(
    state: &dyn StateView,
    name: &str,
) -> Result<Option<DatabaseRecord>, StorageError> {
    const WHAT: &str = "the index of database names";
    let Some(stored) = state.get(&name_key(name))? else {
        return Ok(None);
    };
    let bytes = value::decode(&stored).map_err(|e| damaged(WHAT, e))?.value;
    let Ok(id) = bytes.as_ref().try_into().map(u64::from_be_bytes) else {
        return Err(damaged(WHAT, format!("{} bytes", bytes.len())));
    };
    match load(state, id)? {
        Some(record) => Ok(Some(record)),
        None => Err(damaged(WHAT, format!("it names database {id}, which is missing"))),
    }
}

/// Makes `record` the living database of its name.
pub(super) fn save_name(record: &DatabaseRecord, state: &mut dyn StateBatch) {
    let id = record.id.0.to_be_bytes();
    state.put(&name_key(&record.name), value::encode(record.changed_at, &id));
}

/// Frees a name.
pub(super) fn free_name(name: &str, state: &mut dyn StateBatch) {
    state.delete(&name_key(name));
}

/// What is wrong with the metadata state.
pub(super) fn damaged(what: &str, detail: impl ToString) -> StorageError {
    StorageError::Damaged { what: format!("the metadata state: {what}"), detail: detail.to_string() }
}

fn key<R: Record>(id: u64) -> [u8; 9] {
    let mut key = [R::TABLE; 9];
    key[1..].copy_from_slice(&id.to_be_bytes());
    key
}

fn name_key(name: &str) -> Vec<u8> {
    [&[NAME_TABLE], name.as_bytes()].concat()
}

fn decode<R: Record>(id: u64, stored: &Bytes) -> Result<R, StorageError> {
    let what = || format!("{} {id}", R::NAME);
    let bytes = value::decode(stored).map_err(|e| damaged(&what(), e))?.value;
    let record = read_message(R::NAME, &bytes, R::read).map_err(|e| damaged(&what(), e))?;
    if record.id() != id {
        let detail = format!("its record says {}", record.id());
        return Err(damaged(&what(), detail));
    }
    Ok(record)
}
