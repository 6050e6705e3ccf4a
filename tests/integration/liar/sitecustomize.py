"""Makes the `ww node` that is started with this directory on its path a provider that lies.

What it does is in the file that LIE_FILE names, and is read for each block: a JSON object with
`kind`, and with `block`, the digest of the only block that it lies of, or without one for all, but
for that which `has` names. What is served is written to a file beside it, a digest a line, and what
is said to lack to another one.
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


def is_meant(said: dict[str, Any], digest: str) -> bool:
    return said.get("block", digest) == digest != said.get("has")


async def find_(get: Callable[[bytes], Awaitable[bytes]], digest: bytes) -> bytes | None:
    said = lie()
    data = await honest_find(get, digest)
    await asyncio.sleep(said.get("delay_s", 0))
    if is_meant(said, digest.hex()):
        match said["kind"]:
            case "lies" if data is not None:
                return bytes([data[0] ^ 1]) + data[1:]
            case "lacks":
                data = None
    if data is None:
        note("lacked", digest)
    return data


async def send(stream: Stream, data: bytes | None) -> None:
    if data is None:
        await honest_send(stream, data)
        return
    said = lie()
    if is_meant(said, hashlib.sha256(data).hexdigest()):
        match said["kind"]:
            case "stalls":  # before the first byte: after it, it may as well be called slow
                await asyncio.sleep(3600)
            case "truncates":
                await stream.write(wire.head(data) + data[: len(data) // 2])
                stream.close()
                return
            case "trickles":
                await trickle(stream, data)
                count(data)
                return
    await honest_send(stream, data)
    count(data)


async def trickle(stream: Stream, data: bytes) -> None:
    """Send a little at a time, so as not to be silent, until the file says something else."""
    await stream.write(wire.head(data))
    at = 0
    while at < len(data) and lie()["kind"] == "trickles":
        await stream.write(data[at : at + 4096])
        at += 4096
        await asyncio.sleep(0.2)
    await stream.write(data[at:])


def count(data: bytes) -> None:
    note("served", hashlib.sha256(data).digest())


def note(what: str, digest: bytes) -> None:
    with Path(f"{os.environ['LIE_FILE']}.{what}").open("a") as noted:
        noted.write(digest.hex() + "\n")


class Yes(SiblingServant):
    """Has everything."""

    async def have(self, roots: list[bytes]) -> dict[str, Any]:
        return {"have": [True] * len(roots)}


if "LIE_FILE" in os.environ:
    serve._find, serve._send = find_, send
    service.SiblingServant = Yes  # type: ignore[misc]
