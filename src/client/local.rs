//! The client inside a node: for plain calls, which it carries to the shard's leader. It runs on the
//! `LocalSet` of the calling thread, starts from the node's own map, marks its calls as forwarded, and
//! repeats no write that may have been applied.

use std::rc::Rc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::driver::{Driver, MapSource, Setup};
use super::ticket::{Deadline, End, Reply};
use super::{Operation, closed};
use crate::node::handle::NodeReport;

/// See the module page. Cheap to clone.
#[derive(Clone)]
pub(crate) struct LocalClient {
    driver: Rc<Driver>,
}

impl LocalClient {
    /// A client on the current `LocalSet`, which reads the node's map from `source`.
    pub fn start(source: MapSource) -> LocalClient {
        LocalClient {
            driver: Driver::start(Setup { seeds: Vec::new(), source: Some(source), forwarded: true }),
        }
    }

    /// Runs an operation at its shard's leader, wherever that is.
    pub async fn run(&self, database: &str, operation: Operation, within: Duration) -> End {
        let (reply, end) = oneshot::channel();
        self.driver.accept(operation, database.into(), Deadline::after(within), Reply::One(reply, None));
        self.driver.flush();
        end.await.unwrap_or_else(|_| Err(closed()))
    }

    /// Asks the node at `address` for its report. The error is for a person.
    pub async fn report(&self, address: &str, within: Duration) -> Result<NodeReport, String> {
        self.driver.report_of(address, false, Deadline::after(within)).await
    }

    /// The same, without its replicas: whether it is there.
    pub async fn brief_report(&self, address: &str, within: Duration) -> Result<NodeReport, String> {
        self.driver.report_of(address, true, Deadline::after(within)).await
    }
}
