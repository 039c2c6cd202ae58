//! The command line: every subcommand, its arguments, its help.
//!
//! Arguments are checked as far as they can be without a cluster, so that a mistake costs nothing
//! and ends with [`super::Exit::Usage`].

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::admin::args::AdminCommand;
use super::trace::args::TraceCommand;
use crate::limits;
pub use trials::{BenchArgs, PlacementArgs, SimArgs, SimCommand, TestArgs, TestCommand, Workload};

mod trials;

/// Everything on the command line.
#[derive(Parser, Debug)]
#[command(
    name = "pontoon",
    about = "A sharded, replicated, strongly consistent key-value store",
    disable_help_subcommand = true,
    subcommand_required = true,
    arg_required_else_help = true,
    max_term_width = 100,
    after_help = "\
Examples:
  pontoon setup testDB 3 5          three nodes on this machine, database testDB with 5 shards
  pontoon set testDB bob hello      in another terminal
  pontoon get testDB bob
  pontoon status

Where the cluster is: --cluster, else PONTOON_CLUSTER, else the local cluster in --data, else in
PONTOON_DATA, else in $XDG_DATA_HOME/pontoon (~/.local/share/pontoon).

Exit codes: 0 done; 1 negative answer (absent, mismatch, refused, test failed); 2 usage or
configuration; 3 unavailable or past the deadline, certainly not applied; 4 outcome unknown;
70 a thread of the node failed; 130 second Ctrl-C."
)]
pub struct Cli {
    /// Options of every subcommand.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Where the help of each subcommand lists the options that all have, apart from its own.
const GLOBAL: &str = "Options of every command";

/// Options of every subcommand.
#[derive(Args, Debug, Clone, Default)]
pub struct Global {
    /// Print one JSON object on stdout; errors as JSON on stderr
    #[arg(long, global = true, help_heading = GLOBAL)]
    pub json: bool,
    /// Deadline, as `500ms`, `10s`, `1m`; within it everything that may be retried is [default: 10s]
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "TIME", value_parser = duration)]
    pub timeout: Option<Duration>,
    /// Client addresses of any nodes of the cluster
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "HOST:PORT,...")]
    pub cluster: Option<String>,
    /// Directory of the local cluster
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "DIR")]
    pub data: Option<PathBuf>,
}

/// The subcommands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Start a local cluster if there is none, and create a database
    Setup(SetupArgs),
    /// Stop the local cluster
    #[command(after_help = "Examples:\n  pontoon stop\n  pontoon stop --data ./try")]
    Stop,
    /// Remove the data of the local cluster
    Clean(CleanArgs),
    /// Run one node
    Serve(ServeArgs),
    /// Set a key's value
    Set(SetArgs),
    /// Print a key's value, exactly
    Get(GetArgs),
    /// Remove a key
    Delete(DeleteArgs),
    /// Set a key's value if a condition holds
    Cas(CasArgs),
    /// Set several keys
    Mset(MsetArgs),
    /// Print several keys and their values
    Mget(MgetArgs),
    /// Print keys and values of all shards
    Scan(ScanArgs),
    /// Set keys from JSON lines
    Import(ImportArgs),
    /// Write all keys as JSON lines
    Export(ExportArgs),
    /// Show nodes, databases and shards
    Status(StatusArgs),
    /// Show where a key belongs and who leads there
    Route(RouteArgs),
    /// Ask each node how it is
    #[command(after_help = "Examples:\n  pontoon health\n  pontoon health --cluster 127.0.0.1:7101")]
    Health,
    /// List, create and drop databases
    #[command(
        subcommand,
        arg_required_else_help = true,
        after_help = "Examples:\n  pontoon db list\n  pontoon db create testDB 3 5\n  pontoon db drop testDB --yes"
    )]
    Db(DbCommand),
    /// Nodes, rebalancing, settings of the cluster: what operators decide
    #[command(
        subcommand,
        arg_required_else_help = true,
        after_help = "Examples:\n  pontoon admin node list\n  pontoon admin rebalance plan\n  pontoon admin settings get"
    )]
    Admin(AdminCommand),
    /// Kill a leader and see what becomes of the cluster and its data
    #[command(
        subcommand,
        arg_required_else_help = true,
        after_help = "Examples:\n  pontoon test leader-failure 3\n  pontoon test replication 4"
    )]
    Test(TestCommand),
    /// Show where the time of one operation goes
    #[command(
        subcommand,
        arg_required_else_help = true,
        after_help = "Examples:\n  pontoon trace put testDB bob hello\n  pontoon trace get testDB bob --repeat 100\n\nThe stages are in the order in which they come, in microseconds; together they are the whole. No\nclocks of two machines are compared. What isn't known is `?`, or null with --json."
    )]
    Trace(TraceCommand),
    /// Measure operations per second and latency
    Bench(BenchArgs),
    /// Let simulated clusters live through faults, and check what must hold
    Sim(SimArgs),
    /// Print a completion script
    Completions(CompletionsArgs),
}

