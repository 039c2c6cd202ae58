//! Faults that tests ask a running replica for. A plain build has none of them.

use std::time::Duration;

use actix::prelude::*;

use super::ReplicaActor;
use crate::node::messages::Inject;

impl Handler<Inject> for ReplicaActor {
    type Result = ();
    fn handle(&mut self, inject: Inject, ctx: &mut Context<Self>) {
        match inject.0.as_str() {
            "panic" => panic!("injected panic"),
            "error" => self.fail("injected error".into(), ctx),
            "open-error" => {
                // Seven attempts: about six seconds, so that whoever looks sees it.
                let fail = crate::node::hooks::FailOpens { replica: self.replica, times: 7 };
                self.guard.supervisor.do_send(fail);
                self.fail("injected error".into(), ctx);
            }
            "log-writer-panic" => {
                self.shared.log_writer.run(Box::new(|_| panic!("injected panic of the log writer")));
            }
            // A disk that takes its time.
            "log-stall" => self.stall_log(3_000),
            // One that takes its time over each flush from now on.
            "slow-flush" => self.slow_flushes(0),
            // A node that puts up with it.
            "keep-leading" => self.shared.disk.keep_leading(),
            "free-bytes" => self.shared.disk.pretend(None),
            other if other.starts_with("alter=") => self.alter(&other["alter=".len()..]),
            other => match other.split_once('=').map(|(fault, number)| (fault, number.parse())) {
                Some(("log-stall", Ok(ms))) => self.stall_log(ms),
                Some(("slow-flush", Ok(ms))) => self.slow_flushes(ms),
                Some(("free-bytes", Ok(free))) => self.shared.disk.pretend(Some(free)),
                _ => tracing::warn!(fault = other, "unknown fault"),
            },
        }
    }
}

impl ReplicaActor {
    fn slow_flushes(&self, ms: u64) {
        let by = Duration::from_millis(ms);
        self.shared.flusher.run(Box::new(move |flusher| crate::node::hooks::slow_down(flusher, by)));
    }

    fn stall_log(&self, ms: u64) {
        let stall = Duration::from_millis(ms);
        self.shared.log_writer.run(Box::new(move |_| std::thread::sleep(stall)));
    }
}
