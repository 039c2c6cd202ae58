//! The end of a node that can't go on: the first reason wins, and whoever runs the node hears of it.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use tokio::sync::watch;

/// Tells that the node can't go on. Cheap to clone, callable from any thread.
#[derive(Clone)]
pub struct Fatal(Arc<watch::Sender<Option<String>>>);

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
        self.0.send_if_modified(|first| {
            let is_first = first.is_none();
            if is_first {
                tracing::error!(reason, "the node can't go on");
                *first = Some(reason);
            }
            is_first
        });
    }

    /// The first reason, if there is one.
    pub fn reason(&self) -> Option<String> {
        self.0.borrow().clone()
    }

    /// Waits for the first reason.
    pub async fn raised(&self) -> String {
        let mut receiver = self.0.subscribe();
        match receiver.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => "the node is gone".into(),
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