/// `setup`
#[derive(Args, Debug, Clone)]
#[command(after_help = "\
Examples:
  pontoon setup testDB 3 5            serves until Ctrl-C
  pontoon setup testDB 3 5 --detach   serves in the background; `pontoon stop` ends it
  pontoon setup other 3 8             a further database in the running cluster

The same command again brings back the same cluster with its data. Without --timeout the nodes
have a minute to start and to create the database, and longer for many shards.")]
pub struct SetupArgs {
    /// Name of the database: 1 to 64 of A-Z a-z 0-9 _ -
    #[arg(value_name = "NAME", value_parser = database_name, allow_hyphen_values = true)]
    pub name: String,
    /// Replicas of each shard, 1 to 7
    #[arg(value_name = "REPLICAS", value_parser = clap::value_parser!(u32).range(1..=i64::from(limits::REPLICAS_MAX)))]
    pub replicas: u32,
    /// Shards (partitions), 1 to 16384
    #[arg(value_name = "PARTITIONS", value_parser = clap::value_parser!(u32).range(1..=i64::from(limits::SHARDS_MAX)))]
    pub partitions: u32,
    /// Nodes of a new local cluster, at least REPLICAS [default: REPLICAS]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(limits::LOCAL_NODES_MAX)))]
    pub nodes: Option<u32>,
    /// Return once the cluster is ready and leave it running in the background
    #[arg(long)]
    pub detach: bool,
    /// This is the process that `--detach` starts.
    #[arg(long, hide = true, conflicts_with = "detach")]
    pub detached: bool,
}

/// `clean`
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  pontoon clean\n  pontoon clean --yes --data ./try")]
pub struct CleanArgs {
    /// Don't ask
    #[arg(long)]
    pub yes: bool,
}

/// `serve`
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  pontoon serve --config n1.toml
  pontoon serve --config n1.toml --check
  pontoon serve --config n1.toml --rejoin
  PONTOON__LOG__LEVEL=debug pontoon serve --config n1.toml

--rejoin is for a node that doesn't start because its directory is damaged, or was lost. What is
left is moved into `aside-SECONDS` within the directory, nothing is deleted, and the node joins its
cluster with a new number; it never forms a cluster. A directory that can be opened is left as it
is, and the node starts as always. The old number stays in `pontoon status` until its replicas are
made anew elsewhere: `pontoon admin node remove ID --dead` has that done at once.")]
pub struct ServeArgs {
    /// Settings of the node; config/default.toml documents each key
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Check the settings and exit
    #[arg(long, conflicts_with = "print_config")]
    pub check: bool,
    /// Print the settings in force as TOML and exit
    #[arg(long)]
    pub print_config: bool,
    /// If the directory is too damaged to start from, set it aside and join the cluster as a new node
    #[arg(long, conflicts_with_all = ["check", "print_config"])]
    pub rejoin: bool,
    /// Exit at once when stdin ends: a test's node never outlives the test.
    #[arg(long, hide = true)]
    pub until_stdin_closes: bool,
}

/// Where a value comes from.
#[derive(Args, Debug)]
#[group(multiple = false)]
pub struct ValueSource {
    /// Take the value from a file
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Take the value from stdin
    #[arg(long)]
    pub stdin: bool,
}

/// `set`
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  pontoon set testDB bob hello
  pontoon set testDB photo --file bob.jpg
  date | pontoon set testDB now --stdin
  pontoon set testDB -- --json -h      a key and a value that look like options")]
pub struct SetArgs {
    /// What is set.
    #[command(flatten)]
    pub put: PutArgs,
}

/// A key and the value that it gets; of `set` and `trace put`.
#[derive(Args, Debug)]
pub struct PutArgs {
    /// Database
    #[arg(value_name = "DB")]
    pub db: String,
    /// Key; may begin with `-`
    #[arg(value_name = "KEY", allow_hyphen_values = true)]
    pub key: OsString,
    /// Value; may begin with `-`
    #[arg(value_name = "VALUE", allow_hyphen_values = true, required_unless_present_any = ["file", "stdin"], conflicts_with_all = ["file", "stdin"])]
    pub value: Option<OsString>,
    /// The value, if it isn't an argument.
    #[command(flatten)]
    pub source: ValueSource,
}

