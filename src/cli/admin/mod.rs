//! `admin`: what operators decide. Each command asks any node; the cluster does the work, and goes on whatever
//! becomes of the command.
//!
//! - [`args`]: the command line. [`wait`]: waiting for what the cluster does, with a bar.
//! - [`node`], [`rebalance`], [`database`], [`verify`], [`settings`], [`recover`]: the commands.

pub mod args;
pub mod database;
pub mod node;
pub mod rebalance;
pub mod recover;
pub mod settings;
pub mod verify;
pub mod wait;

use super::context::Context;
use super::failure::{Exit, Failure};
use crate::client::ClientError;
use crate::placement::map::{ClusterMap, MemberRole};
use args::AdminCommand;

/// `admin ...`
pub fn admin(context: &Context, command: &AdminCommand) -> Result<Exit, Failure> {
    match command {
        AdminCommand::Node(command) => node::node(context, command),
        AdminCommand::Rebalance(command) => rebalance::rebalance(context, command),
        AdminCommand::TransferLeader(args) => database::transfer_leader(context, args),
        AdminCommand::Database(command) => database::database(context, command),
        AdminCommand::Settings(command) => settings::settings(context, command),
        AdminCommand::Recover(args) => recover::recover(context, args),
    }
}

/// The metadata shard has no database; so `pontoon status` calls it, and no database can be called so.
const METADATA: &str = "(metadata)";

/// The failure of a change, with what it was and how to find out if nobody knows.
fn change_failed(what: &str, finds_out: &str, error: ClientError) -> Failure {
    match error {
        ClientError::Unknown(why) => Failure::unknown(format!("{what}: {why}; {finds_out}")),
        error => {
            let failure = Failure::from(error);
            Failure { message: format!("{what}: {}", failure.message), ..failure }
        }
    }
}

/// The living shards with a replica on a node, or one that is to come, each with its database's name.
fn shards_on(map: &ClusterMap, node: crate::ids::NodeId) -> Vec<(crate::ids::ShardId, String)> {
    let living = map.shards.values().filter(|shard| !shard.dropped);
    let there = living.filter(|shard| shard.ordered().any(|member| member.node == node));
    let name = |shard: &crate::placement::map::ShardRecord| match map.databases.get(&shard.database) {
        Some(database) => database.name.clone(),
        None => METADATA.to_owned(),
    };
    there.map(|shard| (shard.id, name(shard))).collect()
}

/// A role as a word.
fn role_name(role: MemberRole) -> &'static str {
    match role {
        MemberRole::Voter => "voter",
        MemberRole::Learner => "learner",
        MemberRole::Incoming => "incoming",
        MemberRole::Outgoing => "outgoing",
    }
}
