"""Who may speak what; what is verified, and how often."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wetware.base.access import Access
from wetware.errors import AdmissionRefused, ConfigError, InvalidArgument
from wetware.identity import Key, PeerId
from wetware.overlay.admission.decision import Admission
from wetware.overlay.admission.facts import Facts
from wetware.overlay.admission.limits import AdmissionLimits
from wetware.overlay.admission.statements import Certificate, Chain, Fact, Tombstone
from wetware.overlay.admission.store import Store

pytestmark = pytest.mark.anyio

MEMBER, STRANGER = Key.from_seed(b"m" * 32), Key.from_seed(b"s" * 32).peer_id
ME = Key.from_seed(b"n" * 32)
NOW_MS = 1_800_000_000_000


class Clock:
    now_ms = NOW_MS

    def time(self) -> float:
        return self.now_ms / 1000

    def monotonic(self) -> float:
        return self.now_ms / 1000


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def admission(tmp_path: Path, clock: Clock) -> Admission:
    store = Store(tmp_path)
    store.found("local", b"operator")
    return Admission(store, ME, clock=clock, open_protocols=["/open/1"])


def certificate(admission: Admission, key: Key | None = None, **how: Any) -> Certificate:
    signer = key or admission.store.cluster_key
    assert signer is not None
    fields: dict[str, Any] = {
        "cluster": admission.cluster_id,
        "peer": MEMBER.peer_id,
        "rights": frozenset({"member"}),
        "labels": {},
        "not_before_ms": NOW_MS,
        "not_after_ms": NOW_MS + 1_000_000,
        **how,
    }
    return Certificate(**fields).signed(signer)


def refused(admission: Admission, chain: Chain | bytes) -> str:
    with pytest.raises(AdmissionRefused) as exc:
        admission.judge.verify(chain if isinstance(chain, bytes) else chain.encoded)
    return exc.value.code.removeprefix("admission.")


@pytest.mark.parametrize(
    ("peer", "protocol", "access", "expected"),
    [
        (STRANGER, "/x/1", Access.PUBLIC, True),
        (MEMBER.peer_id, "/x/1", Access.PUBLIC, True),
        (MEMBER.peer_id, "/x/1", Access.MEMBER, True),
        (STRANGER, "/x/1", Access.MEMBER, False),
        (MEMBER.peer_id, "/x/1", Access.OPEN, False),
        (STRANGER, "/open/1", Access.OPEN, True),
    ],
)
async def test_the_whole_table(
    admission: Admission, peer: PeerId, protocol: str, access: Access, expected: bool
) -> None:
    await admission.members.admit(MEMBER.peer_id, Chain((certificate(admission),)).encoded)
    assert admission(peer, protocol, access) is expected


def test_nobody_is_a_member_by_default(admission: Admission) -> None:
    assert not admission.is_member(MEMBER.peer_id)
    assert admission.chain(ME.peer_id) == admission.own
    assert admission.chain(MEMBER.peer_id) is None


def test_refusals_are_logged(admission: Admission, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(100):  # a peer that keeps asking does not fill the log
        assert not admission(STRANGER, "/x/1", Access.MEMBER)
    admission(STRANGER, "/y/1", Access.MEMBER)
    assert [r.getMessage() for r in caplog.records] == ["protocol.refused"] * 2


@pytest.mark.parametrize(
    ("offset_ms", "why"),
    [
        (-60_001, "not_yet"),
        (-60_000, None),
        (0, None),
        (1_060_000, None),
        (1_060_001, "expired"),
    ],
)
def test_the_time_with_tolerance_at_both_ends(
    admission: Admission, clock: Clock, offset_ms: int, why: str | None
) -> None:
    chain = Chain((certificate(admission),))
    clock.now_ms = NOW_MS + offset_ms
    if why is None:
        assert admission.judge.verify(chain.encoded) == chain
    else:
        assert refused(admission, chain) == why


async def test_membership_ends_with_the_certificate(admission: Admission, clock: Clock) -> None:
    chain = Chain((certificate(admission),))
    await admission.members.admit(MEMBER.peer_id, chain.encoded)
    clock.now_ms = NOW_MS + 1_060_000
    assert admission.is_member(MEMBER.peer_id)
    clock.now_ms += 1
    assert not admission.is_member(MEMBER.peer_id)
    assert admission.chain(MEMBER.peer_id) is None


def test_who_may_certify_whom(admission: Admission) -> None:
    inviter, other = Key.generate(), Key.generate()
    both = frozenset({"member", "invite"})
    invite = certificate(admission, peer=inviter.peer_id, rights=both)
    plain = certificate(admission, peer=inviter.peer_id)
    leaf = certificate(admission, inviter)
    assert admission.judge.verify(Chain((leaf, invite)).encoded).inviter == invite
    cases = {
        "an inviter without the right": ((leaf, plain), "not_allowed"),
        "an inviter that grants invite": (
            (certificate(admission, inviter, rights=both), invite),
            "not_allowed",
        ),
        "a leaf that outlives its inviter": (
            (certificate(admission, inviter, not_after_ms=NOW_MS + 1_000_001), invite),
            "not_allowed",
        ),
        "another inviter's certificate": (
            (certificate(admission, other), invite),
            "issuer",
        ),
        "an inviter of an inviter": (
            (leaf, certificate(admission, other, peer=inviter.peer_id, rights=both)),
            "issuer",
        ),
        "signed by nobody that counts": ((certificate(admission, other),), "issuer"),
        "two certificates of the cluster key": ((plain, invite), "issuer"),
        "another cluster": ((certificate(admission, cluster="00" * 20),), "cluster"),
    }
    for name, (certificates, why) in cases.items():
        assert refused(admission, Chain(certificates)) == why, name


def test_the_inviters_end_counts(admission: Admission, clock: Clock) -> None:
    inviter = Key.generate()
    invite = certificate(
        admission,
        peer=inviter.peer_id,
        rights=frozenset({"member", "invite"}),
        not_before_ms=NOW_MS + 500_000,
    )
    chain = Chain((certificate(admission, inviter), invite))
    assert refused(admission, chain) == "not_yet"
    clock.now_ms += 500_000
    admission.judge.verify(chain.encoded)


def early_chains(admission: Admission, clock: Clock, count: int) -> tuple[PeerId, list[Chain]]:
    """An inviter, and what it signs for new keys: valid in a month only."""
    inviter, life_ms = Key.generate(), 60 * 86_400_000
    both, end_ms = frozenset({"member", "invite"}), clock.now_ms + life_ms
    invite = certificate(admission, peer=inviter.peer_id, rights=both, not_after_ms=end_ms)
    how = {"not_before_ms": clock.now_ms + life_ms // 2, "not_after_ms": end_ms}
    peers = [Key.generate().peer_id for _ in range(count)]
    leaves = [certificate(admission, inviter, peer=peer, **how) for peer in peers]
    return inviter.peer_id, [Chain((leaf, invite)) for leaf in leaves]


async def test_an_issuer_ahead_is_one_sign_and_none_once_evicted(
    admission: Admission, clock: Clock
) -> None:
    inviter, chains = early_chains(admission, clock, 3)
    for chain in chains:
        assert refused(admission, chain) == "not_yet"
    assert admission.early_s() == {inviter: 30 * 86_400}
    await admission.issuer.evict(inviter)
    assert admission.early_s() == {}


async def test_what_a_node_signed_itself_in_a_glitch_says_nothing_of_others(
    tmp_path: Path, clock: Clock
) -> None:
    clock.now_ms += 7_200_000
    store = Store(tmp_path)
    store.found("local", b"operator")
    admission = Admission(store, ME, clock=clock)
    end_ms = clock.now_ms + 1_000_000
    chain = Chain((certificate(admission, not_before_ms=clock.now_ms, not_after_ms=end_ms),))
    clock.now_ms = NOW_MS
    assert refused(admission, chain) == "not_yet"
    assert admission.early_s() == {}


@pytest.mark.parametrize("restarted", [False, True])
async def test_after_a_glitch_the_founder_certifies_itself_anew(
    tmp_path: Path, clock: Clock, restarted: bool
) -> None:
    clock.now_ms += 7_200_000
    store = Store(tmp_path)
    store.found("local", b"operator")
    admission = Admission(store, ME, clock=clock)
    clock.now_ms = NOW_MS
    assert refused(admission, admission.own) == "not_yet"
    if restarted:
        admission = Admission(Store(tmp_path), ME, clock=clock)
    else:
        renewed, ready = asyncio.Event(), asyncio.Event()
        admission.members.changes.add(lambda _: renewed.set())
        running = asyncio.ensure_future(admission.run(ready.set))
        await ready.wait()
        admission.forget_early()
        async with asyncio.timeout(60):
            await renewed.wait()
        running.cancel()
        await asyncio.wait([running])
    admission.judge.verify(admission.own.encoded)
    assert Store(tmp_path).certificate == admission.own.encoded


async def test_who_cannot_certify_itself_takes_an_operators_word_for_what_it_saw(
    tmp_path: Path, clock: Clock
) -> None:
    store = Store(tmp_path)
    store.found("local", b"operator")
    founder = Admission(store, ME, clock=clock)
    (tmp_path / "cluster.key").unlink()
    member = Admission(Store(tmp_path), ME, clock=clock)
    clock.now_ms -= 7_200_000
    assert member.early_s() == {founder.founding.issuer: 7200}
    member.forget_early()
    assert member.early_s() == {}
    assert refused(member, founder.own) == "not_yet"  # seen again: it is no news
    assert member.early_s() == {}
    later = certificate(founder, not_before_ms=NOW_MS + 1)
    assert refused(member, Chain((later,))) == "not_yet"
    assert len(member.early_s()) == 1


# --- tables that grow ----------------------------------------------------------------------------

INVITER, OTHER = Key.from_seed(b"i" * 32), Key.from_seed(b"j" * 32)


class Unwalked(dict[Any, Any]):
    """A table of which nobody looks at every entry."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("walked")

    values = items = keys = __iter__  # type: ignore[assignment]


