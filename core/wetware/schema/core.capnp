@0xb7a1f0c5d2e84963;
# The core's interfaces: how a stranger becomes a session, and what a session is.
#
# After each method: who may hold the capability, when it dies, what revocation does, and whether a
# call is idempotent. Methods are never renumbered; a dead one is renamed `obsolete…`.
# Principals, peer IDs and cluster IDs are text in the forms that `wetware.identity` defines.

interface Gate {
  # The bootstrap capability of every connection, over the network and on the unix socket. Stateless;
  # anybody who can connect holds it, and it grants nothing. It dies with its connection. Ordinals 1
  # and 2 are meant for `redeem` (sturdy refs) and `peer` (certified members).

  terminal @0 () -> (terminal :Terminal);
  # A fresh Terminal. At most `[login] terminals_per_connection_max` a connection and
  # `[login] attempts_per_address_max` a minute and address; beyond that `limit`. Not idempotent.
}

interface Terminal {
  # One attempt to log in. Held by whoever asked the Gate; dies with the attempt, its deadline, or its
  # connection.

  login @0 (signer :Signer) -> (status :LoginStatus, reason :Text, session :Session);
  # Challenges `signer` and judges its proof. `session` is null unless `status` is `granted`. Within
  # `[login] deadline_s`, else `expired`. The second call on a Terminal is `tooManyTries`.
  # Not idempotent.
}

interface Signer {
  # A user's ability to prove who they are. Held by the Terminal for the length of one attempt.

  sign @0 (challenge :Challenge) -> (proof :Proof);
  # The signer refuses (error `auth.…`) a verifier that it did not dial, and a channel that is not its
  # own. Not idempotent: each challenge has a fresh nonce.
}

struct Challenge {
  nonce @0 :Data;
  # 32 random bytes, used once.
  verifier @1 :Text;
  # Peer ID of the node that asks.
  cluster @2 :Text;
  channelKind @3 :Text;
  # "noise" or "unix".
  channelValue @4 :Data;
  # noise: the handshake hash of the connection, 32 bytes; unix: the node's peer ID, binary.
  schemes @5 :List(Text);
  # Accepted proof schemes, in the node's order of preference.
  policyEpoch @6 :UInt64;
  notAfterMs @7 :UInt64;
  # Unix time in milliseconds, by the node's clock.
}

struct Proof {
  scheme @0 :Text;
  payload @1 :Data;
  # Defined by the scheme: keys and signatures, never a secret.
  signed @2 :Data;
  # The canonical bytes that were signed, as the signer saw them.
}

enum LoginStatus {
  # The zero value never grants.
  uninitialized @0;
  granted @1;
  badSignature @2;
  unknownPrincipal @3;
  expired @4;
  replayed @5;
  wrongVerifier @6;
  wrongChannel @7;
  wrongCluster @8;
  unsupportedScheme @9;
  malformed @10;
  noRole @11;
  tooManyTries @12;
  backendUnavailable @13;
  signerFailed @14;
}

interface Session {
  # What a logged-in principal holds. Guarded by the session's grant: it dies at logout, with its
  # connection, or when a role that it was granted by is withdrawn; then every capability that came
  # out of it is dead too, calls in flight included.

  whoami @0 () -> (principal :Text, roles :List(Text), node :Text, cluster :Text, grant :Text);
  # Idempotent.

  services @1 () -> (services :List(ServiceInfo));
  # The services that the session's grant covers. Idempotent.

  open @2 (name :Text) -> (service :Capability);
  # The bootstrap capability of a service, guarded by a grant derived from the session's.
  # `capability.denied` if no grant covers the service, whether it exists or not. Idempotent.

  logout @3 ();
  # Revokes the session's grant now. Idempotent.
}

struct ServiceInfo {
  name @0 :Text;
  interface @1 :Text;
  methods @2 :List(Text);
  # The patterns that the grant allows: "*", "Interface.*", "Interface.method".
}

interface Node {
  # The core's own service, `node`: what this node is doing. Held by sessions whose role names it.

  status @0 () -> (status :NodeStatus);
  # Idempotent.

  restartOverlay @1 ();
  # Ends the libp2p guest as a crash of it would; the supervisor starts it again. Connections, RPC
  # and streams go on. For operators and tests. Idempotent.
}

struct NodeStatus {
  peerId @0 :Text;
  cluster @1 :Text;
  version @2 :Text;
  uptimeS @3 :Float64;
  addrs @4 :List(Text);
  peers @5 :List(Peer);
  services @6 :List(Text);
  auth @7 :Text;
  policyEpoch @8 :UInt64;
  sessions @9 :UInt32;
  overlayState @10 :Text;
  overlayRestarts @11 :UInt32;
  overlayError @12 :Text;
  memoryBytes @13 :UInt64;
  # Resident set size.
  pid @14 :UInt32;
  plugins @15 :List(Plugin);
  name @16 :Text;
  members @17 :UInt32;
  # Alive, by this node's view, itself included.
  loopLagP99S @18 :Float64;
  # Of the event loop, over the last minute, seconds.
  loopLagMaxS @19 :Float64;
  clockOffsetS @20 :Float64;
  # How far the clocks of the other members are ahead of this one's, median; 0 if unknown.
  certificateNotAfterMs @21 :UInt64;
  # When this node's certificate expires if it is not renewed.
  rights @22 :List(Text);
  # Of this node's certificate.

