"""The way to a node's Gate: over this machine's socket, or the encrypted link."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from wetware import rpc
from wetware.base import paths
from wetware.broker.protocol import GATE_PROTOCOL
from wetware.client import contexts
from wetware.errors import AuthError, ConfigError, DialError, InvalidArgument
from wetware.identity import Channel, Key, PeerId

if TYPE_CHECKING:
    from wetware.overlay.link import Connection

CONNECT_S = 10.0
"""Default time for dialling and logging in together."""
RUNTIME_BYTES_MAX = 64 << 10
"""Of a node's runtime file."""


class Place(NamedTuple):
    """A connection to a Gate, who is at its other end, and what a login on it is bound to."""

    connection: rpc.RpcConnection
    peer: PeerId
    channel: Channel


@dataclass(frozen=True, slots=True)
class LocalNode:
    """What a running node says of itself in its data directory (`node.json`, 0600)."""

    peer_id: PeerId
    socket: Path
    pid: int
    cluster: str
    auth: str
    auth_also: tuple[str, ...]
    plugins: frozenset[str]

    @classmethod
    def find(cls, data_dir: Path) -> LocalNode:
        """Read it; raises DialError if no node has run there."""
        file = data_dir / paths.RUNTIME_FILE
        try:
            with file.open("rb") as opened:
                owner, text = os.fstat(opened.fileno()).st_uid, opened.read(RUNTIME_BYTES_MAX)
            if owner not in (os.getuid(), 0):
                raise ConfigError(
                    f"{file} belongs to another user", hint="choose your own with --data-dir"
                )
            data = json.loads(text)
            return cls(
                PeerId.parse(data["peer_id"]),
                Path(data["socket"]),
                int(data["pid"]),
                contexts.check_cluster(data["cluster"]),
                str(data["auth"]),
                tuple(map(str, data.get("auth_also", ()))),  # a node of before has none
                frozenset(map(str, data["plugins"])),
            )
        except FileNotFoundError:
            raise DialError(
                f"no node is running here (nothing in {data_dir})",
                hint="start one with `ww node`, or name one with --node /ip4/…/p2p/…",
                code="overlay.dial.no_node",
            ) from None
        except (ValueError, KeyError, TypeError, OSError, InvalidArgument) as exc:
            raise ConfigError(f"cannot read {file}: {exc}", hint="restart the node") from exc


async def local(stack: contextlib.AsyncExitStack, node: LocalNode) -> Place:
    """The Gate of this machine's node; raises DialError."""
    connection = await rpc.connect_unix(node.socket)
    stack.push_async_callback(connection.aclose)
    return Place(connection, node.peer_id, Channel("unix", node.peer_id.multihash))


def peer_in(target: str) -> PeerId:
    """The node that addresses, comma-separated, end at; raises InvalidArgument."""
    from wetware.base.multiaddr import Multiaddr

    expected = {Multiaddr.parse(part).peer for part in target.split(",")}
    if len(expected) != 1 or (peer := expected.pop()) is None:
        raise InvalidArgument(
            f"{target!r} does not say which node is expected there",
            hint="add /p2p/PEER to the address; `ww id` on the node prints it",
            code="invalid.multiaddr",
        )
    return peer


async def remote(
    stack: contextlib.AsyncExitStack,
    addrs: Iterable[str],
    peer: PeerId,
    *,
    timeout_s: float | None = None,
) -> Place:
    """The Gate of `peer`; raises AuthError for addresses that lead to another node."""
    from wetware.base.multiaddr import Multiaddr
    from wetware.overlay.link import LinkHost

    addresses = [Multiaddr.parse(addr) for addr in addrs]
    if any(address.peer != peer for address in addresses):
        raise AuthError(
            f"an address that was given for the node {peer} ends at another one",
            hint="do not use the node that gave it; tell its operator",
            code="auth.wrong_address",
        )
    # A client is no node: its link key is made for this connection and forgotten.
    host = await stack.enter_async_context(LinkHost(Key.generate()))
    link = await host.dial(addresses, peer=peer, timeout_s=timeout_s)
    return await over_link(stack, link)


async def over_link(stack: contextlib.AsyncExitStack, link: Connection) -> Place:
    """The Gate at the other end of a link."""
    from wetware.overlay.rpc_pipe import RpcPipe

    connection = await rpc.connect(RpcPipe(await link.open_stream(GATE_PROTOCOL)))
    stack.push_async_callback(connection.aclose)
    return Place(connection, link.peer, Channel("noise", link.channel_binding))


@contextlib.asynccontextmanager
async def within(seconds: float | None, target: str) -> AsyncIterator[None]:
    """The time for connecting; unlike `asyncio.timeout` it says what it was for."""
    scope = asyncio.timeout(seconds)
    try:
        async with scope:
            yield
    except TimeoutError:
        if not scope.expired():
            raise
        raise DialError(
            f"{target} did not answer within {seconds:g} s",
            hint="is the node running, and the address right?",
            code="overlay.dial.timeout",
        ) from None


def is_address(text: str) -> bool:
    """Whether a text wants to be an address of a node, and not a selector."""
    _, colon, port = text.rpartition(":")
    return text.startswith("/") or (bool(colon) and port.isdecimal())
