//! Every bound of the system: its value, its unit, what happens when it is met, and the relations
//! between bounds, proved at compile time. Bounds an operator may change are in [`crate::settings`];
//! those two meet here only through the maxima.

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// Longest key in bytes. A longer one is refused as invalid.
pub const KEY_BYTES_MAX: usize = 4 * KIB;
/// Longest value in bytes. A longer one is refused as invalid.
pub const VALUE_BYTES_MAX: usize = 8 * MIB;
/// Longest database name in bytes.
pub const NAME_BYTES_MAX: usize = 64;
/// Most replicas a shard may have.
pub const REPLICAS_MAX: u32 = 7;
/// Most shards a database may have.
pub const SHARDS_MAX: u32 = 4096;
/// Voters of the metadata shard when a cluster is formed (fewer if there are fewer nodes; odd).
pub const METADATA_VOTERS_MAX: usize = 5;

/// Most operations in one client batch. More are refused as invalid; the client library splits.
pub const BATCH_OPERATIONS_MAX: usize = 1024;
/// A client library batch is closed at this many bytes of keys and values, unless it holds a single operation.
pub const BATCH_BYTES_MAX: usize = MIB;
/// Most commands in one log entry; the rest waits for the next.
pub const ENTRY_COMMANDS_MAX: usize = 1024;
/// A log entry is closed at this many bytes, unless it holds a single command.
pub const ENTRY_TARGET_BYTES: usize = MIB;
/// Greatest log entry in bytes: one command of the greatest size.
pub const ENTRY_BYTES_MAX: usize = VALUE_BYTES_MAX + 2 * KEY_BYTES_MAX + VALUE_BYTES_MAX + 64;
/// Entries that raft packs into one append message, unless a single entry is greater.
pub const APPEND_TARGET_BYTES: usize = MIB;
/// Append messages under way to one follower.
pub const APPENDS_IN_FLIGHT_MAX: usize = 128;
/// Greatest peer frame in bytes; a greater one closes the connection.
pub const FRAME_BYTES_MAX: usize = 32 * MIB;
/// A peer link closes a frame at this many bytes.
pub const FRAME_TARGET_BYTES: usize = MIB;
/// Greatest message that is read from a Cap'n Proto connection, in bytes.
pub const TRAVERSAL_BYTES_MAX: usize = 64 * MIB;
/// Deepest nesting read from a Cap'n Proto message.
pub const NESTING_MAX: i32 = 16;

/// Bytes of entries proposed and not yet committed in one group; above, proposals are `Busy`.
pub const UNCOMMITTED_BYTES_MAX: usize = 64 * MIB;
/// Proposals and reads that wait in one replica; above, requests are `Busy`.
pub const REPLICA_PENDING_MAX: usize = 16 * 1024;
/// Bytes of committed entries taken from raft in one pass, so that one group can't hold its thread.
pub const APPLY_PASS_BYTES: u64 = MIB as u64;
/// Bytes of recent log entries a group keeps in memory beyond those it must.
pub const ENTRY_CACHE_BYTES: usize = 2 * MIB;

/// Bytes waiting in the outbox to one peer; above, messages are dropped and raft sends them again.
pub const OUTBOX_BYTES_MAX: usize = 64 * MIB;
/// Log writes are gathered into one append of the log engine up to this many bytes.
pub const LOG_WRITE_TARGET_BYTES: usize = 4 * MIB;

/// A flush hands the state engine batches of at most so many keys, so that readers get their turn.
pub const FLUSH_BATCH_KEYS: usize = 256;
/// A flush batch is closed at this many bytes of keys and values.
pub const FLUSH_BATCH_BYTES: usize = 64 * KIB;

/// Connections a node accepts on its client port; more wait in the listen queue.
pub const CLIENT_CONNECTIONS_MAX: usize = 4096;
/// Connections a node accepts on its peer port.
pub const PEER_CONNECTIONS_MAX: usize = 1024;

/// Pairs in one page of a scan.
pub const SCAN_PAIRS_MAX: usize = 1000;
/// Bytes in one page of a scan; a page always has at least one pair.
pub const SCAN_BYTES_MAX: usize = MIB;

/// Length of a raft tick in milliseconds.
pub const TICK_MS: u64 = 100;
/// Ticks between heartbeats of a leader.
pub const HEARTBEAT_TICKS: usize = 2;
/// Least election timeout in ticks.
pub const ELECTION_TICKS_MIN: usize = 10;
/// Greatest election timeout in ticks, exclusive.
pub const ELECTION_TICKS_MAX: usize = 20;

/// Crashes of one replica within [`CRASH_WINDOW_MS`] after which it is quarantined.
pub const CRASHES_MAX: usize = 5;
/// Window for counting crashes, in milliseconds.
pub const CRASH_WINDOW_MS: u64 = 60_000;
/// First delay before a crashed replica is rebuilt, in milliseconds; doubles with each crash in the window.
pub const RESTART_BACKOFF_MS: u64 = 50;

/// Deadline of a request that names none, in milliseconds.
pub const TIMEOUT_DEFAULT_MS: u64 = 10_000;
/// Longest deadline a request may name, in milliseconds; a longer one is cut to this.
pub const TIMEOUT_MAX_MS: u64 = 600_000;
/// Hint sent with `Busy`, in milliseconds.
pub const BUSY_RETRY_MS: u32 = 10;
/// A stopping node exits at the latest after this many milliseconds.
pub const STOP_MS_MAX: u64 = 5_000;

// value ≤ entry ≤ append message ≤ frame ≤ traversal limit.
const _: () = assert!(KEY_BYTES_MAX + VALUE_BYTES_MAX <= ENTRY_BYTES_MAX);
const _: () = assert!(ENTRY_TARGET_BYTES <= ENTRY_BYTES_MAX);
const _: () = assert!(ENTRY_BYTES_MAX + APPEND_TARGET_BYTES <= FRAME_BYTES_MAX);
const _: () = assert!(FRAME_TARGET_BYTES <= FRAME_BYTES_MAX);
const _: () = assert!(FRAME_BYTES_MAX <= TRAVERSAL_BYTES_MAX);
const _: () = assert!(FRAME_BYTES_MAX <= OUTBOX_BYTES_MAX);
const _: () = assert!(ENTRY_BYTES_MAX <= UNCOMMITTED_BYTES_MAX);
const _: () = assert!(BATCH_OPERATIONS_MAX <= REPLICA_PENDING_MAX);
const _: () = assert!(HEARTBEAT_TICKS * 2 < ELECTION_TICKS_MIN);
const _: () = assert!(ELECTION_TICKS_MIN < ELECTION_TICKS_MAX);
// Distinct election windows, one tick wide, for all replicas of a group.
const _: () = assert!(ELECTION_TICKS_MAX - ELECTION_TICKS_MIN >= REPLICAS_MAX as usize);