def invited(admission: Admission, peer: PeerId, inviter: Key = INVITER, later_ms: int = 0) -> Chain:
    rights, end_ms = frozenset({"member", "invite"}), NOW_MS + 1_000_000 + later_ms
    own = certificate(admission, peer=inviter.peer_id, rights=rights, not_after_ms=end_ms)
    return Chain((certificate(admission, inviter, peer=peer, not_after_ms=end_ms), own))


def peers(count: int) -> list[PeerId]:
    return [Key.from_seed(number.to_bytes(32, "big")).peer_id for number in range(1, count + 1)]


async def test_the_members_of_an_inviter_are_counted_as_they_come_and_go(
    tmp_path: Path, clock: Clock
) -> None:
    store = Store(tmp_path)
    store.found("local", b"operator")
    admission = Admission(store, ME, clock=clock, limits=AdmissionLimits(members_per_inviter_max=2))
    members, (one, two, three) = admission.members, peers(3)

    def enters(peer: PeerId, inviter: Key = INVITER, later_ms: int = 0) -> None:
        members.enter(invited(admission, peer, inviter, later_ms))

    members._members = Unwalked()
    enters(one)
    enters(two)
    with pytest.raises(AdmissionRefused, match="members_per_inviter_max"):
        enters(three)
    enters(one, later_ms=1)  # it renewed
    with pytest.raises(AdmissionRefused, match="members_per_inviter_max"):
        enters(three)
    enters(one, OTHER, later_ms=2)  # another inviter renewed it
    enters(three)
    enters(one, OTHER, later_ms=3)
    members._remove(three, "expired")
    enters(peers(4)[3])
    with pytest.raises(AdmissionRefused, match="members_per_inviter_max"):
        enters(three)
    members._members = dict(dict.items(members._members))
    await admission.issuer.evict(INVITER.peer_id)
    assert list(members) == [one]
    # The ledger of this issuer has the same limit, and forgets whom it evicts.
    await admission.issuer.evict(two)
    await store.files.flush()
    for ledger in (store.ledger, Store(tmp_path).ledger):
        assert ledger.issued == Counter(leaf.issuer for leaf in ledger.values())
        assert ledger.issued == {INVITER.peer_id: 1, OTHER.peer_id: 1}


