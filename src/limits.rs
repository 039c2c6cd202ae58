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
/// Members of a group at any time: as many voters as there can be, and one that comes for each.
pub const MEMBERS_MAX: usize = 2 * REPLICAS_MAX as usize;

/// Traced batches of one replica at a time, and entries whose times its leader wants; of more than that, less is known.
pub const TRACES_MAX: usize = 64;
/// Entries that a learner may lack and be made a voter: it has them a moment later.
pub const CAUGHT_UP_ENTRIES_MAX: u64 = 1024;
/// Bytes of entries that a learner may lack and be made a voter.
pub const CAUGHT_UP_BYTES_MAX: u64 = 4 * MIB as u64;
/// Most shards a database may have.
pub const SHARDS_MAX: u32 = 16 * 1024;
/// Shortest time after which a node that is gone may be replaced, in milliseconds: longer than a restart, and
/// than some surveys that go unanswered.
pub const REPLACE_AFTER_MS_MIN: u64 = 10_000;
/// Longest time after which a node that is gone is replaced, in milliseconds: a year.
pub const REPLACE_AFTER_MS_MAX: u64 = 365 * 24 * 3_600_000;
/// Most shards whose members may change at the same time.
pub const MOVES_AT_A_TIME_MAX: u32 = 1024;
/// Least that a node may be allowed to send in snapshots, in bytes per second: at less a move never ends.
pub const BYTES_PER_SECOND_MIN: u64 = 64 << 10;
/// Most that such a limit may be, in bytes per second: no network carries more.
pub const BYTES_PER_SECOND_MAX: u64 = 1 << 40;
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
/// Append messages under way to one follower; entries that come meanwhile share the next.
pub const APPENDS_IN_FLIGHT_MAX: usize = 32;
/// Greatest peer frame in bytes; a greater one closes the connection.
pub const FRAME_BYTES_MAX: usize = 32 * MIB;
/// A peer link closes a frame at this many bytes.
pub const FRAME_TARGET_BYTES: usize = MIB;
/// Greatest message that is read from a Cap'n Proto connection, in bytes.
pub const TRAVERSAL_BYTES_MAX: usize = 64 * MIB;
/// Deepest nesting read from a Cap'n Proto message.
pub const NESTING_MAX: i32 = 16;

/// Bytes of entries proposed and not yet committed in one group; above, proposals are `Busy`.
pub const UNCOMMITTED_BYTES_MAX: usize = 32 * MIB;
/// Proposals and reads that wait in one replica; above, requests are `Busy`.
pub const REPLICA_PENDING_MAX: usize = 16 * 1024;
/// Rounds of linearizable reads that wait for a quorum at a time; reads that arrive meanwhile share the next.
pub const READ_ROUNDS_MAX: usize = 1;
/// Log writes of one group that are not yet durable, above which new commands wait to share an entry.
pub const WRITES_IN_FLIGHT_MAX: usize = 4;
/// While a log write of the group is under way its commands wait to share the next entry, until so many do.
pub const PROPOSE_COMMANDS_MIN: usize = 128;
/// The same in bytes of commands: where they are large, more writes under way carry more.
pub const PROPOSE_BYTES_MIN: usize = 64 * KIB;
/// Bytes of committed entries taken from raft in one pass, so that one group can't hold its thread.
pub const APPLY_PASS_BYTES: u64 = MIB as u64;
/// Bytes of log that a replica has yet to apply, above which it begins no election.
pub const CAMPAIGN_BACKLOG_BYTES_MAX: u64 = 16 * MIB as u64;
/// Reads of the state engine in one pass of applying, after which the rest is left for the next pass; the
/// entry at hand is finished.
pub const APPLY_PASS_READS: u64 = 128;
/// Commands of one entry that must read before they write, at most; further ones wait for the next entry.
pub const ENTRY_READS_MAX: usize = 128;
/// Bytes of recent log entries a group keeps in memory beyond those it must: for followers that are a
/// little behind. Older ones are read from the log.
pub const ENTRY_CACHE_BYTES: usize = MIB;
/// Bytes of log entries in memory of all groups of a node, above which each keeps only what it must.
pub const ENTRY_CACHE_NODE_BYTES: usize = 16 * MIB;

/// Replicas that a node reads from disk and starts at a time; further ones wait for those.
pub const REPLICAS_OPENED_AT_A_TIME: usize = 256;
/// Messages in a replica's mailbox; above, requests are `Busy` and raft messages are dropped.
pub const REPLICA_MAILBOX_MAX: usize = 4 * 1024;
/// Batches in the mailbox of a thread that owns replicas; above, raft messages are dropped.
pub const HUB_MAILBOX_MAX: usize = 16 * 1024;
/// Ticks between looks whether the log can be compacted further.
pub const COMPACT_TICKS: u64 = 50;

/// An outbox that is empty keeps room for so many messages.
pub const OUTBOX_ROOM_KEPT: usize = 1024;
/// Bytes waiting in the outbox to one peer; above, messages are dropped and raft sends them again.
pub const OUTBOX_BYTES_MAX: usize = 32 * MIB;
/// Log writes are gathered into one append of the log engine up to this many bytes.
pub const LOG_WRITE_TARGET_BYTES: usize = 2 * MIB;
/// While more waits than that, no replica has more than one part of so many of it before all others had theirs.
pub const LOG_WRITE_PARTS: usize = 8;
/// Writes that others pass by at a time in the queue of the log writer; those behind wait with them.
pub const LOG_PASSED_MAX: usize = 1024;
/// Bytes of entries that may wait in a node for their replica or for the log writer. Above, appends of
/// leaders are dropped, and raft sends them again. What a node's own leaders propose is bounded by
/// each group's limits; the writer takes it still, since an arbiter must not block, and complains.
pub const LOG_QUEUE_BYTES_MAX: usize = 256 * MIB;
/// The log writer's queue keeps room for so many writes when it is empty.
pub const LOG_QUEUE_ROOM_KEPT: usize = 1024;
/// What a job or a fence in the log writer's queue counts for, in bytes.
pub const LOG_JOB_BYTES: usize = 256;
/// Time between purges of the log, in milliseconds.
pub const LOG_PURGE_MS: u64 = 10_000;

