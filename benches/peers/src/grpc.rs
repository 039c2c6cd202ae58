//! Unary calls of gRPC over HTTP/2: as much of it as etcd's clients need, and no more, so that making a call costs
//! little of a machine that the servers share.

use std::cell::RefCell;
use std::fmt::Display;

use bytes::{BufMut, Bytes, BytesMut};
use h2::client::SendRequest;
use http::{HeaderMap, Method, Request};
use prost::Message;
use tokio::net::TcpStream;

/// Room for what a server sends before we have read it. More than a closed loop of small values ever has on the way.
const WINDOW_BYTES: u32 = 8 << 20;

/// Flag and length before a message.
const PREFIX_BYTES: usize = 5;

/// A connection to one server, made when it is first needed, and anew after it has failed. Calls share it.
pub struct Connection {
    address: String,
    send: RefCell<Option<SendRequest<Bytes>>>,
}

impl Connection {
    /// A connection to HOST:PORT that nobody has needed yet.
    pub fn new(address: String) -> Connection {
        Connection { address, send: RefCell::new(None) }
    }

    /// Calls `method`, as in `/package.Service/Method`. An error may mean that it took effect all the same.
    pub async fn call<A: Message, B: Message + Default>(
        &self,
        method: &str,
        request: &A,
    ) -> Result<B, String> {
        let answer = self.exchange(method, request).await;
        if let Err(Failure::Broken(_)) = &answer {
            self.send.take();
        }
        answer.map_err(|failure| match failure {
            Failure::Broken(why) | Failure::Refused(why) => format!("{}: {why}", self.address),
        })
    }

    async fn exchange<A: Message, B: Message + Default>(
        &self,
        method: &str,
        request: &A,
    ) -> Result<B, Failure> {
        let head = Request::builder()
            .method(Method::POST)
            .uri(format!("http://{}{method}", self.address))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(());
        let mut send = self.sender().await?.ready().await.map_err(broken)?;
        let (answer, mut stream) = send.send_request(head.map_err(broken)?, false).map_err(broken)?;
        stream.send_data(framed(request), true).map_err(broken)?;
        let (head, mut body) = answer.await.map_err(broken)?.into_parts();
        let mut bytes = BytesMut::new();
        while let Some(part) = body.data().await {
            let part = part.map_err(broken)?;
            body.flow_control().release_capacity(part.len()).map_err(broken)?;
            bytes.extend_from_slice(&part);
        }
        // Where nothing but an error is told, it stands in the head.
        let trailers = body.trailers().await.map_err(broken)?;
        check(trailers.as_ref().unwrap_or(&head.headers))?;
        let message = bytes.get(PREFIX_BYTES..).ok_or_else(|| broken("an answer without a message"))?;
        B::decode(message).map_err(broken)
    }

    async fn sender(&self) -> Result<SendRequest<Bytes>, Failure> {
        // Callers that come together make a connection each, and all but the last are left when they are done.
        if let Some(send) = self.send.borrow().clone() {
            return Ok(send);
        }
        let socket = TcpStream::connect(&self.address).await.map_err(broken)?;
        socket.set_nodelay(true).map_err(broken)?;
        let handshake = h2::client::Builder::new()
            .initial_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .enable_push(false)
            .handshake(socket);
        let (send, connection) = handshake.await.map_err(broken)?;
        tokio::task::spawn_local(async move {
            // Its calls fail with the same error, which is told there.
            connection.await.ok();
        });
        self.send.replace(Some(send.clone()));
        Ok(send)
    }
}

/// Why a call has no answer.
enum Failure {
    /// The connection can't be used any more.
    Broken(String),
    /// The server says no.
    Refused(String),
}

fn broken(error: impl Display) -> Failure {
    Failure::Broken(error.to_string())
}

/// A message behind its flag, which says that it isn't compressed, and its length.
fn framed(message: &impl Message) -> Bytes {
    let length = message.encoded_len();
    let mut bytes = BytesMut::with_capacity(PREFIX_BYTES + length);
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(length).expect("requests are small"));
    message.encode(&mut bytes).expect("it grows as needed");
    bytes.freeze()
}

fn check(headers: &HeaderMap) -> Result<(), Failure> {
    let text = |name: &str| headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()));
    match text("grpc-status") {
        Some(status) if status == "0" => Ok(()),
        Some(status) => {
            Err(Failure::Refused(format!("status {status}: {}", text("grpc-message").unwrap_or_default())))
        }
        None => Err(broken("an answer without a status")),
    }
}
