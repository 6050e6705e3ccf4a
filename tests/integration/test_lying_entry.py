"""An entry node that lies about other members: it chooses nobody's login for them.

Home, entry and goal are members of one cluster; the client logs in at `entry`, whose answers to
`Cluster.list` the test rewrites, and asks it for another node.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import wetware
from wetware.base import cbor
from wetware.client import contexts
from wetware.errors import AuthError, DialError, WetwareError
from wetware.identity import Key, PeerId
from wetware.overlay.admission.statements import Certificate, Chain, Founding
from wetware.overlay.membership.record import Record
from wetware.testing import Home, NodeProcess

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]
WITHIN_S = 60.0
EITHER = pytest.mark.parametrize("direct", [True, False, None], ids=["direct", "tunnel", "any"])

LIAR = """
import json, os, sys
if "node" in sys.orig_argv:
    from wetware.node.services.cluster import ClusterServant
    honest = ClusterServant.list

    async def lie(self, selector, limit, signed):
        said = json.load(open(os.environ["LIE"]))
        reply = await honest(self, said.get("selector", selector), limit, signed)
        for member in reply["members"]:
            member |= said.get("member", {})
            if "record" in said:
                member["record"] = bytes.fromhex(said["record"])
        if "founding" in said:
            reply["founding"] = bytes.fromhex(said["founding"])
        return reply

    ClusterServant.list = lie
