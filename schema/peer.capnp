@0xb80c5d3e6fa71294;
# What nodes say to each other on the peer port. Not for clients. Messages travel in frames of their
# own (docs/protocol.md), not through Cap'n Proto RPC: one frame carries the messages of many groups.

using Types = import "types.capnp";

enum Lane {
  # A connection's class. Each has a connection of its own so that bulk never delays liveness.
  control @0;                # heartbeats, votes, read rounds
  append @1;                 # log entries
  request @2;                # formation, join, map pulls: request and answer
  snapshot @3;               # one snapshot of one shard: an offer, an answer, its bytes, an answer
}

struct PeerHello {
  protocol @0 :Types.ProtocolRange;  # versions of the peer protocol that the dialler speaks
  clusterId @1 :Data;        # 16 bytes; empty: not yet a member (lane `request` only)
  fromNode @2 :UInt64;       # 0: not yet a member
  toNode @3 :UInt64;         # the node meant; 0: whoever answers (lane `request` only)
  lane @4 :Lane;             # what this connection is for
  incarnation @5 :UInt64;    # drawn at each start of the process
}

struct PeerWelcome {
  union {
    accepted @0 :UInt32;     # the protocol version spoken from here on
    refused @1 :Text;        # why not, for the dialler's log
  }
  node @2 :UInt64;           # NodeId of the node that answers; 0: not yet a member
  incarnation @3 :UInt64;    # drawn at each start of its process
  reason @4 :HelloRefusal;   # refused: for programs
}

enum HelloRefusal {
  # Why a connection is refused, as far as the dialler has to act on it.
  other @0;                  # see the text
  removed @1;                # the dialler was removed from the cluster: it should stop
  duplicate @2;              # a process that is alive says that it is the same node as the dialler
}

struct PeerFrame {
  union {
    raft @0 :List(RaftMessage);   # of any number of groups; lanes `control` and `append`
    heartbeat @1 :NodeHeartbeat;  # lane `control`
    request @2 :PeerRequest;      # lane `request`, from the dialler
    response @3 :PeerResponse;    # lane `request`, from the acceptor
    snapshot @4 :SnapshotFrame;   # lane `snapshot`
  }
}

struct NodeHeartbeat {
  node @0 :UInt64;           # NodeId of the sender
  incarnation @1 :UInt64;    # which start of its process
  mapVersion @2 :UInt64;     # version of the cluster map the sender holds
  diskFull @3 :Bool;         # its disk has less free than its reserve: it should not lead
  mapAge @4 :UInt32;         # 1 and the milliseconds since that map was known to be what the metadata shard's
                             # leader has; 0: never since the sender started
  ended @5 :UInt64;          # replicas that have ended by themselves, since the sender started
}

struct RaftEntry {
  term @0 :UInt64;           # of the leader that proposed it
  index @1 :UInt64;          # its place in the log
  kind @2 :UInt8;            # eraftpb EntryType: 0 normal, 1 conf change, 2 conf change v2
  data @3 :Data;             # a batch of commands (`machine::entry`), or a change of membership
  context @4 :Data;          # of a change of membership: the MemberRecords it is about
}

struct RaftMessage {
  # One message of raft-rs and the address of its group.
  # The fields from `kind` on are those of raft-rs, which defines what each kind of message uses.
  shard @0 :UInt64;          # ShardId
  epoch @1 :Types.Epoch;     # of the shard as the sender knows it
  kind @2 :UInt8;            # eraftpb MessageType
  to @3 :UInt64;             # ReplicaId
  from @4 :UInt64;           # ReplicaId
  term @5 :UInt64;           # of the sender; 0: none
  logTerm @6 :UInt64;        # term of the entry at `index`
  index @7 :UInt64;          # log index before `entries`, or that is acknowledged
  commit @8 :UInt64;         # log index up to which the sender knows entries as committed
  commitTerm @9 :UInt64;     # term of the entry at `commit`
  reject @10 :Bool;          # answer: no
  rejectHint @11 :UInt64;    # log index at which to try instead
  requestSnapshot @12 :UInt64;   # log index from which a snapshot is asked for; 0: none
  priority @13 :Int64;       # of a candidate
  context @14 :Data;         # of a read round: incarnation and counter; of a vote: kind of campaign; of an append
                             # and its answer: what is traced (docs/protocol.md)
  entries @15 :List(RaftEntry);  # consecutive, in order
  snapshot @16 :SnapshotHeader;  # absent in all but snapshot messages
  safeIndex @17 :UInt64;     # from a leader: no replica of the group still needs an entry up to here
  sleep @18 :SleepWord;      # with a heartbeat: the group is to go to sleep; with the answer: agreed. Absent otherwise
}

