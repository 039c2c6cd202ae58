//! The arguments of `trace`.

use std::ffi::OsString;

use clap::{Args, Subcommand};

use crate::cli::args::PutArgs;

/// `trace`
#[derive(Subcommand, Debug)]
pub enum TraceCommand {
    /// Set a key's value, and show where the time of the write went
    #[command(after_help = "\
Examples:
  pontoon trace put testDB bob hello
  pontoon trace put testDB bob hello --repeat 100 --json

The write is as good as one of `pontoon set`; but it has no session, so it isn't sent again when its
outcome isn't known (exit code 4).")]
    Put(TracePutArgs),
    /// Read a key, and show where the time of the read went
    #[command(after_help = "\
Examples:
  pontoon trace get testDB bob
  pontoon trace get testDB bob --repeat 100

A key that doesn't exist is read like any other.")]
    Get(TraceGetArgs),
}

/// `trace put`
#[derive(Args, Debug)]
pub struct TracePutArgs {
    /// What is set.
    #[command(flatten)]
    pub put: PutArgs,
    /// How often.
    #[command(flatten)]
    pub repeat: Repeat,
}

/// `trace get`
#[derive(Args, Debug)]
pub struct TraceGetArgs {
    /// Database
    #[arg(value_name = "DB")]
    pub db: String,
    /// Key; may begin with `-`
    #[arg(value_name = "KEY", allow_hyphen_values = true)]
    pub key: OsString,
    /// How often.
    #[command(flatten)]
    pub repeat: Repeat,
}

/// How often an operation is traced.
#[derive(Args, Debug, Clone, Copy)]
pub struct Repeat {
    /// Do it so often, one after the other, and show the median of each stage
    #[arg(long = "repeat", value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub times: u32,
}