/// A flush hands the state engine batches of at most so many keys, so that readers get their turn.
pub const FLUSH_BATCH_KEYS: usize = 256;
/// A flush tells of replicas that it is done with when their tables have this many bytes together, so that their
/// memory is free before all others' is.
pub const FLUSH_PART_BYTES: usize = MIB;
/// An engine that takes in sorted runs gets a flush in runs of tables of this many bytes: each is synced by
/// itself, and until that nothing of it frees memory.
pub const FLUSH_RUN_BYTES: usize = 16 * MIB;
/// Where little of the disk is free, memtables are flushed when they come to this part of it, so that there is room for each.
pub const FLUSH_FREE_PART: u64 = 8;
/// But not before they have this many bytes: each flush takes some syncs.
pub const FLUSH_TIGHT_BYTES_MIN: u64 = 64 * KIB as u64;
/// A flush batch is closed at this many bytes of keys and values.
pub const FLUSH_BATCH_BYTES: usize = 64 * KIB;

/// Bytes of writes outside of flushes that the fjall engine keeps in memory before it makes a table of them.
pub const FJALL_PENDING_BYTES: u64 = 8 * MIB as u64;
/// Tables of the fjall engine that wait to be merged; who would make one more merges them first.
pub const FJALL_TABLES_WAITING_MAX: usize = 16;
/// Where they can't be merged for want of space, so many runs of them are the most: the file that names them has one byte
/// for their number.
pub const FJALL_RUNS_MAX: usize = 128;
/// Free space that a merge leaves for flushes and logs, in bytes, or half of what there is when it begins, if that is less.
pub const FJALL_SPARED_BYTES: u64 = 128 * MIB as u64;
/// Niceness of the thread that merges them.
pub const COMPACTION_NICE: i32 = SNAPSHOT_NICE;

/// Bytes of records in one block of a snapshot file, which has one checksum.
pub const SNAPSHOT_BLOCK_BYTES: usize = 256 * KIB;
/// A snapshot file that is being written is synced each time so many bytes were added, so that no
/// sync of the log waits behind one of gigabytes.
pub const SNAPSHOT_SYNC_BYTES: u64 = 8 * MIB as u64;
/// Bytes of redo files that are kept for one snapshot which is being made; above, it is given up: the
/// shard is written faster than it is read.
pub const SNAPSHOT_REDO_BYTES_MAX: u64 = 8 * 1024 * MIB as u64;
/// Bytes of all snapshot files of a node, made and received; above, no more is made or received.
pub const SNAPSHOT_FILES_BYTES_MAX: u64 = 256 * 1024 * MIB as u64;

/// Connections a node accepts on its client port; more wait in the listen queue.
pub const CLIENT_CONNECTIONS_MAX: usize = 4096;
/// Client connections that wait to be accepted; those beyond are tried again by the client's kernel, a
/// second later.
pub const CLIENT_LISTEN_QUEUE: i32 = 1024;
/// Connections a node accepts on its peer port.
pub const PEER_CONNECTIONS_MAX: usize = 1024;

/// Pairs in one page of a scan.
pub const SCAN_PAIRS_MAX: usize = 1000;
/// Bytes in one page of a scan; a page always has at least one pair.
pub const SCAN_BYTES_MAX: usize = MIB;

/// Bytes of keys and values that one page of a scan reads; it ends with the pair that exceeds them, also
/// if only keys are asked for.
pub const SCAN_READ_BYTES_MAX: usize = 4 * SCAN_BYTES_MAX;
/// Reads that wait for the state store of a node; above, they are `Busy`.
pub const READS_WAITING_MAX: usize = 16 * 1024;
/// Longest value that is kept in memory because it was read, in bytes; a longer one is read from the state store
/// each time, as it would take the place of too many.
pub const LEARNED_BYTES_MAX: usize = 64 * KIB;
/// Ticks after which a node that is short of memory forgets what it has read and nobody asks for.
pub const KNOWN_AGE_TICKS: u64 = 100;
/// For how many of those a page of a scan counts.
pub const SCAN_WEIGHT: usize = 32;
/// Ticks without an answer after which a follower counts as dead: less log is kept for it.
pub const FOLLOWER_DEAD_TICKS: u64 = 100;
/// Times `storage.log_bytes` that a node keeps of its log, beyond that, for followers on their way back by snapshots, all
/// of its groups together.
pub const HELD_LOG_FACTOR: u64 = 4;
/// Ticks after a failed snapshot before the next is made for the same follower.
pub const SNAPSHOT_RETRY_TICKS: u64 = 20;
/// Ticks for which less log is kept after the node has found its log too large. Longer than the time
/// between two such looks ([`LOG_PURGE_MS`]).
pub const LOG_PRESSED_TICKS: u64 = 150;

/// Length of a raft tick in milliseconds.
pub const TICK_MS: u64 = 100;
/// Ticks between heartbeats of a leader.
pub const HEARTBEAT_TICKS: usize = 2;
/// Heartbeats in a row that a leader spares a follower which has acknowledged appends meanwhile.
pub const BEATS_SPARED_MAX: u32 = 2;
/// It does so when all followers have acknowledged appends before more heartbeats in a row than this.
pub const BEATS_STEADY_MIN: u32 = 2;
/// Ticks between attempts of a new group's preferred leader to be elected before any timeout.
pub const EAGER_TICKS: u64 = 2;
/// Time after which it asks a second time, in milliseconds: the others are being made. It doubles with each attempt, up to
/// [`EAGER_TICKS`].
pub const EAGER_MS_MIN: u64 = 5;
/// Ticks between the turns of the voters of a group whose leader's process is gone: as long as an election takes where disks
/// are slow.
pub const VACANT_TICKS: usize = 2;
/// Least election timeout in ticks.
pub const ELECTION_TICKS_MIN: usize = 10;
/// By how much the term of a peer's message may be beyond a replica's own; a message of a later one is
/// dropped. A term rises by one with each election, so no peer gets so far ahead; believed, a term at
/// the end of its range would leave the group without any for its next election.
pub const TERM_JUMP_MAX: u64 = 1 << 32;
/// Greatest election timeout in ticks, exclusive.
pub const ELECTION_TICKS_MAX: usize = 20;

