"""References to a peer's objects, and our calls on them.

No pycapnp object is ever reachable from what an application holds. A `Ref` is an ID; its end of the
connection has the pycapnp object, is itself held by the loop's runtime, and releases on the loop.
So the garbage collector may run in any thread. Frames that can outlive a call (a traceback keeps
them) drop what they had of pycapnp, and the error itself, before they raise.
"""

from __future__ import annotations

import asyncio
import contextlib
import warnings
import weakref
from asyncio import _get_running_loop
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import capnp

from wetware.base.log import get_logger
from wetware.errors import (
    Disconnected,
    InternalError,
    InvalidArgument,
    LimitExceeded,
    TimedOut,
    Unsupported,
    WetwareError,
)
from wetware.rpc.codec import BadValue, Crossing, nearest
from wetware.rpc.kjloop import finish
from wetware.rpc.values import payload_bytes
from wetware.rpc.wire import fresh, from_kj, internal_error

if TYPE_CHECKING:
    from wetware.rpc.kjloop import Runtime
    from wetware.rpc.limits import RpcLimits
    from wetware.rpc.schema import Interface, Method
    from wetware.rpc.servant import Guard
    from wetware.rpc.transport import Channel, RpcTransport

log = get_logger("rpc")

_CAP_BYTES: Final = 24
"""A capability in a message: a pointer and a descriptor."""

_limit_s: ContextVar[float | None] = ContextVar("wetware_rpc_time_limit")


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """How long each call may take that is made in the block, instead of its connection's time.

    None is for ever. It holds for this task, and for tasks that are started in the block; what
    takes longer raises TimedOut.
    """
    token = _limit_s.set(seconds)
    try:
        yield
    finally:
        _limit_s.reset(token)


class Ref:
    """A reference to an object at the peer; having it is the permission to call it.

    Each method of its interface is a coroutine function of the reference: `await topic.publish(
    message=b"…")`. It returns a dict of results, None if the method has none. Methods whose names
    the class has itself (`call`, `cast`, `close`, …) are reached through `call`.

    A reference is bound to the event loop of its connection. Dropping it, in any thread, releases
    the object at the peer, as `close` does at once.
    """

    __slots__ = ("__weakref__", "_end", "_guard", "_handle", "_id", "_interface")

    _end: Caller
    _id: int
    _interface: Interface | None
    _guard: Guard | None

    @property
    def limit_s(self) -> float | None:
        """How long a call that is made now may take: see `time_limit`. None is for ever."""
        return _limit_s.get(self._end.timeout_s)

    def __init__(
        self, end: Caller, ref_id: int, interface: Interface | None, guard: Guard | None
    ) -> None:
        self._end = end
        self._id = ref_id
        self._interface = interface
        self._guard = guard
        self._handle = end.handle()  # the connection lives while somebody holds a reference

    @property
    def interface(self) -> Interface | None:
        """What it can be asked; None if that is not known yet, see `cast`."""
        return self._interface

    @property
    def connection(self) -> RpcConnection:
        """What it came by. Raises Disconnected where the application has none: it was served."""
        if self._handle is None:
            raise Disconnected("the reference came by a connection that is served")
        return self._handle

    @property
    def closed(self) -> bool:
        """Whether it was closed, by us or with its connection."""
        return self._id not in self._end.clients

    def call(self, name: str, /, **params: Any) -> Coroutine[Any, Any, Any]:
        """Call the method `name` (snake_case).

        Raises what the servant raised (`wetware.errors`), Disconnected if the connection ended,
        TypeError for parameters of a wrong type, InvalidArgument for others that do not fit,
        LimitExceeded for a message that is too large, TimedOut after `time_limit`, or else the
        connection's `timeout_s`. Cancelling cancels the call at the peer.
        """
        interface = self._interface
        if interface is None:
            raise InvalidArgument(
                "the interface of this reference is not known", hint="cast it first"
            )
        method = interface.methods.get(name)
        if method is None:
            raise Unsupported(
                f"{interface.name} has no method {name!r}", hint=nearest(name, interface.methods)
            )
        return call(self, method, params)

    def cast(self, interface: Interface) -> Ref:
        """The same object under another interface. Nothing is checked until a method is called."""
        client = self._end.client(self)
        return self._end.register(client.cast_as(interface.raw), interface, self._guard)

    def under(self, guard: Guard) -> Ref:
        """The same object, called under a guard: its end ends calls, and it is charged for them.

        It takes the place of the guard that the reference came under: derive it from that one.
        """
        return self._end.register(self._end.client(self), self._interface, guard)

    def close(self) -> None:
        """Release the object at the peer; further calls raise Disconnected. Idempotent."""
        self._end.check_loop()
        self._end.clients.pop(self._id, None)

    def __del__(self) -> None:
        end = getattr(self, "_end", None)
        if end is not None:
            end.finalized(self._id)

    def __repr__(self) -> str:
        name = self._interface.name if self._interface else "?"
        return f"<Ref {name} {self._id}{' closed' if self.closed else ''}>"

    def __reduce__(self) -> str:
        raise TypeError("a Ref is bound to its connection and cannot be copied or pickled")


