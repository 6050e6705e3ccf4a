"""Our objects in the hands of a peer, and its calls on them."""

from __future__ import annotations

import asyncio
from asyncio import current_task
from collections.abc import Callable, Coroutine, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from capnp.lib.capnp import _DynamicCapabilityServer

from wetware.base.log import get_logger
from wetware.errors import InvalidArgument, LimitExceeded, Unsupported, WetwareError
from wetware.rpc.codec import BadType, BadValue, Crossing, expected
from wetware.rpc.refs import Caller, Ref, call, message_size, too_large
from wetware.rpc.schema import WW
from wetware.rpc.servant import Guard, Servant
from wetware.rpc.wire import fresh, internal_error, to_wire

if TYPE_CHECKING:
    from wetware.rpc.kjloop import Runtime
    from wetware.rpc.limits import RpcLimits
    from wetware.rpc.schema import Interface, Method

log = get_logger("rpc")


@dataclass(frozen=True, slots=True)
class Guarded:
    """An object with a guard of its own, to be returned or passed in the object's place."""

    target: Servant
    guard: Guard | None


def guarded(target: Servant, guard: Guard | None) -> Guarded:
    """Export `target` under `guard` instead of the guard that it would inherit."""
    if not isinstance(target, Servant):
        raise TypeError(f"guarded() takes a Servant, not {type(target).__name__}")
    return Guarded(target, guard)


class ServedConnection:
    """The connection that a call came by, from `current_connection`."""

    __slots__ = ("_end",)

    def __init__(self, end: Callee | None) -> None:
        self._end = end  # None once the connection has ended

    @property
    def trusted(self) -> bool:
        """Whether the connection has its full limits: `trust` was called, or nothing asks for it.

        True as well once the connection has ended, and outside of a call.
        """
        return self._end is None or self._end.transport.trusted

    def trust(self) -> None:
        """The peer has proved who it is: from here on the connection has its full limits.

        Call it before the peer is answered. It cannot be undone. Idempotent; does nothing once the
        connection has ended, outside of a call, and where `serve` set no limits for strangers.
        """
        if self._end is not None:
            self._end.trust()


# One variable for both: it is set for each call.
_current: ContextVar[tuple[Guard | None, ServedConnection]] = ContextVar(
    "wetware_rpc_call", default=(None, ServedConnection(None))
)


def current_guard() -> Guard | None:
    """In a servant's method: the guard of the call, e.g. to end a subscription when it ends."""
    return _current.get()[0]


def current_connection() -> ServedConnection:
    """In a servant's method: the connection of the call, e.g. to trust it after a login.

    Outside of a call it stands for no connection: trusting it does nothing.
    """
    return _current.get()[1]


# --- dispatch -------------------------------------------------------------------------------------


class _Export(_DynamicCapabilityServer):
    """One of our objects in the hands of pycapnp: dispatches calls to a servant, or forwards them.

    pycapnp holds the only reference, so that the end of this object tells that the peer let go.
    """

    _end: Callee
    _target: Servant | Ref
    _guard: Guard | None

    def __init__(self, end: Callee, target: Servant | Ref, guard: Guard | None) -> None:
        self._end = end
        self._target = target
        self._passed = isinstance(target, Ref)  # a foreign object behind the membrane
        self._guard = guard
        self._frame = (guard, end.served)
        self._crossing = end.crossing_under(guard)
        end.exports += 1
        if guard is not None:
            guard.exported()
        if isinstance(target, Servant):
            target.__ww_exports__ += 1

    def __del__(self) -> None:
        end = self.__dict__.get("_end")
        if end is not None:
            end.exports -= 1
            guard, target = self._guard, self._target
            if guard is not None and guard.unexported():
                end.runtime.soon(guard.let_go)
            if isinstance(target, Servant):
                target.__ww_exports__ -= 1
                if target.__ww_exports__ == 0:
                    end.runtime.unheld(target)


