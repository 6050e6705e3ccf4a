@0xc5a0b9d3e1f27846;
# What a node knows of the contract, for operators. Nothing here changes anything: roles are changed on
# chain, by who may.

using Ww = import "/wetware/schema/ww.capnp";

interface EvmAuth {
  # Held by sessions whose role covers the service `auth_evm`. Dies with its session.

  status @0 () -> (status :EvmStatus);
  # How far the replica is, and what the endpoints do. Idempotent.

  list @1 (first :UInt32, count :UInt32, all :Bool) -> (records :List(Record), total :UInt32);
  # Who has what in the cluster's scope and in ROOT, in the order of role and account: at most 1000
  # records from number `first`. Records that give nothing now are left out unless `all`. Idempotent.

  explain @2 (account :Text $Ww.name, role :Text $Ww.constrained) -> (explanation :Explanation);
  # Why an account has a role here, or does not. `invalid` for what is no address or no role's name.
  # Idempotent.
}

struct EvmStatus {
  chainId @0 :UInt64;
  contract @1 :Text;
  scope @2 :Text;
  owner @3 :Text;
  paused @4 :Bool;
  suspended @5 :Text;
  # Why nobody is admitted, or "".
  regressed @6 :Bool;
  # An operator has to act.
  fault @7 :Text;
  # Why the last look at the chain failed, or "".
  seq @8 :UInt64;
  # Of the contract's last change, by the newest block; `finalSeq` by the final one.
  finalSeq @9 :UInt64;
  tipBlock @10 :Int64;
  # -1: none yet.
  finalBlock @11 :Int64;
  tipTime @12 :UInt64;
  # Time stamp of the newest block, Unix seconds.
  finality @13 :Text;
  held @14 :UInt32;
  # Accounts whose withdrawals a reorganisation took back; they hold.
  grants @15 :UInt32;
  admins @16 :UInt32;
  keys @17 :UInt32;
  roles @18 :UInt32;
  # Roles that this node's configuration knows.
  principals @19 :UInt32;
  wallets @20 :UInt32;
  # Contract wallets that are asked again and again.
  steps @21 :UInt64;
  faults @22 :UInt64;
  lies @23 :UInt64;
  # Answers of logs that did not lead to the contract's state.
  quorum @24 :UInt32;
  endpoints @25 :List(EndpointStatus);
  tryOut @26 :Bool;
  warnings @27 :List(Text);
}

struct EndpointStatus {
  name @0 :Text;
  # Scheme, host and port; the rest may be a key.
  available @1 :Bool;
  latencyS @2 :Float64;
  failures @3 :UInt32;
  # Since it last answered.
  dissents @4 :UInt32;
  # How often it contradicted a quorum.
  error @5 :Text;
}

struct Record {
  account @0 :Text;
  role @1 :Text;
  root @2 :Bool;
  # The record is in ROOT and holds in every scope.
  notBefore @3 :UInt64;
  expiry @4 :UInt64;
  rights @5 :Text;
  # The mask, hex, that counts now; "0x0" if none.
  granted @6 :Text;
  # The mask, hex, as it was granted.
  by @7 :Text;
  # The admin; "" for the owner.
  configured @8 :Bool;
  # This node's configuration knows the role.
}

struct Explanation {
  allowed @0 :Bool;
  role @1 :Text;
  # As the broker knows it, e.g. `chatter/0x3`; "" if it is not allowed.
  steps @2 :List(Text);
  # What decides, in order.
  services @3 :List(Text);
  # What the role gives: `service: pattern, pattern`.
}
