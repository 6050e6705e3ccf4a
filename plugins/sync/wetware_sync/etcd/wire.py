"""Speaking to a cluster of etcd: to one of its members at a time, and to another when that fails.

Nothing that may have been carried out is asked for again: a write without an answer is `Unknown`.
The messages and stubs are those of aetcd. Its client has no TLS and one endpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Final

import anyio

from wetware.base.log import get_logger
from wetware.base.tasks import Tasks
from wetware.errors import ConfigError, LimitExceeded, WetwareError
from wetware_sync.engine import LeaseEnded, Unknown, Unwritten, compacted
from wetware_sync.errors import HomeDown

# The node starts programs, and gRPC would have a say in each fork.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
try:
    import grpc
    from aetcd import rpc
except ImportError as exc:
    raise ConfigError(
        f"the engine etcd needs a package that is not installed: {exc.name}",
        hint="pip install 'wetware[etcd]'",
        code="config.store",
    ) from exc

pb: Any = rpc
log = get_logger("sync.etcd")

CONNECT_S: Final = 2.0
READ_S: Final = 3.0
"""For the answer to what may be asked again of another member."""
WRITE_S: Final = 3.0
"""For a write. What a leader had when it died is not answered; etcd gives that up after 7 s."""
MESSAGE_BYTES_MAX: Final = 64 << 20
ERROR_BYTES_MAX: Final = 200
_OPTIONS: Final = (
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a member that is back is not waited for
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 6000),  # etcd refuses those who ask more often than each 5 s
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
)
# What etcd says before it has begun to carry a request out.
_NOT_BEGUN: Final = ("no leader", "too many requests", "not capable", "learner", "member not found")


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM: who may be a member of etcd, and who we are to it (b"" for both: nobody)."""

    ca: bytes
    cert: bytes = b""
    key: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class Login:
    """A user of etcd."""

    user: str
    password: str = field(repr=False)


class Failed(Exception):
    """A call to a member failed. `begun`: it may have been carried out, or will be."""

    def __init__(self, error: WetwareError, *, begun: bool) -> None:
        super().__init__(str(error))
        self.error, self.begun = error, begun


_WITH_LEADER: Final = ("hasleader", "true")
"""A member that has no leader says so at once, and ends watches."""


class Member:
    """A channel to one member of etcd.

    Attributes:
        metadata: Of each call; gRPC would make it anew of a tuple.
    """

    def __init__(self, endpoint: str, channel: Any) -> None:
        self.endpoint, self.channel = endpoint, channel
        self.metadata = grpc.aio.Metadata(_WITH_LEADER)
        self.kv, self.leases = pb.KVStub(channel), pb.LeaseStub(channel)
        self.watches, self.auth = pb.WatchStub(channel), pb.AuthStub(channel)
        self.cluster, self.maintenance = pb.ClusterStub(channel), pb.MaintenanceStub(channel)


Call = Callable[[Member], Any]


