"""One RPC connection: references, exports, dispatch.

No pycapnp object is ever reachable from what an application holds. A `Ref` is an ID; the
connection's `End` has the pycapnp object, is itself held by the loop's runtime, and releases on the
loop. So the garbage collector may run in any thread. Frames that can outlive a call (a traceback
keeps them) drop what they had of pycapnp before they raise.
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
from capnp.lib.capnp import _DynamicCapabilityServer

from wetware.base.log import get_logger
from wetware.errors import (
    Disconnected,
    InternalError,
    InvalidArgument,
    LimitExceeded,
    TimedOut,
    Unsupported,
    WetwareError,
    from_wire,
)
from wetware.rpc import kjloop as _runtime
from wetware.rpc.codec import BadType, BadValue, expected, nearest
from wetware.rpc.limits import RpcLimits, for_strangers, wire_bytes_max
from wetware.rpc.schema import WW
from wetware.rpc.servant import Guard, Guarded, Servant, ServedConnection, _current
from wetware.rpc.transport import Pipe, RpcTransport, open_stream
from wetware.rpc.values import payload_bytes
from wetware.rpc.wire import from_kj, internal_error, to_wire

if TYPE_CHECKING:
    from wetware.rpc.schema import Interface, Method

log = get_logger("rpc")

_CAP_BYTES: Final = 24
"""A capability in a message: a pointer and a descriptor."""
_NESTED_READS: Final = 4
"""How often over a message may be read, in the sense of Cap'n Proto's traversal limit."""

_current_task = asyncio.current_task
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

    _end: End
    _id: int
    _interface: Interface | None
    _guard: Guard | None

    def __init__(
        self, end: End, ref_id: int, interface: Interface | None, guard: Guard | None
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
        return _call(self, method, params)

    def cast(self, interface: Interface) -> Ref:
        """The same object under another interface. Nothing is checked until a method is called."""
        client = self._end.client(self)
        return self._end.register(client.cast_as(interface.raw), interface, self._guard)

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
    def call(self: Ref, **params: Any) -> Coroutine[Any, Any, Any]:
        return _call(self, method, params)

    call.__name__ = method.name
    call.__qualname__ = method.where
    call.__doc__ = f"`{method.where}({', '.join(method.params)})`."
    return call


# --- calling
# ----------------------------------------------------------------------------------------


async def _call(ref: Ref, method: Method, params: Mapping[str, Any]) -> dict[str, Any] | None:
    end = ref._end
    if _get_running_loop() is not end.loop:
        end.check_loop()
    if end.queue or end.calls_out >= end.calls_out_max or end.bytes_out >= end.bytes_out_max:
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
            return _results(await sent.pop(), method, end, None)
        return await _bounded(guard, limit_s, sent.pop().__await__(), method, end)
    except capnp.KjException as exc:
        error = from_kj(exc, method.where)
    finally:
        end.calls_out -= 1
        end.bytes_out -= size
        if end.queue:
            end.wake()
    try:
        raise error
    finally:
        del error  # a frame that refers to the exception that refers to it lives until the next GC


async def _bounded(
    guard: Guard | None, limit_s: float | None, waiting: Any, method: Method, end: End
) -> dict[str, Any] | None:
    """Await the results of a call unless the guard or its time ends first."""
    future = waiting.send(None)  # an asyncio future yields itself when awaited
    future._asyncio_future_blocking = False
    del waiting
    cut = False

    def stop(_error: WetwareError | None = None) -> None:
        nonlocal cut
        cut = True
        if future is not None:
            future.cancel()

    remove = None if guard is None else guard.on_end(stop)
    timer = None if limit_s is None else end.loop.call_later(limit_s, stop)
    try:
        return _results(await future, method, end, guard)
    except asyncio.CancelledError:
        task = _current_task()
        if not cut or (task is not None and task.cancelling()):
            raise
    finally:
        future = None
        if timer is not None:
            timer.cancel()
        if remove is not None:
            remove()
    if guard is not None and guard.ended is not None:
        raise _fresh(guard.ended)
    raise TimedOut(
        f"{method.where}: no answer within {limit_s:g} s; the call may or may not have run",
        hint="give it more time: `wetware.time_limit(SECONDS)`",
    )


def _fresh(error: WetwareError) -> WetwareError:
    """A copy to raise: one instance raised again and again would collect tracebacks."""
    return from_wire(error.code, error.message, error.hint)


def _send(end: End, ref: Ref, method: Method, params: Mapping[str, Any]) -> list[Any]:
    """Send a call; returns [promise, bytes of the parameters]."""
    guard = ref._guard
    if guard is not None and (blocked := guard.blocked) is not None:
        raise _fresh(blocked)
    client = end.client(ref)
    request = None
    error: WetwareError | TypeError
    try:
        size = method.param_bytes
        if size is not None:
            flat, extra = method.param_codec.flatten(params)
            size += extra
            if size <= end.message_bytes_max:
                return [client._send_helper(method.wire, None, None, flat), size]
        else:
            request = client._request_helper(method.wire, None, None, None)
            method.param_codec.store(request, params, end, guard)
            size = _measure(request)
            if size <= end.message_bytes_max:
                return [request.send(), size]
        error = LimitExceeded(
            f"{method.where}: parameters of {size} bytes: message_bytes_max is "
            f"{end.message_bytes_max}",
            hint="send it in parts",
        )
    except BadValue as exc:
        error = exc.public(method.where)
    except WetwareError as exc:
        error = _fresh(exc)
    except RecursionError:
        error = InvalidArgument(f"{method.where}: parameters are nested too deep")
    except capnp.KjException as exc:  # a broken connection, most likely
        error = from_kj(exc, method.where)
    except Exception as exc:  # a value that the codec should have refused
        error = internal_error(method.where, exc)
    del request, client
    try:
        raise error
    finally:
        del error


def _measure(struct: Any) -> int:
    size = struct.total_size
    return int(size.word_count) * 8 + int(size.cap_count) * _CAP_BYTES


def _results(response: Any, method: Method, end: End, guard: Guard | None) -> dict[str, Any] | None:
    """The results as plain values; None for a method without any."""
    if not method.results:
        return None
    try:
        return method.result_codec.read(response, end, guard)
    except WetwareError as exc:
        error = _fresh(exc)
    except Exception as exc:  # hostile bytes: pycapnp, UTF-8, recursion
        log.debug("rpc.malformed", method=method.where, error=repr(exc)[:200])
        error = InternalError(f"{method.where}: the peer sent malformed results")
    del response
    try:
        raise error
    finally:
        del error


# --- being called
# -----------------------------------------------------------------------------------


class _Export(_DynamicCapabilityServer):
    """One of our objects in the hands of pycapnp: dispatches calls to a servant, or forwards them.

    pycapnp holds the only reference, so that the end of this object tells that the peer let go.
    """

    _end: End
    _servant: Servant | None
    _ref: Ref | None
    _guard: Guard | None
    _frame: tuple[Guard | None, ServedConnection]

    def __init__(
        self, end: End, servant: Servant | None, ref: Ref | None, guard: Guard | None
    ) -> None:
        self._end = end
        self._servant = servant
        self._ref = ref  # a foreign reference behind the membrane
        self._guard = guard
        self._frame = (guard, end.served)
        end.exports += 1
        if guard is not None:
            guard.exported()
        if servant is not None:
            servant.__ww_exports__ += 1

    def __del__(self) -> None:
        end = self.__dict__.get("_end")
        if end is not None:
            end.exports -= 1
            guard, servant = self._guard, self._servant
            if guard is not None and guard.unexported():
                end.runtime.soon(guard.let_go)
            if servant is not None:
                servant.__ww_exports__ -= 1
                if servant.__ww_exports__ == 0:
                    end.runtime.unheld(servant)


def _undelivered(runtime: _runtime.Runtime, values: Any) -> None:
    """Servants among `values`, which do not reach the peer after all, are released.

    One that was exported before the answer failed has pycapnp's export still, and goes with that.
    """
    todo, seen = [values], {}
    while todo:
        value = todo.pop()
        if isinstance(value, Guarded):
            value = value.servant
        if isinstance(value, Servant):
            if value.__ww_exports__ == 0:
                runtime.unheld(value)
        elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen[id(value)] = value  # kept, so that no other gets its id
            todo.extend(value.values() if isinstance(value, Mapping) else value)


def _export_class(interface: Interface) -> type[_Export]:
    if interface.export_class is None:
        namespace: dict[str, Any] = {
            "schema": interface.raw,
            "__ww_module__": interface.module,
            "__module__": __name__,
        }
        for method in interface.methods.values():
            # pycapnp looks for this name first and passes the call's context alone.
            namespace[f"{method.wire}_context"] = _dispatcher(method)
        interface.export_class = type(f"{interface.name}Export", (_Export,), namespace)
    return interface.export_class


def _dispatcher(method: Method) -> Callable[..., Coroutine[Any, Any, None]]:
    """The coroutine function that pycapnp runs, in a task of its own, for each call."""
    name = method.name

    async def dispatch(self: _Export, context: Any) -> None:
        end, guard = self._end, self._guard
        task: Any = _current_task()  # pycapnp runs each call in one of its own
        args: Any
        values: Any = None  # what the servant returned and the peer has not got
        entered = False
        try:
            if len(end.tasks) >= end.calls_in_max:
                raise LimitExceeded(  # noqa: TRY301  # one exit for all refusals
                    f"{method.where}: {end.calls_in_max} calls are running (calls_in_max)",
                    hint="wait for some to end",
                )
            end.tasks.add(task)
            _current.set(self._frame)
            args = _arguments(context, method, end, guard)
            if guard is not None:
                waiting = guard.enter(method, args, task)
                entered = True
                if waiting is not None:
                    await waiting
            if self._ref is None:
                values = await getattr(self._servant, name)(**args)
            else:
                values = await _call(self._ref, method, args)
            # The call stays entered until it is answered: the end of its guard cuts the wait, too.
            if guard is not None and guard.ended is not None:
                raise _fresh(guard.ended)  # noqa: TRY301
            if method.results:
                if end.results_wait():
                    await end.results_place()
                    if guard is not None and guard.ended is not None:
                        raise _fresh(guard.ended)  # noqa: TRY301
                onward = None if guard is None else guard.onward(method, args)
                size = _answer(context, method, values, end, onward)
                if guard is not None and guard.metered:
                    await _charge(guard, method, end, size)
                values = None
            elif values is not None:
                raise TypeError(f"returned {type(values).__name__}, not None")  # noqa: TRY301
            return  # noqa: TRY300  # the errors below leave by the raise at the end
        except asyncio.CancelledError:
            if not entered or guard is None or guard.ended is None or end.closed:
                raise
            failure = [to_wire(guard.ended)]
        except WetwareError as exc:
            failure = [to_wire(exc)]
        except Exception as exc:  # a servant's defect is logged, not shown
            failure = [to_wire(internal_error(method.where, exc))]
        finally:
            if entered:
                guard.leave(task)  # type: ignore[union-attr]  # it was entered
            end.tasks.discard(task)
            if values is not None:
                _undelivered(end.runtime, values)
            # The frame may live on in somebody's traceback, and the task refers to it: no cycles.
            context = task = args = values = None
        raise failure.pop()

    dispatch.__name__ = name
    dispatch.__qualname__ = method.where
    return dispatch


async def _charge(guard: Guard, method: Method, end: End, size: int) -> None:
    """Charge the bytes of an answer; if they are refused, the answer does not count as waiting."""
    try:
        if (waiting := guard.charge(method, size)) is not None:
            await waiting
    except BaseException:
        end.results_pending = max(0, end.results_pending - size)
        raise


def _arguments(context: Any, method: Method, end: End, guard: Guard | None) -> dict[str, Any]:
    """A call's parameters as plain values; the message is freed."""
    try:
        args = method.param_codec.read(context.params, end, guard)
        context.release_params()
        return args  # noqa: TRY300  # errors leave by the raise at the end
    except WetwareError as exc:
        error = _fresh(exc)
    except Exception as exc:  # hostile bytes: pycapnp, UTF-8, recursion
        log.debug("rpc.malformed", method=method.where, error=repr(exc)[:200])
        error = InvalidArgument(f"{method.where}: malformed parameters")
    del context
    try:
        raise error
    finally:
        del error


