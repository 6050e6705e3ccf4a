@0xd6ad1a7aa6d8e3f1;
# What wetware adds to Cap'n Proto's schema language. Use it as
#
#   using Ww = import "/wetware/schema/ww.capnp";
#   publish @0 (message :Data $Ww.constrained) -> ();

annotation constrained @0xb3c1de9a40f7c2a5 (field, param) :Void;
# A grant may put a constraint on this parameter (a topic's prefix, a blob's size); what can be said of
# which type is in docs/reference/constraints.md. A parameter without the annotation cannot be
# constrained: a grant that tries is refused, so that adding a parameter never widens an existing grant
# by accident. Taking the annotation away makes calls under existing constraints fail.

annotation name @0xa94d2f3e6b1c7085 (field, param) :Void;
# This parameter names an object of the service: it is what NAME is in `ww share SERVICE:NAME`. It can
# be constrained, too: `$Ww.constrained` is not needed beside it. In all that an interface leads to, the
# parameters with `$Ww.name` have one name, are no lists or structs, and are not within a struct; else
# the schema is refused when it is loaded. A parameter of that name is held to NAME in every method
# that has it: with `$Ww.constrained` it counts as marked, without either its method is not shared.

annotation subject @0xd3f08b6a51c9e247 (field, param) :Void;
# This Text is a subject: tokens between dots, `*` for any one of them, `>` in the last place for one or more.
# One with a wildcard stands for all names that it matches, and passes a constraint only if all of these do.

annotation packed @0xe1a86b0f27c4d953 (field, param) :Void;
annotation lengths @0xb7520dc93e18f64a (field, param) :Void;
# A Data that may be several values, end to end, and in another Data of the same method how long each of
# them is: 4 bytes a value, little-endian, at most 4096 values; no lengths: one value. Grants judge and
# charge such a call as one call for each value, in turn: of values that may not all pass, those before the
# first that may not are handed on, and both parameters are cut to them; where not even the first passes,
# the call raises why. The method has to answer how many it was given. Under a constraint on the content
# of the value one is handed on at a time. The method returns no capabilities.

interface AnyCap @0xc8f5d0c1e94a7b36 {}
# A capability whose interface is not known yet; it has no methods until it is cast.

interface Subscription @0xe2c7a94b1f63d058 {
  # What is being pushed to a `Sink`, held by who subscribed. Ends when it is cancelled or released, when
  # the sink fails or is gone, and with its grant. The node lets go of the sink when it has ended.

  cancel @0 ();
  # End it; what waits is dropped. Idempotent.

  stats @1 () -> (delivered :UInt64, dropped :UInt64, buffered :UInt32, ended :Bool);
  # The items that the sink took, that were dropped because it was too slow, and that wait. Raises what
  # ended the subscription, unless that was `cancel`. Idempotent.
}

interface Sink @0xf4810d3be5a2967c {
  # A subscriber's end, given to the node and held by it until the subscription ends. When the node
  # releases it, the subscription is over: `Subscription.stats` tells why.

  push @0 (items :List(Data), dropped :UInt64) -> ();
  # The next items, in order; what an item is, the method says that took the sink. `dropped` counts those
  # that were dropped before these, since the last call. At most two calls at a time are not answered,
  # the second of them a full one: take your time, that is the backpressure. An error ends the
  # subscription. Not idempotent.
}

interface ByteStream @0xd4f18ab3c07e5926 {
  # Bytes in both directions, held by whoever reads and writes them. They are not in calls: they travel
  # in frames between the messages of the connection (rpc/transport.py), or as the descriptor of a file
  # of this machine, which the other end reads. Where a stream is passed on to
  # another connection its bytes are carried there; handed back where it was made, it stays within that
  # process. It dies when
  # either end aborts, lets go or is lost, and with its grant, whose quotas its bytes are charged to: the
  # one under which a servant returned it, or was handed it. Bytes that have not been read are lost then.
  # A connection has a bounded number.

  attach @0 (channel :UInt64) -> (code :Text, message :Text, hint :Text);
  # Once. The frames of the stream have this number from here on, which the caller chose at random; an
  # end sends no more bytes than the other one has room for, 1 MiB at first. Does not return while the
  # stream lives; returns what ended it, or raises the end of its grant. Not idempotent.

  abort @1 (code :Text, message :Text, hint :Text) -> ();
  # The caller's end failed, and why: ends both directions. Idempotent.
}

interface Source @0x9b52e6c81d0f47a3 {
  # Bytes of a known size that do not change: how one plugin hands them to another, which need not know
  # what they are of. A service that has such bytes extends it, and grants are about the heir's methods
  # (`Blob.read`). Held by whom the service gives it to, and by whom they pass it on to; it dies with the
  # grant that it was got under, and with its connection. Revocation ends the calls in flight, and the
  # streams that came of it: bytes that have not been read are lost then.

  stat @0 () -> (size :UInt64);
  # How many bytes there are. Idempotent.

  read @1 (start :UInt64 $constrained, end :UInt64 $constrained) -> (stream :ByteStream);
  # The bytes from `start` up to `end`, which is not included, and clipped to the size: 2^64-1 stands for
  # the end. The stream ends after the last of them, and at once if there is none; one that fails before
  # raises, so that a part is never taken for the whole. What is sent to it is not read. A range that a
  # grant allows is two constraints: on `start`, and on `end`. Idempotent.
}

interface Port @0x8e1d5f0b92c7a364 {
  # Something that takes connections: a TCP port of a process, for example. Held by whom its service gives it
  # to, and by whom they pass it on to. Dies with the grant that it was got under, and with what is behind
  # it; then its connections are over.

  connect @0 () -> (stream :ByteStream);
  # A new connection. Bytes that have not been read are lost when it is revoked. Not idempotent.
}

interface Granted @0xc3a96f17d40b8e52 {
  # What a program holds that a node runs outside of its own process: the first object on the one socket
  # that it has inherited, and all that there is for it. It dies with the program, and so does all that came
  # of it. A capability in it dies with the grant of who gave it.

  services @0 () -> (services :List(Given));
  # What it was given. Idempotent.

  open @1 (name :Text) -> (service :Capability, interface :UInt64);
  # One of them, by its name, and the ID of its interface. `not_found.grant`. Idempotent.

  export @2 (name :Text, cap :Capability, interface :UInt64) -> ();
  # Offers something to who started the program, by a name of its own. The node has to know the interface.
  # Not idempotent.

  struct Given {
    name @0 :Text;
    interface @1 :Text;
    methods @2 :List(Text);
    # Patterns, as of a service; who gave it may have less.
  }
}
