"""What is given up when a node leaves, and where others would be left alone."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wetware.base.multiaddr import Multiaddr
from wetware.errors import AdmissionRefused, ConfigError
from wetware.identity import Key
from wetware.node.belonging import FURTHER_FILE, pin_further
from wetware.node.data_dir import locked
from wetware.node.leaving import leave, refuse_orphans
from wetware.overlay.admission.files import CLUSTER_KEY_FILE, LEDGER_FILE
from wetware.overlay.admission.statements import INVITE, MEMBER, Certificate, Chain, Founding
from wetware.overlay.admission.store import Store, founding_of

CLUSTER = Key.generate()
FOUNDING = Founding(CLUSTER.public, "local", b"operator")
DAY_MS = 86_400_000


def certificate(*rights: str, key: Key | None = None, days: int = 7) -> Certificate:
    now_ms = int(time.time() * 1000)
    return Certificate(
        cluster=FOUNDING.cluster_id,
        peer=(key or Key.generate()).peer_id,
        rights=frozenset({MEMBER, *rights}),
        labels={},
        not_before_ms=now_ms - 10 * DAY_MS,
        not_after_ms=now_ms + days * DAY_MS,
        foreign=False,
        ticket=b"",
    ).signed(CLUSTER)


def member(data_dir: Path, *rights: str, others: tuple[Certificate, ...] = ()) -> Path:
    """The data directory of a node with these rights that renews the others' certificates."""
    data_dir.mkdir(mode=0o700)
    key = Key.generate()
    key.save(data_dir / "node.key")
    store = Store(data_dir)
    addrs = (Multiaddr.parse("/ip4/127.0.0.1/tcp/1").with_peer(Key.generate().peer_id),)
    store.join(FOUNDING, Chain((certificate(*rights, key=key),)).encoded, b"a document", addrs)
    store.ledger.update({leaf.peer: leaf for leaf in others})
    (data_dir / LEDGER_FILE).write_bytes(store.ledger.file.encoded())
    return data_dir


def refused(data_dir: Path, why: str) -> None:
    with pytest.raises(AdmissionRefused, match=why) as caught:
        refuse_orphans(data_dir, FOUNDING)
    assert caught.value.code == "admission.last_inviter"
    assert "ww leave --yes" in caught.value.hint


def test_who_has_the_cluster_s_key_is_needed_by_those_whose_certificates_are_valid(
    tmp_path: Path,
) -> None:
    def founder(name: str, *others: Certificate) -> Path:
        data_dir = member(tmp_path / name, INVITE, others=others)
        CLUSTER.save(data_dir / CLUSTER_KEY_FILE)
        return data_dir

    refuse_orphans(founder("alone"), FOUNDING)
    refuse_orphans(founder("they left long ago", certificate(days=-1)), FOUNDING)
    needed = founder("needed", certificate(), certificate(INVITE))
    refused(needed, "has the cluster's key: without it the 2 others")


def test_the_last_that_may_invite_is_needed_and_others_are_not(tmp_path: Path) -> None:
    guest, inviter = certificate(), certificate(INVITE)
    last = member(tmp_path / "last", INVITE, others=(guest, certificate(INVITE, days=-1)))
    refused(last, "no other node is known that may invite: without it the 1 others")
    refuse_orphans(member(tmp_path / "one of two", INVITE, others=(guest, inviter)), FOUNDING)
    refuse_orphans(member(tmp_path / "no inviter", others=(guest,)), FOUNDING)


def test_a_further_backend_stays_what_it_was_first(tmp_path: Path) -> None:
    acme: Any = SimpleNamespace(name="ldap", founding=b"acme")
    other: Any = SimpleNamespace(name="ldap", founding=b"other")
    for _ in range(2):
        pin_further(tmp_path, {"auth_ldap": acme})
        pin_further(tmp_path, {})
    with pytest.raises(ConfigError, match="'ldap' is configured with another authority"):
        pin_further(tmp_path, {"auth_ldap": other})
    (tmp_path / FURTHER_FILE).write_text("[")
    with pytest.raises(ConfigError, match="damaged"):
        pin_further(tmp_path, {"auth_ldap": acme})


@pytest.mark.parametrize("purge", [False, True])
def test_what_is_of_the_cluster_goes_and_what_is_of_the_services_stays(
    tmp_path: Path, purge: bool
) -> None:
    data_dir = member(tmp_path / "node", INVITE, others=(certificate(),))
    for name in ("audit/log", "auth_local/policy.json", "ldap/users", "acme/data"):
        path = data_dir / "plugins" / name
        path.parent.mkdir(parents=True)
        path.write_text("kept?")
    ldap: Any = SimpleNamespace(founding=b"ldap://acme")
    pin_further(data_dir, {"ldap": ldap})
    (data_dir / "broker").mkdir()
    (data_dir / "broker" / "grants.db").write_text("shares of the cluster's users")
    for name in ("incarnation", "peers.json", "not ours"):
        (data_dir / name).write_text("1")
    leave(data_dir, FOUNDING, purge=purge)
    left = {str(path.relative_to(data_dir)) for path in data_dir.rglob("*") if path.is_file()}
    of_the_node = {"node.key", "incarnation", "plugins/audit/log", "plugins/acme/data"}
    assert left == {"left", "lock", "not ours"} | (set() if purge else of_the_node)


def test_a_node_that_could_not_leave_for_the_disk_can_again(tmp_path: Path) -> None:
    data_dir = member(tmp_path / "node")
    (tmp_path / "elsewhere").mkdir()
    (data_dir / "broker").symlink_to(tmp_path / "elsewhere")  # what is not ours is not emptied
    with pytest.raises(ConfigError, match=r"cannot remove .*broker") as caught:
        leave(data_dir, FOUNDING, purge=False)
    assert caught.value.hint == "ww leave, again"
    assert founding_of(data_dir) == FOUNDING
    (data_dir / "broker").unlink()
    leave(data_dir, FOUNDING, purge=False)
    assert founding_of(data_dir) is None
    with locked(data_dir):
        assert Store(data_dir).certificate is None