def _ref_class(interface: Interface) -> type[Ref]:
    """The subclass of Ref with the interface's methods; made once."""
    if interface.ref_class is None:
        namespace: dict[str, Any] = {"__slots__": (), "__module__": __name__}
        for method in interface.methods.values():
            if not hasattr(Ref, method.name):
                namespace[method.name] = _ref_method(method)
        interface.ref_class = type("Ref", (Ref,), namespace)
    return interface.ref_class


def _ref_method(method: Method) -> Callable[..., Coroutine[Any, Any, Any]]:
    def method_(self: Ref, **params: Any) -> Coroutine[Any, Any, Any]:
        return call(self, method, params)

    method_.__name__ = method.name
    method_.__qualname__ = method.where
    method_.__doc__ = f"`{method.where}({', '.join(method.params)})`."
    return method_


# --- calling --------------------------------------------------------------------------------------


async def call(ref: Ref, method: Method, params: Mapping[str, Any]) -> dict[str, Any] | None:
    """See `Ref.call`."""
    end = ref._end
    if _get_running_loop() is not end.loop:
        end.check_loop()
    if end.queue or end.full:
        await end.place()
    else:
        end.calls_out += 1
    size = 0
    try:
        guard = ref._guard
        if guard is not None and guard.metered:
            waiting = guard.charge(method, payload_bytes(params))
            if waiting is not None:
                await waiting
        sent = _send(end, ref, method, params)
        size = sent.pop()
        end.bytes_out += size
        if end.queue:
            end.wake()
        limit_s = _limit_s.get(end.timeout_s)
        # Neither promise nor response are ever in a local variable: see the module.
        if guard is None and limit_s is None:
            return _results(await sent.pop(), method, end.crossing)
        return await _bounded(sent, guard, limit_s, method, end)
    except capnp.KjException as exc:
        failure = [from_kj(exc, method.where)]
    finally:
        end.calls_out -= 1
        end.bytes_out -= size
        if end.queue:
            end.wake()
    raise failure.pop()


async def _bounded(
    sent: list[Any], guard: Guard | None, limit_s: float | None, method: Method, end: Caller
) -> dict[str, Any] | None:
    """Await the results of a call unless the guard or its time ends first."""
    with contextlib.ExitStack() as stack:
        try:
            async with asyncio.timeout(limit_s) as scope:

                def stop(_error: WetwareError) -> None:
                    if not scope.expired():
                        scope.reschedule(end.loop.time())

                if guard is not None:
                    stack.callback(guard.on_end(stop))
                return _results(await sent.pop(), method, end.crossing_under(guard))
        except TimeoutError:
            if not scope.expired():
                raise
    if guard is not None and guard.ended is not None:
        raise fresh(guard.ended)
    raise TimedOut(
        f"{method.where}: no answer within {limit_s:g} s; the call may or may not have run",
        hint="give it more time: `wetware.time_limit(SECONDS)`",
    )


def _send(end: Caller, ref: Ref, method: Method, params: Mapping[str, Any]) -> list[Any]:
    """Send a call; returns [promise, bytes of the parameters]."""
    guard = ref._guard
    if guard is not None and (blocked := guard.blocked) is not None:
        raise fresh(blocked)
    client = end.client(ref)
    request = None
    bytes_max = end.limits.message_bytes_max
    failure: list[Exception]
    try:
        size = method.param_bytes
        if size is not None:
            flat, extra = method.param_codec.flatten(params)
            size += extra
            if size <= bytes_max:
                return [client._send_helper(method.wire, None, None, flat), size]
        else:
            request = client._request_helper(method.wire, None, None, None)
            method.param_codec.store(request, params, end.crossing_under(guard))
            size = message_size(request)
            if size <= bytes_max:
                return [request.send(), size]
        failure = [too_large(method, "parameters", size, bytes_max, "send it in parts")]
    except BadValue as exc:
        failure = [exc.public(method.where)]
    except WetwareError as exc:
        failure = [fresh(exc)]
    except RecursionError:
        failure = [InvalidArgument(f"{method.where}: parameters are nested too deep")]
    except capnp.KjException as exc:  # a broken connection, most likely
        failure = [from_kj(exc, method.where)]
    except Exception as exc:  # a value that the codec should have refused
        failure = [internal_error(method.where, exc)]
    del request, client
    raise failure.pop()