/// Longest time between heartbeats of a node to every other, in milliseconds. They come as often as those of a group
/// would ([`HEARTBEAT_TICKS`]), for which they stand while it sleeps.
pub const NODE_HEARTBEAT_MS: u64 = 500;
/// Time a stopping node gives its connections to write their last answers, in milliseconds.
pub const LAST_ANSWERS_MS: u64 = 20;
/// Time a stopping node gives to operations in flight, which the next leader may still commit, in
/// milliseconds.
pub const IN_FLIGHT_MS_MAX: u64 = 1_000;
/// Longest time after which a node repeats what the cluster refuses it, in milliseconds; the first is
/// [`NODE_HEARTBEAT_MS`], and it doubles with each refusal.
pub const REFUSED_MS_MAX: u64 = 30_000;
/// Time between attempts to become a member, in milliseconds.
pub const MEMBERSHIP_RETRY_MS: u64 = 200;
/// The first such time, which doubles up to [`MEMBERSHIP_RETRY_MS`]: nodes that form a cluster are often started together.
pub const MEMBERSHIP_RETRY_MS_MIN: u64 = 5;
/// Time for one attempt to reach the metadata leader, in milliseconds.
pub const META_ATTEMPT_MS: u64 = 3_000;
/// Time between such attempts, in milliseconds.
pub const META_RETRY_MS: u64 = 20;
/// Time that the drop of a database waits for its replicas to end, in milliseconds.
pub const DROP_SETTLE_MS_MAX: u64 = 2_000;
/// Time for a node to hear of others that have joined, before a database is refused for want of nodes, in
/// milliseconds.
pub const PLAN_SETTLE_MS_MAX: u64 = 1_500;
/// Time between measurements of the data directory's size, in milliseconds.
pub const DISK_MEASURE_MS: u64 = 10_000;
/// Time between looks at the free space of the data directory's file system, in milliseconds.
pub const DISK_WATCH_MS: u64 = 1_000;
/// Time after which the last word of another node on its disk is not believed any more, in milliseconds.
pub const DISK_NEWS_MS_MAX: u64 = 5_000;
/// Free space without which a node doesn't start, in bytes: opening its stores takes some.
pub const START_FREE_BYTES_MIN: u64 = 16 * MIB as u64;
/// Hint sent with `DiskFull`, in milliseconds: space comes back, or leadership moves, not at once.
pub const DISK_FULL_RETRY_MS: u32 = 100;
/// Ticks between attempts of a leader on a full disk to hand its leadership over. While one lasts, at
/// most [`TRANSFER_TICKS_MAX`], the group takes no commands, so most of the time there is none.
pub const MAKE_WAY_TICKS: u64 = 30;
/// Ticks after which a replica that pauses applying for want of memory counts as held up: as a leader it hands over,
/// and it takes no leadership. A flush takes less, unless the disk can't keep up.
pub const HELD_UP_TICKS: u64 = 20;
/// Time between two attempts of a leader that leaves its group to hand leadership over: twice as long as one takes at most,
/// and no whole number of those, so that each voter has its turn.
pub const GIVE_WAY_TICKS: u64 = 5 * ELECTION_TICKS_MIN as u64 / 2;
/// A write of the raft log that takes longer than this, in milliseconds, is a stall: leaders of the
/// node hand over.
pub const LOG_STALL_MS: u64 = 1_000;
/// Work on the state store that hasn't come a step further for so long, in milliseconds, ends the node. A step is a batch of a
/// flush, a sync, or a query: the slowest disk that is of any use does it in less.
pub const STATE_STALL_MS: u64 = 60_000;
/// Time between looks whether work on the state store gets on, in milliseconds.
pub const STATE_LOOK_MS: u64 = 1_000;
/// Time between attempts to write to a log or a redo file whose disk is full, in milliseconds.
pub const DISK_FULL_WAIT_MS: u64 = 250;
/// Time for a pull of the cluster map from a peer, in milliseconds.
pub const MAP_PULL_MS_MAX: u64 = 3_000;
/// Time between saves of the cluster map while shards move, in milliseconds: a start without the metadata shard would miss what
/// changed after the last.
pub const MAP_SAVE_MS: u64 = 200;
/// A node that hasn't heard from the metadata shard for so long says that it is cut off, in milliseconds: others may know
/// of changes that it hasn't heard of.
pub const MAP_STALE_MS: u64 = 5_000;
/// Time between surveys of all nodes by the one that leads the metadata shard, in milliseconds.
pub const SURVEY_MS: u64 = 1_000;
/// Time between a step that was done and the next survey, in milliseconds.
pub const SURVEY_SOON_MS: u64 = 200;
/// Time for a node's answer to a survey, in milliseconds.
pub const SURVEY_MS_MAX: u64 = 2_000;
/// Time for an order to a shard's leader to be carried out, in milliseconds.
pub const ORDER_MS_MAX: u64 = 5_000;
/// Orders and commands of the reconciler that are under way at a time.
pub const ORDERS_MAX: usize = 64;
/// Least time between two counts of what a shard holds, in milliseconds.
pub const COUNT_MS: u64 = 30_000;
/// Pairs that are counted before other reads get their turn.
pub const COUNT_STEP_PAIRS: usize = 256;
/// Bytes of keys and values that are counted before other reads get their turn, at least one pair.
pub const COUNT_STEP_BYTES: usize = 256 * KIB;
/// Counting takes one part in so many of the read thread's time.
pub const COUNT_SHARE: u32 = 8;
/// Ticks for which a replica keeps its state still at a mark until somebody asks for its digest.
pub const VIEW_TICKS: u64 = 50;
/// Time between looks whether a replica's state is flushed up to a mark, in milliseconds.
pub const VIEW_POLL_MS: u64 = 10;
/// Time for a replica to apply a shard's log up to a mark, or to come back if it isn't there, in milliseconds. That
/// long it is waited for; what takes longer isn't over in a moment, and holds up those that wait with it.
pub const VIEW_MS_MAX: u64 = 20_000;
/// Time for a mark to come into the log of a shard, in milliseconds: for a leader to be elected, and found.
pub const MARK_MS_MAX: u64 = 10_000;
/// Nodes that are asked in turn to find the leader of a shard whose replicas are to be compared.
pub const MARKERS_MAX: usize = 3;
/// Time between looks whether a node that takes a digest is there still, in milliseconds.
pub const VERIFY_LOOK_MS: u64 = 5_000;
/// Looks in vain, one after the other, after which a node that takes a digest isn't waited for any more.
pub const VERIFY_LOOKS_MAX: usize = 3;
/// Attempts at comparing the replicas of a shard that go on too fast for it.
pub const VERIFY_ATTEMPTS_MAX: usize = 5;
/// Time for comparing the replicas of a shard once, unless the caller has less, in milliseconds.
pub const VERIFY_MS_MAX: u64 = TIMEOUT_MAX_MS;
/// Time between a heartbeat of a node and the moment from which it isn't taken for alive any more, where
/// another process claims to be it, in milliseconds.
pub const ALIVE_MS: u64 = 3 * NODE_HEARTBEAT_MS;
/// Time for which a node that starts goes on asking whether another process is it, once a node has said
/// so, in milliseconds: long enough for a connection of its own last process to be given up.
pub const DUPLICATE_MS_MAX: u64 = 2 * ALIVE_MS;
/// Time that a removed node gives its data to go before it ends, in milliseconds.
pub const LEAVE_MS_MAX: u64 = 10_000;
/// Time between looks of a node that waits to be approved, in milliseconds.
pub const APPROVAL_MS: u64 = 2_000;
/// Time for a node's record to come to the node that it joins through, in milliseconds.
pub const JOIN_SEEN_MS_MAX: u64 = 2_000;

