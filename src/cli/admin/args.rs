//! The command line of `admin`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::settings::{Key, NAMES};
use crate::cli::args::duration;
use crate::ids::{NodeId, ShardId};
use crate::limits;

/// `admin`
#[derive(Subcommand, Debug)]
pub enum AdminCommand {
    /// List nodes, let them in, empty them, remove them
    #[command(
        subcommand,
        arg_required_else_help = true,
        after_help = "Examples:\n  pontoon admin node list\n  pontoon admin node drain 3 --wait\n  pontoon admin node remove 3"
    )]
    Node(NodeCommand),
    /// Spread replicas and leaders anew
    #[command(
        subcommand,
        arg_required_else_help = true,
        after_help = "Examples:\n  pontoon admin rebalance plan\n  pontoon admin rebalance start --wait\n  pontoon admin rebalance status --watch\n\nIt is done by itself when nodes come and go, unless the setting placement.automatic is off."
    )]
    Rebalance(RebalanceCommand),
    /// Have another replica lead a shard
    TransferLeader(TransferLeaderArgs),
    /// Change a database while it is used, compare its replicas
    #[command(
        subcommand,
        arg_required_else_help = true,
        after_help = "Examples:\n  pontoon admin database set-replicas testDB 5\n  pontoon admin database verify testDB"
    )]
    Database(DatabaseCommand),
    /// Show and change the settings of the cluster
    #[command(
        subcommand,
        arg_required_else_help = true,
        after_help = "Examples:\n  pontoon admin settings get\n  pontoon admin settings set placement.replace_after 30m"
    )]
    Settings(SettingsCommand),
    /// Save what is left of a shard whose majority is gone for good
    Recover(RecoverArgs),
}

/// `admin node`
#[derive(Subcommand, Debug)]
pub enum NodeCommand {
    /// List the nodes, and ask each how it is
    #[command(after_help = "Examples:\n  pontoon admin node list\n  pontoon admin node list --all --json")]
    List(NodeListArgs),
    /// Let a node in that waits for it
    Add(NodeAddArgs),
    /// Move leadership and replicas off a node
    Drain(NodeDrainArgs),
    /// End a node's membership
    Remove(NodeRemoveArgs),
}

/// `admin node list`
#[derive(Args, Debug)]
pub struct NodeListArgs {
    /// Also the nodes that were removed
    #[arg(long)]
    pub all: bool,
}

/// `admin node add`
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  pontoon admin node add 10.0.0.4:7201

A node joins by itself if its settings name any member in cluster.join. With the setting
join.approve on, it waits until this command lets it in: `pontoon admin node list` shows it as
pending.")]
pub struct NodeAddArgs {
    /// Client or peer address of the node
    #[arg(value_name = "ADDR")]
    pub address: String,
}

/// `admin node drain`
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  pontoon admin node drain 3 --wait
  pontoon admin node drain 3 --cancel

Leadership goes first, then the replicas, one after the other, each once its successor has all
data. Clients see no error. Then the node can be stopped, or removed for good. --wait takes as long
as that takes, or until --timeout; the cluster goes on with it in any case, until --cancel.

--cancel also takes back `node remove --dead`, as long as the node isn't removed.

Exit code 1: with --wait, if no other node can take what is left, or somebody cancels it.")]
pub struct NodeDrainArgs {
    /// The node's number, as `pontoon admin node list` shows it
    #[arg(value_name = "ID", value_parser = node_id)]
    pub node: NodeId,
    /// Wait until the node is empty
    #[arg(long, conflicts_with = "cancel")]
    pub wait: bool,
    /// Let the node take replicas again, also after `remove --dead`
    #[arg(long)]
    pub cancel: bool,
}

/// `admin node remove`
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  pontoon admin node remove 3
  pontoon admin node remove 3 --dead

A node that holds replicas isn't removed: drain it first. --dead is for one that is gone for good:
all that it held is made anew elsewhere, then it is removed; the command waits for that, and if it
is interrupted, or its --timeout is over, the cluster goes on, and removes it. Until then
`pontoon admin node drain ID --cancel` takes it back. A removed number never comes back.

Exit code 1: the node holds data; or, with --dead, it answers.")]
pub struct NodeRemoveArgs {
    /// The node's number, as `pontoon admin node list` shows it
    #[arg(value_name = "ID", value_parser = node_id)]
    pub node: NodeId,
    /// It is gone for good: replace what it held without its help
    #[arg(long)]
    pub dead: bool,
}