def _answer(context: Any, method: Method, values: Any, end: End, guard: Guard | None) -> int:
    """Put a servant's results into the answer; returns their size in bytes."""
    results = None
    error: Exception
    try:
        if values is None:
            values = {}
        elif type(values) is not dict:
            raise expected("dict", values)  # noqa: TRY301
        results = context.results
        method.result_codec.store(results, values, end, guard)
        size = _measure(results)
        if size <= end.message_bytes_max:
            end.results_pending += size
            return size
        error = LimitExceeded(
            f"{method.where}: results of {size} bytes: message_bytes_max is "
            f"{end.message_bytes_max}",
            hint="ask for less at a time",
        )
    except BadValue as exc:  # the servant's defect, not the caller's
        error = TypeError(f"bad results: {exc.text(method.where)}")
    except WetwareError as exc:
        error = _fresh(exc)
    except Exception as exc:  # pycapnp's
        error = TypeError(f"bad results: {str(exc)[:200]}")
    del context, results
    try:
        raise error
    finally:
        del error


# --- the connection
# ---------------------------------------------------------------------------------


class End:
    """Our end of a connection: holds all its pycapnp objects. Lives in the runtime until closed."""

    def __init__(
        self,
        runtime: _runtime.Runtime,
        pipe: Pipe,
        limits: RpcLimits,
        bootstrap: Servant | Guarded | None,
        *,
        stranger_limits: RpcLimits | None = None,
        trust_s: float | None = None,
    ) -> None:
        self.runtime = runtime
        self.loop = runtime.loop
        self.closed = False
        self.served = ServedConnection(self)
        self._trusted_limits = limits
        self._use(limits if stranger_limits is None else stranger_limits)
        # Capabilities that we hold.
        self.clients: dict[int, Any] = {}
        self._next_id = 0
        self._dropped: deque[int] = deque()
        self._drop_due = False
        self._handle: weakref.ref[RpcConnection] | None = None
        # Our calls.
        self.timeout_s: float | None = None
        self.calls_out = 0
        self.bytes_out = 0
        self.queue: deque[asyncio.Future[None]] = deque()
        self.parts_left = 0  # for the codec
        # The peer's calls.
        self.tasks: set[asyncio.Task[Any]] = set()
        self.exports = 0
        self.results_pending = 0
        self._results_free: asyncio.Event | None = None
        self._lost = asyncio.Event()
        self._released = False
        self.reason: Exception | None = None

        self.transport = RpcTransport(
            pipe, self.limits, self._on_lost, self._on_sent, self.on_drained, runtime.partials
        )
        self.transport.trusted = stranger_limits is None and trust_s is None
        self._trust_due: asyncio.TimerHandle | None = None
        self._stream: Any = open_stream(self.transport)
        reads = _NESTED_READS * wire_bytes_max(limits) // 8
        if bootstrap is None:
            self._rpc: Any = capnp.TwoPartyClient(self._stream, traversal_limit_in_words=reads)
        else:
            self._rpc = capnp.TwoPartyServer(
                self._stream,
                bootstrap=self._export(bootstrap, None, None),
                traversal_limit_in_words=reads,
            )
        runtime.connections.add(self)
        if trust_s is not None:
            self._trust_due = self.loop.call_later(trust_s, self._not_trusted, trust_s)

    def _use(self, limits: RpcLimits) -> None:
        self.limits = limits
        self.message_bytes_max = limits.message_bytes_max
        self.calls_out_max = limits.calls_out_max
        self.bytes_out_max = limits.call_bytes_out_max
        self.calls_in_max = limits.calls_in_max

    def trust(self) -> None:
        """The peer is no stranger any more: full limits, no deadline."""
        self.check_loop()
        if self.closed or self.transport.trusted:
            return
        self.transport.trusted = True
        self._end_trust_wait()
        self._use(self._trusted_limits)
        self.transport.use(self._trusted_limits)
        self.wake()
        self.on_drained()

    def _not_trusted(self, after_s: float) -> None:
        self._trust_due = None
        log.info("rpc.not_trusted", peer=self.transport.peer, after_s=after_s)
        self.transport.abort()

    def _end_trust_wait(self) -> None:
        if self._trust_due is not None:
            self._trust_due.cancel()
            self._trust_due = None

    # --- capabilities: the codec's Crossing
    # ---------------------------------------------------------

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

    def give(self, value: Any, interface: Interface | None, guard: Guard | None) -> Any:
        """A pycapnp client for a value that stands for a capability."""
        if isinstance(value, Guarded) and isinstance(value.target, Ref):
            return self._give_ref(value.target, interface, value.guard)
        if isinstance(value, Ref):
            return self._give_ref(value, interface, guard)
        if isinstance(value, (Servant, Guarded)):
            export = self._export(value, interface, guard)
            return export.__ww_module__._new_client(export)
        raise expected("a capability (a Servant or a Ref)", value)

    def _export(
        self, value: Servant | Guarded, interface: Interface | None, guard: Guard | None
    ) -> Any:
        if isinstance(value, Guarded):
            guard = value.guard
        servant = value if isinstance(value, Servant) else value.servant
        if servant is None:
            raise BadValue("a connection's first object is a Servant")
        own = servant.__ww_interface__
        if own is None:
            raise BadValue(f"{type(servant).__name__} is bound to no interface")
        return self._new_export(own, servant, None, interface, guard)

    def _new_export(
        self,
        own: Interface,
        servant: Servant | None,
        ref: Ref | None,
        interface: Interface | None,
        guard: Guard | None,
    ) -> Any:
        if interface is not None and interface is not own and not own.is_a(interface):
            raise BadType(f"expected a {interface.name}, not a {own.name}")
        if self.exports >= self.limits.exports_max:
            raise LimitExceeded(
                f"the peer holds {self.exports} objects: exports_max is {self.limits.exports_max}",
                hint="close references that are not used any more",
            )
        return (own.export_class or _export_class(own))(self, servant, ref, guard)

    def _give_ref(self, ref: Ref, interface: Interface | None, guard: Guard | None) -> Any:
        own, other = ref._interface, ref._end
        if other.loop is not self.loop:
            raise BadValue("the reference belongs to another event loop")
        if interface is not None and own is not None and not own.is_a(interface):
            raise BadType(f"expected a {interface.name}, not a {own.name}")
        if interface is not None and own is None:
            raise BadValue(f"expected a {interface.name}; cast the reference first")
        if other is not self and own is not None and own == WW.ByteStream:
            from wetware.rpc.bytestream import relayed  # its bytes are in frames of its connection

            stream = relayed(ref)
            try:
                return self.give(Guarded(stream, guard), interface, guard)
            except BaseException:
                stream.released()
                raise
        # It goes back through the membrane that it came in by, or there is no membrane.
        if ref._guard is guard and (guard is None or other is self):
            return other.client(ref)
        if own is None:
            raise Unsupported(
                "a capability of unknown interface does not pass a membrane",
                hint="cast it to its interface first",
            )
        export = self._new_export(own, None, ref, interface, guard)
        return export.__ww_module__._new_client(export)

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

    def own(self, handle: RpcConnection) -> None:
        """`handle` is what the application holds; without it and all references we close."""
        self._handle = weakref.ref(handle)

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

    # --- our calls
    # ----------------------------------------------------------------------------------

    def check_loop(self) -> None:
        """Raise unless we run on the connection's loop."""
        if _get_running_loop() is not self.loop:
            raise WetwareError(
                "a Ref was used outside of the event loop that its connection belongs to",
                hint="use asyncio.run_coroutine_threadsafe() with the connection's loop",
                code="rpc.wrong_loop",
            )

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
                    f"{self.calls_out_max}, call_bytes_out_max is {self.bytes_out_max}",
                    hint="the peer answers slowly; make fewer calls at a time",
                ) from None
            raise

    def wake(self) -> None:
        """Give a free place to the first that waits; it wakes the next one when it has sent."""
        while (
            self.queue
            and self.calls_out < self.calls_out_max
            and self.bytes_out < self.bytes_out_max
        ):
            future = self.queue.popleft()
            if not future.done():
                self.calls_out += 1
                future.set_result(None)
                return

    # --- the peer's calls
    # ---------------------------------------------------------------------------

    def results_wait(self) -> bool:
        """Whether results have to wait until others are sent."""
        held = self.results_pending + self.transport.out_bytes
        return held > self.limits.result_bytes_out_max

    async def results_place(self) -> None:
        """Wait until results may be made: bounded, a stalled connection ends."""
        while self.results_wait() and not self.closed:
            if self._results_free is None:
                self._results_free = asyncio.Event()
            await self._results_free.wait()

    def _on_sent(self, size: int) -> None:
        self.results_pending = max(0, self.results_pending - size)

    def on_drained(self) -> None:
        """The transport has sent something."""
        if self._results_free is not None and not self.results_wait():
            self._results_free.set()
            self._results_free = None

    # --- life
    # ---------------------------------------------------------------------------------------

    def bootstrap(self, interface: Interface) -> Ref:
        """A reference to the peer's first object."""
        self.check_loop()
        if self.closed:
            raise Disconnected("the connection is closed", hint="connect again")
        return self.take(self._rpc.bootstrap().cast_as(interface.raw), interface, None)

    def _on_lost(self, exc: Exception | None) -> None:
        if not self.closed:
            self.reason = exc
            log.debug("rpc.lost", reason=str(exc))
        self.shut()
        self._lost.set()

    def shut(self) -> None:
        """Let go of everything that is pycapnp's: calls in flight fail, methods are cancelled."""
        if self.closed:
            return
        self.closed = True
        self.served._end = None
        self._end_trust_wait()
        self.clients.clear()
        while self.queue:
            future = self.queue.popleft()
            if not future.done():
                future.set_exception(Disconnected("the connection ended", hint="connect again"))
        if self._results_free is not None:
            self._results_free.set()
            self._results_free = None
        self._rpc.close()
        self._stream.close()

    async def wait_closed(self) -> None:
        """Until the connection has ended, whoever ended it."""
        await self._lost.wait()

    async def aclose(self) -> None:
        """Close; wait, within `close_s`, for the last bytes and for methods to end. Idempotent."""
        if self._released:
            await self._lost.wait()
            return
        self._released = True
        tasks = list(self.tasks)
        self.shut()
        try:
            try:
                async with asyncio.timeout(self.limits.close_s):
                    await self._lost.wait()
                    if tasks:
                        await asyncio.wait(tasks)
            except TimeoutError:
                log.warning("rpc.close_slow", methods=len(self.tasks))
                self.transport.abort()
                await self._lost.wait()
        finally:
            self.runtime.connections.discard(self)