/// Time for a replica's answer to a status question, in milliseconds.
pub const STATUS_MS_MAX: u64 = 1_000;
/// Time for a probe of another node, in milliseconds.
pub const PROBE_MS_MAX: u64 = 1_000;
/// Time for a request to join, which waits for the metadata shard, in milliseconds.
pub const JOIN_MS_MAX: u64 = 3_000;
/// Time within which leadership is handed over when a node stops, in milliseconds.
pub const HAND_OVER_MS_MAX: u64 = 1_500;
/// Crashes of one replica within [`CRASH_WINDOW_MS`] after which it is quarantined.
pub const CRASHES_MAX: usize = 5;
/// Window for counting crashes, in milliseconds.
pub const CRASH_WINDOW_MS: u64 = 60_000;
/// First delay before a crashed replica is rebuilt, in milliseconds; doubles with each crash in the window.
pub const RESTART_BACKOFF_MS: u64 = 50;
/// Longest delay before a replica that can't be opened is tried again, in milliseconds; the first is
/// [`RESTART_BACKOFF_MS`], and it doubles with each attempt.
pub const REOPEN_MS_MAX: u64 = 30_000;

/// A node whose last answer to the reconciler is older than this doesn't count as alive, in milliseconds.
pub const SURVEY_FRESH_MS: u64 = 5_000;
/// By how much one step of the reconciler lengthens the time for which a node is known not to answer, at
/// most, in milliseconds: a reconciler that stood still has heard nobody, which says nothing of the others.
pub const SILENCE_STEP_MS_MAX: u64 = 3_000;
/// A move to a node that hasn't answered for this time is rolled back, in milliseconds.
pub const NEWCOMER_SILENT_MS: u64 = 30_000;
/// A replica that is sick, or isn't there, for this time is replaced, in milliseconds; so is one on a node at
/// whose address another runs by now. And a move that lacks something for this time is rolled back.
pub const SICK_MS: u64 = 60_000;
/// The nodes must have been the same ones, all of them alive, for this time before load is spread anew, in
/// milliseconds.
pub const SETTLE_MS: u64 = 10_000;
/// Time for which a new replica may get no further beside what copying the shard takes, in milliseconds; then its
/// move counts as one that lacks something.
pub const CATCH_UP_STILL_MS: u64 = 600_000;
/// Bytes per second that copying is taken to manage where the policy sets no limit: half of what it usually does
/// on a slow disk.
pub const CATCH_UP_BYTES_PER_SECOND: u64 = 32 * MIB as u64;
/// Time for which no new replica of a shard is put on a node on which one came to nothing, as long as there
/// are other nodes, in milliseconds.
pub const SHUN_MS: u64 = 300_000;
/// Time between looks whether load is even, in milliseconds.
pub const EVEN_LOOK_MS: u64 = 5_000;
/// First delay before the reconciler names a step again that nothing shows to be done, in milliseconds;
/// doubles.
pub const STEP_RETRY_MS_MIN: u64 = 1_000;
/// Longest delay before that, in milliseconds.
pub const STEP_RETRY_MS_MAX: u64 = 30_000;
/// Time for a replica to come near enough to the end of the log to lead, before leadership is not handed to it, in milliseconds.
pub const TRANSFER_WAIT_MS: u64 = 1_000;
/// Ticks after which a leader gives up to hand leadership over: it takes no commands meanwhile. A successor that
/// is well takes it within a few round trips and two syncs.
pub const TRANSFER_TICKS_MAX: u64 = 4;
/// Time after which a transfer of leadership has lapsed for whoever asked for it, in milliseconds.
pub const TRANSFER_MS_MAX: u64 = 3 * TICK_MS * TRANSFER_TICKS_MAX / 2;
/// Time for which no leadership is handed to a node that has not taken one, in milliseconds; doubles each time it
/// doesn't.
pub const TRANSFER_AGAIN_MS_MIN: u64 = 2_000;
/// Longest such time, in milliseconds.
pub const TRANSFER_AGAIN_MS_MAX: u64 = 60_000;
/// Leaderships that the reconciler moves in one step; further ones wait for the next.
pub const LEADER_TRANSFERS_MAX: usize = 8;
/// Shards that one rebalancing gives targets; a plan for more is cut, and the rest is planned anew afterwards.
pub const REBALANCE_TARGETS_MAX: usize = 16 * 1024;
/// Time for which a rebalancing whose replicas are all in place waits for its leaders, in milliseconds.
pub const REBALANCE_LEADERS_MS_MAX: u64 = 60_000;
/// Shards whose members the reconciler has the map take over in one step; further ones wait for the next.
pub const OBSERVATIONS_MAX: usize = 256;
/// By how much more than other moves repairs may fill the bound on moves at a time: others under way don't
/// hold them up.
pub const REPAIR_MOVES_FACTOR: u32 = 2;

