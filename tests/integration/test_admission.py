"""Who is let in, by real nodes: strangers, evicted nodes, thieves, tickets, wrong clocks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from wetware.base.multiaddr import Multiaddr
from wetware.broker.protocol import GATE_PROTOCOL
from wetware.errors import AdmissionRefused, OverlayError, ProtocolRefused
from wetware.identity import Key, PeerId
from wetware.overlay.admission.decision import Admission
from wetware.overlay.admission.exchange import CERTIFICATE_PROTOCOL, JOIN_PROTOCOL, ask_to_join
from wetware.overlay.admission.joining import join
from wetware.overlay.admission.limits import AdmissionLimits
from wetware.overlay.admission.service import Introductions
from wetware.overlay.admission.store import Store
from wetware.overlay.admission.texts import parse_join
from wetware.overlay.link import Connection, LinkHost
from wetware.overlay.link.relaying import RELAY_PROTOCOL
from wetware.overlay.membership.courier import PROTOCOL as MEMBERSHIP_PROTOCOL
from wetware.overlay.membership.dial_back import DIAL_BACK_PROTOCOL
from wetware.overlay.membership.twins import PROCESS_PROTOCOL
from wetware.overlay.punching import OBSERVED_PROTOCOL, PUNCH_PROTOCOL
from wetware.overlay.tunnel import TUNNEL_PROTOCOL
from wetware.testing import START_S_MAX, Home, NodeProcess, wait_for
from wetware_audit.spread import PROTOCOL as AUDIT_PROTOCOL
from wetware_auth_local.spread import PROTOCOL as POLICY_PROTOCOL
from wetware_blob.exchange.wire import PROTOCOL as BLOB_PROTOCOL
from wetware_pubsub.router import FLOODSUB, MESHSUB_10, MESHSUB_11

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]
LIBP2P = True

IDENTIFY, PUSH, PING, KAD = (
    "/ipfs/id/1.0.0",
    "/ipfs/id/push/1.0.0",
    "/ipfs/ping/1.0.0",
    "/ipfs/kad/1.0.0",
)
PUBLIC = {
    *(GATE_PROTOCOL, CERTIFICATE_PROTOCOL, JOIN_PROTOCOL, RELAY_PROTOCOL, OBSERVED_PROTOCOL),
    *(IDENTIFY, PUSH, PING),
}
MEMBER = {
    *(MEMBERSHIP_PROTOCOL, DIAL_BACK_PROTOCOL, TUNNEL_PROTOCOL, POLICY_PROTOCOL, KAD),
    *(PROCESS_PROTOCOL, MESHSUB_11, MESHSUB_10, FLOODSUB, AUDIT_PROTOCOL),
    *(PUNCH_PROTOCOL, BLOB_PROTOCOL),
}
WITHIN_S = 60.0
"""For what takes a second or two on an idle machine."""


def logged(node: NodeProcess, *words: object) -> bool:
    """Whether one line of the node's log has all of `words`."""
    return any(
        all(str(word) in line for word in words) for line in node.log.read_text().splitlines()
    )


def wait_logged(node: NodeProcess, *words: object) -> None:
    what = f"{' '.join(map(str, words))} in the log of {node.data_dir.name}"
    wait_for(lambda: logged(node, *words), what, within_s=WITHIN_S)


def is_member(node: NodeProcess, peer: PeerId) -> bool:
    """Whether the node has a connection to the peer on which it is a member."""
    status = json.loads(node.ww("status", "--json", check=True).stdout)
    return any(each["peer_id"] == peer and each["member"] for each in status["peers"])


def issuer_of(node: NodeProcess) -> PeerId:
    """The name of the cluster's key."""
    founding = Store(node.data_dir).founding
    assert founding is not None
    return founding.issuer


def ended(node: NodeProcess) -> int:
    """The exit code of a node that is to end by itself."""
    return node.process.wait(START_S_MAX)


