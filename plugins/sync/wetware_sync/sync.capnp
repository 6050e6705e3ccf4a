@0xa4c7d18e5b3f9026;
# A revisioned tree of keys, and what programs of many machines agree by: locks, elections, names.
#
# A cluster has one store of them, at one node, its home; `home` of every member says which, and the other
# methods are refused with `unsupported.not_home` anywhere else, since a user's rights are judged where the
# user is logged in. Each transaction that writes raises the store's one revision by one. What is answered
# is on disk; a write whose answer is lost may have happened, and nothing here repeats one.
#
# A lock is a key with a lease, and the revision that made the key is its fencing token: a service that
# compares tokens cannot be written to by one who held the lock before, whatever that one believes.
#
# Codes of errors: `invalid.key` and others of what is malformed, `sync.lease_ended`, `sync.compacted`,
# `sync.closed` (the store has stopped), `sync.moved` (it is another one by now), `sync.conflict`,
# `sync.unwritten` (it has not happened), `unknown.write` (nobody knows), `sync.busy`, `limit.sync`.

using Ww = import "/wetware/schema/ww.capnp";

interface Kv {
  # The bootstrap capability of the service `kv`. Dies with its session; what was written stays.

  open @0 (prefix :Text $Ww.name) -> (reader :Reader, writer :Writer, watcher :Watcher);
  # The keys that begin with `prefix`, which is "/", "/shop/" and so on; the keys that are given to the
  # three, and that they answer with, are what follows it: `price` for /shop/price. A prefix without a
  # slash at its end is one key, "" for the three. A key is 1 to 16 parts of letters, digits and
  # . _ ~ : @ + -, each after a slash, of 512 characters at most, else `invalid.key`. Idempotent.

  home @1 () -> (home :Home);
  # Where the store is. Answered by every node. Idempotent.

  lease @2 (ttlMs :UInt32, id :UInt64, epoch :UInt64) -> (lease :Lease, id :UInt64, epoch :UInt64);
  # A new lease where `id` is 0, for keys that are to go when who wrote them is gone: `id` is what a write
  # takes. It ends when nobody has kept it for `ttlMs`, 2 s to a day, and neither with the capability nor
  # with the session. With an `id` and `epoch` one of the caller's own is held again, after a lost connection:
  # `sync.lease_ended` where there is none, `sync.moved` in another store. Not idempotent.

  status @3 () -> (status :Status);
  # Of the store. Idempotent.

  compact @4 (revision :UInt64) -> ();
  # Forgets the history before `revision`; keys stay. For operators. Idempotent.

  backup @5 () -> (stream :Ww.ByteStream);
  # A copy of the store as it is now, with its key for fencing tokens: a secret. Writes wait while it is
  # made. For operators. Idempotent.

  restore @6 () -> (stream :Ww.ByteStream);
  # Puts such a copy in the place of the store: the caller sends it until its end of file, and gets the new
  # epoch, in decimal digits, once that is on the disk. The epoch is above any before, so whatever was held
  # is lost, and watches end (`sync.moved`). For operators. Not idempotent.

  etcd @7 () -> (parts :List(EtcdPart), home :Home);
  # What the members say that run the store's etcd; empty while it is in none. Answered by every node.
  # Idempotent.

  up @8 (on :List(Text)) -> (stream :Ww.ByteStream);
  # Moves the store from its home to an etcd that these members run, 3 or 5 names or peer IDs: the stream
  # tells how far it is, a line each, and ends when it is done, or with what went wrong: then the store is
  # where it was. Keys stay; leases, locks and watches end, and the epoch rises. It ends where nobody takes the lines
  # any more. For operators. Not idempotent.

  replace @9 (member :Text, by :Text) -> (stream :Ww.ByteStream);
  # Another member runs the etcd of one that is gone. As `up`, but nothing ends. For operators. Idempotent.

  down @10 (to :Text) -> (stream :Ww.ByteStream);
  # Moves the store from etcd to one node. As `up`. For operators. Not idempotent.
}

interface Sibling {
  # What members have of each other's `kv`: where the store is, and the etcd that some run for it.

  place @0 (placement :Data) -> (placement :Data);
  # Tells a placement, or nothing, and answers with the one that counts here then: the higher version, if it
  # is signed. Returns when a store that is to be closed by it is closed. Idempotent.

  prepare @1 (placement :Data, seed :Data) -> ();
  # For one that has a part in it: the key that signs placements. Idempotent.

  etcd @2 () -> (part :EtcdPart);
  # Of the etcd here, or of that which this machine would run. Idempotent.

  bring @3 () -> (stream :Ww.ByteStream);
  # Takes a store from the member that moves it, as the placement says, as `Kv.restore` does. Not idempotent.
}

