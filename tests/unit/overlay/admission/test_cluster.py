"""Several nodes: joining, introductions, eviction, renewal, foreign peers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from copy import copy
from typing import Any

import pytest

from wetware.base.access import Access
from wetware.errors import (
    AdmissionRefused,
    ConfigError,
    InvalidArgument,
    OverlayError,
    ProtocolRefused,
    StreamReset,
    WetwareError,
)
from wetware.hookspecs import PeerDown, PeerUp
from wetware.identity import Key, PeerId
from wetware.overlay.admission.exchange import CERTIFICATE_PROTOCOL
from wetware.overlay.admission.joining import join
from wetware.overlay.admission.members import Admitted, Removed
from wetware.overlay.admission.statements import Chain
from wetware.overlay.admission.store import Store
from wetware.overlay.admission.texts import Bundle, Ticket
from wetware.overlay.frames import read_frame, write_frame
from wetware.overlay.link import LinkHost, Stream

pytestmark = pytest.mark.anyio
DAY_S = 86_400.0


def code(exc: pytest.ExceptionInfo[WetwareError]) -> str:
    return exc.value.code


async def rejoin(node: Any, ticket: Ticket) -> None:
    store = Store(node.data_dir)
    await join(node.host, ticket, store, key=node.key, clock=node.clock, limits=node.limits)


def events_of(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, Any]]:
    return [r.ww for r in caplog.records if r.getMessage() == event]  # type: ignore[attr-defined]


# --- joining --------------------------------------------------------------------------------------


async def test_a_node_joins_and_is_introduced_on_both_sides(
    cluster: Any, eventually: Any, document: bytes
) -> None:
    a = await cluster.founder()
    b = await cluster.join(await a.ticket(labels={"zone": "home"}))
    assert b.admission.store.join_document == document
    assert b.admission.cluster_id == a.admission.cluster_id
    assert b.admission.own.labels == {"zone": "home"}
    assert b.admission.own.rights == {"member"}
    assert not b.admission.certificate.can_invite
    assert Store(b.data_dir).join_document == document
    await b.connect(a)
    assert a.introductions.peers() == (b.peer_id,)
    assert b.introductions.peers() == (a.peer_id,)
    assert await a.may(b)
    assert await b.may(a)
    assert a.admission.chain(b.peer_id) == b.admission.own
    assert a.peer_events == [PeerUp(b.peer_id)]
    late: list[object] = []
    a.introductions.watch(late.append)
    assert late == [PeerUp(b.peer_id)]
    b.host.connection(a.peer_id).close()
    await eventually(lambda: a.peer_events == [PeerUp(b.peer_id), PeerDown(b.peer_id)])
    assert late == a.peer_events


async def test_nobody_opens_member_streams_before_the_other_admits_it(
    cluster: Any, eventually: Any
) -> None:
    """Each side opens a stream in the very callback that says that the other one is up."""
    a = await cluster.founder()
    b = await cluster.join(await a.ticket())
    results: list[asyncio.Task[bool]] = []
    for one, other in ((a, b), (b, a)):

        def on(event: object, one: Any = one, other: Any = other) -> None:
            if isinstance(event, PeerUp):
                results.append(asyncio.get_running_loop().create_task(one.may(other)))

        one.introductions.watch(on)
    await b.connect(a)
    await eventually(lambda: len(results) == 2)
    assert await asyncio.gather(*results) == [True, True]


async def test_a_ticket_works_once_even_when_two_redeem_it_at_the_same_time(cluster: Any) -> None:
    a = await cluster.founder()
    ticket = await a.ticket()
    tries = await asyncio.gather(*(cluster.join(ticket) for _ in range(4)), return_exceptions=True)
    refused = [each for each in tries if isinstance(each, AdmissionRefused)]
    assert len(refused) == 3, tries
    assert {exc.code for exc in refused} == {"admission.ticket_spent"}
    (info,) = a.issuer.tickets()
    assert info.uses_left == 0
    assert len(info.spent) == 1


async def test_the_same_node_repeats_after_a_lost_reply(cluster: Any) -> None:
    a = await cluster.founder()
    ticket, key = await a.ticket(), Key.generate()
    first = await a.issuer.redeem(key.peer_id, ticket.secret)  # the reply is lost
    b = await cluster.join(ticket, key=key)
    assert b.admission.own.peer == first.peer == key.peer_id
    await b.connect(a)
    with pytest.raises(AdmissionRefused) as exc:
        await cluster.join(ticket)
    assert code(exc) == "admission.ticket_spent"


async def test_spent_survives_a_restart_of_the_issuer(cluster: Any) -> None:
    a = await cluster.founder()
    ticket = await a.ticket()
    b = await cluster.join(ticket)
    a = await cluster.restart(a)
    moved = Ticket(ticket.founding, ticket.issuer, (a.addr,), ticket.secret, ticket.not_after_ms)
    with pytest.raises(AdmissionRefused) as exc:
        await cluster.join(moved)
    assert code(exc) == "admission.ticket_spent"
    assert exc.value.hint
    again = await a.issuer.redeem(b.peer_id, ticket.secret)
    assert again.peer == b.peer_id


def restore(node: Any, backup: dict[str, bytes]) -> None:
    for name in ("tickets.json", "ledger.json"):
        (node.data_dir / name).unlink(missing_ok=True)
    for name, content in backup.items():
        (node.data_dir / name).write_bytes(content)


def backup_of(node: Any) -> dict[str, bytes]:
    found = (node.data_dir / name for name in ("tickets.json", "ledger.json"))
    return {path.name: path.read_bytes() for path in found if path.exists()}


async def test_a_ticket_that_was_spent_since_the_backup_is_spent_once_its_holder_is_seen(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thief of the ticket is there first, and waits until the members have shown themselves."""
    monkeypatch.setattr("wetware.overlay.admission.issuing.HEARD_S", 0.5)
    a = await cluster.founder()
    tickets = [await a.ticket(), await a.ticket(uses=2)]
    backup = backup_of(a)
    holders = [await cluster.join(ticket) for ticket in tickets]
    await a.stop()
    restore(a, backup)
    a = await cluster.restart(a)
    assert [len(ticket.spent) for ticket in a.issuer.tickets()] == [0, 0]
    thief = asyncio.create_task(a.issuer.redeem(Key.generate().peer_id, tickets[0].secret))
    await asyncio.sleep(0)
    for holder in holders:
        await holder.connect(a)
    with pytest.raises(AdmissionRefused) as exc:
        await thief
    assert code(exc) == "admission.ticket_spent"
    assert [ticket.uses_left for ticket in a.issuer.tickets()] == [0, 1]
    assert [ticket.spent for ticket in a.issuer.tickets()] == [(h.peer_id,) for h in holders]
    assert [event for event, _ in a.records].count("ticket.was_spent") == 2
    await a.issuer.redeem(Key.generate().peer_id, tickets[1].secret)
    a = await cluster.restart(a)  # it is on disk
    assert [ticket.uses_left for ticket in a.issuer.tickets()] == [0, 0]