async def dial(host: LinkHost, node: NodeProcess) -> Connection:
    target = Multiaddr.parse(node.addr)
    return await host.dial([target], peer=target.peer)


async def opens(connection: Connection, protocol: str) -> bool:
    """Whether the peer lets this end open a stream; only `na` is a no."""
    try:
        stream = await asyncio.wait_for(connection.open_stream(protocol), WITHIN_S)
    except ProtocolRefused:
        return False
    stream.reset()
    return True


# --- a peer of the test's own ---------------------------------------------------------------------


@dataclass
class Peer:
    """A member without a node: just enough to open streams as one."""

    key: Key
    host: LinkHost
    admission: Admission
    introductions: Introductions

    async def introduce(self, node: NodeProcess) -> Connection:
        """Connect and be admitted; raises AdmissionRefused, OverlayError."""
        connection = await dial(self.host, node)
        await asyncio.wait_for(self.introductions.introduced(connection), WITHIN_S)
        return connection


@contextlib.asynccontextmanager
async def member_peer(data_dir: Path, invitation: str, key: Key) -> AsyncIterator[Peer]:
    """Join with a ticket, as `ww node --join` does."""
    os.makedirs(data_dir, exist_ok=True)

    async def no_document() -> bytes:
        return b""

    async with LinkHost(key) as host:
        store = Store(data_dir)
        limits = AdmissionLimits()
        await join(host, parse_join(invitation), store, key=key, clock=time, limits=limits)
        admission = Admission(store, key, clock=time)
        introductions = Introductions(host, admission, addrs=lambda: (), join_document=no_document)
        introductions.start()
        try:
            yield Peer(key, host, admission, introductions)
        finally:
            await introductions.aclose()


# --- strangers ------------------------------------------------------------------------------------


async def _served(connection: Connection) -> set[str]:
    """What the node says it serves, in the words of libp2p."""
    from libp2p.identity.identify.identify import parse_identify_response

    said = b""
    async with await connection.open_stream("/ipfs/id/1.0.0") as stream:
        while part := await asyncio.wait_for(stream.read(), WITHIN_S):
            said += part
    return set(parse_identify_response(said).protocols)


async def test_a_stranger_tries_every_protocol(
    pair: tuple[NodeProcess, NodeProcess], tmp_path: Path
) -> None:
    a, _ = pair
    key = Key.generate()
    async with LinkHost(key) as host:
        connection = await dial(host, a)
        assert await _served(connection) == PUBLIC | MEMBER, (
            "a protocol that this test does not try, or one that is gone"
        )
        for protocol in sorted(MEMBER):
            assert not await opens(connection, protocol), f"{protocol} is open to strangers"
        for protocol in sorted(MEMBER):
            wait_logged(a, "protocol.refused", f"peer={key.peer_id}", f"protocol={protocol}")
        for protocol in sorted(PUBLIC):
            assert await opens(connection, protocol), f"{protocol} is closed to strangers"
        assert not connection.closed, "it may stay, as a client does"
    # The same from somebody who is a member: what was refused is there.
    invitation = await asyncio.to_thread(a.invite)
    async with member_peer(tmp_path / "peer", invitation, Key.generate()) as peer:
        connection = await peer.introduce(a)
        for protocol in sorted(MEMBER | PUBLIC):
            assert await opens(connection, protocol), f"{protocol} is closed to members"
        assert await asyncio.to_thread(a.ww, "evict", peer.key.peer_id, "--yes", check=True)


# --- eviction -------------------------------------------------------------------------------------


