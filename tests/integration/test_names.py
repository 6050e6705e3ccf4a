"""Names of the cluster in the place of CIDs: the store of names is at `a`, all is asked at `b`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import wetware
from wetware.errors import EXIT_FAILED, EXIT_USAGE, Unsupported
from wetware.testing import Home, NodeProcess
from wetware_blob.client import BlobStore

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]

Pair = tuple[NodeProcess, NodeProcess]


@contextlib.asynccontextmanager
async def at(node: NodeProcess) -> AsyncIterator[wetware.Session]:
    async with wetware.connect(data_dir=node.data_dir, key=node.home.key()) as session:
        yield session


@pytest.fixture(scope="module")
def live(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The CID of a site, which is called /site/live."""
    site = tmp_path_factory.mktemp("site")
    (site / "css").mkdir()
    (site / "css" / "a.css").write_text("a {}")
    (site / "index.html").write_text("hello")
    cid = pair[0].ww("blob", "put", "--name", "site", str(site), check=True).stdout.strip()
    pair[0].ww("name", "set", "/site/live", cid, check=True)
    return cid


def test_every_command_of_blob_takes_a_name(pair: Pair, live: str, tmp_path: Path) -> None:
    _, b = pair
    name = "name:/site/live"
    assert b.ww("blob", "cat", f"{name}//css/a.css", check=True).stdout == "a {}"
    assert json.loads(b.ww("blob", "stat", name, "--json", check=True).stdout)["cid"] == live
    listed = json.loads(b.ww("blob", "ls", name, "--json", check=True).stdout)
    assert sorted(entry["name"] for entry in listed) == ["css", "index.html"]
    b.ww("blob", "get", name, "-o", str(tmp_path / "copy"), check=True)
    assert (tmp_path / "copy" / "index.html").read_text() == "hello"
    assert b.ww("blob", "get", f"{name}//css", check=True).stderr == "wrote css\n"
    assert b.ww("blob", "get", name, check=True).stderr == "wrote live\n"
    assert b.ww("blob", "export", name, check=True).stderr == "wrote live.car\n"
    added = b.ww("blob", "pin", "add", name, "--name", "mine", "--json", check=True)
    assert json.loads(added.stdout)["cid"] == live
    for ask in (("pin", "ls", name), ("pin", "ls", name, "--all")):
        pins = json.loads(b.ww("blob", *ask, "--json", check=True).stdout)
        assert [(pin["root"], pin["name"]) for pin in pins] == [(live, "mine")]
    assert "1 pin ended" in b.ww("blob", "pin", "rm", name, check=True).stderr
    b.ww("blob", "pin", "add", name, check=True)
    assert "1 pin ended" in b.ww("blob", "rm", name, check=True).stderr


async def test_the_library_takes_a_name_as_it_stands(pair: Pair, live: str, tmp_path: Path) -> None:
    a, b = pair
    async with at(b) as session, at(a) as there:
        async with session.blob.open("name:/site/live//index.html") as blob:
            assert await blob.read() == b"hello"
        other = (await there.blob.put(b"other")).cid
        before = (await there.names.get("/site/live")).revision
        try:
            await there.names.set("/site/live", other, expected=before)
            await session.blob.get("name:/site/live", tmp_path / "now")
            assert (tmp_path / "now").read_bytes() == b"other"
        finally:
            await there.names.set("/site/live", live)
        assert await session.blob.resolve("name:/site/live//x") == f"{live}/x"
        for plain in (live, f"{live}/css", "/site/live", "name", ""):
            assert await session.blob.resolve(plain) == plain
        with pytest.raises(Unsupported, match="a capability alone knows none"):
            await BlobStore(await session.open("blob", BlobStore.INTERFACE)).rm("name:/site/live")


def test_what_is_no_name_and_names_of_what_is_no_cid(pair: Pair, live: str) -> None:
    a, b = pair
    none = b.ww("blob", "get", "name:/site/nothing")
    assert (none.returncode, none.stdout) == (EXIT_FAILED, "")
    assert "there is no name /site/nothing" in none.stderr
    for wrong in ("name:site", "name:", "name:/site/"):
        refused = b.ww("blob", "cat", wrong)
        assert (refused.returncode, "is no path" in refused.stderr) == (EXIT_USAGE, True)
    plain = b.ww("blob", "cat", "/site/live")  # no name is meant where it is not said
    assert (plain.returncode, "a name is written name:/site/live" in plain.stderr) == (2, True)
    for value in ("node:12D3KooW", "ww1.secret", "/etc/passwd", "name:/site/live", f"{live}x"):
        a.ww("name", "set", "/site/odd", value, check=True)
        for command in (("blob", "cat", "name:/site/odd"), ("run", "name:/site/odd")):
            refused = b.ww(*command)
            assert refused.returncode == EXIT_USAGE
            assert "the name /site/odd stands for what is no CID" in refused.stderr
            assert "secret" not in refused.stderr


async def test_without_names_at_the_node_or_here(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    with home.node("alone", env={"WW_PLUGINS_DISABLE": "sync"}) as node:
        for command in (("blob", "cat", "name:/x"), ("run", "name:/x")):
            refused = node.ww(*command)
            assert refused.returncode == EXIT_FAILED, refused.stderr
            assert "'name:/x' is a name: this node has no service 'names'" in refused.stderr
        async with at(node) as session:
            monkeypatch.setattr("wetware.client.session.find", lambda *_: None)
            with pytest.raises(Unsupported, match="has no client here") as caught:
                await session.named("name:/x")
            assert caught.value.code == "unsupported.names"
