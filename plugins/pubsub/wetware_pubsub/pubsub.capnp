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

  request @3 (data :Data $Ww.constrained, inbox :Inbox, count :UInt32 $Ww.constrained) -> (answers :UInt32);
  # Asks who serves the topic: where `count` is 1 one responder, of any node, else all that there are. They
  # answer on `inbox`, at most `count` times in all, until the call returns: when they are done, or gave
  # enough. `not_found.responder` at once if nobody serves, `not_found.answer` if nobody answered, else what
  # the first responder raised; `overlay.disconnected.responder` if it is gone, or its grant is. Nothing is
  # asked twice: a responder that failed may have done what was asked. `data` is at most `message_bytes_max`;
  # at most 256 of a principal are in flight at a node, and of a responder, 128 of them of one principal;
  # to another node 4 MiB, 32 KiB for each included, half of them of one principal: `limit.requests`. Who
  # takes no answer for `publish_wait_s` gets `limit.slow`, and the request is over. Cancelling the call, or revoking its grant, ends the request, its handlers and its inbox. Not idempotent.

  serve @4 (responder :Responder) -> (subscription :Ww.Subscription);
  # Hands it requests for the topic, or for all that match the pattern, until the subscription is cancelled
  # or released, or its grant ends: then those in flight end as well, and the node lets go of it. A node has
  # at most 1024, 128 of them of one principal: `limit.responders`. `subscription.stats` counts requests. Not idempotent: each call is a responder.
}

interface Inbox {
  # Where one request is answered. Its requester gives it with the request; a responder, and nobody else,
  # gets a relay of its own to it, from its node and under its own grant. It is over with the request.

  answer @0 (data :Data $Ww.constrained, principal :Text, node :Text) -> ();
  # At most `message_bytes_max`. Returns when the requester has taken it, and raises `not_found.request` when
  # it wants no more. Who answers, and at which node, is what the nodes on the way say: what a responder
  # gives as `principal` and `node` is not looked at. Not idempotent.
}

interface Responder {
  # A responder's end, given to the node and held by it while it serves.

  handle @0 (data :Data, topic :Text, principal :Text, node :Text, inbox :Inbox) -> ();
  # A request for `topic`, by whose grant `principal` is as `node` says. Returns when it is done; cancelled
  # when nobody waits any more. Not idempotent.
}

interface Sibling {
  # What the service has for another node, as that node; no client gets it. Dies with its membership.

  ask @0 (topic :Text, data :Data, principal :Text, every :Bool, inbox :Inbox) -> ();
  # Hands a request to a responder at this node, or to each. Returns when they are done. `principal` is the
  # other node's word. `not_found.responder`; else as `Topic.request`.
}
