@0xd96f04b1e2c8a775;
# Administration of a cluster, obtained from `Gate.open` on any node's client port.

using Types = import "types.capnp";

interface Admin {
  # Orders of operators (`setStanding`, `setReplicas`, `changeSetting`, `startRebalance`, `controlRebalance`,
  # `undoRebalance`) carry `seen`, the version of the cluster map by which they were decided. An order about a
  # record that has changed since is refused as `changed`, unless it is as ordered already; so one that arrives
  # late, or again, never undoes a newer one. Repeat a request only with the `seen` of the first. 0: not told; then
  # the node tries once, and a request whose outcome is unknown must not be repeated.

  nodeStatus @0 (brief :Bool) -> (status :NodeStatus);
  # What this node knows of itself and its replicas; answered without asking anybody else. `brief`: without its
  # replicas, for whoever only wants to know whether it is there. A node that doesn't know of that tells all.

  createDatabase @1 (name :Text, replicas :UInt32, shards :UInt32, timeoutMs :UInt32) -> (result :DatabaseResult);
  # Creates a database and waits until every shard has a leader. Creating one that exists with the
  # same numbers succeeds; with others it is refused.

  dropDatabase @2 (name :Text, timeoutMs :UInt32, database :UInt64) -> (result :DatabaseResult);
  # Removes a database and its data. A name that doesn't exist is refused. With `database`, a DatabaseId
  # from the map, only that one: if it is gone, or has another name, `unknownDatabase`. Repeat a request
  # whose outcome is unknown only so, or it may hit another database of the name; `unknownDatabase` then
  # means that it is done. 0: whichever has the name.

  transferLeader @3 (shard :UInt64, node :UInt64, timeoutMs :UInt32) -> (result :VoidResult);
  # Moves the leadership of one shard to the replica on `node`. Ask the node that leads the shard.

  inject @4 (shard :UInt64, fault :Text) -> (result :VoidResult);
  # Test hook: makes this node's replica of `shard` fail in the named way. A plain build refuses.

  setStanding @5 (node :UInt64, standing :Types.Standing, timeoutMs :UInt32, seen :UInt64) -> (result :ChangeResult);
  # Decides about a node. `member` lets a pending one in, ends a drain, and takes `leaving` back; `draining`
  # has it give away what it leads and holds; `leaving` gives up one that is gone for good: what it held is
  # replaced without it. `removed` ends its membership, for ever: refused, naming shards, while the map places
  # replicas on it.

  planRebalance @6 (leadersOnly :Bool, since :UInt64, timeoutMs :UInt32) -> (result :PlanResult);
  # What a rebalancing would do now. Changes nothing. `since`: not by a map older than this version.

  startRebalance @7 (plan :UInt64, since :UInt64, timeoutMs :UInt32, seen :UInt64) -> (result :ChangeResult);
  # Begins the plan of this id, if the cluster is still as it was when the plan was made: refused if another
  # one would be made now. The last one that began, if it runs still or has come to its end: done. Returns at
  # once, not when the moves are done.

  rebalanceStatus @8 (since :UInt64, timeoutMs :UInt32) -> (result :RebalanceResult);
  # How the last rebalancing is. Takes most of a second while anything moves: nodes are asked twice, for the
  # rate.

  controlRebalance @9 (plan :UInt64, order :RebalanceOrder, timeoutMs :UInt32, seen :UInt64) -> (result :ChangeResult);
  # Pauses, resumes or cancels the rebalancing of this plan. Moves under way end when it is paused; when it
  # is cancelled they end or are rolled back, whichever is nearer.

  undoRebalance @10 (plan :UInt64, since :UInt64, timeoutMs :UInt32, seen :UInt64) -> (result :UndoResult);
  # Begins a rebalancing back to where each shard was before that of this plan, which must be the last and
  # have ended. Refused, with the reason, if it can't be had. If the last one is the way back from it: done.

  setReplicas @11 (database :Text, replicas :UInt32, timeoutMs :UInt32, seen :UInt64) -> (result :ChangeResult);
  # How many voters each shard of a database should have from now on. Refused above the number of nodes
  # that are up. Returns at once; the map tells when each shard has them.

  changeSetting @12 (setting :Setting, timeoutMs :UInt32, seen :UInt64) -> (result :ChangeResult);
  # Changes one setting of the cluster. `MapDelta.policy` has them all.

  recoverShard @13 (shard :UInt64, node :UInt64, acceptDataLoss :Bool, timeoutMs :UInt32) -> (result :RecoveryResult);
  # For a shard whose majority is gone for good: has it go on with the replica on `node` alone. Writes that
  # only the others had are lost, acknowledged ones too. Refused while a majority answers. Without
  # `acceptDataLoss` it changes nothing and tells what would be kept. Returns when the replica leads.

