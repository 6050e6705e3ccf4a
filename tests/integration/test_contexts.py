"""Nodes by name from the command line and the library, and contexts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import wetware
from wetware.client import contexts
from wetware.errors import AuthError
from wetware.testing import Home, NodeProcess

pytestmark = pytest.mark.timeout(240)
WITHIN_S = 60.0
Pair = tuple[NodeProcess, NodeProcess]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Nodes here, and rented with zone=cloud."""
    with (
        Home(tmp_path_factory.mktemp("home")) as home,
        home.node("here") as here,
        home.node("rented", join=here, args=["--label", "zone=cloud"]) as rented,
    ):
        for node in (here, rented):
            node.wait_members([here.peer_id, rented.peer_id], within_s=WITHIN_S)
        yield here, rented


@pytest.fixture
def apart(pair: Pair, tmp_path: Path) -> Home:
    """A home of its own, with the user's key: no context is left in the other's."""
    home, keys = Home(tmp_path), tmp_path / ".wetware" / "keys"
    keys.parent.mkdir(mode=0o700)
    keys.symlink_to(pair[0].home.path / ".wetware" / "keys")
    return home


def _node(home: Home, *args: str, env: dict[str, str] | None = None) -> str:
    """Which node `ww whoami ARGS` logs in at."""
    return str(json.loads(home.ww("whoami", "--json", *args, check=True, env=env).stdout)["node"])


@pytest.mark.parametrize("how", ["rented", "zone=cloud", "name=rented", "peer", "end"])
def test_a_node_by_name_on_the_command_line(pair: Pair, how: str) -> None:
    here, rented = pair
    name = {"peer": rented.peer_id, "end": rented.peer_id[-8:]}.get(how, how)
    for args in (("--node", name, "status", "--json"), ("status", "--json", "--node", name)):
        done = here.ww(*args, check=True)
        assert json.loads(done.stdout)["peer_id"] == rented.peer_id
        assert done.stderr == ""
    done = here.ww("status", "--json", check=True, env={"WW_NODE": name})
    assert json.loads(done.stdout)["peer_id"] == rented.peer_id


def test_this_node_by_name(pair: Pair) -> None:
    here, _ = pair
    status = here.ww("--node", "here", "status", "--json", check=True)
    assert json.loads(status.stdout)["peer_id"] == here.peer_id


@pytest.mark.parametrize("name", ["nobody", "zone=moon", "12D3KooWNobody"])
def test_nobody_of_that_name(pair: Pair, name: str) -> None:
    done = pair[0].ww("--node", name, "whoami")
    assert done.returncode == 1
    assert name in done.stderr
    assert f"ww --data-dir {pair[0].data_dir} ls" in done.stderr


def test_an_address_without_its_form_is_no_name(pair: Pair) -> None:
    done = pair[0].ww("--node", "192.0.2.1:4001", "whoami")
    assert done.returncode == 2
    assert "/ip4/" in done.stderr


def test_contexts_of_each_kind(pair: Pair, apart: Home) -> None:
    here, rented = pair
    directory = ("--data-dir", str(here.data_dir))
    apart.ww("context", "add", "far", "--node", rented.addr, check=True)
    apart.ww("context", "add", "dir", *directory, check=True)
    apart.ww("context", "add", "cloud", "--node", "zone=cloud", *directory, check=True)
    first = apart.ww("--context", "far", "whoami", check=True)
    assert "first login in the context far" in first.stderr
    assert apart.ww("--context", "far", "whoami", check=True).stderr == ""
    assert _node(apart, "--context", "far") == rented.peer_id
    assert _node(apart, "--context", "dir") == here.peer_id
    assert _node(apart, env={"WW_CONTEXT": "cloud"}) == rented.peer_id
    # A name is looked up where the context leads, and a flag counts for more than a context.
    assert _node(apart, "--context", "far", "--node", "here") == here.peer_id
    assert _node(apart, "--context", "cloud", "--node", "here") == here.peer_id
    apart.ww("context", "use", "far", check=True)
    assert _node(apart) == rented.peer_id
    assert _node(apart, "--node", here.addr) == here.peer_id
    assert _node(apart, *directory) == here.peer_id
    listed = json.loads(apart.ww("context", "ls", "--json", check=True).stdout)
    cluster = here.info["cluster"]
    pinned = {each["name"]: each["cluster"] for each in listed}
    assert pinned == {"local": "", "far": cluster, "dir": cluster, "cloud": cluster}


def test_another_cluster_in_a_context_is_refused_until_it_is_accepted(
    pair: Pair, apart: Home
) -> None:
    here, rented = pair
    expected, directory = "0" * 40, ("--data-dir", str(here.data_dir))
    for name, args in {
        "far": ("--node", rented.addr),
        "dir": directory,
        "cloud": ("--node", "rented", *directory),
    }.items():
        apart.ww("context", "add", name, *args, "--cluster", expected, check=True)
        refused = apart.ww("whoami", "--context", name)
        assert refused.returncode == 77
        assert expected in refused.stderr
        words = refused.stderr.partition("ww context accept ")[2].split()
        assert words == [name, here.info["cluster"]]
        apart.ww("context", "accept", *words, check=True)
        assert apart.ww("whoami", "--context", name, check=True).stderr == ""


@pytest.mark.anyio
async def test_the_library(
    pair: Pair, apart: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, rented = pair
    monkeypatch.setenv("WW_HOME", str(tmp_path / ".wetware"))
    for name in [name for name in os.environ if name.startswith("WW_") and name != "WW_HOME"]:
        monkeypatch.delenv(name)
    async with wetware.connect("zone=cloud", data_dir=here.data_dir) as session:
        assert session.identity.node == rented.peer_id
    made = contexts.Context(node="rented", data_dir=str(here.data_dir))
    async with wetware.connect(context=made) as session:
        assert session.identity.node == rented.peer_id
        assert session.notice == ""
    contexts.update(lambda known: known.add("cloud", made))
    async with wetware.connect(context="cloud") as session:
        assert session.identity.node == rented.peer_id
        assert "first login in the context cloud" in session.notice
    contexts.update(lambda known: known.use("cloud"))
    async with wetware.connect() as session:
        assert session.identity.node == rented.peer_id
        assert session.notice == ""
        async with session.node("here") as back:
            assert back.identity.node == here.peer_id
    contexts.update(lambda known: known.pin("cloud", "0" * 40))
    with pytest.raises(AuthError) as caught:
        async with wetware.connect():
            pass
    assert caught.value.code == "auth.wrong_cluster"
