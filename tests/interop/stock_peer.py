"""py-libp2p as it comes (its own TCP, noise and yamux), driven by JSON lines like js/peer.mjs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time

import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_x25519_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.ping import PingService
from libp2p.identity.identify.identify import ID as IDENTIFY
from libp2p.identity.identify.identify import parse_identify_response
from libp2p.network.config import ConnectionConfig
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from multiaddr import Multiaddr

ECHO, SINK, SOURCE = (TProtocol(f"/ww-interop/{name}/1.0.0") for name in ("echo", "sink", "source"))
CHUNK_BYTES = 64 << 10


def emit(value: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


async def read(stream, n: int | None = None) -> bytes:
    try:
        return await stream.read(n)
    except StreamEOF:
        return b""


async def read_exactly(stream, n: int) -> bytes:
    data = b""
    while len(data) < n:
        if not (chunk := await read(stream, n - len(data))):
            raise EOFError(f"{len(data)} of {n} bytes")
        data += chunk
    return data


async def handle_echo(stream) -> None:
    while data := await read(stream, CHUNK_BYTES):
        await stream.write(data)
    await stream.close()


async def handle_sink(stream) -> None:
    digest = hashlib.sha256()
    while data := await read(stream, CHUNK_BYTES):
        digest.update(data)
    await stream.write(digest.digest())
    await stream.close()


async def handle_source(stream) -> None:
    left = int.from_bytes(await read_exactly(stream, 8), "big")
    digest = hashlib.sha256()
    while left:
        data = os.urandom(min(left, CHUNK_BYTES))
        digest.update(data)
        await stream.write(data)
        left -= len(data)
    await stream.write(digest.digest())
    await stream.close()


class Peer:
    def __init__(self) -> None:
        keys = create_new_key_pair()
        noise = NoiseTransport(keys, noise_privkey=create_new_x25519_key_pair().private_key)
        self.host = new_host(
            key_pair=keys,
            sec_opt={NOISE: noise},
            connection_config=ConnectionConfig(
                min_connections=0, low_watermark=0, max_connections_per_peer=1
            ),
        )
        for protocol, handler in (
            (ECHO, handle_echo),
            (SINK, handle_sink),
            (SOURCE, handle_source),
        ):
            self.host.set_stream_handler(protocol, handler)

    async def listen(self) -> dict[str, object]:
        return {"peer": str(self.host.get_id()), "addrs": [str(a) for a in self.host.get_addrs()]}

    async def dial(self, addr: str) -> dict[str, object]:
        info = info_from_p2p_addr(Multiaddr(addr))
        await self.host.connect(info)
        return {"peer": str(info.peer_id)}

    async def connections(self) -> dict[str, object]:
        conns = self.host.get_network().get_connections()
        return {"connections": [{"peer": str(c.muxed_conn.peer_id)} for c in conns]}

    async def ping(self, peer: str) -> dict[str, object]:
        start = time.perf_counter()  # its own figure is in whole milliseconds
        await PingService(self.host).ping(ID.from_string(peer), 1)
        return {"rtt_ms": (time.perf_counter() - start) * 1e3}

    async def identify(self, peer: str) -> dict[str, object]:
        stream = await self.host.new_stream(ID.from_string(peer), [IDENTIFY])
        raw = b""
        while chunk := await read(stream, CHUNK_BYTES):
            raw += chunk
        await stream.close()
        found = parse_identify_response(raw)
        return {
            "protocols": list(found.protocols),
            "agent": found.agent_version,
            "addrs": [str(Multiaddr(a)) for a in found.listen_addrs],
        }

    async def echo(self, peer: str, data: str, protocol: str = ECHO) -> dict[str, object]:
        stream = await self.host.new_stream(ID.from_string(peer), [TProtocol(protocol)])
        raw = bytes.fromhex(data)
        await stream.write(raw)
        back = await read_exactly(stream, len(raw))
        await stream.close()
        return {"data": back.hex()}


async def main() -> None:
    peer = Peer()
    async with peer.host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        emit({"event": "ready", **await peer.listen()})

        async def run(number: int, op: str, args: dict[str, str]) -> None:
            try:
                result = await getattr(peer, op)(**args)
            except Exception as exc:
                emit({"id": number, "ok": False, "error": repr(exc)})
            else:
                emit({"id": number, "ok": True, **result})

        async with trio.open_nursery() as nursery:
            async for line in trio.wrap_file(sys.stdin):
                message = json.loads(line)
                nursery.start_soon(run, message.pop("id"), message.pop("op"), message)
            os._exit(0)


logging.getLogger("libp2p").addHandler(logging.NullHandler())
trio.run(main)