class Etcd:
    """A cluster.

    Args:
        endpoints: "HOST:PORT", each of a member; a scheme before it is left out.
        tls: With which they are spoken to; None: in plain text, for loopback alone.
        login: Where etcd knows users.
    """

    def __init__(
        self, endpoints: Sequence[str], tls: Tls | None = None, login: Login | None = None
    ) -> None:
        self.endpoints = [endpoint.rpartition("://")[2] for endpoint in endpoints]
        self._tls, self.login = tls, login
        self._next = 0
        self._member: Member | None = None
        self._connecting = asyncio.Lock()
        self._closing = Tasks()

    async def __aenter__(self) -> Etcd:
        return self

    async def __aexit__(self, *_: object) -> None:
        """What is under way fails."""
        if self._member is not None:
            self.leave(self._member)
        with anyio.CancelScope(shield=True):
            await self._closing.wait()

    # --- members ----------------------------------------------------------------------------------

    async def member(self) -> Member:
        """One that can be spoken to; raises HomeDown where none can."""
        if self._member is not None:
            return self._member
        async with self._connecting:
            if self._member is not None:
                return self._member
            why = ""
            for _ in self.endpoints:
                endpoint = self.endpoints[self._next % len(self.endpoints)]
                try:
                    self._member = await self._connect(endpoint)
                except Failed as exc:
                    why = f"{endpoint}: {exc}"
                    self._next += 1
                else:
                    return self._member
        raise _down(self.endpoints, why)

    def leave(self, member: Member) -> None:
        """It failed: the next one is spoken to from now on."""
        if self._member is member:
            self._member = None
            self._next += 1
        self._closing.start(member.channel.close())

    async def _connect(self, endpoint: str) -> Member:
        if self._tls is None:
            channel = grpc.aio.insecure_channel(endpoint, options=_OPTIONS)
        else:
            tls = self._tls
            credentials = grpc.ssl_channel_credentials(tls.ca, tls.key or None, tls.cert or None)
            channel = grpc.aio.secure_channel(endpoint, credentials, options=_OPTIONS)
        member = Member(endpoint, channel)
        try:
            async with asyncio.timeout(CONNECT_S):
                while (state := channel.get_state(try_to_connect=True)) is not _READY:
                    if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                        raise Failed(WetwareError("no connection"), begun=False)  # noqa: TRY301 closed below
                    await channel.wait_for_state_change(state)
            if self.login is not None:
                await self._authenticate(member)
        except BaseException as exc:
            await channel.close()
            if isinstance(exc, TimeoutError):
                raise Failed(WetwareError(f"nothing in {CONNECT_S:g} s"), begun=False) from exc
            raise
        return member

    async def _authenticate(self, member: Member) -> None:
        login = self.login
        assert login is not None  # noqa: S101  # the callers'
        request = pb.AuthenticateRequest(name=login.user, password=login.password)
        try:
            reply = await member.auth.Authenticate(
                request, timeout=READ_S, metadata=grpc.aio.Metadata(_WITH_LEADER)
            )
        except grpc.aio.AioRpcError as exc:
            raise _failed(exc) from None
        member.metadata = grpc.aio.Metadata(_WITH_LEADER, ("token", reply.token))

    # --- calls ------------------------------------------------------------------------------------

    def read(self, call: Call) -> Coroutine[Any, Any, Any]:
        """Ask one member after another; raises HomeDown."""
        return self._ask(call, again=True)

    def write(self, call: Call, *, repeats: int = 0) -> Coroutine[Any, Any, Any]:
        """Ask one member once; another one only where the first had not begun. Raises Unknown.

        With `repeats` it is asked so often once more though it may have been carried out.
        """
        return self._ask(call, again=False, repeats=repeats)

    async def _ask(self, call: Call, *, again: bool, repeats: int = 0) -> Any:
        why = ""
        for _ in range(len(self.endpoints) + 1 + repeats):
            member = await self.member()
            try:
                return await self.at(member, call)
            except Failed as exc:
                if not isinstance(exc.error, HomeDown):  # another one would say the same
                    raise exc.error from None
                if exc.begun and repeats:  # the member need not be to blame
                    repeats -= 1
                    continue
                self.leave(member)
                if exc.begun and not again:
                    raise Unknown(
                        f"whether it was written is not known: {exc}",
                        hint="read it, before writing again",
                    ) from None
                why = f"{member.endpoint}: {exc}"
        raise _down(self.endpoints, why)

    async def at(self, member: Member, call: Call) -> Any:
        """Ask one member; raises Failed."""
        try:
            try:
                return await call(member)
            except grpc.aio.AioRpcError as exc:
                if not _is_stale(exc) or self.login is None:
                    raise
            await self._authenticate(member)
            return await call(member)
        except grpc.aio.AioRpcError as exc:
            raise _failed(exc) from None
        except (grpc.aio.UsageError, asyncio.InvalidStateError) as exc:  # its channel is closed
            raise Failed(HomeDown(f"the connection ended: {exc}"), begun=False) from None
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            raise Failed(HomeDown("the connection ended"), begun=True) from None

    # --- the cluster itself -----------------------------------------------------------------------

    async def health(self) -> Any:
        """The Status of a member, which it also has while it knows no leader."""
        return await self.read(lambda at: at.maintenance.Status(pb.StatusRequest(), timeout=READ_S))

    async def members(self) -> Sequence[Any]:
        """ID, name, peerURLs, isLearner of each."""
        reply = await self.read(asking("cluster.MemberList", pb.MemberListRequest(), READ_S))
        return list(reply.members)

    async def add(self, url: str) -> None:
        """Have one learn what the others have; it counts among them once it is promoted."""
        request = pb.MemberAddRequest(peerURLs=[url], isLearner=True)
        await self.write(asking("cluster.MemberAdd", request))

    async def promote(self, id_: int) -> None:
        await self.write(asking("cluster.MemberPromote", pb.MemberPromoteRequest(ID=id_)))

    async def remove(self, id_: int) -> None:
        await self.write(asking("cluster.MemberRemove", pb.MemberRemoveRequest(ID=id_)))

    # --- watching ---------------------------------------------------------------------------------

    async def events(
        self,
        revision: int,
        key: bytes,
        end: bytes = b"",
        *,
        previous: bool = False,
        started: Callable[[Member], None] | None = None,
    ) -> AsyncGenerator[list[Any], None]:
        """All events of a range of keys from a revision on: whole revisions, in their order.

        Raises Compacted where etcd does not have them any more, HomeDown where the member failed.
        """
        member = await self.member()
        create = pb.WatchCreateRequest(
            key=key, range_end=end, start_revision=revision, prev_kv=previous, fragment=True
        )
        call = member.watches.Watch(metadata=member.metadata)
        held: list[Any] = []
        try:
            async with asyncio.timeout(READ_S):
                await call.write(pb.WatchRequest(create_request=create))
                reply = await call.read()
            while reply is not grpc.aio.EOF:
                if reply.compact_revision:
                    raise compacted(reply.compact_revision)
                if reply.canceled:
                    raise Failed(HomeDown(reply.cancel_reason), begun=False)  # noqa: TRY301
                if reply.created and started is not None:
                    started(member)
                ready = held + list(reply.events)
                held = []
                if reply.fragment and ready:  # the rest of its last revision comes next
                    last = ready[-1].kv.mod_revision
                    held = [event for event in ready if event.kv.mod_revision == last]
                    ready = ready[: len(ready) - len(held)]
                if ready:
                    yield ready
                reply = await call.read()
            raise Failed(HomeDown("the watch was ended"), begun=False)  # noqa: TRY301
        except Failed as exc:
            self.leave(member)
            raise _down([member.endpoint], str(exc)) from None
        except grpc.aio.AioRpcError as exc:
            if _is_stale(exc) and self.login is not None:
                with contextlib.suppress(Failed):
                    await self._authenticate(member)
            else:
                self.leave(member)
            raise _down([member.endpoint], str(_failed(exc))) from None
        except (grpc.aio.UsageError, asyncio.InvalidStateError, TimeoutError) as exc:
            self.leave(member)
            raise _down([member.endpoint], str(exc) or "no answer") from None
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            raise _down([member.endpoint], "the connection ended") from None
        finally:
            await cancelled(call)


