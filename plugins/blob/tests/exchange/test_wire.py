"""Frames: whatever the pieces that they come in, and nothing beyond their bounds."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wetware_blob.exchange import wire
from wetware_blob.format.cid import BLOCK_BYTES_MAX


class Received:
    """A stream of which everything has come."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def read_exactly(self, n: int) -> bytes:
        data, self._data = self._data[:n], self._data[n:]
        if len(data) < n:
            raise asyncio.IncompleteReadError(data, n)
        return data


def wants_of(data: bytes) -> list[bytes]:
    stream: Any = Received(data)
    return asyncio.run(wire.read_want(stream))


async def answers_of(data: bytes) -> list[bytes | None]:
    stream: Any = Received(data)
    found: list[bytes | None] = []
    with contextlib.suppress(asyncio.IncompleteReadError):
        while True:
            length = await wire.read_head(stream)
            found.append(None if length is None else await stream.read_exactly(length))
    return found


@given(st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=wire.WANTS_MAX))
def test_wants_come_back(digests: list[bytes]) -> None:
    assert wants_of(wire.want_frame(digests)) == digests


def test_an_end_between_frames_is_no_want() -> None:
    assert wants_of(b"") == []


@pytest.mark.parametrize("data", [b"\0", b"\0\1", b"\0\2" + bytes(32)])
def test_an_end_within_a_frame_is_told_from_one_between_them(data: bytes) -> None:
    with pytest.raises(asyncio.IncompleteReadError):
        wants_of(data)


@pytest.mark.parametrize("count", [0, wire.WANTS_MAX + 1, 65535])
def test_a_frame_of_no_or_too_many_wants_is_refused(count: int) -> None:
    with pytest.raises(wire.Malformed, match="WANTS_MAX"):
        wants_of(count.to_bytes(2, "big") + bytes(32 * count))


@given(st.lists(st.none() | st.binary(max_size=300), max_size=8))
def test_answers_come_back(sent: list[bytes | None]) -> None:
    data = b"".join(
        wire.ABSENT_FRAME if block is None else wire.head(block) + block for block in sent
    )
    assert asyncio.run(answers_of(data)) == sent


def test_a_block_may_have_two_mebibytes_and_no_byte_more() -> None:
    block = bytes(BLOCK_BYTES_MAX)
    assert asyncio.run(answers_of(wire.head(block) + block)) == [block]
    with pytest.raises(wire.Malformed, match="BLOCK_BYTES_MAX"):
        asyncio.run(answers_of((BLOCK_BYTES_MAX + 1).to_bytes(4, "big")))
