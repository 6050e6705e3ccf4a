@0xd1b7a5e0934c62f8;
# Topics of the cluster, as capabilities.
#
# A message published at one node reaches the subscribers at every node of the cluster, each once, and
# those of one publisher in the order in which they were published. There is no memory: who subscribes
# later does not get what was before. The publisher that a message names is the *node* that signed it; the
# principal that it names beside is that node's word: a node can lie about its own users, and no others.

using Ww = import "/wetware/schema/ww.capnp";

interface PubSub {
  # The bootstrap capability of the service `pubsub`, held by sessions whose role covers it. Dies with
  # its session.

  join @0 (topic :Text $Ww.name $Ww.subject, raw :Bool) -> (topic :Topic);
  # The capability of one topic: 1 to `topic_chars_max` letters, digits and . _ ~ : @ + - /, else
  # `invalid.topic`. Or of all that match a pattern, which can be subscribed and not published to: tokens
  # are between dots, `*` is any one of them, and `>` in the last place one or more; the first one is no
  # wildcard. A pattern needs a grant of all that it matches. Revoking the session's grant kills it. Joining costs nothing until something is
  # published or subscribed. Idempotent: two of one topic are the same. What is published to a `raw` topic
  # is one GossipSub message each, as other implementations of libp2p know it, and names no principal; a
  # raw topic and another one of the same name have nothing in common but who may join them.
}

interface Topic {
  # One topic. Whoever holds it may publish and subscribe, within its grant. Dies with the session, or
  # the grant, that it came from.

  publish @0 (data :Data $Ww.constrained $Ww.packed, lengths :Data $Ww.lengths)
      -> (seqno :UInt64, taken :UInt32);
  # Sends `data`, at most `message_bytes_max`, else `invalid.message_bytes`; it was signed and queued
  # for every peer when the call returns, which is when there is room for more: callers wait here for
  # slow peers. Calls on one capability take effect in the order they were made. Not idempotent: each
  # call is a message. `seqno` is unique among the messages of this node. With `lengths`, which a raw
  # topic does not take, `data` is several messages, at most 256 KiB of them; the first `taken` were sent,
  # from `seqno` on, and of the rest nothing happened, nor was it charged: the next call tells of the
  # first of them why. One that is too long is charged with those before it.

  subscribe @1 (sink :Ww.Sink, buffer :UInt32 $Ww.constrained, slow :Slow $Ww.constrained)
      -> (subscription :Ww.Subscription);
  # Pushes messages to `sink` from now on. An item is the messages of one frame: the seqno of the first (8
  # bytes, big-endian), how long its publisher's peer ID is (1 byte), the peer ID as text, the frame, whose
  # bytes are in frames.py; of a raw topic one message, with the data in place of a frame. `buffer` is how
  # many messages may wait at the node (0: the node's default, so a bound on it is a range from 1; at most
  # `buffer_messages_max`, else `invalid.buffer`), or one frame; what is done beyond it, or beyond
  # `buffer_bytes_max`, says `slow`. What is dropped are whole frames; their messages are counted, and told.
  #  At most `subscriptions_per_principal_max`, else `limit.subscriptions`.
  # Revocation ends the subscription now, calls to `sink` in flight included. Not idempotent: each call
  # is a subscription.

  enum Slow {
    dropOldest @0;
    dropNewest @1;
    disconnect @2;
    # The subscription ends with `limit.slow`.

    block @3;
    # Nothing is dropped: publishers at this node wait for it, and so does what other nodes send to this
    # one, of all topics; their publishers wait in turn. It ends with `limit.slow` if it takes nothing for
    # `publish_wait_s`. To be given only to those who may slow the others down.
  }

  info @2 () -> (name :Text, subscribers :UInt32, peers :UInt32, mesh :UInt32);
  # Subscriptions at this node that get all of the topic, or pattern; other nodes that are subscribed, as
  # far as this one knows; and those of them that messages are exchanged with in full. Where the name has
  # a dot the nodes are those of its first token, whose names share what is sent. Idempotent.
}
