"""What a client believes of a node's answer about another one."""

from __future__ import annotations

from typing import Any

import pytest

from wetware.base import cbor
from wetware.errors import WetwareError
from wetware.identity import Key
from wetware.member import Member
from wetware.overlay.admission.statements import Certificate, Chain, Founding
from wetware.overlay.membership.proof import AGE_S_MAX, encode_founding, prove
from wetware.overlay.membership.record import Record

NOW_S = 1_800_000_000.0
ROOT, NODE, INVITER = (Key.from_seed(bytes([n]) * 32) for n in (1, 2, 3))
FOUNDING = Founding(ROOT.public, "local", b"")


def certify(
    by: Key = ROOT, to: Key = NODE, founding: Founding = FOUNDING, **how: Any
) -> Certificate:
    fields: dict[str, Any] = {
        "cluster": founding.cluster_id,
        "peer": to.peer_id,
        "rights": frozenset({"member"}),
        "labels": {"zone": "cloud"},
        "not_before_ms": int(NOW_S * 1000) - 1000,
        "not_after_ms": int(NOW_S * 1000) + 60_000,
    }
    return Certificate(**fields | how).signed(by)


def signed(*chain: Certificate, key: Key = NODE, age_s: float = 0.0, **how: Any) -> bytes:
    fields: dict[str, Any] = {
        "name": "goal",
        "host": "vm7",
        "labels": {"zone": "home", "gpu": "yes"},
        "addrs": ("/ip4/10.0.0.1/tcp/4001",),
        "services": ("pubsub",),
        "chain": Chain(chain or (certify(),)).encoded,
    }
    made = Record.sign(
        key,
        incarnation=1,
        instance=b"instance",
        issued_ms=int((NOW_S - age_s) * 1000),
        **fields | how,
    )
    return made.encoded


def proven(record: bytes, selector: str = "goal", **how: Any) -> Member:
    fields: dict[str, Any] = {
        "founding": encode_founding(FOUNDING),
        "cluster": FOUNDING.cluster_id,
        "state": "alive",
        "now_s": NOW_S,
    }
    return prove(record, selector=selector, **fields | how)


@pytest.mark.parametrize(
    "selector",
    [
        "goal",
        "vm7",
        "name=goal,state=alive,service=pubsub",
        "gpu=yes",
        "zone=cloud",
        NODE.peer_id,
        NODE.peer_id[-8:],
    ],
)
def test_what_is_signed_and_certified_is_believed(selector: str) -> None:
    found = proven(signed(), selector)
    assert found.peer_id == NODE.peer_id
    assert found.addrs == ("/ip4/10.0.0.1/tcp/4001",)


def test_an_inviter_s_certificate_counts() -> None:
    right = frozenset({"member", "invite"})
    inviter = certify(to=INVITER, rights=right)
    assert proven(signed(certify(INVITER), inviter)).peer_id == NODE.peer_id
    with pytest.raises(WetwareError, match="may not certify"):
        proven(signed(certify(INVITER), certify(to=INVITER)))


@pytest.mark.parametrize(
    ("selector", "state"),
    [
        ("zone=home", "alive"),  # the certificate's label wins over its own
        ("other", "alive"),
        ("name=goal,service=blob", "alive"),
        ("state=alive", "dead"),
        (INVITER.peer_id, "alive"),
    ],
)
def test_what_is_not_meant_is_refused(selector: str, state: str) -> None:
    with pytest.raises(WetwareError) as caught:
        proven(signed(), selector, state=state)
    assert caught.value.code == "admission.not_meant"


def test_a_farewell_is_no_living_member() -> None:
    with pytest.raises(WetwareError, match="not meant"):
        proven(signed(left=True))


def test_the_time_is_judged() -> None:
    for late_s, code in ((3600.0, "admission.expired"), (-3600.0, "admission.not_yet")):
        with pytest.raises(WetwareError) as caught:
            proven(signed(), now_s=NOW_S + late_s)
        assert caught.value.code == code
    year = certify(
        not_before_ms=int(NOW_S * 1000) - 200 * 86_400_000,
        not_after_ms=int(NOW_S * 1000) + 100 * 86_400_000,
    )
    assert proven(signed(year, age_s=AGE_S_MAX - 1)).peer_id == NODE.peer_id
    for age_s in (AGE_S_MAX + 1, -AGE_S_MAX - 1):
        with pytest.raises(WetwareError) as caught:
            proven(signed(year, age_s=age_s))
        assert caught.value.code == "admission.stale"


def test_a_member_of_another_cluster_is_refused() -> None:
    root = Key.generate()
    theirs = Founding(root.public, "local", b"")
    record = signed(certify(root, founding=theirs))
    for founding in (theirs, FOUNDING):
        with pytest.raises(WetwareError) as caught:
            proven(record, founding=encode_founding(founding))
        assert caught.value.code == "admission.cluster"


def test_somebody_else_s_certificate_or_signature_is_refused() -> None:
    with pytest.raises(WetwareError, match="carries the certificate of"):
        proven(signed(key=INVITER))
    envelope = cbor.decode(signed(), bytes_max=9999)
    theirs = cbor.decode(signed(name="x"), bytes_max=9999)
    with pytest.raises(WetwareError, match="did not sign"):
        proven(cbor.encode(envelope | {"s": theirs["s"]}))
    unsigned = Certificate.open(certify().payload, bytes(64))
    with pytest.raises(WetwareError, match="signature"):
        proven(signed(unsigned))


@pytest.mark.parametrize("junk", [b"", b"\0", b"\xa0", b"\x9f" * 1000, bytes(100_000)])
def test_junk_is_refused_as_such(junk: bytes) -> None:
    for how in ({"record": junk}, {"record": signed(), "founding": junk}):
        with pytest.raises(WetwareError):
            proven(**how)
