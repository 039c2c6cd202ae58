//! Requests made by hand, as a client in another language would make them.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use capnp_rpc::rpc_twoparty_capnp::Side;
use capnp_rpc::{RpcSystem, twoparty};
use futures_util::io::AsyncRead;
use pontoon::client::Client;
use pontoon::codec::refusal::read_refusal;
use pontoon::refusal::Refusal;
use pontoon::schema::kv_capnp::{batch_request, batch_response, gate, kv, op_result};
use pontoon::transport::rpc_stream::{RpcReader, reader_options, rpc_streams};
use tokio::net::TcpStream;
use tokio::task::spawn_local;

/// What a batch says of its session.
#[derive(Clone, Copy, Debug, Default)]
pub struct Session<'a> {
    pub id: &'a [u8],
    pub open_ttl_ms: u32,
    pub acked_below: u64,
}

/// One operation on the key `k`.
#[derive(Clone, Copy, Debug)]
pub enum What<'a> {
    Get,
    Put(&'a str),
    Delete,
    /// Only where there is no such key.
    Create(&'a str),
}

/// The end of one operation: a version, 0 where there is none.
pub type End = Result<u64, Refusal>;

/// Connections to all nodes, and the one shard of a database. Needs a `LocalSet`.
pub struct Wire {
    addresses: Vec<String>,
    shard: u64,
    range_version: u64,
    connections: HashMap<String, kv::Client>,
}

/// A connection to the node at `address`; needs a `LocalSet`.
pub async fn dial(address: &str) -> Option<kv::Client> {
    let stream = TcpStream::connect(address).await.ok()?;
    greet(stream, |reader| reader).await
}

/// Opens the data service on a connection whose reading side is wrapped.
pub async fn greet<R: AsyncRead + Unpin + 'static>(
    stream: TcpStream,
    wrap: impl FnOnce(RpcReader) -> R,
) -> Option<kv::Client> {
    let (reader, writer, flusher) = rpc_streams(stream).ok()?;
    let network = twoparty::VatNetwork::new(wrap(reader), writer, Side::Client, reader_options());
    let mut system = RpcSystem::new(Box::new(network), None);
    let gate: gate::Client = system.bootstrap(Side::Server);
    spawn_local(system);
    spawn_local(flusher);
    let mut request = gate.open_request();
    let mut range = request.get().init_hello().init_protocol();
    range.set_min(2);
    range.set_max(2);
    let response = request.send().promise.await.ok()?;
    response.get().ok()?.get_kv().ok()
}

impl Wire {
    /// For `database`, which has one shard.
    pub async fn new(client: &Client, database: &str) -> Wire {
        let map = client.map().await.expect("the map");
        let shard = map.database(database).and_then(|d| map.shards.get(&d.shards[0])).expect("its shard");
        Wire {
            addresses: map.nodes.values().map(|node| node.client_address.clone()).collect(),
            shard: shard.id.0,
            range_version: shard.epoch.range,
            connections: HashMap::new(),
        }
    }

    /// A connection to the node that leads now, found by a read.
    pub async fn leader(&mut self) -> kv::Client {
        let begun = Instant::now();
        loop {
            for address in self.addresses.clone() {
                if !self.connections.contains_key(&address) {
                    let Some(kv) = dial(&address).await else { continue };
                    self.connections.insert(address.clone(), kv);
                }
                let kv = self.connections[&address].clone();
                match self.send(&kv, Session::default(), &[(0, What::Get)]).await {
                    Ok(ends) if ends[0].is_ok() => return kv,
                    Ok(_) => (),
                    // Its connection is broken.
                    Err(_) => drop(self.connections.remove(&address)),
                }
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "nobody leads");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Sends a batch to a node. The error: there was no answer.
    pub async fn send(
        &self,
        kv: &kv::Client,
        session: Session<'_>,
        operations: &[(u64, What<'_>)],
    ) -> Result<Vec<End>, capnp::Error> {
        let mut call = kv.batch_request();
        let mut request = call.get().init_request();
        self.write(session, operations, request.reborrow());
        let answer = call.send().promise.await?;
        let response = answer.get()?.get_response()?;
        Ok(match response.which()? {
            batch_response::Error(error) => vec![Err(read_refusal(error?)); operations.len()],
            batch_response::Results(results) => {
                results?.iter().map(read).collect::<Result<_, capnp::Error>>()?
            }
        })
    }

    fn write(
        &self,
        session: Session<'_>,
        operations: &[(u64, What<'_>)],
        mut request: batch_request::Builder<'_>,
    ) {
        request.set_shard(self.shard);
        request.set_range_version(self.range_version);
        request.set_session(session.id);
        request.set_open_ttl_ms(session.open_ttl_ms);
        request.set_acked_below(session.acked_below);
        let mut list = request.init_operations(operations.len() as u32);
        for (at, (sequence, what)) in operations.iter().enumerate() {
            let mut operation = list.reborrow().get(at as u32);
            operation.set_key(b"k");
            operation.set_sequence(*sequence);
            match what {
                What::Get => operation.set_get(()),
                What::Put(value) => operation.set_put(value.as_bytes()),
                What::Delete => operation.set_delete(()),
                What::Create(value) => {
                    let mut cas = operation.init_cas();
                    cas.set_value(value.as_bytes());
                    cas.init_expect().set_absent(());
                }
            }
        }
    }

    /// One operation to whoever leads.
    pub async fn one(&mut self, session: Session<'_>, sequence: u64, what: What<'_>) -> End {
        let kv = self.leader().await;
        let ends = self.send(&kv, session, &[(sequence, what)]).await;
        ends.expect("an answer").remove(0)
    }
}

fn read(from: op_result::Reader<'_>) -> Result<End, capnp::Error> {
    Ok(match from.which()? {
        op_result::Error(error) => Err(read_refusal(error?)),
        op_result::Written(version) | op_result::Deleted(version) => Ok(version),
        op_result::Value(found) => Ok(found.get_version()),
        op_result::Mismatch(there) => Ok(there.get_version()),
        op_result::Absent(()) => Ok(0),
    })
}
