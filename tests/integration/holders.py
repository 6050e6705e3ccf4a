"""Holders of a lock that go on after it is lost, and three places that they write to.

Those are keys, a name, and a `ledger`: a service with a file of its own at each node, of which the
tests use the one at `c`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import wetware
from wetware import rpc
from wetware.errors import WetwareError
from wetware.testing import NodeProcess

from ..packaging import third_party

LOCK = "guard"
PATH = "/guarded"
PLACES = ("kv", "name", "ledger")
WRITTEN = dict.fromkeys(PLACES, "written")
FENCED = dict.fromkeys(PLACES, "capability.denied.fenced")

SCHEMA = """\
@0x8d7e0a5b5d6e4f37;

interface Ledger {
  append @0 (line :Text);
  read @1 () -> (lines :List(Text));
}
"""
SOURCE = """\
from pathlib import Path
from wetware import rpc
from wetware.hookspecs import Service, hookimpl

SCHEMA = rpc.load(Path(__file__).with_name("ledger.capnp"))


class Ledger(rpc.Servant, interface=SCHEMA.Ledger):
    def __init__(self, file):
        self.file = file

    async def append(self, line):
        with self.file.open("a") as file:
            file.write(line + "\\n")

    async def read(self):
        return {"lines": self.file.read_text().split() if self.file.exists() else []}


class LedgerService(Service):
    name, interface, entries = "ledger", SCHEMA.Ledger, "one"

    def __init__(self, ctx):
        self.file = ctx.data_dir / "lines"

    def bootstrap(self, principal):
        return Ledger(self.file)


@hookimpl
def ww_register_services(ctx):
    return (LedgerService(ctx),)
"""


def install(site: Path) -> Path:
    """The plugin, in a new directory for PYTHONPATH; returns its schema."""
    site.mkdir()
    third_party.install(site, "ledger", SOURCE, files=(("ledger.capnp", SCHEMA),))
    return site / "ww_ledger" / "ledger.capnp"


async def ledger_of(session: Any, schema: Path) -> Any:
    """The ledger of a session, which is at its node."""
    return await session.open("ledger", rpc.load(schema).Ledger)


def shown(hold: bytes, token: bytes) -> Any:
    """What a holder shows: a `Held`, as far as writes look at it."""

    async def signed() -> bytes:
        return token

    return SimpleNamespace(hold=hold, token=signed)


async def write(session: Any, held: Any, text: str, schema: Path) -> dict[str, str]:
    """Write to all places under what is held, or was: "written", or the error's code, of each."""

    async def to_ledger() -> None:
        async with session.node("name=c") as there:
            part = await there.attenuate({"ledger": ()}, fence=await held.token())
            await (await ledger_of(part, schema)).append(line=text)

    said = {}
    for place, writing in (
        ("kv", lambda: session.kv.put(PATH, text, fence=held)),
        ("name", lambda: session.names.set(PATH, text, fence=held)),
        ("ledger", to_ledger),
    ):
        try:
            await writing()
        except WetwareError as exc:
            said[place] = exc.code
        else:
            said[place] = "written"
    return said


async def found(session: Any, schema: Path) -> dict[str, Any]:
    """What the places have."""
    entry, name = await session.kv.get(PATH), await session.names.get(PATH)
    async with session.node("name=c") as there:
        lines = (await (await ledger_of(there, schema)).read())["lines"]
    return {"kv": entry and entry.value.decode(), "name": name.value, "ledger": lines}


class Holder:
    """A process that takes the lock, by a login at `node`, and writes when it is told to.

    It never notices that the lock is lost: it writes under what it got with it, for ever.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    async def write(self, text: str) -> dict[str, str]:
        """See `write`."""
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write(f"{text}\n")
        stdin.flush()
        said: dict[str, str] = await self._line()
        return said

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    async def _line(self) -> Any:
        assert self._process.stdout is not None
        line = await asyncio.to_thread(self._process.stdout.readline)
        assert line, "the holder has died"
        return json.loads(line)


@contextlib.asynccontextmanager
async def holding(node: NodeProcess, schema: Path, ttl_s: float = 2) -> AsyncIterator[Holder]:
    """A Holder that has the lock."""
    process = subprocess.Popen(  # noqa: ASYNC220  # at once
        [sys.executable, "-m", __name__, str(node.data_dir), str(schema), str(ttl_s)],
        env=node.home.env,
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    holder = Holder(process)
    try:
        assert await holder._line() == "held"
        yield holder
    finally:
        process.kill()
        await asyncio.to_thread(process.communicate)


def _tell(said: object) -> None:
    sys.stdout.write(f"{json.dumps(said)}\n")
    sys.stdout.flush()


async def _main(data_dir: str, schema: Path, ttl_s: float) -> None:
    async with wetware.connect(data_dir=data_dir, reconnect=True) as session:
        taken: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        async def hold() -> None:
            with contextlib.suppress(WetwareError):
                async with session.sync.lock(LOCK, ttl_s=ttl_s) as held:
                    taken.set_result(shown(held.hold, await held.token()))
                    await asyncio.Event().wait()

        holding = asyncio.create_task(hold())
        held = await taken
        _tell("held")
        while line := await asyncio.to_thread(sys.stdin.readline):
            _tell(await write(session, held, line.strip(), schema))
        await holding


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])))
