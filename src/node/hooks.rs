//! Test hooks of a node's actors and threads. A plain build has none of this.

use std::collections::HashMap;
use std::time::Duration;

use actix::prelude::*;

use super::supervisor::Supervisor;
use crate::failpoints::{Point, at};
use crate::ids::ReplicaId;
use crate::storage::flush::{FlushPoint, Flusher};

/// What is to go wrong.
#[derive(Default)]
pub(super) struct Hooks {
    /// Attempts to open a replica that are still to fail.
    failing: HashMap<ReplicaId, u32>,
}

impl Hooks {
    /// Asked at each attempt to open a replica.
    pub fn open(&mut self, replica: ReplicaId) -> Result<(), String> {
        match self.failing.get_mut(&replica) {
            Some(left) if *left > 0 => {
                *left -= 1;
                Err("injected failure to open".into())
            }
            _ => Ok(()),
        }
    }
}

/// Replica → supervisor: the next attempts to open it fail.
#[derive(Message)]
#[rtype(result = "()")]
pub(super) struct FailOpens {
    /// Which.
    pub replica: ReplicaId,
    /// How many.
    pub times: u32,
}

impl Handler<FailOpens> for Supervisor {
    type Result = ();
    fn handle(&mut self, fail: FailOpens, _: &mut Context<Self>) {
        self.hooks.failing.insert(fail.replica, fail.times);
    }
}

/// For how long the state store may hang, where a test wants it shorter.
pub(super) fn stall_patience() -> Option<Duration> {
    let ms = std::env::var("PONTOON_TEST_STALL_MS").ok()?;
    Some(Duration::from_millis(ms.parse().ok()?))
}

/// Makes the steps of flushes points at which they can fail.
pub(super) fn hooked(mut flusher: Flusher) -> Flusher {
    slow_down(&mut flusher, Duration::ZERO);
    flusher
}

/// Has each flush take so much longer, before its redo file is synced.
pub(super) fn slow_down(flusher: &mut Flusher, by: Duration) {
    flusher.set_hook(Box::new(move |point| {
        if point == FlushPoint::RedoWritten {
            std::thread::sleep(by);
        }
        let point = match point {
            FlushPoint::RedoWritten => Point::FlushRedoWritten,
            FlushPoint::RedoDurable => Point::FlushRedoDurable,
            FlushPoint::BatchWritten => Point::FlushBatchWritten,
            FlushPoint::EngineSynced => Point::FlushEngineSynced,
            FlushPoint::RedoRemoved => Point::FlushRedoRemoved,
        };
        at(point, None, &[]);
        Ok(())
    }));
}