/// `admin rebalance`
#[derive(Subcommand, Debug)]
pub enum RebalanceCommand {
    /// Show what a rebalancing would move; changes nothing
    Plan(PlanArgs),
    /// Begin a rebalancing
    Start(StartArgs),
    /// Show how the last rebalancing is
    Status(RebalanceStatusArgs),
    /// Begin no further move
    #[command(
        after_help = "Examples:\n  pontoon admin rebalance pause\n\nMoves under way end. Repairs, drains and changes of replica counts go on."
    )]
    Pause,
    /// Go on after a pause
    #[command(after_help = "Examples:\n  pontoon admin rebalance resume")]
    Resume,
    /// End a rebalancing before it is done
    #[command(
        after_help = "Examples:\n  pontoon admin rebalance cancel\n\nEach move under way ends or is rolled back, whichever is nearer; none stays half done. What has\nmoved stays where it is; `pontoon admin rebalance undo` brings it back."
    )]
    Cancel(WaitArgs),
    /// Move everything back to where it was before the last rebalancing
    #[command(
        after_help = "Examples:\n  pontoon admin rebalance undo --wait\n\nExit code 1: it can't be had, and why. To keep things where they were, switch the setting\nplacement.automatic off."
    )]
    Undo(WaitArgs),
}

/// `admin rebalance plan`
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  pontoon admin rebalance plan
  pontoon admin rebalance plan --leaders-only --json

Beside the total stands the least number of replicas that any plan would have to move. Nodes
that didn't answer are named: nothing moves there.")]
pub struct PlanArgs {
    /// Move leadership alone, no data
    #[arg(long)]
    pub leaders_only: bool,
}

/// `admin rebalance start`
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  pontoon admin rebalance start
  pontoon admin rebalance start 5f1c0a92e4b7d380 --wait

--wait takes as long as that takes, or until --timeout.

Exit codes: 0 begun, or nothing to do; 1 the plan is stale, or with --wait it didn't get to its
end: it failed, was cancelled, or another followed before its end was seen.")]
pub struct StartArgs {
    /// The plan, as `plan` named it [default: the one that is made now]
    #[arg(value_name = "PLAN_ID", value_parser = plan_id)]
    pub plan: Option<u64>,
    /// Move leadership alone, no data
    #[arg(long, conflicts_with = "plan")]
    pub leaders_only: bool,
    /// Wait for the end.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// Whether to wait.
#[derive(Args, Debug, Clone, Copy)]
pub struct WaitArgs {
    /// Wait until it has ended
    #[arg(long)]
    pub wait: bool,
}

/// `admin rebalance status`
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  pontoon admin rebalance status
  pontoon admin rebalance status --watch 1s
  pontoon admin rebalance status --json

Exit code 1: it has failed.")]
pub struct RebalanceStatusArgs {
    /// Show it again and again at this interval, until Ctrl-C
    #[arg(long, value_name = "TIME", value_parser = duration, num_args = 0..=1, default_missing_value = "1s")]
    pub watch: Option<Duration>,
}

/// `admin transfer-leader`
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  pontoon admin transfer-leader testDB 5 2

The shard's number is the one that `pontoon status` shows. Clients see no error.")]
pub struct TransferLeaderArgs {
    /// Database
    #[arg(value_name = "DB")]
    pub db: String,
    /// The shard's number
    #[arg(value_name = "SHARD", value_parser = shard_id)]
    pub shard: ShardId,
    /// The node that is to lead; it must hold a replica
    #[arg(value_name = "NODE", value_parser = node_id)]
    pub node: NodeId,
}

/// `admin database`
#[derive(Subcommand, Debug)]
pub enum DatabaseCommand {
    /// Change how many replicas each shard has
    SetReplicas(SetReplicasArgs),
    /// Compare the replicas of each shard, by all that they hold
    Verify(VerifyArgs),
}

/// `admin database verify`
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  pontoon admin database verify testDB
  pontoon admin database verify testDB --shard 5 --wait
  pontoon admin database verify '(metadata)'

Each replica of a shard tells a digest of its keys, values and sessions as they are at one and the
same entry of the log; so they are compared while clients write, and what differs differs. All of
the data is read on each node, one shard after the other, which takes disk and processor; nothing is
changed. Without --timeout it takes as long as that takes, but a replica that takes more than 9
minutes to be read can't be compared.

A node that meets damage while it reads ends with exit code 70, as it would whoever reads: its next
start puts that right. Damage on several nodes may end several at once. So run this while all nodes
are up, where ended ones are started again; --shard N limits it to the nodes of one shard.

A shard is undecided if a replica can't be asked, or was written to so fast that it had gone on,
several times; those that told are equal then. --wait tries those, after all others, until they are
decided, there is no point, or --timeout; and no longer once replicas of any shard differ.

Exit codes: 0 all equal; 1 replicas differ; 3 none differ, and a shard is undecided.")]
pub struct VerifyArgs {
    /// Database
    #[arg(value_name = "DB")]
    pub db: String,
    /// This shard alone, by its number [default: all]
    #[arg(long, value_name = "N", value_parser = shard_id)]
    pub shard: Option<ShardId>,
    /// Try until each shard is decided, or one differs
    #[arg(long)]
    pub wait: bool,
}

/// `admin database set-replicas`
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  pontoon admin database set-replicas testDB 5

Waits until each shard has them, without --timeout as long as that takes; if it is interrupted, the
cluster goes on. Exit code 1: there are fewer nodes that are up.")]
pub struct SetReplicasArgs {
    /// Database
    #[arg(value_name = "DB")]
    pub db: String,
    /// Replicas of each shard, 1 to 7
    #[arg(value_name = "R", value_parser = clap::value_parser!(u32).range(1..=i64::from(limits::REPLICAS_MAX)))]
    pub replicas: u32,
}

/// `admin settings`
#[derive(Subcommand, Debug)]
pub enum SettingsCommand {
    /// Show one setting's value, or all settings with default, unit and meaning
    #[command(
        after_help = "Examples:\n  pontoon admin settings get\n  pontoon admin settings get placement.replace_after"
    )]
    Get(SettingsGetArgs),
    /// Change a setting
    #[command(
        after_help = "Examples:\n  pontoon admin settings set placement.replace_after 30m\n  pontoon admin settings set placement.bytes_per_second 64MiB\n  pontoon admin settings set placement.automatic off"
    )]
    Set(SettingsSetArgs),
}

