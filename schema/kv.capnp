@0xc2d7e80b5f91a343;
# The public protocol of a node's client port. A connection's bootstrap capability is a `Gate`;
# everything else is obtained from it.

using Types = import "types.capnp";
using Admin = import "admin.capnp";

interface Gate {
  # The door. It exists so that credentials and versions are settled before anything else, and so
  # that later security needs no other protocol.

  open @0 (hello :Hello) -> (welcome :Welcome, kv :Kv, admin :Admin.Admin);
  # Fails with a Cap'n Proto exception only if no protocol version is shared.
}

struct Hello {
  protocol @0 :Types.ProtocolRange;  # what the client speaks; this is version 1
  software @1 :Text;         # name and version of the client, for the node's log
  features @2 :List(Text);   # what the client can do beyond the protocol version; unknown names are ignored
  credentials @3 :Data;      # reserved: leave empty
}

struct Welcome {
  protocol @0 :UInt32;       # the version this connection speaks
  clusterId @1 :Data;        # 16 bytes
  node @2 :UInt64;           # NodeId of the node that answers
  software @3 :Text;         # name and version of the node's program
  features @4 :List(Text);   # what the node can do beyond the protocol version
}

interface Kv {
  # Dropping this capability frees nothing but itself; calls under way are still answered.

  map @0 (since :UInt64) -> (delta :Types.MapDelta, cutOff :Bool);
  # The cluster map as this node knows it: what changed after version `since` (0: everything). `cutOff`: the
  # node hasn't heard from the metadata shard since it started, or for 5 s. Others may know more: that it
  # doesn't know of a database says nothing then.

  batch @1 (request :BatchRequest) -> (response :BatchResponse);
  # Operations on one shard, sent to the node that leads it. They are independent of each other:
  # each succeeds or fails alone, and no order among them is promised.

  scan @2 (request :ScanRequest) -> (response :ScanResponse);
  # One page of one shard in key order.

  get @3 (database :Text, key :Data, timeoutMs :UInt32) -> (result :OpResult);
  put @4 (database :Text, key :Data, value :Data, timeoutMs :UInt32) -> (result :OpResult);
  delete @5 (database :Text, key :Data, timeoutMs :UInt32) -> (result :OpResult);
  cas @6 (database :Text, key :Data, expect :Expect, value :Data, timeoutMs :UInt32) -> (result :OpResult);
  # Plain calls for clients without routing, valid on any node: it finds the leader and forwards, one
  # hop. `timeoutMs` 0 means the node's default (10,000); at most 600,000. What certainly had no effect
  # is tried again until then. A write whose outcome can't be known is not: the answer is an
  # `unknownOutcome` error.

  watchMap @7 (since :UInt64, timeoutMs :UInt32) -> (delta :Types.MapDelta, cutOff :Bool);
  # As `map`, but the answer waits until the node knows a version above `since`; after `timeoutMs` it
  # comes all the same, with nothing new. 0 means the node's default (30,000); at most 60,000. At most 4
  # wait on a connection; a further one fails with an exception of the kind `overloaded`. A connection has such
  # an answer at most every second, with all that has changed by then. A node that is, or becomes, `cutOff`
  # says so within about a second: wait at another one.

  gather @8 (requests :List(BatchRequest)) -> (answers :Answers);
  # Several `batch`es in one call, to any shards that this node leads; none is traced. Each is a batch by itself: it
  # succeeds or fails alone, and they are begun in their order. At most 1,024, with at most 1,024 operations in all, else
  # the call fails with an exception and none is begun. A node that has this says `gather` in its welcome's features.
}

struct Answers {
  # Those that were ready soon, and the way to the others: who is done doesn't wait long for who isn't.
  list @0 :List(Answer);
  rest @1 :Rest;             # null if these are the last. Dropping it is giving up what is still under way
}

struct Answer {
  request @0 :UInt32;        # which request of the call it answers, counted from 0
  response @1 :BatchResponse;
}

interface Rest {
  # The requests of a `gather` that weren't answered yet.

  next @0 () -> (answers :Answers);
  # Some more of them, in the same way: when one is ready, with those that are soon after. Only once; what follows is in the
  # `rest` of its answer.
}

struct Expect {
  # The condition of a compare-and-set.
  union {
    absent @0 :Void;         # the key must not exist
    value @1 :Data;          # its value must equal this
    version @2 :UInt64;      # its version must equal this
  }
}

struct Operation {
  key @0 :Data;              # 1 to 4,096 bytes
  union {
    get @1 :Void;            # read the key, linearizably
    put @2 :Data;            # the value, at most 8 MiB
    delete @3 :Void;         # remove the key
    cas :group {
      expect @4 :Expect;     # the condition
      value @5 :Data;        # the new value if it holds, at most 8 MiB
    }
  }
  sequence @6 :UInt64;       # the command's number in the batch's session, from 1; 0: it has none. Never for a get
}

