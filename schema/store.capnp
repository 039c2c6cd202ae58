@0xa4e1f70d93b5c862;
# What lies on disk and in the log, but for the hot formats (commands and values of the key-value
# machine), which `machine::command` and `machine::value` define byte by byte.

using Types = import "types.capnp";

struct Identity {
  # File IDENTITY of a data directory.
  storeId @0 :Data;          # 16 random bytes, also in the log and in the state store
  clusterId @1 :Data;        # 16 bytes; empty: none recorded yet
  node @2 :UInt64;           # 0: not yet a member
  rejoins @3 :Bool;          # made by `serve --rejoin`: it joins a cluster and never forms one
}

enum MachineKind {
  kv @0;                     # keys and values
  metadata @1;               # nodes, databases, the shard map
}

enum ReplicaPhase {
  active @0;                 # started whenever the node is
  tombstone @1;              # removed: its id is never started again
}

struct ReplicaRecord {
  # Catalogue of the node's replicas, in the reserved group of the log engine.
  replica @0 :UInt64;        # ReplicaId
  shard @1 :UInt64;          # ShardId
  database @2 :UInt64;       # DatabaseId
  machine @3 :MachineKind;   # which state machine runs in it
  phase @4 :ReplicaPhase;    # whether it still exists
  start @5 :UInt64;          # first position of its ring range, inclusive
  end @6 :UInt64;            # last position, inclusive
  epoch @7 :Types.Epoch;     # as of `membersAt`; 0: at creation
  members @8 :List(Types.MemberRecord);   # likewise; empty: a newcomer, which needs a snapshot first
  generation @9 :UInt32;     # install generation of its state keys
  membersAt @10 :UInt64;     # the log entry that brought them about, or the last one in the snapshot they are from
  orderedAt @11 :UInt64;     # `changedAt` of the shard's record that ordered it: only a later one can end it
}

struct MembershipEntry {
  # The context of a log entry that changes a group's members. What is in its data is for raft's own
  # checks when it is proposed; nobody reads that again.
  conf @0 :UInt64;           # the conf version that it follows on; it makes it greater by one
  members @1 :List(Types.MemberRecord);   # all members after it
}

struct StateHeader {
  # One per replica and generation in the state store, and per replica in a redo file: where the
  # state stands. Written in the same batch as the data it describes.
  applied @0 :UInt64;        # log index of the last entry in it
  appliedTerm @1 :UInt64;    # that entry's term
  revision @2 :UInt64;       # the shard's revision counter
  epoch @3 :Types.Epoch;     # of the shard as of `applied`
  members @4 :List(Types.MemberRecord);   # likewise
  voters @5 :List(UInt64);   # ReplicaIds; with the next four fields raft's ConfState
  learners @6 :List(UInt64);        # ReplicaIds
  votersOutgoing @7 :List(UInt64);  # ReplicaIds, during a joint change
  learnersNext @8 :List(UInt64);    # ReplicaIds, during a joint change
  autoLeave @9 :Bool;        # whether the joint change ends by itself
  logTime @10 :UInt64;       # ms; greatest stamp in the log up to `applied`: the clock of sessions
}