def test_an_evicted_node_cannot_come_back(
    pair: tuple[NodeProcess, NodeProcess], shared_home: Home
) -> None:
    a, b = pair
    ticket = a.invite("--uses", "2")
    with shared_home.node("evicted", join=ticket) as c:
        for node in pair:
            node.wait_members([c.peer_id])
        a.ww("evict", "evicted", "--reason", "lost laptop", "--yes", check=True)
        for node in pair:
            wait_logged(node, "node.evicted", f"peer={c.peer_id}", "lost laptop")
            if node is a:  # the others it may have left by itself
                wait_logged(a, "connection.down", f"peer={c.peer_id}", "is no member any more")
            wait_logged(node, "member.removed", f"peer={c.peer_id}")
            # It may come back as a stranger, as anybody may.
            assert not is_member(node, c.peer_id)
            assert c.peer_id not in node.members()
        peer_id = c.peer_id
        # It is told with the first refusal, in a statement that it can check, and ends.
        assert ended(c) == 77
        wait_logged(c, "introduction.refused", "admission.evicted", "lost laptop")
    # With its key and its certificate: a restart, with no other node in reach; and with what it has
    # learnt taken away, by one of those that refuse it.
    for forgotten in (False, True):
        if forgotten:
            (c.data_dir / "tombstones.json").unlink()
        again = shared_home.start_node("evicted")
        assert ended(again) == 77
        said = again.log.read_text()
        assert "none of the cluster's any more" in said
        assert "was evicted from the cluster: lost laptop" in said
        assert "Traceback" not in said
        assert ("introduction.refused" in said) == forgotten
        for node in pair:
            assert peer_id not in node.members()
            assert set(node.members()) >= {a.peer_id, b.peer_id}
    # With its key and its old ticket, and with its key and a new one, in a directory of its own.
    for number, again in enumerate((ticket, a.invite())):
        fresh = shared_home.path / f"evicted again {number}"
        fresh.mkdir(mode=0o700)
        shutil.copy2(shared_home.path / "evicted" / "node.key", fresh / "node.key")
        node = shared_home.start_node(fresh.name, join=again)
        assert ended(node) == 77
        assert "was evicted from the cluster: lost laptop" in node.log.read_text() or (
            number == 0 and "the ticket was taken back" in node.log.read_text()
        )
        assert "Traceback" not in node.log.read_text()
    for node in pair:
        assert peer_id not in node.members()


async def test_an_evicted_peer_s_streams_end_and_nothing_opens_them_again(
    pair: tuple[NodeProcess, NodeProcess], tmp_path: Path
) -> None:
    a, b = pair
    ticket, key = await asyncio.to_thread(a.invite), Key.generate()
    async with member_peer(tmp_path / "peer", ticket, key) as peer:
        connections = [await peer.introduce(a), await peer.introduce(b)]
        streams = [await c.open_stream(MEMBERSHIP_PROTOCOL) for c in connections]
        await asyncio.to_thread(a.ww, "evict", key.peer_id, "--yes", check=True)
        for connection in connections:
            await asyncio.wait_for(connection.wait_closed(), WITHIN_S)
        for stream in streams:
            with pytest.raises(OverlayError):
                await stream.write(b"x" * 100)
        for node in pair:
            # The certificate, as good as ever by itself.
            assert peer.admission.own.not_after_ms > time.time() * 1000
            with pytest.raises(AdmissionRefused) as caught:
                await peer.introduce(node)
            assert caught.value.code == "admission.evicted"
            # And whatever it tries on a connection, which strangers can have.
            connection = await dial(peer.host, node)
            for protocol in sorted(MEMBER - {KAD}):
                assert not await opens(connection, protocol)
        connection = await dial(peer.host, a)
        for message in (
            {"renew": peer.admission.own.encoded},
            {"chain": peer.admission.own.encoded},
            {"secret": parse_join(ticket).secret},  # type: ignore[union-attr]  # a ticket
        ):
            with pytest.raises(AdmissionRefused) as caught:
                await ask_to_join(connection, message, bytes_max=65536, timeout_s=WITHIN_S)
            assert caught.value.code in ("admission.evicted", "admission.ticket_revoked")


def test_who_may_not_evict(pair: tuple[NodeProcess, NodeProcess]) -> None:
    a, b = pair
    done = b.ww("evict", "a", "--yes")
    assert done.returncode == 77
    assert "may not invite or evict" in done.stderr
    done = a.ww("evict", "a", "--yes")
    assert done.returncode == 2
    assert "does not evict itself" in done.stderr
    done = a.ww("evict", "nobody-of-this-name", "--yes")
    assert done.returncode == 1
    assert "no member matches" in done.stderr
    assert {a.peer_id, b.peer_id} <= set(a.members())