/// Deadline of a request that names none, in milliseconds.
pub const TIMEOUT_DEFAULT_MS: u64 = 10_000;
/// Longest deadline a request may name, in milliseconds; a longer one is cut to this.
pub const TIMEOUT_MAX_MS: u64 = 600_000;
/// Hint sent with `Busy`, in milliseconds.
pub const BUSY_RETRY_MS: u32 = 10;
/// A stopping node exits at the latest after this many milliseconds.
pub const STOP_MS_MAX: u64 = 5_000;

/// Nodes that `pontoon setup` runs in one process at most.
pub const LOCAL_NODES_MAX: u32 = 32;
/// Concurrent clients of `pontoon bench` at most.
pub const BENCH_CLIENTS_MAX: u32 = 16 * 1024;
/// Longest line that `pontoon import` reads: the greatest pair with every byte escaped as `\u00XX`.
pub const IMPORT_LINE_BYTES_MAX: usize = 6 * (KEY_BYTES_MAX + VALUE_BYTES_MAX) + 4 * KIB;
/// Pairs that `pontoon import` puts into one batch.
pub const IMPORT_BATCH_PAIRS: usize = 256;
/// Batches that `pontoon import` has under way; it reads on when one is done.
pub const IMPORT_BATCHES_IN_FLIGHT: usize = 8;
/// Failures that `pontoon import` tells one by one; further ones are only counted.
pub const IMPORT_FAILURES_TOLD: usize = 20;

