"""Routers in a simulated network: delivery, meshes, gossip, and peers that misbehave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from wetware.errors import InvalidArgument
from wetware.identity import Key, Principal
from wetware.rpc import packed
from wetware_pubsub import frames, wire
from wetware_pubsub.order import Sequencer
from wetware_pubsub.router import FLOODSUB, MESHSUB_10, MESHSUB_11, MessageCache
from wetware_pubsub.wire import SIGN_DOMAIN, FrameReader, Malformed, WireMessage, decode

T = "/wetware/test/chat"
FRAMED = T + frames.FRAMED
ADA = Principal("local", "ada")


def _subscribe(nodes: list[Any], topic: str = T) -> None:
    for node in nodes:
        node.router.subscribe(topic)


def _assert_in_order(node: Any) -> None:
    """Texts are `PUBLISHER NUMBER`: each once, numbers rising for each publisher."""
    assert max(Counter(node.texts()).values(), default=1) == 1
    last: dict[bytes, int] = {}
    for text in node.texts():
        publisher, number = text.split()
        assert int(number) > last.get(publisher, -1)
        last[publisher] = int(number)


@pytest.mark.parametrize("flood", [True, False])
def test_everyone_gets_everything_once_and_in_order(make_network: Any, flood: bool) -> None:
    net = make_network(seed=7, flood_publish=flood)
    nodes = net.make(30)
    net.graph(nodes, 6)
    _subscribe(nodes)
    net.run(5)
    publishers = nodes[:4]
    for number in range(15):
        for i, node in enumerate(publishers):
            node.router.publish(T, b"%d %d" % (i, number))
        net.run(0.01)
    net.run(10)
    expected = {b"%d %d" % (i, n) for i in range(4) for n in range(15)}
    for node in nodes:
        assert set(node.texts()) == expected
        _assert_in_order(node)


def test_churn_and_lost_streams_lose_nobody_who_stays(make_network: Any) -> None:
    net = make_network(seed=11)
    nodes = net.make(24)
    net.graph(nodes, 7)
    _subscribe(nodes)
    net.run(4)
    stays, leaves = nodes[:18], nodes[18:]
    for number in range(40):
        nodes[0].router.publish(T, b"0 %d" % number)
        nodes[1].router.publish(T, b"1 %d" % number)
        net.run(0.1)
        if number % 2 == 0:  # a link breaks with what is in flight, and comes back
            a, b = net.rng.choice([p for p in net.links() if p[0] in stays and p[1] in stays])
            net.disconnect(a, b)
            net.later(1.0, lambda a=a, b=b: net.connect(a, b))
        if number % 8 == 4 and leaves:
            net.remove(leaves.pop())
    net.run(15)
    for node in stays:
        assert len(node.inbox) == 80, f"{len(node.inbox)} of 80"
        _assert_in_order(node)


def test_who_was_cut_off_is_heard_and_hears_at_once_and_in_order(make_network: Any) -> None:
    net = make_network(seed=5)
    roamer, *others = net.make(3)
    net.graph([roamer, *others], 2)
    _subscribe([roamer, *others])
    net.run(3)
    for number in range(60):
        for i, node in enumerate((roamer, *others)):
            node.router.publish(T, b"%d %d" % (i, number))
        if number == 20:
            for node in others:
                net.disconnect(roamer, node)
        net.run(0.2)
    for node in others:
        net.connect(roamer, node)
    net.run(0.2)
    for node in (roamer, *others):
        node.inbox.clear()
    for i, node in enumerate((roamer, *others)):
        node.router.publish(T, b"%d 60" % i)
    net.run(0.2)  # `hold_s` would be 2.5: no gap is waited for, as nobody has what was missed
    for node in (roamer, *others):
        assert sorted(node.texts()) == [b"0 60", b"1 60", b"2 60"]


def test_the_mesh_has_its_degrees(make_network: Any) -> None:
    net = make_network(seed=3)
    nodes = net.make(25)
    for i, a in enumerate(nodes):
        for b in nodes[i + 1 :]:
            net.connect(a, b)
    _subscribe(nodes)
    net.run(90)  # the flood of first GRAFTs, and the back-off of those who were refused
    config = net.config
    for node in nodes:
        assert config.mesh_d_low <= len(node.router.mesh(T)) <= config.mesh_d_high
        for peer in node.router.mesh(T):
            assert node.id in net.nodes[peer].router.mesh(T), "a mesh link has two ends"
    assert nodes[0].router.mesh(T) != nodes[1].router.mesh(T)


def test_a_mesh_over_the_limit_shrinks_and_keeps_dialled_peers(make_network: Any) -> None:
    net = make_network(seed=5, mesh_d=4, mesh_d_low=3, mesh_d_high=6, mesh_d_out=2)
    hub, *others = net.make(30)
    for i, other in enumerate(others):
        net.connect(*((hub, other) if i < 8 else (other, hub)))
    _subscribe([hub, *others])
    net.run(1.5)
    mesh = hub.router.mesh(T)
    assert len(mesh) <= 6
    dialled = {o.id for o in others[:8]}
    net.run(10)
    assert len(hub.router.mesh(T) & dialled) >= 2


def test_unsubscribing_ends_delivery_and_the_mesh_closes_again(make_network: Any) -> None:
    net = make_network()
    a, b, c = net.make(3)
    for x, y in ((a, b), (b, c), (a, c)):
        net.connect(x, y)
    _subscribe([a, b, c])
    net.run(2)
    c.router.unsubscribe(T)
    net.run(2)
    a.router.publish(T, b"0 0")
    net.run(3)
    assert b.texts() == [b"0 0"]
    assert c.texts() == []
    assert a.router.subscribers(T) == (b.id,)
    assert a.router.mesh(T) == {b.id}
    c.router.subscribe(T)
    net.run(15)  # beyond the back-off of leaving
    a.router.publish(T, b"0 1")
    net.run(1)
    assert c.texts() == [b"0 1"]
    assert c.id in a.router.mesh(T)


def test_publishing_without_subscribing_uses_the_fanout(make_network: Any) -> None:
    net = make_network(flood_publish=False, mesh_d=3, mesh_d_low=2, mesh_d_out=1)
    source, *nodes = net.make(12)
    net.graph(nodes, 5)
    for node in nodes:
        net.connect(source, node)
    _subscribe(nodes)
    net.run(3)
    for number in range(10):
        source.router.publish(T, b"0 %d" % number)
        net.run(0.2)
    assert 0 < len(source.router.targets(T)) <= 3
    net.run(5)
    assert source.texts() == []
    for node in nodes:
        assert len(node.inbox) == 10
        _assert_in_order(node)


def test_own_messages_come_back_only_to_local_subscribers(make_network: Any) -> None:
    net = make_network()
    a, b = net.make(2)
    net.connect(a, b)
    a.router.publish(T, b"0 0")
    assert a.texts() == []
    a.router.subscribe(T)
    a.router.publish(T, b"0 1")
    assert a.texts() == [b"0 1"]
    net.run(5)
    assert a.texts() == [b"0 1"]


def test_a_topic_has_no_memory(make_network: Any) -> None:
    net = make_network()
    a, b, c = net.make(3)
    for x, y in ((a, b), (b, c), (a, c)):
        net.connect(x, y)
    _subscribe([a, b])
    net.run(2)
    for number in range(50):
        a.router.publish(T, b"0 %d" % number)
    net.run(0.5)
    c.router.subscribe(T)  # all of it is still being gossiped about
    net.run(1.5)
    a.router.publish(T, b"0 50")
    net.run(6)
    assert c.texts() == [b"0 50"]
    c.router.unsubscribe(T)
    net.run(1)
    for number in range(51, 60):
        a.router.publish(T, b"0 %d" % number)
    net.run(1)
    c.router.subscribe(T)
    net.run(0.2)
    a.router.publish(T, b"0 60")
    net.run(0.2)  # what was missed meanwhile is no gap to wait for
    assert c.texts() == [b"0 50", b"0 60"]
    net.run(6)
    assert c.texts() == [b"0 50", b"0 60"]
    assert len(b.inbox) == 61


def test_gossip_brings_what_the_mesh_did_not(make_network: Any) -> None:
    net = make_network(flood_publish=False)
    source, a, b = net.make(3)
    net.connect(source, a)
    net.connect(a, b)
    _subscribe([source, a, b])
    net.run(5)
    # Each refuses the other's mesh, as after a PRUNE; only IHAVE and IWANT are left.
    for x, y in ((a, b), (b, a)):
        x.router._prune(T, y.id)
    net.run(0.5)
    assert a.router.mesh(T) == {source.id}
    assert not b.router.mesh(T)
    for number in range(2000):
        source.router.publish(T, b"0 %d" % number)
    net.run(5)
    assert len(b.inbox) == 2000
    _assert_in_order(b)
    assert b.router.stats.iwant_sent == 2000
    assert a.router.stats.iwant_served == 2000


# --- one router against a hand-made peer ----------------------------------------------------------


class Peer:
    """A peer whose frames the test writes."""

    def __init__(self, net: Any, protocol: str = MESHSUB_11, *, topics: tuple[str, ...] = (T,)):
        self.net = net
        self.victim = net.node()
        self.victim.router.subscribe(T)
        self.key = Key.from_seed(net.rng.randbytes(32))
        self.id = self.key.peer_id
        self.router = self.victim.router
        self.sequencer = Sequencer(net.clock.time)
        self.router.inbound_opened(self.id)
        self.router.stream_opened(self.id, protocol, outbound=False)
        self.say(*(wire.subscription_chunk(t, True) for t in topics))
        self.heard()
        net.clock.now += 10  # the topic is no longer new to it

    def say(self, *chunks: bytes) -> list[bool]:
        (body,) = FrameReader(self.router.limits).feed(wire.frame(list(chunks)))
        messages = self.router.receive(self.id, body)
        return [self.router.message(self.id, m) for m in messages]

    def control(self, *parts: bytes) -> None:
        self.say(wire.control_chunk(list(parts)))

    def heard(self) -> wire.Rpc:
        out = wire.Rpc([], [], [], [], [], [])
        while frame := self.router.take(self.id):
            for body in FrameReader(self.router.limits).feed(frame):
                rpc = decode(body, self.router.limits)
                for name in wire.Rpc.__slots__:
                    getattr(out, name).extend(getattr(rpc, name))
        return out

    def message(
        self, data: bytes = b"hi", *, key: Key | None = None, topic: str = T
    ) -> WireMessage:
        key = key or self.key
        message = WireMessage(
            key.peer_id.multihash, data, self.sequencer.next(topic), topic, b"", b""
        )
        message.signature = key.sign(SIGN_DOMAIN + message.signed())
        return message

    def frame(
        self,
        *texts: bytes,
        principal: Principal = ADA,
        topic: str = FRAMED,
        subject: str = "",
    ) -> WireMessage:
        data = frames.encode(principal, 1.0, *packed.pack(texts), subject)
        seqno = self.sequencer.next(topic, len(texts))
        message = WireMessage(self.id.multihash, data, seqno, topic, b"", b"")
        self.sign(message)
        return message

    def sign(self, message: WireMessage) -> None:
        signed = frames.signed(message.topic, message.signed())
        message.signature = self.key.sign(SIGN_DOMAIN + signed)


@pytest.fixture
def peer(make_network: Any) -> Peer:
    return Peer(make_network())


def test_a_signed_message_is_delivered_with_and_without_its_key(peer: Peer) -> None:
    plain, with_key = peer.message(b"1"), peer.message(b"2")
    with_key.key = b"\x08\x01\x12\x20" + peer.key.public
    assert peer.say(plain.encode(), with_key.encode()) == [True, True]
    assert peer.victim.texts() == [b"1", b"2"]
    assert {m.publisher for m in peer.victim.inbox} == {peer.id}
    assert peer.router.penalty(peer.id) == 0


FORGERIES: dict[str, Callable[[WireMessage, Key], object]] = {
    "unsigned": lambda m, _: setattr(m, "signature", b""),
    "short signature": lambda m, _: setattr(m, "signature", m.signature[:63]),
    "long signature": lambda m, _: setattr(m, "signature", m.signature + b"\0"),
    "other data": lambda m, _: setattr(m, "data", m.data + b"!"),
    "other seqno": lambda m, _: setattr(m, "seqno", m.seqno[:7] + b"\xff"),
    "other author": lambda m, k: setattr(m, "author", k.peer_id.multihash),
    "no author": lambda m, _: setattr(m, "author", b""),
    "junk author": lambda m, _: setattr(m, "author", b"\x00\x24" + b"\x08\x01\x12\x20" + b"x" * 31),
    "hashed author": lambda m, _: setattr(m, "author", b"\x12\x20" + b"x" * 32),
    "author not on the curve": lambda m, _: setattr(
        m, "author", b"\x00\x24\x08\x01\x12\x20" + b"\xff" * 32
    ),
    "key of another": lambda m, k: setattr(m, "key", b"\x08\x01\x12\x20" + k.public),
    "junk key": lambda m, _: setattr(m, "key", b"\xff" * 36),
    "raw key": lambda m, _: setattr(m, "key", b"x" * 32),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries_are_refused_and_punished(peer: Peer, name: str) -> None:
    good = peer.message(b"good")
    forged = peer.message(b"forged")
    FORGERIES[name](forged, Key.from_seed(b"o" * 32))
    assert peer.say(forged.encode(), good.encode()) == [False, True]
    assert peer.victim.texts() == [b"good"]
    assert peer.router.stats.invalid == 1
    assert peer.router.penalty(peer.id) == pytest.approx(10)


# --- frames ---------------------------------------------------------------------------------------


@pytest.fixture
def framed(peer: Peer) -> Peer:
    peer.router.subscribe(FRAMED)
    peer.heard()
    peer.net.clock.now += 10
    return peer


def _counts(peer: Peer) -> list[int]:
    return [m.count for m in peer.victim.inbox]


def test_a_frame_is_one_message_of_gossip(framed: Peer) -> None:
    one, two = framed.frame(b"a", b"b", b"c"), framed.frame(b"d")
    assert framed.say(one.encode(), two.encode()) == [True, True]
    assert [(m.data, m.count) for m in framed.victim.inbox] == [(one.data, 3), (two.data, 1)]
    assert framed.router.stats.delivered == 4
    assert framed.router.penalty(framed.id) == 0


def test_frames_are_put_into_their_order_and_none_is_waited_for_in_vain(framed: Peer) -> None:
    made = [framed.frame(*[b"x"] * n) for n in (5, 1, 4096, 2)]
    framed.say(made[0].encode())
    framed.say(made[2].encode(), made[3].encode())
    assert _counts(framed) == [5], "the second one is missing"
    framed.say(made[1].encode())
    assert _counts(framed) == [5, 1, 4096, 2]
    assert framed.router.order.missed == 0


def test_a_frame_that_is_missing_is_given_up_with_all_its_messages(framed: Peer) -> None:
    made = [framed.frame(*[b"x"] * n) for n in (5, 7, 3)]
    framed.say(made[0].encode(), made[2].encode())
    framed.net.clock.now += 3
    framed.router.expire_holds()
    assert _counts(framed) == [5, 3]
    assert framed.router.order.missed == 7


def test_a_replayed_frame_is_refused(framed: Peer) -> None:
    old = framed.frame(b"a", b"b")
    assert framed.say(old.encode(), old.encode()) == [True, False]
    framed.net.clock.now += 1000
    framed.router.heartbeat()
    assert framed.say(old.encode()) == [False]
    assert _counts(framed) == [2]
    assert framed.router.stats.stale == 1


def test_a_forged_signature_of_a_frame_is_refused(framed: Peer) -> None:
    forged = framed.frame(b"a")
    forged.signature = Key.from_seed(b"o" * 32).sign(
        SIGN_DOMAIN + frames.signed(FRAMED, forged.signed())
    )
    plain = framed.frame(b"b")
    plain.signature = framed.key.sign(SIGN_DOMAIN + plain.signed())  # as of a raw topic
    assert framed.say(forged.encode(), plain.encode()) == [False, False]
    assert framed.router.stats.invalid == 2
    assert not framed.victim.inbox


def test_a_forged_principal_is_refused(framed: Peer) -> None:
    """Who passes a frame on cannot say that another one published it."""
    forged = framed.frame(b"a")
    forged.data = forged.data.replace(b"local:ada", b"local:bob")
    assert frames.decode(forged.data).principal == Principal("local", "bob")
    assert framed.say(forged.encode()) == [False]
    assert framed.router.stats.invalid == 1


@pytest.mark.parametrize("forged", ["", "b.c", "ab.c", "a", ".a"])
def test_a_forged_subject_is_refused(make_network: Any, forged: str) -> None:
    """Nor is one taken where nobody shares the topic, or missing where somebody does."""
    shared = "/wetware/test/a.>#1"
    peer = Peer(make_network(), topics=(shared, FRAMED))
    for topic in (shared, FRAMED):
        peer.router.subscribe(topic)
    good = [peer.frame(b"x", topic=shared, subject=name) for name in ("a.b", "a.", "a..c")]
    assert peer.say(*(m.encode() for m in good)) == [True] * 3
    assert peer.say(peer.frame(b"x", topic=shared, subject=forged).encode()) == [False]
    assert peer.say(peer.frame(b"x", subject=forged or "a.b").encode()) == [False]
    assert peer.router.stats.invalid == 2
    assert len(peer.victim.inbox) == 3


def test_there_are_no_messages_where_nodes_tell_who_serves(make_network: Any) -> None:
    topic = "/wetware/test/sum#ask"
    peer = Peer(make_network(), topics=(topic,))
    peer.router.subscribe(topic)
    assert peer.say(peer.message(b"hi", topic=topic).encode()) == [False]
    assert peer.router.stats.invalid == 1
    assert not peer.victim.inbox


def test_what_a_node_attests_is_bound_to_the_node_that_signed(framed: Peer) -> None:
    """A member that lies does so in its own name: the publisher is beside the principal."""
    framed.say(framed.frame(b"a", principal=Principal("local", "of another node")).encode())
    (message,) = framed.victim.inbox
    assert message.publisher == framed.id


@pytest.mark.parametrize(
    "lie",
    {
        "too short": lambda frame: frame[:-1],
        "too long": lambda frame: frame + b"x",
        "other lengths": lambda frame: frame.replace(b"\x03\0\0\0", b"\x04\0\0\0"),
        "more messages": lambda frame: frame[:10] + b"\xff\xff" + frame[12:],
        "none": lambda _: b"",
        "a plain message": lambda _: b"hello",
        "version": lambda frame: b"\x02" + frame[1:],
    }.values(),
)
def test_a_frame_that_lies_about_its_lengths_is_refused(
    framed: Peer, lie: Callable[[bytes], bytes]
) -> None:
    message = framed.frame(b"one", b"", b"three")
    message.data = lie(message.data)
    framed.sign(message)
    assert framed.say(message.encode()) == [False]
    assert framed.router.stats.invalid == 1
    assert framed.router.penalty(framed.id) == pytest.approx(10)
    assert framed.router._cache.get(message.id) is None, "it is not passed on"


def test_an_oversize_frame_is_refused_in_both_directions(make_network: Any) -> None:
    peer = Peer(make_network(message_bytes_max=1000))
    peer.router.subscribe(FRAMED)
    peer.net.clock.now += 10
    limit = frames.bytes_max(1000)
    big = peer.frame(b"x" * limit)
    assert peer.say(big.encode()) == [False]
    with pytest.raises(InvalidArgument, match="message_bytes_max"):
        peer.router.publish(FRAMED, b"x" * (limit + 1))


def test_a_frame_does_not_pass_the_end_of_an_epoch_nor_have_a_foreign_number(framed: Peer) -> None:
    long, foreign = framed.frame(b"a", b"b"), framed.frame(b"c")
    long.seqno = long.seqno[:6] + b"\xff\xff"
    foreign.seqno = b"\x18" + foreign.seqno[1:]
    for message in (long, foreign):
        framed.sign(message)
    assert framed.say(long.encode(), foreign.encode()) == [False, False]


def test_frames_of_a_liar_that_overlap_do_not_come_back_in_time(framed: Peer) -> None:
    made = [framed.frame(*[b"x"] * n) for n in (2, 3, 1)]
    inside = framed.frame(b"y")
    inside.seqno = (int.from_bytes(made[1].seqno, "big") + 1).to_bytes(8, "big")
    framed.sign(inside)
    framed.say(made[0].encode(), made[2].encode(), inside.encode(), made[1].encode())
    assert [m.data for m in framed.victim.inbox] == [m.data for m in made]


def test_an_own_frame_is_signed_once_and_for_nobody_not_at_all(make_network: Any) -> None:
    peer, signed = Peer(make_network(), topics=(T, FRAMED)), []
    sign = peer.router._sign
    peer.router._sign = lambda data: signed.append(data) or sign(data)
    peer.router.publish("/wetware/test/nobody#1", b"x")
    assert signed == []
    frame = frames.encode(ADA, 1.0, *packed.pack([b"a", b"b"]))
    seqno = peer.router.publish(FRAMED, frame, 2)
    assert len(signed) == 1
    message_id = peer.router.me.multihash + seqno
    peer.control(wire.iwant_chunk([message_id]))
    sent = peer.heard().messages
    assert [m.data for m in sent] == [frame, frame]
    assert len(signed) == 1
    assert peer.router._check(sent[0], sent[0].signed()) == peer.router.me


# --- raw topics -----------------------------------------------------------------------------------


def test_wrong_domain_and_seqno_lengths_are_refused(peer: Peer) -> None:
    other_domain = peer.message()
    other_domain.signature = peer.key.sign(other_domain.signed())
    short = peer.message()
    short.seqno = short.seqno[:7]
    short.signature = peer.key.sign(SIGN_DOMAIN + short.signed())
    assert peer.say(other_domain.encode(), short.encode()) == [False, False]
    assert peer.victim.texts() == []


def test_too_long_a_message_is_refused_in_both_directions(make_network: Any) -> None:
    peer = Peer(make_network(message_bytes_max=1000))
    assert peer.say(peer.message(b"x" * 1000).encode()) == [True]
    assert peer.say(peer.message(b"x" * 1001).encode()) == [False]
    with pytest.raises(InvalidArgument, match="message_bytes_max"):
        peer.router.publish(T, b"x" * 1001)


def test_replays_are_refused_even_when_forgotten_by_the_seen_cache(peer: Peer) -> None:
    old, new = peer.message(b"old"), peer.message(b"new")
    assert peer.say(old.encode(), new.encode(), old.encode()) == [True, True, False]
    assert peer.router.stats.duplicates == 1
    for _ in range(200):
        peer.net.clock.now += 1
        peer.router.heartbeat()
    assert peer.say(old.encode(), new.encode()) == [False, False]
    assert peer.router.stats.stale == 2
    assert peer.victim.texts() == [b"old", b"new"]
    # A message that was dropped as stale is not passed on either.
    assert peer.router._cache.get(old.id) is None


def test_foreign_numbers_are_taken_as_they_come(peer: Peer) -> None:
    for seqno in (b"\xff" * 8, b"\0" * 8, b"\x18" + b"a" * 7):
        message = peer.message(seqno)
        message.seqno = seqno
        message.signature = peer.key.sign(SIGN_DOMAIN + message.signed())
        assert peer.say(message.encode()) == [True]
    assert len(peer.victim.inbox) == 3


def test_messages_of_other_topics_and_clusters_are_ignored(peer: Peer) -> None:
    peer.say(wire.subscription_chunk("/wetware/other/chat", True))
    assert peer.router.subscribers("/wetware/other/chat") == ()
    strangers = [
        peer.message(topic=t).encode() for t in ("/wetware/test/else", "/wetware/other/chat", "x")
    ]
    assert peer.say(*strangers) == [False] * 3
    assert peer.router.penalty(peer.id) == 0
    peer.control(wire.graft_chunk("/wetware/other/chat"))
    assert not peer.heard().prune


def test_a_malformed_frame_is_raised_and_punished(peer: Peer) -> None:
    for _ in range(3):
        with pytest.raises(Malformed):
            peer.router.receive(peer.id, b"\x0b\x00")
    assert peer.router.penalty(peer.id) == pytest.approx(60)
    assert peer.router.stats.malformed == 3
    assert peer.router.receive(peer.id, b"") == []


def test_who_forges_is_pruned_then_ignored_then_forgiven(peer: Peer) -> None:
    peer.control(wire.graft_chunk(T))
    assert peer.router.mesh(T) == {peer.id}
    for _ in range(2):
        forged = peer.message()
        forged.data = b"!"
        peer.say(forged.encode())
    assert peer.router.mesh(T) == frozenset()
    assert [p.topic for p in peer.heard().prune] == [T]
    for _ in range(6):
        forged = peer.message()
        forged.data = b"!"
        peer.say(forged.encode())
    assert peer.router.penalty(peer.id) == pytest.approx(80)
    assert peer.say(peer.message(b"good").encode()) == []
    peer.router.publish(T, b"mine")
    assert not peer.heard().messages
    # Reconnecting does not clear it.
    peer.router.peer_down(peer.id)
    peer.router.inbound_opened(peer.id)
    peer.router.stream_opened(peer.id, MESHSUB_11, outbound=False)
    assert peer.router.penalty(peer.id) == pytest.approx(80)
    peer.net.clock.now += 60 * 5
    peer.router.heartbeat()
    assert peer.router.penalty(peer.id) == pytest.approx(2.5)
    assert peer.say(wire.subscription_chunk(T, True), peer.message(b"better").encode()) == [True]
    assert peer.victim.texts() == [b"mine", b"better"]


def test_subscriptions_of_a_graylisted_peer_still_count(peer: Peer) -> None:
    for _ in range(4):
        with pytest.raises(Malformed):
            peer.router.receive(peer.id, b"\x0b\x00")
    peer.say(wire.subscription_chunk(T + "2", True), wire.subscription_chunk(T, False))
    assert peer.router.subscribers(T + "2") == (peer.id,)
    assert peer.router.subscribers(T) == ()


def test_graft_during_backoff_is_refused_and_punished(peer: Peer) -> None:
    peer.control(wire.graft_chunk(T))
    peer.router._prune(T, peer.id)
    (prune,) = peer.heard().prune
    assert prune == wire.Prune(T, 60)
    peer.control(wire.graft_chunk(T))
    assert peer.id not in peer.router.mesh(T)
    assert peer.router.penalty(peer.id) == pytest.approx(10)  # at once: a flood
    assert peer.heard().prune == [wire.Prune(T, 60)]
    peer.net.clock.now += 30
    peer.control(wire.graft_chunk(T))
    assert peer.router.penalty(peer.id) > 10
    peer.net.clock.now += 61
    peer.router.heartbeat()
    peer.heard()
    peer.control(wire.graft_chunk(T))
    assert peer.id in peer.router.mesh(T)
    assert not peer.heard().prune


def test_their_prune_is_obeyed_for_as_long_as_it_says(peer: Peer) -> None:
    peer.control(wire.graft_chunk(T))
    peer.control(wire.prune_chunk(T, 20))
    assert peer.id not in peer.router.mesh(T)
    peer.heard()
    for _ in range(20):
        peer.net.clock.now += 1
        peer.router.heartbeat()
        assert not peer.heard().graft
    peer.net.clock.now += 2
    peer.router.heartbeat()
    assert peer.heard().graft == [T]


def test_a_peer_of_1_0_gets_no_backoff_and_one_of_floodsub_no_mesh(make_network: Any) -> None:
    old = Peer(make_network(), MESHSUB_10)
    old.router.unsubscribe(T)
    assert old.heard().prune == [wire.Prune(T, None)]
    flood = Peer(make_network(flood_publish=False), FLOODSUB)
    flood.router.heartbeat()
    assert flood.router.mesh(T) == frozenset()
    flood.router.publish(T, b"mine")
    heard = flood.heard()
    assert [m.data for m in heard.messages] == [b"mine"]
    assert not heard.graft
    assert not heard.ihave


def test_a_full_mesh_refuses_grafts_of_peers_that_dialled_in(make_network: Any) -> None:
    net = make_network(mesh_d=2, mesh_d_low=2, mesh_d_high=2, mesh_d_out=0)
    peer = Peer(net, topics=())
    for _ in range(2):
        other = Key.from_seed(net.rng.randbytes(32)).peer_id
        peer.router.inbound_opened(other)
        peer.router.stream_opened(other, MESHSUB_11, outbound=False)
        (body,) = FrameReader(peer.router.limits).feed(
            wire.frame([wire.subscription_chunk(T, True)])
        )
        peer.router.receive(other, body)
    assert len(peer.router.mesh(T)) == 2
    peer.say(wire.subscription_chunk(T, True), wire.control_chunk([wire.graft_chunk(T)]))
    assert peer.id not in peer.router.mesh(T)
    assert [p.topic for p in peer.heard().prune] == [T]


def test_a_flood_of_ihave_is_bounded(make_network: Any) -> None:
    peer = Peer(make_network(ihave_ids_max=1000))
    ids = [b"%030d" % i for i in range(8000)]
    for i in range(8):
        peer.control(wire.ihave_chunk(T, ids[1000 * i : 1000 * (i + 1)]))
    assert len(peer.heard().iwant) == 1000
    for _ in range(20):
        peer.control(wire.ihave_chunk(T, [b"x"]))
    penalty = peer.router.penalty(peer.id)
    assert penalty > 0
    # What was promised and did not come counts too, once a heartbeat.
    for _ in range(5):
        peer.net.clock.now += 1
        peer.router.heartbeat()
    assert peer.router.stats.promises_broken == 1000
    assert peer.router.penalty(peer.id) < penalty + 3
    peer.control(wire.ihave_chunk("/wetware/test/else", [b"y"]))
    assert not peer.heard().iwant


def test_a_promise_that_is_kept_by_anybody_is_kept(peer: Peer) -> None:
    message = peer.message()
    peer.control(wire.ihave_chunk(T, [message.id]))
    assert peer.heard().iwant == [message.id]
    peer.control(wire.ihave_chunk(T, [message.id]))
    assert not peer.heard().iwant  # asked already
    peer.say(message.encode())
    peer.net.clock.now += 10
    peer.router.heartbeat()
    assert peer.router.penalty(peer.id) == 0


def test_iwant_is_answered_a_few_times_only(peer: Peer) -> None:
    seqno = peer.router.publish(T, b"mine")
    message_id = peer.victim.id.multihash + seqno
    peer.heard()
    answers = 0
    for _ in range(10):
        peer.control(wire.iwant_chunk([message_id] * 5))
        answers += len(peer.heard().messages)
    assert answers == peer.net.config.iwant_repeats_max
    assert peer.router.penalty(peer.id) > 0
    for _ in range(6):
        peer.router.heartbeat()
    assert peer.router._cache.get(message_id) is None


def test_a_peer_has_a_bounded_number_of_topics(make_network: Any) -> None:
    peer = Peer(make_network(peer_topics_max=10), topics=())
    peer.say(*(wire.subscription_chunk(f"{T}{i}", True) for i in range(12)))
    assert sum(peer.id in peer.router.subscribers(f"{T}{i}") for i in range(12)) == 10
    assert peer.router.penalty(peer.id) == pytest.approx(10)


def test_a_peer_that_does_not_read_loses_its_stream_and_nobody_else_anything(
    make_network: Any,
) -> None:
    net = make_network(queue_bytes_max=100_000, message_bytes_max=1000)
    slow = Peer(net)
    fast = Key.from_seed(net.rng.randbytes(32)).peer_id
    slow.router.inbound_opened(fast)
    slow.router.stream_opened(fast, MESHSUB_11, outbound=False)
    (body,) = FrameReader(slow.router.limits).feed(wire.frame([wire.subscription_chunk(T, True)]))
    slow.router.receive(fast, body)
    taken = 0
    for number in range(1000):
        slow.router.publish(T, b"0 %d" % number)
        if number % 10 == 9:
            while frame := slow.router.take(fast):
                taken += sum(
                    len(decode(b, slow.router.limits).messages)
                    for b in FrameReader(slow.router.limits).feed(frame)
                )
    assert taken == 1000
    assert slow.victim.lost == [slow.id]
    assert slow.router.stats.streams_lost == 1
    assert slow.heard() == wire.Rpc([], [], [], [], [], [])
    # On its next stream it is greeted, and gets what comes from then on.
    slow.router.stream_opened(slow.id, MESHSUB_11, outbound=False)
    slow.router.publish(T, b"0 1000")
    heard = slow.heard()
    assert heard.subscriptions == [(True, T)]
    assert [m.data for m in heard.messages] == [b"0 1000"]


def test_gossip_gives_way_to_messages(make_network: Any) -> None:
    peer = Peer(make_network(queue_bytes_max=10_000, message_bytes_max=1000))
    for number in range(40):
        peer.router.publish(T, b"%d" % number)
    assert peer.router.is_crowded(peer.id)
    peer.control(wire.ihave_chunk(T, [b"x" * 30]))
    assert peer.router.stats.gossip_dropped == 1
    heard = peer.heard()
    assert len(heard.messages) == 40
    assert not heard.iwant


def test_everything_of_one_turn_leaves_in_one_frame(peer: Peer) -> None:
    for number in range(100):
        peer.router.publish(T, b"%d" % number)
    peer.router.subscribe(T + "2")
    assert peer.victim.woken.count(peer.id) >= 1
    frame = peer.router.take(peer.id)
    assert peer.router.take(peer.id) == b""
    (body,) = FrameReader(peer.router.limits).feed(frame)
    rpc = decode(body, peer.router.limits)
    assert len(rpc.messages) == 100
    assert rpc.subscriptions == [(True, T + "2")]


def test_the_message_cache_is_bounded_in_bytes() -> None:
    cache = MessageCache(5, 3, 2280)  # 100 bytes and 128 of overhead
    for number in range(100):
        cache.put(b"%d" % number, T, b"x" * 100)
        if number % 7 == 0:
            cache.shift()
    kept = [n for n in range(100) if cache.get(b"%d" % n)]
    assert kept == list(range(90, 100))
    assert [i for ids in cache.recent().values() for i in ids] == [b"%d" % n for n in kept]


def test_the_same_seed_gives_the_same_run(make_network: Any) -> None:
    def run() -> list[list[bytes]]:
        net = make_network(seed=9)
        nodes = net.make(8)
        net.graph(nodes, 4)
        _subscribe(nodes)
        net.run(2)
        for number in range(5):
            nodes[number].router.publish(T, b"%d 0" % number)
        net.run(2)
        return [n.texts() for n in nodes]

    assert run() == run()
