//! The binary as a user meets it: every command against clusters that run, on real sockets and disks.
//! Each test has a home of its own, so that they run side by side.

#[path = "support/cluster.rs"]
mod cluster;
#[path = "support/cli.rs"]
mod harness;

#[path = "cli/admin.rs"]
mod admin;
#[path = "cli/data.rs"]
mod data;
#[path = "cli/degraded.rs"]
mod degraded;
#[path = "cli/exit_codes.rs"]
mod exit_codes;
#[path = "cli/hung.rs"]
mod hung;
#[path = "cli/local.rs"]
mod local;
#[path = "cli/operations.rs"]
mod operations;
#[path = "cli/quick_start.rs"]
mod quick_start;
#[path = "cli/report.rs"]
mod report;
#[path = "cli/status.rs"]
mod status;
#[path = "cli/trace.rs"]
mod trace;
