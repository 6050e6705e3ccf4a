"""What services propose for roles, on real nodes: written at the founding, or accepted later."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import wetware
from wetware import rpc
from wetware.base.multiaddr import Multiaddr
from wetware.broker.sturdy import SturdyRef
from wetware.errors import EXIT_USAGE, Denied
from wetware.testing import Home, NodeProcess

from ..packaging import third_party

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]

MEMBER = {"blob", "cluster", "kv", "names", "node", "proc", "pubsub", "sync"}
"""Services of the role."""
ROLES = """{
        "reader": frozenset({"Counters.get"}),
        "member": frozenset({"Counters.get", "Counters.incr"}),
    }"""
WAITS = "counter is installed, not granted to members yet"


class Site:
    """What is installed beside wetware: nothing at first."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path = path

    def counter(self, roles: str = ROLES, *, broken: str = "") -> None:
        """Install the service `counter`, or another version of it."""
        named = '    name, interface = "counter", SCHEMA.Counters\n'
        assert named in third_party.COUNTER
        source = broken + third_party.COUNTER.replace(named, f"{named}    roles = {roles}\n")
        if (file := self.path / "ww_counter/plugin.py").exists():
            file.write_text(source)
            return
        files = (("counter.capnp", third_party.COUNTER_SCHEMA),)
        third_party.install(self.path, "counter", source, files=files)

    @property
    def interface(self) -> rpc.Interface:
        return rpc.load(self.path / "ww_counter/counter.capnp").Counters


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "site")


@pytest.fixture
def home(tmp_path: Path, site: Site) -> Iterator[Home]:
    # Python's own cache of a module is told by size and second: this one changes within one.
    env = {"PYTHONPATH": str(site.path), "PYTHONDONTWRITEBYTECODE": "1"}
    with Home(tmp_path / "home", env=env) as made:
        for name in ("ada", "rita"):
            made.ww("key", "new", name, check=True)
        yield made


def add_users(node: NodeProcess) -> None:
    for name, role in (("ada", "member"), ("rita", "reader")):
        key = str(node.home.key(name).peer_id)
        node.ww("user", "add", name, "--key", key, "--role", role, check=True)


def roles_of(node: NodeProcess) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(node.ww("role", "list", "--json", check=True).stdout)
    return found


def ungranted(node: NodeProcess) -> Any:
    return json.loads(node.ww("status", "--json", check=True).stdout)["ungranted"]


def waiting(node: NodeProcess) -> list[bool]:
    """Whether `ww plugin list`, its JSON and doctor say that the counter waits."""
    listed = node.ww("plugin", "list", check=True).stdout
    plugins = json.loads(node.ww("plugin", "list", "--json", check=True).stdout)
    findings = json.loads(node.ww("doctor", "--json").stdout)["findings"]
    found = [f["remedy"] for f in findings if f["text"] == WAITS]
    assert found in ([], ["`ww role accept counter`"])
    return [
        f"{WAITS}: ww --data-dir {node.data_dir} role accept counter" in listed,
        any(plugin["ungranted"] == ["counter"] for plugin in plugins),
        bool(found),
    ]


async def test_what_is_installed_at_the_founding_is_granted(home: Home, site: Site) -> None:
    site.counter()
    with home.node("n") as node:
        add_users(node)
        roles = roles_of(node)
        assert roles["admin"] == {"*": ["*"]}
        assert roles["member"] == {
            "blob": ["Blob.*", "ByteStream.*", "Store.open", "Store.pin", "Store.pins", "Store.put",
                     "Store.rm", "Store.unpin", "Store.usage", "Transfer.*"],
            "cluster": ["ByteStream.*", "Cluster.list", "Cluster.ping", "Cluster.tunnel",
                        "Cluster.watch", "Subscription.*"],
            "counter": ["Counters.get", "Counters.incr"],
            "kv": ["Cursor.*", "Kv.etcd", "Kv.home", "Kv.lease", "Kv.open", "Kv.status", "Lease.*",
                   "Reader.*", "Watcher.*", "Writer.*"],
            "names": ["*"],
            "node": ["Node.status"],
            "proc": ["ByteStream.*", "Executor.detach", "Executor.end", "Executor.load",
                     "Executor.open", "Executor.processes", "Executor.rooms", "Image.*",
                     "Port.*", "Process.*", "Served.*"],
            "pubsub": ["*"],
            "sync": ["*"],
        }  # fmt: skip
        assert roles["reader"]["counter"] == ["Counters.get"]
        async with wetware.connect(node.addr, key=home.key("ada")) as session:
            counters = await session.open("counter", site.interface)
            assert await counters.incr(name="a", by=2) == {"value": 2}
            with pytest.raises(Denied):
                await counters.total()
        async with wetware.connect(node.addr, key=home.key("rita")) as session:
            counters = await session.open("counter", site.interface)
            assert await counters.get(name="a") == {"value": 2}
            with pytest.raises(Denied):
                await counters.incr(name="a", by=1)
        assert ungranted(node) == []