struct MetaCommand {
  # A command of the metadata machine.
  union {
    form :group {            # first command of a cluster; repeating it changes nothing
      clusterId @0 :Data;    # 16 bytes
      nodes @1 :List(Types.NodeRecord);   # its first members
      metadata @2 :Types.ShardRecord;     # shard 0
    }
    addNode @3 :Types.NodeRecord;      # id 0: allocate; a known storeId updates its record
    createDatabase :group {
      name @4 :Text;         # [A-Za-z0-9_-]{1,64}
      replicas @5 :UInt32;   # voters of each shard
      shards @6 :List(PlannedShard);   # in ascending order, covering the ring
    }
    dropDatabase @7 :Text;   # its name
    dropDatabaseId :group {  # only the database of this id
      name @8 :Text;         # which it must have
      id @9 :UInt64;         # DatabaseId
    }
    observeShard :group {    # what a shard says of its own members; counts if its conf version is greater
      shard @10 :UInt64;     # ShardId
      conf @11 :UInt64;      # the shard's epoch.conf
      members @12 :List(Types.MemberRecord);   # as of that
    }
    beginMove :group {       # change the members of a shard
      shard @13 :UInt64;     # ShardId
      conf @14 :UInt64;      # the epoch.conf that the proposer knew: another one refuses the move
      adds @15 :List(UInt64);     # NodeIds that get a replica
      removes @16 :List(UInt64);  # ReplicaIds that go
      cause @17 :Types.MoveCause; # why
    }
    cancelMove :group {      # roll a move back, if it hasn't come to the joint change
      shard @18 :UInt64;     # ShardId
      move @19 :UInt64;      # its id
    }
    endMove :group {         # the shard's members show that a move is done, or rolled back
      shard @20 :UInt64;     # ShardId
      move @21 :UInt64;      # its id
    }
    setStanding :group {     # of a node
      node @22 :UInt64;      # NodeId
      standing @23 :Types.Standing;   # from now on
    }
    setPolicy @24 :PolicyChange;      # one setting
    beginRebalance :group {  # give shards targets
      plan @25 :UInt64;      # its name, above 0
      targets @26 :List(PlannedTarget);   # of the shards that are to move
      moves @27 :UInt32;     # replicas to move in all
      bytes @28 :UInt64;     # of those
      undoes @37 :UInt64;    # the plan that it takes back, which must be the last then; 0: none
    }
    controlRebalance :group {
      plan @29 :UInt64;      # which must be the last
      state @30 :Types.RebalanceState;    # what becomes of it
      reason @31 :Text;      # why, if it failed or is cancelled
    }
    setReplicas :group {     # how many voters each shard of a database should have
      name @32 :Text;        # of the database
      replicas @33 :UInt32;  # from now on
    }
    recoverShard :group {    # its majority is lost for good: one replica goes on alone
      shard @34 :UInt64;     # ShardId
      keep @35 :UInt64;      # ReplicaId
      conf @36 :UInt64;      # the shard's epoch.conf from then on, greater than any that it had
    }
    order :group {           # an operator's command that counts only if its record is as its giver knew it
      seen @38 :UInt64;      # the map version that its giver knew
      what @39 :MetaCommand; # setStanding, setPolicy, setReplicas, beginRebalance or controlRebalance
    }
    createWideDatabase :group {         # createDatabase with more than 4,096 shards
      name @40 :Text;        # [A-Za-z0-9_-]{1,64}
      replicas @41 :UInt32;  # voters of each shard
      shards @42 :List(PlannedShard);   # in ascending order, covering the ring
    }
  }
}

struct PolicyChange {
  # See PolicyRecord.
  union {
    replaceAfterMs @0 :UInt64;
    movesAtATime @1 :UInt32;
    bytesPerSecond @2 :UInt64;
    automatic @3 :Bool;
    approveJoins @4 :Bool;
  }
}

struct PlannedTarget {
  # Where a rebalancing wants a shard.
  shard @0 :UInt64;          # ShardId
  conf @1 :UInt64;           # the epoch.conf that the planner knew
  nodes @2 :List(UInt64);    # NodeIds of its voters
}

struct PlannedShard {
  # A shard as the proposer planned it. The plan travels in the command so that a change of the
  # planner can't make replicas differ.
  start @0 :UInt64;          # first position of its ring range, inclusive
  end @1 :UInt64;            # last position, inclusive
  nodes @2 :List(UInt64);    # NodeIds of its voters
}

struct MetaReply {
  union {
    formed @0 :UInt64;       # map version
    node @1 :UInt64;         # NodeId
    database @2 :Types.DatabaseRecord;   # as it is now
    refused @3 :Text;        # why not
    done @6 :UInt64;         # map version: it is so now, whether or not it was before
  }
  created @4 :Bool;          # database: false if it was there already
  refusal @5 :MetaRefusal;   # refused: which rule, for programs; `refused` is the same for persons
}

struct MetaRefusal {
  # Why the metadata machine refuses a command. A reader that doesn't know the member shows the text.
  union {
    other @0 :Void;          # see the text
    otherCluster :group {    # form: this cluster was formed with another identity
      have @1 :Data;         # 16 bytes
      asked @2 :Data;        # 16 bytes
    }
    nameTaken :group {       # createDatabase: by a database with other numbers, which are
      name @3 :Text;         # of the database
      replicas @4 :UInt32;   # that it has
      shards @5 :UInt32;     # that it has
    }
    unknownDatabase @6 :Text;   # dropDatabase, dropDatabaseId, setReplicas: the name
    unknownNode @7 :UInt64;  # a named NodeId that isn't a member
    invalidPlan @8 :Text;    # createDatabase, setReplicas: the rule that the plan breaks
    notFormed @9 :Void;      # no command works before `form`
    stale :group {           # the proposer knew an older state of the shard, move, or plan
      what @10 :Text;        # which
    }
    nodeInUse :group {       # setStanding: it can't be removed while it holds replicas
      node @11 :UInt64;      # NodeId
      shards @12 :List(UInt64);   # ShardIds, the first few
      total @13 :UInt32;     # how many there are
    }
    nodeRemoved @14 :UInt64; # addNode, setStanding: this NodeId was, and that is for good
    notAllowed @15 :Text;    # another rule, in words
    changed :group {         # order: the record has changed since its giver looked
      what @16 :Text;        # which
      version @17 :UInt64;   # of the map, at which it did
    }
  }
}
