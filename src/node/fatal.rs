//! The end of a node that can't or mustn't go on: the first reason wins, and whoever runs the node hears of it.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use tokio::sync::watch;

use super::NodeError;
use super::stall::Stalled;

/// Tells that the node can't go on. Cheap to clone, callable from any thread.
#[derive(Clone)]
pub struct Fatal(Arc<watch::Sender<Option<End>>>);

/// Why a node ends by itself.
#[derive(Clone, PartialEq, Eq, Debug)]
enum End {
    /// Something that all of it depends on has failed.
    Failed(String),
    /// Its state store hangs.
    Stalled(Stalled),
    /// It isn't to be a member of its cluster, or can't become one.
    NoMember(String),
    /// It was removed from its cluster.
    Removed(String),
}

impl End {
    fn reason(&self) -> String {
        match self {
            End::Failed(reason) | End::NoMember(reason) | End::Removed(reason) => reason.clone(),
            End::Stalled(stalled) => stalled.to_string(),
        }
    }
}

/// Owned by what the whole node depends on: its end by a panic is the node's.
pub struct FatalGuard {
    fatal: Fatal,
    what: &'static str,
}

impl Fatal {
    /// Nothing has happened yet.
    pub fn new() -> Fatal {
        Fatal(Arc::new(watch::Sender::new(None)))
    }

    /// The node can't go on because of `reason`.
    pub fn raise(&self, reason: String) {
        self.end(End::Failed(reason));
    }

    /// The node doesn't go on because of `error`.
    pub fn raise_error(&self, error: NodeError) {
        self.end(match error {
            NodeError::Membership(reason) => End::NoMember(reason),
            NodeError::Removed(reason) => End::Removed(reason),
            NodeError::Stalled(stalled) => End::Stalled(stalled),
            NodeError::Storage(_) | NodeError::Fatal(_) => End::Failed(error.to_string()),
        });
    }

    /// The node can't go on since its state store hangs.
    pub fn raise_stalled(&self, stalled: Stalled) {
        self.end(End::Stalled(stalled));
    }

    fn end(&self, end: End) {
        self.0.send_if_modified(|first| {
            let is_first = first.is_none();
            if is_first {
                tracing::error!(reason = end.reason(), "the node can't go on");
                *first = Some(end);
            }
            is_first
        });
    }

    /// The first reason, if there is one.
    pub fn reason(&self) -> Option<String> {
        self.0.borrow().as_ref().map(End::reason)
    }

    /// Waits for the first reason.
    pub async fn raised(&self) -> NodeError {
        let mut receiver = self.0.subscribe();
        let end = receiver.wait_for(Option::is_some).await;
        match end.ok().and_then(|end| end.clone()) {
            Some(End::NoMember(reason)) => NodeError::Membership(reason),
            Some(End::Removed(reason)) => NodeError::Removed(reason),
            Some(End::Stalled(stalled)) => NodeError::Stalled(stalled),
            Some(End::Failed(reason)) => NodeError::Fatal(reason),
            None => NodeError::Fatal("the node is gone".into()),
        }
    }

    /// Starts a thread that the whole node depends on: if it panics, the node can't go on.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub fn thread(
        &self,
        name: &str,
        what: &'static str,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let guard = self.guard(what);
        std::thread::Builder::new().name(name.into()).spawn(move || {
            let _guard = guard;
            body();
        })
    }

    /// A guard for `what`.
    pub fn guard(&self, what: &'static str) -> FatalGuard {
        FatalGuard { fatal: self.clone(), what }
    }
}

impl Default for Fatal {
    fn default() -> Self {
        Fatal::new()
    }
}

impl Drop for FatalGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let reason = super::panics::last().unwrap_or_default();
            self.fatal.raise(format!("{} panicked: {reason}", self.what));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_panics_is_the_end_of_the_node_and_one_that_ends_is_not() {
        super::super::panics::install();
        let fatal = Fatal::new();
        fatal.thread("ends", "the first thread", || {}).unwrap().join().unwrap();
        assert_eq!(fatal.reason(), None);
        assert!(fatal.thread("panics", "the second thread", || panic!("boom")).unwrap().join().is_err());
        let reason = fatal.reason().expect("a reason");
        assert!(reason.starts_with("the second thread panicked: boom"), "{reason}");
        fatal.raise("later".into());
        assert_eq!(fatal.reason(), Some(reason), "the first reason stays");
    }
}
