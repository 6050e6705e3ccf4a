"""A node whose auth backend is a try-out keeps to this machine; the backend is a third party's."""

from __future__ import annotations

import importlib.util
import json
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.ports import free_port
from wetware.errors import EXIT_BUSY, EXIT_CONFIG
from wetware.testing import Home

TRIAL = """\
import json
from dataclasses import dataclass

from wetware.hookspecs import hookimpl, setting
from wetware_auth_local.backend import LocalBackend
from wetware_auth_local.config import AuthLocalConfig


@dataclass(frozen=True, slots=True)
class TrialConfig(AuthLocalConfig):
    colour: str = setting("blue", "Of the box.")
    size: int = setting(1, "Of the box.")


class Trial(LocalBackend):
    name = "trial"


@hookimpl
def ww_register_config():
    return TrialConfig


@hookimpl
def ww_register_auth(ctx):
    seen = {
        "dev": ctx.dev,
        "configured": sorted(ctx.configured),
        "founding": ctx.founding.hex() if ctx.founding is not None else None,
    }
    with (ctx.data_dir / "seen.jsonl").open("a") as file:
        file.write(json.dumps(seen) + "\\n")
    backend = Trial(ctx)
    backend.try_out = "roles come from a box of sweets\\ntry: ww sub chat"
    return backend


class Finder:
    name = "finder"

    async def advertise(self, addrs):
        raise AssertionError("a try-out announces itself")

    async def find_peers(self):
        raise AssertionError("a try-out looks for others")
        yield


@hookimpl
def ww_register_discovery(ctx):
    (ctx.data_dir / "asked").touch()
    return Finder()
"""


def _third_party() -> ModuleType:
    path = Path(__file__).parents[1] / "packaging" / "third_party.py"
    spec = importlib.util.spec_from_file_location("third_party", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[Home]:
    """A home with the auth backend `trial`, which is a try-out, selected."""
    site = tmp_path / "site"
    site.mkdir()
    _third_party().install(site, "auth_trial", TRIAL)
    env = {"PYTHONPATH": str(site), "WW_NODE_AUTH": "trial"}
    with Home(tmp_path / "home", env=env) as home:
        yield home


def _refused(home: Home, *args: str, code: int = EXIT_CONFIG, **env: str) -> str:
    """What `ww node` says as it exits with `code`."""
    done = home.ww("--data-dir", str(home.path / "n"), "node", *args, env=env, timeout=60)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_try_out_says_so_and_meets_nobody(trial: Home) -> None:
    with trial.node("n") as node:
        node.wait_log(f"ww --data-dir {node.data_dir} sub chat")
        said = node.log.read_text()
        assert "THIS IS A TRY-OUT" in said
        assert "roles come from a box of sweets" in said
        assert " invite" not in said, "an invitation is of no use here"
        plugin = node.data_dir / "plugins/auth_trial"
        assert not (plugin / "asked").exists(), "discovery was asked for"
        mine = node.info["addrs"]
        assert all(addr.startswith("/ip4/127.0.0.1/") for addr in mine)


def test_invitations_and_certificates_are_refused(trial: Home) -> None:
    stranger = trial.node_id("other")
    with trial.node("n") as node:
        for args in (["invite"], ["invite", "--peer", str(stranger)]):
            done = node.ww(*args)
            assert done.returncode == 77, (args, done.stdout, done.stderr)
            assert "tries out its auth backend" in done.stderr
            assert "wwt1" not in done.stdout
        assert node.ww("whoami").returncode == 0


def test_what_listens_everywhere_by_default_listens_on_loopback(trial: Home) -> None:
    """The default is 0.0.0.0: nobody told this node to be reachable."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 4001))
        except OSError:
            pytest.skip("port 4001 is in use")
        taken.listen()
        said = _refused(trial, "--dev", code=EXIT_BUSY)
        assert "/ip4/127.0.0.1/tcp/4001" in said, "the default was narrowed before it was bound"
        assert "0.0.0.0" not in said  # noqa: S104  # compared, not bound


@pytest.mark.parametrize("how", ["flag", "env"])
def test_an_address_that_others_reach_is_refused(trial: Home, how: str) -> None:
    listen = f"/ip4/0.0.0.0/tcp/{free_port()}"
    said = (
        _refused(trial, "--listen", listen)
        if how == "flag"
        else _refused(trial, WW_NODE_LISTEN=listen)
    )
    assert "listens on loopback only" in said
    assert listen in said
    assert ("--listen" if how == "flag" else "WW_NODE_LISTEN") in said


def test_peers_are_refused(trial: Home) -> None:
    peer = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{trial.node_id('other')}"
    said = _refused(trial, "--listen", "/ip4/127.0.0.1/tcp/0", "--peer", peer)
    assert "connects to no other node" in said


def test_join_is_refused_and_with_dev_before_the_ticket_is_spent(
    trial: Home, tmp_path: Path
) -> None:
    with Home(tmp_path / "real") as real, real.node("a") as a:
        ticket = a.invite()
        loopback = ("--listen", "/ip4/127.0.0.1/tcp/0")
        said = _refused(trial, *loopback, "--dev", "--join", ticket)
        assert "joins no cluster" in said
        assert ticket not in said, "a ticket is a secret"
        assert not (trial.path / "n/plugins").exists(), "something was made for it"
        with real.node("b", join=ticket) as b:
            b.wait_members([a.peer_id])


def test_what_the_backend_is_told(trial: Home) -> None:
    """Which settings were given, and what the data directory's cluster was founded on."""
    with trial.node("n") as node:
        seen = node.data_dir / "plugins/auth_trial/seen.jsonl"
    config = trial.path / ".wetware/ww.toml"
    config.parent.mkdir(exist_ok=True)
    config.write_text('[plugins.auth_trial]\ncolour = "blue"\n')
    with trial.node("n", args=("--dev",)):
        pass
    first, second = map(json.loads, seen.read_text().splitlines())
    assert first == {"dev": False, "configured": [], "founding": None}
    assert second["dev"] is True
    assert second["configured"] == ["colour"], "set to its default, and yet set"
    assert re.fullmatch("[0-9a-f]+", second["founding"])


def test_dev_with_a_backend_that_has_nothing_to_try_out(home: Home) -> None:
    said = _refused(home, "--listen", "/ip4/127.0.0.1/tcp/0", "--dev")
    assert "'local' has nothing to try out" in said


def test_a_backend_whose_try_out_is_no_text_is_refused(tmp_path: Path) -> None:
    """A truthy object that is no text must not be taken for a real configuration, or crash."""
    site = tmp_path / "site"
    site.mkdir()
    wrong = TRIAL.replace("backend.try_out = ", "backend.try_out = True or ")
    _third_party().install(site, "auth_trial", wrong)
    env = {"PYTHONPATH": str(site), "WW_NODE_AUTH": "trial"}
    with Home(tmp_path / "home", env=env) as home:
        assert "try_out is no text" in _refused(home, "--listen", "/ip4/127.0.0.1/tcp/0")
