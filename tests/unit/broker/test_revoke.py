"""An end is answered when it is in force, on disk and on record; what is answered is not undone."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from plugins.audit.tests.parts import open_log, records_to

from wetware import rpc
from wetware.broker.protocol import CORE
from wetware.errors import Revoked, WetwareError
from wetware.hookspecs import RoleProfile
from wetware.identity import Principal
from wetware.node.services.grants import GrantsService
from wetware_audit.chain import files
from wetware_audit.log import _append_to

from .cluster import Backend, MemNode, box
from .parts import Clock

pytestmark = pytest.mark.anyio


class SlowDisk:
    """Writes nothing while it is stopped."""

    def __init__(self) -> None:
        self.going = threading.Event()
        self.going.set()

    def __call__(self, path: Path) -> Any:
        file = _append_to(path)
        write = file.write

        def slow(data: Any) -> int:
            self.going.wait(60)
            return int(write(data))

        class Slow:
            fileno, close = file.fileno, file.close

        Slow.write = staticmethod(slow)  # type: ignore[attr-defined]
        return Slow


@pytest.fixture
async def disk(tmp_path: Path) -> AsyncIterator[SlowDisk]:
    made = SlowDisk()
    yield made
    made.going.set()


@pytest.fixture
async def node(tmp_path: Path, disk: SlowDisk) -> AsyncIterator[MemNode]:
    profile = RoleProfile({"box": frozenset({"*"}), "grants": frozenset({"*"})})
    backend = Backend({"member": profile}, {"ada": {"member"}})
    clock = Clock()
    made = MemNode("a", tmp_path, backend, clock)
    log = open_log(tmp_path / "audit", clock=clock, open_file=disk)
    async with rpc.runtime(), made.running():
        made.broker.audit = records_to(log, clock)
        broker = made.broker
        grants = GrantsService(made.tree, broker.audit, lambda: broker.confirmed())
        services: Any = {"box": made.box, "grants": grants}
        made.broker.services = services
        yield made
    disk.going.set()
    log.close()


def recorded(tmp_path: Path, event: str) -> list[Any]:
    lines = [line for path in files(tmp_path / "audit") for line in path.read_bytes().splitlines()]
    return [record for record in map(json.loads, lines) if record["event"] == event]


async def _for_ever(call: Callable[[], Awaitable[object]]) -> None:
    while True:
        await call()


async def test_a_revocation_is_in_force_at_once_and_answered_when_it_is_on_record(
    node: MemNode, disk: SlowDisk, tmp_path: Path
) -> None:
    async with node.login("ada") as session:
        ref, grant = await session.share({"box": []})
        async with node.redeem(ref) as bearer:
            held = await box(bearer)
            disk.going.clear()
            revoking = asyncio.create_task(session.revoke(grant.id))
            with pytest.raises(Revoked):
                await _for_ever(lambda: held.call("get", key="k"))
            await node.store.written()
            await asyncio.sleep(0.05)
            assert not recorded(tmp_path, "grant.revoked")
            assert not revoking.done(), "a crash now would leave it out of the log"
            again = asyncio.create_task(session.revoke(grant.id))
            await asyncio.sleep(0.05)
            assert not again.done(), "nor is it answered to who asks once more"
            disk.going.set()
            await revoking
            await again
    assert [record["grant"] for record in recorded(tmp_path, "grant.revoked")] == [grant.id]


async def _by_session(session: Any, node: MemNode) -> None:
    await session.revoke((await session.whoami()).grant)


async def _by_role(session: Any, node: MemNode) -> None:
    (root,) = node.tree.roots(Principal("fake", "ada"))
    await session.revoke(root.id)


@pytest.mark.parametrize("end", [_by_session, _by_role])
async def test_what_was_shared_from_the_revoked_session_itself_is_over_before_the_answer(
    node: MemNode, end: Callable[[Any, MemNode], Any]
) -> None:
    """The answer goes out under the session, and what would come back after a crash is gone."""
    async with node.login("ada") as session:
        _, grant = await session.share({"box": []})
        await end(session, node)
        assert node.tree.grants.get(grant.id) is None
        assert not node.store._db.execute("SELECT * FROM grants WHERE durable").fetchall()
        with pytest.raises(WetwareError):
            await _for_ever(session.whoami)


async def test_the_end_of_all_sessions_is_on_record_before_the_answer(
    node: MemNode, tmp_path: Path
) -> None:
    ada = Principal("fake", "ada")
    async with node.login("ada") as session:
        _, grant = await session.share({"box": []})
        admin = await session.open("grants", CORE.Grants)
        reply = await admin.call("end_sessions", principal=str(ada), reason="")
        assert reply["cut"] == 3, "the session, the service that it opened, and the share"
        assert node.tree.grants.get(grant.id) is None
        (record,) = recorded(tmp_path, "sessions.ended")
        assert record["principal"] == str(ada)
        with pytest.raises(WetwareError):
            await _for_ever(session.whoami)