struct EtcdPart {
  node @0 :Text;
  # Its peer ID.
  state @1 :Text;
  # "serves", "runs" (it joins, or the store is being moved), "cut" (it was away then), or "": none.
  version @2 :Text;
  leads @3 :Bool;
  index @4 :UInt64;
  # Of the last entry of the raft log that it has.
  bytes @5 :UInt64;
  # Of its database.
  starts @6 :UInt32;
  # How often it was started since the node was.
  failing @7 :Text;
  # Why it does not work; "" while it does.
  name @8 :Text;
  # As members call it.
}

interface Reader {
  # Reads keys below one prefix. Dies with its grant, as the next two do.

  get @0 (key :Text) -> (entry :Entry, found :Bool, revision :UInt64);
  # One key, and the revision of the store that it was read at. Idempotent.

  ls @1 (prefix :Text, after :Text, limit :UInt32, values :Bool)
      -> (entries :List(Entry), more :Bool, revision :UInt64);
  # Those that begin with `prefix` and come after the key `after`, in order: at most `limit`, and at most
  # 1000 (0 means that) and a MiB. Values only with `values`. Idempotent.
}

interface Writer {
  # Writes keys below one prefix, and compares them.

  put @0 (key :Text, value :Data $Ww.constrained, lease :UInt64, fence :Data) -> (revision :UInt64);
  # Sets a key: a value of at most 256 KiB, else `invalid.value`; `lease` is one of the caller's own, or 0.
  # With a `fence`, the `hold` of something that is held, only as long as it is, else
  # `capability.denied.fenced`. Beyond the principal's or the store's bounds: `limit.sync`. Sets it again if repeated.

  delete @1 (key :Text, below :Bool, fence :Data) -> (deleted :UInt64, revision :UInt64);
  # Deletes a key; with `below` all that begin with it, at most 1000 at once (`limit.sync`). Idempotent.

  txn @2 (compare :List(Compare), then :List(Write), else :List(Write), fence :Data)
      -> (succeeded :Bool, revision :UInt64);
  # If all comparisons hold `then`, otherwise `else`; all in one revision. At most 128 of each, and a MiB.
  # Whoever may write learns so what a key is compared with. Not idempotent.
}

interface Watcher {
  # Follows keys below one prefix.

  watch @0 (prefix :Text, revision :UInt64, epoch :UInt64)
      -> (cursor :Cursor, revision :UInt64, epoch :UInt64);
  # Every change of the keys that begin with `prefix`, from `revision` on, of the store of this epoch
  # (`sync.moved` for another one); 0, 0: from the next one. Answers with where the cursor starts. `sync.compacted` where that is forgotten. A principal has
  # at most 256. Not idempotent: each call is a cursor.
}

interface Cursor {
  # What has changed, as far as its holder has read. Dies with its grant and when it is released.

  next @0 () -> (events :List(Event), revision :UInt64);
  # Waits for changes, and gives the next ones, whole revisions, each once; `revision` is where another
  # cursor goes on. One call at a time. `sync.closed` where the store stops.
}

interface Lease {
  # Held by who has to be alive. Its end deletes the keys that have it.

  keep @0 () -> (ttlMs :UInt32);
  # It lasts for `ttlMs` from when this was *received*: count from when it was sent, by a clock that does
  # not stand still while the machine sleeps. `sync.lease_ended` for one
  # that has ended, which nothing brings back. Idempotent.

  end @1 () -> ();
  # Ends it now. Idempotent.
}

interface Sync {
  # The bootstrap capability of the service `sync`. What is held dies with its lease, not with the session.

  home @0 () -> (home :Home);
  # As `Kv.home`.

  enter @1 (ttlMs :UInt32, id :UInt64, epoch :UInt64) -> (holder :Holder, id :UInt64, epoch :UInt64);
  # One who can hold things, as long as `keep` is called in time. As `Kv.lease`.

  look @2 (name :Text $Ww.name, kind :Kind) -> (entries :List(Waiting), revision :UInt64);
  # Who holds something and who waits, in order, at most 1000. Idempotent.

  follow @3 (name :Text $Ww.name, kind :Kind, revision :UInt64) -> (entries :List(Waiting), revision :UInt64);
  # As `look`, as soon as the store's revision of it is not `revision`: how a leader is observed. Idempotent.

  add @4 (name :Text $Ww.name, by :Int64) -> (value :Int64, revision :UInt64);
  # A counter: adds, and gives what it is now. Adding 0 reads it. Not idempotent.

  block @5 (name :Text $Ww.name, blocked :Bool) -> ();
  # A barrier: raises it, or lets everybody through. Idempotent.

  pass @6 (name :Text $Ww.name, waitMs :UInt32) -> ();
  # Returns when the barrier is not raised. `sync.busy` after `waitMs`. Idempotent.
}

interface Holder extends(Lease) {
  # A lease under which things are held. A name is as the parts of a key, with slashes between.