  verifyShard @14 (shard :UInt64, timeoutMs :UInt32, since :UInt64) -> (result :CheckResult);
  # Has each replica of a shard tell what its state is at one and the same entry of the log, while the shard
  # is written to. Digests that differ mean replicas that differ. A replica whose state can't be had in time, or
  # has gone on, is named with the reason. Changes nothing but that the shard's log has an empty entry more, and
  # each replica's memory is flushed to disk. Reads all of the shard on each of its nodes, which has to be
  # done in the time given. That there is no such shard is said of a map of version `since` or later alone.

  counters @15 () -> (counters :NodeCounters);
  # What this node has counted since its process began, as its page `/metrics` shows it, and what the operating
  # system has counted for its process. For `pontoon bench --explain`; names may come and go with versions.
}

struct NodeCounters {
  node @0 :UInt64;           # NodeId
  process @1 :UInt64;        # drawn when its process began. Nodes with the same one share it, and all that is counted
  counters @2 :List(Counter);
}

struct Counter {
  name @0 :Text;             # with its labels: `pontoon_raft_messages_total{kind="append"}`
  value @1 :Float64;
}

struct CheckResult {
  union {
    check @0 :ShardCheck;
    error @1 :Types.Error;   # the shard has no leader, or there is no such shard
  }
}

struct ShardCheck {
  shard @0 :UInt64;          # ShardId
  index @1 :UInt64;          # log index of the last entry in all the states
  leader @2 :UInt64;         # ReplicaId that led then
  replicas @3 :List(CheckedReplica);   # all members
}

struct CheckedReplica {
  node @0 :UInt64;           # NodeId
  replica @1 :UInt64;        # ReplicaId
  role @2 :Types.MemberRole;
  union {
    digest :group {
      data @3 :Data;         # 16 bytes: xxh3-128 over keys and values, with their versions
      sessions @4 :Data;     # 16 bytes: xxh3-128 over sessions, revision counter and log time
      keys @5 :UInt64;
      bytes @6 :UInt64;      # of keys and values
    }
    goneOn @7 :Text;         # it was written to so fast that its state is another by now: ask anew; for a person
    missing @8 :Text;        # why there is none; for a person
  }
}

struct ChangeResult {
  union {
    version @0 :UInt64;      # done: it is so in the cluster map from this version on
    error @1 :Types.Error;   # not done, or its end isn't known: see `applied`
  }
}

enum MoveKind {
  replica @0;                # a replica moves from one node to another
  leader @1;                 # leadership moves between nodes that both have a replica in the end
}

struct PlannedMove {
  shard @0 :UInt64;          # ShardId
  kind @1 :MoveKind;
  from @2 :UInt64;           # NodeId
  to @3 :UInt64;             # NodeId
  keys @4 :UInt64;           # that are copied, as last counted; 0 for leadership
  bytes @5 :UInt64;          # likewise: keys and values
}

struct Plan {
  id @0 :UInt64;             # names the plan: the same for the same moves from the same state
  mapVersion @1 :UInt64;     # of the map that it was made from
  moves @2 :List(PlannedMove);   # those of replicas first
  minimum @3 :UInt32;        # the fewest moves of replicas that any plan could do with
  totalMoves @4 :UInt32;     # of replicas
  totalKeys @5 :UInt64;      # that are copied
  totalBytes @6 :UInt64;     # likewise
  left @7 :UInt32;           # shards that are left for another plan: one names so many at most
  silent @8 :List(UInt64);   # NodeIds: they didn't answer, so nothing moves to them; an older node names none
}

struct PlanResult {
  union {
    plan @0 :Plan;
    error @1 :Types.Error;
  }
}

struct UndoResult {
  union {
    begun @0 :Begun;         # the way back is under way
    error @1 :Types.Error;   # not done, or its end isn't known: see `applied`
  }
}

struct Begun {
  plan @0 :UInt64;           # names it
  version @1 :UInt64;        # it is in the cluster map from this version on
}

enum RebalanceOrder {
  pause @0;                  # begin no further move
  resume @1;                 # go on
  cancel @2;                 # begin no further move, and give those up that are still to come
}

struct RebalanceStatus {
  plan @0 :UInt64;           # names it; 0: there never was one
  state @1 :Types.RebalanceState;
  done @2 :UInt32;           # moves of replicas that have ended
  total @3 :UInt32;          # moves of replicas in all
  bytesDone @4 :UInt64;      # of the moves that have ended, as last counted
  bytesTotal @5 :UInt64;     # of all moves, as last counted
  rate @6 :UInt64;           # bytes per second that all nodes together send in snapshots; see `unmeasured`
  etaS @7 :UInt64;           # seconds until it ends, by that rate; 0: not to be told
  reason @8 :Text;           # why it failed or was cancelled
  mapVersion @9 :UInt64;     # of the map that it was told from
  moving @10 :UInt32;        # shards whose members change at this moment, for whatever reason
  stuck @11 :List(StuckShard);   # where members should change and can't, for whatever reason
  unmeasured @12 :Bool;      # there was no time to measure the rate, which is 0 then
}

struct RebalanceResult {
  union {
    status @0 :RebalanceStatus;
    error @1 :Types.Error;
  }
}

