@0xa4e1f70d93b5c862;
# What lies on disk and in the log, but for the hot formats (commands and values of the key-value
# machine), which `machine::command` and `machine::value` define byte by byte.

using Types = import "types.capnp";

struct Identity {
  # File IDENTITY of a data directory.
  storeId @0 :Data;          # 16 random bytes, also in the log and in the state store
  clusterId @1 :Data;        # 16 bytes; empty: none recorded yet
  node @2 :UInt64;           # 0: not yet a member
}

enum MachineKind {
  kv @0;
  metadata @1;
}

enum ReplicaPhase {
  active @0;
  tombstone @1;              # removed: its id is never started again
}

struct ReplicaRecord {
  # Catalogue of the node's replicas, in the reserved group of the log engine.
  replica @0 :UInt64;
  shard @1 :UInt64;
  database @2 :UInt64;
  machine @3 :MachineKind;
  phase @4 :ReplicaPhase;
  start @5 :UInt64;          # ring range
  end @6 :UInt64;
  epoch @7 :Types.Epoch;
  members @8 :List(Types.MemberRecord);   # at creation
  generation @9 :UInt32;     # install generation of its state keys
}

struct StateHeader {
  # One per replica and generation in the state store, and per replica in a redo file: where the
  # state stands. Written in the same batch as the data it describes.
  applied @0 :UInt64;
  appliedTerm @1 :UInt64;
  revision @2 :UInt64;       # the shard's revision counter
  epoch @3 :Types.Epoch;
  members @4 :List(Types.MemberRecord);
  voters @5 :List(UInt64);   # raft ConfState
  learners @6 :List(UInt64);
  votersOutgoing @7 :List(UInt64);
  learnersNext @8 :List(UInt64);
  autoLeave @9 :Bool;
}

struct MetaCommand {
  # A command of the metadata machine.
  union {
    form :group {            # first command of a cluster; repeating it changes nothing
      clusterId @0 :Data;
      nodes @1 :List(Types.NodeRecord);
      metadata @2 :Types.ShardRecord;
    }
    addNode @3 :Types.NodeRecord;      # id 0: allocate; a known storeId updates its record
    createDatabase :group {
      name @4 :Text;
      replicas @5 :UInt32;
      shards @6 :List(PlannedShard);   # in ascending order, covering the ring
    }
    dropDatabase @7 :Text;
  }
}

struct PlannedShard {
  # A shard as the proposer planned it. The plan travels in the command so that a change of the
  # planner can't make replicas differ.
  start @0 :UInt64;
  end @1 :UInt64;
  nodes @2 :List(UInt64);    # NodeIds of its voters
}

struct MetaReply {
  union {
    formed @0 :UInt64;       # map version
    node @1 :UInt64;         # NodeId
    database @2 :Types.DatabaseRecord;
    refused @3 :Text;
  }
  created @4 :Bool;          # database: false if it was there already
  refusal @5 :MetaRefusal;   # refused: which rule, for programs; `refused` is the same for persons
}

struct MetaRefusal {
  # Why the metadata machine refuses a command. A reader that doesn't know the member shows the text.
  union {
    other @0 :Void;
    otherCluster :group {    # form: this cluster was formed with another identity
      have @1 :Data;         # 16 bytes
      asked @2 :Data;        # 16 bytes
    }
    nameTaken :group {       # createDatabase: by a database with other numbers, which are
      name @3 :Text;
      replicas @4 :UInt32;
      shards @5 :UInt32;
    }
    unknownDatabase @6 :Text;
    unknownNode @7 :UInt64;  # createDatabase: a planned NodeId that isn't a member
    invalidPlan @8 :Text;
    notFormed @9 :Void;
  }
}
