@0xf1b3a9c47d20e651;
# Types shared by every interface of Pontoon: identifiers, the records of the cluster map, errors.
#
# Rules of evolution: ordinals are never reused or renumbered; a field is added at the end; a reader
# treats a field it doesn't know as absent and an enumerant it doesn't know as an error it may retry
# only if `Error.retryable` says so.

struct ProtocolRange {
  # The protocol versions a side speaks, both ends included. Two sides use the greatest version that
  # both speak; if there is none, the connection is refused with a message that says which.
  min @0 :UInt32;            # the oldest version spoken, from 1
  max @1 :UInt32;            # the newest
}

struct NodeRecord {
  # One process of the cluster as the metadata shard knows it.
  id @0 :UInt64;             # NodeId, from 1; never reused
  label @1 :Text;            # the operator's name for it (`node.id` in the settings); no meaning to the cluster
  clientAddress @2 :Text;    # HOST:PORT that clients dial
  peerAddress @3 :Text;      # HOST:PORT that other nodes dial
  zone @4 :Text;             # failure domain; empty: none given
  weight @5 :UInt32;         # share of replicas relative to the other nodes; 100 is ordinary
  storeId @6 :Data;          # 16 random bytes drawn when the node's directory was made
  changedAt @7 :UInt64;      # version of the cluster map at which this record last changed
}

struct DatabaseRecord {
  id @0 :UInt64;             # DatabaseId, from 1; never reused. 0 is the metadata shard's own
  name @1 :Text;             # [A-Za-z0-9_-]{1,64}
  replicas @2 :UInt32;       # voters that each shard should have
  shards @3 :List(UInt64);   # ShardIds in ascending order of their ranges
  dropped @4 :Bool;          # true: the name is free again, the record stays to tell late readers
  changedAt @5 :UInt64;      # as in NodeRecord
}

enum MemberRole {
  voter @0;                  # counts in the quorum
  learner @1;                # receives the log without a vote
}

struct MemberRecord {
  replica @0 :UInt64;        # ReplicaId: the raft id; unique in the cluster, never reused
  node @1 :UInt64;           # NodeId that holds it
  role @2 :MemberRole;       # whether it votes
}

struct Epoch {
  # Versions of one shard's description. Requests of clients are checked against `range` only.
  range @0 :UInt64;          # grows when the shard's ring range changes (split, merge)
  conf @1 :UInt64;           # grows when its membership changes
}

struct ShardRecord {
  id @0 :UInt64;             # ShardId, from 1; 0 is the metadata shard
  database @1 :UInt64;       # DatabaseId
  start @2 :UInt64;          # first position on the 64-bit ring, inclusive
  end @3 :UInt64;            # last position, inclusive
  epoch @4 :Epoch;           # versions of this description
  members @5 :List(MemberRecord);   # its replicas; which of them leads is not part of the map
  dropped @6 :Bool;          # true: its database was dropped
  changedAt @7 :UInt64;      # as in NodeRecord
}

struct MapDelta {
  # The cluster map, or what changed in it: every record whose `changedAt` is above `since`. A receiver
  # whose own version is at least `since` is at `version` afterwards; another one takes the records
  # over and keeps its version. So a delta with `since` = `version` is a set of fresh records, no more.
  clusterId @0 :Data;        # 16 bytes
  since @1 :UInt64;          # 0: the whole map
  version @2 :UInt64;        # version after applying this delta
  nodes @3 :List(NodeRecord);           # each takes the place of an older one of the same id
  databases @4 :List(DatabaseRecord);   # likewise; dropped ones stay in the map, marked
  shards @5 :List(ShardRecord);         # likewise
}

enum Applied {
  no @0;                     # the operation certainly had no effect and never will
  unknown @1;                # it may have taken effect, or may yet
}

struct Error {
  # Why an operation got no result. The fixed fields come first so that a client which doesn't know
  # the member of the union still knows what it may do.
  applied @0 :Applied;       # whether the operation may have had an effect; holds for any member
  retryable @1 :Bool;        # true: the same request may succeed later or elsewhere
  retryAfterMs @2 :UInt32;   # milliseconds to wait before that; 0: at once
  message @3 :Text;          # for a person: the thing, the cause, the way out

  union {
    other @4 :Void;          # see the message
    notLeader :group {       # this replica doesn't lead the shard
      shard @5 :UInt64;      # ShardId, as asked for
      leaderNode @6 :UInt64; # NodeId of the leader as far as known; 0: unknown
    }
    staleRoute :group {      # the request was routed with an old range version, or to a wrong node
      shard @7 :UInt64;      # ShardId, as asked for
      rangeVersion @8 :UInt64;  # the version in force here; 0: the shard isn't here
      asked @18 :UInt64;     # the version in the request
    }
    busy @9 :Void;           # a bounded queue is full; retryAfterMs says when to come back
    unknownDatabase @10 :Text;  # its name; no retry helps until somebody creates it
    invalid @11 :Void;       # the request breaks a rule (limits, malformed); never retryable
    unknownOutcome @12 :Void;   # proposed, but leadership, replica or node was lost before the answer
    superseded @13 :Void;    # another entry was committed at its place: certainly not applied
    unavailable @14 :Void;   # starting, stopping, or without a leader
    quarantined @15 :Void;   # the replica crashed too often and is out of service
    refused @16 :Void;       # the cluster says no (name taken, too few nodes, …)
    deadline @17 :Void;      # the time given ran out
    sessionExpired @19 :Void;   # the shard doesn't have the command's session (any more)
    staleCommand @20 :Void;  # the session has acknowledged the command's result, which is forgotten
    diskFull @21 :Void;      # too little disk space is left for new values; deletes and reads go on
  }
}
