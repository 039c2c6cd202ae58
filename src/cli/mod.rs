//! The subcommands of the `pontoon` binary.
//!
//! Data goes to stdout, everything else to stderr; [`failure::Exit`] has the exit codes. Commands
//! without nodes run on a small runtime of one thread; `serve` and `setup` run an actor system on
//! the main thread.
//!
//! - [`args`]: what may be on the command line. [`context`]: what every command is given.
//! - [`locate`], [`local`]: where the cluster is; the cluster that `setup` keeps on this machine.
//! - [`failure`], [`output`], [`encoding`]: how commands end and what they print.
//! - [`signals`]: Ctrl-C and SIGTERM.
//! - The rest: a file for each group of subcommands.

pub mod admin;
pub mod args;
pub mod bench;
pub mod clean;
pub mod completions;
pub mod context;
pub mod data;
pub mod db;
pub mod detach;
pub mod encoding;
pub mod failure;
pub mod local;
pub mod locate;
pub mod output;
pub mod overview;
pub mod serve;
pub mod setup;
pub mod signals;
pub mod sim;
pub mod sim_placement;
pub mod status;
pub mod stop;
pub mod trace;
pub mod transfer;
pub mod trial;
pub mod verify;
pub mod watching;

use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches};

use args::{Cli, Command};
use context::Context;
use failure::{Exit, Failure};
use locate::Environment;

/// Runs a command line, the program's name first, and tells how the process should end.
pub fn run(args: impl IntoIterator<Item = OsString>) -> Exit {
    let args = args::modernise(args.into_iter().collect());
    // Parsing may fail before `--json` is understood; then the word itself must do.
    let wants_json = args.iter().take_while(|arg| *arg != "--").any(|arg| arg == "--json");
    let version = crate::version::version_line();
    let matches = Cli::command().version(version).try_get_matches_from(args);
    let cli = match matches.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(error) => return end_of_parsing(&error, wants_json),
    };
    let context = Context { global: cli.global, environment: Environment::of_process() };
    match dispatch(&context, cli.command) {
        Ok(exit) => exit,
        Err(failure) => {
            output::failure(context.json(), &failure);
            failure.exit
        }
    }
}

fn dispatch(context: &Context, command: Command) -> Result<Exit, Failure> {
    match command {
        Command::Setup(args) => setup::setup(context, &args),
        Command::Stop => stop::stop(context),
        Command::Clean(args) => clean::clean(context, &args),
        Command::Serve(args) => serve::serve(context, &args),
        Command::Set(args) => data::set(context, args),
        Command::Get(args) => data::get(context, args),
        Command::Delete(args) => data::delete(context, args),
        Command::Cas(args) => data::cas(context, args),
        Command::Mset(args) => data::mset(context, args),
        Command::Mget(args) => data::mget(context, args),
        Command::Scan(args) => data::scan(context, args),
        Command::Import(args) => transfer::import(context, args),
        Command::Export(args) => transfer::export(context, args),
        Command::Status(args) => status::status(context, &args),
        Command::Route(args) => status::route(context, args),
        Command::Health => status::health(context),
        Command::Db(command) => db::db(context, &command),
        Command::Admin(command) => admin::admin(context, &command),
        Command::Test(command) => verify::test(context, &command),
        Command::Trace(command) => trace::trace(context, command),
        Command::Bench(args) => bench::bench(context, &args),
        Command::Sim(args) => sim::sim(context, &args),
        Command::Completions(args) => completions::completions(&args),
    }
}

/// Help and version go to stdout and are no error; everything else is a mistake of usage.
fn end_of_parsing(error: &clap::Error, json: bool) -> Exit {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        // A closed stdout is all that can go wrong.
        error.print().ok();
        return Exit::Done;
    }
    if json {
        let text = error.render().to_string();
        let message = text.trim().strip_prefix("error: ").unwrap_or(text.trim());
        output::failure(true, &Failure::usage("usage", message));
    } else {
        error.print().ok();
    }
    Exit::Usage
}