# --- tickets --------------------------------------------------------------------------------------


def test_two_nodes_redeem_one_ticket_at_the_same_time(
    pair: tuple[NodeProcess, NodeProcess], shared_home: Home
) -> None:
    a, _ = pair
    ticket = a.invite()
    nodes = [shared_home.start_node(f"racer{n}", join=ticket) for n in range(2)]
    try:
        wait_for(
            lambda: any(node.process.poll() is not None for node in nodes),
            "one of them gives up",
            within_s=START_S_MAX,
        )
        (loser,) = (node for node in nodes if node.process.poll() is not None)
        (winner,) = (node for node in nodes if node is not loser)
        winner.wait_ready()
        assert loser.process.returncode == 77
        assert "the ticket was used by another node" in loser.log.read_text()
        assert "try: " in loser.log.read_text()
        assert not (loser.data_dir / "certificate").exists()
        for node in pair:
            node.wait_members([winner.peer_id])
        racers = [m for m in a.members().values() if m["name"].startswith("racer")]
        assert [m["peer_id"] for m in racers] == [str(winner.peer_id)]
        # The winner may repeat it: its answer might have got lost.
        winner.stop()
        with shared_home.node(winner.data_dir.name, join=ticket) as again:
            assert again.peer_id == winner.peer_id
        a.ww("evict", winner.peer_id, "--yes", check=True)
    finally:
        for node in nodes:
            node.stop()


async def test_sixteen_peers_redeem_one_ticket_at_the_same_time(
    pair: tuple[NodeProcess, NodeProcess],
) -> None:
    a, _ = pair
    ticket = parse_join(await asyncio.to_thread(a.invite))
    message = {"secret": ticket.secret}  # type: ignore[union-attr]  # a ticket
    async with contextlib.AsyncExitStack() as stack:
        hosts = [await stack.enter_async_context(LinkHost(Key.generate())) for _ in range(16)]
        connections = [await dial(host, a) for host in hosts]
        answers = await asyncio.gather(
            *(
                ask_to_join(connection, message, bytes_max=1 << 20, timeout_s=WITHIN_S)
                for connection in connections
            ),
            return_exceptions=True,
        )
    refusals = [each for each in answers if isinstance(each, BaseException)]
    assert len(refusals) == 15
    assert all(isinstance(each, AdmissionRefused) for each in refusals), refusals
    assert {each.code for each in refusals if isinstance(each, AdmissionRefused)} == {
        "admission.ticket_spent"
    }


