"""Plain values survive the way there and back, and bad ones say where they are bad."""

from __future__ import annotations

import re
from typing import Any

import pytest

from wetware import rpc
from wetware.errors import InvalidArgument, LimitExceeded, Unsupported
from wetware.rpc.codec import snake

pytestmark = pytest.mark.anyio

DEFAULTS: dict[str, Any] = {
    "a_bool": False,
    "int8": 0,
    "int16": 0,
    "int32": 0,
    "int64": 0,
    "uint8": 0,
    "uint16": 0,
    "uint32": 0,
    "uint64": 0,
    "float32": 0.0,
    "float64": 0.0,
    "text": "default",
    "data": b"",
    "color": "red",
    "inner": {"name": "", "count": 0},
    "texts": [],
    "numbers": [],
    "blobs": [],
    "inners": [],
    "grid": [],
    "colors": [],
    "place": {"x": 0, "nowhere": None},
    "cell": None,
    "cells": [],
    "anything": None,
    "from_": "",
    "tree": None,
}


async def test_defaults(serving: Any, servants: Any) -> None:
    async with serving(servants.Zoo()) as zoo:
        got = await zoo.echo()
    assert got == DEFAULTS


@pytest.mark.parametrize(
    "values",
    [
        {"a_bool": True, "int8": -128, "int16": -32768, "int32": -(2**31), "int64": -(2**63)},
        {
            "uint8": 255,
            "uint16": 65535,
            "uint32": 2**32 - 1,
            "uint64": 2**64 - 1,
            "int64": 2**63 - 1,
        },
        {"float32": 0.5, "float64": 1e300},
        {"text": "", "data": b"\0\xff" * 100, "from_": "keyword"},
        {"text": "héllo ☃ 𝄞\n"},
        {"color": "deepBlue", "colors": ["green", "red"]},
        {"inner": {"name": "a", "count": 3}, "inners": [{"name": "b", "count": 0}] * 3},
        {"texts": ["", "x", "☃"], "numbers": [1, -2, 3], "blobs": [b"", b"x"]},
        {"grid": [[1, 2], [], [255]]},
        {"place": {"x": -4, "name": "here"}},
        {"place": {"x": -4, "nowhere": None}},
        {
            "tree": {
                "left": {"left": None, "right": None, "value": 1},
                "right": None,
                "value": -1,
            }
        },
    ],
)
async def test_round_trip(serving: Any, servants: Any, values: dict[str, Any]) -> None:
    servant = servants.Zoo()
    async with serving(servant) as zoo:
        got = await zoo.echo(**values)
    assert got == DEFAULTS | values
    assert servant.seen == [got]


async def test_bytes_like_and_int_are_taken_for_data_and_float(serving: Any, servants: Any) -> None:
    async with serving(servants.Zoo()) as zoo:
        got = await zoo.echo(data=memoryview(b"abc"), float64=3, blobs=[bytearray(b"x")])
    assert (got["data"], got["float64"], got["blobs"]) == (b"abc", 3.0, [b"x"])
    assert type(got["float64"]) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "text"}, "Zoo.echo: data: expected bytes, not str"),
        ({"text": b"data"}, "Zoo.echo: text: expected str, not bytes"),
        ({"a_bool": 1}, "Zoo.echo: a_bool: expected bool, not int"),
        ({"int8": 128}, "Zoo.echo: int8: 128 is not within -128…127"),
        ({"uint64": -1}, "Zoo.echo: uint64: -1 is not within 0…18446744073709551615"),
        ({"uint8": True}, "Zoo.echo: uint8: expected int, not bool"),
        ({"int32": 1.0}, "Zoo.echo: int32: expected int, not float"),
        ({"float64": "1"}, "Zoo.echo: float64: expected float, not str"),
        ({"color": "blue"}, "Zoo.echo: color: 'blue' is not a member"),
        ({"inner": []}, "Zoo.echo: inner: expected dict, not list"),
        ({"inner": {"nam": ""}}, "Zoo.echo: inner: no field 'nam'"),
        ({"inners": [{}, {"count": "3"}]}, "Zoo.echo: inners[1].count: expected int, not str"),
        ({"texts": ["a", 3]}, "Zoo.echo: texts[1]: expected str, not int"),
        ({"texts": "abc"}, "Zoo.echo: texts: expected list, not str"),
        ({"grid": [[1], [256]]}, "Zoo.echo: grid[1][0]: 256 is not within 0…255"),
        ({"place": {"name": "a", "nowhere": None}}, "members of one union"),
        ({"place": {"nowhere": 3}}, "Zoo.echo: place.nowhere: expected None, not int"),
        ({"cell": "cell"}, "Zoo.echo: cell: expected a capability"),
        ({"cells": [5]}, "Zoo.echo: cells[0]: expected a capability"),
        ({"cells": [None]}, "Zoo.echo: cells[0]: a list has no empty places"),
        ({"tex": ""}, "Zoo.echo: no field 'tex'"),
    ],
)
async def test_bad_values_say_where(
    serving: Any, servants: Any, values: dict[str, Any], message: str
) -> None:
    servant = servants.Zoo()
    async with serving(servant) as zoo:
        # Of a wrong type, or of the right one and out of its range.
        error = TypeError if "expected" in message else InvalidArgument
        with pytest.raises(error, match=re.escape(message)):
            await zoo.echo(**values)
        assert await zoo.nothing() is None  # the connection goes on
    assert servant.seen == []


async def test_an_unknown_parameter_names_the_nearest(serving: Any, servants: Any) -> None:
    async with serving(servants.Zoo()) as zoo:
        with pytest.raises(InvalidArgument, match=r"Zoo.data: no parameter 'dta'") as caught:
            await zoo.data(dta=b"")
        assert caught.value.hint == "did you mean 'data'?"
        with pytest.raises(Unsupported, match="no method 'datum'") as unsupported:
            zoo.call("datum")
        assert unsupported.value.hint == "did you mean 'data'?"


