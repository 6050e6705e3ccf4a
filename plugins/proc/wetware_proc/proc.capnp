@0xd0a4f6b3c18e2795;
# Processes: programs that run at a node with nothing but what they were given.
#
# What a user may run is decided by the node that runs it: a client that wants another node logs in there.
# A program has its standard streams, its arguments, its environment, a /tmp of its own, and the
# capabilities that it was given by name: no other file, no network, nothing else of who spawned it.

using Ww = import "/wetware/schema/ww.capnp";

interface Executor {
  # The bootstrap capability of the service `proc`, held by sessions whose role covers it. Dies with its
  # session. How many a principal may have, and what they may take together, is bounded: `limit`.

  load @0 (code :Ww.Source, kind :Text) -> (image :Image, hash :Text);
  # Reads a program with the caller's own capability, checks it, and compiles it unless this machine has
  # done so before; `hash` is the SHA-256 of its bytes, in hex. `kind` is "wasm", which "" means as well, or "python".
  # `proc.code` for what is no program that runs here, or takes too much to compile;
  # `unsupported.driver` for a kind that does not run here. Idempotent.

  processes @1 (skip :UInt32, limit :UInt32) -> (processes :List(Info), matched :UInt32);
  # The principal's own, those that have ended lately included; the newest first. At most `limit`, and at
  # most 256 (0 means that), of `matched`. Idempotent.

  open @2 (id :Text $Ww.name) -> (process :Process);
  # One of the principal's own; letting go of it ends nothing. `not_found.process`. Idempotent.

  end @3 (id :Text $Ww.name) -> ();
  # As `Process.kill`, of one of the principal's own. Idempotent.

  all @4 (skip :UInt32, limit :UInt32) -> (processes :List(Info), matched :UInt32);
  # As `processes`, of everybody at this node. For operators. Idempotent.

  endAny @5 (id :Text $Ww.name) -> ();
  # As `end`, of anybody. For operators. Idempotent.

  rooms @6 (on :Text, programs :List(Text)) -> (rooms :List(Room));
  # Where a process could run: what the members say of themselves, of which the selector `on` holds ("": all),
  # at most 64. What others say may be a second old. Members that do not answer at once are left out.
  # It gives nothing: whoever wants to run something there logs in there. Each of at most 16 `programs` is a
  # hash, or what `Spec.code` called it; so who knows one learns where it has run. Idempotent.

  detach @7 (code :Ww.Source, kind :Text, spec :Spec, policy :Text, session :Capability) -> (id :Text);
  # Starts a program that outlives its spawner, its session and the node's process; returns when it runs and
  # is on disk. `policy` says when it is started again: "never", "on-failure", "always", with pauses that
  # grow; one that ends at once again and again is given up. Its `spec` has no live grants
  # (`invalid.live_grant`) but `named` ones, of `session`, which is the caller's at this node: they are
  # durable grants of this node, and the program ends when the one that they are below does. A limit of time
  # is none where it is not given. Not idempotent.
}

struct Room {
  node @0 :Text;
  # Its peer ID.
  name @1 :Text;
  running @2 :UInt32;
  # Processes that run there.
  processes @3 :UInt32;
  # That could be added, at the node that is asked by this principal, at others as far as the node goes.
  memoryBytes @4 :UInt64;
  # That none of its processes may have yet.
  processors @5 :UInt32;
  load @6 :Float64;
  # Load average over a minute, per processor.
  prepared @7 :List(Bool);
  # Whether each of the programs was loaded there since the node was started.
}

interface Sibling {
  # What a node's proc service tells that of another member. Never acts for a user. Dies with the
  # connection, and when the member is evicted.

  room @0 (programs :List(Text)) -> (room :Room);
  # This node's, without its name. Idempotent.
}

interface Native {
  # The bootstrap capability of the service `native`, which a node has where its operator has said so: programs
  # of the machine itself, each in namespaces of its own. Held by sessions whose role covers it; dies with its
  # session. Its processes are among the principal's of `Executor`, which has all else about them.

  program @0 () -> (image :Image);
  # Not a program yet: the first of `Spec.args` names it, as it is found in /usr or in a directory that comes
  # with the spec. A limit that this machine cannot enforce is refused: `unsupported.limit`. Idempotent.

  detach @1 (spec :Spec, policy :Text, session :Capability) -> (id :Text);
  # As `Executor.detach`, of what `program` gives. Not idempotent.
}

interface Image {
  # A program that can be spawned, held by who loaded it. Dies with its session.

  spawn @0 (spec :Spec, input :Data, more :Bool, waitS :Float64)
      -> (process :Process, exit :Exit, output :Data, errors :Data,
          stdin :Ww.ByteStream, stdout :Ww.ByteStream, stderr :Ww.ByteStream);
  # Starts it. It is killed when `process` is released, and when the grant ends that it came from. All
  # that it wrote is on its streams before its end is told. What it reads begins with `input`, at most
  # 256 KiB; with `more` it goes on with `stdin`. If it ends within `waitS` seconds, at most 25, and has neither
  # waited for `stdin` nor written more than 256 KiB on one of its streams, `exit` says how, `output` and
  # `errors` are all that it wrote, and there is no stream; else `exit.kind` is "", and they come by `stdout`
  # and `stderr`. Not idempotent.
}

struct Spec {
  name @0 :Text;
  # For people, at most 255 bytes; the program sees it before its arguments.
  args @1 :List(Text);
  env @2 :List(Variable);
  limits @3 :Limits;
  grants @4 :List(Grant);
  # All that it can reach, beside its streams.
  code @5 :Text;
  # What its spawner calls the program by, a CID for example, at most 128 characters: shown beside the hash.
  named @6 :List(Named);
  # In place of them, of one that is detached.
  dirs @7 :List(Dir);
  # At most 16; of one that is detached they stay on the node's disk until it is over.
  ports @8 :List(Port);
  # At most 16 of a native program: what it listens at inside, each a `Ww.Port` that `Process.export` gives.
}