def test_invite_lists_revokes_and_expires(
    pair: tuple[NodeProcess, NodeProcess], shared_home: Home
) -> None:
    a, b = pair
    made = json.loads(
        a.invite("--json", "--expires", "15m", "--uses", "3", "--label", "zone=cloud")
    )
    assert made["ticket"].startswith("wwt1")
    assert made["uses"] == 3
    assert abs(made["not_after_ms"] / 1000 - time.time() - 900) < 120

    def listed(ticket_id: str) -> dict[str, object]:
        tickets = json.loads(a.ww("invite", "--list", "--json", check=True).stdout)
        (found,) = (t for t in tickets if t["id"] == ticket_id)
        return dict(found)

    assert listed(made["id"]) == {
        "id": made["id"],
        "not_after_ms": made["not_after_ms"],
        "uses_left": 3,
        "spent_by": [],
        "labels": {"zone": "cloud"},
        "rights": ["member"],
        "revoked": False,
    }
    assert made["ticket"] not in a.ww("invite", "--list", "--json").stdout, "a secret is not kept"
    with shared_home.node("labelled", join=made["ticket"], args=["--label", "zone=lie"]) as c:
        a.wait_members([c.peer_id])
        assert a.members("zone=cloud,name=labelled")[c.peer_id]["labels"] == {"zone": "cloud"}
        assert listed(made["id"])["spent_by"] == [c.peer_id]
        assert listed(made["id"])["uses_left"] == 2
    a.ww("evict", c.peer_id, "--yes", check=True)  # so that it is not dialled in other tests

    other = json.loads(a.invite("--json"))
    assert a.ww("invite", "--revoke", other["id"]).returncode == 0
    assert listed(other["id"])["revoked"] is True
    row = next(
        line for line in a.ww("invite", "--list", check=True).stdout.splitlines()
        if other["id"] in line
    )  # fmt: skip
    assert "revoked" in row
    short, made_at = a.invite("--expires", "1s"), time.monotonic()
    unknown = a.ww("invite", "--revoke", "nothing")
    assert unknown.returncode == 2
    assert f"ww --data-dir {a.data_dir} invite --list" in unknown.stderr
    assert a.ww("invite", "--expires", "soon").returncode == 2
    assert a.ww("invite", "--foreign").returncode == 2
    refused = b.ww("invite")
    assert refused.returncode == 77, "a member that may not invite"
    assert "may not invite" in refused.stderr
    time.sleep(max(0.0, made_at + 1.1 - time.monotonic()))  # until it has expired

    for ticket, why in (
        (other["ticket"], "the ticket was taken back"),
        (short, "the ticket expired"),
        (made["ticket"][:-8] + "AAAAAAAA", ""),
        ("wwt1nonsense", ""),
    ):
        node = shared_home.start_node(join=ticket)
        assert ended(node) in (2, 77)
        log = node.log.read_text()
        assert why in log
        assert "\nww: " in "\n" + log
        assert "Traceback" not in log


