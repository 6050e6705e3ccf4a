"""Whatever bytes come: they verify only if a key that counts signed exactly them."""

from __future__ import annotations

import contextlib

from hypothesis import example, given
from hypothesis import strategies as st

from wetware.base import cbor
from wetware.errors import AdmissionRefused, InvalidArgument
from wetware.identity import Key
from wetware.overlay.admission.statements import (
    Certificate,
    Chain,
    ForeignFact,
    Founding,
    Tombstone,
    decode_fact,
)
from wetware.overlay.admission.texts import Bundle, Ticket

ROOT, INVITER, PEER = (Key.from_seed(bytes([n]) * 32) for n in range(3))
FOUNDING = Founding(ROOT.public, "local", b"operator")
NOW_MS = 1_800_000_000_000


def issue(key: Key, peer: Key, rights: set[str], *, foreign: bool = False) -> Certificate:
    return Certificate(
        cluster=FOUNDING.cluster_id,
        peer=peer.peer_id,
        rights=frozenset(rights),
        labels={"zone": "home"},
        not_before_ms=NOW_MS,
        not_after_ms=NOW_MS + 1000,
        foreign=foreign,
    ).signed(key)


INVITE = issue(ROOT, INVITER, {"member", "invite"})
CHAIN = Chain((issue(INVITER, PEER, {"member"}), INVITE))
TOMBSTONE = Tombstone(
    cluster=FOUNDING.cluster_id,
    peer=PEER.peer_id,
    chain=Chain((INVITE,)),
    reason="lost",
    at_ms=NOW_MS,
    not_after_ms=NOW_MS + 10,
).signed(INVITER)
FACTS = (
    TOMBSTONE.encoded,
    ForeignFact(Chain((issue(ROOT, PEER, {"member"}, foreign=True),))).encoded,
)


def verifies(data: bytes) -> bool:
    try:
        Chain.open(data, FOUNDING)
    except AdmissionRefused:
        return False
    return True


def is_fact(data: bytes) -> bool:
    try:
        decode_fact(data).check(FOUNDING)
    except AdmissionRefused:
        return False
    return True


def test_the_originals_verify() -> None:
    assert verifies(CHAIN.encoded)
    assert all(map(is_fact, FACTS))


@given(st.binary(max_size=200))
@example(b"")
@example(b"\xa0")
def test_random_bytes_never_verify(data: bytes) -> None:
    assert not verifies(data)
    assert not is_fact(data)


@given(st.data())
def test_no_mutation_of_a_chain_or_fact_verifies(data: st.DataObject) -> None:
    """One byte changed, cut out, or added, anywhere: the envelope's own encoding included."""
    for original, check in ((CHAIN.encoded, verifies), *((fact, is_fact) for fact in FACTS)):
        at = data.draw(st.integers(0, len(original) - 1))
        byte = data.draw(st.integers(0, 255))
        for mutant in (
            original[:at] + bytes([byte]) + original[at + 1 :],
            original[:at] + original[at + 1 :],
            original[:at] + bytes([byte]) + original[at:],
            original[:at],
            original + bytes([byte]),
        ):
            if mutant != original:
                assert not check(mutant), (at, byte)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.text(max_size=20)
    | st.binary(max_size=40),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(PLAIN)
def test_well_formed_cbor_of_a_wrong_shape_is_a_refusal(value: object) -> None:
    for wrapped in (
        value,
        {"v": 2, "c": value},
        {"v": 2, "c": [[value, b"s" * 64]]},
        {"k": "tombstone", "p": value, "s": b"s" * 64},
        {"k": "foreign", "c": value},
    ):
        try:
            data = cbor.encode(wrapped)
            cbor.decode(data, bytes_max=1 << 20)
        except InvalidArgument:
            continue
        assert not verifies(data)
        assert not is_fact(data)


@given(
    st.dictionaries(
        st.sampled_from(
            [
                "v",
                "cluster",
                "peer",
                "rights",
                "labels",
                "from",
                "to",
                "issuer",
                "serial",
                "foreign",
                "ticket",
                "x",
            ]
        ),
        PLAIN,
        max_size=5,
    )
)
def test_changed_fields_signed_by_the_root_are_judged(changes: dict[str, object]) -> None:
    """Even what the right key signed is either a well-formed certificate or a refusal."""
    value = cbor.decode(INVITE.payload, bytes_max=4096) | changes
    payload = cbor.encode(value)
    signature = ROOT.sign(b"wetware-certificate:1\n" + payload)
    data = cbor.encode({"v": 2, "c": [[payload, signature]]})
    try:
        chain = Chain.open(data, FOUNDING)
    except AdmissionRefused:
        return
    assert chain.leaf.cluster == FOUNDING.cluster_id
    assert chain.rights <= {"member", "invite"}
    assert "x" not in changes


@given(st.text(max_size=300))
def test_texts_are_parsed_or_refused(text: str) -> None:
    for parse, prefix in ((Ticket.parse, "wwt1"), (Bundle.parse, "wwc1")):
        for candidate in (text, prefix + text):
            with contextlib.suppress(InvalidArgument):
                parse(candidate)
                raise AssertionError("random text is no invitation")


@given(st.binary(min_size=32, max_size=32), st.integers(0, 2**53 - 1))
def test_tickets_there_and_back(secret: bytes, end_ms: int) -> None:
    ticket = Ticket(FOUNDING, PEER.peer_id, (), secret, end_ms)
    assert Ticket.parse(ticket.text) == ticket