def message_size(struct: Any) -> int:
    """Bytes of parameters or results, as limits count them."""
    size = struct.total_size
    return int(size.word_count) * 8 + int(size.cap_count) * _CAP_BYTES


def too_large(method: Method, what: str, size: int, bytes_max: int, hint: str) -> LimitExceeded:
    """The refusal of parameters or results that are too large."""
    return LimitExceeded(
        f"{method.where}: {what} of {size} bytes: message_bytes_max is {bytes_max}", hint=hint
    )


def _results(response: Any, method: Method, crossing: Crossing) -> dict[str, Any] | None:
    """The results as plain values; None for a method without any."""
    if not method.results:
        return None
    try:
        return method.result_codec.read(response, crossing)
    except WetwareError as exc:
        failure = [fresh(exc)]
    except Exception as exc:  # hostile bytes: pycapnp, UTF-8, recursion
        log.debug("rpc.malformed", method=method.where, error=repr(exc)[:200])
        failure = [InternalError(f"{method.where}: the peer sent malformed results")]
    del response
    raise failure.pop()


# --- what calls need of a connection --------------------------------------------------------------


class Caller:
    """An end of a connection, as far as it calls: what it holds of the peer, and its own calls.

    Attributes:
        clients: pycapnp's object of each reference, by the reference's ID.
        timeout_s: How long a call may take where `time_limit` does not say.
        calls_out: Calls in flight.
        bytes_out: Of their parameters.
        queue: Calls that wait for a place among them.
        streams: Byte streams, those included that the peer has not attached yet.
        lost: Set once the connection is gone.
    """

    transport: RpcTransport
    _rpc: Any  # pycapnp's TwoPartyClient or TwoPartyServer

    def __init__(self, runtime: Runtime, limits: RpcLimits) -> None:
        self.runtime = runtime
        self.loop = runtime.loop
        self.limits = limits
        self.crossing = Crossing(self, None)
        self.closed = False
        self.lost = asyncio.Event()
        self.clients: dict[int, Any] = {}
        self._next_id = 0
        self._dropped: deque[int] = deque()
        self._drop_due = False
        self._handle: weakref.ref[RpcConnection] | None = None
        self.timeout_s: float | None = None
        self.calls_out = 0
        self.bytes_out = 0
        self.queue: deque[asyncio.Future[None]] = deque()
        self.streams: set[Channel] = set()

    async def aclose(self) -> None:
        """Close the connection."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Close it, which nobody waits for."""
        self._closer = self.loop.create_task(self.aclose())

    def crossing_under(self, guard: Guard | None) -> Crossing:
        """For a message that crosses under `guard`."""
        return self.crossing if guard is None else Crossing(self, guard)

    def check_loop(self) -> None:
        """Raise unless we run on the connection's loop."""
        if _get_running_loop() is not self.loop:
            raise WetwareError(
                "a Ref was used outside of the event loop that its connection belongs to",
                hint="use asyncio.run_coroutine_threadsafe() with the connection's loop",
                code="rpc.wrong_loop",
            )

    # --- references -------------------------------------------------------------------------------

    def bootstrap(self, interface: Interface) -> Ref:
        """A reference to the peer's first object."""
        self.check_loop()
        if self.closed:
            raise Disconnected("the connection is closed", hint="connect again")
        return self.take(self._rpc.bootstrap().cast_as(interface.raw), interface, None)

    def take(self, client: Any, interface: Interface | None, guard: Guard | None) -> Ref:
        """A Ref for a capability that arrived."""
        if len(self.clients) >= self.limits.imports_max:
            raise LimitExceeded(
                f"{len(self.clients)} references are held: imports_max is "
                f"{self.limits.imports_max}",
                hint="close references that are not used any more",
            )
        return self.register(client, interface, guard)

    def register(self, client: Any, interface: Interface | None, guard: Guard | None) -> Ref:
        """A Ref for a pycapnp client."""
        client._parent = None  # pycapnp would keep the whole message that it came in
        self._next_id = ref_id = self._next_id + 1
        self.clients[ref_id] = client
        ref_class = Ref if interface is None else interface.ref_class or _ref_class(interface)
        return ref_class(self, ref_id, interface, guard)

    def client(self, ref: Ref) -> Any:
        """The pycapnp object of a reference."""
        client = self.clients.get(ref._id)
        if client is None:
            if self.closed:
                raise Disconnected("the connection is closed", hint="connect again")
            raise InvalidArgument("the reference is closed", hint="ask for it again")
        return client

    def handle(self) -> RpcConnection | None:
        """What the application holds of this connection, if it does."""
        return self._handle() if self._handle is not None else None

    def finalized(self, ref_id: int) -> None:
        """A Ref is gone. Called by finalizers, in any thread: only notes it and wakes the loop."""
        if self.closed:
            return
        self._dropped.append(ref_id)
        if not self._drop_due:
            self._drop_due = True
            self.runtime.soon(self._drop)

    def _drop(self) -> None:
        self._drop_due = False
        dropped, clients = self._dropped, self.clients
        while dropped:
            clients.pop(dropped.popleft(), None)

    # --- calls in flight --------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """Whether a call has to wait for a place."""
        limits = self.limits
        return self.calls_out >= limits.calls_out_max or self.bytes_out >= limits.call_bytes_out_max

    async def place(self) -> None:
        """Wait for a place among the calls in flight, and take it."""
        future = self.loop.create_future()
        self.queue.append(future)
        try:
            async with asyncio.timeout(self.limits.call_wait_s):
                await future
        except BaseException as exc:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.calls_out -= 1  # the place was given, and nobody takes it
                self.wake()
            elif future in self.queue:
                self.queue.remove(future)
            if isinstance(exc, TimeoutError):
                raise LimitExceeded(
                    f"no place for a call within {self.limits.call_wait_s:g} s: calls_out_max is "
                    f"{self.limits.calls_out_max}, call_bytes_out_max is "
                    f"{self.limits.call_bytes_out_max}",
                    hint="the peer answers slowly; make fewer calls at a time",
                ) from None
            raise

    def wake(self) -> None:
        """Give a free place to the first that waits; it wakes the next one when it has sent."""
        while self.queue and not self.full:
            future = self.queue.popleft()
            if not future.done():
                self.calls_out += 1
                future.set_result(None)
                return

    def end_calls(self) -> None:
        """The connection is closed: what waits or is held here goes with it."""
        self.clients.clear()
        while self.queue:
            future = self.queue.popleft()
            if not future.done():
                future.set_exception(Disconnected("the connection ended", hint="connect again"))