/// Raft messages in one peer frame; a sender opens another frame, a receiver closes the connection.
pub const FRAME_MESSAGES_MAX: usize = 16 * 1024;
/// Log entries in one raft message; a message with more is not sent, and closes the connection it comes on.
pub const MESSAGE_ENTRIES_MAX: usize = 160 * 1024;
/// Log entries in one peer frame, over all its messages; more close the connection.
pub const FRAME_ENTRIES_MAX: usize = 256 * 1024;
/// Replicas in each list of a snapshot's membership.
pub const SNAPSHOT_MEMBERS_MAX: usize = 64;
/// Greatest frame of a request between nodes, in bytes; a greater one closes the connection.
pub const REQUEST_FRAME_BYTES_MAX: usize = 8 * MIB;
/// Bytes of a snapshot file in one frame.
pub const SNAPSHOT_CHUNK_BYTES: usize = 256 * KIB;
/// Greatest frame of the snapshot lane, in bytes; a greater one closes the connection.
pub const SNAPSHOT_FRAME_BYTES_MAX: usize = SNAPSHOT_CHUNK_BYTES + 4 * KIB;
/// Time without sending of which the allowance is saved up for a burst, in milliseconds.
pub const SNAPSHOT_BURST_MS: u64 = 100;
/// A node makes and loads so many times the bytes of snapshots in a second that it may send: a transfer passes two
/// disks, one after the other, and together they are to take no longer than the way between them.
pub const SNAPSHOT_DISK_FACTOR: u64 = 2;
/// Snapshots that a node sends at a time; more wait.
pub const SNAPSHOTS_SENT_MAX: usize = 4;
/// Snapshots that a node receives at a time; offers of more are `busy`.
pub const SNAPSHOTS_RECEIVED_MAX: usize = 2;
/// Bytes of a snapshot that are made, checked or loaded before other work gets its turn.
pub const SNAPSHOT_STEP_BYTES: usize = 64 * KIB;
/// Niceness of the snapshot thread: where all cores are wanted it gets about a tenth of what another thread
/// gets. Not the greatest, since at times the flush thread waits for a lock of the state engine that it holds.
pub const SNAPSHOT_NICE: i32 = 10;
/// Keys of an old generation of a replica's state that are removed before other work gets its turn.
pub const SWEEP_STEP_KEYS: usize = 1024;
/// A snapshot file that was made is kept so long after its last use, for another follower or another
/// attempt, in milliseconds.
pub const SNAPSHOT_KEEP_MS: u64 = 120_000;
/// First delay before a snapshot whose transfer failed is offered again, in milliseconds; doubles.
pub const SNAPSHOT_AGAIN_MS_MIN: u64 = 100;
/// Longest delay before that, in milliseconds.
pub const SNAPSHOT_AGAIN_MS_MAX: u64 = 2_000;
/// Time without progress after which the transfer of a snapshot is given up, in milliseconds; the group
/// then asks anew, if the follower answers and needs one still.
pub const SNAPSHOT_PATIENCE_MS: u64 = 30_000;
/// Time between looks whether a replica's state was flushed, before a snapshot is made of it, in
/// milliseconds.
pub const SNAPSHOT_FLUSH_WAIT_MS: u64 = 200;
/// Such looks.
pub const SNAPSHOT_FLUSH_WAITS_MAX: usize = 25;
/// Time between looks for snapshot files that nobody needs any more, in milliseconds.
pub const SNAPSHOT_TIDY_MS: u64 = 10_000;
/// A part of a snapshot that nobody has added to for so long is removed, in milliseconds.
pub const SNAPSHOT_PART_MS_MAX: u64 = 3_600_000;
/// After so many milliseconds a snapshot that was `busy` is to be offered again.
pub const SNAPSHOT_BUSY_MS: u32 = 500;
/// Greatest first frame of a peer connection, in bytes.
pub const HELLO_FRAME_BYTES_MAX: usize = 64 * KIB;
/// Text of a refused peer connection, in bytes; the rest is cut off.
pub const REFUSAL_BYTES_MAX: usize = 512;
/// Bytes of control messages (heartbeats, votes, read rounds) waiting for one peer; above, they are dropped.
pub const OUTBOX_CONTROL_BYTES_MAX: usize = 8 * MIB;
/// Requests under way on one peer connection; more wait unread.
pub const PEER_REQUESTS_MAX: usize = 64;
/// Bytes a read from a peer asks for at least; a larger frame grows the buffer as it arrives.
pub const READ_CHUNK_BYTES: usize = 64 * KIB;
/// A connection keeps its read buffer for the frames to come, unless a frame was larger than this.
pub const READ_BUFFER_BYTES_MAX: usize = 2 * MIB;
/// Time for a peer connection to be made, and to pass its handshake, in milliseconds.
pub const CONNECT_MS_MAX: u64 = 2_000;
/// First delay before a lost peer is dialled again, in milliseconds; doubles up to the next.
pub const REDIAL_MS_MIN: u64 = 50;
/// Longest delay before a lost peer is dialled again, in milliseconds.
pub const REDIAL_MS_MAX: u64 = 1_000;
/// A peer link that had nothing to send for so long sends an empty frame, in milliseconds.
pub const KEEPALIVE_MS: u64 = 1_000;
/// A peer connection without progress for so long is closed, in milliseconds, by either side.
pub const PEER_IDLE_MS_MAX: u64 = 5_000;
/// Bytes of RPC messages gathered for one write to a client connection; a writer waits above this.
pub const COALESCE_BYTES_MAX: usize = MIB;
/// Client library: calls under way for one shard; operations that arrive meanwhile share the next.
pub const CALLS_PER_SHARD_MAX: usize = 4;
/// Client library: operations that wait to share the next call while one to their shard is under way, until so many do.
pub const CALL_OPERATIONS_MIN: usize = 128;
/// The same in bytes of keys and values.
pub const CALL_BYTES_MIN: usize = 64 * KIB;
/// Client library: nor do they wait for a call that has been under way for longer than this, in milliseconds.
pub const CALL_GATHER_MS: u64 = 5;
/// Client library: messages with calls of several shards under way to one node; calls made meanwhile share the next.
pub const GATHERS_PER_NODE_MAX: usize = 4;
/// Client library: nor do they wait for longer than this, in milliseconds.
pub const GATHER_HOLD_MS: u64 = 2;
/// Batches in one client call for several shards; a call with more fails. Their operations together are bounded by
/// [`BATCH_OPERATIONS_MAX`].
pub const GATHER_REQUESTS_MAX: usize = BATCH_OPERATIONS_MAX;
/// Such a call is answered when its first batch has ended, and for as long again as that took the others are waited for, but at
/// least for so many milliseconds; what takes longer is told by further answers.
pub const GATHER_ANSWER_MS: u64 = 1;
/// And at most for so many milliseconds: where all are slow, none waits as long again for who is slowest.
pub const GATHER_ANSWER_MS_MAX: u64 = 10;
/// Time in which the further answers must be asked for, in milliseconds; after it what is still under way is given up. Until they
/// are its operations count as under way, so a client that doesn't ask is a load to all others.
pub const GATHER_REST_MS: u64 = 2 * ATTEMPT_MS_MAX;
/// Client library: longest attempt at one node, in milliseconds, so that a hung node is left for another.
pub const ATTEMPT_MS_MAX: u64 = 2_000;
/// Client library: bytes for which an attempt is given one further millisecond.
pub const ATTEMPT_BYTES_PER_MS: u64 = 4 * KIB as u64;
/// Client library: a node of which nothing was heard for so long, though a call waits for it, is asked
/// for a sign of life, in milliseconds.
pub const SILENCE_MS_MAX: u64 = 500;
/// Client library: a node that gives none for so long is left for another, in milliseconds.
pub const SIGN_MS_MAX: u64 = 500;
/// Client library: longest time to connect to a node, its greeting included, in milliseconds.
pub const DIAL_MS_MAX: u64 = 1_000;
/// Client library: a node that takes longer than this to welcome is passed over for now where there is
/// another to ask, in milliseconds; it is dialled on meanwhile.
pub const DIAL_SLOW_MS: u64 = 200;
/// Client library: of several nodes that will do, the next is asked when the one before has taken this
/// long, in milliseconds, or has failed.
pub const STAGGER_MS: u64 = 100;
/// Client library: longest time before a node that couldn't be reached is dialled again, in milliseconds.
pub const DIAL_BACKOFF_MS_MAX: u64 = 500;
/// Client library: first and longest delay before an operation is tried again, in milliseconds.
pub const RETRY_MS_MIN: u64 = 2;
/// See [`RETRY_MS_MIN`].
pub const RETRY_MS_MAX: u64 = 200;
/// Client library: least time between two requests for the cluster map, in milliseconds.
pub const MAP_REFRESH_MS_MIN: u64 = 20;
/// Calls of one client connection that wait for a newer cluster map; further ones fail as overloaded. With
/// [`CLIENT_CONNECTIONS_MAX`] that bounds those of a node.
pub const MAP_WATCHES_MAX: usize = 4;
/// Time that such a call waits if it doesn't say, in milliseconds.
pub const MAP_WATCH_DEFAULT_MS: u64 = 30_000;
/// Longest time that such a call waits, in milliseconds; a longer one is cut to it.
pub const MAP_WATCH_MS_MAX: u64 = 60_000;
/// Least time between two answers to such calls on a connection, in milliseconds: while shards move, what has
/// changed meanwhile comes together.
pub const MAP_NEWS_MS: u64 = 1_000;
/// Such an answer is held back for a random time up to this, in milliseconds: all who wait are woken by the same change,
/// and neither the node nor what they do then should meet it at one moment.
pub const MAP_NEWS_JITTER_MS: u64 = 250;
/// Answers with news of one version of the map that a thread keeps, for others that had the same version before.
pub const MAP_NEWS_KEPT: usize = 16;
/// A node that is cut off lets such a call wait no longer than this, in milliseconds, nor any that comes then less.
pub const MAP_CUT_OFF_MS: u64 = 1_000;
/// Client library: it begins to wait for newer maps so long after it has the first, in milliseconds: who only
/// wants one thing done has gone by then.
pub const MAP_WATCH_AFTER_MS: u64 = 1_000;
/// Client library: time for which it waits at a node that has nothing new before it asks again, in milliseconds.
pub const MAP_WATCH_MS: u64 = 10_000;
/// Client library: so often it asks a node that has nothing new before it asks another: the one may hear of
/// nothing itself.
pub const MAP_WATCH_TURNS: u32 = 6;
/// Client library: after news it waits so long before it asks for more, in milliseconds, so that many
/// changes come together.
pub const MAP_WATCH_PAUSE_MS: u64 = 100;
/// Client library: time between two requests for the map where no node lets a call wait, in milliseconds.
pub const MAP_POLL_MS: u64 = 10_000;
/// Client library: longest pause after all nodes have failed to tell of the map, in milliseconds.
pub const MAP_WATCH_BACKOFF_MS_MAX: u64 = 5_000;
/// Client library: a connection that has had no call but for the map for so long is closed when the client goes to wait
/// for maps elsewhere, in milliseconds; one that never had another is then closed at once.
pub const CONNECTION_IDLE_MS: u64 = 300_000;
/// Client library: nodes asked at once for the cluster map where one that hasn't heard isn't to be believed.
pub const MAP_ASKED_MAX: usize = 8;
/// Client library: nodes of which an error tells what they said; further ones are counted.
pub const NODES_TOLD_MAX: usize = 8;
/// Client library: time that `close` gives to what is in flight, in milliseconds.
pub const CLOSE_MS_MAX: u64 = 500;

