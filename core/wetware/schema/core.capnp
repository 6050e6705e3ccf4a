@0xb7a1f0c5d2e84963;
# The core's interfaces: how a stranger becomes a session, and what a session is.
#
# After each method: who may hold the capability, when it dies, what revocation does, and whether a
# call is idempotent. From the first release on methods are never renumbered, and a dead one is renamed
# `obsolete…`; before it, methods that nobody could have called yet were removed and renumbered.
# Principals, peer IDs and cluster IDs are text in the forms that `wetware.identity` defines.

using Ww = import "/wetware/schema/ww.capnp";

interface Gate {
  # The bootstrap capability of every connection, over the network and on the unix socket. Stateless;
  # anybody who can connect holds it, and it grants nothing. It dies with its connection.

  terminal @0 () -> (terminal :Terminal);
  # A fresh Terminal. At most 8 a connection and
  # `[login] attempts_per_address_max` a minute and address; beyond that `limit`. Not idempotent.

  redeem @1 (id :Data, secret :Data) -> (session :Session, grant :GrantInfo);
  # Exchanges what a sturdy reference (`ww1…`) holds for a session with what was shared. An unknown
  # `id` and a wrong `secret` are the same `capability.denied.unknown_ref`; that a reference expired,
  # was revoked or is used up is told to who has its secret. Counts as a login attempt, and spends one
  # of its uses. Not idempotent.

  describe @2 (id :Data, secret :Data) -> (grant :GrantInfo);
  # What a sturdy reference would give; spends no use. Refuses as `redeem` does. Idempotent.

  peer @3 () -> (peer :Peer);
  # For a node of the cluster, as itself: what its plugins have of the same plugins here. The connection
  # has to be one on which both nodes have shown each other their certificates; to everybody else, clients
  # and foreign peers included, it is `capability.denied.peer`. Idempotent.
}

interface Peer {
  # What a member has here, as `node:ID`: never a user's rights, no session, and nothing of the tree of
  # grants. Held by that node. It dies with its connection, and when the node is a member no more: it was
  # evicted, or its certificate has ended. Then everything that came of it is dead, calls in flight included.

  open @0 (service :Text) -> (service :Capability);
  # The servant that the service has for its siblings at other nodes. `unsupported.service` where it is
  # not running, or has none. Idempotent.
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

  sign @0 (challenge :Data) -> (proof :Proof);
  # `challenge` are the canonical bytes of a `wetware.identity.Challenge`, as they are to be signed: a
  # fresh nonce, the node, its cluster, the channel, the schemes that the node accepts in its order of
  # preference, the policy's version, and an end. The signer refuses (error `auth.…`) a node that it did
  # not dial, and a channel that is not its own. Not idempotent: each challenge has its own nonce.
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

interface Subtree {
  # Grants as those whom they belong to see them: what they come from, and all below it.

  list @0 (principal :Text $Ww.constrained, limit :UInt32) -> (grants :List(GrantInfo), matched :UInt32);
  # Of a principal, or of everybody (""), those near the roles first; at most 1000 and what fits into
  # an answer. `matched` counts all. Idempotent.

  revoke @1 (id :Text, reason :Text) -> (cut :UInt32);
  # Ends a grant of the subtree and all below it, now; returns how many ended. It is on disk when the
  # call returns. 0 for one that has ended. `not_found` for any other. Idempotent.

  why @2 (decision :Text) -> (explanation :Explanation);
  # What decided a denial that is remembered; "" is the latest. Idempotent.
}

interface Session extends(Subtree) {
  # What somebody holds who logged in, redeemed a reference, or was given a part of another session.
  # Guarded by its grant: it dies at logout, with its connection, or when a grant above it ends, e.g.
  # because a role was withdrawn; then every capability that came out of it is dead too, calls in
  # flight included. Only what was shared lives on after a logout.
  #
  # Its subtree is what comes from it; at a login all that comes from the principal's roles, shares of
  # earlier sessions included. `why` tells at a login or a redemption of any denial with a grant of the
  # same principal on the way, of whichever session; else of this session or one below it.

  whoami @0 () -> (principal :Text, roles :List(Text), node :Text, cluster :Text, grant :Text);
  # Idempotent.

  services @1 () -> (services :List(ServiceInfo));
  # The services that the session's grant covers. Idempotent.

  open @2 (name :Text) -> (service :Capability);
  # The bootstrap capability of a service, guarded by a grant derived from the session's.
  # `capability.denied` if no grant covers the service, whether it exists or not. Idempotent.

  logout @3 ();
  # Ends the session now. Idempotent.

  attenuate @4 (terms :Terms, label :Text) -> (session :Session, grant :GrantInfo);
  # A weaker session, to hand to somebody or something else: its terms are added to those of this one.
  # Dies with this one. `capability.amplification` if it names what this one has not. Not idempotent.