def undelivered(runtime: Runtime, values: Any) -> None:
    """Servants among `values`, which do not reach the peer after all, are released.

    One that was exported before the answer failed has pycapnp's export still, and goes with that.
    """
    todo, seen = [values], {}
    while todo:
        value = todo.pop()
        if isinstance(value, Guarded):
            value = value.target
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
        end, guard, passed = self._end, self._guard, self._passed
        task: Any = current_task()  # pycapnp runs each call in one of its own
        args: Any
        values: Any = None  # what the servant returned and the peer has not got
        entered = False
        try:
            if len(end.tasks) >= end.limits.calls_in_max:
                raise end.refusal(method)  # noqa: TRY301  # one exit for all refusals
            end.tasks.add(task)
            _current.set(self._frame)
            args = _arguments(context, method, self._crossing)
            if guard is not None:
                waiting = guard.enter(method, args, task, passed)
                entered = True
                if waiting is not None:
                    await waiting
            if passed:
                values = await call(self._target, method, args)  # type: ignore[arg-type]  # a Ref
            else:
                values = await getattr(self._target, name)(**args)
            # The call stays entered until it is answered: the end of its guard cuts the wait, too.
            if guard is not None and guard.ended is not None:
                raise fresh(guard.ended)  # noqa: TRY301
            if method.results:
                if end.results_wait():
                    await end.results_place()
                    if guard is not None and guard.ended is not None:
                        raise fresh(guard.ended)  # noqa: TRY301
                onward = None if guard is None else guard.onward(method, args, passed)
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
                undelivered(end.runtime, values)
            # The frame may live on in somebody's traceback, and the task refers to it: no cycles.
            context = task = args = values = None
        raise failure.pop()

    dispatch.__name__ = name
    dispatch.__qualname__ = method.where
    return dispatch


async def _charge(guard: Guard, method: Method, end: Callee, size: int) -> None:
    """Charge the bytes of an answer; if they are refused, the answer does not count as waiting."""
    try:
        if (waiting := guard.charge(method, size)) is not None:
            await waiting
    except BaseException:
        end.results_pending = max(0, end.results_pending - size)
        raise


def _arguments(context: Any, method: Method, crossing: Crossing) -> dict[str, Any]:
    """A call's parameters as plain values; the message is freed."""
    try:
        args = method.param_codec.read(context.params, crossing)
        context.release_params()
        return args  # noqa: TRY300  # errors leave by the raise at the end
    except WetwareError as exc:
        failure = [fresh(exc)]
    except Exception as exc:  # hostile bytes: pycapnp, UTF-8, recursion
        log.debug("rpc.malformed", method=method.where, error=repr(exc)[:200])
        failure = [InvalidArgument(f"{method.where}: malformed parameters")]
    del context
    raise failure.pop()


def _answer(context: Any, method: Method, values: Any, end: Callee, guard: Guard | None) -> int:
    """Put a servant's results into the answer; returns their size in bytes."""
    results = None
    bytes_max = end.limits.message_bytes_max
    failure: list[Exception]
    try:
        if values is None:
            values = {}
        elif type(values) is not dict:
            raise expected("dict", values)  # noqa: TRY301
        results = context.results
        method.result_codec.store(results, values, end.crossing_under(guard))
        size = message_size(results)
        if size <= bytes_max:
            end.results_pending += size
            return size
        failure = [too_large(method, "results", size, bytes_max, "ask for less at a time")]
    except BadValue as exc:  # the servant's defect, not the caller's
        failure = [TypeError(f"bad results: {exc.text(method.where)}")]
    except WetwareError as exc:
        failure = [fresh(exc)]
    except Exception as exc:  # pycapnp's
        failure = [TypeError(f"bad results: {str(exc)[:200]}")]
    del context, results
    raise failure.pop()


# --- what being called needs of a connection ------------------------------------------------------


