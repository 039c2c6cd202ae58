//! The composition root and the actors of one node.

pub mod handle;
pub mod log_writer;

use std::net::TcpListener;
use std::time::Duration;

use crate::settings::Settings;
use crate::storage::StorageError;
use handle::NodeHandle;

/// The ports of a node, bound by the caller, so that an address in use is found before anything is
/// created, and a port 0 is known before it is advertised.
pub struct Listeners {
    /// For clients.
    pub client: TcpListener,
    /// For other nodes.
    pub peer: TcpListener,
    /// For health and metrics.
    pub http: Option<TcpListener>,
}

/// Why a node doesn't start or can't go on.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// Its data directory or a store in it.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// It can't become a member of the cluster.
    #[error("{0}")]
    Membership(String),
    /// A thread of the node failed; its process must end (exit 70).
    #[error("{0}")]
    Fatal(String),
}

/// A node that runs on threads of its own. Dropping it does not stop it; call [`RunningNode::stop`].
pub struct RunningNode {
    handle: NodeHandle,
}

/// Starts a node: opens its directory, binds its threads, and begins to form or join. Must be called
/// within an `actix::System`; several nodes may share one. Returns once the stores are open.
pub async fn start(settings: Settings, listeners: Listeners) -> Result<RunningNode, NodeError> {
    let _ = (settings, listeners);
    Err(NodeError::Fatal("not built yet".into()))
}

impl RunningNode {
    /// The node as services see it.
    pub fn handle(&self) -> NodeHandle {
        self.handle.clone()
    }

    /// Waits until the node is a member and every replica it held before is serving.
    pub async fn ready(&self) -> Result<(), NodeError> {
        Ok(())
    }

    /// Waits until the node fails for good. Never returns while it runs.
    pub async fn failed(&self) -> NodeError {
        NodeError::Fatal(String::new())
    }

    /// Stops cleanly: accepts nothing more, hands leadership over, finishes or refuses what is in
    /// flight, closes the stores; within `deadline`, whatever the rest of the cluster does.
    pub async fn stop(self, deadline: Duration) -> Result<(), NodeError> {
        let _ = deadline;
        Ok(())
    }
}
