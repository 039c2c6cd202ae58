//! The `pontoon` binary: arguments to [`pontoon::cli`], and its exit code.

fn main() -> std::process::ExitCode {
    std::process::ExitCode::from(pontoon::cli::run(std::env::args_os()).code())
}
