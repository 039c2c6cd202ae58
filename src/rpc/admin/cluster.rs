//! Nodes, replica counts and settings of the cluster.

use std::time::{Duration, Instant};

use super::{Admin, LEADER_POLL, PASSED_OVER_NAMED};
use crate::ids::NodeId;
use crate::limits::{
    BYTES_PER_SECOND_MAX, BYTES_PER_SECOND_MIN, MOVES_AT_A_TIME_MAX, PLAN_SETTLE_MS_MAX,
    REPLACE_AFTER_MS_MAX, REPLACE_AFTER_MS_MIN, REPLICAS_MAX,
};
use crate::machine::command::{MetaCommand, PolicyChange};
use crate::placement::map::{ClusterMap, NodeRecord, Standing};
use crate::refusal::Refusal;
use crate::schema::admin_capnp::setting;

impl Admin {
    pub(super) async fn stand(
        &self,
        node: NodeId,
        standing: Standing,
        seen: u64,
        within: Duration,
    ) -> Result<u64, Refusal> {
        self.decide(MetaCommand::SetStanding { node, standing }.seen(seen), within).await
    }

    pub(super) async fn replicate(
        &self,
        name: String,
        replicas: u32,
        seen: u64,
        deadline: Instant,
    ) -> Result<u64, Refusal> {
        if !(1..=REPLICAS_MAX).contains(&replicas) {
            return Err(Refusal::Invalid(format!("{replicas} replicas: a shard has 1 to {REPLICAS_MAX}")));
        }
        // As for a new database: that too few are there is believed only after a while. Who isn't heard at first may be
        // starting, or it was the connection alone that was dead, and the next question dials anew.
        let until = deadline.min(Instant::now() + Duration::from_millis(PLAN_SETTLE_MS_MAX));
        loop {
            let map = self.service.node.map();
            // Fewer than there are can always be had.
            if map.database(&name).is_some_and(|database| replicas <= database.replicas) {
                break;
            }
            // Who hangs takes no more than half of the time: the other half is for deciding it.
            let heard_by = Instant::now() + deadline.saturating_duration_since(Instant::now()) / 2;
            let present = self.present(&map, heard_by).await;
            match enough_nodes(&map, replicas, |node| present.is_up(node)) {
                Ok(()) => break,
                Err(_) if Instant::now() + LEADER_POLL.1 < until => tokio::time::sleep(LEADER_POLL.1).await,
                Err(refusal) => return Err(refusal),
            }
        }
        let left = deadline.saturating_duration_since(Instant::now());
        self.decide(MetaCommand::SetReplicas { name, replicas }.seen(seen), left).await
    }

    pub(super) async fn change(
        &self,
        change: PolicyChange,
        seen: u64,
        within: Duration,
    ) -> Result<u64, Refusal> {
        check_setting(change).map_err(Refusal::Invalid)?;
        self.decide(MetaCommand::SetPolicy(change).seen(seen), within).await
    }
}

/// Whether so many nodes are up that take replicas; if not, which are not.
fn enough_nodes(map: &ClusterMap, replicas: u32, is_up: impl Fn(NodeId) -> bool) -> Result<(), Refusal> {
    let replaced = map.replaced();
    let takes = |node: &&NodeRecord| {
        let there = is_up(node.id) || !replaced.contains(&node.id);
        node.standing.takes_replicas() && node.weight > 0 && there
    };
    let (up, down): (Vec<_>, Vec<_>) = map.nodes.values().filter(takes).partition(|node| is_up(node.id));
    if up.len() >= replicas as usize {
        return Ok(());
    }
    let mut text =
        format!("{replicas} replicas need as many nodes that are up and take replicas, not {}", up.len());
    if !down.is_empty() {
        text.push_str(&format!("; {}", unanswered(down)));
    }
    Err(Refusal::Refused(text))
}

/// Names nodes that don't answer, the first few.
pub(super) fn unanswered<'a>(nodes: impl IntoIterator<Item = &'a NodeRecord>) -> String {
    let named = nodes.into_iter().take(PASSED_OVER_NAMED);
    let names: Vec<_> = named.map(|node| format!("{} ({})", node.id, node.label)).collect();
    format!("no answer from node {}", names.join(", "))
}

/// Reads a change of a setting.
pub(super) fn read_setting(from: setting::Reader<'_>) -> Result<PolicyChange, Refusal> {
    Ok(match from.which() {
        Ok(setting::ReplaceAfterMs(ms)) => PolicyChange::ReplaceAfterMs(ms),
        Ok(setting::MovesAtATime(moves)) => PolicyChange::MovesAtATime(moves),
        Ok(setting::BytesPerSecond(bytes)) => PolicyChange::BytesPerSecond(bytes),
        Ok(setting::Automatic(on)) => PolicyChange::Automatic(on),
        Ok(setting::ApproveJoins(on)) => PolicyChange::ApproveJoins(on),
        Err(_) => {
            let text = "this node doesn't know the setting: it is older than you";
            return Err(Refusal::Invalid(text.into()));
        }
    })
}