  struct Peer {
    peerId @0 :Text;
    addr @1 :Text;
    member @2 :Bool;
    bytesIn @3 :UInt64;
    bytesOut @4 :UInt64;
    streams @5 :UInt32;
  }
  struct Plugin {
    name @0 :Text;
    dist @1 :Text;
    state @2 :Text;
    reason @3 :Text;
  }
}

interface Cluster {
  # The core's own service `cluster`: who is in it, and who may join. Held by sessions whose role names
  # it; `list`, `watch`, `ping` and `tunnel` are for users, the rest is for operators.

  list @0 (selector :Text, limit :UInt32) -> (members :List(Member), matched :UInt32);
  # Members that match `selector` ("" is all), by name, at most `limit`, and at most 1000 (0 means that).
  # `matched` counts those that the limit cut off too. Idempotent.

  watch @1 (selector :Text, sink :MemberSink) -> (watch :Watch);
  # Calls `sink` for every member that matches, those already there first, and at each change until the
  # watch is dropped or the session ends. A sink that does not keep up misses changes in between, never
  # the latest state of a member.

  ping @2 (peer :Text) -> (rttS :Float64);
  # Round trip to a member on the membership stream, seconds; dials if need be. Idempotent.

  tunnel @3 (peer :Text, sink :ByteSink) -> (source :ByteSink);
  # A byte pipe to the member's link, for a client that cannot dial it: what is written to `source`
  # arrives there, what comes back is written to `sink`. The noise handshake runs end to end inside:
  # this node sees ciphertext, and the login there is the user's own. Ends with the session. At most
  # `[login] tunnels_per_session_max` a session. Not idempotent.

  invite @4 (labels :List(Label), rights :List(Text), expiresS :UInt32, uses :UInt32)
    -> (ticket :Text, id :Text, notAfterMs :UInt64);
  # A ticket that lets a node join; the secret is stored hashed. 0 means the default. Not idempotent.

  certify @5 (peer :Text, labels :List(Label), rights :List(Text), foreign :Bool) -> (bundle :Text);
  # A certificate for a known peer ID. `foreign`: a libp2p peer that does not speak the protocols of
  # admission; the cluster then knows it without being shown anything. Not idempotent.

  tickets @6 () -> (tickets :List(TicketInfo));
  # Of this node. Idempotent.

  revokeTicket @7 (id :Text) -> ();
  # Idempotent.

  evict @8 (peer :Text, reason :Text) -> ();
  # Ends the membership of a node everywhere, whatever certificate or ticket it has. Idempotent.

  check @9 () -> (findings :List(Finding));
  # What `ww doctor` reports about this node; takes seconds. Idempotent.
}

struct Label {
  key @0 :Text;
  value @1 :Text;
}

struct Member {
  peerId @0 :Text;
  name @1 :Text;
  host @2 :Text;
  state @3 :Text;
  # "alive", "suspect", "dead", "left" or "foreign".
  sinceS @4 :Float64;
  # Seconds in this state.
  incarnation @5 :UInt64;
  addrs @6 :List(Text);
  labels @7 :List(Label);
  version @8 :Text;
  services @9 :List(Text);
  load @10 :Float64;
  # Load average over a minute, per processor.
  memoryBytes @11 :UInt64;
  rttS @12 :Float64;
  # From the node that was asked; 0 if unknown.
  connected @13 :Bool;
  # To the node that was asked.
  self @14 :Bool;
  # The node that was asked.
}

interface MemberSink {
  # Where changes of the membership go. Held by the node for the length of the watch.

  changed @0 (members :List(Member)) -> ();
  # Some members, as they are now. The next call comes when this one has returned.
}

interface Watch {
  # A running watch; dropping it ends it.

  end @0 () -> ();
  # Idempotent.
}

interface ByteSink {
  # One direction of a byte pipe.

  write @0 (data :Data) -> ();
  # At most 64 KiB; returns when there is room for more. Calls are delivered in order.

  end @1 () -> ();
  # No more bytes will come. Dropping the sink without it cuts the pipe off.
}

struct TicketInfo {
  id @0 :Text;
  notAfterMs @1 :UInt64;
  usesLeft @2 :UInt32;
  spentBy @3 :List(Text);
  # Peer IDs.
  labels @4 :List(Label);
  rights @5 :List(Text);
  revoked @6 :Bool;
}

struct Finding {
  # One line of `ww doctor`.

  check @0 :Text;
  level @1 :Text;
  # "ok", "warning" or "error".
  text @2 :Text;
  remedy @3 :Text;
}