@pytest.mark.long
def test_a_founder_that_was_restored_learns_from_others_which_tickets_are_spent(
    home: Home, tmp_path: Path
) -> None:
    """Also while the node that the ticket let in is away: another has seen its certificate."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        listen = f"/ip4/127.0.0.1/tcp/{server.getsockname()[1]}"
    a = home.start_node("a", listen=listen).wait_ready()
    with home.node("b", join=a) as b:
        ticket = json.loads(a.invite("--json"))
        a.stop()
        backup = shutil.copytree(a.data_dir, tmp_path / "backup")
        a = home.start_node("a", listen=listen).wait_ready()
        with home.node("c", join=ticket["ticket"]) as c:
            b.wait_members([a.peer_id, c.peer_id])
        a.process.kill()
        a.process.wait()
        shutil.rmtree(a.data_dir)
        shutil.copytree(backup, a.data_dir)
        a = home.start_node("a", listen=listen).wait_ready()
        thief = home.start_node("thief", join=ticket["ticket"])
        assert ended(thief) == 77
        assert "the ticket was used by another node" in thief.log.read_text()
        (found,) = (
            each
            for each in json.loads(a.ww("invite", "--list", "--json", check=True).stdout)
            if each["id"] == ticket["id"]
        )
        assert found["spent_by"] == [c.peer_id]
        a.stop()


@pytest.mark.long
def test_an_inviter_invites_and_its_eviction_voids_what_it_signed(home: Home) -> None:
    with (
        home.node("a") as a,
        home.node("inviter", join=a.invite("--inviter")) as inviter,
        home.node("guest", join=inviter) as guest,
    ):
        for node in (a, inviter, guest):
            node.wait_members([a.peer_id, inviter.peer_id, guest.peer_id])
        refused = inviter.ww("invite", "--inviter")
        assert refused.returncode == 77
        assert "only a node with the cluster's key" in refused.stderr
        refused = inviter.ww("evict", "a", "--yes")
        assert refused.returncode == 77, refused.stderr

        # Whom it let in before is let in nowhere else.
        asyncio.run(_comes_by(inviter.invite(), home.path / "newcomer", a))
        assert ended(inviter) == 77
        # The guest gets a certificate that the cluster's key signed, by itself, and hears why.
        wait_logged(guest, "certificate.renewed", f"issuer={issuer_of(a)}")
        wait_logged(guest, "node.evicted", f"peer={inviter.peer_id}")
        for node, other in ((a, guest), (guest, a)):
            node.wait_members([other.peer_id], within_s=WITHIN_S)
            wait_for(
                lambda node=node: inviter.peer_id not in node.members(), "it is gone", within_s=60
            )


async def _comes_by(ticket: str, data_dir: Path, node: NodeProcess) -> None:
    """Join with a ticket of an inviter that is evicted then: the cluster does not take it."""
    async with member_peer(data_dir, ticket, Key.generate()) as peer:
        await asyncio.to_thread(node.ww, "evict", "inviter", "--yes", check=True)
        with pytest.raises(AdmissionRefused) as caught:
            await peer.introduce(node)
        assert caught.value.code == "admission.void"


def test_a_certificate_for_a_peer_id(home: Home) -> None:
    """Made before the node has ever run; no secret: it is of use to one key only."""
    with home.node("a") as a:
        peer_id = home.node_id("known")
        bundle = a.invite("--peer", str(peer_id), "--label", "zone=home")
        assert bundle.startswith("wwc1")
        thief = home.start_node("thief", join=bundle)
        assert ended(thief) == 77
        assert f"the certificate is of {peer_id}" in thief.log.read_text()
        with home.node("known", join=bundle) as known:
            assert known.peer_id == peer_id
            a.wait_members([peer_id])
            assert a.members()[peer_id]["labels"] == {"zone": "home"}


# --- thieves --------------------------------------------------------------------------------------


async def test_a_stolen_certificate_without_its_key_is_worthless(
    pair: tuple[NodeProcess, NodeProcess], shared_home: Home
) -> None:
    a, b = pair
    loot = shared_home.path / "loot"
    shutil.copytree(
        b.data_dir, loot, ignore=shutil.ignore_patterns("node.key", "lock", "*.sock", "node.json")
    )
    thief = shared_home.node_id("loot")  # a key of its own
    assert thief != b.peer_id
    node = shared_home.start_node("loot")
    assert ended(node) == 78
    log = node.log.read_text()
    assert f"is of {b.peer_id}, and this node is {thief}" in log
    assert "try: restore node.key" in log
    assert "Traceback" not in log
    # And shown on the wire all the same.
    encoded = Store(loot).certificate
    assert encoded is not None
    key = Key.generate()
    async with LinkHost(key) as host:
        connection = await dial(host, a)
        for message in ({"chain": encoded}, {"renew": encoded}):
            with pytest.raises(AdmissionRefused) as caught:
                await ask_to_join(connection, message, bytes_max=65536, timeout_s=WITHIN_S)
            assert caught.value.code == "admission.wrong_peer"
        assert not await opens(connection, MEMBERSHIP_PROTOCOL)
    wait_logged(a, "admission.refused", f"peer={key.peer_id}", "admission.wrong_peer")
    assert {m["state"] for p, m in a.members().items() if p == b.peer_id} == {"alive"}


# --- clocks ---------------------------------------------------------------------------------------


SKEW = """
import os, time

