@0xe3f5c1a97b60d284;
# How an operator reads and replaces the policy of a cluster.

interface PolicyStore {
  # Held by sessions whose role covers the service `auth_local`. Reading needs no more than that;
  # what is put must also carry the operator's signature, so a stolen session changes nothing. Dies
  # with its session.

  get @0 () -> (document :Data, version :UInt64, operator :Text);
  # The document in force: the signed envelope, JSON, at most 512 KiB. Idempotent.

  put @1 (document :Data) -> (version :UInt64, withdrawn :UInt32);
  # Replaces the document by a later version. What it withdraws has ended when the call returns:
  # sessions, calls in flight, subscriptions; `withdrawn` counts the (user, role) pairs. What it adds
  # is on disk when the call returns. Errors: `auth_local.signature`, `.stale`, `.fork`, `.cluster`,
  # `invalid.policy`. Putting the document in force again changes nothing: idempotent.
}