  share @5 (terms :Terms, uses :UInt32, label :Text) -> (ref :Text, grant :GrantInfo);
  # A sturdy reference: a text that whoever has it can redeem at this node, without an account,
  # `uses` times (0: no limit). It outlives this session and the node's process; it dies when it is
  # revoked or expires, and with the role or the user that it comes from. Not idempotent.

  explain @6 (service :Text, interface :Text, method :Text, args :List(Label))
    -> (explanation :Explanation);
  # What would decide a call now; values of `args` are texts. Spends nothing. Idempotent.

  vouch @7 (claim :Data) -> ();
  # For a service of this node that the session was handed to, and that made the claim: from then on it
  # may make a grant below this one which outlives it, as `share` does, and which that service alone
  # uses. It shows in `list`, and dies as what was shared. A sealed session has not got it; of a claim
  # that nobody here has made nothing comes. Idempotent.
}

struct Terms {
  # What a grant adds to its parent's. All fields empty: nothing.

  services @0 :List(ServicePatterns);
  # Empty: all that the parent has.
  where @1 :List(WhereText);
  expiresInS @2 :Float64;
  # Seconds from now; 0: no end of its own.
  rate @3 :Text;
  # "10/s", "100/m:20".
  calls @4 :UInt64;
  # Quota; 0: none. Likewise `bytes`.
  bytes @5 :UInt64;
  fence @6 :Data;
  # A fencing token: calls are refused once a later holder of the lock has called.
  sealed @7 :Bool;
  # Not to be attenuated or shared further.
}

struct ServicePatterns {
  name @0 :Text;
  # A service, or `SERVICE:NAME`: one object of it. What that is the node decides, by the service's schema.
  methods @1 :List(Text);
  # "*", "Interface.*", "Interface.method". Empty: all that the parent has of this service.
}

struct WhereText {
  service @0 :Text;
  # "*": every service.
  text @1 :Text;
  # See docs/reference/constraints.md.
}

struct GrantInfo {
  id @0 :Text;
  parents @1 :List(Text);
  principal @2 :Text;
  kind @3 :Text;
  # "role", "session", "service", "attenuated", "share", "redeemed" or "derived".
  label @4 :Text;
  service @5 :Text;
  state @6 :Text;
  # "live", "suspended", "closed" (its session is over, and what was shared lives) or "ended".
  created @7 :Float64;
  # Unix time, s. Likewise `expiresAt`; -1: no end.
  expiresAt @8 :Float64;
  terms @9 :List(Text);
  # What it adds, a line each, for people.
  callsLeft @10 :Int64;
  # Of its own quota; -1: none. Likewise `bytesLeft` and `usesLeft`.
  bytesLeft @11 :Int64;
  usesLeft @12 :Int64;
  redeemed @13 :UInt32;
  # How often a share was redeemed.
  callsInFlight @14 :UInt32;
  durable @15 :Bool;
  reason @16 :Text;
  # Why it ended.
}

struct Explanation {
  allowed @0 :Bool;
  code @1 :Text;
  reason @2 :Text;
  decision @3 :Text;
  at @4 :Float64;
  # Unix time, s.
  principal @5 :Text;
  grant @6 :Text;
  method @7 :Text;
  # With the arguments that constraints are about.
  steps @8 :List(Step);
  # From the grant that was called to a role.

  struct Step {
    grant @0 :Text;
    label @1 :Text;
    kind @2 :Text;
    verdict @3 :Text;
    # "allows", "denies" or "-": not asked.
    detail @4 :Text;
  }
}

interface Grants extends(Subtree) {
  # The core's service `grants`: all grants of this node, for operators.

  endSessions @0 (principal :Text $Ww.constrained, reason :Text) -> (cut :UInt32);
  # Ends the sessions of a principal, or of everybody (""), at this node, and all that was shared from
  # them; returns how many grants ended, roles not counted. They may log in again. Idempotent.

  resume @1 () -> (shares :UInt32);
  # Lets the shares work again that are suspended since the node started, and nodes join and renew,
  # after an end of some that may not have been on its disk; returns how many shares there are.
  # Recorded first. Idempotent.
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
  # What any member may know of their node: nothing of it says who its users are, where they are, or
  # what its configuration has. `peers` are the members that are connected, whose addresses `Cluster.list`
  # gives, too; `overlayError` and the plugins' `reason` are left out. Idempotent.

  restartOverlay @1 ();
  # Ends the libp2p guest as a crash of it would; the supervisor starts it again. Connections, RPC
  # and streams go on. For operators and tests. Idempotent.

  details @2 () -> (status :NodeStatus);
  # As `status`, and what is not for everybody: in `peers` the addresses of clients and of foreign
  # peers, and in which words a plugin or libp2p failed. For operators. Idempotent.

  trustClock @3 ();
  # The machine's clock is right, and what it said before was a glitch: ends of grants are judged by
  # it again. For operators, who have looked at it: grants made in the glitch end later by as much.
  # Refused where the other members' clocks say that it is wrong. Idempotent.

