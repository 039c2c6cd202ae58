//! What tells the supervisor that a replica has ended, also when it did so by a panic.

use std::rc::Rc;

use actix::prelude::*;

use crate::ids::{Incarnation, Index, ReplicaId};
use crate::node::messages::ReplicaDown;
use crate::node::supervisor::Supervisor;

/// Tells the supervisor of a replica's end, whatever the way.
pub(super) struct Guard {
    replica: ReplicaId,
    incarnation: Incarnation,
    /// Whom it tells; the replica itself has more to tell.
    pub(super) supervisor: Rc<Addr<Supervisor>>,
    pub(super) reason: Option<String>,
    /// The entry that was being applied.
    pub(super) applying: Option<Index>,
    /// It was told to end, so nobody need be told.
    pub(super) ordered: bool,
}

impl Guard {
    pub(super) fn new(
        replica: ReplicaId,
        incarnation: Incarnation,
        supervisor: Rc<Addr<Supervisor>>,
    ) -> Guard {
        Guard { replica, incarnation, supervisor, reason: None, applying: None, ordered: false }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.ordered {
            return;
        }
        let reason = match self.reason.take() {
            Some(reason) => reason,
            None if std::thread::panicking() => {
                crate::node::panics::last().unwrap_or_else(|| "panicked".into())
            }
            None => "its thread ended".into(),
        };
        // Never full by bound: a replica ends once per incarnation. If the supervisor is gone, so is
        // the node.
        self.supervisor.do_send(ReplicaDown {
            replica: self.replica,
            incarnation: self.incarnation,
            reason,
            applying: self.applying,
        });
    }
}