/// `get`
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  pontoon get testDB bob
  pontoon get testDB photo > bob.jpg
  pontoon get testDB bob --json

Writes exactly the value's bytes, and a newline only on a terminal. Exit code 1: no such key.")]
pub struct GetArgs {
    /// Database
    #[arg(value_name = "DB")]
    pub db: String,
    /// Key; may begin with `-`
    #[arg(value_name = "KEY", allow_hyphen_values = true)]
    pub key: OsString,
}

/// `delete`
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  pontoon delete testDB bob\n\nExit code 1: no such key.")]
pub struct DeleteArgs {
    /// Database
    #[arg(value_name = "DB")]
    pub db: String,
    /// Key; may begin with `-`
    #[arg(value_name = "KEY", allow_hyphen_values = true)]
    pub key: OsString,
}

/// The condition of `cas`.
#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
pub struct CasCondition {
    /// The present value
    #[arg(long, value_name = "OLD", allow_hyphen_values = true)]
    pub expect: Option<OsString>,
    /// The key doesn't exist
    #[arg(long)]
    pub absent: bool,
    /// The present version
    #[arg(long, value_name = "V")]
    pub version: Option<u64>,
}

/// `cas`
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  pontoon cas testDB bob --expect hello bye
  pontoon cas testDB lock --absent me
  pontoon cas testDB bob --version 7 bye

Exit code 1: the condition doesn't hold, and nothing was changed.")]
pub struct CasArgs {
    /// Database
    #[arg(value_name = "DB")]
    pub db: String,
    /// Key; may begin with `-`
    #[arg(value_name = "KEY", allow_hyphen_values = true)]
    pub key: OsString,
    /// The condition.
    #[command(flatten)]
    pub condition: CasCondition,
    /// New value; may begin with `-`
    #[arg(value_name = "NEW", allow_hyphen_values = true, required_unless_present_any = ["file", "stdin"], conflicts_with_all = ["file", "stdin"])]
    pub new: Option<OsString>,
    /// The new value, if it isn't an argument.
    #[command(flatten)]
    pub source: ValueSource,
}

/// `mset`
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  pontoon mset testDB bob hello eve bye

Each key is set for itself: after a failure some may be set. A key or value that begins with `-`,
and is no number, stands behind `--`: it could be an option.")]
pub struct MsetArgs {
    /// Database
    #[arg(value_name = "DB")]
    pub db: String,
    /// Keys and values in turn; behind `--` they may begin with `-`
    // Without `allow_hyphen_values`: in a list it makes values of the command's own options.
    #[arg(value_name = "KEY VALUE", required = true, num_args = 1.., allow_negative_numbers = true)]
    pub pairs: Vec<OsString>,
}

/// `mget`
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  pontoon mget testDB bob eve
  pontoon mget --json testDB bob eve

Prints KEY, a tab, VALUE; bytes that would break the line are escaped, unless with --json.
Exit code 1: some key doesn't exist. A key that begins with `-`, and is no number, stands behind
`--`: it could be an option.")]
pub struct MgetArgs {
    /// Database
    #[arg(value_name = "DB")]
    pub db: String,
    /// Keys; behind `--` they may begin with `-`
    // Without `allow_hyphen_values`, as above.
    #[arg(value_name = "KEY", required = true, num_args = 1.., allow_negative_numbers = true)]
    pub keys: Vec<OsString>,
}

/// `scan`
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  pontoon scan testDB --prefix user: --limit 10
  pontoon scan testDB --keys-only

Shard by shard: keys are in order within a shard, not among shards. Prints KEY, a tab, VALUE; bytes
that would break the line are escaped, unless with --json.")]
pub struct ScanArgs {
    /// Database
    #[arg(value_name = "DB")]
    pub db: String,
    /// Only keys that begin so
    #[arg(long, value_name = "P", allow_hyphen_values = true)]
    pub prefix: Option<OsString>,
    /// At most so many keys
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Leave out the values
    #[arg(long)]
    pub keys_only: bool,
}

/// `import`
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  pontoon import testDB backup.jsonl
  pontoon export testDB | pontoon import copy