  proposal @4 (service :Text) -> (roles :List(RolePatterns), how :Text);
  # What a service of this node proposes for the standard roles `reader`, `member` and `admin`; it grants
  # nothing. `how` is what to write where, if the roles are in the nodes' configuration, else "".
  # For operators, who accept it or not. `not_found` for an unknown service. Idempotent.

  handOver @5 (sink :Ww.Sink) -> (subscription :Ww.Subscription);
  # Has the services of this node, one after the other, give other members what this node alone has, before
  # it leaves for good. Pushes how far that is, a text an item, and an empty item once all of it is there.
  # `Subscription.stats` raises where it came to a halt, also where a service is not running: nobody hands
  # over what that has. Dropping the subscription ends it, and what was given by then stays where it is.
  # One at a time (`limit`). Recorded first. For operators. Idempotent.
}

struct RolePatterns {
  role @0 :Text;
  methods @1 :List(Text);
  # "*", "Interface.*", "Interface.method".
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
  # How far the clocks of the other members are ahead of this one's, median; NaN if unknown.
  certificateNotAfterMs @21 :UInt64;
  # When this node's certificate expires if it is not renewed.
  rights @22 :List(Text);
  # Of this node's certificate.
  users @23 :Text;
  # How somebody becomes a user of the cluster, in the words of its auth backend; "" if it has none.
  strangers @24 :UInt32;
  # How many peers are connected that are no members: clients, foreign peers.
  clockWrong @25 :Text;
  # Why grants with an end are refused: this node's clock cannot judge it; "" if it can.
  timeS @26 :Float64;
  # By the machine's clock, Unix s.
  ungranted @27 :List(Text);
  # Services of this node that propose something for members which no operator has accepted.
  reached @28 :Text;
  # How this node is reached from the internet, in words; "" while it knows of no other member.
  authAlso @29 :List(Text);
  # Further auth backends, each for users of its own.

  struct Peer {
    peerId @0 :Text;
    addr @1 :Text;
    member @2 :Bool;
    bytesIn @3 :UInt64;
    bytesOut @4 :UInt64;
    streams @5 :UInt32;
    via @6 :Text;
    # The name of the member that carries the connection; "" if it is direct.
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

  list @0 (selector :Text $Ww.constrained, limit :UInt32, signed :Bool)
    -> (members :List(Member), matched :UInt32, founding :Data);
  # Members that match `selector` ("" is all), by name, at most `limit`, and at most 1000 (0 means that).
  # `matched` counts those that the limit cut off too. With `signed` each member's `record` comes along,
  # for as many members as an answer has room for, and `founding`, which names the cluster: what a client
  # needs in order to verify a member without believing this node. Idempotent.

  watch @1 (selector :Text $Ww.constrained, sink :Ww.Sink) -> (subscription :Ww.Subscription);
  # Pushes every member that matches, those already there first, and at each change, until the
  # subscription is dropped or the session ends. An item is a `Member` as JSON: its fields but `record`,
  # in snake_case; `state` is "removed" for one that is forgotten. A sink that does not keep up misses
  # changes in between; of a member's latest state only beyond 8 MiB that wait, counted.

  ping @2 (peer :Text $Ww.constrained) -> (rttS :Float64);
  # Round trip to a member on the membership stream, seconds; dials if need be. Idempotent.

  tunnel @3 (peer :Text $Ww.constrained) -> (stream :Ww.ByteStream);
  # A stream to the member's link, for a client that cannot dial it. The noise handshake runs end to
  # end inside: this node sees ciphertext, and the login there is the user's own. Ends with the
  # session. At most 8 a session. Not idempotent.

  invite @4 (labels :List(Label), rights :List(Text) $Ww.constrained,
      expiresS :UInt32 $Ww.constrained, uses :UInt32 $Ww.constrained)
    -> (ticket :Text, id :Text, notAfterMs :UInt64);
  # A ticket that lets a node join; the secret is stored hashed. 0 means the default, so a bound on
  # `expiresS` or `uses` is a range from 1. Not idempotent.

  certify @5 (peer :Text $Ww.constrained, labels :List(Label), rights :List(Text) $Ww.constrained,
      foreign :Bool $Ww.constrained) -> (bundle :Text);
  # A certificate for a known peer ID. `foreign`: a libp2p peer that does not speak the protocols of
  # admission; the cluster then knows it without being shown anything. Not idempotent.

  tickets @6 () -> (tickets :List(TicketInfo));
  # Of this node. Idempotent.

  revokeTicket @7 (id :Text) -> ();
  # Idempotent.

  evict @8 (peer :Text $Ww.constrained, reason :Text) -> ();
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
  record @15 :Data;
  # What the member signed, its certificate within, in the encoding of membership; only in an answer to
  # `list` with `signed`, and not of a foreign peer.
  trouble @16 :Text;
  # What is wrong with it, as the node that was asked sees it, e.g. that its clock is; "" if nothing.
  via @17 :Text;
  # Who carries the connection of the node that was asked; "" where that is direct, or there is none.
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