class Callee(Caller):
    """An end of a connection, as far as it is called as well.

    Attributes:
        tasks: The calls that run for the peer.
        exports: How many of our objects it holds.
        results_pending: Bytes of results that are not sent yet.
        refused: Why none are taken, where none are.
    """

    def __init__(
        self, runtime: Runtime, limits: RpcLimits, refused: WetwareError | None = None
    ) -> None:
        super().__init__(runtime, replace(limits, calls_in_max=0) if refused else limits)
        self.refused = refused
        self.served = ServedConnection(self)
        self.tasks: set[asyncio.Task[Any]] = set()
        self.exports = 0
        self.results_pending = 0
        self.results_free = asyncio.Event()  # never stays set

    def trust(self) -> None:
        """The peer has proved who it is."""
        raise NotImplementedError

    def carried(self, stream: Ref) -> Servant:
        """What stands here for a byte stream that came by another connection."""
        raise NotImplementedError

    def give(self, value: Any, interface: Interface | None, guard: Guard | None) -> Any:
        """A pycapnp client for a value that stands for a capability."""
        if isinstance(value, Guarded):
            value, guard = value.target, value.guard
        if isinstance(value, Ref):
            if value._end.loop is not self.loop:
                raise BadValue("the reference belongs to another event loop")
            if value._end is not self and value._interface == WW.ByteStream:
                value = self.carried(value)
        # It goes back through the membrane that it came in by, or there is none. To another
        # connection its calls are forwarded here: the streams that come of them are carried.
        if (
            isinstance(value, Ref)
            and value._guard is guard
            and (value._end is self or (guard is None and value._interface is None))
        ):
            _check_interface(value._interface, interface)
            return value._end.client(value)
        export = self.export(value, interface, guard)
        return export.__ww_module__._new_client(export)

    def export(self, value: Any, interface: Interface | None, guard: Guard | None) -> Any:
        """An object as pycapnp serves it to the peer; a Ref is forwarded, behind the membrane."""
        if isinstance(value, Guarded):
            value, guard = value.target, value.guard
        if isinstance(value, Servant):
            own = value.__ww_interface__
            if own is None:
                raise BadValue(f"{type(value).__name__} is bound to no interface")
        elif isinstance(value, Ref):
            own = value._interface
        else:
            raise expected("a capability (a Servant or a Ref)", value)
        _check_interface(own, interface)
        if own is None:
            raise Unsupported(
                "a capability of unknown interface does not pass a membrane",
                hint="cast it to its interface first",
            )
        if self.exports >= self.limits.exports_max:
            raise LimitExceeded(
                f"the peer holds {self.exports} objects: exports_max is {self.limits.exports_max}",
                hint="close references that are not used any more",
            )
        return (own.export_class or _export_class(own))(self, value, guard)

    def refusal(self, method: Method) -> WetwareError:
        """Of a call beyond `calls_in_max`."""
        if self.refused is not None:
            return fresh(self.refused)
        return LimitExceeded(
            f"{method.where}: {self.limits.calls_in_max} calls are running (calls_in_max)",
            hint="wait for some to end",
        )

    def results_wait(self) -> bool:
        """Whether results have to wait until others are sent."""
        held = self.results_pending + self.transport.unsent_bytes
        return held > self.limits.result_bytes_out_max

    async def results_place(self) -> None:
        """Wait until results may be made: bounded, a stalled connection ends."""
        while self.results_wait() and not self.closed:
            await self.results_free.wait()

    def on_sent(self, size: int) -> None:
        self.results_pending = max(0, self.results_pending - size)

    def on_drained(self) -> None:
        """The transport has sent something."""
        if not self.results_wait():
            self.results_free.set()
            self.results_free.clear()


def _check_interface(own: Interface | None, wanted: Interface | None) -> None:
    """Raise unless an object of the interface `own` can be passed where `wanted` is."""
    if wanted is None or own is wanted:
        return
    if own is None:
        raise BadValue(f"expected a {wanted.name}; cast the reference first")
    if not own.is_a(wanted):
        raise BadType(f"expected a {wanted.name}, not a {own.name}")