struct BatchRequest {
  shard @0 :UInt64;          # ShardId; all keys must lie in its range
  rangeVersion @1 :UInt64;   # the shard's epoch.range by which the sender routed
  operations @2 :List(Operation);   # at most 1,024
  timeoutMs @3 :UInt32;      # the sender stops waiting after this; 0: the node's default
  forwarded @4 :Bool;        # sent by a node for a plain call; never forwarded again
  session @5 :Data;          # 16 random bytes: the session of all operations that have a sequence; empty: none has
  openTtlMs @6 :UInt32;      # begin the session if the shard doesn't have it; it is forgotten when it wasn't used for
                             # so long, 10,000 to 6,000,000. 0: don't begin it
  ackedBelow @7 :UInt64;     # the sender will never again ask for a sequence below this; at most the least one here
  trace @8 :Bool;            # the answer tells where the batch's time went
}

struct BatchResponse {
  union {
    results @0 :List(OpResult);  # one per operation, in the order of the request
    error @1 :Types.Error;       # holds for every operation of the batch
  }
  route @2 :Types.MapDelta;  # with notLeader and staleRoute: the records that heal the sender's map
  trace @3 :Trace;           # if it was asked for
}

struct Trace {
  # Where the time of one batch went on the node that led its shard. All by the clock of that node, which only
  # goes forward; what isn't known is not there.
  stamps @0 :List(Stamp);
  followers @1 :List(FollowerTrace);   # those that the entry was sent to
}

struct Stamp {
  moment @0 :Moment;
  us @1 :UInt32;             # microseconds since the call arrived
}

enum Moment {
  # In the order in which they come; the first of several commands or entries. A read has no entry.
  submitted @0;              # checked, and in the mailbox of the shard's replica
  taken @1;                  # out of the mailbox
  proposed @2;               # in an entry of the log
  logBegun @3;               # the log writer begins the write that has the entry
  logSynced @4;              # that write is on disk
  logTold @5;                # the replica knows of it
  decided @6;                # the last has come that was waited for: the disk, an answer of a follower, a read round
  answered @7;               # applied, or read: the result of the last operation is there
  done @8;                   # the answer is made
  logQueued @9;              # the write waits for the log writer
}

struct FollowerTrace {
  replica @0 :UInt64;        # ReplicaId
  sentUs @1 :UInt32;         # microseconds since the call arrived: the entry leaves for the follower
  answered @2 :Bool;         # its acknowledgement came in time for this answer; else the rest says nothing
  answeredUs @3 :UInt32;     # microseconds since the call arrived
  totalUs @4 :UInt32;        # microseconds by the follower's own clock, from the entry's arrival to its answer
  logged @5 :Bool;           # the follower wrote the entry to its log within that, and knows how long it took
  waitUs @6 :UInt32;         # of that: until its log writer began
  syncUs @7 :UInt32;         # of that: the write and its sync
}

struct OpResult {
  union {
    value :group {           # get: found
      value @0 :Data;        # exactly the bytes that were put
      version @1 :UInt64;    # the shard's revision that wrote it; grows with every write to the shard
    }
    absent @2 :Void;         # get, delete: there is no such key
    written @3 :UInt64;      # put, cas: done, with the new version
    deleted @4 :UInt64;      # delete: done, with the version of the deletion
    mismatch :group {        # cas: the condition didn't hold, nothing was changed
      found @5 :Bool;        # whether the key exists
      value @6 :Data;        # its value and version, if it does
      version @7 :UInt64;    # 0 if it doesn't
    }
    error @8 :Types.Error;   # no result; says what may be concluded
  }
}

struct ScanRequest {
  shard @0 :UInt64;          # ShardId
  rangeVersion @1 :UInt64;   # as in BatchRequest
  prefix @2 :Data;           # only keys that begin so
  after @3 :Data;            # only keys greater than this; empty: from the start
  limit @4 :UInt32;          # at most so many pairs; 0: the node's own bound (1,000). A page is bounded in bytes too
  keysOnly @5 :Bool;         # leave the values out
  timeoutMs @6 :UInt32;      # as in BatchRequest
}

struct ScanResponse {
  union {
    page :group {
      pairs @0 :List(Pair);  # in ascending order of their keys, as bytes
      more @1 :Bool;         # true: ask again with `after` = the last key
    }
    error @2 :Types.Error;   # there is no page
  }
  route @3 :Types.MapDelta;  # as in BatchResponse
}

struct Pair {
  key @0 :Data;              # as it was put
  value @1 :Data;            # empty with keysOnly
  version @2 :UInt64;        # the shard's revision that wrote the value
}