  acquire @0 (name :Text $Ww.name, kind :Kind, nonce :Data, places :UInt32 $Ww.constrained, value :Data,
              waitMs :UInt32) -> (hold :Data, revision :UInt64);
  # Waits for it, behind all who came before. `nonce`, 16 random bytes, is how `letGo` knows it. `places` is
  # of a semaphore, how many may hold it at once; all have to say the same (`invalid.places`). Waiting ends
  # with `sync.busy` after `waitMs` (0: at once), when the call is cancelled or lost, which leaves
  # nothing, and with the lease. It is held as long as the lease lasts. `hold` is for the `fence` of writes,
  # and a secret. Not idempotent.

  letGo @1 (name :Text $Ww.name, kind :Kind, nonce :Data) -> ();
  # The next one has it; also where the answer of `acquire` was lost. Idempotent.

  proclaim @2 (name :Text $Ww.name, kind :Kind, nonce :Data, value :Data) -> (revision :UInt64);
  # Changes the value that others see, e.g. of a leader. `capability.denied.fenced` where it is not held
  # any more. Idempotent.

  token @3 (name :Text $Ww.name, kind :Kind, nonce :Data) -> (token :Data);
  # A fencing token for services of one node: only of what one alone can hold, else `unsupported.fence`, and
  # only to who holds it, else `capability.denied.fenced`. Idempotent.
}

enum Kind {
  lock @0;
  # One at a time.
  shared @1;
  # Readers of the lock of that name: together, but not with a `lock`.
  semaphore @2;
  election @3;
  # A lock of its own kind, whose holder is the leader, with a value.
}

struct Waiting {
  principal @0 :Text;
  kind @1 :Kind;
  held @2 :Bool;
  value @3 :Data;
  revision @4 :UInt64;
  # That made it: the counter of its token.
}

struct Entry {
  key @0 :Text;
  value @1 :Data;
  created @2 :UInt64;
  # The revision that made the key.
  modified @3 :UInt64;
  # The last one that wrote it.
  version @4 :UInt64;
  # Writes since it was made, that one included.
  lease @5 :UInt64;
}

struct Compare {
  key @0 :Text;
  has :union {
    equal @1 :Data;
    # The value is this, and there is one.
    modified @2 :UInt64;
    # It was written last by this revision; 0: there is no such key.
    created @3 :UInt64;
    version @4 :UInt64;
  }
}

struct Write {
  key @0 :Text;
  what :union {
    value @1 :Data;
    delete @2 :Void;
  }
  lease @3 :UInt64;
}

struct Event {
  entry @0 :Entry;
  # Of a deleted key its name and the revision (`modified`) alone.
  deleted @1 :Bool;
}

struct Home {
  node @0 :Text;
  # Its peer ID, or "" where no member is known by that name.
  engine @1 :Text;
  # "embedded": there is no other while it is down. "etcd": any of the entrances will do.
  entrances @2 :List(Text);
  # The peer IDs of all nodes that users log in at for the store, the best for a user of this one first.
}

struct Status {
  engine @0 :Text;
  epoch @1 :UInt64;
  revision @2 :UInt64;
  compacted @3 :UInt64;
  keys @4 :UInt64;
  bytes @5 :UInt64;
  leases @6 :UInt32;
  watchers @7 :UInt32;
  authority @8 :Text;
  # Whose signature its fencing tokens have, as a peer ID.
  failing @9 :Text;
  # Why nothing can be written; "" while it can.
  failover @10 :Text;
  # What happens when a machine of it dies.
}

interface Names {
  # The bootstrap capability of the service `names`: paths that people know, for CIDs, nodes and references.

  home @0 () -> (home :Home);
  # As `Kv.home`.

  set @1 (path :Text $Ww.name, value :Text, ttlMs :UInt64, expected :UInt64, checked :Bool, fence :Data) -> (revision :UInt64);
  # Sets a name: a CID, `node:PEER`, or a reference `ww1…`, which is a secret that all who may read the name
  # have. With `checked` only where it was set last by the revision `expected`, 0: where there is none
  # (`sync.conflict`). It lasts for `ttlMs`; 0: for good. Idempotent.

  get @2 (path :Text $Ww.name) -> (value :Text, revision :UInt64, expiresMs :UInt64, history :List(Past));
  # What it stands for, and the 16 values before. `not_found.name`. Idempotent.

  ls @3 (path :Text $Ww.name, after :Text, limit :UInt32) -> (names :List(Name), next :Text);
  # Names that begin with `path`, in order; those behind have to be asked for with `after` = `next`, unless
  # that is "". Idempotent.

  rm @4 (path :Text $Ww.name, fence :Data) -> (removed :Bool);
  # Idempotent.
}

struct Name {
  path @0 :Text;
  value @1 :Text;
  revision @2 :UInt64;
  expiresMs @3 :UInt64;
}

struct Past {
  value @0 :Text;
  setMs @1 :UInt64;
  by @2 :Text;
  # A principal.
}