Again: TypeAlias = "Callable[[RpcConnection], Awaitable[RpcConnection]]"


class RpcConnection:
    """A connection to a peer's RPC server, from `connect` or `connect_unix`.

    Close it with `aclose`, or use it as `async with`. References keep it open.

    Attributes:
        again: Waits for the connection that takes the place of one that was lost, where the
            application makes one; raises where it cannot. None where it does not.
    """

    __slots__ = ("__weakref__", "_end", "_held", "again")

    def __init__(self, end: End) -> None:
        self._end = end
        self._held = True
        self.again: Again | None = None
        end.own(self)

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

    async def wait_closed(self) -> None:
        """Until the connection has ended, whoever ended it."""
        await self._end.wait_closed()

    async def aclose(self) -> None:
        """Close. Calls in flight raise Disconnected. Idempotent."""
        self._end.check_loop()
        if self._held:
            self._held = False
            await _runtime.finish(_close(self._end))

    async def __aenter__(self) -> RpcConnection:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if getattr(self, "_held", False):
            self._held = False
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=1)
            self._end.runtime.soon(_abandon, self._end)

    def __repr__(self) -> str:
        return f"<RpcConnection{' closed' if self.closed else ''}>"


async def _close(end: End) -> None:
    try:
        await end.aclose()
    finally:
        await _runtime.release()


