//! `completions`: scripts that complete the command line in a shell.

use clap::CommandFactory;
use clap_complete::{Shell, generate};

use super::args::{Cli, CompletionShell, CompletionsArgs};
use super::failure::{Exit, Failure};
use super::output;

/// `completions bash|zsh|fish`
pub fn completions(args: &CompletionsArgs) -> Result<Exit, Failure> {
    let shell = match args.shell {
        CompletionShell::Bash => Shell::Bash,
        CompletionShell::Zsh => Shell::Zsh,
        CompletionShell::Fish => Shell::Fish,
    };
    // By way of memory: the generator panics when stdout is closed.
    let mut script = Vec::new();
    generate(shell, &mut Cli::command(), "pontoon", &mut script);
    output::bytes(&script)?;
    Ok(Exit::Done)
}