/// Operations of client calls that one thread of a node works on; above, calls are `Busy`.
pub const THREAD_OPERATIONS_MAX: usize = 64 * 1024;
/// Bytes of keys and values of client calls that one thread of a node works on; above, calls are
/// `Busy`, unless there is nothing else.
pub const THREAD_BYTES_MAX: usize = 64 * MIB;
/// Bytes of client messages that are arriving on all connections of one thread of a node, of those beyond
/// [`ARRIVING_BATCH_BYTES_MAX`]; above, a connection isn't read until there is room for its message.
pub const THREAD_ARRIVING_BYTES_MAX: usize = 64 * MIB;
/// The same of those up to [`ARRIVING_BATCH_BYTES_MAX`].
pub const THREAD_ARRIVING_BATCHES_BYTES_MAX: usize = 32 * MIB;
/// A client message no greater than this, in bytes, doesn't wait behind greater ones: a batch of the client
/// library, with what the message takes beside keys and values.
pub const ARRIVING_BATCH_BYTES_MAX: usize = BATCH_BYTES_MAX + 256 * BATCH_OPERATIONS_MAX;
/// A client message smaller than this needs no room, in bytes.
pub const ARRIVING_FREE_BYTES: usize = 16 * KIB;
/// While others wait for room, a message that has it must move at a pace at which the whole takes so long,
/// in milliseconds; else its connection is closed.
pub const ARRIVING_WHOLE_MS: u64 = 10_000;
/// The pace is judged by what has moved in this time, in milliseconds.
pub const ARRIVING_WINDOW_MS: u64 = 400;
/// Values in the answer to one batch, in bytes; gets beyond are `Busy`. An answer has at least one.
pub const ANSWER_BYTES_MAX: usize = 16 * MIB;
/// Bytes of answers on one client connection that it hasn't read; above, no further call is read from
/// it, and values for those that were are `Busy`.
pub const CONNECTION_UNSENT_BYTES_MAX: usize = 32 * MIB;
/// A client connection that reads nothing for so long, though there are answers, is closed, in
/// milliseconds.
pub const CONNECTION_STUCK_MS_MAX: u64 = 10_000;
/// A connection to the client port that sends nothing for so long at its start is closed, in milliseconds.
pub const GREETING_MS_MAX: u64 = 10_000;
/// A client connection on which nothing comes for so long is probed, in seconds: its client may be gone
/// without having said so.
pub const CLIENT_PROBE_S: u64 = 60;
/// Time between two such probes, in seconds.
pub const CLIENT_PROBE_AGAIN_S: u64 = 10;
/// Probes without an answer after which the connection is closed.
pub const CLIENT_PROBES_MAX: u32 = 3;
/// A client connection on which bytes were sent, and whose other side hasn't acknowledged them for so long,
/// is closed, in milliseconds. Such a connection isn't probed, and would stay for a quarter of an hour. The
/// kernel counts it for probes too.
pub const CLIENT_UNACKED_MS_MAX: u32 = 90_000;
/// Time that a stopping node gives to client calls in flight, in milliseconds.
pub const CLIENT_DRAIN_MS_MAX: u64 = 1_500;

