//! The `pontoon` binary: arguments to [`pontoon::cli`], and its exit code.

/// Each write passes through a dozen small allocations on several threads, which glibc's allocator makes dear.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    std::process::ExitCode::from(pontoon::cli::run(std::env::args_os()).code())
}
