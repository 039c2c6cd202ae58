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
  standing @8 :Standing;     # what the cluster has decided about it
}

enum Standing {
  # What the cluster has decided about a node; whether it is up is nothing to this.
  member @0;                 # an ordinary node
  pending @1;                # asked to join, and waits for an operator's word; holds nothing
  draining @2;               # gives away what it leads and holds, gets nothing new
  leaving @3;                # given up: what it holds is replaced elsewhere without its help
  removed @4;                # no member any more; its id stays, so that it is known again
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
  # The incoming and the outgoing configuration differ only during a joint change; then both need a
  # quorum.
  voter @0;                  # counts in the quorum, in both of them during a joint change
  learner @1;                # receives the log without a vote
  incoming @2;               # counts in the incoming configuration alone: becomes a voter
  outgoing @3;               # counts in the outgoing configuration alone: leaves the group
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
  moving @8 :ShardMove;      # the change of its members under way; null: none
  target @9 :ShardTarget;    # where a rebalancing wants it, as long as it isn't there; null: where it is
  previous @10 :ShardTarget; # where it was before the last rebalancing moved it; null: it didn't
}

enum MoveCause {
  rebalance @0;              # a plan for even load
  repair @1;                 # a node is gone
  drain @2;                  # a node is to be emptied
  replicas @3;               # the shard has too few or too many of them
}

struct ShardMove {
  # Replicas that come, and replicas that go for them. The shard's members tell how far it is.
  id @0 :UInt64;             # map version at which it was begun
  adds @1 :List(MemberRecord);   # learners at first, voters in the end; created by their nodes
  removes @2 :List(UInt64);  # ReplicaIds of voters or learners that are none in the end
  cancelling @3 :Bool;       # it is to be rolled back, if it hasn't come to the joint change
  cause @4 :MoveCause;       # why
}

struct ShardTarget {
  plan @0 :UInt64;           # the plan that it is of
  nodes @1 :List(UInt64);    # NodeIds of the voters
}

struct PolicyRecord {
  # What operators have set for the cluster as a whole.
  replaceAfterMs @0 :UInt64; # a node that is gone so long is replaced; 0: never
  movesAtATime @1 :UInt32;   # shards whose members change at the same time
  bytesPerSecond @2 :UInt64; # most that a node sends in snapshots; 0: no limit
  automatic @3 :Bool;        # replicas and leaders are spread anew when nodes come and go
  approveJoins @4 :Bool;     # new nodes wait for an operator's word
  changedAt @5 :UInt64;      # as in NodeRecord
}

enum RebalanceState {
  idle @0;                   # nothing to do: the last one, if any, has ended
  running @1;                # moves are begun until every shard is where it should be
  paused @2;                 # none is begun
  cancelling @3;             # none is begun, those under way end or are rolled back
  failed @4;                 # it can't go on: see `reason`
}

struct RebalanceRecord {
  # The last rebalancing. How far it is, the targets of the shards tell.
  plan @0 :UInt64;           # names the plan; 0: there never was one
  state @1 :RebalanceState;
  moves @2 :UInt32;          # replicas to move in all
  bytes @3 :UInt64;          # bytes of those, as estimated when it was planned
  reason @4 :Text;           # why it failed or was cancelled
  changedAt @5 :UInt64;      # as in NodeRecord
  undoes @6 :UInt64;         # the plan that it takes back; 0: none
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
  policy @6 :PolicyRecord;              # likewise; null: unchanged
  rebalance @7 :RebalanceRecord;        # likewise; null: unchanged
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
    changed :group {         # what the order is about has changed since its giver looked
      what @22 :Text;        # for a person
      version @23 :UInt64;   # of the map, at which it did
    }
    behind :group {          # the replica that is to lead lacks too much of the log
      shard @24 :UInt64;     # ShardId
      node @25 :UInt64;      # NodeId of that replica
      entries @26 :UInt64;   # so many are missing there
    }
  }
}
