//! The reconciler itself.

use super::facts::{Action, Survey};
use crate::ids::{NodeId, ShardId};
use crate::placement::map::ClusterMap;
use crate::placement::rebalance::Known;

/// Compares what is wanted with what is, and names the next steps. See the module's page.
#[derive(Default)]
pub struct Reconciler {}

impl Reconciler {
    /// One that knows nothing yet: made anew whenever this node becomes the leader of the metadata shard.
    pub fn new() -> Reconciler {
        Reconciler::default()
    }

    /// A node answered at `now_ms`.
    pub fn heard(&mut self, now_ms: u64, survey: Survey) {
        let _ = (now_ms, survey);
    }

    /// A step for this shard was refused, in these words; they go into [`Reconciler::stuck`].
    pub fn refused(&mut self, shard: ShardId, why: String) {
        let _ = (shard, why);
    }

    /// What to do now. To be called about every second, with a clock that never goes back, after the answers
    /// that came were told to [`Reconciler::heard`]. What was done already is named again, at growing
    /// intervals, until map or reports show it.
    pub fn step(&mut self, now_ms: u64, map: &ClusterMap) -> Vec<Action> {
        let _ = (now_ms, map);
        Vec::new()
    }

    /// Shards for which something stands still, and why, as of the last step.
    pub fn stuck(&self) -> Vec<(ShardId, String)> {
        Vec::new()
    }

    /// What planners should know, as of the last step.
    pub fn known(&self) -> Known {
        Known::default()
    }

    /// For how long a node hasn't answered, in milliseconds, as of the last step: time in which nobody asked
    /// doesn't count.
    pub fn silent_ms(&self, node: NodeId) -> u64 {
        let _ = node;
        0
    }
}
