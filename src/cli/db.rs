//! `db list|create|drop`.

use serde_json::{Value, json};

use super::args::{DbCommand, DbCreateArgs, DbDropArgs};
use super::clean::confirmed;
use super::context::{Context, with_session};
use super::data::after_effect;
use super::failure::{Exit, Failure};
use super::output;
use super::setup;
use super::status;
use crate::client::ClientError;
use crate::placement::map::DatabaseRecord;

/// `db ...`
pub fn db(context: &Context, command: &DbCommand) -> Result<Exit, Failure> {
    match command {
        DbCommand::List => list(context),
        DbCommand::Create(args) => create(context, args),
        DbCommand::Drop(args) => drop(context, args),
    }
}

fn list(context: &Context) -> Result<Exit, Failure> {
    let map = with_session(context, async |session| Ok(session.client.map().await?))?;
    let databases = status::databases(&map);
    if context.json() {
        output::json(&json!({"databases": databases.map(json_of).collect::<Value>()}))?;
        return Ok(Exit::Done);
    }
    let mut table = output::table(&["database", "replicas", "shards"]);
    for db in databases {
        table.add_row([db.name.clone(), db.replicas.to_string(), db.shards.len().to_string()]);
    }
    output::line(table.to_string())?;
    Ok(Exit::Done)
}

fn json_of(db: &DatabaseRecord) -> Value {
    json!({"name": db.name, "replicas": db.replicas, "shards": db.shards.len()})
}

fn create(context: &Context, args: &DbCreateArgs) -> Result<Exit, Failure> {
    let (record, created) = with_session(context, async |session| {
        let client = &session.client;
        let (name, replicas, shards) = (&args.name, args.replicas, args.partitions);
        // A node that answers at all does so in the usual time; to make thousands of replicas takes longer.
        let usual = context.timeout();
        let more = setup::timeout_beyond(usual, context, replicas, shards).saturating_sub(usual);
        setup::create_database(client, name, replicas, shards, session.remaining() + more).await
    })?;
    if context.json() {
        let mut object = json_of(&record);
        object["created"] = created.into();
        after_effect(output::json(&object))?;
    } else {
        let done = if created { "created" } else { "exists already:" };
        after_effect(output::line(format!(
            "{done} database {} with {} and {}",
            record.name,
            output::count(record.replicas, "replica"),
            output::count(record.shards.len() as u64, "shard")
        )))?;
    }
    Ok(Exit::Done)
}

fn drop(context: &Context, args: &DbDropArgs) -> Result<Exit, Failure> {
    let question = format!("Remove database {} with all its data? [y/N] ", args.name);
    if !args.yes && !confirmed(&question)? {
        return Err(Failure::negative("declined", "nothing was removed"));
    }
    with_session(context, async |session| {
        let dropped = session.client.drop_database(&args.name, session.remaining()).await;
        dropped.map_err(|error| match error {
            ClientError::Unknown(why) => Failure::unknown(format!(
                "dropping database `{}`: {why}; `pontoon db list` tells whether it is gone",
                args.name
            )),
            error => error.into(),
        })
    })?;
    if context.json() {
        after_effect(output::json(&json!({"name": args.name, "dropped": true})))?;
    } else {
        after_effect(output::line(format!("dropped database {}", args.name)))?;
    }
    Ok(Exit::Done)
}