def asking(method: str, request: Any, timeout_s: float = WRITE_S) -> Call:
    """A call of one of a member's stubs: "kv.Txn"."""
    of = attrgetter(method)
    return lambda at: of(at)(request, timeout=timeout_s, metadata=at.metadata)


def ranged(request: Any) -> Call:
    return asking("kv.Range", request, READ_S)


def transaction(request: Any, timeout_s: float = WRITE_S) -> Call:
    return asking("kv.Txn", request, timeout_s)


_READY: Final = grpc.ChannelConnectivity.READY


async def cancelled(call: Any) -> None:
    """End a stream, and see it ended: the loop might be closed before gRPC's thread is done.

    One that had not begun when its channel was closed never ends.
    """
    call.cancel()
    with anyio.move_on_after(1, shield=True), contextlib.suppress(asyncio.CancelledError):
        await call.code()


def _is_cancelled() -> bool:
    """Whether this task is: with a CancelledError gRPC also ends the calls of a closed channel."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def _is_stale(exc: Any) -> bool:
    return exc.code() is grpc.StatusCode.UNAUTHENTICATED


def _down(endpoints: Sequence[str], why: str) -> HomeDown:
    return HomeDown(
        f"etcd cannot be reached at {', '.join(endpoints)}: {why}",
        hint="it takes more than half of its members; start those that are down",
    )


def _failed(exc: Any) -> Failed:
    """What a gRPC error means: of those that etcd gives by itself nothing is begun."""
    code, text = exc.code(), (exc.details() or "")[:ERROR_BYTES_MAX]
    said = text.removeprefix("etcdserver: ")
    error: WetwareError
    if code is grpc.StatusCode.NOT_FOUND and "lease" in text:
        error = LeaseEnded("there is no such lease", hint="it has ended, with its keys")
    elif code is grpc.StatusCode.OUT_OF_RANGE:
        error = compacted(0)
    elif "space exceeded" in text:
        error = Unwritten(
            f"etcd takes no more: {said}",
            hint="delete some, compact, and `etcdctl alarm disarm`; or raise --quota-backend-bytes",
        )
    elif code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED) and text:
        error = LimitExceeded(
            f"etcd refuses it: {said}",
            hint="etcd's own bounds are its --max-txn-ops and --max-request-bytes",
        )
    elif code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.FAILED_PRECONDITION):
        ours = "auth" in text or code is grpc.StatusCode.PERMISSION_DENIED
        error = ConfigError(
            f"etcd refuses {'us' if ours else 'it as it is now'}: {said}",
            hint="[plugins.sync] user and password_file; `etcdctl user grant-role`"
            if ours
            else "are all its members up, and healthy? `ww sync etcd status`",
            code="config.store",
        )
    else:
        begun = not any(word in text for word in _NOT_BEGUN) and not _is_stale(exc)
        return Failed(HomeDown(said or code.name), begun=begun)
    return Failed(error, begun=False)
