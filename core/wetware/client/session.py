"""A session: services, and passing parts of it on."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from wetware import rpc
from wetware.base.multiaddr import CIRCUIT
from wetware.base.structs import from_struct
from wetware.base.texts import NAMED
from wetware.broker.protocol import CORE
from wetware.broker.sturdy import SturdyRef
from wetware.broker.told import Explanation, GrantInfo, Identity, ServiceInfo
from wetware.client.bundled import Bundled
from wetware.client.dial import CONNECT_S, Place, over_link, remote, within
from wetware.client.installed import CLIENT_GROUP, find, interface_of, known_interface, services
from wetware.client.values import Constraints, terms_to_struct
from wetware.errors import (
    AuthError,
    DialError,
    Disconnected,
    InternalError,
    OverlayError,
    Unsupported,
    WetwareError,
)
from wetware.identity import Key, PeerId

if TYPE_CHECKING:
    from wetware.client.login import Login
    from wetware.identity import Challenge, Signer
    from wetware.member import Member

    Keep = Callable[["Session", Any], contextlib.AbstractAsyncContextManager[None]]

CALL_S = 30.0
"""For a call, where neither `Session.timeout_s` nor `wetware.time_limit` says otherwise."""
TUNNEL_AFTER_S = 0.5
"""What dialling a node may take before it is tried through a tunnel as well."""


class Opening:
    """A service's first capability, opened at its first use; looks like a Ref, in `dir()` too.

    Attributes:
        session: Whose it is: a client that goes to other nodes logs in there with it.
        interface: Its own.
    """

    def __init__(self, session: Session, name: str, interface: rpc.Interface) -> None:
        self.session, self._name, self.interface = session, name, interface
        self._ref: asyncio.Future[rpc.Ref] | None = None

    async def _open(self) -> rpc.Ref:
        ref = self._ref
        if ref is None or (ref.done() and _is_spent(ref)):
            ref = self._ref = asyncio.ensure_future(self.session.open(self._name, self.interface))
            # Whoever waited may be cancelled meanwhile: then nobody asks how it ended.
            ref.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(ref)

    async def call(self, method: str, /, **params: object) -> Any:
        """Open if need be, then call."""
        return await (await self._open()).call(method, **params)

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_") or method not in self.interface.methods:
            raise AttributeError(f"{self.interface.name} has no method {method!r}")

        return functools.partial(self.call, method)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.interface.methods]


def _is_spent(ref: asyncio.Future[rpc.Ref]) -> bool:
    """Whether it has to be opened again: that failed, or the connection was lost since."""
    return ref.cancelled() or ref.exception() is not None or ref.result().closed


class Session(Bundled):
    """A logged-in connection. `session.NAME` is the client of the service NAME.

    Where a service has no client class, and with `session.service(NAME)`, it is the service's
    first capability as its schema has it: `await session.service("counter").add(by=1)`.

    Made by `connect`. Ends with its `async with` block, or when the node revokes its grant; from
    then on calls raise Revoked, Expired or Disconnected.

    Attributes:
        identity: Who it speaks as, and where.
        notice: For the person: that the login was the first one there, and pinned a cluster; or "".
        closed: Whether `close` was called.
    """

    notice = ""
    closed = False
    _unattended: tuple[Callable[[Challenge], Signer], Keep] | None = None
    """Below `connect(reconnect=True)`: what signs, asking nobody, and keeps it logged in."""

    def __init__(self, ref: rpc.Ref, identity: Identity, login: Login | None) -> None:
        self._ref, self._login = ref, login
        self._clients: dict[str, Any] = {}
        self.identity = identity

    @property
    def ref(self) -> rpc.Ref:
        """The capability itself, to be handed in: for what is to outlive the session."""
        return self._ref

    @property
    def connection(self) -> rpc.RpcConnection:
        """What it speaks by; what was attenuated from it, too."""
        return self._ref.connection

    def _renew(self, fresh: Session) -> None:
        """Go on as a session that was logged in after this one's connection was lost."""
        fresh.timeout_s = self.timeout_s
        self._ref, self._login, self.identity = fresh._ref, fresh._login, fresh.identity

    async def _call(self, method: str, /, **params: object) -> Any:
        """Call the session itself; waits while it is being logged in again."""
        connection = self.connection
        if connection.closed and connection.again is not None:
            async with within(connection.limit_s, f"the node {self.identity.node}"):
                await connection.again(connection)
        return await self._ref.call(method, **params)

    @property
    def timeout_s(self) -> float | None:
        """How long a call may take before TimedOut, 30 s at first; None: for ever.

        Of its connection, so also for what was attenuated from the session. For some calls alone:
        `with wetware.time_limit(120): …`.
        """
        return self._ref.connection.timeout_s

    @timeout_s.setter
    def timeout_s(self, seconds: float | None) -> None:
        self._ref.connection.timeout_s = seconds

    async def whoami(self) -> Identity:
        """Ask the node who this session is; raises Revoked if it has ended."""
        return from_struct(Identity, await self._call("whoami"))

    async def services(self) -> tuple[ServiceInfo, ...]:
        """The services that this session may open."""
        reply = await self._call("services")
        return tuple(from_struct(ServiceInfo, service) for service in reply["services"])

    async def open(self, name: str, interface: rpc.Interface) -> rpc.Ref:
        """The bootstrap capability of a service.

        Raises Denied if no grant covers it, Unsupported if the node does not have it.
        """
        try:
            reply = await self._call("open", name=name)
        except Unsupported as exc:
            if exc.code == "unsupported.service" and name in services():
                exc.hint = (
                    "its plugin is installed here, not running at the node: restart the node, or "
                    f"install it there; {exc.hint}"
                )
            raise
        service: rpc.Ref | None = reply["service"]
        if service is None:
            raise InternalError(f"the node answered without a capability for {name!r}")
        return service.cast(interface)

    async def close(self) -> None:
        """End the session; what was shared from it lives on. Idempotent."""
        self.closed = True
        with contextlib.suppress(WetwareError):
            await self._ref.call("logout")
        self._ref.close()

    # --- passing parts of it on -------------------------------------------------------------------

    async def attenuate(
        self,
        services: Mapping[str, Iterable[str]] | None = None,
        where: Constraints = (),
        *,
        expires_s: float = 0.0,
        rate: str = "",
        calls: int = 0,
        nbytes: int = 0,
        fence: bytes = b"",
        sealed: bool = False,
        label: str = "",
    ) -> Session:
        """A weaker session, to hand to other code. It ends with this one, or with `close`.

        Args:
            services: Service → methods ("*", "Interface.*", "Interface.method"; none: all that
                this session has of it). "SERVICE:NAME" is one object of a service, "pubsub:chat".
                None: every service of this session.
            where: Constraints on arguments.
            expires_s: Seconds from now; 0: no end of its own.
            rate: "10/s", "100/m:20"; "" for none.
            calls: How many calls in all; 0: no quota.
            nbytes: How many bytes of payload in all; 0: no quota.
            fence: A fencing token of a lock, for services that are entered at one node alone
                (`Service.entries`): calls are refused once the node has seen a later holder's.
            sealed: It cannot be attenuated or shared further.
            label: What it is for, in `ww grants`.

        Raises Amplification for what this session has not, InvalidArgument for a constraint that
        the service's schema does not know, Unsupported "unsupported.fence".
        """
        terms = terms_to_struct(
            services, where, expires_s=expires_s, rate=rate, calls=calls, nbytes=nbytes,
            fence=fence, sealed=sealed,
        )  # fmt: skip
        reply = await self._call("attenuate", terms=terms, label=label)
        return await opened(reply["session"], self._login, PeerId(self.identity.node))

    async def share(
        self,
        services: Mapping[str, Iterable[str]] | None = None,
        where: Constraints = (),
        *,
        expires_s: float = 86_400.0,
        uses: int = 0,
        rate: str = "",
        calls: int = 0,
        nbytes: int = 0,
        sealed: bool = False,
        label: str = "",
    ) -> tuple[str, GrantInfo]:
        """A sturdy reference `ww1…`: whoever has it may do this, without an account.

        A secret: treat it as a password. It outlives this session; `revoke` with the ID of its
        grant ends it. See `attenuate` for the arguments; `uses` is how often it may be redeemed
        (0: no limit), and `expires_s` 0 is no end.
        """
        terms = terms_to_struct(
            services, where, expires_s=expires_s, rate=rate, calls=calls, nbytes=nbytes,
            sealed=sealed,
        )  # fmt: skip
        reply = await self._call("share", terms=terms, uses=uses, label=label)
        return reply["ref"], from_struct(GrantInfo, reply["grant"])

    async def grants(self) -> tuple[GrantInfo, ...]:
        """What was derived from this session, parents first; of a login, from all its roles."""
        reply = await self._call("list", principal="", limit=0)
        return tuple(from_struct(GrantInfo, grant) for grant in reply["grants"])

    async def revoke(self, grant_id: str, reason: str = "") -> int:
        """End one of `grants` and all below it, now; returns how many ended.

        Raises NotFound for one that is not of this session's.
        """
        reply = await self._call("revoke", id=grant_id, reason=reason)
        cut: int = reply["cut"]
        return cut

    async def why(self, decision: str = "") -> Explanation:
        """What decided a denial; "" is the latest one. Raises NotFound."""
        reply = await self._call("why", decision=decision)
        return from_struct(Explanation, reply["explanation"])

    async def explain(self, service: str, method: str, **args: object) -> Explanation:
        """What would decide a call of "Interface.method" (or a bootstrap "method") now."""
        interface, _, name = method.rpartition(".")
        reply = await self._call(
            "explain",
            service=service,
            interface=interface,
            method=name,
            args=[{"key": key, "value": str(value)} for key, value in args.items()],
        )
        return from_struct(Explanation, reply["explanation"])

    @contextlib.asynccontextmanager
    async def node(
        self, selector: str, *, timeout_s: float = CONNECT_S, direct: bool | None = None
    ) -> AsyncIterator[Session]:
        """Log in to another node of the cluster, with the same key or signer.

        The connection is encrypted end to end, and the login is bound to it: this session's node
        may carry the bytes, and learns nothing from them. Nor does it choose who answers: that is
        the peer that was named, or a member of this session's cluster, by its own signature and its
        certificate, that the selector means by what it signed. Whether it lives, and which of
        several is taken, is the word of this session's node. Below `connect(reconnect=True)` it is
        logged in again at the same node, too.

        Args:
            selector: Which one: a name, a peer ID, or e.g. "zone=home,service=blob", and of several
                that match this a living one with the least load. See `session.cluster.one`.
            timeout_s: For dialling and logging in together.
            direct: True: dial it from here; False: through a tunnel of this session's node; None:
                dial, and where that fails or takes half a second try the tunnel as well.

        Raises NotFound where no living member matches, InvalidArgument where a name stands for
        several, AuthError "auth.unproven" where this session's node answers with another node than
        was asked for, and otherwise as `connect`.
        """
        async with contextlib.AsyncExitStack() as stack:
            session = await self._at(stack, selector, timeout_s, direct, self._login)
            if session is not self and self._unattended is not None:
                signs, keep = session._unattended = self._unattended
                login = session._login and replace(session._login, choose=signs)
                again = functools.partial(
                    self._at,
                    selector=f"id={session.identity.node}",
                    timeout_s=timeout_s,
                    direct=direct,
                    login=login,
                )
                await stack.enter_async_context(keep(session, again))
            try:
                yield session
            finally:
                if session is not self:
                    session._ref.close()

    async def _at(
        self,
        stack: contextlib.AsyncExitStack,
        selector: str,
        timeout_s: float,
        direct: bool | None,
        login: Login | None,
    ) -> Session:
        """See `node`."""
        member = await self.cluster.one(selector, signed=True)
        peer, addrs = self._meant(selector, member)
        if peer == self.identity.node:
            return self
        if login is None:
            raise Unsupported(
                "a session that comes from a reference cannot log in to other nodes",
                hint="log in with a key of your own",
            )
        async with within(timeout_s, f"the node {peer} ({selector})"):
            tunnel = functools.partial(tunnelled, stack, self, peer)
            if direct is None:  # the node's way through a relay is wider than a stranger's
                addrs = tuple(addr for addr in addrs if CIRCUIT not in addr)
            if direct is False:
                place = await tunnel()
            else:
                place = await reached(stack, addrs, peer, None if direct else tunnel, timeout_s)
            return await log_in(login, place)

    @contextlib.asynccontextmanager
    async def redeem(self, ref: str, *, timeout_s: float = CONNECT_S) -> AsyncIterator[Session]:
        """Redeem a sturdy reference at its issuer, also where that cannot be dialled from here.

        It is dialled, and where that fails reached through a tunnel of this session's node, which
        carries the bytes, and learns nothing from them. What comes is as from
        `wetware.connect(ref)`: the issuer alone decides on each call. It ends with the block, and
        with this session's connection.

        Args:
            ref: "ww1…", of any node, this session's own included.
            timeout_s: For reaching the issuer and redeeming together.

        Raises InvalidArgument for what is no reference, DialError where the issuer can be reached
        in neither way, and what it answers: Denied, Revoked, Expired, LimitExceeded.
        """
        parsed = SturdyRef.parse(ref)
        async with contextlib.AsyncExitStack() as stack:
            async with within(timeout_s, f"the node {parsed.peer}"):
                if parsed.peer == self.identity.node:
                    session = await redeemed(self.connection, parsed)
                else:
                    tunnel = functools.partial(tunnelled, stack, self, parsed.peer)
                    addrs = map(str, parsed.addrs)
                    place = await reached(stack, addrs, parsed.peer, tunnel, timeout_s)
                    session = await redeemed(place.connection, parsed)
                    session.timeout_s = CALL_S
                    await stack.enter_async_context(_ending_with(self.connection, place.connection))
            try:
                yield session
            finally:
                session._ref.close()

    def _meant(self, selector: str, member: Member) -> tuple[PeerId, tuple[str, ...]]:
        """Who is meant, and where that is, without believing the node that answered.

        A peer ID says all: whoever answers at an address has to have it. Any other member has to be
        proven.
        """
        from wetware.overlay.membership.proof import prove
        from wetware.overlay.membership.selector import is_peer_id

        if is_peer_id(selector):
            return PeerId(selector), member.addrs
        try:
            proven = prove(
                member.record,
                member.founding,
                cluster=self.identity.cluster,
                selector=selector,
                state=member.state,
                now_s=time.time(),
            )
        except WetwareError as exc:
            raise AuthError(
                f"the node {self.identity.node} gave no proof that what it found for {selector!r} "
                f"is that: {exc.message}",
                hint=exc.hint or "do not use this node; tell its operator",
                code="auth.unproven",
            ) from exc
        return proven.peer_id, proven.addrs

    async def named(self, text: str) -> str:
        """A text as it is, or what the name stands for now that it says it is.

        Of "name:/site/live" the service `names` is asked; "name:/site/live//css/a" is what is at
        "css/a" below it, "VALUE/css/a". It may be anything that somebody has set.

        Raises NotFound "not_found.name", InvalidArgument "invalid.key", Unsupported where there
        are no names: here, or at the node; Denied, OverlayError.
        """
        if not text.startswith(NAMED):
            return text
        path, _, below = text.removeprefix(NAMED).partition("//")
        try:
            value: str = (await self.names.get(path)).value
        except AttributeError as exc:
            raise Unsupported(
                f"{text!r} is a name, and the service `names` has no client here",
                hint="install the plugin sync, or give what it stands for",
                code="unsupported.names",
            ) from exc
        except Unsupported as exc:
            raise Unsupported(
                f"{text!r} is a name: {exc.message}", hint=exc.hint, code=exc.code
            ) from exc
        return f"{value}/{below}" if below else value

    async def status(self, *, details: bool = False) -> dict[str, Any]:
        """What the node is doing: the struct NodeStatus of core.capnp; what is unknown is None.

        Args:
            details: What is for operators, too.
        """
        method = "details" if details else "status"
        reply = await self.service("node").call(method)
        status: dict[str, Any] = reply["status"]
        if math.isnan(status["clock_offset_s"]):
            status["clock_offset_s"] = None
        return status

    async def proposal(self, service: str) -> tuple[dict[str, frozenset[str]], str]:
        """What a service of the node proposes for the standard roles; for operators.

        Returns role → method patterns, and where roles are in the nodes' configuration what to
        write there, else "". Raises NotFound for a service that the node does not have.
        """
        reply = await self.service("node").call("proposal", service=service)
        roles = {each["role"]: frozenset(each["methods"]) for each in reply["roles"]}
        return roles, reply["how"]

    async def trust_clock(self) -> None:
        """Say that the clock of the node's machine is right, after a glitch; for operators."""
        await self.service("node").call("trust_clock")

    async def hand_over(self, tell: Callable[[str], object] | None = None) -> None:
        """Have the node give other members what it alone has, before it leaves for good.

        Returns once they have it. `tell` takes how far that is, in words. Ends with this call where
        it is cancelled. Raises what a service comes to a halt with, Unsupported where one is not
        running, LimitExceeded where the node is handing over already. For operators.
        """
        told = rpc.Subscription(
            lambda sink: self.service("node").call("hand_over", sink=sink),
            lambda item: item.decode(errors="replace"),
        )
        async with told:
            async for text in told:
                if not text:
                    return
                if tell is not None:
                    tell(text)
        raise Disconnected("the node ended the hand-over", hint="the same again")

    async def restart_overlay(self) -> None:
        """End the node's libp2p guest as a crash would; it comes back by itself."""
        await self.service("node").call("restart_overlay")

    def service(self, name: str, interface: rpc.Interface | None = None) -> Opening:
        """A service by its schema alone, opened at its first use; see `wetware.rpc` for values.

        Args:
            name: The service.
            interface: Of its first capability, from `rpc.load(FILE).NAME`; None: as installed here.

        Raises Unsupported where none is installed, at once; what `open` raises, at its first use.
        """
        if (interface := interface or known_interface(name)) is None:
            raise Unsupported(
                f"no schema of a service {name[:64]!r} is installed here "
                f"(there are: {', '.join(sorted(services()))})",
                hint=f"install its plugin, or give it: session.service({name[:64]!r}, INTERFACE)",
                code="unsupported.no_schema",
            )
        return Opening(self, name, interface)

    def __getattr__(self, name: str) -> Any:
        """The client of a service, e.g. `session.pubsub`; opened at its first use."""
        if name.startswith("_"):
            raise AttributeError(name)
        if (client := self._clients.get(name)) is None:
            service = name.removesuffix("_service")  # its name may be a method's here: `grants`
            found = find(CLIENT_GROUP, service)
            if (interface := interface_of(found)) is None:
                raise AttributeError(
                    f"no client for a service {service!r} is installed here (there are: "
                    f"{', '.join(sorted(services()))}); `session.service({service!r}, INTERFACE)` "
                    "needs none"
                )
            client = Opening(self, service, interface)
            client = self._clients[name] = client if found is interface else found(client)
        return client

    def __dir__(self) -> list[str]:
        own = set(super().__dir__())
        return sorted(own | {f"{s}_service" if s in own else s for s in services()})


