"""`Ww.Source`: one plugin's bytes in another one's hands, and grants of a part of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import wetware
from wetware import rpc
from wetware.client import Session
from wetware.errors import EXIT_USAGE, CapabilityError, Denied
from wetware.testing import Home, NodeProcess

from ..packaging import third_party

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]
SIZE = 1 << 20
END = (1 << 64) - 1

SHELF_SCHEMA = """\
@0x8d7e0a5b5d6e4f34;
using Ww = import "/wetware/schema/ww.capnp";

interface Shelf { open @0 (title :Text $Ww.name) -> (book :Book); }
interface Book extends(Ww.Source) { title @0 () -> (title :Text); }
"""
SHELF = """\
from pathlib import Path
import anyio
from wetware import rpc
from wetware.hookspecs import Service, hookimpl

SCHEMA = rpc.load(Path(__file__).with_name("shelf.capnp"))
SIZE = 1 << 20


class Book(rpc.Servant, interface=SCHEMA.Book):
    def __init__(self, service, title):
        self.service, self.name = service, title
        self.bytes = (title.encode() * SIZE)[:SIZE]

    async def title(self):
        return {"title": self.name}

    async def stat(self):
        return {"size": SIZE}

    async def read(self, start, end):
        stream = rpc.ByteStream()
        self.service.tasks.start_soon(self.feed, stream, self.bytes[start:end])
        return {"stream": stream.servant}

    async def feed(self, stream, data):
        try:
            await stream.send(data)
            await stream.send_eof()
        except Exception:
            pass  # the reader is gone


class Shelf(rpc.Servant, interface=SCHEMA.Shelf):
    def __init__(self, service):
        self.service = service

    async def open(self, title):
        return {"book": Book(self.service, title)}


class ShelfService(Service):
    name, interface = "shelf", SCHEMA.Shelf

    def bootstrap(self, principal):
        return Shelf(self)

    async def run(self, *, task_status):
        async with anyio.create_task_group() as self.tasks:
            task_status.started()
            await anyio.sleep_forever()


@hookimpl
def ww_register_services(ctx):
    return (ShelfService(),)
"""
COUNTER_SCHEMA = """\
@0x8d7e0a5b5d6e4f35;
using Ww = import "/wetware/schema/ww.capnp";

interface Adder { add @0 (source :Ww.Source, count :UInt64) -> (bytes :UInt64, sum :UInt64); }
"""
COUNTER = """\
from pathlib import Path
from wetware import rpc
from wetware.hookspecs import Service, hookimpl

SCHEMA = rpc.load(Path(__file__).with_name("adder.capnp"))


class Adder(rpc.Servant, interface=SCHEMA.Adder):
    async def add(self, source, count):
        size = (await source.stat())["size"]
        total = got = 0
        async with rpc.ByteStream((await source.read(start=0, end=count))["stream"]) as stream:
            async for data in stream:
                total, got = total + sum(data), got + len(data)
        assert got == min(count, size)
        return {"bytes": got, "sum": total}


class AdderService(Service):
    name, interface = "adder", SCHEMA.Adder

    def bootstrap(self, principal):
        return Adder()


@hookimpl
def ww_register_services(ctx):
    return (AdderService(),)
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Two plugins that know nothing of each other."""
    (site := tmp_path / "site").mkdir()
    third_party.install(site, "shelf", SHELF, files=(("shelf.capnp", SHELF_SCHEMA),))
    third_party.install(site, "adder", COUNTER, files=(("adder.capnp", COUNTER_SCHEMA),))
    return site


@pytest.fixture
async def node(site: Path, tmp_path: Path) -> AsyncIterator[NodeProcess]:
    with Home(tmp_path / "home", env={"PYTHONPATH": str(site)}) as home, home.node() as node:
        yield node


async def received(source: rpc.Ref, start: int, end: int) -> bytes:
    async with rpc.ByteStream((await source.read(start=start, end=end))["stream"]) as stream:  # type: ignore[attr-defined]
        return b"".join([data async for data in stream])


async def book_of(session: Session, site: Path, title: str) -> rpc.Ref:
    shelf = await session.open("shelf", rpc.load(site / "ww_shelf" / "shelf.capnp").Shelf)
    book: rpc.Ref = (await shelf.open(title=title))["book"]
    return book


async def test_a_part_of_one_source_is_shared_and_passed_on(node: NodeProcess, site: Path) -> None:
    """The grant is about the heir's methods; another plugin reads it under the same grant."""
    adders = rpc.load(site / "ww_adder" / "adder.capnp").Adder
    ask = ("share", "shelf:ab", "--where", "end=range:0..99", "--where", "start=range:10..99")
    part = node.ww(*ask, check=True)
    async with wetware.connect(part.stdout.strip()) as session:
        book = await book_of(session, site, "ab")
        assert book.interface is not None
        assert book.interface.is_a(rpc.WW.Source)
        for source in (book, book.cast(rpc.WW.Source)):
            assert await source.stat() == {"size": SIZE}  # type: ignore[attr-defined]
            assert await received(source, 10, 99) == (b"ab" * 50)[10:99]
            for start, end in ((0, 99), (10, 100), (10, END)):
                with pytest.raises(Denied, match="read"):
                    await received(source, start, end)
        with pytest.raises(Denied):
            await book_of(session, site, "cd")
    async with wetware.connect(node.addr, key=node.home.key()) as session:
        book = await book_of(session, site, "ab")
        assert await received(book, SIZE - 3, END) == b"bab"
        assert await received(book, SIZE, END) == b""
        adder = await session.open("adder", adders)
        assert await adder.add(source=book, count=100) == {"bytes": 100, "sum": sum(b"ab" * 50)}
        assert (await adder.add(source=book, count=END))["bytes"] == SIZE
        narrow = await session.attenuate({"adder": (), "shelf:ab": ()}, ["end=range:0..99"])
        book = await book_of(narrow, site, "ab")
        adder = await narrow.open("adder", adders)
        assert (await adder.add(source=book, count=99))["bytes"] == 99
        with pytest.raises(CapabilityError, match="read"):
            await adder.add(source=book, count=100)


async def test_a_constraint_that_fits_no_source_is_refused(node: NodeProcess) -> None:
    refused = node.ww("share", "shelf:ab", "--where", "size=range:0..99")
    assert refused.returncode == EXIT_USAGE
    assert "Book.read:end" in refused.stderr