One JSON object a line: {\"key\":\"bob\",\"value\":\"hello\"}, with \"encoding\":\"base64\" where key and
value are so encoded. Of lines with the same key the last one wins. Versions are given anew.")]
pub struct ImportArgs {
    /// Database
    #[arg(value_name = "DB")]
    pub db: String,
    /// File of JSON lines; `-` or nothing: stdin
    #[arg(value_name = "FILE")]
    pub file: Option<PathBuf>,
}

/// `export`
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  pontoon export testDB > backup.jsonl
  pontoon export testDB --prefix user: --output users.jsonl")]
pub struct ExportArgs {
    /// Database
    #[arg(value_name = "DB")]
    pub db: String,
    /// Only keys that begin so
    #[arg(long, value_name = "P", allow_hyphen_values = true)]
    pub prefix: Option<OsString>,
    /// Write to this file, which appears once complete
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// `status`
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  pontoon status
  pontoon status testDB --watch 1s
  pontoon status --json

Exit codes: 0 every shard has a leader; 1 some shard has none; 3 no node answers.")]
pub struct StatusArgs {
    /// Only this database
    #[arg(value_name = "DB")]
    pub db: Option<String>,
    /// Show it again and again at this interval, until Ctrl-C
    #[arg(long, value_name = "TIME", value_parser = duration, num_args = 0..=1, default_missing_value = "1s")]
    pub watch: Option<Duration>,
}

/// `route`
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  pontoon route testDB bob\n  pontoon route testDB bob --json")]
pub struct RouteArgs {
    /// Database
    #[arg(value_name = "DB")]
    pub db: String,
    /// Key; may begin with `-`
    #[arg(value_name = "KEY", allow_hyphen_values = true)]
    pub key: OsString,
}

/// `db`
#[derive(Subcommand, Debug)]
pub enum DbCommand {
    /// List the databases
    #[command(after_help = "Examples:\n  pontoon db list\n  pontoon db list --json")]
    List,
    /// Create a database in the running cluster
    #[command(after_help = "\
Examples:
  pontoon db create testDB 3 5

Waits until each shard has a leader. Without --timeout that may take longer for many shards.")]
    Create(DbCreateArgs),
    /// Remove a database with all its data
    #[command(after_help = "Examples:\n  pontoon db drop testDB --yes")]
    Drop(DbDropArgs),
}

/// `db create`
#[derive(Args, Debug)]
pub struct DbCreateArgs {
    /// Name of the database: 1 to 64 of A-Z a-z 0-9 _ -
    #[arg(value_name = "NAME", value_parser = database_name, allow_hyphen_values = true)]
    pub name: String,
    /// Replicas of each shard, 1 to 7
    #[arg(value_name = "REPLICAS", value_parser = clap::value_parser!(u32).range(1..=i64::from(limits::REPLICAS_MAX)))]
    pub replicas: u32,
    /// Shards (partitions), 1 to 16384
    #[arg(value_name = "PARTITIONS", value_parser = clap::value_parser!(u32).range(1..=i64::from(limits::SHARDS_MAX)))]
    pub partitions: u32,
}

/// `db drop`
#[derive(Args, Debug)]
pub struct DbDropArgs {
    /// Name of the database
    #[arg(value_name = "NAME", allow_hyphen_values = true)]
    pub name: String,
    /// Don't ask
    #[arg(long)]
    pub yes: bool,
}

/// `completions`
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  pontoon completions bash > /etc/bash_completion.d/pontoon\n  pontoon completions fish > ~/.config/fish/completions/pontoon.fish"
)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    pub shell: CompletionShell,
}

/// Shells with completions.
#[derive(ValueEnum, Clone, Copy, Debug)]
pub enum CompletionShell {
    /// GNU bash
    Bash,
    /// Z shell
    Zsh,
    /// fish
    Fish,
}

/// The subcommands that the first report spelled with a leading `-`.
const LEGACY: [&str; 5] = ["-setup", "-set", "-get", "-clean", "-test"];

/// Reads the old spellings: a first argument `-set` is the subcommand `set`.
pub fn modernise(mut args: Vec<OsString>) -> Vec<OsString> {
    if let Some(first) = args.get_mut(1)
        && let Some(name) = LEGACY.iter().find(|name| first.as_os_str() == **name)
    {
        *first = OsString::from(&name[1..]);
    }
    args
}

/// A positive time as `500ms`, `10s`, `1m30s`; a bare number is seconds.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let time = match text.parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => humantime::parse_duration(text)
            .map_err(|error| format!("{error}; write it as 500ms, 10s or 1m"))?,
    };
    let max = Duration::from_millis(limits::TIMEOUT_MAX_MS);
    if time.is_zero() {
        Err("it must be longer than 0".into())
    } else if time > max {
        Err(format!("the longest is {}", humantime::format_duration(max)))
    } else {
        Ok(time)
    }
}

/// A database name: 1 to 64 of `A-Z a-z 0-9 _ -`.
fn database_name(text: &str) -> Result<String, String> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
    if text.is_empty() || text.len() > limits::NAME_BYTES_MAX || !text.bytes().all(allowed) {
        return Err(format!("a name is 1 to {} of A-Z a-z 0-9 _ -", limits::NAME_BYTES_MAX));
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests;
