@0xc3f9a1d27be8405f;
# Content-addressed storage of the cluster, as capabilities.
#
# What is put gets the CID that Kubo and Helia give it (UnixFS, CIDv1 by default). A CID is no secret:
# whoever may `open` without a constraint reads what they can name. Who holds a Blob reads that one and
# what is below it, and learns of no other. What a user may do is decided by the node of their session;
# other members are asked for blocks only, and each block is verified before a byte of it is used.
#
# CIDs are text in their canonical form: `b…` in base32 for version 1, `Qm…` for version 0.

using Ww = import "/wetware/schema/ww.capnp";

interface Store {
  # The bootstrap capability of the service `blob`, held by sessions whose role covers it. Dies with its
  # session. What was pinned stays: pins belong to the principal, not to the session. Under a share it is
  # the principal who gave it whose pins and quota are meant. A principal has at most 16 puts and pins that
  # go on, and 32 Blobs that were read and are held: more are refused, as `limit`.

  open @0 (cid :Text $Ww.name, local :Bool) -> (blob :Blob);
  # The capability of one CID. Says nothing of whether anybody has it: `Blob.stat` does, which looks for
  # it in the cluster for a bounded time, or at this node alone if `local`. `invalid.cid` for a text that
  # is no CID, or one of a hash or codec that is not served. Idempotent.

  put @1 (pin :PinTerms, form :Form, profile :Text, bytesMax :UInt64 $Ww.constrained)
      -> (stream :Ww.ByteStream, transfer :Transfer);
  # Takes a file or a CAR from `stream`, until its end of file, and pins it with `pin`. More than
  # `bytesMax` bytes are refused (`limit.blob_bytes`), so a bound on it is a bound on what is put;
  # beyond the principal's quota, `limit.blob_quota`; beyond 100,000 pins of theirs at this node,
  # `limit.blob_pins`. `transfer` ends when it is on disk here and at `pin.ack` members. Released before it
  # is on disk here, the put is over and nothing is pinned; while members are waited for, the pin stays.
  # Not idempotent: each call is a pin.

  pin @2 (root :Text, pin :PinTerms) -> (transfer :Transfer);
  # Fetches all that `root` reaches, unless it is here, and pins it. A pin of the same root and name is
  # replaced. As `put` in all else.

  unpin @3 (root :Text, name :Text) -> (pins :UInt32);
  # Ends the principal's own pins of `root` that are called `name` ("": all of them); returns how many.
  # The blocks go with the next collection, and the copies at other members. Idempotent.

  pins @4 (root :Text, after :UInt64, limit :UInt32) -> (pins :List(PinInfo), next :UInt64);
  # The principal's own pins, the oldest first, of `root` alone unless that is "". At most `limit`, and at
  # most 1000 (0 means that), behind `after`: 0, or the `next` of the page before, which is 0 at the end.
  # Whatever is pinned and given up between two pages, no other pin is missed. One that is damaged counts
  # in `limit`, and is not told. Idempotent.

  rm @5 (root :Text) -> (pins :UInt32, pinnedBy :List(PinInfo), others :UInt32, freedBytes :UInt64);
  # As `unpin` of all names, and collects what nothing keeps any more. `pinnedBy` are the principal's pins
  # that still reach `root`, `others` how many pins of others do. Idempotent.

  usage @6 () -> (usage :Usage);
  # What the principal's pins are charged, and the limit. Idempotent.

  gc @7 (dryRun :Bool, dropDamaged :Bool)
      -> (blocks :UInt64, bytes :UInt64, keptBlocks :UInt64, keptBytes :UInt64, dropped :List(Text));
  # Removes the blocks of this node that no pin, no unfinished transfer and no open Blob reaches, or says
  # which would be (`dryRun`). `blob.damaged` where a pin is, as it is not known what it keeps. With
  # `dropDamaged` these pins are given up first, here and at who has copies: `dropped` names them, at most
  # 1000; the log has all. For operators. Idempotent.

  verify @8 (sink :Ww.Sink) -> (subscription :Ww.Subscription);
  # Reads every block and pin of this node once and pushes what is damaged, an item each: a JSON object
  # with `what`, `name`, `mended`; the last has `what: "end"`, with counts. For operators.
  # Not idempotent.