Again: TypeAlias = "Callable[[RpcConnection], Awaitable[RpcConnection]]"


class RpcConnection:
    """A connection to a peer's RPC server, from `connect` or `connect_unix`.

    Close it with `aclose`, or use it as `async with`. References keep it open.

    Attributes:
        again: Waits for the connection that takes the place of one that was lost, where the
            application makes one; raises where it cannot. None where it does not.
    """

    __slots__ = ("__weakref__", "_end", "_held", "again")

    def __init__(self, end: Caller) -> None:
        self._end = end
        self._held = True
        self.again: Again | None = None
        end._handle = weakref.ref(self)  # without it and all references we close

    def bootstrap(self, interface: Interface) -> Ref:
        """The peer's first object, under `interface`; costs nothing until it is called."""
        return self._end.bootstrap(interface)

    @property
    def limit_s(self) -> float | None:
        """How long a call by it may take that is made now."""
        return _limit_s.get(self._end.timeout_s)

    @property
    def timeout_s(self) -> float | None:
        """How long a call by it may take where `time_limit` does not say; None at first."""
        return self._end.timeout_s

    @timeout_s.setter
    def timeout_s(self, seconds: float | None) -> None:
        self._end.timeout_s = seconds

    @property
    def closed(self) -> bool:
        """Whether the connection has ended."""
        return self._end.closed

    @property
    def held(self) -> int:
        """References and byte streams of the connection that the application holds."""
        return len(self._end.clients) + len(self._end.streams)

    async def wait_closed(self) -> None:
        """Until the connection has ended, whoever ended it."""
        await self._end.lost.wait()

    async def aclose(self) -> None:
        """Close. Calls in flight raise Disconnected. Idempotent."""
        self._end.check_loop()
        if self._held:
            self._held = False
            await finish(self._end.aclose())

    async def __aenter__(self) -> RpcConnection:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if getattr(self, "_held", False):
            self._held = False
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=1)
            self._end.runtime.soon(self._end.abandon)

    def __repr__(self) -> str:
        return f"<RpcConnection{' closed' if self.closed else ''}>"