fn time(ms: u64) -> humantime::FormattedDuration {
    humantime::format_duration(Duration::from_millis(ms))
}

/// The rules for settings of the cluster. The error is for a person.
pub fn check_setting(change: PolicyChange) -> Result<(), String> {
    match change {
        PolicyChange::ReplaceAfterMs(ms) if (1..REPLACE_AFTER_MS_MIN).contains(&ms) => Err(format!(
            "{} is too short: a node that restarts, or is slow to answer, would be replaced; the shortest is {}, and 0 \
             means never",
            time(ms),
            time(REPLACE_AFTER_MS_MIN)
        )),
        PolicyChange::ReplaceAfterMs(ms) if ms > REPLACE_AFTER_MS_MAX => {
            let days = REPLACE_AFTER_MS_MAX / 86_400_000;
            Err(format!("{} is too long: the longest is {days} days, and 0 means never", time(ms)))
        }
        PolicyChange::MovesAtATime(moves) if !(1..=MOVES_AT_A_TIME_MAX).contains(&moves) => Err(format!(
            "{moves} moves at a time: there can be 1 to {MOVES_AT_A_TIME_MAX}; `pontoon admin rebalance pause` \
             stops those of a rebalancing, and nothing stops repairs"
        )),
        PolicyChange::BytesPerSecond(bytes) if (1..BYTES_PER_SECOND_MIN).contains(&bytes) => Err(format!(
            "{bytes} bytes per second are too few for a move to end; the least is {BYTES_PER_SECOND_MIN}, and 0 \
             means no limit"
        )),
        PolicyChange::BytesPerSecond(bytes) if bytes > BYTES_PER_SECOND_MAX => Err(format!(
            "{bytes} bytes per second are more than there ever are: the most is {BYTES_PER_SECOND_MAX}, and 0 \
             means no limit"
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::StoreId;

    #[test]
    fn settings_have_bounds() {
        for (change, good) in [
            (PolicyChange::ReplaceAfterMs(0), true),
            (PolicyChange::ReplaceAfterMs(1), false),
            (PolicyChange::ReplaceAfterMs(REPLACE_AFTER_MS_MIN), true),
            (PolicyChange::ReplaceAfterMs(REPLACE_AFTER_MS_MAX), true),
            (PolicyChange::ReplaceAfterMs(REPLACE_AFTER_MS_MAX + 1), false),
            (PolicyChange::MovesAtATime(0), false),
            (PolicyChange::MovesAtATime(MOVES_AT_A_TIME_MAX), true),
            (PolicyChange::MovesAtATime(MOVES_AT_A_TIME_MAX + 1), false),
            (PolicyChange::BytesPerSecond(0), true),
            (PolicyChange::BytesPerSecond(BYTES_PER_SECOND_MIN - 1), false),
            (PolicyChange::BytesPerSecond(BYTES_PER_SECOND_MIN), true),
            (PolicyChange::BytesPerSecond(BYTES_PER_SECOND_MAX), true),
            (PolicyChange::BytesPerSecond(BYTES_PER_SECOND_MAX + 1), false),
            (PolicyChange::Automatic(false), true),
            (PolicyChange::ApproveJoins(true), true),
        ] {
            assert_eq!(check_setting(change).is_ok(), good, "{change:?}");
        }
    }

    #[test]
    fn only_nodes_that_are_up_and_take_replicas_count() {
        let node = |id: u64, standing, weight| NodeRecord {
            id: NodeId(id),
            label: format!("n{id}"),
            client_address: format!("h{id}:1"),
            peer_address: format!("h{id}:2"),
            zone: String::new(),
            weight,
            store_id: StoreId::default(),
            standing,
            changed_at: 1,
        };
        let nodes = [
            node(1, Standing::Member, 100),
            node(2, Standing::Member, 100),
            node(3, Standing::Draining, 100),
            node(4, Standing::Member, 0),
            node(5, Standing::Member, 50),
            node(6, Standing::Pending, 100),
        ];
        let mut map = ClusterMap::default();
        map.nodes.extend(nodes.into_iter().map(|node| (node.id, node)));
        assert!(enough_nodes(&map, 3, |_| true).is_ok());
        assert!(enough_nodes(&map, 4, |_| true).is_err());
        let refused = enough_nodes(&map, 3, |node| node != NodeId(5)).unwrap_err().to_string();
        assert!(refused.contains("not 2") && refused.ends_with("no answer from node 5 (n5)"), "{refused}");
        assert!(enough_nodes(&map, 2, |node| node != NodeId(5)).is_ok());
    }
}
