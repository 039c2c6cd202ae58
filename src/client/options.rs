//! Options of a client.

use std::time::Duration;

/// How a client behaves.
#[derive(Clone, Debug, PartialEq)]
pub struct ClientOptions {
    /// HOST:PORT of client ports to start from; any of them may be down.
    pub addresses: Vec<String>,
    /// Deadline of an operation; within it everything retryable is retried.
    pub timeout: Duration,
    /// Operations in flight, above which further ones wait.
    pub in_flight_max: usize,
}

impl ClientOptions {
    /// The defaults with these addresses.
    pub fn new<A: Into<String>>(addresses: impl IntoIterator<Item = A>) -> ClientOptions {
        ClientOptions {
            addresses: addresses.into_iter().map(Into::into).collect(),
            timeout: Duration::from_millis(crate::limits::TIMEOUT_DEFAULT_MS),
            in_flight_max: 16 * 1024,
        }
    }
}