async def test_a_new_fact_does_not_look_at_all_others(
    admission: Admission, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, others = peers(8)[:4], peers(8)[4:]
    cluster_key = admission.store.cluster_key
    assert cluster_key is not None

    def tombstone(peer: PeerId, at_ms: int = NOW_MS) -> bytes:
        made = Tombstone(
            cluster=admission.cluster_id,
            peer=peer,
            not_after_ms=at_ms + 1000,
            chain=None,
            reason="",
            at_ms=at_ms,
        )
        return made.signed(cluster_key).encoded

    for peer in mine[:2]:
        admission.members.enter(invited(admission, peer))
    admission.members._members = Unwalked(admission.members._members)

    def walked(facts: Facts) -> Iterator[Fact]:
        raise AssertionError("walked")

    with monkeypatch.context() as patch:
        patch.setattr(Facts, "__iter__", walked)
        for peer in mine:
            assert admission.adopt(tombstone(peer))
        assert not admission.adopt(tombstone(mine[0]))
        assert admission.adopt(tombstone(mine[0], NOW_MS + 1)), "greater, in its place"
    assert len(admission.members._members) == 0
    admission.members._members = {}
    admission.limits = replace(admission.limits, tombstones_max=6)
    for peer in others[:2]:
        admission.adopt(tombstone(peer))
    with pytest.raises(AdmissionRefused, match="tombstones_max"):
        admission.adopt(tombstone(others[2]))
    clock.now_ms += 120_000
    admission._sweep()  # all have ended
    at_ms = clock.now_ms
    assert all(admission.adopt(tombstone(peer, at_ms)) for peer in (*mine, *others[:2]))
    with pytest.raises(AdmissionRefused, match="tombstones_max"):
        admission.adopt(tombstone(others[2], at_ms))
    await admission.store.files.flush()


def test_a_forged_signature(admission: Admission) -> None:
    good = certificate(admission)
    forged = Certificate.open(good.payload, bytes(64))
    assert refused(admission, Chain((forged,))) == "signature"
    root = admission.founding.issuer
    mine = certificate(admission, ME)  # names itself; then the cluster key, which did not sign
    payload = mine.payload.replace(ME.peer_id.multihash, root.multihash)
    assert refused(admission, Chain((Certificate.open(payload, mine.signature),))) == "signature"


def resigned(admission: Admission, **changed: Any) -> bytes:
    """A chain whose payload was changed and signed with the right key all the same."""
    from wetware.base import cbor

    key = admission.store.cluster_key
    assert key is not None
    value = cbor.decode(certificate(admission).payload, bytes_max=4096) | changed
    payload = cbor.encode({k: v for k, v in value.items() if v is not None})
    signature = key.sign(b"wetware-certificate:1\n" + payload)
    return cbor.encode({"v": 2, "c": [[payload, signature]]})


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"v": 1}, "version"),
        ({"v": True}, "version"),
        ({"rights": ["fly", "member"]}, "right"),
        ({"rights": ["member", "member"]}, "malformed"),
        ({"rights": ["invite"]}, "malformed"),
        ({"rights": []}, "malformed"),
        ({"extra": 1}, "malformed"),
        ({"serial": None}, "malformed"),
        ({"serial": b"short"}, "malformed"),
        ({"foreign": 1}, "malformed"),
        ({"ticket": None}, "malformed"),
        ({"ticket": b"short"}, "malformed"),
        ({"ticket": "0123456789abcdef"}, "malformed"),
        ({"from": True}, "malformed"),
        ({"from": -1}, "malformed"),
        ({"to": 2**60}, "malformed"),
        ({"to": NOW_MS - 1}, "malformed"),
        ({"to": NOW_MS + 400 * 86_400_000}, "malformed"),
        ({"labels": {"a b": "x"}}, "malformed"),
        ({"labels": {"a": "x" * 200}}, "malformed"),
        ({"labels": {"a": "line\nline"}}, "malformed"),
        ({"peer": b"\x00\x24junk"}, "malformed"),
    ],
)
def test_unknown_and_malformed_statements(
    admission: Admission, changed: dict[str, Any], why: str
) -> None:
    assert admission.judge.verify(resigned(admission)).peer == MEMBER.peer_id
    assert refused(admission, resigned(admission, **changed)) == why