async def test_a_renewed_certificate_still_says_which_ticket_is_spent(cluster: Any) -> None:
    a = await cluster.founder()
    ticket = await a.ticket()
    backup = backup_of(a)
    b = await cluster.join(ticket)
    renewed = await a.issuer.renew(b.peer_id, b.admission.own.encoded)
    await a.stop()
    restore(a, backup)
    a = await cluster.restart(a)
    a.admission.judge.verify(renewed.encoded)  # as gossip does with the record of a member
    (info,) = a.issuer.tickets()
    assert info.spent == (b.peer_id,)


async def test_a_certificate_that_another_inviter_renewed_says_so_as_well(cluster: Any) -> None:
    a = await cluster.founder()
    inviter = await cluster.join(await a.ticket(rights=("invite",)))
    ticket = await a.ticket()
    backup = backup_of(a)
    b = await cluster.join(ticket)
    await b.connect(inviter)
    renewed = await inviter.issuer.renew(b.peer_id, b.admission.own.encoded)
    await a.stop()
    restore(a, backup)
    a = await cluster.restart(a)
    a.admission.judge.verify(renewed.encoded)
    assert a.issuer.tickets()[-1].spent == (b.peer_id,)


async def test_an_inviter_cannot_use_up_or_end_another_s_ticket(cluster: Any) -> None:
    from wetware.overlay.admission.statements import Tombstone

    a = await cluster.founder()
    evil = await cluster.join(await a.ticket(rights=("invite",)))
    ticket = await a.ticket(uses=3)
    b = await cluster.join(ticket)
    name = b.admission.own.leaf.ticket  # every member sees it
    invented = Key.generate().peer_id
    member = frozenset({"member"})
    leaf = evil.admission.certificate.mint(invented, member, {}, foreign=False, ticket=name)
    a.admission.judge.verify(leaf.encoded)
    assert a.issuer.tickets()[-1].spent == (b.peer_id,)
    now_ms = int(cluster.clock.now * 1000)
    how: dict[str, Any] = {
        "cluster": a.admission.cluster_id,
        "chain": evil.admission.own,
        "reason": "",
        "at_ms": now_ms,
        "not_after_ms": now_ms + 1000_000,
    }
    made_up = Tombstone(peer=invented, ticket=name, **how).signed(evil.key)
    assert a.admission.adopt(made_up.encoded)
    assert not a.issuer.tickets()[-1].revoked
    await cluster.join(ticket)
    real = Tombstone(peer=b.peer_id, **how).signed(evil.key)
    assert a.admission.adopt(real.encoded)
    assert a.issuer.tickets()[-1].revoked, "it let in who is evicted"


async def test_who_was_evicted_since_the_backup_cannot_give_its_ticket_to_another_key(
    cluster: Any,
) -> None:
    a = await cluster.founder()
    ticket = await a.ticket()
    backup = backup_of(a)
    b = await cluster.join(ticket)
    await b.connect(a)
    tombstone = await a.issuer.evict(b.peer_id, "stolen")
    await a.stop()
    restore(a, backup)
    (a.data_dir / "tombstones.json").unlink()
    a = await cluster.restart(a)
    assert not a.issuer.tickets()[0].revoked
    a.admission.adopt(tombstone.encoded)  # as another member tells it
    with pytest.raises(AdmissionRefused) as exc:
        await a.issuer.redeem(Key.generate().peer_id, ticket.secret)
    assert code(exc) == "admission.ticket_revoked"