async def test_a_long_list_is_refused_on_both_sides(serving: Any, servants: Any) -> None:
    async with serving(servants.Zoo()) as zoo:
        with pytest.raises(LimitExceeded, match="a list of 65537 items"):
            await zoo.bits(bits=[True] * 65537)
        assert await zoo.bits(bits=[True] * 65536) == {"count": 65536}


async def test_as_many_structs_as_a_message_holds(serving: Any, servants: Any) -> None:
    """Reading it all stays within the limit on reads, which guards against repeated pointers."""
    inners = [{"name": "", "count": i} for i in range(40_000)]
    async with serving(servants.Zoo()) as zoo:
        assert (await zoo.echo(inners=inners))["inners"] == inners
        for values in ({"blobs": [bytes(100)] * 8_000}, {"texts": [""] * 60_000}):
            (name,) = values
            assert (await zoo.echo(**values))[name] == values[name]


async def test_a_bomb_of_bits_is_not_decoded(
    serving: Any, servants: Any, schema: rpc.Schema, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wetware.rpc.codec.LIST_ITEMS_MAX", 100)
    async with serving(servants.Zoo()) as zoo:
        method = schema.Zoo.methods["bits"]
        client = zoo._end.client(zoo)
        request = client._request_helper(method.wire, None, None, None)
        request.init("bits", 101)
        with pytest.raises(Exception, match="a list of 101 items"):
            await request.send()


@pytest.mark.parametrize(
    "values",
    [
        {"grid": [[1] * 10] * 11},
        {"texts": ["a"] * 60, "numbers": [1] * 60},
        {"tree": {"left": {"left": {"value": 1}}}, "texts": ["a"] * 98},
    ],
)
async def test_the_parts_of_a_message_are_bounded_in_all(
    serving: Any, servants: Any, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    monkeypatch.setattr("wetware.rpc.codec.PARTS_MAX", 100)
    async with serving(servants.Zoo()) as zoo:
        with pytest.raises(LimitExceeded, match="a message of more than 100 items"):
            await zoo.echo(**values)
        assert (await zoo.echo(numbers=[1] * 100))["numbers"] == [1] * 100, "each has its own"


async def test_too_deep_a_value_is_an_error(serving: Any, servants: Any) -> None:
    tree: dict[str, Any] = {"value": 0}
    for _ in range(5000):
        tree = {"left": tree}
    async with serving(servants.Zoo()) as zoo:
        with pytest.raises(InvalidArgument):
            await zoo.echo(tree=tree)
        medium: dict[str, Any] = {"value": 0}
        for _ in range(100):  # Cap'n Proto's readers stop at 64
            medium = {"left": medium}
        with pytest.raises(InvalidArgument, match="malformed parameters"):
            await zoo.echo(tree=medium)
        assert await zoo.nothing() is None


async def test_capabilities_everywhere(serving: Any, servants: Any) -> None:
    servant = servants.Zoo()
    cells = [servants.Cell(bytes([i])) for i in range(4)]
    async with serving(servant) as zoo:
        got = await zoo.echo(
            cell=cells[0],
            cells=[cells[1], cells[2]],
            place={"cell": cells[3]},
            anything=cells[0],
        )
        assert (await got["cell"].get())["value"] == b"\0"
        assert (await got["cells"][0].get())["value"] == b"\1"
        assert (await got["cells"][1].get())["value"] == b"\2"
        assert (await got["place"]["cell"].get())["value"] == b"\3"
        assert got["anything"].interface is None
        with pytest.raises(InvalidArgument, match="interface of this reference is not known"):
            got["anything"].call("get")
        cell = got["anything"].cast(got["cell"].interface)
        assert (await cell.get())["value"] == b"\0"


async def test_any_capability(serving: Any, servants: Any, schema: rpc.Schema) -> None:
    async with serving(servants.Zoo()) as zoo:
        got = (await zoo.any(cap=servants.Cell(b"any")))["cap"]
        assert (await got.cast(schema.Cell).get()) == {"value": b"any"}
        assert (await zoo.any())["cap"] is None
        wrong = got.cast(schema.Zoo)
        with pytest.raises(Unsupported, match="no such method"):
            await wrong.nothing()


async def test_inherited_methods(serving: Any, servants: Any, schema: rpc.Schema) -> None:
    async with serving(servants.Zoo()) as zoo:
        counter = (await zoo.counter())["counter"]
        assert counter.interface == schema.Counter
        assert await counter.add(by=5) == {"total": 5}
        assert await counter.add() == {"total": 6}  # the schema's default
        assert await counter.get() == {"value": b"6"}
        assert await counter.cast(schema.Cell).get() == {"value": b"6"}
        assert (await zoo.use(cell=counter))["value"] == b"6"  # a Counter is a Cell
        cell = (await zoo.make(value=b""))["cell"]
        with pytest.raises(TypeError, match="expected a Zoo, not a Cell"):
            await zoo.relay(zoo=cell)


async def test_methods_are_real_attributes(serving: Any, servants: Any) -> None:
    async with serving(servants.Zoo()) as zoo:
        assert zoo.make_many.__doc__ == "`Zoo.make_many(count)`."
        assert "make_many" in dir(zoo)
        with pytest.raises(AttributeError):
            _ = zoo.nonsense


def test_snake() -> None:
    assert [snake(n) for n in ("a", "someName", "getURL", "peerID2", "URLOf", "from", "x1Y")] == [
        "a",
        "some_name",
        "get_url",
        "peer_id2",
        "url_of",
        "from_",
        "x1_y",
    ]
