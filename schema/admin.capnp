@0xd96f04b1e2c8a775;
# Administration of a cluster, obtained from `Gate.open` on any node's client port.

using Types = import "types.capnp";

interface Admin {
  nodeStatus @0 () -> (status :NodeStatus);
  # What this node knows of itself and its replicas; answered without asking anybody else.

  createDatabase @1 (name :Text, replicas :UInt32, shards :UInt32, timeoutMs :UInt32) -> (result :DatabaseResult);
  # Creates a database and waits until every shard has a leader. Creating one that exists with the
  # same numbers succeeds; with others it is refused.

  dropDatabase @2 (name :Text, timeoutMs :UInt32) -> (result :DatabaseResult);
  # Removes a database and its data. A name that doesn't exist is refused.

  transferLeader @3 (shard :UInt64, node :UInt64, timeoutMs :UInt32) -> (result :VoidResult);
  # Moves the leadership of one shard to the replica on `node`. Ask the node that leads the shard.

  inject @4 (shard :UInt64, fault :Text) -> (result :VoidResult);
  # Test hook: makes this node's replica of `shard` fail in the named way. A plain build refuses.
}

struct VoidResult {
  union {
    ok @0 :Void;
    error @1 :Types.Error;
  }
}

struct DatabaseResult {
  union {
    database @0 :Types.DatabaseRecord;
    error @1 :Types.Error;
  }
  created @2 :Bool;          # false: it existed already
}

enum NodeState {
  starting @0;
  ready @1;
  stopping @2;
}

struct NodeStatus {
  node @0 :UInt64;           # NodeId; 0 while not yet a member
  clusterId @1 :Data;
  label @2 :Text;
  state @3 :NodeState;
  mapVersion @4 :UInt64;
  diskBytes @5 :UInt64;      # bytes in the data directory, as last measured
  replicas @6 :List(ReplicaStatus);
  software @7 :Text;
  protocol @8 :Types.ProtocolRange;
  pid @9 :UInt32;
  uptimeMs @10 :UInt64;
}

enum ReplicaRole {
  follower @0;
  candidate @1;
  leader @2;
  learner @3;
}

enum ReplicaState {
  serving @0;
  recovering @1;             # re-applying its log after a start
  restarting @2;             # crashed; the supervisor will rebuild it
  quarantined @3;            # crashed too often; out of service until the node restarts
  failed @4;                 # its disk state can't be used
}

struct ReplicaStatus {
  shard @0 :UInt64;
  replica @1 :UInt64;
  role @2 :ReplicaRole;
  state @3 :ReplicaState;
  term @4 :UInt64;
  leader @5 :UInt64;         # ReplicaId of the leader it knows; 0: none
  applied @6 :UInt64;        # log index
  committed @7 :UInt64;
  last @8 :UInt64;
  restarts @9 :UInt32;       # since the node started
  message @10 :Text;         # why it isn't serving
}