struct SleepWord {
  # While a group sleeps its leader sends no heartbeats: those of the leader's node stand for them, as long as they
  # are of the same process.
  process @0 :UInt64;        # incarnation of the leader's node
  round @1 :UInt64;          # which attempt of the leader's it is
}

struct SnapshotHeader {
  # Metadata of a snapshot in a raft message. Reserved: what a snapshot is, its offer tells on the
  # lane `snapshot`, where its data travels too.
  index @0 :UInt64;          # log index of the last entry in it
  term @1 :UInt64;           # that entry's term
  voters @2 :List(UInt64);   # ReplicaIds; with the next four fields raft's ConfState
  learners @3 :List(UInt64);        # ReplicaIds
  votersOutgoing @4 :List(UInt64);  # ReplicaIds, during a joint change
  learnersNext @5 :List(UInt64);    # ReplicaIds, during a joint change
  autoLeave @6 :Bool;        # whether the joint change ends by itself
  stream @7 :UInt64;         # names the stream that brings the data
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
    survey @7 :Void;         # what do you hold and lead, and how is it?
    order @8 :Order;         # for a leader on the receiver
    mark @9 :UInt64;         # ShardId: for its leader on the receiver: put a mark into its log
    digest @10 :DigestRequest;   # of a replica on the receiver
  }
}

struct PeerResponse {
  id @0 :UInt64;             # of the request
  union {
    error @1 :Types.Error;   # refused
    probe @2 :ProbeAnswer;   # who this node is
    claimed @3 :Void;        # recorded durably
    formed @4 :Void;         # recorded durably
    joined @5 :JoinAnswer;   # welcome
    map @6 :Types.MapDelta;  # what changed
    meta @7 :Data;           # store.capnp MetaReply
    survey @8 :Survey;       # how it is
    pending @10 :UInt64;     # join: it is known under this NodeId, and waits for an operator's word
    done @9 :Void;           # order: a change of members is committed and in force, another replica leads
    marked @11 :Marked;      # the mark is committed, and applied by the leader
    digest @12 :ReplicaDigest;   # what the replica's state is
  }
}

struct Marked {
  # An entry that changes nothing. Every replica that applies it can tell what its state is at it, for a while.
  index @0 :UInt64;          # log index of the mark
  leader @1 :UInt64;         # ReplicaId
  members @2 :List(Types.MemberRecord);   # as the leader has applied them
}

struct DigestRequest {
  shard @0 :UInt64;          # ShardId
  index @1 :UInt64;          # log index of a mark
  timeoutMs @2 :UInt32;      # milliseconds that the asker waits
}

struct ReplicaDigest {
  replica @0 :UInt64;        # ReplicaId
  index @1 :UInt64;          # log index of the last entry in the state; that of the mark
  data @2 :Data;             # 16 bytes: xxh3-128 over keys and values; the high byte first
  sessions @3 :Data;         # 16 bytes: xxh3-128 over sessions, revision counter and log time, likewise
  keys @4 :UInt64;
  bytes @5 :UInt64;          # of keys and values
}

struct Order {
  # What the leader of a shard is to do, for the sake of the cluster as a whole. May be repeated: a change
  # that was made is refused as stale.
  shard @0 :UInt64;          # ShardId
  conf @1 :UInt64;           # of a change: the shard's epoch.conf as known; refused with another one
  union {
    addLearners @2 :List(Types.MemberRecord);   # change: they receive the log without a vote
    exchange :group {        # change: a joint one, all at once
      promote @3 :List(UInt64);   # ReplicaIds of learners that become voters
      remove @4 :List(UInt64);    # ReplicaIds of voters that leave the group
    }
    removeLearners @5 :List(UInt64);   # change: ReplicaIds
    transfer @6 :UInt64;     # NodeId whose replica should lead
  }
}

struct Survey {
  # What a node tells of itself.
  node @0 :UInt64;           # NodeId
  diskFull @1 :Bool;         # its disk has less free than its reserve
  led @2 :List(ShardReport); # shards that its replicas lead
  held @3 :List(HeldReplica);     # all replicas that it holds
  sick @4 :List(SickReplica);     # those of them that are out of service and won't recover by themselves
  snapshotBytes @5 :UInt64;  # sent in snapshots since its process began
}

