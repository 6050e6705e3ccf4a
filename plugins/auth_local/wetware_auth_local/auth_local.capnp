@0xe3f5c1a97b60d284;
# How an operator reads and replaces the policy of a cluster. It is one document for the whole cluster:
# what is put at one node spreads to all.

interface PolicyStore {
  # Held by sessions whose role covers the service `auth_local`. Reading needs no more than that;
  # what is put must also carry the operator's signature, so a stolen session changes nothing. Dies
  # with its session.

  get @0 () -> (document :Data, version :UInt64, operator :Text);
  # The document in force: the signed envelope, JSON, at most 512 KiB. Idempotent.

  put @1 (document :Data) -> (version :UInt64, withdrawn :UInt32);
  # Replaces the document by a later version. What it withdraws has ended when the call returns:
  # sessions, calls in flight, subscriptions; `withdrawn` counts the (user, role) pairs. What it adds
  # is on disk when the call returns; the connected nodes have been told, and may not have it yet.
  # Errors: `auth_local.signature`, `.stale`, `.fork`, `.out_of_reach`, `.cluster`, `.not_saved`,
  # `invalid.policy`. Putting the document in force again changes nothing: idempotent.

  status @2 () -> (status :PolicyStatus);
  # How this node's policy relates to the other nodes'. Idempotent.

  divergent @3 (digest :Text) -> (document :Data);
  # A document that `status` names as divergent, signed; `not_found` if this node has no such. Idempotent.
}

struct PolicyStatus {
  version @0 :UInt64;
  digest @1 :Text;
  # SHA-256, hex, of the document's canonical form.
  saved @2 :Bool;
  # False while the disk refuses it: its withdrawals are in force, what it adds is not.
  alone @3 :Bool;
  # Whether this node has never met another one: it is the whole cluster.
  ageS @4 :Float64;
  # Seconds since the last comparison with another node, at least; -1 if there was none. Beyond
  # `policy_age_s_max` this node admits nobody. 0 if it is alone.
  members @5 :UInt32;
  # Connected nodes with which it has been compared.
  refused @6 :UInt64;
  # Messages of other nodes that were refused since the start.
  divergences @7 :List(Divergence);
}

struct Divergence {
  # A document, signed by the operator, that can neither replace this node's nor be replaced by it.

  kind @0 :Text;
  # "fork": the policy was changed in two places. "out_of_reach": it is later by so many versions that
  # nobody can tell.
  version @1 :UInt64;
  digest @2 :Text;
  peer @3 :Text;
  # The node that had it first.
}