_offset_s = float(os.environ["TEST_CLOCK_OFFSET_S"])
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + _offset_s
time.time_ns = lambda: _time_ns() + int(_offset_s * 1e9)
"""


@pytest.fixture
def skewed(
    tmp_path: Path, pair: tuple[NodeProcess, NodeProcess], shared_home: Home
) -> Callable[[float], Home]:
    """`skewed(offset_s)`: one home, on a machine whose clock is ahead by so much."""
    patch = tmp_path / "clock"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(SKEW)
    keys = Path(".wetware") / "keys"  # the operator's
    shutil.copytree(shared_home.path / keys, tmp_path / "skewed" / keys)

    def made(offset_s: float) -> Home:
        env = {"PYTHONPATH": str(patch), "TEST_CLOCK_OFFSET_S": str(offset_s)}
        return Home(tmp_path / "skewed", env=env)

    return made


def _clock_finding(node: NodeProcess) -> dict[str, str]:
    report = json.loads(node.ww("doctor", "--json").stdout)
    (found,) = (f for f in report["findings"] if f["check"] == "clock of members")
    return dict(found)


@pytest.mark.parametrize(("offset_s", "side"), [(45.0, "ahead of"), (-45.0, "behind")])
def test_a_clock_that_is_wrong_within_the_tolerance(
    pair: tuple[NodeProcess, NodeProcess],
    skewed: Callable[[float], Home],
    offset_s: float,
    side: str,
) -> None:
    """`clock_skew_s_max` is 60 s: it takes part, and says that its clock is off."""
    a, b = pair
    with skewed(offset_s) as home, home.node("skewed", join=a.invite()) as c:
        for node in pair:
            node.wait_members([c.peer_id])
        c.wait_members([a.peer_id, b.peer_id])

        def offset() -> float:
            return float(json.loads(c.ww("status", "--json", check=True).stdout)["clock_offset_s"])

        measured = wait_for(offset, "a measured clock", within_s=WITHIN_S)
        assert measured == pytest.approx(-offset_s, abs=5)
        (line,) = (
            line
            for line in c.ww("status", check=True).stdout.splitlines()
            if line.startswith("clock ")
        )
        assert side in line
        finding = _clock_finding(c)
        assert finding["level"] == "warning"
        assert side in finding["text"]
    a.ww("evict", c.peer_id, "--yes", check=True)


@pytest.mark.parametrize(
    ("offset_s", "why"), [(-600.0, "valid only in 6"), (8 * 86400.0, "expired 86")]
)
def test_a_clock_that_is_wrong_beyond_the_tolerance_cannot_join(
    pair: tuple[NodeProcess, NodeProcess],
    skewed: Callable[[float], Home],
    offset_s: float,
    why: str,
) -> None:
    a, _ = pair
    with skewed(offset_s) as home:
        node = home.start_node("skewed", join=a.invite())
        assert ended(node) == 77
        assert why in node.log.read_text()
        assert "try: compare the clocks of both machines" in node.log.read_text()
        assert not (node.data_dir / "certificate").exists()


def test_a_clock_that_is_ahead_beyond_the_tolerance_is_told(
    pair: tuple[NodeProcess, NodeProcess], skewed: Callable[[float], Home]
) -> None:
    """Ten minutes are less than a certificate's life: it is in, and logs what is wrong."""
    a, _ = pair
    with skewed(600) as home, home.node("ahead", join=a.invite()) as c:
        a.wait_members([c.peer_id])
        wait_logged(c, "warning", "clock.skewed", "others_ahead_s=-600")
        assert "ahead of" in c.ww("status", check=True).stdout
        finding = _clock_finding(c)
        assert finding["level"] == "error"
        assert "certificates and logins fail" in finding["text"]
        assert finding["remedy"]
    a.ww("evict", c.peer_id, "--yes", check=True)


@pytest.mark.long
def test_a_member_whose_clock_goes_wrong_comes_back_with_the_right_one(
    pair: tuple[NodeProcess, NodeProcess], skewed: Callable[[float], Home]
) -> None:
    """Ten minutes behind, it takes the others' certificates for ones of the future."""
    a, b = pair
    with skewed(0) as home, home.node("c", join=a.invite()) as c:
        c.wait_members([a.peer_id, b.peer_id])
    with skewed(-600) as home, home.node("c") as c:
        wait_logged(c, "introduction.refused", "admission.not_yet", "clock")
        for node in pair:
            assert node.members()[c.peer_id]["state"] != "alive"
            assert {node.members()[n.peer_id]["state"] for n in pair} == {"alive"}
    with skewed(0) as home, home.node("c") as c:
        for node in pair:
            node.wait_members([c.peer_id])
        c.wait_members([a.peer_id, b.peer_id])
    a.ww("evict", c.peer_id, "--yes", check=True)
