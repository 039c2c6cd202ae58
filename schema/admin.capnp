@0xd96f04b1e2c8a775;
# Administration of a cluster, obtained from `Gate.open` on any node's client port.

using Types = import "types.capnp";

interface Admin {
  nodeStatus @0 () -> (status :NodeStatus);
  # What this node knows of itself and its replicas; answered without asking anybody else.

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
}