"""


@dataclass
class Lies:
    """The nodes, and what `entry` says.

    Attributes:
        entry: Where the client logs in.
        goal: Name "goal", label zone=cloud.
        other: Another honest member, zone=home.
    """

    entry: NodeProcess
    goal: NodeProcess
    other: NodeProcess
    file: Path

    def tell(self, **said: Any) -> None:
        self.file.write_text(json.dumps(said))

    @contextlib.asynccontextmanager
    async def session(self) -> Any:
        key = self.goal.home.key()
        async with wetware.connect(self.entry.addr, key=key) as session:
            yield session

    async def signed(self, session: wetware.Session, name: str) -> tuple[Record, Founding]:
        """What an honest answer about a member contains."""
        self.tell()
        (member,) = await session.cluster.list(f"name={name}", signed=True)
        founding = Founding.from_plain(cbor.decode(member.founding, bytes_max=9999))
        return Record.open(member.record), founding


@pytest.fixture(scope="module")
def lies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lies]:
    path = tmp_path_factory.mktemp("lies")
    (path / "site").mkdir()
    (path / "site" / "sitecustomize.py").write_text(LIAR)
    file = path / "lie.json"
    file.write_text("{}")
    liar = {"PYTHONPATH": str(path / "site"), "LIE": str(file)}
    with (
        Home(path / "honest") as honest,
        Home(path / "liar", env=liar) as lying,
        honest.node("other", args=["--label", "zone=home"]) as other,
        honest.node("goal", join=other, args=["--label", "zone=cloud"]) as goal,
        lying.node("entry", join=other.invite(), args=["--label", "zone=entry"]) as entry,
    ):
        for node in (other, goal):
            node.wait_members([other.peer_id, goal.peer_id, entry.peer_id], within_s=WITHIN_S)
        yield Lies(entry, goal, other, file)


@EITHER
@pytest.mark.parametrize("how", ["peer", "name=goal", "zone=cloud", "goal"])
async def test_an_honest_answer_is_taken(lies: Lies, how: str, direct: bool | None) -> None:
    lies.tell()
    selector = lies.goal.peer_id if how == "peer" else how
    async with lies.session() as session, session.node(selector, direct=direct) as far:
        assert far.identity.node == lies.goal.peer_id
        assert far.identity.cluster == session.identity.cluster


@EITHER
async def test_a_peer_id_is_who_answers(lies: Lies, direct: bool | None) -> None:
    """Whatever else is said of it: nobody but the node of this peer ID is logged in to."""
    goal, entry = lies.goal.peer_id, lies.entry.peer_id
    async with lies.session() as session:

        async def logs_in_at() -> str:
            async with session.node(goal, direct=direct, timeout_s=WITHIN_S) as far:
                assert far is not session
                return far.identity.node

        lies.tell(member={"self": True})
        assert await logs_in_at() == goal
        lies.tell(selector=entry)  # another member, altogether
        with pytest.raises((AuthError, DialError)) if direct is not False else _nothing():
            assert await logs_in_at() == goal
        lies.tell(selector=entry, member={"peer_id": goal})
        with pytest.raises((AuthError, DialError)) if direct is not False else _nothing():
            assert await logs_in_at() == goal
        # The right ID, with an address where the liar pretends that the goal is.
        lies.tell(member={"addrs": [lies.entry.addr.replace(entry, goal)]})
        with pytest.raises(DialError) if direct else _nothing():
            assert await logs_in_at() == goal


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield


Lie = Callable[[Record, Record, Founding], dict[str, Any]]


def another_member(goal: Record, other: Record, founding: Founding) -> dict[str, Any]:
    return {"selector": "name=other", "member": {"name": "goal", "labels": CLOUD}}


def with_its_id(goal: Record, other: Record, founding: Founding) -> dict[str, Any]:
    return {**another_member(goal, other, founding), "record": other.encoded.hex()}


def itself(goal: Record, other: Record, founding: Founding) -> dict[str, Any]:
    return {"selector": "name=entry", "member": {"self": True, "name": "goal", "labels": CLOUD}}


def nothing_signed(goal: Record, other: Record, founding: Founding) -> dict[str, Any]:
    return {"record": "", "member": {"self": True}}


def a_forgery(goal: Record, other: Record, founding: Founding) -> dict[str, Any]:
    envelope = cbor.decode(goal.encoded, bytes_max=9999)
    fields = cbor.decode(envelope["p"], bytes_max=9999) | {"a": list(other.addrs)}
    return {"record": cbor.encode(envelope | {"p": cbor.encode(fields)}).hex()}


def _stranger(goal: Record, chain: Callable[[Key], Chain]) -> str:
    key = Key.generate()
    now_ms = int(time.time() * 1000)
    made = Record.sign(
        key,
        incarnation=now_ms,
        instance=goal.instance,
        issued_ms=now_ms,
        addrs=[addr.replace(goal.peer, key.peer_id) for addr in goal.addrs],
        name="goal",
        labels={"zone": "cloud"},
        chain=chain(key).encoded,
    )
    return made.encoded.hex()


def _certify(by: Key, cluster: str, peer: PeerId) -> Chain:
    now_ms = int(time.time() * 1000)
    made = Certificate( cluster=cluster, peer=peer, rights=frozenset({"member"}), labels={},
        not_before_ms=now_ms - 1000, not_after_ms=now_ms + 60_000,
    ).signed(by)  # fmt: skip
    return Chain((made,))


def of_another_cluster(goal: Record, other: Record, founding: Founding) -> dict[str, Any]:
    root = Key.generate()
    theirs = Founding(root.public, founding.backend, founding.statement)
    record = _stranger(goal, lambda key: _certify(root, theirs.cluster_id, key.peer_id))
    return {"record": record, "founding": cbor.encode(theirs.plain()).hex()}


def certified_by_itself(goal: Record, other: Record, founding: Founding) -> dict[str, Any]:
    root = Key.generate()
    return {"record": _stranger(goal, lambda k: _certify(root, founding.cluster_id, k.peer_id))}


def with_a_stolen_certificate(goal: Record, other: Record, founding: Founding) -> dict[str, Any]:
    return {"record": _stranger(goal, lambda _: Chain.open(goal.chain, founding))}


CLOUD = [{"key": "zone", "value": "cloud"}]
LIES = [
    another_member, with_its_id, itself, nothing_signed, a_forgery, of_another_cluster,
    certified_by_itself, with_a_stolen_certificate,
]  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("selector", ["name=goal", "zone=cloud", "goal"])
async def test_a_name_is_proven(lies: Lies, lie: Lie, selector: str) -> None:
    async with lies.session() as session:
        goal, founding = await lies.signed(session, "goal")
        other, _ = await lies.signed(session, "other")
        lies.tell(**lie(goal, other, founding))
        with pytest.raises(AuthError) as caught:
            async with session.node(selector):
                pytest.fail("a login at a node that was not meant")
        assert caught.value.code == "auth.unproven"
        assert lies.entry.peer_id in caught.value.message
        lies.tell()
        async with session.node(selector) as far:
            assert far.identity.node == lies.goal.peer_id


async def test_the_cluster_is_pinned_at_the_first_login(
    lies: Lies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WW_HOME", str(tmp_path))
    lies.tell()
    async with lies.session() as session:
        cluster = session.identity.cluster
        assert cluster in session.notice
    async with lies.session() as session:
        assert session.notice == ""
    assert contexts.load().clusters == {lies.entry.peer_id: cluster}
    assert (tmp_path / contexts.FILE).stat().st_mode & 0o777 == 0o600


def test_another_cluster_is_refused_until_it_is_accepted(tmp_path: Path) -> None:
    """A node whose directory was founded anew with its old key."""
    with Home(tmp_path) as home:
        with home.node("n") as node:
            first = home.ww("--node", node.addr, "whoami", "--json", check=True)
            assert "first login" in first.stderr
            addr, cluster = node.addr, json.loads(first.stdout)["cluster"]
            again = home.ww("--node", node.addr, "whoami", check=True)
            assert again.stderr == ""
        _found_anew(node)
        listen = addr.partition("/p2p/")[0]
        with home.node("n", listen=listen) as node:
            refused = home.ww("--node", node.addr, "whoami")
            assert refused.returncode == 77
            assert cluster in refused.stderr
            hint = refused.stderr.partition("ww context accept ")[2].split()
            assert hint[0] == node.peer_id
            assert node.ww("whoami").returncode == 0, "who owns the directory decides"
            home.ww("context", "accept", *hint, check=True)
            there = home.ww("--node", node.addr, "whoami", "--json", check=True)
            assert json.loads(there.stdout)["cluster"] == hint[1] != cluster


def _found_anew(node: NodeProcess) -> None:
    import shutil

    for path in node.data_dir.iterdir():
        if path.name != "node.key":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


async def test_what_raises_is_ours(lies: Lies) -> None:
    """Bytes that are no record, and a founding that is none."""
    async with lies.session() as session:
        for said in ({"record": "00"}, {"record": "a0"}, {"founding": "00"}, {"founding": ""}):
            lies.tell(**said)
            with pytest.raises(WetwareError) as caught:
                async with session.node("name=goal"):
                    pass
            assert caught.value.code == "auth.unproven"
