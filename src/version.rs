//! Versions: of the software, of the protocols it speaks, of what it writes to disk.

use std::sync::LazyLock;

/// Version of the software.
pub const SOFTWARE: &str = env!("CARGO_PKG_VERSION");
/// Git commit that the program was built from, shortened; `unknown` outside a repository.
pub const COMMIT: &str = env!("PONTOON_COMMIT");

/// Oldest protocol version understood, from clients and from other nodes.
pub const PROTOCOL_MIN: u32 = 1;
/// Newest protocol version understood.
pub const PROTOCOL_MAX: u32 = 2;
/// The protocol version from which on a node knows sessions.
pub const PROTOCOL_SESSIONS: u32 = 2;
/// What a node says that takes several batches in one call.
pub const FEATURE_GATHER: &str = "gather";
/// Version of the data directory's format. A node refuses a directory of a newer one.
pub const DISK_FORMAT: u32 = 2;

// That of its parts that has changed most often.
const _: () = assert!(DISK_FORMAT == crate::storage::keys::FORMAT_VERSION);
const _: () = assert!(PROTOCOL_MIN <= PROTOCOL_SESSIONS && PROTOCOL_SESSIONS <= PROTOCOL_MAX);

/// What `pontoon --version` prints after the name.
pub fn version_line() -> &'static str {
    static LINE: LazyLock<String> = LazyLock::new(|| {
        let protocol = match PROTOCOL_MIN == PROTOCOL_MAX {
            true => format!("{PROTOCOL_MAX}"),
            false => format!("{PROTOCOL_MIN}–{PROTOCOL_MAX}"),
        };
        format!("{SOFTWARE} (commit {COMMIT}, protocol {protocol}, disk format {DISK_FORMAT})")
    });
    &LINE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commit_is_one_or_unknown() {
        let hexadecimal = COMMIT.len() >= 7 && COMMIT.bytes().all(|b| b.is_ascii_hexdigit());
        assert!(COMMIT == "unknown" || hexadecimal, "{COMMIT}");
        assert!(version_line().starts_with(SOFTWARE));
        assert!(version_line().contains(COMMIT));
    }
}