struct Setting {
  # One setting of the cluster; see PolicyRecord.
  union {
    replaceAfterMs @0 :UInt64;
    movesAtATime @1 :UInt32;
    bytesPerSecond @2 :UInt64;
    automatic @3 :Bool;
    approveJoins @4 :Bool;
  }
}

struct ShardCopy {
  # One replica of a shard whose majority is gone, as far as is known.
  node @0 :UInt64;           # NodeId
  replica @1 :UInt64;        # ReplicaId
  role @2 :Types.MemberRole; # by the map
  answers @3 :Bool;          # its node told of it; else the rest is 0
  serves @4 :Bool;           # it is open, with a state
  term @5 :UInt64;           # raft term
  applied @6 :UInt64;        # log index up to which its state is made
  committed @7 :UInt64;      # log index up to which it knows entries as committed
  last @8 :UInt64;           # log index of its last entry
  keys @9 :UInt64;           # as last counted
  bytes @10 :UInt64;         # likewise
  lastTerm @11 :UInt64;      # raft term of its last entry: a log that ends in a later one is worth more
}

struct Recovery {
  shard @0 :UInt64;          # ShardId
  database @1 :Text;         # its name
  keep @2 :UInt64;           # ReplicaId of the one that goes on
  conf @3 :UInt64;           # conf version under which it does
  copies @4 :List(ShardCopy);   # all replicas by the map, that one included
  done @5 :Bool;             # it leads its shard alone
  decided @6 :Bool;          # it is decided, now or before, and goes on by itself; false: nothing was changed
}

struct RecoveryResult {
  union {
    recovery @0 :Recovery;
    error @1 :Types.Error;   # not done, or its end isn't known: see `applied`
  }
}

struct VoidResult {
  union {
    ok @0 :Void;             # done
    error @1 :Types.Error;   # not done, or its end isn't known: see `applied`
  }
}

struct DatabaseResult {
  union {
    database @0 :Types.DatabaseRecord;   # as it is now
    error @1 :Types.Error;   # not done, or its end isn't known: see `applied`
  }
  created @2 :Bool;          # false: it existed already
}

enum NodeState {
  starting @0;               # not yet a member, or its replicas are being opened
  ready @1;                  # serves
  stopping @2;               # hands leadership over, takes nothing new
  readOnly @3;               # serves, but takes no new values: its disk has less free than its reserve
}

struct NodeStatus {
  node @0 :UInt64;           # NodeId; 0 while not yet a member
  clusterId @1 :Data;        # 16 bytes
  label @2 :Text;            # the operator's name for it (`node.id` in the settings)
  state @3 :NodeState;       # of the node as a whole
  mapVersion @4 :UInt64;     # version of the cluster map it holds
  diskBytes @5 :UInt64;      # bytes in the data directory, as last measured
  replicas @6 :List(ReplicaStatus);   # all that it holds, that of the metadata shard too
  software @7 :Text;         # name and version of its program
  protocol @8 :Types.ProtocolRange;   # versions it speaks on the client port
  pid @9 :UInt32;            # its process
  uptimeMs @10 :UInt64;      # milliseconds since it started
  snapshotBytes @11 :UInt64; # bytes that it has sent in snapshots since it started
  stuck @12 :List(StuckShard);   # of the node that leads the metadata shard: where members should change and can't
}

struct StuckShard {
  shard @0 :UInt64;          # ShardId
  why @1 :Text;              # for a person
}

enum ReplicaRole {
  follower @0;               # follows a leader, or waits for one
  candidate @1;              # asks the others for their votes
  leader @2;                 # leads, or takes itself for the leader of its term
  learner @3;                # receives the log without a vote
}

enum ReplicaState {
  serving @0;                # takes part in its group
  recovering @1;             # re-applying its log after a start
  restarting @2;             # crashed; the supervisor will rebuild it
  quarantined @3;            # crashed too often; out of service until the node restarts
  failed @4;                 # its disk state can't be used
  installing @5;             # receives or installs a snapshot; follows meanwhile as far as it can
}

struct ReplicaStatus {
  shard @0 :UInt64;          # ShardId
  replica @1 :UInt64;        # ReplicaId
  role @2 :ReplicaRole;      # in its group, as it sees it
  state @3 :ReplicaState;    # whether it works
  term @4 :UInt64;           # raft term
  leader @5 :UInt64;         # ReplicaId of the leader it knows; 0: none
  applied @6 :UInt64;        # log index up to which its state is made
  committed @7 :UInt64;      # log index up to which it knows entries as committed
  last @8 :UInt64;           # log index of its last entry
  restarts @9 :UInt32;       # since the node started
  message @10 :Text;         # why it isn't serving
  conf @11 :UInt64;          # conf version of its members, as applied
  keys @12 :UInt64;          # keys in its state, as last counted; an estimate
  bytes @13 :UInt64;         # bytes of them and their values, likewise
  lastTerm @14 :UInt64;      # raft term of its last entry
  truncated @15 :UInt64;     # log index up to which its log holds no entries any more; 0: from a node that does not say it
}