@pytest.mark.long
async def test_what_is_installed_later_waits_for_an_operator(home: Home, site: Site) -> None:
    with home.node("n") as node:
        add_users(node)
    site.counter()
    with home.node("n") as node:
        async with wetware.connect(node.addr, key=home.key("ada")) as session:
            with pytest.raises(Denied, match="installed, not granted to members yet") as denied:
                await session.open("counter", site.interface)
            assert "ww role accept counter" in denied.value.hint
            with pytest.raises(Denied):  # what is proposed is for operators to read
                await session.proposal("counter")
        assert waiting(node) == [True] * 3
        unasked = node.ww("role", "accept", "counter")
        assert unasked.returncode == EXIT_USAGE
        assert "member gets Counters.get Counters.incr of counter" in unasked.stderr
        assert "counter" not in roles_of(node)["member"]

        refused = node.ww("--key", "ada", "role", "accept", "counter", "--yes")
        assert refused.returncode == 77
        node.ww("role", "accept", "counter", "--yes", check=True)
        assert roles_of(node)["reader"]["counter"] == ["Counters.get"]
        again = json.loads(node.ww("role", "accept", "counter", "--json", check=True).stdout)
        assert (again["added"], again["version"]) == ({}, 4)
        assert waiting(node) == [False] * 3
        unknown = node.ww("role", "accept", "countre", "--yes")
        assert "no service 'countre'" in unknown.stderr

        async with wetware.connect(node.addr, key=home.key("ada")) as session:
            counters = await session.open("counter", site.interface)
            assert await counters.incr(name="a", by=2) == {"value": 2}
            ref, _ = await session.share(label="kept")

    # A start without the plugin takes nobody's rights away, for good or for now.
    site.counter(broken="raise ValueError('boom')\n")
    with home.node("n") as node:
        assert (
            "counter" not in json.loads(node.ww("status", "--json", check=True).stdout)["services"]
        )
        assert roles_of(node)["member"]["counter"] == ["Counters.get", "Counters.incr"]
    # Nor does a version that proposes something else.
    site.counter('{"member": frozenset({"Counters.total"})}')
    with home.node("n") as node:
        moved = replace(SturdyRef.parse(ref), addrs=(Multiaddr.parse(node.addr),))
        async with wetware.connect(moved.text) as bearer:
            counters = await bearer.open("counter", site.interface)
            assert await counters.get(name="a") == {"value": 0}
            with pytest.raises(Denied):
                await counters.total()
        assert ungranted(node) == []


@pytest.mark.parametrize(
    ("roles", "why"),
    [
        ('{"member": frozenset({"Cluster.evict"})}', "proposes 'Cluster.evict' for 'member'"),
        ('{"operator": frozenset({"*"})}', "proposes something for a role 'operator'"),
    ],
)
def test_a_hostile_proposal_fails_its_plugin_alone(
    home: Home, site: Site, roles: str, why: str
) -> None:
    site.counter(roles)
    with home.node("n") as node:
        assert set(roles_of(node)["member"]) == MEMBER
        status = json.loads(node.ww("status", "--json", check=True).stdout)
        assert "counter" not in status["services"]
        plugins = json.loads(node.ww("plugin", "list", "--json", check=True).stdout)
        (found,) = (plugin for plugin in plugins if plugin["name"] == "counter")
        assert found["state"] == "failed"
        assert why in found["reason"]


@pytest.mark.long
def test_roles_of_a_contract(home: Home, site: Site) -> None:
    """A try-out keeps what its first start was given; what comes later is written by hand."""
    pytest.importorskip("eth_account", reason="needs the extra: pip install 'wetware[evm]'")
    args = ("--auth", "evm", "--dev")
    env = {"WW_ANVIL": "none"}
    with Home(home.path, env={**home.env, **env}) as evm:

        def has(node: NodeProcess, wallet: str) -> dict[str, list[str]]:
            done = node.ww("--key", wallet, "services", "--json", check=True)
            return {each["name"]: each["methods"] for each in json.loads(done.stdout)}

        with evm.node("n", args=args) as node:
            node.ww("auth", "evm", "login", check=True)
            made = evm.ww("auth", "evm", "new-key", "bob", "--json", check=True)
            address = json.loads(made.stdout)["address"]
            node.ww("auth", "evm", "grant", "member", address, check=True)
            node.ww("--key", "bob", "auth", "evm", "login", check=True)
            assert set(has(node, "bob")) == MEMBER
            assert "counter" not in has(node, "default")
        site.counter()
        with evm.node("n", args=args) as node:
            assert set(has(node, "bob")) == MEMBER
            assert has(node, "default")["counter"] == ["*"]
            assert ungranted(node) == ["counter"]
            text = node.ww("role", "accept", "counter", check=True).stdout
        roles = tomllib.loads(text)["plugins"]["auth_evm"]["roles"]
        assert set(roles) == {"admin", "member", "reader"}
        assert roles["reader"]["services"]["counter"] == ["Counters.get"]
        (evm.path / ".wetware/ww.toml").write_text(text)
        with evm.node("n", args=args) as node:
            assert has(node, "bob")["counter"] == ["Counters.get", "Counters.incr"]
            assert ungranted(node) == []
            done = node.ww("role", "accept", "counter", "--json", check=True)
            assert "have all that counter proposes" in json.loads(done.stdout)["write"]
