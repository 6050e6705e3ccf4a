"""Dialling: several addresses at once, one attempt for all who ask, or a pipe instead of TCP.

An address with a relay is reached by a connection to that one, which carries the bytes: what was
dialled authenticates itself at the end of the pipe as it does at the end of a TCP connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from wetware.base.log import get_logger
from wetware.errors import DialError, PeerMismatch, WetwareError
from wetware.overlay.link.order import in_order
from wetware.overlay.link.pipe import Pipe, PipeTransport
from wetware.overlay.link.relaying import ask_to_carry
from wetware.overlay.link.tcp import FAMILIES, os_reason

if TYPE_CHECKING:
    from wetware.base.multiaddr import Multiaddr
    from wetware.identity import PeerId
    from wetware.overlay.link.connection import NoiseConnection
    from wetware.overlay.link.limits import LinkLimits
    from wetware.overlay.link.yamux import Connection

log = get_logger("link")


class _Dial:
    """One attempt to reach a peer, shared by all who ask for it meanwhile."""

    __slots__ = ("addrs", "arrived", "attempts", "failures", "key", "taken", "task", "waiters")

    def __init__(self, key: tuple[object, bool], addrs: Sequence[Multiaddr]) -> None:
        self.key, self.addrs = key, addrs
        self.failures: dict[Multiaddr, WetwareError | None] = {}  # None: still trying
        self.attempts: dict[asyncio.Task[Connection], Multiaddr] = {}
        self.arrived: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[Connection]
        self.waiters = 0
        self.taken = False  # whether one of them got the connection

    def error(self, peer: PeerId | None, pending: str) -> DialError:
        """Why it failed, address by address."""
        known = [failure for failure in self.failures.values() if failure is not None]
        reasons = []
        for addr in self.addrs:
            failure = self.failures.get(addr)
            reasons.append(f"{addr.with_peer(None)} ({failure or pending or 'not tried'})")
        message = f"cannot reach {peer or 'the peer'}: {'; '.join(reasons)}"
        if len(known) == len(self.addrs) and all(isinstance(exc, PeerMismatch) for exc in known):
            code = known[0].code if len(known) == 1 else None
            return PeerMismatch(message, hint="check the peer ID after /p2p/", code=code)
        return DialError(
            message, hint="check that the node runs there and that no firewall is between"
        )


class Dialler:
    """Makes a host's outbound connections.

    Args:
        limits: See LinkLimits.
        peer_id: This node.
        live: The connection to a peer that is there, or None.
        begin: Makes a connection, not connected yet, to who is expected and through whom.
        spawn: Runs a task that ends with the host at the latest.
    """

    def __init__(
        self,
        limits: LinkLimits,
        peer_id: PeerId,
        *,
        live: Callable[[PeerId], Connection | None],
        begin: Callable[[PeerId | None, Multiaddr | None], NoiseConnection],
        spawn: Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]],
    ) -> None:
        self._limits, self._peer_id = limits, peer_id
        self._live, self._begin, self._spawn = live, begin, spawn
        # By whom they look for, and whether directly: that would not do for the others, nor they
        # for it.
        self._dials: dict[tuple[object, bool], _Dial] = {}
        self._places = asyncio.Semaphore(limits.dials_max)
        self._closing = False

    def close(self) -> None:
        """Cancel what is under way, and refuse what comes."""
        self._closing = True
        for dial in self._dials.values():
            dial.task.cancel()

    def begin_again(self) -> None:
        """Try all addresses anew: what was sent so far may have gone into another network."""
        for dial in self._dials.values():
            for task in dial.attempts:
                task.cancel()

    def arrived(self, conn: Connection) -> None:
        """An inbound connection is established; a dial to its peer may be over with that.

        When both ends dial each other, the smaller peer ID's connection is the one to keep, so the
        larger one stops its own attempt. Were both to stop, none would be left.
        """
        if conn.peer > self._peer_id:
            return
        for direct in (False,) if conn.tunnelled else (False, True):
            dial = self._dials.get((conn.peer, direct))
            if dial is not None and not dial.arrived.done():
                dial.arrived.set_result(conn)

    def _check(self, peer: PeerId | None) -> None:
        if self._closing:
            raise DialError("this node is stopping")
        if peer == self._peer_id:
            raise DialError("that is this node itself", code="overlay.dial_self")

    async def dial(
        self,
        addrs: Sequence[Multiaddr],
        peer: PeerId | None,
        timeout_s: float | None = None,
        *,
        direct: bool = False,
    ) -> Connection:
        """See `LinkHost.dial`."""
        if peer is None:
            named = {addr.peer for addr in addrs}
            peer = named.pop() if len(named) == 1 else None
        live = None if peer is None else self._live(peer)
        if live is not None and not (direct and live.tunnelled):
            return live
        self._check(peer)
        if not addrs:
            raise DialError(
                f"no address of {peer or 'the peer'} is known",
                hint="give one: /ip4/HOST/tcp/PORT/p2p/PEER",
            )
        wanted = tuple(addrs)[: self._limits.dial_addrs_max]
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (self._limits.dial_s if timeout_s is None else timeout_s)
        while True:
            key = (peer or wanted, direct)
            dial = self._dials.get(key)
            if dial is None:
                dial = self._dials[key] = _Dial(key, wanted)
                dial.task = self._spawn(self._race(dial, peer))
                dial.task.add_done_callback(partial(self._done, dial))
            try:
                return await self._join(dial, peer, deadline)
            except DialError:
                # Somebody else's attempt failed, but it had other addresses.
                if set(wanted) <= set(dial.addrs):
                    raise

    def _forget(self, dial: _Dial) -> None:
        if self._dials.get(dial.key) is dial:
            del self._dials[dial.key]

    def _done(self, dial: _Dial, task: asyncio.Task[Connection]) -> None:
        self._forget(dial)
        if not task.cancelled():
            task.exception()  # looked at, even if all who waited are gone

    async def _join(self, dial: _Dial, peer: PeerId | None, deadline: float) -> Connection:
        dial.waiters += 1
        try:
            async with asyncio.timeout_at(deadline):
                connection = await asyncio.shield(dial.task)
                dial.taken = True
                return connection
        except TimeoutError:
            raise dial.error(peer, "no answer in time") from None
        except asyncio.CancelledError:
            if dial.task.cancelled() and self._closing:
                raise DialError("this node is stopping") from None
            raise
        finally:
            dial.waiters -= 1
            if not dial.waiters and not dial.taken:
                self._abandon(dial)

    def _abandon(self, dial: _Dial) -> None:
        """All who waited are gone, maybe in the very turn in which the connection got ready."""
        self._forget(dial)  # nobody may join what is being cancelled
        if not dial.task.done():
            dial.task.cancel()
        elif not dial.task.cancelled() and dial.task.exception() is None:
            connection = dial.task.result()
            if connection.initiator and not connection.in_use:  # else somebody has it
                connection.close()

    async def _race(self, dial: _Dial, peer: PeerId | None) -> Connection:
        waiting = deque(in_order(dial.addrs))
        attempts = dial.attempts
        again_s: dict[Multiaddr, float] = {}
        try:
            while waiting or attempts:
                if waiting:
                    addr = waiting.popleft()
                    dial.failures[addr] = None
                    attempts[asyncio.ensure_future(self._attempt(addr, peer))] = addr
                done, _ = await asyncio.wait(
                    {*attempts, dial.arrived},
                    timeout=self._limits.dial_stagger_s if waiting else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for task in [task for task in attempts if task in done]:
                    tried = attempts.pop(task)
                    if task.cancelled():
                        waiting.append(tried)
                        continue
                    exc = task.exception()
                    if exc is None:
                        return task.result()
                    if not isinstance(exc, WetwareError):
                        log.error("dial.defect", exc_info=exc)
                        exc = DialError("a defect; the log has the details")
                    dial.failures[tried] = exc
                    others_hang = any(other.relay is None for other in attempts.values())
                    if tried.relay and self._live(tried.relay) and others_hang:
                        # The peer may get to the relay in a moment, and nobody has to be dialled.
                        again_s[tried] = 2 * again_s.get(tried, self._limits.dial_stagger_s)
                        again = self._attempt(tried, peer, again_s[tried])
                        attempts[asyncio.ensure_future(again)] = tried
                if dial.arrived in done and dial.arrived.result().accepts_streams:
                    return dial.arrived.result()
                if dial.arrived.done():
                    dial.arrived = asyncio.get_running_loop().create_future()
            raise dial.error(peer, "")
        finally:
            for task in attempts:
                task.cancel()
            if attempts:
                await asyncio.wait(attempts)
                for task in attempts:  # won too late
                    if not task.cancelled() and task.exception() is None:
                        task.result().close()

    async def _attempt(
        self, addr: Multiaddr, peer: PeerId | None, after_s: float = 0.0
    ) -> Connection:
        """One address: resolve, connect, handshake. Raises WetwareError."""
        await asyncio.sleep(after_s)
        expect = peer or addr.peer
        if addr.peer not in (None, expect):
            raise PeerMismatch(f"the address names another peer, {addr.peer}")
        if addr.relay is not None:
            return await self._through(addr, expect)
        async with self._places:
            conn = self._begin(expect, None)
            try:
                with _closed_unless_returned(conn):
                    await asyncio.get_running_loop().create_connection(
                        lambda: conn,
                        addr.host,
                        addr.port,
                        family=FAMILIES[addr.kind],
                        # A name may stand for several addresses, of which some do not work here.
                        happy_eyeballs_delay=(
                            self._limits.dial_stagger_s if addr.kind.startswith("dns") else None
                        ),
                    )
                    return await asyncio.shield(conn.ready)
            except socket.gaierror as exc:
                raise DialError(f"{addr.host} cannot be resolved: {exc.strerror}") from exc
            except OSError as exc:
                raise DialError(os_reason(exc)) from exc

    async def _through(self, addr: Multiaddr, peer: PeerId | None) -> Connection:
        """The same where the address is a relay's."""
        if peer is None:
            raise DialError("the address does not say whom the relay leads to")
        if peer == addr.relay:  # this dial would wait for itself
            raise DialError("nobody is a relay to itself")
        # Directly, or two peers that are each the other's relay would wait for each other's dial.
        relay = await self.dial((addr.carrier,), addr.relay, direct=True)
        pipe = await ask_to_carry(relay, peer)
        return await self.connect_pipe(pipe, peer, addr.carrier, None)

    async def connect_pipe(
        self, pipe: Pipe, peer: PeerId, remote: Multiaddr, timeout_s: float | None
    ) -> Connection:
        """See `LinkHost.connect_pipe`."""
        try:
            self._check(peer)
        except DialError:
            pipe.reset()
            raise
        what = f"cannot reach {peer} through {remote}"
        conn = self._begin(peer, remote)
        PipeTransport(pipe, conn, self._spawn)
        timeout_s = self._limits.dial_s if timeout_s is None else timeout_s
        try:
            with _closed_unless_returned(conn):
                async with asyncio.timeout(timeout_s):
                    return await asyncio.shield(conn.ready)
        except TimeoutError:
            raise DialError(f"{what}: no answer in time") from None
        except PeerMismatch:
            raise
        except WetwareError as exc:
            raise DialError(f"{what}: {exc}") from exc

    async def adopt(self, sock: socket.socket, conn: NoiseConnection) -> Connection:
        """See `LinkHost.adopt`."""
        with _closed_unless_returned(conn):
            await asyncio.get_running_loop().create_connection(lambda: conn, sock=sock)
            return await asyncio.shield(conn.ready)


@contextlib.contextmanager
def _closed_unless_returned(conn: NoiseConnection) -> Iterator[None]:
    """Close what nobody gets: also one that got ready in the turn in which its caller gave up."""
    try:
        yield
    except BaseException:
        conn.close()
        raise
