@0xd1b7a5e0934c62f8;
# Topics of the cluster, as capabilities.
#
# A message published at one node reaches the subscribers at every node of the cluster, each once, and
# those of one publisher in the order in which they were published. There is no memory: who subscribes
# later does not get what was before. The publisher that a message names is the *node* that signed it.

using Ww = import "/wetware/schema/ww.capnp";

interface PubSub {
  # The bootstrap capability of the service `pubsub`, held by sessions whose role covers it. Dies with
  # its session.

  join @0 (topic :Text $Ww.name) -> (topic :Topic);
  # The capability of one topic: 1 to `topic_chars_max` letters, digits and . _ ~ : @ + - /, else
  # `invalid.topic`. Revoking the session's grant kills it. Joining costs nothing until something is
  # published or subscribed. Idempotent: two of one topic are the same.
}

interface Topic {
  # One topic. Whoever holds it may publish and subscribe, within its grant. Dies with the session, or
  # the grant, that it came from.

  publish @0 (data :Data $Ww.constrained) -> (seqno :UInt64);
  # Sends `data`, at most `message_bytes_max`, else `invalid.message_bytes`; it was signed and queued
  # for every peer when the call returns, which is when there is room for more: callers wait here for
  # slow peers. Calls on one capability take effect in the order they were made. Not idempotent: each
  # call is a message. `seqno` is unique among the messages of this node.

  subscribe @1 (sink :Ww.Sink, buffer :UInt32 $Ww.constrained) -> (subscription :Ww.Subscription);
  # Pushes messages to `sink` from now on. An item is one message: its seqno (8 bytes, big-endian), how
  # long its publisher's peer ID is (1 byte), the peer ID as text, the data. `buffer` is how many may wait
  # at the node (0: the node's default, so a bound on it is a range from 1; at most
  # `buffer_messages_max`, else `invalid.buffer`); beyond it, or beyond `buffer_bytes_max`, the oldest
  # are dropped and counted. At most `subscriptions_per_principal_max`, else `limit.subscriptions`.
  # Revocation ends the subscription now, calls to `sink` in flight included. Not idempotent: each call
  # is a subscription.

  info @2 () -> (name :Text, subscribers :UInt32, peers :UInt32, mesh :UInt32);
  # Subscriptions at this node; other nodes that are subscribed, as far as this one knows; and those
  # of them that messages are exchanged with in full. Idempotent.
}
