//! Threads that let others have the cores first.

/// Lets other threads have the cores before the calling one, which messages call `who`. A system that doesn't
/// allow that is no reason to do without the thread.
pub(crate) fn be_nice(who: &str, niceness: i32) {
    // Linux keeps niceness by thread; elsewhere this would be the process's.
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::setpriority_process(Some(rustix::thread::gettid()), niceness) {
        tracing::warn!(%error, "the {who} thread takes as much of the cores as any other: its niceness can't be set");
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (who, niceness);
}
