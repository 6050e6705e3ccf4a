"""Makes the `ww node` that is started with this directory on its path a provider that lies.

What it does is in the file that LIE_FILE names, and is read for each block: a JSON object with
`kind`, and with `block`, the digest of the only block that it lies of, or without one for all.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wetware_blob.exchange import find, serve, wire

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from wetware.overlay.link import Stream

honest_find, honest_send = serve._find, serve._send


def lie() -> dict[str, Any]:
    said: dict[str, Any] = json.loads(Path(os.environ["LIE_FILE"]).read_text())
    return said


async def find_(get: Callable[[bytes], Awaitable[bytes]], digest: bytes) -> bytes | None:
    said = lie()
    data = await honest_find(get, digest)
    await asyncio.sleep(said.get("delay_s", 0))
    if data is None or said.get("block") not in (None, digest.hex()):
        return data
    match said["kind"]:
        case "lies":
            return bytes([data[0] ^ 1]) + data[1:]
        case "lacks":
            return None
    return data


async def send(stream: Stream, data: bytes | None) -> None:
    said = lie()
    if data is not None and said["kind"] in ("stalls", "truncates"):
        await stream.write(wire.head(data) + data[: len(data) // 2])
        if said["kind"] == "stalls":
            await asyncio.sleep(3600)
        stream.close()
        return
    await honest_send(stream, data)


class Yes(find.SiblingServant):
    """Has everything."""

    async def have(self, roots: list[bytes]) -> dict[str, Any]:
        return {"have": [True] * len(roots)}


if "LIE_FILE" in os.environ:
    serve._find, serve._send = find_, send
    from wetware_blob import service

    service.SiblingServant = Yes  # type: ignore[misc]
