"""Makes the `ww node` that is started with this directory on its path a provider that lies.

What it does is in the file that LIE_FILE names, and is read for each block: a JSON object with
`kind`, and with `block`, the digest of the only block that it lies of, or without one for all. What
is served is written to a file beside it, a digest a line.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wetware_blob import service
from wetware_blob.exchange import serve, wire
from wetware_blob.replicas.sibling import SiblingServant

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
    if data is not None:
        count(data)


def count(data: bytes) -> None:
    with Path(os.environ["LIE_FILE"] + ".served").open("a") as served:
        served.write(hashlib.sha256(data).hexdigest() + "\n")


class Yes(SiblingServant):
    """Has everything."""

    async def have(self, roots: list[bytes]) -> dict[str, Any]:
        return {"have": [True] * len(roots)}


if "LIE_FILE" in os.environ:
    serve._find, serve._send = find_, send
    service.SiblingServant = Yes  # type: ignore[misc]