async def test_a_new_ticket_and_one_that_was_given_to_the_same_node_need_no_wait(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wetware.overlay.admission.issuing.HEARD_S", 3600.0)
    a = await cluster.founder()
    old = await a.ticket()
    b = await cluster.join(old)
    a = await cluster.restart(a)
    async with asyncio.timeout(60):
        await a.issuer.redeem(b.peer_id, old.secret)
        await cluster.join(await a.ticket())


async def test_every_bad_ticket_has_its_own_code(cluster: Any) -> None:
    a = await cluster.founder()
    good = await a.ticket(expires_s=60)
    wrong = Ticket(good.founding, good.issuer, good.addrs, b"w" * 32, good.not_after_ms)
    revoked = await a.ticket()
    await a.issuer.revoke_ticket(a.issuer.tickets()[-1].id)
    spent = await a.ticket()
    await cluster.join(spent)
    cases = {"ticket_unknown": wrong, "ticket_revoked": revoked, "ticket_spent": spent}
    for why, ticket in cases.items():
        with pytest.raises(AdmissionRefused) as exc:
            await cluster.join(ticket)
        assert code(exc) == f"admission.{why}"
    cluster.clock.now += 61
    with pytest.raises(AdmissionRefused) as exc:
        await cluster.join(good)
    assert code(exc) == "admission.ticket_expired"
    assert not (cluster.nodes[-1].data_dir / "cluster.json").exists()


async def test_a_ticket_for_several_nodes(cluster: Any) -> None:
    a = await cluster.founder()
    ticket = await a.ticket(uses=2)
    await cluster.join(ticket)
    await cluster.join(ticket)
    with pytest.raises(AdmissionRefused):
        await cluster.join(ticket)


async def test_another_node_than_the_issuer_redeems_nothing(cluster: Any) -> None:
    a = await cluster.founder()
    b = await cluster.join(await a.ticket())
    ticket = await a.ticket()
    with pytest.raises(AdmissionRefused) as exc:
        await b.issuer.redeem(Key.generate().peer_id, ticket.secret)
    assert code(exc) == "admission.ticket_unknown"


async def test_a_full_disk_while_a_ticket_is_spent_hands_out_nothing(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = await cluster.founder()
    ticket = await a.ticket()
    before = (a.data_dir / "tickets.json").read_bytes()

    def full(source: str, target: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(AdmissionRefused) as exc:
            await a.issuer.redeem(Key.generate().peer_id, ticket.secret)
    assert code(exc) == "admission.not_saved"
    assert "No space left" in exc.value.message
    assert (a.data_dir / "tickets.json").read_bytes() == before
    assert list(a.data_dir.glob(".tickets*")) == [], "no temporary file is left"
    assert a.issuer.tickets()[0].uses_left == 1
    b = await cluster.join(ticket)  # as good as before
    assert a.issuer.tickets()[0].spent == (b.peer_id,)


async def test_a_redeemer_that_goes_away_while_the_disk_works_does_not_free_the_ticket(
    cluster: Any,
) -> None:
    a = await cluster.founder()
    ticket, key = await a.ticket(), Key.generate()
    task = asyncio.create_task(a.issuer.redeem(key.peer_id, ticket.secret))
    for _ in range(3):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    if a.issuer.tickets()[0].spent:
        with pytest.raises(AdmissionRefused):
            await a.issuer.redeem(Key.generate().peer_id, ticket.secret)
    assert (await a.issuer.redeem(key.peer_id, ticket.secret)).peer == key.peer_id


async def test_a_bundle_for_a_node_that_was_known_beforehand(cluster: Any, document: bytes) -> None:
    a = await cluster.founder()
    key = Key.generate()
    bundle = await a.issuer.certify(key.peer_id, labels={"x": "1"}, addrs=[a.addr])
    bundle = Bundle.parse(bundle.text)
    b = await cluster.join(bundle, key=key)
    assert b.admission.store.join_document == document
    assert b.admission.own == bundle.chain
    await b.connect(a)
    with pytest.raises(AdmissionRefused) as exc:
        await cluster.join(bundle)
    assert code(exc) == "admission.wrong_peer"


async def test_a_node_does_not_change_its_cluster(cluster: Any) -> None:
    a, other = await cluster.founder(), await cluster.founder()
    b = await cluster.join(await a.ticket())
    ticket = await other.ticket()
    with pytest.raises(ConfigError, match="belongs to the cluster"):
        await rejoin(b, ticket)
    assert other.issuer.tickets()[0].uses_left == 1


async def test_joining_goes_on_where_it_was_interrupted(cluster: Any) -> None:
    """A crash between the files: the founding comes last, and the same ticket mends it."""
    a = await cluster.founder()
    ticket = await a.ticket()
    b = await cluster.join(ticket)
    await b.stop()
    (b.data_dir / "cluster.json").unlink()
    with pytest.raises(ConfigError, match="is gone"):
        Store(b.data_dir).found("local", b"operator")
    b = await cluster.join(ticket, key=b.key, data_dir=b.data_dir)
    await b.connect(a)


async def test_an_issuer_that_lies_is_not_believed(cluster: Any) -> None:
    """It sends the certificate of another cluster, of another peer, or junk."""
    a, evil = await cluster.founder(), await cluster.founder()
    key = Key.generate()
    theirs = await a.ticket()
    answers: list[dict[str, Any]] = []

    async def serve(stream: Stream) -> None:
        await read_frame(stream, bytes_max=8192)
        await write_frame(stream, answers[-1])

    host = await cluster.stranger()
    host.handle("/wetware/join/1.0.0", serve, access=Access.PUBLIC)
    (addr,) = await host.listen([a.addr.__class__("ip4", "127.0.0.1", 0)])
    ticket = Ticket(theirs.founding, host.peer_id, (addr,), theirs.secret, theirs.not_after_ms)
    other = await evil.issuer.redeem(key.peer_id, (await evil.ticket()).secret)
    mine = await a.issuer.redeem(Key.generate().peer_id, theirs.secret)
    good = {"founding": a.admission.founding.plain(), "document": b"", "addrs": []}
    for answer, why in (
        ({**good, "chain": other.encoded}, "admission.cluster"),
        ({**good, "chain": mine.encoded}, "admission.wrong_peer"),
        ({**good, "chain": b"junk"}, "admission.malformed"),
        ({**good, "chain": mine.encoded, "document": "text"}, "overlay"),
        ({"founding": 1}, "overlay"),
        ({"code": "config.x", "message": "a\nb"}, "admission"),
    ):
        answers.append(answer)
        node = cluster.member(key)
        await node.open_host()
        with pytest.raises(WetwareError) as exc:
            await rejoin(node, ticket)
        assert exc.value.code == why
        assert "\n" not in exc.value.message
        assert list(node.data_dir.iterdir()) == []


# --- what peers show each other -------------------------------------------------------------------


async def test_a_stolen_certificate_is_worthless_without_its_key(
    cluster: Any, caplog: pytest.LogCaptureFixture
) -> None:
    a = await cluster.founder()
    b = await cluster.join(await a.ticket())
    thief = cluster.member()
    await thief.open_host()
    connection = await thief.host.dial([a.addr])
    stream = await connection.open_stream(CERTIFICATE_PROTOCOL)
    await write_frame(stream, {"v": 1, "chain": b.admission.own.encoded})
    answer = await read_frame(stream, bytes_max=8192)
    assert answer["code"] == "admission.wrong_peer"
    assert "chain" not in answer
    assert not a.admission.is_member(thief.peer_id)
    with pytest.raises(AdmissionRefused) as exc:
        await a.issuer.renew(thief.peer_id, b.admission.own.encoded)
    assert code(exc) == "admission.wrong_peer"
    with pytest.raises(ProtocolRefused):
        await thief.may(a)
    (logged,) = events_of(caplog, "admission.refused")
    assert logged["code"] == "admission.wrong_peer"


@pytest.mark.parametrize("protocol", ["/member/1", "/wetware/membership/1.0.0"])
async def test_a_stranger_hears_na_on_member_protocols_and_it_is_logged(
    cluster: Any, caplog: pytest.LogCaptureFixture, protocol: str
) -> None:
    a = await cluster.founder()
    if protocol not in a.host.protocols:
        a.host.handle(protocol, a._echo, access=Access.MEMBER)
    stranger = await cluster.stranger()
    connection = await stranger.dial([a.addr])
    for _ in range(3):
        with pytest.raises(ProtocolRefused):
            await connection.open_stream(protocol)
    (logged,) = events_of(caplog, "protocol.refused")
    assert (logged["peer"], logged["protocol"]) == (stranger.peer_id, protocol)


async def test_the_node_that_is_dialled_is_checked_too(cluster: Any) -> None:
    """A stranger that answers the introduction with somebody's certificate is no member."""
    a = await cluster.founder()
    b = await cluster.join(await a.ticket())

    async def serve(stream: Stream) -> None:
        message = await read_frame(stream, bytes_max=8192)
        await write_frame(stream, {"v": 1, "chain": message["chain"]})
        answers.append(await read_frame(stream, bytes_max=8192))

    answers: list[dict[str, Any]] = []
    host = await cluster.stranger()
    host.handle(CERTIFICATE_PROTOCOL, serve, access=Access.PUBLIC)
    (addr,) = await host.listen([type(a.addr)("ip4", "127.0.0.1", 0)])
    connection = await b.host.dial([addr])
    with pytest.raises(AdmissionRefused) as exc:
        await b.introductions.introduced(connection)
    assert code(exc) == "admission.wrong_peer"
    assert host.peer_id not in b.introductions.peers()


async def test_a_peer_that_is_none_of_ours(cluster: Any) -> None:
    a = await cluster.founder()
    host = await cluster.stranger()
    (addr,) = await host.listen([type(a.addr)("ip4", "127.0.0.1", 0)])
    connection = await a.host.dial([addr])
    with pytest.raises(AdmissionRefused) as exc:
        await a.introductions.introduced(connection)
    assert code(exc) == "admission.not_ours"


async def test_members_of_another_cluster_are_refused(cluster: Any) -> None:
    a, other = await cluster.founder(), await cluster.founder()
    connection = await other.host.dial([a.addr])
    with pytest.raises(AdmissionRefused) as exc:
        await other.introductions.introduced(connection)
    assert code(exc) == "admission.cluster"
    assert not a.admission.is_member(other.peer_id)


async def test_clocks_that_differ(cluster: Any) -> None:
    """Within the tolerance all is well; beyond it the refusal says what to check."""
    from .conftest import FakeClock

    a = await cluster.founder()
    near = FakeClock(cluster.clock.now - 50)
    b = await cluster.join(await a.ticket(), clock=near)
    await b.connect(a)
    far = FakeClock(cluster.clock.now - 120)
    with pytest.raises(AdmissionRefused) as exc:
        await cluster.join(await a.ticket(), clock=far)
    assert code(exc) == "admission.not_yet"
    assert "clock" in exc.value.hint


# --- rights ---------------------------------------------------------------------------------------


async def test_an_inviter_invites_members_and_nothing_else(cluster: Any) -> None:
    a = await cluster.founder()
    b = await cluster.join(await a.ticket(rights=("invite",)))
    assert b.admission.certificate.can_invite
    assert not b.admission.store.cluster_key
    with pytest.raises(AdmissionRefused) as exc:
        await b.ticket(rights=("invite",))
    assert code(exc) == "admission.not_allowed"
    with pytest.raises(AdmissionRefused):
        await b.issuer.certify(Key.generate().peer_id, rights=("invite",))
    c = await cluster.join(await b.ticket())
    assert [each.peer for each in c.admission.own.certificates] == [c.peer_id, b.peer_id]
    await c.connect(a)
    with pytest.raises(AdmissionRefused) as exc:
        await c.ticket()
    assert code(exc) == "admission.not_allowed"
    with pytest.raises(AdmissionRefused):
        await c.issuer.evict(b.peer_id)
    with pytest.raises(InvalidArgument):
        await a.ticket(rights=("fly",))


# --- eviction -------------------------------------------------------------------------------------


async def test_an_evicted_node_cannot_come_back(cluster: Any, eventually: Any) -> None:
    a = await cluster.founder()
    b = await cluster.join(await a.ticket())
    ticket = await a.ticket(uses=3)
    c = await cluster.join(ticket)
    await b.connect(a)
    connection = await c.connect(a)
    tombstone = await a.issuer.evict(c.peer_id, "lost laptop")
    await eventually(lambda: connection.closed)
    assert a.introductions.peers() == (b.peer_id,)
    assert Removed(c.peer_id, "evicted") in a.events
    assert a.peer_events[-1] == PeerDown(c.peer_id)
    assert [e for e, f in a.records if f.get("peer") == c.peer_id][-2:] == [
        "node.evicted",
        "node.removed",
    ]
    # with its certificate
    again = await c.host.dial([a.addr])
    with pytest.raises(AdmissionRefused) as exc:
        await c.introductions.introduced(again)
    assert code(exc) == "admission.evicted"
    assert "lost laptop" in exc.value.message
    with pytest.raises(ProtocolRefused):
        await c.may(a)
    # with its key and a ticket, its own or a new one
    fresh = await a.ticket()
    for each in (ticket, fresh):
        with pytest.raises(AdmissionRefused) as exc:
            await a.issuer.redeem(c.peer_id, each.secret)
        assert code(exc) in ("admission.evicted", "admission.ticket_revoked")
    assert a.issuer.tickets()[-1].uses_left == 1
    # by giving the ticket that let it in to another key
    with pytest.raises(AdmissionRefused) as exc:
        await a.issuer.redeem(Key.generate().peer_id, ticket.secret)
    assert code(exc) == "admission.ticket_revoked"
    # by renewal, or by asking for a certificate
    with pytest.raises(AdmissionRefused) as exc:
        await a.issuer.renew(c.peer_id, c.admission.own.encoded)
    assert code(exc) == "admission.evicted"
    with pytest.raises(AdmissionRefused):
        await a.issuer.certify(c.peer_id)
    # at another node, once that knows
    assert b.admission.adopt(tombstone.encoded)
    with pytest.raises(AdmissionRefused):
        await b.admission.members.admit(c.peer_id, c.admission.own.encoded)
    # after a restart of either
    a = await cluster.restart(a)
    with pytest.raises(AdmissionRefused) as exc:
        await a.admission.members.admit(c.peer_id, c.admission.own.encoded)
    assert code(exc) == "admission.evicted"
    b = await cluster.restart(b)
    with pytest.raises(AdmissionRefused):
        await b.admission.members.admit(c.peer_id, c.admission.own.encoded)
    # the tombstone outlives all that it had
    assert tombstone.not_after_ms / 1000 > c.admission.own.not_after_ms / 1000 + 30 * DAY_S
    cluster.clock.now = tombstone.not_after_ms / 1000 + 61
    await eventually(lambda: not a.admission.facts.encoded and not b.admission.facts.encoded)
    for node in (a, b):
        with pytest.raises(AdmissionRefused) as exc:
            await node.admission.members.admit(c.peer_id, c.admission.own.encoded)
        assert code(exc) == "admission.expired"


async def test_an_eviction_that_cannot_be_written_is_in_force(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = await cluster.founder()
    b = await cluster.join(await a.ticket())
    await b.connect(a)

    def full(source: str, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(AdmissionRefused) as exc:
        await a.issuer.evict(b.peer_id)
    assert code(exc) == "admission.not_saved"
    assert "in force" in exc.value.message
    assert not a.admission.is_member(b.peer_id)
    monkeypatch.undo()
    await a.issuer.evict(b.peer_id)
    assert len(Store(a.data_dir).facts.tombstones) == 1


async def test_an_evicted_node_learns_it_with_a_refusal(cluster: Any) -> None:
    """Nobody else tells it; and it takes over its own tombstone, nothing else that a peer sends."""
    a = await cluster.founder()
    inviter = await cluster.join(await a.ticket(rights=("invite",)))
    b, c = [await cluster.join(await a.ticket()) for _ in range(2)]
    others = (await a.issuer.evict(b.peer_id, "another one")).encoded
    for junk in (b"", b"junk", others, others[:-1]):
        c.admission.learn_own_end(junk)
    assert not c.admission.facts.encoded
    # By an inviter: it is kept out, until the cluster's key evicts that one.
    by_inviter = await inviter.issuer.evict(c.peer_id, "a grudge")
    c.admission.learn_own_end(by_inviter.encoded)
    ended = c.admission.own_ended()
    assert ended is not None
    assert "a grudge" in ended.message
    c.admission.judge_own()
    # By the cluster's key: for good.
    await a.issuer.evict(c.peer_id, "lost laptop")
    waiting = asyncio.ensure_future(c.admission.wait_evicted())
    await asyncio.sleep(0)
    assert not waiting.done()
    with pytest.raises(AdmissionRefused):
        await c.introductions.introduced(await c.host.dial([a.addr]))
    with pytest.raises(AdmissionRefused, match="lost laptop"):
        await waiting
    c = await cluster.restart(c)
    with pytest.raises(AdmissionRefused, match="lost laptop"):
        c.admission.judge_own()


async def test_certificates_of_an_evicted_inviter_are_void_and_renewed_at_the_founder(
    cluster: Any, eventually: Any
) -> None:
    a = await cluster.founder()
    b = await cluster.join(await a.ticket(rights=("invite",)))
    c = await cluster.join(await b.ticket())
    connection = await c.connect(a)
    never_seen = await b.issuer.redeem(Key.generate().peer_id, (await b.ticket()).secret)
    tombstone = await a.issuer.evict(b.peer_id)
    await eventually(lambda: connection.closed)
    assert Removed(c.peer_id, "void") in a.events
    with pytest.raises(AdmissionRefused) as exc:
        a.admission.judge.verify(never_seen.encoded)
    assert code(exc) == "admission.void"
    with pytest.raises(AdmissionRefused) as exc:  # it was never known as a member
        await a.issuer.renew(never_seen.peer, never_seen.encoded)
    assert code(exc) == "admission.not_known"
    old = c.admission.own
    again = await c.host.dial([a.addr])  # refused, so it renews right there and tries once more
    await c.introductions.introduced(again)
    assert c.admission.own != old
    assert c.admission.own.inviter is None
    await eventually(lambda: c.peer_id in a.introductions.peers())
    await eventually(lambda: a.peer_id in c.introductions.peers())
    assert await c.may(a)
    assert again.accepts_streams
    assert c.admission.adopt(tombstone.encoded)
    assert not b.admission.adopt(tombstone.encoded) or not b.admission.certificate.can_invite


@pytest.mark.parametrize("resets", [1, 3])
async def test_an_evicted_inviter_that_signs_on_is_not_asked(
    cluster: Any, eventually: Any, resets: int
) -> None:
    """It is up, it has not heard of its eviction, and the founder's connections end at first."""
    a = await cluster.founder()
    b = await cluster.join(await a.ticket(rights=("invite",)))
    c = await cluster.join(await b.ticket())
    connection = await c.connect(a)
    await c.connect(b)
    renew_at, asked = c.introductions._renew_at, []

    async def unlucky(peer: PeerId, own: Chain) -> bytes:
        asked.append(peer)
        if len(asked) <= resets:
            raise StreamReset("the peer reset the stream")
        return await renew_at(peer, own)

    c.introductions._renew_at = unlucky
    await a.issuer.evict(b.peer_id)
    await eventually(lambda: connection.closed)
    again = await c.host.dial([a.addr])
    await c.introductions.introduced(again)
    assert c.admission.own.inviter is None
    assert set(asked) == {a.peer_id}
    assert len(asked) == resets + 1


async def test_what_an_inviter_can_evict(cluster: Any) -> None:
    a = await cluster.founder()
    b = await cluster.join(await a.ticket(rights=("invite",)))
    other = await cluster.join(await a.ticket(rights=("invite",)))
    plain = await cluster.join(await a.ticket())
    await other.connect(b)
    await plain.connect(b)
    await plain.connect(a)
    with pytest.raises(AdmissionRefused) as exc:
        await b.issuer.evict(other.peer_id)
    assert code(exc) == "admission.not_allowed"
    # It does so all the same, with a node that has been tampered with: nobody heeds it.
    b.admission.members._members.pop(other.peer_id)
    b.admission.store.ledger.pop(other.peer_id, None)
    forged = await b.issuer.evict(other.peer_id)
    await other.connect(a)
    a.admission.adopt(forged.encoded)
    assert a.admission.is_member(other.peer_id)
    assert other.peer_id in a.introductions.peers()
    assert (await a.admission.members.admit(other.peer_id, other.admission.own.encoded)).rights == {
        "member",
        "invite",
    }
    assert (await a.issuer.renew(other.peer_id, other.admission.own.encoded)).peer
    # A plain member is another matter, until the inviter is evicted itself.
    real = await b.issuer.evict(plain.peer_id)
    assert a.admission.adopt(real.encoded)
    assert not a.admission.is_member(plain.peer_id)
    await a.issuer.evict(b.peer_id)
    await a.admission.members.admit(plain.peer_id, plain.admission.own.encoded)
    assert a.admission.is_member(plain.peer_id)


async def test_a_plain_member_cannot_make_a_tombstone(cluster: Any) -> None:
    from wetware.overlay.admission.statements import Tombstone

    a = await cluster.founder()
    b = await cluster.join(await a.ticket())
    now_ms = int(cluster.clock.now * 1000)
    how: dict[str, Any] = {
        "cluster": a.admission.cluster_id,
        "peer": a.peer_id,
        "reason": "",
        "at_ms": now_ms,
        "not_after_ms": now_ms + 1000,
    }
    for chain, why in (
        (None, "issuer"),
        (b.admission.own, "not_allowed"),
        (a.admission.own, "not_allowed"),
    ):
        forged = Tombstone(chain=chain, **how).signed(b.key)
        with pytest.raises(AdmissionRefused) as exc:
            a.admission.adopt(forged.encoded)
        assert code(exc) == f"admission.{why}"
    assert a.admission.facts.encoded == {}


async def test_tombstones_are_idempotent_and_bounded(cluster: Any) -> None:
    a = await cluster.founder(tombstones_per_inviter_max=3, tombstones_max=4)
    b = await cluster.join(await a.ticket(rights=("invite",)))
    heard: list[bytes] = []
    a.admission.new_facts.add(heard.append)
    made = [await b.issuer.evict(Key.generate().peer_id) for _ in range(4)]
    assert [a.admission.adopt(t.encoded) for t in made[:3]] == [True] * 3
    assert [a.admission.adopt(t.encoded) for t in made[:3]] == [False] * 3
    with pytest.raises(AdmissionRefused) as exc:
        a.admission.adopt(made[3].encoded)
    assert code(exc) == "admission.full"
    for _ in range(4):
        await a.issuer.evict(Key.generate().peer_id)  # room of its own
    with pytest.raises(AdmissionRefused):
        await a.issuer.evict(Key.generate().peer_id)
    assert len(a.admission.facts.encoded) == len(heard) == 7
    twice = await a.issuer.evict(list(a.admission.facts.tombstones)[-1])
    assert twice.encoded in a.admission.facts.encoded.values()


async def test_of_two_tombstones_every_node_keeps_the_same(cluster: Any) -> None:
    a = await cluster.founder()
    twin = cluster.member(a.key)  # another process with the same key and files
    for name in ("cluster.json", "cluster.key"):
        (twin.data_dir / name).write_bytes((a.data_dir / name).read_bytes())
        (twin.data_dir / name).chmod(0o600)
    await twin.open_host()
    await twin.start(Store(twin.data_dir))
    victim = Key.generate().peer_id
    one = await a.issuer.evict(victim, "first")
    cluster.clock.now += 10
    two = await twin.issuer.evict(victim, "second")
    assert not twin.admission.adopt(one.encoded)
    assert a.admission.adopt(two.encoded)
    assert a.admission.facts.encoded == twin.admission.facts.encoded
    assert list(a.admission.facts.encoded.values()) == [two.encoded]


# --- foreign peers --------------------------------------------------------------------------------


async def test_a_foreign_peer_with_a_fact_is_a_member(cluster: Any, eventually: Any) -> None:
    a = await cluster.founder()
    b = await cluster.join(await a.ticket())
    heard: list[bytes] = []
    a.admission.new_facts.add(heard.append)
    stock = await cluster.stranger()  # speaks none of our protocols
    (addr,) = await stock.listen([type(a.addr)("ip4", "127.0.0.1", 0)])
    inbound = await stock.dial([a.addr])  # there before anybody certifies it
    await a.issuer.certify(stock.peer_id, labels={"kind": "helia"}, foreign=True)
    await eventually(lambda: stock.peer_id in a.introductions.peers())
    assert a.admission.members.is_foreign(stock.peer_id)
    assert a.admission.chain(stock.peer_id).labels == {"kind": "helia"}
    async with await inbound.open_stream("/member/1") as stream:
        await stream.write(b"x")
        assert await stream.read_exactly(1) == b"x"
    (fact,) = heard
    assert b.admission.adopt(fact)
    assert not b.admission.adopt(fact)
    await eventually(lambda: b.admission.is_member(stock.peer_id))
    await b.host.dial([addr])
    await eventually(lambda: stock.peer_id in b.introductions.peers())
    b = await cluster.restart(b)
    assert b.admission.is_member(stock.peer_id), "durable, and checked before ready"
    connection = a.host.connection(stock.peer_id)
    await a.issuer.evict(stock.peer_id)
    await eventually(lambda: connection.closed)
    assert fact not in a.admission.facts.encoded.values()
    with pytest.raises(AdmissionRefused):
        a.admission.adopt(fact)


async def test_who_has_something_here_as_a_node(cluster: Any, eventually: Any) -> None:
    """A member, on a connection on which both showed their certificates, until its own ends."""
    a = await cluster.founder(exchange_s=0.5)
    b = await cluster.join(await a.ticket(), clock=copy(cluster.clock))
    others: dict[str, Any] = {"no member": await cluster.stranger()}
    others["a foreign libp2p peer"] = stock = await cluster.stranger()
    await a.issuer.certify(stock.peer_id, foreign=True)
    gone = await cluster.join(await a.ticket())
    await a.issuer.evict(gone.peer_id, "lost laptop")
    near = await b.connect(a)
    far = a.host.connection(b.peer_id)
    for why, node in (("was evicted.*lost laptop", gone), ("did not introduce itself", b)):
        others[why] = await node.stack.enter_async_context(LinkHost(node.key))  # shows nothing
    assert await a.introductions.peer_of(far) == b.peer_id
    assert await b.introductions.peer_of(near) == a.peer_id
    for why, host in others.items():
        before = set(a.host.connections())
        await host.dial([a.addr])
        await eventually(lambda before=before: set(a.host.connections()) - before)
        (connection,) = set(a.host.connections()) - before
        with pytest.raises(AdmissionRefused, match=why):
            await a.introductions.peer_of(connection)
    cluster.clock.now += 7 * DAY_S + 61  # b's own stands still: it does not renew
    with pytest.raises(AdmissionRefused, match="no member"):
        await a.introductions.peer_of(far)
    await eventually(lambda: PeerDown(b.peer_id) in a.peer_events)
    await eventually(lambda: far.closed)


async def test_a_node_is_no_foreign_member_of_itself(cluster: Any) -> None:
    a = await cluster.founder()
    b = await cluster.join(await a.ticket())
    heard: list[bytes] = []
    a.admission.new_facts.add(heard.append)
    await a.issuer.certify(b.host.peer_id, foreign=True)
    assert b.admission.adopt(heard[0])
    assert b.host.peer_id not in b.admission.members


async def test_a_foreign_certificate_is_renewed_by_its_issuer(
    cluster: Any, eventually: Any
) -> None:
    a = await cluster.founder()
    b = await cluster.join(await a.ticket())
    heard: list[bytes] = []
    a.admission.new_facts.add(heard.append)
    peer = Key.generate().peer_id
    first = await a.issuer.certify(peer, labels={"kind": "helia"}, foreign=True)
    assert b.admission.adopt(heard[0])
    await eventually(lambda: b.admission.is_member(peer))
    cluster.clock.now += 61 * DAY_S
    await eventually(lambda: len(heard) == 2)
    assert b.admission.adopt(heard[1])
    assert not b.admission.adopt(heard[0]), "superseded"
    assert a.admission.facts.encoded == b.admission.facts.encoded
    await eventually(lambda: b.admission.chain(peer) != first.chain)
    assert b.admission.chain(peer).labels == {"kind": "helia"}
    assert b.admission.members.is_foreign(peer)
    await asyncio.sleep(0.05)
    assert len(heard) == 2, "and not again and again"


async def test_foreign_facts_are_bounded_and_vetoed(cluster: Any, eventually: Any) -> None:
    a = await cluster.founder(foreign_max=2)
    refused = Key.generate().peer_id
    a.veto.refused.add(refused)
    with pytest.raises(AdmissionRefused) as exc:
        await a.issuer.certify(refused, foreign=True)
    assert code(exc) == "admission.vetoed"
    for _ in range(2):
        await a.issuer.certify(Key.generate().peer_id, foreign=True)
    with pytest.raises(AdmissionRefused) as exc:
        await a.issuer.certify(Key.generate().peer_id, foreign=True)
    assert code(exc) == "admission.full"
    with pytest.raises(InvalidArgument):
        await a.issuer.certify(Key.generate().peer_id, foreign=True, rights=("invite",))
    node = await a.issuer.certify(Key.generate().peer_id)
    from wetware.overlay.admission.statements import ForeignFact

    with pytest.raises(AdmissionRefused) as exc:  # a node's certificate is no fact
        a.admission.adopt(ForeignFact(node.chain).encoded)
    assert code(exc) == "admission.not_allowed"


# --- the backend's veto ---------------------------------------------------------------------------


async def test_a_veto_keeps_a_node_out(cluster: Any) -> None:
    a = await cluster.founder(veto_s=0.05)
    ticket, key = await a.ticket(), Key.generate()
    for how, why in (
        ({"refused": {key.peer_id}}, "vetoed"),
        ({"error": RuntimeError("down")}, "veto_unavailable"),
        ({"hang": True}, "veto_unavailable"),
    ):
        a.veto.__init__(**how)
        with pytest.raises(AdmissionRefused) as exc:
            await a.issuer.redeem(key.peer_id, ticket.secret)
        assert code(exc) == f"admission.{why}"
    assert a.issuer.tickets()[0].uses_left == 1
    a.veto.__init__()
    chain = await a.issuer.redeem(key.peer_id, ticket.secret)
    a.veto.refused.add(key.peer_id)
    for call in (a.admission.members.admit, a.issuer.renew):
        with pytest.raises(AdmissionRefused) as exc:
            await call(key.peer_id, chain.encoded)
        assert code(exc) == "admission.vetoed"


async def test_a_later_veto_removes_a_member(cluster: Any, eventually: Any) -> None:
    a = await cluster.founder()
    b = await cluster.join(await a.ticket())
    connection = await b.connect(a)
    a.veto.refused.add(b.peer_id)
    await eventually(lambda: connection.closed)
    assert Removed(b.peer_id, "vetoed") in a.events
    assert a.introductions.peers() == ()


async def test_a_backend_that_fails_for_long_is_a_veto(cluster: Any, eventually: Any) -> None:
    a = await cluster.founder()
    b = await cluster.join(await a.ticket())
    await b.connect(a)
    asked = a.veto.asked
    a.veto.error = RuntimeError("down")
    await eventually(lambda: not a.admission.is_member(b.peer_id))
    assert a.veto.asked - asked >= a.limits.veto_failures_max
    assert a.events[-1] == Removed(b.peer_id, "vetoed")


async def test_an_eviction_during_the_veto_question_wins(cluster: Any, eventually: Any) -> None:
    a = await cluster.founder()
    ticket, key = await a.ticket(), Key.generate()
    gate = asyncio.Event()
    asked = asyncio.Event()

    async def slow(peer: object) -> bool:
        asked.set()
        await gate.wait()
        return True

    a.admission.members._veto = slow
    task = asyncio.create_task(a.issuer.redeem(key.peer_id, ticket.secret))
    await asked.wait()
    await a.issuer.evict(key.peer_id)
    gate.set()
    with pytest.raises(AdmissionRefused) as exc:
        await task
    assert code(exc) == "admission.evicted"
    assert a.issuer.tickets()[0].uses_left == 1


# --- ends and renewal -----------------------------------------------------------------------------


async def test_a_certificate_is_renewed_in_the_background(cluster: Any, eventually: Any) -> None:
    a = await cluster.founder()
    b = await cluster.join(await a.ticket(labels={"zone": "home"}))
    connection = await b.connect(a)
    first, file = b.admission.own, b.data_dir / "certificate"
    cluster.clock.now += 2 * DAY_S  # less than a third of seven days
    await asyncio.sleep(0.05)
    assert b.admission.own is first
    cluster.clock.now += 1 * DAY_S
    await eventually(lambda: b.admission.own is not first)
    renewed = b.admission.own
    assert renewed.labels == {"zone": "home"}
    assert renewed.not_after_ms == int((cluster.clock.now + 7 * DAY_S) * 1000)
    assert file.read_bytes() == renewed.encoded
    # It is shown to those that are connected, who go on without a gap.
    await eventually(lambda: a.admission.chain(b.peer_id) == renewed)
    assert Admitted(b.peer_id, renewed) in a.events
    cluster.clock.now += 5 * DAY_S  # the first one would have ended
    assert a.admission.is_member(b.peer_id)
    assert not connection.closed
    assert a.peer_events == [PeerUp(b.peer_id)]


async def test_an_expired_certificate_ends_the_membership_and_is_renewed_within_the_grace(
    cluster: Any, eventually: Any
) -> None:
    a = await cluster.founder()
    b = await cluster.join(await a.ticket())
    await b.connect(a)
    await b.stop()
    cluster.clock.now += 7 * DAY_S + 59
    assert a.admission.is_member(b.peer_id), "within the tolerance for clocks"
    cluster.clock.now += 2
    assert not a.admission.is_member(b.peer_id)
    await eventually(lambda: Removed(b.peer_id, "expired") in a.events)
    with pytest.raises(AdmissionRefused) as exc:
        a.admission.judge.verify(b.admission.own.encoded)
    assert code(exc) == "admission.expired"
    cluster.clock.now += 29 * DAY_S
    old = b.admission.own
    b = await cluster.restart(b)
    # The address of the issuer is known from joining, so it needs nobody's help.
    await eventually(lambda: b.admission.own != old)
    await b.connect(a)


async def test_who_is_dialled_renews_too(cluster: Any, eventually: Any) -> None:
    """The issuer dials a member whose certificate has ended: it renews, and both are up."""
    a = await cluster.founder()
    b = await cluster.join(await a.ticket())
    await b.stop()
    cluster.clock.now += 10 * DAY_S
    await eventually(lambda: b.peer_id not in a.introductions.peers())
    store = Store(b.data_dir)
    store.addrs = ()  # it does not know where the issuer is
    b = cluster.member(b.key, data_dir=b.data_dir)
    await b.open_host()
    await b.start(store)
    connection = await a.host.dial([b.addr])
    with contextlib.suppress(AdmissionRefused):
        await a.introductions.introduced(connection)
    await eventually(lambda: b.peer_id in a.introductions.peers())
    await eventually(lambda: a.peer_id in b.introductions.peers())


async def test_a_liar_makes_a_node_renew_only_now_and_then(cluster: Any) -> None:
    """Anybody can say that a certificate is void."""
    a = await cluster.founder()
    b = await cluster.join(await a.ticket())
    await b.connect(a)

    async def lie(stream: Stream) -> None:
        await read_frame(stream, bytes_max=8192)
        await write_frame(stream, {"code": "admission.void", "message": "", "hint": ""})

    for _ in range(4):
        host = await cluster.stranger()
        host.handle(CERTIFICATE_PROTOCOL, lie, access=Access.PUBLIC)
        (addr,) = await host.listen([type(a.addr)("ip4", "127.0.0.1", 0)])
        connection = await b.host.dial([addr])
        with pytest.raises(AdmissionRefused) as exc:
            await b.introductions.introduced(connection)
        assert code(exc) == "admission.void"
    assert [event for event, _ in a.records].count("certificate.renewed") == 1


async def test_beyond_the_grace_it_takes_a_new_ticket(
    cluster: Any, caplog: pytest.LogCaptureFixture, eventually: Any
) -> None:
    a = await cluster.founder()
    b = await cluster.join(await a.ticket())
    await b.stop()
    cluster.clock.now += (7 + 30) * DAY_S + 61
    with pytest.raises(AdmissionRefused) as exc:
        await a.issuer.renew(b.peer_id, b.admission.own.encoded)
    assert code(exc) == "admission.expired"
    assert "--join" in exc.value.hint
    b = await cluster.restart(b)
    await eventually(lambda: events_of(caplog, "certificate.not_renewed"))
    assert "--join" in str(events_of(caplog, "certificate.not_renewed")[-1]["next"])
    await b.stop()
    b = await cluster.join(await a.ticket(), key=b.key, data_dir=b.data_dir)
    await b.connect(a)


async def test_an_inviter_is_renewed_by_the_cluster_key_alone(cluster: Any) -> None:
    a = await cluster.founder()
    b = await cluster.join(await a.ticket(rights=("invite",)))
    other = await cluster.join(await a.ticket(rights=("invite",)))
    plain = await cluster.join(await a.ticket())
    await other.connect(b)
    await plain.connect(b)
    with pytest.raises(AdmissionRefused) as exc:
        await b.issuer.renew(other.peer_id, other.admission.own.encoded)
    assert code(exc) == "admission.not_allowed"
    renewed = await b.issuer.renew(plain.peer_id, plain.admission.own.encoded)
    assert renewed.inviter == b.admission.own.leaf
    assert (await a.issuer.renew(other.peer_id, other.admission.own.encoded)).rights == {
        "member",
        "invite",
    }
    with pytest.raises(AdmissionRefused) as exc:
        await plain.issuer.renew(other.peer_id, other.admission.own.encoded)
    assert code(exc) == "admission.not_issuer"


async def test_what_an_inviter_signs_ends_with_it(cluster: Any) -> None:
    a = await cluster.founder()
    b = await cluster.join(await a.ticket(rights=("invite",)), certificate_s=200 * DAY_S)
    c = await b.issuer.redeem(Key.generate().peer_id, (await b.ticket()).secret)
    assert c.not_after_ms == b.admission.own.not_after_ms
    a.admission.judge.verify(c.encoded)


async def test_the_founder_renews_its_own_certificate(cluster: Any, eventually: Any) -> None:
    a = await cluster.founder()
    first = a.admission.own
    assert first.rights == {"member", "invite", "found"}
    cluster.clock.now += 40 * DAY_S
    await eventually(lambda: a.admission.own is not first)
    assert (a.data_dir / "certificate").read_bytes() == a.admission.own.encoded
    cluster.clock.now += 400 * DAY_S  # switched off for more than a year
    a = await cluster.restart(a)
    a.admission.judge.check(a.admission.own)


async def test_nobody_else_is_certified_as_the_founder(cluster: Any) -> None:
    a = await cluster.founder()
    for grant in (
        a.ticket(rights=("found",)),
        a.issuer.certify(Key.generate().peer_id, rights=("found",)),
    ):
        with pytest.raises(InvalidArgument, match="'found' is no right that is granted"):
            await grant


async def test_a_founder_of_a_release_before_is_known_after_its_next_start(cluster: Any) -> None:
    a = await cluster.founder()
    own = a.admission.certificate.mint(a.peer_id, frozenset({"member", "invite"}), {})
    (a.data_dir / "certificate").write_bytes(own.encoded)
    a = await cluster.restart(a)
    assert "found" in a.admission.own.rights


async def test_the_ledger_survives_a_restart(cluster: Any, eventually: Any) -> None:
    a = await cluster.founder()
    b = await cluster.join(await a.ticket(labels={"zone": "home"}))
    a = await cluster.restart(a)
    assert (await a.issuer.renew(b.peer_id, b.admission.own.encoded)).labels == {"zone": "home"}


async def test_members_are_bounded_per_inviter(cluster: Any) -> None:
    a = await cluster.founder(members_max=4, members_per_inviter_max=2)
    b = await cluster.join(await a.ticket(rights=("invite",)))
    ticket = await b.ticket(uses=5)
    chains = [await b.issuer.redeem(Key.generate().peer_id, ticket.secret) for _ in range(3)]
    for chain in chains[:2]:
        await a.admission.members.admit(chain.peer, chain.encoded)
    with pytest.raises(AdmissionRefused) as exc:
        await a.admission.members.admit(chains[2].peer, chains[2].encoded)
    assert code(exc) == "admission.full"
    await b.connect(a)
    assert len(list(a.admission.members)) == 3
    await a.issuer.evict(b.peer_id)
    assert list(a.admission.members) == []


async def test_a_watcher_that_fails_disturbs_nobody(cluster: Any) -> None:
    a = await cluster.founder()

    def broken(event: object) -> None:
        raise RuntimeError("a plugin")

    a.admission.members.changes.add(broken)
    a.introductions.watch(broken)
    b = await cluster.join(await a.ticket())
    await b.connect(a)
    assert b.peer_id in a.introductions.peers()


async def test_nothing_secret_is_logged(cluster: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    a = await cluster.founder()
    ticket = await a.ticket()
    await cluster.join(ticket)
    text = " ".join(f"{r.getMessage()} {getattr(r, 'ww', '')}" for r in caplog.records)
    for secret in (ticket.secret.hex(), repr(ticket.secret), ticket.text, ticket.text[-40:]):
        assert secret not in text
    assert ticket.secret.hex() not in (a.data_dir / "tickets.json").read_text()
    assert "secret" not in repr(ticket)


async def test_a_ticket_whose_issuer_is_gone(cluster: Any) -> None:
    """The error names the addresses."""
    a = await cluster.founder()
    ticket = await a.ticket()
    await a.stop()
    with pytest.raises(OverlayError, match=r"127\.0\.0\.1"):
        await cluster.join(ticket)