async def opened(ref: rpc.Ref | None, login: Login | None, node: PeerId) -> Session:
    """The session behind a reference, which has to be of the node that was meant."""
    if ref is None:
        raise InternalError("the node answered without a session")
    identity = from_struct(Identity, await ref.call("whoami"))
    if identity.node != node:
        raise AuthError(
            f"the session is of the node {identity.node[:64]}, not of {node}",
            hint="do not use this node; tell its operator",
            code="auth.wrong_node",
        )
    if login is not None:
        login.check_cluster(identity.cluster, node)
    return Session(ref, identity, login)


async def log_in(login: Login, place: Place) -> Session:
    """The session of a login; raises as `Login.open`."""
    session = await opened(await login.open(place), login, place.peer)
    session.timeout_s = CALL_S
    session._login = replace(login, cluster=session.identity.cluster, pinned="")
    return session


async def redeemed(connection: rpc.RpcConnection, ref: SturdyRef) -> Session:
    """The session that a reference stands for; the connection is to its issuer's Gate."""
    gate = connection.bootstrap(CORE.Gate)
    reply = await gate.call("redeem", id=bytes.fromhex(ref.id), secret=ref.secret)
    return await opened(reply["session"], None, ref.peer)


async def reached(
    stack: contextlib.AsyncExitStack,
    addrs: Iterable[str],
    peer: PeerId,
    tunnel: Callable[[], Coroutine[Any, Any, Place]] | None,
    timeout_s: float,
    tunnel_after_s: float = TUNNEL_AFTER_S,
) -> Place:
    """The Gate of `peer`: dialled, or through a tunnel, if the caller has one.

    The tunnel is tried when the dial has failed, or taken longer than `tunnel_after_s`; the first
    that gets there is taken. `timeout_s` is what the caller allows for all that it does.

    Raises DialError, which says why neither way works; AuthError as `remote`.
    """
    dial_s = None if tunnel is None else timeout_s / 2
    dialling = asyncio.ensure_future(remote(stack, addrs, peer, timeout_s=dial_s))
    ways = [dialling]
    try:
        await asyncio.wait(ways, timeout=None if tunnel is None else tunnel_after_s)
        if tunnel is None or (
            dialling.done() and not isinstance(dialling.exception(), OverlayError)
        ):
            return await dialling
        ways.append(asyncio.ensure_future(tunnel()))
        while waiting := [way for way in ways if not way.done()]:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for way in done:
                if way.exception() is None:
                    return way.result()
        direct, through = (way.exception() for way in ways)
        raise DialError(
            f"{direct}; nor through a tunnel: {through}",
            hint=getattr(through, "hint", "") or getattr(direct, "hint", ""),
        ) from through
    finally:
        for way in ways:
            way.cancel()
        # Also takes what the other way failed with, which asyncio would print at some later time.
        await asyncio.gather(*ways, return_exceptions=True)


@contextlib.asynccontextmanager
async def _ending_with(first: rpc.RpcConnection, second: rpc.RpcConnection) -> AsyncIterator[None]:
    """In the block the end of the first connection ends the second."""

    async def end() -> None:
        await first.wait_closed()
        await second.aclose()

    task = asyncio.create_task(end(), name="ending a redeemed session")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def tunnelled(stack: contextlib.AsyncExitStack, session: Session, peer: PeerId) -> Place:
    """The far node's Gate, over a byte tunnel of the session's node."""
    from wetware.base.multiaddr import Multiaddr
    from wetware.overlay.link import LinkHost

    host = await stack.enter_async_context(LinkHost(Key.generate()))
    pipe = await session.cluster.tunnel(peer)
    carrier = Multiaddr("ip4", "127.0.0.1", 0, PeerId(session.identity.node))  # for messages only
    return await over_link(stack, await host.connect_pipe(pipe, peer, carrier))
