@0x84270c45d2d7350b;
# The record of a node's decisions, for operators. A record is one line of JSON, as it is in the log.

using Ww = import "/wetware/schema/ww.capnp";

interface Audit {
  # The bootstrap capability of the service `audit`, held by sessions whose role covers it. Dies with its
  # session.

  tail @0 (count :UInt32, event :Text, grant :Text, principal :Text) -> (records :List(Text));
  # The last records that match, at most `count` and at most 1000, the oldest first. `event` is the
  # beginning of an event's name; "" matches all, for each. Idempotent.

  show @1 (seq :UInt64) -> (record :Text);
  # One record; `not_found` if it is not there any more. Idempotent.

  follow @2 (sink :Ww.Sink) -> (subscription :Ww.Subscription);
  # Pushes each record from now on, until the subscription is dropped or the session ends. A sink that
  # does not keep up loses the oldest that wait, which are counted.

  checkpoint @3 () -> (checkpoint :Text);
  # The node's signed word on what its log is now: one line of JSON. Idempotent.

  checkpoints @4 (node :Text) -> (checkpoints :List(Text));
  # What this node knows of the logs of other members ("" is all of them), the latest first: with it
  # one can tell whether that node has cut off or rewritten its log. One for each node, the highest;
  # several where a log did not go on from the one before. Idempotent.

  state @5 () -> (log :Text, seq :UInt64, head :Data, failing :Text, lost :UInt64);
  # `failing`: why the log cannot be written, "" if it can; `lost`: records that the next record of a
  # gap will tell of. Idempotent.
}