struct Named {
  # What a detached program is given: SERVICE, or SERVICE:OBJECT, with constraints.

  name @0 :Text;
  what @1 :Text;
  where @2 :List(Text);
}

struct Dir {
  # A directory that the program reads, and cannot change.

  path @0 :Text;
  # Where it finds it; absolute.
  tree @1 :Ww.Source;
  # A tar archive of at most 512 MiB with regular files, directories, each before what is in it, and symbolic
  # links that stay within; all else is `invalid.archive`. It is read with the spawner's own capability and
  # unpacked once.
  hash @2 :Text;
  # SHA-256 of the archive, in hex, or "". Where the same principal has given it before, and it is still
  # there, `tree` is not read.
}

struct Port {
  name @0 :Text;
  number @1 :UInt16;
}

struct Grant {
  # A capability that the program is given. It is held until the process has ended, and is called under the
  # grant that its giver has: revoking that ends it here, calls in flight included.

  name @0 :Text;
  # What the program asks for it by.
  ref @1 :Capability;
  interface @2 :UInt64;
  # The ID of its interface in its schema, which this node has to know.
}

struct Variable {
  name @0 :Text;
  value @1 :Text;
}

struct Limits {
  # 0: what is usual. `invalid.limit` for what nobody may have.

  memoryBytes @0 :UInt64;
  wallS @1 :Float64;
  # From its start to its end.
  cpuS @2 :Float64;
  # Of one processor.
}

interface Process {
  wait @0 (waitS :Float64) -> (exit :Exit);
  # How it ended, after `waitS` seconds or, if that is sooner, when it has; at most 25. Idempotent.

  kill @1 () -> ();
  # Ends it, and returns once nothing more of it can happen at this node. Calls that it has made of what is
  # elsewhere are cancelled by then, and end there when that hears of it. Idempotent.

  info @2 () -> (info :Info);
  # Idempotent.

  logs @3 (start :UInt64, waitS :Float64) -> (data :Data, start :UInt64, over :Bool);
  # Of a detached one, what it wrote on both streams from the byte `start` of all on, or from the first one
  # that is kept: at most 1 MiB of the last. Where there is nothing yet, waits for `waitS` seconds, at most
  # 25. `over`: nothing more will come. What a machine that went down took along is at most the end of one file:
  # a line says so there, and places go on behind it. Idempotent.

  restart @4 () -> ();
  # Has a detached one ended, and started again at once, without the pauses that its failures have earned.
  # `invalid.process` where it has ended for good. Not idempotent.

  export @5 (name :Text, waitS :Float64)
      -> (port :Ww.Port, cap :Capability, interface :UInt64, served :Served);
  # What the program offers by this name: a port of `Spec`, or an object that it serves itself, which have types
  # so that a role can name what they let one do, or else what it was given itself or has got; waits for at most `waitS` seconds, 25, until it does. It
  # dies with the program, and with the grant that it was got under; what others serve goes on, where a program
  # has exited by itself, until its spawner releases `process`. `not_found.export`. Idempotent.

  signal @6 (name :Text) -> ();
  # Sends a native program, and nothing that it has started, a signal: HUP, INT, QUIT, USR1, USR2, TERM, KILL,
  # STOP or CONT, else `invalid.signal`. Of other kinds TERM and KILL end it, as what has no handler of them, and
  # the rest is `unsupported.signal`; `not_found.running` for a detached one between two runs,
  # `invalid.process` for one that has ended. Returns before the program has it; signals arrive in turn. Not
  # idempotent.
}

interface Served {
  # An object that a program serves itself, in its own words. It dies with the program, and with the grant
  # that it was got under.

  call @0 (method :Text $Ww.constrained, args :Data, caps :List(Passed)) -> (reply :Data, caps :List(Passed));
  # `args` is the map {parameter: value} in CBOR, `reply` is [true, value], or [false, text] where the program
  # says that it failed; both have at most 1 MiB. A capability in one is tag 39 of its place in `caps`. Returns
  # when the program has answered, which takes calls as it sees fit: at most 64 at a time, of 4 MiB in all,
  # else `limit`. `proc.ended` where it has ended. Idempotent as the program makes it.
}

struct Passed {
  # A capability in a call of `Served`, or in its reply.

  ref @0 :Capability;
  interface @1 :UInt64;
}

struct Exit {
  kind @0 :Text;
  # "": it runs. "exited": by itself, with `code`. "trapped": it did what no program may. "limit": it ran
  # into one. "killed": by who held it, or an operator, or the end of its grant or node.
  code @1 :UInt32;
  why @2 :Text;
  # For people.
}

struct Info {
  id @0 :Text;
  name @1 :Text;
  owner @2 :Text;
  hash @3 :Text;
  startedMs @4 :UInt64;
  memoryBytes @5 :UInt64;
  # That it may have.
  cpuMs @6 :UInt64;
  # That it took; 0 while it runs.
  exit @7 :Exit;
  kind @8 :Text;
  # As in `load`, and never "".
  code @9 :Text;
  # As `Spec.code` has it: the word of who spawned it. What ran is `hash`.
  policy @10 :Text;
  # Of one that is detached, as in `detach`; else "".
  restarts @11 :UInt32;
  # How often it was started again.
  waits @12 :Bool;
  # It does not run, and will be started again; `exit` says how it ended the last time.
  dirs @13 :List(Mounted);

  struct Mounted {
    path @0 :Text;
    hash @1 :Text;
    # SHA-256 of the archive that was unpacked, in hex.
  }
}
