"""A login while the audit log cannot be written: it ends things, and gives nothing."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from plugins.audit.tests.parts import Disk, open_log, records_to

from wetware import rpc
from wetware.broker.protocol import CORE
from wetware.broker.session import SessionServant
from wetware.client.session import Session, opened
from wetware.errors import Denied, InvalidArgument, Unrecorded, WetwareError
from wetware.hookspecs import RoleProfile
from wetware.identity import Principal
from wetware.node.services.grants import GrantsService
from wetware_audit.chain import files

from .cluster import Backend, MemNode
from .parts import Clock

pytestmark = pytest.mark.anyio


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Any]:
    operator = RoleProfile({"box": frozenset({"*"}), "grants": frozenset({"*"})})
    some = RoleProfile({"grants": frozenset({"Grants.list", "Grants.resume"})})
    backend = Backend({"operator": operator, "some": some}, {"ada": {"operator"}, "bo": {"some"}})
    clock, disk = Clock(), Disk()
    made = MemNode("a", tmp_path, backend, clock)
    log = open_log(tmp_path / "audit", clock=clock, open_file=disk)
    async with rpc.runtime(), made.running():
        made.broker.audit = records_to(log, clock)
        grants = GrantsService(made.tree, made.broker.audit, lambda: None)
        services: Any = {"box": made.box, "grants": grants}
        made.broker.services = services
        made.disk, made.log = disk, log
        yield made
    disk.left = None
    log.close()


@contextlib.asynccontextmanager
async def login(node: Any, user: str, role: str) -> AsyncIterator[Session]:
    """A session of a login that could not be recorded, as the Gate makes it."""
    grant = node.broker.open_session(Principal("fake", user), [role])
    record = functools.partial(node.broker.audit.admit, "login.granted", principal=user)
    with pytest.raises(Unrecorded):
        await record()
    servant = SessionServant(node.broker, grant, frozenset({role}), record)
    path = node.path.with_suffix(f".{grant.id}")
    async with (
        rpc.serve_unix(path, lambda _: rpc.guarded(servant, grant)),
        await rpc.connect_unix(path) as connection,
    ):
        yield await opened(connection.bootstrap(CORE.Session), None, node.broker.peer_id)


def events(tmp_path: Path) -> list[str]:
    lines = [line for path in files(tmp_path / "audit") for line in path.read_bytes().splitlines()]
    return [str(json.loads(line)["event"]) for line in lines]


async def refused(awaitable: Any) -> None:
    with pytest.raises(WetwareError) as caught:
        await awaitable
    assert caught.value.code == "audit", caught.value


async def test_it_shows_and_ends_and_gives_nothing(node: Any, tmp_path: Path) -> None:
    async with node.login("ada", ["operator"]) as before:
        _, grant = await before.share({"box": []})
        node.disk.left = 0
        async with login(node, "ada", "operator") as session:
            await refused(session.open("box", node.box.interface))
            await refused(session.share({"box": []}))
            await refused(session.attenuate({"box": []}))
            assert [g.id for g in await session.grants() if g.kind == "share"] == [grant.id]
            grants = await session.open("grants", CORE.Grants)
            assert (await grants.call("list", principal="", limit=0))["matched"]
            with pytest.raises(Denied, match="to end things: the audit log cannot be written"):
                await grants.call("resume")
            assert (await grants.call("revoke", id=grant.id, reason="stolen"))["cut"] == 1
            assert node.tree.grants.get(grant.id) is None

            node.disk.left = None  # it is recorded before anything is given through it
            async with asyncio.timeout(60):
                while node.log.failing:
                    await asyncio.sleep(0.01)
            assert "login.granted" not in events(tmp_path)
            await session.open("box", node.box.interface)
            await session.share({"box": []})
            found = events(tmp_path)
            last = found.index("login.granted")
            assert found[last : last + 3] == ["login.granted", "service.opened", "grant.shared"]
            # What was opened meanwhile stays as narrow; what is opened now is not.
            with pytest.raises(Denied):
                await grants.call("resume")
            await (await session.open("grants", CORE.Grants)).call("resume")


async def test_a_clock_is_trusted_only_once_that_is_recorded(node: Any, tmp_path: Path) -> None:
    ada, told, saw = Principal("fake", "ada"), list[str](), iter([None, None, 7200.0, None, None])
    node.broker.clock_trusted = lambda: told.append(node.tree.clock_wrong)
    node.broker.judge_clock(7200.0, alone=False)
    wrong = node.tree.clock_wrong
    node.disk.left = 0
    await refused(node.broker.trust_clock(lambda: next(saw), ada))
    assert (node.tree.clock_wrong, told) == (wrong, [])
    node.disk.left = None
    async with asyncio.timeout(60):
        while node.log.failing:
            await asyncio.sleep(0.01)
    with pytest.raises(InvalidArgument, match=r"\+7200 s"):  # known while it was recorded
        await node.broker.trust_clock(lambda: next(saw), ada)
    assert (node.tree.clock_wrong, told) == (wrong, [])
    await node.broker.trust_clock(lambda: next(saw), ada)
    assert (node.tree.clock_wrong, told) == ("", [wrong])
    assert events(tmp_path)[-1] == "clock.trusted"


async def test_no_more_than_its_roles_allow(node: Any) -> None:
    node.disk.left = 0
    async with login(node, "bo", "some") as session:
        grants = await session.open("grants", CORE.Grants)
        await grants.call("list", principal="", limit=0)
        for beyond in ("revoke", "resume"):
            args = {"id": "0" * 16, "reason": ""} if beyond == "revoke" else {}
            with pytest.raises(Denied):
                await grants.call(beyond, **args)
