"""How an application finds what a service can do: by name, schema, in an editor and in help()."""

from __future__ import annotations

import ast
import pydoc
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import wetware
from wetware.broker.protocol import CORE
from wetware.client import bundled, installed, session
from wetware.client.installed import CLIENT_GROUP, services
from wetware.client.session import Opening, Session
from wetware.errors import Unsupported


class Box:
    """Stands for a session's reference: opens everything, and answers with what was called."""

    closed = False

    def __init__(self) -> None:
        self.connection = SimpleNamespace(closed=False)
        self.calls: list[tuple[str, dict[str, object]]] = []

    async def call(self, method: str, **params: object) -> dict[str, Any]:
        self.calls.append((method, params))
        return {"service": self} if method == "open" else {}

    def cast(self, interface: object) -> Box:
        return self


def made() -> tuple[Session, Box]:
    box = Box()
    return Session(box, None, None), box  # type: ignore[arg-type]


@pytest.mark.anyio
async def test_a_service_needs_nothing_but_its_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, box = made()
    counter = opened.service("counter", CORE.Grants)
    assert "resume" in dir(counter)
    with pytest.raises(AttributeError, match="Grants has no method 'reset'"):
        _ = counter.reset
    assert box.calls == [], "nothing is opened before it is used"
    await counter.list(principal="p", limit=3)
    assert box.calls == [("open", {"name": "counter"}), ("list", {"principal": "p", "limit": 3})]

    point = metadata.EntryPoint("counter", "wetware.broker.protocol:CORE.Grants", CLIENT_GROUP)
    dist = SimpleNamespace(name="somebody-s", entry_points=metadata.EntryPoints([point]))
    monkeypatch.setattr(installed, "distributions", lambda: [dist])
    assert isinstance(opened.service("counter"), Opening), "the interface alone is installed"
    assert isinstance(opened.counter, Opening)
    await opened.counter.resume()
    assert box.calls[-1] == ("resume", {})


def test_a_service_without_a_schema_says_so_at_once() -> None:
    opened, _ = made()
    with pytest.raises(Unsupported, match=r"no schema of a service 'nope'.*pubsub") as caught:
        opened.service("nope")
    assert "session.service('nope', INTERFACE)" in caught.value.hint
    assert opened.service("node").interface == CORE.Node


def test_ours_comes_before_that_of_others_wherever_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, points in (
        ("a", b"pubsub = builtins:int\ntheirs = builtins:int"),
        ("b", b"theirs = builtins:str"),
        ("c", b"\xff"),
    ):
        info = tmp_path / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        text = f"[{CLIENT_GROUP}]\n".encode() + points
        (info / "entry_points.txt").write_bytes(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert installed.find(CLIENT_GROUP, "pubsub").__module__ == "wetware_pubsub.client"
    assert installed.find(CLIENT_GROUP, "theirs") is int
    assert installed.find(CLIENT_GROUP, "nope") is None


def test_dir_shows_services() -> None:
    names = dir(made()[0])
    assert {"pubsub", "cluster", "grants", "grants_service", "timeout_s"} <= set(names)
    assert services() <= {name.removesuffix("_service") for name in names}


def test_every_bundled_client_has_its_type() -> None:
    """What a type checker takes `session.NAME` for is the class that it is."""
    tree = ast.parse(Path(bundled.__file__).read_text())
    typed = {
        node.target.id: node.annotation.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(node.annotation, ast.Name)
    }
    own = set(vars(session.Session))
    ours = {
        f"{point.name}_service" if point.name in own else point.name: point.attr
        for point in metadata.entry_points(group=CLIENT_GROUP)
        if point.dist is not None and point.dist.name == "wetware"
    }
    assert typed == ours


def test_the_committed_api_reference_is_up_to_date() -> None:
    docs = Path(__file__).parents[3] / "docs" / "reference"
    made = subprocess.run(
        [sys.executable, docs / "api.py"], capture_output=True, text=True, check=True
    )
    assert (docs / "api.md").read_text() == made.stdout, (
        "run: python docs/reference/api.py > docs/reference/api.md"
    )
    for name in (*wetware.__all__, "Session.service", "Topic.publish", "Subscription", "TimedOut"):
        assert name == "__version__" or f"`{name}`" in made.stdout


def test_help_lists_what_there_is() -> None:
    text = pydoc.plain(pydoc.render_doc(wetware))
    for name in wetware.__all__:
        assert name in dir(wetware)
        assert name in text
    assert "A logged-in connection" in text
    assert "Log in to a node" in text