def _abandon(end: End) -> None:
    end.runtime.run_hook(lambda: _close(end), "unclosed RpcConnection")


async def open_client(pipe: Pipe, limits: RpcLimits) -> RpcConnection:
    """A connection as a client over a pipe that has not started yet."""
    runtime = await _runtime.acquire()
    try:
        return RpcConnection(End(runtime, pipe, limits, None))
    except BaseException:
        pipe.abort()
        await _runtime.release()
        raise


async def run_server(
    pipe: Pipe,
    bootstrap: Servant | Guarded,
    limits: RpcLimits,
    *,
    stranger_message_bytes_max: int | None = None,
    trust_s: float | None = None,
    started: Callable[[End], None] = lambda _end: None,
) -> None:
    """Serve `bootstrap` over a pipe that has not started yet, until it ends or we are cancelled.

    `started` is called with this end of it. For the other keywords see `wetware.rpc.serve`.
    """
    stranger_limits = None
    if stranger_message_bytes_max is not None:
        stranger_limits = for_strangers(limits, stranger_message_bytes_max)
    runtime = await _runtime.acquire()
    try:
        end = End(
            runtime, pipe, limits, bootstrap, stranger_limits=stranger_limits, trust_s=trust_s
        )
    except BaseException:
        _undelivered(runtime, bootstrap)
        pipe.abort()
        await _runtime.release()
        raise
    try:
        started(end)
        await end.wait_closed()
    finally:
        await _runtime.finish(_close(end))