// value ≤ entry ≤ append message ≤ frame ≤ traversal limit.
const _: () = assert!(KEY_BYTES_MAX + VALUE_BYTES_MAX <= ENTRY_BYTES_MAX);
const _: () = assert!(SNAPSHOT_REDO_BYTES_MAX <= SNAPSHOT_FILES_BYTES_MAX);
const _: () = assert!(ENTRY_TARGET_BYTES <= ENTRY_BYTES_MAX);
const _: () = assert!(ENTRY_CACHE_BYTES <= ENTRY_CACHE_NODE_BYTES);
const _: () = assert!(ENTRY_BYTES_MAX + APPEND_TARGET_BYTES <= FRAME_BYTES_MAX);
// A frame is closed once it has reached its target, so it may exceed that by one message.
const _: () = assert!(FRAME_TARGET_BYTES + ENTRY_BYTES_MAX + APPEND_TARGET_BYTES <= FRAME_BYTES_MAX);
// An append of the smallest entries (raft counts 8 bytes or more for each) is within a frame's count.
const _: () = assert!(APPEND_TARGET_BYTES / 8 <= MESSAGE_ENTRIES_MAX);
// An entry takes 40 bytes or more of a frame, which may exceed its target by one message.
const _: () = assert!(FRAME_TARGET_BYTES / 40 + MESSAGE_ENTRIES_MAX <= FRAME_ENTRIES_MAX);
const _: () = assert!(REQUEST_FRAME_BYTES_MAX <= FRAME_BYTES_MAX);
// The plan of the largest database: of a shard its range, a list, and its nodes. Answers may be larger.
const _: () = assert!(SHARDS_MAX as usize * (4 + REPLICAS_MAX as usize) * 8 <= REQUEST_FRAME_BYTES_MAX / 2);
const _: () = assert!(SNAPSHOT_FRAME_BYTES_MAX <= FRAME_BYTES_MAX);
const _: () = assert!(OUTBOX_CONTROL_BYTES_MAX <= OUTBOX_BYTES_MAX);
const _: () = assert!(KEEPALIVE_MS * 3 < PEER_IDLE_MS_MAX);
const _: () = assert!(UNCOMMITTED_BYTES_MAX <= LOG_QUEUE_BYTES_MAX);
const _: () = assert!(LOG_WRITE_TARGET_BYTES <= LOG_QUEUE_BYTES_MAX);
const _: () = assert!(FRAME_TARGET_BYTES <= FRAME_BYTES_MAX);
const _: () = assert!(FRAME_BYTES_MAX <= TRAVERSAL_BYTES_MAX);
const _: () = assert!(FRAME_BYTES_MAX <= OUTBOX_BYTES_MAX);
const _: () = assert!(ENTRY_BYTES_MAX <= UNCOMMITTED_BYTES_MAX);
const _: () = assert!(BATCH_OPERATIONS_MAX <= REPLICA_PENDING_MAX);
const _: () = assert!(MEMBERS_MAX <= SNAPSHOT_MEMBERS_MAX);
const _: () = assert!(IMPORT_BATCH_PAIRS <= BATCH_OPERATIONS_MAX);
const _: () = assert!(LOG_PRESSED_TICKS * TICK_MS > LOG_PURGE_MS);
// A group asleep that is pressed lets go of what it keeps for members that aren't there.
const _: () = assert!(LOG_PRESSED_TICKS > FOLLOWER_DEAD_TICKS);
// Check-quorum clears raft's own mark of who answered once per election timeout.
const _: () = assert!(FOLLOWER_DEAD_TICKS > 2 * ELECTION_TICKS_MAX as u64);
const _: () = assert!(HEARTBEAT_TICKS as u64 * TICK_MS <= NODE_HEARTBEAT_MS);
const _: () = assert!(HEARTBEAT_TICKS * 2 < ELECTION_TICKS_MIN);
const _: () = assert!(ELECTION_TICKS_MIN < ELECTION_TICKS_MAX);
const _: () = assert!(MAKE_WAY_TICKS > 2 * ELECTION_TICKS_MIN as u64);
// raft would give it up by itself later.
const _: () = assert!(TRANSFER_TICKS_MAX < ELECTION_TICKS_MIN as u64);
// Several heartbeats may be lost.
const _: () = assert!(DISK_NEWS_MS_MAX > 3 * NODE_HEARTBEAT_MS);
// Distinct election windows, one tick wide, for all replicas of a group.
const _: () = assert!(ELECTION_TICKS_MAX - ELECTION_TICKS_MIN >= REPLICAS_MAX as usize);
// An answer fits a message; closing, a second; draining, the time to stop.
const _: () = assert!(ANSWER_BYTES_MAX + VALUE_BYTES_MAX <= TRAVERSAL_BYTES_MAX / 2);
const _: () = assert!(ANSWER_BYTES_MAX + VALUE_BYTES_MAX <= CONNECTION_UNSENT_BYTES_MAX);
const _: () = assert!(2 * VALUE_BYTES_MAX + KEY_BYTES_MAX <= TRAVERSAL_BYTES_MAX / 2);
// Any message has room when it is alone.
const _: () = assert!(TRAVERSAL_BYTES_MAX <= THREAD_ARRIVING_BYTES_MAX);
const _: () = assert!(ARRIVING_BATCH_BYTES_MAX <= THREAD_ARRIVING_BATCHES_BYTES_MAX);
const _: () = assert!(ARRIVING_FREE_BYTES < ARRIVING_BATCH_BYTES_MAX);
// What stands still is found out at the end of the next whole window, and then the next in line is read, and
// with it the question of a client that wonders whether the node is gone.
const _: () = assert!(2 * ARRIVING_WINDOW_MS < SILENCE_MS_MAX + SIGN_MS_MAX);
const _: () = assert!(CLOSE_MS_MAX < 1_000);
// A hung leader is left about when the others may have elected another, and before an attempt is over.
const _: () = assert!(SILENCE_MS_MAX + SIGN_MS_MAX <= ELECTION_TICKS_MIN as u64 * TICK_MS);
const _: () = assert!(SILENCE_MS_MAX + SIGN_MS_MAX < ATTEMPT_MS_MAX);
const _: () = assert!(STAGGER_MS < DIAL_SLOW_MS && DIAL_SLOW_MS < DIAL_MS_MAX);
// A vote, and the next heartbeat, come well before a node says that it is cut off.
const _: () = assert!(MAP_STALE_MS >= 2 * ELECTION_TICKS_MAX as u64 * TICK_MS + 2 * NODE_HEARTBEAT_MS);
const _: () = assert!(MAP_NEWS_MS + MAP_NEWS_JITTER_MS < MAP_WATCH_MS && MAP_CUT_OFF_MS < MAP_WATCH_MS);
const _: () = assert!(MAP_WATCH_MS <= MAP_WATCH_DEFAULT_MS && MAP_WATCH_DEFAULT_MS <= MAP_WATCH_MS_MAX);
const _: () = assert!(CLIENT_DRAIN_MS_MAX < STOP_MS_MAX);
// All probes are sent before the connection is closed.
const _: () = assert!(
    CLIENT_UNACKED_MS_MAX as u64
        >= 1_000 * (CLIENT_PROBE_S + CLIENT_PROBES_MAX as u64 * CLIENT_PROBE_AGAIN_S)
);