  all @9 (after :UInt64, limit :UInt32) -> (pins :List(PinInfo), next :UInt64, usage :Usage);
  # As `pins`, of every principal at this node, and what the node's disk has. For operators. Idempotent.

  drain @10 () -> (transfer :Transfer);
  # Hands what is pinned here to other members, for a node that leaves for good: ends when as many others as
  # each pin wants have it, without this one; all of them where fewer can, and at least one. Meanwhile, and
  # from then on until it is started again, this node takes no copies and counts for none; where it fails,
  # or is released before its end, the node is as before. `overlay.copies` where it comes to a halt,
  # `blob.store` where pins are damaged, as these could not be handed over. For operators. Idempotent.
}

interface Blob extends(Ww.Source) {
  # One CID, and what is below it. Whoever holds it may read, within its grant. Dies with the session, or
  # the grant, that it came from. While it is held its blocks are not collected at this node.
  #
  # Every method raises `not_found.blob` where nobody has it, after a bounded time. `stat` and `read` are
  # of a file: `invalid.not_a_file` for others.

  ls @0 (skip :UInt32, limit :UInt32) -> (entries :List(Entry), more :Bool);
  # The entries of a directory, in the order of its blocks, at most `limit`, and at most 1000 (0 means
  # that); `more` where there may be some behind them. `invalid.not_a_directory` for others. Idempotent.

  at @1 (path :Text) -> (blob :Blob, cid :Text);
  # What is below under a path of names with slashes; symbolic links are not followed. `not_found` where
  # there is none. Idempotent.

  tree @2 (skip :UInt64, start :UInt64 $Ww.constrained, end :UInt64 = 0xffffffffffffffff $Ww.constrained)
      -> (stream :Ww.ByteStream);
  # All of a directory as a CAR v1: its blocks in the order in which a reader of its tree needs them, depth
  # first and each as often as it is linked to, but only the first block, if any, of as many files and
  # links as `skip` says: one who has these goes on from there. Names that no file can have, and links
  # that may lead out of it, are refused. `start` and `end` are what they are by default, else
  # `invalid.range`: a grant of a range of bytes, which is judged by them, does not give all. Idempotent.

  car @3 (start :UInt64 $Ww.constrained, end :UInt64 = 0xffffffffffffffff $Ww.constrained)
      -> (stream :Ww.ByteStream);
  # All its blocks as a CAR v1 with one root, each once, in the order of the tree. `start` and `end` are as
  # in `tree`. Idempotent.

  info @4 () -> (info :Entry);
  # What it is, as an entry without a name: who gets one does not know whether it is a file. Raises as
  # `stat`. Idempotent.
}

enum Form {
  file @0;
  # The bytes of one file.
  car @1;
  # A CAR of version 1 with one root, or with none, and the last block is the root then. Its blocks are
  # all in it or at this node.
}

struct PinTerms {
  # What a pin is to be.
  name @0 :Text;
  # For people, at most 255 bytes; may be "".
  copies @1 :UInt8;
  # How many members keep it, this node included; 0 and 1: this node alone. At most 16.
  where @2 :Text;
  # A selector of the members that may keep copies, "" for all.
  ack @3 :UInt8;
  # How many have it on disk before the transfer is done, this node included; at most `copies`.
  public @4 :Bool;
  # Whether the DHT is told that this node has it.
}

struct PinInfo {
  root @0 :Text;
  name @1 :Text;
  owner @2 :Text;
  kind @3 :Text;
  # "file", "directory", "symlink", or "dag" for what is no UnixFS.
  size @4 :UInt64;
  # Of a file its bytes; of others those of their blocks, each as often as it is linked to.
  chargedBytes @5 :UInt64;
  # What it counts for in the quota: all its blocks, with what the disk needs for them.
  createdMs @6 :UInt64;
  copies @7 :UInt8;
  where @8 :Text;
  holders @9 :List(Text);
  # The members that are known to have it all, peer IDs, this node included.
  public @10 :Bool;
}