struct ShardReport {
  # A shard as the replica sees it that leads it.
  shard @0 :UInt64;          # ShardId
  leader @1 :UInt64;         # ReplicaId
  term @2 :UInt64;           # of the leader
  epoch @3 :Types.Epoch;     # as applied
  members @4 :List(Types.MemberRecord);   # as applied
  followers @5 :List(FollowerReport);     # how far the others are
  last @6 :UInt64;           # last index of the leader's log
  keys @7 :UInt64;           # as last counted; an estimate
  bytes @8 :UInt64;          # of keys and values, as last counted; an estimate
}

struct FollowerReport {
  replica @0 :UInt64;        # ReplicaId
  matched @1 :UInt64;        # last log index that it has acknowledged
  active @2 :Bool;           # it answered within the last election timeout
  caughtUp @3 :Bool;         # it could vote at once without holding the group up
}

struct HeldReplica {
  shard @0 :UInt64;          # ShardId
  replica @1 :UInt64;        # ReplicaId
}

struct SickReplica {
  shard @0 :UInt64;          # ShardId
  replica @1 :UInt64;        # ReplicaId
  why @2 :Text;              # why it doesn't serve
}

struct ProbeAnswer {
  union {
    empty @0 :Void;          # no cluster id recorded
    claimed @1 :Data;        # has recorded this cluster id, not yet a member
    member @2 :Data;         # belongs to this cluster
  }
  storeId @3 :Data;          # this and the next five: see Types.NodeRecord
  peerAddress @4 :Text;      # HOST:PORT
  clientAddress @5 :Text;    # HOST:PORT
  zone @6 :Text;             # failure domain
  weight @7 :UInt32;         # share of replicas; 100 is ordinary
  label @8 :Text;            # the operator's name for the node
  node @9 :UInt64;           # NodeId of a member; 0 otherwise
}

struct Formation {
  # The first content of a cluster, alike for all its first voters; `node` tells the receiver which
  # of them it is.
  clusterId @0 :Data;        # 16 bytes
  node @1 :UInt64;           # NodeId of the receiver
  nodes @2 :List(Types.NodeRecord);   # the first voters of the metadata shard
  metadata @3 :Types.ShardRecord;     # shard 0
}

struct JoinRequest {
  clusterId @0 :Data;        # empty: any
  record @1 :Types.NodeRecord;   # id 0; `storeId` makes a repeated request find the same node
}

struct JoinAnswer {
  node @0 :UInt64;           # NodeId of the new member
  map @1 :Types.MapDelta;    # the whole cluster map
}

struct SnapshotFrame {
  # One step of a transfer. The dialler offers; the acceptor answers with `resumeAt` and the dialler
  # sends chunks from there to the end of the file, then `end`; any other answer ends the transfer,
  # at whatever point it comes, save `working`.
  union {
    offer @0 :SnapshotOffer;     # from the dialler, first and once
    chunk @1 :SnapshotChunk;     # from the dialler
    end @2 :Void;                # from the dialler: that was the whole file
    answer @3 :SnapshotAnswer;   # from the acceptor
  }
}

struct SnapshotOffer {
  # Which snapshot, and for whom.
  stream @0 :Data;           # 16 random bytes drawn when the snapshot file was made: a part received of it
                             # on an earlier connection counts
  shard @1 :UInt64;          # ShardId
  from @2 :UInt64;           # ReplicaId of the leader that offers it
  to @3 :UInt64;             # ReplicaId of the follower that needs it
  epoch @4 :Types.Epoch;     # of the shard as the leader knows it
  index @5 :UInt64;          # log index of the last entry in it
  term @6 :UInt64;           # that entry's term
  leaderTerm @7 :UInt64;     # term of the leader; at least `term`
  bytes @8 :UInt64;          # size of the whole file
}

struct SnapshotChunk {
  offset @0 :UInt64;         # where in the file: chunks follow one another without a gap
  data @1 :Data;             # not empty
}

struct SnapshotAnswer {
  union {
    resumeAt @0 :UInt64;     # send from this byte on; at most the file's size
    notNeeded @1 :Void;      # the replica has all that is in it
    busy @2 :UInt32;         # not now; milliseconds after which to offer it again
    refused @3 :Text;        # never; for the dialler's log
    working @4 :Void;        # still looking at what it has, or checking and loading the whole
    installed @5 :Void;      # the replica stands at the snapshot, durably
    failed @6 :Text;         # the file can't be used; another one must be made. For the dialler's log
  }
}
