//! The subcommands of the `pontoon` binary.
