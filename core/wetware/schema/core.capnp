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