def test_a_chain_has_one_encoding(admission: Admission) -> None:
    good = Chain((certificate(admission),)).encoded
    admission.judge.verify(good)
    swapped = b"\xa2" + good[1 + 3 :] + b"\x61v\x02"  # the same map in another order
    assert len(swapped) == len(good)
    assert refused(admission, swapped) == "malformed"
    assert refused(admission, good + b"\x00") == "malformed"
    assert refused(admission, bytes(5000)) == "malformed"


def test_signatures_are_looked_at_once(
    admission: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wetware.overlay.admission.statements as statements

    calls = 0

    def counting(*args: bytes) -> bool:
        nonlocal calls
        calls += 1
        return True

    monkeypatch.setattr(statements, "verify", counting)
    chain = Chain((certificate(admission),))
    for _ in range(5):
        admission.judge.verify(chain.encoded)
    assert calls == 1


async def test_what_is_cached_is_bounded_and_still_judged(tmp_path: Path, clock: Clock) -> None:
    store = Store(tmp_path)
    store.found("local", b"operator")
    admission = Admission(store, ME, clock=clock, limits=AdmissionLimits(chains_cached_max=4))
    chains = [Chain((certificate(admission, peer=Key.generate().peer_id),)) for _ in range(10)]
    for chain in chains:
        admission.judge.verify(chain.encoded)
    assert admission.judge._open.cache_info().currsize == 4
    await admission.issuer.evict(chains[-1].peer)
    assert refused(admission, chains[-1]) == "evicted"
    clock.now_ms += 10**10
    assert refused(admission, chains[-2]) == "expired"
    await store.files.flush()


def test_labels_that_do_not_fit(admission: Admission) -> None:
    with pytest.raises(InvalidArgument, match="the labels make"):
        certificate(admission, labels={f"label{n}": "x" * 120 for n in range(32)})
    with pytest.raises(InvalidArgument, match="at most 32"):
        certificate(admission, labels={f"label{n}": "" for n in range(33)})


def test_what_a_start_refuses(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "b").mkdir()
    store = Store(tmp_path / "b")
    with pytest.raises(ConfigError, match="belongs to no cluster"):
        Admission(store, ME, clock=clock)
    store.found("local", b"operator")
    Admission(store, ME, clock=clock)
    (tmp_path / "b" / "cluster.key").unlink()
    with pytest.raises(ConfigError, match="and this node is") as exc:
        Admission(Store(tmp_path / "b"), MEMBER, clock=clock)
    assert "node.key" in exc.value.hint
    (tmp_path / "b" / "certificate").unlink()
    with pytest.raises(ConfigError) as exc:
        Admission(Store(tmp_path / "b"), MEMBER, clock=clock)
    assert "--join" in exc.value.hint