/// `admin settings get`
#[derive(Args, Debug)]
pub struct SettingsGetArgs {
    /// The setting [default: all]
    #[arg(value_name = "KEY", value_parser = key)]
    pub key: Option<Key>,
}

/// `admin settings set`
#[derive(Args, Debug)]
pub struct SettingsSetArgs {
    /// The setting
    #[arg(value_name = "KEY", value_parser = key)]
    pub key: Key,
    /// Its value: a time as 30m or `never`, a size as 64MiB or `unlimited`, a number, on or off
    #[arg(value_name = "VALUE", allow_hyphen_values = true)]
    pub value: String,
}

/// `admin recover`
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  pontoon admin recover testDB 5 --from 2                       what would be kept, and lost
  pontoon admin recover testDB 5 --from 2 --accept-data-loss

For a shard most of whose replicas are gone for good, with their disks. One replica that is left
goes on alone; what only the others had is lost, also writes that were acknowledged. Bring nodes
back instead, if any of them can be: nothing is lost then. The other old replicas remove themselves
should their nodes come back. Replicas are added again by themselves.

What was kept and what may be lost is written to a file as JSON. The metadata shard goes first, if
it is lost as well: `pontoon admin recover '(metadata)' 0 --from 2`.

Exit code 1: without --accept-data-loss; or a majority answers; or another replica has more.")]
pub struct RecoverArgs {
    /// Database
    #[arg(value_name = "DB")]
    pub db: String,
    /// The shard's number
    #[arg(value_name = "SHARD", value_parser = shard_id)]
    pub shard: ShardId,
    /// The node whose replica goes on
    #[arg(long, value_name = "NODE", value_parser = node_id)]
    pub from: NodeId,
    /// Do it, and lose what only the others had
    #[arg(long)]
    pub accept_data_loss: bool,
    /// Where to write the report; must not exist, but for one of the same recovery [default: recover-SHARD-CONF.json]
    #[arg(long, value_name = "FILE", requires = "accept_data_loss")]
    pub report: Option<PathBuf>,
}

fn node_id(text: &str) -> Result<NodeId, String> {
    match text.parse() {
        Ok(id @ 1..) => Ok(NodeId(id)),
        _ => Err("a node is named by its number, as `pontoon admin node list` shows it".into()),
    }
}

fn shard_id(text: &str) -> Result<ShardId, String> {
    let id = text.parse().map_err(|_| "a shard is named by its number, as `pontoon status` shows it")?;
    Ok(ShardId(id))
}

/// Plans are named by 64 bits in hexadecimal: JSON numbers don't hold so many everywhere.
fn plan_id(text: &str) -> Result<u64, String> {
    let digits = text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let id = u64::from_str_radix(text, 16).ok().filter(|id| digits && *id > 0);
    id.ok_or_else(|| {
        "a plan is named by 16 hexadecimal digits, as `pontoon admin rebalance plan` shows them".into()
    })
}

fn key(text: &str) -> Result<Key, String> {
    Key::of(text).ok_or_else(|| format!("there is no setting `{text}`; there are {}", NAMES.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_plans_are_read() {
        assert_eq!(node_id("3"), Ok(NodeId(3)));
        assert_eq!(shard_id("0"), Ok(ShardId(0)));
        assert_eq!(plan_id("5f1c0a92e4b7d380"), Ok(0x5f1c_0a92_e4b7_d380));
        for bad in ["", "0", "-1", "n3", "18446744073709551616"] {
            assert!(node_id(bad).is_err(), "{bad}");
        }
        for bad in ["", "-1", "x", "18446744073709551616"] {
            assert!(shard_id(bad).is_err(), "{bad}");
        }
        for bad in ["", "0", "+1", "xyz", "11112222333344445"] {
            assert!(plan_id(bad).is_err(), "{bad}");
        }
        assert!(key("placement.automatic").is_ok());
        assert!(key("automatic").unwrap_err().contains("placement.automatic"));
    }
}
