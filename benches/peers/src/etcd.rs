//! etcd's key-value service.

use std::cell::Cell;
use std::rc::Rc;

use bytes::Bytes;
use prost::Message;

use crate::grpc::Connection;
use crate::options::{Call, Common};

/// Operations that etcd takes in one transaction, by default, and bytes that surely fit into a request.
const BATCH_MAX: usize = 128;
const BATCH_BYTES_MAX: usize = 1 << 20;

const STATUS: &str = "/etcdserverpb.Maintenance/Status";

// Fields that nobody needs here are left out; their numbers are etcd's (`rpc.proto`, `kv.proto`).

#[derive(Clone, PartialEq, Message)]
struct PutRequest {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

/// Linearizable, since it isn't said to be `serializable`.
#[derive(Clone, PartialEq, Message)]
struct RangeRequest {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct KeyValue {
    #[prost(bytes = "bytes", tag = "5")]
    value: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct RangeResponse {
    #[prost(message, repeated, tag = "2")]
    kvs: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct RequestOp {
    #[prost(message, optional, tag = "2")]
    put: Option<PutRequest>,
}

#[derive(Clone, PartialEq, Message)]
struct TxnRequest {
    #[prost(message, repeated, tag = "2")]
    success: Vec<RequestOp>,
}

#[derive(Clone, PartialEq, Message)]
struct ResponseHeader {
    #[prost(uint64, tag = "2")]
    member: u64,
}

#[derive(Clone, PartialEq, Message)]
struct StatusResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<ResponseHeader>,
    #[prost(uint64, tag = "4")]
    leader: u64,
}

/// An answer, or a request, of which nothing matters.
#[derive(Clone, PartialEq, Message)]
struct Empty {}

/// A cluster of etcd, and connections to it.
pub struct Etcd {
    addresses: Vec<String>,
    share: usize,
    call: Call,
}

/// One client. It has its own place, and shares its connections.
pub struct Session {
    /// One to each server.
    connections: Rc<Vec<Connection>>,
    /// The server that is called.
    at: Cell<usize>,
}

impl Etcd {
    /// A cluster of these servers.
    pub fn new(addresses: Vec<String>, common: &Common) -> Etcd {
        Etcd { addresses, share: common.etcd_share as usize, call: common.etcd_call }
    }

    /// `count` clients, with as many connections as are said to be best.
    pub async fn sessions(&self, count: usize) -> Result<Vec<Session>, String> {
        let first = self.leader().await?;
        let mut sessions: Vec<Session> = Vec::new();
        for number in 0..count {
            let at = match self.call {
                Call::Leader => first,
                Call::All => (number / self.share) % self.addresses.len(),
            };
            let connections = match sessions.last() {
                Some(last) if number % self.share != 0 => last.connections.clone(),
                _ => {
                    let connections = Rc::new(self.connections());
                    // Made now, rather than by all who share it at the same time.
                    connections[at].call::<_, Empty>(STATUS, &Empty {}).await?;
                    connections
                }
            };
            sessions.push(Session { connections, at: Cell::new(at) });
        }
        Ok(sessions)
    }

    /// Which server leads.
    pub async fn leader(&self) -> Result<usize, String> {
        let mut last = "no server".to_owned();
        for (at, connection) in self.connections().iter().enumerate() {
            match connection.call::<_, StatusResponse>(STATUS, &Empty {}).await {
                Ok(status) if status.header.as_ref().is_some_and(|h| h.member == status.leader) => {
                    return Ok(at);
                }
                Ok(_) => last = "none of those that answer leads".to_owned(),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn connections(&self) -> Vec<Connection> {
        self.addresses.iter().cloned().map(Connection::new).collect()
    }
}

impl Session {
    /// Sets a key's value.
    pub async fn put(&self, key: Bytes, value: Bytes) -> Result<(), String> {
        let request = PutRequest { key, value };
        self.connection().call::<_, Empty>("/etcdserverpb.KV/Put", &request).await.map(drop)
    }

    /// Reads a key; the length of its value, where there is one.
    pub async fn get(&self, key: Bytes) -> Result<Option<usize>, String> {
        let request = RangeRequest { key };
        let found: RangeResponse = self.connection().call("/etcdserverpb.KV/Range", &request).await?;
        Ok(found.kvs.first().map(|pair| pair.value.len()))
    }

    /// Sets many keys.
    pub async fn put_all(&self, pairs: Vec<(Bytes, Bytes)>) -> Result<(), String> {
        let pair_bytes = pairs.iter().map(|(key, value)| key.len() + value.len()).max().unwrap_or(1);
        for pairs in pairs.chunks((BATCH_BYTES_MAX / pair_bytes).clamp(1, BATCH_MAX)) {
            let puts = pairs.iter().map(|(key, value)| PutRequest { key: key.clone(), value: value.clone() });
            let request = TxnRequest { success: puts.map(|put| RequestOp { put: Some(put) }).collect() };
            self.connection().call::<_, Empty>("/etcdserverpb.KV/Txn", &request).await?;
        }
        Ok(())
    }

    /// Goes on to the next server.
    pub fn turn(&self) {
        self.at.set((self.at.get() + 1) % self.connections.len());
    }

    fn connection(&self) -> &Connection {
        &self.connections[self.at.get()]
    }
}
