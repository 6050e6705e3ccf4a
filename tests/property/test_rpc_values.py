"""Any value that the schema allows survives; any bytes at all cost at most the connection."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wetware import rpc
from wetware.errors import InvalidArgument
from wetware.rpc.codec import snake
from wetware.rpc.framing import FramingError, message_bytes, message_head
from wetware.rpc.pipes import SocketPipe

schema = rpc.load(Path(__file__).parent.parent / "unit" / "rpc" / "zoo.capnp")
SLOW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Echo(rpc.Servant, interface=schema.Newer):
    async def echo(self) -> None: ...

    async def extra(self) -> None: ...


def _unused(name: str) -> Any:
    async def method(self: Any, **_: Any) -> None: ...

    method.__name__ = name
    return method


async def _echo(self: Any, **everything: Any) -> dict[str, Any]:
    return everything


Zoo: Any = type(
    "Zoo",
    (rpc.Servant,),
    {name: _unused(name) for name in schema.Zoo.methods} | {"echo": _echo},
    interface=schema.Zoo,
)


def integers(bits: int, *, signed: bool) -> st.SearchStrategy[int]:
    if signed:
        return st.integers(-(1 << bits - 1), (1 << bits - 1) - 1)
    return st.integers(0, (1 << bits) - 1)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)
inner = st.fixed_dictionaries({"name": texts, "count": integers(32, signed=False)})
trees: st.SearchStrategy[Any] = st.recursive(
    st.none(),
    lambda child: st.fixed_dictionaries(
        {"left": child, "right": child, "value": integers(32, signed=True)}
    ),
    max_leaves=10,
)
colors = st.sampled_from(["red", "green", "deepBlue"])
everything = st.fixed_dictionaries(
    {},
    optional={
        "a_bool": st.booleans(),
        **{f"int{b}": integers(b, signed=True) for b in (8, 16, 32, 64)},
        **{f"uint{b}": integers(b, signed=False) for b in (8, 16, 32, 64)},
        "float32": st.floats(width=32, allow_nan=False),
        "float64": st.floats(allow_nan=False),
        "text": texts,
        "data": st.binary(max_size=200),
        "color": colors,
        "inner": inner,
        "texts": st.lists(texts, max_size=5),
        "numbers": st.lists(integers(32, signed=True), max_size=20),
        "blobs": st.lists(st.binary(max_size=20), max_size=5),
        "inners": st.lists(inner, max_size=5),
        "grid": st.lists(st.lists(integers(8, signed=False), max_size=5), max_size=5),
        "colors": st.lists(colors, max_size=5),
        "place": st.one_of(
            st.fixed_dictionaries({"x": integers(32, signed=True), "name": texts}),
            st.fixed_dictionaries({"x": integers(32, signed=True), "nowhere": st.none()}),
        ),
        "from_": texts,
        "tree": trees,
    },
)
garbage = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)


async def with_zoo(use: Any) -> Any:
    ours, theirs = socket.socketpair()
    server = asyncio.ensure_future(rpc.serve(SocketPipe(ours), Zoo(), rpc.RpcLimits()))
    async with await rpc.connect(SocketPipe(theirs), rpc.RpcLimits()) as connection:
        result = await use(connection.bootstrap(schema.Zoo))
    await server
    return result


@SLOW
@given(st.lists(everything, min_size=1, max_size=5))
def test_what_goes_in_comes_out(values: list[dict[str, Any]]) -> None:
    async def use(zoo: Any) -> list[dict[str, Any]]:
        return list(await asyncio.gather(*(zoo.echo(**v) for v in values)))

    for sent, got in zip(values, asyncio.run(with_zoo(use)), strict=True):
        assert {name: got[name] for name in sent} == sent


@SLOW
@given(st.sampled_from(sorted(schema.Zoo.methods["echo"].params)), garbage)
def test_any_python_value_is_sent_or_refused(name: str, value: Any) -> None:
    async def use(zoo: Any) -> None:
        with contextlib.suppress(InvalidArgument, TypeError):
            await zoo.echo(**{name: value})
        assert (await zoo.echo(text="after"))["text"] == "after"

    asyncio.run(with_zoo(use))


@SLOW
@given(st.lists(st.binary(min_size=1, max_size=400), min_size=1, max_size=10), st.booleans())
def test_any_bytes_cost_at_most_the_connection(chunks: list[bytes], framed: bool) -> None:
    """Raw garbage, and garbage in a correct frame, so that Cap'n Proto's own reader sees it."""
    if framed:
        chunks = [
            struct.pack("<II", 0, (len(c) + 7) // 8) + c.ljust((len(c) + 7) // 8 * 8, b"\0")
            for c in chunks
        ]

    async def attack() -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        with theirs:
            async with rpc.runtime(), asyncio.timeout(60):
                server = asyncio.ensure_future(rpc.serve(SocketPipe(ours), Echo(), rpc.RpcLimits()))
                # The server may hang up in the middle: that is the point.
                with contextlib.suppress(OSError):
                    for chunk in chunks:
                        await asyncio.get_running_loop().sock_sendall(theirs, chunk)
                        await asyncio.sleep(0)
                    theirs.shutdown(socket.SHUT_WR)
                await server

    asyncio.run(attack())


@given(st.binary(max_size=300))
def test_heads_of_any_bytes(data: bytes) -> None:
    try:
        size, kind, ident = message_head(data, 0, len(data))
    except FramingError:
        return
    assert size == message_bytes(data, 0)
    assert (kind == -1) == (size == 0 or size > len(data)) or size > len(data)
    assert 0 <= ident < 1 << 32


@given(st.from_regex(r"[a-zA-Z][a-zA-Z0-9]{0,30}", fullmatch=True))
def test_snake_is_an_attribute_name(name: str) -> None:
    result = snake(name)
    assert result.isidentifier()
    assert result == result.lower()
