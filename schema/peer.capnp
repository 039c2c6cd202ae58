@0xb80c5d3e6fa71294;
# What nodes say to each other on the peer port. Not for clients. Messages travel in frames of their
# own (docs/protocol.md), not through Cap'n Proto RPC: one frame carries the messages of many groups.

using Types = import "types.capnp";

enum Lane {
  # A connection's class. Each has a connection of its own so that bulk never delays liveness.
  control @0;                # heartbeats, votes, read rounds
  append @1;                 # log entries
  request @2;                # formation, join, map pulls: request and answer
  snapshot @3;               # reserved
}

struct PeerHello {
  protocol @0 :Types.ProtocolRange;
  clusterId @1 :Data;        # 16 bytes; empty: not yet a member (lane `request` only)
  fromNode @2 :UInt64;       # 0: not yet a member
  toNode @3 :UInt64;         # the node meant; 0: whoever answers (lane `request` only)
  lane @4 :Lane;
  incarnation @5 :UInt64;    # drawn at each start of the process
}

struct PeerWelcome {
  union {
    accepted @0 :UInt32;     # the protocol version spoken from here on
    refused @1 :Text;        # why not, for the dialler's log
  }
  node @2 :UInt64;
  incarnation @3 :UInt64;
}

struct PeerFrame {
  union {
    raft @0 :List(RaftMessage);
    heartbeat @1 :NodeHeartbeat;
    request @2 :PeerRequest;
    response @3 :PeerResponse;
  }
}

struct NodeHeartbeat {
  node @0 :UInt64;
  incarnation @1 :UInt64;
  mapVersion @2 :UInt64;     # version of the cluster map the sender holds
}

struct RaftEntry {
  term @0 :UInt64;
  index @1 :UInt64;
  kind @2 :UInt8;            # eraftpb EntryType: 0 normal, 1 conf change, 2 conf change v2
  data @3 :Data;
  context @4 :Data;
}

struct RaftMessage {
  # One message of raft-rs and the address of its group.
  shard @0 :UInt64;
  epoch @1 :Types.Epoch;
  kind @2 :UInt8;            # eraftpb MessageType
  to @3 :UInt64;             # ReplicaId
  from @4 :UInt64;           # ReplicaId
  term @5 :UInt64;
  logTerm @6 :UInt64;
  index @7 :UInt64;
  commit @8 :UInt64;
  commitTerm @9 :UInt64;
  reject @10 :Bool;
  rejectHint @11 :UInt64;
  requestSnapshot @12 :UInt64;
  priority @13 :Int64;
  context @14 :Data;
  entries @15 :List(RaftEntry);
  snapshot @16 :SnapshotHeader;
  safeIndex @17 :UInt64;     # from a leader: no replica of the group still needs an entry up to here
}

struct SnapshotHeader {
  # Metadata of a snapshot; its data travels on the snapshot lane. Reserved.
  index @0 :UInt64;
  term @1 :UInt64;
  voters @2 :List(UInt64);
  learners @3 :List(UInt64);
  votersOutgoing @4 :List(UInt64);
  learnersNext @5 :List(UInt64);
  autoLeave @6 :Bool;
  stream @7 :UInt64;
}

struct PeerRequest {
  id @0 :UInt64;             # echoed in the response
  union {
    probe @1 :Void;          # formation: who are you?
    claim @2 :Data;          # formation: record this cluster id durably; 16 bytes
    form @3 :Formation;      # formation: become this voter of the metadata shard
    join @4 :JoinRequest;    # make me a member
    map @5 :UInt64;          # what changed in the cluster map after this version
    meta @6 :Data;           # a command for the metadata shard, passed to its leader (store.capnp MetaCommand)
  }
}

struct PeerResponse {
  id @0 :UInt64;
  union {
    error @1 :Types.Error;
    probe @2 :ProbeAnswer;
    claimed @3 :Void;
    formed @4 :Void;
    joined @5 :JoinAnswer;
    map @6 :Types.MapDelta;
    meta @7 :Data;           # store.capnp MetaReply
  }
}

struct ProbeAnswer {
  union {
    empty @0 :Void;          # no cluster id recorded
    claimed @1 :Data;        # has recorded this cluster id, not yet a member
    member @2 :Data;         # belongs to this cluster
  }
  storeId @3 :Data;
  peerAddress @4 :Text;
  clientAddress @5 :Text;
  zone @6 :Text;
  weight @7 :UInt32;
  label @8 :Text;
  node @9 :UInt64;           # NodeId of a member; 0 otherwise
}

struct Formation {
  # The first content of a cluster, alike for all its first voters; `node` tells the receiver which
  # of them it is.
  clusterId @0 :Data;
  node @1 :UInt64;
  nodes @2 :List(Types.NodeRecord);
  metadata @3 :Types.ShardRecord;
}

struct JoinRequest {
  clusterId @0 :Data;        # empty: any
  record @1 :Types.NodeRecord;   # id 0; `storeId` makes a repeated request find the same node
}

struct JoinAnswer {
  node @0 :UInt64;
  map @1 :Types.MapDelta;
}