struct Usage {
  pins @0 :UInt32;
  chargedBytes @1 :UInt64;
  quotaBytes @2 :UInt64;
  # 0: none but the node's.
  blocks @3 :UInt64;
  # Of the node, like what follows; 0 for who is no operator.
  diskBytes @4 :UInt64;
  diskBytesMax @5 :UInt64;
  freeBytes @6 :UInt64;
}

struct Entry {
  name @0 :Text;
  cid @1 :Text;
  kind @2 :Text;
  # "file", "directory", "symlink", or "dag" for what is no UnixFS.
  size @3 :UInt64;
  # Of a file its bytes, of others what their blocks take.
}

interface Transfer {
  # Work that goes on at the node, held by who asked for it. It is over, and what it had reserved is given
  # back, when it is released; it dies with the grant that it came from.

  progress @0 (waitS :Float64) -> (state :State);
  # How far it is, after `waitS` seconds or, if that is sooner, at its end; at most 25. Raises what ended it.
  # Idempotent.

  struct State {
    done @0 :Bool;
    root @1 :Text;
    # "" while it is not known.
    bytes @2 :UInt64;
    # Its size (see PinInfo) once all of it is here; before that of a put what came of its stream, of a pin 0.
    total @3 :UInt64;
    # 0 while it is not known.
    copies @4 :UInt8;
    # Members that have all of it on disk.
    doing @5 :Text;
    # For people: "reading", "fetching", "writing", "copying: 1 of 3 members have it".
  }
}

interface Sibling {
  # What a node's blob service gives to that of another member. Never acts for a user. Dies with the
  # connection, and when the member is evicted.

  have @0 (roots :List(Data)) -> (have :List(Bool));
  # Which of these blocks this node has, and does not know to be damaged: at most 1024 digests of 32
  # bytes. What is below them it may lack. Idempotent.

  # What follows is of copies: pins that several members keep. Each has a home, the member at which a user
  # pinned it, and an ID of 32 bytes, the SHA-256 of `Copy.pin`, `Copy.root` and `Copy.home`: so no member
  # can speak of the copies of another home. At most 1024 IDs are taken in a call.

  holding @1 (ids :List(Data)) -> (holding :List(Bool));
  # Which of these copies this node has on its disk and counts for. Idempotent.

  keep @2 (copy :Copy) -> (room :Bool, done :Bool, bytes :UInt64);
  # Asks this node to keep a copy, which it fetches from any member. `room` says whether it will, `done`
  # whether it has all of it on disk, `bytes` what is charged for what was fetched since it began. What is
  # more than `copy.bytes` says is given up. For each that asks 64 wait at most, and 2 are fetched. Taken of
  # the home, and of any member while the home is away for longer than the grace, evicted or unknown;
  # charged to who asks, within what any owner may have. Idempotent: ask again to hear how it goes.

  lease @3 (id :Data) -> (seconds :Float64);
  # A promise, on this node's disk when it is answered, to keep its copy for so long, whatever others do
  # meanwhile; only its home's word, or that of this node's operator, ends it sooner. 0: it has none, or
  # may be about to drop its own. `limit` while it is promised to another, and for more than 8 of these and
  # `wanted` at a time. Idempotent.

  drop @4 (ids :List(Data)) -> ();
  # These are pinned no more at their home: who asks. Those of other homes are left as they are. Idempotent.

  wanted @5 (ids :List(Data)) -> (store :Data, wanted :List(Wanted));
  # What this node, their home, wants of these copies, and the ID of its store, 8 bytes. Where that is
  # not the one that `Copy.pin` begins with, the store has been made anew, and knows nothing of what was
  # pinned before: 0 says nothing then, and the copies are kept as those of a home that is gone. Raises
  # where pins may be damaged or lost. Idempotent.

  struct Wanted {
    copies @0 :UInt8;
    # 0: it is not pinned in this store.
    where @1 :Text;
  }
}

struct Copy {
  # A pin, as the members that keep it know it.
  root @0 :Data;
  # The CID's bytes.
  home @1 :Text;
  # Peer ID.
  pin @2 :Data;
  # Which one of the home's, 16 bytes; the first 8 are the ID of the home's store.
  copies @3 :UInt8;
  # Wanted, with the home; at most 16.
  where @4 :Text;
  # Selector of the members that may keep one.
  bytes @5 :UInt64;
  # What it is charged, by each who keeps it.
}
